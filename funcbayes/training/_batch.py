"""One step's rows, for one network or for several at once."""

from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

Pair = tuple[Any, Tensor]  # (x, y)


@dataclass(frozen=True)
class Batch:
    """One step's ``(x, y)`` of all streams, flattened.

    Attributes:
        leaves: The leaves of ``(x, y)``; tensors, most often.
        spec: Their structure.
        dims: For each leaf 0 if it has a leading axis over streams, ``None`` if they share it.
    """

    leaves: list[Any]
    spec: Any
    dims: list[int | None]

    @property
    def rows(self) -> int:
        """Number of rows of one stream."""
        return self.leaves[-1].shape[0 if self.dims[-1] is None else 1]

    def member(self, k: int) -> Pair:
        """``(x, y)`` of stream ``k``."""
        own = [leaf if dim is None else leaf[k] for leaf, dim in zip(self.leaves, self.dims, strict=True)]
        return self.spec.unflatten(own)

    def part(self, members: slice) -> "Batch":
        """The batch of some of the streams."""
        leaves = [
            leaf if dim is None else leaf[members] for leaf, dim in zip(self.leaves, self.dims, strict=True)
        ]
        return Batch(leaves, self.spec, self.dims)


@dataclass(frozen=True)
class RaggedBatch:
    """One step's ``(x, y)`` of streams whose shapes differ (sentences padded batch by batch, say)."""

    batches: list[Batch]

    @property
    def rows(self) -> Tensor:
        """Number of rows of each stream, ``(K,)``."""
        return torch.tensor([batch.rows for batch in self.batches])

    def member(self, k: int) -> Pair:
        """``(x, y)`` of stream ``k``."""
        return self.batches[k].member(0)


def ready(leaf: Any, device: torch.device | None) -> Any:
    """``leaf`` on ``device``, in a form that autograd may save."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach() if device is None else leaf.detach().to(device)
    return leaf.clone() if leaf.is_inference() else leaf


def flat(pair: Any, device: torch.device | None) -> Batch:
    """The batch of a single stream."""
    leaves, spec = optree.tree_flatten(pair)
    return Batch([ready(leaf, device) for leaf in leaves], spec, [None] * len(leaves))


def stacked(batches: list[Batch]) -> Batch | RaggedBatch:
    """One batch with an axis over streams, where the shapes allow it."""
    first = batches[0]
    if len(batches) == 1:
        return first
    if any(batch.spec != first.spec for batch in batches):
        return RaggedBatch(batches)
    leaves: list[Any] = []
    for parts in zip(*(batch.leaves for batch in batches), strict=True):
        if not all(isinstance(part, Tensor) and part.shape == parts[0].shape for part in parts):
            return RaggedBatch(batches)
        leaves.append(torch.stack(parts))
    return Batch(leaves, first.spec, [0] * len(leaves))
