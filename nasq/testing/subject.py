"""What a conformance kit looks at: a network of the space, its supernet, subnets and inputs, all from one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from nasq.errors import InputError, NasqError
from nasq.plugins import SpaceInfo
from nasq.quant import QuantizedNetwork, calibrate, quantize
from nasq.space import SearchSpace, Subnet
from nasq.supernet import Supernet
from nasq.testing.randomise import randomise

__all__ = ["ConformanceError", "Subject", "expect", "shown"]


class ConformanceError(NasqError, AssertionError):
    """A search space does not do what every search space does; names the check, the subnet and the difference."""


def expect(holds: object, message: str) -> None:
    """Raises :class:`ConformanceError` with ``message`` unless ``holds``."""
    if not holds:
        raise ConformanceError(message)


def shown(subnet: Mapping[str, Any]) -> str:
    """A subnet for a message."""
    text = Subnet(subnet).to_json()
    return text if len(text) <= 300 else f"{text[:300]}..."


@dataclass
class Subject:
    """A search space under test; see :func:`nasq.testing.check_space` for the arguments."""

    name: str
    factory: Callable[..., nn.Module]
    arguments: Mapping[str, Any]
    input_shape: tuple[int, ...]
    count: int
    exported: int
    target: str
    seed: int
    float_only: str

    @classmethod
    def of(
        cls,
        factory: Callable[..., nn.Module],
        name: str,
        arguments: Mapping[str, Any] | None,
        input_shape: tuple[int, ...] | None,
        tiny: bool,
        count: int,
        exported: int,
        target: str,
        seed: int,
    ) -> Subject:
        """Fills in what the factory's decorator says."""
        info = getattr(factory, "nasq_info", None)
        known = info if isinstance(info, SpaceInfo) else None
        name = name or getattr(factory, "__name__", type(factory).__name__)
        if arguments is None:
            arguments = known.tiny if known is not None and tiny else {}
        if input_shape is None:
            if known is None:
                raise InputError(
                    f"{name!r} does not say the shape of an input. Give check_space(..., input_shape=(C, H, W)), or "
                    "decorate the factory with nasq.plugins.search_space(...)."
                )
            input_shape = known.tiny_input_shape if tiny else known.input_shape
        reason = known.float_only if known is not None else ""
        return cls(name, factory, arguments, input_shape, count, exported, target, seed, reason)

    def build(self, seed: int = 0) -> nn.Module:
        """A network of the space in evaluation mode; its weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + seed)
            network = self.factory(**self.arguments)
        if not isinstance(network, nn.Module):
            raise ConformanceError(f"the factory returned {type(network).__name__}. It has to return a torch module.")
        return randomise(network, self.seed + seed).eval()

    def inputs(self, count: int, seed: int = 0) -> Tensor:
        """Standard normal inputs ``[count, *input_shape]``."""
        rng = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randn(count, *self.input_shape, generator=rng)

    @property
    def images(self) -> int:
        """On how many images an exported file is run: fewer where they are large."""
        return 16 if prod(self.input_shape) <= 3 * 64 * 64 else 4

    @cached_property
    def supernet(self) -> Supernet:
        """Before quantization."""
        return Supernet(self.build(), self.name).eval()

    @property
    def space(self) -> SearchSpace:
        """Before quantization."""
        return self.supernet.space

    @cached_property
    def quantized(self) -> Supernet:
        """With the bits 4 and 8 for every layer and tensor, calibrated on noise."""
        network: QuantizedNetwork = quantize(
            self.build(), self.inputs(1), self.target, weight_bits=(4, 8), activation_bits=(4, 8)
        )
        # As many runs as there are operators to reach: the grids need not be good ones to be computed on exactly.
        calibrate(network, self.inputs(2, 1))
        return Supernet(network, self.name).eval()

    @cached_property
    def subnets(self) -> list[Subnet]:
        """The smallest, the largest, the default one, and random ones; each once."""
        return self.some(self.space, self.count)

    def some(self, space: SearchSpace, count: int) -> list[Subnet]:
        """The corners and random subnets of a space, ``count`` at most, each once."""
        rng = torch.Generator().manual_seed(self.seed)
        corners = [space.largest(), space.smallest(), space.default()]
        drawn = space.to_subnets(space.sample_batch(max(count - 2, 0), rng))
        return list(dict.fromkeys([*corners, *drawn]))[:count]
