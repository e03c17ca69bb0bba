"""A full report's data, with numbers of plausible size."""

from __future__ import annotations

import numpy as np

from nasq.report import (
    BenchRow,
    BitMap,
    Column,
    Curve,
    Explanation,
    Fact,
    LayerBits,
    Parity,
    ParityCheck,
    Point,
    ReportData,
    Search,
    Stage,
    Survival,
    Training,
)
from nasq.search.pareto import front

LAYERS = ["stem", *(f"body.{b}.{part}" for b in range(6) for part in ("expand", "depthwise", "project")), "head"]
COLUMNS = (
    Column("accuracy", "%", "maximize"),
    Column("bitops", ""),
    Column("bytes", "B"),
    Column("average_weight_bits", "bits"),
)


def points(count: int = 120) -> list[Point]:
    rng = np.random.default_rng(7)
    bits = rng.uniform(2, 8, count)
    size = rng.uniform(0.2, 1.0, count)
    accuracy = 99.2 - 4.0 * np.exp(-bits) - 1.8 * np.exp(-3 * size) - rng.exponential(0.5, count)
    table = np.stack([accuracy, 4e6 * size * bits**1.6, 24e3 * size * bits / 8, bits], axis=1)
    on_front = front(table[:, :2], ("maximize", "minimize"))
    out = []
    for index in range(count):
        choices: dict[str, str | int | float | bool] = {"depth": int(rng.integers(2, 7)), "mix": "conv"}
        for layer in LAYERS:
            choices[f"{layer}.weight_bits"] = int(rng.integers(2, 9))
            choices[f"{layer}.activation_bits"] = int(rng.integers(2, 9))
        for block in range(int(choices["depth"])):
            choices[f"body.{block}.kernel"] = int(rng.choice([3, 5]))
            choices[f"body.{block}.expand"] = int(rng.choice([2, 3, 4]))
        values = dict(zip((c.name for c in COLUMNS), table[index].tolist(), strict=True))
        out.append(Point(f"s{index:04x}9c1f", values, choices, index // 20, bool(on_front[index])))
    return out


def report() -> ReportData:
    found = points()
    best = max((p for p in found if p.front and p.values["bytes"] < 12e3), key=lambda p: p.values["accuracy"])
    steps = list(range(0, 2000, 25))
    decay = [2.3 * 0.998**step + 0.05 for step in steps]
    layers = [
        LayerBits(
            layer,
            int(best.choices[f"{layer}.weight_bits"]),
            int(best.choices[f"{layer}.activation_bits"]),
            400 * (index + 1),
            123_000 * (index + 1),
        )
        for index, layer in enumerate(LAYERS)
    ]
    return ReportData(
        title="digits, 2026-11-22",
        summary="Of 120 evaluated subnets the best one keeps every constraint and reaches 98.6 % on the test images.",
        run="runs/digits",
        facts=(
            Fact("Test accuracy", "98.61 %", "exported file, 360 images"),
            Fact("File", "11.2 kB", "model.safetensors, 1/9.3 of fp32"),
            Fact("Latency", "0.21 ms", "onnxruntime, 1 thread, median"),
            Fact("BitOPs", "38.4 M", "limit 50 M"),
            Fact("Bits", "4.3 / 5.1", "weights / activations, mean"),
        ),
        search=Search(COLUMNS, found, "bitops", "accuracy", best.id),
        bits=BitMap(best.id, [*layers, LayerBits("pool", None, 8, None, 4096)]),
        training=Training(
            (
                Curve("largest subnet", "loss", steps, decay),
                Curve("smallest subnet", "loss", steps, [1.3 * y for y in decay]),
                Curve("random subnets", "loss", steps, [1.15 * y + 0.02 * (i % 3) for i, y in enumerate(decay)]),
                Curve("largest subnet", "validation accuracy [%]", [1, 2, 3, 4, 5], [61.0, 90.5, 96.4, 97.9, 98.6]),
                Curve("smallest subnet", "validation accuracy [%]", [1, 2, 3, 4, 5], [40.1, 80.5, 91.4, 95.0, 96.2]),
            )
        ),
        bench=(
            BenchRow("best, exported", "onnxruntime 1.32.0", 1, 1, 0.2134, 0.25, 3.1, 4685.6, 61_000_000, 31_200),
            BenchRow("the same in fp32", "onnxruntime 1.32.0", 1, 1, 0.441, 0.5, 2.2, 2267.6, 63_500_000, 104_400),
            BenchRow("the same in fp32", "torch 2.15.0 eager", 1, 1, 1.92, 2.4, 8.0, 520.8, None, 104_400),
        ),
        parity=Parity(
            True,
            "The exported file was run by onnxruntime with all optimizations on and gave the integers that were "
            "evaluated, for all 360 validation images.",
            (
                ParityCheck("final integers, whole file", 3600, 0),
                ParityCheck("each layer alone, fed the same integers", 1_203_840, 0, "20 layers"),
                ParityCheck("search accuracy vs accuracy of the file", 360, 0, "98.61 % = 98.61 %"),
            ),
        ),
        explanation=Explanation(
            4000,
            (
                Survival("bytes <= 20 kB", 0.412, 0.397, 0.427, 2210.0, 61_400.0, "B"),
                Survival("bitops <= 50M", 0.0047, 0.003, 0.0074, 4.1e6, 9.2e8),
                Survival("all together", 0.0045, 0.0028, 0.0071),
            ),
        ),
        stages=(
            Stage("check target", 8.4),
            Stage("train", 96.2),
            Stage("search", 51.7),
            Stage("export", 4.1),
            Stage("bench", 12.9),
        ),
        config="preset: digits\nspace: digits_mobile\nsearch:\n  budget: 120\n  constraints: ['bytes<=20k']\n",
        versions={"nasq": "0.1.0", "torch": "2.15.0", "onnxruntime": "1.32.0", "Python": "3.11.7"},
        machine={"CPU": "Intel(R) Xeon(R) Platinum 8488C", "cores": "2", "system": "Linux 6.1"},
    )
