"""How to run a model, every default once, and the numbers that are no setting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..errors import UsageError
from .sizes import MiB

KvCacheType = Literal["auto", "f32", "f16", "q8_0"]  # llama.cpp's words
NEURON_POLICIES = ("foresight", "recent", "window", "frequent")
EXPERT_POLICIES = ("adaptive", "foresight", "lfu", "stale", "lru", "lru-layer", "pinned")
FORESEEING = frozenset(("adaptive", "foresight"))  # those that go by more than demands
DEFAULT_CONTEXT = 4096
SMALL_MODEL = 64 * MiB  # bytes of weights; what is below runs at once, on plain torch, where nothing is compiled yet
MEASURED_MODEL = 512 * MiB  # bytes of weights from which on the drive is worth measuring
NEURON_BLOCK = 256  # active neurons computed at once, while those of the next blocks are read
FEW_TOKENS = 32  # however many rows of logits a run asks for, see RunConfig.few_tokens
NEURON_GUESSES = 96  # neurons of a layer read before attention has said which: those of the highest scores
NEURON_STAGES = 2  # such blocks on their way at once
NEURON_WINDOW = 5  # tokens that the policy window spans, and by whose needs slots are dealt under any other
SLICE_BYTES = 8 * MiB  # of a streamed slice; fixed, so that how a model is cut never depends on the budget


@dataclass(frozen=True)
class RunConfig:
    """How to run: what bounds memory, where to compute, what may stay."""

    memory: str | int | None = None  # bytes, "4GiB", "60%", "auto"; None is auto
    device: str = "auto"
    stream: Literal["auto", "always", "never"] = "auto"
    context: int | None = None  # tokens the KV cache holds; None: the lesser of the model's own and DEFAULT_CONTEXT
    kv_cache_type: KvCacheType = "auto"  # how keys and values are kept; auto: f16, or f32 where weights are float32
    threads: int | None = None  # compute threads; None: the cores this process may use
    io_threads: int | None = None  # reads under way at once; None: what serves the drive best, measured once
    remeasure: bool = False  # measure the drive again
    direct_io: Literal["auto", "never"] = "auto"
    prefill_chunk: int = 512  # most tokens of a prompt that go through the layers at once
    draft: str | None = None  # a small model with the same tokenizer, "ngram" or "self"
    speculate: str = "auto"  # tokens to draft: a number, auto (by measured costs), off
    draft_tree: int = 0  # places at the front of a run for which the draft's second guess is checked too
    exact: bool = False  # compute every neuron, also where predictors would say which few
    neuron_policy: Literal["auto", "foresight", "recent", "window", "frequent"] = "auto"  # which neurons stay
    window: int | None = None  # tokens whose neurons stay with the policy window, which auto is where this is given
    prefetch_neurons: bool = True  # read the surest of what a layer's predictor says of its input before attention
    # Which experts stay; auto: adaptive, the better of foresight and lfu of late; foresight where routing is lossy.
    expert_policy: Literal["auto", "adaptive", "foresight", "lfu", "stale", "lru", "lru-layer", "pinned", "none"] = (
        "auto"
    )
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

    def settled(self) -> RunConfig:
        """With the neuron policy that auto stands for, and of the policy window its tokens."""
        policy = self.neuron_policy
        if policy == "auto":
            policy = "foresight" if self.window is None else "window"
        return replace(
            self, neuron_policy=policy, window=(self.window or NEURON_WINDOW) if policy == "window" else None
        )

    @property
    def few_tokens(self) -> int:
        """Most tokens of a pass that leaves to neurons what a prompt's pass would take."""
        return min(FEW_TOKENS, self.logit_rows)

    def __post_init__(self) -> None:
        if self.stream not in ("auto", "always", "never"):
            raise UsageError(f"--stream is '{self.stream}', which is none of auto, always, never.")
        if self.context is not None and self.context < 1:
            raise UsageError(f"--context is {self.context}; it must be at least 1.")
        if self.kv_cache_type not in get_args(KvCacheType):
            known = ", ".join(get_args(KvCacheType))
            raise UsageError(f"--kv-cache-type is '{self.kv_cache_type}', which is none of {known}.")
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
        if self.neuron_policy not in ("auto", *NEURON_POLICIES):
            known = ", ".join(("auto", *NEURON_POLICIES))
            raise UsageError(f"--neuron-policy is '{self.neuron_policy}', which is none of {known}.")
        if self.window is not None and self.window < 1:
            raise UsageError(f"--window is {self.window}; it must be at least 1 token.")
        if self.window is not None and self.neuron_policy not in ("auto", "window"):
            raise UsageError(
                f"--window is of --neuron-policy window, and --neuron-policy is {self.neuron_policy}.",
                "Leave one of the two out.",
            )
        if (self.io_threads is not None and self.io_threads < 1) or self.prefill_chunk < 1:
            raise UsageError("The I/O threads and the prefill chunk must be at least 1.")
