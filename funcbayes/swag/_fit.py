"""Training that collects snapshots."""

from collections.abc import Callable
from typing import Literal

import torch

from .._checks import check_model, positive_int
from .._functional import Model
from .._random import resolve_seed
from .._tree import (
    Fixed,
    Params,
    Where,
    concatenate,
    index,
    is_parameter,
    map_leaves,
    matcher,
    named_leaves,
    select,
)
from ..likelihoods import Likelihood
from ..posteriors import Gaussian
from ..training._data import Data, Source, open_data
from ..training._fit import for_one, with_member_axis
from ..training._loop import minimize
from ..training._objective import MapObjective
from ..training._options import Callback, Interval, MakeOptimizer, MakeScheduler, Options
from ..training._several import count_members, member_seeds, minimize_several
from ._posterior import check_scales, posterior
from ._state import State, init, update

_CALL = "swag.fit"


def fit(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    optimizer: MakeOptimizer,
    num_epochs: int,
    rank: int = 20,
    scale: float = 0.5,
    var_floor: float = 1e-30,
    start_epoch: int = 0,
    collect_every: int = 1,
    collect_interval: Literal["epoch", "step"] = "epoch",
    stacked: bool = False,
    batch_size: int | None = None,
    prior_precision: float = 0.0,
    num_data: int | None = None,
    where: Where | None = None,
    seed: int | None = None,
    scheduler: MakeScheduler | None = None,
    scheduler_interval: Interval = "epoch",
    max_grad_norm: float | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Gaussian:
    """Train, and fit a Gaussian to the snapshots passed on the way: SWAG, or MultiSWAG.

    Training is that of :func:`funcbayes.training.fit`, from ``params``, most often of a network that is
    trained already, by SGD with a constant and rather high learning rate.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``.
        params: Where training starts, not changed; it is no snapshot.
        data: As in :func:`funcbayes.training.fit`; with ``stacked`` as in :func:`funcbayes.ensemble.fit`.
        likelihood: ``p(y|f)``.
        optimizer: ``leaves -> torch.optim.Optimizer``.
        num_epochs: Passes through the data, those of ``start_epoch`` included.
        rank: How many of the last deviations the covariance has; 0 for a diagonal one.
        scale: Factor of the whole covariance: 0.5 for the paper's SWAG, 1.0 with ``rank=0`` for its
            SWAG-diagonal.
        var_floor: Least variance in the diagonal part, before ``scale``.
        start_epoch: Passes through the data before collecting begins.
        collect_every: A snapshot is taken at the end of every so many epochs, or steps, from then on. With a
            cyclic learning rate, the length of a cycle.
        collect_interval: What ``collect_every`` counts.
        stacked: Whether ``params`` are those of several networks, every leaf with a leading axis ``K`` (see
            :func:`funcbayes.ensemble.init`). They are trained at once where that is faster; network ``k``
            becomes, to rounding, what ``fit(fn, params_k, ...)`` with ``seed=member_seeds(seed, K)[k]``
            makes of it.
        batch_size: Rows a batch for data in tensors; ``None``: one batch of all rows, in order.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero on every parameter.
        num_data: The number ``N`` of rows, if it is not that of the data.
        where: Which leaves to train, and to be uncertain of; ``None`` for all. The others are held, and
            the Gaussian does not cover them: it is that of the chosen leaves given the others, which
            ``predict`` takes from ``params``.
        seed: Of the shuffling and of the dropout masks; ``None`` draws one.
        scheduler: ``optimizer -> LRScheduler``.
        scheduler_interval: Whether the scheduler steps every epoch or every step.
        max_grad_norm: Longer gradients are shortened to this norm, each network's by itself.
        chunk_size: With ``stacked``, how many networks are evaluated at a time, as in
            :func:`funcbayes.ensemble.fit`.
        compile: As for :func:`funcbayes.training.fit`.
        progress: Whether to show a bar over the epochs.
        callback: As in :func:`funcbayes.training.fit`; with ``stacked`` as in
            :func:`funcbayes.ensemble.fit`. A snapshot of the epoch is taken before.

    Returns:
        Gaussian over the trained leaves: see :func:`funcbayes.swag.posterior`. Its mean carries buffers
        that training changed (BatchNorm's statistics) as ``Fixed``, as they were at the last snapshot;
        :func:`funcbayes.refresh_batch_norm` finds those of draws. With ``stacked`` every leaf has a leading
        axis ``K``, factors ``(K, *s, R)``: ``mixture(posterior, stacked=True)`` makes one posterior of it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, there would be no snapshot, or data are empty.
        RuntimeError: If the loss or a parameter is no longer finite; or if the callback ends training before
            the first snapshot.

    Example:
        Snapshots at the ends of cycles of the learning rate, five epochs each, but for the first two:

        >>> import functools, torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> cosine = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
        >>> q = fb.swag.fit(
        ...     *(fn, params, (x, 3 * x), fb.likelihoods.Normal(1.0)),
        ...     optimizer=functools.partial(torch.optim.SGD, lr=0.5),
        ...     scheduler=functools.partial(cosine, T_0=5),
        ...     num_epochs=40,
        ...     start_epoch=10,
        ...     collect_every=5,
        ...     batch_size=5,
        ... )
        >>> q.covariance.factors["weight"].shape
        torch.Size([1, 1, 5])
    """
    check_scales(scale, var_floor, _CALL)
    start_epoch, collect_every = _check_collecting(start_epoch, num_epochs, collect_every, collect_interval)
    options = Options(
        call=_CALL,
        optimizer=optimizer,
        num_epochs=num_epochs,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        max_grad_norm=max_grad_norm,
        compile=compile,
        progress=progress,
        callback=for_one(callback) if callback is not None and not stacked else callback,
    )
    check_model(fn, _CALL)
    members = params if stacked else map_leaves(with_member_axis, params)
    num = count_members(members, f"{_CALL}(fn, params, ..., stacked=True)") if stacked else 1
    if chunk_size is not None:
        chunk_size = positive_int(chunk_size, f"{_CALL}(chunk_size=...)")
    source = open_data(data, batch_size=batch_size, num_streams=num, call=_CALL)
    seed = int(resolve_seed(seed))
    seeds = member_seeds(seed, num) if stacked else (seed,)
    _check_some_are_collected(source, seeds[0], num_epochs - start_epoch, collect_every, collect_interval)
    chosen = matcher(where)
    trained = {
        name for name, leaf in named_leaves(members).items() if is_parameter(leaf) and chosen(name, leaf)
    }
    if trained:  # else training will say so
        init(select(members, lambda name, _: name in trained), rank)  # refuses a rank that is none
    objective = MapObjective.over(fn, likelihood, source, seed, prior_precision, num_data, _CALL)
    collectors: list[_Collector] = []

    def watch(part: slice) -> _Collector:
        del part  # they come in order
        collectors.append(_Collector(trained, rank, start_epoch, collect_every, collect_interval))
        return collectors[-1]

    if stacked:
        minimize_several(
            *(objective, members, source, seeds, seeds, options),
            where=where,
            chunk_size=chunk_size,
            in_step=callback is not None,
            watch=watch,
        )
    else:
        minimize(objective, members, source, seeds, seeds, options, where=where, watcher=watch(slice(0, 1)))
    states = [collector.state for collector in collectors if collector.state is not None]
    if not states:
        raise RuntimeError(
            f"`{_CALL}(callback=...)` should let training go on to the first snapshot; it ended before."
        )
    with torch.inference_mode(False):
        state: State = concatenate(states)
        return posterior(state if stacked else index(state, 0), scale, var_floor)


class _Collector:
    """A watcher that updates a state of SWAG."""

    def __init__(
        self, trained: set[str], rank: int, start_epoch: int, collect_every: int, interval: str
    ) -> None:
        self.state: State | None = None
        self.trained, self.rank = trained, rank
        self.start_epoch, self.collect_every, self.interval = start_epoch, collect_every, interval
        self._epoch = self._count = 0

    def after_step(self, members: Callable[[], Params]) -> None:
        """Collect at the end of every so many steps."""
        if self.interval == "step":
            self._tick(members)

    def after_epoch(self, members: Callable[[], Params]) -> bool:
        """Collect at the end of every so many epochs."""
        if self.interval == "epoch":
            self._tick(members)
        self._epoch += 1
        return False

    def _tick(self, members: Callable[[], Params]) -> None:
        if self._epoch < self.start_epoch:
            return
        self._count += 1
        if self._count % self.collect_every == 0:
            snapshot = select(members(), lambda name, leaf: isinstance(leaf, Fixed) or name in self.trained)
            self.state = update(init(snapshot, self.rank) if self.state is None else self.state, snapshot)


def _check_collecting(start_epoch: int, num_epochs: int, every: int, interval: str) -> tuple[int, int]:
    every = positive_int(every, f"{_CALL}(collect_every=...)")
    num_epochs = positive_int(num_epochs, f"{_CALL}(num_epochs=...)")
    if interval not in ("epoch", "step"):
        raise ValueError(f"`{_CALL}(collect_interval=...)` should be 'epoch' or 'step', got {interval!r}.")
    start = start_epoch if start_epoch == 0 else positive_int(start_epoch, f"{_CALL}(start_epoch=...)")
    if start >= num_epochs:
        raise ValueError(
            f"`{_CALL}(start_epoch=...)` should be below `num_epochs={num_epochs}`, which it is a part of, "
            f"or there is no snapshot; got {start}."
        )
    return int(start), every


def _check_some_are_collected(source: Source, seed: int, num_epochs: int, every: int, interval: str) -> None:
    """Refuse to train for nothing."""
    if every <= num_epochs:
        return
    available = num_epochs * (source.num_batches(seed) if interval == "step" else 1)
    if every > available > 0:  # without any batches training refuses the data
        raise ValueError(
            f"`{_CALL}(collect_every=...)` should be at most {available}, the number of {interval}s after "
            f"`start_epoch`, or there is no snapshot; got {every}."
        )
