"""Experts between LSTMs (1701.06538): two levels of gating, the runtime beside the trained module, states rewound."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

import flashinfer_cli as fc
from flashinfer_cli.apps.ahead import calibrate_ahead
from flashinfer_cli.cli import main
from flashinfer_cli.config import MoeConfig, RunConfig, SamplingParams
from flashinfer_cli.errors import GenaiRunError, UsageError
from flashinfer_cli.layers.moe import route_groups
from flashinfer_cli.models.open import open_model
from flashinfer_cli.training import data, gating
from flashinfer_cli.training.export import write_folder
from flashinfer_cli.training.load import load_decoder
from flashinfer_cli.training.model import Decoder
from flashinfer_cli.training.recipes import RECIPES

FLAT = dataclasses.replace(
    RECIPES["stories-moe-lstm"].shape, vocab_size=300, hidden_size=64, num_hidden_layers=3, num_experts=8,
    num_experts_per_tok=4, moe_intermediate_size=24,
)  # fmt: skip
SHAPES = {"flat": FLAT, "groups": dataclasses.replace(FLAT, num_expert_groups=4, gate_groups_per_tok=2)}
IDS = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["Once upon a time there was a cat who had a hat."] * 3, 300)


def trained(folder: Path, tokenizer, shape) -> Decoder:
    """Random gates and biases too, or all experts would be alike; weights as they are stored."""
    torch.manual_seed(5)
    model = Decoder(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate", "bias_ih_l0")):
                parameter.normal_()
            parameter.copy_(parameter.bfloat16().float())
    folder.mkdir()
    write_folder(model, tokenizer, folder)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_runtime_equals_the_trained_module_wherever_weights_are(tmp_path, tokenizer, name):
    model = trained(tmp_path / "m", tokenizer, SHAPES[name])
    with torch.no_grad():
        want, aux = model(IDS)
    assert all((chosen > 0).sum() > 1 and chosen.sum() == 160 for chosen in aux.chosen) and len(aux.chosen) == 2
    bundle = fc.bundle(tmp_path / "m", tmp_path / "b")
    for path in (tmp_path / "m", bundle):
        logits = []
        for options in ({"stream": "never"}, {"stream": "always", "prefill_chunk": 7}):
            with fc.load(path, **options) as engine:
                logits.append(engine.logits(IDS[0].tolist()))
                session = engine.session()
                steps = [session.prefill(IDS[0, :20].tolist())]
                steps += [session.step(token) for token in IDS[0, 20:].tolist()]
                report = engine.report().to_dict()
            assert (logits[-1] - want[0]).abs().max() < 1e-4
            assert (torch.stack(steps) - want[0, 19:]).abs().max() < 1e-4
            if options["stream"] == "always":  # the experts came through their cache
                assert report["expert_cache"]["experts"] == 16 and sum(row["misses"] for row in report["experts"]) > 0
        assert torch.equal(logits[0], logits[1])  # not one bit


@pytest.mark.parametrize("name", SHAPES)
def test_rewinding_brings_the_state_back(tmp_path, tokenizer, name):
    trained(tmp_path / "m", tokenizer, SHAPES[name])
    with fc.load(tmp_path / "m") as engine:
        session = engine.session()
        session.prefill(IDS[0].tolist())
        session.trim(17)
        again = session.prefill([7, 8, 9, 10])
        want = engine.session().prefill([*IDS[0, :17].tolist(), 7, 8, 9, 10])
        assert torch.equal(again, want)


@pytest.mark.parametrize("draft", ["other", "self"])
def test_drafts_change_no_token(tmp_path, tokenizer, draft):
    """Another random model, LSTMs too, drafts wrongly nearly always: both states are rewound again and again."""
    trained(tmp_path / "m", tokenizer, SHAPES["groups"])
    trained(tmp_path / "other", tokenizer, SHAPES["flat"])
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    ids = []
    for options in ({}, {"draft": draft if draft == "self" else str(tmp_path / draft), "speculate": "3"}):
        with fc.load(tmp_path / "m", **options) as engine:
            ids.append([event.token_id for event in engine.generate(IDS[0, :12].tolist(), params)])
            if options:
                assert engine.report().to_dict()["speculation"]["drafted"] > 0
    assert ids[0] == ids[1]


def test_experts_between_lstms_are_foreseen(tmp_path, tokenizer):
    """The last layer has no FFN to learn anything of."""
    trained(tmp_path / "m", tokenizer, FLAT)
    bundle = fc.bundle(tmp_path / "m", tmp_path / "b")
    seen = []
    for learned in (False, True):
        if learned:
            found = calibrate_ahead(bundle, "a cat who had a hat " * 200, RunConfig(), tokens=1000)
            assert {pair.layer for pair in found.pairs} == {0, 1} and any(pair.better for pair in found.pairs)
        with fc.load(bundle, stream="always") as engine:
            seen.append(engine.logits(IDS[0].tolist()))
            assert bool(engine.probes) == learned
    assert torch.equal(*seen)


def test_loaded_back_it_is_the_same_module(tmp_path, tokenizer):
    model = trained(tmp_path / "m", tokenizer, SHAPES["groups"])
    again = load_decoder(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS)[0], model(IDS)[0])


def test_generate_from_the_command_line(tmp_path, tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    trained(tmp_path / "m", tokenizer, SHAPES["groups"])
    assert main.run(["generate", "--model", str(tmp_path / "m"), "-p", "Once upon", "-n", "8", "--seed", "1"]) == 0
    assert len(capsys.readouterr().out) > 8


# ------------------------------------------------------------------ the gate


def test_two_levels_by_hand():
    """y = sum over groups and experts of G_primary[i] * G_i[j] * E_ij, token by token."""
    torch.manual_seed(0)
    primary, inner = torch.randn(5, 3), torch.randn(5, 12)
    gates = gating.two_levels(primary, None, inner, None, 2, 2)
    for t in range(5):
        want = torch.zeros(3, 4)
        top = primary[t].topk(2)
        for weight, group in zip(top.values.softmax(-1), top.indices.tolist(), strict=True):
            best = inner[t].view(3, 4)[group].topk(2)
            want[group, best.indices] = weight * best.values.softmax(-1)
        assert torch.allclose(gates.dense[t], want.flatten())
        assert torch.allclose(torch.zeros(12).scatter(0, gates.experts[t], gates.weights[t]), want.flatten())
    load = (gates.dense > 0).float().view(5, 3, 4)  # without noise: the load is who was chosen, by both formulas
    assert torch.allclose(gates.load[0].view(3, 4), load.sum(0), atol=1e-5)
    moe = MoeConfig(12, 4, 8, gate_groups=3, gate_groups_per_tok=2)
    weights, experts = route_groups(primary, inner, moe)
    assert torch.equal(experts, gates.experts) and torch.allclose(weights, gates.weights)


def test_both_gates_learn_and_start_balanced():
    torch.manual_seed(0)
    model = Decoder(SHAPES["groups"])
    _, aux = model(IDS)
    sum(aux.importance + aux.load).backward()
    for name, parameter in model.named_parameters():
        if name.endswith(("gate", "noise")):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [("num_attention_heads", 2, "num_attention_heads"), ("num_hidden_layers", 1, "layers"),
     ("num_expert_groups", 3, "num_expert_groups"), ("gate_groups_per_tok", 9, "gate_groups_per_tok")],
)  # fmt: skip
def test_impossible_configs_are_refused(tmp_path, tokenizer, key, value, match):
    trained(tmp_path / "m", tokenizer, SHAPES["groups"])
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(GenaiRunError, match=match):
        open_model(tmp_path / "m")


def test_impossible_shapes_and_runs_are_refused(tmp_path, tokenizer):
    for changed in (
        {"num_expert_groups": 3, "gate_groups_per_tok": 1},
        {"mod_capacity": 0.5},
        {"num_hidden_layers": 1},
    ):
        with pytest.raises(UsageError):
            dataclasses.replace(FLAT, **changed)
    trained(tmp_path / "m", tokenizer, SHAPES["groups"])
    with pytest.raises(UsageError, match="groups first"):
        fc.load(tmp_path / "m", cache_bias=0.5)
