"""Multi-head, grouped-query (2305.13245) and multi-query (1911.02150) attention over the cache of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..cache.kv import KVCache
from ..kernels.kept import elements, to_floats
from .linear import Linear, Runtime
from .norm import Norm
from .rope import Rope

SCORE_BYTES = 8 << 20  # most scratch for one block of scores
FLOAT_BYTES = 8 << 20  # of keys and values that are made float32 at a time where they are kept as something else
LONG = 1 << 19  # keys' and values' elements that are worth all of torch's threads while decoding


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last T of S positions: q [heads, T, hd], k [kv_heads, S, hd], v [kv_heads, S, vd], these
    two as a cache keeps them -> [T, heads * vd].

    `window`: position i sees j where i - window < j <= i. `softcap`: scores become cap * tanh(score / cap). `sinks`
    [heads]: one more score, of nothing, in every softmax. Queries are taken in blocks, so scratch stays within
    SCORE_BYTES for any length.
    """
    heads, tokens, hd = q.shape
    if not k.dtype == v.dtype == torch.float32:
        return _attend_kept(q, k, v, scale=scale, window=window, softcap=softcap, sinks=sinks)
    kv_heads, length, vd = v.shape
    group = heads // kv_heads
    out = q.new_empty(tokens, heads, vd)
    block = max(1, SCORE_BYTES // (4 * heads * length))
    for first in range(0, tokens, block):
        last = min(first + block, tokens)
        start = length - tokens + first  # position of the block's first query
        stop = length - tokens + last  # keys past the block's last query are never seen
        low = max(0, start - window + 1) if window else 0
        keys, values = k[:, low:stop], v[:, low:stop]
        queries = q[:, first:last].reshape(kv_heads, group * (last - first), hd)
        scores = torch.matmul(queries, keys.transpose(1, 2)).mul_(scale)
        if softcap:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if last - first > 1 or (window and stop - low > window):
            i = torch.arange(start, stop, device=q.device)[:, None]
            j = torch.arange(low, stop, device=q.device)[None, :]
            hidden = j > i
            if window:
                hidden |= j <= i - window
            scores.view(kv_heads, group, last - first, stop - low).masked_fill_(hidden, float("-inf"))
        mixed = torch.matmul(scores.softmax(-1) if sinks is None else _softmax_beside(scores, sinks), values)
        out[first:last] = mixed.view(heads, last - first, vd).transpose(0, 1)
    return out.view(tokens, heads * vd)


def _attend_kept(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, window: int | None, sinks: torch.Tensor | None, **rest: Any
) -> torch.Tensor:
    """`attend` on float32 copies of what is seen, of some heads at a time: one, or as many as FLOAT_BYTES take."""
    kv_heads, length, _ = k.shape
    group = len(q) // kv_heads
    low = max(0, length - q.shape[1] - window + 1) if window else 0
    step = max(1, FLOAT_BYTES // (4 * (length - low) * (elements(k) + elements(v))))
    found = []
    for first in range(0, kv_heads, step):
        keys, values = (to_floats(kept[first : first + step, low:]) for kept in (k, v))
        own = slice(group * first, group * (first + step))
        sunk = None if sinks is None else sinks[own]
        found.append(attend(q[own], keys, values, window=window, sinks=sunk, **rest))
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _softmax_beside(scores: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Scores [kv_heads, rows, S] -> their softmax, a head's sink counted beside them and left out."""
    beside = sinks.view(scores.shape[0], -1, 1).repeat_interleave(scores.shape[1] * scores.shape[0] // len(sinks), 1)
    most = torch.maximum(scores.amax(-1, keepdim=True), beside)
    scores = scores.sub_(most).exp_()
    return scores.div_(scores.sum(-1, keepdim=True).add_((beside - most).exp_()))


def seen(
    keys: torch.Tensor, values: torch.Tensor, tokens: int, beside: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values that each of the last `tokens` positions of [kv_heads, S, hd] sees, itself the last.

    Views, as if it were alone behind what it sees. One of the last `beside` stands in its place only for so long.
    """
    held, line = keys.shape[1] - tokens, tokens - beside
    for t in range(line):
        yield keys[:, : held + t + 1], values[:, : held + t + 1]
    for place in range(held + 1, held + 1 + beside):
        other = place - 1 + line
        first = [kept[:, place].clone() for kept in (keys, values)]
        for kept in (keys, values):
            kept[:, place] = kept[:, other]
        yield keys[:, : place + 1], values[:, : place + 1]
        for kept, was in zip((keys, values), first, strict=True):
            kept[:, place] = was


@dataclass(frozen=True)
class Attention:
    """One layer's attention. The projections are `q`, `k`, `v` apart, or one fused `qkv`, laid out as `grouped` says:
    q | k | v, or for every key-value head its queries, its key, its value."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    projections: tuple[Linear, ...]  # (q, k, v) or (qkv,)
    out: Linear
    grouped: bool
    rope: Rope | None
    window: int | None
    softcap: float | None
    clip: float | None
    q_norm: Norm | None
    k_norm: Norm | None
    norm_all_heads: bool  # over [heads * hd] at once, as OLMoE, rather than over each head
    sinks: torch.Tensor | None = None  # float32 [heads]

    @property
    def is_here(self) -> bool:
        """Are all of its weights in memory."""
        return self.out.is_here and all(projection.is_here for projection in self.projections)

    @property
    def is_plain(self) -> bool:
        """Are scores nothing but products."""
        return self.softcap is None and self.sinks is None

    def __call__(
        self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, d] at `positions`, or at kv.length.. where none are given -> [T, d].

        `rope_length` is the length that stretches the rotation. Given positions are those of a layer that the tokens
        between them skipped.
        """
        tokens = x.shape[0]
        q, k, v = self._project(x, rt)
        with rt.recorder.computing():
            if self.norm_all_heads:
                q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
            if self.clip is not None:  # behind the norm, as OLMoE has it
                q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
            q, k, v = (t.view(tokens, -1, self.head_dim) for t in (q, k, v))
            if not self.norm_all_heads:
                q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
            start, rope = kv.length, self.rope
            if rope is not None and not rope.varies:
                if positions is None and not rt.mode.beside:
                    cos, sin = rope.run(start, tokens, rope_length)
                elif positions is None:
                    cos, sin = rope.cos_sin(rt.mode.places(start, tokens, x.device), rope_length)
                else:
                    cos, sin = rope.cos_sin(positions, rope_length)
                q, k = rope.apply(q, cos, sin), rope.apply(k, cos, sin)
            assert positions is None or rope is None or not rope.varies
            skipped = None if positions is None else positions.tolist()
            keys, values = kv.append(self.layer, k.transpose(0, 1), v.transpose(0, 1), skipped)
            if rt.mode.decoding and tokens > 1:  # the bits of a token must not depend on how many are checked with it
                behind = start - keys.shape[1] + tokens  # positions that skipped this layer
                rows = (
                    self._attend(q[t : t + 1].clone(), k, v, behind + k.shape[1], rt)
                    for t, (k, v) in enumerate(seen(keys, values, tokens, rt.mode.beside))
                )
                mixed = torch.cat(list(rows))
            else:
                mixed = self._attend(q, keys, values, rope_length, rt)
        return self.out(mixed, rt)

    def _attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rope_length: int, rt: Runtime
    ) -> torch.Tensor:
        """q [T, heads, hd] are the last T of the keys' positions -> [T, heads * hd].

        Where the rotation changes with the length, keys are kept unrotated, and all is turned here.
        """
        if self.rope is not None and self.rope.varies:
            here = torch.arange(keys.shape[1], device=q.device)
            cos, sin = self.rope.cos_sin(here, rope_length)
            q = self.rope.apply(q, cos[-len(q) :], sin[-len(q) :])
            keys = self.rope.apply(to_floats(keys).transpose(0, 1), cos, sin).transpose(0, 1)
        elif rt.mode.decoding and self.is_plain and keys.device.type == "cpu":
            mixed = torch.empty_like(q[0])
            rt.kernels.attend(q[0], keys, values, self.scale, self.window, mixed)
            return mixed.view(1, -1)
        long = rt.mode.decoding and 2 * keys.numel() > LONG
        if long:
            rt.share_cores(little=False)
        q = q.transpose(0, 1)
        mixed = attend(q, keys, values, scale=self.scale, window=self.window, softcap=self.softcap, sinks=self.sinks)
        if long:
            rt.share_cores(little=True)
        return mixed

    def _project(self, x: torch.Tensor, rt: Runtime) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outs = [projection(x, rt) for projection in self.projections]
        if len(outs) == 3:
            return outs[0], outs[1], outs[2]
        fused, tokens, hd = outs[0], x.shape[0], self.head_dim
        if self.grouped:
            per_kv = fused.view(tokens, self.kv_heads, -1, hd)
            q, k, v = per_kv[:, :, :-2], per_kv[:, :, -2], per_kv[:, :, -1]
            return q.reshape(tokens, -1), k.reshape(tokens, -1), v.reshape(tokens, -1)
        q, k, v = fused.split((self.heads * hd, self.kv_heads * hd, self.kv_heads * hd), dim=-1)
        return q.contiguous(), k.contiguous(), v.contiguous()

    @staticmethod
    def _normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return x if norm is None else norm(x)
