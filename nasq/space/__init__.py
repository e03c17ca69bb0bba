"""Choices, expressions, subnets and search spaces. Works without torch."""

from nasq.space.arithmetic import Expression
from nasq.space.choice import Choice
from nasq.space.conditions import Condition
from nasq.space.expressions import (
    Function,
    Lookup,
    Size,
    choices_of,
    maximum_of,
    maximum_of_size,
    minimum_of,
    round_to,
    value_of,
    values_of,
)
from nasq.space.options import Option
from nasq.space.random import as_numpy
from nasq.space.rules import SpaceRules
from nasq.space.space import SearchSpace
from nasq.space.subnet import Subnet

__all__ = [
    "Choice",
    "Condition",
    "Expression",
    "Function",
    "Lookup",
    "Option",
    "SearchSpace",
    "Size",
    "SpaceRules",
    "Subnet",
    "as_numpy",
    "choices_of",
    "maximum_of",
    "maximum_of_size",
    "minimum_of",
    "round_to",
    "value_of",
    "values_of",
]
