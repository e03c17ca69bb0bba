"""Measures what OpenVINO's integer kernels compute on this machine: evidence for the target `openvino-cpu`.

Run from the repository's root: `python -m scripts.benchmarks.probe_openvino [--networks 4]` (a few minutes; needs the extra
`openvino`). Whole networks are run as they would be shipped, then every layer alone on the reference's own integers. A layer
that differs has to be one step off where the exact value, computed in float64, lies within 1e-5 of a rounding tie. Counts of
kernels are asserted on the graph that the plugin executes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import bundle, engines, openvino, readback
from nasq.deploy.bench import environment
from nasq.deploy.onnx import export
from nasq.deploy.reference import Reference
from nasq.deploy.ties import at_tie, exact
from nasq.quant.program import Conv, Linear, Program
from tests.deploy.programs import (
    KINDS,
    fused_program,
    in_powers_of_two,
    random_input,
    random_program,
    residual_program,
)
from tests.deploy.token_programs import cnn_program, vit_program

Integers = NDArray[np.uint8]
failures: list[str] = []


def row(what: str, total: int, differing: int, note: str = "", right: bool = True) -> None:
    print(f"{what:58s} {total:>11,d} {differing:>8,d}  {note}", flush=True)
    if not right:
        failures.append(what)


def reference(program: Program, images: NDArray[np.float32]) -> dict[str, Integers]:
    with tempfile.TemporaryDirectory() as scratch:
        bundle.write(Path(scratch) / "b", program)
        return Reference(Path(scratch) / "b").run(images, every=True)


def untied(program: Program) -> Program:
    """The same network with steps that are no simple fraction of a value that occurs, as learned steps are not.

    The programs of the tests take a tensor's step from its largest value: at 2 bits many of a channel's values may then lie
    at a rounding tie, on either side of which implementations fall. What keeps its input's grid keeps it here as well.
    """

    def moved(scale: float) -> float:
        share = int(np.float32(scale).view(np.int32)) % 997 / 997
        return float(np.float32(scale * (1 + 0.01 * share)))

    return replace(
        program, ops=tuple(replace(op, output=replace(op.output, scale=moved(op.output.scale))) for op in program.ops)
    )


def alone(program: Program, count: int, seed: int, totals: dict[str, Counter[str]]) -> None:
    """Every layer of a program on the reference's integers, counted by kind."""
    images = random_input(program, count, seed)
    values, file = reference(program, images), readback.read(export(program, packed=False))
    names = {layer.output: op.output.name for layer, op in zip(file.layers, program.ops, strict=True)}
    for index, (op, layer) in enumerate(zip(program.ops, file.layers, strict=True)):
        feeds = {name: values[names[name]] if name in names else images for name in layer.inputs}
        found = openvino.run_cut(file.cut(index), feeds)
        wanted = values[op.output.name][: len(found)]
        step = np.abs(found.astype(np.int64) - wanted)
        kind = op.kind + (" + shortcut" if isinstance(op, Conv) and len(op.inputs) == 2 else "")
        counts = totals.setdefault(kind, Counter())
        counts.update(total=step.size, differing=int((step != 0).sum()), far=int((step > 1).sum()))
        if isinstance(op, Linear) and step.any():
            sources, given = [program.tensor(name) for name in op.inputs], [values[name] for name in op.inputs]
            counts.update(off=int((~at_tie(exact(op, sources, given, np.argwhere(step)))).sum()))


def layers(what: str, make: Callable[[int], Program], networks: int) -> None:
    totals: dict[str, Counter[str]] = {}
    for seed in range(networks):
        alone(untied(make(seed)), 16, seed, totals)
    for kind, counts in totals.items():
        right = counts["differing"] <= max(1, counts["total"] // 100_000) and not counts["far"] and not counts["off"]
        note = f"{counts['far']} by more than one step, {counts['off']} away from a tie" if counts["differing"] else ""
        row(f"{what}, alone: {kind}", counts["total"], counts["differing"], note, right)


def whole(what: str, programs: list[Program], exact: bool = False) -> None:
    """Final integers of whole files, and every convolution and sum an integer kernel."""
    total = wrong = images = same = equal = 0
    for program in programs:
        x = random_input(program, 128, 7)
        wanted, data = reference(program, x)[program.output.name], export(program)
        engine = engines.engine_of(program)
        found = engine.open(data, 1, {}, 256).run(x)
        coverage = engine.coverage(data, program, None)
        if coverage.integer != coverage.total:
            failures.append(f"{what}: in float {coverage.floats}")
        total, wrong, images = total + found.size, wrong + int((found != wanted).sum()), images + len(x)
        equal += int((found == wanted).all(1).sum())
        same += int((found.argmax(1) == wanted.argmax(1)).sum())
    note = f"{equal} of {images} images equal, {same} of the same class"
    row(f"{what}: final integers", total, wrong, note, not wrong or not exact)


def counterexamples() -> None:
    """What the target forbids, and what would happen."""
    program = residual_program(0, 8, 8)
    x = random_input(program, 40, 7)
    found = openvino.OpenVino(export(program, packed=False)).run(x)
    wrong = int((found != reference(program, x)[program.output.name]).sum())
    row("written with both inputs of sums quantized", found.size, wrong, "<- refused", wrong > 0)
    low = fused_program(residual_program(0, 4, 4))
    kernels = openvino.kernel_counts(export(low, packed=True))
    floats = kernels.get("Convolution F32", 0)
    row("weights as a stream of bits: float convolutions", 8, floats, "<- not written", floats > 0)
    tokens = vit_program(0)
    x = random_input(tokens, 16, 7)
    found = openvino.OpenVino(export(tokens, packed=False)).run(x)
    wrong = int((found != reference(tokens, x)[tokens.output.name]).sum())
    row("concatenation with a constant (class token)", found.size, wrong, "<- refused", wrong > 0)


def powers_of_two(networks: int) -> None:
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        programs = []
        for seed in range(networks):
            for bits in (2, 4, 8):
                made = in_powers_of_two(residual_program(seed, bits, bits, 8, (16, 16)))
                programs.append(made if target.startswith("onnx") else fused_program(made))
        whole(f"steps at powers of two, {target}", programs, exact=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=4)
    networks = parser.parse_args().networks
    machine = environment(1)
    print(machine["cpu"], machine["versions"], sep="\n")
    print(f"{'what':58s} {'integers':>11s} {'differ':>8s}")
    for bits in range(2, 9):
        made = [untied(fused_program(residual_program(seed, bits, bits))) for seed in range(networks)]
        whole(f"{bits}/{bits} bits", made)
    powers_of_two(networks)
    counterexamples()
    layers("residual networks", lambda s: fused_program(residual_program(s, 2 + s % 7, 8 - s % 7, 16)), networks)
    layers("random networks", lambda s: random_program(s, len(KINDS)), networks)
    layers("mobile networks", cnn_program, networks)
    if failures:
        raise SystemExit(f"not as nasq assumes: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
