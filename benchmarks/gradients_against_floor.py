"""How near training, the ELBO, curvature and linearised predictions are to their floor.

The floor of a step of ten networks on batches of N rows, and of a step on the ELBO with ten draws, is forward
and backward through one network with 10 N rows, in whichever pieces are fastest: it reads the weights once,
and its products are as large as can be. To that come the normals of ten draws for the ELBO, and for training
a step of Adam of ten networks. The floor of curvature and of a linearised prediction with 10 outputs is
forward and backward through 10 N rows, too: a gradient of each output of each row. The ratio is the time of
that floor over ours; nothing is claimed of it.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcbayes as fb

from ._measure import How, Result, compare, fastest, median_of
from ._models import MODELS, around, inputs, labels
from .ensemble_against_one_by_one import ROWS

ON_ANY_DEVICE = True
TIMES, NUM_DATA, SCALE = 10, 10_000, 0.05  # networks, draws, or outputs
PIECES = (1, 2, 5, 10)
STEPS = 5  # of training in one call
Call = Callable[[], object]


def run(how: How) -> Iterator[Result]:
    kinds: dict[str, Callable[[str, Tensor, Tensor], tuple[Call, int, bool]]] = {
        "training": _training,
        "ELBO": _elbo,
        "diagonal curvature": _curvature,
        "linearised prediction": _linearized,
    }
    for kind, make in kinds.items():
        found = []
        for name in how.some(MODELS, 3):
            for rows in how.some(ROWS.get(name, (32, 128))):
                x, y = inputs(name, rows, how.device), labels(rows, how.device)
                ours, numbers, has_steps = make(name, x, y)
                floor = _floor(name, x, y, numbers, has_steps)
                case = f"{kind}, {name}, {rows} rows"
                found.append(compare(case, floor, ours, repeats=how.repeats, warm_up=3))
                yield found[-1]
        yield median_of(f"{kind}, median of all", found)


def _network(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(device)


def _training(name: str, x: Tensor, y: Tensor) -> tuple[Call, int, bool]:
    """Several steps, so that what begins and ends a fit is a small part."""
    device = x.device
    fn, members = fb.ensemble.init(lambda: MODELS[name]().to(device), TIMES, seed=0)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    likelihood, how = fb.likelihoods.Categorical(), {"optimizer": adam, "num_epochs": STEPS, "seed": 0}
    return lambda: fb.ensemble.fit(fn, members, (x, y), likelihood, **how), 0, True


def _elbo(name: str, x: Tensor, y: Tensor) -> tuple[Call, int, bool]:
    fn, params = fb.make_functional(_network(name, x.device))
    state, likelihood = fb.vi.init(params, init_scale=SCALE), fb.likelihoods.Categorical()
    leaves = [leaf.requires_grad_() for tree in (state.mean, state.rho) for leaf in tree.values()]
    options = {"num_data": NUM_DATA, "num_samples": TIMES, "seed": 0}

    def ours() -> object:
        loss = fb.vi.negative_elbo(fn, None, state, (x, y), likelihood, **options)
        return torch.autograd.grad(loss, leaves)

    return ours, TIMES * sum(leaf.numel() for leaf in params.values()), False


def _curvature(name: str, x: Tensor, y: Tensor) -> tuple[Call, int, bool]:
    fn, params = fb.make_functional(_network(name, x.device))
    likelihood = fb.likelihoods.Categorical()
    return lambda: fb.curvature.ggn(fn, params, (x, y), likelihood, structure="diag"), 0, False


def _linearized(name: str, x: Tensor, y: Tensor) -> tuple[Call, int, bool]:
    del y
    fn, params = fb.make_functional(_network(name, x.device))
    q = around(params)
    return lambda: fb.predict_linearized(fn, params, q, x).variance, 0, False


def _floor(name: str, x: Tensor, y: Tensor, numbers: int, has_steps: bool) -> Call:
    """Forward and backward with ten times the rows; and normals, or steps of an optimizer."""
    module = _network(name, x.device)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()  # as at prediction, which takes less time
    leaves = [*module.parameters()]
    wide, targets = x.repeat(TIMES, *(1 for _ in x.shape[1:])), y.repeat(TIMES)
    all_of_them = [torch.zeros(TIMES, *leaf.shape, device=x.device, requires_grad=True) for leaf in leaves]
    for leaf in all_of_them:
        leaf.grad = torch.ones_like(leaf)
    optimizer = torch.optim.Adam(all_of_them, lr=1e-3)

    def once(pieces: int) -> None:
        if numbers:
            torch.randn(numbers, device=x.device)
        for rows, y in zip(wide.chunk(pieces), targets.chunk(pieces), strict=True):
            F.cross_entropy(module(rows), y).backward()
        if has_steps:
            optimizer.step()
        module.zero_grad()

    def call(pieces: int) -> None:
        for _ in range(STEPS if has_steps else 1):
            once(pieces)

    return fastest([functools.partial(call, pieces) for pieces in PIECES])
