"""Products of gradients of one leaf with each other."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._gradients import Outer, RowGradients
from ._slices import SLICE_BYTES, converted, num_columns, of_slice, ranges

_PRODUCT_BYTES = 8 << 20  # of products of outer products at a time, so that they stay in the caches
_Sides = tuple[Tensor, Tensor]  # (N, K, d_out) and (N, d_in)


def gram(one: Sequence[RowGradients], two: Sequence[RowGradients], weight: Tensor) -> Tensor:
    """``g_nk^T diag(weight) g'_ml`` for all rows and columns of two sets of gradients of one network's leaf.

    Gradients that are one outer product are not formed, and of others so much at a time as there is room for.

    Args:
        one: ``N`` rows of ``K`` columns, in several parts.
        two: ``N'`` rows of ``K'`` columns, likewise.
        weight: One number, or like the leaf; its dtype is what everything is done in.

    Returns:
        ``(N K, N' K')``, columns inside rows.
    """
    shape = one[0].shape
    weight = weight.reshape(shape[:1].numel(), shape[1:].numel()) if weight.ndim else weight
    if all(map(is_plain, (*one, *two))):
        first, second = ([sides(part, weight.dtype) for part in parts] for parts in (one, two))
        product = _weighed_product if weight.ndim else _product
        return torch.cat([torch.cat([product(a, b, weight) for b in second], 1) for a in first])
    total = weight.new_zeros(())
    for part in ranges([*one, *two], SLICE_BYTES, weight.itemsize):
        own = weight[part].reshape(-1) if weight.ndim else weight
        found = []
        for a in _formed(one, part, weight.dtype):
            # Where all rows are formed at once they are not formed again.
            others = [a] if two is one and len(a) == num_columns(one) else _formed(two, part, weight.dtype)
            weighed = a * own
            found.append(torch.cat([weighed @ b.mT for b in others], 1))
        total = total + torch.cat(found)
    return total


def _formed(gradients: Sequence[RowGradients], part: slice, dtype: torch.dtype) -> Iterator[Tensor]:
    """``(N K, P)`` of a part of the leaf, of all rows where there is room, else of some at a time."""
    own = [of_slice(gradient, part) for gradient in gradients]
    if num_columns(own) * own[0].shape.numel() * dtype.itemsize <= SLICE_BYTES:
        yield torch.cat([_matrix(gradient, dtype) for gradient in own])
        return
    for gradient in own:
        for block in gradient.blocks(SLICE_BYTES):
            yield _matrix(block, dtype)


def _matrix(gradient: RowGradients, dtype: torch.dtype) -> Tensor:
    return converted(gradient, dtype).matrices()[0].flatten(2).flatten(0, 1)


def is_plain(gradient: RowGradients) -> bool:
    """Whether a gradient is one outer product."""
    return (
        isinstance(gradient, Outer)
        and gradient.right is not None
        and gradient.is_left_gradient
        and gradient.num_positions == 1
        and gradient.left.shape[3] == 1
    )


def sides(gradient: RowGradients, dtype: torch.dtype) -> _Sides:
    """``(N, K, d_out)`` and ``(N, d_in)`` of a gradient that is one outer product."""
    assert isinstance(gradient, Outer)
    assert gradient.right is not None
    left, right = gradient.left[:, 0, :, 0, 0].movedim(0, 1), gradient.right[0, 0, :, 0, 0]
    return left.to(dtype), right.to(dtype)


def _product(one: _Sides, two: _Sides, weight: Tensor) -> Tensor:
    """With one number: a product of two matrices, entry by entry."""
    (left, right), (left_2, right_2) = one, two
    inputs = right @ right_2.mT * weight  # (N, N')
    gradients = (left.flatten(0, 1) @ left_2.flatten(0, 1).mT).unflatten(1, left_2.shape[:2])
    product = gradients.unflatten(0, left.shape[:2]) * inputs[:, None, :, None]
    return product.flatten(2).flatten(0, 1)


def _weighed_product(one: _Sides, two: _Sides, weight: Tensor) -> Tensor:
    """``sum_o l_nko l'_mlo (sum_i v_oi r_ni r'_mi)``: some ``n`` and ``m`` at a time."""
    (left, right), (left_2, right_2) = one, two
    each = max(left[0].numel(), weight.shape[1]) * weight.itemsize
    room = max(_PRODUCT_BYTES // max(each, 1), 1)
    size = min(len(left), room)
    size_2 = max(room // max(size, 1), 1)

    def product(left: Tensor, right: Tensor, left_2: Tensor, right_2: Tensor) -> Tensor:
        inputs = (right_2.unsqueeze(1) * right) @ weight.mT  # (N', N, o)
        along = inputs.unsqueeze(2) * left  # (N', N, K, o)
        return (along.flatten(1, 2) @ left_2.mT).movedim(0, 1).flatten(1)  # (N K, N' K')

    return torch.cat(
        [
            torch.cat(
                [
                    product(*some, *others)
                    for others in zip(left_2.split(size_2), right_2.split(size_2), strict=True)
                ],
                1,
            )
            for some in zip(left.split(size), right.split(size), strict=True)
        ]
    )
