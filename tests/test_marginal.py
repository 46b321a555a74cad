"""Predictions with layers' outputs drawn in the place of weights: each row as if its weights were drawn."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from zoo import F64, MODELS, gaussian, randn

import funcbayes as fb
from funcbayes.covariances import Diagonal, Kronecker, LowRankPlusDiagonal
from funcbayes.likelihoods import Categorical

S = 4000


def linear(params, x):
    return F.linear(x, params["w"], params["b"])


def net(params, x):
    return F.linear(torch.tanh(F.linear(x, params["w1"], params["b1"])), params["w2"], params["b2"])


def linear_params():
    return {"w": randn(2, 3), "b": randn(2, seed=1)}


def leaves():
    shapes = {"w1": (6, 3), "b1": (6,), "w2": (2, 6), "b2": (2,)}
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def spread(mean, seed=5):
    return {name: 0.05 + 0.2 * randn(*leaf.shape, seed=seed).square() for name, leaf in mean.items()}


def diagonal(mean):
    return fb.Gaussian(mean, Diagonal(spread(mean)))


def kronecker(mean):
    def matrix(size, seed):
        root = randn(size, size, seed=seed)
        return root @ root.mT + torch.eye(size, dtype=F64)

    outputs = {name: matrix(len(leaf), 6) for name, leaf in mean.items()}
    inputs = {name: matrix(leaf.shape[1], 7) for name, leaf in mean.items() if leaf.ndim > 1}
    return fb.Gaussian(mean, Kronecker.from_factors(mean, outputs, inputs, prior_precision=3.0))


each_covariance = pytest.mark.parametrize("make", [diagonal, kronecker])


def draws(fn, q, x, **options):
    return fb.predict(fn, None, q, x, **{"num_samples": S, "seed": 0, "marginal": True, **options}).samples


def covariances(samples):
    """Of the outputs of each row, ``(N, F, F)``."""
    deviation = samples - samples.mean(0)
    return torch.einsum("sni,snj->nij", deviation, deviation) / len(samples)


@each_covariance
def test_a_row_of_a_linear_model_has_its_exact_distribution(make):
    q, x = make(linear_params()), randn(5, 3)
    # f = W x + b: J has x^T in the block of each output's weights, and 1 for its bias.
    exact = fb.predict_linearized(linear, None, q, x)
    found = draws(linear, q, x)
    s = exact.output_covariance
    error = (s.diagonal(dim1=1, dim2=2) / S).sqrt()
    assert ((found.mean(0) - exact.output_mean).abs() < 5 * error).all()
    variance = s.diagonal(dim1=1, dim2=2)
    # Var of an entry of the sample covariance of Gaussians: (S_ii S_jj + S_ij^2) / n.
    error = ((variance.unsqueeze(1) * variance.unsqueeze(2) + s**2) / S).sqrt()
    assert ((covariances(found) - s).abs() < 5 * error).all()


@each_covariance
def test_a_row_of_a_network_is_distributed_as_with_drawn_weights(make):
    q, x = make(leaves()), randn(4, 3)
    one, two = draws(net, q, x), draws(net, q, x, marginal=False, seed=1)
    for moment in (lambda f: f, lambda f: (f - two.mean(0)).square(), lambda f: f[..., :1] * f[..., 1:]):
        a, b = moment(one), moment(two)
        error = ((a.var(0) + b.var(0)) / S).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all()


def test_rows_of_one_draw_have_no_weights_in_common():
    found = draws(net, diagonal(leaves()), randn(1, 3).expand(2, 3))[:, :, 0]
    assert torch.corrcoef(found.mT)[0, 1].abs() < 5 / S**0.5


def test_batches_do_not_repeat_noise():
    q, x = diagonal(leaves()), randn(3, 3)
    options = {"num_samples": 5, "seed": 0, "marginal": True, "labelled": False}
    first, second = fb.predict_batches(net, None, q, [x, x], **options).samples.split(3, 1)
    assert (first != second).all()
    assert_close(first, draws(net, q, x, num_samples=5))


@each_covariance
def test_a_draw_does_not_depend_on_its_company(make):
    q, x = make(leaves()), randn(4, 3)
    expected = draws(net, q, x, num_samples=7, chunk_size=1)
    for chunk_size in (3, 7, None):
        assert_close(draws(net, q, x, num_samples=7, chunk_size=chunk_size), expected)
    assert_close(draws(net, q, x, num_samples=3), expected[:3])
    assert (draws(net, q, x, num_samples=7, seed=1) != expected).all()


def twice(params, x):
    return linear(params, torch.tanh(linear(params, x)))


def tokens(params, x):
    return linear(params, x).mean(1)


def tied(params, x):
    return F.linear(F.linear(x, params["w"]) + params["b"], params["w"].mT)


def by_number_of_rows(params, x):
    """With more rows than a probe has, the leaf is used in another way."""
    return x @ params["w"].mT + params["b"] if len(x) > 2 else linear(params, x)


square = {"w": randn(3, 3), "b": randn(3, seed=1)}


@each_covariance
@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (twice, randn(4, 3)),
        (tokens, randn(4, 5, 3)),
        (tied, randn(4, 3)),
        (by_number_of_rows, randn(4, 3)),
    ],
)
def test_leaves_that_no_layer_can_draw_for_are_drawn_as_ever(make, fn, x):
    q = make(square)
    assert_close(draws(fn, q, x, num_samples=5), draws(fn, q, x, num_samples=5, marginal=False))


@pytest.mark.parametrize("name", ["conv", "transformer", "keywords"])
def test_models_of_many_layers_keep_their_moments(name):
    model = MODELS[name]()
    q, x = gaussian(model.params, scale=0.1), model.inputs(3)
    one, two = (
        fb.predict(model.fn, model.params, q, x, num_samples=1000, seed=m, marginal=bool(m)).samples
        for m in (0, 1)
    )
    error = ((one.var(0) + two.var(0)) / 1000).sqrt()
    assert ((one.mean(0) - two.mean(0)).abs() < 5 * error).all()
    # The relative error of a standard deviation is (2 S)^-1/2 for Gaussians.
    assert_close(one.std(0), two.std(0), rtol=5 * 1000**-0.5, atol=0.0)


def test_a_part_of_the_parameters_may_be_random():
    mean = leaves()
    q, x = diagonal({name: mean[name] for name in ("w2", "b2")}), randn(3, 3)
    found = fb.predict(net, mean, q, x, num_samples=S, seed=0, marginal=True).samples
    exact = fb.predict_linearized(net, mean, q, x)  # for it is linear in the last layer
    assert ((found.mean(0) - exact.output_mean).abs() < 5 * (exact.output_variance / S).sqrt()).all()
    assert_close(found.var(0), exact.output_variance, rtol=5 * (2 / S) ** 0.5, atol=0.0)


def test_it_is_differentiable_in_the_posterior_and_streams_and_compiles(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda graph, **options: graph)
    mean = {name: leaf.requires_grad_() for name, leaf in linear_params().items()}
    x, options = randn(4, 3), {"num_samples": 6, "seed": 0, "marginal": True}
    q = diagonal(mean)
    (got,) = torch.autograd.grad(fb.predict(linear, None, q, x, **options).samples.mean(0).sum(), mean["w"])
    assert_close(got, x.sum(0).expand_as(got))  # noise has no part in the mean's gradient
    with torch.no_grad():
        kept = fb.predict(linear, None, q, x, likelihood=Categorical(), **options)
        streamed = fb.predict(linear, None, q, x, likelihood=Categorical(), keep_samples=False, **options)
        assert_close(streamed.mean, kept.mean)
        assert_close(fb.predict(linear, None, q, x, compile=True, **options).samples, kept.samples)


def test_half_precision_is_evaluated_in_half_precision():
    found = draws(net, diagonal(leaves()), randn(4, 3), num_samples=8, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()


def low_rank(mean):
    factors = {name: leaf.unsqueeze(-1) for name, leaf in mean.items()}
    return fb.Gaussian(mean, LowRankPlusDiagonal(spread(mean), factors))


@pytest.mark.parametrize(
    ("posterior", "named"),
    [
        (fb.Point(linear_params()), "got Point"),
        (fb.antithetic(diagonal(linear_params())), "got antithetic Gaussian with Diagonal"),
        (low_rank(linear_params()), "got Gaussian with LowRankPlusDiagonal"),
        (
            fb.Gaussian(linear_params(), Diagonal(spread(linear_params())), linearized=True),
            "got linearized Gaussian",
        ),
    ],
)
def test_posteriors_that_layers_cannot_draw_are_refused(posterior, named):
    with pytest.raises(TypeError, match=rf"predict\(marginal=True\)` should be given .*{named}.*marginal"):
        fb.predict(linear, None, posterior, randn(4, 3), marginal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_may_be_in_a_wider_dtype_than_the_layer(dtype):
    exact = kronecker(leaves())
    mean = fb.to(exact.mean, dtype=dtype)
    covariance = exact.covariance
    variance = fb.to(covariance.variance, dtype=dtype)
    q = fb.Gaussian(mean, Kronecker(variance, covariance.output_basis, covariance.input_basis))
    x = randn(4, 3).to(dtype)
    narrow, wide = draws(net, q, x, num_samples=50), draws(net, fb.to(q, dtype=dtype), x, num_samples=50)
    assert narrow.dtype == wide.dtype == dtype
    size = wide.abs().max().item()
    assert_close(narrow, wide, rtol=0.0, atol=8 * torch.finfo(dtype).eps * size)


def test_a_module_with_other_layers_keeps_its_fixed_leaves():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    fn, params = fb.make_functional(module)
    q, x = diagonal(params), randn(4, 3)
    one, two = (fb.predict(fn, None, q, x, num_samples=S, seed=m, marginal=bool(m)).samples for m in (0, 1))
    assert ((one.mean(0) - two.mean(0)).abs() < 5 * ((one.var(0) + two.var(0)) / S).sqrt()).all()


def test_a_model_that_vmap_cannot_take_is_told_once_and_by_its_own_name():
    def looks(params, x):
        return net(params, x) * float(params["w2"].sum().item() > 0)

    q, x = diagonal(leaves()), randn(4, 3)
    with pytest.warns(UserWarning, match="`vmap` cannot take .*looks.* loop") as caught:
        draws(looks, q, x)
    assert len(caught) == 1
    assert "method" not in str(caught[0].message)
    draws(looks, q, x, marginal=False)  # where another warning would be an error
