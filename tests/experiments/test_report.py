"""The report: one file that fetches nothing, says everything recorded, and escapes what it says."""

import base64
import re
from html.parser import HTMLParser

import pytest

from bsfast import plotting
from experiments.common.observations import OBSERVATIONS
from experiments.common.record import Run
from experiments.common.report import write_report

VOID = {"meta", "img", "br", "hr"}
SPEED = {
    "what": "M=2",
    "unit": "ms",
    "columns": ["Forward", "Training step"],
    "repeats": 20,
    "rows": [
        {"contestant": "fused", "baseline": False, "values": [[2.0, 1.9, 2.1], [5.0, 4.0, 6.0]]},
        {"contestant": "loop", "baseline": True, "values": [[8.0, 7.0, 9.0], [15.0, 14.0, 16.0]]},
        {"contestant": "other loop", "baseline": True, "values": [[4.0, 3.0, 5.0], [20.0, 19.0, 21.0]]},
    ],
}


class Page(HTMLParser):
    """Check that tags are closed in order, and keep attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.attributes, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.text += text


@pytest.fixture
def run(tmp_path):
    run = Run("classifier", {"seed": 7, "command": "python -m experiments classifier --seed 7"}, root=tmp_path)
    run.figure("one", plotting.covariance_figure, {"matrices": [[[1.0]]]}, 'A "title"', "A <note> & more")
    for index, holds in enumerate([True, False, None, [True, False]]):
        run.claim(
            f"Fig. {index}", "a < b", "<script>alert(1)</script>", holds=holds, observation=index + 1 if index else None
        )
    run.metric("speed", SPEED)
    run.metric("accuracy", 0.71234)
    run.metric("long", list(range(1000)))
    run.finish()
    return run


def test_write_report_fetches_nothing(run, tmp_path):
    page = Page(write_report([run], tmp_path / "new" / "report.html"))
    fetched = [value for _, name, value in page.attributes if name in {"src", "href", "srcset", "action"}]
    assert fetched
    assert all(value.startswith(("data:", "#")) for value in fetched)
    content = (tmp_path / "new" / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(|<script|<link", content)


def test_write_report_inlines_figures(run, tmp_path):
    page = Page(write_report([run], tmp_path / "report.html"))
    (source,) = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert base64.b64decode(source.partition(",")[2]) == (run.folder / "one.png").read_bytes()


def test_write_report_says_and_escapes_everything(run, tmp_path):
    page = Page(write_report([run, Run.load(run.folder)], tmp_path / "report.html"))
    for words in (
        'A "title"',
        "A <note> & more",
        "a < b",
        "<script>alert(1)</script>",
        "✓ holds",
        "✗ contradicted",
        "± mixed",
        "not tested",
        *OBSERVATIONS.values(),
        "No run here tests it.",
        "python -m experiments classifier --seed 7",
        f"python -m experiments report {run.folder}",
        run.versions["cpu"],
        run.versions["torch"],
        "0.7123",
    ):
        assert words in page.text, words
    assert "998, 999" not in page.text


def test_write_report_compares_with_the_fastest_loop_of_each_column(run, tmp_path):
    text = Page(write_report([run], tmp_path / "report.html")).text
    for words in (
        "2 ms 1.9 to 2.1, 2.00\N{MULTIPLICATION SIGN}",
        "5 ms 4 to 6, 3.00\N{MULTIPLICATION SIGN}",
        "8 ms 7 to 9, 0.50\N{MULTIPLICATION SIGN}",
        "4 ms 3 to 5, 1.00\N{MULTIPLICATION SIGN}",
    ):
        assert words in text, words


def test_write_report_says_that_a_run_was_interrupted(tmp_path):
    run = Run("toy", {}, root=tmp_path)
    text = Page(write_report([run], tmp_path / "report.html")).text
    assert "interrupted: this record is not complete" in text
    assert "Speed" not in text


def test_write_report_refuses(tmp_path):
    with pytest.raises(ValueError, match="runs must be at least one run, got none"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="must be a run's folder"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_report_shows_scores_with_mean_and_spread_over_runs(tmp_path):
    runs = [Run("class-transfer", {}, tmp_path) for _ in range(2)]
    for run, value in zip(runs, (0.2, 0.4), strict=True):
        run.metric("scores", {"contestants": {"trained": {"S1": value, "S6": float("nan")}, "PCA": {"S1": 1, "S6": 2}}})
    page = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<th>trained</th><td class="number" data-label="S1">0.3 <small>±0.14</small>' in page
    assert '<th>PCA</th><td class="number" data-label="S1">1 <small>±0</small>' in page
    assert 'data-label="S6">none</td>' in page
    assert "over 2 runs" in page
    alone = write_report(runs[:1], tmp_path / "one.html").read_text(encoding="utf-8")
    assert '<th>trained</th><td class="number" data-label="S1">0.2</td>' in alone
