"""The commands whose result is a finding rather than an answer: inspect, plan, profile, evaluate, bundle."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..config import format_size
from ..errors import BundleError, UsageError
from .console import Console
from .options import (
    MODEL,
    OUTPUT,
    PROMPT,
    File,
    Json,
    ModelArgument,
    OptionalModel,
    PromptOptions,
    Quiet,
    Revision,
    RunOptions,
    SamplingOptions,
)
from .prompts import gather, required
from .report_tables import report_tables
from .running import as_json, check_writable, compile_kernels, named, need_of, opened, prompt_ids, write_file
from .tables import Table, evaluation_table, inspect_tables, plan_dict, plan_tables

if TYPE_CHECKING:
    from ..engine import Engine

PROFILE_PROMPT = "Once upon a time, in a small house by the sea, there lived"


def inspect(model: ModelArgument, revision: Revision = None, json: Json = False) -> None:
    """Show what is in a checkpoint or bundle, without loading it.

    Architecture, sizes by part, number formats, tokenizer, chat template, and what would stream.
    """
    console = Console()
    from ..apps.inspect import inspect_model

    found = inspect_model(model, revision=revision)
    if json:
        console.answer(as_json(found))
    else:
        console.show(inspect_tables(found))


def plan(run: RunOptions, model: OptionalModel = None, json: Json = False) -> None:
    """Show the memory plan for a budget, without running.

    Fails, naming the least that would do, when the model cannot run in that budget.
    """
    console = Console()
    config = run.config()
    from ..apps.planning import plan_only

    made = plan_only(named(model, console), config)
    if json:
        console.answer(as_json(plan_dict(made)))
    else:
        console.show(plan_tables(made))


def profile(
    prompt: PromptOptions,
    sampling: SamplingOptions,
    run: RunOptions,
    model: OptionalModel = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", rich_help_panel=OUTPUT, help="Write the report as JSON; - is stdout."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", rich_help_panel=OUTPUT, help="Write one self-contained page of charts."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            rich_help_panel=OUTPUT,
            help="Write which experts or neurons every token asked for, for replay; .gz compresses.",
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run a prompt and show where memory and time went.

    Plan against actual memory, reads against what the drive can do (measured in place), waiting against computing by
    layer, prefill apart from decode, the cold start apart from the rest. Without a prompt, a short one is taken.
    """
    console = Console(quiet)
    params = sampling.params()
    check_writable(json, html, trace)
    given = gather(prompt.prompt, prompt.file, console.note)
    text = PROFILE_PROMPT if given is None else given
    with opened(named(model, console), run, console, need_of(text, prompt, params)) as engine:
        from ..apps.profile import profile as measure

        asked = prompt_ids(engine.tokenizer, text, prompt)
        with _recording(engine, trace):
            report = measure(engine, asked, params, console.progress)
        console.clear()
        found = report.to_dict()
        if html is not None:
            from ..apps.html_report import render

            write_file(html, render(found))
        on_stdout = json is not None and str(json) == "-"
        if json is not None and not on_stdout:
            write_file(json, as_json(found))
        if on_stdout:
            console.answer(as_json(found))
        console.show(report_tables(found), on_stderr=on_stdout)
        for warning in report.warnings:
            console.warn(warning)
        console.note(report.summary())


def _recording(engine: Engine, trace: Path | None) -> AbstractContextManager[None]:
    if trace is None:
        return nullcontext()
    from ..apps.recording import recording

    return recording(engine, trace)


def evaluate(
    run: RunOptions,
    model: OptionalModel = None,
    file: File = None,
    text: Annotated[
        str | None, typer.Option("-p", "--prompt", metavar="TEXT", rich_help_panel=PROMPT, help="The text itself.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-tokens", min=2, metavar="N", rich_help_panel=PROMPT, help="Only the first N tokens."),
    ] = None,
    against: Annotated[
        Literal["dense"] | None,
        typer.Option(
            "--against", rich_help_panel=MODEL, help="Compare with the resident model: mean KL, top-1 agreement."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the perplexity of a text.

    With --against dense the same text also goes through the resident model, and the two are compared token by token.
    """
    console = Console(quiet)
    config = run.config()
    how = "Give one with -f FILE, -p TEXT or on stdin."
    given = required(gather(text, file, console.note, what="text"), how, what="text")
    name = named(model, console)
    compile_kernels(name, run, console)
    from ..apps.evaluate import evaluate as measure

    found = measure(name, given, config, against=against, max_tokens=max_tokens, progress=console.progress)
    console.clear()
    if json:
        console.answer(as_json(found))
    else:
        console.show([evaluation_table(found)])


def bundle(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to make.")] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            rich_help_panel=OUTPUT,
            help="Of streamed weights that are not quantized: auto keeps the model's own; F16, BF16, F32.",
        ),
    ] = "auto",
    quantize: Annotated[
        Literal["none", "int8", "int4"],
        typer.Option(
            "--quantize",
            rich_help_panel=OUTPUT,
            help="Round the weights: int8 (8.5 bits each) or int4 (4.5 bits, and int8 in the trunk).",
        ),
    ] = "none",
    quantize_experts: Annotated[
        Literal["none", "int8", "int4"] | None,
        typer.Option(
            "--quantize-experts",
            rich_help_panel=OUTPUT,
            help="Of what streams alone: experts, and the neurons of dense layers. As --quantize if not given.",
        ),
    ] = None,
    quantize_trunk: Annotated[
        Literal["none", "int8", "int4"] | None,
        typer.Option(
            "--quantize-trunk",
            rich_help_panel=OUTPUT,
            help="Of attention, embedding and head alone: fewer bits hurt most and save least here, so --quantize int4 "
            "makes them int8. Norms, routers and biases stay.",
        ),
    ] = None,
    rounding: Annotated[
        Literal["search", "nearest"],
        typer.Option(
            "--rounding",
            rich_help_panel=OUTPUT,
            help="search for the scales that lose least, or round to nearest (faster, and worse).",
        ),
    ] = "search",
    small_experts: Annotated[
        Literal["none", "int8", "int4"],
        typer.Option(
            "--small-experts",
            rich_help_panel=OUTPUT,
            help="Add a second, smaller copy of every expert, for runs with --degrade.",
        ),
    ] = "none",
    order: Annotated[
        Literal["source", "coactivation"],
        typer.Option(
            "--order",
            rich_help_panel=OUTPUT,
            help="Of neurons: the model's own, or what fires together side by side (MODEL is a calibrated bundle).",
        ),
    ] = "source",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Show the files, their sizes and the free space only."),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", rich_help_panel=OUTPUT, help="Check every SHA-256 of a bundle that is there already."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace a bundle that is there already.")
    ] = False,
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
    asked = quantize != "none" or quantize_experts is not None or quantize_trunk is not None
    asked = asked or small_experts != "none"
    if verify and (asked or rounding != "search" or dtype != "auto" or dry_run or overwrite):
        raise UsageError("--verify checks a bundle that is there; it goes with none of the options that make one.")
    if rounding == "nearest" and {quantize, quantize_experts, quantize_trunk, small_experts} <= {None, "none"}:
        raise UsageError("--rounding nearest says how to quantize, and nothing is to be quantized.", "Add --quantize.")
    if out is None and not verify:
        raise UsageError("Missing argument 'OUT'.", "Name the folder to make: genai-run bundle MODEL OUT.")
    if verify:
        _verify(Path(model) if out is None else out, console)
        return
    assert out is not None
    if order == "coactivation":
        if asked or rounding != "search" or dtype != "auto" or dry_run:
            raise UsageError(
                "--order coactivation moves the neurons of a bundle that is calibrated; it changes nothing else.",
                "First bundle, then calibrate, then order.",
            )
        _reorder(Path(model), out, overwrite, console)
        return
    from ..apps.bundling import bundle as make
    from ..apps.bundling import dry_run as plan_it

    if dry_run:
        planned = plan_it(
            model,
            dtype=dtype,
            quantize=quantize,
            quantize_experts=quantize_experts,
            quantize_trunk=quantize_trunk,
            rounding=rounding,
            small_experts=small_experts,
            revision=revision,
        )
        for note in planned.notes:
            console.note(note)
        rows = [(file.name, format_size(file.nbytes)) for file in planned.files]
        rows += [("all files", format_size(planned.total_bytes)), ("free space there", format_size(_free_space(out)))]
        console.show([Table(f"Would write {out} ({planned.exactness})", ("file", "size"), rows)])
        return

    def progress(done: int, total: int, file: str) -> None:
        console.progress(done, total, "bundling")

    made = make(
        model,
        out,
        dtype=dtype,
        quantize=quantize,
        quantize_experts=quantize_experts,
        quantize_trunk=quantize_trunk,
        rounding=rounding,
        small_experts=small_experts,
        overwrite=overwrite,
        revision=revision,
        notify=console.note,
        progress=progress,
    )
    console.clear()
    console.answer(f"{made}\n")


def _reorder(bundle: Path, out: Path, overwrite: bool, console: Console) -> None:
    from ..bundles.reorder import reorder

    made = reorder(
        bundle, out, overwrite=overwrite, progress=lambda done, total, file: console.progress(done, total, "ordering")
    )
    console.clear()
    console.answer(f"{made}\n")


def _verify(path: Path, console: Console) -> None:
    from ..bundles.verify import verify_bundle

    problems = verify_bundle(path, lambda done, total, file: console.progress(done, total, "checking"))
    console.clear()
    if problems:
        more = f" {len(problems) - 1} more files are wrong too." if len(problems) > 1 else ""
        raise BundleError(f"The bundle {path} is damaged: {problems[0]}{more}", "Make it again with --overwrite.")
    console.answer(f"{path}: every file is as it was written.\n")


def _free_space(path: Path) -> int:
    """Bytes free where `path` is to be, the folders still to be made aside."""
    there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free
