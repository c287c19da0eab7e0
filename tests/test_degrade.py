"""Small copies of experts (`--degrade`): what they are, when they serve, and that nothing changes without them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_experts_lossless import logits_of, slots
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli.bundles.verify import verify_bundle
from flashinfer_cli.errors import UsageError
from flashinfer_cli.layers.moe import MoeFfn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3_moe", 0, tmp_path_factory.mktemp("moe") / "model", dtype=torch.bfloat16)[0]


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    fc.bundle(folder, out := folder.parent / "two", small_experts="int8")
    fc.bundle(folder, folder.parent / "one")
    return out


def test_the_bundle_has_both_and_runs_exact_without_asking(bundle: Path) -> None:
    assert not verify_bundle(bundle)
    with fc.load(bundle, stream="never", context=60, prefill_chunk=4) as engine:
        whole, small = engine.checkpoint.records[0], engine.checkpoint.small[0]
        assert {part.format for part in whole.parts} == {"BF16"} and {part.format for part in small.parts} == {"Q8_0"}
        assert engine.report().exactness == "exact"
        found = logits_of(engine)
    with fc.load(bundle.parent / "one", stream="never", context=60, prefill_chunk=4) as engine:
        assert torch.equal(logits_of(engine), found)


@pytest.mark.parametrize("prefetch", ["off", 2])
def test_light_experts_that_are_away_come_from_small_copies(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, prefetch: str | int
) -> None:
    with fc.load(bundle, stream="never", context=60, prefill_chunk=4) as engine:
        exact = logits_of(engine)
    slots(monkeypatch, 4, 3)
    with fc.load(bundle, context=60, prefill_chunk=4, degrade=0.6, prefetch_experts=prefetch) as engine:
        found = logits_of(engine)
        report, cache = engine.report(), engine.experts
        assert report.exactness == "degraded" and "degraded" in report.summary()
        rows = [row for row in report.experts if row["phase"] == "decode"]
        degraded, misses = sum(row["degraded"] for row in rows), sum(row["misses"] for row in rows)
        assert degraded > 0 and misses > 0 and misses == cache.policy.misses()
        assert all(expert < cache.policy.records[layer] for layer, expert in cache._slot)
        assert len(cache._slot) + len(cache._guesses) + len(cache._draining) + len(cache._free) == cache.slots
    assert torch.equal(found[0], exact[0])  # a prompt is computed on the experts themselves
    assert not torch.equal(found, exact) and (found - exact).abs().max() < 0.5
    with fc.load(bundle, context=60, prefill_chunk=4, degrade=0.6, prefetch_experts="off") as engine:
        assert torch.equal(logits_of(engine), found)  # guesses change nothing
    with fc.load(bundle, context=60, prefill_chunk=4, degrade=0.6, prefetch_experts="off") as engine:
        small, large = engine.experts.spans[0][-1].nbytes, engine.experts.spans[0][0].nbytes
        assert small < large


def test_nothing_is_degraded_where_all_are_here(bundle: Path) -> None:
    found = []
    for degrade in (0.0, 1.0):
        with fc.load(bundle, stream="never", context=60, prefill_chunk=4, degrade=degrade) as engine:
            found.append(logits_of(engine))
    assert torch.equal(*found)


def test_what_is_heavy_for_one_token_is_not_degraded(bundle: Path) -> None:
    with fc.load(bundle, stream="always", context=60, degrade=0.4) as engine:
        ffn = engine.decoder.blocks[0].ffn
        assert isinstance(ffn, MoeFfn)
        asked, weights = np.array([[0, 1], [2, 0]]), np.array([[0.8, 0.2], [0.7, 0.3]])
        assert ffn._light(asked, weights) == [1]
        assert ffn._light(asked[1:], weights[1:]) == [0]


def test_what_cannot_be_is_said(folder: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="small copies"):
        fc.load(bundle.parent / "one", degrade=0.5)
    with pytest.raises(UsageError, match="no smaller"):
        fc.bundle(folder, tmp_path / "x", quantize="int4", small_experts="int8")
    with pytest.raises(UsageError, match="--degrade"):
        fc.load(bundle, degrade=1.5)
