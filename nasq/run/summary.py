"""The report stage: what a run left on disk, as ``report.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nasq.deploy import bundle
from nasq.deploy.bench import environment
from nasq.deploy.engines import ENGINES
from nasq.files import read_json, write_text
from nasq.quant.program import Conv, Linear, Program
from nasq.report import (
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
    render,
)
from nasq.run.directory import RunDirectory
from nasq.run.search import search_results
from nasq.search import COST_UNITS, Goal, Record, front, hypervolumes, pick_knee
from nasq.search.cascade import spent

__all__ = ["collect", "facts", "report"]

_FILES = {f"{name} int8": name for name in ENGINES}
"""The rows of a benchmark that are the bundle's own file, and the runtime of each."""
_VARIANCE = "Gradient variance over squared mean"
_DRAWS = {"uniform": "uniform draws", "own": "own draws, reweighted"}


def _json(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def facts(run: RunDirectory) -> dict[str, Any]:
    """The numbers a run ends with: best subnet, accuracies, sizes, latency; what is missing is absent."""
    found: dict[str, Any] = {"best": str(run.best), "report": str(run.path / "report.html")}
    index = _json(run.exports / "index.json")
    if index is not None:
        subnets = {one["id"]: one for one in index["subnets"]}
        found.update(
            subnet=index["best"], test_accuracy=index["test_accuracy"], test_images=index["test_images"],
            validation_accuracy=subnets[index["best"]]["validation_accuracy"],
        )  # fmt: skip
        found["weights_bytes"] = (run.best / "model.safetensors").stat().st_size
        found["onnx_bytes"] = (run.best / "model.onnx").stat().st_size
    timed = _json(run.path / "bench.json")
    if timed is not None:
        for row in timed["rows"]:
            if row["candidate"] in _FILES and row["batch"] == min(r["batch"] for r in timed["rows"]):
                found.update(latency_ms=row["median"], latency_batch=row["batch"])
                found["latency_runtime"] = _FILES[row["candidate"]]
        found["sizes"] = timed["sizes"]
    return found


def _cards(found: Mapping[str, Any]) -> list[Fact]:
    cards = []
    if "subnet" in found:
        cards += [
            Fact("Best subnet", found["subnet"]),
            Fact(
                "Test accuracy",
                f"{100 * found['test_accuracy']:.2f} %",
                f"exported file, {found['test_images']} images",
            ),
            Fact("Validation accuracy", f"{100 * found['validation_accuracy']:.2f} %", "selected on"),
            Fact("Weights", f"{found['weights_bytes'] / 1000:,.1f} kB", "model.safetensors"),
            Fact("ONNX file", f"{found['onnx_bytes'] / 1000:,.1f} kB", "model.onnx"),
        ]
    if "latency_ms" in found:
        where = f"{found['latency_runtime']}, batch {found['latency_batch']}"
        cards.append(Fact("Latency", f"{found['latency_ms']:.3f} ms", where))
    return cards


def _search_cards(goals: Sequence[Goal], records: Sequence[Record]) -> list[Fact]:
    """How fast the search got where, and where a cascade spent its time."""
    cards = []
    if len(goals) > 1 and len(goals) <= 4:
        volumes = hypervolumes(records, goals)
        nearly = next(index for index, volume in enumerate(volumes, 1) if volume >= 0.99 * volumes[-1])
        cards += [
            Fact("Hypervolume", f"{volumes[-1]:.4g}", f"99 % of it after {nearly} of {len(volumes)} evaluations"),
            Fact("Knee of the front", pick_knee(records, goals).subnet.id, "nasq pick RUN --knee"),
        ]
    cards += [
        Fact(f"Cascade: {one.level}", f"{one.seconds:.1f} s", f"{one.subnets} subnets, {one.ended} went no further")
        for one in spent(records)
    ]
    return cards


def _search(goals: Sequence[Goal], records: Sequence[Record], best: str | None) -> Search:
    directions = {goal.name: goal.direction for goal in goals}
    units = {**COST_UNITS, **{goal.name: goal.unit for goal in goals}}
    columns = [Column(name, units.get(name, ""), directions.get(name, "minimize")) for name in records[0].values]
    kept = {record.subnet.id for record in front(records, goals)}
    points = [
        Point(one.subnet.id, dict(one.values), dict(one.subnet), one.generation, one.subnet.id in kept)
        for one in records
    ]
    x = goals[1].name if len(goals) > 1 else "bytes"
    return Search(columns, points, x, goals[0].name, best)


def _bits(program: Program, subnet: str) -> BitMap:
    layers = []
    for op in program.ops:
        if isinstance(op, Linear):
            area = op.output.shape[1] * op.output.shape[2] if isinstance(op, Conv) else 1
            layers.append(LayerBits(op.path, op.weight_bits, op.output.bits, op.weight.size, op.weight.size * area))
        elif type(op).__name__ in {"Input", "Add", "AvgPool", "Concat"}:
            layers.append(LayerBits(op.path, None, op.output.bits))
    return BitMap(subnet, layers)


def _training(events: Sequence[Mapping[str, Any]]) -> Training | None:
    """Curves of the epochs; the leaves of a forest have curves of their own behind the one they grew from."""
    done: dict[tuple[str, str, int], Mapping[str, Any]] = {}
    for event in events:
        if event["event"] == "train.epoch":
            done[event["phase"], event.get("leaf", ""), event["epoch"]] = event
    if not done:
        return None
    offset = max((epoch for phase, _, epoch in done if phase == "warmup"), default=0)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (phase, leaf, epoch), event in sorted(done.items(), key=lambda item: (item[0][0] != "warmup", *item[0][1:])):
        at = float(epoch + (offset if phase == "quantized" else 0))
        for panel, key in (("Loss", "losses"), ("Training accuracy", "accuracy")):
            for role, value in event[key].items():
                points.setdefault((panel, f"{role}, leaf {leaf}" if leaf else role), []).append((at, value))
        for draws, found in event.get("gradient_variance", {}).items():
            name = _DRAWS[draws]
            if found is not None:
                key_of = (_VARIANCE, f"{name}, leaf {leaf}" if leaf else name)
                points.setdefault(key_of, []).append((at, found["total"]))
    curves = [
        Curve(name, panel, [at for at, _ in found], [value for _, value in found])
        for panel, name, found in ((*key, found) for key, found in points.items())
    ]
    return Training(curves, "epoch (float warm-up, then quantized)" if offset else "epoch")


def _bench(found: Mapping[str, Any] | None) -> list[BenchRow] | None:
    if found is None:
        return None
    sizes = dict.fromkeys(_FILES, "model.onnx") | {f"{name} fp32": "fp32 model.onnx" for name in ENGINES}
    rows = []
    for row in found["rows"]:
        model, runtime = "best subnet" if row["candidate"] in _FILES else "same in fp32", row["candidate"]
        size = found["sizes"].get(sizes.get(row["candidate"], ""))
        rows.append(
            BenchRow(
                model, runtime, found["environment"]["threads"], row["batch"], row["median"], row["p95"],
                100 * row["spread"] / row["median"], row["throughput"],
                None if row["peak_mib"] is None else int(row["peak_mib"] * 2**20), None if size is None else int(size),
            )
        )  # fmt: skip
    return rows


def _parity(found: Mapping[str, Any] | None) -> Parity | None:
    if found is None:
        return None
    layers = found["layers"]
    coverage = found["coverage"]
    checks = [
        ParityCheck("final integers, whole network", found["total"], found["differing"], f"{found['images']} images"),
        ParityCheck("every layer alone, same input integers", sum(one["total"] for one in layers),
                    sum(one["differing"] for one in layers), f"{len(layers)} layers"),
        ParityCheck("numbers in the file against the bundle", len(layers), len(found["findings"]), "layers; differences"),
    ]  # fmt: skip
    kernels = ", ".join(
        f"{coverage['integer'][kind]} of {total} {kind}" for kind, total in coverage["total"].items() if total
    )
    statement = (
        f"The shipped model.onnx, run by {found['runtime']} with all optimizations on, against the independent integer "
        f"reference on the validation images. Integer kernels: {kernels}."
    )
    return Parity(bool(found.get("passed", found["differing"] <= found["allowed"])), statement, checks)


def _explanation(found: Mapping[str, Any] | None) -> Explanation | None:
    if found is None:
        return None
    rows = [
        Survival(one["constraint"], one["share"], one["low"], one["high"], one["smallest"], one["largest"], one["unit"])
        for one in [*found["constraints"], found["together"]]
    ]
    return Explanation(found["samples"], rows)


def _stages(events: Sequence[Mapping[str, Any]]) -> list[Stage] | None:
    seconds: dict[str, float] = {}
    for event in events:
        if event["event"] == "stage.done":
            seconds[event["stage"]] = seconds.get(event["stage"], 0.0) + event["seconds"]
    return [Stage(name, value) for name, value in seconds.items()] or None


def collect(run: RunDirectory) -> ReportData:
    """Everything the report shows, from the run's files."""
    found = facts(run)
    events = run.events()
    config = run.config()
    timed = _json(run.path / "bench.json")
    where: Mapping[str, Any] = timed["environment"] if timed else environment(config.bench.threads)
    search, cards = None, _cards(found)
    if (run.search / "state.json").exists():
        goals, records = search_results(run)
        if records:
            search = _search(goals, records, found.get("subnet"))
            cards += _search_cards(goals, records)
    versions = {key: str(value) for key, value in where.get("versions", {}).items()}
    machine = {key: _plain(value) for key, value in where.items() if key not in {"versions"}}
    return ReportData(
        title=f"{config.space} on {config.target}",
        summary="A joint search of architecture and bit-widths; every accuracy below is that of integer arithmetic.",
        run=str(run.path),
        facts=cards,
        search=search,
        bits=_bits(bundle.read(run.best), str(found.get("subnet", "")))
        if (run.best / "subnet.json").exists()
        else None,
        training=_training(events),
        bench=_bench(timed),
        parity=_parity(_json(run.best / "parity.json")),
        explanation=_explanation(_json(run.search / "explanation.json")),
        stages=_stages(events),
        config=config.to_yaml(),
        versions=versions,
        machine=machine,
    )


def _plain(value: Any) -> str:
    """For people: ``{"a": ["b", "c"]}`` is ``a: b, c``, several keys on one line."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_plain(one)}" for name, one in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


def report(run: RunDirectory) -> Path:
    """Writes ``report.html`` and returns its path."""
    path = run.path / "report.html"
    write_text(path, render(collect(run)))
    return path
