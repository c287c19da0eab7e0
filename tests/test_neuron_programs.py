"""Models whose programs fetch neurons by themselves: the same text as call by call, also where they give way."""

from __future__ import annotations

import torch
from sparse_bundle import PROMPT, STEPS, decoded, make, reads, slots_of

import flashinfer_cli as fc
from flashinfer_cli.bundles import open_bundle
from flashinfer_cli.kernels.native import NumbaKernels
from flashinfer_cli.store.reader import Reader


def test_the_same_text_with_and_without_programs(sparse_bundle, monkeypatch):
    monkeypatch.setattr("flashinfer_cli.cache.neurons.LEAST_MISSED", 1)
    found = []
    for neurons in (0, 30, 160):
        slots_of(monkeypatch, 3 * neurons * 512)
        for lend in (Reader.lend, lambda self: None):
            monkeypatch.setattr(Reader, "lend", lend)
            found.append(decoded(sparse_bundle, stream="always", kernels="compiled"))
        (mine, report), (plain, other) = found[-2:]
        assert torch.equal(mine, plain)
        assert (report.decode.hits, report.decode.misses) == (other.decode.hits, other.decode.misses)
        assert reads(report) == reads(other) and report.wasted_bytes == other.wasted_bytes
    assert reads(found[0][1]) > reads(found[2][1]) > 0


def test_a_guess_is_handed_over_beside_a_product_that_needs_scratch(tmp_path, monkeypatch):
    """As where attention's matrices are in memory: the same bits, and reads that attention hides."""
    monkeypatch.setattr("flashinfer_cli.cache.neurons.LEAST_MISSED", 1)
    path = make(tmp_path, width=128, quantize="int8")
    slots_of(monkeypatch, 3 * 30 * 512)
    rows = []
    for lend in (Reader.lend, lambda self: None):
        monkeypatch.setattr(Reader, "lend", lend)
        with fc.load(path, context=32, stream="always", kernels="compiled") as engine:
            engine.decoder.keep(engine.decoder.streamed)
            session = engine.session()
            tokens = [
                session.prefill([token % 300 for token in PROMPT]),
                *(session.step(token % 300) for token in STEPS),
            ]
            rows.append(torch.stack(tokens))
            assert engine.recorder.neuron_guesses[0] > engine.recorder.neuron_guesses[1] > 0
    assert torch.equal(*rows)


def test_programs_over_int8_records_and_an_int8_trunk(tmp_path, monkeypatch):
    path = make(tmp_path, width=128, quantize="int8")
    bundle = open_bundle(path)
    assert {part.format for part in bundle.records[0].parts} == {"Q8_G128"}
    assert {bundle.tensors[bundle.weights.layers[0][role].tensor].format for role in "qkvo"} == {"Q8_G128"}
    slots_of(monkeypatch, 3 * 30 * 512)
    mine, report = decoded(path, stream="always", kernels="compiled")
    monkeypatch.setattr(Reader, "lend", lambda self: None)
    plain, _ = decoded(path, stream="always", kernels="compiled")
    reference, _ = decoded(path, stream="never", kernels="reference")
    assert torch.equal(mine, plain) and reads(report) > 0
    assert torch.allclose(mine, reference, atol=1e-3)


def test_programs_give_way_to_calls_when_the_drive_refuses(sparse_bundle, monkeypatch):
    """As one does whose sectors are larger, found out while decoding."""
    slots_of(monkeypatch, 3 * 30 * 512)
    want, _ = decoded(sparse_bundle, stream="always", kernels="compiled")
    with fc.load(sparse_bundle, context=32, stream="always", kernels="compiled") as engine:
        session, by_code = engine.session(), []
        got = [session.prefill(PROMPT)]
        for index, token in enumerate(STEPS):
            engine.store.reader.batched = index < 4
            got.append(session.step(token))
            by_code.append(sum(map(sum, engine.recorder.by_bits)))
    assert torch.equal(torch.stack(got), want)
    assert by_code[2] < by_code[3] == by_code[-1]


def test_threads_wait_awake_where_no_other_reads(sparse_bundle, monkeypatch):
    """And what a prompt brought back of libraries goes when its tokens are decoded."""
    awake, gone = [], []
    monkeypatch.setattr(NumbaKernels, "keep_cores", lambda self, keep: awake.append(keep))
    monkeypatch.setattr("flashinfer_cli.cache.neurons.let_go_of_code", lambda: gone.append(True))
    slots_of(monkeypatch, 3 * 30 * 512, late=3 * 20 * 512)
    for pinned in (False, True):
        with fc.load(sparse_bundle, context=32, stream="always", kernels="compiled") as engine:
            if pinned:
                engine.decoder.keep(engine.decoder.streamed)
            awake.clear()
            gone.clear()
            session = engine.session()
            session.prefill(PROMPT, more=True)
            assert not any(awake) and not gone
            for token in STEPS[:3]:
                session.step(token, more=True)
            assert awake[-1] == pinned and len(gone) == 1


def test_more_tokens_than_were_planned_for_have_a_prompts_memory(sparse_bundle, monkeypatch):
    slots_of(monkeypatch, 3 * 30 * 512, late=3 * 20 * 512)
    for drafted, slots in ((0, 30), (1, 50)):
        settled = {"draft": "ngram", "speculate": "1"} if drafted else {}
        with fc.load(sparse_bundle, context=32, stream="always", **settled) as engine:
            assert engine.neurons is not None
            session, policy = engine.session(), engine.neurons.layers[0].policy
            session.prefill(PROMPT, more=True)
            session.step(7, more=True)
            assert policy.capacity == 50
            session.verify([5, 9], more=True)
            assert policy.capacity == slots
            session.step(7)
            assert policy.capacity == 50
