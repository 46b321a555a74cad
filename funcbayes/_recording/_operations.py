"""Operations of torch as they are done, taken down as the steps of a program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .._masks import plain_masks
from .._tree import tensors
from ._program import VARIABLE, Program, Step, functions_of

_NAMESPACES = frozenset(("aten", "prims", "mkldnn", "onednn", "funcbayes"))
# What cannot be done again with other numbers: results have sizes, or become numbers of Python's, by them.
_REFUSED = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
# Python has a function of its own for each of these, which takes some microseconds less than what all have.
_aten = torch.ops.aten
_QUICK: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: torch.add,
    _aten.addcmul.default: torch.addcmul,
    _aten.addcmul_.default: Tensor.addcmul_,
    _aten.addmm.default: torch.addmm,
    _aten.baddbmm.default: torch.baddbmm,
    _aten.baddbmm.out: torch.baddbmm,
    _aten.bitwise_xor.Tensor: torch.bitwise_xor,
    _aten.bitwise_xor_.Tensor: Tensor.bitwise_xor_,
    _aten.bmm.default: torch.bmm,
    _aten.clone.default: torch.clone,
    _aten.convolution.default: torch.convolution,
    _aten.detach.default: Tensor.detach,
    _aten.embedding.default: torch.embedding,
    _aten.empty.memory_format: torch.empty,
    _aten.expand.default: Tensor.expand,
    _aten.gt.Scalar_out: torch.gt,
    _aten.index_select.default: torch.index_select,
    _aten.max_pool2d_with_indices.default: torch._C._nn.max_pool2d_with_indices,  # type: ignore[attr-defined]  # without stubs
    _aten.mean.dim: torch.mean,
    _aten.mm.default: torch.mm,
    _aten.mul.Scalar: torch.mul,
    _aten.mul.Tensor: torch.mul,
    _aten.mul.out: torch.mul,
    _aten.mul_.Tensor: Tensor.mul_,
    _aten.native_batch_norm.default: torch.native_batch_norm,
    _aten.native_layer_norm.default: torch.native_layer_norm,
    _aten.ones.default: torch.ones,
    _aten.permute.default: Tensor.permute,
    _aten.relu.default: torch.relu,
    _aten.select.int: Tensor.select,
    _aten.sigmoid_.default: Tensor.sigmoid_,
    _aten._softmax.default: torch._softmax,
    _aten.split_with_sizes.default: torch.split_with_sizes,
    _aten.stack.default: torch.stack,
    _aten.t.default: Tensor.t,
    _aten.tanh.default: torch.tanh,
    _aten.tanh.out: torch.tanh,
    _aten.transpose.int: Tensor.transpose,
    _aten.unbind.int: Tensor.unbind,
    _aten._unsafe_view.default: Tensor.view,
    _aten.unsqueeze.default: Tensor.unsqueeze,
    _aten.view.default: Tensor.view,
    _aten.view.dtype: Tensor.view,
    _aten.zeros.default: torch.zeros,
}
# These read lengths from a tensor.
_READING = frozenset(
    (
        *("aten::_pack_padded_sequence", "aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"),
        *("aten::_ctc_loss", "aten::_cudnn_ctc_loss", "aten::_use_cudnn_ctc_loss"),
    )
)
_MOST_ALIVE = 128 << 20  # bytes of all results, which are held while operations are taken down
_MOST_BYTES = 1 << 20  # of a result of constants that is kept


class Operations(TorchDispatchMode):
    """Takes down what is done with plain tensors while it is on.

    Args:
        inputs: Of what is done, which nothing is to be written into.
        num_fixed: How many of the first of them stay the same in many calls.

    Attributes:
        is_refused: Whether something was done that cannot be done again.
    """

    def __init__(self, inputs: Sequence[Tensor], num_fixed: int) -> None:
        super().__init__()
        self.is_refused = False
        self._given = [f"t{i}" for i in range(len(inputs))]
        self._fixed = self._given[:num_fixed]
        self._tensors = dict(zip(self._given, inputs, strict=True))
        self._alive = list(inputs)  # an `id` is taken again, otherwise
        self._names = {id(t): name for name, t in self._tensors.items()}
        self._roots = {name: name for name in self._given}  # of what each is a view of, in the end
        self._places = {(name, _place(t)): name for name, t in self._tensors.items()}
        self._of_others = {_storage(t) for t in inputs}  # what nothing may be written into
        self._written: set[StorageWeakRef] = set()
        self._computed = set(self._of_others)  # what is inside these was given, or came of it
        self._nbytes = 0  # of all that is kept alive
        self._constants: dict[str, Any] = {}  # functions, tensors of the model's, what is no text
        self._steps: list[Step] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not by a wrapper that loads all of the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Do it, and take it down."""
        kwargs = kwargs or {}
        if not self.is_refused and (not _is_known(func) or _is_random(func, args, kwargs)):
            found = func(*args, **kwargs)
            self.is_refused = bool(tensors((args, kwargs, found)))  # as of dtypes alone it is the same
            return found
        if self.is_refused:
            self._alive.clear()
            self._tensors.clear()
            return func(*args, **kwargs)
        given = [*map(self._text, args), *(f"{name}={self._text(value)}" for name, value in kwargs.items())]
        changed = _written(func, args, kwargs)
        self._written |= changed
        self.is_refused |= not self._of_others.isdisjoint(changed)
        if torch.Tag.inplace_view in func.tags:
            self._forget_place(args[0])
        found = func(*args, **kwargs)
        results = list(found) if isinstance(found, tuple | list) else [found]
        is_view = func.is_view and all(_storage(result) == _storage(args[0]) for result in results)
        count = len(self._tensors)
        root = self._roots.get(self._names[id(args[0])]) if is_view else None
        names = [self._named(result, root) for result in results]
        if is_view and len(self._tensors) == count:
            return found  # there is one like it already
        uses = frozenset(VARIABLE.findall(" ".join(given)))
        is_copy = _copies(func, args) and _place(results[0])[1:] == _place(args[0])[1:]
        copies = self._names[id(args[0])] if is_copy else None
        is_one_of_several = isinstance(found, list | tuple) and len(names) == 1
        target = ", ".join(names or ["_"]) + ("," if is_one_of_several else "")
        call = f"{self._constant(_function_of(func))}({', '.join(given)})"
        has_effect = bool(changed) or names in ([], ["_"])  # as what raises an error
        self._steps.append(Step(names, target, call, uses, is_view, has_effect, copies))
        return found

    def program(self, outputs: Sequence[Tensor], *, may_keep: bool) -> Program:
        """Write down what was done.

        Args:
            outputs: What came of it.
            may_keep: Whether constants are always what they are now, so that results of these alone are kept.
        """
        results, constants = [*map(self._text, outputs)], dict(self._constants)
        given_out = {_storage(t) for t in outputs}
        may_keep &= not any(t.is_inference() for t in self._own())  # whether writing would leave a trace
        shown: set[str] = set()
        views: list[Step] = []
        rest: list[Step] = []
        same: dict[str, str] = {}  # copies that nobody would tell from what they are of
        for step in self._steps:
            if may_keep and constants.keys() >= step.uses and self._may_be_kept(step, given_out):
                constants |= {name: self._tensors[name] for name in step.names if name in self._tensors}
            elif self._is_view_of_fixed(step, shown | constants.keys(), results):
                views.append(step)
                shown.update(step.names)
            elif step.copies is not None and self._is_needless(step, given_out):
                same[step.names[0]] = same.get(step.copies, step.copies)
            else:
                rest.append(step.renamed(same))
        functions = functions_of(views, rest, self._given, len(self._fixed), results, constants)
        versions = tuple((t, t._version) for t in self._own()) if may_keep else ()
        return Program(len(self._fixed), versions, *functions)

    def _own(self) -> list[Tensor]:
        """Tensors that were not given."""
        return [value for value in self._constants.values() if isinstance(value, Tensor)]

    def _is_view_of_fixed(self, step: Step, known: set[str], results: list[str]) -> bool:
        """Whether a view can be made beforehand; what is given out is another tensor each time."""
        is_ready = step.is_view and step.uses and step.uses <= {*self._fixed, *known}
        return bool(is_ready) and not {*results}.intersection(step.names)

    def _may_be_kept(self, step: Step, given_out: set[StorageWeakRef]) -> bool:
        """Whether results, of constants, can be constants too."""
        results = [self._tensors[name] for name in step.names if name in self._tensors]
        storages = {_storage(t) for t in results}
        is_small = sum(t.nbytes for t in results) <= _MOST_BYTES
        return not step.writes and is_small and storages.isdisjoint(self._written | given_out)

    def _is_needless(self, step: Step, given_out: set[StorageWeakRef]) -> bool:
        """Whether a copy could as well be what it is a copy of: nothing writes into either."""
        assert step.copies is not None
        source = self._constants.get(step.copies, self._tensors.get(step.copies))
        copied = _storage(self._tensors[step.names[0]])
        return self._written.isdisjoint((copied, _storage(source))) and copied not in given_out

    def _forget_place(self, tensor: Tensor) -> None:
        """Of a tensor whose shape is about to change, which should have its name for itself."""
        name = self._names[id(tensor)]
        self.is_refused |= [*self._names.values()].count(name) > 1
        self._places = {place: other for place, other in self._places.items() if other != name}

    def _named(self, result: Any, root: str | None) -> str:
        if not isinstance(result, Tensor):
            return "_"
        if id(result) not in self._names:
            new = f"t{len(self._tensors)}"
            # A view that shows what another one does, in the same way, is that one.
            name = self._places.setdefault((root or new, _place(result)), new)
            self._roots.setdefault(name, root or new)
            self._names[id(result)] = name
            self._alive.append(result)
            self._tensors.setdefault(name, result)
            self._computed.add(_storage(result))
            self._nbytes += 0 if root else result.nbytes
            self.is_refused |= self._nbytes > _MOST_ALIVE
        return self._names[id(result)]

    def _text(self, value: Any) -> str:
        if isinstance(value, Tensor):
            if id(value) not in self._names:  # of the model's own, or of what is around it
                # It should not be another name for something that was computed, which differs next time.
                self.is_refused |= _storage(value) in self._computed
                self._of_others.add(_storage(value))
                self._alive.append(value)
                self.is_refused |= value.requires_grad  # so that no derivative is wanted of results
                self._names[id(value)] = self._constant(value)
            return self._names[id(value)]
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        return repr(value) if value is None or type(value) in (bool, int, str) else self._constant(value)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = value
        return name


def _function_of(func: Any) -> Callable[..., Any]:
    return plain_masks if func.name() == "funcbayes::masks" else _QUICK.get(func) or func._op


def _copies(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether results have the numbers of what is given: `vmap` multiplies what is added by its factor."""
    return func is _aten.clone.default or (func is _aten.mul.Scalar and args[1] == 1)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _place(t: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory, and how."""
    return _storage(t), t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_conj(), t.is_neg()


def _arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """What is declared of each argument, and its value."""
    declared = func._schema.arguments
    given = (*args, *(kwargs.get(a.name, a.default_value) for a in declared[len(args) :]))
    return list(zip(declared, given, strict=True))


@functools.lru_cache(maxsize=1024)
def _is_known(func: Any) -> bool:
    """Whether all that an operation does is seen, and is the same for all numbers."""
    if func.namespace not in _NAMESPACES or any(tag in func.tags for tag in _REFUSED):
        return False
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return not is_composite and func._schema.name not in _READING


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    rates = [value for a, value in _arguments(func, args, kwargs) if a.name == "dropout_p"]
    return not rates or any(rates)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[StorageWeakRef]:
    """Where an operation writes into what it is given."""
    if not func._schema.is_mutable and "batch_norm" not in func._schema.name:
        return set()
    found = _arguments(func, args, kwargs)
    written = [value for a, value in found if a.alias_info is not None and a.alias_info.is_write]
    # Kernels of normalisation do so in training without saying it.
    if any(value for a, value in found if a.name in ("training", "train")):
        written += [value for a, value in found if a.name in ("running_mean", "running_var")]
    return {_storage(t) for t in tensors(written)}
