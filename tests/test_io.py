import io
import json
import math
import os
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import optree
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import funcbayes as fb
from funcbayes._tree import NODE_TYPES, pytree_dataclass, static
from funcbayes.io import FORMAT_VERSION, load, save

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


def params(*lead, seed=0, dtype=torch.float32):
    return {
        "w": randn(*lead, 2, 3, seed=seed, dtype=dtype),
        "b": randn(*lead, 2, seed=seed + 1, dtype=dtype),
        "gain": randn(*lead, seed=seed + 2, dtype=dtype),
    }


def linear(params, x):
    return params["gain"] * (x @ params["w"].T + params["b"])


def positive(tree):
    return optree.tree_map(torch.exp, tree)


@pytree_dataclass
class Pair:
    """A node of the user's, which holds posteriors as the package's own compositions do."""

    first: fb.Posterior
    second: fb.Posterior
    weights: Tensor | None = None
    names: tuple = static(default=())


def gaussian(dtype=torch.float32):
    return fb.Gaussian(params(dtype=dtype), fb.covariances.Diagonal(positive(params(seed=7, dtype=dtype))))


def gaussian_with_fixed():
    mean = {"net": [randn(2, 3), {"b": randn(2, seed=4)}], "running_mean": fb.Fixed(randn(2, seed=5))}
    return fb.Gaussian(
        mean, fb.covariances.Diagonal({"net": [torch.ones(2, 3), {"b": torch.full((2,), 0.3)}]})
    )


def ensemble():
    return fb.Ensemble(params(7), torch.arange(1.0, 8.0, dtype=torch.float64))


def factors(rank):
    return optree.tree_map(lambda leaf: randn(*leaf.shape, rank, seed=leaf.ndim), params())


def low_rank():
    return fb.covariances.LowRankPlusDiagonal(positive(params(seed=7)), factors(3))


def kronecker():
    eye = {"w": torch.eye(2), "b": torch.eye(2), "gain": torch.eye(1)}
    return fb.covariances.Kronecker.from_factors(params(), eye, {"w": torch.eye(3)}, prior_precision=2.0)


def swag_state():
    state = fb.swag.init(params(), rank=2)
    for seed in range(13):
        state = fb.swag.update(state, {**params(seed=seed), "mean": fb.Fixed(randn(2, seed=seed))})
    return state


def ensemble_of_one():
    return fb.Ensemble(params(1))


POSTERIORS = {
    "point": lambda: fb.Point(params()),
    "point of a tensor": lambda: fb.Point(randn(3)),
    "point of a state dict": lambda: fb.Point(nn.Linear(3, 2).requires_grad_(False).state_dict()),
    "gaussian": gaussian,
    "gaussian bfloat16": lambda: gaussian(torch.bfloat16),
    "gaussian float64": lambda: gaussian(torch.float64),
    "gaussian with fixed": gaussian_with_fixed,
    "ensemble": ensemble,
    "ensemble without weights": lambda: fb.Ensemble({"w": randn(4, 2), "counts": torch.arange(4)}),
    "dropout": lambda: fb.Dropout(0.1, where=["enc.*", "dec.*"], shared_mask=True),
    "dropout of the model": lambda: fb.Dropout(),
    "draw with masks": lambda: fb.Dropout(0.2).draws(torch.arange(3), 4),
    "gaussian of low rank": lambda: fb.Gaussian(params(), low_rank()),
    "gaussian of low-rank precision": lambda: fb.Gaussian(
        params(), fb.covariances.LowRankPrecision(positive(params(seed=7)), factors(2))
    ),
    "gaussian dense": lambda: fb.Gaussian(params(), fb.covariances.Dense(factors(9))),
    "gaussian kronecker": lambda: fb.Gaussian(params(), kronecker()),
    "gaussian kronecker without bases": lambda: fb.Gaussian(
        params(),
        fb.covariances.Kronecker(positive(params(seed=7)), {"w": torch.eye(2), "b": fb.MISSING}, {}),
    ),
    "state of swag": lambda: swag_state(),
    "swag": lambda: fb.swag.posterior(swag_state()),
    "mixture": lambda: fb.mixture(gaussian(), fb.Point(params()), ensemble_of_one(), weights=[1, 2, 3]),
    "join": lambda: fb.join(gaussian(), fb.Dropout(0.1, where="a.*")),
    "mixture of joins": lambda: fb.mixture(fb.join(gaussian(), fb.Dropout()), fb.Dropout(0.5)),
    "fixed draws": lambda: fb.to_ensemble(fb.join(gaussian(), fb.Dropout()), 3, seed=0),
    "nested": lambda: Pair(Pair(gaussian(), fb.Dropout(where="a.*")), ensemble(), randn(2), ("x", 1, None)),
}
LIKELIHOODS = {
    "categorical": lambda: fb.likelihoods.Categorical(class_axis=1, ignore_index=255),
    "bernoulli": lambda: fb.likelihoods.Bernoulli(),
    "normal": lambda: fb.likelihoods.Normal(0.1),
    "normal of a tensor": lambda: fb.likelihoods.Normal(torch.tensor([0.1, 0.2], dtype=torch.float64)),
    "heteroscedastic": lambda: fb.likelihoods.HeteroscedasticNormal(),
    "poisson": lambda: fb.likelihoods.Poisson(),
}
TREES = {
    "nothing": lambda: None,
    "a number": lambda: 3,
    "floats": lambda: [0.1, -0.0, 1e-320, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 1.0],
    "booleans and ints": lambda: (True, False, 1, 0, -(2**80)),
    "strings": lambda: ["", "é 中 \n \0 \"'\\", "\ud800", "null"],
    "dict in its own order": lambda: {"z": randn(1), "a": randn(2), "m": None},
    "dict with keys of other types": lambda: {
        1: randn(1),
        "1": randn(2),
        True + 1: 2,
        None: 3,
        (1, ("a",)): 4,
    },
    "dict with a float key": lambda: {0.5: randn(1), math.inf: 1},
    "ordered dict": lambda: OrderedDict(b=randn(1), a=randn(2)),
    "containers": lambda: [(), [], {}, ([],), {"a": {}}, torch.Size([2, 3])],
    "missing": lambda: [fb.MISSING, randn(2), fb.MISSING],
    "fixed": lambda: {"mean": fb.Fixed(randn(3)), "count": fb.Fixed(torch.tensor(3))},
    "paths that collide": lambda: {"a.b": randn(1), "a": {"b": randn(2)}, "a.b#2": randn(3)},
    "reserved names": lambda: {"__metadata__": randn(2), "": randn(3)},
    "scalars and empty tensors": lambda: [
        torch.tensor(1.5),
        torch.zeros(0),
        torch.zeros(0, 3),
        torch.zeros(0),
    ],
    "not finite": lambda: torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
    "parameter": lambda: {"w": nn.Parameter(randn(2))},
}
VALUES = {**POSTERIORS, **LIKELIHOODS, **TREES}
all_values = pytest.mark.parametrize("make", VALUES.values(), ids=VALUES.keys())


def bits(tensor):
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return plain.contiguous().reshape(-1).view(torch.uint8)


def assert_same(got, expected):
    """Equal in type, structure, order of keys and every bit."""
    if isinstance(expected, Tensor):
        assert type(got) is Tensor
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert torch.equal(bits(got), bits(expected.detach()))
        return
    assert type(got) is type(expected)
    if isinstance(expected, dict):
        assert list(got) == list(expected)
        assert [type(k) for k in got] == [type(k) for k in expected]
        for key in expected:
            assert_same(got[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for g, e in zip(got, expected, strict=True):
            assert_same(g, e)
    elif type(expected) in NODE_TYPES.values():
        assert_same(vars(got), vars(expected))
    elif isinstance(expected, float):
        assert got.hex() == expected.hex()
    else:
        assert got == expected


def round_trip(value, folder):
    save(value, folder / "it.safetensors")
    return load(folder / "it.safetensors")


@all_values
def test_what_is_loaded_is_what_was_saved_bit_for_bit(make, tmp_path):
    value = make()
    assert_same(round_trip(value, tmp_path), value)


def test_every_posterior_and_likelihood_of_the_package_makes_a_round_trip_here():
    tested = {type(make()) for make in (POSTERIORS | LIKELIHOODS).values()}
    rooms = (fb, fb.likelihoods, fb.swag)
    public = [v for room in rooms for v in vars(room).values() if isinstance(v, type)]
    nodes = {v for v in public if v in NODE_TYPES.values()}
    assert nodes - {fb.Fixed} <= tested


@all_values
def test_saving_what_was_loaded_gives_the_same_file(make, tmp_path):
    save(make(), tmp_path / "first")
    save(load(tmp_path / "first"), tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_loading_does_not_run_the_constructor_which_would_normalise_weights(tmp_path):
    doubled = optree.tree_map(lambda leaf: 2 * leaf, ensemble())  # as a transform would rebuild it
    assert_same(round_trip(doubled, tmp_path), doubled)
    assert doubled.weights.sum() > 1.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_keep_their_bits(dtype, tmp_path):
    values = [randn(3, 4, seed=s).mul(3).abs().to(dtype) for s in range(2)]
    tree = {"matrix": values[0], "scalar": values[1][0, 0].clone(), "empty": torch.zeros(0, 2).to(dtype)}
    assert_same(round_trip(tree, tmp_path), tree)


@pytest.mark.parametrize("name", ["point", "gaussian", "gaussian bfloat16", "ensemble"])
def test_predictions_are_equal_before_and_after(name, tmp_path):
    posterior = POSTERIORS[name]()
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    x = randn(4, 3, seed=9, dtype=dtype)
    before, after = (
        fb.predict(linear, None, p, x, num_samples=6, seed=3, chunk_size=2)
        for p in (posterior, round_trip(posterior, tmp_path))
    )
    assert_same(after.samples, before.samples)


def test_predictions_by_the_weights_of_an_ensemble_are_equal_before_and_after(tmp_path):
    x, y = randn(4, 3, seed=9), randn(4, 2)
    before, after = (
        fb.predict(linear, None, p, x, likelihood=likelihood, chunk_size=5).log_prob(y)
        for p, likelihood in [
            (ensemble(), fb.likelihoods.Normal(0.1)),
            round_trip((ensemble(), fb.likelihoods.Normal(0.1)), tmp_path),
        ]
    )
    assert_same(after, before)


def test_dropout_predictions_are_equal_before_and_after(tmp_path):
    torch.manual_seed(0)
    fn, weights = fb.make_functional(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    posterior = fb.Dropout(0.3)
    before, after = (
        fb.predict(fn, weights, p, randn(4, 3), num_samples=5, seed=1, chunk_size=5).samples
        for p in (posterior, round_trip(posterior, tmp_path))
    )
    assert_same(after, before)


SHARED = {
    "the same tensor twice": lambda t: [t, t],
    "a tensor and its transpose": lambda t: [t, t.T],
    "overlapping slices": lambda t: [t[:3], t[1:]],
    "disjoint slices": lambda t: [t[:2], t[2:]],
    "expanded": lambda t: [t.expand(5, *t.shape), t[0, 0].expand(7), t[:, :1].expand(4, 9)],
    "strided": lambda t: [t[:, ::2], t.T],
    "one small part of a large storage": lambda t: [t[1]],
    "channels last": lambda t: [t.reshape(1, 4, 3, 2).contiguous(memory_format=torch.channels_last)],
    "conjugated": lambda t: [torch.complex(t, t + 1).conj(), torch.complex(t, t + 1).conj().imag],
}


@pytest.mark.parametrize("name", SHARED)
def test_tensors_that_share_or_skip_memory_are_saved_by_value(name, tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    views = SHARED[name](base)
    loaded = round_trip(views, tmp_path)
    assert_same(loaded, [v.resolve_conj().resolve_neg() for v in views])
    for tensor in loaded:
        tensor.zero_()  # nothing shares memory any more
    assert_same(round_trip(views, tmp_path), [v.resolve_conj().resolve_neg() for v in views])


def test_draws_of_a_point_are_saved_although_they_share_memory(tmp_path):
    draws = fb.Point(params()).sample(3)
    assert_same(round_trip(draws, tmp_path), draws)


def test_a_part_of_a_tensor_does_not_bring_the_rest_of_its_storage(tmp_path):
    save(torch.zeros(100_000)[:10], tmp_path / "part")
    assert (tmp_path / "part").stat().st_size < 1000


def test_saving_does_not_change_what_is_saved(tmp_path):
    value = [nn.Parameter(randn(2, 3)), randn(2, 3).T]
    save(value, tmp_path / "it")
    assert value[0].requires_grad
    assert not value[1].is_contiguous()


def test_loaded_tensors_do_not_depend_on_the_file(tmp_path):
    path = tmp_path / "it"
    save({"w": torch.ones(1000)}, path)
    loaded = load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert loaded["w"].sum() == 1000
    loaded["w"].zero_()


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_paths_and_devices_may_be_strings_or_objects(kind, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(randn(2), kind("it.safetensors"))  # in the folder one is in
    assert_same(load(kind("it.safetensors"), device=device), randn(2))


def test_a_file_is_a_safetensors_file_with_tensors_by_path(tmp_path):
    save(gaussian_with_fixed(), tmp_path / "it")
    tensors = safetensors.torch.load_file(tmp_path / "it")
    assert set(tensors) == {
        *("mean.net.0", "mean.net.1.b", "mean.running_mean.tensor"),
        *("covariance.variance.net.0", "covariance.variance.net.1.b"),
    }


def test_a_file_is_readable_by_others_as_far_as_new_files_are(tmp_path):
    (tmp_path / "plain").touch()
    save(randn(1), tmp_path / "it")
    assert (tmp_path / "it").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_saving_replaces_an_older_file_and_leaves_nothing_beside_it(tmp_path):
    save(randn(1000), tmp_path / "it")
    save(randn(2), tmp_path / "it")
    assert_same(load(tmp_path / "it"), randn(2))
    assert os.listdir(tmp_path) == ["it"]


class Foreign:
    pass


Named = namedtuple("Named", ["a"])


def reads_the_head(path, leaf):
    return path.startswith("head")


UNWRITABLE = {
    "a predicate for where": (
        lambda: Pair(fb.Dropout(where=reads_the_head), ensemble()),
        r"'first\.where', a function\. Write `where` as a glob on paths, such as \"head\.\*\"",
    ),
    "a function": (
        lambda: {"fn": torch.exp},
        "'fn', a function: code has no form.*give it again after loading",
    ),
    "a class": (lambda: [Foreign], "'0', a function: code has no form"),
    "a module": (lambda: nn.Linear(2, 2), r"the tree itself, an nn\.Module \(Linear\).*`Point\(params\)`"),
    "an object": (lambda: {"a": [Foreign()]}, r"'a\.0', of type Foreign\. Posteriors, dicts"),
    "a set": (lambda: {1, 2}, "of type set"),
    "bytes": (lambda: {"a": b"x"}, "'a', of type bytes"),
    "a named tuple": (lambda: Named(1), "of type Named"),
    "an array": (lambda: {"a": np.ones(2)}, "'a', of type ndarray"),
    "a key": (lambda: {"a": {torch.int8: 1}}, "keys are strings.*'a' has a key of type dtype"),
    "a meta tensor": (lambda: torch.ones(2, device="meta"), "meta device, which has no values"),
    "a sparse tensor": (lambda: torch.eye(3).to_sparse(), r"torch\.sparse_coo.*`\.to_dense\(\)`"),
    "an unusual dtype": (
        lambda: torch.zeros(2, dtype=torch.float8_e4m3fnuz),
        r"float8_e4m3fnuz\. Convert it to a dtype",
    ),
    "a subclass of tensors": (
        lambda: torch.ones(2).as_subclass(type("Odd", (Tensor,), {})),
        "of class Odd. Convert it to a plain tensor",
    ),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_has_no_form_is_refused_by_name_before_anything_is_written(name, tmp_path):
    make, message = UNWRITABLE[name]
    value = make()
    (tmp_path / "it").write_bytes(b"before")
    with pytest.raises(TypeError, match=message):
        save(value, tmp_path / "it")
    assert (tmp_path / "it").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["it"]


def test_tensors_inside_a_transform_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"'w', a tensor inside a `torch\.func` transform"):
        torch.func.vmap(lambda w: save({"w": w}, tmp_path / "it"))(randn(3))
    assert os.listdir(tmp_path) == []


def test_a_dataclass_that_only_has_the_name_of_a_node_is_refused(tmp_path):
    namesake = type("Point", (), {})
    with pytest.raises(TypeError, match="of type Point"):
        save(namesake(), tmp_path / "it")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["save_file", "os.replace"])
def test_a_save_that_fails_leaves_the_file_that_was_there(error, step, tmp_path, monkeypatch):
    save(randn(3), tmp_path / "it")

    def fail(first, second, **options):
        Path(second if step == "save_file" else first).write_bytes(b"half")
        raise error

    monkeypatch.setattr(f"funcbayes.io.{step}", fail)
    with pytest.raises(type(error)):
        save(randn(4), tmp_path / "it")
    assert os.listdir(tmp_path) == ["it"]
    assert_same(load(tmp_path / "it"), randn(3))


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'.*no_such_folder' does not\. Make it with"):
        save(randn(2), tmp_path / "no_such_folder" / "it")


def test_a_folder_is_no_file_to_save_to(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save(randn(2), tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none at '.*nothing'"):
        load(tmp_path / "nothing")


def test_files_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "it"
    for content in (b"", b"hello, this is some text of another kind", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="'.*it' is not a whole safetensors file"):
            load(path)
    buffer = io.BytesIO()
    torch.save({"w": randn(2)}, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load(path)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    save(randn(100), tmp_path / "it")
    (tmp_path / "it").write_bytes((tmp_path / "it").read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load(tmp_path / "it")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_safetensors_files_of_others_are_refused_with_how_to_read_them(metadata, tmp_path):
    tensors = {name: torch.ones(1) for name in "abcd"}
    safetensors.torch.save_file(tensors, tmp_path / "it", metadata=metadata)
    with pytest.raises(
        ValueError, match=r"of another kind, with 'a', 'b', 'c', \.\.\.\. Read it with .*load_file"
    ):
        load(tmp_path / "it")


def write(path, tree, version=FORMAT_VERSION, tensors=None):
    header = json.dumps({"version": version, "tree": tree})
    safetensors.torch.save_file(tensors or {}, path, metadata={"funcbayes": header})


def test_a_newer_format_is_refused_as_such(tmp_path):
    write(tmp_path / "it", {"something": "new"}, version=FORMAT_VERSION + 1)
    with pytest.raises(
        ValueError, match=f"up to format {FORMAT_VERSION}; .* has format {FORMAT_VERSION + 1}"
    ):
        load(tmp_path / "it")


def test_a_class_that_is_not_known_is_named(tmp_path):
    write(tmp_path / "it", {"list": [{"node": ["Hypernet", {}]}]})
    with pytest.raises(ValueError, match="knows no class 'Hypernet'.*Update funcbayes.*import it before"):
        load(tmp_path / "it")


@pytest.mark.parametrize("fields", [{}, {"params": 1, "more": 2}, {"other": 1}])
def test_a_class_with_other_fields_is_named(fields, tmp_path):
    write(tmp_path / "it", {"node": ["Point", fields]})
    with pytest.raises(ValueError, match=r"a 'Point' with other fields in .* has \['params'\]"):
        load(tmp_path / "it")


def test_fields_that_came_later_have_their_defaults(tmp_path):
    write(tmp_path / "it", {"node": ["Dropout", {"rate": 0.25}]})
    assert_same(load(tmp_path / "it"), fb.Dropout(0.25))


@pytest.mark.parametrize(
    "tree",
    [
        {"tensor": "absent"},
        {"tensor": ["w"]},
        {"complex": "w"},
        {"uint64": "w"},
        {"unknown": 1},
        {"__class__": "os.system"},
        {"node": ["os.system", {"command": "echo"}]},
        {"node": ["Point"]},
        {"node": ["Point", ["params"]]},
        {"node": [["Point"], {}]},
        {"node": ["Dropout", {"where": {"list": ["a.*"]}}]},  # static fields are hashable
        {"list": 3, "tuple": []},
        {"list": 3},
        {"dict": [["a"]]},
        {"dict": [[{"list": []}, 1]]},
        {"float": "abc"},
        {"size": ["a"]},
        {},
        [1, 2],
    ],
    ids=json.dumps,
)
def test_trees_that_save_does_not_write_are_refused(tree, tmp_path):
    write(tmp_path / "it", tree, tensors={"w": torch.ones(3)})
    with pytest.raises(ValueError, match=r"`load\(path\)` .*'.*it'"):
        load(tmp_path / "it")


@pytest.mark.parametrize("header", ["", "{", "[]", "3", '{"tree": 1}', '{"version": "1"}', '{"version": 1}'])
def test_headers_that_save_does_not_write_are_refused(header, tmp_path):
    safetensors.torch.save_file({}, tmp_path / "it", metadata={"funcbayes": header})
    with pytest.raises(ValueError, match="is damaged: its header"):
        load(tmp_path / "it")


@pytest.mark.parametrize("depth", [5000, 200_000])
def test_trees_too_deep_to_read_are_refused(depth, tmp_path):
    header = '{"version": 1, "tree": ' + '{"list": [' * depth + "]}" * depth + "}"
    safetensors.torch.save_file({}, tmp_path / "it", metadata={"funcbayes": header})
    with pytest.raises(ValueError, match="is damaged"):
        load(tmp_path / "it")
