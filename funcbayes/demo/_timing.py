"""Time of predicting at all draws: ``predict`` against a plain Python loop."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ._methods import Fitted

WARM_UP = 20  # calls; in the first ones `predict` learns how it is fastest


@dataclass(frozen=True)
class Times:
    """Seconds to evaluate all draws: medians."""

    vectorised: float
    loop: float


def compare(fitted: Fitted, x: Tensor, repeats: int) -> Times:
    """Time both ways of evaluating the draws at ``x``, taking turns, after checking that they agree.

    Args:
        fitted: What a method found.
        x: Inputs.
        repeats: Calls of each that are timed.

    Raises:
        RuntimeError: If the two do not agree.
    """
    ways = (lambda: fitted.predict(x).samples, _loop(fitted, x))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _check_agreement(ways[0](), ways[1](), same_draws=fitted.loop is None)
        for way in ways:
            for _ in range(min(WARM_UP, 2 * repeats)):
                way()
        rounds = [[_seconds(way) for way in ways] for _ in range(repeats)]
    return Times(*(statistics.median(times) for times in zip(*rounds, strict=True)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: these networks are too small to gain from more, and times vary less."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _loop(fitted: Fitted, x: Tensor) -> Callable[[], Tensor]:
    """A careful loop over the draws that ``predict`` uses, with all that can be prepared outside of it."""
    if fitted.loop is not None:
        by_hand = fitted.loop
        return lambda: by_hand(x)
    atoms = fitted.posterior.atoms() if fitted.options.get("num_samples") is None else None
    if atoms is not None:
        ready = _separate(atoms[0][0].leaves, fitted)
        return lambda: _evaluate(ready, fitted, x)
    # Drawing is a part of what `predict` does, so it is a part of the loop too.
    return lambda: _evaluate(_separate(fitted.posterior.sample(**fitted.options), fitted), fitted, x)


def _separate(stacked: dict[str, Tensor], fitted: Fitted) -> list[dict[str, Tensor]]:
    """One dict of parameters a draw."""
    given = fitted.params or {}
    draws = zip(*(leaf.unbind(0) for leaf in stacked.values()), strict=True)
    return [{**given, **dict(zip(stacked, leaves, strict=True))} for leaves in draws]


def _evaluate(draws: list[dict[str, Tensor]], fitted: Fitted, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([fitted.fn(params, x) for params in draws])


def _check_agreement(vectorised: Tensor, looped: Tensor, *, same_draws: bool) -> None:
    """Outputs are equal to rounding, or, with other draws, their means are within Monte Carlo error."""
    if vectorised.shape != looped.shape:
        raise _differing(f"shapes are {tuple(vectorised.shape)} and {tuple(looped.shape)}")
    if same_draws:
        if not torch.allclose(vectorised, looped, rtol=1e-4, atol=1e-4):
            raise _differing(f"by up to {(vectorised - looped).abs().max():.2g}")
        return
    # Differences of the two means in units of their standard error: 1 at the root mean square.
    error = ((vectorised.var(0) + looped.var(0)) / len(looped)).clamp_min(1e-12).sqrt()
    size = ((vectorised.mean(0) - looped.mean(0)) / error).square().mean().sqrt()
    if not size < 2:
        raise _differing(f"means over draws are {size:.1f} standard errors apart")


def _differing(how: str) -> RuntimeError:
    return RuntimeError(f"Outputs of `predict` and of the loop differ: {how}.")


def _seconds(way: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began
