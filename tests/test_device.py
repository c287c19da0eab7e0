"""What a device module promises of the C library: memory that is asked for again and again."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest

from flashinfer_cli import device


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_stands_in_files_is_let_go_of_and_comes_back(tmp_path) -> None:
    content = os.urandom(8 << 20)
    (tmp_path / "f").write_bytes(content)
    with open(tmp_path / "f", "rb") as file:
        private = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    sum(private[:: mmap.PAGESIZE])
    before = device.resident_bytes()
    device.let_go_of_code()
    assert before - device.resident_bytes() > 7 << 20
    assert private[:] == content


def test_only_what_stands_in_a_file_is_let_go_of() -> None:
    def mapping(start: int, permissions: str, inode: int, own: int, swapped: int) -> str:
        sizes = (
            f"Rss: 8 kB\nAnonymous: {own} kB\nAnonHugePages: 0 kB\nSwap: {swapped} kB\nSwapPss: 0 kB\nLocked: 0 kB\n"
        )
        return f"{start:x}000-{start + 1:x}000 {permissions} 00000000 fe:00 {inode} /lib/a.so\n{sizes}VmFlags: rd mr\n"

    code, read_only = mapping(1, "r-xp", 7, 0, 0), mapping(2, "r--p", 7, 0, 0)
    others = (
        mapping(3, "r--p", 7, 4, 0), mapping(4, "r--p", 7, 0, 4), mapping(5, "rw-p", 7, 0, 0),
        mapping(6, "r--p", 0, 0, 0), mapping(7, "r--s", 7, 0, 0),
    )  # fmt: skip
    found = list(device.as_in_their_files(code + "".join(others) + read_only))
    assert found == [(0x1000, 0x2000), (0x2000, 0x3000)]
