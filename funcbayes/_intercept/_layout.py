"""Whether a model may have its images in another layout than it was made for."""

from collections.abc import Callable
from typing import Any

import torch

from .._tree import tensors
from ._call import Interception
from ._views import Memory, reshapes, works_in_place, written


class LayoutWatch(Interception):
    """Raises ``RuntimeError`` where results may depend on how values lie in memory.

    Of `flatten`, `contiguous` and others it is a matter of the layout whether they give a view or a copy. So
    nothing that has gone through them, and nothing that came of it, should be written into afterwards; and a
    model should not ask for a layout.

    Attributes:
        reason: Why it has raised, for models that go on nevertheless.
    """

    def __init__(self) -> None:
        super().__init__({})
        self.reason: str | None = None
        self._passed = Memory()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Watch a function."""
        kwargs = kwargs or {}
        given = tensors(args[:1]) if args else tensors([kwargs.get("input"), kwargs.get("self")])
        if func in _OF_THE_LAYOUT or kwargs.get("memory_format") not in (None, torch.preserve_format):
            self._refuse("A layout is asked for.")
        if self._passed and works_in_place(func, kwargs):
            if not self._passed.isdisjoint(Memory(*written(args, kwargs))):
                self._refuse("A value is written into that may be a view of another one.")
        result = super().__torch_function__(func, types, args, kwargs)
        if reshapes(func, kwargs):
            self._passed |= Memory(*given, *tensors(result))
        return result

    def _refuse(self, reason: str) -> None:
        self.reason = reason
        raise RuntimeError(reason)


_OF_THE_LAYOUT: frozenset[Callable[..., Any]] = frozenset(
    (
        *(torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.dim_order),
        *(torch.Tensor.as_strided, torch.as_strided, torch.Tensor.as_strided_),
        *(torch.Tensor.resize_, torch.Tensor.resize_as_, torch.Tensor.set_),
        *(torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage),
        *(torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__),
    )
)
