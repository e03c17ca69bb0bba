"""Slices, splits and padding: which part of each dimension an operation takes, for one size or for an array of sizes."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx

__all__ = ["is_split", "pad_of", "slice_of", "taken"]

_SPLITS = frozenset({"chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "split_with_sizes"})


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_split(node: fx.Node, value: Any) -> bool:
    """Whether a traced call cuts a tensor into a tuple of parts: it is no operation, taking one of the parts is."""
    return isinstance(value, (tuple, list)) and _name(node) in _SPLITS


def slice_of(node: fx.Node, values: Mapping[fx.Node, Any]) -> dict[str, Any] | None:
    """What ``x[...]`` takes behind the batch dimension, or ``None`` where it is no plain slice.

    Returns:
        ``{"slices": ((start, stop, step), ...)}``, one entry per dimension behind the batch, as Python counts them, or
        ``{"part": (dim, index, parts)}`` for a part of a split: ``parts`` is the number of chunks, or a tuple of sizes;
        ``dim`` counts from 0 behind the batch.
    """
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    source, index = node.args[0], node.args[1]
    before = values[source]
    if is_split(source, before):
        return _part(source, index, values)
    if not isinstance(before, Tensor) or before.ndim < 2:
        return None
    taken = _whole_index(index, before.ndim)
    if taken is None or taken[0] != slice(None):
        return None
    slices = tuple((one.start, one.stop, one.step or 1) for one in taken[1:])
    if any(step < 1 or not all(bound is None or isinstance(bound, int) for bound in ends) for *ends, step in slices):
        return None
    return {"slices": slices}


def _whole_index(index: Any, ndim: int) -> list[slice] | None:
    """The index as one slice per dimension; ``None`` where it holds anything else."""
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [item for item in items if not isinstance(item, (Tensor, fx.Node))]:
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        items[place : place + 1] = [slice(None)] * (ndim - len(items) + 1)
    items += [slice(None)] * (ndim - len(items))
    if len(items) != ndim or not all(isinstance(item, slice) for item in items):
        return None
    return items


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _part(node: fx.Node, index: Any, values: Mapping[fx.Node, Any]) -> dict[str, Any] | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, parts = values[source], values[node]
    dim = _argument(node, 2, "dim", 0)
    if (
        not isinstance(before, Tensor)
        or not isinstance(dim, int)
        or dim % before.ndim == 0
        or not isinstance(index, int)
    ):
        return None
    chunked = _name(node) in {"chunk", "unsafe_chunk"}
    how: Any = len(parts) if chunked else tuple(int(part.shape[dim]) for part in parts)
    return {"part": (dim % before.ndim - 1, index % len(parts), how)}


def pad_of(pad: Any, mode: str, value: Any, ndim: int) -> dict[str, Any] | None:
    """``{"pads": ((before, after), ...)}`` per dimension behind the batch; ``None`` for anything but zeros there.

    Args:
        pad: As ``torch.nn.functional.pad`` takes it: pairs from the last dimension on.
        mode, value: Its other arguments.
        ndim: Of the padded tensor, batch included.
    """
    if mode != "constant" or value not in (None, 0) or not all(isinstance(size, int) for size in pad):
        return None
    pairs = [(int(pad[i]), int(pad[i + 1])) for i in range(0, len(pad), 2)][::-1]
    if len(pairs) > ndim - 1:
        return None
    return {"pads": ((0, 0),) * (ndim - 1 - len(pairs)) + tuple(pairs)}


def taken(attributes: Mapping[str, Any], sizes: Sequence[Any]) -> list[tuple[Any, Any, int]]:
    """``(start, count, step)`` per dimension of what a slice takes.

    Args:
        attributes: What :func:`slice_of` found.
        sizes: Of the dimensions behind the batch: ints, or int64 arrays of equal length.
    """
    if "part" in attributes:
        dim, index, how = attributes["part"]
        whole = [(0 * size, size, 1) for size in sizes]
        whole[dim] = _bounds_of_part(sizes[dim], index, how)
        return whole
    return [_bounds(size, *one) for size, one in zip(sizes, attributes["slices"], strict=True)]


def _bounds_of_part(size: Any, index: int, how: int | tuple[int, ...]) -> tuple[Any, Any, int]:
    if isinstance(how, int):  # torch makes chunks of the rounded-up size; the last may be smaller
        each = -(-size // how)
        return index * each, np.minimum(each, np.maximum(size - index * each, 0)), 1
    return sum(how[:index]) + 0 * size, how[index] + 0 * size, 1


def _bounds(size: Any, start: int | None, stop: int | None, step: int) -> tuple[Any, Any, int]:
    first, end = _place(size, 0 if start is None else start), size if stop is None else _place(size, stop)
    return first, np.maximum(-(-(end - first) // step), 0), step


def _place(size: Any, bound: int) -> Any:
    """A bound as Python reads it: negative ones count from the end, and none leaves the dimension."""
    return np.maximum(size + bound, 0) if bound < 0 else np.minimum(0 * size + bound, size)
