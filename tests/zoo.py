"""Models and posteriors that tests share: add a line here and every property test applies to it.

``MODELS`` are made by name, as are the ``POSTERIORS`` over any of them. ``expected_samples`` is what
``predict`` should return: a loop over the draws that calls the module itself.
"""

import warnings
from collections.abc import Callable
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import funcbayes as fb
from funcbayes._intercept import DropoutMasks, with_dropout
from funcbayes._linearize import Linearization
from funcbayes.covariances import Dense, Diagonal, Kronecker, LowRankPlusDiagonal, LowRankPrecision

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


def randn_like(tree, seed=0, scale=1.0):
    """A tree of noise: every leaf has its own."""
    g = seeded(seed)
    return optree.tree_map(lambda t: scale * torch.randn(t.shape, generator=g, dtype=F64).to(t.dtype), tree)


def shifted(tree, noise):
    return optree.tree_map(torch.add, tree, noise)


def stacked(*trees):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def entry(tree, i):
    return optree.tree_map(lambda leaf: leaf[i], tree)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made while it is on, and its shape."""

    nbytes: int = 0
    shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in optree.tree_leaves(found):
            if (
                isinstance(leaf, Tensor)
                and not func.is_view
                and leaf.untyped_storage().nbytes() > self.nbytes
            ):
                self.nbytes, self.shape = leaf.untyped_storage().nbytes(), tuple(leaf.shape)
        return found


class Model(NamedTuple):
    """``fn`` and ``params`` as a user has them, and ``run(params, x)``, the same by other means."""

    fn: Callable[[Any, Any], Any]
    params: Any
    inputs: Callable[[int], Any]  # number of rows -> x
    run: Callable[[Any, Any], Any]
    head: str  # prefix of the paths of the last layer
    drops: bool = False
    buffers: dict[str, Tensor] = {}


def from_module(make: Callable[[], nn.Module], inputs, head, *, drops=False, keywords=False) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().double()
    for k, (name, buffer) in enumerate(module.named_buffers()):
        if name.endswith("running_mean"):
            buffer.copy_(randn(*buffer.shape, seed=k))
        if name.endswith("running_var"):
            buffer.copy_(randn(*buffer.shape, seed=k).exp())
    module.eval()
    fn, params = fb.make_functional(module, call=unpack if keywords else None)

    def run(params: dict[str, Any], x: Any) -> Tensor:
        plain = {k: v.tensor if isinstance(v, fb.Fixed) else v for k, v in params.items()}
        return functional_call(module, plain, (), x) if keywords else functional_call(module, plain, (x,))

    buffers = {k: b.clone() for k, b in module.named_buffers() if b.is_floating_point()}
    return Model(fn, params, inputs, run, head, drops, buffers)


def unpack(module, x):
    return module(**x)


def from_function(fn, params, inputs, head, *, drops=False) -> Model:
    return Model(fn, params, inputs, fn, head, drops)


def linear(params, x):
    """Leaves of rank 2, 1 and 0."""
    return params["gain"] * (x @ params["w"].T) + params["b"]


def linear_params():
    return {"w": randn(2, 3), "b": randn(2, seed=1), "gain": randn(seed=2)}


def nested(params, x):
    """Parameters in a list with a dict and a tuple in it."""
    first, (weight, bias), last = params
    return torch.tanh(x @ first["w"]) @ weight @ last["w"] + bias


def nested_params():
    return [{"w": randn(3, 4)}, (randn(4, 4, seed=1), randn(2, seed=2)), {"w": randn(4, 2, seed=3)}]


def dropping(params, x):
    """Dropout called as a function, switched off, before and after the first use of a parameter."""
    return F.dropout(torch.tanh(F.dropout(x, 0.3, False) @ params["w"]), 0.4, training=False) @ params["head"]


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv_1, self.norm_1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv_2, self.norm_2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.relu(self.norm_1(self.conv_1(x)))
        return self.relu(self.norm_2(self.conv_2(h)) + x)


def residual_net():
    stem = (nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    return nn.Sequential(*stem, Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


class Attending(nn.Module):
    """Self-attention; with ``need_weights`` the attention weights are part of the result."""

    def __init__(self, need_weights, batch_first=True, dropout=0.0):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=batch_first)
        self.head = nn.Linear(4, 2)
        self.need_weights = need_weights

    def forward(self, x):
        h, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return self.head(h if weights is None else h + weights.sum() * weights.var())


class OwnAttention(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)
        self.dropout = dropout

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        rate = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.head(h.transpose(1, 2).flatten(2))


def transformer(dropout=0.0, batch_first=True):
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=batch_first)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 2))


class TextNet(nn.Module):
    """Inputs by keyword, as a language model has them."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, tokens, mask):
        h = self.embedding(tokens) * mask.unsqueeze(-1)
        return self.head(h.sum(1))


class Tied(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.cell, self.head = kind(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def rows(*shape):
    return lambda n: randn(n, *shape, seed=n)


def rows_second(length, width):
    return lambda n: randn(length, n, width, seed=n)


def tokens(length, below):
    return lambda n: torch.randint(below, (n, length), generator=seeded(n))


def words(n):
    return {"tokens": tokens(5, 7)(n), "mask": randn(n, 5, seed=n)}


def mlp(dropout=0.0):
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), *drop, nn.Linear(8, 6), nn.GELU(), *drop, nn.Linear(6, 2)
    )


def conv_net(dropout=0.0):
    drop = [nn.Dropout2d(dropout)] if dropout else []
    body = (
        nn.Conv2d(2, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        *drop,
        nn.Conv2d(4, 3, 2),
        nn.AvgPool2d(2),
    )
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(3, 2))


class Viewing(nn.Module):
    """``view`` after a convolution, as the classic networks have it; it asks for the layout of NCHW."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(16, 2)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.head(h.view(h.size(0), -1))


class Written(nn.Module):
    """Writes into the outputs of a convolution through what ``flat`` makes of them."""

    def __init__(self, flat):
        super().__init__()
        self.first, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 2)
        self.flat = flat

    def forward(self, x):
        h = self.first(x)
        self.flat(h).mul_(2.0)
        h = self.head(F.relu(h))
        self.flat(h).add_(1.0)
        return h


WRITTEN = {
    "conv_written_through_view": lambda h: h.view(h.shape[0], -1),
    "conv_written_through_flatten": lambda h: h.flatten(1),
    "conv_written_through_reshape": lambda h: h.reshape(h.shape[0], -1),
}


def grouped_conv_net():
    first = nn.Conv2d(4, 8, 3, groups=2, padding="same")
    return nn.Sequential(
        first, nn.ELU(), nn.Conv2d(8, 4, 2, dilation=2, groups=4), nn.Flatten(), nn.Linear(64, 2)
    )


def signal_net():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 2)
    )


def norm_net():
    groups = (nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.LayerNorm(36))
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *groups, nn.Linear(36, 2))


MODELS: dict[str, Callable[[], Model]] = {
    "linear": lambda: from_function(linear, linear_params(), rows(3), "b"),
    "nested": lambda: from_function(nested, nested_params(), rows(3), "2"),
    "mlp": lambda: from_module(mlp, rows(3), "4"),
    "conv": lambda: from_module(conv_net, rows(2, 9, 8), "6"),
    "conv_view": lambda: from_module(Viewing, rows(2, 6, 6), "head"),
    **{
        name: lambda flat=flat: from_module(lambda: Written(flat), rows(2, 6, 5), "head")
        for name, flat in WRITTEN.items()
    },
    "conv_grouped": lambda: from_module(grouped_conv_net, rows(4, 6, 6), "4"),
    "conv_1d": lambda: from_module(signal_net, rows(2, 6), "4"),
    "residual": lambda: from_module(residual_net, rows(2, 8, 8), "7"),
    "norms": lambda: from_module(norm_net, rows(2, 3, 3), "5"),
    "attention": lambda: from_module(lambda: Attending(False), rows(5, 4), "head"),
    "attention_weights": lambda: from_module(lambda: Attending(True), rows(5, 4), "head"),
    "attention_rows_second": lambda: from_module(lambda: Attending(False, False), rows_second(5, 4), "head"),
    "own_attention": lambda: from_module(OwnAttention, rows(5, 4), "head"),
    "transformer": lambda: from_module(transformer, rows(5, 4), "1"),
    "keywords": lambda: from_module(TextNet, words, "head", keywords=True),
    "tied": lambda: from_module(Tied, tokens(3, 5), "norm"),
    "mlp_dropout": lambda: from_module(lambda: mlp(0.3), rows(3), "6", drops=True),
    "conv_dropout": lambda: from_module(lambda: conv_net(0.3), rows(2, 9, 8), "7", drops=True),
    "own_attention_dropout": lambda: from_module(lambda: OwnAttention(0.3), rows(5, 4), "head", drops=True),
    "attention_dropout": lambda: from_module(
        lambda: Attending(False, dropout=0.3), rows(5, 4), "head", drops=True
    ),
    "transformer_dropout": lambda: from_module(lambda: transformer(0.2), rows(5, 4), "1", drops=True),
    "functional_dropout": lambda: from_function(
        dropping, {"w": randn(3, 4), "head": randn(4, 2, seed=1)}, rows(3), "head", drops=True
    ),
}
# Slow, and for a few tests only.
SLOW_MODELS: dict[str, Callable[[], Model]] = {
    "lstm": lambda: from_module(Recurrent, rows(4, 3), "head"),
}
# Rows of the first axis depend on each other, so that a curvature is no sum over them.
ROWS_TOGETHER = ("attention_weights", "attention_rows_second")
# `vmap` cannot take these: draws are evaluated in a loop, with a warning that says why.
LOOPED_MODELS: dict[str, tuple[str, Callable[[], Model]]] = {
    "branch_on_values": (
        "data-dependent control flow",
        lambda: from_function(make_branching(), linear_params(), rows(3), "b"),
    ),
    "item": (r"\.item\(\)", lambda: from_function(make_itemizing(), linear_params(), rows(3), "b")),
}


def make_branching():  # a new function each time: what was learned of one is remembered
    def branching(params, x):
        f = linear(params, x)
        return f if f.sum() > 0 else f.exp()

    return branching


def make_itemizing():
    def itemizing(params, x):
        return linear(params, x) * params["b"].sum().item()

    return itemizing


def covering(params, keep):
    """The part of ``params`` whose paths satisfy ``keep``; ``MISSING`` marks holes in lists and tuples."""

    def walk(node, path):
        if isinstance(node, Tensor):
            return node if keep(path) else fb.MISSING
        if isinstance(node, dict):
            kept = {k: walk(v, f"{path}.{k}".lstrip(".")) for k, v in node.items()}
            return {k: v for k, v in kept.items() if v is not fb.MISSING}
        return type(node)(walk(v, f"{path}.{i}".lstrip(".")) for i, v in enumerate(node))

    return walk(params, "")


def overlaid(params, draw):
    """``params`` with what ``draw`` has in its place, nodes of any kind."""
    if draw is fb.MISSING or isinstance(draw, type(fb.MISSING)):
        return params
    if isinstance(draw, dict):
        return {**params, **{k: overlaid(params.get(k), v) for k, v in draw.items()}}
    if isinstance(draw, list | tuple):
        return type(draw)(overlaid(p, d) for p, d in zip(params, draw, strict=True))
    return draw


def gaussian(params, scale=0.3):
    """A Gaussian whose variances differ."""
    return fb.Gaussian(params, Diagonal(optree.tree_map(lambda z: (scale * z) ** 2, randn_like(params, 9))))


def members(params, num_members=5, scale=0.3):
    return stacked(*(shifted(params, randn_like(params, seed, scale)) for seed in range(num_members)))


def with_fixed(model):
    """Means and BatchNorm statistics; the latter belong to every draw."""
    statistics = {k: fb.Fixed(b.abs() + 0.5) for k, b in model.buffers.items()}
    return fb.Gaussian({**model.params, **statistics}, gaussian(model.params).covariance)


def varying_fixed(model):
    """Members with BatchNorm statistics of their own."""
    statistics = {
        k: fb.Fixed(torch.stack([(1 + i) * b.abs() for i in range(5)])) for k, b in model.buffers.items()
    }
    return fb.Ensemble({**members(model.params), **statistics})


def head_only(model):
    return gaussian(covering(model.params, lambda path: path.startswith(model.head)))


def all_but_head(model):
    return gaussian(covering(model.params, lambda path: not path.startswith(model.head)))


def linearized(posterior):
    """The same Gaussian, over the linearised model."""
    return fb.Gaussian(posterior.mean, posterior.covariance, linearized=True)


def around(model, seed, scale=0.2):
    """A Gaussian with a mean and variances of its own."""
    mean = shifted(model.params, randn_like(model.params, seed, scale))
    variance = optree.tree_map(lambda z: (scale * z) ** 2, randn_like(mean, seed + 1))
    return fb.Gaussian(mean, Diagonal(variance))


def factors(params, rank, scale=0.3):
    """Leaves ``(*s, rank)``."""
    columns = [randn_like(params, 20 + r, scale) for r in range(rank)]
    return optree.tree_map(lambda *leaves: torch.stack(leaves, -1), *columns)


def low_rank(model):
    return fb.Gaussian(
        model.params, LowRankPlusDiagonal(gaussian(model.params).variance, factors(model.params, 3))
    )


def low_rank_precision(model):
    precision = optree.tree_map(lambda z: 1 + z**2, randn_like(model.params, 4))
    return fb.Gaussian(model.params, LowRankPrecision(precision, factors(model.params, 2, 0.5)))


def kronecker(model):
    """Curvatures of rank 2 in each factor."""

    def curvature(side):
        def product(leaf):
            length = (leaf.reshape(*leaf.shape[:1], -1) if leaf.ndim else leaf.reshape(1, 1)).shape[side]
            root = randn(length, 2, seed=length)
            return root @ root.T

        return optree.tree_map(product, model.params)

    covariance = Kronecker.from_factors(model.params, curvature(0), curvature(1), prior_precision=9.0)
    return fb.Gaussian(model.params, covariance)


def laplace(model):
    """A Laplace approximation on a few rows, over the linearised model."""
    x = model.inputs(3)
    outputs = model.fn(model.params, x)
    y = torch.randint(outputs.shape[-1], outputs.shape[:-1], generator=seeded(3))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`vmap` cannot take")
        return fb.laplace.fit(
            model.fn, model.params, (x, y), fb.likelihoods.Categorical(), prior_precision=9.0
        )


def collected(model):
    """SWAG from a few snapshots."""
    state = fb.swag.init(model.params, rank=3)
    for seed in range(6):
        state = fb.swag.update(state, shifted(model.params, randn_like(model.params, seed, 0.2)))
    return fb.swag.posterior(state)


def mixed(model):
    """Components of three kinds."""
    point = fb.Point(shifted(model.params, randn_like(model.params, 7, 0.1)))
    return fb.mixture(around(model, 1), fb.Ensemble(members(model.params)), point)


def mixed_weighted(model):
    return fb.mixture(*(around(model, k) for k in (1, 2, 3)), weights=[0.2, 0.5, 0.3])


def joined(model):
    rest = fb.Ensemble(members(all_but_head(model).mean), WEIGHTS)
    return fb.join(head_only(model), rest)


def joined_mixtures(model):
    parts = (lambda path: path.startswith(model.head)), (lambda path: not path.startswith(model.head))
    kept = [
        fb.mixture(*(gaussian(covering(around(model, k).mean, part)) for k in (1, 2)), weights=[0.3, 0.7])
        for part in parts
    ]
    return fb.join(*kept)


def mixed_ragged(model):
    """Draws that cover the head, everything else, or everything."""
    rest = fb.Ensemble(members(all_but_head(model).mean))
    return fb.mixture(head_only(model), rest, around(model, 3), weights=[0.3, 0.5, 0.2])


WEIGHTS = torch.tensor([0.1, 0.3, 0.05, 0.5, 0.05], dtype=F64)
POSTERIORS: dict[str, Callable[[Model], fb.Posterior]] = {
    "point": lambda model: fb.Point(shifted(model.params, randn_like(model.params))),
    "gaussian": lambda model: gaussian(model.params),
    "ensemble": lambda model: fb.Ensemble(members(model.params)),
    "ensemble_weighted": lambda model: fb.Ensemble(members(model.params), WEIGHTS),
    "gaussian_head_only": head_only,
    "gaussian_all_but_head": all_but_head,
    "ensemble_head_only": lambda model: fb.Ensemble(members(head_only(model).mean)),
    "gaussian_low_rank": low_rank,
    "gaussian_low_rank_precision": low_rank_precision,
    "gaussian_kronecker": kronecker,
    "gaussian_dense": lambda model: fb.Gaussian(model.params, Dense(factors(model.params, 4))),
    "swag": collected,
    "laplace": laplace,
    "multi_swag": lambda model: fb.mixture(
        stacked(collected(model), fb.temper(collected(model), 0.3)), stacked=True
    ),
    "mixture": mixed,
    "mixture_weighted": mixed_weighted,
    "mixture_nested": lambda model: fb.mixture(mixed(model), mixed_weighted(model), weights=[1, 3]),
    "join": joined,
    "join_of_mixtures": joined_mixtures,
    "tempered": lambda model: fb.temper(gaussian(model.params), 0.5),
    "antithetic": lambda model: fb.antithetic(collected(model)),
    "orthogonal": lambda model: fb.antithetic(fb.orthogonal(collected(model))),
    "fixed_draws": lambda model: fb.to_ensemble(mixed_weighted(model), 6, seed=1),
    "linearized": lambda model: linearized(around(model, 1)),
    "linearized_head_only": lambda model: linearized(head_only(model)),
    "linearized_fixed_draws": lambda model: fb.to_ensemble(linearized(around(model, 1)), 6, seed=1),
    "join_linearized": lambda model: fb.join(
        linearized(head_only(model)), fb.Ensemble(members(all_but_head(model).mean))
    ),
}
# Draws that differ in what they cover, or are linearised around: only `predict` can take them together.
RAGGED: dict[str, Callable[[Model], fb.Posterior]] = {
    "mixture_ragged": mixed_ragged,
    "mixture_linearized": lambda model: fb.mixture(
        linearized(around(model, 1)), around(model, 2), linearized(around(model, 3)), weights=[2, 1, 1]
    ),
}
WITH_FIXED: dict[str, Callable[[Model], fb.Posterior]] = {
    "gaussian_fixed": with_fixed,
    "ensemble_fixed": varying_fixed,
    "linearized_fixed": lambda model: linearized(with_fixed(model)),
}
DROPOUTS: dict[str, Callable[[Model], fb.Posterior]] = {
    "dropout": lambda model: fb.Dropout(),
    "dropout_rate": lambda model: fb.Dropout(rate=0.5),
    "dropout_shared_mask": lambda model: fb.Dropout(shared_mask=True),
    "dropout_and_head": lambda model: fb.join(head_only(model), fb.Dropout()),
    "dropout_and_linearized_head": lambda model: fb.join(linearized(head_only(model)), fb.Dropout()),
    "dropout_fixed": lambda model: fb.to_ensemble(fb.join(fb.Dropout(), head_only(model)), 4, seed=2),
}


def pairs(names=None):
    """Every posterior, or those named, with every model it is for: ``make_model, make_posterior``."""
    found = []
    for model_name, make in MODELS.items():
        model = make()
        table = POSTERIORS | RAGGED
        table |= WITH_FIXED if model.buffers else {}
        table |= DROPOUTS if model.drops else {}
        for name, of_model in table.items():
            if name == "laplace" and model_name in ROWS_TOGETHER:
                continue
            if names is None or name in names:
                found.append(pytest.param(make, of_model, id=f"{name}-{model_name}"))
    return pytest.mark.parametrize(("make_model", "make_posterior"), found)


def numbered_draws(posterior, num_samples, seed) -> dict[int, fb.Draw]:
    """Draws by number, whatever they cover."""
    indices, draws = torch.arange(num_samples), {}
    for positions in posterior.structures(indices, seed).values():
        group = posterior.draws(indices[positions], seed)
        draws |= {int(i): entry(group, j) for j, i in enumerate(positions)}
    return draws


def expected_samples(model, posterior, x, num_samples, seed) -> Tensor:
    """One call of the model a draw, without the engine."""
    draws, outputs = numbered_draws(posterior, num_samples, seed), []
    for i in range(num_samples):
        draw = draws[i]
        params = overlaid(model.params, draw.leaves)
        run = model.run
        masks = [effect for effect in draw.effects if isinstance(effect, DropoutMasks)]
        centers = [effect.center for effect in draw.effects if isinstance(effect, Linearization)]
        if masks:
            located = [m.at_rows(0, m.find_rows(model.fn, params, x)) for m in masks]
            run = with_dropout(model.fn, located)
        outputs.append(expanded(run, params, centers, x) if centers else run(params, x))
    return torch.stack(outputs)


def expanded(run, params, centers, x):
    """``f + J (params - centers)``, with ``f`` at ``params`` that have all ``centers`` in their place.

    By two backward passes through ``run``.
    """
    leaves, structure = optree.tree_flatten(centers)
    given = [reduce(getitem, path[1:], params) for path in optree.tree_paths(centers)]

    def moved(*values):
        return run(reduce(overlaid, structure.unflatten(values), params), x)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        steps = tuple(a - b for a, b in zip(given, leaves, strict=True))
        outputs, change = torch.autograd.functional.jvp(moved, tuple(leaves), steps)
    return outputs + change
