import math
import pickle
from typing import NamedTuple

import optree
import pytest
import torch
import torch.distributions as td
from torch.func import grad, hessian, vmap

import funcbayes as fb
from funcbayes import likelihoods
from funcbayes.likelihoods import Bernoulli, Categorical, HeteroscedasticNormal, Normal, Poisson

F64 = torch.float64
NUM_SAMPLES = 20_000
# torch's own: forward-mode derivatives load decompositions through torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


def labels(num_classes, *shape):
    return torch.randint(num_classes, shape, generator=seeded(1))


def tensor(*values):
    return torch.tensor(values, dtype=F64)


class Case(NamedTuple):
    likelihood: likelihoods.Likelihood
    outputs: torch.Tensor
    y: torch.Tensor
    axis: int = -1


NOISE = randn(3, 2, seed=3).exp()
CASES = {
    "categorical": lambda: Case(Categorical(), randn(5, 3), labels(3, 5)),
    "categorical_binary": lambda: Case(Categorical(), randn(5, 2), labels(2, 5)),
    "categorical_image": lambda: Case(Categorical(class_axis=1), randn(2, 4, 3, 2), labels(4, 2, 3, 2), 1),
    "categorical_tokens": lambda: Case(Categorical(), randn(2, 4, 3), labels(3, 2, 4)),
    "bernoulli_1d": lambda: Case(Bernoulli(), randn(5), labels(2, 5).bool()),
    "bernoulli": lambda: Case(Bernoulli(), randn(5, 2), labels(2, 5, 2)),
    "bernoulli_dense": lambda: Case(Bernoulli(), randn(2, 3, 2), labels(2, 2, 3, 2).to(F64)),
    "normal_1d": lambda: Case(Normal(0.3), randn(5), randn(5, seed=1)),
    "normal": lambda: Case(Normal(0.3), randn(5, 2), randn(5, 2, seed=1)),
    "normal_scalar_tensor": lambda: Case(Normal(torch.tensor(0.7)), randn(5, 2), randn(5, 2, seed=1)),
    "normal_vector_noise": lambda: Case(Normal(tensor(0.2, 3.0)), randn(5, 2), randn(5, 2, seed=1)),
    "normal_dense": lambda: Case(Normal(NOISE), randn(2, 3, 2), randn(2, 3, 2, seed=1)),
    "heteroscedastic": lambda: Case(HeteroscedasticNormal(), randn(5, 4), randn(5, 2, seed=1)),
    "heteroscedastic_dense": lambda: Case(HeteroscedasticNormal(), randn(2, 3, 2), randn(2, 3, 1, seed=1)),
    "poisson_1d": lambda: Case(Poisson(), randn(5), labels(6, 5)),
    "poisson": lambda: Case(Poisson(), randn(5, 2), labels(6, 5, 2).to(F64)),
}
all_cases = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


def cases(keep):
    chosen = {name: make for name, make in CASES.items() if keep(make().likelihood)}
    return pytest.mark.parametrize("make", chosen.values(), ids=chosen.keys())


def draw(likelihood, f, num_samples=None):
    return likelihood.sample(f, generator=seeded(5), num_samples=num_samples)


def call(name):
    return lambda likelihood, f, y: getattr(likelihood, name)(f)


def call_with_y(name):
    return lambda likelihood, f, y: getattr(likelihood, name)(f, y)


def is_ordered(likelihood):
    return not likelihood.is_discrete


def has_entropy(likelihood):
    return not isinstance(likelihood, Poisson)


# What each method computes, and which likelihoods have it.
METHODS = {
    "log_prob": (call_with_y("log_prob"), None),
    "log_likelihood": (call_with_y("log_likelihood"), None),
    "mean": (call("mean"), None),
    "variance": (call("variance"), None),
    "entropy": (call("entropy"), has_entropy),
    "log_class_probs": (call("log_class_probs"), lambda lk: lk.is_discrete),
    "mean_of_log_probs": (
        lambda lk, f, y: lk.mean_of_log_probs(lk.log_class_probs(f)),
        lambda lk: lk.is_discrete,
    ),
    "entropy_of_log_probs": (
        lambda lk, f, y: lk.entropy_of_log_probs(lk.log_class_probs(f)),
        lambda lk: lk.is_discrete,
    ),
    "cdf": (call_with_y("cdf"), is_ordered),
    "fisher": (call("fisher"), None),
    "fisher_with_y": (lambda lk, f, y: lk.fisher(f, y=y), None),
    "fisher_sqrt": (call("fisher_sqrt"), None),
    "fisher_sqrt_with_y": (lambda lk, f, y: lk.fisher_sqrt(f, y=y), None),
    "hessian": (call_with_y("hessian"), None),
    "distribution": (lambda lk, f, y: lk.distribution(f).log_prob(y.to(f.dtype)), None),
}
METHODS_OF_CASES = {
    f"{name}-{case}": (method, make)
    for name, (method, keep) in METHODS.items()
    for case, make in CASES.items()
    if keep is None or keep(make().likelihood)
}
all_methods = pytest.mark.parametrize(
    ("method", "make"), METHODS_OF_CASES.values(), ids=METHODS_OF_CASES.keys()
)


def reference(likelihood, f, axis=-1):
    """The distribution of each scalar target, from torch.distributions."""
    if isinstance(likelihood, Categorical):
        return td.Categorical(logits=f.movedim(axis, -1))
    if isinstance(likelihood, Bernoulli):
        return td.Bernoulli(logits=f)
    if isinstance(likelihood, Poisson):
        return td.Poisson(f.exp())
    if isinstance(likelihood, Normal):
        return td.Normal(f, torch.as_tensor(likelihood.noise_std, dtype=f.dtype))
    half = f.shape[-1] // 2
    return td.Normal(f[..., :half], f[..., half:].exp().sqrt())


def quadrature(likelihood, f, axis=-1):
    """Targets and their weights, in the shape of y, whose weighted sums are expectations."""
    p = reference(likelihood, f, axis)
    if isinstance(p, td.Normal):  # Gauss-Hermite with 3 nodes, exact for polynomials up to degree 5
        for node, weight in [(-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6)]:
            yield p.mean + node * p.stddev, torch.full_like(p.mean, weight)
        return
    num_classes = f.shape[axis] if isinstance(likelihood, Categorical) else 2
    for value in range(60 if isinstance(likelihood, Poisson) else num_classes):  # far beyond rates of exp(f)
        y = torch.full(p.batch_shape, value, dtype=torch.int64)
        yield y, p.log_prob(y.to(F64)).exp()


def autograd_blocks(likelihood, f, y, axis=-1):
    """Hessian of -log p(y | f) from torch.func, ``(N, *positions, C, C)``; checks that positions separate."""
    blocks = []
    for row, target in zip(f, y, strict=True):
        full = hessian(lambda r, t=target: -likelihood.log_prob(r[None], t[None])[0])(row)
        if row.ndim == 0:
            blocks.append(full.reshape(1, 1))
            continue
        row_axis = axis % f.ndim - 1
        full = full.movedim(row.ndim + row_axis, -1).movedim(row_axis, row.ndim - 1)
        *positions, c = row.movedim(row_axis, -1).shape
        num = math.prod(positions)
        full = full.reshape(num, c, num, c)
        for a in range(num):
            for b in range(num):
                assert a == b or not full[a, :, b].any()
        blocks.append(torch.stack([full[a, :, a] for a in range(num)]).reshape(*positions, c, c))
    return torch.stack(blocks)


def outer_products(columns, axis=-1):
    """``sum_k c_k c_k^T`` in each row and position."""
    columns = columns.movedim(axis % (columns.ndim - 1) + 1, -1) if columns.ndim > 2 else columns[..., None]
    return torch.einsum("k...i,k...j->...ij", columns, columns)


# --- values ---------------------------------------------------------------------------------------------


@all_cases
def test_log_prob_sums_the_terms_of_a_row(make):
    likelihood, f, y, axis = make()
    terms = reference(likelihood, f, axis).log_prob(y.to(F64))
    expected = terms.reshape(len(f), -1).sum(1)
    torch.testing.assert_close(likelihood.log_prob(f, y), expected)
    torch.testing.assert_close(likelihood.log_likelihood(f, y), expected.sum())
    assert likelihood.num_terms(f, y) == terms.numel()


def test_log_prob_by_hand():
    f, y = tensor([1.0, 2.0]), tensor([1.5, -1.0])
    normal = -(0.5**2 + 3.0**2) / (2 * 0.1**2) - 2 * math.log(0.1 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(Normal(0.1).log_prob(f, y), tensor(normal))
    mixed = -(0.5**2) / (2 * math.exp(2.0)) - 0.5 * math.log(2 * math.pi * math.exp(2.0))
    torch.testing.assert_close(HeteroscedasticNormal().log_prob(f, y[:, :1]), tensor(mixed))
    softmax = 2.0 - math.log(math.exp(1.0) + math.exp(2.0))
    torch.testing.assert_close(Categorical().log_prob(f, torch.tensor([1])), tensor(softmax))
    logistic = -math.log(1 + math.exp(-1.0)) - math.log(1 + math.exp(2.0))
    torch.testing.assert_close(Bernoulli().log_prob(f, tensor([1.0, 0.0])), tensor(logistic))
    counts = 3 * 1.0 - math.exp(1.0) - math.log(6) - math.exp(2.0)
    torch.testing.assert_close(Poisson().log_prob(f, tensor([3.0, 0.0])), tensor(counts))


@all_cases
def test_moments_and_entropy_are_those_of_the_distribution(make):
    likelihood, f, _, axis = make()
    p = reference(likelihood, f, axis)
    if isinstance(likelihood, Categorical):
        mean, variance = p.probs.movedim(-1, axis), (p.probs * (1 - p.probs)).movedim(-1, axis)
    else:
        mean, variance = p.mean, p.variance
    torch.testing.assert_close(likelihood.mean(f), mean)
    torch.testing.assert_close(likelihood.variance(f), variance)
    if has_entropy(likelihood):
        torch.testing.assert_close(likelihood.entropy(f), p.entropy())


@all_cases
def test_distribution_has_rows_as_batch_and_the_same_log_prob(make):
    likelihood, f, y, _ = make()
    distribution = likelihood.distribution(f)
    assert distribution.batch_shape == f.shape[:1]
    assert distribution.event_shape == y.shape[1:]
    torch.testing.assert_close(distribution.log_prob(y.to(F64)), likelihood.log_prob(f, y))


@cases(is_ordered)
def test_cdf_is_the_mass_up_to_y(make):
    likelihood, f, y, _ = make()
    p = reference(likelihood, f)
    y = y.to(F64)
    if isinstance(likelihood, Poisson):
        expected = sum(p.log_prob(tensor(k)).exp() * (k <= y) for k in range(10))
        torch.testing.assert_close(likelihood.cdf(f, y + 0.7), expected)
        assert not likelihood.cdf(f, torch.full_like(y, -0.1)).any()
    else:
        expected = p.cdf(y)
    torch.testing.assert_close(likelihood.cdf(f, y), expected)


@cases(lambda likelihood: likelihood.is_discrete)
def test_mixtures_over_draws_are_averaged_in_log_space(make):
    likelihood, f, _, axis = make()
    draws = torch.stack([f, f.flip(0), 2 * f])
    average = vmap(likelihood.log_class_probs)(draws).logsumexp(0) - math.log(3)
    mean = vmap(likelihood.mean)(draws).mean(0)
    torch.testing.assert_close(likelihood.mean_of_log_probs(average), mean)
    if isinstance(likelihood, Categorical):
        expected = td.Categorical(probs=mean.movedim(axis, -1)).entropy()
    else:
        expected = td.Bernoulli(probs=mean).entropy()
    torch.testing.assert_close(likelihood.entropy_of_log_probs(average), expected)


# --- second derivatives ---------------------------------------------------------------------------------


@all_cases
def test_hessian_is_the_one_of_autograd_in_blocks_of_one_position(make):
    likelihood, f, y, axis = make()
    torch.testing.assert_close(likelihood.hessian(f, y), autograd_blocks(likelihood, f, y, axis))


@all_cases
def test_fisher_is_the_hessian_averaged_over_y(make):
    likelihood, f, _, axis = make()
    fisher = likelihood.fisher(f)
    expected = torch.zeros_like(fisher)
    for y, weight in quadrature(likelihood, f, axis):
        if isinstance(likelihood, Categorical):
            weight = weight[..., None, None]
        else:  # entry (i, j) of a block depends on the target of output i alone, or is zero
            repeats = fisher.shape[-1] // (weight.shape[-1] if f.ndim > 1 else 1)
            weight = torch.cat([weight] * repeats, -1).reshape(fisher.shape[:-1])[..., None]
        expected += weight * autograd_blocks(likelihood, f, y, axis)
    torch.testing.assert_close(fisher, expected)


@all_cases
def test_the_output_axis_is_the_one_whose_outputs_a_block_of_the_fisher_is_of(make):
    likelihood, f, y, axis = make()
    found = likelihood.output_axis(f)
    if f.ndim == 1:
        assert found is None
    else:
        assert found == axis % f.ndim
        blocks = likelihood.fisher(f, y=y)
        assert blocks.shape == (*f.movedim(found, -1).shape, f.shape[found])


def test_outputs_without_a_class_axis_have_no_output_axis():
    with pytest.raises(ValueError, match="classes on axis 2"):
        Categorical(class_axis=2).output_axis(randn(5, 3))


@all_cases
def test_outer_products_of_fisher_sqrt_columns_give_the_fisher(make):
    likelihood, f, _, axis = make()
    columns = likelihood.fisher_sqrt(f)
    num_outputs = f.shape[axis] if f.ndim > 1 else 1
    assert columns.shape == (num_outputs - isinstance(likelihood, Categorical), *f.shape)
    torch.testing.assert_close(outer_products(columns, axis), likelihood.fisher(f))


@pytest.mark.parametrize(
    "logits",
    [
        [200.0, -200.0],
        [-200.0, 200.0],
        [200.0, 0.0, -200.0],
        [-200.0, 0.0, 200.0],
        [0.0, 200.0, 200.0, -200.0],
        [-200.0, 200.0, 0.0, 0.0],
        [0.0, -40.0],
        [-40.0, 0.0, -40.0],
        [0.0] * 6,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_categorical_root_keeps_its_relative_accuracy_at_extreme_logits(logits, dtype):
    f = torch.tensor([logits], dtype=dtype)
    root = Categorical().fisher_sqrt(f)
    assert root.isfinite().all()
    p = f.to(F64).softmax(-1)
    off = -(p[:, :, None] * p[:, None, :])
    off.diagonal(dim1=-2, dim2=-1).zero_()
    expected = off - torch.diag_embed(off.sum(-1))
    tiny = torch.finfo(dtype).tiny ** 0.5  # squares below it underflow
    rtol = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(outer_products(root.to(F64)), expected, rtol=rtol, atol=tiny)
    torch.testing.assert_close(Categorical().fisher(f).to(F64), expected, rtol=rtol, atol=tiny)


def test_classes_that_are_masked_out_by_infinite_logits_have_no_part_in_the_root():
    f = tensor(0.3, -torch.inf, 1.0, -torch.inf, -torch.inf)
    root = Categorical().fisher_sqrt(f[None])
    without = Categorical().fisher(f[[0, 2]][None])[0]
    expected = torch.zeros(5, 5, dtype=F64)
    expected[0, 0], expected[0, 2], expected[2, 0], expected[2, 2] = without.flatten()
    torch.testing.assert_close(outer_products(root)[0], expected)
    torch.testing.assert_close(Categorical().entropy(f[None]), Categorical().entropy(f[[0, 2]][None]))


def test_one_class_needs_no_columns():
    assert Categorical().fisher_sqrt(randn(4, 1)).shape == (0, 4, 1)


@pytest.mark.parametrize("logit", [0.0, 22.0, -22.0, 30.0, -30.0, 200.0, -200.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_bernoulli_is_stable_at_extreme_logits(logit, dtype):
    f = torch.tensor([logit], dtype=dtype)
    p, q = f.to(F64).sigmoid(), (-f.to(F64)).sigmoid()
    log_p = f.to(F64).clamp_max(0) - torch.log1p((-f.to(F64).abs()).exp())
    log_q = (-f.to(F64)).clamp_max(0) - torch.log1p((-f.to(F64).abs()).exp())
    tiny, rtol = torch.finfo(dtype).tiny ** 0.5, 1e-5 if dtype == torch.float32 else 1e-12
    close = {"rtol": rtol, "atol": tiny}
    bernoulli, ones = Bernoulli(), torch.ones(1)
    torch.testing.assert_close(bernoulli.log_prob(f, ones).to(F64), log_p, **close)
    torch.testing.assert_close(bernoulli.log_prob(f, 1 - ones).to(F64), log_q, **close)
    torch.testing.assert_close(bernoulli.entropy(f).to(F64), -p * log_p - q * log_q, **close)
    torch.testing.assert_close(bernoulli.fisher(f).flatten().to(F64), p * q, **close)
    torch.testing.assert_close(bernoulli.fisher_sqrt(f).flatten().to(F64), (p * q).sqrt(), **close)
    slope = grad(lambda r: bernoulli.log_likelihood(r, ones))(f)
    torch.testing.assert_close(slope.to(F64), q, **close)
    assert grad(lambda r: bernoulli.fisher_sqrt(r).sum())(f).isfinite().all()


def test_the_heteroscedastic_hessian_is_indefinite_and_its_fisher_is_not():
    likelihood, f, y, _ = CASES["heteroscedastic"]()
    assert (torch.linalg.eigvalsh(likelihood.hessian(f, y))[:, 0] < 0).all()
    assert (torch.linalg.eigvalsh(likelihood.fisher(f))[:, 0] > 0).all()


def test_the_ggn_of_a_linear_model_is_the_gram_matrix_over_the_noise_variance():
    x, w, y = randn(7, 3), randn(3, seed=1), randn(7, seed=2)
    expected = x.T @ x / 0.3**2
    full = hessian(lambda w: -Normal(0.3).log_likelihood(x @ w, y))(w)
    pulled = torch.stack([x * c[:, None] for c in Normal(0.3).fisher_sqrt(x @ w)])  # (K, N, P)
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(torch.einsum("knp,knq->pq", pulled, pulled), expected)


# --- transforms, dtypes, empty batches ------------------------------------------------------------------


@all_methods
def test_one_vmapped_call_equals_a_loop_over_draws(method, make):
    likelihood, f, y, _ = make()
    draws = torch.stack([f, f.flip(0), 0.5 * f])
    got = vmap(lambda f: method(likelihood, f, y))(draws)
    torch.testing.assert_close(got, torch.stack([method(likelihood, f, y) for f in draws]))


@all_cases
def test_num_terms_works_under_vmap(make):
    likelihood, f, y, _ = make()
    counts = vmap(likelihood.num_terms, in_dims=(0, None))(torch.stack([f, f]), y)
    assert counts.tolist() == [int(likelihood.num_terms(f, y))] * 2


@all_cases
def test_gradients_are_the_same_under_vmap_and_in_a_loop(make):
    likelihood, f, y, _ = make()
    draws = torch.stack([f, f.flip(0), 0.5 * f])
    score = grad(likelihood.log_likelihood)
    expected = torch.stack([score(f, y) for f in draws])
    assert expected.abs().sum() > 0
    torch.testing.assert_close(vmap(score, in_dims=(0, None))(draws, y), expected)


@all_methods
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_results_have_the_dtype_of_the_outputs(method, make, dtype):
    likelihood, f, y, _ = make()
    f = f.to(dtype)
    got = method(likelihood, f, y)
    assert got.dtype == dtype
    expected = method(likelihood, f.to(F64), y.to(dtype).to(F64) if y.is_floating_point() else y)
    if dtype == torch.bfloat16:
        scale = float(expected.abs().max())
        torch.testing.assert_close(got.to(F64), expected, rtol=0.05, atol=0.02 * scale)
    else:
        torch.testing.assert_close(got.to(F64), expected, rtol=1e-4, atol=1e-4)


@all_cases
def test_log_prob_in_bfloat16_is_rounded_only_at_the_end(make):
    likelihood, f, y, _ = make()
    f = f.bfloat16()
    expected = likelihood.log_prob(f.float(), y).bfloat16()
    torch.testing.assert_close(likelihood.log_prob(f, y), expected, rtol=0, atol=0)


# torch.distributions.Independent takes no empty batches.
@pytest.mark.parametrize(
    ("method", "make"),
    [
        pytest.param(method, make, id=name)
        for name, (method, make) in METHODS_OF_CASES.items()
        if not name.startswith("distribution")
    ],
)
def test_empty_batches_are_fine(method, make):
    likelihood, f, y, _ = make()
    got, full = method(likelihood, f[:0], y[:0]), method(likelihood, f, y)
    assert got.ndim == full.ndim
    assert got.sum() == 0


@all_cases
def test_empty_batches_are_checked_counted_and_sampled(make):
    likelihood, f, y, _ = make()
    likelihood.check(f[:0], y[:0])
    assert likelihood.num_terms(f[:0], y[:0]) == 0
    assert draw(likelihood, f[:0]).shape == y[:0].shape


@all_methods
def test_results_are_on_the_device_of_the_outputs(method, make):
    likelihood, f, y, _ = make()
    likelihood = optree.tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, likelihood
    )
    got = method(likelihood, f.to("meta"), y.to("meta"))
    assert got.device.type == "meta"
    assert got.shape == method(*make()[:3]).shape


# --- sampling -------------------------------------------------------------------------------------------


@all_cases
def test_samples_have_the_moments_of_the_likelihood(make):
    likelihood, f, y, axis = make()
    got = draw(likelihood, f, NUM_SAMPLES)
    assert got.shape == (NUM_SAMPLES, *y.shape)
    if isinstance(likelihood, Categorical):
        assert got.dtype == torch.int64
        got = torch.nn.functional.one_hot(got, f.shape[axis]).to(F64).movedim(-1, axis % f.ndim + 1)
    mean = likelihood.mean(f)
    for values, expected in [(got, mean), ((got - mean).square(), likelihood.variance(f))]:
        standard_error = values.std(0) / NUM_SAMPLES**0.5
        assert ((values.mean(0) - expected).abs() < 5 * standard_error).all()


@all_cases
def test_samples_of_equal_rows_are_independent(make):
    likelihood, f, _, _ = make()
    got = draw(likelihood, torch.stack([f[0], f[0]]), NUM_SAMPLES).to(F64).reshape(NUM_SAMPLES, -1)
    got = got[:, (got != got[0]).any(0)]
    off = torch.corrcoef(got.T) - torch.eye(got.shape[1])
    assert (off.abs() < 5 / NUM_SAMPLES**0.5).all()


@all_cases
def test_samples_follow_the_generator_and_leave_the_global_state_alone(make):
    likelihood, f, y, _ = make()
    before = torch.get_rng_state()
    first = draw(likelihood, f)
    assert first.shape == y.shape
    torch.testing.assert_close(draw(likelihood, f), first, rtol=0, atol=0)
    many = draw(likelihood, f, 50)
    assert (many != many[0]).any()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(TypeError, match="generator"):
        likelihood.sample(f)


@all_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_samples_have_the_dtype_of_the_outputs(make, dtype):
    likelihood, f, _, _ = make()
    expected = torch.int64 if isinstance(likelihood, Categorical) else dtype
    assert draw(likelihood, f.to(dtype)).dtype == expected


@all_cases
def test_samples_differ_between_draws_under_vmap(make):
    likelihood, f, y, _ = make()
    generator = seeded(2)
    sample = vmap(lambda f: likelihood.sample(f, generator=generator, num_samples=30), randomness="different")
    got = sample(torch.stack([f, f]))
    assert got.shape == (2, 30, *y.shape)
    assert (got[0] != got[1]).any()


# --- ignored labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, 255, 0])
def test_ignored_positions_count_for_nothing(ignore_index):
    likelihood, f, y, _ = CASES["categorical_image"]()
    likelihood = Categorical(class_axis=1, ignore_index=ignore_index)
    y = y.clamp_min(1) if ignore_index == 0 else y
    plain = Categorical(class_axis=1)
    terms = plain.distribution(f).base_dist.log_prob(y)
    ignored = torch.zeros_like(y, dtype=torch.bool)
    ignored[0, 1] = ignored[1, 0, 0] = True
    masked = y.masked_fill(ignored, ignore_index)

    likelihood.check(f, masked)
    assert likelihood.num_terms(f, masked) == (~ignored).sum()
    torch.testing.assert_close(likelihood.log_prob(f, masked), (terms * ~ignored).flatten(1).sum(1))
    torch.testing.assert_close(likelihood.hessian(f, masked), autograd_blocks(likelihood, f, masked, axis=1))
    fisher = likelihood.fisher(f, y=masked)
    torch.testing.assert_close(fisher, plain.fisher(f) * ~ignored[..., None, None])
    torch.testing.assert_close(outer_products(likelihood.fisher_sqrt(f, y=masked), axis=1), fisher)
    assert not fisher[ignored].any()
    assert fisher[~ignored].flatten(1).any(1).all()


def test_labels_of_all_integer_types_are_read_alike():
    likelihood, f, y, _ = CASES["categorical"]()
    expected = likelihood.log_prob(f, y)
    for dtype in (torch.uint8, torch.int32):
        torch.testing.assert_close(likelihood.log_prob(f, y.to(dtype)), expected)
    # 156 is -100 modulo 256
    wide, label = randn(1, 200), torch.tensor([156], dtype=torch.uint8)
    assert likelihood.num_terms(wide, label) == 1


def test_a_batch_of_ignored_labels_has_log_likelihood_zero():
    f, y = randn(3, 2), torch.full((3,), -100)
    assert Categorical().log_likelihood(f, y) == 0
    assert not grad(Categorical().log_likelihood)(f, y).any()


# --- likelihoods as trees -------------------------------------------------------------------------------


def test_the_noise_is_differentiated_and_mapped_over():
    f, y = randn(6, 2), randn(6, 2, seed=1)
    noise = tensor(0.5, 2.0)
    squares = (y - f).square().sum(0)
    expected = squares / noise**3 - 6 / noise

    def score(likelihood):
        return grad(lambda likelihood: likelihood.log_likelihood(f, y))(likelihood).noise_std

    torch.testing.assert_close(score(Normal(noise)), expected)
    torch.testing.assert_close(grad(lambda s: Normal(s).log_likelihood(f, y))(noise), expected)
    stacked = torch.stack([noise, 3 * noise])
    mapped = vmap(lambda likelihood: likelihood.log_likelihood(f, y))(Normal(stacked))
    built_inside = vmap(lambda s: Normal(s).log_likelihood(f, y))(stacked)
    loop = torch.stack([Normal(s).log_likelihood(f, y) for s in stacked])
    torch.testing.assert_close(mapped, loop)
    torch.testing.assert_close(built_inside, loop)
    half = optree.tree_map(lambda s: s / 2, Normal(noise))
    torch.testing.assert_close(half.noise_std, noise / 2)


@all_cases
def test_likelihoods_survive_pickling_and_tree_map(make):
    likelihood, f, y, _ = make()
    expected = likelihood.log_prob(f, y)
    for copy in (pickle.loads(pickle.dumps(likelihood)), optree.tree_map(lambda leaf: leaf, likelihood)):
        assert type(copy) is type(likelihood)
        torch.testing.assert_close(copy.log_prob(f, y), expected)
    torch.testing.assert_close(
        vmap(type(likelihood).log_prob, (None, 0, None))(likelihood, f[None], y)[0], expected
    )


def test_the_package_offers_the_likelihoods():
    assert fb.likelihoods.Normal is Normal
    assert all(issubclass(type(make().likelihood), likelihoods.Likelihood) for make in CASES.values())


# --- refusals -------------------------------------------------------------------------------------------

f2, f1 = randn(4, 2), randn(4)
REFUSALS = {
    "trap": (
        lambda: Normal(1.0).log_prob(randn(4, 1), f1),
        ValueError,
        r"\(4, 1\).* got \(4,\)\. Write `y\[:, None\]`",
    ),
    "trap_reversed": (
        lambda: Normal(1.0).log_prob(f1, randn(4, 1)),
        ValueError,
        r"\(4,\).* \(4, 1\)\. .*y\.squeeze",
    ),
    "trap_poisson": (
        lambda: Poisson().log_prob(randn(4, 1), torch.ones(4)),
        ValueError,
        r"outputs\.squeeze\(-1\)",
    ),
    "trap_bernoulli": (lambda: Bernoulli().log_prob(randn(4, 1), torch.ones(4)), ValueError, r"y\[:, None\]"),
    "trap_hetero": (
        lambda: HeteroscedasticNormal().log_prob(f2, f1),
        ValueError,
        r"\(4, 1\) .* Write `y\[:, None\]`\.",
    ),
    "trap_hessian": (lambda: Normal(1.0).hessian(randn(4, 1), f1), ValueError, "Normal.hessian"),
    "trap_cdf": (lambda: Normal(1.0).cdf(randn(4, 1), f1), ValueError, "Normal.cdf"),
    "trap_check": (
        lambda: Normal(1.0).check(randn(4, 1), f1, call="fit(data=...)"),
        ValueError,
        r"fit\(data=...\)",
    ),
    "rows": (lambda: Normal(1.0).log_prob(f1, randn(3)), ValueError, r"shape \(4,\) .* got \(3,\)\."),
    "label_column": (
        lambda: Categorical().log_prob(f2, labels(2, 4, 1)),
        ValueError,
        r"shape \(4,\) .*y\.squeeze\(-1\)",
    ),
    "float_labels": (
        lambda: Categorical().log_prob(f2, f1),
        TypeError,
        r"integers, got torch.float64.*y\.long\(\)",
    ),
    "one_hot": (lambda: Categorical().check(f2, f2), TypeError, r"y\.argmax\(-1\)"),
    "label_range": (
        lambda: Categorical().check(f2, torch.tensor([0, 2, 1, 0])),
        ValueError,
        r"from 0 to 1, or -100.* 0 to 2",
    ),
    "label_negative": (
        lambda: Categorical().check(f2, torch.tensor([0, -1, 1, 0])),
        ValueError,
        "from -1 to 1",
    ),
    "no_class_axis": (lambda: Categorical().check(f1), ValueError, r"classes on axis -1 .* \(4,\)"),
    "class_axis_far": (lambda: Categorical(class_axis=2).mean(f2), ValueError, r"class_axis.* \(4, 2\)"),
    "class_axis_rows": (lambda: Categorical(class_axis=-2).mean(f2), ValueError, r"axis of rows"),
    "class_axis_zero": (lambda: Categorical(class_axis=0), ValueError, "axis of rows"),
    "bernoulli_values": (
        lambda: Bernoulli().check(f1, torch.tensor([1, -1, 1, 1])),
        ValueError,
        "0 or 1, got .* -1 to 1",
    ),
    "odd": (lambda: HeteroscedasticNormal().check(randn(4, 3)), ValueError, r"2 D.* \(4, 3\)"),
    "hetero_1d": (lambda: HeteroscedasticNormal().mean(f1), ValueError, r"2 D.* \(4,\)"),
    "count_negative": (
        lambda: Poisson().check(f1, torch.tensor([1, 2, -3, 0])),
        ValueError,
        "negative, got -3",
    ),
    "count_fraction": (lambda: Poisson().check(f1, torch.full((4,), 0.5)), ValueError, "whole numbers"),
    "nan_target": (lambda: Normal(1.0).check(f1, f1 * math.nan), ValueError, "finite"),
    "integer_outputs": (
        lambda: Normal(1.0).check(labels(2, 4)),
        TypeError,
        "floating point, got torch.int64",
    ),
    "outputs_dict": (lambda: Categorical().check({"logits": f2}), TypeError, "tensor, got dict"),
    "outputs_scalar": (lambda: Normal(1.0).check(torch.tensor(1.0)), ValueError, "axis of rows"),
    "y_list": (lambda: Normal(1.0).log_prob(f1, [1.0] * 4), TypeError, "tensor, got list"),
    "noise_zero": (lambda: Normal(0.0), ValueError, r"positive and finite, got 0\.0"),
    "noise_negative": (lambda: Normal(tensor(1.0, -1.0)), ValueError, r"positive and finite, got a tensor"),
    "noise_nan": (lambda: Normal(math.nan), ValueError, "positive"),
    "noise_type": (lambda: Normal("0.1"), TypeError, "number or a tensor, got str"),
    "noise_bool": (lambda: Normal(True), TypeError, r"`Normal\(noise_std=\.\.\.\)`.*got bool"),
    "noise_shape": (
        lambda: Normal(torch.ones(3)).log_prob(f2, f2),
        ValueError,
        r"one row .* \(2,\), got shape \(3,\)",
    ),
    "noise_rows": (lambda: Normal(torch.ones(4, 1)).check(f2), ValueError, r"got shape \(4, 1\)"),
    "noise_1d": (lambda: Normal(torch.ones(4)).variance(f1), ValueError, r"of shape \(\), got shape \(4,\)"),
    "no_samples": (lambda: draw(Normal(1.0), f1, 0), ValueError, r"num_samples=.* at least 1, got 0"),
    "poisson_entropy": (
        lambda: Poisson().entropy(f1),
        NotImplementedError,
        "Poisson.entropy.*no closed form",
    ),
    "categorical_cdf": (lambda: Categorical().cdf(f2, labels(2, 4)), NotImplementedError, "Categorical.cdf"),
    "bernoulli_cdf": (lambda: Bernoulli().cdf(f1, f1), NotImplementedError, "Bernoulli.cdf"),
    "normal_classes": (
        lambda: Normal(1.0).log_class_probs(f1),
        NotImplementedError,
        "Normal.log_class_probs",
    ),
    "poisson_classes": (lambda: Poisson().entropy_of_log_probs(f1), NotImplementedError, "no classes"),
    "hetero_classes": (
        lambda: HeteroscedasticNormal().mean_of_log_probs(f2),
        NotImplementedError,
        "no classes",
    ),
}


@pytest.mark.parametrize(("attempt", "error", "match"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_makes_no_sense_is_refused_with_a_way_out(attempt, error, match):
    with pytest.raises(error, match=match):
        attempt()


@all_cases
def test_check_accepts_what_the_methods_take(make):
    likelihood, f, y, _ = make()
    likelihood.check(f)
    likelihood.check(f, y)
    likelihood.check(f, draw(likelihood, f))
