"""`predict` is about as fast as the best loop over its draws at many rows, and several times faster at 1.

The loop is the faster of two: over copies of the module, one for every draw, that were made beforehand and
not timed; and over one module whose parameters are set to each draw. Draws of weights are fixed beforehand
for both, so that only evaluation is timed; dropout draws its masks in both, the loop with torch's own dropout
in training mode. In the first four cells only the last layer of the network is random, or its dropout stands
only before that, so that all the rest is evaluated once.

The claims: with 1 row so much faster as the table below says (but twice for 8 draws of dropout in the small
MLP, which are computed in less time than asking for them takes); in no cell an interval below 0.95; and the
geometric mean of all. On an accelerator it is 64 draws of up to 128 rows that should be ten times faster, but
for the ResNet and the LSTM. The cells are all models, rows and draws, those with few first; the last take
minutes a call, and ``--minutes`` leaves them out.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import funcbayes as fb

from ._measure import How, Result, compare, fastest, geometric_mean_of
from ._models import MODELS, around, inputs, resnet

ON_ANY_DEVICE = True
ROWS, QUICK_ROWS = (1, 32, 128, 1024), (1, 32)
DRAWS = {"cpu": (8, 32, 128), "other": (8, 64, 128)}
AT_ONE_ROW = {"mlp-small": 3.0, "mlp": 1.3, "lenet": 3.0, "resnet": 2.0, "transformer": 3.0, "lstm": 1.3}
ON_AN_ACCELERATOR = dict.fromkeys(("mlp-small", "mlp", "lenet", "transformer"), 10.0)
OF_LITTLE, NEVER_BELOW, MEAN, OF_DRAWS = 2.0, 0.95, 1.5, 0.6


def run(how: How) -> Iterator[Result]:
    found, kinds = [], {"weights": _weights, "dropout": _dropout}
    for case, (theirs, ours) in _ends(how.device).items():
        yield compare(case, theirs, ours, repeats=how.repeats, at_least=OF_DRAWS * 32)
    every = [*itertools.product(cells(how), kinds)]
    for (name, rows, draws), kind in every:
        if how.is_over:
            break
        theirs, ours = kinds[kind](name, rows, draws, how.device)
        case = f"{kind}, {name}, {rows} rows, {draws} draws"
        claim = _claim(kind, name, rows, draws, how.device)
        found.append(compare(case, theirs, ours, repeats=how.repeats, **claim))
        yield found[-1]
    if len(found) == len(every):
        yield geometric_mean_of("geometric mean of all", found, MEAN)
    elif found:
        yield geometric_mean_of(f"geometric mean of the first {len(found)} of {len(every)}", found)


def _claim(kind: str, name: str, rows: int, draws: int, device: str) -> dict[str, Any]:
    is_on_cpu = torch.device(device).type == "cpu"
    if is_on_cpu and rows == 1:
        is_least = (kind, name, draws) == ("dropout", "mlp-small", 8)
        return {"at_least": OF_LITTLE if is_least else AT_ONE_ROW[name]}
    if not is_on_cpu and draws == 64 and rows <= 128 and name in ON_AN_ACCELERATOR:
        return {"at_least": ON_AN_ACCELERATOR[name]}
    return {"at_least": NEVER_BELOW, "of_interval": True}


def cells(how: How) -> list[tuple[str, int, int]]:
    """Models, rows and draws; those with the fewest rows of all draws first."""
    draws = DRAWS["cpu" if torch.device(how.device).type == "cpu" else "other"]
    rows, draws = (QUICK_ROWS, draws[1:2]) if how.is_quick else (ROWS, draws)
    return sorted(itertools.product(MODELS, rows, draws), key=lambda cell: cell[1] * cell[2])


Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def _weights(name: str, rows: int, draws: int, device: str) -> Pair:
    torch.manual_seed(0)
    module, x = MODELS[name]().eval().to(device), inputs(name, rows, device)  # loops take its mode
    fn, params = fb.make_functional(module)
    members = fb.Ensemble(around(params).sample(draws, seed=0))

    def ours() -> Tensor:
        return fb.predict(fn, None, members, x).samples

    return faster_loop(module, members.members, x, ours()), ours


def _dropout(name: str, rows: int, draws: int, device: str) -> Pair:
    torch.manual_seed(0)
    module, x = MODELS[name](rate=0.1).to(device), inputs(name, rows, device)
    return _dropping(module, x, draws)


def _dropping(module: nn.Module, x: Tensor, draws: int) -> Pair:
    fn, params = fb.make_functional(module)
    module.train()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()  # dropout is what is timed: its statistics are those of prediction

    def loop() -> Tensor:
        with torch.no_grad():
            return torch.stack([module(x) for _ in range(draws)])

    def ours(chunk_size: int | None = None) -> Tensor:
        options = {"num_samples": draws, "seed": 0, "chunk_size": chunk_size}
        return fb.predict(fn, params, fb.Dropout(), x, **options).samples

    torch.testing.assert_close(ours(), ours(chunk_size=1), rtol=1e-3, atol=1e-4)
    return loop, ours


def _ends(device: str) -> dict[str, Pair]:
    """The last layer of a ResNet, and dropout before it, with 32 draws."""
    found = {}
    for rows in (32, 128):
        torch.manual_seed(0)
        module, x = resnet().eval().to(device), inputs("resnet", rows, device)  # loops take its mode
        fn, params = fb.make_functional(module)
        head = fb.Ensemble(around({k: v for k, v in params.items() if k.startswith("7.")}).sample(32, seed=0))

        def ours(fn=fn, params=params, head=head, x=x) -> Tensor:  # noqa: ANN001
            return fb.predict(fn, params, head, x).samples

        found[f"last layer, {rows} rows"] = faster_loop(module, head.members, x, ours()), ours
        found[f"late dropout, {rows} rows"] = _dropping(resnet(head_rate=0.2).to(device), x, 32)
    return found


def faster_loop(
    module: nn.Module, members: dict[str, Tensor], x: Tensor, expected: Tensor
) -> Callable[[], Tensor]:
    """The faster of two loops over draws, after they have given what is expected."""
    draws = [{name: leaf[i] for name, leaf in members.items()} for i in range(len(expected))]
    modules = [_with_params(module, draw) for draw in draws]

    def over_copies() -> Tensor:
        with torch.no_grad():
            return torch.stack([m(x) for m in modules])

    own = [module.get_parameter(name) for name in members]
    values = [list(draw.values()) for draw in draws]

    def by_setting() -> Tensor:
        found = []
        with torch.no_grad():
            for draw in values:
                for parameter, value in zip(own, draw, strict=True):
                    parameter.data = value
                found.append(module(x))
        return torch.stack(found)

    def check(found: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    return fastest((over_copies, by_setting), check)


def _with_params(module: nn.Module, params: dict[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(module)
    copied.load_state_dict(params, strict=False)
    return copied
