"""Producers of transformers: matrix products, softmax, normalisation, constants and means over tokens."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.cuda import products
from nasq.elastic.base import ElasticModule
from nasq.quant import arithmetic, program
from nasq.quant.arithmetic import EXACT
from nasq.quant.combining import AvgPoolProducer, Quantizer
from nasq.quant.moving import permuted, viewed
from nasq.quant.producers import Producer
from nasq.quant.value import Value

__all__ = [
    "ConstantProducer",
    "LayerNormProducer",
    "MatMulProducer",
    "MeanProducer",
    "RelativePositionProducer",
    "SoftmaxProducer",
]


class MatMulProducer(Producer):
    """The matrix product of two quantized tensors."""

    def forward(self, a: Value, b: Value) -> Value:
        """``[N, ..., rows, inner]`` and ``[N, ..., inner, columns]`` to ``[N, ..., rows, columns]``."""
        if a.mode != "integer":
            return self.finish(a.data @ b.data, a)
        assert a.grid is not None and b.grid is not None
        grid = self.output_grid()
        reach = [max(x.high - x.fixed()[1], x.fixed()[1] - x.low) for x in (a.grid, b.grid)]
        kind = torch.float64 if reach[0] * reach[1] * a.data.shape[-1] >= EXACT else torch.float32
        accumulator = products.matmul(a.centred().to(kind), b.centred().to(kind)).float()
        steps = accumulator.mul_((a.grid.step * b.grid.step) / grid.step).round_().add_(grid.zero_point)
        return self.record(a, steps.clamp_(grid.low, grid.high), grid, program.MatMul, (a, b), self.path)


class SoftmaxProducer(Producer):
    """Softmax over the last dimension, on exponentials that are whole numbers, so that their sum is exact.

    Args:
        path: Where it is in the network.
        quantizer: Of the tensor it makes, which is never negative.
        causal: Whether a row sees only the columns up to its own.
    """

    def __init__(self, path: str, quantizer: Quantizer, causal: bool) -> None:
        super().__init__(path, quantizer, "none")
        self.causal = causal

    def forward(self, x: Value) -> Value:
        """``[N, ..., rows, columns]``, unchanged in shape."""
        if x.mode == "integer":
            return self._integer(x)
        logits = x.data
        if self.causal:
            logits = logits.masked_fill(self._seen(x.data) == 0, -torch.inf)
        return self.finish(logits.softmax(-1), x)

    @staticmethod
    def _seen(x: Tensor) -> Tensor:
        return torch.ones(x.shape[-2:], device=x.device).tril()

    def _integer(self, x: Value) -> Value:
        assert x.grid is not None
        grid, step = self.output_grid(), x.grid.fixed()[0]
        whole = 2.0 ** (24 - ceil(log2(x.data.shape[-1])))
        table = torch.round(whole * torch.exp(-step * torch.arange(256, dtype=torch.float64))).float().to(x.data.device)
        seen = self._seen(x.data) if self.causal else torch.ones((), device=x.data.device)
        q = x.data * seen
        weights = arithmetic.look_up(table, q.amax(-1, keepdim=True) - q) * seen
        share = weights / weights.sum(-1, keepdim=True)
        integers = arithmetic.to_integers(share, grid.step, grid.zero_point, grid.low, grid.high)
        if x.recorder is None:
            return x.on(integers, grid)
        stored = table.cpu().numpy().astype(np.int32)
        return self.record(x, integers, grid, program.Softmax, (x,), self.path, table=stored, causal=self.causal)


class LayerNormProducer(Producer):
    """Layer normalisation, or group normalisation with one group: sums of integers, then float64, then fp32.

    Args:
        path: Where it is in the network.
        quantizer: Of the tensor it makes.
        norm: A layer norm over the last dimension, elastic or plain, or a ``GroupNorm`` of one group.
    """

    norm: Any

    def __init__(self, path: str, quantizer: Quantizer, norm: nn.Module) -> None:
        super().__init__(path, quantizer, "none")
        # A reference, not a registered submodule: the layer lives where the network put it.
        object.__setattr__(self, "norm", norm)

    def forward(self, x: Value) -> Value:
        """The same shape."""
        if x.mode == "integer":
            return self._integer(x)
        gain, shift = self._affine(x.data)
        if isinstance(self.norm, nn.GroupNorm):
            return self.finish(F.group_norm(x.data, 1, gain, shift, self.norm.eps), x)
        return self.finish(F.layer_norm(x.data, x.data.shape[-1:], gain, shift, self.norm.eps), x)

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        size = x.shape[1 if isinstance(self.norm, nn.GroupNorm) else -1]
        elastic = isinstance(self.norm, ElasticModule)
        gain, shift = (
            (self.norm.active_weight(), self.norm.active_bias()) if elastic else (self.norm.weight, self.norm.bias)
        )
        return x.new_ones(size) if gain is None else gain, x.new_zeros(size) if shift is None else shift

    def _integer(self, x: Value) -> Value:
        assert x.grid is not None
        grid, last = self.output_grid(), x.data.ndim - 1
        group = isinstance(self.norm, nn.GroupNorm)
        dims, channel = (tuple(range(1, last + 1)), 1) if group else ((last,), last)
        gain, shift = (parameter.detach().float() for parameter in self._affine(x.data))
        count, step = prod(x.data.shape[dim] for dim in dims), x.grid.fixed()[0]
        q, eps = x.data.double(), float(self.norm.eps)
        total = q.sum(dims, keepdim=True)
        spread = count * (q * q).sum(dims, keepdim=True) - total * total
        root = torch.sqrt(spread + eps * (count * count) / (step * step))
        normal = ((q * count - total) / root).float()
        along = [-1 if dim == channel else 1 for dim in range(x.data.ndim)]
        real = normal * gain.reshape(along) + shift.reshape(along)
        integers = arithmetic.to_integers(real, grid.step, grid.zero_point, grid.low, grid.high)
        if x.recorder is None:
            return x.on(integers, grid)
        fields = {
            "dims": tuple(dim - 1 for dim in dims), "channel": channel - 1, "eps": eps,
            "gain": gain.cpu().numpy(), "shift": shift.cpu().numpy(),
        }  # fmt: skip
        return self.record(x, integers, grid, program.LayerNorm, (x,), self.path, **fields)


class ConstantProducer(Producer):
    """A parameter that is no layer's weight: a class token, a table of positions.

    Args:
        path: Where it is in the network.
        quantizer: Of the parameter.
        source: The parameter ``[1, ...]``, or a module that gives it when it is called.
    """

    source: Callable[[], Tensor] | Tensor

    def __init__(self, path: str, quantizer: Quantizer, source: Callable[[], Tensor] | Tensor) -> None:
        super().__init__(path, quantizer, "none")
        object.__setattr__(self, "source", source)

    def forward(self, context: Value) -> Value:
        """The parameter on its grid, in the mode of ``context``."""
        value = self.source if isinstance(self.source, Tensor) else self.source()
        if context.mode != "integer":
            return self.finish(value, context)
        grid = self.output_grid()
        integers = arithmetic.to_integers(value.detach().float(), grid.step, grid.zero_point, grid.low, grid.high)
        values = integers[0].cpu().numpy().astype(np.uint8)
        return self.record(context, integers, grid, program.Constant, (), self.path, values=values)


class RelativePositionProducer(ConstantProducer):
    """The product of every token's row with that token's own matrix of relative positions, which is a constant.

    Args:
        path: Where it is in the network.
        quantizer: Of the matrices.
        source: The relative positions, elastic or extracted.
        product: Multiplies.
    """

    source: Any

    def __init__(self, path: str, quantizer: Quantizer, source: nn.Module, product: MatMulProducer) -> None:
        super().__init__(path, quantizer, _Matrices(source))
        self.product = product

    def forward(self, x: Value) -> Value:
        """``[N, H, T, inner]`` to ``[N, H, T, outer]``."""
        matrices = super().forward(x)
        made = self.product(permuted(x, (0, 2, 1, 3), self.path), matrices)
        return permuted(made, (0, 2, 1, 3), self.path)


class _Matrices:
    """The active matrices ``[1, T, inner, outer]`` of relative positions."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    def __call__(self) -> Tensor:
        layer = self.layer
        elastic = isinstance(layer, ElasticModule)
        vertical, horizontal = layer.active_tables() if elastic else (layer.vertical, layer.horizontal)
        relative = vertical[layer.rows] + horizontal[layer.columns]
        found: Tensor = (relative.transpose(1, 2) if layer.role == "key" else relative)[None]
        return found


class MeanProducer(AvgPoolProducer):
    """The mean over some dimensions: an average pool over the whole of a map that holds just them.

    Args:
        path: Where it is in the network.
        quantizer: Of the tensor it makes.
        dims: Which, batch counted.
        keepdim: Whether they stay, with size 1.
    """

    def __init__(self, path: str, quantizer: Quantizer, dims: tuple[int, ...], keepdim: bool) -> None:
        super().__init__(path, quantizer, "none", None, False)
        self.dims, self.keepdim = dims, keepdim

    def forward(self, x: Value) -> Value:
        """``[N, ...]`` to the same without ``dims``."""
        shape = tuple(x.data.shape)
        rest = [dim for dim in range(1, len(shape)) if dim not in self.dims]
        over = prod(shape[dim] for dim in self.dims)
        flat = viewed(permuted(x, (0, *rest, *self.dims), self.path), (-1 if rest else 1, over, 1), self.path)
        kept = [
            1 if dim in self.dims else size for dim, size in enumerate(shape) if self.keepdim or dim not in self.dims
        ]
        return viewed(super().forward(flat), tuple(kept[1:]) or (1,), self.path)
