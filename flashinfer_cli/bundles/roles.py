"""The words for a model's weights, by what becomes of them in a bundle, and the order in which they are written."""

from __future__ import annotations

import re
from collections.abc import Iterable

FFN = ("gate", "up", "down")  # the order within a neuron's record
# The order within an expert's record.
EXPERT = ("gate", "gate.bias", "up", "up.bias", "gate_up", "gate_up.bias", "down", "down.bias")
EXPERT_ROLE = re.compile(r"experts\.(\d+)\.(?:gate|up|gate_up|down)(?:\.bias|\.scales)?")
# What `--quantize-trunk` rounds: matrices that are large. Norms, biases, routers and tables of positions stay.
ROUNDED = frozenset((
    "q", "q_a", "q_b", "k", "v", "qkv", "kv_a", "kv_b", "k_b", "v_b", "o", "embed", "head", "project_in",
    "project_out", "shared.gate", "shared.up", "shared.down",
))  # fmt: skip
# Forward order of the trunk; roles of no list follow in alphabetical order.
BEFORE = ("embed", "project_in", "positions")
AFTER = ("final_norm", "project_out", "head")
LAYER = (
    "attn_norm", "qkv", "q", "q_a", "q_a_norm", "q_b", "k", "v", "kv_a", "kv_a_norm", "kv_b", "k_b", "v_b",
    "q_norm", "k_norm",
    "sinks", "o", "attn_post_norm", "ffn_norm", "router",
    "gate", "up", "down", "shared_gate", "shared.gate", "shared.up", "shared.down", "ffn_post_norm",
)  # fmt: skip


def is_streamed(role: str) -> bool:
    return role in FFN or EXPERT_ROLE.fullmatch(role) is not None


def is_before(role: str) -> bool:
    """Does the role come before the layers?"""
    return role.removesuffix(".bias") in BEFORE


def ordered(roles: Iterable[str], order: tuple[str, ...]) -> list[str]:
    def key(role: str) -> tuple[int, str, bool]:
        base = role.removesuffix(".bias")
        return order.index(base) if base in order else len(order), base, role != base

    return sorted(roles, key=key)
