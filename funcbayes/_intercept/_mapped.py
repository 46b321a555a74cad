"""Tensors that ``vmap`` maps over, as batching rules see them: with the draws as an axis of their own."""

import torch
from torch import Tensor

from .._functorch import unwrap


def draws_first(tensor: Tensor, level: int) -> Tensor | None:
    """``(S, ...)``, the physical tensor with its mapped axis first; ``None`` if it has none."""
    physical, axis = unwrap(tensor, level)
    if axis is None:
        return None
    return physical.movedim(axis, 0) if axis else physical


def of_each_draw(tensor: Tensor, draws: int, level: int) -> Tensor:
    """``(S, ...)``, the same for all draws, without copies, if it has no mapped axis."""
    front = draws_first(tensor, level)
    return tensor.expand(draws, *tensor.shape) if front is None else front


def one_dtype(*tensors: Tensor | None) -> bool:
    """Whether dtypes agree, or autocast will make them agree."""
    given = [t for t in tensors if t is not None]
    dtype = given[0].dtype
    if all(t.dtype == dtype for t in given):
        return True
    return all(t.is_floating_point() for t in given) and torch.is_autocast_enabled(given[0].device.type)


def product(biases: Tensor | None, left: Tensor, right: Tensor, axis: int) -> Tensor:
    """``left right``, and biases ``(S, C)`` that are the same along an axis."""
    return torch.bmm(left, right) if biases is None else torch.baddbmm(biases.unsqueeze(axis), left, right)
