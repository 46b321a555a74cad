"""Thirty-two draws of a SWAG Gaussian cost at most 1.5 times their normals and one matrix product.

"Theirs" is what no way of drawing can do without: the normals of one million parameters, from one generator
a draw, made by the function and in the threads that draws are made by, and the product `(32, 20) @ (20, 1M)`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from funcbayes import swag
from funcbayes._random import fold, normal

from ._measure import How, Result, compare

NUM_SAMPLES, RANK, NUM_PARAMS = 32, 20, 1_000_000
AT_LEAST = 1 / 1.5


def run(how: How) -> Iterator[Result]:
    shapes = {"one leaf": {"w": (1000, 1000)}, "ten leaves": {f"w{i}": (100, 1000) for i in range(10)}}
    for name, leaves in how.some(shapes.items()):
        yield _drawing(name, leaves, how.repeats)


def _drawing(case: str, shapes: dict[str, tuple[int, int]], repeats: int) -> Result:
    generator = torch.Generator().manual_seed(0)

    def snapshot() -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    state = swag.init(snapshot(), RANK)
    for _ in range(RANK + 1):
        state = swag.update(state, snapshot())
    posterior = swag.posterior(state)
    factors, shared = torch.randn(RANK, NUM_PARAMS), torch.randn(NUM_SAMPLES, RANK)

    def theirs() -> tuple[Tensor, Tensor]:
        keys = fold(0, torch.arange(NUM_SAMPLES))
        return normal(keys, (NUM_PARAMS,)), shared @ factors

    def ours() -> dict[str, Tensor]:
        return posterior.sample(NUM_SAMPLES, seed=0)

    _assert_they_spread_as_they_should(ours(), posterior.variance)
    return compare(case, theirs, ours, repeats=repeats, at_least=AT_LEAST, warm_up=3)


def _assert_they_spread_as_they_should(draws: dict[str, Tensor], variance: dict[str, Tensor]) -> None:
    for name, leaf in draws.items():
        ratio = float(leaf.var(0).mean() / variance[name].mean())
        assert 0.9 < ratio < 1.1, f"the variance of {name} is {ratio:.2f} times what it should be"
