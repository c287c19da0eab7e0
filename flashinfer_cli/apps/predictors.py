"""Training one layer's predictor (2312.11514, 3.1): which neurons fire, told from the input of the FFN.

A(x) then B: the best linear map of rank r for the gate's own pre-activations under the inputs seen is where training
starts (in closed form); a balanced cross-entropy then bends it from their value to their sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

EPOCHS = 6
BATCH = 512
LEARNING_RATE = 1e-3
ROUNDS = 3  # of subspace iteration
OVERSAMPLE = 32  # axes more than are asked for, so that the last of these are right too


@dataclass
class Fitted:
    """A predictor in float32, its threshold in the bias, and what it does on tokens held out of its training."""

    a: torch.Tensor  # [r, d]
    b: torch.Tensor  # [d_ff, r]
    bias: torch.Tensor  # [d_ff]
    density: float
    predicted: float
    recall: float
    precision: float
    fired: torch.Tensor  # bool [held-out tokens, d_ff]: what is predicted there

    @property
    def nbytes(self) -> int:
        """As stored: matrices in float16, the bias in float32."""
        return 2 * (self.a.numel() + self.b.numel()) + 4 * self.bias.numel()


class Whitened:
    """The best linear maps of every rank up to `most` for a gate's pre-activations under the inputs seen.

    x float32 [N, d] and gate [d_ff, d]. The inputs' covariance is L L', so the best map of rank r keeps the r first
    right singular vectors of gate L; those come from ROUNDS rounds of subspace iteration (0909.4061), which takes some
    products with the gate where whole eigen-decompositions of [d, d] take ten times as long.
    """

    def __init__(self, x: torch.Tensor, gate: torch.Tensor, most: int = 256) -> None:
        covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for rows in (part.double() for part in x.split(BATCH)):  # in float32 one strong direction drowns the weak ones
            covariance.addmm_(rows.T, rows, alpha=1 / len(x))
        covariance.diagonal().add_(1e-6 * covariance.diagonal().mean())  # fewer tokens than d leave it singular
        self.gate, self.root = gate, torch.linalg.cholesky(covariance).float()
        generator = torch.Generator().manual_seed(0)
        width = min(most + OVERSAMPLE, gate.shape[1])
        axes = torch.randn(gate.shape[1], width, generator=generator)
        for _ in range(ROUNDS):
            axes = torch.linalg.qr(self.root.T @ (gate.T @ (gate @ (self.root @ axes))))[0]
        seen = gate @ (self.root @ axes)  # Rayleigh-Ritz: the axes among those found, the largest first
        self.axes = axes @ torch.linalg.eigh(seen.T @ seen)[1].flip(1)

    def of_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, d] and B [d_ff, rank] with the least mean squared error of B A x against gate x over the rows of
        x."""
        axes = self.axes[:, :rank]
        return torch.linalg.solve_triangular(self.root.T, axes, upper=True).T, self.gate @ (self.root @ axes)


def fit(
    x: torch.Tensor, fired: torch.Tensor, start: Whitened, gate_bias: torch.Tensor | None, rank: int, recall: float,
    held: int, seed: int = 0,
) -> Fitted:  # fmt: skip
    """x float32 [N, d], fired bool [N, d_ff]; `start` is of the rows but the last `held`, which choose the threshold
    and judge it.

    The threshold is the highest at which half of the held-out tokens reach `recall`; the other half is what the figures
    are of.
    """
    generator = torch.Generator().manual_seed(seed)
    learn, judge = slice(0, len(x) - held), slice(len(x) - held, len(x))
    a, b = start.of_rank(rank)
    bias = torch.zeros(len(b)) if gate_bias is None else gate_bias.clone()
    scale = (x[learn][:1024] @ a.T @ b.T + bias).std() / 2
    a, b, bias = a.clone(), b / scale, bias / scale
    parameters = [a, b, bias]
    for parameter in parameters:
        parameter.requires_grad_(True)
    share = fired[learn].float().mean().clamp(1e-4, 0.5)
    weight = (1 - share) / share  # a silent neuron is the rule: what fires counts as much in sum
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    steps, count = EPOCHS * -(-(len(x) - held) // BATCH), 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(x) - held, generator=generator)
        for rows in order.split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - count / steps)
            logits = F.linear(F.linear(x[rows], a), b, bias)
            loss = F.binary_cross_entropy_with_logits(logits, fired[rows].float(), pos_weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += 1
    with torch.no_grad():
        a, b, bias = a.half().float(), b.half().float(), bias.clone()
        logits = F.linear(F.linear(x[judge], a), b, bias)
        choose, test = slice(0, held // 2), slice(held // 2, held)
        active = fired[judge]
        hits = logits[choose][active[choose]]
        threshold = float(np.quantile(hits.numpy(), 1 - recall)) if len(hits) else 0.0
        bias -= threshold
        guessed = logits - threshold > 0
        both = (guessed[test] & active[test]).sum()
        return Fitted(
            a,
            b,
            bias,
            density=float(active[test].float().mean()),
            predicted=float(guessed[test].float().mean()),
            recall=float(both / active[test].sum().clamp(min=1)),
            precision=float(both / guessed[test].sum().clamp(min=1)),
            fired=guessed[test],
        )


def new_in_window(fired: torch.Tensor, windows: tuple[int, ...]) -> dict[str, float]:
    """Of the predicted neurons of consecutive tokens, the share of all neurons that none of the last k demanded."""
    found = {}
    for k in windows:
        recent = torch.zeros_like(fired)
        for back in range(1, k + 1):
            recent[back:] |= fired[:-back]
        found[str(k)] = float((fired & ~recent)[k:].float().mean())
    return found
