"""How good a run is: perplexity of a text, and how far a streamed run is from the resident one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from .. import device as devices
from ..config import RunConfig
from ..engine import Engine
from ..errors import UsageError
from ..models.open import open_model

ROWS = 128  # positions whose logits are held at once
LOSSY = ("sparse", "degraded")  # runs that may differ while decoding alone


def evaluate(
    model: str,
    text: str,
    run: RunConfig,
    *,
    against: Literal["dense"] | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Perplexity of `text` in windows of the context, each token scored once, and bits per byte.

    With `against="dense"` also the mean KL divergence (nats) from the resident run to this one and how often both
    have the same first choice; that needs the memory of a second, resident model. Raises UsageError for a text
    without two tokens.
    """
    opened = open_model(model, revision=run.revision)
    ids = opened.tokenizer.encode(text)[: max_tokens or None]
    if len(ids) < 2:
        raise UsageError("The text has fewer than two tokens: there is nothing to predict.")
    longest = opened.config.max_position_embeddings or len(ids)
    context = run.context or min(longest, 1024, len(ids))
    settled = replace(run, context=context, logit_rows=min(ROWS, context), prefill_chunk=min(ROWS, context))
    loss, count = 0.0, 0
    kl, agree = 0.0, 0
    with Engine(opened, settled) as engine:
        exact = replace(settled, exact=True, cache_bias=0.0, cache_gap=0.0, degrade=0.0)
        resident = replace(exact, stream="never", memory="100%")
        dense = Engine(opened, resident) if against == "dense" else None
        try:
            chunk = engine.plan.chunk if dense is None else min(engine.plan.chunk, dense.plan.chunk)
            if engine.experts is not None and engine.exactness in LOSSY:
                chunk = 1  # routing looks at the cache: what is in it must be what a run would have there
            for window in windows(ids, context):
                mine = log_probs(engine, window, chunk)
                theirs = log_probs(dense, window, chunk) if dense is not None else None
                position = 0
                for lp in mine:
                    targets = window[position + 1 : position + 1 + len(lp)]
                    lp = lp[: len(targets)]
                    if targets:
                        loss -= float(lp.gather(1, torch.tensor(targets)[:, None]).sum())
                        count += len(targets)
                    if theirs is not None:
                        other = next(theirs)[: len(lp)]
                        kl += float((other.exp() * (other - lp)).sum())
                        agree += int((other.argmax(-1) == lp.argmax(-1)).sum())
                    position += len(lp) if targets else 0
                    if progress is not None:
                        progress(min(count, len(ids) - 1), len(ids) - 1, "evaluating")
            report = engine.report()
        finally:
            if dense is not None:
                dense.close()
    scored_bytes = len(opened.tokenizer.decode(ids).encode())
    result = {
        "tokens": count,
        "context": context,
        "loss": loss / count,
        "perplexity": math.exp(loss / count),
        "bits_per_byte": loss / math.log(2) / max(scored_bytes, 1),
        "exactness": report.exactness,
        "quality": report.quality,
        "peak": report.peak,
        "budget": report.budget,
    }
    if engine.experts is not None and report.decode.tokens:  # token by token: as many misses as a run would have
        policy = engine.experts.policy
        result |= {"expert_hits": policy.hits(), "expert_misses": policy.misses()}
    if against == "dense":
        result |= {"mean_kl": kl / count, "top1_agreement": agree / count}
    return result


def windows(ids: Sequence[int], context: int) -> Iterator[list[int]]:
    """Cut ids into windows that overlap by one, so that every token but the first is predicted once."""
    for first in range(0, len(ids) - 1, max(context - 1, 1)):
        yield list(ids[first : first + context])


def log_probs(engine: Engine, ids: Sequence[int], chunk: int | None = None) -> Iterator[torch.Tensor]:
    """Log-probabilities after each position of `ids`, at most `chunk` rows [t, V] at a time."""
    session = engine.session()
    try:
        phase: Literal["prefill", "decode"] = "decode" if engine.exactness in LOSSY else "prefill"
        for logits in session.all_logits(ids, chunk or engine.plan.chunk, phase):
            yield logits.cpu().log_softmax(-1)
            del logits
            devices.release_free_memory()  # what passes leave in the heap adds up, and is in nobody's budget
    finally:
        engine.decoder.rt.feed.end()
