"""Which functions of torch give views, which write in place, and where values lie in memory."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._functorch import physical
from .._tree import tensors


class Memory(set[StorageWeakRef]):
    """Where values lie in memory, which is not kept for that."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__(StorageWeakRef(physical(value).untyped_storage()) for value in values)


STRIDED = frozenset((torch.Tensor.as_strided, torch.as_strided))
_VIEWS = frozenset(
    (
        *(torch.Tensor.view, torch.Tensor.view_as, torch.Tensor.unflatten, torch.unflatten),
        *STRIDED,
    )
)
# Of these it depends on how a value lies in memory whether they give a view or a copy.
VIEWS_OR_COPIES = frozenset(
    (
        *(torch.Tensor.reshape, torch.Tensor.reshape_as, torch.Tensor.flatten, torch.Tensor.ravel),
        *(torch.Tensor.contiguous, torch.Tensor.to, torch.reshape, torch.flatten, torch.ravel),
    )
)
# Views in which the axes of a value no longer lie in memory one after another, or not in their order.
REARRANGING = frozenset(
    (
        *(torch.Tensor.permute, torch.Tensor.transpose, torch.Tensor.t, torch.Tensor.movedim),
        *(torch.Tensor.moveaxis, torch.Tensor.swapaxes, torch.Tensor.swapdims, torch.Tensor.adjoint),
        *(torch.permute, torch.transpose, torch.t, torch.movedim, torch.moveaxis, torch.swapaxes),
        *(torch.swapdims, torch.adjoint, *(getattr(torch.Tensor, n).__get__ for n in ("T", "mT", "H", "mH"))),
        *(torch.Tensor.__getitem__, torch.Tensor.select, torch.Tensor.narrow, torch.Tensor.chunk),
        *(torch.Tensor.split, torch.Tensor.tensor_split, torch.Tensor.unbind, torch.Tensor.unfold),
        *(torch.Tensor.diagonal, torch.Tensor.expand, torch.Tensor.expand_as),
        *(torch.select, torch.narrow, torch.chunk, torch.split, torch.tensor_split, torch.unbind),
        *(torch.diagonal,),
    )
)


def reshapes(func: Callable[..., Any], kwargs: dict[str, Any] | None) -> bool:
    """Whether a function gives a value that may be a view of its first argument, as that lies in memory."""
    if func is torch.Tensor.to:  # another dtype or device takes a copy
        return "memory_format" in (kwargs or {})
    return func in _VIEWS or func in VIEWS_OR_COPIES


def written(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> list[Tensor]:
    """The tensors that a function writes into if it works in place."""
    kwargs = kwargs or {}
    return tensors([args[:1] or [kwargs.get("input"), kwargs.get("self")], kwargs.get("out")])


def works_in_place(func: Callable[..., Any], kwargs: dict[str, Any] | None) -> bool:
    """Whether a function writes into its first argument, or into what it is told to."""
    return bool(kwargs and (kwargs.get("inplace") or kwargs.get("out") is not None)) or _is_in_place(func)


@functools.lru_cache(maxsize=1024)
def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS


_IN_PLACE_OPERATORS = frozenset(
    (
        *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__"),
        *("__imod__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"),
    )
)
