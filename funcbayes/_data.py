"""Batches of data as functions of a seed: from tensors, or from a loader of the user's.

A *stream* is the sequence of batches that one network sees. Several networks trained together
have a stream each, or share one. Which rows meet in a batch depends on the stream's seed and on
the number of the epoch alone; torch's global random state, and the generators of a loader, are
left as they were.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import optree
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from . import _random
from ._random import fold, permutation
from ._tree import num_rows

Data = Any  # an (x, y) tuple of tensors, or a re-iterable of such pairs
Pair = tuple[Any, Tensor]


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
    return _Loader(data, call)


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
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`{call}(batch_size=...)` should be at least 1, got {batch_size}.")
        self.n = _common_rows(x, y, call)
        self.batch_size = self.n if batch_size is None else min(batch_size, self.n)
        pair: Any = (x, y)
        self.leaves, self.spec = optree.tree_flatten(pair)

    def num_data(self, seed: int) -> int:
        del seed
        return self.n

    def epoch(self, seeds: Sequence[int], epoch: int, device: torch.device | None) -> Iterator[Batch]:
        if self.batch_size == self.n:
            yield Batch([_ready(leaf, device) for leaf in self.leaves], self.spec, [None] * len(self.leaves))
            return
        orders = torch.stack([permutation(fold(fold(seed, "shuffle"), epoch), self.n) for seed in seeds])
        if len(seeds) == 1:
            orders = orders[0]
        for chosen in orders.split(self.batch_size, -1):
            leaves = [_ready(_rows(leaf, chosen), device) for leaf in self.leaves]
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


def _ready(leaf: Any, device: torch.device | None) -> Any:
    """``leaf`` on ``device``, in a form that autograd may save."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach() if device is None else leaf.detach().to(device)
    return leaf.clone() if leaf.is_inference() else leaf


class _Loader:
    """Batches made by a re-iterable of the user's."""

    def __init__(self, data: Any, call: str) -> None:
        self.data = data
        self.call = call
        # Starting workers draws a number that going on with them does not. So that an epoch does not
        # depend on whether it is the first, workers that persist are started by an extra one.
        self.is_unstarted = bool(getattr(data, "persistent_workers", False))

    def num_data(self, seed: int) -> int:
        """Length of the sampler where batches are made of its rows, otherwise a pass is counted."""
        batches = getattr(self.data, "batch_sampler", None)
        if isinstance(self.data, DataLoader) and type(batches) is BatchSampler:
            try:
                return len(batches.sampler)  # type: ignore[arg-type]  # where it has no length, see below
            except TypeError:
                pass
        return sum(y.shape[0] for _, y in self._stream(fold(seed, "count"), 0))

    def epoch(
        self, seeds: Sequence[int], epoch: int, device: torch.device | None
    ) -> Iterator[Batch | RaggedBatch]:
        is_empty = True
        for pairs in itertools.zip_longest(*(self._stream(seed, epoch) for seed in seeds)):
            if any(pair is None for pair in pairs):
                raise RuntimeError(
                    f"`{self.call}(data=...)` should give every member the same number of batches, but in "
                    f"epoch {epoch} some had more. Write `share_batches=True`."
                )
            is_empty = False
            yield _stacked([_flat(pair, device) for pair in pairs])
        if is_empty:
            raise ValueError(
                f"`{self.call}(data=...)` should give at least one batch an epoch, got none in epoch "
                f"{epoch}. A DataLoader with drop_last=True gives none if the rows do not fill a batch."
            )

    def _stream(self, seed: int, epoch: int) -> Iterator[Pair]:
        state = _RandomState(_generators_of(self.data), fold(fold(seed, "loader"), epoch))
        if self.is_unstarted:
            with _RandomState(_generators_of(self.data), fold(seed, "start")).installed():
                iter(self.data)
            self.is_unstarted = False
        with state.installed():
            batches = iter(self.data)
        while True:
            # Only around the loader's own work: between two batches the world is as it was.
            with state.installed():
                batch = next(batches, _END)
            if batch is _END:
                return
            yield _as_pair(batch, self.call)


_END = object()


class _RandomState:
    """The states of torch's global generators, and of a loader's, as one stream sees them."""

    def __init__(self, generators: Sequence[torch.Generator], key: int) -> None:
        self.generators = (*global_generators(), *generators)
        self.states = [
            torch.Generator(g.device).manual_seed(fold(key, i) & (1 << 63) - 1).get_state()
            for i, g in enumerate(self.generators)
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Run code that draws from the stream's states, then put back those found."""
        with _random._global_state:
            found = [g.get_state() for g in self.generators]
            self._install(self.states)
            try:
                yield
            finally:
                self.states = [g.get_state() for g in self.generators]
                self._install(found)

    def _install(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)


def global_generators() -> tuple[torch.Generator, ...]:
    """The generators of torch's global state, on the CPU and on devices in use."""
    on_devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return (torch.default_generator, *on_devices)


def _generators_of(loader: Any) -> list[torch.Generator]:
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _as_pair(batch: Any, call: str) -> Pair:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        shown = type(batch).__name__ + (f" of length {len(batch)}" if isinstance(batch, tuple | list) else "")
        raise TypeError(
            f"`{call}(data=...)` should give batches (x, y) with a tensor y, got {shown}. "
            "Two tensors that hold all rows are written as a tuple, `data=(x, y)`."
        )
    x, y = batch
    rows = num_rows(x)
    if y.ndim == 0 or (rows is not None and rows != y.shape[0]):
        raise ValueError(
            f"`{call}(data=...)` should give batches with as many rows of x as of y, got {rows} and "
            f"y of shape {tuple(y.shape)}."
        )
    return x, y


def _flat(pair: Any, device: torch.device | None) -> Batch:
    leaves, spec = optree.tree_flatten(pair)
    return Batch([_ready(leaf, device) for leaf in leaves], spec, [None] * len(leaves))


def _stacked(batches: list[Batch]) -> Batch | RaggedBatch:
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
