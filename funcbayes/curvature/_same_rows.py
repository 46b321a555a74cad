"""Whether several passes over the data go through the same rows."""

from collections.abc import Iterable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor

_ROUNDING = 1e-10  # of sums of rows in double precision, in whatever order they are added


class SameRows:
    """Compares every pass over the data with the first.

    Args:
        call: How the user called us, for the message.
        in_order: Whether rows have to come in one order, too: sums over them do not ask for it.
    """

    def __init__(self, call: str, *, in_order: bool) -> None:
        self.call, self.in_order = call, in_order
        self._first: Tensor | None = None

    def watch(self, batches: Iterable[tuple[int, Any, Tensor]]) -> Iterator[tuple[int, Any, Tensor]]:
        """The same batches; raises at the end of a whole pass that was another than the first."""
        total: Tensor | None = None
        row = 0
        for number, x, y in batches:
            found = self._sums(x, y, row)
            total, row = found if total is None else total + found, row + len(y)
            yield number, x, y
        if total is None or self._first is None:
            self._first = total
            return
        value, size, count = (total - self._first).abs().tolist()
        if count or size > _ROUNDING * float(total[1]) or value > _ROUNDING * float(total[1]):
            raise ValueError(
                f"`{self.call}(data=...)` goes through the data several times and should find the same rows "
                f"each time{', in the same order' if self.in_order else ''}; a later pass had others. Give a "
                "loader with `shuffle=False` and without random transforms, or tensors, `data=(x, y)`."
            )

    def _sums(self, x: Any, y: Tensor, row: int) -> Tensor:
        """Sums over rows that tell batches apart: a number of each row, its size, and 1."""
        device = y.device
        weights = torch.arange(row, row + len(y), dtype=torch.float64, device=device).add_(1).sin_()
        ones = torch.ones_like(weights)
        values = torch.zeros_like(ones)
        sizes = torch.zeros_like(ones)
        for leaf in [y, *optree.tree_leaves(x)]:
            if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(y) and not leaf.is_complex():
                flat = leaf.reshape(len(y), -1).double().nan_to_num()
                values += flat @ torch.arange(1, flat.shape[1] + 1, device=device).double().sin()
                sizes += flat.abs().sum(1)
        return torch.stack([values @ (weights if self.in_order else ones), sizes.sum(), ones.sum()])
