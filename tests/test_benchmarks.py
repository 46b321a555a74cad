"""The benchmarks run, and say whether what they claim holds. How fast anything is, is not tested here."""

import dataclasses
import importlib
import json
import pathlib

import pytest
import torch

from benchmarks import __main__ as command, _measure, _models, _pictures, predict_against_loop

CLAIMS = sorted(p.stem for p in pathlib.Path(_measure.__file__).parent.glob("[!_]*.py"))


def result(ratio, at_least=None):
    return _measure.Result("a case", ratio, ratio - 0.1, ratio + 0.1, 2 * ratio, 2.0, at_least)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_file_makes_one_claim_in_its_first_line_and_can_be_run(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__.splitlines()[0].endswith((".", ","))
    assert callable(module.run)


@pytest.mark.parametrize("name", _models.MODELS)
def test_a_model_takes_its_inputs(name):
    model = _models.MODELS[name]().eval()
    with torch.no_grad():
        assert model(_models.inputs(name, 2)).shape == (2, 10)


def test_what_takes_longer_is_slower():
    x = torch.ones(300, 300)
    got = _measure.compare(
        "case", lambda: [x @ x for _ in range(50)], lambda: x[0, 0] + 1, repeats=2, seconds=0.01
    )
    assert got.ratio > 1
    assert got.low <= got.ratio <= got.high
    assert got.at_least is None


@pytest.mark.parametrize("repeats", [3, 4])
def test_a_machine_that_becomes_slower_is_in_favour_of_neither(monkeypatch, repeats):
    """Each call takes a tenth longer than the one before it, whichever it is."""
    seconds, order = [1.0], []

    def timed(call):
        def side(number):
            order.append(call)
            seconds.append(1.1 * seconds[-1])
            return seconds[-1]

        return side

    monkeypatch.setattr(_measure, "_timed", timed)
    monkeypatch.setattr(_measure, "_SECONDS", 0.0)
    got = _measure.compare("case", "theirs", "ours", repeats=repeats)
    assert order[-8:] == ["theirs", "ours", "ours", "theirs"] * 2
    torch.testing.assert_close([got.low, got.ratio, got.high], [1 / 1.1, (1.1 + 1 / 1.1) / 2, 1.1])


@pytest.mark.parametrize(
    ("ratio", "at_least", "holds"),
    [(0.5, None, True), (1.01, 1.0, True), (0.99, 1.0, False), (0.95, 0.9, True), (0.89, 0.9, False)],
)
def test_a_claim_holds_if_the_median_is_at_least_what_is_claimed(ratio, at_least, holds):
    one = result(ratio, at_least)
    assert one.holds == holds
    shown = _measure.table([one]).splitlines()[1].split()[-1]
    assert shown == {True: "yes", False: "NO"}[holds] if at_least else shown not in ("yes", "NO")


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_small_claim_is_measured(monkeypatch):
    monkeypatch.setattr(predict_against_loop, "MODELS", {"mlp-small": _models.mlp_small})
    monkeypatch.setattr(predict_against_loop, "cells", lambda how: [("mlp-small", n, 32) for n in (1, 2)])
    monkeypatch.setattr(predict_against_loop, "_ends", lambda device: {})
    found = {one.case: one for one in predict_against_loop.run(_measure.How(repeats=2))}
    of_draws = {"weights, mlp-small, 1 rows, 32 draws": 3.0, "weights, mlp-small, 2 rows, 32 draws": 0.95}
    of_masks = {case.replace("weights", "dropout"): least for case, least in of_draws.items()}
    claimed = of_draws | of_masks | {"geometric mean of all": 1.5}
    assert {case: one.at_least for case, one in found.items()} == claimed
    assert all(one.ours_ms > 0 and one.theirs_ms > 0 for one in found.values())


@pytest.mark.parametrize(("ratio", "status"), [(2.0, 0), (0.5, 1)])
def test_the_exit_status_and_the_written_results_tell_whether_claims_hold(
    ratio, status, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict_against_loop, "run", lambda how: iter([result(3.0), result(ratio, 1.0)]))
    assert command.main(["predict_against_loop", "--repeats", "2"]) == status
    written = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert [one["holds"] for one in written["predict_against_loop"]] == [True, not status]
    assert written["predict_against_loop"][1]["at_least"] == 1.0
    assert written["environment"]["torch"] == torch.__version__
    assert ("NO" in capsys.readouterr().out) == bool(status)


def test_a_claim_about_intervals_holds_unless_the_whole_interval_lies_below():
    cases = (0.9, True), (0.84, False)
    for ratio, holds in cases:  # the upper quartile is 0.1 above
        assert dataclasses.replace(result(ratio, 0.95), of_interval=True).holds == holds


def test_a_quick_run_has_few_of_the_cells():
    every, few = (
        predict_against_loop.cells(_measure.How(repeats=2, is_quick=is_quick)) for is_quick in (False, True)
    )
    assert set(few) < set(every)
    assert {name for name, _, _ in few} == set(_models.MODELS)
    sizes = [rows * draws for _, rows, draws in every]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_no_case_begins_when_time_is_over(monkeypatch, number):
    monkeypatch.setattr(predict_against_loop, "_ends", lambda device: {})
    monkeypatch.setattr(predict_against_loop, "compare", lambda case, *_, **__: result(1.0))
    monkeypatch.setattr(predict_against_loop, "_weights", lambda *_: (None, None))
    monkeypatch.setattr(predict_against_loop, "_dropout", lambda *_: (None, None))
    answers = iter([False] * number + [True])
    monkeypatch.setattr(_measure.How, "is_over", property(lambda how: next(answers)))
    *found, last = [None, *predict_against_loop.run(_measure.How(repeats=2))]
    assert len(found) == (number + 1 if number else 0)
    if number:
        assert last.case == f"geometric mean of the first {number} of {6 * 12 * 2}"
        assert last.at_least is None


@pytest.mark.parametrize(
    ("options", "is_over"), [({}, False), ({"minutes": 1}, False), ({"minutes": 0}, True)]
)
def test_time_is_over_after_so_many_minutes(options, is_over):
    assert _measure.How(repeats=2, **options).is_over == is_over


def test_every_way_to_one_thing_has_to_pass_the_check():
    ways, seen = [lambda: sum(range(1000000)), lambda: 2], []
    assert _measure.fastest(ways, seen.append)() == 2
    assert seen == [sum(range(1000000)), 2]


def test_a_claim_about_the_cpu_is_not_measured_elsewhere(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main(["predict_memory_over_draws", "--device", "meta", "--repeats", "2"]) == 0
    assert "Not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("claim", "cases"),
    [
        ("predict_against_loop", [f"weights, lenet, {n} rows, {s} draws" for n in (1, 32) for s in (8, 32)]),
        (
            "predict_cost_over_sizes",
            [f"{n} {kind}" for n in (1, 8) for kind in ("draws", "rows", "parameters")],
        ),
        ("predict_memory_over_draws", [f"lenet, 128 rows, {s} draws" for s in (32, 64)]),
    ],
)
def test_pictures_are_drawn_of_what_was_measured(claim, cases, tmp_path):
    pytest.importorskip("matplotlib")
    results = [dataclasses.replace(result(2.0), case=case, ours_mb=3.0) for case in cases]
    path = _pictures.draw(claim, results, tmp_path / "pictures")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert _pictures.draw("another_claim", results, tmp_path) is None


def test_a_claim_that_does_not_exist_is_refused_by_name(capsys):
    with pytest.raises(SystemExit):
        command.main(["no_such_claim"])
    assert "no claim 'no_such_claim'" in capsys.readouterr().err
