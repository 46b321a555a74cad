"""Pytrees: registration of our node types, paths, and taking trees apart and together again.

Trees are walked with optree, whose order of leaves (dict keys sorted) is the one used
everywhere in the package. ``torch.func`` flattens with its own module, in insertion order;
each class is registered with both, and no code flattens with one and rebuilds with the other.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform

import optree
import optree.registry
import torch
from torch import Tensor
from torch.utils import _pytree

Params = Any  # a pytree of tensors, most often dict[str, Tensor]
Where = str | Sequence[str] | Callable[[str, Any], bool]  # which leaves: see `matcher`
_T = TypeVar("_T")

NODE_TYPES: dict[str, type] = {}  # every class made by `pytree_dataclass`, by name, for saving


def static(**kwargs: Any) -> Any:
    """Declare a field that belongs to the tree structure, not to the leaves; it must be hashable."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree_dataclass(cls: type[_T]) -> type[_T]:
    """Make ``cls`` a frozen dataclass and register it as a pytree node with torch and optree.

    Fields are children unless declared with :func:`static`. Checks belong into ``__post_init__``:
    rebuilding a node skips it, because transforms put placeholders where tensors were.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # a dataclass since the line above
    children = tuple(f.name for f in fields if not f.metadata.get("static", False))
    statics = tuple(f.name for f in fields if f.metadata.get("static", False))

    def values(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, n) for n in children], tuple(getattr(node, n) for n in statics)

    def rebuild(kids: Iterable[Any], context: tuple[Any, ...]) -> Any:
        node = object.__new__(cls)
        for name, value in zip(children + statics, (*kids, *context), strict=True):
            object.__setattr__(node, name, value)
        return node

    def with_keys(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        kids, context = values(node)
        return [(_pytree.GetAttrKey(n), k) for n, k in zip(children, kids, strict=True)], context

    register: Any = optree.register_pytree_node  # its types ask for a collection, a dataclass is none
    _pytree.register_pytree_node(cls, values, rebuild, flatten_with_keys_fn=with_keys)
    register(
        cls,
        lambda node: (*values(node), children),
        lambda context, kids: rebuild(kids, context),
        namespace=optree.registry.__GLOBAL_NAMESPACE,
    )
    if "__repr__" not in vars(cls):
        cls.__repr__ = _short_repr  # type: ignore[method-assign]  # dataclass was told to make none
    if cls.__name__ in NODE_TYPES:
        raise ValueError(f"A node type called {cls.__name__!r} is registered already.")
    NODE_TYPES[cls.__name__] = cls
    return cls


def _short_repr(node: Any) -> str:
    """Show shapes and dtypes instead of numbers."""

    def show(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {show(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "(" + ", ".join(map(show, value)) + ")"
        return repr(value)

    fields = ((f.name, getattr(node, f.name)) for f in dataclasses.fields(node))
    return f"{type(node).__name__}({', '.join(f'{name}={show(value)}' for name, value in fields)})"


@pytree_dataclass
class Missing:
    """The type of :data:`MISSING`."""

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing()
"""Stands in a container that is not a dict for a leaf that a posterior does not cover.

It is a node without children, so transforms pass it by; ``None`` is not used for this because
torch and optree disagree about it. Compare with :func:`is_missing`: rebuilding makes new instances.
"""


@pytree_dataclass
class Fixed:
    """A value in ``params`` that belongs to the model but is no parameter: a BatchNorm mean, say.

    ``fn`` reads it like a parameter and ``vmap`` batches it, while everything that treats
    parameters (priors, gradients, curvature, moments, covariances) passes it by.

    Attributes:
        tensor: The value.
    """

    tensor: Tensor


def is_missing(value: Any) -> bool:
    """Whether ``value`` marks a leaf that is not there."""
    return isinstance(value, Missing)


def is_parameter(leaf: Any) -> bool:
    """Whether a leaf can be random or trained: a tensor of floating point, and not ``Fixed``."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _is_fixed(value: Any) -> bool:
    return isinstance(value, Fixed)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor | Fixed) or optree.tree_is_leaf(value)


def path_name(path: Iterable[Any]) -> str:
    """``("head", 0, "weight") -> "head.0.weight"``."""
    return ".".join(str(entry) for entry in path)


def named_leaves(tree: Params) -> dict[str, Any]:
    """Leaves by path, in the order of optree; a ``Fixed`` is one leaf.

    Raises:
        ValueError: If two leaves have one name, as in ``{"a.b": x, "a": {"b": y}}``.
    """
    if _is_flat(tree):
        return {name: tree[name] for name in sorted(tree)}
    whole: Any = tree
    paths, leaves, _ = optree.tree_flatten_with_path(whole, is_leaf=_is_fixed)
    named = {path_name(path): leaf for path, leaf in zip(paths, leaves, strict=True)}
    if len(named) < len(leaves):
        names = [path_name(path) for path in paths]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"Paths in a tree should differ, but two leaves are called {twice!r}.")
    return named


def _is_flat(tree: Any) -> bool:
    """Whether a tree is a dict of leaves by name: the most frequent one, which needs no walk."""
    return type(tree) is dict and all(
        isinstance(v, Tensor | Fixed) and isinstance(k, str) for k, v in tree.items()
    )


def parameters_of(tree: Any) -> dict[str, Tensor]:
    """The leaves that are parameters, by path: neither ``Fixed`` nor of integer type."""
    return {name: leaf for name, leaf in named_leaves(tree).items() if is_parameter(leaf)}


def map_leaves(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Apply ``f`` to the tensors of trees of one structure; it reaches inside ``Fixed``."""
    return optree.tree_map(f, tree, *rest)


def map_named(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """Apply ``f(name, leaf)``; a ``Fixed`` is one leaf."""
    if _is_flat(tree):
        return {name: f(name, leaf) for name, leaf in tree.items()}
    return optree.tree_map_with_path(lambda path, leaf: f(path_name(path), leaf), tree, is_leaf=_is_fixed)


def matcher(where: Where | None) -> Callable[[str, Any], bool]:
    """Turn ``where`` into a predicate ``(path, leaf) -> bool``.

    ``where`` is a glob on the path (``"head.*"``), a sequence of globs, a predicate, or ``None``
    for everything.
    """
    if where is None:
        return lambda path, leaf: True
    if callable(where):
        return where
    patterns = (where,) if isinstance(where, str) else tuple(where)
    return lambda path, leaf: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def select(tree: Any, keep: Callable[[str, Any], bool]) -> Any:
    """The part of ``tree`` whose leaves satisfy ``keep(path, leaf)``.

    Other leaves are left out of dicts, and are :data:`MISSING` in other containers.
    """

    def walk(node: Any, path: tuple[Any, ...]) -> Any:
        if is_missing(node):
            return node
        if _is_leaf(node):
            return node if keep(path_name(path), node) else MISSING
        if isinstance(node, dict):
            kept = {k: walk(v, (*path, k)) for k, v in node.items()}
            kept = {k: v for k, v in kept.items() if not is_missing(v)}
            return kept if kept or not path else MISSING
        kids, metadata, entries, unflatten = optree.tree_flatten_one_level(node)
        chosen = [walk(v, (*path, k)) for k, v in zip(entries, kids, strict=True)]
        return unflatten(metadata, chosen) if not path or not all(map(is_missing, chosen)) else MISSING

    return walk(tree, ())


def missing_path(tree: Any) -> str | None:
    """Path of a leaf that is missing from a container other than a dict; ``None`` if there is none."""
    if _is_flat(tree):
        return None
    whole: Any = tree
    paths, leaves, _ = optree.tree_flatten_with_path(whole, is_leaf=is_missing)
    return next((path_name(p) for p, leaf in zip(paths, leaves, strict=True) if is_missing(leaf)), None)


def merge(base: Any, overlay: Any) -> Any:
    """``base`` with the leaves that ``overlay`` has put in their place.

    Dict keys that only ``overlay`` has are added: so a draw brings a ``Fixed`` that ``base`` lacks.
    """
    if is_missing(overlay) or overlay is None:
        return base
    if isinstance(overlay, dict) and not overlay and base is not None:  # nothing, for any kind of base
        return base
    if is_missing(base) or base is None or isinstance(overlay, Tensor | Fixed):
        return overlay
    if isinstance(overlay, dict):
        added = {k: merge(base.get(k), v) for k, v in overlay.items()}
        return {**base, **added}
    if _is_leaf(overlay):
        return overlay
    under, _, _, _ = optree.tree_flatten_one_level(base)
    over, metadata, _, unflatten = optree.tree_flatten_one_level(overlay)
    return unflatten(metadata, [merge(b, o) for b, o in zip(under, over, strict=True)])


def as_tree(x: Any) -> Any:
    """A copy of ``x``, with mappings that are no dicts (a Hugging Face batch, say) as dicts.

    These are what transforms know; and a model may set an entry of what it is given. Leaves are not copied.
    """
    if x is None or isinstance(x, Tensor):
        return x
    if _is_flat(x):
        return dict(x)
    return optree.tree_map(lambda leaf: as_tree(dict(leaf)) if isinstance(leaf, Mapping) else leaf, x)


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree, those inside ``Fixed`` too."""
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def device_of(*trees: Any) -> torch.device | None:
    """Where the first floating-point tensor is; keys of noise are on the CPU wherever a model is."""
    return next((tensor.device for tensor in tensors(trees) if tensor.is_floating_point()), None)


def unbind(tree: _T) -> list[_T]:
    """The entries of the leading axis of every leaf, one tree each."""
    whole: Any = tree
    leaves, structure = optree.tree_flatten(whole)
    entries: list[Any] = [
        structure.unflatten(values) for values in zip(*(t.unbind(0) for t in leaves), strict=True)
    ]
    return entries


def index(tree: Any, i: int | slice | Tensor) -> Any:
    """Entry or entries ``i`` of the leading axis of every leaf; what is :func:`repeated` stays so."""

    def entries(leaf: Tensor) -> Tensor:
        if not isinstance(i, Tensor) or not i.ndim:
            return leaf[i]
        return repeated(leaf[0], len(i)) if is_repeated(leaf) else taken(leaf, i)

    return optree.tree_map(entries, tree)


def taken(leaf: Tensor, i: Tensor) -> Tensor:
    """``leaf[i]`` for numbers ``(...)`` from 0 on, faster on a CPU: whole entries are copied."""
    if not leaf.is_contiguous():  # whose layout would be lost
        return leaf[i.to(leaf.device)]
    found = leaf.index_select(0, i.to(leaf.device).reshape(-1))
    return found if i.ndim == 1 else found.unflatten(0, i.shape)


def repeated(leaf: Tensor, count: int) -> Tensor:
    """``leaf`` with a leading axis along which it is the same, without copies: all have one place."""
    return leaf.expand(max(count, 2), *leaf.shape)[:count]  # expanded to one entry, it would look like any


def is_repeated(leaf: Tensor) -> bool:
    """Whether the entries of the leading axis are one and the same: see :func:`repeated`."""
    return leaf.ndim > 0 and leaf.stride(0) == 0 and len(leaf) > 0


def concatenate(trees: Sequence[Any]) -> Any:
    """One tree whose leaves are those of ``trees``, which have one structure, one after another."""
    return trees[0] if len(trees) == 1 else optree.tree_map(lambda *leaves: torch.cat(leaves), *trees)


def stack(trees: Sequence[Any]) -> Any:
    """One tree whose leaves have a leading axis over ``trees``, which have one structure."""
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def difference(tree: Any, reference: Any) -> str | None:
    """In words how the leaves of ``tree`` differ from those of ``reference``; ``None`` if they agree.

    Compares paths, then shapes. Meant to end an error message.
    """
    here, there = named_leaves(tree), named_leaves(reference)
    for name in there:
        if name not in here:
            return f"{name!r} is missing"
    for name, leaf in here.items():
        if name not in there:
            return f"{name!r} is not expected"
        got, expected = _shape(leaf), _shape(there[name])
        if got != expected:
            return f"{name!r} has shape {got}, not {expected}"
    return None


def _shape(leaf: Any) -> tuple[int, ...]:
    value = leaf.tensor if isinstance(leaf, Fixed) else leaf
    return tuple(getattr(value, "shape", ()))


def num_rows(x: Any) -> int | None:
    """Length of the first axis that all tensors of ``x`` share; ``None`` if there is none."""
    sizes = {tensor.shape[0] for tensor in tensors(x) if tensor.ndim}
    return sizes.pop() if len(sizes) == 1 else None
