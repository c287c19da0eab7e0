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
from ..kernels.kept import to_floats
from .attention import LONG, attend, seen
from .linear import Linear, Runtime
from .norm import Norm
from .rope import Rope


@dataclass(frozen=True)
class LatentAttention:
    """One layer's latent attention. `queries` is (q,), or (q_a, q_b) with a norm between; `expand` is (kv_b,), of every
    head its rows for the key and those for the value, or as GGUF has it (k_b, v_b), of which k_b has columns as rows
    and so multiplies queries as it is stored. `space` float32 is where kv_b is spread out, one for all layers.
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
    space: torch.Tensor
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
        nope, q = self.shape.qk_nope_head_dim, q.view(tokens, self.heads, -1)
        asked, to_value = self._asked(q[..., :nope], rt)
        with rt.recorder.computing():
            here = rt.mode.places(kv.length, tokens, x.device)
            cos, sin = self.rope.cos_sin(here, rope_length)
            turned = self.rope.apply(q[..., nope:], cos, sin)
            key = self.rope.apply(compressed[:, None, rank:], cos, sin)
            key = torch.cat((self.kv_norm(compressed[:, :rank].contiguous())[:, None], key), -1).transpose(0, 1)
            keys, values = kv.append(self.layer, key, key[..., :0])
            q = torch.cat((asked, turned), -1)
            if rt.mode.decoding and tokens > 1:  # the bits of a token must not depend on how many are checked with it
                views = seen(keys, values, tokens, rt.mode.beside)
                mixed = torch.cat([self._attend(q[t : t + 1].clone(), k, rt) for t, (k, _) in enumerate(views)])
            else:
                mixed = self._attend(q, keys, rt)
            mixed = mixed.view(tokens, self.heads, rank)
            if to_value is not None:
                mixed = _times(mixed, to_value.mT, rt)
        if to_value is None:
            mixed = self.expand[1].by_head(mixed, rt)
        return self.out(mixed.reshape(tokens, -1), rt)

    def _asked(self, q: torch.Tensor, rt: Runtime) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q [T, heads, nope] -> what they ask of latents [T, heads, rank]; and where kv_b is one matrix, its part that
        makes values of latents, float32 [heads, v, rank]."""
        first, *second = self.expand
        if second:
            return first.by_head(q, rt), None
        nope, rank = self.shape.qk_nope_head_dim, self.shape.kv_lora_rank
        whole = first.whole(rt, self.space).view(self.heads, -1, rank)
        with rt.recorder.computing():
            return _times(q, whole[:, :nope], rt), whole[:, nope:]

    def _attend(self, q: torch.Tensor, keys: torch.Tensor, rt: Runtime) -> torch.Tensor:
        """q [T, heads, rank + rope] are the last T of the keys' positions -> [T, heads * rank]."""
        long = rt.mode.decoding and self.heads * keys.numel() > LONG
        if long:
            rt.share_cores(little=False)
        keys = to_floats(keys)  # once: values are a part of them
        mixed = attend(q.transpose(0, 1), keys, keys[..., : self.shape.kv_lora_rank], scale=self.scale)
        if long:
            rt.share_cores(little=True)
        return mixed


def _times(x: torch.Tensor, matrices: torch.Tensor, rt: Runtime) -> torch.Tensor:
    """x [T, heads, a] by [heads, a, b] -> [T, heads, b]; while decoding each token by itself."""
    return rt.apart(lambda row: torch.matmul(row.transpose(0, 1), matrices).transpose(0, 1), x)
