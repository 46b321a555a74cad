"""Linearised predictives where the data say far more than the prior: against matrices in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_predict_linearized import flat, jacobian
from torch import nn
from torch.testing import assert_close
from zoo import Largest, randn

import funcbayes as fb
from funcbayes import Gaussian, laplace, predict_linearized
from funcbayes.covariances import LowRankPrecision
from funcbayes.likelihoods import Categorical, Normal

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def linear(params, x):
    return F.linear(x, params["w"], params["b"])


def convolved(params, x):
    return F.conv1d(x.unsqueeze(1), params["w"], params["b"]).flatten(1)


MODELS = {
    "linear": (linear, {"b": (2,), "w": (2, 3)}),
    "conv": (convolved, {"b": (2,), "w": (2, 1, 2)}),
}


def close(got, expected, dtype):
    assert got.dtype is dtype
    scale = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    assert_close(got.double() / scale, expected / scale, rtol=0, atol=4 * TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", [1.0, 1e-2, 1e-6])
def test_factors_that_leave_next_to_no_variance(name, precision, dtype):
    fn, shapes = MODELS[name]
    params = {leaf: randn(*shape).to(dtype) for leaf, shape in shapes.items()}
    # Of 20000 rows with noise of 0.1 in more directions than there are parameters.
    size = math.sqrt(20_000) / 0.1
    factors = {leaf: (size * randn(*shape, 12, seed=1)).to(dtype) for leaf, shape in shapes.items()}
    diagonal = {leaf: torch.full(shape, precision, dtype=dtype) for leaf, shape in shapes.items()}
    q = Gaussian(params, LowRankPrecision(diagonal, factors))
    x = randn(5, 3, seed=2).to(dtype)
    wide = fb.to(params, dtype=torch.float64)
    f = torch.cat([leaf.double().flatten(0, -2) for leaf in factors.values()])
    p = flat(diagonal).double()
    j = jacobian(fn, wide, wide, x.double())
    joint = j @ torch.linalg.inv(torch.diag(p) + f @ f.mT) @ j.mT
    found = predict_linearized(fn, None, q, x, joint=True)
    close(found.joint_covariance, joint, dtype)
    count = joint.shape[0] // 5
    blocks = torch.stack([joint[n : n + count, n : n + count] for n in range(0, len(joint), count)])
    for prediction in (found, predict_linearized(fn, None, q, x)):
        close(prediction.output_covariance, blocks, dtype)
        assert prediction.std.isfinite().all()
    normal = predict_linearized(fn, None, q, x, likelihood=Normal(0.1))
    assert normal.log_prob(found.output_mean).isfinite().all()


def regression(dtype, num_rows=4000):
    net = nn.Linear(3, 2)
    fn, params = fb.make_functional(net)
    params = {name: randn(*leaf.shape, seed=5).to(dtype) for name, leaf in params.items()}
    x = randn(num_rows, 3).to(dtype)
    y = (fn(params, x) + 0.01 * randn(num_rows, 2, seed=1)).to(dtype)
    return fn, params, x, y


@dtypes
@pytest.mark.parametrize("number", [1.0, 1e-3])
def test_a_process_of_many_data(number, dtype):
    fn, params, x, y = regression(dtype, 300)
    process = laplace.functional(fn, params, (x, y), Normal(0.01), prior_precision=number)
    new = x[:4]
    a = torch.cat([x, torch.ones(len(x), 1, dtype=dtype)], 1).double()
    s = torch.linalg.inv(a.mT @ a / 0.01**2 + number * torch.eye(4, dtype=torch.float64))
    expected = torch.einsum("ni,ij,nj,ab->nab", a[:4], s, a[:4], torch.eye(2).double())
    close(process.predict(new).output_covariance, expected, dtype)
    residual = y.double() - fn(fb.to(params, dtype=torch.float64), x.double())
    weights = torch.cat([leaf.double().flatten() for leaf in params.values()])
    k = a @ a.mT / number / 0.01**2 + torch.eye(len(a), dtype=torch.float64)
    evidence = -0.5 * (residual / 0.01).square().sum() - residual.numel() * math.log(
        0.01 * math.sqrt(2 * math.pi)
    )
    evidence = evidence - 0.5 * (2 * torch.logdet(k) + number * weights.square().sum())
    if dtype is torch.float32:
        assert_close(process.log_marginal_likelihood.double(), evidence, rtol=1e-4, atol=0)
    assert process.log_marginal_likelihood.dtype is torch.promote_types(dtype, torch.float32)


def test_a_process_without_a_prior_to_speak_of_is_refused():
    fn, params, x, y = regression(torch.float32, 20)
    with pytest.raises(RuntimeError, match=r"lost in rounding.* larger `prior_precision`.* float64"):
        laplace.functional(fn, params, (x, y), Normal(0.01), prior_precision=1e-20)


def test_a_process_shows_its_progress(capfd):
    fn, params, x, y = regression(torch.float32, 20)
    laplace.functional(fn, params, (x, y), Normal(0.1), progress=True)
    assert "laplace.functional" in capfd.readouterr().err


@dtypes
def test_a_grid_over_curvatures_of_full_rank(dtype):
    fn, params, x, y = regression(dtype)
    c = fb.curvature.ggn(fn, params, (x, y), Normal(0.01), "low_rank", rank=8, seed=0)
    grid = [1e-3, 1.0, 1e3]
    held = (x[:50], y[:50])
    found = laplace.minimize_validation_nll(fn, params, c, held, Normal(0.01), grid=grid)
    exact = {name: leaf.double() for name, leaf in params.items()}
    data = (x.double(), y.double())
    c = fb.curvature.ggn(fn, exact, data, Normal(0.01), "full")
    held = (x[:50].double(), y[:50].double())
    expected = laplace.minimize_validation_nll(fn, exact, c, held, Normal(0.01), grid=grid)
    assert found.nll.isfinite().all()
    if dtype is torch.float32:
        assert_close(found.nll.double(), expected.nll, rtol=1e-3, atol=1e-3)


def test_a_grid_over_a_curvature_of_low_rank_in_half_precision():
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    fn, params = fb.make_functional(net)
    x, y = randn(12, 3), torch.arange(12) % 3
    nll = {}
    for dtype in (torch.float64, torch.bfloat16):
        own, data = fb.to(params, dtype=dtype), (x.to(dtype), y)
        c = fb.curvature.ggn(fn, own, data, Categorical(), "low_rank", rank=3, seed=0)
        found = laplace.minimize_validation_nll(fn, own, c, data, Categorical(), grid=[0.1, 1.0, 10.0])
        nll[dtype] = found.nll.double()
    assert_close(nll[torch.bfloat16], nll[torch.float64], rtol=0.03, atol=0.03)


# Memory.


@pytest.mark.parametrize("joint", [False, True])
def test_convolutions_with_many_outputs_are_formed_part_by_part(joint, monkeypatch):
    outputs, channels = 40, 16
    fn, params = fb.make_functional(
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(channels, outputs),
        )
    )  # fmt: skip
    variance = {name: 0.1 + randn(*leaf.shape).square().float() for name, leaf in params.items()}
    q, x = Gaussian(params, fb.covariances.Diagonal(variance)), randn(3, channels, 5, 5).float()
    expected = predict_linearized(fn, None, q, x, joint=joint)
    for nbytes in (20_000 if joint else 1, 1 << 17):
        for module in (fb._jacobian._slices, fb._jacobian._gram):
            monkeypatch.setattr(module, "SLICE_BYTES", nbytes)
        with Largest() as largest:
            found = predict_linearized(fn, None, q, x, joint=joint)
        assert_close(found.output_covariance, expected.output_covariance, rtol=1e-4, atol=1e-5)
        assert not joint or torch.allclose(
            found.joint_covariance, expected.joint_covariance, rtol=1e-4, atol=1e-5
        )
        formed = 3 * outputs * channels * channels // 2 * 9
        assert largest.nbytes < 4 * formed / 2, largest.shape


def test_the_covariance_between_rows_needs_no_jacobian_of_linear_layers():
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 4)))
    variance = {name: 0.1 + randn(*leaf.shape).square().float() for name, leaf in params.items()}
    q, x = Gaussian(params, fb.covariances.Diagonal(variance)), randn(12, 64).float()
    with Largest() as largest:
        found = predict_linearized(fn, None, q, x, joint=True).joint_covariance
    assert largest.nbytes < 4 * (12 * 4 * 64 * 96) / 2, largest.shape
    wide = fb.to(params, dtype=torch.float64)
    j = jacobian(fn, wide, wide, x.double())
    expected = j * flat({name: variance[name] for name in sorted(variance)}).double() @ j.mT
    assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
