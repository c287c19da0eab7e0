"""Neurons in the order of what fires together: the chain, and bundles written in it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_bundle import decoded, make

import flashinfer_cli as fc
from flashinfer_cli.bundles.order import chain, runs
from flashinfer_cli.bundles.reorder import reorder
from flashinfer_cli.bundles.sparsity import (
    ORDER_FILE,
    PREDICTORS_FILE,
    SPARSITY_FILE,
    LayerSparsity,
    Sparsity,
    manifest_digest,
    read_sparsity,
    sparsity_json,
)
from flashinfer_cli.bundles.verify import verify_bundle
from flashinfer_cli.cli.main import run
from flashinfer_cli.errors import BundleError
from flashinfer_cli.models.open import open_model


def test_the_chain_puts_together_what_fires_together():
    random = np.random.default_rng(3)
    groups = random.permutation(64).reshape(8, 8)  # eight groups of eight, scattered; the last never fires
    tokens = [np.sort(groups[random.integers(7)]) for _ in range(100)]
    order = chain(tokens, 64)
    assert sorted(order) == list(range(64)) and order[56:].tolist() == sorted(groups[7])
    place = np.empty(64, int)
    place[order] = np.arange(64)
    before, after = (sum(runs(np.sort(ids), 0) for ids in tokens) for tokens in (tokens, [place[t] for t in tokens]))
    assert after == len(tokens) < before / 3  # a run a token


def test_a_reordered_bundle_is_the_same_model(sparse_bundle, tmp_path):
    copy, opened = tmp_path / "b", open_model(sparse_bundle)
    with pytest.raises(BundleError, match="not known"):
        reorder(sparse_bundle, tmp_path / "no")
    shutil.copytree(sparse_bundle, copy)
    random = np.random.default_rng(0)
    orders = {str(layer): torch.from_numpy(random.permutation(160).astype(np.int32)) for layer in range(3)}
    save_file(orders, copy / ORDER_FILE)
    with pytest.raises(BundleError, match="exists"):
        reorder(copy, copy)
    made = reorder(copy, tmp_path / "made")
    assert not verify_bundle(made) and open_model(made).weight_bytes == opened.weight_bytes
    for options in ({"exact": True}, {}, {"stream": "always"}):
        want, _ = decoded(copy, **options)
        got, _ = decoded(made, **options)
        assert (got - want).abs().max() < 1e-4 and not torch.equal(got, want)
    with pytest.raises(BundleError, match="already"):
        reorder(made, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "made"]
    save_file({**orders, "1": torch.zeros(160, dtype=torch.int32)}, copy / ORDER_FILE)
    with pytest.raises(BundleError, match="not of this"):
        reorder(copy, tmp_path / "no")


def test_biases_move_with_their_neurons(tiny, tmp_path):
    path = tiny("opt", 0)[0]
    out = fc.bundle(path, tmp_path / "b")
    counts = {layer: found.count for layer, found in open_model(out).checkpoint.records.items()}
    random = np.random.default_rng(0)
    tensors = {}
    for layer, count in counts.items():
        d = open_model(out).config.hidden_size
        parts = {"a": torch.randn(4, d).half(), "b": torch.randn(count, 4).half(), "bias": torch.randn(count)}
        tensors |= {f"layers.{layer}.{name}": value for name, value in parts.items()}
    save_file(tensors, out / PREDICTORS_FILE)
    layers = tuple(LayerSparsity(i, 4, 1, 0.5, 0.5, 0.5, 0.5) for i in counts)
    quality = {"perplexity": 2.0, "dense_perplexity": 1.0, "top1_agreement": 0.5}
    (out / SPARSITY_FILE).write_bytes(sparsity_json(Sparsity(manifest_digest(out), 100, layers, quality)))
    orders = {str(i): torch.from_numpy(random.permutation(n).astype(np.int32)) for i, n in counts.items()}
    save_file(orders, out / ORDER_FILE)
    made = reorder(out, tmp_path / "made")
    for options in ({"exact": True}, {}):
        assert (decoded(made, **options)[0] - decoded(out, **options)[0]).abs().max() < 1e-4


# ------------------------------------------------------------------ through the command line


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `genai-run calibrate` leaves it; to be copied by who would change it."""
    out = make(tmp_path_factory.mktemp("calibrated"))
    (out / SPARSITY_FILE).unlink()
    (out / PREDICTORS_FILE).unlink()
    text = out.parent / "text"
    text.write_text(" ".join(f"a cat sat on {i % 13} mats" for i in range(300)))
    assert run(["calibrate", str(out), "--text", str(text), "--tokens", "1000", "--quiet"]) == 0
    return out


def records(path: Path, layer: int) -> np.ndarray:
    """A layer's records, as bytes [count, width]."""
    found = open_model(path).checkpoint
    layout, info = found.records[layer], found.tensors[found.records[layer].tensor]
    return np.fromfile(info.path, np.uint8, layout.count * layout.width_bytes, offset=info.offset).reshape(
        layout.count, -1
    )


def test_the_command_applies_the_order_of_the_calibration(calibrated, tmp_path, capsys):
    out = tmp_path / "ordered"
    assert run(["bundle", str(calibrated), str(out), "--order", "coactivation"]) == 0
    assert capsys.readouterr().out == f"{out}\n" and not verify_bundle(out)
    assert open_model(out).checkpoint.manifest.parameters["order"] == "coactivation"
    orders = load_file(calibrated / ORDER_FILE)
    assert any(not np.array_equal(order, np.arange(160)) for order in orders.values())
    before, after = (load_file(path / PREDICTORS_FILE) for path in (calibrated, out))
    for layer, order in ((int(name), order.numpy()) for name, order in orders.items()):
        assert np.array_equal(records(out, layer), records(calibrated, layer)[order])
        assert torch.equal(after[f"layers.{layer}.bias"], before[f"layers.{layer}.bias"][order])


def test_what_is_ordered_gives_the_same_tokens_and_stays_calibrated(calibrated, tmp_path, capsys, monkeypatch):
    out = tmp_path / "ordered"
    assert run(["bundle", str(calibrated), str(out), "--order", "coactivation", "--quiet"]) == 0
    was, now = read_sparsity(calibrated), read_sparsity(out)
    assert now is not None and (now.layers, now.quality, now.tokens) == (was.layers, was.quality, was.tokens)
    capsys.readouterr()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for options, label in ((["--exact"], "exact"), ([], "sparse"), (["--stream", "always"], "sparse")):
        found = []
        for path in (calibrated, out):
            argv = ["generate", "-m", str(path), "--raw", "-p", "a cat", "-n", "12", "--temp", "0", "--ignore-eos"]
            assert run([*argv, "--json", "--quiet", *options]) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert found[0]["token_ids"] == found[1]["token_ids"] and len(found[0]["token_ids"]) == 12
        assert [each["report"]["exactness"] for each in found] == [label, label]
        assert found[0]["report"]["quality"] == found[1]["report"]["quality"]


def test_what_the_command_refuses_to_order(calibrated, tmp_path, capsys):
    def refused(*argv: object) -> str:
        assert run(["bundle", *map(str, argv), "--order", "coactivation"]) in (1, 2)
        out, err = capsys.readouterr()
        assert not out and err.startswith("error:")
        return err

    out = tmp_path / "out"
    plain = Path(shutil.copytree(calibrated, tmp_path / "plain"))
    (plain / SPARSITY_FILE).unlink()
    assert f"genai-run calibrate {plain}" in refused(plain, out)
    assert "First bundle, then calibrate, then order" in refused(calibrated, out, "--quantize", "int8")
    assert "bundle" in refused(calibrated.parent / "m", out)
    assert not out.exists()
    out.mkdir()
    assert "--overwrite" in refused(calibrated, out)
    assert run(["bundle", str(calibrated), str(out), "--order", "coactivation", "--overwrite"]) == 0
    capsys.readouterr()
    assert "already" in refused(out, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]
