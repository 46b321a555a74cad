"""Where only marginal predictions are wanted, wide layers are drawn several times faster by what they give.

`predict` with 32 draws of a Gaussian, as it is and with `marginal=True`. The claims are of the MLP
784-512-256-10, with 1 row and with 32; convolutions gain nothing, and small networks, bound by calls, lose.
Beforehand means and variances of the outputs are compared.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

import funcbayes as fb

from ._measure import How, Result, compare
from ._models import MODELS, around, inputs

ON_ANY_DEVICE = True
NUM_SAMPLES, MANY = 32, 512
CASES = {("mlp", 1): 5.0, ("mlp", 32): 2.0, ("mlp-small", 1): None, ("mlp-small", 32): None}
CASES |= {("lenet", 1): None, ("lenet", 32): None}


def run(how: How) -> Iterator[Result]:
    for (name, rows), at_least in how.some(CASES.items(), 2):
        torch.manual_seed(0)
        fn, params = fb.make_functional(MODELS[name]().to(how.device))
        q, x = around(params), inputs(name, rows, how.device)

        def drawn(marginal: bool, count: int = NUM_SAMPLES, fn=fn, q=q, x=x) -> Tensor:  # noqa: ANN001
            return fb.predict(fn, None, q, x, num_samples=count, seed=0, marginal=marginal).samples

        one, two = (drawn(marginal, MANY) for marginal in (False, True))
        error = ((one.var(0) + two.var(0)) / MANY).sqrt()
        assert bool(((one.mean(0) - two.mean(0)).abs() < 6 * error).all()), name
        # The relative error of a standard deviation is (2 S)^-1/2 for Gaussians.
        torch.testing.assert_close(one.std(0), two.std(0), rtol=6 * MANY**-0.5, atol=0.0)
        yield compare(
            f"{name}, {rows} rows",
            lambda drawn=drawn: drawn(False),
            lambda drawn=drawn: drawn(True),
            repeats=how.repeats,
            at_least=at_least,
        )
