"""The report page: self-contained, escaped, and true to the figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from fake_engine import make_report

from flashinfer_cli.apps.charts import Bar, Column, Mark, Segment, columns, nice_ticks, rows
from flashinfer_cli.apps.html_report import render

VOID = {"meta"}


class Page(HTMLParser):
    """Collects tags and text, and fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(source)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_fetches_nothing():
    source = render(make_report().to_dict())
    page = Page(source)
    assert source.startswith("<!doctype html>")
    assert {"html", "body", "svg", "table"} <= {tag for tag, _ in page.tags}
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not any({"src", "href", "onclick"} & attributes.keys() for _, attributes in page.tags)
    assert "http" not in source and "url(" not in source and "@import" not in source


def test_page_says_the_figures():
    text = Page(render(make_report().to_dict())).text
    for words in (
        "950 MiB",
        "budget 1000 MiB",
        "least 300 MiB",
        "95% of the budget",
        "12 of 80 slices",
        "The drive is busy.",
    ):
        assert words in text, words
    for words in (
        "1.89",
        "tok/s",
        "1.40 GB/s",
        "first step, cold",
        "median of the warm 420 ms",
        "14% asked for",
        "≤4 MiB",
    ):
        assert words in text, words


def test_page_is_the_same_from_json():
    report = make_report().to_dict()
    assert render(json.loads(json.dumps(report))) == render(report)


def test_everything_is_escaped():
    report = make_report().to_dict()
    evil = "</title><script>alert(1)</script>\"'&"
    report["model"] |= {"name": evil, "kind": evil, "model_type": evil, "formats": {evil: 1}}
    for key in ("exactness", "device", "kernels", "direct_io"):
        report[key] = evil
    report["warnings"] = [evil]
    report["plan"] = [dict(part, part=evil, note=evil) for part in report["plan"]]
    report["io"] = [dict(row, kind=evil) for row in report["io"]]
    page = Page(render(report))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 10


@pytest.mark.parametrize("drive", [True, False])
def test_reports_of_runs_that_did_little(drive):
    report = make_report(decode=0, drive=drive).to_dict()
    report |= {"steps": [], "io": [], "request_sizes": {}, "layers": [], "first_token_seconds": None, "wasted_bytes": 0}
    for phase in ("load", "prefill", "decode"):
        report[phase] |= dict.fromkeys(("tokens", "passes", "seconds", "read_seconds", "bytes_read", "requests"), 0)
        report[phase]["read_bytes_per_second"] = 0.0
    text = Page(render(report)).text
    assert "Nothing was read" in text and "Decode steps" not in text


def test_one_step_has_no_median():
    report = make_report(decode=1).to_dict()
    text = Page(render(report)).text
    assert "The first step took 900 ms." in text and "median" not in text


# ------------------------------------------------------------------ charts


@pytest.mark.parametrize("top", [1e-9, 0.3, 1, 7, 99, 12345, 3e12])
def test_ticks_are_few_and_reach_the_top(top):
    ticks = nice_ticks(top)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0 and ticks[-2] < top <= ticks[-1] * 1.001
    assert ticks == sorted(ticks)


def test_ticks_of_nothing():
    assert nice_ticks(0) == nice_ticks(float("nan")) == [0.0, 1.0]


def rectangles(svg: str, style: str) -> list[tuple[float, ...]]:
    return [
        tuple(map(float, found))
        for found in re.findall(rf'class="{style}" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', svg)
    ]


def test_columns_stack_in_proportion():
    bars = [Column("a", [Segment(1, "low", ""), Segment(3, "high", "")]), Column("b", [Segment(2, "low", "")])]
    svg = columns(bars, label="x", unit=str, mark=Mark(2, "here"))
    (_, low_y, _, low), (_, _, _, other) = rectangles(svg, "low")
    ((_, high_y, _, high),) = rectangles(svg, "high")
    assert high == pytest.approx(3 * low, abs=0.02) and other == pytest.approx(2 * low, abs=0.02)
    assert high_y + high == pytest.approx(low_y, abs=0.02), "the second stands on the first"


def test_rows_follow_each_other_and_end_at_the_top():
    svg = rows(
        [Bar("a", [Segment(1, "one", ""), Segment(float("nan"), "bad", ""), Segment(1, "two", "")])], label="x", top=4
    )
    ((x, _, width, _),), ((x2, _, width2, _),) = rectangles(svg, "one"), rectangles(svg, "two")
    assert x2 == pytest.approx(x + width, abs=0.02) and width2 == width
    trough = re.search(r'class="trough" x="120" y="4" width="(\d+)"', svg)
    assert trough is not None and width == pytest.approx(int(trough[1]) / 4, abs=0.01)
    assert "bad" not in svg
