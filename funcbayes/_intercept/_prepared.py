"""Dropout whose masks are made before the model is called."""

import math

from torch import Tensor

from .._random import Place, are_made_together, dropout_mask, dropout_masks

# Larger masks take long enough to make wherever that is done.
_LARGEST = 1 << 13


class Prepared:
    """Masks of one draw, at the places where the last one had them.

    What layers compute leaves nothing of Python in the processor's caches, so that a mask made between two of
    them takes several times as long as one after another.

    Args:
        masks: Those that there are.
        places: Where they were wanted the last time; replaced by those of this evaluation.
    """

    def __init__(self, masks: dict[Place, Tensor], places: list[Place]) -> None:
        self._masks, self._places = masks, places
        self._wanted: list[Place] = []

    def mask(self, keys: Tensor, place: Place) -> Tensor | None:
        """The mask of a place, unless it was not expected."""
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
    made: list[dict[Place, Tensor]] = [{} for _ in keys]
    together = tuple(
        place for place in places if are_made_together(keys, place) and place.dtype == places[0].dtype
    )
    if together:
        for place, masks in zip(together, dropout_masks(keys, together), strict=True):
            for own, mask in zip(made, masks.unbind(0), strict=True):
                own[place] = mask
    alone = set(places).difference(together)
    for own, key in zip(made, keys.tolist(), strict=True):
        own.update((place, dropout_mask(key, place)) for place in alone)
    return [Prepared(own, places) for own in made]
