"""Which tensor, or which rows of one, is which weight: a checkpoint's tensors matched with `WeightMap`'s roles.

Every tensor must be accounted for: one that is missing, misshapen or left over is an error, so that nothing is misread
in silence. Nothing is read here but names, formats and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from ..checkpoint.base import TensorInfo
from ..config import MlaConfig, ModelConfig, MoeConfig, WeightMap, WeightRef
from ..errors import CorruptCheckpointError
from .families import FAMILIES
from .family import Family
from .names import GGUF_MODEL, GGUF_PARALLEL_LAYER, Names
from .tensor_table import Refs, TensorTable, missing

# What may stand before a family's own names: bare models, and language models inside of multimodal wrappers.
_PREFIXES = ("model.", "transformer.", "", "language_model.model.", "model.language_model.", "language_model.")
_HEADS = ("lm_head", "language_model.lm_head", "model.lm_head")


def _slice(whole: WeightRef, first: int, rows: int) -> WeightRef:
    return WeightRef(whole.tensor, first, rows, whole.cols)


class _Layer:
    """One layer's weights, found under `prefix`."""

    def __init__(
        self, table: TensorTable, config: ModelConfig, names: Names, prefix: str, has_ffn: bool = True
    ) -> None:
        self.table, self.config, self.names, self.prefix, self.has_ffn = table, config, names, prefix, has_ffn
        self.refs: Refs = {}

    def named(self, role: str, expert: int | None = None) -> tuple[str, ...]:
        return tuple(self.prefix + name.replace("{e}", str(expert)) for name in self.names.get(role, ()))

    def add(self, role: str, *shape: int) -> None:
        self.table.add(self.refs, role, self.named(role), shape)

    def norms(self) -> None:
        config = self.config
        roles = ["attn_norm"]
        roles += [] if config.shared_norm or not self.has_ffn else ["ffn_norm"]
        roles += ["attn_post_norm", "ffn_post_norm"] if config.post_norms else []
        for role in roles:
            self.add(role, config.hidden_size)

    def attention(self) -> None:
        config, hd = self.config, self.config.head_dim
        q, kv = config.num_attention_heads * hd, config.num_key_value_heads * hd
        if config.attention_sinks:
            self.refs["sinks"] = self.table.take(self.need("sinks", ".weight"), (config.num_attention_heads,))
        if config.mla is not None:
            self.latent_attention(config.mla)
            return
        if self.table.find(self.named("qkv")) is not None:
            self.add("qkv", q + 2 * kv, config.hidden_size)
        elif self.table.find(self.named("q")) is None and "qkv" in self.names and config.qkv_layout == "grouped":
            raise missing(self.named("qkv"))
        else:
            self.add("q", q, config.hidden_size)
            self.add("k", kv, config.hidden_size)
            self.add("v", kv, config.hidden_size)
        self.add("o", config.hidden_size, q)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.add("q_norm", q if full else hd)
            self.add("k_norm", kv if full else hd)

    def latent_attention(self, mla: MlaConfig) -> None:
        config, d = self.config, self.config.hidden_size
        heads, queries = config.num_attention_heads, config.num_attention_heads * config.head_dim
        if mla.q_lora_rank is None:
            self.add("q", queries, d)
        else:
            self.add("q_a", mla.q_lora_rank, d)
            self.add("q_a_norm", mla.q_lora_rank)
            self.add("q_b", queries, mla.q_lora_rank)
        self.add("kv_a", mla.kv_lora_rank + mla.qk_rope_head_dim, d)
        self.add("kv_a_norm", mla.kv_lora_rank)
        apart = [info for role in ("k_b", "v_b") if (info := self.table.find(self.named(role))) is not None]
        if apart and self.table.find(self.named("kv_b")) is None:
            self.add("k_b", heads, mla.kv_lora_rank, mla.qk_nope_head_dim)
            self.add("v_b", heads, mla.v_head_dim, mla.kv_lora_rank)
        else:
            self.add("kv_b", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
            self.table.used.update(info.name for info in apart)  # the same once more
        self.add("o", d, heads * mla.v_head_dim)

    def need(self, role: str, suffix: str) -> TensorInfo:
        info = self.table.find(self.named(role), suffix)
        if info is None:
            raise missing(self.named(role), suffix)
        return info

    def recurrence(self) -> None:
        d = self.config.hidden_size
        self.add("lstm_input", 4 * d, d)
        self.add("lstm_recurrent", 4 * d, d)

    def depth_router(self) -> None:
        assert self.config.mod is not None
        d, hidden = self.config.hidden_size, self.config.mod.predictor_size
        self.add("mod_router", 1, d)
        self.add("mod_hidden", hidden, d)
        self.add("mod_out", 1, hidden)

    def dense_ffn(self) -> None:
        d, ff = self.config.hidden_size, self.config.intermediate_size
        fused = self.table.find(self.named("gate_up")) if self.config.gated else None
        if fused is not None and self.table.find(self.named("gate")) is None:
            both = self.table.take(fused, (2 * ff, d))
            self.refs |= {"gate": _slice(both, 0, ff), "up": _slice(both, ff, ff)}
        else:
            if self.config.gated:
                self.add("gate", ff, d)
            self.add("up", ff, d)
        self.add("down", d, ff)

    def experts(self) -> None:
        moe = self.config.moe
        assert moe is not None
        d, ff, count = self.config.hidden_size, moe.moe_intermediate_size, moe.num_experts
        self.add("router", count + moe.num_noop_experts, d)
        if moe.interleaved:
            self.fused_experts(moe)
            return
        if moe.gate_groups:
            self.add("group_router", moe.gate_groups, d)
        shapes = {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}
        fused = self.table.find(self.named("all_experts.gate_up"))
        if fused is not None:
            self.table.take(fused, (count, 2 * ff, d))
            for e in range(count):
                self.refs[f"experts.{e}.gate"] = WeightRef(fused.name, 2 * e * ff, ff, d)
                self.refs[f"experts.{e}.up"] = WeightRef(fused.name, (2 * e + 1) * ff, ff, d)
        roles = ("gate", "up", "down") if self.config.gated else ("up", "down")
        for part in ("down",) if fused is not None else roles:
            rows, cols = shapes[part]
            whole = self.table.find(self.named(f"all_experts.{part}"))
            if whole is not None:
                self.table.take(whole, (count, rows, cols))
            for e in range(count):
                self.refs[f"experts.{e}.{part}"] = (
                    self.table.need(self.named(f"experts.{part}", e), (rows, cols))
                    if whole is None
                    else WeightRef(whole.name, e * rows, rows, cols)
                )
            bias = self.table.find(self.named(f"all_experts.{part}"), ".bias")
            if bias is not None:
                self.table.take(bias, (count, rows))
                self.refs |= {f"experts.{e}.{part}.bias": WeightRef(bias.name, e, 1, rows) for e in range(count)}
        shared = moe.shared_expert_intermediate_size
        if shared:
            self.add("shared.gate", shared, d)
            self.add("shared.up", shared, d)
            self.add("shared.down", d, shared)
        if moe.shared_expert_gate:
            self.add("shared_gate", 1, d)

    def fused_experts(self, moe: MoeConfig) -> None:
        """gpt_oss: one tensor of all experts' gate and up and one of their down, each with a bias; as MXFP4 (blocks of
        FP4 pairs, scales apart), or plain with columns as rows."""
        d, ff, count = self.config.hidden_size, moe.moe_intermediate_size, moe.num_experts
        for part, rows, cols in (("gate_up", 2 * ff, d), ("down", d, ff)):
            names, groups = self.named(f"all_experts.{part}"), cols // 32
            blocks = self.table.find(names, "_blocks")
            if blocks is None:
                whole = self.table.take(self.need(f"all_experts.{part}", ""), (count, cols, rows))
            elif cols % 32:
                raise CorruptCheckpointError(
                    f"Tensor '{blocks.name}' is MXFP4, and {cols} columns are no multiple of 32."
                )
            else:
                packed = self.table.take(blocks, (count, rows, groups, 16), fmt="U8")
                scales = self.table.take(self.need(f"all_experts.{part}", "_scales"), (count, rows, groups), fmt="U8")
            bias = self.table.take(self.need(f"all_experts.{part}", "_bias"), (count, rows))
            for e in range(count):
                role = f"experts.{e}.{part}"
                if blocks is None:
                    self.refs[role] = WeightRef(whole.tensor, e * cols, cols, rows, turned=True)
                else:
                    self.refs[role] = WeightRef(packed.tensor, e * rows * groups, rows * groups, 16)
                    self.refs[f"{role}.scales"] = WeightRef(scales.tensor, e * rows, rows, groups)
                self.refs[f"{role}.bias"] = WeightRef(bias.tensor, e, 1, rows)


def _globals(table: TensorTable, config: ModelConfig, names: Names, prefix: str, heads: tuple[str, ...]) -> Refs:
    """The weights outside of the layers.

    A head that is there is used, tied in the config or not: transformers too ties only what is equal. Where it is
    absent the embedding serves, and the other way round where the config ties them.
    """
    refs: Refs = {}
    named = {role: tuple(prefix + name for name in alternatives) for role, alternatives in names.items()}
    hidden = config.hidden_size
    width = config.embed_size or hidden
    embed, head = table.find(named["embed"]), table.find(heads)
    if embed is None and (head is None or not config.tie_word_embeddings):
        raise missing(named["embed"])
    source = embed or head
    assert source is not None
    refs["embed"] = table.take(source, (config.vocab_size, width))
    refs["head"] = refs["embed"] if head is None else table.take(head, (config.vocab_size, width))
    bias = table.find(heads, ".bias")
    if bias is not None:
        refs["head.bias"] = table.take(bias, (config.vocab_size,))
    if config.final_norm:
        table.add(refs, "final_norm", named["final_norm"], (hidden,))
    if config.position_offset or ("positions" in names and config.rope is None):
        table.add(
            refs, "positions", named["positions"], (config.max_position_embeddings + config.position_offset, hidden)
        )
    if config.embed_size:
        table.add(refs, "project_in", named["project_in"], (hidden, config.embed_size))
        table.add(refs, "project_out", named["project_out"], (config.embed_size, hidden))
    return refs


def _prefix(tensors: Mapping[str, TensorInfo], family: Family) -> str:
    first = family.layer_prefix.format(i=0)
    for prefix in sorted(_PREFIXES, key=lambda p: p != family.prefix):
        if any(name.startswith(prefix + first) for name in tensors):
            return prefix
    return family.prefix


def weight_map(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], kind: Literal["safetensors", "gguf"]
) -> WeightMap:
    """Role -> where it stands, for every weight that `config` asks for, in a checkpoint with these `tensors`.

    Raises CorruptCheckpointError for a tensor that is missing or whose shape is not the config's, UnsupportedModelError
    for tensors that the architecture has no use for; all of them are named.
    """
    table, family = TensorTable(tensors), FAMILIES[config.model_type]
    if kind == "gguf":
        prefix, block, heads = "", "blk.{i}.", GGUF_MODEL["head"]
        model_names = GGUF_MODEL
        two_norms = config.parallel_block and not config.shared_norm
        layer_names = GGUF_PARALLEL_LAYER if two_norms else family.gguf_layer_names
    else:
        prefix, heads = _prefix(tensors, family), _HEADS
        block, model_names, layer_names = family.layer_prefix, family.model_names, family.layer_names
    model = _globals(table, config, model_names, prefix, heads)
    layers: list[Refs] = []
    for i in range(config.num_hidden_layers):
        has_ffn = config.is_moe(i) or not config.recurrent
        layer = _Layer(table, config, layer_names, prefix + block.format(i=i), has_ffn)
        layer.norms()
        if config.recurrent:
            layer.recurrence()
        else:
            layer.attention()
        if config.is_skippable(i):
            layer.depth_router()
        if config.is_moe(i):
            layer.experts()
        elif has_ffn:
            layer.dense_ffn()
        layers.append(layer.refs)
    table.check_all_used()
    return WeightMap(model, tuple(layers))
