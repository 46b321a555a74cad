"""Divergences between Gaussians of any two structures, against torch's of the dense matrices."""

import functools

import optree
import pytest
import torch
from test_covariances import MAKERS, SINGULAR, TREES, joined, naive, vector_for
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import grad, vmap
from torch.testing import assert_close
from zoo import F64, linear_params, randn, stacked

import funcbayes as fb
from funcbayes import Dropout, Ensemble, Fixed, Gaussian, Point
from funcbayes._divergence import kl
from funcbayes.covariances import Dense, Diagonal, Kronecker, LowRankPrecision

pairs = [pytest.param(q, p, id=f"{one}-{other}") for one, q in MAKERS.items() for other, p in MAKERS.items()]
every_pair = pytest.mark.parametrize(("make_q", "make_p"), pairs)
every_tree = pytest.mark.parametrize("tree", TREES)


@functools.cache  # each is in many pairs
def posterior(make, tree, seed):
    covariance = make(TREES[tree], seed)
    return Gaussian(vector_for(covariance, seed), covariance)


def dense(posterior):
    matrix = naive(posterior.covariance)
    return MultivariateNormal(joined(posterior.mean), (matrix + matrix.T) / 2)


@functools.cache
def dense_posterior(make, tree, seed):
    return dense(posterior(make, tree, seed))


def expected_kl(q, p):
    return kl_divergence(dense(q), dense(p))


@every_pair
@every_tree
def test_the_divergence_between_any_two_structures_is_that_of_dense_normals(make_q, make_p, tree):
    q, p = posterior(make_q, tree, 0), posterior(make_p, tree, 1)
    divergence = kl(q, p)
    assert divergence.shape == ()
    assert divergence >= 0
    expected = kl_divergence(dense_posterior(make_q, tree, 0), dense_posterior(make_p, tree, 1))
    assert_close(divergence, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
@every_tree
def test_the_divergence_of_a_posterior_from_itself_is_zero(make, tree):
    q = posterior(make, tree, 0)
    assert_close(kl(q, q), torch.zeros((), dtype=F64), rtol=0, atol=1e-8)


def test_the_divergence_is_summed_over_parameters():
    one = {"w": torch.ones(2, 3, dtype=F64), "b": torch.ones(2, dtype=F64)}
    q = Gaussian({k: v * 2 for k, v in one.items()}, Diagonal(one))
    p = Gaussian(one, Diagonal(one))
    assert_close(kl(q, p), torch.tensor(8 * 0.5, dtype=F64))  # 8 parameters, each one deviation away


@every_pair
def test_the_divergence_mapped_over_stacked_posteriors_is_a_loop(make_q, make_p):
    tree = "plain"
    qs, ps = (
        [posterior(make, tree, seed + i) for i in range(2)] for make, seed in ((make_q, 0), (make_p, 7))
    )
    each = torch.stack([kl(q, p) for q, p in zip(qs, ps, strict=True)])
    assert_close(vmap(kl)(stacked(*qs), stacked(*ps)), each)
    assert_close(vmap(kl, in_dims=(0, None))(stacked(*qs), ps[0]), torch.stack([kl(q, ps[0]) for q in qs]))


@every_pair
def test_gradients_of_the_divergence_are_those_of_the_dense_formula(make_q, make_p):
    tree = "plain"
    q, p = posterior(make_q, tree, 0), posterior(make_p, tree, 1)

    def free_of(posterior):
        # Bases stay as they are: moved ones would not be orthogonal.
        keep = 6 if isinstance(posterior.covariance, Kronecker) else None
        return optree.tree_leaves(posterior)[:keep]

    def rebuilt(leaves):
        number = len(free_of(q))
        both = []
        for one, given in ((q, leaves[:number]), (p, leaves[number:])):
            whole = optree.tree_leaves(one)
            both.append(optree.tree_structure(one).unflatten([*given, *whole[len(given) :]]))
        return both

    leaves = [*free_of(q), *free_of(p)]
    watched = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(expected_kl(*rebuilt(watched)), watched, allow_unused=True)
    by_autograd = torch.autograd.grad(kl(*rebuilt(watched)), watched, allow_unused=True)
    by_func = grad(lambda leaves: kl(*rebuilt(leaves)))(leaves)
    for leaf, want, *found in zip(leaves, expected, by_autograd, by_func, strict=True):
        for got in found:
            want = torch.zeros_like(leaf) if want is None else want
            assert_close(torch.zeros_like(leaf) if got is None else got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_pair
def test_the_divergence_has_the_dtype_of_the_leaves(make_q, make_p, dtype):
    q, p = (fb.to(posterior(make, "plain", seed), dtype=dtype) for make, seed in ((make_q, 0), (make_p, 1)))
    divergence = kl(q, p)
    exact = kl(*(fb.to(one, dtype=F64) for one in (q, p)))  # of the same rounded numbers
    assert divergence.dtype == dtype
    assert_close(divergence.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_posteriors_of_two_dtypes_have_a_divergence_in_the_wider_one():
    q, p = posterior(MAKERS["dense"], "plain", 0), posterior(MAKERS["diagonal"], "plain", 1)
    assert_close(kl(fb.to(q, dtype=torch.float32), p), kl(q, p), rtol=1e-4, atol=0)


def test_fixed_leaves_have_no_part_in_the_divergence():
    q, p = posterior(MAKERS["dense"], "plain", 0), posterior(MAKERS["diagonal"], "plain", 1)
    fixed = Gaussian({**q.mean, "running_mean": Fixed(torch.ones(3))}, q.covariance)
    assert_close(kl(fixed, p), kl(q, p))


@pytest.mark.parametrize(("diagonal", "scale"), [(1e-6, 1e5), (1e-4, 1e6)])
@pytest.mark.parametrize("other", ["diagonal", "dense", "low_rank_precision"])
def test_a_precision_with_factors_far_larger_than_its_diagonal_has_no_divergence_from_itself(
    diagonal, scale, other
):
    zeros, precision = {"w": torch.zeros(3, dtype=F64)}, {"w": torch.full((3,), diagonal, dtype=F64)}
    basis = torch.linalg.qr(randn(3, 3)).Q
    variance = 1 / (diagonal + scale**2)
    q = Gaussian(zeros, LowRankPrecision(precision, {"w": scale * basis}))
    same = {
        "diagonal": Diagonal({"w": torch.full((3,), variance, dtype=F64)}),
        "dense": Dense({"w": variance**0.5 * torch.eye(3, dtype=F64)}),
        "low_rank_precision": LowRankPrecision(precision, {"w": scale * torch.eye(3, dtype=F64)}),
    }
    for p in (q, Gaussian(zeros, same[other])):
        assert_close(kl(q, p), torch.zeros((), dtype=F64), rtol=0, atol=1e-10)


def test_leaves_of_a_long_list_keep_their_order():
    means = [[randn(2, seed=i + 50 * j) for i in range(12)] for j in range(2)]
    variances = [[randn(2, seed=i + 50 * j).exp() for i in range(12)] for j in range(2)]
    q, p = (Gaussian(mean, Diagonal(variance)) for mean, variance in zip(means, variances, strict=True))
    assert_close(kl(q, p), expected_kl(q, p))


def simple(**shapes):
    ones = {k: torch.ones(s) for k, s in shapes.items()}
    return Gaussian(ones, Diagonal(ones))


ERRORS = {
    "leaf_missing": (lambda: kl(simple(w=3), simple(w=3, b=2)), ValueError, r"`kl\(q, p\)`.*'b' is missing"),
    "leaf_too_many": (lambda: kl(simple(w=3, b=2), simple(w=3)), ValueError, "'b' is not expected"),
    "leaf_of_another_shape": (
        lambda: kl(simple(w=3), simple(w=2)),
        ValueError,
        r"'w' has shape \(3,\), not \(2,\)",
    ),
    "containers_ordered_apart": (
        lambda: kl(
            Gaussian([torch.ones(1)] * 11, Diagonal([torch.ones(1)] * 11)),
            simple(**{str(i): 1 for i in range(11)}),
        ),
        ValueError,
        "ordered differently",
    ),
    "point": (
        lambda: kl(Point(linear_params()), simple(w=3)),
        NotImplementedError,
        r"no closed form for Point and Gaussian\. Monte Carlo: ",
    ),
    "ensemble": (
        lambda: kl(simple(w=3), Ensemble({"w": torch.ones(2, 3)})),
        NotImplementedError,
        "Gaussian and Ensemble",
    ),
    "dropout": (lambda: kl(Dropout(), Dropout()), NotImplementedError, "Dropout and Dropout"),
    "tensor": (
        lambda: kl(torch.ones(2), simple(w=2)),
        TypeError,
        r"`kl\(q, p\)` should be given two post.*Tensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_a_divergence_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("make", SINGULAR.values(), ids=SINGULAR.keys())
def test_a_divergence_of_or_from_a_singular_posterior_is_refused(make):
    certain, other = posterior(make, "plain", 0), posterior(MAKERS["dense"], "plain", 1)
    for q, p in ((certain, other), (other, certain)):
        with pytest.raises(ValueError, match="can be sampled but has no inverse"):
            kl(q, p)


# Joins.


def split(posterior, *groups):
    return fb.join(*(fb.restrict(posterior, list(names)) for names in groups))


@pytest.mark.parametrize("make_q", MAKERS.values(), ids=MAKERS.keys())
def test_the_divergence_from_a_join_is_that_from_the_normal_it_is(make_q):
    q, p = posterior(make_q, "plain", 0), posterior(MAKERS["diagonal"], "plain", 1)
    assert_close(kl(q, split(p, ["w"], ["b", "gain"])), kl(q, p))


@pytest.mark.parametrize("name", ["diagonal", "kronecker"])
def test_the_divergence_of_a_join_is_the_sum_of_those_of_its_parts(name):
    q, p = posterior(MAKERS["diagonal"], "plain", 0), posterior(MAKERS[name], "plain", 1)
    for one in (p, split(p, ["w"], ["b", "gain"]), split(p, ["b"], ["gain"], ["w"])):
        assert_close(kl(split(q, ["w"], ["b", "gain"]), one), kl(q, p))


def with_fixed(posterior, *names):
    return Gaussian(
        {**posterior.mean, **{name: Fixed(torch.tensor(3)) for name in names}}, posterior.covariance
    )


def test_fixed_leaves_have_no_part_in_the_divergence_of_joins():
    q, p = posterior(MAKERS["diagonal"], "plain", 0), posterior(MAKERS["diagonal"], "plain", 1)
    groups = ["w"], ["b", "gain"]
    fixed = Point({"n": Fixed(torch.tensor(3))})
    members = Ensemble({"n": Fixed(torch.ones(4, 2))})
    qs = [q, with_fixed(q, "n", "m"), split(q, *groups), fb.join(split(q, *groups), fixed), fb.join(q, fixed)]
    ps = [split(p, *groups), split(with_fixed(p, "w.n"), ["w*"], ["b", "gain"])]
    ps += [fb.join(part, extra) for part in (p, ps[0], with_fixed(p, "k")) for extra in (fixed, members)]
    for one in qs:
        for other in ps:
            assert_close(kl(one, other), kl(q, p))


def test_joins_without_a_closed_form_are_refused():
    q = posterior(MAKERS["diagonal"], "plain", 0)
    low_rank = posterior(MAKERS["low_rank_plus_diagonal"], "plain", 1)
    joined = split(q, ["w"], ["b", "gain"])
    with pytest.raises(NotImplementedError, match="no closed form for Join and Gaussian"):
        kl(joined, low_rank)
    ensemble = fb.restrict(Ensemble({k: v[None] for k, v in q.mean.items()}), "w")
    with pytest.raises(NotImplementedError, match="Ensemble"):
        kl(fb.join(ensemble, fb.restrict(q, ["b", "gain"])), joined)
    masks = fb.to_ensemble(fb.join(Point({"n": Fixed(torch.tensor(3))}), Dropout()), 2, seed=0)
    for random in (Dropout(), masks):
        for pair in ((fb.join(q, random), q), (joined, fb.join(q, random))):
            with pytest.raises(
                NotImplementedError, match="no closed form for a (Dropout|Ensemble) in a Join"
            ):
                kl(*pair)
    with pytest.raises(ValueError, match="'w' is missing"):
        kl(fb.restrict(q, ["b", "gain"]), joined)
