"""Where the rows of the inputs are in a value inside the model."""

from typing import Any

import optree
import torch
from torch import Tensor

from .._functorch import is_concrete
from .._tree import num_rows

# For each place of dropout in order of the calls: the axis that holds the rows, how many entries of it
# belong to one row, and whether these lie together; None where no axis holds the rows.
RowAxes = tuple[tuple[int, int, bool] | None, ...]


def two_rows(x: Any) -> tuple[Any, Any]:
    """The first row of ``x``, and one that differs from it."""
    if num_rows(x) is None:
        raise ValueError(
            "`Dropout(shared_mask=True)` should be given `x` whose tensors share their first axis, "
            "one entry a row."
        )

    def other(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.ndim:
            return t
        return 0.9 * t[:1] + 0.1 if t.is_floating_point() else t[1:2] if len(t) > 1 else t[:1]

    return optree.tree_map(lambda t: t[:1] if isinstance(t, Tensor) and t.ndim else t, x), optree.tree_map(
        other, x
    )


def row_axis(first: Tensor, second: Tensor, both: Tensor) -> tuple[int, int, bool] | None:
    """Where two rows are in ``both``, given each of them alone."""
    if first.shape == both.shape:
        return None
    for axis, size in enumerate(first.shape):
        if (
            both.shape != (*first.shape[:axis], 2 * size, *first.shape[axis + 1 :])
            or second.shape != first.shape
        ):
            continue
        if size == 1:
            return axis, size, True
        together = torch.cat([first, second], axis)
        apart = torch.stack([first, second], axis + 1).flatten(axis, axis + 1)
        # Inside a transform numbers cannot be looked at; there rows are taken to lie together.
        if not is_concrete(both) or torch.allclose(together, both, equal_nan=True, rtol=1e-3, atol=1e-5):
            return axis, size, True
        if torch.allclose(apart, both, equal_nan=True, rtol=1e-3, atol=1e-5):
            return axis, size, False
    raise ValueError(
        "`Dropout(shared_mask=True)` should find one axis of the rows wherever the model drops; with one row "
        f"the shape there is {tuple(first.shape)}, with two rows {tuple(both.shape)}."
    )
