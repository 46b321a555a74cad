import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.func import vmap
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes import swag, training
from funcbayes.covariances import Diagonal, LowRankPlusDiagonal
from funcbayes.ensemble import member_seeds
from funcbayes.swag._state import block_size

F64 = torch.float64
SHAPES = {"w": (2, 3), "b": (2,), "gain": ()}  # ranks 2, 1, 0
NAMES = sorted(SHAPES)
P = 9
SGD = functools.partial(torch.optim.SGD, lr=0.1)
NORMAL = fb.likelihoods.Normal(0.5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def snapshots(n, seed=0, dtype=F64):
    g = seeded(seed)
    return [
        {k: torch.randn(s, generator=g, dtype=F64).to(dtype) for k, s in SHAPES.items()} for _ in range(n)
    ]


def nested(tree):
    return [{"w": tree["w"]}, (tree["b"], tree["gain"])]


def collected(trees, rank=20, first=None):
    state = swag.init(trees[0] if first is None else first, rank)
    for tree in trees:
        state = swag.update(state, tree)
    return state


def flat(tree):
    """Leaves (*batch, *s) as (*batch, P), in the order of the names."""
    return torch.cat(
        [tree[k].reshape(*tree[k].shape[: tree[k].ndim - len(SHAPES[k])], -1) for k in NAMES], -1
    )


def by_the_paper(trees, rank, scale=0.5, var_floor=1e-30):
    """Mean and dense covariance, Maddox et al. (2019), algorithm 1, with the rows that exist."""
    theta = torch.stack([flat(tree) for tree in trees]).double()
    n = len(theta)
    mean = theta.mean(0)
    var = ((theta - mean) ** 2).sum(0) / n
    rows = [theta[t] - theta[: t + 1].mean(0) for t in range(1, n)]
    rows = rows[-rank:] if rank else []
    covariance = torch.diag(var.clamp_min(var_floor))
    for row in rows:
        covariance += torch.outer(row, row) / max(len(rows) - 1, 1)
    return mean, scale * covariance


def dense(q):
    diagonal = torch.diag(flat(q.covariance.variance))
    if isinstance(q.covariance, Diagonal):
        return diagonal
    factors = torch.cat([q.covariance.factors[k].reshape(-1, num_columns(q)) for k in NAMES])
    return diagonal + factors @ factors.T


def num_columns(q):
    if isinstance(q.covariance, Diagonal):
        return 0
    return q.covariance.factors["gain"].shape[-1]


@pytest.mark.parametrize("rank", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 10, 23])
def test_mean_and_covariance_are_those_of_the_paper_with_the_rows_that_exist(n, rank):
    trees = snapshots(n)
    q = swag.posterior(collected(trees, rank))
    mean, covariance = by_the_paper(trees, rank)
    torch.testing.assert_close(flat(q.mean), mean)
    torch.testing.assert_close(dense(q), covariance)
    assert num_columns(q) == min(n - 1, rank)
    assert isinstance(q.covariance, LowRankPlusDiagonal if min(n - 1, rank) else Diagonal)


@pytest.mark.parametrize("rank", [0, 3])
def test_trees_of_any_kind_are_fitted_leaf_by_leaf(rank):
    trees = snapshots(7)
    plain, other = (swag.posterior(collected(t, rank)) for t in (trees, [nested(t) for t in trees]))
    for a, b in zip((plain.mean, plain.variance), (other.mean, other.variance), strict=True):
        assert torch.equal(a["w"], b[0]["w"])
        assert torch.equal(a["b"], b[1][0])
        assert torch.equal(a["gain"], b[1][1])


@pytest.mark.parametrize("scale", [0.5, 1.0, 0.07])
def test_scale_is_a_factor_of_the_whole_covariance(scale):
    trees = snapshots(6)
    q = swag.posterior(collected(trees, 3), scale=scale)
    torch.testing.assert_close(dense(q), by_the_paper(trees, 3, scale)[1])


def test_a_floor_is_the_least_variance_before_scale():
    trees = [{**tree, "gain": torch.tensor(2.0, dtype=F64)} for tree in snapshots(6)]
    q = swag.posterior(collected(trees, 0), scale=0.5, var_floor=0.25)
    torch.testing.assert_close(dense(q), by_the_paper(trees, 0, var_floor=0.25)[1])
    assert q.variance["gain"] == 0.125
    assert swag.posterior(collected(trees, 0)).variance["gain"] == 0.5e-30


def test_draws_have_the_covariance_of_the_formula_across_leaves_too():
    num_samples = 40_000
    trees = snapshots(6)
    q = swag.posterior(collected(trees, 4))
    mean, covariance = by_the_paper(trees, 4)
    deviations = flat(q.sample(num_samples, seed=0)) - mean
    products = deviations[:, :, None] * deviations[:, None, :]
    sem = products.std(0) / num_samples**0.5
    assert ((products.mean(0) - covariance).abs() < 5 * sem).all()
    across = covariance[: P - 6, P - 6 :]  # of w with the other leaves
    assert (across.abs() > 20 * sem[: P - 6, P - 6 :]).any()
    assert (deviations.mean(0).abs() < 5 * deviations.std(0) / num_samples**0.5).all()


@pytest.mark.parametrize("rank", [0, 4])
def test_the_log_density_is_that_of_a_dense_gaussian(rank):
    trees = snapshots(12)
    q = swag.posterior(collected(trees, rank))
    mean, covariance = by_the_paper(trees, rank)
    for point in snapshots(3, seed=5):
        expected = MultivariateNormal(mean, covariance).log_prob(flat(point))
        torch.testing.assert_close(q.log_prob(point), expected)


@pytest.mark.parametrize("n", [10, 300])
def test_variances_survive_far_from_zero(n):
    g = seeded(0)
    values = [1e4 + 1e-3 * torch.randn(500, generator=g, dtype=F64) for _ in range(n)]
    trees = [{"w": value.float()} for value in values]
    theta = torch.stack([tree["w"] for tree in trees])
    q = swag.posterior(collected(trees, 0), scale=1.0)
    expected = theta.double().var(0, unbiased=False)
    torch.testing.assert_close(q.variance["w"].double(), expected, rtol=1e-4, atol=0)
    # What the test is about: the other formula is off by many times the variance.
    naive = (theta**2).mean(0) - theta.mean(0) ** 2
    assert naive.abs().max() > 100 * q.variance["w"].max()


def test_variances_survive_a_drift_away_from_the_first_snapshot():
    trees = [
        {"w": torch.full((4,), float(t)) + 0.1 * torch.randn(4, generator=seeded(t))} for t in range(500)
    ]
    trees += [{"w": 500 + 0.1 * torch.randn(4, generator=seeded(t))} for t in range(500)]
    theta = torch.stack([tree["w"] for tree in trees]).double()
    q = swag.posterior(collected(trees, 2), scale=1.0)
    variance = q.covariance.variance["w"].double()
    torch.testing.assert_close(variance, theta.var(0, unbiased=False), rtol=1e-3, atol=0)


def starting_far_away(start, n):
    values = 0.05 * torch.randn(n, 16, generator=seeded(0))
    values[0] = start
    return values


def decaying(n):
    return 0.05 * 0.99 ** torch.arange(n)[:, None] + 1e-3 * torch.randn(n, 16, generator=seeded(0))


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (functools.partial(starting_far_away, 1e3, 20_000), 0),
        (functools.partial(starting_far_away, 10.0, 20_000), 3),
        (functools.partial(decaying, 5000), 0),
        (functools.partial(decaying, 5000), 3),
    ],
)
def test_variances_survive_many_snapshots_after_a_first_that_is_far_away(make, rank):
    values = make()
    q = swag.posterior(collected([{"w": value} for value in values], rank), scale=1.0)
    expected = values.double().var(0, unbiased=False)
    torch.testing.assert_close(q.covariance.variance["w"].double(), expected, rtol=2e-4, atol=0)


def test_a_diagonal_covariance_keeps_few_snapshots():
    assert max(len(collected(snapshots(n), 0).recent) for n in range(1, 20)) <= 4


def test_a_shared_state_is_updated_by_mapped_snapshots():
    trees, runs = snapshots(7), [snapshots(6, seed) for seed in (1, 2)]
    state = collected(trees, 0)

    def fitted(run):
        for tree in run:
            state_of_run.append(swag.update(state_of_run[-1], tree))
        return swag.posterior(state_of_run[-1])

    state_of_run = [state]
    stacked = [{k: torch.stack([run[t][k] for run in runs]) for k in SHAPES} for t in range(6)]
    mapped = vmap(fitted)(stacked)
    for k, run in enumerate(runs):
        alone = swag.posterior(collected([*trees, *run], 0))
        for got, expected in zip(tensors(mapped), tensors(alone), strict=True):
            torch.testing.assert_close(got[k], expected)


@pytest.mark.parametrize("n", [1, 4, 9])
def test_what_init_is_given_is_no_snapshot(n):
    ones = [{"w": torch.ones(3)}] * n
    q = swag.posterior(collected(ones, 2, first={"w": torch.full((3,), 100.0)}))
    assert torch.equal(q.mean["w"], torch.ones(3))
    assert (q.variance["w"] <= 1e-30).all()


def test_init_does_not_look_at_values():
    for value in (float("nan"), 7.0):
        state = swag.init({"w": torch.full((2,), value)})
        assert state.num_snapshots == 0
        assert torch.equal(state.origin["w"], torch.zeros(2))


def test_an_update_shares_what_it_keeps_and_changes_nothing():
    state = collected(snapshots(5), 4)
    params = snapshots(1, seed=3)[0]
    before, given = copy.deepcopy(state), copy.deepcopy(params)
    after = swag.update(state, params)
    assert all(new is old for new, old in zip(after.recent, state.recent, strict=False))
    assert after.origin is state.origin
    assert after.num_snapshots == state.num_snapshots + 1
    for a, b in zip(tensors(state), tensors(before), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(params[k], given[k]) for k in params)


def tensors(tree):
    return torch.utils._pytree.tree_leaves(tree)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_a_snapshot_is_copied(n):
    state = collected(snapshots(n), 4) if n else swag.init(snapshots(1)[0], 4)
    params = {**snapshots(1, seed=3)[0], "stat": fb.Fixed(torch.zeros(2))}
    after = swag.update(state, params)
    expected = swag.posterior(after)
    for leaf in (*(params[k] for k in SHAPES), params["stat"].tensor):
        leaf.add_(1.0)
    again = swag.posterior(after)
    for a, b in zip(tensors(again), tensors(expected), strict=True):
        assert torch.equal(a, b)


def test_no_more_snapshots_are_kept_than_a_few_beyond_the_rank():
    for rank in (0, 1, 5):
        state = collected(snapshots(40), rank)
        assert rank <= len(state.recent) < rank + block_size(rank)


def test_two_ways_from_one_state_do_not_meet():
    trees = snapshots(12)
    state = collected(trees[:9], 3)
    ways = [swag.update(swag.update(state, tree), tree) for tree in trees[9:11]]
    for way, tree in zip(ways, trees[9:11], strict=True):
        torch.testing.assert_close(dense(swag.posterior(way)), by_the_paper([*trees[:9], tree, tree], 3)[1])


def test_several_networks_are_updated_by_vmap_as_stacked_and_as_alone():
    runs = [snapshots(11, seed) for seed in range(3)]
    stacked = [{k: torch.stack([run[t][k] for run in runs]) for k in SHAPES} for t in range(11)]
    together = collected(stacked, 4)
    mapped = vmap(functools.partial(swag.init, rank=4))(stacked[0])
    for tree in stacked:
        mapped = vmap(swag.update)(mapped, tree)
    posteriors = [swag.posterior(together), vmap(swag.posterior)(mapped), vmap(swag.posterior)(together)]
    for k, run in enumerate(runs):
        alone = swag.posterior(collected(run, 4))
        for q in posteriors:
            for got, expected in zip(tensors(q), tensors(alone), strict=True):
                torch.testing.assert_close(got[k], expected)
    assert posteriors[0].covariance.factors["w"].shape == (3, 2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_moments_are_wide_and_the_posterior_has_the_dtype_of_the_parameters(dtype):
    values = torch.randn(600, 4, generator=seeded(0)).to(dtype) + 8
    q = swag.posterior(collected([{"w": v} for v in values], 3), scale=1.0, var_floor=1e-4)
    assert {t.dtype for t in tensors(q)} == {dtype}
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps + 1e-5, "atol": 0}
    torch.testing.assert_close(q.mean["w"].double(), values.double().mean(0), **tolerance)
    variance = values.double().var(0, unbiased=False)
    torch.testing.assert_close(q.covariance.variance["w"].double(), variance, **tolerance)


def test_large_and_small_leaves_are_summed_alike():
    g = seeded(0)
    shapes = {"large": (150_000, 2), "b": (3,), "other": (5, 1), "empty": (0, 2), "wide": (2, 2)}
    trees = [
        {k: torch.randn(s, generator=g, dtype=F64 if k == "wide" else None) for k, s in shapes.items()}
        for _ in range(9)
    ]
    q = swag.posterior(collected(trees, 2), scale=1.0)
    for k in shapes:
        theta = torch.stack([tree[k] for tree in trees])
        torch.testing.assert_close(q.mean[k], theta.mean(0))
        variance = ((theta - theta.mean(0)) ** 2).mean(0)
        torch.testing.assert_close(q.covariance.variance[k], variance, rtol=1e-4, atol=1e-6)


def test_fixed_leaves_are_carried_and_integer_leaves_left_out():
    trees = snapshots(3)
    trees = [{**tree, "mean": fb.Fixed(torch.full((2,), float(t)))} for t, tree in enumerate(trees)]
    trees = [{**tree, "table": torch.arange(3)} for tree in trees]
    q = swag.posterior(collected(trees, 2))
    assert torch.equal(q.mean["mean"].tensor, torch.full((2,), 2.0))
    assert set(q.mean) == {*SHAPES, "mean"}
    assert set(q.covariance.variance) == set(SHAPES)
    assert torch.equal(q.sample(3, seed=0)["mean"].tensor, torch.full((3, 2), 2.0))


def test_parameters_with_gradients_leave_no_graph():
    params = {"w": torch.ones(2, requires_grad=True)}
    with torch.inference_mode():
        state = collected([params] * 3, 2)
    assert not any(t.requires_grad or t.is_inference() for t in tensors(state))


def test_a_state_and_its_posterior_are_saved_and_loaded(tmp_path):
    trees = [{**tree, "mean": fb.Fixed(torch.ones(2))} for tree in snapshots(7)]
    state = collected(trees[:5], 3)
    fb.save(state, tmp_path / "state.safetensors")
    loaded = fb.load(tmp_path / "state.safetensors")
    for tree in trees[5:]:
        state, loaded = swag.update(state, tree), swag.update(loaded, tree)
    q = swag.posterior(loaded)
    fb.save(q, tmp_path / "q.safetensors")
    for other in (q, fb.load(tmp_path / "q.safetensors")):
        for a, b in zip(tensors(swag.posterior(state)), tensors(other), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: swag.posterior(swag.init(snapshots(1)[0])), RuntimeError, "swag.update(state, params)"),
        (lambda: swag.init(snapshots(1)[0], rank=-1), ValueError, "at least 0, got -1"),
        (lambda: swag.init(snapshots(1)[0], rank=2.0), TypeError, "should be an int, got float"),
        (lambda: swag.init(snapshots(1)[0], rank=True), TypeError, "should be an int, got bool"),
        (lambda: swag.init({"i": torch.arange(3)}), ValueError, "leaf of floating point, got none"),
        (lambda: updated({"w": torch.ones(2, 3)}), ValueError, "'b' is missing"),
        (lambda: updated({**snapshots(1)[0], "c": torch.ones(2)}), ValueError, "'c' is not expected"),
        (
            lambda: updated({**snapshots(1)[0], "w": torch.ones(3, 2)}),
            ValueError,
            "'w' has shape (3, 2), not (2, 3)",
        ),
        (lambda: fitted_to(scale=0.0), ValueError, "`swag.posterior(scale=...)` should be positive"),
        (lambda: fitted_to(scale="x"), TypeError, "posterior(scale=...)` should be a number, got str."),
        (lambda: fitted_to(var_floor="x"), TypeError, "(var_floor=...)` should be a number, got str."),
        (lambda: fitted_to(scale=float("inf")), ValueError, "positive and finite, got inf"),
        (
            lambda: fitted_to(var_floor=-1e-3),
            ValueError,
            "swag.posterior(var_floor=...)` should be at least 0",
        ),
        (lambda: fitted_to(value=float("nan")), RuntimeError, "some of 'gain' are not"),
        (lambda: fitted_to(value=float("inf")), RuntimeError, "some of 'gain' are not"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, words):
    with pytest.raises(error, match=re.escape(words)):
        call()


def updated(params):
    return swag.update(swag.init(snapshots(1)[0]), params)


def fitted_to(value=0.0, **options):
    trees = [*snapshots(2), {**snapshots(1)[0], "gain": torch.tensor(value, dtype=F64)}]
    return swag.posterior(collected(trees, 3), **options)


# Training ------------------------------------------------------------------------------------------


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((-1, -2)))


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))


MODELS = {"mlp": (mlp, (4,)), "conv": (ConvNet, (1, 5, 5))}


def regression(shape, n=13):
    g = seeded(0)
    return torch.randn(n, *shape, generator=g, dtype=F64), torch.randn(n, 1, generator=g, dtype=F64)


def start(make, num=5):
    return fb.ensemble.init(lambda: make().double(), num, seed=1)


def one(members, k=0):
    return {name: leaf[k] for name, leaf in members.items()}


def fit(fn, params, data, **options):
    options = {"optimizer": SGD, "num_epochs": 6, "seed": 3, **options}
    return swag.fit(fn, params, data, NORMAL, **options)


def assert_same(got, expected, **tolerance):
    for a, b in zip(tensors(got), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def recorded(fn, params, data, **options):
    """The parameters after every epoch, by the callback of plain training."""
    seen = []

    def record(epoch, loss, params):
        seen.append(params)

    options = {"optimizer": SGD, "num_epochs": 6, "seed": 3, **options}
    training.fit(fn, params, data, NORMAL, callback=record, **options)
    return seen


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("start_epoch", "every"), [(0, 1), (2, 1), (1, 2), (5, 1), (0, 6)])
def test_the_ends_of_epochs_are_collected(model, start_epoch, every):
    make, shape = MODELS[model]
    fn, members = start(make, 1)
    data = regression(shape)
    seen = recorded(fn, one(members), data, batch_size=5)
    chosen = [p for e, p in enumerate(seen) if e >= start_epoch and (e - start_epoch + 1) % every == 0]
    got = fit(
        *(fn, one(members), data),
        batch_size=5,
        start_epoch=start_epoch,
        collect_every=every,
        rank=2,
        scale=0.3,
        var_floor=1e-3,
    )
    assert_same(got, swag.posterior(collected(chosen, 2), 0.3, 1e-3))


@pytest.mark.parametrize(("start_epoch", "every"), [(0, 1), (2, 3), (5, 4)])
def test_the_ends_of_steps_are_collected(start_epoch, every):
    x, y = regression((4,), 12)
    fn, members = start(lambda: nn.Linear(4, 1), 1)
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
    leaves = {k: v.clone().requires_grad_() for k, v in one(members).items()}
    optimizer, seen = SGD(list(leaves.values())), []
    for epoch in range(6):
        for a, b in batches:
            optimizer.zero_grad()
            (-NORMAL.log_prob(fn(leaves, a), b).mean()).backward()
            optimizer.step()
            if epoch >= start_epoch:
                seen.append({k: v.detach().clone() for k, v in leaves.items()})
    options = {"start_epoch": start_epoch, "collect_every": every, "collect_interval": "step", "rank": 3}
    got = fit(fn, one(members), batches, **options)
    assert_same(got, swag.posterior(collected(seen[every - 1 :: every], 3)))


def test_the_ends_of_cycles_of_the_learning_rate_are_collected():
    x, y = regression((4,), 12)
    fn, members = start(lambda: nn.Linear(4, 1), 1)
    cosine = functools.partial(torch.optim.lr_scheduler.CosineAnnealingWarmRestarts, T_0=4)
    leaves = {k: v.clone().requires_grad_() for k, v in one(members).items()}
    optimizer, seen = SGD(list(leaves.values())), []
    scheduler = cosine(optimizer)
    for epoch in range(16):
        optimizer.zero_grad()
        (-NORMAL.log_prob(fn(leaves, x), y).mean()).backward()
        optimizer.step()
        scheduler.step()
        if epoch >= 4 and epoch % 4 == 3:
            assert optimizer.param_groups[0]["lr"] == 0.1  # the next cycle begins
            seen.append({k: v.detach().clone() for k, v in leaves.items()})
    got = fit(
        *(fn, one(members), (x, y)),
        scheduler=cosine,
        num_epochs=16,
        start_epoch=4,
        collect_every=4,
    )
    assert len(seen) == 3
    assert_same(got, swag.posterior(collected(seen)))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("model", MODELS)
def test_networks_fitted_at_once_are_those_fitted_alone(model, interval, chunk_size):
    make, shape = MODELS[model]
    fn, members = start(make)
    options = {"batch_size": 5, "rank": 3, "start_epoch": 1, "collect_interval": interval}
    data = regression(shape)
    together = fit(fn, members, data, stacked=True, chunk_size=chunk_size, **options)
    assert {t.shape[0] for t in tensors(together)} == {5}
    for k, seed in enumerate(member_seeds(3, 5)):
        alone = fit(fn, one(members, k), data, **{**options, "seed": seed})
        for a, b in zip(tensors(together), tensors(alone), strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-7, atol=1e-10)


def test_networks_fitted_at_once_are_a_mixture():
    fn, members = start(mlp, 3)
    data = regression((4,))
    stacked = fit(fn, members, data, stacked=True, batch_size=5)
    mixed = fb.mixture(stacked, stacked=True)
    prediction = fb.predict(fn, None, mixed, data[0], num_samples=6, seed=0)
    assert prediction.samples.shape == (6, 13, 1)
    for name, leaf in mixed.mean.items():
        torch.testing.assert_close(leaf, stacked.mean[name].mean(0))


def test_batch_norm_statistics_are_those_of_the_last_snapshot():
    fn, members = start(ConvNet, 1)
    data = regression((1, 5, 5))
    seen = recorded(fn, one(members), data, batch_size=5)
    q = fit(fn, one(members), data, batch_size=5, collect_every=4)
    assert torch.equal(q.mean["norm.running_mean"].tensor, seen[3]["norm.running_mean"].tensor)
    assert "norm.running_mean" not in q.covariance.variance


@pytest.mark.parametrize("stacked", [False, True])
def test_only_chosen_leaves_are_trained_and_covered(stacked):
    fn, members = start(ConvNet, 2)
    params = members if stacked else one(members)
    data = regression((1, 5, 5))
    q = fit(fn, params, data, where="head.*", stacked=stacked)
    assert set(q.covariance.variance) == {"head.weight", "head.bias"}
    assert {k for k, v in q.mean.items() if not isinstance(v, fb.Fixed)} == {"head.weight", "head.bias"}
    assert {k for k, v in q.mean.items() if isinstance(v, fb.Fixed)} == {
        f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    if not stacked:
        seen = recorded(fn, params, data, where="head.*")
        covered = [{k: v for k, v in p.items() if k in q.mean} for p in seen]
        assert_same(q, swag.posterior(collected(covered)))
        assert fb.predict(fn, params, q, data[0], num_samples=3, seed=0).samples.shape == (3, 13, 1)


def test_params_in_any_container_are_trained_and_collected():
    def linear(params, x):
        (w,), b = params
        return x @ w + b

    g = seeded(2)
    params = [(torch.randn(4, 1, generator=g, dtype=F64),), torch.zeros(1, dtype=F64)]
    q = fit(linear, params, regression((4,)), where="0.*")
    assert q.mean[0][0].shape == (4, 1)
    assert q.covariance.factors[0][0].shape == (4, 1, 5)
    assert fb.predict(linear, params, q, torch.ones(2, 4, dtype=F64), num_samples=3).samples.shape == (
        3,
        2,
        1,
    )


def test_nothing_is_changed_and_equal_seeds_give_equal_posteriors():
    fn, members = start(mlp, 2)
    before = {k: v.clone() for k, v in members.items()}
    state = torch.get_rng_state()
    first, second = (
        fit(fn, members, regression((4,)), stacked=True, batch_size=5, num_epochs=3) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))
    assert all(torch.equal(members[k], before[k]) for k in members)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_callback_sees_what_training_shows_and_may_end_it():
    fn, members = start(mlp, 2)
    data = regression((4,))
    seen = []

    def stop_after_three(epoch, loss, params):
        seen.append((loss, params))
        return epoch == 2

    got = fit(fn, one(members), data, callback=stop_after_three)
    assert all(isinstance(loss, float) and params["0.weight"].shape == (6, 4) for loss, params in seen)
    assert_same(got, fit(fn, one(members), data, num_epochs=3))
    seen.clear()
    got = fit(fn, members, data, callback=stop_after_three, stacked=True)
    assert all(loss.shape == (2,) and params["0.weight"].shape == (2, 6, 4) for loss, params in seen)
    assert_same(got, fit(fn, members, data, num_epochs=3, stacked=True), rtol=1e-7, atol=1e-10)
    with pytest.raises(RuntimeError, match=r"swag.fit\(callback=...\).*the first snapshot"):
        fit(fn, one(members), data, callback=stop_after_three, start_epoch=4)


class Untouched:
    """Data that would show that training had begun."""

    def __iter__(self):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"start_epoch": 6}, ValueError, "should be below `num_epochs=6`"),
        ({"start_epoch": -1}, ValueError, "start_epoch=...)` should be at least 1, got -1"),
        ({"start_epoch": 1.5}, TypeError, "start_epoch=...)` should be an int"),
        ({"collect_every": 0}, ValueError, "collect_every=...)` should be at least 1"),
        ({"collect_every": 7}, ValueError, "should be at most 6, the number of epochs"),
        ({"collect_every": 4, "start_epoch": 3}, ValueError, "should be at most 3, the number of epochs"),
        ({"collect_interval": "batch"}, ValueError, "should be 'epoch' or 'step', got 'batch'"),
        ({"rank": -1}, ValueError, "at least 0, got -1"),
        ({"scale": -1.0}, ValueError, "`swag.fit(scale=...)` should be positive"),
        ({"var_floor": float("nan")}, ValueError, "`swag.fit(var_floor=...)` should be at least 0"),
        ({"num_epochs": 0}, ValueError, "`swag.fit(num_epochs=...)` should be at least 1"),
        ({"chunk_size": 0, "stacked": True}, ValueError, "`swag.fit(chunk_size=...)` should be at least 1"),
        ({"optimizer": 3}, TypeError, "`swag.fit(optimizer=...)`"),
        ({"scheduler_interval": "day"}, ValueError, "`swag.fit(scheduler_interval=...)`"),
        ({"where": "nothing"}, ValueError, "none that `where='nothing'` chooses"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(options, error, words):
    fn, members = start(mlp, 2)
    params = members if options.get("stacked") else one(members)
    with pytest.raises(error, match=re.escape(words)):
        fit(fn, params, Untouched(), **options)


def test_too_few_steps_are_refused():
    fn, members = start(mlp, 1)
    loader = DataLoader(TensorDataset(*regression((4,), 12)), batch_size=5)
    with pytest.raises(ValueError, match="should be at most 18, the number of steps"):
        fit(fn, one(members), loader, collect_interval="step", collect_every=19)
    fit(fn, one(members), loader, collect_interval="step", collect_every=18)


def test_modules_and_leaves_that_disagree_on_the_number_of_networks_are_refused():
    fn, members = start(mlp, 2)
    data = regression((4,))
    with pytest.raises(TypeError, match="got an nn.Module"):
        fit(mlp(), one(members), data)
    with pytest.raises(ValueError, match=r"stacked=True\)` should be given leaves with one leading axis"):
        fit(fn, {**members, "0.bias": members["0.bias"][0]}, data, stacked=True)
    with pytest.raises(ValueError, match="at least one leaf, got an empty tree"):
        fit(fn, {}, data, stacked=True)
