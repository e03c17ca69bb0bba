"""Every algorithm on NAS-Bench-201 by table: test accuracy after 50, 100 and 200 evaluations, and how long to the best.

The search sees the validation accuracy of one training seed, drawn once per run; what is reported is the mean CIFAR-10
test accuracy of the cell that the algorithm would take. Hyperband and BOHB see 12-epoch accuracies as well, which cost
0.06 of an evaluation; the table has them for the test images only.

Usage: ``python -m scripts.benchmarks.search_nas_bench_201 TABLES --out RUNS.jsonl [--algorithms NAME ...] [--seeds 50]``
with TABLES the directory of the tables. Runs that are in the file already are not run again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from nasq.search.algorithms import ALGORITHMS, Hyperband
from scripts.benchmarks.nas_bench_201_table import Floats, Lines, Table201

CHECKPOINTS = (50, 100, 200)
CURVE = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100, 120, 140, 160, 180, 200, 250, 300, 400, 500)
NEAR = 0.1
"""Points below the optimum that count as reached."""

SETTINGS: dict[str, dict[str, Any]] = {
    "random": {"population": 10},
    "regularized_evolution": {"population": 20, "sample": 10},
    "genetic": {"population": 20, "batch": 5},
    "local_search": {"population": 10},
    "reinforce": {"population": 10},
    "tpe": {"population": 10},
    "gp": {"population": 10},
    "optuna_nsga2": {"population": 20},
    "predictor_forest": {"population": 10, "batch": 10},
    "predictor_boosted": {"population": 10, "batch": 10},
    "predictor_cqap": {"population": 10, "batch": 10},
    "bananas": {"population": 10, "batch": 5},
    "successive_halving": {"population": 96, "eta": 16, "lowest": 1 / 16},
    "hyperband": {"population": 96, "eta": 16, "lowest": 1 / 16},
    "bohb": {"population": 96, "eta": 16, "lowest": 1 / 16},
}
"""Of each algorithm; the rest are defaults."""

SHORT = 12 / 200
"""What a 12-epoch training costs."""


class Progress:
    """What a run has found so far, by what it has spent."""

    def __init__(self, table: Table201, seen: Floats, budget: int) -> None:
        self.table, self.seen, self.budget = table, seen, budget
        self.spent, self.best = 0.0, -np.inf
        self.taken = -1
        self.curve: list[tuple[float, float]] = []
        self.reached: float | None = None

    def full(self, index: int) -> None:
        """A full evaluation."""
        self.spent += 1
        if self.seen[index] > self.best:
            self.best, self.taken = self.seen[index], index
        self.curve.append((self.spent, float(self.table.test[self.taken])))
        if self.reached is None and self.table.test[index] >= self.table.test.max() - NEAR:
            self.reached = self.spent


def run(table: Table201, name: str, seed: int, budget: int) -> dict[str, Any]:
    """One search."""
    seen = table.observed(np.random.default_rng([seed, 201]))
    entry = ALGORITHMS[name]
    settings = {**entry.settings, **SETTINGS[name], "seed": seed}
    if "predictor" in settings:
        settings["features"] = table.features()
    algorithm = entry.kind(table.space, [table.objective()], **settings)
    progress, began = Progress(table, seen, budget), time.process_time()
    own: dict[str, float] = {}
    while progress.spent < budget:
        fidelity = algorithm.fidelity if isinstance(algorithm, Hyperband) else 1.0
        asked = algorithm.ask()
        if not asked:
            break
        for subnet, index in zip(asked, table.at(table.space.to_rows(asked)).tolist(), strict=True):
            if fidelity == 1.0:
                progress.full(index)
                algorithm.tell(subnet, {"accuracy": float(seen[index])})
            else:
                progress.spent += SHORT
                algorithm.tell(subnet, {"accuracy": float(table.short[index])})
        if progress.spent in CHECKPOINTS and "predictor" in settings:
            best = table.at(table.space.to_rows([algorithm.best()]))[0]
            own[str(int(progress.spent))] = float(table.test[best])
    return {
        "algorithm": name,
        "seed": seed,
        "budget": budget,
        "curve": [_at(progress.curve, point) for point in CURVE if point <= budget],
        "own": own,
        "reached": progress.reached,
        "seconds": round(time.process_time() - began, 2),
    }


def _at(curve: list[tuple[float, float]], spent: float) -> float | None:
    """Test accuracy of the best seen when ``spent`` was not yet exceeded."""
    before = [value for at, value in curve if at <= spent + 1e-9]
    return before[-1] if before else None


def summary(lines: list[dict[str, Any]]) -> str:
    """A table of all runs."""
    text = []
    for name in SETTINGS:
        runs = [line for line in lines if line["algorithm"] == name]
        if not runs:
            continue
        cells = []
        for point in CHECKPOINTS:
            place = CURVE.index(point)
            observed = np.array([one["curve"][place] for one in runs if len(one["curve"]) > place], dtype=float)
            cells.append(f"{observed.mean():.2f} ± {observed.std(ddof=1):.2f}" if len(observed) > 1 else "")
            own = np.array([one["own"][str(point)] for one in runs if str(point) in one["own"]])
            if len(own) > 1:
                cells[-1] += f" (own choice {own.mean():.2f} ± {own.std(ddof=1):.2f})"
        reached = np.array([one["reached"] if one["reached"] is not None else np.inf for one in runs])
        median, share = np.median(reached), np.isfinite(reached).mean()
        budget = max(one["budget"] for one in runs)
        late = f"{median:.0f}" if np.isfinite(median) else f"> {budget}"
        seconds = np.mean([one["seconds"] for one in runs])
        text.append(
            f"| {name} | {len(runs)} | {' | '.join(cells)} | {late} | {share:.0%} of {budget} | {seconds:.1f} |"
        )
    head = "| algorithm | runs | 50 | 100 | 200 | evaluations to within 0.1 | reached | CPU s per run |"
    return "\n".join([head, "|---" * 8 + "|", *text])


def curves(lines: list[dict[str, Any]]) -> str:
    """Mean regret (points below the best test accuracy) as CSV."""
    rows = ["algorithm,evaluations,mean_test,runs"]
    for name in SETTINGS:
        runs = [line["curve"] for line in lines if line["algorithm"] == name]
        for place, point in enumerate(CURVE):
            values = [one[place] for one in runs if len(one) > place and one[place] is not None]
            if values and len(values) == len(runs):
                rows.append(f"{name},{point},{np.mean(values):.4f},{len(values)}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--algorithms", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--curves", type=Path, help="where to write mean curves as CSV")
    options = parser.parse_args()
    table, lines = Table201(options.tables), Lines(options.out, ("algorithm", "seed"))
    for name in options.algorithms:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            if lines.missing(algorithm=name, seed=seed):
                lines.add(run(table, name, seed, options.budget))
    print(summary(lines.all))
    if options.curves:
        options.curves.write_text(curves(lines.all) + "\n")


if __name__ == "__main__":
    main()
