"""What is recorded of small chunks, and done again without the model's code."""

import functools
import gc
import subprocess
import sys
import time
import types
import weakref

import pytest
import torch
import zoo
from torch import nn
from torch.testing import assert_close
from zoo import F64, MODELS, SLOW_MODELS, linear, linear_params, randn

import funcbayes as fb
from funcbayes import _engine, _predict
from funcbayes._recording import Recorded, _operations
from funcbayes._tree import tensors
from funcbayes.likelihoods import Categorical, Normal
from funcbayes.posteriors import Draw

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
KINDS = "vmap", "rows_first", "channels_last"


@pytest.fixture
def always(monkeypatch):
    """All draws at once by a mechanism of some kind, which is recorded at its first use."""

    def choose(kind):
        monkeypatch.setattr(_engine._Tuner, "next_to_time", lambda self: None)
        monkeypatch.setattr(_engine._Tuner, "fastest", lambda self: _engine.Mechanism(kind, 64))
        monkeypatch.setattr(_engine._Tuner, "is_short", lambda self, mechanism, num_draws: True)

    return choose


def is_recorded(fn):
    tuners = _engine._tuners._values[fn].values()
    known = [found for t in tuners for found in t.recorded._recordings.values()]
    return any(recording is not None for found in known for _, recording in found)


def expected(run, ensemble, x):
    return torch.stack([run(ensemble.member(k), x) for k in range(ensemble.num_members)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("name", [*MODELS, *SLOW_MODELS])
def test_what_is_recorded_of_one_ensemble_and_batch_is_right_for_others(always, name, num_rows, kind):
    always(kind)
    model = {**MODELS, **SLOW_MODELS}[name]()
    ensembles = [fb.Ensemble(zoo.members(model.params, scale=scale)) for scale in (0.3, 0.2)]
    with torch.no_grad():
        first, second = (model.inputs(num_rows), model.inputs(num_rows + 7))
        second = {k: v[:num_rows] for k, v in second.items()} if isinstance(second, dict) else second
        if not isinstance(second, dict):
            axis = 1 if name == "attention_rows_second" else 0
            second = second.narrow(axis, 0, num_rows).clone()
        for ensemble, x in [(e, x) for e in ensembles for x in (first, second, first)]:
            got = fb.predict(model.fn, None, ensemble, x).samples
            assert_close(got, expected(model.run, ensemble, x))
    is_left_to_a_loop = name in zoo.WRITTEN or (name == "conv_view" and kind == "channels_last")
    assert is_recorded(model.fn) or is_left_to_a_loop


SCALE = 2.0
FACTOR = torch.tensor(2.0)
NUMBERS = [2.0]


def by_number(params, x):
    return SCALE * linear(params, x)


def by_tensor(params, x):
    return FACTOR * linear(params, x)


def by_list(params, x):
    return NUMBERS[0] * linear(params, x)


def scaled(values):
    return 2 * values


def by_function(params, x):
    return scaled(linear(params, x))


def by_attribute_of_a_function(params, x):
    return scaled.by * linear(params, x)


def by_default(params, x, seen=[2.0]):  # noqa: B006  # as a user may write it
    return seen[0] * linear(params, x)


class Scale:
    by = 2.0


def by_class(params, x):
    return Scale.by * linear(params, x)


class Scaled(nn.Module):
    by = 2.0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, x):
        return self.by * self.layer(x)


def by_variable():
    by = 2.0

    def fn(params, x):
        return by * linear(params, x)

    def change(_):
        nonlocal by
        by = 3.0

    return fn, change


class Base:
    factor = 2.0


class Derived(Base):
    pass


def by_base_class(params, x):
    return Derived.factor * linear(params, x)


HELD = {"by": 2.0}
get = HELD.get


def by_method_of_a_dict(params, x):
    return get("by") * linear(params, x)


def by_nested_variables():
    by = 2.0

    def times(fn, factor):
        return lambda params, x: factor() * fn(params, x)

    def change(_):
        nonlocal by
        by = 3.0

    return times(times(linear, lambda: by), lambda: 5.0), change


def in_default_dtype(params, x):
    return linear(params, x).to(torch.ones(()).dtype)


def in_globals(name, value):
    return lambda patch: patch.setitem(globals(), name, value)


WORLDS = {
    "a number": (by_number, in_globals("SCALE", 3.0), True),
    "another tensor": (by_tensor, in_globals("FACTOR", torch.tensor(3.0)), True),
    "numbers of a tensor": (by_tensor, lambda _: FACTOR.mul_(1.5), True),
    "a list": (by_list, lambda _: NUMBERS.__setitem__(0, 3.0), False),
    "a function": (by_function, in_globals("scaled", torch.exp), True),
    "a function inside": (by_number, in_globals("linear", lambda params, x: zoo.linear(params, x) + 1), True),
    "an attribute of a function": (
        by_attribute_of_a_function,
        lambda patch: patch.setattr(scaled, "by", 3.0),
        False,
    ),
    "a default": (by_default, lambda _: by_default.__defaults__[0].__setitem__(0, 3.0), False),
    "a class": (by_class, lambda patch: patch.setattr(Scale, "by", 3.0), True),
    "a variable around": (*by_variable(), True),
    "a variable further around": (*by_nested_variables(), True),
    "a base class": (by_base_class, lambda patch: patch.setattr(Base, "factor", 3.0), True),
    "a method of a dict": (by_method_of_a_dict, lambda _: HELD.__setitem__("by", 3.0), False),
    "the default dtype": (in_default_dtype, lambda _: torch.set_default_dtype(F64), True),
}


@pytest.mark.parametrize("what", WORLDS)
def test_a_function_is_called_again_once_something_else_that_it_takes_has_changed(always, monkeypatch, what):
    always("vmap")
    fn, change, is_known = WORLDS[what]
    if what == "an attribute of a function":
        monkeypatch.setattr(scaled, "by", 2.0, raising=False)
    fn = types.FunctionType(fn.__code__, globals(), fn.__name__, fn.__defaults__, fn.__closure__)
    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    numbers = FACTOR.item(), NUMBERS[0], by_default.__defaults__[0][0], torch.get_default_dtype()
    try:
        for step in (None, change):
            if step is not None:
                assert is_recorded(fn) == is_known
                step(monkeypatch)
            for _ in range(4):
                assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    finally:
        FACTOR.fill_(numbers[0])
        HELD["by"] = 2.0
        NUMBERS[0], by_default.__defaults__[0][0] = numbers[1:3]
        torch.set_default_dtype(numbers[3])


def replaced_forward(self, x):
    return 3 * self.layer(x)


class ScaledByList(Scaled):
    factors = [2.0]  # noqa: RUF012  # as a user may write it

    def forward(self, x):
        return self.factors[0] * self.layer(x)


class ScaledByDefault(Scaled):
    def forward(self, x, seen=[2.0]):  # noqa: B006
        return seen[0] * self.layer(x)


@pytest.mark.parametrize("make", [ScaledByList, ScaledByDefault])
def test_a_module_is_not_recorded_whose_class_holds_what_may_change(always, make):
    always("rows_first")
    fn, params = fb.make_functional(make())
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    held = make.factors if make is ScaledByList else make.forward.__defaults__[0]
    try:
        for held[0] in (2.0, 2.0, 3.0, 3.0):
            assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    finally:
        held[0] = 2.0
    assert not is_recorded(fn)


class Checking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, x):
        torch._assert_async((x < 100).all())
        return self.layer(x)


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
def test_what_a_model_checks_is_checked_again(always):
    always("rows_first")
    fn, params = fb.make_functional(Checking())
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    for _ in range(3):
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    with pytest.raises(RuntimeError):
        fb.predict(fn, None, ensemble, 1000 + x)


def scaled_by_global(values):
    return SCALE * values


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=F64)

    def forward(self, x):
        return self.layer(x) if len(x) > 5 else scaled_by_global(self.layer(x))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_hooks_of_the_backward_pass_of_all_modules_are_called():
    fn, params = fb.make_functional(zoo.mlp().double())
    data, calls = (randn(8, 3), randn(8, 2)), []

    def fit():
        return fb.training.fit(fn, params, data, Normal(1.0), optimizer=SGD, num_epochs=5, seed=0)

    plain = fit()
    hook = nn.modules.module.register_module_full_backward_hook(lambda *_: calls.append(1))
    try:
        hooked = fit()
    finally:
        hook.remove()
    assert len(calls) >= 5 * 5  # steps, and layers
    assert all(torch.equal(plain[name], hooked[name]) for name in params)


SGD = functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


def test_what_a_branch_takes_that_another_batch_goes_is_known(monkeypatch):
    torch.manual_seed(0)
    module, x, y = Branching(), randn(10, 3), randn(10, 2)
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    sgd = functools.partial(torch.optim.SGD, lr=0.1)

    def fit(fn):
        return fb.training.fit(fn, params, batches, Normal(0.5), optimizer=sgd, num_epochs=6, seed=0)

    (fn, params), (other, _) = fb.make_functional(module), fb.make_functional(module)
    before = fit(fn)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    after, wanted = fit(fn), fit(other)
    for name in params:
        assert torch.equal(after[name], wanted[name])
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(Scaled, "by", 3.0),
        lambda patch: patch.setattr(Scaled, "forward", replaced_forward),
        lambda patch: patch.setattr(Scaled, "by", property(lambda self: 4.0)),
    ],
)
def test_a_module_is_run_again_once_its_class_has_changed(always, monkeypatch, change):
    always("rows_first")
    fn, params = fb.make_functional(Scaled())
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    before = fb.predict(fn, None, ensemble, x).samples
    assert is_recorded(fn)
    change(monkeypatch)
    for _ in range(3):
        got = fb.predict(fn, None, ensemble, x).samples
        assert_close(got, expected(fn, ensemble, x))
        assert not torch.allclose(got, before)


class Settings:
    by = 2.0


class OfSettings(Scaled):
    def __init__(self, settings):
        super().__init__()
        self.settings = settings

    def forward(self, x):
        return self.settings.by * self.layer(x)


class Bare(nn.Sequential):
    pass


def by_default_of_call(module, x, held={"by": 2.0}):  # noqa: B006  # as a user may write it
    return held["by"] * module(x)


OF_MODULES = {
    "a class in a module": (
        lambda: fb.make_functional(OfSettings(Settings)),
        lambda patch: patch.setattr(Settings, "by", 3.0),
    ),
    "the class of an object in a module": (
        lambda: fb.make_functional(OfSettings(Settings())),
        lambda patch: patch.setattr(Settings, "by", 3.0),
    ),
    "a class without code": (
        lambda: fb.make_functional(Bare(nn.Linear(3, 2, dtype=F64))),
        lambda patch: patch.setattr(Bare, "forward", lambda self, x: 3 * self[0](x), raising=False),
    ),
    "a default of the call": (
        lambda: fb.make_functional(nn.Linear(3, 2, dtype=F64), call=by_default_of_call),
        lambda patch: patch.setitem(by_default_of_call.__defaults__[0], "by", 3.0),
    ),
}


@pytest.mark.parametrize("what", OF_MODULES)
def test_what_a_module_has_of_others_may_change(always, monkeypatch, what):
    always("rows_first")
    make, change = OF_MODULES[what]
    fn, params = make()
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    for _ in range(3):
        before = fb.predict(fn, None, ensemble, x).samples
    change(monkeypatch)
    wanted = expected(make()[0], ensemble, x)
    assert not torch.allclose(wanted, before)
    for _ in range(3):
        assert_close(fb.predict(fn, None, ensemble, x).samples, wanted)


def test_hooks_of_all_modules_are_called(always):
    always("rows_first")
    fn, params = fb.make_functional(nn.Linear(3, 2, dtype=F64))
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    plain = fb.predict(fn, None, ensemble, x).samples
    assert is_recorded(fn)
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, out: 2 * out)
    try:
        for _ in range(3):
            assert_close(fb.predict(fn, None, ensemble, x).samples, 2 * plain)
    finally:
        hook.remove()
    assert_close(fb.predict(fn, None, ensemble, x).samples, plain)


class Noting(nn.Module):
    """Does something beside, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 2, dtype=F64), how

    def forward(self, x):
        self.how(x)
        return self.layer(x)


SEEN = []
BESIDE = {
    "append": lambda x: SEEN.append(len(x)),
    "print": lambda x: print(len(x)),
    "time": lambda x: SEEN.__iadd__([time.time()]),
    "set": lambda x: globals().__setitem__("LAST", len(x)),
    "seed": lambda x: torch.manual_seed(3),
    "threads": lambda x: torch.set_num_threads(torch.get_num_threads()),
}


@pytest.mark.parametrize("how", BESIDE)
def test_a_model_that_does_something_beside_is_not_recorded(always, how):
    always("rows_first")
    fn, params = fb.make_functional(Noting(BESIDE[how]))
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    SEEN.clear()
    with torch.random.fork_rng():
        for _ in range(4):
            assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    assert not is_recorded(fn)


class Dense(nn.Module):
    """Layers that are given what all before them gave, gathered in a list or in a dict."""

    def __init__(self, gather):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3 + 2 * i, 2, dtype=F64) for i in range(3))
        self.gather = gather

    def forward(self, x):
        return self.gather(self.layers, x)


def in_a_list(layers, x):
    found = [x]
    for layer in layers:
        found.append(layer(torch.cat(found, -1)).tanh())  # noqa: PERF401
    return found.pop()


def in_a_dict(layers, x):
    found = {"x": x}
    for i, layer in enumerate(layers):
        found.update({f"{i}": layer(torch.cat(list(found.values()), -1)).tanh()})
    return found["2"]


@pytest.mark.parametrize("gather", [in_a_list, in_a_dict])
def test_what_a_model_gathers_for_one_call_is_recorded(always, gather):
    always("rows_first")
    fn, params = fb.make_functional(Dense(gather))
    ensemble = fb.Ensemble(zoo.members(params))
    for seed in range(4):
        x = randn(4, 3, seed=seed)
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    assert is_recorded(fn)


class Closing:
    """What runs code of its own when it is collected."""

    def numbers(self):
        try:
            yield 1
        finally:
            self.is_closed = True


def test_what_is_collected_meanwhile_does_not_matter(always, monkeypatch):
    always("rows_first")
    fn, params = fb.make_functional(zoo.mlp().double())
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    before = gc.get_threshold()
    gc.set_threshold(1_000_000)
    for _ in range(50):
        closing = Closing()
        closing.generator = closing.numbers()  # which refers to it
        next(closing.generator)

    def collecting(op):
        if gc.isenabled():
            gc.collect()
        return is_known(op)  # noqa: F821

    scope = {
        "__name__": "funcbayes",
        "gc": gc,
        "is_known": _operations._is_known,
    }  # as code that is not watched
    monkeypatch.setattr(_operations, "_is_known", types.FunctionType(collecting.__code__, scope))
    try:
        fb.predict(fn, None, ensemble, x)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
    assert is_recorded(fn)


class Keeping(nn.Module):
    """Keeps something in a list of its own, in one of an object, or in one that is on its layer."""

    def __init__(self, kept):
        super().__init__()
        self.layer, self.kept = nn.Linear(3, 2, dtype=F64), kept
        self.layer.kept = []

    def forward(self, x):
        kept = self.layer.kept if self.kept is None else getattr(self.kept, "seen", self.kept)
        kept.append(len(x))
        return self.layer(x) * (1 if len(kept) < 50 else 2)


class Seen:
    def __init__(self):
        self.seen = []


@pytest.mark.parametrize("make", [list, Seen, lambda: None])
def test_a_module_that_keeps_something_is_not_recorded(always, make):
    always("rows_first")
    fn, params = fb.make_functional(Keeping(make()))
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    for _ in range(4):
        fb.predict(fn, None, ensemble, x)
    assert not is_recorded(fn)


def given_and_filled(params, x, found=()):
    found = [*found] or params["found"]
    found.append(x)
    return linear(params, x)


def given_or_made(params, x):
    found = params["found"] or []
    found.append(x)
    return linear(params, found[-1])


def around_and_filled(params, x):
    found = []

    def fill():
        found.append(x)

    fill()
    return linear(params, *found)


@pytest.mark.parametrize("fn", [given_and_filled, around_and_filled, given_or_made])
def test_lists_that_may_be_those_of_others_are_not_filled_by_what_is_recorded(always, fn):
    always("rows_first")
    ensemble = fb.Ensemble({**zoo.members(linear_params()), "found": []})
    for seed in range(3):
        x = randn(4, 3, seed=seed)
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(linear, ensemble, x))
    assert not is_recorded(fn)


def test_every_call_is_noted_by_a_model_that_notes_it(always):
    always("rows_first")
    calls = []

    def fn(params, x):
        calls.append(len(x))
        return linear(params, x)

    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    fb.predict(fn, None, ensemble, x)
    for _ in range(3):
        before = len(calls)
        fb.predict(fn, None, ensemble, x)
        assert len(calls) > before


def branching(params, x):
    return linear(params, x) if x.sum() > 0 else -linear(params, x)


def reading(params, x):
    return x.tolist()[0][0] * linear(params, x)


def counting(params, x):
    return linear(params, x) * len(x[x > 0])


def indexing(params, x):
    return linear(params, x) * int(x.argmax())


def made_of_numbers(params, x):
    return linear(params, x) * torch.tensor([x[0, 0], x[0, 1]])


def cut_by_numbers(params, x):
    first, *_ = torch.tensor_split(linear(params, x), (x[:1, 0] > 0).long() + 1)
    return first.sum(0, keepdim=True)


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("fn", [branching, reading, counting, indexing, made_of_numbers, cut_by_numbers])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_model_that_goes_by_numbers_is_not_recorded(always, fn, around):
    always("vmap")
    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    with around():
        for sign in (1, -1, 1, -1):
            got = fb.predict(fn, None, ensemble, sign * x).samples
            assert_close(got, expected(fn, ensemble, sign * x))
    assert not is_recorded(fn)


def test_in_inference_mode_there_are_recordings_too(always):
    always("rows_first")
    fn, params = fb.make_functional(zoo.mlp().double())
    ensemble = fb.Ensemble(zoo.members(params))
    with torch.inference_mode():
        for seed in range(3):
            x = randn(4, 3, seed=seed)
            assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
        assert is_recorded(fn)
    x = randn(4, 3, seed=4).requires_grad_()
    samples = fb.predict(fn, None, ensemble, x).samples
    assert_close(
        torch.autograd.grad(samples.sum(), x), torch.autograd.grad(expected(fn, ensemble, x).sum(), x)
    )


def held_transposed(params, x):
    return x @ params["held"].T.contiguous() + params["b"]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_copy_of_what_stays_is_made_anew(always, around):
    always("vmap")
    params = {"held": randn(2, 3), "b": randn(2)}
    ensemble, x = fb.Ensemble({"b": randn(5, 2)}), randn(4, 3)
    with around():
        for _ in range(4):
            got = fb.predict(held_transposed, params, ensemble, x).samples
            assert_close(got, x @ params["held"].T + ensemble.members["b"][:, None])
            params["held"].mul_(2.0)
    assert is_recorded(held_transposed)


def normalized_by_batch(params, x):
    mean, variance = params["mean"].clone(), params["variance"].clone()
    return linear(params, nn.functional.batch_norm(x, mean, variance, training=True)) + mean[:2]


def test_statistics_that_a_kernel_writes_are_those_of_a_copy(always):
    always("vmap")
    statistics = {"mean": torch.zeros(3, dtype=F64), "variance": torch.ones(3, dtype=F64)}
    params = {**linear_params(), **statistics}
    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    wanted = expected(lambda params, x: normalized_by_batch({**params, **statistics}, x), ensemble, x)
    for _ in range(4):
        assert_close(fb.predict(normalized_by_batch, params, ensemble, x).samples, wanted)
        assert not statistics["mean"].any()
    assert is_recorded(normalized_by_batch)


def by_attribute_of_x(params, x):
    return getattr(x, "scale", 1.0) * linear(params, x)


def test_what_users_put_on_tensors_counts(always):
    always("vmap")
    ensemble = fb.Ensemble(zoo.members(linear_params()))
    for scale in (None, None, 3.0, 2.0):
        x = randn(4, 3)
        if scale is not None:
            x.scale = scale
        got = fb.predict(by_attribute_of_x, None, ensemble, x).samples
        assert_close(got, expected(by_attribute_of_x, ensemble, x))
    assert is_recorded(by_attribute_of_x)


def by_type(params, x):
    return linear(params, x[0]) * (2 if isinstance(x[1], float) else 3)


def test_plain_values_are_told_apart_by_type_too(always):
    always("vmap")
    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    for number in (2.0, 2.0, 2, 2.0, 2, True):
        got = fb.predict(by_type, None, ensemble, (x, number)).samples
        assert_close(got, expected(by_type, ensemble, (x, number)))
    assert is_recorded(by_type)


def test_a_function_that_calls_itself_is_not_kept_alive(always):
    always("vmap")

    def make():
        def fn(params, x, depth=1):
            return linear(params, x) if not depth else fn(params, x, depth - 1)

        return fn

    fn, ensemble = make(), fb.Ensemble(zoo.members(linear_params()))
    for _ in range(3):
        fb.predict(fn, None, ensemble, randn(4, 3))
    cell = fn.__closure__[0]
    fn = weakref.ref(fn)
    cell.cell_contents = None
    gc.collect()
    assert fn() is None


def test_sparse_inputs_are_trained_with():
    fn, params = fb.make_functional(nn.Linear(3, 2, dtype=F64))

    def sparse(params, x):
        return fn(params, torch.sparse.mm(x, torch.eye(3, dtype=F64)))

    x, y = randn(4, 3), randn(4, 2)
    batches = [(x.to_sparse(), y)] * 3
    options = {"optimizer": SGD, "num_epochs": 2, "seed": 0}
    got = fb.training.fit(sparse, params, batches, Normal(1.0), **options)
    wanted = fb.training.fit(fn, params, [(x, y)] * 3, Normal(1.0), **options)
    assert all(torch.allclose(got[name], wanted[name]) for name in params)


def test_a_model_that_draws_random_numbers_is_not_recorded(always):
    always("vmap")

    def noisy(params, x):
        return linear(params, x) + torch.rand(len(x), 1, dtype=F64)

    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    with pytest.warns(UserWarning, match="random numbers"):
        one, other = (fb.predict(noisy, None, ensemble, x, seed=seed).samples for seed in (0, 1))
    assert not torch.allclose(one, other)
    assert_close(fb.predict(noisy, None, ensemble, x, seed=0).samples, one)
    assert not is_recorded(noisy)


class Object:
    def __init__(self):
        self.by = 2.0

    def method(self, params, x):
        return self.by * linear(params, x)

    __call__ = method


@pytest.mark.parametrize("of", [lambda o: o, lambda o: o.method, lambda o: functools.partial(o.method)])
def test_an_object_that_may_change_is_not_recorded(always, of):
    always("vmap")
    made = Object()
    fn, ensemble, x = of(made), fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    for made.by in (2.0, 2.0, 2.0, 3.0):
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))


def test_an_object_in_a_variable_around_a_function_may_change(always):
    always("vmap")
    made = Object()

    def fn(params, x):
        return made.by * linear(params, x)

    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    for made.by in (2.0, 2.0, 2.0, 3.0):
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    assert not is_recorded(fn)


def test_a_function_of_a_functional_module_is_recorded(always):
    always("rows_first")
    net, params = fb.make_functional(nn.Linear(3, 2, dtype=F64))

    def fn(params, x):
        return net(params, x)[..., 0].exp()

    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    for _ in range(3):
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    assert is_recorded(fn)


def test_one_tensor_as_two_parameters_is_two_inputs(always):
    always("vmap")
    fn, params = linear, linear_params()
    members = zoo.members({**params, "gain": randn(2)})
    same = fb.Ensemble({**members, "gain": members["b"]})
    for ensemble in (same, same, fb.Ensemble(members), same):
        got = fb.predict(fn, None, ensemble, randn(4, 3)).samples
        assert_close(got, expected(fn, ensemble, randn(4, 3)))
    assert is_recorded(fn)


def in_place(params, x):
    x[:, 0] = 1.0
    return linear(params, x.clamp_(min=0))


def test_inputs_that_are_written_into_are_not_recorded(always):
    always("vmap")
    ensemble = fb.Ensemble(zoo.members(linear_params()))
    for seed in range(4):
        x = randn(4, 3, seed=seed)
        got = fb.predict(in_place, None, ensemble, x.clone()).samples
        assert_close(got, expected(in_place, ensemble, x.clone()))
    assert not is_recorded(in_place)


def given_back(params, x):
    return x + 0 * params["b"].sum() if x.shape[0] > 100 else x.clone()


def test_outputs_are_not_the_inputs(always):
    always("vmap")
    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    for _ in range(4):
        got = fb.predict(given_back, None, ensemble, x)
        assert got.samples.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert is_recorded(given_back)


def made_bound(always):
    """An ensemble with a model whose next call will be a quick one."""
    always("rows_first")
    fn, params = fb.make_functional(zoo.mlp().double())
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    for _ in range(3):
        fb.predict(fn, None, ensemble, x)
    assert _engine.repeated(fn, None, Draw(ensemble.members), x, ensemble, 0) is not None
    return fn, ensemble, x


@pytest.fixture
def bound(always):
    return made_bound(always)


def test_members_that_are_written_into_count(bound):
    fn, ensemble, x = bound
    for write in (by_multiplying, by_numpy, by_data):
        write(ensemble.members["0.weight"])
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))


def by_multiplying(leaf):  # noqa: N802
    leaf.mul_(1.5)


def by_data(leaf):
    leaf.data = 1.5 * leaf


def by_numpy(leaf):
    leaf.numpy()[:] = 0.5


def test_a_leaf_with_other_strides_in_the_same_memory_counts(always):
    always("vmap")
    square = {"w": randn(3, 3), "b": randn(3), "gain": randn()}
    ensemble, x = fb.Ensemble(zoo.members(square)), randn(4, 3)
    for _ in range(3):
        fb.predict(linear, None, ensemble, x)
    assert is_recorded(linear)
    ensemble.members["w"].data = ensemble.members["w"].mT
    assert_close(fb.predict(linear, None, ensemble, x).samples, expected(linear, ensemble, x))


@pytest.mark.parametrize(
    "other", [lambda x: x.mT.contiguous().mT, lambda x: x.float().double(), lambda x: torch.cat([x, x])]
)
def test_inputs_of_other_shapes_and_strides_are_right(bound, other):
    fn, ensemble, x = bound
    for given in (other(x), x, other(x), x):
        assert_close(fb.predict(fn, None, ensemble, given).samples, expected(fn, ensemble, given))


def test_another_model_with_the_same_posterior_is_another_model(bound):
    _, ensemble, x = bound
    other, _ = fb.make_functional(nn.Sequential(zoo.mlp().double(), nn.Tanh()))
    members = {f"0.{name}": leaf for name, leaf in ensemble.members.items()}

    def renamed(params, x):
        return other({f"0.{name}": leaf for name, leaf in params.items()}, x)

    assert_close(fb.predict(renamed, None, ensemble, x).samples, expected(other, fb.Ensemble(members), x))


def test_gradients_are_there_where_they_are_wanted(bound):
    fn, ensemble, x = bound
    x = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(fb.predict(fn, None, ensemble, x).samples.sum(), x)
    (wanted,) = torch.autograd.grad(expected(fn, ensemble, x).sum(), x)
    assert_close(got, wanted)
    likelihood = fb.likelihoods.Normal(torch.tensor(0.5, dtype=F64, requires_grad=True))
    prediction = fb.predict(fn, None, ensemble, x.detach(), likelihood=likelihood)
    assert prediction.variance.requires_grad


def test_transforms_and_autocast_around_see_the_operations(bound):
    fn, ensemble, x = bound
    plain = fb.predict(fn, None, ensemble, x).samples
    mapped = torch.func.vmap(lambda x: fb.predict(fn, None, ensemble, x).samples)(x.expand(2, -1, -1))
    assert_close(mapped, plain.expand(2, -1, -1, -1))
    single = fb.Ensemble({name: leaf.float() for name, leaf in ensemble.members.items()})
    for _ in range(3):
        fb.predict(fn, None, single, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert fb.predict(fn, None, single, x.float()).samples.dtype == torch.bfloat16


@pytest.mark.parametrize("keep_samples", [True, False])
def test_a_quick_call_gives_the_same_prediction(bound, keep_samples):
    fn, ensemble, x = bound
    options = {"likelihood": fb.likelihoods.Normal(0.3), "keep_samples": keep_samples, "targets": randn(4, 2)}
    got = fb.predict(fn, None, ensemble, x, **options)
    wanted = fb.predict(fn, None, ensemble, x, chunk_size=1, **options)
    for name in ("mean", "variance", "aleatoric_variance", "weights"):
        assert_close(getattr(got, name), getattr(wanted, name))
    assert_close(got.log_prob(), wanted.log_prob())


def test_what_a_user_does_to_a_prediction_stays_there(bound):
    fn, ensemble, x = bound
    before = fb.predict(fn, None, ensemble, x)
    samples, weights = before.samples.clone(), before.weights.clone()
    before.samples.zero_()
    before.weights.zero_()
    after = fb.predict(fn, None, ensemble, x)
    assert_close(after.samples, samples)
    assert_close(after.weights, weights)


def test_what_is_bound_to_a_posterior_lives_as_long_as_it(always):
    _, ensemble, _ = made_bound(always)  # a fixture would be kept alive itself
    leaf = weakref.ref(ensemble.members["0.weight"])
    del ensemble
    gc.collect()
    assert leaf() is None


FITS = {
    "one": lambda fn, params, data, **options: fb.training.fit(fn, params, data, **options),
    "members": lambda fn, params, data, **options: (
        fb.ensemble.fit(fn, zoo.members(params, 3), data, chunk_size=2, **options).members
    ),
    "swag": lambda fn, params, data, **options: fb.swag.fit(fn, params, data, **options).mean,
    "vi": lambda fn, params, data, **options: fb.vi.fit(fn, params, data, **options).mean,
    "vi with a schedule": lambda fn, params, data, **options: (
        fb.vi.fit(fn, params, data, kl_weight=lambda step: 1 / (7 + step), **options).mean
    ),
}


@pytest.mark.parametrize("name", ["mlp_dropout", "conv_dropout", "residual", "transformer_dropout", "linear"])
@pytest.mark.parametrize("fit", FITS)
def test_training_is_bit_for_bit_what_it_is_without_recording(monkeypatch, fit, name):
    model = MODELS[name]()
    with torch.no_grad():
        shape = model.run(model.params, model.inputs(10)).shape
    likelihood = Normal(0.5) if len(shape) > 2 or name == "linear" else Categorical()
    y = randn(*shape) if isinstance(likelihood, Normal) else torch.arange(10) % shape[-1]
    options = {
        "likelihood": likelihood,
        "optimizer": SGD,
        **{"num_epochs": 4, "batch_size": 4, "seed": 0},  # the last batch has 2 rows
    }
    results = []
    for is_possible in (Recorded.is_possible, lambda self, function: False):
        calls = []
        monkeypatch.setattr(Recorded, "is_possible", is_possible)
        original = Recorded.holds
        monkeypatch.setattr(Recorded, "holds", lambda *a, _o=original, _c=calls: _noted(_o(*a), _c))
        results.append(FITS[fit](model.fn, model.params, (model.inputs(10), y), **options))
        monkeypatch.setattr(Recorded, "holds", original)
        assert any(calls) == (len(results) == 1)
    one, other = map(tensors, results)
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _noted(found, calls):
    calls.append(found)
    return found


class Callable:
    by = 2.0

    def __call__(self, module, x):
        return self.by * module(x)


def test_an_object_that_calls_a_module_may_change(always):
    always("rows_first")
    call = Callable()
    fn, params = fb.make_functional(nn.Linear(3, 2, dtype=F64), call=call)
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    for call.by in (2.0, 2.0, 2.0, 3.0):
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))


def thrice(params, x, factor=3):
    return factor * linear(params, x)


def by_code(params, x):
    return helped(params, x)


def helped(params, x, factor=1):
    return 4 * linear(params, x)


@pytest.mark.parametrize("part", ["__code__", "__defaults__"])
@pytest.mark.parametrize("which", ["itself", "another"])
def test_a_function_whose_code_is_replaced_is_another_one(always, monkeypatch, which, part):
    always("vmap")
    fn = types.FunctionType(by_code.__code__, globals(), "fn", (1,))
    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    for _ in range(3):
        fb.predict(fn, None, ensemble, x)
    assert is_recorded(fn)
    changed = fn if which == "itself" else helped
    monkeypatch.setattr(changed, "__code__", thrice.__code__)
    monkeypatch.setattr(changed, "__defaults__", (3,) if part == "__code__" else (5,))
    assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))


class OfClassTensor(Scaled):
    by = torch.tensor(2.0, dtype=F64)

    def forward(self, x):
        return self.by.exp() * self.layer(x)


def test_numbers_of_a_tensor_in_a_class_may_change(always):
    always("rows_first")
    fn, params = fb.make_functional(OfClassTensor())
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    for number in (2.0, 2.0, 2.0, 1.0):
        OfClassTensor.by.data.fill_(number)
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    assert is_recorded(fn)


def made_by_a_class(params, x):
    return linear(params, x) * torch.DoubleTensor([x[0, 0], x[0, 1]])


def copied_by_python(params, x):
    return linear(params, x) * torch.stack([*map(torch.DoubleTensor, ([len(x)], [x[0, 1]]))]).sum()


def at_its_offset(params, x):
    return linear(params, x.as_strided(x.shape, x.stride(), x.storage_offset()))


@pytest.mark.filterwarnings("ignore:.*torch.tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("fn", [made_by_a_class, copied_by_python, at_its_offset])
def test_numbers_that_python_has_seen_are_no_part_of_a_recording(always, fn):
    always("vmap")
    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(16, 3)
    for start in (0, 4, 8, 12):
        got = fb.predict(fn, None, ensemble, x[start : start + 4]).samples
        assert_close(got, expected(fn, ensemble, x[start : start + 4]))
    assert not is_recorded(fn)


def test_parts_of_inputs_made_in_inference_mode_are_taken(always):
    always("rows_first")
    fn, params = fb.make_functional(nn.Linear(3, 2, dtype=F64))
    ensemble = fb.Ensemble(zoo.members(params))
    with torch.inference_mode():
        x = randn(4, 9, 3)
        for start in range(4):
            part = x[:, start : start + 5]
            assert_close(fb.predict(fn, None, ensemble, part).samples, expected(fn, ensemble, part))


class Shown(torch.Tensor):
    pass


def test_tensors_of_other_classes_are_given_to_the_model(always):
    always("vmap")

    def fn(params, x):
        seen.append(type(x))
        return linear(params, x)

    seen, ensemble = [], fb.Ensemble(zoo.members(linear_params()))
    plain = types.FunctionType(linear.__code__, linear.__globals__)
    for x in [randn(4, 3)] * 3 + [randn(4, 3).as_subclass(Shown)]:
        for f in (fn, plain):
            assert_close(
                torch.Tensor(fb.predict(f, None, ensemble, x).samples),
                expected(linear, ensemble, randn(4, 3)),
            )
    assert Shown in seen


def test_outputs_that_are_views_of_members_are_others_each_time(always):
    always("vmap")

    def fn(params, x):
        return params["w"].T

    ensemble, x = fb.Ensemble(zoo.members(linear_params())), randn(4, 3)
    for _ in range(4):
        samples = fb.predict(fn, None, ensemble, x).samples
        assert samples.shape == (5, 3, 2)
        samples.unsqueeze_(0)


DROPPING = [name for name in MODELS if "dropout" in name]
FOLDED = ["mlp_dropout", "conv_dropout"]
CASES = [*((name, kind) for name in DROPPING for kind in KINDS), *((name, "folded") for name in FOLDED)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_recorded_masks_are_those_of_the_seed_and_of_the_rows(always, name, kind):
    always(kind)
    model = MODELS[name]()
    batches = [model.inputs(4), model.inputs(5)[:4], model.inputs(6)[:4], model.inputs(3)]
    for seed in range(3):
        options = {"num_samples": 6, "seed": seed, "labelled": False}
        got = fb.predict_batches(model.fn, model.params, fb.Dropout(), batches, **options)
        wanted = fb.predict_batches(model.fn, model.params, fb.Dropout(), batches, chunk_size=1, **options)
        assert_close(got.samples, wanted.samples)
    assert is_recorded(model.fn)


@pytest.fixture
def dropping(always, monkeypatch):
    """A model whose next call with draws of dropout will be a quick one, and how often there was none."""
    always("rows_first")
    fn, params = fb.make_functional(
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 2)).double()
    )
    for seed in range(3):
        drops(fn, params, seed=seed)
    slow, evaluate = [], _predict.evaluate
    monkeypatch.setattr(_predict, "evaluate", lambda *args, **kw: slow.append(1) or evaluate(*args, **kw))
    return fn, params, slow


def drops(fn, params, x=None, posterior=None, **options):
    x = randn(4, 3) if x is None else x
    return fb.predict(fn, params, posterior or fb.Dropout(), x, **{"num_samples": 5, **options})


@pytest.mark.parametrize("keep_samples", [True, False])
def test_a_quick_call_of_dropout_gives_the_same_prediction(dropping, keep_samples):
    fn, params, slow = dropping
    other = {name: 0.5 * leaf for name, leaf in params.items()}
    options = {"likelihood": fb.likelihoods.Normal(0.3), "keep_samples": keep_samples, "targets": randn(4, 2)}
    for own, seed, x in (
        (params, 7, randn(4, 3)),
        (other, 8, randn(4, 3, seed=1)),
        (params, torch.tensor(9), None),
    ):
        got = drops(fn, own, x, seed=seed, **options)
        assert not slow
        wanted = drops(fn, own, x, seed=seed, chunk_size=1, **options)
        slow.clear()
        for name in ("mean", "variance", "aleatoric_variance", "weights"):
            assert_close(getattr(got, name), getattr(wanted, name))
        assert_close(got.log_prob(), wanted.log_prob())


def test_a_quick_call_of_dropout_without_a_seed_takes_one_from_the_global_state(dropping):
    fn, params, slow = dropping
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first, second = drops(fn, params).samples, drops(fn, params).samples
        after = torch.rand(())
        assert not slow
        torch.manual_seed(3)
        wanted = [drops(fn, params, chunk_size=1).samples for _ in range(2)]
        assert torch.rand(()) == after
    assert_close(torch.stack([first, second]), torch.stack(wanted))
    assert not torch.equal(first, second)


def test_quick_calls_of_dropout_have_the_masks_of_their_rows(dropping):
    fn, params, slow = dropping
    batches, options = list(randn(12, 3).split(4)), {"num_samples": 5, "seed": 1, "labelled": False}
    got = fb.predict_batches(fn, params, fb.Dropout(), batches, **options).samples
    assert not slow
    assert_close(got, fb.predict_batches(fn, params, fb.Dropout(), batches, chunk_size=1, **options).samples)


def test_fixed_draws_of_dropout_are_quick_too(dropping):
    fn, params, slow = dropping
    fixed = fb.to_ensemble(fb.Dropout(), 5, seed=4)
    got = fb.predict(fn, params, fixed, randn(4, 3)).samples
    assert not slow
    assert_close(got, drops(fn, params, seed=4, chunk_size=1).samples)


OTHER = {
    "rate": {"posterior": fb.Dropout(rate=0.2)},
    "where": {"posterior": fb.Dropout(where="2")},
    "one mask for all rows": {"posterior": fb.Dropout(shared_mask=True)},
    "number": {"num_samples": 6},
    "rows": {"x": randn(5, 3)},
    "strides": {"x": randn(3, 4).mT},
    "precision": {"dtype": torch.float32},
    "size": {"chunk_size": 2},
}


@pytest.mark.parametrize("options", OTHER.values(), ids=OTHER)
def test_another_kind_of_call_of_dropout_is_not_the_same_call(dropping, options):
    fn, params, slow = dropping
    got = drops(fn, params, seed=2, **options).samples
    assert slow
    wanted = drops(fn, params, seed=2, **{**options, "chunk_size": 1}).samples
    assert_close(got, wanted)


def test_gradients_of_draws_of_dropout_are_there_where_they_are_wanted(dropping):
    fn, params, _ = dropping
    for x, own in (
        (randn(4, 3).requires_grad_(), params),
        (randn(4, 3), {name: leaf.clone().requires_grad_() for name, leaf in params.items()}),
    ):
        wanted = x if x.requires_grad else own["0.weight"]
        got, loop = (
            torch.autograd.grad(drops(fn, own, x, seed=1, chunk_size=size).samples.square().sum(), wanted)
            for size in (None, 1)
        )
        assert_close(got, loop)
    single = {name: leaf.float() for name, leaf in params.items()}
    for _ in range(3):
        drops(fn, single, randn(4, 3).float(), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert drops(fn, single, randn(4, 3).float(), seed=1).samples.dtype == torch.bfloat16


def test_parameters_of_quick_calls_are_not_kept_alive(dropping):
    fn, params, slow = dropping
    params = {name: leaf.clone() for name, leaf in params.items()}
    drops(fn, params, seed=1)
    assert not slow
    leaf = weakref.ref(params["0.weight"])
    del params
    gc.collect()
    assert leaf() is None


@pytest.mark.parametrize("posterior", ["gaussian", "ensemble", "dropout"])
def test_draws_are_made_once_a_call(always, monkeypatch, posterior):
    always("rows_first")
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2)).double())
    variances = {name: leaf.square() + 1 for name, leaf in params.items()}
    posterior = {
        "gaussian": fb.Gaussian(params, fb.covariances.Diagonal(variances)),
        "ensemble": fb.Ensemble(zoo.members(params)),
        "dropout": fb.Dropout(),
    }[posterior]
    made, draws = [], type(posterior).draws
    monkeypatch.setattr(type(posterior), "draws", lambda *args: made.append(len(args[1])) or draws(*args))
    for seed in range(4):
        made.clear()
        fb.predict(fn, params, posterior, randn(4, 3), num_samples=5, seed=seed)
    assert is_recorded(fn)
    assert made == [5]


@pytest.mark.parametrize("beta", [1, 2])
def test_of_factors_only_one_is_left_out(always, beta):
    """`vmap` takes apart what adds a product, and multiplies by factors that are 1."""
    always("vmap")

    def fn(params, x):
        return torch.addmm(params["b"], x, params["w"].mT, beta=beta)

    ensemble = fb.Ensemble(zoo.members(linear_params()))
    for seed in range(3):
        x = randn(4, 3, seed=seed)
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected(fn, ensemble, x))
    (tuner,) = _engine._tuners._values[fn].values()
    ((_, recording),) = next(iter(tuner.recorded._recordings.values()))
    run = recording.program.run
    called = [run.__globals__.get(name) for name in run.__code__.co_names]
    assert (torch.mul in called) == (beta != 1)


def test_draws_and_parameters_may_be_those_of_a_module(always):
    always("rows_first")
    net = zoo.mlp().double()
    fn, _ = fb.make_functional(net)
    ensemble, params = fb.Ensemble(zoo.members(dict(net.named_parameters()))), dict(net.named_parameters())
    head = fb.Ensemble({name: leaf for name, leaf in ensemble.members.items() if name.startswith("2")})
    with torch.no_grad():
        for seed in range(3):
            x = randn(4, 3, seed=seed)
            draws = [{**params, **head.member(i)} for i in range(head.num_members)]
            wanted = torch.stack([fn(draw, x) for draw in draws])
            assert_close(fb.predict(fn, params, head, x).samples, wanted)
    assert is_recorded(fn)


def test_no_gradient_is_followed_in_what_a_model_takes_from_elsewhere(always, monkeypatch):
    always("vmap")
    monkeypatch.setitem(globals(), "ELSEWHERE", randn(3, 2))
    posteriors = fb.Dropout(), fb.Ensemble({"b": randn(5, 2)})

    def fn(params, x):
        return nn.functional.dropout(x, 0.5) @ ELSEWHERE + params["b"]  # noqa: F821

    options = {"num_samples": 5, "seed": 0}
    for posterior, params in zip(posteriors, ({"b": randn(2)}, None), strict=True):
        model = fn if params is not None else lambda params, x: x @ ELSEWHERE + params["b"]  # noqa: F821
        given = options if params is not None else {}
        for _ in range(3):
            fb.predict(model, params, posterior, randn(4, 3), **given)
        ELSEWHERE.requires_grad_()  # noqa: F821
        assert not fb.predict(model, params, posterior, randn(4, 3), **given).samples.requires_grad
        ELSEWHERE.requires_grad_(False)  # noqa: F821


FIRST_CALLS = """
import sys, torch, funcbayes as fb
fn, params = fb.make_functional(torch.nn.Sequential(torch.nn.Linear(3, 300), torch.nn.Dropout(0.3)))
for seed in range(20):
    fb.predict(fn, params, fb.Dropout(), torch.ones(2, 3), num_samples=8, seed=seed)
tuners = fb._engine._tuners._values[fn].values()
assert any(tuner.recorded._recordings for tuner in tuners)
assert "torch._dynamo" not in sys.modules, "torch's compiler was loaded, which takes seconds"
"""


def test_the_compiler_is_not_loaded_to_record_masks():
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
