"""Recordings of a function of tensors, for as long as they are what it would do.

Of a small network most of the time goes to Python: to modules, rules and transforms, whose outcome is the
same list of operations every time. The list alone takes a third of the time, or less. It is taken down below
all transforms, where operations are of plain tensors, and only where nothing but these decides what is done:
see :mod:`funcbayes._recording._surroundings`.
"""

import operator
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor, nn

from .._functorch import has_other_modes, taken_down
from .._layout import agree
from .._row_wise import has_global_hooks
from .._tree import tensors
from ._operations import Operations
from ._program import Program
from ._surroundings import Surroundings, Watch

_MOST = 8  # kinds of inputs that are remembered for a way of evaluating


class _Inputs(NamedTuple):
    """Inputs of one kind: what operations may depend on beside their numbers.

    Attributes:
        structure: Of the tree.
        kinds: Of its tensors, ``None`` in the place of other leaves.
        others: These, each with its type and how it is written.
    """

    structure: Any
    kinds: tuple[Any, ...]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, tree: Any) -> tuple["_Inputs", list[Tensor]]:
        """These, and the tensors."""
        leaves, structure = optree.tree_flatten(tree)
        own = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(own) == len(leaves):
            return cls(structure, tuple([kind_of(leaf) for leaf in leaves]), ()), own
        kinds = tuple([kind_of(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves])
        others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        # Of a plain value 0.0 is another one than -0.0 or False.
        plain = [(type(leaf), repr(leaf) if type(leaf) in _PLAIN else "", leaf) for leaf in others]
        return cls(structure, kinds, tuple(plain)), own

    def may_be_recorded(self, own: Sequence[Tensor]) -> bool:
        """Whether all is in the tensors' numbers, and in plain values, which are part of a program."""
        is_plain = all(kind in _PLAIN for kind, *_ in self.others) and not any(map(vars, own))
        return is_plain and all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in own)

    def tree(self, own: Sequence[Tensor]) -> Any:
        """A tree of this kind with these tensors."""
        following, others = iter(own), iter(self.others)
        leaves = [next(others)[-1] if kind is None else next(following) for kind in self.kinds]
        return self.structure.unflatten(leaves)


_PLAIN = bool, int, float, str


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """What operations may depend on beside the numbers of a tensor."""
    stride = tensor.stride() if tensor.layout is torch.strided else tensor.layout
    return type(tensor), tensor.shape, stride, tensor.dtype, tensor.device


@dataclass(frozen=True)
class _Recording:
    """A program for inputs of one kind.

    Attributes:
        program: Of their tensors.
        surroundings: What it depends on beside.
        outputs: The structure of what it gives.
    """

    program: Program
    surroundings: Surroundings
    outputs: Any

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        views = self.program.views(*leaves[: self.program.num_fixed])
        return self.outputs.unflatten(self.program.run(views, *leaves))

    def gives(self, outputs: Any, leaves: Sequence[Tensor]) -> bool:
        """Whether outputs are what it gives."""
        pairs = zip(optree.tree_leaves(self(leaves)), optree.tree_leaves(outputs), strict=True)
        return all(agree(one, other, leaves) for one, other in pairs)

    def is_unchanged(self) -> bool:
        """Whether all that decides what is done, beside the inputs, is as it was."""
        is_written = any(tensor._version != version for tensor, version in self.program.constants)
        return not is_written and self.surroundings.are_unchanged()


class Recorded:
    """What a function does, for each way in which it is evaluated.

    Args:
        private: The type of functions that others cannot change.

    Attributes:
        num_tried: How often something was written down, or it was tried.
    """

    def __init__(self, private: type) -> None:
        self.num_tried = 0
        self._private = private
        self._recordings: dict[Hashable, list[tuple[_Inputs, _Recording | None]]] = {}
        self._is_refused = False

    def is_possible(self, function: Callable[..., Any]) -> bool:
        """Whether what a function does might be recorded here: it is a plain one or of the private type."""
        is_simple = type(function) is self._private or isinstance(function, FunctionType)
        is_seen = sys.getprofile() is not None or has_other_modes() or has_global_hooks()
        is_seen |= torch.is_anomaly_enabled()
        return is_simple and not self._is_refused and not is_seen

    def evaluate(
        self,
        way: Hashable,
        function: Callable[..., Any],
        evaluate: Callable[[Any, Any], Any],
        fixed: Any,
        x: Any,
        *,
        may_record: bool = True,
    ) -> Any:
        """What ``evaluate(fixed, x)`` gives, by a recording if there is one, without gradients.

        Args:
            way: Of evaluating, to find recordings again by.
            function: Code of others, for which :meth:`is_possible`.
            evaluate: Calls ``function``, and is otherwise ours. It gives a tree.
            fixed: Inputs that stay the same in many calls, a tree.
            x: Others.
            may_record: Whether it is recorded if it was not, and only the numbers of inputs matter.

        Returns:
            ``None`` where it is not, or cannot be, evaluated like this.
        """
        inputs, leaves = _Inputs.of((fixed, x))
        recording, is_known = self._known(way, inputs)
        if is_known:
            return self._done_again(recording, leaves)
        known = self._recordings.setdefault(way, [])
        if not may_record or len(known) >= _MOST or not inputs.may_be_recorded(leaves):
            return None
        self.num_tried += 1
        outputs, recording = self._recorded(function, evaluate, inputs, leaves, len(leaves) - len(tensors(x)))
        known.append((inputs, recording))
        return outputs

    def again(self, way: Hashable, fixed: Any, x: Any) -> Any:
        """What :meth:`evaluate` gives by a recording; ``None`` without one, or if gradients are wanted."""
        inputs, leaves = _Inputs.of((fixed, x))
        if torch.is_grad_enabled() and any([leaf.requires_grad for leaf in leaves]):
            return None
        with torch.no_grad():  # in what the model takes from elsewhere none are wanted either
            return self._done_again(self._known(way, inputs)[0], leaves)

    def bound(self, way: Hashable, fixed: Any, x: Any, held: Any) -> "Bound | None":
        """A recording for inputs that stay, other than ``x``; ``held`` is what these are in."""
        recording, _ = self._known(way, _Inputs.of((fixed, x))[0])
        return None if recording is None else Bound(self, recording, held)

    def _done_again(self, recording: _Recording | None, leaves: Sequence[Tensor]) -> Any:
        if recording is None or any(map(vars, leaves)) or not self.holds(recording):
            return None
        return recording(leaves)

    def _known(self, way: Hashable, inputs: _Inputs) -> tuple[_Recording | None, bool]:
        """A recording, and whether there is one or was one tried."""
        for of, recording in self._recordings.get(way, ()):
            if of == inputs:
                return recording, True
        return None, False

    def holds(self, recording: _Recording) -> bool:
        """Whether a recording is what would be done; once one is not, there will be none."""
        if has_global_hooks():
            return False
        self._is_refused |= not recording.is_unchanged()
        return not self._is_refused

    def _recorded(
        self,
        function: Callable[..., Any],
        evaluate: Callable[[Any, Any], Any],
        inputs: _Inputs,
        leaves: Sequence[Tensor],
        num_fixed: int,
    ) -> tuple[Any, _Recording | None]:
        """What it gives, and how it does."""
        outputs = None
        try:
            # In inference mode operations that consist of others would be seen as one, whatever they read.
            with torch.inference_mode(False), torch.no_grad():
                # One tensor in two places would be one input.
                own = [*map(_apart, leaves)]
                if _Inputs.of(inputs.tree(own))[0] != inputs:  # copies that lie in memory otherwise
                    return None, None
                operations, watch = Operations(own, num_fixed), Watch(function, self._private)
                with watch, taken_down(), operations:
                    outputs = evaluate(*inputs.tree(own))
                if watch.reason is not None:
                    self._is_refused = True
                    return outputs, None
                is_private = type(function) is self._private
                recording = _recording_of(operations, outputs, inputs, watch.surroundings(), is_private)
                if recording is None or not recording.gives(outputs, own):
                    return outputs, None
                # Numbers that have become a part of the program do not go with others.
                others = [*map(_reversed, own)]
                return outputs, recording if recording.gives(evaluate(*inputs.tree(others)), others) else None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # of the mode, or of torch where it does not take one
            return outputs, None


def _recording_of(
    operations: Operations, outputs: Any, inputs: _Inputs, surroundings: Surroundings, is_private: bool
) -> _Recording | None:
    results, structure = optree.tree_flatten(outputs)
    if operations.is_refused or not all(type(t) is Tensor for t in results):
        return None
    program = operations.program(results, may_keep=is_private and not surroundings.has_tensors)
    return None if operations.is_refused else _Recording(program, surroundings, structure)


def _apart(leaf: Tensor) -> Tensor:
    """The same tensor as another object, but for those of inference mode, which are copied."""
    own = leaf.clone() if leaf.is_inference() else leaf.detach()
    return nn.Parameter(own, leaf.requires_grad) if type(leaf) is nn.Parameter else own


def _reversed(tensor: Tensor) -> Tensor:
    """The same numbers in another order, if each has a place of its own; in the same layout."""
    other = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    if other.untyped_storage().nbytes() < tensor.nbytes:
        return tensor
    return other.copy_(tensor.reshape(-1).flip(0).view(tensor.shape))


class Bound:
    """A program with all inputs but ``x``, of which there are views already.

    Args:
        recorded: What it is one of.
        recording: With one tensor as ``x``.
        fixed: The other inputs, all that are in a tree.
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
        if _places(self._fixed) != self._places or not self._recorded.holds(self._recording):
            return None
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in (x, *self._fixed)):
            return None
        with torch.no_grad():  # as above
            (outputs,) = self._recording.program.run(self._views, *self._fixed, x)
        return outputs

    def _parts(self, fixed: Any) -> list[Any]:
        """What inputs are the same by, if it is; of a dict of tensors names and values, to be quick."""
        whole: Any = fixed
        is_dict = self._is_dict and type(fixed) is dict
        return [*fixed, *fixed.values()] if is_dict else optree.tree_leaves(whole)


def _places(leaves: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Where tensors lie in memory, and how."""
    dtypes = [leaf.dtype for leaf in leaves]
    return dtypes, *([*map(of, leaves)] for of in (Tensor.data_ptr, Tensor.size, Tensor.stride))
