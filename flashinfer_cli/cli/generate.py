"""`genai-run generate`: a prompt in, the answer out, token by token."""

from __future__ import annotations

import typer

from ..errors import UsageError
from .console import Console
from .options import Json, OptionalModel, PromptOptions, Quiet, RunOptions, SamplingOptions, Stats
from .prompts import gather, required
from .running import INTERRUPTED, Answer, as_json, finish, named, need_of, opened, prompt_ids, reading


def generate(
    prompt: PromptOptions,
    sampling: SamplingOptions,
    run: RunOptions,
    model: OptionalModel = None,
    json: Json = False,
    quiet: Quiet = False,
    stats: Stats = False,
) -> None:
    """Answer a prompt, or continue a text.

    The answer streams to stdout and nothing else does; progress and figures go to stderr. A model that has a chat
    template is asked through it, unless --raw. Without --model, the small story teller that comes along answers.

    [dim]genai-run generate -m MODEL -p "Why is the sky blue?" --memory 2GiB[/dim]

    [dim]git diff | genai-run generate -m MODEL -p "Write a commit message."[/dim]
    """
    console = Console(quiet)
    params = sampling.params()
    if prompt.raw and prompt.system is not None:
        raise UsageError("--system and --raw exclude each other.", "A system message needs the chat template.")
    text = required(gather(prompt.prompt, prompt.file, console.note), "Give one with -p TEXT, -f FILE or on stdin.")
    answer = Answer()

    with opened(named(model, console), run, console, need_of(text, prompt, params)) as engine:
        ids = prompt_ids(engine.tokenizer, text, prompt)
        events = engine.generate(ids, params, progress=reading(console))
        answer.take(events, None if json else console)
        if json:
            found = {"text": answer.text, "token_ids": answer.token_ids, "finish_reason": answer.finish_reason}
            console.answer(as_json({**found, "report": engine.report().to_dict()}))
        console.end_answer()
        finish(engine, console, stats=stats)
    if answer.interrupted:
        raise typer.Exit(INTERRUPTED)
