"""The report: one self-contained HTML file. ``render(data)`` writes it from plain dataclasses."""

from __future__ import annotations

from nasq.report.data import (
    BenchRow,
    BitMap,
    Column,
    Curve,
    Explanation,
    Fact,
    LayerBits,
    Parity,
    ParityCheck,
    Point,
    ReportData,
    Search,
    Stage,
    Survival,
    Training,
)
from nasq.report.render import render

__all__ = [
    "BenchRow",
    "BitMap",
    "Column",
    "Curve",
    "Explanation",
    "Fact",
    "LayerBits",
    "Parity",
    "ParityCheck",
    "Point",
    "ReportData",
    "Search",
    "Stage",
    "Survival",
    "Training",
    "render",
]
