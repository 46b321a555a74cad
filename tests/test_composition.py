"""Posteriors made of posteriors: the laws that mixture, join, temper, restrict and to_ensemble obey."""

import fnmatch
import itertools
import math
import pickle

import optree
import pytest
import torch
import zoo
from torch.func import vmap
from torch.testing import assert_close
from zoo import (
    DROPOUTS,
    F64,
    MODELS,
    POSTERIORS,
    RAGGED,
    WITH_FIXED,
    around,
    entry,
    gaussian,
    linear,
    linear_params,
    members,
    numbered_draws,
    randn,
    randn_like,
    stacked,
)

import funcbayes as fb
from funcbayes import Dropout, Ensemble, Fixed, Gaussian, Join, Mixture, Point
from funcbayes.covariances import Diagonal
from funcbayes.likelihoods import Categorical
from funcbayes.posteriors import _allocation
from funcbayes.posteriors._allocation import allocate, allocate_ranked

ALL = POSTERIORS | WITH_FIXED | RAGGED | DROPOUTS
OF_WEIGHTS = POSTERIORS | WITH_FIXED
of_weights = pytest.mark.parametrize("make", OF_WEIGHTS.values(), ids=OF_WEIGHTS.keys())
any_posterior = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())


def model():
    return MODELS["conv_dropout"]()


def linear_model():
    return MODELS["linear"]()


def assert_draws_equal(one, other, num=12, seed=5):
    one, other = numbered_draws(one, num, seed), numbered_draws(other, num, seed)
    for i in range(num):
        assert optree.tree_structure(one[i]) == optree.tree_structure(other[i])
        for a, b in zip(optree.tree_leaves(one[i]), optree.tree_leaves(other[i]), strict=True):
            assert torch.equal(a, b)


def assert_predictions_equal(one, other, *, in_order=True, m=None, **options):
    m = m or model()
    x, y = m.inputs(4), torch.tensor([0, 1, 1, 0])
    options = {"likelihood": Categorical(), "targets": y, **options}
    a, b = (fb.predict(m.fn, m.params, posterior, x, **options) for posterior in (one, other))
    if in_order:
        assert_close(a.samples, b.samples)
    for statistic in ("mean", "variance", "entropy", "mutual_information"):
        assert_close(getattr(a, statistic), getattr(b, statistic))
    assert_close(a.log_prob(), b.log_prob())


def flat(tree):
    """Draws as vectors ``(S, P)``."""
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in optree.tree_leaves(tree)], 1)


def head(path, leaf=None):
    return path.startswith("7")


def rest(path, leaf=None):
    return not path.startswith("7")


# Mixtures.


@any_posterior
def test_a_mixture_of_one_is_that_one(make):
    posterior = make(model())
    assert fb.mixture(posterior) is posterior
    assert fb.mixture(posterior, weights=[3.0]) is posterior


@any_posterior
def test_a_join_of_one_is_that_one(make):
    posterior = make(model())
    assert fb.join(posterior) is posterior


@pytest.mark.parametrize("weights", [None, [1, 1, 1], [0.2, 0.5, 0.3], [0.01, 0.01, 0.98], [0, 1, 1]])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 32, 100])
def test_components_are_used_in_proportion_to_their_weights_in_every_prefix(weights, num_samples):
    points = [Point({"k": torch.tensor(float(k))}) for k in range(3)]
    expected = torch.tensor(weights or [1, 1, 1], dtype=F64)
    expected = expected / expected.sum()
    for seed in range(30):
        drawn = fb.mixture(*points, weights=weights).sample(num_samples, seed=seed)["k"].long()
        shares = torch.bincount(drawn, minlength=3)
        # A Weyl sequence with quotients of 1 and 2 has a discrepancy of about log(n) / n.
        assert ((shares - num_samples * expected).abs() <= 1 + math.log(1 + num_samples)).all()
        assert shares[expected == 0].sum() == 0


def test_a_draw_of_a_mixture_is_the_next_draw_of_its_component():
    components = [around(linear_model(), k) for k in range(3)]
    mixed = fb.mixture(*components, weights=[0.5, 0.2, 0.3])
    draws = flat(mixed.sample(60, seed=4))
    for k, component in enumerate(components):
        seed = fb.posteriors._mixture._component_seed(4, k)
        own = flat(component.sample(60, seed=seed))
        where = [(draws == row).all(1).nonzero().flatten().tolist() for row in own]
        used = [at[0] for at in where if at]
        assert used == sorted(used)
        assert len(used) in range(8, 40)
        assert all(where[: len(used)])  # none is skipped


def test_components_have_noise_of_their_own():
    one = gaussian(linear_params())
    draws = flat(fb.mixture(one, one).sample(200, seed=0)) - flat({k: v[None] for k, v in one.mean.items()})
    assert len({tuple(row.tolist()) for row in draws}) == 200


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 1.0]])
@pytest.mark.parametrize("inner_weights", [None, [0.7, 0.3]])
def test_nested_mixtures_visit_every_pair_of_components_in_proportion(weights, inner_weights):
    outer = [
        fb.mixture(
            *(Point({"pair": torch.tensor([float(i), float(j)])}) for j in range(2)), weights=inner_weights
        )
        for i in range(3)
    ]
    expected = torch.outer(
        torch.tensor(weights or [1.0] * 3) / sum(weights or [1.0] * 3),
        torch.tensor(inner_weights or [0.5] * 2),
    )
    for seed in range(20):
        pairs = fb.mixture(*outer, weights=weights).sample(120, seed=seed)["pair"].long()
        seen = torch.zeros(3, 2)
        seen.index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(120), accumulate=True)
        assert ((seen - 120 * expected).abs() < 8).all()


@pytest.mark.parametrize("weights", [None, [1.0, 2.0]])
@pytest.mark.parametrize("other_weights", [None, [1.0, 2.0]])
def test_two_mixtures_in_a_join_visit_every_pair_of_components(weights, other_weights):
    one, other = (
        fb.mixture(*(Point({name: torch.tensor(float(i))}) for i in range(2)), weights=w)
        for name, w in (("a", weights), ("b", other_weights))
    )
    p = torch.outer(*(torch.tensor(w or [1.0, 1.0]) / sum(w or [1.0, 1.0]) for w in (weights, other_weights)))
    n = 400
    for seed in range(20):
        draws = fb.join(one, other).sample(n, seed=seed)
        seen = torch.bincount((2 * draws["a"] + draws["b"]).long(), minlength=4).reshape(2, 2)
        # Choices of the two sites are unrelated: at worst as independent draws would be.
        assert ((seen - n * p).abs() < 5 * (n * p * (1 - p)).sqrt()).all()


def test_rare_choices_of_two_sites_in_a_join_meet_as_often_as_they_should():
    one, other = (
        fb.mixture(*(Point({name: torch.tensor(float(i))}) for i in range(2)), weights=[0.9, 0.1])
        for name in "ab"
    )
    joined, n = fb.join(one, other), 4000
    seen = torch.tensor(
        [float((draws["a"] * draws["b"]).sum()) for draws in (joined.sample(n, seed=s) for s in range(12))]
    )
    # As for independent draws, or better: not in step for ever.
    assert ((seen - n * 0.01).abs() < 5 * math.sqrt(n * 0.01 * 0.99)).all()
    assert (seen.mean() - n * 0.01).abs() < 5 * math.sqrt(n * 0.01 * 0.99 / len(seen))


def test_the_gradient_of_a_density_in_the_weights_is_that_of_its_logarithm():
    components = [around(linear_model(), k) for k in (1, 3, 5)]
    at = components[1].mean

    def log_density(weights):
        return Mixture(tuple(components), weights).log_prob(at)

    for weights in ([0.2, 0.5, 0.3], [0.0, 1.0, 1.0]):
        w = torch.tensor(weights, dtype=F64)
        densities = torch.stack([component.log_prob(at) for component in components])
        p = (densities - densities.max()).exp()
        expected = p / (w @ p) - 1 / w.sum()  # of log(sum w p / sum w)
        assert_close(torch.func.grad(log_density)(w), expected)


def test_the_mean_of_a_mixture_leaves_integers_out_and_averages_what_all_components_have():
    values = [
        Point({"w": torch.tensor(float(k)), "n": Fixed(torch.tensor(k)), "m": Fixed(torch.tensor(2.0 * k))})
        for k in (3, 5)
    ]
    mean = fb.mixture(*values).mean
    assert set(mean) == {"w", "m"}
    assert mean["w"] == 4.0
    assert mean["m"].tensor == 8.0
    without = Point({"w": torch.tensor(1.0)})
    assert set(fb.mixture(values[0], without).mean) == {"w"}


def test_a_nested_mixture_has_the_moments_and_density_of_the_flat_one():
    a, b, c = (around(linear_model(), k) for k in (1, 3, 5))
    nested, flat_one = fb.mixture(fb.mixture(a, b, weights=[1, 3]), c), fb.mixture(a, b, c, weights=[1, 3, 4])
    at = randn_like(linear_params(), 3)
    assert_close(nested.log_prob(at), flat_one.log_prob(at))
    for moment in ("mean", "variance"):
        optree.tree_map(assert_close, getattr(nested, moment), getattr(flat_one, moment))


def test_the_moments_of_a_mixture_are_those_of_its_draws():
    posterior, n = zoo.mixed_weighted(linear_model()), 20_000
    draws = flat(posterior.sample(n, seed=1))
    mean, variance = (
        flat(optree.tree_map(lambda t: t[None], m))[0] for m in (posterior.mean, posterior.variance)
    )
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    squares = (draws - mean) ** 2
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / math.sqrt(n)).all()


def test_the_density_of_a_mixture_is_that_of_torch():
    posterior, at = zoo.mixed_weighted(linear_model()), randn_like(linear_params(), 3, 0.1)

    def normal(component):
        mean, std = (
            torch.cat([t[k].flatten() for k in sorted(t)])
            for t in (component.mean, {k: v.sqrt() for k, v in component.variance.items()})
        )
        return mean, std

    means, stds = (torch.stack(t) for t in zip(*map(normal, posterior.components), strict=True))
    expected = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(posterior.weights),
        torch.distributions.Independent(torch.distributions.Normal(means, stds), 1),
    )
    value = torch.cat([at[k].flatten() for k in sorted(at)])
    assert_close(posterior.log_prob(at), expected.log_prob(value))


def test_a_stacked_posterior_is_the_mixture_of_its_entries():
    components = [around(model(), k) for k in range(3)]
    for weights in (None, [0.2, 0.5, 0.3]):
        assert_draws_equal(
            fb.mixture(stacked(*components), stacked=True, weights=weights),
            fb.mixture(*components, weights=weights),
        )


def test_vmap_makes_a_stacked_posterior():
    means = members(linear_params(), 4)

    def around_mean(mean):
        return Gaussian(mean, Diagonal({k: torch.ones_like(v) for k, v in mean.items()}))

    made = fb.mixture(vmap(around_mean)(means), stacked=True)
    assert_draws_equal(made, fb.mixture(*(around_mean(entry(means, k)) for k in range(4))))


def test_a_mixture_of_ensembles_uses_every_member_once_with_its_weight():
    one, other = Ensemble(members(linear_params(), 3)), Ensemble(members(linear_params(), 2, 0.1), [1.0, 3.0])
    mixed = fb.mixture(one, other, weights=[0.25, 0.75])
    prediction = fb.predict(linear, None, mixed, randn(4, 3))
    assert prediction.num_samples == 5
    expected = torch.tensor([1 / 12, 1 / 12, 1 / 12, 0.75 / 4, 0.75 * 3 / 4], dtype=F64)
    assert_close(prediction.weights, expected)
    whole = torch.cat([fb.predict(linear, None, e, randn(4, 3)).samples for e in (one, other)])
    assert_close(prediction.samples, whole)


def test_a_mixture_whose_components_cover_different_leaves_is_the_mixture_of_their_predictions():
    m = model()
    parts = [zoo.head_only(m), zoo.all_but_head(m)]
    mixed, x = fb.mixture(*parts), m.inputs(3)
    together = fb.predict(m.fn, m.params, mixed, x, num_samples=10, seed=0)
    draws = numbered_draws(mixed, 10, 0)
    covered = [set(draws[i].leaves) for i in range(10)]
    assert [covered.count(set(part.mean)) for part in parts] == [5, 5]
    expected = torch.stack([m.run({**m.params, **draws[i].leaves}, x) for i in range(10)])
    assert_close(together.samples, expected)


def test_points_over_different_leaves_are_evaluated_once_each():
    m = linear_model()
    points = [Point({"w": randn(2, 3, seed=4)}), Point({"b": randn(2, seed=5)})]
    x = m.inputs(4)
    got = fb.predict(m.fn, m.params, fb.mixture(*points, weights=[1, 3]), x)
    assert got.samples.shape == (2, 4, 2)
    expected = torch.stack([linear({**m.params, **p.params}, x) for p in points])
    assert_close(got.mean, 0.25 * expected[0] + 0.75 * expected[1])


def test_models_that_draw_random_numbers_are_keyed_by_the_number_of_the_draw():
    def noisy(params, x):
        return linear(params, x) + torch.randn(())

    m = linear_model()
    mixed, x = fb.mixture(zoo.head_only(m), zoo.all_but_head(m)), m.inputs(3)
    with pytest.warns(UserWarning, match="random numbers of its own"):
        many = fb.predict(noisy, m.params, mixed, x, num_samples=9, seed=0).samples
    few = fb.predict(noisy, m.params, mixed, x, num_samples=4, seed=0).samples
    assert_close(many[:4], few)


# Joins.


def test_a_join_has_the_draws_of_its_parts():
    m = model()
    parts = [zoo.head_only(m), Ensemble(members(zoo.all_but_head(m).mean))]
    draws = fb.join(*parts).sample(9, seed=3)
    for part in parts:
        for name, leaf in part.sample(9, seed=3).items():
            assert torch.equal(draws[name], leaf)


def test_joins_are_associative():
    m = linear_model()
    a, b, c = (gaussian({k: v}) for k, v in m.params.items())
    assert_draws_equal(fb.join(fb.join(a, b), c), fb.join(a, fb.join(b, c)))
    assert len(fb.join(fb.join(a, b), c).parts) == 3


def test_a_join_of_containers_other_than_dicts_fills_the_holes():
    m = MODELS["nested"]()
    whole = gaussian(m.params)
    joined = fb.join(fb.restrict(whole, "2*"), fb.restrict(whole, ["0*", "1*"]))
    assert_draws_equal(joined, whole)
    assert_predictions_equal(joined, whole, m=m, num_samples=5, seed=0)


def test_the_moments_and_density_of_a_join_are_those_of_the_whole():
    m = linear_model()
    whole = gaussian(m.params)
    joined = fb.join(fb.restrict(whole, "b"), fb.restrict(whole, ["w", "gain"]))
    at = randn_like(m.params, 2)
    assert_close(joined.log_prob(at), whole.log_prob(at))
    for moment in ("mean", "variance"):
        optree.tree_map(assert_close, getattr(joined, moment), getattr(whole, moment))
    assert set(fb.join(zoo.head_only(m), Dropout()).mean) == {"b"}


def test_a_gaussian_head_and_dropout_before_it_act_together():
    m = model()
    joined = fb.join(zoo.head_only(m), Dropout(rate=0.4))
    x = m.inputs(5)
    both, masks, weights = (
        fb.predict(m.fn, m.params, p, x, num_samples=64, seed=0).samples
        for p in (joined, Dropout(rate=0.4), zoo.head_only(m))
    )
    # With the draw's head in place of the trained one, the masks alone give the same.
    heads = zoo.head_only(m).sample(64, seed=0)
    for i in (0, 7, 63):
        at = {**m.params, **entry(heads, i)}
        one = fb.predict(m.fn, at, Dropout(rate=0.4), x, num_samples=64, seed=0).samples[i]
        assert_close(both[i], one)
    assert masks.std(0).min() > 0
    assert weights.std(0).min() > 0


def test_dropouts_on_different_layers_act_together():
    net = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Flatten(), torch.nn.Dropout(0.1)).double()
    fn, params = fb.make_functional(net)
    x = torch.ones(400, 50, dtype=F64)
    joined = fb.join(Dropout(rate=0.2, where="0"), Dropout(rate=0.5, where="2"))
    dropped = fb.predict(fn, params, joined, x, num_samples=2, seed=0).samples.eq(0).double().mean()
    p = 1 - 0.8 * 0.5
    assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / 40_000)


def test_a_join_with_one_ensemble_uses_each_member_once():
    m = linear_model()
    joined = fb.join(Point({"b": m.params["b"] + 1}), Ensemble(members(zoo.all_but_head(m).mean, 4)))
    assert fb.predict(m.fn, None, joined, m.inputs(2)).num_samples == 4
    several = fb.join(Ensemble({"b": randn(3, 2)}), Ensemble(members(zoo.all_but_head(m).mean, 4)))
    assert fb.predict(m.fn, None, several, m.inputs(2), seed=0).num_samples == 32


# Restriction.


@of_weights
def test_restricting_to_everything_changes_no_draw(make):
    posterior = make(model())
    assert_draws_equal(fb.restrict(posterior, "*"), posterior)


@of_weights
def test_the_draws_of_a_restricted_posterior_have_the_leaves_that_were_chosen(make):
    posterior = make(model())
    names = set(posterior.sample(1, seed=0))
    for where in (head, rest):
        expected = {name for name in names if where(name)}
        if expected:
            assert set(fb.restrict(posterior, where).sample(3, seed=0)) == expected


INDEPENDENT = {
    name: OF_WEIGHTS[name] for name in ("point", "gaussian", "gaussian_fixed", "tempered")
}  # no leaf tells of another


@pytest.mark.parametrize("make", INDEPENDENT.values(), ids=INDEPENDENT.keys())
@pytest.mark.parametrize("where", ["7.*", "*.weight", "0.*"])
def test_parts_of_an_independent_posterior_joined_are_the_posterior_draw_by_draw(make, where):
    posterior = make(model())

    joined = fb.join(
        fb.restrict(posterior, where),
        fb.restrict(posterior, lambda path, leaf: not fnmatch.fnmatchcase(path, where)),
    )
    assert_draws_equal(joined, posterior)
    assert_predictions_equal(joined, posterior, num_samples=6, seed=2)


@pytest.mark.parametrize("name", ["ensemble_weighted", "mixture_weighted", "mixture", "join_of_mixtures"])
def test_parts_of_a_posterior_joined_have_its_marginals(name):
    m = linear_model()
    posterior = POSTERIORS[name](m)
    joined = fb.join(fb.restrict(posterior, "w"), fb.restrict(posterior, ["b", "gain"]))
    for moment in ("mean", "variance"):
        optree.tree_map(assert_close, getattr(joined, moment), getattr(posterior, moment))
    n = 4000
    draws, variance = (
        flat(joined.sample(n, seed=0)),
        flat(optree.tree_map(lambda t: t[None], posterior.variance)),
    )
    mean = flat(optree.tree_map(lambda t: t[None], posterior.mean))
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()


def test_parts_joined_are_independent_where_the_whole_was_not():
    posterior = Ensemble({"a": torch.arange(4.0), "b": torch.arange(4.0)}, [0.1, 0.2, 0.3, 0.4])
    whole = posterior.sample(500, seed=0)
    assert torch.equal(whole["a"], whole["b"])
    parts = fb.join(fb.restrict(posterior, "a"), fb.restrict(posterior, "b")).sample(500, seed=0)
    correlation = torch.corrcoef(torch.stack([parts["a"], parts["b"]]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(500)


def test_a_predicate_sees_leaves_without_the_axis_of_members():
    seen = {}

    def where(path, leaf):
        seen[path] = tuple(leaf.shape)
        return True

    for posterior in (Ensemble(members(linear_params())), gaussian(linear_params()), Point(linear_params())):
        fb.restrict(posterior, where)
        assert seen == {"w": (2, 3), "b": (2,), "gain": ()}


def test_what_is_fixed_is_left_out_or_kept_by_its_path():
    posterior = zoo.with_fixed(model())
    kept = fb.restrict(posterior, "*running*")
    assert isinstance(kept, Point)
    assert all(isinstance(leaf, Fixed) for leaf in kept.params.values())
    assert not any(isinstance(leaf, Fixed) for leaf in fb.restrict(posterior, "7.*").mean.values())


# Antithetic draws.


GAUSSIANS = ("gaussian", "gaussian_low_rank_precision", "gaussian_kronecker", "gaussian_dense", "swag")
each_gaussian = pytest.mark.parametrize("name", [*GAUSSIANS, "linearized"])


def in_pairs(tree):
    """Sums over the two draws of each pair."""
    return optree.tree_map(lambda t: t.unflatten(0, (-1, 2)).sum(1), tree)


@each_gaussian
def test_antithetic_draws_lie_on_opposite_sides_of_the_mean(name):
    posterior = POSTERIORS[name](linear_model())
    draws = fb.antithetic(posterior).sample(8, seed=1)
    for leaf, mean in zip(
        optree.tree_leaves(in_pairs(draws)), optree.tree_leaves(posterior.mean), strict=True
    ):
        assert_close(leaf, (2 * mean).expand_as(leaf))
    first = optree.tree_map(lambda t: t[::2], draws)
    optree.tree_map(assert_close, first, posterior.sample(4, seed=1))  # each with numbers of its own


@each_gaussian
def test_an_antithetic_draw_does_not_depend_on_its_company(name):
    posterior = fb.antithetic(POSTERIORS[name](linear_model()))
    whole = posterior.draws(torch.arange(7), 3).leaves
    some = posterior.draws(torch.tensor([5, 2, 4]), 3).leaves
    optree.tree_map(lambda a, b: assert_close(a[torch.tensor([5, 2, 4])], b), whole, some)
    seeds = torch.tensor([3, 4])
    mapped = vmap(lambda seed: posterior.draws(torch.arange(7), seed).leaves)(seeds)
    optree.tree_map(lambda a, b: assert_close(a[0], b), mapped, whole)


def test_antithetic_draws_have_no_error_in_what_is_linear():
    params = linear_params()
    posterior = gaussian(params)
    flat_model, x = fb.linearize(linear, params), randn(5, 3)
    mean = fb.predict(flat_model, params, fb.antithetic(posterior), x, num_samples=6, seed=0).mean
    assert_close(mean, linear(params, x))
    alone = fb.predict(flat_model, params, posterior, x, num_samples=6, seed=0).mean
    assert not torch.allclose(alone, linear(params, x), atol=1e-3)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_antithetic_draws_are_the_same_in_any_chunks(chunk_size):
    params, x = linear_params(), randn(5, 3)
    posterior = fb.antithetic(gaussian(params))
    draws = posterior.sample(8, seed=2)
    expected = torch.stack([linear({k: v[s] for k, v in draws.items()}, x) for s in range(8)])
    got = fb.predict(linear, params, posterior, x, num_samples=8, seed=2, chunk_size=chunk_size)
    assert_close(got.samples, expected)


def test_other_posteriors_are_made_of_antithetic_gaussians():
    params = linear_params()
    one, other = gaussian(params), gaussian({k: v + 9 for k, v in params.items()})
    mixed = fb.antithetic(fb.mixture(one, other)).sample(8, seed=0)
    of_first = {k: v[mixed["b"][:, 0] < 5] for k, v in mixed.items()}
    for name, leaf in in_pairs(of_first).items():
        assert_close(leaf, (2 * params[name]).expand_as(leaf))
    head = fb.restrict(one, "w")
    joined = fb.antithetic(fb.join(head, fb.Ensemble({"b": randn(3, 2), "gain": randn(3)})))
    assert_close(in_pairs(joined.sample(6, seed=0))["w"], (2 * params["w"]).expand(3, 2, 3))
    tempered = fb.temper(fb.antithetic(one), 4.0)
    optree.tree_map(assert_close, tempered.variance, fb.temper(one, 4.0).variance)
    assert_close(in_pairs(tempered.sample(4, seed=0))["w"], (2 * params["w"]).expand(2, 2, 3))


@pytest.mark.parametrize("posterior", [fb.Dropout(), fb.Point({"w": torch.ones(2)})])
def test_what_has_no_gaussian_cannot_be_antithetic(posterior):
    with pytest.raises(TypeError, match=r"antithetic\(posterior\)` should be given a Gaussian"):
        fb.antithetic(posterior)


# Orthogonal draws.


def deviations(posterior, draws):
    """As columns ``(P, S)``, in the order of the covariance's matrix."""
    rows = [(draws[k] - posterior.mean[k]).reshape(len(draws[k]), -1) for k in sorted(posterior.mean)]
    return torch.cat(rows, 1).mT


def with_inverse(name):
    """A Gaussian whose covariance has one: that of the zoo has too few factors for it."""
    if name == "gaussian_dense":
        params = linear_params()
        return fb.Gaussian(params, fb.covariances.Dense(zoo.factors(params, 12)))
    return POSTERIORS[name](linear_model())


@each_gaussian
def test_orthogonal_draws_are_those_of_a_factorisation_of_their_noise(name):
    posterior = with_inverse(name)
    num_params = posterior.covariance.to_dense().shape[0]
    count = min(32, num_params)
    whole = fb.orthogonal(posterior).sample(2 * count + 1, seed=1)
    draws = deviations(posterior, whole)
    alone = deviations(posterior, posterior.sample(2 * count + 1, seed=1))
    inverse = posterior.covariance.to_dense().inverse()
    root = torch.linalg.cholesky(posterior.covariance.to_dense())
    for start in (0, count):
        group = slice(start, start + count)
        gram = draws[:, group].mT @ inverse @ draws[:, group]
        norms = (alone[:, group] * (inverse @ alone[:, group])).sum(0).sqrt()
        assert_close(gram, norms.square().diag(), rtol=1e-6, atol=1e-6)
        # Of ``z = root^-1 d``, which is a standard normal whatever root is taken.
        z = torch.linalg.solve_triangular(root, alone[:, group], upper=False)
        q, r = torch.linalg.qr(z)
        expected = root @ (q * r.diagonal().sign()) * norms
        assert_close(draws[:, group], expected, rtol=1e-5, atol=1e-6)


@each_gaussian
def test_an_orthogonal_draw_does_not_depend_on_its_company(name):
    posterior = fb.orthogonal(with_inverse(name))
    whole = posterior.draws(torch.arange(37), 3).leaves
    some = torch.tensor([35, 2, 11])
    optree.tree_map(
        lambda a, b: assert_close(a[some], b, rtol=0, atol=0), whole, posterior.draws(some, 3).leaves
    )
    seeds = torch.tensor([3, 4])
    mapped = vmap(lambda seed: posterior.draws(torch.arange(37), seed).leaves)(seeds)
    optree.tree_map(lambda a, b: assert_close(a[0], b), mapped, whole)
    by_number = vmap(lambda i: posterior.draws(i[None], 3).leaves)(torch.arange(37))
    optree.tree_map(lambda a, b: assert_close(a[:, 0], b), by_number, whole)


def test_orthogonal_draws_average_what_is_quadratic_with_less_variance():
    # Of P draws of P numbers w the mean of w^T B w, with tr(B) = 0, has the variance 4 tr(B^2) / (P (P + 2)),
    # by the moments of a chi-square and of a point on a sphere: (P + 2) / 2 times less than alone.
    num, seeds = 6, torch.arange(4000)
    signs = torch.tensor([1.0, -1.0] * (num // 2), dtype=torch.float64)
    q = fb.orthogonal(
        fb.Gaussian(
            {"w": torch.zeros(num, dtype=torch.float64)},
            fb.covariances.Diagonal({"w": torch.ones(num, dtype=torch.float64)}),
        )
    )
    draws = vmap(lambda seed: q.draws(torch.arange(num), seed).leaves["w"])(seeds)
    means = (draws.square() @ signs).mean(1)
    expected = 4 * num / (num * (num + 2))
    assert means.mean().abs() < 4 * (expected / len(seeds)) ** 0.5
    squares = means.square()
    assert (squares.mean() - expected).abs() < 4 * squares.std() / len(seeds) ** 0.5
    covariance = draws.flatten(0, 1).mT @ draws.flatten(0, 1) / (num * len(seeds))
    assert_close(covariance, torch.eye(num, dtype=torch.float64), rtol=0, atol=5 * (2 / 24000) ** 0.5)


def test_opposite_draws_of_orthogonal_ones_are_both():
    posterior = fb.antithetic(fb.orthogonal(gaussian(linear_params())))
    draws = posterior.sample(8, seed=2)
    for name, leaf in in_pairs(draws).items():
        assert_close(leaf, (2 * posterior.mean[name]).expand_as(leaf))
    first = {name: leaf[::2] for name, leaf in draws.items()}
    optree.tree_map(assert_close, first, fb.orthogonal(gaussian(linear_params())).sample(4, seed=2))


def test_orthogonal_draws_need_an_inverse():
    mean = {"a": torch.zeros(2), "b": torch.zeros(3)}
    q = fb.Gaussian(mean, fb.covariances.Diagonal({"a": torch.zeros(2), "b": torch.ones(3)}))
    with pytest.raises(
        ValueError, match=r"orthogonal\(posterior\)` should be given covariances with an inverse"
    ):
        fb.orthogonal(q)
    with pytest.raises(TypeError, match=r"orthogonal\(posterior\)` should be given a Gaussian"):
        fb.orthogonal(fb.Dropout())


# Tempering.


@pytest.mark.parametrize("temperature", [0.25, 3.0, torch.tensor(0.5)])
def test_tempering_scales_the_covariance_and_keeps_the_mean(temperature):
    posterior = gaussian(linear_params())
    tempered = fb.temper(posterior, temperature)
    for name, variance in posterior.variance.items():
        assert_close(tempered.variance[name], variance * float(temperature))
        assert torch.equal(tempered.mean[name], posterior.mean[name])


@pytest.mark.parametrize("temperature", [0.25, 3.0])
def test_a_tempered_density_is_a_power_of_the_density(temperature):
    posterior = gaussian(linear_params())
    tempered = fb.temper(posterior, temperature)
    a, b = randn_like(linear_params(), 1), randn_like(linear_params(), 2)
    ratio = posterior.log_prob(a) - posterior.log_prob(b)
    assert_close(tempered.log_prob(a) - tempered.log_prob(b), ratio / temperature)


def test_tempering_twice_multiplies_the_temperatures_and_one_changes_nothing():
    posterior = gaussian(linear_params())
    twice, once = fb.temper(fb.temper(posterior, 0.5), 6.0), fb.temper(posterior, 3.0)
    optree.tree_map(assert_close, twice.variance, once.variance)
    assert_draws_equal(fb.temper(posterior, 1.0), posterior)


def test_tempering_is_differentiable_in_the_temperature():
    posterior = gaussian(linear_params())
    temperature = torch.tensor(0.5, dtype=F64, requires_grad=True)
    total = sum(v.sum() for v in fb.temper(posterior, temperature).variance.values())
    expected = sum(v.sum() for v in posterior.variance.values())
    assert_close(torch.autograd.grad(total, temperature)[0], expected)


def test_a_join_is_tempered_part_by_part_and_points_stay():
    m = linear_model()
    joined = fb.join(zoo.all_but_head(m), Point({"b": m.params["b"]}))
    tempered = fb.temper(joined, 4.0)
    expected = fb.join(fb.temper(zoo.all_but_head(m), 4.0), Point({"b": m.params["b"]}))
    assert_draws_equal(tempered, expected)


# Fixed draws.


@any_posterior
@pytest.mark.parametrize("num_samples", [1, 7])
def test_predicting_with_fixed_draws_is_predicting(make, num_samples):
    posterior = make(model())
    fixed = fb.to_ensemble(posterior, num_samples, seed=3)
    in_order = isinstance(fixed, Ensemble)
    assert in_order or make in RAGGED.values()
    # Weights are equal in both, so statistics do not depend on the order.
    m = model()
    x = m.inputs(4)
    got = fb.predict(m.fn, m.params, fixed, x, likelihood=Categorical())
    expected = fb.predict(
        m.fn, m.params, posterior, x, likelihood=Categorical(), num_samples=num_samples, seed=3
    )
    assert_close(got.weights, expected.weights)
    assert_close(got.mean, expected.mean)
    assert_close(got.variance, expected.variance)
    a, b = got.samples, expected.samples
    if not in_order:
        a, b = (t[t[:, 0, 0].argsort()] for t in (a, b))
    assert_close(a, b)


def test_fixed_draws_keep_dropout_masks():
    m = model()
    fixed = fb.to_ensemble(fb.join(zoo.head_only(m), Dropout()), 5, seed=0)
    assert fixed.num_members == 5
    assert len(fixed.effects) == 1
    one, other = (fb.predict(m.fn, m.params, fixed, m.inputs(3)).samples for _ in range(2))
    assert torch.equal(one, other)
    assert one.std(0).min() > 0


# Composition commutes with saving, with vmap, with moving.


@any_posterior
def test_a_composed_posterior_survives_saving(make, tmp_path):
    posterior = make(model())
    fb.save(posterior, tmp_path / "posterior.safetensors")
    assert_draws_equal(fb.load(tmp_path / "posterior.safetensors"), posterior)
    assert_draws_equal(pickle.loads(pickle.dumps(posterior)), posterior)


def test_composing_what_was_saved_is_saving_what_was_composed(tmp_path):
    m = model()
    a, b = around(m, 1), around(m, 2)

    def compose(a, b):
        return fb.mixture(
            fb.temper(a, 0.5), fb.join(fb.restrict(b, head), fb.restrict(a, rest)), weights=[1, 2]
        )

    def saved(posterior, name):
        fb.save(posterior, tmp_path / name)
        return fb.load(tmp_path / name)

    assert_draws_equal(compose(saved(a, "a"), saved(b, "b")), saved(compose(a, b), "ab"))


COMPOSITIONS = {
    "mixture": lambda a, b: fb.mixture(a, b),
    "mixture_weighted": lambda a, b: fb.mixture(a, b, weights=[0.2, 0.8]),
    "temper": lambda a, b: fb.temper(a, 0.3),
    "restrict": lambda a, b: fb.restrict(a, ["w", "gain"]),
    "join": lambda a, b: fb.join(fb.restrict(a, "w"), fb.restrict(b, ["b", "gain"])),
    "nested": lambda a, b: fb.mixture(fb.mixture(a, b), fb.temper(b, 2.0), weights=[1, 3]),
    "to_ensemble": lambda a, b: fb.to_ensemble(fb.mixture(a, b), 5, seed=1),
}


@pytest.mark.parametrize("compose", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_composing_under_vmap_is_composing_each(compose):
    firsts, seconds = ([around(linear_model(), 10 * i + k) for k in range(3)] for i in (1, 2))

    def sampled(a, b):
        return compose(a, b).sample(6, seed=0)

    got = vmap(sampled)(stacked(*firsts), stacked(*seconds))
    for k in range(3):
        optree.tree_map(assert_close, entry(got, k), sampled(firsts[k], seconds[k]))


@pytest.mark.parametrize("compose", COMPOSITIONS.values(), ids=COMPOSITIONS.keys())
def test_posteriors_made_under_vmap_are_stacked_posteriors(compose):
    firsts, seconds = ([around(linear_model(), 10 * i + k) for k in range(3)] for i in (1, 2))
    got = vmap(compose)(stacked(*firsts), stacked(*seconds))
    for k in range(3):
        assert_draws_equal(entry(got, k), compose(firsts[k], seconds[k]))


def test_sampling_a_composed_posterior_is_differentiable_in_its_means():
    def total(mean):
        other = Point({"w": torch.zeros(2, 3, dtype=F64)})
        mixed = fb.mixture(Gaussian({"w": mean}, Diagonal({"w": torch.ones(2, 3, dtype=F64)})), other)
        return mixed.sample(6, seed=0)["w"].sum()

    assert_close(torch.func.grad(total)(randn(2, 3)), torch.full((2, 3), 3.0, dtype=F64))


def test_composed_posteriors_move_to_another_dtype():
    moved = fb.to(zoo.mixed_weighted(linear_model()), dtype=torch.float32)
    assert {leaf.dtype for leaf in moved.sample(3, seed=0).values()} == {torch.float32}


# Draws as functions.


@pytest.mark.parametrize("name", [*OF_WEIGHTS, *RAGGED])
def test_a_sampled_function_is_the_draw_of_predict(name):
    m = model()
    posterior, x = (OF_WEIGHTS | RAGGED)[name](m), m.inputs(5)
    expected = fb.predict(m.fn, m.params, posterior, x, num_samples=4, seed=7).samples
    for i in range(4):
        f = fb.sample_function(m.fn, m.params, posterior, seed=7, index=i)
        assert_close(f(x), expected[i])
        assert_close(f(entry(x, slice(1, 3))), expected[i][1:3])


def test_a_sampled_function_of_dropout_has_one_mask_for_all_rows():
    m = model()
    x = m.inputs(6)
    f = fb.sample_function(m.fn, m.params, Dropout(rate=0.5, shared_mask=True), seed=1)
    assert_close(torch.cat([f(x[:2]), f(x[2:])]), f(x))
    assert not torch.allclose(f(x), m.fn(m.params, x))


def test_a_sampled_function_without_a_seed_is_governed_by_the_global_state():
    posterior, x = gaussian(linear_params()), randn(3, 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, second = (fb.sample_function(linear, None, posterior)(x) for _ in range(2))
        torch.manual_seed(1)
        assert torch.equal(fb.sample_function(linear, None, posterior)(x), first)
    assert not torch.equal(first, second)


# Errors.


def point(**leaves):
    return Point({k: torch.zeros(v) for k, v in leaves.items()})


ERRORS = {
    "mixture_of_nothing": (lambda: fb.mixture(), ValueError, "at least one posterior, got none"),
    "mixture_of_params": (
        lambda: fb.mixture({"w": torch.ones(2)}),
        TypeError,
        r"`mixture\(\*posteriors\)`.*got dict.*Point",
    ),
    "mixture_of_a_list": (lambda: fb.mixture([point(w=2)]), TypeError, "got list"),
    "mixture_of_shapes": (
        lambda: fb.mixture(point(w=2), point(w=3)),
        ValueError,
        r"'w' is float32\(2,\) on cpu in component 0 and float32\(3,\) on cpu in component 1",
    ),
    "mixture_of_dtypes": (
        lambda: fb.mixture(point(w=2), fb.to(point(w=2), dtype=F64)),
        ValueError,
        "'w' is float32.*float64.*funcbayes.to",
    ),
    "mixture_of_fixed_and_free": (
        lambda: fb.mixture(point(w=2), Point({"w": Fixed(torch.zeros(2))})),
        ValueError,
        "'w' is float32.*fixed float32",
    ),
    "mixture_weights_count": (
        lambda: fb.mixture(point(w=2), point(w=2), weights=[1.0]),
        ValueError,
        r"2 components, got shape \(1,\)",
    ),
    "mixture_weights_negative": (
        lambda: fb.mixture(point(w=2), point(w=2), weights=[1.0, -1.0]),
        ValueError,
        "not negative",
    ),
    "mixture_stacked_two": (
        lambda: fb.mixture(point(w=2), point(w=2), stacked=True),
        ValueError,
        "one posterior, got 2",
    ),
    "mixture_stacked_ragged": (
        lambda: fb.mixture(point(w=2, b=3), stacked=True),
        ValueError,
        r"leading axis over the components, got lengths \[2, 3\]",
    ),
    "mixture_stacked_without_leaves": (
        lambda: fb.mixture(Dropout(), stacked=True),
        ValueError,
        "leading axis over the components",
    ),
    "mixture_sampled_ragged": (
        lambda: fb.mixture(point(w=2), point(b=2)).sample(3),
        TypeError,
        "`sample` has no tree to return for Mixture.*different leaves",
    ),
    "mixture_with_dropout_sampled": (
        lambda: fb.mixture(point(w=2), Dropout()).sample(3),
        TypeError,
        "hold no parameters",
    ),
    "mixture_mean_ragged": (
        lambda: fb.mixture(point(w=2), point(b=2)).mean,
        NotImplementedError,
        "different leaves",
    ),
    "mixture_mean_of_dropout": (
        lambda: fb.mixture(Dropout(), Dropout(rate=0.5)).mean,
        NotImplementedError,
        "`mean` is not defined for Dropout",
    ),
    "density_of_an_ensemble": (
        lambda: fb.mixture(point(w=2), point(w=2)).log_prob({"w": torch.zeros(2)}),
        NotImplementedError,
        "`log_prob` is not defined for Point",
    ),
    "join_of_nothing": (lambda: fb.join(), ValueError, "at least one posterior, got none"),
    "join_of_params": (lambda: fb.join({"w": torch.ones(2)}), TypeError, "got dict"),
    "join_overlapping": (
        lambda: fb.join(point(w=2, b=1), point(b=1)),
        ValueError,
        r"'b' is covered by 0 and 1.*restrict",
    ),
    "join_of_dropouts": (
        lambda: fb.join(Dropout(rate=0.1), Dropout(rate=0.6, where="0")),
        ValueError,
        r"act on different layers; one of these acts on all.*Dropout\(where=\.\.\.\)",
    ),
    "mixture_weights_text": (
        lambda: fb.mixture(point(w=2), point(w=2), weights="ab"),
        TypeError,
        "should have numbers, got str",
    ),
    "temper_several": (
        lambda: fb.temper(gaussian(linear_params()), torch.ones(2)),
        TypeError,
        r"one number, got \(2,\)",
    ),
    "temper_text": (lambda: fb.temper(gaussian(linear_params()), "x"), TypeError, "one number, got str"),
    "temper_bool": (lambda: fb.temper(gaussian(linear_params()), True), TypeError, "one number, got bool"),
    "function_of_bool": (
        lambda: fb.sample_function(linear, None, gaussian(linear_params()), index=True),
        TypeError,
        "should be an int, got bool",
    ),
    "temper_zero": (
        lambda: fb.temper(gaussian(linear_params()), 0.0),
        ValueError,
        "positive and finite, got 0",
    ),
    "temper_nan": (lambda: fb.temper(gaussian(linear_params()), math.nan), ValueError, "got nan"),
    "temper_mixture": (
        lambda: fb.temper(fb.mixture(point(w=2), point(w=2)), 0.5),
        TypeError,
        "got Mixture.*before mixing",
    ),
    "temper_ensemble": (lambda: fb.temper(Ensemble({"w": randn(3)}), 0.5), TypeError, "got Ensemble"),
    "temper_dropout": (lambda: fb.temper(fb.join(point(w=2), Dropout()), 0.5), TypeError, "got Dropout"),
    "temper_params": (lambda: fb.temper({"w": torch.ones(2)}, 0.5), TypeError, "a posterior, got dict"),
    "restrict_to_nothing": (
        lambda: fb.restrict(gaussian(linear_params()), "head.*"),
        ValueError,
        r"`restrict\(posterior, where='head\.\*'\)` should keep a leaf",
    ),
    "restrict_a_component_to_nothing": (
        lambda: fb.restrict(fb.mixture(point(w=2), point(b=2)), "w"),
        ValueError,
        "every component of a mixture, got none of component 1",
    ),
    "restrict_dropout": (lambda: fb.restrict(Dropout(), "w"), TypeError, r"Dropout\(where=\.\.\.\)"),
    "restrict_join_with_dropout": (
        lambda: fb.restrict(fb.join(point(w=2), Dropout()), "w"),
        TypeError,
        "Restrict the other parts, then join",
    ),
    "to_ensemble_none": (lambda: fb.to_ensemble(point(w=2), 0), ValueError, "at least 1, got 0"),
    "to_ensemble_params": (lambda: fb.to_ensemble({}, 3), TypeError, "a posterior, got dict"),
    "function_of_unshared_dropout": (
        lambda: fb.sample_function(linear, linear_params(), Dropout()),
        ValueError,
        r"differ from row to row\. Write `Dropout\(shared_mask=True\)`",
    ),
    "function_of_params": (
        lambda: fb.sample_function(linear, None, linear_params()),
        TypeError,
        "a posterior, got dict",
    ),
    "function_of_negative_index": (
        lambda: fb.sample_function(linear, None, gaussian(linear_params()), index=-1),
        ValueError,
        "at least 0, got -1",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_compositions_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_ragged_mixture_is_not_mapped_over_seeds():
    ragged = fb.mixture(point(w=2), point(b=2))
    with pytest.raises(NotImplementedError, match="Loop over the seeds"):
        vmap(lambda seed: ragged.structures(torch.arange(3), seed)[0])(torch.arange(2))


# Allocation.


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_ranks_count_the_earlier_draws_of_the_same_choice(weights):
    w = None if weights is None else torch.tensor(weights)
    indices = torch.randperm(50, generator=zoo.seeded())
    choices, ranks = allocate_ranked(indices, w, 3, 77)
    assert torch.equal(choices, allocate(indices, w, 3, 77))
    in_order = allocate(torch.arange(50), w, 3, 77).tolist()
    for i, rank in zip(indices.tolist(), ranks.tolist(), strict=True):
        assert rank == in_order[:i].count(in_order[i])


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_ranked_choices_mapped_over_sites_are_those_of_each(weights):
    w = None if weights is None else torch.tensor(weights)
    indices = torch.tensor([3, 0, 11, 5])
    choices, ranks = vmap(lambda site: allocate_ranked(indices, w, 3, site))(torch.arange(6))
    for site, k in itertools.product(range(6), range(4)):
        one = allocate_ranked(indices[k : k + 1], w, 3, torch.tensor(site))
        assert (choices[site, k], ranks[site, k]) == (one[0][0], one[1][0])


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3]])
def test_blocks_sorted_one_by_one_are_those_sorted_together(weights, monkeypatch):
    w, indices = None if weights is None else torch.tensor(weights), torch.tensor([3, 0, 11, 5, 200, 3])
    expected = allocate(indices, w, 3, 9)
    monkeypatch.setattr(_allocation, "_DIRECT_NUMEL", 0)
    assert torch.equal(allocate(indices, w, 3, 9), expected)


def test_posteriors_made_of_others_show_what_they_are_made_of():
    assert repr(fb.mixture(point(w=2), point(w=2))).startswith("Mixture(components=(Point(params={'w': ")
    assert isinstance(fb.mixture(point(w=2), point(w=2)), Mixture)
    assert isinstance(fb.join(point(w=2), point(b=2)), Join)
