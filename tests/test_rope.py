"""Rotations against the rotary modules of transformers: every type, beyond the trained context, both pairings."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
import transformers
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from flashinfer_cli.config import RopeConfig
from flashinfer_cli.layers.rope import Rope
from flashinfer_cli.models.hf_config import parse_config

SHORT = [1.0 + 0.05 * j for j in range(16)]
LONG = [2.0 + 0.9 * j for j in range(16)]
TYPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-betas": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 2.0,
                   "truncate": False},
    "yarn-mscale": {"factor": 40.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 1.1},
    "yarn-attention": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3},
    "longrope": {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32},
    "longrope-factor": {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32,
                        "factor": 8.0},
    "longrope-attention": {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 32,
                           "attention_factor": 0.9},
}  # fmt: skip


def _llama(name: str, theta: float) -> transformers.PreTrainedConfig:
    parameters = {"rope_type": name.split("-")[0], "rope_theta": theta, **TYPES[name]}
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return transformers.LlamaConfig(**shape, rope_parameters=parameters)


def _ours(config: transformers.PreTrainedConfig) -> tuple[Rope, Rope | None]:
    parsed = parse_config(config.to_dict())
    assert parsed.rope is not None
    local = None if parsed.rope_local is None else Rope(parsed.rope_local, parsed.head_dim)
    return Rope(parsed.rope, parsed.head_dim), local


def _half(full: torch.Tensor) -> torch.Tensor:
    return full[0, :, : full.shape[-1] // 2]


@pytest.mark.parametrize("length", [5, 32, 33, 128, 129, 300])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("name", TYPES)
def test_angles_are_those_of_transformers(name: str, theta: float, length: int) -> None:
    config = _llama(name, theta)
    rope, _ = _ours(config)
    positions = torch.arange(length)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = rope.cos_sin(positions, length)
    assert ours[0].shape == (length, rope.rotary_dim // 2)
    torch.testing.assert_close(ours[0], _half(cos), atol=2e-6, rtol=0)
    torch.testing.assert_close(ours[1], _half(sin), atol=2e-6, rtol=0)
    if name != "default":
        plain, _ = _ours(_llama("default", theta))
        assert not torch.allclose(plain.cos_sin(positions, 300)[0], rope.cos_sin(positions, 300)[0], atol=1e-3)


@pytest.mark.parametrize("name", ["default", "yarn", "longrope"])
def test_rotation_is_that_of_transformers(name: str) -> None:
    config = _llama(name, 10_000.0)
    rope, _ = _ours(config)
    positions = torch.arange(40)
    x = torch.randn(40, 4, 32, generator=torch.Generator().manual_seed(1))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    before = x.clone()
    ours = rope.apply(x, *rope.cos_sin(positions, 40), interleaved=False)
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1), atol=5e-6, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rotary_dim", [32, 16, 2])
def test_pairings_are_permutations_of_each_other(rotary_dim: int) -> None:
    rope = Rope(RopeConfig(rotary_dim=rotary_dim), 32)
    x = torch.randn(9, 3, 32, generator=torch.Generator().manual_seed(2))
    cos, sin = rope.cos_sin(torch.arange(9), 9)
    halves = rope.apply(x, cos, sin, interleaved=False)
    order = torch.arange(rotary_dim).view(2, -1).T.flatten()  # 0, half, 1, half + 1, ...
    order = torch.cat((order, torch.arange(rotary_dim, 32)))
    pairs = rope.apply(x[..., order], cos, sin, interleaved=True)
    assert torch.equal(pairs, halves[..., order])
    assert torch.equal(halves[..., rotary_dim:], x[..., rotary_dim:])
    if rotary_dim > 2:
        assert not torch.allclose(rope.apply(x, cos, sin, interleaved=True), halves, atol=1e-2)
    turned = Rope(RopeConfig(rotary_dim=rotary_dim, interleaved=True), 32)
    assert torch.equal(turned.apply(x[..., order], cos, sin), pairs)


@pytest.mark.parametrize("length", [7, 20, 90])
def test_partial_rotary(length: int) -> None:
    positions = torch.arange(length)
    phi = tiny_models.hf_config("phi", 1)
    rope, _ = _ours(phi)
    assert rope.rotary_dim == 4
    cos, _ = PhiRotaryEmbedding(phi)(torch.zeros(1), positions[None])
    torch.testing.assert_close(rope.cos_sin(positions, length)[0], _half(cos), atol=2e-6, rtol=0)

    phi3 = tiny_models.hf_config("phi3", 2)
    rope, _ = _ours(phi3)
    assert rope.rotary_dim == 12
    cos, sin = Phi3RotaryEmbedding(phi3)(torch.zeros(1), positions[None])
    torch.testing.assert_close(rope.cos_sin(positions, length)[0], _half(cos), atol=2e-6, rtol=0)
    torch.testing.assert_close(rope.cos_sin(positions, length)[1], _half(sin), atol=2e-6, rtol=0)


@pytest.mark.parametrize("index", [0, 1])
def test_gemma3_has_two(index: int) -> None:
    config = tiny_models.hf_config("gemma3_text", index)
    full, local = _ours(config)
    assert local is not None
    theirs, positions = Gemma3RotaryEmbedding(config), torch.arange(30)
    for rope, layer_type in ((full, "full_attention"), (local, "sliding_attention")):
        cos, _ = theirs(torch.zeros(1), positions[None], layer_type)
        torch.testing.assert_close(rope.cos_sin(positions, 30)[0], _half(cos), atol=2e-6, rtol=0)
    assert not torch.allclose(full.inv_freq(30), local.inv_freq(30))


@pytest.mark.parametrize("name", TYPES)
def test_regime_changes_exactly_when_the_frequencies_do(name: str) -> None:
    rope, _ = _ours(_llama(name, 10_000.0))
    lengths = [1, 31, 32, 33, 127, 128, 129, 130, 300]
    for a in lengths:
        for b in lengths:
            same = torch.equal(rope.inv_freq(a), rope.inv_freq(b))
            assert same == (rope.regime(a) == rope.regime(b)), (a, b)
    assert rope.varies == (len({rope.regime(n) for n in lengths}) > 1)


def test_a_long_sequence_does_not_spoil_a_short_one() -> None:
    for name in ("dynamic", "longrope"):
        rope, _ = _ours(_llama(name, 10_000.0))
        before = rope.inv_freq(10).clone()
        rope.inv_freq(300)
        assert torch.equal(rope.inv_freq(10), before)


def test_freq_factors_of_gguf_are_llama3s_rule() -> None:
    """llama.cpp stores llama3's rule as one divisor a frequency."""
    rope, _ = _ours(_llama("llama3", 10_000.0))
    plain, _ = _ours(_llama("default", 10_000.0))
    divisors = plain.inv_freq(1) / rope.inv_freq(1)
    assert divisors.max() > 7.9
    by_factors = Rope(RopeConfig(rotary_dim=32, freq_factors=tuple(divisors.tolist())), 32)
    torch.testing.assert_close(by_factors.inv_freq(1), rope.inv_freq(1), rtol=1e-6, atol=0)
