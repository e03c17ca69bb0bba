"""Candidates per second of processor time: genetic operators on arrays, predictors on arrays, ask and tell.

Usage: ``python -m scripts.benchmarks.search_overhead [--space digits_mobile] [--rows 20000]``. The space is joint: bits
are choices too. Genetic operators are tournament, crossover, mutation, canonical form, de-duplication and a limit on
bytes; predictors include encoding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import nasq
from nasq import plugins
from nasq.deploy.bench import environment
from nasq.quant import quantize
from nasq.search import NSGA2, Constraint, Objective, RegularizedEvolution, measures
from nasq.search.algorithms.generational import Generational
from nasq.search.predictors.ensembles import predictor


def best_rate(count: int, function: Callable[[], Any], repeats: int) -> int:
    """``count`` per second of processor time, the best of some runs."""
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        seconds.append(time.process_time() - began)
    return round(count / min(seconds))


def generation(algorithm: Generational, values: np.ndarray[Any, Any]) -> None:
    """Tells a whole generation made-up values."""
    for subnet, value in zip(algorithm.ask(), values.tolist(), strict=False):
        algorithm.tell(subnet, {"accuracy": value, "bytes": -value})


def measure(name: str, rows: int, repeats: int) -> dict[str, Any]:
    """All rates on one space."""
    factory = plugins.load("search_spaces", name)
    example = torch.zeros(1, *plugins.space_info(factory).input_shape)
    supernet = nasq.Supernet(quantize(factory(), example), name)
    costs = measures(nasq.cost.CostModel(supernet).evaluate, {"bytes": "B"})["bytes"]
    space, rng = supernet.space, np.random.default_rng(0)
    drawn = space.sample_batch(rows, rng)
    limit = Constraint("bytes", "B", costs.function, upper=float(np.median(costs(drawn[:1000]))))
    objectives = [
        Objective("accuracy", "", "maximize", lambda subnet: 0.0),
        Objective("bytes", "B", "minimize", costs.function, on="rows"),
    ]
    genetic = NSGA2(space, objectives, [limit], population=50, batch=2000)
    generation(genetic, rng.random(50))
    found: dict[str, Any] = {"space": name, "choices": len(space)}
    found["genetic_operators_per_second"] = best_rate(2000, lambda: genetic._next(np.random.default_rng(1)), repeats)
    for kind in ("mlp", "forest"):
        model = predictor(kind, space)
        model.fit(drawn[:200], rng.random(200), 0)
        found[f"{kind}_scores_per_second"] = best_rate(rows, lambda model=model: model(drawn), repeats)  # type: ignore[misc]
    evolution = RegularizedEvolution(space, objectives[:1], [limit])
    generation(evolution, rng.random(20))

    def hundred() -> None:
        for value in rng.random(100):
            generation(evolution, np.array([value]))

    found["ask_and_tell_ms"] = round(1000 / best_rate(100, hundred, repeats), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--space", default="digits_mobile")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.space, options.rows, options.repeats)
    json.dump({"results": found, "environment": environment(1)}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
