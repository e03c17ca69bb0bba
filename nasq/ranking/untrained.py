"""Step sizes for a quantized network that was never trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nasq.quant import QuantizedNetwork, calibrate

__all__ = ["calibrate_untrained"]


class _BatchStatistics(TorchFunctionMode):
    """BatchNorm in evaluation mode takes the statistics of the batch all the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        return F.batch_norm(**{**given, "running_mean": None, "running_var": None, "training": True})


def calibrate_untrained(network: QuantizedNetwork, x: Tensor) -> None:
    """Sets every step size from one batch ``[N, ...]`` with BatchNorm as scores see it: by batch statistics.

    :func:`nasq.quant.calibrate` takes the batch's statistics only where the running ones were never updated; here they are
    taken in any case. With others, activations are of another size than those that a score in training mode sees, and
    whatever is larger than the steps' range is clipped, gradients included.
    """
    with _BatchStatistics():
        calibrate(network, x)
