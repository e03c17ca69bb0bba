"""A trained combination for NAS-Bench-201: a Gaussian process on what a cell's graph says, learned from few trained cells.

Usage::

    python -m scripts.benchmarks.nas_bench_201_combination draws --data-root DATA [--train 78 156 469] [--draws 10]
    python -m scripts.benchmarks.nas_bench_201_combination scores SCORES.csv --data-root DATA [--train 78]
    python -m scripts.benchmarks.nas_bench_201_combination column --data-root DATA --out all.csv.gz [--gradsign GRADSIGN.csv]

The features are counted on the edges that lie on a path from input to output: which operator each has; how many there are
of each, and their parameters; how many paths there are, how many convolutions the longest, the shortest and the average one
have, and whether one has none, only skips, or a pooling and skips. The process has one length scale and a noise, both fitted
to the training cells, and learns the ranks of validation accuracies; it is tested on the test accuracies of all cells that it
was not trained on.
``scores`` does the same on the cells of a file of scores, and adds the scores' ranks to the features, or takes them alone.
``column`` writes every cell's prediction, trained on the first draw, and its GradSign where that is known.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nasq.search_spaces.nas_bench_201 import EDGES, OPERATORS, from_arch_str
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from nasq.deploy.bench import environment
from nasq.files import write_bytes
from nasq.ranking import ranks
from nasq.ranking.statistics import kendall, spearman
from nasq.run.score_file import column, read_scores
from nasq.space import Option
from scripts.benchmarks.nas_bench_201_column import COSTS

TRUTH = "tables/nas_bench_201_cifar10.csv.gz"
PATHS = (((3, 0),), ((1, 0), (3, 1)), ((2, 0), (3, 2)), ((1, 0), (2, 1), (3, 2)))
"""The edges of every way from input to output."""
MILLIONS = {"nor_conv_1x1": 0.028, "nor_conv_3x3": 0.24304}
FREE = ("skip_connect", "avg_pool_3x3")
Floats = NDArray[np.float64]


def features(subnet: Mapping[str, Option]) -> list[float]:
    """See the module's docstring."""
    operators = {edge: str(subnet[f"node{edge[0]}.input{edge[1]}"]) for edge in EDGES}
    paths = [[operators[edge] for edge in path] for path in PATHS if all(operators[edge] != "none" for edge in path)]
    alive = {edge for path in PATHS if all(operators[edge] != "none" for edge in path) for edge in path}
    living = [operators[edge] for edge in EDGES if edge in alive]
    found = [float(edge in alive and operators[edge] == one) for edge in EDGES for one in OPERATORS[1:]]
    found += [float(living.count(one)) for one in OPERATORS[1:]]
    found += [sum(MILLIONS.get(one, 0.0) for one in living), float(len(paths)), float(not paths)]
    depths = [sum(one in MILLIONS for one in path) for path in paths] or [0]
    found += [max(depths), min(depths), float(np.mean(depths)), float(depths.count(0) if paths else 0)]
    found += [float(any(set(path) == {"skip_connect"} for path in paths))]
    found += [float(any("avg_pool_3x3" in path and set(path) <= set(FREE) for path in paths))]
    found += [float(max((path.count("nor_conv_3x3") for path in paths), default=0))]
    found += [float(min((path.count("avg_pool_3x3") for path in paths), default=3))]
    return found


def alive_parameters(rows: Floats) -> Floats:
    """The column of :func:`features` with million parameters on paths; cells without a path come last."""
    at = (len(OPERATORS) - 1) * (len(EDGES) + 1)
    return np.where(rows[:, at + 2] > 0, -1.0, rows[:, at])


def predicted(x: Floats, y: Floats, train: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Means and deviations for all rows of ``x``, learned from the ranks of ``y`` among the rows ``train``."""
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    targets = ranks(y[train])
    targets = (targets - targets.mean()) / targets.std()
    kernel = ConstantKernel() * RBF(5.0, (0.5, 100.0)) + WhiteKernel(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a bound that is reached is an answer, too
        process = GaussianProcessRegressor(kernel, random_state=0).fit(x[train], targets)
    parts = [process.predict(part, return_std=True) for part in np.array_split(x, max(1, len(x) // 2000))]
    return np.concatenate([mean for mean, _ in parts]), np.concatenate([std for _, std in parts])


def table(root: Path) -> list[dict[str, str]]:
    """The rows in the order of their official indices."""
    with gzip.open(root / TRUTH, "rt", newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: int(row["arch_index"]))


def accuracies(rows: Iterable[Mapping[str, str]]) -> tuple[Floats, Floats]:
    """Validation and test."""
    kept = list(rows)
    valid, test = (np.array([float(row[f"cifar10_{one}_200"]) for row in kept]) for one in ("valid", "test"))
    return valid, test


def trial(
    sets: Mapping[str, Floats], beside: Mapping[str, Floats], worth: tuple[Floats, Floats], train: int, draws: int
) -> list[dict[str, Any]]:
    """Kendall and Spearman on the cells left out, for every set of features; ``beside`` is not learned from."""
    valid, test = worth
    taus: dict[str, list[float]] = {}
    rhos: dict[str, list[float]] = {}
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(test))
        chosen, rest = order[:train], order[train:]
        values = {name: predicted(x, valid, chosen)[0] for name, x in sets.items()}
        for name, own in {**values, **beside}.items():
            taus.setdefault(name, []).append(kendall(own[rest], test[rest]))
            rhos.setdefault(name, []).append(spearman(own[rest], test[rest]))
    return [
        {"features": name, "trained_on": train if name in sets else 0, "tested_on": len(test) - train, "draws": draws,
         "kendall_mean": round(float(np.mean(found)), 3), "kendall_std": round(float(np.std(found)), 3),
         "kendall_least": round(min(found), 3), "spearman_mean": round(float(np.mean(rhos[name])), 3)}
        for name, found in taus.items()
    ]  # fmt: skip


def on_all(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = table(options.data_root)
    x = np.array([features(from_arch_str(row["arch_str"])) for row in rows])
    beside = {"alive parameters": alive_parameters(x), "parameters": np.array([float(row["params_m"]) for row in rows])}
    found = []
    for train in options.train:
        found += trial({"cell graph": x}, beside, accuracies(rows), train, options.draws)
        print(json.dumps(found[-3]), file=sys.stderr, flush=True)
    return found


def with_scores(options: argparse.Namespace) -> list[dict[str, Any]]:
    truth = {row["arch_str"]: row for row in table(options.data_root)}
    rows, names = read_scores(options.scores)
    rows = [row for row in rows if all(row[name] not in {"", "nan"} for name in names)]
    graph = np.array([features(from_arch_str(row["name"])) for row in rows])
    scored = np.array([ranks(column(rows, name)) for name in names]).T
    beside = {"alive parameters": alive_parameters(graph), **dict(zip(names, scored.T, strict=True))}
    sets = {"cell graph": graph, "scores": scored, "cell graph and scores": np.hstack([graph, scored])}
    worth = accuracies(truth[row["name"]] for row in rows)
    return [one for train in options.train for one in trial(sets, beside, worth, train, options.draws)]


def write_column(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = table(options.data_root)
    x = np.array([features(from_arch_str(row["arch_str"])) for row in rows])
    chosen = np.random.default_rng(0).permutation(len(rows))[: options.train[0]]
    mean, std = predicted(x, accuracies(rows)[0], chosen)
    own, alive = set(chosen.tolist()), alive_parameters(x)
    known: dict[int, dict[str, str]] = {}
    if options.gradsign is not None:
        with options.gradsign.open(newline="") as file:
            known = {int(row["arch_index"]): row for row in csv.DictReader(file)}
    lines = []
    for index, row in enumerate(rows):
        scored = known.get(index, {})
        costs = _costs(row["arch_str"])
        cells = [
            index,
            *costs,
            round(1e6 * max(alive[index], 0.0)),
            f"{mean[index]:.4f}",
            f"{std[index]:.4f}",
            int(index in own),
        ]
        lines.append(",".join(map(str, [*cells, scored.get("gradsign", ""), scored.get("representative", "")])))
    head = "arch_index,params,flops,alive_params,combination,combination_std,trained_on,gradsign,gradsign_of"
    text = "\n".join([head, *lines]) + "\n"
    write_bytes(options.out, gzip.compress(text.encode(), mtime=0))
    test = accuracies(rows)[1]
    at = [index for index in known if index not in own]
    values = np.array([float(known[index]["gradsign"]) for index in at])
    return [
        {"out": str(options.out), "cells": len(lines), "with_gradsign": len(known)},
        *({"score": name, "cells": len(at), "spearman": round(spearman(one, test[at]), 3),
           "kendall": round(kendall(one, test[at]), 3)}
          for name, one in (("gradsign", values), ("alive parameters", alive[at]), ("combination", mean[at])) if at),
    ]  # fmt: skip


def _costs(arch: str) -> tuple[int, int]:
    """Parameters and multiply-adds."""
    ones, threes = arch.count("nor_conv_1x1"), arch.count("nor_conv_3x3")
    return tuple(fixed + ones * one + threes * three for fixed, one, three in COSTS.values())  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("draws", "scores", "column"):
        one = commands.add_parser(name)
        if name == "scores":
            one.add_argument("scores", type=Path)
        if name == "column":
            one.add_argument("--out", type=Path, required=True, help="a .csv.gz")
            one.add_argument("--gradsign", type=Path, default=None, help="made by nas_bench_201_column expand")
        one.add_argument("--data-root", type=Path, required=True)
        one.add_argument("--train", type=int, nargs="+", default=[78, 156, 469] if name == "draws" else [78])
        one.add_argument("--draws", type=int, default=10)
    options = parser.parse_args()
    result = {"draws": on_all, "scores": with_scores, "column": write_column}[options.command](options)
    json.dump({"command": options.command, "rows": result, "environment": environment(1)}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
