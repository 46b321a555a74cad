"""Families of posteriors: their draws, moments and densities."""

import math

import pytest
import torch
import zoo
from torch.func import grad, vmap
from torch.testing import assert_close
from zoo import DROPOUTS, F64, MODELS, POSTERIORS, WITH_FIXED, entry, gaussian, linear_params, randn

import funcbayes as fb
from funcbayes import Dropout, Ensemble, Fixed, Gaussian, Point
from funcbayes.covariances import Diagonal

SHAPES = {"w": (2, 3), "b": (2,), "gain": ()}  # ranks 2, 1, 0
OF_WEIGHTS = POSTERIORS | WITH_FIXED
of_weights = pytest.mark.parametrize("make", OF_WEIGHTS.values(), ids=OF_WEIGHTS.keys())
any_posterior = pytest.mark.parametrize(
    "make", (OF_WEIGHTS | DROPOUTS).values(), ids=(OF_WEIGHTS | DROPOUTS).keys()
)


def model():
    return MODELS["conv"]()


def named(tree):
    """Leaves by path, those of ``Fixed`` too."""
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(tree)
    return {torch.utils._pytree.keystr(path): leaf for path, leaf in leaves if leaf is not None}


def assert_trees_equal(one, other):
    one, other = named(one), named(other)
    assert one.keys() == other.keys()
    for name, leaf in one.items():
        assert torch.equal(leaf, other[name]), name


def take(tree, i):
    return torch.utils._pytree.tree_map(lambda t: t[i], tree)


# What numbered draws are.


@any_posterior
def test_draws_do_not_depend_on_which_others_are_asked_for_or_in_what_order(make):
    posterior = make(model())
    whole = posterior.draws(torch.arange(20), 3)
    for chosen in ([7], [3, 2, 1], [19, 0, 0, 5], list(range(19, -1, -1))):
        indices = torch.tensor(chosen)
        assert_trees_equal(posterior.draws(indices, 3), take(whole, indices))


@any_posterior
def test_a_draw_has_the_structure_of_the_others_and_a_leading_axis(make):
    posterior = make(model())
    indices = torch.arange(6)
    groups = posterior.structures(indices, 0)
    assert sorted(torch.cat(list(groups.values())).tolist()) == list(range(6))
    draw = posterior.draws(indices, 0)
    assert {leaf.shape[0] for leaf in named(draw).values()} == {6}


@any_posterior
def test_a_tensor_for_a_seed_gives_the_draws_of_the_int(make):
    posterior = make(model())
    assert_trees_equal(posterior.draws(torch.arange(5), torch.tensor(8)), posterior.draws(torch.arange(5), 8))


@of_weights
def test_sampling_mapped_over_seeds_equals_a_loop_over_seeds(make):
    posterior = make(model())
    got = vmap(lambda seed: posterior.sample(6, seed=seed))(torch.arange(4))
    for seed in range(4):
        assert_trees_equal(take(got, seed), posterior.sample(6, seed=seed))


@of_weights
def test_a_sample_is_the_first_draws(make):
    posterior = make(model())
    sample = posterior.sample(9, seed=2)
    assert_trees_equal(sample, posterior.draws(torch.arange(9), 2).leaves)
    assert_trees_equal(take(sample, slice(0, 4)), posterior.sample(4, seed=2))


@of_weights
def test_sampling_without_a_seed_is_governed_by_the_global_state(make):
    posterior = make(model())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = posterior.sample(3), posterior.sample(3)
        torch.manual_seed(3)
        assert_trees_equal(posterior.sample(3), first)
    if isinstance(posterior, Gaussian):
        assert not any(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))


def parameters(tree):
    return [leaf for name, leaf in named(tree).items() if "tensor" not in name]


def test_different_seeds_and_draws_give_different_noise():
    posterior = gaussian(linear_params())
    seen = [
        tuple(posterior.sample(50, seed=seed)[name][i].flatten().tolist()[:1])
        for seed in range(10)
        for name in SHAPES
        for i in range(50)
    ]
    assert len(set(seen)) == len(seen)


def test_noise_belongs_to_the_path_so_a_part_has_the_draws_of_the_whole():
    mean, variance = linear_params(), {k: v.abs() + 0.1 for k, v in linear_params().items()}
    whole = Gaussian(mean, Diagonal(variance)).sample(8, seed=1)
    for names in (["w"], ["b", "gain"], ["gain"]):
        part = Gaussian({k: mean[k] for k in names}, Diagonal({k: variance[k] for k in names})).sample(
            8, seed=1
        )
        assert set(part) == set(names)
        for k in names:
            assert torch.equal(part[k], whole[k])


def test_the_noise_of_a_leaf_in_a_list_does_not_depend_on_its_neighbours():
    mean = [randn(3), {"w": randn(2, 2)}]
    whole = gaussian(mean).sample(4, seed=0)
    variance = gaussian(mean).variance
    part = Gaussian([fb.MISSING, mean[1]], Diagonal([fb.MISSING, variance[1]])).sample(4, seed=0)
    assert torch.equal(part[1]["w"], whole[1]["w"])


def test_leaves_of_one_shape_at_different_paths_have_uncorrelated_noise():
    names, n = [f"layer{i}" for i in range(6)], 4000
    zeros, ones = {k: torch.zeros(2, dtype=F64) for k in names}, {k: torch.ones(2, dtype=F64) for k in names}
    draws = torch.cat(list(Gaussian(zeros, Diagonal(ones)).sample(n, seed=0).values()), 1)
    correlation = torch.corrcoef(draws.T) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(n)


# Moments.


def flat(draws):
    return torch.cat([draws[k].reshape(len(draws[k]), -1).double() for k in SHAPES], 1)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_draws_of_a_gaussian_have_its_mean_its_variance_and_no_covariances(dtype):
    n = 20_000
    mean = {k: randn(*s, seed=i).to(dtype) for i, (k, s) in enumerate(SHAPES.items())}
    variance = {k: randn(*s, seed=5 + i).exp().to(dtype) for i, (k, s) in enumerate(SHAPES.items())}
    sample = Gaussian(mean, Diagonal(variance)).sample(n, seed=0)
    for k, shape in SHAPES.items():
        assert sample[k].shape == (n, *shape)
        assert sample[k].dtype == dtype
    draws, m, v = (
        flat(sample),
        flat({k: t[None] for k, t in mean.items()})[0],
        flat({k: t[None] for k, t in variance.items()})[0],
    )
    rounding = 0 if dtype == F64 else torch.finfo(dtype).eps  # of a number to the nearest, relative
    assert ((draws.mean(0) - m).abs() < 5 * (v / n).sqrt() + rounding * (m.abs() + v.sqrt()) / 10).all()
    covariance = (draws - m).T @ (draws - m) / n
    # Var(x_i x_j) = v_i v_j (1 + [i = j]), Isserlis.
    error = (torch.outer(v, v) * (1 + torch.eye(9)) / n).sqrt()
    allowed = 5 * error + 4 * rounding * torch.diag(v) + rounding**2 * torch.diag(m**2 + v)
    assert ((covariance - torch.diag(v)).abs() < allowed).all()


def test_draws_of_an_ensemble_have_its_mean_variance_and_covariances():
    members = {k: randn(5, *s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}
    posterior = Ensemble(members, zoo.WEIGHTS)
    n = 20_000
    draws, values, p = flat(posterior.sample(n, seed=0)), flat(members), zoo.WEIGHTS
    mean = p @ values
    covariance = torch.einsum("k,ki,kj->ij", p, values - mean, values - mean)
    assert_close(flat({k: v[None] for k, v in posterior.mean.items()})[0], mean)
    assert_close(flat({k: v[None] for k, v in posterior.variance.items()})[0], covariance.diagonal())
    # Shares are those of a low-discrepancy sequence, so errors are far below 1 / sqrt(n).
    assert_close(draws.mean(0), mean, rtol=0, atol=30 / n)
    assert_close(torch.cov(draws.T, correction=0), covariance, rtol=0, atol=100 / n)


def test_every_draw_of_an_ensemble_is_one_member_in_all_leaves():
    members = {k: randn(5, *s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}
    for weights in (None, zoo.WEIGHTS):
        draws = Ensemble(members, weights).sample(40, seed=1)
        same = (flat(draws)[:, None] == flat(members)[None]).all(-1)
        assert (same.sum(1) == 1).all()
        assert set(same.double().argmax(1).tolist()) == set(range(5))


@pytest.mark.parametrize("num_samples", [1, 4, 5, 7, 10, 23])
def test_an_ensemble_of_equal_weights_uses_each_member_equally_often_within_one(num_samples):
    posterior = Ensemble({"i": torch.arange(5.0)})
    for seed in range(20):
        counts = torch.bincount(posterior.sample(num_samples, seed=seed)["i"].long(), minlength=5)
        assert counts.max() - counts.min() <= 1


def test_the_moments_of_an_equally_weighted_ensemble_are_those_of_its_members():
    members = {k: randn(5, *s) for k, s in SHAPES.items()}
    for posterior in (Ensemble(members), Ensemble(members, torch.full((5,), 7.0))):
        for k in SHAPES:
            assert_close(posterior.mean[k], members[k].mean(0))
            assert_close(posterior.variance[k], members[k].var(0, correction=0))
            assert_close(entry(posterior.members, 3)[k], posterior.member(3)[k])
    assert Ensemble(members).num_members == 5


def test_the_moments_of_an_ensemble_keep_a_narrow_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        posterior = Ensemble({"w": randn(5, 3).to(dtype)}, zoo.WEIGHTS)
        assert (
            posterior.mean["w"].dtype
            == posterior.variance["w"].dtype
            == posterior.sample(2)["w"].dtype
            == dtype
        )


def test_a_point_has_no_variance_and_every_draw_is_its_value():
    params = linear_params()
    posterior = Point({**params, "count": Fixed(torch.tensor(3))})
    draws = posterior.sample(4)
    for k, v in params.items():
        assert torch.equal(draws[k], v.expand(4, *v.shape))
        assert torch.equal(posterior.mean[k], v)
        assert torch.equal(posterior.variance[k], torch.zeros_like(v))
    assert draws["count"].tensor.tolist() == [3, 3, 3, 3]
    assert set(posterior.variance) == set(params)


def test_fixed_leaves_belong_to_every_draw_and_are_no_parameters():
    posterior = zoo.with_fixed(model())
    draws = posterior.sample(4, seed=0)
    names = [k for k, v in posterior.mean.items() if isinstance(v, Fixed)]
    assert names
    for k in names:
        value = posterior.mean[k].tensor
        assert torch.equal(draws[k].tensor, value.expand(4, *value.shape))
        assert k not in posterior.variance
    without = Gaussian({k: v for k, v in posterior.mean.items() if k not in names}, posterior.covariance)
    assert_close(posterior.log_prob(without.mean), without.log_prob(without.mean))


def test_sampling_is_differentiable_in_the_mean_and_variance_of_a_gaussian():
    mean, variance, cotangent = randn(2, 3), randn(2, 3).exp(), randn(7, 2, 3, seed=4)

    def inner(mean, variance):
        return (Gaussian({"w": mean}, Diagonal({"w": variance})).sample(7, seed=0)["w"] * cotangent).sum()

    z = (Gaussian({"w": mean}, Diagonal({"w": variance})).sample(7, seed=0)["w"] - mean) / variance.sqrt()
    expected = cotangent.sum(0), (cotangent * z).sum(0) / (2 * variance.sqrt())
    leaves = mean.clone().requires_grad_(), variance.clone().requires_grad_()
    for found in (grad(inner, argnums=(0, 1))(mean, variance), torch.autograd.grad(inner(*leaves), leaves)):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


# Densities.


def test_the_log_density_of_a_gaussian_is_that_of_torch_summed_over_leaves():
    mean, variance = linear_params(), {k: v.exp() for k, v in linear_params().items()}
    posterior, at = Gaussian(mean, Diagonal(variance)), {k: v + 1 for k, v in linear_params().items()}
    expected = sum(
        torch.distributions.Normal(mean[k], variance[k].sqrt()).log_prob(at[k]).sum() for k in mean
    )
    assert_close(posterior.log_prob(at), expected)
    assert_close(posterior.log_prob({**at, "another": randn(3)}), expected)
    assert_close(posterior.log_prob(dict(reversed(at.items()))), expected)
    draws = posterior.sample(6, seed=0)
    each = torch.stack([posterior.log_prob(entry(draws, i)) for i in range(6)])
    assert_close(vmap(posterior.log_prob)(draws), each)


def test_the_log_density_of_a_gaussian_over_a_part_is_that_of_the_part():
    mean = [randn(3), (randn(2, 2), randn())]
    variance = [fb.MISSING, (randn(2, 2).exp(), fb.MISSING)]
    posterior = Gaussian([fb.MISSING, (mean[1][0], fb.MISSING)], Diagonal(variance))
    at = [randn(3, seed=1), (randn(2, 2, seed=1), randn(seed=1))]
    expected = torch.distributions.Normal(mean[1][0], variance[1][0].sqrt()).log_prob(at[1][0]).sum()
    assert_close(posterior.log_prob(at), expected)


def test_the_average_log_density_of_draws_is_minus_the_entropy():
    variance = {k: v.exp() for k, v in linear_params().items()}
    posterior, n = Gaussian(linear_params(), Diagonal(variance)), 4000
    values = vmap(posterior.log_prob)(posterior.sample(n, seed=0))
    entropy = sum((0.5 * (2 * math.pi * math.e * v).log()).sum() for v in variance.values())
    assert abs(values.mean() + entropy) < 5 * values.std() / math.sqrt(n)


def test_a_variance_of_zero_makes_a_parameter_certain():
    posterior = Gaussian({"w": randn(3)}, Diagonal({"w": torch.zeros(3, dtype=F64)}))
    assert torch.equal(posterior.sample(5, seed=0)["w"], posterior.mean["w"].expand(5, 3))


def test_posteriors_are_not_changed_by_later_changes_of_the_dict_they_were_made_of():
    members = {"w": randn(4, 2)}
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    posterior = Ensemble(members, weights)
    assert torch.equal(weights, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert_close(posterior.weights, weights / 10)


# Errors.


ERRORS = {
    "integer_leaf_of_a_gaussian": (
        lambda: Gaussian({"w": torch.ones(2), "n": torch.arange(2)}, Diagonal({"w": torch.ones(2)})),
        TypeError,
        r"floating-point leaves; 'n' is torch\.int64.*fb\.Fixed",
    ),
    "covariance_is_a_tensor": (
        lambda: Gaussian({"w": torch.ones(2)}, torch.ones(2)),
        TypeError,
        r"funcbayes\.covariances.*got Tensor.*Diagonal",
    ),
    "covariance_lacks_a_leaf": (
        lambda: Gaussian({"w": torch.ones(2), "b": torch.ones(1)}, Diagonal({"w": torch.ones(2)})),
        ValueError,
        "'b' is missing",
    ),
    "covariance_has_another_leaf": (
        lambda: Gaussian({"w": torch.ones(2)}, Diagonal({"w": torch.ones(2), "b": torch.ones(1)})),
        ValueError,
        "'b' is not expected",
    ),
    "covariance_of_another_shape": (
        lambda: Gaussian({"w": torch.ones(2)}, Diagonal({"w": torch.ones(1)})),
        ValueError,
        r"'w' has shape \(1,\), not \(2,\)",
    ),
    "covariance_over_a_fixed_leaf": (
        lambda: Gaussian(
            {"m": Fixed(torch.ones(2)), "w": torch.ones(1)},
            gaussian({"m": randn(2), "w": randn(1)}).covariance,
        ),
        ValueError,
        "'m' is not expected",
    ),
    "negative_variance": (
        lambda: Diagonal({"w": torch.tensor([1.0, -0.5])}),
        ValueError,
        "not negative; 'w' has a smallest entry of -0.5",
    ),
    "variance_not_finite": (
        lambda: Diagonal({"w": torch.tensor([1.0, math.nan])}),
        ValueError,
        "finite.*'w'",
    ),
    "integer_variance": (lambda: Diagonal({"w": torch.ones(2).int()}), TypeError, r"'w' is torch\.int32"),
    "density_at_too_few_leaves": (
        lambda: gaussian(linear_params()).log_prob({"w": randn(2, 3), "gain": randn()}),
        ValueError,
        "'b' is missing",
    ),
    "density_at_another_shape": (
        lambda: gaussian({"w": randn(3)}).log_prob({"w": randn(4, 3)}),
        ValueError,
        r"'w' has shape \(4, 3\), not \(3,\)",
    ),
    "density_where_a_variance_is_zero": (
        lambda: Gaussian(
            {"w": randn(3), "b": randn(2)},
            Diagonal({"w": torch.tensor([1.0, 0.0, 1.0], dtype=F64), "b": torch.ones(2, dtype=F64)}),
        ).log_prob({"w": randn(3), "b": randn(2)}),
        ValueError,
        "`log_prob.*'w'",
    ),
    "no_members": (lambda: Ensemble({}), ValueError, "at least one leaf"),
    "members_are_numbers": (lambda: Ensemble({"w": 1.0}), TypeError, r"`Ensemble\(members\)`.*'w'.*float"),
    "point_is_numbers": (lambda: Point({"w": 1.0}), TypeError, r"`Point\(.*\)`.*'w'.*float"),
    "members_disagree": (
        lambda: Ensemble({"a": randn(3, 2), "b": randn(4)}),
        ValueError,
        "'b' has 4 where another has 3.*torch.stack",
    ),
    "members_without_an_axis": (lambda: Ensemble({"a": randn(3), "b": randn()}), ValueError, "'b' has None"),
    "members_of_length_zero": (lambda: Ensemble({"a": randn(0, 3)}), ValueError, "at least one"),
    "fixed_members_disagree": (
        lambda: Ensemble({"a": randn(3, 2), "m": Fixed(randn(2))}),
        ValueError,
        "'m' has 2",
    ),
    "weights_of_another_number": (
        lambda: Ensemble({"a": randn(3)}, torch.ones(2)),
        ValueError,
        r"3 members, got shape \(2,\)",
    ),
    "weights_negative": (
        lambda: Ensemble({"a": randn(2)}, torch.tensor([1.0, -1.0])),
        ValueError,
        "not negative",
    ),
    "weights_zero": (lambda: Ensemble({"a": randn(2)}, torch.zeros(2)), ValueError, "not all zero"),
    "weights_not_finite": (
        lambda: Ensemble({"a": randn(2)}, torch.tensor([1.0, math.inf])),
        ValueError,
        "finite",
    ),
    "empty_point": (lambda: Point({}), ValueError, "at least one leaf"),
    "dropout_rate_0": (lambda: Dropout(rate=0), ValueError, r"inside \(0, 1\), got 0"),
    "dropout_rate_1": (lambda: Dropout(rate=1.0), ValueError, r"inside \(0, 1\), got 1"),
    "dropout_rate_nan": (lambda: Dropout(rate=math.nan), ValueError, r"inside \(0, 1\), got nan"),
    "dropout_rate_negative": (lambda: Dropout(rate=-0.1), ValueError, r"inside \(0, 1\), got -0\.1"),
    "dropout_rate_text": (lambda: Dropout(rate="0.1"), TypeError, r"`Dropout\(rate=\.\.\.\)`.*got str"),
    "dropout_where_number": (lambda: Dropout(where=3), TypeError, r"`Dropout\(where=\.\.\.\)`.*got int"),
    "dropout_leaves": (lambda: Dropout().sample(3), TypeError, "hold no parameters.*predict"),
    "no_samples": (lambda: Point({"w": randn(1)}).sample(0), ValueError, "at least 1, got 0"),
    "negative_number_of_samples": (
        lambda: gaussian({"w": randn(1)}).sample(-2),
        ValueError,
        "at least 1, got -2",
    ),
    "fraction_of_a_sample": (lambda: gaussian({"w": randn(1)}).sample(2.5), TypeError, "int, got float"),
    "bool_for_a_number": (lambda: gaussian({"w": randn(1)}).sample(True), TypeError, "int, got bool"),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_posteriors_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_weights_may_be_of_integers_or_a_list():
    members = {"a": torch.tensor([1.0, 2.0, 6.0])}
    for weights in (torch.tensor([1, 1, 2]), [1, 1, 2]):
        assert_close(Ensemble(members, weights).mean["a"], torch.tensor(3.75))
