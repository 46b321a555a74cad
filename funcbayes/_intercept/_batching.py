"""Batching rules for operations that ``vmap`` maps slowly.

``vmap`` turns a linear map with a draw axis into a product, a sum and copies, convolutions into
grouped ones in their slowest layout, and attention into a loop. The rules here do the same arithmetic
with the draws folded where the kernels want them: a linear map is one ``baddbmm``; a convolution has
the draws beside the channels, ``(N, S * C, H, W)``, where pooling and BatchNorm leave them; attention
has them in its batch. An operation without a rule, or called in a way that a rule does not know, is
left to ``vmap``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._functorch import is_concrete, unwrap, unwrap_change, vmap_level, wrap
from ._attention import open_attention
from ._call import Handler, Interception
from ._recurrent import RECURRENT, recurrent

Args = tuple[Any, ...]
Rule = Callable[[int, bool, Args, dict[str, Any]], Any]  # (level, channels_last, args, kwargs) -> result


class LargestBatched:
    """The bytes of the largest result with a mapped axis so far, counted for one entry of that axis."""

    def __init__(self) -> None:
        self.nbytes = 0

    def see(self, result: Any) -> None:
        """Take note of a result; where a model is linearised, of how it changes."""
        if isinstance(result, Tensor):
            physical, axis = unwrap_change(result)
            if axis is not None:
                self.nbytes = max(self.nbytes, physical.nbytes // physical.shape[axis])


class Batching(Interception):
    """Replaces slow operations inside ``vmap``; to be entered inside the mapped function.

    Args:
        kind: ``"vmap"`` for the rules of attention and recurrent layers only, which it cannot do without,
            ``"rows_first"`` or ``"channels_last"`` for all, with images in that layout.
        seen: Observes results, if given.
    """

    def __init__(self, kind: str, seen: LargestBatched | None = None) -> None:
        super().__init__(_handlers(kind))
        self.copies: list[Tensor] = []
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Apply a rule if there is one."""
        if self.copies and args and _works_in_place(func) and isinstance(args[0], Tensor):
            self.refuse_lost_writes(args[0])
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _RESHAPES and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            self.note_copy(args[0], result)
        if self.seen is not None:
            self.seen.see(result)
        return result

    def note_copy(self, base: Tensor, result: Tensor) -> None:
        """Remember a result that the model knows as a view of ``base`` and that is a copy here."""
        level = vmap_level()
        if level is None:
            return
        (whole, axis), (part, _) = unwrap(base, level), unwrap(result, level)
        if axis is not None and is_concrete(whole) and _storage(whole) != _storage(part):
            self.copies.append(part)

    def refuse_lost_writes(self, target: Tensor) -> None:
        """Raise if writing into ``target`` would write into a copy; plain ``vmap`` is right then."""
        level = vmap_level()
        physical = target if level is None else unwrap(target, level)[0]
        if is_concrete(physical) and any(_storage(physical) == _storage(copy) for copy in self.copies):
            raise RuntimeError("A value in another layout cannot be written into through its view.")


_RESHAPES = frozenset(
    (
        *(torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.flatten, torch.Tensor.contiguous),
        *(torch.Tensor.unflatten, torch.Tensor.ravel, torch.Tensor.view_as, torch.Tensor.reshape_as),
        *(
            torch.reshape,
            torch.flatten,
            torch.unflatten,
            torch.ravel,
            torch.Tensor.as_strided,
            torch.as_strided,
        ),
    )
)


def _works_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", *_IN_PLACE_OPERATORS)


_IN_PLACE_OPERATORS = tuple(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod")
)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@functools.cache
def _handlers(kind: str) -> dict[Any, Handler]:
    names = (F.scaled_dot_product_attention, *RECURRENT) if kind == "vmap" else _RULES
    rules = {func: _handler(_RULES[func], kind == "channels_last") for func in names}
    return {F.multi_head_attention_forward: open_attention, **rules}


def _handler(rule: Rule, channels_last: bool) -> Handler:
    def handler(mode: Interception, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]) -> Any:
        level = vmap_level()
        if level is not None:
            result = rule(level, channels_last, args, kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)

    return handler


def _front(tensor: Tensor, level: int) -> Tensor | None:
    """``(S, ...)``, the physical tensor with its mapped axis first; ``None`` if it has none."""
    physical, axis = unwrap(tensor, level)
    return None if axis is None else physical.movedim(axis, 0)


def _named(args: Args, kwargs: dict[str, Any], *names: str) -> list[Any]:
    given = dict(zip(names, args, strict=False)) | kwargs
    return [given.get(name) for name in names]


def _one_dtype(*tensors: Tensor | None) -> bool:
    """Whether dtypes agree, or autocast will make them agree."""
    given = [t for t in tensors if t is not None]
    if len({t.dtype for t in given}) == 1:
        return True
    return all(t.is_floating_point() for t in given) and torch.is_autocast_enabled(given[0].device.type)


def _linear(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
    value, weight, bias = _named(args, kwargs, "input", "weight", "bias")
    weights = _front(weight, level)
    if weights is None or weight.ndim != 2 or not weight.shape[1] or value.ndim == 0:
        return None
    if not _one_dtype(value, weight, bias) or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    draws, width = weights.shape[0], weights.shape[-1]
    values = _front(value, level)
    rows = (
        values.reshape(draws, -1, width)
        if values is not None
        else value.reshape(1, -1, width).expand(draws, -1, -1)
    )
    biases = None if bias is None else _front(bias, level)
    if bias is not None and biases is None:
        biases = bias.expand(draws, -1)
    # Gradients of the weights lie in memory as the weights do only if rows come last in the product. In the
    # usual order they come transposed, and everything that is done with them takes several times as long.
    if value.ndim == 2 and weights.requires_grad and torch.is_grad_enabled():
        return wrap(_product(biases, weights, rows.transpose(1, 2), -1).transpose(1, 2), 0, level)
    out = _product(biases, rows, weights.transpose(1, 2), 1)
    return wrap(out.view(draws, *value.shape[:-1], weights.shape[1]), 0, level)


def _product(biases: Tensor | None, left: Tensor, right: Tensor, axis: int) -> Tensor:
    """``left right``, and biases ``(S, C)`` that are the same along an axis."""
    return torch.bmm(left, right) if biases is None else torch.baddbmm(biases.unsqueeze(axis), left, right)


def _in_channels_last(images: Tensor) -> Tensor:
    # Inside another transform there are no layouts to choose from.
    return images.contiguous(memory_format=torch.channels_last) if is_concrete(images) else images


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
    front = _front(value, level)
    if front is None or value.ndim < 3 or front.stride(0) != front.shape[1] * front.stride(1):
        return None
    return front.flatten(0, 1), front.shape[0]


def _rows_apart(flat: Tensor, draws: int, level: int) -> Tensor:
    """Undo :func:`_among_rows`."""
    return wrap(flat.unflatten(0, (draws, -1)), 0, level)


def _convolution(ndim: int, convolve: Callable[..., Tensor]) -> Rule:
    def rule(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        value, weight, bias, stride, padding, dilation, groups = _named(args, kwargs, *names)
        weights = _front(weight, level)
        if weights is None or value.ndim != ndim + 2 or not _one_dtype(value, weight, bias):
            return None
        groups = 1 if groups is None else groups
        draws = weights.shape[0]
        split = _beside_channels(value, level, channels_last)
        if split is None and groups > 1:
            return None
        if split is None:  # one wide convolution of the input that all draws share
            flat, all_groups = value, 1
            if channels_last and ndim == 2:
                flat = _in_channels_last(flat)
        else:
            flat, all_groups = split[0], draws * groups
        kernels = weights.flatten(0, 1)
        if channels_last and ndim == 2:
            kernels = _in_channels_last(kernels)
        if bias is not None:
            biases = _front(bias, level)
            bias = (biases if biases is not None else bias.expand(draws, -1)).reshape(-1)
        settings = (1 if stride is None else stride, 0 if padding is None else padding)
        out = convolve(flat, kernels, bias, *settings, 1 if dilation is None else dilation, all_groups)
        return _apart(out, draws, level)

    return rule


def _pooling(pool: Callable[..., Any], ndim: int) -> Rule:
    """Pooling treats channels alike, so it does not mind the draws among them."""

    def rule(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], Tensor) or args[0].ndim != ndim + 2:
            return None
        rows = _among_rows(args[0], level)
        split = _beside_channels(args[0], level, channels_last) if rows is None else rows
        if split is None:
            return None
        flat, draws = split
        out = pool(flat, *args[1:], **kwargs)
        if not isinstance(out, Tensor):
            return None
        return _apart(out, draws, level) if rows is None else _rows_apart(out, draws, level)

    return rule


def _batch_norm(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    value, mean, variance, weight, bias, training, momentum, eps = _named(args, kwargs, *names)
    if (mean is None and not training) or not _one_dtype(value, mean, variance, weight, bias):
        return None
    parameters = (mean, variance, weight, bias)
    rows = _among_rows(value, level)
    if rows is not None and not training and all(p is None or _front(p, level) is None for p in parameters):
        out = F.batch_norm(rows[0], *parameters, eps=1e-5 if eps is None else eps)
        return _rows_apart(out, rows[1], level)
    split = _beside_channels(value, level, channels_last)
    if split is None:
        return None
    flat, draws = split

    def per_channel(parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        own = _front(parameter, level)
        return (parameter.expand(draws, -1) if own is None else own).reshape(-1)

    # Training writes into the statistics, which a copy of them would keep to itself.
    if training and not all(s is None or _is_viewable(s, level) for s in (mean, variance)):
        return None
    out = F.batch_norm(
        flat,
        per_channel(mean),
        per_channel(variance),
        weight=per_channel(weight),
        bias=per_channel(bias),
        training=bool(training),
        momentum=0.1 if momentum is None else momentum,
        eps=1e-5 if eps is None else eps,
    )
    return _apart(out, draws, level)


def _is_viewable(value: Tensor, level: int) -> bool:
    """Whether the mapped axis can be folded into the next without a copy."""
    front = _front(value, level)
    return front is not None and front.is_contiguous()


def _layer_norm(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
    value, shape, weight, bias, eps = _named(
        args, kwargs, "input", "normalized_shape", "weight", "bias", "eps"
    )
    values = _front(value, level)
    if values is None or weight is None or bias is None or not _one_dtype(value, weight, bias):
        return None
    weights, biases = _front(weight, level), _front(bias, level)
    if weights is None or biases is None:
        return None
    normal = F.layer_norm(values, shape, None, None, 1e-5 if eps is None else eps)
    between = (1,) * (value.ndim - weight.ndim)
    affine = (p.reshape(p.shape[0], *between, *p.shape[1:]) for p in (biases, weights))
    shift, scale = affine
    return wrap(torch.addcmul(shift, normal, scale), 0, level)


def _embedding(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    tokens, weight, padding, max_norm, _, by_frequency, sparse = _named(args, kwargs, *names)
    weights = _front(weight, level)
    if weights is None or weight.ndim != 2 or max_norm is not None or by_frequency or sparse:
        return None
    draws = weights.shape[0]
    own = _front(tokens, level)
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


def _attention(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    query, key, value, mask, rate, is_causal, scale, gqa = _named(args, kwargs, *names)
    given = [t for t in (query, key, value, mask) if t is not None]
    draws = next((f.shape[0] for f in (_front(t, level) for t in given) if f is not None), None)
    if rate or draws is None or min(t.ndim for t in (query, key, value)) < 3:
        return None
    count = draws

    def fold(tensor: Tensor, rows: tuple[int, ...]) -> Tensor:
        """``(S * ..., heads, length, width)``: kernels know one axis of rows and one of heads."""
        front = _front(tensor, level)
        tensor = tensor.expand(count, *tensor.shape) if front is None else front
        missing = (1,) * (len(rows) + 3 - tensor.ndim)
        tensor = tensor.reshape(count, *missing, *tensor.shape[1:])
        return tensor.expand(count, *rows, *tensor.shape[-2:]).flatten(0, len(rows) - 1)

    if gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    rows = torch.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    folded = [fold(t, rows) for t in (query, key, value)]
    if mask is not None and (mask.ndim > 2 or unwrap(mask, level)[1] is not None):
        mask = fold(mask, rows)
    out = F.scaled_dot_product_attention(*folded, attn_mask=mask, is_causal=bool(is_causal), scale=scale)
    return wrap(out.reshape(count, *rows, *out.shape[-2:]), 0, level)


def _view(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
    # The model knows its tensors as contiguous and may view them, while ours lie in another order.
    if unwrap(args[0], level)[1] is None or kwargs or any(isinstance(a, torch.dtype) for a in args[1:]):
        return None
    return args[0].reshape(*args[1:])


def _contiguous(func: Callable[..., Any]) -> Rule:
    """Composite functions that ask for the layout of their input, which vmap can only say of this one."""

    def rule(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
        if not args:
            return None
        physical, axis = unwrap(args[0], level)
        if axis is None or physical.movedim(axis, 0).is_contiguous():
            return None
        with Batching("vmap"):
            return func(wrap(physical.movedim(axis, 0).contiguous(), 0, level), *args[1:], **kwargs)

    return rule


def _strided(level: int, channels_last: bool, args: Args, kwargs: dict[str, Any]) -> Any:
    physical, axis = unwrap(args[0], level)
    if axis is None:
        return None
    contiguous = wrap(physical.movedim(axis, 0).contiguous(), 0, level)
    return torch.as_strided(contiguous, *args[1:], **kwargs)


_RULES: dict[Any, Rule] = {
    torch.Tensor.view: _view,
    **dict.fromkeys((torch.Tensor.as_strided, torch.as_strided), _strided),
    **{func: _contiguous(func) for func in (F.group_norm, F.instance_norm, F.interpolate)},
    F.linear: _linear,
    F.conv1d: _convolution(1, F.conv1d),
    F.conv2d: _convolution(2, F.conv2d),
    F.conv3d: _convolution(3, F.conv3d),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
    **{func: recurrent(func) for func in RECURRENT},
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
