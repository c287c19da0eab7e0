"""Many reads with two system calls: Linux's own asynchronous input/output (io_submit), through ctypes.

A token asks for thousands of records of a few KB. A thread that reads them one by one pays a system call, a sleep and
some Python for each; here a batch is laid out by numpy, handed to the kernel whole, and waited for without the
interpreter lock. It works on direct reads only (buffered ones would be served one after the other), and where the
system has none of it `Aio.open` returns None and `scatter.read_one_by_one` is the plain twin.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys

import numpy as np

DEPTH = 64  # reads in flight, of a batch
PREADV = 7  # the kernel's number for a read into several pieces of memory
# io_setup, io_destroy, io_submit, io_getevents
CALLS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}
IOCB = np.dtype(
    [
        ("data", "<u8"), ("key", "<u4"), ("rw_flags", "<u4"), ("opcode", "<u2"), ("prio", "<i2"), ("fd", "<u4"),
        ("buf", "<u8"), ("nbytes", "<u8"), ("offset", "<i8"), ("reserved", "<u8"), ("flags", "<u4"), ("resfd", "<u4"),
    ]
)  # fmt: skip
EVENT = np.dtype([("data", "<u8"), ("obj", "<u8"), ("res", "<i8"), ("res2", "<i8")])
IOVEC = np.dtype([("base", "<u8"), ("len", "<u8")])


class Aio:
    """A context of one thread's own. `read` returns when all of a batch has ended."""

    def __init__(self, context: ctypes.c_ulong, calls: tuple[int, int, int, int]) -> None:
        self._context, self._calls = context, calls
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._events = np.zeros(DEPTH, EVENT)

    @classmethod
    def open(cls) -> Aio | None:
        """None where the system has no such calls, or no context to spare."""
        calls = CALLS.get(platform.machine())
        if not sys.platform.startswith("linux") or calls is None or sys.byteorder != "little":
            return None
        syscall = ctypes.CDLL(None, use_errno=True).syscall
        syscall.restype = ctypes.c_long
        context = ctypes.c_ulong(0)
        if syscall(ctypes.c_long(calls[0]), ctypes.c_uint(DEPTH), ctypes.byref(context)) != 0:
            return None
        return cls(context, calls)

    def close(self) -> None:
        self._syscall(ctypes.c_long(self._calls[1]), self._context)

    def read(self, fd: int, offsets: np.ndarray, first: np.ndarray, views: np.ndarray) -> np.ndarray:
        """Read i goes from offsets[i] of the file into memory views[first[i] : first[i + 1]] (IOVEC), one after the
        other; returns the bytes each brought, or less than zero: -errno. Raises OSError when none can be begun."""
        count = len(offsets)
        jobs = np.zeros(count, IOCB)
        jobs["data"], jobs["opcode"], jobs["fd"], jobs["offset"] = np.arange(count), PREADV, fd, offsets
        jobs["buf"] = views.ctypes.data + first[:-1] * IOVEC.itemsize
        jobs["nbytes"] = np.diff(first)
        pointers = jobs.ctypes.data + IOCB.itemsize * np.arange(count, dtype=np.uint64)
        got = np.zeros(count, np.int64)
        begun = ended = 0
        failed = 0
        while ended < (count if not failed else begun):
            room = min(count - begun, DEPTH - (begun - ended)) if not failed else 0
            if room:
                done = self._syscall(
                    ctypes.c_long(self._calls[2]), self._context, ctypes.c_long(room),
                    ctypes.c_void_p(pointers.ctypes.data + 8 * begun),
                )  # fmt: skip
                if done > 0:
                    begun += done
                elif ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN) or begun == ended:
                    failed = ctypes.get_errno()  # what is under way must end before its memory may go
                    continue
            flight = begun - ended
            if not flight:
                break
            least = flight if begun == count or failed else max(1, flight // 4)
            arrived = self._syscall(
                ctypes.c_long(self._calls[3]), self._context, ctypes.c_long(least), ctypes.c_long(flight),
                ctypes.c_void_p(self._events.ctypes.data), None,
            )  # fmt: skip
            if arrived > 0:
                events = self._events[:arrived]
                got[events["data"]] = events["res"]
                ended += arrived
        if failed:
            raise OSError(failed, os.strerror(failed))
        return got
