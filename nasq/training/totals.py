"""What an epoch adds up: losses and right answers by role, gradient norms, the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nasq.training.distributed import World

__all__ = ["Totals"]


class Totals:
    """Sums over an epoch, kept on the device: per role ``[loss, share of right answers, paths]``.

    Attributes:
        norm: The sum of the steps' gradient norms.
        lr: The learning rate of the last step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.roles: dict[str, Tensor] = {}
        self.norm = 0.0
        self.lr = 0.0

    def add(self, role: str, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a path."""
        if role not in self.roles:
            self.roles[role] = torch.zeros(3, dtype=torch.float64, device=self.device)
        right = (logits.argmax(1) == labels).double().mean()
        self.roles[role] += torch.stack([loss.double(), right, torch.ones_like(right)])

    def summary(self, steps: int, world: World) -> dict[str, Any]:
        """The epoch's means, over all ranks."""
        sums = {role: world.mean(values).tolist() for role, values in self.roles.items()}
        paths = sum(values[2] for values in sums.values())
        return {
            "loss": sum(values[0] for values in sums.values()) / paths,
            "losses": {role: values[0] / values[2] for role, values in sums.items()},
            "accuracy": {role: values[1] / values[2] for role, values in sums.items()},
            "gradient_norm": self.norm / steps,
            "lr": self.lr,
        }
