"""Everything that the next epoch of a training depends on, taken out of a trainer and put back."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nasq.errors import ArtifactError, InputError
from nasq.training.checkpoint import pack, unpack
from nasq.training.config import TrainConfig
from nasq.training.distribution import WeightDistribution
from nasq.training.optim import load_optimizer_state, optimizer_state
from nasq.training.streams import stream
from nasq.version import __version__

if TYPE_CHECKING:
    from nasq.training.loop import Trainer

__all__ = ["TrainerState"]

#: Settings that change no weight and may differ when a training goes on.
FREE = frozenset({"checkpoint_every", "variance_every", "variance_paths"})


class TrainerState:
    """The state of one trainer, its stream for layers that draw (dropout, stochastic depth) included.

    Args:
        trainer: Whose state; it is read and written in place.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.layers: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def layer_stream(self) -> Iterator[None]:
        """Inside, torch's global generators carry the training's own stream; outside they are as they were."""
        device = self.trainer.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self._seed_layers()  # a training may go on on another kind of device, whose stream then begins anew
            if self.layers:
                torch.set_rng_state(self.layers["cpu"])
                if device.type == "cuda" and "cuda" in self.layers:
                    torch.cuda.set_rng_state(self.layers["cuda"], device)
            try:
                yield
            finally:
                self.layers = self._layer_state()

    def _seed_layers(self) -> None:
        generator = stream(self.trainer.config.seed, "layers")
        torch.set_rng_state(generator.get_state())
        if self.trainer.device.type == "cuda":
            with torch.cuda.device(self.trainer.device):
                torch.cuda.manual_seed(generator.initial_seed())

    def _layer_state(self) -> dict[str, Tensor]:
        device = self.trainer.device
        state = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(device)
        return state

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """``(tensors, meta)`` for :func:`nasq.training.checkpoint.save`; called inside :meth:`layer_stream`."""
        trainer = self.trainer
        state = {
            "model": trainer.supernet.state_dict(),
            "optimizer": optimizer_state(trainer.optimizer, trainer.supernet),
            "scheduler": {key: value for key, value in trainer.scheduler.state_dict().items() if key != "lr_lambdas"},
            "paths": trainer.path_sampler.state_dict(),
            "data": trainer.data_sampler.state_dict(),
            "augmentation": trainer.augment.generator.get_state(),
            "layers": self._layer_state(),
        }
        tensors, rest = pack(state, "state")
        meta = {
            "epoch": trainer.epoch,
            "nasq": __version__,
            "torch": str(torch.__version__),
            "data": trainer.data.fingerprint,
            "setup": self._setup(),
            "history": trainer.history,
            "state": rest,
        }
        return tensors, meta

    def _setup(self) -> dict[str, Any]:
        """What must be the same for a training to go on, as flat plain types."""
        trainer = self.trainer
        config = {key: value for key, value in trainer.config.to_dict().items() if key not in FREE}
        return {
            **config,
            **{f"augment.{key}": value for key, value in asdict(trainer.augment.policy).items()},
            "mode": trainer.mode,
            "path_sampler": type(trainer.path_sampler).__name__,
            "data_sampler": type(trainer.data_sampler).__name__,
            "loss": getattr(trainer.loss, "__name__", type(trainer.loss).__name__),
            "space": trainer.supernet.space.fingerprint,
            "teacher": self._teacher,
            "penalty": self._penalty(),
        }

    @cached_property
    def _teacher(self) -> str | None:
        """Which fixed network teaches: its class and a digest of its weights, which a training does not change."""
        teacher = self.trainer.teacher
        return None if teacher is None else f"{type(teacher).__name__} {_digest(teacher)}"

    def _penalty(self) -> str | None:
        """What is added to the loss, where it is not what the settings say anyway."""
        penalty, config = self.trainer.penalty, self.trainer.config
        if not isinstance(penalty, WeightDistribution):
            return None if penalty is None else getattr(penalty, "__name__", type(penalty).__name__)
        if (penalty.skewness, penalty.kurtosis) == (config.skewness, config.kurtosis):
            return None
        return f"WeightDistribution(skewness={penalty.skewness:g}, kurtosis={penalty.kurtosis:g})"

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Puts back what :meth:`capture` took.

        Raises:
            InputError: It is the state of another data set, setup or network.
            ArtifactError: A part of it is missing.
        """
        try:
            self._check(meta)
            state = unpack(tensors, meta["state"])
            self._restore(state)
            self.trainer.epoch = int(meta["epoch"])
            self.trainer.history = list(meta["history"])
        except KeyError as error:
            raise ArtifactError(
                f"the checkpoint {self.trainer.prefix} has no {error}; it was written by another program or version. "
                f"Remove {self.trainer.prefix}.* and train again from the start"
            ) from error

    def _check(self, meta: Mapping[str, Any]) -> None:
        trainer = self.trainer
        if meta["data"] != trainer.data.fingerprint:
            raise InputError(
                f"the data set changed: the checkpoint was trained on {meta['data']}, {trainer.data.name!r} now is "
                f"{trainer.data.fingerprint}. Restore the files, the seed of the split and the image size, or train "
                "again in a new directory"
            )
        # What a setting did not exist for had its default.
        before, now = {**TrainConfig().to_dict(), **meta["setup"]}, self._setup()
        changed = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if key not in FREE and before.get(key) != now.get(key)
        ]
        if changed:
            raise InputError(
                f"the training cannot go on with other settings: {'; '.join(changed)}. "
                "Set them back, or train again in a new directory"
            )

    def _restore(self, state: Mapping[str, Any]) -> None:
        trainer = self.trainer
        _load_model(trainer.supernet, state["model"])
        load_optimizer_state(trainer.optimizer, trainer.supernet, state["optimizer"])
        schedule = trainer.scheduler
        schedule.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(schedule.lr_lambdas)})
        for group, lr in zip(trainer.optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        trainer.path_sampler.load_state_dict(state["paths"])
        trainer.data_sampler.load_state_dict(state["data"])
        trainer.augment.generator.set_state(state["augmentation"])
        self.layers = dict(state["layers"])


def _digest(module: nn.Module) -> str:
    """16 hex digits that change with any parameter; BatchNorm statistics are measured anew, and may round differently."""
    found = hashlib.sha256()
    for name, value in module.named_parameters():
        found.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _load_model(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    own = module.state_dict()
    different = sorted(own.keys() ^ state.keys()) or [
        name for name in own if getattr(own[name], "shape", None) != getattr(state[name], "shape", None)
    ]
    if different:
        raise InputError(
            f"the checkpoint is that of another network: {len(different)} of its tensors are in one of them only or "
            f"have another shape, the first is {different[0]!r}. Build the same space, or train in a new directory"
        )
    module.load_state_dict(dict(state))
