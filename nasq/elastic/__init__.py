"""Layers and containers that may hold choices, and the tracing of networks made of them."""

from nasq.elastic import token_rules  # noqa: F401  (registers its rules)
from nasq.elastic.attention import MultiheadAttention
from nasq.elastic.base import Container, ElasticModule, elastic_modules, extract, share_active
from nasq.elastic.containers import OneOf, Repeat
from nasq.elastic.conv import Conv2d
from nasq.elastic.convert import ConversionReport, Skipped, convert
from nasq.elastic.inputs import InputChoice, input_options
from nasq.elastic.layer_norm import LayerNorm
from nasq.elastic.linear import Linear
from nasq.elastic.norm import BatchNorm2d, batch_norms
from nasq.elastic.pad import PadChannels, ZeroChannels
from nasq.elastic.parameter import Parameter
from nasq.elastic.resize import Resize
from nasq.elastic.segments import Segments
from nasq.elastic.simplify import simplify
from nasq.elastic.sorting import sort_channels

__all__ = [
    "BatchNorm2d",
    "Container",
    "Conv2d",
    "ConversionReport",
    "ElasticModule",
    "InputChoice",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "OneOf",
    "PadChannels",
    "Parameter",
    "Repeat",
    "Resize",
    "Segments",
    "Skipped",
    "ZeroChannels",
    "batch_norms",
    "convert",
    "elastic_modules",
    "extract",
    "input_options",
    "share_active",
    "simplify",
    "sort_channels",
]
