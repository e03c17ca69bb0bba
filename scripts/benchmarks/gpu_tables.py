"""How fast are nasq's CUDA kernels, beside what torch offers for the same work? Run ``gpu_correctness`` first.

    python -m scripts.benchmarks.gpu_tables [--out FILE.json] [--only TABLE ...] [--device cuda] [--seconds S]

Every candidate is checked against the others before it is timed, and captured as a CUDA graph; the fp16 sides are compiled
with ``torch.compile(mode="max-autotune-no-cudagraphs")`` and then captured as well, in channels_last order. Candidates take
turns, round by round; times are medians over the rounds. Beside each stands its share of the roofline: the larger of
operations over the device's peak and of bytes over its bandwidth, both by its data sheet.

Short calls are captured several times in one graph, so that what it takes to launch a graph is not what is compared.

A kernel that is slower than torch's own for the sizes it serves is to be removed, so losses are marked.

Compiling takes minutes. ``--out`` is written after every line, and the same command goes on with the lines that are missing
there (``--again``: all of them, failed ones too). With ``--seconds`` no line is begun after that time, and 3 is returned.
``--device cpu`` goes through the tables with tiny sizes and shows that they run; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import nasq
from nasq.cuda.support import SWITCH
from nasq.deploy.timing import environment
from nasq.files import read_json, write_json
from scripts.benchmarks.gpu_correctness import UNFINISHED, code, compilers

PEAKS = {  # int8 and fp16 tensor operations per second, bytes per second, by the vendors' data sheets, without sparsity
    "H200": (1979e12, 989e12, 4.8e12),
    "H100": (1979e12, 989e12, 3.35e12),
    "A100": (624e12, 312e12, 2.0e12),
    "L40": (362e12, 181e12, 0.864e12),
    "L4": (242e12, 121e12, 0.3e12),
    "A10": (250e12, 125e12, 0.6e12),
}
ROUNDS = 30
AT_ONCE = 10  # calls in one graph where a call takes some microseconds
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
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.peaks = next((peaks for key, peaks in PEAKS.items() if key in name), None)
        self.scratch = torch.empty(FLUSH if self.cuda else 16, dtype=torch.int8, device=device)

    def captured(self, function: Callable[[], Any], calls: int) -> Callable[[], Any]:
        """So many calls of the function as a CUDA graph; chosen tiles and compiled code are ready afterwards."""
        if not self.cuda:
            return function
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Threads that the compiler left behind may talk to the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
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

    def times(self, functions: dict[str, Callable[[], Any]], cold: bool = False, at_once: int = 1) -> dict[str, float]:
        """The median time of one call of each, in microseconds; ``at_once`` calls are timed together."""
        at_once = at_once if self.cuda else 1
        calls = {name: self.captured(function, at_once) for name, function in functions.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(ROUNDS if self.cuda else 2):
            names = list(calls)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                samples[name].append(self.once(calls[name], cold) / at_once)
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


Cases = Iterator[tuple[str, Callable[[], Row]]]


def linear(bench: Bench) -> Cases:
    """W8A8 against cuBLAS fp16 and ``torch._int_mm``, requantization and bias included."""
    sizes = [
        (rows, k, n) for rows in (4096, 16384) for k, n in ((1024, 1024), (1024, 4096), (4096, 4096), (4096, 11008))
    ]
    for m, k, n in sizes if bench.cuda else [(32, 32, 16)]:
        yield f"M {m}, K {k}, N {n}", partial(_linear, bench, m, k, n)


def _linear(bench: Bench, m: int, k: int, n: int) -> Row:
    from nasq.cuda import ops

    d = bench.device
    x, w = integers(d, m, k), integers(d, n, k, seed=1)
    bias, scale = torch.arange(n, dtype=torch.int32, device=d), torch.full((n,), 1e-3, device=d)
    epilogue = ops.Epilogue(scale, -128, 127, 0)

    def torchs(x: Tensor, w: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        total = (torch._int_mm(x, w.t()) + bias).float() * scale
        return total.round().clamp(-128, 127).to(torch.int8)

    half = [t.half() for t in (x, w, bias)]
    fp16, int_mm = compiled(_half_linear, bench.cuda), compiled(torchs, bench.cuda)
    same(ops.gemm(x[None], w[None], bias, epilogue)[0], torchs(x, w, bias, scale), f"linear {m}x{k}x{n}")
    functions = {
        "nasq": lambda: ops.gemm(x[None], w[None], bias, epilogue),
        "fp16": lambda: fp16(*half),
        "_int_mm": lambda: int_mm(x, w, bias, scale),
    }
    moved = m * k + n * k + m * n
    return _row(bench, "linear W8A8", f"M {m}, K {k}, N {n}", functions, 2.0 * m * k * n, moved, at_once=AT_ONCE)


def _half_linear(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, w, bias)


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
    return Row(table, case, times, shares)


def convolution(bench: Bench) -> Cases:
    """3x3 and 1x1 int8 convolutions against cuDNN fp16 in channels_last."""
    cases = [
        (64, 64, 56, 64, 3),
        (64, 128, 28, 128, 3),
        (64, 256, 14, 256, 3),
        (64, 512, 7, 512, 3),
        (64, 256, 56, 64, 1),
    ]
    for count, c, side, out, kernel in cases if bench.cuda else [(1, 32, 4, 16, 3)]:
        case = f"{count}x{c}x{side}x{side} to {out}, {kernel}x{kernel}"
        yield case, partial(_convolution, bench, case, count, c, side, out, kernel)


def _convolution(bench: Bench, case: str, count: int, c: int, side: int, out: int, kernel: int) -> Row:
    from nasq.cuda import ops, products

    d, pad = bench.device, kernel // 2
    x = integers(d, count, c, side, side).contiguous(memory_format=torch.channels_last)
    w = integers(d, out, c, kernel, kernel, seed=1)
    held, bias = w.permute(0, 2, 3, 1).contiguous(), torch.arange(out, dtype=torch.int32, device=d)
    scale = torch.full((out,), 1e-3, device=d)
    epilogue = ops.Epilogue(scale, 0, 127, 0)

    def ours() -> Tensor:
        return ops.conv2d(x, held, bias, epilogue, padding=(pad, pad))

    slow = products.conv2d(x.double(), w.double(), stride=1, padding=pad, dilation=1, groups=1) + bias[:, None, None]
    wanted = (slow.float() * scale[:, None, None]).round().clamp(0, 127).to(torch.int8)
    same(ours(), wanted, f"conv {c} to {out}")
    module, real = compiled(_Conv(w, bias, pad), bench.cuda), x.half()
    functions = {"nasq": ours, "fp16": lambda: module(real)}
    operations = 2.0 * count * side * side * out * c * kernel * kernel
    moved = x.numel() + w.numel() + count * out * side * side
    return _row(bench, "convolution", case, functions, operations, moved, at_once=AT_ONCE)


class _Conv(torch.nn.Module):
    """What a deployed fp16 layer does: convolution, bias, ReLU."""

    def __init__(self, weight: Tensor, bias: Tensor, pad: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter((weight.half() / 128).contiguous(memory_format=torch.channels_last))
        self.bias, self.pad = torch.nn.Parameter(bias.half()), pad
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, padding=self.pad))


def thin(bench: Bench) -> Cases:
    """W4A8 and W8A8 with few rows and a cold L2 against fp16."""
    sizes = [(m, k, n) for m in (1, 8, 16, 32) for k, n in ((4096, 4096), (4096, 11008), (8192, 8192))]
    for m, k, n in sizes if bench.cuda else [(2, 64, 16)]:
        yield f"M {m}, K {k}, N {n}", partial(_thin, bench, m, k, n)


def _thin(bench: Bench, m: int, k: int, n: int) -> Row:
    from nasq.cuda import nibbles, ops

    d = bench.device
    x, w = integers(d, m, k), integers(d, n, k, low=-8, seed=1)
    packed, bias, none = nibbles.pack_w4(w), *(torch.zeros(n, dtype=torch.int32, device=d) for _ in range(2))
    epilogue = ops.Epilogue(torch.full((n,), 1e-3, device=d), -128, 127, 0)

    def ours() -> Tensor:
        return ops.thin_gemm(x, packed, none, bias, epilogue, packed=True)

    def bytes_() -> Tensor:
        return ops.thin_gemm(x, w, none, bias, epilogue, packed=False)

    same(ours(), bytes_(), f"W4A8 {m}x{k}x{n}")
    total = (x.double() @ w.double().t()).float() * epilogue.scale  # exact sums
    same(ours(), total.round().clamp(-128, 127).to(torch.int8), f"W4A8 {m}x{k}x{n} against float64")
    half, fp16 = [t.half() for t in (x, w, bias)], compiled(_half_linear, bench.cuda)
    functions = {"nasq": ours, "nasq 8 bits": bytes_, "fp16": lambda: fp16(*half)}
    moved = n * k / 2 + m * k + m * n
    extra = {"cold": True, "fp16_moved": 2.0 * (n * k + m * k + m * n)}
    return _row(bench, "linear W4A8, cold L2", f"M {m}, K {k}, N {n}", functions, 2.0 * m * k * n, moved, **extra)


def networks(bench: Bench) -> Cases:
    """Whole networks by their int8 programs against the fp16 networks; random weights, on which speed does not depend."""
    names = ("resnet50", "vit_small_patch16_224") if bench.cuda else ("tiny",)
    for batch in (128, 8) if bench.cuda else (4,):
        for name in names:
            yield f"{name}, batch {batch}", partial(_network, bench, name, batch)


def _network(bench: Bench, name: str, batch: int) -> Row:
    from nasq.deploy.cuda_network import CudaNetwork
    from nasq.deploy.integer_network import IntegerNetwork

    torch.manual_seed(0)
    model, side = _model(name)
    x = torch.rand(batch, 3, side, side, device=bench.device)
    network = nasq.quant.quantize(model, x[:1].cpu(), "onnxruntime-cpu", weight_bits=(8,), activation_bits=(8,))
    nasq.quant.calibrate(network, x[:4].cpu())
    program = nasq.quant.freeze(network.eval())
    ours = CudaNetwork(program, bench.device)
    slow = IntegerNetwork(program).to(bench.device)
    same(ours.integers(x[:2]), slow.integers(x[:2]), name)
    del slow
    floats = {plan.path: plan.reason for plan in ours.plans if plan.reason}
    if floats:
        print(f"  {name}: {len(floats)} operations run in float: {dict(list(floats.items())[:3])}", flush=True)
    half = compiled(model.to(bench.device).half().to(memory_format=torch.channels_last).eval(), bench.cuda)
    real = x.half().contiguous(memory_format=torch.channels_last)
    macs = sum(_macs(op) for op in program.ops) * len(x)
    with torch.no_grad():
        functions = {"nasq": lambda: ours.containers(x), "fp16": lambda: half(real)}
        return _row(bench, "network", f"{name}, batch {batch}", functions, 2.0 * macs, 0.0)


def _model(name: str) -> tuple[torch.nn.Module, int]:
    """A network and the side of its images."""
    if name == "tiny":
        layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(128, 8))
        return torch.nn.Sequential(*layers).eval(), 6
    import timm

    return timm.create_model(name, pretrained=False).eval(), 224


def _macs(op: Any) -> int:
    from nasq.quant.program import Conv, Linear

    if not isinstance(op, Linear):
        return 0
    places = op.output.shape[1:] if isinstance(op, Conv) else op.output.shape[:-1]
    return int(op.weight.size * torch.Size(places).numel())


def evaluation(bench: Bench) -> Cases:
    """The integer form of a network in evaluation against its fp32 forward, and a quantized training step."""
    yield "ResNet-20, integers", partial(_evaluation, bench, False)
    yield "ResNet-20, 4 bits", partial(_evaluation, bench, True)


def _evaluation(bench: Bench, training: bool) -> Row:
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

    if training:
        steps = {"nasq": lambda: step(network.train()), "fp32": lambda: step(plain.train())}
        return _eager(bench, "training step", "ResNet-20, 4 bits", steps)
    with torch.no_grad():
        functions: dict[str, Any] = {"nasq": lambda: network.eval().run(x, "integer"), "fp32": lambda: plain.eval()(x)}
        return _eager(bench, "evaluation", "ResNet-20, integers", functions)


def _eager(bench: Bench, table: str, case: str, functions: dict[str, Any]) -> Row:
    """Not captured: what these do is launched from Python in use as well."""
    for function in functions.values():
        for _ in range(3 if bench.cuda else 1):
            function()
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS if bench.cuda else 1):
        for name, function in functions.items():
            samples[name].append(bench.once(function, False))
    return Row(table, case, {name: statistics.median(values) for name, values in samples.items()}, {})


TABLES: dict[str, Callable[[Bench], Cases]] = {
    "linear": linear, "convolution": convolution, "thin": thin, "evaluation": evaluation, "networks": networks,
}  # fmt: skip


class Results:
    """The lines of ``--out``, written after every one.

    Args:
        path: Of the file; ``None``: they are only shown.
        device: What is timed; lines of another one are dropped.
        again: Whether all are taken again.
    """

    def __init__(self, path: Path | None, device: str, again: bool) -> None:
        self.path, self.device, self.code = path, device, code()
        found = read_json(path) if path is not None and path.exists() and not again else {}
        found = found if found.get("device") == device else {}
        self.rows: list[dict[str, Any]] = found.get("rows", [])
        self.failed: dict[str, str] = found.get("failed", {})
        self.done = {row["id"] for row in self.rows} | set(self.failed)

    def add(self, name: str, row: Row) -> None:
        self.rows.append({"id": name, "code": self.code, **asdict(row)})
        print(row.line(), flush=True)
        self.write()

    def fail(self, name: str, error: Exception) -> None:
        self.failed[name] = f"{type(error).__name__}: {error}"[:500]
        traceback.print_exc()
        print(f"{name}: {self.failed[name]}", file=sys.stderr, flush=True)
        self.write()

    def facts(self) -> dict[str, object]:
        return {"device": self.device, "environment": environment(torch.get_num_threads()) | compilers()}

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, {**self.facts(), "rows": self.rows, "failed": self.failed})


def lines(bench: Bench, tables: list[str]) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The lines of tables, each with what makes it."""
    for table in tables:
        for case, make in TABLES[table](bench):
            yield f"{table}: {case}", make


def run(bench: Bench, tables: list[str], results: Results, until: float) -> bool:
    """Makes the lines that are missing; returns whether there was time for all of them."""
    for name, make in lines(bench, tables):
        if name in results.done:
            continue
        if time.monotonic() > until:
            return False
        # Sizes share their Python code, of which torch.compile would keep eight versions and run the others uncompiled.
        torch.compiler.reset()
        try:
            results.add(name, make())
        except Exception as error:  # one line that cannot be made leaves the others
            results.fail(name, error)
            if "CUDA error" in str(error):  # behind one, nothing works in this process
                return False
        if bench.cuda:
            torch.cuda.empty_cache()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", choices=list(TABLES), default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true", help="take all lines anew")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no line after that, and return 3")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    os.environ[SWITCH] = "1"
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    bench = Bench(device)
    results = Results(options.out, torch.cuda.get_device_name(device) if bench.cuda else "cpu", options.again)
    finished = run(bench, options.only or list(TABLES), results, until)
    shown = {**results.facts(), "rows": len(results.rows), "failed": results.failed, "finished": finished}
    print(json.dumps(shown, default=str))
    return UNFINISHED if not finished else int(bool(results.failed))


if __name__ == "__main__":
    sys.exit(main())
