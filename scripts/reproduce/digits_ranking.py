"""How well supernets rank a small space of which the whole truth is known, on scikit-learn's digits.

The space has four layers of four operators (nothing, average pooling, 1x1 and 3x3 convolution): 256 subnets, each trained
alone with six seeds on 100 images. Kendall between the means of seeds 0-2 and of seeds 3-5 is the ceiling that a ranking can
reach. Then supernets are trained in several ways, all with the same number of image passes summed over their sets of weights,
and rank the 256 subnets by their accuracy on validation images::

    python -m scripts.reproduce.digits_ranking table --out RUNS
    python -m scripts.reproduce.digits_ranking supernets --out RUNS [--ways uniform gm ...] [--seeds 0 1 2 3 4]
    python -m scripts.reproduce.digits_ranking report --out RUNS

Every command can be killed and goes on; several may work on one directory. The six trainings of a subnet run side by side as
groups of one network, which trains each of them as it would alone: weights, batch statistics and images are its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import nasq.data
from nasq import Choice, Supernet, elastic
from nasq.data import DataSet, Split
from nasq.data.splits import stratified_split
from nasq.deploy.bench import environment
from nasq.files import append_line, read_json, write_json
from nasq.ranking.audit_seeds import compare_seeds, kendall_over_seeds
from nasq.ranking.audits import consistency
from nasq.space import Subnet
from nasq.training import TrainConfig, Trainer, stream
from nasq.training.splitting import ForestTrainer, Mixture, MixturePaths, SplitPlan, WeightSets, validation_batches

OPERATORS = ("skip", "pool", "conv1", "conv3")
LAYERS, CHANNELS = 4, 8
TRAINING_IMAGES, VALIDATION_IMAGES = 100, 700
ALONE_SEEDS, BATCH = 6, 50
ALONE_EPOCHS, ALONE_LR = 20, 0.05
"""Short and slow, so that subnets lie far apart next to what seeds do: the ceiling is what a table is good for."""
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-4
PASSES = 600
"""Epochs that every way trains in all, summed over its sets of weights."""


def images() -> DataSet:
    """100 training images, 700 for validation, the other 997 for the truth."""
    found = nasq.data.load("digits", validation=VALIDATION_IMAGES)
    kept, rest = stratified_split(found.train.labels, TRAINING_IMAGES, stream(0, "training images"))
    parts = [(found.train.images[rest], found.train.labels[rest]), (found.test.images, found.test.labels)]
    test = Split(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
    train = Split(found.train.images[kept], found.train.labels[kept])
    return DataSet.from_splits("digits-100", found.classes, train, found.validation, test)


def _convolution(channels: int, kernel: int, members: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=members, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _operator(name: str, members: int = 1) -> nn.Module:
    channels = CHANNELS * members
    if name == "skip":
        return nn.Identity()
    if name == "pool":
        return nn.AvgPool2d(3, 1, padding=1)
    return _convolution(channels, int(name[-1]), members)


class Network(nn.Module):
    """Stem, two layers, half the side, two layers, half the side, a linear head on the 2x2 map.

    Args:
        layers: The four layers.
        members: Networks side by side, in groups of channels.
    """

    def __init__(self, layers: list[nn.Module], members: int = 1) -> None:
        super().__init__()
        self.members = members
        self.stem = nn.Conv2d(members, CHANNELS * members, 3, padding=1, groups=members, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS * members)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Conv2d(CHANNELS * members, 10 * members, 2, groups=members)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, members, 8, 8]`` to ``[N, members * 10]``."""
        x = self.layers[1](self.layers[0](self.norm(self.stem(x))))
        x = self.layers[3](self.layers[2](F.max_pool2d(x, 2)))
        return self.head(F.max_pool2d(x, 2)).flatten(1)  # type: ignore[no-any-return]


def build(seed: int, name: str = "") -> Supernet:
    """The supernet with the initial weights of a seed."""
    generator = stream(seed, f"initialisation{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        layers: list[nn.Module] = [
            elastic.OneOf(
                Choice(f"layer{index}", OPERATORS, default="conv3", ordered=False),
                {operator: _operator(operator) for operator in OPERATORS},
            )
            for index in range(LAYERS)
        ]
        return Supernet(Network(layers), "digits_ranking")


def subnets(supernet: Supernet) -> list[Subnet]:
    """All 256, in a fixed order."""
    grid = np.stack(np.meshgrid(*[np.arange(4)] * LAYERS, indexing="ij"), -1).reshape(-1, LAYERS)
    return supernet.space.to_subnets(grid.astype(np.int16))


def _name(subnet: Subnet) -> str:
    return "-".join(str(subnet[f"layer{index}"]) for index in range(LAYERS))


# -- the truth -------------------------------------------------------------------------------------------------------


def alone(subnet: Subnet, data: DataSet) -> list[float]:
    """Test accuracies in % of a subnet that was trained alone, one per seed."""
    generator = stream(0, f"alone {_name(subnet)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        layers = [_operator(str(subnet[f"layer{index}"]), ALONE_SEEDS) for index in range(LAYERS)]
        network = Network(layers, ALONE_SEEDS)
    optimizer = torch.optim.SGD(network.parameters(), lr=ALONE_LR, momentum=MOMENTUM, weight_decay=DECAY)
    x, y = data.normalise(data.train.images)[:, 0], data.train.labels
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ALONE_EPOCHS * steps)
    for _ in range(ALONE_EPOCHS):
        order = torch.stack([torch.randperm(len(x), generator=generator) for _ in range(ALONE_SEEDS)], 1)
        for at in order.split(BATCH):
            logits = network(x[at]).unflatten(1, (ALONE_SEEDS, 10))
            loss = F.cross_entropy(logits.flatten(0, 1), y[at].flatten()) * ALONE_SEEDS  # each member's own mean
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        test = data.normalise(data.test.images).expand(-1, ALONE_SEEDS, -1, -1)
        right = network(test).unflatten(1, (ALONE_SEEDS, 10)).argmax(2) == data.test.labels[:, None]
    return (100 * right.double().mean(0)).tolist()  # type: ignore[no-any-return]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines() if path.exists() else ():
        yield json.loads(line)


def table(options: argparse.Namespace) -> None:
    """Trains what is missing; two processes may do the same row twice, which changes nothing."""
    data, path = images(), options.out / "table.jsonl"
    for number, subnet in enumerate(subnets(build(0))):
        if number % options.parts != options.part or _name(subnet) in {row["name"] for row in _rows(path)}:
            continue
        began = time.process_time()
        values = alone(subnet, data)
        row = {"name": _name(subnet), "test": values, "cpu_seconds": round(time.process_time() - began, 2)}
        append_line(path, json.dumps(row))


def truth(out: Path) -> NDArray[np.float64]:
    """``[256, seeds]``; NaN where a subnet is not trained yet."""
    known = {row["name"]: row["test"] for row in _rows(out / "table.jsonl")}
    return np.array([known.get(_name(subnet), [np.nan] * ALONE_SEEDS) for subnet in subnets(build(0))])


# -- supernets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to train supernets.

    Attributes:
        about: For the table.
        settings: What differs from uniform sampling.
        splits: Epochs of splits by gradient matching.
        epochs: Of one set of weights, its ancestors' included.
        sets: Sets of weights of a mixture.
    """

    about: str
    settings: dict[str, Any]
    splits: tuple[int, ...] = ()
    epochs: int = PASSES
    sets: int = 1


WAYS = {
    "uniform": Way("uniform (SPOS)", {}),
    "fair": Way("strict fairness (FairNAS), four paths per step", {"sampler": "fair"}, epochs=PASSES // 4),
    "pa": Way("PA", {"sampler": "importance", "importance_shared": True}),
    "pa-da": Way("PA&DA", {"sampler": "importance", "importance_shared": True, "data_sampler": "importance"}),
    "pa-floor": Way("PA, per layer, floor 0.5", {"sampler": "importance", "importance_floor": 0.5}),
    "pa-da-whole": Way(
        "PA&DA by the whole gradient's norm, per layer, kept",
        {
            "sampler": "importance",
            "importance_whole": True,
            "importance_decay": 0.95,
            "data_sampler": "importance",
            "importance_keep": True,
        },
    ),
    "gm": Way("GM forest, one split, two leaves", {}, splits=(PASSES // 3,), epochs=2 * PASSES // 3),
    "gm-long": Way(
        "GM forest, leaves as long as the one supernet (1.7 times the passes)", {}, splits=(PASSES // 3,), epochs=PASSES
    ),
    "mixture": Way("balanced mixture, two sets", {}, sets=2),
}


def _config(way: Way, seed: int) -> TrainConfig:
    plain = {
        "epochs": way.epochs, "batch_size": BATCH, "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY,
        "sampler": "uniform", "distill": 0.0, "warmup_epochs": 0.0, "bf16": False, "channels_last": False, "threads": 1,
        "seed": seed, "checkpoint_every": way.epochs if not way.splits else way.splits[0],
    }  # fmt: skip
    return TrainConfig.from_dict({**plain, **way.settings})


def train(way: Way, seed: int, data: DataSet, directory: Path) -> Supernet | WeightSets:
    """A trained supernet, forest or mixture."""
    config = _config(way, seed)
    if way.splits:
        plan = SplitPlan(way.splits, repetitions=20, batch_size=BATCH)
        return ForestTrainer(lambda name: build(seed, name), data, config, directory, plan).run()
    if way.sets == 1:
        supernet = build(seed)
        Trainer(supernet, data, config, directory).run()
        return supernet
    mixture = Mixture([build(seed, str(index)) for index in range(way.sets)])
    paths = MixturePaths(mixture, stream(seed, "paths"), config.epochs, validation_batches(data, BATCH))
    Trainer(mixture, data, config, directory, path_sampler=paths).run()
    paths.settle()
    return mixture


@torch.no_grad()
def inherited(supernet: Supernet | WeightSets, data: DataSet) -> list[float]:
    """Accuracy of each subnet in % on validation images, with batch statistics of the training images."""
    train_x, x = data.normalise(data.train.images), data.normalise(data.validation.images)
    found = []
    for subnet in subnets(build(0)):
        bn = supernet.recalibrate(subnet, [train_x])
        supernet.eval()
        with supernet.activate(subnet, bn):
            found.append(100 * float((supernet(x).argmax(1) == data.validation.labels).double().mean()))
    return found


def supernets(options: argparse.Namespace) -> None:
    """Trains and evaluates what is missing."""
    data = images()
    for seed in options.seeds:
        for name in options.ways:
            path = options.out / "supernets" / f"{name}-{seed}.json"
            if path.exists():
                continue
            began = time.process_time()
            supernet = train(WAYS[name], seed, data, options.out / "work" / f"{name}-{seed}")
            scores = inherited(supernet, data)
            write_json(path, {"scores": scores, "cpu_seconds": round(time.process_time() - began, 1)})
            sys.stderr.write(f"{name} seed {seed} {time.process_time() - began:.0f} s of CPU\n")


# -- the result ------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    sys.stdout.write(text + "\n")


def report(options: argparse.Namespace) -> None:
    """Prints Markdown: the ceiling, Kendall of each way, and which differences are there."""
    found = truth(options.out)
    known = ~np.isnan(found).any(1)
    halves = found[known, :3].mean(1), found[known, 3:].mean(1)
    mean, ceiling = found[known].mean(1), consistency(*halves)
    say(f"{int(known.sum())} subnets, test accuracy {mean.min():.1f} to {mean.max():.1f} %, deviation over seeds "
        f"{found[known].std(1, ddof=1).mean():.2f}\n")  # fmt: skip
    say(f"Ceiling (Kendall between two disjoint 3-seed means): {_shown(ceiling)}\n")
    scores: dict[str, NDArray[np.float64]] = {}
    for name in WAYS:
        paths = sorted((options.out / "supernets").glob(f"{name}-[0-9]*.json"))
        if paths:
            scores[name] = np.array([read_json(path)["scores"] for path in paths])[:, known]
    say("| way | seeds | Kendall, mean over seeds | each seed | minus uniform |\n|---|---|---|---|---|")
    for name, own in scores.items():
        each = ", ".join(f"{consistency(one, mean, resamples=1).value:.3f}" for one in own)
        gain = "-" if name == "uniform" or "uniform" not in scores else _verdict(own, scores["uniform"], mean)
        say(f"| {WAYS[name].about} | {len(own)} | {_shown(kendall_over_seeds(own, mean, 300))} | {each} | {gain} |")
    say(f"\n{json.dumps(environment(1))}")


def _verdict(own: NDArray[np.float64], other: NDArray[np.float64], mean: NDArray[np.float64]) -> str:
    gain = compare_seeds(own, other, mean, 300)
    return f"{_shown(gain)}: {'not separated' if not gain.separated else 'better' if gain.value > 0 else 'worse'}"


def _shown(one: Any) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("table", "supernets", "report"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0, help="of the table, counted from 0")
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"table": table, "supernets": supernets, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
