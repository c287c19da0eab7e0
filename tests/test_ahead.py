"""Probes that guess experts ahead: fitted, judged against routers, kept where better, without effect on the text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_experts_lossless import logits_of, slots

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps.ahead import DISCOUNT, Ahead, _ridge, calibrate_ahead, discounted
from flashinfer_cli.apps.recording import recording
from flashinfer_cli.apps.replay import as_it_ran, replay
from flashinfer_cli.cache.trace import read_trace
from flashinfer_cli.cli.report_tables import report_tables
from flashinfer_cli.config import RunConfig
from flashinfer_cli.errors import BundleError, UsageError
from flashinfer_cli.layers.moe import MoeFfn
from flashinfer_cli.models.ahead import AHEAD_FILE, read_ahead


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ahead]:
    out = fc.bundle("zoo:stories-moe", tmp_path_factory.mktemp("ahead") / "bundle")
    text = zoo.HELD_OUT.read_text(encoding="utf-8").replace("<|endoftext|>", "\n")
    return out, calibrate_ahead(out, text, RunConfig(), tokens=2500)


def test_a_ridge_finds_a_linear_map() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 12, generator=draw) + 3, torch.randn(5, 12, generator=draw)
    found, bias = _ridge(x, x @ weight.T - 7)
    assert torch.allclose(found, weight, atol=0.02) and torch.allclose(bias, torch.full((5,), -7.0), atol=0.2)


def test_only_probes_that_guess_better_are_kept(learned: tuple[Path, Ahead]) -> None:
    out, found = learned
    layers = {pair.layer for pair in found.pairs}
    assert {pair.layer - pair.source for pair in found.pairs} >= {1, 2} and len(layers) > 2
    assert all(pair.chance < pair.probe <= 1 for pair in found.pairs)
    kept = read_ahead(out)
    assert set(kept) == {(pair.source, pair.layer) for pair in found.pairs if pair.better} != set()
    with safe_open(out / AHEAD_FILE, "pt") as file:
        assert file.metadata()["tokens"] == str(found.tokens)


def test_a_run_goes_by_them_and_says_the_same(
    learned: tuple[Path, Ahead], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = learned[0]
    plain = shutil.copytree(out, tmp_path / "plain")
    (plain / AHEAD_FILE).unlink()
    slots(monkeypatch, 8, 4)
    seen = []
    for bundle in (plain, out):
        with fc.load(bundle, context=80, prefill_chunk=4, prefetch_experts=2, lookahead=2) as engine:
            seen.append(logits_of(engine, 24))
            ahead = [one for block in engine.decoder.blocks for one in block.ffn.ahead]
            ahead += engine.decoder.first_guess.ahead
            probes = {id(weight) for (source, layer), (weight, _) in engine.probes.items() if source != layer}
            assert sum(id(one.router) in probes for one in ahead) == len(probes)
            assert (len(probes) > 0) == (bundle == out)
    assert torch.equal(*seen)


def test_uses_to_come_are_discounted_within_a_sequence() -> None:
    uses = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    last = torch.tensor([False, False, True, True])
    assert discounted(uses, last).tolist() == [[0, pytest.approx(1 + DISCOUNT)], [0, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize("stay", [0, 9, 40])
def test_foresight_changes_no_text_and_replays_as_it_ran(
    learned: tuple[Path, Ahead], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stay: int
) -> None:
    out, found = learned
    assert [pair.layer for pair in found.pairs if pair.source == pair.layer and pair.better] == [0, 1, 2, 3]
    slots(monkeypatch, stay, 3)
    seen = []
    for policy in ("auto", "lfu"):
        with (
            fc.load(out, context=80, prefill_chunk=4, expert_policy=policy) as engine,
            recording(engine, tmp_path / policy),
        ):
            seen.append(logits_of(engine, 40))
        trace = read_trace(tmp_path / policy)
        assert as_it_ran(trace).counts == engine.experts.policy.counts
        cache = engine.report().expert_cache
        assert trace.about["policy"] == cache["policy"] == policy.replace("auto", "adaptive")
        assert cache["follows"] in (("foresight", "lfu") if policy == "auto" else ("lfu",))
        told = " ".join(note for table in report_tables(engine.report().to_dict()) for note in table.notes)
        assert f"by policy {' as '.join(dict.fromkeys((cache['policy'], cache['follows'])))}; " in told
    assert torch.equal(*seen)
    points = [replay(tmp_path / policy, shares=(0.25,))["points"] for policy in ("auto", "lfu")]
    assert points[0] == points[1] and "foresight" in points[0][0]["policies"]


def test_foresight_hits_more_often_than_what_looks_back(
    learned: tuple[Path, Ahead], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots(monkeypatch, 16, 3)
    with fc.load(learned[0], context=160, expert_policy="lru") as engine, recording(engine, tmp_path / "t"):
        first, *rest = engine.tokenizer.encode(zoo.HELD_OUT.read_text(encoding="utf-8")[-600:])[:150]
        session = engine.session()
        session.prefill([first])
        for token in rest:
            session.step(token)
    found = {
        name: each["hit_ratio"]
        for name, each in replay(tmp_path / "t", shares=(0.25,))["points"][0]["policies"].items()
    }
    others = {name: ratio for name, ratio in found.items() if name not in ("foresight", "adaptive")}
    assert found["foresight"] >= found["adaptive"] > max(others.values())


@pytest.mark.parametrize("calibrated", [True, False])
def test_foresight_goes_by_what_was_learned_or_by_the_router(
    learned: tuple[Path, Ahead], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: bool
) -> None:
    bundle = shutil.copytree(learned[0], tmp_path / "bundle")
    if not calibrated:
        (bundle / AHEAD_FILE).unlink()
    slots(monkeypatch, 16, 3)
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with fc.load(bundle, context=80, expert_policy="foresight") as engine:
        layers = {block.ffn.layer: block.ffn for block in engine.decoder.blocks}
        foresee, expect = MoeFfn._foresee, engine.experts.expect

        def keep(ffn: MoeFfn, x: torch.Tensor, logits: torch.Tensor) -> None:
            seen[ffn.layer] = (x, logits)
            foresee(ffn, x, logits)

        def check(layer: int, worth: torch.Tensor) -> None:
            x, logits = seen[layer]
            weights = layers[layer].worth
            assert (weights is not None) == calibrated
            assert torch.equal(worth, logits.softmax(-1) if weights is None else F.linear(x, *weights))
            expect(layer, worth)

        monkeypatch.setattr(MoeFfn, "_foresee", keep)
        monkeypatch.setattr(engine.experts, "expect", check)
        logits_of(engine, 12)
        policy = engine.experts.policy
    assert sorted(seen) == [0, 1, 2, 3] and policy._worth.max() > 1000


def test_a_file_of_another_bundle_is_refused(learned: tuple[Path, Ahead], tmp_path: Path) -> None:
    other = fc.bundle("zoo:stories-moe", tmp_path / "other", quantize="int8")
    shutil.copy(learned[0] / AHEAD_FILE, other / AHEAD_FILE)
    with pytest.raises(BundleError, match="another bundle"):
        fc.load(other)
    (other / AHEAD_FILE).write_bytes(b"x")
    with pytest.raises(BundleError, match="cannot be read"):
        fc.load(other)


def test_what_cannot_be_is_said(learned: tuple[Path, Ahead]) -> None:
    with pytest.raises(UsageError, match="tokens"):
        calibrate_ahead(learned[0], "A short text.", RunConfig(), tokens=2500)
    with pytest.raises(UsageError, match="no bundle"):
        calibrate_ahead("zoo:stories-moe", "A short text.", RunConfig(), tokens=2500)
