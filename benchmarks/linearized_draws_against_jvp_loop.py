"""Draws of the linearised model are evaluated no slower than by a Python loop of `torch.func.jvp` over them.

Draws are fixed beforehand for both, and the loop has their deviations from the center, so that only
evaluation is timed. The loop evaluates the model at the center once a draw, a pass of `predict` once.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import jvp

import funcbayes as fb
from funcbayes._functorch import load_forward_rules

from ._measure import How, Result, compare
from ._models import MODELS, around, inputs

ON_ANY_DEVICE = True
NUM_SAMPLES = 32
ROWS = {"mlp": (1, 128), "lenet": (1, 128), "resnet": (1, 32)}
AT_LEAST = 0.95  # "no slower" leaves room for what a median of a few repeats is off


def run(how: How) -> Iterator[Result]:
    for name, several in how.some(ROWS.items()):
        for rows in several:
            yield _one(name, rows, how)


def _one(name: str, rows: int, how: How) -> Result:
    torch.manual_seed(0)
    fn, params = fb.make_functional(MODELS[name]().to(how.device))
    posterior = replace(around(params), linearized=True)
    draws = fb.to_ensemble(posterior, NUM_SAMPLES, seed=0)
    deviations = {k: posterior.sample(NUM_SAMPLES, seed=0)[k] - params[k] for k in params}
    x = inputs(name, rows, how.device)
    load_forward_rules()

    def loop() -> Tensor:
        outputs = []
        with torch.no_grad():
            for i in range(NUM_SAMPLES):
                step = {k: v[i] for k, v in deviations.items()}
                outputs.append(torch.add(*jvp(lambda p: fn(p, x), (params,), (step,))))  # f + J step
            return torch.stack(outputs)

    def ours() -> Tensor:
        return fb.predict(fn, None, draws, x).samples

    torch.testing.assert_close(ours(), loop(), rtol=1e-3, atol=1e-4)
    return compare(f"{name}, {rows} rows", loop, ours, repeats=how.repeats, at_least=AT_LEAST)
