"""What a model that is cut into slices asks of the plan, in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..config import NEURON_BLOCK, NEURON_GUESSES, NEURON_STAGES, KiB, MiB, ModelConfig, RunConfig
from ..kernels.kept import kept_format_of, kept_nbytes
from ..layers.attention import FLOAT_BYTES, SCORE_BYTES
from ..plan import Sizes
from ..store.spans import span_of
from .layout import LayerLayout, ModelLayout

REQUEST_BYTES = 16 * KiB  # what a drive reads of a slice in the 10 us that a request takes it, beside its bytes


def _ffn_width(layer: LayerLayout, whole: int) -> int:
    """How many neurons of a dense FFN are computed at once: records a slice at a time."""
    return max((part.rows for part in layer.record_parts), default=whole)


def _inside_first(layout: ModelLayout) -> tuple[int, ...]:
    """Places of slices, for a model that drafts for itself with what stays: the head, then whole layers from both ends
    inwards, whose work the layers between them repeat most."""
    places = {id(one): place for place, one in enumerate((*layout.body, *layout.head.slices))}
    count = len(layout.layers)
    layers = [layout.layers[i // 2 if i % 2 == 0 else count - 1 - i // 2] for i in range(count)]
    wanted = [*layout.head.slices, *(one for layer in layers for one in layer.slices)]
    first = [places.pop(id(one)) for one in wanted]
    return (*places.values(), *first)  # what no layer has, projections in and out, stays before all


def slots_first(named: float, width: int) -> float:
    """Slots of `width` bytes up to which one more saves a longer read than as many bytes of slices that stay.

    Where a token names n neurons and s have slots, another spares some exp(-s / n) reads a token, and each takes as
    long as width + REQUEST_BYTES of a slice.
    """
    return named * math.log1p(REQUEST_BYTES / width)


def _slots_first(layout: ModelLayout, shares: Mapping[int, float]) -> int:
    """Bytes of these slots, of all layers."""
    total = 0.0
    for index, share in shares.items():
        records = layout.layers[index].records
        if layout.layers[index].sparse and records is not None:
            total += records.width_bytes * min(records.count, slots_first(share * records.count, records.width_bytes))
    return int(total)


def sizes_of(
    layout: ModelLayout, config: ModelConfig, run: RunConfig, named: Mapping[int, float] | None = None
) -> Sizes:
    """What the plan needs to know, in bytes. `named`: the share of its neurons that a layer's predictor names."""
    spans = tuple(s.span.nbytes for s in (*layout.body, *layout.head.slices))
    experts = [layer.expert_extents for layer in layout.layers if layer.expert_extents]
    moe = config.moe

    # Of a folder in MXFP4 an expert's largest matrix, with its scales in their places, and what that takes to make.
    packed = (
        p.nbytes for layer in layout.layers for e in layer.expert_layouts for p in e.values() if p.scales is not None
    )
    joined = 3 * max(packed, default=0)
    kept = kept_format_of(config, run.kv_cache_type)

    def scratch(chunk: int) -> int:
        """Activations and temporaries of a pass of `chunk` tokens, counted generously."""
        d, hd = config.hidden_size, config.head_dim
        dense = [layer for index, layer in enumerate(layout.layers) if not config.is_moe(index)]
        ffn = 3 * max((_ffn_width(layer, config.intermediate_size) for layer in dense), default=0)
        if moe is not None:  # the outputs by rank; one expert, at worst with every token; the shared one
            experts = (moe.num_experts_per_tok + 2) * d + 3 * moe.moe_intermediate_size
            ffn = max(ffn, experts + 3 * moe.shared_expert_intermediate_size)
        a_token = 8 * d + 3 * hd * (2 * config.num_attention_heads + 4 * config.num_key_value_heads) + ffn
        expanded = 0
        if config.mla is not None:  # queries and mixed latents of every head, and kv_b where it is spread out
            heads, mla = config.num_attention_heads, config.mla
            a_token += heads * 5 * (mla.kv_lora_rank + mla.qk_rope_head_dim)
            if any("kv_b" in layer.matrices for layer in layout.layers):
                expanded = 4 * heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
        context = run.context or 0
        expanded += joined
        if kept != "F32":  # the heads that are made float32 at a time
            heads, *widths = config.kv_shape
            head = 4 * context * sum(widths)
            expanded += max(head, min(heads * head, FLOAT_BYTES))
        scores = 3 * min(SCORE_BYTES, 4 * config.num_attention_heads * chunk * max(context, chunk))
        logits = 4 * config.vocab_size * (3 * run.logit_rows + 4)
        return 4 * a_token * chunk + expanded + scores + logits + 8 * MiB

    return Sizes(
        order=_inside_first(layout) if run.draft == "self" and not any(layout.on_demand) else (),
        always=sum(4 * ref.rows * ref.cols for ref in layout.always.values()),
        slices=spans,
        table=0 if layout.tied else sum(s.span.nbytes for s in layout.embed.slices),
        kv_per_token=kept_nbytes(config, kept),
        scratch=scratch,
        kept=kept.lower(),
        expert=max((span_of(e).nbytes for extents in experts for e in extents), default=0),
        seldom=(*layout.on_demand, *(False for _ in layout.head.slices)),
        demand=max((layer.demanded for layer in layout.layers), default=0),
        neurons=sum(layer.neuron_bytes for layer in layout.layers),
        slots_first=_slots_first(layout, named or {}),
        neuron_block=max(
            (
                (NEURON_STAGES * NEURON_BLOCK + NEURON_GUESSES * run.prefetch_neurons) * layer.records.width_bytes
                for layer in layout.layers
                if layer.sparse and layer.records is not None
            ),
            default=0,
        ),
        few=run.few_tokens,
        experts_by_layer=tuple(len(extents) for extents in experts),
        experts_per_tok=moe.num_experts_per_tok if moe else 0,
    )
