"""What a report shows: frozen dataclasses of plain types, so that any run, or a test, can fill them.

Every section is optional. One that is ``None`` is not left out silently: the page says which command makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

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
]

Option = str | int | float | bool


@dataclass(frozen=True)
class Fact:
    """One card at the top: ``Fact("Test accuracy", "98.6 %", "the exported file, 360 images")``."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Column:
    """One number that every evaluated subnet has.

    Attributes:
        name: Key in :attr:`Point.values`.
        unit: For people; empty for a plain number.
        direction: Which way is better; decides the front that the chart draws.
    """

    name: str
    unit: str = ""
    direction: Literal["maximize", "minimize"] = "minimize"


@dataclass(frozen=True)
class Point:
    """One evaluated subnet.

    Attributes:
        id: Of the subnet.
        values: Name of a column to its value; every column is present and finite.
        choices: The canonical subnet: name of a choice to its option.
        generation: Of the search.
        front: Whether it belongs to the front of the search's own objectives.
    """

    id: str
    values: Mapping[str, float]
    choices: Mapping[str, Option]
    generation: int = 0
    front: bool = False


@dataclass(frozen=True)
class Search:
    """The chart of evaluated subnets.

    Attributes:
        columns: What can be chosen as an axis.
        points: Every evaluated subnet, in the order of evaluation.
        x, y: Names of the columns shown first.
        best: ``id`` of the marked point.
    """

    columns: Sequence[Column]
    points: Sequence[Point]
    x: str
    y: str
    best: str | None = None


@dataclass(frozen=True)
class LayerBits:
    """One layer of a subnet; a bit-width that is ``None`` is drawn as a dash (not quantized, or nothing to quantize).

    Attributes:
        layer: Its path.
        weight_bits, activation_bits: Nominal widths.
        weights: Number of weights.
        macs: Multiply-accumulates for one image.
    """

    layer: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weights: int | None = None
    macs: int | None = None


@dataclass(frozen=True)
class BitMap:
    """The layers of one subnet in execution order."""

    subnet: str
    layers: Sequence[LayerBits]


@dataclass(frozen=True)
class Curve:
    """One line of training: ``x`` and ``y`` are of equal length and finite; curves of one ``panel`` share a chart."""

    name: str
    panel: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Training:
    """The training curves; ``x_label`` names what they run over."""

    curves: Sequence[Curve]
    x_label: str = "step"


@dataclass(frozen=True)
class BenchRow:
    """One timed model on one runtime; ``None`` where something was not measured.

    Attributes:
        model: What was timed: ``"best, 8/4 bits"``, ``"the same in fp32"``.
        runtime: With its version.
        threads: Of the runtime.
        batch: Images per call.
        median_ms, p95_ms: Milliseconds per call.
        spread_percent: Interquartile range over the median.
        images_per_second: Throughput.
        peak_memory_bytes: Of the process while it ran.
        file_bytes: What has to be shipped.
    """

    model: str
    runtime: str
    threads: int | None = None
    batch: int | None = None
    median_ms: float | None = None
    p95_ms: float | None = None
    spread_percent: float | None = None
    images_per_second: float | None = None
    peak_memory_bytes: int | None = None
    file_bytes: int | None = None


@dataclass(frozen=True)
class ParityCheck:
    """One comparison: how many integers were compared and how many differed."""

    name: str
    compared: int
    differing: int
    note: str = ""


@dataclass(frozen=True)
class Parity:
    """Whether the exported file computes what was evaluated.

    Attributes:
        passed: The verdict.
        statement: What was compared with what, in a sentence.
        checks: The numbers behind it.
    """

    passed: bool
    statement: str
    checks: Sequence[ParityCheck] = ()


@dataclass(frozen=True)
class Survival:
    """How much of the space one constraint leaves.

    Attributes:
        constraint: Its text, or ``"all together"``.
        share: Of the sampled subnets, 0..1; ``low`` and ``high`` bound it with 95 % confidence.
        low, high: See ``share``.
        smallest, largest: Values seen; ``None`` where there is no single value.
        unit: Of those values.
    """

    constraint: str
    share: float
    low: float
    high: float
    smallest: float | None = None
    largest: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Explanation:
    """The table of constraints, from ``samples`` uniform samples of the space."""

    samples: int
    rows: Sequence[Survival]


@dataclass(frozen=True)
class Stage:
    """Wall-clock seconds of one stage."""

    name: str
    seconds: float


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    Attributes:
        title: Name of the run.
        summary: One or two sentences: what was searched and what came out.
        run: The run directory as the user would type it; used in the commands of absent sections.
        facts: Cards about the best subnet.
        config: The configuration as text.
        versions, machine: Name to value.
    """

    title: str
    summary: str = ""
    run: str = "RUN"
    facts: Sequence[Fact] = ()
    search: Search | None = None
    bits: BitMap | None = None
    training: Training | None = None
    bench: Sequence[BenchRow] | None = None
    parity: Parity | None = None
    explanation: Explanation | None = None
    stages: Sequence[Stage] | None = None
    config: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
