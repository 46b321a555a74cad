"""The Laplace approximation over functions equals that over parameters with the whole GGN."""

import pytest
import torch
import zoo
from torch import nn
from torch.testing import assert_close
from zoo import F64, randn, seeded

import funcbayes as fb
from funcbayes._jacobian import _blocks
from funcbayes.likelihoods import Bernoulli, Categorical, Normal, Poisson

NAMES = [
    "linear",
    "nested",
    "mlp",
    "conv",
    "conv_grouped",
    "residual",
    "norms",
    "transformer",
    "keywords",
    "tied",
]
by_model = pytest.mark.parametrize("name", NAMES)


def classes(model, num_rows):
    x = model.inputs(num_rows)
    outputs = model.run(model.params, x)
    return x, torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=seeded(1))


def over_parameters(model, data, likelihood, x, **options):
    posterior = fb.laplace.fit(model.fn, model.params, data, likelihood, structure="full", **options)
    return fb.predict_linearized(model.fn, model.params, posterior, x, joint=True)


@by_model
@pytest.mark.parametrize("max_bytes", [None, 1])
def test_both_forms_have_the_same_covariance_between_all_outputs(name, max_bytes):
    model = zoo.MODELS[name]()
    data, x = classes(model, 6), model.inputs(4)
    process = fb.laplace.functional(
        *(model.fn, model.params, data, Categorical()), prior_precision=0.7, max_bytes=max_bytes
    )
    expected = over_parameters(model, data, Categorical(), x, prior_precision=0.7)
    got = process.predict(x, joint=True)
    assert_close(got.output_mean, expected.output_mean)
    assert_close(got.joint_covariance, expected.joint_covariance)
    assert_close(process.predict(x).output_variance, expected.output_variance)
    assert_close(process.predict(x).output_covariance, expected.output_covariance)


@by_model
def test_both_forms_have_the_same_evidence(name):
    model = zoo.MODELS[name]()
    data = classes(model, 6)
    c = fb.curvature.ggn(model.fn, model.params, data, Categorical(), "full")
    expected = fb.laplace.log_marginal_likelihood(model.params, c, 0.7, prior_mean=0.2, temperature=0.5)
    process = fb.laplace.functional(
        *(model.fn, model.params, data, Categorical()), prior_precision=0.7, prior_mean=0.2, temperature=0.5
    )
    assert_close(process.log_marginal_likelihood, expected)
    assert process.num_data == 6


@pytest.mark.parametrize(
    ("likelihood", "y"),
    [
        (Normal(0.3), randn(7, 2, seed=3)),
        (Normal(torch.tensor([0.3, 2.0], dtype=F64)), randn(7, 2, seed=3)),
        (Bernoulli(), (randn(7, 2, seed=3) > 0).to(F64)),
        (Poisson(), torch.tensor([[0, 1], [3, 2], [1, 0], [4, 1], [0, 0], [2, 2], [1, 5]]).to(F64)),
    ],
    ids=["normal", "vector noise", "bernoulli", "poisson"],
)
def test_any_likelihood_and_a_prior_for_each_parameter(likelihood, y):
    model = zoo.MODELS["mlp"]()
    prior = {name: 0.5 + randn(*leaf.shape, seed=4).square() for name, leaf in model.params.items()}
    data, x = (model.inputs(7), y), model.inputs(3)
    process = fb.laplace.functional(*(model.fn, model.params, data, likelihood), prior_precision=prior)
    expected = over_parameters(model, data, likelihood, x, prior_precision=prior)
    assert_close(process.predict(x, joint=True).joint_covariance, expected.joint_covariance)


def test_noise_and_temperature_are_those_of_the_posterior():
    model = zoo.MODELS["mlp"]()
    data, x = (model.inputs(7), randn(7, 2, seed=3)), model.inputs(3)
    options = {"noise_std": 0.4, "temperature": 2.0, "prior_precision": 0.3}
    process = fb.laplace.functional(*(model.fn, model.params, data, Normal(1.0)), **options)
    expected = over_parameters(model, data, Normal(1.0), x, **options)
    assert_close(process.predict(x, joint=True).joint_covariance, expected.joint_covariance)


def test_a_linear_model_gives_the_predictive_of_a_gaussian_process():
    """Rasmussen & Williams (2006), eq. 2.24, with the kernel ``x^T x' / prior precision``."""
    fn, params = fb.make_functional(nn.Linear(3, 1, bias=False).double())
    x, y, new = randn(8, 3), randn(8, 1, seed=1), randn(4, 3, seed=2)
    process = fb.laplace.functional(fn, params, (x, y), Normal(0.5), prior_precision=2.0)
    noisy = x @ x.T / 2 + 0.25 * torch.eye(8, dtype=F64)
    cross = new @ x.T / 2
    expected = new @ new.T / 2 - cross @ torch.linalg.solve(noisy, cross.T)
    assert_close(process.predict(new, joint=True).joint_covariance, expected)


def test_predictions_take_likelihoods_and_links():
    model = zoo.MODELS["mlp"]()
    data, x = classes(model, 6), model.inputs(4)
    process = fb.laplace.functional(model.fn, model.params, data, Categorical())
    posterior = fb.laplace.fit(model.fn, model.params, data, Categorical(), structure="full")
    for link in ("probit", "bridge", "bridge_norm"):
        expected = fb.predict_linearized(
            model.fn, model.params, posterior, x, likelihood=Categorical(), link=link
        )
        assert_close(process.predict(x, likelihood=Categorical(), link=link).mean, expected.mean)


def test_a_subset_of_the_rows_is_what_these_rows_say():
    model = zoo.MODELS["mlp"]()
    x, y = classes(model, 20)
    process = fb.laplace.functional(model.fn, model.params, (x, y), Categorical(), num_points=5, seed=3)
    assert process.num_data == 5
    assert process.predict(x[:2]).output_variance.shape == (2, 2)
    again = fb.laplace.functional(model.fn, model.params, (x, y), Categorical(), num_points=5, seed=3)
    assert_close(process.log_marginal_likelihood, again.log_marginal_likelihood)
    whole = fb.laplace.functional(model.fn, model.params, (x, y), Categorical(), num_points=20, seed=3)
    expected = fb.laplace.functional(model.fn, model.params, (x, y), Categorical())
    assert_close(whole.log_marginal_likelihood, expected.log_marginal_likelihood)


def test_where_chooses_leaves():
    model = zoo.MODELS["mlp"]()
    data, x = classes(model, 6), model.inputs(4)
    process = fb.laplace.functional(model.fn, model.params, data, Categorical(), where="4.*")
    expected = over_parameters(model, data, Categorical(), x, where="4.*")
    assert_close(process.predict(x, joint=True).joint_covariance, expected.joint_covariance)


def test_rows_are_seen_in_blocks(monkeypatch):
    model = zoo.MODELS["conv"]()
    data, x = classes(model, 6), model.inputs(5)
    process = fb.laplace.functional(model.fn, model.params, data, Categorical())
    expected = process.predict(x).output_covariance
    monkeypatch.setattr(_blocks, "DEFAULT_BYTES", 1)
    assert_close(process.predict(x).output_covariance, expected)


REFUSED = {
    "num_points too large": ({"num_points": 7}, ValueError, r"num_points=\.\.\..* from 1 to 6, got 7"),
    "num_points zero": ({"num_points": 0}, ValueError, r"num_points=\.\.\..* from 1 to 6, got 0"),
    "prior zero": ({"prior_precision": 0.0}, ValueError, r"prior_precision=\.\.\..* positive"),
    "temperature": ({"temperature": -1.0}, ValueError, r"temperature=\.\.\..* positive and finite, got -1"),
    "noise of classes": ({"noise_std": 2.0}, ValueError, r"functional\(noise_std=\.\.\.\)` goes with a"),
    "where": ({"where": "no.*"}, ValueError, "at least one parameter"),
}


@pytest.mark.parametrize(("options", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_functional_refuses(options, error, message):
    model = zoo.MODELS["mlp"]()
    with pytest.raises(error, match=message):
        fb.laplace.functional(model.fn, model.params, classes(model, 6), Categorical(), **options)


def test_gradients_that_are_not_finite_are_refused_with_their_batch():
    def fn(params, x):
        return nn.functional.linear(x, params["w"]).abs().sqrt()  # of slope infinity at 0

    params, x, y = {"w": randn(2, 2)}, randn(3, 2), torch.zeros(3, 2, dtype=F64)
    batches = [(x, y), (0 * x, y)]
    with pytest.raises(RuntimeError, match=r"gradients in `laplace.functional` are not finite in batch 1"):
        fb.laplace.functional(fn, params, batches, Normal(1.0))
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"`laplace.functional\(data=...\), batch 1` should"):
        fb.laplace.functional(fn, params, [(x, labels), (x, labels + 7)], Categorical())


def test_a_subset_of_a_loader_is_refused():
    model = zoo.MODELS["mlp"]()
    with pytest.raises(ValueError, match=r"num_points=\.\.\..*data in tensors"):
        fb.laplace.functional(
            *(model.fn, model.params, [classes(model, 6)], Categorical()), num_points=3, seed=0
        )
