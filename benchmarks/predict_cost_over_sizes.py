"""The cost of `predict` grows no faster than draws, rows and parameters do.

An MLP with two hidden layers of one width, and draws that are fixed beforehand. One of the three numbers
grows at a time; the ratio is how much cheaper a draw, a row or a parameter is than in the smallest case of
its kind, and the claim that at the largest it is no more than a fifth dearer.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import funcbayes as fb

from ._measure import How, Result, compare
from ._models import around

ON_ANY_DEVICE = True
DRAWS = (8, 16, 32, 64, 128, 256, 512)
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
WIDTHS = (32, 64, 128, 256, 512, 1024)
MIDDLE = {"draws": 32, "rows": 64, "parameters": 128}  # of parameters the width
AT_LEAST = 0.8


def run(how: How) -> Iterator[Result]:
    for kind, sizes in {"draws": DRAWS, "rows": ROWS, "parameters": WIDTHS}.items():
        smallest, first = _prediction(kind, sizes[0], how.device)
        for size in sizes[-1:] if how.is_quick else sizes:
            ours, amount = _prediction(kind, size, how.device)
            timed = compare("", smallest, ours, repeats=how.repeats)
            ratios = (ratio * amount / first for ratio in (timed.ratio, timed.low, timed.high))
            at_least = AT_LEAST if size == sizes[-1] else None
            yield Result(f"{amount} {kind}", *ratios, timed.theirs_ms, timed.ours_ms, at_least)


def _prediction(kind: str, size: int, device: str) -> tuple[Callable[[], Tensor], int]:
    """A prediction, and how many draws, rows or parameters it is of."""
    draws, rows, width = (size if kind == name else value for name, value in MIDDLE.items())
    torch.manual_seed(0)
    layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    fn, params = fb.make_functional(nn.Sequential(*layers).to(device))
    members = fb.to_ensemble(around(params), draws, seed=0)
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(device)
    amount = sum(v.numel() for v in params.values()) if kind == "parameters" else size
    return lambda: fb.predict(fn, None, members, x).samples, amount
