"""A text passed through a model a layer at a time: all its tokens go through one layer before the next is read, so that
memory holds one layer and the tokens' hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..cache.kv import KVCache
from ..engine import Engine
from ..models.decoder import Block
from .quality import Progress

T = TypeVar("T")


def layer_by_layer(
    engine: Engine, parts: Sequence[list[int]], held: Callable[[int, Block], T], progress: Progress | None
) -> Iterator[tuple[int, Block, torch.Tensor, T]]:
    """For every layer its index, its block, what went into its FFN, float32 [N, d], and what `held(index, block)` gave
    while its weights were here.

    `parts` are sequences of N tokens in all, none longer than the engine's context and chunk. The inputs stand in the
    same memory for every layer: copy what is to stay.
    """
    decoder, rt, config = engine.decoder, engine.decoder.rt, engine.config
    kv = one_layers_cache(engine, max(len(part) for part in parts))
    states = [decoder.embedding(torch.tensor(part), rt) * config.embedding_scale for part in parts]
    if decoder.project_in is not None:  # of embeddings that are narrower than the model
        with rt.feed.hold(decoder.project_in.slices):
            states = [decoder.project_in(x, rt) for x in states]
    if decoder.positions is not None:
        first = config.position_offset
        states = [x + decoder.positions[first : first + len(x)] for x in states]
    with torch.inference_mode(False):  # what is learned of them may need gradients
        inputs = torch.empty(sum(len(part) for part in parts), config.hidden_size)
    for index, block in enumerate(decoder.blocks):
        if progress is not None:
            progress(index, len(decoder.blocks), f"calibrating layer {index + 1} of {len(decoder.blocks)}")
        with rt.feed.hold(decoder.slices_of(index)):
            noting = _noting(block, inputs)
            for number, x in enumerate(states):
                kv.trim(0)
                states[number] = noting(x, kv, len(x), rt)
            seen = held(index, block)
        yield index, block, inputs, seen
        del seen


def one_layers_cache(engine: Engine, tokens: int) -> KVCache:
    """Keys and values of one layer, whichever runs: none looks back at another's, so all stand in the same memory."""
    kv = engine.new_cache(tokens)
    for kept in (kv.keys, kv.values):
        kept[:] = kept[:1] * len(kept)
    return kv


def _noting(block: Block, inputs: torch.Tensor) -> Block:
    """The block, with what goes into its FFN noted down in the rows of `inputs` [N, d], one after the other."""
    ffn, place = block.ffn, 0
    if ffn is None:
        return block

    def noting(x: torch.Tensor, rt: Any) -> torch.Tensor:
        nonlocal place
        inputs[place : place + len(x)] = x
        place += len(x)
        return ffn(x, rt)

    return replace(block, ffn=noting)  # type: ignore[arg-type]
