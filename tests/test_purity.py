"""No public call changes what it is given, nor anything else, whether it returns or raises."""

import collections
import contextlib
import copy
import functools
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
import zoo
from matplotlib.figure import Figure
from torch import nn
from torch.testing import assert_close
from zoo import MODELS, expected_samples, gaussian, randn

import funcbayes as fb
from funcbayes import metrics, plots
from funcbayes.likelihoods import Bernoulli, Categorical, HeteroscedasticNormal, Normal, Poisson

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:The Hessian in .* is indefinite:UserWarning"),
]

SGD = functools.partial(torch.optim.SGD, lr=0.01)
NUM_ROWS = 6


class World(NamedTuple):
    """Everything that a call could touch."""

    module: nn.Module
    fn: Any
    params: Any
    posterior: Any
    ensemble: Any
    members: Any
    x: Any
    y: Any
    outputs: Any
    targets: Any
    probs: Any
    line: Any
    noise_std: Any
    path: Any


def make_module():
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return module.double()


def make_world(tmp_path) -> World:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make_module()
    module.train()
    module[0].eval()  # a mixture of modes
    module[5].weight.requires_grad_(False)
    module[5].bias.grad = randn(3)
    module.register_forward_hook(lambda module, args, output: None)
    module[0].register_forward_pre_hook(lambda module, args: None)
    fn, params = fb.make_functional(module)
    members = zoo.members(params, 3)
    x, y = randn(NUM_ROWS, 2, 6, 6), torch.arange(NUM_ROWS) % 3
    outputs, targets = randn(NUM_ROWS, 3, seed=3), randn(NUM_ROWS, 3, seed=4)
    noise_std = torch.tensor(0.5, dtype=zoo.F64)
    return World(
        *(module, fn, params, gaussian(params), fb.Ensemble(members), members, x, y),
        *(outputs, targets, outputs.softmax(-1), randn(NUM_ROWS, 1, seed=5), noise_std),
        tmp_path / "p.safetensors",
    )


def tensors_of(value):
    if isinstance(value, nn.Module):
        return [
            *value.parameters(),
            *value.buffers(),
            *(p.grad for p in value.parameters() if p.grad is not None),
        ]
    found = [leaf for leaf in optree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found + list(getattr(value, "buffers", {}).values())


def description(value):
    """What identity and flags say of one thing: tensors, versions, gradients, modes and hooks."""
    flags = [
        (id(t), t._version, t.requires_grad, t.shape, t.dtype, None if t.grad is None else id(t.grad))
        for t in tensors_of(value)
    ]
    if isinstance(value, nn.Module):
        hooks = [
            (
                part.training,
                *(
                    tuple(getattr(part, kind))
                    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
                ),
            )
            for part in value.modules()
        ]
        names = [sorted(vars(part)) for part in value.modules()]
        return flags, hooks, names
    return flags


class Snapshot:
    def __init__(self, *values):
        self.values = values
        self.before = [description(v) for v in values]
        self.numbers = [[t.detach().clone() for t in tensors_of(v)] for v in values]
        self.grad_modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self.defaults = (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def assert_unchanged(self):
        for value, before, numbers in zip(self.values, self.before, self.numbers, strict=True):
            assert description(value) == before
            for tensor, number in zip(tensors_of(value), numbers, strict=True):
                assert torch.equal(tensor, number)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == self.grad_modes
        now = (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )
        assert now == self.defaults


def batches(w):
    return list(zip(w.x.split(2), w.y.split(2), strict=True))


# Each takes the world and a seed (or None); those that have no seed ignore it.
CALLS: dict[str, Callable[[World, int | None], Any]] = {
    "make_functional": lambda w, seed: fb.make_functional(w.module)[1],
    "fn": lambda w, seed: w.fn(w.params, w.x),
    "predict": lambda w, seed: (
        fb.predict(
            w.fn, w.params, w.posterior, w.x, likelihood=Categorical(), targets=w.y, num_samples=5, seed=seed
        ).samples
    ),
    "predict_in_chunks": lambda w, seed: (
        fb.predict(w.fn, w.params, w.posterior, w.x, num_samples=5, seed=seed, chunk_size=2).samples
    ),
    "predict_streamed": lambda w, seed: (
        fb.predict(
            w.fn,
            w.params,
            w.posterior,
            w.x,
            likelihood=Categorical(),
            num_samples=5,
            seed=seed,
            keep_samples=False,
        ).mean
    ),
    "predict_with_dropout": lambda w, seed: (
        fb.predict(w.fn, w.params, fb.Dropout(), w.x, num_samples=5, seed=seed).samples
    ),
    "predict_with_shared_dropout": lambda w, seed: (
        fb.predict(w.fn, w.params, fb.Dropout(shared_mask=True), w.x, num_samples=5, seed=seed).samples
    ),
    "predict_with_an_ensemble": lambda w, seed: fb.predict(w.fn, None, w.ensemble, w.x).samples,
    "predict_in_another_dtype": lambda w, seed: (
        fb.predict(w.fn, w.params, w.posterior, w.x, num_samples=5, seed=seed, dtype=torch.float32).samples
    ),
    "statistics": lambda w, seed: statistics(
        fb.predict(w.fn, w.params, w.posterior, w.x, likelihood=Categorical(), num_samples=5, seed=seed), w.y
    ),
    "predictor": lambda w, seed: (
        fb.predictor(w.fn, w.params, w.posterior, num_samples=5, seed=seed)(w.x).samples
    ),
    "predict_batches": lambda w, seed: (
        fb.predict_batches(
            w.fn, w.params, w.posterior, batches(w), likelihood=Categorical(), num_samples=5, seed=seed
        ).samples
    ),
    "sample": lambda w, seed: w.posterior.sample(4, seed=seed),
    "sample_an_ensemble": lambda w, seed: w.ensemble.sample(4, seed=seed),
    "draws": lambda w, seed: w.posterior.draws(torch.arange(4), 0 if seed is None else seed),
    "moments": lambda w, seed: (w.ensemble.mean, w.ensemble.variance, w.posterior.variance),
    "members": lambda w, seed: (w.ensemble.member(1), w.ensemble.num_members, w.ensemble.atoms()),
    "log_prob": lambda w, seed: w.posterior.log_prob(w.params),
    "point": lambda w, seed: point(fb.Point(w.params)),
    "covariance": lambda w, seed: covariance(w.posterior.covariance, w.params),
    "to": lambda w, seed: fb.to(w.posterior, dtype=torch.float32),
    "low_rank_covariance": lambda w, seed: covariance(low_rank(w.params), w.params),
    "gaussian_of_low_rank": lambda w, seed: densities(fb.Gaussian(w.params, low_rank(w.params)), w.params),
    "kl": lambda w, seed: fb.kl(fb.Gaussian(w.params, low_rank(w.params)), w.posterior),
    "swag_update": lambda w, seed: fb.swag.update(fb.swag.init(w.params), w.params),
    "swag_posterior": lambda w, seed: fb.swag.posterior(swag_state(w.params)),
    "swag_fit": lambda w, seed: fb.swag.fit(
        w.fn, w.params, (w.x, w.y), Categorical(), optimizer=SGD, num_epochs=3, batch_size=3, seed=seed
    ),
    "swag_fit_stacked": lambda w, seed: fb.swag.fit(
        w.fn, w.members, (w.x, w.y), Categorical(), optimizer=SGD, num_epochs=3, stacked=True, seed=seed
    ),
    "refresh_batch_norm": lambda w, seed: fb.refresh_batch_norm(w.fn, None, w.ensemble, (w.x, w.y)),
    "modules_mc_dropout": lambda w, seed: fb.modules.MCDropout(w.module).predict(w.x, seed=seed),
    "mixture": lambda w, seed: fb.mixture(w.posterior, w.ensemble, weights=[1, 3]).sample(7, seed=seed),
    "moments_of_a_mixture": lambda w, seed: moments(fb.mixture(w.posterior, w.ensemble), w.params),
    "stacked_mixture": lambda w, seed: fb.mixture(
        fb.Gaussian(w.members, fb.covariances.Diagonal(optree.tree_map(torch.square, w.members))),
        stacked=True,
    ).sample(5, seed=seed),
    "join": lambda w, seed: (
        fb.predict(
            w.fn,
            w.params,
            fb.join(fb.restrict(w.posterior, "5.*"), fb.Dropout()),
            w.x,
            num_samples=5,
            seed=seed,
        ).samples
    ),
    "moments_of_a_join": lambda w, seed: moments(fb.join(w.posterior, fb.Dropout()), w.params),
    "temper": lambda w, seed: fb.temper(w.posterior, 0.5),
    "restrict": lambda w, seed: (fb.restrict(w.posterior, "0.*"), fb.restrict(w.ensemble, "0.*")),
    "to_ensemble": lambda w, seed: fb.to_ensemble(w.posterior, 4, seed=seed),
    "sample_function": lambda w, seed: fb.sample_function(w.fn, w.params, w.posterior, seed=seed)(w.x),
    "linearize": lambda w, seed: fb.linearize(w.fn, w.params)(w.ensemble.member(1), w.x),
    "predict_with_a_linearized_model": lambda w, seed: (
        fb.predict(fb.linearize(w.fn, w.params), w.params, w.posterior, w.x, num_samples=5, seed=seed).samples
    ),
    "predict_linearized_draws": lambda w, seed: (
        fb.predict(w.fn, w.params, zoo.linearized(w.posterior), w.x, num_samples=5, seed=seed).samples
    ),
    "quantiles": lambda w, seed: quantiles(numbers(w, seed)),
    "quantiles_of_outputs": lambda w, seed: quantiles(
        fb.predict(w.fn, w.params, w.posterior, w.x, num_samples=5, seed=seed)
    ),
    "metrics_of_classes": lambda w, seed: metrics_of_classes(classes(w, seed), w.y),
    "metrics_of_numbers": lambda w, seed: metrics_of_numbers(numbers(w, seed), w.targets),
    "metrics_of_tensors": lambda w, seed: [
        *(score(w.probs, w.y) for score in (metrics.accuracy, metrics.brier, metrics.ece)),
        metrics.rmse(w.probs, w.targets),
        metrics.ood_auroc(w.probs[:, 0], w.probs[:, 1]),
    ],
    "reliability_diagram": lambda w, seed: drawn(
        lambda ax: plots.reliability_diagram(classes(w, seed), w.y, ax=ax)
    ),
    "entropy_histograms": lambda w, seed: drawn(
        lambda ax: plots.entropy_histograms(classes(w, seed).entropy, w.probs[:, 0], ax=ax)
    ),
    "predictive_bands": lambda w, seed: drawn(
        lambda ax: plots.predictive_bands(w.line, curve(w, seed), (w.line, w.targets[:, 0]), ax=ax)
    ),
    "training_fit": lambda w, seed: fb.training.fit(
        w.fn, w.params, (w.x, w.y), Categorical(), optimizer=SGD, num_epochs=2, batch_size=3, seed=seed
    ),
    "training_fit_on_batches": lambda w, seed: fb.training.fit(
        w.fn, w.params, batches(w), Categorical(), optimizer=SGD, num_epochs=2, seed=seed
    ),
    "ensemble_init": lambda w, seed: fb.ensemble.init(make_module, 2, seed=seed)[1],
    "ensemble_fit": lambda w, seed: fb.ensemble.fit(
        w.fn, w.members, (w.x, w.y), Categorical(), optimizer=SGD, num_epochs=2, batch_size=3, seed=seed
    ),
    "training_fit_with_every_option": lambda w, seed: fb.training.fit(
        w.fn,
        w.params,
        (w.x, w.y),
        Categorical(),
        optimizer=SGD,
        num_epochs=2,
        batch_size=3,
        seed=seed,
        bootstrap=True,
        adversarial=0.01,
        validation=(w.x, w.y),
        patience=1,
    ),
    "ensemble_fit_with_every_option": lambda w, seed: fb.ensemble.fit(
        w.fn,
        w.members,
        (w.x, w.y),
        Categorical(),
        optimizer=SGD,
        num_epochs=2,
        batch_size=3,
        seed=seed,
        bootstrap=True,
        adversarial=0.01,
        validation=batches(w),
        patience=1,
    ),
    "fit_snapshots": lambda w, seed: fb.ensemble.fit_snapshots(
        w.fn,
        w.params,
        batches(w),
        Categorical(),
        optimizer=SGD,
        num_cycles=2,
        epochs_per_cycle=1,
        adversarial=0.01,
        seed=seed,
    ),
    "bootstrap_rows": lambda w, seed: fb.training.bootstrap_rows(0 if seed is None else seed, 5),
    "select": lambda w, seed: fb.ensemble.select(w.fn, None, w.ensemble, (w.x, w.y), Categorical(), 2),
    "prune": lambda w, seed: fb.ensemble.prune(w.fn, None, w.ensemble, batches(w), Categorical(), 2),
    "diversity": lambda w, seed: diversities(classes(w, seed)),
    "member_seeds": lambda w, seed: torch.tensor(fb.ensemble.member_seeds(0 if seed is None else seed, 3)),
    "from_modules": lambda w, seed: fb.ensemble.from_modules([w.module, copy.deepcopy(w.module)])[1],
    "save": lambda w, seed: fb.save(w.posterior, w.path),
    "load": lambda w, seed: (fb.save(w.posterior, w.path), fb.load(w.path))[1],
    "curvature_ggn": lambda w, seed: [
        fb.curvature.ggn(w.fn, w.params, (w.x, w.y), Categorical(), structure, batch_size=4)
        for structure in ("diag", "kron", "full")
    ],
    "curvature_ggn_stacked": lambda w, seed: fb.curvature.ggn(
        w.fn, w.members, batches(w), Categorical(), eigenvalue_correction=True, stacked=True
    ),
    "curvature_ggn_low_rank": lambda w, seed: fb.curvature.ggn(
        w.fn, w.params, (w.x, w.y), Categorical(), "low_rank", rank=3, seed=seed
    ),
    "curvature_fisher": lambda w, seed: fb.curvature.fisher(
        w.fn, w.params, (w.x, w.y), Categorical(), mc_samples=2, seed=seed
    ),
    "curvature_fisher_low_rank": lambda w, seed: fb.curvature.fisher(
        w.fn, w.params, (w.x, w.y), Categorical(), "low_rank", rank=3, seed=seed
    ),
    "curvature_empirical_fisher": lambda w, seed: fb.curvature.empirical_fisher(
        w.fn, w.params, (w.x, w.outputs), Normal(w.noise_std)
    ),
    "curvature_hessian": lambda w, seed: fb.curvature.hessian(
        w.fn, w.params, (w.x, w.y), Categorical(), where="5.*"
    ),
    "curvature_hessian_low_rank": lambda w, seed: fb.curvature.hessian(
        w.fn, w.params, (w.x, w.y), Categorical(), "low_rank", rank=3, seed=seed
    ),
    "curvature_products": lambda w, seed: [
        make(w.fn, w.params, (w.x, w.y), Categorical())(w.params)
        for make in (fb.curvature.ggn_matvec, fb.curvature.hvp)
    ],
    "curvatures_added": lambda w, seed: added(
        fb.curvature.ggn(w.fn, w.params, (w.x, w.y), Categorical(), structure, seed=1)
        for structure in ("diag", "kron", "low_rank", "full")
    ),
    "laplace_posterior": lambda w, seed: fb.laplace.posterior(w.params, ggn_of(w), 2.0, prior_mean=w.params),
    "laplace_posterior_with_a_prior": lambda w, seed: [
        fb.laplace.posterior(w.params, ggn_of(w, structure), prior=w.posterior)
        for structure in ("diag", "low_rank")
    ],
    "laplace_log_marginal_likelihood": lambda w, seed: fb.laplace.log_marginal_likelihood(
        w.params, ggn_of(w), 2.0, prior_mean=w.params
    ),
    "laplace_maximize_evidence": lambda w, seed: vars(
        fb.laplace.maximize_evidence(w.params, ggn_of(w), per="leaf", num_steps=5)
    ),
    "laplace_minimize_validation_nll": lambda w, seed: vars(
        fb.laplace.minimize_validation_nll(
            w.fn, w.params, ggn_of(w), (w.x, w.y), Categorical(), grid=[0.1, 1.0], link="mc", seed=seed
        )
    ),
    "laplace_fit": lambda w, seed: fb.laplace.fit(
        w.fn, w.params, batches(w), Categorical(), where="5.*", tune="leaf"
    ),
    "laplace_fit_low_rank": lambda w, seed: fb.laplace.fit(
        w.fn, w.params, (w.x, w.y), Categorical(), structure="low_rank", rank=3, seed=seed
    ),
    "laplace_fit_stacked": lambda w, seed: fb.laplace.fit(
        w.fn, w.members, (w.x, w.y), Categorical(), stacked=True
    ),
    "laplace_train": lambda w, seed: vars(
        fb.laplace.train(
            w.fn, w.params, (w.x, w.y), Categorical(), optimizer=SGD, num_epochs=2, batch_size=3, seed=seed
        )
    ),
    "predict_linearized": lambda w, seed: linearized_statistics(
        fb.predict_linearized(w.fn, w.params, w.posterior, w.x, likelihood=Categorical()), w.y
    ),
    "predict_linearized_by_monte_carlo": lambda w, seed: linearized_statistics(
        fb.predict_linearized(
            w.fn, w.params, w.posterior, w.x, likelihood=Categorical(), link="mc", num_samples=5, seed=seed
        ),
        w.y,
    ),
    "predict_linearized_sample": lambda w, seed: fb.predict_linearized(
        w.fn, w.params, w.posterior, w.x, joint=True
    ).sample(3, seed=seed),
}
CALLS |= {
    f"likelihood_{name}": lambda w, seed, make=make: methods_of(make(w), seed)
    for name, make in {
        "categorical": lambda w: (Categorical(), w.outputs, w.y),
        "bernoulli": lambda w: (Bernoulli(), w.outputs, (w.targets > 0).long()),
        "normal": lambda w: (Normal(w.noise_std), w.outputs, w.targets),
        "heteroscedastic": lambda w: (
            HeteroscedasticNormal(), torch.cat([w.outputs, w.targets], -1), w.targets
        ),
        "poisson": lambda w: (Poisson(), w.outputs, w.targets.abs().round()),
    }.items()
}  # fmt: skip
HAS_NO_SEED = {
    *("make_functional", "fn", "predict_with_an_ensemble", "draws", "moments", "members", "log_prob"),
    *("low_rank_covariance", "gaussian_of_low_rank", "kl"),
    *("swag_update", "swag_posterior", "refresh_batch_norm"),
    *("bootstrap_rows", "select", "prune"),
    *("curvature_ggn", "curvature_ggn_stacked", "curvature_empirical_fisher", "curvature_hessian"),
    *("curvature_products", "curvatures_added"),
    *("laplace_posterior", "laplace_posterior_with_a_prior", "laplace_log_marginal_likelihood"),
    *("laplace_maximize_evidence", "laplace_fit", "laplace_fit_stacked", "predict_linearized"),
    *("moments_of_a_mixture", "moments_of_a_join", "temper", "restrict", "linearize"),
    *("point", "covariance", "to", "metrics_of_tensors", "member_seeds", "from_modules", "save", "load"),
    *(name for name in CALLS if name.startswith("likelihood_")),
}


def added(curvatures):
    return [c + c for c in curvatures]


def ggn_of(w, structure="kron"):
    return fb.curvature.ggn(w.fn, w.params, (w.x, w.y), Categorical(), structure, seed=0)


def linearized_statistics(prediction, y):
    return [
        *(getattr(prediction, name) for name in ("output_mean", "output_covariance", "mean", "variance")),
        prediction.entropy,
        prediction.log_prob(y),
    ]


def statistics(prediction, y):
    names = ("mean", "variance", "std", "epistemic_variance", "aleatoric_variance", "entropy")
    return [
        *(getattr(prediction, name) for name in (*names, "expected_entropy", "mutual_information")),
        prediction.log_prob(y),
        prediction.distribution().log_prob(y),
    ]


def classes(w, seed):
    return fb.predict(
        w.fn, w.params, w.posterior, w.x, likelihood=Categorical(), num_samples=5, seed=seed, targets=w.y
    )


def numbers(w, seed):
    normal = Normal(w.noise_std)
    return fb.predict(w.fn, w.params, w.posterior, w.x, likelihood=normal, num_samples=5, seed=seed)


def quantiles(prediction):
    found = [prediction.quantile(0.3), *prediction.interval(0.9)]
    if prediction.likelihood is None:
        return found
    distribution = prediction.distribution()
    return [*found, prediction.aleatoric_variance, distribution.mean, distribution.variance]


def curve(w, seed):
    return fb.predict(
        lambda params, x: w.fn(params, x)[:, 0],
        *(w.params, w.posterior, w.x),
        likelihood=Normal(w.noise_std),
        num_samples=5,
        seed=seed,
    )


def metrics_of_classes(prediction, y):
    scores = metrics.nll, metrics.accuracy, metrics.brier, metrics.ece
    auroc = metrics.ood_auroc(prediction.entropy, prediction.mutual_information)
    return [*(score(prediction, y) for score in scores), auroc]


def diversities(prediction):
    return [f(prediction) for f in (metrics.diversity, metrics.disagreement, metrics.pairwise_kl)]


def metrics_of_numbers(prediction, y):
    return metrics.nll(prediction, y), metrics.rmse(prediction, y)


def drawn(draw):
    """The numbers of the lines and bars that are drawn on an Axes."""
    ax = draw(Figure().add_subplot())
    lines = [torch.as_tensor(line.get_xydata()) for line in ax.get_lines()]
    return [*lines, *(torch.tensor(patch.get_path().vertices) for patch in ax.patches)]


def methods_of(case, seed):
    """Everything that a likelihood can do."""
    likelihood, outputs, y = case
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    likelihood.check(outputs, y)
    found = [likelihood.log_prob(outputs, y), likelihood.log_likelihood(outputs, y)]
    found += [likelihood.num_terms(outputs, y), likelihood.mean(outputs), likelihood.variance(outputs)]
    found += [likelihood.sample(outputs, generator=generator, num_samples=2)]
    found += [likelihood.fisher(outputs), likelihood.fisher(outputs, y=y), likelihood.fisher_sqrt(outputs)]
    found += [likelihood.hessian(outputs, y), likelihood.distribution(outputs).log_prob(y.to(outputs.dtype))]
    if likelihood.has_entropy:
        found.append(likelihood.entropy(outputs))
    if likelihood.is_discrete:
        log_probs = likelihood.log_class_probs(outputs)
        of_log_probs = (likelihood.mean_of_log_probs, likelihood.entropy_of_log_probs)
        return [*found, log_probs, *(method(log_probs) for method in of_log_probs)]
    return [*found, likelihood.cdf(outputs, y)]


def point(posterior):
    return posterior.mean, posterior.variance, posterior.atoms(), posterior.sample(3, seed=0)


def low_rank(params):
    factors = {k: torch.stack([v, v**2], -1) for k, v in params.items()}
    return fb.covariances.LowRankPlusDiagonal({k: v**2 + 0.1 for k, v in params.items()}, factors)


def densities(posterior, params):
    return [posterior.log_prob(params), posterior.entropy(), posterior.variance, posterior.sample(3, seed=0)]


def swag_state(params):
    state = fb.swag.init(params, rank=2)
    for step in range(4):
        state = fb.swag.update(state, {k: v + step * v**2 for k, v in params.items()})
    return state


def moments(posterior, params):
    found = [posterior.mean, posterior.variance]
    try:
        return [*found, posterior.log_prob(params)]
    except NotImplementedError:
        return found


def covariance(covariance, vector):
    return [
        *(covariance.matvec(vector), covariance.solve(vector), covariance.diagonal(), covariance.logdet()),
        *(covariance.quadratic_form(vector), covariance.deviations(torch.arange(3), 0)),
    ]


all_calls = pytest.mark.parametrize("name", CALLS)


def assert_close_trees(one, other):
    one, other = tensors_of(one), tensors_of(other)
    for a, b in zip(one, other, strict=True):
        assert_close(a, b)


@contextlib.contextmanager
def seeded_globally(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@all_calls
def test_a_call_changes_neither_its_arguments_nor_any_global_state(name, tmp_path):
    world = make_world(tmp_path)
    snapshot, python_state = Snapshot(*world), random.getstate()
    with seeded_globally(1):
        before = torch.get_rng_state()
        first = CALLS[name](world, 5)
        assert torch.equal(torch.get_rng_state(), before)
        snapshot.assert_unchanged()
        again = CALLS[name](world, 5)
        assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_state
    snapshot.assert_unchanged()
    assert_close_trees(first, again)


@all_calls
def test_a_call_does_the_same_where_gradients_are_off_or_arguments_ask_for_them(name, tmp_path):
    world = make_world(tmp_path)
    first = CALLS[name](world, 5)
    with torch.no_grad():
        assert_close_trees(CALLS[name](world, 5), first)
        assert not torch.is_grad_enabled()
    wanting = world._replace(params={k: v.clone().requires_grad_() for k, v in world.params.items()})
    snapshot = Snapshot(*wanting)
    got = CALLS[name](wanting, 5)
    snapshot.assert_unchanged()
    for a, b in zip(tensors_of(got), tensors_of(first), strict=True):
        assert_close(a.detach(), b.detach())


@pytest.mark.parametrize("name", sorted(set(CALLS) - HAS_NO_SEED))
def test_without_a_seed_a_call_is_governed_by_manual_seed_alone(name, tmp_path):
    world = make_world(tmp_path)
    with seeded_globally(3):
        before = torch.get_rng_state()
        first = CALLS[name](world, None)
        after = torch.get_rng_state()
        torch.rand(10)
        torch.manual_seed(3)
        again = CALLS[name](world, None)
        assert torch.equal(torch.get_rng_state(), after)
        assert not torch.equal(after, before)
        torch.manual_seed(3)
        torch.randint(0, 2**63 - 1, ())  # one number is drawn
        assert torch.equal(torch.get_rng_state(), after)
    assert_close_trees(first, again)


def test_results_share_no_memory_with_the_module_or_the_parameters(tmp_path):
    world = make_world(tmp_path)
    module = {t.untyped_storage().data_ptr() for t in tensors_of(world.module)}
    _, params = fb.make_functional(world.module)
    assert not module & {t.untyped_storage().data_ptr() for t in params.values()}
    assert not any(p.requires_grad or p.grad is not None for p in params.values())
    with torch.no_grad():
        for p in world.module.parameters():
            p.add_(1)
    for name, value in params.items():
        assert torch.equal(value, world.params[name])


def test_changing_the_module_later_does_not_change_the_function(tmp_path):
    world = make_world(tmp_path)
    expected = world.fn(world.params, world.x)
    with torch.no_grad():
        for t in (*world.module.parameters(), *world.module.buffers()):
            t.mul_(2)
    world.module[5] = nn.Identity()
    assert_close(world.fn(world.params, world.x), expected)


@pytest.mark.parametrize(
    "first", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=["relu", "dropout"]
)
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_a_model_that_works_in_place_does_not_change_its_inputs(first, chunk_size):
    fn, params = fb.make_functional(nn.Sequential(first, nn.Linear(3, 2)).double())
    x = randn(5, 3)
    before = x.clone()
    posterior = fb.Dropout() if isinstance(first, nn.Dropout) else gaussian(params)
    fb.predict(fn, params, posterior, x, num_samples=4, seed=0, chunk_size=chunk_size)
    assert torch.equal(x, before)
    fn(params, x)
    assert torch.equal(x, before)


class FillsGaps(nn.Module):
    """Writes into its inputs where they have gaps."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        if x.isnan().any():
            x[x.isnan()] = 0
        return self.head(x)


class DoublesSeveral(FillsGaps):
    """Writes into inputs of more than one row."""

    def forward(self, x):
        if x.shape[0] > 1:
            x.mul_(2)
        return self.head(x)


class DoublesAView(FillsGaps):
    """Writes through a view, and by a function of torch, into inputs whose sum is positive."""

    def forward(self, x):
        if x.sum() > 0:
            nn.functional.relu(x.view(-1), inplace=True)
            x[1:].mul_(2)
        return self.head(x)


def hooked():
    """No module of the user's, and still it writes: a hook does."""
    module = nn.Linear(3, 2)
    module.register_forward_pre_hook(lambda module, args: args[0].mul_(2) if len(args[0]) > 1 else None)
    return module


NAN = float("nan")
# A module, inputs that it leaves alone, and inputs that it writes into.
SOMETIMES_WRITING = {
    "gaps": (FillsGaps, lambda: randn(5, 3), lambda: randn(5, 3).index_fill(1, torch.tensor(1), NAN)),
    "several_rows": (DoublesSeveral, lambda: randn(1, 3), lambda: randn(4, 3)),
    "view": (DoublesAView, lambda: -randn(4, 3).abs(), lambda: randn(4, 3).abs() - 0.1),
    "hook": (hooked, lambda: randn(1, 3), lambda: randn(4, 3)),
}
sometimes_writing = pytest.mark.parametrize(
    ("make", "left_alone", "written"), SOMETIMES_WRITING.values(), ids=SOMETIMES_WRITING.keys()
)


def same(x, before):
    return x._version == 0 and torch.equal(x.nan_to_num(9.0), before.nan_to_num(9.0))


@pytest.mark.parametrize("first", ["left_alone", "written"])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@sometimes_writing
def test_inputs_that_a_module_writes_into_only_sometimes_never_change(
    make, left_alone, written, chunk_size, first
):
    module = make().double()
    fn, params = fb.make_functional(module)
    inputs = [left_alone(), written()] if first == "left_alone" else [written(), left_alone()]
    for _ in range(3):
        for x in inputs:
            before, expected = x.clone(), module(x.clone()).detach()
            assert_close(fn(params, x), expected)
            assert same(x, before)
            members = fb.Ensemble({k: torch.stack([v] * 4) for k, v in params.items()})
            got = fb.predict(fn, None, members, x, chunk_size=chunk_size)
            assert same(x, before)
            assert_close(got.samples, expected.expand(4, *expected.shape))


def popping(module, x):
    h = x.pop("x") * x.pop("mask")
    x["new"] = 1
    x["rest"]["list"].append(h)
    return module(h + x["rest"]["list"][0])


class Popping(FillsGaps):
    def forward(self, x):
        return popping(self.head, x)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("wrap", [dict, collections.OrderedDict, collections.UserDict])
@pytest.mark.parametrize("by_call", [False, True])
def test_a_module_that_takes_keys_out_of_its_inputs_leaves_those_of_the_user(by_call, wrap, chunk_size):
    module = FillsGaps().double() if by_call else Popping().double()
    fn, params = fb.make_functional(module, call=popping if by_call else None)
    tensors = {"x": randn(5, 3), "mask": randn(5, 3, seed=1), "shift": randn(5, 3, seed=2)}
    rest = wrap({"list": [tensors["shift"]]})
    x = wrap({"x": tensors["x"], "mask": tensors["mask"], "rest": rest})
    expected = module.head(tensors["x"] * tensors["mask"] + tensors["shift"]).detach()
    posterior = fb.Ensemble({k: torch.stack([v] * 4) for k, v in params.items()})
    for _ in range(3):
        assert_close(fn(params, x), expected)
        got = fb.predict(fn, None, posterior, x, chunk_size=chunk_size).samples
        assert_close(got, expected.expand(4, 5, 2))
        assert type(x) is type(rest) is wrap
        assert list(x) == ["x", "mask", "rest"]
        assert x["rest"] is rest
        assert len(rest["list"]) == 1
        assert all(one is other for one, other in zip(
            (x["x"], x["mask"], rest["list"][0]), tensors.values(), strict=True
        ))  # fmt: skip
        assert all(t._version == 0 for t in tensors.values())


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("wants_grad", [False, True])
@pytest.mark.parametrize("around", [contextlib.nullcontext, torch.inference_mode])
def test_an_embedding_that_is_renormalised_leaves_the_parameters_as_they_are(around, wants_grad, chunk_size):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(4, 3, max_norm=0.5), nn.Flatten(), nn.Linear(9, 2)).double()
    fn, params = fb.make_functional(module)
    x = torch.tensor([[0, 1, 3], [1, 2, 0]])
    for scale in (0.01, 1.0):  # within the limit at first
        several = {k: torch.stack([scale * v, 2 * scale * v, -scale * v]) for k, v in params.items()}
        expected = []
        for k in range(3):
            module.load_state_dict({name: v[k] for name, v in several.items()})
            expected.append(module(x).detach())
        members = {name: v.clone().requires_grad_(wants_grad) for name, v in several.items()}
        first = {name: v.detach()[0].clone() for name, v in members.items()}
        for _ in range(3):
            with around():
                got = fb.predict(fn, None, fb.Ensemble(members), x, chunk_size=chunk_size).samples
                assert_close(got.detach(), torch.stack(expected))
                assert_close(fn(first, x), expected[0])
            assert all(torch.equal(members[name], v) for name, v in several.items())
            assert all(torch.equal(first[name], v[0]) for name, v in several.items())


def test_a_module_that_writes_into_its_buffers_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.linear(x) + self.seen

    module = Counting()
    fn, params = fb.make_functional(module)
    x = torch.zeros(2, 3)
    first = fn(params, x)
    for _ in range(3):
        assert_close(fn(params, x), first)
    assert module.seen == 0
    assert fn.buffers["seen"] == 0


# Exceptions.


class Unlucky(Exception):
    pass


class Fragile(nn.Module):
    """Raises at a chosen call: class attributes, because modules are copied."""

    calls, fails_at, where = 0, None, "head"

    def __init__(self):
        super().__init__()
        self.trunk, self.norm, self.drop, self.head = (
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.4),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        Fragile.calls += 1
        fails = Fragile.fails_at is not None and Fragile.calls >= Fragile.fails_at
        h = self.norm(self.trunk(x))
        if fails and Fragile.where == "trunk":
            raise Unlucky
        h = self.head(self.drop(h))
        if fails:
            raise Unlucky
        return h


@pytest.mark.parametrize("posterior", ["gaussian", "head_only", "ensemble", "dropout", "dropout_shared_mask"])
@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize(("fails_at", "chunk_size"), [(1, None), (2, None), (1, 3), (3, 1), (3, 2)])
def test_an_exception_inside_the_model_leaves_nothing_behind(
    posterior, where, fails_at, chunk_size, monkeypatch
):
    model = zoo.from_module(Fragile, zoo.rows(3), "head", drops=True)
    of_model = {**zoo.POSTERIORS, **zoo.DROPOUTS, "head_only": zoo.head_only}[posterior]
    posterior, x = of_model(model), model.inputs(4)
    expected = expected_samples(model, posterior, x, 6, 0)
    snapshot = Snapshot(model.params, posterior, x, model.fn)

    def predict():
        return fb.predict(model.fn, model.params, posterior, x, num_samples=6, seed=0, chunk_size=chunk_size)

    monkeypatch.setattr(Fragile, "where", where)
    monkeypatch.setattr(Fragile, "fails_at", fails_at)
    monkeypatch.setattr(Fragile, "calls", 0)
    with pytest.raises(Unlucky):
        predict()
    snapshot.assert_unchanged()
    monkeypatch.setattr(Fragile, "fails_at", None)
    for _ in range(3):
        assert_close(predict().samples, expected)
    assert_close(model.fn(model.params, x), model.run(model.params, x))
    with torch.no_grad():  # nothing that intercepts is left: dropout of the world is its own again
        assert torch.equal(nn.functional.dropout(x, 0.0), x)
        assert len({tuple(nn.functional.dropout(torch.ones(50), 0.5).tolist()) for _ in range(4)}) == 4


def test_a_generator_of_batches_that_raises_leaves_nothing_behind(tmp_path):
    world = make_world(tmp_path)
    snapshot = Snapshot(*world)

    def broken():
        yield from batches(world)[:1]
        raise Unlucky

    with pytest.raises(Unlucky):
        fb.predict_batches(world.fn, world.params, world.posterior, broken(), seed=0)
    snapshot.assert_unchanged()


# Threads.


def at_once(call, num_threads=8, times=3):
    barrier, found = threading.Barrier(num_threads), [None] * num_threads

    def work(i):
        barrier.wait()
        try:
            found[i] = [call(i) for _ in range(times)]
        except Exception as error:  # noqa: BLE001  # shown by the test
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def labelled(model, i):
    x = model.inputs(4 + i % 2)
    labels = model.run(model.params, x).detach()[..., 0] > 0
    return x, labels.long()


def descent(i):
    return {"optimizer": SGD, "num_epochs": 1, "batch_size": 3, "seed": i}


MIXED = ("fn", "weights", "training_fit", "dropout", "ensemble_fit", "ensemble_init")
THREADED = {
    "fn": lambda m, i: m.fn(zoo.shifted(m.params, zoo.randn_like(m.params, i)), m.inputs(1 + i)),
    "weights": lambda m, i: (
        fb.predict(
            m.fn, m.params, gaussian(m.params, 0.1 * (1 + i)), m.inputs(1 + i), num_samples=5, seed=i
        ).samples
    ),
    "dropout": lambda m, i: (
        fb.predict(m.fn, m.params, fb.Dropout(), m.inputs(1 + i), num_samples=5, seed=i).samples
    ),
    "training_fit": lambda m, i: fb.training.fit(m.fn, m.params, labelled(m, i), Categorical(), **descent(i)),
    "ensemble_fit": lambda m, i: (
        fb.ensemble.fit(m.fn, zoo.members(m.params, 2), labelled(m, i), Categorical(), **descent(i)).members
    ),
    "ensemble_init": lambda m, i: fb.ensemble.init(make_module, 1 + i % 3, seed=i)[1],
    "mixed": lambda m, i: THREADED[MIXED[i % len(MIXED)]](m, i),
    "with_gradients": lambda m, i: torch.autograd.grad(
        fb.predict(
            m.fn,
            {k: v.clone().requires_grad_() for k, v in m.params.items()} if i % 2 else m.params,
            gaussian({k: v.clone().requires_grad_() for k, v in zoo.head_only(m).mean.items()}),
            (x := m.inputs(1 + i).requires_grad_()),
            num_samples=3,
            seed=i,
        ).samples.sum(),
        x,
    )[0],
}


def threaded():
    """Every call with every model, but those that take long with the one that takes longest."""
    for name in ("mlp_dropout", "conv_dropout", "transformer_dropout"):
        for call in THREADED:
            takes_long = call in ("training_fit", "ensemble_fit") and name == "transformer_dropout"
            has_own_model = call == "ensemble_init" and name != "mlp_dropout"
            if not takes_long and not has_own_model:
                yield name, call


@pytest.mark.parametrize(("name", "call"), list(threaded()))
def test_eight_threads_on_one_function_find_what_one_finds(name, call):
    model, call = MODELS[name](), THREADED[call]
    expected = [call(MODELS[name](), i) for i in range(8)]
    for found, value in zip(at_once(functools.partial(call, model)), expected, strict=True):
        assert not isinstance(found, Exception), found
        for one in found:
            assert_close_trees(one, value)


def test_a_mode_of_one_thread_does_not_reach_another():
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)).double())
    x = randn(2, 3)
    expected = fn(params, x)

    def call(i):
        if i % 2:
            fb.predict(fn, params, fb.Dropout(), x, num_samples=20, seed=0, chunk_size=1)
            return expected
        return fn(params, x)

    for found in at_once(call, times=10):
        assert not isinstance(found, Exception), found
        for one in found:
            assert_close(one, expected)


@sometimes_writing
def test_inputs_that_a_module_writes_into_only_sometimes_never_change_in_any_thread(
    make, left_alone, written
):
    fn, params = fb.make_functional(make().double())
    members = fb.Ensemble({k: torch.stack([v] * 4) for k, v in params.items()})
    inputs = [left_alone(), written()]  # shared by the threads
    before, expected = [x.clone() for x in inputs], [fn(params, x.clone()) for x in inputs]
    fn, _ = fb.make_functional(make().double())

    def call(i):
        x = inputs[i % 2]
        return fn(params, x) if i < 4 else fb.predict(fn, None, members, x).samples[-1]

    for i, found in enumerate(at_once(call, times=5)):
        assert not isinstance(found, Exception), found
        for one in found:
            assert_close(one, expected[i % 2])
    assert all(same(x, b) for x, b in zip(inputs, before, strict=True))


def test_members_do_not_depend_on_seeds_that_another_thread_draws_meanwhile():
    fn, params = fb.make_functional(nn.Linear(3, 2))
    started, drawn = threading.Event(), threading.Event()

    def make():
        first = nn.Linear(3, 4)
        started.set()
        drawn.wait(0.2)  # the other thread either draws now or is made to wait
        return nn.Sequential(first, nn.Linear(4, 2))

    def predict():
        started.wait()
        fb.predict(fn, params, gaussian(params), torch.ones(2, 3), num_samples=3)
        drawn.set()

    drawn.set()
    _, expected = fb.ensemble.init(make, 3, seed=0)
    started.clear()
    drawn.clear()
    thread = threading.Thread(target=predict)
    thread.start()
    _, members = fb.ensemble.init(make, 3, seed=0)
    thread.join()
    for name, value in expected.items():
        assert torch.equal(members[name], value)
