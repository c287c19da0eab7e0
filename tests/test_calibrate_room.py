"""What a calibration says that it takes, beside what it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_calibrate import TEXT, make

import flashinfer_cli as fc
from flashinfer_cli.apps.calibrate import calibrate
from flashinfer_cli.apps.evaluate import log_probs, windows
from flashinfer_cli.apps.quality import SEQUENCE, Demands
from flashinfer_cli.bundles.order import chain
from flashinfer_cli.bundles.sparsity import ORDER_FILE
from flashinfer_cli.config import RunConfig
from flashinfer_cli.training.shape import Shape

# In a process of its own: what others left in this one's heap would hide what is taken. It is refused twice, since
# what a first call imports and opens is not given back.
CHILD = """
import json, sys
from pathlib import Path
from flashinfer_cli import device
from flashinfer_cli.config import RunConfig
from flashinfer_cli.errors import BudgetError

bundle, tokens, text = Path(sys.argv[1]), int(sys.argv[2]), sys.stdin.read()
LEARN

def written():
    return sorted(str(path) for path in bundle.parent.rglob("*"))

before, least = written(), 0
for _ in range(2):
    try:
        learn(RunConfig(memory=max(1 << 20, 3 * least // 4), threads=1))
    except BudgetError as error:
        least, says = error.least, [str(error), error.hint]
same, process = written() == before, device.resident_bytes()
found = learn(RunConfig(memory=least + (8 << 20), threads=1))
peak = device.peak_bytes()
print(json.dumps(dict(least=least, says=says, same=same, process=process, found=found, peak=peak)))
"""
NEURONS = """
from flashinfer_cli.apps import calibrate as app, predictors
predictors.GOOD_ENOUGH, predictors.EPOCHS = 0, 1  # every layer is trained, which takes most
def learn(run):
    return len(app.calibrate(bundle, text, run, tokens=tokens, evaluate_tokens=20).layers)
"""
GATED = """
from functools import partial
from flashinfer_cli.apps import gated
gated.DENSITIES, gated.measure = (0.5,), partial(gated.measure, seconds=0.05)
def learn(run):
    return len(gated.study(bundle, text, run, tokens=tokens, test_tokens=128).ways)
"""
EXPERTS = """
from flashinfer_cli.apps.ahead import calibrate_ahead
def learn(run):
    return len(calibrate_ahead(bundle, text, run, tokens=tokens).pairs)
"""
# Shapes in which most of it is what is learned, so that half of the estimate would not do; tokens; how much is found.
KINDS: dict[str, tuple[str, str, dict[str, int], int, int]] = {
    "neurons": (NEURONS, "relu", {"intermediate_size": 8192, "num_hidden_layers": 1}, 7_000, 1),
    "gated": (GATED, "silu", {"intermediate_size": 8192, "num_hidden_layers": 1}, 4_000, 5),
    "experts": (EXPERTS, "silu", {"hidden_size": 640, "moe_intermediate_size": 32, "num_hidden_layers": 4,
                                  "num_experts": 4}, 8_000, 12),
}  # fmt: skip


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A process for each kind, all begun at once."""
    started = {}
    for kind, (learn, act, sizes, tokens, _) in KINDS.items():
        shape = Shape(vocab_size=300, num_attention_heads=4, **({"hidden_size": 64} | sizes))
        folder = tmp_path_factory.mktemp(kind)
        (folder / "text").write_text(" ".join([TEXT] * 8))
        (folder / "b").mkdir()
        command = [sys.executable, "-c", CHILD.replace("LEARN", learn), make(folder / "b", act, shape), str(tokens)]
        with (folder / "text").open() as text:
            started[kind] = subprocess.Popen(
                command, stdin=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
            )  # fmt: skip
    yield started
    for child in started.values():
        child.kill()
        child.communicate()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are Linux'")
@pytest.mark.parametrize("kind", KINDS)
def test_a_calibration_stays_within_what_it_says_it_takes(
    children: dict[str, subprocess.Popen[str]], kind: str
) -> None:
    tokens, count = KINDS[kind][3:]
    out, errors = children[kind].communicate()
    assert children[kind].returncode == 0, errors
    found = json.loads(out)
    least, peak, process = found["least"], found["peak"], found["process"]
    message, hint = found["says"]
    assert f"too small to calibrate on {tokens:,} tokens" in message
    assert f"--memory {-(-least // (1 << 20))}MiB" in hint
    assert found["same"], "a refusal writes nothing"
    print(f"{peak - process:,} of {least - process:,} bytes")
    assert found["found"] == count and peak <= least
    assert peak - process > (least - process) / 3, "the estimate asks for far more than is taken"


def test_what_a_measured_run_demands_is_taken_down_in_memory_that_was_there_before_it() -> None:
    """A run is planned to take all of its budget: what grows beside it would be too much."""
    layers, count, tokens = 3, 4096, 1100
    tracemalloc.start()
    demands = Demands(dict.fromkeys(range(layers), count), tokens)
    before = tracemalloc.get_traced_memory()[0]
    assert before >= Demands.nbytes(layers, count, tokens) > layers * tokens * count // 8
    demanded = sum(len(window) for window in windows(list(range(tokens)), SEQUENCE))
    assert demanded > tokens  # those where windows meet twice
    for _ in range(demanded):
        for layer in range(layers):
            demands.demand("decode", layer, np.arange(layer, count, 3)[None])
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert after - before < before // 50
    with pytest.raises(IndexError):
        demands.demand("decode", 0, np.arange(3)[None])


def test_the_order_is_of_what_was_demanded(tmp_path: Path) -> None:
    demands, random = Demands({0: 24, 3: 24}, 40), np.random.default_rng(3)
    tokens = {layer: [np.flatnonzero(random.random(24) < 0.3) for _ in range(40)] for layer in (0, 3)}
    for number in range(40):
        for layer in (0, 3):
            demands.demand("prefill", layer, np.arange(24)[None])  # is not counted
            demands.demand("decode", layer, tokens[layer][number][None])
    demands.write_order(tmp_path, None)
    written = load_file(tmp_path / ORDER_FILE)
    assert sorted(written) == ["0", "3"]
    for layer, asked in tokens.items():
        assert all(np.array_equal(mine, other) for mine, other in zip(demands.of(layer), asked, strict=True))
        assert written[str(layer)].tolist() == chain(asked, 24).tolist() != list(range(24))


def test_a_text_of_several_windows_is_measured(tmp_path: Path) -> None:
    found = calibrate(make(tmp_path, "relu"), TEXT, RunConfig(), tokens=1000, evaluate_tokens=SEQUENCE + 20)
    assert found.quality["perplexity"] > 1
    order = load_file(tmp_path / "b" / ORDER_FILE)
    assert all(sorted(neurons.tolist()) == list(range(160)) for neurons in order.values())


def test_what_passes_leave_in_the_heap_is_given_back_after_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would add up, to what nobody has planned."""
    given = []
    monkeypatch.setattr("flashinfer_cli.apps.evaluate.devices.release_free_memory", lambda: given.append(True))
    with fc.load(make(tmp_path, "relu"), context=64) as engine:
        given.clear()
        for number, _ in enumerate(log_probs(engine, list(range(60)), chunk=16)):
            assert len(given) == number
    assert len(given) == 4
