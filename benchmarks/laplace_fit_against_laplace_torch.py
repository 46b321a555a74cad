"""Curvatures of every structure are found faster than by laplace-torch with its fastest backend.

The claims are of medians over a small MLP, LeNet and a small residual network: `kron` at least 2 times,
`diag` 1.5, `full` 1.3, the latter with smaller networks of the kinds, whose matrices have a few thousand
rows. "Theirs" is `Laplace(net, "classification", "all", structure, backend=...).fit(loader)`, the backend
being the fastest, for the case, of ASDL, BackPACK and curvlinops, as far as they give a posterior precision
with the determinant of ours. (BackPACK sums the inputs of a convolution over its positions, and does not
average them.) "Ours" is `make_functional` and `curvature.ggn`, with the eigenvectors of Kronecker factors,
because theirs has these after fitting, and no inverse of other matrices. Both see the data in four batches
of one loader, and each has a process of its own. Memory is that of one fit at its peak.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import funcbayes as fb

from . import _laplace_torch
from ._measure import How, Result, compare_apart, median_of, peak_mb

BATCH_SIZES, NUM_BATCHES = {"mlp-small": 256, "lenet": 256, "resnet": 16}, 4
AT_LEAST = {"kron": 2.0, "diag": 1.5, "full": 1.3}
CLAIM = __name__.rpartition(".")[2]


def run(how: How) -> Iterator[Result]:
    for structure, at_least in AT_LEAST.items():
        results = []
        for name in how.some(BATCH_SIZES):
            backend = _laplace_torch.fastest(functools.partial(_seconds, structure, name))
            theirs = functools.partial(_theirs, structure, name, backend)
            ours = functools.partial(_ours, structure, name)
            case = f"{structure}, {name}, {backend}"
            result = compare_apart(case, theirs, ours, repeats=how.repeats, warm_up=2, seconds=0.0)
            peaks = {
                "theirs_mb": peak_mb(CLAIM, "theirs", structure, name, backend),
                "ours_mb": peak_mb(CLAIM, "ours", structure, name),
            }
            results.append(replace(result, **peaks))
            yield results[-1]
        yield median_of(f"{structure}, median over networks", results, None if how.is_quick else at_least)


def _seconds(structure: str, name: str, backend: str) -> float:
    params, c = _ours(structure, name)()
    expected = -fb.laplace.posterior(params, c).covariance.logdet()

    def check(theirs: Any) -> None:
        logdet = theirs.log_det_posterior_precision.detach().to(expected.dtype).reshape(())
        torch.testing.assert_close(expected, logdet, rtol=1e-2, atol=0.0)

    return _laplace_torch.seconds_of(_theirs(structure, name, backend), check)


def prepared(who: str, structure: str, name: str, backend: str = "") -> Callable[[], object]:
    """One fit."""
    return _ours(structure, name) if who == "ours" else _theirs(structure, name, backend)


def _network(structure: str, name: str) -> tuple[nn.Module, list[str], Any]:
    """With the names of its parameters, and its data."""
    rows = BATCH_SIZES[name] * NUM_BATCHES
    net, names, x, y = _laplace_torch.classifier(name, rows, small=structure == "full")
    return net, names, _laplace_torch.loader_of(x, y, BATCH_SIZES[name])


def _ours(structure: str, name: str) -> Callable[[], tuple[Any, Any]]:
    net, names, data = _network(structure, name)

    def fit() -> tuple[Any, Any]:
        fn, params = fb.make_functional(net)
        c: Any = fb.curvature.ggn(fn, params, data, fb.likelihoods.Categorical(), structure, names)
        return params, c.eigen if structure == "kron" else c

    return fit


def _theirs(structure: str, name: str, backend: str) -> Callable[[], object]:
    net, _, data = _network(structure, name)
    return functools.partial(_laplace_torch.fitted, net, data, structure, _laplace_torch.backends()[backend])
