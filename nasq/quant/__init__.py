"""Elastic quantization: quantizers, their training and integer forms, and the flat integer program."""

from nasq.quant.network import QuantizedNetwork, calibrate, freeze
from nasq.quant.quantize import quantize

__all__ = ["QuantizedNetwork", "calibrate", "freeze", "quantize"]
