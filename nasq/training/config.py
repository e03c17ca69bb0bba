"""How a supernet is trained: one frozen, validated record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nasq.errors import InputError, choose_from

__all__ = ["TrainConfig"]

Automatic = Literal["auto"] | bool


@dataclass(frozen=True)
class TrainConfig:
    """The settings of :class:`nasq.training.Trainer`.

    Raises:
        InputError: A value outside its range; the message names the field, the value and what is allowed.
    """

    epochs: int = 20
    """Passes over the training split."""
    batch_size: int = 64
    """Images per step. A last batch that is smaller is left out, unless it is the only one."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """``sgd`` with ``momentum``, or Adam (``adam``: weight decay in the gradient; ``adamw``: decoupled)."""
    lr: float = 0.05
    """Highest learning rate, reached when the warm-up ends."""
    momentum: float = 0.9
    """SGD's momentum, or Adam's beta 1; 0 to below 1."""
    step_lr: float = 1.0
    """What the learning rate of step sizes and zero-points is a multiple of ``lr`` by."""
    weight_decay: float = 1e-4
    """Of parameters with two axes and more; norms, biases and step sizes never decay."""
    scheduler: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after the warm-up, step by step: falls to 0 along a cosine, or stays."""
    warmup_epochs: float = 1.0
    """Epochs (parts allowed) over which the learning rate rises linearly from near 0."""
    clip_norm: float | None = 5.0
    """Largest norm of a step's whole gradient; ``None`` for no limit."""
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes, 0 to below 1."""
    sampler: Literal["uniform", "sandwich", "guided", "fair", "importance"] = "sandwich"
    """Which subnets a step trains: ``paths`` random ones; the largest, ``paths`` random ones and the smallest; the same
    with each taught by the one before it (:class:`nasq.training.Guidance`); every option equally often
    (:class:`nasq.training.StrictFairness`); or one drawn by gradient norms (:class:`nasq.training.ImportancePaths`)."""
    data_sampler: Literal["uniform", "importance"] = "uniform"
    """Which images a step sees: each once per epoch, or those drawn by how wrong their predictions were."""
    importance_shared: bool = False
    """Whether choices with equal options share one distribution (``sampler: importance``), as PA&DA was published."""
    importance_decay: float | None = None
    """Of the moving average of gradient norms, 0 to 1; ``None``: averages of one half, anew each epoch, as published."""
    importance_floor: float = 0.0
    """Least probability of an option, as a share of the uniform one, 0 to 1 (``sampler: importance``)."""
    importance_whole: bool = False
    """Whether an option's gradient norm is that of all weights of its paths, not of the weights it owns, as published."""
    importance_keep: bool = False
    """Whether images that an epoch did not draw keep their statistic (``data_sampler: importance``); published: 0 instead."""
    reweight: bool = False
    """Whether losses are divided by how much more often than uniform they were drawn, which leaves gradients unbiased."""
    variance_every: int = 0
    """Epochs between measurements of the gradient's variance (:class:`nasq.training.meter.VarianceMeter`); 0: none."""
    variance_paths: int = 8
    """Paths that such a measurement draws; it costs up to six passes over a batch for each."""
    paths: int = 1
    """Number of random subnets per step; their gradients are summed."""
    smallest: bool = True
    """Whether a sandwich ends with the smallest subnet."""
    low_weight: float = 1.0
    """What the loss of the low subnet is multiplied by (``sampler: guided``)."""
    distill: float = 0.5
    """Weight of the teaching subnet's soft labels in the other subnets' loss, 0 to 1; needs ``sandwich`` or ``guided``."""
    temperature: float = 1.0
    """Softmax temperature of the distillation."""
    skewness: float = 0.0
    """Weight of the squared skewness of the layers' weights in the loss (EQ-Net's released code: 1.0)."""
    kurtosis: float = 0.0
    """Weight of ``(kurtosis - 1.8)^2`` of the layers' weights in the loss (EQ-Net's released code: 0.015)."""
    from_scratch: bool = False
    """Whether training random weights with few bits is meant; otherwise the training warns once."""
    bf16: Automatic = "auto"
    """Forward passes in bf16 autocast; ``"auto"``: where :func:`nasq.training.precision.fast_bf16` finds it fast."""
    channels_last: Automatic = "auto"
    """Feed batches in channels_last memory order; ``"auto"``: on x86 CPUs and on CUDA devices with fast bf16."""
    seed: int = 0
    """Decides paths, order of the data, augmentation and dropout; each has a stream of its own."""
    threads: int | None = None
    """torch's CPU threads while training; ``None`` leaves them. Another number may change the last bits."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch of a run always gets one."""

    def __post_init__(self) -> None:
        for name, allowed, holds in _RULES:
            value = getattr(self, name)
            if not holds(value):
                raise InputError(f"training {name} is {value!r}; allowed: {allowed}")
        if self.warmup_epochs > self.epochs:
            raise InputError(
                f"training warmup_epochs is {self.warmup_epochs!r}; allowed: 0 to the number of epochs, {self.epochs}"
            )
        if self.sampler == "uniform" and self.distill > 0:
            raise InputError(
                f"training distill is {self.distill!r}; allowed: 0 with sampler 'uniform', which has no teacher. "
                "Set distill to 0, or sampler to 'sandwich'"
            )
        if self.variance_every and self.sampler not in ("uniform", "importance"):
            raise InputError(
                f"training variance_every is {self.variance_every!r}; allowed: 0 with sampler {self.sampler!r}, whose steps "
                "sum the gradients of several chosen paths. Set it to 0, or sampler to 'uniform' or 'importance'"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Makes a config of a mapping; what is absent has its default.

        Raises:
            InputError: An unknown key (the nearest one is suggested) or a value outside its range.
        """
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise choose_from("training setting", str(key), names)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain types, ready for JSON."""
        return asdict(self)


Rule = tuple[str, str, Callable[[Any], bool]]


def _integer(name: str, lowest: int, highest: int | None = None) -> Rule:
    limit = f" to {highest}" if highest is not None else " or more"

    def holds(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and value >= lowest and (highest is None or value <= highest)

    return name, f"an integer, {lowest}{limit}", holds


def _number(name: str, allowed: str, holds: Callable[[float], bool]) -> Rule:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and holds(value)

    return name, allowed, is_number


def _one_of(name: str, *allowed: str | bool) -> Rule:
    def holds(value: Any) -> bool:
        return any(type(value) is type(option) and value == option for option in allowed)  # 1 equals True

    return name, ", ".join(map(repr, allowed)), holds


def _optional(rule: Rule) -> Rule:
    name, allowed, holds = rule
    return name, f"{allowed}, or nothing (null)", lambda value: value is None or holds(value)


_RULES: tuple[Rule, ...] = (
    _integer("epochs", 1),
    _integer("batch_size", 1),
    _one_of("optimizer", "sgd", "adam", "adamw"),
    _number("lr", "a number above 0", lambda value: value > 0),
    _number("momentum", "a number from 0 to below 1", lambda value: 0 <= value < 1),
    _number("step_lr", "a number above 0", lambda value: value > 0),
    _number("weight_decay", "a number, 0 or more", lambda value: value >= 0),
    _one_of("scheduler", "cosine", "constant"),
    _number("warmup_epochs", "a number, 0 or more", lambda value: value >= 0),
    _optional(_number("clip_norm", "a number above 0", lambda value: value > 0)),
    _number("label_smoothing", "a number from 0 to below 1", lambda value: 0 <= value < 1),
    _one_of("sampler", "uniform", "sandwich", "guided", "fair", "importance"),
    _one_of("data_sampler", "uniform", "importance"),
    _one_of("importance_shared", True, False),
    _optional(_number("importance_decay", "a number from 0 to 1", lambda value: 0 <= value <= 1)),
    _number("importance_floor", "a number from 0 to 1", lambda value: 0 <= value <= 1),
    _one_of("importance_whole", True, False),
    _one_of("importance_keep", True, False),
    _one_of("reweight", True, False),
    _integer("variance_every", 0),
    _integer("variance_paths", 2),
    _integer("paths", 1),
    _one_of("smallest", True, False),
    _number("low_weight", "a number above 0", lambda value: value > 0),
    _number("distill", "a number from 0 to 1", lambda value: 0 <= value <= 1),
    _number("temperature", "a number above 0", lambda value: value > 0),
    _number("skewness", "a number, 0 or more", lambda value: value >= 0),
    _number("kurtosis", "a number, 0 or more", lambda value: value >= 0),
    _one_of("from_scratch", True, False),
    _one_of("bf16", "auto", True, False),
    _one_of("channels_last", "auto", True, False),
    _integer("seed", 0, 2**63 - 1),
    _optional(_integer("threads", 1)),
    _integer("checkpoint_every", 1),
)
