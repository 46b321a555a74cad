"""The linearised predictive is found far faster than by laplace-torch, and without the Jacobian's memory.

The claims are of medians over a small MLP, LeNet and a small residual network: with a Kronecker posterior at
least 30 times, with a diagonal one 10; and of a last layer of 1000 classes, 10. "Theirs" is `la(x)`, the
probit predictive, as by default; "ours" is the same by `predict_linearized`. Both are given posteriors of the
same curvature, and have to give the same probabilities. Memory is that of one prediction at its peak. The
last case is of more rows than a Jacobian of the last layer leaves memory for.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import funcbayes as fb

from . import _laplace_torch
from ._measure import How, Result, compare, median_of, peak_mb
from ._models import Block

ROWS = {"mlp-small": 128, "lenet": 16, "resnet": 4}
AT_LEAST = {"kron": 30.0, "diag": 10.0}
LAST_LAYER_ROWS, MANY_ROWS, FEATURES, CLASSES = 2, 256, 64, 1000
CLAIM = __name__.rpartition(".")[2]


def run(how: How) -> Iterator[Result]:
    for structure, at_least in AT_LEAST.items():
        results = []
        for name in ROWS:
            results.append(
                _measured(f"{structure}, {name}, {ROWS[name]} rows", structure, name, None, how.repeats)
            )
            yield results[-1]
        yield median_of(f"{structure}, median over networks", results, at_least)
    case = f"last layer, {CLASSES} classes, {LAST_LAYER_ROWS} rows"
    yield _measured(case, "kron", "last", 10.0, how.repeats)
    ours = prepared("ours", "kron", "many")
    alone = compare(
        f"last layer, {MANY_ROWS} rows, ours twice", ours, ours, repeats=2, warm_up=1, seconds=0.0
    )
    yield Result(**{**vars(alone), "ours_mb": peak_mb(CLAIM, "ours", "kron", "many")})


def _measured(case: str, structure: str, name: str, at_least: float | None, repeats: int) -> Result:
    theirs, ours = (prepared(who, structure, name) for who in ("theirs", "ours"))
    torch.testing.assert_close(ours(), theirs(), rtol=2e-2, atol=1e-3)
    result = compare(case, theirs, ours, repeats=repeats, at_least=at_least, warm_up=2, seconds=0.0)
    peaks = {f"{who}_mb": peak_mb(CLAIM, who, structure, name) for who in ("theirs", "ours")}
    return Result(**{**vars(result), **peaks})


def prepared(who: str, structure: str, name: str) -> Callable[[], Tensor]:
    """One prediction."""
    last = name in ("last", "many")
    net, names, x, y = _with_a_wide_head() if last else _laplace_torch.classifier(name, 32)
    rows = {"last": LAST_LAYER_ROWS, "many": MANY_ROWS, **ROWS}[name]
    new = torch.randn(rows, *x.shape[1:], generator=torch.Generator().manual_seed(2))
    if who == "theirs":
        return _theirs(net, x, y, structure, new, last=last)
    fn, params = fb.make_functional(net)
    likelihood = fb.likelihoods.Categorical()
    posterior = fb.laplace.fit(fn, params, (x, y), likelihood, structure=structure, where=names)
    predict = functools.partial(fb.predict_linearized, fn, params, posterior, new, likelihood=likelihood)
    return lambda: predict().mean


def _theirs(
    net: nn.Module, x: Tensor, y: Tensor, structure: str, new: Tensor, *, last: bool
) -> Callable[[], Tensor]:
    if last:
        laplace = _laplace_torch.load()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=len(x))
        with _laplace_torch.quiet():
            la = laplace.Laplace(net, "classification", "last_layer", structure)
            la.fit(loader)
    else:
        # curvlinops takes every network, but for a diagonal it is slow where BackPACK can do it.
        with_backpack = structure == "diag" and not any(isinstance(part, Block) for part in net.modules())
        backend = _laplace_torch.backends()["BackPackGGN" if with_backpack else "CurvlinopsGGN"]
        la: Any = _laplace_torch.fitted(net, x, y, structure, backend)

    def predict() -> Tensor:
        with _laplace_torch.quiet():
            return la(new).detach()

    return predict


def _with_a_wide_head() -> tuple[nn.Module, list[str], Tensor, Tensor]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(64, FEATURES), nn.ReLU())
    net = nn.Sequential(body, nn.Linear(FEATURES, CLASSES))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, CLASSES, (64,), generator=torch.Generator().manual_seed(1))
    return net, ["1.weight", "1.bias"], x, y
