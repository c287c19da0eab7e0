"""The wiring of a mixture of experts: its cache and policy, its layers, and what guesses ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..cache.expert_policies import expert_policy
from ..cache.experts import ExpertCache
from ..cache.policy import Policy
from ..config import ModelConfig, MoeConfig, RunConfig
from ..errors import UsageError
from ..layers.expert import ExpertLayout, together
from ..layers.expert_stage import Stage, stage_for
from ..layers.ffn import DenseFfn
from ..layers.linear import Runtime
from ..layers.moe import Ahead, FirstGuess, MoeFfn, rescale
from ..layers.norm import Norm
from ..layers.routing import CacheBias, CacheGap
from ..plan import MemoryPlan
from .ahead import Maps
from .layout import LayerLayout, ModelLayout

LOOKAHEADS = (1, 2, 4)  # layers; what a run does not use is there for traces


def has_experts(layout: ModelLayout) -> bool:
    return any(layer.expert_extents for layer in layout.layers)


class ExpertBuilder:
    """Makes the cache of all layers' experts, and the layers that draw on it. `get` finds what always stays, by layer
    and role; `probes` are of a calibrated bundle, in the place of routers that guess worse."""

    def __init__(
        self,
        config: ModelConfig,
        layout: ModelLayout,
        plan: MemoryPlan,
        rt: Runtime,
        run: RunConfig,
        get: Callable[[int, str], torch.Tensor | None],
        probes: Maps,
    ) -> None:
        assert config.moe is not None
        self.config, self.layout, self.run, self.get = config, layout, run, get
        self.moe: MoeConfig = config.moe
        self.device = rt.feed.device
        self.kernels = rt.kernels
        self.stages: dict[object, Stage | None] = {}
        self.probes = probes
        self.bias = self._bias()
        extents = {i: layer.expert_extents for i, layer in enumerate(layout.layers) if layer.expert_extents}
        self.cache = ExpertCache(
            rt.feed.store,
            self.device,
            rt.recorder,
            {i: [*each, *layout.layers[i].small_extents] for i, each in extents.items()},
            policy=self._policy({i: len(e) for i, e in extents.items()}, plan.expert_slots),
            transit=plan.transit_experts,
            prefetch=run.prefetch_experts,
            # With room for more than what is demanded, some guesses may be of the layer after the next.
            lookahead=run.lookahead or (2 if plan.transit_experts > self.moe.num_experts_per_tok + 1 else 1),
        )
        if plan.everything_fits:
            self.cache.fill()

    def _policy(self, records: Mapping[int, int], room: int) -> Policy:
        """Raises UsageError for foresight where neither calibration nor a single router says what experts are worth."""
        name = self.run.expert_policy
        missing = [layer for layer in records if (layer, layer) not in self.probes]
        if name == "foresight" and missing and self.moe.gate_groups:
            raise UsageError(
                "--expert-policy foresight needs one router over all experts; this model's gate chooses groups first.",
                "Leave the option out.",
            )
        if name == "auto":  # demands that lean on what is here would say that it was well chosen
            name = "foresight" if self.bias is not None or self.run.degrade else "adaptive"
        return expert_policy(name, records, room)

    def _bias(self) -> CacheBias | CacheGap | None:
        run, moe = self.run, self.moe
        if not run.cache_bias and not run.cache_gap:
            return None
        if moe.gate_groups:
            raise UsageError(
                "--cache-bias and --cache-gap prefer experts among all, and this model's gate chooses groups first.",
                "Leave it out.",
            )
        few = moe.num_experts <= 8 or moe.num_experts_per_tok <= 2
        keep = run.keep_top if run.keep_top is not None else 1 if few else 2
        return CacheBias(run.cache_bias, keep) if run.cache_bias else CacheGap(run.cache_gap, keep)

    def ffn(self, index: int, layer: LayerLayout, shared: DenseFfn | None) -> MoeFfn:
        router, worth = self.get(index, "router"), self.probes.get((index, index))
        assert router is not None
        return MoeFfn(
            layer=index,
            moe=self.moe,
            router=router,
            router_bias=self.get(index, "router.bias"),
            cache=self.cache,
            layouts=(*layer.expert_layouts, *layer.small_layouts),
            act=self.config.hidden_act,
            shared=shared,
            shared_gate=self.get(index, "shared_gate"),
            ahead=self._ahead(index, self.get(index, "ffn_norm")),
            bias=self.bias,
            degrade=self.run.degrade if layer.small_layouts else 0.0,
            group_router=self.get(index, "group_router"),
            stage=self._stage(layer.expert_layouts),
            worth=None if worth is None else (self.device.put(worth[0]), self.device.put(worth[1])),
        )

    def _stage(self, layouts: Sequence[ExpertLayout]) -> Stage | None:
        """Layers whose experts are of one shape share one."""
        key = tuple((role, part.rows, part.cols, part.format) for role, part in sorted(layouts[0].items()))
        if key not in self.stages:
            moe = self.moe
            clamped = moe.clamped_swiglu is not None
            most = moe.num_experts_per_tok
            self.stages[key] = stage_for(layouts, self.config.hidden_act, most, clamped, self.kernels)
        stage = self.stages[key]
        return stage if stage is not None and together(layouts) else None

    def _ahead(self, index: int, norm: torch.Tensor | None) -> tuple[Ahead, ...]:
        """The routers of the layers behind one whose FFN has this norm, or what was learned to guess better, for
        guesses of their experts."""
        if self.moe.gate_groups:
            return ()  # logits of different groups say nothing of each other
        plain = self.config.norm == "rms" and not self.config.norm_offset
        found = []
        for distance in LOOKAHEADS:
            layer = index + distance
            router, other = self.get(layer, "router"), self.get(layer, "ffn_norm")
            if router is None or other is None or layer >= len(self.layout.layers):
                continue
            if (index, layer) in self.probes:
                weight, bias = (self.device.put(each) for each in self.probes[index, layer])
                found.append(Ahead(distance, layer, weight, bias, None, self.bias))
                continue
            # Layer norms differ by more than a factor, and an offset is not in these weights.
            scale = rescale(norm, other) if norm is not None and plain else None
            found.append(Ahead(distance, layer, router, self.get(layer, "router.bias"), scale, self.bias))
        return tuple(found)

    def first_guess(self, norm_of: Callable[[int, str], Norm | None]) -> FirstGuess | None:
        """Guesses from the embedding for the first layers that have experts."""
        first = self.cache.first_layer
        norm = norm_of(first, "ffn_norm")
        if norm is None:
            return None
        ahead = tuple(
            replace(one, distance=one.distance - first)
            for one in self._ahead(-1, self.get(first, "ffn_norm"))
            if one.layer >= first
        )
        return FirstGuess(norm, ahead, self.moe, self.cache)
