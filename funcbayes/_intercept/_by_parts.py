"""Layers as the plain operations that they consist of, into which every transform sees."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._call import Interception
from ._mapped import one_dtype


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, with a norm for each entry of an axis, or with -1 one of all."""
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    norms = torch.linalg.vector_norm(v.movedim(dim, 0).reshape(v.shape[dim], -1), dim=1)
    return v * (g / norms.reshape([len(norms) if axis == dim else 1 for axis in range(v.ndim)]))


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """``x1^T W_o x2 + b_o`` for each output ``o``: inputs ``(*, I)`` and ``(*, J)``, weight ``(O, I, J)``."""
    if input1.shape[:-1] != input2.shape[:-1] or not one_dtype(input1, input2, weight, bias):
        return None
    with torch.autocast(weight.device.type, enabled=False):  # which leaves bilinear layers as they are
        half = F.linear(input1, weight.transpose(1, 2).flatten(0, 1))
        whole = (half.unflatten(-1, (weight.shape[0], weight.shape[2])) * input2.unsqueeze(-2)).sum(-1)
    return whole if bias is None else whole + bias


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Sums, means or maxima of bags of one size, ``(N, B)``; ``None`` for others.

    Of several entries that are the largest each has a part of the gradient, where torch gives it to one.
    """
    tokens, factors, padding = input, per_sample_weights, padding_idx
    is_known = tokens.ndim == 2 and tokens.shape[1] > 0 and mode in ("sum", "mean", "max")
    if not is_known or offsets is not None or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    if factors is not None and (
        mode != "sum" or factors.shape != tokens.shape or factors.dtype != weight.dtype
    ):
        return None
    looked = F.embedding(tokens, weight)
    if padding is None:
        return _of_bags(looked if factors is None else looked * factors.unsqueeze(-1), None, mode)
    if not -weight.shape[0] <= padding < weight.shape[0]:
        return None
    is_in = (tokens != padding % weight.shape[0]).unsqueeze(-1)
    looked = looked.masked_fill(~is_in, -torch.inf if mode == "max" else 0.0)
    return _of_bags(looked if factors is None else looked * factors.unsqueeze(-1), is_in.sum(1), mode)


def _of_bags(looked: Tensor, counts: Tensor | None, mode: str) -> Tensor:
    """From entries ``(N, B, D)``, where ``counts`` of each bag ``(N, 1)`` are no padding."""
    if mode == "max":
        most = looked.amax(1)
        return most if counts is None else torch.where(counts > 0, most, 0.0)
    total = looked.sum(1)
    if mode == "sum":
        return total
    return total / (looked.shape[1] if counts is None else counts.clamp_min(1))


def cell(func: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.lstm_cell``, ``torch.gru_cell``, ``torch.rnn_tanh_cell`` or ``torch.rnn_relu_cell``."""

    def by_parts(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...] | None:
        states = [hx] if isinstance(hx, Tensor) else [*hx]
        if any(state.shape[:-1] != input.shape[:-1] for state in states):
            return None
        kind = input.device.type
        if kind != "cpu" and torch.is_autocast_enabled(kind):  # which lowers cells on accelerators
            states = [state.to(torch.get_autocast_dtype(kind)) for state in states]
        entering, held = F.linear(input, w_ih, b_ih), F.linear(states[0], w_hh, b_hh)
        if func is torch.gru_cell:
            return gru_state(entering, held, states[0])
        if func is torch.lstm_cell:
            return lstm_states(entering + held, states[1])
        return (torch.tanh if func is torch.rnn_tanh_cell else torch.relu)(entering + held)

    return by_parts


def gru_state(entering: Tensor, held: Tensor, state: Tensor) -> Tensor:
    """The next state of a GRU, from what the input and the state give, in the equations of ``nn.GRU``."""
    (x_r, x_z, x_n), (s_r, s_z, s_n) = (part.chunk(3, -1) for part in (entering, held))
    n, z = torch.tanh(torch.addcmul(x_n, torch.sigmoid(x_r + s_r), s_n)), torch.sigmoid(x_z + s_z)
    # Under autocast the first state may have another dtype, which then is that of the next.
    return torch.lerp(n, state, z) if state.dtype == n.dtype else n + z * (state - n)


def lstm_states(gates: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The next state and cells of an LSTM, in the equations of ``nn.LSTM``."""
    width = gates.shape[-1] // 4
    i_and_f, g, o = gates.tensor_split((2 * width, 3 * width), -1)
    i, f = torch.sigmoid(i_and_f).chunk(2, -1)
    cells = torch.addcmul(f * cells, i, torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(cells), cells


def done_by_parts(
    parts: Callable[..., Any], mode: Interception, func: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The result by parts, to each of which the rules of ``mode`` apply, or torch's where there is none."""
    with mode:
        out = parts(*args, **kwargs)
    return func(*args, **kwargs) if out is None else out


# Each takes what the function takes, and gives `None` for what is left to torch.
BY_PARTS: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: weight_norm,
    F.bilinear: bilinear,
    F.embedding_bag: embedding_bag,
    **{f: cell(f) for f in (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)},
}
