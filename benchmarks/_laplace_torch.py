"""The released laplace-torch, and how it is called."""

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ._measure import Unavailable, apart
from ._models import MODELS, inputs, labels

_LONG = 10  # seconds, from which on one call is enough to tell
_SHORT, _MOST = 60, 600  # seconds for one backend where another one works, and where none has yet


class OutOfMemoryError(Exception):
    """No backend that takes the network has the memory."""


def load() -> Any:
    """The package; ``Unavailable`` if it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import laplace
            import laplace.curvature
    except Exception as error:  # it imports torchvision, which raises other errors, too
        raise Unavailable(f"laplace-torch cannot be imported ({error}): pip install '.[bench]'.") from error
    return laplace


def backends() -> dict[str, Any]:
    """Those that can be imported, by name, in the order of asking."""
    curvature = load().curvature
    names = ("AsdlGGN", "BackPackGGN", "CurvlinopsGGN")
    return {name: getattr(curvature, name) for name in names if hasattr(curvature, name)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def classifier(name: str, rows: int, small: bool = False) -> tuple[nn.Module, list[str], Tensor, Tensor]:
    """A network, the names of its parameters but those of BatchNorm, and data.

    laplace-torch has no curvature of BatchNorm for all structures, so neither side has one here.
    """
    torch.manual_seed(0)
    net: Any = SMALL[name]() if small else MODELS[name]()
    # Dropout does nothing here, and BackPACK does not take all kinds of it; BatchNorm is as at prediction.
    net = nn.Sequential(*(part for part in net if not isinstance(part, nn.Dropout | nn.Dropout2d))).eval()
    norms = {f"{path}." for path, part in net.named_modules() if isinstance(part, nn.BatchNorm2d)}
    names = [n for n, _ in net.named_parameters() if not any(n.startswith(path) for path in norms)]
    for n, p in net.named_parameters():
        p.requires_grad_(n in names)
    x = inputs(name, rows)
    return net, names, x, labels(rows)


def loader_of(x: Tensor, y: Tensor, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """What both sides are given."""
    return DataLoader(TensorDataset(x, y), batch_size)


def fitted(net: nn.Module, loader: DataLoader[Any], structure: str, backend: Any, subset: str = "all") -> Any:
    """A Laplace approximation of all parameters that require gradients, or those of the last layer."""
    with quiet():
        la = load().Laplace(net, "classification", subset, structure, backend=backend)
        la.fit(loader)
    return la


def seconds_of(call: Callable[[], object], check: Callable[[Any], None]) -> float:
    """Of one call, after another one if that is short; ``check`` is given what it returns."""
    seconds = _LONG
    for _ in range(2):
        began = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - began
        if seconds > _LONG:
            break
    check(result)
    return seconds


def fastest(seconds: Callable[[str], float]) -> str:
    """Name of the fastest backend of those that work and agree.

    Each is tried in a process of its own, and not for long: for some networks some need more memory than
    there is, or take a hundred times as long as others.

    Args:
        seconds: What one takes, given its name; raises an error if it does not work or agree. It is sent to
            other processes.

    Raises:
        OutOfMemoryError: If those that take the network need more memory than there is.
        RuntimeError: If there is none for another reason.
    """
    times, errors = {}, {}
    for name in backends():
        patience = max(_SHORT, 30 * min(times.values())) if times else _MOST
        try:
            times[name] = apart(seconds, name, seconds=patience)
        except Exception as error:  # not every backend takes every network
            errors[name] = error
    if not times:
        is_killed = any(isinstance(error, BrokenProcessPool | MemoryError) for error in errors.values())
        is_wrong = any(isinstance(error, AssertionError) for error in errors.values())
        reasons = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in errors.items())
        raise (OutOfMemoryError if is_killed and not is_wrong else RuntimeError)(f"None works. {reasons}")
    return min(times, key=lambda name: times[name])


def _small_lenet() -> nn.Module:
    body = (
        nn.Conv2d(1, 4, 5, 2, 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def _small_resnet() -> nn.Module:
    from ._models import Block

    blocks = (Block(4, 8, 2, 0.0), Block(8, 8, 2, 0.0))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.ReLU(), *blocks, *head)


# For matrices (P, P): 1.3 to 4.8 thousand parameters.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "mlp-small": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    "lenet": _small_lenet,
    "resnet": _small_resnet,
}
