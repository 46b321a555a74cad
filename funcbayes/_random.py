"""Keyed noise: every number drawn is a function of a key, never of the order of asking.

A key is a 64-bit hash of what the noise is for: the seed, the draw's index, the leaf's path.
:func:`normal`, :func:`uniform` and :func:`dropout_mask` make each key's entries by a generator of its own, or
by hashing it with a counter, also under ``torch.func.vmap``: so a draw does not depend on how many are asked
for together, in which order, or in which thread.
"""

import functools
import hashlib
import math
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, overload

import torch
from torch import Tensor

from ._functorch import is_concrete, is_readable, is_traced, outside_transforms, unwrap, vmap_level, wrap
from ._global_random import global_state

Seed = int | Tensor  # an int64 scalar tensor where fits or chains are vmapped over seeds

_MASK = (1 << 64) - 1
# The finalizer of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit integers.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# From this many numbers on, filling rows in several threads pays for starting them.
_THREADED_NUMEL = 1 << 21
# Up to this many numbers a key are made by hashing, more by a generator.
_HASHED_NUMEL = 192
# Up to this many keys are hashed one by one: of tensors that takes some 14 calls, however few keys there are.
_FEW = 16

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
    value = _hash_string(data) if isinstance(data, str) else data
    if not isinstance(key, Tensor) and not isinstance(value, Tensor):
        return signed(_mix(key + value * _GOLDEN))
    if isinstance(key, Tensor) and not isinstance(value, Tensor) and _are_few(key):
        return torch.tensor([signed(_mix(k + value * _GOLDEN)) for k in key.tolist()], device=key.device)
    if isinstance(value, Tensor) and not isinstance(key, Tensor) and _are_few(value):
        return torch.tensor([signed(_mix(key + v * _GOLDEN)) for v in value.tolist()], device=value.device)
    if not isinstance(value, Tensor):  # a sum of one constant is safe in compiled code, too
        start, number = key.long() + signed(value * _GOLDEN), None  # type: ignore[union-attr]  # one is a tensor
    elif isinstance(key, Tensor):
        start, number = key.long(), value
    else:
        start, number = torch.full_like(value, signed(key), dtype=torch.int64), value
    if _is_for_an_operator(start):
        return _hash_op()(start, number, True)
    return _without_axis(_mix_tensor, _advanced(start, number))


def _are_few(keys: Tensor) -> bool:
    """Whether a list of keys is hashed faster as plain numbers."""
    is_short = keys.ndim == 1 and 0 < len(keys) <= _FEW and keys.device.type == "cpu"
    return is_short and not keys.is_floating_point() and is_readable(keys)


def _without_axis(elementwise: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Apply a function of each entry: inside ``vmap`` to the tensor that is mapped over, which costs less."""
    level = vmap_level()
    physical, axis = (values, None) if level is None else unwrap(values, level)
    if level is None or axis is None or not is_concrete(physical):
        return elementwise(values)
    with outside_transforms():
        found = elementwise(physical)
    return wrap(found, axis, level)


def _advanced(start: Tensor, number: Tensor | None) -> Tensor:
    """State of SplitMix64 as many steps after ``start`` as a number says, modulo ``2^64``."""
    return start if number is None else start + number.long() * signed(_GOLDEN)


def _is_for_an_operator(key: Tensor) -> bool:
    """Whether hashing is written down, for a CPU, where arithmetic may be compiled as C++.

    C++ leaves open what signed integers do beyond their range, and its compilers draw conclusions from that.
    """
    return is_traced() and key.device.type == "cpu"


def _mix(state: int) -> int:
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
    state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
    return state ^ (state >> 31)


def _mix_tensor(state: Tensor) -> Tensor:
    state = _stirred(state + signed(_GOLDEN))
    return state ^ _shift_right(state, 31)


def _stirred(state: Tensor) -> Tensor:
    """All of the finalizer but its last step, which leaves the leading 31 bits as they are."""
    # int64 arithmetic wraps as the unsigned one does; only the shifts need the sign bits removed. Where there
    # are few keys the number of operations is what takes time, and those in place take less.
    state = _shift_right(state, 30).bitwise_xor_(state).mul_(signed(_MIX_1))
    return _shift_right(state, 27).bitwise_xor_(state).mul_(signed(_MIX_2))


def _shift_right(state: Tensor, bits: int) -> Tensor:
    return (state >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def signed(value: int) -> int:
    """The number of the range of int64 that is the same modulo ``2^64``."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


@functools.lru_cache(maxsize=1 << 14)
def _hash_string(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def keys_by_name(key: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """``{name: fold(key, name)}``, hashed in one go because there can be hundreds of leaves."""
    names = list(names)
    if not names:
        return {}
    hashes = torch.tensor([_hash_string(name) for name in names], device=key.device)
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


class Place(NamedTuple):
    """A place of dropout, and what its masks look like.

    Attributes:
        site: Number of the place.
        shape: Shape ``s`` of the mask of one key.
        rate: Probability of ``0``.
        scale: What is there otherwise.
        dtype: Of the masks.
        device: Of the masks.
    """

    site: int
    shape: tuple[int, ...]
    rate: float
    scale: float = 1.0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009


def dropout_mask(key: Seed, place: Place) -> Tensor:
    """Draw ``0`` with a probability and a constant otherwise, a function of ``key`` and of the site alone.

    Masks agree on one type of device.

    Args:
        key: As in :func:`uniform`, of shape ``k``.
        place: Where, and what a mask looks like.

    Returns:
        Mask of shape ``(*k, *s)``.
    """
    if not _is_hashed(place.shape, place.device):
        is_kept = uniform(fold(key, place.site), place.shape, device=place.device) >= place.rate
    else:
        keys = torch.as_tensor(key).to(place.device)
        is_kept = _counted(keys, _stream_of(place), tuple(place.shape)) >= _least_kept(place)
    return is_kept.to(place.dtype).mul_(place.scale)


def are_made_together(key: Tensor, place: Place) -> bool:
    """Whether :func:`dropout_masks` makes the masks of a place."""
    is_on_cpu = place.device.type == key.device.type == "cpu"
    return is_on_cpu and _is_hashed(place.shape, place.device) and is_readable(key)


def dropout_masks(key: Tensor, places: tuple[Place, ...]) -> list[Tensor]:
    """:func:`dropout_mask` for several places in the steps of one, which take longer than few numbers do.

    Args:
        key: int64 ``(k,)``.
        places: Those of which :func:`are_made_together` is true, of one dtype.

    Returns:
        Masks ``(k, *s)``.
    """
    starts, steps, least, scales = _along(places)
    is_kept = _stirred((key.unsqueeze(-1) ^ starts) + steps) >= least
    masks = is_kept.to(places[0].dtype).mul_(scales).split([math.prod(place.shape) for place in places], -1)
    return [mask.view((*key.shape, *place.shape)) for mask, place in zip(masks, places, strict=True)]


@functools.lru_cache(maxsize=1 << 8)
def _along(places: tuple[Place, ...]) -> tuple[Tensor, ...]:
    """Starts, steps, the least numbers kept and scales, for the numbers of all places one after another."""
    sizes = [math.prod(place.shape) for place in places]

    def of_each(values: list[float], dtype: torch.dtype) -> Tensor:
        counts = torch.tensor(sizes, device="cpu")
        return torch.tensor(values, dtype=dtype, device="cpu").repeat_interleave(counts)

    with torch.inference_mode(False):
        return (
            of_each([_start_of(_stream_of(place)) for place in places], torch.int64),
            torch.cat([_few_steps(size) for size in sizes]),
            of_each([_least_kept(place) for place in places], torch.int64),
            of_each([place.scale for place in places], places[0].dtype),
        )


def _stream_of(place: Place) -> int:
    return _hash_string("mask") + place.site


def _least_kept(place: Place) -> int:
    """Of all numbers of int64 so large a part as the rate says is below: where a unit is dropped."""
    return min(round(place.rate * (1 << 64)) - (1 << 63), (1 << 63) - 1)


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
    first = _unit(_counted(key, _hash_string("first"), shape), dtype)
    if not gaussian:
        return first
    second = _unit(_counted(key, _hash_string("second"), shape), dtype)
    # Box & Muller (1958); 1 - u is in (0, 1], where the logarithm is finite.
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)


def _counted(key: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Stirred counters ``(*k, *s)``, from a start that is a function of a key and the number of a stream."""
    numel = int(math.prod(shape))  # sizes are tensors where `torch.jit.trace` looks on
    # Not from the key itself, which would give the keys that are folded out of it.
    start = (key.long() ^ _start_of(stream)).unsqueeze(-1)
    if _is_for_an_operator(start):
        stirred = _hash_op()(start, torch.arange(1, numel + 1, device=start.device), False)
    elif numel <= _HASHED_NUMEL and start.device.type == "cpu" and is_readable(start):
        stirred = _stirred(start + _few_steps(numel))
    else:
        stirred = _stirred(start + _steps(numel, start.device))
    return stirred.view((*key.shape, *shape))


def _steps(numel: int, device: torch.device | str) -> Tensor:
    """How far SplitMix64 goes in one step, in two, and so on."""
    return torch.arange(1, numel + 1, device=device).mul_(signed(_GOLDEN))


@functools.lru_cache(maxsize=_HASHED_NUMEL)
def _few_steps(numel: int) -> Tensor:
    with torch.inference_mode(False):
        return _steps(numel, "cpu")


@functools.lru_cache(maxsize=1 << 10)
def _start_of(stream: int) -> int:
    return signed(_mix(stream))


def _unit(state: Tensor, dtype: torch.dtype) -> Tensor:
    """The leading bits of stirred counters as a number in ``[0, 1)``: as many as the dtype holds exactly."""
    if dtype == torch.float64:
        return _shift_right(state ^ _shift_right(state, 31), 11).to(dtype) * 2.0**-53
    return _shift_right(state, 40).to(dtype) * 2.0**-24


def _hash_op() -> torch.library.CustomOpDef:
    with _registration:
        return _register_hash_op()


@functools.cache
def _register_hash_op() -> torch.library.CustomOpDef:
    # SplitMix64 `number` steps after `start`, or all of it but the last step of its finalizer.
    @torch.library.custom_op(
        "funcbayes::hash", mutates_args=(), schema="(Tensor start, Tensor? number, bool entire) -> Tensor"
    )
    def hashed(start: Tensor, number: Tensor | None, entire: bool) -> Tensor:
        state = _advanced(start, number).contiguous()
        return _mix_tensor(state) if entire else _stirred(state)

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
    generator.manual_seed(key & _MASK >> 1)
    if gaussian:
        row.normal_(generator=generator)
    else:
        row.uniform_(generator=generator)


def permutation(key: int, n: int) -> Tensor:
    """Draw a permutation of ``range(n)``, int64 ``(n,)``, a function of ``key`` alone."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(key & _MASK >> 1))
