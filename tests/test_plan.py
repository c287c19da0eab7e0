"""The memory plan: within the budget at every size, monotone, and refusing with the least that would do."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashinfer_cli.config import FEW_TOKENS, MiB
from flashinfer_cli.errors import BudgetError
from flashinfer_cli.models.sizes import REQUEST_BYTES, slots_first
from flashinfer_cli.plan import RESERVE_LATE, RING_LEAST, RING_SLICES, MemoryPlan, Sizes, make_plan, spread

PROCESS = 300 * MiB


def plan(sizes: Sizes, budget: int, stream: str = "auto", context: int = 1000, chunk: int = 512) -> MemoryPlan:
    return make_plan(
        sizes, budget=budget, process=PROCESS, peak_so_far=PROCESS, context=context, chunk=chunk, stream=stream
    )


def dense(count: int = 300) -> Sizes:
    return Sizes(
        always=MiB,
        slices=(2 * MiB,) * count,
        kv_per_token=30_000,
        scratch=lambda chunk: chunk * 100_000,
        table=50 * MiB,
    )


MOE = Sizes(
    always=MiB, slices=(2 * MiB,) * 50, kv_per_token=30_000, scratch=lambda chunk: chunk * 100_000,
    expert=5 * MiB, experts_by_layer=(16,) * 8, experts_per_tok=4,
)  # fmt: skip


@pytest.mark.parametrize("sizes", [dense(), MOE], ids=["dense", "moe"])
@given(extra=st.integers(0, 2500))
def test_parts_never_exceed_the_budget(sizes: Sizes, extra: int) -> None:
    with pytest.raises(BudgetError) as refused:
        plan(sizes, PROCESS)
    budget = refused.value.least + extra * MiB
    made = plan(sizes, budget)
    assert sum(part.planned for part in made.parts) <= budget
    assert made.resident_bytes + made.streamed_bytes >= sum(sizes.slices)
    if not made.everything_fits and any(not p for p in made.pinned):
        assert made.ring_bytes >= max(sizes.slices)


def test_the_least_is_the_least() -> None:
    with pytest.raises(BudgetError, match="at least") as refused:
        plan(dense(), PROCESS)
    least = refused.value.least
    assert plan(dense(), least).least == least
    with pytest.raises(BudgetError):
        plan(dense(), least - 1)


@pytest.mark.parametrize("sizes", [dense(), MOE, dense(5)], ids=["dense", "moe", "small"])
def test_never_holds_everything_from_its_least_on(sizes: Sizes) -> None:
    with pytest.raises(BudgetError) as refused:
        plan(sizes, 400 * MiB if sizes.slices[5:] else PROCESS + 62 * MiB, stream="never")
    for extra in (0, 1, 10, 100, 1000):
        for stream in ("never", "auto"):
            made = plan(sizes, refused.value.least + extra * MiB, stream=stream)
            assert made.everything_fits and made.table_stays == bool(sizes.table) and made.ring_bytes == 0
            assert sum(part.planned for part in made.parts) <= made.budget


def test_more_memory_never_streams_more() -> None:
    streamed = [plan(dense(), budget * MiB).streamed_bytes for budget in range(450, 1200, 25)]
    assert streamed == sorted(streamed, reverse=True) and streamed[-1] == 0 < streamed[0]


def test_table_stays_only_when_all_else_does() -> None:
    assert plan(dense(), 2000 * MiB).table_stays
    assert not plan(dense(), 800 * MiB).table_stays


def test_always_streams_everything_and_never_refuses() -> None:
    always = plan(dense(), 4000 * MiB, stream="always")
    assert not any(always.pinned) and always.streamed_bytes == 600 * MiB and not always.table_stays
    assert plan(MOE, 4000 * MiB, stream="always").expert_slots == 0
    with pytest.raises(BudgetError, match="never"):
        plan(dense(), 700 * MiB, stream="never")
    assert plan(dense(), 4000 * MiB, stream="never").everything_fits


def test_moe_at_full_memory_keeps_every_expert() -> None:
    made = plan(MOE, 2000 * MiB)
    assert made.expert_slots == 16 * 8 and made.everything_fits
    half = plan(MOE, 900 * MiB)
    assert 0 < half.expert_slots < 16 * 8 and all(half.pinned)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(0, 4000))
def test_spread_keeps_within_and_fills(sizes: list[int], room: int) -> None:
    chosen = spread(sizes, room)
    kept = sum(s for s, c in zip(sizes, chosen, strict=True) if c)
    assert kept <= room or all(chosen)
    assert all(chosen) == (room >= sum(sizes))


def test_spread_is_even() -> None:
    chosen = spread([10] * 100, 500)
    assert all(sum(chosen[i : i + 10]) == 5 for i in range(0, 100, 10))


def sparse(count: int = 40) -> Sizes:
    """Every second slice is of neurons that predictors name, 8 MiB each."""
    return Sizes(
        always=MiB, slices=(8 * MiB,) * count, kv_per_token=30_000, scratch=lambda chunk: chunk * 100_000,
        seldom=tuple(i % 2 == 1 for i in range(count)), demand=64 * MiB, neurons=count // 2 * 8 * MiB,
        neuron_block=8 * MiB,
    )  # fmt: skip


def test_what_every_token_needs_stays_before_anything_is_read_ahead() -> None:
    """Where neurons are read on demand, a ring for the rest is of use only while the rest does not fit."""
    sizes = sparse()
    often = sum(size for size, seldom in zip(sizes.slices, sizes.seldom, strict=True) if not seldom)
    with pytest.raises(BudgetError) as refused:
        plan(sizes, PROCESS)
    whole = False
    for budget in range(refused.value.least, refused.value.least + 700 * MiB, 4 * MiB):
        made = plan(sizes, budget)
        assert sum(part.planned for part in made.parts) <= budget
        stays = all(kept for kept, seldom in zip(made.pinned, sizes.seldom, strict=True) if not seldom)
        assert stays >= whole, "more memory, and less of it stays"
        whole = stays
        assert made.everything_fits or made.demand_bytes >= 16 * MiB
        assert (made.ring_bytes == 0) == stays
        if stays and not made.everything_fits:  # nothing was left lying about
            free = budget - sum(part.planned for part in made.parts)
            assert free < 8 * MiB or made.neuron_bytes == sizes.neurons
        if budget < refused.value.least + often - 64 * MiB:
            assert not stays
    assert whole


def test_a_prompts_memory_is_for_neurons_behind_it() -> None:
    """All that a prompt reads ahead and computes in, but for what a few tokens need, and a part of the reserve."""
    sizes = sparse()
    with pytest.raises(BudgetError) as refused:
        plan(sizes, PROCESS)
    for extra in (150, 190, 220):
        made = plan(sizes, refused.value.least + extra * MiB)
        assert 0 < made.neuron_bytes + made.late_bytes < sizes.neurons
        lent = made.demand_bytes + sizes.scratch(made.chunk) - sizes.scratch(min(made.chunk, FEW_TOKENS))
        assert made.late_bytes == lent + RESERVE_LATE
    assert plan(sizes, refused.value.least + 1000 * MiB).late_bytes == 0  # all stay in any case


def test_neurons_have_slots_before_slices_stay() -> None:
    """As many as are asked for, where a third of the room is enough for them; with what a prompt gives back."""
    sizes = sparse()
    with pytest.raises(BudgetError) as refused:
        plan(sizes, PROCESS)
    budget = refused.value.least + 110 * MiB
    none = plan(sizes, budget)
    lent = none.late_bytes - RESERVE_LATE
    assert none.neuron_bytes < 8 * MiB  # what is left over
    room = none.neuron_bytes + none.resident_bytes - sizes.always
    for asked, least in ((lent, 0), (lent + 20 * MiB, 20 * MiB), (sizes.neurons, room // 3)):
        made = plan(replace(sizes, slots_first=asked), budget)
        assert least <= made.neuron_bytes < least + 8 * MiB  # to which the slice adds that found no room
        assert made.neuron_bytes + made.resident_bytes <= none.neuron_bytes + none.resident_bytes
    for width in (512, 5120, 8192, 24576):  # the last of them saves as long a read as a slice would
        last = slots_first(1000, width)
        assert math.exp(-last / 1000) * (width + REQUEST_BYTES) == pytest.approx(width)


def test_a_ring_beside_neurons_is_short() -> None:
    def ring(sizes: Sizes) -> int:
        with pytest.raises(BudgetError) as refused:
            plan(sizes, PROCESS)
        return plan(sizes, refused.value.least + 110 * MiB).ring_bytes

    dense_of_the_same = Sizes(MiB, (8 * MiB,) * 40, 30_000, lambda chunk: chunk * 100_000)
    assert ring(sparse()) == RING_LEAST * 8 * MiB < ring(dense_of_the_same) <= RING_SLICES * 8 * MiB
