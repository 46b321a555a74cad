import copy
import math

import optree
import pytest
import torch
from torch import nn
from torch.func import jacrev

import funcbayes as fb
from funcbayes import ivon
from funcbayes.ensemble import member_seeds
from funcbayes.ivon._update import Rule

F64 = torch.float64
SHAPES = {"b": (2,), "gain": (), "w": (2, 3)}  # ranks 1, 0, 2
NORMAL = fb.likelihoods.Normal(0.5)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def like(shapes=SHAPES, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {k: scale * torch.randn(s, generator=g, dtype=F64) for k, s in shapes.items()}


def affine(params, x):
    return params["gain"] * (x @ params["w"].T + params["b"])


BATCH = randn(8, 3, seed=1), randn(8, 2, seed=2)
OPTIONS = {"learning_rate": 0.1, "num_data": 40, "prior_precision": 2.0, "beta2": 0.9, "seed": 3}


def moved(state, times=1, **options):
    for _ in range(times):
        state, _ = ivon.update(affine, None, state, BATCH, NORMAL, **{**OPTIONS, **options})
    return state


# One update.


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("clip_radius", [None, 0.05])
@pytest.mark.parametrize("rescale_lr", [True, False])
@pytest.mark.parametrize("ess", [None, 25.0])
def test_updates_are_those_of_the_paper_parameter_by_parameter(num_samples, clip_radius, rescale_lr, ess):
    options = {"num_samples": num_samples, "clip_radius": clip_radius, "rescale_lr": rescale_lr, "ess": ess}
    state = ivon.init(like(seed=4), hess_init=0.7)
    lam = 40.0 if ess is None else ess
    delta, alpha, beta1, beta2 = 2.0 / lam, 0.1 * (0.7 + 2.0 / lam if rescale_lr else 1.0), 0.9, 0.9
    m, g, h = state.mean, state.momentum, state.hessian
    for t in (1, 2, 3):
        theta = ivon.draws(state, num_samples, 3, num_data=40, prior_precision=2.0, ess=ess)
        slopes = []
        for s in range(num_samples):
            draw = {k: v[s].clone().requires_grad_() for k, v in theta.items()}
            loss = -NORMAL.log_prob(affine(draw, BATCH[0]), BATCH[1]).mean()
            slopes.append(dict(zip(draw, torch.autograd.grad(loss, list(draw.values())), strict=True)))
        new_m, new_g, new_h = {}, {}, {}
        for k in SHAPES:
            g_hat, h_hat = torch.zeros_like(m[k]), torch.zeros_like(m[k])
            sigma = 1 / (lam * (h[k] + delta)).sqrt()
            for s in range(num_samples):
                g_hat = g_hat + slopes[s][k] / num_samples
                h_hat = h_hat + slopes[s][k] * (theta[k][s] - m[k]) / sigma**2 / num_samples
            new_g[k] = beta1 * g[k] + (1 - beta1) * g_hat
            new_h[k] = (
                beta2 * h[k]
                + (1 - beta2) * h_hat
                + 0.5 * (1 - beta2) ** 2 * (h[k] - h_hat) ** 2 / (h[k] + delta)
            )
            direction = (new_g[k] / (1 - beta1**t) + delta * m[k]) / (new_h[k] + delta)
            if clip_radius is not None:
                direction = direction.clamp(-clip_radius, clip_radius)
            new_m[k] = m[k] - alpha * direction
        state = moved(state, **options)
        m, g, h = new_m, new_g, new_h
        for k in SHAPES:
            torch.testing.assert_close(state.mean[k], m[k])
            torch.testing.assert_close(state.momentum[k], g[k])
            torch.testing.assert_close(state.hessian[k], h[k])
    assert int(state.step) == 3


def test_the_variance_is_that_of_the_draws():
    state = moved(ivon.init(like(seed=4), hess_init=0.7), 2)
    q = ivon.posterior(state, num_data=40, prior_precision=2.0)
    theta = ivon.draws(state, 20000, 5, num_data=40, prior_precision=2.0)
    for k in SHAPES:
        torch.testing.assert_close(q.mean[k], state.mean[k])
        torch.testing.assert_close(q.variance[k], 1 / (40 * (state.hessian[k] + 2.0 / 40)))
        error = (q.variance[k] / 20000).sqrt()
        assert ((theta[k].mean(0) - q.mean[k]).abs() < 5 * error).all()
        assert ((theta[k].var(0) / q.variance[k] - 1).abs() < 5 * (2 / 20000) ** 0.5).all()


def test_the_hessian_stays_positive_whatever_the_gradients():
    rule, state = Rule(num_data=40, beta2=0.2), ivon.init({"w": torch.zeros(1000)}, hess_init=0.1)
    for step in range(50):
        at = rule.draws(state, step)
        wild = {"w": 1e3 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(step))}
        state = rule.moved(state, at, wild, 1e-9)
        assert (state.hessian["w"] + rule.prior_precision / 40 > 0).all()


def test_the_estimate_of_the_hessian_has_the_diagonal_of_the_hessian_for_its_mean():
    # With beta2 = 0 and h far from it, the new h is h_hat + (h - h_hat)^2 / (2 (h + delta)); its average over
    # many draws of one update estimates E[h_hat], for a small 1 - beta2.
    params = like(seed=4)
    mean_loss = lambda p: -NORMAL.log_prob(affine(p, BATCH[0]), BATCH[1]).mean()  # noqa: E731
    hessian = jacrev(jacrev(mean_loss))(params)
    found = []
    for seed in range(400):
        state = ivon.init(params, hess_init=50.0)  # narrow, so that the Hessian is the same everywhere
        state = moved(state, seed=seed, num_samples=20, beta2=1 - 1e-6)
        found.append({k: 50.0 + (state.hessian[k] - 50.0) * 1e6 for k in SHAPES})
    for k, shape in SHAPES.items():
        values = torch.stack([f[k] for f in found])
        size = math.prod(shape)
        expected = hessian[k][k].reshape(size, size).diagonal().reshape(shape)
        assert ((values.mean(0) - expected).abs() < 5 * values.std(0) / 20 + 0.05).all()


def test_the_first_momentum_is_corrected_for_its_start():
    state = ivon.init(like(), hess_init=1.0)
    one, other = (moved(state, beta1=beta) for beta in (0.0, 0.9))
    for k in SHAPES:
        torch.testing.assert_close(one.mean[k], other.mean[k])


# Where it ends.


def test_it_finds_the_optimum_of_mean_field_for_a_regression():
    # The mean of the posterior, and one over the diagonal of its precision (Bishop 2006, section 10.1.2).
    fn, params = fb.make_functional(nn.Linear(3, 1).double())
    x = randn(30, 3, seed=1) @ (torch.eye(3, dtype=F64) + 0.4 * randn(3, 3, seed=4))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64) + 0.3 + 0.5 * randn(30, 1, seed=2)
    design = torch.cat([torch.ones(30, 1, dtype=F64), x], 1)
    precision = design.mT @ design / 0.25 + 2.0 * torch.eye(4, dtype=F64)
    mean = torch.linalg.solve(precision, design.mT @ y.squeeze(1) / 0.25)
    q = ivon.fit(
        *(fn, params, (x, y), NORMAL),
        learning_rate=lambda step: 0.2 * (1 - step / 1500),
        num_epochs=1500,
        prior_precision=2.0,
        beta2=0.99,
        num_samples=16,
        seed=0,
    )
    found = torch.cat([q.mean["bias"], q.mean["weight"].flatten()])
    variance = torch.cat([q.variance["bias"], q.variance["weight"].flatten()])
    torch.testing.assert_close(found, mean, rtol=0, atol=5e-3)
    torch.testing.assert_close(variance, 1 / precision.diagonal(), rtol=0.1, atol=0)


# What an update is not: something that changes anything.


def test_nothing_is_changed_and_equal_calls_are_equal():
    params = like()
    state = ivon.init(params)
    before, start = copy.deepcopy(params), copy.deepcopy(optree.tree_leaves(state))
    rng = torch.get_rng_state()
    first, second = (moved(state, 3) for _ in range(2))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(params[k], before[k]) for k in params)
    assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(state), start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*map(optree.tree_leaves, (first, second)), strict=True))


def test_fresh_states_share_nothing():
    one, other = ivon.init(like()), ivon.init(like())
    moved(one, 3)
    assert int(other.step) == 0
    one.momentum["w"].add_(1.0)
    assert not other.momentum["w"].any()


def test_an_exception_in_the_model_leaves_nothing_behind():
    params, state = like(), ivon.init(like())
    kept = copy.deepcopy(optree.tree_leaves(state))

    def failing(params, x):
        raise ArithmeticError("in the middle")

    with pytest.raises(ArithmeticError, match="in the middle"):
        ivon.update(failing, params, state, BATCH, NORMAL, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(optree.tree_leaves(state), kept, strict=True))


def test_a_run_that_goes_on_from_a_file_is_the_same_run(tmp_path):
    state = ivon.init(like())
    whole = moved(state, 6)
    fb.save(moved(state, 3), tmp_path / "state")
    resumed = fb.load(tmp_path / "state")
    assert int(resumed.step) == 3
    resumed = moved(resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(*map(optree.tree_leaves, (whole, resumed)), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_of_single_precision_and_posteriors_in_the_dtype_of_the_parameters(dtype):
    fn, params = fb.make_functional(nn.Linear(3, 2).to(dtype))
    x, y = (t.to(dtype) for t in BATCH)
    q = ivon.fit(fn, params, (x, y), NORMAL, learning_rate=0.1, num_epochs=2, num_samples=2, seed=0)
    assert all(t.dtype == dtype for t in optree.tree_leaves(q))
    state, _ = ivon.update(fn, params, ivon.init(params), (x, y), NORMAL, **OPTIONS)
    assert state.mean["weight"].dtype == torch.float32


# Fits.


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, image, token):
        return self.head(self.drop(self.body(image).mean((2, 3)) + self.embed(token)))


def call_with_keywords(module, x):
    return module(**x)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_models_with_batch_norm_dropout_embeddings_and_dict_inputs_are_fitted(num_samples):
    torch.manual_seed(0)
    fn, params = fb.make_functional(WithBatchNorm(), call=call_with_keywords)
    x = {"image": randn(12, 1, 5, 5).float() + 3, "token": torch.arange(12) % 5}
    y, likelihood = torch.arange(12) % 3, fb.likelihoods.Categorical()
    q = ivon.fit(
        *(fn, params, (x, y), likelihood),
        learning_rate=0.1,
        num_epochs=3,
        batch_size=4,
        num_samples=num_samples,
        seed=0,
    )
    assert set(q.variance) == set(params)
    assert q.mean["body.1.running_mean"].tensor.abs().max() > 0.01
    assert int(q.mean["body.1.num_batches_tracked"].tensor) == 9
    prediction = fb.predict(fn, None, q, x, likelihood=likelihood, num_samples=5, seed=0)
    assert torch.isfinite(prediction.mean).all()


def small_net():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


SHORT = {"learning_rate": 0.1, "num_epochs": 2, "batch_size": 4, "beta2": 0.99, "seed": 0}


def test_a_fit_is_updates_over_the_batches():
    fn, params = fb.make_functional(small_net())
    x, y = (t.float() for t in BATCH)
    q = ivon.fit(
        fn, params, [(x[:4], y[:4]), (x[4:], y[4:])], NORMAL, learning_rate=0.1, num_epochs=2, seed=3
    )
    state = ivon.init(params)
    for part in (slice(4), slice(4, 8)) * 2:
        batch = x[part], y[part]
        state, _ = ivon.update(fn, params, state, batch, NORMAL, learning_rate=0.1, num_data=8, seed=3)
    expected = ivon.posterior(state, num_data=8)
    for name in params:
        torch.testing.assert_close(q.mean[name], expected.mean[name])
        torch.testing.assert_close(q.variance[name], expected.variance[name])


def test_several_networks_are_fitted_as_if_each_were_alone():
    fn, members = fb.ensemble.init(small_net, 3, seed=0)
    data = tuple(t.float() for t in BATCH)
    together = ivon.fit(fn, members, data, NORMAL, stacked=True, **SHORT)
    for k, seed in enumerate(member_seeds(0, 3)):
        own = {name: leaf[k] for name, leaf in members.items()}
        alone = ivon.fit(fn, own, data, NORMAL, **{**SHORT, "seed": seed})
        for name in own:
            torch.testing.assert_close(together.mean[name][k], alone.mean[name])
            torch.testing.assert_close(together.variance[name][k], alone.variance[name])
    mixed = fb.mixture(together, stacked=True)
    assert fb.predict(fn, None, mixed, data[0], num_samples=6, seed=0).samples.shape == (6, 8, 2)


def test_only_chosen_leaves_are_moved_and_the_others_are_held():
    fn, params = fb.make_functional(small_net())
    data = tuple(t.float() for t in BATCH)
    q = ivon.fit(fn, params, data, NORMAL, where="2.*", **SHORT)
    assert set(q.mean) == {"2.weight", "2.bias"}
    assert fb.predict(fn, params, q, data[0], num_samples=3, seed=0).samples.shape == (3, 8, 2)


def test_any_tree_of_parameters_is_fitted():
    p = {k: v.float() for k, v in like().items()}
    fn = lambda t, x: t[0]["gain"] * (x @ t[1][0].T + t[1][1])  # noqa: E731
    q = ivon.fit(
        fn, [{"gain": p["gain"]}, (p["w"], p["b"])], tuple(t.float() for t in BATCH), NORMAL, **SHORT
    )
    assert fb.predict(fn, None, q, BATCH[0].float(), num_samples=3, seed=0).samples.shape == (3, 8, 2)


def test_callbacks_see_the_loss_and_end_the_fit():
    fn, params = fb.make_functional(small_net())
    seen = []

    def callback(epoch, loss, state):
        seen.append((epoch, loss, int(state.step)))
        return epoch == 1

    data = tuple(t.float() for t in BATCH)
    ivon.fit(fn, params, data, NORMAL, **{**SHORT, "num_epochs": 9}, callback=callback)
    assert [(epoch, step) for epoch, _, step in seen] == [(0, 2), (1, 4)]
    assert all(math.isfinite(loss) for _, loss, _ in seen)


def test_a_fit_goes_on_from_a_state_with_a_schedule():
    fn, params = fb.make_functional(small_net())
    data, states, asked = tuple(t.float() for t in BATCH), [], []

    def rate(step):
        asked.append(step)
        return 0.1

    ivon.fit(fn, params, data, NORMAL, **SHORT, callback=lambda e, loss, s: states.append(s) and None)
    ivon.fit(fn, params, data, NORMAL, **{**SHORT, "learning_rate": rate}, start=states[-1])
    assert sorted(set(asked)) == [0, 4, 5, 6, 7]


def test_a_loss_that_is_not_finite_stops_with_its_step():
    fn, params = fb.make_functional(small_net())
    x, y = (t.float() for t in BATCH)
    batches = [(x[:4], y[:4]), (1e30 * x[4:], 1e30 * y[4:])]
    with pytest.raises(RuntimeError, match=r"`ivon\.fit` is inf in step 1 of epoch 0"):
        ivon.fit(fn, params, batches, NORMAL, learning_rate=0.1, num_epochs=1, seed=0)


def update_with(**options):
    given = {"fn": affine, "params": None, "state": ivon.init(like()), "batch": BATCH, **OPTIONS, **options}
    fn, params, state, batch = (given.pop(k) for k in ("fn", "params", "state", "batch"))
    return ivon.update(fn, params, state, batch, given.pop("likelihood", NORMAL), **given)


def fit_with(**options):
    fn, params = fb.make_functional(small_net())
    data = options.pop("data", tuple(t.float() for t in BATCH))
    return ivon.fit(options.pop("fn", fn), params, data, NORMAL, **{**SHORT, **options})


BAD = {
    "hess_init": (lambda: ivon.init(like(), hess_init=0.0), ValueError, r"hess_init=.* positive"),
    "hess_init's type": (lambda: ivon.init(like(), hess_init="1"), TypeError, "hess_init=.* number"),
    "no leaf": (lambda: ivon.init(like(), where="head"), ValueError, "where='head'"),
    "module": (lambda: update_with(fn=nn.Linear(3, 2)), TypeError, "make_functional"),
    "no state": (lambda: update_with(state={}), TypeError, r"ivon\.init\(params\)"),
    "other leaves": (
        lambda: update_with(params={**like(), "w": torch.ones(2, 2)}),
        ValueError,
        r"'w' has shape \(2, 3\)",
    ),
    "rate": (lambda: update_with(learning_rate=0.0), ValueError, r"learning_rate=.* positive"),
    "num_data": (lambda: update_with(num_data=7), ValueError, "at least the 8 .* got 7"),
    "num_data's type": (lambda: update_with(num_data=8.0), TypeError, "num_data"),
    "prior": (lambda: update_with(prior_precision=-1.0), ValueError, r"prior_precision=.* positive"),
    "beta1": (lambda: update_with(beta1=1.0), ValueError, r"beta1=.* below 1, got 1.0"),
    "beta2": (lambda: update_with(beta2=-0.1), ValueError, r"beta2=.* at least 0"),
    "num_samples": (lambda: update_with(num_samples=0), ValueError, "num_samples"),
    "clip_radius": (lambda: update_with(clip_radius=0.0), ValueError, r"clip_radius=.* positive"),
    "ess": (lambda: update_with(ess=-1.0), ValueError, r"ess=.* positive"),
    "batch": (lambda: update_with(batch=BATCH[0]), TypeError, r"`\(x, y\)`"),
    "likelihood": (lambda: update_with(likelihood=None), TypeError, "likelihood="),
    "posterior of none": (lambda: ivon.posterior({}, num_data=3), TypeError, "should be given a state"),
    "fit's rate": (lambda: fit_with(learning_rate=-1.0), ValueError, "learning_rate"),
    "fit's schedule": (lambda: fit_with(learning_rate=lambda step: -1.0), ValueError, "for step 0"),
    "fit's num_data": (lambda: fit_with(num_data=3), ValueError, "at least the 4"),
    "fit's start": (lambda: fit_with(start={}), TypeError, "start="),
    "start and where": (lambda: fit_with(start=ivon.init(like()), where="w"), ValueError, "leave out"),
    "epochs": (lambda: fit_with(num_epochs=0), ValueError, "num_epochs"),
    "empty": (lambda: fit_with(data=(torch.ones(0, 3), torch.ones(0, 2))), ValueError, "at least one row"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_num_data_is_required():
    with pytest.raises(TypeError, match="num_data"):
        ivon.update(affine, None, ivon.init(like()), BATCH, NORMAL, learning_rate=0.1)
