"""gpt_oss with experts in MXFP4 as published: pairs of values and scales apart, against transformers' own unpacking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

import flashinfer_cli as fc
from flashinfer_cli.errors import CorruptCheckpointError, UnsupportedModelError
from flashinfer_cli.kernels.mxfp4 import join, joined
from flashinfer_cli.kernels.reference import to_float

LENGTH = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder whose experts are random MXFP4, and transformers' model with what it makes of them."""
    folder, model = tiny_models.make("gpt_oss", 0, tmp_path_factory.mktemp("oss") / "model")
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(5)
    for name, whole in [pair for pair in model.named_parameters() if pair[0].endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = whole.shape
        blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(121, 125, blocks.shape[:-1], dtype=torch.uint8, generator=draw)
        del tensors[name]
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            whole.copy_(_convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, model


def test_parity_resident_streamed_and_from_a_bundle(model: tuple[Path, Any], tmp_path: Path) -> None:
    folder, theirs = model
    ids = torch.randint(0, tiny_models.VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        wanted = theirs(ids[None], use_cache=False).logits[0].float()
    fc.bundle(folder, tmp_path / "bundle")
    found = []
    for source in (folder, tmp_path / "bundle"):
        for stream, kernels in (("never", "compiled"), ("always", "compiled"), ("never", "reference")):
            with fc.load(source, stream=stream, context=LENGTH, kernels=kernels) as engine:
                found.append(engine.logits(ids.tolist()))
                assert engine.report().exactness == "exact"
                assert engine.model.parameters == sum(p.numel() for p in theirs.parameters())
    assert max((each - wanted).abs().max().item() for each in found) <= 1e-4
    assert torch.equal(found[0], found[1]) and torch.equal(found[3], found[4])
    assert torch.equal(found[0], found[3])  # the same blocks, joined while running or when the bundle was made
    with fc.load(tmp_path / "bundle") as engine:
        part = {p.role: p for p in engine.checkpoint.records[0].parts}
        assert part["gate_up"].format == part["down"].format == "MXFP4"
        assert list(part) == ["gate_up", "gate_up.bias", "down", "down.bias"]
        session = engine.session()
        rows = [session.prefill(ids[:1].tolist(), more=True)]
        rows += [session.step(int(token), more=True) for token in ids[1:]]
        assert (torch.stack(rows) - wanted).abs().max().item() <= 1e-4


def test_a_scale_that_means_nan_is_named(model: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(model[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][:, 3, 0] = 255
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=name), fc.load(folder) as engine:
        next(iter(engine.generate([5, 9, 3], fc.SamplingParams(max_tokens=2))))
    with pytest.raises(CorruptCheckpointError, match="NaN"):
        fc.bundle(folder, tmp_path / "bundle")


def test_joining_is_transformers_unpacking() -> None:
    rng = np.random.default_rng(3)
    pairs = rng.integers(0, 256, (2, 5, 3, 16), np.uint8)
    scales = rng.integers(1, 250, (2, 5, 3), np.uint8)
    theirs = _convert_moe_packed_tensors(torch.tensor(pairs), torch.tensor(scales), dtype=torch.float32).mT
    ours = joined(torch.tensor(pairs).flatten(0, 1), torch.tensor(scales).flatten(0, 1))
    assert torch.equal(to_float(ours, "MXFP4").view(2, 5, 96), theirs)
    other = np.empty((2, 5, 3, 17), np.uint8)
    join(pairs, scales, other)
    assert (other.reshape(10, 51) == ours.numpy()).all()


def test_what_does_not_fit_is_named(model: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((model[0] / "config.json").read_text())
    tensors = load_file(model[0] / "model.safetensors")

    def opened(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        fc.load(folder).close()

    name = "model.layers.1.mlp.experts.down_proj_scales"
    with pytest.raises(CorruptCheckpointError, match=name):
        opened(config, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CorruptCheckpointError, match="_scales' has shape"):
        opened(config, tensors | {name: tensors[name][:, 1:].contiguous()})
    with pytest.raises(UnsupportedModelError, match="mxfp4"):
        opened(config | {"model_type": "mixtral"}, tensors)
