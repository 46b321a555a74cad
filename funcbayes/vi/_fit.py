"""Fitting a Gaussian by gradient ascent on the ELBO."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_covers, check_model, positive_int
from .._functional import Model
from .._random import resolve_seed
from .._tree import (
    Fixed,
    Params,
    Where,
    index,
    map_leaves,
    merge,
    named_leaves,
    select,
    stack,
)
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..posteriors import Gaussian
from ..priors._given import HasLogProb, checked_prior
from ..training._data import Data, open_data
from ..training._fit import with_member_axis
from ..training._loop import minimize
from ..training._options import Interval, MakeOptimizer, MakeScheduler, Options
from ..training._several import count_members, member_seeds, minimize_several
from ._elbo import Estimator, check_estimator
from ._init import Family, init
from ._objective import Inspector, NegativeElbo, Watch, elbo_over, held
from ._schedules import Schedule
from ._state import VariationalState, check_state, posterior

_CALL = "vi.fit"
Callback = Callable[[int, Any, VariationalState], bool | None]


def fit(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    optimizer: MakeOptimizer,
    num_epochs: int,
    family: Family = "diag",
    where: Where | None = None,
    rank: int = 10,
    init_scale: float = 1e-2,
    start: VariationalState | None = None,
    prior_precision: Any = 1.0,
    prior: HasLogProb | None = None,
    num_data: int | None = None,
    batch_size: int | None = None,
    num_samples: int = 1,
    estimator: Estimator = "reparam",
    kl_weight: float | Schedule = 1.0,
    keep_best: bool = False,
    stacked: bool = False,
    seed: int | None = None,
    scheduler: MakeScheduler | None = None,
    scheduler_interval: Interval = "epoch",
    max_grad_norm: float | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Gaussian:
    """Fit a Gaussian over parameters to where the ELBO is largest.

    Descends on :func:`negative_elbo` divided by the number ``N`` of rows, so that learning rates do not
    depend on the size of the data. As in :func:`funcbayes.training.fit` dropout is active, with masks that
    are a function of the seed, and BatchNorm uses the statistics of the batch.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``. One that ``vmap`` cannot take is evaluated draw by draw,
            with a warning.
        params: Where the mean starts, of a network at random or one that is trained; not changed.
        data: As in :func:`funcbayes.training.fit`.
        likelihood: ``p(y|f)``.
        optimizer: ``leaves -> torch.optim.Optimizer``. ``leaves`` are those of the state, ordered by path:
            first the means, then what the scales are made of.
        num_epochs: Passes through the data.
        family: Structure of the covariance: see :func:`init`.
        where: Which leaves are uncertain; ``None`` for all. The others are held as they are in ``params``,
            and the Gaussian does not cover them.
        rank: Of ``"low_rank"``.
        init_scale: Standard deviation at the start.
        start: A state to start from, as :func:`moped` gives; then ``family``, ``where``, ``rank`` and
            ``init_scale`` are left out.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero: one number, or a tree with
            one for each leaf.
        prior: Another prior, in the place of ``prior_precision``: one of :mod:`funcbayes.priors`, or any
            Gaussian over the covered leaves.
        num_data: The number ``N`` of rows, if it is not that of the data.
        batch_size: Rows a batch for data in tensors; ``None``: one batch of all rows, in order.
        num_samples: Draws of each step, all in vectorised passes.
        estimator: Of the gradient: see :func:`negative_elbo`.
        kl_weight: Factor of the KL: a number, or a function of the number of the step, such as
            :func:`linear_warmup`, :func:`cyclical` or :func:`halving`.
        keep_best: Whether the result is the state after the epoch with the largest ELBO, with a weight of 1,
            instead of the last. It is found in evaluation mode, with the same draws every time: one more
            pass through the data an epoch.
        stacked: Whether ``params`` are those of several networks, every leaf with a leading axis ``K`` (see
            :func:`funcbayes.ensemble.init`). They are fitted at once where that is faster; network ``k``
            becomes, to rounding, what ``fit(fn, params_k, ...)`` with ``seed=member_seeds(seed, K)[k]`` makes
            of it.
        seed: Of the draws, the shuffling and the dropout masks; ``None`` draws one.
        scheduler: ``optimizer -> LRScheduler``.
        scheduler_interval: Whether the scheduler steps every epoch or every step.
        max_grad_norm: Longer gradients are shortened to this norm, each network's by itself.
        chunk_size: Draws of one pass, and with ``stacked`` networks; ``None`` to choose by sizes.
        compile: Whether each step's loss and gradient are found by a compiled program: see
            :func:`funcbayes.training.fit`.
        progress: Whether to show a bar over the epochs, with the ELBO.
        callback: ``(epoch, elbo, state)`` after every epoch, with the mean over its steps of the estimated
            ELBO, a float, in which the KL has the weight of the step, and a copy of the state;
            :func:`posterior` makes a Gaussian of it. With ``stacked`` ELBOs ``(K,)`` and a state whose leaves
            have a leading axis ``K``. Fitting ends when it returns ``True``.

    Returns:
        Gaussian over the covered leaves. Its mean carries buffers that training changed (BatchNorm's
        statistics) as ``Fixed``. With ``stacked`` every leaf has a leading axis ``K``: ``mixture(posterior,
        stacked=True)`` makes one posterior of it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, a leaf cannot have the family, or data are empty.
        DivergedError: If the ELBO is no longer finite: with the step, the term and the last finite state.

    Example:
        >>> import functools, torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> adam = functools.partial(torch.optim.Adam, lr=0.05)
        >>> normal = fb.likelihoods.Normal(0.5)
        >>> q = fb.vi.fit(fn, params, (x, 3 * x), normal, optimizer=adam, num_epochs=200, seed=0)
        >>> bool((q.mean["weight"] - 3).abs() < 0.5)
        True
    """
    networks = fit_networks(
        *(fn, params, data, likelihood),
        optimizer=optimizer,
        num_epochs=num_epochs,
        family=family,
        where=where,
        rank=rank,
        init_scale=init_scale,
        start=start,
        prior_precision=prior_precision,
        prior=prior,
        num_data=num_data,
        batch_size=batch_size,
        num_samples=num_samples,
        estimator=estimator,
        kl_weight=kl_weight,
        keep_best=keep_best,
        stacked=stacked,
        seed=seed,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        max_grad_norm=max_grad_norm,
        chunk_size=chunk_size,
        compile=compile,
        progress=progress,
        callback=callback,
    )
    with torch.inference_mode(False):
        gaussians = [_gaussian(network) for network in networks]
        return stack(gaussians) if stacked else gaussians[0]


def fit_networks(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    optimizer: MakeOptimizer,
    num_epochs: int,
    family: Family = "diag",
    where: Where | None = None,
    rank: int = 10,
    init_scale: float = 1e-2,
    start: VariationalState | None = None,
    prior_precision: Any = 1.0,
    prior: HasLogProb | None = None,
    num_data: int | None = None,
    batch_size: int | None = None,
    num_samples: int = 1,
    estimator: Estimator = "reparam",
    kl_weight: float | Schedule = 1.0,
    keep_best: bool = False,
    stacked: bool = False,
    seed: int | None = None,
    scheduler: MakeScheduler | None = None,
    scheduler_interval: Interval = "epoch",
    max_grad_norm: float | None = None,
    chunk_size: int | None = None,
    compile: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> list[Params]:
    """What :func:`fit` does, and the ``{"params": ..., "state": ...}`` of each network that it ends with."""
    check_is_likelihood(likelihood, f"{_CALL}(likelihood=...)")
    check_model(fn, _CALL)
    num_samples = positive_int(num_samples, f"{_CALL}(num_samples=...)")
    if chunk_size is not None:
        chunk_size = positive_int(chunk_size, f"{_CALL}(chunk_size=...)")
    num = count_members(params, f"{_CALL}(fn, params, ..., stacked=True)") if stacked else 1
    seed = int(resolve_seed(seed))
    seeds = member_seeds(seed, num) if stacked else (seed,)
    states = _starts(params, start, family, init_scale, where, rank, seeds, stacked=stacked)
    check_estimator(estimator, states[0], f"{_CALL}(estimator=...)")
    prior = checked_prior(prior, prior_precision, states[0].mean, _CALL)
    source = open_data(data, batch_size=batch_size, num_streams=num, call=_CALL)
    rows = source.num_data(seeds[0]) if num_data is None else num_data
    if num_data is not None:
        positive_int(num_data, f"{_CALL}(num_data=...)")
    objective = NegativeElbo(
        *(fn, likelihood),
        prior=prior,
        num_data=max(rows, 1),
        num_samples=num_samples,
        estimator=estimator,
        kl_weight=kl_weight,
        call=_CALL,
        chunk_size=chunk_size,
        num_networks=num,
    )
    objective.weight()  # refuses a weight that is none
    options = Options(
        call=_CALL,
        optimizer=optimizer,
        num_epochs=num_epochs,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        max_grad_norm=max_grad_norm,
        progress=progress,
        callback=_told(callback, rows, stacked=stacked) if callable(callback) else callback,
        inspect=Inspector(objective),
        compile=compile,
        shown=lambda losses: {"elbo": f"{-rows * losses.mean().item():.4g}"},
    )
    members = params if stacked else map_leaves(with_member_axis, params)
    covered = named_leaves(states[0].mean)
    networks = {
        "params": select(members, lambda name, leaf: name not in covered or isinstance(leaf, Fixed)),
        "state": stack(states),
    }
    watches: list[Watch] = []

    def watch(part: slice) -> Watch:
        elbos = [elbo_over(objective, source, one) for one in seeds[part]] if keep_best else []
        watches.append(Watch(objective, elbos, part.start))
        return watches[-1]

    run: dict[str, Any] = {"where": lambda name, _: name.startswith("state.")}
    if stacked:
        fitted = minimize_several(
            *(objective, networks, source, seeds, seeds, options),
            chunk_size=chunk_size,
            in_step=callback is not None,
            watch=watch,
            **run,
        )
    else:
        fitted = minimize(
            *(objective, networks, source, seeds, seeds, options), watcher=watch(slice(0, 1)), **run
        )
    with torch.inference_mode(False):
        found = [index(fitted, k) for k in range(num)]
        if keep_best:
            best = [network for each in watches for network in each.best]
            found = [last if kept is None else kept for last, kept in zip(found, best, strict=True)]
        return found


def _starts(
    params: Params,
    start: VariationalState | None,
    family: Family,
    init_scale: float,
    where: Where | None,
    rank: int,
    seeds: tuple[int, ...],
    *,
    stacked: bool,
) -> list[VariationalState]:
    """Where each network starts."""
    if start is None:
        of_each = [index(params, k) for k in range(len(seeds))] if stacked else [params]
        return [
            init(one, family, init_scale, where, rank=rank, seed=seed)
            for one, seed in zip(of_each, seeds, strict=True)
        ]
    check_state(start, f"{_CALL}(start=...)")
    if (family, init_scale, where, rank) != ("diag", 1e-2, None, 10):
        raise ValueError(
            f"`{_CALL}(start=...)` has a family, scales and leaves: leave out `family`, `init_scale`, "
            "`where` and `rank`."
        )
    copied = map_leaves(lambda leaf: leaf.detach().clone(), start)
    states = [index(copied, k) for k in range(len(seeds))] if stacked else [copied]
    check_covers(states[0].mean, index(params, 0) if stacked else params, f"{_CALL}(start=...)")
    return states


def _told(callback: Callback, num_data: int, *, stacked: bool) -> Callable[[int, Any, Params], bool | None]:
    """What calls a callback with ELBOs and states."""

    def told(epoch: int, losses: Tensor, networks: Params) -> bool | None:
        elbos, state = -num_data * losses, networks["state"]
        return callback(epoch, elbos, state) if stacked else callback(epoch, elbos.item(), index(state, 0))

    return told


def _gaussian(network: Params) -> Gaussian:
    """The posterior of one network, with its buffers."""
    found = posterior(network["state"])
    if held(network) is None:
        return found
    buffers = select(held(network), lambda _, leaf: isinstance(leaf, Fixed))
    if not named_leaves(buffers):
        return found
    return Gaussian(merge(found.mean, buffers), found.covariance)
