"""No public call changes what it is given, nor anything else, whether it returns or raises."""

import contextlib
import copy
import functools
import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import pytest
import torch
import zoo
from torch import nn
from torch.testing import assert_close
from zoo import MODELS, expected_samples, gaussian, randn

import funcbayes as fb
from funcbayes.likelihoods import Categorical

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

SGD = functools.partial(torch.optim.SGD, lr=0.01)
NUM_ROWS = 6


class World(NamedTuple):
    """Everything that a call could touch."""

    module: nn.Module
    fn: Any
    params: Any
    posterior: Any
    ensemble: Any
    members: Any
    x: Any
    y: Any
    path: Any


def make_module():
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return module.double()


def make_world(tmp_path) -> World:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make_module()
    module.train()
    module[0].eval()  # a mixture of modes
    module[5].weight.requires_grad_(False)
    module[5].bias.grad = randn(3)
    module.register_forward_hook(lambda module, args, output: None)
    module[0].register_forward_pre_hook(lambda module, args: None)
    fn, params = fb.make_functional(module)
    members = zoo.members(params, 3)
    x, y = randn(NUM_ROWS, 2, 6, 6), torch.arange(NUM_ROWS) % 3
    return World(
        module, fn, params, gaussian(params), fb.Ensemble(members), members, x, y, tmp_path / "p.safetensors"
    )


def tensors_of(value):
    if isinstance(value, nn.Module):
        return [
            *value.parameters(),
            *value.buffers(),
            *(p.grad for p in value.parameters() if p.grad is not None),
        ]
    found = [leaf for leaf in optree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found + list(getattr(value, "buffers", {}).values())


def description(value):
    """What identity and flags say of one thing: tensors, versions, gradients, modes and hooks."""
    flags = [
        (id(t), t._version, t.requires_grad, t.shape, t.dtype, None if t.grad is None else id(t.grad))
        for t in tensors_of(value)
    ]
    if isinstance(value, nn.Module):
        hooks = [
            (
                part.training,
                *(
                    tuple(getattr(part, kind))
                    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
                ),
            )
            for part in value.modules()
        ]
        names = [sorted(vars(part)) for part in value.modules()]
        return flags, hooks, names
    return flags


class Snapshot:
    def __init__(self, *values):
        self.values = values
        self.before = [description(v) for v in values]
        self.numbers = [[t.detach().clone() for t in tensors_of(v)] for v in values]
        self.grad_modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self.defaults = (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )

    def assert_unchanged(self):
        for value, before, numbers in zip(self.values, self.before, self.numbers, strict=True):
            assert description(value) == before
            for tensor, number in zip(tensors_of(value), numbers, strict=True):
                assert torch.equal(tensor, number)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == self.grad_modes
        now = (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )
        assert now == self.defaults


def batches(w):
    return list(zip(w.x.split(2), w.y.split(2), strict=True))


# Each takes the world and a seed (or None); those that have no seed ignore it.
CALLS: dict[str, Callable[[World, int | None], Any]] = {
    "make_functional": lambda w, seed: fb.make_functional(w.module)[1],
    "fn": lambda w, seed: w.fn(w.params, w.x),
    "predict": lambda w, seed: (
        fb.predict(
            w.fn, w.params, w.posterior, w.x, likelihood=Categorical(), targets=w.y, num_samples=5, seed=seed
        ).samples
    ),
    "predict_in_chunks": lambda w, seed: (
        fb.predict(w.fn, w.params, w.posterior, w.x, num_samples=5, seed=seed, chunk_size=2).samples
    ),
    "predict_streamed": lambda w, seed: (
        fb.predict(
            w.fn,
            w.params,
            w.posterior,
            w.x,
            likelihood=Categorical(),
            num_samples=5,
            seed=seed,
            keep_samples=False,
        ).mean
    ),
    "predict_with_dropout": lambda w, seed: (
        fb.predict(w.fn, w.params, fb.Dropout(), w.x, num_samples=5, seed=seed).samples
    ),
    "predict_with_shared_dropout": lambda w, seed: (
        fb.predict(w.fn, w.params, fb.Dropout(shared_mask=True), w.x, num_samples=5, seed=seed).samples
    ),
    "predict_with_an_ensemble": lambda w, seed: fb.predict(w.fn, None, w.ensemble, w.x).samples,
    "predict_in_another_dtype": lambda w, seed: (
        fb.predict(w.fn, w.params, w.posterior, w.x, num_samples=5, seed=seed, dtype=torch.float32).samples
    ),
    "statistics": lambda w, seed: statistics(
        fb.predict(w.fn, w.params, w.posterior, w.x, likelihood=Categorical(), num_samples=5, seed=seed), w.y
    ),
    "predictor": lambda w, seed: (
        fb.predictor(w.fn, w.params, w.posterior, num_samples=5, seed=seed)(w.x).samples
    ),
    "predict_batches": lambda w, seed: (
        fb.predict_batches(
            w.fn, w.params, w.posterior, batches(w), likelihood=Categorical(), num_samples=5, seed=seed
        ).samples
    ),
    "sample": lambda w, seed: w.posterior.sample(4, seed=seed),
    "sample_an_ensemble": lambda w, seed: w.ensemble.sample(4, seed=seed),
    "draws": lambda w, seed: w.posterior.draws(torch.arange(4), 0 if seed is None else seed),
    "moments": lambda w, seed: (w.ensemble.mean, w.ensemble.variance, w.posterior.variance),
    "log_prob": lambda w, seed: w.posterior.log_prob(w.params),
    "to": lambda w, seed: fb.to(w.posterior, dtype=torch.float32),
}
HAS_NO_SEED = {
    *(
        "make_functional",
        "fn",
        "predict_with_an_ensemble",
        "draws",
        "moments",
        "log_prob",
        "to",
        "from_modules",
    ),
    *("save", "load", "refresh_batch_norm"),
}


def statistics(prediction, y):
    names = ("mean", "variance", "epistemic_variance", "entropy", "mutual_information")
    return [
        *(getattr(prediction, name) for name in names),
        prediction.log_prob(y),
        prediction.distribution().log_prob(y),
    ]


def add_calls_of_other_rooms():
    """Calls of modules that build on the core, where they are there."""
    with contextlib.suppress(ImportError):
        from funcbayes import training

        CALLS["training_fit"] = lambda w, seed: training.fit(
            w.fn, w.params, (w.x, w.y), Categorical(), optimizer=SGD, num_epochs=2, batch_size=3, seed=seed
        )
        CALLS["training_fit_on_batches"] = lambda w, seed: training.fit(
            w.fn, w.params, batches(w), Categorical(), optimizer=SGD, num_epochs=2, seed=seed
        )
    with contextlib.suppress(ImportError):
        from funcbayes import ensemble

        CALLS["ensemble_init"] = lambda w, seed: ensemble.init(make_module, 2, seed=seed)[1]
        CALLS["ensemble_fit"] = lambda w, seed: ensemble.fit(
            w.fn, w.members, (w.x, w.y), Categorical(), optimizer=SGD, num_epochs=2, batch_size=3, seed=seed
        )
        CALLS["from_modules"] = lambda w, seed: ensemble.from_modules([w.module, copy.deepcopy(w.module)])[1]
    with contextlib.suppress(ImportError):
        from funcbayes import io

        def load(w, seed):
            io.save(w.posterior, w.path)
            return io.load(w.path)

        CALLS["save"] = lambda w, seed: io.save(w.posterior, w.path)
        CALLS["load"] = load


add_calls_of_other_rooms()
all_calls = pytest.mark.parametrize("name", CALLS)


def assert_close_trees(one, other):
    one, other = tensors_of(one), tensors_of(other)
    for a, b in zip(one, other, strict=True):
        assert_close(a, b)


@contextlib.contextmanager
def seeded_globally(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@all_calls
def test_a_call_changes_neither_its_arguments_nor_any_global_state(name, tmp_path):
    world = make_world(tmp_path)
    snapshot, python_state = Snapshot(*world), random.getstate()
    with seeded_globally(1):
        before = torch.get_rng_state()
        first = CALLS[name](world, 5)
        assert torch.equal(torch.get_rng_state(), before)
        snapshot.assert_unchanged()
        again = CALLS[name](world, 5)
        assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_state
    snapshot.assert_unchanged()
    assert_close_trees(first, again)


@all_calls
def test_a_call_does_the_same_where_gradients_are_off_or_arguments_ask_for_them(name, tmp_path):
    world = make_world(tmp_path)
    first = CALLS[name](world, 5)
    for mode in (torch.no_grad(), torch.set_grad_enabled(True)):
        with mode:
            enabled = torch.is_grad_enabled()
            assert_close_trees(CALLS[name](world, 5), first)
            assert torch.is_grad_enabled() == enabled
    wanting = world._replace(params={k: v.clone().requires_grad_() for k, v in world.params.items()})
    snapshot = Snapshot(*wanting)
    got = CALLS[name](wanting, 5)
    snapshot.assert_unchanged()
    for a, b in zip(tensors_of(got), tensors_of(first), strict=True):
        assert_close(a.detach(), b.detach())


@pytest.mark.parametrize("name", sorted(set(CALLS) - HAS_NO_SEED))
def test_without_a_seed_a_call_is_governed_by_manual_seed_alone(name, tmp_path):
    world = make_world(tmp_path)
    with seeded_globally(3):
        before = torch.get_rng_state()
        first = CALLS[name](world, None)
        after = torch.get_rng_state()
        torch.rand(10)
        torch.manual_seed(3)
        again = CALLS[name](world, None)
        assert torch.equal(torch.get_rng_state(), after)
        assert not torch.equal(after, before)
        torch.manual_seed(3)
        torch.randint(0, 2**63 - 1, ())  # one number is drawn
        assert torch.equal(torch.get_rng_state(), after)
    assert_close_trees(first, again)


def test_results_share_no_memory_with_the_module_or_the_parameters(tmp_path):
    world = make_world(tmp_path)
    module = {t.untyped_storage().data_ptr() for t in tensors_of(world.module)}
    _, params = fb.make_functional(world.module)
    assert not module & {t.untyped_storage().data_ptr() for t in params.values()}
    assert not any(p.requires_grad or p.grad is not None for p in params.values())
    with torch.no_grad():
        for p in world.module.parameters():
            p.add_(1)
    for name, value in params.items():
        assert torch.equal(value, world.params[name])


def test_changing_the_module_later_does_not_change_the_function(tmp_path):
    world = make_world(tmp_path)
    expected = world.fn(world.params, world.x)
    with torch.no_grad():
        for t in (*world.module.parameters(), *world.module.buffers()):
            t.mul_(2)
    world.module[5] = nn.Identity()
    assert_close(world.fn(world.params, world.x), expected)


@pytest.mark.parametrize(
    "first", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)], ids=["relu", "dropout"]
)
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_a_model_that_works_in_place_does_not_change_its_inputs(first, chunk_size):
    fn, params = fb.make_functional(nn.Sequential(first, nn.Linear(3, 2)).double())
    x = randn(5, 3)
    before = x.clone()
    posterior = fb.Dropout() if isinstance(first, nn.Dropout) else gaussian(params)
    fb.predict(fn, params, posterior, x, num_samples=4, seed=0, chunk_size=chunk_size)
    assert torch.equal(x, before)
    fn(params, x)
    assert torch.equal(x, before)


def test_a_module_that_writes_into_its_buffers_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.linear(x) + self.seen

    module = Counting()
    fn, params = fb.make_functional(module)
    x = torch.zeros(2, 3)
    first = fn(params, x)
    for _ in range(3):
        assert_close(fn(params, x), first)
    assert module.seen == 0
    assert fn.buffers["seen"] == 0


# Exceptions.


class Unlucky(Exception):
    pass


class Fragile(nn.Module):
    """Raises at a chosen call: class attributes, because modules are copied."""

    calls, fails_at, where = 0, None, "head"

    def __init__(self):
        super().__init__()
        self.trunk, self.norm, self.drop, self.head = (
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.4),
            nn.Linear(4, 2),
        )

    def forward(self, x):
        Fragile.calls += 1
        fails = Fragile.fails_at is not None and Fragile.calls >= Fragile.fails_at
        h = self.norm(self.trunk(x))
        if fails and Fragile.where == "trunk":
            raise Unlucky
        h = self.head(self.drop(h))
        if fails:
            raise Unlucky
        return h


@pytest.mark.parametrize("posterior", ["gaussian", "head_only", "ensemble", "dropout", "dropout_shared_mask"])
@pytest.mark.parametrize("where", ["trunk", "head"])
@pytest.mark.parametrize(("fails_at", "chunk_size"), [(1, None), (2, None), (1, 3), (3, 1), (3, 2)])
def test_an_exception_inside_the_model_leaves_nothing_behind(
    posterior, where, fails_at, chunk_size, monkeypatch
):
    model = zoo.from_module(Fragile, zoo.rows(3), "head", drops=True)
    of_model = {**zoo.POSTERIORS, **zoo.DROPOUTS, "head_only": zoo.head_only}[posterior]
    posterior, x = of_model(model), model.inputs(4)
    expected = expected_samples(model, posterior, x, 6, 0)
    snapshot = Snapshot(model.params, posterior, x, model.fn)

    def predict():
        return fb.predict(model.fn, model.params, posterior, x, num_samples=6, seed=0, chunk_size=chunk_size)

    monkeypatch.setattr(Fragile, "where", where)
    monkeypatch.setattr(Fragile, "fails_at", fails_at)
    monkeypatch.setattr(Fragile, "calls", 0)
    with pytest.raises(Unlucky):
        predict()
    snapshot.assert_unchanged()
    monkeypatch.setattr(Fragile, "fails_at", None)
    for _ in range(3):
        assert_close(predict().samples, expected)
    assert_close(model.fn(model.params, x), model.run(model.params, x))
    with torch.no_grad():  # nothing that intercepts is left: dropout of the world is its own again
        assert torch.equal(nn.functional.dropout(x, 0.0), x)
        assert len({tuple(nn.functional.dropout(torch.ones(50), 0.5).tolist()) for _ in range(4)}) == 4


def test_a_generator_of_batches_that_raises_leaves_nothing_behind(tmp_path):
    world = make_world(tmp_path)
    snapshot = Snapshot(*world)

    def broken():
        yield from batches(world)[:1]
        raise Unlucky

    with pytest.raises(Unlucky):
        fb.predict_batches(world.fn, world.params, world.posterior, broken(), seed=0)
    snapshot.assert_unchanged()


# Threads.


def at_once(call, num_threads=8, times=3):
    barrier, found = threading.Barrier(num_threads), [None] * num_threads

    def work(i):
        barrier.wait()
        try:
            found[i] = [call(i) for _ in range(times)]
        except Exception as error:  # noqa: BLE001  # shown by the test
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


THREADED = {
    "fn": lambda m, i: m.fn(zoo.shifted(m.params, zoo.randn_like(m.params, i)), m.inputs(1 + i)),
    "weights": lambda m, i: (
        fb.predict(
            m.fn, m.params, gaussian(m.params, 0.1 * (1 + i)), m.inputs(1 + i), num_samples=5, seed=i
        ).samples
    ),
    "dropout": lambda m, i: (
        fb.predict(m.fn, m.params, fb.Dropout(), m.inputs(1 + i), num_samples=5, seed=i).samples
    ),
    "mixed": lambda m, i: THREADED[("fn", "weights", "dropout")[i % 3]](m, i),
    "with_gradients": lambda m, i: torch.autograd.grad(
        fb.predict(
            m.fn,
            {k: v.clone().requires_grad_() for k, v in m.params.items()} if i % 2 else m.params,
            gaussian({k: v.clone().requires_grad_() for k, v in zoo.head_only(m).mean.items()}),
            (x := m.inputs(1 + i).requires_grad_()),
            num_samples=3,
            seed=i,
        ).samples.sum(),
        x,
    )[0],
}


@pytest.mark.parametrize("call", THREADED.values(), ids=THREADED.keys())
@pytest.mark.parametrize("name", ["mlp_dropout", "conv_dropout", "transformer_dropout"])
def test_eight_threads_on_one_function_find_what_one_finds(name, call):
    model = MODELS[name]()
    expected = [call(MODELS[name](), i) for i in range(8)]
    for found, value in zip(at_once(functools.partial(call, model)), expected, strict=True):
        assert not isinstance(found, Exception), found
        for one in found:
            assert_close(one, value)


def test_a_mode_of_one_thread_does_not_reach_another():
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)).double())
    x = randn(2, 3)
    expected = fn(params, x)

    def call(i):
        if i % 2:
            fb.predict(fn, params, fb.Dropout(), x, num_samples=20, seed=0, chunk_size=1)
            return expected
        return fn(params, x)

    for found in at_once(call, times=10):
        assert not isinstance(found, Exception), found
        for one in found:
            assert_close(one, expected)
