"""Noise of draws, made with as few passes over its ``S P`` numbers as gradients and transforms permit.

Products of draws with factors are cut into blocks of fixed shapes. Matrix products pick their way of
summing by shape, so without this a draw would differ in its last bits with how many are asked for.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._functorch import is_inside_transform
from .._random import Seed, fold, keys_by_name, normal
from .._tree import Params, named_leaves
from ._flat import as_columns, at_least_single, dtype_of

# A block of factors has about this many numbers, and fits into a cache.
_BLOCK_NUMEL = 1 << 18
# Blocks are filled up with zeros to multiples of these: kernels treat what is left over differently.
_ROWS, _COLUMNS = 8, 16


def over(fresh: Tensor, *others: Tensor) -> Tensor | None:
    """``fresh`` where a result of it and ``others`` may be written over it, else ``None``; an ``out=``."""
    if is_inside_transform() or torch.is_grad_enabled() and any(t.requires_grad for t in (fresh, *others)):
        return None
    dtypes = [torch.result_type(fresh, other) for other in others]
    return fresh if all(dtype == fresh.dtype for dtype in dtypes) else None


def leaf_noise(like: Params, indices: Tensor, seed: Seed) -> dict[str, Tensor]:
    """Standard normals by path, ``(S, *s)``, every leaf with its own."""
    leaves = named_leaves(like)
    keys = keys_by_name(fold(seed, indices), leaves)
    return {
        name: normal(keys[name], leaf.shape, dtype=leaf.dtype, device=leaf.device)
        for name, leaf in leaves.items()
    }


def shared_noise(like: Params, rank: int, indices: Tensor, seed: Seed) -> Tensor:
    """Standard normals ``(S, R)`` that all leaves share, keyed by all of their paths."""
    leaves = named_leaves(like)
    key = fold(fold(seed, indices), "factors:" + ",".join(leaves))
    device = next((leaf.device for leaf in leaves.values()), "cpu")
    return normal(key, (rank,), dtype=at_least_single(dtype_of(like)), device=device)


def add_product(noise: Tensor, coefficients: Tensor, factors: Tensor) -> Tensor:
    """``noise + coefficients factors^T`` draw by draw.

    Args:
        noise: ``(S, *s)``, overwritten where possible.
        coefficients: ``(S, R)``, of at least float32.
        factors: ``(*s, R)``.
    """
    if not factors.numel():
        return noise
    flat, matrix = noise.reshape(len(noise), -1), as_columns(factors)
    rows = _filled(coefficients, _ROWS, 1)

    def block(part: slice) -> Tensor:
        columns = _filled(matrix[part].to(rows.dtype).T, 1, _COLUMNS).contiguous()
        product = rows @ columns
        return product[: len(noise), : len(matrix[part])].to(noise.dtype)

    if over(noise, coefficients, factors) is None:
        parts = [flat[:, part] + block(part) for part in _blocks(matrix)]
        return torch.cat(parts, 1).reshape(noise.shape)
    for part in _blocks(matrix):
        flat[:, part] += block(part)
    return noise


def project(noise: Tensor, factors: Tensor) -> Tensor:
    """``noise factors`` draw by draw, ``(S, R)``: leaves ``(S, *s)`` and ``(*s, R)``, of one dtype."""
    flat, matrix = noise.reshape(len(noise), factors.shape[:-1].numel()), as_columns(factors)
    sums = noise.new_zeros(len(noise), matrix.shape[-1])
    for part in _blocks(matrix):
        product = _filled(flat[:, part], _ROWS, _COLUMNS) @ _filled(matrix[part], _COLUMNS, _COLUMNS)
        sums = sums + product[: len(noise), : matrix.shape[-1]]
    return sums


def rotate(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows basis^T``: ``(..., n)`` and ``(m, n)``, each row the same in any company."""
    flat = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
    product = _filled(flat, _ROWS, 1) @ _filled(basis.T, 1, _COLUMNS).contiguous()
    return product[: len(flat), : len(basis)].reshape(*rows.shape[:-1], len(basis))


def _blocks(matrix: Tensor) -> Iterator[slice]:
    rank = max(matrix.shape[-1], 1)
    size = max(_BLOCK_NUMEL // rank // _COLUMNS, 1) * _COLUMNS
    return (slice(start, start + size) for start in range(0, len(matrix), size))


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``matrix`` with zeros up to multiples of ``rows`` and ``columns``."""
    below, beside = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    return F.pad(matrix, (0, beside, 0, below)) if below or beside else matrix
