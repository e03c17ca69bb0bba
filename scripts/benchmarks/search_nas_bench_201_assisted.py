"""Searches with and without assistance by a score, on NAS-Bench-201 by table, with p-values.

Each algorithm runs plain, assisted by parameters, and, if a score file (``nasq score``) is given, by a column of it and by
two votes of both; then all search the sub-table of the cells that have a score, as a hard constraint. What is compared is
the mean test accuracy of the cell with the best validation accuracy (one training seed, drawn once per run) after 50
evaluations. p: one-sided Mann-Whitney U test that the assisted form is better.

Usage: ``python -m scripts.benchmarks.search_nas_bench_201_assisted TABLES --out RUNS.jsonl [--scores FILE.csv --column
gradsign]``.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, rankdata, spearmanr

from nasq.search import Constraint
from nasq.search.algorithms import ALGORITHMS, Assist
from scripts.benchmarks.nas_bench_201_table import Floats, Lines, Table201

SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"population": 10},
    "regularized_evolution": {"population": 20, "sample": 10},
    "reinforce": {"population": 10},
    "local_search": {"population": 10},
    "tpe": {"population": 10},
}


def scores(table: Table201, path: Path, column: str) -> Floats:
    """A column of a score file, by ``name`` or ``arch_index``, ``[15625]``; NaN where a cell has none."""
    found = np.full(len(table.names), np.nan)
    place = {name: index for index, name in enumerate(table.names)}
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", newline="") as file:
        for row in csv.DictReader(file):
            if row.get(column):
                index = int(row["arch_index"]) if "arch_index" in row else place[row["name"]]
                found[index] = float(row[column])
    return found


def together(name: str, values: Floats, params: Floats, allowed: NDArray[np.bool_]) -> dict[str, Floats]:
    """Two votes of a score and parameters: the sum of their ranks among the allowed cells, and the worse rank."""
    ranks = np.zeros((2, len(values)))
    ranks[:, allowed] = [rankdata(column[allowed]) for column in (values, params)]
    return {f"{name} + params": ranks.sum(axis=0), f"min({name}, params)": ranks.min(axis=0)}


def facts(score: Floats, test: Floats, draws: int = 20_000) -> str:
    """How a score orders all cells, how the best tenth of them, and what taking the best of ten random cells gives."""
    top = test >= np.quantile(test, 0.9)
    everywhere, there = (spearmanr(score[one], test[one]).statistic for one in (np.ones_like(top), top))
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(test), (draws, 10))
    best = test[drawn[np.arange(draws), score[drawn].argmax(axis=1)]]
    return (
        f"Spearman with test accuracy {everywhere:.3f} over {len(test)} cells, {there:.3f} over the best tenth; best "
        f"of 10 by it: {best.mean():.2f} ± {best.std():.2f}, {(best >= 93.5).mean():.1%} at least 93.5"
    )


def run(table: Table201, name: str, seed: int, budget: int, allowed: NDArray[np.bool_], assist: Assist | None) -> float:
    """Test accuracy of the cell that one search would take."""
    seen = table.observed(np.random.default_rng([seed, 201]))
    constraints: Sequence[Constraint] = ()
    if not allowed.all():
        constraints = [Constraint("scored", "", table.lookup(allowed.astype(float)), lower=1.0)]
    entry = ALGORITHMS[name]
    settings = {**entry.settings, **SETTINGS[name], "seed": seed, "assist": assist}
    algorithm = entry.kind(table.space, [table.objective()], constraints, **settings)
    found: list[int] = []
    while len(found) < budget and (asked := algorithm.ask()):
        places = table.at(table.space.to_rows(asked)).tolist()
        for subnet, index in zip(asked, places, strict=True):
            algorithm.tell(subnet, {"accuracy": float(seen[index])})
        found += places
    return float(table.test[max(found[:budget], key=lambda index: seen[index])])


def summary(lines: list[dict[str, Any]]) -> str:
    """Means, deviations and p-values."""
    text = ["| cells | algorithm | assisted by | runs | test accuracy | p against plain | p against params |"]
    text.append("|---" * 7 + "|")
    groups = {(line["cells"], line["algorithm"]) for line in lines}
    for cells, algorithm in sorted(groups, key=lambda one: (-one[0], list(SETTINGS).index(one[1]))):
        values: dict[str, list[float]] = {}
        for line in lines:
            if (line["cells"], line["algorithm"]) == (cells, algorithm):
                values.setdefault(line["assist"], []).append(line["test"])
        for assist, own in values.items():
            strength = assist.rpartition(", ")[2] if "/" in assist else ""
            chances = [
                f"{mannwhitneyu(own, values[other], alternative='greater').pvalue:.2g}"
                if other in values and other != assist and assist != "-"
                else ""
                for other in ("-", f"params, {strength}" if strength else "params")
            ]
            shown = f"{np.mean(own):.2f} ± {np.std(own, ddof=1):.2f}"
            text.append(f"| {cells} | {algorithm} | {assist} | {len(own)} | {shown} | {' | '.join(chances)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--algorithms", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--scores", type=Path)
    parser.add_argument("--column", default="gradsign")
    parser.add_argument("--assists", nargs="*", help="of the names in the table, such as -; default: all")
    parser.add_argument("--starts", type=int, default=10, help="proposals for each start; see nasq.search.Assist")
    parser.add_argument("--offspring", type=int, default=4, help="proposals for each later one")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=50)
    options = parser.parse_args()
    table = Table201(options.tables)
    lines = Lines(options.out, ("cells", "algorithm", "assist", "seed"))
    columns: dict[str, Floats | None] = {"-": None, "params": table.params}
    allowed = np.ones(len(table.names), dtype=bool)
    if options.scores:
        values = scores(table, options.scores, options.column)
        allowed = np.isfinite(values)
        columns[options.column] = np.where(allowed, values, 0.0)
        columns |= together(options.column, values, table.params, allowed)
        for name, column in columns.items():
            if column is not None:
                print(f"{name}: {facts(column[allowed], table.test[allowed])}")
    wanted = {label: column for label, column in columns.items() if label in (options.assists or columns)}
    for name, (label, column) in itertools.product(options.algorithms, wanted.items()):
        assist = None if column is None else Assist(label, table.lookup(column), options.starts, options.offspring)
        if assist and (assist.starts, assist.offspring) != (10, 4):
            label += f", {assist.starts}/{assist.offspring}"
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            key = {"cells": int(allowed.sum()), "algorithm": name, "assist": label, "seed": seed}
            if lines.missing(**key):
                lines.add({**key, "test": run(table, name, seed, options.budget, allowed, assist)})
    print(summary(lines.all))


if __name__ == "__main__":
    main()
