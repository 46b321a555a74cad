"""What the allocator of memory is told."""

import functools

import torch


@functools.cache
def keep_large_blocks() -> None:
    """Let buffers of up to 32 MB be used again, on the CPU, once a process."""
    # glibc maps blocks above a threshold anew each time, so every large intermediate would be page-faulted in
    # again. The threshold follows the largest block freed so far, up to 32 MB: one such block lets later
    # buffers up to that size be reused.
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8).fill_(0)
