"""Curvatures of every structure are found faster than by laplace-torch with its fastest backend.

The claims are of medians over a small MLP, LeNet and a small residual network: `kron` at least 2 times,
`diag` 1.5 and `full` 1.3, the latter with smaller networks of the kinds, whose matrices have a few thousand
rows. "Theirs" is `Laplace(net, "classification", "all", structure, backend=...).fit(loader)`, the backend
being the faster one of curvlinops and BackPACK for the case. "Ours" is one `curvature.ggn`. Beforehand both
have to give posterior precisions of one determinant. Memory is that of one fit at its peak.
"""

import functools
from collections.abc import Callable, Iterator

import torch

import funcbayes as fb

from . import _laplace_torch
from ._measure import Result, compare, median_of, peak_mb

ROWS = {"mlp-small": 1024, "lenet": 256, "resnet": 32}
AT_LEAST = {"kron": 2.0, "diag": 1.5, "full": 1.3}
CLAIM = __name__.rpartition(".")[2]


def run(repeats: int) -> Iterator[Result]:
    _laplace_torch.load()
    for structure, at_least in AT_LEAST.items():
        results = []
        for name in ROWS:
            results.append(_one(structure, name, repeats))
            yield results[-1]
        yield median_of(f"{structure}, median over networks", results, at_least)


def _one(structure: str, name: str, repeats: int) -> Result:
    ways = {backend: _theirs(structure, name, backend) for backend in _laplace_torch.backends()}
    fastest = _laplace_torch.fastest(ways)
    ours = _ours(structure, name)
    _assert_they_agree(structure, name, ways[fastest]())
    case = f"{structure}, {name}, {fastest}"
    result = compare(case, ways[fastest], ours, repeats=repeats, warm_up=2, seconds=0.0)
    peaks = {
        "theirs_mb": peak_mb(CLAIM, "theirs", structure, name, fastest),
        "ours_mb": peak_mb(CLAIM, "ours", structure, name),
    }
    return Result(**{**vars(result), **peaks})


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


def _assert_they_agree(structure: str, name: str, theirs: object) -> None:
    net, _, _, _ = _laplace_torch.classifier(name, 1, small=structure == "full")
    _, params = fb.make_functional(net)
    c = _ours(structure, name)()
    got = -fb.laplace.posterior(params, c).covariance.logdet()  # type: ignore[arg-type]
    expected = theirs.log_det_posterior_precision  # type: ignore[attr-defined]
    torch.testing.assert_close(got, expected.detach().to(got.dtype).reshape(()), rtol=1e-2, atol=0.0)
