"""How well CQAP ranks what it has not seen, against average bits and BitOPs, on pairs that were measured already.

The pairs are those of ``scripts.reproduce.eq_net_resnet20_cifar10 search`` (or any file of
:func:`nasq.search.predictors.generate_pairs` on the same space). 80 % teach, 20 % are reported on; the split is repeated over
seeds. Usage: ``python -m scripts.benchmarks.cqap PAIRS.jsonl [--seeds 5] [--again PAIRS.again.jsonl]``.

``--again`` names a second measurement, on other images, of the pairs that the first seed does not learn from. How well the
two agree bounds what a predictor can reach; their mean, weighted by images, is what it is compared with as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nasq.search_spaces.resnet import resnet20

from nasq import Supernet
from nasq.cost import CostModel
from nasq.deploy.bench import environment
from nasq.quant import quantize
from nasq.search.predictors import CQAP, Fit, Pairs, quality

WINDOW = (2.75, 3.25)


def report(pairs: Pairs, supernet: Supernet, seed: int, epochs: int) -> dict[str, Any]:
    """Quality on the fifth that was not learned: everywhere, and inside the window of average bits."""
    taught, unseen = pairs.split(0.8, np.random.default_rng(seed))
    predictor = CQAP(supernet.space)
    predictor.fit(taught, Fit(epochs=epochs, seed=seed))
    costs = CostModel(supernet).evaluate(unseen.rows)
    average = (costs["average_weight_bits"] + costs["average_activation_bits"]) / 2
    inside = (average >= WINDOW[0]) & (average <= WINDOW[1])
    scores = {"cqap": predictor(unseen.rows), "average bits": average, "bitops": costs["bitops"].astype(float)}
    found: dict[str, Any] = {"pairs": len(unseen), "inside": int(inside.sum())}
    for name, score in scores.items():
        found[name] = {"kendall": quality(score, unseen.values).kendall}
        if inside.sum() >= 3:
            found[name]["kendall inside"] = quality(score, unseen.values, inside).kendall
    found["rmse"] = quality(scores["cqap"], unseen.values).rmse
    found["range"] = [float(pairs.values.min()), float(pairs.values.max())]
    return found


def compared_again(first: Pairs, second: Pairs, supernet: Supernet, epochs: int) -> dict[str, Any]:
    """Agreement of two measurements, of 1 and 2 shares of images, and of the predictor with their weighted mean."""
    taught, unseen = first.split(0.8, np.random.default_rng(0))
    later = {row.tobytes(): value for row, value in zip(second.rows, second.values.tolist(), strict=True)}
    at = np.array([index for index, row in enumerate(unseen.rows) if row.tobytes() in later])
    unseen = unseen.take(at)
    other = np.array([later[row.tobytes()] for row in unseen.rows])
    better = (unseen.values + 2 * other) / 3
    predictor = CQAP(supernet.space)
    predictor.fit(taught, Fit(epochs=epochs, seed=0))
    predicted = predictor(unseen.rows)
    costs = CostModel(supernet).evaluate(unseen.rows)
    average = (costs["average_weight_bits"] + costs["average_activation_bits"]) / 2
    inside = (average >= WINDOW[0]) & (average <= WINDOW[1])
    names = {"first and second": (unseen.values, other), "cqap and first": (predicted, unseen.values)}
    names |= {"cqap and second": (predicted, other), "cqap and mean of both": (predicted, better)}
    for name, trivial in (("average bits", average), ("bitops", costs["bitops"].astype(float))):
        names[f"{name} and mean of both"] = (trivial, better)
    return {
        name: {"kendall": quality(*two).kendall, "kendall inside": quality(*two, inside).kendall, "subnets": len(at)}
        for name, two in names.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--sum-bits", type=int, default=8)
    parser.add_argument("--again", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = quantize(resnet20(elastic=False), torch.zeros(1, 3, 32, 32), sum_bits=options.sum_bits)
    supernet = Supernet(network, name="resnet20")
    pairs = Pairs.read(options.pairs, supernet.space)
    runs = [report(pairs, supernet, seed, options.epochs) for seed in range(options.seeds)]
    means = {
        name: {key: round(statistics.mean(run[name][key] for run in runs), 4) for key in runs[0][name]}
        for name in ("cqap", "average bits", "bitops")
    }
    result = {"pairs": len(pairs), "mean over seeds": means, "runs": runs, "environment": environment(1)}
    if options.again is not None:
        second = Pairs.read(options.again, supernet.space)
        result["measured again"] = compared_again(pairs, second, supernet, options.epochs)
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
