"""Traces and their replay: the hits of the live run exactly, figures worked out by hand, and files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import Tiny, make

import flashinfer_cli as fc
from flashinfer_cli import engine as engine_module
from flashinfer_cli.apps.charts import Line, lines
from flashinfer_cli.apps.recording import recording
from flashinfer_cli.apps.replay import as_it_ran, recall, replay
from flashinfer_cli.apps.replay_page import render
from flashinfer_cli.cache.trace import TraceWriter, open_trace, read_trace
from flashinfer_cli.cli.main import run as genai_run
from flashinfer_cli.config import EXPERT_POLICIES, SamplingParams
from flashinfer_cli.errors import UsageError

GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3_moe", 0, tmp_path_factory.mktemp("moe") / "model")[0]


def record(
    model: Path, path: Path, monkeypatch: pytest.MonkeyPatch, *, stay: int | None = None, **options
) -> fc.Engine:
    """A run with so many slots, traced; the engine is closed and still tells its figures."""
    made = engine_module.make_plan
    if stay is not None:
        monkeypatch.setattr(
            engine_module,
            "make_plan",
            lambda *args, **kwargs: replace(
                made(*args, **kwargs), expert_slots=stay, transit_experts=3, streamed_bytes=1
            ),
        )
    with fc.load(model, context=60, prefill_chunk=5, **options) as engine, recording(engine, path):
        list(engine.generate([5, 9, 100, 3, 77, 31, 8], GREEDY))
    return engine


@pytest.mark.parametrize("policy", EXPERT_POLICIES)
@pytest.mark.parametrize("stay", [0, 3, 7, None])
def test_replay_counts_what_the_run_counted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, stay: int | None
) -> None:
    path = tmp_path / "trace.jsonl"
    engine = record(model, path, monkeypatch, stay=stay, expert_policy=policy)
    live, trace = engine.experts.policy, read_trace(path)
    again = as_it_ran(trace)
    assert again.counts == live.counts and live.misses() + live.hits() == 29 * 2 * 2
    assert (live.misses() == 0) == (stay is None)
    assert trace.tokens("decode") == 29 and trace.tokens("prefill") == 7
    rows = [row for row in engine.report().experts if row["phase"] == "decode"]
    named = {each["ahead"]: each["recall"][1] for each in recall(trace, "decode")}
    assert named[1] == pytest.approx(sum(row["recall"][1] for row in rows) / len(rows))


def write(path: Path, rounds: list[list[list[int]]], kind: str = "experts", records: int = 4) -> Path:
    """One token a round; `rounds[i][layer]` are ids."""
    layers = range(len(rounds[0]))
    with open_trace(path) as out:
        writer = TraceWriter(
            out, kind, dict.fromkeys(layers, records), dict.fromkeys(layers, 1000), model="<m>", policy="lru", slots=1
        )
        for each in rounds:
            for layer, ids in enumerate(each):
                writer.guess(layer, 1, [3, 0])
                writer.demand("decode", layer, np.array([ids]))
    return path


def test_figures_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl.gz", [[[0]], [[1]], [[0]], [[2]], [[0]], [[1]]])
    found = replay(path, policies=("lru",), shares=(0.5,))
    (point,) = found["points"]
    # room for two of four: 0 and 1 come in, 0 hits, 2 drives 1 out, 0 hits, 1 is gone
    assert point["slots"] == 2 and point["share"] == 0.5
    assert point["policies"]["lru"] == {
        "hit_ratio": 2 / 6, "prefill_hit_ratio": None, "bytes_per_token": pytest.approx(4000 / 6),
        "tokens_per_second": None,
    }  # fmt: skip
    assert point["belady"]["hit_ratio"] == 3 / 6  # 2 need not stay
    assert point["gap"] == pytest.approx({"chance": 0.5, "policy": -1 / 6, "order": 1 / 6, "room": 0, "cold": 0.5})
    assert found["recall"] == [{"ahead": 1, "recall": [0, 0.5], "chance": [0.25, 0.5]}]
    assert found["tokens"] == found["demanded"] == 6 and found["about"]["model"] == "<m>"


def test_neurons_replay_as_well(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rounds = [[sorted(rng.choice(300, 40, replace=False).tolist()) for _ in range(2)] for _ in range(8)]
    found = replay(write(tmp_path / "n.jsonl", rounds, "neurons", 300), shares=(0.25, 0.5))
    assert found["kind"] == "neurons"
    for point in found["points"]:
        assert all(each["hit_ratio"] <= point["belady"]["hit_ratio"] for each in point["policies"].values())
        assert sum(point["gap"].values()) == pytest.approx(1)


def test_more_room_never_hurts_the_bound(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(model, tmp_path / "t.jsonl", monkeypatch, stay=4)
    found = replay(tmp_path / "t.jsonl")
    bounds = [point["belady"]["hit_ratio"] for point in found["points"]]
    assert bounds == sorted(bounds) and len(bounds) == 5  # of six experts a layer: one to five
    for point in found["points"]:
        best = max(each["hit_ratio"] for each in point["policies"].values())
        assert best <= point["belady"]["hit_ratio"] and sum(point["gap"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "empty"), ("text", "line 1"), ('{"format": "other", "version": 1}', "line 1"), ("[1]", "line 1")],
)
def test_files_that_are_no_traces(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read_trace(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / "none")


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [[[0]], [[1]]])
    good = path.read_text()
    path.write_text(good + '{"phase": "decode", "lay')
    with pytest.raises(UsageError, match="line 4"):
        read_trace(path)
    path.write_text(good + '{"phase": "decode", "layer": 0, "ids": [[4]]}\n')
    with pytest.raises(UsageError, match="does not know"):
        read_trace(path)
    path.write_text(good.splitlines()[0] + "\n")
    with pytest.raises(UsageError, match="no demand"):
        replay(path)


def test_the_commands(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "t.jsonl", [[[0]], [[1]], [[0]]])
    assert genai_run(["replay", str(path), "--html", str(tmp_path / "r.html"), "--at", "50%"]) == 0
    assert "Belady" in capsys.readouterr().out
    page = (tmp_path / "r.html").read_text()
    assert "&lt;m&gt;" in page and "<m>" not in page and "polyline" in page
    assert genai_run(["replay", str(path), "--json", "--policy", "lfu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["points"][0]["policies"]) == ["lfu"]
    assert render(found)  # read back from JSON
    for wrong in (["--at", "150%"], ["--at", "x"], ["--policy", "mru"]):
        assert genai_run(["replay", str(path), *wrong]) == 2
    assert "Policies are" in capsys.readouterr().err


def test_only_models_with_experts_are_traced(tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny("llama", 0)[0]
    with (
        fc.load(dense, context=20) as engine,
        pytest.raises(UsageError, match="no experts"),
        recording(engine, tmp_path / "t"),
    ):
        pass


def test_curves_stay_in_the_chart() -> None:
    chart = lines(
        [Line("a<b", "part1", [(0.1, 0.2), (1.0, float("nan"))]), Line("none", "other", [])],
        label="x", across=str, up=str,
    )  # fmt: skip
    assert "a&lt;b" in chart and "nan" not in chart.replace("nan at", "")
