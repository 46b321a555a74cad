"""Pictures of predictions. Each function draws on one Axes of matplotlib and returns it.

Without ``ax`` a new figure is made, apart from ``pyplot`` and its global state:
``plots.reliability_diagram(prediction, y).figure.savefig("reliability.png")``. To have it shown in a
notebook, pass an Axes of ``pyplot``: ``ax=plt.subplots()[1]``. The colours can be told apart without
colour vision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import metrics
from ._prediction import Prediction
from .metrics import _counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008), "Color universal design": https://jfly.uni-koeln.de/color/
BLUE, ORANGE, SKY, GREY = "#0072B2", "#D55E00", "#8CCBEE", "#B3B3B3"


def reliability_diagram(
    prediction: Prediction | Tensor, y: Tensor, num_bins: int = 15, ax: Axes | None = None
) -> Axes:
    """Draw how often predictions of a given confidence are right.

    Rows are binned by their highest probability as :func:`funcbayes.metrics.ece` does it. Each bin that has
    rows is a point at its mean confidence and its accuracy, with a 95% Wilson interval for the accuracy:
    bins with few rows say little. Bars are the share of all rows in each bin.

    Args:
        prediction: As for :func:`funcbayes.metrics.ece`: made with a ``Categorical`` or ``Bernoulli``
            likelihood, or class probabilities ``(N, C)``.
        y: Labels, ``N`` rows.
        num_bins: Bins of equal width in ``[0, 1]``, at least 1.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: As :func:`funcbayes.metrics.ece`.
        ValueError: As :func:`funcbayes.metrics.ece`.
    """
    error = metrics.ece(prediction, y, num_bins).item()  # refuses what cannot be drawn
    probs, labels = _counted(prediction, y, None, None, "reliability_diagram(prediction, y)")
    confidence, is_right = probs.amax(-1).double(), (probs.argmax(-1) == labels).double()
    edges = torch.arange(1, num_bins, dtype=probs.dtype) / num_bins
    bins = torch.bucketize(probs.amax(-1).cpu(), edges)
    counts = torch.bincount(bins, minlength=num_bins)
    full = counts > 0
    mean_confidence = torch.bincount(bins, confidence.cpu(), num_bins)[full] / counts[full]
    accuracy = torch.bincount(bins, is_right.cpu(), num_bins)[full] / counts[full]
    low, high = _wilson(accuracy, counts[full])

    ax = _axes(ax)
    left = [b / num_bins for b in range(num_bins)]
    share = (counts / counts.sum()).tolist()
    ax.bar(left, share, 1 / num_bins, align="edge", color=GREY, alpha=0.6, linewidth=0, label="share of rows")
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    ax.errorbar(
        mean_confidence.numpy(),
        accuracy.numpy(),
        yerr=torch.stack([accuracy - low, high - accuracy]).clamp_min(0).numpy(),
        color=BLUE,
        marker="o",
        markersize=5,
        linewidth=1.2,
        linestyle="none",
        capsize=2,
        label="accuracy, 95% interval",
    )
    ax.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel="confidence (highest probability)")
    ax.set_ylabel("accuracy; share of rows")
    ax.set_title(f"ECE {error:.3f}", fontsize="medium")
    ax.set_aspect("equal")
    ax.legend(loc="upper left", fontsize="small")
    return ax


def entropy_histograms(in_scores: Tensor, out_scores: Tensor, ax: Axes | None = None) -> Axes:
    """Draw how entropies are spread for inputs like the training data and for others.

    The less the two overlap, the better entropy tells them apart. Bars are shares of each set's rows.
    Other scores than entropies can be drawn too; then set the label: ``ax.set_xlabel(...)``.

    Args:
        in_scores: ``prediction.entropy`` in nats, ``(N,)``, for inputs like the training data.
        out_scores: The same for inputs from outside, ``(M,)``.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: As :func:`funcbayes.metrics.ood_auroc`.
        ValueError: As :func:`funcbayes.metrics.ood_auroc`.
    """
    auroc = metrics.ood_auroc(in_scores, out_scores).item()  # refuses what cannot be drawn
    inside, outside = (scores.detach().double().cpu() for scores in (in_scores, out_scores))
    both = torch.cat([inside, outside])
    low, high = min(0.0, both.min().item()), both.max().item()
    edges = torch.linspace(low, high if high > low else low + 1, 31, dtype=torch.float64).tolist()

    ax = _axes(ax)
    drawn = ((inside, BLUE, "in distribution", "//"), (outside, ORANGE, "out of distribution", ""))
    for scores, color, label, hatch in drawn:
        shares = torch.full_like(scores, 1 / len(scores)).numpy()
        style = {"facecolor": color, "alpha": 0.45, "edgecolor": color, "hatch": hatch, "linewidth": 0}
        ax.hist(scores.numpy(), edges, weights=shares, histtype="stepfilled", label=label, **style)
        ax.hist(scores.numpy(), edges, weights=shares, histtype="step", color=color, linewidth=1.5)
    ax.set(xlabel="entropy of the prediction (nats)", ylabel="share of rows", xlim=(edges[0], edges[-1]))
    ax.set_title(f"AUROC {auroc:.3f}", fontsize="medium")
    ax.legend(loc="upper right", fontsize="small")
    return ax


def predictive_bands(
    x: Tensor, prediction: Prediction, data: tuple[Tensor, Tensor] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw a regression with its uncertainty, split into what more data would remove and what it would not.

    The line is the predictive mean. The inner band is two epistemic standard deviations to either side: how
    much draws disagree. The outer one is two standard deviations of the whole prediction; as variances add,
    what lies between the bands is due to the aleatoric part, the noise in ``y``.

    Args:
        x: Inputs, ``(N,)`` or ``(N, 1)``, in any order.
        prediction: For these inputs and one output, made with a likelihood.
        data: Observed ``(x, y)`` to show as points, each ``(M,)`` or ``(M, 1)``.
        ax: Where to draw; ``None`` for a new figure.

    Returns:
        The Axes.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is not one input and one output a row, or no likelihood.
    """
    place, mean = _column(x, "x"), _column(prediction.mean, "prediction")
    if len(mean) != len(place):
        raise ValueError(
            "`predictive_bands(x, prediction)` should be given a prediction for the rows of `x`, got "
            f"{len(mean)} and {len(place)} rows."
        )
    order = place.argsort()
    place, mean = place[order], mean[order]
    epistemic = 2 * _column(prediction.epistemic_variance, "prediction")[order].sqrt()
    aleatoric = _column(prediction.aleatoric_variance, "prediction")[order]
    total = (epistemic**2 + 4 * aleatoric).sqrt()

    ax = _axes(ax)
    outer = {"color": SKY, "alpha": 0.6, "linewidth": 0, "label": "aleatoric + epistemic, ±2 std"}
    inner = {"color": ORANGE, "alpha": 0.65, "linewidth": 0, "label": "epistemic only, ±2 std"}
    for half, style in ((total, outer), (epistemic, inner)):
        ax.fill_between(place.numpy(), (mean - half).numpy(), (mean + half).numpy(), **style)
    ax.plot(place.numpy(), mean.numpy(), color="black", linewidth=1.2, label="predictive mean")
    if data is not None:
        points = [_column(values, "data") for values in data]
        style = {"s": 12, "color": BLUE, "alpha": 0.7, "linewidth": 0, "zorder": 3, "label": "data"}
        ax.scatter(points[0].numpy(), points[1].numpy(), **style)
    ax.set(xlim=(place[0].item(), place[-1].item()), xlabel="x", ylabel="y")
    ax.legend(loc="upper left", fontsize="small")
    return ax


def _axes(ax: Axes | None) -> Axes:
    """``ax``, or the one of a new figure that ``pyplot`` does not know of."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`funcbayes.plots` needs matplotlib: pip install 'funcbayes[plots]' (or 'funcbayes[demo]')."
        ) from error
    return Figure(figsize=(4.8, 4.0), layout="constrained").add_subplot()


def _column(values: Any, name: str) -> Tensor:
    """``(N,)`` from ``(N,)`` or ``(N, 1)``, ready to be drawn."""
    values = values.detach().double().cpu()
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or not len(values):
        raise ValueError(
            f"`predictive_bands({name}=...)` should have one number a row, got shape {tuple(values.shape)}."
        )
    return values


def _wilson(rate: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """95% interval for a proportion: Wilson (1927), which stays in [0, 1] and works for few rows."""
    z2 = 1.959964**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = (rate * (1 - rate) / count + z2 / (4 * count**2)).sqrt() * z2**0.5 / (1 + z2 / count)
    return centre - half, centre + half
