"""Demands of neurons that compiled code settles, reads, waits for and computes on by itself (`kernels.sparse`).

What one token asks of one layer takes some forty calls of Python otherwise, each of which runs cold between two
products of megabytes: a quarter of a token's time. Here are the words and the memory that such a demand works with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import NEURON_STAGES
from ..kernels import jobs
from ..kernels.program import Program
from ..recorder import Recorder
from ..store.aio import EVENT, Aio
from ..store.flash import FlashStore
from ..store.scatter import GAP_BYTES, MOST_VIEWS
from .settling import CompiledSettler, Settled
from .slots import Slots
from .window import Foresight

COUNTS = slice(jobs.F_BUSY // 8, jobs.F_RIGHT // 8 + 1)


@dataclass(frozen=True)
class Asked:
    """Where a predictor leaves what it says: ids int64 [count + 1], their number, int64 [1], and float32 [count]."""

    ids: np.ndarray
    found: np.ndarray
    scores: np.ndarray


class Flights:
    """The reads of one cache's compiled demands. `count` neurons at most in a layer; guesses go to `staging`."""

    def __init__(
        self, store: FlashStore, aio: Aio, recorder: Recorder, settler: CompiledSettler, count: int, guesses: int,
        staging: np.ndarray,
    ) -> None:  # fmt: skip
        self.store, self.recorder, self.settler = store, recorder, settler
        block = settler.block
        self.guess_ids, self._none = np.zeros(count + 1, np.int64), np.zeros(1, np.int64)
        self._aio = aio
        self._kept: list[object] = []
        self._words = np.zeros(jobs.FLIGHT_WORDS, np.int64)
        by_bits = np.zeros(64, np.int64)
        recorder.by_bits.append(by_bits)
        most = [guesses, NEURON_STAGES * block, *[block] * NEURON_STAGES]  # records of each batch
        batches = np.concatenate([self._batch(records) for records in most])
        arrays = {
            jobs.F_EVENTS: np.zeros(aio.depth, EVENT), jobs.F_BY_BITS: by_bits, jobs.F_BATCHES: batches,
            jobs.F_WASTE: store.waste(GAP_BYTES), jobs.F_GUESS_IDS: self.guess_ids,
            jobs.F_GUESS_ROWS: np.zeros(guesses, np.int64), jobs.F_GUESS_AT: staging,
            jobs.F_IDS: np.zeros(block, np.int64),
            jobs.F_AT: np.zeros(block, np.int64), jobs.F_FROM: np.zeros(block, np.int64),
            jobs.F_TO: np.zeros(block, np.int64), jobs.F_BIASES: np.zeros(2 * block, np.float32),
        }  # fmt: skip
        numbers = {
            jobs.F_CONTEXT: aio.context, jobs.F_DEPTH: aio.depth, jobs.F_SUBMIT: aio.calls[2],
            jobs.F_GETEVENTS: aio.calls[3], jobs.F_MOST: MOST_VIEWS,
        }  # fmt: skip
        for place, number in (numbers | {place: array.ctypes.data for place, array in arrays.items()}).items():
            self._words[place // 8] = number
        self._kept.append(arrays)

    def _batch(self, records: int) -> np.ndarray:
        words = np.zeros(jobs.BATCH_WORDS, np.int64)
        sizes = {jobs.B_REQUESTS: 9, jobs.B_OFFSETS: 1, jobs.B_SIZES: 1, jobs.B_FIRST: 1, jobs.B_VIEWS: 4}
        for place, each in sizes.items():
            array = np.zeros(each * records + 1, np.int64)
            words[place // 8] = array.ctypes.data
            self._kept.append(array)
        return words

    def sheet(self, layer: Slots, asked: Asked) -> np.ndarray:
        """The words by which a program's jobs know the layer, and what the predictor says of it."""
        sheet = self.settler.sheet(layer)
        tally = layer.policy.tally
        sheet[jobs.S_TALLY // 8] = 0 if tally is None else tally.ctypes.data
        sheet[jobs.S_FOUND // 8], sheet[jobs.S_IDS // 8] = asked.found.ctypes.data, asked.ids.ctypes.data
        sheet[jobs.S_FLIGHTS // 8], sheet[jobs.S_BASE // 8] = self._words.ctypes.data, layer.file.base
        sheet[jobs.S_GAP // 8] = max(0, GAP_BYTES // layer.file.width)
        return sheet

    def prepare(self, layer: Slots, asked: Asked) -> bool:
        """A program with the layer's jobs runs next; False where the drive does not take its reads."""
        fd, direct = self.store.reader.files.open_for_sectors(layer.file.path)
        if not direct or not self.store.reader.batched or not self._aio.context:
            return False
        sheet, policy = self.settler.sheet(layer), layer.policy
        adds = policy.advance()
        sheet[jobs.S_CAPACITY // 8 : jobs.S_IDS // 8 + 1] = (
            policy.capacity,
            policy.time,
            policy.oldest(),
            asked.ids.ctypes.data,
        )
        sheet[[jobs.S_ASKED // 8, jobs.S_MISSES // 8, jobs.S_DONE // 8]] = 0  # of the token before
        floats = sheet.view(np.float64)
        floats[jobs.S_ADDS // 8], sheet[jobs.S_FD // 8] = adds, fd
        if isinstance(policy, Foresight):
            floats[jobs.S_SCALE // 8], sheet[jobs.S_SCORES // 8] = policy.scale, asked.scores.ctypes.data
        return True

    def finish(self, layer: Slots) -> tuple[int, int, bool]:
        """Book what the program did; returns the neurons asked for, those of them that the policy did not hold, and
        whether all were computed on."""
        sheet = self.settler.sheet(layer)
        asked, missed, done = (int(sheet[word // 8]) for word in (jobs.S_ASKED, jobs.S_MISSES, jobs.S_DONE))
        layer.policy.count(asked, missed)
        self.book(layer.file.width)
        return asked, missed, done * self.settler.block >= asked

    def book(self, width: int) -> None:
        """Tell the recorder what was read and waited for."""
        counts = self._words[COUNTS]
        busy, waited, requests, nbytes, useful, guessed, right = counts.tolist()
        counts[:] = 0
        self.recorder.waited(waited / 1e9)
        if requests:
            self.recorder.read_by_code("neuron", requests, nbytes, useful)
            self.store.was_busy(busy / 1e9)
        if guessed:
            self.recorder.neuron_guess(guessed, right, width)

    def drain(self) -> None:
        """No guess is under way or waited for any more."""
        if self._words[jobs.F_GUESS_OF // 8] or self._words[jobs.F_UNDER_WAY // 8]:
            nobody, program = np.zeros(jobs.SHEET_WORDS, np.int64), Program(1)
            nobody[jobs.S_FOUND // 8], nobody[jobs.S_FLIGHTS // 8] = self._none.ctypes.data, self._words.ctypes.data
            program.guess(nobody)
            self.settler.kernels.run(program)

    def rest(self, layer: Slots, asked: Asked) -> Settled:
        """The blocks that a demand which ended early has not computed; all that they miss is to be read anew."""
        sheet = self.settler.sheet(layer)
        count, done = sheet[jobs.S_ASKED // 8], sheet[jobs.S_DONE // 8]
        return self.settler.settled(layer, asked.ids[:count], int(done) * self.settler.block)
