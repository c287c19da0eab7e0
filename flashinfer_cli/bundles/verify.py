"""Compare every byte of a bundle with the hashes in its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ..config import MiB
from .reader import read_manifest
from .source import drop_cache

_BLOCK = 4 * MiB


def verify_bundle(path: Path, progress: Callable[[int, int, str], None] | None = None) -> list[str]:
    """Read the whole bundle at `path`; a sentence for each file that is missing or not as written, [] when all is well.

    `progress(done_bytes, total_bytes, file_name)` is called as bytes are read. Raises BundleError without a manifest.
    """
    path = Path(path)
    manifest = read_manifest(path)
    total, done = sum(entry.bytes for entry in manifest.files.values()), 0
    problems: list[str] = []
    for name, entry in manifest.files.items():
        try:
            size = (path / name).stat().st_size
            if size != entry.bytes:
                problems.append(f"{name} is {size} bytes long, not {entry.bytes}.")
            else:
                digest = hashlib.sha256()
                for read in _read_into(digest.update, path / name):
                    if progress is not None:
                        progress(done + read, total, name)
                if digest.hexdigest() != entry.sha256:
                    problems.append(f"{name} has changed: its SHA-256 is not the one in the manifest.")
        except FileNotFoundError:
            problems.append(f"{name} is missing.")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}.")
        done += entry.bytes
    return problems


def _read_into(update: Callable[[bytes], None], file: Path) -> Iterator[int]:
    """Feed the file to `update` block by block, leaving nothing in the page cache; yields the bytes read so far."""
    fd, read = os.open(file, os.O_RDONLY | os.O_CLOEXEC), 0
    try:
        while block := os.pread(fd, _BLOCK, read):
            update(block)
            read += len(block)
            drop_cache(fd, 0, read)
            yield read
    finally:
        os.close(fd)
