"""The optimizer and its schedule, with a state that is keyed by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from nasq.errors import InputError
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.training.config import TrainConfig

__all__ = ["build_optimizer", "build_scheduler", "load_optimizer_state", "lr_factor", "optimizer_state"]


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """torch's optimizer over the parameters of ``module`` that want gradients.

    Parameters with fewer than two axes (norms, biases, step sizes) do not decay: decay would pull a step size in its
    log form to 1 and a norm to 0, which no loss asked for. Step sizes and zero-points are a group of their own, whose
    rate is ``config.step_lr`` times the others'. A parameter without a gradient is left alone by every optimizer here,
    momentum and weight decay included: forms that a step does not use stay as they are.

    Raises:
        InputError: There is nothing to train.
    """
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not wanted:
        raise InputError("the supernet has no parameter that wants a gradient; there is nothing to train")
    steps = {
        id(p) for part in module.modules() if isinstance(part, (ActivationForm, WeightForm)) for p in part.parameters()
    }
    others = [p for p in wanted if id(p) not in steps]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in wanted if id(p) in steps], "weight_decay": 0.0, "lr": config.lr * config.step_lr},
    ]
    groups = [group for group in groups if group["params"]]
    # A supernet has hundreds of small parameters; the fused form spends no Python on each.
    fused = all(p.device.type in {"cpu", "cuda"} and p.is_floating_point() for p in wanted)
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)
        if fused and config.momentum:
            sgd.register_step_pre_hook(_first_momentum)
        return sgd
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)


def _first_momentum(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Gives a zero momentum to the parameters that are moved for the first time.

    The paths of a supernet use its parameters for the first time at different steps, and torch's fused SGD fails
    where only some of the parameters have a momentum. From zero the first momentum is the gradient, as it should be.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter not in optimizer.state:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}


def lr_factor(step: int, steps: int, warmup_steps: float, scheduler: str) -> float:
    """What the learning rate is multiplied by at ``step``.

    ``(step + 1) / warmup_steps`` up to 1 during the warm-up; then 1, or ``(1 + cos(pi t)) / 2`` with ``t`` from 0 to
    1 over the steps that are left (Loshchilov & Hutter, 2017, equation 5, without restarts).

    Args:
        step: From 0.
        steps: In the whole training.
        warmup_steps: 0 or more.
        scheduler: ``"cosine"`` or ``"constant"``.
    """
    if step + 1 < warmup_steps:
        return (step + 1) / warmup_steps
    if scheduler == "constant":
        return 1.0
    done = max(0.0, step - warmup_steps) / max(1.0, steps - warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, done))) / 2


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> LambdaLR:
    """The schedule of ``config`` over all its epochs, to be advanced once per step."""
    steps, warmup = config.epochs * steps_per_epoch, config.warmup_epochs * steps_per_epoch
    return LambdaLR(optimizer, lambda step: lr_factor(step, steps, warmup, config.scheduler))


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Any]]:
    """Parameter name to what the optimizer remembers of it; parameters it has not moved yet are absent."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in module.named_parameters()
        if optimizer.state.get(parameter)
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, module: nn.Module, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Replaces the optimizer's memory by ``state``, as :func:`optimizer_state` gave it.

    Raises:
        InputError: The state names a parameter that ``module`` does not have.
    """
    parameters = dict(module.named_parameters())
    for name in state:
        if name not in parameters:
            raise InputError(f"the optimizer's state is that of another network: it has no parameter {name!r}")
    optimizer.state.clear()
    for name, values in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            key: value.to(parameter.device, copy=True) if isinstance(value, torch.Tensor) else value
            for key, value in values.items()
        }
