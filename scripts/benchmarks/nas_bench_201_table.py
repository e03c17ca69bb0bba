"""NAS-Bench-201 as a table to search in: rows of the installed space, accuracies of single training seeds, latencies."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nasq
from nasq import plugins
from nasq.ranking.table_names import from_official_name
from nasq.search import Objective
from nasq.space import SearchSpace, Subnet

Floats = NDArray[np.float64]

SEEDS = (777, 888, 999)
"""Of the published trainings; half of the cells lack the last one."""


def columns(path: Path) -> dict[str, list[str]]:
    """A gzipped CSV file by column."""
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def numbers(cells: Iterable[str]) -> Floats:
    """Floats; NaN where a cell is empty."""
    return np.array([float(cell) if cell else np.nan for cell in cells])


class Table201:
    """The 15,625 cells.

    Args:
        directory: Holds ``nas_bench_201_cifar10.csv.gz`` and ``nas_bench_201_latency_ms.csv.gz``.
    """

    def __init__(self, directory: Path) -> None:
        network = plugins.load("search_spaces", "nas_bench_201")(C=4, N=1)
        self.space: SearchSpace = nasq.Supernet(network, "nas_bench_201").space
        read = columns(directory / "nas_bench_201_cifar10.csv.gz")
        self.names = read["arch_str"]
        self.rows = self.space.to_rows([from_official_name(network, name) for name in self.names])
        self.index = np.full(5**6, -1)
        self.index[self._digits(self.rows)] = np.arange(len(self.rows))
        self.validation = np.stack([numbers(read[f"cifar10_valid_200_seed{seed}"]) for seed in SEEDS], axis=1)
        self.test, self.short = numbers(read["cifar10_test_200"]), numbers(read["cifar10_test_12"])
        self.params = numbers(read["params_m"])
        latency = columns(directory / "nas_bench_201_latency_ms.csv.gz")
        self.latency = {name: numbers(cells) for name, cells in latency.items() if name != "arch_index"}

    def _digits(self, rows: NDArray[np.int16]) -> NDArray[np.int64]:
        return rows.astype(np.int64) @ 5 ** np.arange(6)

    def at(self, rows: NDArray[np.int16]) -> NDArray[np.int64]:
        """The official index ``[n]`` of rows ``[n, 6]``."""
        return np.asarray(self.index[self._digits(rows)])

    def observed(self, rng: np.random.Generator) -> Floats:
        """Validation accuracies ``[15625]`` of one training seed, drawn once; a cell without it has one of its others."""
        seed = int(rng.integers(len(SEEDS)))
        other = self.validation[np.arange(len(self.rows)), rng.integers(0, 2, len(self.rows))]
        return np.where(np.isnan(self.validation[:, seed]), other, self.validation[:, seed])

    def lookup(self, values: Floats) -> Callable[[NDArray[np.int16]], Floats]:
        """A function on rows."""
        return lambda rows: values[self.at(rows)]

    def objective(self, name: str = "accuracy") -> Objective:
        """To maximise; the benchmarks tell its values themselves."""

        def refused(subnet: Subnet) -> float:
            raise AssertionError(f"{subnet.id} is told, not evaluated")

        return Objective(name, "%", "maximize", refused)

    def features(self) -> Callable[[NDArray[np.int16]], Floats]:
        """Parameters, for predictors: known without any training."""
        return lambda rows: self.params[self.at(rows)][:, None]


class Lines:
    """Results as lines of JSON, one per run: what is there is not run again."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self._keys = path, keys
        text = path.read_text() if path.exists() else ""
        self.all: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        self._known = {self._key(line) for line in self.all}

    def _key(self, line: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(line[name] for name in self._keys)

    def missing(self, **key: Any) -> bool:
        """Whether a run is not there."""
        return self._key(key) not in self._known

    def add(self, line: dict[str, Any]) -> None:
        """Appends one."""
        self.all.append(line)
        self._known.add(self._key(line))
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
