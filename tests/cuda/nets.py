"""A small quantized network with what the kernels have to serve: convolutions of every kind, signs, a linear layer."""

from __future__ import annotations

import torch
from torch import nn

import nasq
from nasq.quant.network import QuantizedNetwork


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.narrow = nn.Conv2d(8, 8, 3, 1, 1, groups=2), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.norm2(self.depthwise(x))
        x = x + torch.relu(self.grouped(x))
        x = torch.relu(self.narrow(x)).mean((2, 3))
        return self.head(x)


def small_network(
    seed: int = 0, weight_bits: int = 4, activation_bits: int = 8
) -> tuple[QuantizedNetwork, torch.Tensor]:
    """The network in evaluation, calibrated, and a batch of two images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Small()
        x = torch.rand(2, 3, 8, 8)
        with torch.no_grad():
            module.norm.weight.uniform_(-1, 1)  # negative ones too
            module.norm.running_mean.normal_()
    bits = {"weight_bits": [weight_bits], "activation_bits": [activation_bits]}
    network = nasq.quant.quantize(module, example=x[:1], target="generic", **bits)
    nasq.quant.calibrate(network, x)
    return network.eval(), x
