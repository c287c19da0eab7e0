"""Which drafted tokens stand (2211.17192), also where some places have a second guess (2305.09781, 2401.01055).

A tree of drafts here is a chain whose first places have one more leaf each: what the draft would have said in place of
its first choice. Second guesses take no further step of the draft and one more position of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import ModelConfig
from ..errors import UsageError
from .sampling import Sampler

Second = tuple[int, torch.Tensor]  # a token, and the float32 probabilities [V] it was drawn from: none of the first's


def accept(
    target: Sequence[torch.Tensor], drafted: Sequence[int], q: torch.Tensor | None, sampler: Sampler,
    generator: torch.Generator,
) -> tuple[int, int]:  # fmt: skip
    """Check a run: (how many drafted tokens stand, the token behind them).

    target: float32 [V] a position, len(drafted) + 1 of them: p, under the same sampling as `q` [n, V]. Token x is kept
    with probability min(1, p(x) / q(x)), each with a fresh random number; at the first that is not, a token of
    max(0, p - q), normed, takes its place; behind a run that stands in full one more comes from p (2211.17192, 2.3).
    """
    kept, _, token = accept_tree(target, drafted, q, (), sampler, generator)
    return kept, token


def accept_tree(
    target: Sequence[torch.Tensor], drafted: Sequence[int], q: torch.Tensor | None, seconds: Sequence[Second],
    sampler: Sampler, generator: torch.Generator,
) -> tuple[int, bool, int]:  # fmt: skip
    """(how many of the chain stand, does the second guess behind them stand, the token behind all).

    `target` has a row for each second guess behind those of the chain: p behind the guess. Where the first guess falls,
    the second is judged in the same way against what is left of p, max(0, p - q) normed, and where that falls too a
    token of what is then left takes the place: rejection without replacement, which leaves p as it is.
    """
    for index, token in enumerate(drafted):
        kept, p = _judged(target[index], token, None if q is None else q[index], sampler, generator)
        if kept:
            continue
        if index < len(seconds):
            second, drawn_from = seconds[index]
            kept, p = _judged(p, second, drawn_from, sampler, generator)
            if kept:
                return index, True, sampler.sample(target[len(drafted) + 1 + index], generator)
        return index, False, sampler.sample(p, generator)
    return len(drafted), False, sampler.sample(target[len(drafted)], generator)


def _judged(
    p: torch.Tensor, token: int, q: torch.Tensor | None, sampler: Sampler, generator: torch.Generator
) -> tuple[bool, torch.Tensor]:
    """Does a token stand that was drawn from q (None: it was certain); and what is left to draw from if not."""
    if sampler.greedy:
        kept = float(p[token]) > 0
    else:
        kept = float(torch.rand((), generator=generator)) * (1.0 if q is None else float(q[token])) < float(p[token])
    if kept:
        return True, p
    if q is None:
        rest = p.clone()
        rest[token] = 0.0
    else:
        rest = (p - q).clamp_(min=0.0)
    total = rest.sum()
    # equal up to rounding: nothing is left over, and p itself is what remains to draw from
    return False, rest / total if float(total) > 0 else p


def check_tree(config: ModelConfig, draft: str) -> None:
    """Raises UsageError where a pass cannot hold two tokens of one place, or the draft has no second guess."""
    if draft == "ngram":
        raise UsageError("--draft-tree needs a draft that has second guesses.", "ngram has one guess; take a model.")
    if config.recurrent:
        raise UsageError("--draft-tree needs attention: an LSTM's state goes from token to token, in one line.")
    if any(config.is_skippable(layer) for layer in range(config.num_hidden_layers)):
        raise UsageError(
            "--draft-tree does not go with Mixture-of-Depths: tokens that skip a layer leave no place to come back to."
        )
