"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

from ..errors import UsageError

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30


def parse_size(text: str) -> int:
    """Bytes of '4GiB', '1.5G', '800MB', '1048576'. G is GiB as in llama.cpp and docker; GB is 10^9."""
    units = {"": 1, "B": 1, "K": KiB, "KIB": KiB, "KB": 10**3, "M": MiB, "MIB": MiB, "MB": 10**6}
    units |= {"G": GiB, "GIB": GiB, "GB": 10**9, "T": GiB << 10, "TIB": GiB << 10, "TB": 10**12}
    stripped = text.strip().replace("_", "")
    number = stripped.rstrip("BKMGTIbkmgti ")
    unit = stripped[len(number) :].strip().upper()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise UsageError(f"'{text}' is not a size.", "Write 4GiB, 1500M, 60% or auto.") from None
    if not 0 < value < 1 << 60:
        raise UsageError(f"'{text}' is not a size above zero.", "Write 4GiB, 1500M, 60% or auto.")
    return int(value)


def format_size(size: float) -> str:
    """A size as people read it: 1.1 GiB, 320 MiB, 96 KiB."""
    for unit, scale in (("TiB", GiB << 10), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(size) >= scale:
            value = size / scale
            return (
                f"{value:.0f} {unit}"
                if value >= 100
                else f"{value:.1f} {unit}"
                if value >= 10
                else f"{value:.2f} {unit}"
            )
    return f"{size:.0f} B"
