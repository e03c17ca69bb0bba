"""How noisy the training gradient is, and how much of the noise comes from paths and how much from data.

Importance sampling is chosen to lower this variance (PA&DA, arXiv 2302.14772, section 3); measuring it is how one sees
whether it does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nasq.errors import InputError
from nasq.training.untouched import untouched

if TYPE_CHECKING:
    from nasq.space import Option
    from nasq.supernet import Supernet

__all__ = ["Batch", "Draw", "GradientVariance", "UnclearMeanError", "gradient_variance"]

Draw = tuple[Mapping[str, "Option"], float]
"""A subnet and its weight: uniform over drawn probability."""
Batch = tuple[Tensor, Tensor, Tensor | None]
"""Inputs ``[n, ...]``, labels ``[n]``, weights ``[n]`` or ``None``."""


class UnclearMeanError(InputError):
    """The mean gradient cannot be told from zero, so that nothing can be said relative to it."""


@dataclass(frozen=True)
class GradientVariance:
    """Variance of the reweighted gradient at frozen weights, relative to the squared norm of its mean.

    All four are ratios without unit; those of a nested design can be slightly negative where the truth is near 0.

    Attributes:
        path: Trace of the covariance that comes from which path is drawn.
        data: That from which batch is drawn, on average over paths.
        bias: Squared distance between the means of the unweighted and the reweighted gradient: what leaving the weights
            out costs. It contains the noise of both means, so it is not below about ``total / draws``.
        mean_square: ``||mean||^2`` itself, estimated without the noise of the mean.
    """

    path: float
    data: float
    bias: float
    mean_square: float

    @property
    def total(self) -> float:
        """Variance of a training step's gradient."""
        return self.path + self.data


def _flat(supernet: Supernet) -> Tensor:
    parts = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in supernet.parameters()]
    return torch.cat(parts).double()


def _gradient(
    supernet: Supernet, subnet: Mapping[str, Option], batch: Batch, loss: Callable[..., Tensor], mode: str | None
) -> Tensor:
    supernet.zero_grad(set_to_none=True)
    x, y, weights = batch
    with supernet.activate(subnet):
        losses = loss(supernet(x) if mode is None else supernet(x, mode=mode), y, reduction="none")
        (losses if weights is None else losses * weights).mean().backward()  # type: ignore[no-untyped-call]
    return _flat(supernet)


def gradient_variance(
    supernet: Supernet,
    paths: Callable[[], Draw],
    batches: Callable[[], Batch],
    *,
    path_count: int = 16,
    batch_count: int = 4,
    loss: Callable[..., Tensor] = nn.functional.cross_entropy,
    mode: str | None = None,
) -> GradientVariance:
    """Estimates the variance from ``path_count`` paths with ``batch_count`` batches each (a nested design).

    The supernet is left as it was. BatchNorm normalises by the batch, as in training.

    Args:
        supernet: Whose gradient is meant, over all its parameters.
        paths: Draws ``(subnet, weight)``; ``weight`` is uniform over drawn probability (1 for uniform paths).
        batches: Draws ``(inputs [n, ...], labels [n], weights [n] or None)``; weights are ``1 / (N p)``.
        path_count, batch_count: 2 or more each.
        loss: ``(outputs, labels, reduction="none")`` to ``[n]``.
        mode: Passed to the supernet's forward where it is not ``None``.

    Raises:
        InputError: A count is below 2.
        UnclearMeanError: So few draws do not tell the mean gradient from zero, or a gradient is not finite.
    """
    for name, count in (("path_count", path_count), ("batch_count", batch_count)):
        if count < 2:
            raise InputError(f"{name} is {count}; a variance needs 2 or more")
    means: list[Tensor] = []
    within = 0.0
    plain: Tensor | float = 0.0
    with untouched(supernet):
        supernet.train()
        for _ in range(path_count):
            subnet, weight = paths()
            total, squares = torch.zeros(()), 0.0
            for _ in range(batch_count):
                batch = batches()
                gradient = weight * _gradient(supernet, subnet, batch, loss, mode)
                total, squares = total + gradient, squares + float(gradient @ gradient)
                unweighted = (
                    gradient / weight
                    if batch[2] is None
                    else _gradient(supernet, subnet, (*batch[:2], None), loss, mode)
                )
                plain = plain + unweighted / (path_count * batch_count)
            mean = total / batch_count
            within += (squares - batch_count * float(mean @ mean)) / (batch_count - 1) / path_count
            means.append(mean)
    return _summary(torch.stack(means), within, torch.as_tensor(plain), batch_count)


def _summary(means: Tensor, within: float, plain: Tensor, batch_count: int) -> GradientVariance:
    count, mean = len(means), means.mean(0)
    spread = float((means - mean).square().sum()) / (count - 1)  # of path means: between plus within / batches
    mean_square = float(mean @ mean) - spread / count
    if not mean_square > 0:
        raise UnclearMeanError(
            f"the mean gradient of {count} paths cannot be told from zero (squared norm {mean_square:.3g}): draw more paths "
            "and batches, or train a little first."
        )
    bias = float((plain - mean).square().sum())
    return GradientVariance(
        (spread - within / batch_count) / mean_square, within / mean_square, bias / mean_square, mean_square
    )
