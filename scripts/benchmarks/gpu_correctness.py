"""Is everything that nasq computes on a CUDA device right? One check per path; nothing is timed.

    python -m scripts.benchmarks.gpu_correctness [--out FILE.json] [--device cuda] [--jobs N] [--seconds S]

Integers are compared with int64 or float64 sums and with the NumPy reference, and have to be equal; training is compared
with the CPU, within the rounding of fp32. Every tile that the autotuner may choose is checked, not only the one it chose.
``--device cpu`` goes through the same checks on small sizes with interpreted kernels (``TRITON_INTERPRET=1``), which shows
that the checks run and says nothing about a device.

Every check runs in a process of its own, ``--jobs`` at a time: most of the time is the compiler's, and a kernel that breaks
its process takes no other check with it. ``--out`` is written after every check; the same command goes on with what is
missing there, repeats what failed, and begins anew where the code is another (``--code`` prints its digest). With
``--seconds`` it stops in time and returns 3: call it again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import nasq
from nasq import plugins
from nasq.cuda.support import SWITCH
from nasq.deploy.timing import environment
from nasq.files import read_json, write_json

Check = Callable[[torch.device, bool], str]
CHECKS: dict[str, Check] = {}
LONGEST = 540.0  # seconds of one check
UNFINISHED = 3  # exit code


class TimeIsUp(Exception):
    """There is no time left for a check: it is neither right nor wrong."""


def check(function: Check) -> Check:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def check_parts(count: int) -> Callable[[Any], Any]:
    """A check whose cases are spread over so many processes; it takes a slice of them."""

    def register(function: Any) -> Any:
        name = function.__name__.replace("_", " ")
        for part in range(count):
            CHECKS[f"{name} {part + 1}"] = partial(function, slice(part, None, count))
        return function

    return register


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Integers, wherever they are held."""
    wrong = int((found.double() != wanted.double()).sum())
    expect(wrong == 0, f"{what}: {wrong} of {wanted.numel()} integers differ")


def every_tile(kernel: Any, tried: Callable[[], Any]) -> Iterator[str]:
    """The kernel with each of its configurations in turn; afterwards as it was.

    The autotuner passes by a tile for which the device has too little shared memory; so does this, and fails where none is
    left. ``tried`` launches the kernel.
    """
    from triton.runtime.errors import OutOfResources

    configs, fitted = kernel.configs, 0
    try:
        for config in configs:
            kernel.configs = [config]
            kernel.cache.clear()
            try:
                tried()
            except OutOfResources:
                continue
            fitted += 1
            yield str(config)
        expect(fitted > 0, "no tile fits the device's shared memory")
    finally:
        kernel.configs = configs
        kernel.cache.clear()


def integers(device: torch.device, *shape: int, low: int = -128, high: int = 127, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(torch.int8).to(device)


def placed(acc: Tensor, scale: Tensor, low: int, high: int, zero: int) -> Tensor:
    return (acc.float() * scale).round().clamp(low, high) + zero


def fitting(acc: Tensor, channels: int, device: torch.device) -> Tensor:
    """Scales that spread an accumulator over 8 bits."""
    wide = torch.rand(channels, generator=torch.Generator().manual_seed(5)).to(device) + 0.5
    return wide * float(60 / acc.double().std())


@check_parts(4)
def matrix_products(part: slice, device: torch.device, small: bool) -> str:
    from nasq.cuda import kernels, ops

    sizes = [(19, 21, 50)] if small else [(4096, 1024, 1024), (257, 384, 1536), (1000, 1003, 77), (17, 4096, 4096)]
    tiles = 0
    for rows, columns, depth in sizes[part]:
        a, b = integers(device, 1, rows, depth), integers(device, 1, columns, depth, seed=1)
        bias = torch.arange(columns, dtype=torch.int32, device=device) * 37 - 999
        acc = (a[0].double() @ b[0].double().T).round() + bias
        epilogue = ops.Epilogue(fitting(acc, columns, device), -128, 100, 0)
        for tile in every_tile(kernels.gemm_kernel, partial(ops.gemm, a, b, bias)):
            where = f"{rows}x{columns}x{depth}, {tile}"
            equal(ops.gemm(a, b, bias)[0], acc, where)
            equal(ops.gemm(a, b, bias, epilogue)[0], placed(acc, epilogue.scale, -128, 100, 0), where)
            tiles += 1
        both = (a[0].double() + 128) @ (b[0].double() + 77).T
        equal(ops.gemm(a, b, extra=(128, 77))[0], both.round(), "products of two offset tensors")
    return f"{tiles} pairs of size and tile"


@check_parts(4)
def thin_products(part: slice, device: torch.device, small: bool) -> str:
    from nasq.cuda import nibbles, ops, thin

    sizes = [(5, 21, 50)] if small else [(1, 4096, 4096), (16, 4096, 11008), (33, 1003, 1001), (200, 512, 384)]
    tiles = 0
    for rows, columns, depth in sizes[part]:
        x = integers(device, rows, depth)
        narrow, wide = (integers(device, columns, depth, low=low, high=-low - 1, seed=1) for low in (-8, -128))
        shift = (torch.arange(columns, device=device) % 5).int()
        bias = torch.arange(columns, dtype=torch.int32, device=device) * 11 - 99
        for packed, weight in ((True, narrow), (False, wide)):
            shifts = shift if packed else torch.zeros_like(shift)
            acc = (x.double() @ weight.double().T).round() * 2.0**shifts + bias
            held = nibbles.pack_w4(weight) if packed else weight
            epilogue = ops.Epilogue(fitting(acc, columns, device), 0, 127, -100)
            for tile in every_tile(thin.thin_kernel, partial(ops.thin_gemm, x, held, shifts, bias, packed=packed)):
                for split in (0, 1, 8):
                    where = f"{rows}x{columns}x{depth}, packed={packed}, split={split}, {tile}"
                    equal(ops.thin_gemm(x, held, shifts, bias, packed=packed, split=split), acc, where)
                    made = ops.thin_gemm(x, held, shifts, bias, epilogue, packed=packed, split=split)
                    equal(made, placed(acc, epilogue.scale, 0, 127, -100), where)
                tiles += 1
    return f"{tiles} pairs of size and tile, three splits each"


@check_parts(6)
def convolutions(part: slice, device: torch.device, small: bool) -> str:
    from nasq.cuda import kernels, ops

    cases = [(2, 5, 7, 8, 3, 1, 1, 1, 1), (1, 40, 4, 6, 3, 2, 1, 2, 1), (1, 8, 5, 8, 3, 1, 0, 1, 2)]
    if not small:
        cases = [
            (32, 3, 224, 64, 7, 2, 3, 1, 1), (16, 128, 28, 128, 3, 1, 1, 1, 1), (16, 256, 28, 512, 1, 2, 0, 1, 1),
            (4, 100, 17, 130, 3, 2, 2, 2, 1), (8, 64, 14, 96, 3, 1, 1, 1, 4), (2, 512, 7, 512, 3, 1, 1, 1, 1),
        ]  # fmt: skip
    tiles = 0
    for n, c, side, out, k, s, p, d, groups in cases[part]:
        for pad in (0, -128):
            x, w = integers(device, n, c, side, side), integers(device, out, c // groups, k, k, seed=1)
            bias = torch.arange(out, dtype=torch.int32, device=device) * 37 - 999
            padded = F.pad(x.double(), (p, p, p, p), value=pad)
            acc = F.conv2d(padded, w.double(), None, s, 0, d, groups).round() + bias[:, None, None]
            epilogue = ops.Epilogue(fitting(acc, out, device), -128, 100, 0)
            wanted = placed(acc, epilogue.scale[:, None, None], -128, 100, 0)
            geometry: dict[str, Any] = {"stride": (s, s), "padding": (p, p), "dilation": (d, d), "pad": pad}
            held = w.permute(0, 2, 3, 1).contiguous()
            for tile in every_tile(kernels.conv_kernel, partial(ops.conv2d, x, held, bias, groups=groups, **geometry)):
                where = f"{n}x{c}x{side}x{side} to {out}, {k}x{k}, stride {s}, groups {groups}, pad {pad}, {tile}"
                equal(ops.conv2d(x, held, bias, groups=groups, **geometry), acc, where)
                equal(ops.conv2d(x, held, bias, epilogue, groups=groups, **geometry), wanted, where)
                tiles += 1
    return f"{tiles} pairs of shape and tile"


@check
def depthwise_convolutions(device: torch.device, small: bool) -> str:
    from nasq.cuda import kernels, ops

    cases = [(2, 5, 7, 2, 3)] if small else [(16, 96, 56, 1, 3), (8, 240, 28, 2, 5), (4, 50, 15, 2, 7)]
    tiles = 0
    for n, c, side, s, k in cases:
        x, w = integers(device, n, c, side, side), integers(device, c, 1, k, k, seed=1)
        bias = torch.arange(c, dtype=torch.int32, device=device)
        p = k // 2
        acc = F.conv2d(F.pad(x.double(), (p, p, p, p), value=-128), w.double(), None, s, 0, 1, c).round()
        acc = acc + bias[:, None, None]
        held = w[:, 0].permute(1, 2, 0).contiguous()
        call = partial(ops.depthwise, x, held, bias, stride=(s, s), padding=(p, p), pad=-128)
        for tile in every_tile(kernels.depthwise_kernel, call):
            equal(call(), acc, f"{n}x{c}x{side}, {k}x{k}, {tile}")
            tiles += 1
    return f"{tiles} pairs of shape and tile"


def _network(name: str, device: torch.device, seed: int, bits: tuple[int, ...]) -> tuple[Any, Tensor]:
    """A random subnet of a space's small form, quantized, calibrated, in evaluation, and images for it."""
    factory = plugins.load("search_spaces", name)
    info = plugins.space_info(factory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = factory(**info.tiny)
        x = torch.rand(8 if device.type == "cuda" else 2, *info.tiny_input_shape)
        forms = {"weight_bits": bits, "activation_bits": bits, "activation_symmetry": ("symmetric", "asymmetric")}
        network = nasq.quant.quantize(module, x[:1], "onnxruntime-cpu", **forms)
        nasq.quant.calibrate(network, x)
    supernet = nasq.Supernet(network)
    subnet = supernet.space.sample(torch.Generator().manual_seed(seed))
    supernet.activate(subnet)
    return network.eval().to(device), x.to(device)


@check_parts(5)
def integer_evaluation_and_export(part: slice, device: torch.device, small: bool) -> str:
    """A subnet's evaluation on the device, the same on the CPU, its frozen program on every executor."""
    from nasq.deploy import bundle
    from nasq.deploy.cuda_runtime import CudaRuntime
    from nasq.deploy.integer_network import IntegerNetwork
    from nasq.deploy.reference import Reference

    names = (("resnet20",) if small else ("resnet20", "mobilenet_v3", "autoformer", "digits_mobile", "darts"))[part]
    compared = 0
    for name in names:
        for seed in range(1 if small else 5):
            network, x = _network(name, device, seed, (2, 4, 8))
            evaluated = network.integers(x)
            program = nasq.quant.freeze(network)
            with tempfile.TemporaryDirectory() as folder:
                bundle.write(Path(folder) / "bundle", program)
                wanted = torch.from_numpy(Reference(Path(folder) / "bundle").run(x.cpu().numpy()))
            where = f"{name}, seed {seed}"
            equal(evaluated.cpu(), wanted, f"{where}, evaluation against the reference")
            equal(IntegerNetwork(program).to(device).integers(x).cpu(), wanted, f"{where}, nasq.load()")
            runtime = CudaRuntime(program, device)
            for call in ("eager", "captured", "replayed"):
                equal(torch.from_numpy(runtime.run(x.cpu().numpy())), wanted, f"{where}, nasq-cuda, {call}")
            equal(network.cpu().integers(x.cpu()), wanted, f"{where}, the same network on the CPU")
            compared += 1
    return f"{compared} subnets of {', '.join(names)}"


@check
def fake_quantization(device: torch.device, small: bool) -> str:
    from nasq.cuda import rounding
    from nasq.quant import fake

    shapes = [(2, 5, 9, 7)] if small else [(32, 64, 56, 56), (7, 3, 5, 5), (1, 1, 1, 4099)]
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        for last in (False, True):
            x = torch.randn(shape, generator=generator).to(device)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            steps = (torch.rand(len(x), 1, 1, 1, generator=generator) * 0.2 + 0.05).to(device)
            zero = torch.full((), 3.0, device=device)
            cases = [(steps[0, 0, 0, 0], -8.0, 7.0), (steps, -2.0, 1.0), (steps[0, 0, 0, 0], -zero, 15 - zero)]
            for step, low, high in cases:
                g = torch.randn(shape, generator=generator).to(device)
                results = []
                for kernels in (True, False):
                    served = fake._served
                    fake._served = served if kernels else lambda *rest: False
                    try:
                        expect(not kernels or served(x, step, low, high), "the kernel refuses the tensor")
                        leaves = [x.clone().requires_grad_(), step.clone().requires_grad_()]
                        y = fake.fake_quantize(leaves[0], leaves[1], low, high)
                        y.backward(g)
                    finally:
                        fake._served = served
                    results.append((y.detach(), leaves[0].grad, leaves[1].grad))
                expect(torch.equal(results[0][0], results[1][0]), "outputs differ")
                expect(torch.equal(results[0][1], results[1][1]), "the gradients of the input differ")
                torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-3, atol=1e-3 * x.numel() ** 0.5)
    half = torch.randn(1000, generator=generator).to(device).to(torch.bfloat16)
    made = rounding.forward(half, torch.tensor([0.1], device=device), -8.0, 7.0)
    wanted = ((half.float() / torch.tensor(0.1, device=device)).clamp(-8, 7).round() * 0.1).to(torch.bfloat16)
    torch.testing.assert_close(made, wanted, rtol=2**-7 if small else 0, atol=0)
    return "outputs and input gradients equal bit for bit"


def _step(network: Any, x: Tensor, y: Tensor) -> tuple[float, list[Tensor]]:
    network.train()
    network.zero_grad(set_to_none=True)
    loss = F.cross_entropy(network(x), y)
    loss.backward()
    return float(loss.detach()), [p.grad.detach().cpu() for p in network.parameters() if p.grad is not None]


@check
def a_training_step(device: torch.device, small: bool) -> str:
    """Against the CPU in fp32 without TF32, and against itself."""
    network, x = _network("resnet20", torch.device("cpu"), 0, (4, 8))
    y = torch.arange(len(x)) % 2
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True, benchmark=False):
        wanted = _step(copy.deepcopy(network), x, y)
        there = [copy.deepcopy(network).to(device) for _ in range(2)]
        first, second = (_step(one, x.to(device), y.to(device)) for one in there)
    expect(abs(first[0] - wanted[0]) < 1e-3 * abs(wanted[0]), f"loss {first[0]} on the device, {wanted[0]} on the CPU")
    far = [float((a - b).norm() / b.norm().clamp_min(1e-6)) for a, b in zip(first[1], wanted[1], strict=True)]
    # A rounding of 1e-7 flips some integers at ties, which moves single gradients by far more.
    expect(float(np.median(far)) < 0.02, f"gradients differ by {np.median(far):.3g} in the median")
    expect(first[0] == second[0], "two runs of one step give different losses")
    same = sum(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    return f"median relative difference of gradients {np.median(far):.2g}; {same} of {len(far)} repeat bit for bit"


@check
def training_goes_on_where_it_was(device: torch.device, small: bool) -> str:
    """Two epochs, against one, a stop, and another; with importance of paths and of data."""
    from nasq.training import TrainConfig, Trainer

    whole_data = nasq.data.load("digits")
    parts_of = {part: getattr(whole_data, part) for part in ("train", "validation", "test")}
    few = {part: type(split)(split.images[:192], split.labels[:192]) for part, split in parts_of.items()}
    data = nasq.data.DataSet.from_splits("digits", whole_data.classes, **few)

    def trainer(folder: Path, epochs: int) -> Any:
        torch.manual_seed(0)
        network = plugins.load("search_spaces", "digits_mobile")()
        config = TrainConfig(epochs=2, sampler="importance", data_sampler="importance", bf16=False)
        made = Trainer(nasq.Supernet(network), data, config, folder, device=device)
        made.run(until=epochs)
        return made

    with (
        tempfile.TemporaryDirectory() as folder,
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True, benchmark=False),
    ):
        whole = trainer(Path(folder) / "whole", 2)
        trainer(Path(folder) / "parts", 1)
        parts = trainer(Path(folder) / "parts", 2)
    pairs = zip(whole.supernet.state_dict().values(), parts.supernet.state_dict().values(), strict=True)
    wrong = sum(not torch.equal(a, b) for a, b in pairs)
    expect(wrong == 0, f"{wrong} tensors differ after the stop")
    return "every tensor equal bit for bit"


@check
def per_sample_gradients(device: torch.device, small: bool) -> str:
    """GradSign's score, which counts the signs of every sample's gradients, on the device and on the CPU."""
    proxy = plugins.load("proxies", "gradsign")()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(8, 10),
    )  # fmt: skip
    x, y = torch.randn(16, 3, 12, 12), torch.arange(16) % 10
    wanted = proxy.score(copy.deepcopy(model), (x, y))
    found = proxy.score(model.to(device), (x.to(device), y.to(device)))
    expect(abs(found - wanted) <= 2e-3 * abs(wanted), f"{found} on the device, {wanted} on the CPU")
    return f"{found:.6g} and {wanted:.6g}"


def judged(name: str, device: torch.device) -> dict[str, str]:
    """What a check finds, in this process."""
    try:
        return {"check": name, "state": "ok", "detail": CHECKS[name](device, device.type == "cpu")}
    except Exception as error:
        traceback.print_exc()
        return {"check": name, "state": "FAILED", "detail": f"{type(error).__name__}: {error}"[:400]}


def in_a_process(name: str, device: str, until: float) -> dict[str, str]:
    """What a check finds, in a process of its own, however that ends."""
    left = until - time.monotonic()
    if left <= 0:
        raise TimeIsUp
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "row.json"
        command = [sys.executable, "-m", "scripts.benchmarks.gpu_correctness", "--device", device, "--here", name]
        try:
            done = subprocess.run(
                [*command, "--out", str(made)], capture_output=True, text=True, timeout=min(LONGEST, left), check=False
            )
        except subprocess.TimeoutExpired as error:
            if left < LONGEST:
                raise TimeIsUp from error
            return {"check": name, "state": "FAILED", "detail": f"it took more than {LONGEST:.0f} s"}
        if made.exists():
            row: dict[str, str] = read_json(made)
            if row["state"] != "ok":
                print(done.stderr[-3000:], file=sys.stderr, flush=True)
            return row
    said = done.stderr.strip().splitlines()
    return {"check": name, "state": "FAILED", "detail": f"exit {done.returncode}: {said[-1] if said else ''}"[:400]}


class Results:
    """The rows of ``--out``, written after every one.

    Args:
        path: Of the file; ``None``: they are only shown.
        device: What is checked; rows of another one, or of other code, are dropped.
    """

    def __init__(self, path: Path | None, device: str) -> None:
        self.path, self.device, self.code = path, device, code()
        found = read_json(path) if path is not None and path.exists() else {}
        same = (found.get("device"), found.get("code")) == (device, self.code)
        kept = found.get("checks", []) if same else []
        self.rows = {row["check"]: row for row in kept if row["check"] in CHECKS and row["state"] == "ok"}

    def add(self, row: dict[str, str]) -> None:
        self.rows[row["check"]] = row
        print(f"{row['state']:6} {row['check']}: {row['detail']}", flush=True)
        if self.path is not None:
            facts = {
                "device": self.device,
                "code": self.code,
                "environment": environment(torch.get_num_threads()) | compilers(),
            }
            ordered = [self.rows[name] for name in CHECKS if name in self.rows]
            write_json(
                self.path, {**facts, "checks": ordered, "missing": [name for name in CHECKS if name not in self.rows]}
            )


def code() -> str:
    """Tells the code that was checked from any other: a digest of nasq's modules and of these scripts."""
    root = Path(__file__).parents[2]
    files = [*(root / "nasq").rglob("*.py"), *(root / "scripts" / "benchmarks").glob("gpu_*.py")]
    total = hashlib.sha256()
    for path in sorted(files):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


def compilers() -> dict[str, object]:
    """What stands between the kernels and the device."""
    import triton

    return {"cuda": torch.version.cuda, "triton": triton.__version__}


def run(names: Sequence[str], device: str, jobs: int, seconds: float, results: Results) -> bool:
    """Runs checks, several at a time; returns whether all could be run in time."""
    until, finished = time.monotonic() + seconds, True
    with ThreadPoolExecutor(jobs) as pool:
        for task in as_completed([pool.submit(in_a_process, name, device, until) for name in names]):
            try:
                results.add(task.result())
            except TimeIsUp:
                finished = False
    return finished


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="CHECK", help="names, or how they begin")
    parser.add_argument(
        "--jobs", type=int, default=min(8, max(1, (os.cpu_count() or 1) // 2)), help="processes at a time"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop in time, and go on in the next call")
    parser.add_argument("--here", metavar="CHECK", help=argparse.SUPPRESS)
    parser.add_argument("--code", action="store_true", help="print a digest of the code that is checked")
    options = parser.parse_args()
    if options.code:
        print(code())
        return 0
    os.environ[SWITCH] = "1"
    device = torch.device(options.device)
    if options.here is not None:
        torch.set_num_threads(1 if device.type == "cpu" else 2)
        row = judged(options.here, device)
        write_json(options.out, row)
        return int(row["state"] != "ok")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    wanted = [name for name in CHECKS if not options.only or any(name.startswith(part) for part in options.only)]
    if not wanted:
        print(f"no check is called {' or '.join(options.only)}. There are: {', '.join(CHECKS)}.", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    results = Results(options.out, name)
    left = [one for one in wanted if one not in results.rows]
    finished = run(left, options.device, options.jobs, options.seconds, results)
    failed = [one for one in wanted if one in results.rows and results.rows[one]["state"] != "ok"]
    print(json.dumps({"device": name, "failed": failed, "ok": len(results.rows) - len(failed), "finished": finished}))
    return 1 if failed else 0 if finished else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
