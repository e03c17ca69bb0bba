"""One quantizer of one form: fixed bits, granularity and symmetry, learned step size and zero-point.

Step sizes are stored as logarithms, so that they are positive whatever the optimizer does, and floored at 2^-24.
Zero-points are learned as real numbers and rounded to an integer inside the grid, so that real 0 is always on it.
Every form owns its parameters: a form that is not used in a step has no gradient, and an optimizer leaves it alone,
momentum and weight decay included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasq.quant.arithmetic import STEP_FLOOR, round_ste, to_integers
from nasq.quant.fake import fake_quantize, gradient_scale, released_scale
from nasq.quant.value import Grid

__all__ = ["ActivationForm", "WeightForm"]


def _step(log_step: Tensor) -> Tensor:
    # In float64: an fp32 exponential differs from device to device, and with it every integer near a tie.
    return log_step.double().exp().float().clamp_min(STEP_FLOOR)


class WeightForm(nn.Module):
    """Quantizes a weight with fixed bits, granularity and symmetry.

    Args:
        channels: Number of step sizes: output channels, or ``None`` for one per tensor.
        bits: 2..8; integers are in ``[-2^(bits-1), 2^(bits-1) - 1]``.
        symmetric: Whether the zero-point is 0; otherwise it is learned.
        released: Whether the gradient of per-channel steps is scaled as in EQ-Net's released code
            (:func:`nasq.quant.fake.released_scale`) instead of by LSQ's rule.
    """

    zeta: nn.Parameter | None

    def __init__(self, channels: int | None, bits: int, symmetric: bool, released: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric, self.released = bits, symmetric, released
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        shape = () if channels is None else (channels,)
        self.log_step = nn.Parameter(torch.zeros(shape))
        self.zeta = None if symmetric else nn.Parameter(torch.zeros(shape))

    @property
    def granularity(self) -> str:
        """``"tensor"`` or ``"channel"``."""
        return "channel" if self.log_step.ndim else "tensor"

    def _of(self, parameter: Tensor, weight: Tensor) -> Tensor:
        """The step sizes of the weight's channels: slices follow slices."""
        if not parameter.ndim:
            return parameter
        return parameter[: weight.shape[0]].reshape(-1, *[1] * (weight.ndim - 1))

    def step(self, channels: int) -> Tensor:
        """Step size(s), 0-d or ``[channels]``."""
        return _step(self.log_step if not self.log_step.ndim else self.log_step[:channels])

    def _zero(self, weight: Tensor) -> Tensor | None:
        return None if self.zeta is None else round_ste(self._of(self.zeta, weight)).clamp(self.low, self.high)

    def fake(self, weight: Tensor, sign: Tensor | None = None) -> Tensor:
        """The weight rounded to its grid, with gradients.

        Args:
            weight: Active slice ``[out, ...]``.
            sign: ``[out]`` of 1 and -1: the sign of the affine behind the layer; it enters before rounding, so that the
                deployed integers, which carry it, stay legal (``-2^(bits-1)`` has no positive counterpart).
        """
        step, zero = _step(self._of(self.log_step, weight)), self._zero(weight)
        scale = gradient_scale(weight.numel() // max(step.numel(), 1), self.high)
        if self.released and self.log_step.ndim:
            scale = released_scale(weight, self.high)
        if zero is not None:
            low = self.low - zero
            return fake_quantize(weight, step, low, (low + (self.high - self.low)).detach(), scale)
        if sign is None:
            return fake_quantize(weight, step, float(self.low), float(self.high), scale)
        sign = sign.reshape(-1, *[1] * (weight.ndim - 1))
        return sign * fake_quantize(sign * weight, step, float(self.low), float(self.high), scale)

    def integers(self, weight: Tensor, sign: Tensor) -> Tensor:
        """Integers minus their zero-point, with the sign of the affine behind the layer in them, as fp32."""
        step, zero = _step(self._of(self.log_step, weight)), self._zero(weight)
        sign = sign.reshape(-1, *[1] * (weight.ndim - 1))
        if zero is None:
            return to_integers(sign * weight, step, 0.0, self.low, self.high)
        # Zero is centred after rounding; -(q - z) = (-1 - q) - (-1 - z), and both stay in the range of the bits.
        return sign * ((torch.round(weight / step) + zero).clamp(self.low, self.high) - zero)

    def zeros(self, sign: Tensor) -> Tensor | None:
        """The zero-points ``[out]`` of what :meth:`integers` gives, ``-1 - z`` where the sign is -1; ``None``: all 0."""
        if self.zeta is None:
            return None
        zero = round_ste(self._of(self.zeta, sign)).clamp(self.low, self.high).expand_as(sign)
        return torch.where(sign < 0, -1 - zero, zero)

    def form(self) -> WeightForm:
        """Itself: a fixed form stands for an elastic quantizer after extraction."""
        return self

    def sliced(self, channels: int) -> WeightForm:
        """A copy for the first ``channels`` output channels."""
        wide = self.log_step.ndim > 0
        copied = WeightForm(channels if wide else None, self.bits, self.symmetric, self.released)
        copied.log_step = nn.Parameter((self.log_step[:channels] if wide else self.log_step).detach().clone())
        if self.zeta is not None:
            copied.zeta = nn.Parameter((self.zeta[:channels] if wide else self.zeta).detach().clone())
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
        return Grid(_step(self.log_step), zero, self.low, self.high, self.bits)

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
        other.load_state_dict(self.state_dict())
        return other.to(self.log_step.device).train(self.training)
