"""Elastic batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import ElasticModule, Size
from nasq.space import maximum_of_size

__all__ = ["AnyBatchNorm", "BatchNorm2d", "batch_norms"]


class BatchNorm2d(ElasticModule):
    """Batch normalisation whose number of channels may be a choice; a smaller one uses the first channels.

    The running statistics of shared weights mix those of all subnets; evaluate a subnet with statistics of its own
    (:meth:`nasq.Supernet.recalibrate`).

    Args:
        num_features: Size of the channel dimension: an int, a choice, or an expression of choices.
        eps: Added to the variance.
        momentum: Weight of a new batch in the running statistics; ``None`` for their cumulative average.
        affine: Whether scale and shift are learned.

    Shape:
        ``[N, num_features, H, W]``, unchanged.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, num_features: Size, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum, self.affine = num_features, eps, momentum, affine
        self.holds(num_features)
        channels = maximum_of_size(num_features)
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def active_channels(self) -> int:
        """Number of active channels."""
        return self.value(self.num_features)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalises with batch statistics in training and running statistics in evaluation."""
        count = self.active_channels()
        mean, var = self.running_mean[:count], self.running_var[:count]
        weight = None if self.weight is None else self.weight[:count]
        bias = None if self.bias is None else self.bias[:count]
        factor = self.momentum or 0.0
        if self.training:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        return F.batch_norm(x_NCHW, mean, var, weight, bias, self.training, factor, self.eps)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active :class:`torch.nn.BatchNorm2d`, running statistics included."""
        count = self.active_channels()
        norm = nn.BatchNorm2d(count, self.eps, self.momentum, self.affine, device=self.running_mean.device)
        with torch.no_grad():
            norm.running_mean = self.running_mean[:count].clone()
            norm.running_var = self.running_var[:count].clone()
            norm.num_batches_tracked = self.num_batches_tracked.clone()
            if self.weight is not None and self.bias is not None:
                norm.weight = nn.Parameter(self.weight[:count].detach().clone())
                norm.bias = nn.Parameter(self.bias[:count].detach().clone())
        return norm.train(self.training)

    def cost_parameters(self, lookup: Callable[[Size], Any]) -> Any:
        """Scale and shift of the active channels."""
        return 2 * lookup(self.num_features) if self.affine else 0

    def extra_repr(self) -> str:
        """Sizes as given."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"


AnyBatchNorm = BatchNorm2d | nn.BatchNorm2d


def batch_norms(root: nn.Module) -> Iterator[tuple[str, AnyBatchNorm]]:
    """Every batch normalisation below ``root``, elastic or plain, that keeps running statistics."""
    for path, module in root.named_modules():
        if isinstance(module, (BatchNorm2d, nn.BatchNorm2d)) and module.running_mean is not None:
            yield path, module
