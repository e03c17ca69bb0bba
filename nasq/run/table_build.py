"""Ground truth of your own: trains subnets alone, each from weights of its own, and writes a table.

The work lies in a directory that any number of processes, on any number of machines, may work on at once. Every training is
a job with a result file; a lock that dies with its process says who is at it. Killed at any moment, the same command goes on:
what is done is done, what was being trained goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from nasq.cost import CostModel
from nasq.data import DataSet, Split
from nasq.data.splits import split_size, stratified_split
from nasq.errors import ArtifactError, InputError, TrainingError
from nasq.files import read_json, sha256, write_json
from nasq.ranking.table import Table
from nasq.ranking.table_names import official_name
from nasq.run.assemble import build_network, load_images
from nasq.run.config import RunConfig
from nasq.space import SearchSpace, Subnet
from nasq.supernet import Supernet
from nasq.training import TrainConfig, Trainer, stream

__all__ = ["Selection", "TableBuild"]

_SCHEMA = 1
_MOST = 200_000
_ALONE = {"sampler": "uniform", "paths": 1, "distill": 0.0}
Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Selection:
    """Which subnets are trained.

    Attributes:
        count: So many different random ones; ``None``: every subnet of the space, or those of ``file``.
        file: A table or score file that names them.
    """

    count: int | None = None
    file: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """What tells one selection from another: the file by its content."""
        return {"count": self.count, "file": None if self.file is None else self._digest(self.file)}

    @staticmethod
    def _digest(file: Path) -> str:
        try:
            return sha256(file)[:16]
        except OSError as error:
            raise InputError(
                f"the file of subnets {file} cannot be read: {error.strerror}. Give a table or a file of scores."
            ) from error

    def subnets(self, network: nn.Module, space: SearchSpace, seed: int) -> list[Subnet]:
        """The subnets, each once.

        Raises:
            InputError: The space is too large to train all of it, or has fewer subnets than were asked for.
        """
        if self.file is not None:
            return list(dict.fromkeys(Table.read(self.file).members(network, space)))
        wanted = space.size if self.count is None else self.count
        if not 1 <= wanted <= min(space.size, _MOST):
            raise InputError(
                f"{wanted:,} subnets of {space.name!r} are to be trained. It has {space.size:,}; give --count from 1 to "
                f"{min(space.size, _MOST):,}."
            )
        return _draw(space, wanted, np.random.default_rng([seed, wanted]))


def _draw(space: SearchSpace, wanted: int, rng: np.random.Generator) -> list[Subnet]:
    """Different random subnets; the last few of a space are found by walking over neighbours."""
    found: dict[Subnet, None] = {}
    idle = 0
    while len(found) < wanted and idle < 20:
        before = len(found)
        found.update(dict.fromkeys(space.to_subnets(space.sample_batch(max(64, 2 * (wanted - before)), rng))))
        idle = idle + 1 if len(found) == before else 0
    queue = list(found)
    for subnet in queue:
        if len(found) >= wanted:
            break
        fresh = [other for other in space.neighbours(subnet) if other not in found]
        found.update(dict.fromkeys(fresh))
        queue.extend(fresh)
    if len(found) < wanted:
        raise InputError(f"only {len(found)} different subnets of {space.name!r} were found, and {wanted} were wanted.")
    return list(found)[:wanted]


class TableBuild:
    """A table that is being built.

    Args:
        directory: Where the work lies; made if it is not there.
        config: Space, data, ``train`` (of one subnet), seed, device and threads; the rest is not used.
        selection: Which subnets.
        seeds: Trainings of each subnet.
        images: Training images: a share or a number; ``None`` for all.
        listener: Told ``{"event": "trained", ...}`` after every training.

    Raises:
        InputError: The directory holds the work on another table; says what differs.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        selection: Selection,
        seeds: int = 1,
        images: float | None = None,
        listener: Listener | None = None,
    ) -> None:
        if seeds < 1:
            raise InputError(f"{seeds} seeds were asked for. Give at least 1 training per subnet.")
        self.directory, self.config, self.seeds, self.listener = directory, config, seeds, listener
        self.training = TrainConfig.from_dict({**_ALONE, **config.train, "threads": config.threads})
        self.data = _fewer(load_images(config), images, config.seed)
        self.network = build_network(config, self.data)
        self.space = Supernet(self.network, config.space).space
        self._facts = {
            "schema": _SCHEMA, "space": self.space.fingerprint, "data": self.data.fingerprint, "seeds": seeds,
            "seed": config.seed, "space_arguments": config.space_arguments, "train": self.training.to_dict(),
            "selection": selection.to_json(),
        }  # fmt: skip
        self._admit(selection)
        self.subnets = list(Table.read(self._list).subnets)

    def _admit(self, selection: Selection) -> None:
        file = self.directory / "build.json"
        if file.exists():
            before = read_json(file)
            differing = [key for key, value in json.loads(json.dumps(self._facts)).items() if before.get(key) != value]
            if differing:
                key = differing[0]
                raise InputError(
                    f"{self.directory} holds the work on another table: {key} is {str(before.get(key))[:200]} there and "
                    f"{str(self._facts[key])[:200]} here. Use the same settings, or another --out."
                )
            return
        subnets = selection.subnets(self.network, self.space, self.config.seed)
        Table({}, subnets=subnets, source="the selection").write(self._list)
        write_json(file, self._facts)

    @property
    def _list(self) -> Path:
        return self.directory / "subnets.csv"

    @property
    def jobs(self) -> list[tuple[Subnet, int]]:
        """Every training: the first of each subnet, then the second of each, and so on."""
        return [(subnet, seed) for seed in range(self.seeds) for subnet in self.subnets]

    def _folder(self, subnet: Subnet, seed: int) -> Path:
        return self.directory / "jobs" / f"{subnet.id}-{seed}"

    def result(self, subnet: Subnet, seed: int) -> dict[str, Any] | None:
        """What a training ended with; ``None`` where it did not yet.

        Raises:
            ArtifactError: The file is damaged.
        """
        file = self._folder(subnet, seed) / "result.json"
        if not file.exists():
            return None
        found = read_json(file)
        if not isinstance(found, dict):
            raise ArtifactError(f"{file} is damaged. Delete it; the training is done again.")
        return found

    def done(self) -> int:
        """How many trainings are done."""
        return sum((self._folder(*job) / "result.json").exists() for job in self.jobs)

    def work(self) -> int:
        """Does every job that is not done and that nobody else is at; returns how many it did."""
        count = 0
        for job in self.jobs:
            folder = self._folder(*job)
            if (folder / "result.json").exists():
                continue
            with _lock(folder) as mine:
                if mine and self.result(*job) is None:
                    self._one(*job)
                    count += 1
        return count

    def _one(self, subnet: Subnet, seed: int) -> None:
        folder = self._folder(subnet, seed)
        own = int.from_bytes(hashlib.sha256(f"{self.config.seed}/{subnet.id}/{seed}".encode()).digest()[:7], "little")
        plain = Supernet(fresh_subnet(self.config.model_copy(update={"seed": own}), self.data, subnet))
        trainer = Trainer(plain, self.data, replace(self.training, seed=own), folder, device=self.config.device)
        found: dict[str, Any]
        try:
            history = trainer.run()
            found = {
                "valid_acc": accuracy(plain, self.data, self.data.validation),
                "test_acc": accuracy(plain, self.data, self.data.test),
                "train_loss": float(history[-1]["loss"]),
                "seconds": sum(float(event["seconds"]) for event in history),
            }
        except TrainingError as error:
            found = {"failed": str(error)}
        write_json(folder / "result.json", found)
        for path in folder.iterdir():
            if path.name.startswith("checkpoint"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if self.listener is not None:
            self.listener({"event": "trained", "subnet": subnet.id, "seed": seed, **found})

    def failed(self) -> list[str]:
        """Why trainings failed, one line each."""
        results = [(subnet, seed, self.result(subnet, seed)) for subnet, seed in self.jobs]
        return [
            f"{subnet.id}, seed {seed}: {one['failed']}" for subnet, seed, one in results if one and "failed" in one
        ]

    def table(self) -> Table:
        """What is known so far: subnets with at least one training that ended well.

        Raises:
            InputError: There is none.
        """
        known: list[Subnet] = []
        rows: list[dict[str, float]] = []
        for subnet in self.subnets:
            found = {seed: self.result(subnet, seed) for seed in range(self.seeds)}
            good = {seed: one for seed, one in found.items() if one and "failed" not in one}
            if good:
                known.append(subnet)
                rows.append(_row(good, self.seeds))
        if not known:
            raise InputError(f"no training of {self.directory} has ended well yet, so there is no table to write.")
        metrics = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        supernet = Supernet(self.network, self.config.space)
        costs = CostModel(supernet, torch.zeros(1, *self.data.input_shape)).evaluate(self.space.to_rows(known))
        metrics |= {"params": costs["params"].astype(float), "flops": costs["macs"].astype(float)}
        names = [official_name(self.network, subnet) for subnet in known]
        return Table(metrics, names if all(names) else [], known, str(self.directory))


def _row(good: Mapping[int, Mapping[str, float]], seeds: int) -> dict[str, float]:
    """Means over the seeds, then the accuracies of each; accuracies in %."""
    row = {key: 100 * fmean(one[key] for one in good.values()) for key in ("valid_acc", "test_acc")}
    row |= {key: fmean(one[key] for one in good.values()) for key in ("train_loss", "seconds")}
    for key in ("valid_acc", "test_acc"):
        row |= {f"{key}_seed{seed}": 100 * good[seed][key] if seed in good else nan for seed in range(seeds)}
    return row


def fresh_subnet(config: RunConfig, data: DataSet, subnet: Subnet) -> nn.Module:
    """A subnet with initial weights of its own, decided by ``config.seed``.

    The supernet's initial weights are cut out first; then every layer that knows its own initial distribution
    (``reset_parameters``) draws anew, because a slice's fan-in is not that of the largest layer.
    """
    plain = Supernet(build_network(config, data)).extract(subnet)
    seed = int(torch.randint(2**62, (), generator=stream(config.seed, "stand-alone initialisation")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in plain.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
                module.reset_parameters()
    return plain


@torch.no_grad()
def accuracy(model: nn.Module, data: DataSet, split: Split, batch_size: int = 512) -> float:
    """Share of right answers, in evaluation mode, on the model's device."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    for images, labels in split.batches(batch_size):
        right += int((model(data.normalise(images.to(device))).argmax(1) == labels.to(device)).sum())
    return right / len(split)


def _fewer(data: DataSet, images: float | None, seed: int) -> DataSet:
    """The data set with fewer training images, drawn class by class."""
    if images is None:
        return data
    count = split_size(images, len(data.train), "the number of training images")
    kept, _ = stratified_split(data.train.labels, count, stream(seed, "training images"))
    indices = None if data.train.indices is None else data.train.indices[kept]
    train = Split(data.train.images[kept], data.train.labels[kept], indices)
    return DataSet.from_splits(data.name, data.classes, train, data.validation, data.test)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether the job in ``folder`` is ours until the end of the ``with`` statement; the lock dies with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
