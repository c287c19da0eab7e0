"""The public function `load`: a model opened, kernels compiled where that pays, and a draft beside it."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from .config import DEFAULT_CONTEXT, SMALL_MODEL, RunConfig
from .decoding.drafts import ModelDraft, NGramDraft, SelfDraft, check_same_ids
from .decoding.judging import check_tree
from .decoding.lending import Lending
from .decoding.speculative import MOST_DRAFTED, ON_DEMAND, RESIDENT, STREAMED, Draft, Speculator
from .engine import Engine, Need, Notify, Progress
from .errors import UsageError
from .kernels.warm import ensure_compiled, is_compiled
from .models.open import OpenModel, open_model


def load(
    model: str | Path,
    *,
    need: Need | None = None,
    notify: Notify | None = None,
    progress: Progress | None = None,
    **run_options: Any,
) -> Engine:
    """Load a Hugging Face folder, a GGUF file, a bundle, or org/name from the hub.

    `run_options` are the fields of RunConfig: memory ("4GiB", "60%", "auto" or bytes), device, stream, context, ...
    `need` says, given the tokenizer, how many tokens the context must hold when no `context` is given. Raises
    errors.* as told there.
    """
    known = {f.name for f in fields(RunConfig)}
    unknown = next((name for name in run_options if name not in known), None)
    if unknown is not None:
        raise UsageError(f"Unknown option '{unknown}'.", f"Options are {', '.join(sorted(known))}.")
    run = RunConfig(**run_options)
    opened = open_model(model, revision=run.revision)
    if run.kernels == "auto" and opened.weight_bytes < SMALL_MODEL and not is_compiled():
        run = replace(run, kernels="reference")
    if run.kernels != "reference":
        ensure_compiled(notify)
    if run.draft is None or run.speculate == "off":
        return Engine(opened, run, need=need, notify=notify, progress=progress)
    return _with_draft(opened, run, need, notify, progress)


def _with_draft(
    opened: OpenModel, run: RunConfig, need: Need | None, notify: Notify | None, progress: Progress | None
) -> Engine:
    """The engine with a draft beside it, in the same budget: the draft is loaded first, in full, and is then part of
    the process as the plan sees it."""
    name = run.draft
    assert name is not None
    if run.draft_tree:
        check_tree(opened.config, name)
    draft: Draft = NGramDraft()
    resident: Engine | None = None
    if name not in ("ngram", "self"):
        small = open_model(name)
        check_same_ids(opened.tokenizer, small.tokenizer, name)
        if run.context is None and need is not None:
            run = replace(run, context=min(need(opened.tokenizer), opened.config.max_position_embeddings))
        longest = small.config.max_position_embeddings or DEFAULT_CONTEXT
        context = min(run.context or DEFAULT_CONTEXT, longest)
        resident = Engine(
            small, replace(run, draft=None, speculate="auto", draft_tree=0, stream="never", context=context)
        )
        draft = ModelDraft(resident.session(), resident.config.vocab_size, resident.close, run.draft_tree)
        if notify is not None:
            notify(f"draft {name}: {resident.plan}")
    fixed = int(run.speculate) if run.speculate.isdigit() else None
    run = replace(
        run, logit_rows=(fixed or MOST_DRAFTED) + run.draft_tree + 1
    )  # a pass gives a row for each token that it checks
    try:
        found = Engine(opened, run, notify=notify, need=need, progress=progress)
    except BaseException:
        draft.close()
        raise
    if name == "self":
        draft = SelfDraft(found.decoder, found._kv, found.config.vocab_size, run.draft_tree)
        if not draft.able:
            found.close()
            raise UsageError(
                "There is not enough memory for the model to draft for itself: its head has to stay.",
                "Give more --memory, or take --draft ngram.",
            )
    on_demand = ON_DEMAND if found.experts is not None or found.neurons is not None else STREAMED
    slope = RESIDENT if found.plan.everything_fits else on_demand
    found.speculator = Speculator(draft, name, fixed, slope, run.draft_tree)
    # where all streams by order, or nothing does, or what a pass streams is not known before, there is nothing to lend
    if resident is not None and resident.neurons is None and run.stream == "auto" and found.decoder.streamed:
        found.speculator.lender = Lending(found.decoder, resident.decoder)
    return found
