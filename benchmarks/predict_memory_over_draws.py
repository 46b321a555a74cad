"""The memory of `predict` grows little with the number of draws where samples are not kept.

Peak memory of one prediction with `keep_samples=False`, of draws of a Gaussian, in a process of its own, 16
at a time. (How many at a time are fastest is found out by time, and differs: that peak is bounded, but not
the same at every run.) The ratio is that of the peak with 32 draws and with as many as the case says, and
the claim that 512 need no more than 1.5 times as much.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import funcbayes as fb

from ._measure import How, Result, Unavailable, peak_mb
from ._models import MODELS, around, inputs

ROWS = {"mlp": 1024, "lenet": 128, "resnet": 32}
DRAWS, AT_LEAST = (32, 64, 128, 256, 512), 1 / 1.5
CLAIM = __name__.rpartition(".")[2]


def run(how: How) -> Iterator[Result]:
    for name, rows in ROWS.items():
        first = None
        for draws in (DRAWS[0], DRAWS[-1]) if how.is_quick else DRAWS:
            peak = peak_mb(CLAIM, name, str(rows), str(draws))
            if peak is None:
                raise Unavailable("peak memory is read where Linux tells it.")
            first = peak if first is None else first
            at_least = AT_LEAST if draws == DRAWS[-1] else None
            case, ratio = f"{name}, {rows} rows, {draws} draws", first / peak
            yield Result(case, ratio, ratio, ratio, 0.0, 0.0, at_least, first, peak)


def prepared(name: str, rows: str, draws: str) -> Callable[[], Tensor]:
    """One prediction, after a first with fewer draws."""
    torch.manual_seed(0)
    fn, params = fb.make_functional(MODELS[name]())
    posterior, x = around(params), inputs(name, int(rows))
    options = {"likelihood": fb.likelihoods.Categorical(), "keep_samples": False, "chunk_size": 16, "seed": 0}

    def predicted(draws: int) -> Tensor:
        return fb.predict(fn, None, posterior, x, num_samples=draws, **options).mean

    predicted(1)
    return lambda: predicted(int(draws))
