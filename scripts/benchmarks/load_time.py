"""How long a bundle takes to load, beside reading its bytes, and what the time goes into.

Usage: ``python -m scripts.benchmarks.load_time [BUNDLE ...] [--repeats 30] [--out FILE.json]``

Without bundles it makes four, of 0.1, 1.7, 8.7 (ResNet-18 has 11) and 24 million weights (ResNet-50 has 25). The stages run
in turn, so that a machine that slows down slows all of them; times are medians of wall clock, of processor time beside it,
and the least of wall clock: the nearest that a busy machine comes to a quiet one.

``cold``  the same with the files' pages dropped from the cache before each read (Linux; as far as the system follows the
          advice), where reading includes the disk
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from nasq import files
from nasq.deploy import bundle, storage
from nasq.deploy.bench import environment
from nasq.deploy.checks import check_program
from nasq.deploy.program_json import program_from_json
from nasq.quant.packing import unpack
from nasq.quant.program import AvgPool, Conv, Input, Linear, Op, Program, Reshape, Tensor


def synthetic(widths: tuple[int, ...], bits: int, seed: int = 0) -> Program:
    """A chain of 3x3 convolutions of random weights on 8x8 maps, then a classifier of 1,000 classes."""
    rng = np.random.default_rng(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        return Tensor(name, shape, float(np.float32(0.02)), 0, 0, 15, 4)

    def layer(kind: type[Linear], source: Tensor, out: Tensor, shape: tuple[int, ...], **own: object) -> Op:
        half, rows = 1 << (bits - 1), shape[0]
        return kind(
            (source.name,), out, out.name, rng.integers(-half, half, shape).astype(np.int8), bits, np.zeros(rows, np.uint8),
            rng.uniform(0.01, 0.02, rows).astype(np.float32), rng.integers(-99, 99, rows).astype(np.int32), True,
            **own,  # type: ignore[arg-type]
        )  # fmt: skip

    last = tensor("in", (3, 8, 8))
    ops: list[Op] = [Input((), last, "in")]
    for index, width in enumerate(widths):
        made = tensor(f"c{index}", (width, 8, 8))
        plain = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        ops.append(layer(Conv, last, made, (width, last.shape[0], 3, 3), **plain))
        last = made
    pooled, flat = tensor("p", (widths[-1], 1, 1)), tensor("f", (widths[-1],))
    ops += [AvgPool((last.name,), pooled, "p", (8, 8), (8, 8)), Reshape(("p",), flat, "f")]
    ops.append(layer(Linear, flat, tensor("o", (1000,)), (1000, widths[-1])))
    return Program(tuple(ops), "onnxruntime-cpu")


def _drop(directory: Path) -> None:
    """Asks the system to forget the files' pages."""
    for path in directory.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def stages(directory: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each can run alone."""
    own = {bundle.SUBNET: b"", bundle.WEIGHTS: b""}
    storage.verify(directory, own)
    document = files.parse_json(own[bundle.SUBNET], directory)
    arrays = bundle._load_arrays(own[bundle.WEIGHTS])
    program = bundle.read(directory)
    layers = [op for op in program.ops if isinstance(op, Linear)]

    def load_with_a_thread() -> Program:
        """Digests in a thread, the rest meanwhile: what it would bring. (Unchecked until the end: for timing alone.)"""
        with ThreadPoolExecutor(1) as pool:
            read = {path.name: path.read_bytes() for path in directory.iterdir()}
            digests = pool.submit(lambda: [storage.digest(data) for data in read.values()])
            parsed = files.parse_json(read[bundle.SUBNET], directory)
            program = program_from_json(parsed, bundle._load_arrays(read[bundle.WEIGHTS]))
            digests.result()
        return program

    def unpack_all() -> None:
        for index, op in enumerate(layers):
            unpack(arrays[f"w{index}"], op.weight.shape, op.weight_bits)

    return {
        "read the bytes": lambda: [path.read_bytes() for path in directory.iterdir()],
        "load": lambda: bundle.read(directory),
        "load, digests in a thread": load_with_a_thread,
        "of it: read and SHA-256": lambda: storage.verify(directory, dict.fromkeys(own, b"")),
        "of it: JSON": lambda: files.parse_json(own[bundle.SUBNET], directory),
        "of it: safetensors": lambda: bundle._load_arrays(own[bundle.WEIGHTS]),
        "of it: schema, unpacking, checks": lambda: program_from_json(document, arrays),
        "of that: unpacking": unpack_all,
        "of that: checks": lambda: check_program(program),
    }


def measure(directory: Path, repeats: int, cold: bool) -> dict[str, dict[str, float]]:
    """Median milliseconds per stage, wall clock and processor."""
    found = stages(directory)
    names = list(found)[:3] if cold else list(found)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            if cold:
                _drop(directory)
            began = time.perf_counter(), time.process_time()
            found[name]()
            times[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    medians = {
        name: {
            "wall ms": 1e3 * statistics.median(w for w, _ in own),
            "cpu ms": 1e3 * statistics.median(c for _, c in own),
            "least wall ms": 1e3 * min(w for w, _ in own),
        }
        for name, own in times.items()
    }
    for name in names[1:3]:
        for clock in ("wall ms", "cpu ms", "least wall ms"):
            medians[name][clock.replace("ms", "ratio")] = medians[name][clock] / medians["read the bytes"][clock]
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="*")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, object] = {"environment": environment(1)}
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        places = list(options.bundles)
        if not places:
            sizes = {
                "small": (32, 64, 128), "middle": (128, 256, 256, 256), "large": (256, 512, 512, 512, 512),
                "larger": (512,) * 11,
            }  # fmt: skip
            for name, widths, bits in ((name, widths, 4) for name, widths in sizes.items()):
                bundle.write(Path(scratch) / name, synthetic(widths, bits))
                places.append(Path(scratch) / name)
        for place in places:
            size = sum(path.stat().st_size for path in place.iterdir())
            result[place.name] = {
                "bytes": size, "warm": measure(place, options.repeats, False), "cold": measure(place, options.repeats, True),
            }  # fmt: skip
    if options.out:
        files.write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
