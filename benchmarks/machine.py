"""What a figure must be read beside: the machine, its memory's rate, its drive's; and how results are printed."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def best(work: Callable[[], object], seconds: float = 0.4, least: int = 5) -> float:
    """Seconds of the fastest of several runs."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def memory_bandwidth(threads: int) -> float:
    """Bytes a second that a sum over a large float32 array reads."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(256 << 18)
    return data.nbytes / best(data.sum)


def drive_rate(file: Path) -> float:
    """Bytes a second of direct reads all over a file, of the size and depth of a run's own."""
    from flashinfer_cli.store.drive import measure

    return measure(file).bytes_per_second


def scattered_rate(file: Path, request_bytes: int, seconds: float = 1.0) -> float:
    """Bytes a second of direct reads of one size at random places, 4 KiB aligned, handed to the kernel in batches of
    hundreds, as a layer's neurons are; by two threads, one where there is no io_submit."""
    import threading

    import numpy as np

    from flashinfer_cli.device import allocate
    from flashinfer_cli.store.aio import DEPTH, IOVEC, Aio

    size = max(4096, round(request_bytes / 4096) * 4096)
    done = [0, 0]

    def work(index: int) -> None:
        aio, draw = Aio.open(), np.random.default_rng(index)
        fd, buffer = os.open(file, os.O_RDONLY | os.O_DIRECT), allocate(8 * DEPTH * size)
        views = np.zeros(8 * DEPTH, IOVEC)
        views["base"], views["len"] = buffer.ctypes.data + size * np.arange(8 * DEPTH), size
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            places = np.sort(draw.integers(0, (file.stat().st_size - size) // 4096, 8 * DEPTH)) * 4096
            if aio is None:
                done[index] += sum(os.preadv(fd, [buffer[:size]], place) for place in places.tolist())
            else:
                done[index] += int(aio.read(fd, places, np.arange(8 * DEPTH + 1), views).sum())
        if aio is not None:
            aio.close()
        os.close(fd)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - begin)


def describe() -> dict[str, Any]:
    """The machine in a few words."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
    }


def emit(benchmark: str, rows: list[dict[str, Any]], **machine: Any) -> None:
    """The one JSON line that every benchmark ends with."""
    print(json.dumps({"benchmark": benchmark, "machine": {**describe(), **machine}, "rows": rows}))
