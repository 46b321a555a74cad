"""Fitting with IVON: updates, batch by batch."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._checks import check_callback, check_covers, check_model, check_num_data, positive_int, positive_number
from .._functional import Model
from .._random import resolve_seed
from .._tree import Fixed, Params, Where, device_of, index, map_leaves, named_leaves, select, stack, tensors
from .._warning import levels_to_the_user
from ..likelihoods import Likelihood
from ..posteriors import Gaussian
from ..training._batch import Batch, RaggedBatch, ready
from ..training._data import Data, Source, open_data
from ..training._several import count_members, member_seeds
from ._evaluate import Traits, look
from ._posterior import posterior
from ._schedules import Schedule
from ._state import IVONState, check_state, init
from ._step import Rule, Scale
from ._update import Updater, whole

_CALL = "ivon.fit"
Callback = Callable[[int, Any, IVONState], bool | None]
_WAY_OUT = "A lower learning rate, a larger `hess_init`, or `clip_radius=1e-3`, usually helps."


def fit(
    fn: Model,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    learning_rate: float | Schedule,
    num_epochs: int,
    batch_size: int | None = None,
    prior_precision: float = 1.0,
    num_data: int | None = None,
    hess_init: float = 1.0,
    beta1: float = 0.9,
    beta2: float = 0.99999,
    num_samples: int = 1,
    where: Where | None = None,
    start: IVONState | None = None,
    stacked: bool = False,
    seed: int | None = None,
    clip_radius: float | None = None,
    max_grad_norm: float | None = None,
    ess: float | None = None,
    rescale_lr: bool = True,
    chunk_size: int | None = None,
    compile: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Gaussian:
    """Fit a Gaussian of independent parameters by natural gradients: a loop of :func:`update`.

    As in :func:`funcbayes.training.fit` dropout is active, with masks that are a function of the seed, and
    BatchNorm uses the statistics of the batch.

    Args:
        fn: Pure model, ``fn(params, x) -> outputs``. One that ``vmap`` cannot take is evaluated draw by draw,
            with a warning.
        params: Where the mean starts, of a network at random or one that is trained; not changed.
        data: As in :func:`funcbayes.training.fit`; with ``stacked`` as in :func:`funcbayes.ensemble.fit`.
        likelihood: ``p(y|f)``; the loss is the **mean** over rows of ``-log p(y|f)``.
        learning_rate: ``alpha``, as in :func:`update`: a number, or a function of the number of the step,
            from 0 on, such as :func:`cosine`.
        num_epochs: Passes through the data, those that ``start`` has behind it included.
        batch_size: Rows a batch for data in tensors; ``None``: one batch of all rows, in order.
        prior_precision: Precision (1 / variance) of a Gaussian prior of mean zero on every covered parameter.
        num_data: The number ``N`` of rows, if it is not that of the data.
        hess_init: See :func:`init`.
        beta1: How much of the momentum stays in a step.
        beta2: How much of the Hessian stays in a step. The default is for runs of more than ``1e5`` steps: in
            far fewer the variances stay those of ``hess_init``. A run of a thousand steps takes 0.99, say.
        num_samples: Draws of each step, all in vectorised passes.
        where: Which leaves are moved and uncertain; ``None`` for all. The others are held as they are in
            ``params``, and the Gaussian does not cover them.
        start: A state that a callback was given, of this very run: it is then gone on with, and with the
            same arguments ends where it would have ended. Leave out ``where`` and ``hess_init``, which it
            knows; ``params`` are needed for what it does not cover.
        stacked: Whether ``params`` are those of several networks, every leaf with a leading axis ``K`` (see
            :func:`funcbayes.ensemble.init`). They are fitted at once; network ``k`` becomes, to rounding,
            what ``fit(fn, params_k, ...)`` with ``seed=member_seeds(seed, K)[k]`` makes of it.
        seed: Of the draws, the shuffling and the dropout masks; ``None`` draws one.
        clip_radius: Bound of each entry of a step, before the learning rate.
        max_grad_norm: Longer gradients are shortened to this norm, each draw's by itself.
        ess: ``lambda``, the effective number of rows, see :func:`update`.
        rescale_lr: Whether the learning rate is multiplied by ``hess_init + delta``.
        chunk_size: Draws of one pass, of all networks; ``None`` to choose by the size of intermediates.
        compile: As for :func:`update`, of the draws of all networks.
        progress: Whether to show a bar over the epochs.
        callback: ``(epoch, loss, state)`` after every epoch, with the mean loss of the epoch over rows and
            draws, a float, and a copy of the state, of which :func:`posterior` makes a Gaussian and
            :func:`funcbayes.save` a checkpoint. With ``stacked`` losses ``(K,)`` and a state whose tensors
            have a leading axis ``K``. Fitting ends when it returns ``True``.

    Returns:
        Gaussian over the covered leaves: see :func:`posterior`. Its mean carries buffers that training
        changed (BatchNorm's statistics) as ``Fixed``; :func:`funcbayes.refresh_batch_norm` finds those of
        draws. With ``stacked`` every leaf has a leading axis ``K``: ``mixture(posterior, stacked=True)``
        makes one posterior of it.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range, data are empty, or ``start`` does not fit.
        RuntimeError: If the loss or the state is no longer finite, checked after every epoch.

    Warns:
        UserWarning: If the objective, the mean loss plus the divergence from the prior over ``lambda``, is
            higher in the end than where fitting started by more than 10 nats a row and than the loss there.

    Example:
        >>> import torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> q = fb.ivon.fit(
        ...     *(fn, params, (x, 3 * x), fb.likelihoods.Normal(0.5)),
        ...     learning_rate=fb.ivon.cosine(0.2, num_steps=200),
        ...     num_epochs=50,
        ...     batch_size=5,
        ...     beta2=0.99,
        ...     seed=0,
        ... )
        >>> bool((q.mean["weight"] - 3).abs() < 0.5)
        True
    """
    check_model(fn, _CALL)
    check_callback(callback, _CALL)
    updater = Updater.of(fn, likelihood, num_samples, max_grad_norm, chunk_size, compile, _CALL)
    num_epochs = positive_int(num_epochs, f"{_CALL}(num_epochs=...)")
    num = count_members(params, f"{_CALL}(fn, params, ..., stacked=True)") if stacked else 1
    state, behind = _started(params, start, hess_init, where, num if stacked else None)
    rate = _rates(learning_rate)
    scale = Scale.of(1 if num_data is None else num_data, prior_precision, ess, _CALL)
    rule = Rule.of(scale, rate(behind), beta1, beta2, clip_radius, rescale_lr, _CALL)
    source = open_data(data, batch_size=batch_size, num_streams=num, call=_CALL)
    seed = int(resolve_seed(seed))
    seeds = member_seeds(seed, num) if stacked else (seed,)
    rows = max(source.num_data(seeds[0]), 1) if num_data is None else num_data
    rule = replace(rule, scale=Scale.of(rows, prior_precision, ess, _CALL))
    first, done = _place(behind, source, seeds[0], num_epochs)
    with torch.inference_mode(False), torch.enable_grad(), _bar(num_epochs, first, shown=progress) as show:
        state = map_leaves(torch.clone, state)
        run = _Run(updater, _held(params, state), seeds, rule, rate, rows, stacked=stacked)
        began, first_loss = _complexity(state, rule.scale, num), torch.zeros(num)
        mean = first_loss
        for epoch in range(first, num_epochs):
            batches = source.epoch(seeds, epoch, device_of(state.mean))
            state, losses = run.epoch(state, itertools.islice(batches, done, None), behind)
            _check(state, losses, epoch, behind, stacked=stacked)
            behind, done = behind + len(losses.table), 0
            mean = losses.mean()
            first_loss = losses.table[0] if epoch == first else first_loss
            show(float(mean.mean()))
            told = mean if stacked else float(mean)
            if callback is not None and callback(epoch, told, map_leaves(torch.clone, state)):
                break
        rise = mean + _complexity(state, rule.scale, num) - first_loss - began
        _warn_if_risen(rise, first_loss, stacked=stacked)
        return posterior(state, num_data=rows, prior_precision=prior_precision, ess=ess)


def _held(params: Params, state: IVONState) -> Params:
    """What a state does not hold of its model, in a form that autograd may save."""
    covered = named_leaves(state.mean)
    held = select(params, lambda name, leaf: name not in covered and not isinstance(leaf, Fixed))
    return map_leaves(lambda leaf: ready(leaf, None), held)


@dataclass(frozen=True)
class _Losses:
    """Losses of some steps, ``(steps, K)``, and the rows that they are means over."""

    table: Tensor
    rows: Tensor

    def mean(self) -> Tensor:
        """Over all rows, ``(K,)``."""
        return (self.table * self.rows).sum(0) / self.rows.sum(0)


class _Run:
    """Updates of one network, or of several, through batches.

    Args:
        updater: Of updates.
        held: What the state does not hold of the model.
        seeds: One a network.
        rule: How the state is moved, but for the learning rate.
        rate: The learning rate by the number of the step.
        num_data: Number of rows of the data.
        stacked: Whether everything has an axis over networks.
    """

    def __init__(
        self,
        updater: Updater,
        held: Params,
        seeds: Sequence[int],
        rule: Rule,
        rate: Schedule,
        num_data: int,
        *,
        stacked: bool,
    ) -> None:
        self.updater, self.held, self.seeds = updater, held, seeds
        self.rule, self.rate, self.num_data, self.stacked = rule, rate, num_data, stacked
        self._traits: Traits | None = None

    def epoch(
        self, state: IVONState, batches: Iterable[Batch | RaggedBatch], behind: int
    ) -> tuple[IVONState, _Losses]:
        """Go through the batches of an epoch that are left, after as many steps as are ``behind``."""
        losses, rows = [], []
        for batch in batches:
            if self._traits is None:
                self._traits = self._seen(state, batch)
            rule = replace(self.rule, learning_rate=self.rate(behind + len(losses)))
            state, loss = self._update(state, batch, rule, self._traits)
            losses.append(loss)
            rows.append(torch.as_tensor(batch.rows))
        if not losses:
            raise ValueError(
                f"`{_CALL}(start=...)` should be given the data of its own run, got fewer batches an epoch."
            )
        # Looked at once an epoch, for on an accelerator every look makes it wait.
        table = torch.stack(losses).cpu().reshape(len(losses), -1)
        return state, _Losses(table, torch.stack([r.expand(table.shape[1]) for r in rows]).to(table.dtype))

    def _update(
        self, state: IVONState, batch: Batch | RaggedBatch, rule: Rule, traits: Traits
    ) -> tuple[IVONState, Tensor]:
        if self.stacked:
            return self.updater.several(self.held, state, batch, rule, torch.tensor(self.seeds), traits)
        assert isinstance(batch, Batch)  # of one stream
        return self.updater.one(self.held, state, batch, rule, self.seeds[0], traits)

    def _seen(self, state: IVONState, batch: Batch | RaggedBatch) -> Traits:
        """Look at the first network and its first rows, to refuse what does not fit."""
        x, y = batch.member(0)
        check_num_data(self.num_data, y.shape[0], _CALL)
        first = (index(self.held, 0), index(state, 0)) if self.stacked else (self.held, state)
        traits, outputs = look(self.updater.fn, whole(*first), x)
        self.updater.check(traits)
        self.updater.likelihood.check(outputs, y, call=f"{_CALL}(data=...)")
        return traits


def _started(
    params: Params, start: IVONState | None, hess_init: float, where: Where | None, num: int | None
) -> tuple[IVONState, int]:
    """Where to start, and how many steps are behind it."""
    if start is None:
        if num is None:
            return init(params, hess_init=hess_init, where=where), 0
        return stack([init(index(params, k), hess_init=hess_init, where=where) for k in range(num)]), 0
    check_state(start, f"{_CALL}(start=...)")
    if hess_init != 1.0 or where is not None:
        raise ValueError(f"`{_CALL}(start=...)` has a Hessian and leaves: leave out `hess_init` and `where`.")
    check_covers(start.mean, params, f"{_CALL}(start=...)")
    if start.step.shape != (() if num is None else (num,)) or len(set(start.step.reshape(-1).tolist())) > 1:
        networks = "one network" if num is None else f"{num} networks after equally many steps"
        raise ValueError(
            f"`{_CALL}(start=...)` should be the state of {networks}, got steps {start.step.tolist()}."
        )
    return start, int(start.step.reshape(-1)[0])


def _place(behind: int, source: Source, seed: int, num_epochs: int) -> tuple[int, int]:
    """The epoch that is under way after some steps, and how many of its batches are done."""
    if not behind:
        return 0, 0
    first, done = divmod(behind, max(source.num_batches(seed), 1))
    if first >= num_epochs:
        raise ValueError(
            f"`{_CALL}(num_epochs=...)` should be more than the {first} epochs that `start` has behind it, "
            f"got {num_epochs}."
        )
    return first, done


def _rates(learning_rate: Any) -> Schedule:
    """Checked learning rates by the number of the step."""
    if not callable(learning_rate):
        constant = positive_number(learning_rate, f"{_CALL}(learning_rate=...)")
        return lambda step: constant

    def rate(step: int) -> float:
        value = learning_rate(step)
        if not isinstance(value, Real) or not 0 < value < math.inf:  # type: ignore[operator]  # of a Real
            raise ValueError(
                f"`{_CALL}(learning_rate=...)` should give positive and finite numbers, got {value!r} for "
                f"step {step}."
            )
        return float(value)

    return rate


def _check(state: IVONState, losses: _Losses, epoch: int, behind: int, *, stacked: bool) -> None:
    """Refuse to go on from numbers that are not finite."""
    bad = (~losses.table.isfinite()).nonzero()
    if len(bad):
        count, k = bad[0].tolist()
        raise RuntimeError(
            f"The loss{_of_member(k, stacked)} in `{_CALL}` is {losses.table[count, k].item()} in step "
            f"{behind + count}, which is in epoch {epoch}. {_WAY_OUT}"
        )
    leaves = [*tensors(state.mean), *tensors(state.hessian)]
    fine = torch.stack([_by_network(leaf.isfinite(), losses.table.shape[1]).all(1) for leaf in leaves]).all(0)
    if not bool(fine.all()):
        k = int((~fine).nonzero()[0])
        raise RuntimeError(
            f"The Gaussian{_of_member(k, stacked)} in `{_CALL}` is not finite after epoch {epoch}. {_WAY_OUT}"
        )


def _complexity(state: IVONState, scale: Scale, num: int) -> Tensor:
    """``KL(q || p) / lambda`` of each network, ``(K,)``."""
    hessians = named_leaves(state.hessian)
    kls = [scale.kl(mean, hessians[name]) for name, mean in named_leaves(state.mean).items()]
    return torch.stack([_by_network(kl, num).sum(1).cpu() for kl in kls]).sum(0)


def _warn_if_risen(rise: Tensor, first_loss: Tensor, *, stacked: bool) -> None:
    """Say so where a fit ended with an objective that is far above the one it started from."""
    # Every draw of a loss is another, so that small differences say nothing.
    bad = (rise > first_loss.abs().clamp_min(10.0)).nonzero()
    if len(bad):
        k = int(bad[0])
        warnings.warn(
            f"`{_CALL}` has diverged: the objective{_of_member(k, stacked)} is {rise[k].item():.3g} nats a "
            f"row higher than where it started. {_WAY_OUT}",
            stacklevel=levels_to_the_user(),
        )


def _by_network(leaf: Tensor, num: int) -> Tensor:
    return leaf.reshape(num, leaf.numel() // num)


def _of_member(k: int, stacked: bool) -> str:
    return f" of member {k}" if stacked else ""


@contextmanager
def _bar(num_epochs: int, first: int, *, shown: bool) -> Iterator[Callable[[float], None]]:
    """Show a bar over the epochs, if it is asked for."""
    if not shown:
        yield lambda loss: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=num_epochs, initial=first, desc=_CALL, unit="epoch") as bar:

        def show(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        yield show
