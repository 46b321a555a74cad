"""Thirty-two draws cost less than three forward passes where only the end of the network is random.

The posterior covers the last layer of a small ResNet, or its dropout stands only before that layer, so
the rest is evaluated once. "Theirs" is three forward passes of the module: a ratio above 1 proves it.
"""

from collections.abc import Iterator

import torch

import funcbayes as fb

from ._measure import How, Result, compare
from ._models import around, inputs, resnet

ON_ANY_DEVICE = True
NUM_SAMPLES = 32
AT_LEAST = 1.0


def run(how: How) -> Iterator[Result]:
    for rows in how.some((1, 32)):
        torch.manual_seed(0)
        module = resnet(head_rate=0.2).eval().to(how.device)  # its own passes are predictions
        x = inputs("resnet", rows, how.device)
        fn, params = fb.make_functional(module)
        head = {k: v for k, v in params.items() if k.startswith("7.3.")}
        for name, posterior in {"last layer": around(head, 1e-2), "dropout before it": fb.Dropout()}.items():
            yield _against_three_passes(f"{name}, {rows} rows", fn, params, posterior, module, x, how.repeats)


def _against_three_passes(case, fn, params, posterior, module, x, repeats):  # noqa: ANN001, ANN202
    def three_passes() -> None:
        with torch.no_grad():
            for _ in range(3):
                module(x)

    def ours() -> torch.Tensor:
        return fb.predict(fn, params, posterior, x, num_samples=NUM_SAMPLES, seed=0).samples

    one_by_one = fb.predict(fn, params, posterior, x, num_samples=NUM_SAMPLES, seed=0, chunk_size=1).samples
    torch.testing.assert_close(ours(), one_by_one, rtol=1e-3, atol=1e-4)
    return compare(case, three_passes, ours, repeats=repeats, at_least=AT_LEAST)
