"""Dropout with masks that are functions of a key, in a model that need not be in training mode."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from .._functorch import is_concrete, outside_transforms, unintercepted, unwrap, vmap_level, wrap
from .._masks import Place, dropout_mask
from .._random import fold
from .._tree import Params, Where, matcher, pytree_dataclass, static
from ._attention import attention_weights, drops_weights, open_attention
from ._call import Call, Handler, Interception, calling
from ._folded import Folded
from ._prepared import Prepared
from ._rows import RowAxes, row_axis, two_rows

# The negative saturation of SELU, Klambauer et al. (2017), section 2: -scale * alpha.
_SELU_FLOOR = -1.7580993408473766
_IN_PLACE = (torch.dropout_, torch.alpha_dropout_, torch.feature_dropout_, torch.feature_alpha_dropout_)

Args = tuple[Any, ...]


@pytree_dataclass
class DropoutMasks:
    """An effect on how a model is called: its dropout is active, with masks drawn from ``key``.

    Attributes:
        key: int64 scalar; with a leading axis, one key a draw.
        rate: Probability of dropping, or ``None`` to keep the model's own rates.
        where: Which modules, see :func:`funcbayes._tree.matcher`; ``None`` for all.
        shared_mask: Whether all rows get one mask, so that a draw is one function.
        row_axes: Where the rows are at each place of dropout; found by :meth:`find_rows`.
    """

    key: Tensor
    rate: float | None = static(default=None)
    where: Where | None = static(default=None)
    shared_mask: bool = static(default=False)
    row_axes: RowAxes | None = static(default=None)

    def find_rows(self, fn: Callable[[Params, Any], Any], params: Params, x: Any) -> RowAxes | None:
        """Where the rows are at each place of dropout; ``None`` if masks are not shared.

        The axis of the rows is the one that grows when the model is given two rows instead of one, and
        what it holds of both tells in which order. This needs no assumption on the model: sequences
        may come first, heads may be folded into the rows.
        """
        if not self.shared_mask:
            return None
        first, second = two_rows(x)
        both = optree.tree_map(
            lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a, first, second
        )
        seen = [_dropped_values(fn, params, rows) for rows in (first, second, both)]
        if len({len(values) for values in seen}) > 1:
            raise ValueError(
                "`Dropout(shared_mask=True)` should find the same dropout whatever the rows are."
            )
        return tuple(row_axis(*values) for values in zip(*seen, strict=True))

    def at_rows(self, first_row: int, row_axes: RowAxes | None) -> "DropoutMasks":
        """Masks for the block of rows from ``first_row`` on: those of another block differ."""
        if row_axes is not None:
            return replace(self, row_axes=row_axes)
        return replace(self, key=fold(fold(self.key, "rows"), first_row)) if first_row else self


def with_dropout(
    fn: Callable[[Params, Any], Any], masks: Sequence[DropoutMasks], source: Folded | Prepared | None = None
) -> Callable[[Params, Any], Any]:
    """``fn`` with its dropout active; where several masks apply the first is used.

    Args:
        fn: Pure model.
        masks: Effects, unbatched (or batched by a surrounding ``vmap``).
        source: Gives masks that were made beforehand, or those of several draws (``Folded``), whose keys the
            effects then have: ``fn`` should treat rows one by one. Masks are not shared.

    Returns:
        A function of ``(params, x)``; with ``Folded`` masks, outputs have the rows of all draws. It raises
        ``ValueError`` if the model drops nothing, and ``TypeError`` if ``where`` is given for a model that
        has no modules.
    """

    def dropped(params: Params, x: Any) -> Any:
        locate = any(m.where is not None for m in masks)
        with calling(Call("stochastic", locate)) as call:
            outputs, mode = run_with_masks(fn, params, x, masks, call, source)
        if not mode.num_dropped:
            with calling(Call("stochastic", locate=True)) as call:  # again, to name the places
                _, mode = run_with_masks(fn, params, x, masks, call, source)
            raise ValueError(_nothing_dropped(fn, masks[0], mode))
        if source is not None:
            source.end()
        return outputs

    return dropped


def run_with_masks(
    fn: Callable[[Params, Any], Any],
    params: Params,
    x: Any,
    masks: Sequence[DropoutMasks],
    call: Call,
    source: Folded | Prepared | None = None,
) -> tuple[Any, "_DropoutMode"]:
    """Evaluate ``fn`` in the ambient ``call`` with dropout from ``masks``; also what was seen."""
    mode = _DropoutMode(masks, call, source)
    with mode:
        return fn(params, x), mode


def _nothing_dropped(fn: Any, masks: DropoutMasks, mode: "_DropoutMode") -> str:
    call = f"Dropout(rate={masks.rate}, where={masks.where!r})"
    name = getattr(fn, "name", None) or getattr(fn, "__name__", repr(fn))
    if not mode.seen:
        return (
            f"`{call}` should find dropout in the model, but `{name}` has none. "
            "Add `nn.Dropout` layers to it, or use another posterior."
        )
    rates = ", ".join(f"{path or 'a function call'} (rate {rate:g})" for path, rate in mode.seen)
    return (
        f"`{call}` drops nothing in `{name}`: its dropout is {rates}. "
        "Give a positive `rate`, or a `where` that matches one of these."
    )


class _DropoutMode(Interception):
    """Counts the places of dropout in the order of the calls and applies masks to those chosen."""

    def __init__(
        self,
        masks: Sequence[DropoutMasks],
        call: Call,
        source: Folded | Prepared | None = None,
        *,
        record: bool = False,
    ) -> None:
        super().__init__(_HANDLERS if call.kind != "training" else _TRAINING_HANDLERS)
        self.source = source
        self.record = record
        self.masks = masks
        self.chosen = [matcher(m.where) for m in masks]
        self.call = call
        self.seen: list[tuple[str, float]] = []
        self.values: list[Tensor] = []
        self.num_dropped = 0

    def keep(
        self, value: Tensor, rate: float, shape: Sequence[int], *, is_scaled: bool = True
    ) -> tuple[Tensor, float] | None:
        """Mask of ``shape`` that broadcasts to ``value``, 0 where it is dropped, and the rate used.

        ``None`` if this place is not chosen or its rate is 0. Where it is kept the mask is 1, or scaled
        ``1 / (1 - rate)``, so that the mean stays as it is.
        """
        site = len(self.seen)
        path = self.call.path[-1] if self.call.path else ""
        self.seen.append((path, float(rate)))
        if self.record:  # the part of the value that a mask of this shape would tell apart
            self.values.append(value[tuple(slice(0, size) for size in shape)])
        for masks, chosen in zip(self.masks, self.chosen, strict=True):
            if masks.where is not None and self.call.path is None:
                raise TypeError(
                    f"`Dropout(where={masks.where!r})` should be used with a model made by "
                    "`make_functional`; a plain function has no module paths. Leave `where` out."
                )
            if not chosen(path, None):
                continue
            used = float(rate if masks.rate is None else masks.rate)
            if used == 0.0:
                return None
            self.num_dropped += 1
            scale = 1 / (1 - used) if is_scaled and used < 1 else 1.0
            place = Place(site, tuple(shape), used, scale, value.dtype, value.device)
            return self._draw(masks, place), used
        return None

    def _draw(self, masks: DropoutMasks, place: Place) -> Tensor:
        if self.source is not None:
            with unintercepted():
                made = self.source.mask(masks.key, place)
            if made is not None:
                return made
        axis = masks.row_axes[place.site] if masks.row_axes is not None else None
        if axis is None:
            return _kept(masks.key, place)
        # One row's mask, repeated for the others.
        dim, per_row, is_together = axis
        shape = place.shape
        one_row = (*shape[:dim], per_row, *shape[dim + 1 :])
        mask = _kept(masks.key, place._replace(shape=one_row))
        rows = shape[dim] // per_row
        sizes = (rows, per_row) if is_together else (per_row, rows)
        mask = mask.unsqueeze(dim if is_together else dim + 1)
        return mask.expand(*shape[:dim], *sizes, *shape[dim + 1 :]).reshape(shape)


def _kept(key: Tensor, place: Place) -> Tensor:
    """The mask of a place, batched as its key is."""
    level = vmap_level()
    physical, axis = (key, None) if level is None else unwrap(key, level)
    with unintercepted(), outside_transforms() if is_concrete(physical) else nullcontext():
        # The keys of all draws at once: hashing them through vmap would cost more than the mask.
        keys = physical if axis is None else physical.movedim(axis, 0)
        kept = dropout_mask(keys, place)
    return kept if level is None or axis is None else wrap(kept, 0, level)


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, float]:
    value = args[0] if args else kwargs["input"]
    return value, args[1] if len(args) > 1 else kwargs.get("p", 0.5)


def _result(
    value: Tensor, new: Tensor, func: Callable[..., Any], args: Args, kwargs: dict[str, Any]
) -> Tensor:
    """``new``, which has also to be in ``value`` if the call was to work in place."""
    if new.ndim > value.ndim:  # the rows of all draws, in front; nothing else has hold of `value`
        return new.flatten(0, 1)
    in_place = func in _IN_PLACE or (args[3] if len(args) > 3 else kwargs.get("inplace", False))
    if not in_place or new is value:
        return new
    level = vmap_level()
    if level is not None and unwrap(value, level)[1] is None and unwrap(new, level)[1] is not None:
        # Without an axis of the draws it has no room for them: what holds it holds the new one instead.
        torch.utils.swap_tensors(value, new)
        return value
    return value.copy_(new)


def _scaled(value: Tensor, kept: tuple[Tensor, float] | None) -> Tensor:
    if kept is None:
        return value
    with unintercepted():
        return value * kept[0]


def _elementwise(mode, func, args, kwargs):  # noqa: ANN001, ANN202
    value, rate = _read(args, kwargs)
    return _result(value, _scaled(value, mode.keep(value, rate, value.shape)), func, args, kwargs)


def _by_channel(unbatched_ndim: int | None) -> Handler:
    """Whole channels are dropped: axis 1, or axis 0 of an input without rows."""

    def handler(mode, func, args, kwargs):  # noqa: ANN001, ANN202
        value, rate = _read(args, kwargs)
        dropped = _scaled(value, mode.keep(value, rate, _channel_shape(value, unbatched_ndim)))
        return _result(value, dropped, func, args, kwargs)

    return handler


def _channel_shape(value: Tensor, unbatched_ndim: int | None) -> tuple[int, ...]:
    leading = 1 if value.ndim == unbatched_ndim else 2
    return (*value.shape[:leading], *(1 for _ in value.shape[leading:]))


def _alpha(by_channel: bool) -> Handler:
    """Dropped units take SELU's floor, then mean 0 and variance 1 are restored.

    Klambauer et al. (2017), section 3: with floor ``c`` and keeping probability ``q``,
    ``a = (q + c^2 q (1 - q))^(-1/2)`` and ``b = -a (1 - q) c``.
    """

    def handler(mode, func, args, kwargs):  # noqa: ANN001, ANN202
        value, rate = _read(args, kwargs)
        shape = _channel_shape(value, None) if by_channel else value.shape
        kept = mode.keep(value, rate, shape, is_scaled=False)
        if kept is None:
            return value
        mask, rate = kept
        q = 1 - rate
        if q <= 0:
            return _result(value, value * mask, func, args, kwargs)
        a = (q + _SELU_FLOOR**2 * q * (1 - q)) ** -0.5
        dropped = a * (value * mask + _SELU_FLOOR * (1 - mask)) - a * (1 - q) * _SELU_FLOOR
        return _result(value, dropped, func, args, kwargs)

    return handler


def _multi_head(mode, func, args, kwargs):  # noqa: ANN001, ANN202
    """Whole where it drops nothing: there is a batching rule for that, which costs less than its parts."""
    return open_attention(mode, func, args, kwargs) if drops_weights(args, kwargs) else func(*args, **kwargs)


def _attention(mode, func, args, kwargs):  # noqa: ANN001, ANN202
    """Scaled dot-product attention with dropout of its weights, as torch documents it."""
    rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if not rate:
        return func(*args, **kwargs)
    weights, value = attention_weights(*args, **kwargs)
    return _scaled(weights, mode.keep(weights, rate, weights.shape)) @ value


def _recurrent(mode, func, args, kwargs):  # noqa: ANN001, ANN202
    """A stack of recurrent layers, one kernel call a layer, because dropout acts between them."""
    packed = not isinstance(args[3], bool)
    head, (hidden, weights, has_biases, depth, rate, train, bidirectional, *batch_first) = (
        (list(args[:2]), args[2:]) if packed else ([args[0]], args[1:])
    )
    if not rate or depth == 1:
        return func(*args, **kwargs)
    if packed and (mode.record or any(masks.shared_mask for masks in mode.masks)):
        raise ValueError(
            "`Dropout(shared_mask=True)` should find one axis of the rows wherever the model drops; packed "
            "sequences have none. Use one mask a row, or padded sequences."
        )
    is_lstm = isinstance(hidden, list | tuple)
    states = hidden if is_lstm else (hidden,)
    directions = 2 if bidirectional else 1
    per_layer = len(weights) // depth
    final: list[tuple[Tensor, ...]] = []
    for layer in range(depth):
        own = [s[layer * directions : (layer + 1) * directions] for s in states]
        own_weights = list(weights[layer * per_layer : (layer + 1) * per_layer])
        settings = (own_weights, has_biases, 1, 0.0, train, bidirectional, *batch_first)
        output, *last = func(*head, own if is_lstm else own[0], *settings)
        final.append(tuple(last))
        if layer < depth - 1:
            output = _scaled(output, mode.keep(output, rate, output.shape))
        head[0] = output
    return head[0], *(torch.cat(parts) for parts in zip(*final, strict=True))


def _note_statistics(mode, func, args, kwargs):  # noqa: ANN001, ANN202
    given = dict(zip(_NORM_ARGUMENTS[func], args, strict=False)) | kwargs
    running = [given.get("running_mean"), given.get("running_var")]
    if mode.call.batch_statistics:
        if not given.get(_NORM_ARGUMENTS[func][5], func is F.instance_norm):
            return func(*args, **kwargs)  # told not to look at the batch, it leaves them as they are
        # The first call forgets what was there; a layer that is called again averages over its calls.
        times = 1 + sum(noted is running[0] for noted in mode.call.statistics)
        args, kwargs = args[:6], {**kwargs, "momentum": 1 / times, "eps": given.get("eps", 1e-5)}
    mode.call.statistics += running
    return func(*args, **kwargs)


_HANDLERS: dict[Any, Handler] = {
    F.multi_head_attention_forward: _multi_head,
    **dict.fromkeys((F.dropout, torch.dropout, torch.dropout_), _elementwise),
    **dict.fromkeys((F.alpha_dropout, torch.alpha_dropout, torch.alpha_dropout_), _alpha(False)),
    **dict.fromkeys(
        (F.feature_alpha_dropout, torch.feature_alpha_dropout, torch.feature_alpha_dropout_), _alpha(True)
    ),
    F.dropout1d: _by_channel(2),
    F.dropout2d: _by_channel(None),
    F.dropout3d: _by_channel(4),
    **dict.fromkeys((torch.feature_dropout, torch.feature_dropout_), _by_channel(None)),
    F.scaled_dot_product_attention: _attention,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
}


_STATISTICS = ("input", "running_mean", "running_var", "weight", "bias")
_NORM_ARGUMENTS = {
    F.batch_norm: (*_STATISTICS, "training", "momentum", "eps"),
    F.instance_norm: (*_STATISTICS, "use_input_stats", "momentum", "eps"),
}
_TRAINING_HANDLERS = {**_HANDLERS, **dict.fromkeys(_NORM_ARGUMENTS, _note_statistics)}


def _dropped_values(fn: Callable[[Params, Any], Any], params: Params, x: Any) -> list[Tensor]:
    with torch.no_grad(), calling(Call("stochastic")) as call:
        mode = _DropoutMode((), call, record=True)
        with mode:
            fn(params, x)
    return mode.values
