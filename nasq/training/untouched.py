"""Looking at gradients without leaving a trace in the training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from nasq.elastic.norm import batch_norms

if TYPE_CHECKING:
    from nasq.supernet import Supernet

__all__ = ["untouched"]


@contextlib.contextmanager
def untouched(supernet: Supernet) -> Iterator[None]:
    """Afterwards gradients, BatchNorm buffers, modes and the global random state are what they were."""
    gradients = [(parameter, parameter.grad) for parameter in supernet.parameters()]
    buffers = [
        (buffer, buffer.clone())
        for _, norm in batch_norms(supernet.module)
        for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
        if buffer is not None
    ]
    modes = [(module, module.training) for module in supernet.modules()]
    devices = {parameter.device for parameter, _ in gradients if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(0)  # dropout draws the same masks whenever one looks
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, training in modes:
            module.training = training
