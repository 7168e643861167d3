"""What the processes of a run do before they compute."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from train.ranks import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def call():
    return torch.ones(16_000_000).mul(2)
for _ in range(3):  # until the heap is as large as it will be
    call()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
call()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    """128 MB are 31,250 pages of 4 kB, or 64 of 2 MB."""
    fresh, kept = (
        int(subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("give back", "keep")
    )
    assert fresh > 60
    assert kept < 10
