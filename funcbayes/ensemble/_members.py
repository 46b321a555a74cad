"""Making members: one network a seed, or modules that exist."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .._checks import positive_int
from .._functional import FunctionalModule, make_functional
from .._global_random import forked
from .._random import resolve_seed
from .._tree import Fixed, Params, difference, stack
from ..posteriors import Ensemble
from ..training._several import member_seeds


def init(
    make_module: Callable[[], nn.Module],
    num_members: int,
    seed: int | None = None,
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> tuple[FunctionalModule, Params]:
    """Build the members of an ensemble, each from random weights of its own.

    Args:
        make_module: Builds a module, with torch's global random state seeded from the member's seed;
            the state is put back afterwards.
        num_members: How many, ``K``.
        seed: See :func:`member_seeds`; ``None`` draws one.
        call: As in :func:`funcbayes.make_functional`.

    Returns:
        ``fn`` and ``members``, parameters with a leading axis ``K``. Buffers whose values differ between
        the modules are among them as ``Fixed``; the others are frozen in ``fn``.

    Raises:
        TypeError: If ``make_module`` is a module or makes something else.
        ValueError: If there is less than one member, or the modules differ in more than values.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, members = fb.ensemble.init(lambda: torch.nn.Linear(3, 2), num_members=4, seed=0)
        >>> members["weight"].shape
        torch.Size([4, 2, 3])
    """
    if isinstance(make_module, nn.Module) or not callable(make_module):
        raise TypeError(
            "`ensemble.init(make_module, ...)` should be given a function that builds a new module, got "
            f"{type(make_module).__name__}. Write `lambda: Net(...)`."
        )
    num_members = positive_int(num_members, "ensemble.init(num_members=...)")
    modules = []
    for member_seed in member_seeds(int(resolve_seed(seed)), num_members):
        with forked(member_seed):
            modules.append(make_module())
    return _stacked_modules(
        modules, call, "ensemble.init(make_module, ...)", "Build a new one at every call."
    )


def from_modules(
    modules: Iterable[nn.Module], call: Callable[[nn.Module, Any], Any] | None = None
) -> tuple[FunctionalModule, Ensemble]:
    """Make an ensemble of modules that were trained elsewhere.

    Args:
        modules: Modules of one architecture; they are copied.
        call: As in :func:`funcbayes.make_functional`.

    Returns:
        ``fn`` and the ensemble, with equal weights. Buffers whose values differ between the modules
        (BatchNorm's statistics) are in the members as ``Fixed``.

    Raises:
        TypeError: If one of them is no module.
        ValueError: If there are none, one is there twice, or they differ in more than values.

    Example:
        >>> import torch, funcbayes as fb
        >>> fn, ensemble = fb.ensemble.from_modules([torch.nn.Linear(3, 2) for _ in range(4)])
        >>> ensemble.members["bias"].shape
        torch.Size([4, 2])
    """
    modules = list(modules)
    if not modules:
        raise ValueError("`ensemble.from_modules(modules)` should be given at least one module, got none.")
    fn, members = _stacked_modules(
        modules, call, "ensemble.from_modules(modules)", "Keep copies: `copy.deepcopy(module)`."
    )
    return fn, Ensemble(members)


def _stacked_modules(
    modules: Sequence[nn.Module], call: Callable[[nn.Module, Any], Any] | None, quoted: str, way_out: str
) -> tuple[FunctionalModule, Params]:
    for k in range(len(modules)):
        _check_module(k, modules, quoted, way_out)
    split = [make_functional(module, call) for module in modules]
    fn = split[0][0]
    for k, (other, params) in enumerate(split[1:], start=1):
        found = difference(params, split[0][1]) or difference(other.buffers, fn.buffers)
        if found:
            raise ValueError(
                f"`{quoted}` should be given modules of one architecture; in module {k}, {found} (module 0)."
            )
    buffers = stack([other.buffers for other, _ in split])
    varying = {name: Fixed(b) for name, b in buffers.items() if not bool((b == b[0]).all())}
    return fn, {**stack([params for _, params in split]), **varying}


def _check_module(k: int, modules: Sequence[nn.Module], quoted: str, way_out: str) -> None:
    """Refuse a module that is none, is there twice, or is built otherwise than the first."""
    module = modules[k]
    if not isinstance(module, nn.Module):
        raise TypeError(f"`{quoted}` should be given modules, got {type(module).__name__}.")
    for j in range(k):
        if modules[j] is module:
            raise ValueError(f"`{quoted}` should be given different modules; {j} and {k} are one. {way_out}")
    first = {name: _description(part) for name, part in modules[0].named_modules()}
    own = {name: _description(part) for name, part in module.named_modules()}
    for name in (*first, *own):
        if first.get(name) != own.get(name):
            raise ValueError(
                f"`{quoted}` should be given modules of one architecture; {name!r} is "
                f"{own.get(name, 'missing')} in module {k} and {first.get(name, 'missing')} in module 0."
            )


def _description(part: nn.Module) -> str:
    # What torch's layers say of themselves is how they were built; others may say anything.
    is_torch = type(part).__module__.startswith("torch.nn.")
    return type(part).__name__ + (f"({part.extra_repr()})" if is_torch else "")
