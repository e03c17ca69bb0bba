"""Elastic batch normalisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import ElasticModule, Size
from nasq.elastic.segments import Segments, active_part, write_part
from nasq.space import maximum_of_size

__all__ = ["AnyBatchNorm", "BatchNorm2d", "batch_norms"]


class BatchNorm2d(ElasticModule):
    """Batch normalisation whose number of channels may be a choice; a smaller one uses the first channels.

    The running statistics of shared weights mix those of all subnets; evaluate a subnet with statistics of its own
    (:meth:`nasq.Supernet.recalibrate`).

    Args:
        num_features: Size of the channel dimension: an int, a choice, or an expression of choices (:class:`Segments`
            where the channels are a concatenation).
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

    def active_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Mean, variance, scale and shift of the active channels; views where these are neighbours."""
        mean, var = (self._active(buffer) for buffer in (self.running_mean, self.running_var))
        weight, bias = (None if tensor is None else self._active(tensor) for tensor in (self.weight, self.bias))
        return mean, var, weight, bias

    def _active(self, tensor: Tensor) -> Tensor:
        return active_part(tensor, 0, self.num_features, self.value)

    def write_active(self, buffer: Tensor, values: Tensor) -> None:
        """Writes the values ``[active channels]`` into a buffer of the largest form."""
        write_part(buffer, values, self.num_features, self.value)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalises with batch statistics in training and running statistics in evaluation."""
        mean, var, weight, bias = self.active_tensors()
        factor = self.momentum or 0.0
        if self.training:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        y = F.batch_norm(x_NCHW, mean, var, weight, bias, self.training, factor, self.eps)
        if self.training and isinstance(self.num_features, Segments):  # these were copies
            self.write_active(self.running_mean, mean)
            self.write_active(self.running_var, var)
        return y

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active :class:`torch.nn.BatchNorm2d`, running statistics included."""
        count = self.active_channels()
        norm = nn.BatchNorm2d(count, self.eps, self.momentum, self.affine, device=self.running_mean.device)
        with torch.no_grad():
            mean, var, weight, bias = self.active_tensors()
            norm.running_mean, norm.running_var = mean.clone(), var.clone()
            norm.num_batches_tracked = self.num_batches_tracked.clone()
            if weight is not None and bias is not None:
                norm.weight, norm.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
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
