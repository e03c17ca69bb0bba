"""Measures what onnxruntime's integer kernels compute on this machine: evidence for the target `onnxruntime-cpu`.

Run from the repository's root: `python -m scripts.benchmarks.probe_onnxruntime` (under a minute). Every row states how
many integers were compared and how many differ from a formula; the formula that nasq uses must give 0, the others show
that the comparison could have told them apart. Operator counts are asserted on the runtime's optimized graph.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from nasq.deploy import bundle, parity
from nasq.deploy.bench import environment
from nasq.deploy.onnx import export
from nasq.deploy.runtimes import kernel_counts, run_cut
from nasq.errors import ArtifactError
from nasq.quant.program import Add, Conv, Linear, Program
from tests.deploy.programs import KINDS, Maker, random_input, random_program, residual_program

f32 = np.float32
Floats = NDArray[np.float32]
Formulas = dict[str, NDArray[Any]]

failures: list[str] = []


def row(what: str, total: int, differing: int, note: str = "", exact: bool = True) -> None:
    print(f"{what:64s} {total:>10,d} {differing:>9,d}  {note}")
    if exact and differing:
        failures.append(what)


def expect(condition: bool, what: str) -> None:
    print(f"{what:64s} {'yes' if condition else 'NO':>20s}")
    if not condition:
        failures.append(what)


def fma(a: Any, b: Any, c: Any) -> Floats:
    """fp32 ``a * b + c`` rounded once: the product is exact in float64; the sum is rounded to odd, then to fp32."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.broadcast_to(np.float64(c), product.shape)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (np.atleast_1d(total).view(np.int64).reshape(total.shape) & 1) == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(f32)


def clip(steps: NDArray[Any]) -> NDArray[Any]:
    return np.clip(steps, 0, 255)


# -- models of one kernel ---------------------------------------------------------------------------------------------


def kernel(kind: str, grids: Iterable[tuple[float, int]], out: tuple[float, int], **attributes: Any) -> bytes:
    """``DequantizeLinear → kind → QuantizeLinear`` on uint8 inputs ``x0``, ``x1``, ..."""
    nodes, constants, inputs = [], [], []
    for i, (scale, zero) in enumerate([*grids, out]):
        name = f"{i}" if i < len(list(grids)) else "y"
        constants += [numpy_helper.from_array(np.array(scale, f32), f"s{name}")]
        constants += [numpy_helper.from_array(np.array(zero, np.uint8), f"z{name}")]
        if name != "y":
            inputs.append(helper.make_tensor_value_info(f"x{i}", TensorProto.UINT8, ["n", "c", "h", "w"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"x{i}", f"s{i}", f"z{i}"], [f"d{i}"]))
    nodes.append(helper.make_node(kind, [f"d{i}" for i in range(len(inputs))], ["r"], **attributes))
    nodes.append(helper.make_node("QuantizeLinear", ["r", "sy", "zy"], ["y"]))
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    graph = helper.make_graph(nodes, "kernel", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    data: bytes = model.SerializeToString()
    return data


def scales(rng: np.random.Generator, count: int, near_ties: bool) -> list[float]:
    """Random step sizes; ``near_ties`` gives simple ratios to the last one, give or take one unit in the last place."""
    last = f32(0.02 * np.exp(rng.normal()))
    ratios = rng.choice([1 / 4, 1 / 2, 1, 2, 1 / 3, 2 / 3, 3 / 4, 1 / 10, 3 / 2], count - 1)
    off = 1 + rng.integers(-1, 2, count - 1) * 2.0**-23
    others = ratios * off if near_ties else np.exp(rng.normal(size=count - 1))
    return [*(float(f32(f32(last) * f32(other))) for other in others), float(last)]


def zero(rng: np.random.Generator) -> int:
    return int(rng.choice([0, 128, rng.integers(1, 255)]))


def compare(what: str, runs: Iterable[tuple[NDArray[Any], Formulas]], right: str, note: str = "nasq") -> None:
    """Prints each formula's differences over all runs; the ``right`` one must have none."""
    wrong, total = Counter[str](), 0
    for got, formulas in runs:
        total += got.size
        wrong.update({name: int((got != value).sum()) for name, value in formulas.items()})
    for name, count in sorted(wrong.items(), key=lambda item: item[0] != right):
        row(f"{what}: {name}", total, count, f"<- {note}" if name == right else "", exact=name == right)


def sums(rng: np.random.Generator, sets: int) -> Iterable[tuple[NDArray[Any], Formulas]]:
    """QLinearAdd on all 65,536 pairs of integers."""
    pairs = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    a, b = (part.reshape(1, 1, 256, 256) for part in pairs)
    for index in range(sets):
        sa, sb, sy = (f32(scale) for scale in scales(rng, 3, index % 2 == 0))
        za, zb, zy = zero(rng), zero(rng), zero(rng)
        model = kernel("Add", [(sa, za), (sb, zb)], (sy, zy))
        assert kernel_counts(model) == {"QLinearAdd": 1}
        ra, rb = sa / sy, sb / sy
        f = f32(zy) - fma(ra, za, rb * f32(zb))
        real = f32(f32(a - f32(za)) * sa) + f32(f32(b - f32(zb)) * sb)
        yield (
            run_cut(model, {"x0": a, "x1": b}),
            {
                "rne(fma(qa, ra, fma(qb, rb, f)))": clip(np.rint(fma(a, ra, fma(b, rb, f)))),
                "the other operand inside": clip(np.rint(fma(b, rb, fma(a, ra, f)))),
                "f without fused multiply-add": clip(np.rint(fma(a, ra, fma(b, rb, f32(zy) - f32(ra * za + rb * zb))))),
                "no fused multiply-add": clip(np.rint(a * ra + (b * rb + f))),
                "a float Add": clip(np.rint(real / sy) + zy),
            },
        )


def global_pools(rng: np.random.Generator, sets: int) -> Iterable[tuple[NDArray[Any], Formulas]]:
    """QLinearGlobalAveragePool on maps that reach every possible sum."""
    for index in range(sets):
        height, width = ((7, 7), (3, 3), (5, 6), (8, 8))[index % 4]
        count = height * width
        totals = np.arange(count * 255 + 1)
        x = (totals // count)[:, None] + (np.arange(count) < (totals % count)[:, None])
        sx, sy = (f32(scale) for scale in scales(rng, 2, index % 2 == 0))
        zx, zy = zero(rng), zero(rng)
        model = kernel("GlobalAveragePool", [(sx, zx)], (sy, zy))
        assert kernel_counts(model) == {"QLinearGlobalAveragePool": 1}
        acc, n = (totals - count * zx).astype(f32), f32(count)
        formulas = {
            "sum * (sx / (sy n))": acc * (sx / (sy * n)),
            "sum * ((sx / sy) / n)": acc * ((sx / sy) / n),
            "sum * ((sx (1/n)) / sy)": acc * (sx * (f32(1) / n) / sy),
            "((sum sx) / n) / sy": acc * sx / n / sy,
        }
        got = run_cut(model, {"x0": x.reshape(1, -1, height, width).astype(np.uint8)}).reshape(-1)
        yield got, {name: clip(np.rint(value) + zy) for name, value in formulas.items()}


def window_pools(rng: np.random.Generator, sets: int, depthwise: bool) -> Iterable[tuple[NDArray[Any], Formulas]]:
    """Windows smaller than the map: QLinearAveragePool, or the depthwise QLinearConv that nasq writes instead."""
    for index in range(sets):
        size = (2, 3)[index % 2]
        sx, sy = (f32(scale) for scale in scales(rng, 2, True))
        zx, zy, n = zero(rng), zero(rng), f32(size * size)
        x = np.clip(zx + rng.integers(-16, 17, (8, 32, 18, 18)), 0, 255).astype(np.uint8)
        model = kernel("AveragePool", [(sx, zx)], (sy, zy), kernel_shape=[size, size])
        model = as_convolution(model, 32, size) if depthwise else model
        assert set(kernel_counts(model)) - {"Transpose"} == {"QLinearConv" if depthwise else "QLinearAveragePool"}
        views = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64) - zx, (size, size), axis=(2, 3))
        taps = views.reshape(*views.shape[:4], -1)
        acc, real = taps.sum(-1).astype(f32), np.zeros(taps.shape[:-1], f32)
        for k in range(taps.shape[-1]):
            real = real + taps[..., k].astype(f32) * sx
        yield (
            run_cut(model, {"x0": x}),
            {
                "rne(((sum of floats) / n) / sy + zy)": clip(np.rint(real / n / sy + f32(zy))),
                "rne(sum * (sx / (sy n))) + zy": clip(np.rint(acc * (sx / (sy * n))) + zy),
                "rne(sum * ((sx (1/n)) / sy)) + zy": clip(np.rint(acc * (sx * (f32(1) / n) / sy)) + zy),
            },
        )


def as_convolution(pool: bytes, channels: int, size: int) -> bytes:
    """The same model with ``AveragePool`` replaced by a depthwise ``Conv`` of ones with the scale ``fp32(1 / n)``."""
    model = onnx.load_model_from_string(pool)
    share = np.full(channels, f32(1) / f32(size * size), f32)
    weight = numpy_helper.from_array(np.ones((channels, 1, size, size), np.int8), "w")
    model.graph.initializer.extend([weight, numpy_helper.from_array(share, "v")])
    nodes = list(model.graph.node)
    nodes[1] = helper.make_node("Conv", [nodes[1].input[0], "x"], ["r"], group=channels)
    del model.graph.node[:]
    model.graph.node.extend([helper.make_node("DequantizeLinear", ["w", "v"], ["x"], axis=0), *nodes])
    data: bytes = model.SerializeToString()
    return data


def concats(rng: np.random.Generator, sets: int) -> Iterable[tuple[NDArray[Any], Formulas]]:
    x = np.arange(256, dtype=np.uint8).reshape(1, 256, 1, 1)
    for index in range(sets):
        sa, sb, sy = (f32(scale) for scale in scales(rng, 3, index % 2 == 0))
        za, zb, zy = zero(rng), zero(rng), zero(rng)
        model = kernel("Concat", [(sa, za), (sb, zb)], (sy, zy), axis=1)
        assert kernel_counts(model) == {"QLinearConcat": 1}
        parts = [(s, x.reshape(-1).astype(f32) - f32(z)) for s, z in ((sa, za), (sb, zb))]
        yield (
            run_cut(model, {"x0": x, "x1": x}).reshape(-1),
            {
                "rne((sx (q - zx)) / sy) + zy": clip(np.concatenate([np.rint(s * q / sy) + zy for s, q in parts])),
                "rne((q - zx) (sx / sy)) + zy": clip(np.concatenate([np.rint(q * (s / sy)) + zy for s, q in parts])),
            },
        )


# -- whole networks ---------------------------------------------------------------------------------------------------


def network(what: str, programs: Iterable[Program], images: int) -> None:
    """Final integers, and every layer alone on the reference's integers; all layers must be integer kernels."""
    final, layers, seen = Counter[str](), Counter[str](), Counter[str]()
    for program in programs:
        with tempfile.TemporaryDirectory() as directory:
            bundle.write(Path(directory) / "b", program, {parity.MODEL: export(program)})
            report = parity.check(Path(directory) / "b", random_input(program, images, 7), layer_images=images)
        final.update(total=report.total, wrong=report.differing)
        for layer in report.layers:
            layers.update(total=layer.total, wrong=layer.differing)
        seen.update(report.coverage.kernels)
        assert report.coverage.integer == report.coverage.total, report.coverage
        assert (report.coverage.kernels["QuantizeLinear"], report.coverage.kernels["DequantizeLinear"]) == (1, 1)
    kernels = ", ".join(f"{count} {name}" for name, count in seen.items() if name.startswith("QLinear"))
    row(f"{what}: final integers", final["total"], final["wrong"], kernels)
    row(f"{what}: every layer alone", layers["total"], layers["wrong"])


def extreme(groups: int, kernel_size: int) -> Program:
    """Weights of -128 and 127 alone on inputs of 0 and 255 alone: u8 x s8 pairs would saturate in 16 bits."""
    maker = Maker(np.random.default_rng(groups + kernel_size), (8,))
    first = maker.conv(maker.input((3, 12, 12)), 64, 1, form="asymmetric", bits=8)
    same = (kernel_size // 2,) * 2
    program = (maker.conv(first, 64, kernel_size, padding=same, groups=groups, form="signed", bits=8), maker.program())[
        1
    ]
    stem, conv = program.ops[1], program.ops[2]
    assert isinstance(conv, Conv)
    loud = replace(stem, output=replace(stem.output, scale=stem.output.scale / 32))
    weight = np.random.default_rng(0).choice(np.array([-128, 127], np.int8), conv.weight.shape)
    weight[0], weight[1] = 127, -128
    reach = weight[0].size * 255 * 128
    scale = np.full(64, conv.output.scale * 127 / (reach * loud.output.scale), f32)
    return replace(program, ops=[program.ops[0], loud, replace(conv, weight=weight, weight_scale=scale, wide=True)])


def forms() -> None:
    """What keeps a layer in float, or brings it back; the last two rows differ by version and are asserted nowhere."""
    program = residual_program(0, 4, 4)
    total = Counter(type(op) for op in program.ops)
    base = kernel_counts(export(program))
    expect(base["QLinearConv"] == total[Conv] and base["QLinearAdd"] == total[Add], "all convolutions and sums fuse")
    expect(base["QGemm"] == total[Linear], "Gemm fuses, weights with a zero-point")
    expect("MatMulInteger" not in base, "bit streams of weights are folded away, and fuse")

    def count(change: Callable[[onnx.ModelProto], None], name: str) -> int:
        model = onnx.load_model_from_string(export(program, packed=False))
        change(model)
        return kernel_counts(model.SerializeToString()).get(name, 0)

    def vectors(model: onnx.ModelProto) -> None:
        for value in model.graph.initializer:
            if value.name[0] in "sz" and not value.dims:
                value.dims.append(1)

    def no_zero_point(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear" and len(node.input) > 2 and node.input[2].startswith("n"):
                del node.input[2]

    for what, change, name in (
        ("scales of shape [1]", vectors, "QLinearAdd"),
        ("Gemm without a weight zero-point", no_zero_point, "QGemm"),
    ):
        try:
            print(f"{what:64s} {count(change, name):>20d}  {name}")
        except ArtifactError as error:
            print(f"{what:64s} {'refused':>20s}  {error.__cause__}")


def main() -> None:
    rng = np.random.default_rng(0)
    machine = environment(1)
    print(machine["cpu"], machine["versions"], sep="\n")
    print(f"{'what':64s} {'integers':>10s} {'differ':>9s}")
    for bits in range(2, 9):
        network(f"residual networks, {bits}/{bits} bits", [residual_program(s, bits, bits, 16) for s in range(2)], 40)
    network("random networks, 2..8 bits", [random_program(seed, len(KINDS) + 4, 16) for seed in range(12)], 40)
    network("weights and inputs at their extremes", [extreme(*case) for case in ((1, 1), (1, 3), (64, 3), (4, 3))], 20)
    compare("QLinearAdd", sums(rng, 150), "rne(fma(qa, ra, fma(qb, rb, f)))")
    compare("QLinearGlobalAveragePool", global_pools(rng, 80), "sum * (sx / (sy n))")
    floats, integers = "rne(((sum of floats) / n) / sy + zy)", "rne(sum * ((sx (1/n)) / sy)) + zy"
    compare("QLinearAveragePool", window_pools(rng, 24, depthwise=False), floats, "avoided by nasq")
    compare("window as QLinearConv", window_pools(rng, 24, depthwise=True), integers)
    compare("QLinearConcat", concats(rng, 60), "rne((sx (q - zx)) / sy) + zy")
    forms()
    if failures:
        raise SystemExit(f"not as nasq assumes: {'; '.join(failures)}")


if __name__ == "__main__":
    main()
