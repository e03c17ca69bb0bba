"""Proxies on NAS-Bench-201: correlations with trained accuracy, agreement with published values, ParZC, shared passes.

Usage::

    nasq score nas_bench_201 --proxy ... --nodes --data cifar10 --data-root DATA --subnets CELLS --out cells.csv
    python -m scripts.benchmarks.proxies table cells.csv --data-root DATA
    python -m scripts.benchmarks.proxies parzc cells.csv --data-root DATA --train 78 --draws 5
    python -m scripts.benchmarks.proxies together [--batch 32]
    python -m scripts.benchmarks.proxies column cells.csv --out column.csv
    python -m scripts.benchmarks.proxies alive --data-root DATA

``table``: Spearman and Kendall with 95 % bootstrap intervals over cells, parameters on the same cells, and the rank
agreement with the values NASLib published. ``parzc``: trained on so many cells (validation accuracy), tested on the others
(test accuracy); features are ``packed`` or ``slots``, with ``+choices``, ``+scores`` (the ranks by the file's columns) or
``+graph`` (what :mod:`scripts.benchmarks.nas_bench_201_combination` counts on a cell's paths).
``together``: all proxies in one call beside one call each, processor time. ``column``: a compact file of the scores by
official index. ``alive``: how well two counts rank all 15,625 cells, parameters and parameters on a path from input to
output; ``table`` has the latter beside the proxies.
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
from nasq.search_spaces.nas_bench_201 import EDGES, from_arch_str, index_of, nas_bench_201
from numpy.typing import NDArray

from nasq import Subnet, Supernet, plugins
from nasq.deploy.bench import environment
from nasq.files import write_text
from nasq.ranking import expand, score
from nasq.ranking.ranker import RankerConfig, fit
from nasq.ranking.statistics import kendall, spearman
from nasq.run.score import fresh
from nasq.run.score_file import column, read_nodes, read_scores
from scripts.benchmarks.nas_bench_201_combination import features

TRUTH = "tables/nas_bench_201_cifar10.csv.gz"
PUBLISHED = "tables/nas_bench_201_cifar10_published_proxies.csv.gz"
THEIR_NAMES = {"naswot": "nwot"}
Floats = NDArray[np.float64]


def table_rows(path: Path, key: str) -> dict[str, dict[str, str]]:
    with gzip.open(path, "rt", newline="") as file:
        return {row[key]: row for row in csv.DictReader(file)}


def alive_parameters(subnet: Subnet) -> float:
    """Million parameters of the cells' convolutions that lie on a path from input to output, fixed parts included."""
    operators = {edge: str(subnet[f"node{edge[0]}.input{edge[1]}"]) for edge in EDGES}
    reached, useful = {0}, {3}
    for target, source in EDGES:  # in the order of targets
        reached |= {target} if source in reached and operators[target, source] != "none" else set()
    for target, source in sorted(EDGES, reverse=True):
        useful |= {source} if target in useful and operators[target, source] != "none" else set()
    if 3 not in reached:
        return 0.0  # the classifier sees a constant
    sizes = {"nor_conv_3x3": 0.24304, "nor_conv_1x1": 0.028}
    alive = [one for (target, source), one in operators.items() if source in reached and target in useful]
    return 0.073306 + sum(sizes.get(one, 0.0) for one in alive)


def alive(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = table_rows(options.data_root / TRUTH, "arch_str").values()
    accuracy = np.array([float(row["cifar10_test_200"]) for row in rows])
    counts = {
        "params": [float(row["params_m"]) for row in rows],
        "alive_params": [alive_parameters(from_arch_str(row["arch_str"])) for row in rows],
    }
    return [
        {"proxy": name, "cells": len(accuracy), "spearman": round(spearman(np.array(one), accuracy), 4),
         "kendall": round(kendall(np.array(one), accuracy), 4)}
        for name, one in counts.items()
    ]  # fmt: skip


def compact(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows, names = read_scores(options.scores)
    lines = sorted((index_of(Subnet.from_json(row["subnet"])), *(float(row[name]) for name in names)) for row in rows)
    text = [",".join(format(one, ".10g") for one in line) for line in lines]
    write_text(options.out, "\n".join([",".join(["arch_index", *names]), *text]) + "\n")
    return [{"out": str(options.out), "cells": len(lines)}]


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
    scores = {name: np.array(column(rows, name)) for name in names}
    scores["alive_params"] = np.array([alive_parameters(Subnet.from_json(row["subnet"])) for row in rows])
    for name, own in scores.items():
        row: dict[str, Any] = {"proxy": name, "cells": int(np.isfinite(own).sum())}
        if row["cells"] < 5:
            continue
        ok = ~np.isnan(own)
        row["spearman"], row["kendall"] = (interval(own[ok], accuracy[ok], which) for which in (spearman, kendall))
        key = THEIR_NAMES.get(name, name)
        known = [at for at, one in enumerate(index) if ok[at] and theirs.get(one, {}).get(key)]  # some values are empty
        if known:
            values = np.array([float(theirs[index[at]][key]) for at in known])
            row["published"] = len(known)
            row["agreement"] = interval(own[known], values, spearman)
            row["published_spearman"] = round(spearman(values, accuracy[known]), 3)
        found.append(row)
    return found


def _beside(
    rows: list[dict[str, str]], names: list[str], cells: list[Subnet], more: list[str]
) -> list[dict[str, float]]:
    """The scores that a ranker sees of every cell."""
    made = [{name: float(row[name]) for name in names} if "scores" in more else {} for row in rows]
    if "graph" in more:
        for own, cell in zip(made, cells, strict=True):
            own |= {f"graph{index}": value for index, value in enumerate(features(cell))}
    return made


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
        kind, *more = name.split("+")
        beside = _beside(rows, names, cells, more)
        taus, sizes = [], []
        for draw in range(options.draws):
            order = np.random.default_rng(draw).permutation(len(rows))
            train, test = order[: options.train], order[options.train :]
            config = RankerConfig(
                kind=kind, magnitudes=kind == "slots", choices="choices" in more, epochs=options.epochs, seed=draw,
                scores=tuple(beside[0]),
            )  # fmt: skip
            made = fit(
                [vectors[at] for at in train], worth["cifar10_valid_200"][train], "", config, vectors,
                [cells[at] for at in train], [beside[at] for at in train], [beside[at] for at in test],
            )  # fmt: skip
            predicted, _ = made.predict(
                [vectors[at] for at in test], cells=[cells[at] for at in test], scores=[beside[at] for at in test]
            )
            taus.append(kendall(predicted, worth["cifar10_test_200"][test]))
            if "params" in names:
                sizes.append(kendall(np.array(column(rows, "params"))[test], worth["cifar10_test_200"][test]))
        found.append({
            "features": name, "epochs": options.epochs,
            "trained_on": options.train, "tested_on": len(rows) - options.train, "draws": options.draws,
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
    one = commands.add_parser("column")
    one.add_argument("scores", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one = commands.add_parser("alive")
    one.add_argument("--data-root", type=Path, required=True)
    one = commands.add_parser("together")
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--without", nargs="*", default=[], help="proxies to leave out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    commands_by_name = {
        "table": correlations, "parzc": parzc, "together": together, "column": compact, "alive": alive,
    }  # fmt: skip
    rows = commands_by_name[options.command](options)
    json.dump({"command": options.command, "rows": rows, "environment": environment(1)}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
