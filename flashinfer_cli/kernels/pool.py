"""The threads that compiled kernels run on (`crew` says how they work together), and the memory they share."""

from __future__ import annotations

import atexit
import os
import struct
import threading
import weakref
from pathlib import Path

import numpy as np

from . import jobs
from .warm import Enter

_pack = struct.Struct(f"={jobs.JOB_WORDS}q").pack_into


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and what its container's quota amounts to."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for path, period_path in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            root = Path("/sys/fs/cgroup")
            words = (root / path).read_text().split()
            quota, period = words if period_path is None else (words[0], (root / period_path).read_text())
            if quota not in ("max", "-1"):
                cores = min(cores, max(1, round(int(quota) / int(period))))
        except (OSError, ValueError):
            continue
    return cores


class Workspace:
    """The words and the scratch of one caller; with `threads` above 1 also its workers, once started."""

    def __init__(self, enter: Enter, threads: int = 1) -> None:
        self._enter = enter
        self.threads = threads
        self._memory = np.zeros(jobs.POOL_BYTES + 64 * (threads + 1), np.uint8)
        self.address = -(-self._memory.ctypes.data // 64) * 64
        self._words = self._memory[self.address - self._memory.ctypes.data :][: jobs.POOL_BYTES].view(np.int64)
        self._job = self.address - self._memory.ctypes.data + jobs.JOB
        self._words[jobs.PATIENCE // 8] = jobs.BRIEF
        self._scratch = np.empty(0, np.float32)
        self._scratch_address = 0
        self.started = False
        self._pipe: tuple[int, int] | None = None
        self._workers: list[threading.Thread] = []

    def reserve(self, floats: int) -> int:
        """The address of scratch for at least so many float32; it only ever grows, and moves when it does."""
        if floats > self._scratch.size:
            self._scratch = np.empty(0, np.float32)  # the old one goes first
            self._scratch = np.empty(floats, np.float32)
            self._scratch_address = self._scratch.ctypes.data
        return self._scratch_address

    def run(self, *words: int) -> None:
        """Compute one job, given by its JOB_WORDS words (`cpu.enter` names them)."""
        _pack(self._memory, self._job, *words)
        self._enter(self.address, 0)

    @property
    def patience(self) -> int:
        """Turns that workers wait for the next job before they sleep."""
        return int(self._words[jobs.PATIENCE // 8])

    @patience.setter
    def patience(self, turns: int) -> None:
        self._words[jobs.PATIENCE // 8] = turns

    def start(self) -> None:
        """Start the workers; until then every job is computed by its caller alone."""
        self.started = True
        if self.threads < 2:
            return
        self._pipe = os.pipe()
        self._words[jobs.STOP // 8] = 0
        self._words[jobs.PIPE_IN // 8], self._words[jobs.PIPE_OUT // 8] = self._pipe
        self._words[jobs.THREADS // 8] = self.threads
        for worker in range(1, self.threads):
            thread = threading.Thread(
                target=self._enter, args=(self.address, worker), name=f"kernels-{worker}", daemon=True
            )
            thread.start()
            self._workers.append(thread)

    def stop(self) -> None:
        """Send the workers home and wait for them."""
        if self._pipe is None:
            return
        self._words[jobs.STOP // 8] = 1
        os.write(self._pipe[1], b"\0" * len(self._workers))
        for thread in self._workers:
            thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe, self._workers = None, []
        self._words[jobs.THREADS // 8] = 1


class Pool:
    """A workspace with workers for whoever comes first, and one without for each thread that finds it taken."""

    def __init__(self, enter: Enter, threads: int) -> None:
        self._enter = enter
        self._lock = threading.Lock()
        self._own = threading.local()
        self._shared = Workspace(enter, threads)
        itself = weakref.ref(self)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=lambda: pool._forget() if (pool := itself()) else None)
        atexit.register(lambda: pool.close() if (pool := itself()) else None)

    @property
    def threads(self) -> int:
        return self._shared.threads

    def _forget(self) -> None:
        """A forked child has none of the threads: begin anew, when it first computes."""
        self._lock = threading.Lock()
        self._renew(self._shared.threads)

    def resize(self, threads: int) -> None:
        with self._lock:
            if threads != self._shared.threads:
                self._shared.stop()
                self._renew(threads)

    def _renew(self, threads: int) -> None:
        patience = self._shared.patience
        self._shared = Workspace(self._enter, threads)
        self._shared.patience = patience

    def wait_long(self, long: bool) -> None:
        """Whether workers wait for the next job through what torch does between two: no one else wants their cores."""
        self._shared.patience = jobs.LONG if long else jobs.BRIEF

    def close(self) -> None:
        """Stop the workers; jobs after that run on their callers."""
        with self._lock:
            self._shared.stop()

    def take(self) -> tuple[Workspace, bool]:
        """A workspace, and whether it is the shared one, to be given back with `release`."""
        if self._lock.acquire(blocking=False):
            if not self._shared.started:
                self._shared.start()
            return self._shared, True
        own: Workspace | None = getattr(self._own, "workspace", None)
        if own is None:
            own = self._own.workspace = Workspace(self._enter)
        return own, False

    def release(self, shared: bool) -> None:
        if shared:
            self._lock.release()

    def __del__(self) -> None:
        self._shared.stop()
