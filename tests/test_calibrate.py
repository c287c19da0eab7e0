"""Calibration: killed and resumed, what it refuses, and what it says of models without zeros."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps import calibrate as app
from flashinfer_cli.apps import gated
from flashinfer_cli.apps import ways as tried
from flashinfer_cli.apps.predictors import _adam, balanced, cheapest, judged, packed, unpacked
from flashinfer_cli.apps.text import read_text
from flashinfer_cli.bundles.sparsity import ORDER_FILE, PREDICTORS_FILE, SPARSITY_FILE
from flashinfer_cli.config import RunConfig
from flashinfer_cli.errors import BudgetError, BundleError, TokenizerError, UnsupportedModelError, UsageError
from flashinfer_cli.models.predictors import rounded
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.shape import Shape

WORDS = ["a cat sat on a mat", "the dog ran to the log", "who saw what the cat did"]
TEXT = " ".join(f"{WORDS[i * 7 % 3]} {i % 13}" for i in range(200))
OPTIONS = {"tokens": 1000, "evaluate_tokens": 200}


def make(folder: Path, act: str, shape: Shape | None = None) -> Path:
    torch.manual_seed(1)
    shape = shape or Shape(
        vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
    )  # fmt: skip
    model = Decoder(replace(shape, hidden_act=act))
    (folder / "m").mkdir(parents=True)
    write_folder(model, data.train_tokenizer(WORDS, 300), folder / "m")
    return fc.bundle(folder / "m", folder / "b")


def give_another_tokenizer(bundle: Path) -> None:
    """That of a larger model."""
    shutil.copy(zoo.path_of("stories-relu") / "tokenizer.json", bundle)
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["files"].pop("tokenizer.json")
    (bundle / "bundle.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("relu"), "relu")


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "b"))


@pytest.fixture(scope="module")
def calibrated(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("calibrated") / "b"))
    app.calibrate(out, TEXT, RunConfig(), **OPTIONS)
    return out


def stop_at(layer: int):
    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("calibrating") and done == layer:
            raise KeyboardInterrupt

    return progress


def test_a_killed_run_goes_on_and_ends_alike(calibrated, copy, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, progress=stop_at(2))
    assert not (copy / SPARSITY_FILE).exists() and not (copy / PREDICTORS_FILE).exists()
    with (copy.parent / ".b.calibration" / "0.safetensors").open("r+b") as file:
        file.truncate(1000)  # damaged: that layer is learned again
    with fc.load(copy, context=16) as engine:
        assert engine.exactness == "exact"  # half a calibration is none
    fitted, real = [], app._fit
    monkeypatch.setattr(app, "_fit", lambda layer, *rest: fitted.append(layer) or real(layer, *rest))
    app.calibrate(copy, TEXT, RunConfig(), **OPTIONS)
    assert fitted == [0, 2]
    for name in (PREDICTORS_FILE, ORDER_FILE, SPARSITY_FILE):
        assert (copy / name).read_bytes() == (calibrated / name).read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == ["b"]
    with fc.load(copy, context=16) as engine:
        assert engine.exactness == "sparse"
    fitted.clear()
    with pytest.raises(KeyboardInterrupt):
        app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, progress=stop_at(1))
    with pytest.raises(KeyboardInterrupt):  # another text: nothing of the run before serves
        app.calibrate(copy, "cat " + TEXT, RunConfig(), **OPTIONS, progress=stop_at(1))
    assert fitted == [0, 0]


def test_a_kill_while_it_is_measured_leaves_no_made_up_quality(copy):
    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("measuring"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, progress=progress)
    assert not (copy / SPARSITY_FILE).exists()
    seen = []
    app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, progress=lambda done, total, what: seen.append(what))
    assert not any(what.startswith("calibrating") for what in seen)  # no layer is left, none is read again
    assert (copy / SPARSITY_FILE).exists()


def test_what_it_refuses(copy, tmp_path):
    with pytest.raises(UsageError, match="tokens; calibration needs 1,200"):
        app.calibrate(copy, "A cat. " * 20, RunConfig(), **OPTIONS)
    with pytest.raises(UsageError, match="no bundle"):
        app.calibrate(make(tmp_path / "x", "relu").parent / "m", TEXT, RunConfig(), **OPTIONS)
    with pytest.raises(BudgetError, match="too small"):
        app.calibrate(copy, TEXT, RunConfig(memory="20MiB"), **OPTIONS)
    (tmp_path / "t").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_text(tmp_path / "t")
    with pytest.raises(UsageError, match="Cannot read"):
        read_text(tmp_path / "none")
    give_another_tokenizer(copy)
    with pytest.raises(TokenizerError, match="another model's"):
        app.calibrate(copy, TEXT, RunConfig(), **OPTIONS)
    assert not (copy / SPARSITY_FILE).exists()


def test_a_bundle_that_changed_since_is_refused(calibrated, tmp_path):
    copy = Path(shutil.copytree(calibrated, tmp_path / "b"))
    text = (copy / "bundle.json").read_text()
    (copy / "bundle.json").write_text(text + "\n")
    with pytest.raises(BundleError, match="changed since it was calibrated"):
        fc.load(copy, context=16)
    app.calibrate(copy, TEXT, RunConfig(), **OPTIONS)  # as the hint says
    with fc.load(copy, context=16) as engine:
        assert engine.exactness == "sparse"


def test_predictors_of_the_same_model_in_other_formats(bundle, calibrated, tmp_path):
    rounded = fc.bundle(bundle.parent / "m", tmp_path / "r", quantize_trunk="int8")
    found = app.calibrate(rounded, TEXT, RunConfig(), **OPTIONS, like=calibrated)
    mine, others = (load_file(each / PREDICTORS_FILE) for each in (rounded, calibrated))
    assert all(torch.equal(mine[name], others[name]) for name in mine if not name.endswith("bias"))
    fewer = app.calibrate(rounded, TEXT, RunConfig(), **OPTIONS, like=rounded, recall=0.8)  # and other thresholds
    for loose, strict in zip(fewer.layers, found.layers, strict=True):
        assert 0.75 < loose.recall < 0.9 < 0.95 < strict.recall and loose.predicted < strict.predicted
    theirs = json.loads((calibrated / SPARSITY_FILE).read_text())
    assert found.quality["dense_perplexity"] != theirs["quality"]["dense_perplexity"]  # measured here
    assert found.tokens == theirs["tokens"] and len(found.layers) == 3
    with fc.load(rounded, context=16) as engine:
        assert engine.exactness == "sparse"
    with pytest.raises(UsageError, match="no calibrated bundle"):
        app.calibrate(rounded, TEXT, RunConfig(), **OPTIONS, like=bundle)
    shape = Shape(vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    other = make(tmp_path / "o", "relu", shape)
    with pytest.raises(UsageError, match="not of the same model"):
        app.calibrate(other, TEXT, RunConfig(), **OPTIONS, like=calibrated)


# ------------------------------------------------------------------ models without zeros


def test_silu_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="leaves no neuron at zero"):
        app.calibrate(make(tmp_path, "silu"), TEXT, RunConfig(), **OPTIONS)


def test_the_study_of_a_gated_model(tmp_path, monkeypatch):
    """Matrices or records, the same figures; dense is what the engine says; what must hold of any model holds."""
    monkeypatch.setattr(tried, "LOW_RANK", 1)
    monkeypatch.setattr(gated, "WINDOW", 64)
    monkeypatch.setattr(gated, "DENSITIES", (0.9, 0.5))
    monkeypatch.setattr(gated, "measure", partial(gated.measure, seconds=0.05))
    out = make(tmp_path, "silu")
    found = gated.study(out, TEXT, RunConfig(), tokens=600, test_tokens=100)
    with monkeypatch.context() as quicker:
        quicker.setattr(gated, "measure_records", lambda *_: 1.0)  # of a drive that has been measured
        other = gated.study(out.parent / "m", TEXT, RunConfig(), tokens=600, test_tokens=100)
    assert [gated.replace(w, seconds={}) for w in found.ways] == [gated.replace(w, seconds={}) for w in other.ways]
    with fc.load(out, context=512) as engine:
        ids = engine.tokenizer.encode(TEXT)[600:700]
        parts = [(engine.logits(part).log_softmax(-1)[:-1], torch.tensor(part[1:])) for part in (ids[:64], ids[64:])]
        lp = torch.cat([logits.gather(1, targets[:, None]) for logits, targets in parts])
    assert len(lp) == 98 and found.perplexity == pytest.approx(float((-lp.mean()).exp()), rel=1e-4)
    assert found.error == pytest.approx(float(lp.std()) / 98**0.5, rel=1e-3)
    assert found.tokens == 600 and found.test_tokens == 100
    ways = {(way.kind, way.density): way for way in found.ways}
    for (kind, density), way in ways.items():
        assert way.kept == pytest.approx(density, abs=0.12)
        assert 0 < way.error < found.error  # token by token most of it cancels
        assert way.bytes(0.25) is None or way.bytes(0.25) >= way.bytes(0.5)
        assert (way.bytes(0.5) is None) == (kind == "product") and (kind != "gate" or way.bytes(0.25) is None)
        if kind == "low-rank":  # of full rank it says what the product says
            assert way.perplexity == pytest.approx(ways["product", density].perplexity, rel=1e-3)
    assert ways["static", 0.5].misses[0.5] < 0.1 < ways["shadow", 0.5].misses[0.5]
    assert all(found.seconds(way, 0.5) > 0 for way in found.ways if way.bytes(0.5))
    quick = gated.replace(found, slice_rate=1.0)
    slow = gated.replace(found, slice_rate=1e12)
    assert gated._best(gated.replace(quick, max_increase=10.0))
    assert all(ways[way].bytes(share) == 0 for share, way in gated._best(slow).items())
    assert not gated._best(gated.replace(quick, max_increase=-0.99))


# ------------------------------------------------------------------ bits of predictors


def test_strength_dealt_to_both_matrices_survives_four_bits() -> None:
    """The strongest axis is a hundred times the weakest, as of inputs with a mean; the product is what it was."""
    torch.manual_seed(3)
    x, strength = torch.randn(300, 128), torch.logspace(2, 0, 128)
    a, b = torch.linalg.qr(torch.randn(128, 128))[0], torch.randn(256, 128) * strength
    assert torch.allclose(balanced(a, b)[1] @ balanced(a, b)[0], b @ a, atol=1e-3)
    fired = (x @ (b @ a).T) > 100
    whole = judged(rounded(a, "none"), rounded(b, "none"), torch.zeros(256), x, fired, 0.95)
    lopsided = judged(rounded(a, "int4"), rounded(b, "int4"), torch.zeros(256), x, fired, 0.95)
    even = judged(*(rounded(each, "int4") for each in balanced(a, b)), torch.zeros(256), x, fired, 0.95)
    assert whole.predicted <= even.predicted < lopsided.predicted
    assert even.nbytes < whole.nbytes / 3
    dear, cheap = (cheapest(a, b, torch.zeros(256), x, fired, 0.95, size) for size in (64, 1 << 20))
    assert dear.nbytes < cheap.nbytes and dear.predicted >= cheap.predicted  # memory is worth more small records


def test_the_optimiser_is_adam() -> None:
    """As the paper has it, with the moments as sums."""
    generator = torch.Generator().manual_seed(5)
    ours = torch.randn(7, 5, generator=generator).requires_grad_()
    plain, moments, gradients = ours.detach().clone(), (torch.zeros(7, 5), torch.zeros(7, 5)), []
    for step in range(1, 6):
        gradients.append(torch.randn(7, 5, generator=generator))
        (ours * gradients[-1]).sum().backward()
        _adam(ours, *moments, 1e-2 / step, step)
        mean = sum(0.1 * 0.9 ** (step - i) * g for i, g in enumerate(gradients, 1)) / (1 - 0.9**step)
        square = sum(0.001 * 0.999 ** (step - i) * g * g for i, g in enumerate(gradients, 1)) / (1 - 0.999**step)
        plain -= 1e-2 / step * mean / (square.sqrt() + 1e-8)
        assert ours.grad is None and torch.allclose(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [8, 13, 64])
def test_what_fired_takes_a_bit_a_neuron(count: int) -> None:
    fired = torch.rand(50, count, generator=torch.Generator().manual_seed(count)) < 0.3
    bits = packed(fired)
    assert bits.dtype == torch.uint8 and bits.shape == (50, -(-count // 8))
    assert torch.equal(unpacked(bits, count), fired) and torch.equal(unpacked(bits[7:20], count), fired[7:20])
