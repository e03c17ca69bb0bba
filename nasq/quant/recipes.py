"""How each kind of operation gets its quantized form: one recipe per kind, for :mod:`nasq.quant.builder`.

A recipe takes the builder and a node, gives the builder the module that computes the node in every mode, and returns the
last node that this module stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from nasq.elastic.functions import HALF_OPEN, NEVER_NEGATIVE
from nasq.elastic.graph import Node
from nasq.errors import InputError
from nasq.quant.advice import hint
from nasq.quant.combining import AddProducer, AvgPoolProducer, ConcatProducer
from nasq.quant.elementwise import MulProducer, SubProducer, TableProducer
from nasq.quant.moving import Pad, Permute, Scale, Select, Slice, Upsample, View
from nasq.quant.passing import Clip, Flatten, MaxPool, Same, Zero
from nasq.quant.producers import Activation
from nasq.quant.quantizers import ActivationQuantizer
from nasq.quant.resizing import Resize
from nasq.quant.tokens import (
    ConstantProducer,
    LayerNormProducer,
    MatMulProducer,
    MeanProducer,
    RelativePositionProducer,
    SoftmaxProducer,
)
from nasq.space import Choice

if TYPE_CHECKING:
    from nasq.quant.builder import Builder

__all__ = ["RECIPES", "unsupported"]

Recipe = Callable[["Builder", Node], Node]
RECIPES: dict[str, Recipe] = {}
"""The recipe of every kind but layers and containers."""


def _of(*kinds: str) -> Callable[[Recipe], Recipe]:
    def register(recipe: Recipe) -> Recipe:
        RECIPES.update(dict.fromkeys(kinds, recipe))
        return recipe

    return register


def unsupported(node: Node, why: str = "", others: Sequence[Node] = ()) -> InputError:
    """The error for an operation without an integer form; names it, and ``others`` that have none, with their paths."""
    why = why or hint(node)
    named = list(dict.fromkeys(map(_named, others)))
    more = "".join(f", nor has {one}" for one in named[:5]) + (f", nor have {len(named) - 5} more" if named[5:] else "")
    return InputError(
        f"{_named(node)} has no integer form yet{f': {why}' if why else ''}{more}. Supported: Conv2d, Linear, "
        "BatchNorm2d, LayerNorm, sums, differences, products and concatenations of tensors, max and average pooling, "
        "nearest upsampling, slices, zero padding, reshapes and permutations, softmax, matrix products, ReLU, SiLU, GELU "
        "and other functions of single elements, Dropout, OneOf, Repeat. Replace it, or leave the part out of quantization."
    )


def _named(node: Node) -> str:
    what = type(node.module).__name__ if node.module is not None else node.attributes["call"]
    return f"{what} at {node.path!r}"


# -- what makes a new quantized tensor


@_of("add", "concat")
def _combine(builder: Builder, node: Node) -> Node:
    if node in builder.open:
        return builder.layer_and_sum(node)
    activation, end = builder.activation_behind(node)
    quantizer = builder.quantizer(node, end, activation, _all_nonnegative(builder, node))
    if node.kind == "add":
        return builder.put(node, AddProducer(node.path, quantizer, activation), end)
    return builder.put(node, ConcatProducer(node.path, quantizer, activation, node.attributes.get("dim", 0)), end)


@_of("avg_pool")
def _avg_pool(builder: Builder, node: Node) -> Node:
    _whole_steps(node)
    activation, end = builder.activation_behind(node)
    quantizer = builder.quantizer(node, end, activation, _all_nonnegative(builder, node))
    given = node.attributes
    window = None if given["kernel"] is None else (given["kernel"], given["stride"])
    padding, counted = given.get("padding", (0, 0)), given.get("counted", True)
    pool = AvgPoolProducer(
        node.path, quantizer, activation, window, bool(given.get("squeeze")), padding=padding, counted=counted
    )
    return builder.put(node, pool, end)


@_of("mean")
def _mean(builder: Builder, node: Node) -> Node:
    quantizer = builder.quantizer(node, node, "none", _all_nonnegative(builder, node))
    return builder.put(node, MeanProducer(node.path, quantizer, node.attributes["dims"], node.attributes["keepdim"]))


@_of("unary")
def _unary(builder: Builder, node: Node) -> Node:
    function, arguments = node.attributes["function"], node.attributes["arguments"]
    return _table(builder, node, function, arguments)


def _table(builder: Builder, node: Node, function: str, arguments: dict[str, Any]) -> Node:
    nonnegative = function in NEVER_NEGATIVE
    plan = builder.plan
    symmetry = plan.activation_symmetry
    if function in HALF_OPEN and not plan.target.allow("activation_symmetry", ("asymmetric",))[1]:
        symmetry = ("asymmetric",)
    quantizer = builder.quantizer(node, node, "none", nonnegative, symmetry)
    return builder.put(node, TableProducer(node.path, quantizer, function, arguments))


@_of("mul", "sub")
def _pairwise(builder: Builder, node: Node) -> Node:
    if node.kind == "sub":
        return builder.put(node, SubProducer(node.path, builder.quantizer(node, node, "none", False), "none"))
    activation, end = builder.activation_behind(node)
    quantizer = builder.quantizer(node, end, activation, _all_nonnegative(builder, node))
    return builder.put(node, MulProducer(node.path, quantizer, activation), end)


@_of("matmul")
def _matmul(builder: Builder, node: Node) -> Node:
    quantizer = builder.quantizer(node, node, "none", _all_nonnegative(builder, node))
    return builder.put(node, MatMulProducer(node.path, quantizer, "none"))


@_of("mask")
def _mask(builder: Builder, node: Node) -> Node:
    """A causal mask is part of the softmax behind it."""
    if any(user.kind != "softmax" for user in builder.graph.users(node)) or node is builder.graph.output:
        raise unsupported(node, "a mask has to stand in front of a softmax")
    builder.place[node] = builder.place[node.inputs[0]]
    return node


@_of("softmax")
def _softmax(builder: Builder, node: Node) -> Node:
    if node.attributes["dim"] != len(node.shape):
        raise unsupported(node, "it is not over the last dimension")
    quantizer = builder.quantizer(node, node, "none", True)
    return builder.put(node, SoftmaxProducer(node.path, quantizer, node.inputs[0].kind == "mask"))


@_of("layer_norm", "group_norm")
def _layer_norm(builder: Builder, node: Node) -> Node:
    quantizer = builder.quantizer(node, node, "none", False)
    return builder.put(node, LayerNormProducer(node.path, quantizer, cast(nn.Module, node.module)))


@_of("parameter")
def _parameter(builder: Builder, node: Node) -> Node:
    source = node.module if node.module is not None else node.attributes["parameter"]
    producer = ConstantProducer(node.path, _constant_quantizer(builder, node.path), source)
    return builder.put(node, producer, inputs=builder.graph.inputs[:1])


@_of("relative_position")
def _relative_position(builder: Builder, node: Node) -> Node:
    product = MatMulProducer(node.path, builder.quantizer(node, node, "none", False), "none")
    matrices = _constant_quantizer(builder, f"{node.path}.matrices")
    producer = RelativePositionProducer(node.path, matrices, cast(nn.Module, node.module), product)
    return builder.put(node, producer)


def _constant_quantizer(builder: Builder, path: str) -> ActivationQuantizer:
    """What never changes is stored with 8 bits: no choice."""
    symmetry = builder.plan.activation_symmetry
    options = symmetry.options if isinstance(symmetry, Choice) else symmetry
    return ActivationQuantizer(path, True, (8,), [str(options[0])])


# -- what keeps its input's grid


@_of("max_pool")
def _max_pool(builder: Builder, node: Node) -> Node:
    _whole_steps(node)
    return _passing(
        builder, node, MaxPool(node.path, *(node.attributes[key] for key in ("kernel", "stride", "padding")))
    )


@_of("reshape")
def _reshape(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, Flatten(node.path))


@_of("identity", "expand")
def _identity(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, Same(node.module, node.attributes.get("p", 0.0)))


@_of("relu", "relu6")
def _clip(builder: Builder, node: Node) -> Node:
    builder.nonnegative.add(node)
    return _passing(builder, node, Clip(node.path, cast(Activation, node.kind)))


@_of("zero")
def _zero(builder: Builder, node: Node) -> Node:
    builder.nonnegative.add(node)
    return _passing(builder, node, Zero(node.path))


@_of("slice")
def _slice(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, Slice(node.path, node.attributes))


@_of("pad")
def _pad(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, Pad(node.path, node.attributes.get("pads"), node.module))


@_of("permute")
def _permute(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, Permute(node.path, node.attributes["dims"]))


@_of("view")
def _view(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, View(node.path, node.attributes["sizes"]))


@_of("split_heads")
def _split_heads(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, View(node.path, (), node.module))


@_of("select")
def _select(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, Select(node.path, node.attributes["dim"], node.attributes["index"]))


@_of("upsample")
def _upsample(builder: Builder, node: Node) -> Node:
    return _passing(builder, node, Upsample(node.path, node.attributes["factor"]))


@_of("resize")
def _resize(builder: Builder, node: Node) -> Node:
    given = node.attributes
    return _passing(builder, node, Resize(node.path, given.get("size"), node.module, given.get("factor")))


@_of("scale")
def _scale(builder: Builder, node: Node) -> Node:
    factor = node.attributes.get("factor")
    if factor is not None and factor <= 0:
        return _table(builder, node, "scaled", {"number": factor})
    return _passing(builder, node, Scale(node.path, factor, node.module))


def _passing(builder: Builder, node: Node, module: nn.Module) -> Node:
    if node.inputs[0] in builder.nonnegative:
        builder.nonnegative.add(node)
    return builder.put(node, module)


def _all_nonnegative(builder: Builder, node: Node) -> bool:
    return all(source in builder.nonnegative for source in node.inputs)


def _whole_steps(node: Node) -> None:
    """A pool that rounds its size up is the same as one that rounds down where its windows fit."""
    if not node.attributes.get("ceil"):
        return
    window = (node.attributes[key] for key in ("kernel", "stride"))
    padding = node.attributes.get("padding", (0, 0))
    for size, kernel, stride, pad in zip(node.inputs[0].shape[1:], *window, padding, strict=True):
        if (size + 2 * pad - kernel) % stride:
            raise unsupported(node, "its last windows leave the map (ceil_mode)")
