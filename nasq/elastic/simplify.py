"""``simplify``: a copy of a network in which layers without an integer form are equal ones that have one.

Convolutions with standardised weights, linear layers with a BatchNorm over tokens, and blocks that their own class can
re-parameterise become plain layers; so do one-dimensional layers and torch's attention. That needs the weights of today, so
it is a step of its own and not part of tracing: do it after loading weights and before ``convert`` and ``quantize``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nasq.elastic.equal_layers import equal_layer
from nasq.elastic.kinds import is_of

__all__ = ["simplify"]

_STANDARDISED = ("StdConv2d", "ScaledStdConv2d")
_FUSED = ("LinearNorm", "NormLinear")
_REPARAMETERISED = ("RepMixer",)


class _Watch(TorchFunctionMode):
    """Notes the arguments of the convolution that a module computes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.conv2d, torch.conv2d):
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def _plain_weight(conv: nn.Conv2d) -> Tensor:
    """The weight that a convolution multiplies by, whatever it computes it from."""
    x = torch.zeros(1, conv.in_channels, *(size * 2 for size in conv.kernel_size), device=conv.weight.device)
    with _Watch() as watch, torch.no_grad():
        conv(x)
    (call,) = watch.calls
    weight: Tensor = call[1]
    return weight.detach().clone()


def _standardised(conv: nn.Conv2d) -> nn.Module:
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,  # type: ignore[arg-type]
        conv.padding, conv.dilation, conv.groups, conv.bias is not None, device="meta",  # type: ignore[arg-type]
    )  # fmt: skip
    plain.weight = nn.Parameter(_plain_weight(conv))
    if conv.bias is not None:
        plain.bias = nn.Parameter(conv.bias.detach().clone())
    return plain.train(conv.training)


def _simpler(module: nn.Module) -> nn.Module | None:
    """What takes a module's place; ``None``: it stays."""
    if isinstance(module, nn.Conv2d) and is_of(module, "timm.", *_STANDARDISED):
        return _standardised(module)
    if is_of(module, "timm.", *_FUSED):
        fused: nn.Module = module.fuse()  # type: ignore[operator]
        return fused.train(module.training)
    return equal_layer(module)


def simplify(model: nn.Module) -> nn.Module:
    """A copy of a network in which layers that have no integer form are replaced by equal ones that have one.

    * timm's ``StdConv2d`` and ``ScaledStdConv2d`` (NFNet, BiT): a convolution with the standardised weight.
    * LeViT's ``LinearNorm`` and ``NormLinear``: the linear layer with the BatchNorm folded in.
    * FastViT's ``RepMixer``: the one convolution that its class makes of it.
    * One-dimensional networks: ``Conv1d`` and ``BatchNorm1d`` become layers on maps of one row.
    * ``MultiheadAttention``, ``TransformerEncoderLayer`` and ``TransformerEncoder`` (batch first, no masks): linear layers,
      matrix products and a softmax. They do not give the weights of the attention.
    * ``ConvTranspose2d`` whose kernel is its stride: a 1 x 1 convolution and a pixel shuffle.
    * ``SyncBatchNorm``: a BatchNorm.
    * Tables that a module keeps of its last run in evaluation are emptied.

    In evaluation it computes what the original does, up to rounding; what was folded is no longer trained as before. A
    network with none of these is returned as a copy.

    Args:
        model: Any network, in evaluation mode or not; left as it is.
    """
    made = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        replaced: set[str] = set()
        for path, module in list(made.named_modules()):
            if any(path.startswith(f"{other}.") for other in replaced):
                continue
            simpler = _simpler(module)
            if simpler is not None and not path:
                return simpler
            if simpler is not None:
                made.set_submodule(path, simpler)
                replaced.add(path)
            elif is_of(module, "timm.", *_REPARAMETERISED):
                module.reparameterize()
            cache = vars(module).get("attention_bias_cache")
            if isinstance(cache, dict):
                cache.clear()
    return made
