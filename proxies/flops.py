"""Multiply-adds of one forward pass: the other baseline that every proxy has to beat."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nasq.ranking import Batch, Needs, Proxy

__all__ = ["Flops"]


class Flops(Proxy):
    """Multiply-adds per input (half of what torch's counter reports), of convolutions and matrix products."""

    name = "flops"
    needs = Needs()
    reference = "baseline: torch.utils.flop_counter, one multiply-add counted once"

    def score(self, model: nn.Module, batch: Batch, generator: torch.Generator | None = None) -> float:
        """The count for the first input of the batch, as a float."""
        # A forward pass in training mode would move BatchNorm statistics: count on a copy in evaluation mode.
        copied = copy.deepcopy(model).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copied(batch[0][:1])
        return float(counter.get_total_flops()) / 2
