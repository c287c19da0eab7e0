"""The only wiring: a laid-out checkpoint and a plan become a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from ..checkpoint.base import Checkpoint
from ..config import MlaConfig, ModelConfig, RunConfig
from ..device import Device
from ..errors import CorruptCheckpointError
from ..layers.attention import Attention
from ..layers.bench import Bench
from ..layers.demand import Demand, LowRankPredictor
from ..layers.embedding import Embedding
from ..layers.ffn import DenseFfn, RecordFfn
from ..layers.latent import LatentAttention
from ..layers.linear import Linear, Runtime
from ..layers.mod import Predictor, TokenRouter
from ..layers.moe import MoeFfn
from ..layers.norm import Norm
from ..layers.one_token import OneToken, fits
from ..layers.recurrent import Lstm
from ..layers.rope import Rope
from ..layers.sparse_ffn import SparseFfn
from ..plan import MemoryPlan
from .ahead import Maps
from .build_experts import ExpertBuilder, has_experts
from .build_neurons import NeuronBuilder
from .decoder import Block, Decoder, default_scale
from .layout import LayerLayout, MatrixLayout, ModelLayout


class Builder:
    """Reads what always stays, pins what the plan pins, and puts the layers together."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, layout: ModelLayout, plan: MemoryPlan, rt: Runtime
    ) -> None:
        self.config = config
        self.layout = layout
        self.plan = plan
        self.rt = rt
        self.device: Device = rt.feed.device
        self.tensors = checkpoint.tensors
        self.experts: ExpertBuilder | None = None
        self.neurons: NeuronBuilder | None = None
        self._ropes: dict[object, Rope] = {}
        self._kv_b = torch.empty(0)
        self._bench = Bench()
        self._always = self._read_always()

    # ---- what always stays
    def _read_always(self) -> dict[tuple[int, str], torch.Tensor]:
        """Norms, biases, routers as float32 on the device, read in batches, checked for NaN."""
        found: dict[tuple[int, str], torch.Tensor] = {}
        items = list(self.layout.always.items())
        for first in range(0, len(items), 256):
            batch = items[first : first + 256]
            refs = [ref for _, ref in batch]
            raws = self.rt.feed.store.read_now([self.tensors[r.tensor].rows(r.row, r.rows) for r in refs], "always")
            for (key, ref), raw in zip(batch, raws, strict=True):
                fmt = self.tensors[ref.tensor].format
                stored = torch.from_numpy(np.array(raw)).view(ref.rows, -1)
                value = self.rt.kernels.dequantize(stored, fmt, ref.cols).clone()
                if not torch.isfinite(value).all():
                    raise CorruptCheckpointError(f"Tensor '{ref.tensor}' holds NaN or infinite values.")
                is_vector = key[1].endswith(".bias") or "norm" in key[1] or key[1] == "sinks"
                found[key] = self.device.put(value.flatten() if is_vector else value)
        return found

    def _get(self, layer: int, role: str) -> torch.Tensor | None:
        return self._always.get((layer, role))

    def _norm(self, layer: int, role: str, *, kind: str | None = None) -> Norm | None:
        weight, bias = self._get(layer, role), self._get(layer, f"{role}.bias")
        if weight is None:
            return None
        if self.config.norm_offset:
            weight = weight + self.config.norm_offset
        return Norm(kind or self.config.norm, weight, bias, self.config.norm_eps, self.rt.kernels)

    def _linear(self, layer: int, role: str, matrix: MatrixLayout) -> Linear:
        return Linear(matrix.parts, matrix.format, matrix.rows, matrix.cols, self._get(layer, f"{role}.bias"))

    # ---- layers
    def _rope(self, index: int, head_dim: int) -> Rope | None:
        rope_config = self.config.rope_of(index)
        if rope_config is None:
            return None
        if rope_config not in self._ropes:
            self._ropes[rope_config] = Rope(rope_config, head_dim, self.device.name)
        return self._ropes[rope_config]

    def _space(self, mla: MlaConfig) -> torch.Tensor:
        """Where kv_b of one layer after another is spread out; nothing where it comes as two matrices."""
        rows = max((m["kv_b"].rows for layer in self.layout.layers if "kv_b" in (m := layer.matrices)), default=0)
        if len(self._kv_b) != rows:
            self._kv_b = torch.empty(rows, mla.kv_lora_rank, device=self.device.name)
        return self._kv_b

    def _latent(self, index: int, layer: LayerLayout, mla: MlaConfig) -> LatentAttention:
        def matrix(role: str) -> Linear:
            return self._linear(index, role, layer.matrices[role])

        rope, kv_norm = self._rope(index, mla.qk_rope_head_dim), self._norm(index, "kv_a_norm", kind="rms")
        assert rope is not None and kv_norm is not None
        return LatentAttention(
            layer=index,
            heads=self.config.num_attention_heads,
            shape=mla,
            scale=default_scale(self.config),
            queries=tuple(matrix(role) for role in ("q", "q_a", "q_b") if role in layer.matrices),
            q_norm=self._norm(index, "q_a_norm", kind="rms"),
            latent=matrix("kv_a"),
            kv_norm=kv_norm,
            expand=tuple(matrix(role) for role in ("kv_b", "k_b", "v_b") if role in layer.matrices),
            space=self._space(mla),
            out=matrix("o"),
            rope=rope,
        )

    def _attention(self, index: int, layer: LayerLayout) -> Attention | LatentAttention | Lstm:
        config = self.config
        if config.recurrent:
            recurrent = self._get(index, "lstm_recurrent")
            assert recurrent is not None
            return Lstm(index, self._linear(index, "lstm_input", layer.matrices["lstm_input"]), recurrent)
        if config.mla is not None:
            return self._latent(index, layer, config.mla)
        roles = ("qkv",) if "qkv" in layer.matrices else ("q", "k", "v")
        kind = config.qk_norm_type
        return Attention(
            layer=index,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            scale=default_scale(config),
            projections=tuple(self._linear(index, role, layer.matrices[role]) for role in roles),
            out=self._linear(index, "o", layer.matrices["o"]),
            grouped=config.qkv_layout == "grouped",
            rope=self._rope(index, config.head_dim),
            window=config.sliding_window if config.is_sliding(index) else None,
            softcap=config.attn_logit_softcap,
            clip=config.clip_qkv,
            q_norm=self._norm(index, "q_norm", kind=kind),
            k_norm=self._norm(index, "k_norm", kind=kind),
            norm_all_heads=config.qk_norm == "full",
            sinks=self._get(index, "sinks"),
        )

    def _ffn(self, index: int, layer: LayerLayout) -> DenseFfn | RecordFfn | SparseFfn | MoeFfn | None:
        config = self.config
        if config.recurrent and not layer.expert_extents:
            return None
        if layer.expert_extents:
            assert self.experts is not None
            shared = self._dense(index, layer, "shared.") if "shared.up" in layer.matrices else None
            return self.experts.ffn(index, layer, shared)
        if layer.records is not None:
            dense = RecordFfn(
                parts=layer.record_parts,
                format=layer.records.parts[0].format,
                gated=config.gated,
                act=config.hidden_act,
                gate_bias=self._get(index, "gate.bias"),
                up_bias=self._get(index, "up.bias"),
                down_bias=self._get(index, "down.bias"),
            )
            if not layer.sparse:
                return dense
            assert self.neurons is not None
            return self.neurons.ffn(index, layer, dense)
        return self._dense(index, layer, "")

    def _dense(self, index: int, layer: LayerLayout, prefix: str) -> DenseFfn:
        def matrix(role: str) -> Linear | None:
            found = layer.matrices.get(prefix + role)
            return None if found is None else self._linear(index, prefix + role, found)

        up, down = matrix("up"), matrix("down")
        assert up is not None and down is not None
        return DenseFfn(matrix("gate"), up, down, self.config.hidden_act)

    def _depth(self, index: int) -> TokenRouter | None:
        mod = self.config.mod
        if mod is None or not mod.layers[index]:
            return None

        def get(role: str) -> torch.Tensor:
            found = self._get(index, role)
            assert found is not None
            return found

        predictor = Predictor(get("mod_hidden"), get("mod_hidden.bias"), get("mod_out"), get("mod_out.bias"))
        return TokenRouter(get("mod_router"), predictor if mod.decoding == "predictor" else None)

    def _block(self, index: int, layer: LayerLayout) -> Block:
        attn_norm = self._norm(index, "attn_norm")
        assert attn_norm is not None
        block = Block(
            attention=self._attention(index, layer),
            ffn=self._ffn(index, layer),
            attn_norm=attn_norm,
            ffn_norm=self._norm(index, "ffn_norm"),
            attn_post_norm=self._norm(index, "attn_post_norm"),
            ffn_post_norm=self._norm(index, "ffn_post_norm"),
            parallel=self.config.parallel_block,
            norm_first=self.config.norm_first,
            depth=self._depth(index),
            slices=tuple(layer.slices) if layer.on_demand else (),
        )
        return replace(block, one=self._one(block))

    def _one(self, block: Block) -> OneToken | None:
        """The block's attention for one token, where that can be written down."""
        attention = block.attention
        if block.parallel or not block.norm_first or block.depth is not None or block.ffn is None:
            return None
        if not fits(attention, self.rt):
            return None
        assert isinstance(attention, Attention) and block.ffn_norm is not None
        demand = block.ffn.demand if isinstance(block.ffn, SparseFfn) else None
        predictor = demand if isinstance(demand, LowRankPredictor) else None
        sparse = block.ffn if isinstance(block.ffn, SparseFfn) and predictor is not None else None
        return OneToken(
            attention, block.attn_norm, block.attn_post_norm, block.ffn_norm, predictor, self._bench, sparse,
            block.ffn_post_norm,
        )  # fmt: skip

    def build(
        self,
        run: RunConfig,
        predictors: Mapping[int, Demand] | None = None,
        wants: Mapping[int, float] | None = None,
        probes: Maps | None = None,
    ) -> Decoder:
        """Pin what stays, make the caches, and assemble. `wants` is the share of its neurons that a layer needs."""
        layout, plan, rt = self.layout, self.plan, self.rt
        body = layout.body
        ordered = [*body, *layout.head.slices]
        pinned = [s for s, stays in zip(ordered, plan.pinned, strict=True) if stays]
        if plan.table_stays and not layout.tied:
            pinned += layout.embed.slices
        rt.feed.pin(pinned)
        rt.feed.open_ring(plan.ring_bytes, plan.demand_bytes)
        if has_experts(layout):
            self.experts = ExpertBuilder(self.config, layout, plan, rt, run, self._get, probes or {})
        if predictors:
            self.neurons = NeuronBuilder(layout, plan, rt, run, predictors, wants or {})
        config = self.config
        projections = {role: self._linear(-1, role, matrix) for role, matrix in layout.model.items()}
        embed_info = self.tensors[layout.embed_tensor]
        return Decoder(
            config,
            rt,
            embedding=Embedding(embed_info, self._linear(-1, "embed", layout.embed)),
            positions=self._get(-1, "positions"),
            project_in=projections.get("project_in"),
            blocks=[self._block(i, layer) for i, layer in enumerate(layout.layers)],
            project_out=projections.get("project_out"),
            final_norm=self._norm(-1, "final_norm") if config.final_norm else None,
            head=self._linear(-1, "head", layout.head),
            by_block=[layer.slices for layer in layout.layers],
            body=[s for s, on_demand in zip(body, layout.on_demand, strict=True) if not on_demand],
            first_guess=None if self.experts is None else self.experts.first_guess(self._norm),
        )
