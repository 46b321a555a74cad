"""Training ten small networks at once is faster than training ten modules one after another.

The claims: at least three times as fast for the smallest network, for LeNet twice with 32 rows a batch and
1.3 times with 128, and never slower for the others.

"Theirs" is plain torch: for each module an optimizer of its own and one epoch of shuffled batches, with
forward, loss, backward and step. "Ours" is one `ensemble.fit` for as many epochs, batches and Adam
steps, each member with its own shuffling. Beforehand both train from the same parameters on one batch
of all rows, where no order is involved, and end at the same parameters.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcbayes as fb

from ._measure import How, Result, compare
from ._models import MODELS, inputs, labels

ON_ANY_DEVICE = True
NUM_MEMBERS = 10
ROWS = {"resnet": (8, 32), "transformer": (8, 32, 128)}  # a batch; of others 32 and 128
AT_LEAST = {("mlp-small", 32): 3.0, ("mlp-small", 128): 3.0, ("lenet", 32): 2.0, ("lenet", 128): 1.3}
STEPS = {"mlp-small": 30, "mlp": 20, "lenet": 30}  # an epoch; of others 10
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def run(how: How) -> Iterator[Result]:
    for name in how.some(MODELS, 3):
        for rows in how.some(ROWS.get(name, (32, 128))):
            yield _training(name, rows, how)


def _training(name: str, rows: int, how: How) -> Result:
    n = rows * STEPS.get(name, 10)
    x, y = inputs(name, n, how.device), labels(n, how.device)
    fn, members = fb.ensemble.init(MODELS[name], NUM_MEMBERS, seed=0)
    members = {key: value.to(how.device) for key, value in members.items()}
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    modules = _modules(name, members)

    def theirs() -> None:
        _one_by_one(modules, x, y, adam, batch_size=rows)

    def ours() -> None:
        _at_once(fn, members, x, y, adam, batch_size=rows)

    _assert_they_agree(name, fn, members, x[:rows], y[:rows])
    times = AT_LEAST.get((name, rows))
    claim = {"at_least": 0.95, "of_interval": True} if times is None else {"at_least": times}
    return compare(f"{name}, {rows} rows", theirs, ours, repeats=how.repeats, warm_up=1, **claim)


def _one_by_one(
    modules: list[nn.Module],
    x: Tensor,
    y: Tensor,
    make_optimizer: MakeOptimizer,
    batch_size: int,
    num_epochs: int = 1,
) -> None:
    for module in modules:
        optimizer = make_optimizer(list(module.parameters()))
        for _ in range(num_epochs):
            for chosen in torch.randperm(len(y), device=y.device).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(module(x[chosen]), y[chosen]).backward()
                optimizer.step()


def _at_once(
    fn: fb.FunctionalModule,
    members: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    optimizer: MakeOptimizer,
    batch_size: int,
    num_epochs: int = 1,
) -> dict[str, Tensor]:
    options = {"optimizer": optimizer, "num_epochs": num_epochs, "batch_size": batch_size, "seed": 0}
    return fb.ensemble.fit(fn, members, (x, y), fb.likelihoods.Categorical(), **options).members


def _modules(name: str, members: dict[str, Tensor]) -> list[nn.Module]:
    device = next(iter(members.values())).device
    modules = [MODELS[name]().train().to(device) for _ in range(NUM_MEMBERS)]
    for k, module in enumerate(modules):
        module.load_state_dict({key: value[k] for key, value in members.items()}, strict=False)
    return modules


def _assert_they_agree(
    name: str, fn: fb.FunctionalModule, members: dict[str, Tensor], x: Tensor, y: Tensor
) -> None:
    # Not Adam, which makes a step of a gradient that is nothing but rounding.
    sgd = functools.partial(torch.optim.SGD, lr=0.01)
    modules = _modules(name, members)
    _one_by_one(modules, x, y, sgd, len(y), num_epochs=3)
    got = _at_once(fn, members, x, y, sgd, len(y), num_epochs=3)
    for k, module in enumerate(modules):
        for key, value in module.named_parameters():
            torch.testing.assert_close(got[key][k], value.detach(), rtol=1e-3, atol=1e-4)
