"""A tiny supernet that stands in for the real one: two choices, an operator and a width, on shared weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass

import torch
from torch import nn

from nasq.data import DataSet, Split


@dataclass(frozen=True)
class FakeSubnet:
    width: int
    op: str

    @property
    def id(self) -> str:
        return f"{self.op}{self.width}"


class FakeSpace:
    widths = (2, 4, 8)
    ops = ("conv", "skip")

    def sample(self, generator: torch.Generator) -> FakeSubnet:
        draw = torch.randint(0, 6, (1,), generator=generator).item()
        return FakeSubnet(self.widths[draw % 3], self.ops[draw // 3])

    def largest(self) -> FakeSubnet:
        return FakeSubnet(8, "conv")

    def smallest(self) -> FakeSubnet:
        return FakeSubnet(2, "skip")

    def to_json(self) -> str:
        return json.dumps([self.widths, self.ops])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


class FakeSupernet(nn.Module):
    """``log_step`` and ``bias`` are 1-d; ``never`` gets no gradient; dropout draws from torch's global generator."""

    def __init__(self, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Parameter(torch.randn(8, 1, 3, 3) * 0.3)
            self.norm = nn.BatchNorm2d(8)
            self.mix = nn.Parameter(torch.randn(8, 8, 3, 3) * 0.2)
            self.head = nn.Linear(8, 10)
            self.log_step = nn.Parameter(torch.zeros(3))
            self.never = nn.Parameter(torch.ones(2))
        self.dropout = nn.Dropout(dropout)
        self.space = FakeSpace()
        self.active = self.space.largest()
        self.modes: list[str | None] = []

    @contextlib.contextmanager
    def _restoring(self, before: FakeSubnet):
        try:
            yield self
        finally:
            self.active = before

    def activate(self, subnet: FakeSubnet):
        before, self.active = self.active, subnet
        return self._restoring(before)

    def forward(self, x: torch.Tensor, mode: str | None = None) -> torch.Tensor:
        self.modes.append(mode)
        w = self.active.width
        x = torch.nn.functional.conv2d(x, self.stem, padding=1)
        x = torch.relu(self.norm(x))[:, :w]
        if self.active.op == "conv":
            x = x + torch.nn.functional.conv2d(x, self.mix[:w, :w].contiguous(), padding=1)
        x = self.dropout(x.mean((2, 3)) * self.log_step[self.space.widths.index(w)].exp())
        return torch.nn.functional.linear(x, self.head.weight[:, :w], self.head.bias)


def tiny_data(n: int = 96, seed: int = 0, name: str = "digits") -> DataSet:
    """Images that can be learnt: each class has its own bright pixel row and column."""
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for size in (n, 20, 20):
        labels = torch.arange(size) % 10
        images = torch.randint(0, 60, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
        at = torch.arange(size)
        images[at, 0, labels % 8, labels // 8 + 3] = 255
        splits.append(Split(images, labels))
    return DataSet.from_splits(name, [str(i) for i in range(10)], *splits)
