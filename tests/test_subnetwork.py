"""Sub-networks of single parameters: a naive loop puts every number where it belongs."""

import pickle
from types import SimpleNamespace

import optree
import pytest
import torch
from torch.func import grad, jacrev, vmap
from torch.testing import assert_close
from zoo import F64, MODELS, entry, linear, linear_params, randn, randn_like, stacked

import funcbayes as fb
from funcbayes import MISSING, Fixed, Gaussian
from funcbayes._tree import named_leaves, parameters_of
from funcbayes.covariances import Dense, Diagonal, Kronecker
from funcbayes.laplace._subnetwork import largest_magnitude, largest_variance, random_mask, subnetwork

every_model = pytest.mark.parametrize("name", MODELS)


def places(mask):
    """Path and index of every chosen entry, in order."""
    return [
        (path, index)
        for path, leaf in named_leaves(mask).items()
        for index in map(tuple, leaf.nonzero().tolist())
    ]


def placed(params, mask, vector):
    """A copy of ``params`` with the numbers of ``vector`` written in one by one."""
    copy = optree.tree_map(torch.clone, params)
    leaves = named_leaves(copy)
    for (path, index), value in zip(places(mask), vector, strict=True):
        leaves[path][index] = value
    return copy


def num_chosen(mask):
    return sum(int(leaf.sum()) for leaf in named_leaves(mask).values())


def masked(name, num_params=5):
    model = MODELS[name]()
    return model, random_mask(model.params, num_params, seed=1)


# The model of a sub-network.


@every_model
def test_a_subnetwork_is_the_network_with_some_numbers_replaced(name):
    model, mask = masked(name)
    x, params = model.inputs(3), model.params
    fn_sub, params_sub = subnetwork(model.fn, params, mask)
    assert list(params_sub) == ["subnetwork"]
    expected = torch.stack([named_leaves(params)[path][index] for path, index in places(mask)])
    assert torch.equal(params_sub["subnetwork"], expected)
    assert torch.equal(fn_sub(params_sub, x), model.fn(params, x))
    vector = randn(5, seed=3)
    got = fn_sub({"subnetwork": vector}, x)
    assert_close(got, model.run(placed(params, mask, vector), x))
    assert fn_sub.num_params == 5


@every_model
def test_derivatives_of_a_subnetwork_are_entries_of_those_of_the_network(name):
    model, mask = masked(name)
    x, vector = model.inputs(2), randn(5, seed=3)
    fn_sub, _ = subnetwork(model.fn, model.params, mask)
    params = placed(model.params, mask, vector)
    whole = named_leaves(grad(lambda p: model.fn(p, x).sin().sum())(params))
    got = grad(lambda v: fn_sub({"subnetwork": v}, x).sin().sum())(vector)
    assert_close(got, torch.stack([whole[path][index] for path, index in places(mask)]))

    watched = vector.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(fn_sub({"subnetwork": watched}, x).sin().sum(), watched)
    assert_close(by_autograd, got)

    jacobian = torch.autograd.functional.jacobian(lambda v: fn_sub({"subnetwork": v}, x), vector)
    direction = randn(5, seed=4)
    expanded = fb.linearize(fn_sub, {"subnetwork": vector})({"subnetwork": vector + direction}, x)  # by jvp
    assert_close(expanded - fn_sub({"subnetwork": vector}, x), jacobian @ direction)


@every_model
def test_a_posterior_over_a_subnetwork_is_predicted_with_as_a_loop_over_draws(name):
    model, mask = masked(name)
    x = model.inputs(3)
    fn_sub, params_sub = subnetwork(model.fn, model.params, mask)
    posterior = Gaussian(params_sub, Dense({"subnetwork": 0.3 * randn(5, 6, seed=2)}))
    prediction = fb.predict(fn_sub, params_sub, posterior, x, num_samples=4, seed=0)
    draws = posterior.sample(4, seed=0)["subnetwork"]
    for got, draw in zip(prediction.samples, draws, strict=True):
        assert_close(got, model.run(placed(model.params, mask, draw), x))


def test_a_linearized_subnetwork_is_expanded_in_the_chosen_parameters_only():
    model, mask = masked("mlp")
    x = model.inputs(3)
    fn_sub, params_sub = subnetwork(model.fn, model.params, mask)
    step = randn(5, seed=2)
    got = fb.linearize(fn_sub, params_sub)({"subnetwork": params_sub["subnetwork"] + step}, x)
    at = placed(model.params, mask, params_sub["subnetwork"] + step)
    assert_close(got, fb.linearize(model.fn, model.params)(at, x))


def test_the_posterior_of_a_linear_subnetwork_is_the_conditional_of_that_of_the_network():
    # Bayesian linear regression: the precision of some parameters given the others is a block of the whole.
    x, y = randn(9, 4), randn(9, seed=1)
    params = {"w": randn(4, seed=2)}

    def fn(params, x):
        return x @ params["w"]

    mask = {"w": torch.tensor([True, False, False, True])}
    fn_sub, params_sub = subnetwork(fn, params, mask)
    jacobian = jacrev(lambda v: fn_sub({"subnetwork": v}, x))(params_sub["subnetwork"])
    precision = jacobian.T @ jacobian + torch.eye(2, dtype=F64)
    chosen = mask["w"]
    assert_close(precision, (x.T @ x + torch.eye(4, dtype=F64))[chosen][:, chosen])
    residual = y - fn_sub({"subnetwork": torch.zeros(2, dtype=F64)}, x)
    mean = torch.linalg.solve(precision, jacobian.T @ residual)
    joint, rest = x.T @ x + torch.eye(4, dtype=F64), params["w"][~chosen]
    expected = torch.linalg.solve(
        joint[chosen][:, chosen], (x.T @ y)[chosen] - joint[chosen][:, ~chosen] @ rest
    )
    assert_close(mean, expected)


@pytest.mark.parametrize("chosen", ["one", "all", "one_leaf", "scalar"])
def test_masks_may_choose_anything_from_one_number_to_everything(chosen):
    params, x = linear_params(), randn(4, 3)
    mask = {k: torch.zeros(v.shape, dtype=torch.bool) for k, v in params.items()}
    if chosen == "one":
        mask["w"][1, 2] = True
    if chosen == "all":
        mask = {k: torch.ones_like(m) for k, m in mask.items()}
    if chosen == "one_leaf":
        mask = {"w": torch.ones(2, 3, dtype=torch.bool)}
    if chosen == "scalar":
        mask = {"gain": torch.tensor(True)}
    fn_sub, params_sub = subnetwork(linear, params, mask)
    vector = randn(num_chosen(mask), seed=5)
    assert params_sub["subnetwork"].shape == vector.shape
    assert_close(fn_sub({"subnetwork": vector}, x), linear(placed(params, mask, vector), x))


def test_entries_are_in_the_order_of_sorted_paths_and_row_major():
    params = {"b": torch.tensor([10.0, 11.0]), "a": torch.arange(6.0).reshape(2, 3).T}
    everything = {k: torch.ones_like(v, dtype=torch.bool) for k, v in params.items()}
    fn_sub, params_sub = subnetwork(lambda p, x: p["a"], params, everything)
    assert params_sub["subnetwork"].tolist() == [0, 3, 1, 4, 2, 5, 10, 11]
    assert torch.equal(fn_sub(params_sub, None), params["a"])


def test_whole_gives_the_parameters_of_the_network_in_its_containers():
    model, mask = masked("nested")
    fn_sub, params_sub = subnetwork(model.fn, model.params, mask)
    vector = randn(5, seed=3)
    whole = fn_sub.whole({"subnetwork": vector})
    assert optree.tree_structure(whole) == optree.tree_structure(model.params)
    optree.tree_map(assert_close, whole, placed(model.params, mask, vector))
    optree.tree_map(assert_close, fn_sub.whole(params_sub), model.params)


def test_a_subnetwork_leaves_its_arguments_alone():
    model, mask = masked("mlp")
    kept = optree.tree_map(torch.clone, model.params), optree.tree_map(torch.clone, mask)
    fn_sub, params_sub = subnetwork(model.fn, model.params, mask)
    params_sub["subnetwork"] += 1  # which is no view of the network's
    fn_sub(params_sub, model.inputs(2))
    for now, before in zip((model.params, mask), kept, strict=True):
        optree.tree_map(lambda a, b: assert_close(a, b, rtol=0, atol=0), now, before)


def with_statistics(model):
    return {k: Fixed(b.abs() + 0.5) for k, b in model.buffers.items()}


def test_what_is_fixed_stays_or_is_taken_from_the_draw():
    model = MODELS["conv"]()
    params = {**model.params, **with_statistics(model)}
    mask = random_mask(params, 6, seed=0)
    assert set(named_leaves(mask)) == set(model.params)
    x, vector = model.inputs(3), randn(6, seed=1)
    fn_sub, params_sub = subnetwork(model.fn, params, mask)
    expected = model.run({**placed(model.params, mask, vector), **with_statistics(model)}, x)
    assert_close(fn_sub({"subnetwork": vector}, x), expected)
    # Without them the model reads its own, and a draw may bring others.
    plain, _ = subnetwork(model.fn, model.params, mask)
    assert_close(plain({"subnetwork": vector}, x), model.run(placed(model.params, mask, vector), x))
    assert_close(plain({"subnetwork": vector, **with_statistics(model)}, x), expected)
    brought = Gaussian(
        {**params_sub, **with_statistics(model)}, Diagonal({"subnetwork": torch.ones(6, dtype=F64)})
    )
    got = fb.predict(plain, params_sub, brought, x, num_samples=3, seed=0)
    assert_close(got.samples, fb.predict(fn_sub, params_sub, brought, x, num_samples=3, seed=0).samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "conv", "keywords"])
def test_the_rest_of_the_network_follows_the_dtype_of_the_vector(name, dtype):
    model, mask = masked(name)
    params = {**model.params, **with_statistics(model)}
    fn_sub, params_sub = subnetwork(model.fn, params, mask)
    x = model.inputs(3)
    posterior = Gaussian(params_sub, Diagonal({"subnetwork": torch.full((5,), 0.1, dtype=F64)}))
    options = {"num_samples": 3, "seed": 0}
    got = fb.predict(fn_sub, params_sub, posterior, x, dtype=dtype, **options).samples
    assert got.dtype == dtype
    expected = fb.predict(fn_sub, params_sub, posterior, x, **options).samples
    assert_close(got.double(), expected, rtol=0.1, atol=0.1)
    moved = fn_sub.whole(fb.to(params_sub, dtype=dtype))
    assert {v.tensor.dtype if isinstance(v, Fixed) else v.dtype for v in moved.values()} == {dtype}


def test_leaves_of_other_dtypes_keep_theirs():
    params = {"a": randn(3), "b": randn(2, seed=1).float(), "n": torch.arange(2), "c": randn(2).bfloat16()}
    mask = {"a": torch.tensor([True, False, True]), "b": torch.tensor([False, True])}
    fn_sub, params_sub = subnetwork(lambda p, x: p["a"].sum() + p["b"].sum(), params, mask)
    assert params_sub["subnetwork"].dtype == F64
    for dtype in (F64, torch.float32):
        whole = fn_sub.whole(fb.to(params_sub, dtype=dtype))
        assert [whole[k].dtype for k in "abnc"] == [dtype, torch.float32, torch.int64, torch.bfloat16]
    assert_close(fn_sub.whole(params_sub), params)
    on_meta = fn_sub.whole(fb.to(params_sub, device="meta"))
    assert {leaf.device.type for leaf in on_meta.values()} == {"meta"}


def test_a_subnetwork_goes_through_transforms():
    model, mask = masked("mlp")
    fn_sub, _ = subnetwork(model.fn, model.params, mask)
    x, vectors = model.inputs(2), randn(3, 5)
    got = vmap(lambda v: fn_sub({"subnetwork": v}, x))(vectors)
    curved = vmap(jacrev(grad(lambda v: fn_sub({"subnetwork": v}, x).sum())))(vectors)
    for i, vector in enumerate(vectors):
        params = placed(model.params, mask, vector)
        assert_close(got[i], model.run(params, x))
        assert_close(
            curved[i], torch.autograd.functional.hessian(lambda v: fn_sub({"subnetwork": v}, x).sum(), vector)
        )
    # Of several networks at once, with one mask.
    networks = stacked(model.params, optree.tree_map(lambda leaf: leaf + 0.1, model.params))

    def changed(params):
        fn_sub, params_sub = subnetwork(model.fn, params, mask)
        return fn_sub({"subnetwork": params_sub["subnetwork"] * 2}, x)

    for i, outputs in enumerate(vmap(changed)(networks)):
        params = entry(networks, i)
        chosen = torch.stack([named_leaves(params)[path][index] for path, index in places(mask)])
        assert_close(outputs, model.run(placed(params, mask, 2 * chosen), x))


def test_training_fits_the_subnetwork_and_nothing_else():
    x = randn(20, 3)
    params = linear_params()
    y = linear({**params, "b": params["b"] + 1}, x)
    fn_sub, params_sub = subnetwork(linear, params, {"b": torch.tensor([True, False])})
    fitted = fb.training.fit(
        fn_sub,
        params_sub,
        (x, y),
        fb.likelihoods.Normal(1.0),
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.5),
        num_epochs=200,
        seed=0,
    )
    assert_close(fitted["subnetwork"], params["b"][:1] + 1, rtol=1e-3, atol=1e-3)
    whole = fn_sub.whole(fitted)
    assert torch.equal(whole["w"], params["w"])
    assert torch.equal(whole["b"][1], params["b"][1])


def test_a_subnetwork_can_be_pickled_and_shows_what_it_is_of():
    fn_sub, params_sub = subnetwork(linear, linear_params(), {"w": torch.eye(2, 3).bool()})
    again, x = pickle.loads(pickle.dumps(fn_sub)), randn(4, 3)
    assert torch.equal(again(params_sub, x), fn_sub(params_sub, x))
    assert repr(fn_sub).startswith("<2 parameters of <function linear")
    with pytest.raises(AttributeError):
        fn_sub.params = {}


# Masks.


def naive_largest(scores, count):
    """Indices of the largest scores by removing one at a time, the first of equal ones."""
    remaining, found = list(enumerate(scores)), []
    for _ in range(count):
        best = max(remaining, key=lambda pair: (pair[1], -pair[0]))
        remaining.remove(best)
        found.append(best[0])
    return sorted(found)


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in named_leaves(tree).values()])


@every_model
def test_masks_are_like_the_parameters_and_choose_exactly_so_many(name):
    params = MODELS[name]().params
    total = len(flat(params))
    posterior = Gaussian(params, Diagonal(optree.tree_map(torch.square, randn_like(params, 3))))
    for count in (1, 4, total - 1, total):
        for mask in (
            largest_magnitude(params, count),
            largest_variance(posterior, count),
            random_mask(params, count, seed=0),
        ):
            assert optree.tree_structure(mask) == optree.tree_structure(params)
            for path, leaf in named_leaves(mask).items():
                assert leaf.dtype == torch.bool
                assert leaf.shape == named_leaves(params)[path].shape
            assert num_chosen(mask) == count


def test_the_largest_magnitudes_and_variances_are_those_of_a_loop():
    params = linear_params()
    values, variance = flat(params), randn_like(params, 5)
    variance = optree.tree_map(torch.square, variance)
    for count in range(1, 10):
        mask = flat(largest_magnitude(params, count))
        assert mask.nonzero()[:, 0].tolist() == naive_largest(values.abs().tolist(), count)
        mask = flat(largest_variance(Gaussian(params, Diagonal(variance)), count))
        assert mask.nonzero()[:, 0].tolist() == naive_largest(flat(variance).tolist(), count)


def test_of_equal_ones_the_first_are_chosen():
    params = {"a": torch.tensor([1.0, 2.0, -1.0]), "b": torch.tensor([[-2.0, 1.0], [1.0, 0.0]])}
    for count in range(1, 8):
        mask = largest_magnitude(params, count)
        assert flat(mask).nonzero()[:, 0].tolist() == naive_largest(flat(params).abs().tolist(), count)
    large = {"w": torch.zeros(300, 300)}
    assert flat(largest_magnitude(large, 1234)).nonzero()[:, 0].tolist() == list(range(1234))


def test_variances_come_from_any_covariance():
    params = linear_params()
    variance = optree.tree_map(torch.square, randn_like(params, 5))
    one_posterior = Gaussian(params, Kronecker(variance, {}, {}))
    assert torch.equal(
        flat(largest_variance(one_posterior, 4)),
        flat(largest_variance(SimpleNamespace(variance=variance), 4)),
    )
    ensemble = fb.Ensemble(stacked(params, optree.tree_map(lambda leaf: leaf * 2, params)))
    assert torch.equal(flat(largest_variance(ensemble, 3)), flat(largest_magnitude(params, 3)))


def test_masks_over_a_part_of_the_leaves():
    params = linear_params()
    posterior = Gaussian(params, Diagonal(optree.tree_map(torch.square, params)))
    for where in ("w", ["w", "nothing"], lambda path, leaf: leaf.ndim == 2):
        masks = (
            largest_magnitude(params, 2, where=where),
            largest_variance(posterior, 2, where=where),
            random_mask(params, 2, seed=0, where=where),
        )
        for mask in masks:
            assert list(mask) == ["w"]
            assert num_chosen(mask) == 2
    assert torch.equal(masks[0]["w"], masks[1]["w"])
    model = MODELS["nested"]()
    mask = random_mask(model.params, 3, seed=0, where="1.*")
    assert list(parameters_of(optree.tree_map(lambda m: m.double(), mask))) == ["1.0", "1.1"]
    assert optree.tree_structure(mask[0]) == optree.tree_structure(MISSING)
    fn_sub, params_sub = subnetwork(model.fn, model.params, mask)
    assert_close(fn_sub(params_sub, model.inputs(2)), model.run(model.params, model.inputs(2)))


def test_what_is_no_parameter_is_never_chosen():
    params = {"w": torch.zeros(2), "n": torch.arange(5), "mean": Fixed(torch.ones(3))}
    for mask in (largest_magnitude(params, 2), random_mask(params, 2, seed=0)):
        assert list(mask) == ["w"]
        assert mask["w"].all()


def test_a_random_mask_is_a_function_of_the_seed():
    params = linear_params()
    assert torch.equal(flat(random_mask(params, 4, 7)), flat(random_mask(params, 4, seed=torch.tensor(7))))
    assert len({tuple(flat(random_mask(params, 4, k)).tolist()) for k in range(20)}) > 10
    torch.manual_seed(0)
    one = random_mask(params, 4)
    torch.manual_seed(0)
    assert torch.equal(flat(one), flat(random_mask(params, 4)))


def test_every_parameter_is_chosen_by_chance_equally_often():
    params, count = linear_params(), 3000
    chosen = torch.stack([flat(random_mask(params, 3, seed)) for seed in range(count)]).double()
    share = 3 / 9
    assert ((chosen.mean(0) - share).abs() < 5 * (share * (1 - share) / count) ** 0.5).all()
    # Without replacement: a pair has 3/9 * 2/8.
    pairs = (chosen.T @ chosen / count)[~torch.eye(9, dtype=torch.bool)]
    assert ((pairs - 1 / 12).abs() < 5 * (1 / 12 * 11 / 12 / count) ** 0.5).all()


def test_masks_leave_the_random_state_and_their_arguments_alone():
    params = linear_params()
    before, state = optree.tree_map(torch.clone, params), torch.get_rng_state()
    random_mask(params, 3, seed=0)
    largest_magnitude(params, 3)
    assert torch.equal(state, torch.get_rng_state())
    optree.tree_map(lambda a, b: assert_close(a, b, rtol=0, atol=0), params, before)


def test_half_precision_and_parameters_with_gradients_are_ranked():
    params = {"a": torch.tensor([1.0, 3.0]).bfloat16(), "b": torch.tensor([2.0, 0.5], requires_grad=True)}
    assert flat(largest_magnitude(params, 2)).tolist() == [False, True, True, False]


# Errors.


def on_linear(mask):
    return lambda: subnetwork(linear, linear_params(), mask)


NOTHING = {"w": torch.zeros(2, 3, dtype=torch.bool)}
ONE = {"b": torch.tensor([True, False])}
ERRORS = {
    "module": (lambda: subnetwork(torch.nn.Linear(2, 2), {}, {}), TypeError, "`subnetwork.*make_functional"),
    "unknown_leaf": (on_linear({"v": torch.ones(2).bool()}), ValueError, "`mask`.*'v' is not expected"),
    "other_shape": (
        on_linear({"b": torch.ones(3).bool()}),
        ValueError,
        r"`subnetwork\(fn, params, mask\)`.*'b' has shape \(3,\), not \(2,\)",
    ),
    "mask_of_numbers": (
        on_linear({"b": torch.ones(2)}),
        TypeError,
        r"of bool as leaves; 'b' is torch\.float32",
    ),
    "mask_of_integers": (on_linear({"gain": torch.tensor(1)}), TypeError, r"'gain' is torch\.int64"),
    "nothing_chosen": (on_linear(NOTHING), ValueError, "at least one parameter, got none"),
    "empty_mask": (on_linear({}), ValueError, "at least one parameter, got none"),
    "integer_leaf": (
        lambda: subnetwork(linear, {"n": torch.arange(2)}, {"n": torch.ones(2).bool()}),
        ValueError,
        r"choose parameters only; 'n' is torch\.int64",
    ),
    "fixed_leaf": (
        lambda: subnetwork(linear, {"m": Fixed(torch.ones(2))}, {"m": Fixed(torch.ones(2).bool())}),
        ValueError,
        "choose parameters only; 'm' is Fixed",
    ),
    "vector_of_another_length": (
        lambda: on_linear(ONE)()[0]({"subnetwork": torch.ones(2)}, None),
        ValueError,
        r"`fn_sub\(params, x\)`.*the 1 parameters.*has shape \(2,\), not \(1,\)",
    ),
    "vector_missing": (
        lambda: on_linear(ONE)()[0](linear_params(), None),
        ValueError,
        r"`fn_sub\(params, x\)`.*'subnetwork' is missing",
    ),
    "another_parameter": (
        lambda: on_linear(ONE)()[0]({"subnetwork": torch.ones(1), "gain": torch.ones(())}, None),
        ValueError,
        "nothing else but `Fixed` leaves; 'gain' is not expected",
    ),
    "too_many": (
        lambda: largest_magnitude(linear_params(), 10),
        ValueError,
        r"`largest_magnitude\(num_params=\.\.\.\)` should be at most 9.*got 10",
    ),
    "too_many_of_a_leaf": (
        lambda: random_mask(linear_params(), 3, where="b"),
        ValueError,
        r"`random_mask\(num_params=\.\.\.\)` should be at most 2",
    ),
    "zero": (lambda: random_mask(linear_params(), 0), ValueError, "should be at least 1, got 0"),
    "half": (lambda: largest_magnitude(linear_params(), 0.5), TypeError, "should be an int, got float"),
    "no_leaf": (
        lambda: largest_magnitude(linear_params(), 1, where="head.*"),
        ValueError,
        r"`largest_magnitude\(\.\.\.\)`.*got none that `where='head\.\*'` chooses",
    ),
    "no_parameters": (lambda: random_mask({"n": torch.arange(3)}, 1), ValueError, "to choose from, got none"),
    "no_variance": (
        lambda: largest_variance(linear_params(), 1),
        TypeError,
        r"`largest_variance\(posterior, \.\.\.\)`.*`variance`.*got dict",
    ),
    "nan": (
        lambda: largest_magnitude({"w": torch.tensor([1.0, torch.nan])}, 1),
        ValueError,
        r"`largest_magnitude\(\.\.\.\)`.*'w' has entries that are NaN",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_subnetworks_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()
