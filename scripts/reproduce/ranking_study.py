"""What the studies of supernet rankings have in common: train supernets in several ways, rank subnets of a published table.

A study is a search space, a table, and two settings: ``short`` for a CPU and ``full`` for a CUDA device. All ways of a
study train the same number of image passes, summed over their sets of weights. Every training and every evaluated subnet is
kept, so each command may be killed and goes on; ``--minutes`` stops it in time for whatever limit there is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import nasq.data
from nasq import Supernet
from nasq.data import Augment, AugmentPolicy, DataSet, Split
from nasq.data.splits import stratified_split
from nasq.deploy.bench import environment
from nasq.files import append_line, write_json
from nasq.ranking.audit_seeds import compare_seeds, kendall_over_seeds
from nasq.ranking.statistics import kendall
from nasq.ranking.table_import import import_table
from nasq.space import Subnet
from nasq.training import TrainConfig, Trainer, stream
from nasq.training.splitting import (
    Forest,
    ForestTrainer,
    Mixture,
    MixturePaths,
    SplitPlan,
    WeightSets,
    validation_batches,
)

__all__ = ["Setting", "Study", "Way", "run"]

Network = Supernet | WeightSets


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        about: For the table of results.
        config: What differs from uniform sampling in :class:`nasq.training.TrainConfig`.
        splits: When to split by gradient matching, as shares of all passes.
        sets: Sets of weights of a balanced mixture.
        paths: Subnets per step, each of which is a pass.
    """

    about: str
    config: Mapping[str, Any] = field(default_factory=dict)
    splits: tuple[float, ...] = ()
    sets: int = 1
    paths: int = 1

    def schedule(self, passes: int) -> tuple[int, tuple[int, ...]]:
        """Epochs of one set of weights, its ancestors' included, and the epochs of splits.

        With splits after ``t1 < t2 < ...`` the passes are ``t1 + 2 (t2 - t1) + 4 (...)``, which come to ``passes``.
        """
        if not self.splits:
            return passes // self.paths, ()
        at = tuple(max(1, round(share * passes)) for share in self.splits)
        spent = sum(2**level * (end - begin) for level, (begin, end) in enumerate(zip((0, *at), at, strict=False)))
        last = (passes - spent) // 2 ** len(at)
        if last < 1:
            raise SystemExit(f"{passes} passes are too few for splits at {at}: nothing is left for the leaves")
        return at[-1] + last, at


UNIFORM = Way("uniform (SPOS)")
PA_DA = Way("PA&DA", {"sampler": "importance", "importance_shared": True, "data_sampler": "importance"})
PA_DA_WHOLE = Way(
    "PA&DA by the whole gradient's norm",
    {
        "sampler": "importance", "importance_whole": True, "importance_decay": 0.95, "data_sampler": "importance",
        "importance_keep": True,
    },
)  # fmt: skip
FAIR = Way("strict fairness (FairNAS)", {"sampler": "fair"}, paths=5)
GM = Way("GM forest, two splits, four leaves", splits=(0.2, 0.4))
GM_ONCE = Way("GM forest, one split, two leaves", splits=(1 / 3,))
MIXTURE = Way("balanced mixture, two sets", sets=2)


@dataclass(frozen=True)
class Setting:
    """How much is trained and ranked.

    Attributes:
        network: Arguments of the search space.
        training_images, validation_images: Of CIFAR-10's 50,000; validation takes what it needs first.
        passes: Epochs in all.
        config: Of every training.
        subnets: How many of the table are ranked; ``None`` for all.
        batch_size: Images per batch of the evaluation, and of the BatchNorm statistics.
        repetitions: Batches in which options are compared before a split.
        image_size: Side to scale images to; ``None`` leaves their 32.
        bf16: Whether subnets are evaluated in bf16, as they were trained where the machine is fast at it.
    """

    network: Mapping[str, Any]
    training_images: int
    validation_images: int
    passes: int
    config: Mapping[str, Any]
    subnets: int | None
    batch_size: int
    repetitions: int
    image_size: int | None = None
    bf16: bool = False


@dataclass(frozen=True)
class Study:
    """One script.

    Attributes:
        name: Of the search space, and of the folders.
        build: Makes its network.
        table: Kind of table, see ``nasq table import``.
        metric: Its column.
        ways: What is compared, the baseline first.
        settings: ``short`` and ``full``.
    """

    name: str
    build: Callable[..., nn.Module]
    table: str
    metric: str
    ways: Mapping[str, Way]
    settings: Mapping[str, Setting]


class Runner:
    """A study with its options."""

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.setting = study.settings[options.setting]
        self.deadline = time.monotonic() + 60 * options.minutes
        self.data = self._images()
        self.table = import_table(study.table, options.table)
        _, self.truth = self.table.column(study.metric)

    def _images(self) -> DataSet:
        setting = self.setting
        found = nasq.data.load(
            "cifar10", self.options.data, validation=setting.validation_images, image_size=setting.image_size
        )
        count = self.setting.training_images
        if count < len(found.train):
            kept, _ = stratified_split(found.train.labels, count, stream(0, "training images"))
            train = Split(found.train.images[kept], found.train.labels[kept])
            found = DataSet.from_splits(found.name, found.classes, train, found.validation, found.test)
        return found.to(self.options.device)

    def left(self) -> bool:
        """Whether there is time."""
        return time.monotonic() < self.deadline

    def place(self, way: str, seed: int) -> Path:
        """Where a training's files are."""
        return Path(self.options.out) / f"{self.study.name}-{self.options.setting}" / f"{way}-seed{seed}"

    def build(self, seed: int, name: str = "") -> Supernet:
        """The supernet with the initial weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, f"initialisation{name}").initial_seed() % 2**62)
            return Supernet(self.study.build(**self.setting.network), self.study.name)

    def config(self, way: Way, seed: int) -> TrainConfig:
        """Of one training."""
        epochs, _ = way.schedule(self.setting.passes)
        plain = {"sampler": "uniform", "distill": 0.0, "warmup_epochs": 0.0, "epochs": epochs, "seed": seed}
        return TrainConfig.from_dict({**plain, **self.setting.config, **way.config})

    # -- training ----------------------------------------------------------------------------------------------------

    def train(self, name: str, seed: int) -> None:
        """Trains until the end or the deadline, and leaves ``trained/`` behind at the end."""
        place, way = self.place(name, seed), self.study.ways[name]
        if (place / "trained.json").exists():
            return
        began, config = time.process_time(), self.config(way, seed)

        def tell(event: dict[str, Any]) -> None:
            append_line(place / "events.jsonl", json.dumps({**event, "time": round(time.time(), 1)}))
            if event["event"] == "epoch":
                sys.stderr.write(f"{name} seed {seed} {event.get('leaf', '')} epoch {event['epoch']} of {event['epochs']}, "
                                 f"{event['images_per_second']} images/s\n")  # fmt: skip
                if not self.left():
                    raise _OutOfTime

        _, splits = way.schedule(self.setting.passes)
        if splits:
            plan = SplitPlan(splits, repetitions=self.setting.repetitions)
            grower = ForestTrainer(
                lambda stream_name: self.build(seed, stream_name), self.data, config, place, plan,
                device=self.options.device, on_event=tell,
            )  # fmt: skip
            network: Network = grower.run()
        elif way.sets > 1:
            network = self._mixture(way, seed, config, place, tell)
        else:
            network = self.build(seed)
            Trainer(network, self.data, config, place, device=self.options.device, on_event=tell).run()
        network.save(place / "trained")
        write_json(place / "trained.json", {"cpu_seconds": time.process_time() - began, "config": config.to_dict()})

    def _mixture(self, way: Way, seed: int, config: TrainConfig, place: Path, tell: Callable[[Any], None]) -> Mixture:
        mixture = Mixture([self.build(seed, str(index)) for index in range(way.sets)])
        draws = validation_batches(self.data, config.batch_size, self.options.device)
        paths = MixturePaths(mixture, stream(seed, "paths"), config.epochs, draws)
        device = self.options.device
        Trainer(mixture, self.data, config, place, device=device, on_event=tell, path_sampler=paths).run()
        paths.settle()
        return mixture

    def load(self, name: str, seed: int) -> Network:
        """What :meth:`train` left behind."""
        place, way = self.place(name, seed) / "trained", self.study.ways[name]
        count = 2 ** len(way.splits) * way.sets
        supernets = [self.build(seed) for _ in range(count)]
        if way.splits:
            return Forest.load(place, supernets).to(self.options.device)
        if way.sets > 1:
            return Mixture.load(place, supernets).to(self.options.device)
        supernets[0].load(place)
        return supernets[0].to(self.options.device)

    # -- ranking -----------------------------------------------------------------------------------------------------

    def rows(self) -> NDArray[np.int64]:
        """Which rows of the table are ranked: the same ones for every way and seed."""
        count = self.setting.subnets or len(self.table)
        drawn = np.random.default_rng(0).choice(len(self.table), min(count, len(self.table)), replace=False)
        return np.sort(drawn)

    def rank(self, name: str, seed: int) -> None:
        """Evaluates subnets on validation images until the end or the deadline."""
        place = self.place(name, seed)
        if not (place / "trained.json").exists():
            return
        known = self.known(name, seed)
        todo = [row for row in self.rows().tolist() if self.table.names[row] not in known]
        if not todo:
            return
        network = self.load(name, seed).eval()
        supernet = network if isinstance(network, Supernet) else network.supernet(0)
        members = self.table.rows(np.array(todo)).members(supernet.module, supernet.space)
        batches, part = list(self._statistics()), list(self._validation())
        for row, subnet in zip(todo, members, strict=True):
            value = self.accuracy(network, subnet, batches, part)
            append_line(place / "ranking.jsonl", json.dumps({"name": self.table.names[row], "accuracy": value}))
            if not self.left():
                raise _OutOfTime

    def _statistics(self) -> Iterator[Tensor]:
        """One batch of augmented training images, for the BatchNorm statistics of every subnet."""
        augment = Augment(AugmentPolicy.for_data(self.data.name), stream(0, "recalibration images"))
        order = torch.randperm(len(self.data.train), generator=stream(0, "recalibration order"))
        at = order[: self.setting.batch_size].to(self.options.device)
        yield self._shaped(self.data.normalise(augment(self.data.train.images[at])))

    def _validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.data.validation.batches(self.setting.batch_size):
            yield self._shaped(self.data.normalise(images)), labels

    def _shaped(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def accuracy(
        self, network: Network, subnet: Subnet, statistics: list[Tensor], part: list[tuple[Tensor, Tensor]]
    ) -> float:
        """Of one subnet with inherited weights and BatchNorm statistics of its own, in %."""
        precision = torch.autocast(torch.device(self.options.device).type, torch.bfloat16, enabled=self.setting.bf16)
        with precision:
            bn = network.recalibrate(subnet, statistics)
        network.eval()
        with precision, network.activate(subnet, bn):
            right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in part)
        return 100 * right / len(self.data.validation)

    def known(self, name: str, seed: int) -> dict[str, float]:
        """What is evaluated; a last line that a kill cut short is left out."""
        file = self.place(name, seed) / "ranking.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return {row["name"]: row["accuracy"] for row in whole}

    # -- report ------------------------------------------------------------------------------------------------------

    def report(self) -> str:
        """Markdown: Kendall of every way, and which differences from the first way are there."""
        rows = self.rows()
        names = [self.table.names[row] for row in rows]
        truth = self.truth[rows]
        lines = [f"{self.study.name}, {self.options.setting} setting: {len(rows)} subnets on "
                 f"{len(self.data.validation):,} validation images of side {self.data.input_shape[1]} against "
                 f"{self.study.metric}", "",
                 "| way | seeds | Kendall, mean over seeds | each seed | minus the first way |",
                 "|---|---|---|---|---|"]  # fmt: skip
        baseline: NDArray[np.float64] | None = None
        for name, way in self.study.ways.items():
            found = [known for seed in self.options.seeds if len(known := self.known(name, seed)) == len(rows)]
            if not found:
                lines.append(f"| {way.about} | not run | | | |")
                continue
            scores = np.array([[one[key] for key in names] for one in found])
            each = ", ".join(f"{kendall(one, truth):.3f}" for one in scores)
            gain = "-" if baseline is None else verdict(scores, baseline, truth)
            baseline = scores if baseline is None else baseline
            lines.append(
                f"| {way.about} | {len(found)} | {shown(kendall_over_seeds(scores, truth, 300))} | {each} | {gain} |"
            )
        costs = [key for key in ("params", "flops") if key in self.table.metrics]
        lines += ["", *(f"{key}: Kendall {kendall(self.table.metrics[key][rows], truth):.3f}" for key in costs)]
        return "\n".join([*lines, "", json.dumps(environment(torch.get_num_threads()))])


class _OutOfTime(RuntimeError):
    """The deadline is over; what is done is kept."""


def shown(one: Any) -> str:
    """An estimate with its interval."""
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def verdict(own: NDArray[np.float64], other: NDArray[np.float64], truth: NDArray[np.float64]) -> str:
    """A paired difference in words."""
    gain = compare_seeds(own, other, truth, 300)
    return f"{shown(gain)}: {'not separated' if not gain.separated else 'better' if gain.value > 0 else 'worse'}"


def run(study: Study, about: str | None) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "rank", "report", "all"))
    parser.add_argument("--data", type=Path, required=True, help="directory of CIFAR-10")
    parser.add_argument("--table", type=Path, required=True, help="the published table")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--setting", choices=study.settings, default="short")
    parser.add_argument("--ways", nargs="+", choices=study.ways, default=list(study.ways))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after the epoch or subnet that passes this")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    runner = Runner(study, options)
    try:
        for seed in options.seeds:
            for way in options.ways:
                if options.command in ("train", "all"):
                    runner.train(way, seed)
                if options.command in ("rank", "all"):
                    runner.rank(way, seed)
    except _OutOfTime:
        sys.stderr.write("out of time; the same command goes on\n")
    if options.command in ("report", "all"):
        sys.stdout.write(runner.report() + "\n")
