"""One score per distinct network of NAS-Bench-201, and the column of all 15,625 cells that follows from it.

Usage::

    python -m scripts.benchmarks.nas_bench_201_column order --out cells.txt [--scored scores.csv]
    nasq score nas_bench_201 --proxy gradsign --data cifar10 --data-root DATA --subnets cells.txt --out scores.csv
    python -m scripts.benchmarks.nas_bench_201_column check scores.csv
    python -m scripts.benchmarks.nas_bench_201_column expand scores.csv --out column.csv

Many cells compute the same function of their weights: an edge that leads nowhere adds nothing, a skip connection is a name
for another node, and a pooling of a sum is a sum of poolings. At default initialisation (BatchNorm adds no constant yet) a
proxy that looks at nothing else has the same distribution on all of them, so one is scored: the cheapest, in a random order.
``order`` lists them; ``--scored`` keeps cells that a file already holds. ``check`` compares cells of one network that were
scored both, each from an initialisation of its own. ``expand`` writes a row for every cell whose network was scored, with
the index of the cell that was scored for it; parameters and multiply-adds are each cell's own. Cells whose output is
constant are left out of ``order``: no weight has a gradient and GradSign is 0 (``check`` shows those that were scored).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nasq.search_spaces.nas_bench_201 import EDGES, arch_str, from_index, index_of
from scipy.stats import spearmanr

from nasq import Subnet
from nasq.files import write_text
from nasq.run.score_file import read_scores
from nasq.space import Option

CELLS = 15_625
CONVS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
COSTS = {"params": (73_306, 28_000, 243_040), "flops": (7_783_040, 3_932_160, 35_389_440)}
"""Of the fixed parts, of each 1x1 and of each 3x3 edge; C = 16, N = 5, 10 classes. Parameters, multiply-adds."""

Term = tuple[Any, ...]


def output_terms(subnet: Mapping[str, Option]) -> list[Term]:
    """What node 3 adds up. A term is ``("x",)``, ``("pool", term)`` or ``("conv", kernel, edge, terms of its input)``."""
    nodes: list[list[Term]] = [[("x",)], [], [], []]
    for edge, (target, source) in enumerate(EDGES):
        operator, inputs = str(subnet[f"node{target}.input{source}"]), nodes[source]
        if operator == "skip_connect":
            nodes[target] += inputs
        elif operator == "avg_pool_3x3":
            nodes[target] += [("pool", one) for one in inputs]
        elif operator in CONVS and inputs:
            nodes[target] = [*nodes[target], ("conv", CONVS[operator], edge, tuple(inputs))]
    return nodes[3]


def convolutions(terms: list[Term] | tuple[Term, ...]) -> dict[int, int]:
    """The kernels of the convolutions that the output depends on, by edge."""
    found: dict[int, int] = {}
    for term in terms:
        if term[0] == "pool":
            found |= convolutions([term[1]])
        elif term[0] == "conv":
            found |= {term[2]: term[1]} | convolutions(term[3])
    return found


def _written(term: Term, names: Mapping[int, int]) -> str:
    if term[0] == "x":
        return "x"
    if term[0] == "pool":
        return f"p({_written(term[1], names)})"
    return f"c{term[1]}.{names[term[2]]}({'+'.join(sorted(_written(one, names) for one in term[3]))})"


def _renamings(kernels: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """All ways to number the convolutions, each kernel's from 0."""
    groups = [[edge for edge, kernel in kernels.items() if kernel == one] for one in (1, 3)]
    for orders in itertools.product(*(itertools.permutations(range(len(group))) for group in groups)):
        yield {
            edge: name
            for group, order in zip(groups, orders, strict=True)
            for edge, name in zip(group, order, strict=True)
        }


def network_of(subnet: Mapping[str, Option]) -> str:
    """Equal for cells that compute the same function of as many weights; empty where the output is constant."""
    terms = output_terms(subnet)
    kernels = convolutions(terms)
    return (
        min("+".join(sorted(_written(one, names) for one in terms)) for names in _renamings(kernels)) if terms else ""
    )


def classes() -> dict[str, list[int]]:
    """The cells of every distinct network, by official index."""
    found: dict[str, list[int]] = {}
    for index in range(CELLS):
        found.setdefault(network_of(from_index(index)), []).append(index)
    return found


def _work(index: int) -> tuple[int, ...]:
    operators = list(from_index(index).values())
    return tuple(operators.count(one) for one in ("nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3", "skip_connect"))


def order(options: argparse.Namespace) -> dict[str, Any]:
    """Cells to score: those scored already, then the cheapest of every other network, in a random order of cells."""
    groups, place = classes(), {int(cell): at for at, cell in enumerate(np.random.default_rng(2026).permutation(CELLS))}
    constant = groups.pop("", [])
    scored = [] if options.scored is None else list(_scored(options.scored))
    done = set(scored)
    rest = sorted(
        (group for group in groups.values() if not done & set(group)),
        key=lambda group: min(place[one] for one in group),
    )
    chosen = scored + [min(group, key=lambda one: (_work(one), place[one])) for group in rest]
    write_text(options.out, "".join(arch_str(from_index(one)) + "\n" for one in chosen))
    return {"networks": len(groups), "constant_cells": len(constant), "listed": len(chosen), "to_score": len(rest)}


def _scored(path: Path) -> dict[int, dict[str, float]]:
    """The scores of a file by official index, in its order."""
    rows, names = read_scores(path)
    return {index_of(Subnet.from_json(row["subnet"])): {name: float(row[name]) for name in names} for row in rows}


def check(options: argparse.Namespace) -> list[dict[str, Any]]:
    """How far the scores of cells of one network lie apart, against how far all cells do."""
    values, found = _scored(options.scores), []
    groups = classes()
    constant = [one for one in groups.pop("") if one in values]
    pairs = [
        pair for group in groups.values() for pair in itertools.combinations([one for one in group if one in values], 2)
    ]
    for name in next(iter(values.values())):
        a, b = (np.array([values[pair[side]][name] for pair in pairs]) for side in (0, 1))
        spread = 2 * np.abs(a - b) / (np.abs(a) + np.abs(b))
        found.append({
            "score": name, "pairs": len(pairs), "relative_difference_median": float(np.median(spread)),
            "relative_difference_largest": float(spread.max()), "spearman": float(spearmanr(a, b).statistic),
            "constant_cells": {"scored": len(constant), "values": sorted({values[one][name] for one in constant})[:5]},
        })  # fmt: skip
    return found


def expand(options: argparse.Namespace) -> dict[str, Any]:
    """A row per cell whose network was scored."""
    values, lines = _scored(options.scores), []
    names = [name for name in next(iter(values.values())) if name not in COSTS]
    for network, group in classes().items():
        known = [one for one in group if one in values]
        for index in group:
            by = index if index in values else known[0] if known else None
            if by is None and network:
                continue
            own = [values[by][name] for name in names] if by is not None else [0.0] * len(names)
            lines.append((index, *own, *_costs(index), -1 if by is None else by))
    text = [",".join(format(one, ".10g") for one in line) for line in sorted(lines)]
    write_text(options.out, "\n".join([",".join(["arch_index", *names, *COSTS, "representative"]), *text]) + "\n")
    return {"cells": len(lines), "scored": len(values), "out": str(options.out)}


def _costs(index: int) -> list[int]:
    operators = list(from_index(index).values())
    ones, threes = operators.count("nor_conv_1x1"), operators.count("nor_conv_3x3")
    return [fixed + ones * one + threes * three for fixed, one, three in COSTS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("order")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--scored", type=Path, default=None, help="scores that are there already")
    one = commands.add_parser("check")
    one.add_argument("scores", type=Path)
    one = commands.add_parser("expand")
    one.add_argument("scores", type=Path)
    one.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    json.dump({"order": order, "check": check, "expand": expand}[options.command](options), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
