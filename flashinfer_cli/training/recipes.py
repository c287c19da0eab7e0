"""What each of our small models is trained with: a frozen row a recipe, every default in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from ..errors import UsageError, nearest
from .shape import Shape


@dataclass(frozen=True)
class Recipe:
    """How to train one model. Lengths in tokens; loss weights multiply the mean over layers of each loss."""

    name: str
    about: str
    shape: Shape
    tokens: int  # seen in all
    batch: int = 8  # sequences a step
    sequence: int = 512  # tokens of a sequence
    learning_rate: float = 3e-3  # at its peak: after `warmup` steps it falls along a cosine to a tenth
    warmup: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the products of matrices; weights are float32

    sparsity: float = 0.0  # share of FFN neurons to silence with a progressive L1; 0: none
    importance_weight: float = 0.1  # 1701.06538's w, for both of its losses
    load_weight: float = 0.1
    router_weight: float = 0.1  # of the binary cross-entropy that makes a MoD router causal

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError(f"A sparsity of {self.sparsity} is no share of the neurons.", "Write 0.9 for 90%.")
        if self.sparsity and self.shape.hidden_act not in ("relu", "relu2"):
            raise UsageError(f"'{self.shape.hidden_act}' has no zeros to multiply.", "Sparsity needs relu or relu2.")
        if min(self.tokens, self.batch, self.sequence) < 1:
            raise UsageError("Tokens, batch and sequence must be at least 1.")

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.batch * self.sequence)))


_LSTM = Shape(
    hidden_size=160,
    num_hidden_layers=2,
    num_attention_heads=1,
    num_key_value_heads=1,
    hidden_act="relu",
    num_experts=64,
    num_experts_per_tok=4,
    moe_intermediate_size=56,
    recurrent=True,
)

_ROWS = (
    Recipe(
        "stories-relu",
        "dense, gated ReLU FFN, few neurons active",
        Shape(hidden_size=256, intermediate_size=704, num_hidden_layers=5, hidden_act="relu"),
        tokens=11_000_000,
        sparsity=0.92,
    ),
    Recipe(
        "stories-moe",
        "16 experts of which a token uses 2, noisy top-k gating",
        Shape(
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
        ),
        tokens=9_000_000,
    ),
    Recipe(
        "stories-mod",
        "Mixture-of-Depths: every second block computes an eighth of the tokens",
        Shape(
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=1,
            mod_capacity=0.125,
        ),
        tokens=10_000_000,
    ),
    Recipe(
        "stories-draft",
        "two small dense blocks, to draft for the others",
        Shape(hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4),
        tokens=10_000_000,
    ),
    Recipe(
        "stories-moe-lstm",
        "64 experts between two LSTMs, of which a token uses 4",
        _LSTM,
        tokens=6_000_000,
        batch=16,
        sequence=128,
        dtype="float32",
    ),
    Recipe(
        "stories-moe-lstm-2",
        "experts between two LSTMs, two levels of gating: 2 of 8 groups, 2 of 8 experts in each",
        replace(_LSTM, num_expert_groups=8, gate_groups_per_tok=2),
        tokens=6_000_000,
        batch=16,
        sequence=128,
        dtype="float32",
    ),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({row.name: row for row in _ROWS})


def recipe(name: str) -> Recipe:
    """The recipe of that name; UsageError naming the nearest one."""
    if name not in RECIPES:
        near = nearest(name, RECIPES)
        raise UsageError(
            f"There is no recipe '{name}'.",
            (f"Did you mean '{near}'? " if near else "") + f"There are {', '.join(RECIPES)}.",
        )
    return RECIPES[name]
