"""Compiled programs: they give what is given without them, and one serves all calls of a kind."""

import functools
import shutil

import optree
import pytest
import torch
import zoo
from torch import nn
from torch.func import grad
from torch.testing import assert_close
from zoo import (
    LOOPED_MODELS,
    MODELS,
    POSTERIORS,
    SLOW_MODELS,
    WITH_FIXED,
    gaussian,
    linear,
    linear_params,
    randn,
)

import funcbayes as fb
from funcbayes import vi
from funcbayes.likelihoods import Categorical, Normal

# What a program has to take: every way in which draws are made of a posterior.
PREDICTED = (
    "gaussian",
    "ensemble",
    "gaussian_head_only",
    "swag",
    "mixture",
    "linearized",
    "gaussian_fixed",
)
sgd = functools.partial(torch.optim.SGD, lr=0.05)


@pytest.fixture
def traced(monkeypatch):
    """Programs as they are traced, without a compiler; how many there are."""
    made = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: made.append(graph) or graph)
    return made


# Predictions.


@pytest.mark.parametrize(
    ("name", "posterior"),
    [
        *(("linear", posterior) for posterior in PREDICTED),
        *((name, "gaussian") for name in ("conv", "transformer", "lstm", "keywords")),
    ],
)
def test_a_program_gives_what_the_engine_gives(traced, name, posterior):
    model = {**MODELS, **SLOW_MODELS}[name]()
    q = {**POSTERIORS, **WITH_FIXED}[posterior](model)
    for seed in (0, 1):
        x = optree.tree_map(lambda t, seed=seed: t.roll(seed, 0), model.inputs(5))
        options = {"num_samples": 7, "seed": seed, "chunk_size": 3}
        with torch.no_grad():
            got = fb.predict(model.fn, model.params, q, x, compile=True, **options)
        assert_close(got.samples, fb.predict(model.fn, model.params, q, x, **options).samples)


class Own(nn.Sequential):
    """Of which nobody knows whether it writes into its inputs."""


@pytest.mark.parametrize("part", [Own(), nn.ReLU(inplace=True)], ids=["own class", "in place"])
@pytest.mark.parametrize("options", [{}, {"marginal": True}], ids=["drawn", "marginal"])
def test_inputs_of_modules_that_may_write_into_them_are_no_part_of_a_program(traced, part, options):
    fn, params = fb.make_functional(nn.Sequential(part, nn.Linear(3, 2)).double())
    x, q = randn(4, 3), gaussian(params)
    for rows in (x, x + 1):
        got, expected = (
            fb.predict(fn, params, q, rows, num_samples=5, seed=0, compile=c, **options)
            for c in (True, False)
        )
        assert_close(got.samples, expected.samples)
    assert len(traced) == 1


def test_one_tensor_in_two_places_makes_no_program_that_takes_them_for_one(traced):
    fn = lambda params, x: linear(params, x["a"] - 2 * x["b"])  # noqa: E731 - a model of its own
    q, x = gaussian(linear_params()), randn(4, 3)
    for rows in ({"a": x, "b": x}, {"a": x, "b": x + 1}):
        got, expected = (
            fb.predict(fn, None, q, rows, num_samples=3, seed=0, compile=c).samples for c in (True, False)
        )
        assert_close(got, expected)
    assert len(traced) == 1


def test_a_model_that_asks_for_a_number_is_refused_by_name_of_the_option():
    def branching(params, x):
        return linear(params, x) if x.sum() > 0 else linear(params, -x)

    q, x = gaussian(linear_params()), randn(4, 3)
    fb.predict(branching, None, q, x, num_samples=3, seed=0)
    with pytest.raises(
        RuntimeError, match=r"`compile=True` should be given a model .*\. Leave `compile` out\."
    ):
        fb.predict(branching, None, q, x, num_samples=3, seed=0, compile=True)


@pytest.mark.parametrize("shared_mask", [False, True])
def test_a_program_drops_what_the_engine_drops(traced, shared_mask):
    model, q = MODELS["mlp_dropout"](), fb.Dropout(shared_mask=shared_mask)
    x = model.inputs(6)
    batches = [(x[:3], torch.zeros(3)), (x[3:], torch.zeros(3))]
    options = {"num_samples": 5, "chunk_size": 2}
    with torch.no_grad():
        for seed in (0, 1):
            got, expected = (
                fb.predict_batches(model.fn, model.params, q, batches, seed=seed, compile=c, **options)
                for c in (True, False)
            )
            assert_close(got.samples, expected.samples)
    assert len(traced) == 1  # for both batches and seeds


def test_programs_with_other_masks_are_others(traced):
    model = MODELS["mlp_dropout"]()
    for rate in (0.2, 0.7):
        q, x = fb.Dropout(rate=rate), model.inputs(3)
        got, expected = (
            fb.predict(model.fn, model.params, q, x, num_samples=3, seed=0, compile=c) for c in (True, False)
        )
        assert_close(got.samples, expected.samples)


def test_there_is_one_program_for_all_chunks_and_calls_of_one_shape(traced):
    params, x = linear_params(), randn(4, 3)
    fn = lambda params, x: linear(params, x)  # noqa: E731 - a model of its own
    for seed in range(3):
        moved = {name: leaf + seed for name, leaf in params.items()}
        options = {"num_samples": 8, "seed": seed, "chunk_size": 3}  # 3 + 3 + 2
        got = fb.predict(fn, moved, gaussian(moved), x + seed, compile=True, **options).samples
        assert_close(got, fb.predict(linear, moved, gaussian(moved), x + seed, **options).samples)
    assert len(traced) == 1
    batches = [(x, torch.zeros(4)), (x + 1, torch.zeros(4))]
    fb.predict_batches(fn, params, gaussian(params), batches, num_samples=8, chunk_size=3, compile=True)
    assert len(traced) == 1
    fb.predict(fn, params, gaussian(params), x[:2], num_samples=8, chunk_size=3, compile=True)
    assert len(traced) == 2


@pytest.mark.parametrize("predict", [fb.predict, fb.predict_linearized])
def test_gradients_of_predictions_are_refused(predict):
    params = {name: leaf.requires_grad_() for name, leaf in linear_params().items()}
    with pytest.raises(ValueError, match=r"without gradients .* torch.no_grad"):
        predict(linear, params, gaussian(linear_params()), randn(4, 3), compile=True)


LINEARIZED = [
    *(
        ("linear", posterior)
        for posterior in (
            "gaussian",
            "gaussian_low_rank",
            "gaussian_low_rank_precision",
            "gaussian_kronecker",
            "gaussian_dense",
            "gaussian_head_only",
            "mixture_weighted",
        )
    ),
    *(("conv", posterior) for posterior in ("gaussian", "gaussian_kronecker")),
    ("transformer", "laplace"),
]


@pytest.mark.parametrize(("name", "posterior"), LINEARIZED)
def test_a_program_of_the_linearized_model_gives_what_is_given_without(traced, name, posterior):
    model = {**MODELS, **SLOW_MODELS}[name]()
    fn = lambda params, x: model.fn(params, x)  # noqa: E731 - a model of its own
    q, options = POSTERIORS[posterior](model), {"likelihood": Categorical(), "joint": True}
    for seed in (0, 1):  # other values, the same program
        moved = optree.tree_map(lambda leaf, seed=seed: leaf * (1 + seed), q)
        x = model.inputs(4)
        got, expected = (
            fb.predict_linearized(fn, model.params, moved, x, compile=c, **options) for c in (True, False)
        )
        assert_close(got.mean, expected.mean)
        assert_close(got.joint_covariance, expected.joint_covariance)
    assert len(traced) == 1  # of all components, too


def test_links_that_need_covariances_have_programs_of_their_own(traced):
    model = MODELS["linear"]()
    fn = lambda params, x: model.fn(params, x)  # noqa: E731 - a model of its own
    for link in ("probit", "bridge"):
        q, options = gaussian(model.params), {"likelihood": Categorical(), "link": link}
        got, expected = (
            fb.predict_linearized(fn, model.params, q, model.inputs(4), compile=c, **options)
            for c in (True, False)
        )
        assert_close(got.mean, expected.mean)


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
def test_a_model_that_vmap_cannot_take_is_not_compiled(traced):
    model = LOOPED_MODELS["item"][1]()
    x, q, options = model.inputs(3), gaussian(model.params), {"num_samples": 3, "seed": 0}
    got = fb.predict(model.fn, model.params, q, x, compile=True, **options)
    assert_close(got.samples, fb.predict(model.fn, model.params, q, x, **options).samples)
    assert not traced


# The ELBO.


def elbo_of(
    state,
    estimator="reparam",
    seed=0,
    *,
    fn=None,
    prior=None,
    likelihood=None,
    num_data=40,
    **options,
):
    """That of a small network, in double precision."""
    x, y = randn(6, 3), torch.arange(6) % 2
    likelihood = Categorical() if likelihood is None else likelihood
    y = y if likelihood.is_discrete else randn(6, 2, seed=1)
    return vi.negative_elbo(
        *(fn or two_layers, None, state, (x, y), likelihood),
        prior=prior,
        num_data=num_data,
        num_samples=3,
        seed=seed,
        estimator=estimator,
        **options,
    )


def two_layers(params, x):
    hidden = torch.tanh(nn.functional.linear(x, params["w"], params["b"]))
    return nn.functional.linear(hidden, params["v"])


def state_of(family="diag"):
    leaves = {"w": randn(4, 3, seed=2), "b": randn(4, seed=3), "v": randn(2, 4, seed=4)}
    state = vi.init(leaves, family, init_scale=0.2, rank=2)
    return optree.tree_map(lambda t: t.detach().requires_grad_(), state)


CASES = [
    *(("diag", estimator) for estimator in ("reparam", "stl", "local", "flipout")),
    *(("low_rank", "reparam"), ("kron", "stl"), ("full", "reparam")),
]


@pytest.mark.parametrize(("family", "estimator"), CASES)
def test_a_compiled_elbo_has_the_value_and_the_gradient_of_the_elbo(traced, family, estimator):
    state = state_of(family)
    fn = lambda params, x: two_layers(params, x)  # noqa: E731 - a model of its own
    leaves = optree.tree_leaves(state)
    for seed, weight in ((0, 1.0), (1, 0.3)):
        got, expected = (
            elbo_of(state, estimator, seed, fn=fn, kl_weight=weight, compile=c) for c in (True, False)
        )
        assert_close(got, expected, rtol=1e-14, atol=0.0)  # of the same operations
        got, expected = (torch.autograd.grad(3 * loss, leaves) for loss in (got, expected))
        assert_close(got, expected)
    assert len(traced) == 1


def test_a_compiled_elbo_is_differentiable_in_the_likelihood_and_the_prior(traced):
    state = optree.tree_map(torch.detach, state_of())
    noise, scale = (torch.tensor(v, dtype=zoo.F64, requires_grad=True) for v in (0.7, 1.3))
    found = []
    for c in (True, False):
        loss = elbo_of(state, likelihood=Normal(noise), prior=fb.priors.Normal(scale.square()), compile=c)
        found.append([loss, *torch.autograd.grad(loss, [noise, scale])])
    assert_close(*found)
    with torch.no_grad():
        assert_close(elbo_of(state, compile=True), elbo_of(state))


def test_other_settings_are_other_programs(traced):
    state = state_of()
    fn = lambda params, x: two_layers(params, x)  # noqa: E731 - a model of its own
    for number, options in enumerate(({}, {"num_data": 50}, {"chunk_size": 2}, {"likelihood": Normal(2.0)})):
        assert_close(elbo_of(state, fn=fn, compile=True, **options), elbo_of(state, **options))
        assert len(traced) == number + 1


def test_a_compiled_elbo_inside_a_transform_is_refused():
    state = optree.tree_map(torch.detach, state_of())
    with pytest.raises(ValueError, match=r"negative_elbo\(compile=True\).*autograd.grad"):
        grad(lambda rho: elbo_of(vi.init(rho), compile=True))(optree.tree_map(torch.clone, state.mean))


# Training.


def images():
    return randn(16, 1, 4, 4).float(), torch.arange(16) % 3


def conv_net():
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()
    return Own(*layers, nn.Linear(12, 3))


def one_network(make=conv_net):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fb.make_functional(make())


HOW = {"optimizer": sgd, "num_epochs": 2, "batch_size": 8, "seed": 1}


def fitted(fit, **options):
    fn, params = one_network()
    return fit(fn, params, images(), Categorical(), **HOW, **options)


def three_networks():
    return fb.ensemble.init(conv_net, 3, seed=0)


def fitted_members(fit, **options):
    fn, members = three_networks()
    return fit(fn, members, images(), Categorical(), **HOW, **options)


def trained_with_evidence(**options):
    """In which the noise and the prior change from epoch to epoch."""
    fn, params = one_network(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
    data = randn(16, 3), randn(16, 2, seed=1)
    found = fb.laplace.train(fn, params, data, Normal(0.7), **HOW, structure="diag", **options)
    return found.params, found.noise_std


def by_ivon(networks, **options):
    how = {"learning_rate": fb.ivon.cosine(0.05, num_steps=4), "num_epochs": 2, "batch_size": 8, "seed": 1}
    return fb.ivon.fit(*networks(), images(), Categorical(), num_samples=2, **how, **options)


def chains(fit, **options):
    fn, members = three_networks()
    sampler = fb.sgmcmc.sghmc(1e-4)
    how = {"num_steps": 6, "batch_size": 8, "stacked": True, "seed": 1}
    found = fit(fn, members, images(), Categorical(), sampler=sampler, **how, **options)
    return found.params if isinstance(found, fb.sgmcmc.Chains) else found.members


warmup = vi.linear_warmup(5)
FITS = {
    "training": functools.partial(fitted, fb.training.fit, prior_precision=1.0, max_grad_norm=1.0),
    "adversarial": functools.partial(fitted, fb.training.fit, adversarial=0.01),
    "ensemble": functools.partial(fitted_members, fb.ensemble.fit),
    "swag": functools.partial(fitted, fb.swag.fit, rank=2),
    "vi": functools.partial(fitted, vi.fit, num_samples=2, kl_weight=warmup),
    "vi, local": functools.partial(fitted, vi.fit, num_samples=2, estimator="local"),
    "laplace": functools.partial(trained_with_evidence, prior_precision=2.0),
    "sghmc": functools.partial(chains, fb.sgmcmc.run),
    "sghmc, another prior": functools.partial(chains, fb.sgmcmc.fit, prior=fb.priors.Laplace(1.0)),
    "ivon": functools.partial(by_ivon, one_network, max_grad_norm=1.0),
    "ivon, stacked": functools.partial(by_ivon, three_networks, stacked=True),
    "vi, stacked": functools.partial(fitted_members, vi.fit, stacked=True, kl_weight=warmup),
}


@pytest.mark.parametrize("make", FITS.values(), ids=FITS.keys())
def test_compiled_steps_end_where_the_others_do(traced, make):
    got, expected = (optree.tree_leaves(make(compile=c)) for c in (True, False))
    assert_close(got, expected)
    assert len(traced) == 1


def test_hamiltonian_chains_by_programs_are_those_without(traced):
    data, how = (randn(8, 3), torch.arange(8) % 2), {"step_size": 0.05, "num_leapfrog_steps": 3, "seed": 0}
    got, expected = (
        fb.sgmcmc.hmc(
            linear, linear_params(), data, Categorical(), num_samples=4, num_burn_in=3, **how, compile=c
        )
        for c in (True, False)
    )
    assert_close(got.params, expected.params)
    assert len(traced) == 1


@pytest.mark.parametrize("per", ["model", "leaf"])
def test_noise_that_is_learned_in_single_precision_is_no_other_program(traced, per):
    fn, params = one_network(lambda: nn.Linear(3, 2))
    data = randn(16, 3).float(), randn(16, 2, seed=1).float()
    fb.laplace.train(fn, params, data, Normal(0.7), **HOW, structure="diag", per=per, compile=True)
    assert len(traced) == 1


@pytest.mark.parametrize("name", ["predict", "elbo", "ivon"])
def test_what_autocast_makes_of_a_program_stays_there(traced, name):
    fn, params = one_network(lambda: nn.Linear(3, 2))
    x, y, q = randn(4, 3).float(), torch.arange(4) % 2, gaussian(params)
    vi_state, ivon_state = vi.init(params), fb.ivon.init(params)

    @torch.no_grad()
    def found(**options):
        if name == "predict":
            return fb.predict(fn, None, q, x, num_samples=4, seed=0, chunk_size=4, **options).samples
        how = {"num_data": 9, "num_samples": 2, "seed": 0, **options}
        if name == "elbo":
            return vi.negative_elbo(fn, None, vi_state, (x, y), Categorical(), **how)
        return fb.ivon.update(fn, None, ivon_state, (x, y), Categorical(), learning_rate=0.1, **how)[1]

    plain, kinds = found(), []
    for dtype in (None, torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            got, expected = found(compile=True), found()
        assert_close(got, expected)
        kinds.append((got.dtype, bool((got == plain).all())))
    assert kinds[0] == kinds[-1]
    assert len(set(kinds)) > 1
    assert len(traced) == 3


def test_updates_of_one_kind_share_a_program(traced):
    fn, state = lambda params, x: linear(params, x), fb.ivon.init(linear_params())  # of its own
    how = {"num_data": 50, "num_samples": 2, "seed": 0}
    for step in range(3):
        batch = randn(4, 3, seed=step), torch.arange(4) % 2
        rate = 0.1 / (1 + step)
        got, expected = (
            fb.ivon.update(fn, None, state, batch, Categorical(), learning_rate=rate, **how, compile=c)
            for c in (True, False)
        )
        assert_close(optree.tree_leaves(got), optree.tree_leaves(expected))
        state = got[0]
    assert len(traced) == 1


@pytest.mark.parametrize("fit", ["training", "ivon", "sgmcmc"])
def test_a_model_with_random_numbers_of_its_own_is_not_trained_by_programs(fit):
    def noisy(params, x):
        return linear(params, x) + 0.1 * torch.randn(())

    data = randn(8, 3), randn(8, 2)
    how = {
        "training": HOW,
        "ivon": {"learning_rate": 0.1, "num_epochs": 1},
        "sgmcmc": {"sampler": fb.sgmcmc.sgld(1e-3), "num_steps": 2},
    }[fit]
    with pytest.raises(ValueError, match=rf"{fit}.fit\(compile=True\).*leave `compile` out"):
        getattr(fb, fit).fit(noisy, linear_params(), data, Normal(1.0), **how, compile=True)


# With a compiler.


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler of C++")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler
def test_a_step_by_compiled_code_draws_what_is_drawn_without():
    # Keys are hashed in integers that wrap around, of masks and of draws, which `arange` counts.
    fn, params = fb.make_functional(nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2)))
    data, how = (randn(8, 3).float(), torch.arange(8) % 2), {**HOW, "num_epochs": 1}
    got, expected = (
        vi.fit(fn, params, data, Categorical(), num_samples=2, compile=c, **how) for c in (True, False)
    )
    assert_close(optree.tree_leaves(got), optree.tree_leaves(expected))
