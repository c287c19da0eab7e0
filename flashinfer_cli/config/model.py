"""What a model is: one vocabulary for the configs of every family, and where its weights stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (2104.09864) and how it is stretched. Names as in `rope_parameters` of a
    config.json."""

    theta: float = 10_000.0
    rope_type: str = "default"  # default | linear | dynamic | llama3 | yarn | longrope
    rotary_dim: int = 0  # leading dimensions of a head that turn; the rest pass through
    interleaved: bool = False  # pairs (2j, 2j+1) as GGUF's `llama`, rather than (j, j + d/2)
    factor: float = 1.0
    max_position_embeddings: int = 0  # the model's own context, after stretching
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    freq_factors: tuple[float, ...] = ()  # divisors of the frequencies, one each: GGUF's `rope_freqs`


@dataclass(frozen=True)
class MoeConfig:
    """A sparsely-gated FFN: E experts, top-k of them a token."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = True  # weights of the chosen k sum to one
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False  # sigmoid gate on the shared expert's output (qwen2_moe)
    gate_groups: int = 0  # two levels of gating (1701.06538): experts stand in so many groups; 0: one level
    gate_groups_per_tok: int = 0  # of which a token uses so many
    num_noop_experts: int = 0  # choices of the router behind the experts that compute nothing (integrated MoDE)
    num_groups: int = 1  # the experts stand in so many groups (deepseek_v2),
    groups_per_tok: int = 1  # of which a token takes from the best so many
    routed_scaling: float = 1.0  # multiplies the weights of the chosen
    clamped_swiglu: tuple[float, float] | None = (
        None  # (alpha, limit) of gpt_oss' activation, where it takes act's place
    )
    interleaved: bool = False  # gate and up of an expert are one matrix, row by row in turn (gpt_oss)


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (2405.04434): keys and values of all heads come from one short vector a token, and
    that is what the cache keeps, beside the part of the key that RoPE turns. A head's query and key are
    qk_nope_head_dim + qk_rope_head_dim long."""

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None  # queries come from a short vector too


@dataclass(frozen=True)
class DepthConfig:
    """Mixture-of-Depths (2404.02258): blocks that a token may skip."""

    layers: tuple[bool, ...]  # by layer: may it be skipped
    capacity: float  # share of the tokens that compute such a block, as trained
    decoding: Literal["router", "predictor"]  # who decides causally
    predictor_size: int  # hidden units of the predictor


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint's config.json says, in one vocabulary for every family. Sizes are in elements."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    hidden_act: str  # relu | relu2 | silu | gelu | gelu_tanh | gelu_quick
    gated: bool = True  # act(gate) * up, or act(up) alone
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # y = x / rms * (weight + offset): 1 for gemma and nemotron
    parallel_block: bool = False  # x + attn(norm(x)) + ffn(norm(x)): phi, falcon
    shared_norm: bool = False  # in a parallel block: the FFN reads attn_norm's output and there is no ffn_norm
    post_norms: bool = False  # norms after attention and FFN too: gemma2, gemma3
    norm_first: bool = True  # False: norm after the residual (opt-350m)
    final_norm: bool = True
    tie_word_embeddings: bool = False
    rope: RopeConfig | None = field(default_factory=RopeConfig)  # None: learned positions (opt)
    rope_local: RopeConfig | None = None  # for sliding layers, where it differs (gemma3)
    position_offset: int = 0  # first row used of a learned position table (2 for opt)
    embed_size: int = 0  # width of the embedding where it is projected to hidden_size (opt-350m); 0: hidden_size
    qkv_layout: Literal["split", "grouped"] = "split"  # of a fused q/k/v output: q|k|v, or per kv head (q.., k, v)
    qk_norm: Literal["none", "head", "full"] = "none"  # norm of q and k over a head, or over all heads at once
    qk_norm_type: Literal["rms", "layer"] = "rms"
    clip_qkv: float | None = None
    attention_scale: float | None = None  # multiplies q.k; None: head_dim ** -0.5
    attn_logit_softcap: float | None = None
    final_logit_softcap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()  # by layer: does the window apply; empty: to none
    attention_sinks: bool = False  # a learned score a head that every token's softmax counts too (gpt_oss)
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    moe_layers: tuple[bool, ...] = ()  # by layer: experts or one dense FFN; empty: as `moe` says for all
    mod: DepthConfig | None = None
    recurrent: bool = False  # LSTMs in the place of attention; a layer has experts or no FFN at all (1701.06538)
    dtype: str = "F32"  # the dtype the config names, as a tensor format: F32, F16, BF16
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def is_sliding(self, layer: int) -> bool:
        return bool(self.sliding_window) and bool(self.sliding_layers) and self.sliding_layers[layer]

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and (not self.moe_layers or self.moe_layers[layer])

    def is_skippable(self, layer: int) -> bool:
        return self.mod is not None and self.mod.layers[layer]

    def rope_of(self, layer: int) -> RopeConfig | None:
        return self.rope_local if self.rope_local is not None and self.is_sliding(layer) else self.rope

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """What a layer keeps of a token: (heads, elements of a key, elements of a value). With latent attention one
        key, whose beginning is the value too."""
        if self.mla is not None:
            return 1, self.mla.kv_lora_rank + self.mla.qk_rope_head_dim, 0
        return self.num_key_value_heads, self.head_dim, self.head_dim


@dataclass(frozen=True)
class WeightRef:
    """Rows [row, row + rows) of a tensor seen as a matrix: all its leading dimensions flattened into rows.

    One expert of a fused [E, rows, cols] tensor, the `up` half of a fused gate_up, or a whole [rows, cols] tensor; a
    vector of n elements is one row. `turned`: it stands with its columns as rows (gpt_oss' experts in bf16).
    """

    tensor: str
    row: int
    rows: int
    cols: int
    turned: bool = False


@dataclass(frozen=True)
class WeightMap:
    """Where every weight of a model stands in its checkpoint: role -> WeightRef, globally and by layer.

    Global roles: embed, head (the same ref as embed when tied), head.bias, positions, project_in, project_out,
    final_norm, final_norm.bias.
    Layer roles: attn_norm, attn_post_norm, ffn_norm, ffn_post_norm (each also with .bias); q, k, v or qkv, and o
    (each also with .bias), or with latent attention q or q_a, q_a_norm, q_b, and kv_a, kv_a_norm, and kv_b or k_b
    (with columns as rows) and v_b, or with LSTMs lstm_input (.bias) and lstm_recurrent; q_norm, k_norm (also .bias);
    sinks; up, down (and gate where gated; each also with .bias); router (.bias), group_router; experts.<e>.gate|up|down
    or experts.<e>.gate_up|down (.bias, and .scales: rows of FP4 pairs apart from their scales); shared.gate|up|down
    (.bias); shared_gate; mod_router; mod_hidden, mod_out (.bias).
    """

    model: dict[str, WeightRef]
    layers: tuple[dict[str, WeightRef], ...]
