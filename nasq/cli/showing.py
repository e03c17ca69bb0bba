"""What ``nasq show`` says of a bundle or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nasq.cli.output import Output
from nasq.run.directory import RunDirectory

__all__ = ["bundle_rows", "run_rows", "show_run"]


def bundle_rows(path: Path) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """The layers of a bundle as rows, and everything as one JSON-able value."""
    from nasq.deploy import bundle
    from nasq.quant.program import Linear

    program = bundle.read(path)
    rows: list[dict[str, object]] = []
    for op in program.ops:
        weights = f"{op.weight_bits} bits x {op.weight.size:,}" if isinstance(op, Linear) else ""
        shape = "x".join(map(str, op.output.shape))
        rows.append(
            {"layer": op.path, "kind": type(op).__name__, "weights": weights, "output": shape, "bits": op.output.bits}
        )
    meta = dict(program.meta)
    facts = {"target": program.target, "space": meta.get("space", "?"), "meta": meta, "layers": rows,
             "files": {file.name: file.stat().st_size for file in sorted(path.iterdir())}}  # fmt: skip
    return rows, facts


def run_rows(run: RunDirectory) -> tuple[list[dict[str, object]], dict[str, Any]]:
    """The front of a run as rows, and everything as one JSON-able value."""
    from nasq.run.search import search_results
    from nasq.run.summary import facts as summary
    from nasq.search import front

    facts: dict[str, Any] = {"run": str(run.path), "evaluated": 0, **summary(run)}
    if not (run.search / "state.json").exists():
        return [], facts
    goals, records = search_results(run)
    best = sorted(front(records, goals), key=lambda record: -goals[0].sign * record.values[goals[0].name])
    rows: list[dict[str, object]] = [
        {"subnet": record.subnet.id, **{goal.name: record.values[goal.name] for goal in goals}} for record in best
    ]
    facts.update(evaluated=len(records), front=rows)
    return rows, facts


def show_run(opened: RunDirectory, output: Output) -> None:
    """The front of a run as a table."""
    rows, facts = run_rows(opened)
    front = f"; {len(rows)} of them are the front" if rows else ""
    output.table(rows, title=f"{opened.path}: {facts['evaluated']} subnets evaluated{front}", value=facts)
