"""Forward time of a subnet's integer form over that of the same subnet in fp32, batch 256, on the CPU.

Usage: ``python -m scripts.benchmarks.integer_cost [--networks resnet20 ...] [--batch 256] [--rounds 7] [--profile]``

``evaluation`` is what ranking and search run (the extracted quantized network in evaluation mode), ``loaded`` what
:func:`nasq.load` makes of the bundle; both compute container integers held in fp32. ``fp32`` is the same architecture without
quantization, with BatchNorm as a layer of its own, as torch runs it. All three run in turn in every round, and the ratios are
those of processor times within a round: what else the machine does lengthens both sides. Weights and images are random, as
times do not depend on them; both integer forms are compared with the reference on two images first. Bits are mixed: a random
subnet's; ``wide`` says how many layers pass 2^24 and accumulate in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nasq
from nasq import plugins
from nasq.deploy import bundle
from nasq.deploy.bench import environment, median_interval
from nasq.deploy.reference import Reference
from nasq.files import write_json
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.quant.program import Linear

NETWORKS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "resnet20": ("resnet20", {"elastic": False}, (3, 32, 32)),
    "mobilenet_v3": ("mobilenet_v3", {"width": 0.5, "num_classes": 10, "resolutions": ()}, (3, 64, 64)),
    "digits_mobile": ("digits_mobile", {}, (1, 8, 8)),
    "resnet20_wide": ("resnet20", {"elastic": False, "base": 128}, (3, 16, 16)),
}
"""Space, its arguments, input shape; with 8 bits (``--bits 8``), sums of the last one pass 2^24 (``--batch 16``)."""


def pair(name: str, bits: tuple[int, ...]) -> tuple[nn.Module, QuantizedNetwork, Tensor]:
    """The largest architecture in fp32 and quantized, with random bits, and images."""
    space, arguments, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = plugins.load("search_spaces", space)(**arguments)
    images = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.train()(images)  # BatchNorm sees plausible statistics
    network.eval()
    supernet = nasq.Supernet(quantize(network, images[:1], weight_bits=bits, activation_bits=bits))
    assert isinstance(supernet.module, QuantizedNetwork)
    calibrate(supernet.module, images)
    largest, drawn = supernet.space.largest(), supernet.space.sample(torch.Generator().manual_seed(2))
    wanted = {key: drawn.get(key, value) if key.endswith("_bits") else value for key, value in largest.items()}
    subnet = supernet.space.to_subnet(supernet.space.to_rows([wanted])[0])
    quantized = supernet.eval().extract(subnet)
    assert isinstance(quantized, QuantizedNetwork)
    plain = nasq.Supernet(network)
    own = {key: value for key, value in subnet.items() if key in plain.space.positions}
    return plain.extract(own).eval(), quantized.eval(), images


def checked(quantized: QuantizedNetwork, images: Tensor, last: bool) -> tuple[nn.Module, int]:
    """The bundle's module, and how many of its layers are wide; raises where an integer form is not the reference."""
    program = freeze(quantized)
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        bundle.write(Path(scratch) / "b", program)
        loaded, wanted = nasq.load(Path(scratch) / "b"), Reference(Path(scratch) / "b").run(images[:2].numpy())
    x = images[:2].to(memory_format=torch.channels_last) if last else images[:2]
    for what, found in (("evaluation", quantized.integers(x)), ("loaded", loaded.integers(x))):
        wrong = int((found.numpy() != wanted).sum())
        if wrong:
            raise AssertionError(f"{what}: {wrong} of {wanted.size} integers are not the reference's")
    return loaded, sum(isinstance(op, Linear) and op.wide for op in program.ops)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each call, in rotating order; two rounds are not counted."""
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 2):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            began = time.process_time()
            calls[name]()
            if turn >= 2:
                found[name].append(time.process_time() - began)
    return found


def measure(name: str, batch: int, rounds: int, last: bool, bits: tuple[int, ...]) -> dict[str, Any]:
    plain, quantized, images = pair(name, bits)
    loaded, wide = checked(quantized, images, last)
    x = torch.randn(batch, *images.shape[1:], generator=torch.Generator().manual_seed(3))
    x = x.to(memory_format=torch.channels_last) if last else x
    if last:
        plain = plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls: dict[str, Callable[[], object]] = {
        "fp32": lambda: plain(x), "evaluation": lambda: quantized(x), "loaded": lambda: loaded(x),
    }  # fmt: skip
    times = timed(calls, rounds)
    row: dict[str, Any] = {"network": name, "batch": batch, "bits": list(bits), "channels_last": last, "wide": wide}
    row |= {f"{key} ms": 1e3 * statistics.median(values) for key, values in times.items()}
    row |= {f"{key} least ms": 1e3 * min(values) for key, values in times.items()}
    for key in ("evaluation", "loaded"):
        ratios = [a / b for a, b in zip(times[key], times["fp32"], strict=True)]
        row |= {f"{key} / fp32, least times": min(times[key]) / min(times["fp32"])}
        row |= {f"{key} / fp32": statistics.median(ratios), f"{key} / fp32, 95 %": list(median_interval(ratios))}
    return row


def profiled(name: str, batch: int, bits: tuple[int, ...]) -> str:
    """Which of torch's operators the evaluation and the fp32 network spend their time in."""
    plain, quantized, images = pair(name, bits)
    x = torch.randn(batch, *images.shape[1:])
    text = []
    for model in (plain, quantized):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            model(x)
        text.append(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS)[:3])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--profile", action="store_true", help="show where the time goes, and time nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bits, rows = tuple(options.bits), []
    with torch.no_grad():
        for name in options.networks:
            if options.profile:
                sys.stdout.write(profiled(name, options.batch, bits))
                continue
            rows.append(measure(name, options.batch, options.rounds, options.channels_last, bits))
            sys.stderr.write(json.dumps(rows[-1]) + "\n")
    result = {"rows": rows, "environment": environment(1), "numpy": np.__version__}
    if options.out:
        write_json(options.out, result)
    if rows:
        json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
