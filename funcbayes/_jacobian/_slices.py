"""Gradients of parts of a leaf: no more of a matrix is formed at a time than there is room for."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ._gradients import Formed, Looked, Outer, RowGradients

# So many bytes of gradients are formed at a time, of all rows at once.
SLICE_BYTES = 64 << 20


def ranges(gradients: Sequence[RowGradients], nbytes: int, itemsize: int) -> Iterator[slice]:
    """Parts of the first axis of a leaf, so that :meth:`RowGradients.matrices` has some ``nbytes`` for each.

    Args:
        gradients: Of one leaf, for several sets of rows, which are formed together.
        nbytes: At most so many, if one entry of the axis does not have more.
        itemsize: Bytes of a number.
    """
    shape = gradients[0].shape
    length, width = shape[:1].numel(), shape[1:].numel()
    size = max(nbytes // max(num_columns(gradients) * width * itemsize, 1), 1)
    group = length // max(_num_groups(gradient) for gradient in gradients)
    size = size - size % group if size > group else size
    start = 0
    while start < length:
        stop = min(start + size, length)
        if size < group:  # not into the next group
            stop = min(stop, (start // group + 1) * group)
        yield slice(start, stop)
        start = stop


@functools.singledispatch
def of_slice(gradient: RowGradients, part: slice) -> RowGradients:
    """The gradients of a part of the first axis of the leaf: one that :func:`ranges` gives."""
    raise NotImplementedError(type(gradient).__name__)


@of_slice.register
def _(gradient: Outer, part: slice) -> RowGradients:
    if not gradient.shape or part == slice(0, gradient.shape[0]):
        return gradient
    width = gradient.left.shape[-1]
    groups = slice(part.start // width, -(-part.stop // width))
    left, right = gradient.left[:, :, :, groups], gradient.right
    if groups.stop - groups.start == 1:
        before = groups.start * width
        left = left[..., part.start - before : part.stop - before]
    right = right if right is None else right[:, :, :, groups]
    return replace(gradient, left=left, right=right, shape=_shape(gradient, part))


@of_slice.register
def _(gradient: Formed, part: slice) -> RowGradients:
    return Formed(gradient.values[..., part, :], _shape(gradient, part))


@of_slice.register
def _(gradient: Looked, part: slice) -> RowGradients:
    if part == slice(0, gradient.shape[0]):
        return gradient
    is_inside = (gradient.tokens >= part.start) & (gradient.tokens < part.stop)
    return replace(
        gradient,
        tokens=torch.where(is_inside, gradient.tokens - part.start, 0),
        gradients=gradient.gradients * is_inside.unsqueeze(-1),
        shape=_shape(gradient, part),
        padding=None,
    )


def converted(gradient: RowGradients, dtype: torch.dtype) -> RowGradients:
    """The same numbers in another dtype."""
    values = {
        name: value.to(dtype)
        for name, value in vars(gradient).items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype
    }
    return replace(gradient, **values) if values else gradient  # pyright: ignore[reportArgumentType, reportCallIssue]


def formed(gradient: RowGradients, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the first axis of the leaf, and matrices ``(N, K, d_part d_in)`` of one network for each."""
    for part in ranges([gradient], SLICE_BYTES, dtype.itemsize):
        yield part, converted(of_slice(gradient, part), dtype).matrices()[0].flatten(2)


def weighed(gradient: RowGradients, variance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs ``A, B`` of :meth:`RowGradients.weighed` whose products add up to it, of bounded size.

    Args:
        gradient: Of one network.
        variance: ``(1, d_out, d_in)``, in the dtype of the result.
    """
    for part in _parts(gradient, variance):
        yield converted(of_slice(gradient, part), variance.dtype).weighed(variance[:, part])


def variances(gradient: RowGradients, variance: Tensor) -> Iterator[Tensor]:
    """What adds up to :meth:`RowGradients.variances`, likewise."""
    for part in _parts(gradient, variance):
        yield converted(of_slice(gradient, part), variance.dtype).variances(variance[:, part])


def _parts(gradient: RowGradients, variance: Tensor) -> Iterable[slice]:
    """Parts of the first axis; one where nothing is formed."""
    is_small = isinstance(gradient, Looked) or (
        isinstance(gradient, Outer) and (gradient.right is None or gradient.num_positions == 1)
    )
    if is_small:
        return [slice(0, variance.shape[1])]
    return ranges([gradient], SLICE_BYTES, variance.dtype.itemsize)


def num_columns(gradients: Sequence[RowGradients]) -> int:
    """Of all rows."""
    return sum(rows * columns for _, rows, columns in (gradient.counts for gradient in gradients))


def _num_groups(gradient: RowGradients) -> int:
    return gradient.left.shape[3] if isinstance(gradient, Outer) else 1


def _shape(gradient: RowGradients, part: slice) -> torch.Size:
    return torch.Size((part.stop - part.start, *gradient.shape[1:]))
