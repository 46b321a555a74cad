"""A batch seen a block of rows at a time: outputs, and gradients of leaves for any columns."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from .._allocator import keep_large_blocks
from .._functional import Model
from .._tree import Params, index, map_leaves, named_leaves, num_rows
from ._gradients import RowGradients
from ._others import gradients_of_others
from ._plan import Plan, gradients_of_layers, plan_for
from ._taped import Taped, signature_of, tape

# Smaller blocks take more calls for the same, and larger ones are hardly faster.
DEFAULT_BYTES = 256 << 20
# If a single row has more than this, it sees fewer columns at a time.
ROW_BYTES = 512 << 20


@dataclass(frozen=True)
class Block:
    """Some rows of a batch.

    Attributes:
        outputs: ``(M, N, *event)``, without a graph.
        rows: Where these rows are in the batch.
        num_columns: For how many columns at a time there is room.
    """

    fn: Model
    params: Params
    x: Any
    plan: Plan
    taped: Taped
    num_members: int | None
    rows: slice
    num_columns: int

    @functools.cached_property
    def outputs(self) -> Tensor:
        """``(M, N, *event)``, without a graph."""
        return self.taped.outputs.detach()

    def gradients(self, columns: Tensor) -> dict[str, RowGradients]:
        """Gradients by leaf for cotangents ``(K, M, N, *event)``; leaves without any are left out."""
        shapes = {
            name: leaf.shape if self.num_members is None else leaf.shape[1:]
            for name, leaf in self.taped.leaves.items()
        }
        others = self.plan.others
        with torch.inference_mode(False):
            found = gradients_of_layers(self.plan, self.taped, columns, shapes)
            return found | gradients_of_others(
                self.fn, self.params, others, self.x, columns, self.num_members
            )


def blocks(
    fn: Model,
    params: Params,
    names: Sequence[str],
    x: Any,
    *,
    num_columns: Callable[[torch.Size], int],
    call: str,
    num_members: int | None = None,
    max_bytes: int | None = None,
) -> Iterator[Block]:
    """Evaluate a batch.

    Args:
        fn: Pure model.
        params: Its parameters; with ``num_members`` all leaves have a leading axis of members.
        names: Leaves whose gradients will be asked for.
        x: Inputs.
        num_columns: How many columns there should be at a time, given the shape of the outputs of one row.
        call: How the user called us, for messages.
        num_members: ``M``; ``None`` for a single network.
        max_bytes: Bytes that the gradients of one block may have.
    """
    with torch.inference_mode(
        False
    ):  # which says nothing of these numbers, and would not let autograd save them
        params, x = map_leaves(_ordinary, params), map_leaves(_ordinary, x)
        single = params if num_members is None else index(params, 0)
    plan = plan_for(fn, single, names, x, call)
    lead = next(iter(named_leaves(params).values()))
    if getattr(lead, "is_cpu", False):
        keep_large_blocks()
    of_number = (num_members or 1) * getattr(lead, "itemsize", 4)
    without, of_column = plan.numbers(0), plan.numbers(1) - plan.numbers(0)
    room = (ROW_BYTES if max_bytes is None else max_bytes) // of_number - without
    columns = min(num_columns(plan.event), max(room // max(of_column, 1), 1))
    each = of_number * (without + columns * of_column)
    size = max((DEFAULT_BYTES if max_bytes is None else max_bytes) // max(each, 1), 1)
    for part, own in parts_of(x, size):
        taped = tape(fn, params, names, own, num_members=num_members)
        way = signature_of(taped)
        if way != plan.calls:  # it depends on the data
            plan = plan_for(fn, single, names, own, call, way)
        if way != plan.calls:  # and even on the row
            plan = replace(plan, layers=(), rows=(), others=tuple(names), calls=way)
        yield Block(fn, params, own, plan, taped, num_members, part, columns)


def parts_of(x: Any, size: int) -> Iterator[tuple[slice, Any]]:
    """Inputs, at most so many rows at a time and as equally many as can be, and which rows these are."""
    count = num_rows(x) or 0
    size = max(-(-count // max(-(-count // size), 1)), 1)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        yield part, x if size >= count else _rows(x, part)


def _ordinary(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _rows(x: Any, part: slice) -> Any:
    return optree.tree_map(lambda leaf: leaf[part] if isinstance(leaf, Tensor) and leaf.ndim else leaf, x)
