"""How many experts to fetch ahead of need (2312.17238, speculative loading), and whether it pays at all.

A guess costs nothing while the drive would be idle, and a demanded read never waits behind one that has not begun. So
the number grows as long as guesses of that rank are right often enough and have begun by the time they are needed,
which is what idle time on the drive looks like. Whether all of it helps is settled by a trial: some decode passes go
without guesses, and the faster way stays: soon where guessing is plainly faster. That it is slower is believed at the
end only: a few passes on a busy drive may show anything, and what is off stays off.
"""

from __future__ import annotations

from statistics import median
from typing import Any

RIGHT = 0.4  # of the guesses of a rank must be needed
BEGUN = 0.5  # of them must have begun by then
PACE = 0.05  # weight of the newest observation in an average
EXPLORE = 16  # every so many times one more than the number is tried

WARM = 24  # decode passes before the trial: a short text is not worth one
ROUND, WITHOUT = 8, 2  # passes of a round, and how many of them, its last, go without guesses
ROUNDS = 6
SOON, PLAIN = 2, 1.1  # rounds after which no more are needed where passes without take so many times as long


class Guessing:
    """`setting` is "auto", "off" or a number of guesses a layer; `most` is what the slots and the router allow."""

    def __init__(self, setting: str | int, most: int) -> None:
        self.setting = setting
        self.most = 0 if setting == "off" else min(most, setting) if isinstance(setting, int) else most
        self._right = [1.0] * self.most
        self._begun = [1.0] * self.most
        self._times = 0
        self._passes = 0
        self._ended = False
        self._seconds: tuple[list[float], list[float]] = ([], [])  # of passes without and with guesses
        self._on = True

    @property
    def trying(self) -> bool:
        return self.setting == "auto" and self.most > 0 and not self._ended

    @property
    def active(self) -> bool:
        """Are guesses to be made now; where not, not even the router is asked."""
        return self._on and self.most > 0

    def begin(self, seconds: float | None) -> None:
        """A decode pass begins; the one before took so long."""
        if not self.trying:
            return
        since = self._passes - WARM
        if since > 0 and seconds is not None:
            self._seconds[self._on].append(seconds)
        self._passes += 1
        self._on = since < 0 or since % ROUND < ROUND - WITHOUT
        if since > 0 and since % ROUND == 0:
            without, with_ = (median(each) if each else 0.0 for each in self._seconds)
            plain = since >= SOON * ROUND and without > PLAIN * with_
            self._ended = since >= ROUNDS * ROUND or plain
            if self._ended:
                self._on = with_ <= without

    def number(self) -> int:
        """Guesses to fetch now, of the best."""
        if not self.active:
            return 0
        if self.setting != "auto":
            return self.most
        steady = 0
        while steady < self.most and self._right[steady] >= RIGHT and self._begun[steady] >= BEGUN:
            steady += 1
        self._times += 1
        return min(self.most, steady + (self._times % EXPLORE == 0))

    def settle(self, rank: int, right: bool, begun: bool) -> None:
        """What came of a guess: was it needed, and had its read begun when that was known."""
        if rank < self.most:
            self._right[rank] += PACE * (right - self._right[rank])
            self._begun[rank] += PACE * (begun - self._begun[rank])

    def verdict(self) -> dict[str, Any]:
        """For the report: is it on, and what the trial measured (seconds a pass, medians; None before its end)."""
        ended = self.setting == "auto" and self.most > 0 and not self.trying
        without, with_ = (median(each) if ended and each else None for each in self._seconds)
        if self.most == 0:
            verdict = "off" if self.setting == "off" else "off: nothing to fetch, or no slot to spare"
        elif self.setting != "auto":
            verdict = "on, as asked"
        elif not ended:
            verdict = "on: too short a run to tell whether it helps"
        else:
            verdict = "on: faster than without" if self._on else "off: slower than without"
        return {
            "setting": self.setting, "verdict": verdict, "on": self.active, "most": self.most,
            "seconds_without": without, "seconds_with": with_,
            "right_by_rank": [round(each, 3) for each in self._right],
            "begun_by_rank": [round(each, 3) for each in self._begun],
        }  # fmt: skip
