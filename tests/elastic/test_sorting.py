from __future__ import annotations

import pytest
import torch
from networks import generator, images, randomise
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.elastic import sort_channels
from nasq.errors import InputError

WIDTH = Choice("width", (4, 6, 12))


class Net(nn.Module):
    """Expand, depthwise, project: the inner channels can be sorted."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = elastic.Conv2d(3, WIDTH, 1)
        self.norm = elastic.BatchNorm2d(WIDTH)
        self.depthwise = elastic.Conv2d(WIDTH, WIDTH, Choice("kernel", (1, 3)), groups=WIDTH, kernel_transform=True)
        self.project = elastic.Conv2d(WIDTH, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(torch.relu(self.norm(self.expand(x))))
        return self.project(torch.relu(y))

    def sort(self, *fixed: int, optimizer: torch.optim.Optimizer | None = None) -> Tensor:
        return sort_channels([self.expand, self.norm, self.depthwise], [self.project], fixed, optimizer)


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    randomise(net, seed)
    return net.eval()


def importance(net: Net) -> Tensor:
    return net.project.weight.detach().abs().sum((0, 2, 3))


def test_sorting_changes_no_function_and_puts_the_largest_first() -> None:
    net, x = network(), images(2)
    with torch.no_grad():
        before = net(x)
    first = importance(net)
    order = net.sort()
    assert sorted(order.tolist()) == list(range(12)) and order.tolist() != list(range(12))
    assert torch.equal(importance(net), first[order])
    assert importance(net).diff().max() <= 0
    with torch.no_grad():
        assert torch.allclose(net(x), before, atol=1e-5)


def test_widths_in_use_keep_their_channels_and_functions() -> None:
    net, x = network(1), images(2)
    supernet = Supernet(net).eval()

    def outputs() -> dict[int, Tensor]:
        found = {}
        for width in (4, 6, 12):
            with supernet.activate({"width": width, "kernel": 1}), torch.no_grad():
                found[width] = supernet(x)
        return found

    before, order = outputs(), net.sort(6)
    assert sorted(order[:6].tolist()) == list(range(6))
    after = outputs()
    for width in (6, 12):
        assert torch.allclose(after[width], before[width], atol=1e-5)
    assert not torch.allclose(after[4], before[4], atol=1e-3)
    steps = importance(net).diff()
    assert steps[:5].max() <= 0 and steps[6:].max() <= 0


def test_sorting_twice_changes_nothing_more() -> None:
    net = network(2)
    net.sort()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert net.sort().tolist() == list(range(12))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_momentum_moves_with_its_weights() -> None:
    """A step after sorting is the sorted step before it."""
    nets = [network(3), network(3)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in nets]
    x = torch.randn(4, 3, 6, 6, generator=generator(0))
    for step in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            if step == 2 and net is nets[0]:
                net.sort(optimizer=optimizer)
            optimizer.zero_grad()
            net(x).square().sum().backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    with torch.no_grad():
        assert torch.allclose(nets[0](x), nets[1](x), atol=1e-4)
        assert not torch.equal(nets[0].expand.weight, nets[1].expand.weight)


def test_plain_layers_are_sorted_as_well() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(5, 3)
    with torch.no_grad():
        before = net(x)
        sort_channels([net[0]], [net[2]])
        assert torch.allclose(net(x), before, atol=1e-6)
        assert net[2].weight.abs().sum(0).diff().max() <= 0


def test_what_cannot_be_sorted_is_refused() -> None:
    net = network()
    with pytest.raises(InputError, match=r"got no reader, whose weights say which channels matter"):
        sort_channels([net.expand], [])
    with pytest.raises(InputError, match=r"layers of 12 and 5 channels. Give only those that make or read the same"):
        sort_channels([net.expand, net.project], [net.project])
    with pytest.raises(InputError, match=r"cannot move the channels of a ReLU"):
        sort_channels([nn.ReLU()], [net.project])
    with pytest.raises(InputError, match=r"a reader with groups. Give a depthwise convolution as a maker"):
        sort_channels([net.expand], [net.depthwise])
    with pytest.raises(InputError, match=r"fixed widths \[13\] for 12 channels. Give 0 to 12"):
        net.sort(13)
    joined = elastic.Conv2d(elastic.Segments(WIDTH, WIDTH), 3, 1)
    with pytest.raises(InputError, match=r"concatenated channels. Sort what makes each part"):
        sort_channels([net.expand], [joined])
