"""Masks of dropout as functions of a key."""

import functools
import math
import threading
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._functorch import is_plain, is_readable, outside_transforms, unseen
from ._hashing import FEW, GOLDEN, array, finalized, finalized_array, hash_string, signed, start_of
from ._random import Seed, counted

# Masks of up to this many numbers a key are made together: larger ones keep a processor busy.
_TOGETHER = 1 << 12

_registration = threading.Lock()


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

    A counter, started beside the key, is hashed: each number of 64 bits decides on two entries, so that
    probabilities are multiples of ``2^-32``. Masks are the same on all devices.

    Args:
        key: As for :func:`funcbayes._random.uniform`, of shape ``k``.
        place: Where, and what a mask looks like.

    Returns:
        Mask of shape ``(*k, *s)``.
    """
    keys = torch.as_tensor(key).to(place.device)
    if are_made_together(keys, place):
        return dropout_masks(keys.reshape(-1), (place,))[0].view((*keys.shape, *place.shape))
    numel = int(math.prod(place.shape))  # sizes are tensors where `torch.jit.trace` looks on
    bits = _halves(counted(keys, _stream_of(place), _num_hashes(numel), is_final=True))
    mask = _kept(bits, _most_dropped(place), place.dtype).mul_(place.scale)
    return mask[..., :numel].reshape((*keys.shape, *place.shape))


def are_made_together(key: Tensor, place: Place) -> bool:
    """Whether :func:`dropout_masks` makes the masks of a place."""
    if not place.device.type == key.device.type == "cpu" or not is_plain(key) or torch.jit.is_tracing():
        return False
    return math.prod(place.shape) <= _TOGETHER


def dropout_masks(key: Tensor, places: tuple[Place, ...]) -> list[Tensor]:
    """:func:`dropout_mask` for several places in the steps of one, which take longer than few numbers do.

    Args:
        key: int64 ``(k,)``.
        places: Those of which :func:`are_made_together` is true, of one dtype.

    Returns:
        Masks ``(k, *s)``.
    """
    along = _along(places)
    make = plain_masks if is_readable(key) else masks_op()
    with outside_transforms():
        whole = make(key, along.offsets, along.most_dropped, along.scales).to(places[0].dtype)
        made = whole.split(along.sizes, -1)
        masks = made if len(made) == len(places) else made[::2]
        return [mask.view((*key.shape, *place.shape)) for mask, place in zip(masks, places, strict=True)]


class _Along(NamedTuple):
    """Of the masks of several places what each number is made with, one after another.

    Attributes:
        offsets: From keys to what is hashed.
        most_dropped: The largest numbers that are dropped, int32; one if these are the same.
        scales: As for :class:`Place`, in single precision or double; one if these are the same.
        sizes: How many numbers there are; if some are odd, each followed by how many are left over.
    """

    offsets: Tensor
    most_dropped: Tensor
    scales: Tensor
    sizes: list[int]


@functools.lru_cache(maxsize=1 << 6)
def _along(places: tuple[Place, ...]) -> _Along:
    numels = [math.prod(place.shape) for place in places]

    def of_each(values: list[float], dtype: torch.dtype) -> Tensor:
        of_places = torch.tensor(values, dtype=dtype, device="cpu")
        return of_places[:1] if len({*values}) == 1 else of_places.repeat_interleave(2 * hashes)

    with unseen():
        hashes = torch.tensor([_num_hashes(numel) for numel in numels], device="cpu")
        starts = torch.tensor([start_of(_stream_of(place)) for place in places], device="cpu")
        steps = torch.cat([torch.arange(1, count + 1, device="cpu") for count in hashes.tolist()])
        return _Along(
            starts.repeat_interleave(hashes) + steps * signed(GOLDEN),
            of_each([_most_dropped(place) for place in places], torch.int32),
            of_each([place.scale for place in places], _wide(places[0].dtype)),
            [size for n in numels for size in (n, n % 2)] if any(n % 2 for n in numels) else numels,
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of the dtypes in which masks are scaled: in half precision a scale may be infinite."""
    return dtype if dtype == torch.float64 else torch.float32


def plain_masks(key: Tensor, offsets: Tensor, most_dropped: Tensor, scales: Tensor) -> Tensor:
    """Masks ``(k, n)`` of keys ``(k,)``; of offsets there is one for every two numbers."""
    if key.numel() * offsets.numel() <= FEW:
        bits = finalized_array(array(key)[:, None] + array(offsets)).view(np.int32)
        return torch.from_numpy((bits > most_dropped.numpy()) * scales.numpy())
    bits = _halves(finalized(key.long().unsqueeze(-1) + offsets))
    return _kept(bits, most_dropped, scales.dtype).mul_(scales)


def masks_op() -> Callable[..., Tensor]:
    """:func:`plain_masks` as the operator ``funcbayes::masks``, which can be taken down."""
    with _registration:
        return _register_masks_op()


@functools.cache
def _register_masks_op() -> Callable[..., Tensor]:
    schema = "(Tensor key, Tensor offsets, Tensor most_dropped, Tensor scales) -> Tensor"
    with unseen():
        if not hasattr(torch.ops.funcbayes, "masks"):  # from a module that was loaded before
            # Not by `torch.library.custom_op`, which loads all of the compiler.
            torch.library.define("funcbayes::masks", schema)
            torch.library.impl("funcbayes::masks", "CompositeExplicitAutograd", plain_masks)
        return torch.ops.funcbayes.masks.default


def _halves(hashes: Tensor) -> Tensor:
    """Both halves of each, the trailing one first, as signed numbers of 32 bits."""
    if is_plain(hashes):
        return hashes.view(torch.int32)
    # `vmap` has no rule for such views before torch 2.13.
    return torch.stack((hashes << 32 >> 32, hashes >> 32), -1).flatten(-2)


def _kept(bits: Tensor, most_dropped: Tensor | int, dtype: torch.dtype) -> Tensor:
    """``1`` where numbers are above the largest that is dropped, else ``0``."""
    if not is_plain(bits):
        return (bits > most_dropped).to(dtype)
    # Comparing into other numbers than booleans, and converting these, takes a third of the time.
    return torch.gt(bits, most_dropped, out=torch.empty(bits.shape, dtype=dtype, device=bits.device))


def _num_hashes(numel: int) -> int:
    """How many hashes give so many numbers of 32 bits."""
    return (numel + 1) // 2


def _stream_of(place: Place) -> int:
    return hash_string("mask") + place.site


def _most_dropped(place: Place) -> int:
    """Of all numbers of int32 so large a part as the rate says is not above: where a unit is dropped."""
    return max(round(place.rate * (1 << 32)) - 1, 0) - (1 << 31)
