"""Functions of every element alone: which modules and calls compute them, and how.

In a quantized network each of them is a table of 256 entries, so a new one is one line here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

__all__ = ["HALF_OPEN", "NEVER_NEGATIVE", "function_of_call", "function_of_module", "unary"]

Arguments = dict[str, Any]

_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "celu": F.celu,
    "elu": F.elu,
    "exp": torch.exp,
    "gelu": F.gelu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "abs": torch.abs,
    "square": torch.square,
    "offset": lambda x, number: x + number,
    "scaled": lambda x, number: x * number,
}

NEVER_NEGATIVE = frozenset({"abs", "exp", "hardsigmoid", "sigmoid", "softplus", "square"})
"""Functions whose values are never negative."""

HALF_OPEN = frozenset({"celu", "elu", "gelu", "hardswish", "leaky_relu", "mish", "selu", "silu"})
"""Functions that are nearly never negative: half of a symmetric grid would be empty."""

_MODULES: Mapping[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.CELU: ("celu", ("alpha",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.GELU: ("gelu", ("approximate",)),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.Mish: ("mish", ()),
    nn.SELU: ("selu", ()),
    nn.SiLU: ("silu", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.Tanh: ("tanh", ()),
}

_CALLS: Mapping[Any, str] = {
    **{function: name for name, function in _FUNCTIONS.items() if name not in {"offset", "scaled"}},
    F.sigmoid: "sigmoid", F.tanh: "tanh", F.leaky_relu_: "leaky_relu", F.elu_: "elu", F.hardtanh_: "hardtanh",
    torch.sigmoid_: "sigmoid", torch.tanh_: "tanh", "sigmoid": "sigmoid", "sigmoid_": "sigmoid", "tanh": "tanh",
    "tanh_": "tanh", "exp": "exp", "abs": "abs", "square": "square",
}  # fmt: skip

_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_DIFFERENCES = {operator.sub, operator.isub, torch.sub, "sub", "sub_"}


def unary(function: str, arguments: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """The function of a name, with its numbers filled in."""
    return lambda x: _FUNCTIONS[function](x, **arguments)


def function_of_module(module: nn.Module) -> Arguments | None:
    """``{"function": name, "arguments": {...}}``, or ``None`` where the module computes none of these."""
    found = _MODULES.get(type(module))
    if found is None:
        return None
    name, arguments = found
    return {"function": name, "arguments": {key: getattr(module, key) for key in arguments}}


def function_of_call(node: fx.Node) -> Arguments | None:
    """The same for a call of a function or method with one tensor, and for a sum of a tensor and a number."""
    if len(node.all_input_nodes) != 1 or node.args[:1] == () or not isinstance(node.args[0], fx.Node):
        return _offset(node)
    name = _CALLS.get(node.target)
    if name is None:
        return _offset(node)
    arguments = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    positional: dict[str, tuple[str, ...]] = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "celu": ("alpha",)}
    positional |= {"hardtanh": ("min_val", "max_val"), "softplus": ("beta", "threshold")}
    arguments |= dict(zip(positional.get(name, ()), node.args[1:], strict=False))
    return {"function": name, "arguments": arguments}


def _offset(node: fx.Node) -> Arguments | None:
    numbers = [one for one in node.args if isinstance(one, (int, float)) and not isinstance(one, bool)]
    if len(numbers) != 1 or len(node.args) != 2 or len(node.all_input_nodes) != 1 or node.kwargs:
        return None
    if node.target in _SUMS and numbers[0] != 0:
        return {"function": "offset", "arguments": {"number": float(numbers[0])}}
    if node.target in _DIFFERENCES and isinstance(node.args[0], fx.Node):
        return {"function": "offset", "arguments": {"number": -float(numbers[0])}}
    return None
