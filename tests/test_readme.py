"""The README's examples run, and say what the README says of them."""

import re
from pathlib import Path

import pytest
import torch

import funcbayes as fb

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def text():
    return README.read_text(encoding="utf-8")


def test_python_blocks_run_one_after_another(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number, block in enumerate(blocks, start=1):
            exec(compile(block, f"README.md, python block {number}", "exec"), names)
            if number == 1:  # the later ones reuse the name
                first = names["prediction"]
            if "fb.sgmcmc.run" in block:
                assert (fb.sgmcmc.split_r_hat(names["outputs"]) < 1.1).all()
            if "fb.ivon.fit" in block:
                assert fb.metrics.rmse(names["prediction"], names["y"]) < 0.19
    near, far = first.epistemic_variance[:, 0]
    assert far > 10 * near
    assert isinstance(fb.load(tmp_path / "ensemble.safetensors"), fb.Ensemble)
    assert "tensor" in capsys.readouterr().out


def test_names_that_are_said_to_be_there_are_there(text):
    text = text.split("Planned, and")[0]
    for path in set(re.findall(r"`fb\.([\w.]+)", text)):
        found = fb
        for name in path.split("."):
            found = getattr(found, name)


def test_links_to_files_lead_somewhere(text):
    for target in re.findall(r"\]\((?!https?://|#)([^)]+)\)", text):
        assert (README.parent / target).exists(), target


def test_make_targets_that_are_named_exist(text):
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)(?=`|\s+#)", text))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
