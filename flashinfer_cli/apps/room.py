"""What passing tokens through a model a layer at a time takes, told before it begins."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import device
from ..config import MiB, RunConfig, format_size
from ..errors import BudgetError
from ..models.layout import lay_out
from ..models.open import OpenModel
from ..models.sizes import sizes_of
from ..plan import CHUNK_LEAST, RESERVE, RING_LEAST

LOADED = 96 * MiB  # that an engine adds to the process before it plans: kernels, their threads


@dataclass(frozen=True)
class Passing:
    """Bytes beside the process. `engine` is the least that an engine is planned in; `beside` what it does not plan for:
    the layer that is held, or the head, and scratch of as many tokens at once as the context has."""

    engine: int
    beside: int
    head: int

    @classmethod
    def through(cls, opened: OpenModel, run: RunConfig) -> Passing:
        """`run` names the context, which is that of a window of the text."""
        run = replace(run, kv_cache_type=opened.kv_cache_type(run.kv_cache_type))
        layout = lay_out(opened.checkpoint, opened.config, opened.weights)
        sizes, tokens = sizes_of(layout, opened.config, run), run.context or 0
        held = max((sum(one.span.nbytes for one in layer.slices) for layer in layout.layers), default=0)
        ring = RING_LEAST * max(sizes.slices, default=0)
        least = sizes.scratch(min(tokens, CHUNK_LEAST))
        return cls(
            LOADED + RESERVE + sizes.always + sizes.kv_per_token * tokens + least + ring + sizes.expert,
            held + sizes.scratch(tokens) - least,
            sum(one.span.nbytes for one in layout.head.slices),
        )


def refuse_below(least: int, tokens: int, run: RunConfig, fewer: bool) -> None:
    """Raises BudgetError where the run's budget is below `least` bytes, the process included; `fewer` tokens may do."""
    budget = device.budget_bytes(run.memory)
    if budget < least:
        raise BudgetError(
            f"The memory budget of {format_size(budget)} is too small to calibrate on {tokens:,} tokens: "
            f"that takes about {format_size(least)}.",
            f"Give --memory {-(-least // MiB)}MiB or more{', or fewer --tokens' if fewer else ''}.",
            least=least,
        )
