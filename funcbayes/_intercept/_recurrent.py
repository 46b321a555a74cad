"""Batching rules for recurrent layers, which ``vmap`` cannot map.

Draws that share the weights, as those of dropout elsewhere do, are more rows of one call. With weights of
their own they are either stepped through time together, one product of all draws a step, or given to torch's
kernel one by one: a step costs little more for all draws than for one where rows are few, while the kernels
of torch do without the memory traffic between steps.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from .._functorch import is_concrete, may_write_over, outside_transforms, unwrap, wrap
from ._by_parts import gru_state, lstm_states
from ._mapped import product

Args = tuple[Any, ...]
RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
# Rows, and bytes of the state's weights in one draw, up to which steps of all draws together are faster than
# torch's kernel, draw by draw, on a CPU: from step to step the weights of one draw stay in cache, not always
# those of all.
_MOST_ROWS = {torch.lstm: 16, torch.gru: 128, torch.rnn_tanh: 128, torch.rnn_relu: 128}
_MOST_BYTES = {torch.lstm: 192 << 10, torch.gru: 1 << 20, torch.rnn_tanh: 1 << 20, torch.rnn_relu: 1 << 20}


@dataclass(frozen=True)
class _Settings:
    """What a layer is told beside tensors, in the order in which torch's functions are told."""

    has_biases: bool
    num_layers: int
    dropout: float
    is_training: bool
    is_bidirectional: bool
    is_batch_first: bool = False


def recurrent(func: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``."""

    def rule(level: int, channels_last: bool, *args: Any, **kwargs: Any) -> Any:
        tree: Any = args
        leaves, structure = optree.tree_flatten(tree)
        found = [unwrap(t, level) if isinstance(t, Tensor) else (t, None) for t in leaves]
        draws = next((t.shape[axis] for t, axis in found if axis is not None), None)
        is_packed = len(args) > 3 and isinstance(args[3], list | tuple)
        if draws is None or kwargs or len(args) < 9 - is_packed:
            return None
        settings = _Settings(*args[4 if is_packed else 3 :])
        if settings.dropout and settings.is_training and settings.num_layers > 1:
            return None  # its masks are drawn inside
        physical = [t if axis is None else t.movedim(axis, 0) for t, axis in found]
        is_mapped = [axis is not None for _, axis in found]
        plain = all(not isinstance(t, Tensor) or is_concrete(t) for t in physical)
        with outside_transforms() if plain else nullcontext():
            if is_packed or tree[0].ndim != 3:
                out = _one_by_one(func, physical, is_mapped, draws, structure)
            else:
                out = _all_rows(func, physical, is_mapped, draws, structure, settings)
        return optree.tree_map(lambda t: wrap(t, 0, level), out)

    return rule


def _one_by_one(
    func: Callable[..., Any], leaves: list[Any], is_mapped: list[bool], draws: int, structure: Any
) -> Any:
    """A call of torch's kernel for each draw."""

    def call(i: int) -> Any:
        own = [leaf[i] if mapped else leaf for leaf, mapped in zip(leaves, is_mapped, strict=True)]
        return func(*structure.unflatten(own))

    return optree.tree_map(lambda *parts: torch.stack(parts), *map(call, range(draws)))


def _all_rows(
    func: Callable[..., Any],
    leaves: list[Any],
    is_mapped: list[bool],
    draws: int,
    structure: Any,
    settings: _Settings,
) -> Any:
    """Outputs and last states, each with a leading axis of draws."""
    value, hidden, weights = structure.unflatten(leaves)[:3]
    value_mapped, hidden_mapped, weights_mapped = structure.unflatten(is_mapped)[:3]
    rows = 0 if settings.is_batch_first else 1
    if not any(weights_mapped):
        return _as_rows(func, structure.unflatten(leaves), value_mapped, hidden_mapped, draws, rows)
    num_rows = value.shape[rows + value_mapped]
    nbytes = weights[1].nbytes // (draws if weights_mapped[1] else 1)
    are_many = num_rows > _MOST_ROWS[func] or nbytes > _MOST_BYTES[func]
    if are_many or value.device.type != "cpu":
        return _one_by_one(func, leaves, is_mapped, draws, structure)
    states = hidden if isinstance(hidden, list | tuple) else (hidden,)
    are_mapped = hidden_mapped if isinstance(hidden, list | tuple) else (hidden_mapped,)

    def expanded(tensor: Tensor, mapped: bool) -> Tensor:
        return tensor if mapped else tensor.expand(draws, *tensor.shape)

    value = expanded(value, value_mapped)
    output, *last = _stepped(
        func,
        value.transpose(1, 2) if settings.is_batch_first else value,
        [expanded(t, mapped) for t, mapped in zip(states, are_mapped, strict=True)],
        [expanded(t, mapped) for t, mapped in zip(weights, weights_mapped, strict=True)],
        settings,
    )
    return (output.transpose(1, 2) if settings.is_batch_first else output, *last)


def _as_rows(
    func: Callable[..., Any], args: Args, value_mapped: bool, hidden_mapped: Any, draws: int, rows: int
) -> Any:
    """One call, with the draws among the rows."""

    def folded(tensor: Tensor, mapped: bool, axis: int) -> Tensor:
        tensor = tensor if mapped else tensor.expand(draws, *tensor.shape)
        return tensor.movedim(0, axis).flatten(axis, axis + 1)

    value, hidden = folded(args[0], value_mapped, rows), args[1]
    hidden = optree.tree_map(lambda t, mapped: folded(t, mapped, 1), hidden, hidden_mapped)
    output, *last = func(value, hidden, *args[2:])

    def apart(tensor: Tensor, axis: int) -> Tensor:
        return tensor.unflatten(axis, (draws, -1)).movedim(axis, 0)

    return (apart(output, rows), *(apart(t, 1) for t in last))


def _stepped(
    func: Callable[..., Any],
    value: Tensor,
    states: Sequence[Tensor],
    weights: list[Tensor],
    settings: _Settings,
) -> tuple[Tensor, ...]:
    """Step through time with all draws: inputs ``(S, T, N, I)``, states ``(S, L, N, H)``."""
    directions = 2 if settings.is_bidirectional else 1
    of_each = len(weights) // (settings.num_layers * directions)
    last: list[list[Tensor]] = []
    for layer in range(settings.num_layers):
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            own = weights[i * of_each : (i + 1) * of_each]
            start = [state[:, i] for state in states]
            inputs = value.flip(1) if direction else value
            output, end = _through_time(func, inputs, start, own, has_biases=settings.has_biases)
            outputs.append(output.flip(1) if direction else output)
            last.append(end)
        value = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return (value, *(torch.stack(ends, 1) for ends in zip(*last, strict=True)))


def _through_time(
    func: Callable[..., Any], value: Tensor, states: list[Tensor], weights: list[Tensor], *, has_biases: bool
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction, in the equations of torch's ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``."""
    of_inputs, of_states = weights[0].mT, weights[1].mT
    input_bias, state_bias = (weights[2], weights[3]) if has_biases else (None, None)
    # An LSTM with projections has one more matrix, which makes the output of the state.
    projection = weights[-1].mT if len(weights) % 2 else None
    steps, rows = value.shape[1:3]
    if input_bias is not None and state_bias is not None and func is not torch.gru:
        input_bias = input_bias + state_bias  # only there the two are not simply added
    entering = product(input_bias, value.flatten(1, 2), of_inputs, 1).unflatten(1, (steps, rows))
    others = [] if state_bias is None else [state_bias]
    if projection is None and may_write_over([entering, of_states, *states, *others]):
        return _in_buffers(func, entering, states, of_states, state_bias)
    outputs = []
    for x in entering.unbind(1):
        h = states[0]
        if func is torch.gru:
            states = [gru_state(x, product(state_bias, h, of_states, 1), h)]
        elif func is torch.lstm:
            h, c = lstm_states(torch.baddbmm(x, h, of_states), states[1])
            states = [h if projection is None else torch.bmm(h, projection), c]
        else:
            entered = torch.baddbmm(x, h, of_states)
            states = [torch.tanh(entered) if func is torch.rnn_tanh else torch.relu(entered)]
        outputs.append(states[0])
    return torch.stack(outputs, 1), states


def _in_buffers(
    func: Callable[..., Any],
    entering: Tensor,
    states: Sequence[Tensor],
    of_states: Tensor,
    state_bias: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """The same where nobody needs what lies between: each step writes where the last one did.

    With few rows a step takes as long as its calls, and a tensor that is made anew is one more of them.
    """
    h, cells = states[0], [state.clone() for state in states[1:]]
    width, steps = h.shape[-1], entering.unbind(1)
    outputs = entering.new_empty(*entering.shape[:3], width)
    gates = torch.empty_like(steps[0], memory_format=torch.contiguous_format)
    each = gates.split(width, -1)  # of an LSTM i, f, g and o; of a GRU r, z and n
    r_and_z, spare = gates[..., : 2 * width], torch.empty_like(each[0])
    for x, out in zip(steps, outputs.unbind(1), strict=True):
        if func is torch.lstm:
            torch.baddbmm(x, h, of_states, out=gates)
            torch.tanh(each[2], out=spare)
            gates.sigmoid_()
            c = cells[0].mul_(each[1]).addcmul_(each[0], spare)
            torch.mul(each[3], torch.tanh(c, out=spare), out=out)
        elif func is torch.gru:
            if state_bias is None:
                torch.bmm(h, of_states, out=gates)
            else:
                torch.baddbmm(state_bias.unsqueeze(1), h, of_states, out=gates)
            r_and_z.add_(x[..., : 2 * width]).sigmoid_()
            n = torch.addcmul(x[..., 2 * width :], each[0], each[2], out=spare).tanh_()
            torch.lerp(n, h, each[1], out=out)
        else:
            torch.baddbmm(x, h, of_states, out=gates)
            torch.tanh(gates, out=out) if func is torch.rnn_tanh else torch.clamp_min(gates, 0, out=out)
        h = out
    return outputs, [h, *cells]
