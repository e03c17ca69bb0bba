"""Steps at powers of two: every scale in the file is one, so every ratio of scales is, and no product with one is rounded.

A runtime then has nothing to round but the result, wherever it multiplies, whatever it fuses: two runtimes cannot differ in
convolutions, linear layers, sums, ReLU, max pooling and windows of a power of two. What it costs is accuracy: a step is up to
a factor of sqrt(2) away from the one that was learned.

The scales of the file are those of tensors and, per output channel, those of weights with BatchNorm's scale ``k`` in
them (``s_w |k|``). It is this product that is a power of two; the weight's own step is what that leaves, ``2^n / |k|``. The
other way (rounding ``s_w`` and ``|k|`` each) would change what BatchNorm computes by up to a factor of sqrt(2) per channel,
anew for every subnet's statistics. The price: with such steps a weight's integers depend on BatchNorm, so recalibrating may
change them.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.layers import Unit
from nasq.quant.producers import LayerProducer

__all__ = ["use_powers_of_two"]

_UNIT_BITS = 8
_UNIT = 90.0
"""The integer that stands for the weight 1 of a BatchNorm without a layer: times sqrt(2) either way it fits 8 bits."""


def use_powers_of_two(network: nn.Module) -> None:
    """Makes every quantizer of a quantized network round its steps to powers of two."""
    for module in network.modules():
        if isinstance(module, LayerProducer) and isinstance(module.layer, Unit):
            module.weight_quantizer = _unit()
    for module in network.modules():
        if isinstance(module, WeightForm | ActivationForm):
            module.power_of_two = True


def _unit() -> WeightForm:
    """The weight 1, fine enough that a step at a power of two changes it by less than 1 %."""
    form = WeightForm(None, _UNIT_BITS, True)
    form.log_step.requires_grad_(False)
    with torch.no_grad():
        form.log_step.fill_(-math.log(_UNIT))
    return form
