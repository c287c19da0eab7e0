"""What training reads: batches by their number, documents held out by their text, the n-gram to compare with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flashinfer_cli.training import data
from flashinfer_cli.training.ngram import NGram


def test_a_batch_depends_on_its_number_only():
    stream = np.arange(5000, dtype=np.int32)
    batches = data.Batches(stream, sequence=32, batch=4, seed=3)
    want = batches(17)
    for step in (0, 90, 16):
        batches(step)
    assert torch.equal(batches(17), want) and want.shape == (4, 33)
    assert torch.equal(data.Batches(stream, 32, 4, 3)(17), want)
    assert not torch.equal(data.Batches(stream, 32, 4, 4)(17), want)
    assert (want[:, 1:] - want[:, :-1] == 1).all()


def test_an_epoch_sees_all_of_the_text():
    stream = np.arange(1000, dtype=np.int32)
    batches = data.Batches(stream, sequence=20, batch=1, seed=0)
    seen = torch.cat([batches(step)[:, :-1].flatten() for step in range(batches.per_epoch)])
    assert len(seen.unique()) == len(seen) >= 1000 - 2 * 20


def test_every_token_is_judged_once():
    stream = np.arange(101, dtype=np.int32)
    targets = torch.cat([w[:, 1:].flatten() for w in data.windows_of(stream, 8, 3)])
    assert sorted(targets.tolist()) == list(range(1, 101))


def test_what_is_held_out_depends_on_the_text_alone():
    documents = [f"document {i}" for i in range(400)]
    _, held = data.split(documents)
    train_again, held_again = data.split([*documents[::-1], "another"])
    assert set(held) <= set(held_again) and not set(held) & set(train_again) and 4 < len(held) < 30


@pytest.mark.parametrize("context", [(1, 2, 3), (1, 2, 9), (9, 9, 9), (4, 1, 2)])
def test_the_ngram_is_a_distribution(context):
    """Over the whole vocabulary the probabilities sum to one, behind what was seen and what was not."""
    stream = np.array([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 4, 4, 1, 2, 3, 4] * 3, np.int32)
    model = NGram(stream, 10)
    everything = np.arange(10)
    found = model.probability(np.array([context] * 10), everything)
    assert found.sum() == pytest.approx(1) and (found > 0).all()


def test_the_ngram_learns():
    random = np.random.default_rng(0)
    cycle = np.tile(np.arange(1, 9), 200).astype(np.int32)
    noise = random.integers(1, 9, 40_000).astype(np.int32)
    assert NGram(cycle, 10).nats(cycle[:400]) / 397 < 0.05
    assert NGram(noise, 10).nats(random.integers(1, 9, 400).astype(np.int32)) / 397 == pytest.approx(
        math.log(8), rel=0.1
    )
