import copy
import functools
import itertools
import math
import pickle

import numpy
import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import vmap

import funcbayes as fb
from funcbayes import _mapping, vi
from funcbayes._functorch import physical
from funcbayes._layer_noise import leaves_of_layers
from funcbayes.covariances import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPrecision
from funcbayes.ensemble import member_seeds

F64 = torch.float64
SHAPES = {"b": (2,), "gain": (), "w": (2, 3)}  # ranks 1, 0, 2
P = 9
FAMILIES = ("diag", "low_rank", "kron", "full")
ESTIMATORS = ("reparam", "stl", "flipout", "local")
NORMAL = fb.likelihoods.Normal(0.5)
each_family = pytest.mark.parametrize("family", FAMILIES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


def like(shapes, seed=0, scale=1.0):
    g = seeded(seed)
    return {k: scale * torch.randn(s, generator=g, dtype=F64) for k, s in shapes.items()}


def some_state(family, seed=0, shapes=SHAPES):
    """A state with numbers of no particular kind."""
    state = vi.init(like(shapes, seed), family, init_scale=0.3, rank=3)
    noise = seeded(seed + 1)
    return optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=noise, dtype=F64), state)


def flat(tree, shapes=SHAPES):
    return torch.cat(
        [tree[k].reshape(*tree[k].shape[: tree[k].ndim - len(s)], -1) for k, s in shapes.items()], -1
    )


def as_normal(gaussian, shapes=SHAPES):
    return MultivariateNormal(flat(gaussian.mean, shapes), gaussian.covariance.to_dense())


def requiring_grad(state):
    return optree.tree_map(lambda t: t.detach().clone().requires_grad_(), state)


def gradient(loss, state):
    leaves, structure = optree.tree_flatten(state)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return structure.unflatten(
        [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    )


def vector(tree):
    return torch.cat([t.reshape(-1) for t in optree.tree_leaves(tree)])


# What a state is.


@each_family
def test_a_state_has_the_density_and_the_moments_of_its_posterior(family):
    state = some_state(family)
    expected = as_normal(vi.posterior(state))
    theta = like(SHAPES, seed=5)
    torch.testing.assert_close(state.log_prob(theta), expected.log_prob(flat(theta)))
    torch.testing.assert_close(state.entropy(), expected.entropy())
    torch.testing.assert_close(state.scale().logdet(), torch.logdet(expected.covariance_matrix))
    torch.testing.assert_close(flat(state.variance()), expected.variance)
    torch.testing.assert_close(
        state.scale().operator().times(torch.eye(P, dtype=F64)), expected.covariance_matrix
    )
    torch.testing.assert_close(state.scale().operator().diagonal(), expected.variance)
    torch.testing.assert_close(state.scale().operator().logdet(), state.scale().logdet())


@each_family
def test_draws_of_a_state_have_its_covariance(family):
    num_samples = 20000
    state = some_state(family)
    expected = as_normal(vi.posterior(state))
    draws = flat(state.draws(torch.arange(num_samples), 3)) - expected.mean
    sem = (expected.variance / num_samples).sqrt()
    assert (draws.mean(0).abs() < 5 * sem).all()
    s = expected.covariance_matrix
    # Var of an entry of the sample covariance of Gaussians: (S_ii S_jj + S_ij^2) / n.
    error = ((torch.outer(s.diagonal(), s.diagonal()) + s**2) / num_samples).sqrt()
    assert ((draws.mT @ draws / num_samples - s).abs() < 5 * error).all()


@each_family
def test_a_draw_does_not_depend_on_its_company(family):
    state = some_state(family)
    together = state.draws(torch.arange(7), 3)
    alone = state.draws(torch.tensor([4]), 3)
    for name in SHAPES:
        torch.testing.assert_close(together[name][4], alone[name][0])


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_posteriors_keep_the_dtype_of_the_parameters(family, dtype):
    params = {k: v.to(dtype) for k, v in like(SHAPES).items()}
    state = vi.init(params, family, rank=2)
    assert all(t.dtype == dtype for t in state.draws(torch.arange(2), 0).values())
    assert state.entropy().dtype == torch.float32
    gaussian = vi.posterior(state)
    assert all(t.dtype == dtype for t in gaussian.sample(2, seed=0).values())


@each_family
def test_all_parameters_begin_with_the_initial_scale(family):
    # Of low rank the scale is one on average, the closer the more factors there are.
    leaves = {"w": (40, 30)} if family == "low_rank" else SHAPES
    state = vi.init(like(leaves), family, init_scale=0.05, rank=400)
    variance = torch.cat([v.reshape(-1) for v in vi.posterior(state).variance.values()])
    tolerance = {"low_rank": 0.3}.get(family, 1e-6)
    torch.testing.assert_close(variance, torch.full_like(variance, 0.05**2), rtol=tolerance, atol=0)


def test_scales_far_below_one_are_kept():
    state = vi.init({"w": torch.zeros(3)}, init_scale=1e-6)
    torch.testing.assert_close(vi.posterior(state).variance["w"].sqrt(), torch.full((3,), 1e-6))


# The divergence.


def gaussian_prior(structure):
    mean = like(SHAPES, seed=7)
    variance = {k: v.abs() + 0.5 for k, v in like(SHAPES, seed=8).items()}
    factors = {k: randn(*s, 4, seed=9 + i) for i, (k, s) in enumerate(SHAPES.items())}
    covariance = {
        "diag": lambda: Diagonal(variance),
        "low rank": lambda: LowRankPlusDiagonal(variance, factors),
        "low-rank precision": lambda: LowRankPrecision(variance, factors),
        "dense": lambda: Dense({k: randn(*s, P, seed=20 + i) for i, (k, s) in enumerate(SHAPES.items())}),
        "kron": lambda: Kronecker(
            variance,
            {k: torch.linalg.qr(randn(s[0], s[0], seed=30)).Q for k, s in SHAPES.items() if s},
            {"w": torch.linalg.qr(randn(3, 3, seed=31)).Q},
        ),
    }[structure]()
    return fb.Gaussian(mean, covariance)


def without_data(state, prior, **options):
    """The negative ELBO of a model that its parameters say nothing to, whose likelihood is 1: the KL."""
    likelihood = fb.likelihoods.Normal(1 / math.sqrt(2 * math.pi))
    options = {"num_data": 1, "seed": 0, **options}
    fn = lambda params, x: x  # noqa: E731
    return vi.negative_elbo(
        fn, None, state, (torch.zeros(1, 1), torch.zeros(1, 1)), likelihood, prior=prior, **options
    )


@each_family
@pytest.mark.parametrize("structure", ["diag", "low rank", "low-rank precision", "dense", "kron"])
def test_kl_from_a_gaussian_prior_is_exact_and_summed(family, structure):
    state, prior = some_state(family), gaussian_prior(structure)
    expected = kl_divergence(as_normal(vi.posterior(state)), as_normal(prior))
    torch.testing.assert_close(without_data(state, prior), expected)
    # And so is its gradient, by finite differences along a direction.
    state = requiring_grad(state)
    grads = vector(gradient(without_data(state, prior), state))
    step = optree.tree_map(
        lambda t: 1e-5 * torch.randn(t.shape, generator=seeded(3), dtype=F64), state.detached()
    )
    above, below = (
        without_data(optree.tree_map(lambda a, b, s=sign: a + s * b, state.detached(), step), prior)
        for sign in (1, -1)
    )
    torch.testing.assert_close((grads * vector(step)).sum(), (above - below) / 2, rtol=1e-5, atol=1e-9)


@each_family
def test_kl_from_numbers_a_leaf_is_that_from_their_gaussian(family):
    state = some_state(family)
    numbers = {"b": 2.0, "gain": 0.5, "w": 3.0}
    variance = {k: torch.full(s, 1 / numbers[k], dtype=F64) for k, s in SHAPES.items()}
    zero = {k: torch.zeros(s, dtype=F64) for k, s in SHAPES.items()}
    expected = without_data(state, fb.Gaussian(zero, Diagonal(variance)))
    torch.testing.assert_close(without_data(state, None, prior_precision=numbers), expected)
    torch.testing.assert_close(without_data(state, fb.priors.Normal(precision=numbers)), expected)


PRIORS = {
    "normal": lambda: fb.priors.Normal(precision=2.0),
    "laplace": lambda: fb.priors.Laplace(scale=0.7),
    "scale mixture": lambda: fb.priors.ScaleMixture(0.4, 1.0, 0.1),
    "horseshoe": lambda: fb.priors.Horseshoe(scale=0.5),
}


@each_family
@pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())
def test_kl_from_any_prior_is_the_mean_log_ratio_within_its_error(family, make):
    num_samples = 4000
    state, prior = some_state(family), make()
    draws = state.draws(torch.arange(num_samples), 11)
    ratios = vmap(state.log_prob)(draws) - vmap(prior.log_prob)(draws)
    got = torch.stack([without_data(state, prior, num_samples=500, seed=k) for k in range(8)])
    error = (ratios.var() / num_samples + got.var() / len(got)).sqrt() + 1e-12
    assert (got.mean() - ratios.mean()).abs() < 5 * error


# The objective.


def net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def conv():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3, groups=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double()


MODELS = {"mlp": (net, (3,)), "convolution": (conv, (1, 6, 6))}
each_model = pytest.mark.parametrize("model", MODELS)


def made(model, num_rows=5):
    make, shape = MODELS[model]
    fn, params = fb.make_functional(make())
    return fn, params, (randn(num_rows, *shape, seed=1), randn(num_rows, 2, seed=2))


@pytest.mark.parametrize("chunk_size", [None, 8, 6])
@pytest.mark.parametrize("room", [1, 3, 5])
def test_draws_that_memory_is_not_enough_for_are_taken_in_halves(room, chunk_size):
    sizes, memory = [], [room]

    def fn(params, x):
        whole = physical(params["w"])
        sizes.append(len(whole) if whole.ndim == 3 else 1)
        if sizes[-1] > memory[0]:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 8.00 GiB")
        return F.linear(x, params["w"])

    state = requiring_grad(vi.init({"w": randn(2, 3)}, "diag", 0.1))
    batch, options = (randn(5, 3), randn(5, 2)), {"num_data": 40, "num_samples": 8, "seed": 3}

    def found(chunk_size):
        loss = vi.negative_elbo(fn, None, state, batch, NORMAL, chunk_size=chunk_size, **options)
        return loss, gradient(loss, state)

    expected = found(1)
    for is_known in (False, True):
        sizes.clear()
        optree.tree_map(torch.testing.assert_close, found(chunk_size), expected)
        assert (max(sizes) > room) != is_known
    # That is all that was learned: nothing stands in the way of the batching rules.
    plans = [plan for plans in _mapping._plans._values.values() for plan in plans.values()]
    assert not any(plan.is_plain for plan in plans if plan.most is not None)
    memory[0] = 0
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        found(chunk_size)


@each_model
@each_family
@pytest.mark.parametrize("estimator", ["reparam", "stl"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_the_objective_is_a_loop_over_draws_in_the_notation_of_the_paper(
    model, family, estimator, chunk_size
):
    fn, params, (x, y) = made(model)
    state = vi.init(params, family, 0.1, rank=2)
    got = vi.negative_elbo(
        *(fn, None, state, (x, y), NORMAL),
        prior_precision=2.0,
        num_data=40,
        num_samples=5,
        seed=3,
        estimator=estimator,
        chunk_size=chunk_size,
    )
    draws = state.draws(torch.arange(5), 3)
    prior = fb.priors.Normal(precision=2.0)
    nll, log_ratio = [], []
    for s in range(5):
        theta = {name: leaf[s] for name, leaf in draws.items()}
        residual = fn(theta, x) - y
        nll.append((0.5 * residual**2 / 0.25 + math.log(0.5 * math.sqrt(2 * math.pi))).sum() / 5)
        log_ratio.append(state.log_prob(theta) - prior.log_prob(theta))
    zero = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    half = {name: torch.full_like(leaf, 0.5) for name, leaf in params.items()}
    kl = fb.kl(vi.posterior(state), fb.Gaussian(zero, Diagonal(half)))
    divergence = torch.stack(log_ratio).mean() if estimator == "stl" else kl
    torch.testing.assert_close(got, 40 * torch.stack(nll).mean() + divergence)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_batch_or_ten_have_the_same_expected_objective(estimator):
    fn, params, (x, y) = made("mlp", 20)
    state = vi.init(params, init_scale=0.2)
    find = functools.partial(
        vi.negative_elbo,
        fn,
        None,
        state,
        likelihood=NORMAL,
        num_data=20,
        num_samples=1000,
        estimator=estimator,
    )
    whole = find(batch=(x, y), seed=0)
    parts = torch.stack([find(batch=pair, seed=0) for pair in zip(x.split(2), y.split(2), strict=True)])
    if estimator in ("reparam", "stl"):  # the same draws for all rows
        torch.testing.assert_close(parts.mean(), whole)
    else:
        several = torch.stack(
            [
                vi.negative_elbo(
                    fn,
                    None,
                    state,
                    (x, y),
                    NORMAL,
                    num_data=20,
                    num_samples=100,
                    estimator=estimator,
                    seed=1 + k,
                )
                for k in range(20)
            ]
        )
        error = several.std() / 10**0.5  # of a mean over ten times as many draws
        assert (parts.mean() - whole).abs() < 5 * error


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_weight_of_the_kl_is_its_factor(estimator, weight):
    fn, params, batch = made("mlp")
    state = vi.init(params, init_scale=0.2)
    find = functools.partial(
        vi.negative_elbo,
        fn,
        None,
        state,
        batch,
        NORMAL,
        num_data=5,
        seed=0,
        estimator=estimator,
        num_samples=3,
    )
    one, other, got = find(kl_weight=1.0), find(kl_weight=2.0), find(kl_weight=weight)
    torch.testing.assert_close(got, one + (weight - 1) * (other - one))


# Estimators of the gradient.


def exact_objective(fn, state, x, y, num_data, noise_std, precision):
    """The negative ELBO of a model linear in its parameters: ``J S J^T`` is the spread of its outputs."""
    jacobian = torch.func.jacrev(fn)(state.detached().mean, x)  # anywhere
    size = sum(leaf.numel() for leaf in state.mean.values())
    rows = torch.cat([jacobian[k].flatten(y.ndim).flatten(0, y.ndim - 1) for k in sorted(jacobian)], 1)
    covariance = state.scale().operator().times(torch.eye(size, dtype=F64))
    spread = ((rows @ covariance) * rows).sum(1).reshape(y.shape)
    terms = 0.5 * ((y - fn(state.mean, x)) ** 2 + spread) / noise_std**2
    nll = (terms + math.log(noise_std * math.sqrt(2 * math.pi))).flatten(1).sum(1).mean()
    mean = torch.cat([state.mean[k].reshape(-1) for k in sorted(state.mean)])
    square = precision * (mean**2 + covariance.diagonal()) - math.log(precision) + math.log(2 * math.pi)
    return num_data * nll + 0.5 * square.sum() - state.entropy()


EXACT = {
    "linear": (lambda: nn.Linear(3, 2), (3,), (2,)),
    "convolution": (lambda: nn.Conv2d(1, 2, 2), (1, 3, 3), (2, 2, 2)),
}


def gradients_over_seeds(find, state, seeds):
    return torch.stack([vector(gradient(find(seed=seed), state)) for seed in seeds])


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(
    ("family", "estimator"),
    [
        *itertools.product(["diag"], ESTIMATORS),
        ("full", "reparam"),
        ("full", "stl"),
        ("kron", "stl"),
        ("low_rank", "stl"),
    ],
)
def test_gradients_are_those_of_the_exact_objective_in_expectation(name, family, estimator):
    make, shape, out = EXACT[name]
    fn, params = fb.make_functional(make().double())
    x, y = randn(6, *shape, seed=1), randn(6, *out, seed=2)
    state = requiring_grad(some_state(family, shapes={k: tuple(v.shape) for k, v in params.items()}))
    find = functools.partial(
        *(vi.negative_elbo, fn, None, state, (x, y), NORMAL),
        prior_precision=1.5,
        num_data=30,
        num_samples=50,
        estimator=estimator,
    )
    got = gradients_over_seeds(find, state, range(30))
    expected = vector(gradient(exact_objective(fn, state, x, y, 30, 0.5, 1.5), state))
    sem = got.std(0) / len(got) ** 0.5
    assert ((got.mean(0) - expected).abs() <= 5 * sem + 1e-9).all()


# (Local noise of a convolution whose positions are mixed later is that of another q.)
@pytest.mark.parametrize(
    ("model", "estimator"), [("mlp", "flipout"), ("mlp", "local"), ("convolution", "flipout")]
)
def test_flipout_and_local_noise_agree_with_drawn_weights_in_deep_models(model, estimator):
    fn, params, batch = made(model)
    state = requiring_grad(vi.init(params, init_scale=0.2))
    find = functools.partial(vi.negative_elbo, fn, None, state, batch, NORMAL, num_data=5, num_samples=100)
    one, other = (
        gradients_over_seeds(functools.partial(find, estimator=name), state, range(start, start + 30))
        for name, start in (("reparam", 0), (estimator, 1000))
    )
    sem = ((one.var(0) + other.var(0)) / len(one)).sqrt()
    assert ((one.mean(0) - other.mean(0)).abs() <= 5 * sem + 1e-9).all()


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x):
        query, key, value = self.inner(x).unsqueeze(1).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(query, key, value).squeeze(1).mean(1))


@pytest.mark.parametrize("estimator", ["reparam", "local"])
def test_attention_is_mapped_by_rules_whatever_is_drawn(estimator, recwarn):
    """``vmap`` alone would loop over the draws inside of attention, and say so."""
    fn, params = fb.make_functional(Attending().double())
    state = requiring_grad(vi.init(params, init_scale=0.1))
    batch, leaves = (randn(5, 3, 4), randn(5, 2, seed=1)), optree.tree_leaves(state)
    find = functools.partial(
        vi.negative_elbo, fn, None, state, batch, NORMAL, num_data=5, num_samples=4, seed=0
    )
    together, alone = (
        torch.autograd.grad(find(estimator=estimator, chunk_size=size), leaves) for size in (None, 1)
    )
    torch.testing.assert_close(together, alone)
    assert not [w for w in recwarn if "performance drop" in str(w.message)]


@pytest.mark.parametrize("estimator", ["flipout", "local"])
def test_noise_within_a_batch_is_less_where_rows_have_their_own(estimator):
    fn, params, batch = made("mlp", 64)
    state = requiring_grad(vi.init(params, init_scale=0.2))
    find = functools.partial(vi.negative_elbo, fn, None, state, batch, NORMAL, num_data=64)
    variances = {
        name: gradients_over_seeds(functools.partial(find, estimator=name), state, range(50)).var(0).sum()
        for name in ("reparam", estimator)
    }
    assert variances[estimator] < 0.5 * variances["reparam"]


@each_family
def test_sticking_the_landing_has_no_variance_where_q_is_the_posterior(family):
    state = requiring_grad(some_state(family))
    target = fb.Gaussian(
        *(lambda q: (q.mean, q.covariance))(vi.posterior(state))
    )  # nothing is learned from data
    for seed in range(3):
        stuck = gradient(without_data(state, target, seed=seed, num_samples=2, estimator="stl"), state)
        assert vector(stuck).abs().max() < 1e-7


def raw(scale):
    """What softplus, and a triangular root, make this of."""
    return torch.expm1(scale).log()


def triangular_raw(root):
    return root.tril(-1) + torch.diag(raw(root.diagonal()))


def state_at_the_posterior(family):
    """A linear model with two outputs and noise 0.5, and the state that is its exact posterior."""
    x, y = randn(12, 3, seed=1), randn(12, 2, seed=2)
    if family == "diag":  # of orthogonal inputs nothing is correlated
        x = torch.linalg.qr(x)[0] * torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    covariance = torch.linalg.inv(x.mT @ x / 0.25 + 2.0 * torch.eye(3, dtype=F64))  # of each output
    mean = {"w": (covariance @ x.mT @ y / 0.25).mT}  # (2, 3)
    if family == "diag":
        state = vi.MeanFieldState(mean, {"w": raw(covariance.diagonal().sqrt()).expand(2, 3)})
    elif family == "low_rank":
        least = 0.5 * torch.linalg.eigvalsh(covariance).min()
        part = torch.linalg.cholesky(covariance - least * torch.eye(3, dtype=F64))
        factors = torch.block_diag(part, part).reshape(2, 3, 6)
        state = vi.LowRankState(mean, {"w": raw(least.sqrt()).expand(2, 3)}, {"w": factors})
    else:
        root = torch.linalg.cholesky(covariance)
        if family == "kron":
            identity = triangular_raw(torch.eye(2, dtype=F64))
            state = vi.MatrixNormalState(mean, {"w": identity}, {"w": triangular_raw(root)})
        else:
            state = vi.FullRankState(mean, triangular_raw(torch.block_diag(root, root)))
    return (lambda params, x: x @ params["w"].mT), (x, y), requiring_grad(state)


@each_family
def test_sticking_the_landing_has_no_variance_at_an_exact_posterior_of_a_regression(family):
    fn, batch, state = state_at_the_posterior(family)
    find = functools.partial(vi.negative_elbo, fn, None, state, batch, NORMAL, prior_precision=2.0)
    find = functools.partial(find, num_data=12)
    for seed in range(3):
        assert vector(gradient(find(seed=seed, estimator="stl"), state)).abs().max() < 1e-8
    noisy = gradients_over_seeds(find, state, range(3))
    assert noisy.abs().max() > 1e-2  # as the plain estimator is


@each_model
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_objective_is_a_function_that_transforms_take(model, estimator):
    fn, params, batch = made(model)  # whose layers are seen inside a transform first
    state = vi.init(params, init_scale=0.2)

    def loss(state, seed):
        options = {"num_data": 5, "num_samples": 3, "seed": seed, "estimator": estimator}
        return vi.negative_elbo(fn, None, state, batch, NORMAL, **options)

    got = vector(torch.func.grad(loss)(state, 0))
    live = requiring_grad(state)
    torch.testing.assert_close(got, vector(gradient(loss(live, 0), live)))
    expected = torch.stack([loss(state, seed) for seed in range(3)])
    torch.testing.assert_close(vmap(loss, (None, 0))(state, torch.arange(3)), expected)


def test_only_leaves_of_one_layer_are_left_to_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.tied, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            x = torch.tanh(self.tied(torch.tanh(self.tied(self.first(x))))) * self.scale
            return self.last(x) + (x @ self.last.weight.T)

    fn, params = fb.make_functional(Net().double())
    found = leaves_of_layers(fn, params, list(params), randn(4, 3), rows_first=False)
    assert found == {"first.weight", "first.bias", "last.bias"}


def test_tokens_of_a_row_share_the_signs_of_flipout():
    fn, params = fb.make_functional(nn.Linear(3, 2).double())
    x = randn(4, 1, 3).expand(4, 5, 3)  # five equal tokens
    seen = []

    def watched(params, x):
        seen.append(fn(params, x))
        return seen[-1].flatten(1)

    state = vi.init(params, init_scale=1.0)
    vi.negative_elbo(watched, None, state, (x, randn(4, 10)), NORMAL, num_data=4, seed=0, estimator="flipout")
    outputs = seen[-1].detach()
    torch.testing.assert_close(outputs, outputs[:, :1].expand_as(outputs))
    assert not torch.allclose(outputs[0] - fn(params, x)[0], outputs[1] - fn(params, x)[1])


class Peculiar(nn.Module):
    """A network whose layers run otherwise than they do for a row or two in evaluation mode."""

    def __init__(self, how):
        super().__init__()
        self.how, self.body, self.head = how, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.how == "chunks" and len(x) > 2:  # layers are called once for each part
            return torch.cat([self.head(torch.tanh(self.body(part))) for part in x.split(3)])
        if self.how == "twice" and len(x) > 2:
            return self.head(torch.tanh(self.body(x))) + self.head(torch.sin(self.body(x)))
        if self.how == "by hand" and len(x) > 2:
            return torch.tanh(x @ self.body.weight.T + self.body.bias) @ self.head.weight.T + self.head.bias
        if self.how == "fixed rows" and len(x) < 3:
            return x.view(3, -1)
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.parametrize("estimator", ["flipout", "local"])
@pytest.mark.parametrize("how", ["chunks", "twice", "by hand", "fixed rows"])
def test_layers_that_do_not_run_as_with_a_row_are_drawn(how, estimator):
    fn, params = fb.make_functional(Peculiar(how).double())
    state = requiring_grad(vi.init(params, init_scale=0.3))
    batch = randn(6, 3), randn(6, 2, seed=1)
    find = functools.partial(vi.negative_elbo, fn, None, state, batch, NORMAL, num_data=6, seed=4)
    for num_samples in (1, 3):
        drawn, other = (find(num_samples=num_samples, estimator=name) for name in ("reparam", estimator))
        torch.testing.assert_close(other, drawn)  # the same draws, for all leaves
        torch.testing.assert_close(vector(gradient(other, state)), vector(gradient(drawn, state)))


@pytest.mark.parametrize("estimator", ["flipout", "local"])
def test_leaves_with_another_use_in_training_are_drawn_when_fitted(estimator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            out = self.head(torch.tanh(self.body(x)))
            return out + x @ self.body.weight[:2].T if self.training else out

    fn, params = fb.make_functional(Net().double())
    start = vi.init(params, where="body.weight", init_scale=0.3)
    options = {**SHORT, "optimizer": functools.partial(torch.optim.SGD, lr=1e-3), "start": start}
    batch = randn(24, 3), randn(24, 2, seed=1)
    one, other = (
        vi.fit(fn, params, batch, NORMAL, estimator=name, **options) for name in ("reparam", estimator)
    )
    torch.testing.assert_close(one.mean["body.weight"], other.mean["body.weight"])
    torch.testing.assert_close(one.variance["body.weight"], other.variance["body.weight"])


def test_the_data_term_of_half_precision_is_summed_in_single():
    params = {"w": torch.zeros(2, 3, dtype=torch.bfloat16)}
    state = vi.init(params, init_scale=1e-4)
    x, y = torch.ones(7, 3, dtype=torch.bfloat16), 1 + torch.arange(14).reshape(7, 2).bfloat16() / 10
    find = functools.partial(vi.negative_elbo, lambda p, x: x @ p["w"].mT, None, state, (x, y), NORMAL)
    got = find(num_data=10_000, seed=0, kl_weight=0.0)
    terms = NORMAL.log_prob(torch.zeros_like(y), y)  # each of them rounded, as the model's numbers are
    torch.testing.assert_close(got.double(), -10_000 * terms.double().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_noise_of_half_precision_has_finite_gradients(dtype):
    fn, params = fb.make_functional(nn.Linear(3, 2).to(dtype))
    state = requiring_grad(vi.init(params, init_scale=1e-4))  # its square is no number of float16
    batch = torch.ones(4, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    loss = vi.negative_elbo(fn, None, state, batch, NORMAL, num_data=4, seed=0, estimator="local")
    assert vector(gradient(loss, state)).isfinite().all()


# Fits.


def regression():
    """A linear regression and its exact posterior, for leaves ``bias``, ``weight``."""
    fn, params = fb.make_functional(nn.Linear(3, 1).double())
    x = randn(30, 3, seed=1) @ (torch.eye(3, dtype=F64) + 0.4 * randn(3, 3, seed=4))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64) + 0.3 + 0.5 * randn(30, 1, seed=2)
    design = torch.cat([torch.ones(30, 1, dtype=F64), x], 1)
    precision = design.mT @ design / 0.25 + 2.0 * torch.eye(4, dtype=F64)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ design.mT @ y.squeeze(1) / 0.25
    return fn, params, x, y, mean, covariance


def log_evidence(x, y):
    design = torch.cat([torch.ones(len(x), 1, dtype=F64), x], 1)
    cov = 0.25 * torch.eye(len(x), dtype=F64) + design @ design.mT / 2.0
    return MultivariateNormal(torch.zeros(len(x), dtype=F64), cov).log_prob(y.squeeze(1))


REGRESSION = dict(prior_precision=2.0, seed=0, init_scale=0.1)
DECAY = dict(
    optimizer=functools.partial(torch.optim.Adam, lr=0.05),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600),
    num_epochs=600,
)


def test_full_rank_converges_to_the_exact_posterior_and_the_evidence():
    fn, params, x, y, mean, covariance = regression()
    q = vi.fit(
        fn, params, (x, y), NORMAL, family="full", estimator="stl", num_samples=4, **DECAY, **REGRESSION
    )
    order = {"bias": (1,), "weight": (1, 3)}
    torch.testing.assert_close(flat(q.mean, order), mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(q.covariance.to_dense(), covariance, rtol=1e-2, atol=1e-5)
    state = vi.init(q.mean, "full")
    raw = torch.linalg.cholesky(q.covariance.to_dense())
    state = vi.FullRankState(q.mean, raw.tril(-1) + torch.diag(torch.expm1(raw.diagonal()).log()))
    elbo = -vi.negative_elbo(
        fn,
        None,
        state,
        (x, y),
        NORMAL,
        prior_precision=2.0,
        num_data=30,
        seed=1,
        estimator="stl",
        num_samples=100,
    )
    torch.testing.assert_close(elbo, log_evidence(x, y), rtol=0, atol=1e-3)


def test_mean_field_converges_to_its_known_optimum():
    # The mean of the posterior, and one over the diagonal of its precision (Bishop 2006, section 10.1.2).
    fn, params, x, y, mean, covariance = regression()
    q = vi.fit(fn, params, (x, y), NORMAL, estimator="local", num_samples=64, **DECAY, **REGRESSION)
    order = {"bias": (1,), "weight": (1, 3)}
    torch.testing.assert_close(flat(q.mean, order), mean, rtol=0, atol=5e-3)
    expected = 1 / torch.linalg.inv(covariance).diagonal()
    torch.testing.assert_close(flat(q.variance, order), expected, rtol=3e-2, atol=0)


def small_net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def data(num_rows=24):
    return randn(num_rows, 3, seed=1).float(), randn(num_rows, 2, seed=2).float()


ADAM = functools.partial(torch.optim.Adam, lr=0.01)
SHORT = dict(optimizer=ADAM, num_epochs=2, batch_size=8, seed=0)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize(
    ("family", "estimator"), [*itertools.product(["diag"], ESTIMATORS), *((f, "stl") for f in FAMILIES[1:])]
)
def test_several_networks_are_fitted_as_if_each_were_alone(family, estimator, num_samples):
    fn, members = fb.ensemble.init(small_net, 3, seed=0)
    members = {k: v + 0.1 * randn(*v.shape, seed=5).float() for k, v in members.items()}
    # Steps far below the scale: beyond, triangular roots become so ill-conditioned that rounding decides.
    slow = functools.partial(torch.optim.Adam, lr=1e-3)
    options = dict(SHORT, family=family, estimator=estimator, num_samples=num_samples, rank=2, optimizer=slow)
    together = vi.fit(fn, members, data(), NORMAL, stacked=True, **options)
    for k, seed in enumerate(member_seeds(0, 3)):
        alone = vi.fit(fn, {n: v[k] for n, v in members.items()}, data(), NORMAL, **{**options, "seed": seed})
        for a, b in zip(optree.tree_leaves(alone.mean), optree.tree_leaves(together.mean), strict=True):
            torch.testing.assert_close(b[k], a, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            vector(alone.variance),
            vector({n: v.variance for n, v in {"q": entry(together, k)}.items()}),
            rtol=1e-3,
            atol=1e-8,
        )
    mixed = fb.mixture(together, stacked=True)
    assert fb.predict(fn, None, mixed, data()[0], num_samples=6, seed=0).samples.shape == (6, 24, 2)


def entry(tree, k):
    return optree.tree_map(lambda t: t[k], tree)


def test_a_fit_is_steps_of_the_optimizer_on_the_objective_over_the_data():
    fn, params = fb.make_functional(small_net())
    x, y = data()
    q = vi.fit(fn, params, (x, y), NORMAL, optimizer=ADAM, num_epochs=3, seed=4, num_samples=2)
    state = requiring_grad(vi.init(params))
    optimizer = ADAM(optree.tree_leaves(state))
    from funcbayes._random import fold

    for step in range(3):
        loss = vi.negative_elbo(
            fn, None, state, (x, y), NORMAL, num_data=24, num_samples=2, seed=fold(fold(4, "dropout"), step)
        )
        optimizer.zero_grad()
        (loss / 24).backward()
        optimizer.step()
    for name in params:
        torch.testing.assert_close(q.mean[name], state.mean[name].detach())
        torch.testing.assert_close(q.variance[name], F.softplus(state.rho[name].detach()) ** 2)


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


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_models_with_batch_norm_dropout_embeddings_and_dict_inputs_are_fitted(estimator, num_samples):
    torch.manual_seed(0)
    module = WithBatchNorm()
    fn, params = fb.make_functional(module, call=call_with_keywords)
    x = {"image": randn(12, 1, 5, 5).float() + 3, "token": torch.arange(12) % 5}
    y = torch.arange(12) % 3
    likelihood = fb.likelihoods.Categorical()
    q = vi.fit(
        fn,
        params,
        (x, y),
        likelihood,
        estimator=estimator,
        num_samples=num_samples,
        optimizer=ADAM,
        num_epochs=3,
        batch_size=4,
        seed=0,
    )
    assert set(q.variance) == set(params)
    moved = q.mean["body.1.running_mean"].tensor
    assert moved.abs().max() > 0.01
    assert int(q.mean["body.1.num_batches_tracked"].tensor) == 9
    prediction = fb.predict(fn, None, q, x, likelihood=likelihood, num_samples=5, seed=0)
    assert torch.isfinite(prediction.mean).all()


def test_running_statistics_are_those_of_the_draws_on_average():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    fn, params = fb.make_functional(module)
    x, y = data(8)
    q = vi.fit(
        fn,
        params,
        (x, y),
        NORMAL,
        num_samples=3,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-9),
        num_epochs=1,
        seed=0,
        init_scale=0.5,
    )
    from funcbayes._random import fold

    draws = vi.init(params, init_scale=0.5).draws(torch.arange(3), fold(fold(0, "dropout"), 0))
    hidden = torch.stack([F.linear(x, draws["0.weight"][s], draws["0.bias"][s]) for s in range(3)])
    torch.testing.assert_close(
        q.mean["1.running_mean"].tensor, 0.1 * hidden.mean(1).mean(0), rtol=1e-4, atol=1e-5
    )


def test_only_chosen_leaves_are_uncertain_and_the_others_are_held():
    fn, params = fb.make_functional(small_net())
    q = vi.fit(fn, params, data(), NORMAL, where="2.*", **SHORT)
    assert set(q.mean) == {"2.weight", "2.bias"}
    whole = fb.predict(fn, params, q, data()[0], num_samples=3, seed=0)
    assert whole.samples.shape == (3, 24, 2)


@each_family
def test_any_tree_of_parameters_is_fitted(family):
    fn = lambda p, x: p[0]["gain"] * (x @ p[1][0].T + p[1][1])  # noqa: E731
    p = like(SHAPES)
    params = [{"gain": p["gain"].float()}, (p["w"].float(), p["b"].float())]
    q = vi.fit(fn, params, data(), NORMAL, family=family, rank=2, estimator="stl", **SHORT)
    assert fb.predict(fn, None, q, data()[0], num_samples=3, seed=0).samples.shape == (3, 24, 2)


def test_the_best_epoch_is_kept_by_the_elbo_over_all_data():
    fn, params = fb.make_functional(small_net())
    states = []
    fit = functools.partial(
        vi.fit,
        fn,
        params,
        data(),
        NORMAL,
        num_epochs=6,
        seed=0,
        num_samples=2,
        optimizer=functools.partial(torch.optim.Adam, lr=0.3),
    )
    q = fit(keep_best=True, callback=lambda epoch, elbo, state: states.append(state) and None)
    from funcbayes._random import fold

    elbos = [
        -float(
            vi.negative_elbo(fn, None, s, data(), NORMAL, num_data=24, num_samples=2, seed=fold(0, "elbo"))
        )
        for s in states
    ]
    best = states[max(range(6), key=elbos.__getitem__)]
    torch.testing.assert_close(q.mean["0.weight"], best.mean["0.weight"])


def test_each_of_several_networks_keeps_the_epoch_that_it_keeps_alone():
    fn, members = fb.ensemble.init(small_net, 6, seed=0)
    options = dict(SHORT, num_epochs=8, keep_best=True, optimizer=functools.partial(torch.optim.Adam, lr=0.3))
    several = [
        vi.fit(fn, members, data(), NORMAL, stacked=True, chunk_size=chunk_size, **options)
        for chunk_size in (None, 1)
    ]
    for k, seed in enumerate(member_seeds(SHORT["seed"], 6)):
        own = {name: leaf[k] for name, leaf in members.items()}
        alone = vi.fit(fn, own, data(), NORMAL, **{**options, "seed": seed})
        for together in several:
            for name, leaf in alone.mean.items():
                torch.testing.assert_close(together.mean[name][k], leaf, rtol=1e-4, atol=1e-5)


def test_factors_of_low_rank_begin_at_other_places_with_another_seed():
    fn, params = fb.make_functional(small_net())
    members = {name: torch.stack([leaf, leaf]) for name, leaf in params.items()}
    options = {**SHORT, "num_epochs": 1, "family": "low_rank", "rank": 2}
    still = {**options, "optimizer": functools.partial(torch.optim.SGD, lr=0.0)}
    q = vi.fit(fn, members, data(), NORMAL, stacked=True, **still)
    factors = torch.cat([leaf.flatten(1) for leaf in q.covariance.factors.values()], 1)
    assert not torch.allclose(factors[0], factors[1])


def test_callbacks_see_the_elbo_and_end_the_fit():
    fn, params = fb.make_functional(small_net())
    seen = []

    def callback(epoch, elbo, state):
        seen.append((epoch, elbo, vi.posterior(state)))
        return epoch == 1

    vi.fit(fn, params, data(), NORMAL, optimizer=ADAM, num_epochs=9, seed=0, callback=callback)
    assert [epoch for epoch, _, _ in seen] == [0, 1]
    from funcbayes._random import fold

    start = vi.init(params)
    first = vi.negative_elbo(fn, None, start, data(), NORMAL, num_data=24, seed=fold(fold(0, "dropout"), 0))
    assert seen[0][1] == pytest.approx(-float(first), rel=1e-5)


@pytest.mark.parametrize("kind", [numpy.float32, torch.tensor])
def test_weights_of_the_kl_may_be_any_number(kind):
    fn, params = fb.make_functional(small_net())
    expected = vi.fit(fn, params, data(), NORMAL, kl_weight=0.5, **SHORT).mean
    for weight in (kind(0.5), lambda step: kind(0.5)):
        found = vi.fit(fn, params, data(), NORMAL, kl_weight=weight, **SHORT).mean
        torch.testing.assert_close(found, expected)


def test_the_weight_of_the_kl_follows_its_schedule():
    fn, params = fb.make_functional(small_net())
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5

    q = vi.fit(fn, params, data(), NORMAL, kl_weight=schedule, **SHORT)
    assert sorted(set(asked)) == list(range(6))
    torch.testing.assert_close(q.mean, vi.fit(fn, params, data(), NORMAL, kl_weight=0.5, **SHORT).mean)


def test_moped_starts_at_the_trained_parameters_and_their_prior():
    params = like(SHAPES)
    state, prior = vi.moped(params, delta=0.2, prior_std=3.0)
    for name, theta in params.items():
        torch.testing.assert_close(state.mean[name], theta)
        torch.testing.assert_close(state.scale().std[name], 0.2 * theta.abs())
        torch.testing.assert_close(prior.mean[name], theta)
        torch.testing.assert_close(prior.variance[name], torch.full_like(theta, 9.0))
    fn, trained = fb.make_functional(small_net())
    start, prior = vi.moped(trained)
    q = vi.fit(
        fn,
        trained,
        data(),
        NORMAL,
        start=start,
        prior=prior,
        optimizer=functools.partial(torch.optim.SGD, lr=1e-12),
        num_epochs=1,
        seed=0,
    )
    torch.testing.assert_close(q.mean, trained)


def test_half_of_the_weight_in_each_batch_sums_to_one_an_epoch():
    schedule = vi.halving(5)
    weights = [schedule(step) for step in range(10)]
    assert sum(weights[:5]) == pytest.approx(5)
    assert weights[:5] == weights[5:]
    assert all(a == pytest.approx(2 * b) for a, b in itertools.pairwise(weights[:5]))


# What goes wrong.


def test_an_elbo_that_is_not_finite_stops_with_its_step_term_and_last_finite_state():
    fn, params = fb.make_functional(small_net())
    x, y = data()
    x[17] = 1e30
    with pytest.raises(vi.DivergedError, match=r"step 2: its log likelihood is (-inf|nan)") as caught:
        vi.fit(
            fn,
            params,
            [(x[:8], y[:8]), (x[8:16], y[8:16]), (1e30 * x[16:], y[16:])],
            NORMAL,
            optimizer=ADAM,
            num_epochs=2,
            seed=0,
            init_scale=1e5,
        )
    assert caught.value.step == 2
    assert caught.value.term == "log likelihood"
    reference = vi.fit(
        fn,
        params,
        [(x[:8], y[:8]), (x[8:16], y[8:16])],
        NORMAL,
        optimizer=ADAM,
        num_epochs=1,
        seed=0,
        init_scale=1e5,
        num_data=24,
    )
    del reference  # two steps on; the last state with a finite ELBO is one step on
    once = vi.fit(
        fn,
        params,
        [(x[:8], y[:8])],
        NORMAL,
        optimizer=ADAM,
        num_epochs=1,
        seed=0,
        init_scale=1e5,
        num_data=24,
    )
    torch.testing.assert_close(caught.value.state.mean, once.mean)


def test_a_step_to_infinity_stops_with_the_state_before_it():
    fn, params = fb.make_functional(small_net())
    options = {**SHORT, "num_epochs": 1, "optimizer": functools.partial(torch.optim.SGD, lr=math.inf)}
    start = vi.init(params)
    whole = {**options, "batch_size": None, "start": start}  # one step, after which no ELBO is found
    with pytest.raises(vi.DivergedError, match="The state in `vi.fit` is not finite in step 0") as caught:
        vi.fit(fn, params, data(), NORMAL, **whole)
    assert (caught.value.step, caught.value.term) == (0, "state")
    assert torch.equal(vector(caught.value.state), vector(start))


@each_family
def test_every_family_says_in_which_step_it_diverged(family):
    fn, params = fb.make_functional(small_net())
    options = {**SHORT, "optimizer": functools.partial(torch.optim.SGD, lr=1e20)}
    with pytest.raises(vi.DivergedError) as caught:
        vi.fit(fn, params, data(), NORMAL, family=family, rank=2, **options)
    assert vector(caught.value.state).isfinite().all()


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_divergence_names_the_network_and_travels_between_processes(chunk_size):
    fn, members = fb.ensemble.init(small_net, 3, seed=0)
    members["0.weight"][2] = 1e30  # whose square is no number of float32
    with pytest.raises(vi.DivergedError, match="ELBO of member 2 in") as caught:
        vi.fit(fn, members, data(), NORMAL, stacked=True, chunk_size=chunk_size, **SHORT)
    other = pickle.loads(pickle.dumps(caught.value))
    assert str(other) == str(caught.value)
    assert (other.step, other.term, other.state) == (0, "KL", None)


def test_an_infinite_kl_is_named():
    fn, params = fb.make_functional(small_net())
    sgd = functools.partial(torch.optim.SGD, lr=1e-3)
    with pytest.raises(vi.DivergedError, match="its KL is") as caught:
        vi.fit(
            fn,
            params,
            data(),
            NORMAL,
            prior=fb.priors.Normal(precision=1e38, mean=1e30),
            optimizer=sgd,
            num_epochs=1,
            seed=0,
        )
    assert (caught.value.step, caught.value.term, caught.value.state) == (0, "KL", None)


def test_nothing_is_changed_and_equal_calls_are_equal():
    fn, params = fb.make_functional(small_net())
    before, state = copy.deepcopy(params), vi.init(params)
    kept = copy.deepcopy(state.mean)
    rng = torch.get_rng_state()
    first, second = (vi.fit(fn, params, data(), NORMAL, **SHORT) for _ in range(2))
    elbos = [vi.negative_elbo(fn, None, state, data(), NORMAL, num_data=24, seed=0) for _ in range(2)]
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(params[k], before[k]) and torch.equal(state.mean[k], kept[k]) for k in params)
    assert all(torch.equal(first.mean[k], second.mean[k]) for k in params)
    assert torch.equal(*elbos)
    torch.manual_seed(3)
    a = vi.negative_elbo(fn, None, state, data(), NORMAL, num_data=24)
    torch.manual_seed(3)
    assert torch.equal(a, vi.negative_elbo(fn, None, state, data(), NORMAL, num_data=24))


def test_a_model_that_vmap_cannot_take_is_looped_over_with_one_warning():
    def fn(params, x):
        return x @ params["w"].T * (2.0 if float(params["w"].sum()) > 0 else 1.0)

    state = vi.init({"w": randn(2, 3)})
    find = functools.partial(
        vi.negative_elbo, fn, None, state, (randn(4, 3), randn(4, 2)), NORMAL, num_data=4
    )
    with pytest.warns(UserWarning, match="draws one by one"):
        first = find(num_samples=3, seed=0)
    assert torch.equal(first, find(num_samples=3, seed=0))


def test_a_state_is_saved_and_loaded(tmp_path):
    for family in FAMILIES:
        state = some_state(family)
        fb.save(state, tmp_path / family)
        assert torch.equal(vector(fb.load(tmp_path / family)), vector(state))


def linear_state():
    fn, params = fb.make_functional(nn.Linear(3, 2))
    return fn, params, vi.init(params)


def elbo_with(**options):
    fn, params, state = linear_state()
    options = {"num_data": 24, **options}
    fn, params, state = (options.pop(k, v) for k, v in (("fn", fn), ("params", params), ("state", state)))
    return vi.negative_elbo(
        fn, params, state, options.pop("batch", data()), options.pop("likelihood", NORMAL), **options
    )


def fit_with(**options):
    fn, params, _ = linear_state()
    options = {**SHORT, **options}
    return vi.fit(options.pop("fn", fn), params, options.pop("data", data()), NORMAL, **options)


BAD = {
    "family": (
        lambda: vi.init({"w": torch.ones(2)}, "dense"),
        ValueError,
        r"family=.* one of 'diag'.*'dense'",
    ),
    "scale": (lambda: vi.init({"w": torch.ones(2)}, init_scale=0.0), ValueError, r"init_scale=.* positive"),
    "scale's type": (lambda: vi.init({"w": torch.ones(2)}, init_scale="1"), TypeError, "should be a number"),
    "init of a module": (
        lambda: vi.init(nn.Linear(3, 2)),
        TypeError,
        "an nn.Module, Linear.*make_functional",
    ),
    "no leaf": (lambda: vi.init({"w": torch.ones(2)}, where="head"), ValueError, "where='head'"),
    "integers": (lambda: vi.init({"w": torch.arange(2)}), ValueError, "floating point, got none"),
    "rank": (
        lambda: vi.init({"w": torch.ones(2)}, "low_rank", rank=3),
        ValueError,
        "at most the number of par",
    ),
    "too full": (
        lambda: vi.init({"w": torch.ones(30000)}, "full"),
        ValueError,
        "30,000 times 30,000.*where=",
    ),
    "too long": (lambda: vi.init({"w": torch.ones(30000, 1)}, "kron"), ValueError, "30,000.*'w'"),
    "module": (lambda: elbo_with(fn=nn.Linear(3, 2)), TypeError, "make_functional"),
    "no state": (lambda: elbo_with(state={}), TypeError, r"vi\.init\(params\)"),
    "other state": (
        lambda: elbo_with(state=vi.init({"v": torch.ones(1)})),
        ValueError,
        "no parameter 'v'",
    ),
    "batch": (lambda: elbo_with(batch=data()[0]), TypeError, r"`\(x, y\)`"),
    "likelihood": (lambda: elbo_with(likelihood=None), TypeError, "likelihood="),
    "num_data": (lambda: elbo_with(num_data=23), ValueError, r"num_data=.* at least the 24 .* got 23"),
    "num_data's type": (lambda: elbo_with(num_data=24.0), TypeError, "num_data"),
    "num_samples": (lambda: elbo_with(num_samples=0), ValueError, "num_samples"),
    "estimator": (lambda: elbo_with(estimator="score"), ValueError, "one of 'reparam'"),
    "estimator's family": (
        lambda: elbo_with(state=vi.init(linear_state()[1], "full"), estimator="local"),
        ValueError,
        "family='diag'",
    ),
    "prior": (lambda: elbo_with(prior=1.0), TypeError, "funcbayes.priors"),
    "prior's leaves": (
        lambda: elbo_with(prior=fb.Gaussian({"v": torch.ones(1)}, Diagonal({"v": torch.ones(1)}))),
        ValueError,
        "restrict",
    ),
    "singular prior": (
        lambda: elbo_with(
            prior=(lambda p: fb.Gaussian(p, Diagonal(optree.tree_map(torch.zeros_like, p))))(
                linear_state()[1]
            )
        ),
        ValueError,
        "density",
    ),
    "prior precision": (
        lambda: elbo_with(prior_precision=-1.0),
        ValueError,
        r"`vi.negative_elbo\(prior_precision=...\)` should be positive",
    ),
    "prior and precision": (
        lambda: elbo_with(prior=fb.priors.Laplace(scale=1.0), prior_precision=2.0),
        ValueError,
        "stands in the place of `prior_precision`, got both",
    ),
    "posterior of none": (lambda: vi.posterior({}), TypeError, "should be given a state"),
    "fit's num_data": (lambda: fit_with(num_data=4), ValueError, r"num_data=.* at least the 8"),
    "fit's num_data and a later batch": (
        lambda: fit_with(data=[(data()[0][:4], data()[1][:4]), data()], batch_size=None, num_data=9),
        ValueError,
        r"num_data=.* at least the 24",
    ),
    "fit's number for a weight": (lambda: fit_with(kl_weight=-1.0), ValueError, "kl_weight=.*not negative"),
    "weight": (lambda: elbo_with(kl_weight=math.nan), ValueError, "kl_weight=.* finite .*nan"),
    "weight's type": (lambda: elbo_with(kl_weight="1"), TypeError, "kl_weight=.* a number, got str"),
    "no row": (lambda: elbo_with(batch=(randn(0, 3), randn(0, 2))), ValueError, "at least one row"),
    "callback": (lambda: fit_with(callback="yes"), TypeError, "callback=.* a function, got str"),
    "fit's weight": (lambda: fit_with(kl_weight=lambda step: -1.0), ValueError, "kl_weight"),
    "fit's start": (lambda: fit_with(start={}), TypeError, "start="),
    "start and family": (
        lambda: fit_with(start=linear_state()[2], family="full"),
        ValueError,
        "leave out `family`",
    ),
    "empty": (lambda: fit_with(data=[]), (ValueError, RuntimeError), "data"),
    "warm-up": (lambda: vi.linear_warmup(0), ValueError, "num_steps"),
    "warm-up's start": (lambda: vi.linear_warmup(3, 2.0), ValueError, "start"),
    "cycle": (lambda: vi.cyclical(4, 0.0), ValueError, "fraction"),
    "delta": (lambda: vi.moped({"w": torch.ones(2)}, 0.0), ValueError, "delta"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_num_data_is_required():
    fn, params, state = linear_state()
    with pytest.raises(TypeError, match="num_data"):
        vi.negative_elbo(fn, params, state, data(), NORMAL)
