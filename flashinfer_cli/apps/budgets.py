"""What other memory budgets would give a run: how many of its records have slots, and what streams beside them."""

from __future__ import annotations

from collections.abc import Callable

from ..config import MiB
from ..engine import Engine
from ..models.sizes import sizes_of
from ..plan import MemoryPlan, Sizes, make_plan

RUNGS = 64  # budgets that are planned, evenly from the least to where all fits
MOST = 1 << 60  # bytes


def planned_budgets(engine: Engine) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """Bytes of slices that stream a pass under the plan of this run, and (bytes of the process, records that have
    slots, bytes of slices that stream a pass) of up to RUNGS others, the least budget first, with its context and
    draft. No others on a card, whose memory is another budget."""
    run, plan = engine.run, engine.plan
    known = engine.sparsity.layers if engine.sparsity is not None else ()
    sizes = sizes_of(engine.layout, engine.config, run, {layer.layer: layer.predicted for layer in known})
    if engine.device.card_memory() is not None:
        return streamed(sizes, plan), ()
    process = next(part.planned for part in plan.parts if part.part == "process")
    context = run.context or plan.context

    def at(budget: int) -> MemoryPlan:
        return make_plan(
            sizes,
            budget=budget,
            process=process,
            peak_so_far=0,
            context=context,
            chunk=min(run.prefill_chunk, context),
            stream="auto",
        )

    whole = _least(lambda budget: at(budget).everything_fits, plan.least)
    budgets = sorted({plan.least + (whole - plan.least) * i // (RUNGS - 1) for i in range(RUNGS)})
    plans = [(budget, at(budget)) for budget in budgets]
    others = tuple((budget, _slots(found, sizes, engine), streamed(sizes, found)) for budget, found in plans)
    return streamed(sizes, plan), others


def streamed(sizes: Sizes, plan: MemoryPlan) -> int:
    """Bytes of slices that stream in every pass: those that do not stay, without what few tokens ask for."""
    seldom = sizes.seldom or (False,) * len(sizes.slices)
    rows = zip(sizes.slices, plan.pinned, seldom, strict=True)
    return sum(size for size, stays, some in rows if not stays and not some)


def _slots(plan: MemoryPlan, sizes: Sizes, engine: Engine) -> int:
    """Records that have slots behind a prompt."""
    if not sizes.neurons:
        return plan.expert_slots
    count = sum(layout.count for layout in engine.neuron_records.values())
    if all(plan.pinned):
        return count
    return (plan.neuron_bytes + plan.late_bytes) * count // sizes.neurons


def _least(enough: Callable[[int], bool], low: int) -> int:
    """The least budget from `low` on that is enough, to a MiB above."""
    high = low
    while not enough(high) and high < MOST:
        high *= 2
    while high - low > MiB:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
