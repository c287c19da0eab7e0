"""Many reads with two system calls: Linux's own asynchronous input/output (io_submit), through ctypes.

A token asks for thousands of records of a few KB. A thread that reads them one by one pays a system call, a sleep and
some Python for each; here a batch is laid out by numpy, handed to the kernel whole, and waited for without the
interpreter lock. It works on direct reads only (buffered ones would be served one after the other), and where the
system has none of it `Aio.open` returns None and `scatter.read_one_by_one` is the plain twin.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys
from dataclasses import dataclass

import numpy as np

from ..kernels.jobs import EVENT_BYTES, PREADV

DEPTH = 64  # reads in flight, of a batch
# io_setup, io_destroy, io_submit, io_getevents
CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
IOCB = np.dtype(
    [
        ("data", "<u8"), ("key", "<u4"), ("rw_flags", "<u4"), ("opcode", "<u2"), ("prio", "<i2"), ("fd", "<u4"),
        ("buf", "<u8"), ("nbytes", "<u8"), ("offset", "<i8"), ("reserved", "<u8"), ("flags", "<u4"), ("resfd", "<u4"),
    ]
)  # fmt: skip
EVENT = np.dtype([("data", "<u8"), ("obj", "<u8"), ("res", "<i8"), ("res2", "<i8")])
assert EVENT.itemsize == EVENT_BYTES
NOW = (ctypes.c_long * 2)(0, 0)  # a timespec: do not wait
IOVEC = np.dtype([("base", "<u8"), ("len", "<u8")])


@dataclass
class Batch:
    """Reads handed over together: `got` int64, the bytes each brought or -errno; `kept` is what they work on."""

    jobs: np.ndarray
    pointers: np.ndarray
    got: np.ndarray
    kept: tuple[object, ...]
    begun: int = 0
    left: int = 0


class Aio:
    """A context of `depth` reads in flight, for one thread at a time. `read` returns when all of a batch has ended;
    `begin` when it is handed over, as far as there is room, and `end` waits for it."""

    def __init__(self, context: ctypes.c_ulong, calls: tuple[int, int, int, int], depth: int) -> None:
        self._context, self.calls, self.depth = context, calls, depth
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._events = np.zeros(depth, EVENT)
        self._batches: dict[int, Batch] = {}  # under way, by number
        self._number = 0
        self._flight = 0

    @classmethod
    def open(cls, depth: int = DEPTH) -> Aio | None:
        """None where the system has no such calls, or no context to spare."""
        calls = CALLS.get(platform.machine())
        if not sys.platform.startswith("linux") or calls is None or sys.byteorder != "little":
            return None
        syscall = ctypes.CDLL(None, use_errno=True).syscall
        syscall.restype = ctypes.c_long
        context = ctypes.c_ulong(0)
        if syscall(ctypes.c_long(calls[0]), ctypes.c_uint(depth), ctypes.byref(context)) != 0:
            return None
        return cls(context, calls, depth)

    @property
    def context(self) -> int:
        """For compiled code that makes the same calls (`kernels.reads`), and then for nobody else; 0: closed."""
        return self._context.value

    def close(self) -> None:
        """Returns when what is under way has ended."""
        self._syscall(ctypes.c_long(self.calls[1]), self._context)
        self._context = ctypes.c_ulong(0)  # another may get the same number
        self._batches.clear()

    def read(self, fd: int, offsets: np.ndarray, first: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Read i goes from offsets[i] of the file into memory views[first[i] : first[i + 1]] (IOVEC), one after the
        other; returns the bytes each brought, or less than zero: -errno. Raises OSError when none can be begun."""
        return self.end(self.begin(fd, offsets, first, views, ()))

    def begin(
        self,
        fd: int,
        offsets: np.ndarray,
        first: np.ndarray,
        views: np.ndarray,
        kept: tuple[object, ...],
        requests: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> Batch:
        """`read`, begun; `kept` is what must live until then. `requests` are the same reads as IOCB written in int64
        [n, 8], whatever their file, with their places for data, and the address of each."""
        count = len(offsets)
        number = self._number = (self._number + 1) % (1 << 30)
        if requests is not None:
            jobs, pointers = requests
            jobs[:, 0] += number << 32
            jobs[:, 2] = PREADV | fd << 32  # the words of opcode, prio and fd
        else:
            jobs = np.zeros(count, IOCB)
            jobs["data"], jobs["opcode"], jobs["fd"] = (number << 32) + np.arange(count), PREADV, fd
            jobs["offset"], jobs["nbytes"] = offsets, np.diff(first)
            jobs["buf"] = views.ctypes.data + first[:-1] * IOVEC.itemsize
            pointers = jobs.ctypes.data + IOCB.itemsize * np.arange(count, dtype=np.uint64)
        batch = Batch(jobs, pointers, np.zeros(count, np.int64), (views, kept), 0, count)
        self._batches[number] = batch
        self._submit(batch)
        return batch

    def end(self, batch: Batch, wait: bool = True) -> np.ndarray:
        """What came of it. Without `wait` only what has ended by now is taken: `batch.left` says how many have not."""
        while batch.left:
            self._submit(batch)
            if not self._collect(batch, wait):
                break
        return batch.got

    def _submit(self, batch: Batch) -> None:
        """Hand over what of a batch is not, while there is room. Raises OSError where none of it is under way."""
        while batch.begun < len(batch.jobs) and self._flight < self.depth:
            room = min(len(batch.jobs) - batch.begun, self.depth - self._flight)
            done = self._syscall(
                ctypes.c_long(self.calls[2]), self._context, ctypes.c_long(room),
                ctypes.c_void_p(batch.pointers.ctypes.data + 8 * batch.begun),
            )  # fmt: skip
            if done > 0:
                batch.begun += done
                self._flight += done
                continue
            error = ctypes.get_errno()
            if error == errno.EINTR:
                continue
            if error == errno.EAGAIN and self._flight:  # what is under way makes room
                return
            batch.got[batch.begun :] = -error  # it could not be begun
            batch.left -= len(batch.jobs) - batch.begun
            batch.begun = len(batch.jobs)

    def _collect(self, batch: Batch, wait: bool) -> bool:
        """Note what has ended, of this batch and others; False where nothing had, or nothing of it is under way."""
        if not self._flight:
            return False
        open_ = batch.left - (len(batch.jobs) - batch.begun)  # of it, under way
        least = 0 if not wait else max(1, min(open_ if batch.begun == len(batch.jobs) else 1, self.depth))
        arrived = self._syscall(
            ctypes.c_long(self.calls[3]), self._context, ctypes.c_long(least), ctypes.c_long(self.depth),
            ctypes.c_void_p(self._events.ctypes.data), None if wait else ctypes.byref(NOW),
        )  # fmt: skip
        if arrived <= 0:
            return wait  # interrupted: once more
        events = self._events[:arrived]
        self._flight -= int(arrived)
        owners, places = events["data"] >> np.uint64(32), events["data"] & np.uint64(0xFFFFFFFF)
        if len(self._batches) == 1:  # as nearly always: of one there is no need to look whose each is
            ((number, owner),) = self._batches.items()
            owner.got[places] = events["res"]
            owner.left -= int(arrived)
            if not owner.left:
                del self._batches[number]
            return True
        for number in np.unique(owners).tolist():
            mine, owner = owners == number, self._batches[number]
            owner.got[places[mine]] = events["res"][mine]
            owner.left -= int(mine.sum())
            if not owner.left:
                del self._batches[number]
        return True
