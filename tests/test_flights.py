"""Demands of neurons that a program settles, reads and computes by itself: all as their plain twin does it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_weights import weights

from flashinfer_cli.cache.flights import Asked
from flashinfer_cli.cache.neurons import NeuronCache
from flashinfer_cli.cache.slots import NeuronFile
from flashinfer_cli.cache.window import make_policy
from flashinfer_cli.config import NEURON_POLICIES
from flashinfer_cli.device import resolve
from flashinfer_cli.errors import CorruptCheckpointError
from flashinfer_cli.kernels import jobs
from flashinfer_cli.kernels.native import NumbaKernels
from flashinfer_cli.kernels.program import Program
from flashinfer_cli.recorder import Recorder
from flashinfer_cli.store.flash import FlashStore

D, COUNT, BLOCK, GUESSES, SLOTS = 128, 90, 8, 10, 30


class Layer:
    """A layer of neurons on the drive, run by programs or call by call."""

    def __init__(self, numba: NumbaKernels, cache: NeuronCache, fmt: str, gated: bool, index: int = 0) -> None:
        self.numba, self.cache, self.format, self.gated, self.index = numba, cache, fmt, gated, index
        self.width = cache.layers[index].file.width
        self.asked = Asked(np.zeros(COUNT + 1, np.int64), np.zeros(1, np.int64), np.zeros(COUNT, np.float32))
        torch.manual_seed(0)
        self.x, self.out = torch.randn(1, D), torch.zeros(1, D)
        self.bias = torch.randn(COUNT) if gated else None, torch.randn(COUNT)
        assert cache.flights is not None
        self.sheet = cache.flights.sheet(cache.layers[index], self.asked)
        self.guess, self.rest = Program(numba.threads), Program(numba.threads)
        self.guess.guess(self.sheet)
        self.rest.sparse(self.x, self.sheet, self.width, fmt, gated, "relu", self.bias, self.out)
        self.rest.add(self.out, torch.ones(1, D))

    def by_program(self, ids: np.ndarray, guessed: np.ndarray, scores: np.ndarray, fd: int | None = None) -> bool:
        """Whether it came to its end; `fd`: what its reads go to instead of the file."""
        flights, asked = self.cache.flights, self.asked
        assert flights is not None and self.cache.prepare(self.index, asked)
        if fd is not None:
            self.sheet[jobs.S_FD // 8] = fd
        if len(guessed):
            flights.guess_ids[: len(guessed)], asked.found[0] = guessed, len(guessed)
            self.numba.run(self.guess)
        asked.ids[: len(ids)], asked.found[0], asked.scores[:] = ids, len(ids), scores
        self.numba.run(self.rest)
        left = self.cache.finish(self.index, asked)
        for block, records in left or ():
            self._compute(block, records)
        if left is not None:
            self.out += 1
        return left is None

    def by_calls(self, ids: np.ndarray, guessed: np.ndarray, scores: np.ndarray) -> None:
        if len(guessed):
            self.cache.guess_ids(self.index, guessed)
        self.cache.recorder.neurons(self.index, len(ids), COUNT)
        self.out.zero_()
        for block, records in self.cache.fetch(self.index, ids, scores):
            self._compute(block, records)
        self.out += 1
        self.cache.settle()  # these count reads that have ended

    def _compute(self, block: np.ndarray, records: object) -> None:
        bias = tuple(None if each is None else each[block] for each in self.bias)
        self.numba.ffn_records(self.x, records, self.format, self.gated, "relu", bias, self.out)


@contextmanager
def layers_of(
    tmp_path: Path, numba: NumbaKernels, kinds: list[tuple[str, bool]], policy: str = "foresight", slots: int = SLOTS,
    guesses: int = GUESSES,
) -> Iterator[list[Layer]]:  # fmt: skip
    """Layers of one cache, by their format and whether they are gated."""
    files, recorder = {}, Recorder()
    for index, (fmt, gated) in enumerate(kinds):
        path = tmp_path / f"f{index}"
        if not path.exists():
            parts = [weights(fmt, COUNT, D, 10 * index + part)[0].numpy() for part in range(2 + gated)]
            records = np.concatenate(parts, 1)
            padded = np.zeros((COUNT, -(-records.shape[1] // 512) * 512), np.uint8)
            padded[:, : records.shape[1]] = records
            path.write_bytes(bytes(4096) + padded.tobytes())
        files[index] = NeuronFile(path, 4096, COUNT, (path.stat().st_size - 4096) // COUNT)
    recorder.phase = "decode"
    with FlashStore(recorder) as store:
        policies = {index: make_policy(policy, COUNT, slots, 3) for index in files}
        cache = NeuronCache(store, resolve("cpu"), recorder, files, policies, BLOCK, guesses, kernels=numba)
        yield [Layer(numba, cache, fmt, gated, index) for index, (fmt, gated) in enumerate(kinds)]


@contextmanager
def layer_of(
    tmp_path: Path, numba: NumbaKernels, policy: str = "foresight", fmt: str = "F16", gated: bool = False
) -> Iterator[Layer]:
    with layers_of(tmp_path, numba, [(fmt, gated)], policy) as (layer,):
        yield layer


def tokens(count: int, layer: Layer, guesses: int = GUESSES) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids that a token names, those guessed before, and scores."""
    random = np.random.default_rng(7)
    for turn in range(count):
        share = (0.0, 0.05, 0.3, 0.9)[turn % 4]
        ids = np.flatnonzero(random.random(COUNT) < share)
        absent = np.flatnonzero(layer.cache.layers[layer.index].slot < 0)
        guessed = np.sort(random.permutation(absent)[: guesses if turn % 3 else 0])
        yield ids, guessed, random.standard_normal(COUNT).astype(np.float32)


def state(layer: Layer) -> dict[str, object]:
    """All that a demand leaves behind."""
    cache, recorder = layer.cache, layer.cache.recorder
    slots = cache.layers[layer.index]
    here = np.flatnonzero(slots.slot >= 0)
    count = recorder.reads["decode", "neuron"]
    return {
        "out": layer.out.tolist(), "held": slots.policy.held.tolist(), "last": slots.policy.last.tolist(),
        "tally": None if slots.policy.tally is None else slots.policy.tally.tolist(), "here": here.tolist(),
        "records": slots.memory[0][slots.slot[here]].tobytes(), "hits": (slots.policy.hits, slots.policy.misses),
        "recorded": (recorder.phases["decode"].hits, recorder.phases["decode"].misses, recorder.neuron_guesses),
        "neurons": dict(recorder.neuron_counts), "wasted": recorder.wasted_bytes,
        "reads": (count.requests, count.bytes, count.useful), "sizes": dict(recorder.sizes),
    }  # fmt: skip


@pytest.mark.parametrize("policy", NEURON_POLICIES)
@pytest.mark.parametrize(
    ("fmt", "gated"), [("F16", False), ("BF16", True), *((fmt, True) for fmt in ("Q8_0", "Q8_G128")), ("F32", False)]
)
def test_a_program_does_what_calls_do(tmp_path, numba, policy, fmt, gated):
    """Many blocks and few, all here and none, guesses right and wrong: the same bits, slots and counts."""
    traces: list[list[object]] = [[], []]
    with layer_of(tmp_path, numba, policy, fmt, gated) as one, layer_of(tmp_path, numba, policy, fmt, gated) as other:
        for layer, trace in zip((one, other), traces, strict=True):
            layer.cache.trace = Tracer(trace)
        for ids, guessed, scores in tokens(40, one):
            assert one.by_program(ids, guessed, scores)
            other.by_calls(ids, guessed, scores)
            mine, plain = state(one), state(other)
            assert mine == plain, next(name for name in mine if mine[name] != plain[name])
    assert traces[0] == traces[1] and len(traces[0]) == 80
    assert 0 < one.cache.recorder.neuron_guesses[1] < one.cache.recorder.neuron_guesses[0]


@pytest.mark.parametrize(("slots", "guesses"), [(30, GUESSES), (0, GUESSES), (30, 0), (COUNT, GUESSES)])
def test_layers_of_different_widths_share_what_a_program_works_with(tmp_path, numba, slots, guesses):
    """A guess goes to rows of its layer's width; one that was wrong is under way when the next layer guesses."""
    kinds = [("F16", False), ("F32", True), ("Q8_0", False)]
    given = tmp_path, numba, kinds, "foresight", slots, guesses
    with layers_of(*given) as some, layers_of(*given) as others:
        assert len({layer.width for layer in some}) == 2
        for turns in zip(*(tokens(16, layer, guesses) for layer in some), strict=True):
            for one, other, asked in zip(some, others, turns, strict=True):
                assert one.by_program(*asked)
                other.by_calls(*asked)
                mine, plain = state(one), state(other)
                assert mine == plain, next(name for name in mine if mine[name] != plain[name])


def test_programs_and_calls_guess_to_the_same_rows_by_turns(tmp_path, numba):
    with layer_of(tmp_path, numba) as one, layer_of(tmp_path, numba) as other:
        for turn, (ids, guessed, scores) in enumerate(tokens(40, one)):
            if turn // 3 % 2:
                one.by_calls(ids, guessed, scores)
            else:
                assert one.by_program(ids, guessed, scores)
            other.by_calls(ids, guessed, scores)
            mine, plain = state(one), state(other)
            assert all(mine[name] == plain[name] for name in ("out", "held", "records", "hits", "recorded"))


def test_a_program_runs_on_fewer_threads_than_it_was_written_for(tmp_path, compiled):
    kernels = NumbaKernels(4)
    with layer_of(tmp_path, kernels) as one, layer_of(tmp_path, kernels) as other:
        for turn, (ids, guessed, scores) in enumerate(tokens(12, one)):
            kernels.set_threads(1 + turn % 4)
            assert one.by_program(ids, guessed, scores)
            other.by_calls(ids, guessed, scores)
            assert torch.equal(one.out, other.out)
    kernels.close()


def noting(begun: np.ndarray, notes: np.ndarray, threads: int) -> Program:
    """Takes down how many of a batch's reads have been handed over when it comes to that."""
    program, source, target = Program(threads), *(np.array([each.ctypes.data]) for each in (begun, notes))
    words = [jobs.COPY, 0, 0, 1, 0, source.ctypes.data, 8, 0, target.ctypes.data, 0, 1, *[0] * 7]
    program._add(words, 0, source, target, begun, notes)
    return program


def test_a_guess_is_handed_over_beside_the_product_that_follows_or_at_the_end(tmp_path, numba):
    weight, scores = torch.randn(600, D).view(torch.uint8), np.zeros(COUNT, np.float32)
    expected, made = torch.empty(1, 600), torch.empty(1, 600)
    with layer_of(tmp_path, numba) as layer:
        numba.linear(layer.x, weight, "F32", expected, 0)
        product, flights = Program(numba.threads), layer.cache.flights
        product.linear(layer.x, weight, "F32", made, 0)
        assert flights is not None
        batch = next(array for array in flights._kept if isinstance(array, dict))[jobs.F_BATCHES]
        begun, reads, left = (batch[word // 8 : word // 8 + 1] for word in (jobs.B_BEGUN, jobs.B_READS, jobs.B_LEFT))
        first, then = np.zeros(1, np.int64), np.zeros(1, np.int64)
        alone = layer.guess.followed_by(noting(begun, first, numba.threads))
        with_product = alone.followed_by(product).followed_by(noting(begun, then, numba.threads))
        assert (layer.guess.count, alone.count, with_product.count) == (1, 2, 4)
        for turn in range(20):
            program = (alone, with_product)[turn % 2]
            made.zero_()
            first[0] = then[0] = -1
            assert layer.cache.prepare(0, layer.asked)
            absent = np.flatnonzero(layer.cache.layers[0].slot < 0)[turn::7][:GUESSES]
            flights.guess_ids[: len(absent)], layer.asked.found[0] = absent, len(absent)
            numba.run(program)
            assert begun[0] == reads[0] > 0 and left[0] > 0  # under way, and nobody has waited
            assert first[0] == 0 and then[0] == (reads[0] if program is with_product else -1)
            assert torch.equal(made, expected) == (program is with_product)
            assert layer.by_program(np.sort(absent[: 1 + turn % 3]), np.empty(0, np.int64), scores)
            assert left[0] == 0


class Tracer:
    def __init__(self, found: list[object]) -> None:
        self.found = found

    def expect(self, layer: int, worth: np.ndarray) -> None:
        self.found.append(worth.tolist())

    def demand(self, phase: str, layer: int, chosen: np.ndarray) -> None:
        self.found.append((phase, layer, chosen.tolist()))


@pytest.mark.parametrize("holds", [0, 40])
def test_reads_that_fail_are_made_anew_by_calls(tmp_path, numba, holds):
    """By a file that holds some of the records only, or none at all; what is computed is the same."""
    (tmp_path / "short").write_bytes(bytes(4096 + 512 * holds))
    fd, completed = os.open(tmp_path / "short", os.O_RDONLY | getattr(os, "O_DIRECT", 0)), 0
    with layer_of(tmp_path, numba) as one, layer_of(tmp_path, numba) as other:
        content = np.fromfile(tmp_path / "f0", np.uint8)[4096:].reshape(COUNT, -1)
        (tmp_path / "short").write_bytes(bytes(4096) + content[:holds].tobytes())
        for turn, (ids, guessed, scores) in enumerate(tokens(24, one)):
            completed += one.by_program(ids, guessed, scores, fd if turn % 2 else None)
            other.by_calls(ids, guessed, scores)
            mine, plain = state(one), state(other)
            for name in ("out", "held", "here", "records", "hits", "tally"):
                assert mine[name] == plain[name], (turn, name)
    os.close(fd)
    assert 12 <= completed < 24


def test_a_file_that_has_shrunk_is_told(tmp_path, numba):
    with layer_of(tmp_path, numba) as layer:
        none, scores = np.empty(0, np.int64), np.zeros(COUNT, np.float32)
        layer.by_program(np.arange(10), none, scores)
        os.truncate(tmp_path / "f0", 4096 + 50 * layer.width)
        with pytest.raises(CorruptCheckpointError, match="shrunk"):
            layer.by_program(np.arange(30, 70), none, scores)
        layer.cache._abandon()
        slots = layer.cache.layers[0]
        assert slots.slot[50:].max() < 0  # nobody is thought to be here who never came
        assert layer.by_program(np.arange(10, 40), none, scores)


def test_a_program_that_is_interrupted_leaves_no_slot_unread(tmp_path, numba):
    """As by Ctrl-C behind one whose reads have failed."""
    (tmp_path / "empty").write_bytes(b"")
    fd = os.open(tmp_path / "empty", os.O_RDONLY)
    with layer_of(tmp_path, numba) as one, layer_of(tmp_path, numba) as other:
        none, scores = np.empty(0, np.int64), np.zeros(COUNT, np.float32)
        assert one.cache.prepare(0, one.asked)
        one.sheet[jobs.S_FD // 8] = fd
        one.asked.ids[:20], one.asked.found[0] = np.arange(20), 20
        numba.run(one.rest)  # and nobody asks what came of it
        assert one.by_program(np.arange(5, 30), none, scores)
        other.by_calls(np.arange(5, 30), none, scores)
        assert torch.equal(one.out, other.out)
    os.close(fd)


def test_a_token_that_never_came_to_its_neurons_leaves_nothing(tmp_path, numba):
    """As by Ctrl-C while attention's weights come, behind a token whose reads had failed."""
    (tmp_path / "empty").write_bytes(b"")
    fd, none, scores = os.open(tmp_path / "empty", os.O_RDONLY), np.empty(0, np.int64), np.zeros(COUNT, np.float32)
    with layer_of(tmp_path, numba) as one:
        assert not one.by_program(np.arange(20), none, scores, fd)
        here = one.cache.layers[0].slot.copy()
        assert one.cache.prepare(0, one.asked) and one.cache.prepare(0, one.asked)
        assert np.array_equal(one.cache.layers[0].slot, here) and (here >= 0).sum() == 20
    os.close(fd)
