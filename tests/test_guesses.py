"""How many experts are guessed ahead, and the trial of whether it pays."""

from __future__ import annotations

import pytest

from flashinfer_cli.cache.guesses import ROUND, ROUNDS, SOON, WARM, WITHOUT, Guessing


def times(guessing: Guessing, without: float, with_: float) -> None:
    guessing.begin(None)
    for _ in range(WARM + ROUNDS * ROUND + 5):
        guessing.begin(with_ if guessing._on else without)


@pytest.mark.parametrize(("with_", "on"), [(0.9, True), (1.1, False)])
def test_the_trial_keeps_what_is_faster(with_: float, on: bool) -> None:
    guessing = Guessing("auto", 3)
    times(guessing, 1.0, with_)
    found = guessing.verdict()
    assert found["on"] is on and (guessing.number() > 0) is on
    assert (found["seconds_without"], found["seconds_with"]) == (1.0, with_)


def test_the_trial_ends_early_where_guesses_plainly_help() -> None:
    for with_, passes in ((0.8, SOON * ROUND), (0.95, ROUNDS * ROUND), (1.3, ROUNDS * ROUND)):
        guessing, begun = Guessing("auto", 3), 0
        while guessing.trying:
            guessing.begin(with_ if guessing._on else 1.0)
            begun += 1
        assert begun == WARM + passes + 1 and guessing.active is (with_ < 1)


def test_the_trial_takes_turns() -> None:
    guessing, states = Guessing("auto", 3), []
    for _ in range(WARM + ROUNDS * ROUND):
        guessing.begin(1.0)
        states.append(guessing._on)
    assert all(states[:WARM]) and states[WARM:] == ([True] * (ROUND - WITHOUT) + [False] * WITHOUT) * ROUNDS


def test_a_number_that_is_asked_for_stays() -> None:
    guessing = Guessing(2, 5)
    times(guessing, 1.0, 2.0)
    for _ in range(100):
        guessing.settle(0, False, False)
    assert guessing.number() == 2 and Guessing("off", 5).number() == 0 and Guessing(9, 5).number() == 5


def test_the_number_follows_what_comes_of_guesses() -> None:
    guessing = Guessing("auto", 4)
    numbers = []
    for _ in range(200):
        numbers.append(guessing.number())
        for rank in range(numbers[-1]):
            guessing.settle(rank, rank < 2, True)
    assert max(numbers[100:]) == 3 and sorted(numbers[100:])[50] == 2  # tried again now and then
    for _ in range(200):
        guessing.settle(0, True, False)  # right, but the drive had no time to begin
    assert sorted(guessing.number() for _ in range(50))[25] == 0
