"""Training one layer's predictor (2312.11514, 3.1): which neurons fire, told from the input of the FFN.

A(x) then B: the best linear map of rank r for the gate's own pre-activations under the inputs seen, in closed form. A
balanced cross-entropy can bend it from their value to their sign, which is tried where the former names too many.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..bundles.quantize import Quantize
from ..layers.demand import Stored
from ..models.predictors import rounded

EPOCHS = 6
BATCH = 512
LEARNING_RATE = 1e-3
RANKS = (16, 32, 64, 128, 256)
BITS: tuple[Quantize, ...] = ("int8", "int4")
SLOT_WORTH = 0.3  # of a read a token: how much a slot more saves, about, where few of the neurons have one
GOOD_ENOUGH = 1.6  # times what fires: a predictor that names less is not trained further
RECALL_SLACK = 0.005  # of two predictors, how much less the better one may find
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam
ROUNDS = 3  # of subspace iteration
OVERSAMPLE = 32  # axes more than are asked for, so that the last of these are right too


@dataclass
class Fitted:
    """A rounded predictor, its threshold in the bias, and what it does on tokens held out of its training."""

    a: Stored  # [r, d]
    b: Stored  # [d_ff, r]
    bias: torch.Tensor  # float32 [d_ff]
    density: float
    predicted: float
    recall: float
    precision: float
    fired: torch.Tensor  # bool [held-out tokens, d_ff]: what is predicted there

    @property
    def rank(self) -> int:
        return len(self.a.rows)

    @property
    def nbytes(self) -> int:
        """On flash and in memory."""
        return self.a.rows.numel() + self.b.rows.numel() + 4 * self.bias.numel()

    def cost(self, record_bytes: int) -> float:
        """What is predicted a token, and the records of `record_bytes` whose slots the predictor takes, each worth
        SLOT_WORTH of a read."""
        return self.predicted * len(self.bias) + SLOT_WORTH * self.nbytes / record_bytes


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


def judged(a: Stored, b: Stored, bias: torch.Tensor, x: torch.Tensor, fired: torch.Tensor, recall: float) -> Fitted:
    """A predictor with its threshold: x float32 [n, d], fired bool [n, d_ff] of tokens it was not made from.

    The threshold is the highest at which every other token reaches `recall`, all of their neurons together; the figures
    are of the tokens between those.
    """
    logits = F.linear(F.linear(x, a.values()), b.values(), bias)
    choose, test = slice(0, None, 2), slice(1, None, 2)
    hits = logits[choose][fired[choose]]
    threshold = float(np.quantile(hits.numpy(), 1 - recall)) if len(hits) else 0.0
    guessed, active = logits > threshold, fired[test]
    both = (guessed[test] & active).sum()
    return Fitted(
        a,
        b,
        bias - threshold,
        density=float(active.float().mean()),
        predicted=float(guessed[test].float().mean()),
        recall=float(both / active.sum().clamp(min=1)),
        precision=float(both / guessed[test].sum().clamp(min=1)),
        fired=guessed,
    )


def balanced(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with the strength of each of its axes dealt to both matrices, which loses least when they are
    rounded: all of it in B leaves the weak axes of a block no levels, all of it in A the strong ones."""
    share = b.norm(dim=0).clamp(min=1e-12).sqrt()
    return a * share[:, None], b / share


def cheapest(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, fired: torch.Tensor, recall: float,
    record_bytes: int,
) -> Fitted:  # fmt: skip
    """A and B, float, in as many bits as cost least; else as `judged`."""
    a, b = balanced(a, b)
    found = (judged(rounded(a, bits), rounded(b, bits), bias, x, fired, recall) for bits in BITS)
    return min(found, key=lambda fitted: fitted.cost(record_bytes))


def packed(fired: torch.Tensor) -> torch.Tensor:
    """bool [n, d_ff] -> uint8 [n, d_ff / 8], a bit a neuron: what fires for thousands of tokens takes as much memory as
    a layer."""
    return torch.from_numpy(np.packbits(fired.numpy(), axis=1))


def unpacked(bits: torch.Tensor, count: int) -> torch.Tensor:
    """`packed` undone; `count` is d_ff."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=count)).view(torch.bool)


def train(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, fired: torch.Tensor, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and bias bent from the value of the pre-activations to their sign, on x float32 [n, d], fired `packed`."""
    generator = torch.Generator().manual_seed(seed)
    scale = (F.linear(F.linear(x[:1024], a), b, bias)).std() / 2
    parameters = [a.clone(), b / scale, bias / scale]
    for parameter in parameters:
        parameter.requires_grad_(True)
    firing = sum(float(unpacked(part, len(b)).float().mean(1).sum()) for part in fired.split(BATCH))
    share = torch.tensor(firing / len(x)).clamp(1e-4, 0.5)
    weight = (1 - share) / share  # a silent neuron is the rule: what fires counts as much in sum
    moments = [(torch.zeros_like(each), torch.zeros_like(each)) for each in parameters]
    steps, count = EPOCHS * -(-len(x) // BATCH), 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            rate = LEARNING_RATE * (1 - count / steps)
            logits = F.linear(F.linear(x[rows], parameters[0]), parameters[1], parameters[2])
            loss = F.binary_cross_entropy_with_logits(logits, unpacked(fired[rows], len(b)).float(), pos_weight=weight)
            loss.backward()
            count += 1
            for parameter, (first, second) in zip(parameters, moments, strict=True):
                _adam(parameter, first, second, rate, count)
    return parameters[0].detach(), parameters[1].detach(), parameters[2].detach()


@torch.no_grad()
def _adam(parameter: torch.Tensor, first: torch.Tensor, second: torch.Tensor, rate: float, step: int) -> None:
    """One step of Adam (1412.6980) with the two moments of the gradient, which is dropped. torch.optim has it too, and
    imports 800 modules for it: 75 MB that would stay."""
    assert parameter.grad is not None
    first.lerp_(parameter.grad, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
    bound = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    parameter.addcdiv_(first, bound, value=-rate / (1 - BETAS[0] ** step))
    parameter.grad = None


def fit(
    x: torch.Tensor, fired: torch.Tensor, gate: torch.Tensor, gate_bias: torch.Tensor | None, recall: float,
    held: int, record_bytes: int, seed: int = 0,
) -> Fitted:  # fmt: skip
    """x float32 [N, d], fired `packed`, gate [d_ff, d]; the last `held` tokens choose and judge, others teach.

    Of the RANKS, in 8 and 4 bits, the one for which reads and memory together cost least (`Fitted.cost`). Where that
    still names more than GOOD_ENOUGH times what fires, it is trained as well, and the better of the two is taken.
    """
    learn, rest = slice(0, len(x) - held), slice(len(x) - held, len(x))
    usable = [rank for rank in RANKS if rank * 2 <= min(gate.shape)] or [RANKS[0]]
    start = Whitened(x[learn], gate, usable[-1])
    bias = torch.zeros(len(gate)) if gate_bias is None else gate_bias
    active = unpacked(fired[rest], len(gate))
    best: Fitted | None = None
    for rank in usable:
        found = cheapest(*start.of_rank(rank), bias, x[rest], active, recall, record_bytes)
        if best is not None and found.cost(record_bytes) >= best.cost(record_bytes):
            break
        best = found
    assert best is not None
    if best.predicted > GOOD_ENOUGH * best.density:
        trained = train(*start.of_rank(best.rank), bias, x[learn], fired[learn], seed)
        bent = cheapest(*trained, x[rest], active, recall, record_bytes)
        if bent.cost(record_bytes) < best.cost(record_bytes) and bent.recall >= best.recall - RECALL_SLACK:
            return bent
    return best


def new_in_window(fired: torch.Tensor, windows: tuple[int, ...]) -> dict[str, float]:
    """Of the predicted neurons of consecutive tokens, the share of all neurons that none of the last k demanded."""
    found = {}
    for k in windows:
        recent = torch.zeros_like(fired)
        for back in range(1, k + 1):
            recent[back:] |= fired[:-back]
        found[str(k)] = float((fired & ~recent)[k:].float().mean())
    return found
