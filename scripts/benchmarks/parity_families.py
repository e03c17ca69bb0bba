"""End to end: shipped files of random subnets of trained supernets, on the runtime, against nasq's own integers.

Usage: ``python -m scripts.benchmarks.parity_families --out DIR [--parts NAME ...] [--subnets 50] [--images 719]``; resumable:
a supernet is trained once, a subnet is measured once, and both are found again in ``DIR``.

Each part trains a small joint supernet (architecture and 2 to 8 bits) on scikit-learn's digits, for few epochs, and draws
random subnets of it. For each the file is exported, run unmodified on the runtime of its target with all optimizations on,
and its final integers are compared with those of nasq's evaluation on every image; on some images the whole gate runs too
(reference, every layer alone, integer kernels). The parts ``...-pow2`` have steps at powers of two, and the same subnets and
seeds as the part without: their accuracies make a pair.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasq.deploy import bundle, onnx, parity
from nasq.deploy.bench import environment
from nasq.deploy.engines import engine_of
from nasq.files import append_line, read_json, write_json
from nasq.quant import freeze
from nasq.run.assemble import Workshop
from nasq.run.config import RunConfig
from nasq.run.directory import RunDirectory
from nasq.run.flow import open_workshop, stage
from nasq.run.search import Evaluation
from nasq.run.train import trained
from nasq.space import Subnet

ORT, OV = "onnxruntime-cpu", "openvino-cpu"

SPACES: dict[str, dict[str, Any]] = {
    "digits_mobile": {"space": "digits_mobile"},
    "resnet": {"space": "resnet20", "space_arguments": {"base": 8}, "data": {"image_size": 16}},
    "mobilenet_v3": {
        "space": "mobilenet_v3",
        "space_arguments": {"width": 0.25, "kernels": [3, 5], "expansions": [2, 3], "depths": [1, 2], "stages": 3,
                            "resolutions": [24, 32]},
        "data": {"image_size": 32},
    },
    "autoformer": {
        "space": "autoformer",
        "space_arguments": {"patch_size": 4, "embed": [16, 24, 32], "heads": [1, 2, 3], "head_dim": 8,
                            "mlp_ratio": [1.0, 1.5, 2.0], "depth": [1, 2]},
        "data": {"image_size": 16},
    },
}  # fmt: skip
"""The small member of each family; ``image_size`` enlarges the digits (8 x 8)."""

PRECISION = {"bf16": False, "channels_last": False, "batch_size": 64}


@dataclass(frozen=True)
class Part:
    """A supernet to be trained, and how many random subnets of it are measured."""

    space: str
    target: str = ORT
    subnets: int = 50
    seed: int = 0
    pow2: bool = False

    @property
    def name(self) -> str:
        short = "onnxruntime" if self.target == ORT else "openvino"
        return f"{self.space}-{short}-{self.seed}" + ("-pow2" if self.pow2 else "")

    def config(self, warmup: int, epochs: int) -> RunConfig:
        own = SPACES[self.space]
        if self.target == OV and self.space == "mobilenet_v3":  # without matmul no image is resized
            own = own | {"space_arguments": own["space_arguments"] | {"resolutions": []}}
        values = {
            **own, "data": {"name": "digits", **own.get("data", {})}, "target": self.target, "check_target": False,
            "seed": self.seed, "threads": 1, "warmup": {**PRECISION, "epochs": warmup},
            "train": {**PRECISION, "epochs": epochs, "smallest": False, "lr": 0.03},
            "quantization": {"power_of_two_steps": True} if self.pow2 else {},
            "search": {"recalibration_images": 512},
        }  # fmt: skip
        if self.space == "autoformer":
            adam = {"optimizer": "adamw", "lr": 2e-3}
            values["warmup"] |= {**adam, "epochs": 4 * warmup}  # a transformer begins slowly
            values["train"] |= adam
        return RunConfig.model_validate(values)


PARTS = [
    *(Part(space) for space in SPACES),
    *(Part(space, OV, 20) for space in SPACES if space != "autoformer"),
    *(Part("digits_mobile", ORT, 20, seed, pow2) for seed in (0, 1, 2) for pow2 in (True, False) if seed or pow2),
    Part("resnet", ORT, 20, 0, True),
    *(Part(space, OV, 20, 0, True) for space in ("digits_mobile", "resnet")),
]


def workshop_of(directory: Path, part: Part, warmup: int, epochs: int) -> Workshop:
    """The part's trained supernet; trains it where that was not done."""
    path = directory / part.name
    with RunDirectory.create(path, part.config(warmup, epochs), resume=True) as run:
        if not trained(run):
            workshop = open_workshop(run)
            stage(run, workshop, "train")
        return open_workshop(run)


def measure(
    workshop: Workshop, evaluation: Evaluation, subnet: Subnet, count: int, gated: int, alone: int
) -> dict[str, Any]:
    """One subnet: its file on ``count`` images, and the gate on the first ``gated`` of them."""
    began = time.process_time()
    supernet, data = workshop.supernet, workshop.data
    supernet.eval()
    raw = torch.cat([data.test.images, data.validation.images])[:count]
    labels = torch.cat([data.test.labels, data.validation.labels])[:count].numpy()
    images = data.normalise(raw)
    with supernet.activate(subnet, evaluation.statistics(subnet)):
        wanted = torch.cat([workshop.network.integers(x) for x in torch.split(images, 256)]).numpy()
        program = freeze(workshop.network)
    x = images.numpy()
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        directory = Path(scratch) / "bundle"
        bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
        session = workshop.network.target.session
        got = engine_of(program).open(directory / parity.MODEL, 1, session, 256).run(x)
        report = parity.check(directory, x[:gated], labels[:gated], layer_images=alone)
    wrong = wanted != got
    right = {"file": got.argmax(1) == labels, "nasq": wanted.argmax(1) == labels}
    return {
        "subnet": subnet.id, "images": len(x), "total": wrong.size, "differ": int(wrong.sum()),
        "largest": int(np.abs(wanted.astype(int) - got).max()), "images differ": int(wrong.any(1).sum()),
        "same class": int((wanted.argmax(1) == got.argmax(1)).sum()),
        "accuracy file": float(right["file"].mean()), "accuracy nasq": float(right["nasq"].mean()),
        "only file right": int((right["file"] & ~right["nasq"]).sum()),
        "only nasq right": int((right["nasq"] & ~right["file"]).sum()),
        "gate": report.failures(), "warnings": list(report.warnings), "reference total": report.total,
        "reference differ": report.differing,
        "layers": {
            kind: [sum(one.total for one in found), sum(one.differing for one in found),
                   max(one.largest_step for one in found), sum(one.away for one in found)]
            for kind in sorted({one.kind for one in report.layers})
            for found in [[one for one in report.layers if one.kind == kind]]
        },
        "coverage": report.coverage.to_json(), "processor seconds": round(time.process_time() - began, 2),
    }  # fmt: skip


def t_interval(values: list[float]) -> list[float]:
    """Mean and 95 % interval of independent values (normal approximation with Student's quantile)."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return [mean, math.nan, math.nan]
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return [mean, mean - half, mean + half]


def summary(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A part's subnets together."""
    images = sum(row["images"] for row in rows)
    kinds = sorted({kind for row in rows for kind in row["layers"]})
    layers = {kind: [row["layers"][kind] for row in rows if kind in row["layers"]] for kind in kinds}
    accuracy = [row["accuracy nasq"] for row in rows]
    return {
        "subnets": len(rows), "images": images, "final integers": sum(row["total"] for row in rows),
        "differ": sum(row["differ"] for row in rows), "largest difference": max(row["largest"] for row in rows),
        "subnets that differ": sum(row["differ"] > 0 for row in rows),
        "share of equal images": 1 - sum(row["images differ"] for row in rows) / images,
        "same class": sum(row["same class"] for row in rows) / images,
        "accuracy nasq": [min(accuracy), statistics.median(accuracy), max(accuracy)],
        "subnets at 30 % and more": sum(value >= 0.3 for value in accuracy),
        "accuracy file minus nasq, mean and 95 %": t_interval(
            [row["accuracy file"] - row["accuracy nasq"] for row in rows]
        ),
        "images right in one only (file, nasq)": [
            sum(row[f"only {one} right"] for row in rows) for one in ("file", "nasq")
        ],
        "reference": [sum(row[f"reference {what}"] for row in rows) for what in ("total", "differ")],
        "gate passed": sum(not row["gate"] for row in rows),
        "layers alone (total, differ, largest step, away from a tie)": {
            kind: [sum(one[0] for one in found), sum(one[1] for one in found), max(one[2] for one in found),
                   sum(one[3] for one in found)]
            for kind, found in layers.items()
        },
        "integer kernels": {
            kind: [sum(row["coverage"][of][kind] for row in rows) for of in ("integer", "total")]
            for kind in rows[0]["coverage"]["total"]
        },
        "least coverage of a subnet": min(
            row["coverage"]["integer"][kind] / row["coverage"]["total"][kind]
            for row in rows
            for kind in ("convolutions", "sums")
            if row["coverage"]["total"][kind]
        )
        if any(row["coverage"]["total"]["convolutions"] for row in rows)
        else None,
        "in float": sorted({path for row in rows for path in row["coverage"]["floats"]})[:20],
        "subnets with a tensor of fewer than 3 levels": sum(
            any("fewer than" in text for text in row["warnings"]) for row in rows
        ),
        "processor seconds": round(sum(row["processor seconds"] for row in rows), 1),
    }  # fmt: skip


def pairs(rows: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, Any]:
    """Accuracy of power-of-two steps minus that of free steps: the same subnets of supernets trained from one seed."""
    found: dict[str, Any] = {}
    for name, own in rows.items():
        plain = {row["subnet"]: row["accuracy nasq"] for row in rows.get(name.removesuffix("-pow2"), [])}
        if name.endswith("-pow2") and plain:
            differences = [row["accuracy nasq"] - plain[row["subnet"]] for row in own if row["subnet"] in plain]
            if differences:
                found[name] = {"subnets": len(differences), "mean and 95 %": t_interval(differences)}
    means = [one["mean and 95 %"][0] for name, one in found.items() if name.startswith("digits_mobile-onnxruntime")]
    if len(means) > 1:
        found["digits_mobile on onnxruntime, over seeds"] = {"seeds": len(means), "mean and 95 %": t_interval(means)}
    return found


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--subnets", type=int, help="at most so many of each part")
    parser.add_argument("--images", type=int, default=719)
    parser.add_argument("--gated", type=int, default=32, help="images of the gate: reference, accuracy")
    parser.add_argument("--alone", type=int, default=8, help="of these, images for every layer alone")
    parser.add_argument("--warmup", type=int, default=10, help="epochs in float")
    parser.add_argument("--epochs", type=int, default=15, help="quantized epochs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every: dict[str, list[Mapping[str, Any]]] = {}
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        began, log = time.process_time(), options.out / f"{part.name}.jsonl"
        done, count = read_rows(log), min(part.subnets, options.subnets or part.subnets)
        if len(done) < count:
            workshop = workshop_of(options.out, part, options.warmup, options.epochs)
            trained_in = time.process_time() - began
            evaluation, known = Evaluation(workshop), {row["subnet"] for row in done}
            rng = torch.Generator().manual_seed(1000)
            for subnet in [workshop.supernet.space.sample(rng) for _ in range(count)]:
                if subnet.id not in known:
                    row = measure(workshop, evaluation, subnet, options.images, options.gated, options.alone)
                    append_line(log, json.dumps({**row, "setup, processor seconds": round(trained_in, 1)}))
        every[part.name] = read_rows(log)
        where = options.out / "environment.json"
        if not where.exists():
            write_json(where, environment(1))
        result = {
            "parts": {name: summary(rows) for name, rows in every.items() if rows},
            "power-of-two steps minus free steps, accuracy": pairs(every), "images": options.images,
            "epochs": [options.warmup, options.epochs], "environment": read_json(where),
        }  # fmt: skip
        write_json(options.out / "parity.json", result)
        sys.stderr.write(f"{part.name}: {len(every[part.name])} subnets\n")
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
