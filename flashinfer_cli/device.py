"""Where tensors live and how much memory there is: the only module that asks which device, and which operating system.

Memory figures are bytes. On the CPU and on Apple's unified memory one budget covers all; on CUDA the weights that
stay live on the card and the host keeps staging and the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

from .config import parse_size
from .errors import DeviceError, UsageError, nearest

if TYPE_CHECKING:
    import torch

KINDS = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class Device:
    """A place to compute. `name` is torch's ("cpu", "cuda:0", "mps")."""

    name: str

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]

    @property
    def is_host(self) -> bool:
        """True where kernels read the very bytes that the flash store wrote."""
        return self.kind == "cpu"

    def put(self, host: torch.Tensor) -> torch.Tensor:
        """The tensor on this device; the host copy may be overwritten as soon as this returns."""
        return host if self.is_host else host.to(self.name)

    def synchronize(self) -> None:
        """Wait for queued work, so that a clock read next is right."""
        import torch

        if self.kind == "cuda":
            torch.cuda.synchronize(self.name)
        elif self.kind == "mps":
            torch.mps.synchronize()

    def card_memory(self) -> int | None:
        """Free bytes of the card's own memory; None where memory is the host's."""
        import torch

        return int(torch.cuda.mem_get_info(self.name)[0]) if self.kind == "cuda" else None


def resolve(name: str) -> Device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises DeviceError for names unknown or absent here."""
    kind = name.partition(":")[0]
    if kind not in (*KINDS, "auto"):
        close = nearest(kind, KINDS)
        raise DeviceError(
            f"Unknown device '{name}'.", f"Did you mean {close}?" if close else f"One of auto, {', '.join(KINDS)}."
        )
    if name == "cpu":
        return Device("cpu")
    import torch

    if kind == "auto":
        return Device("cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    if kind == "cuda":
        index = name.partition(":")[2] or "0"
        if not torch.cuda.is_available() or not index.isdigit() or int(index) >= torch.cuda.device_count():
            raise DeviceError(
                f"There is no CUDA device '{name}' here.", "Use --device cpu, or install torch with CUDA."
            )
        return Device(f"cuda:{index}")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("There is no MPS device here.", "Use --device cpu.")
    if name != kind:
        raise DeviceError(f"Unknown device '{name}'.", "One of auto, cpu, cuda, cuda:N, mps.")
    return Device(kind)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------ memory of the process


HUGE_PAGE = 2 << 20  # reading weights through pages of 4 KiB spends a third of the time on address translation


def allocate(nbytes: int) -> np.ndarray:
    """Page-aligned anonymous memory as uint8 [nbytes], fit for direct I/O; given back to the system when dropped."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, max(nbytes, 1), **private)
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them: small pages do, half as fast again
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8)[:nbytes]


def give_back(memory: np.ndarray) -> None:
    """Let the system have the pages of what `allocate` returned until they are written again; they read as zero, where
    it has them back at once."""
    if len(memory) and hasattr(mmap, "MADV_DONTNEED") and sys.platform.startswith("linux"):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), mmap.MADV_DONTNEED
        )


def resident_bytes() -> int:
    """Resident set size of this process."""
    return int(psutil.Process().memory_info().rss)


def let_go_of_code() -> None:
    """Unmap pages of programs and libraries that only start-up ran: those still in use come back from the page cache.

    Linux only, and only what stands as it does in its file. Of torch and llvmlite that is some 100 MB.
    """
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_DONTNEED"):
        return
    madvise = ctypes.CDLL(None).madvise
    try:
        for start, end in as_in_their_files(Path("/proc/self/smaps").read_text()):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    except (OSError, ValueError, IndexError):
        return


def as_in_their_files(smaps: str) -> Iterator[tuple[int, int]]:
    """Of a process's /proc/PID/smaps the mappings of files that it cannot write and has no pages of its own of, neither
    in memory nor swapped out: what was relocated is not in the file."""
    found, own = None, True
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping: place, permissions, offset, device, inode, file
            mine = words[1] in ("r-xp", "r--p") and words[4] != "0"
            found = [int(end, 16) for end in words[0].split("-")] if mine else None
        elif words[0] == "Anonymous:":
            own = words[1] != "0"
        elif words[0] == "Swap:" and found is not None and not own and words[1] == "0":
            yield found[0], found[1]


def peak_bytes() -> int:
    """Largest resident set size so far. Linux' VmHWM, since ru_maxrss is inherited across fork and exec."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # of mallopt, from glibc's <malloc.h>
LARGEST_THRESHOLD = 32 << 20  # bytes: what glibc takes for MMAP_THRESHOLD


def _tell_allocator(*options: tuple[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # another C library: its own habits stand
        libc = ctypes.CDLL(None)
        for option, value in options:
            libc.mallopt(option, value)


def tame_allocator() -> None:
    """Make glibc give large blocks back at once, so that peak memory follows what is in use, and keep few arenas."""
    _tell_allocator((MMAP_THRESHOLD, 4 << 20), (TRIM_THRESHOLD, 8 << 20), (ARENA_MAX, 2))


@contextmanager
def reusing_pages() -> Iterator[None]:
    """Let glibc keep large blocks for the next ones of their size, and give them back at the end: for work that asks
    for the same few again and again, as every layer of a prompt does. Fresh pages cost more than what is written in
    them."""
    _tell_allocator((MMAP_THRESHOLD, LARGEST_THRESHOLD), (TRIM_THRESHOLD, 1 << 30))
    try:
        yield
    finally:
        tame_allocator()
        release_free_memory()


def release_free_memory() -> None:
    """Give freed heap pages back to the system."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


# ------------------------------------------------------------------ memory of the machine


def _cgroup_limits() -> list[tuple[int, int]]:
    """(limit, in use and not reclaimable) of every memory cgroup this process is in, v1 and v2, outermost included."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = root / own.lstrip("/")
        while True:
            try:
                limit, usage = ((folder / name).read_text().strip() for name in names)
                stat = dict(row.split()[:2] for row in (folder / "memory.stat").read_text().splitlines())
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                if limit.isdigit() and int(limit) < 1 << 60:
                    found.append((int(limit), max(0, int(usage) - cached)))
            except (OSError, ValueError):
                pass
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    return found


def memory_total() -> int:
    """Memory this process could ever have: the machine's, or its container's limit."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _cgroup_limits())])


def memory_available() -> int:
    """Memory this process could have now, what it holds already included."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _cgroup_limits():
        free = min(free, max(0, limit - used))
    return min(free + resident_bytes(), memory_total())


AUTO_SHARE = 0.85  # of what is available: the rest is for everybody else


def budget_bytes(memory: str | int | None) -> int:
    """`--memory` in bytes: a size, a share of all memory ("60%"), or `auto`, which is most of what is available now."""
    if memory is None or memory == "auto":
        return int(memory_available() * AUTO_SHARE)
    if isinstance(memory, int):
        if memory <= 0:
            raise UsageError(f"A memory budget of {memory} bytes is not above zero.")
        return memory
    text = memory.strip()
    if text.endswith("%"):
        try:
            share = float(text[:-1])
        except ValueError:
            share = -1.0
        if not 0 < share <= 100:
            raise UsageError(f"'{memory}' is not a share of memory.", "Write 1% to 100%, 4GiB, 1500M or auto.")
        return int(memory_total() * share / 100)
    return parse_size(text)
