"""What the demo prints and draws."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import metrics, plots
from .._prediction import Prediction
from ._data import Split
from ._timing import Times

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Classified:
    """A method's results on a classification: predictions, and seconds.

    Attributes:
        test: Prediction for the test rows.
        outside: Prediction for the inputs from outside.
        fit_seconds: Time to fit.
        one_row: Times to predict one row.
        all_rows: Times to predict all test rows.
    """

    test: Prediction
    outside: Prediction
    fit_seconds: float
    one_row: Times
    all_rows: Times


@dataclass(frozen=True)
class Regressed:
    """A method's results on a regression: predictions for the test rows, outside, and along a curve."""

    test: Prediction
    outside: Prediction
    curve: Prediction


def classification_table(results: Mapping[str, Classified], y: Tensor) -> str:
    """One line a method."""
    headers = (
        *("method", "draws", "accuracy", "NLL", "Brier", "ECE"),
        *("AUROC\nentropy", "AUROC\nmut. inf.", "fit"),
        *("1 row\npredict", "1 row\nloop"),
        *(f"{len(y)} rows\npredict", f"{len(y)} rows\nloop"),
    )
    return table(headers, [_classified_row(name, result, y) for name, result in results.items()])


def _classified_row(name: str, result: Classified, y: Tensor) -> list[str]:
    test, outside = result.test, result.outside
    scores = [metric(test, y) for metric in (metrics.accuracy, metrics.nll, metrics.brier, metrics.ece)]
    scores.append(metrics.ood_auroc(test.entropy, outside.entropy))
    scores.append(metrics.ood_auroc(test.mutual_information, outside.mutual_information))
    times = (result.one_row, result.all_rows)
    milliseconds = [f"{1e3 * s:.2f} ms" for t in times for s in (t.vectorised, t.loop)]
    numbers = [f"{score:.3f}" for score in scores]
    return [name, str(test.num_samples), *numbers, f"{result.fit_seconds:.1f} s", *milliseconds]


def regression_table(results: Mapping[str, Regressed], y: Tensor) -> str:
    """One line a method; all but NLL in the unit of ``y``."""
    headers = ("method", "draws", "RMSE", "NLL")
    headers += ("95% width\ntest rows", "95% width\nin the gap")
    headers += ("epistemic std\ntest rows", "epistemic std\nin the gap")
    return table(headers, [_regressed_row(name, result, y) for name, result in results.items()])


def _regressed_row(name: str, result: Regressed, y: Tensor) -> list[str]:
    scores = [metrics.rmse(result.test, y), metrics.nll(result.test, y)]
    scores += [_width(result.test), _width(result.outside)]
    scores += [p.epistemic_variance.sqrt().mean() for p in (result.test, result.outside)]
    return [name, str(result.test.num_samples), *(f"{score:.3f}" for score in scores)]


def _width(prediction: Prediction) -> Tensor:
    low, high = prediction.interval(0.95)
    return (high - low).mean()


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, the others to the right. Headers may have several lines."""
    lines = [header.split("\n") for header in headers]
    height = max(map(len, lines))
    columns = [
        [*[""] * (height - len(head)), *head, *cells]
        for head, cells in zip(lines, zip(*rows, strict=True), strict=True)
    ]
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in zip(*columns, strict=True)
    ]
    aligned.insert(height, "-" * len(aligned[0]))
    return "\n".join(line.rstrip() for line in aligned)


def draw(
    classified: Mapping[str, Classified],
    regressed: Mapping[str, Regressed],
    digits: Split,
    iris: Split,
    curve: Tensor,
    output: Path,
) -> list[Path]:
    """Write the pictures, a panel a method; return their paths."""
    output.mkdir(parents=True, exist_ok=True)

    def reliability(name: str, ax: "Axes") -> None:
        plots.reliability_diagram(classified[name].test, digits.test[1], ax=ax)

    def entropy(name: str, ax: "Axes") -> None:
        plots.entropy_histograms(classified[name].test.entropy, classified[name].outside.entropy, ax=ax)
        # All panels share an axis, on which each would set the limits of its own scores.
        ax.set_xlim(0, math.log(classified[name].test.mean.shape[-1]))

    def bands(name: str, ax: "Axes") -> None:
        plots.predictive_bands(curve, regressed[name].curve, iris.train, ax=ax)
        ax.set(xlabel="petal length (cm)", ylabel="petal width (cm)", ylim=(-0.4, 3.2))

    return [
        _panels(reliability, list(classified), "Digits: is confidence deserved?", output / "reliability.png"),
        _panels(
            entropy,
            list(classified),
            "Entropy for digits and for patches of photographs",
            output / "entropy.png",
        ),
        _panels(
            bands, list(regressed), "Iris: no petal is between 1.9 and 3.0 cm long", output / "bands.png"
        ),
    ]


def _panels(draw_one: Callable[[str, Any], None], names: Sequence[str], title: str, path: Path) -> Path:
    """Draw a panel for each name, in rows of three that share their axes, with one legend."""
    from matplotlib.figure import Figure

    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.0 * columns, 3.6 * rows + 0.7), layout="constrained", dpi=120)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, name in zip(grid.flat, names, strict=False):
        draw_one(name, ax)
        said = ax.get_title()
        ax.set_title(f"{name}: {said}" if said else name, fontsize="medium")
        ax.get_legend().remove()
        ax.label_outer()
    for ax in grid.flat[len(names) :]:
        ax.remove()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    figure.savefig(path)
    return path


def curve_inputs() -> Tensor:
    """Petal lengths to draw a curve over, ``(N, 1)``, in cm."""
    return torch.linspace(0.8, 7.2, 161)[:, None]
