"""The demo from beginning to end."""

import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import likelihoods
from . import _data, _report, _timing
from ._data import Rescale, Split, Standardize
from ._methods import METHODS, Fitted, Task


@dataclass(frozen=True)
class Settings:
    """How much the demo does.

    Attributes:
        seed: Of the networks: where they start, the order of the data, dropout.
        num_members: Networks in an ensemble.
        digits_epochs: Passes through the digits.
        digits_draws: Draws of a posterior that has infinitely many.
        digits_snapshots: What SWAG collects, one an epoch.
        digits_steps: Steps of each chain, the first third of which is thrown away.
        iris_epochs: Passes through the iris data.
        iris_draws: As ``digits_draws``.
        iris_snapshots: As ``digits_snapshots``, one in ten epochs.
        iris_steps: As ``digits_steps``.
        repeats: How often each prediction is timed.
    """

    seed: int = 0
    num_members: int = 10
    digits_epochs: int = 60
    digits_draws: int = 32
    digits_snapshots: int = 30
    digits_steps: int = 1200
    iris_epochs: int = 500
    iris_draws: int = 400  # many, for smooth curves: each row has dropout masks of its own
    iris_snapshots: int = 30
    iris_steps: int = 1200
    repeats: int = 15


def run(settings: Settings, output: Path | None) -> None:
    """Fit all methods on both data sets, print the tables and write the pictures.

    Args:
        settings: How much to do.
        output: Folder for the pictures, made if it is missing; ``None`` for no pictures.

    Raises:
        ImportError: If scikit-learn or matplotlib are missing.
    """
    _check_extras(with_pictures=output is not None)
    began = time.perf_counter()
    with _timing.one_thread():
        digits, iris = _data.load_digits(), _data.load_iris()
        classified = _classify(settings, digits)
        regressed = _regress(settings, iris)
    print(_DIGITS.format(train=len(digits.train[0]), test=len(digits.test[0])))
    print(_report.classification_table(classified, digits.test[1]))
    print(_DIGITS_NOTE)
    print(_IRIS.format(train=len(iris.train[0]), test=len(iris.test[0])))
    print(_report.regression_table(regressed, iris.test[1]))
    print(_IRIS_NOTE)
    if output is not None:
        for path in _report.draw(classified, regressed, digits, iris, _report.curve_inputs(), output):
            print(f"Wrote {path}")
    print(
        f"{time.perf_counter() - began:.0f} s in all, on one thread; torch {torch.__version__}, "
        f"seed {settings.seed}."
    )


_DIGITS = """\
Digits: {train} images of 8 x 8 pixels to train on, {test} to test on.
"""
_DIGITS_NOTE = """
Lower is better, but for accuracy and AUROC. AUROC: how well a score tells the test digits from as many
patches of photographs (0.5 is chance); the score is the entropy of the prediction, or the mutual
information of the prediction and the parameters, which is 0 for a single network.
Times are medians, of all draws: by funcbayes.predict, and by a plain Python loop over the draws. Drawing is
a part of both: for one row of a Gaussian posterior it is nearly all; `to_ensemble` pays for it once.
"""
_IRIS = """\
Iris: petal width (cm) from petal length, {train} flowers to train on, {test} to test on. No petal in the
data is between 1.9 and 3.0 cm long.
"""
_IRIS_NOTE = """
Lower is better for RMSE and NLL. The epistemic part is the disagreement between draws: it should grow where
there are no data, and does for networks from different starts and for Laplace approximations, but not for
dropout and SWAG around one network. The rest of an interval's width is the noise that networks have learned,
smaller left of the gap than right.
"""


def _check_extras(*, with_pictures: bool) -> None:
    # Pillow reads scikit-learn's sample images; matplotlib brings it.
    needed = {"sklearn": "scikit-learn", "PIL": "Pillow"} | (
        {"matplotlib": "matplotlib"} if with_pictures else {}
    )
    missing = [name for module, name in needed.items() if find_spec(module) is None]
    if missing:
        raise ImportError(f"The demo needs {' and '.join(missing)}: pip install 'funcbayes[demo]'")


def _classify(settings: Settings, split: Split) -> dict[str, _report.Classified]:
    task = Task(
        make_module=functools.partial(_digits_network, split.train[0]),
        data=split.train,
        likelihood=likelihoods.Categorical(),
        training={
            "optimizer": functools.partial(torch.optim.Adam, lr=1e-3),
            "num_epochs": settings.digits_epochs,
            "batch_size": 64,
            "prior_precision": 0.3,
        },
        collecting={
            "optimizer": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
            "num_epochs": settings.digits_snapshots,
        },
        natural={"learning_rate": 0.1, "hess_init": 0.5, "beta2": 0.9995},
        sampling={"step_size": 4e-5, **_steps(settings.digits_steps)},
        num_members=settings.num_members,
        num_draws=settings.digits_draws,
    )
    x = split.test[0]
    results = {}
    for name, fitted, seconds in _fits(task, settings.seed, "digits"):
        results[name] = _report.Classified(
            fitted.predict(x, task.likelihood),
            fitted.predict(split.outside, task.likelihood),
            seconds,
            _timing.compare(fitted, x[:1], settings.repeats),
            _timing.compare(fitted, x, settings.repeats),
        )
    return results


def _regress(settings: Settings, split: Split) -> dict[str, _report.Regressed]:
    task = Task(
        make_module=functools.partial(_iris_network, split.train),
        data=split.train,
        likelihood=likelihoods.HeteroscedasticNormal(),
        training={
            "optimizer": functools.partial(torch.optim.Adam, lr=3e-3),
            "num_epochs": settings.iris_epochs,
            "prior_precision": 0.3,
        },
        collecting={
            "optimizer": functools.partial(torch.optim.SGD, lr=2e-4, momentum=0.9),
            "num_epochs": 10 * settings.iris_snapshots,
            "collect_every": 10,
            "batch_size": 16,
        },
        natural={
            "learning_rate": 0.02,
            "hess_init": 20.0,
            "beta2": 0.9999,
            "num_samples": 4,
            "max_grad_norm": 1.0,
        },
        sampling={"step_size": 1e-6, **_steps(settings.iris_steps)},
        num_members=settings.num_members,
        num_draws=settings.iris_draws,
    )
    inputs = (split.test[0], split.outside, _report.curve_inputs())
    return {
        name: _report.Regressed(*(fitted.predict(x, task.likelihood) for x in inputs))
        for name, fitted, _ in _fits(task, settings.seed, "iris")
    }


def _steps(num_steps: int) -> dict[str, int]:
    return {"num_steps": num_steps, "num_burn_in": num_steps // 3, "num_chains": 4}


def _fits(task: Task, seed: int, data: str) -> Iterator[tuple[str, Fitted, float]]:
    """Fit every method: its name, what it found, and the seconds it took."""
    for method in METHODS:
        print(f"{data}: {method.name} ...", file=sys.stderr, flush=True)
        # One pass beforehand, not timed: the first use of an optimizer imports a good part of torch.
        once = {"num_epochs": 1}
        short = {**task.collecting, **once, "collect_every": 1}
        few = {**task.sampling, "num_steps": 2, "num_burn_in": 0}
        brief = {"training": {**task.training, **once}, "collecting": short, "sampling": few}
        method.fit(dataclasses.replace(task, **brief), seed)
        began = time.perf_counter()
        fitted = method.fit(task, seed)
        yield method.name, fitted, time.perf_counter() - began


def _digits_network(x: Tensor, dropout: float) -> nn.Module:
    """Ten outputs; all pixels of the training inputs ``x`` are standardised alike."""
    return nn.Sequential(
        Standardize(x.mean(), x.std()),
        *_hidden(64, 128, nn.ReLU, dropout),
        *_hidden(128, 128, nn.ReLU, dropout),
        nn.Linear(128, 10),
    )


def _iris_network(train: tuple[Tensor, Tensor], dropout: float) -> nn.Module:
    """Two outputs, the mean and the log variance of the petal width in cm."""
    x, y = train
    first, *others = _hidden(1, 50, nn.SiLU, dropout)
    # Networks that begin nearly straight stay so between two groups of data, and an ensemble of them
    # is sure of itself there. With weights of size 2 they begin with bends narrower than the gap.
    nn.init.normal_(first.weight, std=2.0)  # type: ignore[arg-type]  # nn.Linear
    nn.init.normal_(first.bias, std=2.0)  # type: ignore[arg-type]
    return nn.Sequential(
        Standardize(x.mean(), x.std()),
        *(first, *others),
        *_hidden(50, 50, nn.SiLU, dropout),
        nn.Linear(50, 2),
        Rescale(y.mean(), y.std()),
    )


def _hidden(width_in: int, width_out: int, activation: type[nn.Module], dropout: float) -> list[nn.Module]:
    layers = [nn.Linear(width_in, width_out), activation()]
    return [*layers, nn.Dropout(dropout)] if dropout else layers
