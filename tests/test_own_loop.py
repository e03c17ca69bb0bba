"""nasq without its trainer: a dense prediction network, with a loss and a metric of one's own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from nasq import Choice, Supernet, elastic
from nasq.quant import calibrate, freeze, quantize


def test_segmentation_in_thirty_lines() -> None:
    rng = torch.Generator().manual_seed(0)
    width = Choice("width", (8, 16))

    def layer(inputs: int | Choice, kernel: int | Choice) -> list[nn.Module]:
        return [elastic.Conv2d(inputs, width, kernel, bias=False), elastic.BatchNorm2d(width), nn.ReLU()]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [nn.Sequential(*layer(width, Choice(f"kernel{i}", (3, 5)))) for i in range(2)]
        net = nn.Sequential(*layer(1, 3), elastic.Repeat(blocks, Choice("depth", (1, 2))), elastic.Conv2d(width, 2, 1))
    x = torch.rand(96, 1, 12, 12, generator=rng)
    y = (F.avg_pool2d(F.pad(x, [1] * 4, mode="reflect"), 3, 1)[:, 0] > 0.5).long()  # one label per pixel
    network = quantize(net, x[:1], weight_bits=(4, 8), activation_bits=(4, 8))
    calibrate(network, x[:32])
    supernet = Supernet(network)
    optimizer = torch.optim.Adam(supernet.parameters(), lr=0.01)
    for step in range(60):
        batch = slice(step % 2 * 32, step % 2 * 32 + 32)
        with supernet.activate(supernet.space.sample(rng)):
            F.cross_entropy(supernet(x[batch]), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def accuracy(predicted: torch.Tensor) -> float:
        return (predicted.argmax(1) == y[64:]).float().mean().item()

    found = {}
    supernet.eval()
    for subnet in {supernet.space.sample(rng) for _ in range(6)}:
        bn = supernet.recalibrate(subnet, [x[:32], x[32:64]])
        with supernet.activate(subnet, bn):
            found[subnet] = accuracy(supernet(x[64:]))
    best = max(found, key=lambda subnet: found[subnet])
    model = supernet.extract(best, supernet.recalibrate(best, [x[:32], x[32:64]]))

    assert accuracy(model(x[64:])) == found[best] > 0.8
    assert model(x[64:]).shape == (32, 2, 12, 12) and freeze(model).output.shape == (2, 12, 12)
