"""One byte budget over everything: the process itself, what always stays, caches, keys and values, scratch.

The plan is made before anything is loaded and refuses what cannot fit, naming the least that would. Which slices stay
is spread evenly over the forward pass, so that reading and computing alternate at a steady rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .config import FEW_TOKENS, MiB, format_size
from .errors import BudgetError
from .report import PlanPart

RESERVE = 24 * MiB  # what no part accounts for: thread stacks, Python objects, fragments
RESERVE_LATE = 4 * MiB  # of it, what neurons have behind a prompt, when most of what there may be has come
RING_SLICES = 6  # the ring wanted, in slices of the largest size; beside neurons, which go first, the least will do
RING_LEAST = 2  # one in use, one on its way
CHUNK_LEAST = 16


@dataclass(frozen=True)
class Sizes:
    """What a model asks for, in bytes.

    `slices` are the spans of all slices in forward order; `always` is what stays in any case (norms, biases, routers);
    `scratch` gives the working memory of a chunk of so many tokens. `seldom` says of each slice whether most tokens do
    without it, and `demand` is the largest block of such slices.
    """

    always: int
    slices: tuple[int, ...]
    kv_per_token: int
    scratch: Callable[[int], int]
    kept: str = "f32"  # how keys and values are
    seldom: tuple[bool, ...] = ()
    demand: int = 0
    neurons: int = 0  # records of layers that have predictors: they take slots instead of being pinned
    neuron_block: int = 0  # the neurons of a token, gathered
    few: int = FEW_TOKENS  # of a pass that leaves to neurons what a prompt's pass would take
    slots_first: int = 0  # of the neurons, what has slots before slices stay, where not all of these do
    order: tuple[int, ...] = ()  # places in `slices`, what stays first; where given, in place of an even spread
    table: int = 0  # an embedding table apart from the head; its rows can be read by token instead
    expert: int = 0  # one slot
    experts_by_layer: tuple[int, ...] = ()  # number of experts of each MoE layer
    experts_per_tok: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """What goes where. Sizes are bytes; `pinned` says for each slice, in forward order, whether it stays."""

    budget: int
    least: int
    context: int
    chunk: int
    pinned: tuple[bool, ...]
    ring_bytes: int
    neuron_bytes: int  # slots for neurons that predictors ask for; 0 where they are pinned or there are no predictors
    late_bytes: int  # more of these slots, where a prompt under way has its ring and scratch
    demand_bytes: int  # a second ring, for slices that are asked for when a token turns out to need them
    expert_slots: int  # experts that stay, of all layers together
    transit_experts: int  # slots for those on their way, and for guesses
    table_stays: bool
    resident_bytes: int
    streamed_bytes: int
    parts: tuple[PlanPart, ...]

    @property
    def everything_fits(self) -> bool:
        return self.streamed_bytes == 0

    def __str__(self) -> str:
        """The plan in one line."""
        stays, streams = format_size(self.resident_bytes), format_size(self.streamed_bytes)
        what = "all weights stay in memory" if self.everything_fits else f"{stays} of weights stay, {streams} stream"
        return f"{format_size(self.budget)} budget: {what}, context {self.context}"


def spread(sizes: Sequence[int], room: int) -> tuple[bool, ...]:
    """Choose which slices stay within `room` bytes, evenly over their order."""
    total = sum(sizes)
    if room >= total:
        return (True,) * len(sizes)
    share, credit, left = max(room, 0) / total, 0.0, room
    chosen = []
    for size in sizes:
        credit += share * size
        stays = credit >= size and size <= left
        if stays:
            credit -= size
            left -= size
        chosen.append(stays)
    return tuple(chosen)


def pin(sizes: Sizes, room: int) -> tuple[bool, ...]:
    """Which slices stay within `room` bytes: those that every token needs before those that few do."""
    if sizes.order and room < sum(sizes.slices):
        stays = [False] * len(sizes.slices)
        for place in sizes.order:
            stays[place] = sizes.slices[place] <= room
            room -= sizes.slices[place] * stays[place]
        return tuple(stays)
    if not any(sizes.seldom):
        return spread(sizes.slices, room)
    often = [0 if seldom else size for size, seldom in zip(sizes.slices, sizes.seldom, strict=True)]
    rest = [size if seldom else 0 for size, seldom in zip(sizes.slices, sizes.seldom, strict=True)]
    first = spread(often, min(room, sum(often)))
    second = spread(rest, max(0, room - sum(often)))
    return tuple(b if seldom else a for a, b, seldom in zip(first, second, sizes.seldom, strict=True))


def _often(sizes: Sizes) -> int:
    """Bytes of the slices that every token needs, where others come neuron by neuron; else 0."""
    if not sizes.neurons:
        return 0
    return sum(size for size, seldom in zip(sizes.slices, sizes.seldom, strict=True) if not seldom)


def _lent(sizes: Sizes, demand: int, chunk: int) -> int:
    """What neurons have of a prompt's memory behind it."""
    return demand + sizes.scratch(chunk) - sizes.scratch(min(chunk, sizes.few))


def _slots_note(neurons: int, late: int, of: int) -> str:
    more = f", {(neurons + late) / of:.0%} behind a prompt" if late else ""
    return f"{neurons / of:.0%} of them{more}"


def make_plan(
    sizes: Sizes,
    *,
    budget: int,
    process: int,
    peak_so_far: int,
    context: int,
    chunk: int,
    stream: str,
    card: int | None = None,
) -> MemoryPlan:
    """Divide `budget` bytes. `process` is the resident size of the process now, `card` the free bytes of a card's own
    memory.

    Raises BudgetError, naming the least, when even the smallest caches do not fit, or with stream="never" when not
    all does.
    """
    largest = max(sizes.slices, default=0)
    all_slices = sum(sizes.slices)
    num_experts = sum(sizes.experts_by_layer)
    kv = sizes.kv_per_token * context
    demand = min(RING_SLICES * largest, sizes.demand)
    has_experts = num_experts > 0

    def fixed(chunk: int) -> int:
        return process + sizes.always + kv + sizes.scratch(chunk) + RESERVE + demand + sizes.neuron_block

    # The smallest run that works: everything streams, a short ring, one expert at a time, few tokens at once.
    least_chunk = min(chunk, CHUNK_LEAST)
    least = max(fixed(least_chunk) + min(RING_LEAST * largest, all_slices) + sizes.expert, peak_so_far)
    whole = fixed(least_chunk) + all_slices + sizes.table + (num_experts + has_experts) * sizes.expert
    if budget < least:
        raise BudgetError(
            f"The memory budget of {format_size(budget)} is too small: this model needs at least "
            f"{format_size(least)} with a context of {context} tokens.",
            f"Give --memory {-(-least // MiB)}MiB or more" + (", or a smaller --context." if kv > 16 * MiB else "."),
            least=least,
        )
    if stream == "never" and budget < whole:
        raise BudgetError(
            f"The model does not fit: with --stream never it needs {format_size(whole)}, "
            f"and the budget is {format_size(budget)}.",
            f"Give --memory {-(-whole // MiB)}MiB or more, or let it stream with --stream auto.",
            least=whole,
        )

    # Everything if it fits; else tokens at once first (each halving doubles the reads of a long prompt) from half of
    # what is to spare, then a longer ring, then what may stay.
    always = stream == "always"
    ring = min(RING_LEAST * largest, all_slices)
    transit = 1 if has_experts else 0
    fits = budget >= whole and not always
    others = whole - fixed(least_chunk) if fits else ring + transit * sizes.expert + (budget - least) // 2
    while chunk > least_chunk and fixed(chunk) + others > budget:
        chunk = max(least_chunk, chunk // 2)
    if sizes.neurons and card is None and not always:
        # Bytes that every token would read cost more than those that a prompt reads once more.
        often, least_ring = _often(sizes), min(demand, RING_LEAST * largest)
        while chunk > FEW_TOKENS and fixed(chunk) - demand + least_ring + often > budget >= (
            fixed(least_chunk) - demand + least_ring + often
        ):
            chunk = max(FEW_TOKENS, chunk // 2)
    left = budget - fixed(chunk) - transit * sizes.expert
    room = left if card is None else card - kv - sizes.always - sizes.scratch(chunk) - RESERVE
    pinned: tuple[bool, ...] = (False,) * len(sizes.slices)
    slots = 0
    if always:
        left -= ring
    elif room >= all_slices:
        pinned, ring, demand = (True,) * len(sizes.slices), 0, 0
        left -= all_slices if card is None else 0
    else:
        often = _often(sizes)
        spare = max(0, demand - RING_LEAST * largest)
        if sizes.neurons and often <= left + spare:
            # Nothing streams but prompts' neurons: all that every token needs stays, if need be at the cost of how far
            # those are read ahead, for which a quarter of what is left is enough; the rest is for neurons.
            extra = left + spare - often
            kept = min(spare, extra // 4)
            demand, left = demand - spare + kept, left + spare - kept
            ring, more, seldom_room = 0, 0, often
        else:
            if sizes.neurons:  # every token's slices before those of prompts
                demand, left = demand - spare, left + spare
            left -= ring
            more = 0 if sizes.neurons else min(max(0, RING_SLICES * largest - ring), left // 4)
            seldom_room = room if card is not None else left - more
            if card is None:
                seldom_room -= min(max(0, sizes.slots_first - _lent(sizes, demand, chunk)), seldom_room // 3)
        ring, left = ring + more, left - more
        if sizes.neurons:  # what every token needs first, then as many neurons as there is room for
            seldom_room = min(seldom_room, often)
        pinned = pin(sizes, seldom_room)
        left -= sum(s for s, p in zip(sizes.slices, pinned, strict=True) if p) if card is None else 0
    neurons = late = 0
    if sizes.neurons and not all(pinned) and not always:
        neurons = min(sizes.neurons, max(0, left))
        left -= neurons
        late = min(sizes.neurons - neurons, _lent(sizes, demand, chunk) + RESERVE_LATE)
    if has_experts and not always and left >= num_experts * sizes.expert:
        slots = num_experts
    elif has_experts:
        # What one token asks of a layer may be on its way, beside one that is computed and some of the next layer: to
        # read on meanwhile is worth more than the few that could stay of many.
        k = sizes.experts_per_tok
        more = min(max(k + 1, 3 * k // 2 - 1), max(0, 3 * left // 4 // sizes.expert))
        transit, left = transit + more, left - more * sizes.expert
        slots = 0 if always else min(num_experts, max(0, left) // sizes.expert)

    kept = sum(s for s, p in zip(sizes.slices, pinned, strict=True) if p)
    in_full = all(pinned) and not always and slots == num_experts
    left -= slots * sizes.expert
    table_stays = in_full and 0 < sizes.table <= (left if card is None else room - all_slices)
    expert_bytes = slots * sizes.expert
    streamed = all_slices - kept + (num_experts - slots) * sizes.expert
    parts = [
        PlanPart("process", process, note="interpreter, libraries, tokenizer"),
        PlanPart("always resident", sizes.always, note="norms, biases, routers"),
        PlanPart("pinned weights", kept + sizes.table * table_stays, note=f"{sum(pinned)} of {len(pinned)} slices"),
        PlanPart(
            "streaming ring", ring + demand, note="read ahead while computing" if ring else "nothing streams through it"
        ),
        PlanPart("keys and values", kv, note=f"{context} tokens, {sizes.kept}"),
        PlanPart("scratch", sizes.scratch(chunk), note=f"{chunk} tokens at once"),
        PlanPart("reserve", RESERVE),
    ]
    if neurons:
        parts.insert(
            4, PlanPart("neuron slots", neurons + sizes.neuron_block, note=_slots_note(neurons, late, sizes.neurons))
        )
    if has_experts:
        note = f"{slots} of {num_experts}, {transit} on their way"
        parts.insert(4, PlanPart("expert slots", expert_bytes + transit * sizes.expert, note=note))
    return MemoryPlan(
        budget=budget,
        least=least,
        context=context,
        chunk=chunk,
        pinned=pinned,
        ring_bytes=ring,
        neuron_bytes=neurons,
        late_bytes=late,
        demand_bytes=demand,
        expert_slots=slots,
        transit_experts=transit,
        table_stays=table_stays,
        resident_bytes=sizes.always + kept + expert_bytes + sizes.table * table_stays,
        streamed_bytes=streamed,
        parts=tuple(parts),
    )
