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

from .costs import FADE, Costs, expected_tokens
from .judging import Second
from .sampling import Sampler

MOST_DRAFTED = 16
SECOND = 0.3  # believed of a second guess, where the first fell
BELIEVED = 3.0  # so many tokens weighs what is believed of the acceptance of a draft not seen yet
TRY_AGAIN = 48  # tokens without drafts, after which some are tried again; twice as many each time that it is in vain
ENOUGH = 4  # drafted tokens judged before a draft is thought to be of no use
LENT = 256  # tokens after which a draft whose memory was lent is looked at again; twice as many each time
TRIAL = 4  # tokens of such a trial, and of the first run
# Passes that one more token is believed to cost: where all is read anyway, where all is in memory, and where each
# token asks for experts or neurons of its own.
STREAMED, RESIDENT, ON_DEMAND = 0.02, 0.25, 0.5
MAY_LOSE, AND_SHARE = 0.5, 0.01  # passes that drafts may lose in a text, and the share of its passes besides
MOST_SPARE = 1.0  # passes gained that later losses are set against; and passes lost that must first be made good


class Draft(Protocol):
    """Something that guesses what follows.

    `catching_up`: seconds of the last proposal that went into text that the draft had not read, such as the prompt, and
    that no later proposal will cost again. `repeatable`: the same text gets the same guesses, whatever memory holds.
    `belief`: the acceptance to expect before any is seen, `step`: the passes of the target that a token is expected to
    cost. `seconds`: of the last proposal, a second guess for each of
    its first places, where the draft is asked for them.
    """

    catching_up: float
    belief: float
    step: float
    repeatable: bool

    @property
    def seconds(self) -> Sequence[Second]: ...

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


@dataclass
class Speculator:
    """Decides how many tokens to draft, and keeps the account. `fixed` is that number, None leaves it to the costs.

    `slope`: passes that one more token of a pass is believed to cost, until that is measured.
    """

    draft: Draft
    name: str
    fixed: int | None = None
    slope: float = STREAMED
    width: int = 0  # places at the front of a run that have a second guess
    drafted: int = 0
    accepted: int = 0
    judged: int = 0  # drafted tokens that were looked at: none behind a rejected one
    passes: int = 0
    tokens: int = 0
    lengths: list[int] = field(default_factory=list)
    rescued: int = 0  # second guesses that stand
    lender: Lender | None = None  # where the draft takes memory that the target could use
    times_lent: int = 0
    _since: int = 0  # drafted tokens judged since the draft came, or came back; or tokens since it left
    _patience: int = TRY_AGAIN
    _kept: float = 0.0
    _tried: float = 0.0
    _second: float = SECOND * BELIEVED
    _seconds_tried: float = BELIEVED
    _idle: int = 0
    _off: bool = False  # the last judgement was that drafting does not pay
    _trial: bool = False
    _spare: float = MAY_LOSE  # passes that drafts may still lose: what is allowed, and what they gained
    _draft_seconds: float = 0.0
    _draft_tokens: float = 0.0
    _costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        self._costs.slope = self.slope
        self._kept, self._tried = self.draft.belief * BELIEVED, BELIEVED

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
            self._since, self._kept, self._tried = 0, self.draft.belief * BELIEVED, BELIEVED
        left, most = most, max(0, min(most, MOST_DRAFTED))
        if self.fixed is not None or repeatable:
            return min(TRIAL if self.fixed is None else self.fixed, most)
        if self._costs.weight < 1:
            return 0  # what a pass costs by itself is known first
        self._trial = self._idle >= self._patience
        if self._trial or not self.judged:
            return self._affordable(min(TRIAL, most))
        if self._off and self.lender is None:
            return 0  # nothing was learnt since
        best, rate = self._best(most)
        if left > TRIAL and self._of_no_use(rate):
            assert self.lender is not None
            self.lender.lend()
            self.times_lent += 1
            self._since = 0
            return 0
        self._off = not best and most > 0
        if best:
            self._patience = TRY_AGAIN
        return best if self.lender is not None and self._since < ENOUGH else self._affordable(best)

    def _best(self, most: int) -> tuple[int, float]:
        """The length that brings most tokens a second, and how many; they rise to it and fall behind it."""
        best, rate = 0, 1 / self._costs.of(1)
        for g in range(1, most + 1):
            wide, a = min(self.width, g), self.acceptance
            tokens = expected_tokens(a, g) + (1 - a**wide) * self._second / self._seconds_tried
            other = tokens / (g * self._a_draft + self._costs.of(g + 1 + wide))
            if other <= rate:
                break
            best, rate = g, other
        return best, rate

    def begin(self) -> None:
        """Another text: what drafts gained in those before does not pay for losses in this one."""
        self._spare = min(self._spare, MAY_LOSE)

    def _affordable(self, count: int) -> int:
        """As many of `count` tokens as may all be wrong without losing more than is to spare."""
        one = self._costs.of(1)
        while count:
            rows = count + 1 + min(self.width, count)
            if count * self._a_draft + self._costs.of(rows) - one <= self._spare * one:
                break
            count -= 1
        return count

    @property
    def _a_draft(self) -> float:
        """Seconds of drafting a token."""
        if self._draft_tokens:
            return self._draft_seconds / self._draft_tokens
        return self.draft.step * self._costs.of(1) if self._costs.weight else 0.0

    def _of_no_use(self, rate: float) -> bool:
        """Would plain decoding with the draft's memory be faster than `rate` tokens a second, the best beside it."""
        return self.lender is not None and self._since >= ENOUGH and rate * self._plain() < 1

    def _plain(self) -> float:
        """Seconds of a pass over one token without the draft, and without what its memory costs."""
        now = self._costs.of(1) if self._costs.weight else 0.0
        if self.lender is None or self.lender.lent:
            return now
        return now - min(self.lender.share * now, self.lender.wait)

    def note(
        self,
        drafted: int,
        accepted: int,
        draft_seconds: float,
        pass_seconds: float,
        wide: int = 0,
        rescued: bool = False,
    ) -> None:
        """What a pass cost and brought; `wide` second guesses were in it, and one stands if `rescued`."""
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted
        self.tokens += accepted + 1 + rescued
        self.rescued += rescued
        self.lengths.append(drafted)
        self._idle = 0 if drafted else self._idle + 1
        self._since += self.lender is not None and self.lender.lent
        self._costs.add(drafted + 1 + wide, pass_seconds)
        saved = accepted + rescued + 1 - (draft_seconds + pass_seconds) / self._costs.of(1) if drafted else 0.0
        self._spare = max(-MOST_SPARE, min(self._spare + AND_SHARE + saved, MOST_SPARE))
        if drafted:
            if self._trial:
                self._patience *= 2
            self._off = False
            judged = accepted + (accepted < drafted)
            self.judged += judged
            self._since += judged
            self._draft_seconds = FADE * self._draft_seconds + draft_seconds
            self._draft_tokens = FADE * self._draft_tokens + drafted
            if accepted < wide:
                self._second, self._seconds_tried = FADE * self._second + rescued, FADE * self._seconds_tried + 1
            self._kept = FADE * self._kept + accepted
            self._tried = FADE * self._tried + judged

    def report(self) -> dict[str, object]:
        """The account, plain values.

        `acceptance` is the share of drafted tokens that stand, `alpha` that of those judged (the paper's a), and
        `expected_tokens_per_pass` what its formula makes of alpha and the lengths of the runs.
        """
        plain = self._plain()
        alpha = self.accepted / self.judged if self.judged else 0.0
        per_pass = self.tokens / self.passes if self.passes else 0.0
        mean = sum(self.lengths) / len(self.lengths) if self.lengths else 0.0
        paid = mean * self._a_draft + (self._costs.of(round(mean) + 1) if self._costs.weight else 0.0)
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
            "second_guesses": self.width,
            "rescued": self.rescued,
            "estimated_speedup": per_pass * plain / paid if paid else 1.0,
        }

    def _expected(self, alpha: float) -> float:
        return sum(expected_tokens(alpha, n) for n in self.lengths) / self.passes if self.passes else 0.0
