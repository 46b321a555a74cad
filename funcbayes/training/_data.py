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
from .._tree import as_tree, num_rows, taken
from ._batch import Batch, RaggedBatch, ready
from ._loader import Loader

Data = Any  # an (x, y) tuple of tensors, or a re-iterable of such pairs


class Source(Protocol):
    """Data that can be gone through again and again."""

    def num_data(self, seed: int) -> int:
        """Number ``N`` of rows; counting them may take a pass, in the order of ``seed``."""
        ...

    def num_batches(self, seed: int) -> int:
        """Number of batches an epoch; counting them may take a pass, in the order of ``seed``."""
        ...

    def epoch(
        self, seeds: Sequence[int], epoch: int, device: torch.device | None
    ) -> Iterator[Batch | RaggedBatch]:
        """Batches of one epoch for streams with these seeds."""
        ...

    def plain_batches(self, device: torch.device | None) -> Iterator[Batch]:
        """Every row, for looking at the data as they are: always the same batches, whatever the seeds.

        Of data in tensors a last row that would be alone joins the batch before.
        """
        ...


def open_data(
    data: Data,
    *,
    batch_size: int | None,
    num_streams: int,
    call: str,
    argument: str = "data",
    bootstrap: bool = False,
) -> Source:
    """Check ``data`` and make it a source.

    Args:
        data: An ``(x, y)`` tuple of tensors, ``x`` any pytree whose tensors have one row an entry of
            their first axis; or a re-iterable of such pairs.
        batch_size: Rows a batch, for tensors; ``None`` for one batch of all rows.
        num_streams: How many networks will go through the data at the same time.
        call: Name of the public function, for messages.
        argument: Name of the argument that ``data`` are.
        bootstrap: Whether each stream goes through a resample of its own, see :func:`bootstrap_rows`.
    """
    if are_tensors(data):
        return _Tensors(data[0], data[1], batch_size, call, argument, bootstrap)
    if bootstrap:
        raise ValueError(
            f"`{call}(bootstrap=True)` should be given data in tensors, which can be resampled, got "
            f"{type(data).__name__}. Write `data=(x, y)`, or give `training.fit` a loader over each resample."
        )
    if batch_size is not None:
        raise ValueError(
            f"`{call}(batch_size=...)` should be left out for data that come in batches, got {batch_size}."
        )
    _check_iterable(data, call, argument)
    if num_streams > 1 and getattr(data, "persistent_workers", False) and getattr(data, "num_workers", 0):
        raise ValueError(
            f"`{call}({argument}=...)` should be a loader that {num_streams} members can go through at the "
            "same time, got a DataLoader with persistent_workers=True. Write `share_batches=True` or "
            "`persistent_workers=False`."
        )
    return Loader(data, call, argument)


def are_tensors(data: Data) -> bool:
    """Whether data are given as ``(x, y)`` and not in batches."""
    return isinstance(data, tuple) and len(data) == 2 and not isinstance(data[1], tuple | list)


def bootstrap_rows(seed: int, num_rows: int) -> Tensor:
    """Rows of the bootstrap resample that training with ``bootstrap=True`` and this seed goes through.

    ``N`` rows drawn with replacement from ``N`` (Breiman 1996, "Bagging predictors"); row ``n`` counts as
    often as it is among them, so that their counts are multinomial.

    Args:
        seed: That of :func:`fit`; of member ``k`` of an ensemble, ``ensemble.member_seeds(seed, K)[k]``.
        num_rows: ``N``.

    Returns:
        Indices from 0 to ``N - 1``, int64 ``(N,)``.

    Raises:
        TypeError: If ``num_rows`` is no int.
        ValueError: If it is less than 1.

    Example:
        >>> from funcbayes import training
        >>> rows = training.bootstrap_rows(0, 100)
        >>> rows.shape, int(rows.max()) < 100
        (torch.Size([100]), True)
    """
    num_rows = positive_int(num_rows, "training.bootstrap_rows(num_rows=...)")
    generator = torch.Generator().manual_seed(fold(seed, "bootstrap") & (1 << 63) - 1)
    return torch.randint(num_rows, (num_rows,), generator=generator)


def _check_iterable(data: Any, call: str, argument: str) -> None:
    if hasattr(type(data), "__next__"):  # not `iter(data) is data`: that would start a loader's workers
        raise TypeError(
            f"`{call}({argument}=...)` should be a re-iterable, got {type(data).__name__}, which can be gone "
            "through once. Write `list(data)`, or give a DataLoader."
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"`{call}({argument}=...)` should give batches, got {type(data).__name__}, which gives single "
            "rows. Write `DataLoader(dataset, batch_size=..., shuffle=True)`."
        )
    if isinstance(data, Tensor) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        raise TypeError(
            f"`{call}({argument}=...)` should be an (x, y) tuple of tensors or a re-iterable of such "
            f"batches, got {type(data).__name__}."
        )


class _Tensors:
    """Rows held in tensors, shuffled anew each epoch; one batch of all rows is left in order."""

    def __init__(
        self, x: Any, y: Any, batch_size: int | None, call: str, argument: str, bootstrap: bool
    ) -> None:
        if not isinstance(y, Tensor):
            raise TypeError(
                f"`{call}({argument}=(x, y))` should hold tensors, got {type(y).__name__} for y. "
                "Write `torch.as_tensor(y)`."
            )
        if batch_size is not None:
            batch_size = positive_int(batch_size, f"{call}(batch_size=...)")
        x = as_tree(x)
        self.n = _common_rows(x, y, call, argument)
        self.batch_size = self.n if batch_size is None else min(batch_size, self.n)
        self.bootstrap = bootstrap
        pair: Any = (x, y)
        self.leaves, self.spec = optree.tree_flatten(pair)

    def num_data(self, seed: int) -> int:
        del seed
        return self.n

    def num_batches(self, seed: int) -> int:
        del seed
        return -(-self.n // self.batch_size)

    def epoch(self, seeds: Sequence[int], epoch: int, device: torch.device | None) -> Iterator[Batch]:
        if self.batch_size == self.n and not self.bootstrap:
            yield Batch([ready(leaf, device) for leaf in self.leaves], self.spec, [None] * len(self.leaves))
            return
        orders = torch.stack([self._order(seed, epoch) for seed in seeds])
        if len(seeds) == 1:
            orders = orders[0]
        for chosen in orders.split(self.batch_size, -1):
            chosen = chosen.contiguous()  # once, and not for every leaf
            leaves = [ready(_rows(leaf, chosen), device) for leaf in self.leaves]
            dims = [0 if len(seeds) > 1 and _has_rows(leaf) else None for leaf in self.leaves]
            yield Batch(leaves, self.spec, dims)

    def plain_batches(self, device: torch.device | None) -> Iterator[Batch]:
        starts = [*range(0, self.n, self.batch_size)]
        if len(starts) > 1 and self.batch_size > 1 and self.n - starts[-1] == 1:
            del starts[-1]  # a single row, which has no variance, joins the batch before
        for start, stop in zip(starts, [*starts[1:], self.n], strict=True):
            part = slice(start, stop)
            leaves = [leaf[part] if _has_rows(leaf) else leaf for leaf in self.leaves]
            yield Batch([ready(leaf, device) for leaf in leaves], self.spec, [None] * len(leaves))

    def _order(self, seed: int, epoch: int) -> Tensor:
        """Rows of an epoch, one after another."""
        rows = bootstrap_rows(seed, self.n) if self.bootstrap else torch.arange(self.n)
        if self.batch_size == self.n:
            return rows
        return rows[permutation(fold(fold(seed, "shuffle"), epoch), self.n)]


def _common_rows(x: Any, y: Tensor, call: str, argument: str) -> int:
    tensors = [leaf for leaf in optree.tree_leaves(x) if isinstance(leaf, Tensor)]
    if not tensors:
        raise TypeError(
            f"`{call}({argument}=(x, y))` should hold tensors, got {type(x).__name__} for x. "
            "Write `torch.as_tensor(x)`."
        )
    if num_rows((x, y)) is None or y.ndim == 0:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(
            f"`{call}({argument}=(x, y))` should hold as many rows of x as of y, got shapes {shapes} for x "
            f"and {tuple(y.shape)} for y."
        )
    if y.shape[0] == 0:
        raise ValueError(f"`{call}({argument}=(x, y))` should hold at least one row, got none.")
    return y.shape[0]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _rows(leaf: Any, chosen: Tensor) -> Any:
    return taken(leaf, chosen) if _has_rows(leaf) else leaf
