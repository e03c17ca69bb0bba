"""OpenVINO on subnets that were trained for the rule ``add="both"``, written by its own rule.

Usage: ``python -m scripts.benchmarks.parity_fused --out DIR [--families resnet mobilenet_v3] [--subnets 20] [--layers 0]``

The supernets are those of ``parity_families`` (the same ``DIR``: what is trained there is not trained again). The program of
each random subnet is rewritten: a convolution that only a sum reads becomes one operation with it, and its own rounding drops
out. That is another network, which was not trained by that rule; it is compared with nasq's integers of the very same
program, so parity is measured as in ``parity_families``, and its accuracy is given beside that of the original.

For each subnet the file runs unmodified on OpenVINO; with ``--layers N`` every layer of the first ``N`` subnets is run
alone as well, on 32 images, and what differs is counted by kind of layer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasq.deploy import bundle, onnx, parity
from nasq.deploy.bench import environment
from nasq.deploy.integer_network import IntegerNetwork
from nasq.deploy.openvino import OpenVino, integer_coverage
from nasq.files import append_line, write_json
from nasq.quant import freeze
from nasq.quant.program import Add, Conv, Program
from nasq.run.search import Evaluation
from scripts.benchmarks.parity_families import PARTS, read_rows, t_interval, workshop_of

FAMILIES = ("resnet", "mobilenet_v3", "digits_mobile")
SESSION = {"INFERENCE_PRECISION_HINT": "f32"}


def by_one_rounding(program: Program) -> Program:
    """The same layers by the rule ``add="one"``: of the convolutions that only a sum reads the first is one with it."""
    readers = Counter(name for op in program.ops for name in op.inputs)
    makers = {op.output.name: op for op in program.ops}
    merged: dict[str, Conv] = {}
    for op in program.ops:
        if isinstance(op, Add) and makers[op.inputs[0]].output.shape == makers[op.inputs[1]].output.shape:
            own = [makers[name] for name in op.inputs if readers[name] == 1]
            for layer in own:
                if isinstance(layer, Conv) and len(layer.inputs) == 1 and op.output.name not in merged:
                    shortcut = next(name for name in op.inputs if name != layer.output.name)
                    merged[op.output.name] = replace(layer, inputs=(layer.inputs[0], shortcut), output=op.output)
    gone = {layer.path for layer in merged.values()}
    kept = [merged.get(op.output.name, op) for op in program.ops if op.output.name in merged or op.path not in gone]
    return replace(program, ops=tuple(kept), add="one", target="openvino-cpu")


def measure(program: Program, images: torch.Tensor, labels: Any, alone: int) -> dict[str, Any]:
    """A program by its new rule: nasq's integers, the file's, and the layers alone on the first ``alone`` images."""
    fused = by_one_rounding(program)
    wanted = torch.cat([IntegerNetwork(fused).integers(x) for x in torch.split(images, 256)]).numpy()
    before = torch.cat([IntegerNetwork(program).integers(x) for x in torch.split(images, 256)]).numpy()
    x = images.numpy()
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        directory = Path(scratch) / "bundle"
        bundle.write(directory, fused, {parity.MODEL: onnx.export(fused)})
        got = OpenVino(directory / parity.MODEL, 1, SESSION).run(x)
        cover = integer_coverage(directory / parity.MODEL, fused, SESSION)
        layers: dict[str, list[int]] = {}
        if alone:
            for one in parity.check(directory, x[:alone], layer_images=alone).layers:
                found = layers.setdefault(one.kind, [0, 0, 0, 0])
                layers[one.kind] = [found[0] + one.total, found[1] + one.differing, max(found[2], one.largest_step),
                                    found[3] + one.away]  # fmt: skip
    wrong = wanted != got
    classes = {"file": got.argmax(1), "nasq": wanted.argmax(1), "rule both": before.argmax(1)}
    top = np.sort(wanted.astype(int), axis=1)
    changed = classes["file"] != classes["nasq"]
    return {
        "images": len(x), "total": wrong.size, "differ": int(wrong.sum()),
        "largest": int(np.abs(wanted.astype(int) - got).max()), "images differ": int(wrong.any(1).sum()),
        "same class": int((~changed).sum()),
        "steps between the best two where the class differs": (top[changed, -1] - top[changed, -2]).tolist(),
        "images whose best two are equal": int((top[:, -1] == top[:, -2]).sum()),
        "accuracy": {name: float((own == labels).mean()) for name, own in classes.items()},
        "layers": layers, "integer": dict(cover.integer), "of": dict(cover.total),
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    images = sum(row["images"] for row in rows)
    differences = [row["accuracy"]["file"] - row["accuracy"]["nasq"] for row in rows]
    layers: dict[str, list[int]] = {}
    for row in rows:
        for kind, one in row["layers"].items():
            found = layers.setdefault(kind, [0, 0, 0, 0])
            layers[kind] = [found[0] + one[0], found[1] + one[1], max(found[2], one[2]), found[3] + one[3]]
    return {
        "subnets": len(rows), "final integers": sum(row["total"] for row in rows),
        "differ": sum(row["differ"] for row in rows), "largest difference": max(row["largest"] for row in rows),
        "share of equal images": 1 - sum(row["images differ"] for row in rows) / images,
        "same class": [sum(row["same class"] for row in rows), images, sum(row["same class"] for row in rows) / images],
        "steps between the best two where the class differs": sorted(
            step for row in rows for step in row["steps between the best two where the class differs"]
        ),
        "accuracy file minus nasq, mean and 95 %": t_interval(differences),
        "accuracy (least, median, largest)": {
            name: np.quantile([row["accuracy"][name] for row in rows], (0, 0.5, 1)).tolist()
            for name in ("file", "nasq", "rule both")
        },
        "integer kernels": {
            kind: [sum(row["integer"][kind] for row in rows), sum(row["of"][kind] for row in rows)]
            for kind in rows[0]["of"]
        },
        "layers alone (total, differ, largest step, away from a tie)": layers,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["resnet", "mobilenet_v3"])
    parser.add_argument("--subnets", type=int, default=20)
    parser.add_argument("--images", type=int, default=719)
    parser.add_argument("--layers", type=int, default=0, help="so many subnets have every layer run alone")
    parser.add_argument("--warmup", type=int, default=10, help="epochs in float, where a supernet is trained")
    parser.add_argument("--epochs", type=int, default=15, help="quantized epochs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment(1)}
    for family in options.families:
        part = next(part for part in PARTS if part.space == family)
        workshop = workshop_of(options.out, part, options.warmup, options.epochs)
        evaluation, data, log = Evaluation(workshop), workshop.data, options.out / f"{family}-fused.jsonl"
        images = data.normalise(torch.cat([data.test.images, data.validation.images])[: options.images])
        labels = torch.cat([data.test.labels, data.validation.labels])[: options.images].numpy()
        rng, done = torch.Generator().manual_seed(2000), {row["subnet"] for row in read_rows(log)}
        for index in range(options.subnets):
            subnet = workshop.supernet.space.sample(rng)
            if subnet.id in done:
                continue
            workshop.supernet.eval()
            with workshop.supernet.activate(subnet, evaluation.statistics(subnet)):
                program = freeze(workshop.network)
            row = measure(program, images, labels, 32 if index < options.layers else 0)
            append_line(log, json.dumps({"subnet": subnet.id, **row}))
        result[family] = summary([dict(row) for row in read_rows(log)])
        write_json(options.out / "fused.json", result)
        sys.stderr.write(f"{family}: {result[family]['subnets']} subnets\n")
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
