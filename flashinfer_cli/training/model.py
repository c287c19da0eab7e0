"""The small decoders we train: llama-shaped blocks, with experts or skipped tokens where the recipe says so, or LSTMs.

Plain torch modules. RoPE's angles are the runtime's own, and the parameters carry the names of a Hugging Face
checkpoint, so that what is saved is what the runtime reads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..config import RopeConfig
from ..kernels.activations import ACTIVATIONS
from ..layers.rope import Rope
from . import depth
from .common import Aux as Aux
from .common import RMSNorm
from .experts import MoeFfn as MoeFfn
from .recurrent import LstmBlock
from .shape import Shape


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [B, heads, T, hd] turned by cos and sin [B or 1, 1, T, hd / 2], in half-split pairs."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention (2305.13245) with RoPE (2104.09864)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
        width = shape.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """x [B, T, d]; `seen` bool [B, 1, T, T] where causal order alone does not say who sees whom."""
        batch, tokens, _ = x.shape
        q = rotate(self.q_proj(x).view(batch, tokens, self.heads, -1).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(batch, tokens, self.kv_heads, -1).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, -1).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=seen, is_causal=seen is None)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))


class Ffn(nn.Module):
    """down(act(gate x) * up x)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.act = ACTIVATIONS[shape.hidden_act]

    def forward(self, x: torch.Tensor, aux: Aux) -> torch.Tensor:
        h = self.act(self.gate_proj(x)) * self.up_proj(x)
        if self.act in (ACTIVATIONS["relu"], ACTIVATIONS["relu2"]):
            size = h.abs().mean(dtype=torch.float32)
            spread = h.detach().float().square().mean().sqrt() + 1e-6
            aux.magnitude.append(size / spread)
            aux.active.append(h.detach().count_nonzero() / h.numel())
        return self.down_proj(h)


class Block(nn.Module):
    """Attention and FFN before which x is normed; `update` is what the block adds to x."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp: Ffn | MoeFfn = MoeFfn(shape) if shape.num_experts else Ffn(shape)

    def update(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: torch.Tensor | None, aux: Aux
    ) -> torch.Tensor:
        h = self.self_attn(self.input_layernorm(x), cos, sin, seen)
        return h + self.mlp(self.post_attention_layernorm(x + h), aux)


class Predictor(nn.Module):
    """Who will be chosen, guessed from one token alone: a small MLP behind a stop-gradient."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.mod_predictor_size)
        self.fc2 = nn.Linear(shape.mod_predictor_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, d] -> logits [B, T]."""
        return self.fc2(F.relu(self.fc1(x.detach().float()))).squeeze(-1)


class DepthBlock(Block):
    """A block that computes some tokens and hands the others on (2404.02258)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.shape = shape
        self.mod_router = nn.Linear(shape.hidden_size, 1, bias=False)
        self.mod_predictor = Predictor(shape)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, causal: bool, aux: Aux) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weights = self.mod_router(x.float()).squeeze(-1)
            guesses = self.mod_predictor(x)
        if causal:
            return self._causal(x, weights, weights if self.shape.mod_decoding == "router" else guesses, cos, sin, aux)
        tokens = x.shape[1]
        where = depth.choose(weights, depth.capacity_of(self.shape.mod_capacity, tokens))
        mask = depth.chosen_mask(where, tokens)
        aux.router_loss.append(depth.causal_loss(weights, mask))
        aux.predictor_loss.append(depth.causal_loss(guesses, mask))
        aux.router_agreement.append(depth.agreement(weights, mask).detach())
        aux.predictor_agreement.append(depth.agreement(guesses, mask).detach())
        aux.computed.append(mask.mean())
        taken = depth.take(x, where)
        update = self.update(taken, cos[0, 0, where][:, None], sin[0, 0, where][:, None], None, aux)
        return depth.mix(x, update.to(x.dtype), weights.to(x.dtype), where)

    def _causal(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        decisions: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        aux: Aux,
    ) -> torch.Tensor:
        """Each token decided on its own. Computes all of them and masks, which is plain rather than fast."""
        tokens, computed = x.shape[1], decisions > 0
        order = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        seen = (order & computed[:, None, :]) | torch.eye(tokens, dtype=torch.bool, device=x.device)
        aux.computed.append(computed.float().mean())
        update = self.update(x, cos, sin, seen[:, None], aux)
        return x + update * (weights * computed)[..., None]


class Decoder(nn.Module):
    """Everything between token ids and the final norm; the head is the embedding, tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(
            LstmBlock(shape, i) if shape.recurrent else DepthBlock(shape) if shape.skips(i) else Block(shape)
            for i in range(shape.num_hidden_layers)
        )
        self.norm = RMSNorm(shape)
        self.rope = Rope(RopeConfig(theta=shape.rope_theta), shape.head_dim)
        self._init()

    def _init(self) -> None:
        """Normal weights; those that write to the residual smaller by the square root of how many there are."""
        deep = 1 / math.sqrt(2 * self.shape.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or name.endswith(("gate", "noise")):
                continue
            writes = name.endswith(("o_proj.weight", "down_proj.weight", "mlp.w2"))
            std = 0.02 if "embed_tokens" in name else 1 / math.sqrt(parameter.shape[-1])
            nn.init.normal_(parameter, std=0.5 * std * (deep if writes else 1) if "embed_tokens" not in name else std)

    def forward(
        self, ids: torch.Tensor, *, causal: bool = False, keep: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Aux]:
        """Token ids [B, T] -> (logits [B, T, vocab_size], Aux).

        `keep` bool [B, T]: logits [N, vocab_size] of those positions alone, in order. `causal`: MoD blocks decide token
        by token, as at decoding, rather than by rank within the sequence.
        """
        aux, tokens = Aux(), ids.shape[1]
        cos, sin = (t[None, None] for t in self.rope.cos_sin(torch.arange(tokens), tokens))
        x = self.embed_tokens(ids)
        for block in self.layers:
            if isinstance(block, DepthBlock):
                x = block(x, cos, sin, causal, aux)
            elif isinstance(block, LstmBlock):
                x = x + block.update(x, aux)
            else:
                assert isinstance(block, Block)
                x = x + block.update(x, cos, sin, None, aux)
        return F.linear(self.norm(x if keep is None else x[keep]), self.embed_tokens.weight), aux
