"""Batching rules for operations that ``vmap`` maps slowly.

``vmap`` turns a linear map with a draw axis into a product, a sum and copies, convolutions into
grouped ones in their slowest layout, and attention into a loop. The rules here do the same arithmetic
with the draws folded where the kernels want them: a linear map is one ``baddbmm``; a convolution has
the draws beside the channels, ``(N, S * C, H, W)``, where pooling and BatchNorm leave them; attention
has them in its batch. An operation without a rule, or called in a way that a rule does not know, is
left to ``vmap``.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._functorch import (
    is_autocast_on,
    is_concrete,
    is_readable,
    outside_transforms,
    physical,
    unwrap,
    unwrap_change,
    vmap_level,
    wrap,
)
from .._tree import tensors
from ._attention import open_attention
from ._attention_rules import attention, multi_head
from ._by_parts import BY_PARTS, done_by_parts
from ._call import Handler, Interception
from ._mapped import draws_first, of_each_draw, one_dtype, product
from ._recurrent import RECURRENT, recurrent
from ._views import REARRANGING, STRIDED, VIEWS_OR_COPIES, Memory, reshapes, works_in_place, written

Args = tuple[Any, ...]
# Called with the level of the `vmap`, whether images are channels_last, and what the function is called with;
# gives `None` where it leaves the call to `vmap`.
Rule = Callable[..., Any]


class Observed:
    """What was seen of an evaluation inside ``vmap``.

    Attributes:
        nbytes: Bytes of the largest result with a mapped axis, counted for one entry of that axis.
        needs_rules: Whether ``vmap`` without any mode may be wrong or slow: a function was called that a rule
            is for, or something was done in place, perhaps through what the model knows as a view.
    """

    def __init__(self) -> None:
        self.nbytes, self.needs_rules = 0, False

    def see(self, result: Any) -> None:
        """Take note of a result, one tensor or several; where a model is linearised, of how it changes."""
        for tensor in tensors(result):
            physical, axis = unwrap_change(tensor)
            if axis is not None:
                self.nbytes = max(self.nbytes, physical.nbytes // physical.shape[axis])


class Batching(Interception):
    """Replaces slow operations inside ``vmap``; to be entered inside the mapped function.

    Args:
        kind: ``"vmap"`` for the rules of attention and recurrent layers only, which it cannot do without,
            ``"rows_first"`` or ``"channels_last"`` for all, with images in that layout.
        seen: Observes results, if given.
    """

    def __init__(self, kind: str, seen: Observed | None = None) -> None:
        super().__init__(_handlers(kind, is_autocast_on()))
        self.reason: str | None = None  # why it has raised
        self.reshaped, self.rearranged = Memory(), Memory()
        self.moves = kind != "vmap"  # whether values have another layout here than in the model
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Apply a rule if there is one."""
        if self.reshaped and works_in_place(func, kwargs):
            self.refuse_lost_writes(written(args, kwargs))
        base: Any = args[0] if args else (kwargs or {}).get("input")
        if func in REARRANGING and isinstance(base, Tensor):
            self.rearranged |= Memory(base)
        if func in STRIDED and not self.rearranged.isdisjoint(Memory(base)):
            raise RuntimeError("Strides are given for a value that may have others here.")
        result = super().__torch_function__(func, types, args, kwargs)
        if reshapes(func, kwargs) and isinstance(result, Tensor):
            self.note(func, base, result)
        if self.seen is not None:
            self.seen.see(result)
            self.seen.needs_rules |= func in self.handlers or works_in_place(func, kwargs)
        return result

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Raise what was raised inside if the model went on nevertheless."""
        super().__exit__(kind, error, traceback)
        if error is None and self.reason is not None:
            raise RuntimeError(self.reason)

    def note(self, func: Callable[..., Any], base: Tensor, result: Tensor) -> None:
        """Remember values of which one may be a view of the other in the model and not here, or here only."""
        level = vmap_level()
        if level is None:
            return
        (whole, axis), (part, _) = unwrap(base, level), unwrap(result, level)
        if axis is None or physical(whole).device.type == "meta":
            return
        both = Memory(whole, part)
        # Of a value that the model has rearranged there may be a view here and a copy there.
        if len(both) == 2 or (self.moves and func in VIEWS_OR_COPIES and both <= self.rearranged):
            self.reshaped |= both

    def refuse_lost_writes(self, targets: list[Tensor]) -> None:
        """Raise if writing would change more, or less, than it does in the model; ``vmap`` is right then."""
        if not self.reshaped.isdisjoint(Memory(*targets)):
            self.reason = "A value in another layout cannot be written into once it was reshaped."
            raise RuntimeError(self.reason)


@functools.cache
def _handlers(kind: str, is_autocast: bool) -> dict[Any, Handler]:
    names = (F.scaled_dot_product_attention, *RECURRENT, *STRIDED) if kind == "vmap" else _RULES
    opened: dict[Any, Handler] = {F.multi_head_attention_forward: open_attention}
    opened |= {func: _by_parts(parts) for func, parts in BY_PARTS.items()}
    if is_autocast:
        opened |= dict.fromkeys(_LOWERED, _as_autocast)
    handlers = opened | {
        func: _handler(_RULES[func], kind == "channels_last", func in _INSIDE, opened.get(func))
        for func in names
    }
    if is_autocast:
        handlers |= {func: _in_dtype_of_input(handlers.get(func)) for func in _NORMS}
    return handlers


def _handler(rule: Rule, channels_last: bool, is_inside: bool, otherwise: Handler | None) -> Handler:
    def handler(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        level = vmap_level()
        if level is not None:
            # A rule works on plain tensors if no other transform is around; there, each operation costs less.
            with outside_transforms() if level == 1 and not is_inside else nullcontext():
                result = rule(level, channels_last, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs) if otherwise is None else otherwise(mode, func, args, kwargs)

    return handler


def _linear(
    level: int, channels_last: bool, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    weights = draws_first(weight, level)
    if weights is None or weight.ndim != 2 or not weight.shape[1] or input.ndim == 0:
        return None
    if not one_dtype(input, weight, bias) or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    draws, width = weights.shape[0], weights.shape[-1]
    if input.shape[-1] != width:
        return None  # torch says what is wrong
    values = draws_first(input, level)
    if values is None:
        rows = input.reshape(-1, width).expand(draws, -1, -1)
    else:
        rows = values if input.ndim == 2 else values.reshape(draws, -1, width)
    biases = None if bias is None else of_each_draw(bias, draws, level)
    # Gradients of the weights lie in memory as the weights do only if rows come last in the product. In the
    # usual order they come transposed, and everything that is done with them takes several times as long.
    if input.ndim == 2 and weights.requires_grad and torch.is_grad_enabled():
        return wrap(product(biases, weights, rows.transpose(1, 2), -1).transpose(1, 2), 0, level)
    out = product(biases, rows, weights.transpose(1, 2), 1)
    return wrap(out.view(draws, *input.shape[:-1], weights.shape[1]), 0, level)


def _in_channels_last(images: Tensor) -> Tensor:
    if not is_concrete(images):  # inside another transform there are no layouts to choose from
        return images
    if images.shape[1] == 1:  # is in both layouts, and is taken for the usual one, unless strides say more
        images = images.squeeze(1).contiguous().unsqueeze(-1).movedim(-1, 1)
    found = images.contiguous(memory_format=torch.channels_last)
    if len(found) == 1 and found.stride(0) != found.numel():
        # The stride of an axis of one entry means nothing, but the gradient of a convolution in float64 goes
        # by it (torch 2.13), and is wrong.
        found = found.clone(memory_format=torch.channels_last)
    return found


def _gradient_in_channels_last(grad: Tensor | None) -> Tensor | None:
    if grad is None:  # as of a second derivative that there is none of
        return None
    return _in_channels_last(grad)


def _beside_channels(value: Tensor, level: int, channels_last: bool) -> tuple[Tensor, int] | None:
    """``(N, S * C, ...)`` and ``S``, from a value ``(N, C, ...)`` that has a mapped axis."""
    physical, axis = unwrap(value, level)
    if axis is None or value.ndim < 3:
        return None
    flat = physical.movedim(axis, 1).flatten(1, 2)
    if channels_last and value.ndim == 4:
        flat = _in_channels_last(flat)
    return flat, physical.shape[axis]


def _apart(flat: Tensor, draws: int, level: int) -> Tensor:
    """Undo :func:`_beside_channels`."""
    return wrap(flat.unflatten(1, (draws, -1)), 1, level)


def _among_rows(value: Tensor, level: int) -> tuple[Tensor, int] | None:
    """``(S * N, ...)`` and ``S``, from a value that lies like this: what comes after a shared convolution."""
    front = draws_first(value, level)
    if front is None or value.ndim < 3 or front.stride(0) != front.shape[1] * front.stride(1):
        return None
    return front.flatten(0, 1), front.shape[0]


def _rows_apart(flat: Tensor, draws: int, level: int) -> Tensor:
    """Undo :func:`_among_rows`."""
    return wrap(flat.unflatten(0, (draws, -1)), 0, level)


def _convolution(ndim: int, convolve: Callable[..., Tensor]) -> Rule:
    def rule(
        level: int,
        channels_last: bool,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor | None:
        weights = draws_first(weight, level)
        if weights is None or input.ndim != ndim + 2 or not one_dtype(input, weight, bias):
            return None
        draws = weights.shape[0]
        split = _beside_channels(input, level, channels_last)
        if split is None and groups > 1:
            return None
        if split is None:  # one wide convolution of the input that all draws share
            flat, all_groups = input, 1
            if channels_last and ndim == 2:
                flat = _in_channels_last(flat)
        else:
            flat, all_groups = split[0], draws * groups
        kernels = weights.flatten(0, 1)
        if channels_last and ndim == 2:
            kernels = _in_channels_last(kernels)
        if bias is not None:
            bias = of_each_draw(bias, draws, level).reshape(-1)
        out = convolve(flat, kernels, bias, stride, padding, dilation, all_groups)
        return _apart(out, draws, level)

    return rule


def _by_parts(parts: Callable[..., Any]) -> Handler:
    """Do by parts what ``vmap`` maps by a loop, or not at all."""

    def handler(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        level = vmap_level()
        if level is None or all(unwrap(t, level)[1] is None for t in tensors((args, kwargs))):
            return func(*args, **kwargs)
        return done_by_parts(parts, mode, func, args, kwargs)

    return handler


# What autocast gives to lower precision.
_LOWERED = (
    *(F.linear, F.prelu, torch.prelu, F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)


def _as_autocast(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
    """Call with what autocast would make of arguments; ``vmap`` takes some before it does (torch 2.13)."""
    del mode

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        kind = value.device.type
        return value.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else value

    return func(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})


# What gives the dtype of its input on a CPU, whatever that of its weights is.
_NORMS = F.layer_norm, F.group_norm, F.instance_norm, F.batch_norm, F.rms_norm


def _in_dtype_of_input(handler: Handler | None) -> Handler:
    """Where ``vmap`` writes a norm out, the result has the widest dtype of all that went in."""

    def wrapped(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs) if handler is None else handler(mode, func, args, kwargs)
        value = args[0] if args else kwargs["input"]
        return out.to(value.dtype) if value.device.type == "cpu" else out

    return wrapped


def _pooling(pool: Callable[..., Any], ndim: int) -> Rule:
    """Pooling treats channels alike, so it does not mind the draws among them."""

    def rule(level: int, channels_last: bool, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if input.ndim != ndim + 2:
            return None
        rows = _among_rows(input, level)
        split = _beside_channels(input, level, channels_last) if rows is None else rows
        if split is None:
            return None
        flat, draws = split
        out = pool(flat, *args, **kwargs)
        if not isinstance(out, Tensor):
            return None
        if channels_last and rows is None and ndim == 2 and out.requires_grad and is_readable(out):
            # The kernel of the gradient goes by the layout that this comes in, and would copy what it needs.
            out.register_hook(_gradient_in_channels_last)
        return _apart(out, draws, level) if rows is None else _rows_apart(out, draws, level)

    return rule


def _batch_norm(
    level: int,
    channels_last: bool,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    value, mean, variance = input, running_mean, running_var
    if (mean is None and not training) or not one_dtype(value, mean, variance, weight, bias):
        return None
    parameters = (mean, variance, weight, bias)
    rows = _among_rows(value, level)
    if (
        rows is not None
        and not training
        and all(p is None or draws_first(p, level) is None for p in parameters)
    ):
        out = F.batch_norm(rows[0], *parameters, eps=eps)
        return _rows_apart(out, rows[1], level)
    split = _beside_channels(value, level, channels_last)
    if split is None:
        return None
    flat, draws = split

    def per_channel(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else of_each_draw(parameter, draws, level).reshape(-1)

    # Training writes into the statistics, which a copy of them would keep to itself.
    if training and not all(s is None or _is_viewable(s, level) for s in (mean, variance)):
        return None
    out = F.batch_norm(
        flat,
        per_channel(mean),
        per_channel(variance),
        weight=per_channel(weight),
        bias=per_channel(bias),
        training=training,
        momentum=momentum,
        eps=eps,
    )
    return _apart(out, draws, level)


def _is_viewable(value: Tensor, level: int) -> bool:
    """Whether the mapped axis can be folded into the next without a copy."""
    front = draws_first(value, level)
    return front is not None and front.is_contiguous()


# Entries of a value of one draw from which on a call a draw costs less than going over the values more often.
_LARGE_NORM = 1 << 17


def _layer_norm(
    level: int,
    channels_last: bool,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    values = draws_first(input, level)
    if values is None or weight is None or bias is None or not one_dtype(input, weight, bias):
        return None
    weights, biases = draws_first(weight, level), draws_first(bias, level)
    if weights is None or biases is None:
        return None
    needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in (values, weights, biases))
    if needs_grad and values.device.type == "cpu" and input.numel() >= _LARGE_NORM:
        # A kernel a draw: that of the backward pass has the gradients of weights and biases with the others.
        of_draws = zip(values, weights, biases, strict=True)
        out = [F.layer_norm(value, normalized_shape, w, b, eps) for value, w, b in of_draws]
        return wrap(torch.stack(out), 0, level)
    normal = F.layer_norm(values, normalized_shape, None, None, eps)
    between = (1,) * (input.ndim - weight.ndim)
    affine = (p.reshape(p.shape[0], *between, *p.shape[1:]) for p in (biases, weights))
    shift, scale = affine
    return wrap(torch.addcmul(shift, normal, scale), 0, level)


def _embedding(
    level: int,
    channels_last: bool,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    tokens, padding, weights = input, padding_idx, draws_first(weight, level)
    if weights is None or weight.ndim != 2 or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    draws = weights.shape[0]
    own = draws_first(tokens, level)
    if own is None:
        rows = weights.index_select(1, tokens.reshape(-1)).view(draws, *tokens.shape, weight.shape[1])
    else:  # each draw looks into its own table
        rows = weights[torch.arange(draws, device=own.device).reshape(-1, *(1 for _ in tokens.shape)), own]
    if padding is not None and torch.is_grad_enabled():
        # Padding has a row of the table that is never trained. (vmap's own rule forgets that if tokens
        # and table are both mapped.)
        is_padding = (tokens if own is None else own) == padding % weight.shape[0]
        rows = torch.where(is_padding.unsqueeze(-1), rows.detach(), rows)
    return wrap(rows, 0, level)


def _view(level: int, channels_last: bool, self: Tensor, *shape: Any, **kwargs: Any) -> Tensor | None:
    # The model knows its tensors as contiguous and may view them, while ours lie in another order.
    if unwrap(self, level)[1] is None or kwargs or any(isinstance(size, torch.dtype) for size in shape):
        return None
    return self.reshape(*shape)


def _contiguous(func: Callable[..., Any]) -> Rule:
    """Composite functions that ask for the layout of their input, which vmap can only say of this one."""

    def rule(level: int, channels_last: bool, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        physical, axis = unwrap(input, level)
        if axis is None or physical.movedim(axis, 0).is_contiguous():
            return None
        with Batching("vmap"):
            return func(wrap(physical.movedim(axis, 0).contiguous(), 0, level), *args, **kwargs)

    return rule


def _strided(level: int, channels_last: bool, input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    physical, axis = unwrap(input, level)
    if axis is None:
        return None
    contiguous = wrap(physical.movedim(axis, 0).contiguous(), 0, level)
    return torch.as_strided(contiguous, *args, **kwargs)


# These hand the call on to `vmap` with another value, or leave it by themselves where they can.
_INSIDE: dict[Any, Rule] = {
    torch.Tensor.view: _view,
    **dict.fromkeys(STRIDED, _strided),
    **{func: _contiguous(func) for func in (F.group_norm, F.instance_norm, F.interpolate)},
    **{func: recurrent(func) for func in RECURRENT},
}
_RULES: dict[Any, Rule] = {
    **_INSIDE,
    F.linear: _linear,
    F.conv1d: _convolution(1, F.conv1d),
    F.conv2d: _convolution(2, F.conv2d),
    F.conv3d: _convolution(3, F.conv3d),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head,
}
for _pool, _ndim in (
    (F.max_pool1d, 1),
    (F.avg_pool1d, 1),
    (F.adaptive_avg_pool1d, 1),
    (F.adaptive_max_pool1d, 1),
    (F.max_pool2d, 2),
    (F.avg_pool2d, 2),
    (F.adaptive_avg_pool2d, 2),
    (F.adaptive_max_pool2d, 2),
):
    _RULES[_pool] = _pooling(_pool, _ndim)
