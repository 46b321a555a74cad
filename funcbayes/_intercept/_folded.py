"""Dropout of several draws at once, whose rows are the rows of one call of the model."""

from torch import Tensor

from .._functorch import is_plain
from .._masks import Place, are_made_together, dropout_mask, dropout_masks


class Folded:
    """Masks of several draws, for a model that treats rows one by one and is given those of all draws.

    The first mask has the axis of the draws in front, which its product with a value puts before the rows of
    one draw. There the two become one axis, and from then on values have the rows of all draws.

    Args:
        num_draws: How many.
        places: Those of the last evaluation, as far as their masks can be made together: this takes the steps
            of one. They are replaced by those of this evaluation.
    """

    def __init__(self, num_draws: int, places: list[Place]) -> None:
        self.num_draws, self.places = num_draws, places
        self.is_begun = False
        self._made: dict[Place, Tensor] = {}
        self._wanted: list[Place] = []

    def mask(self, keys: Tensor, place: Place) -> Tensor:
        """The mask of a value, of which ``place`` has the shape: before the first mask that of one draw."""
        is_first, self.is_begun = not self.is_begun, True
        if is_first:
            known = tuple(self.places)
            if len(known) > 1 and is_plain(keys):
                self._made = dict(zip(known, dropout_masks(keys, known), strict=True))
        else:
            rows, *rest = place.shape
            place = place._replace(shape=(rows // self.num_draws, *rest))
        if are_made_together(keys, place) and place.dtype == (self._wanted or [place])[0].dtype:
            self._wanted.append(place)
        made = self._made.pop(place, None)
        mask = dropout_mask(keys, place) if made is None else made
        return mask if is_first else mask.flatten(0, 1)

    def end(self) -> None:
        """Leave behind where masks were wanted."""
        if self.places != self._wanted:
            self.places[:] = self._wanted
