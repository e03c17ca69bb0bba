"""The training loop: one device per process, resumable to the last bit on a CPU."""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nasq.data import Augment, AugmentPolicy, DataSampler, DataSet, UniformSampler
from nasq.errors import InputError
from nasq.quant.recompute import recomputed
from nasq.training import checkpoint, samplers
from nasq.training.config import TrainConfig
from nasq.training.distributed import World
from nasq.training.distribution import WeightDistribution
from nasq.training.health import broken_step, check_weights, warn_of_random_weights
from nasq.training.losses import PathLoss, teachers
from nasq.training.meter import VarianceMeter
from nasq.training.optim import build_optimizer, build_scheduler
from nasq.training.paths import Path, PathSampler
from nasq.training.precision import fast_bf16, fast_channels_last
from nasq.training.state import TrainerState
from nasq.training.streams import stream
from nasq.training.totals import Totals

if TYPE_CHECKING:
    from nasq.supernet import Supernet

__all__ = ["Trainer"]

Event = dict[str, Any]


class Trainer:
    """Trains a supernet on a data set that lives on the device, several subnets per step.

    A step draws subnets from the path sampler, runs each on the same augmented batch, sums their gradients, clips the
    sum and moves the weights once. After each epoch a checkpoint holds everything that the next one depends on:
    a training that is killed and run again on the same machine and thread count gives the same bits on a CPU.

    In a process group (:mod:`nasq.training.distributed`) every rank trains its part of each batch. Construct the same
    trainer on all ranks; rank 0 writes checkpoints and tells events.

    Args:
        supernet: What to train; moved to ``device``. Only its weights change.
        data: Only its training split is read.
        config: How.
        directory: Where checkpoints go, as ``directory/checkpoint.*``; one that is there is continued. ``None``: no
            checkpoints.
        mode: Passed to the supernet's forward where it is not ``None``: ``"float"`` switches quantization off.
        device: Where to train.
        on_event: Called with ``{"event": "start", ...}`` and, after each epoch, ``{"event": "epoch", ...}``.
        on_step: Called with ``(steps done, steps)`` of an epoch, for a progress bar.
        augment: Random changes of the images; ``None`` takes the usual ones of ``data.name``.
        path_sampler: Proposes the subnets; ``None`` takes what ``config`` says.
        data_sampler: Proposes the samples; ``None`` takes each once per epoch.
        loss: ``loss(logits, labels, teacher logits or None, weights or None)`` -> 0-d; ``None`` takes
            :class:`~nasq.training.losses.PathLoss` of ``config``.
        penalty: Added to a step's loss once, such as a :class:`~nasq.training.distribution.WeightDistribution`;
            ``None`` takes what ``config`` says.
        teacher: A fixed network on the same inputs whose outputs teach the subnets that no other one of their step
            teaches; moved to ``device``, in evaluation mode.

    Attributes:
        epoch: Epochs done.
        history: The ``"epoch"`` event of every epoch done, those before a resume included.
    """

    def __init__(
        self,
        supernet: Supernet,
        data: DataSet,
        config: TrainConfig,
        directory: pathlib.Path | str | None = None,
        mode: str | None = None,
        device: torch.device | str = "cpu",
        on_event: Callable[[Event], None] | None = None,
        *,
        on_step: Callable[[int, int], None] | None = None,
        augment: AugmentPolicy | None = None,
        path_sampler: PathSampler | None = None,
        data_sampler: DataSampler | None = None,
        loss: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor] | None = None,
        penalty: Callable[[], Tensor] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.world = World.current()
        self.supernet = supernet.to(self.device)
        self.world.start_equal(self.supernet)
        self.config = config
        self.data = data
        self.mode = mode
        self.on_event = on_event
        self.on_step = on_step
        self.prefix = None if directory is None else pathlib.Path(directory) / "checkpoint"
        self.split = data.train.to(self.device)
        policy = AugmentPolicy.for_data(data.name) if augment is None else augment
        self.augment = Augment(policy, stream(config.seed, "augmentation"))
        self.path_sampler = path_sampler or samplers.path_sampler(supernet, config, stream(config.seed, "paths"))
        self.data_sampler = data_sampler or samplers.data_sampler(
            len(self.split), config, stream(config.seed, "data"), self.device
        )
        self.loss = loss or PathLoss(config.distill, config.temperature, config.label_smoothing)
        self.penalty = penalty or _penalty(supernet, config)
        self.teacher = None if teacher is None else teacher.to(self.device).eval()
        self.bf16 = fast_bf16(self.device) if config.bf16 == "auto" else config.bf16
        self.channels_last = fast_channels_last(self.device) if config.channels_last == "auto" else config.channels_last
        self.world.check_batch(self.batch_size)
        self._parameters = list(supernet.parameters())  # walking the modules at every step takes longer than clipping
        self.optimizer = build_optimizer(supernet, config)
        self.scheduler = build_scheduler(self.optimizer, config, self.steps_per_epoch)
        self.epoch = 0
        self.history: list[Event] = []
        self._state = TrainerState(self)
        self._meter = VarianceMeter(self, config.variance_paths) if config.variance_every else None
        self._started = False

    @property
    def batch_size(self) -> int:
        """Images per step: the config's, or the whole split where that is smaller."""
        return min(self.config.batch_size, len(self.split))

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in an epoch."""
        return len(self.split) // self.batch_size

    def run(self, until: int | None = None) -> list[Event]:
        """Trains the epochs that remain, after loading the checkpoint that is in ``directory``, if any.

        Args:
            until: Stop when this many epochs are done; ``None`` for all. The schedule is that of all epochs anyway.

        Returns:
            ``history``.

        Raises:
            TrainingError: A loss or a gradient is NaN or infinite; the checkpoint of the last epoch is kept.
            InputError: The checkpoint is that of another data set, config, space or network; a sampler gave nothing.
            ArtifactError: The checkpoint is corrupt.
        """
        if not self._started and self.prefix is not None and checkpoint.exists(self.prefix):
            self._state.restore(*checkpoint.load(self.prefix))
        self._started = True
        last = self.config.epochs if until is None else min(until, self.config.epochs)
        if self.epoch == 0 and self.mode in (None, "fake") and not self.config.from_scratch:
            warn_of_random_weights(self.supernet)
        was_training = self.supernet.training
        self._tell(self._start_event())
        try:
            with _threads(self.config.threads), self._state.layer_stream():
                while self.epoch < last:
                    self._one_epoch(last)
        except BaseException:
            self._started = False  # the epoch is broken off: another run() goes on from the checkpoint
            raise
        finally:
            self.supernet.train(was_training)
        return self.history

    def inherit(self, prefix: pathlib.Path | str) -> None:
        """Takes over another training's checkpoint as it is: weights, optimizer, schedule, samplers, epochs done.

        Args:
            prefix: Of its files: ``directory/checkpoint``.

        Raises:
            InputError: It is that of another data set, config, space or network.
            ArtifactError: It is missing or corrupt.
        """
        self._state.restore(*checkpoint.load(pathlib.Path(prefix)))

    def _one_epoch(self, last: int) -> None:
        check_weights(self)
        event = self._train_epoch()
        check_weights(self)
        self.epoch += 1
        if self._meter is not None and self.epoch % self.config.variance_every == 0:
            event["gradient_variance"] = self._meter.measure(self.epoch)
        self.history.append(event)
        if self.prefix is not None and (self.epoch % self.config.checkpoint_every == 0 or self.epoch == last):
            if self.world.first:
                checkpoint.save(self.prefix, *self._state.capture())
            self.world.wait()  # nobody looks for a checkpoint that is being written
        self._tell(event)

    def _start_event(self) -> Event:
        return {
            "event": "start",
            "epoch": self.epoch,
            "epochs": self.config.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "parameters": sum(p.numel() for p in self.supernet.parameters()),
            "device": str(self.device),
            "bf16": self.bf16,
            "channels_last": self.channels_last,
            "threads": self.config.threads or torch.get_num_threads(),
            "processes": self.world.size,
        }

    def _train_epoch(self) -> Event:
        self.supernet.train()
        self.path_sampler.on_epoch(self.epoch)
        indices = self.data_sampler.indices(self.epoch)
        steps = len(indices) // self.batch_size
        if steps == 0:
            raise InputError(
                f"the data sampler gave {len(indices)} samples for epoch {self.epoch}, less than a batch of "
                f"{self.batch_size}; it has to give as many as the data set has, {len(self.split)}"
            )
        totals = Totals(self.device)
        began = time.perf_counter()
        for step in range(steps):
            at = indices[step * self.batch_size : (step + 1) * self.batch_size]
            self._step(at, step, totals)
            if self.on_step is not None:
                self.on_step(step + 1, steps)
        summary = totals.summary(steps, self.world)  # waits for the device, so the time below is the whole time
        seconds = time.perf_counter() - began
        return {
            "event": "epoch",
            "epoch": self.epoch + 1,
            "epochs": self.config.epochs,
            **summary,
            "seconds": round(seconds, 3),
            "images_per_second": round(steps * self.batch_size / seconds, 1),
        }

    def _step(self, indices: Tensor, step: int, totals: Totals) -> None:
        images, labels, weights = self._batch(indices)
        paths = self.path_sampler.step()
        if not paths:
            raise InputError("the path sampler gave no subnet for a step; it has to give at least one")
        taught_by = teachers(paths)
        taught = self._taught(images)
        outputs: list[Tensor] = []
        losses: list[Tensor] = []
        self.optimizer.zero_grad(set_to_none=True)
        for path, teacher in zip(paths, taught_by, strict=True):
            with self.supernet.activate(path.subnet):
                logits = self._forward(images)
                loss = self.loss(logits, labels, taught if teacher is None else outputs[teacher], weights)
                (loss if path.weight == 1.0 else loss * path.weight).backward()  # type: ignore[no-untyped-call]
            outputs.append(logits.detach())
            losses.append(loss.detach())
            totals.add(path.role, losses[-1], outputs[-1], labels)
            if len(paths) == 1:  # a sampler that learns from gradients sees those of the whole batch
                self.world.average_gradients(self._parameters)
            self.path_sampler.observe(path, losses[-1], self.supernet)
            self._observe(indices, outputs[-1], labels)
        if self.penalty is not None:
            self.penalty().backward()  # type: ignore[no-untyped-call]
        if len(paths) > 1:
            self.world.average_gradients(self._parameters)
        self._move(paths, losses, step, totals)

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """This rank's part of a batch: all of it with one process."""
        own = self.world.own(len(indices))
        on_device = indices[own].to(self.device, non_blocking=self.device.type == "cuda")
        images = self.augment(self.split.images[on_device], of=len(indices), first=own.start)
        images = self.data.normalise(images)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        weights = self.data_sampler.weights(indices)
        return images, self.split.labels[on_device], None if weights is None else weights[own].to(self.device)

    def _observe(self, indices: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Tells the data sampler what became of the whole batch."""
        if type(self.data_sampler) is not UniformSampler:  # which learns nothing: no message is worth sending
            self.data_sampler.observe(indices, self.world.gather(logits), self.world.gather(labels))

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor | None:
        """What the fixed teacher says, if there is one."""
        if self.teacher is None:
            return None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.teacher(images)
        assert isinstance(logits, Tensor)
        return logits.float()

    def _forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16), recomputed():
            logits = self.supernet(images) if self.mode is None else self.supernet(images, mode=self.mode)
        assert isinstance(logits, Tensor)
        return (
            logits if logits.dtype == torch.float64 else logits.float()
        )  # a loss in bf16 would lose most of its digits

    def _move(self, paths: list[Path], losses: list[Tensor], step: int, totals: Totals) -> None:
        used = [parameter for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in used if parameter.grad is not None])
        # One transfer per step, before the weights move: what is on disk and in memory stays the last good state.
        values = torch.stack([*losses, norm.to(losses[0])]).tolist()
        self.check_step(paths, values, step)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(used, self.config.clip_norm, norm)
        totals.norm += values[-1]
        totals.lr = float(self.scheduler.get_last_lr()[0])
        self.optimizer.step()
        self.scheduler.step()

    def check_step(self, paths: list[Path], values: list[float], step: int) -> None:
        """Refuses a step whose losses or, last in ``values``, gradient norm is not finite; called before weights move.

        Raises:
            TrainingError: Names the subnet.
        """
        if not all(math.isfinite(value) for value in values):
            raise broken_step(self, paths, values[:-1], step)

    def _tell(self, event: Event) -> None:
        if self.on_event is not None and self.world.first:
            self.on_event(event)


def _penalty(supernet: Supernet, config: TrainConfig) -> Callable[[], Tensor] | None:
    if not config.skewness and not config.kurtosis:
        return None
    return WeightDistribution(supernet, config.skewness, config.kurtosis)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
