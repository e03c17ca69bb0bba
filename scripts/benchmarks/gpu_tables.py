"""How fast are nasq's CUDA kernels, beside what torch offers for the same work? Run ``gpu_correctness`` first.

    python -m scripts.benchmarks.gpu_tables [--out FILE.json] [--only TABLE ...] [--device cuda]

Every candidate is checked against the others before it is timed, and captured as a CUDA graph; the fp16 sides are compiled
with ``torch.compile(mode="max-autotune-no-cudagraphs")`` and then captured as well, in channels_last order. Candidates take
turns, round by round; times are medians over the rounds. Beside each stands its share of the roofline: the larger of
operations over the device's peak and of bytes over its bandwidth, both by its data sheet.

A kernel that is slower than torch's own for the sizes it serves is to be removed, so losses are marked.
``--device cpu`` goes through the tables with tiny sizes and shows that they run; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import nasq
from nasq.cuda.support import SWITCH
from nasq.deploy.bench import environment
from nasq.files import write_json

PEAKS = {  # int8 and fp16 tensor operations per second, bytes per second, by the vendors' data sheets, without sparsity
    "H200": (1979e12, 989e12, 4.8e12),
    "H100": (1979e12, 989e12, 3.35e12),
    "A100": (624e12, 312e12, 2.0e12),
    "L40": (362e12, 181e12, 0.864e12),
    "L4": (242e12, 121e12, 0.3e12),
    "A10": (250e12, 125e12, 0.6e12),
}
ROUNDS = 30
FLUSH = 256 << 20  # bytes written between calls where caches have to be cold: more than any L2


@dataclass(frozen=True)
class Row:
    """One line of a table; times in microseconds, shares of the roofline in 0..1 (``None``: peaks unknown)."""

    table: str
    case: str
    times: dict[str, float]
    roofline: dict[str, float | None]

    def line(self) -> str:
        parts = []
        ours = self.times["nasq"]
        for name, value in self.times.items():
            share = self.roofline.get(name)
            shown = "" if share is None else f" ({share:.0%} of the roofline)"
            factor = "" if name == "nasq" else f", nasq {value / ours:.2f}x{'' if value >= ours else ' LOSES'}"
            parts.append(f"{name} {value:.1f} us{shown}{factor}")
        return f"{self.table:20} {self.case:44} " + "; ".join(parts)


class Bench:
    """Times candidates in turn.

    Args:
        device: Where.
        cold: Whether the L2 cache is overwritten before each call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.peaks = next((peaks for key, peaks in PEAKS.items() if key in name), None)
        self.scratch = torch.empty(FLUSH if self.cuda else 16, dtype=torch.int8, device=device)

    def captured(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """The function as a CUDA graph; chosen tiles and compiled code are ready afterwards."""
        if not self.cuda:
            return function
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def once(self, call: Callable[[], Any], cold: bool) -> float:
        """Microseconds of one call."""
        if cold:
            self.scratch.zero_()
        if not self.cuda:
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    def times(self, functions: dict[str, Callable[[], Any]], cold: bool = False) -> dict[str, float]:
        """The median time of each, in microseconds."""
        calls = {name: self.captured(function) for name, function in functions.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(ROUNDS if self.cuda else 2):
            names = list(calls)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                samples[name].append(self.once(calls[name], cold))
        return {name: statistics.median(values) for name, values in samples.items()}

    def share(self, microseconds: float, operations: float, moved: float, integer: bool) -> float | None:
        """What part of the roofline a time reaches."""
        if self.peaks is None:
            return None
        least = max(operations / self.peaks[0 if integer else 1], moved / self.peaks[2])
        return least * 1e6 / microseconds


def compiled(function: Any, cuda: bool) -> Any:
    """By inductor with its autotuner; graphs are captured by :class:`Bench`, for all candidates alike."""
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False) if cuda else function


def integers(device: torch.device, *shape: int, low: int = -128, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(low, -low, shape, generator=generator, device=device, dtype=torch.int8)


def same(a: Tensor, b: Tensor, what: str) -> None:
    if not torch.equal(a, b):
        raise AssertionError(f"{what}: {int((a != b).sum())} of {a.numel()} integers differ; not timed")


def linear(bench: Bench) -> list[Row]:
    """W8A8 against cuBLAS fp16 and ``torch._int_mm``, requantization and bias included."""
    from nasq.cuda import ops

    d, rows = bench.device, []
    sizes = [
        (rows, k, n) for rows in (4096, 16384) for k, n in ((1024, 1024), (1024, 4096), (4096, 4096), (4096, 11008))
    ]
    for m, k, n in sizes if bench.cuda else [(32, 32, 16)]:
        x, w = integers(d, m, k), integers(d, n, k, seed=1)
        bias, scale = torch.arange(n, dtype=torch.int32, device=d), torch.full((n,), 1e-3, device=d)
        epilogue = ops.Epilogue(scale, -128, 127, 0)

        def torchs(x: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
            total = (torch._int_mm(x, w.t()) + bias).float() * scale
            return total.round().clamp(-128, 127).to(torch.int8)

        half = [t.half() for t in (x, w, bias)]
        fp16, int_mm = compiled(F.linear, bench.cuda), compiled(torchs, bench.cuda)
        same(ops.gemm(x[None], w[None], bias, epilogue)[0], torchs(x, w, bias, scale), f"linear {m}x{k}x{n}")
        functions = {
            "nasq": lambda x=x, w=w, b=bias, e=epilogue: ops.gemm(x[None], w[None], b, e),
            "fp16": lambda f=fp16, h=half: f(h[0], h[1], h[2]),
            "_int_mm": lambda f=int_mm, x=x, w=w, b=bias, s=scale: f(x, w, b, s),
        }
        rows.append(
            _row(bench, "linear W8A8", f"M {m}, K {k}, N {n}", functions, 2.0 * m * k * n, m * k + n * k + m * n)
        )
    return rows


def _row(
    bench: Bench, table: str, case: str, functions: dict[str, Any], operations: float, moved: float, **options: Any
) -> Row:
    """A line; fp16 candidates move twice the bytes (those of int8 are given)."""
    weights = options.pop("fp16_moved", 2 * moved)
    times = bench.times(functions, **options)
    shares = {
        name: bench.share(value, operations, weights if name == "fp16" else moved, name != "fp16")
        for name, value in times.items()
    }
    row = Row(table, case, times, shares)
    print(row.line(), flush=True)
    return row


def convolution(bench: Bench) -> list[Row]:
    """3x3 and 1x1 int8 convolutions against cuDNN fp16 in channels_last."""
    from nasq.cuda import ops, products

    d, rows = bench.device, []
    cases = [
        (64, 64, 56, 64, 3),
        (64, 128, 28, 128, 3),
        (64, 256, 14, 256, 3),
        (64, 512, 7, 512, 3),
        (64, 256, 56, 64, 1),
    ]
    for count, c, side, out, kernel in cases if bench.cuda else [(1, 32, 4, 16, 3)]:
        last = torch.channels_last
        x = integers(d, count, c, side, side).contiguous(memory_format=last)
        w = integers(d, out, c, kernel, kernel, seed=1)
        held, bias, pad = (
            w.permute(0, 2, 3, 1).contiguous(),
            torch.arange(out, dtype=torch.int32, device=d),
            kernel // 2,
        )
        epilogue = ops.Epilogue(torch.full((out,), 1e-3, device=d), 0, 127, 0)

        def ours(x: Tensor = x, w: Tensor = held, b: Tensor = bias, e: Any = epilogue, p: int = pad) -> Tensor:
            return ops.conv2d(x, w, b, e, padding=(p, p))

        slow = (
            products.conv2d(x.double(), w.double(), stride=1, padding=pad, dilation=1, groups=1) + bias[:, None, None]
        )
        same(ours(), (slow.float() * 1e-3).round().clamp(0, 127).to(torch.int8), f"conv {c} to {out}")
        module = compiled(_Conv(w, bias, pad), bench.cuda)
        real = x.half()
        functions = {"nasq": ours, "fp16": lambda f=module, x=real: f(x)}
        case = f"{count}x{c}x{side}x{side} to {out}, {kernel}x{kernel}"
        operations = 2.0 * count * side * side * out * c * kernel * kernel
        moved = x.numel() + w.numel() + count * out * side * side
        rows.append(_row(bench, "convolution", case, functions, operations, moved))
    return rows


class _Conv(torch.nn.Module):
    """What a deployed fp16 layer does: convolution, bias, ReLU."""

    def __init__(self, weight: Tensor, bias: Tensor, pad: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter((weight.half() / 128).contiguous(memory_format=torch.channels_last))
        self.bias, self.pad = torch.nn.Parameter(bias.half()), pad
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, padding=self.pad))


def thin(bench: Bench) -> list[Row]:
    """W4A8 and W8A8 with few rows and a cold L2 against fp16."""
    from nasq.cuda import nibbles, ops

    d, rows = bench.device, []
    sizes = [(m, k, n) for m in (1, 8, 16, 32) for k, n in ((4096, 4096), (4096, 11008), (8192, 8192))]
    for m, k, n in sizes if bench.cuda else [(2, 64, 16)]:
        x, w = integers(d, m, k), integers(d, n, k, low=-8, seed=1)
        packed, bias, none = (
            nibbles.pack_w4(w),
            torch.zeros(n, dtype=torch.int32, device=d),
            torch.zeros(n, device=d).int(),
        )
        epilogue = ops.Epilogue(torch.full((n,), 1e-3, device=d), -128, 127, 0)

        def ours(x: Tensor = x, w: Tensor = packed, b: Tensor = bias, s: Tensor = none, e: Any = epilogue) -> Tensor:
            return ops.thin_gemm(x, w, s, b, e, packed=True)

        def bytes_(x: Tensor = x, w: Tensor = w, b: Tensor = bias, s: Tensor = none, e: Any = epilogue) -> Tensor:
            return ops.thin_gemm(x, w, s, b, e, packed=False)

        same(ours(), bytes_(), f"W4A8 {m}x{k}x{n}")
        half, fp16 = [t.half() for t in (x, w, bias)], compiled(F.linear, bench.cuda)
        functions = {"nasq": ours, "nasq 8 bits": bytes_, "fp16": lambda f=fp16, h=half: f(h[0], h[1], h[2])}
        moved = n * k / 2 + m * k + m * n
        case = f"M {m}, K {k}, N {n}"
        extra = {"cold": True, "fp16_moved": 2.0 * (n * k + m * k + m * n)}
        rows.append(_row(bench, "linear W4A8, cold L2", case, functions, 2.0 * m * k * n, moved, **extra))
    return rows


def networks(bench: Bench) -> list[Row]:
    """Whole networks by their int8 programs against the fp16 networks."""
    from nasq.deploy.cuda_network import CudaNetwork
    from nasq.deploy.integer_network import IntegerNetwork

    rows = []
    for name, model, x in _models(bench):
        network = nasq.quant.quantize(model, x[:1].cpu(), "onnxruntime-cpu", weight_bits=(8,), activation_bits=(8,))
        nasq.quant.calibrate(network, x[:4].cpu())
        program = nasq.quant.freeze(network.eval())
        ours = CudaNetwork(program, bench.device)
        slow = IntegerNetwork(program).to(bench.device)
        same(ours.integers(x[:2]), slow.integers(x[:2]), name)
        floats = {plan.path: plan.reason for plan in ours.plans if plan.reason}
        if floats:
            print(f"  {name}: {len(floats)} operations run in float: {dict(list(floats.items())[:3])}", flush=True)
        half = compiled(model.to(bench.device).half().to(memory_format=torch.channels_last).eval(), bench.cuda)
        real = x.half().contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            functions = {"nasq": lambda n=ours, x=x: n.containers(x), "fp16": lambda f=half, x=real: f(x)}
            macs = sum(_macs(op) for op in program.ops) * len(x)
            rows.append(_row(bench, "network", f"{name}, batch {len(x)}", functions, 2.0 * macs, 0.0))
    return rows


def _macs(op: Any) -> int:
    from nasq.quant.program import Conv, Linear

    if not isinstance(op, Linear):
        return 0
    places = op.output.shape[1:] if isinstance(op, Conv) else op.output.shape[:-1]
    return int(op.weight.size * torch.Size(places).numel())


def _models(bench: Bench) -> Any:
    """Names, networks with random weights (speed does not depend on them) and images."""
    torch.manual_seed(0)
    if not bench.cuda:
        small = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 8)
        )
        yield "tiny", small.eval(), torch.rand(4, 3, 6, 6)
        return
    import timm

    for name in ("resnet50", "vit_small_patch16_224"):
        for batch in (8, 128):
            model = timm.create_model(name, pretrained=False).eval()
            yield name, model, torch.rand(batch, 3, 224, 224, device=bench.device)


def evaluation(bench: Bench) -> list[Row]:
    """The integer form of a network in evaluation against its fp32 forward, and a quantized training step."""
    from nasq.search_spaces.resnet import resnet20

    torch.manual_seed(0)
    plain = resnet20(elastic=False)
    x = torch.rand(256 if bench.cuda else 2, 3, 32, 32, device=bench.device)
    y = torch.arange(len(x), device=bench.device) % 10
    network = nasq.quant.quantize(plain, torch.zeros(1, 3, 32, 32), "generic", weight_bits=(4,), activation_bits=(4,))
    nasq.quant.calibrate(network, x.cpu())
    network, plain = network.to(bench.device), plain.to(bench.device)

    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    with torch.no_grad():
        functions: dict[str, Any] = {"nasq": lambda: network.eval().run(x, "integer"), "fp32": lambda: plain.eval()(x)}
        rows = [_eager(bench, "evaluation", "ResNet-20, integers", functions)]
    steps = {"nasq": lambda: step(network.train()), "fp32": lambda: step(plain.train())}
    return [*rows, _eager(bench, "training step", "ResNet-20, 4 bits", steps)]


def _eager(bench: Bench, table: str, case: str, functions: dict[str, Any]) -> Row:
    """Not captured: what these do is launched from Python in use as well."""
    for function in functions.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS if bench.cuda else 1):
        for name, function in functions.items():
            samples[name].append(bench.once(function, False))
    row = Row(table, case, {name: statistics.median(values) for name, values in samples.items()}, {})
    print(row.line(), flush=True)
    return row


TABLES: dict[str, Callable[[Bench], list[Row]]] = {
    "linear": linear, "convolution": convolution, "thin": thin, "networks": networks, "evaluation": evaluation,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=list(TABLES), default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ[SWITCH] = "1"
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    bench, rows, failed = Bench(device), list[Row](), dict[str, str]()
    for name in options.only or TABLES:
        try:
            rows += TABLES[name](bench)
        except Exception as error:  # one table that cannot be made leaves the others
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name}: {failed[name]}", file=sys.stderr, flush=True)
    found = {
        "device": torch.cuda.get_device_name(device) if bench.cuda else "cpu",
        "environment": environment(torch.get_num_threads()),
    }
    if options.out is not None:
        write_json(options.out, {**found, "rows": [asdict(row) for row in rows], "failed": failed})
    print(json.dumps({**found, "rows": len(rows), "failed": failed}, default=str))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
