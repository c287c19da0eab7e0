"""A text through a model a layer at a time: what the layers see is what they see in a pass over everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import flashinfer_cli as fc
from flashinfer_cli import engine as engines
from flashinfer_cli.apps import layerwise
from flashinfer_cli.cache.kv import KVCache


@pytest.mark.parametrize("name", ["zoo:stories-relu", "zoo:stories-mod"])
def test_layers_see_what_they_see_in_one_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Sequences of different lengths, with one layer's memory for keys and values."""
    made: list[KVCache] = []

    class Kept(KVCache):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            made.append(self)

    parts = [list(range(5, 25)), list(range(40, 47)), list(range(9, 40))]
    with fc.load(name, context=40) as engine, torch.inference_mode():
        monkeypatch.setattr(engines, "KVCache", Kept)
        blocks = engine.decoder.blocks
        seen = [
            inputs.clone()
            for _, _, inputs, _ in layerwise.layer_by_layer(engine, parts, lambda index, block: None, None)
        ]
        assert len({each.data_ptr() for each in made[0].keys}) == len({each.data_ptr() for each in made[0].values}) == 1

        wanted: list[list[Tensor]] = [[] for _ in blocks]
        for index, block in enumerate(blocks):
            ffn = block.ffn

            def noting(x: Tensor, rt: object, index: int = index, ffn: object = ffn) -> Tensor:
                wanted[index].append(x.clone())
                return ffn(x, rt)  # type: ignore[operator]

            object.__setattr__(block, "ffn", noting)
        for part in parts:
            engine.logits(part)
    for rows, want in zip(seen, wanted, strict=True):
        whole = torch.cat(want)
        assert len(whole) and torch.allclose(rows[: len(whole)], whole, atol=1e-5)
