"""A pass over several tokens gives each, to the bit, what a pass of its own would: logits, keys and values.

So greedy text cannot depend on a draft. Compiled kernels promise as much; torch's matrix products and some of its
elementwise operators do not, and are taken row by row.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import Tiny

import flashinfer_cli as fc
from flashinfer_cli.decoding.generate import Session
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.shape import Shape

RUN = 9  # tokens checked at once
# Rotations that depend on the length, caps, windows, biases, routers, shared experts, latents, sinks: at least once.
CASES = [("llama", 3), ("llama", 6), ("gemma2", 1), ("gemma3_text", 1), ("phi", 0), ("opt", 1), ("falcon", 3),
         ("qwen2_moe", 0), ("olmoe", 1), ("deepseek_v2", 1), ("gpt_oss", 0)]  # fmt: skip


def equal_to_steps(session: Session, other: Session, ids: list[int], prompt: int) -> None:
    """Run `ids` behind a prompt in passes of several tokens, and one by one; compare everything."""
    session.prefill(ids[:prompt])
    rows = [session.verify(ids[first : first + RUN]) for first in range(prompt, len(ids), RUN)]
    held = [(k.clone(), v.clone()) for k, v in zip(session.kv.keys, session.kv.values, strict=True)]
    counts = [session.kv.held(layer) for layer in range(len(held))]
    other.trim(0)
    other.prefill(ids[:prompt])
    steps = torch.stack([other.step(token) for token in ids[prompt:]])
    assert torch.equal(torch.cat(rows), steps)
    for layer, (keys, values) in enumerate(held):
        assert other.kv.held(layer) == counts[layer]
        assert torch.equal(keys[:, : counts[layer]], other.kv.keys[layer][:, : counts[layer]])
        assert torch.equal(values[:, : counts[layer]], other.kv.values[layer][:, : counts[layer]])


@pytest.mark.parametrize(("family", "index"), CASES, ids=lambda value: str(value))
def test_every_family(family: str, index: int, tiny: Tiny) -> None:
    folder, _ = tiny(family, index)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (24,), generator=generator).tolist()  # past the 16 where some rotations change
    for kernels in ("compiled", "reference"):
        with fc.load(folder, context=48, stream="always", kernels=kernels) as engine:
            equal_to_steps(engine.session(), engine.session(), ids, 6)


def test_bundles(tiny: Tiny, tmp_path: Path) -> None:
    """Records of neurons, all of them; where predictors name a few it is one token at a time anyway."""
    folder, _ = tiny("llama", 2)
    made = fc.bundle(folder, tmp_path / "b")
    ids = torch.randint(3, 100, (24,), generator=torch.Generator().manual_seed(5)).tolist()
    for kernels in ("compiled", "reference"):
        with fc.load(made, context=32, stream="always", kernels=kernels) as engine:
            equal_to_steps(engine.session(), engine.session(), ids, 6)


@pytest.mark.parametrize("predictor", [False, True])
def test_mixture_of_depths(predictor: bool, tmp_path: Path) -> None:
    torch.manual_seed(5)
    shape = Shape(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        mod_capacity=0.25, mod_decoding="predictor" if predictor else "router", num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=48,
    )  # fmt: skip
    model = Decoder(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mod_router" in name:
                parameter.mul_(20)
    tokenizer = data.train_tokenizer(["Once upon a time there was a cat who had a hat."] * 3, 300)
    write_folder(model, tokenizer, tmp_path)
    ids = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(6)).tolist()
    for kernels in ("compiled", "reference"):
        with fc.load(tmp_path, context=48, stream="always", kernels=kernels) as engine:
            equal_to_steps(engine.session(), engine.session(), ids, 6)
            if not predictor:
                assert 0 < (engine.report().decode.skipped or 0) < 1  # or this would show nothing
