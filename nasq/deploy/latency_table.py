"""A table of the times of single layers, and a predictor of whole networks made of it.

A layer is timed alone, cut out of an exported file, in the runtime that runs the file. Layers of equal geometry share a
row, whatever their weights: the times depend on shapes, and on whether the output is clipped, not on values or bit-widths
(onnxruntime holds every weight as int8). A network takes less, or more, than the sum of its rows (caches, fused
neighbours, the cost of a call), so the predictor is ``intercept + slope * sum``, fitted on measured networks; its error is
that on other measured networks, and is part of the table.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import onnx, readback
from nasq.deploy.engines import engine_of, target_of, timed_session
from nasq.deploy.timing import bench, environment, median_interval
from nasq.errors import ArtifactError, InputError
from nasq.files import read_json, write_json
from nasq.quant.program import Conv, Linear, Op, Program

__all__ = ["Fit", "LatencyTable", "LayerRow", "build", "layer_key"]

SCHEMA = 1
TIGHT = 0.05  # half the width of the interval of a row's median, relative to it, at which measuring stops
ROUND, MOST = 20, 200  # calls between looks at the interval, and at most


def layer_key(op: Op, program: Program) -> str:
    """What a layer's time depends on, as text: operation, shapes, geometry, whether its output is clipped."""
    parts = [op.kind, *("x".join(map(str, program.tensor(name).shape)) for name in op.inputs)]
    parts.append("to " + "x".join(map(str, op.output.shape)))
    for name in ("kernel", "stride", "padding", "dilation"):
        if hasattr(op, name):
            parts.append(f"{name} " + "x".join(map(str, getattr(op, name))))
    if isinstance(op, Linear):
        parts.append("weight " + "x".join(map(str, op.weight.shape)))
        if op.sizes:
            parts.append(f"{len(op.sizes)} groups of inputs")
    if isinstance(op, Conv):
        parts.append(f"groups {op.groups}")
    if (op.output.low, op.output.high) != (0, 255):
        parts.append("clipped")
    return ", ".join(parts)


@dataclass(frozen=True)
class LayerRow:
    """Times of one kind of layer: median and its 95 % interval in ms per call, and how many calls."""

    median: float
    low: float
    high: float
    calls: int


@dataclass(frozen=True)
class Fit:
    """What turns sums of rows into times of networks, and how well.

    Attributes:
        intercept, slope: ``ms = intercept + slope * sum``.
        fitted, held_out: Number of measured networks that were fitted, and that the errors below are of.
        median_error, largest_error: Relative, of the held-out networks.
        rank: Spearman's rho of prediction and measurement on them; NaN (``None``) for fewer than three.
    """

    intercept: float
    slope: float
    fitted: int
    held_out: int
    median_error: float
    largest_error: float
    rank: float | None


@dataclass
class LatencyTable:
    """Times of layers on one machine.

    Attributes:
        rows: By :func:`layer_key`.
        batch, threads: Images per call, threads inside an operator.
        target: Whose runtime it is.
        where: The machine (:func:`nasq.deploy.timing.environment`).
        fit: Of whole networks; ``None`` before :meth:`calibrate`.
    """

    batch: int
    threads: int
    target: str
    where: Mapping[str, Any]
    rows: dict[str, LayerRow] = field(default_factory=dict)
    fit: Fit | None = None

    def missing(self, program: Program) -> list[str]:
        """The keys of a program's layers that the table does not hold."""
        return [key for key in Counter(layer_key(op, program) for op in program.ops) if key not in self.rows]

    def layers_ms(self, program: Program) -> float:
        """The sum of a program's rows, ms.

        Raises:
            InputError: A layer is not in the table; names it.
        """
        if missing := self.missing(program):
            raise InputError(
                f"the latency table has no row for {missing[0]!r} ({len(missing)} layers are missing). Measure them: "
                "nasq bench --table, or LatencyTable.measure."
            )
        return sum(self.rows[layer_key(op, program)].median for op in program.ops)

    def predict(self, program: Program) -> float:
        """Milliseconds of a whole network, for ``batch`` images.

        Raises:
            InputError: A layer is not in the table, or the table was never calibrated on whole networks.
        """
        if self.fit is None:
            raise InputError("the latency table was not fitted to whole networks; call calibrate first.")
        return self.fit.intercept + self.fit.slope * self.layers_ms(program)

    def measure(self, program: Program) -> int:
        """Times every layer of a program that is not in the table yet; returns how many.

        Raises:
            InputError: Rows are missing, and the table is of another machine or its runtime compiles whole networks alone.
        """
        wanted = set(self.missing(program))
        if not wanted:
            return 0
        _require_engine(program)
        here = environment(self.threads)["cpu"]
        if self.where.get("cpu") != here:
            raise InputError(
                f"the latency table is of {self.where.get('cpu')!r} and lacks {len(wanted)} layers, such as "
                f"{min(wanted)!r}; measured on {here!r} they would not compare. Complete it there: nasq bench RUN --table"
            )
        file = readback.read(onnx.export(program))
        rng = np.random.default_rng(0)
        for index, op in enumerate(program.ops):
            key = layer_key(op, program)
            if key in wanted and key not in self.rows:
                self.rows[key] = _timed(_call(file, program, index, self, rng))
        return len(wanted)

    def calibrate(
        self, programs: Sequence[Program], repeats: int = 30, images: NDArray[np.float32] | None = None
    ) -> Fit:
        """Measures whole networks, fits every other one and takes the errors on those between.

        Args:
            programs: At least four, as different as those to be predicted.
            repeats: Calls of each, all in turn.
            images: To run them on, repeated where they are fewer than the batch; zeros by default.

        Raises:
            InputError: Fewer than four programs.
        """
        if len(programs) < 4:
            raise InputError(
                f"{len(programs)} networks are too few to fit a latency table and to test it; give 4 or more."
            )
        for program in programs:
            self.measure(program)
        shape = (self.batch, *programs[0].ops[0].output.shape)
        x = np.zeros(shape, np.float32)
        if images is not None:
            x = np.concatenate([images] * -(-self.batch // len(images)))[: self.batch]
        calls = {str(i): self._runner(program) for i, program in enumerate(programs)}
        found = bench(calls, x, repeats=repeats)
        measured = np.array([found[str(i)].median for i in range(len(programs))])
        self.fit = fit(np.array([self.layers_ms(program) for program in programs]), measured)
        return self.fit

    def _runner(self, program: Program) -> Callable[[NDArray[np.float32]], object]:
        return engine_of(program).open(onnx.export(program), self.threads, timed_session(program), 1 << 30).run

    def save(self, path: Path) -> None:
        """Writes the table as JSON, atomically."""
        plain = {**asdict(self), "rows": {key: asdict(row) for key, row in sorted(self.rows.items())}}
        write_json(path, {"format": "nasq-latency-table", "schema": SCHEMA, **plain})

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: It is missing, or not such a table.
        """
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != "nasq-latency-table" or found.get("schema") != SCHEMA:
            raise ArtifactError(f"{path} is not a latency table of schema {SCHEMA}. Make one: nasq bench RUN --table")
        try:
            rows = {str(key): LayerRow(**row) for key, row in found["rows"].items()}
            made = None if found["fit"] is None else Fit(**found["fit"])
            return cls(found["batch"], found["threads"], found["target"], found["where"], rows, made)
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} is not a whole latency table: {error!r}. Make it again.") from error


def fit(sums: NDArray[np.float64], measured: NDArray[np.float64]) -> Fit:
    """Least squares of relative errors on the first, third, ... network; errors of the second, fourth, ..."""
    from scipy.stats import spearmanr

    train, test = np.arange(0, len(sums), 2), np.arange(1, len(sums), 2)
    x = np.stack([np.ones(len(sums)), sums], 1)
    weighted = x[train] / measured[train, None]
    (intercept, slope), *_ = np.linalg.lstsq(weighted, np.ones(len(train)), rcond=None)
    errors = np.abs((intercept + slope * sums[test]) / measured[test] - 1)
    rank = float(spearmanr(sums[test], measured[test]).statistic) if len(test) >= 3 else float("nan")
    return Fit(
        float(intercept), float(slope), len(train), len(test), float(np.median(errors)), float(errors.max()),
        rank if np.isfinite(rank) else None,
    )  # fmt: skip


def build(
    programs: Sequence[Program],
    batch: int = 1,
    threads: int = 1,
    *,
    calibrated_on: int = 16,
    repeats: int = 30,
    images: NDArray[np.float32] | None = None,
) -> LatencyTable:
    """A table of every layer of some programs, fitted to whole networks.

    Args:
        programs: Of one target and one input shape, at least four.
        batch, threads: What it is for.
        calibrated_on: How many of the programs are measured as a whole.
        repeats: Calls of each of those.
        images: To run them on.

    Raises:
        InputError: Programs of several targets or inputs, too few, or of a target that compiles whole networks alone.
    """
    kinds = {(program.target, program.ops[0].output.shape) for program in programs}
    if len(kinds) != 1:
        raise InputError(f"a latency table is for one target and one input shape, not for {sorted(kinds)}.")
    target = target_of(programs[0])
    table = LatencyTable(
        batch, threads, programs[0].target, environment(threads, {} if target is None else target.session)
    )
    for program in programs:
        table.measure(program)
    table.calibrate(programs[:calibrated_on], repeats, images)
    return table


def _require_engine(program: Program) -> None:
    engine = engine_of(program)
    if engine.rebuilds:
        raise InputError(
            f"the runtime {engine.name!r} of the target {program.target!r} compiles whole networks, so layers have no times "
            "of their own there. Search with the objective 'latency', which measures networks, or for another target."
        )


def _call(
    file: readback.File, program: Program, index: int, table: LatencyTable, rng: np.random.Generator
) -> Callable[[], object]:
    """One layer alone on random integers, on the runtime and with the threads of the table."""
    op, layer, batch = program.ops[index], file.layers[index], table.batch
    feeds: dict[str, NDArray[Any]] = {
        name: rng.integers(0, 256, (batch, *program.tensor(source).shape), np.uint8)
        for name, source in zip(layer.inputs, dict.fromkeys(op.inputs), strict=False)
    }
    if not op.inputs:
        feeds = {name: rng.standard_normal((batch, *op.output.shape), np.float32) for name in layer.inputs}
    return engine_of(program).prepare(file.cut(index), feeds, table.threads)


def _timed(call: Callable[[], object]) -> LayerRow:
    """Calls until the interval of the median is tight, or often enough."""
    samples: list[float] = []
    for _ in range(3):
        call()
    while len(samples) < MOST:
        for _ in range(ROUND):
            began = time.perf_counter()
            call()
            samples.append(1e3 * (time.perf_counter() - began))
        low, high = median_interval(samples)
        if high - low <= 2 * TIGHT * float(np.median(samples)):
            break
    return LayerRow(float(np.median(samples)), low, high, len(samples))
