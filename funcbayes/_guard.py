"""Keeping what a module writes into from outliving its call: its inputs, and its own attributes."""

from typing import Any

import optree
from torch import Tensor, nn

from ._functorch import is_concrete
from ._tree import as_tree

_MANAGED = frozenset(vars(nn.Module()))  # attributes that every module has


def is_of_torch(part: nn.Module) -> bool:
    """Whether the module's class is torch's own, so that its habits are known."""
    return type(part).__module__.startswith("torch.nn.")


def may_write_inputs(module: nn.Module) -> bool:
    """Whether a module could work in place on what it is given."""
    return any(
        not is_of_torch(part)
        or getattr(part, "inplace", False)
        or part._forward_pre_hooks
        or part._forward_hooks
        for part in module.modules()
    )


class Inputs:
    """Hands out copies of the inputs of one evaluation, the same ones again unless they were written into.

    Not for longer: what is done to a tensor through NumPy or ``.data`` leaves no trace, and a program that is
    being written down should see the copying.
    """

    def __init__(self, x: Any) -> None:
        self._leaves, self._structure = optree.tree_flatten(as_tree(x))
        self._is_tensor = isinstance(x, Tensor)
        self._copies: dict[int, Tensor] = {}

    def copied(self) -> Any:
        """The inputs in containers of their own, with tensors of their own."""
        if self._is_tensor:
            return self._copy(0)
        return self._structure.unflatten(map(self._copy, range(len(self._leaves))))

    def _copy(self, i: int) -> Any:
        leaf = self._leaves[i]
        if not isinstance(leaf, Tensor):
            return leaf
        held = self._copies.get(i)
        if held is not None and _is_unwritten(held) and not leaf.requires_grad:
            return held
        self._copies[i] = copy = leaf.clone()
        return copy


def _is_unwritten(copy: Tensor) -> bool:
    return is_concrete(copy) and not copy.is_inference() and copy._version == 0


class Attributes:
    """What the modules of a user's making remember besides parameters and buffers, as it was at first."""

    def __init__(self, module: nn.Module) -> None:
        self._parts: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        # Names, and identities of values, of modules that hold nothing that can be written into: between two
        # draws these are compared in two steps, where going through the names would take far more.
        self._unwritten: list[tuple[list[str], list[int]] | None] = []
        for part in module.modules():
            if not is_of_torch(part):
                attributes = vars(part)
                copied = {
                    name: _copied(value)
                    for name, value in attributes.items()
                    if name not in _MANAGED and _is_mutable(value)
                }
                passed_on = {name: value for name, value in attributes.items() if name not in copied}
                self._parts.append((attributes, passed_on, copied))
                identities = None if copied else ([*passed_on], [*map(id, passed_on.values())])
                self._unwritten.append(identities)
        self.restore()

    def restore(self) -> None:
        """Forget attributes that are new, and put the others back."""
        for (attributes, passed_on, copied), unwritten in zip(self._parts, self._unwritten, strict=True):
            if unwritten and ([*attributes], [*map(id, attributes.values())]) == unwritten:
                continue
            if len(attributes) != len(passed_on) + len(copied):
                for name in attributes.keys() - passed_on.keys() - copied.keys():
                    del attributes[name]
            for name, value in passed_on.items():
                if attributes.get(name) is not value:
                    attributes[name] = value
            for name, value in copied.items():
                if not (isinstance(value, Tensor) and _is_same(attributes.get(name), value)):
                    attributes[name] = _copied(value)


def _is_mutable(value: Any) -> bool:
    return isinstance(value, Tensor) or type(value) in (dict, list, tuple, set)


def _is_same(now: Any, first: Tensor) -> bool:
    """Whether an attribute is still the unwritten copy of ``first`` that it was made."""
    return isinstance(now, Tensor) and getattr(now, "_copy_of", None) is first and _is_unwritten(now)


def _copied(value: Any) -> Any:
    """Copy tensors and plain containers; anything else is passed on."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copy: Any = value.detach().clone()
        copy._copy_of = value
        return copy
    if type(value) is dict:
        return {key: _copied(entry) for key, entry in value.items()}
    for container in (list, tuple, set):
        if type(value) is container:
            return container(_copied(entry) for entry in value)
    return value
