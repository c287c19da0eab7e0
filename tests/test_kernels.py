"""Kernels against gguf.quants and float64 products: every format, many and few tokens, odd sizes, unaligned weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from half_code import halves_by
from stored_weights import close, cols_of, unaligned, weights

from flashinfer_cli.checkpoint.base import FORMATS, PLAIN
from flashinfer_cli.kernels import Kernels, jobs, select
from flashinfer_cli.kernels.activations import ACTIVATIONS
from flashinfer_cli.kernels.jobs import ACTS, BLOCK_COLS, BLOCK_TOKENS, BLOCKS, DIRECT_BLOCKS
from flashinfer_cli.kernels.listed import Listed

TOKENS = (1, 2, 5, 16, 17, 40)


@pytest.mark.parametrize("fmt", [*PLAIN, *BLOCKS])
def test_linear_equals_float64_product(kernels: Kernels, fmt: str) -> None:
    rows, cols = 37, cols_of(fmt)
    stored, values = weights(fmt, rows, cols)
    for tokens in TOKENS:
        x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))
        out = torch.full((tokens, rows + 8), 7.0)
        kernels.linear(x, stored, fmt, out, 3)
        wide = x.double().numpy()
        close(out[:, 3 : 3 + rows], wide @ values.T.astype(np.float64), np.abs(wide) @ np.abs(values.T))
        assert (out[:, :3] == 7).all() and (out[:, 3 + rows :] == 7).all()


@pytest.mark.parametrize("fmt", [*PLAIN, *BLOCKS])
def test_dequantize_equals_gguf(kernels: Kernels, fmt: str) -> None:
    stored, values = weights(fmt, 11, cols_of(fmt), seed=1)
    got = kernels.dequantize(stored, fmt, cols_of(fmt))
    assert got.dtype == torch.float32 and got.shape == values.shape
    np.testing.assert_allclose(got.numpy(), values, rtol=1e-6, atol=1e-6 if fmt in BLOCKS else 0)


@pytest.mark.parametrize("fmt", PLAIN)
@pytest.mark.parametrize("cols", [1, 31, 32, 33, 64, 97])
def test_every_tail_length(numba: Kernels, fmt: str, cols: int) -> None:
    stored, values = weights(fmt, 5, cols)
    for tokens in (1, 5):
        x, out = torch.ones(tokens, cols), torch.empty(tokens, 5)
        numba.linear(x, stored, fmt, out, 0)
        close(out, values.sum(1, dtype=np.float64)[None], np.abs(values).sum(1)[None])
    assert np.array_equal(numba.dequantize(stored, fmt, cols).numpy(), values)


def test_many_rows_over_both_threads(numba: Kernels) -> None:
    stored, values = weights("BF16", 3001, 160)
    x, out = torch.randn(1, 160), torch.empty(1, 3001)
    for _ in range(50):
        out.fill_(float("nan"))
        numba.linear(x, stored, "BF16", out, 0)
        close(out, x.double().numpy() @ values.T, np.abs(x.numpy()) @ np.abs(values.T))


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16", *DIRECT_BLOCKS, "Q4_K", "Q6_K"])
def test_bits_do_not_depend_on_tokens_threads_or_slices(numba: Kernels, fmt: str) -> None:
    rows, cols = 45, cols_of(fmt)
    stored, _ = weights(fmt, rows, cols)
    x = torch.randn(40, cols)
    single = torch.empty(40, rows)
    for t in range(40):
        numba.linear(x[t : t + 1], stored, fmt, single[t : t + 1], 0)
    for tokens in (2, 3, 4, 5, 6, 7, 8, 11, 16, 17, 40):  # every tile there is
        out = torch.empty(tokens, rows)
        numba.linear(x[:tokens], stored, fmt, out, 0)
        assert torch.equal(out, single[:tokens])
    sliced = torch.empty(8, rows)
    for start in range(0, rows, 7):
        numba.linear(x[:8], stored[start : start + 7], fmt, sliced, start)
    assert torch.equal(sliced, single[:8])
    alone, _ = select("cpu", threads=1)
    out = torch.empty(8, rows)
    alone.linear(x[:8], stored, fmt, out, 0)
    assert torch.equal(out, single[:8])


@pytest.mark.parametrize("fmt", ["F32", "BF16", "Q8_0", "Q8_G128", "Q4_K"])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_blocks_of_columns_and_passes_change_no_bit(
    numba: Kernels, fmt: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tokens go through the columns in blocks, and in passes where they are too large for a cache; a token alone
    does not."""
    rows, cols = 39, blocks * BLOCK_COLS + (0 if fmt in BLOCKS else 21)
    stored, values = weights(fmt, rows, cols)
    tokens = BLOCK_TOKENS + 29
    x, out, single = torch.randn(tokens, cols), torch.empty(tokens, rows + 2), torch.empty(1, rows)
    numba.linear(x, stored, fmt, out, 1)
    close(out[:, 1:-1], x.double().numpy() @ values.T, np.abs(x.numpy()) @ np.abs(values.T))
    for t in (0, 1, BLOCK_TOKENS - 1, BLOCK_TOKENS, tokens - 1):
        numba.linear(x[t : t + 1], stored, fmt, single, 0)
        assert torch.equal(out[t, 1:-1], single[0])
    for limit in (x.nbytes // 2, x.nbytes // 3, 1):
        monkeypatch.setattr(jobs, "PASS_BYTES", limit)
        again = torch.empty_like(out)
        numba.linear(x, stored, fmt, again, 1)
        assert torch.equal(again[:, 1:-1], out[:, 1:-1])


def records_of(fmt: str, n: int, d: int, gated: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Neuron records padded to a multiple of 64 bytes, and their parts as float32 [n, d]."""
    stored, parts = zip(*(weights(fmt, n, d, seed=i) for i in range(2 + gated)), strict=True)
    body = np.concatenate([part.numpy() for part in stored], axis=1)
    padded = np.pad(body, ((0, 0), (0, 64 - body.shape[1] % 64)), constant_values=0xFF)
    return unaligned(padded, FORMATS[fmt][1] if fmt in PLAIN else 2), [torch.from_numpy(part) / 1 for part in parts]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("fmt", "act"),
    [(fmt, act) for fmt in PLAIN for act in sorted(ACTIVATIONS)]
    + [(fmt, act) for fmt in (*DIRECT_BLOCKS, "Q4_K") for act in ("relu", "silu")],
)
def test_ffn_records_equals_torch(kernels: Kernels, fmt: str, act: str, gated: bool) -> None:
    n, d = 45, 67 if fmt in PLAIN else 256
    records, parts = records_of(fmt, n, d, gated)
    generator = torch.Generator().manual_seed(0)
    biases = [torch.randn(n, generator=generator) for _ in range(2)]
    for tokens, bias in ((1, None), (5, (biases[0], biases[1])), (5, (None, biases[1])), (40, (biases[0], biases[1]))):
        x = torch.randn(tokens, d, generator=generator) * 0.2
        before = torch.randn(tokens, d, generator=generator)
        gate_bias, up_bias = bias or (None, None)
        up = x.double() @ parts[-2].T.double() + (0 if up_bias is None else up_bias)
        gate = x.double() @ parts[0].T.double() + (0 if gate_bias is None else gate_bias)
        hidden = ACTIVATIONS[act](gate) * up if gated else ACTIVATIONS[act](up)
        want = before + hidden @ parts[-1].double()
        out = before.clone()
        kernels.ffn_records(x, records, fmt, gated, act, bias, out)
        # one scale for every sum: random K-blocks are much larger than weights are
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4 * max(1.0, want.abs().max().item() / 8))


@pytest.mark.parametrize("fmt", ["BF16", *DIRECT_BLOCKS, "Q4_K"])
@pytest.mark.parametrize("gated", [True, False])
def test_ffn_bits_do_not_depend_on_tokens_or_threads(numba: Kernels, fmt: str, gated: bool) -> None:
    d = 96 if fmt in PLAIN else 256
    records, _ = records_of(fmt, 333, d, gated)
    x = torch.randn(40, d)
    single = torch.zeros(40, d)
    for t in range(40):
        numba.ffn_records(x[t : t + 1], records, fmt, gated, "silu", None, single[t : t + 1])
    alone, _ = select("cpu", threads=1)
    for tokens in (2, 3, 4, 8, 16, 40):
        for chosen in (numba, alone):
            out = torch.zeros(tokens, d)
            chosen.ffn_records(x[:tokens], records, fmt, gated, "silu", None, out)
            assert torch.equal(out, single[:tokens])


@pytest.mark.parametrize("fmt", ["F32", "F16", "BF16", *DIRECT_BLOCKS, "Q4_K", "MXFP4"])
@pytest.mark.parametrize("rows", [1, 7, 333])
def test_listed_matrices_give_the_bits_of_each_by_itself(kernels: Kernels, fmt: str, rows: int) -> None:
    cols = cols_of(fmt)
    several = [weights(fmt, rows, cols, seed)[0] for seed in range(5)]
    for x in (torch.randn(1, cols), torch.randn(5, cols)):
        out, want = torch.zeros(5, rows), torch.zeros(5, rows)
        for index, weight in enumerate(several):
            kernels.linear(x[index % len(x)][None], weight, fmt, want[index : index + 1], 0)
        kernels.linear_listed(x, several, fmt, out)
        assert torch.equal(out, want) and want.any()


@pytest.mark.parametrize("fmt", ["F16", *DIRECT_BLOCKS, "Q4_K"])
@pytest.mark.parametrize("gated", [True, False])
def test_listed_records_give_the_bits_of_records_side_by_side(numba: Kernels, fmt: str, gated: bool) -> None:
    """Wherever they stand: in two buffers, in any order, one of them twice."""
    d = 96 if fmt in PLAIN else 256
    records, _ = records_of(fmt, 333, d, gated)
    width = records.shape[1]
    shuffled = torch.randperm(333)
    homes = records[shuffled[:200]].numpy().copy(), records[shuffled[200:]].numpy().copy()
    place = np.argsort(shuffled.numpy())
    wanted = np.append(np.flatnonzero(np.arange(333) % 3 > 0), 4)
    addresses = np.where(
        place < 200, homes[0].ctypes.data + place * width, homes[1].ctypes.data + (place - 200) * width
    )
    listed = Listed(np.ascontiguousarray(addresses[wanted]), width, homes)
    assert torch.equal(listed.gather(), records[wanted])
    for tokens in (1, 2, 3, 5):
        x, out, want = torch.randn(tokens, d), torch.zeros(tokens, d), torch.zeros(tokens, d)
        bias = None, torch.randn(len(wanted))
        numba.ffn_records(x, records[wanted].contiguous(), fmt, gated, "relu2", bias, want)
        numba.ffn_records(x, listed, fmt, gated, "relu2", bias, out)
        assert torch.equal(out, want) and want.any()


def test_ffn_in_several_passes_over_many_tokens(numba: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """More sums than one thread adds up, and than fit at once: the bits stay those of single tokens."""
    records, parts = records_of("BF16", 100, 1024, True)
    x = torch.randn(41, 1024) * 0.2
    single = torch.zeros(41, 1024)
    for t in range(41):
        numba.ffn_records(x[t : t + 1], records, "BF16", True, "silu", None, single[t : t + 1])
    gate, up, down = (part.double() for part in parts)
    want = (torch.nn.functional.silu(x.double() @ gate.T) * (x.double() @ up.T)) @ down
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=1e-3)
    for limit in (jobs.SUMS_BYTES, 1 << 18, 1):
        monkeypatch.setattr(jobs, "SUMS_BYTES", limit)
        out = torch.zeros(41, 1024)
        numba.ffn_records(x, records, "BF16", True, "silu", None, out)
        assert torch.equal(out, single)


def test_activations_of_infinities_and_nan(numba: Kernels) -> None:
    """One neuron, down = 1: what comes out is the activation itself."""
    records = torch.tensor([[1.0, 1.0]]).view(torch.uint8)
    for act in sorted(ACTS):
        for value in (0.0, -1e4, 1e4, float("-inf"), float("nan")):
            if act.startswith("gelu") and value == float("-inf"):
                continue  # -inf * 0: torch's own kernels differ by the length of the tensor
            out = torch.zeros(1, 1)
            numba.ffn_records(torch.tensor([[value]]), records, "F32", False, act, None, out)
            want = ACTIVATIONS[act](torch.tensor([[value]], dtype=torch.float64)).float()
            if act in ("silu",) and value == float("-inf"):
                want = out  # the limit is 0, -inf * 0 is NaN; both are in use
            torch.testing.assert_close(out, want, equal_nan=True, rtol=1e-5, atol=0)


@pytest.mark.parametrize("native", [True, False])
def test_half_conversion_is_exact_with_and_without_the_processors_help(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = halves_by(native, monkeypatch, lambda source, target: target.store(0, source.half(0, 16)))
    halves = np.arange(1 << 16, dtype=np.uint16)
    got = np.empty(1 << 16, np.float32)
    for i in range(0, 1 << 16, 16):
        convert(halves.ctypes.data + 2 * i, got.ctypes.data + 4 * i)
    np.testing.assert_array_equal(got, halves.view(np.float16).astype(np.float32))
