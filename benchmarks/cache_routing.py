"""Rules of cache-aware routing side by side: what each spares of the misses for what it costs in perplexity.

    python -m benchmarks.cache_routing TEXT... [--model zoo:stories-moe] [--maps BUNDLE] [--slots 8 4] [--tokens N]

Held-out stories go through one of our small mixtures of experts in plain torch, many streams at once, each token by
token with an expert cache of its own (`slots` experts a layer; LRU, or foresight where a calibrated bundle's maps are
given), so that every rule is judged by what it does to the cache as well. A rule sees a token's router logits and
which experts are here. All keep the best `keep` experts whatever is here:

    bias S      logits of what is here + S * running mean of their range, as --cache-bias (2412.00099, cache-prior)
    rank M      what is here first, among the M best (2412.00099, max rank)
    mass P      what is here first, among the fewest best whose probabilities add up to P (2412.00099, cumulative sum)
    ratio R     an expert that is away is replaced by the best that is here and has at least R of its probability
    gap G       the same, where all that a token's weights lose to stand-ins is at most G, as --cache-gap
    layers G    as gap, with 0.7 of G in the outer quarters of the layers and 1.3 of it in the others
    squares G   as gap, of what squares of weights lose: w (w - v) for a weight w that becomes v, of all their squares
    drop D      an expert that is away and has less than D of the token's weights is left out

The weights are always those of the true logits over what was chosen. Perplexity is compared on the same tokens; its
error (one standard deviation) is that of the mean difference over streams.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from flashinfer_cli import zoo
from flashinfer_cli.models.ahead import read_ahead
from flashinfer_cli.models.open import open_model
from flashinfer_cli.training.data import read_documents, split
from flashinfer_cli.training.load import load_decoder
from flashinfer_cli.training.model import Decoder, rotate

from .machine import emit
from .routing_rules import Bias, Drop, Mass, Rank, Rule, Swap

WINDOW = 256  # tokens of a story that are fed


class Cache:
    """Experts that stay, of many streams at once: at most `slots` of each layer, those worth least or unused longest
    go. held bool [B, L, E]."""

    def __init__(self, streams: int, layers: int, experts: int, slots: int) -> None:
        self.slots = slots
        self.held = torch.zeros(streams, layers, experts, dtype=torch.bool)
        self.last = torch.zeros(streams, layers, experts, dtype=torch.float64)
        self.clock = 0

    def demand(self, layer: int, chosen: torch.Tensor, worth: torch.Tensor | None, alive: torch.Tensor) -> torch.Tensor:
        """chosen [B, k], best first, -1 for none -> misses [B]."""
        held, last = self.held[:, layer], self.last[:, layer]
        misses = torch.zeros(len(chosen), dtype=torch.int64)
        for rank in reversed(range(chosen.shape[1])):
            self.clock += 1
            one = chosen[:, rank : rank + 1]
            wanted = (one >= 0) & alive[:, None]
            place = one.clamp_min(0)
            misses += (wanted & ~held.gather(1, place))[:, 0]
            held.scatter_(1, place, held.gather(1, place) | wanted)
            last.scatter_(1, place, torch.where(wanted, float(self.clock), last.gather(1, place)))
        order = last * 1e-9 if worth is None else worth.double() + last * 1e-9
        order = order.masked_fill(~held, float("-inf"))
        stays = torch.zeros_like(held).scatter_(1, order.topk(self.slots, dim=-1).indices, True)
        self.held[:, layer] = held & stays
        return misses


def streams_of(model: str, texts: list[Path], count: int, tokens: int) -> list[list[list[int]]]:
    """`count` streams of held-out stories, together about `tokens`."""
    stories = split(read_documents(texts))[1]
    random.Random(0).shuffle(stories)
    tokenizer = open_model(model).tokenizer
    streams: list[list[list[int]]] = [[] for _ in range(count)]
    sizes = [0] * count
    for story in stories:
        at = min(range(count), key=lambda i: sizes[i])
        if sizes[at] * count >= tokens:
            break
        ids = tokenizer.encode(story)[:WINDOW]
        if len(ids) > 1:
            streams[at].append(ids)
            sizes[at] += len(ids)
    return streams


def _steps(streams: list[list[list[int]]]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Token, position in its story, target (-1: none) and whether there is one at all, int64 and bool [B]."""
    flat = [
        [(i, p, s[p + 1] if p + 1 < len(s) else -1, 1) for s in stream for p, i in enumerate(s)] for stream in streams
    ]
    longest = max(map(len, flat))
    rows = torch.tensor([f + [(0, 0, -1, 0)] * (longest - len(f)) for f in flat])
    for step in range(longest):
        token, position, target, alive = rows[:, step].unbind(-1)
        yield token, position, target, alive.bool()


@torch.inference_mode()
def run(
    decoder: Decoder,
    streams: list[list[list[int]]],
    rule: Rule | None,
    slots: int,
    maps: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Sum of losses [B] and number of targets [B] of every stream, and misses a token."""
    shape, batch = decoder.shape, len(streams)
    k, heads, kv_heads = shape.num_experts_per_tok, shape.num_attention_heads, shape.num_key_value_heads
    layers, everyone = len(decoder.layers), torch.arange(batch)
    keys = torch.zeros(layers, batch, kv_heads, WINDOW, shape.head_dim)
    values = torch.zeros_like(keys)
    cos_all, sin_all = decoder.rope.cos_sin(torch.arange(WINDOW), WINDOW)
    cache = Cache(batch, layers, shape.num_experts, slots)
    loss, count, misses, tokens = torch.zeros(batch), torch.zeros(batch), 0, 0
    for token, position, target, alive in _steps(streams):
        x = decoder.embed_tokens(token)
        cos, sin = (t[position][:, None, None] for t in (cos_all, sin_all))
        seen = (torch.arange(WINDOW) <= position[:, None])[:, None, None]
        for index, block in enumerate(decoder.layers):
            attention, moe = block.self_attn, block.mlp
            h = block.input_layernorm(x)
            q = rotate(attention.q_proj(h).view(batch, heads, 1, -1), cos, sin)
            keys[index, everyone, :, position] = rotate(attention.k_proj(h).view(batch, kv_heads, 1, -1), cos, sin)[
                :, :, 0
            ]
            values[index, everyone, :, position] = attention.v_proj(h).view(batch, kv_heads, -1)
            most = int(position.max()) + 1
            mixed = F.scaled_dot_product_attention(
                q, keys[index, :, :, :most], values[index, :, :, :most], attn_mask=seen[..., :most], enable_gqa=True
            )
            x = x + attention.o_proj(mixed.reshape(batch, -1))
            h = block.post_attention_layernorm(x)
            logits = F.linear(h, moe.gate)
            if rule is None:
                top, chosen = logits.topk(k, dim=-1)
                weights = top.softmax(-1)
            else:
                weights, chosen = rule(
                    logits, cache.held[:, index], k, 1.3 if 1 / 4 < (index + 0.5) / layers < 3 / 4 else 0.7
                )
            worth = F.linear(h, *maps[index, index]) if maps else None
            misses += int(cache.demand(index, chosen, worth, alive).sum())
            inner = moe.act(torch.einsum("bd,ehd->beh", h, moe.w1)) * torch.einsum("bd,ehd->beh", h, moe.w3)
            gates = torch.zeros(batch, shape.num_experts).scatter_add_(1, chosen.clamp_min(0), weights)
            x = x + torch.einsum("beh,edh->bd", inner * gates[..., None], moe.w2)
        tokens += int(alive.sum())
        wanted = target >= 0
        logits = F.linear(decoder.norm(x[wanted]), decoder.embed_tokens.weight)
        loss[wanted] += F.cross_entropy(logits, target[wanted], reduction="none")
        count += wanted
    return loss, count, misses / tokens


def rules(k: int) -> dict[str, Rule]:
    """By name, `keep` behind the slash."""
    found: dict[str, Rule] = {}
    for keep in range(min(2, k)):
        found |= {f"bias {s}/{keep}": Bias(s, keep) for s in (0.05, 0.1, 0.15, 0.2, 0.3)}
        found |= {f"rank {m}/{keep}": Rank(m, keep) for m in (3, 4, 6)}
        found |= {f"mass {p}/{keep}": Mass(p, keep) for p in (0.5, 0.6, 0.7, 0.8, 0.9)}
        found |= {f"ratio {r}/{keep}": Swap(ratio=r, keep=keep) for r in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)}
        gaps = (0.02, 0.05, 0.1, 0.14, 0.17, 0.2, 0.23)
        found |= {f"gap {g}/{keep}": Swap(gap=g, keep=keep) for g in gaps}
        found |= {f"layers {g}/{keep}": Swap(gap=g, keep=keep, by_layer=True) for g in gaps}
        found |= {f"squares {g}/{keep}": Swap(gap=g, keep=keep, squares=True) for g in (0.07, 0.1, 0.13)}
    return found | {f"drop {d}/1": Drop(d, 1) for d in (0.1, 0.2, 0.3, 0.4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT")
    parser.add_argument("--model", default="zoo:stories-moe")
    parser.add_argument("--maps", type=Path, help="a calibrated bundle of the model: foresight in place of LRU")
    parser.add_argument("--slots", nargs="+", type=int, default=[8, 4], help="experts of a layer that stay")
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--only", nargs="*", help="rules whose names begin so")
    given = parser.parse_args()
    decoder = load_decoder(zoo.path_of(given.model)).eval()
    streams = streams_of(given.model, given.texts, given.streams, given.tokens)
    maps = read_ahead(given.maps) if given.maps else {}
    rows = []
    for slots in given.slots:
        plain, count, all_misses = run(decoder, streams, None, slots, maps)
        perplexity, asked = (
            float((plain.sum() / count.sum()).exp()),
            len(decoder.layers) * decoder.shape.num_experts_per_tok,
        )
        print(f"{slots} experts a layer stay: perplexity {perplexity:.3f}, {all_misses:.2f} misses a token of {asked}")
        for name, rule in rules(decoder.shape.num_experts_per_tok).items():
            if given.only and not any(name.startswith(only) for only in given.only):
                continue
            loss, _, misses = run(decoder, streams, rule, slots, maps)
            each = (loss - plain) / count
            change, error = float(((loss - plain).sum() / count.sum()).exp() - 1), float(each.std() / len(each) ** 0.5)
            spared = 1 - misses / all_misses
            print(f"  {name:12} {change:+7.2%} +-{error:.2%}  {misses:5.2f} a token, {spared:4.0%} fewer", flush=True)
            rows.append({"slots": slots, "rule": name, "change": change, "error": error, "misses_a_token": misses,
                         "spared": spared})  # fmt: skip
    emit("cache routing", rows, model=given.model, tokens=given.tokens)


if __name__ == "__main__":
    main()
