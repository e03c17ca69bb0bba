"""What a training says about the state of the network it is given: random weights, values that are not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from nasq.elastic.norm import batch_norms
from nasq.errors import TrainingError
from nasq.quant.forms import ActivationForm, WeightForm

if TYPE_CHECKING:
    from nasq.training.loop import Trainer
    from nasq.training.paths import Path

__all__ = ["broken_step", "check_weights", "first_not_finite", "warn_of_random_weights"]

_LOW_BITS = 3
"""Widths up to this seldom learn from random weights."""


def warn_of_random_weights(module: nn.Module) -> None:
    """Warns where a network with few bits was never trained: no BatchNorm has seen a batch.

    A network without BatchNorm cannot be told from a trained one, and is not warned of.
    """
    forms = [form for form in module.modules() if isinstance(form, (ActivationForm, WeightForm))]
    bits = [form.bits for form in forms if form.log_step.requires_grad]
    norms = [norm for _, norm in batch_norms(module)]
    if not bits or min(bits) > _LOW_BITS or not norms:
        return
    means = [norm.running_mean for norm in norms if norm.running_mean is not None]
    if any(bool(mean.any()) for mean in means):
        return
    warnings.warn(
        f"quantized training begins with random weights, and with options of {min(bits)} bits, which seldom learn from "
        "there. Train in float first (Trainer(..., mode='float')), or load trained weights; the setting "
        "from_scratch=True says that it is meant.",
        stacklevel=3,
    )


def first_not_finite(module: nn.Module, gradients: bool = True) -> str:
    """Names the first parameter that is NaN or infinite, step sizes before all others; else the first such gradient.

    Args:
        module: Where to look.
        gradients: Whether to look at the gradients as well.

    Returns:
        A remark in brackets for an error message, or nothing.
    """
    named = sorted(module.named_parameters(), key=lambda item: not item[0].endswith(("log_step", "zeta")))
    values = [("", name, parameter.detach()) for name, parameter in named]
    if gradients:
        values += [
            ("the gradient of ", name, parameter.grad) for name, parameter in named if parameter.grad is not None
        ]
    for what, name, tensor in values:
        if not bool(torch.isfinite(tensor).all()):
            return f" ({what}{_kind(name)} {name!r} is not finite)"
    return ""


def _kind(name: str) -> str:
    if name.endswith("log_step"):
        return "the step size"
    return "the zero-point" if name.endswith("zeta") else "the parameter"


def check_weights(trainer: Trainer) -> None:
    """Stops a training before a value that is not finite is computed with, or replaces the last good checkpoint.

    Raises:
        TrainingError: Names the value.
    """
    if found := first_not_finite(trainer.supernet, gradients=False):
        kept = _kept(trainer)
        raise TrainingError(
            f"the weights cannot be trained{found}, in epoch {trainer.epoch + 1}.{kept and f' {kept}'} Go on from it with a "
            f"lower lr (now {trainer.config.lr}) or step_lr (now {trainer.config.step_lr})"
        )


def broken_step(trainer: Trainer, paths: Sequence[Path], losses: Sequence[float], step: int) -> TrainingError:
    """The error for a step with a loss, or else a gradient, that is not finite; names the subnet and what to change."""
    named = [(path, loss) for path, loss in zip(paths, losses, strict=True) if not math.isfinite(loss)]
    if named:
        path, loss = named[0]
        what = f"the loss of subnet {path.subnet.id} ({path.role}) is {loss}"
    else:
        what = "a gradient is not finite after the subnets " + ", ".join(
            f"{path.subnet.id} ({path.role})" for path in paths
        )
    what += first_not_finite(trainer.supernet, gradients=not named)
    config, kept = trainer.config, _kept(trainer)
    return TrainingError(
        f"{what} in epoch {trainer.epoch + 1}, step {step + 1} of {trainer.steps_per_epoch}; the weights were not moved. "
        f"{kept and f'{kept} '}Train anew with a lower lr (now {config.lr}), a lower clip_norm (now {config.clip_norm}) "
        f"or a longer warm-up (now {config.warmup_epochs} epochs)"
    )


def _kept(trainer: Trainer) -> str:
    return "" if trainer.prefix is None else f"The checkpoint of the last epoch in {trainer.prefix.parent} is kept."
