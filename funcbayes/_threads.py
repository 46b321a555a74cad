"""Calls side by side in threads of our own, in each of which torch does not divide its work any further."""

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_T = TypeVar("_T")
_R = TypeVar("_R")


def side_by_side(function: Callable[[Sequence[_T]], list[_R]], entries: Sequence[_T]) -> list[_R]:
    """``function(entries)``, which has a result for each entry, without gradients and in parts.

    There are as many parts as torch has threads. What is ambient in torch stays behind: autocast and modes
    hold for one thread only.
    """
    count = min(torch.get_num_threads(), len(entries))
    pool = _pool(os.getpid(), torch.get_num_threads())  # threads do not survive a fork

    def evaluate(own: Sequence[_T]) -> list[_R]:
        with torch.no_grad():
            return function(own)

    tasks = [
        pool.submit(contextvars.copy_context().run, evaluate, entries[first::count]) for first in range(count)
    ]
    found: list[_R | None] = [None] * len(entries)
    for first, task in enumerate(tasks):
        found[first::count] = task.result()
    return found  # type: ignore[return-value]  # all of it is filled


@functools.cache
def _pool(process: int, count: int) -> ThreadPoolExecutor:
    """Threads that have been told to work alone."""
    del process
    pool, all_here = ThreadPoolExecutor(count, "funcbayes"), threading.Barrier(count)

    def begin(_: int) -> None:
        all_here.wait()  # so that no thread begins twice
        torch.get_num_threads()  # the number of a thread that was never asked for it is reset at first use
        torch.set_num_threads(1)
        all_here.wait()

    list(pool.map(begin, range(count)))
    torch.set_num_threads(count)  # for threads to come, which start with what was set last, wherever it was
    return pool
