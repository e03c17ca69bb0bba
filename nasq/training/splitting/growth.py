"""Growing a forest: train, compare options, split, train on; resumable at every epoch and every split.

Source: the schedule of gradient-matching few-shot NAS (Hu et al., ICLR 2022, arXiv 2203.15207, section 3.3), and of
few-shot NAS by exhaustive split (Zhao et al., ICML 2021).
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nasq.data import Augment, DataSet
from nasq.errors import ArtifactError, InputError
from nasq.files import read_json, write_json
from nasq.training.checkpoint import exists
from nasq.training.config import TrainConfig
from nasq.training.distributed import World
from nasq.training.loop import Event, Trainer
from nasq.training.paths import PathSampler
from nasq.training.region import Region
from nasq.training.samplers import data_sampler, path_sampler
from nasq.training.splitting.forest import Forest
from nasq.training.splitting.matching import gradient_distances
from nasq.training.splitting.partition import Partition, balanced_partition
from nasq.training.splitting.plan import SplitPlan, check_plan, splittable
from nasq.training.streams import stream

if TYPE_CHECKING:
    from nasq.supernet import Supernet

__all__ = ["ForestTrainer"]

MakePaths = Callable[["Supernet", Region, torch.Generator], PathSampler]


@dataclass
class _Node:
    """A leaf, or what was one before it was split. ``name``: the way to it from the root, ``""``, ``"0"``, ``"01"``..."""

    name: str
    region: Region
    split: dict[str, Any] | None = field(default=None)

    @property
    def folder(self) -> str:
        return "root" if not self.name else f"leaf{self.name}"


class ForestTrainer:
    """Trains a supernet that splits into several on the way.

    Each split compares the options of all candidate choices on the weights they share, takes the choice whose balanced
    groups are farthest apart, and copies weights, optimizer and schedule into one leaf per group. Siblings choose
    their next split independently.

    Args:
        build: Makes the supernet with its initial weights, given a name for the random stream of initialisation; called
            once per leaf, always with the same space.
        data: Only its training split is read.
        config: How every leaf trains; its ``epochs`` count from the root to the end of a leaf.
        directory: Where everything goes; a growth that is there is continued.
        plan: When and how to split.
        mode, device, on_step: See :class:`nasq.training.Trainer`.
        on_event: Called with the trainers' events and ``{"event": "split", ...}``; all carry ``"leaf"``.
        paths: Makes the path sampler of a leaf from its supernet, region and stream; by default what ``config`` names. What
            it makes has to keep its stream as ``generator``.
    """

    def __init__(
        self,
        build: Callable[[str], Supernet],
        data: DataSet,
        config: TrainConfig,
        directory: pathlib.Path | str,
        plan: SplitPlan,
        *,
        mode: str | None = None,
        device: torch.device | str = "cpu",
        on_event: Callable[[Event], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        paths: MakePaths | None = None,
    ) -> None:
        self.build, self.data, self.config, self.plan = build, data, config, plan
        self.directory = pathlib.Path(directory)
        self.mode, self.device, self.on_event, self.on_step = mode, device, on_event, on_step
        self.paths = paths or (lambda supernet, region, generator: path_sampler(supernet, config, generator, region))
        self.space = build("").space
        check_plan(plan, config, self.space)
        self._record: dict[str, Any] = self._read()

    def run(self) -> Forest:
        """Trains and splits what remains; returns the trained forest.

        Raises:
            InputError: Nothing is left to split, or what is in the directory was grown with other settings.
            TrainingError: A loss or a gradient is not finite; checkpoints and splits so far are kept.
            ArtifactError: What is in the directory is corrupt.
        """
        frontier = [_Node("", Region(self.space, {}))]
        for epoch in self.plan.epochs:
            frontier = [child for node in frontier for child in self._grow(node, epoch)]
        leaves = [self._train(node, self.config.epochs).supernet for node in frontier]
        return Forest([node.region for node in frontier], leaves)

    def train_root(self) -> Supernet:
        """Trains up to the first split, or to the end where there is none; :meth:`run` goes on from there."""
        return self._train(_Node("", Region(self.space, {})), (*self.plan.epochs, self.config.epochs)[0]).supernet

    def _grow(self, node: _Node, epoch: int) -> list[_Node]:
        """Trains a node up to ``epoch`` and splits it; its children."""
        if node.name not in self._record["splits"]:
            trainer = self._train(node, epoch)
            self._record["splits"][node.name] = self._decide(node, trainer)
            if trainer.world.first:  # every rank decides the same
                write_json(self.directory / "splits.json", self._record)
            trainer.world.wait()
        split = self._record["splits"][node.name]
        options = self.space[split["choice"]].options
        regions = node.region.split(
            split["choice"], [[options.index(option) for option in group] for group in split["groups"]]
        )
        return [_Node(f"{node.name}{index}", region) for index, region in enumerate(regions)]

    def _prefix(self, node: _Node) -> pathlib.Path:
        return self.directory / node.folder / "checkpoint"

    def _train(self, node: _Node, until: int) -> Trainer:
        last = len(node.name) == len(self.plan.epochs)
        fresh = not node.name or (self.plan.restart and last)
        supernet = self.build(node.name if fresh else "")
        generator = stream(self.config.seed, f"paths{node.name}")
        trainer = Trainer(
            supernet,
            self.data,
            self.config,
            self.directory / node.folder,
            self.mode,
            self.device,
            on_event=lambda event: self._tell({**event, "leaf": node.name}),
            on_step=self.on_step,
            path_sampler=self.paths(supernet, node.region, generator),
            data_sampler=data_sampler(
                len(self.data.train), self.config, stream(self.config.seed, f"data{node.name}"), self.device
            ),
        )
        if not fresh and not exists(self._prefix(node)):
            state = generator.get_state()
            parent = _Node(node.name[:-1], node.region)
            trainer.inherit(self._prefix(parent))
            generator.set_state(state)  # siblings draw paths of their own
        trainer.run(until)
        return trainer

    def _candidates(self, region: Region) -> list[str]:
        """What may still be split; :func:`check_plan` saw to it that something may."""
        names = splittable(self.space) if self.plan.choices is None else list(self.plan.choices)
        return [name for name in names if name not in region.allowed and len(self.space[name].options) > 1]

    def _decide(self, node: _Node, trainer: Trainer) -> dict[str, Any]:
        """Which choice to split into which groups, with the numbers that say so."""
        generator = stream(self.config.seed, f"matching{node.name}")
        augment = Augment(trainer.augment.policy, generator)
        split = trainer.split

        def batch(repetition: int) -> tuple[Tensor, Tensor]:
            at = torch.randint(len(split), (min(self.plan.batch_size, len(split)),), generator=generator)
            at = at.to(split.images.device)
            return self.data.normalise(augment(split.images[at])), split.labels[at]

        found = gradient_distances(
            trainer.supernet,
            batch,
            lambda repetition: node.region.sample(generator),
            self._candidates(node.region),
            repetitions=self.plan.repetitions,
        )
        partitions = {name: self._partition(matrix) for name, matrix in found.distances.items()}
        choice = max(partitions, key=lambda name: partitions[name].separation)
        options = self.space[choice].options
        decided = {
            "choice": choice,
            "groups": [[options[index] for index in group] for group in partitions[choice].groups],
            "separations": {name: partition.separation for name, partition in partitions.items()},
            "distances": found.distances[choice].tolist(),
        }
        self._tell({"event": "split", "leaf": node.name, "passes": found.passes, **decided})
        return decided

    def _partition(self, matrix: Any) -> Partition:
        return balanced_partition(
            matrix, len(matrix) if self.plan.groups is None else min(self.plan.groups, len(matrix))
        )

    def _tell(self, event: Mapping[str, Any]) -> None:
        if self.on_event is not None and World.current().first:
            self.on_event(dict(event))

    def _settings(self) -> dict[str, Any]:
        plan = {name: getattr(self.plan, name) for name in self.plan.__dataclass_fields__}
        settings = {"space": self.space.fingerprint, "config": self.config.to_dict(), "plan": plan}
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain

    def _read(self) -> dict[str, Any]:
        path = self.directory / "splits.json"
        settings = self._settings()
        if not path.exists():
            return {"settings": settings, "splits": {}}
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("splits"), dict):
            raise ArtifactError(
                f"{path} does not describe a growth. It is corrupt; remove {self.directory} and train again."
            )
        before = found.get("settings")
        if isinstance(before, dict) and isinstance(before.get("config"), dict):  # a setting that is new had its default
            before = {**before, "config": {**TrainConfig().to_dict(), **before["config"]}}
        if before != settings:
            raise InputError(
                f"the forest in {self.directory} was grown with other settings. Set them back, or use another directory."
            )
        return found
