"""What drafting is expected to bring: the paper's theorem, and how far to draft by measured costs."""

from __future__ import annotations

import pytest
import torch

from flashinfer_cli.decoding.costs import Costs, expected_speedup, expected_tokens
from flashinfer_cli.decoding.drafts import NGramDraft
from flashinfer_cli.decoding.speculative import RESIDENT, STREAMED, Speculator

# ------------------------------------------------------------------ the arithmetic


@pytest.mark.parametrize(
    ("acceptance", "drafted", "cost", "speedup"),
    [(0.75, 7, 0.02, 3.2), (0.80, 7, 0.04, 3.3), (0.82, 7, 0.11, 2.5), (0.62, 7, 0.02, 2.3), (0.68, 5, 0.04, 2.4),
     (0.71, 3, 0.11, 2.0), (0.65, 5, 0.02, 2.4), (0.73, 5, 0.04, 2.6), (0.74, 3, 0.11, 2.0), (0.53, 5, 0.02, 1.9),
     (0.55, 3, 0.04, 1.8), (0.56, 3, 0.11, 1.6)],
)  # fmt: skip
def test_the_papers_speedups(acceptance, drafted, cost, speedup):
    """2211.17192, T5-XXL with drafts of 77M, 250M and 800M: En-De and CNN/DM, T=0 and T=1; alpha has two digits."""
    least, most = (expected_speedup(acceptance + e, drafted, cost) for e in (-0.005, 0.005))
    assert least - 0.06 < speedup < most + 0.06


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("drafted", [1, 4, 8])
def test_tokens_a_pass(acceptance, drafted):
    """Runs of independent coin tosses bring (1 - a^(g+1)) / (1 - a) tokens."""
    tosses = torch.rand(40_000, drafted, generator=torch.Generator().manual_seed(1)) < acceptance
    brought = tosses.long().cumprod(1).sum(1) + 1
    assert float(brought.float().mean()) == pytest.approx(expected_tokens(acceptance, drafted), rel=0.02)
    assert expected_tokens(1.0, 5) == 6


def simulated(acceptance: float, draft: float, fixed: float, each: float, passes: int = 60) -> list[int]:
    """Lengths that `auto` settles on where drafting costs `draft` a token and a pass fixed + each n."""
    speculator = Speculator(NGramDraft(), "x")
    generator = torch.Generator().manual_seed(2)
    chosen = []
    for _ in range(passes):
        count = speculator.choose(16)
        chosen.append(count)
        kept = 0
        while kept < count and float(torch.rand((), generator=generator)) < acceptance:
            kept += 1
        speculator.note(count, kept, draft * count, fixed + each * (count + 1))
    return chosen


def test_auto_drafts_far_where_a_pass_costs_reading():
    streamed = simulated(0.8, draft=0.02, fixed=1.0, each=0.01)
    resident = simulated(0.8, draft=0.02, fixed=0.02, each=0.05)
    assert sum(streamed[-20:]) / 20 > 6 > 3 > sum(resident[-20:]) / 20


def test_auto_turns_itself_off_and_looks_again():
    useless = simulated(0.05, draft=0.1, fixed=0.5, each=0.3, passes=400)
    assert sum(useless[10:]) < 20 and any(useless[100:])  # a trial now and then
    assert not useless[0]  # what a pass costs by itself is known first


def lost(acceptance: list[float], draft: float, each: float, streams: bool, seed: int) -> float:
    """Speed against plain decoding of a text whose drafts stand with `acceptance`, token by token."""
    speculator = Speculator(NGramDraft(), "x", slope=STREAMED if streams else RESIDENT)
    generator = torch.Generator().manual_seed(seed)
    made, seconds = 0, 0.0
    speculator.begin()
    while made < len(acceptance):
        count, kept = speculator.choose(len(acceptance) - made - 1), 0
        while kept < count and float(torch.rand((), generator=generator)) < acceptance[made + kept]:
            kept += 1
        noise = 1 + 0.2 * float(torch.rand((), generator=generator))
        cost = (1 - each + each * (count + 1)) * noise
        speculator.note(count, kept, draft * count, cost)
        seconds += draft * count + cost / noise
        made += kept + 1
    return made / seconds


@pytest.mark.parametrize(("streams", "each"), [(True, 0.02), (False, 0.25)])
def test_what_auto_may_lose_is_bounded(streams, each):
    """A draft of no use, and one that was good before the text turned: at most a few hundredths, on short texts too."""
    for seed in range(10):
        assert lost([0.0] * 24, 0.01, each, streams, seed) > 0.95
        assert lost([0.2] * 60, 0.01, each, streams, seed) > 0.95
        assert lost([0.95] * 30 + [0.0] * 200, 0.01, each, streams, seed) > 0.97
    assert lost([0.95] * 100, 0.01, each, streams, 1) > (4 if streams else 1.5)


def test_costs_are_a_line():
    costs = Costs()
    for n in (1, 3, 5, 2, 8) * 6:
        costs.add(n, 0.2 + 0.05 * n)
    assert costs.of(16) == pytest.approx(1.0, rel=0.02) and costs.of(1) == pytest.approx(0.25, rel=0.02)
    for _ in range(500):
        costs.add(1, 0.5)  # a slower drive, and no drafts: what a run costs beside one token is still known
    assert costs.of(16) == pytest.approx(2.0, rel=0.02)
    flat = Costs()
    flat.add(4, 1.0)
    assert flat.of(1) == flat.of(9) == pytest.approx(1.0)


def test_what_a_run_costs_is_believed_until_it_is_seen():
    costs = Costs(slope=0.2)
    costs.add(1, 1.0)
    assert costs.of(5) == pytest.approx(1.8)
    costs.add(5, 1.0)  # one cheap run is not believed at once
    assert 1.0 < costs.of(5) < 1.5


def test_a_stall_is_not_the_price_of_a_longer_run():
    costs = Costs()
    for n in (1, 5, 9, 5):
        costs.add(n, 1.0)
    costs.add(9, 30.0)
    assert costs.of(9) < 1.6 and costs.of(1) > 0.8
    for _ in range(40):
        costs.add(9, 4.0)  # but what lasts is believed
    assert costs.of(9) == pytest.approx(4.0, rel=0.05)
