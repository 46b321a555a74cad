"""Rows of Jacobians found through layers, against one row and one output differentiated at a time."""

import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from zoo import F64, from_function, from_module, randn, randn_like, rows, shifted, stacked, tokens

import funcbayes as fb
from funcbayes._intercept import Unfused
from funcbayes._jacobian import blocks
from funcbayes._jacobian._gradients import Formed, Looked, Outer
from funcbayes._tree import map_named, named_leaves, num_rows, parameters_of

NUM_COLUMNS = 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


class Case(NamedTuple):
    """A model, and which of its leaves are not just the weight or the bias of one layer."""

    make: Callable[[], zoo.Model]
    others: tuple[str, ...] = ()


def module(make, inputs, others=()):
    return Case(lambda: from_module(make, inputs, ""), others)


def function(fn, shapes, inputs, others=()):
    """``fn`` is wrapped anew each time: what was learned of one model is remembered."""

    def make():
        params = {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        return from_function(lambda params, x: fn(params, x), params, inputs, "")

    return Case(make, others)


def some(model, x, num_members, names=None, max_bytes=None, num_columns=NUM_COLUMNS):
    """Blocks of a batch."""
    names = tuple(parameters_of(model.params)) if names is None else names
    return blocks(
        *(model.fn, model.params, names, x),
        num_columns=lambda event: num_columns,
        call="test(...)",
        num_members=num_members,
        max_bytes=max_bytes,
    )


def row(x, n):
    return optree.tree_map(lambda leaf: leaf[n : n + 1] if leaf.ndim else leaf, x)


def overlaid(params, leaves):
    """``params`` with the leaves given, by name, in their place."""
    return map_named(lambda name, leaf: leaves.get(name, leaf), params)


def jacobian(model, x, names=None):
    """``(N, outputs, *s)`` by name: one row, one output at a time, by plain backward passes."""
    names = tuple(parameters_of(model.params)) if names is None else names
    count, found = num_rows(x), {name: [] for name in names}
    for n in range(count):
        given = {name: named_leaves(model.params)[name].detach().clone().requires_grad_() for name in names}
        params = overlaid(model.params, given)
        with sdpa_kernel(SDPBackend.MATH):
            outputs = model.fn(params, row(x, n)).reshape(-1)
        pulled = [
            torch.autograd.grad(
                output, list(given.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if output.requires_grad
            else [torch.zeros_like(leaf) for leaf in given.values()]
            for output in outputs
        ]
        for name, gradients in zip(given, zip(*pulled, strict=True), strict=True):
            found[name].append(torch.stack([gradient.to_dense() for gradient in gradients]))
    return {name: torch.stack(of_rows) for name, of_rows in found.items()}


def cotangents(outputs, seed=0, num_columns=NUM_COLUMNS):
    return randn(num_columns, *outputs.shape, seed=seed).to(outputs.dtype)


def expected_matrices(rows, columns):
    """``(N, K, d_out, d_in)`` of a Jacobian ``(N, outputs, *s)`` for columns ``(K, N, *event)``."""
    values = torch.einsum("knf,nf...->nk...", columns.reshape(*columns.shape[:2], -1), rows)
    shape = rows.shape[2:]
    return values.reshape(*values.shape[:2], math.prod(shape[:1]), math.prod(shape[1:]))


def assert_are_gradients(gradients, expected, basis_seed=0):
    """That every operation of ``gradients`` is what it is of matrices ``(M, N, K, d_out, d_in)``."""
    members, _, _, d_out, d_in = expected.shape
    assert gradients.counts == tuple(expected.shape[:3])
    assert_close(gradients.matrices(), expected)
    assert_close(gradients.sum_of_squares(), expected.square().sum((1, 2)))
    assert_close(gradients.matrices(), expected)  # nothing was written into
    part = gradients.rows(slice(0, 2))
    assert_close(part.matrices(), expected[:, :2])
    assert_close(part.sum_of_squares(), expected[:, :2].square().sum((1, 2)))
    small = torch.cat([block.matrices() for block in gradients.blocks(1)], 1)
    assert_close(small, expected)
    u, v = randn(members, d_out, d_out, seed=basis_seed), randn(members, d_in, d_in, seed=basis_seed + 1)
    for outputs, inputs in ((u, v), (u, None), (None, v), (None, None)):
        turned = gradients.turned(outputs, inputs)
        naive = expected
        if outputs is not None:
            naive = torch.einsum("mab,mnkac->mnkbc", outputs, naive)
        if inputs is not None:
            naive = torch.einsum("mcd,mnkbc->mnkbd", inputs, naive)
        assert_close(turned.matrices(), naive)
        assert_close(turned.sum_of_squares(), naive.square().sum((1, 2)))
    variance = randn(members, d_out, d_in, seed=basis_seed + 2).exp()
    a, b = gradients.weighed(variance)
    assert_close(a @ b.mT, torch.einsum("mnkab,mab,mnlab->mnkl", expected, variance, expected))
    weights = torch.where(b == 0, 1, a / torch.where(b == 0, 1, b))
    assert (weights >= 0).all()
    assert_close(weights * b, a)


def check(model, x, others, names=None, max_bytes=None):
    rows, start = jacobian(model, x, names), 0
    for number, block in enumerate(some(model, x, None, names, max_bytes)):
        outputs = block.outputs
        assert not outputs.requires_grad
        assert block.rows.start == start
        start = block.rows.stop
        with sdpa_kernel(SDPBackend.MATH):
            assert_close(outputs[0], model.fn(model.params, x)[block.rows])
        assert set(block.plan.others) == set(others)
        columns = cotangents(outputs, number)
        found = block.gradients(columns)
        for name, of_leaf in rows.items():
            expected = expected_matrices(of_leaf[block.rows], columns[:, 0]).unsqueeze(0)
            if name not in found:
                assert_close(expected, torch.zeros_like(expected))
                continue
            assert_are_gradients(found[name], expected)
    assert start == num_rows(x)


# Models, with leaves that layers show.


class Cross(nn.Module):
    """Attention to another sequence, of another width."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True)

    def forward(self, x):
        return self.attention(x["query"], x["memory"], x["memory"])[0]


class SelfAttention(nn.Module):
    """With weights that are part of the result."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=False)

    def forward(self, x):
        return torch.cat(self.attention(x, x, x, average_attn_weights=True), -1)


class RowsSecond(nn.Module):
    """Rows are on the second axis inside the model."""

    def __init__(self):
        super().__init__()
        self.first, self.attention = nn.Linear(3, 4), nn.MultiheadAttention(4, 2, batch_first=False)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x.transpose(0, 1))
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.head(h).transpose(0, 1)


class Folded(nn.Module):
    """Time folded into the axis of rows, before or behind the rows themselves."""

    def __init__(self, time_first, head_scale=1.0):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Linear(3, 2)
        self.time_first = time_first
        with torch.no_grad():
            for p in self.head.parameters():
                p.mul_(head_scale)

    def forward(self, x):  # (N, T, C, H, W)
        h = x.transpose(0, 1) if self.time_first else x
        h = self.norm(self.conv(h.flatten(0, 1))).tanh().mean((-1, -2))
        h = self.head(h).unflatten(0, (-1, x.shape[0]) if self.time_first else (x.shape[0], -1))
        return h.sum(0 if self.time_first else 1)


class Sentence(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3, **kwargs), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.embedding(x)).mean(1))


class InPlace(nn.Module):
    """Activations that write into the outputs of layers, and into views of them."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv1d(2, 3, 2), nn.Linear(9, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.conv(x)
        h[:, :1].mul_(2.0)
        h.view(len(x), -1)[:, 3:].tanh_()
        h = F.relu_(self.first(h.flatten(1)))
        h = self.second(h)
        h += 1
        return h.sigmoid_()


class InPlaceOnViews(nn.Module):
    """Layers whose outputs are views, written into by what follows."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(3, 4), nn.Conv1d(4, 2, 2)

    def forward(self, x):
        h = F.elu_(self.linear(x))
        return F.hardtanh_(self.conv(h.transpose(1, 2))).flatten(1)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.mask, self.embedding, self.head = nn.Linear(1, 4), nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.embedding(x["tokens"]) + self.mask(x["more"][0].unsqueeze(-1))
        return self.head(h.sum(1)) * x["more"][1]


def nested_inputs(n):
    return {"tokens": tokens(5, 7)(n), "more": (randn(n, 5, seed=n), torch.tensor(2.0, dtype=F64))}


def memory(n):
    return {"query": randn(n, 3, 4, seed=n), "memory": randn(n, 5, 3, seed=n + 1)}


def flat(make):
    """One layer, and what makes its outputs a row."""
    return lambda: nn.Sequential(make(), nn.Tanh(), nn.Flatten())


class Rounded(torch.autograd.Function):
    """A straight-through estimator, without a rule for ``vmap``."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


def pooled_net():
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(2), nn.SiLU(), nn.Upsample(scale_factor=2)),
        *(nn.Conv2d(3, 2, 2), nn.AdaptiveMaxPool2d(2), nn.Hardswish(), nn.Flatten(), nn.Linear(8, 2)),
        *(nn.Softplus(), nn.LogSoftmax(-1)),
    )


def nested_leaves(params, x):
    first, (weight, bias), last = params
    h = torch.tanh(F.linear(x, first["w"], bias))
    return F.linear(F.linear(h, weight), last["w"])


def nested_params():
    return [{"w": randn(4, 3)}, (randn(4, 4, seed=1), randn(4, seed=2)), {"w": randn(2, 4, seed=3)}]


IMAGES, SIGNALS, VOLUMES = rows(4, 5, 6), rows(4, 7), rows(2, 3, 4, 3)
LAYERS: dict[str, Case] = {
    "linear": module(lambda: nn.Linear(3, 2), rows(3)),
    "linear_positions": module(lambda: nn.Linear(3, 2), rows(4, 3)),
    "linear_many_positions": module(lambda: nn.Linear(2, 2), rows(5, 4, 2)),
    "linear_one_position": module(lambda: nn.Linear(3, 2), rows(1, 3)),
    "linear_no_bias": module(lambda: nn.Linear(3, 2, bias=False), rows(3)),
    "mlp": module(zoo.mlp, rows(3)),
    "conv_1d": module(flat(lambda: nn.Conv1d(4, 3, 2)), SIGNALS),
    "conv_1d_settings": module(
        flat(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)), SIGNALS
    ),
    "conv_1d_same_even": module(flat(lambda: nn.Conv1d(4, 3, 4, padding="same", dilation=2)), SIGNALS),
    "conv_1d_same_uneven": module(flat(lambda: nn.Conv1d(4, 3, 4, padding="same", dilation=3)), SIGNALS),
    "conv_1d_whole": module(flat(lambda: nn.Conv1d(4, 3, 7)), SIGNALS),
    "conv_2d": module(flat(lambda: nn.Conv2d(4, 3, 3)), IMAGES),
    "conv_2d_settings": module(
        flat(lambda: nn.Conv2d(4, 2, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2)),
        IMAGES,
    ),
    "conv_2d_same": module(flat(lambda: nn.Conv2d(4, 2, (2, 3), padding="same", bias=False)), IMAGES),
    "conv_2d_valid": module(flat(lambda: nn.Conv2d(4, 2, (2, 3), padding="valid")), IMAGES),
    "conv_2d_circular": module(flat(lambda: nn.Conv2d(4, 2, 3, padding=1, padding_mode="circular")), IMAGES),
    "conv_2d_depthwise": module(flat(lambda: nn.Conv2d(4, 8, 2, groups=4)), IMAGES),
    "conv_2d_pointwise": module(flat(lambda: nn.Conv2d(4, 3, 1)), IMAGES),
    "conv_3d": module(flat(lambda: nn.Conv3d(2, 2, (2, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1))), VOLUMES),
    "conv_3d_groups": module(flat(lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1))), VOLUMES),
    "transposed_1d": module(flat(lambda: nn.ConvTranspose1d(4, 3, 2)), SIGNALS),
    "transposed_1d_settings": module(
        flat(
            lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
        ),
        SIGNALS,
    ),
    # More output padding than the stride: positions of the output that no input reaches.
    "transposed_1d_far": module(
        flat(lambda: nn.ConvTranspose1d(4, 2, 2, stride=1, output_padding=2, dilation=3)), SIGNALS
    ),
    "transposed_2d": module(
        flat(lambda: nn.ConvTranspose2d(4, 2, (2, 3), stride=(2, 1), padding=(1, 0), output_padding=(1, 0))),
        rows(4, 3, 2),
    ),
    "transposed_2d_depthwise": module(
        flat(lambda: nn.ConvTranspose2d(4, 4, 2, groups=4, bias=False)), rows(4, 3, 2)
    ),
    "transposed_2d_padded": module(flat(lambda: nn.ConvTranspose2d(4, 2, 3, padding=2)), rows(4, 3, 4)),
    "transposed_3d": module(
        flat(lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), output_padding=(0, 1, 0), groups=2)),
        rows(2, 2, 2, 3),
    ),
    "embedding": module(Sentence, tokens(5, 4)),
    "embedding_padded": module(lambda: Sentence(padding_idx=2), tokens(5, 4)),
    "embedding_padded_from_the_end": module(lambda: Sentence(padding_idx=-6), tokens(5, 3)),
    "embedding_sparse": module(lambda: Sentence(sparse=True), tokens(5, 3)),
    "embedding_one_token": module(
        lambda: nn.Sequential(nn.Embedding(5, 3), nn.Tanh()), lambda n: tokens(1, 5)(n)[:, 0]
    ),
    "embedding_two_axes": module(lambda: nn.Embedding(4, 3), lambda n: tokens(6, 4)(n).unflatten(1, (2, 3))),
    "layer_norm": module(lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh()), rows(4)),
    "layer_norm_positions": module(lambda: nn.Sequential(nn.LayerNorm(4), nn.Tanh()), rows(3, 4)),
    "layer_norm_two_axes": module(lambda: nn.Sequential(nn.LayerNorm((3, 4)), nn.Tanh()), rows(2, 3, 4)),
    "layer_norm_no_bias": module(lambda: nn.LayerNorm(4, bias=False), rows(3, 4)),
    "rms_norm": module(lambda: nn.Sequential(nn.RMSNorm(4), nn.Tanh()), rows(3, 4)),
    "group_norm": module(flat(lambda: nn.GroupNorm(2, 4)), IMAGES),
    "group_norm_flat": module(lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh()), rows(4)),
    "batch_norm": module(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()), rows(4)),
    "batch_norm_1d": module(flat(lambda: nn.BatchNorm1d(4)), SIGNALS),
    "batch_norm_2d": module(flat(lambda: nn.BatchNorm2d(4)), IMAGES),
    "instance_norm": module(flat(lambda: nn.InstanceNorm2d(4, affine=True)), IMAGES),
    "instance_norm_running": module(
        flat(lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)), SIGNALS
    ),
    **{name: Case(zoo.MODELS[name]) for name in ("norms", "residual", "conv_grouped", "conv_view")},
    **{name: Case(zoo.MODELS[name]) for name in zoo.WRITTEN},
    "pooled": module(pooled_net, rows(2, 6, 5)),
    "self_attention": module(SelfAttention, rows(3, 4)),
    "cross_attention": module(Cross, memory, ("attention.in_proj_bias",)),
    "own_attention": Case(zoo.MODELS["own_attention"]),
    "transformer": Case(zoo.MODELS["transformer"]),
    "rows_second": module(RowsSecond, rows(5, 3)),
    "time_behind_rows": module(lambda: Folded(False), rows(3, 2, 3, 3)),
    "time_before_rows": module(lambda: Folded(True), rows(3, 2, 3, 3)),
    "time_before_rows_tiny": module(lambda: Folded(True, 1e-9), rows(3, 2, 3, 3)),
    "in_place": module(InPlace, rows(2, 4)),
    "in_place_on_views": module(InPlaceOnViews, rows(5, 3)),
    "keywords": Case(zoo.MODELS["keywords"]),
    "nested_inputs": module(Nested, nested_inputs),
    "nested_params": Case(
        lambda: from_function(lambda p, x: nested_leaves(p, x), nested_params(), rows(3), "")
    ),
    "straight_through": function(
        lambda p, x: F.linear(Rounded.apply(3 * F.linear(x, p["w"], p["b"])), p["v"]),
        {"w": (4, 3), "b": (4,), "v": (2, 4)},
        rows(3),
    ),
    "one_output": function(lambda p, x: F.linear(x, p["w"], p["b"])[:, 0], {"w": (1, 3), "b": (1,)}, rows(3)),
    "images_as_outputs": module(lambda: nn.Conv2d(2, 3, 3, padding=1), rows(2, 3, 4)),
}


# Leaves that are used in other ways.


class Positions(nn.Module):
    """Positions of tokens: a parameter that is added, and a table that is looked up without any rows."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.head = nn.Embedding(6, 3), nn.Embedding(5, 3), nn.Linear(3, 2)
        self.shift = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        h = self.tokens(x) + self.places(torch.arange(x.shape[1])) + self.shift
        return self.head(h.tanh().sum(1))


class Twice(nn.Module):
    """One layer called again on what it gave."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).tanh()).tanh())


class Frozen(nn.Module):
    """A trunk without gradients."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.no_grad():
            h = self.trunk(x).tanh()
        return self.head(h)


class Words(nn.Module):
    """A recurrence between layers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(6, 3), nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(self.embedding(x))[0][:, -1])


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def of_each_row(params, x):
    return torch.func.vmap(lambda row: F.linear(row, params["w"], params["b"]).tanh())(x)


def force(params, x):
    """The slope of a network in its inputs."""

    def energy(x):
        return F.linear(F.linear(x, params["w"], params["b"]).tanh(), params["v"]).sum()

    return torch.func.grad(energy)(x)


W, WB = {"w": (2, 3)}, {"w": (2, 3), "b": (2,)}
WBV = {"w": (4, 3), "b": (4,), "v": (1, 4)}
LSTM = tuple(f"cell.{kind}_{side}_l0" for kind in ("bias", "weight") for side in ("hh", "ih"))
OTHERS: dict[str, Case] = {
    "tied": Case(zoo.MODELS["tied"], ("embedding.weight",)),
    "transposed": function(lambda p, x: x @ p["w"].T, W, rows(3), ("w",)),
    "normalized": function(lambda p, x: F.linear(x, p["w"] / p["w"].norm(), p["b"]), WB, rows(3), ("w",)),
    "also_normalized": function(
        lambda p, x: F.linear(x, p["w"], p["b"]) / p["w"].norm(), WB, rows(3), ("w",)
    ),
    "also_normalized_tiny": function(
        lambda p, x: 1e-9 * F.linear(x, p["w"], p["b"]) / p["w"].norm(), WB, rows(3), ("w",)
    ),
    "weight_normed": module(
        weight_normed,
        rows(3),
        ("0.parametrizations.weight.original0", "0.parametrizations.weight.original1"),
    ),
    "positions": module(Positions, tokens(5, 6), ("places.weight", "shift")),
    "twice": module(Twice, rows(3), ("layer.bias", "layer.weight")),
    "of_linear": Case(zoo.MODELS["linear"], ("b", "gain", "w")),
    "nested": Case(zoo.MODELS["nested"], ("0.w", "1.0", "1.1", "2.w")),
    "shared_bias": function(
        lambda p, x: F.linear(F.linear(x, p["w"], p["b"]).tanh(), p["v"], p["b"]),
        {"w": (3, 3), "v": (3, 3), "b": (3,)},
        rows(3),
        ("b",),
    ),
    "vector_as_weight": function(lambda p, x: F.linear(x, p["w"]), {"w": (3,)}, rows(3), ("w",)),
    "vector_as_weight_at_many_positions": function(
        lambda p, x: F.linear(x, p["w"]), {"w": (3,)}, rows(2, 4, 3), ("w",)
    ),
    "vector_as_weight_at_positions": function(
        lambda p, x: F.linear(x, p["w"]), {"w": (3,)}, rows(4, 3), ("w",)
    ),
    "one_bias_for_all": function(
        lambda p, x: F.linear(x, p["w"], p["b"]), {"w": (2, 3), "b": (1,)}, rows(3), ("b",)
    ),
    "table_as_images": function(
        lambda p, x: F.linear(F.embedding(x, p["w"]).flatten(1), p["v"]) + p["w"].sum(),
        {"w": (4, 3), "v": (2, 6)},
        tokens(2, 4),
        ("w",),
    ),
    # Outputs of this head are alike, wherever rows are.
    "time_before_rows_zero": module(
        lambda: Folded(True, 0.0), rows(3, 2, 3, 3), ("head.bias", "head.weight")
    ),
    "prelu": module(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.PReLU(3), nn.Flatten(), nn.Linear(12, 2), nn.PReLU()),
        rows(2, 3, 3),
        ("1.weight", "4.weight"),
    ),
    "of_each_row": function(of_each_row, WB, rows(3), ("b", "w")),
    "force": function(force, WBV, rows(3), ("b", "v", "w")),
}
# ``vmap`` cannot take these: a loop over rows, with a warning.
LOOPED: dict[str, Case] = {
    "lstm": Case(
        zoo.SLOW_MODELS["lstm"],
        tuple(
            f"cell.{kind}_{side}_l{layer}"
            for kind in ("bias", "weight")
            for side in ("hh", "ih")
            for layer in (0, 1)
        ),
    ),
    "lstm_on_an_embedding": module(Words, tokens(4, 6), LSTM),
    "straight_through_weights": function(
        lambda p, x: F.linear(x, Rounded.apply(2 * p["w"]), p["b"]), WB, rows(3), ("w",)
    ),
    "a_leaf_without_use": function(
        lambda p, x: F.linear(Rounded.apply(x), p["w"], p["b"]),
        WB | {"unused": (2,)},
        rows(3),
        ("unused",),
    ),
}


def of(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@of(LAYERS)
def test_gradients_found_through_layers_are_those_of_each_row(case):
    model = case.make()
    check(model, model.inputs(4), case.others)


@of(OTHERS)
def test_gradients_of_leaves_that_no_layer_shows_are_those_of_each_row(case):
    model = case.make()
    check(model, model.inputs(4), case.others)


@of(LOOPED)
def test_models_that_vmap_cannot_take_are_gone_through_row_by_row_with_a_warning(case):
    model = case.make()
    x = model.inputs(3)
    with pytest.warns(UserWarning, match=r"`vmap` cannot take .* found one by one, . rows of . columns: \S"):
        check(model, x, case.others)


@of({name: case for name, case in (LAYERS | OTHERS).items() if name != "straight_through"})
def test_several_networks_at_once_have_the_gradients_of_each_alone(case):
    model = case.make()
    x = model.inputs(3)
    networks = [shifted(model.params, randn_like(model.params, seed, 0.1)) for seed in range(2)]
    together = model._replace(params=stacked(*networks))
    alone = [jacobian(model._replace(params=params), x) for params in networks]
    (block,) = some(together, x, 2)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(block.outputs, torch.stack([model.fn(params, x) for params in networks]))
    columns = cotangents(block.outputs)
    found = block.gradients(columns)
    assert set(block.plan.others) <= set(case.others)
    for name in alone[0]:
        expected = torch.stack([expected_matrices(rows[name], columns[:, k]) for k, rows in enumerate(alone)])
        if name not in found:
            assert_close(expected, torch.zeros_like(expected))
            continue
        assert_are_gradients(found[name], expected)


@pytest.mark.parametrize("name", ["linear", "conv_2d_settings", "embedding", "residual", "positions"])
@pytest.mark.parametrize("max_bytes", [1, 20_000, 1 << 40])
def test_blocks_of_any_size_are_the_rows_of_the_batch_in_order(name, max_bytes):
    case = (LAYERS | OTHERS)[name]
    model = case.make()
    check(model, model.inputs(5), case.others, max_bytes=max_bytes)


def test_a_block_has_as_many_rows_as_there_are_bytes_for():
    model = LAYERS["mlp"].make()
    sizes = [
        [len(block.outputs[0]) for block in some(model, model.inputs(10), None, max_bytes=n)]
        for n in (1, 3000, 1 << 30)
    ]
    assert sizes[0] == [1] * 10
    assert 1 < len(sizes[1]) < 10
    assert max(sizes[1]) - min(sizes[1]) <= 1  # as equal as can be
    assert sizes[2] == [10]


def kinds(names, ending):
    return [name for name in names if name.endswith(ending)]


@of({name: LAYERS[name] for name in ("mlp", "conv_2d", "transposed_2d", "norms", "residual", "transformer")})
@pytest.mark.parametrize("ending", ["weight", "bias"])
def test_a_layer_may_have_its_weight_chosen_without_its_bias_and_the_reverse(case, ending):
    model = case.make()
    names = tuple(name for name in parameters_of(model.params) if name.endswith(ending))
    assert 0 < len(names) < len(model.params)
    check(model, model.inputs(4), (), names)


@pytest.mark.parametrize(
    ("name", "leaf", "kind"),
    [
        *(("mlp", "0.weight", Outer), ("mlp", "0.bias", Outer), ("conv_2d_settings", "0.weight", Outer)),
        *(
            ("transposed_3d", "0.weight", Outer),
            ("transformer", "0.layers.0.self_attn.in_proj_weight", Outer),
        ),
        *(("embedding", "embedding.weight", Looked), ("residual", "4.conv_1.weight", Outer)),
        *(("residual", "1.weight", Formed), ("positions", "tokens.weight", Looked)),
        *(("positions", "places.weight", Formed), ("tied", "norm.weight", Formed)),
    ],
)
def test_gradients_are_held_in_the_form_in_which_a_layer_gives_them(name, leaf, kind):
    model = (LAYERS | OTHERS)[name].make()
    (block,) = some(model, model.inputs(2), None)
    assert isinstance(block.gradients(cotangents(block.outputs))[leaf], kind)


class Deciding(nn.Module):
    """A layer that is skipped where the batch says so."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.first(x["x"]).tanh()
        if x["deep"] > 0:
            h = self.second(h).tanh()
        return self.head(h)


def test_a_layer_may_be_skipped_for_some_batches():
    model = from_module(Deciding, None, "")
    skipped = {"second.weight", "second.bias"}
    for deep, others in ((1.0, set()), (-1.0, skipped), (1.0, set()), (-1.0, skipped)):
        x = {"x": randn(4, 3), "deep": torch.tensor(deep, dtype=F64)}
        check(model, x, others)


def test_the_way_through_a_model_may_depend_on_its_rows():
    """Each row is differentiated where it went when it was alone."""

    def fn(params, x):
        h = F.linear(x, params["w"]).tanh()
        return torch.stack([F.linear(r, params["v"] if r[0] > 0 else params["u"]) for r in h])

    x = torch.tensor([[1.0, 0], [-1, 2], [1, 1]], dtype=F64)
    params = {"w": torch.eye(2, dtype=F64), "v": randn(2, 2), "u": randn(2, 2, seed=1)}
    model = from_function(fn, params, None, "")
    with pytest.warns(UserWarning, match="found one by one"):
        check(model, x, ("u", "v", "w"))


def test_a_batch_that_takes_another_way_than_the_first_is_found_out_for_stacked_networks():
    model = from_module(Deciding, None, "")
    both = [shifted(model.params, randn_like(model.params, seed)) for seed in range(2)]
    for deep in (1.0, -1.0):
        x = {"x": randn(4, 3), "deep": torch.tensor(deep, dtype=F64)}
        (block,) = some(model._replace(params=stacked(*both)), x, 2)
        columns = cotangents(block.outputs)
        found = block.gradients(columns)
        for name in model.params:
            expected = [
                expected_matrices(jacobian(model._replace(params=params), x)[name], columns[:, k])
                for k, params in enumerate(both)
            ]
            assert_close(found[name].matrices(), torch.stack(expected))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_any_number_of_rows_is_fine(count):
    for name in ("mlp", "time_before_rows", "embedding_padded", "positions"):
        case = (LAYERS | OTHERS)[name]
        model = case.make()
        check(model, model.inputs(count), case.others)


def test_no_columns_give_no_gradients():
    model = LAYERS["mlp"].make()
    (block,) = some(model, model.inputs(2), None)
    assert block.gradients(cotangents(block.outputs, num_columns=0)) == {}


def test_leaves_that_outputs_do_not_depend_on_have_no_gradients():
    def fn(params, x):
        with torch.no_grad():
            trunk = F.linear(x, params["trunk"]).tanh()
        return F.linear(trunk, params["head"]) + 0 * F.linear(x, params["head"].detach()[:, :3])

    model = from_function(fn, {"trunk": randn(4, 3), "head": randn(2, 4), "unused": randn(5, 2)}, rows(3), "")
    check(model, model.inputs(3), ("trunk", "unused"))


@pytest.mark.parametrize("has_head", [True, False])
def test_layers_whose_outputs_are_thrown_away_have_no_gradients(has_head):
    def fn(params, x):
        F.linear(x, params["spare"])
        return F.linear(x, params["head"]) if has_head else x * params["scale"]

    model = from_function(fn, {"spare": randn(2, 3), "head": randn(2, 3), "scale": randn(3)}, rows(3), "")
    x = model.inputs(3)
    names = ("spare", "head") if has_head else ("spare", "scale")
    check(model, x, () if has_head else ("scale",), names)
    (block,) = some(model, x, None, names)
    assert set(block.gradients(cotangents(block.outputs))) == set(names) - {"spare"}


def test_nothing_is_said_of_functions_without_a_batching_rule():
    def fn(params, x):
        h = F.linear(x, params["first"])
        return F.linear(F.bilinear(h, h, params["both"]), params["last"])

    leaves = {"first": randn(4, 3), "both": randn(2, 4, 4), "last": randn(2, 2)}
    model = from_function(fn, leaves, rows(3), "")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check(model, model.inputs(3), (), ("first", "last"))
    assert [str(one.message) for one in said] == []


def test_a_model_without_any_gradient_has_none():
    def fn(params, x):
        h = F.linear(x, params["w"]).tanh()
        with torch.no_grad():
            return F.linear(h, params["head"])

    model = from_function(fn, {"w": randn(4, 3), "head": randn(2, 4)}, rows(3), "")
    for block in some(model, model.inputs(3), None):
        assert all((g.matrices() == 0).all() for g in block.gradients(cotangents(block.outputs)).values())


def test_every_row_may_be_alike():
    """Rows that do not differ do not hide where they are, nor that they depend on each other."""
    case = LAYERS["time_before_rows"]
    for x in (torch.ones(4, 3, 2, 3, 3, dtype=F64), torch.zeros(4, 3, 2, 3, 3, dtype=F64)):
        model = case.make()
        check(model, x, ())
        check(model, case.make().inputs(4), ())
    for x in (torch.ones(4, 3, dtype=F64), torch.zeros(4, 3, dtype=F64)):
        with pytest.raises(ValueError, match="depend on that row alone"):
            next(some(MIXING["centred"].make(), x, None))


def mixing(fn):
    return function(fn, {"w": (2, 3)}, rows(3))


def attending_to_rows(params, x):
    h = F.linear(x, params["w"])
    return F.scaled_dot_product_attention(h, h, h)


# Outputs of a row that depend on other rows.
MIXING: dict[str, Case] = {
    "sum": mixing(lambda p, x: F.linear(x + x.sum(0), p["w"])),
    "centred": mixing(lambda p, x: F.linear(x - x.mean(0), p["w"])),
    "attention_over_the_batch": mixing(attending_to_rows),
    "attention_with_rows_first": module(lambda: nn.Sequential(zoo.Attending(False, False)), rows(5, 4)),
    "rows_last": mixing(lambda p, x: F.linear(x, p["w"]).T),
    "one_number": mixing(lambda p, x: F.linear(x, p["w"]).sum()),
    "similarities": mixing(lambda p, x: F.linear(x, p["w"]) @ F.linear(x, p["w"]).T),
    "neighbours": mixing(lambda p, x: F.linear(x, p["w"]).cumsum(0)),
    "tokens": function(
        lambda p, x: F.embedding(x, p["w"]).mean((0, 1)).expand(len(x), -1),
        {"w": (5, 3)},
        lambda n: torch.arange(2 * n).reshape(n, 2) // 6,
    ),
}


@of(MIXING)
def test_models_whose_rows_depend_on_each_other_are_refused(case):
    model = case.make()
    with pytest.raises(ValueError, match=r"`test\(\.\.\.\)` needs a model whose outputs for a row"):
        next(some(model, model.inputs(8), None))


@pytest.mark.parametrize("statistics", [True, False])
def test_batch_norm_in_training_mode_is_refused_by_name(statistics):
    def fn(params, x):
        running = (torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)) if statistics else (None, None)
        return F.batch_norm(x, *running, params["w"], params["b"], training=True)

    model = from_function(fn, {"w": randn(3), "b": randn(3)}, rows(3), "")
    with pytest.raises(ValueError, match=r"BatchNorm normalises by the batch .* evaluation mode"):
        next(some(model, model.inputs(4), None))


@pytest.mark.parametrize("outputs", [tuple, dict])
def test_a_model_of_several_outputs_is_asked_for_one(outputs):
    def fn(params, x):
        f = F.linear(x, params["w"])
        return (f, f) if outputs is tuple else {"f": f}

    model = from_function(fn, {"w": randn(2, 3)}, rows(3), "")
    with pytest.raises(TypeError, match=r"should return one tensor, got .*\. Pick one: `lambda"):
        next(some(model, model.inputs(4), None))


def test_inputs_without_an_axis_of_rows_are_refused():
    model = LAYERS["mlp"].make()
    x = {"a": randn(3, 2), "b": randn(4, 2)}
    with pytest.raises(ValueError, match="share their first axis"):
        next(some(model, x, None))


def test_slow_leaves_are_named_with_what_they_cost():
    def fn(params, x):
        return (x @ params["large"] @ params["small"]) * params["gain"]

    params = {"large": randn(200, 200), "small": randn(200, 2), "gain": randn(2)}
    model = from_function(fn, params, rows(200), "")
    # 2 outputs of 40,000 + 400 + 2 numbers
    with pytest.warns(UserWarning, match=r"gradients of 'large', 'small', 'gain' in .* 80,804 numbers each"):
        list(some(model, model.inputs(2), None))


def test_what_is_small_is_not_worth_a_warning(recwarn):
    model = OTHERS["tied"].make()
    list(some(model, model.inputs(2), None))
    assert not recwarn


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_inputs_that_are_not_finite_do_not_decide_how_gradients_are_found(number):
    model = LAYERS["mlp"].make()
    x = model.inputs(4)
    bad = x.clone()
    bad[0] = number
    (block,) = some(model, bad, None)
    assert not block.outputs[0, 0].isfinite().all()
    assert not block.plan.others
    assert_close(block.outputs[0, 1:], model.fn(model.params, x)[1:])
    check(model, x, ())


def test_parameters_that_are_not_finite_do_not_decide_how_gradients_are_found():
    model = LAYERS["mlp"].make()
    bad = {**model.params, "0.weight": model.params["0.weight"] / 0}
    (block,) = some(model._replace(params=bad), model.inputs(4), None)
    assert block.outputs.isnan().all()
    check(model, model.inputs(4), ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["mlp", "conv_2d_settings", "embedding", "norms", "positions", "transformer"]
)
@pytest.mark.parametrize("num_members", [None, 2])
def test_gradients_in_lower_precision_are_near_those_in_double(name, dtype, num_members):
    case = (LAYERS | OTHERS)[name]
    model = case.make()
    x = model.inputs(3)

    def lower(tree):
        return optree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)

    given = lower(model.params)
    low = model._replace(params=given if num_members is None else stacked(given, given))
    (block,) = some(low, lower(x), num_members)
    assert block.outputs.dtype == dtype
    assert set(block.plan.others) == set(case.others)
    (exact,) = some(model, x, None)
    columns = cotangents(exact.outputs)
    same = columns if num_members is None else columns.expand(-1, 2, *columns.shape[2:])
    found, right = block.gradients(same.to(dtype)), exact.gradients(columns)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for leaf, gradient in right.items():
        got = found[leaf].matrices()
        assert got.dtype == dtype
        expected = gradient.matrices()
        assert (got.double() - expected).norm() <= tolerance * expected.norm() * len(got) ** 0.5
        variance = randn(*got.shape[:1], *got.shape[3:]).exp().to(dtype)
        a, b = found[leaf].weighed(variance)
        assert a.dtype == b.dtype == dtype
        assert found[leaf].sum_of_squares().dtype == dtype


@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_layers_under_autocast_are_near_those_without_it(shape):
    def exact(params, x):
        return F.linear(F.linear(x, params["w"]).tanh(), params["v"])

    def fn(params, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return exact(params, x).float()

    params = {"w": randn(4, 3), "v": randn(2, 4, seed=1)}
    low = from_function(fn, {name: leaf.float() for name, leaf in params.items()}, rows(*shape), "")
    x = low.inputs(4)
    (block,) = some(low, x.float(), None)
    assert not block.plan.others
    columns = cotangents(block.outputs)
    found, right = block.gradients(columns), jacobian(from_function(exact, params, None, ""), x)
    for name, gradient in found.items():
        expected = expected_matrices(right[name], columns[:, 0].double())[None]
        squares = expected.square().sum((1, 2))
        assert (gradient.matrices().double() - expected).norm() <= 0.02 * expected.norm()
        assert (gradient.sum_of_squares().double() - squares).norm() <= 0.02 * squares.norm()


def in_mode(mode):
    @pytest.mark.parametrize("name", ["mlp", "residual", "embedding", "positions", "transformer"])
    def test(name):
        case = (LAYERS | OTHERS)[name]
        model = case.make()
        x = model.inputs(3)
        rows = jacobian(model, x)
        with mode():
            own = optree.tree_map(torch.clone, x)
            params = optree.tree_map(torch.clone, model.params)
            (block,) = some(model._replace(params=params), own, None)
            columns = cotangents(block.outputs)
            found = {name: g.matrices().clone() for name, g in block.gradients(columns).items()}
        for leaf, gradient in found.items():
            assert_close(gradient[0], expected_matrices(rows[leaf], columns[:, 0]))

    return test


test_gradients_are_found_under_no_grad = in_mode(torch.no_grad)
test_gradients_are_found_in_inference_mode = in_mode(torch.inference_mode)


@pytest.mark.parametrize("name", ["residual", "positions", "transformer", "time_before_rows"])
def test_four_threads_on_one_function_find_what_one_finds(name):
    case = (LAYERS | OTHERS)[name]
    model = case.make()
    x = model.inputs(3)
    columns = cotangents(model.fn(model.params, x).unsqueeze(0))
    rows = jacobian(model, x)

    def work(seed):
        found = []
        for _ in range(3):
            (block,) = some(model, x, None)
            found.append({leaf: g.matrices()[0] for leaf, g in block.gradients(seed * columns).items()})
        return found

    with ThreadPoolExecutor(4) as pool:
        for seed, runs in enumerate(pool.map(work, range(1, 5)), 1):
            for found in runs:
                for leaf, of_leaf in rows.items():
                    assert_close(found[leaf], expected_matrices(of_leaf, seed * columns[:, 0]))


USES_THAT_DO_NOTHING_AT_PRESENT = {
    "scaled by nothing": lambda p, x: F.linear(x, p["w"]) + p["gate"] * torch.tanh(x @ p["w"].T),
    "behind a gate that is shut": lambda p, x: (
        F.linear(x, p["w"]) + torch.relu(x[:, :1] - 2) * (x @ p["w"].T)
    ),
    "as an input": lambda p, x: F.linear(x, p["w"]) + p["gate"] * F.linear(p["w"], p["w"]).sum(),
    "in a list": lambda p, x: F.linear(x, p["w"]) + p["gate"] * torch.stack([p["w"], p["w"]]).sum(),
}


@pytest.mark.parametrize("name", USES_THAT_DO_NOTHING_AT_PRESENT)
def test_a_second_use_of_a_weight_is_seen_even_if_no_number_tells_of_it_at_first(name):
    fn = USES_THAT_DO_NOTHING_AT_PRESENT[name]
    params = {"w": randn(2, 3), "gate": torch.zeros((), dtype=F64)}
    for gate, scale in ((0.0, 0.1), (1.0, 3.0)):  # what is found at first is remembered
        params = {**params, "gate": torch.tensor(gate, dtype=F64)}
        model = from_function(fn, params, rows(3), "")
        x = scale * model.inputs(5)
        (block,) = some(model, x, None, names=("w",))
        columns = cotangents(block.outputs)
        expected = expected_matrices(jacobian(model, x)["w"], columns[:, 0])
        assert_close(block.gradients(columns)["w"].matrices()[0], expected)


def test_that_rows_are_found_one_by_one_is_said_once():
    model = zoo.SLOW_MODELS["lstm"]()
    x = model.inputs(4)
    (block,) = some(model, x, None)
    with pytest.warns(UserWarning, match="found one by one"):
        block.gradients(cotangents(block.outputs))
    for block in some(model, x, None, max_bytes=1):
        block.gradients(cotangents(block.outputs))  # warnings are errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_norm_is_as_precise_as_that_of_torch(dtype):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype).eval()
    net[1].running_mean.fill_(50)
    net[0].bias.data.fill_(50)
    net[1].running_var.fill_(0.3)
    fn, params = fb.make_functional(net)
    x = randn(20, 3).to(dtype)
    (block,) = blocks(fn, params, list(params), x, num_columns=lambda event: event.numel(), call="")
    assert_close(block.outputs[0], fn(params, x))


def test_batch_norm_of_another_number_of_channels_is_refused_as_by_torch():
    net = nn.Sequential(nn.Conv2d(1, 1, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).eval()
    fn, params = fb.make_functional(net)
    with pytest.raises(RuntimeError, match="running_mean should contain 1 elements"):
        list(blocks(fn, params, ["3.weight"], randn(5, 1, 3, 3).float(), num_columns=len, call=""))


def test_prelu_has_the_shape_and_dtype_that_torch_gives():
    slope = torch.full((1,), 0.25)
    with Unfused():
        assert F.prelu(torch.tensor(-2.0), slope).shape == ()
        with torch.autocast("cpu", torch.bfloat16):  # of the input's dtype, whatever the slope's is
            rounded = torch.full((1, 2), -2.0, dtype=torch.bfloat16)
            assert F.prelu(rounded, slope.repeat(2)).dtype == torch.bfloat16
        assert_close(F.prelu(torch.tensor([-2.0, 0.0, 3.0]), slope), torch.tensor([-0.5, 0.0, 3.0]))
