"""Operations that are recorded as several simpler ones, so that every user of a graph needs to know fewer kinds.

The functions here run while a network is traced, on proxies: what they compute is what is recorded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nasq.elastic.call_parts import CALL_PARTS, pixel_shuffle, shuffle_channels, space_to_channels
from nasq.elastic.equal_layers import BatchNorm
from nasq.elastic.kinds import is_of, is_of_timm, kind_of_module

__all__ = ["function_parts", "is_known_leaf", "module_parts", "select_before_permuting"]

Call = Callable[..., Any]

_LEAVES = ("Linear", "DropPath", "LayerNorm", "GroupNorm1")


_INHERITED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)


def is_known_leaf(module: nn.Module) -> bool:
    """Whether a layer computes, in evaluation, what the class of torch's that it inherits from computes.

    So do some of timm's and torchvision's, and all whose class leaves the forward as it is.
    """
    if is_of_timm(module, *_LEAVES) or is_of(module, "torchvision.ops.", "StochasticDepth"):
        return True
    if module._forward_pre_hooks or module._forward_hooks:
        return False
    base = next((kind for kind in _INHERITED if isinstance(module, kind)), None)
    return base is not None and all(
        getattr(type(module), name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward")
    )


def _norm_act(record: Call, module: nn.Module, x: Any) -> Any:
    """A BatchNorm that holds its activation: the norm is recorded, then what it holds, in order."""
    x = record(x)
    for child in module.children():
        x = child(x)
    return x


def _norm_of_channels(record: Call, module: nn.Module, x: Any) -> Any:
    """A layer norm over the channels of ``[N, C, H, W]``: over the last dimension of its permutation."""
    return record(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _softmax(record: Call, module: nn.Module, x: Any) -> Any:
    assert isinstance(module, nn.Softmax)
    return x.softmax(dim=module.dim)


def _flatten(record: Call, module: nn.Module, x: Any) -> Any:
    """What joins everything behind the batch, or the batch itself, stays a layer; the others are views."""
    assert isinstance(module, nn.Flatten)
    first, last = module.start_dim, module.end_dim
    return record(x) if (first, last) == (1, -1) or first % x.ndim == 0 else x.flatten(first, last)


def _unflatten(record: Call, module: nn.Module, x: Any) -> Any:
    """What takes the last dimension apart is a view."""
    assert isinstance(module, nn.Unflatten)
    dim = module.dim
    return x.unflatten(dim, tuple(module.unflattened_size)) if dim in (-1, x.ndim - 1) else record(x)


def _prelu(record: Call, module: nn.Module, x: Any) -> Any:
    """``max(x, 0) + slope min(x, 0)``, with a slope that is trained."""
    assert isinstance(module, nn.PReLU)
    slope = module.weight.reshape(1, -1, *[1] * (x.ndim - 2))
    return F.relu(x) + F.hardtanh(x, -math.inf, 0.0) * slope


def _called(function: Callable[..., Any], *names: str) -> Callable[[Call, nn.Module, Any], Any]:
    """A layer that is the call of a function with its own attributes, which the tracer may know in parts."""
    return lambda record, module, x: function(x, *(getattr(module, name) for name in names))


def _upsample(record: Call, module: nn.Module, x: Any) -> Any:
    assert isinstance(module, nn.Upsample)
    return F.interpolate(x, module.size, module.scale_factor, module.mode, module.align_corners)


def _norm(record: Call, module: nn.Module, x: Any) -> Any:
    """Of features behind a linear layer, which it becomes one operation with, or of a map."""
    if x.ndim == 2 and not _is_linear(x.node, x.tracer.root):
        return record(x[:, :, None, None]).flatten(1)
    return record(x.unsqueeze(2)).squeeze(2) if x.ndim == 3 else record(x)


def _is_linear(node: fx.Node, root: nn.Module) -> bool:
    return node.op == "call_module" and kind_of_module(root.get_submodule(str(node.target)))[0] == "linear"


def _row(layer: Callable[..., Any], *names: str) -> Callable[[Call, nn.Module, Any], Any]:
    """A one-dimensional pool is that of a map of one row."""

    def record_row(record: Call, module: nn.Module, x: Any) -> Any:
        given = {name: getattr(module, name) for name in names}
        pairs = {name: _beside(name, value) if name in _SIDES else value for name, value in given.items()}
        return layer(x.unsqueeze(2), **pairs).squeeze(2)

    return record_row


_SIDES = {"kernel_size", "stride", "padding", "dilation", "output_size"}


def _beside(name: str, value: Any) -> tuple[int, int]:
    """A number along the row, and what leaves the other side as it is."""
    along = int(value[0] if isinstance(value, (tuple, list)) else value)
    return (0 if name == "padding" else 1), along


_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")

_MODULES: dict[type[nn.Module], Callable[[Call, nn.Module, Any], Any]] = {
    BatchNorm: _norm,
    nn.MaxPool1d: _row(F.max_pool2d, *_MAX_POOL),
    nn.AvgPool1d: _row(F.avg_pool2d, *_AVG_POOL),
    nn.AdaptiveAvgPool1d: _row(F.adaptive_avg_pool2d, "output_size"),
    nn.AdaptiveMaxPool1d: _row(F.adaptive_max_pool2d, "output_size"),
    nn.Flatten: _flatten,
    nn.Unflatten: _unflatten,
    nn.PReLU: _prelu,
    nn.PixelShuffle: _called(pixel_shuffle, "upscale_factor"),
    nn.PixelUnshuffle: _called(space_to_channels, "downscale_factor"),
    nn.ChannelShuffle: _called(shuffle_channels, "groups"),
    nn.AdaptiveMaxPool2d: _called(F.adaptive_max_pool2d, "output_size", "return_indices"),
    nn.GLU: _called(F.glu, "dim"),
}


def _pool(record: Call, module: nn.Module, x: Any) -> Any:
    """An average over the whole map stays a layer."""
    assert isinstance(module, nn.AdaptiveAvgPool2d)
    whole = module.output_size in (1, (1, 1), [1, 1])
    return record(x) if whole else F.adaptive_avg_pool2d(x, module.output_size)


def module_parts(module: nn.Module) -> Callable[[Call, nn.Module, Any], Any] | None:
    """How a call of ``module`` is recorded, or ``None`` where nothing is special about it.

    The result is called with a function that records the module itself, without what its class adds to the class of
    torch's it inherits from, with the module, and with its input.
    """
    if is_of_timm(module, "BatchNormAct2d"):
        return _norm_act
    if type(module) is nn.Softmax and module.dim is not None:
        return _softmax
    if type(module) is nn.AdaptiveAvgPool2d:
        return _pool
    if type(module) is nn.Upsample and (module.mode, module.size is None) in {("bilinear", True), ("nearest", False)}:
        return _upsample
    of_channels = is_of_timm(module, "LayerNorm2d") or is_of(module, "torchvision.models.", "LayerNorm2d")
    return _norm_of_channels if of_channels else _MODULES.get(type(module))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Any:
    """Scaled dot-product attention: ``softmax(query key^T scale + mask) value``."""
    scale = more.pop("scale", None)
    if is_causal or dropout_p or any(more.values()):
        raise ValueError("attention that is causal, grouped or has dropout is not known; write it as matrix products")
    logits = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1) @ value


def _addcmul(a: Any, b: Any, c: Any) -> Any:
    made = b * c
    whole = tuple(made.shape[1:])
    # What is added to all images alike is given the size of one: it is a parameter then, and no broadcasting is left.
    return (a if tuple(a.shape[1:]) == whole else a.expand(1, *whole)) + made


def _like(x: Any, other: Any) -> Any:
    return x.reshape(other.shape)


def _unbind(x: Any, dim: int = 0) -> Any:
    dim = dim % x.ndim
    return tuple(x[(*[slice(None)] * dim, index)] for index in range(x.shape[dim]))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    torch.addcmul: _addcmul,
    torch.unbind: _unbind,
    "addcmul": _addcmul,
    "reshape_as": _like,
    "view_as": _like,
    "unbind": _unbind,
    **CALL_PARTS,
}


def function_parts(target: Any) -> Callable[..., Any] | None:
    """How a call of a function, or of a tensor's method of a name, is recorded; ``None``: as it is.

    The result takes what the call was given, and may return ``NotImplemented``: as it is.
    """
    return _FUNCTIONS.get(target)


def _permuted(node: fx.Node, value: Any) -> tuple[int, ...]:
    """The dimensions of a permutation that puts another dimension than the batch first; empty where it is none."""
    if node.target not in {"permute", torch.permute} or not isinstance(value, Tensor):
        return ()
    rest = node.args[1:]
    dims = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    plain = tuple(dim % value.ndim for dim in dims if isinstance(dim, int))
    return plain if len(plain) == value.ndim and plain[0] else ()


def _place(node: fx.Node) -> int | None:
    """The index that ``x[index]`` takes of the first dimension; ``None`` where it is something else."""
    if node.target is not operator.getitem:
        return None
    index = node.args[1]
    index = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    return index if type(index) is int else None


def select_before_permuting(graph: fx.Graph, values: dict[fx.Node, Any], makers: dict[fx.Node, str]) -> None:
    """Rewrites ``x.permute(2, 0, ...)[i]`` as ``x[:, :, i].permute(...)``, so that the batch stays in front.

    That is how attention takes query, key and value out of one linear layer's output.

    Args:
        graph: Of torch.fx; changed in place.
        values, makers: The value and the maker of every node; extended.
    """
    for node in list(graph.nodes):
        dims = _permuted(node, values.get(node))
        users = list(node.users)
        if not dims or not all(_place(user) is not None for user in users):
            continue
        source, first = node.args[0], dims[0]
        assert isinstance(source, fx.Node)
        rest = tuple(dim - (dim > first) for dim in dims[1:])
        for user in users:
            index = (*[slice(None)] * first, _place(user))
            with graph.inserting_before(user):
                chosen = graph.call_function(operator.getitem, (source, index))
                turned = graph.call_method("permute", (chosen, *rest))
            values[chosen] = values[source][index]
            values[turned] = values[user]
            makers[chosen] = makers[turned] = makers[user]
            user.replace_all_uses_with(turned)
            graph.erase_node(user)
        graph.erase_node(node)
