from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nasq.errors import InputError, NasqError
from nasq.report import BitMap, Column, Curve, Fact, LayerBits, Point, ReportData, Search, Stage, Training, render
from nasq.report import render as render_function
from nasq.report.format import duration, quantity, share

from .sample import report

SECTIONS = ["pareto", "bits", "training", "bench", "parity", "explanation", "time", "config", "versions"]
VOID = {"meta", "link", "br", "wbr", "img", "input", "hr", "base", "source", "embed"}
DASH = "\u2013"
HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\u2028&amp;'\""


class Page(HTMLParser):
    """Everything the tests ask about: tags with attributes, text by section, and the content of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.open: list[str] = []
        self.problems: list[str] = []
        self._section = "header"
        self._script = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self._section = str(found["id"])
        if tag == "script":
            self._script = str(found.get("id") or f"script {len(self.scripts)}")
            self.scripts[self._script] = ""
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self.tables[self._section][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self._script] += data
        elif self.open and self.open[-1] != "style":
            self.text[self._section] = self.text.get(self._section, "") + data
            if "td" in self.open or "th" in self.open:
                self.tables[self._section][-1][-1] += data

    @property
    def data(self) -> dict[str, object]:
        found = json.loads(self.scripts["report-data"])
        assert isinstance(found, dict)
        return found


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(render(report()))


def test_every_section_is_there_in_well_formed_html(full: Page) -> None:
    assert [attrs["id"] for tag, attrs in full.tags if tag == "section"] == SECTIONS
    assert full.problems == []
    assert full.open == []
    headings = [tag for tag, _ in full.tags if tag == "h2"]
    assert len(headings) == len(SECTIONS)
    assert not any("Run nasq" in text for text in full.text.values())


def test_nothing_is_loaded_from_anywhere(full: Page) -> None:
    for tag, attrs in full.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data", "poster", "background"):
            assert name not in attrs, (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
    policy = next(attrs["content"] for tag, attrs in full.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy
    html = render(report())
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_the_file_is_smaller_than_six_megabytes() -> None:
    assert len(render(report()).encode()) < 6_000_000
    assert len(render(ReportData("nothing yet")).encode()) < 50_000


def test_embedded_data_equals_the_input(full: Page) -> None:
    data = report()
    assert data.search is not None
    assert data.training is not None
    search = full.data["search"]
    assert isinstance(search, dict)
    names = [column["name"] for column in search["columns"]]
    assert [Column(**column) for column in search["columns"]] == list(data.search.columns)
    read = [
        Point(
            point["id"],
            dict(zip(names, point["values"], strict=True)),
            {k: v for k, v in zip(search["choices"], point["options"], strict=True) if v is not None},
            point["generation"],
            point["front"],
        )
        for point in search["points"]
    ]
    assert read == list(data.search.points)
    assert (search["x"], search["y"], search["best"]) == (data.search.x, data.search.y, data.search.best)
    training = full.data["training"]
    assert isinstance(training, dict)
    assert [Curve(**curve) for curve in training["curves"]] == list(data.training.curves)
    assert training["x_label"] == data.training.x_label


def test_facts_and_tables_show_the_numbers(full: Page) -> None:
    data = report()
    assert data.title in full.text["header"]
    assert all(fact.value in full.text["header"] and fact.note in full.text["header"] for fact in data.facts)
    assert ["stem", "5", "8", "400", "123\u202fk"] in full.tables["bits"]
    assert ["pool", DASH, "8", DASH, "4.096\u202fk"] in full.tables["bits"]
    assert full.tables["bench"][1] == [
        "best, exported", "onnxruntime 1.32.0", "0.2134\u202fms", "0.25\u202fms", "3.1\u202f%", "4.686\u202fk",
        "61\u202fMB", "31.2\u202fkB", "1", "1",
    ]  # fmt: skip
    assert full.tables["bench"][3][6] == DASH
    assert full.tables["parity"][2] == ["each layer alone, fed the same integers", "1,203,840", "0", "20 layers"]
    assert "✓ Equal" in full.text["parity"]
    assert full.tables["explanation"][2][:2] == ["bitops <= 50M", "0.47\u202f%"]
    assert full.tables["explanation"][2][3:] == ["0.3\u202f% to 0.74\u202f%", "4.1\u202fM", "920\u202fM"]
    assert full.tables["time"][2] == ["train", "1 min 36 s", "", "55.5\u202f%"]
    assert full.tables["time"][-1][:2] == ["Together", "2 min 53 s"]
    assert data.config is not None
    assert data.config in full.text["config"]
    assert "2.15.0" in full.text["versions"]
    assert "Platinum 8488C" in full.text["versions"]


def test_the_front_is_also_a_table_with_the_best_marked(full: Page) -> None:
    search = report().search
    assert search is not None
    rows = full.tables["pareto"][1:]
    wanted = sorted((p for p in search.points if p.front), key=lambda p: p.values[search.x])
    assert [row[0].split()[0] for row in rows] == [point.id for point in wanted]
    assert [row[0].endswith("best") for row in rows] == [point.id == search.best for point in wanted]


def test_a_failed_parity_is_unmistakable() -> None:
    data = report()
    assert data.parity is not None
    checks = [replace(data.parity.checks[0], differing=7)]
    page = Page(render(replace(data, parity=replace(data.parity, passed=False, checks=checks))))
    assert "✗ Different" in page.text["parity"]
    assert ("p", {"class": "verdict bad"}) in page.tags
    assert ("td", {"class": "number wrong"}) in page.tags


@pytest.mark.parametrize(
    ("section", "command"),
    [
        ("pareto", "nasq search runs/x"),
        ("bits", "nasq export runs/x"),
        ("training", "nasq train runs/x"),
        ("bench", "nasq bench runs/x"),
        ("parity", "nasq export runs/x"),
        ("explanation", "nasq search runs/x --explain"),
        ("time", "nasq run --out runs/x"),
        ("config", "nasq run --out runs/x"),
        ("versions", "nasq doctor"),
    ],
)
def test_an_absent_section_says_which_command_makes_it(section: str, command: str) -> None:
    page = Page(render(ReportData("early", run="runs/x")))
    assert re.search(rf"Run {re.escape(command)}\.\s*$", page.text[section])
    assert page.data == {"search": None, "training": None}
    assert page.problems == []


def hostile() -> ReportData:
    point = Point(HOSTILE, {HOSTILE: 1.0, "b": 2.0}, {HOSTILE: HOSTILE}, 0, True)
    return ReportData(
        title=HOSTILE,
        summary=HOSTILE,
        run=HOSTILE,
        facts=[Fact(HOSTILE, HOSTILE, HOSTILE)],
        search=Search([Column(HOSTILE, HOSTILE), Column("b")], [point], "b", HOSTILE, HOSTILE),
        bits=BitMap(HOSTILE, [LayerBits(HOSTILE, 4, 4)]),
        training=Training([Curve(HOSTILE, HOSTILE, [0.0], [1.0])], HOSTILE),
        stages=[Stage(HOSTILE, 1.0)],
        config=HOSTILE,
        versions={HOSTILE: HOSTILE},
        machine={HOSTILE: HOSTILE},
    )


def test_no_text_can_break_out_of_its_place() -> None:
    page = Page(render(hostile()))
    usual = Page(render(replace(report(), bench=None, parity=None, explanation=None)))
    assert page.problems == []
    assert len(page.scripts) == len(usual.scripts) == 3
    assert "alert(1)" not in "".join(text for name, text in page.scripts.items() if name != "report-data")
    assert not {"img"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    search = page.data["search"]
    assert isinstance(search, dict)
    assert search["points"][0] == {
        "id": HOSTILE,
        "generation": 0,
        "front": True,
        "values": [1.0, 2.0],
        "options": [HOSTILE],
    }
    assert "<" not in page.scripts["report-data"]
    assert HOSTILE in page.text["config"]


def test_numbers_that_are_not_finite_are_refused() -> None:
    data = report()
    nan = float("nan")
    with pytest.raises(InputError, match=r"the curve 'a' holds nan"):
        render(replace(data, training=Training([Curve("a", "loss", [0.0], [nan])])))
    with pytest.raises(InputError, match=r"a stage's seconds holds inf"):
        render(replace(data, stages=[Stage("train", float("inf"))]))
    with pytest.raises(InputError, match=r"the point 'p' holds nan"):
        render(replace(data, search=Search([Column("a")], [Point("p", {"a": nan}, {})], "a", "a")))


def test_references_to_nothing_are_refused() -> None:
    data = report()
    point = Point("p", {"a": 1.0}, {})
    with pytest.raises(InputError, match=r"the axis 'b' is none of the report's columns: a"):
        render(replace(data, search=Search([Column("a")], [point], "a", "b")))
    with pytest.raises(InputError, match=r"the best subnet 'q' is not among the 1 points"):
        render(replace(data, search=Search([Column("a")], [point], "a", "a", "q")))
    with pytest.raises(InputError, match=r"the point 'p' has no value for b"):
        render(replace(data, search=Search([Column("a"), Column("b")], [point], "a", "b")))
    with pytest.raises(InputError, match=r"the curve 'c' has 2 x values and 1 y values"):
        render(replace(data, training=Training([Curve("c", "loss", [0.0, 1.0], [1.0])])))


def test_a_plotting_library_that_would_break_the_page_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.offline

    from nasq.report.render import _plotly

    monkeypatch.setattr(plotly.offline, "get_plotlyjs", lambda: "let a = '</script>'")
    _plotly.cache_clear()
    try:
        with pytest.raises(NasqError, match="pip install -U plotly"):
            render_function(report())
    finally:
        _plotly.cache_clear()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "B", DASH),
        (0, "", "0"),
        (11_245, "B", "11.24\u202fkB"),
        (999_960, "B", "1\u202fMB"),
        (999_900, "B", "999.9\u202fkB"),
        (1e6, "", "1\u202fM"),
        (98.6111, "%", "98.61\u202f%"),
        (12_345.0, "ms", "12,345\u202fms"),
        (0.00012349, "s", "0.0001235\u202fs"),
        (-2500, "", "-2.5\u202fk"),
    ],
)
def test_quantities(value: float | None, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


def test_shares_and_durations() -> None:
    assert [share(value) for value in (0, 0.5, 0.0047, 0.0000021, 1)] == [
        "0.0\u202f%", "50.0\u202f%", "0.47\u202f%", "0.00021\u202f%", "100.0\u202f%",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.42, 12.34, 59.96, 185, 3599.7, 7620)] == [
        "0.42 s", "12.3 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min",
    ]  # fmt: skip
