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

# A block of factors has at most this many numbers and rows: beside the noise it takes little memory.
_BLOCK_NUMEL, _BLOCK_ROWS = 1 << 20, 1 << 16
# Blocks are filled up with zeros to multiples of these: kernels treat what is left over differently.
_ROWS, _INNER, _COLUMNS = 8, 4, 16


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether neither a transform nor a gradient would notice that one of them is written over."""
    return not is_inside_transform() and not (
        torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    )


def over(fresh: Tensor, other: Tensor) -> Tensor | None:
    """``fresh`` where a result of it and ``other`` may be written over it, else ``None``; an ``out=``."""
    same = torch.result_type(fresh, other) == fresh.dtype
    return fresh if same and may_overwrite(fresh, other) else None


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
    rows = _filled(coefficients, _ROWS, _INNER)

    def block(part: slice) -> Tensor:
        product = rows @ _filled(matrix[part].to(rows.dtype).mT, _INNER, _COLUMNS)
        return product[: len(noise), : len(matrix[part])].to(noise.dtype)

    if not may_overwrite(noise, coefficients, factors):
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
    product = _filled(flat, _ROWS, _INNER) @ _filled(basis.mT, _INNER, _COLUMNS)
    return product[: len(flat), : len(basis)].reshape(*rows.shape[:-1], len(basis))


def _blocks(matrix: Tensor) -> Iterator[slice]:
    most = min(_BLOCK_NUMEL // max(matrix.shape[-1], 1), _BLOCK_ROWS)
    size = max(most // _COLUMNS, 1) * _COLUMNS
    return (slice(start, start + size) for start in range(0, len(matrix), size))


def _filled(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """``matrix`` with zeros up to multiples of ``rows`` and ``columns``."""
    below, beside = -matrix.shape[0] % rows, -matrix.shape[1] % columns
    # Contiguous in any case, because a product may round otherwise where rows are strided.
    return F.pad(matrix, (0, beside, 0, below)) if below or beside else matrix.contiguous()
