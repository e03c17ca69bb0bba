"""MABN: the mixer with Bayesian layers that ParZC learns a ranking with.

Shapes: ``N`` subnets, ``D`` features, ``P`` segments of 16 numbers, ``d`` channels.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq.errors import InputError

__all__ = ["MABN", "BayesianLinear", "MabnConfig", "MixerBlock"]

SEGMENT = 16


class BayesianLinear(nn.Module):
    """``y = (mu + softplus(rho) eps) x``, ``eps`` standard normal and drawn anew in every pass; no bias.

    No divergence from a prior enters the loss (as in the released code): the noise regularises. ``noise`` switches it off:
    then it is ``Linear(mu)``. The released code leaves it on when it tests.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        rho: Where the deviations begin: softplus(-5) is 0.0067.
        generator: Decides ``mu`` and all noise.
    """

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator, rho: float = -5.0) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # Kaiming-uniform with a = sqrt(5)
        self.mu = nn.Parameter((torch.rand(outputs, inputs, generator=generator) * 2 - 1) * bound)
        self.rho = nn.Parameter(torch.full((outputs, inputs), rho))
        self.generator = generator
        self.noise = True

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``."""
        if not self.noise:
            return F.linear(x, self.mu)
        eps = torch.randn(self.mu.shape, generator=self.generator).to(x)
        return F.linear(x, self.mu + F.softplus(self.rho) * eps)


@dataclass(frozen=True)
class MabnConfig:
    """Sizes of a :class:`MABN`.

    Attributes:
        inputs: ``D``.
        segments: ``P``; ParZC has 16 (256 numbers) for NAS-Bench-201.
        width: ``d``; ParZC 512.
        depth: Blocks; ParZC 4.
        dropout: In the blocks.
        mixing: ``"tokens"``: the first feed-forward of a block runs across segments, as in a mixer. ``"channels"``: both run
            across channels, as in the released code, where segments meet in the final mean only.
    """

    inputs: int
    segments: int = 8
    width: int = 64
    depth: int = 2
    dropout: float = 0.0
    mixing: Literal["tokens", "channels"] = "tokens"

    def __post_init__(self) -> None:
        if min(self.inputs, self.segments, self.width, self.depth) < 1 or self.mixing not in {"tokens", "channels"}:
            raise InputError(f"{asdict(self)}: sizes are at least 1, mixing is 'tokens' or 'channels'.")


def _feed_forward(width: int, ratio: float, dropout: float) -> nn.Sequential:
    hidden = max(1, int(width * ratio))
    return nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width), nn.Dropout(dropout)
    )


class MixerBlock(nn.Module):
    """``x + FF(LN(x))`` twice: across segments (ratio 0.5), then across channels (ratio 4); or see ``mixing``."""

    def __init__(self, config: MabnConfig) -> None:
        super().__init__()
        self.tokens = config.mixing == "tokens"
        self.first, self.second = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        if self.tokens:
            self.mix = _feed_forward(config.segments, 0.5, config.dropout)
            self.channels = _feed_forward(config.width, 4.0, config.dropout)
        else:
            self.mix = _feed_forward(config.width, 4.0, config.dropout)
            self.channels = _feed_forward(config.width, 0.5, config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, P, d]``, unchanged."""
        y = self.first(x)
        y = self.mix(y.transpose(1, 2)).transpose(1, 2) if self.tokens else self.mix(y)
        x = x + y
        return x + self.channels(self.second(x))  # type: ignore[no-any-return]


class MABN(nn.Module):
    """Segments, a Bayesian layer, mixer blocks, a Bayesian layer, a regressor.

    Args:
        config: Sizes.
        generator: Decides all weights and, in training, all noise.
    """

    def __init__(self, config: MabnConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            self.segment = nn.Linear(config.inputs, config.segments * SEGMENT)
            self.blocks = nn.Sequential(*(MixerBlock(config) for _ in range(config.depth)))
            self.norm = nn.LayerNorm(config.width)
            self.regress = nn.Sequential(
                nn.Linear(config.width, max(1, config.width // 2), bias=False),
                nn.Dropout(0.1),
                nn.Linear(max(1, config.width // 2), 1, bias=False),
            )
        self.before = BayesianLinear(SEGMENT, config.width, generator)
        self.after = BayesianLinear(config.width, config.width, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[N, D]`` to scores ``[N]``."""
        tokens = self.before(self.segment(x).reshape(len(x), self.config.segments, SEGMENT))
        pooled = self.norm(self.blocks(tokens)).mean(1)
        return self.regress(self.after(pooled)).squeeze(1)  # type: ignore[no-any-return]

    def set_noise(self, on: bool) -> None:
        """Switches the noise of both Bayesian layers."""
        self.before.noise = self.after.noise = on

    def to_json(self) -> dict[str, Any]:
        """The sizes."""
        return asdict(self.config)
