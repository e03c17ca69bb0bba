"""What :func:`nasq.quant.quantize` makes sure of before it builds, and of what it built."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasq.elastic.base import elastic_modules, share_active
from nasq.elastic.conv import Conv2d, padding_of
from nasq.elastic.graph import Graph, Node
from nasq.elastic.layer_norm import LayerNorm
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d
from nasq.elastic.read import read_space
from nasq.errors import InputError
from nasq.quant.adapters import LowBitLinear
from nasq.quant.network import QuantizedNetwork
from nasq.quant.recipes import RECIPES, unsupported
from nasq.space import Subnet

__all__ = ["check_same", "check_supported"]


def check_supported(graph: Graph) -> None:
    """Every operation of a traced network has an integer form.

    Raises:
        InputError: Names the first that has none, with its path, and the other modules that have none.
    """
    # What a mask holds is known from its kind.
    masks = {source for node in graph.walk() if node.kind == "mask" for source in node.inputs[1:]}
    known = {"input", "conv", "linear", "norm", "container", *RECIPES}
    unknown = (node for node in graph.walk() if node.kind not in known or _is_special(node))
    if missing := [node for node in unknown if node not in masks]:
        raise unsupported(missing[0], others=[node for node in missing[1:] if node.module is not None])
    for node in graph.walk():
        if isinstance(node.module, LowBitLinear):
            raise InputError(
                f"the layer {node.path!r} chooses among frozen weights of its own for each bit-width (separate_bits), and "
                "quantize() puts choices of bits on one shared weight. Extract a subnet first, supernet.extract(subnet): "
                "its layers are plain; or quantize the network that separate_bits was given."
            )


def _is_special(node: Node) -> bool:
    """Whether a layer of a known kind has no integer form: it pads two sides differently, or normalises by the batch."""
    layer = node.module
    if isinstance(layer, nn.Conv2d):
        return padding_of(layer) is None
    return isinstance(layer, nn.BatchNorm2d) and layer.running_mean is None


def _alike(wanted: Tensor, found: Tensor) -> bool:
    """Equal up to fp32's rounding, whose error in a sum goes with the largest of the numbers."""
    largest = float(wanted.nan_to_num(posinf=0, neginf=0).abs().max()) if wanted.numel() else 0.0
    return torch.allclose(wanted, found, rtol=1e-4, atol=1e-5 * max(largest, 1.0), equal_nan=True)


def _run(original: nn.Module, x: Tensor, subnet: Subnet) -> Tensor:
    try:
        return original(x)  # type: ignore[no-any-return]
    except Exception as error:  # whatever a user's forward raises
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(
            f"{type(original).__name__} runs on the example, and not on an input of shape {list(x.shape)} as the subnet "
            f"{subnet.to_json()[:200]}: {line} Its forward must take any batch size and the sizes of every subnet: write "
            "flatten(1) instead of a view with fixed sizes."
        ) from error


def check_same(original: nn.Module, network: QuantizedNetwork, example: Tensor) -> None:
    """The traced form computes what the module computes, for other subnets and another batch size."""
    space = read_space(original)
    real, traced = share_active(original), share_active(network)
    noise = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(0)).to(example)
    original.eval()
    network.eval()
    rows = space.sample_batch(2, torch.Generator().manual_seed(0))
    for subnet in [space.smallest(), space.largest(), *space.to_subnets(rows)]:
        for active in (real, traced):
            active.clear()
            active.update(subnet)
        with torch.no_grad():
            wanted = _run(original, noise, subnet)
            found = network(noise, mode="float")
        if wanted.shape != found.shape or not _alike(wanted, found):
            raise _differs(original, network, subnet)
    network.train(True)


def _differs(original: nn.Module, network: QuantizedNetwork, subnet: Subnet) -> InputError:
    """The error for a traced form that computes something else, with the cause where one is seen."""
    name = f"{type(original).__name__} does not compute what the module computes"
    overwriting = [node.path for node in network.graph.walk() if "overwrites" in node.attributes]
    if overwriting:
        return InputError(
            f"the traced form of {name}: {overwriting[0]!r} changes its input in place, and that is read again behind it. "
            "Take inplace=False, or the operation without an underscore."
        )
    for path, layer in elastic_modules(original):
        base = next((kind for kind in (Conv2d, Linear, BatchNorm2d, LayerNorm) if isinstance(layer, kind)), None)
        if base is not None and type(layer).forward is not base.forward:
            return InputError(
                f"the traced form of {name}: the layer {path!r} has a forward of its own, {type(layer).__name__}.forward, "
                f"and is quantized as the {base.__name__} it inherits from. Change the weight in active_weight instead, or "
                "write an nn.Module around the layer."
            )
    return InputError(
        f"the traced form of {name} for the subnet {subnet.to_json()[:200]}: its forward depends on a size that holds a "
        "choice, on values, on hooks or on isinstance(x, Tensor). Use flatten instead of view with fixed sizes, and OneOf "
        "or Repeat instead of Python conditions."
    )
