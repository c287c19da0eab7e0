"""The loss of a recipe: next-token cross-entropy and what its structure asks for besides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .model import Aux, Decoder
from .recipes import Recipe

IGNORED = -100  # a target that no loss is taken of
FREE, FULL = 0.1, 0.7  # shares of the steps before the L1 sets in, and when its goal is the recipe's


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(values).mean()


@dataclass
class SparsityControl:
    """A progressive L1 in the manner of ProSparse (2402.13516), its weight steered rather than scheduled.

    The goal rises from the sparsity the model has of itself to the recipe's; the weight grows while the model falls
    behind the goal and shrinks while it is ahead.
    """

    goal: float
    weight: float = 1e-3
    start: float = -1.0  # sparsity when the L1 set in; -1: not yet

    def wanted(self, progress: float) -> float:
        share = min(1.0, max(0.0, (progress - FREE) / (FULL - FREE)))
        return self.start + (self.goal - self.start) * share

    def steer(self, sparsity: float, progress: float) -> None:
        """After a step: `sparsity` is the share of zeros in it, `progress` the share of the steps done."""
        if progress < FREE:
            return
        if self.start < 0:
            self.start = sparsity
        gap = self.wanted(progress) - sparsity
        self.weight = min(1.0, max(1e-5, self.weight * math.exp(max(-0.05, min(0.05, gap)))))


def total_loss(
    model: Decoder, batch: torch.Tensor, recipe: Recipe, l1: float, targets: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, float], Aux]:
    """Token ids [B, T + 1] -> (the loss to descend, figures of the step, what the layers left).

    `targets` [B, T] stand for the next tokens where not all of them count; IGNORED is left out.
    """
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
        keep = None if targets is None else targets != IGNORED
        logits, aux = model(batch[:, :-1], keep=keep)
        wanted = batch[:, 1:].flatten() if targets is None or keep is None else targets[keep]
        nats = F.cross_entropy(logits.flatten(0, -2).float(), wanted)
    loss, figures = nats, {"loss": nats.item()}
    if aux.magnitude:
        figures["sparsity"] = 1 - mean(aux.active).item()
        loss = loss + l1 * mean(aux.magnitude)
    if aux.importance:
        importance, load = mean(aux.importance), mean(aux.load)
        figures |= {"importance": importance.item(), "load": load.item()}
        loss = loss + recipe.importance_weight * importance + recipe.load_weight * load
    if aux.router_loss:
        figures |= {
            "router_agreement": mean(aux.router_agreement).item(),
            "predictor_agreement": mean(aux.predictor_agreement).item(),
        }
        loss = loss + recipe.router_weight * mean(aux.router_loss) + mean(aux.predictor_loss)
    return loss, figures, aux


@torch.no_grad()
def held_out_nats(model: Decoder, windows: list[torch.Tensor]) -> tuple[float, Aux]:
    """(nats over all tokens, what the layers of all windows left), deciding causally and in float32."""
    model.eval()
    everything, nats = Aux(), 0.0
    for batch in windows:
        logits, aux = model(batch[:, :-1], causal=True)
        nats += float(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        for name, values in vars(aux).items():
            getattr(everything, name).append(torch.stack(values) if values else torch.empty(0))
    model.train()
    return nats, everything
