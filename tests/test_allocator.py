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


def _is_new_glibc() -> bool:
    """Whether it takes a threshold above 32 MB."""
    name, version = platform.libc_ver()
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


@pytest.mark.skipif(not _is_new_glibc(), reason="of glibc's allocator only, from 2.35 on")
def test_large_blocks_are_kept_unless_the_environment_says_otherwise():
    anew = _faults(MALLOC_TRIM_THRESHOLD_="0")
    if anew == 0:
        pytest.skip("faults are not counted here")
    assert anew > PAGES / 1024
    # The heap grows by a block, of which all pages are new, when something small has been put where one was.
    assert _faults() < anew / 2
