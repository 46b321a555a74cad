"""The demo at a small size: its data, its methods, what it prints and writes."""

import functools
import subprocess
import sys

import pytest
import torch

import funcbayes as fb
from funcbayes import cli, demo
from funcbayes.demo import _data, _report, _timing
from funcbayes.demo._methods import METHODS, Fitted, Task

pytest.importorskip("sklearn")

SMALL = functools.partial(
    demo.Settings,
    num_members=2,
    digits_epochs=4,
    digits_draws=4,
    digits_snapshots=2,
    digits_steps=6,
    iris_epochs=5,
    iris_draws=4,
    iris_snapshots=2,
    iris_steps=6,
    repeats=1,
)
all_methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@pytest.fixture
def task():
    """A network of 3 inputs and 2 classes, hardly trained."""

    def make_module(dropout):
        layers = [torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 2)]
        return torch.nn.Sequential(*layers)

    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    training = {"optimizer": functools.partial(torch.optim.Adam, lr=1e-2), "num_epochs": 3}
    collecting = {"optimizer": functools.partial(torch.optim.SGD, lr=1e-2)}
    data, likelihood = (x, (x[:, 0] > 0).long()), fb.likelihoods.Categorical()
    natural = {"learning_rate": 0.1, "beta2": 0.99}
    sampling = {"step_size": 1e-4, "num_steps": 12, "num_burn_in": 4, "num_chains": 2}
    return Task(make_module, data, likelihood, training, collecting, natural, sampling, 3, 16)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Run the command once: exit status, what it printed, where it wrote."""
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("demo") / "new" / "folder", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo, "Settings", SMALL)
        threads, state = torch.get_num_threads(), torch.get_rng_state()
        status = cli.main(["demo", "--output", str(folder), "--seed", "1"])
        assert torch.get_num_threads() == threads
        assert torch.equal(torch.get_rng_state(), state)
    return status, printed.getvalue(), folder


def cells(printed, name):
    """The cells of a method's line in each table, units left out."""
    lines = [line for line in printed.splitlines() if line.startswith(name)]
    return [[float(c) for c in line[len(name) :].split() if c not in ("s", "ms")] for line in lines]


def test_the_command_succeeds(output):
    assert output[0] == 0


@all_methods
def test_every_method_has_a_line_in_both_tables(output, method):
    classified, regressed = cells(output[1], method.name)
    assert len(classified) == 12
    assert len(regressed) == 7
    assert classified[1] > 0.8  # accuracy, after four passes
    assert all(time >= 0 for time in classified[-5:])


def test_tables_are_aligned(output):
    lines = output[1].splitlines()
    for i, line in enumerate(lines):
        if line.startswith("---"):
            assert {len(row) for row in (lines[i - 1], *lines[i : i + 1 + len(METHODS)])} == {len(line)}


def test_pictures_are_written_and_named(output):
    _, printed, folder = output
    assert sorted(path.name for path in folder.iterdir()) == ["bands.png", "entropy.png", "reliability.png"]
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert str(path) in printed


@pytest.mark.parametrize(
    ("module", "arguments"), [("sklearn", ["--no-pictures"]), ("matplotlib", []), ("PIL", [])]
)
def test_a_missing_extra_is_named_with_the_way_to_install_it(module, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", *arguments]) == 1
    assert "pip install 'funcbayes[demo]'" in capsys.readouterr().err


def test_no_pictures_needs_no_matplotlib_and_no_folder(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda settings, output: asked.append((settings.seed, output)))
    assert cli.main(["demo", "--no-pictures", "--seed", "7"]) == 0
    assert asked == [(7, None)]


def test_a_command_is_asked_for(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([])
    assert stop.value.code == 2
    assert "command" in capsys.readouterr().err


def test_python_dash_m_is_the_command():
    command = [sys.executable, "-m", "funcbayes", "--version"]
    assert fb.__version__ in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_digits_are_split_and_patches_are_on_their_scale():
    split = _data.load_digits()
    assert [len(split.train[0]), len(split.test[0]), len(split.outside)] == [1347, 450, 450]
    assert torch.bincount(split.test[1]).min() >= 43
    for x in (split.train[0], split.test[0], split.outside):
        assert x.shape[1:] == (64,)
        assert x.min() >= 0
        assert x.max() <= 16.01


def test_patches_are_grey_squares_of_the_image():
    rows = torch.arange(17.0)[:, None].expand(17, 24)
    image = torch.stack([rows, rows, rows], -1)
    patches = _data._patches(image)
    assert patches.shape == (6, 64)
    torch.testing.assert_close(patches[4].reshape(8, 8)[:, 3], torch.arange(8.0, 16.0) * 16 / 255)


def test_iris_has_a_gap_with_data_on_both_sides():
    split = _data.load_iris()
    lengths = torch.cat([split.train[0], split.test[0]])
    low, high = _data.GAP
    assert len(lengths) == 150
    assert not ((lengths > low + 1e-4) & (lengths < high - 1e-4)).any()
    assert (lengths < low + 1e-4).sum() == 50
    assert ((split.outside > low) & (split.outside < high)).all()


def test_rescaled_outputs_are_a_mean_and_log_variance_in_the_unit_of_the_targets():
    likelihood, outputs = fb.likelihoods.HeteroscedasticNormal(), torch.tensor([[0.5, -1.0]])
    rescaled = _data.Rescale(torch.tensor(3.0), torch.tensor(2.0))(outputs)
    torch.testing.assert_close(likelihood.mean(rescaled), 2 * likelihood.mean(outputs) + 3)
    torch.testing.assert_close(likelihood.variance(rescaled), 4 * likelihood.variance(outputs))


@all_methods
def test_methods_are_functions_of_their_seed(method, task):
    x = task.data[0]
    first, second, other = (method.fit(task, seed).predict(x, task.likelihood).mean for seed in (0, 0, 1))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, other)


@all_methods
def test_the_loop_that_is_timed_gives_what_predict_gives(method, task):
    times = _timing.compare(method.fit(task, 0), task.data[0], repeats=1)
    assert times.vectorised > 0
    assert times.loop > 0


def test_a_loop_draws_from_a_posterior_with_infinitely_many_values(task):
    fn, params = fb.make_functional(task.make_module(0.0))
    diagonal = fb.covariances.Diagonal({name: torch.full_like(leaf, 0.01) for name, leaf in params.items()})
    fitted = Fitted(fn, None, fb.Gaussian(params, diagonal), {"num_samples": 5, "seed": 0})
    assert _timing.compare(fitted, task.data[0], repeats=1).loop > 0


@pytest.mark.parametrize("shift", [0.1, float("nan")])
def test_a_loop_that_gives_something_else_is_not_timed(task, shift):
    fitted = METHODS[1].fit(task, 0)
    wrong = Fitted(
        fitted.fn, fitted.params, fitted.posterior, fitted.options, lambda x: fitted.loop(x) + 10 * shift
    )
    with pytest.raises(RuntimeError, match="differ"):
        _timing.compare(wrong, task.data[0], repeats=1)


def test_outputs_at_the_same_draws_have_to_be_equal():
    outputs = torch.randn(4, 3, 2)
    _timing._check_agreement(outputs, outputs + 1e-6, same_draws=True)
    with pytest.raises(RuntimeError, match="differ: by up to 0.01"):
        _timing._check_agreement(outputs, outputs + 1e-2, same_draws=True)


def test_table_lines_up_with_headers_of_several_lines():
    got = _report.table(["name", "a\nlong", "b"], [["x", "1", "2.50"], ["yy", "10", "3.00"]])
    expected = ["         a", "name  long     b", "----------------", "x        1  2.50", "yy      10  3.00"]
    assert got.splitlines() == expected
