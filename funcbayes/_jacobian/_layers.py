"""What each kind of layer makes of its input and the gradients of its output: gradients of its leaves.

Rows and positions. A layer sees ``N`` rows of data at ``T`` positions each: pixels of a convolution, tokens
of a sequence, or whatever a model folds into the rows. Values come as ``(..., N, S, *own)``, ``S`` entries of
the axis of rows for one row of data.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._gradients import Formed, Looked, Outer, RowGradients
from ._tape import LayerCall

Found = dict[str, RowGradients]


def row_gradients(call: LayerCall, value: Tensor, gradient: Tensor, leaves: dict[str, torch.Size]) -> Found:
    """Gradients of a layer's leaves.

    Args:
        call: The layer.
        value: What its weight is applied to, ``(M, N, S, *own)``.
        gradient: Gradients of its output, ``(K, M, N, S, *own)``.
        leaves: Shapes by name.

    Returns:
        For the weight and the bias, those of them that are chosen leaves.
    """
    return _KINDS[call.kind](call, value, gradient, leaves)


def _linear(call: LayerCall, value: Tensor, gradient: Tensor, leaves: dict[str, torch.Size]) -> Found:
    left = gradient.flatten(3, -2).unsqueeze(3)  # (K, M, N, 1, T, O)
    right = value.flatten(2, -2)[None, :, :, None]  # (1, M, N, 1, T, I)
    return _weight_and_bias(call, left, right, left, leaves, is_left_gradient=True)


def _convolution(call: LayerCall, value: Tensor, gradient: Tensor, leaves: dict[str, torch.Size]) -> Found:
    groups = call.settings.get("groups") or 1
    left = _pixels(gradient, call.ndim, groups)
    right = windows(value, call.weight_shape, call.settings, groups)[None] if call.weight else None
    return _weight_and_bias(call, left, right, left, leaves, is_left_gradient=True)


def _transposed(call: LayerCall, value: Tensor, gradient: Tensor, leaves: dict[str, torch.Size]) -> Found:
    # The adjoint of a convolution: there the input is what is here the gradient, and the first axis of the
    # weight belongs to the input. A position is one of the input.
    groups = call.settings.get("groups") or 1
    biases = _pixels(gradient, call.ndim, groups)
    if not call.weight:
        return _weight_and_bias(call, biases, None, biases, leaves, is_left_gradient=True)
    left = _pixels(value, call.ndim, groups).unsqueeze(0)
    counts = value.shape[-call.ndim :]
    right = windows(gradient, call.weight_shape, call.settings, groups, counts)
    return _weight_and_bias(call, left, right, biases, leaves, is_left_gradient=False)


def _embedding(call: LayerCall, value: Tensor, gradient: Tensor, leaves: dict[str, torch.Size]) -> Found:
    assert call.weight is not None
    tokens, gradients = value.flatten(2), gradient.flatten(3, -2)
    padding = call.settings.get("padding_idx")
    if padding is not None:
        padding %= leaves[call.weight][0]
        gradients = gradients.masked_fill((tokens == padding).unsqueeze(-1), 0)
    return {call.weight: Looked(tokens, gradients, leaves[call.weight], padding)}


def _last_axes(call: LayerCall, value: Tensor, gradient: Tensor, leaves: dict[str, torch.Size]) -> Found:
    def summed(per_entry: Tensor, shape: torch.Size) -> Formed:
        # (K, M, N, S, *positions, *shape) -> (M, N, K, d_out, d_in)
        values = per_entry.flatten(3, per_entry.ndim - len(shape) - 1).sum(3)
        return formed(values, shape)

    return _affine(call, value, gradient, leaves, summed)


def _channels(call: LayerCall, value: Tensor, gradient: Tensor, leaves: dict[str, torch.Size]) -> Found:
    def summed(per_entry: Tensor, shape: torch.Size) -> Formed:
        # (K, M, N, S, C, *positions)
        return formed(per_entry.flatten(4).unflatten(4, (shape[0], -1)).sum((3, -1)), shape)

    return _affine(call, value, gradient, leaves, summed)


_KINDS: dict[str, Callable[..., Found]] = {
    "linear": _linear,
    "convolution": _convolution,
    "transposed convolution": _transposed,
    "embedding": _embedding,
    "last axes": _last_axes,
    "channels": _channels,
}


def formed(values: Tensor, shape: torch.Size) -> Formed:
    """Gradients ``(K, M, N, *s)`` of a leaf ``s``."""
    return Formed(
        values.reshape(*values.shape[:3], shape[:1].numel(), shape[1:].numel()).movedim(0, 2), shape
    )


def windows(
    value: Tensor, kernel: Sequence[int], settings: Any, groups: int, counts: Sequence[int] | None = None
) -> Tensor:
    """What a convolution multiplies its kernel with at each of its positions.

    Args:
        value: ``(..., N, S, channels, *sizes)``.
        kernel: Shape of the weight, spatial axes last.
        settings: ``stride``, ``padding`` and ``dilation`` of the convolution.
        groups: Into how many groups channels are split.
        counts: Number of positions along each axis, if there are fewer than would fit.

    Returns:
        ``(..., N, groups, S * positions, channels / groups * kernel numbers)``.
    """
    sizes = tuple(kernel[2:])
    ndim, first = len(sizes), value.ndim - len(sizes)
    strides, dilations = (_each(settings.get(key), ndim, 1) for key in ("stride", "dilation"))
    value = F.pad(value, _padding(settings.get("padding"), sizes, dilations))
    for axis, (size, stride, dilation) in enumerate(zip(sizes, strides, dilations, strict=True), start=first):
        value = value.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        if counts is not None:
            value = value.narrow(axis, 0, counts[axis - first])
    value = value.unflatten(first - 1, (groups, -1))  # (*lead, N, S, G, c, *positions, *window)
    lead = list(range(first - 3))
    rows, entries, group, channel, *places = range(first - 3, value.ndim)
    order = [*lead, group, channel, *places[ndim:], rows, entries, *places[:ndim]]
    # Positions last in memory: copied in long runs, and one product sums over rows and positions.
    value = value.permute(order).flatten(first - 2, first - 2 + ndim).flatten(first)  # (*lead, G, R, N, T)
    return value.movedim(first - 1, first - 3).mT


def _each(setting: Any, ndim: int, default: int) -> tuple[int, ...]:
    if setting is None:
        return (default,) * ndim
    setting = (setting,) if isinstance(setting, int) else tuple(setting)
    return setting * ndim if len(setting) == 1 else setting


def _padding(setting: Any, sizes: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """As ``F.pad`` wants it: before and after, from the last axis on."""
    if setting == "same":
        wanted = [dilation * (size - 1) for size, dilation in zip(sizes, dilations, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in wanted]
    else:
        plain = _each(0 if setting == "valid" else setting, len(sizes), 0)
        pairs = [(amount, amount) for amount in plain]
    return [amount for pair in reversed(pairs) for amount in pair]


def _pixels(value: Tensor, ndim: int, groups: int) -> Tensor:
    """``(..., S, channels, *sizes) -> (..., groups, S * positions, channels / groups)``."""
    flat = value.flatten(-ndim).unflatten(-2, (groups, -1))  # (..., S, groups, c, positions)
    return flat.movedim(-4, -3).movedim(-1, -2).flatten(-3, -2)


def _weight_and_bias(
    call: LayerCall,
    left: Tensor,
    right: Tensor | None,
    biases: Tensor,
    leaves: dict[str, torch.Size],
    *,
    is_left_gradient: bool,
) -> Found:
    found: Found = {}
    if call.weight is not None:
        found[call.weight] = Outer(left, right, leaves[call.weight], is_left_gradient)
    if call.bias is not None:
        found[call.bias] = Outer(biases, None, leaves[call.bias])
    return found


def _affine(
    call: LayerCall,
    value: Tensor,
    gradient: Tensor,
    leaves: dict[str, torch.Size],
    summed: Callable[[Tensor, torch.Size], Formed],
) -> Found:
    """Leaves that multiply, or are added to, each entry of a normalised value."""
    found: Found = {}
    if call.weight is not None:
        found[call.weight] = summed(gradient * value, leaves[call.weight])
    if call.bias is not None:
        found[call.bias] = summed(gradient, leaves[call.bias])
    return found
