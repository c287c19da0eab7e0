"""What `replay` expects of a policy and recommends: figures worked out by hand, and traces that `profile` recorded."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sparse_bundle import slots_of

import flashinfer_cli as fc
from flashinfer_cli import engine as engine_module
from flashinfer_cli.apps.budgets import planned_budgets
from flashinfer_cli.apps.expected import Expected
from flashinfer_cli.apps.recommended import recommend, recommended_words
from flashinfer_cli.apps.replay import replay
from flashinfer_cli.apps.replay_page import render
from flashinfer_cli.cache.trace import Measured, TraceWriter, open_trace, read_trace
from flashinfer_cli.cli.main import run as genai_run
from flashinfer_cli.config import KiB, MiB
from flashinfer_cli.errors import UsageError
from flashinfer_cli.store.drive import DriveRate

# Ten tokens in two seconds: 1.2 of them computing, 0.8 waiting for reads that took 1.6 and which the drive alone does
# in 0.8: 400 kB of records a token at 10 MB/s, and 800 kB of slices at 20 MB/s.
RUN = Measured(
    tokens=10,
    passes=10,
    hits=60,
    misses=40,
    seconds=2.0,
    wait_seconds=0.8,
    read_seconds=1.6,
    other_bytes=8_000_000,
    record_rate=1e7,
    other_rate=2e7,
    memory=500 * MiB,
    context=64,
    streamed=800_000,
    plans=((400 * MiB, 0, 2_000_000), (480 * MiB, 0, 1_000_000), (520 * MiB, 80, 600_000), (600 * MiB, 100, 0)),
)


def test_what_ran_takes_the_time_that_it_took() -> None:
    expected = Expected(RUN, 400_000)
    assert (expected.computing, expected.slower, expected.waited) == pytest.approx((0.12, 2, 0.5))
    assert expected.tokens_per_second(400_000) == pytest.approx(5)


def test_a_rate_by_hand() -> None:
    expected = Expected(RUN, 400_000)
    # nothing missed: the slices' 0.04 s, which take 0.08, half of them waited for
    assert expected.tokens_per_second(0) == pytest.approx(1 / (0.12 + 0.04))
    # four times as much missed: 0.16 + 0.04 s, which take 0.4: more than computing and half of that
    assert expected.tokens_per_second(1_600_000) == pytest.approx(1 / 0.4)
    # 40 slots are half way from the second plan to the third, where 800 kB a pass stream, as did
    assert expected.tokens_per_second(400_000, 40) == pytest.approx(5)
    # 100 slots, and nothing streams: 0.04 s of records, which take 0.08
    assert expected.tokens_per_second(400_000, 100) == pytest.approx(1 / (0.12 + 0.04))
    # no slots: the least memory, under which 1.2 MB a pass more stream
    assert expected.tokens_per_second(400_000, 0) == pytest.approx(1 / max(0.28, 0.12 + 0.14))
    assert [expected.memory(slots) for slots in (0, 40, 80, 100, 101)] == [
        400 * MiB, 500 * MiB, 520 * MiB, 600 * MiB, None
    ]  # fmt: skip


def test_a_run_that_read_nothing_hides_nothing() -> None:
    run = replace(RUN, hits=100, misses=0, wait_seconds=0.0, read_seconds=0.0, other_bytes=0, streamed=0, plans=())
    expected = Expected(run, 0)
    assert expected.tokens_per_second(0) == pytest.approx(5)
    assert expected.tokens_per_second(1_000_000, 5) == pytest.approx(1 / 0.3) and expected.memory(5) is None


def test_drafts_share_the_slices_of_a_pass() -> None:
    """Half as many passes as tokens: of what streams more in a pass, a token has half."""
    expected = Expected(replace(RUN, passes=5), 400_000)
    assert expected.tokens_per_second(0, 100) == pytest.approx(1 / (0.12 + 0.5 * 2 * 0.4 / 20))


def points(*rates: float | None) -> list[dict]:
    return [
        {
            "slots": i,
            "share": i / 8,
            "bytes": i * MiB,
            "memory": (100 + i) * MiB - 1,
            "policies": {"lru": {"tokens_per_second": rate}},
        }
        for i, rate in enumerate(rates, 1)
    ]


def test_the_least_size_within_a_twentieth_of_the_best_is_recommended() -> None:
    found = recommend(points(5, 9.4, 9.5, 10, 9.9), "lru")
    assert found is not None
    assert (found["slots"], found["tokens_per_second"], found["best_tokens_per_second"]) == (3, 9.5, 10)
    said = recommended_words({"recommended": found, "measured": {"context": 64}, "kind": "experts", "phase": "decode"})
    assert said == (
        "Recommended: --memory 103MiB with --context 64, for 3.00 MiB of slots (37.5% of the experts): 9.50 tok/s to "
        "expect of policy lru, at the least of these sizes within 5% of its best, 10.0 at 50.0%."
    )
    assert recommend(points(None, None), "lru") is None


def write(path: Path, measured: Measured | None) -> Path:
    """Four experts of 100 kB in one layer, two of them with slots; a token asks for one."""
    about = {"model": "m", "policy": "lru", "slots": 2, "filled": False}
    with open_trace(path) as out:
        writer = TraceWriter(out, "experts", {0: 4}, {0: 100_000}, **about)
        for expert in (0, 1, 0, 2, 0, 1):
            writer.demand("decode", 0, np.array([[expert]]))
        if measured is not None:
            writer.end(measured)
    return path


def test_rates_of_a_trace(tmp_path: Path) -> None:
    # six tokens in 0.6 s; 4 of 6 are missed: 0.0667 MB a token at 1 MB/s, read and waited for as fast as the drive can
    run = replace(RUN, tokens=6, passes=6, hits=2, misses=4, seconds=0.6, wait_seconds=0.4, read_seconds=0.4)
    run = replace(run, record_rate=1e6, other_bytes=0, streamed=0, plans=((MiB, 0, 0), (9 * MiB, 4, 0)))
    found = replay(write(tmp_path / "t.jsonl", run), policies=("lru",), shares=(0.5, 1))
    assert found["as_it_ran"] == {
        "policy": "lru", "slots": 2, "share": 0.5, "hits": 2, "misses": 4, "hit_ratio": 2 / 6,
        "bytes_per_token": pytest.approx(4e5 / 6), "counted": {"hits": 2, "misses": 4},
        "tokens_per_second": pytest.approx(10),
    }  # fmt: skip
    half, whole = found["points"]
    assert half["policies"]["lru"]["tokens_per_second"] == pytest.approx(10)
    assert whole["policies"]["lru"]["tokens_per_second"] == pytest.approx(1 / (0.2 / 6 + 0.3 / 6))
    assert half["belady"]["tokens_per_second"] == whole["belady"]["tokens_per_second"]  # both read each expert once
    assert (half["memory"], whole["memory"]) == (5 * MiB, 9 * MiB)
    assert found["recommended"]["slots"] == 4 and found["recommended"]["memory"] == 9 * MiB


def test_traces_of_before_have_no_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", None)
    path.write_text(path.read_text().replace('"version":2', '"version":1'))
    assert genai_run(["replay", str(path), "--html", str(tmp_path / "r.html")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "record it anew" in shown and "2 of 6 (33.3%)" in shown and "tok/s of decode" not in shown
    assert "record it anew" in (tmp_path / "r.html").read_text()
    found = replay(path)
    assert found["recommended"] is None and found["measured"] is None and found["as_it_ran"]["counted"] is None
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    del header["about"]["slots"]  # how it ran is not said either
    path.write_text("\n".join([json.dumps(header), *lines[1:]]))
    assert replay(path)["as_it_ran"] is None and genai_run(["replay", str(path)]) == 0


@pytest.mark.parametrize(
    "change",
    [{"seconds": -1}, {"tokens": 0}, {"record_rate": float("inf")}, {"hits": "x"}, {"plans": [[1, 2]]},
     {"plans": [[2, 0, 0], [1, 0, 0]]}, {"more": 1}],
)  # fmt: skip
def test_measurements_that_are_none(tmp_path: Path, change: dict) -> None:
    path = write(tmp_path / "t.jsonl", RUN)
    assert read_trace(path).measured == RUN
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps({"measured": json.loads(lines[-1])["measured"] | change})]))
    with pytest.raises(UsageError, match="line 8"):
        read_trace(path)


# ------------------------------------------------------------------ through the commands


@pytest.fixture
def quick_drive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A drive that needs no measuring; the sizes of requests that were asked for."""
    asked: list[int] = []

    def measure(path: Path, *, request_bytes: int, depth: int, seconds: float = 1.0) -> DriveRate:
        asked.append(request_bytes)
        return DriveRate(request_bytes, depth, 1e9, "direct")

    monkeypatch.setattr("flashinfer_cli.apps.profile.measure", measure)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))  # nothing is piped in
    return asked


def profiled(model: str, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict, dict]:
    """The report of a profiled run of nine tokens, and what replay finds in its trace."""
    trace, report = folder / "t.jsonl.gz", folder / "r.json"
    command = ["profile", "-m", model, "-p", "a cat sat", "-n", "9", "--temp", "0", "--ignore-eos", "--quiet"]
    assert genai_run([*command, *options, "--trace", str(trace), "--json", str(report)]) == 0
    assert genai_run(["replay", str(trace), "--json", "--at", "25%", "--at", "50%", "--at", "90%", "--quiet"]) == 0
    return json.loads(report.read_text()), json.loads(capsys.readouterr().out.splitlines()[-1])


def check(found: dict, hits: int, misses: int) -> None:
    """What ran is counted as it counted itself, and every rate is told."""
    ran = found["as_it_ran"]
    assert (ran["hits"], ran["misses"]) == (hits, misses) and ran["counted"] == {"hits": hits, "misses": misses}
    for point in found["points"]:
        rates = [each["tokens_per_second"] for each in (*point["policies"].values(), point["belady"])]
        assert min(rates) > 0 and max(rates) == rates[-1] and point["memory"] > 100 * MiB
    memories = [point["memory"] for point in found["points"]]
    assert memories == sorted(memories)
    assert found["recommended"]["policy"] == ran["policy"] and found["recommended"]["memory"] in memories


def test_experts_profiled_and_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quick_drive: list[int]
) -> None:
    made = engine_module.make_plan
    monkeypatch.setattr(
        engine_module,
        "make_plan",
        lambda *args, **kwargs: replace(made(*args, **kwargs), expert_slots=20, transit_experts=3, streamed_bytes=1),
    )
    report, found = profiled("zoo:stories-moe", tmp_path, capsys)
    rows = [row for row in report["experts"] if row["phase"] == "decode"]
    hits, misses = (sum(row[name] for row in rows) for name in ("hits", "misses"))
    assert hits + misses == 8 * 4 * 2 and misses > 0
    check(found, hits, misses)
    size = found["bytes"] / found["records"]
    assert found["as_it_ran"]["bytes_per_token"] == pytest.approx(misses * size / 8)
    assert found["as_it_ran"]["slots"] == 20 and found["tokens"] == report["decode"]["tokens"] == 8
    assert quick_drive == [512 * KiB, size / 3]  # slices, and then experts, which a folder has in three pieces
    assert render(found)

    assert genai_run(["replay", str(tmp_path / "t.jsonl.gz"), "--at", "50%", "--html", str(tmp_path / "p.html")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{hits} of {hits + misses}" in shown and "Recommended: --memory" in shown and "the same" in shown
    page = (tmp_path / "p.html").read_text()
    assert page.count("<polyline") == 3 * 9 + 1 + 4 and "Recommended: --memory" in page
    assert f"{hits} hits of {hits + misses}" in page


def test_neurons_profiled_and_replayed(
    sparse_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick_drive: list[int],
) -> None:
    slots_of(monkeypatch, 3 * 40 * 512, late=3 * 20 * 512)
    report, found = profiled(str(sparse_bundle), tmp_path, capsys, "--stream", "always", "--context", "64")
    ran = found["as_it_ran"]
    neurons = sum(row["useful"] for row in report["io"] if row["kind"] == "neuron" and row["phase"] == "decode")
    assert ran["misses"] * 512 == neurons - report["wasted_bytes"] > 0
    assert ran["hits"] + ran["misses"] == round(report["decode"]["neurons"] * 8 * 3 * 160)
    check(found, ran["hits"], ran["misses"])
    assert found["kind"] == "neurons" and ran["slots"] == 3 * 60
    assert ran["bytes_per_token"] == ran["misses"] * 512 / 8


def test_a_run_in_which_all_fits(
    sparse_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_drive: list[int]
) -> None:
    report, found = profiled(str(sparse_bundle), tmp_path, capsys, "--context", "64")
    check(found, round(report["decode"]["neurons"] * 8 * 3 * 160), 0)
    assert quick_drive[1] == 512


def test_budgets_from_the_least_to_where_all_fits(sparse_bundle: Path) -> None:
    with fc.load(sparse_bundle, context=64) as engine:
        streamed, plans = planned_budgets(engine)
        assert streamed == 0 and plans[0][0] == engine.plan.least
    slots = [plan[1] for plan in plans]
    assert slots == sorted(slots) and slots[-1] == 3 * 160 and plans[-1][2] == 0
