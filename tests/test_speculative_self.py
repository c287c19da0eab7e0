"""A model that drafts for itself with what of it is in memory: nothing is read, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sparse_bundle import SHAPE, write_predictors
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli.config import SamplingParams
from flashinfer_cli.decoding.drafts import SelfDraft
from flashinfer_cli.decoding.sampling import make_sampler
from flashinfer_cli.errors import UsageError
from flashinfer_cli.plan import MemoryPlan, Sizes, make_plan, pin
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 6, 7, 8, 9], [11, 3, 11, 3]]


def planned(monkeypatch: pytest.MonkeyPatch, change: Callable[[MemoryPlan], MemoryPlan]) -> None:
    monkeypatch.setattr("flashinfer_cli.engine.make_plan", lambda *a, **k: change(make_plan(*a, **k)))


def experts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made, _ = make("mixtral", 0, folder / "m")
    planned(monkeypatch, lambda p: replace(p, expert_slots=4, transit_experts=3, streamed_bytes=p.streamed_bytes + 1))
    return made


def neurons(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(1)
    model = Decoder(SHAPE)
    (folder / "m").mkdir()
    write_folder(model, data.train_tokenizer(["a cat sat on a mat"], 300), folder / "m")
    out = fc.bundle(folder / "m", folder / "b")
    write_predictors(out)

    def change(p: MemoryPlan) -> MemoryPlan:
        per_layer = len(p.pinned) // 3
        return replace(p, pinned=tuple(i % per_layer < 4 or i >= 3 * per_layer for i in range(len(p.pinned))),
                       neuron_bytes=3 * 100 * 512)  # fmt: skip

    planned(monkeypatch, change)
    return out


def layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made, _ = make("llama", 0, folder / "m")
    planned(monkeypatch, lambda p: replace(p, pinned=(*(i % 2 == 0 for i in range(len(p.pinned) - 1)), True)))
    return made


def records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made, _ = make("llama", 0, folder / "m")
    out = fc.bundle(made, folder / "b")
    planned(monkeypatch, lambda p: replace(p, pinned=(False, *(True,) * (len(p.pinned) - 1))))
    return out


@pytest.mark.parametrize("kind", [experts, neurons, layers, records])
def test_it_changes_nothing(kind, tmp_path, monkeypatch):
    path = kind(tmp_path, monkeypatch)
    stream = "auto" if kind is experts else "always"
    with fc.load(path, context=64, stream=stream) as engine:
        want = [[e.token_id for e in engine.generate(prompt, GREEDY)] for prompt in PROMPTS]
    with fc.load(path, context=64, stream=stream, draft="self", speculate="3") as engine:
        assert [[e.token_id for e in engine.generate(prompt, GREEDY)] for prompt in PROMPTS] == want
        said = engine.report().speculation
        assert said["drafted"] > 0 and said["passes"] < 2 * 11 + 1
        session = engine.session()
        session.prefill(PROMPTS[0], more=True)
        keys, before = [k[:, : session.kv.length].clone() for k in session.kv.keys], engine.report()
        draft = engine.speculator.draft
        assert isinstance(draft, SelfDraft)
        drafted, q = draft.propose([*session.ids, 7], 5, make_sampler(GREEDY.resolved({})), torch.Generator())
        after = engine.report()
        assert len(drafted) == 5 and q.shape[0] == 5
        engine.decoder.rt.feed.end()
        reads = [
            {io["kind"]: io["bytes"] for io in r.io if io["kind"] in ("expert", "neuron")} for r in (before, after)
        ]
        assert reads[0] == reads[1] and after.experts == before.experts
        assert session.kv.length == len(session.ids) == len(PROMPTS[0])
        assert all(torch.equal(a, b[:, : len(session.ids)]) for a, b in zip(keys, session.kv.keys, strict=True))


def test_with_all_in_memory_it_is_always_right(tiny):
    folder, _ = tiny("mixtral", 0)
    with fc.load(folder, context=64, draft="self", speculate="3") as engine:
        list(engine.generate(PROMPTS[0], GREEDY))
        said = engine.report().speculation
    assert said["accepted"] == said["drafted"] > 5 and said["alpha"] == 1


def test_a_seed_does_not_depend_on_what_is_in_memory(tmp_path, monkeypatch):
    """A draft by what is here would draw other numbers with other experts here, so where a seed is given none is."""
    folder = experts(tmp_path, monkeypatch)
    seeded = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    with fc.load(folder, context=64, draft="self", speculate="3") as engine:
        texts = [[e.token_id for e in engine.generate(PROMPTS[0], seeded)] for _ in range(2)]
        assert engine.report().speculation["drafted"] == 0 and texts[0] == texts[1]
        list(engine.generate(PROMPTS[0], replace(seeded, seed=None)))
        assert engine.report().speculation["drafted"] > 0


def test_a_head_that_streams_cannot_draft(tiny):
    folder, _ = tiny("llama", 0)
    with pytest.raises(UsageError, match="draft for itself"):
        fc.load(folder, context=64, stream="always", draft="self")


def test_whole_parts_stay_in_the_order_that_is_asked_for():
    sizes = Sizes(always=0, slices=(5, 5, 5, 5, 3), kv_per_token=0, scratch=lambda chunk: 0, order=(4, 0, 3, 1, 2))
    assert pin(sizes, 13) == (True, False, False, True, True)
    assert pin(sizes, 23) == (True,) * 5
