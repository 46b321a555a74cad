"""Priors: every density against torch's, quadrature and loops over single parameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.distributions as td
from torch.func import grad, hessian, jacfwd, vmap
from torch.testing import assert_close
from zoo import F64, entry, linear_params, nested_params, randn, randn_like, stacked

import funcbayes as fb
from funcbayes import Fixed, priors
from funcbayes._tree import map_named, named_leaves
from funcbayes.priors._exponential_integral import scaled_exponential_integral

# torch's own: forward-mode derivatives load decompositions through torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


# Quadrature.


def half_line(f, steps=128):
    """``int_0^inf f(r) dr`` of a function that maps over the last axis, by the exp-sinh rule.

    Takahasi & Mori (1974): ``r = exp(pi / 2 sinh t)`` and the trapezoidal rule in ``t``, which takes
    algebraic tails and singularities at zero alike.
    """
    t = torch.arange(-5 * steps, 5 * steps + 1, dtype=F64) / steps
    r = (math.pi / 2 * t.sinh()).exp()
    return (f(r) * r * math.pi / 2 * t.cosh()).sum(-1) / steps


def line(f, at, steps=128):
    """``int f(z) dz`` over the line, in two parts that meet ``at`` a kink or a pole."""
    at = at.unsqueeze(-1)
    return half_line(lambda r: f(at + r), steps) + half_line(lambda r: f(at - r), steps)


# What the densities should be, of one parameter each.


def normal(theta, precision, mean):
    return td.Normal(mean, precision**-0.5).log_prob(theta)


def laplace(theta, scale, location):
    return td.Laplace(location, scale).log_prob(theta)


def scale_mixture(theta, weight, std_1, std_2):
    weights = torch.stack([weight, 1 - weight], -1)
    parts = td.Normal(torch.zeros_like(weights), torch.stack([std_1, std_2], -1))
    return td.MixtureSameFamily(td.Categorical(weights), parts).log_prob(theta)


def horseshoe(theta, scale):
    """The hierarchy, with its half-Cauchy ``lambda`` integrated out by quadrature."""

    def joint(lam):
        each = td.Normal(0.0, lam * scale.unsqueeze(-1)).log_prob(theta.unsqueeze(-1))
        return (each + td.HalfCauchy(torch.ones((), dtype=F64)).log_prob(lam)).exp()

    return half_line(joint).log()


class Case(NamedTuple):
    make: Callable[..., priors.Prior]
    numbers: dict[str, float]
    log_density: Callable[..., torch.Tensor]


CASES = {
    "normal": Case(priors.Normal, {"precision": 2.3, "mean": -0.4}, normal),
    "laplace": Case(priors.Laplace, {"scale": 0.7, "location": 0.3}, laplace),
    "scale_mixture": Case(priors.ScaleMixture, {"weight": 0.3, "std_1": 1.2, "std_2": 0.05}, scale_mixture),
    "scale_mixture_with_the_narrow_first": Case(
        priors.ScaleMixture, {"weight": 0.3, "std_1": 0.05, "std_2": 1.2}, scale_mixture
    ),
    "horseshoe": Case(priors.Horseshoe, {"scale": 0.6}, horseshoe),
}
CLOSED = {name: CASES[name] for name in ("normal", "laplace")}
OPEN = {name: case for name, case in CASES.items() if name not in CLOSED}


def over(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


# In how many ways a field can say its numbers: near ``value``, for the leaves of ``params``.


def varied(value, shift):
    """Another number of the same range, for a shift between 0 and 1."""
    return value * (1 + shift)


KINDS: dict[str, Callable[[float, Any], Any]] = {
    "one_number": lambda value, params: value,
    "one_tensor": lambda value, params: torch.tensor(value, dtype=F64),
    "number_for_each_leaf": lambda value, params: map_named(
        lambda name, leaf: varied(value, len(named_leaves(params)) / (9 + sum(map(ord, name)))), params
    ),
    "tensor_for_each_leaf": lambda value, params: map_named(
        lambda name, leaf: varied(value, randn(*leaf.shape, seed=sum(map(ord, name))).sigmoid()), params
    ),
    "by_path": lambda value, params: {
        name: varied(value, i / 10) for i, name in enumerate(named_leaves(params))
    },
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
TREES = {"flat": linear_params, "nested": nested_params}
every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())


def number_of(field, name, i):
    """The number for entry ``i`` of leaf ``name``."""
    value = field if isinstance(field, float | torch.Tensor) else named_leaves(field)[name]
    value = torch.as_tensor(value, dtype=F64)
    return value if not value.ndim else value.reshape(-1)[i]


def naive_log_prob(case, fields, params):
    """A loop over parameters."""
    total = torch.zeros((), dtype=F64)
    for name, leaf in named_leaves(params).items():
        for i, theta in enumerate(leaf.reshape(-1)):
            numbers = {field: number_of(value, name, i) for field, value in fields.items()}
            total = total + case.log_density(theta, **numbers)
    return total


def naive_expected(case, fields, mean, variance):
    """The same of quadratures under ``N(m, v)``."""
    total = torch.zeros((), dtype=F64)
    spread = named_leaves(variance)
    for name, leaf in named_leaves(mean).items():
        for i, (m, v) in enumerate(zip(leaf.reshape(-1), spread[name].reshape(-1), strict=True)):
            numbers = {field: number_of(value, name, i) for field, value in fields.items()}
            kink = numbers.get("location", numbers.get("mean"))
            gauss = td.Normal(torch.zeros_like(m), torch.ones_like(m))
            total = total + line(
                lambda z, m=m, v=v, n=numbers, g=gauss: (
                    case.log_density(m + v.sqrt() * z, **n) * g.log_prob(z).exp()
                ),
                (kink - m) / v.sqrt(),
            )
    return total


@over(CASES)
@every_kind
@every_tree
def test_the_log_density_is_summed_over_single_parameters(case, kind, tree):
    params = tree()
    fields = {field: kind(value, params) for field, value in case.numbers.items()}
    log_prob = case.make(**fields).log_prob(params)
    assert log_prob.shape == ()
    assert_close(log_prob, naive_log_prob(case, fields, params), rtol=1e-10, atol=1e-10)


@over(CLOSED)
@every_kind
@every_tree
def test_the_expected_log_density_is_that_of_quadratures_under_a_gaussian(case, kind, tree):
    mean = tree()
    variance = optree.tree_map(lambda leaf: leaf.exp(), randn_like(mean, seed=5))
    fields = {field: kind(value, mean) for field, value in case.numbers.items()}
    expected = case.make(**fields).expected_log_prob(mean, variance)
    assert expected.shape == ()
    assert_close(expected, naive_expected(case, fields, mean, variance), rtol=1e-10, atol=1e-10)


@over(OPEN)
def test_without_a_closed_form_there_is_no_expected_log_density(case):
    params = linear_params()
    ones = optree.tree_map(torch.ones_like, params)
    assert case.make(**case.numbers).expected_log_prob(params, ones) is None


@over(CLOSED)
def test_the_expected_log_density_under_a_gaussian_with_correlations_is_the_mean_over_its_draws(
    case,
):
    mean, num_samples = linear_params(), 20_000
    q = fb.Gaussian(mean, fb.covariances.Dense(optree.tree_map(lambda t: randn(*t.shape, 9, seed=3), mean)))
    prior = case.make(**case.numbers)
    draws = vmap(prior.log_prob)(q.sample(num_samples, seed=0))
    sem = draws.std() / num_samples**0.5
    assert (draws.mean() - prior.expected_log_prob(mean, q.variance)).abs() < 4 * sem


@over(CASES)
def test_a_density_integrates_to_one(case):
    prior = case.make(**case.numbers)
    center = torch.tensor(case.numbers.get("mean", case.numbers.get("location", 0.0)), dtype=F64)
    density = vmap(lambda theta: prior.log_prob(theta).exp())
    assert_close(line(density, center), torch.ones((), dtype=F64), rtol=1e-10, atol=0)


@over(CASES)
def test_parameters_may_be_one_tensor(case):
    theta = randn(4)
    prior = case.make(**case.numbers)
    prior.check(theta, "fit(prior=...)")
    assert_close(prior.log_prob(theta), prior.log_prob({"w": theta}))


def test_defaults_are_standard():
    theta = {"w": randn(3)}
    one, zero = torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64)
    assert_close(priors.Normal().log_prob(theta), normal(theta["w"], one, zero).sum())
    assert_close(priors.Laplace().log_prob(theta), laplace(theta["w"], one, zero).sum())
    assert_close(priors.Horseshoe().log_prob(theta), horseshoe(theta["w"], one).sum())
    mixture = scale_mixture(theta["w"], 0.5 * one, one, math.exp(-6) * one)
    assert_close(priors.ScaleMixture().log_prob(theta), mixture.sum())


# Gradients.


def tensors_of(case, params):
    return {field: KINDS["tensor_for_each_leaf"](value, params) for field, value in case.numbers.items()}


def checked_with(function, *trees):
    """``function`` of the leaves of trees that gradients are asked for, and the leaves."""
    leaves, structure = optree.tree_flatten(trees)
    watched = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    return (lambda *leaves: function(*structure.unflatten(leaves))), watched


@over(CASES)
def test_gradients_in_parameters_and_numbers_are_those_of_differences(case):
    params = linear_params()
    function, leaves = checked_with(
        lambda theta, numbers: case.make(**numbers).log_prob(theta), params, tensors_of(case, params)
    )
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@over(CLOSED)
def test_gradients_of_the_expected_log_density_are_those_of_differences(case):
    mean = linear_params()
    variance = optree.tree_map(torch.exp, randn_like(mean, seed=5))
    function, leaves = checked_with(
        lambda m, v, numbers: case.make(**numbers).expected_log_prob(m, v),
        *(mean, variance, tensors_of(case, mean)),
    )
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@over(CASES)
def test_a_single_number_has_the_sum_of_the_gradients_of_all_parameters(case):
    params = linear_params()
    one = {field: torch.tensor(value, dtype=F64) for field, value in case.numbers.items()}
    each = {
        field: {name: torch.full_like(leaf, float(value)) for name, leaf in params.items()}
        for field, value in one.items()
    }
    find = grad(lambda numbers: case.make(**numbers).log_prob(params))
    for field, got in find(one).items():
        assert_close(got, sum(leaf.sum() for leaf in find(each)[field].values()))


@over(CASES)
def test_second_derivatives_agree_between_forward_and_reverse_mode(case):
    prior = case.make(**case.numbers)
    theta = randn(4)
    by_reverse = torch.autograd.functional.hessian(prior.log_prob, theta)
    assert_close(hessian(prior.log_prob)(theta), by_reverse)
    assert_close(jacfwd(jacfwd(prior.log_prob))(theta), by_reverse)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("distance", [0.0, 1e-30, 1e-10, 1e-3, 1.0, 5.0, 39.0, 41.0, 1e3, 1e30])
@pytest.mark.parametrize("std", [1e-18, 1e-10, 1e-3, 1.0, 1e10])
def test_the_mean_distance_and_its_gradients_are_right_next_to_certainty(std, distance, dtype):
    mean, variance = torch.tensor([distance, -distance], dtype=dtype), torch.full((2,), std**2, dtype=dtype)

    def mean_distance(m, v):
        return -priors.Laplace(scale=1.0).expected_log_prob(m, v) - 2 * math.log(2)

    by_mean, by_variance = grad(mean_distance, (0, 1))(mean, variance)
    # Derivatives of E|m + std z|: P(theta > 0) - P(theta < 0), and half the density of theta at zero times 2.
    ratio = mean.double() / std
    exact = torch.erf(ratio / math.sqrt(2))
    density = (-0.5 * ratio.square()).exp() / (std * math.sqrt(2 * math.pi))
    eps = torch.finfo(dtype).eps
    slack = {"rtol": 1e3 * eps, "atol": 0 if dtype == F64 else 1e-38}
    assert_close(by_mean.double(), exact, rtol=20 * eps, atol=0)
    assert_close(by_variance.double(), density, **slack)
    parts = std * math.sqrt(2 / math.pi) * (-0.5 * ratio.square()).exp() + mean.double() * exact
    got = priors.Laplace().expected_log_prob(mean, variance).double()
    assert_close(got, -(parts + math.log(2)).sum(), rtol=20 * eps, atol=0)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("distance", [0.0, 1e-10, 1.0, 1e30])
def test_the_expected_log_density_at_a_point_is_the_log_density_there(dtype, distance):
    mean, variance = torch.tensor([distance], dtype=dtype), torch.zeros(1, dtype=dtype)
    for prior in (priors.Laplace(scale=2.0), priors.Normal(precision=2.0)):
        assert_close(prior.expected_log_prob(mean, variance), prior.log_prob(mean))
        by_mean, by_variance = grad(prior.expected_log_prob, (0, 1))(mean, variance)
        assert_close(by_mean, grad(prior.log_prob)(mean))
        assert by_variance.isfinite().all()


# Transforms.


@over(CASES)
@every_kind
def test_the_log_density_mapped_over_draws_is_a_loop(case, kind):
    draws = [nested_params(), randn_like(nested_params(), 7), randn_like(nested_params(), 8)]
    prior = case.make(**{field: kind(value, draws[0]) for field, value in case.numbers.items()})
    each = torch.stack([prior.log_prob(draw) for draw in draws])
    assert_close(vmap(prior.log_prob)(stacked(*draws)), each)
    slopes = vmap(grad(prior.log_prob))(stacked(*draws))
    for i, draw in enumerate(draws):
        for got, want in zip(
            optree.tree_leaves(entry(slopes, i)), optree.tree_leaves(grad(prior.log_prob)(draw)), strict=True
        ):
            assert_close(got, want)


@over(CLOSED)
def test_the_expected_log_density_mapped_over_gaussians_and_priors_is_a_loop(case):
    means = [linear_params(), randn_like(linear_params(), 7)]
    variances = [optree.tree_map(torch.exp, randn_like(mean, seed)) for seed, mean in enumerate(means)]
    made = [
        case.make(**optree.tree_map(lambda t, i=i: t * (1 - i / 10), tensors_of(case, means[0])))
        for i in range(2)
    ]
    mapped = vmap(lambda prior, m, v: prior.expected_log_prob(m, v))(
        stacked(*made), stacked(*means), stacked(*variances)
    )
    each = [p.expected_log_prob(m, v) for p, m, v in zip(made, means, variances, strict=True)]
    assert_close(mapped, torch.stack(each))


@over(CASES)
def test_the_log_density_mapped_over_priors_is_a_loop(case):
    params = linear_params()
    made = [
        case.make(**optree.tree_map(lambda t, i=i: t * (1 - i / 10), tensors_of(case, params)))
        for i in range(3)
    ]
    mapped = vmap(lambda prior: prior.log_prob(params))(stacked(*made))
    assert_close(mapped, torch.stack([prior.log_prob(params) for prior in made]))


@over(CASES)
def test_a_prior_can_be_made_and_checked_inside_a_transform(case):
    params = linear_params()

    def find(numbers):
        prior = case.make(**numbers)
        prior.check(params, "fit(prior=...)")
        return prior.log_prob(params)

    numbers = {field: torch.tensor([value] * 2, dtype=F64) for field, value in case.numbers.items()}
    assert_close(vmap(find)(numbers), case.make(**case.numbers).log_prob(params).expand(2))


# Leaves and dtypes.


@over(CASES)
@every_kind
def test_what_is_no_parameter_is_passed_by(case, kind):
    params = linear_params()
    fields = {field: kind(value, params) for field, value in case.numbers.items()}
    prior = case.make(**fields)
    more = {
        **params,
        "running_mean": Fixed(randn(3)),
        "num_batches": torch.tensor(3),
        "mask": torch.ones(2) > 0,
    }
    assert_close(prior.log_prob(more), prior.log_prob(params))
    prior.check(more, "fit(prior=...)")
    ones = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    assert_close(prior.expected_log_prob(more, ones), prior.expected_log_prob(params, ones))


def test_old_parameters_can_be_the_location_of_a_prior():
    params = {**linear_params(), "running_mean": Fixed(torch.full((3,), math.nan)), "steps": torch.tensor(3)}
    ones = {name: torch.ones(leaf.shape, dtype=F64) for name, leaf in linear_params().items()}
    zeros = {name: torch.zeros(leaf.shape, dtype=F64) for name, leaf in linear_params().items()}
    assert_close(priors.Normal(mean=params).log_prob(params), normal_sum(zeros, ones))
    assert_close(priors.Laplace(location=params).log_prob(params), torch.tensor(-9 * math.log(2), dtype=F64))


def normal_sum(theta, precision):
    return sum(normal(theta[k], precision[k], torch.zeros_like(theta[k])).sum() for k in theta)


def test_a_prior_may_have_numbers_for_more_leaves():
    params = linear_params()
    prior = priors.Normal(precision={"w": 1.0, "b": 2.0, "gain": 3.0, "head": torch.ones(7)})
    prior.check(params, "fit(prior=...)")
    some = {"w": params["w"]}
    assert_close(prior.log_prob(some), normal_sum(some, {"w": torch.ones(2, 3, dtype=F64)}))


@over(CASES)
def test_a_tree_without_parameters_has_a_log_density_of_zero(case):
    for params in ({}, {"n": torch.tensor(3)}, {"w": torch.zeros(0, 3)}):
        assert_close(case.make(**case.numbers).log_prob(params), torch.tensor(0.0))


@over(CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_density_has_the_dtype_of_the_leaves(case, dtype):
    params = fb.to(linear_params(), dtype=dtype)
    prior = case.make(**case.numbers)
    log_prob = prior.log_prob(params)
    exact = prior.log_prob(fb.to(params, dtype=F64))  # of the same rounded numbers
    assert log_prob.dtype == dtype
    assert_close(log_prob.double(), exact, rtol=torch.finfo(dtype).eps + 1e-6, atol=0)
    assert {leaf.dtype for leaf in grad(prior.log_prob)(params).values()} == {dtype}
    ones = {name: torch.ones_like(leaf) for name, leaf in params.items()}
    expected = prior.expected_log_prob(params, ones)
    if expected is not None:
        wide = prior.expected_log_prob(fb.to(params, dtype=F64), fb.to(ones, dtype=F64))
        assert expected.dtype == torch.float32
        assert_close(expected.double(), wide, rtol=1e-6, atol=0)


@over(CASES)
def test_leaves_of_several_dtypes_have_a_log_density_in_the_widest(case):
    params = linear_params()
    mixed = {**params, "b": params["b"].bfloat16()}
    exact = {**params, "b": params["b"].bfloat16().double()}
    prior = case.make(**case.numbers)
    assert_close(prior.log_prob(mixed), prior.log_prob(exact))


@over(CASES)
def test_tensors_of_a_wider_prior_do_not_widen_the_result(case):
    params = fb.to(linear_params(), dtype=torch.float32)
    prior = case.make(**tensors_of(case, linear_params()))
    assert prior.log_prob(params).dtype == torch.float32


def test_numbers_are_not_rounded_to_single_precision_on_the_way():
    theta = torch.zeros(1, dtype=F64)
    assert_close(
        priors.Normal(precision=0.1).log_prob(theta),
        torch.tensor(0.5 * math.log(0.1 / (2 * math.pi)), dtype=F64),
        rtol=1e-15,
        atol=0,
    )


# Extreme inputs in single precision.

SIZES = [0.0, 1e-45, 1e-38, 1e-25, 1e-19, 1e-15, 1e-8, 1e-3, 0.1, 1.0, 3.0, 10.0, 88.0, 1e3, 1e5, 1e10, 1e18]
NORMALLY_TAILED = {"normal", "scale_mixture", "scale_mixture_with_the_narrow_first"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_parameters_have_finite_values_and_gradients(name, sign):
    # Squares of larger numbers are no float32, so a normal density has no finite logarithm there.
    sizes = SIZES if name in NORMALLY_TAILED else [*SIZES, 1e20, 1e30, 1e38]
    prior = CASES[name].make(**CASES[name].numbers)
    theta = sign * torch.tensor(sizes)
    log_probs, slopes = vmap(prior.log_prob)(theta), vmap(grad(prior.log_prob))(theta)
    assert log_probs.isfinite().all()
    assert slopes.isfinite().all()
    numbers = {field: torch.tensor(value) for field, value in CASES[name].numbers.items()}
    for size in theta:
        by_number = grad(lambda numbers, size=size: CASES[name].make(**numbers).log_prob(size))(numbers)
        assert all(slope.isfinite() for slope in by_number.values())
    exact, exact_slopes = vmap(prior.log_prob)(theta.double()), vmap(grad(prior.log_prob))(theta.double())
    moderate = theta.abs() >= 1e-15 if name == "horseshoe" else theta.abs() >= 0
    assert_close(log_probs[moderate].double(), exact[moderate], rtol=2e-6, atol=1e-6)
    assert_close(slopes[moderate].double(), exact_slopes[moderate], rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("name", ["scale_mixture", "scale_mixture_with_the_narrow_first"])
def test_a_mixture_whose_logarithm_is_no_float_has_the_gradient_of_its_wide_part(name):
    prior = CASES[name].make(**CASES[name].numbers)
    theta = torch.tensor([1e30, -1e25])
    assert_close(grad(prior.log_prob)(theta), -theta / 1.2**2)


@pytest.mark.parametrize("stds", [(1.0, 1e-18), (1e-18, 1.0), (1.0, 1.0), (1e15, 1e-15)])
def test_a_mixture_of_very_unequal_parts_is_that_of_double_precision(stds):
    prior = priors.ScaleMixture(*(torch.tensor(n, dtype=F64) for n in (0.5, *stds)))
    for theta in (0.0, 1e-19, 1e-17, 1e-3, 1.0, 5.0):
        single, double = (torch.tensor(theta, dtype=dtype) for dtype in (torch.float32, F64))
        numbers = (torch.tensor(n, dtype=F64) for n in (0.5, *stds))
        assert_close(prior.log_prob(single).double(), scale_mixture(double, *numbers), rtol=1e-5, atol=1e-5)
        slopes = grad(lambda prior, theta: prior.log_prob(theta), (0, 1))(prior, single)
        assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(slopes))


@pytest.mark.parametrize("std", [1e-8, 1e-9, 1e-12])
def test_the_wide_part_of_a_mixture_counts_beside_a_far_denser_one(std):
    numbers = (torch.tensor(n, dtype=F64) for n in (0.9, 1.0, std))
    theta = torch.zeros((), dtype=F64)
    # log(a + b) - log b with a <= b, where a / b is about the width of the narrow part.
    prior = priors.ScaleMixture(0.9, 1.0, std)
    narrow = math.log(0.1 / (std * math.sqrt(2 * math.pi)))
    assert_close(
        prior.log_prob(theta), narrow + torch.log1p(torch.tensor(9 * std, dtype=F64)), rtol=1e-14, atol=0
    )
    assert_close(prior.log_prob(theta), scale_mixture(theta, *numbers), rtol=1e-14, atol=0)


def test_equal_parts_of_a_mixture_share_gradients_by_weight():
    slopes = grad(lambda a, b: priors.ScaleMixture(0.3, a, b).log_prob(torch.tensor([0.5])), (0, 1))(
        *torch.tensor([2.0, 2.0])
    )
    whole = grad(lambda std: td.Normal(0.0, std).log_prob(torch.tensor(0.5)))(torch.tensor(2.0))
    assert_close(torch.stack(slopes), torch.stack([0.3 * whole, 0.7 * whole]))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_horseshoe_is_flat_at_zero_and_finite_there(dtype):
    prior, zeros = priors.Horseshoe(scale=0.1), torch.zeros(3, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    # The density at the smallest x: for small x, exp(x) E1(x) is -log x - gamma.
    euler = -torch.digamma(torch.ones((), dtype=F64))
    each = (-math.log(tiny) - euler).log() - math.log(0.1) - 0.5 * math.log(2 * math.pi**3)
    assert_close(prior.log_prob(zeros).double(), 3 * each, rtol=1e-6, atol=0)
    assert torch.equal(grad(prior.log_prob)(zeros), zeros)
    by_scale = grad(lambda scale: priors.Horseshoe(scale).log_prob(zeros))(torch.tensor(0.1, dtype=dtype))
    assert by_scale.isfinite()


def test_a_horseshoe_of_any_scale_is_the_standard_one_in_its_units():
    theta = torch.tensor([1e-3, 1.0, 40.0])
    standard = priors.Horseshoe()
    for scale in (1e-30, 1e-20, 1e20, 1e35):
        moved = priors.Horseshoe(scale)
        assert_close(
            moved.log_prob(theta * scale),
            standard.log_prob(theta) - 3 * math.log(scale),
            rtol=1e-5,
            atol=1e-4,
        )


# The exponential integral.


def integral(x, f):
    """``int_0^inf exp(-t) f(x, t) dt`` with ``t = exp(u)``; the trapezoidal rule is exact to rounding."""
    u = torch.arange(-120, 6, 1 / 16, dtype=F64)
    t = u.exp()
    return ((-t).exp() * f(x.unsqueeze(-1), t) * t).sum(-1) / 16


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_the_scaled_exponential_integral_is_that_of_quadrature(dtype, rtol):
    near, far = torch.linspace(-3, 3, 400, dtype=F64), torch.linspace(-30, 30, 301, dtype=F64) * math.log(10)
    log_x = torch.cat([near, far]).to(dtype)
    x = log_x.double().exp()
    exact = integral(x, lambda x, t: 1 / (x + t))
    assert_close(scaled_exponential_integral(log_x).double(), exact, rtol=rtol, atol=0)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 5e-6), (F64, 1e-12)])
def test_derivatives_of_the_scaled_exponential_integral_are_those_of_quadrature(dtype, rtol):
    largest = -math.log(torch.finfo(dtype).eps)
    log_x = torch.cat([torch.linspace(-80, -5, 50), torch.linspace(-5, largest, 400)]).to(dtype)
    x = log_x.double().exp()
    first = vmap(grad(scaled_exponential_integral))
    second = vmap(grad(grad(scaled_exponential_integral)))
    # In log x: x d/dx of 1 / (x + t), and the same once more.
    exact = integral(x, lambda x, t: -x / (x + t) ** 2)
    assert_close(first(log_x).double(), exact, rtol=rtol, atol=0)
    exact = integral(x, lambda x, t: x * (x - t) / (x + t) ** 3)
    size = integral(x, lambda x, t: x / (x + t) ** 2)
    assert ((second(log_x).double() - exact).abs() <= 10 * rtol * size).all()


# Priors as trees.


@over(CASES)
def test_a_saved_prior_is_read_as_it_was(case, tmp_path):
    params = linear_params()
    for numbers in (case.numbers, tensors_of(case, params)):
        prior = case.make(**numbers)
        fb.save(prior, tmp_path / "prior.safetensors")
        read = fb.load(tmp_path / "prior.safetensors")
        assert type(read) is type(prior)
        assert torch.equal(read.log_prob(params), prior.log_prob(params))


@over(CASES)
def test_a_prior_says_whether_all_parameters_have_one_density(case):
    params = linear_params()
    for name, kind in KINDS.items():
        prior = case.make(**{field: kind(value, params) for field, value in case.numbers.items()})
        assert prior.is_the_same_everywhere is name.startswith("one_")


@over(CASES)
def test_nothing_is_changed(case):
    params = linear_params()
    numbers = tensors_of(case, params)
    before = optree.tree_map(torch.clone, (params, numbers))
    prior = case.make(**numbers)
    prior.check(params, "fit(prior=...)")
    ones = optree.tree_map(torch.ones_like, params)
    assert torch.equal(prior.log_prob(params), prior.log_prob(params))
    prior.expected_log_prob(params, ones)
    for now, then in zip(optree.tree_leaves((params, numbers)), optree.tree_leaves(before), strict=True):
        assert torch.equal(now, then)


# Bad input.

ONES = {"w": torch.ones(2, 3), "b": torch.ones(2)}


def checked(prior, params=None):
    return prior.check(ONES if params is None else params, "vi.fit(prior=...)")


ERRORS = {
    "precision_negative": (
        lambda: priors.Normal(precision=-1.0),
        ValueError,
        r"`priors\.Normal\(precision=\.\.\.\)` should be positive and finite, got -1\.$",
    ),
    "precision_zero": (lambda: priors.Normal(0), ValueError, "positive and finite, got 0"),
    "precision_infinite": (lambda: priors.Normal(math.inf), ValueError, "positive and finite, got inf"),
    "mean_not_finite": (
        lambda: priors.Normal(mean=math.nan),
        ValueError,
        r"`priors\.Normal\(mean=\.\.\.\)` should be finite, got nan",
    ),
    "precision_of_a_leaf": (
        lambda: priors.Normal({"w": 1.0, "b": torch.tensor([1.0, -2.0])}),
        ValueError,
        "positive and finite, got numbers from -2 to 1 for 'b'",
    ),
    "scale_negative": (
        lambda: priors.Laplace(scale=-1e-3),
        ValueError,
        r"`priors\.Laplace\(scale=\.\.\.\)` should be positive and finite, got -0\.001\.",
    ),
    "location_infinite": (
        lambda: priors.Laplace(location=torch.tensor(-math.inf)),
        ValueError,
        r"`priors\.Laplace\(location=\.\.\.\)` should be finite, got -inf",
    ),
    "weight_of_one": (
        lambda: priors.ScaleMixture(weight=1.0),
        ValueError,
        r"`priors\.ScaleMixture\(weight=\.\.\.\)` should be above 0 and below 1, got 1\.",
    ),
    "weight_of_zero": (lambda: priors.ScaleMixture(torch.tensor(0.0)), ValueError, "above 0 and below 1"),
    "std_1_zero": (lambda: priors.ScaleMixture(std_1=0.0), ValueError, r"std_1=.* positive and finite"),
    "std_2_not_a_number": (lambda: priors.ScaleMixture(std_2=math.nan), ValueError, r"std_2=.*got nan"),
    "horseshoe_scale_zero": (
        lambda: priors.Horseshoe(0.0),
        ValueError,
        r"`priors\.Horseshoe\(scale=\.\.\.\)` should be positive",
    ),
    "text": (
        lambda: priors.Normal("1"),
        TypeError,
        r"`priors\.Normal\(precision=\.\.\.\)` should be a number or a tree of numbers, got str\.",
    ),
    "none": (lambda: priors.Horseshoe(None), TypeError, "a number or a tree of numbers, got None"),
    "truth": (lambda: priors.Laplace(True), TypeError, "got bool"),
    "tensor_of_truth": (lambda: priors.Laplace(torch.tensor(True)), TypeError, r"got torch\.bool"),
    "complex": (lambda: priors.Laplace(torch.tensor(1j)), TypeError, r"got torch\.complex64"),
    "text_for_a_leaf": (lambda: priors.Normal(mean={"w": "0"}), TypeError, "got str for 'w'"),
    "module": (lambda: priors.Normal(torch.nn.Linear(1, 1)), TypeError, "got Linear"),
    "one_tensor_of_several_numbers": (
        lambda: priors.Normal(precision=torch.ones(2)),
        ValueError,
        r"should be one number, or a tree .* got one tensor of shape \(2,\)",
    ),
    "leaf_missing": (
        lambda: priors.Normal({"w": 1.0}).log_prob(ONES),
        ValueError,
        r"`priors\.Normal\(precision=\.\.\.\)` should have a number for each leaf; 'b' is missing\.",
    ),
    "leaf_of_another_shape": (
        lambda: priors.Normal(mean={"w": torch.zeros(3), "b": 0.0}).log_prob(ONES),
        ValueError,
        r"`priors\.Normal\(mean=\.\.\.\)` should .* like the leaf.*'w' has shape \(3,\), not \(2, 3\)\.",
    ),
    "leaf_that_was_fixed": (
        lambda: priors.Normal(mean={"w": torch.ones(2, 3), "b": Fixed(torch.ones(2))}).log_prob(ONES),
        ValueError,
        "'b' is Fixed, no parameter",
    ),
    "stacked_priors_without_vmap": (
        lambda: stacked(*[priors.Horseshoe(torch.tensor(1.0))] * 2).log_prob(ONES),
        ValueError,
        r"got one tensor of shape \(2,\)",
    ),
    "checked_leaf_missing": (
        lambda: checked(priors.Laplace({"w": 1.0})),
        ValueError,
        r"`scale` in `vi\.fit\(prior=\.\.\.\)` should have a number for each leaf; 'b' is missing\.",
    ),
    "checked_leaf_of_another_shape": (
        lambda: checked(priors.Horseshoe({"w": torch.ones(3, 2), "b": 1.0})),
        ValueError,
        r"`scale` in `vi\.fit\(prior=\.\.\.\)` .*'w' has shape \(3, 2\), not \(2, 3\)",
    ),
    "checked_number_that_rounds_to_zero": (
        lambda: checked(priors.Normal(precision=1e-50)),
        ValueError,
        r"`precision` in `vi\.fit.*positive and finite, got 0 for 'b' in torch\.float32",
    ),
    "checked_number_of_the_last_leaf": (
        lambda: checked(priors.Normal(precision={"b": 1.0, "w": 1e-50})),
        ValueError,
        "positive and finite, got 0 for 'w' in",
    ),
    "checked_number_that_overflows": (
        lambda: checked(priors.Laplace(location=1e39)),
        ValueError,
        r"`location` in `vi\.fit.*finite, got inf for 'b' in torch\.float32",
    ),
    "checked_weight_that_rounds_to_one": (
        lambda: checked(priors.ScaleMixture(1 - 1e-12)),
        ValueError,
        "above 0 and below 1, got 1 for 'b'",
    ),
    "checked_number_of_a_rebuilt_prior": (
        lambda: checked(optree.tree_map(torch.neg, priors.Horseshoe(ONES))),
        ValueError,
        r"`scale` in .* positive and finite, got -1 for 'b'",
    ),
    "variance_missing": (
        lambda: priors.Normal().expected_log_prob(ONES, {"w": ONES["w"]}),
        ValueError,
        r"`expected_log_prob\(mean, variance\)` should have a variance for each .*'b' is missing",
    ),
    "variance_of_another_shape": (
        lambda: priors.Laplace().expected_log_prob(ONES, {**ONES, "b": torch.ones(3)}),
        ValueError,
        r"'b' has shape \(3,\), not \(2,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_priors_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


@over(CASES)
@every_kind
@every_tree
def test_a_prior_that_fits_passes_its_check(case, kind, tree):
    params = tree()
    case.make(**{field: kind(value, params) for field, value in case.numbers.items()}).check(params, "f")
