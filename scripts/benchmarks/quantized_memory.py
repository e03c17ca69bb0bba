"""Memory of a quantized training step against plain fp32: what autograd keeps, and the peak of the process.

ResNet-20 for CIFAR-10, batch 256. What autograd keeps is counted exactly, each storage once. The peak is that of a process
of its own per case, above what it held before the step (Linux). Usage: ``python -m scripts.benchmarks.quantized_memory``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from nasq.search_spaces.resnet import resnet20
from torch import Tensor, nn
from torch.nn import functional as F

import nasq
from nasq.deploy.bench import environment
from nasq.quant import calibrate, quantize
from nasq.quant.recompute import recomputed

CASES = (
    "fp32",
    "quantized fp32",
    "quantized fp32, all kept",
    "quantized fp32, sums of 8 bits",
    "quantized bf16",
    "quantized bf16, sums of 8 bits",
)


def build(case: str) -> nn.Module:
    """The network of a case, in training mode, with one random subnet active."""
    plain = resnet20(elastic=False).train()
    if case == "fp32":
        return plain
    sums = 8 if "sums" in case else None
    network = quantize(plain, torch.zeros(1, 3, 32, 32), sum_bits=sums)
    calibrate(network, torch.randn(32, 3, 32, 32))
    supernet = nasq.Supernet(network.train())
    supernet.activate(supernet.space.sample(torch.Generator().manual_seed(1)))
    return supernet


def resident(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    return 0


def measure(case: str, batch: int) -> dict[str, int]:
    """Bytes kept for the backward pass, and the step's peak above what was there before."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network = build(case)
    x, y = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(10, (batch,))
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        """Counts what is kept; what a layer forgets does not come here, what it is made of does."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def loss(count: int = batch) -> Tensor:
        keeping = nullcontext() if "all kept" in case else recomputed()
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in case), keeping:
            return F.cross_entropy(network(x[:count]).float(), y[:count])

    # Gradients and the runtime's own buffers exist from here on; memory once used by a whole batch would stay resident.
    loss(2).backward()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    loss().backward()
    peak = resident("VmHWM") - before
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    del value
    return {"kept_bytes": sum(kept.values()), "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--case", choices=CASES, default=None, help="one case, in this process")
    options = parser.parse_args()
    if options.case is not None:
        json.dump(measure(options.case, options.batch), sys.stdout)
        return
    found: dict[str, dict[str, int]] = {}
    for case in CASES:
        command = [sys.executable, "-m", "scripts.benchmarks.quantized_memory", "--batch", str(options.batch)]
        done = subprocess.run([*command, "--case", case], check=True, capture_output=True, text=True)
        found[case] = json.loads(done.stdout)
    ratios = {
        case: {key: round(value / found["fp32"][key], 3) for key, value in values.items()}
        for case, values in found.items()
    }
    json.dump({"bytes": found, "ratio_to_fp32": ratios, "environment": environment(1)}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
