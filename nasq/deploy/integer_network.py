"""A program as a torch module: the integers of a bundle, computed with the arithmetic of the evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.cuda import products
from nasq.errors import InputError
from nasq.quant import arithmetic, wide
from nasq.quant import program as p
from nasq.quant.program import Program

__all__ = ["IntegerNetwork"]

Buffers = Mapping[str, Tensor]


class IntegerNetwork(nn.Module):
    """Executes a program; equal to :class:`nasq.deploy.reference.Reference` and to the evaluation.

    Integers are held in fp32, every array is a buffer: ``.to(device)`` moves the whole network. There is nothing to
    train; gradients are off.

    Args:
        program: A valid program, such as :func:`nasq.deploy.bundle.read` gives.

    Attributes:
        program: As given.
    """

    steps: Tensor

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.places = {op.output.name: index for index, op in enumerate(program.ops)}
        self.register_buffer("steps", torch.tensor([op.output.scale for op in program.ops], dtype=torch.float32))
        self.parts = {index: _parts(op, program) for index, op in enumerate(program.ops) if isinstance(op, p.Linear)}
        for index, op in enumerate(program.ops):
            for name, value in _arrays(op, self.parts.get(index)).items():
                self.register_buffer(f"op{index}_{name}", value)
        self.last_use = {name: index for index, op in enumerate(program.ops) for name in op.inputs}

    def forward(self, x: Tensor) -> Tensor:
        """The dequantized output ``[N, ...]`` of normalised images ``[N, ...]``: ``(integer - zero_point) * scale``."""
        output = self.program.output
        return (self.containers(x) - output.zero_point) * self.steps[-1]

    def integers(self, x: Tensor) -> Tensor:
        """The final container integers ``[N, ...]``, uint8."""
        return self.containers(x).to(torch.uint8)

    @torch.no_grad()
    def containers(self, x: Tensor) -> Tensor:
        """The final container integers ``[N, ...]``, held in fp32.

        Raises:
            InputError: ``x`` has another type or shape, or (looked at on a CPU only) holds NaN or infinities.
        """
        first = self.program.ops[0].output
        if x.ndim == 0 or tuple(x.shape[1:]) != first.shape or not x.is_floating_point():
            raise InputError(
                f"the network takes fp32 images [N, {', '.join(map(str, first.shape))}], given: {x.dtype} of shape "
                f"{list(x.shape)}."
            )
        if x.device.type == "cpu" and not bool(torch.isfinite(x).all()):  # another device would have to be waited for
            raise InputError("the images hold NaN or infinities; they have no integer. Look at what normalises them.")
        with torch.autocast(x.device.type, enabled=False):
            values = {first.name: self.start(x)}
            for index, op in enumerate(self.program.ops[1:], 1):
                given = [values[name] for name in op.inputs]
                values[op.output.name] = self.execute(index, op, given, len(x))
                for name in set(op.inputs):
                    if self.last_use[name] == index:
                        del values[name]
            return self.finish(values[self.program.output.name])

    def start(self, x: Tensor) -> Tensor:
        """The network's real input as container integers, in the form that operations take."""
        return arithmetic.to_integers(x.float(), self.steps[0], *_range(self.program.ops[0].output))

    def finish(self, last: Tensor) -> Tensor:
        """The last operation's result as container integers held in fp32."""
        return last

    def execute(self, index: int, op: p.Op, given: list[Tensor], count: int) -> Tensor:
        """One operation on ``count`` images: what it reads, in the order of its inputs, to what it makes."""
        return _EXECUTE[op.kind](self._context(index, op, count), op, given)

    def _context(self, index: int, op: p.Op, count: int) -> _Context:
        sources = [self.program.ops[self.places[name]].output for name in op.inputs]
        steps = [self.steps[self.places[name]] for name in op.inputs]
        return _Context(self, index, count, sources, steps)

    def extra_repr(self) -> str:
        """Input, output and the number of operations."""
        first, last = self.program.ops[0].output.shape, self.program.output.shape
        return f"{list(first)} -> {list(last)}, {len(self.program.ops)} operations, target={self.program.target!r}"


def _parts(op: p.Linear, program: Program) -> int | None:
    """How many parts of its input's channels a layer is summed in, each exact in fp32; ``None``: in float64, as one."""
    if not op.wide:
        return 1
    if op.multipliers is not None:
        return None
    source = program.tensor(op.inputs[0])
    largest = max(abs(source.low - source.zero_point), abs(source.high - source.zero_point))
    return wide.count_parts(torch.from_numpy(op.used).float(), largest, op.groups if isinstance(op, p.Conv) else 1)


def _arrays(op: p.Op, parts: int | None) -> dict[str, Tensor]:
    """The arrays of an operation as they are computed with: fp32, or float64 where its sums need that."""
    if isinstance(op, p.Linear):
        kind = torch.float64 if parts is None else torch.float32
        return {
            "weight": torch.from_numpy(op.used if op.multipliers is None else op.summed).to(kind),
            "scale": torch.tensor(op.weight_scale),
            "bias": torch.tensor(op.bias).float(),
        }
    names = ("values", "table", "gain", "shift")
    return {name: torch.tensor(np.asarray(getattr(op, name))).float() for name in names if hasattr(op, name)}


def _range(tensor: p.Tensor) -> tuple[float, int, int]:
    return float(tensor.zero_point), tensor.low, tensor.high


class _Context:
    """What an operation needs beside its integers: arrays, and the grids of what it reads and makes."""

    def __init__(self, network: IntegerNetwork, index: int, count: int, sources: list[p.Tensor], steps: list[Tensor]):
        self.network, self.index, self.count, self.sources, self.steps = network, index, count, sources, steps
        self.step = network.steps[index]

    def array(self, name: str) -> Tensor:
        """A buffer of the operation."""
        found: Tensor = getattr(self.network, f"op{self.index}_{name}")
        return found

    def centred(self, given: list[Tensor], place: int = 0) -> Tensor:
        """The integers minus their zero-point."""
        zero = self.sources[place].zero_point
        return given[place] - zero if zero else given[place]

    def real(self, given: list[Tensor], place: int = 0) -> Tensor:
        """What the integers stand for."""
        return self.centred(given, place) * self.steps[place]


Given = list[Tensor]


def _sums(at: _Context, op: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The exact sums of a layer's centred integers."""
    geometry: dict[str, Any] | None = None
    if isinstance(op, p.Conv):
        geometry = {name: getattr(op, name) for name in ("stride", "padding", "dilation", "groups")}
    parts = at.network.parts[at.index]
    if parts is not None and parts > 1:
        if x.device.type == "cpu":
            return wide.sum_in_parts(x, weight, parts, geometry)
        x, weight = x.double(), weight.double()
    return products.linear(x, weight) if geometry is None else products.conv2d(x, weight, **geometry)


def _layer(at: _Context, op: Any, given: Given) -> Tensor:
    weight = at.array("weight")
    x = at.centred(given).to(weight.dtype)
    shape: tuple[int, ...] = (1, -1, 1, 1) if isinstance(op, p.Conv) else (1,) * (x.ndim - 1) + (-1,)
    acc = _sums(at, op, x, weight)
    layer = arithmetic.IntegerLayer(weight, torch.empty(0), at.array("scale"), at.array("bias"))
    zero, low, high = _range(op.output)
    shortcut = (at.centred(given, 1), at.steps[1]) if len(given) == 2 else None
    return arithmetic.requantize(acc, layer, at.steps[0], at.step, zero, low, high, shape, shortcut)


def _add(at: _Context, op: Any, given: Given) -> Tensor:
    zeros = (float(at.sources[0].zero_point), float(at.sources[1].zero_point), float(op.output.zero_point))
    steps = (at.steps[0], at.steps[1], at.step)
    return arithmetic.add_integers(given[0], given[1], steps, zeros, op.output.low, op.output.high)


def _avg_pool(at: _Context, op: Any, given: Given) -> Tensor:
    x, (zero, low, high) = at.centred(given), _range(op.output)
    total = F.avg_pool2d(x, op.kernel, op.stride, op.padding, divisor_override=1)
    if not op.counted:
        count = F.avg_pool2d(torch.ones_like(x[:1]), op.kernel, op.stride, op.padding, divisor_override=1)
        return (total / count).div_(at.step / at.steps[0]).add_(zero).round_().clamp_(low, high)
    whole = tuple(op.kernel) == tuple(x.shape[2:]) and not any(op.padding)
    multiplier = arithmetic.pool_multiplier(at.steps[0], at.step, prod(op.kernel), whole)
    return (total * multiplier).round_().add_(zero).clamp_(low, high)


def _max_pool(at: _Context, op: Any, given: Given) -> Tensor:
    return F.max_pool2d(given[0], op.kernel, op.stride, op.padding)


def _reshape(at: _Context, op: Any, given: Given) -> Tensor:
    return given[0].reshape(len(given[0]), *op.output.shape)


def _slice(at: _Context, op: Any, given: Given) -> Tensor:
    parts = zip(op.start, op.step, op.output.shape, strict=True)
    return given[0][(slice(None), *(slice(a, a + s * (n - 1) + 1, s) for a, s, n in parts))]


def _pad(at: _Context, op: Any, given: Given) -> Tensor:
    edges = [edge for pair in zip(reversed(op.before), reversed(op.after), strict=True) for edge in pair]
    return F.pad(given[0], edges, value=float(at.sources[0].zero_point))


def _transpose(at: _Context, op: Any, given: Given) -> Tensor:
    return given[0].permute(0, *(place + 1 for place in op.order))


def _upsample(at: _Context, op: Any, given: Given) -> Tensor:
    return given[0].repeat_interleave(op.factor[0], 2).repeat_interleave(op.factor[1], 3)


def _same(at: _Context, op: Any, given: Given) -> Tensor:
    return given[0]


def _clip(at: _Context, op: Any, given: Given) -> Tensor:
    return given[0].clamp(op.output.low, op.output.high)


def _concat(at: _Context, op: Any, given: Given) -> Tensor:
    made, parts = op.output, []
    for place, (q, source) in enumerate(zip(given, at.sources, strict=True)):
        if (source.scale, source.zero_point) == (made.scale, made.zero_point):
            parts.append(q.clamp(made.low, made.high))
        else:
            parts.append(arithmetic.to_integers(at.real(given, place), at.step, *_range(made)))
    return torch.cat(parts, op.dim + 1)


def _constant(at: _Context, op: Any, given: Given) -> Tensor:
    return at.array("values").expand(at.count, *op.output.shape)


def _table(at: _Context, op: Any, given: Given) -> Tensor:
    return arithmetic.look_up(at.array("values"), given[0])


def _mul(at: _Context, op: Any, given: Given) -> Tensor:
    zero, low, high = _range(op.output)
    ratio = (at.steps[0] * at.steps[1]) / at.step
    product = at.centred(given, 0) * at.centred(given, 1)
    return product.mul_(ratio).add_(zero).round_().clamp_(low, high)


def _sub(at: _Context, op: Any, given: Given) -> Tensor:
    return arithmetic.to_integers(at.real(given, 0) - at.real(given, 1), at.step, *_range(op.output))


def _matmul(at: _Context, op: Any, given: Given) -> Tensor:
    reach = prod(max(x.high - x.zero_point, x.zero_point - x.low) for x in at.sources)
    kind = torch.float64 if reach * given[0].shape[-1] >= arithmetic.EXACT else torch.float32
    acc = products.matmul(at.centred(given, 0).to(kind), at.centred(given, 1).to(kind)).float()
    zero, low, high = _range(op.output)
    return acc.mul_((at.steps[0] * at.steps[1]) / at.step).round_().add_(zero).clamp_(low, high)


def _softmax(at: _Context, op: Any, given: Given) -> Tensor:
    x = given[0]
    seen = torch.ones(x.shape[-2:], device=x.device).tril() if op.causal else torch.ones((), device=x.device)
    q = x * seen
    weights = arithmetic.look_up(at.array("table"), q.amax(-1, keepdim=True) - q) * seen
    share = weights / weights.sum(-1, keepdim=True)
    return arithmetic.to_integers(share, at.step, *_range(op.output))


def _layer_norm(at: _Context, op: Any, given: Given) -> Tensor:
    q, dims = given[0].double(), tuple(dim + 1 for dim in op.dims)
    count, step = prod(q.shape[dim] for dim in dims), at.sources[0].scale
    total = q.sum(dims, keepdim=True)
    spread = count * (q * q).sum(dims, keepdim=True) - total * total
    root = torch.sqrt(spread + op.eps * (count * count) / (step * step))
    along = [-1 if dim == op.channel + 1 else 1 for dim in range(q.ndim)]
    normal = ((q * count - total) / root).float()
    real = normal * at.array("gain").reshape(along) + at.array("shift").reshape(along)
    return arithmetic.to_integers(real, at.step, *_range(op.output))


_EXECUTE: Mapping[str, Callable[[_Context, Any, Given], Tensor]] = {
    "conv": _layer, "linear": _layer, "add": _add, "avg_pool": _avg_pool, "max_pool": _max_pool, "reshape": _reshape,
    "slice": _slice, "pad": _pad, "transpose": _transpose, "upsample": _upsample, "scale": _same, "clip": _clip,
    "concat": _concat, "constant": _constant, "table": _table, "mul": _mul, "sub": _sub, "matmul": _matmul,
    "softmax": _softmax, "layer_norm": _layer_norm,
}  # fmt: skip
