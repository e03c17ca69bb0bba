"""Calls that are recorded as others: other spellings of an operation, and operations that are several simpler ones.

Every function here takes what the call was given, runs on proxies while a network is traced, and returns what is recorded
in its place; ``NotImplemented`` records the call as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

__all__ = ["CALL_PARTS", "drop_expansions", "keep_rows", "pixel_shuffle", "shuffle_channels", "space_to_channels"]


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (min, max)):
        return NotImplemented
    if min == 0 and max in (None, 6):
        return F.relu(x) if max is None else F.relu6(x)
    return F.hardtanh(x, -math.inf if min is None else float(min), math.inf if max is None else float(max))


def _minus(x: Any) -> Any:
    return x * -1.0


def _is_proxy(x: Any) -> bool:
    return isinstance(x, fx.Proxy)


def _power(x: Any, exponent: Any) -> Any:
    return torch.square(x) if _is_proxy(x) and exponent == 2 else NotImplemented


def _is_constant(x: Any) -> bool:
    """Whether a proxy follows from the network's own tensors alone."""
    if not _is_proxy(x):
        return False
    open_nodes, seen = [x.node], set[fx.Node]()
    while open_nodes:
        node = open_nodes.pop()
        if node in seen:
            continue
        if node.op == "placeholder" or (node.op != "get_attr" and not node.all_input_nodes):
            return False
        seen.add(node)
        open_nodes.extend(node.all_input_nodes)
    return True


def _tracked(beside: Any, x: Any) -> Any:
    """A tensor of the network's own as a proxy, so that what follows from it is computed anew where it is read."""
    if not isinstance(x, Tensor) or not _is_proxy(beside):
        return x
    return beside.tracer.proxy(beside.tracer.create_arg(x))


def _difference(x: Any, other: Any, **more: Any) -> Any:
    """What is not a difference of two tensors of equal shapes is a sum with the negative."""
    x, other = _tracked(other, x), _tracked(x, other)
    if more or not _is_proxy(other) or (_is_constant(x) and _is_constant(other)):
        return NotImplemented
    if isinstance(x, (int, float)):
        return other * -1.0 + x
    if not _is_proxy(x) or tuple(x.shape[1:]) == tuple(other.shape[1:]):
        return NotImplemented
    return x + (torch.neg(other) if _is_constant(other) else other * -1.0)


def _reversed_difference(x: Any, other: Any, **more: Any) -> Any:
    return NotImplemented if more else other - x


def _quotient(x: Any, other: Any, **more: Any) -> Any:
    """Division by a tensor that is the same for every image is a product."""
    other = _tracked(x, other)
    if more or not _is_proxy(x) or not _is_constant(other) or _is_constant(x):
        return NotImplemented
    return x * torch.reciprocal(other)


def _gated(x: Any, dim: int = -1) -> Any:
    value, gate = x.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _average_to(x: Any, output_size: Any) -> Any:
    """An adaptive average pool whose windows are all equal is an average pool."""
    wanted, (height, width) = _pair(output_size), x.shape[-2:]
    rows, columns = height if wanted[0] is None else wanted[0], width if wanted[1] is None else wanted[1]
    if (rows, columns) == (1, 1) or height % rows or width % columns:
        return NotImplemented
    window = (height // rows, width // columns)
    return x if window == (1, 1) else F.avg_pool2d(x, window, window)


def _maximum_to(x: Any, output_size: Any, return_indices: bool = False) -> Any:
    wanted, (height, width) = _pair(output_size), x.shape[-2:]
    rows, columns = height if wanted[0] is None else wanted[0], width if wanted[1] is None else wanted[1]
    if return_indices or height % rows or width % columns:
        return NotImplemented
    window = (height // rows, width // columns)
    return F.max_pool2d(x, window, window)


def _maximum_over(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
    """The maximum over rows and columns is a max pool."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    if x.ndim != 4 or sorted(one % 4 for one in dims) != [2, 3]:
        return NotImplemented
    pooled = _maximum_to(x, 1)
    return pooled if keepdim else torch.flatten(pooled, 1)


def _interpolated(
    x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None, **more: Any
) -> Any:
    """By whole factors where it can be, so that it goes with the size of its input; bilinear to a size otherwise."""
    if any(more.values()) or align_corners or x.ndim != 4 or mode not in {"nearest", "bilinear"}:
        return NotImplemented
    sides = x.shape[-2:]
    if size is not None:
        wanted = [int(one) for one in _pair(size)]
    else:
        scaled = [side * factor for side, factor in zip(sides, _pair(scale_factor), strict=True)]
        if any(side != int(side) for side in scaled):
            return NotImplemented
        wanted = [int(side) for side in scaled]
    if wanted == list(sides):
        return x
    given: dict[str, Any] = {} if mode == "nearest" else {"mode": "bilinear", "align_corners": False}
    if not any(one % side for one, side in zip(wanted, sides, strict=True)):
        factors = tuple(float(one // side) for one, side in zip(wanted, sides, strict=True))
        return NotImplemented if scale_factor is not None else F.interpolate(x, scale_factor=factors, **given)
    return NotImplemented if size is not None else F.interpolate(x, size=tuple(wanted), **given)


def _pair(value: Any) -> tuple[Any, Any]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def pixel_shuffle(x: Any, upscale_factor: int) -> Any:
    """``[N, C r r, H, W]`` to ``[N, C, H r, W r]``."""
    batch, _, height, width = x.shape
    r = upscale_factor
    apart = x.reshape(batch, -1, r, r, height, width).permute(0, 1, 4, 2, 5, 3)
    return apart.reshape(batch, -1, height * r, width * r)


def space_to_channels(x: Any, downscale_factor: int) -> Any:
    """``[N, C, H r, W r]`` to ``[N, C r r, H, W]``."""
    batch, _, height, width = x.shape
    r = downscale_factor
    apart = x.reshape(batch, -1, height // r, r, width // r, r).permute(0, 1, 3, 5, 2, 4)
    return apart.reshape(batch, -1, height // r, width // r)


def shuffle_channels(x: Any, groups: int) -> Any:
    """Takes one channel of every group after the other."""
    batch, _, height, width = x.shape
    return x.reshape(batch, groups, -1, height, width).transpose(1, 2).reshape(batch, -1, height, width)


CALL_PARTS: Mapping[Any, Callable[..., Any]] = {
    **dict.fromkeys((torch.clamp, torch.clip, "clamp", "clamp_", "clip"), _clamp),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), lambda x: NotImplemented if _is_constant(x) else _minus(x)),
    **dict.fromkeys((operator.pow, torch.pow, "pow"), _power),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), _difference),
    torch.rsub: _reversed_difference,
    **dict.fromkeys((operator.truediv, torch.div, "div"), _quotient),
    F.glu: _gated,
    F.adaptive_avg_pool2d: _average_to,
    F.adaptive_max_pool2d: _maximum_to,
    **dict.fromkeys((torch.amax, "amax"), _maximum_over),
    F.interpolate: _interpolated,
    F.pixel_shuffle: pixel_shuffle,
    F.pixel_unshuffle: space_to_channels,
    F.channel_shuffle: shuffle_channels,
}


def keep_rows(
    graph: fx.Graph, values: dict[fx.Node, Any], makers: dict[fx.Node, str], of: Callable[[fx.Node], bool]
) -> None:
    """Keeps ``[N, C, 1, L]`` between layers of one-dimensional networks, which see it as ``[N, C, L]`` otherwise.

    ``squeeze(2)`` is moved behind what works on every element alone, and is left out in front of ``unsqueeze(2)``, so that a
    layer meets the norm and the activation that follow it.

    Args:
        graph: Of torch.fx; changed in place.
        values, makers: The value and the maker of every node; extended.
        of: Whether a node works on every element alone.
    """
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not _takes_row(source, "squeeze") or values[source].ndim != 3:
            continue
        whole = source.args[0]
        assert isinstance(whole, fx.Node)
        if _takes_row(node, "unsqueeze"):
            node.replace_all_uses_with(whole)
            graph.erase_node(node)
        elif of(node):
            node.replace_input_with(source, whole)
            with graph.inserting_after(node):
                flat = graph.call_method("squeeze", (node, 2))
            node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
            values[flat], makers[flat] = values[node], makers[node]
            values[node] = values[node].unsqueeze(2)


def _takes_row(node: fx.Node, method: str) -> bool:
    return node.op == "call_method" and node.target == method and node.args[1:] == (2,)


_BROADCASTING = {operator.mul, operator.imul, torch.mul, "mul", operator.add, operator.iadd, torch.add, "add"}


def drop_expansions(graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    """Takes ``expand`` and ``expand_as`` out where sums and products alone read them, which repeat by themselves.

    Args:
        graph: Of torch.fx; changed in place.
        values: The value of every node.
    """
    for node in list(graph.nodes):
        if node.target not in {"expand", "expand_as"} or not node.users:
            continue
        source, made = node.args[0], values[node]
        if not isinstance(source, fx.Node) or not isinstance(values.get(source), Tensor):
            continue
        same = values[source].shape[1:] == made.shape[1:]
        if same or values[source].ndim != made.ndim or not all(_repeats(user, node, values) for user in node.users):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)


def _repeats(user: fx.Node, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether ``user`` gives the same without the repetition: its other side has the whole shape."""
    others: Sequence[fx.Node] = [one for one in user.all_input_nodes if one is not node]
    return user.target in _BROADCASTING and any(values[one].shape == values[user].shape for one in others)
