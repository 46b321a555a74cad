"""The memory of `predict` does not grow with the number of draws where samples are not kept.

Peak memory of predictions with `keep_samples=False` of draws of a Gaussian, 512 draws in all, in a process of
its own whose C library gives back at once what is freed; as it is by default, it keeps more or less of that.
The ratio is that of the peak with 32 draws a prediction and with as many as the case says, and the claim that
512 need no more than 1.1 times as much. How many draws are taken at a time is left to `predict`, which tries
its ways meanwhile.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import funcbayes as fb

from ._measure import How, Result, Unavailable, peak_mb
from ._models import MODELS, around, inputs

ROWS = {"mlp": 1024, "lenet": 128, "resnet": 32}
DRAWS, AT_LEAST = (32, 64, 128, 256, 512), 1 / 1.1
CLAIM = __name__.rpartition(".")[2]


def run(how: How) -> Iterator[Result]:
    for name, rows in how.some(ROWS.items()):
        first = None
        for draws in (DRAWS[0], DRAWS[-1]) if how.is_quick else DRAWS:
            peak = peak_mb(CLAIM, name, str(rows), str(draws), in_use_only=True)
            if peak is None:
                raise Unavailable("peak memory is read where Linux tells it.")
            first = peak if first is None else first
            at_least = AT_LEAST if draws == DRAWS[-1] else None
            case, ratio = f"{name}, {rows} rows, {draws} draws", first / peak
            yield Result(case, ratio, ratio, ratio, 0.0, 0.0, at_least, first, peak)


def prepared(name: str, rows: str, draws: str) -> Callable[[], Tensor]:
    """Predictions, after a first of one draw."""
    torch.manual_seed(0)
    fn, params = fb.make_functional(MODELS[name]())
    posterior, x = around(params), inputs(name, int(rows))
    options = {"likelihood": fb.likelihoods.Categorical(), "keep_samples": False, "seed": 0}

    def predicted(draws: int) -> Tensor:
        return fb.predict(fn, None, posterior, x, num_samples=draws, **options).mean

    predicted(1)
    return lambda: torch.stack([predicted(int(draws)) for _ in range(DRAWS[-1] // int(draws))])
