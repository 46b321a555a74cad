"""How near `predict` is to its floor: one network for as many rows, and the random numbers it needs.

The floor of any way to evaluate 32 draws at N rows is one network at 32 N rows, in whichever pieces and, of
images, in whichever layout are fastest: it reads the weights once, and its products are as large as can be.
To that come the normals of the weights, or the uniform numbers of the masks, as fast as torch's generator
makes as many. The ratio is the time of that floor over ours. It cannot be reached where weights are what is
read, with one row of a wide network above all, where they are 32 times as many.

The claims are of medians over all models and rows: a time within 1.3 times the floor for draws that are there
beforehand, as those of an ensemble are, and for dropout, 1.5 times for a Gaussian. Left out are 1024 rows of
the ResNet, where a call takes ten seconds.
"""

import copy
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import funcbayes as fb

from ._measure import How, Result, compare, fastest, median_of
from ._models import MODELS, around, inputs
from .predict_against_loop import QUICK_ROWS, ROWS

ON_ANY_DEVICE = True
NUM_SAMPLES = 32
PIECES, LAYOUTS = (1, 2, 4, 8, 16, 32), (torch.contiguous_format, torch.channels_last)
WITHIN = {"ensemble": 1.3, "gaussian": 1.5, "dropout": 1.3}  # times the floor


def run(how: How) -> Iterator[Result]:
    for kind, times in WITHIN.items():
        found = []
        for name, rows in _cells(how):
            found.append(_cell(kind, name, rows, how))
            yield found[-1]
        yield median_of(f"{kind}, median of all", found, None if how.is_quick else 1 / times)


def _cells(how: How) -> list[tuple[str, int]]:
    """Models and rows."""
    every = itertools.product(MODELS, QUICK_ROWS if how.is_quick else ROWS)
    return [cell for cell in every if cell != ("resnet", 1024)]


def _cell(kind: str, name: str, rows: int, how: How) -> Result:
    torch.manual_seed(0)
    rate = {"rate": 0.1} if kind == "dropout" else {}
    module = MODELS[name](**rate).eval().to(how.device)  # as at prediction
    fn, params = fb.make_functional(module)
    x = inputs(name, rows, how.device)
    posterior = {
        "ensemble": fb.to_ensemble(around(params), NUM_SAMPLES, seed=0),
        "gaussian": around(params),
        "dropout": fb.Dropout(),
    }[kind]

    def ours() -> Tensor:
        # Each member of an ensemble once: others would be copied in an order by chance.
        num_samples = None if kind == "ensemble" else NUM_SAMPLES
        return fb.predict(fn, params, posterior, x, num_samples=num_samples, seed=0).samples

    wide = x.repeat(NUM_SAMPLES, *(1 for _ in x.shape[1:]))
    layouts = LAYOUTS if wide.ndim == 4 else LAYOUTS[:1]
    laid_out = [(_in_layout(module, layout), _images_in(wide, layout)) for layout in layouts]
    numbers = _numbers(kind, module, x, sum(v.numel() for v in params.values()))
    ways = [functools.partial(_floor, *pair, n, kind, numbers) for pair in laid_out for n in PIECES]
    same = fb.predict(fn, None, fb.Point(params), x).samples[0]

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found[:rows], same, rtol=1e-3, atol=1e-4)

    floor = fastest(ways, check)
    return compare(f"{kind}, {name}, {rows} rows", floor, ours, repeats=how.repeats)


def _numbers(kind: str, module: nn.Module, x: Tensor, num_params: int) -> int:
    """How many random numbers all draws need."""
    if kind != "dropout":
        return NUM_SAMPLES * num_params if kind == "gaussian" else 0
    sizes: list[int] = []

    def note(part: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        del given
        by_channel = isinstance(part, nn.Dropout2d)
        sizes.append(output.shape[:2].numel() if by_channel else output.numel())

    layers = [part for part in module.modules() if isinstance(part, nn.Dropout | nn.Dropout2d)]
    hooks = [part.register_forward_hook(note) for part in layers]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return NUM_SAMPLES * sum(sizes)


def _in_layout(module: nn.Module, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(module).to(memory_format=layout)


def _images_in(images: Tensor, layout: torch.memory_format) -> Tensor:
    if layout == torch.channels_last and images.shape[1] == 1:
        # They are in both layouts; a convolution takes them for the usual one unless strides say more.
        return images.squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return images.contiguous(memory_format=layout)


def _floor(module: nn.Module, x: Tensor, pieces: int, kind: str, numbers: int) -> Tensor:
    with torch.no_grad():
        if numbers:
            (torch.rand if kind == "dropout" else torch.randn)(numbers, device=x.device)
        return torch.cat([module(part) for part in x.chunk(pieces)])
