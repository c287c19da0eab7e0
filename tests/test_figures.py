"""The figures of docs/: a seed gives the same table again, and those made in parts are what their runs give."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import flashinfer_cli as fc
from flashinfer_cli import zoo
from flashinfer_cli.apps.calibrate import calibrate
from flashinfer_cli.config import RunConfig
from flashinfer_cli.training.data import END

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks/ is not in a source archive")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Benchmarks are run from the project's folder; they set threads and determinism, which is undone."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def text(tmp_path) -> str:
    held_out = zoo.HELD_OUT.read_text(encoding="utf-8").split(END)[:6]
    learnt = [f"One day Tom saw a red bird number {i}. The bird was happy to see him." for i in range(150)]
    (tmp_path / "stories.txt").write_text(END.join(held_out + learnt), encoding="utf-8")
    return str(tmp_path / "stories.txt")


def rows_of(capsys) -> list[dict]:
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    return [{key: value for key, value in row.items() if key != "ms_a_step"} for row in rows]


def test_a_seed_gives_the_same_table_again(text, capsys):
    from benchmarks import moe_losses

    found = []
    for seed in ("1", "1", "2"):
        moe_losses.main(["--few", "--data", text, "--steps", "3", "--seed", seed])
        found.append(rows_of(capsys))
    assert found[0] == found[1] != found[2]


def test_runs_that_are_kept_are_drawn_and_not_repeated(tmp_path, text, capsys, monkeypatch):
    from benchmarks import gqa

    def again(*_):
        raise AssertionError("this run is kept")

    monkeypatch.setattr(gqa, "uptrained", again)
    kept, drawn = FIGURES / "gqa-zoo.jsonl", tmp_path / "gqa.svg"
    argv = ["--zoo", "stories-moe", "--data", text]
    gqa.main([*argv, "--kept", str(kept), "--figure", str(drawn)])
    assert rows_of(capsys) == [json.loads(line) for line in kept.read_text().splitlines()]
    assert drawn.read_text() == (FIGURES / "gqa-zoo.svg").read_text()
    with pytest.raises(AssertionError, match="kept"):
        gqa.main([*argv, "--kept", str(tmp_path / "none.jsonl")])


def test_kept_rows_are_found_by_all_that_is_said(tmp_path):
    from benchmarks.small_runs import Kept

    path = tmp_path / "kept.jsonl"
    Kept(path).add({"way": "a", "seed": 1, "nats": 2.5})
    kept = Kept(path)
    assert kept.find(way="a", seed=1) == {"way": "a", "seed": 1, "nats": 2.5}
    assert kept.find(way="a", seed=2) is None and kept.find(way="a", steps=3) is None


def test_windows_by_hand(tmp_path: Path) -> None:
    """Two neurons that fire in turns and one that always does; on a model what fires is what its own gate says."""
    from benchmarks import flash_window

    asked = np.zeros((flash_window.SETTLE + 4, 3), bool)
    asked[0::2, 0] = asked[1::2, 1] = asked[:, 2] = True
    assert flash_window.window(asked, 1) == (4, 8)  # of each token one is new, and two were there
    assert flash_window.window(asked, 2) == (0, 12)
    assert flash_window.recent({0: asked}, 3) == 0 < flash_window.recent({0: asked}, 2)
    bundle, stories = fc.bundle(zoo.path_of("stories-relu"), tmp_path / "b"), zoo.HELD_OUT.read_text(encoding="utf-8")
    calibrate(bundle, stories[:12_000], RunConfig(), tokens=1000, evaluate_tokens=100)
    with fc.load(bundle, context=64) as engine:
        ids = engine.tokenizer.encode(stories[20_000:21_000])[:40]
    found = list(flash_window.layers_of(bundle, ids, None))
    assert [layer for layer, _, _ in found] == [0, 1, 2, 3, 4]
    assert all(fired.shape == named.shape == (40, 704) for _, fired, named in found)
    active, hits = (
        sum(int(each.sum()) for each in sets) for sets in zip(*((f, f & n) for _, f, n in found), strict=True)
    )
    assert 0.03 < active / (40 * 5 * 704) < 0.15 and hits > 0.9 * active


def test_packaged_stories_are_learned_from_or_held_out() -> None:
    """`benchmarks.papers experts` without arguments teaches a bundle on some of them, and feeds it the others."""
    from benchmarks.experts import held_out, parted

    learned, held = parted([zoo.HELD_OUT])
    assert not {*learned} & {*held} and min(len(learned), len(held)) > 80
    engine = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda story: [held.index(story)] * 11))
    fed = list(held_out(engine, [zoo.HELD_OUT], 200))
    assert sum(len(ids) - 1 for ids in fed) == 200 and len({ids[0] for ids in fed}) == 20
