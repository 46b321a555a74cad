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
        if t.is_floating_point():  # none stays as it is, nor leaves the range from 0 to 1
            return 0.9 * t[:1] + torch.where(t[:1] > 0.5, -0.1, 0.1).to(t)
        if not is_concrete(t) or len(t) < 3:
            return t[1:2] if len(t) > 1 else t[:1]
        n = int((t != t[:1]).reshape(len(t), -1).any(-1).to(torch.uint8).argmax())  # 0 if all are equal
        return t[n : n + 1]

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
        if not is_concrete(both):
            return axis, size, True
        # Numbers may all be small, so what is close depends on them, and on no more than rounding at last.
        largest = float(both.nan_to_num(0, 0, 0).abs().max()) if both.numel() else 0.0
        for atol in (1e-5 * largest, 1e-5):
            for rows, lie_together in ((together, True), (apart, False)):
                if torch.allclose(rows, both, equal_nan=True, rtol=1e-3, atol=atol):
                    return axis, size, lie_together
    raise ValueError(
        "`Dropout(shared_mask=True)` should find one axis of the rows wherever the model drops; with one row "
        f"the shape there is {tuple(first.shape)}, with two rows {tuple(both.shape)}."
    )
