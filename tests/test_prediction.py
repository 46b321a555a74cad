"""Statistics of predictions, against formulas written out over draws."""

import itertools
import math

import pytest
import scipy.optimize
import scipy.stats
import torch
from torch.testing import assert_close
from zoo import F64, randn, seeded

import funcbayes as fb
from funcbayes.likelihoods import Bernoulli, Categorical, HeteroscedasticNormal, Normal, Poisson

S = 6
WEIGHTS = torch.tensor([0.1, 0.2, 0.05, 0.3, 0.25, 0.1], dtype=F64)
weighted = pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["equal", "weighted"])


def outputs_of(params, x):
    """A model whose outputs are its parameters, so that a test says what the samples are."""
    return params["f"]


def predicted(samples, likelihood=None, weights=None, *, chunk_size=None, keep_samples=True, targets=None):
    posterior = fb.Ensemble({"f": samples}, weights)
    return fb.predict(
        outputs_of,
        None,
        posterior,
        torch.zeros(samples.shape[1]),
        likelihood=likelihood,
        chunk_size=chunk_size,
        keep_samples=keep_samples,
        targets=targets,
    )


def labels(below, *shape):
    return torch.randint(below, shape, generator=seeded(1))


# Likelihood, samples (S, N, ...), targets.
CASES = {
    "categorical": lambda: (Categorical(), 2 * randn(S, 5, 3), labels(3, 5)),
    "categorical_image": lambda: (Categorical(class_axis=1), 2 * randn(S, 2, 4, 3, 2), labels(4, 2, 3, 2)),
    "categorical_tokens": lambda: (Categorical(), 2 * randn(S, 2, 4, 3), labels(3, 2, 4)),
    "bernoulli_1d": lambda: (Bernoulli(), 2 * randn(S, 5), labels(2, 5)),
    "bernoulli": lambda: (Bernoulli(), 2 * randn(S, 5, 3), labels(2, 5, 3)),
    "normal_1d": lambda: (Normal(0.3), randn(S, 5), randn(5)),
    "normal": lambda: (Normal(0.3), randn(S, 5, 2), randn(5, 2)),
    "normal_vector_noise": lambda: (Normal(torch.tensor([0.2, 3.0], dtype=F64)), randn(S, 5, 2), randn(5, 2)),
    "normal_dense": lambda: (Normal(0.3), randn(S, 3, 4, 2), randn(3, 4, 2)),
    "heteroscedastic": lambda: (HeteroscedasticNormal(), randn(S, 5, 4), randn(5, 2)),
    "poisson": lambda: (Poisson(), randn(S, 5, 2), labels(6, 5, 2)),
    "poisson_1d": lambda: (Poisson(), randn(S, 5), labels(6, 5)),
}
all_cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def some(keep):
    chosen = {name: make for name, make in CASES.items() if keep(make()[0])}
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen.keys())


discrete = some(lambda likelihood: likelihood.is_discrete)
ordered = some(lambda likelihood: not likelihood.is_discrete)


def components(likelihood, samples):
    """Distributions of each scalar target, batch ``(S, *shape of y)``; of classes, with a last class axis."""
    if isinstance(likelihood, Categorical):
        logits = samples.movedim(likelihood.class_axis + (likelihood.class_axis > 0), -1)
        return torch.distributions.Categorical(logits=logits)
    if isinstance(likelihood, Bernoulli):
        return torch.distributions.Bernoulli(logits=samples)
    if isinstance(likelihood, Poisson):
        return torch.distributions.Poisson(samples.exp())
    if isinstance(likelihood, HeteroscedasticNormal):
        mean, log_variance = samples.chunk(2, -1)
        return torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    return torch.distributions.Normal(samples, torch.as_tensor(likelihood.noise_std, dtype=F64))


def moments(likelihood, samples):
    """Mean and variance of the target at each draw, in the layout of ``prediction.mean``."""
    if isinstance(likelihood, Categorical):
        axis = likelihood.class_axis + (likelihood.class_axis > 0)
        p = samples.softmax(axis)
        return p, p * (1 - p)
    found = components(likelihood, samples)
    return found.mean, found.variance


def average(values, weights):
    w = torch.full((S,), 1 / S, dtype=F64) if weights is None else weights
    return sum(w[s] * values[s] for s in range(S))


# Moments.


@all_cases
@weighted
def test_variance_is_the_spread_of_the_means_plus_the_mean_of_the_variances(make, weights):
    likelihood, samples, _ = make()
    prediction = predicted(samples, likelihood, weights)
    means, variances = moments(likelihood, samples)
    w = torch.full((S,), 1 / S, dtype=F64) if weights is None else weights
    mean = average(means, weights)
    spread = average((means - mean) ** 2, weights) / (1 - (w**2).sum())
    assert_close(prediction.mean, mean)
    assert_close(prediction.epistemic_variance, spread)
    assert_close(prediction.aleatoric_variance, average(variances, weights))
    assert_close(prediction.variance, spread + average(variances, weights))
    assert_close(prediction.std, (spread + average(variances, weights)).sqrt())
    assert_close(prediction.weights, w)


def test_with_equal_weights_the_spread_is_the_unbiased_variance():
    samples = randn(S, 5, 2)
    prediction = predicted(samples, Normal(0.5))
    assert_close(prediction.epistemic_variance, samples.var(0))
    assert_close(predicted(samples).variance, samples.var(0))
    assert_close(predicted(samples).epistemic_variance, samples.var(0))
    assert_close(predicted(samples).mean, samples.mean(0))


def test_the_spread_is_unbiased_for_any_weights():
    # Over data sets of S independent outputs of variance 4, the estimate averages to 4.
    n = 20_000
    samples = 3 + 2 * randn(S, n)
    got = predicted(samples, weights=WEIGHTS).variance
    assert abs(got.mean() - 4) < 5 * got.std() / math.sqrt(n)


def test_the_law_of_total_variance_is_what_sampled_targets_show():
    likelihood, samples, n = HeteroscedasticNormal(), randn(S, 1, 2), 200_000
    g = seeded(3)
    s = torch.multinomial(WEIGHTS, n, replacement=True, generator=g)
    mean, log_variance = samples[s, 0].unbind(-1)
    y = mean + (0.5 * log_variance).exp() * torch.randn(n, generator=g, dtype=F64)
    prediction = predicted(samples, likelihood, WEIGHTS)
    # The mixture itself has the biased spread: no correction for having drawn its components.
    exact = prediction.epistemic_variance * (1 - (WEIGHTS**2).sum()) + prediction.aleatoric_variance
    error = ((y - y.mean()) ** 2).std() / math.sqrt(n)
    assert abs(y.var() - exact.item()) < 4 * error
    assert abs(y.mean() - prediction.mean.item()) < 4 * y.std() / math.sqrt(n)


@pytest.mark.parametrize("keep_samples", [True, False])
def test_a_single_draw_or_all_weight_on_one_has_no_spread(keep_samples):
    samples = randn(S, 5, 2)
    alone = predicted(samples[:1], Normal(0.5), keep_samples=keep_samples)
    weights = torch.tensor([0, 0, 1.0, 0, 0, 0], dtype=F64)
    sure = predicted(samples, Normal(0.5), weights, keep_samples=keep_samples)
    for prediction, mean in ((alone, samples[0]), (sure, samples[2])):
        assert_close(prediction.mean, mean)
        assert torch.equal(prediction.epistemic_variance, torch.zeros(5, 2, dtype=F64))
        assert_close(prediction.variance, torch.full((5, 2), 0.25, dtype=F64))


def test_a_draw_of_no_weight_does_not_matter():
    samples = randn(S, 5, 3)
    weights = torch.tensor([0.25, 0.25, 0.0, 0.25, 0.25, 0.0], dtype=F64)
    keep = [0, 1, 3, 4]
    y = labels(3, 5)
    for keep_samples in (True, False):
        options = {"likelihood": Categorical(), "targets": y, "keep_samples": keep_samples, "chunk_size": 1}
        with_them, without = (
            predicted(samples, weights=weights, **options),
            predicted(samples[keep], **options),
        )
        for name in ("mean", "variance", "entropy", "mutual_information"):
            assert_close(getattr(with_them, name), getattr(without, name))
        assert_close(with_them.log_prob(), without.log_prob())


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 4, 50])
@all_cases
@weighted
def test_streaming_in_chunks_gives_every_statistic_that_kept_samples_have(make, weights, chunk_size):
    likelihood, samples, y = make()
    kept = predicted(samples, likelihood, weights)
    streamed = predicted(samples, likelihood, weights, keep_samples=False, chunk_size=chunk_size, targets=y)
    for name in ("mean", "variance", "std", "epistemic_variance", "aleatoric_variance"):
        assert_close(getattr(streamed, name), getattr(kept, name))
    for name in ("entropy", "expected_entropy", "mutual_information"):
        try:
            expected = getattr(kept, name)
        except NotImplementedError:
            with pytest.raises(NotImplementedError):
                getattr(streamed, name)
        else:
            assert_close(getattr(streamed, name), expected)
    assert_close(streamed.log_prob(), kept.log_prob(y))
    assert_close(streamed.log_prob(y), kept.log_prob(y))


@pytest.mark.parametrize(("keep_samples", "chunk_size"), [(True, None), (False, None), (False, 1)])
@pytest.mark.parametrize("tiny", [1e-4, 1e-8, 1e-12])
def test_the_spread_of_a_draw_of_tiny_weight_is_not_lost_in_single_precision(tiny, keep_samples, chunk_size):
    samples = torch.stack([randn(5, 2), 3 + randn(5, 2, seed=1)]).float()
    weights = torch.tensor([1 - tiny, tiny], dtype=F64)
    prediction = predicted(samples, weights=weights, keep_samples=keep_samples, chunk_size=chunk_size)
    exact, (w, v) = samples.double(), (weights[0], weights[1])
    mean = w * exact[0] + v * exact[1]
    spread = w * (exact[0] - mean) ** 2 + v * (exact[1] - mean) ** 2
    expected = spread / (2 * w * v)  # 1 - w^2 - v^2, which would cancel
    assert_close(prediction.epistemic_variance.double(), expected, rtol=1e-3, atol=0)


def test_streamed_moments_do_not_cancel():
    samples = 1e8 + randn(S, 5)
    got = predicted(samples, keep_samples=False, chunk_size=2).variance
    assert_close(got, (samples - 1e8).var(0), rtol=1e-6, atol=0)


# Entropies.


@discrete
@weighted
def test_entropies_are_sums_over_the_classes(make, weights):
    likelihood, samples, y = make()
    if isinstance(likelihood, Categorical):
        p = moments(likelihood, samples)[0].movedim(likelihood.class_axis + (likelihood.class_axis > 0), -1)
    else:
        p = torch.stack([1 - samples.sigmoid(), samples.sigmoid()], -1)
    mixed = average(p, weights)
    entropy = torch.zeros(y.shape, dtype=F64)
    expected_entropy = torch.zeros(y.shape, dtype=F64)
    for c in range(p.shape[-1]):
        entropy -= mixed[..., c] * mixed[..., c].log()
        expected_entropy -= average(p[..., c] * p[..., c].log(), weights)
    prediction = predicted(samples, likelihood, weights)
    assert_close(prediction.entropy, entropy)
    assert_close(prediction.expected_entropy, expected_entropy)
    assert_close(prediction.mutual_information, entropy - expected_entropy)


def test_mutual_information_is_that_of_the_joint_table_of_draw_and_class():
    samples = 3 * randn(S, 4, 3)
    joint = WEIGHTS[:, None, None] * samples.softmax(-1)  # p(s, y)
    expected = torch.zeros(4, dtype=F64)
    for s, y in itertools.product(range(S), range(3)):
        expected += joint[s, :, y] * (joint[s, :, y] / (WEIGHTS[s] * joint[:, :, y].sum(0))).log()
    assert_close(predicted(samples, Categorical(), WEIGHTS).mutual_information, expected)


def test_certain_classes_have_entropy_0_and_certain_disagreement_log_of_the_number_of_draws():
    sure = torch.tensor([[[500.0, -500.0]], [[500.0, -500.0]]], dtype=F64)
    split = torch.tensor([[[500.0, -500.0]], [[-500.0, 500.0]]], dtype=F64)
    for keep_samples in (True, False):
        prediction = predicted(sure, Categorical(), keep_samples=keep_samples)
        assert_close(prediction.entropy, torch.zeros(1, dtype=F64))
        assert_close(prediction.mutual_information, torch.zeros(1, dtype=F64))
        prediction = predicted(split, Categorical(), keep_samples=keep_samples)
        assert_close(prediction.entropy, torch.full((1,), math.log(2), dtype=F64))
        assert_close(prediction.expected_entropy, torch.zeros(1, dtype=F64))
        assert_close(prediction.mutual_information, torch.full((1,), math.log(2), dtype=F64))


def test_mutual_information_is_never_negative():
    samples = randn(1, 200, 3).expand(S, -1, -1).float()
    assert (predicted(samples, Categorical()).mutual_information >= 0).all()


@pytest.mark.parametrize("name", ["entropy", "mutual_information"])
@ordered
def test_the_entropy_of_a_mixture_without_closed_form_is_refused(make, name):
    likelihood, samples, _ = make()
    with pytest.raises(
        NotImplementedError, match=f"`{name}` has no closed form.*{type(likelihood).__name__}"
    ):
        getattr(predicted(samples, likelihood), name)


def test_the_expected_entropy_of_gaussians_is_that_of_the_noise_averaged():
    samples = randn(S, 5, 4)
    expected = average(0.5 * math.log(2 * math.pi * math.e) + 0.5 * samples[..., 2:], WEIGHTS)
    assert_close(predicted(samples, HeteroscedasticNormal(), WEIGHTS).expected_entropy, expected)
    with pytest.raises(NotImplementedError, match="no closed form"):
        _ = predicted(samples, Poisson()).expected_entropy


# Densities.


@all_cases
@weighted
def test_the_log_density_is_one_number_a_row_of_the_mixture_of_whole_rows(make, weights):
    likelihood, samples, y = make()
    each = components(likelihood, samples).log_prob(y.to(F64))
    each = each.reshape(S, len(y), -1).sum(-1)  # (S, N)
    expected = average(each.exp(), weights).log()
    for got in (
        predicted(samples, likelihood, weights).log_prob(y),
        predicted(samples, likelihood, weights, targets=y).log_prob(),
        # As a float, because torch's Bernoulli takes no integers.
        predicted(samples, likelihood, weights)
        .distribution()
        .log_prob(y if y.is_floating_point() else y.to(F64)),
    ):
        assert got.shape == (len(y),)
        assert_close(got, expected)


def test_log_densities_are_averaged_in_log_space_where_probabilities_underflow():
    logits = torch.tensor([[[500.0, -500.0]], [[400.0, -500.0]]], dtype=F64)
    y = torch.tensor([1])
    for keep_samples, chunk_size in itertools.product((True, False), (None, 1)):
        got = predicted(
            logits, Categorical(), targets=y, keep_samples=keep_samples, chunk_size=chunk_size
        ).log_prob()
        # log((e^-1000 + e^-900) / 2)
        assert_close(got, torch.tensor([-900 - math.log(2)], dtype=F64))
    far = predicted(randn(S, 3), Normal(1e-3)).log_prob(torch.full((3,), 50.0, dtype=F64))
    assert far.isfinite().all()
    logits = torch.tensor([[500.0], [-500.0]], dtype=F64)
    got = predicted(logits, Bernoulli(), targets=torch.tensor([0])).log_prob()
    assert_close(got, torch.tensor([-math.log(2)], dtype=F64))


def test_the_entropy_of_classes_whose_probabilities_underflow_is_finite():
    samples = torch.tensor([[[0.0, -2000.0, -math.inf]], [[0.0, -1500.0, -math.inf]]], dtype=F64)
    prediction = predicted(samples, Categorical())
    assert_close(prediction.entropy, torch.zeros(1, dtype=F64))
    assert_close(prediction.mean.sum(-1), torch.ones(1, dtype=F64))


@all_cases
def test_the_distribution_has_rows_as_batch_and_samples_in_the_shape_of_the_targets(make):
    likelihood, samples, y = make()
    distribution = predicted(samples, likelihood, WEIGHTS).distribution()
    assert distribution.batch_shape == (len(y),)
    assert distribution.event_shape == y.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert distribution.sample((7,)).shape == (7, *y.shape)


@ordered
def test_the_distribution_has_the_mean_of_the_prediction(make):
    likelihood, samples, _ = make()
    prediction = predicted(samples, likelihood, WEIGHTS)
    assert_close(prediction.distribution().mean, prediction.mean)
    exact = prediction.epistemic_variance * (1 - (WEIGHTS**2).sum()) + prediction.aleatoric_variance
    assert_close(prediction.distribution().variance, exact)


def test_labels_to_be_ignored_do_not_count():
    samples, y = randn(S, 2, 4, 3), labels(3, 2, 4)
    y[0, 1] = y[1] = -100
    got = predicted(samples, Categorical(), targets=y).log_prob()
    log_probs = samples.log_softmax(-1)
    expected = torch.logsumexp(sum(log_probs[:, 0, t, y[0, t]] for t in (0, 2, 3)), 0) - math.log(S)
    assert_close(got, torch.stack([expected, torch.zeros((), dtype=F64)]))


# Quantiles.


@pytest.mark.parametrize("q", [0.01, 0.1, 0.5, 0.77, 0.99])
def test_quantiles_of_outputs_are_those_of_torch(q):
    for samples in (randn(S, 5, 2), randn(1, 5), randn(101, 4), torch.ones(S, 3, dtype=F64)):
        assert_close(predicted(samples).quantile(q), samples.quantile(q, 0))


def test_weighted_quantiles_of_outputs_follow_the_weights():
    samples = torch.arange(5, dtype=F64)[:, None]
    weights = torch.tensor([1.0, 1, 1, 1, 96], dtype=F64)
    assert predicted(samples, weights=weights).quantile(0.5).item() > 3
    assert predicted(samples, weights=weights.flip(0)).quantile(0.5).item() < 1
    values = [predicted(samples, weights=weights).quantile(q).item() for q in (0.001, 0.1, 0.5, 0.9, 0.999)]
    assert values == sorted(values)
    assert all(0 <= value <= 4 for value in values)


def solve(cdf, q):
    return scipy.optimize.brentq(lambda y: cdf(y) - q, -200, 200, xtol=1e-13)


@pytest.mark.parametrize("q", [0.001, 0.025, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    "name", ["normal_1d", "normal", "normal_vector_noise", "normal_dense", "heteroscedastic"]
)
@weighted
def test_quantiles_of_a_gaussian_mixture_solve_its_distribution_function(name, q, weights):
    likelihood, samples, y = CASES[name]()
    got = predicted(samples, likelihood, weights).quantile(q)
    normal = components(likelihood, samples)
    loc, scale = (t.expand(S, *y.shape).reshape(S, -1).numpy() for t in (normal.mean, normal.stddev))
    p = (torch.full((S,), 1 / S, dtype=F64) if weights is None else weights).numpy()
    expected = [
        solve(lambda v, i=i: p @ scipy.stats.norm.cdf(v, loc[:, i], scale[:, i]), q)
        for i in range(loc.shape[1])
    ]
    assert_close(got.flatten(), torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("q", [0.001, 0.025, 0.5, 0.9, 0.999])
@weighted
def test_quantiles_of_a_poisson_mixture_are_the_least_counts_that_reach_them(q, weights):
    likelihood, samples, y = CASES["poisson"]()
    samples = 2 * samples
    got = predicted(samples, likelihood, weights).quantile(q)
    p = (torch.full((S,), 1 / S, dtype=F64) if weights is None else weights).numpy()
    rates = samples.exp().reshape(S, -1).numpy()
    counts = range(2000)
    expected = [
        next(k for k in counts if p @ scipy.stats.poisson.cdf(k, rates[:, i]) >= q)
        for i in range(rates.shape[1])
    ]
    assert got.flatten().tolist() == expected


def test_quantiles_are_right_for_components_far_apart_and_of_any_dtype():
    samples = torch.tensor([[-1e4], [0.0], [1e4]], dtype=F64)
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 2e-3)):
        got = predicted(samples.to(dtype), Normal(0.01)).quantile(0.5)
        assert got.dtype == dtype
        assert abs(got.item()) < tolerance
    assert predicted(samples.bfloat16(), Normal(0.01)).quantile(0.5).dtype == torch.bfloat16


def test_an_interval_is_a_pair_of_quantiles_and_holds_its_probability():
    likelihood, samples, _ = CASES["normal"]()
    prediction = predicted(samples, likelihood, WEIGHTS)
    for level in (0.5, 0.9, 0.95):
        lower, upper = prediction.interval(level)
        assert_close(lower, prediction.quantile((1 - level) / 2))
        assert_close(upper, prediction.quantile((1 + level) / 2))
        normal = torch.distributions.Normal(samples, 0.3)
        inside = average(normal.cdf(upper) - normal.cdf(lower), WEIGHTS)
        assert_close(inside, torch.full_like(inside, level))
    for one, other in zip(prediction.interval(), prediction.interval(0.95), strict=True):
        assert_close(one, other)
    lower, upper = predicted(samples).interval(0.8)
    assert_close(lower, samples.quantile(0.1, 0))
    assert_close(upper, samples.quantile(0.9, 0))


@discrete
def test_classes_have_no_quantiles(make):
    likelihood, samples, _ = make()
    with pytest.raises(NotImplementedError, match="`quantile.*no order"):
        predicted(samples, likelihood).quantile(0.5)


# Kept or not, types, and what is refused.


@all_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_have_the_dtype_of_the_outputs(make, dtype):
    likelihood, samples, y = make()
    y = y.to(dtype) if y.is_floating_point() else y
    for keep_samples in (True, False):
        prediction = predicted(
            samples.to(dtype), likelihood, WEIGHTS.float(), keep_samples=keep_samples, chunk_size=4, targets=y
        )
        exact = predicted(
            samples.to(dtype).double(),
            likelihood,
            WEIGHTS,
            targets=y.double() if y.is_floating_point() else y,
        )
        names = ("mean", "variance", "aleatoric_variance", "epistemic_variance", "std")
        for name in names + ("entropy", "mutual_information", "expected_entropy") * likelihood.is_discrete:
            got, expected = getattr(prediction, name), getattr(exact, name)
            assert got.dtype == dtype
            # Computed in float32 and rounded once.
            assert_close(got.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert prediction.log_prob().dtype == dtype
        assert_close(
            prediction.log_prob().double(), exact.log_prob(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4
        )


REFUSED = {
    "samples": lambda p: p.samples,
    "quantile": lambda p: p.quantile(0.5),
    "interval": lambda p: p.interval(0.9),
    "distribution": lambda p: p.distribution(),
    "log_prob": lambda p: p.log_prob(torch.zeros(5, 2, dtype=F64)),
}


@pytest.mark.parametrize(("name", "ask"), REFUSED.items(), ids=REFUSED.keys())
def test_what_needs_samples_is_refused_by_name_if_they_were_not_kept(name, ask):
    shown = "(quantile|interval)" if name == "interval" else name
    for targets in (None, randn(5, 2)):
        prediction = predicted(randn(S, 5, 2), Normal(0.3), keep_samples=False, targets=targets)
        with pytest.raises(RuntimeError, match=rf"`{shown}.*keep_samples=False.*keep_samples=True"):
            ask(prediction)
    ask(predicted(randn(S, 5, 2), Normal(0.3)))


WITHOUT_LIKELIHOOD = {
    "aleatoric_variance": lambda p: p.aleatoric_variance,
    "entropy": lambda p: p.entropy,
    "expected_entropy": lambda p: p.expected_entropy,
    "mutual_information": lambda p: p.mutual_information,
    "log_prob": lambda p: p.log_prob(torch.zeros(5, 2)),
    "distribution": lambda p: p.distribution(),
}


@pytest.mark.parametrize("keep_samples", [True, False])
@pytest.mark.parametrize(("name", "ask"), WITHOUT_LIKELIHOOD.items(), ids=WITHOUT_LIKELIHOOD.keys())
def test_what_is_about_targets_needs_a_likelihood(name, ask, keep_samples):
    with pytest.raises(ValueError, match=f"`{name}` is about `y`, so it needs a likelihood"):
        ask(predicted(randn(S, 5, 2), keep_samples=keep_samples))


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan])
def test_probabilities_outside_of_the_open_interval_are_refused(value):
    prediction = predicted(randn(S, 5, 2), Normal(0.3))
    with pytest.raises(ValueError, match=rf"quantile.*inside \(0, 1\), got {value}"):
        prediction.quantile(value)
    with pytest.raises(ValueError, match=rf"interval.*inside \(0, 1\), got {value}"):
        prediction.interval(value)


def test_log_prob_without_targets_is_refused():
    with pytest.raises(ValueError, match="without `targets`"):
        predicted(randn(S, 5, 2), Normal(0.3)).log_prob()


def test_targets_of_a_shape_that_merely_broadcasts_are_refused():
    prediction = predicted(randn(S, 5, 1), Normal(0.3))
    with pytest.raises(ValueError, match=r"should have shape \(5, 1\).*got \(5,\).*y\[:, None\]"):
        prediction.log_prob(randn(5))
    with pytest.raises(ValueError, match=r"should have shape \(5, 1\).*got \(5,\)"):
        predicted(randn(S, 5, 1), Normal(0.3), targets=randn(5))


def test_other_targets_than_those_given_before_are_not_confused_with_them():
    samples, y, other = randn(S, 5, 2), randn(5, 2), randn(5, 2, seed=9)
    prediction = predicted(samples, Normal(0.3), targets=y)
    assert_close(prediction.log_prob(), predicted(samples, Normal(0.3)).log_prob(y))
    assert_close(prediction.log_prob(other), predicted(samples, Normal(0.3)).log_prob(other))
    assert_close(prediction.log_prob(y.clone()), prediction.log_prob(y))


def test_a_prediction_shows_what_it_holds():
    assert repr(predicted(randn(S, 5, 2), Normal(0.3))) == (
        "Prediction(samples=(6, 5, 2), likelihood=Normal(noise_std=0.3))"
    )
    assert "streamed" in repr(predicted(randn(S, 5, 2), keep_samples=False))


def test_statistics_asked_for_twice_are_equal():
    prediction = predicted(randn(S, 5, 3), Categorical())
    for name in ("mean", "variance", "entropy", "mutual_information"):
        assert torch.equal(getattr(prediction, name), getattr(prediction, name))
