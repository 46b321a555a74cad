"""``make_functional`` and ``training_call`` against the modules themselves."""

import contextlib
import copy
import functools
import multiprocessing
import pickle
import threading
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import funcbayes as fb
from funcbayes._functional import training_call

F64 = torch.float64
# torch's own: forward-mode derivatives load decompositions through torch.jit.script; the old hooks of
# weight_norm are deprecated, and are tested because models use them; where vmap has no rule,
# or one that is not careful (PReLU), it says so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(tuple(shape), generator=seeded(seed), dtype=dtype)


def ids(*shape, below=7, seed=0):
    return torch.randint(below, shape, generator=seeded(seed))


def stacked(params, draws=3):
    """Parameters of several members, the first as given."""
    scales = torch.linspace(1, 2, draws, dtype=F64)
    return {
        k: torch.stack([(v * s).to(v.dtype) if v.is_floating_point() else v for s in scales])
        for k, v in params.items()
    }


def member(tree, i):
    return {k: fb.Fixed(v.tensor[i]) if isinstance(v, fb.Fixed) else v[i] for k, v in tree.items()}


def copied(module):
    """A copy; Python cannot copy what some layers compute from their parameters, and forgets it here."""
    computed = [
        value
        for part in module.modules()
        for held in vars(part).values()
        for value in (held if isinstance(held, list) else [held])
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})


def give_statistics(module):
    """Running statistics and affine parameters that matter, and one step of every power iteration."""
    generator = seeded(5)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._NormBase):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5
    return module


# Modules ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A decoder that has the weight of the embedding, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.decode = nn.Linear(4, 7)
        self.decode.weight = self.embed.weight

    def forward(self, tokens):
        return self.decode(self.again(self.mix(self.embed(tokens)).tanh()))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(randn(4, 4, seed=i)) for i in range(2)])
        self.named = nn.ParameterDict({"gain": nn.Parameter(randn(4)), "shift": nn.Parameter(randn())})
        self.layers = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)})
        self.steps = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        for weight in self.weights:
            x = (x @ weight).tanh()
        for step in self.steps:
            x = step(x)
        return self.layers["b"](self.layers["a"](x * self.named["gain"] + self.named["shift"]))


class Buffers(nn.Module):
    """Buffers of every type, one of them not saved, and a constant that is neither."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.register_buffer("shift", randn(4, seed=3))
        self.register_buffer("order", torch.tensor([2, 0, 1, 3]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("hidden", randn(4, seed=4), persistent=False)
        self.register_buffer("absent", None)
        self.constant = torch.tensor(3.0, dtype=F64)

    def forward(self, x):
        h = (self.head(x) + self.shift)[:, self.order]
        return torch.where(self.mask, h, self.hidden) * self.constant


class Counter(nn.Module):
    """Writes into a buffer in place and gives another one a new value at every call."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=F64))
        self.register_buffer("last", torch.zeros(2, dtype=F64))

    def forward(self, x):
        self.calls += 1
        out = self.head(x) * self.calls + self.last
        self.last = out.detach().mean(0)
        return out


class LazyCache(nn.Module):
    """Fills a buffer that does not exist yet at the first call, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        if self.cache is None:
            self.cache = self.head.weight.exp()
        return x @ self.cache


class PlainCache(nn.Module):
    """The same with an attribute that is no buffer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = self.head.weight.exp()
        return x @ self.cache


class PlainCounter(nn.Module):
    """Counts its calls in a number and keeps what it saw in a list."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.calls = 0
        self.seen: list[Any] = []

    def forward(self, x):
        self.calls += 1
        self.seen.append(1.0)
        return self.head(x) * self.calls + sum(self.seen)


class PlainTensor(nn.Module):
    """Writes into a tensor that is an attribute and no buffer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.total = torch.zeros(4, dtype=F64)
        self.scales = [torch.ones(4, dtype=F64)]

    def forward(self, x):
        self.total += 1
        self.scales[0].mul_(2)
        return self.head(x) * self.scales[0] + self.total


class PlainNest(nn.Module):
    """Changes containers inside containers."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)
        self.state: dict[str, Any] = {"seen": [], "inner": {"calls": 0}, "pair": ([1.0],)}

    def forward(self, x):
        self.state["seen"].append(1.0)
        self.state["inner"]["calls"] += 1
        self.state["pair"][0].append(2.0)
        factor = self.state["inner"]["calls"] + sum(self.state["pair"][0])
        return self.head(x) * factor + sum(self.state["seen"])


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.gain = nn.Parameter(randn(4))
        self.inner.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.inner.register_forward_hook(lambda module, args, out: out.tanh())
        self.register_forward_hook(type(self).scaled)

    @staticmethod
    def scaled(module, args, out):
        return out * module.gain

    def forward(self, x):
        return self.inner(x)


class Moded(nn.Module):
    """Says which mode it is in."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x) * (10.0 if self.training else 1.0)


class Asks(nn.Module):
    """Looks at its own parameters, their dtype and device, as Hugging Face models do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        own = next(self.parameters())
        norm = sum(p.square().sum() for p in self.parameters())
        return self.head(x.to(own.dtype).to(own.device)) / norm + dict(self.named_parameters())["head.bias"]


class Recurrent(nn.Module):
    """A recurrent layer; gives the output and the final states side by side."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn = kind(4, 3, **settings)

    def forward(self, x):
        out, final = self.rnn(x)
        finals = final if isinstance(final, tuple) else (final,)
        return torch.cat([out.flatten(), *(f.flatten() for f in finals)])


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths."""

    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, **settings)

    def forward(self, x):
        lengths = torch.tensor([3, 5, 2])
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.rnn(packed)
        return rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(4, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 3)

    def forward(self, x):
        h, c = self.lstm(x)
        return self.rnn(self.gru(h, c))


def attend(module, x):
    return module(x, x, x, need_weights=False)[0]


def attend_with_masks(module, x):
    size = x.shape[1]
    padding = torch.arange(size) >= torch.tensor([[3], [size]])
    causal = torch.ones(size, size, dtype=torch.bool).triu(1)
    out, weights = module(x, x, x, key_padding_mask=padding, attn_mask=causal, average_attn_weights=False)
    return torch.cat([out.flatten(), weights.flatten()])


def attend_across(module, x):
    return module(x[:, :3], x, x.flip(1))[0]


def encode(module, x):
    padding = torch.arange(x.shape[1]) >= torch.tensor([[3], [x.shape[1]]])
    # What the fast path gives for padding is of no interest.
    return module(x, src_key_padding_mask=padding)[~padding]


def encode_causally(module, x):
    return module(
        x, mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=F64), is_causal=True
    )


def decode(module, x):
    return module(x[:, :3], x, tgt_mask=torch.ones(3, 3, dtype=torch.bool).triu(1))


def translate(module, x):
    return module(x, x[:, :3])


def bags(module, tokens):
    return module(tokens, torch.tensor([0, 2, 5]))


def two_inputs(module, x):
    return module(x["left"], x["right"])


def normed_old(name, layer, **settings):
    normalise = getattr(nn.utils, name)
    return normalise(layer.double(), **settings)


class Case(NamedTuple):
    make: Any
    x: Any
    call: Any = None


def spectral():
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))


def orthogonal():
    layer = parametrizations.orthogonal(nn.Linear(4, 4))
    return nn.Sequential(layer, nn.Linear(4, 2))


def scaled_twice():
    class Exponent(nn.Module):
        def forward(self, weight):
            return weight.exp()

    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Exponent())
    parametrize.register_parametrization(layer, "weight", Exponent())
    parametrize.register_parametrization(layer, "bias", Exponent())
    return layer


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(4 * 3 * 2, 3),
    )  # fmt: skip


def encoder(**settings):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8))


def encoder_layer(**settings):
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **settings)


def decoder():
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, batch_first=True), 2)


def frozen():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    return module.requires_grad_(False)


def partly_frozen():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    return module


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 2), nn.Bilinear(4, 4, 2)

    def forward(self, left, right, *, flip=False):
        return self.left(left) + self.right(left, right)


ROWS = lambda: randn(5, 4)  # noqa: E731
SEQUENCE = lambda: randn(2, 5, 8)  # noqa: E731
IMAGES = lambda: randn(3, 2, 6, 4)  # noqa: E731
STEPS = lambda: randn(3, 5, 4)  # noqa: E731

MODULES = {
    "linear": Case(lambda: nn.Linear(4, 2), ROWS),
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 2)), ROWS
    ),
    "convnet": Case(convnet, IMAGES),
    "batch_norm": Case(lambda: nn.BatchNorm1d(4), ROWS),
    "batch_norm_no_affine": Case(lambda: nn.BatchNorm1d(4, affine=False), ROWS),
    "batch_norm_untracked": Case(lambda: nn.BatchNorm1d(4, track_running_stats=False), ROWS),
    "batch_norm_3d": Case(lambda: nn.BatchNorm3d(2, momentum=None), lambda: randn(2, 2, 3, 2, 2)),
    "instance_norm": Case(lambda: nn.InstanceNorm2d(2, affine=True), IMAGES),
    "instance_norm_tracked": Case(lambda: nn.InstanceNorm2d(2, track_running_stats=True), IMAGES),
    "group_norm": Case(lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)), IMAGES),
    "layer_norm": Case(lambda: nn.LayerNorm((6, 4)), IMAGES),
    "rms_norm": Case(lambda: nn.RMSNorm(4), IMAGES),
    "prelu": Case(lambda: nn.PReLU(2), IMAGES),
    "transposed_convolution": Case(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), IMAGES),
    "attention": Case(lambda: nn.MultiheadAttention(8, 2, batch_first=True), SEQUENCE, attend),
    "attention_dropout": Case(
        lambda: nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), SEQUENCE, attend
    ),
    "attention_masks": Case(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, bias=False), SEQUENCE, attend_with_masks
    ),
    "attention_across": Case(
        lambda: nn.MultiheadAttention(8, 4, kdim=8, vdim=8, add_bias_kv=True, batch_first=True),
        SEQUENCE,
        attend_across,
    ),
    "attention_widths": Case(
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True),
        SEQUENCE,
        lambda module, x: module(x, x[..., :4], x[..., 4:])[0],
    ),
    "attention_sequence_first": Case(lambda: nn.MultiheadAttention(8, 2), SEQUENCE, attend),
    "encoder_layer": Case(encoder_layer, SEQUENCE),
    "encoder_layer_norm_first": Case(
        functools.partial(encoder_layer, norm_first=True, activation="gelu"), SEQUENCE
    ),
    "encoder": Case(encoder, SEQUENCE),
    "encoder_padding": Case(encoder, SEQUENCE, encode),
    "encoder_causal": Case(functools.partial(encoder, norm_first=True), SEQUENCE, encode_causally),
    "decoder": Case(decoder, SEQUENCE, decode),
    "transformer": Case(
        lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True), SEQUENCE, translate
    ),
    "lstm": Case(lambda: Recurrent(nn.LSTM), STEPS),
    "lstm_deep": Case(
        lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5), STEPS
    ),
    "lstm_projected": Case(lambda: Recurrent(nn.LSTM, num_layers=2, proj_size=2), STEPS),
    "lstm_packed": Case(lambda: Packed(nn.LSTM, num_layers=2, bidirectional=True), STEPS),
    "gru": Case(lambda: Recurrent(nn.GRU, num_layers=2, dropout=0.5), STEPS),
    "gru_packed": Case(lambda: Packed(nn.GRU), STEPS),
    "rnn": Case(lambda: Recurrent(nn.RNN, nonlinearity="relu", bidirectional=True, bias=False), STEPS),
    "rnn_packed": Case(lambda: Packed(nn.RNN), STEPS),
    "cells": Case(Cells, ROWS),
    "embedding": Case(lambda: nn.Embedding(7, 3, padding_idx=0), lambda: ids(2, 5)),
    "embedding_bag": Case(lambda: nn.EmbeddingBag(7, 3, mode="mean"), lambda: ids(6), bags),
    "tied": Case(Tied, lambda: ids(2, 5)),
    "lists": Case(Lists, ROWS),
    "buffers": Case(Buffers, ROWS),
    "counter": Case(Counter, ROWS),
    "hooked": Case(Hooked, ROWS),
    "moded": Case(Moded, ROWS),
    "asks": Case(Asks, ROWS),
    "frozen": Case(frozen, ROWS),
    "partly_frozen": Case(partly_frozen, ROWS),
    "old_weight_norm": Case(lambda: normed_old("weight_norm", nn.Linear(4, 3)), ROWS),
    "old_weight_norm_all": Case(lambda: normed_old("weight_norm", nn.Linear(4, 3), dim=None), ROWS),
    "old_spectral_norm": Case(lambda: normed_old("spectral_norm", nn.Linear(4, 3)), ROWS),
    "weight_norm": Case(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), ROWS),
    "weight_norm_lstm": Case(
        lambda: parametrizations.weight_norm(Recurrent(nn.LSTM).rnn, "weight_hh_l0"),
        STEPS,
        lambda module, x: module(x)[0],
    ),
    "spectral_norm": Case(spectral, ROWS),
    "orthogonal": Case(orthogonal, ROWS),
    "parametrized_twice": Case(scaled_twice, ROWS),
    "two_inputs": Case(TwoInputs, lambda: {"left": randn(5, 4), "right": randn(5, 4, seed=1)}, two_inputs),
    "no_parameters": Case(lambda: nn.Sequential(nn.Flatten(), nn.Softmax(-1)), STEPS),
}  # fmt: skip
every_module = pytest.mark.parametrize("case", MODULES.values(), ids=MODULES.keys())


def made(case):
    torch.manual_seed(0)
    return give_statistics(case.make().double())


def reference(module, call, x):
    """What the module itself gives in evaluation mode; a copy, because some modules write into themselves."""
    own = copied(module).eval()
    for part in own.modules():
        if isinstance(part, nn.RNNBase):  # parametrized weights are kept in a list, computed
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    return own(x) if call is None else call(own, x)


def rescaled(module, factor):
    """The module with every parameter multiplied, in place."""
    own = copied(module)
    with torch.no_grad():
        for p in own.parameters():
            p.mul_(factor)
    return own


@every_module
def test_fn_equals_the_module_in_evaluation_mode(case):
    module = made(case)
    fn, params = fb.make_functional(module, case.call)
    x = case.x()
    assert not any(p.requires_grad for p in params.values())
    for _ in range(2):
        torch.testing.assert_close(fn(params, x), reference(module, case.call, x))


@every_module
def test_fn_of_other_parameters_equals_a_module_that_has_them(case):
    module = made(case)
    fn, params = fb.make_functional(module, case.call)
    x = case.x()
    other = {k: v * 1.5 for k, v in params.items()}
    torch.testing.assert_close(fn(other, x), reference(rescaled(module, 1.5), case.call, x))
    torch.testing.assert_close(fn(params, x), reference(module, case.call, x))


@every_module
@pytest.mark.parametrize("training", [True, False])
def test_making_and_running_a_function_leaves_the_module_as_it_was(case, training):
    module = made(case).train(training)
    before = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    trainable = [p.requires_grad for p in module.parameters()]
    fn, params = fb.make_functional(module, case.call)
    fn(params, case.x())
    training_call(fn, params, case.x(), 0)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert modes == [part.training for part in module.modules()]
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()]
    assert trainable == [p.requires_grad for p in module.parameters()]
    assert all(p.grad is None for p in module.parameters())


@every_module
def test_parameters_are_copies_and_the_module_may_change_afterwards(case):
    module = made(case)
    fn, params = fb.make_functional(module, case.call)
    x = case.x()
    expected = reference(module, case.call, x)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.zero_()
    module.train()
    torch.testing.assert_close(fn(params, x), expected)
    module = made(case)
    fn, params = fb.make_functional(module, case.call)
    for value in params.values():
        value.zero_()
    torch.testing.assert_close(reference(module, case.call, x), expected)


# Recurrent layers and packing have no batching rule in torch.
NOT_FOR_VMAP = [k for k in MODULES if k.startswith(("lstm", "gru", "rnn", "weight_norm_lstm", "cells"))]
WITHOUT_PARAMETERS = ["batch_norm_no_affine", "instance_norm_tracked", "no_parameters"]


@pytest.mark.parametrize("name", [k for k in MODULES if k not in (*NOT_FOR_VMAP, *WITHOUT_PARAMETERS)])
def test_fn_mapped_over_members_equals_a_loop(name):
    case = MODULES[name]
    fn, params = fb.make_functional(made(case), case.call)
    members, x = stacked(params), case.x()
    expected = torch.stack([fn(member(members, i), x) for i in range(3)])
    torch.testing.assert_close(vmap(lambda p: fn(p, x))(members), expected)
    torch.testing.assert_close(fn(params, x), expected[0])  # and nothing stays behind


@pytest.mark.parametrize("name", NOT_FOR_VMAP)
def test_a_map_that_torch_cannot_do_leaves_the_next_call_right(name):
    case = MODULES[name]
    fn, params = fb.make_functional(made(case), case.call)
    x = case.x()
    expected = fn(params, x)
    with contextlib.suppress(RuntimeError, ValueError):
        vmap(lambda p: fn(p, x))(stacked(params))
    torch.testing.assert_close(fn(params, x), expected, rtol=0, atol=0)


@every_module
def test_gradients_equal_those_of_the_module(case):
    module = made(case).requires_grad_(True).eval()
    fn, params = fb.make_functional(module, case.call)
    if not params:
        pytest.skip("no parameters")
    x = case.x()
    packs = any(isinstance(part, Packed) for part in module.modules())
    own = copied(module)
    for part in own.modules():
        if isinstance(part, nn.RNNBase):
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
    loss = (own(x) if case.call is None else case.call(own, x)).sin().sum()
    named = dict(own.named_parameters())
    expected = dict(
        zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True)
    )
    # torch packs no sequences inside `grad`.
    by_func = {} if packs else grad(lambda p: fn(p, x).sin().sum())(params)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    by_autograd = torch.autograd.grad(fn(leaves, x).sin().sum(), list(leaves.values()), allow_unused=True)
    for name, backward in zip(leaves, by_autograd, strict=True):
        wanted = torch.zeros_like(params[name]) if expected[name] is None else expected[name]
        if not packs:
            torch.testing.assert_close(by_func[name], wanted)
        torch.testing.assert_close(torch.zeros_like(wanted) if backward is None else backward, wanted)


# Without parameters there is nothing to follow.
FOLLOWS = [k for k in MODULES if k not in (*WITHOUT_PARAMETERS, "batch_norm_untracked")]


@pytest.mark.parametrize("name", FOLLOWS)
def test_buffers_follow_the_dtype_of_the_parameters(name):
    case = MODULES[name]
    torch.manual_seed(0)
    module = give_statistics(case.make().float())
    fn, params = fb.make_functional(module, case.call)
    wide = {k: v.double() for k, v in params.items()}
    x = case.x()
    got = fn(wide, x)
    assert got.dtype == F64
    torch.testing.assert_close(got, reference(copied(module).double(), case.call, x))


@pytest.mark.parametrize("name", ["mlp", "convnet", "encoder", "embedding", "weight_norm", "group_norm"])
def test_fn_in_bfloat16_equals_the_module_in_bfloat16(name):
    case = MODULES[name]
    torch.manual_seed(0)
    module = give_statistics(case.make().float())
    fn, params = fb.make_functional(module, case.call)
    x = case.x()
    x = x if not x.is_floating_point() else x.bfloat16()
    got = fn({k: v.bfloat16() for k, v in params.items()}, x)
    assert got.dtype == torch.bfloat16
    with torch.no_grad():  # as `fn`, by the kernels that torch uses where nothing is differentiated
        expected = reference(copied(module).bfloat16(), case.call, x)
    torch.testing.assert_close(got, expected)


@every_module
def test_fn_can_be_copied(case):
    fn, params = fb.make_functional(made(case), case.call)
    x = case.x()
    expected = fn(params, x)
    copied = copy.deepcopy(fn)
    torch.testing.assert_close(copied(params, x), expected, rtol=0, atol=0)
    torch.testing.assert_close(fn(params, x), expected, rtol=0, atol=0)


PICKLED = ["mlp", "convnet", "attention", "encoder", "lstm_deep", "tied", "buffers", "counter", "two_inputs"]


@pytest.mark.parametrize("name", PICKLED)
def test_fn_can_be_pickled_after_it_was_used(name):
    case = MODULES[name]
    fn, params = fb.make_functional(made(case), case.call)
    x = case.x()
    expected = fn(params, x)
    training_call(fn, params, x, 0)
    again = pickle.loads(pickle.dumps(fn))
    torch.testing.assert_close(again(params, x), expected, rtol=0, atol=0)


def _run_in_process(fn, params, x, queue):
    torch.set_num_threads(1)
    queue.put((fn(params, x).tolist(), training_call(fn, params, x, 3)[0].tolist()))


def test_fn_gives_the_same_in_a_spawned_process():
    fn, params = fb.make_functional(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    )
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    x = ROWS()
    process = context.Process(target=_run_in_process, args=(fn, params, x, queue))
    process.start()
    evaluated, trained = queue.get(timeout=120)
    process.join()
    torch.testing.assert_close(torch.tensor(evaluated, dtype=F64), fn(params, x))
    torch.testing.assert_close(torch.tensor(trained, dtype=F64), training_call(fn, params, x, 3)[0])


def test_an_exact_copy_of_fn_has_no_state_of_a_call_under_way():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            copies.append(copy.deepcopy(fn))
            return self.head(x)

    copies = []
    fn, params = fb.make_functional(Copies().double())
    expected = fn(params, ROWS())
    torch.testing.assert_close(copies[0](params, ROWS()), expected)


# Threads, reentrancy, exceptions ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "lstm_packed", "encoder", "old_weight_norm", "counter"])
def test_eight_threads_with_parameters_of_their_own_do_not_disturb_each_other(name):
    case = MODULES[name]
    fn, params = fb.make_functional(made(case), case.call)
    x = case.x()
    own = [{k: v * (1 + i) for k, v in params.items()} for i in range(8)]
    expected = [fn(p, x) for p in own]
    start = threading.Barrier(8)
    failures = []

    def work(i):
        try:
            start.wait()
            for _ in range(15):
                torch.testing.assert_close(fn(own[i], x), expected[i])
        except BaseException as error:  # seen by the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_threads_that_train_and_threads_that_evaluate_do_not_disturb_each_other():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    fn, params = fb.make_functional(net)
    x = ROWS()
    jobs = [
        *(lambda i=i: training_call(fn, params, x, i)[0] for i in range(4)),
        *(lambda i=i: fn({k: v * (1 + i) for k, v in params.items()}, x) for i in range(2)),
        *(
            lambda i=i: fb.predict(fn, params, fb.Dropout(), x, num_samples=3, seed=i, chunk_size=3).samples
            for i in range(2)
        ),
    ]
    expected = [job() for job in jobs]
    failures = []

    def work(job, wanted):
        try:
            for _ in range(10):
                torch.testing.assert_close(job(), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


class Outer(nn.Module):
    """A module whose forward calls a functional module, itself if it was told so."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        depth, inner, value = x
        if depth == 0:
            return self.head(value)
        below = inner(
            {"head.weight": self.head.weight * 2, "head.bias": self.head.bias}, (depth - 1, inner, value)
        )
        return self.head(below)


def test_a_model_that_calls_itself_equals_the_recursion_written_out():
    fn, params = fb.make_functional(Outer().double())
    value = ROWS()
    weight, bias = params["head.weight"], params["head.bias"]
    expected = value
    for power in (4, 2, 1):  # the innermost call comes first
        expected = F.linear(expected, power * weight, bias)
    for _ in range(2):
        torch.testing.assert_close(fn(params, (2, fn, value)), expected)
    torch.testing.assert_close(fn(params, (0, fn, value)), F.linear(value, weight, bias))


def test_a_model_that_holds_another_functional_model_equals_their_composition():
    inner, inner_params = fb.make_functional(nn.Linear(4, 4).double())

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.inner = inner

        def forward(self, x):
            return self.head(self.inner(inner_params, x).tanh())

    module = Holds().double()
    fn, params = fb.make_functional(module)
    torch.testing.assert_close(fn(params, ROWS()), module.head(inner(inner_params, ROWS()).tanh()))


def test_dropout_reaches_a_functional_model_inside_another():
    inner, inner_params = fb.make_functional(nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)).double())

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.gain * inner(inner_params, x)

    fn, params = fb.make_functional(Holds().double())
    got = fb.predict(fn, params, fb.Dropout(), ROWS(), num_samples=4, seed=0).samples
    plain = inner(inner_params, ROWS())
    kept = got != 0
    torch.testing.assert_close(got[kept], (2 * plain).expand_as(got)[kept])
    assert 0.3 < kept.double().mean() < 0.7


class Fails(nn.Module):
    """Raises in the middle, after it has written into its buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=F64))

    def forward(self, x):
        self.calls += 1
        h = self.first(x)
        if x.shape[0] == 1:
            raise ZeroDivisionError("in the middle")
        return self.second(h) * self.calls


@pytest.mark.parametrize("how", ["eval", "training", "stochastic"])
def test_an_exception_leaves_the_next_call_right(how):
    fn, params = fb.make_functional(nn.Sequential(Fails(), nn.Dropout(0.5)).double())
    runs = {
        "eval": lambda x: fn(params, x),
        "training": lambda x: training_call(fn, params, x, 0)[0],
        "stochastic": lambda x: (
            fb.predict(fn, params, fb.Dropout(where="1"), x, num_samples=2, seed=0, chunk_size=1).samples
        ),
    }
    expected = runs[how](ROWS())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            runs[how](ROWS()[:1])
        torch.testing.assert_close(runs[how](ROWS()), expected, rtol=0, atol=0)
    torch.testing.assert_close(
        fn(params, ROWS()), fb.make_functional(_master_of(fn, params))[0](params, ROWS())
    )


def _master_of(fn, params):
    module = nn.Sequential(Fails(), nn.Dropout(0.5)).double()
    module.load_state_dict({**params, **fn.buffers})
    return module


def test_an_exception_that_the_model_catches_leaves_paths_right():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.broken, self.drop = Fails(), nn.Dropout(0.5)

        def forward(self, x):
            try:
                self.broken(x[:1])
            except ZeroDivisionError:
                return self.drop(x)

    fn, params = fb.make_functional(Tries().double())
    x = torch.ones(50, 4, dtype=F64)
    dropped = fb.predict(fn, params, fb.Dropout(where="drop"), x, num_samples=2, seed=0).samples
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


# State of the module ------------------------------------------------------------------------------


def test_a_module_that_counts_in_a_buffer_begins_from_the_same_number_at_every_call():
    module = Counter().double()
    fn, params = fb.make_functional(module)
    x = ROWS()
    for _ in range(3):
        torch.testing.assert_close(fn(params, x), module.head(x))
    given = {
        **params,
        "calls": fb.Fixed(torch.tensor(4.0, dtype=F64)),
        "last": fb.Fixed(torch.ones(2, dtype=F64)),
    }
    torch.testing.assert_close(fn(given, x), 5 * module.head(x) + 1)
    assert given["calls"].tensor == 4
    assert (given["last"].tensor == 1).all()


@pytest.mark.parametrize("make", [LazyCache, PlainCache, PlainCounter, PlainTensor, PlainNest])
def test_what_a_module_remembers_of_a_call_is_forgotten(make):
    torch.manual_seed(0)
    module = make().double()
    fn, params = fb.make_functional(module)
    x = ROWS()
    other = {k: 2 * v for k, v in params.items()}
    expected = [reference(module, None, x), reference(rescaled(module, 2), None, x)]
    for _ in range(2):
        torch.testing.assert_close(fn(params, x), expected[0])
        torch.testing.assert_close(fn(other, x), expected[1])
        mapped = vmap(lambda p: fn(p, x))({k: torch.stack([v, other[k]]) for k, v in params.items()})
        torch.testing.assert_close(mapped, torch.stack(expected))


@pytest.mark.parametrize("make", [PlainCounter, PlainTensor, PlainNest])
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_what_a_module_remembers_of_a_draw_is_not_there_in_the_next(make, chunk_size):
    torch.manual_seed(0)
    module = make().double()
    fn, params = fb.make_functional(module)
    x = ROWS()
    expected = torch.stack([reference(rescaled(module, 1 + k % 2), None, x) for k in range(6)])
    ensemble = fb.Ensemble({k: torch.cat([v] * 3) for k, v in stacked(params, 2).items()})
    for _ in range(3):
        got = fb.predict(fn, None, ensemble, x, chunk_size=chunk_size)
        torch.testing.assert_close(got.samples, expected)


def test_a_table_that_grows_with_the_length_does_not_outlive_the_call():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones((), dtype=F64))
            self.register_buffer("table", torch.zeros(1, dtype=F64), persistent=False)

        def forward(self, x):
            if self.table.shape[0] < x.shape[1]:
                self.table = torch.arange(x.shape[1], dtype=F64)
            return self.gain * x + self.table[: x.shape[1]]

    fn, params = fb.make_functional(Positions())
    for length in (4, 2, 6):
        expected = torch.ones(2, length, dtype=F64) + torch.arange(length)
        torch.testing.assert_close(fn(params, torch.ones(2, length, dtype=F64)), expected)
    assert fn.buffers["table"].shape == (1,)


@pytest.mark.parametrize("first_in", ["inference_mode", "grad", "vmap", "no_grad"])
def test_what_was_cached_inside_a_context_can_be_used_outside_of_it(first_in):
    torch.manual_seed(0)
    net = give_statistics(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    fn, params = fb.make_functional(net)
    params = {k: v.double() for k, v in params.items()}
    x = ROWS()
    if first_in == "inference_mode":
        with torch.inference_mode():
            fn(params, x)
    elif first_in == "no_grad":
        with torch.no_grad():
            fn(params, x)
    elif first_in == "grad":
        grad(lambda p: fn(p, x).sum())(params)
    else:
        vmap(lambda p: fn(p, x))(stacked(params))
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    out = fn(leaves, x)
    torch.testing.assert_close(out, copied(net).double().eval()(x))
    gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    own = copied(net).double().eval()
    expected = torch.autograd.grad(own(x).square().sum(), list(own.parameters()))
    torch.testing.assert_close(gradients, expected)


def test_a_function_made_in_inference_mode_can_be_differentiated_outside():
    net = give_statistics(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())
    with torch.inference_mode():
        fn, params = fb.make_functional(net)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    gradients = torch.autograd.grad(fn(leaves, ROWS()).square().sum(), list(leaves.values()))
    own = copied(net).eval()
    expected = torch.autograd.grad(own(ROWS()).square().sum(), list(own.parameters()))
    torch.testing.assert_close(gradients, expected)


def test_the_frozen_buffers_cannot_be_changed_through_an_output():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(2, dtype=F64))

        def forward(self, x):
            return self.shift

    fn, params = fb.make_functional(Gives())
    fn(params, ROWS()).zero_()
    torch.testing.assert_close(fn(params, ROWS()), torch.ones(2, dtype=F64))


def test_fn_runs_on_the_meta_device():
    case = MODULES["convnet"]
    fn, params = fb.make_functional(made(case))
    out = fn({k: v.to("meta") for k, v in params.items()}, case.x().to("meta"))
    assert out.device.type == "meta"
    assert out.shape == (3, 3)
    torch.testing.assert_close(fn(params, case.x()), made(case).eval()(case.x()))


# Arguments ----------------------------------------------------------------------------------------


def test_a_module_of_keywords_is_called_as_the_user_says():
    module = TwoInputs().double()
    x = {"left": randn(5, 4), "right": randn(5, 4, seed=1)}
    fn, params = fb.make_functional(module, call=lambda module, x: module(**x, flip=True))
    torch.testing.assert_close(fn(params, x), module(**x))


def test_parameters_may_have_any_type_of_mapping_and_any_order():
    module = nn.Linear(4, 2).double()
    fn, params = fb.make_functional(module)
    turned = dict(reversed(params.items()))
    torch.testing.assert_close(fn(turned, ROWS()), module(ROWS()))


def test_outputs_may_be_any_structure():
    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return {"logits": self.head(x), "hidden": (x, None)}

    module = Gives().double()
    fn, params = fb.make_functional(module)
    out = fn(params, ROWS())
    torch.testing.assert_close(out["logits"], module.head(ROWS()))
    assert out["hidden"][1] is None


@pytest.mark.parametrize("module", [lambda x: x, 3, nn.Linear], ids=["function", "number", "class"])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match=r"`make_functional\(module\)` should be given an nn\.Module, got"):
        fb.make_functional(module)


LAZY = {
    "weight": (lambda: nn.Sequential(nn.ReLU(), nn.LazyLinear(3)), "1.weight"),
    "batch_norm": (lambda: nn.LazyBatchNorm1d(), "weight"),
    "buffer_only": (lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False)), "0.running_mean"),
}


@pytest.mark.parametrize(("make", "name"), LAZY.values(), ids=LAZY.keys())
def test_a_lazy_module_is_refused_by_the_name_of_what_has_no_shape(make, name):
    with pytest.raises(
        ValueError, match=rf"`make_functional\(module\)`.*'{name}' is not initialised.*Run the"
    ):
        fb.make_functional(make())


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m)), torch.compile]
)
def test_of_a_wrapped_module_the_one_inside_is_taken(wrap):
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    fn, params = fb.make_functional(wrap(module))
    assert list(params) == [name for name, _ in module.named_parameters()]
    torch.testing.assert_close(fn(params, x), module(x).detach())


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_module_that_jit_has_compiled_is_refused():
    with pytest.raises(TypeError, match=r"torch.jit.*Use the module that it was made of"):
        fb.make_functional(torch.jit.trace(nn.Linear(3, 2), torch.ones(4, 3)))


def test_a_lazy_module_that_has_run_is_taken():
    module = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()).double()
    module(ROWS())
    fn, params = fb.make_functional(module)
    torch.testing.assert_close(fn(params, ROWS()), module.eval()(ROWS()))


def test_a_missing_parameter_is_named():
    fn, params = fb.make_functional(convnet().double())
    del params["1.bias"]
    with pytest.raises(ValueError, match=r"`fn\(params, x\)` of `Sequential` needs the parameter '1\.bias'"):
        fn(params, IMAGES())


def test_an_unknown_parameter_is_named():
    fn, params = fb.make_functional(convnet().double())
    with pytest.raises(ValueError, match=r"of `Sequential` has no parameter '9\.gain'\.$"):
        fn({**params, "9.gain": torch.ones(2)}, IMAGES())


def test_a_buffer_given_as_a_parameter_is_told_to_be_fixed():
    fn, params = fb.make_functional(convnet().double())
    with pytest.raises(ValueError, match=r"no parameter '1\.running_mean'\. Pass a buffer as `fb\.Fixed"):
        fn({**params, "1.running_mean": torch.ones(4)}, IMAGES())


def test_an_unknown_buffer_is_named():
    fn, params = fb.make_functional(convnet().double())
    with pytest.raises(ValueError, match=r"has no buffer '1\.running_median'"):
        fn({**params, "1.running_median": fb.Fixed(torch.ones(4))}, IMAGES())


@pytest.mark.parametrize("params", [None, [torch.ones(2)], torch.ones(2)], ids=["none", "list", "tensor"])
def test_parameters_that_are_no_dict_are_refused(params):
    fn, _ = fb.make_functional(nn.Linear(4, 2))
    with pytest.raises(TypeError, match=r"of `Linear` should be given a dict of parameters, got"):
        fn(params, ROWS())


def test_a_parameter_of_another_shape_is_refused_by_torch():
    fn, params = fb.make_functional(nn.Linear(4, 2).double())
    with pytest.raises(RuntimeError):
        fn({**params, "weight": torch.ones(2, 5, dtype=F64)}, ROWS())


def test_a_function_shows_the_name_of_its_module():
    fn, _ = fb.make_functional(Tied())
    assert "Tied" in repr(fn)


# Buffers given by name ----------------------------------------------------------------------------


def test_fixed_buffers_replace_the_frozen_ones():
    module = give_statistics(convnet().double())
    fn, params = fb.make_functional(module)
    mean, variance = randn(4), randn(4, seed=1).square() + 1
    given = {**params, "1.running_mean": fb.Fixed(mean), "1.running_var": fb.Fixed(variance)}
    own = copied(module).eval()
    own[1].running_mean.copy_(mean)
    own[1].running_var.copy_(variance)
    torch.testing.assert_close(fn(given, IMAGES()), own(IMAGES()))
    torch.testing.assert_close(fn(params, IMAGES()), module.eval()(IMAGES()))


def test_fixed_may_replace_a_parameter_too():
    module = nn.Linear(4, 2).double()
    fn, params = fb.make_functional(module)
    torch.testing.assert_close(
        fn({**params, "bias": fb.Fixed(params["bias"] + 1)}, ROWS()), module(ROWS()) + 1
    )


def test_a_map_over_fixed_buffers_equals_a_loop():
    fn, params = fb.make_functional(give_statistics(convnet().double()))
    means, x = randn(3, 4), IMAGES()
    got = vmap(lambda m: fn({**params, "1.running_mean": m}, x))(fb.Fixed(means))
    expected = [fn({**params, "1.running_mean": fb.Fixed(m)}, x) for m in means]
    torch.testing.assert_close(got, torch.stack(expected))


def test_integer_and_boolean_fixed_buffers_are_read():
    module = Buffers().double()
    fn, params = fb.make_functional(module)
    own = copied(module)
    own.order.copy_(torch.tensor([0, 1, 2, 3]))
    own.mask.fill_(False)
    own.mask[0] = True
    given = {**params, "order": fb.Fixed(own.order.clone()), "mask": fb.Fixed(own.mask.clone())}
    torch.testing.assert_close(fn(given, ROWS()), own(ROWS()))


# Transforms ---------------------------------------------------------------------------------------

SMOOTH = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), ROWS),
    "batch_norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.GELU()), ROWS),
    "encoder_layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 3, activation="gelu", batch_first=True),
        STEPS,
    ),
    "tied": (lambda: nn.Sequential(Tied().mix, nn.Tanh(), nn.Linear(4, 2)), ROWS),
    "orthogonal": (lambda: nn.Sequential(nn.Tanh(), parametrizations.orthogonal(nn.Linear(4, 4))), ROWS),
}
smooth = pytest.mark.parametrize(("make", "inputs"), SMOOTH.values(), ids=SMOOTH.keys())


math_kernel = sdpa_kernel(SDPBackend.MATH)  # torch's fused kernel has no forward-mode derivative


def smooth_case(make, inputs):
    torch.manual_seed(0)
    module = give_statistics(make().double()).eval()
    return module, *fb.make_functional(module), inputs()


def along(params, direction):
    return {k: direction * torch.ones_like(v) for k, v in params.items()}


@smooth
@math_kernel
def test_fn_agrees_with_functional_call_under_every_transform(make, inputs):
    module, fn, params, x = smooth_case(make, inputs)

    def by_torch(p, x):
        return functional_call(math_only(module), p, (x,))

    def loss(f):
        return lambda p: f(p, x).sin().sum()

    torch.testing.assert_close(fn(params, x), by_torch(params, x))
    torch.testing.assert_close(grad(loss(fn))(params), grad(loss(by_torch))(params))
    name = next(iter(params))

    def of_one(f):
        return lambda v: f({**params, name: v}, x)

    torch.testing.assert_close(jacrev(of_one(fn))(params[name]), jacrev(of_one(by_torch))(params[name]))
    tangent = (along(params, 0.3),)
    torch.testing.assert_close(
        jvp(lambda p: fn(p, x), (params,), tangent), jvp(lambda p: by_torch(p, x), (params,), tangent)
    )


def math_only(module):
    """In training mode, where attention takes no fused kernel; dropout off, BatchNorm evaluating."""
    own = copied(module)
    for part in own.modules():
        if isinstance(part, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            part.training = True
            part.dropout = 0.0 if isinstance(part, nn.MultiheadAttention) else part.dropout
    return own


@smooth
@math_kernel
def test_forward_mode_derivatives_equal_finite_differences(make, inputs):
    _, fn, params, x = smooth_case(make, inputs)
    step = 1e-6
    _, got = jvp(lambda p: fn(p, x), (params,), (along(params, 1.0),))
    ahead = fn({k: v + step for k, v in params.items()}, x)
    behind = fn({k: v - step for k, v in params.items()}, x)
    torch.testing.assert_close(got, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-7)


@smooth
@math_kernel
def test_the_hessian_equals_that_of_autograd_on_the_module(make, inputs):
    module, fn, params, x = smooth_case(make, inputs)
    name = list(params)[-1]
    got = hessian(lambda v: fn({**params, name: v}, x).sin().sum())(params[name])
    own = math_only(module)
    leaf = dict(own.named_parameters())[name]
    (first,) = torch.autograd.grad(own(x).sin().sum(), leaf, create_graph=True)
    rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in first.flatten()]
    expected = torch.stack(rows).reshape(*leaf.shape, *leaf.shape)
    torch.testing.assert_close(got, expected)


@smooth
def test_gradients_one_a_row_equal_a_loop(make, inputs):
    _, fn, params, x = smooth_case(make, inputs)

    def of_row(p, row):
        return fn(p, row[None]).sin().sum()

    got = vmap(grad(of_row), (None, 0))(params, x)
    for i, row in enumerate(x):
        torch.testing.assert_close({k: v[i] for k, v in got.items()}, grad(of_row)(params, row))


# Training -----------------------------------------------------------------------------------------


def buffers_of(module):
    return {k: v.clone() for k, v in module.named_buffers()}


def assert_buffers_equal(new, module, before):
    """``new`` holds the buffers that a step of ``module.train()`` changed, with its values."""
    after = dict(module.named_buffers())
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed <= set(new) <= set(after)
    for name, value in new.items():
        assert isinstance(value, fb.Fixed)
        assert not value.tensor.requires_grad
        torch.testing.assert_close(value.tensor, after[name])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.norm(x) * 3 + 1)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm1d(4)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x).exp())


class BareStatistics(nn.Module):
    """Running statistics kept by hand."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return self.gain * F.batch_norm(x, self.mean, self.var, training=self.training, momentum=0.2)


class Frozen(nn.Module):
    """A part that was frozen by leaving out its momentum: its statistics do not move."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=0.0)

    def forward(self, x):
        return self.norm(x)


TRAINED = {
    "batch_norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()), ROWS),
    "batch_norm_2d": (convnet, IMAGES),
    "cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), ROWS),
    "no_affine": (lambda: nn.BatchNorm1d(4, affine=False), ROWS),
    "untracked": (lambda: nn.BatchNorm1d(4, track_running_stats=False), ROWS),
    "momentum_0": (Frozen, ROWS),
    "instance_norm": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), IMAGES),
    "twice": (Twice, ROWS),
    "shared": (Shared, ROWS),
    "by_hand": (BareStatistics, ROWS),
    "counter": (Counter, ROWS),
    "old_spectral_norm": (lambda: normed_old("spectral_norm", nn.Linear(4, 3)), ROWS),
    "spectral_norm": (spectral, ROWS),
    "encoder": (lambda: encoder(dropout=0.0), SEQUENCE),
    "moded": (Moded, ROWS),
}
trained = pytest.mark.parametrize(("make", "inputs"), TRAINED.values(), ids=TRAINED.keys())


@trained
@pytest.mark.parametrize("mode", [True, False])
def test_a_training_call_equals_one_step_of_the_module_in_training_mode(make, inputs, mode):
    torch.manual_seed(0)
    module = make().double().train(mode)
    fn, params = fb.make_functional(module)
    x = inputs()
    before = buffers_of(module)
    own = copied(module).train()
    for _ in range(2):  # a second call begins from the same statistics
        got, new = training_call(fn, params, x, 0)
    torch.testing.assert_close(got, own(x))
    assert_buffers_equal(new, own, before)
    torch.testing.assert_close(dict(module.named_buffers()), before)
    torch.testing.assert_close(fn.buffers, before)


@trained
def test_training_calls_in_a_row_equal_steps_of_the_module(make, inputs):
    torch.manual_seed(0)
    module = make().double().train()
    fn, params = fb.make_functional(module)
    original = buffers_of(module)
    for step in range(3):
        x = inputs() + step
        before = copy.deepcopy(params)
        got, new = training_call(fn, params, x, step)
        torch.testing.assert_close(got, module(x))
        assert set(before) == set(params)
        for name, value in before.items():  # nothing given was changed
            here = params[name]
            same = (
                torch.equal(here.tensor, value.tensor)
                if isinstance(here, fb.Fixed)
                else torch.equal(here, value)
            )
            assert same, name
        params = {**params, **new}
    assert_buffers_equal({k: v for k, v in params.items() if isinstance(v, fb.Fixed)}, module, original)
    torch.testing.assert_close(fn(params, inputs()), module.eval()(inputs()))


@trained
def test_gradients_of_a_training_call_equal_those_of_the_module(make, inputs):
    torch.manual_seed(0)
    module = make().double().train()
    fn, params = fb.make_functional(module)
    if not params:
        pytest.skip("no parameters")
    x = inputs()

    def loss(p):
        out, new = training_call(fn, p, x, 0)
        return out.sin().sum(), new

    got, new = grad(loss, has_aux=True)(params)
    before = buffers_of(module)
    named = dict(module.named_parameters())
    expected = torch.autograd.grad(module(x).sin().sum(), list(named.values()))
    for name, value in zip(named, expected, strict=True):
        torch.testing.assert_close(got[name], value)
    assert_buffers_equal(new, module, before)


MAPPED = ["batch_norm", "batch_norm_2d", "no_affine", "untracked", "momentum_0", "twice", "shared", "by_hand"]


@pytest.mark.parametrize("name", MAPPED)
def test_a_training_call_mapped_over_members_equals_a_loop(name):
    make, inputs = TRAINED[name]
    torch.manual_seed(0)
    fn, params = fb.make_functional(make().double())
    x = inputs()
    members = {
        **stacked(params),
        **{
            k: fb.Fixed(torch.stack([v + i for i in range(3)]))
            for k, v in fn.buffers.items()
            if v.is_floating_point()
        },
        **{k: fb.Fixed(v.repeat(3)) for k, v in fn.buffers.items() if not v.is_floating_point()},
    }
    if not members:
        pytest.skip("nothing to map over")
    seeds = torch.arange(3)
    got, new = vmap(lambda p, s: training_call(fn, p, x, s))(members, seeds)
    for i in range(3):
        expected, expected_new = training_call(fn, member(members, i), x, seeds[i])
        torch.testing.assert_close(got[i], expected)
        assert set(new) == set(expected_new)
        for key, value in expected_new.items():
            torch.testing.assert_close(new[key].tensor[i], value.tensor)


def dropping():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 40), nn.Dropout(0.25), nn.Linear(40, 30), nn.ReLU(), nn.Dropout(0.5))
    return fb.make_functional(net.double())


def test_dropout_of_a_training_call_is_a_function_of_the_seed():
    fn, params = dropping()
    x = ROWS()
    state = torch.get_rng_state()
    first, again = training_call(fn, params, x, 7)[0], training_call(fn, params, x, 7)[0]
    other = training_call(fn, params, x, 8)[0]
    assert torch.equal(first, again)
    assert torch.equal(first, training_call(fn, params, x, torch.tensor(7))[0])
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_a_training_call_mapped_over_seeds_equals_a_loop():
    fn, params = dropping()
    x = ROWS()
    seeds = torch.arange(5)
    got = vmap(lambda s: training_call(fn, params, x, s)[0])(seeds)
    expected = torch.stack([training_call(fn, params, x, int(s))[0] for s in seeds])
    torch.testing.assert_close(got, expected)
    assert len({tuple(row.flatten().tolist()) for row in got}) == 5


def test_dropout_of_a_training_call_keeps_its_share_and_scales_it():
    fn, params = fb.make_functional(nn.Dropout(0.25))
    x = torch.ones(200, 300, dtype=F64)
    got, new = training_call(fn, params, x, 0)
    assert not new
    kept = got != 0
    torch.testing.assert_close(got[kept], torch.full_like(got[kept], 4 / 3))
    assert abs(kept.double().mean() - 0.75) < 5 * (0.75 * 0.25 / got.numel()) ** 0.5


def test_dropout_of_a_training_call_can_be_left_out():
    fn, params = fb.make_functional(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Dropout(0.5)).double()
    )
    x = ROWS()
    got, new = training_call(fn, params, x, 0, dropout=False)
    hidden = F.linear(x, params["0.weight"], params["0.bias"])
    torch.testing.assert_close(got, F.batch_norm(hidden, None, None, training=True))
    assert "1.running_mean" in new
    assert torch.equal(got, training_call(fn, params, x, 1, dropout=False)[0])


WITHOUT_DROPOUT = {
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
    "recurrent": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.5),
    "alpha": lambda: nn.Sequential(nn.Linear(4, 4), nn.AlphaDropout(0.5)),
    "by_flag": lambda: ByFlag(),
}


class ByFlag(nn.Module):
    """Hands its rate on only while it is trained."""

    def __init__(self):
        super().__init__()
        self.rate_drop = 0.5
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return F.dropout(self.head(x), self.rate_drop if self.training else 0.0)


@pytest.mark.parametrize("make", WITHOUT_DROPOUT.values(), ids=WITHOUT_DROPOUT.keys())
def test_a_training_call_without_dropout_drops_nowhere(make):
    torch.manual_seed(0)
    module = make().double()
    fn, params = fb.make_functional(module)
    x = STEPS()
    got, _ = training_call(fn, params, x, 0, dropout=False)
    torch.testing.assert_close(got, training_call(fn, params, x, 1, dropout=False)[0], rtol=0, atol=0)
    torch.testing.assert_close(got, module.eval()(x))


class SwitchedOnByMode(nn.Module):
    """Keeps its dropout on whatever mode it is given."""

    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def train(self, mode=True):
        super().train(mode)
        self.drop.training = True
        return self

    def forward(self, x):
        return self.drop(self.head(x))


class SwitchedOnInside(nn.Module):
    """Switches its dropout on when it is called."""

    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        self.drop.train()
        return self.drop(self.head(x))


class WithItsOwnForward(nn.Module):
    """Has dropout that was told to do something else."""

    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)
        self.drop.forward = functools.partial(F.dropout, p=0.5, training=True)

    def forward(self, x):
        return self.drop(self.head(x))


@pytest.mark.parametrize("make", [SwitchedOnByMode, SwitchedOnInside, WithItsOwnForward])
def test_dropout_that_a_module_keeps_on_in_evaluation_stays_on(make):
    torch.manual_seed(0)
    module = make().double().eval()
    fn, params = fb.make_functional(module)
    x = ROWS()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        got = fn(params, x)
    torch.testing.assert_close(got, expected)
    assert (got == 0).any()


def test_dropout_that_is_off_is_no_call_that_modes_look_at():
    class Seen(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.add(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names: set[str] = set()
    kinds = nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout
    module = nn.Sequential(nn.Linear(4, 3), *(kind(0.5) for kind in kinds)).double()
    fn, params = fb.make_functional(module)
    with Seen():
        got = vmap(lambda x: fn(params, x))(ROWS()[None])[0]
    torch.testing.assert_close(got, module[0](ROWS()))
    assert not [name for name in names if "drop" in name]
    assert "linear" in names


def norm_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()


def expected_statistics(net, x):
    own = copied(net).train()
    own(x)
    return own[1].running_mean, own[1].running_var


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_new_statistics_are_placed_where_the_model_of_a_users_function_has_its_parameters(depth):
    net = norm_net()
    fn, own = fb.make_functional(net)
    keys = ["net", "part"][:depth]
    tree: Any = own
    for key in reversed(keys):
        tree = {key: tree, "temperature": torch.tensor(2.0, dtype=F64)}

    def model(params, x):
        for key in keys:
            params = params[key]
        return fn(params, x) / 2

    _, new = training_call(model, tree, ROWS(), 0)
    for key in keys:
        assert set(new) == {key}
        new = new[key]
    mean, variance = expected_statistics(net, ROWS())
    torch.testing.assert_close(new["1.running_mean"].tensor, mean)
    torch.testing.assert_close(new["1.running_var"].tensor, variance)


def test_new_statistics_of_two_models_in_one_tree_are_placed_apart():
    first, second = norm_net(), norm_net()
    (f, p), (g, q) = fb.make_functional(first), fb.make_functional(second)
    tree = {"a": p, "b": {"inner": q}}
    x = ROWS()
    _, new = training_call(lambda t, x: f(t["a"], x) + g(t["b"]["inner"], 3 * x), tree, x, 0)
    torch.testing.assert_close(new["a"]["1.running_mean"].tensor, expected_statistics(first, x)[0])
    torch.testing.assert_close(
        new["b"]["inner"]["1.running_mean"].tensor, expected_statistics(second, 3 * x)[0]
    )


def test_new_statistics_are_found_where_the_parameters_are_in_a_list():
    net = norm_net()
    fn, own = fb.make_functional(net)
    _, new = training_call(lambda t, x: fn(t[1], x), [torch.ones(2), own], ROWS(), 0)
    mean, _ = expected_statistics(net, ROWS())
    merged = fb._tree.merge([torch.ones(2), own], new)
    torch.testing.assert_close(merged[1]["1.running_mean"].tensor, mean)


@pytest.mark.parametrize(
    "passed", [dict, lambda p: {k: v * 1 for k, v in p.items()}], ids=["copied", "computed"]
)
def test_new_statistics_are_not_lost_where_a_users_function_passes_a_dict_of_its_own(passed):
    net = norm_net()
    fn, own = fb.make_functional(net)
    _, new = training_call(lambda t, x: fn(passed(t), x), own, ROWS(), 0)
    mean, _ = expected_statistics(net, ROWS())
    torch.testing.assert_close(new["1.running_mean"].tensor, mean)


def test_a_model_called_twice_by_a_users_function_goes_on_from_its_own_statistics():
    net = norm_net()
    fn, own = fb.make_functional(net)
    x = ROWS()
    _, new = training_call(lambda t, x: fn(t, x) - fn(t, 2 * x), own, x, 0)
    module = copied(net).train()
    module(x)
    module(2 * x)
    torch.testing.assert_close(new["1.running_mean"].tensor, module[1].running_mean)
    assert new["1.num_batches_tracked"].tensor == 2


def test_evaluation_after_training_uses_the_frozen_statistics_again():
    net = give_statistics(norm_net())
    fn, params = fb.make_functional(net)
    expected = fn(params, ROWS())
    training_call(fn, params, ROWS(), 0)
    torch.testing.assert_close(fn(params, ROWS()), expected, rtol=0, atol=0)


def test_a_plain_function_can_be_trained():
    def model(params, x):
        return F.dropout(x @ params["w"], 0.5)

    w = torch.ones(4, 30, dtype=F64)
    got, new = training_call(model, {"w": w}, ROWS(), 0)
    assert not new
    kept = got != 0
    torch.testing.assert_close(got[kept], (2 * (ROWS() @ w))[kept])
    assert 0.3 < kept.double().mean() < 0.7


class Checkpointing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.second(checkpoint(self.first, x, use_reentrant=False).tanh())


@pytest.mark.parametrize("find", ["backward", "vjp", "curvature"])
def test_gradient_checkpointing_is_explained(find):
    fn, params = fb.make_functional(Checkpointing())
    x = torch.ones(5, 3)
    data, normal = (x, torch.zeros(5, 2)), fb.likelihoods.Normal(1.0)
    assert fn(params, x).shape == (5, 2)  # where nothing is differentiated it does no harm
    leaves = {name: leaf.requires_grad_() for name, leaf in params.items()}
    calls = {
        "backward": lambda: fn(leaves, x).sum().backward(),
        "vjp": lambda: torch.func.vjp(lambda p: fn(p, x), params),
        "curvature": lambda: fb.curvature.ggn(fn, params, data, normal, "diag"),
    }
    with pytest.raises(RuntimeError, match=r"evaluated again later.*model\.gradient_checkpointing_disable"):
        calls[find]()
