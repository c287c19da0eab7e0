"""A small ReLU model as a bundle with predictors of neurons: what the tests of sparse runs share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import flashinfer_cli as fc
from flashinfer_cli.bundles.sparsity import (
    PREDICTORS_FILE,
    SPARSITY_FILE,
    LayerSparsity,
    Sparsity,
    manifest_digest,
    sparsity_json,
)
from flashinfer_cli.plan import make_plan
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.shape import Shape

SHAPE = Shape(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    hidden_act="relu",
)
PROMPT, STEPS = [5, 9, 200, 31], [7, 7, 100, 250, 3, 90, 91, 92, 5, 6]


def make(folder: Path, width: int = 64, quantize: str = "none") -> Path:
    """With predictors that are right about half of the time."""
    torch.manual_seed(1)
    model = Decoder(replace(SHAPE, hidden_size=width))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(6)
    (folder / "m").mkdir()
    write_folder(model, data.train_tokenizer(["a cat sat on a mat"], 300), folder / "m")
    out = fc.bundle(folder / "m", folder / "b", quantize=quantize)
    write_predictors(out, width=width)
    return out


def write_predictors(out: Path, silent: int | None = None, width: int = 64) -> None:
    torch.manual_seed(2)
    tensors = {}
    for layer in range(3):
        a, b = torch.randn(8, width), torch.randn(160, 8)
        bias = torch.randn(160)
        if silent is not None:
            bias[silent] = -1e6
        tensors |= {f"layers.{layer}.a": a.half(), f"layers.{layer}.b": b.half(), f"layers.{layer}.bias": bias}
    save_file(tensors, out / PREDICTORS_FILE)
    layers = tuple(LayerSparsity(i, 8, 1, 0.5, 0.5, 0.5, 0.5) for i in range(3))
    quality = {"perplexity": 2.0, "dense_perplexity": 1.0, "top1_agreement": 0.5}
    (out / SPARSITY_FILE).write_bytes(sparsity_json(Sparsity(manifest_digest(out), 100, layers, quality)))


def decoded(path: Path, **options) -> tuple[torch.Tensor, fc.RunReport]:
    with fc.load(path, context=32, **options) as engine:
        session, count = engine.session(), engine.config.vocab_size
        rows = [session.prefill([token % count for token in PROMPT])]
        rows += [session.step(token % count) for token in STEPS]
        return torch.stack(rows), engine.report()


def slots_of(monkeypatch, nbytes: int, late: int = 0) -> None:
    """Have the next runs with stream="always" keep so many bytes of neurons: no budget is that exact."""
    monkeypatch.setattr(
        "flashinfer_cli.engine.make_plan",
        lambda *a, **k: replace(make_plan(*a, **k), neuron_bytes=nbytes, late_bytes=late),
    )


def reads(report: fc.RunReport, phase: str = "decode") -> int:
    return sum(io["useful"] for io in report.io if io["kind"] == "neuron" and io["phase"] == phase)
