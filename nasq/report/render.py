"""Renders a report: one HTML file that needs nothing from the network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasq.errors import InputError, NasqError, require
from nasq.report import format as formats
from nasq.report.data import LayerBits, ReportData, Search, Training

if TYPE_CHECKING:
    import jinja2

__all__ = ["environment", "render"]

# A table of layers longer than this is set in two columns side by side.
_LONG = 12


def render(data: ReportData) -> str:
    """The report as one self-contained HTML document (about 5 MB: the plotting library is inside it).

    All text is escaped; data is embedded as JSON in which no tag can occur.

    Raises:
        InputError: A number is not finite, a point lacks a column, or a name refers to nothing.
    """
    _check(data)
    charts = data.search is not None or data.training is not None
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            embedded=embedded(data),
            plotly=_plotly() if charts else "",
            front=_front(data.search),
            layer_tables=_halves(data.bits.layers) if data.bits else (),
            panels=_panels(data.training),
            total_seconds=sum(stage.seconds for stage in data.stages or ()),
        )
    )


def embedded(data: ReportData) -> dict[str, Any]:
    """What the page's script draws, as JSON-able values; names of choices are written once, not once per point."""
    return {"search": _search_json(data.search), "training": _training_json(data.training)}


def _search_json(search: Search | None) -> dict[str, Any] | None:
    if search is None:
        return None
    choices = list(dict.fromkeys(name for point in search.points for name in point.choices))
    return {
        "columns": [{"name": c.name, "unit": c.unit, "direction": c.direction} for c in search.columns],
        "choices": choices,
        "points": [
            {
                "id": point.id,
                "generation": point.generation,
                "front": point.front,
                "values": [point.values[column.name] for column in search.columns],
                "options": [point.choices.get(name) for name in choices],
            }
            for point in search.points
        ],
        "x": search.x,
        "y": search.y,
        "best": search.best,
    }


def _training_json(training: Training | None) -> dict[str, Any] | None:
    if training is None:
        return None
    return {
        "x_label": training.x_label,
        "curves": [
            {"name": curve.name, "panel": curve.panel, "x": list(curve.x), "y": list(curve.y)}
            for curve in training.curves
        ],
    }


def _panels(training: Training | None) -> list[str]:
    return list(dict.fromkeys(curve.panel for curve in training.curves)) if training else []


def _front(search: Search | None) -> list[Any]:
    """The points of the front for the table below the chart, along its x axis."""
    points = [point for point in search.points if point.front] if search else []
    return sorted(points, key=lambda point: (point.values[search.x], point.id)) if search else []


def _halves(layers: Sequence[LayerBits]) -> tuple[Sequence[LayerBits], ...]:
    if len(layers) <= _LONG:
        return (layers,)
    middle = math.ceil(len(layers) / 2)
    return layers[:middle], layers[middle:]


def _check(data: ReportData) -> None:
    if data.search is not None:
        _check_search(data.search)
    for curve in data.training.curves if data.training else ():
        if len(curve.x) != len(curve.y):
            raise InputError(f"the curve {curve.name!r} has {len(curve.x)} x values and {len(curve.y)} y values.")
        _finite(f"the curve {curve.name!r}", (*curve.x, *curve.y))
    _finite("a stage's seconds", (stage.seconds for stage in data.stages or ()))


def _check_search(search: Search) -> None:
    names = [column.name for column in search.columns]
    for axis in (search.x, search.y):
        if axis not in names:
            raise InputError(f"the axis {axis!r} is none of the report's columns: {', '.join(names)}.")
    ids = {point.id for point in search.points}
    if search.best is not None and search.best not in ids:
        raise InputError(f"the best subnet {search.best!r} is not among the {len(ids)} points of the report.")
    for point in search.points:
        missing = [name for name in names if name not in point.values]
        if missing:
            raise InputError(f"the point {point.id!r} has no value for {', '.join(missing)}.")
        _finite(f"the point {point.id!r}", (point.values[name] for name in names))


def _finite(what: str, values: Iterable[float]) -> None:
    for value in values:
        if not math.isfinite(value):
            raise InputError(f"{what} holds {value}; a report shows finite numbers only.")


def _json(value: object) -> Any:
    """JSON that is safe inside a script element: no ``<`` (so no ``</script>`` and no comment) survives in it."""
    markup = require("markupsafe")
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markup.Markup(text)


@lru_cache(maxsize=1)
def _plotly() -> Any:
    """The plotting library as the installed package ships it."""
    source: str = require("plotly.offline").get_plotlyjs()
    if "</script" in source.lower() or "<!--" in source:
        raise NasqError("the installed plotly cannot be embedded in a page. Install another: pip install -U plotly")
    return require("markupsafe").Markup(source)


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The templates of this package: all text is escaped, a missing value is an error."""
    engine = require("jinja2")
    environment: jinja2.Environment = engine.Environment(
        loader=engine.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=engine.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(json=_json, quantity=formats.quantity, share=formats.share, duration=formats.duration)
    return environment
