"""Models whose neurons are read only when a token needs them, and what may not change a bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sparse_bundle import PROMPT, STEPS, decoded, reads, slots_of, write_predictors

import flashinfer_cli as fc
from flashinfer_cli.apps.planning import plan_only
from flashinfer_cli.apps.profile import profile
from flashinfer_cli.apps.recording import recording
from flashinfer_cli.apps.replay import as_it_ran
from flashinfer_cli.bundles.sparsity import PREDICTORS_FILE, SPARSITY_FILE
from flashinfer_cli.cache.trace import read_trace
from flashinfer_cli.config import NEURON_POLICIES, RunConfig, SamplingParams
from flashinfer_cli.errors import BundleError
from flashinfer_cli.layers.demand import Oracle
from flashinfer_cli.models.layout import lay_out
from flashinfer_cli.models.open import open_model
from flashinfer_cli.models.sizes import sizes_of, slots_first
from flashinfer_cli.plan import Sizes, make_plan
from flashinfer_cli.store.drive import DriveRate


def test_no_cache_changes_a_bit(sparse_bundle, monkeypatch):
    """The predictor being fixed: resident, streamed, every policy and window, few or many at once."""
    want, report = decoded(sparse_bundle)
    assert report.exactness == "sparse"
    width, requests = 512, []
    for neurons in (0, 1, 20, 100, 160):
        slots_of(monkeypatch, 3 * neurons * width)
        for policy, window in (
            ("recent", None), ("frequent", None), ("window", 1), ("window", 6), ("foresight", None),
        ):  # fmt: skip
            got, report = decoded(sparse_bundle, stream="always", neuron_policy=policy, window=window)
            assert torch.equal(got, want)
            requests.append(sum(io["bytes"] for io in report.io if io["kind"] == "neuron"))
    assert max(requests) == requests[0] > 2 * min(requests) > 0  # or the test would show nothing


def test_the_oracle_gives_the_dense_tokens(sparse_bundle, monkeypatch):
    dense, report = decoded(sparse_bundle, exact=True)
    assert report.exactness == "exact"

    def oracles(path, layers, kernels, device):
        found = {}
        if not layers:
            return found
        with fc.load(sparse_bundle, exact=True, context=32) as engine:
            from flashinfer_cli.apps.calibrate import gate_rows

            for layer in layers:
                gate, bias = gate_rows(engine.decoder.blocks[layer].ffn, engine)
                found[layer] = Oracle(gate, bias, "relu")
        return found

    monkeypatch.setattr("flashinfer_cli.engine.load_predictors", oracles)
    for options in ({}, {"stream": "always"}):
        got, report = decoded(sparse_bundle, **options)
        assert report.exactness == "sparse"
        assert (got - dense).abs().max() < 1e-4 and torch.equal(got.argmax(-1), dense.argmax(-1))


def test_skipped_neurons_are_neither_read_nor_computed(sparse_bundle, tmp_path):
    """A neuron that is never predicted may hold anything: only a prompt, which is dense, would meet it."""
    copy = tmp_path / "b"
    shutil.copytree(sparse_bundle, copy)
    write_predictors(copy, silent=17)
    _, report = decoded(copy, stream="always")
    neurons = [io for io in report.io if io["phase"] == "decode" and io["kind"] == "neuron"]
    assert len(neurons) == 1
    opened = open_model(copy)
    width = opened.checkpoint.records[0].width_bytes
    assert neurons[0]["useful"] % width == 0 and neurons[0]["useful"] < len(STEPS) * 3 * 160 * width
    for layer in range(3):
        info = opened.checkpoint.tensors[opened.checkpoint.records[layer].tensor]
        with open(info.path, "r+b") as file:
            file.seek(info.offset + 17 * width)
            file.write(np.full(width // 2, 0x7FC0, np.uint16).tobytes())  # NaN
    with fc.load(copy, context=32, stream="always") as engine:
        session = engine.session()
        session._phase("decode", 1)  # a prompt of one token at a time, sparse as all that follows
        rows = [session.step(token) for token in [*PROMPT, *STEPS]]
        assert torch.isfinite(torch.stack(rows)).all()


@pytest.mark.parametrize("damage", ["manifest", "json", "predictors", "gone"])
def test_stale_or_damaged_calibrations_are_refused(sparse_bundle, tmp_path, damage):
    copy = tmp_path / "b"
    shutil.copytree(sparse_bundle, copy)
    if damage == "manifest":
        body = json.loads((copy / SPARSITY_FILE).read_text())
        (copy / SPARSITY_FILE).write_text(json.dumps({**body, "manifest": "0" * 64}))
    elif damage == "json":
        (copy / SPARSITY_FILE).write_text("{")
    elif damage == "predictors":
        (copy / PREDICTORS_FILE).write_bytes(b"nothing")
    else:
        (copy / PREDICTORS_FILE).unlink()
    with pytest.raises(BundleError, match=r"calibrat|lost|damaged|read"):
        fc.load(copy, context=32)
    with fc.load(copy, context=32, exact=True) as engine:  # what needs no predictors still runs
        assert engine.report().exactness == "exact"


def test_guesses_change_no_bit_and_their_waste_is_counted(sparse_bundle, monkeypatch):
    monkeypatch.setattr("flashinfer_cli.cache.neurons.LEAST_MISSED", 1)
    want, _ = decoded(sparse_bundle)
    width = 512
    for neurons in (0, 30, 160):
        slots_of(monkeypatch, 3 * neurons * width)
        _, plain = decoded(sparse_bundle, stream="always", prefetch_neurons=False)
        with fc.load(sparse_bundle, context=32, stream="always") as engine:
            session = engine.session()
            got = torch.stack([session.prefill(PROMPT), *(session.step(token) for token in STEPS)])
            engine.neurons.settle()
            report, (read, right) = engine.report(), engine.recorder.neuron_guesses
        assert torch.equal(got, want)
        assert report.decode.hits == plain.decode.hits and report.decode.misses == plain.decode.misses
        assert report.wasted_bytes == (read - right) * width
        assert reads(report) == reads(plain) + report.wasted_bytes  # each needed byte is read once, ahead or not
        assert neurons == 160 or 0 < right < read


@pytest.mark.parametrize("policy", NEURON_POLICIES)
def test_a_prompt_leaves_its_neurons_in_the_slots(sparse_bundle, monkeypatch, policy):
    """The slots then hold what they would hold had the prompt been decoded, right to the byte, and nothing was read."""
    slots_of(monkeypatch, 3 * 90 * 512)
    options = {"context": 32, "stream": "always", "neuron_policy": policy, "window": 2 if policy == "window" else None}
    with fc.load(sparse_bundle, **options) as engine:
        engine.session().prefill(PROMPT)
        assert reads(engine.report(), "prefill") == 0
        for layer in engine.neurons.layers.values():
            assert np.array_equal(layer.slot >= 0, layer.policy.held) and layer.policy.held.sum() > 20
            stored = np.fromfile(layer.file.path, np.uint8)[layer.file.base :].reshape(-1, layer.file.width)
            ids = np.flatnonzero(layer.slot >= 0)
            assert np.array_equal(np.concatenate(layer.memory)[layer.slot[ids]], stored[ids])
            assert layer.policy.time == len(PROMPT) and layer.policy.hits == layer.policy.misses == 0


@pytest.mark.parametrize("policy", NEURON_POLICIES)
def test_a_prompt_has_the_late_slots(sparse_bundle, tmp_path, monkeypatch, policy):
    """Between two prompts there are more slots, with the same bits; a replay counts what the run counted."""

    def run(engine: fc.Engine) -> torch.Tensor:
        session, rows = engine.session(), []
        for tokens in (STEPS, STEPS[::-1]):
            rows.append(session.prefill(PROMPT))
            for index, layer in (engine.neurons.layers if engine.run.stream == "always" else {}).items():
                assert engine.neurons.prompt_room[index] == 40 >= layer.policy.held.sum() > 20
                assert not layer.memory[1].any()
                check(layer)
            rows += [session.step(token) for token in tokens]
        return torch.stack(rows)

    def check(layer) -> None:
        stored = np.fromfile(layer.file.path, np.uint8)[layer.file.base :].reshape(-1, layer.file.width)
        ids = np.flatnonzero(layer.slot >= 0)
        assert np.array_equal(np.concatenate(layer.memory)[layer.slot[ids]], stored[ids])
        assert (
            np.array_equal(layer.slot >= 0, layer.policy.held) and len(ids) + len(layer.free) == layer.policy.capacity
        )

    with fc.load(sparse_bundle, context=48) as engine:
        want = run(engine)
    slots_of(monkeypatch, 3 * 40 * 512, late=3 * 60 * 512)
    options = {"stream": "always", "neuron_policy": policy, "window": 3 if policy == "window" else None}
    with fc.load(sparse_bundle, context=48, **options) as engine, recording(engine, tmp_path / "t.jsonl.gz"):
        assert torch.equal(run(engine), want)
        layers = engine.neurons.layers.values()
        assert max(layer.policy.held.sum() for layer in layers) > 60
        for layer in layers:
            check(layer)
        counts = sum(layer.policy.hits for layer in layers), sum(layer.policy.misses for layer in layers)
        engine.neurons.settle()
        assert reads(engine.report()) == counts[1] * 512 + engine.report().wasted_bytes
    again = as_it_ran(read_trace(tmp_path / "t.jsonl.gz"))
    assert (again.hits(), again.misses()) == counts


def test_a_plan_without_a_run_knows_of_the_neurons(sparse_bundle, monkeypatch):
    """`genai-run plan` divides the same sizes as a run."""
    seen: list[Sizes] = []
    monkeypatch.setattr(
        "flashinfer_cli.engine.make_plan",
        lambda sizes, **rest: seen.append(replace(sizes, scratch=len)) or make_plan(sizes, **rest),
    )
    for exact in (False, True):
        decoded(sparse_bundle, exact=exact)
        plan_only(str(sparse_bundle), RunConfig(context=32, exact=exact))
    sparse, planned, dense, planned_dense = seen
    assert sparse == planned and dense == planned_dense
    assert sparse.neurons > 0 == dense.neurons


def test_profile_measures_the_drive_in_what_a_prompt_would_take(sparse_bundle, monkeypatch):
    """It needs memory of its own, which the slots behind a prompt would leave no room for."""
    slots_of(monkeypatch, 3 * 40 * 512, late=3 * 60 * 512)
    seen = []
    with fc.load(sparse_bundle, context=32, stream="always") as engine:
        rate = DriveRate(4096, 1, 1e9, "direct")
        monkeypatch.setattr(
            "flashinfer_cli.apps.profile.measure",
            lambda *a, **k: seen.append([layer.slot.max() for layer in engine.neurons.layers.values()]) or rate,
        )
        profile(engine, PROMPT, SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        assert [len(layer.memory[0]) for layer in engine.neurons.layers.values()] == [40, 40, 40]
    assert max(seen[0]) < 40


def test_slots_before_slices_are_of_what_predictors_name(sparse_bundle):
    opened = open_model(sparse_bundle)
    records = opened.checkpoint.records[1]
    layout, dense = (lay_out(opened.checkpoint, opened.config, opened.weights, which) for which in ([0, 1, 2], [0]))

    def first(layout, named):
        return sizes_of(layout, opened.config, RunConfig(context=32, kv_cache_type="f32"), named).slots_first

    few = records.width_bytes * slots_first(0.02 * records.count, records.width_bytes)
    assert first(layout, {1: 0.02}) == int(few) > 0 and first(layout, {0: 0.02, 1: 0.02}) == int(2 * few)
    assert first(layout, {1: 0.9}) == records.width_bytes * records.count  # not more than there are
    assert first(dense, {1: 0.02}) == first(layout, None) == 0
