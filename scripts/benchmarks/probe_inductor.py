"""Can torchao's PT2E route carry a quantized subnet? A spike: evidence for the target `inductor-x86`.

Run from the repository's root: `python -m scripts.benchmarks.probe_inductor` (needs the extra `inductor` and a C++ compiler).
A small network is converted by the x86 quantizer, then every scale, zero-point and range in the converted graph is replaced
by numbers of our own, as learned steps would be. The compiled graph is compared with
the same graph run operation by operation, at 8 and at 4 bits, and the quantized kernels that Inductor matched are counted.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

QUANTIZED = torch.ops.quantized_decomposed


class Net(nn.Module):
    """Three convolutions: what the first two make is quantized behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 16, 3, padding=1) for i in (3, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, 3, H, W]` to `[N, 16, H, W]`; the last one is there so that what the middle one makes is quantized."""
        first = torch.relu(self.a(x))
        return torch.as_tensor(self.c(torch.relu(self.b(first))))


def converted(model: nn.Module, x: torch.Tensor) -> Any:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    prepared(x)
    return convert_pt2e(prepared)


def replace_steps(graph: Any, bits: int) -> list[tuple[float, int]]:
    """Puts steps of our own into every activation quantizer, with the range of ``bits``; returns (step, zero-point)."""
    grids: list[tuple[float, int]] = []
    top = 2**bits - 1
    for node in graph.graph.nodes:
        if node.target in (QUANTIZED.quantize_per_tensor.default, QUANTIZED.dequantize_per_tensor.default):
            if node.target is QUANTIZED.quantize_per_tensor.default:
                old, zero = float(node.args[1]), int(node.args[2])
                step = float(torch.tensor(old * 255 / top * 0.9))
                grids.append((step, round(zero * top / 255)))
            node.args = (node.args[0], *grids[-1], 0, top, torch.uint8)
    graph.recompile()
    return grids


def main() -> None:
    print("torch", torch.__version__, "torchao", importlib.metadata.version("torchao"))
    torch.manual_seed(0)
    for bits in (8, 4):
        model, x = Net().eval(), torch.randn(8, 3, 16, 16)
        graph = converted(model, x)
        grids = replace_steps(graph, bits)
        with torch.no_grad():
            eager = graph(x)
            counters.clear()
            torch._inductor.config.freezing = True
            compiled = torch.compile(graph)(x)
        matched = {key: value for key, value in counters["inductor"].items() if "qconv" in key or "qlinear" in key}
        off = (compiled - eager).abs().max() / eager.abs().max()
        differing = int(((compiled - eager).abs() > 1e-3 * eager.abs().max()).sum())
        print(f"{bits} bits: steps of our own kept: {len(grids)}; {matched}")
        print(f"  compiled against the same graph in eager: largest {off:.2e} of the largest output, "
              f"{differing} of {eager.numel()} outputs off by more than 1e-3 of it")  # fmt: skip


if __name__ == "__main__":
    main()
