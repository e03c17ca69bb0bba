"""What the operations of a traced network are: from modules and calls to the kinds that nasq knows by name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nasq.elastic.base import Container
from nasq.elastic.conv import Conv2d
from nasq.elastic.functions import function_of_call, function_of_module
from nasq.elastic.graph import Kind
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d
from nasq.elastic.pad import PadChannels
from nasq.elastic.resize import Resize
from nasq.elastic.slicing import pad_of, slice_of
from nasq.elastic.token_kinds import Batch, token_call, token_module

__all__ = ["Batch", "Named", "is_of", "is_of_timm", "kind_of_call", "kind_of_module"]

Named = tuple[Kind, dict[str, Any]]
"""A kind and the fixed numbers of the operation."""


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _max_pool(
    kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, **_: Any
) -> Named:
    if _pair(dilation) != (1, 1):
        return "other", {}
    kernel = _pair(kernel_size)
    window = {"kernel": kernel, "stride": _pair(stride or kernel), "padding": _pair(padding)}
    return "max_pool", window | ({"ceil": True} if ceil_mode else {})


def _avg_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Named:
    if divisor_override is not None:
        return "other", {}
    kernel = _pair(kernel_size)
    window: dict[str, Any] = {"kernel": kernel, "stride": _pair(stride or kernel)}
    if _pair(padding) != (0, 0):
        window |= {"padding": _pair(padding), "counted": bool(count_include_pad)}
    return "avg_pool", window | ({"ceil": True} if ceil_mode else {})


def _upsample(
    size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: Any = None, **rest: Any
) -> Named:
    if size is not None and mode == "bilinear" and not align_corners and not rest.get("antialias"):
        return "resize", {"size": _pair(size)}
    factors = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor, scale_factor)
    if size is not None or any(one is None or one < 1 or one != int(one) for one in factors):
        return "other", {}
    whole = {"factor": (int(factors[0]), int(factors[-1]))}
    if mode == "bilinear" and not align_corners and not rest.get("antialias"):
        return "resize", whole
    return ("upsample", whole) if mode == "nearest" else ("other", {})


def _global_pool(output_size: Any, **_: Any) -> Named:
    return ("avg_pool", {"kernel": None}) if output_size in (1, (1, 1), [1, 1]) else ("other", {})


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> Named:
    # Without training=self.training it drops in evaluation as well.
    return ("other", {}) if training else ("identity", {"p": p})


def _pad(pad: Any, ndim: int, mode: str = "constant", value: Any = None) -> Named:
    found = pad_of(pad, mode, value, ndim)
    return ("other", {}) if found is None else ("pad", found)


def _zero(**others: Any) -> Named:
    return ("other", {}) if others else ("zero", {})


def is_of(module: nn.Module, package: str, *names: str) -> bool:
    """Whether ``module`` is of a class of these names from ``package``, which is not imported for it."""
    kind = type(module)
    return kind.__name__ in names and kind.__module__.startswith(package)


def is_of_timm(module: nn.Module, *names: str) -> bool:
    """Whether ``module`` is one of timm's layers of these class names; timm itself is not imported for it."""
    return is_of(module, "timm.layers.", *names)


def kind_of_module(module: nn.Module) -> Named:
    """The kind of a layer or container."""
    if isinstance(module, Container):
        return "container", {}
    if isinstance(module, (Conv2d, nn.Conv2d)):
        return ("conv", {}) if getattr(module, "padding_mode", "zeros") == "zeros" else ("other", {})
    if isinstance(module, (Linear, nn.Linear)):
        return "linear", {}
    if isinstance(module, (BatchNorm2d, nn.BatchNorm2d)):
        return "norm", {}
    if isinstance(module, nn.ReLU6):
        return "relu6", {}
    if isinstance(module, nn.ReLU):
        return "relu", {}
    if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)) or is_of_timm(module, "DropPath"):
        return "identity", {}
    if is_of(module, "torchvision.ops.", "StochasticDepth"):
        return "identity", {}
    if isinstance(module, nn.MaxPool2d):
        return _max_pool(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    if isinstance(module, nn.AvgPool2d):
        return _avg_pool(
            module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad,
            module.divisor_override,
        )  # fmt: skip
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _global_pool(module.output_size)
    if isinstance(module, PadChannels):
        return "pad", {}
    if isinstance(module, (nn.ZeroPad2d, nn.ConstantPad2d)):
        return _pad(module.padding, 4, "constant", module.value)
    if isinstance(module, Resize):
        return "resize", {}
    if isinstance(module, nn.Upsample):
        return _upsample(module.size, module.scale_factor, module.mode)
    if isinstance(module, nn.GroupNorm):
        return ("group_norm", {}) if module.num_groups == 1 else ("other", {})
    if (of_elements := function_of_module(module)) is not None:
        return "unary", of_elements
    if isinstance(module, nn.Flatten):
        return ("reshape", {}) if (module.start_dim, module.end_dim) == (1, -1) else ("other", {})
    return token_module(module) or ("other", {})


_FUNCTIONS: dict[Any, Callable[..., Named] | Kind] = {
    torch.relu: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    torch.relu_: "relu",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.cat: "concat",
    torch.concat: "concat",
    F.dropout: _dropout,
    torch.zeros_like: _zero,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _global_pool,
    F.interpolate: _upsample,
    operator.sub: "sub",
    operator.isub: "sub",
    torch.sub: "sub",
    "sub": "sub",
    "sub_": "sub",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    "mul": "mul",
    "mul_": "mul",
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "add_": "add",
    "contiguous": "identity",
    "clone": "identity",
    torch.clone: "identity",
}


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_flatten(node: fx.Node, before: Any, after: Any) -> bool:
    """Whether a view, reshape or flatten keeps the batch and joins everything behind it."""
    name = _name(node)
    if name not in {"flatten", "view", "reshape"} or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if after.ndim != 2 or after.shape[0] != before.shape[0]:
        return False
    args = node.args[1:]
    sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
    first = sizes[0] if sizes else node.kwargs.get("start_dim")
    return bool(first == 1 if name == "flatten" else isinstance(first, Batch) or first == -1)


def _is_spatial_mean(node: fx.Node, before: Any) -> bool:
    if _name(node) != "mean" or not isinstance(before, Tensor) or before.ndim != 4:
        return False
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return isinstance(dims, (tuple, list)) and sorted(int(d) % 4 for d in dims if isinstance(d, int)) == [2, 3]


def _behind_batch(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else None


def _concat(node: fx.Node, after: Any) -> Named:
    """Joining on any dimension but the batch; ``dim`` counts from 0 behind it and is left out for channels."""
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if not isinstance(after, Tensor) or not isinstance(dim, int) or dim % after.ndim == 0:
        return "other", {}
    behind = dim % after.ndim - 1
    return "concat", {"dim": behind} if behind else {}


def _broadcasts(shapes: Sequence[tuple[int, ...] | None], after: tuple[int, ...]) -> bool:
    """Whether shapes of equal rank give ``after`` when dimensions of size 1 are repeated."""
    if len(shapes) != 2 or any(shape is None or len(shape) != len(after) for shape in shapes):
        return False
    return all(size in (1, made) for shape in shapes if shape for size, made in zip(shape, after, strict=True))


def kind_of_call(node: fx.Node, sources: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> Named:
    """The kind of a function or method call.

    Args:
        node: The call.
        sources: The nodes it reads, in order, repeats included.
        values: The value of every node in the example.
    """
    after = values[node]
    before = values[sources[0]] if sources else None
    if _is_flatten(node, before, after):
        return "reshape", {}
    if _is_spatial_mean(node, before):
        return "avg_pool", {"kernel": None, "squeeze": after.ndim == 2}
    if (sliced := slice_of(node, values)) is not None:
        return "slice", sliced
    if node.target is F.pad:
        given: dict[str, Any] = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
        return _pad(ndim=after.ndim, **given)
    if (of_tokens := token_call(node, sources, values)) is not None:
        return of_tokens
    if (of_elements := function_of_call(node)) is not None:
        return "unary", of_elements
    if node.target in {"float", "to", "type_as"} and before is not None and before.dtype == after.dtype:
        return "identity", {}
    rule = _FUNCTIONS.get(node.target)
    if rule is None:
        return "other", {}
    if rule in ("sub", "mul"):
        behind = [_behind_batch(values[x]) for x in sources]
        fits = _broadcasts(behind, tuple(after.shape[1:])) and (rule == "mul" or behind[0] == behind[1])
        return (rule, {}) if fits and "alpha" not in node.kwargs else ("other", {})
    if rule == "concat":
        return _concat(node, after)
    if rule == "add" and len(sources) == 1 and 0 in node.args[:2]:
        return "identity", {}  # a sum that was begun with 0
    if rule == "add":
        # A parameter has 1 where the others have the batch.
        fits = _broadcasts([_behind_batch(values[x]) for x in sources], tuple(after.shape[1:]))
        return ("add", {}) if fits and "alpha" not in node.kwargs else ("other", {})
    if isinstance(rule, str):
        return rule, {}
    return rule(*node.args[1:], **{key: value for key, value in node.kwargs.items() if key != "input"})
