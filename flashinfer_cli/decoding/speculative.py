"""Speculative decoding (2211.17192): a draft proposes, the target checks a run of tokens in one pass.

What comes out is distributed as the target's own sampling, whatever the draft; with greedy sampling it is the same
text. A pass over weights that stream from flash costs nearly the same for one token and for sixteen, so a long run
pays where in memory it would not: how long is chosen from what drafting and checking were measured to cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from .sampling import Sampler

MOST_DRAFTED = 16
FADE = 0.9  # of the past, in running means
BELIEF, BELIEVED = 0.7, 3.0  # the acceptance believed of a draft not seen yet, with the weight of so many tokens
TRY_AGAIN = 48  # tokens without drafts, after which some are tried again; twice as many each time that it is in vain
ENOUGH = 4  # drafted tokens judged before a draft is thought to be of no use
LENT = 256  # tokens after which a draft whose memory was lent is looked at again; twice as many each time
MOST_SURPRISE = 2.0  # times what a pass was expected to cost: what is above is taken for this
TRIAL = 4  # tokens of such a trial, and of the first run


class Draft(Protocol):
    """Something that guesses what follows.

    `catching_up`: seconds of the last proposal that went into text that the draft had not read, such as the prompt, and
    that no later proposal will cost again. `repeatable`: the same text gets the same guesses, whatever memory holds.
    """

    catching_up: float
    repeatable: bool

    def propose(
        self, ids: Sequence[int], count: int, sampler: Sampler, generator: torch.Generator
    ) -> tuple[list[int], torch.Tensor | None]:
        """At most `count` tokens behind `ids`, and the float32 probabilities [n, V] they were drawn from.

        None where they were not drawn at all: each was certain.
        """
        ...

    def close(self) -> None: ...


class Lender(Protocol):
    """Can lend a draft's memory to the weights that stream because of it (`lending.Lending`)."""

    @property
    def lent(self) -> bool: ...

    @property
    def share(self) -> float:
        """Of what a pass reads: what it would not read if the memory were lent."""
        ...

    @property
    def wait(self) -> float:
        """Seconds that a pass waits for reading."""
        ...

    def lend(self) -> None: ...
    def take_back(self) -> None: ...


def accept(
    target: Sequence[torch.Tensor], drafted: Sequence[int], q: torch.Tensor | None, sampler: Sampler,
    generator: torch.Generator,
) -> tuple[int, int]:  # fmt: skip
    """Check a run: (how many drafted tokens stand, the token behind them).

    target: float32 [V] a position, len(drafted) + 1 of them: p, under the same sampling as `q` [n, V]. Token x is kept
    with probability min(1, p(x) / q(x)), each with a fresh random number; at the first that is not, a token of
    max(0, p - q), normed, takes its place; behind a run that stands in full one more comes from p (2211.17192, 2.3).
    """
    for index, token in enumerate(drafted):
        p = target[index]
        guess = 1.0 if q is None else float(q[index, token])
        if sampler.greedy:
            kept = float(p[token]) > 0
        else:
            kept = float(torch.rand((), generator=generator)) * guess < float(p[token])
        if kept:
            continue
        rest = p.clone()
        if q is None:
            rest[token] = 0.0
        else:
            rest = (p - q[index]).clamp_(min=0.0)
        total = rest.sum()
        # equal up to rounding: nothing is left over, and p itself is what remains to draw from
        return index, sampler.sample(rest / total if float(total) > 0 else p, generator)
    return len(drafted), sampler.sample(target[len(drafted)], generator)


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
    """Seconds of a pass over n tokens, as a line through running means: a + b n."""

    weight: float = 0.0
    n: float = 0.0
    seconds: float = 0.0
    nn: float = 0.0
    ns: float = 0.0

    def add(self, n: int, seconds: float) -> None:
        if self.weight > 2:  # somebody else's work on this machine shall not look like the price of a longer run
            seconds = min(seconds, MOST_SURPRISE * self.of(n))
        self.weight = FADE * self.weight + 1
        for name, value in (("n", n), ("seconds", seconds), ("nn", n * n), ("ns", n * seconds)):
            setattr(self, name, FADE * getattr(self, name) + value)

    def of(self, n: int) -> float:
        """The line at n; through all points seen at one n, a pass is taken to cost the same for any."""
        mean_n, mean = self.n / self.weight, self.seconds / self.weight
        spread = self.nn / self.weight - mean_n**2
        slope = max(0.0, (self.ns / self.weight - mean_n * mean) / spread) if spread > 0.05 else 0.0
        return max(mean + slope * (n - mean_n), 0.1 * mean)


@dataclass
class Speculator:
    """Decides how many tokens to draft, and keeps the account. `fixed` is that number, None leaves it to the costs."""

    draft: Draft
    name: str
    fixed: int | None = None
    drafted: int = 0
    accepted: int = 0
    judged: int = 0  # drafted tokens that were looked at: none behind a rejected one
    passes: int = 0
    tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    lender: Lender | None = None  # where the draft takes memory that the target could use
    times_lent: int = 0
    _since: int = 0  # drafted tokens judged since the draft came, or came back; or tokens since it left
    _patience: int = TRY_AGAIN
    _kept: float = BELIEF * BELIEVED
    _tried: float = BELIEVED
    _idle: int = 0
    _draft_seconds: float = 0.0
    _draft_tokens: float = 0.0
    _costs: Costs = field(default_factory=Costs)

    @property
    def acceptance(self) -> float:
        """The chance that a drafted token stands, given that those before it did; recent runs count more."""
        return min(0.98, self._kept / self._tried)

    def choose(self, most: int, repeatable: bool = False) -> int:
        """How many tokens to draft now, at most `most`. `repeatable`: whatever the clock says, for a seed that is to
        give the same text again."""
        if self.lender is not None and self.lender.lent:
            if not repeatable and self._since < LENT << (self.times_lent - 1):
                return 0
            self.lender.take_back()
            self._since, self._kept, self._tried = 0, BELIEF * BELIEVED, BELIEVED
        left, most = most, min(most, MOST_DRAFTED)
        if self.fixed is not None or repeatable:
            return max(0, min(TRIAL if self.fixed is None else self.fixed, most))
        if self._idle >= self._patience:
            self._patience *= 2
            return max(0, min(TRIAL, most))
        if not self.judged or self._costs.weight < 1:
            return max(0, min(TRIAL, most))
        a_draft = self._draft_seconds / self._draft_tokens if self._draft_tokens else 0.0
        rates = [
            expected_tokens(self.acceptance, g) / (g * a_draft + self._costs.of(g + 1)) for g in range(max(0, most) + 1)
        ]
        best = max(range(len(rates)), key=rates.__getitem__)
        if left > TRIAL and self._of_no_use(rates[best]):
            assert self.lender is not None
            self.lender.lend()
            self.times_lent += 1
            self._since = 0
            return 0
        if best:
            self._patience = TRY_AGAIN
        return best

    def _of_no_use(self, rate: float) -> bool:
        """Would plain decoding with the draft's memory be faster than `rate` tokens a second, the best beside it."""
        return self.lender is not None and self._since >= ENOUGH and rate * self._plain() < 1

    def _plain(self) -> float:
        """Seconds of a pass over one token without the draft, and without what its memory costs."""
        now = self._costs.of(1) if self._costs.weight else 0.0
        if self.lender is None or self.lender.lent:
            return now
        return now - min(self.lender.share * now, self.lender.wait)

    def note(self, drafted: int, accepted: int, draft_seconds: float, pass_seconds: float) -> None:
        """What a pass cost and brought."""
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += accepted + 1
        self.lengths.append(drafted)
        self._idle = 0 if drafted else self._idle + 1
        self._since += self.lender is not None and self.lender.lent
        self._costs.add(drafted + 1, pass_seconds)
        if drafted:
            judged = accepted + (accepted < drafted)
            self.judged += judged
            self._since += judged
            self._draft_seconds = FADE * self._draft_seconds + draft_seconds
            self._draft_tokens = FADE * self._draft_tokens + drafted
            self._kept = FADE * self._kept + accepted
            self._tried = FADE * self._tried + judged

    def missed(self) -> None:
        """The draft had nothing to say."""
        self._idle = 0

    def report(self) -> dict[str, object]:
        """The account, plain values.

        `acceptance` is the share of drafted tokens that stand, `alpha` that of those judged (the paper's a), and
        `expected_tokens_per_pass` what its formula makes of alpha and the lengths of the runs.
        """
        plain = self._plain()
        alpha = self.accepted / self.judged if self.judged else 0.0
        per_pass = self.tokens / self.passes if self.passes else 0.0
        mean = sum(self.lengths) / len(self.lengths) if self.lengths else 0.0
        a_draft = self._draft_seconds / self._draft_tokens if self._draft_tokens else 0.0
        paid = mean * a_draft + (self._costs.of(round(mean) + 1) if self._costs.weight else 0.0)
        return {
            "draft": self.name,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "passes": self.passes,
            "acceptance": self.accepted / self.drafted if self.drafted else 0.0,
            "alpha": alpha,
            "tokens_per_pass": per_pass,
            "expected_tokens_per_pass": self._expected(alpha),
            "mean_length": mean,
            "lengths": self.lengths[-256:],
            "times_lent": self.times_lent,
            "estimated_speedup": per_pass * plain / paid if paid else 1.0,
        }

    def _expected(self, alpha: float) -> float:
        return sum(expected_tokens(alpha, n) for n in self.lengths) / self.passes if self.passes else 0.0
