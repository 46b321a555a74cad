"""The linearised predictive in closed form: against Jacobians written out, integrals and draws."""

import collections
import math
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch
import zoo
from test_links import NAIVE
from torch import nn
from torch.distributions import MultivariateNormal
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from zoo import F64, LOOPED_MODELS, MODELS, covering, randn, randn_like, seeded, shifted, stacked

import funcbayes as fb
from funcbayes import Gaussian, Point, _output_covariance, _predict_linearized, laplace, predict_linearized
from funcbayes._jacobian import _blocks
from funcbayes._tree import map_named, merge, named_leaves, parameters_of, select
from funcbayes.covariances import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPrecision
from funcbayes.likelihoods import Bernoulli, Categorical, HeteroscedasticNormal, Normal, Poisson

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

NUM_ROWS = 4


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in parameters_of(tree).values()])


def unflat(vector, like):
    leaves = parameters_of(like)
    parts = dict(zip(leaves, vector.split([leaf.numel() for leaf in leaves.values()]), strict=True))
    return map_named(lambda name, leaf: parts[name].reshape(leaf.shape) if name in parts else leaf, like)


def jacobian(fn, params, covered, x):
    """Of all outputs in the leaves of ``covered``, ``(N F, P)``: backwards from one output after another."""
    at = merge(params, covered)

    def outputs(vector):
        return fn(merge(at, unflat(vector, covered)), x).reshape(-1)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jacobian(outputs, flat(covered))


def tabled(names, table):
    return pytest.mark.parametrize(names, table.values(), ids=table.keys())


# Every covariance.


def model_of(params):
    return zoo.Model(None, params, None, None, "")


def lacking(which):
    """A Kronecker covariance of whose bases every second is not there."""

    def make(params):
        whole = zoo.kronecker(model_of(params)).covariance
        order = list(named_leaves(params))

        def some(basis, first):
            return select(basis, lambda name, leaf: order.index(name) % 2 == first)

        outputs = {} if which == "all" else some(whole.output_basis, 0)
        inputs = {} if which == "all" else some(whole.input_basis, 1)
        return Kronecker(whole.variance, outputs, inputs)

    return make


def positive(params, seed=4):
    return optree.tree_map(lambda z: 0.1 + z**2, randn_like(params, seed))


COVARIANCES = {
    "diagonal": lambda params: Diagonal(positive(params)),
    "low_rank_plus_diagonal": lambda params: LowRankPlusDiagonal(positive(params), zoo.factors(params, 3)),
    "low_rank_plus_diagonal_wide": lambda params: LowRankPlusDiagonal(
        positive(params), zoo.factors(params, 14)
    ),
    "no_factors": lambda params: LowRankPlusDiagonal(
        positive(params), optree.tree_map(lambda leaf: leaf[..., :0], zoo.factors(params, 1))
    ),
    "low_rank_precision": lambda params: LowRankPrecision(positive(params), zoo.factors(params, 3, 2.0)),
    "no_precision": lambda params: LowRankPrecision(
        positive(params), optree.tree_map(lambda leaf: leaf[..., :0], zoo.factors(params, 1))
    ),
    "kronecker": lambda params: zoo.kronecker(model_of(params)).covariance,
    "kronecker_lacking_some": lacking("some"),
    "kronecker_lacking_all": lacking("all"),
    "dense": lambda params: Dense(zoo.factors(params, 20)),
    "dense_narrow": lambda params: Dense(zoo.factors(params, 2)),
}
every_covariance = tabled("make", COVARIANCES)
NAMES = (
    "linear", "nested", "mlp", "conv", "conv_grouped", "conv_1d", "residual", "norms", "attention",
    "own_attention", "keywords", "tied",
)  # fmt: skip


def expected_joint(model, q, x):
    j = jacobian(model.run, model.params, q.mean, x)
    return j @ q.covariance.to_dense() @ j.mT


def blocks_of(joint, num_rows=NUM_ROWS):
    """The blocks ``(N, F, F)`` of rows."""
    size = len(joint) // num_rows
    return torch.stack([joint[n * size : (n + 1) * size, n * size : (n + 1) * size] for n in range(num_rows)])


def assert_is(prediction, mean, joint, **tolerance):
    """Of a prediction with ``joint=True`` or without."""
    blocks = blocks_of(joint, len(mean))
    assert_close(prediction.output_mean, mean)
    assert_close(
        prediction.output_variance, blocks.diagonal(dim1=-2, dim2=-1).reshape(mean.shape), **tolerance
    )
    assert_close(prediction.output_covariance, blocks, **tolerance)


@every_covariance
@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_the_covariance_of_the_jacobian_around_that_of_the_parameters(name, make):
    model = MODELS[name]()
    x, q = model.inputs(NUM_ROWS), Gaussian(model.params, make(model.params))
    mean, joint = model.run(model.params, x), expected_joint(model, q, x)
    assert joint.abs().max() > 1e-3
    assert_is(predict_linearized(model.fn, model.params, q, x), mean, joint)
    found = predict_linearized(model.fn, None, q, x, joint=True)
    assert_is(found, mean, joint)
    assert_close(found.joint_covariance, joint)
    # Without a likelihood mean and variance are those of the outputs.
    assert_close(found.mean, mean)
    assert_close(found.variance, found.output_variance)
    assert_close(found.std, found.variance.sqrt())


@every_covariance
@pytest.mark.parametrize("name", ["nested", "mlp", "conv", "keywords"])
def test_leaves_that_are_not_covered_are_held(name, make):
    model = MODELS[name]()
    x = model.inputs(NUM_ROWS)
    for where in (lambda path: path.startswith(model.head), lambda path: not path.startswith(model.head)):
        covered = covering(shifted(model.params, randn_like(model.params, 3, 0.1)), where)
        q = Gaussian(covered, make(covered))
        mean, joint = model.run(zoo.overlaid(model.params, covered), x), expected_joint(model, q, x)
        found = predict_linearized(model.fn, model.params, q, x, joint=True)
        assert_is(found, mean, joint)
        assert_close(found.joint_covariance, joint)


SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (3,),
    "sequence": (2, 3),
    "image": (3, 2, 2),
}


def shaped(event):
    """A model with outputs ``(N, *event)``."""
    size = math.prod(event)

    def fn(params, x):
        h = torch.tanh(x @ params["body"])
        return nn.functional.linear(h, params["head"], params["bias"]).reshape(-1, *event)

    params = {"body": randn(3, 5), "head": randn(size, 5, seed=1), "bias": randn(size, seed=2)}
    return zoo.from_function(fn, params, zoo.rows(3), "head")


@every_covariance
@tabled("event", SHAPES)
def test_outputs_of_every_shape_have_their_covariance(event, make):
    model = shaped(event)
    x, q = model.inputs(NUM_ROWS), Gaussian(model.params, make(model.params))
    found = predict_linearized(model.fn, None, q, x, joint=True)
    joint = expected_joint(model, q, x)
    assert_is(found, model.fn(model.params, x), joint)
    assert found.output_covariance.shape == (NUM_ROWS, math.prod(event), math.prod(event))
    assert_is(predict_linearized(model.fn, None, q, x), model.fn(model.params, x), joint)


@every_covariance
@pytest.mark.parametrize("name", ["mlp", "conv", "keywords", "attention"])
def test_how_many_rows_are_gone_through_at_a_time_makes_no_difference(name, make, monkeypatch):
    model = MODELS[name]()
    x, q = model.inputs(7), Gaussian(model.params, make(model.params))
    whole = predict_linearized(model.fn, None, q, x)
    expected = whole.output_mean, whole.output_variance, whole.output_covariance
    seen = []
    original = _output_covariance.blocks

    def counting(*args, **options):
        for block in original(*args, **options):
            seen.append(block.outputs.shape[1])
            yield block

    monkeypatch.setattr(_output_covariance, "blocks", counting)
    monkeypatch.setattr(_output_covariance, "_PUSHED_BYTES", 1)
    for limit in (1, 20_000):
        monkeypatch.setattr(_blocks, "DEFAULT_BYTES", limit)
        found = predict_linearized(model.fn, None, q, x)
        assert_close((found.output_mean, found.output_variance, found.output_covariance), expected)
        assert limit > 1 or set(seen) == {1}
    seen.clear()
    joint = predict_linearized(model.fn, None, q, x, joint=True).joint_covariance
    assert seen == [7]  # all rows at once
    assert_close(joint, expected_joint(model, q, x))


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("name", LOOPED_MODELS)
def test_models_that_vmap_cannot_take_are_linearised_too(name):
    model = LOOPED_MODELS[name][1]()
    x, q = model.inputs(1), zoo.gaussian(model.params)
    found = predict_linearized(model.fn, None, q, x)
    assert_is(found, model.run(model.params, x), expected_joint(model, q, x))


def test_inputs_may_be_any_mapping():
    model = MODELS["keywords"]()
    x, q = model.inputs(NUM_ROWS), zoo.gaussian(model.params)
    found = predict_linearized(model.fn, None, q, collections.UserDict(x))
    assert_is(found, model.run(model.params, x), expected_joint(model, q, x))


@every_covariance
@pytest.mark.parametrize("joint", [True, False])
def test_no_rows_have_no_predictions(joint, make):
    model = MODELS["mlp"]()
    q = Gaussian(model.params, make(model.params))
    found = predict_linearized(model.fn, None, q, model.inputs(0), likelihood=Categorical(), joint=joint)
    assert found.output_mean.shape == found.output_variance.shape == found.mean.shape == (0, 2)
    assert found.output_covariance.shape == (0, 2, 2)
    assert found.log_prob(torch.zeros(0).long()).shape == (0,)
    assert not joint or found.joint_covariance.shape == (0, 0)
    assert not joint or found.sample(3, seed=0).shape == (3, 0, 2)


def test_an_infinite_derivative_is_refused():
    q = Gaussian({"w": torch.ones(2, 1)}, Diagonal({"w": torch.ones(2, 1)}))

    def fn(params, x):
        return (x @ params["w"]).sqrt()

    assert predict_linearized(fn, None, q, torch.ones(3, 2)).output_variance.isfinite().all()
    with pytest.raises(RuntimeError, match="`predict_linearized` is not finite, though the outputs are"):
        predict_linearized(fn, None, q, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))


def test_draws_under_another_link_are_those_of_a_seed():
    model = MODELS["mlp"]()
    q, x = zoo.gaussian(model.params), model.inputs(NUM_ROWS)
    options = {"likelihood": Categorical(), "num_samples": 20}
    seeded, drawn = (
        predict_linearized(model.fn, None, q, x, link="mc", seed=seed, **options).mean for seed in (3, 4)
    )
    assert not torch.allclose(seeded, drawn)
    plain = predict_linearized(model.fn, None, q, x, **options)
    assert_close(plain.under(Categorical(), "mc", seed=3).mean, seeded)
    assert_close(
        predict_linearized(model.fn, None, q, x, seed=3, **options).under(Categorical(), "mc").mean, seeded
    )
    assert not torch.allclose(*(plain.under(Categorical(), "mc").mean for _ in range(2)))


# Every posterior that is made of Gaussians.


def component_moments(model, params, posterior, x):
    """Mean and joint covariance of outputs, part by part."""
    parts = posterior.parts if isinstance(posterior, fb.Join) else (posterior,)
    center, joint = params, 0.0
    for part in parts:
        center = merge(center, part.mean if isinstance(part, Gaussian) else part.params)
    for part in parts:
        if isinstance(part, Gaussian):
            j = jacobian(model.run, center, part.mean, x)
            joint = joint + j @ part.covariance.to_dense() @ j.mT
    mean = model.run(center, x)
    return mean, joint if isinstance(joint, torch.Tensor) else torch.zeros(2 * (mean.numel(),), dtype=F64)


def rest_of(model):
    return zoo.all_but_head(model).mean


SINGLE = {
    "swag": zoo.collected,
    "tempered": lambda model: fb.temper(zoo.kronecker(model), 0.3),
    "restricted": lambda model: fb.restrict(zoo.low_rank(model), f"{model.head}*"),
    "restricted_dense": lambda model: fb.restrict(
        Gaussian(model.params, Dense(zoo.factors(model.params, 6))), f"{model.head}*"
    ),
    "linearized": lambda model: zoo.linearized(zoo.around(model, 1)),
    "head_and_point": lambda model: fb.join(zoo.head_only(model), Point(rest_of(zoo_shifted(model)))),
    "two_gaussians": lambda model: fb.join(
        zoo.linearized(zoo.head_only(model)),
        Gaussian(rest_of(model), zoo.all_but_head(zoo_shifted(model)).covariance),
    ),
    "point": lambda model: Point(zoo_shifted(model).params),
    "laplace": lambda model: fitted(model, "kron"),
}


def zoo_shifted(model):
    return model._replace(params=shifted(model.params, randn_like(model.params, 3, 0.2)))


def fitted(model, structure="kron", where=None, num_rows=5, **options):
    x = model.inputs(num_rows)
    y = torch.randint(2, (num_rows,), generator=seeded(1))
    return laplace.fit(
        model.fn, model.params, (x, y), Categorical(), structure=structure, where=where, **options
    )


@tabled("make", SINGLE)
@pytest.mark.parametrize("name", ["nested", "mlp", "conv"])
def test_posteriors_that_are_gaussian_are_pushed_through(name, make):
    model = MODELS[name]()
    posterior, x = make(model), model.inputs(NUM_ROWS)
    mean, joint = component_moments(model, model.params, posterior, x)
    found = predict_linearized(model.fn, model.params, posterior, x, joint=True)
    assert_is(found, mean, joint)
    assert_close(found.joint_covariance, joint)
    assert_is(predict_linearized(model.fn, model.params, posterior, x), mean, joint)
    assert_close(found.weights.sum(), torch.ones((), dtype=F64))


MIXTURES = {
    "weighted": lambda model: (
        fb.mixture(*(zoo.around(model, k) for k in (1, 2, 3)), weights=[0.2, 0.5, 0.3]),
        [(w, zoo.around(model, k)) for w, k in ((0.2, 1), (0.5, 2), (0.3, 3))],
    ),
    "equal": lambda model: (
        fb.mixture(zoo.low_rank(model), zoo.kronecker(zoo_shifted(model))),
        [(0.5, zoo.low_rank(model)), (0.5, zoo.kronecker(zoo_shifted(model)))],
    ),
    "stacked": lambda model: (
        fb.mixture(stacked(zoo.around(model, 1), zoo.around(model, 2)), stacked=True, weights=[1, 3]),
        [(0.25, zoo.around(model, 1)), (0.75, zoo.around(model, 2))],
    ),
    "nested": lambda model: (
        fb.mixture(
            fb.mixture(zoo.around(model, 1), zoo.around(model, 2)), zoo.kronecker(model), weights=[1, 3]
        ),
        [(0.125, zoo.around(model, 1)), (0.125, zoo.around(model, 2)), (0.75, zoo.kronecker(model))],
    ),
    "with_points": lambda model: (
        fb.mixture(Point(zoo_shifted(model).params), zoo.around(model, 1)),
        [(0.5, Point(zoo_shifted(model).params)), (0.5, zoo.around(model, 1))],
    ),
    "of_joins": lambda model: (
        fb.mixture(SINGLE["head_and_point"](model), SINGLE["two_gaussians"](model)),
        [(0.5, SINGLE["head_and_point"](model)), (0.5, SINGLE["two_gaussians"](model))],
    ),
    "ragged": lambda model: (
        fb.mixture(zoo.head_only(model), zoo.around(model, 1)),
        [(0.5, zoo.head_only(model)), (0.5, zoo.around(model, 1))],
    ),
}


@tabled("make", MIXTURES)
@pytest.mark.parametrize("name", ["nested", "mlp", "conv"])
def test_the_predictive_of_a_mixture_is_the_mixture_of_theirs(name, make):
    model = MODELS[name]()
    posterior, components = make(model)
    x = model.inputs(NUM_ROWS)
    moments = [(w, *component_moments(model, model.params, q, x)) for w, q in components]
    mean = sum(w * m for w, m, _ in moments)
    # The law of total covariance.
    joint = sum(w * (c + torch.outer((m - mean).reshape(-1), (m - mean).reshape(-1))) for w, m, c in moments)
    found = predict_linearized(model.fn, model.params, posterior, x, joint=True)
    assert_is(found, mean, joint)
    assert_close(found.joint_covariance, joint)
    assert_is(predict_linearized(model.fn, model.params, posterior, x), mean, joint)
    assert_close(sorted(found.weights.tolist()), sorted(w for w, _ in components))

    y = torch.arange(NUM_ROWS) % 2
    options = {"likelihood": Categorical()}
    found = predict_linearized(model.fn, model.params, posterior, x, **options)
    parts = [(w, predict_linearized(model.fn, model.params, q, x, **options)) for w, q in components]
    probs = sum(w * p.mean for w, p in parts)
    assert_close(found.mean, probs)
    assert_close(found.variance, probs * (1 - probs))
    assert_close(found.entropy, -(probs * probs.log()).sum(-1))
    assert_close(found.log_prob(y), probs.gather(1, y[:, None])[:, 0].log())

    noise = 0.4
    found = predict_linearized(model.fn, model.params, posterior, x, likelihood=Normal(noise))
    assert_close(found.mean, mean)
    blocks = blocks_of(joint)
    assert_close(found.epistemic_variance, blocks.diagonal(dim1=-2, dim2=-1))
    assert_close(found.aleatoric_variance, torch.full_like(mean, noise**2))
    assert_close(found.variance, found.epistemic_variance + noise**2)
    target = randn(*mean.shape, seed=3)
    densities = torch.stack(
        [
            math.log(w) + MultivariateNormal(m, blocks_of(c) + noise**2 * torch.eye(2)).log_prob(target)
            for w, m, c in moments
        ]
    )
    assert_close(found.log_prob(target), densities.logsumexp(0))


# Links.


def three():
    return zoo.from_module(
        lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)), zoo.rows(3), "2"
    )


LINKS = {"probit": "probit", "bridge": "laplace_bridge", "bridge_norm": "laplace_bridge_normalized"}


@every_covariance
@pytest.mark.parametrize("link", LINKS)
def test_links_are_the_formulas_of_their_papers(link, make):
    model = three()
    x, q = model.inputs(NUM_ROWS), Gaussian(model.params, make(model.params))
    found = predict_linearized(model.fn, None, q, x, likelihood=Categorical(), link=link)
    mean, blocks = model.run(model.params, x), blocks_of(expected_joint(model, q, x))
    probs = torch.tensor([NAIVE[LINKS[link]](m, c) for m, c in zip(mean, blocks, strict=True)], dtype=F64)
    assert_close(found.mean, probs)
    assert_close(found.variance, probs * (1 - probs))
    assert_close(found.entropy, -(probs * probs.log()).sum(-1))
    y = torch.arange(NUM_ROWS) % 3
    assert_close(found.log_prob(y), probs.gather(1, y[:, None])[:, 0].log())
    ignored = y.clone()
    ignored[1] = -100
    assert_close(found.log_prob(ignored), torch.where(ignored == -100, 0.0, found.log_prob(y)))
    again = predict_linearized(model.fn, None, q, x, likelihood=Categorical(), link=link, joint=True)
    assert_close(again.mean, probs)


@pytest.mark.parametrize("link", [*LINKS, "mc"])
@pytest.mark.parametrize(("event", "class_axis"), [((2, 3), -1), ((3, 2, 2), 1), ((3, 4), 1), ((2, 3, 2), 2)])
@pytest.mark.parametrize("is_later", [False, True])
def test_classes_of_each_position_have_the_covariance_of_that_position(
    event, class_axis, link, is_later, monkeypatch
):
    if is_later:  # as of many outputs: the covariance of positions is found when it is asked for
        monkeypatch.setattr(_predict_linearized, "_FEW", 0)
    model = shaped(event)
    x, q = model.inputs(NUM_ROWS), Gaussian(model.params, COVARIANCES["kronecker"](model.params))
    likelihood = Categorical(class_axis=class_axis)
    options = {"link": link, "num_samples": 50, "seed": 3}
    found = predict_linearized(model.fn, None, q, x, likelihood=likelihood, **options)
    whole = blocks_of(expected_joint(model, q, x)).reshape(NUM_ROWS, *event, *event)
    outputs, axis = model.fn(model.params, x), likelihood.output_axis(model.fn(model.params, x))
    places = [range(n) for i, n in enumerate(event) if i != axis - 1]
    expected = torch.full_like(outputs, math.nan)
    for n in range(NUM_ROWS):
        for place in np.ndindex(*map(len, places)):
            at = list(place)
            at.insert(axis - 1, slice(None))
            mean, covariance = outputs[(n, *at)], whole[(n, *at, *at)]
            if link == "mc":
                probs = fb._links.monte_carlo(mean[None], covariance[None], num_samples=50, seed=3)[0]
            else:
                probs = torch.tensor(NAIVE[LINKS[link]](mean, covariance), dtype=F64)
            expected[(n, *at)] = probs
    # One seed gives one set of normals a position, whatever is beside it.
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if link != "mc" else {"rtol": 1e-6, "atol": 1e-6}
    assert_close(found.mean, expected, **tolerance)
    assert_close(found.mean.sum(axis), torch.ones_like(found.mean.sum(axis)))
    y = torch.zeros_like(found.mean.select(axis, 0)).long()
    assert_close(found.log_prob(y), found.mean.select(axis, 0).log().flatten(1).sum(1))


def test_monte_carlo_over_logits_is_seeded():
    model = three()
    x, q = model.inputs(NUM_ROWS), zoo.gaussian(model.params)

    def found(**options):
        return predict_linearized(model.fn, None, q, x, likelihood=Categorical(), link="mc", **options).mean

    assert torch.equal(found(seed=1), found(seed=1))
    assert not torch.equal(found(seed=1), found(seed=2))
    assert not torch.equal(found(seed=1, num_samples=5), found(seed=1))
    torch.manual_seed(0)
    one, state = found(), torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(found(), one)
    torch.manual_seed(0)
    torch.randint(0, 2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    predict_linearized(model.fn, None, q, x, likelihood=Categorical())  # nothing is drawn
    assert torch.equal(torch.get_rng_state(), before)


# Other likelihoods, by integrals over the Gaussian outputs.

NODES, NODE_WEIGHTS = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(80))


def expectation(f, mean, variance):
    """``E f(z)`` for ``z ~ N(mean, variance)``, elementwise by Gauss-Hermite quadrature."""
    points = mean.unsqueeze(-1) + variance.sqrt().unsqueeze(-1) * NODES
    return (f(points) * NODE_WEIGHTS).sum(-1) / NODE_WEIGHTS.sum()


def gaussian_outputs(event=(2,)):
    model = shaped(event)
    variance = optree.tree_map(lambda z: 0.05 * z**2, randn_like(model.params, 4))
    x, q = model.inputs(NUM_ROWS), Gaussian(model.params, Diagonal(variance))
    mean = model.fn(model.params, x)
    blocks = blocks_of(expected_joint(model, q, x))
    return model, q, x, mean, blocks.diagonal(dim1=-2, dim2=-1).reshape(mean.shape), blocks


def test_counts_have_the_moments_of_a_poisson_with_a_random_rate():
    model, q, x, mean, variance, _ = gaussian_outputs()
    found = predict_linearized(model.fn, None, q, x, likelihood=Poisson())
    rate = expectation(torch.exp, mean, variance)
    assert_close(found.mean, rate)
    assert_close(found.epistemic_variance, expectation(lambda f: (2 * f).exp(), mean, variance) - rate**2)
    assert_close(found.aleatoric_variance, rate)
    assert_close(found.variance, found.epistemic_variance + rate)


@pytest.mark.parametrize("event", [(2,), (3, 4)])
def test_noise_that_is_predicted_has_the_mean_of_a_log_normal(event):
    model, q, x, mean, variance, _ = gaussian_outputs(event)
    found = predict_linearized(model.fn, None, q, x, likelihood=HeteroscedasticNormal())
    (location, log_noise), (spread, of_log) = mean.chunk(2, -1), variance.chunk(2, -1)
    assert_close(found.mean, location)
    assert_close(found.epistemic_variance, spread)
    assert_close(found.aleatoric_variance, expectation(torch.exp, log_noise, of_log))


@pytest.mark.parametrize("event", [(), (2,)])
def test_labels_have_the_probability_of_a_moderated_logit(event):
    model, q, x, mean, variance, _ = gaussian_outputs(event)
    y = (randn(*mean.shape, seed=5) > 0).double()
    found = predict_linearized(model.fn, None, q, x, likelihood=Bernoulli())
    p = torch.sigmoid(mean / (1 + math.pi / 8 * variance).sqrt())
    assert_close(found.mean, p)
    assert_close(found.variance, p * (1 - p))
    terms = torch.where(y == 1, p, 1 - p).log()
    assert_close(found.log_prob(y), terms.reshape(NUM_ROWS, -1).sum(1))
    exact = expectation(torch.sigmoid, mean, variance)
    assert (found.mean - exact).abs().max() < 0.02
    count = 20_000
    drawn = predict_linearized(
        model.fn, None, q, x, likelihood=Bernoulli(), link="mc", num_samples=count, seed=0
    )
    spread = (expectation(lambda f: torch.sigmoid(f) ** 2, mean, variance) - exact**2).sqrt()
    assert ((drawn.mean - exact).abs() < 5 * spread / count**0.5).all()
    assert (drawn.mean - exact).abs().max() > 1e-6


NOISES = {
    "number": 0.3,
    "tensor": torch.tensor(0.7, dtype=F64),
    "vector": torch.tensor([0.2, 1.5], dtype=F64),
}


@tabled("noise", NOISES)
@pytest.mark.parametrize("joint", [True, False])
def test_numbers_have_the_density_of_a_gaussian_with_the_noise_in_it(noise, joint):
    model, q, x, mean, variance, blocks = gaussian_outputs()
    likelihood = Normal(noise)
    squares = torch.as_tensor(noise, dtype=F64).expand(2).square()
    found = predict_linearized(model.fn, None, q, x, likelihood=likelihood, joint=joint)
    assert_close(found.mean, mean)
    assert_close(found.epistemic_variance, variance)
    assert_close(found.aleatoric_variance, squares.expand(mean.shape))
    assert_close(found.variance, variance + squares)
    y = randn(*mean.shape, seed=6)
    assert_close(found.log_prob(y), MultivariateNormal(mean, blocks + torch.diag(squares)).log_prob(y))
    assert_close(found.output_covariance, blocks)  # without noise
    single = y.float()
    assert found.log_prob(single).dtype is F64


@pytest.mark.parametrize("event", [(), (1,), (2, 3)])
def test_densities_of_outputs_of_any_shape_are_of_all_outputs_of_a_row(event):
    model, q, x, mean, _, blocks = gaussian_outputs(event)
    found = predict_linearized(model.fn, None, q, x, likelihood=Normal(0.3))
    y = randn(*mean.shape, seed=6)
    exact = MultivariateNormal(mean.reshape(NUM_ROWS, -1), blocks + 0.09 * torch.eye(blocks.shape[-1]))
    assert_close(found.log_prob(y), exact.log_prob(y.reshape(NUM_ROWS, -1)))
    assert found.variance.shape == mean.shape


# Conjugate regression.


def test_the_predictive_of_a_linear_model_is_that_of_conjugate_regression():
    fn, params = fb.make_functional(nn.Linear(3, 1).double())
    x, y, new = randn(9, 3), randn(9, 1, seed=1), randn(5, 3, seed=2)
    noise, number = 0.4, 1.7

    def augmented(x):
        return torch.cat([torch.ones(len(x), 1, dtype=F64), x], 1)

    design = augmented(x)
    precision = design.mT @ design / noise**2 + number * torch.eye(4)
    found = torch.linalg.solve(precision, design.mT @ y / noise**2)
    params = {"bias": found[0], "weight": found[1:].T}
    for structure in ("full", "low_rank"):
        q = laplace.fit(
            fn, params, (x, y), Normal(noise), structure=structure, prior_precision=number, seed=0
        )
        prediction = predict_linearized(fn, params, q, new, likelihood=Normal(noise), joint=True)
        # As a Gaussian process with the kernel of the prior, from the data alone.
        k = design @ design.mT / number + noise**2 * torch.eye(9)
        cross = augmented(new) @ design.mT / number
        mean = cross @ torch.linalg.solve(k, y)
        joint = augmented(new) @ augmented(new).mT / number - cross @ torch.linalg.solve(k, cross.mT)
        assert_close(prediction.mean, mean)
        assert_close(prediction.joint_covariance, joint)
        assert_close(prediction.variance, (joint.diagonal() + noise**2)[:, None])
        assert_close(prediction.output_variance, joint.diagonal()[:, None])
        target = randn(5, 1, seed=3)
        exact = torch.distributions.Normal(mean, (joint.diagonal() + noise**2).sqrt()[:, None])
        assert_close(prediction.log_prob(target), exact.log_prob(target)[:, 0])


class Adapted(nn.Module):
    """A layer with a low-rank update beside it (Hu et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.lora_a, self.lora_b = nn.Linear(4, 5), nn.Linear(4, 2, False), nn.Linear(2, 5, False)

    def forward(self, x):
        return self.base(x) + 0.5 * self.lora_b(self.lora_a(x))


@pytest.mark.parametrize("structure", ["diag", "kron", "low_rank", "full"])
def test_of_low_rank_updates_alone_the_covariance_is_that_of_their_jacobian(structure):
    net = nn.Sequential(Adapted(), nn.Tanh(), Adapted(), nn.Linear(5, 3)).double()
    net[2].base, net[2].lora_a = nn.Linear(5, 5).double(), nn.Linear(5, 2, False).double()
    fn, params = fb.make_functional(net)
    params = randn_like(params)
    data, x = (randn(20, 4), torch.arange(20) % 3), randn(6, 4)
    posterior = fb.laplace.fit(fn, params, data, Categorical(), structure=structure, where="*lora*")
    names = list(posterior.mean)
    assert names == [f"{i}.lora_{side}.weight" for i in (0, 2) for side in "ab"]
    jacobian = jacrev(lambda some: fn({**params, **some}, x))({name: params[name] for name in names})
    flat = torch.cat([jacobian[name].flatten(2) for name in names], 2)
    expected = flat @ posterior.covariance.to_dense() @ flat.mT
    prediction = fb.predict_linearized(fn, params, posterior, x)
    assert_close(prediction.output_covariance, expected)
    assert_close(prediction.output_mean, fn(params, x))


# Draws of functions.


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("covariance", ["kronecker", "dense_narrow"])
def test_drawn_functions_have_the_covariance_between_rows(name, covariance):
    count, model = 20_000, MODELS[name]()
    x, q = model.inputs(3), Gaussian(model.params, COVARIANCES[covariance](model.params))
    found = predict_linearized(model.fn, None, q, x, joint=True)
    joint = expected_joint(model, q, x)
    variance = joint.diagonal()
    off = (joint / torch.outer(variance, variance).sqrt())[:2, 2:]
    assert off.abs().min() < 0.9  # it would be 1 with noise that rows share
    draws = found.sample(count, seed=0)
    assert draws.shape == (count, *found.output_mean.shape)
    deviations = (draws - found.output_mean).reshape(count, -1)
    assert (deviations.mean(0).abs() < 5 * (variance / count).sqrt()).all()
    error = ((torch.outer(variance, variance) + joint**2) / count).sqrt()
    assert ((deviations.mT @ deviations / count - joint).abs() < 5 * error).all()


def test_rows_that_are_anticorrelated_are_drawn_so():
    def fn(params, x):
        return params["a"] + x * params["b"]

    q = Gaussian(
        {"a": randn(), "b": randn()}, Diagonal(optree.tree_map(torch.ones_like, {"a": randn(), "b": randn()}))
    )
    x = torch.tensor([1.0, -2.0], dtype=F64)
    found = predict_linearized(fn, None, q, x, joint=True)
    assert_close(found.joint_covariance, torch.tensor([[2.0, -1.0], [-1.0, 5.0]], dtype=F64))
    draws = found.sample(50_000, seed=1)
    correlation = torch.corrcoef(draws.T)[0, 1]
    expected = -1 / math.sqrt(10)
    assert abs(correlation - expected) < 5 * (1 - expected**2) / 50_000**0.5


def test_draws_are_a_function_of_the_seed_and_of_their_number():
    model = MODELS["mlp"]()
    found = predict_linearized(model.fn, None, zoo.kronecker(model), model.inputs(3), joint=True)
    draws = found.sample(5, seed=1)
    assert torch.equal(found.sample(5, seed=1), draws)
    assert_close(found.sample(3, seed=1), draws[:3])
    assert not torch.equal(found.sample(5, seed=2), draws)
    torch.manual_seed(0)
    one = found.sample(2)
    torch.manual_seed(0)
    assert torch.equal(found.sample(2), one)


def test_draws_of_a_mixture_are_of_its_components_by_their_weights():
    model = MODELS["mlp"]()
    far = shifted(model.params, {n: torch.full_like(leaf, 0.5) for n, leaf in model.params.items()})
    parts = [
        Gaussian(p, Diagonal(optree.tree_map(lambda t: torch.full_like(t, 1e-8), p)))
        for p in (model.params, far)
    ]
    x = model.inputs(3)
    found = predict_linearized(model.fn, None, fb.mixture(*parts, weights=[1, 3]), x, joint=True)
    draws = found.sample(400, seed=0)
    means = [model.run(p, x) for p in (model.params, far)]
    distance = torch.stack([(draws - m).flatten(1).norm(dim=1) for m in means], 1)
    assert (distance.min(1).values < 1e-2).all()
    assert (distance.argmin(1) == 0).sum() in range(98, 103)


# Against draws of the parameters.


def monte_carlo(model, q, x, count, **options):
    return fb.predict(model.fn, model.params, q, x, num_samples=count, seed=0, **options)


STRUCTURES = {
    "diag": {"structure": "diag"},
    "kron": {"structure": "kron"},
    "ekfac": {"structure": "kron", "eigenvalue_correction": True},
    "low_rank": {"structure": "low_rank", "rank": 5, "seed": 0},
    "full": {"structure": "full"},
}


@tabled("options", STRUCTURES)
@pytest.mark.parametrize("name", ["mlp", "conv", "keywords"])
@pytest.mark.parametrize("where", [None, "head"])
def test_it_is_what_predict_converges_to(where, name, options):
    count, model = 2000, MODELS[name]()
    q = fitted(model, where=where and f"{model.head}*", **options)
    x = model.inputs(NUM_ROWS)
    found = predict_linearized(model.fn, model.params, q, x)
    drawn = monte_carlo(model, q, x, count)
    variance = found.output_variance
    assert ((drawn.mean - found.output_mean).abs() < 5 * (variance / count).sqrt()).all()
    assert ((drawn.variance - variance).abs() < 5 * variance * (2 / count) ** 0.5).all()
    # Draws of the functions in closed form have the same covariance.
    flat_draws = drawn.samples.flatten(1)
    joint = predict_linearized(model.fn, model.params, q, x, joint=True).joint_covariance
    own = joint.diagonal()
    error = ((torch.outer(own, own) + joint**2) / count).sqrt()
    assert ((torch.cov(flat_draws.mT) - joint).abs() < 5 * error + 1e-12).all()


@pytest.mark.parametrize("name", ["mlp", "conv", "three"])
def test_probabilities_are_those_that_predict_converges_to(name):
    count, model = 4000, {**MODELS, "three": three}[name]()
    q, x = fitted(model), model.inputs(NUM_ROWS)
    found = predict_linearized(
        model.fn, model.params, q, x, likelihood=Categorical(), link="mc", num_samples=count, seed=1
    )
    drawn = monte_carlo(model, q, x, count, likelihood=Categorical())
    error = (2 * drawn.epistemic_variance / count).sqrt()
    assert ((drawn.mean - found.mean).abs() < 5 * error).all()
    assert (found.mean - model.run(model.params, x).softmax(-1)).abs().max() > 3 * error.max()
    y = torch.arange(NUM_ROWS) % 2
    assert_close(found.log_prob(y), drawn.log_prob(y), rtol=0.05, atol=0.02)


def test_the_network_itself_has_other_moments_than_its_linearisation():
    def fn(params, x):
        return (params["w"] * x).exp()

    x, y = torch.tensor([[0.5], [1.0]], dtype=F64), torch.tensor([[1.0], [1.5]], dtype=F64)
    params = {"w": torch.tensor(0.4, dtype=F64)}
    q = laplace.fit(fn, params, (x, y), Normal(1.0), structure="full", prior_precision=1.0)
    through = laplace.fit(fn, params, (x, y), Normal(1.0), structure="full", linearized=False)
    assert_close(through.covariance.to_dense(), q.covariance.to_dense())
    v = 1 / (1 + sum((float(a) * math.exp(0.4 * float(a))) ** 2 for a in x))
    assert_close(q.variance["w"], torch.tensor(v, dtype=F64))
    count, spread = 20_000, v * x**2
    mean = (0.4 * x).exp()
    # exp of a Gaussian is log-normal; its linearisation is Gaussian.
    expected = {
        False: (mean * (spread / 2).exp(), mean**2 * spread.exp() * spread.expm1()),
        True: (mean, mean**2 * spread),
    }
    for posterior in (q, through):
        drawn = fb.predict(fn, None, posterior, x, num_samples=count, seed=0)
        own, variance = expected[posterior.linearized]
        assert ((drawn.mean - own).abs() < 5 * (variance / count).sqrt()).all()
        other, _ = expected[not posterior.linearized]
        assert ((drawn.mean - other).abs() > 5 * (variance / count).sqrt()).all()
        assert_close(drawn.variance, variance, rtol=0.1, atol=0)
        # The closed form is of the linearised model for every Gaussian.
        found = predict_linearized(fn, None, posterior, x)
        assert_close((found.output_mean, found.output_variance), expected[True])


# Derivatives.


@every_covariance
def test_what_is_found_is_differentiable_in_the_covariance(make):
    model = three()
    x, covariance = model.inputs(NUM_ROWS), make(model.params)
    leaves, structure = optree.tree_flatten(covariance)
    j = jacobian(model.run, model.params, model.params, x)
    y, cotangent = torch.arange(NUM_ROWS) % 3, randn(NUM_ROWS, 3, 3, seed=8)

    def ours(*leaves, what):
        q = Gaussian(model.params, structure.unflatten(leaves))
        if what == "probs":
            return predict_linearized(model.fn, None, q, x, likelihood=Categorical()).log_prob(y).sum()
        if what == "variance":
            return (predict_linearized(model.fn, None, q, x).output_variance * cotangent[:, 0]).sum()
        if what == "covariance":
            return (predict_linearized(model.fn, None, q, x).output_covariance * cotangent).sum()
        return predict_linearized(model.fn, None, q, x, joint=True).joint_covariance.square().sum()

    def expected(*leaves, what):
        joint = j @ structure.unflatten(leaves).to_dense() @ j.mT
        blocks = blocks_of(joint)
        diagonal = blocks.diagonal(dim1=-2, dim2=-1)
        if what == "probs":
            f = model.run(model.params, x) / (1 + math.pi / 8 * diagonal).sqrt()
            return f.log_softmax(-1).gather(1, y[:, None]).sum()
        if what == "variance":
            return (diagonal * cotangent[:, 0]).sum()
        if what == "covariance":
            return (blocks * (cotangent + cotangent.mT) / 2).sum()
        return joint.square().sum()

    for what in ("variance", "covariance", "joint", "probs"):
        given = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        one = torch.autograd.grad(ours(*given, what=what), given, allow_unused=True, materialize_grads=True)
        two = torch.autograd.grad(
            expected(*given, what=what), given, allow_unused=True, materialize_grads=True
        )
        assert_close(one, two)


def test_nothing_has_a_graph_through_the_model():
    model = three()
    params = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), model.params)
    for make in COVARIANCES.values():
        q = Gaussian(params, make(model.params))
        found = predict_linearized(model.fn, params, q, model.inputs(2), joint=True)
        assert not found.output_mean.requires_grad
        assert not found.joint_covariance.requires_grad
        head = covering(model.params, lambda path: path.startswith("2"))
        found = predict_linearized(model.fn, params, Gaussian(head, make(head)), model.inputs(2))
        assert not found.output_mean.requires_grad
        assert not found.output_covariance.requires_grad
    assert all(leaf.grad is None for leaf in params.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@every_covariance
def test_it_works_in_every_gradient_mode(make, mode):
    model = three()
    q, x = Gaussian(model.params, make(model.params)), model.inputs(NUM_ROWS)
    with mode():
        found = predict_linearized(model.fn, None, q, x, joint=True).joint_covariance.clone()
        variance = predict_linearized(model.fn, None, q, x).output_variance.clone()
    assert_close(found, expected_joint(model, q, x))
    assert_close(variance, found.diagonal().reshape(NUM_ROWS, 3))


# Numbers and memory.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_covariance
def test_results_have_the_dtype_of_the_model(make, dtype):
    model = three()
    x, exact = model.inputs(NUM_ROWS), Gaussian(model.params, make(model.params))
    q = fb.to(exact, dtype=dtype)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    one = predict_linearized(model.fn, None, exact, x)
    two = predict_linearized(model.fn, None, q, x.to(dtype))
    joint = predict_linearized(model.fn, None, q, x.to(dtype), joint=True)
    for got in (two.output_variance, joint.output_variance):
        assert got.dtype is dtype
        scale = one.output_variance.max()
        assert_close(got.double() / scale, one.output_variance / scale, rtol=tolerance, atol=tolerance)
    assert two.output_mean.dtype is joint.joint_covariance.dtype is two.output_covariance.dtype is dtype
    for link in ("probit", "bridge", "mc"):
        probs = predict_linearized(
            model.fn, None, q, x.to(dtype), likelihood=Categorical(), link=link, seed=0
        )
        assert probs.mean.dtype is probs.entropy.dtype is dtype
        assert probs.log_prob(torch.arange(NUM_ROWS) % 3).dtype is dtype
    normal = predict_linearized(model.fn, None, q, x.to(dtype), likelihood=Normal(0.5))
    assert normal.variance.dtype is normal.log_prob(randn(NUM_ROWS, 3).to(dtype)).dtype is dtype
    assert joint.sample(2, seed=0).dtype is dtype


def segmenting(side):
    """Three classes at each pixel: one output has some 20 numbers a pixel in the layers."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    fn, params = fb.make_functional(net)
    params = randn_like(params)
    return fn, params, randn(2, 1, side, side), torch.arange(2 * side * side).reshape(2, side, side) % 3


@pytest.mark.parametrize("name", ["diag", "kron", "low_rank", "full"])
def test_variances_of_many_outputs_are_found_for_some_of_them_at_a_time(name):
    fn, params, x, y = segmenting(8)
    classes = Categorical(class_axis=1)
    q = laplace.fit(fn, params, (x, y), classes, structure=name, seed=0)
    whole = predict_linearized(fn, None, q, x, likelihood=classes, max_bytes=1 << 40)
    with zoo.Largest() as largest:
        found = predict_linearized(fn, None, q, x, likelihood=classes, max_bytes=100_000)
        probs = found.mean
    # All gradients of one row, formed or not, have 192 columns of 91 numbers at least.
    assert 0 < largest.nbytes <= 150_000, largest.shape
    assert_close(found.output_variance, whole.output_variance)
    assert_close(probs, whole.mean)
    assert_close(whole.output_variance.reshape(2, -1), whole.output_covariance.diagonal(0, 1, 2))


@pytest.mark.parametrize("name", ["diag", "kron", "low_rank", "full"])
def test_scores_do_not_depend_on_how_many_outputs_are_seen_at_a_time(name):
    fn, params, x, y = segmenting(4)
    classes = Categorical(class_axis=1)
    c = fb.curvature.ggn(fn, params, (x, y), classes, name)
    whole, some = (
        laplace.minimize_validation_nll(fn, params, c, (x, y), classes, grid=[0.1, 1.0, 10.0], max_bytes=n)
        for n in (1 << 40, 1)
    )
    assert_close(some.nll, whole.nll)


# Every pair of a structure, a link and an axis, in a Latin square.
@pytest.mark.parametrize(
    ("name", "link", "axis"),
    [
        (name, link, (1, 2, -1)[(i + j) % 3])
        for i, name in enumerate(("diag", "kron", "low_rank", "full"))
        for j, link in enumerate(("bridge", "bridge_norm", "mc"))
    ],
)
def test_links_of_positions_take_no_covariance_between_positions(name, link, axis):
    plain, params, x, y = segmenting(8)
    classes = Categorical(class_axis=axis)

    def fn(params, x):
        return plain(params, x).movedim(1, axis)

    q = laplace.fit(fn, params, (x, y), classes, structure=name, seed=0)
    options = {"likelihood": classes, "link": link, "num_samples": 3, "seed": 0}
    whole = predict_linearized(fn, None, q, x, joint=True, **options)
    with zoo.Largest() as largest:
        probs = predict_linearized(fn, None, q, x, max_bytes=100_000, **options).mean
    assert 0 < largest.nbytes <= 150_000, largest.shape  # the covariance of a row has 295 kB
    assert_close(probs, whole.mean)


def test_covariances_that_no_memory_holds_are_refused_before_any_work(monkeypatch):
    fn, params, x, _ = segmenting(8)
    q = Gaussian(params, Diagonal(positive(params)))
    large = torch.zeros(1, 1, 200, 200, dtype=F64)
    with pytest.raises(RuntimeError, match=r"115\.2 GB for 1 rows of 120,000 outputs\. .*max_bytes="):
        predict_linearized(fn, None, q, large, joint=True)
    monkeypatch.setattr(_predict_linearized, "_MOST_BYTES", 1000)
    found = predict_linearized(fn, None, q, x)
    with pytest.raises(RuntimeError, match=r"of the outputs of each row, .* 2 rows of 192 outputs"):
        found.output_covariance  # noqa: B018
    allowed = predict_linearized(fn, None, q, x, max_bytes=1 << 20).output_covariance
    assert_close(allowed.diagonal(0, 1, 2), found.output_variance.reshape(2, -1))


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_the_jacobian_of_a_layer_with_many_classes_is_not_formed(structure):
    classes, width, num_rows = 400, 64, 64
    fn, _ = fb.make_functional(nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, classes)))
    params = {"0.weight": randn(width, 5), "0.bias": randn(width, seed=1)}
    params |= {"2.weight": 0.1 * randn(classes, width, seed=2), "2.bias": randn(classes, seed=3)}
    params = fb.to(params, dtype=torch.float32)
    x = randn(num_rows, 5).float()
    head = {name: leaf for name, leaf in params.items() if name.startswith("2")}
    variance = fb.to(positive(head), dtype=torch.float32)
    if structure == "diag":
        covariance = Diagonal(variance)
    else:
        sides = {"2.weight": (classes, width), "2.bias": (classes, 1)}
        bases = [
            {name: torch.linalg.qr(randn(n[i], n[i], seed=i)).Q.float() for name, n in sides.items()}
            for i in (0, 1)
        ]
        covariance = Kronecker(variance, *bases)
    q = Gaussian(head, covariance)
    with zoo.Largest() as largest:
        found = predict_linearized(fn, params, q, x, likelihood=Categorical())
        probs = found.mean
    of_one_row = classes * classes * (width + 1)
    assert largest.nbytes <= 4 * of_one_row, largest.shape  # of the 64 Jacobians of all rows less than one
    assert probs.shape == (num_rows, classes)
    # By hand: the features squared, weighed with the variances in the basis.
    h = torch.cat([torch.tanh(nn.functional.linear(x, params["0.weight"], params["0.bias"]))], 1).double()
    dense = {name: leaf.double() for name, leaf in variance.items()}
    if structure == "diag":
        expected = h**2 @ dense["2.weight"].mT + dense["2.bias"]
    else:
        u, v = bases[0]["2.weight"].double(), bases[1]["2.weight"].double()
        weight = ((h @ v) ** 2 @ dense["2.weight"].mT) @ (u**2).mT
        expected = weight + (bases[0]["2.bias"].double() ** 2 @ dense["2.bias"])
    assert_close(found.output_variance.double(), expected, rtol=1e-4, atol=1e-4)


# Covariances that are found later.


def numbered(num_outputs=2):
    params = {"w": randn(3, num_outputs)}
    q = Gaussian(params, Diagonal({"w": 0.1 + randn(3, num_outputs, seed=1) ** 2}))
    return (lambda params, x: x @ params["w"]), params, q, randn(4, 3, seed=2)


@pytest.mark.parametrize("what", ["x", "params", "covariance"])
def test_small_covariances_are_of_the_tensors_as_they_were(what):
    fn, params, q, x = numbered()
    expected = predict_linearized(fn, None, q, x, joint=True).output_covariance
    found = predict_linearized(fn, None, q, x)
    {"x": x, "params": params["w"], "covariance": q.covariance.variance["w"]}[what].mul_(2)
    assert_close(found.output_covariance, expected)
    assert_close(found.output_variance, expected.diagonal(dim1=-2, dim2=-1))


@pytest.mark.parametrize("what", ["x", "params", "covariance"])
def test_large_covariances_of_tensors_that_have_changed_are_refused(what, monkeypatch):
    monkeypatch.setattr(fb._predict_linearized, "_COVARIANCE_BYTES", 0)
    fn, params, q, x = numbered()
    expected = predict_linearized(fn, None, q, x, joint=True).output_covariance
    found, asked = (predict_linearized(fn, None, q, x) for _ in range(2))
    assert_close(asked.output_covariance, expected)
    {"x": x, "params": params["w"], "covariance": q.covariance.variance["w"]}[what].mul_(2)
    assert_close(asked.output_covariance, expected)
    with pytest.raises(RuntimeError, match="`predict_linearized` was given has been changed in place"):
        _ = found.output_covariance


def test_large_covariances_are_found_in_inference_mode(monkeypatch):
    monkeypatch.setattr(fb._predict_linearized, "_COVARIANCE_BYTES", 0)
    with torch.inference_mode():
        fn, _, q, x = numbered()
        expected = predict_linearized(fn, None, q, x, joint=True).output_covariance
        assert_close(predict_linearized(fn, None, q, x).output_covariance, expected)


def test_rows_are_seen_so_many_at_a_time_as_bytes_are_given(monkeypatch):
    model, seen = MODELS["mlp"](), []
    x, q = model.inputs(5), zoo.gaussian(model.params)
    original = _output_covariance.blocks

    def counting(*args, **options):
        for block in original(*args, **options):
            seen.append(block.outputs.shape[1])
            yield block

    monkeypatch.setattr(_output_covariance, "blocks", counting)
    expected = predict_linearized(model.fn, None, q, x).output_covariance
    assert seen == [5]
    assert_close(predict_linearized(model.fn, None, q, x, max_bytes=1).output_covariance, expected)
    assert seen[1:] == [1] * 5
    seen.clear()
    y = torch.arange(5) % 2
    c = fb.curvature.ggn(model.fn, model.params, (x, y), Categorical(), "diag")
    laplace.minimize_validation_nll(model.fn, model.params, c, (x, y), Categorical(), max_bytes=1)
    process = laplace.functional(model.fn, model.params, (x, y), Categorical())
    process.predict(x, max_bytes=1)
    assert seen == [1] * 10
    for call in (
        lambda: predict_linearized(model.fn, None, q, x, max_bytes=0),
        lambda: process.predict(x, max_bytes=0),
    ):
        with pytest.raises(ValueError, match=r"max_bytes=\.\.\."):
            call()


# Bad input.


class Call(NamedTuple):
    match: str
    error: type[Exception] = ValueError
    posterior: Any = None
    options: Any = {}
    params: Any = None
    fn: Any = None


def in_join(model):
    return fb.join(fb.mixture(zoo.head_only(model), zoo.head_only(model)), Point(rest_of(model)))


CALLS = {
    "module": Call("make_functional", TypeError, fn=lambda model: nn.Linear(3, 2)),
    "no_posterior": Call("should be given a posterior, got dict", TypeError, lambda model: model.params),
    "ensemble": Call(
        "got a Ensemble, whose outputs are no Gaussian. Write `predict",
        TypeError,
        lambda model: fb.Ensemble(zoo.members(model.params)),
    ),
    "dropout": Call("got a Dropout, whose outputs are no", TypeError, lambda model: fb.Dropout()),
    "dropout_and_head": Call(
        "got a Dropout", TypeError, lambda model: fb.join(zoo.head_only(model), fb.Dropout())
    ),
    "mixture_with_an_ensemble": Call("got a Ensemble", TypeError, zoo.mixed),
    "mixture_in_a_join": Call("got a Mixture. Put mixtures outside of joins", TypeError, in_join),
    "link": Call(r"link=...\)` should be one of 'probit', .* got 'logit'", options={"link": "logit"}),
    "bridge_of_values": Call(
        r"link='bridge'\)` is for logits of classes; `Normal` has none",
        options={"link": "bridge", "likelihood": Normal(1.0)},
    ),
    "bridge_of_labels": Call(
        r"link='bridge'\)` is for logits of several classes; `Bernoulli` has one",
        options={"link": "bridge", "likelihood": Bernoulli()},
    ),
    "likelihood": Call("likelihood", TypeError, options={"likelihood": "normal"}),
    "num_samples": Call(r"num_samples=...\)` should be at least 1", options={"num_samples": 0}),
    "missing": Call("is in neither", posterior=zoo.head_only, params=lambda model: None),
    "not_there": Call(
        "covers '4.bias', which is not there. If it covers everything, pass `params=None`",
        params=lambda model: {n: leaf for n, leaf in model.params.items() if n != "4.bias"},
    ),
    "other_shape": Call(
        r"'4.bias' has shape \(2,\), and \(3,\) in `params`",
        params=lambda model: model.params | {"4.bias": torch.zeros(3, dtype=F64)},
    ),
}


@tabled("call", CALLS)
def test_what_cannot_be_linearised_is_refused(call):
    model = MODELS["nested" if call.posterior is zoo.head_only else "mlp"]()
    posterior = (call.posterior or (lambda model: zoo.gaussian(model.params)))(model)
    params = model.params if call.params is None else call.params(model)
    fn = model.fn if call.fn is None else call.fn(model)
    with pytest.raises(call.error, match=call.match) as caught:
        predict_linearized(fn, params, posterior, model.inputs(3), **call.options)
    assert "predict_linearized" in str(caught.value)


def test_outputs_that_the_likelihood_cannot_mean_are_refused():
    model = shaped((3,))
    with pytest.raises(ValueError, match="means and then log variances on the last axis"):
        predict_linearized(
            model.fn, None, zoo.gaussian(model.params), model.inputs(2), likelihood=HeteroscedasticNormal()
        )


def test_a_leaf_that_is_nowhere_is_named():
    model = MODELS["mlp"]()
    with pytest.raises(ValueError, match="needs the parameter '0.bias'"):
        predict_linearized(model.fn, None, zoo.head_only(model), model.inputs(3))


def test_a_model_whose_rows_depend_on_each_other_is_refused():
    def fn(params, x):
        f = x @ params["w"]
        return f - f.mean(0)

    q = Gaussian({"w": randn(3, 2)}, Diagonal({"w": torch.ones(3, 2, dtype=F64)}))
    with pytest.raises(ValueError, match="rows"):
        predict_linearized(fn, None, q, randn(4, 3))


def prediction(likelihood=None, **options):
    model = MODELS["mlp"]()
    q = zoo.gaussian(model.params)
    return predict_linearized(model.fn, None, q, model.inputs(3), likelihood=likelihood, **options)


ASKED = {
    "joint": (lambda: prediction().joint_covariance, RuntimeError, r"`joint_covariance` needs .*joint=True"),
    "sample": (lambda: prediction().sample(2), RuntimeError, r"`sample` needs .*joint=True"),
    "num_samples": (lambda: prediction(joint=True).sample(0), ValueError, "should be at least 1"),
    "log_prob": (lambda: prediction().log_prob(randn(3, 2)), ValueError, "`log_prob` needs a likelihood"),
    "entropy": (lambda: prediction().entropy, ValueError, "`entropy` needs a likelihood"),
    "aleatoric": (lambda: prediction().aleatoric_variance, ValueError, "`aleatoric_variance` needs a likel"),
    "entropy_of_numbers": (lambda: prediction(Normal(1.0)).entropy, NotImplementedError, "given for classes"),
    "epistemic_of_classes": (
        lambda: prediction(Categorical()).epistemic_variance,
        NotImplementedError,
        "not given by the link 'probit'",
    ),
    "aleatoric_of_classes": (
        lambda: prediction(Categorical()).aleatoric_variance,
        NotImplementedError,
        "not given by the link 'probit'",
    ),
    "density_of_counts": (
        lambda: prediction(Poisson()).log_prob(torch.ones(3, 2)),
        NotImplementedError,
        "no closed form for Poisson",
    ),
    "density_of_noisy": (
        lambda: prediction(HeteroscedasticNormal()).log_prob(torch.ones(3, 1)),
        NotImplementedError,
        "no closed form",
    ),
    "targets_of_another_shape": (
        lambda: prediction(Normal(1.0)).log_prob(torch.ones(3)),
        ValueError,
        r"log_prob\(y\)",
    ),
    "labels_out_of_range": (
        lambda: prediction(Categorical()).log_prob(torch.tensor([0, 1, 2])),
        ValueError,
        r"log_prob\(y\)",
    ),
}


@tabled(("ask", "error", "match"), ASKED)
def test_what_a_prediction_has_not_is_refused_with_what_to_write(ask, error, match):
    with pytest.raises(error, match=match):
        ask()


def test_a_prediction_shows_what_it_is():
    shown = repr(prediction(Categorical()))
    assert shown == f"LinearizedPrediction(output_mean=(3, 2), likelihood={Categorical()!r}, link='probit')"
    assert prediction().num_rows == 3
