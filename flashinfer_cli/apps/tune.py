"""Instruction tuning from a folder and a JSONL file to a folder that `chat` talks to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..device import cores
from ..errors import StorageError, UsageError
from ..tokenizer import Tokenizer
from ..training.dialogue import TEMPLATE, Dialogues, examples, read_rows, split_rows
from ..training.export import write_weights
from ..training.load import load_decoder
from ..training.loop import Report
from ..training.recipes import Recipe
from ..training.tuning import FROZEN, Tuning, corpus_of, judge_answers
from .bundling import TEXT_FILES
from .train import read_tokenizer
from .tuned_card import describe, write_card

JUDGED = 200  # held-out rows that the figures before and after are of, where no file of them is given


def tune(
    source: Path,
    out: Path,
    data: Path,
    *,
    freeze: str = "none",
    importance_weight: float = 0.0,
    load_weight: float = 0.0,
    steps: int = 1000,
    batch: int = 8,
    learning_rate: float = 1e-3,
    seed: int = 1,
    longest: int | None = None,
    held_out: Path | None = None,
    threads: int | None = None,
    command: str | None = None,
    note: str | None = None,
    report: Report = lambda done, total, figures: None,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Tune the small model in `source` on rows of `data`; returns figures before and after, which stay in tuning.json.

    Loss on the answers and their stop token only; rows of more than `longest` tokens are left out. Judged on the rows
    of `held_out`, or else on one in 32 of `data`, which is not learnt. None when `stop` became true first: the same
    call goes on from there. With `command` a card is written. Raises UsageError before
    anything is written, a bad row named by its line.
    """
    if freeze not in FROZEN:
        raise UsageError(f"'{freeze}' cannot be frozen.", f"Freeze one of {', '.join(FROZEN)}.")
    if (out / "model.safetensors").exists() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} exists.", "Give another OUT.")
    torch.set_num_threads(threads or cores())
    torch.use_deterministic_algorithms(True)
    try:
        rows = read_rows(data)
        train, held = split_rows(rows) if held_out is None else (rows, read_rows(held_out))
        model = load_decoder(source)
        shape = model.shape
        if freeze != "none" and not shape.num_experts:
            raise UsageError("This model has no experts and no router to freeze.", "Leave out --freeze.")
        if out.is_symlink() or out.resolve() == source.resolve():
            raise UsageError("OUT is MODEL itself.", "Give another OUT.")
        began = out.exists()
        _lay_out(source, out)
        tokenizer = Tokenizer.from_folder(out)
        end = _stop(tokenizer, out, began)
        longest = min(longest or shape.max_position_embeddings, shape.max_position_embeddings)

        def answer(text: str) -> list[int]:
            return tokenizer.encode(text, add_special=False)

        learnt, kept = (examples(each, tokenizer.encode_chat, answer, end, longest) for each in (train, held))
        if not learnt or not kept:
            _undo(out, began)
            raise UsageError(f"No row is short enough for {longest} tokens.")
        left = len(train) + len(held) - len(learnt) - len(kept)
        say(f"{len(learnt):,} rows to learn, {len(kept):,} held out" + (f", {left:,} too long" if left else ""))
        kept = kept[:JUDGED] if held_out is None else kept
        before = judge_answers(model, kept)
        recipe = Recipe(
            "tune", "", shape, tokens=steps * batch * longest, batch=batch, sequence=longest, seed=seed,
            learning_rate=learning_rate, warmup=max(1, min(50, steps // 10)), weight_decay=0.0,
            importance_weight=importance_weight, load_weight=load_weight, dtype="float32",
        )  # fmt: skip
        dialogues = Dialogues(learnt, batch, seed)
        corpus = corpus_of(dialogues, read_tokenizer(source))
        training = Tuning(recipe, corpus, out, model, dialogues, kept, freeze)
        if not training.run(report, stop=stop):
            return None
        found = {
            "source": source.name, "data": data.name,
            "held_out": held_out and held_out.name, "rows": len(learnt), "rows_held_out": len(kept),
            "rows_too_long": left, "longest": longest, "freeze": freeze, "importance_weight": importance_weight,
            "load_weight": load_weight, "steps": steps, "batch": batch, "learning_rate": learning_rate, "seed": seed,
            "before": before, "after": judge_answers(training.model, kept),
        }  # fmt: skip
        (out / "tuning.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_weights(training.model, out)
        if command is not None:
            used, parameters = [data, *([held_out] if held_out else [])], sum(p.numel() for p in model.parameters())
            write_card(describe(found, out, used, command, note, training.seconds / 3600, parameters), out)
        training.discard_state()
        return found
    except OSError as error:
        raise StorageError(f"Cannot write {out}: {error.strerror or error}.") from None
    finally:
        torch.use_deterministic_algorithms(False)


def _lay_out(source: Path, out: Path) -> None:
    """Everything of a folder but its weights, and our chat template where it has none."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *TEXT_FILES):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    if not Tokenizer.from_folder(out).has_chat_template:
        (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _stop(tokenizer: Tokenizer, out: Path, began: bool) -> int:
    """The token that ends an answer."""
    if not tokenizer.eos_token_ids:
        _undo(out, began)
        raise UsageError("The model's tokenizer has no end-of-text token, so no answer could end.")
    return tokenizer.eos_token_ids[0]


def _undo(out: Path, began: bool) -> None:
    if not began:
        shutil.rmtree(out, ignore_errors=True)
