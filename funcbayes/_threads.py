"""Calls side by side in threads of our own, in each of which torch does not divide its work any further."""

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from ._functorch import has_modes
from ._global_random import is_forked

_T = TypeVar("_T")
_R = TypeVar("_R")

_own = threading.local()
_making = threading.Lock()  # of pools: while one is made, new threads have the wrong number of their own


def may_divide() -> bool:
    """Whether :func:`side_by_side` has threads here, in which everything is as in this one."""
    is_ours = getattr(_own, "is_on", False)  # a model that predicts, inside of a prediction
    return torch.get_num_threads() > 1 and not is_ours and not is_forked() and not has_modes()


def side_by_side(function: Callable[[Sequence[_T]], list[_R]], entries: Sequence[_T]) -> list[_R]:
    """``function(entries)``, which has a result for each entry, in as many parts as torch has threads.

    All parts have ended when it returns or raises.
    """
    num_threads, is_inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    with _making:
        pool = _pool(num_threads)

    def evaluate(own: Sequence[_T]) -> list[_R]:
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(own)

    count = min(num_threads, len(entries))
    found: list[_R | None] = [None] * len(entries)
    tasks: list[Future[list[_R]]] = []
    try:
        for first in range(count):
            tasks.append(pool.submit(contextvars.copy_context().run, evaluate, entries[first::count]))
        for first, task in enumerate(tasks):
            found[first::count] = task.result()
    except BaseException:
        for task in tasks:
            task.cancel()
        wait(tasks)
        raise
    return found  # type: ignore[return-value]  # all of it is filled


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Threads that have been told to work alone."""
    pool, all_here = ThreadPoolExecutor(count, "funcbayes"), threading.Barrier(count)
    before: list[int] = []

    def begin() -> None:
        _own.is_on = True
        # What a new thread has; one that was never asked resets its number at first use.
        before.append(torch.get_num_threads())
        all_here.wait()  # so that no thread begins twice, nor reads what another has set
        torch.set_num_threads(before[0])  # for pools that are made with the first number they are told
        torch.set_num_threads(1)
        all_here.wait()

    def restore() -> None:
        if before:
            torch.set_num_threads(before[0])

    try:
        for task in [pool.submit(begin) for _ in range(count)]:
            task.result()
    except BaseException:
        all_here.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        # Threads to come have the number that was set last, in whichever thread. In this one it stays.
        restoring = threading.Thread(target=restore)
        restoring.start()
        restoring.join()
    return pool


def _forget() -> None:
    """Threads do not survive a fork."""
    global _making
    _making = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
