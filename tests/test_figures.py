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


def test_friends_by_hand() -> None:
    """Of five neurons 0 fires with 1 and 2, and 3 with 0 alone; 4 never does."""
    from benchmarks.friends import Layout, cover, friends, judge, spans
    from flashinfer_cli.apps.replay import run_policy
    from flashinfer_cli.cache.by_layer import policies_by_layer
    from flashinfer_cli.cache.trace import Demand
    from flashinfer_cli.cache.window import make_policy

    tokens = [np.array(ids) for ids in ([0, 1], [0, 1], [0, 2], [0, 3], [1, 2], [1, 2])]
    closest = friends(tokens, 5)
    assert closest.tolist() == [1, 0, 1, 0, 4]
    assert friends(tokens, 5, relative=True).tolist() == [1, 2, 1, 0, 4]
    # 2 and 3 are nobody's friends and bring the others; alone 0 brings 1; a ring of three needs two
    assert cover(np.arange(5), closest).tolist() == [2, 3, 4]
    assert cover(np.array([0, 1]), closest).tolist() in ([0], [1])
    assert len(cover(np.arange(3), np.array([1, 2, 0]))) == 2
    assert cover(np.array([2, 3]), closest).tolist() == [2, 3]
    assert spans(np.array([9, 0, 1, 4]), 4096) == (2, 4096 * 6)  # two between 1 and 4 are read through, four are not
    assert spans(np.array([], np.int64), 4096) == (0, 0)

    def asks(*sets: list[int]) -> list[Demand]:
        return [Demand("decode", 0, np.array([ids])) for ids in sets]

    def count(layout: Layout, *sets: list[int], warm: int = 0):
        return judge(asks(*sets), layout, {0: make_policy("recent", 5, 4, 0)}, [1024], warm)

    plain = count(Layout("plain"), [0, 1], [3], [0], [2, 4])
    assert (plain.asked, plain.missing, plain.records, plain.through, plain.again) == (6, 5, 5, 0, 0)
    assert plain.bytes[1024] == 1024 * (2 + 1 + 3) and plain.reads[1024] == 3  # 2 to 4 with 3 between them
    assert plain.seconds(1024, 1.0, 1024) == 3 + 6
    # one record brings 0 and 1; 3 brings 0 again, 2 brings 1
    beside = Layout("friends", friend={0: closest}, keep=True)
    copies = count(beside, [0, 1], [3], [0], [2])
    assert (copies.records, copies.through, copies.again) == (3, 1, 2) and copies.bytes[1024] == 3 * 2048
    kept, passing = (count(each, [3], [0]) for each in (beside, Layout("in passing", friend={0: closest})))
    assert (kept.missing, kept.through, kept.records) == (1, 1, 1)  # 0 stood there as the friend of 3
    assert (passing.missing, passing.through, passing.records) == (2, 0, 2)
    assert count(beside, [3], [0], warm=1).records == 0
    rng = np.random.default_rng(0)
    many = asks(*(np.sort(rng.choice(5, 2, replace=False)).tolist() for _ in range(40)))
    replayed = run_policy(policies_by_layer("recent", {0: 5}, {0: 3}, 0), many)
    found = judge(many, Layout("plain"), {0: make_policy("recent", 5, 3, 0)}, [1024])
    assert found.missing == replayed.misses() > 0 and found.asked - found.missing == replayed.hits()


def test_a_hot_set_never_goes() -> None:
    from benchmarks.friends import pinned
    from flashinfer_cli.cache.window import Window

    policy = pinned(lambda: Window(6, 3, 2), np.array([5]))
    for ids in ([0, 1], [2, 3], [4], [0]):
        missing, gone = policy.demand(np.array(ids))
        assert missing.tolist() == ids and 5 not in gone and policy.held[5]
    assert policy.demand(np.array([4, 5]))[0].tolist() == [] and policy.hits == 2


def test_all_that_is_resident_gives_what_fires() -> None:
    """The list gives the named neurons' sum, all that is in memory besides what fires unnamed, in both formats."""
    from benchmarks.flash_resident import TIMES, compared, laid_out
    from flashinfer_cli.kernels import select

    kernels = select("cpu")[0]
    for fmt, gated in (("F16", False), ("Q8_G128", True)):
        _, layers, firing = laid_out(fmt, gated, 128, 20, 0.25, 1)
        assert len(firing) == 25 and len(layers[0].records) == TIMES[-1] * 20
        assert (layers[0].records[layers[0].named][:, None] == firing[:20].numpy()).all(2).any(1).all()
        row = compared(kernels, fmt, gated, 128, 20, 0.25, 1, 1)
        assert max(row["off"].values()) < 1e-5 and row["over_active"]["active"] == 1


def test_packaged_stories_are_learned_from_or_held_out() -> None:
    """`benchmarks.papers experts` without arguments teaches a bundle on some of them, and feeds it the others."""
    from benchmarks.experts import held_out, parted

    learned, held = parted([zoo.HELD_OUT])
    assert not {*learned} & {*held} and min(len(learned), len(held)) > 80
    engine = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda story: [held.index(story)] * 11))
    fed = list(held_out(engine, [zoo.HELD_OUT], 200))
    assert sum(len(ids) - 1 for ids in fed) == 200 and len({ids[0] for ids in fed}) == 20
