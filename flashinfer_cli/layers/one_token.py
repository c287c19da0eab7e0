"""A block for one token with as few calls as can be: what stands in memory is one program, what streams stands between.

`Block` computes the same with a call for every operator, which is the plain twin; both give the same bits, so that a
token's do not depend on how many are checked with it, nor on what is pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from weakref import ref

import numpy as np
import torch

from ..cache.flights import Asked
from ..cache.kv import KVCache
from ..kernels.native import NumbaKernels
from ..kernels.program import Program
from .attention import Attention
from .bench import Bench
from .demand import LowRankPredictor, Named
from .linear import Linear, Runtime
from .norm import Norm


class Sparse(Protocol):
    """An FFN of which a predictor names the neurons to compute, and where they come from."""

    @property
    def down_bias(self) -> torch.Tensor | None:
        """float32 [d]."""
        ...

    @property
    def guesses(self) -> bool:
        """Are any read before attention has said the last word."""
        ...

    def worth_guessing(self) -> bool:
        """Is it worth the while now."""
        ...

    @property
    def absent(self) -> tuple[np.ndarray, int]:
        """int64 [count], below zero for neurons that are not in memory; and how many may be read ahead."""
        ...

    def expect_named(self, ids: np.ndarray) -> None:
        """Neurons that are not here, which the predictor is surest of, told the FFN's input without what attention
        adds."""
        ...

    def flight(self, asked: Asked) -> Flight | None:
        """What lets programs fetch neurons by themselves, where they can."""
        ...


class Flight(Protocol):
    """Jobs of a program that fetch a layer's neurons for one token and compute on them."""

    @property
    def guess_ids(self) -> np.ndarray:
        """int64, for those that `begin` reads and one more; at least [count + 1]."""
        ...

    def begin(self, program: Program) -> None:
        """Add to a program: read what its jobs have found so far."""
        ...

    def compute(self, program: Program, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add to a program: out [1, d] = the FFN of x [1, d], for the neurons that its jobs have named."""
        ...

    def prepare(self, rt: Runtime) -> bool:
        """Programs with these jobs run next, for one token; False where they may not."""
        ...

    def finish(self, x: torch.Tensor, out: torch.Tensor, rt: Runtime) -> bool:
        """They have run; whether to the end. Where not, `out` is completed here, and what came after it is left out."""
        ...


def fits(attention: object, rt: Runtime) -> bool:
    """Can a block with this attention be written down as programs."""
    return (
        isinstance(rt.kernels, NumbaKernels)
        and isinstance(attention, Attention)
        and attention.is_plain
        and attention.clip is None
        and not attention.norm_all_heads
        and not attention.grouped
        and (attention.rope is None or not attention.rope.varies)
    )


@dataclass
class OneToken:
    """Attention of a block, its norms and residual, and what its FFN's predictor names, for one token.

    `predictor` is the FFN's, where it has one, and `sparse` that FFN; where programs can fetch its neurons, it is
    computed with the rest.
    """

    attention: Attention
    attn_norm: Norm
    attn_post_norm: Norm | None
    ffn_norm: Norm
    predictor: LowRankPredictor | None
    bench: Bench
    sparse: Sparse | None = None
    ffn_post_norm: Norm | None = None
    _steps: list[Program | Callable[[Runtime], object]] = field(default_factory=list)
    _kv: Callable[[], KVCache | None] = lambda: None  # the cache of keys and values,
    _changes: int = -1  # and the state of what is pinned, that the steps are for
    _hits: int = 0  # slices that programs use
    # what the predictor says of the input without what attention adds; where programs read, the first step too, beside
    # whose first product one thread hands the reads over
    _guess: Program | None = None
    _flight: Flight | None = None
    _barred: bool = False  # the drive does not take a program's reads
    _last: Program | None = None  # what follows the FFN

    def __call__(
        self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [1, d] -> it with what attention adds, and the input of the FFN, both in places that are used again; or
        with what all of the block adds, and None."""
        row = self.bench.row("x", x.shape[1])
        if x is not row:
            row.copy_(x)
        if self._changes != rt.feed.changes or self._kv() is not kv:
            self._write_anew(row, kv, rt)
        self.bench.set(kv.length, self.attention.rope, rope_length)
        if self._hits:
            rt.recorder.cache(self._hits, 0)
        if self._flight is not None and not self._flight.prepare(rt):
            self._barred = True
            self._write_anew(row, kv, rt)
        steps = self._steps
        if self._guess is not None and self.sparse is not None and self.sparse.worth_guessing():
            if self._flight is None:
                self._run(self._guess, rt)
                self.sparse.expect_named(self._ids)
            else:
                steps = [self._guess, *steps[1:]]
        for step in steps:
            if isinstance(step, Program):
                self._run(step, rt)
            else:
                step(rt)
        h = self.bench.row("h", x.shape[1])
        if self._flight is None:
            return row, h
        if not self._flight.finish(h, self.bench.row("f", x.shape[1]), rt):
            assert self._last is not None
            self._run(self._last, rt)
        return row, None

    def _run(self, program: Program, rt: Runtime) -> None:
        with rt.recorder.computing():
            rt.kernels.run(program)  # type: ignore[attr-defined]

    @property
    def flies(self) -> bool:
        """Do its programs fetch neurons, without threads that read."""
        return self._flight is not None

    @property
    def named(self) -> Named:
        """What the predictor said last; its scores until it is asked again."""
        return Named(self._ids, self._scores[0].numpy())

    @property
    def _ids(self) -> np.ndarray:
        assert self.predictor is not None
        return self.bench.ids(len(self.predictor.bias))[: self.bench.found[0]].copy()

    # ---- writing it down
    def _write_anew(self, x: torch.Tensor, kv: KVCache, rt: Runtime) -> None:
        self._steps, self._hits, self._guess, self._flight, self._last = [], 0, None, None, None
        self._write(x, kv, rt)
        self._kv, self._changes = ref(kv), rt.feed.changes

    def _write(self, x: torch.Tensor, kv: KVCache, rt: Runtime) -> None:
        attention, bench, d = self.attention, self.bench, x.shape[1]
        hd, heads, kv_heads = attention.head_dim, attention.heads, attention.kv_heads
        keys, values = kv.keys[attention.layer], kv.values[attention.layer]
        h, out = bench.row("h", d), bench.row("out", d)
        if self.sparse is not None and self.predictor is not None:
            count = len(self.predictor.bias)
            asked = Asked(bench.ids(count), bench.found, self._scores[0].numpy())
            self._flight = None if self._barred else self.sparse.flight(asked)
            if self.sparse.guesses:
                self._predict(x, h, rt)
                self._guess, bias, (slot, most) = self._program(rt), self.predictor.bias, self.sparse.absent
                ids = asked.ids if self._flight is None else self._flight.guess_ids[: count + 1]
                self._guess.surest(self._scores, bias, slot, most, ids, bench.found, bench.ids(2 * count))
                if self._flight is not None:
                    self._flight.begin(self._guess)
                self._steps.clear()
        self._norm(self.attn_norm, x, h, rt)
        widths = heads * hd, kv_heads * hd, kv_heads * hd
        joint = bench.row("qkv", sum(widths))
        q, k, v = (part[0].view(-1, hd) for part in joint.split(widths, 1))
        place = 0
        for projection in attention.projections:
            self._linear(projection, h, joint[:, place : place + projection.rows], rt)
            place += projection.rows
        for norm, heads_of in ((attention.q_norm, q), (attention.k_norm, k)):
            if norm is not None:
                self._norm(norm, heads_of, heads_of, rt)
        program, rope = self._program(rt), attention.rope
        turn = None if rope is None else bench.turn(rope)
        program.rotate(q, k, v, keys, values, turn, rope is not None and rope.config.interleaved, bench.held)
        mixed = bench.row("mixed", heads * hd)
        program.attend(q, keys, values, attention.scale, attention.window, mixed[0].view(-1, hd), bench.held)
        self._linear(attention.out, mixed, out, rt)
        if self.attn_post_norm is not None:
            self._norm(self.attn_post_norm, out, out, rt)
        self._program(rt).add(x, out)
        self._predict(x, h, rt)
        if self.predictor is not None:
            scores, count = self._scores, len(self.predictor.bias)
            self._program(rt).above_zero(scores, self.predictor.bias, bench.ids(count), bench.found)
        if self._flight is not None:
            f, steps = bench.row("f", d), self._steps
            self._flight.compute(self._program(rt), h, f)
            self._add_ffn(x, f, rt)
            self._steps = []
            self._add_ffn(x, f, rt)  # once more, by itself
            self._last, self._steps = self._program(rt), steps
            if self._guess is not None:
                assert isinstance(steps[0], Program)  # it has the norm at least
                self._guess = self._guess.followed_by(steps[0])

    def _add_ffn(self, x: torch.Tensor, f: torch.Tensor, rt: Runtime) -> None:
        if self.sparse is not None and self.sparse.down_bias is not None:
            self._program(rt).add(f, self.sparse.down_bias)
        if self.ffn_post_norm is not None:
            self._norm(self.ffn_post_norm, f, f, rt)
        self._program(rt).add(x, f)

    @property
    def _scores(self) -> torch.Tensor:
        assert self.predictor is not None
        return self.bench.row("scores", len(self.predictor.bias))

    def _predict(self, x: torch.Tensor, h: torch.Tensor, rt: Runtime) -> None:
        """h is the FFN's input from x; scores what its predictor says of it, but for the bias."""
        self._norm(self.ffn_norm, x, h, rt)
        if self.predictor is not None:
            a, b, program = self.predictor.a, self.predictor.b, self._program(rt)
            low = self.bench.row("low", len(a.rows))
            program.linear(h, a.rows, a.format, low, 0)
            program.linear(low, b.rows, b.format, self._scores, 0)

    def _program(self, rt: Runtime) -> Program:
        """The one that goes on."""
        if not self._steps or not isinstance(self._steps[-1], Program):
            assert isinstance(rt.kernels, NumbaKernels)
            self._steps.append(Program(rt.kernels.threads))
        last = self._steps[-1]
        assert isinstance(last, Program)
        return last

    def _norm(self, norm: Norm, x: torch.Tensor, out: torch.Tensor, rt: Runtime) -> None:
        norm.write(self._program(rt), x, out)

    def _linear(self, linear: Linear, x: torch.Tensor, out: torch.Tensor, rt: Runtime) -> None:
        """In the program where all of it is in memory, else by itself between two."""
        if linear.is_here:
            program = self._program(rt)
            for part in linear.parts:
                assert part.slice.home is not None
                program.linear(x, part.slice.home.view(part.rows, -1), linear.format, out, part.start)
            self._hits += len(linear.parts)
        else:
            self._steps.append(lambda rt: linear(x, rt, out))
            return
        if linear.bias is not None:
            self._program(rt).add(out, linear.bias)
