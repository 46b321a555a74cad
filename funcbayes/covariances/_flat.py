"""Trees as vectors: linear algebra sees one vector ``(P,)``, or ``k`` of them as columns ``(P, k)``.

It runs in double precision whatever the leaves have: products of factors square their condition, and where a
diagonal is small beside the factors, differences of large numbers are what a density is made of.
"""

import functools

import torch
from torch import Tensor

from .._tree import Params, map_leaves, map_named, named_leaves


def dtype_of(tree: Params) -> torch.dtype:
    """The dtype that the leaves promote to."""
    dtypes = [leaf.dtype for leaf in named_leaves(tree).values()]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.get_default_dtype()


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(dtype, torch.float32)


def ravel(tree: Params, like: Params) -> Tensor:
    """Leaves ``s`` as one vector ``(P,)``, in the order of ``like``."""
    return _joined([leaf.reshape(-1) for leaf in _ordered(tree, like)], (0,))


def ravel_columns(tree: Params, like: Params) -> Tensor:
    """Leaves ``(*s, k)`` as one matrix ``(P, k)``, likewise."""
    return _joined([as_columns(leaf) for leaf in _ordered(tree, like)], (0, 0))


def _ordered(tree: Params, like: Params) -> list[Tensor]:
    named = named_leaves(tree)
    return [named[name] for name in named_leaves(like)]


def _joined(leaves: list[Tensor], empty: tuple[int, ...]) -> Tensor:
    leaves = [as_double(leaf) for leaf in leaves]
    if len(leaves) == 1:
        return leaves[0]  # not copied once more
    return torch.cat(leaves) if leaves else torch.zeros(empty, dtype=torch.float64)


def as_double(tensor: Tensor) -> Tensor:
    """In double precision, or single on devices that have no more."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def as_columns(leaf: Tensor) -> Tensor:
    """A leaf ``(*s, k)`` as a matrix ``(n, k)``: a view where ``k`` is innermost or outermost in memory."""
    return leaf.reshape(leaf.shape[:-1].numel(), leaf.shape[-1])


def unravel(vector: Tensor, like: Params) -> Params:
    """Undo :func:`ravel`: leaves with the shapes and dtypes of ``like``."""
    names = named_leaves(like)
    parts = dict(zip(names, vector.split([leaf.numel() for leaf in names.values()]), strict=True))
    return map_named(lambda name, leaf: parts[name].reshape(leaf.shape).to(leaf.dtype), like)


def without_columns(tree: Params) -> Params:
    """Placeholders ``s`` for leaves ``(*s, k)``, without numbers of their own."""
    return map_leaves(lambda leaf: leaf.new_empty(()).expand(leaf.shape[:-1]), tree)
