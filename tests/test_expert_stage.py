"""One token's experts on places that do not move give the bits of `apply_experts`, and of each expert by itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from test_experts_lossless import logits_of, slots
from tiny_models import make

import flashinfer_cli as fc
from flashinfer_cli.cache.experts import ExpertCache, Pieces
from flashinfer_cli.checkpoint.base import FORMATS
from flashinfer_cli.config import MoeConfig
from flashinfer_cli.kernels.native import NumbaKernels
from flashinfer_cli.layers.expert import ExpertPart, apply_expert, apply_experts
from flashinfer_cli.layers.expert_stage import Stage, stage_for
from flashinfer_cli.layers.linear import Mode, Runtime
from flashinfer_cli.layers.moe import MoeFfn


def _stored(fmt: str, rows: int, cols: int) -> np.ndarray:
    values = torch.randn(rows, cols)
    if fmt == "BF16":
        return values.bfloat16().view(torch.uint8).numpy().reshape(-1)
    return quants.quantize(values.numpy(), GGMLQuantizationType[fmt]).reshape(-1)


@pytest.mark.parametrize(("fmt", "act"), [("BF16", "silu"), ("Q8_0", "gelu"), ("Q4_0", "silu")])
def test_a_stage_gives_the_bits_of_its_plain_twin(fmt: str, act: str) -> None:
    """In one call or in two, in any order, wherever an expert stands."""
    torch.manual_seed(3)
    d, ff, count = 96, 192, 5
    kernels = NumbaKernels(2)
    elements, size = FORMATS[fmt]
    nbytes, rows, cols = ff * d // elements * size, (ff, ff, d), (d, d, ff)
    layout = {
        role: ExpertPart(0, i * nbytes, nbytes, rows[i], cols[i], fmt) for i, role in enumerate(("gate", "up", "down"))
    }
    data = [np.concatenate([_stored(fmt, *shape) for shape in zip(rows, cols, strict=True)]) for _ in range(count)]
    pieces = [Pieces([torch.from_numpy(each)]) for each in data]
    x, moe = torch.randn(1, d), MoeConfig(num_experts=count, num_experts_per_tok=count, moe_intermediate_size=ff)
    rt = Runtime(kernels, None, None, Mode())  # type: ignore[arg-type]
    want = apply_experts(x, [layout] * count, pieces, act, moe, rt)
    assert torch.equal(want, torch.cat([apply_expert(x, layout, each, act, moe, rt) for each in pieces]))

    stage = stage_for([layout] * count, act, count, False, kernels)
    assert stage is not None
    stage.x.copy_(x)
    for parts in ([[0, 1, 2, 3, 4]], [[0, 1], [2], [3, 4]], [[4, 3, 2], [1, 0]]):
        stage.out.zero_()
        for at, part in zip(np.cumsum([0, *map(len, parts)]), parts, strict=False):
            starts = [data[i].ctypes.data for i in part]
            stage.compute(int(at), *([start + i * nbytes for start in starts] for i in range(3)))
        assert torch.equal(stage.out, want[[i for part in parts for i in part]])
    kernels.close()


def test_there_is_none_where_a_row_ends_within_a_vector() -> None:
    part = ExpertPart(0, 0, 96 * 32 * 4, 96, 32, "F32")
    layout = {"gate": part, "up": part, "down": replace(part, rows=32, cols=96)}
    kernels = NumbaKernels(1)
    assert stage_for([layout], "silu", 2, False, kernels) is None
    assert (
        stage_for([{role: replace(each, turned=True) for role, each in layout.items()}], "silu", 2, False, kernels)
        is None
    )


@pytest.mark.parametrize(("stay", "transit"), [(12, 1), (3, 2), (1, 1), (2, 4)])
def test_a_model_gives_the_same_logits_with_it_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stay: int, transit: int
) -> None:
    folder, _ = make("qwen3_moe", 0, tmp_path / "m", moe_intermediate_size=64, num_experts=6, num_experts_per_tok=3)
    slots(monkeypatch, stay, transit)
    found = []
    for staged in (True, False):
        with fc.load(folder, context=60, kernels="compiled", threads=2, expert_policy="lru") as engine:
            layers = [block.ffn for block in engine.decoder.blocks if isinstance(block.ffn, MoeFfn)]
            assert layers and all(isinstance(layer.stage, Stage) for layer in layers)
            if not staged:
                engine.decoder.blocks = tuple(
                    replace(block, ffn=replace(block.ffn, stage=None)) if isinstance(block.ffn, MoeFfn) else block
                    for block in engine.decoder.blocks
                )
            found.append(logits_of(engine))
    assert torch.equal(*found)


@pytest.mark.parametrize(("stay", "transit"), [(9, 4), (1, 4)])
def test_guesses_follow_what_is_here_while_the_drive_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stay: int, transit: int
) -> None:
    """Once a layer: behind its first experts where others are on their way, else before any."""
    folder, _ = make("qwen3_moe", 0, tmp_path / "m", moe_intermediate_size=64, num_experts=6, num_experts_per_tok=3)
    slots(monkeypatch, stay, transit)
    events: list[tuple[str, bool]] = []

    def noting(name: str, owner: Any, method: str) -> None:
        plain = getattr(owner, method)

        def call(self: Any, *args: Any) -> Any:
            found = plain(self, *args)
            events.append((name, name == "fetch" and found.busy))
            return found

        monkeypatch.setattr(owner, method, call)

    noting("fetch", ExpertCache, "fetch")
    noting("compute", Stage, "compute")
    noting("guess", MoeFfn, "_guess")
    with fc.load(folder, context=60, kernels="compiled", prefetch_experts=2) as engine:
        session = engine.session()
        session.prefill([5, 9, 7])
        events.clear()
        for token in (11, 30, 2, 44, 17, 23):
            session.step(token)
    layers = "".join(name[0] + ("!" if busy else "") for name, busy in events).split("f")[1:]
    assert len(layers) == 6 * 2 and any(layer[0] == "!" for layer in layers)
    for layer in layers:
        assert re.fullmatch("!cgc+" if layer[0] == "!" else "gc+", layer), layer
