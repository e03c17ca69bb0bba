"""Learned kernel transforms: a smaller kernel as a linear function of the next larger one."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import Size
from nasq.errors import InputError
from nasq.space import Choice

__all__ = ["KernelTransforms"]


class KernelTransforms(nn.Module):
    """One matrix per step from a kernel to the next smaller one, shared by all channels of a layer.

    The centre of the larger kernel, ``k x k`` numbers of one channel in row order, is multiplied by a learned
    ``[k^2, k^2]`` matrix (Once-for-All, Cai et al. 2020): 7 to 5 has 25 x 25, 5 to 3 has 9 x 9. They begin as the
    identity, that is as the plain centre.

    Args:
        kernel: The kernel's choice.

    Raises:
        InputError: Its options are not at least two kernels that are all odd or all even.
    """

    def __init__(self, kernel: Size) -> None:
        super().__init__()
        options = kernel.options if isinstance(kernel, Choice) else ()
        self.sizes = sorted(option for option in options if isinstance(option, int) and not isinstance(option, bool))
        if len(self.sizes) != len(options) or len(options) < 2 or len({size % 2 for size in self.sizes}) > 1:
            raise InputError(
                f"kernel transforms need a choice of at least two kernels that are all odd or all even, got {kernel!r}. "
                "Change it, or leave kernel_transform out."
            )
        for small, large in pairwise(self.sizes):
            # Not torch.eye, which on no device, where only sizes are looked at, loads all of torch's compiler: a second.
            identity = torch.zeros(small * small, small * small).fill_diagonal_(1)
            self.register_parameter(_name(large, small), nn.Parameter(identity))

    def of(self, weight: Tensor, kernel: int) -> Tensor:
        """``[O, I, K, K]`` of the largest kernel to ``[O, I, kernel, kernel]``.

        Not ``forward``: it is a function of weights, which hooks on modules (torch's operation counter) do not expect.
        """
        for small, large in reversed(list(pairwise(self.sizes))):
            if large <= kernel:
                break
            cut = (large - small) // 2
            centre = weight[:, :, cut : cut + small, cut : cut + small]
            matrix = self.get_parameter(_name(large, small))
            weight = F.linear(centre.flatten(2), matrix).view(centre.shape)
        return weight


def _name(large: int, small: int) -> str:
    return f"{large}to{small}"
