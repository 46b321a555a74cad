import functools
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

import funcbayes as fb
from funcbayes import _mapping, training
from funcbayes._functorch import physical
from funcbayes._intercept import Batching
from funcbayes._mapping import equal_parts
from funcbayes.ensemble import member_seeds
from funcbayes.training import _several, _shared_movers
from funcbayes.training._options import Options
from funcbayes.training._shared_movers import _ELEMENTWISE, shared_movers

F64 = torch.float64
K = 3


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class ConvNet(nn.Module):
    def __init__(self, momentum=0.1):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3, momentum=momentum)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((-1, -2)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.lstm(x)[0][:, -1]))


class Branching(nn.Module):
    """``vmap`` cannot look at numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(x)
        return self.head(x) if float(x.detach().sum()) > -99.0 else x


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(x + torch.randn_like(x)) if self.training else self.head(x)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
        # The bias of keys has no effect, so its gradient is rounding, which Adam makes into steps.
        self.encoder.self_attn = nn.MultiheadAttention(4, 2, dropout=0.2, bias=False, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        tokens = (x.abs() * 4).long() % 7
        return self.head(self.encoder(self.embed(tokens)).mean(1))


def lenet():
    return nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2))


class Written(nn.Module):
    """Writes into what a convolution gave through a view of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(27, 2)

    def forward(self, x):
        h = self.conv(x)
        h.view(h.shape[0], -1).mul_(2.0)
        return self.head(h.relu().flatten(1))


class WrittenLater(Written):
    """Writes into what a convolution gave after a view of it was made."""

    def forward(self, x):
        h = self.conv(x)
        flat = h.flatten(1)
        F.relu(h, inplace=True)
        return self.head(flat)


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def dropped():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.ReLU(), nn.Linear(6, 2))


MODELS = {
    "mlp": (mlp, (4,)),
    "dropout": (dropped, (4,)),
    "conv": (ConvNet, (1, 5, 5)),
    "lenet": (lenet, (1, 5, 5)),
    "written_through_view": (Written, (1, 5, 5)),
    "written_after_view": (WrittenLater, (1, 5, 5)),
    "transformer": (Attentive, (6,)),
    "conv_average": (functools.partial(ConvNet, momentum=None), (1, 5, 5)),
    "lstm": (Recurrent, (4, 2)),
}
LOOPED = {"branching": (Branching, (4,)), "noise": (Noisy, (4,))}
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": ADAM,
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-2),
    "lbfgs": functools.partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
    "adafactor": torch.optim.Adafactor,
}


def classification(shape, n=13):
    g = seeded(0)
    return torch.randn(n, *shape, generator=g, dtype=F64), torch.randint(0, 2, (n,), generator=g)


def start(make, num_members=K):
    fn, members = fb.ensemble.init(lambda: make().double(), num_members, seed=1)
    return fn, members


def tensor_of(leaf):
    return leaf.tensor if isinstance(leaf, fb.Fixed) else leaf


def member(members, k):
    return {
        name: fb.Fixed(leaf.tensor[k]) if isinstance(leaf, fb.Fixed) else leaf[k]
        for name, leaf in members.items()
    }


def fit(fn, members, data, likelihood=None, **options):
    options = {"optimizer": ADAM, "num_epochs": 2, "seed": 7, **options}
    return fb.ensemble.fit(fn, members, data, likelihood or fb.likelihoods.Categorical(), **options).members


def assert_each_is_as_if_alone(fn, members, data, *, only_together=None, **options):
    """Compare every member with `training.fit` of that member and its own seed."""
    together = fit(fn, members, data, **options, **(only_together or {}))
    options = {"optimizer": ADAM, "num_epochs": 2, **options, "likelihood": fb.likelihoods.Categorical()}
    for k, seed in enumerate(member_seeds(7, len(next(iter(members.values()))))):
        alone = training.fit(fn, member(members, k), data, seed=seed, **options)
        assert set(alone) == set(together)
        for name, leaf in alone.items():
            assert isinstance(leaf, fb.Fixed) == isinstance(together[name], fb.Fixed)
            got = tensor_of(together[name])[k]
            torch.testing.assert_close(got, tensor_of(leaf), rtol=1e-7, atol=1e-10)


def with_optimizers():
    """Every model with two optimizers, and some with all."""
    return [(m, o) for m in MODELS for o in OPTIMIZERS if o in ("sgd", "adam") or m in ("mlp", "conv")]


@pytest.mark.parametrize(("model", "optimizer"), with_optimizers())
def test_each_member_is_trained_as_if_alone(model, optimizer):
    make, shape = MODELS[model]
    optimizer = OPTIMIZERS[optimizer]
    fn, members = start(make)
    halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    assert_each_is_as_if_alone(
        fn,
        members,
        classification(shape),
        batch_size=5,
        optimizer=optimizer,
        scheduler=halving,
        prior_precision=1.0,
        max_grad_norm=0.3,
    )


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_chunks_of_members_change_nothing(model, chunk_size):
    make, shape = MODELS[model]
    fn, members = start(make)
    chunked = {"only_together": {"chunk_size": chunk_size}}
    assert_each_is_as_if_alone(fn, members, classification(shape), batch_size=5, **chunked)


@pytest.mark.parametrize("model", MODELS)
def test_a_loader_gives_each_member_its_own_batches(model):
    make, shape = MODELS[model]
    fn, members = start(make)
    loader = DataLoader(TensorDataset(*classification(shape)), batch_size=5, shuffle=True)
    state = torch.get_rng_state()
    assert_each_is_as_if_alone(fn, members, loader, scheduler=exponential, scheduler_interval="step")
    assert torch.equal(torch.get_rng_state(), state)


def exponential(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def test_a_loader_with_workers_and_a_generator_is_the_one_without_workers():
    fn, members = start(mlp, 2)
    dataset = TensorDataset(*classification((4,)))
    options = {"batch_size": 5, "shuffle": True}
    plain = fit(fn, members, DataLoader(dataset, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking a process that has threads
        workers = DataLoader(dataset, num_workers=1, **options)
        got = fit(fn, members, workers)
    for name in plain:
        torch.testing.assert_close(got[name], plain[name])
    generator = seeded(3)
    before = generator.get_state()
    assert_each_is_as_if_alone(fn, members, DataLoader(dataset, generator=generator, **options))
    assert torch.equal(generator.get_state(), before)


def test_workers_that_persist_do_not_remember_an_earlier_fit():
    fn, members = start(mlp, 2)
    loader = DataLoader(
        TensorDataset(*classification((4,))), 5, shuffle=True, num_workers=1, persistent_workers=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking a process that has threads
        first, second = (fit(fn, members, loader, share_batches=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def padded(rows):
    """Pad with zeros to the length of the longest row of the batch."""
    longest = max(int(length) for _, length, _ in rows)
    x = torch.stack([x[:longest] for x, _, _ in rows])
    return x, torch.stack([y for _, _, y in rows])


def test_batches_of_other_shapes_for_each_member_are_fine():
    fn, members = fb.ensemble.init(lambda: nn.Linear(1, 2).double(), K, seed=1)
    lengths = torch.arange(1, 11)
    x, y = (
        torch.randn(10, 10, 1, generator=seeded(0), dtype=F64),
        torch.randint(0, 2, (10,), generator=seeded(1)),
    )

    def pooled(params, x):
        return fn(params, x).sum(1)

    loader = DataLoader(TensorDataset(x, lengths, y), batch_size=3, shuffle=True, collate_fn=padded)
    assert_each_is_as_if_alone(pooled, members, loader)


class Uneven:
    """One or two batches, by chance."""

    def __iter__(self):
        x, y = classification((4,))
        return iter([(x, y)] * (1 + int(torch.randint(0, 2, ()))))


def test_uneven_numbers_of_batches_are_refused():
    fn, members = start(mlp, 8)
    with pytest.raises(RuntimeError, match="same number of batches.*Write `share_batches=True`"):
        fit(fn, members, Uneven(), num_epochs=4)
    fit(fn, members, Uneven(), num_epochs=4, share_batches=True)


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_shared_batches_are_one_stream(kind):
    x, y = classification((4,))
    fn, members = start(mlp)
    twins = {name: leaf[:1].expand(2, *leaf.shape[1:]) for name, leaf in members.items()}
    data = (x, y) if kind == "tensors" else DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True)
    batch_size = 5 if kind == "tensors" else None
    shared = fit(fn, twins, data, batch_size=batch_size, share_batches=True)
    own = fit(fn, twins, data, batch_size=batch_size)
    for name in shared:
        torch.testing.assert_close(shared[name][0], shared[name][1])
        assert not torch.allclose(own[name][0], own[name][1])


def test_workers_that_persist_are_refused_unless_batches_are_shared():
    fn, members = start(mlp)
    loader = DataLoader(TensorDataset(*classification((4,))), 5, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match=r"persistent_workers=True\. Write `share_batches=True`"):
        fit(fn, members, loader)


@pytest.mark.parametrize("model", LOOPED)
def test_what_vmap_cannot_take_is_looped_over_with_one_warning(model):
    make, shape = LOOPED[model]
    fn, members = start(make)
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="one by one, because `vmap` cannot take the model: ") as caught:
        assert_each_is_as_if_alone(fn, members, classification(shape), batch_size=5)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(torch.get_rng_state(), state)


def test_one_at_a_time_takes_any_model_without_a_word():
    fn, members = start(Branching)
    one = {"only_together": {"chunk_size": 1}}
    assert_each_is_as_if_alone(fn, members, classification((4,)), batch_size=5, **one)


MIB = 1 << 20


@pytest.mark.parametrize(
    ("num_members", "largest", "share", "sizes"),
    [
        (10, 0, 1.0, [10]),
        (10, MIB, 1.0, [10]),
        (10, 2 * MIB, 1.0, [5, 5]),
        (10, 2 * MIB, 0.5, [3, 3, 4]),
        (10, 6 * MIB, 1.0, [2] * 5),
        (5, 4 * MIB, 1.0, [2, 3]),
        (6, 99 * MIB, 1.0, [2] * 3),
    ],
)
def test_members_are_parted_equally_by_what_fits(num_members, largest, share, sizes):
    parts = equal_parts(num_members, largest, torch.device("cpu"), share)
    assert [part.stop - part.start for part in parts] == sizes
    assert [k for part in parts for k in range(num_members)[part]] == list(range(num_members))


class OfPixels(fb.likelihoods.Normal):
    """A user's: outputs are viewed as they lie in memory, where the model is alone."""

    def check(self, outputs, y=None, *, call=""):
        pass

    def log_prob(self, outputs, y):
        pixels = outputs.view(-1)
        return -(pixels.view(len(y), -1) - y[:, None]).square().sum(1)


def test_likelihoods_of_the_user_may_view_outputs_as_if_alone():
    fn, members = start(lambda: nn.Conv2d(1, 1, 3))
    x, y = classification((1, 5, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together, alone = (
            fit(fn, members, (x, y.double()), OfPixels(1.0), batch_size=5, chunk_size=size)
            for size in (None, 1)
        )
    for name, leaf in alone.items():
        torch.testing.assert_close(together[name], leaf)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_members_that_memory_is_not_enough_for_are_trained_in_halves(room, chunk_size):
    sizes = []

    def fn(params, x):
        whole = physical(params["w"])
        sizes.append(len(whole) if whole.ndim == 3 else 1)
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 8.00 GiB")
        return F.linear(x, params["w"])

    members, data = {"w": torch.randn(5, 2, 3, generator=seeded(0), dtype=F64)}, classification((3,))
    options = {"batch_size": 5, "num_epochs": 2}
    got = fit(fn, members, data, chunk_size=chunk_size, **options)
    tried = [size for size in sizes if size > room]
    assert tried[0] == 5
    assert len(tried) == (5 // 2 > room) + 1  # halves are remembered
    torch.testing.assert_close(got["w"], fit(fn, members, data, chunk_size=1, **options)["w"])


def test_one_member_that_memory_is_not_enough_for_is_an_error():
    def fn(params, x):
        if torch.is_grad_enabled():  # not when it is looked at first
            raise torch.OutOfMemoryError("out of memory. Tried to allocate 8.00 GiB")
        return F.linear(x, params["w"])

    members = {"w": torch.randn(5, 2, 3, generator=seeded(0), dtype=F64)}
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
    ):
        fit(fn, members, classification((3,)), batch_size=5)


@pytest.mark.parametrize("model", MODELS)
def test_models_with_large_intermediates_are_trained_in_chunks(model, monkeypatch):
    monkeypatch.setattr(_mapping, "_BUDGET", {"cpu": 1})
    make, shape = MODELS[model]
    fn, members = start(make, 5)
    assert_each_is_as_if_alone(fn, members, classification(shape), batch_size=5)


@pytest.mark.parametrize("model", [*MODELS, *LOOPED])
def test_large_models_are_trained_one_after_another(model, monkeypatch):
    monkeypatch.setattr(_several, "_LARGE", 0)
    make, shape = {**MODELS, **LOOPED}[model]
    fn, members = start(make)
    assert_each_is_as_if_alone(fn, members, classification(shape), batch_size=5, prior_precision=1.0)
    members[next(iter(members))][1] = torch.inf
    with pytest.raises(RuntimeError, match="loss of member 1 in `ensemble.fit` is nan"):
        fit(fn, members, classification(shape))


def test_a_callback_sees_all_members_of_a_large_model(monkeypatch):
    monkeypatch.setattr(_several, "_LARGE", 0)
    fn, members = start(mlp)
    seen = []
    fit(fn, members, classification((4,)), callback=lambda epoch, losses, _: seen.append(losses.shape))
    assert seen == [(K,)] * 2


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("model", MODELS)
def test_each_member_has_a_bootstrap_of_its_own_as_if_alone(model, batch_size):
    make, shape = MODELS[model]
    fn, members = start(make)
    options = {"batch_size": batch_size, "bootstrap": True, "prior_precision": 1.0}
    assert_each_is_as_if_alone(fn, members, classification(shape), **options)


def test_a_bootstrap_is_training_on_resampled_rows():
    fn, members = start(mlp)
    x, y = classification((4,))
    together = fit(fn, members, (x, y), batch_size=5, bootstrap=True)
    seen = set()
    for k, seed in enumerate(member_seeds(7, K)):
        rows = training.bootstrap_rows(seed, len(x))
        seen.add(tuple(rows.tolist()))
        alone = training.fit(
            fn, member(members, k), (x[rows], y[rows]), fb.likelihoods.Categorical(), optimizer=ADAM,
            num_epochs=2, batch_size=5, seed=seed,
        )  # fmt: skip
        for name, leaf in alone.items():
            torch.testing.assert_close(together[name][k], leaf)
    assert len(seen) == K


@pytest.mark.parametrize("model", MODELS)
def test_each_member_is_trained_adversarially_as_if_alone(model):
    make, shape = MODELS[model]
    fn, members = start(make)
    assert_each_is_as_if_alone(fn, members, classification(shape), batch_size=5, adversarial=0.05)


@pytest.mark.parametrize("model", LOOPED)
def test_a_loop_over_members_is_adversarial_too(model):
    make, shape = LOOPED[model]
    fn, members = start(make)
    with pytest.warns(UserWarning, match="one by one, because `vmap` cannot take the model: "):
        assert_each_is_as_if_alone(fn, members, classification(shape), batch_size=5, adversarial=0.05)


FAST = functools.partial(torch.optim.Adam, lr=0.1)


def stopping():
    """Every model, and some with every patience and a single member."""
    whole = [(m, p, n) for m in ("mlp", "conv") for p in (None, 1, 3) for n in (1, K)]
    return whole + [(m, p, K) for m in MODELS if m not in ("mlp", "conv") for p in (None, 1)]


@pytest.mark.parametrize(("model", "patience", "num_members"), stopping())
def test_each_member_stops_early_as_if_alone(model, patience, num_members):
    make, shape = MODELS[model]
    fn, members = start(make, num_members)
    x, y = classification(shape, 24)
    options = {"optimizer": FAST, "num_epochs": 8, "batch_size": 5, "patience": patience}
    assert_each_is_as_if_alone(fn, members, (x[:12], y[:12]), validation=(x[12:], y[12:]), **options)


def test_members_stop_at_different_epochs_and_training_ends_with_the_last():
    fn, members = start(mlp, 8)
    x, y = classification((4,), 24)
    held_out, likelihood = (x[12:], y[12:]), fb.likelihoods.Categorical()
    options = {"optimizer": FAST, "num_epochs": 30, "batch_size": 5}
    seen, counted = [], []
    fit(fn, members, (x[:12], y[:12]), callback=lambda e, losses, m: seen.append(m), **options)
    table = torch.stack(
        [
            torch.stack(
                [-likelihood.log_prob(fn(member(m, k), held_out[0]), held_out[1]).mean() for k in range(8)]
            )
            for m in seen
        ]
    )
    got = fit(
        fn, members, (x[:12], y[:12]), validation=held_out, patience=2,
        callback=lambda e, losses, m: counted.append(e) and None, **options,
    )  # fmt: skip
    ends, bests = [], []
    for losses in table.T.tolist():
        best, waited = 0, 0
        for epoch in range(1, len(losses)):
            best, waited = (epoch, 0) if losses[epoch] < losses[best] else (best, waited + 1)
            if waited == 2:
                break
        ends.append(epoch + 1)
        bests.append(best)
    assert len(set(ends)) > 1
    assert len(counted) == max(ends)
    for k, best in enumerate(bests):
        for name in got:
            torch.testing.assert_close(got[name][k], seen[best][name][k])


@pytest.mark.parametrize(
    ("model", "large"),
    [*((m, False) for m in (*MODELS, *LOOPED)), *((m, True) for m in ("mlp", "dropout", "conv", "noise"))],
)
def test_all_options_at_once_are_as_if_alone(model, large, monkeypatch):
    if large:
        monkeypatch.setattr(_several, "_LARGE", 0)
    make, shape = {**MODELS, **LOOPED}[model]
    fn, members = start(make)
    x, y = classification(shape, 24)
    options = {"optimizer": FAST, "num_epochs": 5, "batch_size": 5, "patience": 2, "max_grad_norm": 1.0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*trains the members one by one")
        assert_each_is_as_if_alone(
            fn, members, (x[:12], y[:12]), validation=(x[12:], y[12:]), adversarial=0.02, bootstrap=True,
            **options,
        )  # fmt: skip


@pytest.mark.parametrize("model", ["mlp", "dropout", "conv"])
def test_a_loader_is_adversarial_and_validates_as_if_alone(model):
    make, shape = MODELS[model]
    fn, members = start(make)
    x, y = classification(shape, 24)
    loader = DataLoader(TensorDataset(x[:12], y[:12]), batch_size=5, shuffle=True)
    held_out = DataLoader(TensorDataset(x[12:], y[12:]), batch_size=5, shuffle=True)
    options = {"optimizer": FAST, "num_epochs": 6, "patience": 2, "adversarial": 0.02}
    state = torch.get_rng_state()
    assert_each_is_as_if_alone(fn, members, loader, validation=held_out, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_in_evaluation_is_the_same_in_any_company():
    fn, members = start(mlp)

    def noisy(params, x):
        outputs = fn(params, x)
        return outputs + 0.5 * torch.randn(outputs.shape, dtype=F64)

    x, y = classification((4,), 24)
    options = {"optimizer": FAST, "num_epochs": 6, "batch_size": 5}
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="one by one, because `vmap` cannot take the model: "):
        assert_each_is_as_if_alone(noisy, members, (x[:12], y[:12]), validation=(x[12:], y[12:]), **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_chunks_of_members_change_nothing_in_validation(model, chunk_size):
    make, shape = MODELS[model]
    fn, members = start(make)
    x, y = classification(shape, 24)
    options = {"validation": (x[12:], y[12:]), "optimizer": FAST, "num_epochs": 5, "batch_size": 5}
    chunked = {"only_together": {"chunk_size": chunk_size}}
    assert_each_is_as_if_alone(fn, members, (x[:12], y[:12]), **options, **chunked)


def test_a_member_that_is_done_may_diverge():
    x, y = torch.ones(4, 1, dtype=F64), torch.zeros(4, 1, dtype=F64)
    members = {"w": torch.tensor([1.0, 3.0], dtype=F64)}

    def optimizer(leaves):  # the first member descends, the second one overflows within some steps
        return Mine(leaves, lr=0.01 if leaves[0].item() < 2 else 1e60)

    options = {"optimizer": optimizer, "num_epochs": 9, "patience": 1}
    normal = fb.likelihoods.Normal(1.0)
    with pytest.raises(RuntimeError, match="of member 1"):
        fb.ensemble.fit(lambda p, x: x * p["w"], members, (x, y), normal, **{**options, "patience": None})
    got = fb.ensemble.fit(
        lambda p, x: x * p["w"], members, (x, y), normal, validation=(x, y), **options
    ).members["w"]
    torch.testing.assert_close(got[0], torch.tensor(0.99**9, dtype=F64))
    torch.testing.assert_close(got[1], torch.tensor(3 * (1 - 1e60), dtype=F64))


def test_a_member_that_is_never_finite_on_the_validation_is_named():
    fn, members = start(mlp)

    def overflowing(params, x):
        return fn(params, x) * torch.where(params["2.bias"][:1] > 50, torch.nan if len(x) == 4 else 1.0, 1.0)

    members["2.bias"][2] = 100.0
    x, y = classification((4,))
    with pytest.raises(RuntimeError, match=r"is not finite after any epoch for member 2\."):
        fit(overflowing, members, (x, y), validation=(x[:4], y[:4]))


@pytest.mark.parametrize("kind", ["rows_first", "channels_last"])
@pytest.mark.parametrize("size", [(), (6,), (3, 2), (2, 3, 2)], ids=len)
@pytest.mark.parametrize("has_statistics", [True, False])
def test_batch_norm_in_training_is_one_kernel_that_writes_every_members_statistics(
    kind, size, has_statistics
):
    x, weight, bias = (
        torch.randn(K, *shape, generator=seeded(i), dtype=F64)
        for i, shape in enumerate([(5, 4, *size), (4,), (4,)])
    )
    statistics = [torch.zeros(K, 4, dtype=F64), torch.ones(K, 4, dtype=F64)] if has_statistics else None
    expected = [s.clone() for s in statistics] if statistics else None
    rules = Batching(kind)
    if size:  # without positions it is left to vmap
        rules.handlers[F.batch_norm] = functools.partial(_without_vmap, rules.handlers[F.batch_norm])

    def one(x, weight, bias, statistics):
        running = statistics or [None, None]
        return F.batch_norm(x, *running, weight, bias, training=True, momentum=0.3)

    def with_rules(*args):
        with rules:
            return one(*args)

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    got = vmap(with_rules, in_dims=(0, 0, 0, 0 if statistics else None))(*leaves, statistics)
    parts = [[t[k] for t in leaves] + [expected and [s[k] for s in expected]] for k in range(K)]
    by_hand = torch.stack([one(*part) for part in parts])
    torch.testing.assert_close(got, by_hand)
    torch.testing.assert_close(statistics, expected)
    found, wanted = (torch.autograd.grad((out**3).sum(), leaves) for out in (got, by_hand))
    torch.testing.assert_close(found, wanted)


def _without_vmap(handler, mode, func, args, kwargs):
    def refuse(*_, **__):
        raise AssertionError("the rule left this to vmap")

    return handler(mode, refuse, args, kwargs)


def test_batch_norm_does_not_write_into_statistics_that_members_share():
    mean, variance = torch.zeros(4), torch.ones(4)

    def one(x):
        with Batching("channels_last"):
            return F.batch_norm(x, mean, variance, training=True)

    with pytest.raises(RuntimeError, match="were not batched"):
        vmap(one)(torch.randn(1, 5, 4, 3, 2))
    assert torch.equal(mean, torch.zeros(4))


def test_a_model_that_fails_alone_too_shows_its_own_error():
    def fails(params, x):
        raise ArithmeticError("mine")

    with pytest.raises(ArithmeticError, match="mine"):
        fit(fails, start(mlp)[1], classification((4,)))


def test_one_member_is_not_vmapped_but_has_the_axis():
    fn, members = start(Branching, 1)
    assert_each_is_as_if_alone(fn, members, classification((4,)), batch_size=5)


OTHER_RANKS = {"w": (4, 2), "b": (2,), "gain": ()}  # ranks 2, 1, 0


@pytest.mark.parametrize("kind", _ELEMENTWISE, ids=lambda kind: kind.__name__)
def test_elementwise_optimizers_move_stacked_leaves_as_they_would_alone(kind):
    g = seeded(2)
    members = {n: torch.randn(K, *s, generator=g, dtype=F64) for n, s in OTHER_RANKS.items()}

    def fn(params, x):
        return params["gain"] * (x @ params["w"] + params["b"])

    optimizer = functools.partial(kind, lr=0.01)
    options = Options("fit", optimizer, 1)
    assert shared_movers([leaf for _, leaf in sorted(members.items())], options).is_stacked
    x, y = classification((4,))
    # Members of very different scales would show a number that they share.
    members["gain"] = members["gain"] * torch.tensor([1e-3, 1.0, 1e2], dtype=F64)
    assert_each_is_as_if_alone(fn, members, (x, y), batch_size=4, optimizer=optimizer, num_epochs=3)


@pytest.mark.parametrize("first_without", [0, 1, 3])
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.Adam, weight_decay=0.1, amsgrad=True),
        functools.partial(torch.optim.SGD, weight_decay=0.1, momentum=0.9),
        functools.partial(torch.optim.RMSprop, centered=True),
        torch.optim.Rprop,
        torch.optim.ASGD,
    ],
    ids=["Adam", "SGD", "RMSprop", "Rprop", "ASGD"],
)
def test_a_leaf_that_is_left_out_in_some_steps_is_passed_over_there(optimizer, first_without):
    g = seeded(2)
    members = {n: torch.randn(K, *s, generator=g, dtype=F64) for n, s in {"w": (4, 2), "b": (2,)}.items()}
    x, y = classification((4,))
    batches = [(x[:5], y[:5])] * 5
    batches[first_without] = (x[5:8], y[5:8])  # 3 rows

    def fn(params, x):
        return x @ params["w"] + (params["b"] if len(x) == 5 else 0)

    optimizer = functools.partial(optimizer, lr=0.05)
    halving = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    assert_each_is_as_if_alone(
        fn, members, batches, optimizer=optimizer, scheduler=halving, num_epochs=3, batch_size=None
    )


@pytest.mark.parametrize(("small", "large"), [(0, 1 << 30), (1 << 30, 1 << 30), (0, 0)])
def test_however_optimizers_are_shared_out_members_are_trained_as_if_alone(small, large, monkeypatch):
    monkeypatch.setattr(_shared_movers, "_SMALL", small)
    monkeypatch.setattr(_shared_movers, "_LARGE", large)
    fn, members = start(mlp)
    leaves = [leaf for _, leaf in sorted(members.items())]
    movers = shared_movers(leaves, Options("fit", ADAM, 1))
    assert [len(mover.leaves) for mover in movers.movers] == (
        [1] if small else [len(leaves)] if large else [len(leaves)] * K
    )
    assert_each_is_as_if_alone(fn, members, classification((4,)), batch_size=5, max_grad_norm=0.3)


class Mine(torch.optim.SGD):
    pass


def no_decay_for_vectors(leaves):
    groups = [
        {"params": [p for p in leaves if p.ndim >= 2], "weight_decay": 0.5},
        {"params": [p for p in leaves if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=0.1)


SEPARATE = {
    "subclass": (functools.partial(Mine, lr=0.1), None),
    "by shape": (no_decay_for_vectors, None),
    "plateau": (
        functools.partial(torch.optim.SGD, lr=0.1),
        functools.partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.01),
    ),
}


def unpacking(leaves):
    first, second, *others = leaves
    return torch.optim.SGD([first, second, *others], lr=0.1)


OF_THEIR_OWN = {
    "groups by place": lambda p: torch.optim.SGD(
        [{"params": [p[0]]}, {"params": p[1:], "lr": 0.2}], lr=0.1, momentum=0.9
    ),
    "one is left out": lambda leaves: torch.optim.Adam([p for p in leaves if p.ndim > 1], lr=0.1),
    "leaves are counted": unpacking,
}


@pytest.mark.parametrize("optimizer", OF_THEIR_OWN.values(), ids=OF_THEIR_OWN.keys())
def test_factories_may_do_as_they_like_with_each_leaf(optimizer):
    fn, members = start(mlp)
    assert_each_is_as_if_alone(fn, members, classification((4,)), batch_size=5, optimizer=optimizer)


def halved_after_steps(leaves):
    optimizer = torch.optim.SGD(leaves, lr=0.1)

    def halve_large_leaves(optimizer, *_):
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.mul_(0.5 if p.norm() > 0.5 else 1.0)

    optimizer.register_step_post_hook(halve_large_leaves)
    return optimizer


def test_hooks_of_an_optimizer_see_the_leaves_of_one_member():
    fn, members = start(mlp)
    data = classification((4,))
    assert_each_is_as_if_alone(fn, members, data, batch_size=5, optimizer=halved_after_steps)


@pytest.mark.parametrize(("optimizer", "scheduler"), SEPARATE.values(), ids=SEPARATE.keys())
def test_one_optimizer_a_member_where_sharing_might_differ(optimizer, scheduler):
    fn, members = start(mlp)
    options = Options("fit", optimizer, 1, scheduler)
    assert not shared_movers([leaf for _, leaf in sorted(members.items())], options).is_stacked
    data = classification((4,))
    assert_each_is_as_if_alone(
        fn, members, data, batch_size=5, optimizer=optimizer, scheduler=scheduler, num_epochs=4
    )


def test_where_holds_the_other_leaves_of_each_member():
    fn, members = start(mlp)
    assert_each_is_as_if_alone(fn, members, classification((4,)), where="2.*")
    got = fit(fn, members, classification((4,)), where="2.*")
    assert torch.equal(got["0.weight"], members["0.weight"])
    assert not torch.equal(got["2.weight"], members["2.weight"])


def test_a_model_inside_a_function_keeps_its_statistics():
    fn, members = start(ConvNet)

    def wrapped(params, x):
        return params["gain"] * fn(params["net"], x)

    tree = {"net": members, "gain": torch.ones(K, dtype=F64)}
    got = fit(wrapped, tree, classification((1, 5, 5)), batch_size=5, where="net.*")
    plain = fit(fn, members, classification((1, 5, 5)), batch_size=5)
    assert set(got["net"]) == set(plain)
    for name in plain:
        torch.testing.assert_close(tensor_of(got["net"][name]), tensor_of(plain[name]))


def test_what_was_trained_can_be_trained_further():
    fn, members = start(ConvNet)
    data = classification((1, 5, 5))
    once = fit(fn, members, data, batch_size=5)
    # Member 2 has seen another number of batches than the others: an integer that is not shared.
    counts = once["norm.num_batches_tracked"].tensor.clone()
    counts[2] = 100
    once["norm.num_batches_tracked"] = fb.Fixed(counts)
    assert_each_is_as_if_alone(fn, once, data, batch_size=5)
    more = fit(fn, once, data, batch_size=5)["norm.num_batches_tracked"].tensor
    assert more.tolist() == [12, 12, 106]


def test_inputs_may_be_trees_and_targets_may_have_positions():
    g = seeded(0)
    x = {"a": torch.randn(9, 4, generator=g, dtype=F64), "scale": [torch.tensor(0.5, dtype=F64)]}
    y = torch.randn(9, 2, generator=g, dtype=F64)
    fn, members = start(mlp)

    def scaled(params, x):
        return fn(params, x["a"]) * x["scale"][0]

    normal = fb.likelihoods.Normal(0.3)
    got = fit(scaled, members, (x, y), normal, batch_size=4, seed=7)
    for k, seed in enumerate(member_seeds(7, K)):
        alone = training.fit(
            scaled, member(members, k), (x, y), normal, batch_size=4, seed=seed, optimizer=ADAM, num_epochs=2
        )
        for name in alone:
            torch.testing.assert_close(got[name][k], alone[name])


def test_seeds_of_members_do_not_depend_on_how_many():
    assert member_seeds(5, 10)[:3] == member_seeds(5, 3)
    assert len({*member_seeds(5, 100), *member_seeds(6, 100)}) == 200


def test_members_do_not_depend_on_how_many():
    fn, members = start(dropped, 4)
    few = {name: leaf[:2] for name, leaf in members.items()}
    data = classification((4,))
    four, two = (fit(fn, m, data, batch_size=5) for m in (members, few))
    for name in two:
        torch.testing.assert_close(four[name][:2], two[name])
    assert all(torch.equal(start(dropped, 2)[1][name], few[name]) for name in few)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_arguments_and_modes_are_left_as_they_were(mode, chunk_size):
    fn, members = start(ConvNet)
    data = classification((1, 5, 5))
    expected = fit(fn, members, data, batch_size=5, chunk_size=chunk_size)
    before = {name: leaf.clone() for name, leaf in members.items()}
    state = torch.get_rng_state()
    with mode():
        copies = {name: leaf.clone() for name, leaf in members.items()}
        got = fit(fn, copies, tuple(t.clone() for t in data), batch_size=5, chunk_size=chunk_size)
    assert torch.equal(torch.get_rng_state(), state)
    for name, leaf in expected.items():
        assert torch.equal(tensor_of(got[name]), tensor_of(leaf))
        assert not tensor_of(got[name]).requires_grad
        assert not tensor_of(got[name]).is_inference()
    assert all(torch.equal(members[name], before[name]) for name in before)


def test_the_callback_sees_all_members_and_can_end_training():
    seen = []

    def callback(epoch, losses, members):
        seen.append((losses, members))
        return epoch == 1

    fn, members = start(mlp)
    x, y = classification((4,))
    got = fit(fn, members, (x, y), num_epochs=9, callback=callback)
    assert len(seen) == 2
    assert seen[0][0].shape == (K,)
    for k in range(K):
        outputs = fn(member(seen[0][1], k), x)
        expected = nn.functional.cross_entropy(outputs, y)
        torch.testing.assert_close(seen[1][0][k], expected)
    assert all(torch.equal(got[name], seen[1][1][name]) for name in got)


def test_init_builds_each_module_from_its_own_seed():
    state = torch.get_rng_state()
    _, members = fb.ensemble.init(mlp, K, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    for k, seed in enumerate(member_seeds(4, K)):
        with torch.random.fork_rng():
            torch.manual_seed(seed & (1 << 63) - 1)
            expected = mlp().state_dict()
        assert all(torch.equal(members[name][k], expected[name]) for name in expected)


class Features(nn.Module):
    """A random, fixed first layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("directions", torch.randn(4, 5))
        self.register_buffer("constant", torch.ones(5))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head((x @ self.directions).cos() * self.constant)


def test_buffers_that_differ_become_fixed():
    fn, members = fb.ensemble.init(lambda: Features().double(), K, seed=0)
    assert isinstance(members["directions"], fb.Fixed)
    assert members["directions"].tensor.shape == (K, 4, 5)
    assert "constant" not in members
    assert_each_is_as_if_alone(fn, members, classification((4,)), batch_size=5)


def test_modules_trained_elsewhere_are_what_the_ensemble_predicts():
    x, _ = classification((1, 5, 5))
    modules = [ConvNet().double() for _ in range(K)]
    for k, module in enumerate(modules):
        module(x + k)  # other statistics for each
        module.eval()
    fn, ensemble = fb.ensemble.from_modules(modules)
    for k, module in enumerate(modules):
        torch.testing.assert_close(fn(member(ensemble.members, k), x), module(x).detach())
    assert "norm.num_batches_tracked" not in ensemble.members
    predicted = fb.predict(fn, None, ensemble, x, num_samples=None)
    expected = torch.stack([module(x).detach() for module in modules])
    torch.testing.assert_close(predicted.mean, expected.mean(0))


net = mlp()
MODULE_ERRORS = {
    "module": (lambda: fb.ensemble.init(net, 3), TypeError, "a function that builds a new module, got Seq"),
    "fraction": (lambda: fb.ensemble.init(mlp, 2.5), TypeError, "`ensemble.init(num_members=...)` should be"),
    "none": (lambda: fb.ensemble.init(mlp, 0), ValueError, "(num_members=...)` should be at least 1, got 0."),
    "no modules": (lambda: fb.ensemble.from_modules([]), ValueError, "at least one module, got none"),
    "no module": (lambda: fb.ensemble.from_modules([net, 3]), TypeError, "be given modules, got int"),
    "one module": (lambda: fb.ensemble.init(lambda: net, 2), ValueError, "0 and 1 are one. Build a new"),
    "twice": (
        lambda: fb.ensemble.from_modules([net, net]),
        ValueError,
        "Keep copies: `copy.deepcopy(module)`",
    ),
    "activation": (
        lambda: fb.ensemble.from_modules([net, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))]),
        ValueError,
        "'1' is ReLU() in module 1 and Tanh() in module 0",
    ),
    "shape": (
        lambda: fb.ensemble.from_modules([nn.Linear(4, 2), nn.Linear(4, 3)]),
        ValueError,
        "out_features=3",
    ),
    "own parameters": (
        lambda: fb.ensemble.from_modules([nn.ParameterDict({n: torch.ones(2)}) for n in "ab"]),
        ValueError,
        "one architecture",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), MODULE_ERRORS.values(), ids=MODULE_ERRORS.keys())
def test_modules_that_do_not_match_are_refused(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


x, y = classification((4,))
FIT_ERRORS = {
    "members": (
        {"members": {"w": torch.ones(3, 4), "b": torch.ones(2)}},
        ValueError,
        "one leading axis over the members; 'b' has 2, 'w' has 3. Write `fn, members = ensemble.init",
    ),
    "scalars": ({"members": {"w": torch.tensor(1.0)}}, ValueError, "'w' has none"),
    "no members": ({"members": {}}, ValueError, "at least one leaf, got an empty tree"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "(chunk_size=...)` should be at least 1, got 0."),
    "num_epochs": ({"num_epochs": 0}, ValueError, "`ensemble.fit(num_epochs=...)` should be at least 1"),
    "module": ({"fn": net}, TypeError, "`ensemble.fit(fn, ...)` should be given a function of (params, x)"),
    "iterator": ({"data": iter([(x, y)])}, TypeError, "`ensemble.fit(data=...)` should be a re-iterable"),
    "empty": ({"data": []}, ValueError, "got none in epoch 0"),
    "bootstrap": (
        {"bootstrap": True, "share_batches": True},
        ValueError,
        "`ensemble.fit(bootstrap=True)` gives each member rows of its own",
    ),
    "bootstrap of a loader": ({"bootstrap": True, "data": [(x, y)]}, ValueError, "Write `data=(x, y)`"),
    "patience": ({"patience": 2}, ValueError, "`ensemble.fit(patience=2)` needs rows to wait for"),
    "validation": ({"validation": 3}, TypeError, "`ensemble.fit(validation=...)` should be an (x, y)"),
}


@pytest.mark.parametrize(("options", "kind", "message"), FIT_ERRORS.values(), ids=FIT_ERRORS.keys())
def test_bad_input_is_refused(options, kind, message):
    fn, members = start(mlp)
    with pytest.raises(kind, match=re.escape(message)):
        fit(**{"fn": fn, "members": members, "data": (x, y), **options})


def test_a_member_that_diverges_is_named():
    fn, members = start(mlp)
    members["2.bias"][1] = torch.inf
    with pytest.raises(
        RuntimeError, match=r"loss of member 1 in `ensemble.fit` is (nan|inf) in step 0 of epoch 0"
    ):
        fit(fn, members, (x, y))


def test_a_batch_sampler_of_ones_own_is_counted():
    dataset = TensorDataset(x, y)
    loader = DataLoader(dataset, batch_sampler=list(BatchSampler(range(10), 5, False)))
    fn, members = start(mlp)
    got = fit(fn, members, loader, prior_precision=5.0)
    expected = fit(fn, members, [(x[:5], y[:5]), (x[5:10], y[5:10])], prior_precision=5.0, num_data=10)
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


class Recording(torch.optim.SGD):
    """Writes down the learning rates of its groups at every step."""

    seen: list

    def step(self, closure=None):
        self.seen.append([group["lr"] for group in self.param_groups])
        return super().step(closure)


def recording(seen, rates):
    def make(leaves):
        optimizer = Recording([{"params": [p], "lr": lr} for p, lr in zip(leaves, rates, strict=True)])
        optimizer.seen = seen
        return optimizer

    return make


def snapshots(fn, params, data, **options):
    options = {"optimizer": ADAM, "num_cycles": 3, "epochs_per_cycle": 2, "seed": 7, **options}
    return fb.ensemble.fit_snapshots(fn, params, data, fb.likelihoods.Categorical(), **options)


def cosine(t, n):
    """Equation 2 of Huang et al. (2017) for a learning rate of 1."""
    return 0.5 * (np.cos(np.pi * np.mod(t - 1, n) / n) + 1)


class Lengthless:
    """Batches that nobody has counted."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Iterable(torch.utils.data.IterableDataset):
    """Says that it is longer than it is."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))

    def __len__(self):
        return 10


DATA_OF_THREE_BATCHES = {
    "tensors": lambda x, y: ((x, y), 5),
    "loader": lambda x, y: (DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True), None),
    "loader_drop_last": lambda x, y: (DataLoader(TensorDataset(x, y), batch_size=4, drop_last=True), None),
    "list": lambda x, y: ([(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])], None),
    "lengthless": lambda x, y: (Lengthless([(x[:5], y[:5])] * 3), None),
    "iterable": lambda x, y: (DataLoader(Iterable(x, y), batch_size=5), None),
}


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
@pytest.mark.parametrize("kind", DATA_OF_THREE_BATCHES)
def test_the_learning_rate_of_snapshots_is_that_of_the_paper(kind):
    fn, params = fb.make_functional(nn.Linear(4, 2).double())
    data, batch_size = DATA_OF_THREE_BATCHES[kind](*classification((4,)))
    seen = []
    optimizer = recording(seen, [0.1, 0.02])
    got = snapshots(fn, params, data, optimizer=optimizer, batch_size=batch_size)
    assert got.num_members == 3
    steps = 3 * 2 * 3
    expected = [[lr * cosine(t, 6) for lr in (0.1, 0.02)] for t in range(1, steps + 1)]
    assert seen == [pytest.approx(rates) for rates in expected]


def test_snapshots_are_those_of_sgd_by_hand():
    x, y = classification((4,))
    torch.manual_seed(0)
    net = mlp().double()
    fn, params = fb.make_functional(net)
    sgd = functools.partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    got = snapshots(fn, params, (x, y), optimizer=sgd, num_cycles=3, epochs_per_cycle=4)
    optimizer, expected = sgd(net.parameters()), []
    for t in range(1, 13):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * cosine(t, 4)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if t % 4 == 0:
            expected.append({name: p.detach().clone() for name, p in net.named_parameters()})
    for name, leaf in got.members.items():
        torch.testing.assert_close(leaf, torch.stack([member[name] for member in expected]))
    assert got.has_equal_weights
    last = snapshots(
        fn, params, (x, y), optimizer=sgd, num_cycles=3, epochs_per_cycle=4, num_members=2
    ).members
    for name, leaf in last.items():
        assert torch.equal(leaf, got.members[name][1:])


@pytest.mark.parametrize("model", [*MODELS, *LOOPED])
def test_snapshots_are_training_with_a_cyclic_scheduler(model):
    make, shape = {**MODELS, **LOOPED}[model]
    torch.manual_seed(0)
    fn, params = fb.make_functional(make().double())
    data, seen = classification(shape), []
    before = {name: leaf.clone() for name, leaf in params.items()}
    got = snapshots(fn, params, data, batch_size=5, prior_precision=1.0, max_grad_norm=0.5)
    training.fit(
        fn, params, data, fb.likelihoods.Categorical(), optimizer=ADAM, num_epochs=6, batch_size=5, seed=7,
        prior_precision=1.0, max_grad_norm=0.5, scheduler_interval="step",
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: float(cosine(t + 1, 6))),
        callback=lambda epoch, loss, params: seen.append(params) and None,
    )  # fmt: skip
    assert set(got.members) == set(seen[0])
    for name, leaf in got.members.items():
        assert isinstance(leaf, fb.Fixed) == isinstance(seen[0][name], fb.Fixed)
        torch.testing.assert_close(
            tensor_of(leaf), torch.stack([tensor_of(seen[e][name]) for e in (1, 3, 5)])
        )
    assert all(torch.equal(params[name], before[name]) for name in before)


class Growing:
    """One batch more at every pass."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter([classification((4,))] * self.passes)


SNAPSHOT_ERRORS = {
    "cycles": (
        {"num_cycles": 0},
        ValueError,
        "`ensemble.fit_snapshots(num_cycles=...)` should be at least 1",
    ),
    "epochs": ({"epochs_per_cycle": 1.5}, TypeError, "(epochs_per_cycle=...)` should be an int"),
    "members": ({"num_members": 4}, ValueError, "at most the number of cycles, 3, got 4"),
    "growing": ({"data": Growing()}, RuntimeError, "batches in every epoch"),
    "ended": (
        {"callback": lambda *_: True},
        RuntimeError,
        "should let the first cycle come to its end, after 2",
    ),
    "empty": ({"data": []}, ValueError, "at least one batch an epoch, got none in epoch 0"),
    "module": ({"fn": net}, TypeError, "`ensemble.fit_snapshots(fn, ...)` should be given a function"),
}


@pytest.mark.parametrize(("options", "kind", "message"), SNAPSHOT_ERRORS.values(), ids=SNAPSHOT_ERRORS.keys())
def test_bad_input_to_snapshots_is_refused(options, kind, message):
    fn, params = fb.make_functional(nn.Linear(4, 2).double())
    with pytest.raises(kind, match=re.escape(message)):
        snapshots(**{"fn": fn, "params": params, "data": (x, y), **options})
