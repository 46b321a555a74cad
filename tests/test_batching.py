"""Every batching rule, under every kind, against a Python loop over the draws."""

import copy
import itertools
import unittest.mock
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

import funcbayes as fb
from funcbayes._intercept import Batching, Observed, _batching, _recurrent

F64 = torch.float64
S = 3  # draws
KINDS = ("vmap", "rows_first", "channels_last")
all_kinds = pytest.mark.parametrize("kind", KINDS)
# Plain "vmap" has the rule of attention alone; whatever else it does is torch's.
kinds_with_all_rules = pytest.mark.parametrize("kind", KINDS[1:])
# torch's own: where no rule applies, vmap says that it maps an operation slowly; forward-mode
# derivatives load decompositions through torch.jit.script.
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def ids(*shape, below, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


class Watch:
    """A function under ``Batching``, and how often the rule of ``func`` answered the call itself.

    Multi-head attention that its rule does not answer is not left to vmap, but opened.
    """

    def __init__(self, kind: str, func: Any) -> None:
        self.rules = Batching(kind)
        self.fired = self.left_to_vmap = 0
        self.is_asked = False
        handlers = self.rules.handlers
        if func in handlers:
            handlers[func] = self._counting(handlers[func])
        if func is F.multi_head_attention_forward:
            for part in {F.linear, F.scaled_dot_product_attention} & handlers.keys():
                handlers[part] = self._inside(handlers[part])

    def _inside(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        def count(mode, func, args, kwargs):
            self.left_to_vmap += self.is_asked
            return handler(mode, func, args, kwargs)

        return count

    def _counting(self, handler: Callable[..., Any]) -> Callable[..., Any]:
        def count(mode, func, args, kwargs):
            before = self.left_to_vmap

            def left(*a, **k):
                self.left_to_vmap += 1
                return func(*a, **k)

            self.is_asked = True
            result = handler(mode, left, args, kwargs)
            self.is_asked = False
            self.fired += self.left_to_vmap == before
            return result

        return count

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args):
            with self.rules:
                return function(*args)

        return inside


class Case(NamedTuple):
    """``function(*arguments)``; the shapes are those of one draw, ints are tokens below that number."""

    func: Any
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    mapped: str  # one letter an argument: "b" batched, "s" shared
    fires: bool = True
    tokens_below: int | None = None  # the first argument is made of token numbers
    constants: tuple[int, ...] = ()  # arguments in which torch has no gradient


def arguments_of(case: Case, draws: int = S, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    out = []
    for i, (shape, how) in enumerate(zip(case.shapes, case.mapped, strict=True)):
        full = (draws, *shape) if how == "b" else shape
        if i == 0 and case.tokens_below is not None:
            out.append(ids(*full, below=case.tokens_below))
        else:
            out.append(randn(*full, seed=i, dtype=dtype))
    return out


def in_dims_of(case: Case) -> tuple[int | None, ...]:
    return tuple(0 if how == "b" else None for how in case.mapped)


def loop(function, arguments, in_dims):
    size = next(a.shape[d] for a, d in zip(arguments, in_dims, strict=True) if d is not None)
    results = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return torch.stack(results)


def outputs_and_gradients(run, arguments, constants=()):
    """Outputs, and the gradients of a random linear functional of them, by one call of autograd."""
    leaves = [
        a if i in constants or not a.is_floating_point() else a.detach().requires_grad_()
        for i, a in enumerate(arguments)
    ]
    out = run(leaves)
    first = out[0] if isinstance(out, tuple) else out
    floating = [a for a in leaves if a.requires_grad]
    cotangent = randn(*first.shape, seed=99).to(first.dtype)
    gradients = torch.autograd.grad((first * cotangent).sum(), floating, allow_unused=True)
    detached = tuple(o.detach() for o in out) if isinstance(out, tuple) else out.detach()
    return detached, gradients


def check(case: Case, kind: str, arguments=None, in_dims=None) -> Watch:
    """Outputs and gradients equal a loop's; returns what was counted."""
    arguments = arguments_of(case) if arguments is None else arguments
    in_dims = in_dims_of(case) if in_dims is None else in_dims
    watch = Watch(kind, case.func)
    mapped = vmap(watch(case.function), in_dims)
    got = outputs_and_gradients(lambda a: mapped(*a), arguments, case.constants)
    expected = outputs_and_gradients(lambda a: loop(case.function, a, in_dims), arguments, case.constants)
    torch.testing.assert_close(got, expected)
    return watch


def should_fire(case: Case, kind: str) -> bool:
    return case.fires and (kind != "vmap" or case.func is F.scaled_dot_product_attention)


# Linear maps --------------------------------------------------------------------------------------

MAPPED = ["".join(m) for m in itertools.product("bs", repeat=3) if "b" in m]
INPUTS = {"1d": (4,), "2d": (5, 4), "3d": (2, 5, 4), "4d": (2, 1, 5, 4)}


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("value", INPUTS.values(), ids=INPUTS.keys())
def test_a_linear_map_equals_a_loop_whichever_of_input_weight_and_bias_are_mapped(kind, mapped, value):
    case = Case(F.linear, F.linear, (value, (3, 4), (3,)), mapped, fires=mapped[1] == "b")
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", ["bb", "sb", "bs"])
@pytest.mark.parametrize("value", INPUTS.values(), ids=INPUTS.keys())
def test_a_linear_map_without_bias_equals_a_loop(kind, mapped, value):
    case = Case(F.linear, F.linear, (value, (3, 4)), mapped, fires=mapped[1] == "b")
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
def test_a_linear_map_given_by_keywords_equals_a_loop(kind):
    case = Case(F.linear, lambda x, w, b: F.linear(bias=b, weight=w, input=x), ((5, 4), (3, 4), (3,)), "bbb")
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", ["bb", "sb", "bs"])
def test_a_linear_map_by_a_vector_of_weights_equals_a_loop(kind, mapped):
    check(Case(F.linear, F.linear, ((5, 4), (4,)), mapped), kind)


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", ["bb", "sb"])
def test_a_linear_map_of_another_width_is_refused_as_by_torch_though_it_would_fit_in_other_rows(kind, mapped):
    case = Case(F.linear, F.linear, ((4, 6), (5, 3)), mapped)
    mapped_linear = vmap(Watch(kind, F.linear)(F.linear), in_dims_of(case))
    x, weight = arguments_of(case)
    with pytest.raises(RuntimeError, match=r"shape|size|dimension"):
        mapped_linear(x, weight.requires_grad_())


@kinds_with_all_rules
@pytest.mark.parametrize("value", [(0, 4), (2, 0, 4), (5, 0)], ids=["no_rows", "no_tokens", "no_inputs"])
@pytest.mark.parametrize("mapped", ["bbb", "sbb"])
def test_a_linear_map_of_nothing_equals_a_loop(kind, mapped, value):
    check(Case(F.linear, F.linear, (value, (3, value[-1]), (3,)), mapped), kind)


# Convolutions -------------------------------------------------------------------------------------

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 5)}
KERNELS = {1: (3,), 2: (3, 1), 3: (3, 3, 1)}
CONVOLUTION_SETTINGS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "padding_same": {"padding": "same"},
    "padding_valid": {"padding": "valid"},
    "dilation": {"dilation": 2, "padding": 2},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "all": {"stride": 2, "padding": 2, "dilation": 2, "groups": 2},
}


def convolution(ndim, settings, mapped, with_bias=True):
    groups = settings.get("groups", 1)
    shapes = ((2, 4, *SIZES[ndim]), (4, 4 // groups, *KERNELS[ndim]), (4,))[: 3 if with_bias else 2]
    # A shared input of a grouped convolution is no wide convolution.
    fires = mapped[1] == "b" and (mapped[0] == "b" or groups == 1)
    convolve = CONVOLUTIONS[ndim]
    return Case(convolve, lambda *a: convolve(*a, **settings), shapes, mapped, fires)


@kinds_with_all_rules
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("settings", CONVOLUTION_SETTINGS.values(), ids=CONVOLUTION_SETTINGS.keys())
@pytest.mark.parametrize("mapped", ["bbb", "sbb"])
def test_a_convolution_equals_a_loop_for_every_setting(kind, ndim, settings, mapped):
    case = convolution(ndim, settings, mapped)
    if case.fires or kind == "vmap":
        assert bool(check(case, kind).fired) == should_fire(case, kind)
    else:
        check(case, kind)


@kinds_with_all_rules
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mapped", [*MAPPED, "bb", "sb", "bs"])
def test_a_convolution_equals_a_loop_whichever_arguments_are_mapped(kind, ndim, groups, mapped):
    case = convolution(ndim, {"groups": groups, "padding": 1}, mapped, with_bias=len(mapped) == 3)
    watch = check(case, kind)
    if should_fire(case, kind):
        assert watch.fired


@kinds_with_all_rules
@pytest.mark.parametrize("ndim", [2, 3])
def test_a_convolution_with_one_setting_a_dimension_equals_a_loop(kind, ndim):
    settings = {
        "stride": (2, 1, 1)[:ndim],
        "padding": (0, 1, 2)[:ndim],
        "dilation": (1, 2, 1)[:ndim],
    }
    case = convolution(ndim, settings, "bbb")
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
def test_a_convolution_with_positional_settings_equals_a_loop(kind):
    case = Case(
        F.conv2d,
        lambda x, w, b: F.conv2d(x, w, b, 2, (1, 0), 1, 2),
        ((2, 4, 7, 6), (6, 2, 3, 3), (6,)),
        "bbb",
    )
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("mapped", ["bbb", "sbb"])
def test_a_convolution_of_one_example_without_a_row_axis_equals_a_loop(kind, ndim, mapped):
    case = convolution(ndim, {}, mapped)
    check(case._replace(shapes=(case.shapes[0][1:], *case.shapes[1:])), kind)


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", ["bbb", "sbb"])
def test_a_convolution_of_no_rows_equals_a_loop(kind, mapped):
    case = convolution(2, {}, mapped)
    check(case._replace(shapes=((0, *case.shapes[0][1:]), *case.shapes[1:])), kind)


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", ["bbb", "sbb"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_convolution_of_images_of_one_channel_equals_a_loop(kind, mapped, rows):
    case = convolution(2, {"padding": 1}, mapped)
    case = case._replace(shapes=((rows, 1, *SIZES[2]), (4, 1, *KERNELS[2]), (4,)))
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_in_channels_last_after_the_first_convolution_and_their_gradients_before_a_pool(channels):
    # Images of one channel are in both layouts, and torch takes them for the usual one. Pools, and the
    # gradients of what comes between, take several times as long in two layouts.
    x, kernels = randn(5, channels, 8, 8), randn(2, 4, channels, 3, 3).requires_grad_()
    layouts = []

    def note(value):
        layouts.append(value.flatten(1, 2).is_contiguous(memory_format=torch.channels_last))

    def network(weight):
        with Batching("channels_last"):
            return F.adaptive_avg_pool2d(F.conv2d(x, weight).relu(), 1)

    out = vmap(network, out_dims=1)(kernels)
    node = out.grad_fn
    while node.name() != "ReluBackward0":
        node = node.next_functions[0][0]
    note(node._saved_result)
    node.register_hook(lambda after, before: note(after[0]))
    out.sum().backward()
    assert layouts == [True, True]


def test_the_gradient_of_a_pool_is_in_channels_last_although_a_linear_map_leaves_it_in_another_layout():
    x, kernels = randn(5, 3, 8, 8), randn(2, 4, 3, 3, 3).requires_grad_()
    weights = randn(2, 6, 36).requires_grad_()
    layouts = []

    def network(kernel, weight):
        with Batching("channels_last"):
            return F.linear(F.max_pool2d(F.conv2d(x, kernel), 2).flatten(1), weight)

    out = vmap(network)(kernels, weights)
    nodes = [out.grad_fn]
    while (node := nodes.pop()).name() != "MaxPool2DWithIndicesBackward0":
        nodes += [following for following, _ in node.next_functions if following is not None]
    node.register_prehook(
        lambda grads: layouts.append(grads[0].is_contiguous(memory_format=torch.channels_last))
    )
    out.sum().backward()
    assert layouts == [True]


def pooled(x):
    """A function of two kernels of each draw, with pooling between them, and nothing nonlinear after it."""

    def network(first, second):
        with Batching("channels_last"):
            return F.conv2d(F.max_pool2d(F.conv2d(x, first), 2), second)

    return vmap(network)


def test_several_gradients_through_a_pool_are_those_of_each():
    kernels = randn(2, 4, 3, 3, 3).requires_grad_(), randn(2, 2, 4, 1, 1, seed=1)
    out = pooled(randn(5, 3, 8, 8))(*kernels)
    cotangents = randn(3, *out.shape, seed=2)
    (got,) = torch.autograd.grad(out, kernels[0], cotangents, retain_graph=True, is_grads_batched=True)
    expected = [torch.autograd.grad(out, kernels[0], one, retain_graph=True)[0] for one in cotangents]
    torch.testing.assert_close(got, torch.stack(expected))


def test_a_gradient_of_a_gradient_through_a_pool_that_has_none_equals_a_loops():
    x, found = randn(5, 3, 8, 8), []
    for run in (
        pooled(x),
        lambda *a: loop(lambda v, w: F.conv2d(F.max_pool2d(F.conv2d(x, v), 2), w), a, (0, 0)),
    ):
        kernels = randn(2, 4, 3, 3, 3).requires_grad_(), randn(2, 2, 4, 1, 1, seed=1).requires_grad_()
        (grad,) = torch.autograd.grad(run(*kernels).sum(), kernels[0], create_graph=True)
        grad.square().sum().backward()
        found.append(kernels[1].grad)
    torch.testing.assert_close(*found)


# Pooling ------------------------------------------------------------------------------------------

POOLINGS = {
    "max1d": (F.max_pool1d, lambda x: F.max_pool1d(x, 2), 1),
    "max1d_options": (
        F.max_pool1d,
        lambda x: F.max_pool1d(x, kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=True),
        1,
    ),
    "avg1d": (F.avg_pool1d, lambda x: F.avg_pool1d(x, 3), 1),
    "avg1d_options": (
        F.avg_pool1d,
        lambda x: F.avg_pool1d(x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        1,
    ),
    "adaptive_avg1d": (F.adaptive_avg_pool1d, lambda x: F.adaptive_avg_pool1d(x, 4), 1),
    "adaptive_max1d": (F.adaptive_max_pool1d, lambda x: F.adaptive_max_pool1d(x, 4), 1),
    "max2d": (F.max_pool2d, lambda x: F.max_pool2d(x, 2), 2),
    "max2d_options": (
        F.max_pool2d,
        lambda x: F.max_pool2d(x, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), ceil_mode=True),
        2,
    ),
    "avg2d": (F.avg_pool2d, lambda x: F.avg_pool2d(x, 2), 2),
    "avg2d_options": (
        F.avg_pool2d,
        lambda x: F.avg_pool2d(
            x, (3, 2), stride=2, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=5
        ),
        2,
    ),
    "adaptive_avg2d": (F.adaptive_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, (3, None)), 2),
    "adaptive_avg2d_one": (F.adaptive_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, 1), 2),
    "adaptive_avg2d_ones": (F.adaptive_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, [1, 1]), 2),
    "adaptive_avg2d_a_row": (F.adaptive_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, (1, None)), 2),
    "adaptive_max2d": (F.adaptive_max_pool2d, lambda x: F.adaptive_max_pool2d(x, (3, 2)), 2),
}
OTHER_POOLINGS = {  # no rule has to serve these
    "max1d_indices": (lambda x: F.max_pool1d(x, 2, return_indices=True), 1),
    "max2d_indices": (lambda x: F.max_pool2d(x, 2, return_indices=True), 2),
    "adaptive_max2d_indices": (lambda x: F.adaptive_max_pool2d(x, 3, return_indices=True), 2),
    "max2d_keyword_input": (lambda x: F.max_pool2d(input=x, kernel_size=2), 2),
    "avg2d_keyword_input": (lambda x: F.avg_pool2d(input=x, kernel_size=2), 2),
    "max3d": (lambda x: F.max_pool3d(x, 2), 3),
    "avg3d": (lambda x: F.avg_pool3d(x, 2), 3),
    "lp2d": (lambda x: F.lp_pool2d(x, 2.0, 2), 2),
}


@kinds_with_all_rules
@pytest.mark.parametrize(("func", "function", "ndim"), POOLINGS.values(), ids=POOLINGS.keys())
def test_pooling_equals_a_loop(kind, func, function, ndim):
    case = Case(func, function, ((2, 4, *SIZES[ndim]),), "b")
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
@pytest.mark.parametrize(("function", "ndim"), OTHER_POOLINGS.values(), ids=OTHER_POOLINGS.keys())
def test_pooling_in_other_forms_equals_a_loop(kind, function, ndim):
    check(Case(None, function, ((2, 4, *SIZES[ndim]),), "b"), kind)


@kinds_with_all_rules
@pytest.mark.parametrize(("func", "function", "ndim"), POOLINGS.values(), ids=POOLINGS.keys())
def test_pooling_of_one_example_without_a_row_axis_equals_a_loop(kind, func, function, ndim):
    check(Case(func, function, ((4, *SIZES[ndim]),), "b"), kind)


# Normalisation ------------------------------------------------------------------------------------


def normalised(x, mean, variance, weight=None, bias=None):
    return F.batch_norm(x, mean, variance.square() + 0.5, weight, bias, eps=1e-3)


NORM_INPUTS = {"2d": (5, 4), "3d": (5, 4, 6), "4d": (5, 4, 3, 2), "5d": (2, 4, 3, 2, 2)}


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", ["".join(m) for m in itertools.product("bs", repeat=5) if "b" in m])
def test_batch_norm_in_evaluation_equals_a_loop_whichever_arguments_are_mapped(kind, mapped):
    case = Case(F.batch_norm, normalised, ((5, 4, 3, 2), (4,), (4,), (4,), (4,)), mapped, constants=(1, 2))
    watch = check(case, kind)
    if mapped[0] == "b" and kind != "vmap":
        assert watch.fired


@kinds_with_all_rules
@pytest.mark.parametrize("value", NORM_INPUTS.values(), ids=NORM_INPUTS.keys())
@pytest.mark.parametrize("mapped", ["bbbbb", "bssss", "bbb", "bss"])
def test_batch_norm_in_evaluation_equals_a_loop_for_inputs_of_every_rank(kind, value, mapped):
    case = Case(
        F.batch_norm, normalised, (value, (4,), (4,), (4,), (4,))[: len(mapped)], mapped, constants=(1, 2)
    )
    watch = check(case, kind)
    if len(value) > 2 and kind != "vmap":
        assert watch.fired


@kinds_with_all_rules
def test_batch_norm_in_evaluation_by_position_equals_a_loop(kind):
    def function(x, mean, weight, bias):
        return F.batch_norm(x, mean, mean.exp(), weight, bias, False, 0.3, 0.01)

    case = Case(F.batch_norm, function, ((5, 4, 3, 2), (4,), (4,), (4,)), "bbbb", constants=(1,))
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
def test_batch_norm_with_the_statistics_of_the_batch_equals_a_loop(kind):
    def function(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, training=True)

    check(Case(F.batch_norm, function, ((5, 4, 3, 2), (4,), (4,)), "bbb"), kind)


LAYER_NORM_SHAPES = {"last": (6,), "last_two": (3, 6), "all_but_rows": (4, 3, 6)}


@kinds_with_all_rules
@pytest.mark.parametrize("shape", LAYER_NORM_SHAPES.values(), ids=LAYER_NORM_SHAPES.keys())
@pytest.mark.parametrize("mapped", MAPPED)
def test_layer_norm_equals_a_loop_whichever_arguments_are_mapped(kind, shape, mapped):
    def function(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, 1e-3)

    case = Case(F.layer_norm, function, ((2, 4, 3, 6), shape, shape), mapped, fires=mapped == "bbb")
    watch = check(case, kind)
    if should_fire(case, kind):
        assert watch.fired


@kinds_with_all_rules
@pytest.mark.parametrize("shape", LAYER_NORM_SHAPES.values(), ids=LAYER_NORM_SHAPES.keys())
def test_layer_norm_of_many_entries_which_is_called_for_each_draw_equals_a_loop(kind, shape, monkeypatch):
    monkeypatch.setattr(_batching, "_LARGE_NORM", 1)

    def function(x, weight, bias):
        return F.layer_norm(x, shape, weight, bias, 1e-3)

    case = Case(F.layer_norm, function, ((2, 4, 3, 6), shape, shape), "bbb")
    assert bool(check(case, kind).fired) == should_fire(case, kind)


@kinds_with_all_rules
@pytest.mark.parametrize("mapped", ["b", "bb", "sb", "bs"])
def test_layer_norm_without_all_of_its_affine_part_equals_a_loop(kind, mapped):
    def function(x, weight=None):
        return F.layer_norm(x, (6,), weight=weight)

    check(Case(F.layer_norm, function, ((2, 5, 6), (6,))[: len(mapped)], mapped), kind)


@kinds_with_all_rules
def test_layer_norm_of_one_vector_equals_a_loop(kind):
    def function(x, weight, bias):
        return F.layer_norm(input=x, normalized_shape=[6], weight=weight, bias=bias)

    case = Case(F.layer_norm, function, ((6,), (6,), (6,)), "bbb")
    assert bool(check(case, kind).fired) == should_fire(case, kind)


# Embedding ----------------------------------------------------------------------------------------

TOKENS = {"scalar": (), "1d": (6,), "2d": (2, 6), "none": (0,), "no_tokens": (2, 0)}


@kinds_with_all_rules
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS.keys())
@pytest.mark.parametrize("mapped", ["sb", "bb", "bs"])
def test_an_embedding_equals_a_loop(kind, tokens, mapped):
    case = Case(F.embedding, F.embedding, (tokens, (7, 3)), mapped, mapped != "bs", tokens_below=7)
    watch = check(case, kind)
    if should_fire(case, kind):
        assert watch.fired


@kinds_with_all_rules
@pytest.mark.parametrize("padding", [0, 2, -1])
@pytest.mark.parametrize("mapped", ["sb", "bs", "bb"])
def test_a_padded_embedding_equals_a_loop_and_gives_padding_no_gradient(kind, padding, mapped):
    def function(tokens, weight):
        return F.embedding(tokens, weight, padding_idx=padding)

    case = Case(F.embedding, function, ((4, 6), (7, 3)), mapped, tokens_below=7)
    check(case, kind)
    tokens, weight = arguments_of(case)
    leaf = weight.clone().requires_grad_()
    rules = Watch(kind, F.embedding)
    out = vmap(rules(function), in_dims_of(case))(tokens, leaf)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert (gradient[..., padding, :] == 0).all()
    assert gradient.any()


# Attention ----------------------------------------------------------------------------------------

Q, K, V = (2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 2)  # (rows, heads, length, width)
BOOLEAN = torch.ones(5, 6, dtype=torch.bool).tril(1)
ADDED = randn(5, 6, seed=7)
MASKS = {
    "none": None,
    "bool_2d": BOOLEAN,
    "float_2d": ADDED,
    "bool_padding": (torch.arange(6) < torch.tensor([[4], [6]]))[:, None, None],
    "float_rows": randn(2, 1, 5, 6, seed=8),
    "float_rows_heads": randn(2, 3, 5, 6, seed=8),
    "float_heads": randn(3, 5, 6, seed=8),
    "float_one_row": randn(1, 3, 5, 6, seed=8),
    "float_keys": randn(6, seed=8),
}


def attention(mapped, mask=None, shapes=(Q, K, V), **settings):
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)

    return Case(F.scaled_dot_product_attention, function, shapes, mapped)


@all_kinds
@pytest.mark.parametrize("mapped", MAPPED)
def test_attention_equals_a_loop_whichever_arguments_are_mapped(kind, mapped):
    assert check(attention(mapped), kind).fired == 1


@all_kinds
@pytest.mark.parametrize("mask", [m for m in MASKS.values() if m is None or m.ndim > 1])
@pytest.mark.parametrize("mapped", ["bbb", "sbb", "bss"])
def test_attention_under_every_kind_of_mask_equals_a_loop(kind, mask, mapped):
    assert check(attention(mapped, mask), kind).fired == 1


@all_kinds
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_attention_with_as_many_draws_as_rows_or_more_takes_the_mask_of_the_row(kind, rows):
    shapes = tuple((rows, *shape[1:]) for shape in (Q, K, V))
    mask = randn(rows, 1, 5, 6, seed=8)
    assert check(attention("bbb", mask, shapes), kind).fired == 1


@all_kinds
@pytest.mark.parametrize("mask", [m for m in MASKS.values() if m is not None and m.is_floating_point()])
def test_attention_with_a_mask_that_is_mapped_equals_a_loop(kind, mask):
    def function(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, m)

    if mask.ndim == 1:
        mask = mask.expand(5, 6)
    check(
        Case(F.scaled_dot_product_attention, function, (Q, K, V, tuple(mask.shape)), "bbbb"),
        kind,
    )


@all_kinds
@pytest.mark.parametrize("settings", [{"scale": 0.7}, {"is_causal": True}, {"is_causal": True, "scale": 2.0}])
@pytest.mark.parametrize("mapped", ["bbb", "bss"])
def test_causal_and_scaled_attention_equals_a_loop(kind, settings, mapped):
    assert check(attention(mapped, **settings), kind).fired == 1


@all_kinds
def test_attention_with_a_trained_mask_gives_it_the_gradient_of_a_loop(kind):
    def gradient(run):
        mask = ADDED.clone().requires_grad_()
        return torch.autograd.grad((run(mask) * randn(S, *Q[:-1], 2, seed=9)).sum(), mask)

    case = attention("bbb")
    arguments = arguments_of(case)
    rules = Watch(kind, case.func)
    got = gradient(lambda m: vmap(rules(lambda q, k, v: attention("bbb", m).function(q, k, v)))(*arguments))
    expected = gradient(lambda m: loop(attention("bbb", m).function, arguments, (0, 0, 0)))
    torch.testing.assert_close(got, expected)
    assert rules.fired == 1


WIDTH, HEADS, LENGTH = 8, 2, 5
PROJECTIONS = ((3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,))
FUTURE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def self_attention(mapped, shape=(LENGTH, 3, WIDTH), key=None, **settings):
    """Multi-head attention of a value to itself, or to ``key``, as ``nn.MultiheadAttention`` calls it."""

    def function(x, weight, bias, out_weight, out_bias):
        other = x if key is None else key
        given = {"add_zero_attn": False, "bias_k": None, "bias_v": None, "dropout_p": 0.0}
        found = F.multi_head_attention_forward(
            *(x, other, other, WIDTH, HEADS, weight, bias),
            out_proj_weight=out_weight,
            out_proj_bias=out_bias,
            **{"need_weights": False, **given, **settings},
        )
        return found if settings.get("need_weights") else found[0]

    return Case(F.multi_head_attention_forward, function, (shape, *PROJECTIONS), mapped)


@all_kinds
@pytest.mark.parametrize("mapped", ["".join(m) for m in itertools.product("bs", repeat=5) if "b" in m])
def test_self_attention_equals_a_loop_whichever_arguments_are_mapped(kind, mapped):
    case = self_attention(mapped)
    assert check(case, kind).fired == (mapped[1] == mapped[3] == "b" and kind != "vmap")


@all_kinds
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("is_by_rows", [False, True])
def test_self_attention_of_few_rows_in_both_orders_equals_a_loop(kind, rows, is_by_rows):
    case = self_attention("bbbbb", (LENGTH, rows, WIDTH))
    arguments = arguments_of(case)
    if is_by_rows:  # as ``batch_first`` has them
        arguments[0] = arguments[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert check(case, kind, arguments).fired == (kind != "vmap")


@all_kinds
@pytest.mark.parametrize(
    "settings", [{"training": False, "dropout_p": 0.5}, {"attn_mask": FUTURE, "is_causal": True}]
)
def test_causal_self_attention_and_that_without_dropout_equal_a_loop(kind, settings):
    assert check(self_attention("bbbbb", **settings), kind).fired == (kind != "vmap")


@all_kinds
def test_self_attention_without_biases_equals_a_loop(kind):
    def function(x, weight, out_weight):
        return self_attention("").function(x, weight, None, out_weight, None)

    shapes = ((LENGTH, 3, WIDTH), PROJECTIONS[0], PROJECTIONS[2])
    case = Case(F.multi_head_attention_forward, function, shapes, "bbb")
    assert check(case, kind).fired == (kind != "vmap")


@all_kinds
def test_self_attention_that_changes_the_width_equals_a_loop(kind):
    shapes = ((LENGTH, 3, WIDTH), *PROJECTIONS[:2], (3, WIDTH), (3,))
    case = Case(F.multi_head_attention_forward, self_attention("").function, shapes, "bbbbb")
    assert check(case, kind).fired == (kind != "vmap")


@all_kinds
def test_self_attention_of_another_width_than_it_says_is_refused_as_by_torch(kind):
    case = self_attention("bbbbb", (LENGTH, 3, WIDTH + 1))
    with pytest.raises(AssertionError, match="embedding dimension"):
        check(case, kind)


IS_PADDING = torch.arange(LENGTH) >= torch.tensor([[5], [3], [4]])
OPENED = {
    "mask": {"attn_mask": FUTURE},
    "float_mask": {"attn_mask": randn(LENGTH, LENGTH, seed=8)},
    "mask_of_heads": {"attn_mask": randn(3 * HEADS, LENGTH, LENGTH, seed=8)},
    "padding": {"key_padding_mask": IS_PADDING},
    "padding_and_mask": {"key_padding_mask": IS_PADDING, "attn_mask": FUTURE},
    "causal_with_padding": {"key_padding_mask": IS_PADDING, "attn_mask": FUTURE, "is_causal": True},
    "no_attention": {"add_zero_attn": True},
    "biases_of_keys": {"bias_k": randn(1, 1, WIDTH, seed=8), "bias_v": randn(1, 1, WIDTH, seed=9)},
    "dropout_of_everything": {"dropout_p": 1.0, "training": True},
    "weights_apart": {
        "use_separate_proj_weight": True,
        **{f"{name}_proj_weight": randn(WIDTH, WIDTH, seed=i) for i, name in enumerate("qkv")},
    },
    "given_keys": {"static_k": randn(3 * HEADS, 4, WIDTH // HEADS, seed=8)}
    | {"static_v": randn(3 * HEADS, 4, WIDTH // HEADS, seed=9)},
    "weights_wanted": {"need_weights": True},
    "another_key": {"key": randn(4, 3, WIDTH, seed=8)},
    "no_rows_axis": {"shape": (LENGTH, WIDTH)},
}


@all_kinds
@pytest.mark.parametrize("settings", OPENED.values(), ids=OPENED.keys())
def test_other_multi_head_attention_is_opened_and_equals_a_loop(kind, settings):
    case = self_attention("bbbbb", **settings)
    watch = Watch(kind, case.func)
    got = vmap(watch(case.function), randomness="different")(*arguments_of(case))
    torch.testing.assert_close(got, loop(case.function, arguments_of(case), in_dims_of(case)))
    assert watch.fired == 0 or kind == "vmap"


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_attention_in_training_is_whole_where_it_drops_nothing_and_never_selected_from_zeros(rate):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=rate, batch_first=True)
    fn, params = fb.make_functional(layer)
    members = {name: torch.stack([leaf] * S).requires_grad_() for name, leaf in params.items()}
    watch = Watch("channels_last", F.multi_head_attention_forward)

    x = randn(3, LENGTH, WIDTH, dtype=torch.float32)

    def trained(own, key):
        return fb.training_call(fn, own, x, key)[0]

    out = vmap(watch(trained))(members, torch.arange(S))
    assert watch.fired == (rate == 0)
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    assert "UnbindBackward0" in names
    assert "SelectBackward0" not in names


OTHER_ATTENTION = {  # shapes of query, key, value; settings
    "no_rows_axis": ((Q[1:], K[1:], V[1:]), {}),
    "2d": ((Q[2:], K[2:], V[2:]), {}),
    "5d": (((2, *Q), (2, *K), (2, *V)), {}),
    "zero_rows": (((0, *Q[1:]), (0, *K[1:]), (0, *V[1:])), {}),
    "grouped_queries": (((2, 6, 5, 4), (2, 3, 6, 4), (2, 3, 6, 2)), {"enable_gqa": True}),
    "one_key_head": ((Q, (2, 1, 6, 4), (2, 1, 6, 2)), {}),
    "one_row_of_keys": ((Q, (1, 3, 6, 4), (1, 3, 6, 2)), {}),
    "one_row_of_queries": (((1, 3, 5, 4), K, V), {}),
    "query_without_rows": (((3, 5, 4), K, V), {}),
    "key_without_rows": ((Q, K[1:], V[1:]), {}),
    "value_without_rows": ((Q, K, V[1:]), {}),
}


@all_kinds
@pytest.mark.parametrize(("shapes", "settings"), OTHER_ATTENTION.values(), ids=OTHER_ATTENTION.keys())
@pytest.mark.parametrize("mapped", ["bbb", "sbb", "bss"])
def test_attention_of_unusual_shapes_equals_a_loop(kind, shapes, settings, mapped):
    case = attention(mapped, shapes=shapes, **settings)
    try:
        loop(case.function, arguments_of(case), in_dims_of(case))
    except RuntimeError:
        pytest.skip("torch itself does not take these shapes")
    check(case, kind)


@all_kinds
@pytest.mark.parametrize("dropped", [0.0, 1.0])
def test_attention_with_dropout_keeps_its_meaning(kind, dropped):
    case = attention("bbb", dropout_p=dropped)

    arguments = arguments_of(case)
    rules = Watch(kind, case.func)
    got = vmap(rules(case.function), randomness="different")(*arguments)
    expected = loop(case.function, arguments, (0, 0, 0))
    torch.testing.assert_close(got, expected)


# Recurrent layers ---------------------------------------------------------------------------------

LAYERS = {
    "lstm": lambda **settings: nn.LSTM(3, 4, **settings),
    "gru": lambda **settings: nn.GRU(3, 4, **settings),
    "tanh": lambda **settings: nn.RNN(3, 4, **settings),
    "relu": lambda **settings: nn.RNN(3, 4, nonlinearity="relu", **settings),
}
SETTINGS = {
    "plain": {},
    "two_layers": {"num_layers": 2},
    "both_ways": {"bidirectional": True, "num_layers": 2},
    "rows_first": {"batch_first": True},
    "no_biases": {"bias": False, "bidirectional": True},
}
# They have one rule for all kinds.
RECURRENT_CASES = [(layer, settings) for layer in LAYERS for settings in SETTINGS.values()]
RECURRENT_CASES += [("lstm", {"proj_size": 2, "num_layers": 2}), ("lstm", {"proj_size": 2, "bias": False})]


def recurrent(layer, settings, mapped, shape=(5, 2), packed=False):
    """Of inputs, the first state and the weights ``mapped`` says which are; ``shape`` is of inputs."""
    made = LAYERS[layer](**settings).double()
    names = [name for name, _ in made.named_parameters()]
    # What a module hands to torch: the functions, and which axis has the rows.
    func = {"lstm": torch.lstm, "gru": torch.gru, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[layer]
    depth = made.num_layers * (2 if made.bidirectional else 1)
    rows = () if len(shape) == 1 else (shape[0 if made.batch_first else 1],)
    states = [(depth, *rows, made.proj_size or 4)] + ([(depth, *rows, 4)] if layer == "lstm" else [])

    def function(x, *others):
        hidden, weights = others[: len(states)], others[len(states) :]
        if packed:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=made.batch_first)
        hidden = hidden if layer == "lstm" else hidden[0]
        out, last = torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x, hidden))
        out = out.data if packed else out
        return (out, *(last if layer == "lstm" else (last,)))

    shapes = ((*shape, 3), *states, *(tuple(p.shape) for p in made.parameters()))
    letters = mapped[0] + mapped[1] * len(states) + mapped[2] * len(names)
    return Case(func, function, shapes, letters)


@pytest.mark.parametrize(("layer", "settings"), RECURRENT_CASES)
@pytest.mark.parametrize("most_rows", [0, 100], ids=["draw_by_draw", "step_by_step"])
def test_a_recurrent_layer_equals_a_loop(layer, settings, most_rows, monkeypatch):
    case = recurrent(layer, settings, "bsb")
    monkeypatch.setitem(_recurrent._MOST_ROWS, case.func, most_rows)
    assert check(case, "vmap").fired


@pytest.mark.parametrize("layer", ["lstm", "gru"])
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("most_rows", [0, 100], ids=["draw_by_draw", "step_by_step"])
@pytest.mark.parametrize("rows_first", [False, True])
def test_a_recurrent_layer_equals_a_loop_whichever_arguments_are_mapped(
    layer, mapped, most_rows, rows_first, monkeypatch
):
    case = recurrent(layer, {"batch_first": rows_first, "bidirectional": True}, mapped)
    monkeypatch.setitem(_recurrent._MOST_ROWS, case.func, most_rows)
    assert check(case, "vmap").fired


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mapped", ["bbb", "bss", "ssb"])
def test_a_recurrent_layer_of_one_sequence_and_of_packed_ones_equals_a_loop(layer, mapped):
    assert check(recurrent(layer, {}, mapped, shape=(5,)), "vmap").fired
    if mapped[0] == "s":  # what draws differ in cannot be packed: torch looks at its lengths
        assert check(recurrent(layer, {}, mapped, shape=(4, 2), packed=True), "vmap").fired


def ways_through_time(monkeypatch):
    """Mocks by name of the ways in which draws can be stepped together, or not."""
    ways = {
        name: unittest.mock.Mock(wraps=getattr(_recurrent, name))
        for name in ("_in_one_product", "_in_buffers", "_one_by_one")
    }
    for name, way in ways.items():
        monkeypatch.setattr(_recurrent, name, way)
    return ways


def mapped_without_gradients(case, arguments):
    with torch.no_grad():
        return vmap(Watch("vmap", case.func)(case.function), in_dims_of(case))(*arguments)


def looped_without_gradients(case, arguments):
    with torch.no_grad():
        return loop(case.function, arguments, in_dims_of(case))


@pytest.mark.parametrize(("layer", "settings"), RECURRENT_CASES)
def test_a_recurrent_layer_without_gradients_writes_over_its_buffers_and_equals_a_loop(
    layer, settings, monkeypatch
):
    case = recurrent(layer, settings, "bsb")
    ways, arguments = ways_through_time(monkeypatch), arguments_of(case)
    given = [argument.clone() for argument in arguments]
    found = [mapped_without_gradients(case, arguments) for _ in range(2)]
    expected = looped_without_gradients(case, arguments)
    assert ways["_in_buffers"].called != ("proj_size" in settings)
    torch.testing.assert_close(found, [expected, expected])  # the first was not written over by the second
    torch.testing.assert_close(arguments, given, rtol=0, atol=0)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("steps", [1, 5])
def test_an_lstm_whose_inputs_enter_with_the_state_equals_a_loop(settings, mapped, steps, monkeypatch):
    shape = (20, steps) if settings.get("batch_first") else (steps, 20)
    case = recurrent("lstm", settings, mapped, shape)
    ways, arguments = ways_through_time(monkeypatch), arguments_of(case)
    given = [argument.clone() for argument in arguments]
    found = [mapped_without_gradients(case, arguments) for _ in range(2)]
    assert ways["_in_one_product"].called == (mapped[2] == "b")
    expected = looped_without_gradients(case, arguments)
    torch.testing.assert_close(found, [expected, expected])  # the first was not written over by the second
    torch.testing.assert_close(arguments, given, rtol=0, atol=0)


@pytest.mark.parametrize("which", range(4))
def test_an_lstm_of_whose_weights_one_is_mapped_equals_a_loop(which, monkeypatch):
    case = recurrent("lstm", {}, "sss", (5, 20))
    case = case._replace(mapped="sss" + "".join("sb"[i == which] for i in range(4)))
    ways, arguments = ways_through_time(monkeypatch), arguments_of(case)
    found = mapped_without_gradients(case, arguments)
    assert ways["_in_one_product"].called
    torch.testing.assert_close(found, looped_without_gradients(case, arguments))


@pytest.mark.parametrize(
    ("num_rows", "settings", "way"),
    [
        (7, {}, "_in_buffers"),
        (8, {}, "_in_one_product"),
        (1024, {}, "_in_one_product"),
        (1025, {}, "_one_by_one"),
        (8, {"proj_size": 2}, None),
        (17, {"proj_size": 2}, "_one_by_one"),
    ],
)
def test_how_an_lstm_is_stepped_depends_on_its_rows(num_rows, settings, way, monkeypatch):
    case = recurrent("lstm", settings, "ssb", (2, num_rows))
    ways, arguments = ways_through_time(monkeypatch), arguments_of(case)
    found = mapped_without_gradients(case, arguments)
    assert [name for name, mock in ways.items() if mock.called] == ([] if way is None else [way])
    torch.testing.assert_close(found, looped_without_gradients(case, arguments))


def test_an_lstm_of_many_weights_is_not_stepped_in_one_product(monkeypatch):
    case = recurrent("lstm", {}, "ssb", (2, 8))
    ways, arguments = ways_through_time(monkeypatch), arguments_of(case)
    nbytes = 16 * (3 + 4) * 8  # of 4 gates of 4 units, 3 inputs and 4 states, in float64
    for most, way in ((nbytes, "_in_one_product"), (nbytes - 1, "_in_buffers")):
        monkeypatch.setattr(_recurrent, "_BYTES_IN_ONE_PRODUCT", most)
        mapped_without_gradients(case, arguments)
        assert ways[way].call_count == 1


def test_an_lstm_of_numbers_that_are_coarse_near_one_is_left_to_tanh(monkeypatch):
    case = recurrent("lstm", {}, "bsb", (5, 10))
    ways, arguments = ways_through_time(monkeypatch), [a.bfloat16() for a in arguments_of(case)]
    found = mapped_without_gradients(case, arguments)
    assert ways["_in_buffers"].called
    expected = looped_without_gradients(case, arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_an_lstm_in_one_product_errs_by_the_rounding_of_numbers_near_one(scale, monkeypatch):
    case = recurrent("lstm", {}, "bsb", (5, 20))
    ways, single = ways_through_time(monkeypatch), [scale * a.float() for a in arguments_of(case)]
    found = mapped_without_gradients(case, single)
    assert ways["_in_one_product"].called
    exact, kernel = (looped_without_gradients(case, a) for a in ([t.double() for t in single], single))
    # In each of 5 steps; where gates are large so are the errors of their sums, in torch's kernel, too.
    ours, theirs = (
        max(float((a - b).abs().max()) for a, b in zip(outputs, exact, strict=True))
        for outputs in (found, kernel)
    )
    assert ours < 5 * torch.finfo(torch.float32).eps + 2 * theirs


@pytest.mark.parametrize("num_rows", [2, 20])
@pytest.mark.parametrize(
    ("inputs", "state"),
    [((0, 3), (4,)), ((5, 2), (4,)), ((5, 4), (4,)), ((5, 1), (4,)), ((5, 3), (1,)), ((5, 3), (5,))],
    ids=["no_steps", "narrow_inputs", "wide_inputs", "inputs_of_one", "narrow_state", "wide_state"],
)
def test_an_lstm_refuses_what_torchs_kernel_refuses(inputs, state, num_rows):
    # nn.LSTM checks this by itself; torch.lstm may be called without.
    weights = [randn(S, *shape) for shape in ((16, 3), (16, 4), (16,), (16,))]
    x, hidden = randn(inputs[0], num_rows, inputs[1]), [randn(1, num_rows, *state) for _ in range(2)]

    def function(*own):
        return torch.lstm(x, hidden, list(own), True, 1, 0.0, False, False, False)[0]

    with torch.no_grad(), pytest.raises(RuntimeError):
        function(*(weight[0] for weight in weights))
    with torch.no_grad(), pytest.raises(RuntimeError):
        vmap(Watch("vmap", torch.lstm)(function))(*weights)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_recurrent_layer_has_the_gradient_of_each_argument_alone(layer, bias):
    case = recurrent(layer, {"bias": bias}, "bsb")
    in_dims, given = in_dims_of(case), arguments_of(case)
    for i in range(len(given)):
        arguments = [a.clone().requires_grad_(j == i) for j, a in enumerate(given)]
        got, expected = (
            torch.autograd.grad(function(*arguments)[0].square().sum(), arguments[i])[0]
            for function in (
                vmap(Watch("vmap", case.func)(case.function), in_dims),
                lambda *a: loop(case.function, a, in_dims),
            )
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layer", ["lstm", "gru"])
def test_a_recurrent_layer_that_somebody_differentiates_forwards_keeps_what_lies_between(layer):
    case = recurrent(layer, {}, "bsb")
    arguments, in_dims = arguments_of(case), in_dims_of(case)
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, torch.ones_like(a)) for a in arguments]
        out = vmap(Watch("vmap", case.func)(case.function), in_dims)(*duals)[0]
        tangent = forward_ad.unpack_dual(out).tangent
    ones = tuple(map(torch.ones_like, arguments))
    expected = torch.autograd.functional.jvp(
        lambda *a: loop(case.function, a, in_dims)[0], tuple(arguments), ones
    )[1]
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("layer", ["lstm", "gru"])
def test_a_recurrent_layer_inside_two_transforms_equals_a_loop(layer):
    case = recurrent(layer, {}, "bsb")
    arguments, in_dims = arguments_of(case), in_dims_of(case)
    rules = Batching("rows_first")

    def inside(*args):
        with rules:
            return case.function(*args)[0].square().sum()

    where = tuple(range(len(arguments)))
    got = grad(lambda *a: vmap(inside, in_dims)(*a).sum(), where)(*arguments)
    alone = [
        torch.autograd.functional.jacobian(
            lambda *a: case.function(*a)[0].square().sum(),
            tuple(a if d is None else a[s] for a, d in zip(arguments, in_dims, strict=True)),
        )
        for s in range(S)
    ]
    for i, (found, dim) in enumerate(zip(got, in_dims, strict=True)):
        parts = torch.stack([a[i] for a in alone])
        torch.testing.assert_close(found, parts.sum(0) if dim is None else parts)


# All rules: transforms, layouts, dtypes -----------------------------------------------------------

EVERY_RULE = {
    "linear": Case(F.linear, F.linear, ((5, 4), (3, 4), (3,)), "bbb"),
    "linear_shared_input": Case(F.linear, F.linear, ((5, 4), (3, 4), (3,)), "sbb"),
    "conv1d": convolution(1, {"padding": 1}, "bbb"),
    "conv2d": convolution(2, {"padding": 1, "groups": 2}, "bbb"),
    "conv2d_shared_input": convolution(2, {"stride": 2}, "sbb"),
    "conv3d": convolution(3, {}, "bbb"),
    "max_pool2d": Case(F.max_pool2d, lambda x: F.max_pool2d(x, 2), ((2, 4, 7, 6),), "b"),
    "avg_pool1d": Case(F.avg_pool1d, lambda x: F.avg_pool1d(x, 2), ((2, 4, 7),), "b"),
    "adaptive_avg_pool2d": Case(
        F.adaptive_avg_pool2d, lambda x: F.adaptive_avg_pool2d(x, 2), ((2, 4, 7, 6),), "b"
    ),
    "batch_norm": Case(
        F.batch_norm, normalised, ((5, 4, 3, 2), (4,), (4,), (4,), (4,)), "bbbbb", constants=(1, 2)
    ),
    "batch_norm_shared_statistics": Case(
        F.batch_norm, normalised, ((5, 4, 3, 2), (4,), (4,), (4,), (4,)), "bssbb", constants=(1, 2)
    ),
    "layer_norm": Case(
        F.layer_norm, lambda x, w, b: F.layer_norm(x, (3, 6), w, b), ((2, 4, 3, 6), (3, 6), (3, 6)), "bbb"
    ),
    "embedding": Case(F.embedding, F.embedding, ((2, 6), (7, 3)), "sb", tokens_below=7),
    "attention": attention("bbb"),
    "attention_masked": attention("bbs", MASKS["bool_padding"]),
    "multi_head": self_attention("bbbbb"),
}
every_rule = pytest.mark.parametrize("case", EVERY_RULE.values(), ids=EVERY_RULE.keys())


@all_kinds
@every_rule
def test_a_rule_with_one_draw_equals_a_loop(kind, case):
    watch = check(case, kind, arguments_of(case, draws=1))
    assert bool(watch.fired) == should_fire(case, kind)


@all_kinds
@every_rule
@pytest.mark.parametrize("axis", [1, -1])
def test_a_rule_with_the_draws_on_another_axis_equals_a_loop(kind, case, axis):
    arguments, in_dims = [], []
    for value, dim in zip(arguments_of(case), in_dims_of(case), strict=True):
        arguments.append(value if dim is None else value.movedim(0, axis).contiguous())
        in_dims.append(dim if dim is None else axis)
    watch = check(case, kind, arguments, tuple(in_dims))
    assert bool(watch.fired) == should_fire(case, kind)


@all_kinds
@every_rule
def test_a_rule_with_inputs_that_are_not_contiguous_equals_a_loop(kind, case):
    def scattered(value):  # every other entry of a larger tensor, with its axes stored in reverse
        wide = torch.stack([value, value], -1).movedim(-1, 0)
        return wide.permute(*reversed(range(wide.ndim))).contiguous().permute(*reversed(range(wide.ndim)))[0]

    arguments = [scattered(value) for value in arguments_of(case)]
    watch = check(case, kind, arguments)
    assert bool(watch.fired) == should_fire(case, kind)


@all_kinds
@every_rule
def test_a_rule_with_draws_that_are_one_value_expanded_equals_a_loop(kind, case):
    arguments = [
        value[:1].expand(S, *value.shape[1:]) if dim == 0 else value
        for value, dim in zip(arguments_of(case), in_dims_of(case), strict=True)
    ]
    check(case, kind, arguments)


@all_kinds
@every_rule
def test_a_rule_inside_another_vmap_equals_two_loops(kind, case):
    check_inside_another(kind, case)


def check_inside_another(kind, case):
    """Outputs of two ``vmap`` equal those of two loops; returns what was counted."""
    in_dims = in_dims_of(case)
    arguments = [
        torch.stack([a, a.flip(0)]) if d == 0 else a for a, d in zip(arguments_of(case), in_dims, strict=True)
    ]
    rules = Watch(kind, case.func)
    got = vmap(vmap(rules(case.function), in_dims), in_dims)(*arguments)
    expected = loop(lambda *a: loop(case.function, a, in_dims), arguments, in_dims)
    torch.testing.assert_close(got, expected)
    return rules


@all_kinds
@every_rule
def test_a_rule_around_another_vmap_equals_two_loops(kind, case):
    in_dims = in_dims_of(case)
    arguments = [
        torch.stack([a, a.flip(0)]) if d == 0 else a for a, d in zip(arguments_of(case), in_dims, strict=True)
    ]
    rules = Watch(kind, case.func)
    got = vmap(rules(lambda *a: vmap(case.function, in_dims)(*a)), in_dims)(*arguments)
    expected = loop(lambda *a: loop(case.function, a, in_dims), arguments, in_dims)
    torch.testing.assert_close(got, expected)


@all_kinds
@every_rule
def test_a_rule_around_a_vmap_over_only_the_shared_or_only_the_first_argument_equals_two_loops(kind, case):
    if case.tokens_below is not None:
        pytest.skip("tokens have no second value here")
    in_dims = in_dims_of(case)
    inner = (0, *(None for _ in in_dims[1:]))
    first = arguments_of(case)[0]
    at = 1 if in_dims[0] == 0 else 0
    arguments = [torch.stack([first, -first], at), *arguments_of(case)[1:]]
    rules = Watch(kind, case.func)
    got = vmap(rules(lambda *a: vmap(case.function, inner)(*a)), in_dims)(*arguments)
    expected = loop(lambda *a: loop(case.function, a, inner), arguments, in_dims)
    torch.testing.assert_close(got, expected)


@all_kinds
@every_rule
def test_gradients_inside_the_mapped_function_equal_a_loop(kind, case):
    last = len(case.shapes) - 1

    def gradient(*a):
        return grad(lambda *b: case.function(*b).sin().sum(), argnums=last)(*a)

    arguments, in_dims = arguments_of(case), in_dims_of(case)
    rules = Watch(kind, case.func)
    got = vmap(rules(gradient), in_dims)(*arguments)
    torch.testing.assert_close(got, loop(gradient, arguments, in_dims))


@all_kinds
@every_rule
def test_gradients_of_the_mapped_function_by_torch_func_equal_a_loop_and_the_rule_fires(kind, case):
    arguments, in_dims = arguments_of(case), in_dims_of(case)
    last = len(case.shapes) - 1
    rules = Watch(kind, case.func)
    got = grad(lambda *a: vmap(rules(case.function), in_dims)(*a).sin().sum(), argnums=last)(*arguments)
    expected = grad(lambda *a: loop(case.function, a, in_dims).sin().sum(), argnums=last)(*arguments)
    torch.testing.assert_close(got, expected)
    assert bool(rules.fired) == should_fire(case, kind)


@all_kinds
@every_rule
def test_forward_mode_derivatives_of_the_mapped_function_equal_a_loop(kind, case):
    arguments, in_dims = arguments_of(case), in_dims_of(case)
    *others, last = arguments
    direction = randn(*last.shape, seed=17)
    rules = Watch(kind, case.func)
    got = jvp(lambda v: vmap(rules(case.function), in_dims)(*others, v), (last,), (direction,))
    expected = jvp(lambda v: loop(case.function, [*others, v], in_dims), (last,), (direction,))
    torch.testing.assert_close(got, expected)


@all_kinds
@pytest.mark.parametrize("name", ["linear", "conv2d", "batch_norm", "layer_norm", "attention"])
def test_the_jacobian_of_the_mapped_function_equals_that_of_a_loop(kind, name):
    case = EVERY_RULE[name]
    arguments, in_dims = arguments_of(case, draws=2), in_dims_of(case)
    *others, last = arguments
    rules = Watch(kind, case.func)
    got = jacrev(lambda v: vmap(rules(case.function), in_dims)(*others, v).sum((1, 2)))(last)
    expected = jacrev(lambda v: loop(case.function, [*others, v], in_dims).sum((1, 2)))(last)
    torch.testing.assert_close(got, expected)


@kinds_with_all_rules
@every_rule
def test_mixed_dtypes_are_left_to_vmap(kind, case):
    if len(case.shapes) == 1 or case.tokens_below is not None:
        pytest.skip("one floating argument has one dtype")
    arguments, in_dims = arguments_of(case, dtype=torch.float32), in_dims_of(case)
    arguments[-1] = arguments[-1].double()
    rules = Watch(kind, case.func)
    try:
        expected = vmap(case.function, in_dims)(*arguments)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            vmap(rules(case.function), in_dims)(*arguments)
    else:
        torch.testing.assert_close(vmap(rules(case.function), in_dims)(*arguments), expected)
        assert rules.fired == 0


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_rule
def test_a_rule_keeps_the_dtype(kind, dtype, case):
    arguments, in_dims = arguments_of(case, dtype=dtype), in_dims_of(case)
    rules = Watch(kind, case.func)
    got = vmap(rules(case.function), in_dims)(*arguments)
    assert got.dtype == dtype
    # In bfloat16 the order of rounding differs; a few units in the last place of the largest entry.
    expected = loop(case.function, [a.double() if a.is_floating_point() else a for a in arguments], in_dims)
    scale = 16 * torch.finfo(dtype).eps * expected.abs().max().clamp(min=1)
    assert ((got - expected).abs() < scale).all()


@every_rule
@all_kinds
def test_a_rule_outside_of_any_vmap_is_not_asked(kind, case):
    arguments = [a[0] if d == 0 else a for a, d in zip(arguments_of(case), in_dims_of(case), strict=True)]
    rules = Watch(kind, case.func)
    torch.testing.assert_close(rules(case.function)(*arguments), case.function(*arguments))
    assert rules.fired == 0


# By parts -----------------------------------------------------------------------------------------

CELL = ((5, 4), (5, 3))  # rows of inputs and of states


def cell(func, gates, mapped):
    """Of torch's; an LSTM has two states."""
    weights = ((3 * gates, 4), (3 * gates, 3), (3 * gates,), (3 * gates,))
    if func is torch.lstm_cell:
        return Case(func, lambda x, h, c, *w: func(x, (h, c), *w), (*CELL, (5, 3), *weights), mapped)
    return Case(func, func, (*CELL, *weights), mapped)


def bag(mode, padding, mapped):
    def function(tokens, weight, *factors):
        kwargs = {"per_sample_weights": factors[0]} if factors else {}
        return F.embedding_bag(tokens, weight, mode=mode, padding_idx=padding, **kwargs)

    shapes = ((4, 6), (5, 3), (4, 6))[: len(mapped)]
    return Case(F.embedding_bag, function, shapes, mapped, tokens_below=5)


PARTED = {
    **{f"lstm_cell {m}": cell(torch.lstm_cell, 4, m) for m in ("bbbbbbb", "sssbbbb", "bssssss", "sbsbsbs")},
    **{f"gru_cell {m}": cell(torch.gru_cell, 3, m) for m in ("bbbbbb", "ssbbbb", "bsssss", "sbsbsb")},
    **{f"rnn_tanh_cell {m}": cell(torch.rnn_tanh_cell, 1, m) for m in ("bbbbbb", "ssbbbb")},
    **{f"rnn_relu_cell {m}": cell(torch.rnn_relu_cell, 1, m) for m in ("bbbbbb", "bsssss")},
    **{
        f"bilinear {m}": Case(F.bilinear, F.bilinear, ((2, 5, 4), (2, 5, 3), (6, 4, 3), (6,)), m)
        for m in ("bbbb", "ssbb", "bsss", "sbbs")
    },
    "bilinear without bias": Case(F.bilinear, F.bilinear, ((5, 4), (5, 3), (6, 4, 3)), "ssb"),
    **{
        f"bag {mode} {padding} {mapped}": bag(mode, padding, mapped)
        for mode, padding, mapped in itertools.product(("sum", "mean", "max"), (None, 2), ("sb", "bb", "bs"))
    },
    "bag weighted": bag("sum", 1, "sbb"),
    "weight norm": Case(torch._weight_norm, torch._weight_norm, ((6, 4), (6, 1)), "bb"),
    **{
        f"weight norm over all but axis {dim}": Case(
            torch._weight_norm, lambda v, g, dim=dim: torch._weight_norm(v, g, dim), (v, g), mapped
        )
        for dim, v, g, mapped in (
            *((1, (6, 4), (1, 4), "sb"), (2, (2, 3, 4), (1, 1, 4), "bs")),
            *((-1, (6, 4), (), "bb"), (0, (5,), (5,), "bb")),
        )
    },
}
every_part = pytest.mark.parametrize("case", PARTED.values(), ids=PARTED.keys())


@all_kinds
@every_part
def test_what_is_called_by_parts_equals_a_loop(kind, case):
    assert check(case, kind).fired


@all_kinds
@every_part
def test_what_is_called_by_parts_inside_another_vmap_equals_two_loops(kind, case):
    rules = check_inside_another(kind, case)
    assert rules.fired
    assert not rules.left_to_vmap


@every_part
def test_what_is_called_by_parts_under_autocast_has_the_dtype_of_a_loop(case):
    arguments, in_dims = arguments_of(case, dtype=torch.float32), in_dims_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rules = Watch("rows_first", case.func)
        expected = loop(case.function, arguments, in_dims)
        got = vmap(rules(case.function), in_dims)(*arguments)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)
    assert rules.fired


class Stepping(nn.Module):
    """A cell that a model leads through time by itself."""

    def __init__(self, make):
        super().__init__()
        self.cell = make(3, 4)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("is_autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("make", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_in_a_model_are_vectorised_and_give_the_dtype_of_the_module(make, is_autocast):
    module = Stepping(make)
    fn, params = fb.make_functional(module)
    members = {name: randn(8, *leaf.shape).float() for name, leaf in params.items()}
    x = randn(5, 3, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast), torch.no_grad():
        expected = torch.stack([fn({k: v[i] for k, v in members.items()}, x) for i in range(8)])
        assert expected.dtype == module(x).dtype
        for _ in range(20):  # of the mechanisms that are tried; a loop would warn
            got = fb.predict(fn, None, fb.Ensemble(members), x).samples
            assert got.dtype == expected.dtype
            tolerance = {"rtol": 0.02, "atol": 0.02} if is_autocast else {}
            torch.testing.assert_close(got, expected, **tolerance)


def test_bags_without_a_token_that_counts_are_nothing():
    tokens, tables = torch.tensor([[2, 2], [0, 2]]), randn(S, 5, 3)
    for mode in ("sum", "mean", "max"):
        rules = Watch("vmap", F.embedding_bag)
        function = lambda t, mode=mode: F.embedding_bag(tokens, t, mode=mode, padding_idx=2)  # noqa: E731
        got = vmap(rules(function))(tables)
        torch.testing.assert_close(got, loop(function, [tables], (0,)))
        assert rules.fired


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_row_of_padding_does_not_count_whatever_it_holds(mode, value):
    tokens, tables = torch.tensor([[1, 2], [0, 2]]), randn(S, 5, 3)
    tables[:, 2] = value
    rules = Watch("vmap", F.embedding_bag)
    function = lambda t: F.embedding_bag(tokens, t, mode=mode, padding_idx=2)  # noqa: E731
    torch.testing.assert_close(vmap(rules(function))(tables), loop(function, [tables], (0,)))
    assert rules.fired


FACTORS = torch.ones(2, 2, dtype=F64)
OTHER_BAGS = {
    "bags that begin somewhere": {"offsets": torch.tensor([0, 2])},
    "offsets of bags of one size": {"offsets": torch.tensor([0])},
    "norms that are bounded": {"max_norm": 0.5},
    "weights of means": {"per_sample_weights": FACTORS, "mode": "mean"},
    "weights of maxima": {"per_sample_weights": FACTORS, "mode": "max"},
    "weights of another shape": {"per_sample_weights": FACTORS[:1], "mode": "sum"},
    "weights of another dtype": {"per_sample_weights": FACTORS.float(), "mode": "sum"},
    "another mode": {"mode": "avg"},
    "padding beyond the table": {"padding_idx": 7},
}


@pytest.mark.parametrize("settings", OTHER_BAGS.values(), ids=OTHER_BAGS.keys())
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_other_bags_are_what_torch_makes_of_them(settings):
    is_flat = settings.get("offsets", torch.tensor([0])).numel() > 1
    tokens = torch.tensor([1, 2, 0, 1]) if is_flat else torch.tensor([[1, 2], [0, 1]])
    function = lambda t: F.embedding_bag(tokens, t, **settings)  # noqa: E731
    rules, tables = Batching("vmap"), randn(S, 5, 3)

    def ruled(table):
        with rules:
            return function(table)

    try:
        expected = vmap(function)(tables.clone())
    except Exception as error:  # noqa: BLE001 - of several kinds
        with pytest.raises(type(error)):
            vmap(ruled)(tables.clone())
    else:
        torch.testing.assert_close(vmap(ruled)(tables.clone()), expected)


@pytest.mark.parametrize(
    ("func", "shapes"),
    [
        (F.bilinear, ((1, 4), (5, 3), (6, 4, 3))),
        (torch.gru_cell, ((4, 4), (1, 3), (9, 4), (9, 3))),
        (torch.rnn_tanh_cell, ((4, 4), (1, 3), (3, 4), (3, 3))),
    ],
)
def test_rows_that_do_not_match_are_refused_as_by_torch(func, shapes):
    arguments = [randn(S, *shape) for shape in shapes]
    with pytest.raises(RuntimeError):
        func(*(a[0] for a in arguments))
    rules = Batching("rows_first")

    def ruled(*given):
        with rules:
            return func(*given)

    with pytest.raises(RuntimeError):
        vmap(ruled)(*arguments)


# Observed -----------------------------------------------------------------------------------------


@all_kinds
def test_the_largest_result_is_counted_for_one_draw_and_only_if_it_has_a_draw_axis(kind):
    seen = Observed()
    rules = Batching(kind, seen)
    shared = randn(50, 4)

    def function(w):
        with rules:
            wide = torch.cat([shared] * 40)  # shared by all draws: does not count
            return F.linear(wide[:6], w).sum()

    vmap(function)(randn(S, 5, 4))
    assert seen.nbytes == 6 * 5 * 8


def test_the_largest_result_does_not_depend_on_the_number_of_draws():
    images = randn(2, 3, 8, 8)

    def largest(draws):
        seen = Observed()
        rules = Batching("rows_first", seen)

        def function(w):
            with rules:
                return F.conv2d(images, w).relu().sum()

        vmap(function)(randn(draws, 4, 3, 3, 3))
        return seen.nbytes

    assert largest(1) == largest(7) == 2 * 4 * 6 * 6 * 8


def test_a_result_that_comes_together_with_others_is_counted():
    case = recurrent("lstm", {}, "ssb", (5, 2))
    seen = Observed()
    rules = Batching("rows_first", seen)

    def last_state(*arguments):
        with rules:
            return case.function(*arguments)[1]

    vmap(last_state, in_dims_of(case))(*arguments_of(case))
    assert seen.nbytes == 5 * 2 * 4 * 8  # of the outputs of all steps


# Whole models -------------------------------------------------------------------------------------


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 4, 1, stride=2)
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.norm(self.stem(x)))
        h = F.relu(self.conv(h) + self.down(h))
        return self.head(h.mean((2, 3)))


def sound():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 2)
    )


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 9)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)))


MODELS = {
    "lenet": (lenet, lambda: randn(5, 1, 12, 10), (F.conv2d, F.max_pool2d, F.batch_norm, F.linear)),
    "residual": (Residual, lambda: randn(5, 1, 8, 8), (F.conv2d, F.batch_norm, F.linear)),
    "sound": (sound, lambda: randn(5, 2, 8), (F.conv1d, F.batch_norm, F.max_pool1d)),
    "transformer": (
        Translator,
        lambda: ids(4, 5, below=9),
        (F.embedding, F.linear, F.layer_norm, F.multi_head_attention_forward, F.scaled_dot_product_attention),
    ),
}


def members_of(make, draws=4):
    torch.manual_seed(0)
    modules = [make().double() for _ in range(draws)]
    for module in modules:
        for buffer in module.buffers():  # statistics that matter
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 2.0)
    fn, _ = fb.make_functional(modules[0])
    params = [
        {
            **{k: v.detach() for k, v in m.named_parameters()},
            **{k: fb.Fixed(v) for k, v in m.named_buffers()},
        }
        for m in modules
    ]
    stacked = {
        k: fb.Fixed(torch.stack([p[k].tensor for p in params]))
        if isinstance(v, fb.Fixed)
        else torch.stack([p[k] for p in params])
        for k, v in params[0].items()
    }
    return fn, modules, stacked


@pytest.mark.parametrize(("make", "inputs", "funcs"), MODELS.values(), ids=MODELS.keys())
@all_kinds
def test_a_model_under_the_rules_equals_its_modules_one_by_one(kind, make, inputs, funcs):
    fn, modules, members = members_of(make)
    x = inputs()
    expected = torch.stack([module.eval()(x) for module in modules]).detach()
    for func in funcs:
        rules = Watch(kind, func)
        got = vmap(rules(lambda p: fn(p, x)))(members)
        torch.testing.assert_close(got, expected)
        # Multi-head attention has the other inside.
        if (kind == "vmap") == (func is F.scaled_dot_product_attention):
            assert rules.fired
            assert not rules.left_to_vmap


@pytest.mark.parametrize(("make", "inputs", "funcs"), MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("chunk_size", [1, 3, 4, None])
def test_predict_equals_the_modules_one_by_one(make, inputs, funcs, chunk_size):
    fn, modules, members = members_of(make)
    x = inputs()
    expected = torch.stack([module.eval()(x) for module in modules]).detach()
    for rows in (slice(None), slice(0, 1)):
        got = fb.predict(fn, None, fb.Ensemble(members), x[rows], chunk_size=chunk_size).samples
        torch.testing.assert_close(got, expected[:, rows])


@pytest.mark.parametrize("kind", ["rows_first", "channels_last"])
def test_layers_under_autocast_give_what_they_give_one_by_one(kind):
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    modules = [nn.Sequential(*copy.deepcopy(layers)).eval() for _ in range(3)]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for module in modules:
            for parameter in module.parameters():
                parameter.normal_()
    fn, _ = fb.make_functional(modules[0])
    members = {
        k: torch.stack([m.get_parameter(k).detach() for m in modules])
        for k, _ in modules[0].named_parameters()
    }
    x = randn(5, 2, 6, 6).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = torch.stack([module(x) for module in modules])
        for func in (F.conv2d, F.batch_norm, F.linear):
            rules = Watch(kind, func)
            got = vmap(rules(lambda p: fn(p, x)))(members)
            assert rules.fired
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("layer", "ndim"), [(f"Conv{t}{n}d", n) for t in ("", "Transpose") for n in (1, 2, 3)]
)
@all_kinds
def test_convolutions_under_autocast_are_of_its_dtype_whatever_has_the_draws(kind, layer, ndim):
    """Plain ``vmap`` leaves them in single precision, and raises after something that autocast has made."""
    torch.manual_seed(0)
    module = getattr(nn, layer)(2, 3, 3)
    fn, params = fb.make_functional(module)
    members = {k: torch.stack([v, -v]) for k, v in params.items()}
    x = randn(2, 5, 2, *(5 for _ in range(ndim))).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for values in (x, x.bfloat16()):
            for own, axes in ((params, (None, 0)), (members, (0, 0)), (members, (0, None))):
                rows = values if axes[1] == 0 else values[0]

                def mapped(p, v):
                    with Batching(kind):
                        return fn(p, v)

                got = vmap(mapped, axes)(own, rows)
                each = [
                    fn(
                        own if axes[0] is None else {k: v[i] for k, v in own.items()},
                        values[i * (axes[1] == 0)],
                    )
                    for i in range(2)
                ]
                assert got.dtype == torch.bfloat16
                torch.testing.assert_close(got, torch.stack(each), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "between", [nn.Identity, lambda: nn.BatchNorm2d(4), nn.PReLU, lambda: nn.GroupNorm(2, 4)]
)
def test_a_convolution_after_dropout_is_vectorised_under_autocast_too(recwarn, between):
    layers = nn.Conv2d(2, 4, 3), between(), nn.Dropout(0.5), nn.Conv2d(4, 4, 2), between()
    fn, params = fb.make_functional(nn.Sequential(*layers))
    other = lambda params, x: fn(params, x)  # noqa: E731  # of which it is not known that it treats rows alone
    x = randn(5, 2, 6, 6).float()
    for is_on in (False, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            alone, together = (
                fb.predict(other, params, fb.Dropout(), x, num_samples=4, seed=0, chunk_size=size).samples
                for size in (1, 4)
            )
            for _ in range(12):
                chosen = fb.predict(other, params, fb.Dropout(), x, num_samples=4, seed=0).samples
                torch.testing.assert_close(chosen, alone, rtol=0.05, atol=0.02)
        assert together.dtype == alone.dtype == (torch.bfloat16 if is_on else torch.float32)
        torch.testing.assert_close(together, alone, rtol=0.05, atol=0.02)
    assert not recwarn.list


@pytest.mark.parametrize(("make", "inputs", "funcs"), MODELS.values(), ids=MODELS.keys())
@all_kinds
def test_summed_losses_of_a_model_have_the_gradients_of_each_module_alone(kind, make, inputs, funcs):
    fn, modules, members = members_of(make)
    x = inputs()
    leaves = {k: v.clone().requires_grad_() for k, v in members.items() if not isinstance(v, fb.Fixed)}
    rules = Watch(kind, funcs[0])
    losses = vmap(rules(lambda p: fn(p, x).square().mean()))({**members, **leaves})
    got = torch.autograd.grad(losses.sum(), list(leaves.values()))
    for i, module in enumerate(modules):
        named = dict(module.eval().named_parameters())
        expected = torch.autograd.grad(module(x).square().mean(), [named[name] for name in leaves])
        for name, here, there in zip(leaves, got, expected, strict=True):
            torch.testing.assert_close(here[i], there, msg=lambda text, name=name: f"{name}: {text}")


@all_kinds
@pytest.mark.parametrize("num_rows", [1, 2])
def test_gradients_of_convolutions_after_others_are_right_for_one_row_too(kind, num_rows):
    model = zoo.MODELS["conv"]()
    x, weights = model.inputs(num_rows), zoo.members(model.params)
    leaves = {name: leaf.requires_grad_() for name, leaf in weights.items()}
    loop = torch.stack([model.fn(zoo.entry(leaves, k), x) for k in range(5)])
    cotangent = torch.randn(loop.shape, dtype=loop.dtype, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((loop * cotangent).sum(), list(leaves.values()))

    def one(params):
        with Batching(kind):
            return model.fn(params, x)

    got = torch.autograd.grad((vmap(one)(leaves) * cotangent).sum(), list(leaves.values()))
    torch.testing.assert_close(got, expected)
