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
