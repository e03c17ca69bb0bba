"""A builder of programs with the operations of squeeze-excitation and transformers, and random nets made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nasq.quant import program as p
from nasq.quant.program import Program, Tensor
from tests.deploy.programs import Maker, Reals, images

FUNCTIONS: dict[str, Callable[[Reals], Reals]] = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "tanh": np.tanh,
    "leaky": lambda x: np.where(x < 0, 0.1 * x, x),
}


class TokenMaker(Maker):
    def slice(self, source: str, parts: Sequence[slice]) -> str:
        shape = self.shape(source)
        starts, stops, steps = zip(*(part.indices(size) for part, size in zip(parts, shape, strict=True)), strict=True)
        values = self.values[source][(slice(None), *parts)]
        assert all(stop > start for start, stop in zip(starts, stops, strict=True))
        output = self._like(source, "slice", values.shape[1:])
        step = tuple(step if size > 1 else 1 for step, size in zip(steps, values.shape[1:], strict=True))
        return self._keep(p.Slice((source,), output, output.name, starts, step), values, integers=True)

    def pad(self, source: str, before: Sequence[int], after: Sequence[int]) -> str:
        edges = ((0, 0), *zip(before, after, strict=True))
        values = np.pad(self.values[source], edges, constant_values=self.tensors[source].zero_point)
        output = self._like(source, "pad", values.shape[1:])
        return self._keep(p.Pad((source,), output, output.name, tuple(before), tuple(after)), values, integers=True)

    def transpose(self, source: str, order: Sequence[int]) -> str:
        values = self.values[source].transpose(0, *(place + 1 for place in order))
        output = self._like(source, "transpose", values.shape[1:])
        return self._keep(p.Transpose((source,), output, output.name, tuple(order)), values, integers=True)

    def upsample(self, source: str, factor: tuple[int, int]) -> str:
        values = self.values[source].repeat(factor[0], axis=2).repeat(factor[1], axis=3)
        output = self._like(source, "upsample", values.shape[1:])
        return self._keep(p.Upsample((source,), output, output.name, factor), values, integers=True)

    def scale(self, source: str, factor: float) -> str:
        base = self.tensors[source]
        step = float(np.float32(np.float32(base.scale) * np.float32(factor)))
        name = f"scale_{len(self.ops)}"
        output = Tensor(name, base.shape, step, base.zero_point, base.low, base.high, base.bits)
        return self._keep(p.Scale((source,), output, name), self.values[source], integers=True)

    def constant(self, shape: tuple[int, ...], bits: int = 8) -> str:
        real = np.broadcast_to(self.rng.normal(size=shape), (self.count, *shape))
        output = self._tensor("constant", real, "asymmetric", bits)
        values = np.clip(np.rint(real[0] / output.scale) + output.zero_point, output.low, output.high).astype(np.uint8)
        return self._keep(p.Constant((), output, output.name, values), real)

    def table(self, source: str, function: str, bits: int | None = None) -> str:
        base, real = self.tensors[source], FUNCTIONS[function](self.real(source))
        output = self._tensor("table", real, "asymmetric", bits)
        every = FUNCTIONS[function]((np.arange(256) - base.zero_point) * base.scale)
        values = np.clip(np.rint(every / output.scale) + output.zero_point, output.low, output.high).astype(np.uint8)
        return self._keep(p.Table((source,), output, output.name, values), real)

    def mul(self, first: str, second: str, bits: int | None = None, form: str | None = None) -> str:
        real = self.real(first) * self.real(second)
        output = self._tensor("mul", real, form, bits)
        return self._keep(p.Mul((first, second), output, output.name), real)

    def sub(self, first: str, second: str, bits: int | None = None) -> str:
        real = self.real(first) - self.real(second)
        output = self._tensor("sub", real, None, bits)
        return self._keep(p.Sub((first, second), output, output.name), real)

    def matmul(self, first: str, second: str, bits: int | None = None) -> str:
        real = self.real(first) @ self.real(second)
        output = self._tensor("matmul", real, ("signed", "asymmetric")[self.rng.integers(2)], bits)
        return self._keep(p.MatMul((first, second), output, output.name), real)

    def softmax(self, source: str, causal: bool = False, bits: int | None = None) -> str:
        real = self.real(source)
        if causal:
            real = np.where(np.tril(np.ones(real.shape[-2:])) == 0, -np.inf, real)
        weights = np.exp(real - real.max(-1, keepdims=True))
        real = weights / weights.sum(-1, keepdims=True)
        whole = 2.0 ** (24 - int(np.ceil(np.log2(real.shape[-1]))))
        table = np.rint(whole * np.exp(-self.tensors[source].scale * np.arange(256))).astype(np.int32)
        output = self._tensor("softmax", real, "unsigned", bits)
        return self._keep(p.Softmax((source,), output, output.name, table, causal=causal), real)

    def layer_norm(self, source: str, dims: tuple[int, ...], channel: int, bits: int | None = None) -> str:
        x, axes = self.real(source), tuple(dim + 1 for dim in dims)
        size = self.shape(source)[channel]
        gain, shift = (self.rng.normal(m, 0.5, size).astype(np.float32) for m in (1, 0))
        along = [-1 if dim == channel + 1 else 1 for dim in range(x.ndim)]
        normal = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
        real = normal * gain.reshape(along) + shift.reshape(along)
        output = self._tensor("layer_norm", real, None, bits)
        return self._keep(p.LayerNorm((source,), output, output.name, dims, channel, 1e-5, gain, shift), real)

    def tokens(self, source: str, out: int, bits: int | None = None, form: str | None = None) -> str:
        """A linear layer on the last of several dimensions."""
        fields = self._weights(source, (out, self.shape(source)[-1]), None, False)
        acc = (self.values[source] - self.tensors[source].zero_point) @ fields["weight"].astype(np.int64).T
        moved = np.moveaxis(acc, -1, 1)
        fields["bias"], fields["weight_scale"], unit = self._affine(source, moved)
        real = (acc + fields["bias"]) * unit
        output = self._tensor("tokens", real, form, bits)
        return self._keep(p.Linear((source,), output, output.name, **fields), real)

    def join(self, sources: Sequence[str], dim: int) -> str:
        real = np.concatenate([self.real(source) for source in sources], axis=dim + 1)
        output = self._tensor("join", real, "asymmetric", 8)
        return self._keep(p.Concat(tuple(sources), output, output.name, dim=dim), real)

    def pool(
        self, source: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], counted: bool
    ) -> str:
        edges = ((0, 0), (0, 0), *((pad, pad) for pad in padding))
        x, ones = np.pad(self.real(source), edges), np.pad(np.ones_like(self.real(source)), edges)
        total, count = (
            np.lib.stride_tricks.sliding_window_view(v, kernel, axis=(2, 3))[:, :, :: stride[0], :: stride[1]].sum(
                (-1, -2)
            )
            for v in (x, ones)
        )
        real = total / (np.prod(kernel) if counted else count)
        output = self._tensor("pool", real, None, None)
        op = p.AvgPool((source,), output, output.name, kernel, stride, padding=padding, counted=counted)
        return self._keep(op, real)


def cnn_program(seed: int, bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8)) -> Program:
    """Squeeze-excitation with tables, padded pools, slices, pads, a channel shuffle, upsampling, a difference."""
    maker = TokenMaker(np.random.default_rng(seed), bits)
    last = maker.conv(maker.input((3, 12, 12)), 8, 3, padding=(1, 1), bits=8, form="signed")
    last = maker.table(last, "hardswish", 8)
    squeezed = maker.avg_pool(last, (12, 12), (1, 1), bits=8)
    gate = maker.table(maker.conv(maker.conv(squeezed, 4, 1, form="unsigned"), 8, 1, form="signed"), "sigmoid")
    last = maker.add(maker.mul(last, gate), maker.conv(squeezed, 8, 1, form="signed"), bits=8)
    pooled = maker.pool(last, (3, 3), (1, 1), (1, 1), counted=False)
    last = maker.sub(pooled, last, 8)
    halves = [maker.slice(last, (slice(a, a + 4), slice(None), slice(None))) for a in (0, 4)]
    last = maker.concat([maker.conv(halves[0], 4, 3, padding=(1, 1)), maker.table(halves[1], "leaky")], bits=8)
    last = maker.reshape(maker.transpose(maker.reshape(last, (2, 4, 12, 12)), (1, 0, 2, 3)), (8, 12, 12))
    small = maker.pad(maker.slice(last, (slice(None), slice(None, None, 2), slice(1, None, 2))), (4, 0, 0), (4, 1, 0))
    last = maker.pool(small, (3, 3), (2, 2), (1, 1), counted=True)
    last = maker.upsample(maker.conv(last, 8, 1), (2, 3))
    return maker.classifier(last, 10)


def vit_program(seed: int, bits: Sequence[int] = (2, 3, 4, 5, 6, 7, 8), causal: bool = False) -> Program:
    """A small vision transformer of one block: class token, positions, attention of two heads, MLP."""
    maker = TokenMaker(np.random.default_rng(seed), bits)
    patches = maker.conv(maker.input((3, 12, 12)), 16, 4, stride=(4, 4), bits=8, form="signed")
    x = maker.transpose(maker.reshape(patches, (16, 9)), (1, 0))
    x = maker.add(maker.join([maker.constant((1, 16)), x], 0), maker.constant((10, 16)), bits=8)
    normal = maker.layer_norm(x, (1,), 1, 8)
    q, k, v = (maker.transpose(maker.reshape(maker.tokens(normal, 16, 8), (10, 2, 8)), (1, 0, 2)) for _ in range(3))
    scores = maker.matmul(maker.scale(q, 8**-0.5), maker.transpose(k, (0, 2, 1)), 8)
    mixed = maker.matmul(maker.softmax(scores, causal), v)
    mixed = maker.reshape(maker.transpose(mixed, (1, 0, 2)), (10, 16))
    x = maker.add(x, maker.tokens(mixed, 16, form="signed"), bits=8)
    hidden = maker.table(maker.tokens(maker.layer_norm(x, (1,), 1), 24, form="signed"), "hardswish")
    x = maker.add(x, maker.tokens(hidden, 16, form="signed"), bits=8)
    x = maker.layer_norm(x, (0, 1), 1)
    first = maker.reshape(maker.slice(x, (slice(0, 1), slice(None))), (16,))
    maker.linear(first, 10, weight_bits=8, bits=8, form="signed")
    return maker.program()


__all__ = ["TokenMaker", "cnn_program", "images", "vit_program"]
