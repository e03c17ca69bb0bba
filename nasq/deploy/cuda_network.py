"""A program on a CUDA device: int8 tensors from end to end, every layer on a kernel of :mod:`nasq.cuda`.

A tensor with container integers ``q`` is held as int8 ``q - offset``: the offset is the zero-point where that fits int8,
else 128. What has no kernel runs as in :class:`~nasq.deploy.integer_network.IntegerNetwork`, on integers held in fp32, and
the layer's :class:`~nasq.deploy.cuda_plan.Plan` says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nasq.cuda import nibbles, support
from nasq.deploy.cuda_plan import Plan, plans_of
from nasq.deploy.integer_network import IntegerNetwork
from nasq.errors import TargetError
from nasq.quant import arithmetic
from nasq.quant import program as p
from nasq.quant.operations import STAYS
from nasq.quant.program import Program

__all__ = ["CudaNetwork"]

_MIDDLE = 128
_THIN = 64  # most rows that the kernel for few rows takes


class CudaNetwork(IntegerNetwork):
    """Executes a program with int8 tensors; equal to :class:`nasq.deploy.reference.Reference`.

    Layers with weights of at most 4 bits are kept twice, as bytes and packed two to a byte: up to 64 rows the packed form
    is read.

    Args:
        program: A valid program.
        device: Where it runs; ``.to()`` must not move it later, since what runs was chosen for the device.

    Attributes:
        plans: One per operation, in order.

    Raises:
        TargetError: ``device`` is a CUDA device and torch sees none.
    """

    def __init__(self, program: Program, device: torch.device | str = "cuda") -> None:
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise TargetError(
                "the runtime 'nasq-cuda' needs a CUDA device, and torch sees none. Check the driver (nvidia-smi) and that "
                "torch was installed with CUDA, or load the bundle without a runtime."
            )
        super().__init__(program)
        self.without = support.why_not(device)
        self.offsets = _offsets(program)
        self.plans = plans_of(program, _KERNELS, self.without)
        for index, (op, plan) in enumerate(zip(program.ops, self.plans, strict=True)):
            for name, value in self._prepare(op, plan).items():
                self.register_buffer(f"cuda{index}_{name}", value)
            if plan.kernel != "float":
                for name in [name for name in self._buffers if name.startswith(f"op{index}_")]:
                    delattr(self, name)
        self.to(device)

    def counts(self) -> dict[str, int]:
        """How many operations run on each kernel."""
        return dict(Counter(plan.kernel for plan in self.plans))

    def _made(self, name: str) -> p.Tensor:
        return self.program.ops[self.places[name]].output

    # -- what it needs ------------------------------------------------------------------------------------------------

    def _prepare(self, op: p.Op, plan: Plan) -> dict[str, Tensor]:
        made = op.output
        if isinstance(op, p.Constant):
            return {"values": torch.from_numpy(op.values.astype(np.int16) - self.offsets[made.name]).to(torch.int8)}
        if plan.kernel in ("float", "int8"):
            return {}
        sources = [self._made(name) for name in op.inputs]
        if isinstance(op, p.Linear):
            return self._prepare_layer(op, plan, sources[0])
        if isinstance(op, p.Add):
            return {"factors": _add_factors(sources, made)}
        if isinstance(op, p.Table):
            at = np.clip(np.arange(256) - _MIDDLE + self.offsets[op.inputs[0]], 0, 255)
            return {"values": torch.from_numpy(op.values[at].astype(np.int16) - self.offsets[made.name]).to(torch.int8)}
        if isinstance(op, p.MatMul):
            ratio = torch.tensor(sources[0].scale) * torch.tensor(sources[1].scale) / torch.tensor(made.scale)
            return {"scale": ratio.expand(made.shape[-1]).contiguous()}
        if isinstance(op, p.Softmax):
            return {"table": torch.from_numpy(op.table.copy())}
        assert isinstance(op, p.LayerNorm)
        epsilon = op.eps * made.shape[-1] ** 2 / (sources[0].scale * sources[0].scale)
        gain, shift = torch.from_numpy(op.gain.copy()), torch.from_numpy(op.shift.copy())
        return {"gain": gain, "shift": shift, "epsilon": torch.tensor([epsilon], dtype=torch.float64)}

    def _prepare_layer(self, op: p.Linear, plan: Plan, source: p.Tensor) -> dict[str, Tensor]:
        used = op.used
        apart = self.offsets[source.name] - source.zero_point
        bias = op.bias.astype(np.int64) + apart * used.reshape(len(used), -1).sum(1)
        step_in, step_out = torch.tensor(source.scale), torch.tensor(op.output.scale)
        small = torch.from_numpy(used.astype(np.int8))
        found = {
            "bias": torch.from_numpy(bias.astype(np.int32)),
            "scale": (step_in * torch.from_numpy(op.weight_scale.copy())) / step_out,
            "weight": small,
        }
        if plan.kernel == "conv":
            found["weight"] = small.permute(0, 2, 3, 1).contiguous()
        elif plan.kernel == "depthwise":
            found["weight"] = small[:, 0].permute(1, 2, 0).contiguous()
        elif plan.kernel == "linear w4":
            found["packed"] = nibbles.pack_w4(torch.from_numpy(op.weight.copy()))
            found["shift"] = torch.from_numpy(op.shift.astype(np.int32))
        elif plan.kernel == "linear":
            found["shift"] = torch.zeros(len(used), dtype=torch.int32)
        return found

    def own(self, index: int, name: str) -> Tensor:
        """An array prepared for operation ``index``."""
        found: Tensor = getattr(self, f"cuda{index}_{name}")
        return found

    # -- execution ----------------------------------------------------------------------------------------------------

    def start(self, x: Tensor) -> Tensor:
        """The network's real input as int8."""
        made = self.program.ops[0].output
        zero = float(made.zero_point)
        q = arithmetic.to_integers(x.float(), self.steps[0], zero, made.low, made.high)
        return self._stored(q, made.name)

    def finish(self, stored: Tensor) -> Tensor:
        """The output's container integers, fp32."""
        return stored.float() + self.offsets[self.program.output.name]

    def _stored(self, q: Tensor, name: str) -> Tensor:
        stored = (q - self.offsets[name]).to(torch.int8)
        return stored.contiguous(memory_format=torch.channels_last) if stored.ndim == 4 else stored

    def execute(self, index: int, op: p.Op, given: list[Tensor], count: int) -> Tensor:
        """One operation on int8 tensors; equal to what the base class computes in fp32."""
        plan = self.plans[index]
        if isinstance(op, p.Constant):
            return self.own(index, "values").expand(count, *op.output.shape)
        if plan.kernel == "int8":
            return self._move(index, op, given, count)
        if plan.kernel == "_int_mm":
            return self._int_mm(index, op, given[0])
        if plan.kernel != "float":
            made: Tensor = _KERNELS.get(op.kind, _layer)(self, index, op, given)
            return made
        floats = [x.float() + self.offsets[name] for x, name in zip(given, op.inputs, strict=True)]
        return self._stored(super().execute(index, op, floats, count), op.output.name)

    def _move(self, index: int, op: p.Op, given: list[Tensor], count: int) -> Tensor:
        """Operations on the integers themselves, whose output keeps the offset of their input."""
        offset = self.offsets[op.output.name]
        if isinstance(op, p.Clip):
            # A range wider than int8 holds clips nothing there.
            return given[0].clamp(max(op.output.low - offset, -128), min(op.output.high - offset, 127))
        if isinstance(op, p.Pad):
            edges = [edge for pair in zip(reversed(op.before), reversed(op.after), strict=True) for edge in pair]
            return F.pad(given[0], edges, value=op.output.zero_point - offset)
        if isinstance(op, p.MaxPool):  # fp16 holds these integers, int8 has no pooling
            return F.max_pool2d(given[0].half(), op.kernel, op.stride, op.padding).to(torch.int8)
        return super().execute(index, op, given, count)

    def _int_mm(self, index: int, op: p.Op, x: Tensor) -> Tensor:
        """A linear layer with torch's own int8 product, which takes at least 17 rows: fewer are padded."""
        weight = self.own(index, "weight")
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, max(0, 32 - len(rows))))
        total: Tensor = torch._int_mm(padded, weight.t())[: len(rows)] + self.own(index, "bias")
        made, zero = op.output, op.output.zero_point
        steps = total.float().mul_(self.own(index, "scale")).round_().clamp_(made.low - zero, made.high - zero)
        stored = (steps + (zero - self.offsets[made.name])).to(torch.int8)
        return stored.reshape(*x.shape[:-1], len(weight))


def _offsets(program: Program) -> dict[str, int]:
    """What is subtracted from each tensor's container integers so that they fit int8."""
    found: dict[str, int] = {}
    for op in program.ops:
        made = op.output
        if isinstance(op, (*STAYS, p.Scale)):
            found[made.name] = found[op.inputs[0]]
        else:
            fit = made.low - made.zero_point >= -128 and made.high - made.zero_point <= 127
            found[made.name] = made.zero_point if fit else _MIDDLE
    return found


def _add_factors(sources: list[p.Tensor], made: p.Tensor) -> Tensor:
    """``r_a``, ``r_b`` and ``f`` of a sum, fp32; ``f`` as :func:`nasq.quant.arithmetic.add_integers` rounds it."""
    one = torch.tensor(made.scale)
    r_a, r_b = (torch.tensor(source.scale) / one for source in sources)
    z_a, z_b, z_y = (torch.tensor(float(tensor.zero_point)) for tensor in (*sources, made))
    fixed = z_y - (r_a.double() * z_a.double() + (r_b * z_b).double()).float()
    return torch.stack([r_a, r_b, fixed])


def _bounds(network: CudaNetwork, op: p.Op) -> tuple[int, int, int]:
    """Low and high minus the zero-point, and the zero-point minus the offset."""
    made = op.output
    zero = made.zero_point
    return made.low - zero, made.high - zero, zero - network.offsets[made.name]


def _layer(network: CudaNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    from nasq.cuda import ops

    weight, bias = network.own(index, "weight"), network.own(index, "bias")
    epilogue = ops.Epilogue(network.own(index, "scale"), *_bounds(network, op))
    x, kernel = given[0], network.plans[index].kernel
    if isinstance(op, p.Conv):
        pad = network._made(op.inputs[0]).zero_point - network.offsets[op.inputs[0]]
        pairs: dict[str, Any] = {"stride": op.stride, "padding": op.padding, "dilation": op.dilation, "pad": pad}
        if kernel == "depthwise":
            return ops.depthwise(x, weight, bias, epilogue, **pairs)
        return ops.conv2d(x, weight, bias, epilogue, groups=op.groups, **pairs)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= _THIN:
        packed = kernel == "linear w4"
        shift = network.own(index, "shift")
        made = ops.thin_gemm(
            rows, network.own(index, "packed") if packed else weight, shift, bias, epilogue, packed=packed
        )
    else:
        made = ops.gemm(rows[None], weight[None], bias, epilogue)
    return made.reshape(*x.shape[:-1], len(weight))


def _add(network: CudaNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    from nasq.cuda import ops

    names = (*op.inputs, op.output.name)
    offsets = (network.offsets[names[0]], network.offsets[names[1]], network.offsets[names[2]])
    return ops.add(given[0], given[1], network.own(index, "factors"), offsets, op.output.low, op.output.high)


def _matmul(network: CudaNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    from nasq.cuda import ops

    a, b = given[0], given[1].transpose(-1, -2)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    extra = [network.offsets[name] - network._made(name).zero_point for name in op.inputs]
    epilogue = ops.Epilogue(network.own(index, "scale"), *_bounds(network, op))
    made = ops.gemm(a, b, None, epilogue, (extra[0], extra[1]))
    return made.reshape(*batch, *made.shape[-2:])


def _table(network: CudaNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    from nasq.cuda import token_ops

    return token_ops.table(given[0], network.own(index, "values"))


def _softmax(network: CudaNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    from nasq.cuda import token_ops

    bounds = _bounds(network, op)
    return token_ops.softmax(given[0], network.own(index, "table"), op.output.scale, bounds, op.causal)


def _layer_norm(network: CudaNetwork, index: int, op: Any, given: list[Tensor]) -> Tensor:
    from nasq.cuda import token_ops

    arrays = [network.own(index, name) for name in ("gain", "shift", "epsilon")]
    offset = network.offsets[op.inputs[0]]
    return token_ops.layer_norm(
        given[0], arrays[0], arrays[1], arrays[2], offset, op.output.scale, _bounds(network, op)
    )


_KERNELS: Mapping[str, Any] = {
    "add": _add, "matmul": _matmul, "table": _table, "softmax": _softmax, "layer_norm": _layer_norm,
}  # fmt: skip
