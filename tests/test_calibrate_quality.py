"""Calibration goes by what was asked for: perplexity, and whether reading neurons pays."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_calibrate import OPTIONS, TEXT, make

from flashinfer_cli.apps import calibrate as app
from flashinfer_cli.apps import paying
from flashinfer_cli.apps.quality import Demands
from flashinfer_cli.bundles.sparsity import (
    ORDER_FILE,
    PREDICTORS_FILE,
    SPARSITY_FILE,
    LayerSparsity,
    Sparsity,
    read_sparsity,
)
from flashinfer_cli.config import RunConfig
from flashinfer_cli.errors import UnsupportedModelError, UsageError

FILES = (PREDICTORS_FILE, ORDER_FILE, SPARSITY_FILE)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = make(tmp_path_factory.mktemp("relu"), "relu")
    app.calibrate(out, TEXT, RunConfig(), **OPTIONS, recall=0.8, max_increase=1.0)
    return out


@pytest.fixture
def copy(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "b"))


def rising(monkeypatch: pytest.MonkeyPatch, *increases: float) -> None:
    """Measured runs cost so much perplexity, in turns; what they demand is taken down."""
    real, left = app.quality, list(increases)

    def quality(*args, **kwargs):
        return real(*args, **kwargs) | {"perplexity": 10 * (1 + left.pop(0)), "dense_perplexity": 10.0}

    monkeypatch.setattr(app, "quality", quality)


def test_recall_is_raised_until_perplexity_is_as_asked(calibrated, copy, monkeypatch):
    rising(monkeypatch, 0.05, 0.004)
    found = app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, recall=0.8)
    assert found.perplexity_increase == pytest.approx(0.004)
    before, after = (load_file(each / PREDICTORS_FILE) for each in (calibrated, copy))
    for name in before:  # the predictors that were learned, with other thresholds
        assert torch.equal(before[name], after[name]) == (not name.endswith("bias"))
    assert 0.93 < found.recall < 0.99  # 0.8 was asked for, then 0.95
    assert [path.name for path in copy.parent.iterdir()] == ["b"]


def test_a_kill_while_recall_is_raised_forgets_nothing(copy, monkeypatch):
    fitted, real = [], app._fit
    monkeypatch.setattr(app, "_fit", lambda layer, *rest: fitted.append(layer) or real(layer, *rest))
    rising(monkeypatch, 0.05, 0.05, 0.001)
    calls = iter(range(100))

    def progress(done: int, total: int, what: str) -> None:
        if what.startswith("calibrating") and done == 2 and next(calls) == 1:
            raise KeyboardInterrupt  # in the second pass

    with pytest.raises(KeyboardInterrupt):
        app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, recall=0.8, progress=progress)
    assert fitted == [0, 1, 2, 0, 1]
    fitted.clear()
    app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, recall=0.8)
    assert fitted == [2]
    assert [path.name for path in copy.parent.iterdir()] == ["b"]


def test_where_no_recall_will_do_the_bundle_stays_as_it_was(calibrated, copy, monkeypatch):
    rising(monkeypatch, 0.5, 0.4, 0.3, 0.3, 0.3, 0.3)
    with pytest.raises(UnsupportedModelError, match=r"rises by 30.00% even at 9\d.\d\d% recall.*1.00% is the most"):
        app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, recall=0.8)
    assert all((copy / name).read_bytes() == (calibrated / name).read_bytes() for name in FILES)
    fitted = []
    monkeypatch.setattr(app, "_fit", lambda layer, *rest: fitted.append(layer))
    found = app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, recall=0.8, max_increase=0.35)
    assert not fitted and found.perplexity_increase == pytest.approx(0.3)  # nothing had to be learned again


@pytest.mark.parametrize("moment", ["calibrating", "measuring it sparse", "measuring it dense"])
def test_a_calibration_anew_that_is_killed_leaves_the_one_before(calibrated, copy, moment):
    def progress(done: int, total: int, what: str) -> None:
        if what.startswith(moment):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        app.calibrate(copy, TEXT, RunConfig(), **OPTIONS, recall=0.9, progress=progress)
    assert all((copy / name).read_bytes() == (calibrated / name).read_bytes() for name in FILES)
    assert not list(copy.glob("*.tmp"))


def test_one_token_cannot_be_predicted(copy):
    with pytest.raises(UsageError, match="1 tokens held out"):
        app.calibrate(copy, TEXT, RunConfig(), tokens=1000, evaluate_tokens=1)


# ------------------------------------------------------------------ does it pay


def two_layers(rank_bytes: int = 0) -> Sparsity:
    layer = LayerSparsity(0, 2, rank_bytes, 0.1, 0.1, 1.0, 1.0)
    return Sparsity("", 100, (layer, LayerSparsity(**{**vars(layer), "layer": 1})), {})


def test_what_is_missed_is_counted_behind_slots_of_a_share_less_what_predictors_take():
    demands = Demands({0: 8, 1: 8}, 40)
    for token in range(40):
        demands.demand("decode", 0, np.array([[0, 1]]))  # always the same: missed once
        demands.demand("decode", 1, np.array([[token % 4]]))  # in turns: all miss with less than four slots
    records = dict.fromkeys((0, 1), SimpleNamespace(count=8, width_bytes=512))
    found = paying.missed(demands, records, two_layers())
    assert found == {"0.5": pytest.approx((2 + 4) / 40 / 8 / 2), "0.25": pytest.approx((2 + 40) / 40 / 8 / 2)}
    without = paying.missed(demands, records, two_layers(4 * 512))  # the predictor takes as much as four neurons
    assert without == dict.fromkeys(("0.5", "0.25"), pytest.approx((80 + 40) / 40 / 8 / 2))


def test_neurons_pay_where_reading_them_is_faster(copy, monkeypatch):
    asked = []

    def measure_records(path, width, demands):
        asked.append([len(ids) for ids in demands])
        assert path.parent == copy and all((np.diff(ids) > 0).all() for ids in demands)
        return 1e-5 * len(demands[0]) * (1 + len(asked) % 2)  # slower every second time

    monkeypatch.setattr(paying, "measure_records", measure_records)
    monkeypatch.setattr(paying, "measure", lambda *_, **__: SimpleNamespace(bytes_per_second=rate))
    layers = read_sparsity(copy).layers
    found = Sparsity("", 100, layers, {}, {"0.5": 0.1, "0.25": 0.2})
    rate, width = 1e9, 512  # 3 layers of 160 records of 3 x 64 halves, padded to a sector
    half, quarter = paying.readings(copy, found)
    assert asked == [[16, 16]] * 6 + [[32, 32]] * 6
    assert half.plain_seconds == pytest.approx(0.5 * 3 * 160 * width / rate)
    assert quarter.neurons_seconds == pytest.approx(3 * 32e-5) and not half.pays and not quarter.pays
    rate = 1e6
    assert all(reading.pays and reading.to_dict()["pays"] for reading in paying.readings(copy, found))
