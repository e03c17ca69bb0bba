"""Latency on a new device from a few measurements there and tables of other devices.

Devices agree on most of what makes a network slow. In log time a new device is close to a weighted mean of known ones, so
its weights, one per known device and a constant, are what is learned from the few samples: ridge regression towards the
mean of the known devices, in closed form, its strength chosen by leave-one-out error. This is meta-learning in its
simplest form: what is shared by the devices is the prior, and the samples correct it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError

__all__ = ["TransferPredictor", "ridge"]

Reals = NDArray[np.float64]
STRENGTHS = tuple(10.0**power for power in np.arange(-4, 4.5, 0.5))


def ridge(x: Reals, y: Reals, prior: Reals, strengths: Sequence[float] = STRENGTHS) -> Reals:
    """Weights ``w`` that minimise ``|y - x w|^2 + strength |w - prior|^2``, with the strength of least leave-one-out error.

    The leave-one-out residual of a linear smoother is its residual over ``1 - h``, ``h`` the diagonal of the hat matrix
    (Hastie, Tibshirani & Friedman, 2009, eq. 7.64), so nothing is fitted twice.

    Args:
        x: ``[n, features]``.
        y: ``[n]``.
        prior: ``[features]``.
        strengths: Above 0.
    """
    rest, gram = y - x @ prior, x.T @ x
    found: list[tuple[float, Reals]] = []
    for strength in strengths:
        inverse = np.linalg.inv(gram + strength * np.eye(len(prior)))
        weights = inverse @ x.T @ rest
        hat = np.einsum("ij,jk,ik->i", x, inverse, x)
        errors = (rest - x @ weights) / np.maximum(1 - hat, 1e-9)
        found.append((float(errors @ errors), prior + weights))
    return min(found, key=lambda one: one[0])[1]


class TransferPredictor:
    """Predicts latencies of networks on one device.

    Args:
        known: Milliseconds ``[devices, networks]`` on other devices, all above 0.
        features: Further numbers ``[networks, k]``, such as one-hot operations; the prior gives them no weight.

    Raises:
        InputError: A latency is not above 0, or the shapes disagree.
    """

    def __init__(self, known: NDArray[np.floating], features: NDArray[np.floating] | None = None) -> None:
        if known.ndim != 2 or not known.size or not bool(np.isfinite(known).all()) or float(known.min()) <= 0:
            raise InputError(
                f"the known latencies have shape {known.shape} and must be finite milliseconds above 0, one row per device."
            )
        logs = np.log(known.astype(np.float64))
        # Every device around its own mean: how fast it is as a whole is the constant's business.
        columns = [np.ones((logs.shape[1], 1)), (logs - logs.mean(1, keepdims=True)).T]
        if features is not None:
            if len(features) != known.shape[1]:
                raise InputError(f"there are features of {len(features)} networks and latencies of {known.shape[1]}.")
            spread = features.std(0)
            columns.append(
                (features - features.mean(0)) / np.where(spread > 0, spread, 1) / max(1, features.shape[1]) ** 0.5
            )
        self.x: Reals = np.concatenate(columns, 1)
        self.devices = len(known)
        self.weights: Reals | None = None

    def fit(self, networks: NDArray[np.integer], milliseconds: NDArray[np.floating]) -> TransferPredictor:
        """Learns from the networks ``[n]`` (their columns) that were measured, ``[n]`` milliseconds each.

        Raises:
            InputError: None, another number of times, or one that is not above 0.
        """
        y = np.asarray(milliseconds, np.float64)
        if len(networks) < 1 or len(networks) != len(y) or not bool(np.isfinite(y).all()) or float(y.min()) <= 0:
            raise InputError(
                f"{len(networks)} networks with {len(y)} latencies cannot be learned from; give one above 0 for each."
            )
        logs = np.log(y)
        prior = np.zeros(self.x.shape[1])
        prior[0] = logs.mean() - (self.x[networks, 1 : 1 + self.devices].mean(1)).mean()
        prior[1 : 1 + self.devices] = 1 / self.devices
        self.weights = ridge(self.x[networks], logs, prior)
        return self

    def predict(self) -> Reals:
        """Milliseconds of every network ``[networks]``.

        Raises:
            InputError: Nothing was fitted.
        """
        if self.weights is None:
            raise InputError("the predictor has seen no measurement of the new device; call fit first.")
        return np.asarray(np.exp(self.x @ self.weights))
