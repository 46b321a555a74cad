"""Watching a model's layers: what goes into each of them, and gradients of what comes out.

A layer is a call of one of torch's functions whose weight, or bias, *is* a leaf of the parameters: the very
object, so nothing has to be known of modules, and a function of the user's own is seen as well.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._functorch import physical, unwrap, vmap_level
from .._intercept import Unfused
from .._intercept._call import Interception

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_AFFINE = ("input", "running_mean", "running_var", "weight", "bias")

# The layers that are known: kind, names of the arguments in their order, number of spatial axes.
LAYERS: dict[Any, tuple[str, tuple[str, ...], int]] = {
    F.linear: ("linear", ("input", "weight", "bias"), 0),
    F.conv1d: ("convolution", _CONVOLUTION, 1),
    F.conv2d: ("convolution", _CONVOLUTION, 2),
    F.conv3d: ("convolution", _CONVOLUTION, 3),
    F.conv_transpose1d: ("transposed convolution", _TRANSPOSED, 1),
    F.conv_transpose2d: ("transposed convolution", _TRANSPOSED, 2),
    F.conv_transpose3d: ("transposed convolution", _TRANSPOSED, 3),
    F.embedding: ("embedding", ("input", "weight", "padding_idx", "max_norm"), 0),
    F.layer_norm: ("last axes", ("input", "normalized_shape", "weight", "bias", "eps"), 0),
    F.rms_norm: ("last axes", ("input", "normalized_shape", "weight", "eps"), 0),
    F.group_norm: ("channels", ("input", "num_groups", "weight", "bias", "eps"), 0),
    F.batch_norm: ("channels", (*_AFFINE, "training", "momentum", "eps"), 0),
    F.instance_norm: ("channels", (*_AFFINE, "use_input_stats", "momentum", "eps"), 0),
}


_RECTIFIERS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
# Max-pooling: the function that gives positions, too, and its number of spatial axes.
_POOLING: dict[Any, tuple[Callable[..., tuple[Tensor, Tensor]], int]] = {
    F.max_pool1d: (F.max_pool1d_with_indices, 1),
    F.max_pool2d: (F.max_pool2d_with_indices, 2),
    F.max_pool3d: (F.max_pool3d_with_indices, 3),
}


@dataclass(frozen=True)
class Pooled:
    """Max-pooling of a convolution's output, rectified before or not, which is used in no other way.

    Then the gradient of the output is zero but at the positions that were chosen.

    Attributes:
        edge: Where in the graph the pooled output ``(B, C, *sizes)`` is.
        positions: Which position of the output each of its numbers is, ``(B, C, *sizes)``.
        is_passed: Whether the rectifier passes a gradient on to it; ``None`` without a rectifier.
        num_positions: How many positions the output has.
    """

    edge: GradientEdge
    positions: Tensor
    is_passed: Tensor | None
    num_positions: int


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that has a chosen leaf as its weight or its bias.

    Attributes:
        kind: What the layer is, see ``LAYERS``.
        ndim: Number of its spatial axes.
        weight: Name of the leaf that is the weight; ``None`` if it is none of the chosen ones.
        bias: Likewise.
        value: What the weight is applied to, ``(M, ...)``, with an axis of members first: the input, and for
            layers that normalise the normalised input.
        edge: Where in the graph the output is.
        output_axis: Axis of the members in the output; ``None`` if there is none.
        output: A copy of the output ``(M, ...)``, if the tape keeps outputs.
        settings: Further arguments by name.
        weight_shape: Shape of the weight, of one member.
        pooled: What max-pooling makes of the output, if nothing else is made of it; for one network.
    """

    kind: str
    ndim: int
    weight: str | None
    bias: str | None
    value: Tensor
    edge: GradientEdge
    output_axis: int | None
    output: Tensor | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    weight_shape: torch.Size = torch.Size()
    pooled: Pooled | None = None

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the chosen leaves."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True)
class _Followed:
    """A tensor on the way from a convolution to max-pooling: kept, so that no other has its identity."""

    tensor: Tensor
    call: int
    is_rectified: bool
    is_used: bool = False


class Tape(Interception):
    """Writes down the calls of layers whose weight or bias is one of some leaves.

    Attention is opened, so that the linear maps inside are seen and every derivative exists. Leaves that
    go into anything else are written down, too: no number can tell of a use that does nothing at present.

    Args:
        names: Names of the chosen leaves, by the identity of the tensors that the model is given.
        keep_outputs: Whether to keep copies of the outputs.
    """

    def __init__(self, names: Mapping[int, str], *, keep_outputs: bool = False) -> None:
        pooling = {**dict.fromkeys(_RECTIFIERS, _rectify), **dict.fromkeys(_POOLING, _pool)}
        super().__init__({**Unfused().handlers, **dict.fromkeys(LAYERS, _note), **pooling})
        self.names, self.keep_outputs = names, keep_outputs
        self.calls: list[LayerCall] = []
        self.others: set[str] = set()
        self.followed: dict[int, _Followed] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Take note of what a function is given."""
        result = super().__torch_function__(func, types, args, kwargs)
        if self.followed and func not in _RECTIFIERS and func not in _POOLING:
            self.note_uses((*args, *(kwargs or {}).values()), result)
        if func not in LAYERS and func is not F.multi_head_attention_forward:
            self.note_others((*args, *(kwargs or {}).values()), result)
        return result

    def note_others(self, given: Iterable[Any], result: Any) -> None:
        """Write down the leaves among arguments of which a result is a differentiable function."""
        used = {self.names[id(value)] for value in flat(given) if id(value) in self.names}
        if used and _is_differentiable(result):
            self.others |= used

    def note_uses(self, given: Iterable[Any], result: Any) -> None:
        """Give up pooling where something else is made of what it is made of, or that is written into."""
        for value in flat(given):
            found = self.followed.get(id(value))
            if found is not None and (result is None or _is_differentiable(result)):
                self.let_go(found)

    def let_go(self, found: _Followed) -> None:
        """Forget that a convolution is pooled."""
        self.calls[found.call] = replace(self.calls[found.call], pooled=None)
        self.followed = {key: other for key, other in self.followed.items() if other.call != found.call}

    def follow(self, tensor: Tensor, call: int, *, is_rectified: bool) -> None:
        """See what becomes of a convolution's output."""
        self.followed[id(tensor)] = _Followed(tensor, call, is_rectified)

    def taken(self, tensor: Any) -> _Followed | None:
        """What is followed, if this is its first use."""
        found = self.followed.get(id(tensor))
        if found is not None and found.is_used:
            self.let_go(found)
            return None
        if found is not None:
            self.followed[id(tensor)] = replace(found, is_used=True)
        return found


def _is_differentiable(result: Any) -> bool:
    return any(isinstance(t, Tensor) and physical(t).requires_grad for t in flat([result]))


def flat(values: Iterable[Any]) -> Iterator[Any]:
    """What lists and tuples hold."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from flat(value)
        else:
            yield value


class RowsMixError(ValueError):
    """The outputs of a row depend on other rows."""


def _note(mode: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kind, names, ndim = LAYERS[func]
    given = dict(zip(names, args, strict=False)) | kwargs
    if func is F.batch_norm and (given.get("training") or given.get("running_mean") is None):
        raise RowsMixError(
            "BatchNorm normalises by the batch (training mode), so that the outputs of a row depend on the "
            "other rows, which have no curvature of their own then. Use running statistics: evaluation mode."
        )
    output = func(*args, **kwargs)
    weight, bias = (mode.names.get(id(given[key])) if given.get(key) is not None else None for key in _KEYS)
    if (weight is None and bias is None) or given.get("max_norm") is not None:
        return output
    mode.note_others((v for key, v in given.items() if key not in _KEYS), output)
    value = given["input"]
    if kind in ("last axes", "channels") and weight is not None:
        plain = {key: v for key, v in given.items() if key not in _KEYS}
        with torch.no_grad():
            value = func(**plain)
    level = vmap_level()
    whole, axis = (output, None) if level is None else unwrap(output, level)
    if not whole.requires_grad:  # the model keeps gradients away from here
        return output
    if whole._is_view():
        # Writing into a view (an activation in place) would give it another place in the graph.
        output = output.clone()
        whole, axis = (output, None) if level is None else unwrap(output, level)
    shape = given["weight"].shape if given.get("weight") is not None else torch.Size()
    mode.calls.append(
        LayerCall(
            kind,
            ndim,
            weight,
            bias,
            _members_first(value, level).detach(),
            get_gradient_edge(whole),
            axis,
            _members_first(output, level).detach().clone() if mode.keep_outputs else None,
            {key: v for key, v in given.items() if key not in ("input", "weight", "bias")},
            shape,
        )
    )
    if kind == "convolution" and level is None and output.ndim == ndim + 2:
        mode.follow(output, len(mode.calls) - 1, is_rectified=False)
    return output


def _rectify(mode: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = mode.taken(args[0] if args else kwargs.get("input"))
    output = func(*args, **kwargs)
    if found is not None:
        mode.follow(output, found.call, is_rectified=True)
    return output


def _pool(mode: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = mode.taken(args[0] if args else kwargs.get("input"))
    pool, ndim = _POOLING[func]
    if found is None or mode.calls[found.call].ndim != ndim:  # rows may be pooled as if they were channels
        return func(*args, **kwargs)
    output, positions = pool(*args, **kwargs)
    is_passed = output > 0 if found.is_rectified else None
    num_positions = found.tensor.shape[2:].numel()
    pooled = Pooled(get_gradient_edge(output), positions, is_passed, num_positions)
    mode.calls[found.call] = replace(mode.calls[found.call], pooled=pooled)
    return output


_KEYS = ("weight", "bias")


def _members_first(value: Tensor, level: int | None) -> Tensor:
    whole, axis = (value, None) if level is None else unwrap(value, level)
    return whole.unsqueeze(0) if axis is None else whole.movedim(axis, 0)
