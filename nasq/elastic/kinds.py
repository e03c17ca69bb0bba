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
from nasq.elastic.graph import Kind
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d

__all__ = ["Batch", "Named", "kind_of_call", "kind_of_module"]

Named = tuple[Kind, dict[str, Any]]
"""A kind and the fixed numbers of the operation."""


class Batch(int):
    """The batch dimension of a shape."""


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _max_pool(
    kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, **_: Any
) -> Named:
    if _pair(dilation) != (1, 1) or ceil_mode:
        return "other", {}
    kernel = _pair(kernel_size)
    return "max_pool", {"kernel": kernel, "stride": _pair(stride or kernel), "padding": _pair(padding)}


def _avg_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Named:
    if _pair(padding) != (0, 0) or ceil_mode or divisor_override is not None:
        return "other", {}
    kernel = _pair(kernel_size)
    return "avg_pool", {"kernel": kernel, "stride": _pair(stride or kernel)}


def _global_pool(output_size: Any, **_: Any) -> Named:
    return ("avg_pool", {"kernel": None}) if output_size in (1, (1, 1), [1, 1]) else ("other", {})


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> Named:
    # Without training=self.training it drops in evaluation as well.
    return ("other", {}) if training else ("identity", {"p": p})


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
    if isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout2d)):
        return "identity", {}
    if isinstance(module, nn.MaxPool2d):
        return _max_pool(module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    if isinstance(module, nn.AvgPool2d):
        return _avg_pool(
            module.kernel_size, module.stride, module.padding, module.ceil_mode, True, module.divisor_override
        )
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return _global_pool(module.output_size)
    if isinstance(module, nn.Flatten):
        return ("reshape", {}) if (module.start_dim, module.end_dim) == (1, -1) else ("other", {})
    return "other", {}


_FUNCTIONS: dict[Any, Callable[..., Named] | Kind] = {
    torch.relu: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    torch.cat: "concat",
    torch.concat: "concat",
    F.dropout: _dropout,
    F.max_pool2d: _max_pool,
    torch.max_pool2d: _max_pool,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _global_pool,
    "relu": "relu",
    "relu_": "relu",
    "add": "add",
    "add_": "add",
    "contiguous": "identity",
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


def _is_channel_concat(node: fx.Node, after: Any) -> bool:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return isinstance(after, Tensor) and isinstance(dim, int) and dim % after.ndim == 1


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
    rule = _FUNCTIONS.get(node.target)
    if rule is None:
        return "other", {}
    if rule == "concat":
        return ("concat", {}) if _is_channel_concat(node, after) else ("other", {})
    if rule == "add":
        same = len(sources) == 2 and all(getattr(values[x], "shape", None) == after.shape for x in sources)
        return ("add", {}) if same and "alpha" not in node.kwargs else ("other", {})
    if isinstance(rule, str):
        return rule, {}
    return rule(*node.args[1:], **{key: value for key, value in node.kwargs.items() if key != "input"})
