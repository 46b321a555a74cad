"""Sums over rows and layouts of second derivatives, as the package docstring defines them."""

import math

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Half precision to float32, for sums and differences that cancel; others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def of_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values.to(dtype)``, which inside transforms takes time even where it is that already."""
    return values if values.dtype == dtype else values.to(dtype)


def sum_rows(values: Tensor) -> Tensor:
    """Sum over all axes but the first."""
    return values.sum(dim=tuple(range(1, values.ndim))) if values.ndim > 1 else values


def count(values: Tensor) -> Tensor:
    """Number of elements, on the device of ``values``."""
    return torch.full((), math.prod(values.shape), dtype=torch.int64, device=values.device)


def diagonal_blocks(values: Tensor) -> Tensor:
    """``(N, *positions, C) -> (N, *positions, C, C)``, and ``(N,) -> (N, 1, 1)``."""
    return torch.diag_embed(values if values.ndim > 1 else values.unsqueeze(-1))


def diagonal_columns(values: Tensor) -> Tensor:
    """Columns ``values_k e_k`` of a diagonal matrix: ``(N, *positions, C) -> (C, N, *positions, C)``."""
    return torch.diag_embed(values).movedim(-1, 0) if values.ndim > 1 else values.unsqueeze(0)


def sample_shape(shape: torch.Size, num_samples: int | None) -> tuple[int, ...]:
    """``shape`` with a leading axis of draws if they are counted."""
    return tuple(shape) if num_samples is None else (num_samples, *shape)


def entropy_along(log_probs: Tensor, axis: int) -> Tensor:
    """Entropy of the distributions along ``axis``."""
    # The clamp makes 0 log 0 = 0 for classes of log probability -inf.
    terms = log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)
    return -terms.sum(axis)
