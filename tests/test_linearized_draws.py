"""Draws of the linearised model: `Gaussian(mean, covariance, linearized=True)`."""

import dataclasses
import math
import pickle
import warnings

import optree
import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch.func import jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from zoo import (
    F64,
    MODELS,
    around,
    covering,
    entry,
    gaussian,
    linear,
    linear_params,
    linearized,
    members,
    numbered_draws,
    randn,
    randn_like,
    shifted,
    stacked,
)

import funcbayes as fb
from funcbayes import Dropout, Ensemble, Fixed, Gaussian, Point
from funcbayes._linearize import Linearization
from funcbayes._tree import is_repeated, named_leaves, parameters_of
from funcbayes.covariances import Diagonal
from funcbayes.likelihoods import Categorical

S = 6


def mlp():
    return MODELS["mlp"]()


def in_head(path, leaf=None):
    return path.startswith("4.")


def in_body(path, leaf=None):
    return not in_head(path)


def samples(model, posterior, x, seed=0, num_samples=S, **options):
    return fb.predict(
        model.fn, model.params, posterior, x, num_samples=num_samples, seed=seed, **options
    ).samples


def by_jacobian(model, center, draws, x):
    """``f + J (theta - center)`` with the Jacobian written out, for dicts that cover everything."""
    with sdpa_kernel(SDPBackend.MATH):  # gradients of the fused kernel cannot be mapped over
        f, jacobian = model.run(center, x), jacrev(model.run)(center, x)
    return torch.stack(
        [
            f + sum(torch.tensordot(jacobian[k], draws[k][i] - center[k], center[k].ndim) for k in center)
            for i in range(len(next(iter(draws.values()))))
        ]
    )


def centers(posterior, seed=0):
    """Of draw 0, one for each linearisation."""
    draw = numbered_draws(posterior, 1, seed)[0]
    return [effect.center for effect in draw.effects if isinstance(effect, Linearization)]


# What a draw is evaluated as. (Every model and posterior of the zoo is gone through in `test_predict`.)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("name", ["mlp", "conv", "residual", "norms", "own_attention", "transformer"])
def test_a_draw_is_the_value_at_the_mean_and_the_jacobian_times_the_deviation(name, chunk_size):
    model = MODELS[name]()
    posterior, x = around(model, 1), model.inputs(3)
    expected = by_jacobian(model, posterior.mean, posterior.sample(S, seed=2), x)
    assert_close(samples(model, linearized(posterior), x, seed=2, chunk_size=chunk_size), expected)


def test_leaves_are_drawn_as_without_linearisation():
    posterior = around(mlp(), 1)
    flag = linearized(posterior)
    optree.tree_map(
        lambda a, b: assert_close(a, b, rtol=0, atol=0), flag.sample(9, 1), posterior.sample(9, 1)
    )
    at = shifted(posterior.mean, randn_like(posterior.mean, 3, 0.1))
    assert torch.equal(flag.log_prob(at), posterior.log_prob(at))
    assert torch.equal(flag.entropy(), posterior.entropy())
    assert torch.equal(fb.kl(flag, around(mlp(), 2)), fb.kl(posterior, around(mlp(), 2)))
    assert torch.equal(fb.kl(around(mlp(), 2), flag), fb.kl(around(mlp(), 2), posterior))


@pytest.mark.parametrize("where", ["*", "w", "b"])
def test_a_model_linear_in_what_is_covered_is_its_own_linearisation(where):
    def affine(params, x):
        return x @ params["w"].T + params["b"]

    model = zoo.from_function(affine, {"w": randn(2, 3), "b": randn(2, seed=1)}, None, "b")
    posterior, x = fb.restrict(around(model, 1), where), randn(5, 3)
    assert_close(samples(model, linearized(posterior), x), samples(model, posterior, x))


def test_a_network_is_not_linear():
    model = mlp()
    x = model.inputs(3)
    assert not torch.allclose(
        samples(model, linearized(around(model, 1)), x), samples(model, around(model, 1), x)
    )


def test_outputs_have_the_mean_and_covariance_of_a_linear_map():
    model, n = mlp(), 4000
    posterior = around(model, 1)
    f = model.run(posterior.mean, model.inputs(1))[0]
    jacobian = jacrev(model.run)(posterior.mean, model.inputs(1))
    covariance = sum(
        (j[0].flatten(1) * posterior.variance[k].flatten()) @ j[0].flatten(1).T for k, j in jacobian.items()
    )
    got = samples(model, linearized(posterior), model.inputs(1), num_samples=n)[:, 0]
    assert ((got.mean(0) - f).abs() < 5 * (covariance.diagonal() / n).sqrt()).all()
    products = torch.einsum("sa,sb->sab", got - f, got - f)
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(n)).all()


def test_what_is_not_covered_or_fixed_is_where_params_and_the_draw_have_it():
    model = MODELS["conv"]()
    statistics = {k: Fixed(b.abs() + 0.5) for k, b in model.buffers.items()}
    head = zoo.head_only(model)
    posterior = Gaussian({**head.mean, **statistics}, head.covariance, linearized=True)
    (center,) = centers(posterior)
    assert set(center) == set(head.mean)
    x, elsewhere = model.inputs(3), shifted(model.params, randn_like(model.params, 5, 0.3))
    got = fb.predict(model.fn, elsewhere, posterior, x, num_samples=S, seed=0).samples
    # The head is linear in its parameters.
    expected = fb.predict(
        model.fn, elsewhere, dataclasses.replace(posterior, linearized=False), x, num_samples=S, seed=0
    ).samples
    assert_close(got, expected)


def test_only_fixed_leaves_are_nothing_to_linearise_in():
    only_fixed = Gaussian({"m": Fixed(torch.ones(2))}, Diagonal({}), linearized=True)
    assert only_fixed.draws(torch.arange(2), 0).effects == ()


def test_inputs_may_be_a_tree():
    model = MODELS["keywords"]()
    posterior, x = around(model, 1), model.inputs(3)
    assert_close(
        samples(model, linearized(posterior), x),
        by_jacobian(model, posterior.mean, posterior.sample(S, seed=0), x),
    )


@pytest.mark.parametrize("likelihood", [None, Categorical()])
def test_streamed_statistics_are_those_of_the_samples(likelihood):
    model = mlp()
    options = {"num_samples": 9, "seed": 0, "chunk_size": 4, "likelihood": likelihood}
    kept, streamed = (
        fb.predict(
            model.fn, None, linearized(around(model, 1)), model.inputs(3), keep_samples=keep, **options
        )
        for keep in (True, False)
    )
    assert_close(streamed.mean, kept.mean)
    assert_close(streamed.variance, kept.variance)


def test_equal_calls_with_a_chunk_size_agree_bit_for_bit_and_others_to_rounding():
    model = MODELS["conv"]()
    posterior, x = linearized(around(model, 1)), model.inputs(4)
    first, again = (samples(model, posterior, x, chunk_size=4) for _ in range(2))
    assert torch.equal(first, again)
    for num_samples, chunk_size in ((3, 1), (5, 2), (S, None)):
        few = samples(model, posterior, x, num_samples=num_samples, chunk_size=chunk_size)
        assert_close(few, first[:num_samples])


def test_a_model_that_draws_random_numbers_is_evaluated_in_a_loop():
    def noisy(params, x):
        return linear(params, x) + torch.randn(())

    posterior, x = linearized(gaussian(linear_params())), randn(4, 3)
    with pytest.warns(UserWarning, match="random numbers of its own"):
        first = fb.predict(noisy, None, posterior, x, num_samples=S, seed=0).samples
    again = fb.predict(noisy, None, posterior, x, num_samples=S, seed=0).samples
    assert_close(first, again)


def test_a_choice_that_the_center_decides_needs_no_loop():
    model = zoo.LOOPED_MODELS["branch_on_values"][1]()
    posterior, x = linearized(gaussian(model.params)), model.inputs(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = samples(model, posterior, x)
    assert_close(got, by_jacobian(model, model.params, posterior.sample(S, seed=0), x))


def test_a_model_that_returns_more_than_a_tensor_is_refused():
    def pair(params, x):
        return linear(params, x), x

    with pytest.raises(TypeError, match="returns one tensor, got tuple"):
        fb.predict(pair, None, linearized(gaussian(linear_params())), randn(4, 3), num_samples=3)


# Gradients.


def test_predictions_are_differentiable_in_the_mean_the_variance_and_the_inputs():
    model = mlp()
    mean = {k: v.clone().requires_grad_() for k, v in model.params.items()}
    variance = {k: (0.1 + v**2).requires_grad_() for k, v in model.params.items()}
    x = model.inputs(3).requires_grad_()
    wanted = [*mean.values(), *variance.values(), x]
    posterior = Gaussian(mean, Diagonal(variance), linearized=True)
    got = torch.autograd.grad(samples(model, posterior, x).sin().sum(), wanted)
    draws, outputs = Gaussian(mean, Diagonal(variance)).sample(S, seed=0), []
    for i in range(S):
        steps = {k: draws[k][i] - mean[k] for k in mean}
        f, change = jvp(lambda p: model.run(p, x), (mean,), (steps,))
        outputs.append(f + change)
    expected = torch.autograd.grad(torch.stack(outputs).sin().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


# Types.


@pytest.mark.parametrize("scale", [0.1, 1e-4])
def test_deviations_smaller_than_the_rounding_of_a_parameter_survive_a_coarse_dtype(scale):
    model = mlp()
    posterior, x = linearized(gaussian(model.params, scale)), model.inputs(4)
    exact, got = samples(model, posterior, x), samples(model, posterior, x, dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), exact, rtol=0.05, atol=0.05)
    # Outputs of float32 show them again: as much as a draw differs from the mean.
    change = samples(model, posterior, x, dtype=torch.float32).double() - model.run(model.params, x)
    assert_close(change, exact - model.run(model.params, x), rtol=2e-2, atol=2e-2 * scale)


def test_deviations_are_found_before_they_are_rounded():
    params, x = {"w": torch.ones(1, dtype=F64)}, torch.ones(1, 1, dtype=F64)

    def difference(params, x):
        return x * (params["w"] - 1)

    posterior = Gaussian(params, Diagonal({"w": torch.full((1,), 1e-12, dtype=F64)}), linearized=True)
    options = {"num_samples": S, "seed": 0}
    exact = fb.predict(difference, None, posterior, x, **options).samples
    got = fb.predict(difference, None, posterior, x, dtype=torch.bfloat16, **options).samples
    assert exact.abs().min() > 0
    assert_close(got.double(), exact, rtol=1e-2, atol=0)


def test_masks_are_shared_in_a_coarse_dtype_too():
    model = MODELS["mlp_dropout"]()
    posterior = fb.join(linearized(zoo.head_only(model)), Dropout(shared_mask=True))
    x = model.inputs(4)
    exact, got = samples(model, posterior, x), samples(model, posterior, x, dtype=torch.bfloat16)
    assert_close(got.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_posterior_is_linearised_around_its_own_mean(dtype):
    model = mlp()
    posterior = fb.to(linearized(around(model, 1)), dtype=dtype)
    assert posterior.linearized
    x = model.inputs(3)
    got = fb.predict(model.fn, None, posterior, x.to(dtype), num_samples=S, seed=0).samples
    assert got.dtype == dtype
    draws = {k: v.double() for k, v in posterior.sample(S, seed=0).items()}
    expected = by_jacobian(model, fb.to(posterior.mean, dtype=F64), draws, x.to(dtype).double())
    assert_close(got.double(), expected, rtol=0.1, atol=0.1)


# Composition.


def test_temper_scales_deviations_from_the_value_at_the_mean():
    model = mlp()
    posterior, x = linearized(around(model, 1)), model.inputs(3)
    f = model.run(posterior.mean, x)
    wide = fb.temper(posterior, 9.0)
    assert wide.linearized
    assert_close(samples(model, wide, x) - f, 3 * (samples(model, posterior, x) - f))


@pytest.mark.parametrize("where", [in_head, in_body, ["0.weight", "2.bias"]])
def test_restrict_linearises_in_what_is_left_with_the_rest_from_params(where):
    model = mlp()
    posterior, x = around(model, 1), model.inputs(3)
    restricted = fb.restrict(linearized(posterior), where)
    assert restricted.linearized
    draws = restricted.sample(S, seed=0)
    assert 0 < len(draws) < len(model.params)

    def run(part, x):
        return model.run({**model.params, **part}, x)

    expected = by_jacobian(model._replace(run=run), restricted.mean, draws, x)
    assert_close(samples(model, restricted, x), expected)


def test_restricting_fixed_draws_is_fixing_restricted_draws():
    model = mlp()
    posterior, x = linearized(around(model, 1)), model.inputs(3)
    fixed = fb.restrict(fb.to_ensemble(posterior, S, seed=0), in_head)
    assert_close(
        samples(model, fixed, x, num_samples=None), samples(model, fb.restrict(posterior, in_head), x)
    )
    joined = fb.join(fb.restrict(posterior, in_head), Ensemble(members(covering(model.params, in_body))))
    assert fb.restrict(fb.to_ensemble(joined, S, seed=0), in_body).effects == ()


def test_a_join_of_linearised_parts_is_linearised_in_both():
    model = mlp()
    posterior, x = linearized(around(model, 1)), model.inputs(3)
    joined = fb.join(fb.restrict(posterior, in_body), fb.restrict(posterior, in_head))
    assert_close(samples(model, joined, x), samples(model, posterior, x))
    assert_close(samples(model, fb.temper(joined, 4.0), x), samples(model, fb.temper(posterior, 4.0), x))


@pytest.mark.parametrize("part", [in_head, in_body])
def test_a_join_linearises_the_part_that_asks_for_it_at_the_draw_of_the_other(part):
    model = mlp()
    posterior, x = around(model, 1), model.inputs(3)
    other = fb.restrict(around(model, 2), lambda path, leaf: not part(path))
    joined = fb.join(other, linearized(fb.restrict(posterior, part)))
    draws = joined.sample(S, seed=3)
    expected = []
    for i in range(S):
        draw = entry(draws, i)
        at = {k: posterior.mean[k] if part(k) else leaf for k, leaf in draw.items()}
        steps = {k: draw[k] - at[k] for k in at}
        expected.append(sum(jvp(lambda p: model.run(p, x), (at,), (steps,))))
    for chunk_size in (None, 1, 4):
        assert_close(samples(model, joined, x, seed=3, chunk_size=chunk_size), torch.stack(expected))


def test_a_head_is_linearised_at_the_masks_of_the_draw():
    model = MODELS["mlp_dropout"]()
    x = model.inputs(4)
    head = zoo.head_only(model)  # which the network is linear in
    plain, flagged = (fb.join(part, Dropout(rate=0.5)) for part in (head, linearized(head)))
    assert_close(samples(model, flagged, x), samples(model, plain, x))
    everything = fb.join(linearized(around(model, 1)), Dropout(rate=0.5))
    assert not torch.allclose(samples(model, everything, x)[0], samples(model, everything, x)[1])


def test_components_are_linearised_around_their_own_means():
    model = mlp()
    one, other, x = around(model, 1), around(model, 2), model.inputs(3)
    mixed = fb.mixture(linearized(one), linearized(other), other, weights=[1, 1, 2])
    got = samples(model, mixed, x, num_samples=12)
    draws = numbered_draws(mixed, 12, 0)
    seen = []
    for i, draw in draws.items():
        if not draw.effects:
            assert_close(got[i], model.run(draw.leaves, x))
            continue
        (effect,) = draw.effects
        mean = (one, other)[effect.label[0]].mean
        optree.tree_map(lambda a, b: assert_close(a, b, rtol=0, atol=0), effect.center, mean)
        expected = by_jacobian(model, mean, {k: v[None] for k, v in draw.leaves.items()}, x)
        assert_close(got[i], expected[0])
        seen.append(effect.label)
    assert set(seen) == {(0,), (1,)}
    assert_close(mixed.mean["0.bias"], 0.25 * one.mean["0.bias"] + 0.75 * other.mean["0.bias"])


def test_a_stacked_linearised_gaussian_is_the_mixture_of_its_entries():
    model = mlp()
    components = [linearized(around(model, k)) for k in range(3)]
    x = model.inputs(3)
    one = samples(model, fb.mixture(stacked(*components), stacked=True), x)
    assert_close(one, samples(model, fb.mixture(*components), x))


def test_nested_mixtures_know_which_center_is_whose():
    model = mlp()
    components = [linearized(around(model, k)) for k in range(4)]
    mixed = fb.mixture(fb.mixture(*components[:2]), fb.mixture(*components[2:]))
    x = model.inputs(3)
    assert_close(samples(model, mixed, x, num_samples=9), zoo.expected_samples(model, mixed, x, 9, 0))
    assert len(mixed.structures(torch.arange(40), 0)) == 4
    for positions in mixed.structures(torch.arange(40), 0).values():
        for effect in mixed.draws(positions, 0).effects:
            assert all(map(is_repeated, optree.tree_leaves(effect)))
    sampled = mixed.sample(9, seed=0)
    draws = numbered_draws(mixed, 9, 0)
    for i in range(9):
        optree.tree_map(lambda a, b: assert_close(a, b, rtol=0, atol=0), entry(sampled, i), draws[i].leaves)


@pytest.mark.parametrize("wrap", [lambda p, m: p, lambda p, m: fb.join(fb.restrict(p, in_head), m)])
def test_mixtures_mapped_over_seeds_are_those_of_each_seed(wrap):
    model = mlp()
    x, rest = model.inputs(3), Point(covering(model.params, in_body))
    mixed = fb.mixture(*(linearized(around(model, k)) for k in range(3)), weights=[1, 2, 3])
    posterior = wrap(mixed, rest)

    def of_seed(seed):
        return samples(model, posterior, x, seed=seed)

    assert_close(vmap(of_seed)(torch.arange(3)), torch.stack([of_seed(seed) for seed in range(3)]))


def test_fixed_draws_of_a_mixture_are_those_draws():
    model = mlp()
    mixed = fb.mixture(linearized(around(model, 1)), linearized(around(model, 2)), around(model, 3))
    x = model.inputs(3)
    fixed = fb.to_ensemble(mixed, 9, seed=4)
    assert isinstance(fixed, fb.Mixture)
    got, expected = samples(model, fixed, x, num_samples=None), samples(model, mixed, x, 4, 9)
    assert_close(got[got[:, 0, 0].argsort()], expected[expected[:, 0, 0].argsort()])


@pytest.mark.parametrize("num_samples", [1, S])
def test_fixed_draws_share_one_center_in_memory_and_in_files(num_samples, tmp_path):
    model = mlp()
    posterior, x = linearized(around(model, 1)), model.inputs(3)
    fixed = fb.to_ensemble(posterior, num_samples, seed=0)
    expected = samples(model, posterior, x, num_samples=num_samples, chunk_size=4)
    fb.save(fixed, tmp_path / "fixed")
    stored = load_file(tmp_path / "fixed")
    assert stored["effects.0.center.0.weight"].shape == model.params["0.weight"].shape
    converted = fb.to(fb.to(fixed, dtype=torch.float32), dtype=F64)
    for same in (fixed, fb.load(tmp_path / "fixed"), pickle.loads(pickle.dumps(fixed)), converted):
        (effect,) = same.effects
        assert all(map(is_repeated, optree.tree_leaves(effect)))
        got = samples(model, same, x, num_samples=None, chunk_size=4)
        assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert same is converted or torch.equal(got, expected)
    some = fixed.draws(torch.arange(3), 0)
    assert all(map(is_repeated, optree.tree_leaves(some.effects)))


def test_the_flag_is_saved_and_pickled_and_shown(tmp_path):
    posterior = linearized(around(mlp(), 1))
    fb.save(posterior, tmp_path / "posterior")
    for same in (fb.load(tmp_path / "posterior"), pickle.loads(pickle.dumps(posterior))):
        assert same.linearized is True
        assert optree.tree_structure(same) == optree.tree_structure(posterior)
    assert "linearized=True" in repr(posterior)
    assert not around(mlp(), 1).linearized


def test_a_sampled_function_is_affine_around_the_value_at_the_mean():
    model = mlp()
    posterior, x = linearized(around(model, 1)), model.inputs(5)
    f = fb.sample_function(model.fn, model.params, posterior, seed=7, index=2)
    f = pickle.loads(pickle.dumps(f))
    assert_close(f(x), samples(model, posterior, x, seed=7)[2])
    assert_close(f(x[1:3]), f(x)[1:3])


# Work that is done once.


def flops(model, posterior, x, num_samples):
    options = {"num_samples": num_samples, "chunk_size": num_samples}
    samples(model, posterior, x, **options)  # finds out whether `vmap` can take the model
    with FlopCounterMode(display=False) as counter:
        samples(model, posterior, x, **options)
    return counter.get_total_flops()


LAYERS = (3 * 8, 8 * 6, 6 * 2)  # of the MLP


FIXED = {"draws": lambda p, n: p, "fixed": lambda p, n: fb.to_ensemble(p, n, seed=0)}


@pytest.mark.parametrize("made", FIXED.values(), ids=FIXED.keys())
def test_the_model_is_evaluated_at_the_center_once_for_all_draws_of_a_pass(made):
    model, rows = mlp(), 7
    posterior, x = linearized(around(model, 1)), model.inputs(rows)
    few, many = (flops(model, made(posterior, n), x, n) for n in (2, 5))
    # A tangent goes through a layer by its weight and by its input; inputs of the first have none.
    assert many - few == 3 * 2 * rows * (2 * sum(LAYERS) - LAYERS[0])
    assert few - 2 * (many - few) / 3 >= 2 * rows * sum(LAYERS)


def test_layers_before_the_first_that_is_covered_have_no_tangent():
    model, rows = mlp(), 7
    posterior, x = linearized(fb.restrict(around(model, 1), in_head)), model.inputs(rows)
    few, many = (flops(model, posterior, x, n) for n in (2, 5))
    assert many - few == 3 * 2 * rows * LAYERS[-1]


# Errors.


ERRORS = {
    "flag": (
        lambda: Gaussian({"w": torch.ones(2)}, Diagonal({"w": torch.ones(2)}), linearized="yes"),
        TypeError,
        r"`Gaussian\(mean, covariance, linearized=...\)` should be True or False, got str",
    ),
    "restricted_masks": (
        lambda: fb.restrict(fb.to_ensemble(fb.join(linearized(zoo.head_only(mlp())), Dropout()), 3), "4.*"),
        TypeError,
        "an Ensemble with dropout masks changes how the model is called",
    ),
    "unshared_masks": (
        lambda: fb.sample_function(
            mlp().fn, mlp().params, fb.join(linearized(zoo.head_only(mlp())), Dropout())
        ),
        ValueError,
        "differ from row to row",
    ),
    "another_shape": (
        lambda: fb.predict(linear, linear_params(), linearized(gaussian({"w": randn(4, 3)})), randn(2, 3)),
        ValueError,
        r"'w' has draws of shape \(4, 3\), and \(2, 3\) in `params`",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_center_names_the_parameters_it_is_over():
    posterior = linearized(zoo.head_only(MODELS["nested"]()))
    (center,) = centers(posterior)
    assert list(named_leaves(center)) == list(parameters_of(posterior.mean))
