"""Time of Laplace of low rank grows about linearly up to 20 million parameters, and so does memory.

"Theirs" is the time of the smallest network times the ratio of the numbers of parameters; a ratio of 1 is
linear growth, less is faster growth. Rank 10 of the GGN of all parameters; and, without a claim, the last
layer with a Kronecker curvature. Its time is that of the eigenvalues of a matrix as wide as the layer before,
which grows with the third power of the width, the network with the second.
"""

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

import funcbayes as fb

from ._measure import How, Result, peak_mb

WIDTHS = (1000, 1700, 2700, 4200)  # of an MLP 784-h-h-10: 1.8 to 21 million parameters
ROWS, RANK = 128, 10
AT_LEAST = {"low rank": 0.6, "last layer": None}
CLAIM = __name__.rpartition(".")[2]


def run(how: How) -> Iterator[Result]:
    for what in ("low rank", "last layer"):
        first: tuple[int, float] | None = None
        for width in how.some(WIDTHS, 2):
            call, size = prepared(what, str(width)), _num_params(width)
            times = []
            for _ in range(max(1, min(how.repeats, 3))):
                began = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - began))
            first = (size, min(times)) if first is None else first
            linear = first[1] * size / first[0]
            ratios = sorted(linear / t for t in times)
            case = f"{what}, {size / 1e6:.1f}M parameters"
            measured = (statistics.median(ratios), ratios[0], ratios[-1], linear, statistics.median(times))
            yield Result(case, *measured, AT_LEAST[what], ours_mb=peak_mb(CLAIM, what, str(width)))


def prepared(what: str, width: str) -> Callable[[], object]:
    """One fit."""
    h = int(width)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(784, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 10))
    fn, params = fb.make_functional(net)
    del net
    x, y = torch.randn(ROWS, 784), torch.randint(0, 10, (ROWS,))
    options = {"structure": "low_rank", "rank": RANK, "seed": 0} if what == "low rank" else {"where": "4.*"}
    likelihood = fb.likelihoods.Categorical()
    return lambda: fb.laplace.fit(fn, params, (x, y), likelihood, batch_size=64, **options)


def _num_params(h: int) -> int:
    return 784 * h + h + h * h + h + h * 10 + 10
