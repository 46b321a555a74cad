"""Training with the evidence: prior precisions and noise are learned while the network is."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from .._checks import positive_int
from .._functional import training_call
from .._random import Seed, resolve_seed
from .._tree import (
    Params,
    Where,
    index,
    is_parameter,
    map_leaves,
    map_named,
    named_leaves,
    parameters_of,
    select,
)
from ..curvature._curvature import DEFAULT_RANK, Structure, found_by
from ..curvature._data_term import noise_of
from ..curvature._pass import Problem
from ..curvature._sums import WeightSharing
from ..likelihoods import Likelihood, Normal
from ..posteriors import Gaussian
from ..training._data import Data, open_data
from ..training._fit import for_one, with_member_axis
from ..training._loop import minimize
from ..training._objective import NO_RULES, Objective, rules_around
from ..training._options import Callback, Interval, MakeOptimizer, MakeScheduler, Options
from ._posterior import posterior
from ._prior import Numbers, Prior, by_leaf, chosen_leaves
from ._tuning import Hyperparameters, Per, check_per, maximize_evidence

_CALL = "laplace.train"


@dataclass(frozen=True)
class Trained:
    """A network trained with the evidence, where this was largest.

    Attributes:
        params: Its parameters; buffers that training changed are ``Fixed``.
        posterior: The Laplace approximation there.
        prior_precision: What was learned: one number, or a tree of one for each leaf.
        noise_std: The noise that was learned; ``None`` if there is none.
        log_marginal_likelihood: The evidence there, a scalar.
        history: The evidence whenever it was found, ``(T,)``.
    """

    params: Params
    posterior: Gaussian
    prior_precision: Numbers
    noise_std: Tensor | None
    log_marginal_likelihood: Tensor
    history: Tensor


def train(
    fn: Any,
    params: Params,
    data: Data,
    likelihood: Likelihood,
    *,
    optimizer: MakeOptimizer,
    num_epochs: int,
    structure: Structure = "kron",
    where: Where | None = None,
    per: Per = "leaf",
    prior_precision: Numbers = 1.0,
    tune_noise: bool = True,
    start_epoch: int = 0,
    update_every: int = 1,
    num_steps: int = 20,
    batch_size: int | None = None,
    seed: Seed | None = None,
    scheduler: MakeScheduler | None = None,
    scheduler_interval: Interval = "epoch",
    max_grad_norm: float | None = None,
    weight_sharing: WeightSharing = "expand",
    rank: int = DEFAULT_RANK,
    max_bytes: int | None = None,
    linearized: bool = True,
    compile: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Trained:
    """Train a network, and learn its prior precision and noise by evidence on the way: no held-out data.

    Immer et al. (2021), "Scalable marginal likelihood estimation for model selection in deep learning",
    algorithm 1: the network descends on its negative log joint under the present prior and noise; every so
    many epochs the curvature is found, and the evidence is climbed in the logarithms of both. The network
    with the largest evidence is kept.

    Args:
        fn: Pure model.
        params: Where training starts, not changed.
        data: As for :func:`funcbayes.training.fit`.
        likelihood: ``p(y|f)``; the noise of ``Normal`` is where that of training starts.
        optimizer: ``leaves -> torch.optim.Optimizer``.
        num_epochs: Passes through the data.
        structure: Of the curvature: as for :func:`funcbayes.curvature.ggn`.
        where: Which leaves the evidence integrates over; ``None`` for all. All leaves are trained, and those
            not chosen keep ``prior_precision``.
        per: One precision for the ``"model"``, for each ``"leaf"``, or for each ``"parameter"``.
        prior_precision: Where it starts: a number, or a tree.
        tune_noise: Whether noise is learned, where there is one to choose.
        start_epoch: Epochs before the evidence is climbed first.
        update_every: Epochs between.
        num_steps: Steps of climbing each time.
        batch_size: Rows a batch, for data in tensors.
        seed: Of the shuffling and the dropout masks; ``None`` draws one.
        scheduler: ``optimizer -> LRScheduler``.
        scheduler_interval: Whether the scheduler steps every epoch or every step.
        max_grad_norm: Longer gradients are shortened to this norm.
        weight_sharing: As for :func:`funcbayes.curvature.ggn`.
        rank: As for :func:`funcbayes.curvature.ggn`.
        max_bytes: As for :func:`funcbayes.curvature.ggn`.
        linearized: As for :func:`posterior`.
        compile: As for :func:`funcbayes.training.fit`: of the steps of training; curvature is found without.
        progress: Whether to show a bar over the epochs.
        callback: As for :func:`funcbayes.training.fit`.

    Returns:
        The network, its posterior, and what was learned.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range.
        RuntimeError: If the loss, a parameter or the evidence is no longer finite.

    Example:
        >>> import functools, torch, funcbayes as fb
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> fn, params = fb.make_functional(torch.nn.Linear(1, 1))
        >>> adam = functools.partial(torch.optim.Adam, lr=0.1)
        >>> normal = fb.likelihoods.Normal(1.0)
        >>> found = fb.laplace.train(fn, params, (x, 3 * x), normal, optimizer=adam, num_epochs=50, seed=0)
        >>> bool(found.noise_std < 0.5)
        True
    """
    options = Options(
        call=_CALL,
        optimizer=optimizer,
        num_epochs=num_epochs,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        max_grad_norm=max_grad_norm,
        compile=compile,
        progress=progress,
        callback=callback and for_one(callback),
    )
    Problem.of(fn, params, data, likelihood, where, call=_CALL, batch_size=batch_size)  # for its checks
    if structure not in get_args(Structure):
        known = ", ".join(map(repr, get_args(Structure)))
        raise ValueError(f"`{_CALL}(structure=...)` should be one of {known}, got {structure!r}.")
    update_every = positive_int(update_every, f"{_CALL}(update_every=...)")
    num_steps = positive_int(num_steps, f"{_CALL}(num_steps=...)")
    _check_epochs(start_epoch, update_every, num_epochs)
    check_per(per, f"{_CALL}(per=...)", is_kronecker=structure == "kron")
    leaves = parameters_of(params)
    numbers = Prior.of(leaves, prior_precision, 0.0, None, _CALL).precision
    assert numbers is not None
    Prior.of(chosen_leaves(params, where), prior_precision, 0.0, None, _CALL).check_goes_with(
        structure, _CALL
    )
    source = open_data(data, batch_size=batch_size, num_streams=1, call=_CALL)
    seed = int(resolve_seed(seed))
    joint = _NegativeLogJoint(fn, likelihood, numbers, source.num_data(seed))

    def find(network: Params, joint: _NegativeLogJoint) -> tuple[Hyperparameters, Gaussian]:
        c = found_by(
            *("ggn", fn, network, data, joint.likelihood, structure, where),
            call=_CALL,
            weight_sharing=weight_sharing,
            rank=rank,
            max_bytes=max_bytes,
            batch_size=batch_size,
            seed=seed,
        )
        covered = {name: joint.precision[name] for name in c.leaves}
        found = maximize_evidence(
            network,
            c,
            per=per,
            prior_precision=map_named(
                lambda name, _: covered[name], select(network, lambda name, _: name in covered)
            ),
            tune_noise=tune_noise,
            num_steps=num_steps,
        )
        noise = found.noise_std if c.data.has_noise else None
        return found, posterior(network, c, found.prior_precision, noise_std=noise, linearized=linearized)

    climber = _Climber(joint, find, start_epoch, update_every)
    minimize(joint, map_leaves(with_member_axis, params), source, [seed], [seed], options, watcher=climber)
    if climber.best is None:
        raise RuntimeError(f"`{_CALL}(callback=...)` should let training go on until the evidence is found.")
    network, found, gaussian = climber.best
    return Trained(
        network,
        gaussian,
        found.prior_precision,
        found.noise_std,
        found.log_marginal_likelihood,
        torch.tensor(climber.history, dtype=found.log_marginal_likelihood.dtype),
    )


def _check_epochs(start_epoch: int, update_every: int, num_epochs: int) -> None:
    """There is an epoch at whose end the evidence is climbed."""
    if isinstance(start_epoch, bool) or not isinstance(start_epoch, int) or start_epoch < 0:
        raise ValueError(f"`{_CALL}(start_epoch=...)` should be an int from 0 on, got {start_epoch!r}.")
    if start_epoch + update_every > num_epochs:
        raise ValueError(
            f"`{_CALL}(start_epoch={start_epoch}, update_every={update_every})` should leave an epoch at "
            f"whose end the evidence is found, of `num_epochs={num_epochs}`."
        )


class _NegativeLogJoint(Objective):
    """The mean negative log joint under the present prior and noise."""

    def __init__(self, fn: Any, likelihood: Likelihood, precision: dict[str, Tensor], num_data: int) -> None:
        self.fn, self.precision, self.num_data = fn, precision, num_data
        noise = noise_of(likelihood)
        # A tensor is given to compiled steps, where a number would be a part of them.
        self.likelihood = likelihood if noise is None else Normal(noise)

    def numbers(self) -> Params:
        """The prior and the likelihood."""
        return {"precision": self.precision, "likelihood": self.likelihood}

    def at(self, numbers: Params) -> "_NegativeLogJoint":
        """The objective with others."""
        given = copy.copy(self)
        given.precision, given.likelihood = numbers["precision"], numbers["likelihood"]
        return given

    def __call__(
        self,
        params: Params,
        x: Any,
        y: Tensor,
        seed: Seed,
        check: bool = False,
        rules: AbstractContextManager[Any] = NO_RULES,
    ) -> tuple[Tensor, Params]:
        """The loss and the buffers that changed."""
        with rules:
            outputs, changed = training_call(self.fn, params, x, seed)
        if check:
            self.likelihood.check(outputs, y, call=f"{_CALL}(data=...)")
        with rules_around(self.likelihood, rules):
            loss = -self.likelihood.log_prob(outputs, y).mean()
        terms = [
            (self.precision[name].to(leaf.dtype) * leaf.square()).sum()
            for name, leaf in named_leaves(params).items()
            if is_parameter(leaf)
        ]
        return loss + 0.5 / self.num_data * torch.stack(terms).sum().to(loss.dtype), changed


class _Climber:
    """A watcher that climbs the evidence at the end of epochs."""

    def __init__(
        self,
        joint: _NegativeLogJoint,
        find: Callable[[Params, _NegativeLogJoint], tuple[Hyperparameters, Gaussian]],
        start_epoch: int,
        update_every: int,
    ) -> None:
        self.joint, self.find = joint, find
        self.start_epoch, self.update_every = start_epoch, update_every
        self.best: tuple[Params, Hyperparameters, Gaussian] | None = None
        self.history: list[float] = []
        self._epoch = 0

    def after_step(self, members: Callable[[], Params]) -> None:
        """Let steps pass."""

    def after_epoch(self, members: Callable[[], Params]) -> bool:
        """Find the evidence, learn from it, and keep the network if there was none better."""
        self._epoch += 1
        since = self._epoch - self.start_epoch
        if since <= 0 or since % self.update_every:
            return False
        network = map_leaves(lambda leaf: leaf.detach().clone(), index(members(), 0))
        found, gaussian = self.find(network, self.joint)
        covered = {
            name: leaf
            for name, leaf in parameters_of(network).items()
            if name in parameters_of(gaussian.mean)
        }
        learned = by_leaf(found.prior_precision, covered, _CALL)
        self.joint.precision = {**self.joint.precision, **{n: p.detach() for n, p in learned.items()}}
        noise = noise_of(self.joint.likelihood)
        if found.noise_std is not None and noise is not None:
            self.joint.likelihood = Normal(found.noise_std.detach().to(noise))
        value = float(found.log_marginal_likelihood)
        if not self.history or value > max(self.history):
            self.best = network, found, gaussian
        self.history.append(value)
        return False
