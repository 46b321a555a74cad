"""Modules as pure functions ``fn(params, x)``."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._functorch import is_inside_transform
from ._guard import Inputs, may_write_inputs
from ._intercept import Call, DropoutMasks, calling, current_call
from ._intercept._dropout import run_with_masks
from ._random import Seed
from ._row_wise import is_row_wise
from ._skeleton import Skeleton, without_values
from ._tree import MISSING, Fixed, Params, is_missing, merge

Model = Callable[[Params, Any], Any]


def make_functional(
    module: nn.Module, call: Callable[[nn.Module, Any], Any] | None = None
) -> tuple["FunctionalModule", dict[str, Tensor]]:
    """Split a module into a pure function and its parameters.

    The module is copied and never touched afterwards. Its buffers are frozen inside ``fn``; one
    that should vary is added to ``params`` by name, as ``Fixed(tensor)``.

    Args:
        module: Any module. It is evaluated in evaluation mode, whatever mode it is in. Of one that
            ``torch.compile`` or parallel training has wrapped, the module inside is taken.
        call: ``(module, x) -> outputs`` for a module that takes more than one tensor:
            ``lambda module, x: module(**x)``, say. To pickle ``fn`` it should be a named function.

    Returns:
        ``fn`` and ``params``, a flat dict of detached copies of the parameters by name.
        ``fn(params, x)`` may be called from several threads, each of which runs a copy of the module.

    Raises:
        TypeError: If ``module`` is not an ``nn.Module``, or if ``torch.jit`` has compiled it.
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
    module = unwrapped(module)
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise TypeError(
            "`make_functional(module)` should be given a module whose parameters can be replaced, got one "
            "that `torch.jit` has compiled, or a part of one. Use the module that it was made of."
        )
    lazy = [
        name for name, p in (*module.named_parameters(), *module.named_buffers()) if nn.parameter.is_lazy(p)
    ]
    if lazy:
        raise ValueError(
            f"`make_functional(module)` should be given a module whose parameters have shapes; {lazy[0]!r} "
            "is not initialised. Run the module once on a batch first."
        )
    with torch.inference_mode(False):  # copies that a graph can hold, wherever they are made
        params = {name: p.detach().clone() for name, p in module.named_parameters()}
        return FunctionalModule(module, call), params


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what parallel training or ``torch.compile`` put around it."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


class FunctionalModule:
    """A module as a function of ``(params, x)``, made by :func:`make_functional`.

    Attributes:
        name: Name of the module's class.
        buffers: The frozen buffers by name, detached copies.
        is_row_wise: Whether it is known to treat the rows of its input, a tensor, one by one.
    """

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Any] | None) -> None:
        self.name = type(module).__name__
        self.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        self.is_row_wise = call is None and is_row_wise(module)
        self._call = call
        self._master = without_values(module)
        # One module per evaluation under way: a module that is being run holds that run's parameters.
        # `list.pop` and `list.append` are atomic, which makes these pools safe among threads.
        self._idle: defaultdict[tuple[str, bool], list[Skeleton]] = defaultdict(list)
        self._may_write_inputs = call is not None or may_write_inputs(module)
        self._moved: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        self._names = frozenset(name for name, _ in module.named_parameters())
        self._dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def __repr__(self) -> str:
        return f"<fn of {self.name}>"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pools behind: they can be made again."""
        return {**self.__dict__, "_idle": defaultdict(list), "_moved": {}}

    def __call__(self, params: Mapping[str, Any], x: Any) -> Any:
        """Evaluate the module with ``params``, which may hold ``Fixed`` buffers too."""
        call = current_call()
        values = self._values(params)
        for owner, changed in call.buffers:  # of an earlier call of the same model in one evaluation
            if owner is params:
                values = {**values, **changed}
        # Fused kernels of attention are for plain evaluation: no transform can see inside.
        kind = "plain" if call.kind == "eval" and not is_inside_transform() else call.kind
        pool = self._idle[kind, call.locate]
        skeleton = self._taken_from(pool, kind, call)
        try:
            own = Inputs(x).copied() if self._may_write_inputs else x
            outputs, changed = skeleton.run(self._call or _call_module, values, own, call)
        finally:
            skeleton.empty()
            pool.append(skeleton)
        if call.kind == "training":
            call.buffers.append((params, changed))
        return outputs

    def in_turn(self, draws: Sequence[Mapping[str, Any]], x: Any) -> list[Any]:
        """``[fn(params, x) for params in draws]``, for draws that differ in values only, in fewer steps.

        What a module computes leaves nothing of Python in the processor's caches, so that a step between two
        draws takes several times as long as it would otherwise.
        """
        call = current_call()
        if call.kind != "eval" or is_inside_transform():
            return [self(params, x) for params in draws]
        is_plain = isinstance(draws[0], Mapping) and self._is_plain(draws[0])
        buffers = self._buffers_for(draws[0]) if is_plain else {}
        if not is_plain:
            values = map(self._values, draws)
        else:
            values = ({**buffers, **params} for params in draws) if buffers else draws
        inputs = Inputs(x).copied if self._may_write_inputs else lambda: x
        pool = self._idle["plain", call.locate]
        skeleton = self._taken_from(pool, "plain", call)
        try:
            return skeleton.run_each(self._call or _call_module, values, inputs, call)
        finally:
            skeleton.empty()
            pool.append(skeleton)

    def _taken_from(self, pool: list[Skeleton], kind: str, call: Call) -> Skeleton:
        try:
            return pool.pop()
        except IndexError:
            return Skeleton(self._master, kind, locate=call.locate)

    def held(self) -> tuple[nn.Module, Callable[[nn.Module, Any], Any] | None]:
        """What an evaluation goes by: the module, a copy that only this has, and the call."""
        return self._master, self._call

    def values_of(self, module: nn.Module) -> dict[str, Any]:
        """Parameters of a module of this kind, and its buffers as ``Fixed``: what evaluates it as it is now.

        Args:
            module: A module of the architecture that ``fn`` was made of.

        Returns:
            Detached tensors that share memory with the module's.
        """
        buffers = {name: Fixed(b.detach()) for name, b in module.named_buffers()}
        return {**{name: p.detach() for name, p in module.named_parameters()}, **buffers}

    def _values(self, params: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Parameters and buffers by name, buffers where and as the parameters are."""
        if not isinstance(params, Mapping):
            raise TypeError(
                f"`fn(params, x)` of `{self.name}` should be given a dict of parameters, "
                f"got {type(params).__name__}."
            )
        given: Mapping[str, Tensor] = params if self._is_plain(params) else self._checked(params)
        return {**self._buffers_for(given), **given} if self.buffers else given

    def _is_plain(self, params: Mapping[str, Any]) -> bool:
        """Whether these are the parameters and nothing else."""
        return params.keys() == self._names and Fixed not in set(map(type, params.values()))

    def _checked(self, params: Mapping[str, Any]) -> dict[str, Tensor]:
        """Values by name, ``Fixed`` ones unpacked; every parameter, and nothing that is not known."""
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
        for name in sorted(self._names):
            if name not in given:
                raise ValueError(f"`fn(params, x)` of `{self.name}` needs the parameter {name!r}.")
        for name in given:
            if name not in self._names and name not in self.buffers:
                raise ValueError(f"`fn(params, x)` of `{self.name}` has no buffer {name!r}.")
        return given

    def _buffers_for(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        lead = next((v for k, v in given.items() if k in self._names and v.is_floating_point()), None)
        if lead is None:
            return self.buffers
        key = (lead.device, lead.dtype)
        if key in self._moved:
            return self._moved[key]
        with torch.inference_mode(False):  # these outlive the call, and may be part of a graph later
            moved = {
                name: b.to(lead.device, lead.dtype if b.dtype == self._dtype else b.dtype)
                for name, b in self.buffers.items()
            }
        if not is_inside_transform():
            self._moved[key] = moved
        return moved


def _call_module(module: nn.Module, x: Any) -> Any:
    return module(x)


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

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(
        ...     torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5))
        ... )
        >>> outputs, statistics = fb.training_call(fn, params, torch.ones(4, 3), seed=0)
        >>> sorted(statistics)
        ['0.num_batches_tracked', '0.running_mean', '0.running_var']
        >>> updated = {**params, **statistics}
    """
    masks = (DropoutMasks(torch.as_tensor(seed)),) if dropout else ()
    with calling(Call("training")) as call:
        outputs, _ = run_with_masks(fn, params, x, masks, call)
    return outputs, _changes(params, call.buffers)


def batch_statistics(fn: Model, params: Params, x: Any) -> Params:
    """Find what normalisation layers see of one batch, as in training without dropout.

    Args:
        fn: Pure model.
        params: As in :func:`training_call`.
        x: Batch of inputs.

    Returns:
        The running statistics, as ``Fixed``, as if this batch were all they are to remember, and the layers'
        counts of batches; in a tree that can be merged into ``params``.
    """
    with calling(Call("training", batch_statistics=True)) as call:
        run_with_masks(fn, params, x, (), call)
    noted = {id(value) for value in call.statistics}
    found = []
    for owner, changed in call.buffers:
        running = {name for name, value in changed.items() if id(value) in noted}
        counts = {f"{name.rpartition('.')[0]}.num_batches_tracked".lstrip(".") for name in running}
        found.append((owner, {k: v for k, v in changed.items() if k in running | counts}))
    return _changes(params, found)


def _changes(params: Params, buffers: Sequence[tuple[Any, Mapping[str, Tensor]]]) -> Params:
    """New values of buffers, as ``Fixed``, where they belong in ``params``."""
    overlay: Any = MISSING
    for owner, changed in buffers:
        overlay = merge(overlay, _placed(params, owner, {k: Fixed(v.detach()) for k, v in changed.items()}))
    return {} if is_missing(overlay) else overlay


def _placed(tree: Params, owner: Mapping[str, Any], changed: dict[str, Fixed]) -> Params:
    """``changed`` at the place in ``tree`` where ``owner`` is: a user's ``fn`` may pass on a part of it."""
    if not changed:
        return MISSING
    same_keys = set(owner) - set(changed)  # for a function that passes on a dict of its own making
    for is_owner in (
        lambda node: node is owner,
        lambda node: isinstance(node, Mapping) and same_keys <= set(node),
    ):
        placed = _at(tree, is_owner, changed)
        if not is_missing(placed):
            return placed
    raise ValueError(
        "`training_call(fn, params, ...)` cannot tell where in `params` the new value of "
        f"{next(iter(changed))!r} belongs. Pass `fn` a dict that is a part of `params`."
    )


def _at(tree: Any, is_owner: Callable[[Any], bool], changed: dict[str, Fixed]) -> Any:
    """A tree that holds ``changed`` where ``is_owner`` is first true, and is missing elsewhere."""
    if is_owner(tree):
        return changed
    if isinstance(tree, Mapping):
        for name, part in tree.items():
            if not is_missing(placed := _at(part, is_owner, changed)):
                return {name: placed}
    elif isinstance(tree, list | tuple):
        for i, part in enumerate(tree):
            if not is_missing(placed := _at(part, is_owner, changed)):
                return type(tree)(placed if k == i else MISSING for k in range(len(tree)))
    return MISSING
