"""The methods that the demo compares: one table. A new method is a function and a line in ``METHODS``."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ensemble, ivon, laplace, sgmcmc, swag, training, vi
from .._functional import Model, make_functional
from .._linearize import linearize
from .._predict import predict
from .._prediction import Prediction
from .._tree import Params, index, merge
from ..likelihoods import Likelihood
from ..posteriors import Dropout, Gaussian, Mixture, Point, Posterior, join, mixture, restrict


@dataclass(frozen=True)
class Task:
    """What every method is given.

    Attributes:
        make_module: Builds an untrained network with a dropout rate (0 for none).
        data: Training inputs and targets.
        likelihood: What outputs say of targets.
        training: Arguments of ``training.fit``: ``optimizer``, ``num_epochs``, ``prior_precision``, ...
        collecting: Those of ``swag.fit`` that differ.
        natural: Those of ``ivon.fit`` that take the place of an optimizer.
        sampling: Those of ``sgmcmc.fit`` that take the place of epochs, and ``step_size``.
        num_members: Networks in an ensemble.
        num_draws: Draws to predict with, where a posterior has infinitely many.
    """

    make_module: Callable[[float], nn.Module]
    data: tuple[Tensor, Tensor]
    likelihood: Likelihood
    training: Mapping[str, Any]
    collecting: Mapping[str, Any]
    natural: Mapping[str, Any]
    sampling: Mapping[str, Any]
    num_members: int
    num_draws: int


@dataclass(frozen=True)
class Fitted:
    """What a method finds: the arguments of ``predict``.

    Attributes:
        fn: Pure model.
        params: Its parameters; ``None`` if the posterior covers them all.
        posterior: The posterior.
        options: Further arguments of ``predict``: ``num_samples`` and ``seed``.
        loop: ``x -> outputs (S, N, ...)`` by a plain loop, where it is not over draws of parameters.
    """

    fn: Model
    params: Params
    posterior: Posterior
    options: Mapping[str, Any] = field(default_factory=dict)
    loop: Callable[[Tensor], Tensor] | None = None

    def predict(self, x: Tensor, likelihood: Likelihood | None = None) -> Prediction:
        """Predict as the method is meant to."""
        return predict(self.fn, self.params, self.posterior, x, likelihood=likelihood, **self.options)


@dataclass(frozen=True)
class Method:
    """A line of the table: a name to print, and ``(task, seed) -> Fitted``."""

    name: str
    fit: Callable[[Task, int], Fitted]


def fit_single(task: Task, seed: int) -> Fitted:
    """One network at its maximum a posteriori estimate."""
    fn, params = make_functional(_seeded_module(task, 0.0, seed))
    params = training.fit(fn, params, task.data, task.likelihood, seed=seed, **task.training)
    return Fitted(fn, params, Point(params))


def fit_dropout(task: Task, seed: int, rate: float) -> Fitted:
    """One network trained with dropout, which stays on when it predicts."""
    module = _seeded_module(task, rate, seed)
    fn, params = make_functional(module)
    params = training.fit(fn, params, task.data, task.likelihood, seed=seed, **task.training)
    module.load_state_dict(params)
    module.train()

    def loop(x: Tensor) -> Tensor:
        """What one writes by hand: torch's own dropout, with masks from the global random state."""
        with torch.no_grad():
            return torch.stack([module(x) for _ in range(task.num_draws)])

    return Fitted(fn, params, Dropout(), {"num_samples": task.num_draws, "seed": seed}, loop)


def fit_ensemble(task: Task, seed: int) -> Fitted:
    """Networks from different starts, trained together in one vectorised pass a step."""
    fn, members = ensemble.init(functools.partial(task.make_module, 0.0), task.num_members, seed)
    posterior = ensemble.fit(fn, members, task.data, task.likelihood, seed=seed, **task.training)
    return Fitted(fn, None, posterior)


def fit_swag(task: Task, seed: int) -> Fitted:
    """One network, and the weights that it passes through when training goes on at a high learning rate."""
    fn, params = make_functional(_seeded_module(task, 0.0, seed))
    params = training.fit(fn, params, task.data, task.likelihood, seed=seed, **task.training)
    posterior = _collected(task, seed, fn, params)
    return Fitted(fn, None, posterior, {"num_samples": task.num_draws, "seed": seed})


def fit_multi_swag(task: Task, seed: int) -> Fitted:
    """SWAG around every member of an ensemble, in vectorised passes; the Gaussians are mixed."""
    fn, members = ensemble.init(functools.partial(task.make_module, 0.0), task.num_members, seed)
    trained = ensemble.fit(fn, members, task.data, task.likelihood, seed=seed, **task.training)
    gaussians = _collected(task, seed, fn, trained.members, stacked=True)
    posterior = mixture(gaussians, stacked=True)
    return Fitted(fn, None, posterior, {"num_samples": task.num_draws, "seed": seed})


def fit_swag_and_dropout(task: Task, seed: int, rate: float) -> Fitted:
    """A posterior of two parts: the last layer by SWAG, and dropout before it."""
    module = _seeded_module(task, rate, seed)
    fn, params = make_functional(module)
    params = training.fit(fn, params, task.data, task.likelihood, seed=seed, **task.training)
    last = list(params)[-1].rpartition(".")[0]
    collected = _collected(task, seed, fn, params)
    head, params = restrict(collected, f"{last}.*"), collected.mean
    module.load_state_dict(params)
    module.train()

    def loop(x: Tensor) -> Tensor:
        """What one writes by hand: weights of the last layer put in place, and torch's own dropout."""
        draws = head.sample(task.num_draws, seed=seed)
        with torch.no_grad():
            outputs = []
            for weights in zip(*draws.values(), strict=True):
                module.load_state_dict(dict(zip(draws, weights, strict=True)), strict=False)
                outputs.append(module(x))
            return torch.stack(outputs)

    posterior = join(head, Dropout())
    return Fitted(fn, params, posterior, {"num_samples": task.num_draws, "seed": seed}, loop)


def fit_laplace(task: Task, seed: int, *, last_layer: bool) -> Fitted:
    """A Gaussian around one network, as wide as curvature says; its prior is chosen by evidence."""
    fn, params = make_functional(_seeded_module(task, 0.0, seed))
    params = training.fit(fn, params, task.data, task.likelihood, seed=seed, **task.training)
    where = f"{list(params)[-1].rpartition('.')[0]}.*" if last_layer else None
    posterior = laplace.fit(fn, params, task.data, task.likelihood, where=where, tune="model")
    options = {"num_samples": task.num_draws, "seed": seed}
    return Fitted(fn, params, posterior, options, lambda x: _jvp_loop(fn, params, posterior, x, options))


def fit_laplace_mixture(task: Task, seed: int) -> Fitted:
    """Such a Gaussian around every member of an ensemble, all curvatures in one pass, mixed."""
    fn, members = ensemble.init(functools.partial(task.make_module, 0.0), task.num_members, seed)
    trained = ensemble.fit(fn, members, task.data, task.likelihood, seed=seed, **task.training)
    gaussians = laplace.fit(fn, trained.members, task.data, task.likelihood, tune="model", stacked=True)
    posterior = mixture(gaussians, stacked=True)
    assert isinstance(posterior, Mixture)

    def loop(x: Tensor) -> Tensor:
        """As many draws of each component as there are in all, in turns."""
        counts = [len(part) for part in torch.arange(task.num_draws).tensor_split(task.num_members)]
        outputs = []
        for k, (component, count) in enumerate(zip(posterior.components, counts, strict=True)):
            if count:
                options = {"num_samples": count, "seed": seed}
                outputs.append(_jvp_loop(fn, index(trained.members, k), component, x, options))
        return torch.cat(outputs)

    return Fitted(fn, None, posterior, {"num_samples": task.num_draws, "seed": seed}, loop)


def fit_variational(task: Task, seed: int) -> Fitted:
    """A Gaussian moved to where the ELBO is largest; pre-activations are drawn instead of weights."""
    fn, params = make_functional(_seeded_module(task, 0.0, seed))
    options = {**task.training, "estimator": "local"}
    posterior = vi.fit(fn, params, task.data, task.likelihood, seed=seed, **options)
    return Fitted(fn, None, posterior, {"num_samples": task.num_draws, "seed": seed})


def fit_ivon(task: Task, seed: int) -> Fitted:
    """Such a Gaussian found by natural gradients, at the cost of training one network."""
    fn, params = make_functional(_seeded_module(task, 0.0, seed))
    options = {**task.training, **task.natural}
    del options["optimizer"]
    posterior = ivon.fit(fn, params, task.data, task.likelihood, seed=seed, **options)
    return Fitted(fn, None, posterior, {"num_samples": task.num_draws, "seed": seed})


def fit_sghmc(task: Task, seed: int) -> Fitted:
    """Chains that go on from one network with momentum and noise, in vectorised passes; states are kept."""
    fn, params = make_functional(_seeded_module(task, 0.0, seed))
    params = training.fit(fn, params, task.data, task.likelihood, seed=seed, **task.training)
    options = {
        name: task.training[name] for name in ("batch_size", "prior_precision") if name in task.training
    }
    options |= task.sampling
    kept = (options["num_steps"] - options["num_burn_in"]) * options["num_chains"]
    options["thin"] = max(kept // task.num_draws, 1)
    sampler = sgmcmc.sghmc(options.pop("step_size"))
    posterior = sgmcmc.fit(fn, params, task.data, task.likelihood, sampler=sampler, seed=seed, **options)
    return Fitted(fn, None, posterior)


def _jvp_loop(fn: Model, params: Params, posterior: Any, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    """What one writes by hand: the linearised model at one draw after another."""
    linear, draws = linearize(fn, params), posterior.sample(**options)
    with torch.no_grad():
        return torch.stack([linear(merge(params, index(draws, i)), x) for i in range(options["num_samples"])])


def _collected(task: Task, seed: int, fn: Model, params: Params, **options: Any) -> Gaussian:
    settings = {**task.training, **task.collecting, **options}
    return swag.fit(fn, params, task.data, task.likelihood, seed=seed, **settings)


def _seeded_module(task: Task, rate: float, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.make_module(rate)


METHODS = (
    Method("single network", fit_single),
    Method("MC dropout", functools.partial(fit_dropout, rate=0.1)),
    Method("deep ensemble", fit_ensemble),
    Method("SWAG", fit_swag),
    Method("MultiSWAG", fit_multi_swag),
    Method("dropout, SWAG head", functools.partial(fit_swag_and_dropout, rate=0.1)),
    Method("Laplace, all layers", functools.partial(fit_laplace, last_layer=False)),
    Method("Laplace, last layer", functools.partial(fit_laplace, last_layer=True)),
    Method("mixture of Laplace", fit_laplace_mixture),
    Method("variational (diag)", fit_variational),
    Method("IVON", fit_ivon),
    Method("SGHMC", fit_sghmc),
)
