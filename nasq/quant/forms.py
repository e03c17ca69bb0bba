"""One quantizer of one form: fixed bits, granularity and symmetry, learned step size and zero-point.

Step sizes are stored as logarithms, so that they are positive whatever the optimizer does, and floored at 2^-24.
Zero-points are learned as real numbers and rounded to an integer inside the grid, so that real 0 is always on it.
Every form owns its parameters: a form that is not used in a step has no gradient, and an optimizer leaves it alone,
momentum and weight decay included.

Steps at powers of two (``power_of_two``) are learned as all others and rounded, as logarithms, where they are used
(straight-through): every product with a ratio of such steps is exact, so no two runtimes can round it differently.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasq.quant.arithmetic import STEP_FLOOR, round_ste, snapped_step, to_integers
from nasq.quant.fake import fake_quantize, gradient_scale, released_scale
from nasq.quant.input_groups import InputGroups, Slices
from nasq.quant.operations import GROUP_UNIT
from nasq.quant.value import Grid

__all__ = ["ActivationForm", "WeightForm"]


def _step(log_step: Tensor) -> Tensor:
    # In float64: an fp32 exponential differs from device to device, and with it every integer near a tie.
    return log_step.double().exp().float().clamp_min(STEP_FLOOR)


class WeightForm(nn.Module):
    """Quantizes a weight with fixed bits, granularity and symmetry.

    Args:
        channels: Output channels of the whole weight, each with step sizes of its own; ``None``: one step for the tensor.
        bits: 2..8; integers are in ``[-2^(bits-1), 2^(bits-1) - 1]``.
        symmetric: Whether the zero-point is 0; otherwise it is learned.
        released: Whether the gradient of per-channel steps is scaled as in EQ-Net's released code
            (:func:`nasq.quant.fake.released_scale`) instead of by LSQ's rule.
        groups: Groups of inputs, each of which has a step in every output; ``None``: one step per output.
    """

    zeta: nn.Parameter | None
    power_of_two: bool = False
    """Whether the scale that the file holds, step times slope, is a power of two."""

    def __init__(
        self,
        channels: int | None,
        bits: int,
        symmetric: bool,
        released: bool = False,
        groups: InputGroups | None = None,
    ) -> None:
        super().__init__()
        assert groups is None or channels is not None
        self.bits, self.symmetric, self.released, self.groups = bits, symmetric, released, groups
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        shape: tuple[int, ...] = () if channels is None else (channels,)
        if groups is not None:
            shape = (*shape, len(groups.sizes))
        self.log_step = nn.Parameter(torch.zeros(shape))
        self.zeta = None if symmetric else nn.Parameter(torch.zeros(shape))

    @property
    def granularity(self) -> str:
        """``"tensor"``, ``"channel"`` or ``"group<g>"``."""
        if self.groups is not None:
            return f"group{self.groups.size}"
        return "channel" if self.log_step.ndim else "tensor"

    @staticmethod
    def _rows(parameter: Tensor, channels: int, part: Slices | None) -> Tensor:
        """Those of the active outputs: slices follow slices."""
        if not parameter.ndim:
            return parameter
        return parameter[:channels] if part is None or part.rows is None else parameter[part.rows]

    def _active(self, inputs: int | None, part: Slices | None) -> tuple[Tensor | slice, tuple[int, ...]]:
        """The groups with active inputs, and how many."""
        assert self.groups is not None
        columns = None if part is None else part.columns
        return self.groups.active(self.groups.inputs if inputs is None else inputs, columns)

    def _along(self, values: Tensor, weight: Tensor, part: Slices | None) -> Tensor:
        """Values of the active outputs, and of all groups of inputs, so that they run along the weight."""
        if self.groups is not None:
            return self.groups.spread(values, weight.shape[1], None if part is None else part.columns)
        return values.reshape(-1, *[1] * (weight.ndim - 1)) if values.ndim else values

    def _steps(self, channels: int, slope: Tensor | None, part: Slices | None) -> Tensor:
        """The steps of the active outputs: 0-d, ``[channels]`` or ``[channels, groups]``."""
        log_step = self._rows(self.log_step, channels, part)
        if not self.power_of_two:
            return _step(log_step)
        return snapped_step(log_step, slope if slope is None or log_step.ndim < 2 else slope.unsqueeze(1))

    def step(
        self, channels: int, slope: Tensor | None = None, inputs: int | None = None, part: Slices | None = None
    ) -> Tensor:
        """Step size(s), 0-d or ``[channels]``; where groups of inputs have their own, the largest of each output.

        Args:
            channels, inputs: Of the active slice; ``None``: all inputs.
            slope: As in :meth:`fake`.
            part: Which slice it is, where it does not begin with the first channels.
        """
        steps = self._steps(channels, slope, part)
        return steps if self.groups is None else steps[:, self._active(inputs, part)[0]].amax(1)

    def multipliers(
        self, channels: int, slope: Tensor | None = None, inputs: int | None = None, part: Slices | None = None
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """The steps of groups as whole multiples of ``2^-22`` of :meth:`step`, whose arguments these are.

        Returns:
            float64 ``[channels, groups]`` in ``1..2^22``, and the active inputs of each group that has any; ``None`` and
            nothing for other granularities.
        """
        if self.groups is None:
            return None, ()
        kept, sizes = self._active(inputs, part)
        steps = self._steps(channels, slope, part)[:, kept].double()
        return (steps / steps.amax(1, keepdim=True) * GROUP_UNIT).round().clamp_min(1), sizes

    def _zero(self, weight: Tensor, part: Slices | None) -> Tensor | None:
        if self.zeta is None:
            return None
        zeta = round_ste(self._rows(self.zeta, len(weight), part)).clamp(self.low, self.high)
        return self._along(zeta, weight, part)

    def _gradient_scale(self, weight: Tensor, part: Slices | None) -> float:
        if self.released and self.log_step.ndim == 1:
            return released_scale(weight, self.high)
        steps = len(weight) if self.log_step.ndim else 1
        if self.groups is not None:
            steps *= len(self._active(weight.shape[1], part)[1])
        return gradient_scale(weight.numel() // max(steps, 1), self.high)

    def fake(
        self, weight: Tensor, sign: Tensor | None = None, slope: Tensor | None = None, part: Slices | None = None
    ) -> Tensor:
        """The weight rounded to its grid, with gradients.

        Args:
            weight: Active slice ``[out, ...]``.
            sign: ``[out]`` of 1 and -1: the sign of the affine behind the layer; it enters before rounding, so that the
                deployed integers, which carry it, stay legal (``-2^(bits-1)`` has no positive counterpart).
            slope: ``[out]``: that affine's scale. With :attr:`power_of_two` the steps make step times slope a power of two.
            part: Which slice it is, where it does not begin with the first channels.
        """
        step, zero = self._along(self._steps(len(weight), slope, part), weight, part), self._zero(weight, part)
        scale = self._gradient_scale(weight, part)
        if zero is not None:
            low = self.low - zero
            return fake_quantize(weight, step, low, (low + (self.high - self.low)).detach(), scale)
        if sign is None:
            return fake_quantize(weight, step, float(self.low), float(self.high), scale)
        sign = sign.reshape(-1, *[1] * (weight.ndim - 1))
        return sign * fake_quantize(sign * weight, step, float(self.low), float(self.high), scale)

    def integers(self, weight: Tensor, sign: Tensor, slope: Tensor | None = None, part: Slices | None = None) -> Tensor:
        """Integers minus their zero-point, with the sign of the affine behind the layer in them, as fp32."""
        step, zero = self._along(self._steps(len(weight), slope, part), weight, part), self._zero(weight, part)
        sign = sign.reshape(-1, *[1] * (weight.ndim - 1))
        if zero is None:
            return to_integers(sign * weight, step, 0.0, self.low, self.high)
        # Zero is centred after rounding; -(q - z) = (-1 - q) - (-1 - z), and both stay in the range of the bits.
        return sign * ((torch.round(weight / step) + zero).clamp(self.low, self.high) - zero)

    def zeros(self, sign: Tensor, inputs: int | None = None, part: Slices | None = None) -> Tensor | None:
        """The zero-points of what :meth:`integers` gives, ``-1 - z`` where the sign is -1; ``None``: all 0.

        Args:
            sign: ``[out]`` of the active slice.
            inputs: Of the active slice; ``None``: all.
            part: Which slice it is, where it does not begin with the first channels.

        Returns:
            ``[out]``, or ``[out, groups]`` with one per group that has active inputs.
        """
        if self.zeta is None:
            return None
        zeta = self._rows(self.zeta, len(sign), part)
        zeta = zeta if zeta.ndim else zeta.expand_as(sign)
        if self.groups is not None:
            zeta, sign = zeta[:, self._active(inputs, part)[0]], sign.unsqueeze(1)
        zero = round_ste(zeta).clamp(self.low, self.high)
        return torch.where(sign < 0, -1 - zero, zero)

    def form(self) -> WeightForm:
        """Itself: a fixed form stands for an elastic quantizer after extraction."""
        return self

    def sliced(self, channels: int, part: Slices | None = None) -> WeightForm:
        """A copy for the first ``channels`` output channels, or for the slice ``part``."""
        wide, groups, kept = self.log_step.ndim > 0, self.groups, None
        if groups is not None and part is not None and part.columns is not None:
            kept, sizes = groups.active(len(part.columns), part.columns)
            groups = InputGroups(groups.size, sizes)
        copied = WeightForm(channels if wide else None, self.bits, self.symmetric, self.released, groups)
        copied.power_of_two = self.power_of_two
        for name, parameter in (("log_step", self.log_step), ("zeta", self.zeta)):
            if parameter is not None:
                values = self._rows(parameter, channels, part)
                setattr(copied, name, nn.Parameter((values if kept is None else values[:, kept]).detach().clone()))
        return copied.train(self.training)


class ActivationForm(nn.Module):
    """Quantizes an activation tensor with fixed bits, sign and symmetry; one step size for the whole tensor.

    Args:
        bits: 2..8.
        signed: Whether the tensor holds negative values.
        symmetric: Signed symmetric tensors have zero-point 128 and the range ``128 + [-2^(b-1), 2^(b-1) - 1]``;
            all others have the range ``[0, 2^b - 1]`` with zero-point 0 (not signed) or a learned one.
    """

    zeta: nn.Parameter | None
    power_of_two: bool = False
    """Whether its step is a power of two."""

    def __init__(self, bits: int, signed: bool, symmetric: bool) -> None:
        super().__init__()
        self.bits, self.signed, self.symmetric = bits, signed, symmetric
        centred = signed and symmetric
        self.low = 128 - 2 ** (bits - 1) if centred else 0
        self.high = self.low + 2**bits - 1
        self.fixed_zero = 128.0 if centred else 0.0
        self.log_step = nn.Parameter(torch.zeros(()))
        self.zeta = nn.Parameter(torch.zeros(())) if signed and not symmetric else None

    def grid(self) -> Grid:
        """The grid of the tensor."""
        zero: float | Tensor = self.fixed_zero
        if self.zeta is not None:
            zero = round_ste(self.zeta).clamp(self.low, self.high)
        step = snapped_step(self.log_step) if self.power_of_two else _step(self.log_step)
        return Grid(step, zero, self.low, self.high, self.bits)

    def fake(self, x: Tensor, grid: Grid) -> Tensor:
        """The tensor rounded to its grid, with gradients. A lower bound at real 0 is the ReLU as well."""
        scale = gradient_scale(x.numel(), self.high - self.low)
        if isinstance(grid.zero_point, Tensor):
            low = self.low - grid.zero_point
            return fake_quantize(x, grid.step, low, (low + (self.high - self.low)).detach(), scale)
        zero = grid.zero_point
        return fake_quantize(x, grid.step, self.low - zero, self.high - zero, scale)

    def form(self) -> ActivationForm:
        """Itself: a fixed form stands for an elastic quantizer after extraction."""
        return self

    def copied(self) -> ActivationForm:
        """A copy with its own parameters."""
        other = ActivationForm(self.bits, self.signed, self.symmetric)
        other.power_of_two = self.power_of_two
        other.load_state_dict(self.state_dict())
        return other.to(self.log_step.device).train(self.training)
