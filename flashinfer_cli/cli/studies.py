"""The commands whose result is a finding rather than an answer: inspect, plan, profile, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
    option,
)
from .prompts import gather, required
from .report_tables import report_tables
from .running import as_json, check_writable, compile_kernels, named, need_of, opened, prompt_ids, write_file
from .tables import evaluation_table, inspect_tables, plan_dict, plan_tables

PROFILE_PROMPT = "Once upon a time, in a small house by the sea, there lived"


def inspect(model: ModelArgument, revision: Revision = None, json: Json = False) -> None:
    """Show what is in a checkpoint or bundle, without loading it.

    Architecture, sizes by part, number formats, tokenizer, chat template, what would stream, and of a calibrated bundle
    how it runs and what that was measured to cost.
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

    model = named(model, console)
    if config.memory not in (None, "auto"):  # then it matters what the process takes
        compile_kernels(model, run, console)
    made = plan_only(model, config)
    if json:
        console.answer(as_json(plan_dict(made)))
    else:
        console.show(plan_tables(made))


def profile(
    prompt: PromptOptions,
    sampling: SamplingOptions,
    run: RunOptions,
    model: OptionalModel = None,
    json: Annotated[Path | None, option(OUTPUT, "--json FILE", "Write the report as JSON; - is stdout.")] = None,
    html: Annotated[Path | None, option(OUTPUT, "--html FILE", "Write one self-contained page of charts.")] = None,
    trace: Annotated[
        Path | None,
        option(
            OUTPUT,
            "--trace FILE",
            "Write which experts or neurons every token asked for, and what was measured, for replay; .gz compresses.",
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
        report = measure(engine, asked, params, console.progress, trace)
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


def evaluate(
    run: RunOptions,
    model: OptionalModel = None,
    file: File = None,
    text: Annotated[str | None, option(PROMPT, "-p --prompt TEXT", "The text itself.")] = None,
    max_tokens: Annotated[int | None, option(PROMPT, "-n --max-tokens N", "Only the first N tokens.", min=2)] = None,
    against: Annotated[
        Literal["dense"] | None,
        option(MODEL, "--against", "Compare with the resident model: mean KL, top-1 agreement."),
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
