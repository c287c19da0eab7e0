"""The wiring of neurons on demand: slots for the layers that have predictors, and the FFNs that compute in them."""

from __future__ import annotations

from collections.abc import Mapping

from ..cache.neurons import NeuronCache
from ..cache.pinned import Pinned
from ..cache.slots import NeuronFile
from ..cache.window import deal, make_policy
from ..config import NEURON_BLOCK, NEURON_GUESSES, RunConfig
from ..layers.demand import Demand
from ..layers.ffn import RecordFfn
from ..layers.linear import Runtime
from ..layers.sparse_ffn import SparseFfn
from ..plan import MemoryPlan
from .layout import LayerLayout, ModelLayout


class NeuronBuilder:
    """Makes the slots of all layers with `predictors`, and these layers. `wants` is the share of its neurons that a
    layer needs."""

    def __init__(
        self,
        layout: ModelLayout,
        plan: MemoryPlan,
        rt: Runtime,
        run: RunConfig,
        predictors: Mapping[int, Demand],
        wants: Mapping[int, float],
    ) -> None:
        self.predictors = predictors
        self.rt, self.run = rt, run
        sparse = {i: layer for i, layer in enumerate(layout.layers) if layer.sparse}
        here = all(part.slice.home is not None for layer in sparse.values() for part in layer.record_parts)
        self.cache: NeuronCache | Pinned = (
            Pinned(rt.feed.device, rt.recorder, NEURON_BLOCK) if here else self._slots(sparse, plan, wants)
        )

    def _slots(self, sparse: Mapping[int, LayerLayout], plan: MemoryPlan, wants: Mapping[int, float]) -> NeuronCache:
        """The plan's memory for neurons, dealt to layers by what they want; behind a prompt there is more."""
        counts = {i: layer.records.count for i, layer in sparse.items() if layer.records is not None}
        widths = {i: layer.records.width_bytes for i, layer in sparse.items() if layer.records is not None}
        early, room = (
            deal(nbytes, counts, widths, wants) for nbytes in (plan.neuron_bytes, plan.neuron_bytes + plan.late_bytes)
        )
        late = {index: max(0, slots - early[index]) for index, slots in room.items()}
        files, policies = {}, {}
        for index, layer in sparse.items():
            place = layer.records_base
            assert place is not None
            files[index] = NeuronFile(place[0], place[1], counts[index], widths[index])
            policies[index] = make_policy(self.run.neuron_policy, counts[index], room[index], self.run.window)
        guesses = NEURON_GUESSES * self.run.prefetch_neurons
        rt = self.rt
        return NeuronCache(
            rt.feed.store, rt.feed.device, rt.recorder, files, policies, NEURON_BLOCK, guesses, late, rt.kernels
        )

    def ffn(self, index: int, layer: LayerLayout, dense: RecordFfn) -> SparseFfn:
        """The layer that computes on the neurons its predictor names, and densely in a prompt."""
        assert layer.records is not None
        if isinstance(self.cache, Pinned):
            homes = [part.slice.home.view(part.rows, -1) for part in layer.record_parts if part.slice.home is not None]
            self.cache.homes[index] = (homes, layer.record_parts[0].rows)
        few = self.run.few_tokens
        return SparseFfn(index, dense, self.predictors[index], self.cache, layer.records.count, few)
