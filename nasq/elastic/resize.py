"""The resolution of the input as a choice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import ElasticModule, Size
from nasq.errors import InputError
from nasq.space import maximum_of_size

__all__ = ["Resize"]


class Resize(ElasticModule):
    """Resizes a map to ``size`` rows and columns, by bilinear interpolation without smoothing.

    As a network's first module it makes the resolution a choice: every subnet takes images of one size, and computes on
    its own. A map that has the size already is unchanged. Interpolation counts no multiply-adds (torch's counter agrees).

    Where larger images are made smaller, torch's ``align_corners=False`` without antialiasing is what the exported file can
    do exactly; released Once-for-All code resizes images with Pillow before the network.

    Args:
        size: An int, a choice, or an expression of choices.

    Shape:
        ``[N, C, H, W]`` to ``[N, C, size, size]``.

    Raises:
        InputError: The size is not at least 1.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.holds(size)
        if maximum_of_size(size) < 1:
            raise InputError(f"Resize was given the size {size}. Give at least 1 pixel.")

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Interpolates to the active size."""
        size = self.value(self.size)
        return F.interpolate(x_NCHW, size=(size, size), mode="bilinear", align_corners=False)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active :class:`torch.nn.Upsample`, which despite its name also makes maps smaller."""
        size = self.value(self.size)
        return nn.Upsample(size=(size, size), mode="bilinear", align_corners=False).train(self.training)

    def extra_repr(self) -> str:
        """The size as given."""
        return f"{self.size}"
