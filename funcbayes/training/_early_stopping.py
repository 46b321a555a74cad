"""Keeping each network at the epoch at which it predicts held-out rows best."""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.func import vmap

from .._functional import Model
from .._global_random import forked, watched
from .._intercept import Batching, Observed
from .._mapping import equal_parts, in_parts
from .._tree import Params, device_of, index, map_leaves, tensors
from ..likelihoods import Likelihood
from ..likelihoods._layout import wide
from ._batch import Batch, Pair
from ._data import Data, Source, are_tensors, open_data

_ROWS = 1024  # evaluated at a time, of data in tensors


def open_rows(data: Data, call: str, argument: str) -> Source:
    """Data that are evaluated and not trained on: tensors are taken in blocks of rows."""
    rows = _ROWS if are_tensors(data) else None
    return open_data(data, batch_size=rows, num_streams=1, call=call, argument=argument)


class EarlyStopping:
    """A watcher that keeps the best epoch of each network, and counts epochs without a better one.

    Networks that have had ``patience`` such epochs are done: their best is kept whatever comes later, so it
    is the same whether they are trained alone or beside others that go on.

    Attributes:
        is_done: Which networks are done, ``(K,)``.
    """

    def __init__(
        self, validation: "Validation", patience: int | None, num_networks: int, member: int | None = None
    ) -> None:
        self.validation, self.patience, self.member = validation, patience, member
        self.is_done = torch.zeros(num_networks, dtype=torch.bool)
        self._best: Params = None
        self._lowest = torch.full((num_networks,), torch.inf, dtype=torch.float64)
        self._waited = torch.zeros(num_networks, dtype=torch.long)

    def after_step(self, members: Callable[[], Params]) -> None:
        """Do nothing: epochs count."""

    def after_epoch(self, members: Callable[[], Params]) -> bool:
        """Compare; end when all are done."""
        present = members()
        nll = self.validation(present)
        # NaN compares false, and -inf is no likelihood of anything that was learned.
        is_better = (nll < self._lowest) & nll.isfinite() & ~self.is_done
        self._lowest = torch.where(is_better, nll, self._lowest)
        if self._best is None:
            self._best = map_leaves(torch.clone, present)
        elif bool(is_better.any()):
            self._best = map_leaves(functools.partial(_chosen, is_better), present, self._best)
        self._waited = torch.where(is_better, 0, self._waited + 1)
        if self.patience is not None:
            self.is_done = self.is_done | (self._waited >= self.patience)
        return bool(self.is_done.all())

    def best(self) -> Params:
        """Networks at their best epochs, every leaf with a leading axis ``K``."""
        found = self._lowest.isfinite()
        if not bool(found.all()):
            k = int((~found).nonzero()[0]) if len(found) > 1 else self.member
            raise RuntimeError(
                f"The mean log likelihood of `{self.validation.call}(validation=...)` is not finite after "
                f"any epoch{'' if k is None else f' for member {k}'}. A lower learning rate, or "
                "`max_grad_norm=1.0`, usually helps."
            )
        return self._best


def _chosen(is_chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(is_chosen.to(new.device).reshape(-1, *(1 for _ in new.shape[1:])), new, old)


class Validation:
    """Mean negative log likelihood of several networks over held-out rows.

    All networks are evaluated in one vectorised pass, or in as many as keep to the budget of training; one
    by one if ``vmap`` cannot take the model, of which training warns.
    """

    def __init__(
        self,
        fn: Model,
        likelihood: Likelihood,
        data: Data,
        members: Params,
        *,
        call: str,
        chunk_size: int | None = None,
    ) -> None:
        """Look at the first rows, to refuse what cannot be evaluated before work starts."""
        self.fn, self.likelihood = fn, likelihood
        self.chunk_size, self.call = chunk_size, call
        self.source = open_rows(data, call, "validation")
        self.device = device_of(members)
        self._kind: str | None = None  # which batching rules; "loop" for none at all
        self._parts: list[slice] | None = None  # which networks together, once it is known
        with torch.no_grad(), torch.inference_mode(False):
            x, y = next(iter(self._batches())).member(0)
            with forked(0):
                outputs, self._draws_globally = watched(lambda: fn(index(members, 0), x))
            likelihood.check(outputs, y, call=f"{call}(validation=...)")
        if self._draws_globally or chunk_size == 1:
            self._kind = "loop"

    def __call__(self, members: Params) -> Tensor:
        """Return one number a network, float64 ``(K,)``."""
        sums, rows = [], 0
        with torch.no_grad():
            for batch in self._batches():
                sums.append(self._summed(members, batch))
                rows += batch.rows
        return -torch.stack(sums).cpu().double().sum(0) / rows

    def _batches(self) -> Iterator[Batch]:
        return self.source.plain_batches(self.device)

    def _summed(self, members: Params, batch: Batch) -> Tensor:
        """Log likelihood of a batch, summed over its rows, ``(K,)``."""
        pair = batch.member(0)
        num = tensors(members)[0].shape[0]
        while num > 1 and self._kind != "loop":
            kind = self._kind or ("channels_last" if batch.rows >= 4 else "rows_first")
            try:
                if self._parts is None:
                    seen = Observed()
                    self._together(index(members, slice(0, 1)), pair, kind, seen)
                    self._parts = self._chosen_parts(num, seen.nbytes)
                return torch.cat([self._together(index(members, part), pair, kind) for part in self._parts])
            except Exception:  # of a batching rule, or of `vmap`; the model's own comes again below
                self._kind = "loop" if kind == "vmap" else "vmap"
        return torch.stack([self._one(index(members, k), pair) for k in range(num)])

    def _chosen_parts(self, num: int, largest: int) -> list[slice]:
        if self.chunk_size is None:
            return equal_parts(num, largest, self.device or torch.device("cpu"))
        return in_parts(slice(0, num), self.chunk_size)

    def _together(self, members: Params, pair: Pair, kind: str, seen: Observed | None = None) -> Tensor:
        rules = Batching(kind, seen)

        def one(params: Params) -> Tensor:
            with rules:
                return self._one(params, pair)

        return vmap(one)(members)

    def _one(self, params: Params, pair: Pair) -> Tensor:
        x, y = pair
        # A model may draw noise in evaluation too: every network, in any company, gets the same.
        with forked(0) if self._draws_globally else nullcontext():
            outputs = self.fn(params, x)
        return self.likelihood.log_prob(wide(outputs), y).sum()
