"""Keeping what a module writes into from outliving its call: its inputs, and its own attributes."""

import weakref
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
    """Hands out copies of inputs, the same ones again as long as nobody has written into them."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def copied(self, x: Any) -> Any:
        """``x`` in containers of its own, with tensors of its own."""
        if isinstance(x, Tensor):
            return self._copy(0, x)
        leaves, structure = optree.tree_flatten(as_tree(x))
        return structure.unflatten([self._copy(i, leaf) for i, leaf in enumerate(leaves)])

    def _copy(self, i: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        original, version, copy = self._held.get(i, (None, 0, leaf))
        if original is not None and original() is leaf and not leaf.requires_grad:
            if version == leaf._version and _is_unwritten(copy):
                return copy
        elif not is_concrete(leaf) or leaf.is_inference() or leaf.requires_grad:
            return leaf.clone()
        copy = leaf.clone()
        if _is_unwritten(copy):
            # Held only as long as the original lives.
            self._held[i] = (weakref.ref(leaf, lambda _: self._held.pop(i, None)), leaf._version, copy)
        return copy


def _is_unwritten(copy: Tensor) -> bool:
    return is_concrete(copy) and not copy.is_inference() and copy._version == 0


class Attributes:
    """What the modules of a user's making remember besides parameters and buffers, as it was at first."""

    def __init__(self, module: nn.Module) -> None:
        self._parts: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
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
        self.restore()

    def restore(self) -> None:
        """Forget attributes that are new, and put the others back."""
        for attributes, passed_on, copied in self._parts:
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
