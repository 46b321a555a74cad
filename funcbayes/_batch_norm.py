"""BatchNorm statistics for weights that no training step has seen."""

import dataclasses
import functools
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from ._checks import check_model, positive_int
from ._functional import Model, batch_statistics
from ._global_random import forked
from ._intercept import Batching, Observed
from ._mapping import equal_parts, in_parts
from ._tree import (
    Fixed,
    Params,
    concatenate,
    device_of,
    index,
    map_leaves,
    merge,
    named_leaves,
    select,
    stack,
)
from ._warning import first_line, levels_to_the_user
from .posteriors import Ensemble, Mixture
from .training._batch import Batch
from .training._data import Data, Source, open_data

_CALL = "refresh_batch_norm"
_Members = TypeVar("_Members", Ensemble, Mixture)


def refresh_batch_norm(
    fn: Model,
    params: Params | None,
    ensemble: _Members,
    data: Data,
    *,
    batch_size: int | None = None,
    chunk_size: int | None = None,
) -> _Members:
    """Find the BatchNorm statistics of every member of an ensemble, by one pass over the data.

    Draws of a Gaussian, and averages of weights, need statistics of their own: those of training belong to
    other weights (Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization",
    section 3.2, https://arxiv.org/abs/1803.05407; Maddox et al. 2019, section 3.2). Each layer normalises by
    the batch, as in training, without dropout; the new statistics are the means of those of the batches,
    weighted by rows. With batches of equal sizes this is what ``torch.optim.swa_utils.update_bn`` does.

    Args:
        fn: Pure model.
        params: What the members do not cover; may be ``None``.
        ensemble: Members, of ``to_ensemble(posterior, num_samples)`` say; or a mixture of ensembles, as it
            makes of members that cover different leaves. Their effects play no part.
        data: As in :func:`funcbayes.training.fit`. Tensors are gone through in order; a loader is given the
            same random state at every call. ``y`` is not used.
        batch_size: Rows a batch, for data in tensors; ``None`` for one batch of all rows. Larger batches give
            a better estimate of the variance. A last batch of one row, which has none, joins the one before.
        chunk_size: Members evaluated at a time; ``None`` to choose by the sizes of intermediates.

    Returns:
        The ensemble, or mixture, with the same weights, whose members hold the statistics as ``Fixed``,
        leaves ``(K, ...)``, and the number of batches where a layer counts them. A model without running
        statistics leaves the ensemble as it is. Nothing is changed in place.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If data are empty, ``batch_size`` is out of range, or the model cannot take a batch of
            one row.
        RuntimeError: If statistics are not finite.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, params = fb.make_functional(
        ...     torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
        ... )
        >>> members = {name: leaf.expand(3, *leaf.shape) for name, leaf in params.items()}
        >>> x = torch.tensor([[1.0], [2.0], [6.0]])
        >>> refreshed = fb.refresh_batch_norm(fn, None, fb.Ensemble(members), (x, x))
        >>> refreshed.members["0.running_mean"].tensor.flatten()
        tensor([3., 3., 3.])
    """
    check_model(fn, _CALL)
    parts = _ensembles(ensemble)
    if chunk_size is not None:
        chunk_size = positive_int(chunk_size, f"{_CALL}(chunk_size=...)")
    source = open_data(data, batch_size=batch_size, num_streams=1, call=_CALL)
    refreshed = [_refreshed(fn, params, part, source, chunk_size) for part in parts]
    if all(new is part for new, part in zip(refreshed, parts, strict=True)):
        return ensemble
    if isinstance(ensemble, Mixture):
        return dataclasses.replace(ensemble, components=tuple(refreshed))
    return refreshed[0]


def _ensembles(given: Any) -> list[Ensemble]:
    parts: Any = given.components if isinstance(given, Mixture) else (given,)
    for part in parts:
        if not isinstance(part, Ensemble):
            found = f"a Mixture with a {type(part).__name__}" if part is not given else type(part).__name__
            raise TypeError(
                f"`{_CALL}(fn, params, ensemble, data)` should be given an Ensemble, or a Mixture of such, "
                f"got {found}. Write `to_ensemble(posterior, num_samples)`."
            )
    return list(parts)


def _refreshed(
    fn: Model, params: Params | None, ensemble: Ensemble, source: Source, chunk_size: int | None
) -> Ensemble:
    with torch.inference_mode(False), torch.no_grad():
        run = _Run(fn, params, ensemble, chunk_size)
        total, num_rows, num_batches = None, 0, 0
        for batch in source.plain_batches(device_of(ensemble.members, params)):
            if num_batches == 0 and not run.has_statistics(batch):
                return ensemble
            num_rows, num_batches = num_rows + batch.rows, num_batches + 1
            found = run.statistics(batch)
            moved = functools.partial(_towards, weight=batch.rows / max(num_rows, 1))
            total = found if total is None else map_leaves(moved, total, found)
        if not num_batches:
            raise ValueError(f"`{_CALL}(data=...)` should give at least one batch, got none.")
        for name, leaf in named_leaves(total).items():
            if not bool(leaf.tensor.isfinite().all()):
                raise RuntimeError(
                    f"The statistics {name!r} in `{_CALL}` are not finite. Look for members or inputs that "
                    "are not, or too large."
                )
        counts = map_leaves(lambda count: torch.full_like(count, num_batches), run.counts)
        counts = map_leaves(lambda count: count.expand(run.num_members, *count.shape).clone(), counts)
        members = merge(merge(ensemble.members, total), counts)
        return dataclasses.replace(ensemble, members=members)


def _towards(mean: Tensor, new: Tensor, weight: float) -> Tensor:
    return mean + (new - mean) * weight


class _Run:
    """Evaluates the members on batches, at once where ``vmap`` can.

    Attributes:
        counts: The layers' counts of batches, without an axis of members: a layer may read its count as a
            number, which ``vmap`` does not allow for what it maps over.
    """

    def __init__(self, fn: Model, params: Params | None, ensemble: Ensemble, chunk_size: int | None) -> None:
        self.fn, self.params, self.chunk_size = fn, {} if params is None else params, chunk_size
        self.members, self.num_members = ensemble.members, ensemble.num_members
        self.counts: Params = {}
        self._start: Params = {}
        self._parts: list[slice] | None = None  # which members together, once it is known
        self._kind = "loop" if chunk_size == 1 or self.num_members == 1 else None

    def has_statistics(self, batch: Batch) -> bool:
        """Evaluate the first member, to see which statistics there are."""
        found = self._alone(0, batch)
        if not named_leaves(found):
            return False
        self.counts = map_leaves(torch.zeros_like, select(found, _is_count))
        statistics = map_leaves(torch.zeros_like, select(found, _is_statistic))
        # Under vmap what a member writes into has to have an axis of members.
        self._start = map_leaves(lambda s: s.expand(self.num_members, *s.shape).clone(), statistics)
        return True

    def statistics(self, batch: Batch) -> Params:
        """Those of one batch, leaves ``(K, ...)``."""
        if batch.rows == 1:
            self._alone(0, batch)  # what no member can be evaluated on is no fault of `vmap`
        while self._kind != "loop":
            kind = self._kind or ("channels_last" if batch.rows >= 4 else "rows_first")
            try:
                if self._parts is None:
                    self._parts = self._chosen_parts(batch)
                found = [self._together(part, batch, kind) for part in self._parts]
                return concatenate(found)
            except Exception as error:  # of a batching rule, or of `vmap`; a loop that works is an answer
                if kind == "vmap":
                    self._warn(error)
                self._kind = "loop" if kind == "vmap" else "vmap"
        return stack([select(self._alone(k, batch), _is_statistic) for k in range(self.num_members)])

    def _alone(self, k: int, batch: Batch) -> Params:
        try:
            with forked(0):  # a model may draw noise in training
                return self._one(index(self.members, k), index(self._start, k), batch)
        except Exception as err:  # whatever a layer raises that has one value to normalise by
            if batch.rows != 1:
                raise
            raise ValueError(
                f"`{_CALL}(data=...)` should give batches of several rows to a model that cannot take a "
                "single one, as BatchNorm1d cannot; got a batch of one row. Write `drop_last=True` for a "
                "loader, or choose another batch size."
            ) from err

    def _one(self, member: Params, start: Params, batch: Batch) -> Params:
        params = merge(merge(self.params, member), merge(start, self.counts))
        return batch_statistics(self.fn, params, batch.member(0)[0])

    def _chosen_parts(self, batch: Batch) -> list[slice]:
        num, size, seen = self.num_members, self.chunk_size, Observed()
        if size is not None:
            return in_parts(slice(0, num), size)
        self._together(slice(0, 1), batch, "vmap", seen)
        return equal_parts(num, seen.nbytes, device_of(self.members) or torch.device("cpu"))

    def _together(self, part: slice, batch: Batch, kind: str, seen: Observed | None = None) -> Params:
        rules = Batching(kind, seen)

        def one(member: Params, start: Params) -> Params:
            with rules:
                return select(self._one(member, start, batch), _is_statistic)

        return vmap(one)(index(self.members, part), index(self._start, part))

    def _warn(self, error: Exception) -> None:
        reason = first_line(error)
        warnings.warn(
            f"`{_CALL}` evaluates the members one by one, because `vmap` cannot take the model: {reason}",
            stacklevel=levels_to_the_user(),
        )


def _is_statistic(name: str, leaf: Any) -> bool:
    return isinstance(leaf, Fixed) and leaf.tensor.is_floating_point()


def _is_count(name: str, leaf: Any) -> bool:
    return not _is_statistic(name, leaf)
