"""Running chains on a model and data."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import optree
import torch
from torch import Tensor

from .._checks import check_callback, check_model, int_from_zero, positive_int
from .._functional import Model
from .._tree import Params, Where, index
from ..likelihoods import Likelihood
from ..likelihoods._checks import check_is_likelihood
from ..posteriors import Ensemble
from ..priors._given import HasLogProb, checked_prior
from ..training._batch import Batch, RaggedBatch
from ..training._data import Data, Source, open_data
from ._chains import Chains
from ._passes import Passes
from ._potential import Potential
from ._sampler import Sampler
from ._start import Start, as_seeds, check_chunk

Callback = Callable[[int, Tensor, Params], bool | None]
Collect = Callable[[int], bool]

# Potentials are looked at once in so many steps: on an accelerator every look makes it wait.
_CHECK_EVERY = 32


def run(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    sampler: Sampler[Any],
    num_steps: int,
    num_burn_in: int = 0,
    thin: int = 1,
    collect: Collect | None = None,
    batch_size: int | None = None,
    prior_precision: Any = 1.0,
    prior: HasLogProb | None = None,
    num_data: int | None = None,
    where: Where | None = None,
    num_chains: int = 1,
    stacked: bool = False,
    chunk_size: int | None = None,
    compile: bool = False,
    seed: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Chains:
    """Run chains, and keep their states chain by chain, for diagnostics. :func:`fit` pools them.

    Arguments, errors and what is done are those of :func:`fit`.

    Returns:
        Kept states, leaves ``(M, T, *s)``. Its statistics: ``"potential"`` ``(M, T)``, what the batch of the
        step that ended in a state gave for the potential energy where the step began, **summed** over data.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import sgmcmc
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> chains = sgmcmc.run(
        ...     *(fn, params, (x, 3 * x), fb.likelihoods.Normal(1.0)),
        ...     sampler=sgmcmc.sghmc(0.01),
        ...     num_steps=300,
        ...     num_burn_in=100,
        ...     num_chains=4,
        ...     seed=0,
        ... )
        >>> chains.params["weight"].shape
        torch.Size([4, 200, 1, 1])
        >>> bool((sgmcmc.split_r_hat(chains.params["weight"]) < 1.3).all())
        True
    """
    return _run(
        "sgmcmc.run",
        *(fn, params, data, likelihood),
        sampler=sampler,
        num_steps=num_steps,
        num_burn_in=num_burn_in,
        thin=thin,
        collect=collect,
        batch_size=batch_size,
        prior_precision=prior_precision,
        prior=prior,
        num_data=num_data,
        where=where,
        num_chains=num_chains,
        stacked=stacked,
        chunk_size=chunk_size,
        compile=compile,
        seed=seed,
        progress=progress,
        callback=callback,
    )


def fit(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    sampler: Sampler[Any],
    num_steps: int,
    num_burn_in: int = 0,
    thin: int = 1,
    collect: Collect | None = None,
    batch_size: int | None = None,
    prior_precision: Any = 1.0,
    prior: HasLogProb | None = None,
    num_data: int | None = None,
    where: Where | None = None,
    num_chains: int = 1,
    stacked: bool = False,
    chunk_size: int | None = None,
    compile: bool = False,
    seed: int | None = None,
    progress: bool = False,
    callback: Callback | None = None,
) -> Ensemble:
    """Run chains of stochastic gradient MCMC, and keep their states as an ensemble.

    The model is evaluated as it is: without dropout, and with the running statistics of BatchNorm. All chains
    advance at once, in vectorised passes. Each has its own stream of batches and its own noise: chain
    ``k`` does, to rounding, what it would do alone with ``seed=member_seeds(seed, M)[k]``.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``. One that ``vmap`` cannot take is evaluated chain by
            chain, with a warning.
        params: Where chains start, not changed; trained ones, most often. Leaves that are not of floating
            point, and ``Fixed`` ones, are held.
        data: As in :func:`funcbayes.training.fit`. Each chain goes through a loader by itself, at the same
            time as the others.
        likelihood: ``p(y|f)``.
        sampler: :func:`sgld`, :func:`psgld`, :func:`sghmc`, or another pair of functions that can be mapped
            over chains.
        num_steps: Steps of each chain, those of the burn-in included.
        num_burn_in: Steps before states are kept.
        thin: From then on, every ``thin``-th state is kept.
        collect: Says for the number of a step, from 0 on, whether the state after it is kept, in the place of
            ``num_burn_in`` and ``thin``: see :func:`cyclical`.
        batch_size: Rows a batch for data in tensors, shuffled anew in every pass through them;
            ``None``: one batch of all rows.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero: one number, or a tree with
            one for each leaf.
        prior: Another prior, in the place of ``prior_precision``: one of :mod:`funcbayes.priors`, a Gaussian
            over the leaves that chains move, or anything with a ``log_prob(params)`` that is a scalar, summed
            over them.
        num_data: The number ``N`` of rows, if it is not that of the data. A loader that does not know its
            length is counted once.
        where: Which leaves to move; ``None`` for all. The others are held.
        num_chains: ``M``, all from the same start.
        stacked: Whether ``params`` are starts of several chains, every leaf with a leading axis ``M`` (see
            :func:`funcbayes.ensemble.init`), instead.
        chunk_size: How many chains are evaluated at a time. With ``None`` intermediates of all chains are
            kept until their gradients are found.
        compile: Whether potentials and their gradients are found by programs that ``torch.compile`` makes:
            see :func:`funcbayes.training.fit`.
        seed: Of the noise and the shuffling; ``None`` draws one.
        progress: Whether to show a bar over the steps.
        callback: ``(step, potentials, params)`` after every step, with potential energies ``(M,)``, as the
            batch gave them where the step began, and params that have moved since, leaves ``(M, *s)``, not to
            be written into, in at least float32; chains end when it returns ``True``.

    Returns:
        Kept states of all chains, one chain after another, with equal weights, in the dtypes of ``params``:
        chains of half precision move in float32, and are rounded where the model is evaluated. Held leaves
        are left out, for ``predict`` to take from ``params``; but ``Fixed`` ones belong to every state, and
        with ``stacked`` so do all others.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, no state would be kept, data are empty, or ``num_data`` is
            below the number of rows of a batch.
        RuntimeError: If the potential energy of a chain is no longer finite, which is looked at every
            few steps.

    Example:
        >>> import torch, funcbayes as fb
        >>> from funcbayes import sgmcmc
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> posterior = sgmcmc.fit(
        ...     *(fn, params, (x, 3 * x), fb.likelihoods.Normal(1.0)),
        ...     sampler=sgmcmc.sgld(0.02),
        ...     num_steps=200,
        ...     num_burn_in=100,
        ...     thin=10,
        ...     batch_size=5,
        ...     num_chains=4,
        ...     seed=0,
        ... )
        >>> posterior.num_members
        40
    """
    return _run(
        "sgmcmc.fit",
        *(fn, params, data, likelihood),
        sampler=sampler,
        num_steps=num_steps,
        num_burn_in=num_burn_in,
        thin=thin,
        collect=collect,
        batch_size=batch_size,
        prior_precision=prior_precision,
        prior=prior,
        num_data=num_data,
        where=where,
        num_chains=num_chains,
        stacked=stacked,
        chunk_size=chunk_size,
        compile=compile,
        seed=seed,
        progress=progress,
        callback=callback,
    ).ensemble()


def _run(
    call: str,
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    sampler: Sampler[Any],
    num_steps: int,
    num_burn_in: int,
    thin: int,
    collect: Collect | None,
    batch_size: int | None,
    prior_precision: Any,
    prior: HasLogProb | None,
    num_data: int | None,
    where: Where | None,
    num_chains: int,
    stacked: bool,
    chunk_size: int | None,
    compile: bool,
    seed: int | None,
    progress: bool,
    callback: Callback | None,
) -> Chains:
    check_model(fn, call)
    check_is_likelihood(likelihood, f"{call}(likelihood=...)")
    if not (callable(getattr(sampler, "init", None)) and callable(getattr(sampler, "update", None))):
        raise TypeError(
            f"`{call}(sampler=...)` should be a sampler, such as `sgmcmc.sgld(1e-4)`, got "
            f"{getattr(sampler, '__name__', type(sampler).__name__)}."
        )
    num_steps = positive_int(num_steps, f"{call}(num_steps=...)")
    chunk_size = check_chunk(chunk_size, call)
    check_callback(callback, call)
    start = Start.of(params, where, num_chains, stacked, call)
    kept = _kept_steps(num_steps, num_burn_in, thin, collect, call)
    prior = checked_prior(prior, prior_precision, index(start.covered, 0), call)
    source = open_data(data, batch_size=batch_size, num_streams=start.num_chains, call=call)
    seeds = start.seeds(seed)
    rows = source.num_data(seeds[0]) if num_data is None else positive_int(num_data, f"{call}(num_data=...)")
    passes = Passes(Potential(fn, likelihood, prior, max(rows, 1)), start, call, chunk_size, compile)
    # Whatever the caller's mode: gradients are needed here, and tensors that autograd can save.
    with torch.inference_mode(False), _bar(num_steps, call, progress) as show:
        state = sampler.init(start.covered, as_seeds(seeds))
        record = _Record(start, len(kept), call)
        with contextlib.closing(_batches(source, seeds, start.leaves[0].device)) as batches:
            for step, batch in enumerate(itertools.islice(batches, num_steps)):
                if step == 0:
                    passes.check_likelihood(batch)
                potentials, gradients = passes(optree.tree_leaves(state.params), batch)
                state = sampler.update(state, start.structure.unflatten(gradients))
                record.see(step, potentials, state.params, step in kept)
                show(potentials)
                if callback is not None and callback(step, potentials, state.params):
                    break
        return record.chains(state.params, start)


def _kept_steps(
    num_steps: int, num_burn_in: int, thin: int, collect: Collect | None, call: str
) -> "range | frozenset[int]":
    """Numbers of the steps after which states are kept."""
    if collect is None:
        thin = positive_int(thin, f"{call}(thin=...)")
        first = int_from_zero(num_burn_in, f"{call}(num_burn_in=...)")
        kept = range(first + thin - 1, num_steps, thin)
        if not kept:
            raise ValueError(
                f"`{call}(num_burn_in=...)` and `thin` should add up to at most `num_steps={num_steps}`, or "
                f"no state is kept; got {first} and {thin}."
            )
        return kept
    if not callable(collect):
        raise TypeError(
            f"`{call}(collect=...)` should be a function of the number of a step, got "
            f"{type(collect).__name__}. Write `schedule.collect`, say."
        )
    if (num_burn_in, thin) != (0, 1):
        raise ValueError(
            f"`{call}(collect=...)` stands in the place of `num_burn_in` and `thin`, got {num_burn_in} and "
            f"{thin} for these. Leave them out."
        )
    chosen = frozenset(step for step in range(num_steps) if collect(step))
    if not chosen:
        raise ValueError(f"`{call}(collect=...)` should be true for a step below `num_steps={num_steps}`.")
    return chosen


def _batches(source: Source, seeds: tuple[int, ...], device: torch.device) -> Generator[Batch | RaggedBatch]:
    """Batches of one pass through the data after another, without end."""
    for epoch in itertools.count():
        yield from source.epoch(seeds, epoch, device)


class _Record:
    """Kept states, in memory that is asked for once, and a watch on potentials."""

    def __init__(self, start: Start, num_draws: int, call: str) -> None:
        self.call = call
        self.kept = [leaf.new_empty(len(leaf), num_draws, *leaf.shape[1:]) for leaf in start.leaves]
        self.potentials: list[Tensor] = []  # at kept states
        self.count = 0
        self._unseen: list[Tensor] = []
        self._next = 0  # step of the first of these

    def see(self, step: int, potentials: Tensor, params: Params, is_kept: bool) -> None:
        """Take note of a step."""
        self._unseen.append(potentials)
        if len(self._unseen) == _CHECK_EVERY:
            self.look()
        if is_kept:
            for kept, leaf in zip(self.kept, optree.tree_leaves(params), strict=True):
                kept[:, self.count] = leaf.detach()
            self.potentials.append(potentials)
            self.count += 1

    def look(self) -> None:
        """Refuse potentials that are not finite."""
        if not self._unseen:
            return
        table = torch.stack(self._unseen)
        self._unseen, first = [], self._next
        self._next += len(table)
        if bool(table.isfinite().all()):
            return
        step, k = (~table.isfinite()).nonzero()[0].tolist()
        raise RuntimeError(
            f"The potential energy{_of_chain(k, table.shape[1])} in `{self.call}` is {table[step, k].item()} "
            f"in step {first + step}. {_HELP}"
        )

    def chains(self, last: Params, start: Start) -> Chains:
        """What was kept."""
        self.look()
        fine = torch.stack(
            [leaf.isfinite().reshape(len(leaf), -1).all(1) for leaf in optree.tree_leaves(last)]
        ).all(0)
        if not bool(fine.all()):  # by the last step, which no potential has shown
            k = int((~fine).nonzero()[0])
            raise RuntimeError(
                f"The parameters{_of_chain(k, len(fine))} in `{self.call}` are not finite after step "
                f"{self._next - 1}. {_HELP}"
            )
        if not self.count:
            raise RuntimeError(
                f"`{self.call}(callback=...)` should let chains go on to the first state that is kept; they "
                "ended before."
            )
        kept = [leaf if self.count == leaf.shape[1] else leaf[:, : self.count].clone() for leaf in self.kept]
        drawn = start.with_held(start.structure.unflatten(kept), self.count)
        return Chains(drawn, {"potential": torch.stack(self.potentials, 1)})


_HELP = (
    "A smaller step size usually helps: it goes with a potential that is summed over the data, so that it is "
    "about the learning rate of a mean loss divided by the number of rows."
)


def _of_chain(k: int, num_chains: int) -> str:
    return f" of chain {k}" if num_chains > 1 else ""


@contextmanager
def _bar(num_steps: int, call: str, progress: bool) -> Iterator[Callable[[Tensor], None]]:
    """Show a bar over the steps, if it is asked for."""
    if not progress:
        yield lambda potentials: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=num_steps, desc=call, unit="step") as bar:

        def show(potentials: Tensor) -> None:
            if bar.n % _CHECK_EVERY == 0:
                bar.set_postfix({"potential": f"{potentials.mean().item():.4g}"}, refresh=False)
            bar.update()

        yield show
