"""Neurons that are read only when a token needs them: policies, reads, and what may not change a bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli.apps.recording import recording
from flashinfer_cli.apps.replay import as_it_ran, replay
from flashinfer_cli.bundles.order import chain, runs
from flashinfer_cli.bundles.reorder import reorder
from flashinfer_cli.bundles.sparsity import (
    ORDER_FILE,
    PREDICTORS_FILE,
    SPARSITY_FILE,
    LayerSparsity,
    Sparsity,
    manifest_digest,
    sparsity_json,
)
from flashinfer_cli.bundles.verify import verify_bundle
from flashinfer_cli.cache.neurons import NeuronCache
from flashinfer_cli.cache.slots import NeuronFile
from flashinfer_cli.cache.trace import read_trace
from flashinfer_cli.cache.window import Window, deal, make_policy
from flashinfer_cli.config import NEURON_POLICIES
from flashinfer_cli.device import allocate, resolve
from flashinfer_cli.errors import BundleError, CorruptCheckpointError
from flashinfer_cli.layers.demand import Oracle
from flashinfer_cli.models.open import open_model
from flashinfer_cli.plan import make_plan
from flashinfer_cli.recorder import Recorder
from flashinfer_cli.store.flash import FlashStore
from flashinfer_cli.store.scatter import MOST_VIEWS
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


# ------------------------------------------------------------------ policies


def test_window_by_hand():
    policy = Window(10, 10, k=2)
    assert [a.tolist() for a in policy.demand(np.array([1, 2]))] == [[1, 2], []]
    assert [a.tolist() for a in policy.demand(np.array([2, 3]))] == [[3], []]
    missing, gone = policy.demand(np.array([4]))  # the window is now {2, 3} and {4}: 1 goes
    assert (missing.tolist(), gone.tolist()) == ([4], [1])
    assert np.flatnonzero(policy.held).tolist() == [2, 3, 4]
    assert (policy.hits, policy.misses) == (1, 4)


def test_a_short_memory_shrinks_the_window():
    policy = Window(10, 3, k=5)
    policy.demand(np.array([0, 1]))
    policy.demand(np.array([2]))
    _, gone = policy.demand(np.array([3, 4]))  # room for one more: the oldest two of three go
    assert sorted(gone.tolist()) == [0, 1] and policy.held.sum() == 3


@pytest.mark.parametrize("name", NEURON_POLICIES)
@pytest.mark.parametrize("capacity", [0, 1, 7, 20, 64])
def test_policies_keep_their_promises(name, capacity):
    """Never more than there is room for; what is demanded is held where it fits; every id demanded is counted."""
    random = np.random.default_rng(capacity)
    policy = make_policy(name, 64, capacity, 3)
    held: set[int] = set()
    asked = 0
    for _ in range(200):
        ids = np.flatnonzero(random.random(64) < 0.15)
        missing, gone = policy.demand(ids)
        asked += len(ids)
        assert set(missing.tolist()) == set(ids.tolist()) - held
        held -= set(gone.tolist())
        assert not held & set(gone.tolist()) and not set(gone.tolist()) & set(ids.tolist())
        held = set(np.flatnonzero(policy.held).tolist())
        assert len(held) <= capacity
        assert len(held & set(ids.tolist())) == min(len(ids), max(capacity, 0)) or len(ids) <= capacity
    assert policy.hits + policy.misses == asked
    assert policy.hits > 0 or capacity < 7


def test_slots_go_where_they_are_wanted():
    counts, widths = dict.fromkeys(range(3), 100), {0: 512, 1: 512, 2: 1024}
    wants = {0: 0.6, 1: 0.1, 2: 0.1}
    assert deal(40 * 512, counts, widths, wants) == {0: 28, 1: 4, 2: 4}  # 6 to 1 to 1, of what there is
    assert deal(10**9, counts, widths, wants) == counts
    for room in (0, 511, 77_777, 200_000):
        found = deal(room, counts, widths, wants)
        assert 0 <= room - sum(widths[i] * n for i, n in found.items()) < 2048 or found == counts
        assert found[0] >= found[1] >= found[2]
    layer = LayerSparsity(0, 8, 1, 0.05, 0.1, 1.0, 0.5, {"1": 0.04, "2": 0.03, "4": 0.02})
    assert layer.working_set(1) == 0.1 and layer.working_set(5) == pytest.approx(0.1 + 0.04 + 0.03 + 0.03 + 0.02)


# ------------------------------------------------------------------ reads


def address(buffer: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return buffer.ctypes.data + rows * buffer.shape[1]


@pytest.mark.parametrize(("direct", "batched"), [("auto", True), ("auto", False), ("never", True)])
def test_records_land_in_their_rows(tmp_path, direct, batched):
    """Handed to the kernel in batches, or read one by one."""
    width, base, count = 512, 4096, 3000
    content = np.random.default_rng(1).integers(0, 255, (count, width), np.uint8)
    (tmp_path / "f").write_bytes(bytes(base) + content.tobytes())
    random = np.random.default_rng(2)
    recorder = Recorder()
    with FlashStore(recorder, direct=direct) as store:
        store.reader.batched = batched
        for share in (0.002, 0.05, 0.5, 1.0):
            ids = np.flatnonzero(random.random(count) < share)
            rows = random.permutation(count)[: len(ids)]
            buffer = allocate(count * width).reshape(count, width)
            store.read_records(tmp_path / "f", base, width, ids, address(buffer, rows), (buffer,), "neuron").wait()
            assert (buffer[rows] == content[ids]).all()
            left = np.setdiff1d(np.arange(count), rows)
            assert not buffer[left].any()  # nothing is written where nothing was asked for
        store.tick()
    assert len(ids) > 2 * MOST_VIEWS


def test_neighbours_and_small_gaps_are_one_read(tmp_path):
    (tmp_path / "f").write_bytes(bytes(4096 + 100 * 512))
    recorder = Recorder()
    with FlashStore(recorder) as store:
        buffer = allocate(100 * 512).reshape(100, 512)
        ids = np.array([0, 1, 2, 5, 60, 61])
        store.read_records(tmp_path / "f", 4096, 512, ids, address(buffer, np.arange(6)), (buffer,), "neuron").wait()
    count = recorder.reads["load", "neuron"]
    assert (count.requests, count.useful, count.bytes) == (2, 6 * 512, 8 * 512)


def test_a_file_that_has_shrunk_is_told(tmp_path):
    (tmp_path / "f").write_bytes(bytes(100 * 512))
    for batched in (True, False):
        with FlashStore(Recorder()) as store:
            store.reader.batched = batched
            buffer = allocate(200 * 512).reshape(200, 512)
            ids = np.arange(0, 200, 40)
            ticket = store.read_records(tmp_path / "f", 0, 512, ids, address(buffer, ids), (buffer,), "neuron")
            with pytest.raises(CorruptCheckpointError, match="shrunk"):
                ticket.wait()


@pytest.mark.parametrize("left_at", [None, 0, 2])
def test_a_token_that_is_left_halfway_leaves_no_slot_unread(tmp_path, left_at):
    """As by Ctrl-C in a chat, before a block is asked for or while one is computed on; what holds it may still live."""
    width, count = 512, 64
    content = np.random.default_rng(3).integers(1, 255, (count, width), np.uint8)
    (tmp_path / "f").write_bytes(content.tobytes())
    with FlashStore(Recorder()) as store:
        files = {0: NeuronFile(tmp_path / "f", 0, count, width)}
        cache = NeuronCache(store, resolve("cpu"), Recorder(), files, {0: make_policy("recent", count, 50, 1)}, block=4)
        left = cache.fetch(0, np.arange(10, 50))
        if left_at is not None:
            arriving = iter(left)
            for _ in range(left_at + 1):
                next(arriving)
        ids = np.arange(0, 64, 3)
        for _ in range(2):  # read, then found in slots
            for block, records in cache.fetch(0, ids):
                assert (records.gather().numpy().reshape(len(block), width) == content[block]).all()
        assert cache.layers[0].policy.hits == len(ids) + len(range(12, 50, 3))
        store.tick()


# ------------------------------------------------------------------ the model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A small ReLU model as a bundle, with predictors that are right about half of the time."""
    folder = tmp_path_factory.mktemp("neurons")
    torch.manual_seed(1)
    model = Decoder(SHAPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(6)
    (folder / "m").mkdir()
    write_folder(model, data.train_tokenizer(["a cat sat on a mat"], 300), folder / "m")
    out = fc.bundle(folder / "m", folder / "b")
    write_predictors(out, model)
    return out


def write_predictors(out: Path, model: Decoder | None = None, silent: int | None = None) -> None:
    torch.manual_seed(2)
    tensors = {}
    for layer in range(3):
        a, b = torch.randn(8, 64), torch.randn(160, 8)
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


def test_no_cache_changes_a_bit(bundle, monkeypatch):
    """The predictor being fixed: resident, streamed, every policy and window, few or many at once."""
    want, report = decoded(bundle)
    assert report.exactness == "sparse"
    width, requests = 512, []
    for neurons in (0, 1, 20, 100, 160):
        slots_of(monkeypatch, 3 * neurons * width)
        for policy, window in (("recent", 5), ("frequent", 5), ("window", 1), ("window", 6)):
            got, report = decoded(bundle, stream="always", neuron_policy=policy, window=window)
            assert torch.equal(got, want)
            requests.append(sum(io["bytes"] for io in report.io if io["kind"] == "neuron"))
    assert max(requests) == requests[0] > 2 * min(requests) > 0  # or the test would show nothing


def test_the_oracle_gives_the_dense_tokens(bundle, monkeypatch):
    dense, report = decoded(bundle, exact=True)
    assert report.exactness == "exact"

    def oracles(path, layers, kernels, device):
        found = {}
        if not layers:
            return found
        with fc.load(bundle, exact=True, context=32) as engine:
            from flashinfer_cli.apps.calibrate import gate_rows

            for layer in layers:
                gate, bias = gate_rows(engine.decoder.blocks[layer].ffn, engine)
                found[layer] = Oracle(gate, bias, "relu")
        return found

    monkeypatch.setattr("flashinfer_cli.engine.load_predictors", oracles)
    for options in ({}, {"stream": "always"}):
        got, report = decoded(bundle, **options)
        assert report.exactness == "sparse"
        assert (got - dense).abs().max() < 1e-4 and torch.equal(got.argmax(-1), dense.argmax(-1))


def test_skipped_neurons_are_neither_read_nor_computed(bundle, tmp_path):
    """A neuron that is never predicted may hold anything: only a prompt, which is dense, would meet it."""
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
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
def test_stale_or_damaged_calibrations_are_refused(bundle, tmp_path, damage):
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
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


# ------------------------------------------------------------------ ahead of need, and after a prompt


def reads(report: fc.RunReport, phase: str = "decode") -> int:
    return sum(io["useful"] for io in report.io if io["kind"] == "neuron" and io["phase"] == phase)


def test_guesses_change_no_bit_and_their_waste_is_counted(bundle, monkeypatch):
    monkeypatch.setattr("flashinfer_cli.cache.neurons.LEAST_MISSED", 1)
    want, _ = decoded(bundle)
    width = 512
    for neurons in (0, 30, 160):
        slots_of(monkeypatch, 3 * neurons * width)
        _, plain = decoded(bundle, stream="always", prefetch_neurons=False)
        with fc.load(bundle, context=32, stream="always") as engine:
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
def test_a_prompt_leaves_its_neurons_in_the_slots(bundle, monkeypatch, policy):
    """The slots then hold what they would hold had the prompt been decoded, right to the byte, and nothing was read."""
    slots_of(monkeypatch, 3 * 90 * 512)
    options = {"context": 32, "stream": "always", "neuron_policy": policy, "window": 2}
    with fc.load(bundle, **options) as engine:
        engine.session().prefill(PROMPT)
        assert reads(engine.report(), "prefill") == 0
        for layer in engine.neurons.layers.values():
            assert np.array_equal(layer.slot >= 0, layer.policy.held) and layer.policy.held.sum() > 20
            stored = np.fromfile(layer.file.path, np.uint8)[layer.file.base :].reshape(-1, layer.file.width)
            ids = np.flatnonzero(layer.slot >= 0)
            assert np.array_equal(np.concatenate(layer.memory)[layer.slot[ids]], stored[ids])
            assert layer.policy.time == len(PROMPT) and layer.policy.hits == layer.policy.misses == 0


@pytest.mark.parametrize("policy", NEURON_POLICIES)
def test_a_prompt_has_the_late_slots(bundle, tmp_path, monkeypatch, policy):
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

    with fc.load(bundle, context=48) as engine:
        want = run(engine)
    slots_of(monkeypatch, 3 * 40 * 512, late=3 * 60 * 512)
    options = {"stream": "always", "neuron_policy": policy, "window": 3}
    with fc.load(bundle, context=48, **options) as engine, recording(engine, tmp_path / "t.jsonl.gz"):
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


# ------------------------------------------------------------------ traces


@pytest.mark.parametrize("policy", NEURON_POLICIES)
@pytest.mark.parametrize("slots", [0, 40, 100, None])
def test_replay_counts_what_the_run_counted(bundle, tmp_path, monkeypatch, policy, slots):
    options = {}
    if slots is not None:
        slots_of(monkeypatch, 3 * slots * 512)
        options = {"stream": "always", "neuron_policy": policy, "window": 3}
    with fc.load(bundle, context=32, **options) as engine, recording(engine, tmp_path / "t.jsonl.gz"):
        session = engine.session()
        session.prefill(PROMPT)
        for token in STEPS:
            session.step(token)
        computed = sum(count for (phase, _), (count, _) in engine.recorder.neuron_counts.items() if phase == "decode")
        layers = engine.neurons.layers.values() if slots is not None else []
        misses = sum(layer.policy.misses for layer in layers)
        hits = sum(layer.policy.hits for layer in layers) if layers else computed
        if layers:
            engine.neurons.settle()
        asked = reads(engine.report()) - engine.report().wasted_bytes
        assert asked == misses * 512 and hits + misses == computed > 1000
    trace = read_trace(tmp_path / "t.jsonl.gz")
    again = as_it_ran(trace)
    assert (again.hits(), again.misses()) == (hits, misses) and trace.tokens("decode") == len(STEPS)
    assert (misses == 0) == (slots is None)
    if slots == 40:
        share = slots / 160
        found = replay(tmp_path / "t.jsonl.gz", shares=[share, 1.0])
        part, whole = found["points"]
        mine = part["policies"][policy]
        assert mine["hit_ratio"] == hits / computed
        assert all(each["hit_ratio"] <= part["belady"]["hit_ratio"] for each in part["policies"].values())
        assert mine["bytes_per_token"] == misses * 512 / len(STEPS) and whole["bytes"] == 3 * 160 * 512


# ------------------------------------------------------------------ order


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


def test_a_reordered_bundle_is_the_same_model(bundle, tmp_path):
    copy, opened = tmp_path / "b", open_model(bundle)
    with pytest.raises(BundleError, match="not known"):
        reorder(bundle, tmp_path / "no")
    shutil.copytree(bundle, copy)
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


def test_biases_move_with_their_neurons(tmp_path):
    path = make("opt", 0, tmp_path / "model")[0]
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
