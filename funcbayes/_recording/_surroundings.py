"""What Python code depends on beside its arguments, found by watching it run.

What a model computes may be done again without its Python code only if that would do the same again. Torch's
own code is known to: layers go by their arguments, and by attributes of modules that are private copies here.
Of code of others all that runs is read: which globals it takes, and what it calls. What is not known to be
harmless is refused.
"""

import builtins
import dis
import functools
import gc
import inspect
import math
import operator
import os
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FrameType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._contextlib import _DecoratorContextManager

_MISSING = object()
_TRUSTED = frozenset(("torch", "funcbayes", "optree"))
# Modules of torch whose functions a model may call: others may keep something, or change what is set.
_OF_TORCH = (
    *("torch.nn.", "torch.functional", "torch._tensor", "torch._jit_internal", "torch.overrides"),
    *("torch.amp.", "torch.autograd.grad_mode", "torch.utils._contextlib", "torch._ops", "torch._library"),
)
_OF_TENSORS = frozenset(
    ("torch._C._nn", "torch._C._fft", "torch._C._linalg", "torch._C._special", "_operator", "math")
)
# How numbers become Python's, or a part of a new tensor, without an operation that is seen, as `item` is.
_READ = frozenset(
    (
        *("tolist", "numpy", "tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor"),
        *("from_numpy", "frombuffer", "tensor_split"),
    )
)
_UNKNOWN = _READ.union(
    ("__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "storage_offset", "new")
)
# A hook may be called in another thread.
_HOOKING = frozenset(("register_hook", "register_post_accumulate_grad_hook"))
_BUILTINS = frozenset(
    (
        *("abs", "all", "any", "callable", "divmod", "getattr", "hasattr", "isinstance", "issubclass"),
        *("iter", "len", "max", "min", "next", "pow", "repr", "round", "sorted", "sum"),
    )
)
_CHANGING = frozenset(
    ("append", "extend", "insert", "pop", "popitem", "remove", "clear", "update", "setdefault", "add")
)
_BUILDING = frozenset(("BUILD_LIST", "BUILD_MAP", "BUILD_SET", "BUILD_CONST_KEY_MAP"))
_REFUSED = frozenset(
    (
        *("STORE_GLOBAL", "DELETE_GLOBAL", "STORE_NAME", "DELETE_NAME", "LOAD_NAME", "STORE_ATTR"),
        *("DELETE_ATTR", "IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR", "LOAD_BUILD_CLASS", "GET_AWAITABLE"),
    )
)


@dataclass(frozen=True)
class Surroundings:
    """What code took from elsewhere, with the values of then.

    Attributes:
        names: Globals: where, the name, and the value.
        cells: Variables of functions around, and their values.
        classes: Classes, and what was in them.
        functions: Functions, and what is put in place of these without another function.
        has_tensors: Whether there are tensors among them, whose numbers others may change.
        dtype: What tensors are made in where nothing else is said.
    """

    names: tuple[tuple[dict[str, Any], str, Any], ...]
    cells: tuple[tuple[CellType, Any], ...]
    classes: tuple[tuple[type, tuple[Any, ...]], ...]
    functions: tuple[tuple[weakref.ref[FunctionType], tuple[Any, ...]], ...]
    has_tensors: bool
    dtype: torch.dtype

    def are_unchanged(self) -> bool:
        """Whether all is as it was."""
        if torch.get_default_dtype() is not self.dtype:
            return False
        for where, name, value in self.names:
            if where.get(name, _MISSING) is not value:
                return False
        for cell, value in self.cells:
            if _inside(cell) is not value:
                return False
        for kind, values in self.classes:
            found = vars(kind).values()
            if len(found) != len(values) or not all(map(operator.is_, found, values)):
                return False
        for reference, parts in self.functions:
            function = reference()
            if function is None or not all(map(operator.is_, _parts(function), parts)):
                return False
        return True


class Watch:
    """Watches what a function runs while it is entered.

    Args:
        function: Called inside.
        private: The type of functions that others cannot change: see :meth:`FunctionalModule.held`.

    Attributes:
        reason: Why it cannot be told what the code depends on, if so.
    """

    def __init__(self, function: Callable[..., Any], private: type) -> None:
        self.reason: str | None = None
        self._function, self._private = function, private
        self._names: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._cells: list[tuple[CellType, Any]] = []
        self._classes: dict[type, tuple[Any, ...]] = {}
        self._known: dict[int, Any] = {}  # what is constant, by `id`
        self._functions: list[tuple[weakref.ref[FunctionType], tuple[Any, ...]]] = []
        self._has_tensors = False
        self._read: set[tuple[int, CodeType]] = set()  # with their globals
        self._inner: set[CodeType] = set()  # of functions that code makes that was read, or that are known
        is_plain = isinstance(function, FunctionType)
        if not (self._is_constant_function(function) if is_plain else self._is_constant(function)):
            self._refuse("the function")

    def __enter__(self) -> "Watch":
        _garbage.keep()  # for what is collected may run code of anybody, as generators that are closed
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.setprofile(None)
        _garbage.collect_again()

    def surroundings(self) -> Surroundings:
        """What the code that ran depends on."""
        names, cells = tuple(self._names.values()), tuple(self._cells)
        classes, functions = tuple(self._classes.items()), tuple(self._functions)
        dtype = torch.get_default_dtype()
        return Surroundings(names, cells, classes, functions, self._has_tensors, dtype)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.reason is not None or event not in ("call", "c_call"):
            return
        if id(frame.f_code) in _harmless and (event == "call" or _name_of(argument) not in _READ):
            return
        try:
            is_trusted = _is_trusted(frame)
            if event == "call":
                (self._see_trusted if is_trusted else self._see_other)(frame)
            elif not is_trusted:
                self._see_builtin(argument, frame)
            elif _name_of(argument) in _READ and _top(frame.f_globals["__name__"]) == "torch":
                self._refuse(_name_of(argument))
        except Exception as error:  # it would be raised in the midst of the model
            self._refuse(repr(error))

    def _see_trusted(self, frame: FrameType) -> None:
        name, caller, code = frame.f_globals["__name__"], frame.f_back, frame.f_code
        if _top(name) != "torch" or (name.startswith(_OF_TORCH) and code.co_name not in _HOOKING):
            if _top(name) in _TRUSTED:
                _harmless[id(code)] = code
        elif caller is not None and not _is_trusted(caller):
            self._refuse(f"{name}.{code.co_qualname}")

    def _see_other(self, frame: FrameType) -> None:
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nn.Module):
                self._note_class(type(first))
            elif _is_foreign(type(first)) and id(first) not in self._known:
                self._refuse(f"an object of {type(first).__name__}")
        if (id(frame.f_globals), code) in self._read:
            return
        self._read.add((id(frame.f_globals), code))
        if code not in self._inner and set(code.co_freevars) - {"__class__"}:
            self._refuse(f"variables of a function around {code.co_qualname}")
        names, inner, refused = _reading(code)
        self._inner |= inner
        if refused:
            self._refuse(refused)
        for name in names:
            value = frame.f_globals.get(name, _MISSING)
            self._names[id(frame.f_globals), name] = frame.f_globals, name, value
            if value is not _MISSING and not self._is_constant(value):
                self._refuse(name)

    def _is_constant(self, value: Any) -> bool:
        """Whether it is the same as long as it is the same object, as far as code can go by it.

        Numbers of tensors may change: operations look at them every time. Classes are noted.
        """
        if id(value) in self._known:
            return True
        if value is None or type(value) in _CONSTANTS:
            self._has_tensors |= isinstance(value, Tensor)
            return True
        if isinstance(value, ModuleType):
            return _top(value.__name__) == "torch" or value in (math, operator)
        if isinstance(value, BuiltinFunctionType):
            return value.__self__ is None or isinstance(value.__self__, ModuleType)
        if isinstance(value, tuple):
            return all(map(self._is_constant, value))
        if isinstance(value, type):
            self._note_class(value)
            return True
        self._known[id(value)] = value  # for now: it may lead back to itself
        if isinstance(value, FunctionType):
            # One that refers to itself would be kept alive by what is remembered of it.
            is_constant = value is not self._function and self._is_constant_function(value)
        elif type(value) is self._private:
            module, call = value.held()
            is_constant = self._is_held(module) and self._is_constant(call)
        else:
            is_constant = isinstance(value, _DecoratorContextManager)  # as `torch.no_grad`
        if not is_constant:
            del self._known[id(value)]
        return is_constant

    def _is_constant_function(self, function: FunctionType) -> bool:
        given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._functions.append((weakref.ref(function), _parts(function)))
        attributes = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        if _top(function.__globals__.get("__name__")) in _TRUSTED and not function.__closure__:
            return True
        for cell in function.__closure__ or ():
            value = _inside(cell)
            self._cells.append((cell, value))
            if value is not _MISSING and not self._is_constant(value):
                return False
        self._inner.add(function.__code__)
        return not attributes and all(map(self._is_constant, given))

    def _is_held(self, value: Any) -> bool:
        """Whether what a private module holds is the same at every call; others have its functions, too."""
        if id(value) in self._known:
            return True
        if isinstance(value, nn.Module | dict | list | set | frozenset | tuple):
            self._known[id(value)] = value
        if isinstance(value, nn.Module):
            self._note_class(type(value))
            has_hooks = bool(value._backward_hooks or value._backward_pre_hooks)  # as above
            return not has_hooks and all(map(self._is_held, vars(value).values()))
        if isinstance(value, dict):
            return all(map(self._is_held, value.values()))
        if isinstance(value, list | set | frozenset | tuple):
            return all(map(self._is_held, value))
        if isinstance(value, functools.partial):
            return all(map(self._is_held, (value.func, value.args, value.keywords)))
        if isinstance(value, MethodType):
            return self._is_held(value.__func__) and self._is_held(value.__self__)
        if isinstance(value, weakref.ref):  # recurrent layers have some to their weights
            return isinstance(value(), Tensor | None)
        if isinstance(value, Tensor) or self._is_constant(value):
            return True
        if _is_foreign(type(value)) and hasattr(value, "__dict__"):
            self._known[id(value)] = value
            self._note_class(type(value))
            return all(map(self._is_held, vars(value).values()))
        return False

    def _note_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if not _is_foreign(base) or base in self._classes:
                continue
            self._classes[base] = tuple(vars(base).values())
            for name, value in vars(base).items():
                if not self._is_constant_entry(name, value):
                    self._refuse(f"{base.__name__}.{name}")

    def _is_constant_entry(self, name: str, value: Any) -> bool:
        if isinstance(value, classmethod | staticmethod):
            value = value.__func__
        if isinstance(value, property):
            value = value.fget
        if isinstance(value, FunctionType):
            return name == "__init__" or self._is_constant(value)  # which was called before
        is_of_python = (name.startswith("__") and name.endswith("__")) or name == "_abc_impl"
        return is_of_python or self._is_constant(value)

    def _see_builtin(self, function: Any, frame: FrameType) -> None:
        name = _name_of(function)
        owner = getattr(function, "__self__", getattr(function, "__objclass__", None))
        if owner is None:
            is_known = getattr(_FUNCTIONS, name, None) is function
        elif isinstance(owner, ModuleType):
            is_known = owner.__name__ in _OF_TENSORS or (owner is builtins and name in _BUILTINS)
        elif isinstance(owner, type):
            is_known = issubclass(owner, torch._C.TensorBase)
        else:
            is_plain = type(owner) in (str, tuple, list, dict, range, set, frozenset, torch.Size)
            is_kept = name in _CHANGING and not _is_made_in(frame, owner)
            is_known = isinstance(owner, Tensor) or (is_plain and not is_kept)
        if not is_known or name in _UNKNOWN:
            self._refuse(name)

    def _refuse(self, what: str) -> None:
        self.reason = self.reason or f"It is not known what {what} depends on, or does."


class _Garbage:
    """Whether it is kept for now, by one thread or several."""

    def __init__(self) -> None:
        self._lock, self._num_keeping, self._was_collected = threading.Lock(), 0, True

    def keep(self) -> None:
        with self._lock:
            if not self._num_keeping:
                self._was_collected = gc.isenabled()
                gc.disable()
            self._num_keeping += 1

    def collect_again(self) -> None:
        with self._lock:
            self._num_keeping -= 1
            if not self._num_keeping and self._was_collected:
                gc.enable()


_garbage = _Garbage()
# Code of torch's and ours that is so whoever calls it, by its `id`: two of different files may be equal.
_harmless: dict[int, CodeType] = {}
_FUNCTIONS = torch._C._VariableFunctions  # type: ignore[attr-defined]  # `torch.relu` and the like
_CONSTANTS = frozenset(
    (
        *(bool, int, float, complex, str, bytes, range, Tensor, nn.Parameter),
        *(torch.dtype, torch.device, torch.memory_format, torch.layout, torch.Size),
    )
)


def _parts(function: FunctionType) -> tuple[Any, ...]:
    return function.__code__, function.__defaults__, function.__kwdefaults__


def _inside(cell: CellType) -> Any:
    """What a variable of a function is, if it is there."""
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _is_made_in(frame: FrameType, container: Any) -> bool:
    """Whether a list, dict or set was made by the call that a frame is of, so that it is not there later."""
    return any(frame.f_locals.get(name) is container for name in _made_in(frame.f_code))


@functools.lru_cache(maxsize=1024)
def _made_in(code: CodeType) -> frozenset[str]:
    """Variables that are assigned to nothing but new lists, dicts and sets."""
    num_rest = sum(bool(code.co_flags & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
    given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + num_rest]
    made: set[str] = set()
    others, last = {*given, *code.co_cellvars}, ""
    for step in dis.get_instructions(code):
        if step.opname.startswith("STORE_FAST"):
            names = (step.argval,) if isinstance(step.argval, str) else step.argval  # of two steps in one
            has_two = step.opname == "STORE_FAST_STORE_FAST"
            # What is jumped to is given something else by the way that leads there.
            is_new = last in _BUILDING and not (has_two or step.is_jump_target)
            (made if is_new else others).add(names[0])
            others.update(names[1:] if has_two else ())
        last = step.opname
    return frozenset(made - others)


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", "")


def _top(name: str | None) -> str:
    return (name or "").partition(".")[0]


def _is_trusted(frame: FrameType) -> bool:
    """Whether a frame is torch's or ours, or what these call of the standard library, or import."""
    found: FrameType | None = frame
    is_of_others = False
    while found is not None:
        top = _top(found.f_globals.get("__name__"))
        if top in _TRUSTED:
            return not is_of_others
        if top == "importlib":
            is_of_others = False
        elif not _is_of_python(found.f_code.co_filename, top):
            is_of_others = True
        found = found.f_back
    return False


@functools.lru_cache(maxsize=1024)
def _is_of_python(file: str, top: str) -> bool:
    """Whether code is of the standard library, or written by it, and not of a file that is called like it."""
    is_there = file.startswith((_LIBRARY, "<")) and "site-packages" not in file
    return is_there and (top in sys.stdlib_module_names or top.startswith("namedtuple_"))


_LIBRARY = os.path.dirname(os.__file__)


def _is_foreign(kind: type) -> bool:
    """Whether a class is neither torch's nor Python's own nor ours."""
    top = _top(kind.__module__)
    return top not in _TRUSTED and top not in sys.stdlib_module_names


@functools.lru_cache(maxsize=1024)
def _reading(code: CodeType) -> tuple[frozenset[str], frozenset[CodeType], str | None]:
    """Globals that code takes, code of functions that it makes, and what of it cannot be allowed."""
    names: set[str] = set()
    refused = None
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_GLOBAL"):
            names.add(step.argval)
        elif step.opname in _REFUSED:
            refused = f"{step.opname} {step.argval}"
    inner = frozenset(part for part in code.co_consts if isinstance(part, CodeType))
    return frozenset(names), inner, refused
