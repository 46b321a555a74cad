"""Curvatures of every structure are found faster than by laplace-torch with its fastest backend.

The claims are of medians over a small MLP, LeNet and a small residual network: `kron` at least 2 times,
`diag` 1.5 and `full` 1.3, the latter with smaller networks of the kinds, whose matrices have a few thousand
rows. "Theirs" is `Laplace(net, "classification", "all", structure, backend=...).fit(loader)`, the backend
being the faster one, for the case, of curvlinops and BackPACK that gives a posterior precision with the
determinant of ours. (BackPACK sums the inputs of a convolution over its positions, and does not average
them; for diagonals curvlinops takes minutes, and is asked only where BackPACK cannot.) "Ours" is one
`curvature.ggn`. Each case has a process of its own. Memory is that of one fit at its peak.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import funcbayes as fb

from . import _laplace_torch
from ._measure import How, Result, apart, compare, median_of, peak_mb

ROWS = {"mlp-small": 1024, "lenet": 256, "resnet": 16}
AT_LEAST = {"kron": 2.0, "diag": 1.5, "full": 1.3}
CLAIM = __name__.rpartition(".")[2]


def run(how: How) -> Iterator[Result]:
    for structure, at_least in AT_LEAST.items():
        results = []
        for name in ROWS:
            result, backend = apart(_timed, structure, name, how.repeats)
            peaks = {
                "theirs_mb": peak_mb(CLAIM, "theirs", structure, name, backend),
                "ours_mb": peak_mb(CLAIM, "ours", structure, name),
            }
            results.append(replace(result, **peaks))
            yield results[-1]
        yield median_of(f"{structure}, median over networks", results, at_least)


def _timed(structure: str, name: str, repeats: int) -> tuple[Result, str]:
    """What was timed, and against which backend."""
    makers = {
        backend: functools.partial(_theirs, structure, name, backend)
        for backend in _laplace_torch.backends(structure)
    }
    ours = _ours(structure, name)
    logdet = _logdet(structure, name, ours())

    def check(theirs: Any) -> None:
        expected = theirs.log_det_posterior_precision
        torch.testing.assert_close(
            logdet, expected.detach().to(logdet.dtype).reshape(()), rtol=1e-2, atol=0.0
        )

    backend, theirs = _laplace_torch.fastest(makers, check, is_first_enough=structure == "diag")
    case = f"{structure}, {name}, {backend}"
    return compare(case, theirs, ours, repeats=repeats, warm_up=2, seconds=0.0), backend


def prepared(who: str, structure: str, name: str, backend: str = "") -> Callable[[], object]:
    """One fit."""
    return _ours(structure, name) if who == "ours" else _theirs(structure, name, backend)


def _ours(structure: str, name: str) -> Callable[[], object]:
    net, names, x, y = _laplace_torch.classifier(name, ROWS[name], small=structure == "full")
    fn, params = fb.make_functional(net)
    return functools.partial(
        fb.curvature.ggn, fn, params, (x, y), fb.likelihoods.Categorical(), structure, names
    )


def _theirs(structure: str, name: str, backend: str) -> Callable[[], object]:
    net, _, x, y = _laplace_torch.classifier(name, ROWS[name], small=structure == "full")
    return functools.partial(_laplace_torch.fitted, net, x, y, structure, _laplace_torch.backends()[backend])


def _logdet(structure: str, name: str, c: Any) -> Tensor:
    """Of the posterior precision with a prior of precision one, as laplace-torch has it at first."""
    net, _, _, _ = _laplace_torch.classifier(name, 1, small=structure == "full")
    _, params = fb.make_functional(net)
    return -fb.laplace.posterior(params, c).covariance.logdet()
