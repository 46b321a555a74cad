"""Modules as pure functions ``fn(params, x)``."""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._functorch import storage_version
from ._intercept import Call, DropoutMasks, calling, current_call
from ._intercept._dropout import run_with_masks
from ._random import Seed, fold
from ._tree import Fixed, Params, merge

Model = Callable[[Params, Any], Any]


def make_functional(
    module: nn.Module, call: Callable[[nn.Module, Any], Any] | None = None
) -> tuple["FunctionalModule", dict[str, Tensor]]:
    """Split a module into a pure function and its parameters.

    The module is copied and never touched afterwards. Its buffers are frozen inside ``fn``; one
    that should vary is added to ``params`` by name, as ``Fixed(tensor)``.

    Args:
        module: Any module. It is evaluated in evaluation mode, whatever mode it is in.
        call: ``(module, x) -> outputs`` for a module that takes more than one tensor:
            ``lambda module, x: module(**x)``, say. To pickle ``fn`` it should be a named function.

    Returns:
        ``fn`` and ``params``, a flat dict of detached copies of the parameters by name.
        ``fn(params, x)`` may be called from several threads.

    Raises:
        TypeError: If ``module`` is not an ``nn.Module``.
        ValueError: If it has parameters without a shape yet (lazy layers).

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(torch.nn.Linear(3, 2))
        >>> sorted(params)
        ['bias', 'weight']
        >>> fn(params, torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"`make_functional(module)` should be given an nn.Module, got {type(module).__name__}. "
            "A function of (params, x) can be used as it is."
        )
    lazy = [
        name for name, p in module.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)
    ]
    if lazy:
        raise ValueError(
            f"`make_functional(module)` should be given a module whose parameters have shapes; {lazy[0]!r} "
            "is not initialised. Run the module once on a batch first."
        )
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    return FunctionalModule(module, call), params


class FunctionalModule:
    """A module as a function of ``(params, x)``, made by :func:`make_functional`.

    Attributes:
        name: Name of the module's class.
        buffers: The frozen buffers by name, detached copies.
    """

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any] | None) -> None:
        self.name = type(module).__name__
        self.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        self._call = call
        self._master = _without_values(module)
        # One module per evaluation under way: a module that is being run holds that run's parameters.
        # `list.pop` and `list.append` are atomic, which makes these pools safe among threads.
        self._idle: dict[str, list[_Skeleton]] = {"eval": [], "stochastic": [], "training": []}
        self._moved: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._names = frozenset(name for name, _ in module.named_parameters())
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def __repr__(self) -> str:
        return f"<fn of {self.name}>"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pools behind: they can be made again."""
        return {**self.__dict__, "_idle": {kind: [] for kind in self._idle}, "_moved": {}}

    def __call__(self, params: Mapping[str, Any], x: Any) -> Any:
        """Evaluate the module with ``params``, which may hold ``Fixed`` buffers too."""
        call = current_call()
        values = self._values(params)
        pool = self._idle[call.kind]
        try:
            skeleton = pool.pop()
        except IndexError:
            skeleton = _Skeleton(self._master, call.kind)
        try:
            outputs, changed = skeleton.run(self._call, values, x, call)
        finally:
            pool.append(skeleton)
        if call.kind == "training":
            call.buffers.append((params, changed))
        return outputs

    def _values(self, params: Mapping[str, Any]) -> dict[str, Tensor]:
        """Parameters and buffers by name, buffers where and as the parameters are."""
        if not isinstance(params, Mapping):
            raise TypeError(
                f"`fn(params, x)` of `{self.name}` should be given a dict of parameters, "
                f"got {type(params).__name__}."
            )
        given: dict[str, Tensor] = {}
        for name, value in params.items():
            if isinstance(value, Fixed):
                value = value.tensor
            elif name not in self._names:
                raise ValueError(
                    f"`fn(params, x)` of `{self.name}` has no parameter {name!r}."
                    + (" Pass a buffer as `fb.Fixed(tensor)`." if name in self.buffers else "")
                )
            given[name] = value
        for name in self._names:
            if name not in given:
                raise ValueError(f"`fn(params, x)` of `{self.name}` needs the parameter {name!r}.")
        for name in given:
            if name not in self._names and name not in self.buffers:
                raise ValueError(f"`fn(params, x)` of `{self.name}` has no buffer {name!r}.")
        return {**self._buffers_for(given), **given} if self.buffers else given

    def _buffers_for(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        lead = next((v for k, v in given.items() if k in self._names and v.is_floating_point()), None)
        if lead is None:
            return self.buffers
        key = (lead.device, lead.dtype)
        if key not in self._moved:
            with torch.inference_mode(False):  # these outlive the call, and may be part of a graph later
                self._moved[key] = {
                    name: b.to(lead.device, lead.dtype if b.dtype == self._dtype else b.dtype)
                    for name, b in self.buffers.items()
                }
        return self._moved[key]


def training_call(
    fn: Model, params: Params, x: Any, seed: Seed, *, dropout: bool = True
) -> tuple[Any, Params]:
    """Evaluate ``fn`` as in training: dropout active, BatchNorm with the statistics of the batch.

    Args:
        fn: Pure model; modules inside it, however wrapped, run in training mode.
        params: Its parameters. A buffer that training changes (BatchNorm's running statistics) is read
            from here if it is given as ``Fixed``. Under ``vmap`` it has to be, with a mapped axis.
        x: Batch of inputs.
        seed: The dropout masks are a function of it.
        dropout: Whether dropout is active.

    Returns:
        The outputs, and the new values of the buffers that changed, as ``Fixed``, in a tree that
        can be merged into ``params``. Nothing is changed in place.
    """
    key = seed if isinstance(seed, Tensor) else torch.tensor(seed)
    masks = (DropoutMasks(fold(key, "training")),) if dropout else ()
    with calling(Call("training")) as call:
        outputs, _ = run_with_masks(fn, params, x, masks, call)
    overlay: Any = {}
    for owner, changed in call.buffers:
        overlay = merge(overlay, _placed(params, owner, {k: Fixed(v.detach()) for k, v in changed.items()}))
    return outputs, overlay


def _placed(tree: Any, owner: Any, changed: dict[str, Fixed]) -> Any:
    """``changed`` at the place in ``tree`` where ``owner`` is: a user's ``fn`` may pass on a part of it."""
    if tree is owner or not changed:
        return changed
    if isinstance(tree, Mapping):
        for name, subtree in tree.items():
            if isinstance(subtree, Mapping) and (placed := _placed(subtree, owner, changed)) is not None:
                return {name: placed}
    return None


class _Skeleton:
    """A private copy of the module, without values of its own, set up for one kind of call."""

    def __init__(self, master: nn.Module, kind: str) -> None:
        # Placeholders have no storage, so a copy costs no memory.
        self.module = copy.deepcopy(master)
        self.kind = kind
        self.path: list[str] = []
        names = {id(v): k for k, v in (*self.module.named_parameters(), *self.module.named_buffers())}
        # Where each value goes: (dict of a submodule, key in it, name of the value). A tied
        # parameter has one name and several places.
        stores: list[dict[str, Any]] = [s for m in self.module.modules() for s in (m._parameters, m._buffers)]
        self.slots = [(s, key, names[id(v)]) for s in stores for key, v in s.items() if v is not None]
        self.placeholders = [(store, key, store[key]) for store, key, _ in self.slots]
        self.recurrent = [part for part in self.module.modules() if isinstance(part, nn.RNNBase)]
        self.writable = _names_of_writable_buffers(self.module, kind)
        # Kernels of normalisation write without counting it as a new version of the tensor.
        self.statistics = {
            f"{path}.{key}".lstrip(".")
            for path, part in self.module.named_modules()
            if isinstance(part, nn.modules.batchnorm._NormBase)
            for key in part._buffers
        }
        _set_modes(self.module, kind)
        if kind != "eval":
            for path, part in self.module.named_modules():
                part.register_forward_pre_hook(functools.partial(_enter, self.path, path))
                part.register_forward_hook(functools.partial(_leave, self.path), always_call=True)

    def run(
        self,
        call_module: Callable[[nn.Module, Any], Any] | None,
        values: Mapping[str, Tensor],
        x: Any,
        call: Call,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Evaluate with ``values`` in place; also, in training, the buffers that changed."""
        used = {**values, **{name: values[name].clone() for name in self.writable}}
        versions = {name: storage_version(used[name]) for name in self.writable}
        outer_path, call.path = call.path, None if self.kind == "eval" else self.path
        try:
            self._fill((store, key, used[name]) for store, key, name in self.slots)
            outputs = self.module(x) if call_module is None else call_module(self.module, x)
            if self.kind != "training":
                return outputs, {}
            after = {name: store[key] for store, key, name in self.slots if name in versions}
            return outputs, {
                name: value
                for name, value in after.items()
                if name in self.statistics
                or value is not used[name]
                or storage_version(value) > versions[name]
            }
        finally:
            self._fill(self.placeholders)
            self.path.clear()
            call.path = outer_path

    def _fill(self, slots: Iterable[tuple[dict[str, Any], str, Tensor]]) -> None:
        for store, key, value in slots:
            store[key] = value
        for part in self.recurrent:  # these keep their weights in a list of their own too
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]


def _enter(path: list[str], name: str, *_: Any) -> None:
    path.append(name)


def _leave(path: list[str], *_: Any) -> None:
    path.pop()


def _without_values(module: nn.Module) -> nn.Module:
    """Copy a module, with placeholders on the meta device for its parameters and buffers."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in part._parameters.values():
            if value is not None:
                memo[id(value)] = nn.Parameter(value.detach().to("meta"), requires_grad=False)
        for value in part._buffers.values():
            if value is not None:
                memo[id(value)] = value.detach().to("meta")
        for value in vars(part).values():
            # A tensor computed from parameters (by `weight_norm`, say) cannot be copied by Python.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach()
    return copy.deepcopy(module, memo)


def _names_of_writable_buffers(module: nn.Module, kind: str) -> list[str]:
    # torch's own modules write into buffers only in training; a module of the user's may do so always.
    own = {
        f"{path}.{key}".lstrip(".")
        for path, part in module.named_modules()
        if kind == "training" or not type(part).__module__.startswith("torch.nn.")
        for key in part._buffers
    }
    return [name for name, _ in module.named_buffers() if name in own]


_OWNS_A_RATE = re.compile(r"(^|_)(p|p_drop|drop\w*|\w*dropout\w*|\w*_drop|\w*_pdrop)$")


def _set_modes(module: nn.Module, kind: str) -> None:
    module.train(kind == "training")
    for part in module.modules():
        if kind == "eval" and isinstance(part, nn.MultiheadAttention):
            # In evaluation mode this would take a fused kernel that vmap cannot batch. Training mode
            # takes the mathematics; with no dropout they are equal.
            part.dropout = 0.0
            part.train(True)
        elif kind != "training" and isinstance(part, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            part.training = True  # for the same reason; their dropout is in modules of its own
        elif kind == "stochastic" and _owns_a_rate(part):
            # A model may hand its rate to a function only while `self.training`. Modules that own
            # a rate are told so; BatchNorm is not.
            part.training = True


def _owns_a_rate(part: nn.Module) -> bool:
    return any(
        isinstance(value, float) and 0 <= value <= 1 and _OWNS_A_RATE.search(name)
        for name, value in vars(part).items()
    )
