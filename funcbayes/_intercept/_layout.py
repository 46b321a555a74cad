"""Whether a model may have its images in another layout than it was made for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._batching import RESHAPES, storage, works_in_place
from ._call import Interception


class LayoutWatch(Interception):
    """Raises ``RuntimeError`` where what a model computes depends on how its values lie in memory.

    A value in another layout is copied where it would be viewed. Then a model that writes into one of the two
    writes into one where it would into both.
    """

    def __init__(self) -> None:
        super().__init__({})
        self.copied: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Watch a function."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if self.copied and first is not None and works_in_place(func, kwargs):
            self._refuse_writing(first)
        result = super().__torch_function__(func, types, args, kwargs)
        if first is None or first.is_contiguous():
            return result
        if func in _OF_THE_LAYOUT:
            raise RuntimeError("The layout of a value is asked for.")
        if func in RESHAPES and isinstance(result, Tensor) and storage(first) != storage(result):
            self.copied += [first, result]
        return result

    def _refuse_writing(self, target: Tensor) -> None:
        if any(storage(target) == storage(value) for value in self.copied):
            raise RuntimeError("A value in another layout cannot be written into through its view.")


_OF_THE_LAYOUT: frozenset[Callable[..., Any]] = frozenset(
    (
        *(torch.Tensor.stride, torch.Tensor.is_contiguous, torch.Tensor.as_strided, torch.as_strided),
        *(torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage, torch.Tensor.numpy),
    )
)
