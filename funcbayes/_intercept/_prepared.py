"""Dropout whose masks are made before the model is called."""

import math

from torch import Tensor

from .._functorch import is_concrete, outside_transforms, unintercepted, unwrap, vmap_level, wrap
from .._masks import Place, are_made_together, dropout_mask, dropout_masks

# Larger masks take long enough to make wherever that is done.
_LARGEST = 1 << 13
# More numbers for several draws would fall out of the processor's caches until they are wanted.
_MOST = 1 << 18


class Prepared:
    """Masks of one draw, or of those that a function is mapped over, where the last one had masks.

    What layers compute leaves nothing of Python in the processor's caches, so that a mask made between two of
    them takes several times as long as one after another.

    Args:
        masks: Those that there are, with an axis of the draws in front if keys will have one.
        places: Where they were wanted the last time, but for large ones; replaced by those of this time.
    """

    def __init__(self, masks: dict[Place, Tensor], places: list[Place]) -> None:
        self._masks, self._places = masks, places
        self._wanted: list[Place] = []

    def mask(self, keys: Tensor, place: Place) -> Tensor | None:
        """The mask of a place, if it was expected to be wanted."""
        if math.prod(place.shape) <= _LARGEST:
            self._wanted.append(place)
        level = vmap_level()
        physical, axis = (keys, None) if level is None else unwrap(keys, level)
        if not is_concrete(physical):  # mapped by a function around
            return None
        made = self._masks.pop(place, None)
        return made if made is None or level is None or axis is None else wrap(made, 0, level)

    def end(self) -> None:
        """Leave behind where masks were wanted."""
        if self._places != self._wanted:
            self._places[:] = self._wanted


def prepared(keys: Tensor, places: list[Place]) -> list[Prepared]:
    """Masks of several draws, one by one.

    Args:
        keys: int64 ``(k,)``, of each draw.
        places: Where masks were wanted the last time.
    """
    masks = {place: of_draws.unbind(0) for place, of_draws in _made(keys, places).items()}
    alone = [{place: of_draws[i] for place, of_draws in masks.items()} for i in range(len(keys))]
    return [Prepared(own, places) for own in alone]


def prepared_together(keys: Tensor, places: list[Place]) -> Prepared:
    """Masks of several draws, for a function that is mapped over these; arguments as above."""
    is_small = len(keys) * sum(math.prod(place.shape) for place in places) <= _MOST
    return Prepared(_made(keys, places) if is_small else {}, places)


def _made(keys: Tensor, places: list[Place]) -> dict[Place, Tensor]:
    """Masks ``(k, *s)`` by place."""
    known = tuple(dict.fromkeys(places))  # another thread may replace them
    if not known:
        return {}
    with unintercepted(), outside_transforms():
        dtype = known[0].dtype
        together = tuple(place for place in known if are_made_together(keys, place) and place.dtype == dtype)
        masks = dict(zip(together, dropout_masks(keys, together), strict=True)) if together else {}
        return {place: masks[place] if place in masks else dropout_mask(keys, place) for place in known}
