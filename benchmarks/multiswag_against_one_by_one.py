"""MultiSWAG of ten small networks at once is faster than SWAG of ten modules one after another.

The claim is of the smallest network, as for training ensembles; the other is measured beside it.

"Theirs" is plain torch: for each module an optimizer of its own and epochs of shuffled batches, with
forward, loss, backward and step, and at the end of each epoch a mean, a mean of squares and a deviation for
every parameter, updated by hand. "Ours" is one `swag.fit(stacked=True)` for as many epochs and batches,
each network with its own shuffling. Beforehand both collect on one batch of all rows, where no order is
involved, and find the same means and variances.

"Beside training" is the same `swag.fit` against `ensemble.fit`: collecting should add little, so that what
is claimed of training ensembles holds here. Epochs have few steps, which makes the most of its share.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcbayes as fb
from funcbayes import swag

from ._measure import How, Result, compare
from ._models import MODELS, inputs, labels

ON_ANY_DEVICE = True
NUM_NETWORKS, NUM_EPOCHS, RANK = 10, 3, 20
STEPS = {"mlp-small": 10, "mlp": 7}  # an epoch
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
SGD = functools.partial(torch.optim.SGD, lr=0.01)


def run(how: How) -> Iterator[Result]:
    for name in how.some(STEPS):
        for rows in how.some((32, 128)):
            yield from _fitting(name, rows, how)


def _fitting(name: str, rows: int, how: How) -> Iterator[Result]:
    n = rows * STEPS[name]
    x, y, repeats = inputs(name, n, how.device), labels(n, how.device), how.repeats
    fn, members = fb.ensemble.init(MODELS[name], NUM_NETWORKS, seed=0)
    members = {key: value.to(how.device) for key, value in members.items()}
    modules = _modules(name, members)

    def theirs() -> None:
        _one_by_one(modules, x, y, batch_size=rows)

    def ours() -> None:
        _at_once(fn, members, x, y, batch_size=rows)

    _assert_they_agree(name, fn, members, x[:rows], y[:rows])

    def training() -> None:
        fb.ensemble.fit(fn, members, (x, y), fb.likelihoods.Categorical(), **_options(rows))

    case = f"{name}, {rows} rows"
    at_least = 1.0 if name == "mlp-small" else None
    yield compare(case, theirs, ours, repeats=repeats, at_least=at_least, warm_up=1)
    beside = 0.9 if name == "mlp-small" else None
    yield compare(f"{case}, beside training", training, ours, repeats=repeats, at_least=beside, warm_up=1)


def _options(batch_size: int) -> dict[str, object]:
    return {"optimizer": SGD, "num_epochs": NUM_EPOCHS, "batch_size": batch_size, "seed": 0}


def _one_by_one(
    modules: list[nn.Module], x: Tensor, y: Tensor, batch_size: int
) -> list[list[tuple[Tensor, Tensor, list[Tensor]]]]:
    """Mean, mean of squares and deviations of every parameter of every module."""
    found = []
    for module in modules:
        parameters = list(module.parameters())
        optimizer = SGD(parameters)
        moments = [(torch.zeros_like(p), torch.zeros_like(p), []) for p in parameters]
        for epoch in range(NUM_EPOCHS):
            for chosen in torch.randperm(len(y), device=y.device).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(module(x[chosen]), y[chosen]).backward()
                optimizer.step()
            with torch.no_grad():
                for p, (mean, square, deviations) in zip(parameters, moments, strict=True):
                    mean.lerp_(p, 1 / (epoch + 1))
                    square.lerp_(p * p, 1 / (epoch + 1))
                    deviations.append(p - mean)
                    del deviations[:-RANK]
        found.append(moments)
    return found


def _at_once(
    fn: fb.FunctionalModule, members: dict[str, Tensor], x: Tensor, y: Tensor, batch_size: int
) -> fb.Gaussian:
    options = {"stacked": True, "rank": RANK, **_options(batch_size)}
    return swag.fit(fn, members, (x, y), fb.likelihoods.Categorical(), **options)


def _modules(name: str, members: dict[str, Tensor]) -> list[nn.Module]:
    device = next(iter(members.values())).device
    modules = [MODELS[name]().train().to(device) for _ in range(NUM_NETWORKS)]
    for k, module in enumerate(modules):
        module.load_state_dict({key: value[k] for key, value in members.items()}, strict=False)
    return modules


def _assert_they_agree(
    name: str, fn: fb.FunctionalModule, members: dict[str, Tensor], x: Tensor, y: Tensor
) -> None:
    modules = [module.double() for module in _modules(name, members)]
    members = {key: value.double() for key, value in members.items()}
    expected = _one_by_one(modules, x.double(), y, len(y))
    got = _at_once(fn, members, x.double(), y, len(y))
    for k, module in enumerate(modules):
        for (key, _), (mean, square, _) in zip(module.named_parameters(), expected[k], strict=True):
            torch.testing.assert_close(got.mean[key][k], mean)
            variance = got.covariance.variance[key][k]
            torch.testing.assert_close(
                variance, (square - mean**2).clamp_min(1e-30) / 2, rtol=1e-4, atol=1e-12
            )
