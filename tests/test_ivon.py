import copy
import functools
import math
import re

import optree
import pytest
import torch
from torch import nn
from torch.func import grad, jacrev, vmap
from torch.utils.data import DataLoader, TensorDataset
from zoo import F64, LOOPED_MODELS, MODELS, covering, overlaid, randn, seeded

import funcbayes as fb
from funcbayes import ivon
from funcbayes.ensemble import member_seeds
from funcbayes.ivon import IVONState

CATEGORICAL, NORMAL = fb.likelihoods.Categorical(), fb.likelihoods.Normal(0.5)
SOME = ["linear", "nested", "mlp", "conv", "keywords", "tied"]
OPTIONS = {"learning_rate": 0.1, "num_data": 50, "beta2": 0.9, "seed": 3}


def tensors(tree):
    return optree.tree_leaves(tree)


def assert_same(got, expected, **tolerance):
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def are_equal(got, expected):
    pairs = zip(tensors(got), tensors(expected), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def rows_of(model, n=4):
    """Inputs, and classes of every output that there is a row of."""
    x = model.inputs(n)
    outputs = model.fn(model.params, x)
    return x, torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=seeded(3))


def moved_away(state, seed=0):
    """A state that has been moved before: every number of it is another."""

    def noisy(tree, scale, k):
        g = seeded(seed + k)
        return optree.tree_map(lambda t: scale * torch.randn(t.shape, generator=g, dtype=t.dtype), tree)

    return IVONState(
        optree.tree_map(torch.add, state.mean, noisy(state.mean, 0.1, 1)),
        noisy(state.mean, 0.1, 2),
        optree.tree_map(lambda z: z.abs() + 0.1, noisy(state.mean, 1.0, 3)),
        state.fixed,
        state.step + 4,
        state.hess_init,
        state.dtypes,
    )


def numbers(tree):
    """All numbers of a tree, in the order of its leaves."""
    return torch.cat([leaf.reshape(-1) for leaf in tensors(tree)])


# The algorithm -------------------------------------------------------------------------------------


def by_the_paper(model, state, batch, draws, *, alpha, lam, delta, beta_1, beta_2, clip, rescale):
    """Shen et al. (2024), algorithm 1, a parameter at a time, with numbers of Python."""
    x, y = batch
    S = len(tensors(draws)[0])
    thetas, grads, losses = [], [], []
    for s in range(S):
        theta = optree.tree_map(lambda leaf: leaf[s].clone().requires_grad_(), draws)  # noqa: B023
        outputs, _ = fb.training_call(model.fn, overlaid(model.params, theta), x, seed=0)
        loss = -CATEGORICAL.log_prob(outputs, y).mean()
        grads.append(numbers(torch.autograd.grad(loss, tensors(theta))).tolist())
        thetas.append(numbers(theta).tolist())
        losses.append(loss.item())
    t = int(state.step) + 1
    new = []
    for i, (m, g, h) in enumerate(
        zip(*(numbers(tree).tolist() for tree in (state.mean, state.momentum, state.hessian)), strict=True)
    ):
        sigma_squared = 1 / (lam * (h + delta))
        g_hat = sum(grads[s][i] for s in range(S)) / S
        h_hat = sum(grads[s][i] * (thetas[s][i] - m) / sigma_squared for s in range(S)) / S
        g = beta_1 * g + (1 - beta_1) * g_hat
        h = beta_2 * h + (1 - beta_2) * h_hat + 0.5 * (1 - beta_2) ** 2 * (h - h_hat) ** 2 / (h + delta)
        g_bar = g / (1 - beta_1**t)
        step = (g_bar + delta * m) / (h + delta)
        step = step if clip is None else min(max(step, -clip), clip)
        new.append((m - alpha * ((state.hess_init + delta) if rescale else 1.0) * step, g, h))
    return [torch.tensor(column, dtype=F64) for column in zip(*new, strict=True)], sum(losses) / S


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_radius": 1e-2, "ess": 20.0, "prior_precision": 7.0},
        {"rescale_lr": False, "beta1": 0.0, "beta2": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SOME)
def test_an_update_is_that_of_the_paper_a_parameter_at_a_time(name, options, num_samples):
    model = MODELS[name]()
    batch = rows_of(model)
    options = {**OPTIONS, "num_samples": num_samples, **options}
    seen = {k: v for k, v in options.items() if k in ("seed", "num_data", "prior_precision", "ess")}
    for state in (ivon.init(model.params, hess_init=0.7), moved_away(ivon.init(model.params))):
        new, loss = ivon.update(model.fn, model.params, state, batch, CATEGORICAL, **options)
        (mean, momentum, hessian), expected_loss = by_the_paper(
            *(model, state, batch, ivon.draws(state, num_samples, **seen)),
            alpha=0.1,
            lam=options.get("ess", 50),
            delta=options.get("prior_precision", 1.0) / 50,
            beta_1=options.get("beta1", 0.9),
            beta_2=options["beta2"],
            clip=options.get("clip_radius"),
            rescale=options.get("rescale_lr", True),
        )
        torch.testing.assert_close(numbers(new.mean), mean)
        torch.testing.assert_close(numbers(new.momentum), momentum)
        torch.testing.assert_close(numbers(new.hessian), hessian)
        assert new.step == state.step + 1
        assert loss.item() == pytest.approx(expected_loss)
        assert loss.shape == ()


def test_draws_have_the_moments_of_the_gaussian():
    num_samples = 20_000
    state = moved_away(ivon.init(MODELS["nested"]().params))
    given = {"num_data": 10, "prior_precision": 3.0, "ess": 4.0}
    draws = ivon.draws(state, num_samples, seed=0, **given)
    q = ivon.posterior(state, **given)
    for draw, mean, variance, h in zip(
        *map(tensors, (draws, q.mean, q.variance, state.hessian)), strict=True
    ):
        torch.testing.assert_close(variance, 1 / (4.0 * (h + 0.3)))
        assert ((draw.mean(0) - mean).abs() < 5 * (variance / num_samples).sqrt()).all()
        sem = variance * math.sqrt(2 / num_samples)
        assert ((draw.var(0) - variance).abs() < 5 * sem).all()


def test_draws_are_a_function_of_the_seed_the_step_and_their_number():
    state = ivon.init(MODELS["nested"]().params)
    draw = functools.partial(ivon.draws, num_data=10)
    five = draw(state, 5, seed=1)
    assert are_equal(optree.tree_map(lambda leaf: leaf[:3], five), draw(state, 3, seed=1))
    later = optree.tree_map(lambda leaf: leaf + 1 if leaf.dtype == torch.int64 else leaf, state)
    for other in (draw(state, 5, seed=2), draw(later, 5, seed=1)):
        assert all((a != b).all() for a, b in zip(tensors(five), tensors(other), strict=True))
    noise = numbers(optree.tree_map(torch.sub, draw(state, 1, seed=1), draw(state, 2, seed=1)))
    assert len(set(numbers(five).tolist())) == len(numbers(five))  # no two leaves or draws share any
    assert (noise != 0).any()


def hhat_of(old, new, delta, beta2):
    """What a step took for the Hessian, by solving its line for it."""

    def one(h, after):
        r = -1 + (1 + 2 * (after - h) / (h + delta)).sqrt()  # of r + r^2 / 2 = (after - h) / (h + delta)
        return h + r * (h + delta) / (1 - beta2)

    return optree.tree_map(one, old.hessian, new.hessian)


def logistic(params, x):
    return torch.tanh(x @ params["w"]) @ params["v"] + params["b"]


LOGISTIC = {"w": randn(3, 2), "v": randn(2, 2, seed=1), "b": randn(2, seed=2)}


@pytest.mark.parametrize("kind", ["quadratic", "other"])
def test_the_estimate_of_the_hessian_is_its_expectation_over_draws(kind):
    num_seeds, x, params = 2000, randn(6, 3), {"w": LOGISTIC["w"], "b": LOGISTIC["b"]}
    y = randn(6, 2, seed=1) if kind == "quadratic" else torch.randint(2, (6,), generator=seeded(1))

    def loss(params):
        if kind == "quadratic":
            return -NORMAL.log_prob(x @ params["w"] + params["b"], y).mean()
        return -CATEGORICAL.log_prob(logistic({**LOGISTIC, **params}, x), y).mean()

    given, beta2, seeds = {"num_data": 8, "prior_precision": 2.0}, 0.999, torch.arange(num_seeds)
    state = ivon.init(params, hess_init=0.5)
    draws = vmap(lambda seed: ivon.draws(state, 5, seed=seed, **given))(seeds)
    gradients = vmap(vmap(grad(loss)))(draws)
    options = {**given, "learning_rate": 0.1, "beta2": beta2}
    new = vmap(lambda gradient, draw: ivon.step(state, gradient, draw, **options))(gradients, draws)
    found = hhat_of(state, new, 2.0 / 8, beta2)
    hessians = vmap(vmap(jacrev(grad(loss))))(draws)
    for name, leaf in params.items():
        blocks = hessians[name][name].reshape(num_seeds, 5, leaf.numel(), leaf.numel())
        exact = blocks.diagonal(0, -2, -1).mean(1)
        # At the same draws: what differs is noise alone, of mean zero.
        error = found[name].reshape(num_seeds, -1) - exact
        sem = error.std(0) / num_seeds**0.5
        assert (error.mean(0).abs() < 4.5 * sem).all()
        assert (exact.mean(0).abs() > 10 * sem).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("adversary", ["halving", "huge", "random"])
def test_precision_stays_positive_whatever_the_gradients(adversary, beta2, dtype):
    state = ivon.init({"w": torch.zeros(50, dtype=dtype)}, hess_init=1e-3)
    given = {"num_data": 100, "prior_precision": 1.0}
    delta = 1.0 / 100
    g = seeded(0)
    for _ in range(80):
        draws = ivon.draws(state, 1, seed=0, **given)
        u = state.hessian["w"] + delta
        # The step at which the square of the algorithm is least: hhat = h - u / (1 - beta2).
        least = (state.hessian["w"] - u / (1 - beta2)) / (100 * u * (draws["w"] - state.mean["w"]))
        gradients = {
            "halving": least,
            "huge": -1e6 * (draws["w"] - state.mean["w"]),
            "random": 10 * torch.randn(least.shape, generator=g, dtype=F64).exp() * least.sign(),
        }[adversary].to(dtype)
        options = {"learning_rate": 1e-3, "clip_radius": 1e-3, "beta2": beta2}
        state = ivon.step(state, {"w": gradients}, draws, **options, **given)
        new = state.hessian["w"] + delta
        assert (new > 0).all()
        eps = torch.finfo(dtype).eps
        assert (new >= 0.5 * u * (1 - 20 * eps) - 8 * eps * delta).all()
        assert state.hessian["w"].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_on_a_quadratic_loss_the_mean_is_the_map_and_the_variances_are_those_of_mean_field(temperature):
    """Of Gaussians with a diagonal covariance the one closest to N(m, P^-1) has variances 1 / P_ii."""
    networks, steps, n, s0 = 16, 320, 12, 2.0
    x = randn(n, 3) @ torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.7, 0.3], [0.0, 0.0, 1.2]], dtype=F64)
    y = x @ randn(3, 1, seed=1) + 0.5 * randn(n, 1, seed=2)
    precision = x.T @ x / 0.25 + s0 * torch.eye(3, dtype=F64)
    best = torch.linalg.solve(precision, x.T @ y / 0.25)
    q = ivon.fit(
        *(lambda params, x: x @ params["w"], {"w": torch.zeros(networks, 3, 1, dtype=F64)}, (x, y), NORMAL),
        learning_rate=ivon.cosine(0.3, steps),
        num_epochs=steps,
        prior_precision=s0,
        beta2=0.98,
        num_samples=8,
        stacked=True,
        seed=0,
        hess_init=3.0,
        ess=n / temperature,
    )
    sem = q.mean["w"].std(0) / networks**0.5
    assert ((q.mean["w"].mean(0) - best).abs() < 5 * sem).all()
    assert (sem < 0.02 * best.abs().max()).all()
    expected = temperature / precision.diagonal()[:, None]
    # Precisions are what is averaged over steps: those have no bias of the first order.
    found = 1 / q.variance["w"]
    sem = found.std(0) / networks**0.5
    assert ((found.mean(0) - 1 / expected).abs() < 5 * sem).all()
    assert (sem < 0.03 / expected).all()
    # The marginal variances of the posterior are others, which mean field cannot have.
    assert (torch.linalg.inv(precision).diagonal() * temperature > 1.1 * expected.squeeze(1)).any()


def test_the_first_step_does_not_know_of_any_momentum():
    model = MODELS["mlp"]()
    state, batch = ivon.init(model.params), rows_of(model)
    moves = [
        ivon.update(model.fn, model.params, state, batch, CATEGORICAL, beta1=beta1, **OPTIONS)[0]
        for beta1 in (0.0, 0.5, 0.999)
    ]
    for move in moves[1:]:
        assert_same(move.mean, moves[0].mean)
        assert_same(move.hessian, moves[0].hessian)


@pytest.mark.parametrize("hess_init", [0.01, 1.0, 30.0])
def test_a_rescaled_first_step_is_one_of_sgd(hess_init):
    model = MODELS["mlp"]()
    state, batch = ivon.init(model.params, hess_init=hess_init), rows_of(model)
    options = {**OPTIONS, "beta2": 1 - 1e-12}
    new, _ = ivon.update(model.fn, model.params, state, batch, CATEGORICAL, **options)
    theta = optree.tree_map(lambda leaf: leaf[0].requires_grad_(), ivon.draws(state, 1, seed=3, num_data=50))
    loss = -CATEGORICAL.log_prob(model.run(theta, batch[0]), batch[1]).mean()
    gradients = torch.autograd.grad(loss, tensors(theta))
    for after, before, g in zip(tensors(new.mean), tensors(state.mean), gradients, strict=True):
        torch.testing.assert_close(after, before - 0.1 * (g + before / 50), rtol=1e-6, atol=1e-9)


def test_the_effective_number_of_rows_tempers_the_whole_posterior():
    state = moved_away(ivon.init(MODELS["nested"]().params))
    warm = ivon.posterior(state, num_data=10, prior_precision=2.0, ess=10 / 3)
    tempered = fb.temper(ivon.posterior(state, num_data=10, prior_precision=2.0), 3.0)
    assert_same(warm.variance, tempered.variance)


@pytest.mark.parametrize("name", SOME)
def test_an_update_is_draws_gradients_and_a_step(name):
    model = MODELS[name]()
    batch, state = rows_of(model), moved_away(ivon.init(model.params))
    new, _ = ivon.update(model.fn, model.params, state, batch, CATEGORICAL, num_samples=2, **OPTIONS)
    draws = ivon.draws(state, 2, seed=3, num_data=50)

    def loss(theta):
        outputs, _ = fb.training_call(model.fn, theta, batch[0], seed=0)
        return -CATEGORICAL.log_prob(outputs, batch[1]).mean()

    whole = [optree.tree_map(lambda leaf: leaf[s].requires_grad_(), draws) for s in range(2)]  # noqa: B023
    spec = optree.tree_structure(state.mean)
    grads = [spec.unflatten(torch.autograd.grad(loss(theta), tensors(theta))) for theta in whole]
    gradients = optree.tree_map(lambda *leaves: torch.stack(leaves), *grads)
    options = {k: v for k, v in OPTIONS.items() if k != "seed"}
    own = ivon.step(state, gradients, draws, **options)
    assert_same((new.mean, new.momentum, new.hessian), (own.mean, own.momentum, own.hessian))


def test_long_gradients_are_shortened_each_draws_by_itself():
    state = ivon.init({"w": torch.zeros(3, dtype=F64), "b": torch.zeros((), dtype=F64)})
    x, y = randn(5, 3), 30 * randn(5, 1)

    def fn(params, x):
        return x @ params["w"][:, None] + params["b"]

    options = {**OPTIONS, "num_samples": 4}
    new, _ = ivon.update(fn, None, state, (x, y), NORMAL, max_grad_norm=0.5, **options)
    draws = ivon.draws(state, 4, seed=3, num_data=50)
    grads = []
    for s in range(4):
        theta = {k: v[s].requires_grad_() for k, v in draws.items()}
        loss = -NORMAL.log_prob(fn(theta, x), y).mean()
        for leaf, g in zip(theta.values(), torch.autograd.grad(loss, list(theta.values())), strict=True):
            leaf.grad = g
        assert torch.nn.utils.clip_grad_norm_(list(theta.values()), 0.5) > 0.5
        grads.append({k: v.grad for k, v in theta.items()})
    gradients = {k: torch.stack([g[k] for g in grads]) for k in draws}
    options = {k: v for k, v in OPTIONS.items() if k != "seed"}
    assert_same(new, ivon.step(state, gradients, draws, **options))


# Evaluating ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SOME, "mlp_dropout", "conv_dropout", "residual", "attention"])
def test_all_draws_in_one_pass_are_those_of_a_loop(name):
    model = MODELS[name]()
    batch, state = rows_of(model), ivon.init(model.params)
    options = {**OPTIONS, "num_samples": 5}
    for _ in range(2):  # the first brings buffers into the state, the second starts from there
        moves = [
            ivon.update(model.fn, model.params, state, batch, CATEGORICAL, chunk_size=size, **options)
            for size in (None, 2, 1)
        ]
        for move in moves[:2]:
            assert_same(move, moves[2], rtol=1e-6, atol=1e-9)
        state = moves[0][0]


def test_a_model_that_vmap_cannot_take_is_evaluated_in_a_loop():
    _, make = LOOPED_MODELS["branch_on_values"]
    model = make()
    batch, state = rows_of(model), ivon.init(model.params)
    options = {**OPTIONS, "num_samples": 3}
    with pytest.warns(UserWarning, match=r"`ivon\.update` evaluates draws one by one"):
        got = ivon.update(model.fn, model.params, state, batch, CATEGORICAL, **options)
    assert_same(got, ivon.update(model.fn, model.params, state, batch, CATEGORICAL, chunk_size=1, **options))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_buffers_are_averaged_over_draws_and_batches_counted_once(num_samples):
    model = MODELS["conv"]()
    (x, y), state = rows_of(model), ivon.init(model.params)
    options = {**OPTIONS, "num_samples": num_samples}
    for count in (1, 2):
        draws = ivon.draws(state, num_samples, seed=3, num_data=50)
        new, _ = ivon.update(model.fn, model.params, state, (x, y), CATEGORICAL, **options)
        seen = []
        for s in range(num_samples):
            theta = {**{k: v[s] for k, v in draws.items()}, **state.fixed}
            seen.append(fb.training_call(model.fn, theta, x, seed=0)[1])
        assert set(new.fixed) == set(seen[0])
        for name, leaf in new.fixed.items():
            values = torch.stack([changed[name].tensor for changed in seen])
            if values.is_floating_point():
                torch.testing.assert_close(leaf.tensor, values.mean(0))
            else:
                assert leaf.tensor == count
        state = new
    q = ivon.posterior(state, num_data=50)
    assert isinstance(q.mean["1.running_mean"], fb.Fixed)
    assert "1.running_mean" not in q.covariance.variance


def test_dropout_is_active_and_its_masks_are_those_of_the_draw_and_the_step():
    model = MODELS["mlp_dropout"]()
    batch, state = rows_of(model, 16), ivon.init(model.params, hess_init=1e12)  # draws at the mean
    losses = [
        ivon.update(model.fn, model.params, s, batch, CATEGORICAL, **{**OPTIONS, "seed": seed})[1]
        for seed in (3, 4)
        for s in (state, moved_step(state))
    ]
    still = -CATEGORICAL.log_prob(model.fn(model.params, batch[0]), batch[1]).mean()
    assert len({round(loss.item(), 6) for loss in (*losses, still)}) == 5


def moved_step(state):
    return IVONState(
        *(state.mean, state.momentum, state.hessian, state.fixed, state.step + 1),
        *(state.hess_init, state.dtypes),
    )


class Noisy(nn.Module):
    """Draws from torch's global state, which is no dropout."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x + torch.randn(x.shape, dtype=x.dtype))


@pytest.mark.parametrize("num_samples", [1, 2])
def test_noise_of_the_models_own_is_a_function_of_the_seed(num_samples):
    fn, params = fb.make_functional(Noisy().double())
    state, batch = ivon.init(params), (randn(4, 3), torch.tensor([0, 1, 1, 0]))
    before = torch.get_rng_state()
    options = {**OPTIONS, "num_samples": num_samples}
    first, second = (ivon.update(fn, params, state, batch, CATEGORICAL, **options) for _ in range(2))
    assert are_equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    other = ivon.update(fn, params, moved_step(state), batch, CATEGORICAL, **options)
    assert other[1] != first[1]


@pytest.mark.parametrize("name", [*SOME, "mlp_dropout", "conv_dropout"])
def test_nothing_is_changed_and_equal_calls_are_equal_bit_for_bit(name):
    model = MODELS[name]()
    batch, state = rows_of(model), moved_away(ivon.init(model.params))
    given = (model.params, state, batch)
    before, random = copy.deepcopy(given), torch.get_rng_state()
    options = {**OPTIONS, "num_samples": 3}
    first, second = (
        ivon.update(model.fn, model.params, state, batch, CATEGORICAL, **options) for _ in range(2)
    )
    assert are_equal(first, second)
    assert are_equal(given, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(not t.requires_grad and t.grad_fn is None for t in tensors(first))


def test_states_share_nothing():
    params = {"w": torch.zeros(3), "stat": fb.Fixed(torch.zeros(2))}
    one, two = ivon.init(params), ivon.init(params)
    expected = copy.deepcopy(two)
    for leaf in (*tensors(params), *tensors(one)):
        leaf.add_(1)
    assert are_equal(two, expected)
    q = ivon.posterior(two, num_data=3)
    for leaf in tensors(q):
        leaf.add_(1.0)
    assert are_equal(two, expected)


def test_the_callers_mode_does_not_matter():
    model = MODELS["conv"]()
    batch, state = rows_of(model), ivon.init(model.params)
    expected = ivon.update(model.fn, model.params, state, batch, CATEGORICAL, **OPTIONS)
    with torch.inference_mode():
        inputs = copy.deepcopy((model.params, ivon.init(model.params), batch))
        got = ivon.update(model.fn, inputs[0], inputs[1], inputs[2], CATEGORICAL, **OPTIONS)
    assert are_equal(got, expected)
    assert not any(t.is_inference() for t in tensors(got))
    with torch.no_grad():
        assert are_equal(ivon.update(model.fn, model.params, state, batch, CATEGORICAL, **OPTIONS), expected)


@pytest.mark.parametrize("name", ["mlp", "nested", "conv"])
def test_only_chosen_leaves_are_moved_and_covered(name):
    model = MODELS[name]()
    batch = rows_of(model)
    state = ivon.init(model.params, where=lambda path, _: path.startswith(model.head))
    rest = covering(model.params, lambda path: not path.startswith(model.head))
    covered = covering(model.params, lambda path: path.startswith(model.head))
    for _ in range(2):
        new, _ = ivon.update(model.fn, model.params, state, batch, CATEGORICAL, num_samples=2, **OPTIONS)
        # What is covered need not be in `params`, and if it is, its value does not matter.
        other, _ = ivon.update(model.fn, rest, state, batch, CATEGORICAL, num_samples=2, **OPTIONS)
        assert are_equal(new, other)
        state = new
    assert optree.tree_paths(new.mean) == optree.tree_paths(covered)
    q = ivon.posterior(state, num_data=50)
    prediction = fb.predict(model.fn, model.params, q, batch[0], num_samples=3, seed=0)
    assert prediction.samples.shape[0] == 3


def test_a_state_that_covers_everything_needs_no_parameters():
    model = MODELS["mlp"]()
    batch, state = rows_of(model), ivon.init(model.params)
    got = ivon.update(model.fn, None, state, batch, CATEGORICAL, **OPTIONS)
    assert are_equal(got, ivon.update(model.fn, model.params, state, batch, CATEGORICAL, **OPTIONS))


def test_a_single_tensor_is_a_tree_too():
    state = ivon.init(torch.zeros(3, dtype=F64))
    x, y = randn(5, 3), randn(5, 1)
    new, _ = ivon.update(lambda w, x: x @ w[:, None], None, state, (x, y), NORMAL, num_samples=2, **OPTIONS)
    assert new.mean.shape == (3,)
    assert ivon.posterior(new, num_data=5).sample(2, seed=0).shape == (2, 3)


def test_integers_are_passed_by_and_unused_leaves_go_to_the_prior():
    params = {"w": torch.ones(3, dtype=F64), "idle": torch.ones(2, dtype=F64), "table": torch.arange(3)}

    def fn(params, x):
        return x[:, params["table"]] @ params["w"][:, None]

    state = ivon.init(params)
    assert set(state.mean) == {"w", "idle"}
    for _ in range(200):
        batch = randn(5, 3), randn(5, 1)
        options = {**OPTIONS, "learning_rate": 1.0, "beta2": 0.9, "num_data": 5}
        state, _ = ivon.update(fn, params, state, batch, NORMAL, num_samples=2, **options)
    q = ivon.posterior(state, num_data=5)
    torch.testing.assert_close(q.mean["idle"], torch.zeros(2, dtype=F64), rtol=0, atol=1e-3)
    torch.testing.assert_close(q.variance["idle"], torch.ones(2, dtype=F64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_numbers_are_wide_and_the_posterior_has_the_dtype_of_the_parameters(dtype, tmp_path):
    torch.manual_seed(0)
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype))
    x, y = randn(8, 3).to(dtype), randn(8, 1).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    state, losses = ivon.init(params), []
    for _ in range(30):
        state, loss = ivon.update(fn, params, state, (x, y), NORMAL, num_samples=2, **OPTIONS)
        losses.append(loss.item())
    assert {t.dtype for t in tensors((state.mean, state.momentum, state.hessian))} == {wide}
    assert sum(losses[-5:]) < sum(losses[:5])
    fb.save(state, tmp_path / "state.safetensors")
    q = ivon.posterior(fb.load(tmp_path / "state.safetensors"), num_data=50)
    assert {t.dtype for t in tensors(q)} == {dtype}
    assert fb.predict(fn, None, q, x, num_samples=2, seed=0).samples.dtype == dtype
    assert {t.dtype for t in tensors(ivon.fit(fn, params, (x, y), NORMAL, num_epochs=1, **FIT))} == {dtype}


FIT = {"learning_rate": 0.1, "seed": 3, "beta2": 0.9}


def test_small_steps_are_not_lost_in_half_precision():
    state = ivon.init({"w": torch.ones(3, dtype=torch.bfloat16)})
    draws = ivon.draws(state, 1, seed=0, num_data=50)
    for _ in range(100):
        gradients = {"w": torch.ones(1, 3, dtype=torch.bfloat16)}
        options = {"learning_rate": 1e-5, "prior_precision": 1e-12, "num_data": 50}
        state = ivon.step(state, gradients, draws, **options)
    torch.testing.assert_close(state.mean["w"], torch.full((3,), 1 - 1e-3), rtol=2e-5, atol=0)


# A run -----------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((-1, -2)))


NETWORKS = {"mlp": (mlp, (4,)), "conv": (ConvNet, (1, 5, 5))}


def regression(shape, n=13):
    return randn(n, *shape), randn(n, 1, seed=1)


def start(make, num=4):
    return fb.ensemble.init(lambda: make().double(), num, seed=1)


def entry(tree, k):
    return optree.tree_map(lambda leaf: leaf[k], tree)


def one(members, k=0):
    return {name: leaf[k] for name, leaf in members.items()}


def fit(fn, params, data, **options):
    return ivon.fit(fn, params, data, NORMAL, **{"num_epochs": 4, "num_samples": 2, **FIT, **options})


@pytest.mark.parametrize("network", NETWORKS)
def test_a_fit_is_a_loop_of_updates(network):
    make, shape = NETWORKS[network]
    fn, members = start(make, 1)
    x, y = regression(shape)
    batches = [(x[i : i + 5], y[i : i + 5]) for i in range(0, 13, 5)]
    rate = ivon.cosine(0.2, 12, warmup=2)
    seen, means = [], []

    def keep(epoch, loss, state):
        seen.append((epoch, loss, state))

    q = fit(fn, one(members), batches, learning_rate=rate, callback=keep, hess_init=0.3)
    state = ivon.init(one(members), hess_init=0.3)
    for epoch in range(4):
        losses = []
        for i, batch in enumerate(batches):
            state, loss = ivon.update(
                *(fn, one(members), state, batch, NORMAL),
                **{**FIT, "learning_rate": rate(3 * epoch + i), "num_data": 13, "num_samples": 2},
            )
            losses.append(loss * len(batch[1]))
        means.append(sum(losses).item() / 13)
        assert seen[epoch][0] == epoch
        assert are_equal(seen[epoch][2], state)
    assert [loss for _, loss, _ in seen] == pytest.approx(means)
    assert are_equal(q, ivon.posterior(state, num_data=13))


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_fitted_at_once_are_those_fitted_alone(network):
    make, shape = NETWORKS[network]
    fn, members = start(make)
    data, options = regression(shape), {"batch_size": 5, "hess_init": 0.5, "max_grad_norm": 3.0}
    together = fit(fn, members, data, stacked=True, **options)
    assert {t.shape[0] for t in tensors(together)} == {4}
    for k, seed in enumerate(member_seeds(3, 4)):
        alone = fit(fn, one(members, k), data, **{**options, "seed": seed})
        assert_same(optree.tree_map(lambda leaf: leaf[k], together), alone, rtol=1e-7, atol=1e-10)  # noqa: B023


def test_networks_whose_batches_differ_in_shape_or_that_draw_noise_are_those_fitted_alone():
    def ragged(params, x):
        return x.sum(1, keepdim=True) * params["w"] + params["b"]

    class Sentences:
        def __iter__(self):
            for n in torch.randperm(3).tolist():
                yield randn(2, n + 1, seed=n), randn(2, 1, seed=n + 5)

    linear = {"w": randn(3, 1), "b": randn(3, 1, seed=1)}
    noisy, members = start(Noisy, 3)
    y = torch.randint(2, (6,), generator=seeded(0))
    cases = [
        (ragged, linear, Sentences(), NORMAL, {}),
        (noisy, members, (randn(6, 3), y), CATEGORICAL, {"batch_size": 4}),
    ]
    for fn, params, data, likelihood, extra in cases:
        options = {"num_epochs": 3, "num_samples": 2, **FIT, **extra}
        together = ivon.fit(fn, params, data, likelihood, stacked=True, **options)
        for k, seed in enumerate(member_seeds(3, 3)):
            alone = ivon.fit(fn, one(params, k), data, likelihood, **{**options, "seed": seed})
            assert_same(optree.tree_map(lambda leaf: leaf[k], together), alone, rtol=1e-7, atol=1e-10)  # noqa: B023


@pytest.mark.parametrize("stacked", [False, True])
def test_a_fit_predicts_and_mixes(stacked):
    fn, members = start(ConvNet, 3)
    data = regression((1, 5, 5))
    q = fit(fn, members if stacked else one(members), data, batch_size=5, stacked=stacked)
    q = fb.mixture(q, stacked=True) if stacked else fb.mixture(q, q)
    prediction = fb.predict(fn, None, q, data[0], likelihood=NORMAL, num_samples=6, seed=0)
    assert prediction.mean.shape == (13, 1)
    assert (prediction.epistemic_variance > 0).all()


def test_only_chosen_leaves_are_fitted():
    fn, members = start(ConvNet, 2)
    data = regression((1, 5, 5))
    for params, stacked in ((one(members), False), (members, True)):
        q = fit(fn, params, data, where="head.*", stacked=stacked)
        assert set(q.covariance.variance) == {"head.weight", "head.bias"}
        assert {k for k, v in q.mean.items() if isinstance(v, fb.Fixed)} == {
            f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
        }
    other = {k: v + (1.0 if k == "conv.bias" else 0.0) for k, v in one(members).items()}
    assert not torch.equal(
        fit(fn, other, data).mean["conv.weight"], fit(fn, one(members), data).mean["conv.weight"]
    )


def test_a_fit_changes_nothing_and_equal_seeds_give_equal_posteriors():
    fn, members = start(mlp, 2)
    before, random = copy.deepcopy(members), torch.get_rng_state()
    for options in ({"stacked": True}, {}):
        params = members if options else one(members)
        first, second = (fit(fn, params, regression((4,)), batch_size=5, **options) for _ in range(2))
        assert are_equal(first, second)
    assert are_equal(members, before)
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(7)
    drawn = fit(fn, one(members), regression((4,)), seed=None)
    torch.manual_seed(7)
    assert are_equal(drawn, fit(fn, one(members), regression((4,)), seed=None))


@pytest.mark.parametrize("stacked", [False, True])
def test_a_fit_that_ends_far_above_its_start_says_so(stacked):
    """The objective by public functions: a mean loss, and ``kl`` over the effective number of rows."""
    (x, y), precision, ess = regression((4,)), 3.0, 7.0
    fn, members = start(mlp, 2)
    params = members if stacked else one(members)
    scale = {"prior_precision": precision, "ess": ess}
    options = {"beta2": 0.9, "seed": 0, "num_samples": 2, **scale}
    losses = []
    with pytest.warns(UserWarning, match="has diverged: the objective") as caught:
        q = ivon.fit(
            *(fn, params, (x, y), NORMAL),
            **{**options, "learning_rate": 1.0, "num_epochs": 12, "stacked": stacked},
            callback=lambda epoch, loss, state: losses.append(loss),
        )
    assert caught[0].filename == __file__
    seeds = member_seeds(0, 2) if stacked else (0,)
    rises = []
    for k, seed in enumerate(seeds):
        mine = one(members, k)
        first = ivon.init(mine)
        _, first_loss = ivon.update(
            *(fn, mine, first, (x, y), NORMAL), **{**options, "seed": seed}, learning_rate=1.0, num_data=13
        )
        prior = fb.covariances.Diagonal(
            {n: torch.full_like(m, 13 / ess / precision) for n, m in mine.items()}
        )
        p = fb.Gaussian({n: torch.zeros_like(m) for n, m in mine.items()}, prior)
        began, ended = ivon.posterior(first, num_data=13, **scale), entry(q, k) if stacked else q
        before, after = fb.kl(began, p) / ess, fb.kl(ended, p) / ess
        last = losses[-1][k] if stacked else losses[-1]
        rises.append(float(last + after - first_loss - before))
    shown = re.search(r"objective(?: of member (\d))? is (\S+) nats", str(caught[0].message))
    assert (shown[1] is not None) == stacked
    assert float(shown[2]) == pytest.approx(rises[int(shown[1] or 0)], rel=1e-2)


def test_a_fit_from_a_trained_network_to_a_wide_gaussian_says_nothing():
    data, (fn, members) = regression((4,)), start(lambda: nn.Linear(4, 1), 1)
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    params = fb.training.fit(fn, one(members), data, NORMAL, optimizer=adam, num_epochs=200, seed=0)
    # The loss rises from that of the network to that of the posterior, as it should.
    losses = []
    fit(
        *(fn, params, data),
        **{"hess_init": 1e4, "rescale_lr": False, "num_epochs": 400, "learning_rate": 0.1},
        callback=lambda epoch, loss, state: losses.append(loss),
    )
    assert losses[-1] > losses[0]


def test_a_callback_sees_states_and_may_end_the_fit():
    fn, members = start(mlp, 2)
    data, seen = regression((4,)), []

    def stop_after_two(epoch, loss, state):
        seen.append((loss, copy.deepcopy(state)))
        for leaf in tensors(state):  # a copy: nobody minds
            leaf.zero_()
        return epoch == 1

    got = fit(fn, one(members), data, callback=stop_after_two)
    assert [type(loss) for loss, _ in seen] == [float, float]
    assert are_equal(got, ivon.posterior(seen[-1][1], num_data=13))
    assert are_equal(got, fit(fn, one(members), data, num_epochs=2))
    seen.clear()
    got = fit(fn, members, data, callback=stop_after_two, stacked=True)
    assert [loss.shape for loss, _ in seen] == [(2,), (2,)]
    assert are_equal(got, ivon.posterior(seen[-1][1], num_data=13))


def test_a_bar_is_shown(capsys):
    fn, members = start(mlp, 1)
    fit(fn, one(members), regression((4,)), progress=True)
    assert "ivon.fit: 100%" in capsys.readouterr().err


class Interrupted(Exception):
    pass


def failing(fn, after):
    """``fn``, that fails at the call with this number."""
    calls = []

    def wrapped(params, x):
        calls.append(None)
        if len(calls) > after:
            raise Interrupted
        return fn(params, x)

    return wrapped


@pytest.mark.parametrize("network", NETWORKS)
def test_updates_from_a_saved_state_are_the_very_run_and_an_exception_leaves_nothing_behind(
    network, tmp_path
):
    make, shape = NETWORKS[network]
    fn, members = start(make, 1)
    params, batch = one(members), regression(shape)
    run = functools.partial(ivon.update, batch=batch, likelihood=NORMAL, num_samples=2, **OPTIONS)
    uninterrupted = ivon.init(params)
    for _ in range(8):
        uninterrupted, _ = run(fn, params, uninterrupted)

    state, path = ivon.init(params), tmp_path / "state.safetensors"
    model = failing(fn, 14)
    before = copy.deepcopy(params)

    def go_on(state):
        for _ in range(8):
            state, _ = run(model, params, state, chunk_size=1)
            fb.save(state, path)

    with pytest.raises(Interrupted):
        go_on(state)
    assert are_equal(params, before)
    assert are_equal(state, ivon.init(params))
    state = fb.load(path)
    done = int(state.step)
    assert 2 < done < 8
    for _ in range(8 - done):
        state, _ = run(fn, params, state)
    assert_same(state, uninterrupted)

    # The same functions throughout: bit for bit.
    state = ivon.init(params)
    for _ in range(8):
        fb.save(state, path)
        state, _ = run(fn, params, fb.load(path))
    assert are_equal(state, uninterrupted)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("loader", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_fit_that_goes_on_from_a_checkpoint_ends_where_it_would_have(network, loader, stacked, tmp_path):
    make, shape = NETWORKS[network]
    fn, members = start(make, 2)
    params = members if stacked else one(members)
    rows, path = regression(shape), tmp_path / "state.safetensors"
    data = DataLoader(TensorDataset(*rows), batch_size=5, shuffle=True) if loader else rows
    options = {"learning_rate": ivon.cosine(0.1, 15), "num_epochs": 5, "stacked": stacked}
    options |= {} if loader else {"batch_size": 5}
    uninterrupted = fit(fn, params, data, hess_init=0.2, where="*weight", **options)

    def save_and_fail(epoch, loss, state):
        fb.save(state, path)
        if epoch == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(fn, params, data, hess_init=0.2, where="*weight", callback=save_and_fail, **options)
    assert are_equal(fit(fn, params, data, start=fb.load(path), **options), uninterrupted)


def test_a_fit_goes_on_in_the_middle_of_an_epoch():
    fn, members = start(mlp, 1)
    x, y = regression((4,), 12)
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
    state = ivon.init(one(members))
    for i in range(6):
        state, _ = ivon.update(
            *(fn, one(members), state, batches[i % 4], NORMAL), num_data=12, num_samples=2, **FIT
        )
    expected = fit(fn, one(members), batches)
    assert are_equal(fit(fn, one(members), batches, start=state), expected)


def test_states_of_several_networks_work_under_vmap():
    params = {"w": randn(3, 4, 2), "stat": fb.Fixed(randn(3, 2))}
    states = vmap(functools.partial(ivon.init, hess_init=0.3))(params)
    draws = vmap(lambda state, seed: ivon.draws(state, 2, seed=seed, num_data=9))(states, torch.arange(3))
    gradients = optree.tree_map(lambda leaf: leaf.sin(), draws)
    options = {"learning_rate": 0.1, "num_data": 9, "clip_radius": 1.0, "beta2": 0.5}
    new = vmap(functools.partial(ivon.step, **options))(states, gradients, draws)
    mapped = vmap(functools.partial(ivon.posterior, num_data=9))(new)
    assert are_equal(ivon.posterior(new, num_data=9), mapped)
    for k in range(3):
        alone = ivon.init(optree.tree_map(lambda leaf: leaf[k], params), hess_init=0.3)  # noqa: B023
        at = ivon.draws(alone, 2, seed=k, num_data=9)
        alone = ivon.step(alone, optree.tree_map(lambda leaf: leaf.sin(), at), at, **options)
        assert_same(optree.tree_map(lambda leaf: leaf[k], new), alone)  # noqa: B023


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_cosine_rises_falls_and_is_never_zero(warmup):
    rates = [ivon.cosine(2.0, 10, warmup)(step) for step in range(12)]
    assert max(rates) == pytest.approx(2.0)
    assert all(rate > 0 for rate in rates)
    assert rates[9] == rates[10] == rates[11]
    assert all(a < b for a, b in zip(rates[:warmup], rates[1:warmup], strict=False))
    fall = rates[warmup:10]
    assert all(a > b for a, b in zip(fall, fall[1:], strict=False))
    assert fall[0] == pytest.approx(2.0)


# What makes no sense ---------------------------------------------------------------------------------

PARAMS = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
BATCH = torch.ones(4, 3), torch.zeros(4, 2)


def affine(params, x):
    return x @ params["w"].T + params["b"]


def updated(fn=affine, params=PARAMS, state=None, batch=BATCH, likelihood=NORMAL, **options):
    state = ivon.init(PARAMS) if state is None else state
    return ivon.update(fn, params, state, batch, likelihood, **{**OPTIONS, **options})


def sampled(num_samples=1, **options):
    return ivon.draws(ivon.init(PARAMS), num_samples, **{"seed": 0, "num_data": 5, **options})


def stepped(gradients=None, draws=None, **options):
    draws = sampled(2) if draws is None else draws
    gradients = draws if gradients is None else gradients
    state = ivon.init(PARAMS)
    return ivon.step(state, gradients, draws, **{"learning_rate": 0.1, "num_data": 5, **options})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: ivon.init(PARAMS, hess_init=0.0),
            ValueError,
            "`ivon.init(hess_init=...)` should be positive",
        ),
        (lambda: ivon.init(PARAMS, hess_init=math.inf), ValueError, "positive and finite, got inf."),
        (lambda: ivon.init(PARAMS, hess_init="1"), TypeError, "should be a number, got str."),
        (lambda: ivon.init(PARAMS, where="c"), ValueError, "that `where='c'` chooses, got none."),
        (lambda: ivon.init({"i": torch.arange(3)}), ValueError, "a leaf of floating point, got none."),
        (lambda: updated(fn=nn.Linear(3, 2)), TypeError, "got an nn.Module, Linear. Wrap it with"),
        (lambda: updated(fn=3), TypeError, "a function of (params, x), got int."),
        (lambda: updated(state=PARAMS), TypeError, "should be given a state, got dict. Write `ivon.init"),
        (
            lambda: updated(likelihood=nn.MSELoss()),
            TypeError,
            "`ivon.update(likelihood=...)` should be one of",
        ),
        (lambda: updated(batch=BATCH[0]), TypeError, "`(x, y)` with tensors, got Tensor."),
        (
            lambda: updated(learning_rate=0.0),
            ValueError,
            "`ivon.update(learning_rate=...)` should be positive",
        ),
        (lambda: updated(learning_rate=-1.0), ValueError, "positive and finite, got -1.0."),
        (lambda: updated(learning_rate=lambda step: 0.1), TypeError, "should be a number, got function."),
        (
            lambda: updated(prior_precision=0.0),
            ValueError,
            "`ivon.update(prior_precision=...)` should be pos",
        ),
        (lambda: updated(num_data=3), ValueError, "at least the 4 of this batch, got 3."),
        (lambda: updated(num_data=0), ValueError, "`ivon.update(num_data=...)` should be at least 1, got 0."),
        (lambda: updated(num_data=None), TypeError, "`ivon.update(num_data=...)` should be an int, got None"),
        (lambda: updated(num_data=50.0), TypeError, "should be an int, got float."),
        (lambda: updated(beta1=1.0), ValueError, "`ivon.update(beta1=...)` should be at least 0 and below 1"),
        (lambda: updated(beta1=-0.1), ValueError, "at least 0 and below 1, got -0.1."),
        (lambda: updated(beta2=1.0), ValueError, "`ivon.update(beta2=...)` should be at least 0 and below 1"),
        (lambda: updated(beta2=math.nan), ValueError, "at least 0 and below 1, got nan."),
        (lambda: updated(beta2=None), TypeError, "should be a number, got NoneType."),
        (lambda: updated(num_samples=0), ValueError, "`ivon.update(num_samples=...)` should be at least 1"),
        (lambda: updated(chunk_size=0), ValueError, "`ivon.update(chunk_size=...)` should be at least 1"),
        (lambda: updated(clip_radius=0.0), ValueError, "`ivon.update(clip_radius=...)` should be positive"),
        (lambda: updated(max_grad_norm=-1.0), ValueError, "`ivon.update(max_grad_norm=...)` should be pos"),
        (
            lambda: updated(ess=0.0),
            ValueError,
            "`ivon.update(ess=...)` should be positive and finite, got 0.0.",
        ),
        (lambda: updated(rescale_lr=1.0), TypeError, "(rescale_lr=...)` should be True or False, got float."),
        (lambda: updated(seed=1.5), TypeError, "`seed` should be an int"),
        (
            lambda: updated(params={**PARAMS, "w": torch.zeros(3, 2)}),
            ValueError,
            "should have a state over leaves of `params`; in it 'w' has shape (2, 3), not (3, 2).",
        ),
        (lambda: updated(params={"w": PARAMS["w"]}), ValueError, "in it 'b' is not expected."),
        (lambda: sampled(0), ValueError, "`ivon.draws(num_samples=...)` should be at least 1, got 0."),
        (lambda: sampled(num_data=0), ValueError, "`ivon.draws(num_data=...)` should be at least 1"),
        (lambda: ivon.draws(PARAMS, seed=0, num_data=3), TypeError, "should be given a state, got dict"),
        (lambda: stepped(sampled(3)), ValueError, "`ivon.step(gradients=...)` should have the leaves of"),
        (
            lambda: stepped(sampled(3)),
            ValueError,
            "of which there are 2; in it 'b' has shape (3, 2), not (2, 2)",
        ),
        (lambda: stepped(draws=PARAMS), ValueError, "`ivon.step(draws=...)` should have the leaves of the"),
        (lambda: stepped({"w": sampled(2)["w"]}), ValueError, "in it 'b' is missing."),
        (lambda: stepped(draws={}), ValueError, "`ivon.step(draws=...)` should have the leaves of the state"),
        (lambda: stepped(learning_rate=0), ValueError, "`ivon.step(learning_rate=...)` should be positive"),
        (lambda: ivon.posterior({}, num_data=3), TypeError, "should be given a state, got dict"),
        (
            lambda: ivon.posterior(ivon.init(PARAMS), num_data=0),
            ValueError,
            "posterior(num_data=...)` should",
        ),
        (lambda: of_hessian(-0.5), ValueError, "`h + delta` of 'b' is not positive everywhere"),
        (lambda: of_hessian(math.nan), RuntimeError, "should be given a finite state; some of 'b' are not"),
        (lambda: ivon.cosine(0.0, 3), ValueError, "`ivon.cosine(peak=...)` should be positive"),
        (lambda: ivon.cosine(1.0, 0), ValueError, "`ivon.cosine(num_steps=...)` should be at least 1"),
        (lambda: ivon.cosine(1.0, 3, 3), ValueError, "from 0 to below `num_steps=3`, got 3."),
        (
            lambda: ivon.cosine(1.0, 3, 1.0),
            TypeError,
            "`ivon.cosine(warmup=...)` should be an int, got float",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


def of_hessian(value):
    state = ivon.init(PARAMS)
    return ivon.posterior(
        IVONState(
            *(state.mean, state.momentum, {k: torch.full_like(v, value) for k, v in PARAMS.items()}),
            *({}, state.step, 1.0, state.dtypes),
        ),
        num_data=10,
    )


class Untouched:
    """Data that would show that training had begun."""

    def __iter__(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"learning_rate": 0.0}, ValueError, "`ivon.fit(learning_rate=...)` should be positive and finite"),
        (
            {"learning_rate": lambda step: -0.1},
            ValueError,
            "`ivon.fit(learning_rate=...)` should give positive and finite numbers, got -0.1 for step 0.",
        ),
        ({"learning_rate": lambda step: None}, ValueError, "got None for step 0."),
        ({"num_epochs": 0}, ValueError, "`ivon.fit(num_epochs=...)` should be at least 1"),
        ({"hess_init": -1.0}, ValueError, "(hess_init=...)` should be positive"),
        ({"where": "nothing"}, ValueError, "`where='nothing'` chooses, got none."),
        ({"beta1": 1.0}, ValueError, "`ivon.fit(beta1=...)` should be at least 0 and below 1"),
        ({"beta2": -1}, ValueError, "`ivon.fit(beta2=...)` should be at least 0 and below 1"),
        ({"num_samples": 0}, ValueError, "`ivon.fit(num_samples=...)` should be at least 1"),
        ({"prior_precision": 0.0}, ValueError, "`ivon.fit(prior_precision=...)` should be positive"),
        ({"num_data": 0}, ValueError, "`ivon.fit(num_data=...)` should be at least 1"),
        ({"chunk_size": 0}, ValueError, "`ivon.fit(chunk_size=...)` should be at least 1"),
        ({"ess": -2.0}, ValueError, "`ivon.fit(ess=...)` should be positive"),
        ({"clip_radius": 0.0}, ValueError, "`ivon.fit(clip_radius=...)` should be positive"),
        ({"max_grad_norm": 0.0}, ValueError, "`ivon.fit(max_grad_norm=...)` should be positive"),
        ({"batch_size": 3}, ValueError, "`ivon.fit(batch_size=...)` should be left out"),
        ({"stacked": True}, ValueError, "should be given leaves with one leading axis"),
        ({"start": PARAMS}, TypeError, "`ivon.fit(start=...)` should be given a state, got dict"),
        (
            {"start": ivon.init(PARAMS), "where": "w"},
            ValueError,
            "`ivon.fit(start=...)` has a Hessian and leaves: leave out `hess_init` and `where`.",
        ),
        ({"callback": 3}, TypeError, "ivon.fit(callback=...)` should be a function, got int"),
        ({"start": ivon.init({"w": torch.zeros(3)})}, ValueError, "'w' has shape (3,), not (2, 3)"),
        (
            {"start": optree.tree_map(lambda leaf: leaf[None], ivon.init(PARAMS))},
            ValueError,
            "in it 'b' has shape",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_fitting(options, error, words):
    params = {**PARAMS, "w": PARAMS["w"][:1]} if options.get("stacked") else PARAMS
    params = {**params, "b": torch.zeros(3)} if options.get("stacked") else params
    with pytest.raises(error, match=re.escape(words)):
        ivon.fit(affine, params, Untouched(), NORMAL, **{"num_epochs": 2, "learning_rate": 0.1, **options})


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fitted(fn=nn.Linear(3, 2)), TypeError, "got an nn.Module, Linear"),
        (lambda: fitted(likelihood=nn.MSELoss()), TypeError, "`ivon.fit(likelihood=...)` should be one of"),
        (lambda: fitted(num_data=3), ValueError, "at least the 4 of this batch, got 3."),
        (lambda: fitted(data=iter([BATCH])), TypeError, "should be a re-iterable"),
        (lambda: fitted(data=(BATCH[0], BATCH[1][:3])), ValueError, "as many rows of x as of y"),
        (lambda: fitted(data=(BATCH[0], torch.zeros(4, 3))), ValueError, "`ivon.fit(data=...)`"),
        (lambda: fitted(start=after(2)), ValueError, "should be more than the 2 epochs that `start` has beh"),
        (
            lambda: fitted(learning_rate=lambda step: 0.1 * (step < 1)),
            ValueError,
            "should give positive and finite numbers, got 0.0 for step 1.",
        ),
        (
            lambda: fitted(data=(BATCH[0], math.inf * torch.ones(4, 2)), likelihood=Unchecked(1.0)),
            RuntimeError,
            "The loss in `ivon.fit` is inf in step 0, which is in epoch 0. A lower learning rate",
        ),
        (
            lambda: fitted(params=stacked_params(), stacked=True, data=(1e30 * BATCH[0], BATCH[1])),
            RuntimeError,
            "The loss of member 0 in `ivon.fit` is inf in step 0",
        ),
        (
            lambda: fitted(data=(1e15 * BATCH[0], BATCH[1]), num_epochs=1),
            RuntimeError,
            "The Gaussian in `ivon.fit` is not finite after epoch 0",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_while_fitting(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


class Unchecked(fb.likelihoods.Normal):
    def check(self, outputs, y=None, *, call="check(outputs, y)"):
        pass

    def log_prob(self, outputs, y):
        return -(outputs - y).abs().sum(-1)


def stacked_params():
    return {k: torch.stack([v, v]) for k, v in PARAMS.items()}


def after(steps):
    state = ivon.init(PARAMS)
    for _ in range(steps):
        state, _ = updated(state=state)
    return state


def fitted(fn=affine, params=PARAMS, data=BATCH, likelihood=NORMAL, **options):
    return ivon.fit(fn, params, data, likelihood, **{"num_epochs": 2, **FIT, **options})
