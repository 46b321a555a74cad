"""Antithetic draws take less time than independent ones to a predictive mean of the same precision.

The variance of the predictive mean over seeds, summed over outputs, times the time of `predict` with 32 draws
of a mean-field Gaussian, which are made in the call; class probabilities of 32 rows. The ratio is how many
times as long independent draws take to a mean that is as precise.

The claim is of antithetic draws of all parameters, with standard deviations of 0.02. Beside it are antithetic
and orthogonal draws, and both, of 20 coordinates in a subspace of the small MLP, with deviations as far as
0.05 of each parameter would be, and of all its parameters, where orthogonal ones have nothing to gain.
Beforehand the means over all seeds are compared.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import funcbayes as fb

from ._measure import How, Result, compare
from ._models import MODELS, around, inputs

ON_ANY_DEVICE = True
ROWS, DRAWS, SEEDS, DIMENSIONS = 32, 32, 60, 20
Model = Callable[[dict[str, Tensor], Tensor], Tensor]
Case = tuple[Model, fb.Posterior, Tensor]


def run(how: How) -> Iterator[Result]:
    for name in how.some(("mlp-small", "mlp", "lenet")):
        fn, params = _network(name, how.device)
        case = fn, around(params, 0.02**2), inputs(name, ROWS, how.device)
        yield _compared(f"antithetic, {name}", case, fb.antithetic, how, 1.0)
    cases = {f"{DIMENSIONS} dimensions": _subspace(how.device), "all dimensions": _whole(how.device)}
    for name, case in how.some(cases.items()):
        yield _compared(f"antithetic, {name}", case, fb.antithetic, how)
        yield _compared(f"orthogonal, {name}", case, fb.orthogonal, how)
        yield _compared(f"both, {name}", case, lambda q: fb.antithetic(fb.orthogonal(q)), how)


def _network(name: str, device: str) -> tuple[fb.FunctionalModule, dict[str, Tensor]]:
    torch.manual_seed(0)
    return fb.make_functional(MODELS[name]().to(device))


def _whole(device: str) -> Case:
    fn, params = _network("mlp-small", device)
    return fn, around(params, 0.05**2), inputs("mlp-small", ROWS, device)


def _subspace(device: str) -> Case:
    """A random one through the parameters, whose draws lie as far from them as those of all would."""
    fn, params = _network("mlp-small", device)
    generator = torch.Generator().manual_seed(0)
    basis = {
        name: torch.randn(DIMENSIONS, *leaf.shape, generator=generator).to(device)
        for name, leaf in params.items()
    }
    std = 0.05 / math.sqrt(DIMENSIONS)

    def inside(own: dict[str, Tensor], x: Tensor) -> Tensor:
        moved = {name: leaf + torch.tensordot(own["z"], basis[name], 1) for name, leaf in params.items()}
        return fn(moved, x)

    q = around({"z": torch.zeros(DIMENSIONS, device=device)}, std**2)
    return inside, q, inputs("mlp-small", ROWS, device)


def _compared(
    name: str,
    case: Case,
    couple: Callable[[fb.Posterior], fb.Posterior],
    how: How,
    at_least: float | None = None,
) -> Result:
    fn, q, x = case
    alone, coupled = (_mean(fn, posterior, x) for posterior in (q, couple(q)))
    of_alone, of_coupled = (torch.stack([f(seed) for seed in range(SEEDS)]) for f in (alone, coupled))
    error = ((of_alone.var(0) + of_coupled.var(0)).sum() / SEEDS).sqrt()
    apart = (of_alone.mean(0) - of_coupled.mean(0)).norm()
    assert apart < 3 * error, (name, float(apart), float(error))
    less = float(of_alone.var(0).sum() / of_coupled.var(0).sum())
    timed = compare("", lambda: alone(0), lambda: coupled(0), repeats=how.repeats)
    ratios = (less * value for value in (timed.ratio, timed.low, timed.high))
    return Result(
        f"{name}, variance {less:.1f} times less", *ratios, timed.theirs_ms, timed.ours_ms, at_least=at_least
    )


def _mean(fn: Model, posterior: fb.Posterior, x: Tensor) -> Callable[[int], Tensor]:
    likelihood = fb.likelihoods.Categorical()

    def mean(seed: int) -> Tensor:
        found = fb.predict(fn, None, posterior, x, likelihood=likelihood, num_samples=DRAWS, seed=seed)
        return found.mean

    return mean
