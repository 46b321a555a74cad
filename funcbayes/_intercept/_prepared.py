"""Dropout whose masks are made before the model is called."""

import math

from torch import Tensor

from .._functorch import outside_transforms, unintercepted
from .._random import Place, are_made_together, dropout_mask, dropout_masks

# Larger masks take long enough to make wherever that is done.
_LARGEST = 1 << 13


class Prepared:
    """Masks of one draw, at the places where the last one had them.

    What layers compute leaves nothing of Python in the processor's caches, so that a mask made between two of
    them takes several times as long as one after another.

    Args:
        masks: Those that there are.
        places: Where they were wanted the last time, but for large ones; replaced by those of this time.
    """

    def __init__(self, masks: dict[Place, Tensor], places: list[Place]) -> None:
        self._masks, self._places = masks, places
        self._wanted: list[Place] = []

    def mask(self, keys: Tensor, place: Place) -> Tensor | None:
        """The mask of a place, if it was expected to be wanted."""
        if math.prod(place.shape) <= _LARGEST:
            self._wanted.append(place)
        return self._masks.pop(place, None)

    def end(self) -> None:
        """Leave behind where masks were wanted."""
        if self._places != self._wanted:
            self._places[:] = self._wanted


def prepared(keys: Tensor, places: list[Place]) -> list[Prepared]:
    """Masks of several draws.

    Args:
        keys: int64 ``(k,)``, of each draw, which can be read.
        places: Where masks were wanted the last time.
    """
    made: list[dict[Place, Tensor]] = [{} for _ in range(len(keys))]
    known = tuple(dict.fromkeys(places))  # another thread may replace them
    if known:
        with unintercepted(), outside_transforms():
            _make(made, keys, known)
    return [Prepared(own, places) for own in made]


def _make(made: list[dict[Place, Tensor]], keys: Tensor, places: tuple[Place, ...]) -> None:
    dtype = places[0].dtype
    together = tuple(place for place in places if are_made_together(keys, place) and place.dtype == dtype)
    if together:
        for place, masks in zip(together, dropout_masks(keys, together), strict=True):
            for own, mask in zip(made, masks.unbind(0), strict=True):
                own[place] = mask
    alone = [place for place in places if place not in together]
    for own, key in zip(made, keys.tolist(), strict=True):
        own.update((place, dropout_mask(key, place)) for place in alone)
