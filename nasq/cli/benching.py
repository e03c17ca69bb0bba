"""What ``nasq bench`` does beside timing the best bundle: latency tables, end-to-end times, baselines."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasq.cli.output import Output
from nasq.errors import require

if TYPE_CHECKING:
    from nasq.deploy.latency_table import LatencyTable
    from nasq.deploy.timing import Timing
    from nasq.run.assemble import Workshop
    from nasq.run.directory import RunDirectory

__all__ = ["end_to_end", "read_baseline", "show_changes", "show_end_to_end", "show_rows", "show_table", "table"]

IMAGES = 32


def table(run: RunDirectory, workshop: Workshop, subnets: int) -> LatencyTable:
    """Makes the run's latency table."""
    from nasq.run.latency import make_table
    from nasq.run.search import Evaluation

    return make_table(run, workshop, Evaluation(workshop), subnets)


def show_rows(found: Mapping[str, Any], output: Output) -> None:
    """What ``bench.json`` holds; a format that lost against fp32 is named, and so is memory that does not compare."""
    rows: list[dict[str, object]] = [
        {"candidate": row["candidate"], "batch": row["batch"], "median ms": row["median"], "p95 ms": row["p95"],
         "images/s": row["throughput"], "peak MiB": row["peak_mib"]}
        for row in found["rows"]
    ]  # fmt: skip
    where = found["environment"]
    output.table(rows, title=f"{where['cpu']}, {where['threads']} thread(s)", value=found)
    for text in (*slower_than_float(found["rows"]), *_memories(found["rows"])):
        output.log(text)


def slower_than_float(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each integer format that is slower than fp32 on the same runtime, beyond both intervals."""
    times = {(row["candidate"], row["batch"]): row for row in rows}
    found = []
    for (candidate, batch), row in times.items():
        runtime, _, form = candidate.rpartition(" ")
        real = times.get((f"{runtime} fp32", batch))
        if form in ("int8", "integers") and real is not None and row["low"] > real["high"]:
            found.append(
                f"warning: {candidate} is slower than fp32 at batch {batch}: {row['median']:.3g} ms, not "
                f"{real['median']:.3g} ms."
            )
    return found


def _memories(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How peaks were measured, where they were measured in several ways."""
    ways: dict[str, list[str]] = {}
    for row in rows:
        if row["peak_mib"] is not None and row["candidate"] not in ways.setdefault(row["memory"], []):
            ways[row["memory"]].append(row["candidate"])
    if len(ways) < 2:
        return []
    return [f"peak MiB of {', '.join(names)}: {way}; others do not compare." for way, names in ways.items()]


def show_table(found: LatencyTable, output: Output) -> None:
    """The slowest rows, and how well whole networks are predicted."""
    assert found.fit is not None
    slowest = sorted(found.rows.items(), key=lambda item: -item[1].median)[:12]
    rows: list[dict[str, object]] = [
        {"layer": key, "median ms": row.median, "calls": row.calls} for key, row in slowest
    ]
    fit = found.fit
    title = (
        f"{len(found.rows)} layers; networks: {fit.intercept:.4g} ms + {fit.slope:.4g} x sum, "
        f"median error {fit.median_error:.1%} on {fit.held_out} others"
    )
    output.table(rows, title=title, value=asdict(found))


def end_to_end(run: RunDirectory, workshop: Workshop) -> dict[str, Timing]:
    """Times PNG files of validation images through the best bundle."""
    from nasq.deploy.end_to_end import end_to_end as measure

    image, settings = require("PIL.Image"), workshop.config.bench
    files = []
    for pixels in workshop.data.validation.images[:IMAGES].cpu().numpy():
        buffer = io.BytesIO()
        image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return measure(run.best, files, settings.threads, settings.repeats)


def show_end_to_end(found: Mapping[str, Timing], output: Output) -> None:
    """A row per stage."""
    rows: list[dict[str, object]] = [
        {
            "stage": name,
            "median ms": one.median,
            "from ms": one.interval[0],
            "to ms": one.interval[1],
            "p95 ms": one.p95,
        }
        for name, one in found.items()
    ]
    output.table(rows)


def read_baseline(path: Path | None, tolerance: float) -> Any:
    """A former benchmark, read and checked before the run's own file is replaced; ``None`` without one."""
    from nasq.deploy.baseline import changes
    from nasq.files import read_json

    if path is None:
        return None
    found = read_json(path)
    changes(found, found, tolerance)
    return found


def show_changes(before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float, output: Output) -> bool:
    """What changed since a baseline; returns whether anything became slower."""
    from nasq.deploy.baseline import changes

    found = changes(before, now, tolerance)
    rows: list[dict[str, object]] = [
        {"candidate": one.candidate, "batch": one.batch, "before ms": one.before, "now ms": one.now, "ratio": one.ratio,
         "verdict": "slower" if one.slower else "same or faster"}
        for one in found
    ]  # fmt: skip
    output.table(rows)
    shared = {(one.candidate, one.batch) for one in found}
    alone = [
        row for report in (before, now) for row in report["rows"] if (row["candidate"], row["batch"]) not in shared
    ]
    if alone:
        named = ", ".join(f"{row['candidate']} at batch {row['batch']}" for row in alone)
        output.log(f"not compared, since only one of the two benchmarks has them: {named}")
    return any(one.slower for one in found)
