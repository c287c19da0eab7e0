"""Neurons in the order of what fires together: the chain, and bundles written in it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sparse_bundle import decoded

import flashinfer_cli as fc
from flashinfer_cli.bundles.order import chain, runs
from flashinfer_cli.bundles.reorder import reorder
from flashinfer_cli.bundles.sparsity import (
    ORDER_FILE,
    PREDICTORS_FILE,
    SPARSITY_FILE,
    LayerSparsity,
    Sparsity,
    manifest_digest,
    sparsity_json,
)
from flashinfer_cli.bundles.verify import verify_bundle
from flashinfer_cli.errors import BundleError
from flashinfer_cli.models.open import open_model


def test_the_chain_puts_together_what_fires_together():
    random = np.random.default_rng(3)
    groups = random.permutation(64).reshape(8, 8)  # eight groups of eight, scattered; the last never fires
    tokens = [np.sort(groups[random.integers(7)]) for _ in range(100)]
    order = chain(tokens, 64)
    assert sorted(order) == list(range(64)) and order[56:].tolist() == sorted(groups[7])
    place = np.empty(64, int)
    place[order] = np.arange(64)
    before, after = (sum(runs(np.sort(ids), 0) for ids in tokens) for tokens in (tokens, [place[t] for t in tokens]))
    assert after == len(tokens) < before / 3  # a run a token


def test_a_reordered_bundle_is_the_same_model(sparse_bundle, tmp_path):
    copy, opened = tmp_path / "b", open_model(sparse_bundle)
    with pytest.raises(BundleError, match="not known"):
        reorder(sparse_bundle, tmp_path / "no")
    shutil.copytree(sparse_bundle, copy)
    random = np.random.default_rng(0)
    orders = {str(layer): torch.from_numpy(random.permutation(160).astype(np.int32)) for layer in range(3)}
    save_file(orders, copy / ORDER_FILE)
    with pytest.raises(BundleError, match="exists"):
        reorder(copy, copy)
    made = reorder(copy, tmp_path / "made")
    assert not verify_bundle(made) and open_model(made).weight_bytes == opened.weight_bytes
    for options in ({"exact": True}, {}, {"stream": "always"}):
        want, _ = decoded(copy, **options)
        got, _ = decoded(made, **options)
        assert (got - want).abs().max() < 1e-4 and not torch.equal(got, want)
    with pytest.raises(BundleError, match="already"):
        reorder(made, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "made"]
    save_file({**orders, "1": torch.zeros(160, dtype=torch.int32)}, copy / ORDER_FILE)
    with pytest.raises(BundleError, match="not of this"):
        reorder(copy, tmp_path / "no")


def test_biases_move_with_their_neurons(tiny, tmp_path):
    path = tiny("opt", 0)[0]
    out = fc.bundle(path, tmp_path / "b")
    counts = {layer: found.count for layer, found in open_model(out).checkpoint.records.items()}
    random = np.random.default_rng(0)
    tensors = {}
    for layer, count in counts.items():
        d = open_model(out).config.hidden_size
        parts = {"a": torch.randn(4, d).half(), "b": torch.randn(count, 4).half(), "bias": torch.randn(count)}
        tensors |= {f"layers.{layer}.{name}": value for name, value in parts.items()}
    save_file(tensors, out / PREDICTORS_FILE)
    layers = tuple(LayerSparsity(i, 4, 1, 0.5, 0.5, 0.5, 0.5) for i in counts)
    quality = {"perplexity": 2.0, "dense_perplexity": 1.0, "top1_agreement": 0.5}
    (out / SPARSITY_FILE).write_bytes(sparsity_json(Sparsity(manifest_digest(out), 100, layers, quality)))
    orders = {str(i): torch.from_numpy(random.permutation(n).astype(np.int32)) for i, n in counts.items()}
    save_file(orders, out / ORDER_FILE)
    made = reorder(out, tmp_path / "made")
    for options in ({"exact": True}, {}):
        assert (decoded(made, **options)[0] - decoded(out, **options)[0]).abs().max() < 1e-4
