"""Conversion to fewer key/value heads: without loss where there is none to make, by hand, and against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps.heads import convert_heads, pool
from flashinfer_cli.cli import main
from flashinfer_cli.errors import UnsupportedModelError, UsageError
from flashinfer_cli.training.data import END

IDS = [1, 5, 9, 33, 2, 77, 14, 3, 60, 8, 21, 40]
# One with separate projections and biases, a fused q|k|v, two of a grouped fused layout, one whose k_norm spans heads.
CASES = [("llama", 2), ("phi3", 1), ("falcon", 1), ("falcon", 3), ("olmoe", 0), ("gemma2", 1), ("mixtral", 1)]


def logits(folder: Path) -> torch.Tensor:
    with fc.load(folder, stream="never", context=len(IDS)) as engine:
        return engine.logits(IDS)


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0]


@pytest.mark.parametrize(("family", "index"), CASES)
def test_converted_runs_as_in_transformers(family, index, tiny, tmp_path):
    source, _ = tiny(family, index)
    before = logits(source)
    convert_heads(source, tmp_path / "one", 1)
    ours = logits(tmp_path / "one")
    assert (ours - theirs(tmp_path / "one")).abs().max() < 1e-4
    assert (ours - before).abs().max() > 1e-2  # heads were not all the same


@pytest.mark.parametrize(("family", "index"), [*CASES, ("opt", 0), ("persimmon", 0)])
def test_as_many_heads_are_the_same_bits(family, index, tiny, tmp_path):
    source, _ = tiny(family, index)
    with fc.load(source) as engine:
        heads = engine.config.num_key_value_heads
    convert_heads(source, tmp_path / "same", heads)
    assert torch.equal(logits(tmp_path / "same"), logits(source))


def share_heads(folder: Path, kv_heads: int) -> None:
    """Make the heads of each group equal in a llama folder."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            grouped = value.view(kv_heads, 4 // kv_heads, -1)
            tensors[name] = grouped[:, :1].expand_as(grouped).reshape(value.shape).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["mean", "first"])
def test_heads_that_are_shared_already_lose_nothing(method, tmp_path):
    source, _ = make("llama", 2, tmp_path / "llama")
    share_heads(source, 2)
    convert_heads(source, tmp_path / "two", 2, method=method)
    assert (logits(tmp_path / "two") - logits(source)).abs().max() < 1e-5


def test_methods_by_hand():
    heads = torch.arange(12.0).view(4, 3, 1)
    generator = torch.Generator().manual_seed(1)
    assert pool(heads, 2, "mean", generator).flatten().tolist() == [1.5, 2.5, 3.5, 7.5, 8.5, 9.5]
    assert pool(heads, 2, "first", generator).flatten().tolist() == [0, 1, 2, 6, 7, 8]
    wide = torch.randn(4, 50, 40, generator=generator) * 3 + 1
    drawn = pool(wide, 1, "random", generator)
    assert drawn.std().item() == pytest.approx(3, rel=0.1) and drawn.mean().item() == pytest.approx(1, abs=0.3)


def test_what_cannot_be_is_said_and_leaves_nothing(tiny, tmp_path):
    source, _ = tiny("opt", 0)
    with pytest.raises(UnsupportedModelError, match="opt"):
        convert_heads(source, tmp_path / "out", 1)
    with pytest.raises(UsageError, match="4 key/value heads cannot be made 3"):
        convert_heads(source, tmp_path / "out", 3)
    falcon, _ = tiny("falcon", 3)
    with pytest.raises(UnsupportedModelError, match="falcon"):
        convert_heads(falcon, tmp_path / "out", 2)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_command_converts_and_uptrains(tmp_path, capsys):
    source = tmp_path / "draft"
    shutil.copytree(zoo.path_of("stories-draft"), source)
    stories = zoo.HELD_OUT.read_text(encoding="utf-8").split(END)[:60]
    (tmp_path / "stories.txt").write_text(END.join(f"A story. {story}" for story in stories))
    text = str(tmp_path / "stories.txt")
    command = ["convert-heads", str(source), str(tmp_path / "out"), "--kv-heads", "1", "--json"]
    assert main.run([*command, "--uptrain", "--data", text, "--tokens", "8192", "--threads", "1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kv_heads_before"], said["kv_heads"]) == (2, 1)
    assert said["uptraining"]["nats_after"] < said["uptraining"]["nats_before"]
    with fc.load(tmp_path / "out") as engine:
        assert engine.config.num_key_value_heads == 1
    assert not (tmp_path / "out" / ".training").exists()
    assert main.run([*command[:2], str(tmp_path / "more"), "--kv-heads", "1", "--uptrain"]) == 2
    assert not (tmp_path / "more").exists()
