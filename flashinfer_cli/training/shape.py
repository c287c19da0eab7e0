"""What a recipe trains: the shape of the model and of its blocks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..errors import UsageError


@dataclass(frozen=True)
class Shape:
    """A small decoder in the terms of its config.json. Sizes in elements."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024  # of a dense FFN
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5

    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0
    num_noop_experts: int = 0  # integrated MoDE: choices of the router that compute nothing

    num_expert_groups: int = 0  # two levels of gating: groups of experts; 0: one level
    gate_groups_per_tok: int = 0  # of which a token uses so many, and as many experts of each
    recurrent: bool = False  # LSTMs rather than attention, experts act(up) between them (1701.06538)

    mod_capacity: float = 0.0  # share of the tokens a MoD block computes; 0: every block computes all
    mod_interval: int = 2  # every how many blocks one is a MoD block, the second first
    mod_decoding: Literal["router", "predictor"] = "router"  # who decides where there is no whole sequence to rank
    mod_predictor_size: int = 64  # hidden units of the predictor

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise UsageError("The heads must divide the hidden size, and the key/value heads the heads.")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts + self.num_noop_experts:
            raise UsageError(f"{self.num_experts_per_tok} experts a token of {self.num_experts} cannot be.")
        groups, few = self.num_expert_groups, self.gate_groups_per_tok
        if groups and (
            self.num_experts % groups
            or not 1 <= few <= groups
            or self.num_experts_per_tok % few
            or self.num_experts_per_tok // few > self.num_experts // groups
            or self.num_noop_experts
        ):
            raise UsageError(
                f"{self.num_experts_per_tok} of {self.num_experts} experts in {few} of {groups} groups cannot be.",
                "Groups divide the experts, and the groups a token uses the experts it uses.",
            )
        if groups and not self.recurrent:
            raise UsageError("Groups of experts are for recurrent models.", "Leave them out, or take stories-moe-lstm.")
        if self.recurrent and (
            self.mod_capacity
            or not self.num_experts
            or self.num_noop_experts
            or self.num_attention_heads != 1
            or self.num_hidden_layers < 2
        ):
            raise UsageError("A recurrent model has two or more LSTMs with experts between them, and no heads.")
        if not 0 <= self.mod_capacity <= 1:
            raise UsageError(f"A capacity of {self.mod_capacity} is no share of the tokens.", "Write 0.125 for 12.5%.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """act(gate) * up, or act(up) alone."""
        return not self.recurrent

    @property
    def is_depth_model(self) -> bool:
        """Does it need the family of our own, with blocks or experts that may be skipped."""
        return self.mod_capacity > 0 or self.num_noop_experts > 0

    def skips(self, layer: int) -> bool:
        """Is `layer` a block that tokens may skip: every mod_interval-th, so that the first never is."""
        return self.mod_capacity > 0 and (layer + 1) % self.mod_interval == 0

    def to_config(self, eos: int) -> dict[str, Any]:
        """The config.json of a Hugging Face folder: llama, mixtral, mixture_of_depths or moe_lstm."""
        common = {
            key: value
            for key, value in asdict(self).items()
            if not key.startswith(("mod_", "num_exp", "num_noop", "gate_groups", "moe_", "recurrent"))
        }
        config = common | {
            "head_dim": self.head_dim,
            "tie_word_embeddings": True,
            "bos_token_id": eos,
            "eos_token_id": eos,
            "dtype": "bfloat16",
        }
        moe = {"num_local_experts": self.num_experts, "num_experts_per_tok": self.num_experts_per_tok}
        if self.recurrent:
            config |= moe | {"model_type": "moe_lstm", "architectures": ["MoeLstmForCausalLM"]}
            config |= {"intermediate_size": self.moe_intermediate_size}
            if self.num_expert_groups:
                config |= {"num_expert_groups": self.num_expert_groups, "gate_groups_per_tok": self.gate_groups_per_tok}
        elif self.is_depth_model:
            config |= {"model_type": "mixture_of_depths", "architectures": ["MixtureOfDepthsForCausalLM"]}
            config |= {key: value for key, value in asdict(self).items() if key.startswith("mod_")}
            if self.num_experts:
                config |= moe | {
                    "moe_intermediate_size": self.moe_intermediate_size,
                    "num_noop_experts": self.num_noop_experts,
                }
        elif self.num_experts:
            config |= moe | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "sliding_window": None}
            config |= {"intermediate_size": self.moe_intermediate_size}
        else:
            config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        return config
