"""How to read a drive: the size of a request and how many at once, measured once a drive and kept.

The rate rises with both until it does not; the least of each that comes close to the best is taken, since large
requests are late to arrive and many at once take threads and turns from the computation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..config import MEASURED_MODEL, KiB, MiB
from .drive import measure
from .flash import REQUEST_BYTES

SIZES = (128 * KiB, 256 * KiB, 512 * KiB, 1024 * KiB)
DEPTHS = (4, 8, 16)
CLOSE = 0.96  # of the best rate: nearer is noise
MOST_IN_FLIGHT = 8 * MiB  # the measurement must not cost the memory that it is to serve
SECONDS = 0.25  # a measurement


@dataclass(frozen=True)
class Reading:
    """What serves a drive best. `curve` has (request bytes, depth, bytes a second) of all that was tried."""

    request_bytes: int = REQUEST_BYTES
    depth: int = 8
    curve: tuple[tuple[int, int, float], ...] = ()

    @property
    def bytes_per_second(self) -> float | None:
        return next(
            (rate for size, depth, rate in self.curve if (size, depth) == (self.request_bytes, self.depth)), None
        )


def drive_of(path: Path) -> str:
    """A name for the drive that holds `path`, the same from run to run: its number, size and model where known."""
    device = path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    node = Path(f"/sys/dev/block/{name}")
    try:
        disk = node.resolve()
        disk = disk.parent if (disk / "partition").exists() else disk
        facts = [disk.name, (disk / "size").read_text().strip()]
        model = disk / "device" / "model"
        return " ".join([*facts, model.read_text().strip()] if model.exists() else facts)
    except OSError:
        return name


def kept_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "genai-run" / "drives.json"


def kept(drive: str) -> Reading | None:
    """What an earlier run found, if it can be read."""
    try:
        found = json.loads(kept_file().read_text())[drive]
        curve = tuple((int(size), int(depth), float(rate)) for size, depth, rate in found["curve"])
        reading = Reading(int(found["request_bytes"]), int(found["depth"]), curve)
        return reading if reading.request_bytes in SIZES and reading.depth in DEPTHS else None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _keep(drive: str, reading: Reading) -> None:
    """Best effort: a cache that cannot be written costs the next run two seconds."""
    try:
        file = kept_file()
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            known = json.loads(file.read_text())
        except (OSError, ValueError):
            known = {}
        temporary = file.with_name(f"{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({**(known if isinstance(known, dict) else {}), drive: asdict(reading)}))
        temporary.replace(file)
    except (OSError, RuntimeError):
        return


def choose(curve: tuple[tuple[int, int, float], ...]) -> Reading:
    """The least bytes in flight, then the smaller requests, among what comes close to the best rate."""
    best = max(rate for _, _, rate in curve)
    size, depth, _ = min((c for c in curve if c[2] >= CLOSE * best), key=lambda c: (c[0] * c[1], c[0]))
    return Reading(size, depth, curve)


def reading_of(
    path: Path, *, remeasure: bool = False, notify: Callable[[str], None] | None = None, seconds: float = SECONDS
) -> Reading:
    """How to read the drive that holds `path`, a file large enough to be read all over: as kept, or measured now."""
    drive = drive_of(path)
    known = None if remeasure else kept(drive)
    if known is not None:
        return known
    tried = [(size, depth) for depth in DEPTHS for size in SIZES if size * depth <= MOST_IN_FLIGHT]
    if notify is not None:
        notify(f"measuring the drive (once, about {len(tried) * seconds:.0f} s)")
    curve = []
    for size, depth in tried:
        rate = measure(path, request_bytes=size, depth=depth, seconds=seconds)
        curve.append((size, depth, rate.bytes_per_second))
    reading = choose(tuple(curve))
    _keep(drive, reading)
    return reading


def how_to_read(
    files: Sequence[Path], streaming: int, *, remeasure: bool = False, notify: Callable[[str], None] | None = None
) -> Reading:
    """How to read a model's files, where so many bytes of weights stream (0: none does): as kept of their drive, or the
    default; where they are many the drive is measured, once."""
    file = max(files, key=lambda path: path.stat().st_size)
    many = streaming >= MEASURED_MODEL and file.stat().st_size >= MEASURED_MODEL // 4
    if many or remeasure:
        return reading_of(file, remeasure=remeasure, notify=notify)
    return kept(drive_of(file)) or Reading()
