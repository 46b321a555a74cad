"""Keyed noise: every number drawn is a function of a key, never of the order of asking.

A key is a 64-bit hash of what the noise is for: the seed, the draw's index, the leaf's path.
:func:`normal` and :func:`uniform` make each key's entries by a generator of its own, or by hashing it with a
counter, also under ``torch.func.vmap``: so a draw does not depend on how many are asked for together, in
which order, or in which thread.
"""

import functools
import math
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import overload

import torch
from torch import Tensor

from ._functorch import (
    is_concrete,
    is_plain,
    is_readable,
    outside_transforms,
    unseen,
    unwrap,
    vmap_level,
    wrap,
)
from ._global_random import global_state
from ._hashing import (
    GOLDEN,
    advanced,
    are_few,
    finalized,
    hash_op,
    hash_string,
    is_for_an_operator,
    mix,
    mixed,
    mixed_few,
    shift_right,
    signed,
    start_of,
    stirred,
)

Seed = int | Tensor  # an int64 scalar tensor where fits or chains are vmapped over seeds

# From this many numbers on, filling rows in several threads pays for starting them.
_THREADED_NUMEL = 1 << 21
# Up to this many uniforms a key are made by hashing, more by a generator.
_HASHED_NUMEL = 192
_SEEDS = (1 << 63) - 1  # of a generator

_registration = threading.Lock()


@overload
def fold(key: int, data: int | str) -> int: ...
@overload
def fold(key: Tensor, data: int | str | Tensor) -> Tensor: ...
@overload
def fold(key: int, data: Tensor) -> Tensor: ...
def fold(key: Seed, data: int | str | Tensor) -> Seed:
    """Hash ``data`` into ``key``: number ``data`` of the SplitMix64 sequence that starts at ``key``.

    Args:
        key: A seed or a key, int or int64 tensor of any shape.
        data: An int, a string, or an int64 tensor that broadcasts with ``key``.

    Returns:
        A key in the range of int64: an int if both arguments are plain, otherwise a tensor.
    """
    value = hash_string(data) if isinstance(data, str) else data
    if not isinstance(key, Tensor) and not isinstance(value, Tensor):
        return signed(mix(key + value * GOLDEN))
    if are_few(key) and are_few(value):
        return mixed_few(key, value)
    if not isinstance(value, Tensor):  # a sum of one constant is safe in compiled code, too
        start, number = key.long() + signed(value * GOLDEN), None  # type: ignore[union-attr]  # one is a tensor
    elif isinstance(key, Tensor):
        start, number = key.long(), value
    else:
        start, number = torch.full_like(value, signed(key), dtype=torch.int64), value
    if is_for_an_operator(start):
        return hash_op()(start, number, True)
    return _without_axis(mixed, advanced(start, number))


def _without_axis(elementwise: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Apply a function of each entry: inside ``vmap`` to the tensor that is mapped over, which costs less."""
    level = vmap_level()
    physical, axis = (values, None) if level is None else unwrap(values, level)
    if level is None or axis is None or not is_concrete(physical):
        return elementwise(values)
    with outside_transforms():
        found = elementwise(physical)
    return wrap(found, axis, level)


def keys_by_name(key: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """``{name: fold(key, name)}``, hashed in one go because there can be hundreds of leaves."""
    names = list(names)
    if not names:
        return {}
    hashes = torch.tensor([hash_string(name) for name in names], device=key.device)
    keys = fold(key, hashes.reshape(-1, *(1 for _ in key.shape)))
    return dict(zip(names, keys.unbind(0), strict=True))


def resolve_seed(seed: Seed | None) -> Seed:
    """``seed`` itself, or one number drawn from torch's global state, so ``torch.manual_seed`` governs it."""
    if seed is None:
        with global_state:  # which another thread may have forked
            return int(torch.randint(0, 2**63 - 1, ()))
    if not isinstance(seed, Tensor) and not isinstance(seed, bool) and hasattr(seed, "__index__"):
        return operator.index(seed)
    if not isinstance(seed, Tensor):
        raise TypeError(f"`seed` should be an int, or an int64 scalar tensor, got {type(seed).__name__}.")
    if seed.is_floating_point() or seed.ndim:
        raise TypeError(
            f"`seed` should be an int or an int64 scalar tensor, got {seed.dtype}, shape {tuple(seed.shape)}."
        )
    return seed


def normal(
    key: Tensor,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw standard normals, a function of ``key`` alone.

    Args:
        key: int64 tensor of shape ``k``; each entry has a stream of its own.
        shape: Shape ``s`` of the noise of one key.
        dtype: Of the result. Half precision is drawn in float32 and rounded.
        device: Of the result. Draws agree on one type of device and one dtype.

    Returns:
        Noise of shape ``(*k, *s)``. Under ``vmap`` a batched key gives batched noise.
    """
    return _noise(key, shape, dtype, torch.device(device), gaussian=True)


def uniform(
    key: Seed,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw uniforms on ``[0, 1)``, a function of ``key`` alone; arguments as in :func:`normal`.

    A ``key`` that is a plain int gives what the same number in a scalar tensor would.
    """
    return _noise(key, shape, dtype, torch.device(device), gaussian=False)


def _is_hashed(shape: Sequence[int], device: torch.device) -> bool:
    """Whether uniform noise of one key is made by hashing.

    Seeding a generator costs as much as hashing some hundred counters, and on an accelerator it would be a
    kernel of its own for every key. Which one is used depends on what one key is for, not on how many are
    asked for.
    """
    return device.type != "cpu" or math.prod(shape) <= _HASHED_NUMEL


def _noise(
    key: Seed, shape: Sequence[int], dtype: torch.dtype, device: torch.device, gaussian: bool
) -> Tensor:
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    # Normals are left to generators on the CPU, because a vectorised cosine may round differently at the end
    # of a tensor, and a draw should be the same in any company.
    if device.type != "cpu" or (_is_hashed(shape, device) and not gaussian):
        return _hashed(torch.as_tensor(key).to(device), tuple(shape), wide, gaussian).to(dtype)
    if isinstance(key, int):
        out = torch.empty(tuple(shape), dtype=wide)
        _fill_row(out, key, torch.Generator(), gaussian)
        return out.to(dtype)
    if not is_readable(key):
        return _noise_op()(key, list(shape), wide, device, gaussian).to(dtype)
    with outside_transforms():  # without the cost of an operator
        return _fill(key, tuple(shape), wide, device, gaussian).to(dtype)


def _hashed(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, gaussian: bool) -> Tensor:
    """Noise by hashing a counter with the key: SplitMix64 started beside each key."""
    numel = int(math.prod(shape))  # sizes are tensors where `torch.jit.trace` looks on
    first = _unit(counted(key, hash_string("first"), numel), dtype)
    if not gaussian:
        return first.view((*key.shape, *shape))
    second = _unit(counted(key, hash_string("second"), numel), dtype)
    # Box & Muller (1958); 1 - u is in (0, 1], where the logarithm is finite.
    made = torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)
    return made.view((*key.shape, *shape))


def counted(key: Tensor, stream: int, count: int, *, is_final: bool = False) -> Tensor:
    """Hashed counters ``(*k, count)``, from a start that is a function of a key and the number of a stream.

    Unless they are to be final their trailing bits are not as random as the leading 31.
    """
    start = (key.long() + start_of(stream)).unsqueeze(-1)
    if is_for_an_operator(start):
        first = 0 if is_final else 1  # one step more is a part of it, then
        return hash_op()(start, torch.arange(first, first + count, device=start.device), is_final)
    is_short = count <= _HASHED_NUMEL and start.device.type == "cpu" and is_plain(start)
    steps = _few_steps(count) if is_short else _steps(count, start.device)
    return (finalized if is_final else stirred)(start + steps)


def _steps(numel: int, device: torch.device | str) -> Tensor:
    """How far SplitMix64 goes in one step, in two, and so on."""
    return torch.arange(1, numel + 1, device=device).mul_(signed(GOLDEN))


@functools.lru_cache(maxsize=1 << 8)
def _few_steps(numel: int) -> Tensor:
    with unseen():
        return _steps(numel, "cpu")


def _unit(state: Tensor, dtype: torch.dtype) -> Tensor:
    """The leading bits of stirred counters as a number in ``[0, 1)``: as many as the dtype holds exactly."""
    if dtype == torch.float64:
        return shift_right(state ^ shift_right(state, 31), 11).to(dtype) * 2.0**-53
    return shift_right(state, 40).to(dtype) * 2.0**-24


def _noise_op() -> torch.library.CustomOpDef:
    with _registration:  # two threads may ask for the first noise at once
        return _register_noise_op()


@functools.cache
def _register_noise_op() -> torch.library.CustomOpDef:
    # An operator, because only an operator can have a rule for vmap without the cost that an
    # autograd.Function has inside every transform. Made at first use: importing does no work.
    # The schema is written out because torch 2.6 does not read Sequence[int].
    @torch.library.custom_op(
        "funcbayes::noise",
        mutates_args=(),
        schema="(Tensor key, SymInt[] shape, ScalarType dtype, Device device, bool gaussian) -> Tensor",
    )
    def noise(
        key: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device, gaussian: bool
    ) -> Tensor:
        return _fill(key, tuple(shape), dtype, device, gaussian)

    @noise.register_fake
    def _(
        key: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device, gaussian: bool
    ) -> Tensor:
        return torch.empty((*key.shape, *shape), dtype=dtype, device=device)

    @noise.register_vmap
    def _(info, in_dims, key, shape, dtype, device, gaussian):  # noqa: ANN001, ANN202
        # Any shape of keys is served, so the mapped axis is one more axis of keys.
        return noise(key.movedim(in_dims[0], 0), shape, dtype, device, gaussian), 0

    return noise


def _fill(
    key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, gaussian: bool
) -> Tensor:
    """Noise by generators, one a key."""
    out = torch.empty((*key.shape, *shape), dtype=dtype, device=device)
    rows = out.view(key.numel(), math.prod(shape)).unbind(0)
    keys = key.reshape(-1).tolist()

    def fill(part: slice) -> None:
        # The generators of the CPU keep 32 bits of a seed. Two of n keys then share a stream with
        # probability n^2 / 2^33, and these belong to unrelated draws and leaves.
        generator = torch.Generator(device)
        for row, k in zip(rows[part], keys[part], strict=True):
            _fill_row(row, k, generator, gaussian)

    workers = min(torch.get_num_threads(), len(rows))
    if out.numel() >= _THREADED_NUMEL and workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, [slice(i, None, workers) for i in range(workers)]))
    else:
        fill(slice(None))
    return out


def _fill_row(row: Tensor, key: int, generator: torch.Generator, gaussian: bool) -> None:
    generator.manual_seed(key & _SEEDS)
    if gaussian:
        row.normal_(generator=generator)
    else:
        row.uniform_(generator=generator)


def permutation(key: int, n: int) -> Tensor:
    """Draw a permutation of ``range(n)``, int64 ``(n,)``, a function of ``key`` alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(key & _SEEDS))
