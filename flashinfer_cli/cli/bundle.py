"""`genai-run bundle`: a checkpoint rewritten so that it streams fast; also checked, and put in another order."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..config import format_size
from ..errors import BundleError, UsageError
from .console import Console
from .options import OUTPUT, ModelArgument, Quiet, Revision, option
from .tables import Table


@dataclass(frozen=True)
class FormatOptions:
    """What becomes of the weights' numbers; as `apps.bundling.bundle` takes it."""

    dtype: Annotated[
        str,
        option(
            OUTPUT,
            "--dtype DTYPE",
            "Of streamed weights that are not quantized: auto keeps the model's own; F16, BF16, F32.",
        ),
    ] = "auto"
    quantize: Annotated[
        Literal["none", "int8", "int4"],
        option(
            OUTPUT,
            "--quantize",
            "Round the weights: int8 (8.125 bits each) or int4 (4.5 bits, and int8 in the trunk).",
        ),
    ] = "none"
    quantize_experts: Annotated[
        Literal["none", "int8", "int4"] | None,
        option(
            OUTPUT,
            "--quantize-experts",
            "Of what streams alone: experts, and the neurons of dense layers. As --quantize if not given.",
        ),
    ] = None
    quantize_trunk: Annotated[
        Literal["none", "int8", "int4"] | None,
        option(
            OUTPUT,
            "--quantize-trunk",
            "Of attention, embedding and head alone: fewer bits hurt most and save least here, so --quantize int4 "
            "makes them int8. Norms, routers and biases stay.",
        ),
    ] = None
    rounding: Annotated[
        Literal["search", "nearest"],
        option(OUTPUT, "--rounding", "search for the scales that lose least, or round to nearest (faster, and worse)."),
    ] = "search"
    small_experts: Annotated[
        Literal["none", "int8", "int4"],
        option(OUTPUT, "--small-experts", "Add a second, smaller copy of every expert, for runs with --degrade."),
    ] = "none"

    def check(self) -> None:
        quantized = {self.quantize, self.quantize_experts, self.quantize_trunk, self.small_experts}
        if self.rounding == "nearest" and quantized <= {None, "none"}:
            raise UsageError(
                "--rounding nearest says how to quantize, and nothing is to be quantized.", "Add --quantize."
            )


def bundle(
    model: ModelArgument,
    formats: FormatOptions,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to make.")] = None,
    order: Annotated[
        Literal["source", "coactivation"],
        option(
            OUTPUT,
            "--order",
            "Of neurons: the model's own, or what fires together side by side (MODEL is a calibrated bundle).",
        ),
    ] = "source",
    dry_run: Annotated[
        bool, option(OUTPUT, "--dry-run", "Show the files, their sizes and the free space only.")
    ] = False,
    verify: Annotated[
        bool, option(OUTPUT, "--verify", "Check every SHA-256 of a bundle that is there already.")
    ] = False,
    overwrite: Annotated[bool, option(OUTPUT, "--overwrite", "Replace a bundle that is there already.")] = False,
    revision: Revision = None,
    quiet: Quiet = False,
) -> None:
    """Rewrite a checkpoint so that it streams fast.

    The weights that are used together come to lie together, aligned, in plain safetensors. The source is never touched;
    an interrupted run goes on where it stopped when started again. With --verify, OUT may be left out: MODEL is the
    bundle.

    Blocks of a GGUF file stay as they are, whatever --quantize says, except that int4 rounds those of 8 bits.
    """
    console = Console(quiet)
    asked = formats != FormatOptions() or dry_run
    if verify:
        if asked or overwrite:
            raise UsageError("--verify checks a bundle that is there; it goes with none of the options that make one.")
        return _verify(Path(model) if out is None else out, console)
    formats.check()
    if out is None:
        raise UsageError("Missing argument 'OUT'.", "Name the folder to make: genai-run bundle MODEL OUT.")
    if order == "coactivation":
        if asked:
            raise UsageError(
                "--order coactivation moves the neurons of a bundle that is calibrated; it changes nothing else.",
                "First bundle, then calibrate, then order.",
            )
        return _reorder(Path(model), out, overwrite, console)
    if dry_run:
        return _dry_run(model, out, formats, revision, console)
    from ..apps.bundling import bundle as make

    made = make(
        model,
        out,
        **asdict(formats),
        overwrite=overwrite,
        revision=revision,
        notify=console.note,
        progress=_progress(console, "bundling"),
    )
    console.clear()
    console.answer(f"{made}\n")


def _progress(console: Console, what: str) -> Callable[[int, int, str], None]:
    return lambda done, total, file: console.progress(done, total, what)


def _dry_run(model: str, out: Path, formats: FormatOptions, revision: str | None, console: Console) -> None:
    from ..apps.bundling import dry_run

    planned = dry_run(model, **asdict(formats), revision=revision)
    for note in planned.notes:
        console.note(note)
    rows = [(file.name, format_size(file.nbytes)) for file in planned.files]
    rows += [("all files", format_size(planned.total_bytes)), ("free space there", format_size(_free_space(out)))]
    console.show([Table(f"Would write {out} ({planned.exactness})", ("file", "size"), rows)])


def _reorder(bundle: Path, out: Path, overwrite: bool, console: Console) -> None:
    from ..bundles.reorder import reorder

    made = reorder(bundle, out, overwrite=overwrite, progress=_progress(console, "ordering"))
    console.clear()
    console.answer(f"{made}\n")


def _verify(path: Path, console: Console) -> None:
    from ..bundles.verify import verify_bundle

    problems = verify_bundle(path, _progress(console, "checking"))
    console.clear()
    if problems:
        more = f" {len(problems) - 1} more files are wrong too." if len(problems) > 1 else ""
        raise BundleError(f"The bundle {path} is damaged: {problems[0]}{more}", "Make it again with --overwrite.")
    console.answer(f"{path}: every file is as it was written.\n")


def _free_space(path: Path) -> int:
    """Bytes free where `path` is to be, the folders still to be made aside."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
