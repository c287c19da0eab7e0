"""Instruction tuning (2305.14705): the training loop on dialogues, with parts of the model frozen if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .data import Batches
from .dialogue import Dialogues, Example
from .loop import Corpus, Training
from .model import Decoder, MoeFfn
from .objective import total_loss
from .recipes import Recipe

FROZEN = {"none": (), "router": ("gate", "noise"), "experts": ("mlp.w1", "mlp.w2", "mlp.w3")}
LOOKED_AT = 32  # held-out rows of a look on the way


class Tuning(Training):
    """A run on `dialogues`; `held_out` are examples to look at meanwhile. Frozen parameters keep their bits."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        out: Path,
        start: Decoder,
        dialogues: Dialogues,
        held_out: Sequence[Example],
        freeze: str = "none",
    ) -> None:
        self.dialogues, self.held_out = dialogues, held_out[:LOOKED_AT]
        for name, parameter in start.named_parameters():
            if name.endswith("lstm.bias_hh_l0"):
                continue  # one bias is enough, and a checkpoint has no more
            parameter.requires_grad_(not name.endswith(FROZEN[freeze]) if FROZEN[freeze] else True)
        for block in start.modules():
            if isinstance(block, MoeFfn):
                block.noisy = recipe.load_weight > 0  # the load's estimate needs noise (1701.06538)
        super().__init__(recipe, corpus, out, start)

    def _loss(self, l1: float) -> tuple[torch.Tensor, dict[str, float]]:
        ids, targets = self.dialogues(self.step)
        loss, figures, _ = total_loss(self.model, ids, self.recipe, l1, targets)
        return loss, figures

    def _look(self) -> float:
        return float(judge_answers(self.model, self.held_out)["nats"])


def corpus_of(dialogues: Dialogues, stand_in: Any) -> Corpus:
    """What the loop needs to know of the data; texts and windows have no part in it."""
    stream = dialogues.stream
    return Corpus(stand_in, Batches(stream, 1, 1, 0), [], 0, len(dialogues.examples), len(stream), [], [])


@torch.no_grad()
def judge_answers(model: Decoder, rows: Sequence[Example]) -> dict[str, Any]:
    """On held-out rows, each by itself and causally: nats a token of the answers (their stop tokens included), how
    probable and how often the likeliest the stop token is where an answer ends, and shares of choices by expert; nats
    by source of the rows as well, where they name one."""
    model.eval()
    sums: dict[str, list[float]] = {}
    stop, stopped, ends = 0.0, 0, 0
    chosen: torch.Tensor | None = None
    for row in rows:
        ids = torch.tensor([row.ids])
        logits, aux = model(ids[:, :-1], causal=True)
        for start, end in row.answers:
            answer, wanted = logits[0, start - 1 : end - 1], ids[0, start:end]
            each = sums.setdefault(row.source, [0.0, 0])
            each[0] += float(F.cross_entropy(answer, wanted, reduction="sum"))
            each[1] += len(wanted)
            stop += float(answer[-1].softmax(-1)[wanted[-1]])
            stopped += int(answer[-1].argmax() == wanted[-1])
            ends += 1
        if aux.chosen:
            counts = torch.stack(aux.chosen)
            chosen = counts if chosen is None else chosen + counts
    model.train()
    found: dict[str, Any] = {
        "nats": sum(nats for nats, _ in sums.values()) / sum(tokens for _, tokens in sums.values()),
        "stop_probability": stop / ends,
        "stop_is_likeliest": stopped / ends,
    }
    if set(sums) != {""}:
        found["nats_by_source"] = {source or "other": nats / tokens for source, (nats, tokens) in sorted(sums.items())}
    if chosen is not None:
        found["max_over_mean"] = [float(layer.max() / layer.mean()) for layer in chosen]
        found["use"] = [[round(float(c), 4) for c in layer / layer.sum()] for layer in chosen]
    return found
