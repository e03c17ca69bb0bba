"""The producers of a quantized network: every operation that makes a new quantized tensor.

A convolution or linear layer with the BatchNorm and activation behind it is one producer; so is each sum, average pool
and concatenation (:mod:`nasq.quant.combining`), table or product (:mod:`nasq.quant.elementwise`, :mod:`nasq.quant.tokens`).
Each owns the quantizer of the tensor it makes, which all consumers share. Producers hold the network's own layers by
reference only: the layers stay registered where the network put them, so their names survive.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.errors import InputError
from nasq.quant import arithmetic, layers, program
from nasq.quant.calibration import initialise_activation, initialise_weight
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.layers import AnyLayer, AnyNorm
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from nasq.quant.value import Grid, Recorder, Value

__all__ = [
    "Activation",
    "InputProducer",
    "LayerProducer",
    "Producer",
]

Activation = Literal["none", "relu", "relu6"]


def activate(y: Tensor, activation: Activation) -> Tensor:
    """The activation on real values."""
    if activation == "relu":
        return F.relu(y)
    return F.relu6(y) if activation == "relu6" else y


class Producer(nn.Module):
    """Makes one quantized tensor.

    Args:
        path: Where it is in the network.
        quantizer: Of the tensor it makes.
        activation: What it applies before quantizing.
    """

    def __init__(self, path: str, quantizer: ActivationQuantizer | ActivationForm, activation: Activation) -> None:
        super().__init__()
        self.path, self.activation = path, activation
        self.quantizer = quantizer

    def output_grid(self) -> Grid:
        """The grid of the tensor made, with the activation in its bounds."""
        grid = self.quantizer.form().grid()
        if self.activation == "none" or isinstance(grid.zero_point, Tensor):
            return grid
        # An unsigned grid begins at real 0, which is the ReLU; ReLU6 bounds it from above as well.
        high = grid.high
        if self.activation == "relu6":
            high = min(high, int(grid.zero_point + torch.round(6 / grid.step.detach()).clamp_max(255)))
        return Grid(grid.step, grid.zero_point, max(grid.low, int(grid.zero_point)), high, grid.bits)

    def finish(self, y: Tensor, value: Value) -> Value:
        """Real values in, quantized tensor out (every mode but ``"integer"``)."""
        if value.mode != "fake":
            y = activate(y, self.activation)
            if value.mode == "calibrate":
                self._calibrate(y)
            return value.on(y, None)
        form = self.quantizer.form()
        if self.activation == "relu6":
            y = y.clamp_max(6.0)
        return value.on(form.fake(y, form.grid()), self.output_grid())

    def _calibrate(self, y: Tensor) -> None:
        if not bool(y.isfinite().all()):
            raise InputError(
                f"the tensor that {self.path!r} makes holds NaN or infinite values, so no step size can be found for it. "
                "Check the images and the weights; 'input' is the network's input."
            )
        # The first run that makes the tensor counts: the largest subnet that reaches it comes first.
        if isinstance(self.quantizer, ActivationQuantizer) and not self.quantizer.calibrated:
            initialise_activation(self.quantizer, y)

    @staticmethod
    def record(
        value: Value,
        integers: Tensor,
        grid: Grid,
        kind: type[program.Op],
        inputs: tuple[Value, ...],
        path: str,
        **fields: Any,
    ) -> Value:
        """A value of the integer pass, written to the recorder if there is one."""
        made = value.on(integers, grid)
        recorder = value.recorder
        if recorder is None:
            return made
        spec = recorder.spec(made, grid)
        recorder.ops.append(kind(tuple(x.name for x in inputs), spec, path, **fields))
        return Value(integers, value.mode, grid, recorder, spec.name)


class InputProducer(Producer):
    """Quantizes the network's input."""

    def forward(self, value: Value) -> Value:
        """A real tensor in, its quantized form out."""
        if value.mode != "integer":
            return self.finish(value.data, value)
        grid = self.output_grid()
        integers = arithmetic.to_integers(value.data, grid.step, grid.zero_point, grid.low, grid.high)
        return self.record(value, integers, grid, program.Input, (), self.path)


class LayerProducer(Producer):
    """A convolution or linear layer, the BatchNorm behind it and the activation behind that.

    In training BatchNorm uses batch statistics in float. In evaluation it is an affine behind the integer accumulator:
    it changes the exported scales and integer biases, never a weight's integers and never a learned step size.

    By the rule ``add="one"`` the sum behind a layer is part of it: what the layer makes is added to the quantized shortcut
    before anything is rounded, and the quantizer is that of the sum.
    """

    layer: AnyLayer
    norm: AnyNorm | None

    def __init__(
        self,
        path: str,
        layer: AnyLayer,
        norm: AnyNorm | None,
        activation: Activation,
        weight_quantizer: WeightQuantizer | WeightForm,
        quantizer: ActivationQuantizer | ActivationForm,
    ) -> None:
        super().__init__(path, quantizer, activation)
        self.weight_quantizer = weight_quantizer
        # References, not registered submodules: the layers live where the network put them.
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "norm", norm)

    def forward(self, x: Value, shortcut: Value | None = None) -> Value:
        """``[N, in, ...]`` to ``[N, out, ...]``, or ``[N, ..., in]`` to ``[N, ..., out]`` for a linear layer.

        Args:
            x: What the layer reads.
            shortcut: What its result is added to, where the layer and the sum behind it are one producer.
        """
        if x.mode == "integer":
            return self._integer(x, shortcut)
        y = self._fake(x) if x.mode == "fake" else self._real(x)
        return self.finish(y if shortcut is None else y + shortcut.data, x)

    def _real(self, x: Value) -> Tensor:
        weight = layers.weight_of(self.layer, x.data)
        quantizer = self.weight_quantizer
        if x.mode == "calibrate" and isinstance(quantizer, WeightQuantizer) and not quantizer.calibrated:
            initialise_weight(quantizer, layers.full_weight(self.layer))
        y = layers.apply(self.layer, x.data, weight, layers.bias_of(self.layer))
        if self.norm is not None:
            fresh = x.mode == "calibrate" and layers.never_updated(self.norm)
            y = layers.normalise_by_batch(self.norm, y) if fresh else layers.normalise(self.norm, y)
        return y

    def _fake(self, x: Value) -> Tensor:
        form, bias, part = self.weight_quantizer.form(), layers.bias_of(self.layer), layers.slices_of(self.layer)
        weight = layers.weight_of(self.layer, x.data)
        inputs = weight.shape[1]
        before = layers.affine(self.norm, bias, weight.shape[0], x.data)[0] if form.power_of_two else None
        weight = form.fake(weight, layers.norm_sign(self.norm), before, part)
        if self.norm is not None and self.norm.training:
            return layers.normalise(self.norm, layers.apply(self.layer, x.data, weight, bias))
        # Without live statistics the bias is what the file holds: rounded to its grid, straight-through.
        slope, offset = layers.affine(self.norm, bias, weight.shape[0], x.data)
        with torch.no_grad():
            step = form.step(len(weight), slope, inputs, part)
        offset, alive = self._rounded(offset, slope, step, x)
        weight = weight * alive.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))
        y = layers.apply(self.layer, x.data, weight, None)
        shape = layers.along_channels(self.layer, y.ndim)
        if self.norm is None:
            return y + offset.to(y.dtype).reshape(shape)
        return y * slope.to(y.dtype).reshape(shape) + offset.to(y.dtype).reshape(shape)

    def _rounded(self, offset: Tensor, slope: Tensor, step: Tensor, x: Value) -> tuple[Tensor, Tensor]:
        """The offset as the file holds it, and 1 where it leaves the channel its weights, 0 where it is constant."""
        assert x.grid is not None
        form, grid = self.weight_quantizer.form(), self.output_grid()
        with torch.no_grad():
            ones = torch.ones(len(offset), 1, device=offset.device)
            found = arithmetic.integer_layer(
                ones, step, form.bits, slope, offset, x.grid.step, grid.step, form.power_of_two
            )
            unit = (x.grid.step * found.scale).double()
            rounded = found.bias.double() * unit
        return offset + (rounded - offset).detach(), found.weight.flatten()

    def integers(self, x: Value, grid: Grid) -> arithmetic.IntegerLayer:
        """The integer weights, scales and biases of the active form."""
        assert x.grid is not None
        form, part = self.weight_quantizer.form(), layers.slices_of(self.layer)
        weight = layers.weight_of(self.layer, x.data)
        slope, offset = layers.affine(self.norm, layers.bias_of(self.layer), weight.shape[0], weight)
        size, sign = (len(weight), slope, weight.shape[1]), torch.where(slope < 0, -1.0, 1.0).float()
        made = arithmetic.integer_layer(
            form.integers(weight, sign, slope, part), form.step(*size, part), form.bits, slope, offset, x.grid.step,
            grid.step, form.power_of_two,
        )  # fmt: skip
        multipliers, sizes = form.multipliers(*size, part)
        return replace(made, zero=form.zeros(sign, weight.shape[1], part), multipliers=multipliers, sizes=sizes)

    def _integer(self, x: Value, shortcut: Value | None) -> Value:
        assert x.grid is not None
        grid = self.output_grid()
        inputs: tuple[Value, ...] = (x,)
        beside = None
        if shortcut is not None:
            assert shortcut.grid is not None
            inputs, beside = (x, shortcut), (shortcut.centred(), shortcut.grid.step)
        found = self.integers(x, grid)
        plain = found.zero is None and found.multipliers is None
        accumulator = layers.accumulate(self.layer, x, found.summed, plain)
        along = layers.along_channels(self.layer, accumulator.ndim)
        integers = arithmetic.requantize(
            accumulator, found, x.grid.step, grid.step, grid.zero_point, grid.low, grid.high, along, beside
        )
        if x.recorder is None:
            return x.on(integers, grid)
        wide = found.multipliers is not None or layers.is_wide(x, found.shifted)
        return self._record(inputs, integers, grid, found, wide)

    def _record(
        self, inputs: tuple[Value, ...], integers: Tensor, grid: Grid, found: arithmetic.IntegerLayer, wide: bool
    ) -> Value:
        x = inputs[0]
        weight, zero = found.weight, None
        if found.zero is not None:
            by_group = found.multipliers is not None
            spread = arithmetic.spread_groups(found.zero, found.sizes) if by_group else found.zero
            weight = weight + (spread if by_group else spread.reshape(-1, *[1] * (weight.ndim - 1)))
            zero = found.zero.cpu().numpy().astype(np.int8)
        fields: dict[str, Any] = {
            "weight": weight.cpu().numpy().astype(np.int8),
            "weight_zero": zero,
            "weight_bits": self.weight_quantizer.form().bits,
            "shift": found.shift.cpu().numpy().astype(np.uint8),
            "weight_scale": found.scale.cpu().numpy(),
            "bias": found.bias.cpu().numpy().astype(np.int32),
            "wide": wide,
        }
        if found.multipliers is not None:
            fields |= {"multipliers": found.multipliers.cpu().numpy().astype(np.int32), "sizes": found.sizes}
        geometry = layers.geometry_of(self.layer, x.data)
        if geometry is None:
            return self.record(x, integers, grid, program.Linear, inputs, self.path, **fields)
        pairs = {key: _pair(geometry[key]) for key in ("stride", "padding", "dilation")}
        return self.record(
            x, integers, grid, program.Conv, inputs, self.path, **fields, **pairs, groups=int(geometry["groups"])
        )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def flatten(x: Value, path: str) -> Value:
    """Joins everything behind the batch dimension; the grid stays."""
    data = x.data.flatten(1)
    if x.mode != "integer":
        return x.on(data, x.grid)
    assert x.grid is not None
    return Producer.record(x, data, x.grid, program.Reshape, (x,), path)


def start(x: Tensor, mode: Any, recorder: Recorder | None) -> Value:
    """The network's real input as a value."""
    return Value(x, mode, None, recorder)
