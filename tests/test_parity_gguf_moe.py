"""GGUF files of deepseek_v2 and gpt_oss against the folders they are made from (`converted.py` does what llama.cpp's
converter does). The folder's logits are compared with transformers in test_parity.py and test_mxfp4.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_models
import torch
from converted import convert
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from test_speculative_bits import equal_to_steps

import flashinfer_cli as fc
from flashinfer_cli.errors import CorruptCheckpointError, UnsupportedModelError
from flashinfer_cli.models.layout import lay_out
from flashinfer_cli.models.open import open_model

IDS = [47, 68, 25, 118, 67, 83, 3, 0, 9, 127, 14, 77, 5, 6, 31, 40, 11, 90, 61, 2]
# One number says both mscales in GGUF, none the limit of the activation.
MSCALE = tiny_models.rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.7)
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("deepseek_v2", 0, {}),
    ("deepseek_v2", 1, {**MSCALE, "qk_nope_head_dim": 32, "v_head_dim": 24}),
    ("gpt_oss", 0, {}),
    ("gpt_oss", 1, {"swiglu_limit": 7.0}),
]
SPELLED = [(*case, split) for case in CASES for split in ((True, False) if case[0] == "deepseek_v2" else (True,))]


def logits(model: Path, **options: Any) -> torch.Tensor:
    with fc.load(model, context=len(IDS), kv_cache_type="f32", **options) as engine:
        found = engine.logits(IDS)
        assert engine.report().exactness == "exact"
    return found


def pack(folder: Path, scales: tuple[int, int] = (121, 125)) -> None:
    """Make the folder's experts random MXFP4."""
    tensors, draw = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(5)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, cols, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, cols // 32, 16), dtype=torch.uint8, generator=draw)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(*scales, blocks.shape[:-1], dtype=torch.uint8, generator=draw)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("family", "index", "changed", "split"), SPELLED, ids=lambda value: str(value)[:12])
def test_gguf_equals_the_folder(family: str, index: int, changed: dict[str, Any], split: bool, tmp_path: Path) -> None:
    folder, _ = tiny_models.make(family, index, tmp_path / "model", **changed)
    path = tmp_path / "model.gguf"
    convert(folder, path, split=split)
    expected, resident = logits(folder), logits(path, stream="never")
    assert (resident - expected).abs().max() < 1e-4
    assert torch.equal(logits(path, stream="always"), resident)
    assert (logits(path, kernels="reference") - expected).abs().max() < 1e-4
    fc.bundle(path, tmp_path / "bundle")
    assert (logits(tmp_path / "bundle", stream="always") - expected).abs().max() < 1e-4
    layer = open_model(path).weights.layers[-1]
    assert (("k_b" in layer, "kv_b" in layer) == (split, not split)) is (family == "deepseek_v2")


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    folder, _ = tiny_models.make("gpt_oss", 0, tmp_path / "model")
    pack(folder)
    path = tmp_path / "model.gguf"
    convert(folder, path)
    expected, resident = logits(folder), logits(path, stream="never")
    assert (resident - expected).abs().max() < 1e-4
    assert torch.equal(logits(path, stream="always"), resident)
    fc.bundle(path, tmp_path / "bundle")
    with fc.load(tmp_path / "bundle", stream="always", context=len(IDS)) as engine:
        assert torch.equal(engine.logits(IDS), resident)
        part = {p.role: p for p in engine.checkpoint.records[0].parts}
        assert list(part) == ["gate", "gate.bias", "up", "up.bias", "down", "down.bias"]
        assert part["gate"].format == part["down"].format == "MXFP4"
        session = engine.session()  # token by token
        rows = [session.prefill(IDS[:1], more=True)] + [session.step(token, more=True) for token in IDS[1:]]
    assert (torch.stack(rows) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize("case", [(1, True), (3, True), (1, False)], ids=str)
def test_quantised_files_compute_what_they_hold(case: tuple[int, bool], kind: Kind, tmp_path: Path) -> None:
    family, index, changed = CASES[case[0]]
    folder, _ = tiny_models.make(family, index, tmp_path / "model", **changed)
    held = convert(folder, tmp_path / "quantised.gguf", kind, split=case[1])
    theirs = gguf.GGUFReader(tmp_path / "quantised.gguf")
    formats = {tensor.name.split(".", 2)[-1]: tensor.tensor_type for tensor in theirs.tensors}
    if family == "deepseek_v2" and case[1]:
        assert formats["attn_k_b.weight"] == formats["attn_v_b.weight"] == kind
    plain = gguf.GGUFWriter(tmp_path / "plain.gguf", theirs.fields["general.architecture"].contents())
    for name, field in theirs.fields.items():
        if name.startswith(plain.arch):
            sub = field.types[-1] if field.types[0] is gguf.GGUFValueType.ARRAY else None
            plain.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, values in held.items():
        plain.add_tensor(name, np.ascontiguousarray(values, np.float32))
    plain.write_header_to_file()
    plain.write_kv_data_to_file()
    plain.write_tensors_to_file()
    plain.close()
    expected = logits(tmp_path / "plain.gguf")
    assert (logits(tmp_path / "quantised.gguf", stream="always") - expected).abs().max() < 1e-4


def test_what_came_after_v2_is_refused(tmp_path: Path) -> None:
    folder, _ = tiny_models.make("deepseek_v2", 0, tmp_path / "model")
    path = tmp_path / "model.gguf"

    def opened(**keys: Any) -> None:
        convert(folder, path, **keys)
        open_model(path)

    opened(expert_gating_func=1)
    for key, value in {"expert_gating_func": 2, "expert_weights_norm": True,
                       "attention__temperature_scale": 0.1}.items():  # fmt: skip
        with pytest.raises(UnsupportedModelError, match=key.replace("__", ".")):
            opened(**{key: value})
    for key in ("attention.kv_lora_rank", "rope.dimension_count", "expert_used_count"):
        with pytest.raises(CorruptCheckpointError, match=key):
            opened(**{key.replace(".", "__"): None})
    with pytest.raises(CorruptCheckpointError, match="leading_dense_block_count"):
        opened(leading_dense_block_count=4)
    with pytest.raises(CorruptCheckpointError, match=r"rope\.dimension_count"):
        opened(rope__dimension_count=24)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction.bias"] = torch.zeros(6)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="exp_probs_b"):
        opened()


@pytest.mark.parametrize("case", [1, 2])
def test_tokens_checked_together_have_the_bits_of_their_own_passes(case: int, tmp_path: Path) -> None:
    family, index, changed = CASES[case]
    folder, _ = tiny_models.make(family, index, tmp_path / "model", **changed)
    convert(folder, tmp_path / "model.gguf", Kind.Q8_0)
    for kernels in ("compiled", "reference"):
        with fc.load(tmp_path / "model.gguf", context=len(IDS), stream="always", kernels=kernels) as engine:
            equal_to_steps(engine.session(), engine.session(), IDS, 4)


def test_biases_come_with_their_experts(tmp_path: Path) -> None:
    folder, _ = tiny_models.make("gpt_oss", 0, tmp_path / "model")
    convert(folder, tmp_path / "model.gguf")
    for source in (folder, tmp_path / "model.gguf"):
        model = open_model(source)
        layout = lay_out(model.checkpoint, model.config, model.weights)
        assert not [role for _, role in layout.always if role.startswith("experts.")]
        assert any(role.endswith(".bias") for role in layout.layers[0].expert_layouts[0])
