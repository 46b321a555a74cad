"""Losses of many draws and their gradients, in as few vectorised passes as stay in the caches.

Draws may be those of several networks, which have parameters, buffers and rows of their own: ``E = K S``
evaluations, ``S`` of each network after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from .._engine import signature
from .._functional import Model, training_call
from .._global_random import forked, watched
from .._mapping import map_draws
from .._remember import Remembered
from .._tree import Fixed, Params, index, map_leaves, merge, named_leaves, select
from ..likelihoods import Likelihood
from ..training._batch import Batch


@dataclass(frozen=True)
class Traits:
    """What evaluating a model in training does beside giving outputs.

    Attributes:
        changes: Names of the buffers that it changes.
        draws_globally: Whether it draws from torch's global random state, as dropout does not.
    """

    changes: frozenset[str]
    draws_globally: bool


_traits: Remembered[Traits] = Remembered()


def traits_of(fn: Model, params: Params, x: Any) -> Traits:
    """What :func:`look` finds, once for a model and a shape."""
    plain = select(params, lambda _, leaf: not isinstance(leaf, Fixed))
    return _traits.get(fn, (signature(plain), signature(x)), lambda: look(fn, params, x)[0])


def look(fn: Model, params: Params, x: Any) -> tuple[Traits, Any]:
    """Evaluate a model once, without effect; also its outputs."""
    with torch.no_grad(), forked(0):
        (outputs, changed), draws_globally = watched(lambda: training_call(fn, params, x, 0))
    return Traits(frozenset(named_leaves(changed)), draws_globally), outputs


@dataclass(frozen=True)
class Found:
    """What evaluations give.

    Attributes:
        losses: ``(E,)``.
        gradients: Of each loss in its own draw, leaves ``(E, *s)``.
        changed: Buffers that evaluating changed, ``(E, ...)``.
    """

    losses: Tensor
    gradients: Params
    changed: Params


def evaluated(
    fn: Model,
    likelihood: Likelihood,
    shared: Params,
    own: Params,
    draws: Params,
    batch: Batch,
    keys: Tensor,
    *,
    call: str,
    chunk_size: int | None,
) -> Found:
    """Evaluate the mean loss over the rows of a batch at every draw, in training mode.

    Args:
        fn: Pure model.
        likelihood: ``p(y|f)``.
        shared: What all evaluations have in common.
        own: What each network has for itself, ``(K, ...)``.
        draws: ``(E, *s)``.
        batch: One axis over networks, where they do not share rows.
        keys: Of the dropout masks, ``(E,)``.
        call: How the user called us.
        chunk_size: Evaluations of one pass; ``None`` to choose by sizes.
    """
    leaves, structure = optree.tree_flatten(map_leaves(_as_leaf, draws))
    # Not slices, each of which would have a gradient as large as the whole.
    rows = [leaf.unbind(0) for leaf in leaves]
    count = len(keys)

    def one(entry: Any) -> dict[str, Any]:
        values, mine, rows_of_x_and_y, key = entry
        x, y = batch.spec.unflatten(_filled_in(batch, rows_of_x_and_y))
        params = merge(merge(shared, mine), structure.unflatten(values))
        outputs, changed = training_call(fn, params, x, key)
        return {"loss": -likelihood.log_prob(outputs, y).mean(), "changed": changed}

    def entries(part: slice) -> Any:
        values = leaves if part == slice(0, count) else [_joined(row[part]) for row in rows]
        places = [leaf for leaf, dim in zip(batch.leaves, batch.dims, strict=True) if dim is not None]
        mine, seen = (map_leaves(lambda leaf: _repeated(leaf, count, part), tree) for tree in (own, places))
        return values, mine, seen, keys[part]

    found = map_draws(
        *(one, entries, count),
        owner=fn,
        num_rows=batch.rows,
        key=("ivon", signature(leaves), signature(own), signature(batch.leaves), tuple(batch.dims)),
        call=call,
        chunk_size=chunk_size,
    )
    # The gradient of the sum in a draw is that of its own loss.
    gradients = torch.autograd.grad(found["loss"].sum(), leaves, allow_unused=True, materialize_grads=True)
    # Those of a batched product come transposed, which every later operation would pay for.
    whole: Any = structure.unflatten([g.contiguous() for g in gradients])
    return Found(found["loss"].detach(), whole, found["changed"])


def _as_leaf(draw: Tensor) -> Tensor:
    return draw.detach().requires_grad_()


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(list(rows))


def _repeated(leaf: Tensor, count: int, part: slice) -> Tensor:
    """What is ``(K, ...)`` for some of the ``E`` evaluations, without copies where there are none to make."""
    size = part.stop - part.start
    if len(leaf) == 1:
        return leaf.expand(size, *leaf.shape[1:])
    if len(leaf) == count:
        return leaf[part]
    return leaf[torch.arange(part.start, part.stop, device=leaf.device) // (count // len(leaf))]


def _filled_in(batch: Batch, own: list[Any]) -> list[Any]:
    """Leaves of ``(x, y)`` of one evaluation, of which ``own`` are those that networks do not share."""
    rest = iter(own)
    return [leaf if dim is None else next(rest) for leaf, dim in zip(batch.leaves, batch.dims, strict=True)]


def split(fixed: Params) -> tuple[Params, Params]:
    """Buffers ``(K, ...)`` as those that all networks share, without that axis, and those of each.

    A count of batches is read as a number, which ``vmap`` allows for what it does not map over only.
    """

    def is_common(leaf: Any) -> bool:
        values = leaf.tensor
        return not values.is_floating_point() and (len(values) == 1 or bool((values == values[0]).all()))

    shared = select(fixed, lambda _, leaf: is_common(leaf))
    return index(shared, 0), select(fixed, lambda _, leaf: not is_common(leaf))
