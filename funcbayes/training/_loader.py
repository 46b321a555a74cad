"""Batches made by a loader of the user's, as functions of a seed."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from .._global_random import global_generators, global_state
from .._random import fold
from .._tree import as_tree, num_rows
from ._batch import Batch, Pair, RaggedBatch, flat, stacked


class Loader:
    """Batches made by a re-iterable of the user's."""

    def __init__(self, data: Any, call: str, argument: str) -> None:
        self.data = data
        self.quoted = f"`{call}({argument}=...)`"
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

    def num_batches(self, seed: int) -> int:
        """Length of the loader if its data have one, otherwise a pass is counted."""
        # What a loader of an iterable data set says is a guess: workers may repeat rows, or share them.
        if not isinstance(getattr(self.data, "dataset", None), IterableDataset):
            try:
                return len(self.data)
            except TypeError:
                pass
        return sum(1 for _ in self._stream(fold(seed, "count"), 0))

    def epoch(
        self, seeds: Sequence[int], epoch: int, device: torch.device | None
    ) -> Iterator[Batch | RaggedBatch]:
        is_empty = True
        for pairs in itertools.zip_longest(*(self._stream(seed, epoch) for seed in seeds)):
            if any(pair is None for pair in pairs):
                raise RuntimeError(
                    f"{self.quoted} should give every member the same number of batches, but in "
                    f"epoch {epoch} some had more. Write `share_batches=True`."
                )
            is_empty = False
            yield stacked([flat(pair, device) for pair in pairs])
        if is_empty:
            raise ValueError(
                f"{self.quoted} should give at least one batch an epoch, got none in epoch "
                f"{epoch}. A DataLoader with drop_last=True gives none if the rows do not fill a batch."
            )

    def plain_batches(self, device: torch.device | None) -> Iterator[Batch]:
        for batch in self.epoch([0], 0, device):
            assert isinstance(batch, Batch)  # of one stream
            yield batch

    def _stream(self, seed: int, epoch: int) -> Iterator[Pair]:
        state = RandomState(_generators_of(self.data), fold(fold(seed, "loader"), epoch))
        if self.is_unstarted:
            with RandomState(_generators_of(self.data), fold(seed, "start")).installed():
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
            yield _as_pair(batch, self.quoted)


_END = object()


class RandomState:
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
        with global_state:
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


def _generators_of(loader: Any) -> list[torch.Generator]:
    sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _as_pair(batch: Any, quoted: str) -> Pair:
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
        shown = type(batch).__name__ + (f" of length {len(batch)}" if isinstance(batch, tuple | list) else "")
        raise TypeError(
            f"{quoted} should give batches (x, y) with a tensor y, got {shown}. "
            "Two tensors that hold all rows are written as a tuple, `data=(x, y)`."
        )
    x, y = as_tree(batch[0]), batch[1]
    rows = num_rows(x)
    if y.ndim == 0 or (rows is not None and rows != y.shape[0]):
        raise ValueError(
            f"{quoted} should give batches with as many rows of x as of y, got {rows} and "
            f"y of shape {tuple(y.shape)}."
        )
    return x, y
