"""Dropout as a posterior: its masks against torch's own dropout, written out by hand, and in law."""

import contextlib
import copy
import functools
import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad
from torch.nn.utils import rnn

import funcbayes as fb
from funcbayes import _engine
from funcbayes._intercept import Folded, _dropout, _folded, _prepared
from funcbayes._recording import Recorded

F64 = torch.float64
P = 0.3
# torch's own: nested tensors, channel dropout of inputs that may have no rows, and recurrent layers
# with dropout but one layer say what they do.
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning"),
    pytest.mark.filterwarnings("ignore:dropout2d. Received a .*D input:UserWarning"),
    pytest.mark.filterwarnings("ignore:dropout option adds dropout after all but last:UserWarning"),
    pytest.mark.filterwarnings("ignore:`vmap` cannot take:UserWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(tuple(shape), generator=seeded(seed), dtype=dtype)


def ones(*shape):
    return torch.ones(shape, dtype=F64)


def functional(module, call=None):
    torch.manual_seed(0)
    return fb.make_functional(
        module().double() if not isinstance(module, nn.Module) else module.double(), call
    )


def draws(fn, params, x, num_samples=6, seed=0, chunk_size=None, **settings):
    """Outputs of draws ``(S, N, ...)``."""
    posterior = fb.Dropout(**settings)
    return fb.predict(
        fn, params, posterior, x, num_samples=num_samples, seed=seed, chunk_size=chunk_size
    ).samples


def assert_share(kept, share, num_sigmas=5.0):
    """Independent marks that are true with probability ``share``."""
    sem = (share * (1 - share) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - share) < num_sigmas * sem


def assert_uncorrelated(a, b, share, num_sigmas=5.0):
    """Two sets of marks, each true with probability ``share``, have no covariance."""
    products = (a.double() - share) * (b.double() - share) / (share * (1 - share))
    assert abs(products.mean()) < num_sigmas * products.numel() ** -0.5


def assert_moments_equal(a, b, num_sigmas=5.5):
    """Two samples along axis 0 have one mean and one variance, entry by entry, within standard errors."""

    def compare(u, v):
        sem = (u.var(0) / u.shape[0] + v.var(0) / v.shape[0]).sqrt()
        assert ((u.mean(0) - v.mean(0)).abs() <= num_sigmas * sem + 1e-12).all()

    compare(a, b)
    center = (a.mean(0) + b.mean(0)) / 2
    compare((a - center) ** 2, (b - center) ** 2)


# Every kind of dropout ----------------------------------------------------------------------------


class Kind(NamedTuple):
    """A call as it stands in a model that is evaluated, torch's own in training, and what one mask covers."""

    ours: Any
    torchs: Any
    shape: tuple[int, ...]
    mask: tuple[int, ...]  # shape of the mask: 1 where whole channels go


def layer(make, shape, mask):
    return Kind(make(P), make(P).train(), shape, mask)


ROWS, IMAGES, VOLUMES, SIGNALS = (6, 5), (3, 4, 5, 6), (2, 4, 3, 2, 5), (4, 5, 6)
KINDS = {
    "Dropout": layer(nn.Dropout, ROWS, ROWS),
    "Dropout_images": layer(nn.Dropout, IMAGES, IMAGES),
    "Dropout1d": layer(nn.Dropout1d, SIGNALS, (4, 5, 1)),
    "Dropout1d_no_rows": layer(nn.Dropout1d, (8, 6), (8, 1)),
    "Dropout2d": layer(nn.Dropout2d, IMAGES, (3, 4, 1, 1)),
    "Dropout2d_signals": layer(nn.Dropout2d, SIGNALS, (4, 5, 1)),
    "Dropout3d": layer(nn.Dropout3d, VOLUMES, (2, 4, 1, 1, 1)),
    "Dropout3d_no_rows": layer(nn.Dropout3d, (8, 3, 2, 5), (8, 1, 1, 1)),
    "AlphaDropout": layer(nn.AlphaDropout, ROWS, ROWS),
    "FeatureAlphaDropout": layer(nn.FeatureAlphaDropout, IMAGES, (3, 4, 1, 1)),
    "Dropout_inplace": layer(functools.partial(nn.Dropout, inplace=True), ROWS, ROWS),
    "Dropout2d_inplace": layer(functools.partial(nn.Dropout2d, inplace=True), IMAGES, (3, 4, 1, 1)),
    "AlphaDropout_inplace": layer(functools.partial(nn.AlphaDropout, inplace=True), ROWS, ROWS),
    "f_dropout": Kind(lambda x: F.dropout(x, P), lambda x: F.dropout(x, P), ROWS, ROWS),
    "f_dropout_keywords": Kind(
        lambda x: F.dropout(input=x, training=False, p=P), lambda x: F.dropout(x, P), ROWS, ROWS
    ),
    "f_dropout_off": Kind(lambda x: F.dropout(x, P, training=False), lambda x: F.dropout(x, P), ROWS, ROWS),
    "f_dropout_default": Kind(lambda x: F.dropout(x), lambda x: F.dropout(x), ROWS, ROWS),
    "f_dropout1d": Kind(lambda x: F.dropout1d(x, P, False), lambda x: F.dropout1d(x, P), SIGNALS, (4, 5, 1)),
    "f_dropout2d": Kind(
        lambda x: F.dropout2d(x, P, False), lambda x: F.dropout2d(x, P), IMAGES, (3, 4, 1, 1)
    ),
    "f_dropout3d": Kind(
        lambda x: F.dropout3d(x, P, False), lambda x: F.dropout3d(x, P), VOLUMES, (2, 4, 1, 1, 1)
    ),
    "f_alpha_dropout": Kind(
        lambda x: F.alpha_dropout(x, P), lambda x: F.alpha_dropout(x, P, True), ROWS, ROWS
    ),
    "f_feature_alpha_dropout": Kind(
        lambda x: F.feature_alpha_dropout(x, P),
        lambda x: F.feature_alpha_dropout(x, P, True),
        IMAGES,
        (3, 4, 1, 1),
    ),
    "torch_dropout": Kind(
        lambda x: torch.dropout(x, P, False), lambda x: torch.dropout(x, P, True), ROWS, ROWS
    ),
    "torch_dropout_": Kind(
        lambda x: torch.dropout_(x + 0, P, False), lambda x: torch.dropout(x, P, True), ROWS, ROWS
    ),
    "torch_alpha_dropout": Kind(
        lambda x: torch.alpha_dropout(x, P, False), lambda x: torch.alpha_dropout(x, P, True), ROWS, ROWS
    ),
    "torch_feature_dropout": Kind(
        lambda x: torch.feature_dropout(x, P, False),
        lambda x: torch.feature_dropout(x, P, True),
        IMAGES,
        (3, 4, 1, 1),
    ),
    "torch_feature_alpha_dropout": Kind(
        lambda x: torch.feature_alpha_dropout(x, P, False),
        lambda x: torch.feature_alpha_dropout(x, P, True),
        IMAGES,
        (3, 4, 1, 1),
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def model_of(kind):
    if isinstance(kind.ours, nn.Module):
        return fb.make_functional(nn.Sequential(nn.Identity(), copy.deepcopy(kind.ours)))
    return (lambda params, x: kind.ours(x)), {}


@every_kind
def test_every_entry_takes_the_two_values_that_torch_gives_it(kind):
    x = randn(*kind.shape) + 3  # nowhere 0
    torch.manual_seed(0)
    theirs = torch.stack([kind.torchs(x.clone()) for _ in range(80)])
    low, high = theirs.amin(0), theirs.amax(0)
    assert (high > low).all()
    ours = draws(*model_of(kind), x, 80)
    assert torch.minimum((ours - low).abs(), (ours - high).abs()).max() < 1e-12
    torch.testing.assert_close((ours.amin(0), ours.amax(0)), (low, high))


def marks(kind, num_samples=200, seed=0):
    """What is kept, one mark for each independent choice: ``(S, *mask)``."""
    samples = draws(*model_of(kind), ones(*kind.shape) * 2, num_samples, seed)
    kept = (samples - samples.amax()).abs() < 1e-9
    one_each = kept
    for axis, size in enumerate(kind.mask):
        if size == 1:
            one_each = one_each.select(axis + 1, 0).unsqueeze(axis + 1)
    assert (kept == one_each).all()  # channels are kept or dropped whole
    return one_each


@every_kind
def test_masks_have_the_rate_and_are_independent_over_entries_rows_and_draws(kind):
    kept = marks(kind)
    share = 0.5 if kind is KINDS["f_dropout_default"] else 1 - P
    assert_share(kept, share)
    assert_uncorrelated(kept[1:], kept[:-1], share)
    assert_uncorrelated(kept, marks(kind, seed=1), share)
    for axis, size in enumerate(kind.mask, start=1):
        if size > 1:
            assert_uncorrelated(kept.narrow(axis, 1, size - 1), kept.narrow(axis, 0, size - 1), share)


@pytest.mark.parametrize("name", [k for k in KINDS if "lpha" in k])
def test_alpha_dropout_keeps_mean_and_variance(name):
    kind = KINDS[name]
    g = draws(*model_of(kind), randn(4000, 3, *(2 for _ in kind.shape[2:])), 1)[0]
    flat = g.movedim(1, -1).reshape(4000, -1)[:, :3]
    sem = flat.std(0) / 4000**0.5
    assert (flat.mean(0).abs() < 5 * sem).all()
    squares = flat.square()
    assert ((squares.mean(0) - 1).abs() < 5 * squares.std(0) / 4000**0.5).all()


def test_masks_of_two_places_in_a_model_are_independent():
    def fn(params, x):
        return torch.stack([F.dropout(x, 0.5), F.dropout(x, 0.5), F.dropout(x, 0.5)], -1)

    kept = draws(fn, {}, ones(40, 50), 10) != 0
    for a, b in itertools.combinations(range(3), 2):
        assert_uncorrelated(kept[..., a], kept[..., b], 0.5)


def test_masks_of_two_batches_are_independent():
    fn, params = functional(nn.Dropout(0.5))
    batches = [ones(30, 40), ones(30, 40), ones(30, 40)]
    samples = fb.predict_batches(
        fn, params, fb.Dropout(), batches, num_samples=8, seed=0, labelled=False
    ).samples
    kept = (samples != 0).reshape(8, 3, 30, 40)
    for a, b in itertools.combinations(range(3), 2):
        assert_uncorrelated(kept[:, a], kept[:, b], 0.5)


def test_the_whole_is_dropped_at_rate_1():
    fn, params = functional(nn.Sequential(nn.Dropout(1.0)))
    assert (draws(fn, params, ones(3, 4)) == 0).all()
    fn, params = functional(nn.Sequential(nn.Dropout(1)))
    assert (draws(fn, params, ones(3, 4)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_dropout_keeps_the_dtype(dtype):
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5)).to(dtype))
    x = randn(5, 4).to(dtype)
    got = draws(fn, params, x)
    assert got.dtype == dtype
    twice = (2 * fn(params, x)).expand_as(got)
    torch.testing.assert_close(got[got != 0], twice[got != 0])


# In place -----------------------------------------------------------------------------------------


def ignoring(drop):
    """A model that drops in place and does not look at what the call returns."""

    def fn(params, x):
        h = x * 1.0
        drop(h)
        return h

    return fn


def reusing(drop):
    """A model that adds what was dropped in place to itself."""

    def fn(params, x):
        h = x * 1.0
        return drop(h) + h

    return fn


IN_PLACE = {
    "f": lambda h: F.dropout(h, P, True, True),
    "module": nn.Dropout(P, inplace=True),
    "torch": lambda h: torch.dropout_(h, P, True),
    "f2d": lambda h: F.dropout2d(h, P, True, True),
}


@pytest.mark.parametrize("drop", IN_PLACE.values(), ids=IN_PLACE.keys())
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_dropout_in_place_changes_the_value_it_was_given(drop, chunk_size):
    x = ones(4, 5, 3, 3)
    got = draws(ignoring(drop), {}, x, 12, chunk_size=chunk_size)
    assert set(got.unique().tolist()) == {0.0, 1 / (1 - P)}
    got = draws(reusing(drop), {}, x, 12, chunk_size=chunk_size)
    torch.testing.assert_close(got.unique(), torch.tensor([0.0, 2 / (1 - P)], dtype=F64))


def test_dropout_in_place_on_the_input_leaves_the_users_tensor_alone():
    fn, params = functional(nn.Dropout(0.5, inplace=True))
    x = ones(4, 5)
    draws(fn, params, x)
    assert (x == 1).all()


# Attention ----------------------------------------------------------------------------------------

LENGTHS = (5, 6)
ATTENTION = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool_mask": {"attn_mask": torch.ones(LENGTHS, dtype=torch.bool).tril(1)},
    "float_mask": {"attn_mask": randn(*LENGTHS, seed=4)},
    "row_mask": {"attn_mask": (torch.arange(6) < torch.tensor([[4], [6]]))[:, None, None]},
    "bool_mask_empty": {"attn_mask": torch.ones(LENGTHS, dtype=torch.bool).tril(-1)},
}


def naive_weights(q, k, attn_mask=None, is_causal=False, scale=None):
    """Attention weights as the documentation of torch writes them; no key, no weight."""
    scores = torch.einsum("...le,...se->...ls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        allowed = allowed.tril()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            allowed = allowed & attn_mask
        else:
            scores = scores + attn_mask
    weights = torch.where(allowed, scores.exp(), 0)
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0)


@pytest.mark.parametrize("settings", ATTENTION.values(), ids=ATTENTION.keys())
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 20])
def test_dropout_in_attention_equals_softmax_mask_and_product(settings, grouped, chunk_size):
    q, k, v = randn(2, 4, 5, 3), randn(2, 2 if grouped else 4, 6, 3, seed=1), randn(2, 2, 6, 7, seed=2)
    v = v if grouped else v.repeat_interleave(2, 1)
    per_head = (lambda t: t.repeat_interleave(2, 1)) if grouped else (lambda t: t)

    def attend(params, values):
        return F.scaled_dot_product_attention(q, k, values, dropout_p=P, enable_gqa=grouped, **settings)

    # Values that are unit vectors show the weights themselves.
    units = torch.eye(6, dtype=F64).expand(2, k.shape[1], 6, 6)
    dropped = draws(attend, {}, units, 20, chunk_size=chunk_size)
    weights = naive_weights(q, per_head(k), **settings)
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, weights / (1 - P), 0))
    assert_share(kept[(weights > 0).expand_as(kept)], 1 - P)
    got = draws(attend, {}, v, 20, chunk_size=chunk_size)
    torch.testing.assert_close(got, dropped @ per_head(v))
    # torch's own dropout gives the same mean.
    torch.testing.assert_close(
        weights @ per_head(v),
        F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **settings),
    )


@pytest.mark.parametrize("shape", [(5, 3), (4, 5, 3), (2, 2, 4, 5, 3)], ids=["2d", "3d", "5d"])
def test_dropout_in_attention_of_other_ranks_equals_softmax_mask_and_product(shape):
    q, k = randn(*shape), randn(*shape, seed=1)

    def attend(params, values):
        return F.scaled_dot_product_attention(q, k, values, None, P)

    dropped = draws(attend, {}, torch.eye(5, dtype=F64).expand(*shape[:-2], 5, 5))
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, naive_weights(q, k) / (1 - P), 0))
    assert not kept.all()


def with_weights(module, x):
    out, weights = module(x, x, x, need_weights=True, average_attn_weights=False)
    return torch.cat([out.flatten(1), weights.flatten(1)], 1)


def test_dropout_in_multihead_attention_equals_its_formula_with_the_mask_it_used():
    module = nn.MultiheadAttention(6, 2, dropout=P, batch_first=True).double()
    fn, params = fb.make_functional(module, with_weights)
    x = randn(3, 5, 6)
    got = draws(fn, params, x, 20)
    out, dropped = got[..., :30].reshape(20, 3, 5, 6), got[..., 30:].reshape(20, 3, 2, 5, 5)
    q, k, v = (
        t.unflatten(-1, (2, 3)).transpose(1, 2)
        for t in F.linear(x, params["in_proj_weight"], params["in_proj_bias"]).chunk(3, -1)
    )
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, naive_weights(q, k) / (1 - P), 0))
    assert_share(kept, 1 - P)
    joined = (dropped @ v).transpose(2, 3).flatten(-2)
    torch.testing.assert_close(out, F.linear(joined, params["out_proj.weight"], params["out_proj.bias"]))


# In law, against torch in training mode -----------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind, depth=2, packed=False, batch_first=True, **settings):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=depth, dropout=P, batch_first=batch_first, **settings)
        self.packed, self.batch_first = packed, batch_first

    def forward(self, x):
        if self.packed:
            lengths = torch.full((len(x),), x.shape[1] - 1)
            packed = rnn.pack_padded_sequence(x, lengths, batch_first=True)
            out = rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
            return out.flatten(1)
        out, final = self.rnn(x if self.batch_first else x.transpose(0, 1))
        final = final[0] if isinstance(final, tuple) else final
        out = out if self.batch_first else out.transpose(0, 1)
        return torch.cat([out.flatten(1), final.transpose(0, 1).flatten(1)], 1)


class Block(nn.Module):
    """Dropout by function, handed its rate only in training, as many public models do."""

    def __init__(self):
        super().__init__()
        self.dropout = P
        self.project = nn.Linear(6, 6)

    def forward(self, x):
        q = x.unflatten(-1, (2, 3)).transpose(1, 2)
        rate = self.dropout if self.training else 0.0
        h = F.scaled_dot_product_attention(q, q, q, dropout_p=rate).transpose(1, 2).flatten(2)
        return F.dropout(self.project(h), p=self.dropout, training=self.training).flatten(1)


def attend(module, x):
    return module(x, x, x, need_weights=False)[0].flatten(1)


def attend_padded(module, x):
    padding = torch.tensor([False, False, False, False, True]).expand(len(x), 5)
    return module(x, x, x, key_padding_mask=padding, need_weights=False)[0].flatten(1)


def encode(module, x):
    return module(x).flatten(1)


def encode_causally(module, x):
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=F64)
    return module(x, src_mask=mask, is_causal=True).flatten(1)


def decode(module, x):
    return module(x[:, :3], x).flatten(1)


def transformer_layer(**settings):
    return nn.TransformerEncoderLayer(6, 2, 8, dropout=P, batch_first=True, **settings)


IN_LAW = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(P), nn.Linear(6, 2)), (3,), None),
    "mlp_deep": (
        lambda: nn.Sequential(nn.Dropout(P), nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)),
        (3,),
        None,
    ),
    "selu": (
        lambda: nn.Sequential(nn.Linear(3, 6), nn.SELU(), nn.AlphaDropout(P), nn.Linear(6, 2)),
        (3,),
        None,
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Dropout2d(P), nn.Flatten(), nn.Linear(16, 2)),
        (2, 4, 4),
        None,
    ),
    "attention": (lambda: nn.MultiheadAttention(6, 2, dropout=P, batch_first=True), (5, 6), attend),
    "attention_padded": (
        lambda: nn.MultiheadAttention(6, 2, dropout=P, batch_first=True),
        (5, 6),
        attend_padded,
    ),
    "attention_weights": (
        lambda: nn.MultiheadAttention(6, 2, dropout=P, batch_first=True),
        (5, 6),
        with_weights,
    ),
    "encoder_layer": (transformer_layer, (5, 6), encode),
    "encoder_layer_causal": (
        functools.partial(transformer_layer, norm_first=True),
        (5, 6),
        encode_causally,
    ),
    "encoder": (lambda: nn.TransformerEncoder(transformer_layer(), 2), (5, 6), encode),
    "decoder_layer": (
        lambda: nn.TransformerDecoderLayer(6, 2, 8, dropout=P, batch_first=True),
        (5, 6),
        decode,
    ),
    "block": (Block, (5, 6), None),
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 3), None),
    "lstm_both_ways": (lambda: Recurrent(nn.LSTM, 3, bidirectional=True), (4, 3), None),
    "lstm_sequence_first": (lambda: Recurrent(nn.LSTM, batch_first=False), (4, 3), None),
    "lstm_projected": (lambda: Recurrent(nn.LSTM, proj_size=2), (4, 3), None),
    "lstm_packed": (lambda: Recurrent(nn.LSTM, packed=True, bidirectional=True), (4, 3), None),
    "gru": (lambda: Recurrent(nn.GRU, 3), (4, 3), None),
    "gru_packed": (lambda: Recurrent(nn.GRU, packed=True), (4, 3), None),
    "rnn": (lambda: Recurrent(nn.RNN, bidirectional=True, bias=False), (4, 3), None),
    "rnn_packed": (lambda: Recurrent(nn.RNN, packed=True, nonlinearity="relu"), (4, 3), None),
}
in_law = pytest.mark.parametrize(("make", "shape", "call"), IN_LAW.values(), ids=IN_LAW.keys())


@in_law
def test_outputs_have_the_mean_and_variance_of_the_module_in_training_mode(make, shape, call):
    rows = 1500
    torch.manual_seed(0)
    module = make().double()
    fn, params = fb.make_functional(module, call)
    # One input many times: rows have masks of their own, here and in torch.
    x = randn(1, *shape).expand(rows, *shape)
    ours = draws(fn, params, x, 1)[0]
    module.train()
    with torch.no_grad():
        theirs = module(x) if call is None else call(module, x)
    assert theirs.std(0).max() > 1e-3
    assert_moments_equal(ours, theirs)


@in_law
def test_a_vectorised_pass_equals_a_loop_over_draws(make, shape, call):
    fn, params = functional(make, call)
    x = randn(3, *shape)
    together = draws(fn, params, x, 6, chunk_size=6)
    torch.testing.assert_close(together, draws(fn, params, x, 6, chunk_size=1))
    torch.testing.assert_close(together, draws(fn, params, x, 6, chunk_size=4))
    torch.testing.assert_close(together, draws(fn, params, x, 6))
    torch.testing.assert_close(together[:2], draws(fn, params, x, 2))
    assert (together.std(0) > 0).any()


@in_law
def test_evaluation_is_untouched_by_draws_before_it(make, shape, call):
    torch.manual_seed(0)
    module = make().double()
    fn, params = fb.make_functional(module, call)
    modes = [part.training for part in module.modules()]
    x = randn(3, *shape)
    state = torch.get_rng_state()
    draws(fn, params, x, 2)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [part.training for part in module.modules()]
    module.eval()
    torch.testing.assert_close(fn(params, x), module(x) if call is None else call(module, x))


@in_law
@pytest.mark.parametrize("chunk_size", [1, 3])
def test_gradients_through_draws_equal_those_of_each_draw_alone(make, shape, call, chunk_size):
    fn, params = functional(make, call)
    x = randn(2, *shape)
    leaves = {k: v.requires_grad_() for k, v in params.items()}
    samples = draws(fn, leaves, x, 3, chunk_size=chunk_size)
    gradients = torch.autograd.grad(samples.sin().sum(), list(leaves.values()))
    one_by_one = [draws(fn, leaves, x, 3, chunk_size=1)[i].sin().sum() for i in range(3)]
    expected = [torch.autograd.grad(one, list(leaves.values())) for one in one_by_one]
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(each[i] for each in expected))


def test_dropout_between_recurrent_layers_equals_its_formula_with_the_mask_it_used():
    """A second layer that is the identity shows what comes out of the first."""
    module = nn.RNN(3, 4, 2, nonlinearity="relu", dropout=P, batch_first=True).double()
    with torch.no_grad():
        for p in (module.weight_hh_l1, module.bias_ih_l1, module.bias_hh_l1):
            p.zero_()
        module.weight_ih_l1.copy_(torch.eye(4))
        module.bias_ih_l0.fill_(3.0)  # keeps the first layer above 0
        module.weight_hh_l0.abs_()
    fn, params = fb.make_functional(module, lambda module, x: module(x)[0])
    x = randn(6, 5, 3).abs()
    hidden = fn(params, x)
    assert (hidden > 0).all()
    got = draws(fn, params, x, 20)
    kept = got != 0
    torch.testing.assert_close(got, torch.where(kept, hidden / (1 - P), 0))
    assert_share(kept, 1 - P)
    assert_uncorrelated(kept[:, :, 1:], kept[:, :, :-1], 1 - P)  # another mask at every step


def test_the_last_recurrent_layer_and_a_single_one_are_not_dropped():
    fn, params = functional(lambda: Recurrent(nn.GRU, depth=1))
    with pytest.raises(ValueError, match="Recurrent"):
        draws(fn, params, randn(2, 4, 3))


# A linear model after dropout ---------------------------------------------------------------------


def test_a_linear_model_after_dropout_has_the_mean_and_variance_of_gal_and_ghahramani():
    """``y = W (m * x) / q`` with ``m ~ Bernoulli(q)``: mean ``W x``, variance ``(1 - q) / q sum (W x)^2``."""
    num_samples = 4000
    net = nn.Sequential(nn.Dropout(P), nn.Linear(5, 3)).double()
    fn, params = fb.make_functional(net)
    weight, bias = params["1.weight"], params["1.bias"]
    x = randn(4, 5)
    samples = draws(fn, params, x, num_samples)
    mean = x @ weight.T + bias
    variance = P / (1 - P) * (x.square() @ weight.square().T)
    assert ((samples.mean(0) - mean).abs() < 5 * (variance / num_samples).sqrt()).all()
    squares = (samples - mean) ** 2
    assert ((squares.mean(0) - variance).abs() < 5 * squares.std(0) / num_samples**0.5).all()
    # Covariance of two outputs of one row comes from the mask they share; two rows share none.
    products = (samples[:, :, 0] - mean[:, 0]) * (samples[:, :, 1] - mean[:, 1])
    covariance = P / (1 - P) * (x.square() @ (weight[0] * weight[1]))
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / num_samples**0.5).all()
    across = (samples[:, 0] - mean[0]) * (samples[:, 1] - mean[1])
    assert (across.mean(0).abs() < 5 * across.std(0) / num_samples**0.5).all()


def test_with_a_shared_mask_two_rows_covary_by_their_common_mask():
    num_samples = 4000
    net = nn.Sequential(nn.Dropout(P), nn.Linear(5, 1)).double()
    fn, params = fb.make_functional(net)
    x = randn(2, 5)
    centred = draws(fn, params, x, num_samples, shared_mask=True)[..., 0] - fn(params, x)[:, 0]
    products = centred[:, 0] * centred[:, 1]
    expected = P / (1 - P) * (x[0] * x[1] * params["1.weight"][0].square()).sum()
    assert abs(products.mean() - expected) < 5 * products.std() / num_samples**0.5


# BatchNorm and modes ------------------------------------------------------------------------------


class Normed(nn.Module):
    """A rate of its own beside BatchNorm; says whether BatchNorm or itself is in training mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.dropout = nn.BatchNorm1d(4), nn.Dropout(P), 0.5
        self.head = nn.Sequential(nn.BatchNorm1d(4, momentum=0.9), nn.Dropout1d(P))

    def forward(self, x):
        assert not self.norm.training
        assert not self.head[0].training
        return F.dropout(self.drop(self.norm(x)), self.dropout, self.training)


def test_batch_norm_keeps_its_statistics_and_its_mode():
    net = Normed().double().train()
    for part in (net.norm, net.head[0]):
        part.running_mean.copy_(randn(4))
        part.running_var.copy_(randn(4).square() + 0.5)
    fn, params = fb.make_functional(net)
    before = {k: v.clone() for k, v in fn.buffers.items()}
    x = randn(50, 4)
    got = draws(fn, params, x, 10)
    expected = (net.norm.eval()(x) / ((1 - P) * 0.5)).expand_as(got)
    kept = got != 0
    torch.testing.assert_close(got[kept], expected[kept])
    assert_share(kept, (1 - P) * 0.5)
    torch.testing.assert_close(fn.buffers, before, rtol=0, atol=0)
    torch.testing.assert_close(dict(net.named_buffers()), before, rtol=0, atol=0)
    assert net.training
    assert net.drop.training


def test_a_members_statistics_can_be_mapped_beside_dropout():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    fn, params = fb.make_functional(net)
    mean = randn(4)
    x = randn(60, 4)
    got = draws(fn, {**params, "0.running_mean": fb.Fixed(mean)}, x, 2)
    expected = (2 * (x - mean) / (1 + 1e-5) ** 0.5).expand_as(got)
    torch.testing.assert_close(got[got != 0], expected[got != 0])


def test_a_model_that_hands_on_its_rate_only_in_training_is_dropped():
    fn, params = functional(Block)
    x = randn(4, 5, 6)
    got = draws(fn, params, x, 8)
    zero_share = (got == 0).double().mean()
    assert 0.2 < zero_share < 0.4
    assert got[got != 0].unique().numel() > x.numel()  # and attention is dropped too


# Rate and where -----------------------------------------------------------------------------------


class Places(nn.Module):
    """Dropout of ones in four places, side by side: ``(N, 4, W)``."""

    def __init__(self):
        super().__init__()
        self.first = nn.Dropout(0.2)
        self.block = nn.ModuleDict({"drop": nn.Dropout(0.4), "other": nn.Dropout(0.0)})
        self.inner = ByFunction()

    def forward(self, x):
        return torch.stack([self.first(x), self.block["drop"](x), self.block["other"](x), self.inner(x)], 1)


class ByFunction(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


PLACES = ("first", "block.drop", "block.other", "inner")
RATES = (0.2, 0.4, 0.0, 0.5)
WHERE = {
    "all": (None, {0, 1, 3}),
    "name": ("first", {0}),
    "glob": ("block.*", {1}),
    "star": ("*", {0, 1, 3}),
    "list": (["first", "inner"], {0, 3}),
    "tuple": (("f*", "block.o*"), {0}),
    "predicate": (lambda path, leaf: path.startswith("b") or path == "inner", {1, 3}),
    "function": ("inner", {3}),
}


@pytest.mark.parametrize(("where", "chosen"), WHERE.values(), ids=WHERE.keys())
@pytest.mark.parametrize("rate", [None, 0.7])
def test_dropout_acts_where_it_is_told_at_the_rate_it_is_told(where, chosen, rate):
    if where in ("block.*", "*", None, ("f*", "block.o*")) or callable(where):
        # A rate given by hand replaces one of 0 too.
        chosen = chosen | {2} if rate is not None else chosen
    fn, params = functional(Places)
    got = draws(fn, params, ones(40, 50), 5, where=where, rate=rate)
    for place in range(4):
        here = got[:, :, place]
        if place not in chosen:
            assert (here == 1).all()
            continue
        used = RATES[place] if rate is None else rate
        kept = here != 0
        torch.testing.assert_close(here[kept], torch.full_like(here[kept], 1 / (1 - used)))
        assert_share(kept, 1 - used)


def test_masks_stay_the_same_when_another_place_is_left_out():
    fn, params = functional(Places)
    everywhere = draws(fn, params, ones(5, 6))
    alone = draws(fn, params, ones(5, 6), where="inner")
    assert torch.equal(everywhere[:, :, 3], alone[:, :, 3])


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=P, batch_first=True)
        self.recurrent = nn.GRU(6, 6, 2, dropout=P, batch_first=True)
        self.drop = nn.Dropout(P)

    def forward(self, x):
        a = self.attention(x, x, x, need_weights=False)[0]
        return torch.stack([a, self.recurrent(x)[0], self.drop(x)], 1)


@pytest.mark.parametrize(("where", "place"), [("attention", 0), ("recurrent", 1), ("drop", 2)])
def test_attention_and_recurrent_layers_are_chosen_by_their_own_name(where, place):
    fn, params = functional(Named)
    x = randn(3, 5, 6)
    got, plain = draws(fn, params, x, where=where), fn(params, x)
    for i in range(3):
        if i == place:
            assert not torch.isclose(got[:, :, i], plain[:, i].expand_as(got[:, :, i])).all()
        else:
            torch.testing.assert_close(got[:, :, i], plain[:, i].expand_as(got[:, :, i]))


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_rate_given_by_hand_replaces_that_of_attention(need_weights):
    module = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True).double()
    fn, params = fb.make_functional(
        module,
        lambda m, x: (
            torch.stack(m(x, x, x, average_attn_weights=False)[1:]) if need_weights else attend(m, x)
        ),
    )
    other, _ = fb.make_functional(
        nn.MultiheadAttention(6, 2, dropout=0.6, batch_first=True).double(),
        lambda m, x: (
            torch.stack(m(x, x, x, average_attn_weights=False)[1:]) if need_weights else attend(m, x)
        ),
    )
    x = randn(2, 5, 6)
    torch.testing.assert_close(draws(fn, params, x, rate=0.6), draws(other, params, x))


def test_a_rate_given_by_hand_replaces_that_between_recurrent_layers():
    fn, params = functional(lambda: Recurrent(nn.LSTM))
    other, _ = functional(lambda: Recurrent(nn.LSTM))
    other, _ = fb.make_functional(_with_rate(Recurrent(nn.LSTM).double(), 0.8))
    x = randn(2, 4, 3)
    torch.testing.assert_close(draws(fn, params, x, rate=0.8), draws(other, params, x))


def _with_rate(module, rate):
    module.rnn.dropout = rate
    return module


# Keys ---------------------------------------------------------------------------------------------


def small():
    return nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.ReLU(), nn.Linear(20, 2), nn.Dropout(0.5))


@pytest.mark.parametrize("shared_mask", [False, True])
def test_draw_i_of_a_seed_is_one_draw_however_many_are_asked_for_together(shared_mask):
    fn, params = functional(small)
    x = randn(4, 3)
    whole = draws(fn, params, x, 11, seed=5, shared_mask=shared_mask)
    for chunk_size in (1, 2, 3, 11, 50, None):
        part = draws(fn, params, x, 11, seed=5, chunk_size=chunk_size, shared_mask=shared_mask)
        torch.testing.assert_close(part, whole)
    for count in (1, 4, 10):
        part = draws(fn, params, x, count, seed=5, shared_mask=shared_mask)
        torch.testing.assert_close(part, whole[:count])
    assert not torch.allclose(draws(fn, params, x, 11, seed=6, shared_mask=shared_mask), whole)


def test_the_masks_of_draws_asked_for_by_number_are_those_of_the_whole():
    posterior = fb.Dropout()
    keys = posterior.draws(torch.arange(10), 3).effects[0].key
    some = posterior.draws(torch.tensor([7, 2]), 3).effects[0].key
    assert torch.equal(some, keys[[7, 2]])
    assert keys.unique().numel() == 10


def test_without_a_seed_the_global_seed_governs_the_masks():
    fn, params = functional(small)
    torch.manual_seed(3)
    first, second = (draws(fn, params, randn(4, 3), seed=None) for _ in range(2))
    torch.manual_seed(3)
    again = draws(fn, params, randn(4, 3), seed=None)
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, second)


def test_an_equal_model_made_again_has_equal_masks():
    (fn, params), (other, _) = functional(small), functional(small)
    torch.testing.assert_close(draws(fn, params, randn(4, 3)), draws(other, params, randn(4, 3)))


# Folded ------------------------------------------------------------------------------------------

ROW_WISE = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(P), nn.Linear(8, 2)), (5, 3)),
    "first": (lambda: nn.Sequential(nn.Dropout(P, inplace=True), nn.Linear(3, 2), nn.Dropout(0.0)), (5, 3)),
    "last": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Dropout(P)), (5, 3)),
    "alpha": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.AlphaDropout(P), nn.SELU(), nn.AlphaDropout(P)),
        (5, 3),
    ),
    "all dropped": (
        lambda: nn.Sequential(nn.AlphaDropout(1.0), nn.Linear(3, 8), nn.Dropout(P), nn.Linear(8, 2)),
        (5, 3),
    ),
    "images": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout2d(P)),
            *(nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.FeatureAlphaDropout(P), nn.MaxPool2d(2)),
            nn.Sequential(nn.Flatten(), nn.Dropout(P), nn.Linear(16, 3), nn.LogSoftmax(1)),
        ),
        (3, 2, 7, 7),
    ),
    "sequences": (
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 4, 3), nn.Dropout1d(P), nn.AvgPool1d(2), nn.LayerNorm(3), nn.Dropout(P)),
            *(nn.Linear(3, 6), nn.GELU(), nn.Dropout(P), nn.Flatten(1, 2), nn.Linear(24, 2)),
        ),
        (3, 2, 8),
    ),
    "no channels": (lambda: nn.Sequential(nn.Dropout1d(P), nn.Linear(3, 2)), (5, 3)),
}


@pytest.fixture
def folded(monkeypatch):
    """Draws that were folded into the rows, call by call; no other mechanism is chosen where it is there."""
    counts = []
    own = _engine.with_dropout

    def noting(fn, masks, source=None):
        counts.extend([source.num_draws] if isinstance(source, Folded) else [])
        return own(fn, masks, source)

    monkeypatch.setattr(_engine, "with_dropout", noting)
    monkeypatch.setattr(_engine._Tuner, "next_to_time", lambda self: self.candidates[0])
    return counts


# Some of their places only.
CHOSEN = {"images": ("3", "8.*"), "sequences": ("4", "7"), "alpha": "3", "all dropped": "2"}


@pytest.mark.parametrize("settings", [{}, {"rate": 0.6}, {"where": CHOSEN}])
@pytest.mark.parametrize("name", ROW_WISE)
def test_draws_folded_into_the_rows_equal_each_draw_alone(folded, name, settings):
    make, shape = ROW_WISE[name]
    fn, params = functional(make)
    if "where" in settings:
        settings = {"where": CHOSEN.get(name, "*")}
    params = {k: v.requires_grad_() for k, v in params.items()}
    x = randn(*shape).requires_grad_()
    expected = draws(fn, params, x, chunk_size=1, **settings)
    assert not folded
    got = draws(fn, params, x, **settings)
    assert folded == [6]
    torch.testing.assert_close(got, expected)
    weights = randn(*expected.shape, seed=1)
    inputs = [x, *params.values()]
    slopes = (torch.autograd.grad((v * weights).sum(), inputs, allow_unused=True) for v in (got, expected))
    for here, there in zip(*slopes, strict=True):
        torch.testing.assert_close(here, there)


def test_draws_of_batches_and_of_two_dropouts_are_folded_too(folded):
    make, shape = ROW_WISE["images"]
    fn, params = functional(make)
    both = fb.join(fb.Dropout(rate=0.5, where="3"), fb.Dropout(where="8*"))
    x, options = randn(*shape), {"labelled": False, "num_samples": 6, "seed": 0}
    alone = fb.predict_batches(fn, params, both, x.split(2), chunk_size=1, **options).samples
    assert not folded
    torch.testing.assert_close(fb.predict_batches(fn, params, both, x.split(2), **options).samples, alone)
    again = fb.predict_batches(fn, params, both, x.split(2), **options).samples  # places are known now
    torch.testing.assert_close(again, alone)
    assert folded == [6, 6, 6, 6]
    torch.testing.assert_close(
        fb.predict(fn, params, both, x[:1], num_samples=6, seed=0).samples, alone[:, :1]
    )


def test_draws_folded_into_the_rows_can_be_mapped_over_seeds_and_inputs(folded):
    fn, params = functional(
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(P), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2))
    )
    x = randn(2, 5, 3)

    def outputs(seed, rows, chunk_size=None):
        options = {"num_samples": 4, "seed": seed, "chunk_size": chunk_size}
        return fb.predict(fn, params, fb.Dropout(), rows, **options).samples

    expected = torch.stack([outputs(seed, x[seed], chunk_size=1) for seed in range(2)])
    assert not folded
    for _ in range(2):
        torch.testing.assert_close(torch.vmap(outputs)(torch.arange(2), x), expected)
    assert set(folded) == {4}


@pytest.fixture
def together(monkeypatch):
    """Numbers of masks that were made together, call by call."""
    counts = []
    own = _folded.dropout_masks

    def noting(keys, places):
        counts.append(len(places))
        return own(keys, places)

    monkeypatch.setattr(_folded, "dropout_masks", noting)
    monkeypatch.setattr(Recorded, "is_possible", lambda self, function: False)  # which is one call of others
    return counts


def test_masks_are_made_together_once_their_places_are_known(folded, together):
    fn, params = functional(ROW_WISE["images"][0])
    x = randn(*ROW_WISE["images"][1])
    first, second, alone = (draws(fn, params, x, chunk_size=size) for size in (None, None, 1))
    assert together == [3]  # of channels, of channels again, and of what is flat
    torch.testing.assert_close(first, alone)
    torch.testing.assert_close(second, alone)
    assert folded == [6, 6]


def test_masks_made_together_are_those_wanted_this_time(folded, together):
    """Other places are wanted by another choice, of which only a function is known, and in another dtype."""
    fn, params = functional(
        lambda: nn.Sequential(
            *(nn.Embedding(7, 4), nn.Dropout(P), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 2)),
        )
    )
    x = torch.arange(15).reshape(5, 3) % 7
    chosen = lambda kept: lambda path, leaf: path in kept  # noqa: E731
    wheres = chosen("135"), chosen("13"), chosen("35"), chosen("135")
    for where in wheres:
        for dtype in (F64, torch.float32, torch.bfloat16, F64):
            own = {name: leaf.to(dtype) for name, leaf in params.items()}
            got, alone = (draws(fn, own, x, chunk_size=size, where=where) for size in (None, 1))
            torch.testing.assert_close(got, alone)
    assert set(together) == {2, 3}
    assert len(folded) == 16


# Prepared ----------------------------------------------------------------------------------------


@pytest.fixture
def made_in_place(monkeypatch):
    """Shapes of masks that were made when a place was met, in a loop over draws."""
    shapes = []

    def noting(key, place):
        shapes.append(place.shape)
        return fb._masks.dropout_mask(key, place)

    monkeypatch.setattr(_dropout, "dropout_mask", noting)
    monkeypatch.setattr(_engine._Tuner, "next_to_time", lambda self: None)
    monkeypatch.setattr(_engine._Tuner, "fastest", lambda self: _engine.Mechanism("loop", 4))
    return shapes


@pytest.mark.parametrize("largest", [1 << 13, 40, 0])
@pytest.mark.parametrize("name", ROW_WISE)
def test_masks_are_made_before_the_model_is_called_once_their_places_are_known(
    monkeypatch, made_in_place, name, largest
):
    monkeypatch.setattr(_prepared, "_LARGEST", largest)
    make, shape = ROW_WISE[name]
    fn, params = functional(make)
    x = randn(*shape)
    with unprepared():
        draws(fn, params, x)
        made_in_place.clear()
        alone = draws(fn, params, x)
    wanted = made_in_place[:]
    for _ in range(2):
        made_in_place.clear()
        torch.testing.assert_close(draws(fn, params, x), alone)
    assert made_in_place == [shape for shape in wanted if torch.Size(shape).numel() > largest]


@contextlib.contextmanager
def unprepared():
    """All masks are made where they are met."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _engine, "prepared", lambda keys, places: [_prepared.Prepared({}, []) for _ in range(len(keys))]
        )
        yield


WIDE = 300  # numbers of one mask, more than are made by hashing


def test_masks_made_beforehand_are_the_same_inside_of_transforms():
    fn, params = functional(lambda: nn.Sequential(nn.Linear(3, WIDE), nn.Dropout(P), nn.Linear(WIDE, 2)))
    x = randn(4, 3)

    def outputs(x, seed=0):
        return draws(fn, params, x, seed=seed, chunk_size=1)

    with unprepared():
        alone, slope = outputs(x), grad(lambda x: outputs(x).square().sum())(x)
        each = torch.stack([outputs(row[None]) for row in x])
    torch.testing.assert_close(outputs(x), alone)
    torch.testing.assert_close(torch.vmap(lambda row: outputs(row[None]))(x), each)
    torch.testing.assert_close(grad(lambda x: outputs(x).square().sum())(x), slope)
    seeds = torch.vmap(lambda seed: outputs(x, seed))(torch.arange(2))
    torch.testing.assert_close(seeds[0], alone)


class InTwoDtypes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Dropout(P), nn.Dropout(0.4)

    def forward(self, x):
        return self.second(self.first(x.bfloat16()).float())


def test_masks_made_beforehand_are_those_of_each_dtype():
    fn, params = fb.make_functional(InTwoDtypes())
    x = torch.ones(4, 3)
    with unprepared():
        alone = draws(fn, params, x, chunk_size=1)
    torch.testing.assert_close(draws(fn, params, x, chunk_size=1), alone, rtol=0, atol=0)


def test_masks_made_beforehand_are_those_of_batches_and_of_this_call(made_in_place):
    """Other rows, another rate and other places; two dropouts of which each has its own masks."""
    fn, params = functional(ROW_WISE["images"][0])
    x, options = randn(*ROW_WISE["images"][1]), {"labelled": False, "num_samples": 6, "seed": 0}
    chosen = lambda kept: lambda path, leaf: path in kept  # noqa: E731
    two = fb.join(fb.Dropout(rate=0.5, where="3"), fb.Dropout(where="8*"))
    one = [fb.Dropout(where=chosen("3")), fb.Dropout(where=chosen("36")), fb.Dropout(0.6), fb.Dropout()]
    for posterior in (*one, two, *one):
        with unprepared():
            alone = fb.predict_batches(fn, params, posterior, x.split(2), chunk_size=1, **options).samples
        for _ in range(2):
            got = fb.predict_batches(fn, params, posterior, x.split(2), **options).samples
            torch.testing.assert_close(got, alone)


def test_masks_made_beforehand_are_not_those_of_a_place_that_is_not_met(made_in_place):
    """A model that drops twice for some draws and once for others."""

    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Dropout(0.5), nn.Dropout(0.2), nn.Dropout(0.5)

        def forward(self, x):
            x = self.first(x)
            if x.sum() > 20:
                x = self.second(x)
            return self.third(x)

    fn, params = functional(Sometimes)
    x = torch.ones(4, 5, dtype=F64)
    with unprepared():
        alone = draws(fn, params, x, num_samples=12, chunk_size=1)
    assert {round(draw.max().item(), 6) for draw in alone} == {4.0, 5.0}  # 1 / (0.5 * 0.5), and over 0.8
    for _ in range(3):
        torch.testing.assert_close(draws(fn, params, x, num_samples=12), alone)


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


def hooked():
    module = nn.Linear(3, 3)
    module.register_forward_hook(lambda part, args, out: out - out.mean(0))
    return module


def prepared():
    module = nn.Linear(3, 3)
    module.register_forward_pre_hook(lambda part, args: (args[0] - args[0].mean(0),))
    return module


def replaced():
    module = nn.Linear(3, 3)
    module.forward = lambda x: x - x.mean(0)
    return module


MIXING = {
    "statistics of the batch": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "softmax over rows": lambda: nn.Softmax(0),
    "softmax over rows, from the end": lambda: nn.Softmax(-2),
    "a module of one's own": Mixing,
    "a hook": hooked,
    "a hook before": prepared,
    "rows as numbers": lambda: nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1)), nn.Softmax(-1)),
    "a method of one's own": replaced,
    "weights that a norm divides": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_a_model_may_mix_are_those_of_one_draw(folded, name):
    for fn, params in (
        functional(nn.Sequential(nn.Linear(3, 3), nn.Dropout(P), MIXING[name]())),
        functional(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(P), MIXING[name]()))),
    ):
        x = randn(5, 3)
        torch.testing.assert_close(draws(fn, params, x), draws(fn, params, x, chunk_size=1))
    assert not folded


def test_inputs_without_an_axis_of_rows_and_calls_of_ones_own_are_not_folded(folded):
    fn, params = functional(nn.Sequential(nn.Linear(3, 3), nn.Dropout(P), nn.Softmax(-1)))
    torch.testing.assert_close(draws(fn, params, randn(3)), draws(fn, params, randn(3), chunk_size=1))
    fn, params = functional(
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(P)), lambda module, x: module(x).cumsum(0)
    )
    torch.testing.assert_close(draws(fn, params, randn(5, 3)), draws(fn, params, randn(5, 3), chunk_size=1))
    assert not folded


def test_hooks_of_all_modules_are_asked_for_at_every_call(folded):
    fn, params = functional(nn.Sequential(nn.Linear(3, 3), nn.Dropout(P), nn.Linear(3, 2)))
    x = randn(4, 3)
    draws(fn, params, x)
    assert folded == [6]
    hook = nn.modules.module.register_module_forward_hook(
        lambda part, args, out: out - out.mean(0) if isinstance(part, nn.Linear) else None
    )
    try:
        torch.testing.assert_close(draws(fn, params, x), draws(fn, params, x, chunk_size=1))
    finally:
        hook.remove()
    assert folded == [6]


def test_an_image_that_is_no_batch_is_evaluated_as_it_is(folded):
    """Its first axis is that of the channels, which a convolution mixes."""
    fn, params = functional(lambda: nn.Sequential(nn.Dropout(P), nn.Conv2d(2, 3, 3)))
    x = randn(2, 5, 5)
    for _ in range(2):
        torch.testing.assert_close(draws(fn, params, x), draws(fn, params, x, chunk_size=1))
    assert folded == [6]  # tried once, and refused by the convolution


@pytest.mark.parametrize("shared_mask", [False, True])
def test_the_part_before_the_first_dropout_is_evaluated_without_draws(shared_mask):
    seen = []

    def look(module, args, out):
        seen.append(torch._C._functorch.is_batchedtensor(out))

    trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    trunk.register_forward_hook(look)
    head = nn.Linear(8, 2)
    after = []
    head.register_forward_hook(
        lambda module, args, out: after.append(torch._C._functorch.is_batchedtensor(out))
    )
    fn, params = functional(nn.Sequential(trunk, nn.Dropout(0.5), head))
    x = randn(5, 4)
    draws(fn, params, x, 64, chunk_size=64, shared_mask=shared_mask)
    assert not any(seen)
    assert any(after)  # whereas the head has a draw axis
    assert len(seen) < 8  # some calls to find out, one that counts; not 64


# Shared masks -------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Dropout of tokens in a layout of one's choice; inputs ``(N, T)``."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.drop, self.embed = layout, nn.Dropout(0.5), nn.Linear(1, 6)

    def forward(self, x):
        rows, length = x.shape
        h = self.embed(x[..., None])  # (N, T, D)
        if self.layout == "rows_first":
            return self.drop(h)
        if self.layout == "sequence_first":
            return self.drop(h.transpose(0, 1)).transpose(0, 1)
        if self.layout == "channels_first":
            return self.drop(h.transpose(1, 2)).transpose(1, 2)
        if self.layout == "rows_last":
            return self.drop(h.permute(1, 2, 0)).permute(2, 0, 1)
        if self.layout == "flat":
            return self.drop(h.flatten(0, 1)).unflatten(0, (rows, length))
        if self.layout == "heads_folded":
            heads = h.unflatten(-1, (2, 3)).transpose(1, 2).flatten(0, 1)  # (N * H, T, D / H)
            return self.drop(heads).unflatten(0, (rows, 2)).transpose(1, 2).flatten(2)
        if self.layout == "positions":  # what is dropped has no rows
            return h * self.drop(torch.ones(length, 6, dtype=h.dtype))
        assert self.layout == "flat_sequence_first"
        flat = self.drop(h.transpose(0, 1).flatten(0, 1))
        return flat.unflatten(0, (length, rows)).transpose(0, 1)


def sequence_first(module, x):
    return module(x.transpose(0, 1)).transpose(0, 1)


SHARED = {
    "mlp": (small, (3,), None),
    "channels": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.5), nn.Conv2d(4, 2, 1), nn.Dropout(0.5)),
        (2, 4, 4),
        None,
    ),
    "alpha": (lambda: nn.Sequential(nn.Linear(3, 6), nn.AlphaDropout(0.5)), (3,), None),
    "attention": (lambda: nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True), (5, 6), attend),
    "attention_weights": (
        lambda: nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True),
        (5, 6),
        with_weights,
    ),
    "attention_sequence_first": (
        lambda: nn.MultiheadAttention(6, 3, dropout=0.5),
        (5, 6),
        lambda m, x: m(*(x.transpose(0, 1),) * 3)[0].transpose(0, 1),
    ),
    "encoder": (lambda: nn.TransformerEncoder(transformer_layer(), 2), (5, 6), None),
    "encoder_sequence_first": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.5),
        (5, 6),
        sequence_first,
    ),
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), (4, 3), None),
    "lstm_sequence_first": (lambda: Recurrent(nn.LSTM, batch_first=False), (4, 3), None),
    **{
        f"tokens_{layout}": (functools.partial(Tokens, layout), (5,), None)
        for layout in (
            "rows_first",
            "sequence_first",
            "channels_first",
            "rows_last",
            "flat",
            "heads_folded",
            "positions",
            "flat_sequence_first",
        )
    },
}
shared = pytest.mark.parametrize(("make", "shape", "call"), SHARED.values(), ids=SHARED.keys())


@shared
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6])
def test_with_a_shared_mask_a_row_does_not_depend_on_the_others(make, shape, call, rows):
    """Among the numbers of rows is the length of the sequence, where axes cannot be told by size."""
    fn, params = functional(make, call)
    x = randn(rows, *shape)
    whole = draws(fn, params, x, 4, chunk_size=4, shared_mask=True)
    for i in range(rows):
        alone = draws(fn, params, x[i : i + 1], 4, chunk_size=4, shared_mask=True)
        torch.testing.assert_close(whole[:, i : i + 1], alone)
    assert (whole.std(0) > 0).any()


@shared
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_with_a_shared_mask_permuted_rows_give_permuted_outputs(make, shape, call, chunk_size):
    fn, params = functional(make, call)
    x, order = randn(5, *shape), torch.tensor([3, 0, 4, 1, 2])
    whole = draws(fn, params, x, 4, chunk_size=chunk_size, shared_mask=True)
    turned = draws(fn, params, x[order], 4, chunk_size=chunk_size, shared_mask=True)
    torch.testing.assert_close(turned, whole[:, order])


@shared
def test_equal_rows_have_equal_outputs_if_and_only_if_masks_are_shared(make, shape, call):
    fn, params = functional(make, call)
    x = randn(1, *shape).expand(6, *shape)
    same = draws(fn, params, x, 4, shared_mask=True)
    torch.testing.assert_close(same, same[:, :1].expand_as(same))
    if "positions" not in getattr(make, "args", ()):
        other = draws(fn, params, x, 4)
        assert not torch.allclose(other, other[:, :1].expand_as(other))


def test_a_shared_mask_has_the_rate_and_is_new_for_every_draw():
    fn, params = functional(nn.Dropout(P))
    got = draws(fn, params, ones(3, 200), 40, shared_mask=True)
    kept = got[:, 0] != 0
    assert_share(kept, 1 - P)
    assert_uncorrelated(kept[1:], kept[:-1], 1 - P)


def test_a_shared_mask_goes_through_batches_unchanged():
    fn, params = functional(small)
    x = randn(7, 3)
    whole = draws(fn, params, x, 5, shared_mask=True)
    parts = fb.predict_batches(
        fn,
        params,
        fb.Dropout(shared_mask=True),
        [x[:3], x[3:]],
        num_samples=5,
        seed=0,
        labelled=False,
    ).samples
    torch.testing.assert_close(parts, whole)


class Ragged(nn.Module):
    """Sequences of different lengths, packed."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, 2, dropout=0.5, batch_first=True)

    def forward(self, x):
        packed = rnn.pack_padded_sequence(x["values"], x["lengths"], batch_first=True, enforce_sorted=False)
        return rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=5)[0]


@pytest.mark.parametrize("lengths", [[5, 5, 5], [5, 3, 4], [2, 5, 5], [3, 4, 2]])
def test_a_shared_mask_of_packed_sequences_is_right_or_refused(lengths):
    fn, params = functional(Ragged)
    x = {"values": randn(3, 5, 3), "lengths": torch.tensor(lengths)}

    def of(rows):
        return draws(fn, params, {k: v[rows] for k, v in x.items()}, 3, shared_mask=True)

    try:
        whole = of(slice(None))
    except ValueError as error:
        assert "`Dropout(shared_mask=True)`" in str(error)  # noqa: PT017 - either is right
    else:
        for i in range(3):
            torch.testing.assert_close(whole[:, i : i + 1], of(slice(i, i + 1)))


def test_a_shared_mask_takes_inputs_of_any_structure():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(x["a"]) + self.drop(x["b"].float())

    fn, params = functional(Two)
    x = {"a": randn(4, 6), "b": torch.arange(24).reshape(4, 6)}
    whole = draws(fn, params, x, shared_mask=True)
    alone = draws(fn, params, {k: v[2:3] for k, v in x.items()}, shared_mask=True)
    torch.testing.assert_close(whole[:, 2:3], alone)


# What is refused ----------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x)


class Never(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.drop = nn.Linear(3, 2), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.head(x))


@pytest.mark.parametrize("settings", [{}, {"rate": 0.5}, {"shared_mask": True}, {"where": "head"}], ids=str)
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_a_model_without_dropout_is_refused_by_name(settings, chunk_size):
    fn, params = functional(Plain)
    with pytest.raises(ValueError, match=r"`Dropout\(.*`Plain` has none.*`nn\.Dropout`"):
        draws(fn, params, randn(4, 3), chunk_size=chunk_size, **settings)


def test_a_plain_function_without_dropout_is_refused_by_name():
    def straight(params, x):
        return x * 2

    with pytest.raises(ValueError, match=r"`straight` has none"):
        draws(straight, {}, randn(4, 3))


def test_a_model_whose_rates_are_all_0_is_refused_by_name_and_place():
    fn, params = functional(Never)
    with pytest.raises(ValueError, match=r"drops nothing in `Never`.*drop \(rate 0\).*positive `rate`"):
        draws(fn, params, randn(4, 3))
    assert (draws(fn, params, randn(40, 3), rate=0.5) == 0).any()


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_where_that_matches_nothing_is_refused_with_the_places_there_are(chunk_size):
    fn, params = functional(Places)
    with pytest.raises(
        ValueError, match=r"where='last'.*`Places`.*first \(rate 0\.2\), block\.drop \(rate 0\.4\)"
    ):
        draws(fn, params, ones(4, 3), where="last", chunk_size=chunk_size)


def test_a_where_for_a_plain_function_is_refused():
    with pytest.raises(TypeError, match=r"`Dropout\(where='head'\)`.*`make_functional`.*plain function"):
        draws(lambda params, x: F.dropout(x), {}, randn(4, 3), where="head")


def test_a_where_reaches_a_model_through_a_function_of_the_users():
    fn, params = functional(Places)
    x = ones(6, 5)
    wrapped = draws(lambda tree, x: fn(tree["net"], x) * 1, {"net": params}, x, where="first")
    torch.testing.assert_close(wrapped, draws(fn, params, x, where="first"))


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_rate_outside_of_0_and_1_is_refused(rate):
    with pytest.raises(ValueError, match=r"`Dropout\(rate=\.\.\.\)` should be inside \(0, 1\), got"):
        fb.Dropout(rate=rate)


def test_a_shared_mask_for_inputs_that_disagree_on_their_rows_is_refused():
    fn, params = functional(nn.Dropout(0.5), lambda module, x: module(x["a"]))
    with pytest.raises(ValueError, match=r"`Dropout\(shared_mask=True\)`.*share their first axis"):
        draws(fn, params, {"a": randn(4, 3), "b": randn(2)}, shared_mask=True)


def test_a_shared_mask_where_two_axes_grow_with_the_rows_is_refused():
    fn, params = functional(nn.Dropout(0.5), lambda module, x: module(x @ x.T))
    with pytest.raises(ValueError, match=r"`Dropout\(shared_mask=True\)` should find one axis of the rows"):
        draws(fn, params, randn(4, 3), shared_mask=True)


def test_dropout_has_no_parameters_to_sample():
    with pytest.raises(TypeError, match="Dropout"):
        fb.Dropout().sample(3)


def test_an_exception_leaves_the_next_draws_right():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            h = self.drop(x)
            if len(x) == 1:
                raise ZeroDivisionError("one row")
            return h

    fn, params = functional(Picky)
    expected = draws(fn, params, ones(3, 4), where="drop")
    with pytest.raises(ZeroDivisionError):
        draws(fn, params, ones(1, 4), where="drop")
    assert torch.equal(draws(fn, params, ones(3, 4), where="drop"), expected)


def test_a_gradient_with_respect_to_the_input_flows_through_the_mask():
    fn, params = functional(nn.Dropout(0.5))
    x = ones(3, 4)

    def total(x):
        return draws(fn, params, x, 5, chunk_size=1).sum()

    torch.testing.assert_close(grad(total)(x), draws(fn, params, x, 5).sum(0))
