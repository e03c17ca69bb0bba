"""synflow: how much signal flows through every weight, with all weights positive and no data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nasq.ranking import Needs, Passes, PassProxy, layers_of, quantized_weights

from ._scaled import Scaling, log_scale

__all__ = ["Synflow", "flow"]


def flow(passes: Passes, norms: bool) -> tuple[float, dict[str, Tensor]]:
    """``log |R|`` and every weight's share ``|w dR/dw| / R``, by layer: float64, one image of ones.

    ``R`` is the sum of the outputs with the absolute values of all weights and statistics.

    Args:
        passes: Of the model.
        norms: Whether BatchNorm stays, in training mode, or is the identity.
    """
    # Float64 before the absolute value, as in NASLib; integer buffers (counters) are left alone.
    model = quantized_weights(passes.copy(norms=norms)).double()
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):
            if one.is_floating_point() and not _is_step(model, one):
                one.abs_()
    layers = layers_of(model)
    for weight in layers.values():
        weight.requires_grad_(True)
    x = torch.ones(1, *passes.x.shape[1:], dtype=torch.float64, device=passes.device)
    with torch.enable_grad(), Scaling(), _Norms(norms):
        made = passes.run(model, x, "float")
        total = made.sum()
    value = abs(float(total.detach()))
    if value == 0 or not math.isfinite(value):
        return (-math.inf if value == 0 else math.nan), {}
    found = torch.autograd.grad(total, list(layers.values()), allow_unused=True)
    shares = {
        path: (weight.detach() * gradient).abs() / value
        for (path, weight), gradient in zip(layers.items(), found, strict=True)
        if gradient is not None
    }
    return math.log(value) + log_scale(made), shares


def _is_step(model: nn.Module, one: Tensor) -> bool:
    """Quantizers keep logarithms of steps, which do not enter here."""
    return any(one is held for name, held in model.named_parameters() if ".log_step" in f".{name}")


class _Norms(TorchFunctionMode):
    """Leaves BatchNorm out, or takes it as it is."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.keep = keep

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is F.batch_norm and not self.keep:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


class Synflow(PassProxy):
    """``log of sum over weights of |w dR/dw|``, BatchNorm removed; ``-inf`` where nothing flows.

    The logarithm (NASLib's, too) ranks as the sum does and exists where the sum overflows: the pass takes powers out of the
    values on the way, exactly. Networks that subtract or multiply activations are not homogeneous, and their value means
    little. Of a quantized network the weights are those its quantizers make.
    """

    name = "synflow"
    needs = Needs()
    reference = "Tanaka et al., NeurIPS 2020; as a proxy Abdelfattah et al., ICLR 2021"
    norms = False

    def measure(self, passes: Passes) -> float:
        """The natural logarithm."""
        logarithm, shares = passes.shared(f"flow {self.norms}", lambda: flow(passes, self.norms))
        if not shares:
            return float(logarithm)
        share = sum(float(one.sum()) for one in shares.values())
        # Only biases reach the outputs of a network whose input is cut off.
        return float(logarithm) + math.log(share) if share else -math.inf
