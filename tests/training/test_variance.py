from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.errors import InputError
from nasq.training.variance import gradient_variance

X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0], [-1.0, 1.0]])
Y = torch.tensor([1.0, -1.0, 2.0, 0.5])
OPTIONS = ("plain", "double", "off")


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Line(nn.Module):
    """``factor * w.x``: three paths with gradients that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1, bias=False)
        nn.init.constant_(self.line.weight, 0.5)
        parts = {name: Scaled(factor) for name, factor in zip(OPTIONS, (1.0, 2.0, 0.1), strict=True)}
        self.scale = elastic.OneOf(Choice("scale", OPTIONS), parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.line(x))[:, 0]


def _loss(outputs: Tensor, labels: Tensor, reduction: str) -> Tensor:
    assert reduction == "none"
    return (outputs - labels).square()


def _exact(p: list[float], s: list[float], reweight: bool) -> tuple[float, float, float]:
    """Path part, data part and bias over all (path, sample) pairs, in closed form."""
    w = torch.tensor([0.5, 0.5], dtype=torch.float64)
    x, y = X.double(), Y.double()
    means, within = [], 0.0
    plain = torch.zeros(2, dtype=torch.float64)
    for q, factor in zip(p, (1.0, 2.0, 0.1), strict=True):
        gradients = 2 * (factor * (x @ w) - y)[:, None] * factor * x
        weight = torch.tensor([1 / (3 * q) / (4 * r) if reweight else 1.0 for r in s], dtype=torch.float64)
        share = torch.tensor(s, dtype=torch.float64)
        mean = (share * weight) @ gradients
        within += q * float(share @ (weight[:, None] * gradients - mean).square().sum(1))
        plain += q * (share @ gradients)
        means.append((q, mean))
    mean = sum(q * m for q, m in means)
    between = sum(q * float((m - mean).square().sum()) for q, m in means)
    square = float(mean @ mean)
    return between / square, within / square, float((plain - mean).square().sum()) / square


@pytest.mark.parametrize(("p", "s"), [([1 / 3] * 3, [0.25] * 4), ([0.3, 0.6, 0.1], [0.2, 0.2, 0.5, 0.1])])
def test_the_parts_are_those_of_the_closed_form(p: list[float], s: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    cycle = itertools.cycle(range(60))

    def paths() -> tuple[dict[str, str], float]:
        # Stratified: exactly p of the draws, so that only the data part is random.
        index = next(cycle) / 60
        option = 0 if index < p[0] - 1e-9 else 1 if index < p[0] + p[1] - 1e-9 else 2
        return {"scale": OPTIONS[option]}, 1 / (3 * p[option])

    def batches() -> tuple[Tensor, Tensor, Tensor | None]:
        at = torch.multinomial(torch.tensor(s), 1, generator=generator)
        return X[at], Y[at], 1 / (4 * torch.tensor(s)[at])

    found = gradient_variance(Supernet(Line()), paths, batches, path_count=60, batch_count=30, loss=_loss)
    path, data, bias = _exact(p, s, True)
    assert found.path == pytest.approx(path, rel=0.2, abs=0.05)
    assert found.data == pytest.approx(data, rel=0.2)
    assert found.bias == pytest.approx(bias, rel=0.3, abs=0.05)
    assert found.total == pytest.approx(path + data, rel=0.2)


def test_the_supernet_is_left_as_it_was() -> None:
    supernet = Supernet(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)))
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def batches() -> tuple[Tensor, Tensor, Tensor | None]:
        return torch.randn(4, 1, 2, 2, generator=generator), torch.arange(4) % 3, None

    found = gradient_variance(supernet, lambda: ({}, 1.0), batches, path_count=2, batch_count=3)
    assert found.data > 0 and abs(found.path) < found.data
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
    assert all(parameter.grad is None for parameter in supernet.parameters())


def test_bad_input_is_named() -> None:
    supernet = Supernet(Line())

    def batches() -> tuple[Tensor, Tensor, Tensor | None]:
        return X, 0.5 * (X @ torch.ones(2)), None

    with pytest.raises(InputError, match="path_count is 1; a variance needs 2 or more"):
        gradient_variance(supernet, lambda: ({"scale": "plain"}, 1.0), batches, path_count=1, loss=_loss)
    with pytest.raises(InputError, match="cannot be told from zero"):
        gradient_variance(supernet, lambda: ({"scale": "plain"}, 1.0), batches, loss=_loss)
