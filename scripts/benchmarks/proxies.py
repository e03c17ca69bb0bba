"""Proxies on NAS-Bench-201: correlations with trained accuracy, agreement with published values, ParZC, shared passes.

Usage::

    nasq score nas_bench_201 --proxy ... --nodes --data cifar10 --data-root DATA --subnets CELLS --out cells.csv
    python -m scripts.benchmarks.proxies table cells.csv --data-root DATA
    python -m scripts.benchmarks.proxies parzc cells.csv --data-root DATA --train 78 --draws 5
    python -m scripts.benchmarks.proxies together [--batch 32]

``table``: Spearman and Kendall with 95 % bootstrap intervals over cells, parameters on the same cells, and the rank
agreement with the values NASLib published. ``parzc``: trained on so many cells (validation accuracy), tested on the others
(test accuracy).
``together``: all proxies in one call beside one call each, processor time.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nasq.search_spaces.nas_bench_201 import nas_bench_201
from numpy.typing import NDArray

from nasq import Subnet, Supernet, plugins
from nasq.deploy.bench import environment
from nasq.ranking import expand, score
from nasq.ranking.ranker import RankerConfig, fit
from nasq.ranking.statistics import kendall, spearman
from nasq.run.score import fresh
from nasq.run.score_file import column, read_nodes, read_scores

TRUTH = "tables/nas_bench_201_cifar10.csv.gz"
PUBLISHED = "tables/nas_bench_201_cifar10_published_proxies.csv.gz"
THEIR_NAMES = {"naswot": "nwot"}
Floats = NDArray[np.float64]


def table_rows(path: Path, key: str) -> dict[str, dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def interval(x: Floats, y: Floats, which: Any) -> list[float]:
    """A coefficient and its 95 % percentile interval over 1,000 resamples of the cells."""
    rng, values = np.random.default_rng(0), []
    for _ in range(1000):
        at = rng.integers(len(x), size=len(x))
        values.append(which(x[at], y[at]))
    return [round(float(one), 3) for one in (which(x, y), *np.nanpercentile(values, [2.5, 97.5]))]


def correlations(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows, names = read_scores(options.scores)
    truth = table_rows(options.data_root / TRUTH, "arch_str")
    theirs = table_rows(options.data_root / PUBLISHED, "nb201_index")
    accuracy = np.array([float(truth[row["name"]]["cifar10_test_200"]) for row in rows])
    index = [truth[row["name"]]["arch_index"] for row in rows]
    found = []
    for name in names:
        own = np.array(column(rows, name))
        row: dict[str, Any] = {"proxy": name, "cells": int(np.isfinite(own).sum())}
        if row["cells"] < 5:
            continue
        ok = ~np.isnan(own)
        row["spearman"], row["kendall"] = (interval(own[ok], accuracy[ok], which) for which in (spearman, kendall))
        key = THEIR_NAMES.get(name, name)
        known = [at for at, one in enumerate(index) if ok[at] and key in theirs.get(one, {})]
        if known:
            values = np.array([float(theirs[index[at]][key]) for at in known])
            row["agreement"] = interval(own[known], values, spearman)
            row["published_spearman"] = round(spearman(values, accuracy[known]), 3)
        found.append(row)
    return found


def parzc(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows, names = read_scores(options.scores)
    nodes = read_nodes(options.scores)
    truth = table_rows(options.data_root / TRUTH, "arch_str")
    vectors, cells = [nodes[row["subnet_id"]] for row in rows], [Subnet.from_json(row["subnet"]) for row in rows]
    worth = {
        key: np.array([float(truth[row["name"]][key]) for row in rows])
        for key in ("cifar10_valid_200", "cifar10_test_200")
    }
    found = []
    for name in options.features:
        kind, _, choices = name.partition("+")
        taus, sizes = [], []
        for draw in range(options.draws):
            order = np.random.default_rng(draw).permutation(len(rows))
            train, test = order[: options.train], order[options.train :]
            config = RankerConfig(
                kind=kind, magnitudes=kind == "slots", choices=bool(choices), epochs=options.epochs, seed=draw
            )
            own = [cells[at] for at in train]
            made = fit([vectors[at] for at in train], worth["cifar10_valid_200"][train], "", config, vectors, own)
            predicted, _ = made.predict([vectors[at] for at in test], cells=[cells[at] for at in test])
            taus.append(kendall(predicted, worth["cifar10_test_200"][test]))
            if "params" in names:
                sizes.append(kendall(np.array(column(rows, "params"))[test], worth["cifar10_test_200"][test]))
        found.append({
            "features": name, "epochs": options.epochs, "trained_on": options.train, "tested_on": len(rows) - options.train, "draws": options.draws,
            "kendall_mean": round(float(np.mean(taus)), 3), "kendall_std": round(float(np.std(taus)), 3),
            "kendall": [round(one, 3) for one in taus], "params_kendall_mean": round(float(np.mean(sizes)), 3),
        })  # fmt: skip
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def together(options: argparse.Namespace) -> list[dict[str, Any]]:
    proxies = expand(
        [plugins.load("proxies", name)() for name in plugins.installed("proxies") if name not in options.without]
    )
    torch.manual_seed(0)
    supernet, rng = Supernet(nas_bench_201()), torch.Generator().manual_seed(0)
    model = fresh(supernet.extract(supernet.space.sample(rng)), 0)
    batch = (torch.randn(options.batch, 3, 32, 32, generator=rng), torch.randint(10, (options.batch,), generator=rng))
    score(proxies, model, (batch[0][:4], batch[1][:4]))
    began = time.process_time()
    score(proxies, model, batch)
    shared, alone = time.process_time() - began, {}
    for proxy in proxies:
        began = time.process_time()
        score([proxy], model, batch)
        alone[proxy.name] = round(time.process_time() - began, 3)
    total = sum(alone.values())
    return [{"batch": options.batch, "together_cpu_s": round(shared, 2), "alone_cpu_s": round(total, 2),
             "ratio": round(total / shared, 2), "alone": alone}]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("table", "parzc"):
        one = commands.add_parser(name)
        one.add_argument("scores", type=Path)
        one.add_argument("--data-root", type=Path, required=True)
        one.add_argument("--train", type=int, default=78)
        one.add_argument("--draws", type=int, default=5)
        one.add_argument("--epochs", type=int, default=100)
        one.add_argument("--features", nargs="+", default=["packed", "slots", "slots+choices"])
    one = commands.add_parser("together")
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--without", nargs="*", default=[], help="proxies to leave out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"table": correlations, "parzc": parzc, "together": together}[options.command](options)
    json.dump({"command": options.command, "rows": rows, "environment": environment(1)}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
