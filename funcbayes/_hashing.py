"""Hashing of 64-bit integers by SplitMix64, Steele, Lea & Flood (2014), figure 16.

Its state advances by a constant, and a finalizer, a bijection, makes a number of each state. Signed integers
stand for the unsigned ones that are the same modulo ``2^64``.
"""

import functools
import hashlib
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._functorch import is_readable, is_traced

GOLDEN = 0x9E3779B97F4A7C15  # by which the state advances
_MASK = (1 << 64) - 1
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Up to so many numbers are hashed by NumPy, whose calls take a third of the time of torch's; of more torch
# makes several threads.
FEW = 1 << 15

Array = np.ndarray[Any, np.dtype[np.uint64]]
# The numbers above, made once: this takes as long as an operation does.
_GOLDEN, _BY_1, _BY_2, _30, _27, _31 = map(np.uint64, (GOLDEN, _MIX_1, _MIX_2, 30, 27, 31))

_registration = threading.Lock()


def signed(value: int) -> int:
    """The number of the range of int64 that is the same modulo ``2^64``."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


@functools.lru_cache(maxsize=1 << 14)
def hash_string(text: str) -> int:
    """A number of the range of int64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def mix(state: int) -> int:
    """The number that comes after a state."""
    state = (state + GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
    state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
    return state ^ (state >> 31)


@functools.lru_cache(maxsize=1 << 10)
def start_of(stream: int) -> int:
    """What is added to a key to start counting from, for a stream of numbers with a number of its own.

    Not from the key itself, which would give the keys that are folded out of it.
    """
    return signed(mix(stream))


def mixed(state: Tensor) -> Tensor:
    """:func:`mix` for each state of a tensor."""
    return finalized(state + signed(GOLDEN))


def finalized(state: Tensor) -> Tensor:
    """The numbers of states."""
    state = stirred(state)
    return shift_right(state, 31).bitwise_xor_(state)


def stirred(state: Tensor) -> Tensor:
    """All of the finalizer but its last step, which leaves the leading 31 bits as they are."""
    # int64 arithmetic wraps as the unsigned one does; only the shifts need the sign bits removed. Where there
    # are few keys the number of operations is what takes time, and those in place take less.
    state = shift_right(state, 30).bitwise_xor_(state).mul_(signed(_MIX_1))
    return shift_right(state, 27).bitwise_xor_(state).mul_(signed(_MIX_2))


def shift_right(state: Tensor, bits: int) -> Tensor:
    """With zeros in front, as unsigned numbers are shifted."""
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def are_few(integers: Tensor | int) -> bool:
    """Whether a tensor is hashed fastest, and may be, as an array of NumPy's; numbers are in any case."""
    if not isinstance(integers, Tensor):
        return True
    is_small = integers.numel() <= FEW and integers.device.type == "cpu"
    return is_small and not integers.is_floating_point() and is_readable(integers)


def array(integers: Tensor) -> Array:
    """Integers as an array that shares their memory if they are of int64."""
    return integers.long().numpy().view(np.uint64)


def tensor(numbers: Array) -> Tensor:
    """Undo :func:`array`."""
    return torch.from_numpy(numbers.view(np.int64))


def finalized_array(state: Array) -> Array:
    """:func:`finalized` for an array, of at least one axis: scalars would warn where they wrap."""
    first = state >> _30
    first ^= state
    first *= _BY_1
    second = first >> _27
    second ^= first
    second *= _BY_2
    last = second >> _31
    last ^= second
    return last


def mixed_few(key: Tensor | int, number: Tensor | int) -> Tensor:
    """:func:`mix` as many steps after ``key`` as ``number`` says, where :func:`are_few`; one is a tensor."""
    starts = np.uint64(key & _MASK) if isinstance(key, int) else array(key)
    steps = np.uint64(number * GOLDEN & _MASK) if isinstance(number, int) else array(number) * _GOLDEN
    state = np.add(starts, steps)
    numbers = finalized_array(state.reshape(-1) + _GOLDEN)
    return tensor(numbers).view(state.shape)


def is_for_an_operator(key: Tensor) -> bool:
    """Whether hashing is written down, for a CPU, where arithmetic may be compiled as C++.

    C++ leaves open what signed integers do beyond their range, and its compilers draw conclusions from that.
    """
    return is_traced() and key.device.type == "cpu"


def advanced(start: Tensor, number: Tensor | None) -> Tensor:
    """The state as many steps after ``start`` as a number says."""
    return start if number is None else start + number.long() * signed(GOLDEN)


def hash_op() -> torch.library.CustomOpDef:
    """The operator ``funcbayes::hash``."""
    with _registration:
        return _register_hash_op()


@functools.cache
def _register_hash_op() -> torch.library.CustomOpDef:
    # SplitMix64 one step more than `number` after `start`; or the state of `number` steps, put through all of
    # its finalizer but the last step.
    @torch.library.custom_op(
        "funcbayes::hash", mutates_args=(), schema="(Tensor start, Tensor? number, bool entire) -> Tensor"
    )
    def hashed(start: Tensor, number: Tensor | None, entire: bool) -> Tensor:
        state = advanced(start, number).contiguous()
        return mixed(state) if entire else stirred(state)

    @hashed.register_fake
    def _(start: Tensor, number: Tensor | None, entire: bool) -> Tensor:
        shape = start.shape if number is None else torch.broadcast_shapes(start.shape, number.shape)
        return start.new_empty(shape)

    @hashed.register_vmap
    def _(info, in_dims, start, number, entire):  # noqa: ANN001, ANN202
        given = [(t, axis) for t, axis in ((start, in_dims[0]), (number, in_dims[1])) if t is not None]
        ndim = max(t.ndim - (axis is not None) for t, axis in given)
        made = []
        for t, axis in given:
            if axis is not None:  # in front, with axes of one where it has fewer than the other
                t = t.movedim(axis, 0)
                t = t.reshape(t.shape[0], *(1 for _ in range(ndim + 1 - t.ndim)), *t.shape[1:])
            made.append(t)
        return hashed(made[0], made[1] if len(made) == 2 else None, entire), 0

    return hashed
