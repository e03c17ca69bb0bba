"""Small networks and slow references for the proxies' tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


class Mixed(nn.Module):
    """Convolutions of every geometry, BatchNorm, in-place ReLU, a layer that is used twice, tokens, a classifier."""

    def __init__(self, norms: bool = True) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if norms else lambda channels: nn.Identity()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = norm(8)
        self.act = nn.ReLU(inplace=True)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=True)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.strided = nn.Conv2d(8, 12, (3, 2), stride=2, padding=1, bias=False)
        self.bn1 = norm(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding="same", groups=12)
        self.point = nn.Conv2d(12, 6, 1, bias=False)
        self.wide = nn.Conv2d(6, 6, (5, 3), padding=(2, 1))
        self.tokens = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.stem(x)))
        x = self.pool(self.act(self.dilated(x)))
        x = self.act(self.bn1(self.strided(x)))
        x = self.wide(self.wide(self.point(self.depthwise(x))))
        x = self.tokens(x.flatten(2).transpose(1, 2)).relu()
        return self.head(x.mean(1))


class Attentive(nn.Module):
    """Patches, self-attention, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.norm(tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0])
        return self.head(tokens.mean(1))


class Gaps(nn.Module):
    """A branch that no image reaches, beside one that they all take, or (``cut``) all of them."""

    def __init__(self, cut: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.body = nn.Sequential(*(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)))
        self.empty = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.after = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 5)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.after(self.empty(torch.zeros_like(x)).relu_())
        y = y + self.body(torch.zeros_like(x) if self.cut else x)
        return self.head(y.relu().mean((2, 3)))


def small() -> nn.Sequential:
    """What a quantized network can be made of."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def batch(count: int = 6, seed: int = 1, classes: int = 5, side: int = 8) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=rng), torch.randint(classes, (count,), generator=rng)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found[path] = module.weight
        if isinstance(module, nn.MultiheadAttention):
            found[f"{path}.in_proj"] = module.in_proj_weight
    return found


def one_at_a_time(model: nn.Module, given: Batch) -> dict[str, Tensor]:
    """The gradient of every sample from a training-mode pass of its own: ``[N, *weight]`` by layer."""
    model = copy.deepcopy(model).train()
    rows: dict[str, list[Tensor]] = {path: [] for path in weights(model)}
    for x, y in zip(*given, strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        for path, weight in weights(model).items():
            rows[path].append(torch.zeros_like(weight) if weight.grad is None else weight.grad.clone())
    return {path: torch.stack(found) for path, found in rows.items()}


def mean_gradients(model: nn.Module, given: Batch) -> dict[str, Tensor]:
    """Of the mean loss of one training-mode pass."""
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(given[0]), given[1]).backward()
    return {
        path: torch.zeros_like(one) if one.grad is None else one.grad.clone() for path, one in weights(model).items()
    }
