"""DiffKendall: Kendall's rank correlation, made differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nasq.errors import InputError

__all__ = ["diff_kendall", "pairwise_loss"]


def _pairs(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    if count < 2:
        raise InputError(f"a ranking of {count} subnet(s) has no pairs. Give at least two.")
    rows, columns = torch.triu_indices(count, count, 1, device=device)
    return rows, columns


def diff_kendall(x: Tensor, y: Tensor, sharpness: float = 0.5) -> Tensor:
    """``mean over i < j of tanh(a (x_i - x_j) / 2) tanh(a (y_i - y_j) / 2)``, in (-1, 1).

    It tends to Kendall's tau-a as ``a`` grows. ParZC sums over all ordered pairs and divides by the number of unordered ones,
    which doubles the value; nothing else differs. (``sigmoid(t) - sigmoid(-t) = tanh(t / 2)``.)

    Args:
        x: Predictions ``[n]``.
        y: Targets ``[n]``, standardised: with targets of unit variance and ``a = 0.5`` the value is closer to a covariance
            of differences than to tau.
        sharpness: ``a``.

    Raises:
        InputError: There is no pair (``n < 2``).

    Source: Zheng et al., NeurIPS 2023; in this product form Dong et al., ParZC, AAAI 2025.
    """
    i, j = _pairs(len(x), x.device)
    half = sharpness / 2
    return (torch.tanh(half * (x[i] - x[j])) * torch.tanh(half * (y[i] - y[j]))).mean()


def pairwise_loss(x: Tensor, y: Tensor) -> Tensor:
    """``mean over pairs of log(1 + exp(-(x_i - x_j) sign(y_i - y_j)))``; pairs of equal targets are left out.

    Raises:
        InputError: There is no pair.
    """
    i, j = _pairs(len(x), x.device)
    sign = torch.sign(y[i] - y[j])
    return (F.softplus(-(x[i] - x[j]) * sign) * sign.abs()).mean()
