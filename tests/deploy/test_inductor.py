"""The runtime Inductor: integers of the reference at every bit-width, coverage, the gate, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nasq
from nasq.deploy import bundle, diagnosis, engines, inductor, inductor_network, parity
from nasq.deploy.inductor import Inductor, integer_coverage
from nasq.deploy.inductor_network import InductorNetwork
from nasq.deploy.onnx import export
from nasq.deploy.reference import Reference
from nasq.errors import InputError, TargetError
from nasq.quant.program import Conv, Linear, MatMul, Program
from tests.deploy.programs import fused_program, random_input, random_program, residual_program
from tests.deploy.token_programs import cnn_program, vit_program

pytestmark = pytest.mark.skipif(bool(inductor_network.why_not()), reason=inductor_network.why_not() or "-")

PROGRAM = replace(residual_program(0, 3, 5, 4, (8, 8)), target="inductor-x86")
IMAGES = random_input(PROGRAM, 16, 1)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network, operation by operation: compiling takes a minute on a slow machine."""
    monkeypatch.setattr(inductor, "compiled", lambda network, example: network)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "b", PROGRAM, {parity.MODEL: export(PROGRAM)})
    return tmp_path / "b"


@pytest.mark.parametrize(
    "program",
    [
        random_program(0, size=14), random_program(3, size=14), cnn_program(0), vit_program(0), vit_program(1, causal=True),
        fused_program(residual_program(1, 8, 8)), residual_program(0, 8, 8, channels=72, image=(4, 4)),
    ],
    ids=["random 0", "random 3", "squeeze-excite", "attention", "causal", "one rounding", "wide"],
)  # fmt: skip
def test_the_network_computes_the_reference(program: Program, tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", program)
    x = random_input(program, 4, 5)
    wanted = Reference(tmp_path / "b").run(x)
    found = Inductor(program, compile=False)
    np.testing.assert_array_equal(found.run(x), wanted)
    made = program.output
    real = (wanted.astype(np.float32) - np.float32(made.zero_point)) * np.float32(made.scale)
    np.testing.assert_array_equal(found.logits(x), real)


@pytest.mark.long
@pytest.mark.parametrize("program", [PROGRAM, random_program(0, size=14), vit_program(0)])
def test_the_compiled_network_computes_the_reference(program: Program, tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", program)
    x = random_input(program, 40, 5)
    np.testing.assert_array_equal(Inductor(program, batch=32).run(x), Reference(tmp_path / "b").run(x))


def test_layers_without_an_int8_kernel_are_exact_and_named(tmp_path: Path) -> None:
    ops = list(residual_program(2, 4, 8, 4, (8, 8)).ops)
    assert isinstance(ops[1], Conv)
    ops[1] = replace(ops[1], weight_zero=np.full(len(ops[1].weight), 60, np.int8))  # 8-bit weights
    program, wide = Program(tuple(ops), "generic"), [1]
    bundle.write(tmp_path / "b", program)
    x = random_input(program, 4, 0)
    network = InductorNetwork(program).eval()
    assert set(network.floats) == set(wide) and "leave int8" in network.floats[wide[0]]
    with torch.no_grad():
        np.testing.assert_array_equal(network(torch.from_numpy(x)).numpy(), Reference(tmp_path / "b").run(x))
    cover = integer_coverage(program)
    assert cover.floats == tuple(program.ops[index].path for index in wide)
    total = cover.total["convolutions"] + cover.total["linears"]
    assert total - cover.integer["convolutions"] - cover.integer["linears"] == len(wide) == cover.kernels["float"]


def test_products_of_two_tensors_count_as_float() -> None:
    program = vit_program(0)
    products = sum(isinstance(op, MatMul) for op in program.ops)
    cover = integer_coverage(program)
    assert products and (cover.total["matrix products"], cover.integer["matrix products"]) == (products, 0)
    assert cover.integer["linears"] == cover.total["linears"] > 0 and len(cover.floats) == products


def test_every_batch_size_and_number_of_threads(directory: Path) -> None:
    wanted = Reference(directory).run(IMAGES)
    sizes: list[int] = []

    for options in ({"chunk": 5}, {"batch": 6}, {"batch": 32, "threads": 2}, {}):
        runtime = Inductor(PROGRAM, compile=False, **options)
        runtime.network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
        threads = torch.get_num_threads()
        np.testing.assert_array_equal(runtime.run(IMAGES), wanted)
        assert torch.get_num_threads() == threads
    assert sizes == [5, 5, 5, 1, 6, 6, 6, 32, 16]


@pytest.mark.usefixtures("uncompiled")
def test_the_gate_runs_the_program(directory: Path) -> None:
    report = parity.check(directory, IMAGES, layer_images=4)
    assert report.passed, report.summary()
    assert report.runtime.startswith("inductor (torch ") and report.target == "inductor-x86"
    assert (report.differing, report.total, report.findings) == (0, 160, ())
    assert report.coverage.integer == report.coverage.total and report.coverage.total["sums"] == 3
    assert len(report.layers) == len(PROGRAM.ops) and all(layer.exact and layer.passed for layer in report.layers)
    assert diagnosis.keep(directory, IMAGES, directory.with_name("d"), count=2) is None


@pytest.mark.usefixtures("uncompiled")
def test_a_network_that_computes_something_else_is_found_and_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third convolution's bias is left out."""
    third = [op for op in PROGRAM.ops if isinstance(op, Conv)][2]
    prepare: Any = InductorNetwork._prepare

    def without_bias(network: InductorNetwork, index: int, op: Linear) -> None:
        prepare(network, index, op)
        if op is third or op.path == third.path:
            getattr(network, f"op{index}_bias").zero_()

    monkeypatch.setattr(InductorNetwork, "_prepare", without_bias)
    report = parity.check(directory, IMAGES, layer_images=4)
    assert not report.passed and report.differing > 0
    assert [layer.path for layer in report.layers if layer.differing] == [third.path]
    assert f"the first layer that differs on its own is {third.path!r} (Conv)" in report.diagnosis
    kept = diagnosis.keep(directory, IMAGES, directory.with_name("d"), count=2)
    assert kept is not None and third.path in (kept / diagnosis.NOTE).read_text()


@pytest.mark.usefixtures("uncompiled")
def test_a_bundle_of_any_target_is_loaded(tmp_path: Path) -> None:
    program = residual_program(0, 3, 5, 4, (8, 8))
    bundle.write(tmp_path / "b", program)
    loaded = nasq.load(tmp_path / "b", runtime="inductor")
    np.testing.assert_array_equal(loaded.integers(IMAGES), Reference(tmp_path / "b").run(IMAGES))
    assert "inductor (torch" in repr(loaded)
    for odd in (IMAGES[:, :, :5], IMAGES.astype(np.float64), torch.from_numpy(IMAGES), IMAGES[:0]):
        with pytest.raises(
            InputError, match=r"takes a NumPy array of fp32 images \[N, 3, 8, 8\], given: (ndarray|Tensor) "
        ):
            loaded(odd)


def test_its_bundles_are_not_for_other_runtimes(directory: Path) -> None:
    with pytest.raises(TargetError, match=r"made for the target 'inductor-x86', whose file runs on 'inductor', not on"):
        nasq.load(directory, runtime="onnxruntime")
    engine = engines.engine_of(PROGRAM)
    assert engine.rebuilds and engine.runs(PROGRAM, b"") is PROGRAM
    other = engines.ENGINES["onnxruntime"]
    assert not other.rebuilds and other.runs(PROGRAM, b"file") == b"file"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, message in (({"threads": 0}, "threads is 0"), ({"batch": 0}, "batch is 0")):
        with pytest.raises(InputError, match=f"{message}; it must be at least 1"):
            Inductor(PROGRAM, **options)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        TargetError, match=r"needs a C\+\+ compiler, and 'no-such-compiler' is not found. Install g\+\+"
    ):
        Inductor(PROGRAM)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(TargetError, match=r"'inductor' cannot run here: the processor has no VNNI.*without a runtime"):
        Inductor(PROGRAM)
