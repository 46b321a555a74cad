"""Timing two ways of doing one thing against each other, in one run."""

import datetime
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils.benchmark import Timer

import funcbayes

_T = TypeVar("_T")
# A warm-up of long calls ends after so many seconds, but not before so many calls.
_WARM_UP_SECONDS, _FEWEST = 6.0, 7
_SECONDS = 2.0  # of timing at least, so that quick calls are timed more often than they have to be


@dataclass(frozen=True)
class How:
    """How claims are measured.

    ``is_quick`` asks for a few of the cases, ``device`` is where the work is done.
    """

    repeats: int
    is_quick: bool = False
    device: str = "cpu"


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
    warm_up: int = 25,
    seconds: float = 0.1,
    of_interval: bool = False,
) -> Result:
    """Time both in turns, so that what disturbs the machine disturbs both.

    The engine learns from its first calls which mechanism is fastest, so these belong to the warm-up, which
    ends early where calls are long. There are as many timings as ``repeats`` or, of quick calls, more.
    """
    once = [_warmed_up(theirs, most=3, fewest=1), _warmed_up(ours, most=warm_up, fewest=_FEWEST)]
    threads = torch.get_num_threads()
    timers = [Timer("f()", globals={"f": f}, num_threads=threads) for f in (theirs, ours)]
    numbers = [max(1, int(seconds / each)) for each in once]
    pairs = []
    began = time.perf_counter()
    while len(pairs) < repeats or time.perf_counter() - began < _SECONDS:
        pairs.append([timer.timeit(number).mean for timer, number in zip(timers, numbers, strict=True)])
    ratios = sorted(a / b for a, b in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    theirs_ms, ours_ms = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return Result(case, middle, low, high, theirs_ms, ours_ms, at_least, of_interval=of_interval)


def _warmed_up(call: Callable[[], object], *, most: int, fewest: int) -> float:
    """Seconds of the last of several calls."""
    began = now = time.perf_counter()
    for number in range(1, most + 1):
        before = time.perf_counter()
        call()
        now = time.perf_counter()
        if number >= fewest and now - began > _WARM_UP_SECONDS:
            break
    return now - before


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


def apart(measure: Callable[..., _T], *arguments: object) -> _T:
    """Measure in a process of its own, where glibc keeps memory as it does by itself.

    What is kept of cases before makes later ones faster; so do, whoever's they are, the large blocks that
    funcbayes tells glibc to keep, which it does not where the environment has an option of malloc.
    """
    is_set = "GLIBC_TUNABLES" in os.environ
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.check=0")  # as by default
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, *arguments).result()
    finally:
        if not is_set:
            del os.environ["GLIBC_TUNABLES"]


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
