"""nasq: neural architecture search with quantization supernets, exported bit for bit.

The names below load on first use, so that ``import nasq`` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nasq.version import __version__

if TYPE_CHECKING:
    from nasq import cost as cost
    from nasq import data, deploy, elastic, quant, search, space, targets, training
    from nasq.deploy.load import load
    from nasq.space import Choice, SearchSpace, Subnet
    from nasq.supernet import BNState, Supernet

_PLACES = {
    "BNState": "nasq.supernet",
    "Choice": "nasq.space",
    "SearchSpace": "nasq.space",
    "Subnet": "nasq.space",
    "Supernet": "nasq.supernet",
    "load": "nasq.deploy.load",
}
_MODULES = ("cost", "data", "deploy", "elastic", "quant", "search", "space", "targets", "training")

__all__ = [
    "BNState", "Choice", "SearchSpace", "Subnet", "Supernet", "__version__", "cost", "data", "deploy", "elastic", "load",
    "quant", "search", "space", "targets", "training",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"nasq.{name}")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'nasq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
