"""What the allocators of memory are told."""

import ctypes
import functools
import os

import torch

_KEPT_BLOCK, _KEPT = 256 << 20, 512 << 20  # bytes: of one block, and of all that is free at the heap's end
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of `mallopt` in <malloc.h>
_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@functools.cache
def keep_large_blocks() -> None:
    """Let large buffers be used again, once a process; unless the environment says what glibc should do.

    glibc maps a block above a threshold anew each time and gives it back when it is freed, so that every page
    of a large intermediate is faulted in again by every chunk of draws: that takes longer than convolutions
    do. The threshold follows the blocks that are freed, but to no more than 32 MB. Other allocators have no
    such options, or ignore them.
    """
    if any(name in os.environ for name in _OF_THE_USER):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    if mallopt(_MMAP_THRESHOLD, _KEPT_BLOCK) or mallopt(_MMAP_THRESHOLD, 32 << 20):  # the most for older ones
        mallopt(_TRIM_THRESHOLD, _KEPT)


def give_back_memory() -> None:
    """Blocks that an accelerator keeps for tensors of other sizes may be in the way of smaller ones."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
