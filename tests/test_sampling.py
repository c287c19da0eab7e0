"""Sampling is what transformers samples; stop strings never show."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flashinfer_cli.config import SamplingParams
from flashinfer_cli.decoding.sampling import (
    Sampler,
    apply_repeat_penalty,
    make_sampler,
    min_p,
    temperature,
    top_k,
    top_p,
)
from flashinfer_cli.decoding.stopping import StopMatcher
from flashinfer_cli.errors import GenaiRunError

V = 37
RECENT = [0, 3, 3, 17, 36]


def logits_like(kind: str, rows: int = 4) -> torch.Tensor:
    """[rows, V]: random ones, ones with many ties, and ones with most tokens forbidden."""
    made = torch.randn(rows, V, generator=torch.Generator().manual_seed(7)) * 4
    if kind == "ties":
        return made.round()
    if kind == "forbidden":
        return made.masked_fill(torch.arange(V) % 3 != 0, -torch.inf)
    return made


def sampler(**params: float) -> Sampler:
    return make_sampler(SamplingParams(**{"temperature": 1.0, **params}).resolved())  # type: ignore[arg-type]


def test_unset_parameters_are_greedy() -> None:
    assert make_sampler(SamplingParams().resolved()).greedy


# ---- against transformers


@pytest.mark.parametrize("kind", ["random", "ties", "forbidden"])
def test_each_filter_is_transformers(kind: str) -> None:
    logits = logits_like(kind)
    ids = torch.tensor([RECENT] * len(logits))
    pairs = [
        (apply_repeat_penalty(logits, RECENT, 1.3), RepetitionPenaltyLogitsProcessor(1.3)),
        (apply_repeat_penalty(logits, RECENT, 0.7), RepetitionPenaltyLogitsProcessor(0.7)),
        (temperature(logits, 0.3), TemperatureLogitsWarper(0.3)),
        *((top_k(logits, k), TopKLogitsWarper(k)) for k in (1, 2, 5, V, V + 100)),
        *((top_p(logits, p), TopPLogitsWarper(p)) for p in (1e-9, 0.1, 0.5, 0.9, 0.999)),
        *((min_p(logits, p), MinPLogitsWarper(p)) for p in (1e-4, 0.05, 0.5, 1.0)),
    ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs(ids, logits), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["random", "ties", "forbidden"])
@pytest.mark.parametrize(
    ("heat", "k", "p", "least", "penalty"), list(product((0.7, 1.5), (0, 6), (0.8, 1.0), (0.0, 0.1), (1.0, 1.2)))
)
def test_the_whole_is_transformers_in_its_order(
    kind: str, heat: float, k: int, p: float, least: float, penalty: float
) -> None:
    theirs = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(heat)])
    theirs += [TopKLogitsWarper(k)] if k else []
    theirs += [TopPLogitsWarper(p), MinPLogitsWarper(least)]
    logits = logits_like(kind)
    expected = theirs(torch.tensor([RECENT] * len(logits)), logits).softmax(-1)
    ours = sampler(temperature=heat, top_k=k, top_p=p, min_p=least, repeat_penalty=penalty)
    torch.testing.assert_close(ours.probs(logits, RECENT), expected, rtol=1e-6, atol=1e-8)
    for row, want in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours.probs(row, RECENT), want, rtol=1e-6, atol=1e-8)


# ---- edges


def test_filters_leave_their_input_alone() -> None:
    logits = logits_like("random")
    before = logits.clone()
    sampler(temperature=0.5, top_k=3, top_p=0.5, min_p=0.2, repeat_penalty=1.5).probs(logits, RECENT)
    assert torch.equal(logits, before)


def test_a_tiny_top_p_keeps_one() -> None:
    probs = sampler(top_p=1e-9).probs(torch.tensor([1.0, 3.0, 2.0]))
    assert probs.tolist() == [0.0, 1.0, 0.0]
    assert (sampler(top_p=1e-9).probs(torch.zeros(5)) > 0).sum() == 1


def test_top_k_keeps_ties_with_the_last() -> None:
    assert (sampler(top_k=2).probs(torch.tensor([5.0, 4.0, 4.0, 1.0])) > 0).tolist() == [True, True, True, False]


def test_token_zero_is_penalised_like_any_other() -> None:
    logits = torch.tensor([2.0, 2.0, -2.0])
    assert apply_repeat_penalty(logits, [0], 2.0).tolist() == [1.0, 2.0, -2.0]
    assert apply_repeat_penalty(logits, [0, 0, 2], 2.0).tolist() == [1.0, 2.0, -4.0]
    assert apply_repeat_penalty(logits, [], 2.0) is logits


def test_each_row_may_have_its_own_past() -> None:
    logits = torch.tensor([[2.0, 4.0], [2.0, 4.0]])
    assert apply_repeat_penalty(logits, [[0], [0, 1]], 2.0).tolist() == [[1.0, 4.0], [1.0, 2.0]]
    assert apply_repeat_penalty(logits, [[], [1]], 2.0).tolist() == [[2.0, 4.0], [2.0, 2.0]]
    both = sampler(temperature=0.0, repeat_penalty=4.0).probs(logits, [[1], []])
    assert both.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(("last", "winner"), [(0, 1), (1, 1), (2, 0), (64, 0), (-1, 0)])
def test_only_the_last_n_are_penalised(last: int, winner: int) -> None:
    params = SamplingParams(repeat_penalty=4.0, repeat_last_n=last).resolved()
    assert make_sampler(params).probs(torch.tensor([2.0, 3.0, 0.0]), [1, 2]).argmax() == winner


def test_temperature_zero_is_the_first_maximum_and_draws_nothing() -> None:
    greedy = sampler(temperature=0.0, top_k=5, top_p=0.5)
    probs = greedy.probs(torch.tensor([[1.0, 7.0, 7.0], [-torch.inf, -torch.inf, -5.0]]))
    assert probs.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    assert greedy.sample(probs[0], generator) == 1
    assert torch.equal(generator.get_state(), state)
    assert sampler(temperature=1e-30).greedy


def test_half_precision_logits_become_float32() -> None:
    for heat in (0.0, 1.0):
        assert sampler(temperature=heat).probs(torch.randn(9).to(torch.bfloat16)).dtype == torch.float32


def test_the_draw_follows_the_generator_and_the_distribution() -> None:
    probs = sampler(top_k=2).probs(torch.tensor([1.0, 0.0, -1.0]))
    draws = [
        sampler().sample(probs, generator) for generator in [torch.Generator().manual_seed(0)] for _ in range(4000)
    ]
    again = [
        sampler().sample(probs, generator) for generator in [torch.Generator().manual_seed(0)] for _ in range(4000)
    ]
    assert draws == again
    assert set(draws) == {0, 1}
    assert draws.count(0) / 4000 == pytest.approx(float(probs[0]), abs=0.03)
    assert isinstance(draws[0], int)


@pytest.mark.parametrize(
    "bad", [torch.full((4,), torch.nan), torch.full((4,), -torch.inf), torch.tensor([1.0, torch.nan])]
)
@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: torch.Tensor, heat: float) -> None:
    with pytest.raises(GenaiRunError, match="finite"):
        sampler(temperature=heat).probs(bad)


# ---- stop strings


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = ""
    for piece in pieces:
        emitted, hit = matcher.push(piece)
        shown += emitted
        if hit:
            return shown, True
    return shown + matcher.flush(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ((), ["any", "thing"], ("anything", False)),
        (("",), ["any"], ("any", False)),
        (("END",), ["one E", "N", "D two"], ("one ", True)),
        (("END",), ["one E", "N", "d two EN"], ("one ENd two EN", False)),
        (("\n\n",), ["a\n", "b\n", "\nc"], ("a\nb", True)),
        (("aab",), ["aa", "aab"], ("aa", True)),  # the held text is itself a false start
        (("abcd", "c"), ["ab", "c", "d"], ("ab", True)),
        (("bc", "abc"), ["xabc"], ("x", True)),
        (("User:",), ["User:"], ("", True)),
        (("😀!",), ["hi 😀", "!"], ("hi ", True)),
    ],
)
def test_stops_by_hand(stops: tuple[str, ...], pieces: list[str], expected: tuple[str, bool]) -> None:
    assert run(stops, pieces) == expected


def test_text_that_cannot_begin_a_stop_comes_at_once() -> None:
    matcher = StopMatcher(("###", "User:"))
    assert [matcher.push(piece)[0] for piece in ("Hello ", "#", "1", " Use", "d")] == ["Hello ", "", "#1", " ", "Used"]
    assert matcher.push("x###y") == ("x", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


LETTERS = st.text("ab\n", max_size=4)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(stops=st.lists(LETTERS, max_size=3).map(tuple), pieces=st.lists(LETTERS, max_size=8))
def test_pieces_do_not_matter_and_no_stop_shows(stops: tuple[str, ...], pieces: list[str]) -> None:
    text = "".join(pieces)
    shown, hit = run(stops, pieces)
    assert (shown, hit) == run(stops, list(text)) == run(stops, [text])
    real = [stop for stop in stops if stop]
    assert hit == any(stop in text for stop in real)
    assert not any(stop in shown for stop in real)
    assert text.startswith(shown)
    if hit:
        assert any(text.startswith(stop, len(shown)) for stop in real)
    else:
        assert shown == text
