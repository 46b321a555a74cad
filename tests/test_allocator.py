"""Buffers of large intermediates are used again, not faulted in anew."""

import os
import platform
import subprocess
import sys

import pytest

# One block of 100 MB again and again, as chunks of draws want them: how many of its pages are faulted in.
PROGRAM = """
import resource, torch
from funcbayes._allocator import keep_large_blocks

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

keep_large_blocks()
for _ in range(3):
    torch.zeros(25_000_000).add_(1)
before = faults()
for _ in range(8):
    torch.zeros(25_000_000).add_(1)
print(faults() - before)
"""
# As many if every block is mapped anew, in pages of 4 kB; one in 512 of them in those of 2 MB.
PAGES = 8 * 100_000_000 // 4096


def _faults(**environment: str) -> int:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRE"))}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**plain, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator only")
def test_large_blocks_are_kept_unless_the_environment_says_otherwise():
    assert _faults() < PAGES / 100
    assert _faults(MALLOC_TRIM_THRESHOLD_="0") > PAGES / 1024
