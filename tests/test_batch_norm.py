import copy
import functools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes._batch_norm import refresh_batch_norm

F64 = torch.float64
N = 12


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=F64)


class ConvNet(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=momentum)
        self.drop, self.dense = nn.Dropout(0.5), nn.Linear(27, 4)
        self.last, self.head = nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 2)

    def forward(self, x):
        h = self.drop(self.norm(self.conv(x)).relu().flatten(1))
        return self.head(self.last(self.dense(h)))


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.dense, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.dense(self.norm(x)).tanh())


class Branching(nn.Module):
    """``vmap`` cannot look at numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(4, 2)

    def forward(self, x):
        x = self.head(x)
        return self.norm(x if float(x.sum()) > -99.0 else -x)


class Counting(nn.Module):
    """A buffer that training writes into, and is no statistic."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("largest", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.largest = torch.maximum(self.largest, x.abs().amax(0))
        return self.norm(x)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = (
            nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True),
            nn.BatchNorm1d(4),
        )

    def forward(self, x):
        h = x.unflatten(1, (2, 4))
        return self.norm(self.attention(h, h, h, need_weights=False)[0].mean(1))


def dense(**options):
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options), nn.ReLU(), nn.Linear(5, 2))


MODELS = {
    "conv": (ConvNet, (1, 5, 5)),
    "conv_average": (functools.partial(ConvNet, momentum=None), (1, 5, 5)),
    "dense": (dense, (4,)),
    "momentum_zero": (functools.partial(dense, momentum=0.0), (4,)),
    "not_affine": (functools.partial(dense, affine=False), (4,)),
    "shared": (Shared, (4,)),
    "attention": (Attentive, (8,)),
}


def without_dropout(module):
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    return module


def ensemble_of(make, num=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        modules = [make().double() for _ in range(num)]
    fn, members = fb.make_functional(modules[0])[0], [dict(m.named_parameters()) for m in modules]
    stacked = {k: torch.stack([m[k].detach() for m in members]) for k in members[0]}
    return fn, fb.Ensemble(stacked), modules


def updated_by_torch(module, batches):
    module = without_dropout(copy.deepcopy(module))
    update_bn(batches, module)
    return {k: b for k, b in module.named_buffers() if "running" in k or "tracked" in k}


def batches_of(x, size):
    return [(part, torch.zeros(len(part))) for part in x.split(size)]


def refresh(fn, ensemble, data, params=None, **options):
    return refresh_batch_norm(fn, params, ensemble, data, **options)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_statistics_are_those_that_torch_finds_for_each_module(model, chunk_size):
    make, shape = MODELS[model]
    fn, ensemble, modules = ensemble_of(make)
    x = randn(N, *shape)
    for data, size in ((batches_of(x, 4), None), ((x, torch.zeros(N)), 4)):
        got = refresh(fn, ensemble, data, batch_size=size, chunk_size=chunk_size).members
        for k, module in enumerate(modules):
            expected = updated_by_torch(module, batches_of(x, 4))
            assert got.keys() == ensemble.members.keys() | expected.keys()
            for name, value in expected.items():
                if model == "shared" and "tracked" in name:
                    value = torch.tensor(3)  # batches, not calls
                torch.testing.assert_close(got[name].tensor[k], value)


def test_refreshed_members_predict_what_modules_updated_by_torch_do():
    fn, ensemble, modules = ensemble_of(ConvNet)
    x, new = randn(N, 1, 5, 5), randn(3, 1, 5, 5, seed=1)
    refreshed = refresh(fn, ensemble, (x, torch.zeros(N)), batch_size=6)
    got = fb.predict(fn, None, refreshed, new).samples
    for k, module in enumerate(modules):
        update_bn(batches_of(x, 6), without_dropout(module))
        torch.testing.assert_close(got[k], module.eval()(new).detach())


def test_batches_weigh_what_rows_they_have():
    fn, ensemble, _ = ensemble_of(lambda: nn.Sequential(nn.BatchNorm1d(4)))
    x = randn(N, 4)
    got = refresh(fn, ensemble, (x, torch.zeros(N)), batch_size=5).members
    parts = x.split(5)
    rows = torch.tensor([5.0, 5.0, 2.0], dtype=F64)[:, None]
    mean = (rows * torch.stack([p.mean(0) for p in parts])).sum(0) / N
    var = (rows * torch.stack([p.var(0) for p in parts])).sum(0) / N
    for k in range(3):
        torch.testing.assert_close(got["0.running_mean"].tensor[k], mean)
        torch.testing.assert_close(got["0.running_var"].tensor[k], var)
    torch.testing.assert_close(mean, x.mean(0))
    assert got["0.num_batches_tracked"].tensor.tolist() == [3, 3, 3]


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_a_last_row_that_would_be_alone_joins_the_batch_before(chunk_size):
    fn, ensemble, _ = ensemble_of(ConvNet)
    x = randn(11, 1, 5, 5)
    got = refresh(fn, ensemble, (x, torch.zeros(11)), batch_size=5, chunk_size=chunk_size)
    expected = refresh(fn, ensemble, [(part, torch.zeros(len(part))) for part in x.split([5, 6])])
    assert_equal(got, expected)
    assert got.members["last.num_batches_tracked"].tensor.tolist() == [2, 2, 2]


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_of_a_mixture_of_ensembles_each_is_refreshed(weights):
    fn, ensemble, _ = ensemble_of(ConvNet)
    data = (randn(N, 1, 5, 5), torch.zeros(N))
    params = {k: v[0] for k, v in ensemble.members.items() if not isinstance(v, fb.Fixed)}
    parts = [
        fb.Ensemble({k: v[:2] for k, v in ensemble.members.items() if k.startswith(name)})
        for name in ("dense", "head")
    ]
    mixed = fb.mixture(*parts, weights=weights)
    got = refresh(fn, mixed, data, params=params)
    assert isinstance(got, fb.Mixture)
    assert got.has_equal_weights == mixed.has_equal_weights
    torch.testing.assert_close(got.weights, mixed.weights)
    for part, refreshed in zip(parts, got.components, strict=True):
        assert_equal(refreshed, refresh(fn, part, data, params=params))


def test_what_to_ensemble_makes_of_different_leaves_is_refreshed():
    fn, ensemble, _ = ensemble_of(ConvNet)
    params = {k: v[0] for k, v in ensemble.members.items() if not isinstance(v, fb.Fixed)}
    parts = [fb.Point({k: params[k]}) for k in ("dense.weight", "head.weight")]
    draws = fb.to_ensemble(fb.mixture(*parts), 6, seed=0)
    got = refresh(fn, draws, (randn(N, 1, 5, 5), torch.zeros(N)), params=params)
    assert all("norm.running_mean" in part.members for part in got.components)


def test_statistics_that_members_had_before_do_not_matter():
    fn, ensemble, _ = ensemble_of(ConvNet)
    data = (randn(N, 1, 5, 5), torch.zeros(N))
    expected = refresh(fn, ensemble, data, batch_size=4)
    again = refresh(fn, refresh(fn, ensemble, (data[0] + 3, data[1])), data, batch_size=4)
    assert_equal(again, expected)


def assert_equal(a, b):
    assert a.members.keys() == b.members.keys()
    for x, y in zip(tensors(a), tensors(b), strict=True):
        torch.testing.assert_close(x, y)


def tensors(tree):
    return torch.utils._pytree.tree_leaves(tree)


def test_nothing_is_changed_and_every_call_gives_the_same():
    fn, ensemble, modules = ensemble_of(ConvNet)
    data = TensorDataset(randn(N, 1, 5, 5), torch.zeros(N))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    before = [copy.deepcopy(fn.buffers), copy.deepcopy(ensemble)]
    state = torch.get_rng_state()
    first, second = (refresh(fn, ensemble, loader) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(tensors(before), tensors([fn.buffers, ensemble]), strict=True):
        assert torch.equal(a, b)
    assert not any(t.requires_grad for t in tensors(first))
    assert modules[0].training


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_weights_and_leaves_of_members_are_kept(chunk_size):
    fn, ensemble, _ = ensemble_of(ConvNet)
    weighted = fb.Ensemble(ensemble.members, torch.tensor([0.2, 0.3, 0.5], dtype=F64))
    got = refresh(fn, weighted, (randn(N, 1, 5, 5), torch.zeros(N)), chunk_size=chunk_size)
    assert torch.equal(got.weights, weighted.weights)
    assert not got.has_equal_weights
    for name, leaf in weighted.members.items():
        assert got.members[name] is leaf
    plain = refresh(fn, ensemble, (randn(N, 1, 5, 5), torch.zeros(N)), chunk_size=chunk_size)
    assert plain.has_equal_weights


def test_leaves_that_members_do_not_cover_come_from_params():
    fn, ensemble, modules = ensemble_of(ConvNet)
    x = randn(N, 1, 5, 5)
    params = {k: v[0] for k, v in ensemble.members.items() if not k.startswith("dense")}
    partial = fb.Ensemble({k: v for k, v in ensemble.members.items() if k.startswith("dense")})
    stale = {**params, "norm.running_mean": fb.Fixed(torch.full((3,), 5.0, dtype=F64))}
    expected = []
    for k in range(3):
        module = copy.deepcopy(modules[0])
        module.dense.load_state_dict(modules[k].dense.state_dict())
        expected.append(updated_by_torch(module, batches_of(x, 4)))
    for given in (params, stale):
        got = refresh(fn, partial, batches_of(x, 4), params=given).members
        assert "conv.weight" not in got
        for name in expected[0]:
            torch.testing.assert_close(got[name].tensor, torch.stack([e[name] for e in expected]))


@pytest.mark.parametrize("track", [True, False])
def test_instance_norm_that_tracks_statistics_counts(track):
    fn, ensemble, modules = ensemble_of(
        lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.InstanceNorm1d(2, track_running_stats=track))
    )
    x = randn(N, 1, 6)
    got = refresh(fn, ensemble, batches_of(x, 4))
    if not track:
        assert got is ensemble
        return
    h = torch.stack([module[0](x) for module in modules]).detach()  # (K, N, C, L)
    torch.testing.assert_close(got.members["1.running_mean"].tensor, h.mean((1, 3)))
    torch.testing.assert_close(got.members["1.running_var"].tensor, h.var(3).mean(1))


def test_only_statistics_of_normalisation_are_averaged():
    fn, ensemble, _ = ensemble_of(Counting)
    got = refresh(fn, ensemble, batches_of(randn(N, 4), 4)).members
    assert {k for k in got if isinstance(got[k], fb.Fixed)} == {
        f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


class Frozen(nn.Module):
    """The second layer is told not to look at the batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        other = self.other
        h = F.batch_norm(x, other.running_mean, other.running_var, other.weight, other.bias, training=False)
        return self.norm(h)


def test_a_layer_that_does_not_look_at_the_batch_keeps_its_statistics():
    fn, ensemble, _ = ensemble_of(Frozen)
    got = refresh(fn, ensemble, batches_of(randn(N, 4), 4)).members
    assert "norm.running_mean" in got
    assert "other.running_mean" not in got


def test_a_model_without_batch_norm_leaves_the_ensemble_as_it_is():
    fn, ensemble, _ = ensemble_of(lambda: nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2)))
    assert refresh(fn, ensemble, (randn(N, 4), torch.zeros(N))) is ensemble
    fn, ensemble, _ = ensemble_of(lambda: dense(track_running_stats=False))
    assert refresh(fn, ensemble, (randn(N, 4), torch.zeros(N))) is ensemble


def test_a_function_that_wraps_the_model_and_inputs_of_any_kind_are_fine():
    fn, ensemble, _ = ensemble_of(ConvNet)
    x = randn(N, 1, 5, 5)
    expected = refresh(fn, ensemble, (x, torch.zeros(N)), batch_size=4)

    def wrapped(params, x):
        return fn(params["net"], x["image"] - x["offset"]).relu()

    inputs = {"image": x + 1, "offset": torch.ones(N, 1, 1, 1, dtype=F64)}
    got = refresh(wrapped, fb.Ensemble({"net": ensemble.members}), (inputs, torch.zeros(N)), batch_size=4)
    assert_equal(fb.Ensemble(got.members["net"]), expected)


def test_what_vmap_cannot_take_is_looped_over_with_one_warning():
    fn, ensemble, modules = ensemble_of(Branching)
    x = randn(N, 4)
    with pytest.warns(UserWarning, match="one by one, because `vmap` cannot take the model: ") as caught:
        got = refresh(fn, ensemble, batches_of(x, 4)).members
    assert [warning.filename for warning in caught] == [__file__]
    for k, module in enumerate(modules):
        for name, value in updated_by_torch(module, batches_of(x, 4)).items():
            torch.testing.assert_close(got[name].tensor[k], value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refresh(fn, ensemble, batches_of(x, 4), chunk_size=1)


def test_draws_of_swag_are_refreshed():
    fn, params = fb.make_functional(ConvNet().double())
    x, y = randn(N, 1, 5, 5), torch.arange(N) % 2
    sgd = functools.partial(torch.optim.SGD, lr=0.05)
    categorical = fb.likelihoods.Categorical()
    q = fb.swag.fit(fn, params, (x, y), categorical, optimizer=sgd, num_epochs=5, batch_size=4, seed=0)
    draws = fb.Ensemble(q.sample(4, seed=0))
    refreshed = refresh(fn, draws, (x, y))
    means = refreshed.members["norm.running_mean"].tensor
    assert means.shape == (4, 3)
    assert not torch.allclose(means[0], means[1])
    one = {k: v if isinstance(v, fb.Fixed) else v[2] for k, v in draws.members.items()}
    h = F.conv2d(x, one["conv.weight"], one["conv.bias"])
    torch.testing.assert_close(means[2], h.mean((0, 2, 3)))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda fn, e, d: refresh(fn, fb.Point(e.member(0)), d), TypeError, "Write `to_ensemble(posterior"),
        (
            lambda fn, e, d: refresh(fn, fb.mixture(e, fb.Point(e.member(0))), d),
            TypeError,
            "got a Mixture with a Point",
        ),
        (
            lambda fn, e, d: refresh(fn, e, [d, (d[0][:1], d[1][:1])]),
            ValueError,
            "Write `drop_last=True`",
        ),
        (lambda fn, e, d: refresh(fn, e, d, batch_size=1), ValueError, "another batch size"),
        (lambda fn, e, d: refresh(ConvNet(), e, d), TypeError, "got an nn.Module"),
        (lambda fn, e, d: refresh(fn, e, iter([d])), TypeError, "should be a re-iterable"),
        (lambda fn, e, d: refresh(fn, e, []), ValueError, "`refresh_batch_norm(data=...)`"),
        (
            lambda fn, e, d: refresh(fn, e, d, batch_size=0),
            ValueError,
            "(batch_size=...)` should be",
        ),
        (
            lambda fn, e, d: refresh(fn, e, d, chunk_size=0),
            ValueError,
            "(chunk_size=...)` should be",
        ),
        (
            lambda fn, e, d: refresh(fn, e, (d[0] * float("nan"), d[1])),
            RuntimeError,
            "The statistics 'last.running_mean' in `refresh_batch_norm` are not finite",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    fn, ensemble, _ = ensemble_of(ConvNet)
    with pytest.raises(error, match=re.escape(words)):
        call(fn, ensemble, (randn(N, 1, 5, 5), torch.zeros(N)))
