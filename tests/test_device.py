"""What a device module promises of the C library: memory that is asked for again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_large_blocks_are_kept_while_pages_are_reused_and_given_back_after() -> None:
    """Outside, every block of 16 MiB comes in fresh pages; inside, only the first does."""
    code = """
import resource, sys, torch
from flashinfer_cli import device
device.tame_allocator()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.empty(4 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
with device.reusing_pages():
    faults()
    inside = faults()
print(before, inside, faults())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, inside, after = map(int, run.stdout.split())
    assert inside * 8 < before and inside * 8 < after, run.stdout
