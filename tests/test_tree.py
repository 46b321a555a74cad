"""Pytrees: nodes of ours inside torch and optree, taking trees apart and putting them together."""

import collections
import copy
import pickle

import optree
import pytest
import torch
import zoo
from torch.func import grad, vmap
from torch.testing import assert_close
from torch.utils import _pytree
from zoo import F64, MODELS, POSTERIORS, randn

import funcbayes as fb
from funcbayes import _tree
from funcbayes._tree import (
    MISSING,
    Fixed,
    index,
    is_missing,
    is_repeated,
    matcher,
    merge,
    named_leaves,
    repeated,
    select,
)

Pair = collections.namedtuple("Pair", ["first", "second"])
NODES = {
    **{
        name: (lambda make=make: make(MODELS["conv"]()))
        for name, make in (POSTERIORS | zoo.WITH_FIXED).items()
    },
    "nested": lambda: zoo.head_only(MODELS["nested"]()),
    "dropout": lambda: fb.Dropout(0.3, where=["a.*", "b"]),
    "draw": lambda: fb.Draw({"w": randn(3)}, fb.Dropout().draws(torch.arange(2), 0).effects),
    "normal": lambda: fb.likelihoods.Normal(randn(2).exp()),
    "categorical": lambda: fb.likelihoods.Categorical(class_axis=1),
    "fixed": lambda: Fixed(torch.arange(3)),
    "missing": lambda: [MISSING, randn(2)],
}
all_nodes = pytest.mark.parametrize("make", NODES.values(), ids=NODES.keys())
MAPS = {"torch": _pytree.tree_map, "optree": optree.tree_map}
both_maps = pytest.mark.parametrize("tree_map", MAPS.values(), ids=MAPS.keys())


def tensors(tree):
    return [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@all_nodes
@both_maps
def test_mapping_over_a_node_reaches_every_tensor_once_and_keeps_the_rest(make, tree_map):
    node, seen = make(), []

    def double(leaf):
        assert isinstance(leaf, torch.Tensor | float)  # nothing else is a leaf: no None, no string
        seen.append(leaf)
        return leaf * 2

    doubled = tree_map(double, node)
    assert type(doubled) is type(node)
    assert optree.tree_structure(doubled) == optree.tree_structure(node)
    assert len(seen) == len(optree.tree_leaves(node))
    for one, other in zip(tensors(doubled), tensors(node), strict=True):
        assert_close(one, other * 2)


@all_nodes
def test_torch_and_optree_see_the_same_leaves(make):
    node = make()
    by_torch, by_optree = _pytree.tree_leaves(node), optree.tree_leaves(node)
    assert sorted(map(id, by_torch)) == sorted(map(id, by_optree))


@all_nodes
@pytest.mark.parametrize(
    "copied", [lambda n: pickle.loads(pickle.dumps(n)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_a_copy_has_equal_leaves_and_structure_and_shares_nothing(make, copied):
    node = make()
    again = copied(node)
    assert type(again) is type(node)
    assert optree.tree_structure(again) == optree.tree_structure(node)
    for one, other in zip(tensors(again), tensors(node), strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other)
        assert one.data_ptr() != other.data_ptr()


@all_nodes
def test_nodes_cannot_be_changed_and_show_shapes(make):
    node = make()
    if isinstance(node, list):
        return
    with pytest.raises(AttributeError):
        node.anything = 1
    assert repr(node).startswith(type(node).__name__)
    assert "tensor(" not in repr(node)


STACKABLE = [
    "point",
    "gaussian",
    "ensemble",
    "ensemble_weighted",
    "gaussian_head_only",
    "gaussian_fixed",
    "nested",
]


@pytest.mark.parametrize("name", STACKABLE)
def test_vmap_maps_over_a_stack_of_posteriors(name):
    first = NODES[name]()
    second = _pytree.tree_map(lambda t: t * 0.5, first)
    several = _pytree.tree_map(lambda *t: torch.stack(t), first, second)
    got = vmap(lambda posterior: posterior.sample(4, seed=0))(several)
    for i, posterior in enumerate((first, second)):
        one = optree.tree_map(lambda t, i=i: t[i], got)
        for a, b in zip(tensors(one), tensors(posterior.sample(4, seed=0)), strict=True):
            assert_close(a, b)


MADE_INSIDE = {
    "gaussian": lambda t: fb.Gaussian({"w": t}, fb.covariances.Diagonal({"w": t.exp()})),
    "point": lambda t: fb.Point({"w": t, "fixed": Fixed(t)}),
    "ensemble": lambda t: fb.Ensemble({"w": t}),
    "ensemble_weighted": lambda t: fb.Ensemble({"w": t}, t.exp()),
    "dropout": lambda t: (fb.Dropout(0.2), t),
}


@pytest.mark.parametrize("make", MADE_INSIDE.values(), ids=MADE_INSIDE.keys())
def test_a_mapped_function_may_return_a_posterior(make):
    rows = randn(3, 4)
    got = vmap(make)(rows)
    for i in range(3):
        one = optree.tree_map(lambda t, i=i: t[i], got)
        assert optree.tree_structure(one) == optree.tree_structure(make(rows[i]))
        for a, b in zip(tensors(one), tensors(make(rows[i])), strict=True):
            assert_close(a, b)


def test_grad_through_a_posterior_gives_a_posterior_of_gradients():
    mean, variance = {"w": randn(2, 3), "b": randn()}, {"w": randn(2, 3).exp(), "b": randn().exp()}
    posterior = fb.Gaussian(mean, fb.covariances.Diagonal(variance))
    cotangent = {"w": randn(5, 2, 3, seed=1), "b": randn(5, seed=1)}

    def inner(posterior):
        draws = posterior.sample(5, seed=0)
        return sum((draws[k] * cotangent[k]).sum() for k in draws)

    got = grad(inner)(posterior)
    assert isinstance(got, fb.Gaussian)
    draws = posterior.sample(5, seed=0)
    for k in mean:  # draw = mean + sqrt(variance) z
        z = (draws[k] - mean[k]) / variance[k].sqrt()
        assert_close(got.mean[k], cotangent[k].sum(0))
        assert_close(got.covariance.variance[k], (cotangent[k] * z).sum(0) / (2 * variance[k].sqrt()))


# Paths, parts and wholes.


def tree():
    return {"b": [randn(2), (randn(3), {"x": randn()})], "a": Pair(randn(1), Fixed(randn(2)))}


def test_leaves_are_named_by_their_path_and_a_fixed_one_is_a_leaf():
    assert list(named_leaves(tree())) == ["a.0", "a.1", "b.0", "b.1.0", "b.1.1.x"]


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two leaves are called 'a\.b'"):
        named_leaves({"a.b": randn(1), "a": {"b": randn(1)}})


@pytest.mark.parametrize(
    "keep", ["b.*", "a.*", ["*0"], "nothing", "*", lambda path, leaf: not isinstance(leaf, Fixed)]
)
def test_a_selection_and_its_complement_make_the_whole(keep):
    whole, chosen = tree(), matcher(keep)
    part, rest = select(whole, chosen), select(whole, lambda path, leaf: not chosen(path, leaf))
    assert set(named_leaves(part)) | set(named_leaves(rest)) == set(named_leaves(whole))
    assert not set(named_leaves(part)) & set(named_leaves(rest))
    for joined in (merge(part, rest), merge(rest, part), merge(whole, part)):
        assert optree.tree_structure(joined) == optree.tree_structure(whole)
        for one, other in zip(tensors(joined), tensors(whole), strict=True):
            assert one is other


def test_dicts_lack_what_is_not_selected_and_other_containers_hold_missing():
    part = select({"d": {"x": randn(1), "y": randn(1)}, "l": [randn(1), randn(1)]}, matcher(["d.x", "l.1"]))
    assert set(part["d"]) == {"x"}
    assert is_missing(part["l"][0])
    assert not is_missing(part["l"][1])


def test_merging_changes_neither_tree_and_adds_keys_that_the_base_lacks():
    base = {"w": randn(2), "inner": {"v": randn(1)}}
    overlay = {"inner": {"mean": Fixed(randn(3))}}
    merged = merge(base, overlay)
    assert set(merged["inner"]) == {"v", "mean"}
    assert set(base["inner"]) == {"v"}
    assert set(overlay) == {"inner"}


def test_missing_stays_missing_through_maps_and_copies():
    for rebuilt in (
        _pytree.tree_map(lambda t: t, [MISSING]),
        copy.deepcopy([MISSING]),
        pickle.loads(pickle.dumps([MISSING])),
    ):
        assert is_missing(rebuilt[0])
    assert repr(MISSING) == "MISSING"
    assert _pytree.tree_leaves(MISSING) == optree.tree_leaves(MISSING) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "w"}, "'w' is missing"),
        (lambda t: {**t, "v": randn(1)}, "'v' is not expected"),
        (lambda t: {**t, "w": randn(3, 2)}, r"'w' has shape \(3, 2\), not \(2, 3\)"),
    ],
)
def test_trees_that_differ_are_told_apart_in_words(change, message):
    reference = {"w": randn(2, 3), "b": Fixed(randn(2))}
    assert _tree.difference(dict(reversed(reference.items())), reference) is None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(_tree.difference(change(reference), reference))


def test_the_order_of_the_keys_of_a_dict_does_not_matter():
    params = zoo.linear_params()
    backwards = dict(reversed(params.items()))
    assert list(params) != list(backwards)
    x = randn(5, 3)
    got = [
        fb.predict(zoo.linear, params, zoo.gaussian(p), x, num_samples=4, seed=0).samples
        for p in (params, backwards)
    ]
    mixed = fb.Gaussian(
        params, fb.covariances.Diagonal(dict(reversed(zoo.gaussian(params).variance.items())))
    )
    got.append(fb.predict(zoo.linear, backwards, mixed, x, num_samples=4, seed=0).samples)
    assert_close(got[1], got[0])
    assert_close(got[2], got[0])
    ensemble = fb.Ensemble(zoo.members(params))
    assert_close(
        fb.Ensemble(dict(reversed(ensemble.members.items()))).sample(9, seed=0)["w"],
        ensemble.sample(9, seed=0)["w"],
    )


def test_moving_to_a_dtype_converts_floating_tensors_only():
    posterior = fb.Point({"w": randn(2), "count": Fixed(torch.tensor(3)), "mean": Fixed(randn(2))})
    moved = fb.to(posterior, dtype=torch.bfloat16)
    assert moved.params["w"].dtype == moved.params["mean"].tensor.dtype == torch.bfloat16
    assert moved.params["count"].tensor.dtype == torch.int64
    assert posterior.params["w"].dtype == F64
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int32"):
        fb.to(posterior, dtype=torch.int32)


# Axes along which a leaf is repeated.


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_repeated_leaf_has_one_place_for_all_its_entries(count):
    leaf = randn(2, 3)
    many = repeated(leaf, count)
    assert torch.equal(many, leaf.expand(count, 2, 3))
    assert many.data_ptr() == leaf.data_ptr()
    assert is_repeated(many)
    assert not is_repeated(many.clone(memory_format=torch.contiguous_format))
    assert not is_repeated(leaf)
    assert not is_repeated(randn())
    assert not is_repeated(repeated(leaf, 0))


@pytest.mark.parametrize("i", [slice(1, 3), slice(0, 1), torch.tensor([2, 0, 2, 1]), torch.tensor([3])])
def test_entries_of_a_tree_keep_what_is_repeated(i):
    tree = {"own": randn(4, 2), "same": repeated(randn(2), 4)}
    entries = index(tree, i)
    assert torch.equal(entries["own"], tree["own"][i])
    assert torch.equal(entries["same"], tree["same"][i])
    assert is_repeated(entries["same"])
    assert not is_repeated(entries["own"])


CHOSEN = [[2, 0, 2], [], [[0, 1], [4, 4], [3, 0]], [[[1]]]]


@pytest.mark.parametrize("i", CHOSEN, ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 4, 3), (5, 0)])
def test_entries_that_are_taken_are_those_of_indexing(shape, i):
    leaf, i = torch.randn(shape, dtype=F64), torch.tensor(i, dtype=torch.int64)
    whole = leaf.movedim(-1, 0).contiguous().movedim(0, -1) if leaf.ndim > 1 else leaf  # another layout
    for given in (leaf, whole, leaf.int(), leaf > 0):
        got = _tree.taken(given, i)
        assert torch.equal(got, given[i])
        assert got.stride() == given[i].stride()
    leaf.requires_grad_()
    (got,), (expected,) = (
        torch.autograd.grad(take(leaf, i).square().sum(), leaf)
        for take in (_tree.taken, lambda leaf, i: leaf[i])
    )
    assert_close(got, expected)


def test_one_entry_of_a_tree_is_no_view_of_an_axis():
    tree = {"own": randn(4, 2), "same": repeated(randn(2), 4)}
    for i in (2, torch.tensor(2)):
        assert all(torch.equal(index(tree, i)[k], leaf[2]) for k, leaf in tree.items())


def test_repeated_leaves_of_batches_are_repeated():
    many = vmap(lambda leaf: repeated(leaf, 3))(randn(4, 2))
    assert many.shape == (4, 3, 2)
    assert vmap(lambda leaf: torch.tensor(is_repeated(repeated(leaf, 3))))(randn(4, 2)).all()
