"""Time of a quantized training step and of calibration, as ratios to plain fp32 in one run.

ResNet-20 for CIFAR-10 (He et al. 2016; 1x1 convolutions in its two projection shortcuts), batch 256, random inputs: speed
does not depend on the weights' values. Usage: ``python -m scripts.benchmarks.quantized_step [--threads 2]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nasq
from nasq.deploy.bench import environment
from nasq.quant import calibrate, quantize


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        project = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else project

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        shapes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def step(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> None:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(model(x).float(), y)
    loss.backward()


def interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; they run in turn, so that drift of the machine cancels."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = ResNet20().train()
    both = ("symmetric", "asymmetric")
    forms = {"weight_granularity": ("tensor", "channel"), "weight_symmetry": both, "activation_symmetry": both}
    network = quantize(plain, torch.zeros(1, 3, 32, 32), "generic", **forms)
    x, y = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    began = time.perf_counter()
    calibrate(network, x)
    calibration = time.perf_counter() - began
    supernet = nasq.Supernet(network.train())
    supernet.activate(supernet.space.sample(torch.Generator().manual_seed(1)))
    last = x.contiguous(memory_format=torch.channels_last)
    times = interleaved(
        {
            "fp32": lambda: step(plain, x, y, False),
            "quantized fp32": lambda: step(supernet, x, y, False),
            "quantized fp32 channels_last": lambda: step(supernet, last, y, False),
            "quantized bf16 channels_last": lambda: step(supernet, last, y, True),
        },
        options.repeats,
    )
    result = {
        "calibration_seconds": round(calibration, 3),
        "forms_per_weight": 7 * 4,
        "forms_per_signed_activation": 7 * 2,
        "step_seconds": {name: round(value, 4) for name, value in times.items()},
        "ratio_to_fp32": {name: round(value / times["fp32"], 3) for name, value in times.items()},
        "environment": environment(options.threads),
    }
    json.dump(result, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
