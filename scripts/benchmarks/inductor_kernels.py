"""What Inductor makes of quantized networks: equal integers, which kernels, and how fast; evidence for `inductor-x86`.

Usage: ``python -m scripts.benchmarks.inductor_kernels [--networks residual random tokens] [--images 256] [--rounds 15]
[--speed resnet18 --size 224 --batch 1] [--out FILE.json]`` (needs a C++ compiler)

``integers``  compiled networks of every operation and of 2 to 8 bits against the NumPy reference
``kernels``   the implementations that oneDNN chose for their convolutions, from its own log, in a child process
``seconds``   processor time of compiling: this process, and the compiler's
``speed``     an int8 network of torchvision beside the same in fp32, compiled with frozen weights; processor times of calls
              in turn (other programs on the machine lengthen wall time)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nasq import Supernet
from nasq.deploy import bundle
from nasq.deploy.bench import environment, median_interval
from nasq.deploy.float_forms import compiled_form
from nasq.deploy.inductor import Inductor, integer_coverage
from nasq.deploy.reference import Reference
from nasq.files import write_json
from nasq.quant import calibrate, freeze, quantize
from nasq.quant.program import Program
from scripts.benchmarks.runtime_speed import network
from tests.deploy.programs import random_input, random_program, residual_program
from tests.deploy.token_programs import cnn_program, vit_program

PROGRAMS: dict[str, Callable[[], Program]] = {
    "residual 8/8": lambda: residual_program(1, 8, 8),
    "residual 3/5": lambda: residual_program(2, 3, 5),
    "residual 2/2": lambda: residual_program(3, 2, 2),
    "random mixed 0": lambda: random_program(0, size=14),
    "random mixed 1": lambda: random_program(1, size=14),
    "squeeze-excite": lambda: cnn_program(0),
    "attention": lambda: vit_program(0),
}


def seconds() -> tuple[float, float]:
    """Processor seconds of this process and of those it started and waited for."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, others.ru_utime + others.ru_stime


def integers(program: Program, images: int) -> dict[str, Any]:
    """A compiled program against the reference, on random images."""
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        bundle.write(Path(scratch) / "b", program)
        x = random_input(program, images, 3)
        wanted = Reference(Path(scratch) / "b").run(x)
    began = seconds()
    got = Inductor(program, batch=min(images, 64)).run(x)
    spent = [round(after - before, 1) for after, before in zip(seconds(), began, strict=True)]
    cover = integer_coverage(program)
    return {
        "operations": len(program.ops), "final integers": wanted.size, "differ": int((wanted != got).sum()),
        "different values": len(np.unique(wanted)), "kernels": dict(cover.kernels), "in float": list(cover.floats),
        "compiling, processor seconds (here, compiler)": spent,
    }  # fmt: skip


_CHILD = "import sys; from scripts.benchmarks.inductor_kernels import log_of; log_of(sys.argv[1:])"


def log_of(names: list[str]) -> None:
    """Runs programs once, operation by operation: oneDNN writes its log to standard output."""
    for name in names:
        program = PROGRAMS[name]()
        Inductor(program, compile=False).run(random_input(program, 8, 0))


def kernels(names: list[str]) -> dict[str, int]:
    """The implementations that oneDNN chose for the convolutions of these programs, and how often each ran."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *names], env={**os.environ, "ONEDNN_VERBOSE": "1"}, capture_output=True, check=True,
        text=True,
    )  # fmt: skip
    lines = [line.split(",") for line in done.stdout.splitlines() if ",exec," in line and ",convolution," in line]
    found = Counter(line[line.index("convolution") + 1] for line in lines)
    assert found, done.stdout[-2000:]
    return dict(found)


def speed(name: str, size: int, batch: int, rounds: int) -> dict[str, Any]:
    """The network of torchvision in int8 and in fp32, both compiled; milliseconds of processor time."""
    model, images = network(name, size)
    made = quantize(model, images[:1], "inductor-x86", weight_bits=(8,), activation_bits=(8,))
    calibrate(made, images[:2])
    supernet = Supernet(made.eval())
    with supernet.activate(supernet.space.largest()), torch.no_grad():
        program, wanted = freeze(made), made.integers(images[:batch]).numpy()
    began = seconds()
    runtime = Inductor(replace(program), batch=batch)
    x: NDArray[np.float32] = images[:1].expand(batch, *images.shape[1:]).contiguous().numpy()
    same = int((runtime.run(images[:batch].numpy()) != wanted).sum())
    spent = [round(after - before, 1) for after, before in zip(seconds(), began, strict=True)]
    calls: dict[str, Callable[[NDArray[np.float32]], Any]] = {"fp32": compiled_form(model), "int8": runtime.run}
    times: dict[str, list[float]] = {key: [] for key in calls}
    for turn in range(rounds + 2):
        for key, call in calls.items():
            start = time.process_time()
            call(x)
            times[key] += [1e3 * (time.process_time() - start)] if turn > 1 else []
    ratios = [a / b for a, b in zip(times["fp32"], times["int8"], strict=True)]
    return {
        "network": name, "size": size, "batch": batch, "differ from nasq's evaluation": [same, wanted.size],
        "compiling, processor seconds (here, compiler)": spent, "ms": {key: median(own) for key, own in times.items()},
        "fp32 by int8": [median(ratios), *median_interval(ratios)], "kernels": dict(integer_coverage(program).kernels),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--speed", nargs="*", choices=["resnet18", "mobilenet_v2"], default=[])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"environment": environment(1), "networks": {}, "speed": []}
    for name in options.networks:
        result["networks"][name] = integers(PROGRAMS[name](), options.images)
        sys.stderr.write(f"{name}: {json.dumps(result['networks'][name])}\n")
    if options.networks:
        result["implementations of convolutions"] = kernels(options.networks)
    for name in options.speed:
        result["speed"].append(speed(name, options.size, options.batch, options.rounds))
        sys.stderr.write(f"{json.dumps(result['speed'][-1])}\n")
    if options.out:
        write_json(options.out, result)
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
