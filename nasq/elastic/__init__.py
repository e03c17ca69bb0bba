"""Layers and containers that may hold choices, and the tracing of networks made of them."""

from nasq.elastic.base import Container, ElasticModule, elastic_modules, extract, share_active
from nasq.elastic.containers import OneOf, Repeat
from nasq.elastic.conv import Conv2d
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d, batch_norms

__all__ = [
    "BatchNorm2d",
    "Container",
    "Conv2d",
    "ElasticModule",
    "Linear",
    "OneOf",
    "Repeat",
    "batch_norms",
    "elastic_modules",
    "extract",
    "share_active",
]
