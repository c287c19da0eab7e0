"""Rotary position embedding (2104.09864) with every stretching of it: linear, dynamic NTK, llama3, YaRN (2309.00071),
LongRoPE (2402.13753); over a whole head or its leading dimensions, in both pairings.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import torch

from ..config import RopeConfig


class Rope:
    """Angles of positions, and the rotation by them.

    Dynamic NTK and LongRoPE take their frequencies from the length of the whole sequence, so keys rotated at one length
    can be stale at another. The rule: `seq_len` is the number of positions of the sequence (the last one plus one), all
    positions of a forward are turned by the frequencies of that length, and `regime(seq_len)` says when they change.
    `varies` is true for these two types only; a cache that keeps keys unrotated, or recomputes them when the regime
    changes, gives what one forward over the whole sequence gives.
    """

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.head_dim = head_dim
        self.rotary_dim = config.rotary_dim or head_dim
        assert self.rotary_dim in range(2, head_dim + 1, 2), (self.rotary_dim, head_dim)
        self.varies = config.rope_type in ("dynamic", "longrope")
        self.attention_factor = _attention_factor(config)
        self._kept: tuple[Hashable, torch.Tensor] | None = None
        self._run: tuple[Hashable, tuple[torch.Tensor, torch.Tensor]] | None = None

    def regime(self, seq_len: int) -> Hashable:
        """Equal for two lengths exactly when their frequencies are the same."""
        config = self.config
        if config.rope_type == "dynamic":
            return max(seq_len, config.max_position_embeddings)
        if config.rope_type == "longrope":
            assert config.original_max_position_embeddings is not None
            return seq_len > config.original_max_position_embeddings
        return None

    def inv_freq(self, seq_len: int) -> torch.Tensor:
        """Radians a position, float32 [rotary_dim / 2] on `device`, in a sequence of `seq_len` positions."""
        regime = self.regime(seq_len)
        if self._kept is None or self._kept[0] != regime:
            freq = _frequencies(self.config, self.rotary_dim, seq_len)
            if self.config.freq_factors:
                freq = freq / torch.tensor(self.config.freq_factors, dtype=torch.float32)
            self._kept = (regime, freq.to(self.device))
        return self._kept[1]

    def run(self, start: int, count: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`cos_sin` of positions start, ..., start + count - 1; kept for the layers that ask for the same."""
        asked = (start, count, self.regime(seq_len))
        if self._run is None or self._run[0] != asked:
            here = torch.arange(start, start + count, device=self.device)
            self._run = (asked, self.cos_sin(here, seq_len))
        return self._run[1]

    def cos_sin(self, positions: torch.Tensor, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions int64 [T] of a sequence of `seq_len` -> cos and sin, float32 [T, rotary_dim / 2], on their device.

        The attention factor of YaRN and LongRoPE is in them.
        """
        angles = positions.to(torch.float32)[:, None] * self.inv_freq(seq_len)
        cos, sin = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return cos, sin

    def apply(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool | None = None
    ) -> torch.Tensor:
        """x float32 [T, heads, head_dim] turned by cos and sin [T, rotary_dim / 2] -> the same shape, a new tensor.

        Pairs are (2j, 2j + 1) when `interleaved` (None: as the config says), else (j, j + rotary_dim / 2); dimensions
        past rotary_dim pass through.
        """
        interleaved = self.config.interleaved if interleaved is None else interleaved
        half = self.rotary_dim // 2
        cos, sin = cos[:, None, :], sin[:, None, :]
        out = torch.empty_like(x)
        if interleaved:
            first, second = slice(0, self.rotary_dim, 2), slice(1, self.rotary_dim, 2)
        else:
            first, second = slice(0, half), slice(half, self.rotary_dim)
        a, b = x[..., first], x[..., second]
        out[..., first] = a * cos - b * sin
        out[..., second] = b * cos + a * sin
        if self.rotary_dim < self.head_dim:
            out[..., self.rotary_dim :] = x[..., self.rotary_dim :]
        return out


def _attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by (YaRN's and LongRoPE's correction of the attention's temperature)."""
    if config.rope_type not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1.0:
        return 1.0
    if config.rope_type == "longrope":
        assert config.original_max_position_embeddings is not None
        return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_position_embeddings))

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(config.factor) + 1.0

    if config.mscale and config.mscale_all_dim:
        return temperature(config.mscale) / temperature(config.mscale_all_dim)
    return temperature(1.0)


def _frequencies(config: RopeConfig, dim: int, seq_len: int) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    match config.rope_type:
        case "dynamic":
            # In float32 tensors past the trained context, as the reference implementation computes it.
            limit = config.max_position_embeddings
            length = torch.tensor(max(seq_len, limit)) if seq_len > limit else limit
            growth = config.factor * length / limit - (config.factor - 1)
            return torch.as_tensor(1.0 / (config.theta * growth ** (dim / (dim - 2))) ** exponents)
        case "longrope":
            assert config.original_max_position_embeddings is not None
            long = seq_len > config.original_max_position_embeddings
            factors = torch.tensor(config.long_factor if long else config.short_factor, dtype=torch.float32)
            return 1.0 / (factors * config.theta**exponents)
        case "yarn":
            return _yarn(config, dim, config.theta**exponents)
    plain = 1.0 / config.theta**exponents
    match config.rope_type:
        case "linear":
            return plain / config.factor
        case "llama3":
            return _llama3(config, plain)
    return plain


def _yarn(config: RopeConfig, dim: int, wavelengths: torch.Tensor) -> torch.Tensor:
    """Fast dimensions as trained, slow ones slowed by `factor`, a ramp between."""
    context = config.original_max_position_embeddings
    assert context is not None

    def dimension(rotations: float) -> float:
        """The pair that turns `rotations` times within the trained context."""
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (config.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _llama3(config: RopeConfig, freq: torch.Tensor) -> torch.Tensor:
    """Wavelengths beyond the trained context are slowed by `factor`, short ones kept, those between mixed."""
    context, low, high = config.original_max_position_embeddings, config.low_freq_factor, config.high_freq_factor
    assert context is not None
    wavelengths = 2 * math.pi / freq
    slowed = torch.where(wavelengths > context / low, freq / config.factor, freq)
    share = (context / wavelengths - low) / (high - low)
    mixed = (1 - share) * slowed / config.factor + share * slowed
    between = ~(wavelengths < context / high) & ~(wavelengths > context / low)
    return torch.where(between, mixed, slowed)
