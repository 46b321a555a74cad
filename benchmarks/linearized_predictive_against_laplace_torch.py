"""The linearised predictive is found far faster than by laplace-torch, and without the Jacobian's memory.

The claims are of medians over a small MLP, LeNet and a small residual network with 32 rows: with a Kronecker
posterior at least 30 times, with a diagonal one 10; and of a last layer of 1000 classes, 10. Fewer rows are
shown beside, of which nothing is claimed: with few rows the calls of torch are most of either time, while
theirs takes time, and memory, that for convolutions grow faster than the rows. "Theirs" is `la(x)`, the
probit predictive, as by default, with the fastest, for the case, of the backends ASDL, BackPACK and
curvlinops that take the network in the memory there is; where none does, as with 24 GB for the residual
network with 32 rows, the ratio is infinite. "Ours" is the same by `predict_linearized`. Both have to give the
same probabilities, to 0.001, because Kronecker factors of convolutions by BackPACK are others. Each has a
process of its own. Memory is that of one prediction at its peak. The last case is of more rows than a
Jacobian of the last layer leaves memory for.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import funcbayes as fb

from . import _laplace_torch
from ._measure import How, Result, compare, compare_apart, median_of, peak_mb

NAMES = ("mlp-small", "lenet", "resnet")
AT_LEAST = {8: {"kron": None, "diag": None}, 32: {"kron": 30.0, "diag": 10.0}}  # by rows
LAST_LAYER_ROWS, MANY_ROWS, FEATURES, CLASSES = 2, 256, 64, 1000
CLAIM = __name__.rpartition(".")[2]


def run(how: How) -> Iterator[Result]:
    for rows, claimed in AT_LEAST.items():
        for structure, at_least in claimed.items():
            results = []
            for name in how.some(NAMES):
                results.append(_measured(structure, name, rows, how.repeats))
                yield results[-1]
            yield median_of(
                f"{structure}, median over networks, {rows} rows", results, None if how.is_quick else at_least
            )
        if how.is_quick:
            break
    yield _measured("kron", "last", LAST_LAYER_ROWS, how.repeats, at_least=10.0)
    many = "kron", "last", MANY_ROWS
    ours = _ours(*many)
    alone = compare(
        f"last layer, {MANY_ROWS} rows, ours twice", ours, ours, repeats=3, warm_up=1, seconds=0.0
    )
    yield replace(alone, ours_mb=peak_mb(CLAIM, "ours", *map(str, many)))


def _measured(structure: str, name: str, rows: int, repeats: int, at_least: float | None = None) -> Result:
    kind = f"last layer, {CLASSES} classes" if name == "last" else f"{structure}, {name}"
    ours = functools.partial(_ours, structure, name, rows)
    try:
        backend = _laplace_torch.fastest(functools.partial(_seconds, structure, name, rows))
    except _laplace_torch.OutOfMemoryError as error:
        print(f"  {kind}, {rows} rows: {error}", flush=True)
        case = f"{kind}, {rows} rows, none has the memory"
        alone = compare_apart(case, ours, ours, repeats=3, warm_up=2, seconds=0.0)
        infinite = dict.fromkeys(("ratio", "low", "high", "theirs_ms"), math.inf)
        return replace(alone, at_least=at_least, **infinite)
    theirs = functools.partial(_theirs, structure, name, rows, backend)
    case = f"{kind}, {rows} rows, {backend}"
    result = compare_apart(case, theirs, ours, repeats=repeats, warm_up=2, seconds=0.0)
    which = structure, name, str(rows)
    return replace(
        result,
        at_least=at_least,
        theirs_mb=peak_mb(CLAIM, "theirs", *which, backend),
        ours_mb=peak_mb(CLAIM, "ours", *which),
    )


def _seconds(structure: str, name: str, rows: int, backend: str) -> float:
    expected = _ours(structure, name, rows)()

    def check(theirs: Any) -> None:
        torch.testing.assert_close(expected, theirs, rtol=2e-2, atol=1e-3)

    return _laplace_torch.seconds_of(_theirs(structure, name, rows, backend), check)


def prepared(who: str, structure: str, name: str, rows: str, backend: str = "") -> Callable[[], Tensor]:
    """One prediction."""
    case = structure, name, int(rows)
    return _ours(*case) if who == "ours" else _theirs(*case, backend)


def _ours(structure: str, name: str, rows: int) -> Callable[[], Tensor]:
    net, names, x, y, new = _case(name, rows)
    fn, params = fb.make_functional(net)
    likelihood = fb.likelihoods.Categorical()
    posterior = fb.laplace.fit(fn, params, (x, y), likelihood, structure=structure, where=names)
    return lambda: fb.predict_linearized(fn, params, posterior, new, likelihood=likelihood).mean


def _theirs(structure: str, name: str, rows: int, backend: str) -> Callable[[], Tensor]:
    net, _, x, y, new = _case(name, rows)
    subset = "last_layer" if name == "last" else "all"
    loader = _laplace_torch.loader_of(x, y, batch_size=256)
    la = _laplace_torch.fitted(net, loader, structure, _laplace_torch.backends()[backend], subset=subset)

    def predict() -> Tensor:
        with _laplace_torch.quiet():
            return la(new).detach()

    return predict


def _case(name: str, rows: int) -> tuple[nn.Module, list[str], Tensor, Tensor, Tensor]:
    """A network, the names of its parameters in question, data, and new inputs."""
    net, names, x, y = _with_a_wide_head() if name == "last" else _laplace_torch.classifier(name, 32)
    return net, names, x, y, torch.randn(rows, *x.shape[1:], generator=torch.Generator().manual_seed(2))


def _with_a_wide_head() -> tuple[nn.Module, list[str], Tensor, Tensor]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, FEATURES), nn.ReLU())
    net = nn.Sequential(body, nn.Linear(FEATURES, CLASSES))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, CLASSES, (64,), generator=torch.Generator().manual_seed(1))
    return net, ["1.weight", "1.bias"], x, y
