"""Layers that a token passes in part, as a config.json describes them: experts, and blocks that may be skipped."""

from __future__ import annotations

from ..config import DepthConfig, MoeConfig
from ..errors import CorruptCheckpointError, UnsupportedModelError
from .config_reader import ConfigReader
from .family import Family


def parse_experts(family: Family, read: ConfigReader, layers: int) -> tuple[MoeConfig | None, tuple[bool, ...]]:
    """The experts, and which layers have them; nothing of the latter where all do."""
    sparse = _layers_with_experts(family, read, layers)
    if not any(sparse):
        return None, ()
    experts = read.size("num_experts", "num_experts", "num_local_experts")
    chosen = read.size("num_experts_per_tok")
    noops = read.size("num_noop_experts") if read.get("num_noop_experts") else 0
    if chosen > experts + noops:
        raise CorruptCheckpointError(f"The config's 'num_experts_per_tok' {chosen} is more than its {experts} experts.")
    gates, few = 0, 0
    if family.recurrent and read.get("num_expert_groups"):
        gates, few = read.size("num_expert_groups"), read.size("gate_groups_per_tok")
        if experts % gates or few > gates or chosen % few or chosen // few > experts // gates:
            raise CorruptCheckpointError(
                f"The config's 'num_expert_groups' {gates} and 'gate_groups_per_tok' {few} do not divide its "
                f"{experts} experts and the {chosen} of a token."
            )
    width, shared = read.size("moe_intermediate_size"), 0
    if family.shared_expert == "gated":
        shared = read.size("shared_expert_intermediate_size")
    elif family.shared_expert == "counted" and read.get("n_shared_experts"):
        shared = width * read.size("n_shared_experts")
    groups, of_groups = _groups(family, read, experts, chosen)
    clamped = read.optional("swiglu_alpha"), read.optional("swiglu_limit")
    moe = MoeConfig(
        num_experts=experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
        norm_topk_prob=read.flag("norm_topk_prob") if family.norm_topk_prob is None else family.norm_topk_prob,
        shared_expert_intermediate_size=shared,
        shared_expert_gate=family.shared_expert == "gated",
        num_noop_experts=noops,
        num_groups=groups,
        groups_per_tok=of_groups,
        routed_scaling=(read.optional("routed_scaling_factor") or 1.0) if family.expert_groups else 1.0,
        clamped_swiglu=(clamped[0] or 1.702, clamped[1] or 7.0) if family.fused_experts else None,
        interleaved=family.fused_experts and read.config.get("expert_layout") != "split",
        gate_groups=gates,
        gate_groups_per_tok=few,
    )
    return moe, () if all(sparse) else tuple(sparse)


def _layers_with_experts(family: Family, read: ConfigReader, layers: int) -> list[bool]:
    match family.experts:
        case "none":
            return []
        case "optional" if not read.get("num_experts"):
            return []
        case "sparse_step":
            step, dense = read.size("decoder_sparse_step", default=1), read.get("mlp_only_layers") or []
            if not isinstance(dense, list | tuple):
                raise CorruptCheckpointError(f"The config's 'mlp_only_layers' is {dense!r}, not a list.")
            if read.get("num_experts", "num_local_experts") == 0:
                return []
            return [i not in dense and (i + 1) % step == 0 for i in range(layers)]
        case "after_dense":
            first, step = read.get("first_k_dense_replace") or 0, read.size("moe_layer_freq")
            if isinstance(first, bool) or not isinstance(first, int) or first < 0:
                raise CorruptCheckpointError(f"The config's 'first_k_dense_replace' is {first!r}, which cannot be.")
            return [i >= first and i % step == 0 for i in range(layers)]
        case _:
            return [not family.recurrent or i + 1 < layers for i in range(layers)]  # between LSTMs, not behind the last


def _groups(family: Family, read: ConfigReader, experts: int, chosen: int) -> tuple[int, int]:
    """(groups of experts, groups that a token takes from)."""
    method = (read.get("topk_method") or "greedy") if family.expert_groups else "greedy"
    if method == "greedy":
        return 1, 1
    if method != "group_limited_greedy":
        raise UnsupportedModelError(
            f"The 'topk_method' '{method}' is not supported; greedy and group_limited_greedy are."
        )
    groups, few = read.size("n_group"), read.size("topk_group")
    if experts % groups or few > groups or few * (experts // groups) < chosen:
        raise CorruptCheckpointError(
            f"The config's 'n_group' {groups} and 'topk_group' {few} do not fit {experts} experts, {chosen} a token."
        )
    return groups, few


def parse_depth(family: Family, read: ConfigReader, layers: int) -> DepthConfig | None:
    """Which blocks may be skipped: every `mod_interval`-th, so that the first never is."""
    capacity = read.optional("mod_capacity") if family.depth and read.get("mod_capacity") else None
    if capacity is None:
        return None
    interval, decoding = read.size("mod_interval"), read.get("mod_decoding")
    if decoding not in ("router", "predictor") or capacity > 1:
        raise CorruptCheckpointError(
            f"The config's 'mod_decoding' {decoding!r} or 'mod_capacity' {capacity!r} cannot be: "
            "router or predictor, and a share of the tokens."
        )
    which = tuple((i + 1) % interval == 0 for i in range(layers))
    return DepthConfig(which, capacity, decoding, read.size("mod_predictor_size"))
