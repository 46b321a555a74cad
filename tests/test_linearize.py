"""First-order Taylor models."""

import dataclasses
import pickle

import optree
import pytest
import torch
import zoo
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close
from zoo import (
    LOOPED_MODELS,
    MODELS,
    SLOW_MODELS,
    gaussian,
    linear,
    linear_params,
    randn,
    randn_like,
    shifted,
)

import funcbayes as fb

ALL = MODELS | {name: make for name, (_, make) in LOOPED_MODELS.items()}


def expansion(model, params, x):
    """``f(theta) + J (params - theta)`` by two backward passes through the module itself."""
    return zoo.expanded(model.run, params, [model.params], x)


@pytest.mark.parametrize("name", ALL)
def test_a_linearized_model_is_the_first_order_expansion(name):
    model = ALL[name]()
    x, params = model.inputs(4), shifted(model.params, randn_like(model.params, 1, 0.3))
    fn_lin = fb.linearize(model.fn, model.params)
    assert_close(fn_lin(params, x), expansion(model, params, x))
    assert_close(fn_lin(model.params, x), model.run(model.params, x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("of_model", [lambda m: gaussian(m.params), zoo.head_only, zoo.all_but_head])
def test_draws_are_evaluated_at_once_by_a_linearized_model(name, of_model):
    model = MODELS[name]()
    posterior, x = of_model(model), model.inputs(3)
    fn_lin = fb.linearize(model.fn, model.params)
    got = fb.predict(fn_lin, model.params, posterior, x, num_samples=5, seed=2).samples
    draws = posterior.sample(5, seed=2)
    for i in range(5):
        params = zoo.overlaid(model.params, zoo.entry(draws, i))
        assert_close(got[i], expansion(model, params, x))


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_a_linearized_model_is_its_own_linearization(name):
    model = (MODELS | SLOW_MODELS)[name]()
    x, params = model.inputs(4), shifted(model.params, randn_like(model.params, 1, 0.3))
    once = fb.linearize(model.fn, model.params)
    assert_close(fb.linearize(once, model.params)(params, x), once(params, x))
    posterior = dataclasses.replace(gaussian(model.params), linearized=True)
    got, expected = (
        fb.predict(fn, model.params, posterior, x, num_samples=3, seed=0) for fn in (once, model.fn)
    )
    assert_close(got.samples, expected.samples)


def test_a_model_that_is_linear_in_its_parameters_is_its_own_linearization():
    params, x = {"w": randn(2, 3), "b": randn(2, seed=1)}, randn(5, 3)

    def fn(params, x):
        return x @ params["w"].T + params["b"]

    at = randn_like(params, 3)
    assert_close(fb.linearize(fn, params)(at, x), fn(at, x))


def test_a_linearized_model_has_the_gradient_of_the_model_and_no_other():
    params, x = linear_params(), randn(5, 3)
    fn_lin = fb.linearize(linear, params)
    expected = grad(lambda p: linear(p, x).sin().sum())(params)
    got = grad(lambda p: fn_lin(p, x).sin().sum())(params)
    optree.tree_map(assert_close, got, expected)
    jacobian = grad(lambda p: fn_lin(p, x).sum())
    far = jacobian(shifted(params, randn_like(params, 4)))
    optree.tree_map(assert_close, far, jacobian(params))


def test_the_error_of_the_expansion_is_of_second_order():
    model = MODELS["mlp"]()
    x, direction = model.inputs(3), randn_like(model.params, 1, 0.1)
    fn_lin = fb.linearize(model.fn, model.params)

    def error(step):
        at = optree.tree_map(lambda p, d: p + step * d, model.params, direction)
        return (fn_lin(at, x) - model.fn(at, x)).norm()

    assert 3.5 < error(0.02) / error(0.01) < 4.5


def test_what_is_fixed_is_taken_from_the_parameters_given_and_not_expanded_in():
    model = MODELS["conv"]()
    statistics = {k: fb.Fixed(b.abs() + 0.5) for k, b in model.buffers.items()}
    fn_lin = fb.linearize(model.fn, model.params)
    at = shifted(model.params, randn_like(model.params, 1, 0.3))
    with_statistics = fb.linearize(model.fn, {**model.params, **statistics})
    x = model.inputs(3)
    assert_close(fn_lin({**at, **statistics}, x), with_statistics(at, x))
    assert not torch.allclose(fn_lin(at, x), with_statistics(at, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linearized_model_is_evaluated_in_the_dtype_that_is_asked_for(dtype):
    model = MODELS["mlp"]()
    fn_lin, x = fb.linearize(model.fn, model.params), model.inputs(3)
    for posterior in (gaussian(model.params), zoo.head_only(model)):
        options = {"num_samples": 4, "seed": 0}
        got = fb.predict(fn_lin, model.params, posterior, x, dtype=dtype, **options).samples
        assert got.dtype == dtype
        expected = fb.predict(fn_lin, model.params, posterior, x, **options).samples
        assert_close(got.double(), expected, rtol=0.1, atol=0.1)


def test_models_expanded_at_many_points_are_those_expanded_at_each():
    points, x = zoo.members(linear_params(), 3), randn(5, 3)
    at = randn_like(linear_params(), 8)
    got = vmap(lambda point: fb.linearize(linear, point)(at, x))(points)
    for k in range(3):
        assert_close(got[k], fb.linearize(linear, zoo.entry(points, k))(at, x))


def test_a_linearized_model_can_be_pickled_and_shows_what_it_is_of():
    params = linear_params()
    fn_lin = pickle.loads(pickle.dumps(fb.linearize(linear, params)))
    at, x = randn_like(params, 2), randn(4, 3)
    assert torch.equal(fn_lin(at, x), fb.linearize(linear, params)(at, x))
    assert "linearized" in repr(fn_lin)


ERRORS = {
    "module": (lambda: fb.linearize(torch.nn.Linear(2, 2), {}), TypeError, "make_functional"),
    "no_parameters": (lambda: fb.linearize(linear, {}), ValueError, "at least one parameter, got none"),
    "missing_leaf": (
        lambda: fb.linearize(linear, linear_params())({"w": randn(2, 3), "b": randn(2)}, randn(4, 3)),
        ValueError,
        r"`fn_lin\(params, x\)`.*'gain' is missing",
    ),
    "other_shape": (
        lambda: fb.linearize(linear, linear_params())({**linear_params(), "b": randn(3)}, randn(4, 3)),
        ValueError,
        r"'b' has shape \(3,\), not \(2,\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_linearize_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("padding", [None, 1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of `jacrev`
def test_bags_are_linearized(mode, padding):
    module = nn.Sequential(nn.EmbeddingBag(9, 4, mode=mode, padding_idx=padding), nn.Linear(4, 3)).double()
    fn, params = fb.make_functional(module)
    x, step = torch.randint(0, 9, (6, 5)), {name: torch.randn_like(leaf) for name, leaf in params.items()}
    jacobian = torch.func.jacrev(lambda p: fn(p, x))(params)  # torch has no other of its own
    expected = fn(params, x) + sum(
        torch.tensordot(jacobian[name], leaf, leaf.ndim) for name, leaf in step.items()
    )
    moved = {name: leaf + step[name] for name, leaf in params.items()}
    torch.testing.assert_close(fb.linearize(fn, params)(moved, x), expected)


class Ragged(nn.Module):
    """Bags that are told by where they begin, as those of different sizes are."""

    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, mode="sum"), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.bag(x.flatten(), torch.arange(0, x.numel(), x.shape[1])))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_what_to_do_without_derivatives_forwards_is_said():
    fn, params = fb.make_functional(Ragged())
    x, y = torch.randint(0, 9, (6, 3)), torch.arange(6) % 3
    q = fb.laplace.fit(fn, params, (x, y), fb.likelihoods.Categorical())
    fb.predict_linearized(fn, params, q, x)
    with pytest.raises(NotImplementedError, match=r"`funcbayes.predict_linearized`, .*`linearized=False`"):
        fb.predict(fn, params, q, x, num_samples=3, seed=0)
    with pytest.raises(NotImplementedError, match=r"'diag', 'kron' or 'full' do without"):
        fb.curvature.ggn(fn, params, (x, y), fb.likelihoods.Categorical(), "low_rank")
