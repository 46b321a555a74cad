"""The largest eigenvalues of a matrix that is known by its products with vectors."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .._random import Seed, fold, normal

Vectors = dict[str, Tensor]  # leaves by path, (k, *s)
_BLOCK = 4  # vectors multiplied at a time, in one pass through the data


def largest_eigenpairs(
    product: Callable[[Vectors], Vectors],
    like: Mapping[str, Tensor],
    rank: int,
    seed: Seed,
    *,
    multiplicity: int = 1,
) -> tuple[Tensor, Tensor, float]:
    """Largest eigenvalues and their eigenvectors, by block Lanczos iteration with full reorthogonalisation.

    Golub & Underwood (1977), "The block Lanczos method for computing eigenvalues". The Krylov space has
    ``2 rank + 4 b`` dimensions, so memory is that many vectors, and a pass through the data multiplies ``b``
    of them: four, or ``multiplicity``, since a block finds no more eigenvectors of one eigenvalue than it has
    vectors.
    Eigenvalues are never above the true ones, and exact if the matrix has no higher rank than the space.

    Args:
        product: ``k`` vectors times the matrix.
        like: Shapes, dtypes and devices of the leaves.
        rank: How many; fewer come back if the matrix has fewer that are not zero.
        seed: Of the random start.
        multiplicity: How often an eigenvalue may be expected to occur.

    Returns:
        Eigenvalues ``(R,)``, largest first, without those that are zero but for rounding, and eigenvectors
        as rows ``(R, P)``, in at least single precision; and the least eigenvalue that was seen if it is
        negative, and not by rounding, or zero. The matrix has one that is no larger.
    """
    sizes = {name: leaf.numel() for name, leaf in like.items()}
    first = next(iter(like.values()))
    total, dtype = sum(sizes.values()), torch.promote_types(first.dtype, torch.float32)
    block = min(max(_BLOCK, multiplicity), rank, total)
    most = min(2 * rank + 4 * block, total)
    basis = torch.zeros(most, total, dtype=dtype, device=first.device)
    projected = torch.zeros(most, most, dtype=torch.float64, device=first.device)
    seed = fold(seed, "eigenvectors")

    def start(number: int) -> Tensor:
        keys = fold(seed, torch.arange(number * block, (number + 1) * block))
        return _orthonormal(normal(keys, (total,), dtype=dtype, device=first.device), 0.0)

    fresh, size, number = start(0), 0, 0
    while len(fresh):
        span = slice(size, size + len(fresh))
        basis[span] = fresh
        size += len(fresh)
        image = _joined(product(_split(fresh, like, sizes)), like).to(dtype)
        done = basis[:size]
        along = done @ image.mT
        projected[:size, span] = along.double()
        projected[span, :size] = along.mT.double()
        if size == most:
            break
        negligible = 100 * torch.finfo(dtype).eps * float(projected[:size, :size].abs().max())
        fresh = _orthonormal(_beside(_beside(image, done), done), negligible)
        # Directions of rows that nearly depend on each other are rounding errors, and not beside the others.
        fresh = _orthonormal(_beside(fresh, done), 0.5)
        if not len(fresh) and float(image.abs().max()) > negligible:
            # The space is closed. An eigenvalue that occurs more often than a block has vectors has more
            # eigenvectors beside it; if there is nothing more, the next image will be zero.
            number += 1
            fresh = _orthonormal(_beside(_beside(start(number), done), done), 0.0)
        fresh = fresh[: most - size]
    values, turn = torch.linalg.eigh(projected[:size, :size])
    largest, least = float(values.abs().max()), float(values[0])
    # Eigenvectors are in at least single precision; products are rounded as the leaves are.
    coarsest = max(torch.finfo(leaf.dtype).eps for leaf in like.values())
    values, turn = values.flip(0)[:rank], turn.flip(1)[:, :rank]
    kept = values.abs() > 100 * torch.finfo(dtype).eps * largest
    vectors = turn[:, kept].mT.to(dtype) @ basis[:size]
    return values[kept].to(dtype), vectors, least if least < -100 * coarsest * largest else 0.0


def _beside(rows: Tensor, basis: Tensor) -> Tensor:
    """Rows without their parts in the space of an orthonormal basis."""
    return rows - (rows @ basis.mT) @ basis


def _orthonormal(rows: Tensor, negligible: float) -> Tensor:
    """An orthonormal basis of the space of some rows, without directions in which they are negligible."""
    if not len(rows):
        return rows
    q, r = torch.linalg.qr(rows.mT)
    return q.mT[r.diagonal().abs() > negligible]


def _split(rows: Tensor, like: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Vectors:
    parts = rows.split(list(sizes.values()), 1)
    return {
        name: part.reshape(len(rows), *like[name].shape).to(like[name].dtype)
        for name, part in zip(sizes, parts, strict=True)
    }


def _joined(vectors: Vectors, like: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([vectors[name].reshape(len(vectors[name]), -1) for name in like], 1)
