"""What a function of tensors does, written down once, to be done again without its Python code.

Of a small network most of the time goes to Python: to modules, rules and transforms, whose outcome is the same
list of operations every time. The list alone takes a third of it, or less. It is taken down where operations
are of plain tensors, below transforms, by a dispatch mode; and only where nothing but the tensors can change
what is done: see :mod:`funcbayes._surroundings`.
"""

import operator
import re
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ._functorch import has_modes, taken_down
from ._surroundings import Surroundings, Watch
from ._tree import tensors

_NAMESPACES = frozenset(("aten", "prims", "mkldnn", "onednn"))
# What cannot be done again with other numbers: results have sizes, or become numbers of Python's, by them.
_BY_NUMBERS = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape


@dataclass(frozen=True)
class _Recording:
    """Operations for tensors of one kind.

    Attributes:
        structure: Of the tree of inputs.
        kinds: Of the inputs: what operations may depend on beside their numbers.
        num_fixed: Inputs before ``x``.
        views: Gives views of those that it is called with.
        run: Does all the rest with the views and all inputs.
    """

    structure: Any
    kinds: tuple[Any, ...]
    num_fixed: int
    views: Callable[..., tuple[Tensor, ...]]
    run: Callable[..., Tensor]

    def __call__(self, leaves: Sequence[Tensor]) -> Tensor:
        return self.run(self.views(*leaves[: self.num_fixed]), *leaves)


class Recorded:
    """What a function does with inputs of one shape, for each way in which it is evaluated.

    Args:
        private: The type of functions that hold nothing that others may change.
    """

    def __init__(self, private: type) -> None:
        self._private = private
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._surroundings: Surroundings | None = None
        self._is_refused = False

    def is_possible(self, function: Callable[..., Any]) -> bool:
        """Whether what a function does might be recorded here: it is a plain one or of the private type."""
        is_simple = type(function) is self._private or isinstance(function, FunctionType)
        return is_simple and not self._is_refused and sys.getprofile() is None and not has_modes()

    def wants(self, way: Hashable) -> bool:
        """Whether it was not tried to record this yet."""
        return way not in self._recordings and not self._is_refused

    def outputs(self, way: Hashable, fixed: Any, x: Any) -> Tensor | None:
        """What was recorded, done with these; ``None`` if it is something else that should be done."""
        recording = self._recordings.get(way)
        if recording is None:
            return None
        leaves, structure = optree.tree_flatten((fixed, x))
        if structure != recording.structure or _kinds(leaves) != recording.kinds:
            return None
        return recording(leaves) if self.is_unchanged() else None

    def bound(self, way: Hashable, fixed: Any, x: Tensor) -> "Bound | None":
        """The same for inputs that stay, other than ``x``; ``None`` if they are not of the kind recorded."""
        recording = self._recordings.get(way)
        leaves, structure = optree.tree_flatten((fixed, x))
        if recording is None or structure != recording.structure or _kinds(leaves) != recording.kinds:
            return None
        return Bound(self, recording, leaves[:-1])

    def is_unchanged(self) -> bool:
        self._is_refused |= self._surroundings is None or not self._surroundings.are_unchanged()
        return not self._is_refused

    def record(
        self,
        way: Hashable,
        function: Callable[..., Any],
        evaluate: Callable[[Any, Any], Tensor],
        fixed: Any,
        x: Any,
    ) -> None:
        """Write down what ``evaluate(fixed, x)`` does, without gradients, unless more than these matters.

        Args:
            way: Of evaluating, to find it again by.
            function: Code of others.
            evaluate: Calls ``function``, and is otherwise ours.
            fixed: Of tensors, as is ``x``.
            x: What is different in most calls.
        """
        self._recordings[way] = None
        leaves, structure = optree.tree_flatten((fixed, x))
        if not all(type(leaf) in (Tensor, nn.Parameter) for leaf in leaves):
            return
        own = [leaf.detach() for leaf in leaves]  # one tensor in two places would be one input
        operations = _Operations(own, len(leaves) - len(tensors(x)))
        watch = Watch(function, self._private) if self._surroundings is None else None
        try:
            with nullcontext() if watch is None else watch, taken_down(), operations:
                outputs = evaluate(*structure.unflatten(own))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the mode, or of torch where it does not take one
            return
        if watch is not None and watch.reason is not None:
            self._is_refused = True
        if self._is_refused or operations.is_refused or type(outputs) is not Tensor:
            return
        found = _Recording(structure, _kinds(leaves), operations.num_fixed, *operations.program(outputs))
        if torch.allclose(found(leaves), outputs, rtol=1e-4, atol=0, equal_nan=True):
            if watch is not None:
                self._surroundings = watch.surroundings()
            self._recordings[way] = found


class Bound:
    """A recording with all inputs but ``x``, of which there are views already.

    Args:
        recorded: What it is one of.
        recording: With one tensor as ``x``.
        fixed: The other inputs.
    """

    def __init__(self, recorded: Recorded, recording: _Recording, fixed: Sequence[Tensor]) -> None:
        self._recorded, self._recording, self._fixed = recorded, recording, fixed
        self._views, self._places = recording.views(*fixed), _places(fixed)

    def outputs(self, fixed: Sequence[Tensor], x: Tensor) -> Tensor | None:
        """What was recorded, done with ``x``, which is of its kind; ``None`` if something else should be done.

        Args:
            fixed: What the other inputs are now.
            x: The last input.
        """
        if len(fixed) != len(self._fixed) or not all(map(operator.is_, fixed, self._fixed)):
            return None
        # The same tensor can have been given other memory, by its `data`.
        if _places(fixed) != self._places or not self._recorded.is_unchanged():
            return None
        return self._recording.run(self._views, *fixed, x)


def _places(leaves: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Where tensors lie in memory, and how."""
    return tuple([*map(of, leaves)] for of in (Tensor.data_ptr, Tensor.size, Tensor.stride))


def _kinds(leaves: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple([(t.shape, t.stride(), t.dtype, t.device) for t in leaves])


class _Operations(TorchDispatchMode):
    """Takes down operations as lines of Python, one a call, whose variables are tensors."""

    def __init__(self, inputs: Sequence[Tensor], num_fixed: int) -> None:
        super().__init__()
        self.is_refused, self.num_fixed = False, num_fixed
        self._names = {id(t): f"t{i}" for i, t in enumerate(inputs)}
        self._num_inputs = len(inputs)
        self._alive = list(inputs)  # an `id` is taken again, otherwise
        self._of_others = {_storage(t) for t in inputs}  # what nothing may be written into
        self._known: dict[str, Any] = {}  # functions, and what cannot be written as text
        self._lines: list[tuple[list[str], str]] = []
        self._of_fixed = {f"t{i}" for i in range(num_fixed)}  # these, and views of them
        self._views: list[tuple[list[str], str]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not by a wrapper that loads all of the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Do it, and take it down."""
        kwargs = kwargs or {}
        is_by_numbers = any(tag in func.tags for tag in _BY_NUMBERS)
        if func.namespace not in _NAMESPACES or is_by_numbers or _is_random(func, args, kwargs):
            self.is_refused = True
        if self.is_refused:
            return func(*args, **kwargs)
        given = [*map(self._text, args), *(f"{name}={self._text(value)}" for name, value in kwargs.items())]
        if func._schema.is_mutable and not self._of_others.isdisjoint(_written(func, args, kwargs)):
            self.is_refused = True
        found = func(*args, **kwargs)
        results = list(found) if isinstance(found, tuple | list) else [found]
        if func.is_view and len(results) == 1 and _is_same_view(results[0], args[0]):
            self._call(results[0], self._names[id(args[0])])
            return found
        names = [self._named(result) for result in results]
        targets = ", ".join(names) + ("," if isinstance(found, tuple | list) and len(names) == 1 else "")
        line = names, f"{targets} = {self._constant(func._op)}({', '.join(given)})"
        if func.is_view and set(_variables(line[1])) - set(names) <= self._of_fixed:
            self._of_fixed.update(names)
            self._views.append(line)
        else:
            self._lines.append(line)
        return found

    def program(self, outputs: Tensor) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
        """Two functions: of fixed inputs, that gives views of them; of the views and all inputs, of the rest."""
        result = self._text(outputs)
        inputs = [f"t{i}" for i in range(self._num_inputs)]
        shown = [name for names, _ in self._views for name in names]
        last = {}
        for i, (names, line) in enumerate(self._lines):
            last |= dict.fromkeys((*names, *_variables(line)), i)
        kept = {*inputs, *shown, result}
        text = [
            f"def views({', '.join(inputs[: self.num_fixed])}):",
            *(f"    {line}" for _, line in self._views),
            f"    return [{', '.join(shown)}]",
            f"def run(views, {', '.join(inputs)}):",
            *([f"    {', '.join(shown)}, = views"] if shown else []),
        ]
        for i, (_, line) in enumerate(self._lines):
            dead = sorted(name for name, at in last.items() if at == i and name not in kept)
            text.append(f"    {line}" + (f"; del {', '.join(dead)}" if dead else ""))
        scope = dict(self._known)
        exec("\n".join([*text, f"    return {result}"]), scope)  # noqa: S102  # of what is written here alone
        return scope["views"], scope["run"]

    def _named(self, result: Any) -> str:
        if not isinstance(result, Tensor):
            return "_"
        if id(result) not in self._names:
            self._call(result, f"t{len(self._alive)}")
        return self._names[id(result)]

    def _call(self, tensor: Tensor, name: str) -> None:
        self._names[id(tensor)] = name
        self._alive.append(tensor)

    def _text(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if id(value) not in self._names:  # of the model's own, or of what is around it
                self._of_others.add(_storage(value))
                self._call(value, self._constant(value))
            return self._names[id(value)]
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        return repr(value) if value is None or type(value) in (bool, int, str) else self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._known)}"
        self._known[name] = value
        return name


def _variables(line: str) -> list[str]:
    return re.findall(r"\bt\d+\b", line)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What is declared of each argument, and its value."""
    declared = func._schema.arguments
    given = (*args, *(kwargs.get(a.name, a.default_value) for a in declared[len(args) :]))
    return list(zip(declared, given, strict=True))


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    rates = [value for a, value in _arguments(func, args, kwargs) if a.name == "dropout_p"]
    return not rates or any(rates)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[StorageWeakRef]:
    """Where an operation writes into what it is given."""
    found = _arguments(func, args, kwargs)
    written = [value for a, value in found if a.alias_info is not None and a.alias_info.is_write]
    return {_storage(t) for t in tensors(written)}


def _is_same_view(result: Tensor, base: Any) -> bool:
    """Whether a view shows all that its base does, in the same way."""
    return (
        isinstance(base, Tensor)
        and result.shape == base.shape
        and result.stride() == base.stride()
        and result.storage_offset() == base.storage_offset()
        and result.dtype == base.dtype
        and result.is_conj() == base.is_conj()
        and result.is_neg() == base.is_neg()
    )
