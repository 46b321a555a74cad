"""Laplace approximations: against conjugate regression, matrices written out, and steps by hand."""

import functools
import math
import re
from typing import Any, NamedTuple

import optree
import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.func import grad, vmap
from torch.testing import assert_close
from zoo import F64, MODELS, randn, randn_like, seeded, stacked

import funcbayes as fb
from funcbayes import Fixed, Gaussian, curvature, laplace
from funcbayes._tree import map_named, named_leaves, parameters_of
from funcbayes.covariances import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPrecision
from funcbayes.curvature import Diag, Full, Kron, LowRank
from funcbayes.laplace import log_marginal_likelihood, maximize_evidence, minimize_validation_nll
from funcbayes.likelihoods import Bernoulli, Categorical, HeteroscedasticNormal, Normal, Poisson

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


# Trees as vectors: leaves in the order of the package, each of them row-major.


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in parameters_of(tree).values()])


def unflat(vector, like):
    leaves = parameters_of(like)
    parts = dict(zip(leaves, vector.split([leaf.numel() for leaf in leaves.values()]), strict=True))
    return map_named(lambda name, leaf: parts[name].reshape(leaf.shape) if name in parts else leaf, like)


def spread(numbers, like):
    """A number, or a tree of numbers or tensors, as one vector."""
    leaves = parameters_of(like)
    if isinstance(numbers, float | int | Tensor):
        return torch.cat(
            [torch.as_tensor(numbers, dtype=F64).expand(leaf.numel()) for leaf in leaves.values()]
        )
    given = named_leaves(numbers)
    return torch.cat(
        [torch.as_tensor(given[n], dtype=F64).expand(leaf.shape).reshape(-1) for n, leaf in leaves.items()]
    )


def dense(c):
    """A curvature as a matrix."""
    if isinstance(c, Full):
        return c.matrix
    if isinstance(c, Diag):
        return torch.diag(flat(c.diagonal))
    if isinstance(c, LowRank):
        vectors = torch.cat([v.reshape(-1, v.shape[-1]) for v in named_leaves(c.eigenvectors).values()])
        return vectors * c.eigenvalues @ vectors.mT
    if isinstance(c, Kron):
        sums = (named_leaves(t) for t in (c.output_sum, c.input_sum, c.count))
        outputs, inputs, counts = sums
        return torch.block_diag(
            *(torch.kron(matrix(outputs[n]), matrix(inputs[n])) / counts[n] for n in outputs)
        )
    values, outputs, inputs = (named_leaves(t) for t in (c.eigenvalues, c.output_basis, c.input_basis))
    blocks = []
    for name, block in values.items():
        sides = (outputs.get(name), inputs.get(name))
        one, two = (
            torch.eye(n, dtype=F64) if s is None else s.contiguous()
            for s, n in zip(sides, block.shape, strict=True)
        )
        basis = torch.kron(one, two)
        blocks.append(basis * block.reshape(-1) @ basis.mT)
    return torch.block_diag(*blocks)


def matrix(factor):
    return torch.diag(factor) if factor.ndim == 1 else factor


def tabled(names, table):
    return pytest.mark.parametrize(names, table.values(), ids=table.keys())


# Conjugate regression: with normal noise a model that is linear in its parameters has a Gaussian posterior.


class Regression(NamedTuple):
    """``y = design theta + noise``, at the mode of the posterior."""

    fn: Any
    params: Any
    data: tuple[Tensor, Tensor]
    design: Tensor  # (N C, P)
    precision: Tensor  # of the prior, (P,)
    prior_mean: Tensor  # (P,)
    noise_std: float

    @property
    def likelihood(self):
        return Normal(self.noise_std)

    @property
    def y(self):
        return self.data[1].reshape(-1)

    @property
    def posterior_precision(self):
        return self.design.mT @ self.design / self.noise_std**2 + torch.diag(self.precision)


def mode(design, y, precision, mean, noise_std):
    whole = design.mT @ design / noise_std**2 + torch.diag(precision)
    return torch.linalg.solve(whole, design.mT @ y / noise_std**2 + precision * mean)


def affine(params, x):
    return x @ params["w"].mT + params["b"]


def weights_only(params, x):
    return x @ params["w"].mT


def affine_design(x, num_outputs):
    """Rows ``(n, c)``; columns the bias, then the weight, as their names sort."""
    found = []
    for row in x:
        for c in range(num_outputs):
            own = torch.zeros(num_outputs, dtype=F64)
            own[c] = 1
            found.append(torch.cat([own, torch.outer(own, row).reshape(-1)]))
    return torch.stack(found)


MODULE, _ = fb.make_functional(nn.Linear(3, 2).double())
FORMS = {
    "number": lambda like: 1.7,
    "tensor": lambda like: torch.tensor(0.6, dtype=F64),
    "per_leaf": lambda like: map_named(lambda name, _: 0.5 + len(name) % 3 + 0.1 * ord(name[-1]) / 100, like),
    "per_leaf_tensors": lambda like: map_named(lambda name, leaf: torch.tensor(0.3 + leaf.ndim), like),
    "per_parameter": lambda like: map_named(lambda name, leaf: (leaf.detach() + 0.5).square() + 0.2, like),
}


def regression(kind="function", form="number", noise_std=0.5, num_rows=7, seed=0, temperature=1.0, shift=0.3):
    """A linear model with two outputs, as a function or as a module."""
    x, y = randn(num_rows, 3, seed=seed), randn(num_rows, 2, seed=seed + 1)
    like = {"w": randn(2, 3, seed=2), "b": randn(2, seed=3)}
    fn, names = affine, {"w": "w", "b": "b"}
    if kind == "module":
        fn, names = MODULE, {"w": "weight", "b": "bias"}
    like = {names[name]: leaf for name, leaf in like.items()}
    prior_mean = map_named(lambda name, leaf: shift * leaf, like)
    precision, mean = spread(FORMS[form](like), like), flat(prior_mean)
    design = affine_design(x, 2)
    found = mode(design, y.reshape(-1), precision, mean, noise_std * temperature**0.5)
    return Regression(fn, unflat(found, like), (x, y), design, precision, mean, noise_std)


def given(problem, **numbers):
    """The prior of a problem in the form that functions take."""
    tree = {"prior_precision": unflat(problem.precision, problem.params)}
    return {**tree, "prior_mean": unflat(problem.prior_mean, problem.params), **numbers}


def ggn(problem, structure="full", **options):
    options = {"rank": 20, "seed": 0, **options} if structure == "low_rank" else options
    return curvature.ggn(problem.fn, problem.params, problem.data, problem.likelihood, structure, **options)


def marginal(problem, precision=None, mean=None, noise_std=None):
    """The density of the data with parameters integrated out."""
    precision = problem.precision if precision is None else precision
    mean = problem.prior_mean if mean is None else mean
    noise_std = torch.as_tensor(problem.noise_std if noise_std is None else noise_std, dtype=F64)
    covariance = problem.design @ torch.diag(1 / precision) @ problem.design.mT
    noise = noise_std**2 * torch.eye(len(covariance), dtype=F64)
    return MultivariateNormal(problem.design @ mean, covariance + noise)


every_kind = pytest.mark.parametrize("kind", ["function", "module"])
every_form = pytest.mark.parametrize("form", FORMS)
EXACT = ["full", "low_rank"]
every_exact = pytest.mark.parametrize("structure", EXACT)


@every_exact
@every_kind
@every_form
def test_of_a_linear_model_the_posterior_is_that_of_conjugate_regression(kind, form, structure):
    problem = regression(kind, form)
    c = ggn(problem, structure)
    q = laplace.posterior(problem.params, c, **given(problem))
    assert_close(flat(q.mean), flat(problem.params), rtol=0, atol=0)
    assert_close(q.covariance.to_dense(), problem.posterior_precision.inverse())
    assert_close(q.covariance.logdet(), -problem.posterior_precision.logdet())
    assert_close(
        log_marginal_likelihood(problem.params, c, **given(problem)), marginal(problem).log_prob(problem.y)
    )


def test_the_diagonal_is_exact_where_columns_of_the_design_are_orthogonal():
    ones = torch.ones(4, dtype=F64)
    x = torch.stack([torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])], 1).double() * 0.7
    assert_close(x.mT @ ones, torch.zeros(2, dtype=F64))
    design, y = affine_design(x, 2), randn(4, 2)
    like = {"b": randn(2, seed=1), "w": randn(2, 2, seed=2)}
    precision, mean = spread(FORMS["per_parameter"](like), like), flat(randn_like(like, 5))
    params = unflat(mode(design, y.reshape(-1), precision, mean, 0.5), like)
    problem = Regression(affine, params, (x, y), design, precision, mean, 0.5)
    c = ggn(problem, "diag")
    q = laplace.posterior(params, c, **given(problem))
    assert_close(q.covariance.to_dense(), problem.posterior_precision.inverse())
    assert_close(log_marginal_likelihood(params, c, **given(problem)), marginal(problem).log_prob(problem.y))


@pytest.mark.parametrize("corrected", [False, True])
def test_a_kronecker_product_is_exact_for_one_matrix_of_weights(corrected):
    x, y = randn(7, 3), randn(7, 2, seed=1)
    design = affine_design(x, 2)[:, 2:]
    like, precision, mean = {"w": randn(2, 3)}, torch.full((6,), 1.3, dtype=F64), randn(6, seed=4)
    params = unflat(mode(design, y.reshape(-1), precision, mean, 0.5), like)
    problem = Regression(weights_only, params, (x, y), design, precision, mean, 0.5)
    c = ggn(problem, "kron", eigenvalue_correction=corrected)
    numbers = given(problem, prior_precision=1.3)
    q = laplace.posterior(params, c, **numbers)
    assert_close(q.covariance.to_dense(), problem.posterior_precision.inverse())
    assert_close(log_marginal_likelihood(params, c, **numbers), marginal(problem).log_prob(problem.y))


@every_exact
@pytest.mark.parametrize("of_what", ["prior_precision", "prior_mean", "noise_std"])
@every_kind
def test_the_evidence_of_a_linear_model_has_the_derivatives_of_the_marginal_density(kind, of_what, structure):
    # At the mode the derivative through the parameters is nothing, and the Hessian does not depend on them.
    problem = regression(kind, "per_parameter")
    c = ggn(problem, structure)
    start = {
        "prior_precision": problem.precision,
        "prior_mean": problem.prior_mean,
        "noise_std": torch.tensor(problem.noise_std, dtype=F64),
    }[of_what]

    def evidence(value):
        tree = value if of_what == "noise_std" else unflat(value, problem.params)
        return log_marginal_likelihood(problem.params, c, **given(problem, **{of_what: tree}))

    def density(value):
        name = {"prior_precision": "precision", "prior_mean": "mean"}.get(of_what, of_what)
        return marginal(problem, **{name: value}).log_prob(problem.y)

    one, two = (torch.autograd.functional.jacobian(f, start) for f in (evidence, density))
    assert_close(one, two)
    assert two.abs().min() > 1e-4
    assert_close(grad(evidence)(start), two)


def tempered(problem, temperature):
    """``log of the integral of p(D | theta) ** (1 / T) p(theta)``."""
    n, variance = len(problem.y), problem.noise_std**2
    found = marginal(problem, noise_std=problem.noise_std * temperature**0.5).log_prob(problem.y)
    return (
        found
        + n / 2 * torch.log(2 * math.pi * variance * temperature)
        - n / (2 * temperature) * math.log(2 * math.pi * variance)
    )


@every_exact
def test_a_temperature_is_a_power_of_the_likelihood(structure):
    temperature = torch.tensor(0.3, dtype=F64)
    problem = regression(form="per_leaf", temperature=0.3)
    c = ggn(problem, structure)

    def evidence(temperature):
        return log_marginal_likelihood(problem.params, c, temperature=temperature, **given(problem))

    assert_close(evidence(temperature), tempered(problem, temperature))
    assert_close(evidence(0.3), evidence(temperature))
    assert_close(grad(evidence)(temperature), grad(functools.partial(tempered, problem))(temperature))
    q = laplace.posterior(problem.params, c, temperature=0.3, **given(problem))
    expected = problem.design.mT @ problem.design / problem.noise_std**2 / 0.3 + torch.diag(problem.precision)
    assert_close(q.covariance.to_dense(), expected.inverse())


@every_exact
def test_another_noise_is_that_of_another_likelihood(structure):
    problem = regression(noise_std=0.5)
    other = problem._replace(noise_std=0.2)
    c, expected = ggn(problem, structure), ggn(other, structure)
    for noise in (0.2, torch.tensor(0.2, dtype=F64)):
        numbers = given(problem, noise_std=noise)
        q, theirs = (
            laplace.posterior(problem.params, c, **numbers),
            laplace.posterior(problem.params, expected, **given(problem)),
        )
        assert_close(q.covariance.to_dense(), theirs.covariance.to_dense())
        assert_close(
            log_marginal_likelihood(problem.params, c, **numbers),
            log_marginal_likelihood(problem.params, expected, **given(problem)),
        )


def test_the_density_and_draws_of_the_posterior_are_those_of_conjugate_regression():
    num_samples = 4000
    problem = regression("module", "per_leaf")
    q = laplace.posterior(problem.params, ggn(problem), **given(problem))
    exact = MultivariateNormal(flat(problem.params), precision_matrix=problem.posterior_precision)
    at = randn_like(problem.params, 3)
    assert_close(q.log_prob(at), exact.log_prob(flat(at)))
    draws = q.sample(num_samples, seed=0)
    rows = torch.cat([leaf.reshape(num_samples, -1) for leaf in named_leaves(draws).values()], 1)
    deviations, covariance = rows - exact.mean, exact.covariance_matrix
    variance = covariance.diagonal()
    assert (deviations.mean(0).abs() < 5 * (variance / num_samples).sqrt()).all()
    error = ((torch.outer(variance, variance) + covariance**2) / num_samples).sqrt()
    assert ((deviations.mT @ deviations / num_samples - covariance).abs() < 5 * error).all()


def test_scalar_parameters_and_outputs_without_an_axis_are_regressed_too():
    x, y = randn(6), randn(6, seed=1)

    def line(params, x):
        return params["slope"] * x + params["start"]

    design, precision = torch.stack([x, torch.ones(6, dtype=F64)], 1), torch.tensor([2.0, 0.5], dtype=F64)
    found = mode(design, y, precision, torch.zeros(2, dtype=F64), 0.4)
    params = {"slope": found[0], "start": found[1]}
    problem = Regression(line, params, (x, y), design, precision, torch.zeros(2, dtype=F64), 0.4)
    prior = {"slope": 2.0, "start": 0.5}
    for structure in EXACT:
        c = ggn(problem, structure)
        q = laplace.posterior(params, c, prior)
        assert_close(q.covariance.to_dense(), problem.posterior_precision.inverse())
        assert_close(log_marginal_likelihood(params, c, prior), marginal(problem).log_prob(y))
    for structure in ("diag", "kron"):
        q = laplace.posterior(params, ggn(problem, structure), prior)
        assert_close(q.covariance.to_dense(), torch.diag(1 / problem.posterior_precision.diagonal()))


# An old posterior as the prior.


def both_halves(structure, kind="function", **options):
    """Curvatures of two data sets at the mode of both, and the mode of the first."""
    problem = regression(kind, "number", num_rows=9)
    x, y = problem.data
    halves = [
        problem._replace(data=(x[s], y[s]), design=problem.design[2 * s.start : 2 * s.stop])
        for s in (slice(0, 4), slice(4, 9))
    ]
    first = mode(halves[0].design, halves[0].y, problem.precision, problem.prior_mean, problem.noise_std)
    return problem, *halves, unflat(first, problem.params)


@every_exact
@every_kind
def test_a_posterior_as_prior_of_more_data_is_the_posterior_of_all(kind, structure):
    whole, one, two, first = both_halves(structure, kind)
    old = laplace.posterior(first, ggn(one._replace(params=first), structure), **given(whole))
    q = laplace.posterior(whole.params, ggn(two, structure), prior=old)
    assert_close(q.covariance.to_dense(), whole.posterior_precision.inverse())
    assert_close(q.covariance.to_dense(), laplace.posterior(
        whole.params, ggn(one, structure) + ggn(two, structure), **given(whole)
    ).covariance.to_dense())  # fmt: skip
    # log p(A, B) = log p(A) + log p(B | A)
    of_first = log_marginal_likelihood(first, ggn(one._replace(params=first), structure), **given(whole))
    of_second = log_marginal_likelihood(whole.params, ggn(two, structure), prior=old)
    assert_close(of_first + of_second, marginal(whole).log_prob(whole.y))


@pytest.mark.parametrize("structure", ["diag", "low_rank"])
def test_diagonal_and_low_rank_curvatures_go_with_priors_of_both(structure):
    whole, one, two, _ = both_halves(structure)
    for earlier in ("diag", "low_rank"):
        before, after = ggn(one, earlier), ggn(two, structure)
        old = laplace.posterior(whole.params, before, **given(whole))
        q = laplace.posterior(whole.params, after, prior=old, temperature=0.7)
        factor = whole.noise_std**-2
        prior = dense(before) * factor + torch.diag(whole.precision)
        expected = prior + dense(after) * factor / 0.7
        assert_close(q.covariance.to_dense(), expected.inverse())
        assert_close(
            log_marginal_likelihood(whole.params, after, prior=old, temperature=0.7),
            expected_evidence(whole.params, after, prior, flat(old.mean), factor / 0.7, 0.7),
        )


def expected_evidence(params, c, prior, mean, factor, temperature=1.0, log_likelihood=None):
    """``log p(D|theta) / T - 1/2 [logdet P - logdet P0 + (theta - m0)^T P0 (theta - m0)]``."""
    whole, shift = factor * dense(c) + prior, flat(params) - mean
    log_likelihood = c.data.at() if log_likelihood is None else log_likelihood
    return log_likelihood / temperature - 0.5 * (whole.logdet() - prior.logdet() + shift @ prior @ shift)


PRIORS = {
    "diagonal": lambda like: Diagonal(map_named(lambda name, leaf: leaf.square() + 0.1, like)),
    "low_rank_plus_diagonal": lambda like: LowRankPlusDiagonal(
        map_named(lambda name, leaf: leaf.square() + 0.1, like), zoo.factors(like, 2)
    ),
    "low_rank_precision": lambda like: LowRankPrecision(
        map_named(lambda name, leaf: leaf.square() + 0.1, like), zoo.factors(like, 2)
    ),
    "kronecker": lambda like: zoo.kronecker(zoo.Model(None, like, None, None, "")).covariance,
    "dense": lambda like: Dense(
        unflat_columns(
            torch.eye(len(flat(like)), dtype=F64) + 0.3 * randn(*2 * [len(flat(like))]).tril(), like
        )
    ),
}


def unflat_columns(columns, like):
    leaves = parameters_of(like)
    parts = dict(zip(leaves, columns.split([leaf.numel() for leaf in leaves.values()]), strict=True))
    return map_named(lambda name, leaf: parts[name].reshape(*leaf.shape, -1), like)


@tabled("make", PRIORS)
@pytest.mark.parametrize("name", ["function", "long_list"])
def test_a_full_curvature_goes_with_every_prior(name, make):
    if name == "function":
        fn, params, data = affine, {"w": randn(2, 3), "b": randn(2)}, (randn(5, 3), randn(5, 2))
    else:  # of whose paths "10" sorts before "2", but is after it
        fn, params, data = chained, chain(), (randn(5, 2), randn(5, 2, seed=1))
    old = Gaussian(randn_like(params, 8), make(randn_like(params, 9)))
    c = curvature.ggn(fn, params, data, Normal(0.5), "full")
    q = laplace.posterior(params, c, prior=old)
    prior = old.covariance.to_dense().inverse()
    expected = prior + 4 * dense(c)
    assert_close(q.covariance.to_dense(), expected.inverse())
    assert_close(
        log_marginal_likelihood(params, c, prior=old),
        expected_evidence(params, c, prior, flat(old.mean), 4.0),
    )


def chained(params, x):
    """Twelve layers of different sizes in a list."""
    for i, leaf in enumerate(params):
        x = torch.tanh(x @ leaf if leaf.ndim == 2 else x * leaf) + 0.1 * i
    return x


def chain():
    return [randn(2, seed=i) if i % 3 else 0.7 * randn(2, 2, seed=i) for i in range(12)]


# A Kronecker prior: a sum of two products is none.


def kronecker_pair(same_bases):
    """A curvature, and a prior whose eigenbases are those of the curvature, or others."""
    model = MODELS["mlp"]()
    c = classifier_curvature(model, "kron")
    other = c if same_bases else classifier_curvature(model, "kron", seed=5)
    values = map_named(lambda name, leaf: leaf.flip(0) + 0.3 * leaf.square() + 0.7, other.eigen.eigenvalues)
    variance = {name: 1 / values[name].reshape(leaf.shape) for name, leaf in model.params.items()}
    covariance = Kronecker(variance, other.eigen.output_basis, other.eigen.input_basis)
    return model, c, Gaussian(randn_like(model.params, 4), covariance)


def test_a_kronecker_prior_in_the_eigenbases_of_the_curvature_is_added_exactly():
    model, c, old = kronecker_pair(same_bases=True)
    q = laplace.posterior(model.params, c, prior=old, temperature=0.5)
    prior = old.covariance.to_dense().inverse()
    assert_close(q.covariance.to_dense(), (prior + 2 * dense(c)).inverse())
    assert_close(
        log_marginal_likelihood(model.params, c, prior=old, temperature=0.5),
        expected_evidence(model.params, c, prior, flat(old.mean), 2.0, 0.5),
    )


def test_a_kronecker_prior_in_other_eigenbases_is_projected_on_the_basis_of_the_partial_traces():
    model, c, old = kronecker_pair(same_bases=False)
    q = laplace.posterior(model.params, c, prior=old)
    prior = old.covariance.to_dense().inverse()
    total, start = dense(c) + prior, 0
    for name, leaf in named_leaves(model.params).items():
        size = leaf.numel()
        block = total[start : start + size, start : start + size]
        start += size
        sides = (len(leaf), size // len(leaf))
        whole = block.reshape(*sides, *sides)
        outputs, inputs = (
            torch.linalg.eigh(torch.einsum(e, whole)).eigenvectors for e in ("aibi", "aiaj->ij")
        )
        basis = torch.kron(outputs, inputs)
        values = (basis.mT @ block @ basis).diagonal()
        found = fb.restrict(q, name).covariance.to_dense()
        assert_close(found.inverse(), basis * values @ basis.mT)
        # No other eigenvalues in that basis are closer.
        distance = (found.inverse() - block).norm()
        for seed in range(3):
            other = basis * (values + 0.01 * randn(size, seed=seed)) @ basis.mT
            assert (other - block).norm() > distance
    assert_close(
        log_marginal_likelihood(model.params, c, prior=old),
        c.data.at()
        - 0.5
        * (
            -q.covariance.logdet()
            - prior.logdet()
            + (flat(model.params) - flat(old.mean)) @ prior @ (flat(model.params) - flat(old.mean))
        ),
    )


def test_kronecker_posteriors_in_turn_are_that_of_all_the_data_where_it_is_a_product():
    x, y = randn(9, 3), randn(9, 2, seed=1)
    params = {"w": randn(2, 3)}
    ones = torch.ones(9, dtype=F64)
    ones[4:] = -1
    x = torch.linalg.qr(x).Q  # halves with covariances that commute
    x[4:] = x[:5]
    halves = [(x[:5], y[:5]), (x[4:], y[4:])]
    c = [curvature.ggn(weights_only, params, half, Normal(1.0), "kron") for half in halves]
    old = laplace.posterior(params, c[0], 0.6)
    q = laplace.posterior(params, c[1], prior=old)
    expected = laplace.posterior(params, c[0] + c[1], 0.6)
    assert_close(q.covariance.to_dense(), expected.covariance.to_dense())


# Every structure, for networks.

STRUCTURES = {
    "diag": {"structure": "diag"},
    "kron": {"structure": "kron"},
    "ekfac": {"structure": "kron", "eigenvalue_correction": True},
    "low_rank": {"structure": "low_rank", "rank": 4, "seed": 0},
    "full": {"structure": "full"},
}
every_structure = tabled("options", STRUCTURES)
NETWORKS = ("linear", "nested", "mlp", "conv", "norms", "keywords", "tied")
every_network = pytest.mark.parametrize("name", NETWORKS)


def classes(model, num_rows=4, seed=0):
    """Inputs and labels."""
    x = model.inputs(num_rows)
    outputs = model.fn(model.params, x)
    shape = (*outputs.shape[:-1],)
    return x, torch.randint(outputs.shape[-1], shape, generator=seeded(seed))


def classifier_curvature(model, structure="kron", where=None, seed=0, num_rows=4, **options):
    x, y = classes(model, num_rows)
    if seed:
        x = optree.tree_map(lambda leaf: leaf + randn(*leaf.shape, seed=seed), x)
    return curvature.ggn(model.fn, model.params, (x, y), Categorical(), structure, where, **options)


@every_structure
@every_network
def test_the_posterior_is_the_inverse_of_curvature_and_prior(name, options):
    model = MODELS[name]()
    c = classifier_curvature(model, **options)
    for form, make in FORMS.items():
        if form == "per_parameter" and options["structure"] == "kron":
            continue
        numbers, mean = make(model.params), randn_like(model.params, 2)
        q = laplace.posterior(model.params, c, numbers, mean, temperature=0.4)
        prior = torch.diag(spread(numbers, model.params))
        expected = dense(c) / 0.4 + prior
        assert_close(q.covariance.to_dense(), expected.inverse(), rtol=1e-6, atol=1e-9)
        assert_close(q.covariance.logdet(), -expected.logdet())
        assert_close(flat(q.mean), flat(model.params), rtol=0, atol=0)
        assert q.linearized
        assert_close(
            log_marginal_likelihood(model.params, c, numbers, mean, temperature=0.4),
            expected_evidence(model.params, c, prior, flat(mean), 1 / 0.4, 0.4, log_likelihood(model)),
        )


def log_likelihood(model):
    x, y = classes(model)
    return -nn.functional.cross_entropy(
        model.run(model.params, x).flatten(0, -2), y.flatten(), reduction="sum"
    ).detach()


@every_structure
def test_means_of_the_prior_come_in_every_form(options):
    model = MODELS["nested"]()
    c = classifier_curvature(model, **options)
    prior = torch.diag(spread(0.8, model.params))
    for mean in (0.4, -1, torch.tensor(0.2), *(make(model.params) for make in list(FORMS.values())[2:])):
        expected = expected_evidence(model.params, c, prior, spread(mean, model.params), 1.0)
        assert_close(log_marginal_likelihood(model.params, c, 0.8, mean), expected)


STRUCTURE_OF = {
    "diag": Diagonal,
    "kron": Kronecker,
    "ekfac": Kronecker,
    "low_rank": LowRankPrecision,
    "full": Dense,
}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_structure_has_its_covariance(structure):
    model = MODELS["mlp"]()
    q = laplace.posterior(model.params, classifier_curvature(model, **STRUCTURES[structure]))
    assert type(q.covariance) is STRUCTURE_OF[structure]
    other = laplace.posterior(
        model.params, classifier_curvature(model, **STRUCTURES[structure]), linearized=False
    )
    assert not other.linearized


@every_structure
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("mlp", "4.*"),
        ("mlp", ["0.weight", "4.bias"]),
        ("nested", "2*"),
        ("conv", lambda n, leaf: leaf.ndim > 1),
    ],
    ids=["head", "globs", "nested", "predicate"],
)
def test_a_posterior_over_some_leaves_is_that_with_the_others_held(name, where, options):
    model = MODELS[name]()
    c = classifier_curvature(model, where=where, **options)
    q = laplace.posterior(model.params, c, 0.7)
    covered = parameters_of(q.mean)
    assert 0 < len(covered) < len(parameters_of(model.params))
    assert set(covered) == set(c.leaves)
    assert_close(q.covariance.to_dense(), (dense(c) + 0.7 * torch.eye(len(dense(c)))).inverse())
    if options["structure"] == "full":  # of the whole matrix it is the block
        whole = dense(classifier_curvature(model, "full"))
        chosen = torch.cat(
            [torch.full((leaf.numel(),), n in covered) for n, leaf in parameters_of(model.params).items()]
        )
        assert_close(dense(c), whole[chosen][:, chosen])
    assert fb.predict(model.fn, model.params, q, model.inputs(3), num_samples=2, seed=0).samples.ndim == 3
    # The prior may be given for more leaves than are covered.
    tree = map_named(lambda name, leaf: 0.7, model.params)
    assert_close(laplace.posterior(model.params, c, tree).covariance.to_dense(), q.covariance.to_dense())


def fixed(model):
    """Parameters with the statistics of BatchNorm beside them."""
    return {**model.params, **{name: Fixed(b.abs() + 0.5) for name, b in model.buffers.items()}}


@every_structure
def test_statistics_of_batch_norm_are_held_and_belong_to_every_draw(options):
    model = MODELS["conv"]()
    params, (x, y) = fixed(model), classes(model)
    c = curvature.ggn(model.fn, params, (x, y), Categorical(), **options)
    q = laplace.posterior(params, c, 0.7)
    assert set(q.mean) == set(params)
    assert set(c.leaves) == set(model.params)
    held = {**params, **q.sample(1, seed=0)}
    assert all(torch.equal(held[n].tensor[0], params[n].tensor) for n in model.buffers)
    assert_close(q.covariance.to_dense(), (dense(c) + 0.7 * torch.eye(len(dense(c)))).inverse())
    assert_close(
        fb.predict(model.fn, None, q, x, num_samples=3, seed=0).samples,
        zoo.expected_samples(model, q, x, 3, 0),
    )
    some = laplace.posterior(
        params, curvature.ggn(model.fn, params, (x, y), Categorical(), where="0.*", **options)
    )
    assert set(some.mean) == {"0.weight", "0.bias"}


# Conventions.


def scores(fn, params, x, y, likelihood):
    """Gradients of the log likelihood of each row, ``(N, P)``."""
    return torch.stack(
        [
            flat(grad(lambda p, n=n: likelihood.log_prob(fn(p, x[n : n + 1]), y[n : n + 1]).sum())(params))
            for n in range(len(x))
        ]
    )


@pytest.mark.parametrize("noise_std", [None, 0.2, 1.5])
def test_a_posterior_of_the_empirical_fisher_is_that_of_scores_with_the_noise_there_is(noise_std):
    model = MODELS["mlp"]()
    x, y = model.inputs(5), randn(5, 2)
    c = curvature.empirical_fisher(model.fn, model.params, (x, y), Normal(0.5), "full")
    used = Normal(0.5 if noise_std is None else noise_std)
    found = scores(model.fn, model.params, x, y, used)
    prior, h = torch.diag(spread(0.7, model.params)), found.mT @ found
    q = laplace.posterior(model.params, c, 0.7, noise_std=noise_std, temperature=0.6)
    assert_close(q.covariance.to_dense(), (h / 0.6 + prior).inverse())
    expected = used.log_prob(model.fn(model.params, x), y).sum() / 0.6 - 0.5 * (
        (h / 0.6 + prior).logdet() - prior.logdet() + 0.7 * flat(model.params).square().sum()
    )
    got = log_marginal_likelihood(model.params, c, 0.7, noise_std=noise_std, temperature=0.6)
    assert_close(got, expected.detach())


def test_noise_that_differs_by_output_is_in_the_curvature():
    noise = torch.tensor([0.3, 2.0], dtype=F64)
    problem = regression(noise_std=1.0)
    x, y = problem.data
    rows = noise.repeat(len(x))
    whole = problem.design.mT @ (problem.design / rows[:, None] ** 2) + torch.diag(problem.precision)
    right = problem.design.mT @ (problem.y / rows**2) + problem.precision * problem.prior_mean
    params = unflat(torch.linalg.solve(whole, right), problem.params)
    c = curvature.ggn(affine, params, (x, y), Normal(noise), "full")
    q = laplace.posterior(params, c, **given(problem))
    assert_close(q.covariance.to_dense(), whole.inverse())
    covariance = problem.design @ torch.diag(1 / problem.precision) @ problem.design.mT + torch.diag(rows**2)
    expected = MultivariateNormal(problem.design @ problem.prior_mean, covariance).log_prob(problem.y)
    assert_close(log_marginal_likelihood(params, c, **given(problem)), expected)
    found = maximize_evidence(params, c)
    assert found.noise_std is None


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_a_posterior_of_the_hessian_is_the_second_derivative_at_the_mode(structure):
    model = MODELS["mlp"]()
    data = classes(model)
    c = curvature.hessian(model.fn, model.params, data, Categorical(), structure)

    def loss(vector):
        outputs = model.fn(unflat(vector, model.params), data[0])
        return nn.functional.cross_entropy(outputs, data[1], reduction="sum")

    h = torch.autograd.functional.hessian(loss, flat(model.params))
    assert torch.linalg.eigvalsh(h)[0] < -1e-3  # indefinite
    expected = h + 9 * torch.eye(len(h))
    if structure == "diag":
        expected = torch.diag(expected.diagonal())
    q = laplace.posterior(model.params, c, 9.0, linearized=False)
    assert_close(q.covariance.to_dense(), expected.inverse())
    evidence = log_marginal_likelihood(model.params, c, 9.0)
    assert_close(evidence, expected_evidence(model.params, c, 9 * torch.eye(len(h)).double(), 0.0, 1.0))
    assert_close(c.data.at(), log_likelihood(model))


OTHERS = {
    "bernoulli": lambda f: (Bernoulli(), (f > 0.1).to(F64)),
    "poisson": lambda f: (Poisson(), f.abs().round()),
    "heteroscedastic": lambda f: (HeteroscedasticNormal(), f[:, :1] + 0.3),
}


@tabled("make", OTHERS)
@every_structure
def test_other_likelihoods_have_posteriors_and_evidence(options, make):
    model = MODELS["mlp"]()
    x = model.inputs(4)
    outputs = model.fn(model.params, x)
    likelihood, y = make(outputs)
    c = curvature.ggn(model.fn, model.params, (x, y), likelihood, **options)
    prior = torch.diag(spread(0.7, model.params))
    q = laplace.posterior(model.params, c, 0.7)
    assert_close(q.covariance.to_dense(), (dense(c) + prior).inverse(), rtol=1e-6, atol=1e-9)
    expected = expected_evidence(
        model.params, c, prior, 0.0, 1.0, log_likelihood=likelihood.log_prob(outputs, y).sum()
    )
    assert_close(log_marginal_likelihood(model.params, c, 0.7), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_structure
def test_dtypes_of_parameters_are_those_of_the_posterior(options, dtype):
    model = MODELS["mlp"]()
    params = fb.to(model.params, dtype=dtype)
    x, y = classes(model)
    c = curvature.ggn(model.fn, params, (x.to(dtype), y), Categorical(), **options)
    q = laplace.posterior(params, c, 2.0)
    assert {leaf.dtype for tree in (q.mean, q.variance, q.sample(2, seed=0)) for leaf in tree.values()} == {
        dtype
    }
    evidence = log_marginal_likelihood(params, c, 2.0)
    assert evidence.dtype is torch.float32  # of a sum over data bfloat16 has not enough digits
    exact = classifier_curvature(model, **options)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert_close(
        flat(q.variance).double(), flat(laplace.posterior(model.params, exact, 2.0).variance),
        rtol=tolerance, atol=0,
    )  # fmt: skip
    assert_close(evidence.double(), log_marginal_likelihood(model.params, exact, 2.0), rtol=tolerance, atol=0)
    found = maximize_evidence(params, c, per="leaf")
    assert {n.dtype for n in named_leaves(found.prior_precision).values()} == {dtype}
    assert found.log_marginal_likelihood.dtype is torch.float32


# Under transforms, and with zeros.


@every_structure
def test_evidence_can_be_mapped_and_differentiated(options):
    model = MODELS["mlp"]()
    c = classifier_curvature(model, **options)
    numbers = torch.tensor([0.3, 1.0, 4.0], dtype=F64)

    def evidence(number):
        return log_marginal_likelihood(model.params, c, number)

    expected = torch.stack([evidence(n) for n in numbers])
    assert_close(vmap(evidence)(numbers), expected)
    step = 1e-5
    slopes = torch.stack([(evidence(n + step) - evidence(n - step)) / (2 * step) for n in numbers])
    assert_close(vmap(grad(evidence))(numbers), slopes, rtol=1e-6, atol=1e-8)

    def by_leaf(vector):
        tree = dict(zip(sorted(model.params), vector, strict=True))
        return log_marginal_likelihood(model.params, c, tree)

    vector = torch.linspace(0.5, 2, len(model.params), dtype=F64)
    found = grad(by_leaf)(vector)
    for i in range(len(vector)):
        moved = step * torch.eye(len(vector), dtype=F64)[i]
        slope = (by_leaf(vector + moved) - by_leaf(vector - moved)) / (2 * step)
        assert_close(found[i], slope, rtol=1e-6, atol=1e-8)


@every_structure
def test_the_posterior_is_differentiable_in_the_prior(options):
    model = MODELS["mlp"]()
    c = classifier_curvature(model, **options)

    def total(number):
        return flat(laplace.posterior(model.params, c, number).variance).sum()

    number = torch.tensor(0.8, dtype=F64)
    expected = -(dense(c) + 0.8 * torch.eye(len(dense(c)))).inverse().square().sum()
    assert_close(torch.autograd.functional.jacobian(total, number), expected, rtol=1e-6, atol=1e-9)


def regression_curvature(model, options, noise_std=0.5):
    return curvature.ggn(model.fn, model.params, (model.inputs(4), randn(4, 2)), Normal(noise_std), **options)


def test_eigenvalues_that_are_zero_leave_derivatives_finite():
    model = MODELS["mlp"]()
    c = regression_curvature(model, STRUCTURES["low_rank"]).padded(6)
    slope = grad(lambda s: log_marginal_likelihood(model.params, c, noise_std=s))(
        torch.tensor(0.5, dtype=F64)
    )
    expected = grad(
        lambda s: log_marginal_likelihood(
            model.params, regression_curvature(model, STRUCTURES["low_rank"]), noise_std=s
        )
    )(torch.tensor(0.5, dtype=F64))
    assert_close(slope, expected)


def test_curvatures_of_low_rank_that_add_to_a_lower_rank_make_a_posterior():
    model = MODELS["mlp"]()
    c = classifier_curvature(model, **STRUCTURES["low_rank"])
    twice = c + c + c
    q = laplace.posterior(model.params, twice, 0.5)
    expected = 3 * dense(c) + 0.5 * torch.eye(len(dense(c)))
    assert_close(q.covariance.to_dense(), expected.inverse(), rtol=1e-6, atol=1e-9)
    prior = torch.diag(spread(0.5, model.params))
    got = log_marginal_likelihood(model.params, twice, 0.5)
    assert_close(got, expected_evidence(model.params, c, prior, 0.0, 3.0, log_likelihood=3 * c.data.at()))


def test_units_that_are_dead_keep_the_prior():
    fn, _ = fb.make_functional(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double())
    params = {"0.weight": randn(3, 2), "0.bias": torch.tensor([0.0, 0.0, -50.0], dtype=F64)}
    params |= {"2.weight": randn(2, 3, seed=1), "2.bias": randn(2, seed=2)}
    data = randn(6, 2), torch.arange(6) % 2
    for options in STRUCTURES.values():
        q = laplace.fit(fn, params, data, Categorical(), prior_precision=0.25, **options)
        assert_close(q.variance["0.weight"][2], torch.full((2,), 4.0, dtype=F64))
        assert_close(q.variance["2.weight"][:, 2], torch.full((2,), 4.0, dtype=F64))
        assert all(leaf.isfinite().all() for leaf in q.sample(3, seed=0).values())


# Choosing by evidence.


def naive_evidence(params, c, precision, noise_std, mean=0.0, temperature=1.0):
    """With the squared residuals that a curvature of unit noise carries."""
    term = c.data
    log_likelihood = -0.5 * term.squared_residuals / noise_std**2 - term.num_terms * torch.log(
        noise_std * math.sqrt(2 * math.pi)
    )
    prior = torch.diag(precision)
    return expected_evidence(
        params, c, prior, mean, noise_std**-2 / temperature, temperature, log_likelihood=log_likelihood
    )


def of_groups(logs, params, per):
    """Logarithms of precisions as one vector of precisions."""
    sizes = [leaf.numel() for leaf in parameters_of(params).values()]
    if per == "model":
        return logs.exp().expand(sum(sizes))
    return torch.cat([log.exp().expand(n) for log, n in zip(logs, sizes, strict=True)])


def chosen_logs(numbers, per):
    return torch.stack([numbers] if per == "model" else list(named_leaves(numbers).values())).log()


@pytest.mark.parametrize("per", ["model", "leaf"])
@pytest.mark.parametrize("tune_noise", [True, False])
@every_structure
def test_where_the_evidence_is_largest_its_derivatives_are_zero_and_no_point_around_is_better(
    options, tune_noise, per
):
    problem = regression("module", num_rows=30, noise_std=0.8)
    c = ggn(problem, **options)
    found = maximize_evidence(
        problem.params, c, per=per, tune_noise=tune_noise, prior_mean=0.1, temperature=0.7
    )
    noise = torch.tensor(0.8, dtype=F64) if not tune_noise else found.noise_std
    assert_close(found.noise_std, noise)
    logs = torch.cat([chosen_logs(found.prior_precision, per), noise.log().reshape(1)])

    def naive(logs):
        precision = of_groups(logs[:-1], problem.params, per)
        return naive_evidence(problem.params, c, precision, logs[-1].exp(), 0.1, 0.7)

    assert_close(found.log_marginal_likelihood, naive(logs))
    slopes = grad(naive)(logs)
    assert slopes[:-1].abs().max() < 1e-4
    assert not tune_noise or slopes[-1].abs() < 1e-4
    for seed in range(40):  # near and far
        step = randn(len(logs), seed=seed) * 10 ** (-2 + 0.075 * seed)
        if not tune_noise:
            step[-1] = 0
        assert naive(logs + step) < naive(logs)


def test_on_a_dense_grid_no_prior_and_noise_are_better():
    problem = regression(num_rows=30, shift=0.0)
    c = ggn(problem)
    found = maximize_evidence(problem.params, c)
    values = [
        naive_evidence(problem.params, c, p.expand(8), s)
        for p in torch.logspace(-3, 3, 25, dtype=F64)
        for s in torch.logspace(-1.5, 1, 25, dtype=F64)
    ]
    best = max(values)
    assert best < found.log_marginal_likelihood < best + 0.5
    assert 1e-2 < found.prior_precision < 1e3


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_one_precision_for_each_parameter_is_the_root_of_its_quadratic(scale):
    # d/d delta of 1/2 [log delta - log(h + delta) - delta theta^2] = 0.
    model = MODELS["mlp"]()
    params = map_named(lambda name, leaf: scale * leaf, model.params)
    c = curvature.ggn(model.fn, params, (model.inputs(20), randn(20, 2)), Normal(0.3), "diag")
    found = maximize_evidence(params, c, per="parameter", tune_noise=False, num_steps=300)
    h, squares = flat(c.diagonal) / 0.09, flat(params).square()
    a, b = squares * h, squares
    expected = (-a + (a.square() + 4 * b * h).sqrt()) / (2 * b)
    assert_close(b * expected.square() + a * expected, h)
    assert_close(flat(found.prior_precision), expected, rtol=1e-2, atol=0)
    naive = naive_evidence(params, c, expected, torch.tensor(0.3, dtype=F64))
    assert_close(found.log_marginal_likelihood, naive, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("structure", ["diag", "full", "low_rank"])
def test_parameters_at_the_mean_of_the_prior_get_a_precision_that_is_bounded(structure):
    problem = regression(num_rows=30, shift=0.0)
    params = {**problem.params, "w": problem.params["w"].clone()}
    params["w"][0, 1] = 0.0
    c = ggn(problem._replace(params=params), structure)
    found = maximize_evidence(params, c, per="parameter")
    precision = found.prior_precision["w"]
    assert precision.isfinite().all()
    assert precision[0, 1] > 100 * precision[0, 0]
    assert precision.max() < 1.1e10
    assert found.log_marginal_likelihood.isfinite()
    q = laplace.posterior(params, c, found.prior_precision, noise_std=found.noise_std)
    assert all(leaf.isfinite().all() for leaf in q.sample(3, seed=0).values())


@pytest.mark.parametrize("where", [0.0, "everywhere"])
def test_a_network_that_says_nothing_has_a_bounded_precision(where):
    params = {"w": torch.zeros(2, 3, dtype=F64), "b": torch.zeros(2, dtype=F64)}
    c = curvature.ggn(affine, params, (randn(9, 3), randn(9, 2)), Normal(1.0), "kron")
    for per in ("model", "leaf"):
        found = maximize_evidence(params, c, per=per)
        numbers = torch.stack([torch.as_tensor(n) for n in named_leaves(found.prior_precision).values()])
        assert (numbers > 1e3).all()
        assert (numbers < 1.1e10).all()


def test_precisions_are_found_from_far_away():
    problem = regression(num_rows=30)
    c = ggn(problem)
    expected = maximize_evidence(problem.params, c)
    for start, noise in ((1e-6, 10.0), (1e6, 0.01), (1e8, 100.0)):
        found = maximize_evidence(problem.params, c, prior_precision=start, noise_std=noise)
        assert_close(found.prior_precision, expected.prior_precision, rtol=1e-3, atol=0)
        assert_close(found.noise_std, expected.noise_std, rtol=1e-3, atol=0)


def test_many_data_and_a_weak_prior_are_no_trouble():
    x = 100 * randn(4000, 3)
    y = x @ randn(2, 3, seed=1).T * 1e3 + randn(4000, 2, seed=2)
    params = {"w": 1e3 * randn(2, 3, seed=1), "b": torch.zeros(2, dtype=F64)}
    for options in STRUCTURES.values():
        c = curvature.ggn(affine, params, (x, y), Normal(1.0), **options)
        for per in ("model", "leaf"):
            found = maximize_evidence(params, c, per=per)
            assert_close(found.noise_std, torch.tensor(1.0, dtype=F64), rtol=0.05, atol=0)
            numbers = found.prior_precision if per == "model" else found.prior_precision["w"]
            assert_close(numbers, 1 / params["w"].square().mean(), rtol=0.5, atol=0)


def test_rounding_in_single_precision_does_not_make_a_curvature_indefinite():
    x = randn(100, 3)  # fewer rows than parameters
    fn, _ = fb.make_functional(nn.Sequential(nn.Linear(3, 30), nn.Tanh(), nn.Linear(30, 1)))
    params = {
        "0.weight": randn(30, 3),
        "0.bias": randn(30),
        "2.weight": 0.2 * randn(1, 30),
        "2.bias": randn(1),
    }
    data = x, torch.sin(x.sum(1, keepdim=True))
    exact = curvature.ggn(fn, params, data, Normal(0.1), "full")
    rounded = fb.to((params, data), dtype=torch.float32)
    c = curvature.ggn(fn, *rounded, Normal(0.1), "full")
    assert torch.linalg.eigvalsh(c.matrix.double())[0] * 100 < -1e-4  # or this would say little
    per_leaf = dict.fromkeys(params, 1e-4) | {"2.bias": 1.1e-4}
    for numbers in (1e-4, per_leaf):
        q = laplace.posterior(rounded[0], c, numbers)
        assert all(leaf.isfinite().all() for leaf in q.sample(2, seed=0).values())
        evidence = log_marginal_likelihood(rounded[0], c, numbers).double()
        assert_close(evidence, log_marginal_likelihood(params, exact, numbers), rtol=5e-3, atol=0)
    for per in ("model", "leaf"):
        found = maximize_evidence(rounded[0], c, per=per, prior_precision=1e-4)
        assert found.log_marginal_likelihood.isfinite()
    held = minimize_validation_nll(fn, rounded[0], c, rounded[1], Normal(0.1), grid=[1e-4, 1.0])
    assert held.nll.isfinite().all()


def test_nothing_of_what_is_chosen_has_a_graph():
    problem = regression()
    params = map_named(lambda name, leaf: leaf.clone().requires_grad_(), problem.params)
    c = ggn(problem._replace(params=params))
    start = torch.tensor(2.0, dtype=F64, requires_grad=True)
    for grad_mode in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with grad_mode:
            found = maximize_evidence(params, c, prior_precision=start, per="leaf")
        tensors = [
            *named_leaves(found.prior_precision).values(),
            found.noise_std,
            found.log_marginal_likelihood,
        ]
        assert not any(t.requires_grad for t in tensors)
    assert start.grad is None
    assert all(leaf.grad is None for leaf in params.values())


@every_structure
def test_inference_mode_leaves_a_curvature_that_can_be_tuned(options):
    model = MODELS["mlp"]()
    c = regression_curvature(model, options)
    expected = maximize_evidence(model.params, regression_curvature(model, options), per="leaf")
    with torch.inference_mode():
        params = optree.tree_map(torch.clone, model.params)
        laplace.posterior(params, c)
        log_marginal_likelihood(params, c)
        inside = maximize_evidence(params, c, per="leaf")
    for found in (inside, maximize_evidence(params, c, per="leaf")):
        assert_close(found.log_marginal_likelihood, expected.log_marginal_likelihood)
        assert_close(found.prior_precision, expected.prior_precision)


# Choosing by held-out data.


def three_classes():
    return zoo.from_module(
        lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)), zoo.rows(3), "2"
    )


HELD_OUT = {**MODELS, "three": three_classes}
VALIDATION = {
    "probit": (Categorical, {}),
    "bridge": (Categorical, {"link": "bridge"}),
    "bridge_norm": (Categorical, {"link": "bridge_norm"}),
    "mc": (Categorical, {"link": "mc", "num_samples": 30, "seed": 3}),
    "normal": (lambda: Normal(0.4), {}),
    "normal_with_another_noise": (lambda: Normal(0.4), {"noise_std": 0.9}),
    "bernoulli": (Bernoulli, {}),
    "bernoulli_mc": (Bernoulli, {"link": "mc", "num_samples": 30, "seed": 3}),
}


def targets(likelihood, outputs, seed=0):
    if isinstance(likelihood, Categorical):
        return torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=seeded(seed))
    noisy = outputs + randn(*outputs.shape, seed=seed)
    return (noisy > 0).to(F64) if isinstance(likelihood, Bernoulli) else noisy


def validated():
    """Every likelihood and link with one model, and each of some with the others."""
    cases = {"three": (None, VALIDATION), "residual": ("7.*", ("probit", "bernoulli_mc", "normal"))}
    cases["keywords"] = (None, ("bridge", "mc", "normal_with_another_noise"))
    return [(name, where, kind) for name, (where, kinds) in cases.items() for kind in kinds]


@pytest.mark.parametrize(("name", "where", "kind"), validated())
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_best_of_a_grid_is_found_as_by_a_loop_over_posteriors(name, where, structure, kind):
    make, options = VALIDATION[kind]
    model, likelihood = HELD_OUT[name](), make()
    x, held = model.inputs(5), model.inputs(7)
    y = targets(likelihood, model.fn(model.params, x))
    y_held = targets(likelihood, model.fn(model.params, held), 1)
    c = curvature.ggn(model.fn, model.params, (x, y), likelihood, where=where, **STRUCTURES[structure])
    grid = torch.tensor([0.03, 0.5, 4.0, 50.0], dtype=F64)
    found = minimize_validation_nll(
        model.fn, model.params, c, (held, y_held), likelihood, grid=grid, temperature=0.8, **options
    )
    options = dict(options)
    noise = options.pop("noise_std", None)
    expected = []
    for number in grid:
        q = laplace.posterior(model.params, c, number, noise_std=noise, temperature=0.8)
        prediction = fb.predict_linearized(
            *(model.fn, model.params, q, held),
            likelihood=likelihood if noise is None else Normal(noise),
            **options,
        )
        expected.append(-prediction.log_prob(y_held).mean())
    expected = torch.stack(expected)
    assert_close(found.nll, expected, rtol=1e-6, atol=1e-8)
    assert_close(expected[grid == found.prior_precision][0], expected.min())
    assert_close(found.grid, grid)
    if options.get("link") != "bridge" or name == "three":  # of two classes the variances have no part in it
        assert expected.max() - expected.min() > 1e-4
    if not options:  # and batch by batch
        batches = [(entry_rows(held, s), y_held[s]) for s in (slice(0, 3), slice(3, 7))]
        again = minimize_validation_nll(
            model.fn,
            model.params,
            c,
            batches,
            likelihood,
            grid=grid.tolist(),
            temperature=0.8,
            noise_std=noise,
        )
        assert_close(again.nll, found.nll)


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
def test_the_noise_of_the_likelihood_is_that_of_the_posterior_too(kind):
    model = HELD_OUT["three"]()
    data, held = ((model.inputs(n), randn(n, 3, seed=n)) for n in (5, 7))
    scores = []
    for noise_std in (0.4, 0.9):
        c = getattr(curvature, kind)(model.fn, model.params, data, Normal(noise_std), "full")
        scores.append(minimize_validation_nll(model.fn, model.params, c, held, Normal(0.9), grid=[0.1]).nll)
    assert_close(scores[0], scores[1])


def entry_rows(x, part):
    return optree.tree_map(lambda leaf: leaf[part], x)


def test_the_grid_is_even_in_logarithms_if_none_is_given():
    model = MODELS["mlp"]()
    found = minimize_validation_nll(
        model.fn, model.params, classifier_curvature(model), classes(model), Categorical()
    )
    assert_close(found.grid, 10 ** torch.linspace(-4, 4, 21, dtype=F64))
    assert found.nll.isfinite().all()


def test_a_precision_under_which_there_is_no_posterior_is_never_the_best():
    model, (x, y) = MODELS["mlp"](), classes(MODELS["mlp"](), 6)
    for structure in ("full", "diag"):
        c = curvature.hessian(model.fn, model.params, (x, y), Categorical(), structure)
        smallest = torch.linalg.eigvalsh(dense(c))[0]
        grid = -smallest * torch.tensor([0.1, 0.5, 0.9, 1.1, 30.0], dtype=F64)
        found = minimize_validation_nll(model.fn, model.params, c, (x, y), Categorical(), grid=grid)
        assert found.nll[:3].isinf().all()
        assert found.nll[3:].isfinite().all()
        with pytest.raises(RuntimeError, match="No score .* is finite"):
            minimize_validation_nll(model.fn, model.params, c, (x, y), Categorical(), grid=grid[:3])


# In one call.


def as_numbers(q):
    return optree.tree_leaves(q), q.linearized


def assert_same(one, two, **tolerance):
    assert type(one.covariance) is type(two.covariance)
    assert one.linearized == two.linearized
    assert_close(optree.tree_leaves(one), optree.tree_leaves(two), **tolerance)


@every_structure
@pytest.mark.parametrize("tune", [None, "model", "leaf", "parameter"])
@pytest.mark.parametrize("likelihood", [Categorical(), Normal(0.4)], ids=["classes", "numbers"])
def test_fit_is_curvature_prior_and_posterior_in_steps(likelihood, tune, options):
    if tune == "parameter" and options["structure"] == "kron":
        pytest.skip("a Kronecker curvature has one precision a leaf")
    model = MODELS["mlp"]()
    x = model.inputs(6)
    y = targets(likelihood, model.fn(model.params, x))
    noise = None if isinstance(likelihood, Categorical) else 0.7
    numbers = {"prior_mean": 0.1, "noise_std": noise, "temperature": 0.8}
    q = laplace.fit(
        model.fn, model.params, (x, y), likelihood, where="[04]*", tune=tune, prior_precision=0.3, **numbers,
        **options,
    )  # fmt: skip
    c = curvature.ggn(model.fn, model.params, (x, y), likelihood, where="[04]*", **options)
    chosen = 0.3
    if tune is not None:
        found = maximize_evidence(model.params, c, per=tune, prior_precision=0.3, tune_noise=False, **numbers)
        chosen = found.prior_precision
    assert_same(q, laplace.posterior(model.params, c, chosen, **numbers))


@pytest.mark.parametrize("kind", ["fisher", "empirical_fisher", "hessian"])
def test_fit_takes_every_curvature(kind):
    model = MODELS["mlp"]()
    data = classes(model)
    options = {"fisher": {"seed": 3, "mc_samples": 2}}.get(kind, {})
    q = laplace.fit(
        model.fn, model.params, data, Categorical(), curvature=kind, structure="diag", prior_precision=9.0,
        linearized=False, **options,
    )  # fmt: skip
    c = getattr(curvature, kind)(model.fn, model.params, data, Categorical(), "diag", **options)
    assert_same(q, laplace.posterior(model.params, c, 9.0, linearized=False))


def test_fit_takes_an_old_posterior_as_prior():
    model = MODELS["mlp"]()
    old = laplace.posterior(model.params, classifier_curvature(model, seed=2))
    q = laplace.fit(model.fn, model.params, classes(model), Categorical(), prior=old)
    assert_same(q, laplace.posterior(model.params, classifier_curvature(model), prior=old))


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_fit_passes_options_of_curvatures_on(weight_sharing):
    model = MODELS["conv"]()
    data = classes(model)
    options = {"weight_sharing": weight_sharing, "batch_size": 2, "max_bytes": 1000}
    q = laplace.fit(model.fn, model.params, data, Categorical(), **options)
    c = curvature.ggn(model.fn, model.params, data, Categorical(), **options)
    assert_same(q, laplace.posterior(model.params, c))


@every_structure
@pytest.mark.parametrize(
    ("name", "tune"), [("mlp", None), ("mlp", "leaf"), ("conv", "model"), ("nested", None)]
)
def test_members_fitted_at_once_are_those_fitted_one_by_one(name, tune, options):
    model = MODELS[name]()
    members, data = zoo.members(model.params, 3), classes(model)
    numbers = {"prior_precision": 0.6, "tune": tune, **options}
    q = laplace.fit(model.fn, members, data, Categorical(), stacked=True, **numbers)
    variances = vmap(lambda one: one.variance)(q)
    x = model.inputs(4)
    parts = []
    for k in range(3):
        member = optree.tree_map(lambda leaf, k=k: leaf[k], members)
        one = laplace.fit(model.fn, member, data, Categorical(), **numbers)
        own = optree.tree_map(lambda leaf, k=k: leaf[k], q)
        assert_close(flat(own.mean), flat(one.mean))
        assert_close(own.covariance.to_dense(), one.covariance.to_dense(), rtol=1e-5, atol=1e-8)
        variance = optree.tree_map(lambda leaf, k=k: leaf[k], variances)
        assert_close(flat(variance), flat(one.variance), rtol=1e-5, atol=1e-8)
        parts.append(fb.predict_linearized(model.fn, model.params, one, x, likelihood=Categorical()).mean)
    mixed = fb.mixture(q, stacked=True)
    whole = fb.predict_linearized(model.fn, model.params, mixed, x, likelihood=Categorical())
    assert_close(whole.mean, sum(parts) / 3, rtol=1e-5, atol=1e-8)
    drawn = fb.predict(model.fn, model.params, mixed, x, likelihood=Categorical(), num_samples=6, seed=0)
    assert drawn.samples.shape[:2] == (6, 4)


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_last_layers_of_members_are_mixed_beside_the_rest_of_their_own_networks(structure):
    fn, members = fb.ensemble.init(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), 3, seed=0
    )
    members = fb.to(members, dtype=F64)
    x, y, options = randn(12, 3), torch.arange(12) % 2, {"where": "2.*", "structure": structure}
    heads = laplace.fit(fn, members, (x, y), Categorical(), stacked=True, **options)
    trunks = fb.Point({name: leaf for name, leaf in members.items() if not name.startswith("2.")})
    mixed = fb.mixture(fb.join(heads, trunks), stacked=True)
    each = []
    for k in range(3):
        own = {name: leaf[k] for name, leaf in members.items()}
        q = laplace.fit(fn, own, (x, y), Categorical(), **options)
        each.append(fb.predict_linearized(fn, own, q, x, likelihood=Categorical()).mean)
    got = fb.predict_linearized(fn, None, mixed, x, likelihood=Categorical()).mean
    assert_close(got, torch.stack(each).mean(0))
    drawn = fb.predict(fn, None, mixed, x, num_samples=3000, seed=0)
    outputs = torch.stack([fn({n: leaf[k] for n, leaf in members.items()}, x) for k in range(3)]).mean(0)
    assert ((drawn.mean - outputs).abs() < 5 * drawn.samples.std(0) / 3000**0.5).all()


def test_members_of_a_regression_are_fitted_with_the_noise_that_is_given():
    model = MODELS["mlp"]()
    members = zoo.members(model.params, 2)
    data = model.inputs(5), randn(5, 2)
    numbers = {"noise_std": 0.3, "temperature": 0.5, "prior_precision": {n: 0.5 for n in model.params}}
    q = laplace.fit(model.fn, members, data, Normal(1.0), stacked=True, **numbers)
    for k in range(2):
        own = optree.tree_map(lambda leaf, k=k: leaf[k], (members, q))
        one = laplace.fit(model.fn, own[0], data, Normal(1.0), **numbers)
        assert_close(own[1].covariance.to_dense(), one.covariance.to_dense())


# Sub-networks.


def test_a_subnetwork_has_the_block_of_the_whole_curvature():
    model = MODELS["mlp"]()
    mask = laplace.random_mask(model.params, 9, seed=1)
    fn_sub, params_sub = laplace.subnetwork(model.fn, model.params, mask)
    data = classes(model)
    q = laplace.fit(fn_sub, params_sub, data, Categorical(), structure="full", prior_precision=0.4)
    whole = dense(classifier_curvature(model, "full"))
    chosen = torch.cat([leaf.reshape(-1) for leaf in named_leaves(mask).values()])
    block = whole[chosen][:, chosen]
    assert_close(q.covariance.to_dense(), (block + 0.4 * torch.eye(9)).inverse())
    x = model.inputs(3)
    covered = fb.predict_linearized(fn_sub, params_sub, q, x)
    j = torch.stack([torch.autograd.functional.jacobian(
        lambda v, n=n: model.fn(unflat(v, model.params), x[n : n + 1])[0], flat(model.params)
    ) for n in range(3)])[:, :, chosen]  # fmt: skip
    assert_close(covered.output_covariance, j @ q.covariance.to_dense() @ j.mT)


# Training with the evidence.


SGD = functools.partial(torch.optim.SGD, lr=0.02)
ADAM = functools.partial(torch.optim.Adam, lr=0.03)


def curve(num_rows=60, noise=0.2):
    x = torch.linspace(-2, 2, num_rows, dtype=F64)[:, None]
    return x, torch.sin(2 * x) + noise * randn(num_rows, 1)


def small_network(width=8):
    fn, _ = fb.make_functional(nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double())
    params = {"0.weight": 2 * randn(width, 1), "0.bias": randn(width, seed=1)}
    return fn, params | {"2.weight": 0.3 * randn(1, width, seed=2), "2.bias": torch.zeros(1, dtype=F64)}


@pytest.mark.parametrize("structure", ["kron", "full"])
@pytest.mark.parametrize("per", ["model", "leaf"])
def test_training_with_the_evidence_alternates_descent_and_ascent(per, structure):
    fn, start = small_network()
    data = curve(20)
    found = laplace.train(
        *(fn, start, data, Normal(0.5)),
        optimizer=SGD, num_epochs=6, structure=structure, per=per, prior_precision=0.7, start_epoch=1,
        update_every=2, seed=0,
    )  # fmt: skip
    params = {name: leaf.clone().requires_grad_() for name, leaf in start.items()}
    precision, noise, history, networks = 0.7, 0.5, [], []
    optimizer = torch.optim.SGD(params.values(), lr=0.02)
    for epoch in range(1, 7):
        optimizer.zero_grad()
        joint = Normal(noise).log_prob(fn(params, data[0]), data[1]).sum()
        joint = joint - 0.5 * (spread(precision, params) * flat(params).square()).sum()
        (-joint / 20).backward()
        optimizer.step()
        if epoch in (3, 5):
            now = {name: leaf.detach().clone() for name, leaf in params.items()}
            c = curvature.ggn(fn, now, data, Normal(noise), structure)
            chosen = maximize_evidence(now, c, per=per, prior_precision=precision, num_steps=20)
            precision, noise = chosen.prior_precision, float(chosen.noise_std)
            history.append(chosen.log_marginal_likelihood)
            networks.append((now, chosen, c))
    assert_close(found.history, torch.stack(history))
    now, chosen, c = networks[int(torch.stack(history).argmax())]
    assert_close(found.params, now)
    assert_close(found.noise_std, chosen.noise_std)
    assert_close(found.prior_precision, chosen.prior_precision)
    assert_close(found.log_marginal_likelihood, max(history))
    expected = laplace.posterior(now, c, chosen.prior_precision, noise_std=chosen.noise_std)
    assert_same(found.posterior, expected, rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def trained():
    fn, params = small_network()
    data = curve()
    return (
        fn,
        data,
        laplace.train(
            fn,
            params,
            data,
            Normal(1.0),
            optimizer=ADAM,
            num_epochs=400,
            update_every=20,
            num_steps=100,
            seed=0,
        ),
    )


def test_training_learns_the_noise(trained):
    fn, (x, y), found = trained
    assert_close(found.noise_std, torch.tensor(0.2, dtype=F64), rtol=0.3, atol=0)
    residuals = fn(found.params, x) - y
    assert 0.1 < residuals.std() < 0.25
    assert found.history.shape == (20,)
    assert found.history[-1] > found.history[0] + 10
    assert found.history.dtype is F64
    assert_close(found.log_marginal_likelihood, found.history.max())


def test_what_training_learns_is_a_fixed_point_of_the_evidence(trained):
    fn, data, found = trained
    c = curvature.ggn(fn, found.params, data, Normal(1.0))
    names = sorted(found.params)

    def evidence(logs):
        tree = {name: log.exp() for name, log in zip(names, logs, strict=False)}
        return log_marginal_likelihood(found.params, c, tree, noise_std=logs[-1].exp())

    logs = torch.stack([*(found.prior_precision[n] for n in names), found.noise_std]).log()
    assert_close(evidence(logs), found.log_marginal_likelihood)
    assert grad(evidence)(logs).abs().max() < 1e-2
    q = laplace.posterior(found.params, c, found.prior_precision, noise_std=found.noise_std)
    assert_same(found.posterior, q)
    # At a mode of the joint MacKay's fixed point is near: delta = (number determined) / |theta|^2.
    variance = fb.restrict(q, "2.weight").variance["2.weight"]
    delta, theta = found.prior_precision["2.weight"], found.params["2.weight"]
    assert_close(delta, (theta.numel() - delta * variance.sum()) / theta.square().sum(), rtol=1e-2, atol=0)


def test_the_best_network_is_kept_not_the_last():
    fn, params = small_network()
    data = curve(20)

    def worse(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch < 4 else 15.0)

    found = laplace.train(
        fn, params, data, Normal(0.5), optimizer=functools.partial(torch.optim.SGD, lr=0.02), num_epochs=8,
        scheduler=worse, tune_noise=False, seed=0,
    )  # fmt: skip
    best = int(found.history.argmax())
    assert best < 7
    until_then = laplace.train(
        fn, params, data, Normal(0.5), optimizer=functools.partial(torch.optim.SGD, lr=0.02),
        num_epochs=best + 1, scheduler=worse, tune_noise=False, seed=0,
    )  # fmt: skip
    assert_close(found.params, until_then.params)
    assert_close(found.history[: best + 1], until_then.history)
    assert_close(found.log_marginal_likelihood, found.history.max())
    assert_close(found.noise_std, torch.tensor(0.5, dtype=F64))


def test_training_is_a_function_of_its_seed():
    fn, params = fb.make_functional(
        nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 1)).double()
    )
    options = {"optimizer": SGD, "num_epochs": 3, "batch_size": 5}
    data = curve(20)
    before = {name: leaf.clone() for name, leaf in params.items()}
    one, two, other = (
        laplace.train(fn, params, data, Normal(0.5), seed=seed, **options) for seed in (1, 1, 2)
    )
    assert_close(one.params, two.params, rtol=0, atol=0)
    assert_close(one.history, two.history, rtol=0, atol=0)
    assert not torch.equal(one.params["0.weight"], other.params["0.weight"])
    assert all(torch.equal(before[name], params[name]) for name in params)
    torch.manual_seed(4)
    three = laplace.train(fn, params, data, Normal(0.5), **options)
    torch.manual_seed(4)
    assert_close(three.params, laplace.train(fn, params, data, Normal(0.5), **options).params)


@pytest.mark.parametrize("where", [None, "2.*"])
def test_classifiers_are_trained_too(where):
    fn, _ = fb.make_functional(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    params = {"0.weight": randn(6, 2), "0.bias": randn(6, seed=1)}
    params |= {"2.weight": 0.1 * randn(3, 6, seed=2), "2.bias": torch.zeros(3, dtype=F64)}
    y = torch.arange(60) % 3
    x = 0.4 * randn(60, 2) + torch.stack([y.sin(), y.cos()], 1)
    found = laplace.train(
        fn, params, (x, y), Categorical(), optimizer=ADAM, num_epochs=60, update_every=10, seed=0, where=where
    )
    assert found.noise_std is None
    assert set(found.posterior.mean) == (set(params) if where is None else {"2.weight", "2.bias"})
    assert set(found.prior_precision) == set(found.posterior.mean)
    assert found.history[-1] > found.history[0] + 1
    prediction = fb.predict(
        fn, found.params, found.posterior, x, likelihood=Categorical(), num_samples=20, seed=0
    )
    assert (prediction.mean.argmax(-1) == y).double().mean() > 0.7


def test_leaves_that_the_evidence_does_not_cover_keep_their_prior():
    fn, params = small_network()
    prior = {name: torch.tensor(1.0 + i, dtype=F64) for i, name in enumerate(sorted(params))}
    options = {"optimizer": SGD, "num_epochs": 4, "prior_precision": prior, "where": "2.*", "seed": 0}
    found = laplace.train(fn, params, curve(20), Normal(0.5), tune_noise=False, **options)
    # Descent of the covered leaves with what was learned, of the others with what was given.
    x, y = curve(20)
    at = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    precision = dict(prior)
    for _ in range(4):
        joint = Normal(0.5).log_prob(fn(at, x), y).sum()
        joint = joint - 0.5 * sum((precision[n] * leaf.square()).sum() for n, leaf in at.items())
        slopes = torch.autograd.grad(-joint / 20, list(at.values()))
        at = {
            n: (leaf - 0.02 * g).detach().requires_grad_()
            for (n, leaf), g in zip(at.items(), slopes, strict=True)
        }
        now = {name: leaf.detach() for name, leaf in at.items()}
        c = curvature.ggn(fn, now, (x, y), Normal(0.5), where="2.*")
        learned = maximize_evidence(
            now, c, per="leaf", prior_precision=precision, tune_noise=False, num_steps=20
        )
        precision |= learned.prior_precision
    assert_close(found.history[-1], learned.log_marginal_likelihood)


def test_statistics_of_batch_norm_are_trained_and_come_with_the_network():
    module = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    fn, params = fb.make_functional(module)
    data = curve(20)
    found = laplace.train(fn, params, data, Normal(0.5), optimizer=SGD, num_epochs=3, batch_size=10, seed=0)
    held = {name for name, leaf in found.params.items() if isinstance(leaf, Fixed)}
    assert {"1.running_mean", "1.running_var"} <= held
    assert fb.predict(fn, None, found.posterior, data[0], num_samples=3, seed=0).samples.isfinite().all()
    prediction = fb.predict_linearized(fn, None, found.posterior, data[0])
    assert prediction.output_variance.min() > 0
    assert_close(prediction.output_mean, fn(found.params, data[0]))


# Bad input.


def small():
    """A classifier, and its data."""
    model = MODELS["mlp"]()
    return model.fn, model.params, classes(model)


IN_ITS_NAME = {
    "nothing_chosen": ({"where": "nothing"}, r"`laplace.fit\(where='nothing'\)` should choose"),
    "structure": ({"structure": "dense"}, r"`laplace.fit\(structure=...\)` should be one of"),
    "hessian": ({"curvature": "hessian"}, r"`laplace.fit\(structure=...\)` of a Hessian should be"),
    "rank": ({"rank": -7, "structure": "diag"}, r"`laplace.fit\(rank=...\)` should be"),
    "mc_samples": ({"mc_samples": 7}, r"`laplace.fit\(mc_samples=...\)` goes with `curvature='fisher'`"),
    "targets": ({"y": torch.full((4,), 9)}, r"`laplace.fit\(data=...\)` should"),
    "no_batch": ({"data": []}, r"`laplace.fit\(data=...\)` should give at least one batch"),
}


@tabled(("options", "match"), IN_ITS_NAME)
def test_what_a_curvature_refuses_is_said_in_the_name_of_the_fit(options, match):
    fn, params, (x, y) = small()
    options = dict(options)
    data = options.pop("data", (x, options.pop("y", y)))
    with pytest.raises(ValueError, match=match):
        laplace.fit(fn, params, data, Categorical(), **options)


def test_a_posterior_stays_where_its_parameters_were():
    fn, params, data = small()
    params = map_named(lambda name, leaf: leaf.clone(), params)
    q = laplace.fit(fn, params, data, Categorical())
    before = map_named(lambda name, leaf: leaf.clone(), params)
    for leaf in params.values():
        leaf.add_(1.0)
    assert_close(q.mean, before)


def never(params, x):
    """A model that nothing should evaluate."""
    raise AssertionError("evaluated")


def curvature_of(structure="diag", kind="ggn", likelihood=None, **options):
    fn, params, (x, y) = small()
    likelihood = Categorical() if likelihood is None else likelihood
    y = y if isinstance(likelihood, Categorical) else randn(len(x), 2)
    return getattr(curvature, kind)(fn, params, (x, y), likelihood, structure, **options)


def prior_like(params, make=Diagonal, scale=1.0):
    return Gaussian(params, make(map_named(lambda name, leaf: torch.full_like(leaf, scale), params)))


def singular(params):
    return Gaussian(params, Dense(zoo.factors(params, 2)))


def called(numbers, params):
    return {key: value(params) if callable(value) else value for key, value in numbers.items()}


POSITIVE = "should be positive and finite"
NUMBERS = {
    "zero_precision": ({"prior_precision": 0.0}, ValueError, POSITIVE),
    "negative_precision": ({"prior_precision": -1.0}, ValueError, "smallest number of -1"),
    "infinite_precision": ({"prior_precision": math.inf}, ValueError, "a largest of inf"),
    "nan_precision": ({"prior_precision": math.nan}, ValueError, "smallest number of nan"),
    "no_precision": ({"prior_precision": None}, TypeError, "a number or a tree of numbers, got NoneType"),
    "bool_precision": ({"prior_precision": True}, TypeError, "got bool"),
    "vector_precision": ({"prior_precision": torch.ones(6)}, ValueError, r"one tensor of shape \(6,\)"),
    "lacking_precision": ({"prior_precision": {"0.bias": 1.0}}, ValueError, "'0.weight' is missing"),
    "one_zero": (
        {"prior_precision": lambda params: {name: float(name != "2.bias") for name in params}},
        ValueError,
        "a smallest number of 0 and a largest of 0 for '2.bias'",
    ),
    "wrong_shape": (
        {"prior_precision": lambda params: {name: torch.ones(5) for name in params}},
        ValueError,
        r"'0.bias' has shape \(5,\), not \(8,\)",
    ),
    "lacking_mean": ({"prior_mean": {"0.bias": 1.0}}, ValueError, "should have a number for each leaf"),
    "temperature_0": ({"temperature": 0.0}, ValueError, r"temperature=...\)` should be positive .* got 0"),
    "temperature_tensor": ({"temperature": torch.ones(2)}, ValueError, r"one number, got shape \(2,\)"),
    "temperature_bool": (
        {"temperature": True},
        TypeError,
        r"temperature=...\)` should be a number, got bool",
    ),
    "temperature_nan": ({"temperature": torch.tensor(math.nan)}, ValueError, "positive and finite, got nan"),
    "noise_of_a_classifier": ({"noise_std": 0.3}, ValueError, "goes with a curvature of a `Normal`"),
    "negative_noise": ({"noise_std": -0.3}, ValueError, r"noise_std=...\)` should be positive .* got -0.3"),
}
FUNCTIONS = {
    "posterior": laplace.posterior,
    "log_marginal_likelihood": log_marginal_likelihood,
    "maximize_evidence": maximize_evidence,
}


@tabled(("numbers", "error", "match"), NUMBERS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_that_mean_nothing_are_refused(name, numbers, error, match):
    _, params, _ = small()
    call = functools.partial(FUNCTIONS[name], params, curvature_of(), **called(numbers, params))
    with pytest.raises(error, match=match) as caught:
        call()
    assert f"`laplace.{name}(" in str(caught.value)


WITH_PRIOR = {
    "both": (
        lambda p: {"prior": prior_like(p), "prior_precision": 2.0},
        ValueError,
        "leave out `prior_mean`",
    ),
    "both_trees": (
        lambda p: {"prior": prior_like(p), "prior_mean": dict.fromkeys(p, 0.0)},
        ValueError,
        "leave out",
    ),
    "no_gaussian": (lambda p: {"prior": fb.Point(p)}, TypeError, "should be a Gaussian, got Point"),
    "singular": (lambda p: {"prior": singular(p)}, ValueError, "have a precision, but its rank is at most 2"),
    "zero": (lambda p: {"prior": prior_like(p, scale=0.0)}, ValueError, "should have a precision, but"),
    "other_leaves": (
        lambda p: {"prior": fb.restrict(prior_like(p), "0.*")},
        ValueError,
        "'2.bias' is missing. `restrict",
    ),
    "other_shapes": (
        lambda p: {"prior": prior_like({n: leaf[:1] for n, leaf in p.items()})},
        ValueError,
        r"has shape \(1,\)",
    ),
}


@tabled(("make", "error", "match"), WITH_PRIOR)
@pytest.mark.parametrize("name", ["posterior", "log_marginal_likelihood"])
def test_priors_that_do_not_fit_are_refused(name, make, error, match):
    _, params, _ = small()
    call = functools.partial(FUNCTIONS[name], params, curvature_of(), **make(params))
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("structure", "make"),
    [
        ("diag", "kronecker"),
        ("diag", "dense"),
        ("low_rank", "low_rank_plus_diagonal"),
        ("kron", "low_rank_precision"),
        ("kron", "dense"),
    ],
)
def test_priors_whose_sum_with_the_curvature_has_no_structure_are_refused(structure, make):
    _, params, _ = small()
    c, old = curvature_of(structure), Gaussian(params, PRIORS[make](params))
    message = rf"\(prior=...\)` with a curvature of structure '{structure}' should have .* got a "
    with pytest.raises(NotImplementedError, match="laplace.posterior" + message):
        laplace.posterior(params, c, prior=old)
    with pytest.raises(NotImplementedError, match="laplace.fit" + message):
        laplace.fit(never, params, small()[2], Categorical(), structure=structure, prior=old)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_kronecker_curvature_refuses_a_precision_for_each_parameter(corrected):
    _, params, _ = small()
    c = curvature_of("kron", eigenvalue_correction=corrected)
    numbers = FORMS["per_parameter"](params)
    with pytest.raises(ValueError, match="posterior.*'kron' should be given a prior precision of one number"):
        laplace.posterior(params, c, numbers)
    with pytest.raises(ValueError, match="laplace.fit.*'kron' should be given a prior precision of one"):
        laplace.fit(never, params, small()[2], Categorical(), prior_precision=numbers)
    adam = functools.partial(torch.optim.Adam, lr=0.1)
    with pytest.raises(ValueError, match="laplace.train.*'kron' should be given a prior precision of one"):
        laplace.train(
            *(never, params, small()[2], Categorical()),
            optimizer=adam,
            num_epochs=1,
            prior_precision=numbers,
        )
    old = Gaussian(params, Diagonal(map_named(lambda name, leaf: 1 / leaf, numbers)))
    with pytest.raises(ValueError, match="got several for '0.bias'"):
        laplace.posterior(params, c, prior=old)
    # Where all are the same they are one number.
    same = map_named(lambda name, leaf: torch.full_like(leaf, 0.5), params)
    expected = laplace.posterior(params, c, 0.5)
    assert_same(laplace.posterior(params, c, same), expected)
    assert_same(laplace.posterior(params, c, prior=prior_like(params, scale=2.0)), expected)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_an_indefinite_hessian_is_refused_with_its_smallest_eigenvalue(structure):
    _, params, _ = small()
    c = curvature_of(structure, "hessian")
    smallest = float(torch.linalg.eigvalsh(dense(c))[0])
    assert smallest < -1e-2
    shown = re.escape(f"{smallest + 1e-3:.3g}")
    match = rf"not positive definite \(smallest eigenvalue {shown}\).*`curvature.ggn`, or a `prior_precision`"
    for call in (laplace.posterior, log_marginal_likelihood):
        with pytest.raises(RuntimeError, match=match):
            call(params, c, 1e-3)
    tree = dict.fromkeys(params, 1e-3) | {"0.bias": 1.1e-3}
    with pytest.raises(RuntimeError, match="not positive definite"):
        log_marginal_likelihood(params, c, tree)


def test_a_low_rank_hessian_tells_of_the_negative_eigenvalues_that_it_leaves_out():
    fn, params, data = small()
    smallest = float(torch.linalg.eigvalsh(dense(curvature_of("full", "hessian")))[0])
    match = rf"curvature.hessian` is indefinite, .* of {smallest:.3g} or less.*`curvature.ggn`"
    rank = sum(leaf.numel() for leaf in params.values())  # so that all eigenvalues are seen
    with pytest.warns(UserWarning, match=match):
        c = curvature.hessian(fn, params, data, Categorical(), "low_rank", rank=rank, seed=0)
    assert bool((c.eigenvalues > 0).all())


def test_evidence_of_an_indefinite_hessian_has_no_maximum_to_find():
    # It grows without end where the prior makes an eigenvalue zero.
    _, params, _ = small()
    c = curvature_of("full", "hessian")
    smallest = float(torch.linalg.eigvalsh(dense(c))[0])
    for per in ("model", "leaf"):
        with pytest.raises(RuntimeError, match="not positive definite"):
            maximize_evidence(params, c, per=per, prior_precision=-1.01 * smallest)


def test_what_is_no_curvature_is_refused():
    fn, params, data = small()
    for name, call in FUNCTIONS.items():
        with pytest.raises(TypeError, match=rf"`laplace.{name}\(params, c\)` .* got dict. Find it with"):
            call(params, params)
    with pytest.raises(TypeError, match="one of `funcbayes.curvature`, got NoneType"):
        minimize_validation_nll(fn, params, None, data, Categorical())


@every_structure
def test_a_curvature_of_several_networks_is_refused(options):
    fn, params, data = small()
    c = curvature.ggn(fn, stacked(params, params), data, Categorical(), stacked=True, **options)
    for call in FUNCTIONS.values():
        with pytest.raises(ValueError, match="curvature of one network, got those of 2. `laplace.fit"):
            call(params, c)
    with pytest.raises(ValueError, match="curvature of one network, got those of 2"):
        minimize_validation_nll(fn, params, c, data, Categorical())


@every_structure
def test_a_curvature_of_other_parameters_is_refused(options):
    fn, params, data = small()
    c = curvature.ggn(fn, params, data, Categorical(), **options)
    renamed = {"other" if name == "2.bias" else name: leaf for name, leaf in params.items()}
    for call in FUNCTIONS.values():
        with pytest.raises(ValueError, match="that the curvature covers in `params`; '2.bias' is missing"):
            call(renamed, c)
        for name, shape in (("2.weight", (6, 7)), ("0.weight", (3, 8)), ("0.bias", (7,))):
            other = {**params, name: torch.ones(shape, dtype=F64)}
            with pytest.raises(ValueError, match=f"a curvature of `params`; .*'{name}' has shape"):
                call(other, c)
    with pytest.raises(ValueError, match="leaves that the curvature covers"):
        minimize_validation_nll(fn, renamed, c, data, Categorical())


def test_numbers_of_precisions_that_there_are_not_are_refused():
    _, params, _ = small()
    diagonal, kron = curvature_of(), curvature_of("kron")
    with pytest.raises(ValueError, match=r"per=...\)` should be 'model', 'leaf' or 'parameter', got 'layer'"):
        maximize_evidence(params, diagonal, per="layer")
    with pytest.raises(ValueError, match="'parameter' with a Kronecker curvature"):
        maximize_evidence(params, kron, per="parameter")
    with pytest.raises(ValueError, match=r"num_steps=...\)` should be at least 1"):
        maximize_evidence(params, diagonal, num_steps=0)


GRIDS = {
    "empty": ({"grid": []}, r"grid=...\)` should be positive and finite numbers, at least one, got \[\]"),
    "negative": ({"grid": [1.0, -1.0]}, "positive and finite numbers"),
    "infinite": ({"grid": [1.0, math.inf]}, "positive and finite numbers"),
    "matrix": ({"grid": torch.ones(2, 2)}, "positive and finite numbers"),
    "link": ({"link": "bridges"}, "minimize_validation_nll.link=.* one of 'probit', .* got 'bridges'"),
    "temperature": ({"temperature": -1.0}, r"temperature=...\)` should be positive"),
    "noise": ({"noise_std": 0.5}, r"noise_std=...\)` goes with a curvature of a `Normal`"),
    "num_samples": ({"link": "mc", "num_samples": 0}, r"num_samples=...\)` should be at least 1"),
}


@tabled(("options", "match"), GRIDS)
def test_searches_that_mean_nothing_are_refused(options, match):
    fn, params, data = small()
    c = curvature_of()
    with pytest.raises(ValueError, match=match):
        minimize_validation_nll(fn, params, c, data, Categorical(), **options)


def test_a_search_names_the_batch_in_which_numbers_are_not_finite():
    fn, params, (x, y) = small()
    with pytest.raises(RuntimeError, match=r"batch 1 in `laplace.minimize_validation_nll` is nan"):
        minimize_validation_nll(fn, params, curvature_of(), [(x, y), (x / 0, y)], Categorical())
    with pytest.raises(ValueError, match=r"laplace.minimize_validation_nll\(data=...\), batch 1` should"):
        minimize_validation_nll(fn, params, curvature_of(), [(x, y), (x, y + 9)], Categorical())


def test_searches_for_likelihoods_without_a_closed_form_are_refused():
    fn, params, (x, y) = small()
    counts = randn(len(x), 2).abs().round()
    c = curvature.ggn(fn, params, (x, counts), Poisson(), "diag")
    with pytest.raises(NotImplementedError, match="no closed form for Poisson. Choose by evidence"):
        minimize_validation_nll(fn, params, c, (x, counts), Poisson())
    labels = (randn(len(x), 2) > 0).double()
    c = curvature.ggn(fn, params, (x, labels), Bernoulli(), "diag")
    with pytest.raises(ValueError, match=r"link='bridge'\)` is for logits of several classes; `Bernoulli`"):
        minimize_validation_nll(fn, params, c, (x, labels), Bernoulli(), link="bridge")
    c = curvature_of(likelihood=Normal(1.0))
    with pytest.raises(ValueError, match=r"noise_std=...\)` goes with `Normal`, got Categorical"):
        minimize_validation_nll(fn, params, c, (x, y), Categorical(), noise_std=0.5)


FITS = {
    "curvature": ({"curvature": "gauss"}, r"curvature=...\)` should be 'ggn', .* got 'gauss'"),
    "tune_and_prior": (
        {"tune": "model", "prior": prior_like},
        "tunes a prior precision, and `prior` has one",
    ),
    "tune": ({"tune": "layer"}, r"laplace.fit\(tune=...\)` should be 'model'.* got 'layer'"),
    "tune_parameter": ({"tune": "parameter"}, r"laplace.fit\(tune=...\)` should not be 'parameter'"),
    "corrected_hessian": ({"curvature": "hessian", "eigenvalue_correction": True}, "no Kronecker eigenbasis"),
    "kronecker_hessian": ({"curvature": "hessian"}, "should be 'full', 'diag' or 'low_rank', got 'kron'"),
    "structure": ({"structure": "dense"}, "structure=.* got 'dense'"),
    "temperature": ({"temperature": 0}, r"laplace.fit\(temperature=...\)` should be positive"),
    "precision": ({"prior_precision": 0.0}, r"laplace.fit\(prior_precision=...\)` should be positive"),
    "noise": ({"noise_std": 0.0}, r"laplace.fit\(noise_std=...\)` should be positive"),
    "where": ({"where": "nothing"}, "should choose at least one parameter"),
    "rank": ({"rank": 3}, r"laplace.fit\(rank=3\)` goes with `structure='low_rank'`, got 'kron'"),
    "rank_of_a_hessian": (
        {"curvature": "hessian", "structure": "full", "rank": 3},
        r"rank=3\)` goes with `structure='low_rank'`, got 'full'",
    ),
    "sharing_of_a_hessian": (
        {"curvature": "hessian", "structure": "full", "weight_sharing": "reduce"},
        r"weight_sharing='reduce'\)` goes with `structure='kron'`, got 'full'",
    ),
    "sharing": (
        {"structure": "diag", "weight_sharing": "reduce"},
        r"weight_sharing='reduce'\)` goes with `structure='kron'`, got 'diag'",
    ),
}


@tabled(("options", "match"), FITS)
def test_fits_that_mean_nothing_are_refused(options, match):
    fn, params, data = small()
    options = called(options, params)
    with pytest.raises(ValueError, match=match):
        laplace.fit(fn, params, data, Categorical(), **options)


def failing(params, x):
    raise AssertionError


@pytest.mark.parametrize(
    "options", [{"tune": "layer"}, {"temperature": 0}, {"prior_precision": -1.0}, {"noise_std": 0.0}]
)
def test_a_fit_is_refused_before_the_model_is_evaluated(options):
    _, params, data = small()
    with pytest.raises(ValueError, match="laplace.fit"):
        laplace.fit(failing, params, data, Categorical(), **options)


def test_a_module_is_no_function():
    module, (_, params, data), c = nn.Linear(3, 2), small(), curvature_of()
    for call in (
        lambda: laplace.fit(module, params, data, Categorical()),
        lambda: laplace.train(module, params, data, Categorical(), optimizer=SGD, num_epochs=1),
        lambda: minimize_validation_nll(module, params, c, data, Categorical()),
    ):
        with pytest.raises(TypeError, match="should be given a function of .params, x., got an nn.Module"):
            call()


TRAININGS = {
    "per": ({"per": "layer"}, ValueError, r"laplace.train\(per=...\)` should be 'model'"),
    "per_parameter": ({"per": "parameter"}, ValueError, "should not be 'parameter' with a Kronecker"),
    "precision": (
        {"prior_precision": 0.0},
        ValueError,
        r"laplace.train\(prior_precision=...\)` should be pos",
    ),
    "update_every": ({"update_every": 0}, ValueError, r"update_every=...\)` should be at least 1"),
    "num_steps": ({"num_steps": 0}, ValueError, r"num_steps=...\)` should be at least 1"),
    "start_epoch": (
        {"start_epoch": -1},
        ValueError,
        r"start_epoch=...\)` should be an int from 0 on, got -1",
    ),
    "never": ({"start_epoch": 2, "update_every": 2}, ValueError, "should leave an epoch at whose end"),
    "num_epochs": ({"num_epochs": 0}, ValueError, "num_epochs"),
    "likelihood": ({"likelihood": "normal"}, TypeError, "likelihood"),
    "structure": ({"structure": "dense"}, ValueError, "structure=.* got 'dense'"),
    "where": ({"where": "nothing"}, ValueError, "should choose at least one parameter"),
}


@tabled(("options", "error", "match"), TRAININGS)
def test_trainings_that_mean_nothing_are_refused_before_the_model_is_evaluated(options, error, match):
    _, params, data = small()
    options = {"likelihood": Categorical(), "optimizer": SGD, "num_epochs": 3, **options}
    with pytest.raises(error, match=match):
        laplace.train(failing, params, data, **options)


def test_a_training_that_is_stopped_before_the_evidence_is_found_says_so():
    fn, params = small_network()
    options = {"optimizer": SGD, "num_epochs": 9, "update_every": 5, "seed": 0, "callback": lambda *_: True}
    with pytest.raises(RuntimeError, match="let training go on until the evidence is found"):
        laplace.train(fn, params, curve(10), Normal(0.5), **options)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_curvature_without_any_eigenvalue_leaves_the_prior(num_classes):
    """One class, or classes that the network is sure of: all that is known is the prior."""
    params = {"w": 1e3 * torch.ones(num_classes, 2, dtype=F64) * torch.arange(num_classes)[:, None]}
    data = (torch.ones(4, 2, dtype=F64), torch.full((4,), num_classes - 1))
    fn = linear_classifier
    c = curvature.ggn(fn, params, data, Categorical(), "low_rank", seed=0)
    assert c.rank == 0
    found = laplace.posterior(params, c, prior_precision=4.0)
    assert_close(found.variance["w"], torch.full_like(params["w"], 0.25))
    expected = -0.5 * 4.0 * params["w"].square().sum()
    assert_close(log_marginal_likelihood(params, c, 4.0), expected)
    assert math.isfinite(maximize_evidence(params, c).log_marginal_likelihood)
    best = minimize_validation_nll(fn, params, c, data, Categorical())
    assert best.nll.isfinite().all()


def linear_classifier(params, x):
    return x @ params["w"].T


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": 0.3}, "noise_std"),
        ({"prior_precision": {"w": -1.0}}, "prior_precision"),
        ({"prior_precision": {"w": torch.rand(3, 2, dtype=F64) + 1}}, "one number"),
        ({"prior_mean": {"v": 0.0}}, "prior_mean"),
        ({"temperature": 0.0}, "temperature"),
        ({"prior": 3.0}, "prior"),
    ],
)
def test_what_goes_with_no_curvature_is_refused_before_the_data_are_gone_through(options, message):
    data = (torch.ones(4, 2, dtype=F64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises((ValueError, TypeError), match=message):
        laplace.fit(never, {"w": torch.ones(3, 2, dtype=F64)}, data, Categorical(), **options)
