"""Batches of data as functions of a seed: from tensors, or from a loader of the user's.

A *stream* is the sequence of batches that one network sees. Several networks trained together
have a stream each, or share one. Which rows meet in a batch depends on the stream's seed and on
the number of the epoch alone; torch's global random state, and the generators of a loader, are
left as they were.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import optree
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .._checks import positive_int
from .._random import fold, permutation
from .._tree import as_tree, num_rows
from ._batch import Batch, RaggedBatch, ready
from ._loader import Loader

Data = Any  # an (x, y) tuple of tensors, or a re-iterable of such pairs


class Source(Protocol):
    """Data that can be gone through again and again."""

    def num_data(self, seed: int) -> int:
        """Number ``N`` of rows; counting them may take a pass, in the order of ``seed``."""
        ...

    def epoch(
        self, seeds: Sequence[int], epoch: int, device: torch.device | None
    ) -> Iterator[Batch | RaggedBatch]:
        """Batches of one epoch for streams with these seeds."""
        ...


def open_data(data: Data, *, batch_size: int | None, num_streams: int, call: str) -> Source:
    """Check ``data`` and make it a source.

    Args:
        data: An ``(x, y)`` tuple of tensors, ``x`` any pytree whose tensors have one row an entry of
            their first axis; or a re-iterable of such pairs.
        batch_size: Rows a batch, for tensors; ``None`` for one batch of all rows.
        num_streams: How many networks will go through the data at the same time.
        call: Name of the public function, for messages.
    """
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[1], tuple | list):
        return _Tensors(*data, batch_size, call)
    if batch_size is not None:
        raise ValueError(
            f"`{call}(batch_size=...)` should be left out for data that come in batches, got {batch_size}."
        )
    _check_iterable(data, call)
    if num_streams > 1 and getattr(data, "persistent_workers", False) and getattr(data, "num_workers", 0):
        raise ValueError(
            f"`{call}(data=...)` should be a loader that {num_streams} members can go through at the same "
            "time, got a DataLoader with persistent_workers=True. Write `share_batches=True` or "
            "`persistent_workers=False`."
        )
    return Loader(data, call)


def _check_iterable(data: Any, call: str) -> None:
    if hasattr(type(data), "__next__"):  # not `iter(data) is data`: that would start a loader's workers
        raise TypeError(
            f"`{call}(data=...)` should be a re-iterable, got {type(data).__name__}, which can be gone "
            "through once. Write `list(data)`, or give a DataLoader."
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"`{call}(data=...)` should give batches, got {type(data).__name__}, which gives single rows. "
            "Write `DataLoader(dataset, batch_size=..., shuffle=True)`."
        )
    if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"`{call}(data=...)` should be an (x, y) tuple of tensors or a re-iterable of such batches, "
            f"got {type(data).__name__}."
        )


class _Tensors:
    """Rows held in tensors, shuffled anew each epoch; one batch of all rows is left in order."""

    def __init__(self, x: Any, y: Any, batch_size: int | None, call: str) -> None:
        if not isinstance(y, Tensor):
            raise TypeError(
                f"`{call}(data=(x, y))` should hold tensors, got {type(y).__name__} for y. "
                "Write `torch.as_tensor(y)`."
            )
        if batch_size is not None:
            batch_size = positive_int(batch_size, f"{call}(batch_size=...)")
        x = as_tree(x)
        self.n = _common_rows(x, y, call)
        self.batch_size = self.n if batch_size is None else min(batch_size, self.n)
        pair: Any = (x, y)
        self.leaves, self.spec = optree.tree_flatten(pair)

    def num_data(self, seed: int) -> int:
        del seed
        return self.n

    def epoch(self, seeds: Sequence[int], epoch: int, device: torch.device | None) -> Iterator[Batch]:
        if self.batch_size == self.n:
            yield Batch([ready(leaf, device) for leaf in self.leaves], self.spec, [None] * len(self.leaves))
            return
        orders = torch.stack([permutation(fold(fold(seed, "shuffle"), epoch), self.n) for seed in seeds])
        if len(seeds) == 1:
            orders = orders[0]
        for chosen in orders.split(self.batch_size, -1):
            leaves = [ready(_rows(leaf, chosen), device) for leaf in self.leaves]
            dims = [0 if len(seeds) > 1 and _has_rows(leaf) else None for leaf in self.leaves]
            yield Batch(leaves, self.spec, dims)


def _common_rows(x: Any, y: Tensor, call: str) -> int:
    tensors = [leaf for leaf in optree.tree_leaves(x) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            f"`{call}(data=(x, y))` should hold tensors, got {type(x).__name__} for x. "
            "Write `torch.as_tensor(x)`."
        )
    if num_rows((x, y)) is None or y.ndim == 0:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(
            f"`{call}(data=(x, y))` should hold as many rows of x as of y, got shapes {shapes} for x and "
            f"{tuple(y.shape)} for y."
        )
    if y.shape[0] == 0:
        raise ValueError(f"`{call}(data=(x, y))` should hold at least one row, got none.")
    return y.shape[0]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _rows(leaf: Any, chosen: Tensor) -> Any:
    return leaf[chosen.to(leaf.device)] if _has_rows(leaf) else leaf
