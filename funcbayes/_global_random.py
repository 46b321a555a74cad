"""torch's global random state, for what takes no generator: how modules are initialised, loaders, noise."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

_T = TypeVar("_T")
_MASK = (1 << 63) - 1

# The state may be read and put back only by one thread at a time.
global_state = threading.RLock()


def global_generators() -> tuple[torch.Generator, ...]:
    """The generators of torch's global state, on the CPU and on devices in use."""
    found = [torch.default_generator]
    for backend in (torch.cuda, torch.xpu):
        found += backend.default_generators if backend.is_initialized() else ()
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return tuple(found)


def is_forked() -> bool:
    """Whether this thread is inside of :func:`forked`, where others that want torch's global state wait."""
    return global_state._is_owned()  # type: ignore[attr-defined]  # of every RLock, without a stub


@contextmanager
def forked(key: int) -> Iterator[None]:
    """Run code that draws from torch's global state as if it had been seeded with ``key``.

    The state is put back afterwards, on the CPU and on devices in use, and that of other devices is left
    alone; other threads that fork wait meanwhile.
    """
    with global_state:
        generators = global_generators()
        before = [generator.get_state() for generator in generators]
        try:
            for generator in generators:
                generator.manual_seed(key & _MASK)
            yield
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)


def watched(call: Callable[[], _T]) -> tuple[_T, bool]:
    """What a call gives, and whether it draws from torch's global state."""
    generators = global_generators()
    before = [generator.get_state() for generator in generators]
    found = call()
    after = [generator.get_state() for generator in generators]
    return found, any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
