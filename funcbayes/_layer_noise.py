"""Noise of weights as noise of what layers give: local reparameterisation and Flipout, for any pure model.

A layer is found as curvature finds it: a call of one of torch's functions whose weight, or bias, *is* a leaf
of the parameters. Leaves that are used in any other way, or more than once, are drawn. Where layers are is
found out with a row or two in evaluation mode; that each of them is called just once is seen every time.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._functional import Model
from ._functorch import is_concrete, outside_transforms, unintercepted, unwrap, vmap_level, wrap
from ._intercept import Unfused
from ._intercept._call import Interception
from ._jacobian._plan import plan_for
from ._jacobian._tape import LAYERS, flat
from ._random import fold, normal, uniform
from ._tree import Params, map_leaves, named_leaves

_KINDS = ("linear", "convolution", "transposed convolution")
_LAYERS = {func: layer for func, layer in LAYERS.items() if layer[0] in _KINDS}
# Gives what a layer gives with noise: (mode, func, arguments by name, names of the leaves that are its weight
# and its bias, of which there is at least one)
NoisyLayer = Callable[[Any, Callable[..., Any], dict[str, Any], tuple[str | None, str | None]], Any]


def leaves_of_layers(fn: Model, params: Params, names: list[str], x: Any, *, rows_first: bool) -> set[str]:
    """Leaves that are nothing but the weight or bias of one linear or convolution layer.

    Args:
        fn: Pure model.
        params: All of its parameters.
        names: The leaves in question.
        x: Inputs.
        rows_first: Whether only layers count whose output has one entry of its first axis for each row.
    """
    params, x = map_leaves(_concrete, params), map_leaves(_concrete, x)
    try:
        with outside_transforms():  # where layers are does not depend on what is mapped or differentiated
            plan = plan_for(fn, params, names, x, "vi", tells=False)
    except Exception:  # one or two rows may not suit the model: every leaf is drawn
        return set()
    found: set[str] = set()
    for leaves, rows, (kind, _, _) in zip(plan.layers, plan.rows, plan.calls, strict=False):
        if kind in _KINDS and (not rows_first or rows == (0, 1, True)):
            found.update(leaves)
    return found


def _concrete(leaf: Any) -> Any:
    """A tensor that can be looked at; inside a transform another one of the same shape."""
    if not isinstance(leaf, Tensor) or is_concrete(leaf):
        return leaf
    with outside_transforms():
        zeros = torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
        return zeros + uniform(0, leaf.shape).to(zeros) - 0.5 if leaf.is_floating_point() else zeros


class LayerNoise(Interception):
    """Calls of some layers get noise of their own.

    Args:
        names: Of leaves, by the identity of the tensors that the model is given.
        keys: Of the noise of each leaf's layer, int64 scalars, of one draw.
    """

    def __init__(self, names: Mapping[int, str], keys: Mapping[str, Tensor], layer: NoisyLayer) -> None:
        def handler(
            mode: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            given = dict(zip(_LAYERS[func][1], args, strict=False)) | kwargs
            leaves = mode.leaves(given)
            return layer(mode, func, given, leaves) if any(leaves) else func(*args, **kwargs)

        attention = Unfused().handlers[F.multi_head_attention_forward]  # so that what is inside is seen
        super().__init__({F.multi_head_attention_forward: attention, **dict.fromkeys(_LAYERS, handler)})
        self.names, self.keys = names, keys
        self._calls: Counter[str] = Counter()
        self._others: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Take note of leaves that other functions make tensors of."""
        result = super().__torch_function__(func, types, args, kwargs)
        if func not in self.handlers:
            used = {self.names[id(t)] for t in flat((*args, *(kwargs or {}).values())) if id(t) in self.names}
            if used and any(isinstance(t, Tensor) for t in flat([result])):
                self._others |= used
        return result

    def leaves(self, given: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """Names of the weight and the bias of a call, of those that are chosen."""
        weight, bias = (
            self.names.get(id(given[key])) if key in given else None for key in ("weight", "bias")
        )
        self._calls.update(name for name in (weight, bias) if name is not None)
        others = (value for key, value in given.items() if key not in ("weight", "bias"))
        self._others.update(self.names[id(value)] for value in others if id(value) in self.names)
        return weight, bias

    def refuse(self, *names: str | None) -> None:
        """Take note of leaves of a call that noise of this kind is not for."""
        self._others.update(name for name in names if name is not None)

    def misused(self) -> set[str]:
        """Leaves that were not used just once, by a layer: their noise was not that of one draw."""
        return self._others | {name for name in self.names.values() if self._calls[name] != 1}


class LocalNoise(LayerNoise):
    """Pre-activations are drawn instead of weights, Kingma, Salimans & Welling (2015), section 2.2.

    A layer gives ``N(W x + b, W2 x^2 + b2)`` with the variances ``W2`` and ``b2`` of its weights, independent
    between rows and positions.

    Args:
        names: Of leaves, by the identity of the means that the model is given.
        variance: By name.
        keys: Of the noise, by name.
    """

    def __init__(
        self, names: Mapping[int, str], variance: Mapping[str, Tensor], keys: Mapping[str, Tensor]
    ) -> None:
        super().__init__(names, keys, _locally)
        self.variance = variance


def _locally(
    mode: LocalNoise,
    func: Callable[..., Any],
    given: dict[str, Any],
    leaves: tuple[str | None, str | None],
) -> Any:
    kind, _, ndim = _LAYERS[func]
    value, weights = given.pop("input"), (given.pop("weight"), given.pop("bias", None))
    spread, bias_spread = (mode.variance[name] if name else None for name in leaves)
    spreads = spread, bias_spread
    key = mode.keys[first(leaves)]
    of = functools.partial(moments, functools.partial(func, **given), weights, spreads, ndim)
    level = vmap_level()
    keys, axis = (key, None) if level is None else unwrap(key, level)
    if level is None or axis is None or any(_is_mapped(t, level) for t in (*weights, *spreads)):
        mean, std = of(value)
        return torch.addcmul(mean, std, noise(key, mean.shape, mean))
    # All draws have the same weights, and so are nothing but more rows.
    keys = keys.movedim(axis, 0)
    value, axis = unwrap(value, level)
    if axis is None:
        mean, std = of(value)
        return wrap(torch.addcmul(mean, std, noise(keys, mean.shape, mean)), 0, level)
    value = value.movedim(axis, 0)
    if kind == "linear" or value.ndim < ndim + 3:
        mean, std = of(value)
    else:
        mean, std = (t.unflatten(0, value.shape[:2]) for t in of(value.flatten(0, 1)))
    return wrap(torch.addcmul(mean, std, noise(keys, mean.shape[1:], mean)), 0, level)


def moments(
    layer: Callable[..., Tensor],
    weights: tuple[Tensor, Tensor | None],
    spreads: tuple[Tensor | None, Tensor | None],
    ndim: int,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a layer gives, for weights with these means and variances."""
    mean = layer(value, *weights)
    return mean, deviation_of(layer, spreads, ndim, value, mean)


def deviation_of(
    layer: Callable[..., Tensor],
    spreads: tuple[Tensor | None, Tensor | None],
    ndim: int,
    value: Tensor,
    mean: Tensor,
) -> Tensor:
    """Standard deviation of what a layer gives, in the shape of its mean; its gradient is finite at zero."""
    spread, bias_spread = spreads
    if spread is not None:
        variance = layer(value.square(), spread, bias_spread)
    else:
        assert bias_spread is not None
        variance = bias_spread.reshape(-1, *(1,) * ndim).expand(mean.shape)
    return variance.clamp_min(max(1e-30, torch.finfo(variance.dtype).tiny)).sqrt()


def first(leaves: tuple[str | None, str | None]) -> str:
    """The leaf whose key and signs a layer uses."""
    return next(name for name in leaves if name is not None)


def _is_mapped(value: Tensor | None, level: int) -> bool:
    return value is not None and unwrap(value, level)[1] is not None


def noise(key: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard normals of one layer, ``(*k, *shape)`` for keys ``k``."""
    with unintercepted():
        return normal(key, shape, dtype=like.dtype, device=like.device)


class FlippedNoise(LayerNoise):
    """One deviation of the weights for all rows, with signs of each row's own: Wen et al. (2018), eq. 4.

    ``W x + r * (D (s * x))`` with signs ``r``, ``s`` of outputs and inputs, the same at all positions of a
    row: ``D * r s^T`` has the distribution of ``D`` where that is independent and symmetric, entry by entry.

    Args:
        names: Of leaves, by the identity of the means that the model is given.
        deviations: ``D`` by name, of one draw.
        keys: Of the signs, by name.
    """

    def __init__(
        self, names: Mapping[int, str], deviations: Mapping[str, Tensor], keys: Mapping[str, Tensor]
    ) -> None:
        super().__init__(names, keys, _flipped)
        self.deviations = deviations

    def signs(self, name: str, side: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Independent signs."""
        numbers = uniform(fold(self.keys[name], side), shape, device=like.device)
        return (numbers < 0.5).to(like.dtype) * 2 - 1


def _flipped(
    mode: FlippedNoise,
    func: Callable[..., Any],
    given: dict[str, Any],
    leaves: tuple[str | None, str | None],
) -> Any:
    kind, _, ndim = _LAYERS[func]
    value, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    deviation, bias_deviation = (mode.deviations[name] if name else None for name in leaves)
    mean = func(value, weight, bias, **given)
    name = first(leaves)

    def shape(of: Tensor) -> tuple[int, ...]:
        if kind == "linear":
            return (of.shape[0], *(1 for _ in of.shape[1:-1]), of.shape[-1])
        return (*of.shape[:2], *(1 for _ in of.shape[2:]))

    outputs = mode.signs(name, "outputs", shape(mean), mean)
    if deviation is None:
        assert bias_deviation is not None
        return mean + outputs * bias_deviation.reshape(-1, *(1,) * ndim)
    inputs = mode.signs(name, "inputs", shape(value), mean)
    return torch.addcmul(mean, outputs, func(value * inputs, deviation, bias_deviation, **given))


def names_by_identity(tree: Params, names: frozenset[str]) -> dict[int, str]:
    """Names of some leaves of a tree by the identity of the tensors."""
    return {id(leaf): name for name, leaf in named_leaves(tree).items() if name in names}
