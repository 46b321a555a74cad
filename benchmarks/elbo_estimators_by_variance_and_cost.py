"""Local reparameterisation takes less time than drawn weights to a gradient of the same precision.

The total variance of the gradient of a mean-field ELBO with 10 draws and 128 rows, times the time of a step,
against drawn weights. It is how many times as long drawn weights take to a gradient that is as precise. The
networks were fitted for some steps, as q is for most of a fit. The claims are of local reparameterisation:
less than drawn weights cost. (Flipout pays where rows are many and weights few; sticking the landing where q
has come close to the posterior, which no mean field comes to that of a network.)

Beforehand means of the gradients are compared: all are of the same objective, but for local noise of
convolutions.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import funcbayes as fb

from ._measure import How, Result, compare
from .elbo_step_against_loop_and_peers import DRAWS, NETWORKS, NUM_DATA, data, network

ROWS, SEEDS = 128, 60


def run(how: How) -> Iterator[Result]:
    for name in how.some(NETWORKS):
        steps = _steps(name)
        gradients = {estimator: _gradients(step) for estimator, step in steps.items()}
        if name != "lenet":
            _assert_they_agree(gradients)
        variances = {estimator: float(g.var(0).sum()) for estimator, g in gradients.items()}
        for estimator in ("stl", "flipout", "local"):
            less = variances["reparam"] / variances[estimator]
            timed = compare(
                *("", functools.partial(steps["reparam"], 0), functools.partial(steps[estimator], 0)),
                repeats=how.repeats,
                warm_up=3,
                seconds=0.05,
            )
            yield Result(
                f"{estimator}, {name}, variance {less:.2f} times less",
                *(less * value for value in (timed.ratio, timed.low, timed.high)),
                *(timed.theirs_ms, timed.ours_ms),
                at_least=1.0 if estimator == "local" else None,
            )


def _steps(name: str) -> dict[str, Callable[[int], Tensor]]:
    """Gradients by seed, of each estimator."""
    fn, params = fb.make_functional(network(name))
    x, y = data(name, ROWS)
    likelihood, state = fb.likelihoods.Categorical(), fb.vi.init(params, init_scale=0.05)

    def keep(epoch: int, elbo: float, moved: fb.vi.VariationalState) -> None:
        nonlocal state
        state = moved

    fb.vi.fit(
        *(fn, params, (x, y), likelihood),
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
        num_epochs=30,
        num_data=NUM_DATA,
        start=state,
        seed=0,
        callback=keep,
    )
    leaves = [leaf.requires_grad_() for tree in (state.mean, state.rho) for leaf in tree.values()]

    def step(seed: int, estimator: str) -> Tensor:
        loss = fb.vi.negative_elbo(
            *(fn, None, state, (x, y), likelihood),
            num_data=NUM_DATA,
            num_samples=DRAWS,
            seed=seed,
            estimator=estimator,
        )
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves)])

    return {one: functools.partial(step, estimator=one) for one in ("reparam", "stl", "flipout", "local")}


def _gradients(step: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([step(seed) for seed in range(SEEDS)])


def _assert_they_agree(gradients: dict[str, Tensor]) -> None:
    """The squared distance of two means is that of their errors, within the errors of that."""
    expected = gradients["reparam"]
    for estimator, found in gradients.items():
        if estimator == "reparam":
            continue
        apart = float((found.mean(0) - expected.mean(0)).square().sum())
        error = float((found.var(0) + expected.var(0)).sum()) / SEEDS
        assert apart < 3 * error, (estimator, apart, error)
