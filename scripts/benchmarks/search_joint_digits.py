"""Architecture and bits searched together, against architecture first and bits second, on one trained supernet of digits.

All searches are NSGA-II with the same settings, hard limits on BitOPs and bytes, and the same number of evaluations.
What is compared is the hypervolume of (validation accuracy, BitOPs) of everything that a search evaluated within the
limits, as a share of the box between the reference point and (accuracy 1, no BitOPs). Searches in two stages spend half of
their evaluations on each: first architectures at fixed bits everywhere, then bits for some architectures of that front.

* ``joint``: one search, from random subnets.
* ``joint, uniform starts``: one search that begins as a run's search does, with the largest subnets within the limits that
  have the same bits everywhere.
* ``joint, spread starts``: one search with ``spread_starts``: its first generation ranges from few to many BitOPs, with sizes
  and bits around levels of their own, so that large architectures with few bits are there as well as small ones with many.
* ``8 bits, best``: stage 1 at 8 bits, where an architecture only has to fit with the fewest bits; then bits for the most
  accurate one.
* ``8 bits, three``: the same, then bits for three architectures of its front.
* ``4 bits, three``: stage 1 at 4 bits within the limits, so that stage 1 counts as well; then bits for three.
* ``4 bits, best``: the same, then bits for the most accurate one.

Accuracy is that of integer arithmetic with BatchNorm statistics of each subnet's own; it is kept on disk, so that no
subnet is evaluated twice over all searches, and a killed benchmark goes on.

Usage: ``python -m scripts.benchmarks.search_joint_digits RUN --out DIR [--seeds 10] [--evaluations 60]`` with RUN a trained
run: ``nasq run --preset digits --out RUN``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nasq.run.directory import RunDirectory
from nasq.run.evaluation import Evaluation
from nasq.run.flow import open_workshop, prepare
from nasq.run.kept import KeptValues
from nasq.run.sharing import facts_of
from nasq.search import NSGA2, Constraint, Objective, hypervolume
from nasq.search.algorithms.fitness import fitness
from nasq.search.squeeze import are_bits, uniform_starts
from nasq.space import SearchSpace, Subnet
from scripts.benchmarks.nas_bench_201_table import Lines

Rows = NDArray[np.int16]
Floats = NDArray[np.float64]

KINDS = {
    "joint": (None, 0),
    "joint, uniform starts": (None, 1),
    "joint, spread starts": (None, 2),
    "8 bits, best": (8, 1),
    "4 bits, three": (4, 3),
    "4 bits, best": (4, 1),
    "8 bits, three": (8, 3),
}
"""Bits of stage 1 and the architectures that get bits in stage 2; or none, and whether there are starts."""

REFERENCE = 0.9
"""Accuracy of the reference point; that of BitOPs is the limit."""


class Digits:
    """The trained supernet as an evaluator.

    Args:
        run: A trained run.
        directory: Where accuracies are kept.
        bitops, size: The limits.
        views: Each validation image counts this often (``data.validation_views``).
        images: For BatchNorm statistics (``search.recalibration_images``).
    """

    def __init__(self, run: Path, directory: Path, bitops: float, size: float, views: int, images: int) -> None:
        opened = RunDirectory.open(run)
        config = opened.config()
        data = config.data.model_copy(update={"validation_views": views})
        search = config.search.model_copy(update={"recalibration_images": images})
        config = config.model_copy(update={"data": data, "search": search})
        self.workshop = open_workshop(opened, prepare(config))
        self.space = self.workshop.supernet.space
        self.bits = {self.space.names[column] for column in np.flatnonzero(are_bits(self.space))}
        self.limits = {"bitops": bitops, "bytes": size}
        self._evaluation = Evaluation(self.workshop)
        self._kept = KeptValues(directory / "accuracies.jsonl", json.dumps(facts_of(opened, self.workshop)))
        self.evaluated = 0

    def accuracy(self, subnet: Subnet) -> float:
        """Of the validation images, 0..1."""
        return self._kept.get(subnet.id, lambda: self._computed(subnet))["accuracy"]

    def _computed(self, subnet: Subnet) -> dict[str, float]:
        self.evaluated += 1
        value = self._evaluation.accuracy(subnet)
        self._evaluation._statistics.clear()  # thousands of subnets
        return {"accuracy": value}

    def cost(self, name: str, space: SearchSpace, fewest: bool = False) -> Callable[[Rows], Floats]:
        """A cost of rows of a sub-space; with ``fewest``, of the same architectures with the fewest bits everywhere."""
        take, options = self._lift(space, fewest)

        def values(rows: Rows) -> Floats:
            whole = np.repeat(self.space.to_rows([self.space.default()]), len(rows), axis=0)
            for column, (source, table) in enumerate(zip(take, options, strict=True)):
                if source is not None:
                    whole[:, column] = table[rows[:, source]]
                elif len(table):
                    whole[:, column] = table[0]
            return np.asarray(self.workshop.costs.evaluate(self.space.canonical(whole))[name], dtype=np.float64)

        return values

    def _lift(self, space: SearchSpace, fewest: bool) -> tuple[list[int | None], list[NDArray[np.int64]]]:
        """For each column of the whole space: the sub-space's column, and what its options are there."""
        take: list[int | None] = []
        tables: list[NDArray[np.int64]] = []
        for choice in self.space.choices:
            if fewest and choice.name in self.bits:
                take.append(None)
                tables.append(np.zeros(1, dtype=np.int64))
            elif choice.name in space.positions:
                own = space[choice.name]
                take.append(space.positions[choice.name])
                tables.append(np.array([choice.index(option) for option in own.options], dtype=np.int64))
            else:
                take.append(None)
                tables.append(np.zeros(0, dtype=np.int64))
        return take, tables

    def search(
        self, space: SearchSpace, count: int, seed: int, population: int, fewest: bool = False, starts: int = 0
    ) -> list[tuple[Subnet, float, float]]:
        """Subnet, accuracy and BitOPs of everything that one NSGA-II evaluates."""
        bitops = self.cost("bitops", space)
        goals = [
            Objective("accuracy", "", "maximize", self.accuracy),
            Objective("bitops", "", "minimize", bitops, on="rows"),
        ]
        limits = [
            Constraint(name, "", self.cost(name, space, fewest), upper=most) for name, most in self.limits.items()
        ]
        initial = uniform_starts(space, limits) if starts == 1 else []
        algorithm = NSGA2(
            space,
            goals,
            limits,
            population=min(population, count),
            seed=seed,
            initial=initial,
            spread_starts=starts == 2,
        )
        found: list[tuple[Subnet, float, float]] = []
        while len(found) < count and (asked := algorithm.ask()):
            for subnet, cost in zip(asked, bitops(space.to_rows(asked)).tolist(), strict=True):
                value = self.accuracy(subnet) if len(found) < count else 0.0
                algorithm.tell(subnet, {"accuracy": value, "bitops": cost})
                if len(found) < count:
                    found.append((subnet, value, cost))
        return found

    def within(self, subnet: Subnet) -> bool:
        """Whether a subnet keeps the limits."""
        costs = self.workshop.costs.evaluate(self.space.to_rows([subnet]))
        return all(costs[name][0] <= most for name, most in self.limits.items())


def chosen(found: Sequence[tuple[Subnet, float, float]], count: int) -> list[Subnet]:
    """Of the front: the most accurate one, or several that are spread over it."""
    values = np.array([[value, -cost] for _, value, cost in found])
    best = np.flatnonzero(fitness(values) >= 0)
    order = sorted(best.tolist(), key=lambda index: (-values[index, 0], -values[index, 1]))
    places = np.unique(np.linspace(0, len(order) - 1, count).round().astype(int)) if count > 1 else [0]
    return [found[order[place]][0] for place in places]


def run(digits: Digits, kind: str, seed: int, evaluations: int, population: int) -> dict[str, Any]:
    """One search."""
    bits, several = KINDS[kind]
    began = time.process_time()
    if bits is None:
        found = digits.search(digits.space, evaluations, seed, population, starts=several)
    else:
        fixed = {name: (bits,) for name in digits.bits}
        space = digits.space.restrict({n: one for n, one in fixed.items() if one[0] in digits.space[n].options})
        first = digits.search(space, evaluations // 2, seed, population, fewest=bits == 8)
        found = list(first)
        left = evaluations - len(first)
        starts = chosen(first, several)
        for place, subnet in enumerate(starts):
            own = {name: (option,) for name, option in subnet.items() if name not in digits.bits}
            share = left // len(starts) + (place < left % len(starts))
            found += digits.search(digits.space.restrict(own), share, seed, population)
    kept = [(subnet, value, cost) for subnet, value, cost in found if digits.within(subnet)]
    points = [[value, cost] for _, value, cost in kept if value > REFERENCE]
    limit = digits.limits["bitops"]
    volume = hypervolume(np.array(points).reshape(-1, 2), [REFERENCE, limit], ["maximize", "minimize"])
    return {
        "kind": kind,
        "seed": seed,
        "evaluations": len(found),
        "within": len(kept),
        "share": volume / ((1 - REFERENCE) * limit),
        "best": max((value for _, value, _ in kept), default=0.0),
        "seconds": round(time.process_time() - began, 1),
    }


def interval(differences: Floats, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences by bootstrap."""
    rng = np.random.default_rng(0)
    means = differences[rng.integers(0, len(differences), (resamples, len(differences)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summary(lines: list[dict[str, Any]]) -> str:
    """A table: each kind, and how far both joint searches are above it."""
    by = {kind: {one["seed"]: one for one in lines if one["kind"] == kind} for kind in KINDS}
    joint = [kind for kind, (bits, _) in KINDS.items() if bits is None]
    head = ["search", "runs", "evaluations", "hypervolume, % of the box", "best accuracy, %"]
    head += [f"{kind!r} minus this, 95 % interval; wins" for kind in joint]
    text = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind, runs in by.items():
        if len(runs) < 2:
            continue
        shares, best = ([100 * one[name] for one in runs.values()] for name in ("share", "best"))
        cells = [kind, str(len(runs)), f"{np.mean([one['evaluations'] for one in runs.values()]):.0f}"]
        cells += [f"{np.mean(one):.2f} ± {np.std(one, ddof=1):.2f}" for one in (shares, best)]
        cells += ["" if kind in joint else ahead(by[other], runs) for other in joint]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def ahead(ours: dict[int, Any], others: dict[int, Any]) -> str:
    """Paired by seed: the mean difference, its interval, and how often it is above 0."""
    seeds = sorted(ours.keys() & others.keys())
    if len(seeds) < 2:
        return ""
    differences = np.array([100 * (ours[seed]["share"] - others[seed]["share"]) for seed in seeds])
    low, high = interval(differences)
    return f"{differences.mean():+.2f} ({low:+.2f} to {high:+.2f}); {(differences > 0).sum()} of {len(seeds)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="directory of accuracies and results")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--population", type=int, default=8)
    parser.add_argument("--bitops", type=float, default=12e6)
    parser.add_argument("--bytes", type=float, default=40e3)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--recalibration-images", type=int, default=256)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"runs-{options.evaluations}-{options.population}-{options.bitops:.0f}-{options.bytes:.0f}-{options.views}.jsonl"
    lines = Lines(options.out / name, ("kind", "seed"))
    digits = Digits(
        options.run, options.out, options.bitops, options.bytes, options.views, options.recalibration_images
    )
    for seed in range(options.seeds):
        for kind in options.kinds:
            if lines.missing(kind=kind, seed=seed):
                lines.add(run(digits, kind, seed, options.evaluations, options.population))
    print(summary(lines.all))


if __name__ == "__main__":
    main()
