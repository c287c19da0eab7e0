"""The neuron cache of LLM in a Flash (2312.11514, 3.3): one preallocated matrix a layer, a row a neuron record.

A row holds gate row, up row and down column of a neuron, so that one read brings all of it. What a token adds is read
into rows that are free or that others leave. The order of neurons in the matrix does not matter, because those of a
token are computed on by a list of where they stand, in the order of their ids; none is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from ..device import Device, allocate, give_back, let_go_of_code, release_free_memory
from ..kernels import Kernels
from ..kernels.jobs import STATE_NEW
from ..kernels.listed import Listed
from ..kernels.native import NumbaKernels
from ..recorder import Recorder
from ..store.flash import FlashStore, Ticket
from .fetch import Fetch, Guess
from .flights import Asked, Flights
from .pinned import Block, Tracing, record
from .settling import CompiledSettler, PlainSettler, Settler
from .slots import NeuronFile, Slots, shares
from .window import NeuronPolicy, worth_of

NOTHING = np.empty(0, np.int64)
LEAST_MISSED = 48  # of a layer's neurons: to wait for fewer takes less time than to guess them


class NeuronCache:
    """Neurons of all layers that have records. `fetch` brings those that a token needs, and keeps what the policy says.

    `block` neurons at most are handed out at once, so that a token that needs more than all slots hold still runs. As
    many as `guesses` of what a layer is thought to need are read ahead. The policy hears of none of them, so that hits,
    and what stays, do not depend on them.
    """

    def __init__(
        self,
        store: FlashStore,
        device: Device,
        recorder: Recorder,
        files: Mapping[int, NeuronFile],
        policies: Mapping[int, NeuronPolicy],
        block: int,
        guesses: int = 0,
        late: Mapping[int, int] | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        self.store, self.device, self.recorder, self.block = store, device, recorder, block
        late = late or dict.fromkeys(files, 0)
        early = {layer: policies[layer].capacity - late[layer] for layer in files}
        self._early, self._late = (
            allocate(sum(slots[layer] * file.width for layer, file in files.items())) for slots in (early, late)
        )
        rows, more = (shares(memory, files, slots) for memory, slots in ((self._early, early), (self._late, late)))
        self.layers = {layer: Slots(file, policies[layer], rows[layer], more[layer]) for layer, file in files.items()}
        self._whole = True  # are the late slots ours
        self.trace: Tracing | None = None
        width = max(file.width for file in files.values())
        count = max(file.count for file in files.values())
        self.settler: Settler = (
            CompiledSettler(kernels, block, width, count)
            if isinstance(kernels, NumbaKernels)
            else PlainSettler(block, width)
        )
        self.guesses = guesses
        self._staging = allocate(guesses * width) if guesses else np.empty(0, np.uint8)
        self._read: Ticket | None = None  # the last into it
        self._guess: Guess | None = None
        self._fetch: Fetch | None = None  # the last
        self._missed = dict.fromkeys(files, 0)  # what the last token missed of each layer
        self.flights: Flights | None = None  # for demands that programs make
        if isinstance(self.settler, CompiledSettler) and device.is_host and (aio := store.reader.lend()) is not None:
            self.flights = Flights(store, aio, recorder, self.settler, count, guesses, self._staging)
        self._open: tuple[Slots, Asked] | None = None  # of a program that may be under way

    @property
    def nbytes(self) -> int:
        """All buffers: slots, and what is on its way."""
        return sum(buffer.nbytes for buffer in (*self.settler.passing, self._staging, self._early, self._late))

    @property
    def room(self) -> dict[int, int]:
        """Slots by layer."""
        return {index: sum(len(part) for part in layer.memory) for index, layer in self.layers.items()}

    @property
    def prompt_room(self) -> dict[int, int]:
        """Slots by layer while a prompt is under way."""
        return {index: len(layer.memory[0]) for index, layer in self.layers.items()}

    def have(self, late: bool) -> bool:
        """Whether the late slots are ours from now on, or a prompt's; returns whether that is a change."""
        self._abandon()
        if late == self._whole or not len(self._late):
            return False
        self._whole = late
        for layer in self.layers.values():
            if late:
                layer.have_back()
            else:
                layer.give_up()
        if late:
            release_free_memory()  # what the prompt was computed in, and with
            let_go_of_code()
        else:
            give_back(self._late)
        return True

    def read(self, file: NeuronFile, ids: np.ndarray, addresses: np.ndarray, memory: tuple[np.ndarray, ...]) -> Ticket:
        """Begin to read records `ids`, ascending, to `addresses`, which stand in rows of `memory`."""
        return self.store.read_records(file.path, file.base, file.width, ids, addresses, memory, "neuron")

    def fetch(self, index: int, ids: np.ndarray, scores: np.ndarray | None = None) -> Fetch:
        """Start bringing neurons `ids` (ascending) of a layer in; the result hands them out in that order. `scores`,
        float32 [count], say how nearly the others were asked for.

        One that is not iterated to its end, because of an error or because the user wants no more, is cleared away
        before anything else.
        """
        self._abandon()
        layer = self.layers[index]
        record(self.trace, "decode", index, ids, scores)
        guess = self._take_guess(index)
        guessed, rows = (NOTHING, 0) if guess is None else (guess.ids, guess.rows.ctypes.data)
        settled = self.settler.settle(layer, ids, guessed, rows, scores)
        if guess is not None:
            self.recorder.neuron_guess(len(guess.ids), settled.right, layer.file.width)
        self._missed[index] = settled.missed
        self.recorder.cache(len(ids) - settled.missed, settled.missed)
        self._fetch = Fetch(self, layer, settled, guess)
        return self._fetch

    # ---- by a program
    def prepare(self, index: int, asked: Asked) -> bool:
        """A program with the layer's jobs (`Flights.sheet`) runs next; False where it may not."""
        self._abandon()
        if self.flights is None or not self.flights.prepare(self.layers[index], asked):
            return False
        if self._read is not None:  # guessed by calls, to where programs have theirs
            self._take_guess(-1)
            self._read.end()
            self._read = None
        self._open = self.layers[index], asked
        return True

    def finish(self, index: int, asked: Asked) -> Fetch | None:
        """The program has run. What is left to compute where it could not read all, which then is read anew; else
        None."""
        assert self.flights is not None
        layer = self.layers[index]
        count, missed, whole = self.flights.finish(layer)
        record(self.trace, "decode", index, asked.ids[:count].copy(), asked.scores)
        self._missed[index] = missed
        self.recorder.cache(count - missed, missed)
        self.recorder.neurons(index, count, layer.file.count)
        self._fetch = None if whole else Fetch(self, layer, self.flights.rest(layer, asked), None)
        self._open = None
        return self._fetch

    def _abandon(self) -> None:
        if self._open is not None and self.flights is not None:  # interrupted
            layer, asked = self._open
            self._open = None
            left = self.flights.rest(layer, asked)
            self.flights.book(layer.file.width)
            layer.release(left.ids[(left.states & STATE_NEW) > 0])
        if self._fetch is not None:
            self._fetch.abandon()
            self._fetch = None

    # ---- ahead of need
    def worth(self, index: int) -> bool:
        """Does a guess of layer `index` pay: by what the last token missed there."""
        return self.guesses > 0 and self._missed[index] >= LEAST_MISSED

    def guess(self, index: int, scores: np.ndarray) -> None:
        """Layer `index` will be asked for about the neurons of scores [count] above zero next: read those that are not
        here, and of more than there is room for the ones with the highest scores, which are the surest."""
        if self.guesses:
            self.guess_ids(index, self.settler.surest(self.layers[index], scores, self.guesses))

    def guess_ids(self, index: int, ids: np.ndarray) -> None:
        """Read neurons that are not here, ascending, at most `guesses`, ahead of a demand of layer `index`."""
        self._take_guess(-1)
        if self.flights is not None:
            self.flights.drain()
        layer, width = self.layers[index], self.layers[index].file.width
        if len(ids):
            if self._read is not None:  # one that came out wrong may still be under way to there
                self._read.wait()
            rows = self._staging[: self.guesses * width].reshape(self.guesses, width)
            addresses = rows.ctypes.data + width * np.arange(len(ids))
            self._read = self.read(layer.file, ids, addresses, (rows,))
            self._guess = Guess(index, ids, rows, self._read)

    def settle(self) -> None:
        """Wait for what is read ahead, so that all of it is counted."""
        self._take_guess(-1)
        if self._read is not None:
            self._read.wait()
        if self.flights is not None:
            self.flights.drain()
            self.flights.book(max(layer.file.width for layer in self.layers.values()))

    def _take_guess(self, index: int) -> Guess | None:
        """The guess if it is of this layer; any other was for nothing."""
        guess, self._guess = self._guess, None
        if guess is None:
            return None
        if guess.index == index:
            if not guess.ticket.ready:
                self.store.promote(guess.ticket)
            return guess
        guess.ticket.wait()
        self.recorder.neuron_guess(len(guess.ids), 0, self.layers[guess.index].file.width)
        return None

    # ---- a prompt
    def warm(self, index: int, tokens: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> None:
        """Tokens of a prompt needed these (ascending, with scores as in `fetch`): make room for what will be needed."""
        layer = self.layers[index]
        for ids, scores in tokens:
            record(self.trace, "prefill", index, ids, scores)
            if scores is not None:
                layer.policy.expect(worth_of(scores))
            layer.policy.demand(ids, counted=False)
        layer.release(np.flatnonzero(~layer.policy.held))

    def fill(self, index: int, start: int, records: torch.Tensor) -> None:
        """Records [start, start + n) of a layer pass by, uint8 [n, width]: keep those that the policy wants here."""
        layer = self.layers[index]
        here = slice(start, start + len(records))
        wanted = np.flatnonzero(layer.policy.held[here] & (layer.slot[here] < 0))
        taken = layer.take(start + wanted)
        try:
            layer.put(taken, records.numpy()[taken - start])
        except BaseException:
            layer.release(taken)
            raise

    def here(self, index: int, ids: np.ndarray) -> Iterator[Block]:
        """Those of neurons `ids` that are in memory, as `fetch` hands them out. Reads nothing, and nothing is noted."""
        layer = self.layers[index]
        ids = ids[layer.slot[ids] >= 0]
        for first in range(0, len(ids), self.block):
            block = ids[first : first + self.block]
            yield block, self.hand_out(Listed(layer.address(layer.slot[block]), layer.file.width, layer.memory))

    def hand_out(self, records: Listed) -> Listed | torch.Tensor:
        """Where kernels find them: on the host where they stand, on a card as copies."""
        return records if self.device.is_host else self.device.put(records.gather())
