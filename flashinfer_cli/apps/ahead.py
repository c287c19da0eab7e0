"""Teach a bundle of a mixture of experts to guess ahead: a linear probe from a hidden state to the routing of a layer
to come, where that guesses better than the layer's own router does (2312.17238, speculative loading); and one from a
layer's hidden state to the uses of its own experts by the tokens that follow, for the cache to keep what is worth it.

All tokens pass through the model a layer at a time, as in `calibrate`. A probe is a ridge regression in closed form,
onto the router's logits or onto discounted uses; on held-out tokens both guess as many experts as are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import device
from ..bundles.publish import writer_lock
from ..config import RunConfig
from ..engine import Engine
from ..errors import UsageError
from ..layers.moe import MoeFfn, rescale
from ..layers.routing import route
from ..models.ahead import Pair, Recall, write_ahead
from ..models.build_experts import LOOKAHEADS
from ..models.open import OpenModel, open_model
from .calibrate import HELD_SHARE, LEAST_TOKENS
from .layerwise import layer_by_layer
from .predictors import BATCH
from .quality import SEQUENCE, Progress
from .room import Passing, refuse_below
from .text import ids_of

RIDGE = 1e-3  # of the mean square of an input, added to every one of them
DISCOUNT = 0.7  # of a use for every token that it is further off

Fitted = tuple[torch.Tensor, torch.Tensor]  # weight [E, d], bias [E]


@dataclass(frozen=True)
class Ahead:
    """What was learned: a row a pair of layers."""

    tokens: int
    pairs: tuple[Recall, ...]


def has_experts(bundle: str | Path) -> bool:
    return open_model(bundle).config.moe is not None


def calibrate_ahead(
    bundle: str | Path, text: str, run: RunConfig, *, tokens: int, progress: Progress | None = None
) -> Ahead:
    """Write probes into a bundle; returns what they and the routers find. Raises UsageError for too little text,
    BudgetError."""
    opened = open_model(bundle)
    if opened.checkpoint.kind != "bundle":
        raise UsageError(
            f"{opened.name} is no bundle.", "Make one first: genai-run bundle MODEL OUT, then calibrate OUT."
        )
    ids = ids_of(opened, text, LEAST_TOKENS)[:tokens]
    path = opened.checkpoint.path
    with writer_lock(path):
        settled = replace(run, context=SEQUENCE, prefill_chunk=SEQUENCE, prefetch_experts="off")
        found, maps = _layers(opened, ids, _within(opened, settled, len(ids)), progress)
        write_ahead(path, maps, found, len(ids))
    return Ahead(len(ids), tuple(found))


def _within(opened: OpenModel, run: RunConfig, tokens: int) -> RunConfig:
    """The run with the memory that learning leaves its engine: what that has beside a layer keeps experts, which every
    window of the text asks for. Raises BudgetError where it is too little."""
    passing, config = Passing.through(opened, run), opened.config
    assert config.moe is not None
    d, choices = config.hidden_size, config.moe.num_experts + config.moe.num_noop_experts
    states = 4 * d * tokens * (3 + max(LOOKAHEADS))  # now, an FFN's inputs, some of them, those before
    fitting = 8 * 3 * d * d + 8 * 3 * BATCH * d + 4 * 5 * tokens * choices
    maps = config.num_hidden_layers * (1 + len(LOOKAHEADS)) * 8 * choices * (d + 1)  # and in halves, and as a file
    beside = passing.beside + states + fitting + maps
    least = max(device.resident_bytes() + passing.engine, device.peak_bytes()) + beside
    refuse_below(least, tokens, run, fewer=tokens > LEAST_TOKENS)
    return replace(run, memory=device.budget_bytes(run.memory) - beside)


def _layers(
    opened: OpenModel, ids: list[int], run: RunConfig, progress: Progress | None
) -> tuple[list[Recall], dict[Pair, Fitted]]:
    parts = [ids[i : i + SEQUENCE] for i in range(0, len(ids), SEQUENCE)]
    found: list[Recall] = []
    maps: dict[Pair, Fitted] = {}
    seen: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}  # layer -> FFN inputs [N, d], norm's weight
    with Engine(opened, run) as engine, torch.inference_mode():
        guess = engine.decoder.first_guess
        if guess is not None:
            states = engine.decoder.embedding(torch.tensor(ids), engine.decoder.rt) * engine.config.embedding_scale
            seen[-1] = guess.norm(states), guess.norm.weight
            del states
        for index, block, inputs, _ in layer_by_layer(engine, parts, lambda index, block: None, progress):
            if isinstance(block.ffn, MoeFfn):
                norm_weight = block.ffn_norm.weight if block.ffn_norm is not None else None
                for source in [index - distance for distance in LOOKAHEADS if index - distance in seen]:
                    recall, fitted = _pair(source, index, block.ffn, *seen[source], inputs, norm_weight)
                    found.append(recall)
                    if recall.better:
                        maps[source, index] = fitted
                if not block.ffn.moe.gate_groups:  # logits of different groups say nothing of each other
                    recall, fitted = _next(index, block.ffn, inputs)
                    found.append(recall)
                    if recall.better:
                        maps[index, index] = fitted
                seen = {layer: kept for layer, kept in seen.items() if layer > index - max(LOOKAHEADS)}
                seen[index] = inputs.clone(), norm_weight
    return found, maps


def _pair(
    source: int,
    layer: int,
    ffn: MoeFfn,
    x: torch.Tensor,
    now: torch.Tensor | None,
    inputs: torch.Tensor,
    then: torch.Tensor | None,
) -> tuple[Recall, Fitted]:
    """Fit and judge one pair: x [N, d] went into the FFN of `source`, `inputs` into that of `layer`."""
    logits = F.linear(inputs, ffn.router, ffn.router_bias)
    held = int(HELD_SHARE * len(x))
    weight, bias = _ridge(x[:-held], logits[:-held])
    scaled = x[-held:] if now is None or then is None else x[-held:] * rescale(now, then)
    chosen = route(logits[-held:], ffn.moe)[1]
    found = Recall(
        source, layer,
        router=_recall(F.linear(scaled, ffn.router, ffn.router_bias), chosen),
        probe=_recall(F.linear(x[-held:], weight.half().float(), bias.half().float()), chosen),
        chance=ffn.moe.num_experts_per_tok / logits.shape[-1],
    )  # fmt: skip
    return found, (weight, bias)


def _next(layer: int, ffn: MoeFfn, inputs: torch.Tensor) -> tuple[Recall, Fitted]:
    """Fit and judge what foresees the uses of a layer's experts; `inputs` [N, d] went into its FFN."""
    logits, count = F.linear(inputs, ffn.router, ffn.router_bias), ffn.moe.num_experts
    chosen = route(logits, ffn.moe)[1]
    uses = torch.zeros(len(chosen), logits.shape[-1]).scatter_(1, chosen, 1.0)[:, :count]
    last = (torch.arange(len(inputs)) + 1) % SEQUENCE == 0
    last[-1] = True
    worth = discounted(uses, last)
    held = int(HELD_SHARE * len(inputs))
    weight, bias = _ridge(inputs[:-held][~last[:-held]], worth[:-held][~last[:-held]])
    now = torch.arange(len(inputs) - held, len(inputs))[~last[-held:]]
    found = Recall(
        layer, layer,
        router=_recall(logits[now, :count], chosen[now + 1]),
        probe=_recall(F.linear(inputs[now], weight.half().float(), bias.half().float()), chosen[now + 1]),
        chance=ffn.moe.num_experts_per_tok / logits.shape[-1],
    )  # fmt: skip
    return found, (weight, bias)


def discounted(uses: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """uses [N, E] of tokens -> [N, E], the uses by those that follow each in its sequence, discounted; `last` bool [N]
    says where a sequence ends."""
    worth, coming = torch.empty_like(uses), torch.zeros_like(uses[0])
    for token in range(len(uses) - 1, -1, -1):
        coming = torch.zeros_like(coming) if last[token] else coming
        worth[token] = coming
        coming = uses[token] + DISCOUNT * coming
    return worth


def _recall(guess: torch.Tensor, chosen: torch.Tensor) -> float:
    """Of the experts chosen, [N, k], the share among the k best of a guess [N, E]."""
    guessed = guess.topk(chosen.shape[-1], dim=-1).indices
    return float((chosen[:, :, None] == guessed[:, None, :]).any(-1).float().mean())


def _ridge(x: torch.Tensor, y: torch.Tensor) -> Fitted:
    """Least squares of y [N, E] on x [N, d] with a bias, in float64."""
    mean_x, mean_y = (sum(part.double().sum(0) for part in each.split(BATCH)) / len(each) for each in (x, y))
    square, cross = (torch.zeros(x.shape[1], each.shape[1], dtype=torch.float64) for each in (x, y))
    for rows, targets in zip(x.split(BATCH), y.split(BATCH), strict=True):
        rows = rows.double() - mean_x
        square.addmm_(rows.T, rows)
        cross.addmm_(rows.T, targets.double() - mean_y)
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    weight = torch.linalg.solve(square, cross).T
    return weight.float(), (mean_y - weight @ mean_x).float()
