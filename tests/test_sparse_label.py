"""What a sparse run is labelled: with the quality that calibration measured, wherever the label stands."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import make_report
from sparse_bundle import decoded

from flashinfer_cli.apps.evaluate import evaluate
from flashinfer_cli.apps.html_report import render
from flashinfer_cli.apps.inspect import inspect_model
from flashinfer_cli.bundles.sparsity import SPARSITY_FILE, read_sparsity
from flashinfer_cli.cli.main import run
from flashinfer_cli.cli.report_tables import report_tables
from flashinfer_cli.cli.tables import Table, evaluation_table, inspect_tables
from flashinfer_cli.config import RunConfig
from flashinfer_cli.errors import BundleError
from flashinfer_cli.report import label

QUALITY = {"perplexity": 5.001, "dense_perplexity": 5.0, "top1_agreement": 0.994}
LABEL = "sparse (+0.02% perplexity, 99.4% the same first choice)"
Edit = Callable[[dict], None]


@pytest.fixture
def edited(sparse_bundle: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the bundle whose sparsity.json was changed."""

    def make(edit: Edit) -> Path:
        copy = Path(shutil.copytree(sparse_bundle, tmp_path / "b", dirs_exist_ok=True))
        body = json.loads((copy / SPARSITY_FILE).read_text())
        edit(body)
        (copy / SPARSITY_FILE).write_text(json.dumps(body))
        return copy

    return make


def says(tables: list[Table], word: str) -> list[str]:
    return [row[1] for table in tables for row in table.rows if row[0] == word]


def test_every_form_of_a_report_says_the_quality(edited):
    _, report = decoded(edited(lambda body: body.update(quality=QUALITY)))
    assert report.quality == {**QUALITY, "perplexity_increase": pytest.approx(0.0002)}
    assert report.summary().endswith(f" · {LABEL}")
    found = json.loads(json.dumps(report.to_dict()))
    assert found["exactness"] == "sparse" and found["quality"] == report.quality
    assert says(report_tables(found), "exactness") == [LABEL]
    assert f">{LABEL}</span>" in render(found)


def test_the_label_stands_alone_where_nothing_was_measured(edited, sparse_bundle):
    for edit in (
        lambda body: body.pop("quality"),
        lambda body: body.update(quality={}),
        lambda body: body.update(quality={"perplexity": 5.0}),
        lambda body: body.update(quality={**QUALITY, "perplexity": float("inf")}),
    ):
        _, report = decoded(edited(edit))
        found = report.to_dict()
        assert report.quality is found["quality"] is None and report.summary().endswith(" · sparse")
        assert says(report_tables(found), "exactness") == ["sparse"] and ">sparse</span>" in render(found)
    _, report = decoded(sparse_bundle, exact=True)
    assert report.quality is None and report.summary().endswith(" · exact")


@pytest.mark.parametrize(
    "quality", [{**QUALITY, "perplexity": None}, {**QUALITY, "dense_perplexity": 0}, [1.0], "none"]
)
def test_a_quality_that_is_no_numbers_is_damage(edited, quality):
    with pytest.raises(BundleError, match="damaged"):
        read_sparsity(edited(lambda body: body.update(quality=quality)))


def test_reports_written_before_have_labels_too():
    """Their JSON has no quality."""
    found = make_report().to_dict()
    del found["quality"]
    assert says(report_tables(found), "exactness") == ["exact"] and ">exact</span>" in render(found)
    assert label("degraded", None) == "degraded"


def test_an_evaluation_says_it(edited):
    path, text = edited(lambda body: body.update(quality=QUALITY)), "a cat sat on a mat"
    found = evaluate(str(path), text, RunConfig())
    assert found["quality"]["top1_agreement"] == 0.994 and says([evaluation_table(found)], "exactness") == [LABEL]
    found = evaluate(str(path), text, RunConfig(exact=True))
    assert found["quality"] is None and says([evaluation_table(found)], "exactness") == ["exact"]


def test_generate_ends_with_it(edited, capsys, monkeypatch):
    path = edited(lambda body: body.update(quality=QUALITY))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    argv = ["generate", "-m", str(path), "--raw", "-p", "a cat", "-n", "3", "--ignore-eos", "--stats"]
    assert run(argv) == 0
    assert capsys.readouterr().err.count(LABEL) == 2  # in the table and in the last line
    assert run([*argv, "--exact"]) == 0
    assert capsys.readouterr().err.endswith(" · exact\n")


def test_inspect_says_how_a_calibrated_bundle_runs(edited, capsys):
    def edit(body: dict) -> None:
        body["quality"] = QUALITY
        for layer, (rank, recall, predicted) in enumerate(((8, 0.971, 0.1), (16, 0.984, 0.2), (12, 0.99, 0.06))):
            body["layers"][layer] |= {"rank": rank, "recall": recall, "predicted": predicted, "bytes": 1024}

    path = edited(edit)
    assert run(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exactness"] == "sparse" and found["quality"]["perplexity_increase"] == pytest.approx(0.0002)
    assert found["sparsity"] == {
        "with_exact": "exact", "tokens": 100, "layers": 3, "predictor_bytes": 3072, "rank": [8, 16],
        "recall": [0.971, 0.99], "density": 0.5, "predicted": pytest.approx(0.12),
    }  # fmt: skip
    tables = inspect_tables(found)
    assert says(tables, "kind") == [f"bundle, {LABEL}"]
    assert says(tables, "runs") == ["sparse, and exact with --exact"]
    assert says(tables, "predictors") == ["3 layers, rank 8 to 16, 3.00 KiB"]
    assert says(tables, "recall") == ["97.1% to 99.0% of the neurons that fire, by layer"]
    assert says(tables, "predicted") == ["12.0% of the neurons for a token, where 50.0% fire"]


def test_inspect_of_what_is_not_calibrated(edited):
    plain = edited(lambda body: body.update(manifest="0" * 64))
    found = inspect_model(str(plain))  # as --exact would run it, and why a run without would not
    assert found["exactness"] == "exact" and found["sparsity"] is None and "has changed" in found["sparsity_problem"]
    assert "has changed" in says(inspect_tables(found), "calibration")[0]
    (plain / SPARSITY_FILE).unlink()
    found = inspect_model(str(plain))
    assert found["exactness"] == "exact" and found["sparsity"] is found["quality"] is None
    assert not says(inspect_tables(found), "runs") and says(inspect_tables(found), "kind") == ["bundle, exact"]
