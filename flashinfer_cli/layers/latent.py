"""Multi-head latent attention (DeepSeek-V2, 2405.04434) on the short vectors themselves, which are all the cache keeps.

Keys and values of a head are linear in the latent vector c of a token: k = [K c, rotated part], v = V c. So q.k is
(K^T q).c, and a sum of values is V times that sum of latents: the matrices go to the query and to the result, and what
is left is attention with one key-value head, whose key is the latent and the rotated part, and whose value the latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..cache.kv import KVCache
from ..config import MlaConfig
from .attention import LONG, attend
from .linear import Linear, Runtime
from .norm import Norm
from .rope import Rope


@dataclass(frozen=True)
class LatentAttention:
    """One layer's latent attention. `queries` is (q,), or (q_a, q_b) with a norm between; `expand` is (kv_b,), of every
    head its rows for the key and those for the value, or as GGUF has it (k_b, v_b), of which k_b has columns as rows.
    """

    layer: int
    heads: int
    shape: MlaConfig
    scale: float
    queries: tuple[Linear, ...]
    q_norm: Norm | None
    latent: Linear
    kv_norm: Norm
    expand: tuple[Linear, ...]
    out: Linear
    rope: Rope

    @property
    def is_here(self) -> bool:
        """Are all of its weights in memory."""
        return all(matrix.is_here for matrix in (*self.queries, self.latent, *self.expand, self.out))

    def __call__(
        self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, d] at kv.length.. -> [T, d]. Arguments as those of `Attention`."""
        assert positions is None and not self.rope.varies
        tokens, rank = x.shape[0], self.shape.kv_lora_rank
        q = self.queries[0](x, rt)
        if self.q_norm is not None:
            with rt.recorder.computing():
                q = self.q_norm(q)
            q = self.queries[1](q, rt)
        compressed = self.latent(x, rt)
        to_key, to_value = self._matrices(rt)
        with rt.recorder.computing():
            nope = self.shape.qk_nope_head_dim
            q = q.view(tokens, self.heads, -1)
            here = torch.arange(kv.length, kv.length + tokens, device=x.device)
            cos, sin = self.rope.cos_sin(here, rope_length)
            turned = self.rope.apply(q[..., nope:], cos, sin)
            key = self.rope.apply(compressed[:, None, rank:], cos, sin)
            key = torch.cat((self.kv_norm(compressed[:, :rank].contiguous())[:, None], key), -1).transpose(0, 1)
            keys, _ = kv.append(self.layer, key, key[..., :0])
            asked = rt.apart(lambda row: torch.matmul(row.transpose(0, 1), to_key).transpose(0, 1), q[..., :nope])
            q = torch.cat((asked, turned), -1)
            if rt.mode.decoding and tokens > 1:  # the bits of a token must not depend on how many are checked with it
                held = keys.shape[1] - tokens
                rows = (self._attend(q[t : t + 1].clone(), keys[:, : held + t + 1], rt) for t in range(tokens))
                mixed = torch.cat(list(rows))
            else:
                mixed = self._attend(q, keys, rt)
            mixed = mixed.view(tokens, self.heads, rank)
            mixed = rt.apart(lambda row: torch.matmul(row.transpose(0, 1), to_value.mT).transpose(0, 1), mixed)
            mixed = mixed.reshape(tokens, -1)
        return self.out(mixed, rt)

    def _matrices(self, rt: Runtime) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes keys and values of latents: float32 [heads, nope, rank] and [heads, v, rank]."""
        nope, rank = self.shape.qk_nope_head_dim, self.shape.kv_lora_rank
        first, *second = (matrix.whole(rt) for matrix in self.expand)
        if second:
            return first.view(self.heads, rank, nope).mT, second[0].view(self.heads, -1, rank)
        whole = first.view(self.heads, -1, rank)
        return whole[:, :nope], whole[:, nope:]

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """q [T, heads, rank + rope] are the last T of the keys' positions -> [T, heads * rank]."""
        long = rt.mode.decoding and self.heads * keys.numel() > LONG
        if long:
            rt.share_cores(little=False)
        mixed = attend(q.transpose(0, 1), keys, keys[..., : self.shape.kv_lora_rank], scale=self.scale)
        if long:
            rt.share_cores(little=True)
        return mixed
