"""What is remembered of the snapshots."""

import operator
from typing import Any

import optree
import torch
from torch import Tensor

from .._tree import (
    Fixed,
    Params,
    difference,
    is_parameter,
    map_leaves,
    named_leaves,
    parameters_of,
    pytree_dataclass,
    select,
    static,
)
from ._moments import differences, summed

# So many snapshots leave the buffer at a time: of their sums only the first asks for new memory, and fresh
# memory costs more than what is written into it.
_AT_ONCE = 8


@pytree_dataclass
class State:
    """Snapshots seen so far: the latest as they are, of those before only sums.

    Trees have the parameters of a snapshot as leaves, in at least float32 but for ``origin``. An update
    adds to ``recent`` and shares the rest; now and then it adds the oldest of ``recent`` to the sums.

    Attributes:
        origin: The first snapshot, ``theta_1``; zeros before there is one.
        total: Sum of ``theta_t - theta_1`` over the snapshots that are no longer in ``recent``.
        squares: Sum of ``(theta_t - theta_1) ** 2`` over the same.
        recent: ``theta_t - theta_1`` of the latest snapshots, oldest first: at least ``rank`` of them, if
            there were as many.
        fixed: The ``Fixed`` leaves of the latest snapshot.
        num_snapshots: How many there were, ``n``.
        rank: How many deviations the covariance will have at most.
    """

    origin: Params
    total: Params
    squares: Params
    recent: tuple[Params, ...]
    fixed: Params
    num_snapshots: int = static(default=0)
    rank: int = static(default=20)


def init(params: Params, rank: int = 20) -> State:
    """Begin to collect snapshots.

    Args:
        params: Of the shapes that snapshots will have; the values are not looked at, and are no snapshot.
            ``Fixed`` leaves are passed by; integer leaves are not collected.
        rank: How many of the last deviations the covariance will have, ``K``; 0 for a diagonal one.

    Returns:
        A state without snapshots.

    Raises:
        TypeError: If ``rank`` is no int.
        ValueError: If ``rank`` is negative, or there is no leaf of floating point.

    Example:
        See :func:`funcbayes.swag.posterior`.
    """
    if isinstance(rank, bool) or not hasattr(rank, "__index__"):
        raise TypeError(f"`swag.init(rank=...)` should be an int, got {type(rank).__name__}.")
    if rank < 0:
        raise ValueError(f"`swag.init(rank=...)` should be at least 0, got {rank}.")
    if not parameters_of(params):
        raise ValueError("`swag.init(params)` should have a leaf of floating point, got none.")
    with torch.inference_mode(False), torch.no_grad():
        like = select(params, lambda _, leaf: is_parameter(leaf))
        origin = map_leaves(_zeros, like)
        total, squares = (map_leaves(_wide_zeros, like) for _ in range(2))
        return State(origin, total, squares, (), {}, 0, operator.index(rank))


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf.detach(), memory_format=torch.contiguous_format)


def _wide_zeros(leaf: Tensor) -> Tensor:
    # A sum in half precision would not move any more after some hundred snapshots.
    return _zeros(leaf).to(torch.promote_types(leaf.dtype, torch.float32))


def update(state: State, params: Params) -> State:
    """Add a snapshot.

    A pure function: ``params`` are copied, and neither they nor ``state`` are changed. It works leaf by
    leaf, so the state of several networks, every leaf with a leading axis, is updated as that of one; under
    ``torch.func.vmap`` too. Finite values are not asked for before :func:`posterior`.

    Args:
        state: The state so far; the new one shares its memory where it can.
        params: The snapshot, with the leaves that :func:`init` was given. ``Fixed`` leaves replace earlier
            ones.

    Returns:
        The state with one more snapshot.

    Raises:
        ValueError: If the leaves differ from those that :func:`init` was given.

    Example:
        See :func:`funcbayes.swag.posterior`.
    """
    with torch.inference_mode(False), torch.no_grad():
        named = named_leaves(params)
        leaves = _parameters_like(state, named)
        structure: Any = optree.tree_structure(state.origin)
        origin = state.origin if state.num_snapshots else structure.unflatten([*map(_copy, leaves)])
        shifts = differences(leaves, optree.tree_leaves(origin))
        recent = (*state.recent, structure.unflatten(shifts))
        fixed: Params = {}
        if len(named) > len(leaves):
            fixed = map_leaves(torch.clone, select(params, lambda _, leaf: isinstance(leaf, Fixed)))
        total, squares, rank = state.total, state.squares, state.rank
        if len(recent) == rank + _AT_ONCE:
            total, squares = summed(total, squares, recent[:_AT_ONCE])
            recent = recent[_AT_ONCE:]
        return State(origin, total, squares, recent, fixed, state.num_snapshots + 1, rank)


def _parameters_like(state: State, named: dict[str, Any]) -> list[Tensor]:
    """The parameters of a snapshot in the order of those of the state."""
    given: dict[str, Tensor] = {name: leaf for name, leaf in named.items() if is_parameter(leaf)}
    expected = named_leaves(state.origin)
    if given.keys() != expected.keys() or any(given[k].shape != v.shape for k, v in expected.items()):
        raise ValueError(
            "`swag.update(state, params)` should be given the leaves that `swag.init(params)` was given; "
            f"{difference(given, expected)}."
        )
    return [given[name] for name in expected]


def _copy(leaf: Tensor) -> Tensor:
    return leaf.detach().clone(memory_format=torch.contiguous_format)
