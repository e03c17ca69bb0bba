"""The digits demo over seeds: accuracy of the exported file, against the same architecture alone and against squeezing.

For each seed: ``nasq run --preset digits`` with splits of its own (seed ``s`` draws validation by ``s`` and test by
``2000 + s``); then the best subnet's architecture is trained alone in fp32 (as many epochs as the supernet had in all), and
the squeezed baseline is read from the same supernet: uniform 4 bits, the largest architecture with all sizes lowered together
until it has at most the bytes of the best subnet.

Usage: ``python -m scripts.benchmarks.digits --out DIR [--seeds 0 1 2 3 4] [--set key=value ...]``; resumable.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nasq.data import Augment, AugmentPolicy, Split
from nasq.deploy.bench import environment
from nasq.files import read_json, write_json
from nasq.run.assemble import Workshop, build_network
from nasq.run.config import load_config
from nasq.run.directory import RunDirectory
from nasq.run.export import exported
from nasq.run.flow import open_workshop, run_flow
from nasq.run.search import Evaluation, search_results
from nasq.search import squeezed_rows, uniform_bits
from nasq.space import Subnet
from nasq.supernet import Supernet
from nasq.training import TrainConfig, Trainer, stream


def alone(workshop: Workshop, subnet: Subnet, seed: int) -> float:
    """Test accuracy of the subnet's architecture trained alone in fp32, with freshly drawn weights."""
    config = workshop.config
    plain = Supernet(build_network(config, workshop.data))
    chosen = {name: option for name, option in subnet.items() if name in plain.space.positions}
    model = plain.extract(chosen)
    epochs = dict(config.warmup or {}).get("epochs", 0) + config.train["epochs"]
    settings = {**(config.warmup or config.train), "epochs": epochs, "sampler": "uniform", "distill": 0.0}
    Trainer(Supernet(model), workshop.data, TrainConfig.from_dict({**settings, "seed": seed})).run()
    test = workshop.data.test
    with torch.no_grad():
        right = model.eval()(workshop.data.normalise(test.images)).argmax(1) == test.labels
    return float(right.float().mean())


def with_views(workshop: Workshop, views: int = 20) -> Split:
    """The test images, each with shifted and turned copies: a few hundred images alone do not tell 99 % from 99.5 %."""
    augment = Augment(AugmentPolicy.for_data(workshop.data.name), stream(1, "test views"))
    test = workshop.data.test
    copies = [test.images, *(augment(test.images) for _ in range(views - 1))]
    return Split(torch.cat(copies), test.labels.repeat(views), torch.arange(views * len(test)))


def squeezed(workshop: Workshop, evaluation: Evaluation, limit: float) -> dict[str, float]:
    """Test accuracy and bytes of uniform 4 bits: the largest subnet, its sizes lowered together until it fits."""
    space = workshop.supernet.space
    rows = squeezed_rows(space, uniform_bits(space, 4, 4))
    sizes = workshop.costs.evaluate(rows)["bytes"]
    found: dict[str, float] = {}
    # The path's steps are coarse: the last subnet above the limit is shown beside the first below it.
    below = next(index for index, size in enumerate(sizes) if size <= limit or index == len(sizes) - 1)
    for name, index in (("uniform 4 bits", below), ("uniform 4 bits, one step larger", max(below - 1, 0))):
        subnet = space.to_subnet(rows[index])
        found[f"{name}: bytes"] = float(sizes[index])
        found[f"{name}: validation"] = evaluation.accuracy(subnet)
        found[f"{name}: test"] = evaluation.accuracy(subnet, workshop.data.test)
        found[f"{name}: test with views"] = evaluation.accuracy(subnet, with_views(workshop))
    return found


def splits_of(seed: int) -> list[str]:
    """The settings of a seed: no two seeds share a split."""
    return [f"seed={seed}", f"data.seed={seed}", f"data.test_seed={2000 + seed}"]


def one_seed(directory: Path, seed: int, changes: list[str]) -> dict[str, Any]:
    config = load_config(preset="digits", changes=[*changes, *splits_of(seed)])
    began = time.perf_counter()
    with RunDirectory.create(directory, config, resume=True) as run:
        facts = run_flow(run)
        seconds = time.perf_counter() - began
        workshop = open_workshop(run)
        evaluation = Evaluation(workshop)
        _, records = search_results(run)
        record = next(one for one in records if one.subnet.id == exported(run)["best"])
    limit = record.values["bytes"]
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "test": facts["test_accuracy"],
        "test with views": evaluation.accuracy(record.subnet, with_views(workshop)),
        "validation": facts["validation_accuracy"],
        "bytes": limit,
        "average weight bits": record.values["average_weight_bits"],
        "fp32 alone, test": alone(workshop, record.subnet, seed),
        "safetensors / fp32": facts["sizes"]["ratio model.safetensors"],
        "onnx / fp32": facts["sizes"]["ratio model.onnx"],
        **squeezed(workshop, evaluation, limit),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", dest="changes", action="append", default=[])
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        path = options.out / f"seed{seed}.json"
        if not path.exists():
            write_json(path, one_seed(options.out / f"run{seed}", seed, options.changes))
        rows.append(read_json(path))
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0] if key != "seed"}
    result = {"rows": rows, "mean": means, "environment": environment(torch.get_num_threads())}
    write_json(options.out / "digits.json", result)
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
