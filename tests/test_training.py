import collections
import functools
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import funcbayes as fb
from funcbayes._random import fold
from funcbayes.training._adversarial import steps_of
from funcbayes.training._data import open_data
from funcbayes.training._loader import RandomState

F64 = torch.float64
SGD = functools.partial(torch.optim.SGD, lr=0.1)
LBFGS = functools.partial(torch.optim.LBFGS, max_iter=50, line_search_fn="strong_wolfe")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def regression(n=12, seed=0):
    g = seeded(seed)
    x = torch.randn(n, 3, generator=g, dtype=F64)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64) + 0.1 * torch.randn(
        n, 1, generator=g, dtype=F64
    )


def linear(params, x):
    return x @ params["w"]


def start(seed=1):
    return {"w": torch.randn(3, 1, generator=seeded(seed), dtype=F64)}


def fit(fn=linear, params=None, data=None, likelihood=None, **options):
    options = {"optimizer": SGD, "num_epochs": 1, "seed": 0, **options}
    params = start() if params is None else params
    data = regression() if data is None else data
    return fb.training.fit(fn, params, data, likelihood or fb.likelihoods.Normal(0.5), **options)


def test_one_step_of_sgd_is_the_one_by_hand():
    x, y = regression()
    n, noise_std, precision = len(x), 0.5, 3.0
    w = start()["w"]
    gradient = x.T @ (x @ w - y) / noise_std**2 / n + precision * w / n
    got = fit(prior_precision=precision)
    torch.testing.assert_close(got["w"], w - 0.1 * gradient)


def test_the_prior_makes_it_ridge_regression():
    x, y = regression()
    noise_std, precision = 0.5, 4.0
    # The MAP of w ~ N(0, 1/precision), y ~ N(x w, noise_std^2).
    expected = torch.linalg.solve(x.T @ x / noise_std**2 + precision * torch.eye(3, dtype=F64), x.T @ y)
    expected = expected / noise_std**2
    got = fit(data=(x, y), optimizer=LBFGS, prior_precision=precision, num_epochs=2)
    torch.testing.assert_close(got["w"], expected, rtol=1e-6, atol=1e-8)


def test_num_data_is_the_number_the_prior_is_divided_by():
    x, y = regression(12)
    twice = (torch.cat([x, x]), torch.cat([y, y]))
    got = fit(data=twice, prior_precision=2.0, num_data=12, num_epochs=3)
    torch.testing.assert_close(got["w"], fit(data=(x, y), prior_precision=2.0, num_epochs=3)["w"])


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_loader_counts_the_rows_of_its_sampler(drop_last):
    x, y = regression(12)
    loader = DataLoader(TensorDataset(x, y), batch_size=12, drop_last=drop_last)
    got = fit(data=loader, prior_precision=2.0)
    torch.testing.assert_close(got["w"], fit(data=(x, y), prior_precision=2.0)["w"])


@pytest.mark.parametrize("batch_size", [None, 5])
def test_inputs_in_a_mapping_that_is_no_dict_are_those_in_a_dict(batch_size):
    x, y = regression()
    inputs = {"left": x[:, :1], "right": x[:, 1:]}

    def joined(params, x):
        return linear(params, torch.cat([x["left"], x["right"]], -1))

    options = {"num_epochs": 3, "batch_size": batch_size}
    expected = fit(data=(x, y), **options)["w"]
    got = fit(joined, data=(collections.UserDict(inputs), y), **options)["w"]
    torch.testing.assert_close(got, expected)
    batches = [
        (collections.UserDict({k: v[rows] for k, v in inputs.items()}), y[rows])
        for rows in torch.arange(len(x)).split(5)
    ]
    plain = [(x[rows], y[rows]) for rows in torch.arange(len(x)).split(5)]
    torch.testing.assert_close(fit(joined, data=batches)["w"], fit(data=plain)["w"])


def test_numbers_of_numpy_are_taken_as_ints():
    got = fit(seed=np.int64(3), batch_size=np.int64(5), num_epochs=np.int64(2))
    torch.testing.assert_close(got, fit(seed=3, batch_size=5, num_epochs=2), rtol=0, atol=0)


def test_batches_cover_every_row_once_an_epoch_and_keep_the_last_one():
    seen = []

    def recording(params, x):
        seen.append(x[:, 0].detach().clone())
        return x * params["w"]

    x = torch.arange(10.0)[:, None]
    params = {"w": torch.zeros(())}
    fit(
        recording,
        params,
        (x, x),
        batch_size=4,
        num_epochs=2,
        optimizer=functools.partial(torch.optim.SGD, lr=0.0),
    )
    batches = seen[1:]  # the first evaluation only looks
    assert [len(b) for b in batches] == [4, 4, 2] * 2
    for epoch in (batches[:3], batches[3:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(batches[:3]), torch.cat(batches[3:]))


@pytest.mark.parametrize("kind", ["tensors", "loader", "generator"])
def test_a_fit_is_a_function_of_its_seed_and_leaves_the_global_state(kind):
    x, y = regression()

    def data():
        if kind == "tensors":
            return x, y
        generator = seeded(5) if kind == "generator" else None
        return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=generator)

    options = {"batch_size": 4 if kind == "tensors" else None, "num_epochs": 2}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = fit(data=data(), **options)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = fit(data=data(), **options)
    other = fit(data=data(), **{**options, "seed": 1})
    assert torch.equal(first["w"], second["w"])
    assert not torch.equal(first["w"], other["w"])


def test_a_loaders_own_generator_is_put_back():
    generator = seeded(5)
    loader = DataLoader(TensorDataset(*regression()), batch_size=4, shuffle=True, generator=generator)
    state = generator.get_state()
    first = fit(data=loader)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(first["w"], fit(data=loader)["w"])


def test_streams_do_not_disturb_each_other():
    a, b = RandomState([], 1), RandomState([], 2)
    alone = RandomState([], 1)
    with alone.installed():
        expected = torch.rand(4)
    with a.installed():
        first = torch.rand(2)
    with b.installed():
        torch.rand(3)
    with a.installed():
        assert torch.equal(torch.cat([first, torch.rand(2)]), expected)


def test_without_a_seed_torchs_global_seed_governs():
    torch.manual_seed(3)
    first = fit(batch_size=4, seed=None)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randint(0, 2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(3)
    assert torch.equal(fit(batch_size=4, seed=None)["w"], first["w"])


class Noisy(nn.Module):
    """Noise that is not dropout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x + torch.randn_like(x)) if self.training else self.linear(x)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), "noise"])
def test_noise_in_training_is_a_function_of_the_seed(layer):
    net = Noisy() if layer == "noise" else nn.Sequential(layer, nn.Linear(3, 1))
    fn, params = fb.make_functional(net.double())
    state = torch.get_rng_state()
    first, second, other = (fit(fn, params, num_epochs=2, seed=s) for s in (0, 0, 1))
    quiet = fit(lambda p, x: fn({k: v for k, v in p.items()}, x), params, num_epochs=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name in params:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])
        assert torch.equal(first[name], quiet[name])


def test_batch_norm_statistics_are_those_of_the_module_trained_by_hand():
    x, y = regression()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    fn, params = fb.make_functional(net)
    got = fit(fn, params, (x, y), fb.likelihoods.Normal(1.0), num_epochs=5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    untouched = {k: v.clone() for k, v in net.state_dict().items()}
    assert all(torch.equal(untouched[k], params[k]) for k in params)
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * (net(x) - y).square().mean()).backward()
        optimizer.step()
    assert set(got) == set(net.state_dict())
    for name, expected in net.state_dict().items():
        value = tensor_of(got[name])
        assert isinstance(got[name], fb.Fixed) == ("running" in name or "num_batches" in name)
        torch.testing.assert_close(value, expected)
    net.eval()
    torch.testing.assert_close(fn(got, x), net(x).detach())
    # What comes out can go in again.
    again = fit(fn, got, (x, y))
    assert int(again["1.num_batches_tracked"].tensor) == 6


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_the_scheduler_steps_where_it_is_told(interval):
    rates = []

    def make(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: rates.append(t) or 0.5**t)

    x, y = regression()
    fit(batch_size=4, num_epochs=2, scheduler=make, scheduler_interval=interval)
    assert rates == list(range(3 if interval == "epoch" else 7))
    once = fit(num_epochs=2, scheduler=make, scheduler_interval=interval)
    w = start()["w"]
    for rate in (0.1, 0.05):
        w = w - rate * x.T @ (x @ w - y) / 0.25 / len(x)
    torch.testing.assert_close(once["w"], w)


def test_a_scheduler_that_watches_the_loss_sees_it():
    plateau = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau,
        factor=0.0,
        patience=0,
        threshold=1e9,
        threshold_mode="abs",
    )
    moved = fit(num_epochs=3, scheduler=plateau)
    # The first loss is the best so far; the second does not beat it by the threshold, so the rate is 0.
    torch.testing.assert_close(moved["w"], fit(num_epochs=2)["w"])


def test_long_gradients_are_shortened_to_the_norm_over_all_leaves():
    params = {"a": torch.tensor([3.0, 4.0], dtype=F64), "b": torch.tensor(12.0, dtype=F64)}
    x = torch.ones(1, 1, dtype=F64)

    def fn(params, x):
        return (x * (params["a"] @ params["a"] + params["b"] ** 2).sqrt()).sum(1)

    # The outputs are |theta| = 13, whose gradient has length 1 in the direction of theta.
    y = torch.tensor([10.0], dtype=F64)
    got = fit(fn, params, (x, y), fb.likelihoods.Normal(1.0), max_grad_norm=0.5)
    for name, value in params.items():
        torch.testing.assert_close(got[name], value - 0.1 * 0.5 * value / 13, rtol=1e-6, atol=1e-6)


def test_lbfgs_finds_the_least_squares_solution():
    x, y = regression()
    got = fit(optimizer=LBFGS)
    torch.testing.assert_close(got["w"], torch.linalg.lstsq(x, y).solution, rtol=1e-5, atol=1e-6)


def test_where_chooses_the_leaves_that_move():
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double())
    got = fit(fn, params, where="1.*")
    assert torch.equal(got["0.weight"], params["0.weight"])
    assert got["0.weight"].data_ptr() != params["0.weight"].data_ptr()
    assert not torch.equal(got["1.weight"], params["1.weight"])


def test_trees_of_any_kind_are_trained_and_integers_passed_by():
    x, y = regression()

    def fn(params, x):
        (w, shift), [power] = params
        return (x @ w + shift) ** power["p"]

    params = ((start()["w"], torch.zeros((), dtype=F64)), [{"p": torch.tensor(1)}])
    got = fit(fn, params, (x, y))
    flat = fit(lambda p, x: x @ p["w"] + p["b"], {"w": params[0][0], "b": params[0][1]}, (x, y))
    torch.testing.assert_close(got[0][0], flat["w"])
    torch.testing.assert_close(got[0][1], flat["b"])
    assert int(got[1][0]["p"]) == 1
    torch.testing.assert_close(fit(lambda w, x: x @ w, start()["w"], (x, y)), fit()["w"])


def test_inputs_may_be_a_tree():
    x, y = regression()
    params = {"w": start()["w"], "v": start()["w"]}

    def fn(params, x):
        return x["first"] @ params["w"] + x["rest"][0] @ params["v"]

    got = fit(fn, params, ({"first": x, "rest": [x.flip(1)]}, y), batch_size=5, num_epochs=2)
    joint = fit(
        lambda p, z: z @ torch.cat([p["w"], p["v"]]),
        params,
        (torch.cat([x, x.flip(1)], 1), y),
        batch_size=5,
        num_epochs=2,
    )
    for name in got:
        torch.testing.assert_close(got[name], joint[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_grad_mode_will_do_and_nothing_given_is_changed(mode):
    expected = fit(batch_size=4)
    with mode():
        params, data = start(), regression()
        if mode is torch.enable_grad:
            params["w"].requires_grad_()
        before = params["w"].detach().clone()
        was_enabled, was_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        got = fit(params=params, data=data, batch_size=4)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (was_enabled, was_inference)
    assert torch.equal(got["w"], expected["w"])
    assert not got["w"].requires_grad
    assert got["w"].grad_fn is None
    assert not got["w"].is_inference()
    assert torch.equal(params["w"], before)
    assert params["w"].grad is None


def test_held_leaves_and_data_may_come_from_inference_mode():
    def scaled(params, x):
        return x @ (params["w"] * params["scale"]) * params["gain"].exp()

    with torch.inference_mode():
        params = {**start(), "scale": torch.tensor(2.0, dtype=F64), "gain": torch.tensor(0.1, dtype=F64)}
        data = regression()
    usual = {name: leaf.clone() for name, leaf in params.items()}
    got = fit(scaled, params, data, where=["w", "gain"], num_epochs=2)
    expected = fit(scaled, usual, regression(), where=["w", "gain"], num_epochs=2)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_no_result_is_a_tensor_that_was_given():
    fn, params = fb.make_functional(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)))
    params = {**params, "1.running_mean": fb.Fixed(torch.ones(2))}
    x, y = (t.float() for t in regression())
    before = [leaf.clone() for leaf in map(tensor_of, params.values())]
    got = fit(fn, params, (x, y), where="2.*")
    given = {tensor_of(leaf).data_ptr() for leaf in params.values()}
    assert all(tensor_of(leaf).data_ptr() not in given for leaf in got.values())
    assert all(torch.equal(tensor_of(leaf), b) for leaf, b in zip(params.values(), before, strict=True))


def tensor_of(leaf):
    return leaf.tensor if isinstance(leaf, fb.Fixed) else leaf


def test_the_loss_of_an_epoch_counts_every_row_the_same():
    losses = []
    x, y = regression()
    still = functools.partial(torch.optim.SGD, lr=0.0)
    fit(data=(x, y), batch_size=5, optimizer=still, callback=lambda epoch, loss, params: losses.append(loss))
    expected = -fb.likelihoods.Normal(0.5).log_prob(linear(start(), x), y).mean()
    assert losses == [pytest.approx(expected.item())]


def test_the_callback_sees_every_epoch_and_can_end_training():
    seen = []

    def callback(epoch, loss, params):
        seen.append((epoch, loss, params["w"]))
        return epoch == 2

    got = fit(num_epochs=10, callback=callback)
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]
    assert torch.equal(got["w"], seen[-1][2])
    x, y = regression()
    outputs = x @ seen[0][2]
    expected = -fb.likelihoods.Normal(0.5).log_prob(outputs, y).mean()
    assert seen[1][1] == pytest.approx(expected.item())
    torch.testing.assert_close(seen[0][2], fit()["w"])  # a copy: later steps did not change it


def test_progress_shows_a_bar(capfd):
    fit(num_epochs=2, progress=True)
    assert "training.fit" in capfd.readouterr().err


def test_bfloat16_stays():
    x, y = (t.bfloat16() for t in regression())
    got = fit(params={"w": start()["w"].bfloat16()}, data=(x, y), prior_precision=1.0)
    assert got["w"].dtype == torch.bfloat16


class Once:
    """Pretends to be a re-iterable."""

    def __init__(self):
        self.batches = iter([regression()])

    def __iter__(self):
        return self.batches


x, y = regression()
ERRORS = {
    "num_epochs": ({"num_epochs": 0}, ValueError, "(num_epochs=...)` should be at least 1, got 0."),
    "fraction of an epoch": ({"num_epochs": 1.5}, TypeError, "`training.fit(num_epochs=...)` should be"),
    "loss": (
        {"likelihood": nn.CrossEntropyLoss()}, TypeError, "`training.fit(likelihood=...)` should be one of"
    ),
    "likelihood class": (
        {"likelihood": fb.likelihoods.Categorical},
        TypeError,
        "`training.fit(likelihood=...)` should be one of",
    ),
    "text for a number": ({"batch_size": "4"}, TypeError, "`training.fit(batch_size=...)` should be"),
    "batch_size": ({"batch_size": 0}, ValueError, "(batch_size=...)` should be at least 1, got 0."),
    "loader with batch_size": ({"data": [(x, y)], "batch_size": 4}, ValueError, "should be left out"),
    "prior": ({"prior_precision": -1.0}, ValueError, "at least 0 and finite, got -1.0."),
    "num_data": ({"num_data": 0}, ValueError, "(num_data=...)` should be at least 1"),
    "grad norm": ({"max_grad_norm": 0.0}, ValueError, "positive or None, got 0.0."),
    "interval": ({"scheduler_interval": "batch"}, ValueError, "'epoch' or 'step', got 'batch'"),
    "module": ({"fn": nn.Linear(3, 1)}, TypeError, "got an nn.Module, Linear. Wrap it with `fn, params ="),
    "no function": ({"fn": 3}, TypeError, "function of (params, x), got int"),
    "iterator": ({"data": iter([(x, y)])}, TypeError, "got list_iterator, which can be gone through once"),
    "generator": ({"data": (b for b in [(x, y)])}, TypeError, "Write `list(data)`"),
    "once": ({"data": Once(), "num_epochs": 2}, ValueError, "one batch an epoch, got none in epoch 1"),
    "no batches": ({"data": []}, ValueError, "at least one batch an epoch, got none in epoch 0"),
    "no rows": ({"data": (x[:0], y[:0])}, ValueError, "at least one row, got none"),
    "row counts": ({"data": (x[:5], y)}, ValueError, "got shapes (5, 3) for x and (12, 1) for y"),
    "row counts in a batch": ({"data": [(x[:5], y)]}, ValueError, "as many rows of x as of y, got 5"),
    "dataset": ({"data": TensorDataset(x, y)}, TypeError, "gives single rows. Write `DataLoader"),
    "tensor": ({"data": x}, TypeError, "got Tensor"),
    "array": ({"data": (x, y.numpy())}, TypeError, "got ndarray for y. Write `torch.as_tensor(y)`"),
    "array x": ({"data": (x.numpy(), y)}, TypeError, "got ndarray for x. Write `torch.as_tensor(x)`"),
    "list of tensors": ({"data": [x, y]}, TypeError, "got Tensor. Two tensors that hold all rows"),
    "no pairs": ({"data": [{"x": x}]}, TypeError, "batches (x, y) with a tensor y, got dict"),
    "optimizer object": (
        {"optimizer": torch.optim.SGD([x.clone()], lr=0.1)}, TypeError, "(optimizer=...)` should be"
    ),
    "no optimizer": ({"optimizer": lambda leaves: None}, TypeError, "should make a torch.optim.Optimizer"),
    "optimizer of others": (
        {"optimizer": lambda _: torch.optim.SGD([x.clone()], lr=0.1)}, ValueError, "one of other tensors"
    ),
    "no scheduler": ({"scheduler": lambda optimizer: 3}, TypeError, "LRScheduler, got int"),
    "nothing to train": ({"params": {"w": torch.tensor([1])}}, ValueError, "to train, got none"),
    "where": ({"where": "head.*"}, ValueError, "got none that `where='head.*'` chooses"),
    "targets": ({"data": (x, y[:, 0])}, ValueError, "training.fit(data=...)"),
    "bootstrap of a loader": (
        {"data": [(x, y)], "bootstrap": True},
        ValueError,
        "`training.fit(bootstrap=True)` should be given data in tensors, which can be resampled, got list",
    ),
    "adversarial": ({"adversarial": 0.0}, ValueError, "(adversarial=...)` should be a positive fraction"),
    "adversarial tokens": (
        {"data": (torch.arange(12), y), "adversarial": 0.01}, TypeError, "inputs of floating point"
    ),
    "adversarial infinity": (
        {"data": (x / 0, y), "adversarial": 0.01}, ValueError, "should be given finite inputs"
    ),
    "adversarial shapes": (
        {"data": [(x, y), (x[:, :2], y)], "adversarial": 0.01}, ValueError, "rows of one shape"
    ),
    "patience": ({"patience": 3}, ValueError, "`training.fit(patience=3)` needs rows to wait for"),
    "no patience": (
        {"patience": 0, "validation": (x, y)}, ValueError, "(patience=...)` should be at least 1, got 0."
    ),
    "validation": ({"validation": x}, TypeError, "`training.fit(validation=...)` should be an (x, y) tuple"),
    "validation rows": ({"validation": (x[:5], y)}, ValueError, "`training.fit(validation=(x, y))` should"),
    "validation targets": ({"validation": (x, y[:, 0])}, ValueError, "training.fit(validation=...)"),
    "empty validation": ({"validation": []}, ValueError, "`training.fit(validation=...)` should give at"),
    "validation once": ({"validation": iter([(x, y)])}, TypeError, "(validation=...)` should be a re-iter"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_bad_input_is_refused(options, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        fit(**options)


def test_a_loss_that_is_not_finite_is_named():
    x, y = regression()
    with pytest.raises(
        RuntimeError, match=r"loss in `training.fit` is (nan|inf) in step \d+ of epoch \d+\. A lower"
    ):
        fit(optimizer=functools.partial(torch.optim.SGD, lr=1e200), num_epochs=9)
    with pytest.raises(RuntimeError, match="parameters in `training.fit` are not finite after epoch 0"):
        fit(optimizer=functools.partial(torch.optim.SGD, lr=torch.inf))


def test_state_is_put_back_after_an_error():
    def fails(params, x):
        if x.shape[0] < 4:
            raise ArithmeticError("mine")
        return linear(params, x)

    loader = DataLoader(TensorDataset(*regression(11)), batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="mine"):
        fit(fails, data=loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bootstrap_trains_on_the_rows_it_says():
    x, y = regression()
    rows = fb.training.bootstrap_rows(3, len(x))
    for batch_size in (None, 5):
        options = {"seed": 3, "num_epochs": 3, "batch_size": batch_size, "prior_precision": 1.0}
        got = fit(data=(x, y), bootstrap=True, **options)
        assert torch.equal(got["w"], fit(data=(x[rows], y[rows]), **options)["w"])


def test_a_bootstrap_weights_each_row_by_its_count():
    x, y = regression()
    counts = torch.bincount(fb.training.bootstrap_rows(0, len(x)), minlength=len(x)).double()
    assert counts.sum() == len(x)
    assert (counts != 1).any()
    w = start()["w"]
    for _ in range(3):
        w = w - 0.1 * x.T @ (counts[:, None] * (x @ w - y)) / 0.25 / len(x)
    torch.testing.assert_close(fit(data=(x, y), bootstrap=True, num_epochs=3)["w"], w)


def test_counts_of_a_bootstrap_have_the_moments_of_a_multinomial():
    num_seeds, n = 2000, 20
    counts = torch.stack(
        [torch.bincount(fb.training.bootstrap_rows(seed, n), minlength=n) for seed in range(num_seeds)]
    ).double()
    standard_error = counts.std(0) / num_seeds**0.5
    assert ((counts.mean(0) - 1).abs() < 5 * standard_error).all()
    # Var = 1 - 1/n; the variance of an estimated variance is about 2.9 / num_seeds for these counts.
    assert (counts.var(0) - (1 - 1 / n)).abs().max() < 5 * (2.9 / num_seeds) ** 0.5


def adversarial_by_hand(net, x, y, epsilon, num_epochs, lr=0.1):
    """Algorithm 1 of Lakshminarayanan et al. (2017) with a module, full batches and SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for _ in range(num_epochs):
        inputs = x.clone().requires_grad_()
        clean = (0.5 * (net(inputs) - y).square()).mean()
        (gradient,) = torch.autograd.grad(clean, inputs)
        moved = x + epsilon * gradient.sign()
        optimizer.zero_grad()
        (0.5 * (net(x) - y).square()).mean().add((0.5 * (net(moved) - y).square()).mean()).backward()
        optimizer.step()


def test_adversarial_training_is_the_papers_algorithm():
    x, y = regression()
    x = x * torch.tensor([1.0, 10.0, 0.1], dtype=F64)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    fn, params = fb.make_functional(net)
    got = fit(fn, params, (x, y), fb.likelihoods.Normal(1.0), num_epochs=5, adversarial=0.05)
    ranges = torch.stack([x[:, i].max() - x[:, i].min() for i in range(3)])
    adversarial_by_hand(net, x, y, 0.05 * ranges, num_epochs=5)
    for name, expected in net.state_dict().items():
        torch.testing.assert_close(got[name], expected)
    assert not torch.allclose(got["0.weight"], fit(fn, params, (x, y), num_epochs=5)["0.weight"])


def test_the_prior_is_added_once_to_both_losses_of_adversarial_training():
    x, y = regression()
    w = start()["w"]
    ranges = x.amax(0) - x.amin(0)
    moved = x + 0.1 * ranges * ((x @ w - y) @ w.T).sign()
    gradient = sum(z.T @ (z @ w - y) / 0.25 / len(x) for z in (x, moved)) + 3.0 * w / len(x)
    got = fit(data=(x, y), adversarial=0.1, prior_precision=3.0)
    torch.testing.assert_close(got["w"], w - 0.1 * gradient)


def test_only_floating_point_inputs_with_rows_move():
    x, y = regression()
    inputs = {"kind": torch.arange(12) % 2, "scale": torch.tensor(2.0, dtype=F64), "x": x}
    seen = []

    def fn(params, x):
        seen.append((x["kind"].clone(), x["scale"].clone(), x["x"].detach()))
        return x["scale"] * (x["x"] @ params["w"]) + x["kind"][:, None]

    fit(fn, data=(inputs, y), adversarial=0.1)
    kind, scale, moved = seen[-1]
    assert torch.equal(kind, inputs["kind"])
    assert torch.equal(scale, inputs["scale"])
    ranges = (x.amax(0) - x.amin(0)).expand_as(x)
    torch.testing.assert_close((moved - x).abs(), 0.1 * ranges)


def test_images_move_by_the_range_of_each_entry_of_a_row():
    images = torch.rand(6, 1, 3, 3, generator=seeded(0), dtype=F64)
    images[:, 0, 1, 1] = 0.5  # an entry that never varies does not move
    y = torch.randn(6, 1, generator=seeded(1), dtype=F64)
    seen = []

    def fn(params, x):
        seen.append(x.detach())
        return x.flatten(1) @ params["w"]

    w = torch.randn(9, 1, generator=seeded(2), dtype=F64)
    fit(fn, {"w": w}, (images, y), adversarial=0.2)
    expected = 0.2 * (images.amax(0) - images.amin(0)).expand_as(images)
    torch.testing.assert_close((seen[-1] - images).abs(), expected)


def test_a_loaders_ranges_are_those_of_the_tensors():
    x, y = regression()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    loader = DataLoader(TensorDataset(x, y), batch_size=12)
    expected = fit(data=(x, y), adversarial=0.1)["w"]
    torch.testing.assert_close(fit(data=loader, adversarial=0.1)["w"], expected)
    source = open_data(batches, batch_size=None, num_streams=1, call="fit")
    (whole,) = steps_of(source, 0.1, "fit")
    torch.testing.assert_close(whole, 0.1 * (x.amax(0) - x.amin(0)))


def test_batch_norm_statistics_of_adversarial_training_are_those_of_the_clean_pass():
    x, y = regression()
    fn, params = fb.make_functional(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double())
    got = fit(fn, params, (x, y), adversarial=0.3)
    torch.testing.assert_close(got["0.running_mean"].tensor, 0.1 * x.mean(0))
    torch.testing.assert_close(got["0.running_var"].tensor, 0.9 + 0.1 * x.var(0))
    assert int(got["0.num_batches_tracked"].tensor) == 1


def test_one_dropout_mask_serves_all_passes_of_adversarial_training():
    x, y = regression()
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1, bias=False)).double()
    w = net[1].weight.detach().clone()
    fn, params = fb.make_functional(net)
    got = fit(fn, params, (x, y), adversarial=0.2)
    key = fold(fold(0, "dropout"), 0)
    eye, only_dropout = (
        {"1.weight": torch.eye(3, dtype=F64)},
        nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3, False)),
    )
    kept, _ = fb.training_call(fb.make_functional(only_dropout)[0], eye, torch.ones_like(x), key)
    assert 0 < (kept != 0).double().mean() < 1
    moved = x + 0.2 * (x.amax(0) - x.amin(0)) * (kept * (((kept * x) @ w.T - y) @ w)).sign()
    gradient = sum(z.T @ (z @ w.T - y) / 0.25 / len(x) for z in (kept * x, kept * moved))
    torch.testing.assert_close(got["1.weight"], w - 0.1 * gradient.T)


@pytest.mark.parametrize("patience", [None, 2])
def test_early_stopping_keeps_the_best_epoch(patience):
    x, y = regression()
    held_out = (x[:4] + 0.3, y[:4])
    jumpy = functools.partial(torch.optim.SGD, lr=0.2)
    seen = []
    options = {"num_epochs": 12, "batch_size": 3, "optimizer": jumpy}
    fit(callback=lambda epoch, loss, params: seen.append(params["w"]), **options)
    normal = fb.likelihoods.Normal(0.5)
    losses = [-normal.log_prob(held_out[0] @ w, held_out[1]).mean().item() for w in seen]
    best, waited, expected, epochs = float("inf"), 0, None, 0
    for loss, w in zip(losses, seen, strict=True):
        epochs += 1
        if loss < best:
            best, waited, expected = loss, 0, w
        else:
            waited += 1
        if waited == patience:
            break
    count = []
    got = fit(validation=held_out, patience=patience, callback=lambda *_: count.append(1) and None, **options)
    assert torch.equal(got["w"], expected)
    assert not torch.equal(got["w"], seen[-1])
    assert len(count) == epochs
    assert (epochs < 12) == (patience is not None)


def test_validation_in_batches_counts_every_row_the_same():
    x, y = regression()
    x_out, y_out = regression(30, seed=3)
    batches = [(x_out[:3], y_out[:3]), (x_out[3:], y_out[3:])]
    options = {"num_epochs": 12, "batch_size": 3, "optimizer": functools.partial(torch.optim.SGD, lr=0.2)}
    expected = fit(validation=(x_out, y_out), **options)["w"]
    assert torch.equal(fit(validation=batches, **options)["w"], expected)
    loader = DataLoader(TensorDataset(x_out, y_out), batch_size=7, shuffle=True)
    assert torch.equal(fit(validation=loader, **options)["w"], expected)


def test_validation_is_in_evaluation_mode_with_the_statistics_of_its_epoch():
    x, y = regression()
    torch.manual_seed(0)
    fn, params = fb.make_functional(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    )
    held_out = regression(8, seed=4)
    seen = []
    options = {"num_epochs": 8, "batch_size": 4, "optimizer": functools.partial(torch.optim.SGD, lr=0.02)}
    fit(fn, params, (x, y), callback=lambda epoch, loss, params: seen.append(params), **options)
    normal = fb.likelihoods.Normal(0.5)
    losses = [-normal.log_prob(fn(p, held_out[0]), held_out[1]).mean().item() for p in seen]
    expected = seen[losses.index(min(losses))]
    got = fit(fn, params, (x, y), validation=held_out, **options)
    assert set(got) == set(expected)
    for name, leaf in expected.items():
        assert torch.equal(tensor_of(got[name]), tensor_of(leaf))
        assert isinstance(got[name], fb.Fixed) == isinstance(leaf, fb.Fixed)


def test_a_validation_loss_that_is_not_finite_is_no_better():
    calls = []

    def fn(params, x):
        if x.shape[0] == 5:  # the validation rows; once to look at them, then once an epoch
            calls.append(1)
            return x @ params["w"] * (float("nan") if len(calls) in (2, 4) else 1.0)
        return x @ params["w"]

    held_out = regression(5, seed=2)
    seen = []
    options = {"num_epochs": 4}
    fit(callback=lambda epoch, loss, params: seen.append(params["w"]), **options)
    got = fit(fn, validation=held_out, **options)
    normal = fb.likelihoods.Normal(0.5)
    losses = {e: -normal.log_prob(held_out[0] @ seen[e], held_out[1]).mean().item() for e in (1, 3)}
    assert torch.equal(got["w"], seen[min(losses, key=losses.__getitem__)])
    with pytest.raises(
        RuntimeError, match=r"`training.fit\(validation=...\)` is not finite after any epoch\."
    ):
        fit(lambda p, x: fn(p, x) * (torch.nan if len(x) == 5 else 1.0), validation=held_out)


def test_parameters_whose_sum_overflows_are_finite():
    def fn(params, x):
        return x @ params["w"] + 0 * params["large"][0]

    params = {"w": torch.zeros(3, 2), "large": torch.full((2,), 3e38)}
    data = torch.ones(4, 3), torch.zeros(4, 2)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    likelihood = fb.likelihoods.Normal(1.0)
    fitted = fb.training.fit(fn, params, data, likelihood, optimizer=sgd, num_epochs=1, seed=0)
    assert torch.equal(fitted["large"], params["large"])


@pytest.mark.parametrize("fit", [fb.training.fit, fb.vi.fit, fb.laplace.train])
@pytest.mark.parametrize("label", [17, -5])
def test_labels_of_a_later_batch_are_named_too(fit, label):
    fn, params = fb.make_functional(nn.Linear(3, 4))
    y = torch.arange(25) % 4
    batches = [(torch.ones(5, 3), part) for part in y.split(5)]
    batches[3][1][2] = label
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    with pytest.raises(ValueError, match=rf"Labels `y` in `.*\(data=...\)` should be from 0 to 3.*{label}"):
        fit(fn, params, batches, fb.likelihoods.Categorical(), optimizer=adam, num_epochs=1, seed=0)
