"""`predict` is faster than a Python loop over the same draws at 1 row, and no slower at many rows.

The loop is the faster of two: over copies of the module, one for every draw, that were made beforehand and
not timed; and over one module whose parameters are set to each draw. Draws of weights are fixed beforehand
for both, so that only evaluation is timed; dropout draws its masks in both, the loop with torch's own dropout
in training mode.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import funcbayes as fb

from ._measure import Result, compare
from ._models import MODELS, ROWS, inputs

NUM_SAMPLES = 32
AT_ONE_ROW, AT_MANY_ROWS = 1.0, 0.9  # "no slower" leaves room for what a median of a few repeats is off


def run(repeats: int) -> Iterator[Result]:
    for name in MODELS:
        for rows in ROWS[name]:
            yield _weights(name, rows, repeats)
    for name in MODELS:
        for rows in ROWS[name]:
            yield _dropout(name, rows, repeats)


def _weights(name: str, rows: int, repeats: int) -> Result:
    torch.manual_seed(0)
    module = MODELS[name]().eval()  # so are its copies in the loop
    fn, params = fb.make_functional(module)
    variance = {k: torch.full_like(v, 1e-4) for k, v in params.items()}
    posterior = fb.Gaussian(params, fb.covariances.Diagonal(variance))
    draws = fb.Ensemble(posterior.sample(NUM_SAMPLES, seed=0))
    x = inputs(name, rows)
    modules = [_with_params(module, draws.member(i)) for i in range(NUM_SAMPLES)]

    def over_copies() -> Tensor:
        with torch.no_grad():
            return torch.stack([m(x) for m in modules])

    own = [module.get_parameter(name) for name in params]
    values = [[draws.member(i)[name] for name in params] for i in range(NUM_SAMPLES)]

    def by_setting() -> Tensor:
        found = []
        with torch.no_grad():
            for draw in values:
                for parameter, value in zip(own, draw, strict=True):
                    parameter.data = value
                found.append(module(x))
        return torch.stack(found)

    def ours() -> Tensor:
        return fb.predict(fn, None, draws, x).samples

    torch.testing.assert_close(ours(), over_copies(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(by_setting(), over_copies(), rtol=1e-3, atol=1e-4)
    loop = min((over_copies, by_setting), key=lambda f: Timer("f()", globals={"f": f}).timeit(3).mean)
    return compare(f"weights, {name}, {rows} rows", loop, ours, repeats=repeats, at_least=_at_least(rows))


def _dropout(name: str, rows: int, repeats: int) -> Result:
    torch.manual_seed(0)
    module = MODELS[name](rate=0.1)
    fn, params = fb.make_functional(module)
    posterior, x = fb.Dropout(), inputs(name, rows)
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()  # dropout is what is timed: its statistics are those of prediction

    def loop() -> Tensor:
        with torch.no_grad():
            return torch.stack([module(x) for _ in range(NUM_SAMPLES)])

    def ours() -> Tensor:
        return fb.predict(fn, params, posterior, x, num_samples=NUM_SAMPLES, seed=0).samples

    one_by_one = fb.predict(fn, params, posterior, x, num_samples=NUM_SAMPLES, seed=0, chunk_size=1).samples
    torch.testing.assert_close(ours(), one_by_one, rtol=1e-3, atol=1e-4)
    return compare(f"dropout, {name}, {rows} rows", loop, ours, repeats=repeats, at_least=_at_least(rows))


def _at_least(rows: int) -> float:
    return AT_ONE_ROW if rows == 1 else AT_MANY_ROWS


def _with_params(module: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(module)
    copied.load_state_dict(params, strict=False)
    return copied
