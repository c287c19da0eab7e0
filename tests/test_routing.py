"""Routing that looks at the cache, by its share of a token's weights."""

import torch

from benchmarks.routing_rules import Swap
from flashinfer_cli.config import MoeConfig
from flashinfer_cli.layers.routing import CacheGap, route


def moe(k: int, norm: bool = True) -> MoeConfig:
    return MoeConfig(num_experts=12, num_experts_per_tok=k, moe_intermediate_size=8, norm_topk_prob=norm)


def test_what_is_here_or_weighs_too_much_more_is_not_swapped() -> None:
    torch.manual_seed(0)
    logits, everything, nothing = (
        torch.randn(50, 12),
        torch.ones(12, dtype=torch.bool),
        torch.zeros(12, dtype=torch.bool),
    )
    for norm in (True, False):
        plain = route(logits, moe(3, norm))
        for gap, held in ((1.0, everything), (1.0, nothing), (0.0, torch.rand(12) < 0.5)):
            got = CacheGap(gap, 0).route(logits, held, moe(3, norm))
            assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True)), (gap, norm)


def test_swaps_as_the_plain_rule_of_the_study_does() -> None:
    torch.manual_seed(1)
    logits, swapped = 2 * torch.randn(200, 12), 0
    for k in (2, 4):
        for keep in (0, 1):
            for gap in (0.05, 0.2, 1.0):
                held = torch.rand(12) < 0.5
                weights, chosen = CacheGap(gap, keep).route(logits, held, moe(k))
                want, experts = Swap(gap=gap, keep=keep)(logits, held.expand(200, -1), k)
                order = want.argsort(descending=True, dim=-1)
                assert torch.equal(chosen, experts.gather(1, order))
                torch.testing.assert_close(weights, want.gather(1, order))
                best = logits.topk(k, dim=-1).indices
                assert torch.equal(chosen[:, :keep], best[:, :keep])
                swapped += int((chosen.sort(-1).values != best.sort(-1).values).any(-1).sum())
    assert swapped > 200
