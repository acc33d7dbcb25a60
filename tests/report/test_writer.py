"""The report on storage: JSON that comes back, a page that needs nothing else and shows data as text."""

import base64
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cria_dist.errors import DataError
from cria_dist.records import Report, SiteEvidence
from cria_dist.report import html
from cria_dist.report.writer import report_from_json, write_report

VOID = {"meta", "img"}
EVIL = "<script>alert('x')</script>\"><img src=http://evil onerror=x>\x1b\x00\ud800&amp;"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(report: Report, evidence: tuple[SiteEvidence, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert write_report(report, evidence, folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


def strings(value: object) -> Iterator[str]:
    """Every string anywhere in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def test_json_round_trips(report: Report, written: Path) -> None:
    assert report_from_json(written / "report.json") == report


def test_json_is_strict_and_numbers_that_are_not_finite_come_back_as_nan(report: Report, tmp_path: Path) -> None:
    variants = (report.variants[0], replace(report.variants[1], perplexity=math.inf))
    broken = replace(report, variants=variants, loss=((1, math.nan),), config={"x": (math.nan, 1.5)})
    write_report(broken, (), tmp_path)
    content = (tmp_path / "report.json").read_text()
    record = json.loads(content, parse_constant=lambda name: pytest.fail(name))
    assert record["variants"][1]["perplexity"] is None
    assert record["config"] == {"x": [None, 1.5]}
    again = report_from_json(tmp_path / "report.json")
    assert math.isnan(again.variants[1].perplexity)
    assert math.isnan(again.loss[0][1])
    assert again.variants[0] == report.variants[0]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": 99}', '{"schema": 1, "name": "x"}'])
def test_damaged_json_is_a_data_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=re.escape(str(path))):
        report_from_json(path)


def test_nothing_temporary_is_left(written: Path) -> None:
    names = {path.name for path in written.iterdir()}
    assert names == {"report.json", "report.html", "plots"}


def test_page_needs_nothing_else(page: Page) -> None:
    assert "script" not in page.tags
    assert "link" not in page.tags
    sources = [value for _, name, value in page.attributes if name in {"src", "href"}]
    assert len(sources) == 7
    for source in sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_style_loads_nothing(written: Path) -> None:
    content = (written / "report.html").read_text(encoding="utf-8")
    style = content.split("<style>")[1].split("</style>")[0]
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"url\(|@import|http", style)


def test_page_shows_the_result_and_where_it_came_from(report: Report, page: Page) -> None:
    assert "cria removed 11.8 % of the parameters (134.52 M to 118.60 M)" in page.text
    assert "perplexity went from 21.32 to 26.75 (1.25x, recovered)" in page.text
    assert "generation takes 28.2 ms per token instead of 32.0" in page.text
    for expected in (
        *report.protocol,
        *report.digests.values(),
        *report.versions.values(),
        *report.loaders.values(),
        *(answer for one in report.generations[:1] for answer in one.answers.values()),
        report.command,
        '"ratio": 0.2',
        "412.75 (19.4x)",
        "layer-029.mlp",
        "10 min 10 s",
    ):
        assert expected in page.text


def test_data_never_becomes_markup(report: Report, evidence: tuple[SiteEvidence, ...], tmp_path: Path) -> None:
    evil = Report(
        **{
            **{name: getattr(report, name) for name in Report.__slots__},
            "name": EVIL,
            "command": EVIL,
            "config": {EVIL: EVIL},
            "versions": {EVIL: EVIL},
            "digests": {EVIL: EVIL},
            "loaders": {EVIL: EVIL},
            "protocol": (EVIL,),
            "variants": (report.variants[0], replace(report.variants[1], method=EVIL, label=EVIL)),
            "comparison": (replace(report.comparison[0], label=EVIL),),
            "generations": (replace(report.generations[0], prompt=EVIL, answers={EVIL: EVIL}),),
            "stages": (replace(report.stages[0], stage=EVIL),),
        }
    )
    facts = {EVIL: 1.0}
    marked = [replace(one, scores=replace(one.scores, facts=facts)) for one in evidence[:1]]
    clean, dirty = Page(html.render(report, evidence[:1], ())), Page(html.render(evil, marked, ()))
    assert set(dirty.tags) == set(clean.tags)
    assert {(tag, name) for tag, name, _ in dirty.attributes} == {(tag, name) for tag, name, _ in clean.attributes}
    assert dirty.text.count("<script>alert('x')</script>") >= len(
        [text for text in strings(asdict(evil)) if text == EVIL]
    )
    (tmp_path / "page.html").write_text(html.render(evil, marked, ()), encoding="utf-8")


def test_bare_report_has_no_empty_sections(bare_report: Report) -> None:
    page = html.render(bare_report, (), ())
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Result", "How it was measured", "Reproduce it", "Versions", "Digests"]
    assert "(4.30x, pruned)." in page


def test_headline_without_a_pruned_model_says_so(report: Report) -> None:
    assert html.headline(replace(report, variants=report.variants[:1])).startswith("The run measured no pruned model")
