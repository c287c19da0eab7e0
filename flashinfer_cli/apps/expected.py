"""Tokens a second to expect of a replayed policy, from what the recorded run measured.

A token takes the larger of its reading, and of computing with the part of the reading that is waited for:

    reading = slower * (missed bytes / rate of records + other bytes / rate of slices)
    seconds = max(reading, computing + waited * reading)

Of the recorded run come `computing` (all of its time but waiting), `slower` (how much longer its reads took than the
drive alone needs for what was missed: waste, gaps, short queues), and `waited` (the share of reading that stalled it);
so what ran is given the time that it took. It is assumed that these three are the same at every size and with every
policy, and that reads are one queue. Where nothing was read, `slower` and `waited` are 1: no read is hidden. First uses
count as misses, so a short trace says less than a long run would make.

Slots are taken from the process' budget, and the plan has slices stay before most records: so a size goes with the
least budget whose plan has as many slots, and with what streams under that plan. Without plans slots are memory beside
all else, and as many slices stream as did.
"""

from __future__ import annotations

from ..cache.trace import Measured


class Expected:
    """What a token costs. `missed`: bytes a token that the recorded run missed, by its own policy and room."""

    def __init__(self, measured: Measured, missed: float) -> None:
        self.measured = measured
        self.other = measured.other_bytes / measured.tokens
        read, waited = (seconds / measured.tokens for seconds in (measured.read_seconds, measured.wait_seconds))
        alone = self._alone(missed, self.other)
        known = alone > 0 and read > 0
        self.slower = read / alone if known else 1.0
        self.waited = waited / read if known else 1.0
        self.computing = max(0.0, measured.seconds / measured.tokens - waited)

    def _alone(self, missed: float, other: float) -> float:
        """Seconds that the drive alone needs for so many bytes."""
        return missed / self.measured.record_rate + other / self.measured.other_rate

    def memory(self, slots: int) -> int | None:
        """Bytes of the least process whose plan has so many slots; None where that is not known."""
        found = self._plan(slots)
        return None if found is None else round(found[0])

    def tokens_per_second(self, missed: float, slots: int | None = None) -> float:
        """Of a policy that misses so many bytes a token with so many slots; without `slots` under the plan that ran."""
        other, found = self.other, None if slots is None else self._plan(slots)
        if found is not None:
            passes = self.measured.passes / self.measured.tokens
            other = max(0.0, other + passes * (found[1] - self.measured.streamed))
        reading = self.slower * self._alone(missed, other)
        return 1 / max(reading, self.computing + self.waited * reading, 1e-9)

    def _plan(self, slots: int) -> tuple[float, float] | None:
        """(bytes of the process, bytes of slices that stream a pass), between the two plans beside so many slots."""
        plans = self.measured.plans
        above = next((place for place, plan in enumerate(plans) if plan[1] >= slots), None)
        if above is None:
            return None
        memory, room, streamed = plans[above]
        if above == 0:
            return memory, streamed
        below = plans[above - 1]
        part = (slots - below[1]) / (room - below[1])
        return below[0] + part * (memory - below[0]), below[2] + part * (streamed - below[2])
