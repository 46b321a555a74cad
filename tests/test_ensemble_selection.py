import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes.ensemble._selection import backward_kept, greedy_counts

F64 = torch.float64


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_table(num_members, num_rows, seed):
    return 2 * torch.randn(num_members, num_rows, generator=seeded(seed), dtype=F64) - 3


def mixture_nll(table, weights):
    """Mean negative log density of a mixture, densities averaged one by one."""
    rows, total = torch.as_tensor(table).T.tolist(), sum(weights)
    densities = [sum(w * math.exp(v) for w, v in zip(weights, row, strict=True)) / total for row in rows]
    return math.inf if 0 in densities else -sum(map(math.log, densities)) / len(rows)


def greedy_by_hand(table, num_steps, with_replacement):
    counts = [0] * len(table)
    for _ in range(num_steps):
        tried = {}
        for k in range(len(table)):
            if with_replacement or counts[k] == 0:
                tried[k] = mixture_nll(table, [c + (j == k) for j, c in enumerate(counts)])
        counts[min(tried, key=tried.__getitem__)] += 1
    return counts


def backward_by_hand(table, weights, num_left):
    left = set(range(len(table)))
    while len(left) > num_left:
        tried = {
            k: mixture_nll(table, [w * (j in left and j != k) for j, w in enumerate(weights)]) for k in left
        }
        left.remove(min(tried, key=tried.__getitem__))
    return left


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_forward_selection_adds_what_a_loop_over_candidates_adds(seed, with_replacement):
    table = random_table(6, 9, seed)
    for num_steps in (1, 2, 5):
        got = greedy_counts(table, num_steps, with_replacement=with_replacement)
        assert got.tolist() == greedy_by_hand(table, num_steps, with_replacement)


@pytest.mark.parametrize("seed", range(5))
def test_backward_elimination_drops_what_a_loop_over_candidates_drops(seed):
    table, weights = random_table(6, 9, seed), torch.rand(6, generator=seeded(seed + 10), dtype=F64)
    for num_left in (1, 3, 5, 6):
        got = backward_kept(table, weights, num_left)
        assert set(got.nonzero()[:, 0].tolist()) == backward_by_hand(table, weights.tolist(), num_left)


@pytest.mark.parametrize("seed", range(5))
def test_one_added_or_one_dropped_is_the_best_of_all_subsets(seed):
    table = random_table(5, 8, seed)
    of_subset = {
        size: min(
            itertools.combinations(range(5), size),
            key=lambda chosen: mixture_nll(table, [float(k in chosen) for k in range(5)]),
        )
        for size in (1, 4)
    }
    first = greedy_counts(table, 1, with_replacement=True).nonzero()[:, 0]
    assert tuple(first.tolist()) == of_subset[1]
    left = backward_kept(table, torch.ones(5), 4).nonzero()[:, 0]
    assert tuple(left.tolist()) == of_subset[4]


def test_counts_approach_the_best_weights_of_the_mixture():
    # Two members, each right on its share of the rows: the best weight of the first is that share.
    good, bad = math.log(0.9), math.log(0.1)
    table = torch.tensor([[good] * 7 + [bad] * 3, [bad] * 7 + [good] * 3], dtype=F64)
    weights = torch.linspace(0, 1, 1001, dtype=F64)[1:-1]
    losses = torch.tensor([mixture_nll(table, [w, 1 - w]) for w in weights.tolist()])
    share = greedy_counts(table, 400, with_replacement=True)[0] / 400
    assert abs(share - weights[losses.argmin()]) < 0.01


def test_densities_that_underflow_are_compared_in_logs():
    table = random_table(5, 7, 0)
    far = table - 5000.0
    assert torch.equal(
        greedy_counts(far, 4, with_replacement=True), greedy_counts(table, 4, with_replacement=True)
    )
    assert torch.equal(backward_kept(far, torch.ones(5), 2), backward_kept(table, torch.ones(5), 2))


@pytest.mark.parametrize("with_replacement", [True, False])
def test_a_row_may_be_impossible_for_some_members_or_for_all(with_replacement):
    table = random_table(4, 5, 0)
    table[1, 2] = table[3, 0] = -math.inf
    for densities in (table, torch.full((4, 5), -math.inf, dtype=F64)):
        for size in (1, 2, 4):
            got = greedy_counts(densities, size, with_replacement=with_replacement)
            assert got.tolist() == greedy_by_hand(densities, size, with_replacement)
            left = backward_kept(densities, torch.ones(4), size).nonzero()[:, 0]
            assert set(left.tolist()) == backward_by_hand(densities, [1.0] * 4, size)


def test_a_member_without_weight_is_dropped_before_the_last_that_has_some():
    table = random_table(3, 5, 0)
    assert backward_kept(table, torch.tensor([0.0, 1.0, 0.0]), 1).tolist() == [False, True, False]


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((-1, -2)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        return 9 * self.head(self.lstm(x)[0][:, -1])


def trained(
    make=lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), shape=(4,), weights=None
):
    x = torch.randn(20, *shape, generator=seeded(0), dtype=F64)
    y = torch.randint(0, 2, (20,), generator=seeded(1))
    fn, members = fb.ensemble.init(lambda: make().double(), 6, seed=1)
    if make is ConvNet:
        members["norm.running_mean"] = fb.Fixed(torch.randn(6, 3, generator=seeded(2), dtype=F64))
    return fn, fb.Ensemble(members, weights), x, y


def table_by_hand(fn, ensemble, x, y):
    return torch.stack(
        [
            fb.likelihoods.Categorical().log_prob(fn(ensemble.member(k), x), y)
            for k in range(ensemble.num_members)
        ]
    )


@pytest.mark.filterwarnings("ignore:`vmap` cannot take")
@pytest.mark.parametrize("kind", ["tensors", "batches", "loader"])
@pytest.mark.parametrize(("make", "shape"), [(ConvNet, (1, 5, 5)), (Recurrent, (4, 2))])
def test_members_are_chosen_by_their_mixture_on_the_data(make, shape, kind):
    weights = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0], dtype=F64)
    fn, ensemble, x, y = trained(make, shape, weights)
    data = {
        "tensors": (x, y),
        "batches": [(x[:3], y[:3]), (x[3:], y[3:])],
        "loader": DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True),
    }[kind]
    table, likelihood = table_by_hand(fn, ensemble, x, y), fb.likelihoods.Categorical()
    state = torch.get_rng_state()
    chosen = fb.ensemble.select(fn, None, ensemble, data, likelihood, 5)
    counts = torch.tensor(greedy_by_hand(table, 5, True))
    kept = counts.nonzero()[:, 0]
    torch.testing.assert_close(chosen.weights, counts[kept] / 5.0, check_dtype=False)
    assert_members_are(chosen, ensemble, kept)
    left = fb.ensemble.prune(fn, None, ensemble, data, likelihood, 3)
    kept = torch.tensor(sorted(backward_by_hand(table, weights.tolist(), 3)))
    torch.testing.assert_close(left.weights, weights[kept] / weights[kept].sum())
    assert_members_are(left, ensemble, kept)
    assert torch.equal(torch.get_rng_state(), state)


def assert_members_are(chosen, ensemble, kept):
    assert set(chosen.members) == set(ensemble.members)
    for name, leaf in chosen.members.items():
        whole = ensemble.members[name]
        if isinstance(leaf, fb.Fixed):
            leaf, whole = leaf.tensor, whole.tensor
        assert torch.equal(leaf, whole[kept])
        assert leaf.data_ptr() != whole.data_ptr()
        assert not leaf.requires_grad


def test_the_mixture_that_is_selected_scores_what_the_table_says():
    fn, ensemble, x, y = trained()
    likelihood = fb.likelihoods.Categorical()
    table = table_by_hand(fn, ensemble, x, y)
    chosen = fb.ensemble.select(fn, None, ensemble, (x, y), likelihood, 4)
    got = fb.metrics.nll(fb.predict(fn, None, chosen, x, likelihood=likelihood), y)
    torch.testing.assert_close(got.item(), mixture_nll(table, greedy_by_hand(table, 4, True)))
    single = fb.ensemble.select(fn, None, ensemble, (x, y), likelihood, 1)
    assert got <= fb.metrics.nll(fb.predict(fn, None, single, x, likelihood=likelihood), y)


def test_an_ensemble_of_the_last_layer_takes_the_rest_from_params():
    fn, ensemble, x, y = trained()
    params = ensemble.member(0)
    head = fb.Ensemble({name: leaf for name, leaf in ensemble.members.items() if name.startswith("2.")})
    whole = fb.Ensemble(
        {name: head.members.get(name, leaf[:1].expand_as(leaf)) for name, leaf in ensemble.members.items()}
    )
    likelihood = fb.likelihoods.Categorical()
    for call in (fb.ensemble.select, fb.ensemble.prune):
        got = call(fn, params, head, (x, y), likelihood, 2)
        expected = call(fn, None, whole, (x, y), likelihood, 2)
        assert set(got.members) == set(head.members)
        assert torch.equal(got.members["2.bias"], expected.members["2.bias"])
        assert torch.equal(got.weights, expected.weights)


def test_a_chunk_size_changes_nothing():
    fn, ensemble, x, y = trained()
    likelihood = fb.likelihoods.Categorical()
    for call in (fb.ensemble.select, fb.ensemble.prune):
        got, expected = (
            call(fn, None, ensemble, (x, y), likelihood, 3, chunk_size=size) for size in (2, None)
        )
        assert torch.equal(got.members["0.bias"], expected.members["0.bias"])
        assert torch.equal(got.weights, expected.weights)


def test_pruning_nothing_is_the_ensemble_itself():
    weights = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0], dtype=F64)
    fn, ensemble, x, y = trained(weights=weights)
    got = fb.ensemble.prune(fn, None, ensemble, (x, y), fb.likelihoods.Categorical(), 6)
    torch.testing.assert_close(got.weights, ensemble.weights)
    assert all(torch.equal(got.members[name], leaf) for name, leaf in ensemble.members.items())


ERRORS = {
    "none": ({"num_members": 0}, ValueError, "(num_members=...)` should be at least 1, got 0."),
    "fraction": ({"num_members": 1.5}, TypeError, "(num_members=...)` should be an int"),
    "module": ({"fn": nn.Linear(4, 2)}, TypeError, "got an nn.Module"),
    "posterior": ({"ensemble": fb.Point({"w": torch.ones(2)})}, TypeError, "given an Ensemble, got P"),
    "mixture": (
        {"ensemble": fb.mixture(*(fb.Ensemble({name: torch.ones(2)}) for name in "wb"))},
        TypeError, "got a Mixture. If its components do",
    ),
    "likelihood": ({"likelihood": nn.CrossEntropyLoss()}, TypeError, "(likelihood=...)` should be one of"),
    "empty": ({"data": []}, ValueError, "(data=...)` should give at least one batch"),
    "tensor": ({"data": torch.ones(3, 4)}, TypeError, "(data=...)` should be an (x, y) tuple of tensors"),
    "labels": ({"data": (torch.ones(3, 4, dtype=F64), torch.full((3,), 5))}, ValueError, "(data=...)`"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["select", "prune"])
@pytest.mark.parametrize(("options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_refused(name, options, kind, message):
    fn, ensemble, x, y = trained()
    given = {
        "fn": fn, "params": None, "ensemble": ensemble, "data": (x, y), "num_members": 2,
        "likelihood": fb.likelihoods.Categorical(), **options,
    }  # fmt: skip
    with pytest.raises(kind, match=re.escape(message)) as caught:
        getattr(fb.ensemble, name)(**given)
    assert f"`ensemble.{name}(" in str(caught.value)


def test_more_members_than_there_are_is_refused_where_none_comes_back():
    fn, ensemble, x, y = trained()
    likelihood = fb.likelihoods.Categorical()
    with pytest.raises(ValueError, match="should be at most the number of members, 6, got 7"):
        fb.ensemble.prune(fn, None, ensemble, (x, y), likelihood, 7)
    with pytest.raises(
        ValueError, match=r"with_replacement=False\)` should be at most the number .* 6, got 7"
    ):
        fb.ensemble.select(fn, None, ensemble, (x, y), likelihood, 7, with_replacement=False)
    chosen = fb.ensemble.select(fn, None, ensemble, (x, y), likelihood, 7)
    torch.testing.assert_close(7 * chosen.weights, (7 * chosen.weights).round())


def test_a_member_that_predicts_nan_is_named():
    fn, ensemble, x, y = trained()
    ensemble.members["2.bias"][3] = torch.nan
    with pytest.raises(RuntimeError, match="log density of member 3 in `ensemble.select` is NaN at row 0"):
        fb.ensemble.select(fn, None, ensemble, (x, y), fb.likelihoods.Categorical(), 2)
