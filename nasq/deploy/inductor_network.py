"""A program as a graph that Inductor compiles: ``uint8`` tensors from end to end, layers on oneDNN's int8 kernels.

torch's own way to int8 on x86 (a PT2E graph, lowered by Inductor's patterns) ends in ``onednn.qconv_pointwise``. Here it is
called directly, with scale 1 and an fp32 result: what it makes is the exact accumulator, at any bit-width, and bias,
multiplier, rounding and clips behind it are plain arithmetic that Inductor fuses with whatever follows (sums, functions of
single elements) into one loop. So a compiled network has the reference's integers, where the kernel's own requantization
rounds in an order of its own, and the patterns drop ranges narrower than 8 bits. A linear layer is a convolution of one
pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasq.deploy.integer_network import IntegerNetwork
from nasq.errors import TargetError
from nasq.quant import program as p
from nasq.quant.operations import STAYS
from nasq.quant.program import Program

__all__ = ["InductorNetwork", "why_not"]

_REAL: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
"""What the kernel makes of its sums: scale, zero-point and type; and nothing behind it."""


def why_not() -> str:
    """Why this processor or build of torch cannot run the kernels exactly, as a clause; empty where it can."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.onednn, "qconv_pointwise"):
        return "this build of torch has no oneDNN"
    if not torch.cpu._is_vnni_supported():
        return "the processor has no VNNI, without which sums of uint8 times int8 saturate"
    return ""


class InductorNetwork(IntegerNetwork):
    """Executes a program on ``uint8`` tensors; equal to :class:`nasq.deploy.reference.Reference`, compiled or not.

    Args:
        program: A valid program.

    Attributes:
        floats: Why a layer runs on integers held in floating point instead of an int8 kernel, by the number of its operation.

    Raises:
        TargetError: The processor or torch has no such kernels.
    """

    def __init__(self, program: Program) -> None:
        if reason := why_not():
            raise TargetError(
                f"the runtime 'inductor' cannot run here: {reason}. Load the bundle without a runtime or export it for "
                "another target, such as 'onnxruntime-cpu'."
            )
        super().__init__(program)
        self.floats: dict[int, str] = {}
        for index, op in enumerate(program.ops):
            if isinstance(op, p.Linear):
                self._prepare(index, op)
            elif isinstance(op, p.MatMul):
                self.floats[index] = "torch has no kernel for products of two int8 tensors"

    def _prepare(self, index: int, op: p.Linear) -> None:
        """Packed weights, one array per part of the input's channels; the plain ones are dropped."""
        if reason := self._why_float(index, op):
            self.floats[index] = reason
            return
        parts = self.parts[index] or 1
        weight = torch.from_numpy(op.used).to(torch.int8)
        pieces = weight.chunk(parts, 1)
        for place, piece in enumerate(pieces):
            self.register_buffer(f"packed{index}_{place}", self._packed(op, piece.contiguous()))
        source = self.program.tensor(op.inputs[0])
        ratio = (torch.tensor(source.scale) * torch.from_numpy(op.weight_scale.copy())) / torch.tensor(op.output.scale)
        self.register_buffer(f"ratio{index}", ratio)
        self.register_buffer(f"ones{index}", torch.ones(len(weight)))
        self.register_buffer(f"zeros{index}", torch.zeros(len(weight), dtype=torch.int32))
        for name in ("weight", "scale"):
            delattr(self, f"op{index}_{name}")

    def _packed(self, op: p.Linear, weight: Tensor) -> Tensor:
        weight = weight if isinstance(op, p.Conv) else weight[:, :, None, None]
        zero, ones = self.program.tensor(op.inputs[0]).zero_point, torch.ones(len(weight))
        packed: Tensor = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, zero, *_geometry(op), None)
        return packed

    def _why_float(self, index: int, op: p.Linear) -> str:
        if op.multipliers is not None:
            return "groups of its inputs have scales of their own"
        used = op.used
        if used.min(initial=0) < -128 or used.max(initial=0) > 127:
            return "its weights minus their zero-points leave int8"
        if self.parts[index] is None:
            return "its sums may pass 2^24, which parts of its channels do not mend"
        return ""

    def own(self, index: int, name: str) -> Tensor:
        """An array prepared for operation ``index``."""
        found: Tensor = getattr(self, f"{name}{index}")
        return found

    def forward(self, x: Tensor) -> Tensor:
        """The final container integers, uint8 ``[N, ...]``, of fp32 images: what is compiled."""
        return self.containers(x)

    def start(self, x: Tensor) -> Tensor:
        """The network's real input as uint8."""
        made = self.program.ops[0].output
        return _stored(_placed(x / self.steps[0], made), made)

    def execute(self, index: int, op: p.Op, given: list[Tensor], count: int) -> Tensor:
        """One operation, uint8 in and out; equal to what the base class computes in fp32."""
        if own := _OWN.get(op.kind):
            if index not in self.floats:
                return own(self, index, op, given)
        elif isinstance(op, (*STAYS, p.Scale)):
            return super().execute(index, op, given, count)
        if isinstance(op, p.Linear):
            return _stored(self._in_float64(index, op, given), op.output)
        return _stored(super().execute(index, op, [x.float() for x in given], count), op.output)

    def _in_float64(self, index: int, op: p.Linear, given: list[Tensor]) -> Tensor:
        """A layer without an int8 kernel: exact sums in float64."""
        sources = [self.program.tensor(name) for name in op.inputs]
        x, weight = given[0].double() - sources[0].zero_point, getattr(self, f"op{index}_weight").double()
        if isinstance(op, p.Conv):
            acc = F.conv2d(x, weight, None, op.stride, op.padding, op.dilation, op.groups)
        else:
            acc = F.linear(x, weight)
        scale = getattr(self, f"op{index}_scale")
        ratio = (self.steps[self.places[op.inputs[0]]] * scale) / self.steps[index]
        return self._requantized(index, op, acc, ratio, given)

    def _requantized(self, index: int, op: p.Linear, acc: Tensor, ratio: Tensor, given: list[Tensor]) -> Tensor:
        """``clip(rne(fp32(acc + bias) * M [+ fp32(q_r R)]) + z)`` of exact sums, fp32."""
        shape = (1, -1, 1, 1) if isinstance(op, p.Conv) else (-1,)
        bias: Tensor = getattr(self, f"op{index}_bias")
        steps = (acc + bias.reshape(shape).to(acc.dtype)).float() * ratio.reshape(shape)
        if len(given) == 2:
            shortcut = self.program.tensor(op.inputs[1])
            steps = steps + (given[1].float() - shortcut.zero_point) * (
                self.steps[self.places[op.inputs[1]]] / self.steps[index]
            )
        return _placed(steps, op.output)


def _placed(steps: Tensor, made: p.Tensor) -> Tensor:
    """Real steps to container integers held in fp32."""
    return (torch.round(steps) + float(made.zero_point)).clamp(made.low, made.high)


def _stored(q: Tensor, made: p.Tensor) -> Tensor:
    """As uint8, images in the memory order that the kernels read."""
    stored = q.to(torch.uint8)
    return stored.contiguous(memory_format=torch.channels_last) if stored.ndim == 4 else stored


def _layer(network: InductorNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    conv, zero = isinstance(op, p.Conv), network.program.tensor(op.inputs[0]).zero_point
    x = given[0] if conv else given[0].reshape(-1, given[0].shape[-1], 1, 1)
    acc: Tensor | None = None
    for place, piece in enumerate(x.chunk(network.parts[index] or 1, 1)):
        weight = getattr(network, f"packed{index}_{place}")
        arrays = (weight, network.own(index, "ones"), network.own(index, "zeros"), None)
        piece = piece.contiguous(memory_format=torch.channels_last)
        found = torch.ops.onednn.qconv_pointwise(piece, 1.0, zero, *arrays, *_geometry(op), *_REAL)
        acc = found if acc is None else acc.double() + found
    assert acc is not None
    acc = acc if conv else acc.reshape(*given[0].shape[:-1], -1)
    return _stored(network._requantized(index, op, acc, network.own(index, "ratio"), given), op.output)


def _geometry(op: p.Linear) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups; a linear layer is a convolution of one pixel."""
    if isinstance(op, p.Conv):
        return list(op.stride), list(op.padding), list(op.dilation), op.groups
    return [1, 1], [0, 0], [1, 1], 1


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c`` rounded once to fp32; the product of an 8-bit integer and an fp32 number is exact in float64."""
    return (a.double() * b.double() + c.double()).float()


def _add(network: InductorNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    """As :func:`nasq.quant.arithmetic.add_integers`, in one expression that can be fused."""
    sources, made = [network.program.tensor(name) for name in op.inputs], op.output
    r_a, r_b = (network.steps[network.places[name]] / network.steps[index] for name in op.inputs)
    z_a, z_b, z_y = (torch.tensor(float(tensor.zero_point)) for tensor in (*sources, made))
    fixed = z_y - _fma(r_a, z_a, r_b * z_b)
    q = _fma(given[0], r_a, _fma(given[1], r_b, fixed))
    return _stored(torch.round(q).clamp(made.low, made.high), made)


def _max_pool(network: InductorNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    return _stored(F.max_pool2d(given[0].float(), op.kernel, op.stride, op.padding), op.output)


def _table(network: InductorNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    return _stored(getattr(network, f"op{index}_values")[given[0].int()], op.output)


def _softmax(network: InductorNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    x, made = given[0].int(), op.output
    seen = torch.ones(x.shape[-2:], dtype=torch.int32).tril() if op.causal else torch.ones((), dtype=torch.int32)
    q = x * seen
    weights = getattr(network, f"op{index}_table")[q.amax(-1, keepdim=True) - q] * seen
    share = weights / weights.sum(-1, keepdim=True)
    return _stored(_placed(share / network.steps[index], made), made)


_OWN: Mapping[str, Callable[[InductorNetwork, int, Any, list[Tensor]], Tensor]] = {
    "conv": _layer, "linear": _layer, "add": _add, "max_pool": _max_pool, "table": _table, "softmax": _softmax,
}  # fmt: skip
