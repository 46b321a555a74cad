import copy
import functools
import gc
import io
import math
import pickle
import re
import warnings

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes import priors, sgmcmc
from funcbayes.covariances import Dense, Diagonal
from funcbayes.ensemble import member_seeds
from funcbayes.io import load, save
from funcbayes.sgmcmc._adaptation import DualAveraging, Variances, windows

F64 = torch.float64
SHAPES = {"b": (2,), "gain": (), "w": (2, 3)}  # ranks 1, 0, 2, in the order of the paths
SIZES = [math.prod(shape) for shape in SHAPES.values()]
P = sum(SIZES)
NORMAL = fb.likelihoods.Normal(0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=seeded(seed), dtype=F64).to(dtype)


def random_params(seed=0, lead=(), dtype=F64):
    return unflat(randn(*lead, P, seed=seed, dtype=dtype))


def flat(tree):
    """Leaves (*k, *s) as (*k, P)."""
    lead = tree["gain"].shape
    return torch.cat([tree[k].reshape(*lead, -1) for k in SHAPES], -1)


def unflat(rows):
    """(*k, P) as leaves (*k, *s), each with memory of its own."""
    parts = rows.split(SIZES, -1)
    return {
        k: part.reshape((*rows.shape[:-1], *s)).clone()
        for (k, s), part in zip(SHAPES.items(), parts, strict=True)
    }


def tensors(tree):
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def copied(tree):
    return optree.tree_map(torch.clone, tree)


def assert_same(got, expected, **tolerance):
    assert optree.tree_structure(got) == optree.tree_structure(expected)
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def assert_equal(got, expected):
    assert_same(got, expected, rtol=0, atol=0)


def entry(tree, k):
    return optree.tree_map(lambda leaf: leaf[k], tree)


def stacked(trees):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


# A Gaussian with correlations and scales from 0.45 to 1.4, over leaves of several ranks.
_ROTATION = torch.linalg.qr(randn(P, P, seed=1)).Q
PRECISION = _ROTATION @ torch.diag(torch.linspace(0.5, 5, P, dtype=F64)) @ _ROTATION.T
PRECISION = (PRECISION + PRECISION.T) / 2
CENTER = randn(P, seed=2)


def gradients_of(params):
    """Of U = 1/2 (theta - CENTER)^T PRECISION (theta - CENTER), for any leading axes."""
    rows = flat(params).to(F64)
    return optree.tree_map(
        lambda g, leaf: g.to(leaf.dtype), unflat((rows - CENTER) @ PRECISION), {k: params[k] for k in SHAPES}
    )


# Every sampler, with constants and with schedules.
SAMPLERS = {
    "sgld": lambda: sgmcmc.sgld(0.1),
    "sgld_tempered": lambda: sgmcmc.sgld(0.1, temperature=0.3),
    "sgld_cyclical": lambda: sgmcmc.sgld(CYCLES, temperature=CYCLES.temperature),
    "psgld": lambda: sgmcmc.psgld(0.1, num_data=1),
    "psgld_polynomial": lambda: sgmcmc.psgld(sgmcmc.polynomial(0.1), num_data=2, decay=0.9, damping=0.1),
    "sghmc": lambda: sgmcmc.sghmc(0.05),
    "sghmc_estimate": lambda: sgmcmc.sghmc(0.05, friction=0.5, noise_estimate=0.1),
    "sghmc_cyclical": lambda: sgmcmc.sghmc(CYCLES, temperature=CYCLES.temperature),
}
CYCLES = sgmcmc.cyclical(0.1, num_cycles=2, num_steps=12, exploration=0.3)
all_samplers = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS.keys())


def steps(sampler, state, num):
    for _ in range(num):
        state = sampler.update(state, gradients_of(state.params))
    return state


def ran(make, num=5, seed=3, params=None):
    sampler = make()
    return steps(sampler, sampler.init(random_params() if params is None else params, seed), num)


# Stationary distributions ---------------------------------------------------------------------------


def lyapunov(step, noise):
    """Solve S = A S A^T + Q."""
    n = len(step)
    system = torch.eye(n * n, dtype=F64) - torch.kron(step, step)
    return torch.linalg.solve(system, noise.reshape(-1)).reshape(n, n)


def langevin(eps, temperature=1.0, scale=None):
    """A and Q of theta <- theta - eps / 2 G H theta + N(0, eps T G)."""
    scale = torch.ones(P, dtype=F64) if scale is None else scale
    eye = torch.eye(P, dtype=F64)
    return eye - eps / 2 * scale[:, None] * PRECISION, eps * temperature * torch.diag(scale)


def hamiltonian(eta, friction, temperature=1.0, noise_estimate=0.0, gradient_noise=0.0):
    """A and Q of (theta, r), Chen et al. (2014), equation 15."""
    eye, root = torch.eye(P, dtype=F64), eta**0.5
    to_r = torch.cat([-root * PRECISION, (1 - friction) * eye], 1)
    to_theta = torch.cat([eye, torch.zeros_like(eye)], 1) + root * to_r
    gain = torch.cat([root * eye, eye])
    variance = 2 * (friction * temperature - noise_estimate) + eta * gradient_noise
    return torch.cat([to_theta, to_r]), variance * gain @ gain.T


FROZEN = torch.linspace(0.5, 2.0, P, dtype=F64)  # of the preconditioner, if nothing changes it


def frozen_psgld(eps, temperature=1.0):
    """The sampler, and a state whose second moment has settled."""
    sampler = sgmcmc.psgld(eps, num_data=50, decay=1 - 1e-15, damping=1e-9, temperature=temperature)

    def begin(params):
        state = sampler.init(params, 5)
        moments = unflat((1 / FROZEN - 1e-9).square().expand(*params["gain"].shape, P))
        return type(state)(state.params, moments, state.step + (1 << 60), state.seed)

    return sampler, begin


def from_init(sampler):
    return sampler, lambda params: sampler.init(params, 5)


# name -> (sampler and how it begins, A and Q, steps after which it has forgotten its start)
LINEAR = {
    "sgld": (lambda: from_init(sgmcmc.sgld(0.4)), lambda: langevin(0.4), 100),
    "sgld_small": (lambda: from_init(sgmcmc.sgld(0.2)), lambda: langevin(0.2), 200),
    "sgld_cold": (lambda: from_init(sgmcmc.sgld(0.4, temperature=0.2)), lambda: langevin(0.4, 0.2), 100),
    "psgld": (lambda: frozen_psgld(0.4), lambda: langevin(0.4, scale=FROZEN), 150),
    "psgld_cold": (lambda: frozen_psgld(0.4, 0.2), lambda: langevin(0.4, 0.2, FROZEN), 150),
    "sghmc": (lambda: from_init(sgmcmc.sghmc(0.2, friction=0.3)), lambda: hamiltonian(0.2, 0.3), 100),
    "sghmc_all_friction": (
        lambda: from_init(sgmcmc.sghmc(0.2, friction=1.0)),
        lambda: hamiltonian(0.2, 1),
        100,
    ),
    "sghmc_little_friction": (lambda: from_init(sgmcmc.sghmc(0.1)), lambda: hamiltonian(0.1, 0.1), 250),
    "sghmc_cold": (
        lambda: from_init(sgmcmc.sghmc(0.2, friction=0.3, temperature=0.2)),
        lambda: hamiltonian(0.2, 0.3, 0.2),
        100,
    ),
    "sghmc_estimate": (
        lambda: from_init(sgmcmc.sghmc(0.2, friction=0.3, noise_estimate=0.1)),
        lambda: hamiltonian(0.2, 0.3, noise_estimate=0.1),
        100,
    ),
}


def assert_moments(rows, mean, covariance, bound=5.0):
    """Rows are independent draws of a Gaussian: its moments are theirs within ``bound`` standard errors."""
    n = len(rows)
    assert ((rows.mean(0) - mean).abs() < bound * (covariance.diagonal() / n).sqrt()).all()
    variances = torch.outer(covariance.diagonal(), covariance.diagonal()) + covariance**2
    assert ((rows.T.cov() - covariance).abs() < bound * (variances / n).sqrt()).all()


@pytest.mark.parametrize("name", LINEAR)
def test_the_stationary_distribution_is_that_of_the_discretised_dynamics(name):
    num = 3000
    make, make_recursion, num_steps = LINEAR[name]
    sampler, begin = make()
    step, noise = make_recursion()
    assert torch.linalg.matrix_power(step, num_steps).abs().max() < 1e-3
    # As one chain whose leaves have an axis of copies: they move by themselves, with noise of their own.
    state = begin(random_params(seed=4, lead=(num,)))
    state = steps(sampler, state, num_steps)
    assert_moments(flat(state.params), CENTER, lyapunov(step, noise)[:P, :P])


def test_momenta_have_the_stationary_distribution_of_the_discretised_dynamics():
    sampler = sgmcmc.sghmc(0.2, friction=0.3)
    state = steps(sampler, sampler.init(random_params(lead=(3000,)), 1), 100)
    assert_moments(flat(state.momentum), torch.zeros(P, dtype=F64), lyapunov(*hamiltonian(0.2, 0.3))[P:, P:])


@pytest.mark.parametrize("name", ["sgld", "sghmc"])
def test_stacked_chains_have_the_stationary_distribution(name):
    num = 500
    make, make_recursion, num_steps = LINEAR[name]
    sampler, _ = make()
    state = sampler.init(random_params(lead=(num,)), torch.arange(num))
    assert_moments(flat(steps(sampler, state, num_steps).params), CENTER, lyapunov(*make_recursion())[:P, :P])


@pytest.mark.parametrize("make", [langevin, functools.partial(langevin, scale=FROZEN)], ids=["sgld", "psgld"])
def test_the_bias_of_langevin_dynamics_is_of_first_order(make):
    target = torch.linalg.inv(PRECISION)
    errors = [(lyapunov(*make(eps)) - target).abs().max() for eps in (0.02, 0.01, 0.005)]
    assert errors[-1] < 0.01
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert 1.95 < larger / smaller < 2.05


@pytest.mark.parametrize("friction", [0.05, 0.5, 1.0])
def test_the_bias_of_hamiltonian_dynamics_is_what_the_docstring_says(friction):
    eta, heat = 0.1, 0.7
    values, vectors = torch.linalg.eigh(PRECISION)
    got = lyapunov(*hamiltonian(eta, friction, heat))[:P, :P]
    expected = vectors @ torch.diag(heat / values / (1 - eta * values / (4 - 2 * friction))) @ vectors.T
    torch.testing.assert_close(got, expected)
    momenta = vectors @ torch.diag(heat / (1 - friction / 2 - eta * values / 4)) @ vectors.T
    torch.testing.assert_close(lyapunov(*hamiltonian(eta, friction, heat))[P:, P:], momenta)
    values = heat / values / (1 - 0.2 * values / 4)
    torch.testing.assert_close(lyapunov(*langevin(0.2, heat)), vectors @ torch.diag(values) @ vectors.T)


def test_an_estimate_of_the_noise_of_gradients_takes_it_off():
    num, eta, friction = 3000, 0.2, 0.3
    spread = 0.8  # variance of the noise that gradients have
    sampler = sgmcmc.sghmc(eta, friction=friction, noise_estimate=eta * spread / 2)
    state = sampler.init(random_params(lead=(num,)), 1)
    for i in range(100):
        noise = unflat(spread**0.5 * randn(num, P, seed=100 + i))
        found = gradients_of(state.params)
        state = sampler.update(state, {k: g + noise[k] for k, g in found.items()})
    assert_moments(flat(state.params), CENTER, lyapunov(*hamiltonian(eta, friction))[:P, :P])


def test_numbers_may_be_scalar_tensors():
    assert_equal(ran(lambda: sgmcmc.sgld(torch.tensor(0.5))), ran(lambda: sgmcmc.sgld(0.5)))


def test_friction_one_is_langevin_dynamics_of_twice_the_step_size():
    a, b = ran(lambda: sgmcmc.sghmc(0.05, friction=1.0), 9), ran(lambda: sgmcmc.sgld(0.1), 9)
    assert_same(a.params, b.params)


def test_without_heat_samplers_descend():
    for sampler in (sgmcmc.sgld(0.2, temperature=0), sgmcmc.sghmc(0.2, friction=0.5, temperature=0.0)):
        state = steps(sampler, sampler.init(random_params(), 0), 600)
        torch.testing.assert_close(flat(state.params), CENTER)


def test_the_bias_of_a_changing_preconditioner_vanishes_with_its_decay():
    num, target = 1000, torch.linalg.inv(PRECISION)
    errors = []
    for decay in (0.5, 0.999):
        sampler = sgmcmc.psgld(0.05, num_data=1, decay=decay, damping=0.1)
        draws = flat(steps(sampler, sampler.init(random_params(lead=(num,)), 1), 400).params)
        errors.append((draws.T.cov().diagonal() / target.diagonal()).sub(1))
        # Wherever variances end, the mean is right, because the dynamics are the same on both sides of it.
        assert ((draws.mean(0) - CENTER).abs() < 5 * draws.std(0) / num**0.5).all()
    assert (errors[0] > 0.5).all()
    assert (errors[1].abs() < 0.1 + 5 * (2 / num) ** 0.5).all()


@pytest.mark.parametrize("num_data", [100, 10_000])
def test_parameters_that_data_say_nothing_of_keep_to_their_prior(num_data):
    """A leaf of prior N(0, 1) whose gradients are 0 at the start, beside one that the data are about."""
    num, furthest = 500, 0.0
    sampler = sgmcmc.psgld(0.1 / num_data, num_data=num_data)
    state = sampler.init({name: torch.zeros(num, dtype=F64) for name in ("unused", "used")}, 0)
    for i in range(1500):
        theta = state.params
        used = (num_data + 1) * theta["used"] + num_data * 0.2 * randn(num, seed=i)
        state = sampler.update(state, {"unused": theta["unused"], "used": used})
        furthest = max(furthest, state.params["unused"].std())
    # 1 / (1 - eps G / 4) is 1.03 for eps G = 0.1; without Gamma and with gradients of batches it is more.
    assert furthest < 1.4
    assert 0.8 < state.params["unused"].std() < 1.3


# Steps in the notation of the papers ------------------------------------------------------------------


def by_the_paper(make_noise, params, num, kind, size, heat):
    """theta_t in a loop over numbers; ``make_noise(t)`` is z of all parameters in a row."""
    theta = flat(params).tolist()
    r, v = [0.0] * P, [0.0] * P
    for t in range(num):
        z = make_noise(t).tolist()
        g = ((torch.tensor(theta, dtype=F64) - CENTER) @ PRECISION).tolist()
        eps, temperature = size(t), heat(t)
        for i in range(P):
            if kind == "sgld":
                theta[i] += -eps / 2 * g[i] + math.sqrt(eps * temperature) * z[i]
            elif kind == "psgld":
                v[i] = 0.9 * v[i] + 0.1 * (g[i] / 7) ** 2
                left = 0.9 ** (t + 1)
                scale = 1 / (0.1 + math.sqrt(v[i] / (1 - left) + left))
                theta[i] += -eps / 2 * scale * g[i] + math.sqrt(eps * temperature * scale) * z[i]
            else:
                r[i] = 0.7 * r[i] - math.sqrt(eps) * g[i]
                r[i] += math.sqrt(2 * (0.3 * temperature - 0.02)) * z[i]
                theta[i] += math.sqrt(eps) * r[i]
    return torch.tensor(theta, dtype=F64)


KINDS = {
    "sgld": sgmcmc.sgld,
    "psgld": functools.partial(sgmcmc.psgld, num_data=7, decay=0.9, damping=0.1),
    "sghmc": functools.partial(sgmcmc.sghmc, friction=0.3, noise_estimate=0.02),
}
SIZES_OVER_TIME = {
    "constant": (0.1, lambda t: 0.1),
    "polynomial": (sgmcmc.polynomial(0.2, 3.0, 0.6), lambda t: 0.2 * (3.0 + t) ** -0.6),
    "function": (lambda step: 0.1 / (1.0 + step.double()), lambda t: 0.1 / (1 + t)),
}
HEATS = {
    "one": (1.0, lambda t: 1.0),
    "falling": (lambda step: 0.5 + 1 / (1 + step.double()), lambda t: 0.5 + 1 / (1 + t)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES_OVER_TIME)
@pytest.mark.parametrize("heat", HEATS)
def test_steps_are_those_of_the_papers(kind, size, heat):
    num = 6
    sampler = KINDS[kind](SIZES_OVER_TIME[size][0], temperature=HEATS[heat][0])
    # What the noise is, is read off a chain whose every step is noise: theta_{t+1} - theta_t = z.
    pure = sgmcmc.sgld(1.0)
    state, zeros, noise = pure.init(random_params(), 3), random_params(), []
    zeros = {k: torch.zeros_like(leaf) for k, leaf in zeros.items()}
    for _ in range(num):
        after = pure.update(state, zeros)
        noise.append(flat(after.params) - flat(state.params))
        state = after
    expected = by_the_paper(
        noise.__getitem__, random_params(), num, kind, SIZES_OVER_TIME[size][1], HEATS[heat][1]
    )
    got = steps(sampler, sampler.init(random_params(), 3), num)
    torch.testing.assert_close(flat(got.params), expected, rtol=1e-10, atol=1e-10)


def test_noise_is_normal_and_differs_between_seeds_steps_and_leaves():
    sampler = sgmcmc.sgld(1.0)
    zeros = {"a": torch.zeros(500, dtype=F64), "b": torch.zeros(500, dtype=F64)}
    rows = []
    for seed in (0, 1):
        state = sampler.init(zeros, seed)
        for _ in range(2):
            after = sampler.update(state, zeros)
            rows += [after.params[k] - state.params[k] for k in zeros]
            state = after
    correlations = torch.stack(rows).corrcoef() - torch.eye(8)
    assert correlations.abs().max() < 5 / 500**0.5
    together = torch.cat(rows)
    assert abs(together.mean()) < 5 / 4000**0.5
    assert abs(together.var() - 1) < 5 * (2 / 4000) ** 0.5
    assert torch.special.ndtr(together).histc(10, 0, 1).sub(400).square().sum() / 400 < 40  # chi-square of 9


def falling_by_halves(step):
    """Of what plain Python can do with a number."""
    return 0.1 if step < 2 else 0.1 * math.pow(0.5, step // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_in_plain_python_are_looked_up_for_every_chain(kind):
    sampler = KINDS[kind](falling_by_halves, temperature=lambda step: 1.0 if step % 2 else 0.5)
    starts = random_params(lead=(3,))
    alone = [sampler.init(entry(starts, k), k) for k in range(3)]
    # Chains at several steps, one of which is where another will be.
    alone = stacked([steps(sampler, state, k) for k, state in enumerate(alone)])
    together, mapped = alone, alone
    for _ in range(4):
        together = sampler.update(together, gradients_of(together.params))
        mapped = vmap(sampler.update)(mapped, gradients_of(mapped.params))
    expected = [steps(sampler, sampler.init(entry(starts, k), k), 4 + k) for k in range(3)]
    assert_same(together, stacked(expected))
    assert_same(mapped, stacked(expected))
    sizes = [(0.1, 0.5), (0.1, 1.0), (0.05, 0.5), (0.05, 1.0), (0.025, 0.5)]
    state = sampler.init(entry(starts, 0), 0)
    for size, heat in sizes:
        state = KINDS[kind](size, temperature=heat).update(state, gradients_of(state.params))
    assert_same(state, steps(sampler, sampler.init(entry(starts, 0), 0), len(sizes)))


# What every sampler keeps to ---------------------------------------------------------------------------


@all_samplers
def test_states_are_new_and_nothing_else_changes(make):
    sampler = make()
    params = random_params()
    before, random_state = copied(params), torch.get_rng_state()
    first, again = sampler.init(params, 3), sampler.init(params, 3)
    seen = [params, first, again]
    kept = [copied(tree) for tree in seen]
    for _ in range(3):
        g = gradients_of(seen[-1].params)
        after = sampler.update(seen[-1], g)
        assert_equal(sampler.update(seen[-1], g), after)
        seen.append(after)
        kept.append(copied(after))
    for tree, copy_of_it in zip(seen, kept, strict=True):
        assert_equal(tree, copy_of_it)
    assert_equal(params, before)
    assert torch.equal(torch.get_rng_state(), random_state)
    places = [leaf.untyped_storage().data_ptr() for tree in seen for leaf in tensors(tree)]
    assert len(set(places)) == len(places)
    assert not any(leaf.requires_grad for tree in seen for leaf in tensors(tree))


@all_samplers
def test_stacked_and_mapped_chains_are_those_alone(make):
    num = 4
    sampler = make()
    params = random_params(lead=(num,))
    seeds = torch.tensor(member_seeds(1, num))
    alone = [ran(make, 5, seeds[k].item(), entry(params, k)) for k in range(num)]
    directly = steps(sampler, sampler.init(params, seeds), 5)
    mapped = vmap(sampler.init)(params, seeds)
    for _ in range(5):
        mapped = vmap(sampler.update)(mapped, gradients_of(mapped.params))
    for together in (directly, mapped, stacked(alone)):
        assert_same(together, stacked(alone))
    assert_same(directly, mapped)


@all_samplers
def test_chains_of_one_start_can_be_mapped_over_seeds(make):
    sampler, params = make(), random_params()
    seeds = torch.arange(3)
    got = vmap(lambda seed: sampler.update(sampler.init(params, seed), gradients_of(params)))(seeds)
    for k in range(3):
        assert_same(entry(got, k), ran(make, 1, k, params))


@all_samplers
def test_a_chain_goes_on_from_a_saved_state(make, tmp_path):
    sampler = make()
    state = ran(make, 4)
    save(state, tmp_path / "state.safetensors")
    stream = io.BytesIO()
    torch.save(tensors(state), stream)
    stream.seek(0)
    structure = optree.tree_structure(state)
    for again in (
        load(tmp_path / "state.safetensors"),
        structure.unflatten(torch.load(stream)),
        copy.deepcopy(state),
    ):
        assert_equal(steps(sampler, again, 3), ran(make, 7))


@all_samplers
def test_samplers_can_be_pickled(make):
    sampler = pickle.loads(pickle.dumps(make()))
    assert_equal(steps(sampler, sampler.init(random_params(), 3), 3), ran(make, 3))


@all_samplers
def test_seeds_are_numbers_or_tensors(make):
    assert_equal(ran(make, seed=7), ran(make, seed=torch.tensor(7)))
    assert_equal(ran(make, seed=-1), ran(make, seed=(1 << 64) - 1))
    state = make().init(random_params(), 7)
    assert state.seed.dtype == state.step.dtype == torch.int64
    assert state.seed.shape == state.step.shape == ()
    assert int(state.seed) == 7
    assert int(ran(make).step) == 5


@all_samplers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_are_in_at_least_single_precision(make, dtype):
    params = random_params(dtype=dtype)
    state = ran(make, 3, params=params)
    assert {leaf.dtype for leaf in tensors(state) if leaf.is_floating_point()} == {torch.float32}
    assert_equal(state, ran(make, 3, params=optree.tree_map(Tensor.float, params)))


@all_samplers
def test_leaves_of_several_dtypes_move(make):
    params = random_params()
    params["w"] = params["w"].float()
    state = ran(make, 3, params=params)
    assert state.params["w"].dtype == torch.float32
    assert state.params["b"].dtype == F64
    assert not torch.equal(state.params["w"], params["w"])


@all_samplers
def test_leaves_without_a_gradient_are_held(make):
    sampler = make()
    params = {
        **random_params(),
        "statistic": fb.Fixed(torch.ones(2)),
        "count": torch.tensor(3),
        "held": torch.ones(4),
    }
    state = sampler.init(params, 0)
    for _ in range(3):
        found = {**gradients_of(state.params), "statistic": fb.Fixed(torch.full((2,), 9.0))}
        state = sampler.update(state, found)
    assert_equal(state.params["statistic"], params["statistic"])
    assert_equal([state.params["count"], state.params["held"]], [params["count"], params["held"]])
    assert_same({k: state.params[k] for k in SHAPES}, ran(make, 3, 0).params)


@all_samplers
def test_parameters_in_any_container_move_alike(make):
    def nested(tree):
        return [{"w": tree["w"]}, (tree["b"], tree["gain"])]

    def plain(tree):
        return {"w": tree[0]["w"], "b": tree[1][0], "gain": tree[1][1]}

    sampler = make()
    state, again = sampler.init(nested(random_params()), 3), sampler.init(nested(random_params()), 3)
    before = plain(copied(state.params))
    state = sampler.update(state, nested(gradients_of(plain(state.params))))
    assert isinstance(state.params[1], tuple)
    assert all(
        not torch.equal(a, b) for a, b in zip(tensors(plain(state.params)), tensors(before), strict=True)
    )
    part = [{"w": gradients_of(plain(again.params))["w"]}, fb.MISSING]
    held = sampler.update(again, part)
    assert_equal(held.params[1], again.params[1])
    assert not torch.equal(held.params[0]["w"], again.params[0]["w"])


def test_states_show_shapes_and_not_numbers():
    assert "float64(2, 3)" in repr(ran(SAMPLERS["sghmc"]))


# Schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_cycles", "num_steps"), [(1, 7), (3, 12), (4, 10), (10, 10)])
@pytest.mark.parametrize("exploration", [0.0, 0.5])
def test_cyclical_is_equation_1_of_the_paper(num_cycles, num_steps, exploration):
    schedule = sgmcmc.cyclical(0.3, num_cycles, num_steps, exploration=exploration)
    length = math.ceil(num_steps / num_cycles)
    for k in range(1, num_steps + 1):
        place = (k - 1) % length / length
        expected = 0.3 / 2 * (math.cos(math.pi * place) + 1)
        assert schedule(k - 1) == pytest.approx(expected, abs=1e-15)
        assert schedule.temperature(k - 1) == float(place >= exploration)
    every = torch.arange(num_steps)
    for found, one in ((schedule(every), schedule), (schedule.temperature(every), schedule.temperature)):
        torch.testing.assert_close(found, torch.tensor([one(t) for t in range(num_steps)], dtype=F64))
        assert torch.equal(found, vmap(one)(every))


@pytest.mark.parametrize(
    ("num_cycles", "num_steps", "options", "expected"),
    [
        (2, 8, {}, [3, 7]),
        (2, 8, {"num_samples": 2}, [2, 3, 6, 7]),
        (2, 10, {"num_samples": 2, "spacing": 2}, [2, 4, 7, 9]),
        (2, 10, {"num_samples": 9, "exploration": 0.5}, [3, 4, 8, 9]),
        (4, 10, {}, [2, 5, 8, 9]),
        (4, 10, {"exploration": 0.5}, [2, 5, 8]),  # the last cycle has one step, which explores
    ],
)
def test_states_are_collected_at_the_end_of_cycles(num_cycles, num_steps, options, expected):
    schedule = sgmcmc.cyclical(0.1, num_cycles, num_steps, **options)
    assert [t for t in range(num_steps) if schedule.collect(t)] == expected


def test_polynomial_is_its_formula():
    schedule = sgmcmc.polynomial(0.3, 2.0, 0.7)
    every = torch.arange(5)
    expected = torch.tensor([0.3 * (2.0 + t) ** -0.7 for t in range(5)], dtype=F64)
    torch.testing.assert_close(schedule(every), expected)
    torch.testing.assert_close(vmap(schedule)(every), expected)
    assert schedule(3) == pytest.approx(expected[3].item())


# The potential ----------------------------------------------------------------------------------------


def linear(params, x):
    return params["gain"] * (x @ params["w"].T) + params["b"]


def rows(n=20, seed=7):
    return randn(n, 3, seed=seed), randn(n, 2, seed=seed + 1)


def pieces(data, size):
    return [(data[0][i : i + size], data[1][i : i + size]) for i in range(0, len(data[1]), size)]


def gaussian(params, structure="diagonal"):
    mean = optree.tree_map(lambda leaf: 0.3 + 0 * leaf, params)
    if structure == "diagonal":
        return fb.Gaussian(mean, Diagonal(optree.tree_map(lambda leaf: leaf**2 + 0.5, params)))
    factors = {k: randn(*leaf.shape, P, seed=i) for i, (k, leaf) in enumerate(params.items())}
    return fb.Gaussian(mean, Dense(factors))


class Cauchy:
    """A prior of the user's."""

    def log_prob(self, params):
        return sum(torch.distributions.Cauchy(0.0, 1.0).log_prob(leaf).sum() for leaf in params.values())


PRIORS = {
    "normal": lambda p: priors.Normal(precision=2.0),
    "normal_by_leaf": lambda p: priors.Normal(precision={"w": 1.0, "b": 2.0, "gain": 3.0}, mean=0.5),
    "laplace": lambda p: priors.Laplace(scale=0.7),
    "diagonal": gaussian,
    "dense": lambda p: gaussian(p, "dense"),
    "own": lambda p: Cauchy(),
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_potential_is_summed_over_the_data(name):
    params, (x, y) = random_params(), rows()
    prior = PRIORS[name](params)
    energy = sgmcmc.potential(linear, NORMAL, prior, 20)
    expected = -prior.log_prob(params)
    for a, b in zip(x, y, strict=True):
        expected = expected - NORMAL.log_prob(linear(params, a[None]), b[None]).sum()
    torch.testing.assert_close(energy(params, (x, y)), expected)
    assert energy(params, (x, y)).shape == ()


@pytest.mark.parametrize("name", PRIORS)
def test_batches_say_on_average_what_all_rows_say(name):
    params, data = random_params(), rows()
    energy = sgmcmc.potential(linear, NORMAL, PRIORS[name](params), 20)
    expected = grad(energy)(params, data)
    found = [grad(energy)(params, batch) for batch in pieces(data, 2)]
    assert len(found) == 10
    assert_same(optree.tree_map(lambda leaf: leaf.mean(0), stacked(found)), expected)


def test_potentials_can_be_mapped_and_pickled():
    data, params = rows(), random_params(lead=(3,))
    energy = pickle.loads(pickle.dumps(sgmcmc.potential(linear, NORMAL, priors.Normal(), 50)))
    got = vmap(grad(energy), in_dims=(0, None))(params, data)
    assert_same(entry(got, 1), grad(energy)(entry(params, 1), data))


def test_potentials_take_inputs_of_any_kind_and_pass_fixed_leaves_by():
    def fn(params, x):
        return linear(params, x["a"]) + params["shift"].tensor

    params = {**random_params(), "shift": fb.Fixed(torch.ones((), dtype=F64))}
    x, y = rows()
    energy = sgmcmc.potential(fn, NORMAL, priors.Normal(), 20)
    plain = sgmcmc.potential(linear, NORMAL, priors.Normal(), 20)
    torch.testing.assert_close(energy(params, ({"a": x}, y)), plain(random_params(), (x, y - 1)))
    sampler = sgmcmc.sgld(0.01)
    state = sampler.init(params, 0)
    state = sampler.update(state, grad(energy)(state.params, ({"a": x}, y)))
    assert_equal(state.params["shift"], params["shift"])


# Runs -------------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(5, 2)

    def forward(self, image, extra):
        features = self.norm(self.conv(image)).relu().mean((-1, -2))
        return self.head(torch.cat([features, extra], -1))


class Branching(nn.Module):
    """``vmap`` cannot look at numbers."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.body(x)
        return self.head(torch.tanh(hidden) if float(hidden.detach().sum()) > -99.0 else hidden)


def mlp():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))


def unpack(module, x):
    return module(**x)


MODELS = {
    "mlp": (mlp, None, lambda n: randn(n, 3)),
    "conv_dict": (ConvNet, unpack, lambda n: {"image": randn(n, 1, 5, 5), "extra": randn(n, 2, seed=1)}),
}
CATEGORICAL = fb.likelihoods.Categorical()


def model(name, num=None):
    """``fn``, params of one network or of several, and data of 13 rows."""
    make, call, inputs = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = [make().double() for _ in range(num or 1)]
    fn, _ = fb.make_functional(modules[0], call=call)
    many = [fb.make_functional(module, call=call)[1] for module in modules]
    return fn, stacked(many) if num else many[0], (inputs(13), torch.randint(2, (13,), generator=seeded(5)))


def run(fn, params, data, *, sampler=None, likelihood=CATEGORICAL, **options):
    options = {"num_steps": 6, "seed": 3, **options}
    return sgmcmc.run(fn, params, data, likelihood, sampler=sampler or sgmcmc.sgld(1e-2), **options)


def by_hand(fn, params, batches, num_data, *, sampler, num_steps, seed, prior, likelihood=CATEGORICAL):
    """States in a loop with nothing but the public functions."""
    energy = sgmcmc.potential(fn, likelihood, prior, num_data)
    state, seen = sampler.init(params, seed), []
    for t in range(num_steps):
        state = sampler.update(state, grad(energy)(state.params, batches[t % len(batches)]))
        seen.append(state.params)
    return stacked(seen)


@all_samplers
def test_a_run_is_a_loop_over_batches(make):
    fn, params, data = model("mlp")
    batches = pieces(data, 5)
    prior = priors.Laplace(scale=0.4)
    got = run(fn, params, batches, sampler=make(), num_steps=8, prior=prior)
    expected = by_hand(fn, params, batches, 13, sampler=make(), num_steps=8, seed=3, prior=prior)
    assert_same(entry(got.params, 0), expected)
    assert (got.num_chains, got.num_draws) == (1, 8)


@pytest.mark.parametrize("name", [*PRIORS, "precision", "precision_by_leaf"])
def test_runs_take_any_prior(name):
    params, data = random_params(), rows()
    options = {"prior": PRIORS[name](params)} if name in PRIORS else {"prior_precision": 3.0}
    if name == "precision_by_leaf":
        options = {"prior_precision": {"w": 1.0, "b": 2.0, "gain": 3.0}}
    prior = options.get("prior") or priors.Normal(precision=options["prior_precision"])
    sampler = sgmcmc.sghmc(1e-3)
    got = run(
        linear, stacked([params] * 2), data, sampler=sampler, likelihood=NORMAL, stacked=True, **options
    )
    for k, seed in enumerate(member_seeds(3, 2)):
        expected = by_hand(
            linear,
            params,
            [data],
            20,
            sampler=sampler,
            num_steps=6,
            seed=seed,
            prior=prior,
            likelihood=NORMAL,
        )
        assert_same(entry(got.params, k), expected)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in MODELS for kind in ("tensors", "one_batch")),
        *(("mlp", kind) for kind in ("loader", "shuffled_loader")),
    ],
)
def test_chains_together_are_those_alone(name, kind, chunk_size):
    fn, params, data = model(name, 3)
    options = {"batch_size": 5 if kind == "tensors" else None, "sampler": sgmcmc.sghmc(1e-3)}
    if kind.endswith("loader"):
        data = DataLoader(TensorDataset(*data), batch_size=5, shuffle=kind == "shuffled_loader")
    together = run(fn, params, data, stacked=True, chunk_size=chunk_size, **options)
    for k, seed in enumerate(member_seeds(3, 3)):
        alone = run(fn, entry(params, k), data, **{**options, "seed": seed})
        assert_same(entry(together, k), entry(alone, 0), rtol=1e-8, atol=1e-10)


def test_chains_with_a_schedule_in_plain_python_are_those_alone():
    fn, params, data = model("mlp")
    options = {"sampler": sgmcmc.sgld(falling_by_halves), "batch_size": 5}
    together = run(fn, params, data, num_chains=2, **options)
    for k, seed in enumerate(member_seeds(3, 2)):
        assert_same(entry(together, k), entry(run(fn, params, data, **{**options, "seed": seed}), 0))


def test_chains_of_one_start_are_those_alone():
    fn, params, data = model("mlp")
    together = run(fn, params, data, num_chains=3, batch_size=5)
    assert_equal(together, run(fn, params, data, num_chains=3, batch_size=5))
    for k, seed in enumerate(member_seeds(3, 3)):
        assert_same(entry(together, k), entry(run(fn, params, data, seed=seed, batch_size=5), 0))
    assert not torch.equal(together.params["0.weight"][0], together.params["0.weight"][1])


class InAnyOrder:
    """Batches of several sizes, which differ between streams."""

    def __init__(self, data):
        self.batches = [(data[0][a:b], data[1][a:b]) for a, b in ((0, 3), (3, 7), (7, 13))]

    def __iter__(self):
        return (self.batches[i] for i in torch.randperm(3).tolist())


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_streams_whose_shapes_differ_are_evaluated_one_by_one(chunk_size):
    fn, params, data = model("mlp", 3)
    loader = InAnyOrder(data)
    together = run(fn, params, loader, stacked=True, chunk_size=chunk_size)
    for k, seed in enumerate(member_seeds(3, 3)):
        assert_same(entry(together, k), entry(run(fn, entry(params, k), loader, seed=seed), 0))


def test_a_model_that_cannot_be_mapped_is_evaluated_chain_by_chain():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fn, params = fb.make_functional(Branching().double())
    data = randn(6, 3), torch.tensor([0, 1, 1, 0, 1, 0])
    with pytest.warns(UserWarning, match=r"`sgmcmc.run` evaluates draws one by one, because `vmap` cannot"):
        together = run(fn, params, data, num_chains=2)
    for k, seed in enumerate(member_seeds(3, 2)):
        assert_same(entry(together, k), entry(run(fn, params, data, seed=seed), 0))


def test_states_are_kept_after_the_burn_in_and_thinned():
    fn, params, data = model("mlp")
    whole = run(fn, params, data, num_chains=2, num_steps=11)
    for burn_in, thin in ((0, 1), (3, 1), (0, 4), (3, 3), (10, 1)):
        part = run(fn, params, data, num_chains=2, num_steps=11, num_burn_in=burn_in, thin=thin)
        assert_equal(
            part, optree.tree_map(lambda leaf, s=slice(burn_in + thin - 1, None, thin): leaf[:, s], whole)
        )
    schedule = sgmcmc.cyclical(1e-2, 2, 11, num_samples=2)
    part = run(fn, params, data, num_chains=2, num_steps=11, collect=schedule.collect)
    chosen = [4, 5, 9, 10]
    assert_equal(part, optree.tree_map(lambda leaf: leaf[:, chosen], whole))


def test_a_fit_pools_the_chains_of_a_run():
    fn, params, data = model("conv_dict")
    options = {"num_steps": 9, "num_burn_in": 3, "thin": 2, "num_chains": 2, "batch_size": 5, "seed": 0}
    posterior = sgmcmc.fit(fn, params, data, CATEGORICAL, sampler=sgmcmc.sghmc(1e-3), **options)
    chains = sgmcmc.run(fn, params, data, CATEGORICAL, sampler=sgmcmc.sghmc(1e-3), **options)
    assert isinstance(posterior, fb.Ensemble)
    assert posterior.num_members == 6
    assert posterior.has_equal_weights
    for k in range(2):
        for t in range(3):
            assert_equal(posterior.member(3 * k + t), entry(entry(chains.params, k), t))
    prediction = fb.predict(fn, None, posterior, data[0], likelihood=CATEGORICAL)
    assert prediction.samples.shape == (6, 13, 2)


def test_potentials_are_those_of_the_steps():
    fn, params, data = model("mlp")
    batches, seen = pieces(data, 5), []
    chains = run(
        *(fn, params, batches),
        num_chains=2,
        num_steps=7,
        thin=2,
        prior_precision=2.0,
        callback=lambda step, potentials, params: seen.append((step, potentials, params)),
    )
    energy = sgmcmc.potential(fn, CATEGORICAL, priors.Normal(precision=2.0), 13)
    assert [step for step, _, _ in seen] == list(range(7))
    before = stacked([params] * 2)
    for step, potentials, after in seen:
        for k in range(2):
            torch.testing.assert_close(potentials[k], energy(entry(before, k), batches[step % 3]))
        before = after
    assert_equal(chains.statistics["potential"], torch.stack([p for _, p, _ in seen[1::2]], 1))
    assert_equal(chains.params, optree.tree_map(lambda *t: torch.stack(t, 1), *[p for _, _, p in seen[1::2]]))


def test_a_callback_may_end_chains():
    fn, params, data = model("mlp")
    options = {"num_chains": 2, "thin": 2, "num_steps": 10}
    got = run(fn, params, data, callback=lambda step, potentials, params: step == 4, **options)
    whole = run(fn, params, data, **options)
    assert_equal(got, optree.tree_map(lambda leaf: leaf[:, :2], whole))
    with pytest.raises(RuntimeError, match=r"sgmcmc.run\(callback=...\)` should let chains go on"):
        run(fn, params, data, callback=lambda *_: True, **options)


def test_progress_is_shown(capsys):
    fn, params, data = model("mlp")
    run(fn, params, data, progress=True)
    assert re.search(r"sgmcmc.run: 100%.*6/6.*potential=", capsys.readouterr().err)


def test_only_chosen_leaves_move():
    fn, params, data = model("conv_dict")
    chains = run(fn, params, data, where="head.*", num_chains=2)
    assert set(chains.params) == {"head.weight", "head.bias"}
    params["norm.running_mean"] = fb.Fixed(torch.ones(3, dtype=F64))
    chains = run(fn, params, data, where=["head.*"], num_chains=2)
    assert chains.params["norm.running_mean"].tensor.shape == (2, 6, 3)
    energy = sgmcmc.potential(fn, CATEGORICAL, priors.Normal(), 13)
    seed, sampler = member_seeds(3, 2)[1], sgmcmc.sgld(1e-2)
    part = {k: v for k, v in params.items() if k.startswith("head")}
    state = sampler.init(part, seed)
    for t in range(6):
        # A prior on what is held moves nothing.
        g = grad(lambda leaves: energy({**params, **leaves}, data))(state.params)
        state = sampler.update(state, g)
        assert_same({k: entry(entry(chains.params[k], 1), t) for k in part}, state.params)
    prediction = fb.predict(fn, params, chains.ensemble(), data[0])
    assert prediction.samples.shape == (12, 13, 2)


def test_what_chains_hold_for_themselves_is_part_of_their_states():
    fn, params, data = model("conv_dict", 2)
    params["norm.running_mean"] = fb.Fixed(randn(2, 3, seed=9))
    chains = run(fn, params, data, where="head.*", stacked=True)
    assert set(chains.params) == set(params)
    for k, seed in enumerate(member_seeds(3, 2)):
        alone = run(fn, entry(params, k), data, where="head.*", seed=seed)
        assert_same({name: entry(chains.params[name], k) for name in alone.params}, entry(alone.params, 0))
        for t in range(6):
            assert_equal(entry(entry(chains.params["conv.weight"], k), t), params["conv.weight"][k])
    prediction = fb.predict(fn, None, chains.ensemble(), data[0])
    one = {name: entry(entry(leaf, 1), 2) for name, leaf in chains.params.items()}
    torch.testing.assert_close(prediction.samples[6 + 2], fn(one, data[0]))


def test_leaves_without_axes_are_held():
    # A count of batches is one, in every network with BatchNorm.
    fn, start = fb.make_functional(ConvNet().double(), call=unpack)
    x, y = model("conv_dict")[2]
    params = fb.training.fit(
        fn, start, (x, y), CATEGORICAL, optimizer=torch.optim.SGD, num_epochs=1, batch_size=5, seed=0
    )
    counts = [name for name, leaf in params.items() if isinstance(leaf, fb.Fixed) and leaf.tensor.ndim == 0]
    assert counts == ["norm.num_batches_tracked"]
    options = {"num_steps": 2, "sampler": sgmcmc.sgld(1e-3)}
    for num in (1, 3):
        chains = run(fn, params, (x, y), num_chains=num, **options)
        ensemble = sgmcmc.fit(fn, params, (x, y), CATEGORICAL, num_chains=num, seed=3, **options)
        assert_equal(ensemble, chains.ensemble())
        states = [
            chains,
            run(fn, stacked([params] * num), (x, y), stacked=True, **options),
            sgmcmc.hmc(
                *(fn, params, (x, y), CATEGORICAL),
                num_samples=2,
                num_burn_in=0,
                step_size=1e-2,
                num_leapfrog_steps=1,
                num_chains=num,
                seed=0,
            ),
        ]
        for kept in states:
            assert kept.params[counts[0]].tensor.tolist() == [[3] * 2] * num
    x, y = rows()
    held = {**random_params(), "count": torch.tensor(3)}
    chains = run(linear, held, (x, y), likelihood=NORMAL, where=["w", "b"], num_chains=2, **options)
    assert set(chains.params) == {"w", "b"}


def test_parameters_in_lists_move():
    def nested(params, x):
        (w,), b = params
        return x @ w + b

    params = [(randn(3, 2),), torch.zeros(2, dtype=F64)]
    chains = run(
        nested, params, rows(), likelihood=NORMAL, where="0.*", num_chains=2, sampler=sgmcmc.sgld(1e-3)
    )
    assert chains.params[0][0].shape == (2, 6, 3, 2)
    assert fb.predict(nested, params, chains.ensemble(), rows()[0]).samples.shape == (12, 20, 2)


def test_nothing_is_changed_whatever_the_mode():
    fn, params, data = model("mlp", 2)
    before, state = copied(params), torch.get_rng_state()
    first = run(fn, params, data, stacked=True, batch_size=5)
    with torch.inference_mode():
        second = run(fn, params, data, stacked=True, batch_size=5)
    with torch.no_grad():
        third = run(fn, params, data, stacked=True, batch_size=5)
    assert_equal(first, second)
    assert_equal(first, third)
    assert_equal(params, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(leaf.requires_grad or leaf.is_inference() for leaf in tensors((first, second)))
    places = [leaf.untyped_storage().data_ptr() for leaf in tensors((first, second, params))]
    assert len(set(places)) == len(places)


def test_without_a_seed_torch_governs():
    fn, params, data = model("mlp")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first = run(fn, params, data, seed=None)
        torch.manual_seed(5)
        second, third = run(fn, params, data, seed=None), run(fn, params, data, seed=None)
    assert_equal(first, second)
    assert not torch.equal(first.params["0.weight"], third.params["0.weight"])


def scaled(params, x):
    return params["w"] * x


HALVES = {
    "sgld": (sgmcmc.sgld(5e-5), 0.005 / 4),
    "sghmc": (sgmcmc.sghmc(5e-5), 0.005 / (4 - 2 * 0.1)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALVES)
def test_chains_of_half_precision_have_the_stationary_distribution(name, dtype):
    # N(4, 0.01), where numbers of bfloat16 are 1 / 64 apart, and steps of Langevin dynamics are 0.007 long.
    num, (sampler, bias) = 1000, HALVES[name]
    x, y = torch.ones(1, 1, dtype=dtype), torch.full((1, num), 4.0, dtype=dtype)
    chains = sgmcmc.run(
        *(scaled, {"w": y[0]}, (x, y), fb.likelihoods.Normal(0.1)),
        sampler=sampler,
        num_steps=800,  # from the mean; the variance lacks exp(-4) of itself at most
        num_burn_in=799,
        prior=priors.Normal(precision=1e-6),
        seed=0,
    )
    draws = chains.params["w"].flatten()
    assert draws.dtype == dtype
    spacing = 1 / 64 if dtype == torch.bfloat16 else 1 / 512
    variance = 0.01 / (1 - bias) + spacing**2 / 12  # of what is rounded
    assert abs(draws.double().mean() - 4) < 5 * (variance / num) ** 0.5
    assert abs(draws.double().var() / variance - 1) < 5 * (2 / num) ** 0.5


def test_hmc_of_half_precision_has_the_moments_of_the_posterior():
    num, dtype = 200, torch.bfloat16
    x, y = torch.ones(1, 1, dtype=dtype), torch.full((1, 1), 4.0, dtype=dtype)
    chains = sgmcmc.hmc(
        *(scaled, {"w": y[0]}, (x, y), fb.likelihoods.Normal(0.1)),
        num_samples=20,
        num_burn_in=50,
        step_size=0.05,
        num_leapfrog_steps=4,
        prior_precision=1e-6,
        num_chains=num,
        seed=0,
    )
    draws = chains.params["w"].squeeze(-1)
    assert draws.dtype == dtype
    for values, expected, deviation in (
        (draws.double(), 4.0, 0.1),
        ((draws.double() - 4) ** 2, 0.01 + 1 / 64**2 / 12, 0.01 * 2**0.5),
    ):
        ess = sgmcmc.effective_sample_size(values, rank_normalized=False)
        assert abs(values.mean() - expected) < 5 * deviation / ess.sqrt()


@all_samplers
def test_chains_of_half_precision_are_those_of_single_precision_to_rounding(make):
    params = random_params(dtype=torch.bfloat16)
    x, y = (part.to(torch.bfloat16) for part in rows())
    options = {"likelihood": fb.likelihoods.Normal(4.0), "sampler": make(), "num_steps": 20, "num_chains": 2}
    half = run(linear, params, (x, y), **options)
    single = run(linear, optree.tree_map(Tensor.float, params), (x.float(), y.float()), **options)
    assert {leaf.dtype for leaf in tensors(half.params)} == {torch.bfloat16}
    wide = optree.tree_map(Tensor.float, half.params)
    assert_same(wide, single.params, rtol=2**-6, atol=2**-5)


def test_chains_can_be_saved(tmp_path):
    fn, params, data = model("mlp")
    chains = run(fn, params, data)
    save(chains, tmp_path / "chains.safetensors")
    assert_equal(load(tmp_path / "chains.safetensors"), chains)


def test_num_data_replaces_the_number_of_rows():
    fn, params, data = model("mlp")
    got = run(fn, params, data, num_data=100)
    prior = priors.Normal()
    assert_same(
        entry(got.params, 0),
        by_hand(fn, params, [data], 100, sampler=sgmcmc.sgld(1e-2), num_steps=6, seed=3, prior=prior),
    )


def test_runs_do_not_gather_tensors():
    fn, params, data = model("mlp")
    counts = {}

    def count(step, potentials, params):
        if step % 32 == 5:
            gc.collect()
            counts[step] = sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    run(fn, params, data, num_chains=2, num_steps=70, num_burn_in=69, batch_size=5, callback=count)
    assert len(set(list(counts.values())[1:])) == 1


@pytest.mark.parametrize("num_chains", [1, 3])
def test_potentials_that_are_not_finite_are_named(num_chains):
    def fn(params, x):
        return x @ params["w"]

    params = {"w": torch.ones(3, 2, dtype=F64)}
    options = {"likelihood": NORMAL, "sampler": sgmcmc.sgld(1.0), "num_steps": 600, "num_chains": num_chains}
    seen = []
    with pytest.raises(RuntimeError, match="smaller step size usually helps") as error:
        run(fn, params, rows(), callback=lambda step, u, params: seen.append(u), **options)
    table = torch.stack(seen)
    step, k = (~table.isfinite()).nonzero()[0].tolist()
    of_chain = f" of chain {k}" if num_chains > 1 else ""
    assert f"The potential energy{of_chain} in `sgmcmc.run` is " in str(error.value)
    assert f"in step {step}." in str(error.value)
    assert len(seen) < step + 33
    with pytest.raises(
        RuntimeError, match=rf"parameters{of_chain} in `sgmcmc.run` are not finite after step 0"
    ):
        run(
            lambda params, x: x @ params["w"],
            params,
            rows(),
            **{**options, "sampler": Exploding(), "num_steps": 1},
        )


class Exploding:
    """Its first step is one too far for the last chain... which of several is reported is the first."""

    def __init__(self):
        self.init = sgmcmc.sgld(1.0).init

    def update(self, state, gradients):
        after = sgmcmc.sgld(1.0).update(state, gradients)
        w = torch.full_like(after.params["w"], torch.inf)
        return type(after)({"w": w}, after.step, after.seed)


# Diagnostics --------------------------------------------------------------------------------------------


def halves(chains):
    """Chains (M, T) cut in two, without a middle draw."""
    n = chains.shape[1] // 2
    return [*chains[:, :n].tolist(), *chains[:, -n:].tolist()]


def naive_terms(chains):
    """W and var of Vehtari et al. (2021), section 3.1, of lists of numbers."""
    m, n = len(chains), len(chains[0])
    means = [sum(c) / n for c in chains]
    variances = [sum((v - mu) ** 2 for v in c) / (n - 1) for c, mu in zip(chains, means, strict=True)]
    grand = sum(means) / m
    between = n / (m - 1) * sum((mu - grand) ** 2 for mu in means)
    within = sum(variances) / m
    return within, (n - 1) / n * within + between / n, means, variances


def naive_r_hat(chains):
    within, total, _, _ = naive_terms(halves(chains))
    return math.sqrt(total / within)


def naive_ess(chains):
    chains = halves(chains)
    m, n = len(chains), len(chains[0])
    within, total, means, variances = naive_terms(chains)
    rho = []
    for t in range(n):
        mean = 0.0
        for c, mu, s2 in zip(chains, means, variances, strict=True):
            c0 = sum((v - mu) ** 2 for v in c)
            ct = sum((c[i] - mu) * (c[i + t] - mu) for i in range(n - t))
            mean += s2 * ct / c0 / m
        rho.append(1 - (within - mean) / total)
    tau, last = -1.0, math.inf
    for k in range(n // 2):
        pair = rho[2 * k] + rho[2 * k + 1]
        if pair <= 0:
            break
        last = min(last, pair)
        tau += 2 * last
    return m * n / max(tau, 1 / math.log10(m * n))


def naive_scores(values):
    """Normal scores of mean ranks, over everything."""
    every = values.flatten().tolist()
    ranks = [sum(v < u for v in every) + (sum(v == u for v in every) + 1) / 2 for u in every]
    scores = [torch.special.ndtri(torch.tensor((r - 3 / 8) / (len(every) + 1 / 4), dtype=F64)) for r in ranks]
    return torch.stack(scores).reshape(values.shape)


def autoregressive(rho, num_chains, num, seed=0):
    """Stationary chains x_t = rho x_{t-1} + sqrt(1 - rho^2) z_t."""
    z = randn(num, num_chains, seed=seed)
    x = [z[0]]
    for t in range(1, num):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * z[t])
    return torch.stack(x, 1)


SERIES = {
    "slow": autoregressive(0.8, 3, 41),
    "antithetic": autoregressive(-0.7, 2, 30),
    "independent": randn(4, 24),
    "one_chain": autoregressive(0.3, 1, 25),
    "ties": autoregressive(0.5, 3, 20).mul(2).round(),
    "shifted": randn(3, 20) + torch.arange(3)[:, None],
    "scaled": randn(3, 20) * torch.tensor([1.0, 5.0, 0.2])[:, None],
    "heavy": torch.tan(randn(2, 20)),
    "four": randn(2, 4),
}


@pytest.mark.parametrize("name", SERIES)
def test_diagnostics_are_those_of_the_paper(name):
    x = SERIES[name]
    scores, folded = naive_scores(x), naive_scores((x - x.flatten().quantile(0.5)).abs())
    expected = {
        (sgmcmc.split_r_hat, False): naive_r_hat(x),
        (sgmcmc.split_r_hat, True): max(naive_r_hat(scores), naive_r_hat(folded)),
        (sgmcmc.effective_sample_size, False): naive_ess(x),
        (sgmcmc.effective_sample_size, True): naive_ess(scores),
    }
    for (function, ranks), value in expected.items():
        got = function(x, rank_normalized=ranks)
        assert got.shape == ()
        torch.testing.assert_close(got, torch.tensor(value, dtype=F64))


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("ranks", [False, True])
def test_ess_of_autoregressive_chains_is_the_closed_form(rho, ranks):
    num_chains, num, repeats = 4, 2000, 50
    x = autoregressive(rho, num_chains * repeats, num).reshape(num_chains, repeats, num).transpose(1, 2)
    found = sgmcmc.effective_sample_size(x, rank_normalized=ranks)
    assert found.shape == (repeats,)
    expected = num_chains * num * (1 - rho) / (1 + rho)
    # Geyer's estimate is biased by where it cuts off, which is of the order of its own deviation.
    error = found.mean() - expected
    assert abs(error) < 5 * found.std() / repeats**0.5 + 0.05 * expected


def test_the_mean_of_chains_varies_as_their_ess_says():
    repeats, num_chains, num = 400, 2, 500
    x = (
        autoregressive(0.7, num_chains * repeats, num, seed=1)
        .reshape(num_chains, repeats, num)
        .transpose(1, 2)
    )
    ess = sgmcmc.effective_sample_size(x, rank_normalized=False).median()
    variance = x.mean((0, 1)).var()
    assert abs(variance * ess - 1) < 5 * (2 / repeats) ** 0.5


def test_r_hat_of_chains_that_mix_is_one_and_of_others_known():
    num = 4000
    x = randn(4, num)
    assert 0.999 < sgmcmc.split_r_hat(x) < 1.003
    shifts = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=F64)
    # W = 1, B / n = variance of the 8 half-chain means
    expected = (1 + shifts.repeat(2).var()).sqrt()
    got = sgmcmc.split_r_hat(x + shifts[:, None], rank_normalized=False)
    assert abs(got - expected) < 5 * expected / num**0.5
    wide = x * torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=F64)[:, None]
    assert sgmcmc.split_r_hat(wide, rank_normalized=False) < 1.003
    assert sgmcmc.split_r_hat(wide) > 1.05
    trend = randn(1, num) + torch.linspace(0, 3, num, dtype=F64)
    assert sgmcmc.split_r_hat(trend) > 1.3


def test_ranks_do_not_depend_on_scale_and_events_are_apart():
    x = autoregressive(0.5, 12, 40).reshape(3, 4, 40).transpose(1, 2)
    for function in (sgmcmc.split_r_hat, sgmcmc.effective_sample_size):
        whole = function(x)
        assert whole.shape == (4,)
        for i in range(4):
            torch.testing.assert_close(whole[i], function(x[..., i]))
        torch.testing.assert_close(function(x.reshape(3, 40, 2, 2)), whole.reshape(2, 2))
        assert function(x.float()).dtype == torch.float32
    torch.testing.assert_close(sgmcmc.effective_sample_size(x.exp() ** 3), sgmcmc.effective_sample_size(x))
    counts = x.mul(3).round()
    for function in (sgmcmc.split_r_hat, sgmcmc.effective_sample_size):
        torch.testing.assert_close(function(counts.long()), function(counts).float())


def test_values_that_say_nothing_give_nan_and_spoil_no_others():
    x = randn(3, 20, 6)
    x[..., 1] = 2.5
    x[1, 4, 2] = math.nan
    x[0, 0, 3] = math.inf
    x[..., 4] = torch.tensor([1.0, 2.0, 3.0])[:, None]  # chains that do not move, and differ
    for ranks in (False, True):
        r_hat = sgmcmc.split_r_hat(x, rank_normalized=ranks)
        ess = sgmcmc.effective_sample_size(x, rank_normalized=ranks)
        assert r_hat.isnan().tolist() == ess.isnan().tolist() == [False, True, True, True, False, False]
        assert r_hat[4] == math.inf
        assert 2 < ess[4] < 4
        for i in (0, 5):
            torch.testing.assert_close(r_hat[i], sgmcmc.split_r_hat(x[..., i], rank_normalized=ranks))
    two = torch.tensor([[-1.0] * 8, [1.0] * 8])
    assert sgmcmc.split_r_hat(two) == math.inf  # though both are as far from the median


def test_many_events_are_worked_on_in_parts(monkeypatch):
    x = randn(2, 10, 7)
    expected = [f(x) for f in (sgmcmc.split_r_hat, sgmcmc.effective_sample_size)]
    monkeypatch.setattr("funcbayes.sgmcmc._diagnostics._NUMBERS", 45)
    for f, value in zip((sgmcmc.split_r_hat, sgmcmc.effective_sample_size), expected, strict=True):
        torch.testing.assert_close(f(x), value)


# Hamiltonian Monte Carlo --------------------------------------------------------------------------------


def affine(params, x):
    return x @ params["w"] + params["b"]


def affine_posterior(x, y, noise_std, precision):
    """Mean and covariance of (b, w) for one output."""
    design = torch.cat([torch.ones(len(x), 1, dtype=F64), x], 1)
    covariance = torch.linalg.inv(design.T @ design / noise_std**2 + precision * torch.eye(design.shape[1]))
    return covariance @ design.T @ y.squeeze(-1) / noise_std**2, covariance


AFFINE = {"w": torch.zeros(3, 1, dtype=F64), "b": torch.zeros(1, dtype=F64)}
SCALES = torch.tensor([1.0, 0.4, 3.0], dtype=F64)


def hmc(fn=affine, params=AFFINE, data=None, **options):
    x, y = rows(15)
    data = (x * SCALES, y[:, :1]) if data is None else data
    options = {
        "num_samples": 60,
        "num_burn_in": 20,
        "step_size": 0.1,
        "num_leapfrog_steps": 6,
        "seed": 0,
        **({} if "prior" in options else {"prior_precision": 0.5}),
        **options,
    }
    return sgmcmc.hmc(fn, params, data, NORMAL, **options)


def affine_rows(chains):
    """(M, T, 4), the bias first."""
    return torch.cat([chains.params["b"], chains.params["w"].squeeze(-1)], -1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapt_masses": False, "num_burn_in": 40, "num_leapfrog_steps": 9},
        {"adapt": False, "step_size": 0.05, "num_leapfrog_steps": 9, "num_burn_in": 30},
        {"num_leapfrog_steps": 1, "num_samples": 100, "num_burn_in": 200},
    ],
    ids=["adapted", "step_size_only", "fixed", "langevin"],
)
def test_hmc_has_the_moments_of_the_posterior(options):
    x, y = rows(15)
    mean, covariance = affine_posterior(x * SCALES, y[:, :1], 0.5, 0.5)
    chains = hmc(**{"num_burn_in": 100, "num_samples": 30, "num_chains": 200, **options})
    draws = affine_rows(chains)
    ess = sgmcmc.effective_sample_size(draws, rank_normalized=False)
    assert (ess > 300).all()
    deviations = covariance.diagonal().sqrt()
    assert ((draws.mean((0, 1)) - mean).abs() < 5 * deviations / ess.sqrt()).all()
    i, j = torch.triu_indices(4, 4)
    products = (draws - mean)[..., i] * (draws - mean)[..., j]
    ess = sgmcmc.effective_sample_size(products, rank_normalized=False)
    spread = (covariance.diagonal()[i] * covariance.diagonal()[j] + covariance[i, j] ** 2).sqrt()
    assert ((products.mean((0, 1)) - covariance[i, j]).abs() < 5 * spread / ess.sqrt()).all()


def test_hmc_is_exact_for_a_distribution_that_is_no_gaussian():
    # Without rows that say anything the posterior is the prior: a Laplace distribution, with a kink.
    data = torch.zeros(4, 3, dtype=F64), torch.zeros(4, 1, dtype=F64)
    options = {"num_samples": 40, "num_burn_in": 60, "num_chains": 300, "num_leapfrog_steps": 5}
    chains = hmc(
        lambda p, x: x @ p["w"], {"w": AFFINE["w"]}, data, prior=priors.Laplace(scale=0.7), **options
    )
    draws = chains.params["w"].flatten(2)
    for values, expected, spread in (
        (draws, 0.0, 2**0.5 * 0.7),
        (draws.abs(), 0.7, 0.7),
        (draws**2, 2 * 0.7**2, 20**0.5 * 0.7**2),
    ):
        ess = sgmcmc.effective_sample_size(values, rank_normalized=False)
        assert ((values.mean((0, 1)) - expected).abs() < 5 * spread / ess.sqrt()).all()


def residuals(params, x):
    """Each chain has targets of its own, which are part of what it holds."""
    return x @ params["w"] - params["y"].tensor


def ranks_of_prior_draws(noise_std, num=320, num_ranks=31, thin=3):
    """Talts et al. (2018), algorithm 1, all replications at once: ranks (num, 3) from 0 to ``num_ranks``."""
    x = randn(5, 3, seed=11) * SCALES.sqrt()
    truth = randn(num, 3, 1, seed=12) / 2**0.5
    y = x @ truth + 0.5 * randn(num, 5, 1, seed=13)
    chains = sgmcmc.hmc(
        *(residuals, {"w": torch.zeros(num, 3, 1, dtype=F64), "y": fb.Fixed(y)}),
        *((x, torch.zeros(5, 1, dtype=F64)), fb.likelihoods.Normal(noise_std)),
        num_samples=num_ranks * thin,
        num_burn_in=50,
        step_size=0.3,
        num_leapfrog_steps=6,
        prior_precision=2.0,
        stacked=True,
        seed=1,
    )
    draws = chains.params["w"][:, thin - 1 :: thin]
    return (draws < truth[:, None]).sum(1).squeeze(-1)


def chi_square(ranks, num_ranks=31, bins=8):
    """Of the ranks of each parameter, which are uniform on 0 .. num_ranks if all is well."""
    counts = torch.stack([(ranks * bins // (num_ranks + 1) == b).sum(0) for b in range(bins)])
    expected = len(ranks) / bins
    return ((counts - expected) ** 2 / expected).sum(0)


def test_hmc_is_calibrated_in_simulations():
    # The chi-square of 7 degrees of freedom is above 35 with a probability of 1e-5.
    assert (chi_square(ranks_of_prior_draws(0.5)) < 35).all()


def test_simulations_show_a_wrong_likelihood():
    assert (chi_square(ranks_of_prior_draws(0.25)) > 100).any()


def test_acceptance_keeps_the_energy_and_rejections_repeat_states():
    small = hmc(adapt=False, step_size=1e-3, num_chains=3)
    assert (small.statistics["acceptance_rate"] > 0.9999).all()
    large = hmc(adapt=False, step_size=0.07, num_chains=100, num_samples=40)
    moved = (large.params["w"].diff(dim=1) != 0).any(-1).any(-1).double().mean(1)
    rate = large.statistics["acceptance_rate"]
    assert ((moved - rate).abs() < 5 * (rate * (1 - rate) / 39).sqrt() + 1e-9).all()
    assert 0.1 < rate.mean() < 0.97
    energy = sgmcmc.potential(affine, NORMAL, priors.Normal(precision=0.5), 15)
    x, y = rows(15)
    for t in (0, 7, 39):
        one = entry(entry(large.params, 2), t)
        torch.testing.assert_close(large.statistics["potential"][2, t], energy(one, (x * SCALES, y[:, :1])))


def test_step_sizes_are_averaged_as_in_the_paper():
    """Hoffman & Gelman (2014), algorithm 5, with probabilities of acceptance that fall with the step size."""

    def acceptance(size):
        return 1 / (1 + size)  # 0.8 at 0.25

    averaging = DualAveraging.from_size(torch.tensor([3.0, 1e-3], dtype=F64))
    for k, first in enumerate((3.0, 1e-3)):
        mu, error, log_size, log_average = math.log(10 * first), 0.0, math.log(first), 0.0
        tried = averaging
        for m in range(1, 40):
            tried = tried.updated(acceptance(tried.log_size.exp()), 0.8)
            alpha = acceptance(math.exp(log_size))
            error = (1 - 1 / (m + 10)) * error + (0.8 - alpha) / (m + 10)
            log_size = mu - math.sqrt(m) / 0.05 * error
            log_average = m**-0.75 * log_size + (1 - m**-0.75) * log_average
        assert tried.log_size[k].item() == pytest.approx(log_size)
        assert tried.log_average[k].item() == pytest.approx(log_average)
    for _ in range(3000):
        averaging = averaging.updated(acceptance(averaging.log_size.exp()), 0.8)
    torch.testing.assert_close(
        averaging.log_average.exp(), torch.full((2,), 0.25, dtype=F64), rtol=0.05, atol=0
    )


def test_variances_are_those_of_a_window():
    draws = randn(60, 2, 3)
    seen = Variances.like(draws[0])
    for draw in draws:
        seen = seen.updated(draw)
    before = torch.full((2, 3), 7.0, dtype=F64)
    torch.testing.assert_close(seen.inverse_masses(before), 60 / 65 * draws.var(0) + 5 / 65 * 7e-3)


@pytest.mark.parametrize("num", [0, 1, 5, 19, 20, 40, 100, 150, 1000])
def test_windows_cover_what_lies_between_the_ends_of_the_burn_in(num):
    collecting, ends = windows(num)
    if not ends:  # too few proposals to learn from
        assert not collecting
        assert num < 20
        return
    assert (collecting.start, collecting.stop) == (math.ceil(0.15 * num), math.floor(0.8 * num))
    assert max(ends) == collecting[-1]
    starts = [collecting.start, *(end + 1 for end in sorted(ends))]
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert all(b >= 2 * a for a, b in zip(lengths, lengths[1:], strict=False))


def test_step_sizes_are_adapted_to_a_rate_of_acceptance():
    options = {"num_burn_in": 120, "num_samples": 20, "num_chains": 50, "num_leapfrog_steps": 2}
    found = [hmc(target_acceptance=t, step_size=3.0, **options).statistics for t in (0.6, 0.9)]
    rates = [statistics["acceptance_rate"].mean() for statistics in found]
    assert 0.6 < rates[0] < 0.9 < rates[1] < 0.99
    assert all((statistics["num_divergent"] == 0).all() for statistics in found)
    fixed = hmc(adapt=False, num_chains=2, step_size=0.07)
    assert fixed.statistics["step_size"].tolist() == pytest.approx([0.07, 0.07])


def test_masses_make_scales_alike():
    x, y = rows(15)
    data = (x * torch.tensor([1.0, 0.2, 5.0], dtype=F64), y[:, :1])
    options = {"num_burn_in": 150, "num_samples": 30, "num_chains": 50, "prior_precision": 1e-3}
    with_masses, without = hmc(data=data, **options), hmc(data=data, adapt_masses=False, **options)
    least = [sgmcmc.effective_sample_size(affine_rows(c)).min() for c in (with_masses, without)]
    assert least[0] > 1000
    assert least[0] > 10 * least[1]


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_hmc_chains_together_are_those_alone(chunk_size):
    params = stacked([{k: v + i for k, v in AFFINE.items()} for i in (0.0, 0.1, 0.2)])
    # Adaptation magnifies rounding, so that long chains part.
    together = hmc(params=params, stacked=True, num_samples=4, num_burn_in=20, chunk_size=chunk_size)
    for k, seed in enumerate(member_seeds(0, 3)):
        alone = hmc(params=entry(params, k), num_samples=4, num_burn_in=20, seed=seed)
        assert_same(entry(together, k), entry(alone, 0), rtol=1e-6, atol=1e-8)


def test_hmc_takes_batches_where_and_any_prior():
    x, y = rows(15)
    data = (x * SCALES, y[:, :1])
    whole = hmc(num_samples=5, adapt=False, num_chains=2)
    assert_same(hmc(num_samples=5, adapt=False, num_chains=2, data=pieces(data, 4)), whole)
    part = hmc(num_samples=5, where="w")
    assert set(part.params) == {"w"}
    prior = fb.Gaussian(AFFINE, Diagonal({k: 0 * v + 2.0 for k, v in AFFINE.items()}))
    assert_same(hmc(num_samples=5, adapt=False, num_chains=2, prior=prior), whole)
    assert_equal(hmc(num_samples=5, num_burn_in=0), hmc(num_samples=5, num_burn_in=0, adapt=False))


def test_hmc_changes_nothing_and_keeps_dtypes(tmp_path):
    params, state = copied(AFFINE), torch.get_rng_state()
    first = hmc(params=params, num_samples=8, num_chains=2)
    with torch.inference_mode():
        assert_equal(hmc(params=params, num_samples=8, num_chains=2), first)
    assert_equal(params, AFFINE)
    assert torch.equal(torch.get_rng_state(), state)
    places = [leaf.untyped_storage().data_ptr() for leaf in tensors((first, params))]
    assert len(set(places)) == len(places)
    save(first, tmp_path / "chains.safetensors")
    x, y = rows(15)
    single = optree.tree_map(Tensor.float, AFFINE)
    chains = hmc(params=single, data=(x.float(), y[:, :1].float()), num_samples=8)
    assert {leaf.dtype for leaf in tensors(chains.params)} == {torch.float32}
    mixed = {"w": AFFINE["w"], "b": AFFINE["b"].float()}
    chains = hmc(lambda p, x: x @ p["w"] + p["b"].double(), mixed, num_samples=3)
    assert chains.params["b"].dtype == torch.float32


def test_proposals_that_diverge_are_rejected():
    def fn(params, x):
        return (x @ params["w"]).exp()

    data = torch.ones(4, 3, dtype=F64), torch.ones(4, 1, dtype=F64)
    chains = hmc(fn, {"w": AFFINE["w"]}, data, adapt=False, step_size=200.0, num_chains=2, num_burn_in=0)
    assert all(leaf.isfinite().all() for leaf in tensors(chains))
    assert (chains.statistics["num_divergent"] > 50).all()
    assert (chains.statistics["acceptance_rate"] < 0.1).all()
    with pytest.raises(
        RuntimeError, match=r"potential energy of chain 0 in `sgmcmc.hmc` is inf where it starts"
    ):
        hmc(fn, {"w": AFFINE["w"] + 1000.0}, data, num_chains=2)


# What is refused ----------------------------------------------------------------------------------------


def updated(gradients, sampler=None, behind=0):
    sampler = sampler or sgmcmc.sgld(0.1)
    return sampler.update(steps(sampler, sampler.init(random_params(), 0), behind), gradients)


ZEROS = {k: torch.zeros(s, dtype=F64) for k, s in SHAPES.items()}
BATCH = rows(4)


def energy(**options):
    options = {"fn": linear, "likelihood": NORMAL, "prior": priors.Normal(), "num_data": 10, **options}
    return sgmcmc.potential(**options)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: sgmcmc.sgld(0.0), ValueError, "sgld(step_size=...)` should be positive and finite, got 0.0"),
        (lambda: sgmcmc.sgld(-1), ValueError, "sgld(step_size=...)` should be positive"),
        (lambda: sgmcmc.sgld(math.nan), ValueError, "sgld(step_size=...)` should be positive"),
        (lambda: sgmcmc.sgld(math.inf), ValueError, "sgld(step_size=...)` should be positive"),
        (lambda: sgmcmc.sgld(torch.ones(2)), TypeError, "function of the step, got Tensor of shape (2,)"),
        (lambda: sgmcmc.sgld("0.1"), TypeError, "should be a number or a function of the step, got str"),
        (lambda: sgmcmc.sgld(True), TypeError, "should be a number or a function of the step, got bool"),
        (
            lambda: sgmcmc.sgld(0.1, temperature=-0.1),
            ValueError,
            "sgld(temperature=...)` should be at least 0",
        ),
        (lambda: sgmcmc.psgld(0.0, num_data=1), ValueError, "psgld(step_size=...)` should be positive"),
        (
            lambda: sgmcmc.psgld(0.1, decay=1.0, num_data=1),
            ValueError,
            "decay=...)` should be at least 0 and below 1, got 1.0",
        ),
        (lambda: sgmcmc.psgld(0.1, decay=-0.1, num_data=1), ValueError, "decay=...)` should be at least 0"),
        (lambda: sgmcmc.psgld(0.1, damping=0.0, num_data=1), ValueError, "damping=...)` should be positive"),
        (
            lambda: sgmcmc.psgld(0.1, temperature=-1, num_data=1),
            ValueError,
            "psgld(temperature=...)` should be at least 0",
        ),
        (lambda: sgmcmc.psgld(0.1, num_data=0), ValueError, "psgld(num_data=...)` should be at least 1"),
        (lambda: sgmcmc.sghmc(0.0), ValueError, "sghmc(step_size=...)` should be positive"),
        (lambda: sgmcmc.sghmc(0.1, friction=0.0), ValueError, "friction=...)` should be positive"),
        (
            lambda: sgmcmc.sghmc(0.1, friction=1.1),
            ValueError,
            "friction=...)` should be positive and at most 1",
        ),
        (
            lambda: sgmcmc.sghmc(0.1, noise_estimate=-0.1),
            ValueError,
            "noise_estimate=...)` should be at least 0",
        ),
        (
            lambda: sgmcmc.sghmc(0.1, friction=0.1, noise_estimate=0.2),
            ValueError,
            "should have a `friction * temperature - noise_estimate` of at least 0, got -0.1",
        ),
        (
            lambda: sgmcmc.sghmc(0.1, friction=0.3, noise_estimate=0.2, temperature=0.5),
            ValueError,
            "noise_estimate` of at least 0, got -0.05",
        ),
        (
            lambda: sgmcmc.sghmc(CYCLES, noise_estimate=0.05, temperature=CYCLES.temperature),
            ValueError,
            "noise_estimate` of at least 0, got -0.05",
        ),
        (
            lambda: updated(ZEROS, sgmcmc.sghmc(0.1, noise_estimate=0.05, temperature=lambda t: 1.0 - t), 1),
            ValueError,
            "noise_estimate` of at least 0, got -0.05",
        ),
        (
            lambda: updated(ZEROS, sgmcmc.sgld(lambda t: 0.0 * t)),
            ValueError,
            "sgld(step_size=...)` should be positive and finite, got 0",
        ),
        (
            lambda: updated(ZEROS, sgmcmc.sgld(lambda t: -1.0)),
            ValueError,
            "should be positive and finite, got -1.0",
        ),
        (
            lambda: updated(ZEROS, sgmcmc.sgld(lambda t: math.inf + t)),
            ValueError,
            "sgld(step_size=...)` should be positive and finite, got inf",
        ),
        (
            lambda: updated(ZEROS, sgmcmc.sgld(lambda t: None)),
            TypeError,
            "should be a function that gives numbers, got NoneType",
        ),
        (
            lambda: updated(ZEROS, sgmcmc.psgld(lambda t: torch.ones(3), num_data=1)),
            ValueError,
            "should be a function that gives a number for each step, got shape (3,)",
        ),
        (
            lambda: updated(ZEROS, sgmcmc.psgld(0.1, temperature=lambda t: t.double() - 1, num_data=1)),
            ValueError,
            "psgld(temperature=...)` should be at least 0 and finite, got -1",
        ),
        (
            lambda: updated({**ZEROS, "x": ZEROS["b"]}),
            ValueError,
            "like `state.params`, or of some of its leaves; in them 'x'",
        ),
        (lambda: updated({**ZEROS, "b": ZEROS["w"]}), ValueError, "in them 'b' has shape (2, 3), not (2,)"),
        (lambda: updated({}), ValueError, "in them there is none"),
        (
            lambda: sgmcmc.sgld(0.1).init({}, 0),
            ValueError,
            "sgld.init(params, seed)` should have a leaf of floating",
        ),
        (
            lambda: sgmcmc.sghmc(0.1).init({"n": torch.arange(3)}, 0),
            ValueError,
            "should have a leaf of floating",
        ),
        (
            lambda: sgmcmc.sgld(0.1).init({"a": ZEROS["b"], "c": 1.0}, 0),
            TypeError,
            "tensors as leaves; 'c' is float",
        ),
        (
            lambda: sgmcmc.sgld(0.1).init(ZEROS, 0.5),
            TypeError,
            "should be given an int or an int64 tensor, got float",
        ),
        (lambda: sgmcmc.sgld(0.1).init(ZEROS, torch.ones(2)), TypeError, "got torch.float32, shape (2,)"),
        (
            lambda: sgmcmc.sgld(0.1).init(random_params(lead=(3,)), torch.arange(2)),
            ValueError,
            "with seeds of shape (2,) should have leaves with that leading axis; 'b' has shape (3, 2)",
        ),
        (lambda: sgmcmc.polynomial(0.0), ValueError, "polynomial(a=...)` should be positive"),
        (lambda: sgmcmc.polynomial(0.1, b=0.0), ValueError, "polynomial(b=...)` should be positive"),
        (lambda: sgmcmc.polynomial(0.1, gamma=1.5), ValueError, "polynomial(gamma=...)` should be at most 1"),
        (lambda: sgmcmc.polynomial("a"), TypeError, "polynomial(a=...)` should be a number, got str"),
        (lambda: sgmcmc.cyclical(0.0, 1, 2), ValueError, "cyclical(peak=...)` should be positive"),
        (lambda: sgmcmc.cyclical(0.1, 0, 2), ValueError, "cyclical(num_cycles=...)` should be at least 1"),
        (
            lambda: sgmcmc.cyclical(0.1, 3, 2),
            ValueError,
            "num_cycles=...)` should be at most `num_steps=2`, got 3",
        ),
        (
            lambda: sgmcmc.cyclical(0.1, 1, 2, exploration=1.0),
            ValueError,
            "exploration=...)` should be at least 0",
        ),
        (
            lambda: sgmcmc.cyclical(0.1, 1, 2, exploration="a"),
            TypeError,
            "cyclical(exploration=...)` should be a number, got str",
        ),
        (
            lambda: sgmcmc.cyclical(0.1, 1, 2, num_samples=0),
            ValueError,
            "num_samples=...)` should be at least 1",
        ),
        (lambda: sgmcmc.cyclical(0.1, 1, 2.0), TypeError, "num_steps=...)` should be an int"),
        (
            lambda: energy(fn=mlp()),
            TypeError,
            "potential(fn, ...)` should be given a function of (params, x), got an nn",
        ),
        (lambda: energy(likelihood=nn.MSELoss()), TypeError, "potential(likelihood=...)` should be one of"),
        (lambda: energy(prior=None), TypeError, "potential(prior=...)` should be one of `funcbayes.priors`"),
        (lambda: energy(prior=priors.Normal), TypeError, "got NormalPrior"),
        (lambda: energy(num_data=0), ValueError, "potential(num_data=...)` should be at least 1"),
        (
            lambda: energy(num_data=3)(random_params(), BATCH),
            ValueError,
            "at least the 4 of this batch, got 3",
        ),
        (
            lambda: energy()(random_params(), BATCH[0]),
            TypeError,
            "should be `(x, y)` with tensors, got Tensor",
        ),
        (
            lambda: energy(prior=ByLeaf())(random_params(), BATCH),
            ValueError,
            "`log_prob(params)` of the prior should be a scalar, summed over parameters, got shape (2,)",
        ),
        (
            lambda: sgmcmc.split_r_hat([1.0]),
            TypeError,
            "split_r_hat(values)` should be given a tensor, got list",
        ),
        (lambda: sgmcmc.effective_sample_size(ZEROS), TypeError, "should be given a tensor, got dict"),
        (
            lambda: sgmcmc.split_r_hat(randn(9)),
            ValueError,
            "(chains, draws, ...) with at least 4 draws, got shape (9,)",
        ),
        (lambda: sgmcmc.effective_sample_size(randn(9, 3)), ValueError, "at least 4 draws, got shape (9, 3)"),
        (lambda: sgmcmc.effective_sample_size(randn(0, 9)), ValueError, "got shape (0, 9)"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


class ByLeaf:
    def log_prob(self, params):
        return params["b"]


class Untouched:
    """Data that would show that something had begun."""

    def __iter__(self):
        raise AssertionError


@pytest.mark.parametrize("call", ["run", "fit"])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_steps": 0}, ValueError, "(num_steps=...)` should be at least 1, got 0"),
        (
            {"num_burn_in": 6},
            ValueError,
            "(num_burn_in=...)` and `thin` should add up to at most `num_steps=6`",
        ),
        ({"num_burn_in": -1}, ValueError, "(num_burn_in=...)` should be at least 0, got -1"),
        ({"num_burn_in": 0.0}, TypeError, "(num_burn_in=...)` should be an int, got float"),
        ({"callback": 3}, TypeError, "(callback=...)` should be a function, got int"),
        ({"thin": 0}, ValueError, "(thin=...)` should be at least 1"),
        ({"thin": 7}, ValueError, "add up to at most `num_steps=6`, or no state is kept; got 0 and 7"),
        ({"collect": 3}, TypeError, "(collect=...)` should be a function of the number of a step, got int"),
        ({"collect": lambda step: step > 9}, ValueError, "(collect=...)` should be true for a step below"),
        (
            {"collect": lambda step: True, "thin": 2},
            ValueError,
            "stands in the place of `num_burn_in` and `thin`",
        ),
        ({"num_chains": 0}, ValueError, "(num_chains=...)` should be at least 1"),
        ({"num_chains": 3, "stacked": True}, ValueError, "those of 2 chains, got 3"),
        ({"chunk_size": 0}, ValueError, "(chunk_size=...)` should be at least 1"),
        ({"batch_size": 2}, ValueError, "(batch_size=...)` should be left out"),
        ({"num_data": 0}, ValueError, "(num_data=...)` should be at least 1"),
        (
            {"sampler": sgmcmc.sgld},
            TypeError,
            "(sampler=...)` should be a sampler, such as `sgmcmc.sgld(1e-4)`, got sgld",
        ),
        (
            {"sampler": 0.1},
            TypeError,
            "(sampler=...)` should be a sampler, such as `sgmcmc.sgld(1e-4)`, got float",
        ),
        ({"likelihood": nn.MSELoss()}, TypeError, "(likelihood=...)` should be one of"),
        ({"where": "nothing"}, ValueError, "none that `where='nothing'` chooses"),
        (
            {"prior_precision": -1.0},
            ValueError,
            "(prior_precision=...)` should be positive and finite, got -1",
        ),
        ({"prior_precision": "a"}, TypeError, "(prior_precision=...)` should be a number or a tree of"),
        (
            {"prior_precision": {"0.bias": 1.0}},
            ValueError,
            "(prior_precision=...)` should have a number for each leaf; '0.weight' is missing",
        ),
        (
            {"prior_precision": 2.0, "prior": priors.Laplace(scale=1.0)},
            ValueError,
            "(prior=...)` stands in the place of `prior_precision`, got both",
        ),
        (
            {"prior": torch.distributions.Normal(0.0, 1.0)},
            TypeError,
            "(prior=...)` should have a `log_prob(params)` of a tree, got torch.distributions.Normal",
        ),
        ({"prior": 3.0}, TypeError, "(prior=...)` should be one of `funcbayes.priors`"),
        (
            {"prior": gaussian(ZEROS)},
            ValueError,
            "should be over the leaves that",
        ),
        ({"seed": 0.5}, TypeError, "`seed` should be an int"),
    ],
)
def test_runs_that_make_no_sense_are_refused_before_they_begin(call, options, error, words):
    fn, params, _ = model("mlp", 2)
    params = params if options.get("stacked") else entry(params, 0)
    options = {"likelihood": CATEGORICAL, "sampler": sgmcmc.sgld(0.1), "num_steps": 6, **options}
    with pytest.raises(error, match=re.escape(words)) as info:
        getattr(sgmcmc, call)(fn, params, Untouched(), **options)
    if "(" in words and words.startswith("("):
        assert f"`sgmcmc.{call}(" in str(info.value)


def test_runs_refuse_what_only_data_show():
    fn, params, data = model("mlp")
    with pytest.raises(
        ValueError, match=r"sgmcmc.run\(num_data=...\)` should be .* at least the 13 of this batch"
    ):
        run(fn, params, data, num_data=12)
    with pytest.raises(ValueError, match=r"num_data=...\)` should be .* at least the 6 of"):
        run(fn, params, InAnyOrder(data), num_data=4, num_chains=2, num_steps=20)
    with pytest.raises(ValueError, match=r"Labels `y` in `sgmcmc.run\(data=...\)` should be from 0 to 1"):
        run(fn, params, (data[0], data[1] + 7))
    with pytest.raises(ValueError, match="at least one row, got none"):
        run(fn, params, (data[0][:0], data[1][:0]))
    with pytest.raises(TypeError, match="got an nn.Module"):
        run(mlp(), params, data)
    with pytest.raises(ValueError, match=r"stacked=True\)` should be given leaves with one leading axis"):
        run(fn, params, data, stacked=True)
    with pytest.raises(ValueError, match="should have a leaf of floating point to move, got none"):
        run(fn, {"n": torch.arange(3)}, data)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"num_samples": 0}, ValueError, "hmc(num_samples=...)` should be at least 1"),
        ({"num_burn_in": -1}, ValueError, "hmc(num_burn_in=...)` should be at least 0, got -1"),
        ({"num_burn_in": 0.0}, TypeError, "hmc(num_burn_in=...)` should be an int, got float"),
        (
            {"step_size": torch.ones(2)},
            TypeError,
            "hmc(step_size=...)` should be a number, got Tensor of shape",
        ),
        ({"target_acceptance": "a"}, TypeError, "hmc(target_acceptance=...)` should be a number, got str"),
        ({"num_leapfrog_steps": 0}, ValueError, "hmc(num_leapfrog_steps=...)` should be at least 1"),
        ({"step_size": 0.0}, ValueError, "hmc(step_size=...)` should be positive"),
        (
            {"step_size": sgmcmc.polynomial(0.1)},
            TypeError,
            "hmc(step_size=...)` should be a number, got Polynomial",
        ),
        ({"target_acceptance": 1.0}, ValueError, "hmc(target_acceptance=...)` should be above 0 and below 1"),
        ({"num_chains": 0}, ValueError, "hmc(num_chains=...)` should be at least 1"),
        ({"chunk_size": 0}, ValueError, "hmc(chunk_size=...)` should be at least 1"),
        (
            {"prior_precision": 0.0},
            ValueError,
            "hmc(prior_precision=...)` should be positive and finite, got 0.",
        ),
        ({"where": "x"}, ValueError, "none that `where='x'` chooses"),
        ({"fn": mlp()}, TypeError, "got an nn.Module"),
    ],
)
def test_hmc_refuses_what_makes_no_sense_before_it_begins(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        hmc(**{"data": Untouched(), **options})


def test_imports_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {"fit", "run", "hmc", "sgld", "psgld", "sghmc"} <= set(dir(sgmcmc))
