"""The formulae of training, against values worked out by hand, brute force, and variants that are known to be wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flashinfer_cli.training import depth, gating
from flashinfer_cli.training.model import Decoder, MoeFfn
from flashinfer_cli.training.objective import SparsityControl
from flashinfer_cli.training.shape import Shape

# ------------------------------------------------------------------ the sparsely-gated layer (1701.06538)


def test_top_k_gates_by_hand():
    """Logits 2, 1, 0, 1 with noise 0, 1, 0, 0 of scale softplus(0) = ln 2: H = 2, 1.693, 0, 1; the best two stay."""
    clean = torch.tensor([[2.0, 1.0, 0.0, 1.0]])
    noise = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    gates = gating.noisy_top_k(clean, torch.zeros(1, 4), 2, noise=noise)
    h = 1 + math.log(2)
    first = math.exp(2) / (math.exp(2) + math.exp(h))
    assert gates.experts.tolist() == [[0, 1]]
    assert gates.weights[0].tolist() == pytest.approx([first, 1 - first], abs=1e-6)
    assert gates.dense[0].tolist() == pytest.approx([first, 1 - first, 0, 0], abs=1e-6)


def test_keep_probability_by_hand():
    """H = 3, 2, 1 and k = 1. Expert 0 stays while it exceeds 2, the best of the others; 1 and 2 must exceed 3."""
    clean, noisy = torch.tensor([[2.5, 2.0, 1.0]]), torch.tensor([[3.0, 2.0, 1.0]])
    scale = torch.tensor([[0.5, 1.0, 2.0]])

    def phi(z: float) -> float:
        return 0.5 * (1 + math.erf(z / math.sqrt(2)))

    want = [phi((2.5 - 2) / 0.5), phi((2 - 3) / 1), phi((1 - 3) / 2)]
    assert gating.keep_probability(clean, noisy, scale, 1)[0].tolist() == pytest.approx(want, abs=1e-6)
    assert gating.keep_probability(clean, noisy, scale, 3).tolist() == [[1, 1, 1]]


def redrawn(clean: torch.Tensor, noisy: torch.Tensor, scale: torch.Tensor, k: int, draws: int) -> torch.Tensor:
    """P(x, i) by brute force: draw expert i's own noise again and again, the others' as they are; is i among the k?"""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros_like(clean)
    for i in range(clean.shape[1]):
        h = noisy[:, None].repeat(1, draws, 1)
        h[..., i] = clean[:, i, None] + scale[:, i, None] * torch.randn(len(clean), draws, generator=generator)
        found[:, i] = (h.topk(k, -1).indices == i).any(-1).float().mean(1)
    return found


def case(k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(k)
    clean, raw = torch.randn(6, 8), torch.randn(6, 8)
    scale = F.softplus(raw)
    return clean, raw, clean + torch.randn(6, 8) * scale, scale


@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_keep_probability_against_redrawing(k):
    clean, _, noisy, scale = case(k)
    want = redrawn(clean, noisy, scale, k, 20_000)
    assert (gating.keep_probability(clean, noisy, scale, k) - want).abs().max() < 0.02


@pytest.mark.parametrize("k", [1, 2, 4])
def test_redrawing_tells_wrong_estimates_apart(k):
    """Thresholds taken from the softmax, or i not left out of its own k-th largest: the check above rejects both."""
    clean, _, noisy, scale = case(k)
    want = redrawn(clean, noisy, scale, k, 20_000)
    gates = noisy.softmax(-1)
    softmaxed = gating.keep_probability(clean.softmax(-1), gates, scale, k)
    kth = noisy.topk(k, -1).values[:, -1:]
    included = 0.5 * (1 + torch.erf((clean - kth) / (scale * math.sqrt(2))))
    assert (softmaxed - want).abs().max() > 0.1
    assert (included - want).abs().max() > 0.1


def test_losses_by_hand():
    """Importance 3, 1: mean 2, variance 1, CV^2 = 1/4. Equal loads: 0."""
    weights = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    gates = gating.Gates(torch.empty(0), torch.empty(0), weights, torch.full((3, 2), 0.5))
    assert float(gating.importance_loss(gates)) == pytest.approx(0.25)
    assert float(gating.load_loss(gates)) == pytest.approx(0)
    assert float(gating.cv_squared(torch.tensor([5.0]))) == 0


def test_the_load_loss_evens_out_a_crooked_gate():
    """Gradient descent on it alone brings the busiest expert towards the mean; the choice itself has no gradient."""
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    w = torch.nn.Parameter(torch.randn(8, 16) * 0.1)
    b = torch.nn.Parameter(torch.tensor([2.0, 1, 0, 0, 0, 0, 0, -2]))
    before = after = 0.0
    optimizer = torch.optim.Adam([w, b], lr=0.05)
    for step in range(150):
        gates = gating.noisy_top_k(x @ w.T + b, torch.zeros(512, 8), 2)
        use = (gates.dense > 0).float().sum(0)
        before, after = (float(use.max() / use.mean()) if step == 0 else before), float(use.max() / use.mean())
        optimizer.zero_grad()
        gating.load_loss(gates).backward()
        optimizer.step()
    assert before > 2 and after < 1.3


def test_experts_by_brute_force():
    """The layer, its tokens sorted by expert, against one token and one expert at a time."""
    torch.manual_seed(0)
    shape = Shape(hidden_size=16, num_attention_heads=2, num_experts=5, moe_intermediate_size=8, num_noop_experts=2)
    layer = MoeFfn(shape).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 7, 16)
    from flashinfer_cli.training.model import Aux

    got = layer(x, Aux())
    for row in x.reshape(-1, 16):
        logits, want = layer.gate @ row, torch.zeros(16)
        kept = logits.topk(2)
        for weight, expert in zip(kept.values.softmax(0), kept.indices.tolist(), strict=True):
            if expert < 5:
                h = F.silu(layer.w1[expert] @ row) * (layer.w3[expert] @ row)
                want += weight * (layer.w2[expert] @ h)
        index = (x.reshape(-1, 16) == row).all(-1).nonzero()[0, 0]
        assert (got.reshape(-1, 16)[index] - want).abs().max() < 1e-4


# ------------------------------------------------------------------ Mixture-of-Depths (2404.02258)


def check_choice(choose) -> None:
    """Exactly k, the highest, in the order of the sequence, ties or not."""
    for weights in (torch.randn(4, 16), torch.ones(4, 16), torch.randint(0, 3, (4, 16)).float()):
        chosen = choose(weights, 5)
        assert chosen.shape == (4, 5)
        for row, places in zip(weights, chosen, strict=True):
            assert places.tolist() == sorted(set(places.tolist()))
            assert row[places].min() >= row[[i for i in range(16) if i not in places]].max()


def test_exactly_k_are_chosen():
    torch.manual_seed(0)
    check_choice(depth.choose)


def test_a_strict_comparison_is_found_out():
    def strict(weights: torch.Tensor, k: int) -> torch.Tensor:
        kth = weights.topk(k, -1).values[:, -1:]
        return torch.stack([(row > t).nonzero()[:, 0] for row, t in zip(weights, kth, strict=True)])

    torch.manual_seed(0)
    with pytest.raises((AssertionError, RuntimeError)):
        check_choice(strict)


def check_mix(mix) -> None:
    """x' = r f(x) + x for the chosen, by hand, and x to the bit for the others."""
    x = torch.tensor([[[1.0, 2], [3, 4], [5, 6]]])
    got = mix(x, torch.tensor([[[10.0, 20]]]), torch.tensor([[0.5, 2.0, -1.0]]), torch.tensor([[1]]))
    assert got.tolist() == [[[1, 2], [2 * 10 + 3, 2 * 20 + 4], [5, 6]]]


def test_the_router_scales_the_update_only():
    check_mix(depth.mix)


def test_scaling_the_residual_too_is_found_out():
    def both(x, update, weights, positions):
        mixed = depth.mix(x, update, weights, positions)
        mask = depth.chosen_mask(positions, x.shape[1])[..., None]
        return mixed + mask * (weights[..., None] - 1) * x

    with pytest.raises(AssertionError):
        check_mix(both)


def test_capacity():
    assert depth.capacity_of(0.125, 512) == 64 and depth.capacity_of(0.125, 1) == 1 and depth.capacity_of(1.0, 7) == 7


@pytest.mark.parametrize("decoding", ["router", "predictor"])
def test_only_causal_decisions_ignore_the_future(decoding):
    torch.manual_seed(3)
    shape = Shape(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, mod_capacity=0.25, mod_decoding=decoding,
    )  # fmt: skip
    model = Decoder(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mod_router" in name:
                parameter.mul_(30)
        ids, other = torch.randint(0, 50, (1, 24)), torch.randint(0, 50, (1, 24))
        other[:, :12] = ids[:, :12]
        causal, again = (model(x, causal=True)[0][:, :12] for x in (ids, other))
        ranked, ranked_again = (model(x)[0][:, :12] for x in (ids, other))
    assert (causal - again).abs().max() < 1e-5
    assert (ranked - ranked_again).abs().max() > 1e-3  # a top-k over the sequence looks ahead


def test_causal_losses_push_the_decision_over_zero():
    torch.manual_seed(0)
    x = torch.randn(8, 64, 4)
    mask = depth.chosen_mask(depth.choose(x[..., 0], 8), 64)
    w = torch.nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.Adam([w], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        depth.causal_loss(x @ w[:4] + w[4], mask).backward()
        optimizer.step()
    assert float(depth.agreement(x @ w[:4] + w[4], mask)) > 0.92
    assert float(depth.agreement(torch.full((8, 64), -1.0), mask)) == 0.875  # what saying no to all would give


def test_the_predictor_teaches_nothing_to_the_model():
    torch.manual_seed(0)
    shape = Shape(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                  mod_capacity=0.25)  # fmt: skip
    model = Decoder(shape)
    _, aux = model(torch.randint(0, 50, (2, 16)))
    aux.predictor_loss[0].backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all("mod_predictor" in name for name in touched)


# ------------------------------------------------------------------ the L1, the batches, the baseline


def test_the_l1_is_steered_towards_its_goal():
    """A model that gets the sparser the heavier the L1, with a lag: it ends near the goal, and the L1 is not stuck."""
    control, sparsity = SparsityControl(0.9), 0.5
    for step in range(1, 3001):
        target = 0.5 + 0.45 * (1 - math.exp(-8 * control.weight))
        sparsity += 0.02 * (target - sparsity)
        control.steer(sparsity, step / 3000)
    assert sparsity == pytest.approx(0.9, abs=0.02)
    assert control.start == pytest.approx(0.5, abs=0.05)


def test_shapes_that_cannot_be_are_refused():
    from flashinfer_cli.errors import UsageError
    from flashinfer_cli.training.recipes import RECIPES, recipe

    with pytest.raises(UsageError) as caught:
        recipe("stories-mow")
    assert "Did you mean 'stories-moe'" in (caught.value.hint or "")
    for changes in ({"num_attention_heads": 7}, {"mod_capacity": 2.0}, {"num_experts": 1, "num_experts_per_tok": 3}):
        with pytest.raises(UsageError):
            replace(Shape(), **changes)
    with pytest.raises(UsageError, match="no zeros"):
        replace(RECIPES["stories-draft"], sparsity=0.5)
