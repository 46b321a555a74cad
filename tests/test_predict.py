"""``predict``: every posterior through every model, against a loop over the draws."""

import collections
import copy
import functools
import gc
import threading
import time
import warnings
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from zoo import (
    F64,
    LOOPED_MODELS,
    MODELS,
    POSTERIORS,
    SLOW_MODELS,
    WITH_FIXED,
    expected_samples,
    gaussian,
    linear,
    linear_params,
    pairs,
    randn,
)

import funcbayes as fb
from funcbayes import _engine, _layout, _threads
from funcbayes._functorch import physical
from funcbayes.covariances import Diagonal
from funcbayes.likelihoods import Categorical, Normal

S = 7  # draws, a prime: chunks are ragged
CHUNK_SIZES = (None, 1, 3, S, 20)
# torch's own: vmap says of operations without a batching rule that it maps them slowly, and
# forward-mode derivatives load decompositions through torch.jit.script.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def saying(text):
    return lambda message: f"{text}: {message}"


# Vectorised equals looped.


# What differs in the draws themselves; other posteriors have draws like these, found in other ways.
KINDS_OF_DRAWS = (
    *("point", "gaussian", "gaussian_head_only", "gaussian_all_but_head"),
    *("linearized", "linearized_head_only", "join_linearized"),
    *(*WITH_FIXED, *zoo.RAGGED, *zoo.DROPOUTS),
)


@pytest.mark.parametrize("num_rows", [1, 5])
@pairs(KINDS_OF_DRAWS)
def test_one_pass_equals_a_loop_over_draws_for_every_chunk_size(make_model, make_posterior, num_rows):
    model = make_model()
    posterior, x = make_posterior(model), model.inputs(num_rows)
    expected = expected_samples(model, posterior, x, S, 3)
    for chunk_size in (None, 1, 3, S + 1) if num_rows > 1 else (None, 3):  # one row has another layout
        got = fb.predict(model.fn, model.params, posterior, x, num_samples=S, seed=3, chunk_size=chunk_size)
        assert_close(got.samples, expected, msg=saying(f"chunk_size={chunk_size}"))


@pairs(set(POSTERIORS) - set(KINDS_OF_DRAWS))
def test_one_pass_equals_a_loop_over_draws_for_every_posterior(make_model, make_posterior):
    model = make_model()
    posterior, x = make_posterior(model), model.inputs(5)
    got = fb.predict(model.fn, model.params, posterior, x, num_samples=S, seed=3, chunk_size=3)
    assert_close(got.samples, expected_samples(model, posterior, x, S, 3))


@pytest.mark.parametrize("num_rows", [1, 6])
@pytest.mark.parametrize("name", MODELS)
def test_results_stay_right_while_the_engine_learns_which_mechanism_is_fastest(name, num_rows):
    model = MODELS[name]()
    x, posterior = model.inputs(num_rows), zoo.gaussian(model.params)
    expected = expected_samples(model, posterior, x, S, 3)
    for call in range(40):
        got = fb.predict(model.fn, model.params, posterior, x, num_samples=S, seed=3)
        assert_close(got.samples, expected, msg=saying(f"call {call}"))


@pytest.mark.parametrize(("disturbed", "is_found"), [((), True), ((1,), True), ((3,), True), ((1, 3), False)])
def test_one_disturbed_timing_of_a_mechanism_does_not_decide(disturbed, is_found):
    """A timing after another mechanism's is three times as long; those disturbed are 1.8 times."""
    kinds = ("loop", "vmap", "rows_first", "channels_last")
    best, second, third, hopeless = (_engine.Mechanism(kind, 8) for kind in kinds)
    true = {second: 1.3, third: 1.6, best: 1.0, hopeless: 3.0}
    tuner, last = _engine._Tuner([second, third, best, hopeless]), None
    while mechanism := tuner.next_to_time():
        number = len(tuner.seconds.get(mechanism, ()))
        factor = 3.0 if mechanism != last else 1.8 if mechanism == best and number in disturbed else 1.0
        tuner.record(mechanism, 0.01 * true[mechanism] * factor / 8)
        last = mechanism
    assert (tuner.fastest() == best) == is_found
    assert [len(tuner.seconds[m]) for m in (best, hopeless)] == [4, 2]  # what is slow is not tried for ever


@pytest.mark.parametrize(("seconds", "times"), [(0.01, 4), (1.0, 1)])
def test_a_mechanism_that_is_far_off_is_timed_once_where_that_takes_long(seconds, times):
    loop, other = _engine.Mechanism("loop", 2), _engine.Mechanism("vmap", 2)
    tuner = _engine._Tuner([loop, other])
    while mechanism := tuner.next_to_time():
        tuner.record(mechanism, seconds if mechanism == loop else 1.7 * seconds)
    assert tuner.fastest() == loop
    assert len(tuner.seconds[other]) == times


@pytest.mark.parametrize(("others", "is_found"), [(1.1, True), (0.9, False)])
def test_one_lucky_timing_of_another_mechanism_does_not_take_the_place_of_the_loop(others, is_found):
    """The other is usually slower or faster by a tenth, and was once so fast as never again."""
    loop, other = _engine.Mechanism("loop", 8), _engine.Mechanism("threads", 8)
    tuner = _engine._Tuner([other, loop])
    while mechanism := tuner.next_to_time():
        number = len(tuner.seconds.get(mechanism, ()))
        tuner.record(mechanism, 1.0 if mechanism == loop else 0.85 if number == 1 else others)
    assert (tuner.fastest() == loop) == is_found
    assert {len(times) for times in tuner.seconds.values()} == {10}


def test_an_accelerator_is_waited_for_around_what_is_timed(monkeypatch):
    events, find = [], _engine._Run._candidates

    def on_an_accelerator(run):
        found = find(run)
        run.tuner.queue = torch.device("cuda")
        return found

    monkeypatch.setattr(_engine._Run, "_candidates", on_an_accelerator)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(_engine.time, "perf_counter", lambda: events.append("read") or float(len(events)))
    fn, params = fb.make_functional(nn.Linear(3, 2))
    x, q = torch.ones(4, 3), zoo.gaussian(params)
    fb.predict(fn, None, q, x, num_samples=S, seed=0)
    assert events == ["wait", "read", "wait", "read"]
    for _ in range(40):
        fb.predict(fn, None, q, x, num_samples=S, seed=0)
    count = len(events)
    fb.predict(fn, None, q, x, num_samples=S, seed=0)
    assert len(events) == count  # once all is learned


def test_the_loop_is_one_of_the_mechanisms_on_other_devices_too(monkeypatch):
    tried, find = [], _engine._Run._candidates
    monkeypatch.setattr(_engine._Run, "_candidates", lambda run: tried.extend(find(run)) or tried)
    fn, params = fb.make_functional(nn.Linear(3, 2))
    q = fb.to(zoo.gaussian(params), device="meta")
    fb.predict(fn, None, q, torch.ones(4, 3, device="meta"), num_samples=64, seed=0)
    assert {m.kind for m in tried} == {"channels_last", "loop", "vmap"}
    assert {m.chunk for m in tried if m.kind != "loop"} == {64}


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def divided(monkeypatch):
    """Numbers of draws that threads were given."""
    counts = []

    def noting(function, entries):
        is_main = threading.current_thread() is threading.main_thread()
        counts.append(len(entries) if is_main else "asked for by a thread of ours")
        return _threads.side_by_side(function, entries)

    monkeypatch.setattr(_engine, "side_by_side", noting)
    return counts


def _always(monkeypatch, *mechanism):
    monkeypatch.setattr(_engine._Tuner, "next_to_time", lambda self: None)
    monkeypatch.setattr(_engine._Tuner, "fastest", lambda self: _engine.Mechanism(*mechanism))


def assert_an_ensemble_is_right(fn, params, times):
    ensemble, x = fb.Ensemble(zoo.members(params)), torch.ones(2, 3)
    expected = torch.stack([fn(ensemble.member(k), x) for k in range(ensemble.num_members)])
    for _ in range(times):
        torch.testing.assert_close(fb.predict(fn, None, ensemble, x).samples, expected)


@pytest.mark.parametrize("name", MODELS)
def test_draws_evaluated_in_threads_equal_the_loop(monkeypatch, three_threads, divided, name):
    monkeypatch.setattr(_engine._Run, "_ways", lambda self, kind: [kind])  # no loop in the place of threads
    model = MODELS[name]()
    x, posterior = model.inputs(6), zoo.gaussian(model.params)
    expected = expected_samples(model, posterior, x, 8, 3)
    _always(monkeypatch, "threads", 5)
    for _ in range(2):  # the second time in the modules of the first
        got = fb.predict(model.fn, model.params, posterior, x, num_samples=8, seed=3)
        assert_close(got.samples, expected)
    # But for the first chunk, which shows whether the model draws random numbers of its own.
    assert divided == ([3, 5, 3] if isinstance(model.fn, fb.FunctionalModule) else [])


@pytest.mark.parametrize("name", [m for m in MODELS if m not in ("conv_view", *zoo.WRITTEN)])
def test_a_loop_with_images_in_another_layout_equals_the_loop(monkeypatch, name):
    monkeypatch.setattr(_engine._Run, "_ways", lambda self, kind: [kind])  # no other in its place
    model = MODELS[name]()
    x, posterior = model.inputs(6), zoo.gaussian(model.params)
    expected = expected_samples(model, posterior, x, 8, 3)
    _always(monkeypatch, "loop_channels_last", 5)
    for _ in range(2):
        got = fb.predict(model.fn, model.params, posterior, x, num_samples=8, seed=3)
        assert_close(got.samples, expected)


def test_images_that_come_of_a_loop_in_another_layout_lie_in_memory_as_others(monkeypatch):
    fn, params = fb.make_functional(nn.Conv2d(2, 3, 3))
    _always(monkeypatch, "loop_channels_last", 8)
    for _ in range(2):
        got = fb.predict(fn, None, zoo.gaussian(params), randn(6, 2, 5, 5).float(), num_samples=8, seed=3)
        assert got.samples.is_contiguous()


class NoticesLayout(nn.Module):
    """Remembers how its inputs lie in memory; as a class, for all of its copies."""

    seen: ClassVar[list] = []

    def __init__(self, flat):
        super().__init__()
        self.conv, self.drop, self.head = nn.Conv2d(2, 4, 3), nn.Dropout(0.5), nn.Linear(16, 2)
        self.flat = flat

    def forward(self, x):
        with torch._C.DisableTorchFunction():  # unnoticed
            self.seen.append(physical(x).is_contiguous(memory_format=torch.channels_last))
        return self.head(self.flat(F.max_pool2d(self.drop(self.conv(x)), 2)))


def written_into(h):
    h.flatten(1).add_(1.0)
    return h.reshape(len(h), -1)


def written_into_later(h):
    flat = h.flatten(1)
    h.add_(1.0)
    return flat


def by_strides(h):
    return h.as_strided((len(h), 16), (16, 1))


def by_layout(h):
    return h.flatten(1) if h.is_contiguous() else -h.flatten(1)


def by_layout_unnoticed(h):
    with torch._C.DisableTorchFunction():
        return by_layout(h)


# Of these the first inputs do not show that something is written into.


def clamped(h):
    h.flatten(1).clamp_(max=30.0)
    return h.reshape(len(h), -1)


def clamped_by_keywords(h):
    F.hardtanh(input=torch.flatten(input=h, start_dim=1), min_val=-1e9, max_val=30.0, inplace=True)
    return h.reshape(len(h), -1)


def clamped_into(h):
    flat = h.flatten(1)
    torch.clamp(flat, max=30.0, out=flat)
    return h.reshape(len(h), -1)


def clamped_several(h):
    torch._foreach_clamp_max_([h.flatten(1)], 30.0)
    return h.reshape(len(h), -1)


def clamped_items(h):
    flat = h.flatten(1)
    flat[flat > 30.0] = 30.0
    return h.reshape(len(h), -1)


def clamped_with_channels_last(h):  # where that is a view, and a copy otherwise
    t = h.permute(0, 2, 3, 1).contiguous().clamp_(max=30.0)
    return h.flatten(1) + t.mean((1, 2, 3)).unsqueeze(1)


def clamped_as_contiguous(h):
    h.to(memory_format=torch.contiguous_format).clamp_(max=30.0)
    return h.flatten(1)


def clamped_and_caught(h):
    try:
        h.flatten(1).clamp_(max=30.0)
    except RuntimeError:
        pass
    return h.reshape(len(h), -1)


FLAT = {
    **{"flatten": (lambda h: h.flatten(1), True), "reshape": (lambda h: h.reshape(len(h), -1), True)},
    "written into before": (lambda h: h.add_(1.0).flatten(1), True),
    "written into what came of it": (lambda h: F.relu(h.flatten(1) + 1.0, inplace=True), True),
    "view": (lambda h: h.view(len(h), -1), False),
    **{f.__name__: (f, False) for f in (written_into, written_into_later, by_strides, by_layout)},
    "by_layout_unnoticed": (by_layout_unnoticed, False),
    **{f.__name__: (f, False) for f in (clamped, clamped_by_keywords, clamped_into, clamped_several)},
    **{f.__name__: (f, False) for f in (clamped_items, clamped_with_channels_last, clamped_as_contiguous)},
    "clamped_and_caught": (clamped_and_caught, False),
}


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", FLAT)
def test_a_loop_in_another_layout_is_left_where_the_model_depends_on_it(monkeypatch, name, drops):
    torch.manual_seed(0)
    flat, is_taken = FLAT[name]
    fn, params = fb.make_functional(NoticesLayout(flat).double())
    q = fb.Dropout() if drops else zoo.gaussian(params)
    x, options = 40 * randn(6, 2, 6, 6), {"num_samples": 8, "seed": 3}
    expected = fb.predict(fn, params, q, x, chunk_size=1, **options).samples
    _always(monkeypatch, "loop_channels_last", 5)
    if name != "by_layout_unnoticed":  # inputs that tell little
        fb.predict(fn, params, q, torch.zeros_like(x), **options)
    if name != "view":  # inputs for which nothing changes
        fb.predict(fn, params, q, x.contiguous(memory_format=torch.channels_last), **options)
    for _ in range(2):
        NoticesLayout.seen.clear()
        assert_close(fb.predict(fn, params, q, x, **options).samples, expected)
    assert NoticesLayout.seen == [is_taken] * 8


def copied_and_written(h):  # a copy here, and a view where images are in channels_last
    copy = h.permute(0, 2, 3, 1).contiguous()
    copy.add_(1.0)
    return h.flatten(1).mean(1) + copy.mean((1, 2, 3))


# Inside of `vmap` there is no telling how a value lies in memory.
WRITING = {name: f for name, (f, _) in FLAT.items() if not name.startswith("by_layout")} | {
    "copied_and_written": copied_and_written
}


def images_written(write, depth):
    """A model that writes into the outputs of a convolution, an ensemble of it, and inputs."""

    def fn(params, x):
        for i in range(depth):
            x = F.conv2d(x, params[i])
        return write(x)

    kernels = [randn(5, 4 if i == depth - 1 else 2, 2, 3, 3, seed=i) for i in range(depth)]
    return fn, fb.Ensemble(kernels), 40 * randn(6, 2, 2 + 2 * depth, 2 + 2 * depth)


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("depth", [1, 2])  # all draws have one input, or inputs of their own
@pytest.mark.parametrize("write", WRITING.values(), ids=WRITING.keys())
def test_writing_into_images_that_were_reshaped_is_what_it_is_in_a_loop(write, depth):
    fn, ensemble, x = images_written(write, depth)
    expected = torch.stack([fn(ensemble.member(k), x) for k in range(5)])
    for chunk_size in (5, 2, *[None] * 30):  # by every mechanism that is tried
        assert_close(fb.predict(fn, None, ensemble, x, chunk_size=chunk_size).samples, expected)


def moved_by_positions(h):  # as transformers of images do
    tokens = h.flatten(2).transpose(1, 2)
    tokens += torch.arange(4.0)[:, None]
    return tokens.mean(1)


def scaled_in_place(h):  # as dropout may be behind global pooling
    return F.adaptive_avg_pool2d(h, 1).flatten(1).mul_(2.0)


@pytest.mark.parametrize("write", [moved_by_positions, scaled_in_place])
def test_values_whose_view_is_one_in_the_model_are_written_into_without_giving_up_rules(monkeypatch, write):
    tuners, find = [], _engine._Run._tuner
    monkeypatch.setattr(_engine._Run, "_tuner", lambda run: tuners.append(find(run)) or tuners[-1])
    _always(monkeypatch, "channels_last", 5)
    fn, ensemble, x = images_written(write, depth=2)
    expected = torch.stack([fn(ensemble.member(k), x) for k in range(5)])
    for _ in range(2):
        assert_close(fb.predict(fn, None, ensemble, x).samples, expected)
    assert not any(tuner.failed for tuner in tuners)


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
def test_strides_of_a_value_that_was_rearranged_are_those_of_the_model():
    def fn(params, x):
        return F.linear(x, params["w"]).t().as_strided((4,), (1,))[None]

    ensemble, x = fb.Ensemble({"w": randn(5, 4, 3)}), randn(6, 3)
    expected = torch.stack([fn(ensemble.member(k), x) for k in range(5)])
    for chunk_size in (5, 1, *[None] * 20):
        assert_close(fb.predict(fn, None, ensemble, x[:1], chunk_size=chunk_size).samples, expected)


def test_rules_that_stand_in_the_way_are_tried_once_a_call_where_chunks_have_a_size():
    sizes = []

    def fn(params, x):
        sizes.append(len(physical(params[0])) if physical(params[0]).ndim == 5 else 1)
        return written_into_later(F.conv2d(x, params[0]))

    _, ensemble, x = images_written(written_into_later, depth=1)
    expected = torch.stack([fn(ensemble.member(k), x) for k in range(5)])
    fb.predict(fn, None, ensemble, x, chunk_size=2)
    sizes.clear()
    assert_close(fb.predict(fn, None, ensemble, x, chunk_size=2).samples, expected)
    assert sizes == [2, 2, 2, 1]  # once more in the first chunk


@pytest.mark.parametrize("write", [written_into, written_into_later, clamped])
def test_a_compiled_model_may_write_into_images_that_were_reshaped(monkeypatch, write):
    monkeypatch.setattr(_engine, "compiled", lambda owner, key, evaluate, tree: evaluate(tree))
    fn, ensemble, x = images_written(write, depth=2)
    expected = torch.stack([fn(ensemble.member(k), x) for k in range(5)])
    assert_close(fb.predict(fn, None, ensemble, x, compile=True).samples, expected)


@pytest.mark.parametrize(
    ("change", "is_rounding"),
    [
        (lambda t: t * (1 + 1e-6), True),
        (lambda t: t * (1 + 1e-3), False),
        (lambda t: t + torch.tensor([0.0, 1.0]), False),  # little beside the other column
        (lambda t: t.nan_to_num(), False),
        (lambda t: t.double(), False),
        (lambda t: t[:, :1], False),
    ],
)
def test_outputs_agree_if_each_column_does(change, is_rounding):
    outputs = torch.tensor([[1e4, 1.0], [-3e4, 2.0], [float("inf"), float("nan")]])
    assert _layout.agree(change(outputs), outputs, outputs) == is_rounding
    assert _layout.agree(outputs.long()[:2], outputs.long()[:2], outputs)


def test_a_column_that_is_left_of_a_difference_agrees_to_the_last_digits():
    outputs = torch.tensor([[10.0, 1e-7], [-20.0, 0.0]])
    assert _layout.agree(outputs + torch.tensor([0.0, 1e-6]), outputs, outputs)
    assert not _layout.agree(outputs + torch.tensor([0.0, 1e-3]), outputs, outputs)


def test_outputs_agree_to_the_digits_of_the_inputs():
    outputs = torch.tensor([[1.0], [2.0]], dtype=F64)
    for x, is_rounding in ((outputs.float(), True), (outputs, False)):
        assert _layout.agree(outputs * (1 + 1e-6), outputs, x) == is_rounding


def test_a_model_that_depends_on_the_layout_for_some_inputs_only_is_watched_at_every_call(monkeypatch):
    class FillsGaps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(64, 2)

        def forward(self, x):
            h = self.conv(x.nan_to_num())
            if x.isnan().any():
                h.flatten(1).mul_(0.5)
            return self.head(h.flatten(1))

    fn, params = fb.make_functional(FillsGaps().double())
    q, x, options = zoo.gaussian(params), randn(6, 2, 6, 6), {"num_samples": 8, "seed": 3}
    _always(monkeypatch, "loop_channels_last", 5)
    for inputs in (x, x.masked_fill(x > 2, float("nan")), x):
        expected = fb.predict(fn, params, q, inputs, chunk_size=1, **options).samples
        assert_close(fb.predict(fn, params, q, inputs, **options).samples, expected)


def test_inputs_of_a_plain_function_are_not_written_into_in_another_layout(monkeypatch):
    def fn(params, x):
        rows = x.permute(0, 2, 3, 1).contiguous()  # a copy of images as they are mostly
        rows /= 2.0
        return rows.mean((1, 2)) @ params["w"]

    q = zoo.gaussian({"w": randn(2, 3)})
    x, options = randn(6, 2, 6, 6), {"num_samples": 8, "seed": 3}
    expected = fb.predict(fn, None, q, x, chunk_size=1, **options).samples
    _always(monkeypatch, "loop_channels_last", 5)
    for _ in range(2):
        assert_close(fb.predict(fn, None, q, x, **options).samples, expected)


def test_a_call_that_is_mapped_does_not_spoil_what_was_learned_of_others(monkeypatch):
    torch.manual_seed(0)
    fn, params = fb.make_functional(NoticesLayout(lambda h: h.flatten(1)).double())
    x, q = randn(6, 2, 6, 6), zoo.gaussian(params)

    def samples(x):
        return fb.predict(fn, None, q, x, num_samples=8, seed=3).samples

    _always(monkeypatch, "loop_channels_last", 5)
    expected = samples(x)
    assert_close(vmap(samples)(x[None]), expected[None])
    NoticesLayout.seen.clear()
    assert_close(samples(x), expected)
    assert NoticesLayout.seen == [True] * 8


def _tried(monkeypatch, fn, q, x):
    """Chunks of draws by kind of the mechanisms that are tried."""
    tried, find = [], _engine._Run._candidates
    with monkeypatch.context() as patch:
        patch.setattr(_engine._Run, "_candidates", lambda run: tried.extend(find(run)) or tried)
        fb.predict(fn, None, q, x, num_samples=16, seed=0)
    return {m.kind: m.chunk for m in tried}


@pytest.mark.parametrize(
    ("rows", "changed", "device", "is_tried"),
    [
        (6, lambda x: x, "cpu", True),
        (1, lambda x: x, "cpu", False),
        (6, lambda x: x.contiguous(memory_format=torch.channels_last), "cpu", False),
        (6, lambda x: x, "meta", False),  # not measured
    ],
)
def test_a_loop_in_another_layout_is_tried_for_images_of_several_rows(
    monkeypatch, rows, changed, device, is_tried
):
    fn, params = fb.make_functional(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()))
    q, x = (fb.to(part, device=device) for part in (zoo.gaussian(params), randn(rows, 2, 6, 6).float()))
    assert ("loop_channels_last" in _tried(monkeypatch, fn, q, changed(x))) == is_tried


def test_images_can_be_mapped_over_while_layouts_are_chosen():
    fn, params = fb.make_functional(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 2)))
    q, x = zoo.gaussian(params), randn(2, 6, 2, 6, 6).float()
    predict = functools.partial(fb.predict, fn, None, q, num_samples=4, seed=0)
    expected = torch.stack([predict(rows, chunk_size=1).samples for rows in x])
    for _ in range(20):
        assert_close(vmap(lambda rows: predict(rows).samples)(x), expected)


def test_a_loop_in_another_layout_is_not_tried_for_what_are_no_images(monkeypatch):
    fn, params = fb.make_functional(nn.Linear(3, 2))
    assert "loop_channels_last" not in _tried(monkeypatch, fn, zoo.gaussian(params), torch.ones(6, 3))


@pytest.mark.parametrize(("rows", "of_loop", "of_threads"), [(8, 8, 6), (2048, 4, 3), (4096, 2, 3)])
def test_draws_of_a_loop_are_timed_together_unless_they_are_large(
    monkeypatch, three_threads, rows, of_loop, of_threads
):
    """Outputs have 2 KB a row, and 16 MB are meant to be in work; of each thread there are as many draws."""
    fn, params = fb.make_functional(nn.Linear(3, 512))
    tried = _tried(monkeypatch, fn, zoo.gaussian(params), torch.ones(rows, 3))
    assert (tried["loop"], tried["threads"]) == (of_loop, of_threads)


class NoticesThreads(torch.nn.Linear):
    """Remembers where it ran; as a class, for all of its copies."""

    seen: ClassVar[set] = set()

    def forward(self, x):
        self.seen.add((threading.get_ident() == threading.main_thread().ident, torch.get_num_threads()))
        return super().forward(x)


def _where_draws_ran(fn, params, **options):
    fb.predict(fn, None, fb.Ensemble(zoo.members(params)), torch.ones(2, 3), **options)  # a trial
    NoticesThreads.seen.clear()
    fb.predict(fn, None, fb.Ensemble(zoo.members(params)), torch.ones(2, 3), **options)
    return set(NoticesThreads.seen)


def test_threads_are_for_modules_of_which_each_has_a_copy_and_where_nothing_is_ambient(
    monkeypatch, three_threads
):
    fn, params = fb.make_functional(NoticesThreads(3, 2))
    _always(monkeypatch, "threads", 8)
    assert _where_draws_ran(fn, params) == {(False, 1)}
    here = {(True, 3)}
    assert _where_draws_ran(lambda params, x: fn(params, x), params) == here  # might be no copies
    assert _where_draws_ran(fn, params, chunk_size=1) == here
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _where_draws_ran(fn, params) == here
    with torch.device("cpu"):
        assert _where_draws_ran(fn, params) == here
    gradient = {name: leaf.requires_grad_() for name, leaf in zoo.members(params).items()}
    NoticesThreads.seen.clear()
    fb.predict(fn, None, fb.Ensemble(gradient), torch.ones(2, 3))
    assert set(NoticesThreads.seen) == here


def test_threads_of_ours_leave_the_number_of_threads_elsewhere_as_it_is(monkeypatch, three_threads, divided):
    _threads._pool.cache_clear()
    fn, params = fb.make_functional(torch.nn.Linear(3, 2))
    _always(monkeypatch, "threads", 8)
    found = []

    def in_a_new_thread():
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()

    in_a_new_thread()
    for _ in range(2):
        fb.predict(fn, None, fb.Ensemble(zoo.members(params)), torch.ones(2, 3))
    found.append(torch.get_num_threads())
    in_a_new_thread()
    assert divided
    assert found == [3, 3, 3]


def test_a_model_that_predicts_does_so_in_its_own_thread(monkeypatch, three_threads, divided):
    inner, own = fb.make_functional(torch.nn.Linear(3, 2))
    ensemble = fb.Ensemble(zoo.members(own))

    class Outer(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + fb.predict(inner, None, ensemble, x).mean

    _always(monkeypatch, "threads", 8)
    assert_an_ensemble_is_right(*fb.make_functional(Outer(3, 2)), times=3)
    assert set(divided) == {5}


def test_all_threads_have_ended_when_one_has_failed(three_threads):
    ended, all_here = [], threading.Barrier(3)

    def work(entries):
        all_here.wait(timeout=60)
        if 0 in entries:
            raise ArithmeticError("no zeros")
        time.sleep(0.2)
        ended.extend(entries)
        return entries

    with pytest.raises(ArithmeticError, match="no zeros"):
        _threads.side_by_side(work, range(6))
    assert sorted(ended) == [1, 2, 4, 5]
    assert sorted(_threads.side_by_side(work, range(1, 7))) == [1, 2, 3, 4, 5, 6]


def test_draws_too_large_for_threads_are_evaluated_one_by_one(monkeypatch, three_threads, divided):
    monkeypatch.setitem(_engine._DRAWS_BUDGET, "cpu", 1)
    assert_an_ensemble_is_right(*fb.make_functional(torch.nn.Linear(3, 2)), times=12)
    assert divided == []


def test_a_parameter_that_is_fixed_beside_buffers_goes_through_a_loop():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    fn, params = fb.make_functional(net)
    fixed = {"0.weight": fb.Fixed(params.pop("0.weight"))}
    ensemble, x = fb.Ensemble(zoo.members(params)), randn(4, 3)
    got = fb.predict(fn, {**fixed, **params}, ensemble, x, chunk_size=1).samples
    for k, samples in enumerate(got):
        assert_close(samples, fn({**fixed, **ensemble.member(k)}, x))


def test_a_module_that_threads_cannot_take_is_evaluated_in_a_loop(monkeypatch, three_threads):
    class Local(torch.nn.Linear):
        tried: ClassVar[list] = []

        def forward(self, x):
            if threading.current_thread() is not threading.main_thread():
                self.tried.append(1)
                raise ArithmeticError("not here")
            return super().forward(x)

    _always(monkeypatch, "threads", 8)
    assert_an_ensemble_is_right(*fb.make_functional(Local(3, 2)), times=4)
    assert 1 <= len(Local.tried) <= 3  # of one attempt


@pytest.mark.parametrize("num_rows", [1, 5, 6])
@pytest.mark.parametrize("name", zoo.WRITTEN)
def test_outputs_of_a_convolution_written_into_through_a_view_are_those_of_the_loop(name, num_rows):
    model = MODELS[name]()
    x = model.inputs(num_rows)
    for posterior in (zoo.head_only(model), gaussian(model.params)):
        expected = expected_samples(model, posterior, x, S, 3)
        for chunk_size in (None, 1, 2, 3):
            got = fb.predict(
                model.fn, model.params, posterior, x, num_samples=S, seed=3, chunk_size=chunk_size
            )
            assert_close(got.samples, expected, msg=saying(f"chunk_size={chunk_size}"))


@pytest.mark.parametrize("name", [*POSTERIORS, *zoo.WITH_FIXED, *zoo.DROPOUTS])
def test_results_stay_right_while_the_engine_learns_for_every_posterior(name):
    model = MODELS["conv_dropout"]()
    posterior = (POSTERIORS | zoo.WITH_FIXED | zoo.DROPOUTS)[name](model)
    x = model.inputs(4)
    expected = expected_samples(model, posterior, x, 5, 0)
    for call in range(40):
        got = fb.predict(model.fn, model.params, posterior, x, num_samples=5, seed=0)
        assert_close(got.samples, expected, msg=saying(f"call {call}"))


@pytest.mark.parametrize(("num_samples", "chunk_sizes"), [(None, (None, 20)), (S, (1, 3))])
@pytest.mark.parametrize("name", [*POSTERIORS, *zoo.RAGGED, *zoo.DROPOUTS])
def test_streaming_gives_the_statistics_of_kept_samples(name, num_samples, chunk_sizes):
    model = MODELS["mlp_dropout"]()
    posterior, x = (POSTERIORS | zoo.RAGGED | zoo.DROPOUTS)[name](model), model.inputs(5)
    y = torch.tensor([0, 1, 1, 0, 1])
    options = {"num_samples": num_samples, "seed": 0, "likelihood": Categorical(), "targets": y}
    kept = fb.predict(model.fn, model.params, posterior, x, **options)
    for chunk_size in chunk_sizes:
        streamed = fb.predict(
            model.fn, model.params, posterior, x, **options, keep_samples=False, chunk_size=chunk_size
        )
        assert streamed.num_samples == kept.num_samples
        for statistic in STATISTICS:
            assert_close(getattr(streamed, statistic), getattr(kept, statistic), msg=saying(statistic))
        assert_close(streamed.log_prob(), kept.log_prob(y.clone()))


STATISTICS = (
    *("mean", "variance", "std", "epistemic_variance", "aleatoric_variance"),
    *("entropy", "expected_entropy", "mutual_information"),
)


@pytest.mark.parametrize(("weight", "bias"), [((4, 3), (4,)), ((4, 3), ()), ((4, 3), (1,)), ((3,), None)])
def test_a_linear_map_with_any_shape_of_weight_and_bias_that_torch_takes(weight, bias):
    def fn(params, x):
        return F.linear(x, params["w"], params.get("b"))

    params = {"w": randn(*weight), **({} if bias is None else {"b": randn(*bias, seed=1)})}
    x, posterior = randn(5, 3), gaussian(params)
    expected = expected_samples(zoo.from_function(fn, params, None, "b"), posterior, x, S, 0)
    for chunk_size in CHUNK_SIZES:
        got = fb.predict(fn, params, posterior, x, num_samples=S, seed=0, chunk_size=chunk_size).samples
        assert_close(got, expected)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_attention_whose_query_is_shared_by_the_rows_is_vectorised(chunk_size):
    def fn(params, x):  # latents (1, H, L, D) look at the rows (N, H, T, D)
        return F.scaled_dot_product_attention(params["query"], x, x)

    params, x = {"query": randn(1, 2, 3, 4)}, randn(5, 2, 6, 4)
    posterior = gaussian(params)
    expected = expected_samples(zoo.from_function(fn, params, None, "query"), posterior, x, S, 0)
    got = fb.predict(fn, params, posterior, x, num_samples=S, seed=0, chunk_size=chunk_size)
    assert_close(got.samples, expected)


def test_outputs_may_be_one_number_a_row_or_no_row_at_all():
    params, x = linear_params(), randn(5, 3)
    posterior = gaussian(params)
    for fn, shape in (
        (lambda p, x: linear(p, x)[:, 0], (S, 5)),
        (lambda p, x: linear(p, x).sum(), (S,)),
        (lambda p, x: linear(p, x)[:0], (S, 0, 2)),
    ):
        for chunk_size in (None, 3):
            got = fb.predict(fn, params, posterior, x, num_samples=S, seed=0, chunk_size=chunk_size)
            assert got.samples.shape == shape


def test_a_model_whose_outputs_do_not_depend_on_the_draw_gives_equal_samples():
    params, x = linear_params(), randn(5, 3)
    posterior = gaussian({"b": params["b"]})
    got = fb.predict(lambda p, x: x @ p["w"].T, params, posterior, x, num_samples=S, seed=0)
    assert_close(got.samples, (x @ params["w"].T).expand(S, 5, 2))
    assert_close(got.variance, torch.zeros(5, 2, dtype=F64))


def test_inputs_of_no_rows_give_outputs_of_no_rows():
    params = linear_params()
    got = fb.predict(linear, params, gaussian(params), randn(0, 3), num_samples=S, seed=0)
    assert got.samples.shape == (S, 0, 2)
    assert got.mean.shape == (0, 2)


# The same draws however they are asked for.


@pytest.mark.parametrize("name", [*POSTERIORS, *zoo.RAGGED, *zoo.DROPOUTS])
def test_more_draws_begin_with_the_same_draws(name):
    model = MODELS["mlp_dropout"]()
    posterior, x = (POSTERIORS | zoo.RAGGED | zoo.DROPOUTS)[name](model), model.inputs(3)
    many = fb.predict(model.fn, model.params, posterior, x, num_samples=20, seed=5, chunk_size=6).samples
    for num_samples in (1, 2, 9):
        few = fb.predict(model.fn, model.params, posterior, x, num_samples=num_samples, seed=5, chunk_size=4)
        assert_close(few.samples, many[:num_samples])


@pytest.mark.parametrize("name", [*POSTERIORS, *zoo.DROPOUTS])
def test_exactly_the_number_of_draws_asked_for_is_used(name):
    model = MODELS["mlp_dropout"]()
    posterior, x = (POSTERIORS | zoo.DROPOUTS)[name](model), model.inputs(2)
    atoms = {"point": 1, "ensemble": 5, "ensemble_weighted": 5, "ensemble_head_only": 5}
    fixed = {"fixed_draws": 6, "linearized_fixed_draws": 6, "dropout_fixed": 4}
    default = (atoms | fixed).get(name, 32)
    for num_samples, chunk_size in ((1, None), (2, 4), (31, 4), (33, None), (None, None), (None, 4)):
        got = fb.predict(
            model.fn, model.params, posterior, x, num_samples=num_samples, seed=0, chunk_size=chunk_size
        )
        count = default if num_samples is None else num_samples
        assert got.samples.shape == (count, 2, 2)
        assert got.num_samples == count
        assert_close(got.weights.sum(), torch.ones((), dtype=got.weights.dtype))


def test_calls_with_a_chunk_size_agree_bit_for_bit():
    model = MODELS["conv"]()
    posterior, x = gaussian(model.params), model.inputs(5)
    first, *others = (
        fb.predict(model.fn, model.params, posterior, x, num_samples=S, seed=0, chunk_size=3).samples
        for _ in range(4)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", [*POSTERIORS, *zoo.DROPOUTS])
def test_a_tensor_seed_is_the_int_seed(name):
    model = MODELS["mlp_dropout"]()
    posterior, x = (POSTERIORS | zoo.DROPOUTS)[name](model), model.inputs(3)
    by_int, by_tensor = (
        fb.predict(model.fn, model.params, posterior, x, num_samples=S, seed=seed, chunk_size=3).samples
        for seed in (11, torch.tensor(11))
    )
    assert_close(by_tensor, by_int)


def test_seeds_and_numbers_of_numpy_are_taken_as_ints():
    params, x = linear_params(), randn(5, 3)
    posterior = gaussian(params)
    expected = fb.predict(linear, params, posterior, x, num_samples=S, seed=3, chunk_size=2).samples
    numbers = {"num_samples": np.int64(S), "seed": np.int64(3), "chunk_size": np.int64(2)}
    assert torch.equal(fb.predict(linear, params, posterior, x, **numbers).samples, expected)
    assert torch.equal(posterior.sample(S, seed=np.int64(3))["w"], posterior.sample(S, seed=3)["w"])


@pytest.mark.parametrize("name", [*POSTERIORS, *zoo.DROPOUTS])
def test_predictions_mapped_over_seeds_equal_a_loop_over_seeds(name):
    model = MODELS["mlp_dropout"]()
    posterior, x = (POSTERIORS | zoo.DROPOUTS)[name](model), model.inputs(3)

    def samples(seed):
        return fb.predict(model.fn, model.params, posterior, x, num_samples=4, seed=seed).samples

    assert_close(vmap(samples)(torch.arange(3)), torch.stack([samples(i) for i in range(3)]))


def test_without_a_seed_two_calls_differ_and_manual_seed_governs_them():
    params, x = linear_params(), randn(5, 3)

    def samples():
        return fb.predict(linear, params, gaussian(params), x, num_samples=S).samples

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, second = samples(), samples()
        torch.manual_seed(0)
        again = samples()
    assert_close(again, first)
    assert not torch.allclose(first, second)


def test_an_ensemble_without_a_number_of_draws_uses_each_member_once_with_its_weight():
    params, x = linear_params(), randn(5, 3)
    members = zoo.members(params)
    got = fb.predict(linear, None, fb.Ensemble(members, 3 * zoo.WEIGHTS), x)
    each = torch.stack([linear(zoo.entry(members, k), x) for k in range(5)])
    assert_close(got.samples, each)
    assert_close(got.weights, zoo.WEIGHTS)
    assert_close(got.mean, torch.einsum("s,snc->nc", zoo.WEIGHTS, each))


# Numbers that a model draws by itself.


class DropPath(nn.Module):
    """Stochastic depth as common libraries of vision models write it."""

    def __init__(self, rate):
        super().__init__()
        self.drop_prob = rate

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * kept


class WithDropPath(nn.Module):
    """Dropout in the first three columns, stochastic depth in the last."""

    def __init__(self):
        super().__init__()
        self.head, self.drop, self.path = nn.Linear(3, 3), nn.Dropout(0.5), DropPath(0.5)

    def forward(self, x):
        return torch.cat([self.drop(self.head(x)), self.path(torch.ones_like(x[:, :1]))], 1)


class Noisy(nn.Module):
    """Dropout in the first three columns, noise in evaluation mode in the last."""

    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.Linear(3, 3), nn.Dropout(0.5)

    def forward(self, x):
        return torch.cat([self.drop(self.head(x)), torch.rand(len(x), 1, dtype=x.dtype)], 1)


DRAWING = {
    "drop_path_with_dropout": (WithDropPath, lambda model: fb.Dropout()),
    "noise_with_dropout": (Noisy, lambda model: fb.Dropout()),
    "noise_with_weights": (Noisy, lambda model: gaussian(model.params)),
}


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(("make", "of_model"), DRAWING.values(), ids=DRAWING.keys())
def test_what_a_model_draws_by_itself_is_governed_by_the_seed_too(make, of_model, chunk_size):
    model = zoo.from_module(make, zoo.rows(3), "head", drops=True)
    posterior, x = of_model(model), model.inputs(30)

    def samples(seed):
        options = {"num_samples": 6, "seed": seed, "chunk_size": chunk_size}
        return fb.predict(model.fn, model.params, posterior, x, **options).samples

    state = torch.get_rng_state()
    first, second, other = samples(0), samples(0), samples(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(second, first)
    assert not torch.allclose(other[..., :3], first[..., :3])
    own = first[..., 3]  # 30 numbers a draw
    assert len({tuple(draw.tolist()) for draw in own}) == 6


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_what_a_model_draws_by_itself_is_governed_by_the_seed_where_draws_are_fixed(chunk_size):
    model = zoo.from_module(Noisy, zoo.rows(3), "head", drops=True)
    ensemble, x = fb.Ensemble(zoo.members(model.params)), model.inputs(30)

    def noise(seed, posterior=ensemble):
        return fb.predict(model.fn, None, posterior, x, seed=seed, chunk_size=chunk_size).samples[..., 3]

    for seed in (3, torch.tensor(3)):
        assert torch.equal(noise(seed), noise(3))
        assert not torch.equal(noise(seed), noise(4))
    torch.manual_seed(0)
    first, second = noise(None), noise(None)
    torch.manual_seed(0)
    assert torch.equal(noise(None), first)
    assert not torch.equal(first, second)
    point = fb.Point(model.params)
    assert not torch.equal(noise(3, point), noise(4, point))


# Coverage.


class Counting(nn.Module):
    """Counts its calls, on the class because modules are copied."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        Counting.calls += 1
        return self.head(h)


def test_the_trunk_before_the_first_covered_layer_runs_once_a_chunk():
    model = zoo.from_module(Counting, zoo.rows(3), "head")
    posterior, x = zoo.head_only(model), model.inputs(5)
    for chunk_size, expected in ((8, 1), (3, 3)):
        fb.predict(model.fn, model.params, posterior, x, num_samples=8, chunk_size=chunk_size)  # learns
        before = Counting.calls
        fb.predict(model.fn, model.params, posterior, x, num_samples=8, seed=0, chunk_size=chunk_size)
        assert Counting.calls - before == expected


def flops(call, *args, **kwargs):
    with FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return counter.get_total_flops()


def test_the_trunk_does_the_work_of_one_draw_and_the_head_that_of_all():
    model = zoo.from_module(Counting, zoo.rows(3), "head")
    x, options = model.inputs(5), {"num_samples": 8, "seed": 0, "chunk_size": 8}
    trunk, head = 2 * 5 * 3 * 16, 2 * 5 * 16 * 2  # multiplications and additions of one pass
    for posterior, expected in (
        (zoo.head_only(model), trunk + 8 * head),
        (gaussian(model.params), 8 * (trunk + head)),
        (zoo.all_but_head(model), 8 * (trunk + head)),
    ):
        call = functools.partial(flops, fb.predict, model.fn, model.params, posterior, x, **options)
        call()  # learns whether vmap can take it
        assert call() == expected


def test_dropout_before_the_head_leaves_the_trunk_to_one_draw():
    def make():
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 2))

    model = zoo.from_module(make, zoo.rows(3), "3", drops=True)
    x, options = model.inputs(5), {"num_samples": 8, "seed": 0, "chunk_size": 8}
    fb.predict(model.fn, model.params, fb.Dropout(), x, **options)
    got = flops(fb.predict, model.fn, model.params, fb.Dropout(), x, **options)
    assert got == 2 * 5 * 3 * 16 + 8 * (2 * 5 * 16 * 2)


def test_a_posterior_that_covers_everything_needs_no_params():
    for name in ("linear", "nested", "conv"):
        model = MODELS[name]()
        x = model.inputs(3)
        for posterior in (
            gaussian(model.params),
            fb.Ensemble(zoo.members(model.params)),
            fb.Point(model.params),
        ):
            without = fb.predict(model.fn, None, posterior, x, num_samples=S, seed=0, chunk_size=3)
            given = fb.predict(model.fn, model.params, posterior, x, num_samples=S, seed=0, chunk_size=3)
            assert_close(without.samples, given.samples)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(("name", "leaf"), [("mlp", "0.weight"), ("linear", "w"), ("nested", "1.0")])
def test_a_leaf_that_neither_params_nor_the_posterior_has_is_named(name, leaf, chunk_size):
    model = MODELS[name]()
    posterior = gaussian(zoo.covering(model.params, lambda path: path != leaf))
    for params in (None, posterior.mean):
        with pytest.raises((ValueError, KeyError), match=f"'{leaf}'"):
            fb.predict(
                model.fn, params, posterior, model.inputs(3), num_samples=S, seed=0, chunk_size=chunk_size
            )


def test_params_are_not_used_where_the_posterior_covers_them():
    params, x = linear_params(), randn(5, 3)
    posterior = gaussian(params)
    elsewhere = {k: v + 100 for k, v in params.items()}
    got, expected = (fb.predict(linear, p, posterior, x, seed=0, chunk_size=4) for p in (elsewhere, params))
    assert_close(got.samples, expected.samples)


# Memory.


class Small:
    """A linear model on a device with memory for some draws at a time."""

    def __init__(self, room):
        self.room, self.sizes = room, []

    def __call__(self, params, x):
        whole = physical(params["w"])
        size = len(whole) if whole.ndim == 3 else 1
        self.sizes.append(size)
        if size > self.room:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 8.00 GiB")
        return linear(params, x)


@pytest.mark.parametrize("chunk_size", [None, 8, 16])
@pytest.mark.parametrize("room", [1, 3, 5])
def test_draws_that_memory_is_not_enough_for_are_taken_in_halves(room, chunk_size):
    fn, params, x = Small(room), linear_params(), randn(4, 3)
    posterior = gaussian(params)
    options = {"num_samples": 16, "seed": 0, "chunk_size": chunk_size}
    got = fb.predict(fn, params, posterior, x, **options).samples
    assert_close(got, fb.predict(linear, params, posterior, x, **options).samples)
    assert max(fn.sizes) > room  # it was tried
    fn.sizes.clear()
    assert_close(fb.predict(fn, params, posterior, x, **options).samples, got)
    assert max(fn.sizes) <= room  # and is remembered


def test_a_device_whose_memory_was_not_enough_takes_fewer_draws_at_a_time_and_no_loop(monkeypatch):
    tuners, find = [], _engine._Run._candidates

    def on_an_accelerator(run):  # there all draws are taken at once, if memory is enough
        tuners.append(run.tuner)
        loop = next(c for c in find(run) if c.kind == "loop")
        return [_engine.Mechanism("channels_last", 16), loop, _engine.Mechanism("vmap", 16)]

    monkeypatch.setattr(_engine._Run, "_candidates", on_an_accelerator)
    fn, params, x = Small(5), linear_params(), randn(4, 3)
    posterior = gaussian(params)
    for _ in range(12):
        got = fb.predict(fn, params, posterior, x, num_samples=16, seed=0).samples
    assert_close(got, fb.predict(linear, params, posterior, x, num_samples=16, seed=0, chunk_size=1).samples)
    (tuner,) = tuners
    assert {(c.kind, c.chunk) for c in tuner.candidates} == {("channels_last", 4), ("vmap", 4), ("loop", 4)}
    assert set(tuner.candidates) <= tuner.seconds.keys()  # all of them were tried


def test_a_compiled_chunk_that_memory_is_not_enough_for_is_halved(monkeypatch):
    monkeypatch.setattr(_engine, "compiled", lambda owner, key, evaluate, tree: evaluate(tree))
    fn, params, x = Small(5), linear_params(), randn(4, 3)
    options = {"num_samples": 16, "seed": 0, "chunk_size": 16}
    got = fb.predict(fn, params, gaussian(params), x, compile=True, **options).samples
    assert_close(got, fb.predict(linear, params, gaussian(params), x, **options).samples)
    assert fn.sizes[-4:] == [4] * 4
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        fb.predict(Small(0), params, gaussian(params), x, compile=True, **options)


@pytest.mark.parametrize(("width", "rows", "is_large"), [(10_000, 1, True), (8, 1000, True), (8, 1, False)])
def test_no_two_draws_are_in_memory_at_once_on_a_cpu_where_they_are_very_large(
    monkeypatch, width, rows, is_large
):
    monkeypatch.setattr(_engine, "_MOST_OF_TWO_DRAWS", 100_000)  # bytes
    params, x = {"w": randn(3, width)}, randn(rows, 3)
    sizes = []

    def fn(params, x):
        whole = physical(params["w"])
        sizes.append(len(whole) if whole.ndim == 3 else 1)
        return x @ params["w"]

    q = gaussian(params)
    got = [fb.predict(fn, params, q, x, num_samples=6, seed=0).samples for _ in range(12)]
    assert_close(got[-1], fb.predict(fn, params, q, x, num_samples=6, seed=0, chunk_size=1).samples)
    assert (set(sizes) == {1}) == is_large
    fb.predict(fn, params, q, x, num_samples=6, seed=0, chunk_size=6)
    assert sizes[-1] == 6  # as asked


def test_one_draw_that_memory_is_not_enough_for_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        fb.predict(Small(0), linear_params(), gaussian(linear_params()), randn(4, 3), num_samples=4, seed=0)


@pytest.mark.parametrize("num_rows", [1, 20])
def test_recurrent_layers_are_evaluated_in_one_pass_without_a_warning(num_rows):
    model = SLOW_MODELS["lstm"]()
    for posterior in (gaussian(model.params), POSTERIORS["linearized"](model), POSTERIORS["mixture"](model)):
        x = model.inputs(num_rows)
        expected = expected_samples(model, posterior, x, S, 0)
        for chunk_size in (None, 3, S):
            got = fb.predict(
                model.fn, model.params, posterior, x, num_samples=S, seed=0, chunk_size=chunk_size
            )
            assert_close(got.samples, expected)


class ViewsOutputs(nn.Module):
    """Merges steps and rows of a recurrent layer's outputs without a copy, and writes there."""

    def __init__(self, kind):
        super().__init__()
        self.cell = kind(3, 4)

    def forward(self, x):
        outputs, _ = self.cell(x.transpose(0, 1))
        merged = outputs.view(-1, 4)
        F.relu(merged, inplace=True)
        return merged.view(-1, len(x), 4).sum(0) + outputs[-1]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("num_rows", [5, 10])
def test_outputs_of_recurrent_layers_can_be_viewed_and_written_into_as_torchs(
    num_rows, kind, chunk_size, recwarn
):
    fn, params = fb.make_functional(ViewsOutputs(kind).double())
    posterior, x = gaussian(params), randn(num_rows, 7, 3)
    members = fb.to_ensemble(posterior, S, seed=0).members
    expected = torch.stack([fn({k: v[s] for k, v in members.items()}, x) for s in range(S)])
    for _ in range(3):
        got = fb.predict(fn, params, posterior, x, num_samples=S, seed=0, chunk_size=chunk_size)
        assert_close(got.samples, expected)
    assert not recwarn.list


# Models that vmap cannot take.


@pytest.mark.parametrize("make_posterior", POSTERIORS.values(), ids=POSTERIORS.keys())
@pytest.mark.parametrize("name", LOOPED_MODELS)
def test_a_model_that_vmap_cannot_take_is_right_and_warned_of_at_most_once(name, make_posterior):
    _, make_model = LOOPED_MODELS[name]
    model = make_model()
    posterior, x = make_posterior(model), model.inputs(3)
    expected = expected_samples(model, posterior, x, S, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for chunk_size in (*CHUNK_SIZES, None, None):
            got = fb.predict(
                model.fn, model.params, posterior, x, num_samples=S, seed=0, chunk_size=chunk_size
            )
            assert_close(got.samples, expected, msg=saying(f"chunk_size={chunk_size}"))
    assert len(caught) <= 1


@pytest.mark.parametrize("name", LOOPED_MODELS)
def test_a_loop_is_warned_of_once_a_model_and_not_once_a_shape(name):
    model = LOOPED_MODELS[name][1]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for num_rows, num_samples in ((2, 3), (3, 3), (4, 5)):
            x = model.inputs(num_rows)
            fb.predict(model.fn, model.params, gaussian(model.params), x, num_samples=num_samples)
    assert len(caught) == 1


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", LOOPED_MODELS)
def test_the_warning_of_a_loop_names_the_operation(name, chunk_size):
    operation, make_model = LOOPED_MODELS[name]
    model = make_model()
    with pytest.warns(UserWarning, match=f"`vmap` cannot take .* loop: .*{operation}") as caught:
        fb.predict(
            model.fn,
            model.params,
            gaussian(model.params),
            model.inputs(3),
            num_samples=S,
            chunk_size=chunk_size,
        )
    assert len(caught) == 1


def test_the_warning_of_a_loop_points_at_the_call_of_the_user():
    model = LOOPED_MODELS["item"][1]()
    with pytest.warns(UserWarning, match="`vmap` cannot take") as caught:
        fb.predict(model.fn, model.params, gaussian(model.params), model.inputs(3), num_samples=S)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_an_error_of_the_model_itself_comes_out_as_it_is(chunk_size):
    class OwnError(Exception):
        pass

    def fn(params, x):
        raise OwnError("no such thing")

    params = linear_params()
    with pytest.raises(OwnError, match="^no such thing$"):
        fb.predict(fn, params, gaussian(params), randn(5, 3), num_samples=S, seed=0, chunk_size=chunk_size)


def test_a_shape_error_of_the_model_comes_out_as_torch_words_it():
    params = linear_params()
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        fb.predict(linear, params, gaussian(params), randn(5, 4), num_samples=S, seed=0)


# Types.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "mlp", "conv", "transformer", "keywords"])
def test_the_dtype_of_inputs_and_parameters_is_that_of_the_outputs(name, dtype):
    model = MODELS[name]()
    params, x = fb.to(model.params, dtype=dtype), fb.to(model.inputs(5), dtype=dtype)
    exact = expected_samples(model, gaussian(fb.to(params, dtype=F64)), fb.to(x, dtype=F64), S, 0)
    posterior = fb.to(gaussian(fb.to(params, dtype=F64)), dtype=dtype)
    for chunk_size in CHUNK_SIZES:
        options = {"num_samples": S, "seed": 0, "chunk_size": chunk_size, "likelihood": Categorical()}
        got = fb.predict(model.fn, params, posterior, x, **options)
        for value in (got.samples, got.mean, got.variance, got.entropy, got.mutual_information):
            assert value.dtype == dtype
        loop = torch.stack([model.fn(zoo.entry(posterior.sample(S, seed=0), i), x) for i in range(S)])
        # Sums over some 100 terms: a few units in the last place of the largest output.
        tolerance = 8 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert_close(got.samples, loop, atol=tolerance, rtol=0)


def test_predict_in_a_wider_dtype_converts_parameters_draws_and_inputs():
    for name in ("mlp", "conv", "keywords"):
        model = MODELS[name]()
        params, x = fb.to(model.params, dtype=torch.float32), fb.to(model.inputs(3), dtype=torch.float32)
        posterior = fb.Ensemble(zoo.members(params))
        got = fb.predict(model.fn, params, posterior, x, dtype=F64)
        wide = fb.predict(model.fn, None, fb.to(posterior, dtype=F64), fb.to(x, dtype=F64))
        assert got.samples.dtype == F64
        assert_close(got.samples, wide.samples)


def test_predict_in_a_narrower_dtype_gives_it():
    model = MODELS["mlp"]()
    got = fb.predict(
        model.fn, model.params, gaussian(model.params), model.inputs(3), seed=0, dtype=torch.bfloat16
    )
    assert got.samples.dtype == got.mean.dtype == torch.bfloat16


# Gradients.


def closed_form_inputs():
    x, mean, variance = randn(5, 3), randn(3, seed=1), randn(3, seed=2) ** 2
    return x, mean, variance


def make_linear_posterior(mean, variance):
    return fb.Gaussian({"w": mean}, Diagonal({"w": variance}))


def inner_product(params, x):
    return x @ params["w"]


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 20])
@pytest.mark.parametrize("keep_samples", [True, False])
def test_gradients_of_a_linear_model_are_those_of_the_closed_form(chunk_size, keep_samples):
    x, mean, variance = (t.requires_grad_() for t in closed_form_inputs())
    prediction = fb.predict(
        inner_product,
        None,
        make_linear_posterior(mean, variance),
        x,
        num_samples=S,
        seed=0,
        chunk_size=chunk_size,
        keep_samples=keep_samples,
    )
    cotangent = randn(5, seed=7)
    got = torch.autograd.grad(prediction.mean @ cotangent, (x, mean, variance))
    # The mean over draws is x . (mean + sqrt(variance) * z) with z the mean of the noise.
    draws = make_linear_posterior(mean, variance).sample(S, seed=0)["w"].detach()
    z = ((draws - mean.detach()) / variance.detach().sqrt()).mean(0)
    expected = (
        torch.outer(cotangent, draws.mean(0)),
        cotangent @ x.detach(),
        cotangent @ x.detach() * z / (2 * variance.detach().sqrt()),
    )
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


def test_gradients_reach_params_that_the_posterior_does_not_cover():
    model = MODELS["mlp"]()
    params = {k: v.clone().requires_grad_() for k, v in model.params.items()}
    posterior, x = zoo.head_only(model), model.inputs(4)
    got = fb.predict(model.fn, params, posterior, x, num_samples=S, seed=0, chunk_size=3).mean.sum()
    expected = expected_samples(model._replace(params=params), posterior, x, S, 0).mean(0).sum()
    trunk = [v for k, v in params.items() if not k.startswith("4")]
    for one, other in zip(torch.autograd.grad(got, trunk), torch.autograd.grad(expected, trunk), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["conv", "residual", "transformer", "own_attention", "tied", "norms"])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_gradients_equal_those_of_the_loop_while_the_engine_learns(name, num_rows):
    model = MODELS[name]()
    posterior, x = (
        gaussian({k: v.clone().requires_grad_() for k, v in model.params.items()}),
        model.inputs(num_rows),
    )
    leaves = list(posterior.mean.values())
    cotangent = None
    for call in range(8):
        got = fb.predict(model.fn, None, posterior, x, num_samples=3, seed=0).samples
        if cotangent is None:
            cotangent = randn(*got.shape)
            loop = expected_samples(model, posterior, x, 3, 0)
            expected = torch.autograd.grad((loop * cotangent).sum(), leaves)
        for one, other in zip(torch.autograd.grad((got * cotangent).sum(), leaves), expected, strict=True):
            assert_close(one, other, msg=saying(f"call {call}"))


def test_gradients_reach_the_weights_of_an_ensemble():
    x, members = randn(5, 3), {"w": randn(4, 3)}
    raw = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64, requires_grad=True)
    got = torch.autograd.grad(fb.predict(inner_product, None, fb.Ensemble(members, raw), x).mean.sum(), raw)[
        0
    ]
    f = (members["w"] @ x.T).sum(1)  # d/dw_k of sum_k w_k f_k / sum_k w_k
    p = raw.detach() / raw.detach().sum()
    assert_close(got, (f - p @ f) / raw.detach().sum())


def test_there_is_no_graph_where_nothing_requires_gradients():
    params, x = linear_params(), randn(5, 3)
    got = fb.predict(linear, params, gaussian(params), x, seed=0, likelihood=Normal(0.3))
    assert not got.samples.requires_grad
    assert not got.mean.requires_grad
    trained = {k: v.clone().requires_grad_() for k, v in params.items()}
    assert fb.predict(linear, trained, gaussian(trained), x, seed=0).samples.requires_grad
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            got = fb.predict(linear, trained, gaussian(trained), x, seed=0)
            assert not got.samples.requires_grad
            assert not got.variance.requires_grad


@pytest.mark.parametrize("name", ["linear", "conv", "transformer"])
def test_predictions_in_no_grad_and_inference_mode_are_the_same(name):
    model = MODELS[name]()
    x, posterior = model.inputs(5), gaussian(model.params)
    expected = expected_samples(model, posterior, x, S, 0)
    for off in (torch.no_grad, torch.inference_mode):
        for chunk_size in CHUNK_SIZES:
            with off():
                got = fb.predict(
                    model.fn, model.params, posterior, x, num_samples=S, seed=0, chunk_size=chunk_size
                )
            assert_close(got.samples.clone(), expected)


def test_gradients_work_after_a_prediction_in_inference_mode():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval()
    fn, params = fb.make_functional(module)
    params, x = fb.to(params, dtype=F64), randn(5, 3)  # buffers follow the dtype of the parameters
    with torch.inference_mode():
        fb.predict(fn, params, fb.Point(params), x)
    leaf = params["0.weight"].clone().requires_grad_()
    got = fb.predict(fn, None, fb.Point({**params, "0.weight": leaf}), x).mean.sum()
    again = fn({**params, "0.weight": leaf}, x).sum()
    assert_close(torch.autograd.grad(got, leaf), torch.autograd.grad(again, leaf))


TRANSFORMS = {
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "jacrev": lambda f, x: jacrev(f)(x),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: vmap(lambda row: f(row[None])[0])(x),
    "grad_of_vmap": lambda f, x: grad(lambda x: vmap(lambda row: f(row[None])[0])(x).sum())(x),
    "backward_of_vmap": lambda f, x: torch.autograd.grad(
        vmap(lambda row: f(row[None])[0])(leaf := x.clone().requires_grad_()).sum(), leaf
    )[0],
    "vmap_of_grad": lambda f, x: vmap(grad(lambda row: f(row[None])[0].sum()))(x),
    "jvp_of_vmap": lambda f, x: jvp(
        lambda x: vmap(lambda row: f(row[None])[0])(x), (x,), (torch.ones_like(x),)
    )[1],
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.parametrize("name", ["mlp", "functional_dropout"])
def test_transforms_of_torch_func_see_through_predict(name, transform, chunk_size):
    model = MODELS[name]()
    posterior = gaussian(model.params)

    def by_predict(x):
        return fb.predict(
            model.fn, model.params, posterior, x, num_samples=5, seed=0, chunk_size=chunk_size
        ).mean

    def by_loop(x):
        return expected_samples(model, posterior, x, 5, 0).mean(0)

    if name == "functional_dropout":
        posterior = fb.Dropout(shared_mask=True)  # a function of the row alone
    x = randn(3, 3)
    assert_close(transform(by_predict, x), transform(by_loop, x))


def test_transforms_of_torch_func_over_the_mean_and_variance_of_a_posterior():
    x, mean, variance = closed_form_inputs()

    z = (make_linear_posterior(mean, variance).sample(S, seed=0)["w"] - mean) / variance.sqrt()

    def predicted(mean, variance):
        posterior = make_linear_posterior(mean, variance)
        return fb.predict(inner_product, None, posterior, x, num_samples=S, seed=0).variance.sum()

    def by_hand(mean, variance):
        return ((mean + variance.sqrt() * z) @ x.T).var(0).sum()

    got, expected = (grad(f, argnums=(0, 1))(mean, variance) for f in (predicted, by_hand))
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", ["gaussian", "ensemble", "ensemble_weighted", "point", "gaussian_head_only"])
def test_predictions_mapped_over_a_stacked_posterior_equal_a_loop(name):
    model = MODELS["mlp"]()
    first = POSTERIORS[name](model)
    second = torch.utils._pytree.tree_map(lambda t: t * 0.7, first)
    several = torch.utils._pytree.tree_map(lambda *t: torch.stack(t), first, second)
    x = model.inputs(3)

    def samples(posterior):
        return fb.predict(model.fn, model.params, posterior, x, num_samples=5, seed=0, chunk_size=2).samples

    assert_close(vmap(samples)(several), torch.stack([samples(first), samples(second)]))


def test_a_streamed_log_density_can_be_differentiated_in_the_noise():
    params, x, y = linear_params(), randn(5, 3), randn(5, 2, seed=4)
    posterior, noise_std = gaussian(params), torch.tensor(0.3, dtype=F64, requires_grad=True)
    draws = expected_samples(zoo.from_function(linear, params, None, "b"), posterior, x, S, 0)
    by_hand = torch.distributions.Normal(draws, noise_std).log_prob(y).sum(-1).logsumexp(0).sum()
    expected = torch.autograd.grad(by_hand, noise_std)
    for keep_samples in (True, False):
        options = {"num_samples": S, "seed": 0, "targets": y, "keep_samples": keep_samples}
        prediction = fb.predict(linear, params, posterior, x, likelihood=Normal(noise_std), **options)
        assert_close(torch.autograd.grad(prediction.log_prob().sum(), noise_std), expected)


@pytest.mark.parametrize("keep_samples", [True, False])
def test_a_statistic_looked_at_without_gradients_can_be_differentiated_afterwards(keep_samples):
    x, mean, variance = closed_form_inputs()
    leaf, y = mean.clone().requires_grad_(), randn(5, seed=4)

    def statistics():
        prediction = fb.predict(
            inner_product,
            None,
            make_linear_posterior(leaf, variance),
            x,
            likelihood=Normal(0.3),
            num_samples=S,
            seed=0,
            targets=y,
            keep_samples=keep_samples,
        )
        return lambda: (prediction.variance.sum(), prediction.mean.sum(), prediction.log_prob().sum())

    fresh, looked_at = statistics(), statistics()
    with torch.no_grad():
        before = looked_at()
    for value, expected, seen in zip(looked_at(), fresh(), before, strict=True):
        assert_close(seen, expected.detach())
        got, gradient = (torch.autograd.grad(v, leaf, retain_graph=True) for v in (value, expected))
        assert_close(got, gradient)


# Batches and partial application.


def loader(x, y, batch_size=4):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


@pytest.mark.parametrize("keep_samples", [True, False])
@pytest.mark.parametrize("make_posterior", POSTERIORS.values(), ids=POSTERIORS.keys())
def test_batches_give_the_prediction_of_all_rows_at_once(make_posterior, keep_samples):
    model = MODELS["mlp"]()
    posterior, x, y = make_posterior(model), randn(11, 3), torch.arange(11) % 2
    options = {"likelihood": Categorical(), "num_samples": S, "seed": 0, "keep_samples": keep_samples}
    whole = fb.predict(model.fn, model.params, posterior, x, targets=y, **options)
    parts = fb.predict_batches(model.fn, model.params, posterior, loader(x, y), **options)
    for statistic in STATISTICS:
        assert_close(getattr(parts, statistic), getattr(whole, statistic), msg=saying(statistic))
    assert_close(parts.log_prob(), whole.log_prob())
    assert_close(parts.targets, y)
    assert_close(parts.weights, whole.weights)
    if keep_samples:
        assert_close(parts.samples, whole.samples)
        assert_close(parts.log_prob(1 - y), whole.log_prob(1 - y))


def test_batches_without_a_likelihood_or_without_labels():
    params, x = linear_params(), randn(11, 3)
    posterior = gaussian(params)
    whole = fb.predict(linear, params, posterior, x, seed=0, num_samples=S).samples
    labelled = fb.predict_batches(linear, params, posterior, loader(x, x), seed=0, num_samples=S)
    unlabelled = fb.predict_batches(
        linear, params, posterior, x.split(4), seed=0, num_samples=S, labelled=False, likelihood=Normal(0.1)
    )
    assert_close(labelled.samples, whole)
    assert_close(unlabelled.samples, whole)
    assert labelled.targets is None
    assert unlabelled.targets is None


def test_batches_of_a_loader_without_labels_are_the_rows():
    params, x = linear_params(), randn(11, 3)
    posterior, options = gaussian(params), {"seed": 0, "num_samples": S}
    got = fb.predict_batches(
        linear, params, posterior, DataLoader(TensorDataset(x), batch_size=4), labelled=False, **options
    )
    assert_close(got.samples, fb.predict(linear, params, posterior, x, **options).samples)


@pytest.mark.parametrize("name", ["gaussian", "dropout", "dropout_shared_mask"])
def test_inputs_in_a_mapping_that_is_no_dict_are_those_in_a_dict(name):
    class Dropping(zoo.TextNet):
        def forward(self, tokens, mask):
            return F.dropout(super().forward(tokens, mask), 0.5, self.training or name != "gaussian")

    model = zoo.from_module(Dropping, zoo.words, "head", drops=True, keywords=True)
    posterior, x = (POSTERIORS | zoo.DROPOUTS)[name](model), model.inputs(5)
    for chunk_size in (None, 1, 3):
        options = {"num_samples": S, "seed": 0, "chunk_size": chunk_size}
        expected = fb.predict(model.fn, model.params, posterior, x, **options)
        mapping = collections.UserDict(x)
        got = fb.predict(model.fn, model.params, posterior, mapping, **options)
        assert_close(got.samples, expected.samples)
        assert mapping.data.keys() == x.keys()
        narrow = {**options, "dtype": torch.float32}
        got = fb.predict(model.fn, model.params, posterior, mapping, **narrow).samples
        assert_close(got, fb.predict(model.fn, model.params, posterior, x, **narrow).samples)
    batches = [collections.UserDict({k: v[rows] for k, v in x.items()}) for rows in (slice(3), slice(3, 5))]
    got, expected = (
        fb.predict_batches(model.fn, model.params, posterior, each, labelled=False, **options).samples
        for each in (batches, [dict(batch) for batch in batches])
    )
    assert_close(got, expected)


def test_batches_without_a_seed_have_the_same_draws():
    params = linear_params()
    x = randn(4, 3).repeat(3, 1)
    got = fb.predict_batches(linear, params, gaussian(params), x.split(4), labelled=False).samples
    assert_close(got[:, :4], got[:, 4:8])


def dropped_inputs(params, x):
    """Shows its mask: ones become 0 or 2."""
    return F.dropout(x, 0.5)


def test_dropout_masks_are_not_repeated_between_batches():
    x = torch.ones(12, 16, dtype=F64)
    got = fb.predict_batches(
        dropped_inputs, {}, fb.Dropout(), x.split(4), labelled=False, num_samples=3, seed=0
    )
    masks = got.samples.flatten(0, 1)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_dropout_masks_are_not_repeated_between_batches_of_several_inputs_of_different_lengths():
    def fn(params, x):
        return F.dropout(x["image"], 0.5) + 0 * x["table"].sum()

    batches = [{"image": torch.ones(4, 16, dtype=F64), "table": torch.ones(7, dtype=F64)} for _ in range(3)]
    got = fb.predict_batches(fn, {}, fb.Dropout(), batches, labelled=False, num_samples=3, seed=0)
    masks = got.samples.flatten(0, 1)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_a_shared_dropout_mask_is_one_for_all_rows_and_batches():
    x = torch.ones(11, 16, dtype=F64)
    posterior = fb.Dropout(shared_mask=True)
    got = fb.predict_batches(dropped_inputs, {}, posterior, x.split(4), labelled=False, num_samples=3, seed=0)
    assert_close(got.samples, got.samples[:, :1].expand(3, 11, 16))
    assert len({tuple(mask.tolist()) for mask in got.samples[:, 0]}) == 3


def test_masks_keep_units_in_proportion_and_the_mean_of_the_inputs():
    x, count = torch.ones(50, 16, dtype=F64), 40
    got = fb.predict(dropped_inputs, {}, fb.Dropout(rate=0.2), x, num_samples=count, seed=0).samples
    assert set(got.unique().tolist()) == {0.0, 1 / 0.8}
    standard_error = (0.2 * 0.8 / got.numel()) ** 0.5
    assert abs((got == 0).double().mean() - 0.2) < 4 * standard_error


def test_a_bar_of_progress_changes_nothing(capsys):
    params, x = linear_params(), randn(6, 3)
    for progress in (False, True):
        got = fb.predict_batches(
            linear, params, fb.Point(params), x.split(3), labelled=False, progress=progress
        )
        assert_close(got.mean, linear(params, x))


def test_a_predictor_is_predict_with_everything_but_the_inputs_fixed():
    params, x, y = linear_params(), randn(5, 3), randn(5, 2, seed=4)
    posterior = gaussian(params)
    options = {"num_samples": S, "seed": 3, "chunk_size": 2, "keep_samples": False, "targets": y}
    predict = fb.predictor(linear, params, posterior, Normal(0.3), **options)
    expected = fb.predict(linear, params, posterior, x, likelihood=Normal(0.3), **options)
    assert_close(predict(x).mean, expected.mean)
    assert_close(predict(x).variance, expected.variance)
    assert_close(predict(x).log_prob(), expected.log_prob())
    wide = fb.predictor(linear, params, posterior, dtype=torch.float32, num_samples=2)(x)
    assert wide.samples.dtype == torch.float32


def test_a_predictor_without_a_seed_uses_the_same_draws_every_time():
    params, x = linear_params(), randn(5, 3)
    predict = fb.predictor(linear, params, gaussian(params), num_samples=S, chunk_size=S)
    assert_close(predict(x).samples, predict(x).samples)


# Memory.


class Watching(fb.Posterior):
    """Draws of a weight; it counts those that are alive whenever more are asked for, with the new ones."""

    def __init__(self):
        self.made, self.alive = [], []

    def draws(self, indices, seed):
        leaf = torch.stack([randn(64, 64, seed=int(i)) for i in indices])
        self.made.append((len(indices), StorageWeakRef(leaf.untyped_storage())))
        self.alive.append(sum(number for number, storage in self.made if not storage.expired()))
        return fb.Draw({"w": leaf})


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_draws_of_one_chunk_are_gone_when_those_of_the_next_are_made(chunk_size):
    def fn(params, x):
        return torch.tanh(x @ params["w"])[:, :1]

    num_rows = 5 if chunk_size else 4096  # 2 MB a draw: not all of them fit in one chunk
    for _ in range(3):  # the first call learns
        posterior = Watching()
        fb.predict(
            fn,
            None,
            posterior,
            randn(num_rows, 64),
            num_samples=20,
            seed=0,
            chunk_size=chunk_size,
            keep_samples=False,
        )
        numbers = [number for number, _ in posterior.made]
        assert sum(numbers) >= 20
        assert max(posterior.alive) == max(numbers) < 20


@pytest.mark.parametrize(("width", "most"), [(8, 100), (150, 46), (600, 32)])
def test_more_draws_at_a_time_than_32_only_where_they_are_small(width, most):
    class Wide(Watching):
        def draws(self, indices, seed):
            self.made.append(len(indices))
            return fb.Draw({"w": torch.zeros(len(indices), width, width, dtype=F64)})

    def fn(params, x):
        return x @ params["w"]

    posterior = Wide()
    fb.predict(fn, None, posterior, randn(1, width), num_samples=100, seed=0)
    assert max(posterior.made) == most  # 8 MB of parameters, or 32 draws


# What the engine remembers.


def num_cells(fn):
    return _engine._tuners.count(fn)


def dropping_model():
    return fb.make_functional(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)))


MANY = 150


def test_a_new_predicate_at_every_call_does_not_make_the_memory_of_the_engine_grow():
    fn, params = dropping_model()
    for i in range(MANY):
        posterior = fb.Dropout(where=lambda path, _, i=i: path == "1")
        fb.predict(fn, params, posterior, torch.ones(2, 3), num_samples=2, seed=0)
    assert num_cells(fn) <= MANY // 2


def test_another_number_of_rows_at_every_call_does_not_make_the_memory_of_the_engine_grow():
    fn, params = dropping_model()
    for num_rows in range(1, MANY + 1):
        fb.predict(fn, params, fb.Dropout(), torch.ones(num_rows, 3), num_samples=2, seed=0)
    assert num_cells(fn) <= MANY // 2


@pytest.mark.parametrize("refers", [False, True])
def test_a_model_is_freed_even_if_a_predicate_refers_to_it(refers):
    def predicted():
        fn, params = dropping_model()
        refer = (lambda path, _: fn is not None) if refers else (lambda path, _: True)
        posterior = fb.Dropout(where=refer)
        for chunk_size in (None, 2):
            fb.predict(fn, params, posterior, torch.ones(2, 3), num_samples=4, chunk_size=chunk_size)
        return weakref.ref(fn), weakref.ref(refer)

    model, predicate = predicted()
    gc.collect()
    assert model() is None
    assert predicate() is None


# Copies and threads.


def test_a_copy_of_the_model_predicts_the_same():
    model = MODELS["conv"]()
    posterior, x = gaussian(model.params), model.inputs(4)
    expected = fb.predict(model.fn, model.params, posterior, x, num_samples=3, seed=0, chunk_size=3).samples
    got = fb.predict(
        copy.deepcopy(model.fn), model.params, copy.deepcopy(posterior), x, num_samples=3, seed=0
    )
    assert_close(got.samples, expected)


def test_a_function_without_a_hash_or_weak_references_can_be_a_model():
    class Slotted:
        __slots__ = ()
        __hash__ = None

        def __call__(self, params, x):
            return linear(params, x)

    params, x = linear_params(), randn(5, 3)
    got = fb.predict(Slotted(), params, gaussian(params), x, num_samples=S, seed=0).samples
    assert_close(got, fb.predict(linear, params, gaussian(params), x, num_samples=S, seed=0).samples)


def test_draws_are_the_same_in_every_thread():
    params, x = linear_params(), randn(5, 3)
    found = []

    def work():
        found.append(fb.predict(linear, params, gaussian(params), x, num_samples=S, seed=0).samples)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = fb.predict(linear, params, gaussian(params), x, num_samples=S, seed=0).samples
    assert len(found) == 4
    for samples in found:
        assert_close(samples, expected)


# Errors.


def failing(message, error, call, **changes):
    return pytest.param(changes, error, message, id=call)


ERRORS = [
    failing("nn.Module.*make_functional", TypeError, "fn is a module", fn=nn.Linear(3, 2)),
    failing("function of \\(params, x\\), got int", TypeError, "fn is no function", fn=3),
    failing("posterior, got dict.*Point", TypeError, "posterior is a dict", posterior=linear_params()),
    failing("at least 1, got 0", ValueError, "no draws", num_samples=0),
    failing("at least 1, got -1", ValueError, "negative number of draws", num_samples=-1),
    failing("int, got float", TypeError, "fraction of a draw", num_samples=2.5),
    failing("int, got bool", TypeError, "bool for a number of draws", num_samples=True),
    failing("chunk_size=.* at least 1, got 0", ValueError, "empty chunks", chunk_size=0),
    failing("chunk_size=.* int, got float", TypeError, "fraction of a chunk", chunk_size=1.5),
    failing("funcbayes.likelihoods", TypeError, "likelihood is a name", likelihood="normal"),
    failing("funcbayes.likelihoods", TypeError, "likelihood is a class", likelihood=Categorical),
    failing("one tensor, got dict", TypeError, "model returns a dict", fn=lambda p, x: {"f": linear(p, x)}),
    failing("one tensor, got tuple", TypeError, "model returns a tuple", fn=lambda p, x: (x, x)),
    failing("targets=.* needs a likelihood", ValueError, "targets alone", targets=torch.zeros(5, 2)),
    failing("floating-point dtype, got torch.int64", ValueError, "integer dtype", dtype=torch.int64),
    failing(
        "covers 'other', and `params` has 'b', 'gain', 'w'",
        ValueError,
        "posterior over another leaf",
        posterior=gaussian({"other": randn(2)}),
    ),
    failing(
        r"'w' has draws of shape \(3, 2\), and \(2, 3\) in `params`",
        ValueError,
        "posterior of another shape",
        posterior=gaussian({"w": randn(3, 2)}),
    ),
    failing(
        "find dropout in the model, but `linear` has none", ValueError, "no dropout", posterior=fb.Dropout()
    ),
    failing(
        "drops nothing in `dropping_nothing`.*rate 0",
        ValueError,
        "dropout at rate 0",
        fn=lambda p, x: dropping_nothing(p, x),
        posterior=fb.Dropout(),
    ),
    failing(
        "where='head'.*make_functional",
        TypeError,
        "paths in a plain function",
        fn=lambda p, x: F.dropout(linear(p, x), 0.5),
        posterior=fb.Dropout(where="head"),
    ),
    failing(
        r"should have shape \(5, 2\).*got \(5,\)",
        ValueError,
        "targets of another shape",
        likelihood=Normal(0.1),
        targets=torch.zeros(5),
    ),
    failing("0 to 1", ValueError, "label out of range", likelihood=Categorical(), targets=torch.arange(5)),
]


def dropping_nothing(params, x):
    return F.dropout(linear(params, x), 0.0)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_predict_refuses(changes, error, message, chunk_size):
    params = linear_params()
    call = {"fn": linear, "params": params, "posterior": gaussian(params), "x": randn(5, 3)}
    call |= {"num_samples": 4, "seed": 0, "chunk_size": chunk_size} | changes
    if message.startswith("drops nothing"):
        call["fn"] = dropping_nothing
    arguments = [call.pop(name) for name in ("fn", "params", "posterior", "x")]
    with pytest.raises(error, match=message):
        fb.predict(*arguments, **call)


def test_a_predictor_refuses_an_option_that_predict_does_not_have():
    params = linear_params()
    with pytest.raises(TypeError, match="no option 'num_sample'; it has .*num_samples"):
        fb.predictor(linear, params, fb.Point(params), num_sample=3)


def test_a_predictor_refuses_bad_arguments_before_it_is_called():
    params = linear_params()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        fb.predictor(linear, params, fb.Point(params), num_samples=0)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        fb.predictor(nn.Linear(3, 2), params, fb.Point(params))


def test_batches_are_refused_if_there_are_none_or_they_are_no_pairs():
    params = linear_params()
    with pytest.raises(ValueError, match="at least one batch, got none"):
        fb.predict_batches(linear, params, fb.Point(params), [])
    with pytest.raises(ValueError, match="pairs .x, y., got Tensor.*labelled=False"):
        fb.predict_batches(linear, params, fb.Point(params), [randn(2, 3)])


@pytest.mark.parametrize("seed", [1.5, "one"])
def test_a_seed_that_is_no_integer_is_refused_by_name(seed):
    params = linear_params()
    with pytest.raises(TypeError, match="seed"):
        fb.predict(linear, params, gaussian(params), randn(5, 3), seed=seed)


@pytest.mark.parametrize("kind", ["vmap", "rows_first", "channels_last"])
def test_a_branch_that_vmap_cannot_take_may_show_late(monkeypatch, kind):
    monkeypatch.setattr(_engine._Tuner, "next_to_time", lambda self: _engine.Mechanism(kind, 5))

    def branching(params, x):
        h = x @ params["w"]
        return h if x.max() < 10 else h + h[h > 0].sum()  # of a size that depends on numbers

    ensemble, x = fb.Ensemble(zoo.members({"w": randn(3, 4)})), randn(2, 3)
    fb.predict(branching, None, ensemble, x)
    with pytest.warns(UserWarning, match="`vmap` cannot take .* evaluated in a loop"):
        got = fb.predict(branching, None, ensemble, 100 + x).samples
    expected = torch.stack([branching(ensemble.member(k), 100 + x) for k in range(5)])
    assert_close(got, expected)
    for chunk_size in (None, 5):  # it is said once
        assert_close(fb.predict(branching, None, ensemble, 100 + x, chunk_size=chunk_size).samples, expected)


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
def test_chunks_of_a_given_size_are_evaluated_alike_whatever_failed_before():
    sizes = []

    def branching(params, x):
        sizes.append(len(physical(params["w"])) if physical(params["w"]).ndim == 3 else 1)
        h = x @ params["w"]
        return h if x.max() < 10 else h + h[h > 0].sum()  # of a size that depends on numbers

    ensemble, x = fb.Ensemble({"w": randn(5, 3, 4).float()}), randn(2, 3).float()
    before = fb.predict(branching, None, ensemble, x, chunk_size=5).samples
    fb.predict(branching, None, ensemble, 100 + x, chunk_size=5)
    sizes.clear()
    assert torch.equal(fb.predict(branching, None, ensemble, x, chunk_size=5).samples, before)
    assert sizes == [5]


def test_a_branch_that_vmap_needs_rules_for_may_show_late(monkeypatch):
    monkeypatch.setattr(_engine._Tuner, "next_to_time", lambda self: _engine.Mechanism("vmap", 5))
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(3, 4, batch_first=True, dtype=F64)
    fn, params = fb.make_functional(lstm, call=lambda module, x: module(x)[0][:, -1])
    params = {**{f"lstm.{k}": v for k, v in params.items()}, "w": randn(3, 4)}
    calls = []

    def branching(params, x):
        calls.append(1)
        if len(calls) < 3:
            return x[:, -1] @ params["w"]
        return fn({k.removeprefix("lstm."): v for k, v in params.items() if k != "w"}, x)

    ensemble, x = fb.Ensemble(zoo.members(params)), randn(2, 5, 3)
    for _ in range(6):
        got = fb.predict(branching, None, ensemble, x).samples
    # A trial, a pass of all draws each time, one more where rules were missed, one that was to be recorded.
    assert len(calls) == 1 + 6 + 1 + 1
    assert_close(got, torch.stack([branching(ensemble.member(k), x) for k in range(5)]))


def doubled(flat):
    flat.mul_(2.0)


def rectified_by_keyword(flat):
    torch.relu_(input=flat)


def doubled_into(flat):
    torch.mul(flat, 2.0, out=flat)


def all_positive(flat):
    flat |= torch.ones_like(flat)


# What is written through a view, and of what: images are copied into rows, bits are of comparisons.
WRITES = {
    "in_place": (doubled, False),
    "by_keyword": (rectified_by_keyword, False),
    "into": (doubled_into, False),
    "of_bits": (all_positive, True),
}


@pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning")
@pytest.mark.parametrize("inside", [False, True])  # of another `vmap`
@pytest.mark.parametrize(("write", "of_bits"), WRITES.values(), ids=WRITES.keys())
def test_writing_through_a_view_that_is_a_copy_here_is_not_lost(write, of_bits, inside):
    if inside and write is doubled_into:
        pytest.skip("vmap has no rule for what is told where to write")

    def fn(params, x):
        h = F.conv2d(x, params["w"])
        h = h > 0 if of_bits else h
        write(h.flatten(1))
        return h.to(x.dtype).mean((2, 3))

    x, ensemble = randn(4, 3, 6, 6), fb.Ensemble({"w": randn(5, 4, 3, 3, 3)})
    batches = [x, randn(4, 3, 6, 6, seed=1)] if inside else [x]
    expected = torch.stack([torch.stack([fn(ensemble.member(k), x) for k in range(5)]) for x in batches])
    for chunk_size in (*[None] * 30, 5):  # by every mechanism that is tried
        call = lambda x, size=chunk_size: fb.predict(fn, None, ensemble, x, chunk_size=size).samples  # noqa: E731
        got = vmap(call)(torch.stack(batches)) if inside else call(x)[None]
        assert_close(got, expected)
