"""Antithetic draws take less time than independent ones to a predictive mean of the same precision.

The variance of the predictive mean over seeds, summed over outputs, times the time of `predict` with 32 draws
of a mean-field Gaussian with standard deviations of 0.02, which are made in the call; class probabilities of
32 rows. The ratio is how many times as long independent draws take to a mean that is as precise.

Beforehand the means over all seeds are compared.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import funcbayes as fb

from ._measure import How, Result, compare
from ._models import MODELS, around, inputs

ROWS, DRAWS, SEEDS = 32, 32, 20


def run(how: How) -> Iterator[Result]:
    for name in ("mlp-small", "mlp", "lenet"):
        torch.manual_seed(0)
        fn, params = fb.make_functional(MODELS[name]())
        q = around(params, 0.02**2)
        alone, pairs = (_mean(fn, posterior, inputs(name, ROWS)) for posterior in (q, fb.antithetic(q)))
        of_alone, of_pairs = (torch.stack([f(seed) for seed in range(SEEDS)]) for f in (alone, pairs))
        error = ((of_alone.var(0) + of_pairs.var(0)).sum() / SEEDS).sqrt()
        apart = (of_alone.mean(0) - of_pairs.mean(0)).norm()
        assert apart < 3 * error, (name, float(apart), float(error))
        less = float(of_alone.var(0).sum() / of_pairs.var(0).sum())
        timed = compare("", lambda f=alone: f(0), lambda f=pairs: f(0), repeats=how.repeats)
        yield Result(
            f"{name}, variance {less:.1f} times less",
            *(less * value for value in (timed.ratio, timed.low, timed.high)),
            *(timed.theirs_ms, timed.ours_ms),
            at_least=1.0,
        )


def _mean(fn: fb.FunctionalModule, posterior: fb.Posterior, x: Tensor) -> Callable[[int], Tensor]:
    likelihood = fb.likelihoods.Categorical()

    def mean(seed: int) -> Tensor:
        found = fb.predict(fn, None, posterior, x, likelihood=likelihood, num_samples=DRAWS, seed=seed)
        return found.mean

    return mean
