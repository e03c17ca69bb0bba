"""The names that published tables give to subnets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn

from nasq.errors import InputError
from nasq.space import Option, Subnet

__all__ = ["OfficialNames", "from_official_name", "official_name"]


@runtime_checkable
class OfficialNames(Protocol):
    """A search space's network may have these two methods: then score files and tables hold its official names.

    They are inverse to each other on the canonical subnets of the space.
    """

    def official_name(self, subnet: Mapping[str, Option]) -> str:
        """The official name of ``subnet``; choices that the name does not hold (bits) are ignored."""
        ...

    def from_official_name(self, text: str) -> Subnet:
        """The subnet of an official name; raises :class:`~nasq.errors.InputError` for what is none."""
        ...


def official_name(network: nn.Module, subnet: Mapping[str, Option]) -> str:
    """The official name of ``subnet``; empty where the space of ``network`` has no official names."""
    return network.official_name(subnet) if isinstance(network, OfficialNames) else ""


def from_official_name(network: nn.Module, text: str) -> Subnet:
    """The subnet that a table calls ``text``.

    Raises:
        InputError: The space has no official names, or this is none.
    """
    if not isinstance(network, OfficialNames):
        raise InputError(
            f"{type(network).__name__} has no official names, and a subnet is called {text[:80]!r}. Give subnets as JSON, "
            "in a column 'subnet'."
        )
    return network.from_official_name(text)
