"""zen: how much a Gaussian network's features move when its input moves a little."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nasq.errors import InputError
from nasq.ranking import Needs, Passes, PassProxy, Recorder

from ._initialise import gaussian

__all__ = ["Zen"]

STEP = 0.01


class Zen(PassProxy):
    """``log mean_n sum |f(a) - f(a + 0.01 b)| + sum over BatchNorms of log sqrt(mean running variance)``.

    ``a`` and ``b`` are noise of the batch's shape, ``f`` the last feature map larger than 1x1 (that is, before global
    pooling), weights Gaussian. The running variance is what two training passes leave of it, as in the released code.
    """

    name = "zen"
    needs = Needs()
    reference = "Lin et al., ICCV 2021 (arXiv 2102.01063)"

    def measure(self, passes: Passes) -> float:
        """The score of one draw of weights; ``-inf`` where the features do not move at all."""
        model = passes.copy()
        gaussian(model, passes.generator("zen weights"))
        a = passes.noise(passes.x.shape, "zen input")
        moved = a + STEP * passes.noise(passes.x.shape, "zen step")
        with torch.no_grad():
            difference = (_features(passes, model, a) - _features(passes, model, moved)).abs()
        moved_by = float(difference.flatten(1).sum(1).mean())
        if moved_by == 0:
            return -math.inf
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        return math.log(moved_by) + sum(_log_deviation(one) for one in norms)


def _log_deviation(norm: _BatchNorm) -> float:
    if norm.running_var is None:
        raise InputError(
            f"zen reads the running variance of every BatchNorm and one of {norm.num_features} channels keeps none. "
            "Build the network with track_running_stats=True."
        )
    return math.log(math.sqrt(float(norm.running_var.mean())))


def _features(passes: Passes, model: nn.Module, x: Tensor) -> Tensor:
    """The last map that is larger than 1x1."""
    last: list[Tensor] = []

    def watch(made: Tensor) -> None:
        if made.ndim == 4 and made.shape[0] == len(x) and made.shape[2] * made.shape[3] > 1:
            last[:] = [made]

    with Recorder({}, on_output=watch):
        passes.run(model, x, "float")
    if not last:
        raise InputError(
            "zen compares feature maps [N, C, H, W] and the network made none. It is for convolutional networks."
        )
    return last[0]
