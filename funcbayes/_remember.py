"""Remembering what was found out about a model, for as long as the model lives."""

import threading
import types
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


class Remembered(Generic[_T]):
    """Values by model and by what else they depend on; safe among threads.

    Args:
        most: Values remembered for one model; those that were not asked for longest are forgotten.
    """

    def __init__(self, most: int = 32) -> None:
        self._most = most
        self._values: weakref.WeakKeyDictionary[Any, dict[Hashable, _T]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, fn: Any, key: Hashable, make: Callable[[], _T]) -> _T:
        """What was remembered, or else what ``make`` gives, from now on."""
        key = (getattr(fn, "__func__", None), key)
        try:
            owner = _owner(fn)
            with self._lock:
                values = self._values.setdefault(owner, {})
                if key in values:
                    value = values[key] = values.pop(key)  # now the last to be forgotten
                    return value
        except TypeError:  # a callable that takes no weak references
            return make()
        value = make()  # without the lock: it may take long, and may ask for others
        with self._lock:
            while len(values) >= self._most:
                del values[next(iter(values))]
            return values.setdefault(key, value)

    def count(self, fn: Any) -> int:
        """How many values are remembered for a model."""
        return len(self._values.get(_owner(fn), ()))


class _Identity:
    """Stands for an object that has no hash, as a dataclass that can be compared."""


_identities: dict[int, _Identity] = {}  # by `id`, for as long as the objects live


def _owner(fn: Any) -> Any:
    # A bound method is made anew at every access; its object lives as long as it matters.
    owner = fn.__self__ if isinstance(fn, types.MethodType) else fn
    try:
        hash(owner)
    except TypeError:
        pass
    else:
        return owner
    if id(owner) not in _identities:
        weakref.finalize(owner, _identities.pop, id(owner), None).atexit = False
        _identities.setdefault(id(owner), _Identity())
    return _identities[id(owner)]
