from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from nasq import plugins
from nasq.ranking import Proxy, expand

INSTALLED = [plugins.load("proxies", name)() for name in plugins.installed("proxies")]
SINGLE = {proxy.name: proxy for proxy in expand(INSTALLED)}
BASELINES = ["params", "flops"]


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.Dropout(0.5),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 6, 6, generator=rng), torch.randint(10, (count,), generator=rng)


KNOWN = {
    # 3*3*3*8 + 2*8 (BatchNorm) + 3*3*8 + 8 (depthwise, bias) + 8*10 + 10
    "params": 216 + 16 + 72 + 8 + 80 + 10,
    # 6*6 outputs * 8 * 27, then 3*3 outputs * 8 * 9, then 8 * 10
    "flops": 36 * 8 * 27 + 9 * 8 * 9 + 80,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_values(name: str) -> None:
    assert plugins.load("proxies", name)().score(net(), batch()) == KNOWN[name]


def test_frozen_parameters_do_not_count() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    assert plugins.load("proxies", "params")().score(model, batch()) == KNOWN["params"] - 216


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("training", [True, False])
def test_scoring_changes_nothing(name: str, training: bool) -> None:
    """Every installed proxy: weights, statistics, modes, gradients and the global random stream stay as they were."""
    model, (x, y) = net().train(training), batch()
    before = copy.deepcopy(model)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    images, labels, stream = x.clone(), y.clone(), torch.get_rng_state()
    proxy = SINGLE[name]
    first, second = proxy.score(model, (x, y)), proxy.score(model, (x, y))
    assert isinstance(first, float) and first == second and not math.isnan(first)
    assert torch.equal(torch.get_rng_state(), stream)
    for (path, now), then in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then), path
    first_grad, *other_grads = (parameter.grad for parameter in model.parameters())
    assert first_grad is not None and bool((first_grad == 1).all()) and other_grads == [None] * len(other_grads)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert [len(module._forward_hooks) for module in model.modules()] == [0] * len(list(model.modules()))
    assert torch.equal(x, images) and torch.equal(y, labels)


@pytest.mark.parametrize("proxy", INSTALLED, ids=lambda proxy: proxy.name)
def test_every_proxy_says_what_it_is(proxy: Proxy) -> None:
    assert proxy.name in plugins.installed("proxies") and proxy.reference and proxy.needs.batches >= 1
    assert proxy.direction in {"larger", "smaller"} and isinstance(proxy.needs.text(), str)


@pytest.mark.parametrize("name", BASELINES)
def test_a_larger_network_scores_higher_and_the_proxy_says_where_it_comes_from(name: str) -> None:
    proxy = plugins.load("proxies", name)()
    assert isinstance(proxy, Proxy) and proxy.name == name and proxy.reference and proxy.needs.batches >= 1
    wide = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *list(net())[6:-1], nn.Linear(64, 10))
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *list(net())[6:-1], nn.Linear(4, 10))
    assert proxy.score(wide, batch()) > proxy.score(narrow, batch())


@pytest.mark.parametrize("name", BASELINES)
def test_the_number_of_inputs_does_not_matter(name: str) -> None:
    proxy = plugins.load("proxies", name)()
    assert proxy.score(net(), batch(4)) == proxy.score(net(), batch(1))
