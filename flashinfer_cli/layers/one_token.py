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

from ..cache.kv import KVCache
from ..kernels.native import NumbaKernels
from ..kernels.program import Program
from .attention import Attention
from .demand import LowRankPredictor, Named
from .linear import Linear, Runtime
from .norm import Norm
from .rope import Rope


class Expect(Protocol):
    """Who reads neurons before attention has said which."""

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


class Bench:
    """Places that the blocks of a model share: float32 rows by name and width, the position, the neurons named."""

    def __init__(self) -> None:
        self.held = np.zeros(1, np.int64)  # the token's position
        self.found = np.zeros(1, np.int64)  # neurons named
        self._rows: dict[tuple[str, int], torch.Tensor] = {}
        self._ids: dict[int, np.ndarray] = {}
        self._turns: dict[Rope, tuple[tuple[int, int] | None, torch.Tensor, torch.Tensor]] = {}

    def row(self, name: str, width: int) -> torch.Tensor:
        """float32 [1, width], always the same one."""
        if (name, width) not in self._rows:
            with torch.inference_mode(False):
                self._rows[name, width] = torch.zeros(1, width)
        return self._rows[name, width]

    def ids(self, count: int) -> np.ndarray:
        """int64, for so many ids and one more."""
        if count not in self._ids:
            self._ids[count] = np.zeros(count + 1, np.int64)
        return self._ids[count]

    def turn(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the cosines and sines of the position stand."""
        if rope not in self._turns:
            cos, sin = (self.row(f"{name} {len(self._turns)}", rope.rotary_dim // 2)[0] for name in ("cos", "sin"))
            self._turns[rope] = (None, cos, sin)
        return self._turns[rope][1:]

    def set(self, position: int, rope: Rope | None, rope_length: int) -> None:
        """The token stands at `position`."""
        self.held[0] = position
        if rope is not None:
            asked, cos, sin = self._turns[rope]
            if asked != (position, rope_length):
                here = rope.run(position, 1, rope_length)
                cos.copy_(here[0][0])
                sin.copy_(here[1][0])
                self._turns[rope] = ((position, rope_length), cos, sin)


def fits(attention: object, norms: tuple[Norm | None, ...], rt: Runtime) -> bool:
    """Can a block with this attention and these norms be written down as programs."""
    return (
        isinstance(rt.kernels, NumbaKernels)
        and isinstance(attention, Attention)
        and attention.is_plain
        and attention.clip is None
        and not attention.norm_all_heads
        and not attention.grouped
        and (attention.rope is None or not attention.rope.varies)
        and all(norm is None or norm.kind == "rms" for norm in (*norms, attention.q_norm, attention.k_norm))
    )


@dataclass
class OneToken:
    """Attention of a block, its norms and residual, and what its FFN's predictor names, for one token.

    `predictor` is the FFN's, where it has one.
    """

    attention: Attention
    attn_norm: Norm
    attn_post_norm: Norm | None
    ffn_norm: Norm
    predictor: LowRankPredictor | None
    bench: Bench
    expect: Expect | None = None
    _steps: list[Program | Callable[[Runtime], object]] = field(default_factory=list)
    _kv: Callable[[], KVCache | None] = lambda: None  # the cache of keys and values,
    _changes: int = -1  # and the state of what is pinned, that the steps are for
    _hits: int = 0  # slices that programs use
    _guess: Program | None = None  # what the predictor says of the input without what attention adds

    def __call__(
        self, x: torch.Tensor, kv: KVCache, rope_length: int, rt: Runtime
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [1, d] -> it with what attention adds, and the input of the FFN, both in places that are used again."""
        row = self.bench.row("x", x.shape[1])
        if x is not row:
            row.copy_(x)
        if self._changes != rt.feed.changes or self._kv() is not kv:
            self._steps, self._hits = [], 0
            self._write(row, kv, rt)
            self._kv, self._changes = ref(kv), rt.feed.changes
        self.bench.set(kv.length, self.attention.rope, rope_length)
        if self._hits:
            rt.recorder.cache(self._hits, 0)
        if self._guess is not None and self.expect is not None and self.expect.worth_guessing():
            assert self.predictor is not None
            with rt.recorder.computing():
                rt.kernels.run(self._guess)  # type: ignore[attr-defined]
            self.expect.expect_named(self._ids)
        for step in self._steps:
            if isinstance(step, Program):
                with rt.recorder.computing():
                    rt.kernels.run(step)  # type: ignore[attr-defined]
            else:
                step(rt)
        return row, self.bench.row("h", x.shape[1])

    @property
    def named(self) -> Named:
        """What the predictor said last; its scores until it is asked again."""
        return Named(self._ids, self._scores[0].numpy())

    @property
    def _ids(self) -> np.ndarray:
        assert self.predictor is not None
        return self.bench.ids(len(self.predictor.bias))[: self.bench.found[0]].copy()

    # ---- writing it down
    def _write(self, x: torch.Tensor, kv: KVCache, rt: Runtime) -> None:
        attention, bench, d = self.attention, self.bench, x.shape[1]
        hd, heads, kv_heads = attention.head_dim, attention.heads, attention.kv_heads
        keys, values = kv.keys[attention.layer], kv.values[attention.layer]
        h, out = bench.row("h", d), bench.row("out", d)
        if self.expect is not None and self.predictor is not None:
            self._predict(x, h, rt)
            self._guess, bias, (slot, most) = self._program(rt), self.predictor.bias, self.expect.absent
            ids, work = bench.ids(len(bias)), bench.ids(2 * len(bias))
            self._guess.surest(self._scores, bias, slot, most, ids, bench.found, work)
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
        self._program(rt).norm(x, norm.weight, norm.eps, out)

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
