"""Channels of zeros around a tensor whose width is a choice: the parameter-free shortcut of residual networks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from nasq.elastic.base import ElasticModule, Size
from nasq.errors import InputError
from nasq.space import Choice, maximum_of_size

__all__ = ["PadChannels", "ZeroChannels"]


def _nothing_left(front: int, out: int) -> InputError:
    return InputError(
        f"PadChannels puts {front} zero channels first and gives {out} in all: nothing of its input would be left. Give a "
        f"front from 0 to {out - 1}, or wider options of the output."
    )


class ZeroChannels(nn.Module):
    """Puts a fixed number of zero channels before and behind those of its input; a negative number cuts.

    Args:
        front, back: Numbers of channels.

    Shape:
        ``[N, C, H, W]`` to ``[N, front + C + back, H, W]``.
    """

    def __init__(self, front: int, back: int) -> None:
        super().__init__()
        self.front, self.back = front, back

    def geometry(self) -> tuple[int, int]:
        """Both numbers."""
        return self.front, self.back

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Pads."""
        return F.pad(x_NCHW, (0, 0, 0, 0, self.front, self.back))

    def extra_repr(self) -> str:
        """Both numbers."""
        return f"front={self.front}, back={self.back}"


class PadChannels(ElasticModule):
    """Makes a tensor wider with channels of zeros (option A of He et al. 2016, where widths may be choices).

    The channels keep their places in the largest form: channel ``c`` of the input is channel ``c + front`` of the output
    in every subnet, and a smaller output is the first channels of that. So all subnets add the shortcut to the same
    channels of shared weights; where the output is too narrow, the last channels of the input are cut.

    Args:
        in_channels, out_channels: Sizes: an int, a choice, or an expression of choices.
        front: Zero channels before those of the input; by default half of what the largest form adds.

    Shape:
        ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``.

    Raises:
        InputError: ``front`` is negative, or not below an option of the output: nothing of the input would be left.
    """

    def __init__(self, in_channels: Size, out_channels: Size, front: int | None = None) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.holds(in_channels, out_channels)
        added = maximum_of_size(out_channels) - maximum_of_size(in_channels)
        self.front = max(added, 0) // 2 if front is None else front
        options = out_channels.options if isinstance(out_channels, Choice) else (maximum_of_size(out_channels),)
        for option in options:
            if not 0 <= self.front < int(option):
                raise _nothing_left(self.front, int(option))

    def geometry(self) -> tuple[int, int]:
        """Active zero channels ``(front, back)``; a negative back cuts channels of the input."""
        out = self.value(self.out_channels)
        if out <= self.front:
            raise _nothing_left(self.front, out)
        return self.front, out - self.value(self.in_channels) - self.front

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Pads to the active width."""
        return F.pad(x_NCHW, (0, 0, 0, 0, *self.geometry()))

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active :class:`ZeroChannels`."""
        return ZeroChannels(*self.geometry()).train(self.training)

    def extra_repr(self) -> str:
        """Sizes as given."""
        return f"{self.in_channels}, {self.out_channels}, front={self.front}"
