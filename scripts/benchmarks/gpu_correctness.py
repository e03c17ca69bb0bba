"""Is everything that nasq computes on a CUDA device right? One check per path; nothing is timed.

    python -m scripts.benchmarks.gpu_correctness [--out FILE.json] [--device cuda]

Integers are compared with int64 or float64 sums and with the NumPy reference, and have to be equal; training is compared
with the CPU, within the rounding of fp32. Every tile that the autotuner may choose is checked, not only the one it chose.
``--device cpu`` goes through the same checks on small sizes with interpreted kernels (``TRITON_INTERPRET=1``), which shows
that the checks run and says nothing about a device.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import nasq
from nasq import plugins
from nasq.cuda.support import SWITCH
from nasq.deploy.bench import environment
from nasq.files import write_json

Check = Callable[[torch.device, bool], str]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Integers, wherever they are held."""
    wrong = int((found.double() != wanted.double()).sum())
    expect(wrong == 0, f"{what}: {wrong} of {wanted.numel()} integers differ")


def every_tile(kernel: Any) -> Iterator[str]:
    """The kernel with each of its configurations in turn; afterwards as it was."""
    configs = kernel.configs
    try:
        for config in configs:
            kernel.configs = [config]
            kernel.cache.clear()
            yield str(config)
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


@check
def matrix_products(device: torch.device, small: bool) -> str:
    from nasq.cuda import kernels, ops

    sizes = [(19, 21, 50)] if small else [(4096, 1024, 1024), (257, 384, 1536), (1000, 1003, 77), (17, 4096, 4096)]
    tiles = 0
    for rows, columns, depth in sizes:
        a, b = integers(device, 1, rows, depth), integers(device, 1, columns, depth, seed=1)
        bias = torch.arange(columns, dtype=torch.int32, device=device) * 37 - 999
        acc = (a[0].double() @ b[0].double().T).round() + bias
        epilogue = ops.Epilogue(fitting(acc, columns, device), -128, 100, 0)
        for tile in every_tile(kernels.gemm_kernel):
            where = f"{rows}x{columns}x{depth}, {tile}"
            equal(ops.gemm(a, b, bias)[0], acc, where)
            equal(ops.gemm(a, b, bias, epilogue)[0], placed(acc, epilogue.scale, -128, 100, 0), where)
            tiles += 1
        both = (a[0].double() + 128) @ (b[0].double() + 77).T
        equal(ops.gemm(a, b, extra=(128, 77))[0], both.round(), "products of two offset tensors")
    return f"{tiles} pairs of size and tile"


@check
def thin_products(device: torch.device, small: bool) -> str:
    from nasq.cuda import nibbles, ops, thin

    sizes = [(5, 21, 50)] if small else [(1, 4096, 4096), (16, 4096, 11008), (33, 1003, 1001), (200, 512, 384)]
    tiles = 0
    for rows, columns, depth in sizes:
        x = integers(device, rows, depth)
        narrow, wide = (integers(device, columns, depth, low=low, high=-low - 1, seed=1) for low in (-8, -128))
        shift = (torch.arange(columns, device=device) % 5).int()
        bias = torch.arange(columns, dtype=torch.int32, device=device) * 11 - 99
        for packed, weight in ((True, narrow), (False, wide)):
            shifts = shift if packed else torch.zeros_like(shift)
            acc = (x.double() @ weight.double().T).round() * 2.0**shifts + bias
            held = nibbles.pack_w4(weight) if packed else weight
            epilogue = ops.Epilogue(fitting(acc, columns, device), 0, 127, -100)
            for tile in every_tile(thin.thin_kernel):
                for split in (0, 1, 8):
                    where = f"{rows}x{columns}x{depth}, packed={packed}, split={split}, {tile}"
                    equal(ops.thin_gemm(x, held, shifts, bias, packed=packed, split=split), acc, where)
                    made = ops.thin_gemm(x, held, shifts, bias, epilogue, packed=packed, split=split)
                    equal(made, placed(acc, epilogue.scale, 0, 127, -100), where)
                tiles += 1
    return f"{tiles} pairs of size and tile, three splits each"


@check
def convolutions(device: torch.device, small: bool) -> str:
    from nasq.cuda import kernels, ops

    cases = [(2, 5, 7, 8, 3, 1, 1, 1, 1), (1, 40, 4, 6, 3, 2, 1, 2, 1), (1, 8, 5, 8, 3, 1, 0, 1, 2)]
    if not small:
        cases = [
            (32, 3, 224, 64, 7, 2, 3, 1, 1), (16, 128, 28, 128, 3, 1, 1, 1, 1), (16, 256, 28, 512, 1, 2, 0, 1, 1),
            (4, 100, 17, 130, 3, 2, 2, 2, 1), (8, 64, 14, 96, 3, 1, 1, 1, 4), (2, 512, 7, 512, 3, 1, 1, 1, 1),
        ]  # fmt: skip
    tiles = 0
    for n, c, side, out, k, s, p, d, groups in cases:
        for pad in (0, -128):
            x, w = integers(device, n, c, side, side), integers(device, out, c // groups, k, k, seed=1)
            bias = torch.arange(out, dtype=torch.int32, device=device) * 37 - 999
            padded = F.pad(x.double(), (p, p, p, p), value=pad)
            acc = F.conv2d(padded, w.double(), None, s, 0, d, groups).round() + bias[:, None, None]
            epilogue = ops.Epilogue(fitting(acc, out, device), -128, 100, 0)
            wanted = placed(acc, epilogue.scale[:, None, None], -128, 100, 0)
            geometry: dict[str, Any] = {"stride": (s, s), "padding": (p, p), "dilation": (d, d), "pad": pad}
            for tile in every_tile(kernels.conv_kernel):
                where = f"{n}x{c}x{side}x{side} to {out}, {k}x{k}, stride {s}, groups {groups}, pad {pad}, {tile}"
                held = w.permute(0, 2, 3, 1).contiguous()
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
        for tile in every_tile(kernels.depthwise_kernel):
            held = w[:, 0].permute(1, 2, 0).contiguous()
            made = ops.depthwise(x, held, bias, stride=(s, s), padding=(p, p), pad=-128)
            equal(made, acc, f"{n}x{c}x{side}, {k}x{k}, {tile}")
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


@check
def integer_evaluation_and_export(device: torch.device, small: bool) -> str:
    """A subnet's evaluation on the device, the same on the CPU, its frozen program on every executor."""
    from nasq.deploy import bundle
    from nasq.deploy.cuda_runtime import CudaRuntime
    from nasq.deploy.integer_network import IntegerNetwork
    from nasq.deploy.reference import Reference

    names = ("resnet20",) if small else ("resnet20", "mobilenet_v3", "autoformer", "digits_mobile", "darts")
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


def run(device: torch.device, names: list[str]) -> list[dict[str, str]]:
    rows = []
    for name, function in CHECKS.items():
        if names and name not in names:
            continue
        try:
            row = {"check": name, "state": "ok", "detail": function(device, device.type == "cpu")}
        except Exception as error:
            traceback.print_exc()
            row = {"check": name, "state": "FAILED", "detail": f"{type(error).__name__}: {error}"[:400]}
        rows.append(row)
        print(f"{row['state']:6} {row['check']}: {row['detail']}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], metavar="CHECK")
    options = parser.parse_args()
    os.environ[SWITCH] = "1"
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    rows = run(device, options.only)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if options.out is not None:
        write_json(options.out, {"device": name, "environment": environment(torch.get_num_threads()), "checks": rows})
    print(json.dumps({"device": name, "failed": sum(row["state"] != "ok" for row in rows), "checks": len(rows)}))
    return 1 if any(row["state"] != "ok" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
