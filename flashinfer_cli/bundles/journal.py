"""What an interrupted bundle remembers: from what and how it is made, and which of its files are done.

The journal lies in the partial folder. A run with the same source, parameters and layout goes on after the last
finished file; any other is refused, since a bundle of two sources would look whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import BundleError
from .format import FORMAT_VERSION, MANIFEST_FILE, FileEntry, Manifest, Source
from .layout import BundlePlan
from .publish import write_atomic

JOURNAL_FILE = "journal.json"


@dataclass(frozen=True)
class Journal:
    """`states`: the source's files as source.file_states has them; `layout`: a hash of every file's header and size."""

    version: int
    source: Source
    parameters: dict[str, str]
    layout: str
    states: list[list[Any]]
    files: dict[str, FileEntry]

    def save(self, folder: Path) -> None:
        body = {**asdict(self), "files": {name: asdict(entry) for name, entry in self.files.items()}}
        write_atomic(folder / JOURNAL_FILE, (json.dumps(body, indent=1) + "\n").encode())

    def with_file(self, name: str, entry: FileEntry) -> Journal:
        return replace(self, files={**self.files, name: entry})

    def resumed(self, folder: Path) -> Journal:
        """This journal with the files that are done in `folder`. Raises BundleError when it is of something else."""
        found = _load(folder, self)
        if found is None:
            return self
        for what, mine, theirs in (
            ("format version", self.version, found.version),
            ("source", (self.source.kind, self.source.name), (found.source.kind, found.source.name)),
            *((f"parameter {key}", self.parameters[key], found.parameters.get(key)) for key in self.parameters),
        ):
            if mine != theirs:
                raise _other(folder, f"its {what} was {_words(theirs)} and now is {_words(mine)}")
        if found.source.fingerprint != self.source.fingerprint or found.states != self.states:
            raise _other(folder, "the source has changed since")
        if found.layout != self.layout:
            raise _other(folder, "this version of the program lays its files out differently")
        done = {
            name: entry
            for name, entry in found.files.items()
            if (folder / name).is_file() and (folder / name).stat().st_size == entry.bytes
        }
        return replace(self, files=done)


def layout_digest(plan: BundlePlan) -> str:
    digest = hashlib.sha256()
    for file in plan.files:
        digest.update(f"{file.name} {file.nbytes} ".encode() + file.header)
    digest.update(repr(plan.records).encode())
    return digest.hexdigest()


def new_journal(source: Source, plan: BundlePlan, states: list[list[Any]]) -> Journal:
    return Journal(FORMAT_VERSION, source, plan.parameters, layout_digest(plan), states, {})


def _load(folder: Path, now: Journal) -> Journal | None:
    path, manifest = folder / JOURNAL_FILE, folder / MANIFEST_FILE
    if path.exists():
        try:
            body = json.loads(path.read_bytes())
            files = {name: FileEntry(**entry) for name, entry in body["files"].items()}
            return Journal(**{**body, "source": Source(**body["source"]), "files": files})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # of no use, so the run starts anew
    if manifest.exists():
        # Killed between the journal's removal and the folder's rename: all is written.
        whole = Manifest.from_json(manifest.read_bytes())
        return replace(now, source=whole.source, parameters=whole.parameters, files=whole.files)
    return None


def _words(value: Any) -> str:
    return f"'{value[1]}' ({value[0]})" if isinstance(value, tuple) else f"'{value}'"


def _other(folder: Path, why: str) -> BundleError:
    return BundleError(
        f"An unfinished bundle stands in {folder}, but {why}.",
        f"Run again as before to finish it, or start anew with --overwrite or by deleting {folder}.",
    )
