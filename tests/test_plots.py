"""Pictures show the numbers that they are given."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import funcbayes as fb
from funcbayes import metrics, plots

matplotlib = pytest.importorskip("matplotlib")


def drawn_texts(ax):
    return [ax.get_xlabel(), ax.get_ylabel(), *(t.get_text() for t in ax.get_legend().get_texts())]


@pytest.fixture
def probs_and_labels():
    generator = torch.Generator().manual_seed(0)
    probs = torch.randn(300, 4, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    return probs, torch.multinomial(probs, 1, generator=generator)[:, 0]


@pytest.fixture
def curve():
    """Two lines, y = x and y = -x, with noise of variance 4."""
    x = torch.tensor([[1.0], [-2.0], [0.0]])
    ensemble = fb.Ensemble({"w": torch.tensor([1.0, -1.0])})
    normal = fb.likelihoods.Normal(2.0)
    return x, fb.predict(lambda p, x: p["w"] * x, None, ensemble, x, likelihood=normal)


DRAWINGS = {
    "reliability_diagram": lambda ax, probs, curve: plots.reliability_diagram(*probs, ax=ax),
    "entropy_histograms": lambda ax, probs, curve: plots.entropy_histograms(
        torch.rand(5), torch.rand(7), ax=ax
    ),
    "predictive_bands": lambda ax, probs, curve: plots.predictive_bands(*curve, data=curve[:1] * 2, ax=ax),
}
all_drawings = pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS.keys())


@all_drawings
def test_a_new_figure_can_be_saved_and_has_labels(draw, probs_and_labels, curve, tmp_path):
    ax = draw(None, probs_and_labels, curve)
    assert all(drawn_texts(ax))
    ax.figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


@all_drawings
def test_a_given_axes_is_drawn_on_and_returned(draw, probs_and_labels, curve):
    ax = matplotlib.figure.Figure().add_subplot()
    assert draw(ax, probs_and_labels, curve) is ax


@all_drawings
def test_missing_matplotlib_is_named_with_the_way_to_install_it(draw, probs_and_labels, curve, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'funcbayes\[plots\]'"):
        draw(None, probs_and_labels, curve)


def test_pyplot_is_not_imported(tmp_path):
    code = (
        "import sys, torch; from funcbayes import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plots.entropy_histograms(torch.rand(5), torch.rand(5))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reliability_points_are_accuracies_of_bins(probs_and_labels):
    probs, y = probs_and_labels
    ax = plots.reliability_diagram(probs, y, num_bins=5)
    confidence, right = probs.amax(-1), (probs.argmax(-1) == y).double()
    expected = []
    for b in range(5):
        chosen = (confidence > b / 5) & (confidence <= (b + 1) / 5)
        if chosen.any():
            expected.append([confidence[chosen].mean().item(), right[chosen].mean().item()])
    points = ax.containers[1].lines[0]
    np.testing.assert_allclose(np.transpose(points.get_data()), expected)
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(1)
    assert f"{metrics.ece(probs, y, 5).item():.3f}" in ax.get_title()


def test_wilson_interval_ends_where_the_rate_is_196_standard_errors_away():
    rate, count = torch.tensor([[0.0, 0.3, 1.0], [4.0, 50.0, 9.0]], dtype=torch.float64)
    for ends in plots._wilson(rate, count):  # ends p of |rate - p| = z sqrt(p (1 - p) / n)
        torch.testing.assert_close(
            (rate - ends).square(), 1.959964**2 * ends * (1 - ends) / count, rtol=1e-6, atol=1e-9
        )


def test_a_bernoulli_prediction_can_be_drawn():
    ensemble = fb.Ensemble({"w": torch.tensor([1.0, 3.0])})
    x = torch.linspace(-2, 2, 40)
    prediction = fb.predict(lambda p, x: p["w"] * x, None, ensemble, x, likelihood=fb.likelihoods.Bernoulli())
    ax = plots.reliability_diagram(prediction, (x > 0).float())
    assert ax.containers[1].lines[0].get_xdata().min() >= 0.5


def test_histograms_are_shares_of_each_set():
    ax = plots.entropy_histograms(torch.rand(10), torch.rand(1000))
    for patch in ax.patches:
        # The outline passes each of the 30 bars once on its way; corners come in pairs.
        edges, heights = patch.get_xy()[1:62:2, 0], patch.get_xy()[1:61:2, 1]
        assert len(edges) == 31
        assert heights.sum() == pytest.approx(1)


def test_equal_scores_can_be_drawn():
    ax = plots.entropy_histograms(torch.zeros(3), torch.zeros(2))
    assert "0.500" in ax.get_title()


def test_bands_obey_the_law_of_total_variance(curve):
    ax = plots.predictive_bands(*curve)
    total, epistemic = (band.get_paths()[0].get_extents() for band in ax.collections)
    # At x = -2 the lines are at 2 and -2: variance 8 with n - 1, and 4 of noise.
    assert epistemic.y1 == pytest.approx(2 * 8**0.5)
    assert total.y1 == pytest.approx(2 * 12**0.5)
    assert ax.lines[0].get_xdata().tolist() == [-2, 0, 1]


def test_bands_refuse_two_outputs_a_row(curve):
    with pytest.raises(ValueError, match=r"predictive_bands\(x=\.\.\.\).* got shape \(3, 2\)"):
        plots.predictive_bands(torch.zeros(3, 2), curve[1])


def test_bands_refuse_a_prediction_for_other_rows(curve):
    with pytest.raises(ValueError, match="got 3 and 4 rows"):
        plots.predictive_bands(torch.zeros(4), curve[1])
