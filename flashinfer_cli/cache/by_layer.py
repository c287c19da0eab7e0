"""Policies for neurons of all layers together, driven as those of experts are: for a recorded trace."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..config import NEURON_POLICIES
from ..errors import UsageError
from .window import NeuronPolicy, make_policy


class ByLayer:
    """A policy for each layer, driven as the policies of experts are: for replay. Counts tokens that are decoded."""

    def __init__(self, policies: Mapping[int, NeuronPolicy], prompt_room: Mapping[int, int] | None = None) -> None:
        self.policies = policies
        self.room = {layer: policy.capacity for layer, policy in policies.items()}
        self.prompt_room = prompt_room or self.room
        self.records = {layer: len(policy.held) for layer, policy in policies.items()}

    def expect(self, layer: int, worth: np.ndarray) -> None:
        self.policies[layer].expect(worth)

    def demand(self, layer: int, chosen: np.ndarray, phase: str = "decode") -> None:
        """The tokens of a pass ask a layer for ids: int [T, k] ascending, -1 for none."""
        policy, room = self.policies[layer], (self.prompt_room if phase == "prefill" else self.room)[layer]
        if policy.capacity != room:
            policy.resize(room)
        for row in chosen:
            policy.demand(row[row >= 0], counted=phase == "decode")

    @property
    def counts(self) -> dict[tuple[str, int], list[int]]:
        """(phase, layer) -> [hits, misses]."""
        return {("decode", layer): [policy.hits, policy.misses] for layer, policy in self.policies.items()}

    def hits(self, phase: str = "decode") -> int:
        return sum(hits for (name, _), (hits, _) in self.counts.items() if name == phase)

    def misses(self, phase: str = "decode") -> int:
        return sum(misses for (name, _), (_, misses) in self.counts.items() if name == phase)


def policies_by_layer(
    name: str,
    records: Mapping[int, int],
    room: Mapping[int, int],
    window: int | None,
    prompt_room: Mapping[int, int] | None = None,
) -> ByLayer:
    """A policy by its name, for layers of so many neurons with room for so many, during a prompt for `prompt_room`;
    `window` as in `make_policy`. UsageError for one that is none."""
    if name not in NEURON_POLICIES:
        raise UsageError(f"'{name}' is not a policy for neurons.", f"Policies are {', '.join(NEURON_POLICIES)}.")
    policies = {layer: make_policy(name, count, room[layer], window) for layer, count in records.items()}
    return ByLayer(policies, prompt_room)
