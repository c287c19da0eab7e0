"""The memory plan for a budget, without running."""

from __future__ import annotations

from contextlib import suppress

from .. import device as devices
from ..config import RunConfig
from ..engine import plan_model
from ..errors import TokenizerError
from ..models.layout import lay_out
from ..models.open import open_model
from ..plan import MemoryPlan


def plan_only(model: str, run: RunConfig) -> MemoryPlan:
    """Make the plan that a run with these settings would have. Loads the tokenizer, since its memory counts, and no
    weights.

    Raises BudgetError when the budget is below the least.
    """
    devices.tame_allocator()
    opened = open_model(model, revision=run.revision)
    with suppress(TokenizerError):  # planning needs no text; a run that does says so itself
        _ = opened.tokenizer
    layout = lay_out(opened.checkpoint, opened.config, opened.weights)
    return plan_model(opened, layout, run, devices.resolve(run.device))[0]
