"""Timing two ways of doing one thing against each other, in one run."""

import datetime
import math
import multiprocessing
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import torch

import funcbayes

_T = TypeVar("_T")
# A warm-up of long calls ends after so many seconds, but not before so many calls.
_WARM_UP_SECONDS, _FEWEST = 8.0, 7
_SECONDS = 2.0  # of timing at least, so that quick calls are timed more often than they have to be
# After so many seconds there is no more warming up, and four pairs of timings are enough.
_PATIENCE, _ENOUGH = 30.0, 4
_REST = 0.05  # seconds in which the threads of another process go to sleep


@dataclass(frozen=True)
class How:
    """How claims are measured.

    ``is_quick`` asks for a few of the cases, ``device`` is where the work is done. Of a claim with many cases
    those are left out that would begin ``minutes`` after this was made, or later.
    """

    repeats: int
    is_quick: bool = False
    device: str = "cpu"
    minutes: float = math.inf
    _began: float = field(default_factory=time.perf_counter)

    @property
    def is_over(self) -> bool:
        """Whether no further case should begin."""
        return time.perf_counter() - self._began >= 60 * self.minutes

    def some(self, cases: Iterable[_T], number: int = 1) -> list[_T]:
        """All cases; of a quick run so many of the first."""
        return [*cases][:number] if self.is_quick else [*cases]


@dataclass(frozen=True)
class Result:
    """How many times faster ``ours`` is than ``theirs``: the median over repeats, and the quartiles.

    ``at_least`` is what the claim says of the median, or of the upper quartile where it is ``of_interval``:
    that the interval does not lie below. It is ``None`` where nothing is said. ``theirs_mb`` and ``ours_mb``
    are the memory of each at its peak, beyond what there was before, where it was measured.
    """

    case: str
    ratio: float
    low: float
    high: float
    theirs_ms: float
    ours_ms: float
    at_least: float | None = None
    theirs_mb: float | None = None
    ours_mb: float | None = None
    of_interval: bool = False

    @property
    def holds(self) -> bool:
        found = self.high if self.of_interval else self.ratio
        return self.at_least is None or found >= self.at_least


def compare(
    case: str,
    theirs: Callable[[], object],
    ours: Callable[[], object],
    *,
    repeats: int,
    at_least: float | None = None,
    warm_up: int = 40,
    seconds: float = 0.1,
    of_interval: bool = False,
) -> Result:
    """Time both in turns, so that what disturbs the machine disturbs both.

    Of every other pair of timings ours is the first, and their number is even, so that a machine that becomes
    slower or faster is in favour of neither. The engine learns from its first calls which mechanism is
    fastest, so these belong to the warm-up, which ends early where calls are long. There are at least as many
    pairs as ``repeats``, of quick calls more, and four of very long ones.
    """
    return _in_turns(case, [_timed(theirs), _timed(ours)], repeats, at_least, warm_up, seconds, of_interval)


def compare_apart(
    case: str,
    make_theirs: Callable[[], Callable[[], object]],
    make_ours: Callable[[], Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 40,
    seconds: float = 0.1,
) -> Result:
    """The same, each way in a process of its own, because both have to share one's memory otherwise.

    There what one has kept makes the other one faster; in particular the large blocks that funcbayes tells
    the C library to keep for the whole process.

    Args:
        make_theirs: Makes their way; like the other one it is sent to another process.
        make_ours: Makes ours.
        case: As for :func:`compare`, and the rest.
        repeats: As there.
        warm_up: As there.
        seconds: As there.
    """
    with ExitStack() as stack:
        sides = []
        for make in (make_theirs, make_ours):
            pool = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
            pool.submit(_hold, make).result()
            sides.append(lambda number, pool=pool: pool.submit(_time_held, number).result())
        return _in_turns(case, sides, repeats, None, warm_up, seconds, False)


_held: list[Callable[[int], float]] = []


def _hold(make: Callable[[], Callable[[], object]]) -> None:
    _held[:] = [_timed(make())]


def _time_held(number: int) -> float:
    time.sleep(_REST)
    return _held[0](number)


def _timed(call: Callable[[], object]) -> Callable[[int], float]:
    """Gives the mean seconds of a number of calls; before several there is one more, for caches."""
    timer = timeit.Timer(call, timer=_now)

    def seconds(number: int) -> float:
        if number > 1:
            call()
        return timer.timeit(number) / number

    return seconds


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _in_turns(
    case: str,
    sides: list[Callable[[int], float]],
    repeats: int,
    at_least: float | None,
    warm_up: int,
    seconds: float,
    of_interval: bool,
) -> Result:
    """Two ways, theirs first, each of which gives the mean seconds of a number of calls."""
    theirs, ours = sides
    once = [_warmed_up(theirs, most=3, fewest=1), _warmed_up(ours, most=warm_up, fewest=_FEWEST)]
    of_theirs, of_ours = (max(1, int(seconds / each)) for each in once)
    their_times, our_times = [], []
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < _SECONDS or len(our_times) < repeats:
        if elapsed > _PATIENCE and len(our_times) >= _ENOUGH:
            break
        their_times.append(theirs(of_theirs))
        our_times += [ours(of_ours), ours(of_ours)]
        their_times.append(theirs(of_theirs))
    low, middle, high = statistics.quantiles(map(operator.truediv, their_times, our_times), n=4)
    theirs_ms, ours_ms = (1e3 * statistics.median(times) for times in (their_times, our_times))
    return Result(case, middle, low, high, theirs_ms, ours_ms, at_least, of_interval=of_interval)


def _warmed_up(side: Callable[[int], float], *, most: int, fewest: int) -> float:
    """Seconds of the last of several calls."""
    began = time.perf_counter()
    for number in range(1, most + 1):
        last = side(1)
        elapsed = time.perf_counter() - began
        if (number >= fewest and elapsed > _WARM_UP_SECONDS) or elapsed > _PATIENCE:
            break
    return last


def fastest(
    ways: Iterable[Callable[[], _T]], check: Callable[[_T], object] = lambda found: None
) -> Callable[[], _T]:
    """The way that takes the least time, of several to one thing, each of which passes a check."""

    def seconds(way: Callable[[], _T]) -> float:
        began = _now()
        found = way()
        first = _now() - began  # of a cold start, which matters little where it takes long
        check(found)
        return first if first > 10 else _timed(way)(1 if first > 1 else 3)

    return min(ways, key=seconds)


class Unavailable(Exception):
    """What a claim compares with is not installed."""


def median_of(case: str, results: list[Result], at_least: float | None = None) -> Result:
    """The median of several ratios, and the smallest and largest."""
    ratios = [result.ratio for result in results]
    times = (statistics.median(r.theirs_ms for r in results), statistics.median(r.ours_ms for r in results))
    return Result(case, statistics.median(ratios), min(ratios), max(ratios), *times, at_least)


def geometric_mean_of(case: str, results: list[Result], at_least: float | None = None) -> Result:
    """The geometric mean of several ratios, and the smallest and largest."""
    ratios = [result.ratio for result in results]
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    times = (statistics.median(r.theirs_ms for r in results), statistics.median(r.ours_ms for r in results))
    return Result(case, mean, min(ratios), max(ratios), *times, at_least)


def peak_mb(claim: str, *case: str, in_use_only: bool = False) -> float | None:
    """Memory at the peak of one call, in MB beyond what there was before it, in a process of its own.

    Args:
        claim: A module of this package; ``prepared(*case)`` in it gives the call.
        *case: What to call.
        in_use_only: Whether the C library gives back at once what is freed, so that the peak is of what is in
            use and not of what it keeps for later.
    """
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks._peak", claim, *case],
        capture_output=True,
        text=True,
        env={**os.environ, **({"MALLOC_TRIM_THRESHOLD_": "0"} if in_use_only else {})},
    )
    last = child.stdout.strip().splitlines()[-1:] or [""]
    return float(last[0]) if child.returncode == 0 and last[0] else None


def apart(call: Callable[..., _T], *arguments: object, seconds: float) -> _T:
    """What a function gives in a process of its own, which may fail, or ``TimeoutError``."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(call, *arguments).result(seconds)
        except TimeoutError:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def environment(device: str) -> dict[str, str | int]:
    """What the figures depend on."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "funcbayes": funcbayes.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(results: list[Result]) -> str:
    width = max(len(r.case) for r in results)
    with_memory = any(r.ours_mb is not None for r in results)
    lines = [f"{'case':{width}}  faster by   quartiles    theirs ms    ours ms  claimed  holds"]
    lines[0] += "  theirs MB  ours MB" if with_memory else ""
    for r in results:
        claimed, holds = ("", "") if r.at_least is None else (f"{r.at_least:.2f}", "yes" if r.holds else "NO")
        times = f"{r.theirs_ms:10.3f} {r.ours_ms:10.3f}"
        spread = f"{r.ratio:9.2f}  {r.low:5.2f} {r.high:5.2f}"
        line = f"{r.case:{width}}  {spread}  {times}  {claimed:>7}  {holds:>5}"
        if with_memory:
            shown = ["" if mb is None else f"{mb:.0f}" for mb in (r.theirs_mb, r.ours_mb)]
            line += f"  {shown[0]:>9}  {shown[1]:>7}"
        lines.append(line.rstrip())
    return "\n".join(lines)
