"""Recordings of a function of tensors, for as long as they are what it would do.

Of a small network most of the time goes to Python: to modules, rules and transforms, whose outcome is the
same list of operations every time. The list alone takes a third of the time, or less. It is taken down below
all transforms, where operations are of plain tensors, and only where nothing but these decides what is done:
see :mod:`funcbayes._recording._surroundings`.
"""

import operator
import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import optree
import torch
from torch import Tensor, nn

from .._functorch import has_other_modes, taken_down
from .._layout import agree
from .._row_wise import has_global_hooks
from .._tree import tensors
from ._operations import Operations, Program
from ._surroundings import Surroundings, Watch

_MOST = 32  # ways that are remembered
_PLAIN = bool, int, float, str


@dataclass(frozen=True)
class _Inputs:
    """Inputs of one kind: what operations may depend on beside their numbers.

    Attributes:
        structure: Of the tree.
        kinds: Of its leaves; of what is no tensor its type and the leaf itself.
    """

    structure: Any
    kinds: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, tree: Any) -> tuple["_Inputs", list[Tensor]]:
        """These, and the tensors."""
        leaves, structure = optree.tree_flatten(tree)
        kinds = [kind_of(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves]
        return cls(structure, tuple(kinds)), [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def may_be_recorded(self, own: Sequence[Tensor]) -> bool:
        """Whether all is in the tensors' numbers, and in plain values, which are part of a program."""
        are_plain = all(kind[0] in _PLAIN for kind in self.kinds if isinstance(kind[0], type))
        return are_plain and all(
            type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not vars(t) for t in own
        )

    def tree(self, own: Sequence[Tensor]) -> Any:
        """A tree of this kind with these tensors."""
        following = iter(own)
        leaves = [kind[1] if isinstance(kind[0], type) else next(following) for kind in self.kinds]
        return self.structure.unflatten(leaves)


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What operations may depend on beside the numbers of a tensor."""
    stride = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return tensor.shape, stride, tensor.dtype, tensor.device


@dataclass(frozen=True)
class _Recording:
    """A program for inputs of one kind.

    Attributes:
        inputs: Their kind.
        program: Of them.
        surroundings: What it depends on beside.
        outputs: The structure of what it gives.
    """

    inputs: _Inputs
    program: Program
    surroundings: Surroundings
    outputs: Any

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        views = self.program.views(*leaves[: self.program.num_fixed])
        return self.outputs.unflatten(self.program.run(views, *leaves))

    def is_unchanged(self) -> bool:
        """Whether all that decides what is done, beside the inputs, is as it was."""
        is_written = any(tensor._version != version for tensor, version in self.program.constants)
        return not is_written and self.surroundings.are_unchanged()


class Recorded:
    """What a function does with inputs of one shape, for each way in which it is evaluated.

    Args:
        private: The type of functions that hold nothing that others may change.
    """

    def __init__(self, private: type) -> None:
        self._private = private
        self._programs: dict[Hashable, _Recording | None] = {}
        self._surroundings: dict[Hashable, Surroundings] = {}  # by the kind of `x`, by which code may go
        self._is_refused = False

    def is_possible(self, function: Callable[..., Any]) -> bool:
        """Whether what a function does might be recorded here: it is a plain one or of the private type."""
        is_simple = type(function) is self._private or isinstance(function, FunctionType)
        is_seen = sys.getprofile() is not None or has_other_modes() or has_global_hooks()
        is_seen |= torch.is_anomaly_enabled()
        return is_simple and not self._is_refused and not is_seen

    def wants(self, way: Hashable) -> bool:
        """Whether it was not tried to record this yet."""
        return way not in self._programs and not self._is_refused

    def outputs(self, way: Hashable, fixed: Any, x: Any) -> Any:
        """What was recorded, done with these inputs; ``None`` if they, or what is around, are others."""
        found = self._found(way, fixed, x)
        if found is None or any(vars(t) for t in found[1]) or not self.is_unchanged(found[0]):
            return None
        recording, leaves = found
        return recording(leaves)

    def bound(self, way: Hashable, fixed: Any, x: Tensor) -> "Bound | None":
        """The same for inputs that stay, other than ``x``."""
        found = self._found(way, fixed, x)
        return None if found is None else Bound(self, found[0], fixed)

    def is_unchanged(self, recording: _Recording) -> bool:
        """Whether a recording is what would be done; once it is not, there will be none."""
        if has_global_hooks():
            return False
        self._is_refused |= not recording.is_unchanged()
        return not self._is_refused

    def record(
        self,
        way: Hashable,
        function: Callable[..., Any],
        evaluate: Callable[[Any, Any], Any],
        fixed: Any,
        x: Any,
    ) -> Any:
        """What ``evaluate(fixed, x)`` gives, written down if only the numbers in these matter.

        Args:
            way: Of evaluating, to find it again by.
            function: Code of others.
            evaluate: Calls ``function``, and is otherwise ours. It gives a tree, without gradients.
            fixed: Inputs that stay the same in many calls, a tree.
            x: Others.

        Returns:
            ``None`` where it cannot be evaluated like this.
        """
        if len(self._programs) >= _MOST:
            self._programs.clear()
        self._programs[way] = None
        inputs, leaves = _Inputs.of((fixed, x))
        if not inputs.may_be_recorded(leaves):
            return None
        surroundings = self._surroundings.get(_Inputs.of(x)[0])
        watch = Watch(function, self._private) if surroundings is None else None
        try:
            # In inference mode operations that consist of others would be seen as one, whatever they read.
            with torch.inference_mode(False), torch.no_grad():
                # One tensor in two places would be one input.
                own = [leaf.clone() if leaf.is_inference() else leaf.detach() for leaf in leaves]
                operations = Operations(own, len(leaves) - len(tensors(x)))
                with nullcontext() if watch is None else watch, taken_down(), operations:
                    outputs = evaluate(*inputs.tree(own))
            if watch is not None and watch.reason is None:
                surroundings = self._surroundings[_Inputs.of(x)[0]] = watch.surroundings()
            if surroundings is None:
                self._is_refused = True
            else:
                self._keep(way, inputs, operations, outputs, surroundings, type(function) is self._private)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the mode, or of torch where it does not take one
            return None
        return outputs

    def _keep(
        self,
        way: Hashable,
        inputs: _Inputs,
        operations: Operations,
        outputs: Any,
        surroundings: Surroundings,
        is_private: bool,
    ) -> None:
        """Keep a program, if it gives the same outputs."""
        results, structure = optree.tree_flatten(outputs)
        if operations.is_refused or not all(type(t) is Tensor for t in results):
            return
        may_keep = is_private and not surroundings.has_tensors
        program = operations.program(results, may_keep=may_keep)
        recording = _Recording(inputs, program, surroundings, structure)
        again = optree.tree_leaves(recording(operations.inputs))
        if all(agree(one, other, operations.inputs) for one, other in zip(again, results, strict=True)):
            self._programs[way] = recording

    def _found(self, way: Hashable, fixed: Any, x: Any) -> tuple[_Recording, list[Tensor]] | None:
        """The recording for inputs of this kind, and their leaves."""
        known = self._programs.get(way)
        if known is None:
            return None
        inputs, leaves = _Inputs.of((fixed, x))
        return (known, leaves) if inputs == known.inputs else None


class Bound:
    """A program with all inputs but ``x``, of which there are views already.

    Args:
        recorded: What it is one of.
        recording: With one tensor as ``x``.
        fixed: The other inputs, a tree.
    """

    def __init__(self, recorded: Recorded, recording: _Recording, fixed: Any) -> None:
        self._recorded, self._recording, self._fixed = recorded, recording, optree.tree_leaves(fixed)
        self._views, self._places = recording.program.views(*self._fixed), _places(self._fixed)
        self._is_dict = type(fixed) is dict and all(isinstance(value, Tensor) for value in fixed.values())
        self._given = self._parts(fixed)

    def outputs(self, fixed: Any, x: Tensor) -> Tensor | None:
        """What was recorded, done with ``x`` of its kind; ``None`` if anything else is another than it was.

        Args:
            fixed: The other inputs as they are now.
            x: The last input.
        """
        given = self._parts(fixed)
        if len(given) != len(self._given) or not all(map(operator.is_, given, self._given)):
            return None
        # The same tensor can have been given other memory, by its `data`.
        if _places(self._fixed) != self._places or not self._recorded.is_unchanged(self._recording):
            return None
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (x, *self._fixed)):
            return None
        (outputs,) = self._recording.program.run(self._views, *self._fixed, x)
        return outputs

    def _parts(self, fixed: Any) -> list[Any]:
        """What inputs are the same by, if it is; of a dict of tensors names and values, to be quick."""
        whole: Any = fixed
        is_dict = self._is_dict and type(fixed) is dict
        return [*fixed, *fixed.values()] if is_dict else optree.tree_leaves(whole)


def _places(leaves: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Where tensors lie in memory, and how."""
    return tuple([*map(of, leaves)] for of in (Tensor.data_ptr, Tensor.size, Tensor.stride))
