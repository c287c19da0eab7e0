"""The three kinds of settings, all frozen: what the model is, how to run it, how to sample. Every default stands
here, once."""

from .model import DepthConfig, MlaConfig, ModelConfig, MoeConfig, RopeConfig, WeightMap, WeightRef
from .run import (
    DEFAULT_CONTEXT,
    EXPERT_POLICIES,
    FEW_TOKENS,
    FORESEEING,
    MEASURED_MODEL,
    NEURON_BLOCK,
    NEURON_GUESSES,
    NEURON_POLICIES,
    NEURON_STAGES,
    NEURON_WINDOW,
    SLICE_BYTES,
    SMALL_MODEL,
    KvCacheType,
    RunConfig,
)
from .sampling import DEFAULT_MAX_TOKENS, SamplingParams
from .sizes import GiB, KiB, MiB, format_size, parse_size

__all__ = [
    "DEFAULT_CONTEXT", "DEFAULT_MAX_TOKENS", "EXPERT_POLICIES", "FEW_TOKENS", "FORESEEING", "MEASURED_MODEL",
    "NEURON_BLOCK", "NEURON_GUESSES", "NEURON_POLICIES", "NEURON_STAGES", "NEURON_WINDOW", "SLICE_BYTES", "SMALL_MODEL",
    "DepthConfig", "GiB", "KiB", "KvCacheType", "MiB", "MlaConfig", "ModelConfig", "MoeConfig", "RopeConfig",
    "RunConfig", "SamplingParams", "WeightMap", "WeightRef", "format_size", "parse_size",
]  # fmt: skip
