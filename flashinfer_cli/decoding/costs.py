"""What a run of drafts brings by the formula of 2211.17192, and what a pass that checks it was seen to cost."""

from __future__ import annotations

from dataclasses import dataclass

FADE = 0.9  # of the past, in running means
MOST_SURPRISE = 2.0  # times what a pass was expected to cost: what is above is taken for this
RIDGE = 1.0  # of what is believed of the slope, in squared tokens of spread: a run of five among ten passes weighs 1.4


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens a pass brings: (1 - a^(g + 1)) / (1 - a)."""
    if acceptance >= 1:
        return drafted + 1.0
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def expected_speedup(acceptance: float, drafted: int, cost: float) -> float:
    """Against plain decoding, with a draft step that costs `cost` of a target pass: the paper's Theorem 3.8."""
    return expected_tokens(acceptance, drafted) / (drafted * cost + 1)


@dataclass
class Costs:
    """Seconds of a pass over n tokens, as a line through running means: c (1 + slope (n - 1)).

    Each run that was drafted moves the slope from what was believed of it (`slope` at first) towards the line, the
    more the more its length differs from others': one stall is no slope. What a run costs is so not forgotten
    where none was drafted for a while.
    """

    slope: float = 0.0
    weight: float = 0.0
    n: float = 0.0
    seconds: float = 0.0
    nn: float = 0.0
    ns: float = 0.0

    def add(self, n: int, seconds: float) -> None:
        if self.weight > 2:  # somebody else's work on this machine shall not look like the price of a longer run
            seconds = min(seconds, MOST_SURPRISE * self.of(n))
        self.weight = FADE * self.weight + 1
        self.n = FADE * self.n + n
        self.seconds = FADE * self.seconds + seconds
        self.nn = FADE * self.nn + n * n
        self.ns = FADE * self.ns + n * seconds
        if n > 1:
            mean_n = self.n / self.weight
            spread = self.nn / self.weight - mean_n**2
            each = (self.ns - mean_n * self.seconds) / self.weight / self.of(1)
            self.slope = max(0.0, (each + RIDGE * self.slope) / (spread + RIDGE))

    def of(self, n: int) -> float:
        """The line at n."""
        mean_n, mean = self.n / self.weight, self.seconds / self.weight
        return mean * (1 + self.slope * (n - 1)) / (1 + self.slope * (mean_n - 1))
