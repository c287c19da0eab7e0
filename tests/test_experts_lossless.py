"""Logits of MoE models are the same, byte for byte, whatever stays, goes, or is read ahead; slots keep to plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import Tiny, make, tiny_config_dicts

import flashinfer_cli as fc
from flashinfer_cli import engine as engine_module
from flashinfer_cli.config import EXPERT_POLICIES, RunConfig
from flashinfer_cli.engine import Engine
from flashinfer_cli.models.open import open_model

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "gpt_oss")
CASES = [(family, index) for family in FAMILIES for index in range(len(tiny_config_dicts()[family]))]
PROMPT, STEPS = [5, 9, 100, 3, 77, 31, 8], 14


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def folder(request: pytest.FixtureRequest, tiny: Tiny) -> Path:
    return tiny(*request.param)[0]


def logits_of(engine: Engine, steps: int = STEPS) -> torch.Tensor:
    """Of a prompt in chunks and then token by token, greedily: [steps + 1, V]."""
    session = engine.session()
    rows = [session.prefill(PROMPT, more=True)]
    for index in range(steps):
        rows.append(session.step(int(rows[-1].argmax()), more=index + 1 < steps))
    return torch.stack(rows)


def slots(monkeypatch: pytest.MonkeyPatch, stay: int, transit: int) -> None:
    """Load models with so many expert slots, as a tighter budget would give."""
    made = engine_module.make_plan
    monkeypatch.setattr(
        engine_module,
        "make_plan",
        lambda *args, **kwargs: replace(
            plan := made(*args, **kwargs),
            expert_slots=stay,
            transit_experts=transit,
            streamed_bytes=plan.streamed_bytes + 1,
        ),
    )


@pytest.fixture(scope="module")
def resident(folder: Path) -> torch.Tensor:
    with fc.load(folder, stream="never", context=60, prefill_chunk=4) as engine:
        found = logits_of(engine)
        report = engine.report()
    assert report.exactness == "exact"
    assert sum(row["misses"] for row in report.experts) == 0 < sum(row["hits"] for row in report.experts)
    return found


@pytest.mark.parametrize(
    ("policy", "stay", "transit"),
    [("lfu", 0, 1), ("stale", 1, 3), ("lru", 3, 2), ("lru-layer", 5, 4), ("pinned", 3, 2), ("lfu", 5, 4)],
)
def test_every_policy_and_size(
    folder: Path, resident: torch.Tensor, monkeypatch: pytest.MonkeyPatch, policy: str, stay: int, transit: int
) -> None:
    slots(monkeypatch, stay, transit)
    prefetch = {(1, 3): 2, (3, 2): "off"}.get((stay, transit), "auto")
    options = {"expert_policy": policy, "prefetch_experts": prefetch, "lookahead": 1 + stay % 2, "prefill_chunk": 4}
    with fc.load(folder, context=60, **options) as engine:
        cache = engine.experts
        assert cache is not None and cache.policy.capacity == stay and cache.slots == stay + transit
        assert torch.equal(logits_of(engine), resident)
        report = engine.report()
        assert report.exactness == "exact" and report.expert_cache["policy"] == policy
        held = len(cache._slot) + len(cache._guesses) + len(cache._draining) + len(cache._free)
        assert held == cache.slots and len(cache._slot) <= stay
        for phase in ("prefill", "decode"):
            rows = [row for row in report.experts if row["phase"] == phase]
            assert sum(row["hits"] for row in rows) == cache.policy.hits(phase)
            assert sum(row["misses"] for row in rows) == cache.policy.misses(phase)
        guessed = sum(row["guessed"] for row in report.experts)
        assert (guessed == 0) == (prefetch == "off" or transit == 1)
        assert sum(row["wasted_bytes"] for row in report.experts) == report.wasted_bytes


@pytest.fixture(scope="module")
def bundled(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    out = fc.bundle(tiny("deepseek_v2", 0)[0], tmp_path_factory.mktemp("all") / "bundle")
    with fc.load(out, stream="never", context=60, prefill_chunk=4) as engine:
        return out, logits_of(engine)


@pytest.mark.parametrize(
    ("policy", "prefetch"),
    [*((policy, 3) for policy in (*EXPERT_POLICIES, "none")), ("lfu", "off"), ("lfu", "auto"), ("none", "auto"),
     ("pinned", "off")],
)  # fmt: skip
def test_policies_sizes_and_guesses_combined(
    bundled: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch, policy: str, prefetch: str | int
) -> None:
    for stay, transit, lookahead in ((0, 1, 1), (1, 4, 2), (3, 1, 2), (7, 4, 1), (11, 4, 2)):
        with monkeypatch.context() as patch:
            slots(patch, stay, transit)
            options = {"expert_policy": policy, "prefetch_experts": prefetch, "lookahead": lookahead}
            with fc.load(bundled[0], context=60, prefill_chunk=4, **options) as engine:
                assert torch.equal(logits_of(engine, 6), bundled[1][:7]), (stay, transit)
                assert engine.report().exactness == "exact"


def test_streamed(folder: Path, resident: torch.Tensor) -> None:
    with fc.load(folder, stream="always", context=60, prefill_chunk=4) as engine:
        assert torch.equal(logits_of(engine), resident)


def test_a_bundle(folder: Path, resident: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some layers are dense its sums run in another order, so it is held against itself."""
    fc.bundle(folder, tmp_path / "bundle")
    with fc.load(tmp_path / "bundle", context=60, prefill_chunk=4, stream="never") as engine:
        whole = logits_of(engine)
    assert torch.allclose(whole, resident, atol=1e-4)
    slots(monkeypatch, 3, 3)
    with fc.load(tmp_path / "bundle", context=60, prefill_chunk=4) as engine:
        assert torch.equal(logits_of(engine), whole)


def test_no_bias_is_no_change_and_some_is_labelled(
    folder: Path, resident: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_model(folder).config
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    # one more than a token asks for over all layers: with fewer the least recent would never be asked for again
    slots(monkeypatch, layers * config.moe.num_experts_per_tok + 1, 3)
    with fc.load(folder, context=60, prefill_chunk=4, cache_bias=0.0, keep_top=1, expert_policy="lru") as engine:
        assert torch.equal(logits_of(engine), resident) and engine.report().exactness == "exact"
        plain = engine.experts.policy.hits() / (engine.experts.policy.hits() + engine.experts.policy.misses())
    for lossy in ({"cache_bias": 1.0}, {"cache_gap": 1.0}):
        with fc.load(folder, context=60, prefill_chunk=4, keep_top=1, expert_policy="lru", **lossy) as engine:
            biased = logits_of(engine)
            assert torch.equal(biased[0], resident[0])  # a prompt is routed as ever
            report, policy = engine.report(), engine.experts.policy
            assert report.exactness == "sparse" and "sparse" in report.summary()
            assert policy.hits() / (policy.hits() + policy.misses()) > plain


@pytest.mark.parametrize(
    ("options", "policy"),
    [({}, "adaptive"), ({"cache_gap": 0.1}, "foresight"), ({"cache_bias": 0.1}, "foresight"),
     ({"degrade": 0.3}, "foresight"), ({"cache_gap": 0.1, "expert_policy": "lfu"}, "lfu")],
)  # fmt: skip
def test_lossy_routing_is_no_judge_of_policies(tmp_path: Path, options: dict[str, Any], policy: str) -> None:
    """Demands that lean on what is here say that it was well chosen: nothing to compare two policies by."""
    small = {"small_experts": "int4"} if "degrade" in options else {}
    bundle = fc.bundle("zoo:stories-moe", tmp_path / "b", **small)
    with fc.load(bundle, context=60, **options) as engine:
        assert engine.report().expert_cache["policy"] == policy


def test_many_tokens_at_once_in_decode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What checks drafts: several tokens through the experts in one pass, whatever is in the cache."""
    found = []
    for stay, transit in ((2, 2), (5, 1), (0, 4)):
        with monkeypatch.context() as patch:
            slots(patch, stay, transit)
            with fc.load(folder, context=60, prefill_chunk=4) as engine:
                session = engine.session()
                rows = list(session.all_logits(PROMPT * 3, 6))
                found.append(torch.cat([row.clone() for row in rows]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_report_and_its_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashinfer_cli.apps.html_report import render
    from flashinfer_cli.cli.report_tables import report_tables

    slots(monkeypatch, 4, 3)
    with fc.load(folder, context=60, prefetch_experts=2) as engine:
        logits_of(engine)
        found = engine.report().to_dict()
    for report in (found, json.loads(json.dumps(found))):
        tables = [table for table in report_tables(report) if table.title == "Experts, decode"]
        (table,) = tables
        assert len({len(row) for row in (table.columns, *table.rows)}) == 1
        layers = [row for row in report["experts"] if row["phase"] == "decode"]
        assert len(table.rows) == len(layers) + 1 and "on, as asked" in " ".join(table.notes)
        assert "<h2>Experts</h2>" in render(report)
    for row in layers:
        assert row["hits"] + row["misses"] == sum(row["uses"].values()) >= row["right"]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_bias_is_evaluated_token_by_token(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_engine import add_tokenizer

    from flashinfer_cli.apps.evaluate import evaluate

    folder = make(family, 0, tmp_path / "model")[0]
    add_tokenizer(folder)
    slots(monkeypatch, 4, 3)
    text = "A fox and a bee went out to see the sea."
    plain, biased = (
        evaluate(str(folder), text, RunConfig(context=30, cache_bias=bias), against="dense") for bias in (0.0, 1.0)
    )
    assert plain["exactness"] == "exact" and plain["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert biased["exactness"] == "sparse" and biased["mean_kl"] > 1e-6
    assert biased["expert_hits"] + biased["expert_misses"] > 0 and "expert_hits" not in plain
