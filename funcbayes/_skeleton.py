"""A private copy of a module that can be evaluated with any values, and is as before afterwards."""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._functorch import storage_version
from ._guard import Attributes, is_of_torch
from ._intercept import Call


class Skeleton:
    """A private copy of the module, without values of its own, set up for one kind of call."""

    def __init__(self, master: nn.Module, kind: str, *, locate: bool = False) -> None:
        # Placeholders have no storage, so a copy costs no memory.
        self.module = copy.deepcopy(master)
        self.kind = kind
        self.path: list[str] = []
        names = {id(v): k for k, v in (*self.module.named_parameters(), *self.module.named_buffers())}
        # Where each value goes: (dict of a submodule, key in it, name of the value). A tied
        # parameter has one name and several places.
        stores: list[dict[str, Any]] = [s for m in self.module.modules() for s in (m._parameters, m._buffers)]
        self.slots = [(s, key, names[id(v)]) for s in stores for key, v in s.items() if v is not None]
        # Recurrent layers keep their weights in a list of their own too; some may be computed of others.
        self.recurrent: list[tuple[nn.RNNBase, list[tuple[str, str | None]]]] = [
            (part, [(key, names.get(id(part._parameters.get(key)))) for key in part._flat_weights_names])
            for part in self.module.modules()
            if isinstance(part, nn.RNNBase)
        ]
        self.writable = _names_of_writable_buffers(self.module, kind)
        self.copied = [*self.writable, *_names_of_renormalised(self.module)]
        self.placeholders = {name: store[key] for store, key, name in self.slots}
        # What a module keeps of a call, it would give to the next: buffers set, attributes, caches.
        own = [part for part in self.module.modules() if not is_of_torch(part)]
        self.stores = [(part._buffers, dict(part._buffers)) for part in own]
        _set_modes(self.module, kind)
        self.attributes = Attributes(self.module)
        self.locate = locate
        if locate:
            for path, part in self.module.named_modules():
                part.register_forward_pre_hook(functools.partial(_enter, self.path, path))
                part.register_forward_hook(functools.partial(_leave, self.path), always_call=True)

    def run(
        self,
        call_module: Callable[[nn.Module, Any], Any],
        values: Mapping[str, Tensor],
        x: Any,
        call: Call,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Evaluate with ``values`` in place, where they stay; also, in training, the buffers that changed."""
        used = {**values, **{name: values[name].clone() for name in self.copied}} if self.copied else values
        versions = {name: storage_version(used[name]) for name in self.writable}
        outer_path, call.path = call.path, self.path if self.locate else None
        try:
            self._fill(used)
            outputs = self._called(call_module, x)
            if self.kind != "training":
                return outputs, {}
            after = {name: store[key] for store, key, name in self.slots if name in versions}
            return outputs, {
                name: value
                for name, value in after.items()
                if value is not used[name]
                or storage_version(value) > versions[name]
                or any(value is statistic for statistic in call.statistics)
            }
        finally:
            self._restore()
            call.path = outer_path

    def run_each(
        self,
        call_module: Callable[[nn.Module, Any], Any],
        values: Iterable[Mapping[str, Tensor]],
        inputs: Callable[[], Any],
        call: Call,
    ) -> list[Any]:
        """The outputs of :meth:`run` for several values, not in training, with fewer steps between two."""
        if self.copied or self.locate:
            return [self.run(call_module, own, inputs(), call)[0] for own in values]
        outputs, outer_path, call.path = [], call.path, None
        try:
            for own in values:
                self._fill(own)
                outputs.append(self._called(call_module, inputs()))
                self._restore()
        finally:
            self._restore()
            call.path = outer_path
        return outputs

    def _called(self, call_module: Callable[[nn.Module, Any], Any], x: Any) -> Any:
        try:
            return call_module(self.module, x)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            raise RuntimeError(_CHECKPOINTING) from error

    def _restore(self) -> None:
        """Forget what the modules remember of a call."""
        self.attributes.restore()
        for store, before in self.stores:
            if store or before:
                store.clear()
                store.update(before)
        self.path.clear()

    def empty(self) -> None:
        """Forget the values of the last run."""
        self._fill(self.placeholders)

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for store, key, name in self.slots:
            store[key] = values[name]
        for part, weights in self.recurrent:  # set past `__setattr__`, which takes longer than all the rest
            own = [values[name] if name else getattr(part, key) for key, name in weights]
            vars(part)["_flat_weights"] = own


def _enter(path: list[str], name: str, *_: Any) -> None:
    path.append(name)


def _leave(path: list[str], *_: Any) -> None:
    path.pop()


class _Absent(nn.Parameter):
    """A parameter between two evaluations, when there are no values to compute with."""

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "_Absent":
        """Make it without a gradient."""
        return super().__new__(cls, data, requires_grad)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN206
        """Say why it is met in a computation."""
        with torch._C.DisableTorchFunctionSubclass():
            if any(isinstance(arg, Tensor) and not arg.is_meta for arg in args):
                raise RuntimeError(_CHECKPOINTING)
            return func(*args, **(kwargs or {}))


_CHECKPOINTING = (
    "`fn(params, x)` should evaluate every part of its module before it returns. Here a part was evaluated "
    "again later, or could be, when the module holds no parameters, as `torch.utils.checkpoint` does in the "
    "backward pass. Switch gradient checkpointing off before `make_functional(model)`, as by "
    "`model.gradient_checkpointing_disable()`; smaller batches save memory, too."
)


def without_values(module: nn.Module) -> nn.Module:
    """Copy a module, with placeholders on the meta device for its parameters and buffers."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in part._parameters.values():
            if value is not None:
                memo[id(value)] = _Absent(value.detach().to("meta"))
        for value in part._buffers.values():
            if value is not None:
                memo[id(value)] = value.detach().to("meta")
        for value in vars(part).values():
            # Tensors computed from parameters (by `weight_norm`, say) cannot be copied by Python.
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, Tensor) and not entry.is_leaf:
                    memo[id(entry)] = entry.detach()
    return copy.deepcopy(module, memo)


def _names_of_writable_buffers(module: nn.Module, kind: str) -> list[str]:
    # torch's own modules write into buffers only in training; a module of the user's may do so always.
    own = {
        f"{path}.{key}".lstrip(".")
        for path, part in module.named_modules()
        if kind == "training" or not is_of_torch(part)
        for key in part._buffers
    }
    return [name for name, _ in module.named_buffers() if name in own]


def _names_of_renormalised(module: nn.Module) -> list[str]:
    """Parameters that torch's own modules write into: embeddings whose norm has a limit, where looked up."""
    kinds = nn.Embedding, nn.EmbeddingBag
    limited = {id(m.weight) for m in module.modules() if isinstance(m, kinds) and m.max_norm is not None}
    return [name for name, parameter in module.named_parameters() if id(parameter) in limited]


# Those that give any input back in evaluation, and where their rate is 0.
_DROPOUTS = (nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def _dropped_in_training(part: nn.Module, input: Tensor) -> Tensor:
    """What dropout gives; where that is the input, without a call that all modes would look at."""
    return type(part).forward(part, input) if part.training and part.p else input


_OWNS_A_RATE = re.compile(r"(^|_)(p|p_drop|drop\w*|\w*dropout\w*|\w*_drop|\w*_pdrop)$")


def _set_modes(module: nn.Module, kind: str) -> None:
    module.train(kind == "training")
    for part in module.modules():
        if kind != "stochastic" and type(part) in _DROPOUTS and "forward" not in vars(part):
            part.forward = functools.partial(_dropped_in_training, part)
        if isinstance(part, nn.TransformerEncoder):
            # Nested tensors leave zeros at padding, where the mathematics leave numbers.
            part.enable_nested_tensor = part.use_nested_tensor = False
        if kind == "eval" and isinstance(part, nn.MultiheadAttention):
            # In evaluation mode this would take a fused kernel that vmap cannot batch. Training mode
            # takes the mathematics; with no dropout they are equal.
            part.dropout = 0.0
            part.train(True)
        elif kind in ("eval", "stochastic") and isinstance(part, nn.TransformerEncoderLayer):
            part.training = True  # for the same reason; its dropout is in modules of its own
        elif kind == "stochastic" and _owns_a_rate(part):
            # A model may hand its rate to a function only while `self.training`. Modules that own
            # a rate are told so; BatchNorm is not.
            part.training = True


def _owns_a_rate(part: nn.Module) -> bool:
    return any(
        isinstance(value, float) and 0 <= value <= 1 and _OWNS_A_RATE.search(name)
        for name, value in vars(part).items()
    )
