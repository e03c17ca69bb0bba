"""Elastic quantization: quantizers, their training and integer forms, and the flat integer program.

The public names load on first use: the program and its packing are plain NumPy, and whoever only reads a bundle should
not have to load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasq.quant.builder import quantize
    from nasq.quant.network import QuantizedNetwork, calibrate, freeze

_PLACES = {
    "QuantizedNetwork": "nasq.quant.network",
    "calibrate": "nasq.quant.network",
    "freeze": "nasq.quant.network",
    "quantize": "nasq.quant.builder",
}

__all__ = ["QuantizedNetwork", "calibrate", "freeze", "quantize"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'nasq.quant' has no attribute {name!r}")
