"""Seeded builders of valid random programs, calibrated so that every tensor uses its levels.

A :class:`Maker` appends operations one by one; behind each it runs a plain float64 simulation on a few random images
and takes the output's scale from what it sees. The simulation is for calibration only; it is not the exact arithmetic.

:func:`random_program` mixes every kind of operation (all of :data:`KINDS` from ``size >= len(KINDS)`` on),
:func:`residual_program` is a small fixed ResNet, :func:`random_input` makes fp32 images for any program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.quant.program import Add, AvgPool, Clip, Concat, Conv, Input, Linear, MaxPool, Op, Program, Reshape, Tensor

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
KINDS = (
    "conv", "depthwise", "grouped", "pointwise", "strided", "dilated", "oblong", "shifted",
    "add", "clip", "concat", "max_pool", "avg_pool",
)  # fmt: skip
FORMS = ("signed", "unsigned", "asymmetric", "signed_relu", "relu6")


def random_program(
    seed: int, size: int = 8, channels: int = 8, bits: int | Sequence[int] = ALL_BITS, image: tuple[int, int] = (10, 10)
) -> Program:
    """A random net: an input, ``size`` random operations (some need a helper convolution), then a pooled classifier.

    Args:
        seed: Equal seeds give equal programs.
        size: How many operations are drawn; from ``len(KINDS)`` on every kind occurs.
        channels: About how many channels a tensor has; rounded up to an even number.
        bits: What weight and activation bits are drawn from (the input has 8, the first and last layers too).
        image: Height and width of the input, at least 6 each.
    """
    rng = np.random.default_rng(seed)
    maker = Maker(rng, (bits,) if isinstance(bits, int) else tuple(bits))
    width = channels + channels % 2
    last = maker.input((3, *image), ("pixels", "asymmetric")[rng.integers(2)])
    last = maker.conv(last, width, 3, padding=(1, 1), weight_bits=8, bits=8)
    kinds = [*rng.permutation(KINDS), *rng.choice(KINDS, max(0, size - len(KINDS)))][:size]
    for kind in kinds:
        last = _append(maker, str(kind), last, width)
    return maker.classifier(last, 10)


def residual_program(
    seed: int, weight_bits: int, activation_bits: int, channels: int = 8, image: tuple[int, int] = (12, 12)
) -> Program:
    """A small ResNet: stem, three residual blocks (the second with stride 2), average pool, linear layer, 10 classes.

    Args:
        seed: Of weights, scales and biases.
        weight_bits, activation_bits: Of everything but the input, the stem's weights and the last layer (8 bits).
        channels: Of the first stage; the second has twice as many.
        image: Height and width of the input.
    """
    maker = Maker(np.random.default_rng(seed), (activation_bits,))
    last = maker.input((3, *image), "pixels")
    last = maker.conv(last, channels, 3, padding=(1, 1), form="unsigned", weight_bits=8)
    for out, stride in ((channels, 1), (2 * channels, 2), (2 * channels, 1)):
        inner = maker.conv(
            last, out, 3, stride=(stride, stride), padding=(1, 1), form="unsigned", weight_bits=weight_bits
        )
        inner = maker.conv(inner, out, 3, padding=(1, 1), form="signed", weight_bits=weight_bits)
        if stride > 1:
            last = maker.conv(last, out, 1, stride=(stride, stride), form="signed", weight_bits=weight_bits)
        last = maker.add(inner, last, form="unsigned")
    return maker.classifier(last, 10)


def fused_program(program: Program) -> Program:
    """The same network by the rule ``add="one"``: a convolution that only a sum reads becomes one operation with it."""
    readers = Counter(name for op in program.ops for name in op.inputs)
    makers = {op.output.name: op for op in program.ops}
    into: dict[str, Conv] = {}
    for op in program.ops:
        if isinstance(op, Add):
            found = (makers[name] for name in op.inputs if readers[name] == 1)
            if layer := next((maker for maker in found if isinstance(maker, Conv)), None):
                shortcut = next(name for name in op.inputs if name != layer.output.name)
                into[op.output.name] = replace(layer, inputs=(layer.inputs[0], shortcut), output=op.output)
    gone = {layer.path for layer in into.values()}
    kept = (into.get(op.output.name, op) for op in program.ops if op.output.name in into or op.path not in gone)
    return replace(program, ops=tuple(kept), add="one", target="openvino-cpu")


def in_powers_of_two(program: Program) -> Program:
    """The same network with every scale at a power of two."""

    def near(scale: Any) -> Any:
        return np.exp2(np.rint(np.log2(scale)))

    ops: list[Op] = []
    for op in program.ops:
        op = replace(op, output=replace(op.output, scale=float(near(op.output.scale))))
        ops.append(replace(op, weight_scale=near(op.weight_scale)) if isinstance(op, Linear) else op)
    return replace(program, ops=tuple(ops))


def random_input(program: Program, n: int, seed: int) -> NDArray[np.float32]:
    """``n`` random images, fp32 ``[n, *shape]``, that fill the input's range and pass it here and there."""
    return images(program.ops[0].output, n, np.random.default_rng(seed))


def images(tensor: Tensor, n: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random images for an input ``tensor``: blocks of 3x3 plus noise, each with its own brightness and contrast."""
    channels, height, width = tensor.shape
    coarse = rng.normal(size=(n, channels, -(-height // 3), -(-width // 3)))
    blocks = coarse.repeat(3, axis=2).repeat(3, axis=3)[:, :, :height, :width]
    noise = 0.7 * blocks + 0.7 * rng.normal(size=(n, channels, height, width))
    contrast = rng.uniform(0.1, 0.25, size=(n, 1, 1, 1))
    unit = rng.uniform(0.35, 0.65, size=(n, channels, 1, 1)) + contrast * noise
    steps = tensor.low - tensor.zero_point + unit * (tensor.high - tensor.low)
    return (steps * tensor.scale).astype(np.float32)


def _append(maker: Maker, kind: str, last: str, width: int) -> str:
    """Appends one operation of ``kind`` behind ``last``; what would leave too small a map becomes a pointwise layer."""
    rng, (channels, height, wide) = maker.rng, maker.shape(last)
    if kind in ("strided", "dilated", "max_pool", "avg_pool") and min(height, wide) < 5:
        kind = "pointwise"
    if kind == "add":
        return maker.add(*rng.permutation([maker.conv(last, channels, 1), last]).tolist())
    if kind == "concat":
        if channels >= 4 * width:
            return maker.conv(last, width, 1)
        return maker.concat(rng.permutation([maker.conv(last, width, 3, padding=(1, 1)), last]).tolist())
    if kind == "clip":
        return maker.clip(maker.conv(last, width, 1, form=("signed", "asymmetric")[rng.integers(2)]))
    if kind == "max_pool":
        return maker.max_pool(last, *(((2, 2), (2, 2), (0, 0)), ((3, 3), (2, 2), (1, 1)))[rng.integers(2)])
    if kind == "avg_pool":
        return maker.avg_pool(last, *(((2, 2), (2, 2)), ((3, 3), (1, 1)))[rng.integers(2)])
    if kind == "pointwise":
        return maker.conv(last, width, 1)
    if kind == "oblong":
        return maker.conv(last, width, (1, 3), padding=(0, 1))
    options: dict[str, dict[str, Any]] = {
        "conv": {},
        "depthwise": {"groups": channels},
        "grouped": {"groups": 2},
        "strided": {"stride": (2, 2)},
        "dilated": {"dilation": (2, 2), "padding": (2, 2)},
        "shifted": {"weight_bits": min(maker.bits), "shifted": True},
    }
    return maker.conv(last, channels if kind == "depthwise" else width, 3, **{"padding": (1, 1), **options[kind]})


class Maker:
    """Builds a program operation by operation; every method returns the name of the tensor it made.

    Args:
        rng: Draws everything that is not given.
        bits: What bits are drawn from where none are given.
        count: How many random images calibrate the scales.
    """

    def __init__(self, rng: np.random.Generator, bits: Sequence[int] = ALL_BITS, count: int = 12) -> None:
        self.rng = rng
        self.bits = tuple(bits)
        self.count = count
        self.ops: list[Op] = []
        self.tensors: dict[str, Tensor] = {}
        self.values: dict[str, Ints] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def real(self, name: str) -> Reals:
        tensor = self.tensors[name]
        return np.asarray((self.values[name] - tensor.zero_point) * tensor.scale, np.float64)

    def program(self, target: str = "onnxruntime-cpu") -> Program:
        return Program(tuple(self.ops), target, meta={"made_by": "tests"})

    def input(self, shape: tuple[int, ...], form: str = "pixels") -> str:
        """The input: ``"pixels"`` (step 1/255, zero-point 0) or ``"asymmetric"`` 8 bits."""
        pixels = form == "pixels"
        scale, zero = (1 / 255, 0) if pixels else (self.rng.uniform(0.01, 0.03), int(self.rng.integers(90, 150)))
        tensor = Tensor("input", shape, float(np.float32(scale)), zero, 0, 255, 8)
        return self._keep(Input((), tensor, "input"), images(tensor, self.count, self.rng).astype(np.float64))

    def conv(
        self,
        source: str,
        out: int,
        kernel: int | tuple[int, int],
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        weight_bits: int | None = None,
        bits: int | None = None,
        form: str | None = None,
        shifted: bool = False,
    ) -> str:
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        fields = self._weights(source, (out, self.shape(source)[0] // groups, *size), weight_bits, shifted)
        weight = fields["weight"].astype(np.int64) << fields["shift"][:, None, None, None]
        x = self.values[source] - self.tensors[source].zero_point
        acc = convolve(x, weight, stride, padding, dilation, groups)
        fields["bias"], fields["weight_scale"], unit = self._affine(source, acc)
        real = (acc + fields["bias"][:, None, None]) * unit[:, None, None]
        output = self._tensor("conv", real, form, bits)
        op = Conv(
            (source,), output, output.name, **fields, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        return self._keep(op, real)

    def linear(
        self, source: str, out: int, *, weight_bits: int | None = None, bits: int | None = None, form: str | None = None
    ) -> str:
        fields = self._weights(source, (out, *self.shape(source)), weight_bits, False)
        x = self.values[source] - self.tensors[source].zero_point
        acc = x @ fields["weight"].astype(np.int64).T
        fields["bias"], fields["weight_scale"], unit = self._affine(source, acc)
        real = (acc + fields["bias"]) * unit
        output = self._tensor("linear", real, form, bits)
        return self._keep(Linear((source,), output, output.name, **fields), real)

    def add(self, first: str, second: str, *, bits: int | None = None, form: str | None = None) -> str:
        real = self.real(first) + self.real(second)
        output = self._tensor("add", real, form, bits)
        return self._keep(Add((first, second), output, output.name), real)

    def concat(self, sources: Sequence[str], *, bits: int | None = None) -> str:
        """Joins ``sources``; sometimes with the grid of the first one, which is then copied as it is."""
        real = np.concatenate([self.real(source) for source in sources], axis=1)
        output = self._tensor("concat", real, "asymmetric", bits)
        first = self.tensors[sources[0]]
        if self.rng.integers(2) and np.ptp(real) > 10 * first.scale:
            grid = (first.scale, first.zero_point, 0, 255, 8)
            output = Tensor(output.name, output.shape, *grid)
        return self._keep(Concat(tuple(sources), output, output.name), real)

    def avg_pool(
        self, source: str, kernel: tuple[int, int], stride: tuple[int, int], *, bits: int | None = None
    ) -> str:
        real = windows(self.real(source), kernel, stride, (1, 1)).mean((-1, -2))
        output = self._tensor("avg_pool", real, "signed" if real.min() < 0 else "unsigned", bits)
        return self._keep(AvgPool((source,), output, output.name, kernel, stride), real)

    def max_pool(self, source: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> str:
        edges = ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2)
        padded = np.pad(self.values[source], edges, constant_values=-1)
        values = windows(padded, kernel, stride, (1, 1)).max((-1, -2))
        output = self._like(source, "max_pool", values.shape[1:])
        return self._keep(MaxPool((source,), output, output.name, kernel, stride, padding), values, integers=True)

    def clip(self, source: str) -> str:
        """A ReLU: the lower clip at the zero-point."""
        base = self.tensors[source]
        output = self._like(source, "clip", base.shape, low=base.zero_point)
        values = np.clip(self.values[source], output.low, output.high)
        return self._keep(Clip((source,), output, output.name), values, integers=True)

    def reshape(self, source: str, shape: tuple[int, ...]) -> str:
        output = self._like(source, "reshape", shape)
        values = self.values[source].reshape(self.count, *shape)
        return self._keep(Reshape((source,), output, output.name), values, integers=True)

    def classifier(self, last: str, classes: int) -> Program:
        """Ends the net: global average pool, reshape, linear layer with 8-bit weights and a signed 8-bit output."""
        channels, height, width = self.shape(last)
        pooled = self.avg_pool(last, (height, width), (1, 1), bits=8)
        self.linear(self.reshape(pooled, (channels,)), classes, weight_bits=8, bits=8, form="signed")
        return self.program()

    def _weights(self, source: str, shape: tuple[int, ...], bits: int | None, shifted: bool) -> dict[str, Any]:
        """Weights that use their whole range, with shifts that differ by channel where ``shifted``."""
        width = int(self.rng.choice(self.bits)) if bits is None else bits
        half = 1 << (width - 1)
        weight = self.rng.integers(-half, half, size=shape).astype(np.int8)
        shift = self.rng.integers(0, 9 - width, size=shape[0]) if shifted else np.zeros(shape[0])
        total = np.abs(weight.astype(np.int64)).reshape(shape[0], -1).sum(1) << shift.astype(np.int64)
        tensor = self.tensors[source]
        reach = max(tensor.high - tensor.zero_point, tensor.zero_point - tensor.low)
        return {
            "weight": weight,
            "weight_bits": width,
            "shift": shift.astype(np.uint8),
            "wide": bool(total.max() * reach >= 1 << 24),
        }

    def _affine(self, source: str, acc: Ints) -> tuple[NDArray[np.int32], NDArray[np.float32], Reals]:
        """Bias, weight scale and real value of one step per channel: like a BatchNorm they give every channel a mean

        near 0 and a spread near 1, so that a ReLU cuts about half, no channel is constant and nothing dies on the way.
        """
        others = (0, *range(2, acc.ndim))
        spread = np.maximum(acc.std(axis=others), 1.0)
        bias = np.rint(-acc.mean(axis=others) + 0.6 * spread * self.rng.normal(size=spread.shape)).astype(np.int32)
        step = self.tensors[source].scale
        scale = (self.rng.uniform(0.5, 1.5, size=spread.shape) / (spread * step)).astype(np.float32)
        return bias, scale, step * scale.astype(np.float64)

    def _tensor(self, kind: str, real: Reals, form: str | None, bits: int | None) -> Tensor:
        """A tensor whose grid covers nearly all of ``real``; the few values beyond it are clipped."""
        width = int(self.rng.choice(self.bits)) if bits is None else bits
        shape = str(self.rng.choice(FORMS)) if form is None else form
        tail = 0.08 / 2**width
        bottom, top = (float(value) for value in np.quantile(real, (tail, 1 - tail)))
        bottom, top, levels, half = min(bottom, 0.0), max(top, 1e-3), (1 << width) - 1, 1 << (width - 1)
        if shape in ("signed", "signed_relu"):
            scale = max(-bottom / half, top / max(half - 1, 1)) if width > 2 else max(-bottom, top) / half
            low = 128 if shape == "signed_relu" else 128 - half
            grid = (128, low, 127 + half)
        elif shape == "asymmetric":
            scale = (top - bottom) / levels
            grid = (int(np.clip(np.rint(-bottom / scale), 0, levels)), 0, levels)
        else:
            scale = top / levels
            grid = (0, 0, levels if shape == "unsigned" else max(1, round(0.9 * levels)))
        name = f"{kind}_{len(self.ops)}"
        return Tensor(name, real.shape[1:], float(np.float32(scale)), *grid, width)

    def _like(self, source: str, kind: str, shape: Sequence[int], low: int | None = None) -> Tensor:
        base = self.tensors[source]
        floor = base.low if low is None else low
        name = f"{kind}_{len(self.ops)}"
        return Tensor(name, tuple(shape), base.scale, base.zero_point, floor, base.high, base.bits)

    def _keep(self, op: Op, value: NDArray[Any], integers: bool = False) -> str:
        grid = op.output
        steps = value if integers else np.clip(np.rint(value / grid.scale) + grid.zero_point, grid.low, grid.high)
        self.ops.append(op)
        self.tensors[grid.name] = grid
        self.values[grid.name] = steps.astype(np.int64)
        return grid.name


def windows(
    x: NDArray[Any], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> NDArray[Any]:
    """Every window of ``x [N, C, H, W]``: ``[N, C, OH, OW, kh, kw]``."""
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
    return view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def convolve(
    x: Ints,
    weight: Ints,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Ints:
    """The plain convolution of ``x [N, C, H, W]`` with ``weight [O, C/groups, kh, kw]``, in integers."""
    padded = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    view = windows(padded, weight.shape[2:], stride, dilation)
    parts = zip(np.split(view, groups, axis=1), np.split(weight, groups), strict=True)
    return np.concatenate([np.einsum("nchwij,ocij->nohw", part, kernel) for part, kernel in parts], axis=1)
