"""Operations that move, cut, pad or repeat elements: they keep their input's grid, and run on its integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.nn import functional as F

from nasq.elastic.slicing import taken
from nasq.quant import program
from nasq.quant.producers import Producer
from nasq.quant.value import Grid, Value

__all__ = ["Pad", "Permute", "Scale", "Select", "Slice", "Upsample", "View", "cut", "permuted", "viewed"]

Pairs = Sequence[tuple[int, int]]


class Slice(nn.Module):
    """Takes a part of every dimension behind the batch.

    Args:
        path: Where it is in the network.
        attributes: Which part (:func:`nasq.elastic.slicing.slice_of`).
    """

    def __init__(self, path: str, attributes: Mapping[str, Any]) -> None:
        super().__init__()
        self.path = path
        self.attributes = {key: attributes[key] for key in ("slices", "part") if key in attributes}

    def forward(self, x: Value) -> Value:
        """``[N, ...]`` to a part of it."""
        found = taken(self.attributes, x.data.shape[1:])
        return cut(x, [(int(start), int(count), step) for start, count, step in found], self.path)


def cut(x: Value, parts: Sequence[tuple[int, int, int]], path: str) -> Value:
    """Takes ``count`` elements from ``start`` on in steps of ``step`` of every dimension; nothing where that is all."""
    shape = tuple(x.data.shape[1:])
    if shape == tuple(count for _, count, _ in parts):
        return x
    index = [slice(start, start + step * (count - 1) + 1, step) for start, count, step in parts]
    data = x.data[(slice(None), *index)].contiguous()
    if x.mode != "integer":
        return x.on(data, x.grid)
    assert x.grid is not None
    # A step is only meant where more than one element is taken.
    fields = {
        "start": tuple(start for start, _, _ in parts),
        "step": tuple(step if count > 1 else 1 for _, count, step in parts),
    }
    return Producer.record(x, data, x.grid, program.Slice, (x,), path, **fields)


def permuted(x: Value, dims: Sequence[int], path: str) -> Value:
    """The dimensions in another order, batch first and counted."""
    if list(dims) == sorted(dims):
        return x
    data = x.data.permute(*dims).contiguous()
    if x.mode != "integer":
        return x.on(data, x.grid)
    assert x.grid is not None
    return Producer.record(x, data, x.grid, program.Transpose, (x,), path, order=tuple(dim - 1 for dim in dims[1:]))


def viewed(x: Value, sizes: Sequence[int], path: str) -> Value:
    """The same numbers in another shape: ``sizes`` behind the batch, -1 for what is left, 0 for the input's own size."""
    own = [x.data.shape[place + 1] if size == 0 else size for place, size in enumerate(sizes)]
    data = x.data.reshape(x.data.shape[0], *own)
    if data.shape == x.data.shape:
        return x
    if x.mode != "integer":
        return x.on(data, x.grid)
    assert x.grid is not None
    return Producer.record(x, data, x.grid, program.Reshape, (x,), path)


class Permute(nn.Module):
    """Another order of the dimensions; ``dims`` counts the batch, which stays first."""

    def __init__(self, path: str, dims: Sequence[int]) -> None:
        super().__init__()
        self.path, self.dims = path, tuple(dims)

    def forward(self, x: Value) -> Value:
        """``[N, ...]`` in another order."""
        return permuted(x, self.dims, self.path)


class View(nn.Module):
    """Another shape.

    Args:
        path: Where it is in the network.
        sizes: As :func:`viewed` takes them, or
        layer: an elastic module that computes the shape: called with the tensor.
    """

    layer: nn.Module | None

    def __init__(self, path: str, sizes: Sequence[int], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.path, self.sizes = path, tuple(sizes)
        object.__setattr__(self, "layer", layer)

    def forward(self, x: Value) -> Value:
        """``[N, ...]`` to the same numbers in another shape."""
        sizes = self.sizes if self.layer is None else self.layer(x.data).shape[1:]
        return viewed(x, sizes, self.path)


class Select(nn.Module):
    """One element of a dimension, which is dropped.

    Args:
        path: Where it is in the network.
        dim: The dimension, batch counted.
        index: Which; negative ones count from the end.
    """

    def __init__(self, path: str, dim: int, index: int) -> None:
        super().__init__()
        self.path, self.dim, self.index = path, dim, index

    def forward(self, x: Value) -> Value:
        """``[N, ...]`` without one dimension."""
        shape = tuple(x.data.shape)
        parts = [(0, size, 1) for size in shape[1:]]
        parts[self.dim - 1] = (self.index % shape[self.dim], 1, 1)
        kept = [size for dim, size in enumerate(shape) if dim not in (0, self.dim)]
        return viewed(cut(x, parts, self.path), kept or (1,), self.path)


class Scale(nn.Module):
    """A product with a positive number: the same integers under another scale.

    Args:
        path: Where it is in the network.
        factor: The number, or
        layer: a module that multiplies by it.
    """

    layer: nn.Module | None

    def __init__(self, path: str, factor: float | None, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.path, self.factor = path, factor
        object.__setattr__(self, "layer", layer if factor is None else None)

    def forward(self, x: Value) -> Value:
        """The same shape."""
        factor = float(self.layer(x.data.new_ones(()))) if self.layer is not None else self.factor
        assert factor is not None
        grid = x.grid
        if grid is not None:
            grid = Grid((grid.step * factor).float(), grid.zero_point, grid.low, grid.high, grid.bits)
        if x.mode != "integer":
            return x.on(x.data * factor, grid)
        assert grid is not None
        return Producer.record(x, x.data, grid, program.Scale, (x,), self.path)


class Upsample(nn.Module):
    """Repeats rows and columns: nearest-neighbour interpolation by whole factors."""

    def __init__(self, path: str, factor: tuple[int, int]) -> None:
        super().__init__()
        self.path, self.factor = path, factor

    def forward(self, x: Value) -> Value:
        """``[N, C, H, W]`` to a larger map."""
        data = x.data.repeat_interleave(self.factor[0], 2).repeat_interleave(self.factor[1], 3)
        if x.mode != "integer":
            return x.on(data, x.grid)
        assert x.grid is not None
        return Producer.record(x, data, x.grid, program.Upsample, (x,), self.path, factor=self.factor)


class Pad(nn.Module):
    """Adds real zeros in front and behind; a negative amount takes elements away.

    Args:
        path: Where it is in the network.
        pads: ``(before, after)`` per dimension behind the batch, or
        layer: an elastic layer whose ``geometry()`` says how many channels to add in front and behind.
    """

    layer: nn.Module | None

    def __init__(self, path: str, pads: Pairs | None, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.path, self.pads = path, pads
        object.__setattr__(self, "layer", layer if pads is None else None)

    def _pads(self, rank: int) -> Pairs:
        if self.pads is not None:
            return self.pads
        assert self.layer is not None
        channels = cast(Any, self.layer).geometry()
        return [(int(channels[0]), int(channels[1])), *[(0, 0)] * (rank - 1)]

    def forward(self, x: Value) -> Value:
        """``[N, ...]`` to a larger tensor."""
        pads = self._pads(x.data.ndim - 1)
        kept = [
            (max(-a, 0), size + min(a, 0) + min(b, 0), 1) for size, (a, b) in zip(x.data.shape[1:], pads, strict=True)
        ]
        x = cut(x, kept, self.path)
        before, after = [max(a, 0) for a, _ in pads], [max(b, 0) for _, b in pads]
        if not any(before) and not any(after):
            return x
        amounts = [amount for pair in zip(reversed(before), reversed(after), strict=True) for amount in pair]
        if x.mode != "integer":
            return x.on(F.pad(x.data, amounts), x.grid)
        assert x.grid is not None
        data = F.pad(x.data, amounts, value=x.grid.fixed()[1])
        fields = {"before": tuple(before), "after": tuple(after)}
        return Producer.record(x, data, x.grid, program.Pad, (x,), self.path, **fields)
