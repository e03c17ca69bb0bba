"""Node-wise statistics: what proxies see of every layer, before it is summed. The features of ParZC.

Per layer ``l`` of an untrained network, on one batch (Dong et al., AAAI 2025; released code):

    grad_norm  |dL/dW_l|        snip  mean |W_l . dL/dW_l|        synflow  mean |W_l . dR/dW_l| / R

The division by ``R`` keeps synflow in range and drops out of the features, which are scaled per network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nasq.errors import ArtifactError
from nasq.ranking.capture import layers_of
from nasq.ranking.copies import quantized_weights
from nasq.ranking.passes import Passes

__all__ = ["STATISTICS", "NodeStatistics", "from_text", "node_statistics", "to_text"]

STATISTICS = ("grad_norm", "snip", "synflow")
"""The statistics of a layer, in order."""

NodeStatistics = dict[str, tuple[float, ...]]
"""The three statistics of every layer, by path, in the order of traversal."""


class _NoNorms(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.batch_norm:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


def _flow(passes: Passes) -> dict[str, Tensor]:
    """``|w dR/dw| / R`` of every weight, BatchNorm left out; float64."""
    model: nn.Module = quantized_weights(passes.copy(norms=False)).double()
    layers = layers_of(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                for weight in module.parameters(recurse=False):
                    weight.abs_()
    for weight in layers.values():
        weight.requires_grad_(True)
    x = torch.ones(1, *passes.x.shape[1:], dtype=torch.float64, device=passes.device)
    with torch.enable_grad(), _NoNorms():
        total = passes.run(model, x, "float").sum()
    found = torch.autograd.grad(total, list(layers.values()), allow_unused=True)
    size = float(total.detach())
    return {
        path: torch.zeros_like(weight) if one is None else (weight.detach() * one).abs() / size
        for (path, weight), one in zip(layers.items(), found, strict=True)
    }


def node_statistics(passes: Passes) -> NodeStatistics:
    """:data:`STATISTICS` of every convolution and linear layer; NaN and infinities are kept."""
    gradients, flow = passes.see("gradients"), _flow(passes)
    return {
        path: (
            float(gradients[path].norm()),
            float((weight.detach() * gradients[path]).abs().mean()),
            float(flow[path].mean()),
        )
        for path, weight in passes.layers.items()
    }


def to_text(found: NodeStatistics) -> str:
    """One JSON object, five digits each; numbers that are not finite become ``null``."""
    rows = {
        path: [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
        for path, values in found.items()
    }
    return json.dumps(rows, separators=(",", ":"))


def from_text(text: str) -> NodeStatistics:
    """Reads :func:`to_text`; ``null`` is NaN.

    Raises:
        ArtifactError: It is something else.
    """
    try:
        rows = json.loads(text)
        assert isinstance(rows, Mapping)
        return {
            str(path): tuple(math.nan if one is None else float(one) for one in values) for path, values in rows.items()
        }
    except (ValueError, TypeError, AssertionError) as error:
        raise ArtifactError(
            f"node-wise statistics cannot be read: {text[:60]!r}. 'nasq score --nodes' writes them."
        ) from error
