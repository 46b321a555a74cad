"""The private names of functorch that the package needs, all of them, in one place."""

import contextlib
import functools
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]  # made in C++, without stubs
from torch._C._functorch import TransformType
from torch._functorch.vmap import lazy_load_decompositions
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from ._warning import first_line

_T = TypeVar("_T")
_R = TypeVar("_R")


def storage_version(tensor: Tensor) -> int:
    """How often the storage of ``tensor`` was written in place, seen through any transform."""
    return physical(tensor)._version


def physical(tensor: Tensor) -> Tensor:
    """The tensor that the transforms around it work on, with the axes that they map over."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def is_concrete(tensor: Tensor) -> bool:
    """Whether the numbers of ``tensor`` can be looked at: it is not inside a transform."""
    # Autograd maps over several gradients by a `vmap` of its own, of an older kind.
    is_wrapped = _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor)
    return not is_wrapped and tensor.device.type != "meta"


_writing = threading.local()


@contextlib.contextmanager
def taken_down() -> Iterator[None]:
    """What is done is taken down by a dispatch mode of ours, to be done again: as if no mode were on."""
    _writing.num_modes = 1
    try:
        yield
    finally:
        _writing.num_modes = 0


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Make something once, to be kept: of code that is transformed, or taken down, it is a constant."""
    is_watched = getattr(_writing, "num_modes", 0) > 0  # by us, for nobody else does then
    watching = sys.getprofile() if is_watched else None
    if is_watched:
        sys.setprofile(None)
    try:
        with torch.inference_mode(False), _disable_current_modes(), outside_transforms():
            yield
    finally:
        if is_watched:
            sys.setprofile(watching)


def _has_dispatch_modes() -> bool:
    """Whether a mode sees operations, other than one that takes them down."""
    return torch._C._len_torch_dispatch_stack() > getattr(_writing, "num_modes", 0)


def is_traced() -> bool:
    """Whether what runs is being written down as a program: numbers that are read would become part of it."""
    return getattr(_writing, "is_on", False) or torch.compiler.is_compiling()


def traced(function: Callable[..., list[Tensor]], inputs: Sequence[Tensor]) -> Callable[..., list[Tensor]]:
    """The operations of plain tensors that a function ends in, as a program."""
    from torch.fx.experimental.proxy_tensor import make_fx  # as slow to import as all of us

    _writing.is_on = True
    try:
        return make_fx(function)(*inputs)
    finally:
        _writing.is_on = False


def is_inside_transform() -> bool:
    """Whether the code that runs is being transformed by ``torch.func``."""
    return _functorch.maybe_current_level() is not None


def is_readable(tensor: Tensor) -> bool:
    """Whether its numbers may be looked at by Python: nothing writes down or changes what is done with it."""
    is_watched = is_traced() or torch._C._len_torch_dispatch_stack() > 0
    return type(tensor) is Tensor and not is_watched and is_concrete(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Whether operations on it are done as they are, and perhaps taken down: none writes or changes them."""
    return type(tensor) is Tensor and not is_traced() and not _has_dispatch_modes() and is_concrete(tensor)


def is_autocast_on() -> bool:
    """Whether autocast is on for some device."""
    return torch._C._is_any_autocast_enabled()


def has_modes() -> bool:
    """Whether gradients, a transform, autocast or a mode of torch's is on, each for one thread."""
    return torch.is_grad_enabled() or has_other_modes()


def has_other_modes() -> bool:
    """The same for all but gradients."""
    return (
        is_inside_transform()
        or forward_ad._current_level >= 0
        or is_traced()
        or is_autocast_on()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def may_write_over(tensors: Sequence[Tensor]) -> bool:
    """Whether what is computed of these may be written over: nothing watches, and no derivative needs it."""
    is_watched = is_traced() or is_autocast_on() or _has_dispatch_modes()
    has_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    has_tangents = forward_ad._current_level >= 0
    is_plain = all(map(is_concrete, tensors)) and len({t.dtype for t in tensors}) == 1
    return is_plain and not (is_watched or has_gradients or has_tangents)


class outside_transforms:  # noqa: N801  # used as a function is; a generator would take twice as long
    """Run functions of plain tensors without the transforms around them, which have nothing to do there."""

    def __enter__(self) -> None:
        self._stack = []
        while _functorch.peek_interpreter_stack() is not None:
            self._stack.append(_functorch.pop_dynamic_layer_stack())

    def __exit__(self, *_: Any) -> None:
        while self._stack:
            _functorch.push_dynamic_layer_stack(self._stack.pop())


def unintercepted() -> AbstractContextManager[None]:
    """Run functions without handing them to the function modes that are on: ours cost time, too."""
    return torch._C.DisableTorchFunction()


def vmap_level() -> int | None:
    """Level of the innermost transform if that is a ``vmap``, else ``None``."""
    if not is_inside_transform():
        return None
    interpreter = _functorch.peek_interpreter_stack()
    if interpreter is None or interpreter.key() != TransformType.Vmap:
        return None
    return interpreter.level()


def unwrap(tensor: Tensor, level: int) -> tuple[Tensor, int | None]:
    """The tensor that ``vmap`` at ``level`` works on and its mapped axis, ``None`` if it has none."""
    if _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level:
        return _functorch.get_unwrapped(tensor), _functorch.maybe_get_bdim(tensor)
    return tensor, None


def unwrap_change(tensor: Tensor) -> tuple[Tensor, int | None]:
    """As :func:`unwrap` at the innermost ``vmap``, and inside ``jvp`` of the tangent, if there is one."""
    if not is_inside_transform():
        return tensor, None
    if _functorch.peek_interpreter_stack().key() == TransformType.Jvp:
        primal, tangent = torch._VF._unpack_dual(tensor, level=0)  # type: ignore[attr-defined]  # as above
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    level = _functorch.maybe_get_level(tensor)
    return (tensor, None) if level is None else unwrap(tensor, level)


@contextlib.contextmanager
def quiet_fallbacks() -> Iterator[None]:
    """Nothing is said of operations that ``vmap`` has no rule for: it loops, and so would we."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def map_first_axis(function: Callable[[_T], _R], tree: _T, size: int) -> _R:
    """``torch.func.vmap`` over the first axis of every leaf, without the cost of what it is general in.

    Args:
        function: Gives a tensor, or a tree of tensors, for one entry of the axis.
        tree: Leaves are tensors ``(size, ...)``.
        size: Length of the axis.

    Returns:
        Results with the mapped axis first.
    """
    lazy_load_decompositions()
    whole: Any = tree
    leaves, structure = optree.tree_flatten(whole)
    level = _functorch._vmap_increment_nesting(size, "error")
    try:
        entry: Any = structure.unflatten([_functorch._add_batch_dim(leaf, 0, level) for leaf in leaves])
        found: Any = function(entry)
        if isinstance(found, Tensor):
            return _functorch._remove_batch_dim(found, level, size, 0)
        whole: Any = optree.tree_map(lambda leaf: _functorch._remove_batch_dim(leaf, level, size, 0), found)
        return whole
    finally:
        _functorch._vmap_decrement_nesting()


_forward_mode = threading.RLock()


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """``torch.func.jvp``, one thread at a time: the levels of forward mode belong to the process."""
    with _forward_mode:
        try:
            return torch.func.jvp(function, primals, tangents)
        except NotImplementedError as error:
            raise NotImplementedError(
                "The model is linearised here by derivatives forwards, which one of its operations does not "
                "have. `funcbayes.predict_linearized`, posteriors with `linearized=False`, and curvatures as "
                f"'diag', 'kron' or 'full' do without them. Torch says: {first_line(error)}"
            ) from error


def wrap(tensor: Tensor, axis: int, level: int) -> Tensor:
    """Undo :func:`unwrap`."""
    return _functorch._add_batch_dim(tensor, axis, level)


@functools.cache
def load_forward_rules() -> None:
    """Let torch load what forward-mode derivatives need, once, without a warning meant for its authors."""
    if os.environ.get("PYTORCH_JIT", "1") != "1" or not __debug__:
        return  # then torch does not load them either
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
