"""How near `predict` with fixed draws is to its floor: one network for as many rows.

The floor of any way to evaluate 32 draws at N rows is one network at 32 N rows, in whichever pieces are
fastest: it reads the weights once, and its products are as large as can be. The ratio is the time of that
floor over ours. It cannot be reached where weights are what is read, with one row of a wide network above
all, where they are 32 times as many; nothing is claimed of it.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import funcbayes as fb

from ._measure import Result, compare, median_of
from ._models import MODELS, ROWS, inputs

NUM_SAMPLES = 32
PIECES = (1, 2, 4, 8, 16, 32)


def run(repeats: int) -> Iterator[Result]:
    found = []
    for name in MODELS:
        for rows in ROWS[name]:
            found.append(_cell(name, rows, repeats))
            yield found[-1]
    yield median_of("median of all", found)


def _cell(name: str, rows: int, repeats: int) -> Result:
    torch.manual_seed(0)
    module = MODELS[name]().eval()  # as at prediction
    fn, params = fb.make_functional(module)
    variance = {k: torch.full_like(v, 1e-4) for k, v in params.items()}
    q = fb.Gaussian(params, fb.covariances.Diagonal(variance))
    draws, x = fb.to_ensemble(q, NUM_SAMPLES, seed=0), inputs(name, rows)

    def ours() -> Tensor:
        return fb.predict(fn, None, draws, x).samples

    wide = x.repeat(NUM_SAMPLES, *(1 for _ in x.shape[1:]))
    ways = [functools.partial(_floor, module, wide, pieces) for pieces in PIECES]
    same = fb.predict(fn, None, fb.Point(params), x).samples[0]
    torch.testing.assert_close(ways[0]()[:rows], same, rtol=1e-3, atol=1e-4)
    floor: Callable[[], Tensor] = min(ways, key=lambda f: Timer("f()", globals={"f": f}).timeit(3).mean)
    return compare(f"{name}, {rows} rows", floor, ours, repeats=repeats)


def _floor(module: nn.Module, x: Tensor, pieces: int) -> Tensor:
    with torch.no_grad():
        return torch.cat([module(part) for part in x.chunk(pieces)])
