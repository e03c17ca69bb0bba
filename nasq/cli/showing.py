"""What ``nasq show`` says of a bundle or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nasq.cli.output import Output
from nasq.run.directory import RunDirectory

__all__ = ["bundle_rows", "run_rows", "show_bundle", "show_run"]


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
             "files": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
             "parity": parity_of(path)}  # fmt: skip
    return rows, facts


def parity_of(path: Path) -> dict[str, Any] | None:
    """What the gate found when a bundle was exported; ``None`` where it never ran.

    The verdict follows from the report's figures, whatever the file says of it.

    Raises:
        ArtifactError: ``parity.json`` is damaged or no report.
    """
    from nasq import files
    from nasq.deploy import storage
    from nasq.deploy.parity_report import ParityReport

    name = "parity.json"
    if name not in storage.verify(path):
        return None
    found = ParityReport.from_json(files.parse_json(storage.read(path, name), path / name))
    return {"passed": found.passed, "failures": found.failures(), "runtime": found.runtime, "images": found.images,
            "accuracy": found.accuracy}  # fmt: skip


def show_bundle(path: Path, output: Output) -> None:
    """The layers of a bundle as a table; its title says what the gate found."""
    rows, facts = bundle_rows(path)
    output.table(rows, title=f"{facts['space']} for {facts['target']}\n{_verdict(facts['parity'])}", value=facts)


def _verdict(found: dict[str, Any] | None) -> str:
    if found is None:
        return "parity: the gate never ran on this bundle; 'nasq verify' runs it"
    accuracy = "" if found["accuracy"] is None else f", accuracy {found['accuracy']:.2%} (file)"
    verdict = "passed" if found["passed"] else f"FAILED: {found['failures'][0]}"
    return f"parity on {found['runtime']}, {found['images']} images{accuracy}: {verdict}"


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
