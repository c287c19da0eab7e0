"""The three kinds of settings, all frozen: what the model is, how to run it, how to sample. Every default stands
here, once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .errors import UsageError

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30

# ------------------------------------------------------------------ the model


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

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values one token adds over all layers, at 4 bytes an element."""
        heads, key, value = self.kv_shape
        return self.num_hidden_layers * heads * (key + value) * 4


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


# ------------------------------------------------------------------ the run


@dataclass(frozen=True)
class RunConfig:
    """How to run: what bounds memory, where to compute, what may stay."""

    memory: str | int | None = None  # bytes, "4GiB", "60%", "auto"; None is auto
    device: str = "auto"
    stream: Literal["auto", "always", "never"] = "auto"
    context: int | None = None  # tokens the KV cache holds; None: the lesser of the model's own and DEFAULT_CONTEXT
    threads: int | None = None  # compute threads; None: the cores this process may use
    io_threads: int | None = None  # reads under way at once; None: what serves the drive best, measured once
    remeasure: bool = False  # measure the drive again
    direct_io: Literal["auto", "never"] = "auto"
    prefill_chunk: int = 512  # most tokens of a prompt that go through the layers at once
    draft: str | None = None  # a small model with the same tokenizer, or "ngram"
    speculate: str = "auto"  # tokens to draft: a number, auto (by measured costs), off
    draft_tree: int = 0  # places at the front of a run for which the draft's second guess is checked too
    exact: bool = False  # compute every neuron, also where predictors would say which few
    window: int = 5  # tokens whose neurons stay, with the neuron policy "window"
    neuron_policy: Literal["recent", "window", "frequent"] = "recent"
    prefetch_neurons: bool = False  # read what the next layer's predictor says of this layer's input ahead of need
    # Which experts stay; auto: foresight where a bundle is calibrated for it, else lfu.
    expert_policy: Literal["auto", "foresight", "lfu", "stale", "lru", "lru-layer", "pinned", "none"] = "auto"
    prefetch_experts: str | int = "auto"  # guesses a layer read ahead of need: auto, off, or how many
    lookahead: int | None = None  # layers ahead to guess the experts of; None: 2 where many fit in, else 1
    cache_bias: float = 0.0  # how far routing prefers experts that are here; lossy above 0
    cache_gap: float = 0.0  # of a token's weights: what experts that are here may take as stand-ins; lossy above 0
    keep_top: int | None = None  # with either, the best that are chosen in any case; None: 1 of few experts, else 2
    # Below this share of its token's expert weights, an expert that is not here is served from its small copy; lossy
    # above 0, and for bundles made with small copies alone.
    degrade: float = 0.0
    logit_rows: int = 1  # rows of logits held at once: one to generate, more to evaluate
    # compiled: made now if need be; reference: the plain torch twins; auto: compiled, unless they are still to be made
    # and the model is too small to be worth it.
    kernels: Literal["auto", "compiled", "reference"] = "auto"
    revision: str | None = None  # of an org/name on the hub

    def __post_init__(self) -> None:
        if self.stream not in ("auto", "always", "never"):
            raise UsageError(f"--stream is '{self.stream}', which is none of auto, always, never.")
        if self.context is not None and self.context < 1:
            raise UsageError(f"--context is {self.context}; it must be at least 1.")
        if self.prefetch_experts not in ("auto", "off"):
            try:
                object.__setattr__(self, "prefetch_experts", int(self.prefetch_experts))
            except ValueError:
                raise UsageError(
                    f"--prefetch-experts is '{self.prefetch_experts}'; it must be auto, off or a number."
                ) from None
        if isinstance(self.prefetch_experts, int) and self.prefetch_experts < 0:
            raise UsageError(f"--prefetch-experts is {self.prefetch_experts}; it must be 0 or more.")
        if self.expert_policy not in ("auto", *EXPERT_POLICIES, "none"):
            known = ", ".join(("auto", *EXPERT_POLICIES, "none"))
            raise UsageError(f"--expert-policy is '{self.expert_policy}', which is not one of {known}.")
        if self.lookahead is not None and not 1 <= self.lookahead <= 2:
            raise UsageError(f"--lookahead is {self.lookahead}; it must be 1 or 2 layers.")
        if not self.cache_bias >= 0 or (self.keep_top is not None and self.keep_top < 0):
            raise UsageError("--cache-bias and --keep-top must be 0 or more.")
        if not 0 <= self.cache_gap <= 1 or (self.cache_gap and self.cache_bias):
            raise UsageError("--cache-gap is a share of a token's weights, from 0 to 1, and goes without --cache-bias.")
        if not 0 <= self.degrade <= 1:
            raise UsageError(f"--degrade is {self.degrade}; it must be a share of a token's weights, from 0 to 1.")
        if self.speculate not in ("auto", "off") and not (self.speculate.isdigit() and 1 <= int(self.speculate) <= 16):
            raise UsageError(f"--speculate is '{self.speculate}', which is none of auto, off, 1 to 16.")
        if self.speculate.isdigit() and self.draft is None:
            raise UsageError("--speculate needs a draft.", "Give --draft MODEL or --draft ngram.")
        if not 0 <= self.draft_tree <= 16:
            raise UsageError(f"--draft-tree is {self.draft_tree}; it must be 0 to 16 places.")
        if self.draft_tree and self.draft is None:
            raise UsageError("--draft-tree needs a draft.", "Give --draft MODEL.")
        if self.window < 1:
            raise UsageError(f"--window is {self.window}; it must be at least 1 token.")
        if (self.io_threads is not None and self.io_threads < 1) or self.prefill_chunk < 1:
            raise UsageError("The I/O threads and the prefill chunk must be at least 1.")


NEURON_POLICIES = ("recent", "window", "frequent")
PLAIN_POLICIES = ("lfu", "stale", "lru", "lru-layer", "pinned")  # those that no calibration need precede
EXPERT_POLICIES = (*PLAIN_POLICIES, "foresight")
DEFAULT_CONTEXT = 4096
DEFAULT_MAX_TOKENS = 256
SMALL_MODEL = 64 * MiB  # bytes of weights; what is below runs at once, on plain torch, where nothing is compiled yet
MEASURED_MODEL = 512 * MiB  # bytes of weights from which on the drive is worth measuring
NEURON_BLOCK = 256  # active neurons computed at once, while those of the next blocks are read
FEW_TOKENS = 32  # of a pass that leaves to neurons the memory that a prompt's pass would take
NEURON_STAGES = 4  # such blocks on their way at once
SLICE_BYTES = 8 * MiB  # of a streamed slice; fixed, so that how a model is cut never depends on the budget

# ------------------------------------------------------------------ sampling


@dataclass(frozen=True)
class SamplingParams:
    """What the user asked of sampling; None means the model's generation_config, else the default named in
    `resolved`."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int = 64
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None  # None: the model's own
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(flag: str, value: float | None, low: float, high: float, what: str) -> None:
            if value is not None and not low <= value <= high:
                raise UsageError(f"{flag} is {value}; it must be {what}.")

        check("--max-tokens", self.max_tokens, 1, float("inf"), "at least 1")
        check("--temperature", self.temperature, 0, float("inf"), "0 (greedy) or more")
        check("--top-k", self.top_k, 0, float("inf"), "0 (off) or more")
        check("--top-p", self.top_p, 1e-9, 1, "above 0 and at most 1")
        check("--min-p", self.min_p, 0, 1, "between 0 and 1")
        check("--repeat-penalty", self.repeat_penalty, 1e-9, float("inf"), "above 0 (1 is off)")

    def resolved(self, generation_config: dict[str, Any] | None = None) -> SamplingParams:
        """Fill every None: flags win over generation_config, generation_config over the defaults (greedy,
        DEFAULT_MAX_TOKENS)."""
        given = generation_config or {}
        sampled = bool(given.get("do_sample", False))

        def pick(mine: Any, key: str, default: Any, *, only_sampled: bool = True) -> Any:
            if mine is not None:
                return mine
            value = given.get(key) if sampled or not only_sampled else None
            return default if value is None else value

        eos = given.get("eos_token_id")
        stops = self.stop_token_ids
        if stops is None:
            stops = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)
        return replace(
            self,
            max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS,
            temperature=float(pick(self.temperature, "temperature", 1.0 if sampled else 0.0)),
            top_k=int(pick(self.top_k, "top_k", 0)),
            top_p=float(pick(self.top_p, "top_p", 1.0)),
            min_p=float(pick(self.min_p, "min_p", 0.0)),
            repeat_penalty=float(pick(self.repeat_penalty, "repetition_penalty", 1.0, only_sampled=False)),
            stop_token_ids=() if self.ignore_eos else stops,
        )


def parse_size(text: str) -> int:
    """Bytes of '4GiB', '1.5G', '800MB', '1048576'. G is GiB as in llama.cpp and docker; GB is 10^9."""
    units = {"": 1, "B": 1, "K": KiB, "KIB": KiB, "KB": 10**3, "M": MiB, "MIB": MiB, "MB": 10**6}
    units |= {"G": GiB, "GIB": GiB, "GB": 10**9, "T": GiB << 10, "TIB": GiB << 10, "TB": 10**12}
    stripped = text.strip().replace("_", "")
    number = stripped.rstrip("BKMGTIbkmgti ")
    unit = stripped[len(number) :].strip().upper()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise UsageError(f"'{text}' is not a size.", "Write 4GiB, 1500M, 60% or auto.") from None
    if not 0 < value < 1 << 60:
        raise UsageError(f"'{text}' is not a size above zero.", "Write 4GiB, 1500M, 60% or auto.")
    return int(value)


def format_size(size: float) -> str:
    """A size as people read it: 1.1 GiB, 320 MiB, 96 KiB."""
    for unit, scale in (("TiB", GiB << 10), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if abs(size) >= scale:
            value = size / scale
            return (
                f"{value:.0f} {unit}"
                if value >= 100
                else f"{value:.1f} {unit}"
                if value >= 10
                else f"{value:.2f} {unit}"
            )
    return f"{size:.0f} B"
