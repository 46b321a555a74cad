"""Class probabilities of Gaussian logits: against loops in the papers' notation, limits and integrals."""

import math

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close
from zoo import F64, randn, seeded

from funcbayes import _links as links
from funcbayes.likelihoods import Bernoulli, Categorical

N = 7


def logits(num_classes, seed=0, rank=None, scale=1.0):
    """Means ``(N, C)`` and covariances ``(N, C, C)``."""
    root = scale * randn(N, num_classes, rank or num_classes + 2, seed=seed + 1)
    return 2 * randn(N, num_classes, seed=seed), root @ root.mT


def diagonal(covariance):
    return covariance.diagonal(dim1=-2, dim2=-1)


def of_covariance(link):
    """The link as a function of mean and covariance."""
    if link in (links.laplace_bridge, links.laplace_bridge_normalized):
        return lambda mean, covariance, **k: link(mean, diagonal(covariance), covariance.sum(-1), **k)
    if link is links.monte_carlo:
        return lambda mean, covariance, **k: link(mean, covariance, num_samples=500, seed=3, **k)
    return lambda mean, covariance, **k: link(mean, diagonal(covariance), **k)


LINKS = {
    link.__name__: of_covariance(link)
    for link in (links.probit, links.laplace_bridge, links.laplace_bridge_normalized, links.monte_carlo)
}
every_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS.keys())
BRIDGES = {name: LINKS[name] for name in ("laplace_bridge", "laplace_bridge_normalized")}
every_bridge = pytest.mark.parametrize("link", BRIDGES.values(), ids=BRIDGES.keys())


# The papers, row by row.


def naive_probit(mu, sigma):
    kappa = [1 / math.sqrt(1 + math.pi / 8 * float(s)) for s in sigma.diagonal()]
    values = [math.exp(k * float(m)) for k, m in zip(kappa, mu, strict=True)]
    return [value / sum(values) for value in values]


def naive_bridge(mu, sigma, normalized=False):
    K = len(mu)
    one = torch.ones(K, dtype=F64)
    total = one @ sigma @ one
    mu, sigma = (
        mu - sigma @ one * (one @ mu) / total,
        sigma - torch.outer(sigma @ one, one @ sigma) / total,
    )
    assert_close(mu.sum(), torch.zeros((), dtype=F64))
    assert_close(sigma.sum(0), torch.zeros(K, dtype=F64))
    if normalized:
        c = sigma.trace() / K / math.sqrt(K / 2)
        mu, sigma = mu / c.sqrt(), sigma / c
    alpha = []
    for k in range(K):
        others = sum(math.exp(-float(mu[l])) for l in range(K))  # noqa: E741  # the paper's letter
        alpha.append((1 - 2 / K + math.exp(float(mu[k])) / K**2 * others) / float(sigma[k, k]))
    return [a / sum(alpha) for a in alpha]


NAIVE = {
    "probit": naive_probit,
    "laplace_bridge": naive_bridge,
    "laplace_bridge_normalized": lambda mu, sigma: naive_bridge(mu, sigma, normalized=True),
}


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("name", NAIVE)
def test_a_link_is_the_formula_of_its_paper(name, num_classes):
    mean, covariance = logits(num_classes)
    expected = [NAIVE[name](mu, sigma) for mu, sigma in zip(mean, covariance, strict=True)]
    assert_close(LINKS[name](mean, covariance), torch.tensor(expected, dtype=F64))


def test_the_mean_of_a_dirichlet_survives_the_bridge_there_and_back():
    # Gaussian of a Dirichlet in the softmax basis (MacKay 1998): mu_k = log a_k - mean log a, and
    # S_kl = d_kl / a_k - [1/a_k + 1/a_l - mean 1/a] / K.
    alpha = randn(N, 5).exp() + 0.2
    inverse, K = 1 / alpha, 5
    mean = alpha.log() - alpha.log().mean(-1, keepdim=True)
    cross = inverse.unsqueeze(-1) + inverse.unsqueeze(-2) - inverse.mean(-1)[:, None, None]
    covariance = torch.diag_embed(inverse) - cross / K
    got = LINKS["laplace_bridge"](mean, covariance)
    assert_close(got, alpha / alpha.sum(-1, keepdim=True))


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("probit", "probit"), ("laplace_bridge", "bridge"), ("laplace_bridge_normalized", "bridge_norm")],
)
def test_a_link_is_that_of_laplace_torch(ours, theirs, num_classes):
    peer = pytest.importorskip("laplace.baselaplace", reason="laplace-torch is not installed")
    mean, covariance = logits(num_classes)

    class Predicting(peer.ParametricLaplace):
        _device, _dtype = mean.device, mean.dtype

        def __init__(self):
            pass

        def _glm_predictive_distribution(self, X, joint=False):
            return mean.clone(), covariance.clone()  # which are written over

    expected = Predicting()._glm_forward_call(mean, "classification", link_approx=theirs)
    assert_close(LINKS[ours](mean, covariance), expected)


# Monte Carlo.


def large_sample(mean, covariance, link, count=40_000):
    """Average and standard errors by another sampler."""
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(covariance.shape[-1], dtype=F64))
    noise = torch.randn(count, *mean.shape, 1, generator=seeded(1), dtype=F64)
    values = link(mean + (root @ noise).squeeze(-1))
    return values.mean(0), values.std(0)


@pytest.mark.parametrize("rank", [None, 1])
def test_monte_carlo_agrees_with_a_large_sample(rank):
    count = 4000
    mean, covariance = logits(4, rank=rank)
    got = links.monte_carlo(mean, covariance, num_samples=count, seed=0)
    expected, std = large_sample(mean, covariance, lambda f: f.softmax(-1))
    assert ((got - expected).abs() <= 5 * std * (1 / count + 1 / 40_000) ** 0.5).all()


def test_monte_carlo_of_a_logit_agrees_with_a_large_sample():
    count = 4000
    mean, covariance = logits(3)
    got = links.monte_carlo_bernoulli(mean, diagonal(covariance), num_samples=count, seed=0)
    expected, std = large_sample(mean, covariance, torch.sigmoid)
    assert ((got - expected).abs() <= 5 * std * (1 / count + 1 / 40_000) ** 0.5).all()


def test_draws_of_logits_have_the_covariance_of_the_row():
    count, (mean, covariance) = 20_000, (t[:2] for t in logits(3))
    noise = links._noise(count, torch.Size([3]), 5, mean)
    draws = mean + (links._root(covariance, "") @ noise.mT).movedim(-1, 0)
    one = links.monte_carlo(mean, covariance, num_samples=1, seed=5)
    assert_close(one, draws[0].softmax(-1))
    for n in range(2):
        centred = draws[:, n] - mean[n]
        variance = covariance[n].diagonal()
        error = ((torch.outer(variance, variance) + covariance[n] ** 2) / count).sqrt()
        assert ((centred.T @ centred / count - covariance[n]).abs() <= 5 * error).all()


def test_monte_carlo_is_a_function_of_the_seed_and_a_row_does_not_depend_on_others():
    mean, covariance = logits(4)
    options = {"num_samples": 50}
    one = links.monte_carlo(mean, covariance, seed=1, **options)
    assert torch.equal(one, links.monte_carlo(mean, covariance, seed=1, **options))
    assert not torch.equal(one, links.monte_carlo(mean, covariance, seed=2, **options))
    for rows in ([3], [6, 0, 3], list(range(7))):
        some = links.monte_carlo(mean[rows], covariance[rows], seed=1, **options)
        assert_close(some, one[rows], rtol=1e-13, atol=0)
    torch.manual_seed(0)
    unseeded = links.monte_carlo(mean, covariance, **options)
    torch.manual_seed(0)
    assert torch.equal(unseeded, links.monte_carlo(mean, covariance, **options))


@pytest.mark.parametrize("link", [links.monte_carlo, links.monte_carlo_bernoulli])
def test_draws_taken_in_blocks_are_averaged_alike(link, monkeypatch):
    mean, covariance = logits(4)
    spread = covariance if link is links.monte_carlo else diagonal(covariance)
    whole = link(mean, spread, num_samples=23, seed=0)
    monkeypatch.setattr(links, "_NUMEL", 5 * mean.numel())
    assert_close(link(mean, spread, num_samples=23, seed=0), whole)


SINGULAR = {
    "certain": torch.zeros(3, 3, dtype=F64),
    "shift": torch.ones(3, 3, dtype=F64),
    "sums_to_zero": torch.eye(3, dtype=F64) - 1 / 3,
    "rank_1": torch.outer(randn(3), randn(3)) * 1e6,
    "one_certain": torch.diag(torch.tensor([2.0, 0.0, 1e-30], dtype=F64)),
}
every_singular = pytest.mark.parametrize("covariance", SINGULAR.values(), ids=SINGULAR.keys())


@every_singular
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_the_root_of_a_singular_covariance_is_one_to_rounding(covariance, dtype):
    given = covariance.to(dtype).expand(2, 3, 3)
    root = links._root(given, "")
    slack = 40 * torch.finfo(dtype).eps * float(covariance.abs().max()) + 1e-300
    assert_close(root @ root.mT, given.double(), rtol=0, atol=slack)


# Limits and extremes.


@pytest.mark.parametrize("name", ["probit", "monte_carlo"])
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_without_variance_probabilities_are_those_of_the_mean(name, size):
    mean, covariance = logits(4)
    assert_close(LINKS[name](mean, size * covariance), mean.softmax(-1))
    for link in (links.probit_bernoulli, lambda *a: links.monte_carlo_bernoulli(*a, num_samples=5, seed=0)):
        assert_close(link(mean, size * diagonal(covariance)), mean.sigmoid())


@every_link
@every_singular
def test_singular_covariances_give_probabilities(link, covariance):
    mean = logits(3)[0]
    probs = link(mean, covariance.expand(N, 3, 3))
    assert probs.isfinite().all()
    assert_close(probs.sum(-1), torch.ones(N, dtype=F64))


@every_bridge
def test_a_shift_of_all_logits_makes_no_difference_to_a_bridge(link):
    mean, covariance = logits(4)
    expected = link(mean, covariance)
    # A certain sum is the limit of a sum that is independent of the differences.
    center = torch.eye(4, dtype=F64) - 0.25
    independent = center @ covariance @ center
    of_differences = link(mean, independent)
    for variance in (0.0, 1e-3, 1.0, 1e4):
        shifted = independent + variance * torch.ones(4, 4, dtype=F64)
        assert_close(link(mean + 3.0, shifted), of_differences, rtol=1e-6, atol=1e-9)
    assert_close(expected.sum(-1), torch.ones(N, dtype=F64))


def test_bridges_where_only_the_sum_is_uncertain_take_classes_as_equally_uncertain():
    mean = logits(3)[0]
    centred = mean - mean.mean(-1, keepdim=True)
    alpha = 1 - 2 / 3 + centred.exp() / 9 * (-centred).exp().sum(-1, keepdim=True)
    expected = alpha / alpha.sum(-1, keepdim=True)
    for dtype, size in ((F64, 0.0), (F64, 3.7), (torch.float32, 0.1), (torch.bfloat16, 0.3)):
        covariance = torch.full((N, 3, 3), size, dtype=dtype)
        got = LINKS["laplace_bridge"](mean.to(dtype), covariance)
        eps = torch.finfo(dtype).eps
        assert_close(got, expected.to(dtype), atol=50 * eps, rtol=500 * eps)


def test_without_variance_the_normalized_bridge_goes_to_the_most_probable_class():
    mean = torch.tensor([[1.0, 0.0], [-3.0, -2.0]], dtype=F64)
    got = LINKS["laplace_bridge_normalized"](mean, torch.zeros(2, 2, 2, dtype=F64))
    assert_close(got, torch.eye(2, dtype=F64))


@every_link
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_extreme_logits_and_variances_do_not_overflow(link, dtype):
    mean, covariance = logits(4)
    for scale in (1e4, 1e15, -1e15):
        for size in (1e-36, 1e-8, 1.0, 1e20):
            probs = link((scale * mean).to(dtype), (size * covariance).to(dtype))
            assert probs.isfinite().all()
            assert_close(probs.sum(-1), torch.ones(N, dtype=dtype))
            assert not link((scale * mean).to(dtype), (size * covariance).to(dtype), log=True).isnan().any()


@every_link
def test_log_probabilities_are_kept_where_probabilities_underflow(link):
    mean, covariance = logits(4)
    assert_close(link(mean, covariance, log=True).exp(), link(mean, covariance))
    far = torch.tensor([[0.0, 5000.0, 1.0, 2.0]], dtype=F64)
    log_probs = link(far, torch.eye(4, dtype=F64)[None], log=True)
    assert log_probs.isfinite().all()
    assert log_probs.min() < -1000


# Two classes and one logit.


def quadrature(mean, variance):
    """``E[sigmoid]`` by the trapezoidal rule over twelve deviations."""
    z = torch.linspace(-12, 12, 4001, dtype=F64)
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    values = (mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * z).sigmoid() * density
    return torch.trapezoid(values, z)


def test_the_probit_of_one_logit_is_close_to_the_integral():
    mean, variance = torch.meshgrid(
        torch.linspace(-6, 6, 13, dtype=F64), torch.tensor([0.01, 0.3, 1, 4, 25]).double(), indexing="ij"
    )
    got, expected = links.probit_bernoulli(mean, variance), quadrature(mean, variance)
    assert_close(got, expected, atol=0.025, rtol=0)
    assert (got - 0.5).abs().le((mean.sigmoid() - 0.5).abs()).all()  # less sure, and of the same class
    kappa = 1 / (1 + math.pi * variance / 8).sqrt()
    assert_close(got, (kappa * mean).sigmoid())


def test_monte_carlo_of_one_logit_is_the_integral_within_its_error():
    count = 20_000
    mean, variance = torch.tensor([[-2.0], [0.5]], dtype=F64), torch.tensor([[4.0], [0.3]], dtype=F64)
    got = links.monte_carlo_bernoulli(mean, variance, num_samples=count, seed=1)
    assert_close(got, quadrature(mean, variance), atol=5 * 0.5 / count**0.5, rtol=0)


def test_the_probit_of_two_classes_is_close_to_the_integral_of_their_difference():
    mean, covariance = logits(2)
    covariance = torch.diag_embed(diagonal(covariance)[:, :1].expand(N, 2))  # alike, uncorrelated
    got = links.probit(mean, diagonal(covariance))[:, 1]
    difference, variance = mean[:, 1] - mean[:, 0], diagonal(covariance).sum(-1)
    # Each logit is moderated by its own variance and not by that of the difference, hence roughly.
    assert_close(got, quadrature(difference, variance), atol=0.12, rtol=0)


def test_the_bridge_of_two_classes_is_close_to_the_integral_of_their_difference():
    mean, variance = torch.tensor([[0.0, 0.4]], dtype=F64), torch.tensor([[0.3, 0.3]], dtype=F64)
    got = LINKS["laplace_bridge"](mean, torch.diag_embed(variance))[:, 1]
    assert_close(got, quadrature(mean[:, 1] - mean[:, 0], variance.sum(-1)), atol=0.02, rtol=0)


def test_at_large_variances_the_bridge_is_improved_by_the_normalization():
    mean, covariance = logits(10, scale=3.0)
    expected = links.monte_carlo(mean, covariance, num_samples=5000, seed=0)
    errors = [(link(mean, covariance) - expected).abs().sum(-1).mean() for link in BRIDGES.values()]
    assert errors[1] < 0.8 * errors[0]


def test_logarithms_of_a_logit_are_those_of_both_labels():
    mean, variance = randn(N, 3), randn(N, 3, seed=1).exp()
    for link in (
        links.probit_bernoulli,
        lambda *a, **k: links.monte_carlo_bernoulli(*a, num_samples=9, seed=0, **k),
    ):
        logs = link(mean, variance, log=True)
        assert logs.shape == (N, 3, 2)
        assert_close(logs.exp().sum(-1), torch.ones(N, 3, dtype=F64))
        assert_close(Bernoulli().mean_of_log_probs(logs), link(mean, variance))
    flat = links.monte_carlo_bernoulli(mean[:, 0], variance[:, 0], num_samples=9, seed=0)
    column = links.monte_carlo_bernoulli(mean[:, :1], variance[:, :1], num_samples=9, seed=0)
    assert_close(flat, column[:, 0])


# Layouts, dtypes, transforms.


@every_link
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_results_have_the_dtype_of_the_mean(link, dtype):
    mean, covariance = logits(4)
    expected = link(mean, covariance)
    for given in (covariance.to(dtype), covariance.float()):
        got = link(mean.to(dtype), given)
        assert got.dtype == dtype
        assert link(mean.to(dtype), given, log=True).dtype == dtype
        if link is not LINKS["monte_carlo"]:  # its noise is that of the dtype
            eps = max(torch.finfo(dtype).eps, torch.finfo(given.dtype).eps)
            assert_close(got.double(), expected, atol=8 * eps, rtol=8 * eps)
        error = 2 * max(torch.finfo(dtype).eps, 1e-6)
        assert_close(got.double().sum(-1), torch.ones(N, dtype=F64), atol=error, rtol=0)


@every_link
def test_positions_of_a_row_are_rows(link):
    mean, covariance = logits(3)
    mean, covariance = mean[:6], covariance[:6]
    got = link(mean.reshape(2, 3, 3), covariance.reshape(2, 3, 3, 3))
    assert_close(got.reshape(6, 3), link(mean, covariance))


@every_link
def test_a_link_mapped_over_rows_is_the_link_of_all_rows(link):
    mean, covariance = logits(3)
    mapped = vmap(lambda m, c: link(m[None], c[None])[0])(mean, covariance)
    assert_close(mapped, link(mean, covariance))
    singular = torch.ones(N, 3, 3, dtype=F64)
    assert_close(vmap(lambda m, c: link(m[None], c[None])[0])(mean, singular), link(mean, singular))


def test_monte_carlo_mapped_over_seeds_is_a_loop():
    mean, covariance = logits(3)
    mapped = vmap(lambda seed: links.monte_carlo(mean, covariance, num_samples=6, seed=seed))(torch.arange(3))
    for seed in range(3):
        assert_close(mapped[seed], links.monte_carlo(mean, covariance, num_samples=6, seed=seed))


@every_link
def test_links_are_differentiable(link):
    mean, covariance = (t[:2].clone().requires_grad_() for t in logits(3))
    # Symmetric, because a root reads one triangle.
    assert torch.autograd.gradcheck(lambda m, c: link(m, (c + c.mT) / 2), (mean, covariance))


@every_link
@every_singular
def test_gradients_are_finite_where_a_covariance_is_singular(link, covariance):
    if covariance.max() > 1e3:  # far from what rounding leaves
        return
    mean = logits(3)[0]
    got = grad(lambda m, c: link(m, c)[:, 0].sum(), argnums=(0, 1))(mean, covariance.expand(N, 3, 3).clone())
    assert all(g.isfinite().all() for g in got)
    scale = torch.zeros(1, 3, dtype=F64)
    slope = grad(lambda v: links.monte_carlo_bernoulli(scale, v, num_samples=9, seed=0).sum())(scale)
    assert slope.isfinite().all()


def test_links_leave_their_arguments_alone():
    mean, covariance = logits(4)
    kept = mean.clone(), covariance.clone()
    for link in LINKS.values():
        link(mean, covariance)
    assert torch.equal(mean, kept[0])
    assert torch.equal(covariance, kept[1])


def test_logarithms_are_in_the_layout_of_the_likelihood():
    mean, covariance = logits(4)
    logs = LINKS["probit"](mean, covariance, log=True)
    assert logs.shape == Categorical().log_class_probs(mean).shape
    assert_close(Categorical().mean_of_log_probs(logs), LINKS["probit"](mean, covariance))


# Errors.

M, V, S = torch.zeros(2, 3), torch.ones(2, 3), torch.eye(3).expand(2, 3, 3)
ERRORS = {
    "integers": (
        lambda: links.probit(M.int(), V),
        TypeError,
        r"`mean` in `probit\(mean, variance\)`.*floating point, got torch\.int32",
    ),
    "not_a_tensor": (lambda: links.probit(M, 1.0), TypeError, "`variance` in .*got float"),
    "scalar": (lambda: links.probit_bernoulli(M[0, 0], V[0, 0]), ValueError, "axis of rows.*got a scalar"),
    "covariance_for_variance": (
        lambda: links.probit(M, S),
        ValueError,
        r"`variance`.*shape \(2, 3\) for a mean of shape \(2, 3\), got \(2, 3, 3\)",
    ),
    "row_sums": (
        lambda: links.laplace_bridge(M, V, V[0]),
        ValueError,
        r"`row_sums` in `laplace_bridge\(mean, variance, row_sums\)`.*got \(3,\)",
    ),
    "one_class": (
        lambda: links.laplace_bridge_normalized(M[:, :1], V[:, :1], V[:, :1]),
        ValueError,
        r"`laplace_bridge_normalized.*at least two classes.*\(2, 1\).*`probit_bernoulli`",
    ),
    "variance_for_covariance": (
        lambda: links.monte_carlo(M, V, num_samples=3),
        ValueError,
        r"`covariance`.*shape \(2, 3, 3\).*got \(2, 3\)",
    ),
    "indefinite": (
        lambda: links.monte_carlo(M, S - 1.5 * S[:, :1] * S[:, :1].mT, num_samples=3),
        ValueError,
        r"`monte_carlo\(mean, covariance\)`.*smallest eigenvalue of -0\.5",
    ),
    "no_samples": (
        lambda: links.monte_carlo(M, S, num_samples=0),
        ValueError,
        r"`monte_carlo\(num_samples=\.\.\.\)` should be at least 1, got 0",
    ),
    "half_a_sample": (
        lambda: links.monte_carlo_bernoulli(M, V, num_samples=0.5),
        TypeError,
        r"`monte_carlo_bernoulli\(num_samples=\.\.\.\)` should be an int",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_links_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()
