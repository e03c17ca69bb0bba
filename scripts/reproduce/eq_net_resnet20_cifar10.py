"""EQ-Net on ResNet-20 / CIFAR-10: one elastic supernet of 2 to 8 bits against quantization-aware training at fixed bits.

Every row is a training of its own that is resumed where it was killed, so rows can be added run by run::

    COMMON="--data DIR --weights resnet20.npz --out RUNS [--setting short|full] [--device cuda]"
    python -m scripts.reproduce.eq_net_resnet20_cifar10 train $COMMON --rows elastic fixed-2
    python -m scripts.reproduce.eq_net_resnet20_cifar10 evaluate $COMMON
    python -m scripts.reproduce.eq_net_resnet20_cifar10 pairs $COMMON
    python -m scripts.reproduce.eq_net_resnet20_cifar10 search $COMMON
    python -m scripts.reproduce.eq_net_resnet20_cifar10 again $COMMON
    python -m scripts.reproduce.eq_net_resnet20_cifar10 table $COMMON --results docs/results/FILE.md

What "2/2" means: weights of 2 bits, and 2 bits in what each convolution reads. The first and last layer have 8 bits, and so
do the tensors that sums read and make (``sum_bits=8``; EQ-Net leaves them in float). Test accuracies are those of the
integer form, with BatchNorm recalibrated on augmented training images.

The published float network was trained on all 50,000 training images, so validation images are no news to it. ``--unseen``
makes pairs and searches on the first half of the test images and reports on the second, for uniform bits as well.

``again`` measures a fifth of the pairs on twice as many other images: how well two measurements of one subnet agree is the
most that a predictor of them can reach.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nasq.search_spaces.resnet import load_weights, resnet20
from torch import Tensor, nn

import nasq.data
from nasq import Supernet
from nasq.cost import CostModel
from nasq.data import DataSet, training_views
from nasq.deploy.bench import environment
from nasq.files import append_line, read_json, write_json, write_text
from nasq.quant import calibrate, quantize
from nasq.search import Constraint, Measure, measures
from nasq.search.objectives import Rows
from nasq.search.predictors import (
    CQAP,
    Fit,
    Pairs,
    TransitionSampler,
    TransitionTable,
    generate_pairs,
    predictor_search,
    quality,
)
from nasq.space import Subnet
from nasq.training import TrainConfig, Trainer, checkpoint, stream

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What the published weights were trained with."""
ALL_BITS = tuple(range(2, 9))
UNIFORM = (2, 3, 4, 8)
CALIBRATION_IMAGES = 512
RECALIBRATION_IMAGES = 8192


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        about: For the table.
        bits: Options of weights and activations.
        settings: What differs from the setting's own.
        teacher: Whether the float network teaches the subnets that no other one teaches.
    """

    about: str
    bits: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: bool = False


GUIDED: dict[str, Any] = {"sampler": "guided", "distill": 0.5, "low_weight": 1.5}
HARD: dict[str, Any] = {"sampler": "guided", "distill": 0.0, "low_weight": 1.5}
FLAT: dict[str, Any] = {"skewness": 1.0, "kurtosis": 0.015}
FIXED: dict[str, Any] = {"sampler": "uniform", "distill": 0.0}

ROWS = {
    "elastic": Row("elastic, GPG + WDR, H taught by the float network", ALL_BITS, {**GUIDED, **FLAT}, True),
    "elastic-paper": Row("elastic, GPG + WDR", ALL_BITS, {**GUIDED, **FLAT}),
    "elastic-no-wdr": Row("elastic, GPG, no WDR", ALL_BITS, GUIDED),
    "elastic-no-gpg": Row("elastic, hard labels, WDR", ALL_BITS, {**HARD, **FLAT}),
    "elastic-plain": Row("elastic, hard labels, no WDR", ALL_BITS, HARD),
    **{f"fixed-{bits}": Row(f"fixed {bits}/{bits} QAT", (bits,), FIXED) for bits in UNIFORM},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "short": {"epochs": 5, "batch_size": 128, "optimizer": "adam", "lr": 1.5e-3, "step_lr": 2.0, "warmup_epochs": 0.1},
    "full": {"epochs": 120, "batch_size": 256, "optimizer": "adam", "lr": 1e-3, "step_lr": 1.0, "warmup_epochs": 1.0},
}


def load_data(root: Path) -> DataSet:
    """CIFAR-10 with the weights' own normalisation; 5,000 training images are validation."""
    return replace(nasq.data.load("cifar10", root=root, validation=5000), mean=MEAN, std=STD)


def halved(data: DataSet) -> DataSet:
    """The first half of the test images validates and the second tests: the float network has seen neither."""
    half = len(data.test) // 2
    parts = [nasq.data.Split(data.test.images[at], data.test.labels[at]) for at in (slice(half), slice(half, None))]
    return replace(data, validation=parts[0], test=parts[1])


def float_network(weights: Path) -> nn.Module:
    """The published network."""
    network = resnet20(elastic=False)
    load_weights(network, weights)
    return network.eval()


def build(row: Row, weights: Path, data: DataSet) -> Supernet:
    """The quantized supernet of a row, calibrated on training images."""
    network = quantize(
        float_network(weights),
        torch.zeros(1, 3, 32, 32),
        "onnxruntime-cpu",
        weight_bits=row.bits,
        activation_bits=row.bits,
        sum_bits=8,
    )
    calibrate(network, data.normalise(data.train.images[:CALIBRATION_IMAGES]))
    return Supernet(network, name="resnet20")


def config_of(row: Row, options: argparse.Namespace) -> TrainConfig:
    settings = {**SETTINGS[options.setting], **row.settings, "weight_decay": 0.0, "seed": options.seed}
    if options.epochs is not None:
        settings["epochs"] = options.epochs
    return TrainConfig.from_dict(settings)


def place(name: str, options: argparse.Namespace) -> Path:
    """Where a row's files are: other settings and seeds are other rows."""
    epochs = "" if options.epochs is None else f"-{options.epochs}epochs"
    return Path(options.out) / f"{name}-{options.setting}{epochs}-seed{options.seed}"


def train(name: str, options: argparse.Namespace, data: DataSet) -> None:
    row, directory = ROWS[name], place(name, options)
    if (directory / "trained.json").exists():
        return
    supernet = build(row, options.weights, data)
    began, cpu = time.time(), time.process_time()

    def tell(event: dict[str, Any]) -> None:
        append_line(directory / "events.jsonl", json.dumps({**event, "time": round(time.time(), 1)}))

    def step(done: int, steps: int) -> None:
        if done % 25 == 0:
            sys.stderr.write(
                f"{name} {done}/{steps} {time.time() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU\n"
            )

    trainer = Trainer(
        supernet, data, config_of(row, options), directory, device=options.device, on_event=tell, on_step=step,
        teacher=float_network(options.weights) if row.teacher else None,
    )  # fmt: skip
    history = trainer.run()
    supernet.save(directory)
    seconds = {"wall_seconds": round(time.time() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    write_json(directory / "trained.json", {"config": trainer.config.to_dict(), "history": history, **seconds})


def recalibration(data: DataSet, count: int = RECALIBRATION_IMAGES, size: int = 256) -> Iterator[Tensor]:
    """The same augmented training images for every subnet: statistics belong to what training sees."""
    views = training_views(data, count, stream(0, "recalibration order"), stream(0, "recalibration images"))
    for images in views.split(size):
        yield data.normalise(images).contiguous(memory_format=torch.channels_last)


def accuracy(
    supernet: Supernet, subnet: Subnet, data: DataSet, split: nasq.data.Split, batches: list[Tensor], device: str
) -> float:
    """Accuracy in % of the integer form on a split."""
    bn = supernet.recalibrate(subnet, (batch.to(device) for batch in batches))
    training, right = supernet.training, 0
    supernet.eval()
    with supernet.activate(subnet, bn), torch.no_grad():
        for images, labels in split.batches(250):
            x = data.normalise(images.to(device)).contiguous(memory_format=torch.channels_last)
            right += int((supernet(x).argmax(1).cpu() == labels).sum())
    supernet.train(training)
    return 100 * right / len(split)


def uniform(supernet: Supernet, bits: int) -> Subnet:
    """Every choice at ``bits``."""
    return Subnet({choice.name: bits for choice in supernet.space.choices})


def trained(name: str, options: argparse.Namespace, data: DataSet) -> tuple[Supernet, int]:
    """A row's supernet and the epochs it was trained for: the finished one, or that of its newest checkpoint."""
    directory, supernet = place(name, options), build(ROWS[name], options.weights, data)
    if (directory / "trained.json").exists():
        supernet.load(directory)
        return supernet, len(read_json(directory / "trained.json")["history"])
    tensors, meta = checkpoint.load(directory / "checkpoint")
    supernet.load_state_dict(checkpoint.unpack(tensors, meta["state"])["model"])
    return supernet, int(meta["epoch"])


def evaluate(name: str, options: argparse.Namespace, data: DataSet) -> None:
    """Writes the accuracies of a row's uniform bits, those that are not there yet."""
    directory = place(name, options)
    if not (directory / "checkpoint.json").exists():
        return
    supernet, epochs = trained(name, options, data)
    path = directory / "evaluated.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    if found.get("epochs") != epochs:
        found = {"epochs": epochs, "accuracies": {}}
    batches = list(recalibration(data))
    for bits in UNIFORM:
        if bits not in ROWS[name].bits or str(bits) in found["accuracies"]:
            continue
        subnet = uniform(supernet, bits)
        found["accuracies"][str(bits)] = {
            part: accuracy(supernet, subnet, data, split, batches, options.device)
            for part, split in (("test", data.test), ("validation", data.validation))
        }
        write_json(path, found)
        sys.stderr.write(f"{name} {bits}/{bits} {found['accuracies'][str(bits)]}\n")


def costs_of(supernet: Supernet) -> dict[str, Measure]:
    """What a search is bounded by and compared with."""
    return measures(CostModel(supernet).evaluate)


def sampler_of(supernet: Supernet, costs: dict[str, Measure], seed: int) -> TransitionSampler:
    """Draws subnets near given average bits of weights and of activations."""
    rng = np.random.default_rng(seed)
    names = supernet.space.names
    tables = [
        TransitionTable(
            supernet.space, costs[f"average_{kind}_bits"], rng, [n for n in names if n.endswith(f"{kind}_bits")]
        )
        for kind in ("weight", "activation")
    ]
    return TransitionSampler(tables, rng)


def scorer(supernet: Supernet, data: DataSet, options: argparse.Namespace) -> Callable[[Subnet], float]:
    """Integer accuracy in % on the first validation images, with BatchNorm recalibrated for each subnet."""
    batches = list(recalibration(data, options.recalibration))
    part = nasq.data.Split(data.validation.images[: options.images], data.validation.labels[: options.images])
    return lambda subnet: accuracy(supernet, subnet, data, part, batches, options.device)


def pairs_file(name: str, epochs: int, options: argparse.Namespace) -> Path:
    kind = "unseen" if options.unseen else "images"
    return place(name, options) / f"pairs-{epochs}epochs-{options.images}{kind}.jsonl"


def measure_pairs(name: str, options: argparse.Namespace, data: DataSet) -> None:
    """Subnets of the transition tables and their accuracies; may be killed and run again."""
    supernet, epochs = trained(name, options, data)
    rows = sampler_of(supernet, costs_of(supernet), options.seed).spread(options.low, options.high, options.pairs)

    def tell(done: int, count: int) -> None:
        if done % 50 == 0:
            sys.stderr.write(f"{name} pair {done}/{count}\n")

    path = pairs_file(name, epochs, options)
    generate_pairs(supernet.space, rows, scorer(supernet, data, options), path, tell)


def again(name: str, options: argparse.Namespace, data: DataSet) -> None:
    """The pairs that a predictor of the first seed does not learn from, on the validation images that follow theirs."""
    supernet, epochs = trained(name, options, data)
    path = pairs_file(name, epochs, options)
    unseen = Pairs.read(path, supernet.space).split(0.8, np.random.default_rng(0))[1]
    batches, places = list(recalibration(data, options.recalibration)), slice(options.images, 3 * options.images)
    part = nasq.data.Split(data.validation.images[places], data.validation.labels[places])
    second = generate_pairs(
        supernet.space,
        unseen.rows,
        lambda subnet: accuracy(supernet, subnet, data, part, batches, options.device),
        path.with_suffix(".again.jsonl"),
    )
    sys.stderr.write(f"{name}: two measurements of {len(second)} subnets: {quality(unseen.values, second.values)}\n")


def found_by(pairs: Pairs, supernet: Supernet, options: argparse.Namespace, count: int, fresh: bool) -> Rows:
    """The best ``count`` subnets at an average of 3.0 bits by a predictor of the pairs; ``fresh``: none of the pairs."""
    space, costs = supernet.space, costs_of(supernet)
    predictor = CQAP(space)
    predictor.fit(pairs, Fit(seed=options.seed))
    window = [
        Constraint(name, "bits", costs[name].function, lower=2.5, upper=3.0)
        for name in ("average_weight_bits", "average_activation_bits")
    ]
    start = sampler_of(supernet, costs, options.seed).draw([2.9, 2.9], 200)
    start = np.concatenate([space.to_rows([uniform(supernet, 3)]), start])
    rng = np.random.default_rng([options.seed, len(pairs)])
    best, _ = predictor_search(space, predictor, window, rng, population=300, initial=start)
    known = {row.tobytes() for row in pairs.rows} if fresh else set()
    return np.array([row for row in best if row.tobytes() not in known][:count])


def search(name: str, options: argparse.Namespace, data: DataSet) -> None:
    """Mixed precision at an average of 3.0 bits: the best candidates of a predictor are measured, and it learns from them.

    A search finds what a predictor thinks too well of. So ``--rounds`` times the best ``--measured`` candidates are
    measured as the pairs were, and join them. Uniform bits are candidates, too.
    """
    directory = place(name, options)
    supernet, epochs = trained(name, options, data)
    space = supernet.space
    pairs = Pairs.read(pairs_file(name, epochs, options), space)
    path, score = pairs_file(name, epochs, options).with_suffix(".searched.jsonl"), scorer(supernet, data, options)
    before, later = pairs, Pairs.read(path, space)
    for count in range(options.measured, options.rounds * options.measured + 1, options.measured):
        if len(later) < count:  # a round that was cut off is drawn again: its measured subnets come first
            whole = later.take(np.arange(count - options.measured))
            pairs = Pairs(np.concatenate([before.rows, whole.rows]), np.concatenate([before.values, whole.values]))
            drawn = found_by(pairs, supernet, options, options.measured, True)
            later = generate_pairs(space, np.concatenate([whole.rows, drawn]), score, path)
        best = float(later.values[count - options.measured : count].mean())
        sys.stderr.write(f"{name}: {count} candidates measured, the last {options.measured} have {best:.2f}\n")
    pairs = Pairs(np.concatenate([before.rows, later.rows]), np.concatenate([before.values, later.values]))
    rows = np.concatenate(
        [
            space.to_rows([uniform(supernet, 3)]),
            later.rows[np.argsort(-later.values, kind="stable")][: options.finalists // 2],
            found_by(pairs, supernet, options, options.finalists // 2, False),
        ]
    )
    finalists = list(dict.fromkeys(space.to_subnets(rows)))
    batches = list(recalibration(data))
    scores = [accuracy(supernet, subnet, data, data.validation, batches, options.device) for subnet in finalists]
    chosen = finalists[int(np.argmax(scores))]
    result = {
        "epochs": epochs,
        "pairs": len(pairs),
        "rounds": options.rounds,
        "images": options.images,
        "finalists": scores,
        "uniform": scores[0],
        "subnet": dict(chosen),
        "costs": CostModel(supernet).of(chosen),
        "test": accuracy(supernet, chosen, data, data.test, batches, options.device),
        "uniform test": accuracy(supernet, finalists[0], data, data.test, batches, options.device),
        "validation": max(scores),
    }
    write_json(directory / ("mixed-unseen.json" if options.unseen else "mixed.json"), result)
    sys.stderr.write(f"{name} mixed {result['test']}\n")


def line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def cells_of(name: str, options: argparse.Namespace) -> list[object]:
    """What is known of one training."""
    directory = place(name, options)
    evaluated, mixed, done = (directory / f"{part}.json" for part in ("evaluated", "mixed", "trained"))
    if not evaluated.exists():
        return [ROWS[name].about, "not run", *["-"] * (len(UNIFORM) + 3)]
    found = read_json(evaluated)
    values = [found["accuracies"].get(str(bits), {}).get("test") for bits in UNIFORM]
    values.append(read_json(mixed)["test"] if mixed.exists() else None)
    times = read_json(done) if done.exists() else {}
    shown = ["-" if value is None else f"{value:.2f}" for value in values]
    return [ROWS[name].about, found["epochs"], *shown, times.get("cpu_seconds", "-"), times.get("wall_seconds", "-")]


def table(options: argparse.Namespace, data: DataSet) -> str:
    """All rows, as Markdown."""
    network, right = float_network(options.weights), 0
    with torch.no_grad():
        for images, labels in data.test.batches(500):
            right += int((network(data.normalise(images)).argmax(1) == labels).sum())
    heads = ["training", "epochs", *(f"{bits}/{bits}" for bits in UNIFORM), "mixed 3.0", "CPU s", "wall s"]
    about = {"setting": options.setting, **SETTINGS[options.setting], "seed": options.seed}
    lines = [
        line(heads),
        line(["---"] * len(heads)),
        line(["float network", "-", f"{100 * right / len(data.test):.2f}", *["-"] * (len(heads) - 3)]),
        *(line(cells_of(name, options)) for name in ROWS),
        f"\nSettings: `{json.dumps(about)}`",
        f"\nMachine: `{json.dumps(environment(options.threads))}`\n",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "evaluate", "pairs", "again", "search", "table"))
    parser.add_argument("--data", type=Path, required=True, help="the directory that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="the float network, .npz")
    parser.add_argument("--out", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=None)
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="short")
    parser.add_argument("--epochs", type=int, default=None, help="another number than the setting's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=1000, help="what the predictor learns from")
    parser.add_argument("--low", type=float, default=2.2, help="smallest target of average bits")
    parser.add_argument("--high", type=float, default=5.0, help="largest")
    parser.add_argument("--images", type=int, default=1000, help="validation images per pair")
    parser.add_argument("--recalibration", type=int, default=1024, help="training images for a pair's BatchNorm")
    parser.add_argument("--finalists", type=int, default=20)
    parser.add_argument(
        "--unseen", action="store_true", help="search on half of the test images, report on the other half"
    )
    parser.add_argument("--rounds", type=int, default=4, help="of the mixed search, each with candidates measured")
    parser.add_argument("--measured", type=int, default=40, help="candidates in a round")
    parser.add_argument("--results", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = halved(load_data(options.data)) if options.unseen else load_data(options.data)
    if options.stage == "table":
        text = table(options, data)
        sys.stdout.write(text) if options.results is None else write_text(options.results, text)
        return
    stages = {"train": train, "evaluate": evaluate, "pairs": measure_pairs, "again": again, "search": search}
    for name in options.rows or (["elastic"] if options.stage in ("pairs", "again", "search") else list(ROWS)):
        stages[options.stage](name, options, data)


if __name__ == "__main__":
    main()
