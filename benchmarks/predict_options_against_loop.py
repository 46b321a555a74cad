"""What `compile=True` and `dtype=torch.bfloat16` add to `predict`, against the same loop in plain float32.

32 draws of the weights, fixed beforehand, against the faster of two loops over them, as in
`predict_against_loop`: as it is, as a compiled program, which is made beforehand, and in bfloat16. Nothing is
claimed: what a compiler gains depends on the machine, and bfloat16 is slow where a processor has no
instructions for it. Beforehand outputs are compared, in bfloat16 to within its precision.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import funcbayes as fb

from ._measure import How, Result, compare, geometric_mean_of
from ._models import MODELS, around, inputs
from .predict_against_loop import faster_loop

ON_ANY_DEVICE = True
DRAWS, ROWS = 32, (1, 32)


def run(how: How) -> Iterator[Result]:
    found: dict[str, list[Result]] = {"as it is": [], "compiled": [], "bfloat16": []}
    for name in how.some(MODELS):
        for rows in how.some(ROWS):
            torch.manual_seed(0)
            module = MODELS[name]().eval().to(how.device)  # loops take its mode
            x = inputs(name, rows, how.device)
            fn, params = fb.make_functional(module)
            members = fb.Ensemble(around(params).sample(DRAWS, seed=0))

            def ours(fn=fn, members=members, x=x, **options: object) -> Tensor:  # noqa: ANN001
                return fb.predict(fn, None, members, x, **options).samples

            expected = ours()
            loop = faster_loop(module, members.members, x, expected)
            ways: dict[str, Callable[[], Tensor]] = {
                "as it is": ours,
                "compiled": lambda ours=ours: ours(compile=True),
                "bfloat16": lambda ours=ours: ours(dtype=torch.bfloat16),
            }
            for how_so, way in ways.items():
                _assert_they_agree(way(), expected, how_so == "bfloat16")
                case = f"{how_so}, {name}, {rows} rows"
                found[how_so].append(compare(case, loop, way, repeats=how.repeats))
                yield found[how_so][-1]
    for how_so, results in found.items():
        yield geometric_mean_of(f"{how_so}, geometric mean of all", results)


def _assert_they_agree(got: Tensor, expected: Tensor, is_coarse: bool) -> None:
    if not is_coarse:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        return
    error = (got.float() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(torch.bfloat16).eps, f"outputs in bfloat16 are {error:.3f} off"
