"""Calibration of blocks of every kind whose neurons fall silent: biases, no gate, norms behind, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_bundle import decoded
from test_calibrate import TEXT, WORDS
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli.apps.calibrate import calibrate, gate_rows
from flashinfer_cli.config import RunConfig, SamplingParams
from flashinfer_cli.kernels import Kernels
from flashinfer_cli.layers.demand import Oracle
from flashinfer_cli.training.data import train_tokenizer

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "opt": ("opt", 0, {}),
    "opt, norms behind, narrow embedding": ("opt", 1, {}),
    "nemotron, biases": ("nemotron", 1, {}),
    "persimmon": ("persimmon", 0, {"hidden_act": "relu2"}),
    "arcee": ("arcee", 0, {}),
    "arcee, biases": ("arcee", 1, {}),
    "phi, parallel": ("phi", 0, {"hidden_act": "relu"}),
    "falcon, parallel": ("falcon", 0, {"activation": "relu"}),
}
RECALL = 0.97


@pytest.mark.parametrize("case", CASES)
def test_a_family_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    family, index, changed = CASES[case]
    model, _ = make(family, index, tmp_path / "m", vocab_size=300, max_position_embeddings=512, **changed)
    train_tokenizer(WORDS, 300).save(str(model / "tokenizer.json"))
    bundle = fc.bundle(model, tmp_path / "b")
    found = calibrate(bundle, TEXT, RunConfig(), tokens=1000, evaluate_tokens=100, recall=RECALL, max_increase=0.1)
    for layer in found.layers:
        assert layer.recall > RECALL - 0.02 and 0.05 < layer.predicted < 0.95
    assert found.quality["top1_agreement"] > 0.8

    texts, params = [], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    for path, options in ((model, {}), (bundle, {"exact": True})):
        with fc.load(path, context=32, **options) as engine:
            assert engine.exactness == "exact"
            texts.append([event.token_id for event in engine.generate([5, 9, 200, 31], params)])
    assert len(texts[0]) == 12 and texts[0] == texts[1]

    def oracles(path: Path, layers: list[int], kernels: Kernels, device: Any) -> dict[int, Oracle]:
        if not layers:
            return {}
        with fc.load(bundle, exact=True, context=32) as engine:
            act = engine.config.hidden_act
            return {i: Oracle(*gate_rows(engine.decoder.blocks[i].ffn, engine), act) for i in layers}  # type: ignore[arg-type]

    dense, _ = decoded(bundle, exact=True)
    learned, report = decoded(bundle)
    assert report.exactness == "sparse" and not torch.equal(learned, dense)
    monkeypatch.setattr("flashinfer_cli.engine.load_predictors", oracles)
    for stream in ("auto", "always"):
        got, report = decoded(bundle, stream=stream)
        assert report.exactness == "sparse"
        assert (got - dense).abs().max() < 1e-4 * dense.abs().max() and torch.equal(got.argmax(-1), dense.argmax(-1))
