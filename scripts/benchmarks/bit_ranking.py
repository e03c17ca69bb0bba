"""Which proxies rank bit allocations: one small network for digits, each subnet other bits, trained alone.

Usage::

    nasq table build torch_module:scripts/benchmarks/bit_ranking.py:quantized_digits --out bits.csv --count 120 --seeds 2 \
        --train-images 300 --set train.epochs=15 --set train.batch_size=50 --set train.from_scratch=true \
        --set data.validation=300
    python -m scripts.benchmarks.bit_ranking bits.csv [--batch 64] [--draws 3]

The space is the bits alone: 2, 3, 4 or 8 for the weights and for the output of each of five layers. Every subnet is scored
with the same initial weights, quantized to its bits, and step sizes calibrated on the scored images; scores are averaged (as
ranks) over ``--draws`` initialisations with other images. Beside them stand what bits cost, and how well one training of a
subnet ranks another one: what a score of untrained networks cannot hope to exceed by much.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import nasq.data
from nasq import Subnet, Supernet, plugins
from nasq.cost import CostModel
from nasq.data import DataSet
from nasq.deploy.bench import environment
from nasq.errors import InputError
from nasq.plugins import search_space
from nasq.quant import quantize
from nasq.ranking import Table, ranks, score
from nasq.ranking.statistics import estimate, kendall, spearman
from nasq.ranking.untrained import calibrate_untrained

BITS = (2, 3, 4, 8)
SHAPE = (1, 8, 8)
PROXIES = (
    "gradsign", "alive_params", "grad_norm", "snip", "plain", "grasp", "fisher", "jacov", "epe_nas", "zico", "ntk", "synflow",
    "l2_norm",
)  # fmt: skip
Floats = NDArray[np.float64]


def _block(channels: int, out: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _batch(data: DataSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    at = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]
    return data.normalise(data.train.images[at]), data.train.labels[at]


@search_space(source="this project", data="digits", input_shape=SHAPE, published="nothing")
def quantized_digits(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """Four convolutions and a classifier, quantized, step sizes calibrated on 256 training images."""
    network = nn.Sequential(
        *_block(in_channels, 8), *_block(8, 12, 2), *_block(12, 16), *_block(16, 24, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, num_classes),
    )  # fmt: skip
    made = quantize(network, torch.zeros(1, *SHAPE), weight_bits=BITS, activation_bits=BITS, first_last_bits=None)
    calibrate_untrained(made, _batch(nasq.data.load("digits"), 256, 0)[0])
    return made


def costs(supernet: Supernet, subnets: list[Subnet]) -> dict[str, Floats]:
    """What a subnet's bits cost, and their means."""
    found = CostModel(supernet, torch.zeros(1, *SHAPE)).evaluate(supernet.space.to_rows(subnets))
    made = {name: found[name].astype(np.float64) for name in ("bytes", "bitops")}
    for kind in ("weight", "activation"):
        made[f"mean {kind} bits"] = np.array(
            [np.mean([float(bits) for name, bits in one.items() if name.endswith(f"{kind}_bits")]) for one in subnets]  # type: ignore[arg-type]
        )
    return made


def scores(subnets: list[Subnet], batch: int, draw: int) -> dict[str, Floats]:
    """Of one initialisation and one batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        network = quantized_digits()
    given = _batch(nasq.data.load("digits"), batch, draw)
    calibrate_untrained(network, given[0])  # type: ignore[arg-type]
    supernet = Supernet(network)
    proxies = [plugins.load("proxies", name)() for name in PROXIES]
    rows = [
        score(proxies, supernet.extract(one), given, generator=torch.Generator().manual_seed(draw)) for one in subnets
    ]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def against(own: Floats, truth: Floats, which: Any) -> list[float]:
    """A coefficient with its 95 % interval over 1,000 resamples of the subnets."""
    rng = np.random.default_rng(0)
    places = [rng.integers(len(own), size=len(own)) for _ in range(1000)]
    found = estimate(which(own, truth), np.array([which(own[at], truth[at]) for at in places]))
    return [round(one, 3) for one in (found.value, found.low, found.high)]


def _agreement(columns: list[Floats]) -> dict[str, float] | None:
    """Of the first two columns, on the subnets that have both; at least ten."""
    if len(columns) < 2:
        return None
    both = np.isfinite(columns[0]) & np.isfinite(columns[1])
    a, b = columns[0][both], columns[1][both]
    if len(a) < 10:
        return None
    return {"subnets": len(a), "spearman": round(spearman(a, b), 3), "kendall": round(kendall(a, b), 3)}


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Everything against the mean test accuracy."""
    table = Table.read(options.table)
    subnets, truth = list(table.subnets), table.metrics["test_acc"]
    seeds = [values for name, values in table.metrics.items() if name.startswith("test_acc_seed")]
    if not subnets:
        raise InputError(f"{options.table} names no subnets. Make it with 'nasq table build'.")
    drawn = [scores(subnets, options.batch, draw) for draw in range(options.draws)]
    columns = {name: np.mean([ranks(one[name]) for one in drawn], 0) for name in drawn[0]}
    columns |= costs(Supernet(quantized_digits()), subnets)
    rows = []
    for name, own in columns.items():
        row: dict[str, Any] = {
            "score": name,
            "not_finite": sum(int((~np.isfinite(one[name])).sum()) for one in drawn if name in one),
        }
        if np.isnan(own).any() or (own == own[0]).all():
            row["undefined"] = "NaN" if np.isnan(own).any() else "equal for all subnets"
        else:
            row |= {"spearman": against(own, truth, spearman), "kendall": against(own, truth, kendall)}
            if name in drawn[0]:
                row["spearman_of_single_draws"] = [round(spearman(one[name], truth), 3) for one in drawn]
        rows.append(row)
    return {
        "subnets": len(subnets), "test_accuracy": [float(truth.min()), float(np.median(truth)), float(truth.max())],
        "one_training_against_another": _agreement(seeds), "validation_against_test": _agreement(
            [table.metrics["valid_acc"], truth]
        ),
        "batch": options.batch, "draws": options.draws, "rows": rows, "environment": environment(1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="made by 'nasq table build'")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3, help="initialisations, each with other images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    json.dump(study(options), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
