"""Tables from published files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from nasq.errors import ArtifactError, InputError, choose_from
from nasq.ranking.table import Table, read_text
from nasq.ranking.table_records import read_records

__all__ = ["KINDS", "import_table"]


def import_table(kind: str, path: Path) -> Table:
    """A table from a published file.

    Args:
        kind: One of :data:`KINDS`.
        path: The file.

    Raises:
        InputError: The kind is unknown, or the file is not there.
        ArtifactError: The file is not of that kind.
    """
    if kind not in KINDS:
        raise choose_from("kind of table", kind, KINDS)
    return KINDS[kind](path)


def _csv(path: Path) -> Table:
    return Table.read(path)


def _nas_bench_201(path: Path) -> Table:
    """The official ``.pth``, or CSV with a column ``arch_str``."""
    if path.suffix == ".pth":
        return _official_201(path)
    if path.name.endswith((".pbz2", ".pickle")):
        raise InputError(
            f"{path} is a pickle, which could run any code while it is read. Write a CSV from it with its own package (see "
            "docs/tables.md), or give the official NAS-Bench-201 .pth file."
        )
    table = Table.parse(read_text(path), str(path), names="arch_str", skip=("arch_index",))
    return _with_counts(table, {"params_m": ("params", 1e6)})


def _with_counts(table: Table, scales: Mapping[str, tuple[str, float]]) -> Table:
    """Metrics in millions as whole counts."""
    metrics = {}
    for name, values in table.metrics.items():
        fresh, factor = scales.get(name, (name, 0.0))
        metrics[fresh] = np.rint(values * factor) if factor else values
    return Table(metrics, table.names, table.subnets, table.source)


def _official_201(path: Path) -> Table:
    # With weights_only, torch's reader makes tensors, numbers and containers and nothing else: it runs no code.
    content = _load_weights_only(path)
    try:
        names = [str(name) for name in content["meta_archs"]]
        infos = content["arch2infos"]
        rows = [_metrics_201(infos[index]) for index in range(len(names))]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is no NAS-Bench-201 file: {error!r}. Give NAS-Bench-201-v1_1-096897.pth or another official one."
        ) from error
    return Table(_columns(rows, _ORDER_201), names, source=str(path))


def _load_weights_only(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. Give the path of a file that exists.") from error
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ArtifactError(f"{path} cannot be read: {first} It is corrupt, or another kind of file.") from error


_SETS_201 = {
    "cifar10-valid": "cifar10",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "ImageNet16-120": "imagenet16_120",
}
_SPLITS_201 = {
    "cifar10-valid": {"x-valid": "valid"}, "cifar10": {"ori-test": "test"},
    "cifar100": {"x-valid": "valid", "x-test": "test"}, "ImageNet16-120": {"x-valid": "valid", "x-test": "test"},
}  # fmt: skip
_LENGTHS_201 = {"full": 200, "less": 12}
_ORDER_201 = [
    f"{_SETS_201[data]}_{split}_{epochs}"
    for epochs in _LENGTHS_201.values()
    for data, splits in _SPLITS_201.items()
    for split in splits.values()
] + ["params", "flops"]


def _metrics_201(info: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies in %, mean over the seeds at the last epoch; parameters and FLOPs of the CIFAR-10 network."""
    found: dict[str, list[float]] = {}
    counts: dict[str, float] = {}
    for length, epochs in _LENGTHS_201.items():
        for (data, _), result in info[length]["all_results"].items():
            for split, name in _SPLITS_201.get(data, {}).items():
                value = result["eval_acc1es"].get(f"{split}@{result['epochs'] - 1}")
                if value is not None:
                    found.setdefault(f"{_SETS_201[data]}_{name}_{epochs}", []).append(float(value))
            if _SETS_201.get(data) == "cifar10":
                counts = {"params": round(1e6 * result["params"]), "flops": round(1e6 * result["flop"])}
    return {**{name: fmean(values) for name, values in found.items()}, **counts}


def _columns(rows: Iterable[Mapping[str, float]], order: Iterable[str]) -> dict[str, Any]:
    kept = list(rows)
    columns = {name: np.array([row.get(name, nan) for row in kept]) for name in order}
    return {name: values for name, values in columns.items() if not np.isnan(values).all()}


def _nas_bench_macro(path: Path) -> Table:
    """The official JSON, or CSV with a column ``arch``."""
    text = read_text(path)
    if not text.lstrip().startswith("{"):
        return Table.parse(text, str(path), names="arch")
    try:
        content = json.loads(text)
        rows = [
            {
                "mean_acc": float(row["mean_acc"]),
                **{f"test_acc_{number}": float(value) for number, value in enumerate(row["test_acc"])},
                **{name: float(row[name]) for name in ("std", "params", "flops")},
            }
            for row in content.values()
        ]
        order = dict.fromkeys(name for row in rows for name in row)
        return Table(_columns(rows, order), list(content), source=str(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path} is no NAS-Bench-Macro file: {error!r}. Give nas-bench-macro_cifar10.json, or CSV with a column 'arch'."
        ) from error


def _nas_bench_101(path: Path) -> Table:
    """The official TFRecord file: mean over the repeats, accuracies in %."""
    sums: dict[str, dict[str, list[float]]] = {}
    for record in read_records(path):
        row = sums.setdefault(record.cell, {})
        for name in ("validation_accuracy", "test_accuracy", "train_accuracy"):
            row.setdefault(f"{name}_{record.epochs}", []).append(100 * record.final[name])
        row.setdefault(f"training_time_{record.epochs}", []).append(record.final["training_time"])
        row.setdefault("params", [float(record.params)])
    if not sums:
        raise ArtifactError(f"{path} holds no records. Give nasbench_only108.tfrecord.")
    order = dict.fromkeys(name for row in sums.values() for name in row if name != "params")
    # The longest training first: it is what a score is compared with where no metric is named.
    longest = sorted(order, key=lambda name: -int(name.rpartition("_")[2]))
    rows = [{name: fmean(values) for name, values in row.items()} for row in sums.values()]
    return Table(_columns(rows, [*longest, "params"]), list(sums), source=str(path))


KINDS: dict[str, Callable[[Path], Table]] = {
    "nas-bench-101": _nas_bench_101,
    "nas-bench-201": _nas_bench_201,
    "nas-bench-macro": _nas_bench_macro,
    "csv": _csv,
}
"""Readers by kind."""
