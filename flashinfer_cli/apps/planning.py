"""The memory plan for a budget, without running."""

from __future__ import annotations

from contextlib import suppress

from .. import device as devices
from ..config import RunConfig
from ..engine import plan_model
from ..errors import TokenizerError
from ..kernels import select, warm_up
from ..kernels.warm import is_compiled
from ..models.ahead import read_ahead
from ..models.layout import lay_out
from ..models.open import open_model
from ..models.predictors import load_predictors
from ..plan import MemoryPlan


def plan_only(model: str, run: RunConfig) -> MemoryPlan:
    """Make the plan that a run with these settings would have. Loads the tokenizer, what was calibrated and, where they
    are compiled, the kernels, since their memory counts, and no weights.

    Raises BudgetError when the budget is below the least.
    """
    devices.tame_allocator()
    opened = open_model(model, revision=run.revision)
    with suppress(TokenizerError):  # planning needs no text; a run that does says so itself
        _ = opened.tokenizer
    device, sparsity = devices.resolve(run.device), None if run.exact else opened.sparsity
    sparse = [layer.layer for layer in sparsity.layers] if sparsity is not None else []
    kernels = select(
        device.kind,
        "compiled" if run.kernels != "reference" and is_compiled() else "reference",
        run.threads or devices.cores(),
    )[0]
    warm_up(kernels, device)
    path, bundled_experts = opened.checkpoint.path, opened.config.moe is not None and opened.checkpoint.kind == "bundle"
    learned = (
        load_predictors(opened.predictors_file, sparse, kernels, device),
        read_ahead(path) if bundled_experts else {},
    )
    layout = lay_out(opened.checkpoint, opened.config, opened.weights, sparse, run.degrade > 0)
    if run.memory not in (None, "auto"):
        devices.let_go_of_code()
        warm_up(kernels, device)
    plan = plan_model(opened, layout, run, device)[0]
    del learned  # here until now, as in a run
    return plan
