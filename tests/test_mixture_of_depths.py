"""Mixture-of-Depths at run time: the same logits wherever weights are, and nothing read for nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import flashinfer_cli as fc
from flashinfer_cli.cache.kv import KVCache
from flashinfer_cli.config import DepthConfig
from flashinfer_cli.errors import GenaiRunError
from flashinfer_cli.models.layout import lay_out
from flashinfer_cli.models.open import open_model
from flashinfer_cli.training import data
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.shape import Shape

SHAPE = Shape(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, mod_capacity=0.25
)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
VARIANTS = {
    "router": {},
    "predictor": {"mod_decoding": "predictor"},
    "staged": MOE,
    "integrated": {**MOE, "mod_capacity": 0.0, "num_noop_experts": 3},
}
IDS = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["Once upon a time there was a cat who had a hat."] * 3, 300)


def trained(folder: Path, tokenizer, decide: float | None = None, **changed) -> Decoder:
    """A model whose routers are of two minds, or all of one (`decide` shifts what they say), written to `folder`."""
    torch.manual_seed(5)
    model = Decoder(dataclasses.replace(SHAPE, **changed)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate"):
                parameter.normal_()
            if "mod_router" in name:
                parameter.mul_(20)
            if decide is not None and name.endswith("mod_predictor.fc2.bias"):
                parameter.fill_(decide)
            parameter.copy_(parameter.bfloat16().float())
    folder.mkdir(exist_ok=True)
    write_folder(model, tokenizer, folder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_and_stepwise_equal_the_training_forward(tmp_path, tokenizer, variant):
    model = trained(tmp_path / "m", tokenizer, **VARIANTS[variant])
    with torch.no_grad():
        want, aux = model(IDS, causal=True)
    bundle = fc.bundle(tmp_path / "m", tmp_path / "b")
    resident = None
    for path in (tmp_path / "m", bundle):
        for options in ({"stream": "never"}, {"stream": "always"}, {"stream": "always", "prefill_chunk": 7}):
            with fc.load(path, kv_cache_type="f32", **options) as engine:
                got = engine.logits(IDS[0].tolist())
                session = engine.session()
                steps = [session.prefill(IDS[0, :20].tolist())]
                steps += [session.step(token) for token in IDS[0, 20:].tolist()]
            assert (got - want[0]).abs().max() < 1e-4
            assert (torch.stack(steps) - want[0, 19:]).abs().max() < 1e-4
            if options == {"stream": "never"}:
                resident = got
            elif "prefill_chunk" not in options:
                assert torch.equal(got, resident)  # where weights are changes not one bit
    if variant == "router":
        assert 0 < float(sum(aux.computed)) < 2  # or the test would show nothing


def test_a_skipped_block_reads_nothing(tmp_path, tokenizer):
    """Counted: with blocks always skipped a step reads exactly the other blocks and the head; never skipped, all."""
    read = {}
    for decide in (-100.0, 100.0):
        trained(tmp_path / str(decide), tokenizer, decide=decide, mod_decoding="predictor")
        with fc.load(tmp_path / str(decide), stream="always") as engine:
            session = engine.session()
            session.prefill([1, 2, 3])
            before = engine.report().decode.bytes_read
            for token in (4, 5, 6, 7):
                session.step(token)
            report = engine.report()
            assert report.decode.skipped == (1.0 if decide < 0 else 0.0)
            embedding = sum(io["bytes"] for io in report.io if io["phase"] == "decode" and io["kind"] == "embedding")
            read[decide] = report.decode.bytes_read - before - embedding
    opened = open_model(tmp_path / "100.0")
    layout = lay_out(opened.checkpoint, opened.config, opened.weights)
    head = sum(s.span.nbytes for s in layout.head.slices)
    often = sum(s.span.nbytes for layer in layout.layers if not layer.on_demand for s in layer.slices)
    seldom = sum(s.span.nbytes for layer in layout.layers if layer.on_demand for s in layer.slices)
    assert read[-100.0] == 4 * (often + head) and seldom > 0
    assert read[100.0] == 4 * (often + seldom + head)


def test_skipping_leaves_no_keys_and_the_rest_where_they_were(tmp_path, tokenizer):
    trained(tmp_path / "m", tokenizer)
    with fc.load(tmp_path / "m") as engine:
        session = engine.session()
        session.prefill(IDS[0].tolist())
        kv = session.kv
        skippable = [i for i in range(4) if engine.config.is_skippable(i)]
        assert skippable == [1, 3] and kv.held(0) == kv.length == 60
        assert all(0 < kv.held(i) < 60 for i in skippable)
        skipped = sum(60 - kv.held(i) for i in skippable) / 120
        assert engine.report().prefill.skipped == pytest.approx(skipped)


def test_rewinding_forgets_the_tokens_that_did_not_skip(tmp_path, tokenizer):
    """Trim to half and go on with other tokens: as if the first ones had never been."""
    trained(tmp_path / "m", tokenizer)
    with fc.load(tmp_path / "m") as engine:
        session = engine.session()
        session.prefill(IDS[0].tolist())
        session.trim(30)
        again = session.prefill([7, 8, 9, 10])
        other = engine.session()
        want = other.prefill([*IDS[0, :30].tolist(), 7, 8, 9, 10])
        assert (again - want).abs().max() < 1e-4


def test_positions_of_trimmed_layers():
    config = dataclasses.replace(
        fc.ModelConfig("x", 10, 8, 8, 2, 2, 1, 4, 64, "silu"),
        mod=DepthConfig((False, True), 0.5, "router", 4),
    )
    kv = KVCache(config, 16, "cpu")
    row = torch.ones(1, 1, 4)
    for position, computed in enumerate((True, False, True, True)):
        kv.append(0, row, row)
        if computed:
            kv.append(1, row * position, row, [position])
        kv.advance(1)
    assert kv.held(1) == 3
    kv.trim(3)
    assert kv.held(1) == 2 and kv.held(0) == 3
    kv.advance(1)  # position 3 skips this time
    keys, _ = kv.append(1, row * 4, row, [4])
    assert keys[0, :, 0].tolist() == [0.0, 2.0, 4.0]


def test_a_tight_budget_pins_what_every_token_needs_first(tmp_path, tokenizer):
    from flashinfer_cli.plan import Sizes, pin

    sizes = Sizes(0, (4, 4, 4, 4), 0, lambda _: 0, seldom=(False, True, False, True), demand=4)
    assert pin(sizes, 8) == (True, False, True, False)
    assert pin(sizes, 12) in ((True, True, True, False), (True, False, True, True))
    assert pin(sizes, 16) == (True,) * 4
    assert sum(pin(sizes, 4)) == 1 and not any(pin(sizes, 4)[1::2])


@pytest.mark.parametrize(
    ("key", "value"), [("mod_decoding", "guess"), ("mod_capacity", 1.5), ("mod_interval", 0), ("mod_predictor_size", 0)]
)
def test_impossible_configs_are_refused(tmp_path, tokenizer, key, value):
    import json

    trained(tmp_path / "m", tokenizer)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(GenaiRunError, match="mod_"):
        open_model(tmp_path / "m")
