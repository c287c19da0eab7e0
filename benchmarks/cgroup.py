"""Run a command as on a device with little memory: in a cgroup of its own, page cache included, its files cold.

Needs root on Linux with the memory controller of cgroup v1 or v2 and, for the readahead, a disk in /sys.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

_numbers = count()


class CappedError(RuntimeError):
    """The machine has no cgroups that we may use, or the command failed."""


def _own_group(controller: str) -> str:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path.rstrip("/")
    return ""


@contextmanager
def group(limit: int) -> Iterator[Path]:
    """A fresh memory cgroup of `limit` bytes; whatever still runs in it is killed at the end."""
    v1 = Path("/sys/fs/cgroup/memory")
    name = f"benchmark-{os.getpid()}-{next(_numbers)}"
    try:
        if v1.is_dir():
            folder = Path(f"{v1}{_own_group('memory')}") / name
            folder.mkdir()
            (folder / "memory.limit_in_bytes").write_text(str(limit))
        else:
            root = Path("/sys/fs/cgroup")
            (root / "cgroup.subtree_control").write_text("+memory")
            folder = root / name
            folder.mkdir()
            (folder / "memory.max").write_text(str(limit))
    except OSError as error:
        raise CappedError(f"No memory cgroup can be made here: {error}") from None
    try:
        yield folder
    finally:
        for pid in (folder / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        for _ in range(50):
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def _peak(folder: Path) -> int | None:
    for name in ("memory.max_usage_in_bytes", "memory.peak"):
        if (folder / name).exists():
            return int((folder / name).read_text())
    return None


def _kills(folder: Path) -> int:
    for name in ("memory.oom_control", "memory.events"):
        if (folder / name).exists():
            rows = dict(line.split()[:2] for line in (folder / name).read_text().splitlines())
            return int(rows.get("oom_kill", 0))
    return 0


def make_cold(paths: Sequence[Path]) -> None:
    """Drop files, and the files of folders, from the page cache."""
    for path in paths:
        for file in [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]:
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _readahead_file(path: Path) -> Path:
    device = path.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    return (node.parent if (node / "partition").exists() else node) / "queue" / "read_ahead_kb"


@contextmanager
def readahead(path: Path, kb: int | None) -> Iterator[int]:
    """Set the readahead of the disk that holds `path` for all of the machine meanwhile; yields the one in force."""
    file = _readahead_file(path)
    before = int(file.read_text())
    try:
        if kb is not None:
            file.write_text(str(kb))
        yield int(file.read_text())
    finally:
        file.write_text(str(before))


def run_capped(
    command: Sequence[str], limit: int, cold: Sequence[Path], *, timeout: float = 900, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run, and return the JSON object that the command prints last, with peak_charge (bytes) and oom_kills added.

    Raises CappedError when it fails, is killed for its memory, or takes longer than `timeout` seconds.
    """
    make_cold(cold)
    with group(limit) as folder:

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                preexec_fn=enter,
                timeout=timeout,
                env={**os.environ, **(env or {})},
            )
        except subprocess.TimeoutExpired:
            raise CappedError(f"not done in {timeout:.0f} s") from None
        kills, peak = _kills(folder), _peak(folder)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CappedError(f"killed for its memory ({kills} kills)" if kills else f"exit {done.returncode}: {last}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found | {"peak_charge": peak, "oom_kills": kills}


@contextmanager
def asked(command: Sequence[str], limit: int, cold: Sequence[Path]) -> Iterator[Callable[[Any], dict[str, Any]]]:
    """A process under a cap that answers lines of JSON with lines of JSON, one at a time; yields what asks it.

    Several may be alive at once, each under a cap of its own, so that they can take turns. CappedError where one ends.
    """
    make_cold(cold)
    with group(limit) as folder:

        def enter() -> None:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, preexec_fn=enter
        )
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def ask(question: Any) -> dict[str, Any]:
            to.write(json.dumps(question) + "\n")
            to.flush()
            line = back.readline()
            if not line:
                raise CappedError(f"The process ended ({_kills(folder)} kills for its memory).")
            found: dict[str, Any] = json.loads(line)
            return found | {"peak_charge": _peak(folder), "oom_kills": _kills(folder)}

        try:
            yield ask
        finally:
            to.close()
            process.wait(60)
