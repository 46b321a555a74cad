"""Layers as the plain operations that they consist of, into which every transform sees."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CELLS = {
    torch.lstm_cell: torch.lstm,
    torch.gru_cell: torch.gru,
    torch.rnn_tanh_cell: torch.rnn_tanh,
    torch.rnn_relu_cell: torch.rnn_relu,
}


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``g v / |v|``, with a norm for each entry of an axis, or with -1 one of all."""
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    norms = torch.linalg.vector_norm(v.movedim(dim, 0).reshape(v.shape[dim], -1), dim=1)
    return v * (g / norms.reshape([len(norms) if axis == dim else 1 for axis in range(v.ndim)]))


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x1^T W_o x2 + b_o`` for each output ``o``: inputs ``(*, I)`` and ``(*, J)``, weight ``(O, I, J)``."""
    half = F.linear(input1, weight.transpose(1, 2).flatten(0, 1)).unflatten(-1, (weight.shape[0], -1))
    whole = (half * input2.unsqueeze(-2)).sum(-1)
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
    """Sums, means or maxima of bags of one size, ``(N, B)``; ``None`` for others."""
    tokens, padding = input, padding_idx
    if tokens.ndim != 2 or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    looked = F.embedding(tokens, weight)
    is_in = torch.ones_like(tokens) if padding is None else (tokens != padding % weight.shape[0]).long()
    is_in = is_in.unsqueeze(-1)
    if mode == "max":
        most = looked.masked_fill(is_in == 0, -torch.inf).amax(1)
        return torch.where(is_in.sum(1) > 0, most, 0.0)
    factors = is_in.to(looked.dtype)
    if per_sample_weights is not None:
        factors = factors * per_sample_weights.unsqueeze(-1)
    total = (looked * factors).sum(1)
    return total / is_in.sum(1).clamp_min(1) if mode == "mean" else total


def cell(func: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.lstm_cell``, ``torch.gru_cell``, ``torch.rnn_tanh_cell`` or ``torch.rnn_relu_cell``."""
    layer = CELLS[func]

    def by_parts(
        input: Tensor,
        hx: Tensor | Sequence[Tensor],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        states = [hx] if isinstance(hx, Tensor) else [*hx]
        entering, held = F.linear(input, w_ih, b_ih), F.linear(states[0], w_hh, b_hh)
        if layer is torch.gru:
            return gru_state(entering, held, states[0])
        if layer is torch.lstm:
            return lstm_states(entering + held, states[1])
        return torch.tanh(entering + held) if layer is torch.rnn_tanh else torch.relu(entering + held)

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


# Those of one name take what the function takes; what gives `None` is left to torch.
BY_PARTS: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: weight_norm,
    F.bilinear: bilinear,
    F.embedding_bag: embedding_bag,
    **{func: cell(func) for func in CELLS},
}
