"""How well latencies on a new device are predicted from few measurements there and the tables of other devices.

Usage: ``python -m scripts.benchmarks.device_latency --tables DIR [--seeds 20] [--out FILE.json]``

``DIR`` holds ``nas_bench_201_latency_ms.csv.gz`` (15,625 cells on 8 devices), ``nas_bench_201_cifar10.csv.gz`` (their names)
and ``ofa_mbv3_latency.csv.gz`` (5,000 Once-for-All subnets on 4 GPUs, 3 batch sizes each). Each device is left out in
turn, of the second table with all its batch sizes; ``n`` random networks are measured on it, all others are predicted.

``transfer``  :class:`nasq.deploy.latency_transfer.TransferPredictor` on the other devices' tables alone
``with ops``  the same with one-hot operations as further features
``scratch``   ridge regression on the one-hot operations, from the same samples and nothing else
``nearest``   the known device that ranks the samples best, scaled by the mean log ratio
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from nasq.deploy.latency_transfer import TransferPredictor, ridge
from nasq.files import write_json

Reals = NDArray[np.float64]
COUNTS = (5, 10, 20, 50)


def rows_of(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(file))


def nas_bench_201(tables: Path) -> tuple[list[str], list[str], Reals, Reals]:
    """Devices, their groups, latencies ``[devices, cells]`` and one-hot operations ``[cells, 30]``."""
    times = rows_of(tables / "nas_bench_201_latency_ms.csv.gz")
    names = [row["arch_str"] for row in rows_of(tables / "nas_bench_201_cifar10.csv.gz")]
    devices = [key for key in times[0] if key != "arch_index"]
    operations = [[part.partition("~")[0] for part in name.replace("+", "|").split("|") if part] for name in names]
    kinds = sorted({kind for cell in operations for kind in cell})
    hot = np.array([[kind == one for one in cell for kind in kinds] for cell in operations], np.float64)
    order = [int(row["arch_index"]) for row in times]
    known = np.array([[float(row[device]) for row in times] for device in devices])
    # The two batch sizes of one GPU are not a new device for each other.
    return (
        devices,
        [device.partition("_")[0] if "1080ti" in device else device for device in devices],
        known,
        hot[order],
    )


def once_for_all(tables: Path) -> tuple[list[str], list[str], Reals, Reals]:
    """The same for the MobileNetV3 subnets: depths, kernels and expansions one-hot, and the resolution."""
    rows = rows_of(tables / "ofa_mbv3_latency.csv.gz")
    devices = [key for key in rows[0] if key.startswith("lat_")]

    def encoded(row: dict[str, str]) -> list[float]:
        depths, found = [int(d) for d in row["d"].split("-")], [int(row["r"]) / 100]
        for key, options in (("ks", (3, 5, 7)), ("e", (3, 4, 6))):
            for place, text in enumerate(row[key].split("-")):
                found += [float(int(text) == o and place % 4 < depths[place // 4]) for o in options]
        return found

    hot = np.array([encoded(row) for row in rows])
    known = np.array([[float(row[device]) for row in rows] for device in devices])
    return devices, [device.rpartition("_")[0] for device in devices], known, hot


def scratch(hot: Reals, some: NDArray[np.integer], ms: Reals) -> Reals:
    x = np.concatenate([np.ones((len(hot), 1)), (hot - hot.mean(0)) / hot.shape[1] ** 0.5], 1)
    prior = np.zeros(x.shape[1])
    prior[0] = np.log(ms).mean()
    return np.asarray(np.exp(x @ ridge(x[some], np.log(ms), prior)))


def nearest(known: Reals, some: NDArray[np.integer], ms: Reals) -> Reals:
    ranks = [float(spearmanr(row[some], ms).statistic) for row in known]
    best = known[int(np.nanargmax(ranks))]
    return np.asarray(best * np.exp(np.log(ms).mean() - np.log(best[some]).mean()))


def scores(predicted: Reals, true: Reals) -> tuple[float, float, float]:
    """Spearman's rho, the share within 10 %, and the median relative error in %."""
    error = np.abs(predicted / true - 1)
    return float(spearmanr(predicted, true).statistic), float((error <= 0.1).mean()), 100 * float(np.median(error))


def study(devices: list[str], groups: list[str], known: Reals, hot: Reals, seeds: int) -> dict[str, Any]:
    """Mean and standard deviation of the scores over devices and seeds, and per device at 10 samples."""
    found: dict[str, dict[int, dict[str, list[tuple[float, float, float]]]]] = {}
    for index, device in enumerate(devices):
        others = known[[i for i, group in enumerate(groups) if group != groups[index]]]
        plain, ops = TransferPredictor(others), TransferPredictor(others, hot)
        for count in COUNTS:
            for seed in range(seeds):
                some = np.random.default_rng([seed, index]).choice(known.shape[1], count, replace=False)
                ms, rest = known[index, some], np.setdiff1d(np.arange(known.shape[1]), some)
                made = {
                    "transfer": plain.fit(some, ms).predict(), "with ops": ops.fit(some, ms).predict(),
                    "scratch": scratch(hot, some, ms), "nearest": nearest(others, some, ms),
                }  # fmt: skip
                for name, value in made.items():
                    by_device = found.setdefault(name, {}).setdefault(count, {})
                    by_device.setdefault(device, []).append(scores(value[rest], known[index][rest]))
    return {name: {str(count): _summary(part) for count, part in own.items()} for name, own in found.items()}


def _summary(by_device: dict[str, list[tuple[float, float, float]]]) -> dict[str, Any]:
    whole = np.array([np.mean(rows, 0) for rows in by_device.values()])
    names = ("spearman", "within 10 %", "median error %")
    each = {
        device: dict(zip(names, np.round(np.mean(rows, 0), 4).tolist(), strict=True))
        for device, rows in by_device.items()
    }
    mean = dict(zip(names, np.round(whole.mean(0), 4).tolist(), strict=True))
    spread = np.mean([np.std(rows, 0) for rows in by_device.values()], 0)
    return {
        "mean": mean,
        "std over seeds": dict(zip(names, np.round(spread, 4).tolist(), strict=True)),
        "devices": each,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"seeds": options.seeds}
    for name, read in (("nas_bench_201", nas_bench_201), ("ofa_mobilenet_v3", once_for_all)):
        result[name] = study(*read(options.tables), options.seeds)
        for method, counts in result[name].items():
            sys.stderr.write(
                f"{name} {method}: " + "; ".join(f"{n}: {one['mean']}" for n, one in counts.items()) + "\n"
            )
    if options.out:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
