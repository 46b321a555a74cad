"""Watching a model's layers: what goes into each of them, and gradients of what comes out.

A layer is a call of one of torch's functions whose weight, or bias, *is* a leaf of the parameters: the very
object, so nothing has to be known of modules, and a function of the user's own is seen as well.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the chosen leaves."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


class Tape(Interception):
    """Writes down the calls of layers whose weight or bias is one of some leaves.

    Attention is opened, so that the linear maps inside are seen and every derivative exists. Leaves that
    go into anything else are written down, too: no number can tell of a use that does nothing at present.

    Args:
        names: Names of the chosen leaves, by the identity of the tensors that the model is given.
        keep_outputs: Whether to keep copies of the outputs.
    """

    def __init__(self, names: Mapping[int, str], *, keep_outputs: bool = False) -> None:
        super().__init__({**Unfused().handlers, **dict.fromkeys(LAYERS, _note)})
        self.names, self.keep_outputs = names, keep_outputs
        self.calls: list[LayerCall] = []
        self.others: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Take note of what a function is given."""
        result = super().__torch_function__(func, types, args, kwargs)
        if func not in LAYERS and func is not F.multi_head_attention_forward:
            self.note_others((*args, *(kwargs or {}).values()), result)
        return result

    def note_others(self, given: Iterable[Any], result: Any) -> None:
        """Write down the leaves among arguments of which a result is a differentiable function."""
        used = {self.names[id(value)] for value in flat(given) if id(value) in self.names}
        if used and any(isinstance(t, Tensor) and physical(t).requires_grad for t in flat([result])):
            self.others |= used


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
    output = _normalised(given) if func is F.batch_norm and _is_plain(given) else func(*args, **kwargs)
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
    return output


_KEYS = ("weight", "bias")


def _is_plain(given: Mapping[str, Any]) -> bool:
    """Whether BatchNorm needs none of what torch's own does: a wider dtype inside, or to refuse its input."""
    value, mean = given["input"], given["running_mean"]
    is_wide = value.dtype == mean.dtype and value.dtype in (torch.float32, torch.float64)
    return is_wide and value.ndim >= 2 and value.shape[1:2] == mean.shape


def _normalised(given: Mapping[str, Any]) -> Tensor:
    """BatchNorm with running statistics, as a product and a sum.

    Gradients are products, too; for several columns those of torch's own function are copied twice.
    """
    value, mean, weight, bias = given["input"], given["running_mean"], *map(given.get, _KEYS)
    scale = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (-1, *(1 for _ in value.shape[2:]))
    return value * scale.reshape(shape) + shift.reshape(shape)


def _members_first(value: Tensor, level: int | None) -> Tensor:
    whole, axis = (value, None) if level is None else unwrap(value, level)
    return whole.unsqueeze(0) if axis is None else whole.movedim(axis, 0)
