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
from ._moments import differences, merged


def block_size(rank: int) -> int:
    """How many snapshots leave the buffer at a time.

    Merging a block makes a few new tensors, and fresh memory costs more than what is written into it, so
    that larger blocks are cheaper. Where no deviations are kept the buffer is all that takes much memory.
    """
    return 8 if rank else 5


@pytree_dataclass
class State:
    """Snapshots seen so far: the latest as they are, of those before only moments.

    Trees have the parameters of a snapshot as leaves, in at least float32 but for ``origin``. An update
    adds to ``recent`` and shares the rest; now and then it merges the oldest block of ``recent`` with the
    moments.

    Attributes:
        origin: The first snapshot, ``theta_1``; zeros before there is one.
        mean: Mean of ``theta_t - theta_1`` over the snapshots that are no longer in ``recent``.
        squares: Sum of the squared deviations of the same from their mean.
        recent: The latest snapshots, oldest first: at least ``rank`` of them, if there were as many. They
            come in blocks of ``block_size(rank)``, of which the last may be unfinished: the first snapshot of
            a block as it is, the others less the first.
        fixed: The ``Fixed`` leaves of the latest snapshot.
        num_snapshots: How many there were, ``n``.
        rank: How many deviations the covariance will have at most.
    """

    origin: Params
    mean: Params
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
        mean, squares = (map_leaves(_wide_zeros, like) for _ in range(2))
        return State(origin, mean, squares, (), {}, 0, operator.index(rank))


def _zeros(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf.detach(), memory_format=torch.contiguous_format)


def _wide_zeros(leaf: Tensor) -> Tensor:
    # A mean in half precision would not move any more after some hundred snapshots.
    return _wide(_zeros(leaf))


def _wide(leaf: Tensor) -> Tensor:
    return leaf.to(torch.promote_types(leaf.dtype, torch.float32))


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
        size, place = block_size(state.rank), len(state.recent) % block_size(state.rank)
        if place:
            row = differences(leaves, optree.tree_leaves(state.recent[-place]))
        elif state.num_snapshots:
            row = [*map(_wide_copy, leaves)]
        else:
            row = [*map(_wide, optree.tree_leaves(origin))]  # the same memory where it can be
        recent = (*state.recent, structure.unflatten(row))
        fixed: Params = {}
        if len(named) > len(leaves):
            fixed = map_leaves(torch.clone, select(params, lambda _, leaf: isinstance(leaf, Fixed)))
        mean, squares, n = state.mean, state.squares, state.num_snapshots + 1
        if len(recent) == state.rank + size:
            count, block = n - len(recent), recent[:size]
            mean, squares = merged(mean, squares, count, block, origin, is_last_spare=not state.rank)
            recent = recent[size:]
        return State(origin, mean, squares, recent, fixed, n, state.rank)


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


def _wide_copy(leaf: Tensor) -> Tensor:
    wide = _wide(leaf.detach())
    return _copy(wide) if wide.dtype == leaf.dtype else wide.contiguous()
