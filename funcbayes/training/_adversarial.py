"""Adversarial training: the loss also at inputs moved to where it is larger.

Inputs move by the fast gradient sign, ``x' = x + eps sign(grad_x l(theta, x, y))`` (Goodfellow et al. 2015,
"Explaining and harnessing adversarial examples", section 4, https://arxiv.org/abs/1412.6572), and the
loss is ``l(theta, x, y) + l(theta, x', y)``: the sum, not its half (Lakshminarayanan et al. 2017,
algorithm 1, https://arxiv.org/abs/1612.01474).
"""

import math
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vjp

from .._tree import Params
from ._data import Source

Steps = tuple[Tensor | None, ...]  # one a leaf of x; None for a leaf that stays


def steps_of(source: Source, fraction: float, call: str) -> Steps:
    """How far each entry of a row moves: a fraction of its range over the rows, by one pass over the data."""
    if isinstance(fraction, bool) or not 0 < fraction < math.inf:
        raise ValueError(
            f"`{call}(adversarial=...)` should be a positive fraction of the inputs' range, or None, got "
            f"{fraction}. Lakshminarayanan et al. (2017) use 0.01."
        )
    lows: list[Tensor | None] = []
    highs: list[Tensor | None] = []
    for batch in source.plain_batches(None):
        x, _ = batch.member(0)
        leaves = optree.tree_leaves(x)
        ends = [_ends(leaf, call) if _is_moved(leaf) else (None, None) for leaf in leaves]
        if not lows:
            _check_has_one(leaves, ends, call)
            lows, highs = [low for low, _ in ends], [high for _, high in ends]
        _check_same_shapes(lows, [low for low, _ in ends], call)
        lows = [_both(torch.minimum, a, b) for a, (b, _) in zip(lows, ends, strict=True)]
        highs = [_both(torch.maximum, a, b) for a, (_, b) in zip(highs, ends, strict=True)]
    return tuple(
        None if low is None or high is None else fraction * (high - low)
        for low, high in zip(lows, highs, strict=True)
    )


def summed_losses(
    loss: Callable[[Any], tuple[Tensor, Params]], x: Any, steps: Steps
) -> tuple[Tensor, Params]:
    """Loss at ``x`` and at adversarial inputs, which are a constant; buffers as they are after ``x``.

    Args:
        loss: ``x -> (mean loss, buffers that changed)``.
        x: Inputs.
        steps: How far each leaf of ``x`` moves.
    """
    leaves, spec = optree.tree_flatten(x)
    places = [i for i, step in enumerate(steps) if step is not None]

    def of_moved(*values: Tensor) -> tuple[Tensor, Params]:
        whole = list(leaves)
        for i, value in zip(places, values, strict=True):
            whole[i] = value
        return loss(spec.unflatten(whole))

    clean, pullback, changed = vjp(of_moved, *(leaves[i] for i in places), has_aux=True)  # type: ignore[misc]
    grads = pullback(torch.ones_like(clean))
    moved = [
        (leaves[i] + steps[i].to(leaves[i]) * grad.sign()).detach()  # type: ignore[union-attr]
        for i, grad in zip(places, grads, strict=True)
    ]
    adversarial, _ = of_moved(*moved)
    return clean + adversarial, changed


def _is_moved(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0


def _ends(leaf: Tensor, call: str) -> tuple[Tensor, Tensor]:
    low, high = leaf.amin(0), leaf.amax(0)
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise ValueError(f"`{call}(adversarial=...)` should be given finite inputs, got NaN or infinity.")
    return low, high


def _both(choose: Callable[[Tensor, Tensor], Tensor], a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else choose(a, b)


def _check_has_one(leaves: list[Any], ends: list[Any], call: str) -> None:
    if all(low is None for low, _ in ends):
        kinds = sorted(
            {str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves}
        )
        raise TypeError(
            f"`{call}(adversarial=...)` should be given inputs of floating point, which can be moved a "
            f"little, got {', '.join(kinds)}. Leave it out."
        )


def _check_same_shapes(first: list[Tensor | None], here: list[Tensor | None], call: str) -> None:
    shapes = [[None if t is None else tuple(t.shape) for t in ends] for ends in (first, here)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`{call}(adversarial=...)` should be given rows of one shape, whose entries have a range, got "
            f"{shapes[0]} and {shapes[1]} in different batches. Pad all rows to one length."
        )
