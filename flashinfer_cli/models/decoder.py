"""The decoder: every family is this one forward pass with other norms, rotations and FFNs plugged in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..cache.kv import KVCache
from ..cache.slices import Slice
from ..config import ModelConfig
from ..layers.attention import Attention
from ..layers.embedding import Embedding
from ..layers.ffn import DenseFfn, RecordFfn
from ..layers.latent import LatentAttention
from ..layers.linear import Linear, Runtime
from ..layers.mod import TokenRouter
from ..layers.moe import FirstGuess, MoeFfn
from ..layers.norm import Norm
from ..layers.one_token import OneToken
from ..layers.recurrent import Lstm
from ..layers.sparse_ffn import SparseFfn


@dataclass(frozen=True)
class Block:
    """One layer. Norms that a family does not have are None, and so is the FFN of an LSTM that no other follows."""

    attention: Attention | LatentAttention | Lstm
    ffn: DenseFfn | RecordFfn | SparseFfn | MoeFfn | None
    attn_norm: Norm
    ffn_norm: Norm | None
    attn_post_norm: Norm | None
    ffn_post_norm: Norm | None
    parallel: bool
    norm_first: bool
    depth: TokenRouter | None = None  # who may skip the block; None: nobody
    slices: tuple[Slice, ...] = ()  # of a block that may be skipped, in the order of use
    one: OneToken | None = None  # the same for one token with fewer calls, where it can be written down so

    def __call__(self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime) -> torch.Tensor:
        """x float32 [T, d] -> [T, d]."""
        if rt.mode.here and not self.attention.is_here:
            return x  # without attention a layer's FFN sees what it never saw
        if self.one is not None and rt.mode.decoding and len(x) == 1 and not rt.mode.here:
            return self._one(x, kv, rope_length, rt, self.one)
        if self.depth is not None:
            return self._some(x, kv, rope_length, rt, self.depth)
        if self.ffn is None:
            return x + self.attention(self.attn_norm(x), kv, rope_length, rt)
        if not self.norm_first:  # opt-350m: the norm comes after the residual
            assert self.ffn_norm is not None
            x = self.attn_norm(x + self.attention(x, kv, rope_length, rt))
            return self.ffn_norm(x + self.ffn(x, rt))
        h = self.attn_norm(x)
        alone = rt.mode.decoding and len(x) == 1 and not rt.mode.here
        if alone and isinstance(self.ffn, SparseFfn) and self.ffn.guesses:
            self.ffn.expect(h if self.ffn_norm is None else self.ffn_norm(x), rt)
        a = self.attention(h, kv, rope_length, rt)
        if self.parallel:
            f = self.ffn(h if self.ffn_norm is None else self.ffn_norm(x), rt)
            return x + a + f
        x = x + (a if self.attn_post_norm is None else self.attn_post_norm(a))
        assert self.ffn_norm is not None
        f = self.ffn(self.ffn_norm(x), rt)
        return x + (f if self.ffn_post_norm is None else self.ffn_post_norm(f))

    def _one(self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime, one: OneToken) -> torch.Tensor:
        """x [1, d] -> the same, in a place that is used again."""
        assert self.ffn is not None
        x, h = one(x, kv, rope_length, rt)
        if h is None:
            return x
        if isinstance(self.ffn, SparseFfn) and self.ffn.demand is one.predictor:
            f = self.ffn.of_named(h, one.named, rt)
        else:
            f = self.ffn(h, rt)
        return x.add_(f if self.ffn_post_norm is None else self.ffn_post_norm(f))

    def _some(self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime, depth: TokenRouter) -> torch.Tensor:
        """x' = r f(x) + x for the tokens that the router keeps (2404.02258), x itself for the others.

        Where it keeps none nothing is computed, no key is written and no byte is asked for.
        """
        with rt.recorder.computing():
            weights, kept = depth(x, rt)
        if not rt.mode.here:
            rt.recorder.skips(len(x), len(x) - len(kept))
        if not len(kept):
            return x
        if not rt.mode.here:
            rt.feed.demand(self.slices)
        taken = x[kept]
        update = self.attention(self.attn_norm(taken), kv, rope_length, rt, kv.length + kept)
        assert self.ffn_norm is not None and self.ffn is not None
        update = update + self.ffn(self.ffn_norm(taken + update), rt)
        return x.index_add(0, kept, update * weights[kept, None])


class Decoder:
    """Token ids to logits. Holds no sequence: keys and values come with each call."""

    def __init__(
        self,
        config: ModelConfig,
        rt: Runtime,
        *,
        embedding: Embedding,
        positions: torch.Tensor | None,
        project_in: Linear | None,
        blocks: Sequence[Block],
        project_out: Linear | None,
        final_norm: Norm | None,
        head: Linear,
        body: Sequence[Slice],
        by_block: Sequence[Sequence[Slice]],
        first_guess: FirstGuess | None = None,
    ) -> None:
        self.config = config
        self.rt = rt
        self.embedding = embedding
        self.positions = positions
        self.project_in = project_in
        self.blocks = tuple(blocks)
        # A prompt's tokens part among experts, so that it asks for blocks of memory of ever other sizes.
        self.has_experts = any(isinstance(block.ffn, MoeFfn) for block in self.blocks)
        self.project_out = project_out
        self.final_norm = final_norm
        self.head = head
        self.first_guess = first_guess
        self.by_block = tuple(tuple(slices) for slices in by_block)
        self._body = tuple(body)
        self._passes = self._streamed()

    def _streamed(self) -> dict[bool, tuple[Slice, ...]]:
        """What a pass streams, in the order of use: without the head, and with it."""
        body = tuple(s for s in self._body if s.home is None)
        return {False: body, True: (*body, *(s for s in self.head.slices if s.home is None))}

    @property
    def streamed(self) -> tuple[Slice, ...]:
        """What every pass with a head streams."""
        return self._passes[True]

    def keep(self, slices: Sequence[Slice]) -> None:
        """Between two passes: let slices that streamed stay from now on."""
        self.rt.feed.end()
        self.rt.feed.pin(slices)
        self._passes = self._streamed()

    def let_go(self, slices: Sequence[Slice]) -> None:
        """Between two passes: let slices that stayed stream from now on. There must be a ring."""
        self.rt.feed.end()
        self.rt.feed.unpin(slices)
        self._passes = self._streamed()

    def slices_of(self, index: int) -> tuple[Slice, ...]:
        """All that block `index` may stream, in the order of use."""
        return self.by_block[index]

    def begin(self, with_head: bool, following: Sequence[bool] = ()) -> None:
        """Announce a pass, with or without the head, and those known to follow it, so that they can be read ahead."""
        self.rt.feed.begin(self._passes[with_head], [self._passes[f] for f in following])

    def forward(
        self,
        ids: torch.Tensor,
        kv: KVCache,
        *,
        logits: Literal["none", "last", "all"] = "last",
        rope_length: int | None = None,
    ) -> torch.Tensor | None:
        """Run token ids [T] that follow what `kv` holds; returns float32 [1 or T, vocab_size], or None.

        `begin` announces the pass first. `rope_length` is the length of the whole sequence where it is known to go on,
        which matters to rotations that depend on it (dynamic, longrope).
        """
        rt, config = self.rt, self.config
        tokens = len(ids)
        kv.check_room(tokens)
        end = kv.length + tokens
        rt.recorder.layer = -1
        fly = not self.streamed and any(block.one is not None and block.one.flies for block in self.blocks)
        rt.share_cores(little=rt.mode.decoding, alone=fly)
        x = self.embedding(ids, rt)
        if config.embedding_scale != 1.0:
            x = x * config.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x, rt)
        if self.positions is not None:
            first = kv.length + config.position_offset
            here = rt.mode.places(first, tokens, x.device) if rt.mode.beside else slice(first, first + tokens)
            x = x + self.positions[here]
        if self.first_guess is not None and not rt.mode.here:
            self.first_guess(x, rt)
        for index, block in enumerate(self.blocks):
            rt.recorder.layer = index
            x = block(x, kv, max(end, rope_length or 0), rt)
        kv.advance(tokens)
        rt.recorder.layer = len(self.blocks)
        if self.project_out is not None:
            x = self.project_out(x if self.final_norm is None else self.final_norm(x), rt)
        elif self.final_norm is not None and logits != "none":
            x = self.final_norm(x[-1:] if logits == "last" else x)
        if logits == "none":
            return None
        out = self.head(x[-1:] if logits == "last" else x, rt)
        if config.logit_scale != 1.0:
            out *= config.logit_scale
        if config.final_logit_softcap:
            cap = config.final_logit_softcap
            out = out.div_(cap).tanh_().mul_(cap)
        return out


def default_scale(config: ModelConfig) -> float:
    """What q.k is multiplied by."""
    return config.attention_scale if config.attention_scale is not None else 1 / math.sqrt(config.head_dim)
