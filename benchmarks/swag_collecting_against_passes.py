"""Collecting a snapshot for SWAG costs less than four passes over the parameters.

The claim is of ten million parameters in one leaf, which no cache holds; others are measured beside it, whose
many small leaves cost calls rather than memory.

A pass is `theta - mean`, one new tensor for every leaf, and as many of them are kept as there are snapshots:
one that wrote over what was freed just before would find it in a cache. "Theirs" is a hundred and sixty of
them, "ours" forty snapshots in a row, each update working on what the last one gave, at a time when as many
are kept as the rank asks for: every eighth, or without a rank every fifth, then merges a block with the
moments of those before.

Large blocks are kept for the process, as they are from the first step of training on. Where glibc maps each
of them anew, finding memory costs more than arithmetic, and a snapshot less than two passes.
"""

import collections
from collections.abc import Iterator

import torch
from torch import Tensor

from funcbayes import swag
from funcbayes._allocator import keep_large_blocks

from ._measure import How, Result, compare
from ._models import resnet

RANK, BLOCK = 20, 5  # snapshots kept: of a rank, or without one
SNAPSHOTS = 40  # a multiple of the sizes of blocks
AT_LEAST = 1.0  # four passes take at least as long


def run(how: How) -> Iterator[Result]:
    keep_large_blocks()
    for name, params in how.some(_models().items()):
        for rank in (RANK, 0):
            yield _collecting(f"{name}, rank {rank}", params, rank, how.repeats)


def _models() -> dict[str, dict[str, Tensor]]:
    """Parameters in one leaf, in those of a wide network, and in those of a small one."""
    wide = {f"{i}.weight": torch.empty(256, 256, 3, 3) for i in range(8)}
    wide |= {f"{i}.weight": torch.empty(512, 512, 3, 3) for i in range(8, 10)}
    wide |= {f"norm.{i}": torch.empty(256) for i in range(40)}
    small = {name: p.detach() for name, p in resnet().named_parameters()}
    shapes = {
        "one leaf of 10M": {"w": torch.empty(10_000, 1000)},
        "residual net of 9.4M": wide,
        "one leaf of 1M": {"w": torch.empty(1000, 1000)},
        "residual net of 175k": small,
    }
    generator = torch.Generator().manual_seed(0)
    return {
        name: {k: torch.randn(leaf.shape, generator=generator) for k, leaf in params.items()}
        for name, params in shapes.items()
    }


def _collecting(case: str, params: dict[str, Tensor], rank: int, repeats: int) -> Result:
    mean = {name: leaf + 1 for name, leaf in params.items()}
    state = swag.init(params, rank)
    for _ in range(rank + SNAPSHOTS):
        state = swag.update(state, params)

    kept = collections.deque(maxlen=rank or BLOCK)

    def passes() -> None:
        for _ in range(4 * SNAPSHOTS):
            kept.append({name: leaf - mean[name] for name, leaf in params.items()})

    def ours() -> None:
        nonlocal state
        for _ in range(SNAPSHOTS):
            state = swag.update(state, params)

    claimed = AT_LEAST if max(leaf.numel() for leaf in params.values()) > 5_000_000 else None
    return compare(case, passes, ours, repeats=repeats, at_least=claimed, warm_up=3)
