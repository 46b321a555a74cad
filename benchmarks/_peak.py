"""The child process of `_measure.peak_mb`: `python -m benchmarks._peak claim [case ...]`, on Linux."""

import contextlib
import ctypes
import gc
import importlib
import pathlib
import sys


def main(claim: str, *case: str) -> None:
    call = importlib.import_module(f"{__package__}.{claim}").prepared(*case)
    gc.collect()
    with contextlib.suppress(AttributeError):  # what is kept of making it would hide what the call needs
        ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    call()
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    """In kB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
