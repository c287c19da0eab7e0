"""`genai-run calibrate` on small bundles of every kind: tables, JSON, and options that say nothing about a kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from bundle_sources import hashes
from test_calibrate import TEXT, give_another_tokenizer, make
from tiny_models import make as make_tiny

import flashinfer_cli as fc
from flashinfer_cli.apps import calibrate as app
from flashinfer_cli.apps import gated, paying
from flashinfer_cli.apps.paying import Reading
from flashinfer_cli.bundles.sparsity import SPARSITY_FILE, LayerSparsity, Sparsity
from flashinfer_cli.cli.calibrate import over_predicted, table, thin
from flashinfer_cli.cli.main import run
from flashinfer_cli.errors import UnsupportedModelError
from flashinfer_cli.models.ahead import AHEAD_FILE
from flashinfer_cli.store.drive import DriveRate
from flashinfer_cli.training.shape import Shape

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPES = {
    "relu": ("relu", Shape(**SMALL)),
    "silu": ("silu", Shape(**SMALL)),
    "moe": ("silu", Shape(**SMALL, num_experts=6, moe_intermediate_size=32)),
}
Genai = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    (root / "text").write_text(" ".join([TEXT] * 3))
    return {name: make(root / name, act, shape) for name, (act, shape) in SHAPES.items()}


@pytest.fixture
def genai(bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Genai:
    """genai(kind, ...) calibrates a copy of that bundle on a short text -> (exit code, stdout, stderr)."""

    def call(kind: str, *options: str) -> tuple[int, str, str]:
        if not (tmp_path / kind).exists():
            shutil.copytree(bundles[kind], tmp_path / kind)
        text = () if "--text" in options else ("--text", str(bundles[kind].parents[1] / "text"))
        return (run(["calibrate", str(tmp_path / kind), *text, *options]), *capsys.readouterr())

    return call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Studies of few ways on a drive that needs so many seconds for what one token misses."""

    def reads(seconds: float) -> None:
        monkeypatch.setattr(gated, "measure_records", lambda *_: seconds)

    monkeypatch.setattr(gated, "DENSITIES", (0.9,))
    monkeypatch.setattr(gated, "measure", partial(gated.measure, seconds=0.02))
    return reads


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A drive of 1 GB/s that needs so many seconds for what one token misses of a layer."""

    def reads(seconds: float) -> None:
        monkeypatch.setattr(paying, "measure_records", lambda *_: seconds)

    monkeypatch.setattr(paying, "measure", lambda *_, **__: DriveRate(1 << 20, 8, 1e9, "direct"))
    reads(1.0)
    return reads


def test_of_a_relu_model_it_is_told_what_each_layer_does(
    genai: Genai, drive: Callable[[float], None], tmp_path: Path
) -> None:
    code, out, err = genai("relu", "--tokens", "1000")
    assert (code, err) == (0, "")
    title, head, *rows, note, half, quarter = out.splitlines()
    assert half.startswith("With 50% of the FFN in memory plain streaming reads 50% of it a token in 0.0492 ms, the ")
    assert quarter.endswith(" in 2e+03 ms: it does not pay: run it with --exact.")
    assert title == "Calibrated on 1,000 tokens" and head.split()[:4] == ["layer", "silent", "recall", "precision"]
    assert [row.split()[0] for row in rows] == ["0", "1"] and note.startswith("Perplexity ")
    code, out, _ = genai("relu", "--tokens", "1000", "--recall", "0.8", "--like", str(tmp_path / "relu"), "--json")
    found = json.loads(out)
    assert [reading["pays"] for reading in found["reading"]] == [False, False]
    assert code == 0 and found["recall_asked"] == 0.8 and found["thin"] == found["over_predicted"] == []
    assert all(0.7 < layer["recall"] < 0.9 for layer in found["layers"])
    assert found["quality"] == json.loads((tmp_path / "relu" / SPARSITY_FILE).read_text())["quality"]


def test_thin_spots_are_those_below_what_was_asked_for() -> None:
    """A tenth is missed where a fiftieth or a tenth may be; four, or one and a half times as many are named as fire."""
    layers = tuple(LayerSparsity(i, 8, 1, 0.1, named, recall, 0.5) for i, (recall, named) in enumerate(
        [(0.9, 0.15), (0.98, 0.4), (0.975, 0.15)]))  # fmt: skip
    found = Sparsity("", 1000, layers, {"perplexity": 2.0, "dense_perplexity": 2.0, "top1_agreement": 1.0})
    assert thin(found, 0.98) == [0] and thin(found, 0.9) == [] and over_predicted(found) == [1]
    notes = table(found, 0.98, []).notes
    assert "recall of 0.98 asked for: layer 0." in notes[1] and "Over 3 times what fires is named: layer 1." in notes
    assert len(table(found, 0.9, []).notes) == 2
    reading = [Reading(0.5, 0.5, 0.1, 0.01, 0.02), Reading(0.25, 0.75, 0.1, 0.1, 0.2)]
    pays, not_so = table(found, 0.9, reading).notes[-2:]
    assert pays.endswith("reads 50% of it a token in 100 ms, the neurons named 1.00% in 20 ms: it pays.")
    assert not_so.endswith(
        "75% of it a token in 100 ms, the neurons named 10.00% in 200 ms: it does not pay: run it with --exact."
    )


@pytest.mark.parametrize("pays", [True, False])
def test_of_a_gated_model_it_is_told_whether_a_way_pays(
    genai: Genai, quick: Callable[[float], None], bundles: dict[str, Path], tmp_path: Path, pays: bool
) -> None:
    quick(1e-12 if pays else 100.0)
    code, out, err = genai("silu", "--max-ppl-increase", "50%")
    assert (code, err) == (0, "")
    assert out.startswith("What skipping neurons would cost and save\nneurons by  kept  perplexity")
    assert [line.split()[0] for line in out.splitlines()[2:7]] == list(gated.KINDS)
    assert "Thresholds from 2,048 tokens; perplexity of 512 that follow" in out
    assert ("would take 0 ms within +50%. Runs do not do this yet" in out) == pays
    assert ("no way within +50% is faster: none pays, stream it plainly." in out) == (not pays)
    assert hashes(tmp_path / "silu") == hashes(bundles["silu"]), "nothing is written"
    code, out, _ = genai("silu", "--json", "--tokens", "3000")
    found = json.loads(out)
    assert code == 0 and found["tokens"] == 3000 and found["max_increase"] == 0.01
    assert bool(found["best"]) == pays and {way["kind"] for way in found["ways"]} == set(gated.KINDS)


def test_a_relu_model_is_held_to_the_perplexity_asked_for(
    genai: Genai, drive: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    costly = {"perplexity": 1.5, "dense_perplexity": 1.0, "top1_agreement": 0.5}
    monkeypatch.setattr(app, "quality", lambda *_: costly)
    code, out, err = genai("relu", "--tokens", "1000", "--max-ppl-increase", "40%")
    assert (code, out) == (1, "") and "Perplexity rises by 50.00%" in err and "40.00% is the most asked for" in err
    code, out, _ = genai("relu", "--tokens", "1000", "--max-ppl-increase", "60%")
    assert code == 0 and "Perplexity 1.500, dense 1.000 (+50.00%)" in out


def test_of_a_mixture_of_experts_it_is_told_what_guesses(genai: Genai, tmp_path: Path) -> None:
    code, out, err = genai("moe", "--tokens", "1000")
    assert (code, err) == (0, "")
    title, head, *_ = out.splitlines()
    assert title == "Guesses of experts, learned from 1,000 tokens"
    assert head.split() == ["from", "layer", "ahead", "router", "probe", "chance", "taken"]
    assert (tmp_path / "moe" / AHEAD_FILE).exists()
    code, out, _ = genai("moe", "--tokens", "1000", "--json")
    found = json.loads(out)
    pairs = {(pair["source"], pair["layer"]) for pair in found["pairs"]}
    assert code == 0 and found["tokens"] == 1000 and pairs == {(-1, 0), (-1, 1), (0, 1), (0, 0), (1, 1)}
    assert all(pair["chance"] == pytest.approx(1 / 3) for pair in found["pairs"])


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("silu", "--recall", "0.98"),
        ("silu", "--like", "bundle"),
        ("moe", "--recall", "0.98"),
        ("moe", "--like", "bundle"),
        ("moe", "--max-ppl-increase", "1%"),
    ],
)
def test_an_option_that_says_nothing_about_a_kind_is_refused(genai: Genai, kind: str, option: str, value: str) -> None:
    code, out, err = genai(kind, option, value)
    assert (code, out) == (2, "") and f"error: {option} does not apply to " in err and "hint: Leave it out" in err


@pytest.mark.parametrize("kind", SHAPES)
def test_what_every_kind_refuses(genai: Genai, tmp_path: Path, kind: str) -> None:
    (tmp_path / "short").write_text("a cat sat")
    code, out, err = genai(kind, "--text", str(tmp_path / "short"))
    assert (code, out) == (2, "") and "at least." in err and "hint: Give a longer text with --text." in err
    code, out, err = genai(kind, "--memory", "20MiB")
    assert (code, out) == (2, "") and "too small to calibrate on" in err and "hint: Give --memory" in err
    give_another_tokenizer(tmp_path / kind)
    code, out, err = genai(kind)
    assert (code, out) == (1, "") and "it is another model's" in err
    assert not (tmp_path / kind / SPARSITY_FILE).exists() and not (tmp_path / kind / AHEAD_FILE).exists()


@pytest.mark.parametrize(("family", "gate"), [("phi", False), ("llama", True)])
def test_what_a_model_without_zeros_is_told(tmp_path: Path, family: str, gate: bool) -> None:
    """Only of models with a gate is anything measured."""
    out = fc.bundle(make_tiny(family, 0, tmp_path / "m")[0], tmp_path / "b")
    with pytest.raises(UnsupportedModelError, match="leaves no neuron at zero") as refused:
        app.calibrate(out, TEXT, fc.RunConfig())
    assert ("genai-run calibrate measures" in refused.value.hint) == gate
    assert ("with a gate only" in refused.value.hint) != gate
