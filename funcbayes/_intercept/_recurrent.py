"""Batching rules for recurrent layers, which ``vmap`` cannot map.

Draws that share the weights, as those of dropout elsewhere do, are more rows of one call. With weights of
their own they are either stepped through time together, one product of all draws a step, or given to torch's
kernel one by one: a step costs little more for all draws than for one, unless rows or weights are so many
that the kernel, which does without the memory traffic between steps, is faster.
"""

import functools
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
# Rows with which an LSTM is faster still if its inputs enter in the product of the state, and bytes of both
# matrices in one layer, direction and draw up to which it is.
_ROWS_IN_ONE_PRODUCT, _BYTES_IN_ONE_PRODUCT = range(8, 1025), 256 << 10
_FINE_DTYPES = (torch.float32, torch.float64)  # in which rounding numbers near one leaves small ones in place


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
    if value.device.type != "cpu":
        return _one_by_one(func, leaves, is_mapped, draws, structure)
    states = hidden if isinstance(hidden, list | tuple) else (hidden,)
    are_mapped = hidden_mapped if isinstance(hidden, list | tuple) else (hidden_mapped,)

    def expanded(tensor: Tensor, mapped: bool) -> Tensor:
        return tensor if mapped else tensor.expand(draws, *tensor.shape)

    value = expanded(value, value_mapped)
    steps_first = value.transpose(1, 2) if settings.is_batch_first else value
    states = [expanded(t, mapped) for t, mapped in zip(states, are_mapped, strict=True)]
    weights = [expanded(t, mapped) for t, mapped in zip(weights, weights_mapped, strict=True)]
    layers = _layers(weights, settings)
    through_time = _way_through_time(func, steps_first, states, weights, layers)
    if through_time is None:
        return _one_by_one(func, leaves, is_mapped, draws, structure)
    output, *last = _stepped(through_time, steps_first, states, layers, 1 + settings.is_bidirectional)
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


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer in one direction, with ``G`` gates, as torch has them.

    Attributes:
        of_inputs: ``(S, G H, I)``.
        of_states: ``(S, G H, H)``, or ``(S, G H, P)`` with projections.
        input_bias: ``(S, G H)``.
        state_bias: ``(S, G H)``.
        projection: ``(S, P, H)``, which makes the output of the state in an LSTM with projections.
    """

    of_inputs: Tensor
    of_states: Tensor
    input_bias: Tensor | None
    state_bias: Tensor | None
    projection: Tensor | None

    @property
    def bias(self) -> Tensor | None:
        """The sum of both, where nothing else is done with them."""
        if self.input_bias is None or self.state_bias is None:
            return None
        return self.input_bias + self.state_bias

    @property
    def nbytes(self) -> int:
        """Of both matrices, in one draw."""
        return (self.of_inputs.nbytes + self.of_states.nbytes) // len(self.of_inputs)


def _layers(weights: Sequence[Tensor], settings: _Settings) -> list[_Layer]:
    """Layers in order, of each its directions, from the list that torch has of their weights."""
    size = len(weights) // (settings.num_layers * (1 + settings.is_bidirectional))
    layers = []
    for i in range(0, len(weights), size):
        of_inputs, of_states, *others = weights[i : i + size]
        input_bias, state_bias = others[:2] if settings.has_biases else (None, None)
        projection = others[-1] if size % 2 else None
        layers.append(_Layer(of_inputs, of_states, input_bias, state_bias, projection))
    return layers


# Of inputs ``(S, T, N, I)``, states ``(S, N, H)`` and weights, outputs ``(S, T, N, H)`` and the last states.
ThroughTime = Callable[[Tensor, list[Tensor], _Layer], tuple[Tensor, list[Tensor]]]


def _way_through_time(
    func: Callable[..., Any], value: Tensor, states: list[Tensor], weights: list[Tensor], layers: list[_Layer]
) -> ThroughTime | None:
    """How draws are stepped together; ``None`` where torch's kernel is faster one by one, or complains."""
    first, (draws, steps, num_rows, width) = layers[0], value.shape
    of_state = (draws, len(layers), num_rows, first.of_states.shape[-1])
    if not steps or width != first.of_inputs.shape[-1] or states[0].shape != of_state:
        return None
    in_buffers = first.projection is None and may_write_over([value, *states, *weights])
    if func is torch.lstm and in_buffers and num_rows in _ROWS_IN_ONE_PRODUCT:
        are_few = max(layer.nbytes for layer in layers) <= _BYTES_IN_ONE_PRODUCT
        if are_few and value.dtype in _FINE_DTYPES:
            return _in_one_product
    if num_rows > _MOST_ROWS[func] or first.of_states.nbytes // draws > _MOST_BYTES[func]:
        return None
    return functools.partial(_in_buffers if in_buffers else _anew, func)


def _stepped(
    through_time: ThroughTime,
    value: Tensor,
    states: Sequence[Tensor],
    layers: Sequence[_Layer],
    directions: int,
) -> tuple[Tensor, ...]:
    """Step through time with all draws: inputs ``(S, T, N, I)``, states ``(S, L, N, H)``."""
    last: list[list[Tensor]] = []
    for first in range(0, len(layers), directions):
        outputs = []
        for direction, layer in enumerate(layers[first : first + directions]):
            start = [state[:, first + direction] for state in states]
            inputs = value.flip(1) if direction else value
            output, end = through_time(inputs, start, layer)
            outputs.append(output.flip(1) if direction else output)
            last.append(end)
        value = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return (value, *(torch.stack(ends, 1) for ends in zip(*last, strict=True)))


def _entering(func: Callable[..., Any], value: Tensor, layer: _Layer) -> Tensor:
    """What the inputs of all steps give, ``(S, T, N, G H)``, with both biases where they are simply added."""
    bias = layer.input_bias if func is torch.gru else layer.bias
    steps_and_rows = value.shape[1:3]
    return product(bias, value.flatten(1, 2), layer.of_inputs.mT, 1).unflatten(1, steps_and_rows)


def _anew(
    func: Callable[..., Any], value: Tensor, states: list[Tensor], layer: _Layer
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction, in the equations of torch's ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``."""
    of_states, outputs = layer.of_states.mT, []
    for x in _entering(func, value, layer).unbind(1):
        h = states[0]
        if func is torch.gru:
            states = [gru_state(x, product(layer.state_bias, h, of_states, 1), h)]
        elif func is torch.lstm:
            h, c = lstm_states(torch.baddbmm(x, h, of_states), states[1])
            states = [h if layer.projection is None else torch.bmm(h, layer.projection.mT), c]
        else:
            entered = torch.baddbmm(x, h, of_states)
            states = [torch.tanh(entered) if func is torch.rnn_tanh else torch.relu(entered)]
        outputs.append(states[0])
    return torch.stack(outputs, 1), states


def _in_buffers(
    func: Callable[..., Any], value: Tensor, states: list[Tensor], layer: _Layer
) -> tuple[Tensor, list[Tensor]]:
    """The same where nobody needs what lies between: each step writes where the last one did.

    With few rows a step takes as long as its calls, and a tensor that is made anew is one more of them.
    """
    entering, of_states = _entering(func, value, layer), layer.of_states.mT
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
            if layer.state_bias is None:
                torch.bmm(h, of_states, out=gates)
            else:
                torch.baddbmm(layer.state_bias.unsqueeze(1), h, of_states, out=gates)
            r_and_z.add_(x[..., : 2 * width]).sigmoid_()
            n = torch.addcmul(x[..., 2 * width :], each[0], each[2], out=spare).tanh_()
            torch.lerp(n, h, each[1], out=out)
        else:
            torch.baddbmm(x, h, of_states, out=gates)
            torch.tanh(gates, out=out) if func is torch.rnn_tanh else torch.clamp_min(gates, 0, out=out)
        h = out
    return outputs, [h, *cells]


def _in_one_product(value: Tensor, states: list[Tensor], layer: _Layer) -> tuple[Tensor, list[Tensor]]:
    """An LSTM in buffers for more rows: states, inputs and a one for the biases enter a step in one product.

    So no step reads what inputs gave before, which is four times as wide as the outputs and out of cache by
    then. ``tanh(a) = 2 sigmoid(2 a) - 1`` takes less time than torch's ``tanh`` on a CPU, and errs by the
    rounding of numbers near one, however small ``a`` is. To double and halve numbers is exact: the state of
    the buffers is ``h / 2``, that of the cells ``2 c``, and weights of states and those of ``g`` are doubled.
    """
    width, bias, (start, cells) = states[0].shape[-1], layer.bias, states
    biases = [] if bias is None else [bias.unsqueeze(2)]
    # Laid out as torch has them: transposed, the copy would take longer, and the product no less.
    weights = torch.cat([2 * layer.of_states, layer.of_inputs, *biases], 2).mT
    weights[..., 2 * width : 3 * width] *= 2
    entering = value.new_ones(*start.shape[:2], weights.shape[1])
    h, x = entering[..., :width], entering[..., width : width + value.shape[-1]]
    torch.mul(start, 0.5, out=h)
    c, outputs = 2 * cells, value.new_empty(*value.shape[:3], width)
    gates = value.new_empty(*start.shape[:2], 4 * width)
    (i, f, g, o), spare = gates.split(width, -1), torch.empty_like(c)
    half = c.new_tensor(0.5)  # a number would be made a tensor at each step
    for inputs, out in zip(value.unbind(1), outputs.unbind(1), strict=True):
        x.copy_(inputs)
        torch.bmm(entering, weights, out=gates)
        gates.sigmoid_()
        c.mul_(f).addcmul_(i, g.sub_(half), value=4)
        torch.mul(o, torch.sigmoid(c, out=spare).sub_(half), out=h)
        out.copy_(h)
    return outputs.mul_(2), [2 * h, c.mul_(0.5)]
