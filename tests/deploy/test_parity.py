"""The gate: green on what was exported, red for every mutation, and it says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from nasq.deploy import bundle, parity, readback
from nasq.deploy.onnx import export
from nasq.deploy.runtimes import OnnxRuntime
from nasq.errors import ArtifactError, InputError, ParityError
from nasq.quant.program import Add, Conv, Linear, Op, Program
from tests.deploy.programs import KINDS, Maker, random_input, random_program, residual_program

PROGRAM = residual_program(5, 4, 4)
IMAGES = random_input(PROGRAM, 24, 0)
STEM = 1  # the operation that most mutations change
PATH = PROGRAM.ops[STEM].path

Change = Callable[[onnx.ModelProto], None]


def shipped(directory: Path, program: Program = PROGRAM, change: Change | None = None) -> Path:
    """A bundle, and in it the program's file, changed."""
    model = onnx.load_model_from_string(export(program, packed=False))
    if change is not None:
        change(model)
    bundle.write(directory, program, {parity.MODEL: model.SerializeToString()})
    return directory


def worker(model: onnx.ModelProto, path: str = PATH) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == path)


def maker(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def reader(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.input)


def array(model: onnx.ModelProto, name: str) -> NDArray[Any]:
    value = next(value for value in model.graph.initializer if value.name == name)
    return onnx.numpy_helper.to_array(value).copy()


def put(model: onnx.ModelProto, name: str, values: NDArray[Any]) -> None:
    kept = [value for value in model.graph.initializer if value.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, onnx.numpy_helper.from_array(values, name)])


# -- the five mutations, in the file ----------------------------------------------------------------------------------


def scale_off_by_one_ulp(model: onnx.ModelProto) -> None:
    name = maker(model, worker(model).input[1]).input[1]
    scales = array(model, name)
    scales[0] = np.nextafter(scales[0], np.float32(np.inf))
    put(model, name, scales)


def activation_scale_off_by_one_ulp(model: onnx.ModelProto) -> None:
    node = reader(model, worker(model).output[0])
    put(model, "odd", np.nextafter(array(model, node.input[1]), np.float32(np.inf)))
    node.input[1] = "odd"


def dropped_clip(model: onnx.ModelProto) -> None:
    quantize = reader(model, worker(model).output[0])
    clip = reader(model, quantize.output[0])
    assert clip.op_type == "Clip"
    quantize.output[0] = clip.output[0]
    model.graph.node.remove(clip)


def float_bias(model: onnx.ModelProto) -> None:
    node = worker(model)
    bias = maker(model, node.input[2])
    scale = maker(model, bias.input[1])
    grid = array(model, scale.input[0]) * array(model, scale.input[1])
    put(model, "odd", ((array(model, bias.input[0]) + 0.4) * grid).astype(np.float32))
    node.input[2] = "odd"
    model.graph.node.remove(bias)
    model.graph.node.remove(scale)


def swapped_channel(model: onnx.ModelProto) -> None:
    name = maker(model, worker(model).input[1]).input[0]
    weights = array(model, name)
    weights[[0, 1]] = weights[[1, 0]]
    put(model, name, weights)


def shifted_zero_point(model: onnx.ModelProto) -> None:
    node = reader(model, worker(model).output[0])
    put(model, "odd", array(model, node.input[2]) + np.uint8(1))
    node.input[2] = "odd"


MUTATIONS = [
    (scale_off_by_one_ulp, r"weight scale\[0\] is"),
    (activation_scale_off_by_one_ulp, "output scale is"),
    (dropped_clip, r"clip is missing, the bundle says \[0, 15\]"),
    (float_bias, "weight and bias is a float, or missing"),
    (swapped_channel, r"weight\[0, 0, \d, \d\] is"),
    (shifted_zero_point, "output zero-point is 1"),
]


@pytest.mark.parametrize(("change", "text"), MUTATIONS)
def test_a_mutated_file_turns_the_gate_red(change: Change, text: str, tmp_path: Path) -> None:
    shipped(tmp_path / "b", change=change)
    with pytest.raises(ParityError, match=rf"(?s)FAILED.*layer '{PATH}': {text}"):
        parity.gate(tmp_path / "b", IMAGES)


@pytest.mark.parametrize("change", [dropped_clip, swapped_channel, shifted_zero_point])
def test_running_the_file_finds_them_too(change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "compare", lambda file, program: ())
    report = parity.check(shipped(tmp_path / "b", change=change), IMAGES)
    assert not report.passed
    assert report.differing > 0 and report.images_differing > 0
    assert f"the first layer that differs on its own is '{PATH}' (Conv)" in report.diagnosis
    assert [layer.path for layer in report.layers if not layer.passed] == [PATH]


# -- the same in the bundle -------------------------------------------------------------------------------------------


def with_op(program: Program, index: int, **changes: Any) -> Program:
    ops: list[Op] = list(program.ops)
    ops[index] = replace(ops[index], **changes)
    return replace(program, ops=ops)


def with_output(program: Program, index: int, **changes: Any) -> Program:
    return with_op(program, index, output=replace(program.ops[index].output, **changes))


def up(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def stem() -> Conv:
    op = PROGRAM.ops[STEM]
    assert isinstance(op, Conv)
    return op


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(with_output(PROGRAM, STEM, scale=up(stem().output.scale)), id="scale"),
        pytest.param(
            with_op(PROGRAM, STEM, weight_scale=np.nextafter(stem().weight_scale, np.float32(9))), id="weights"
        ),
        pytest.param(with_output(PROGRAM, STEM, high=14), id="clip"),
        pytest.param(with_op(PROGRAM, STEM, bias=stem().bias + 1), id="bias"),
        pytest.param(with_op(PROGRAM, STEM, weight=stem().weight[::-1].copy()), id="channels"),
        pytest.param(with_output(PROGRAM, STEM, zero_point=1), id="zero-point"),
    ],
)
def test_a_bundle_that_is_not_its_file_turns_the_gate_red(program: Program, tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", program, {parity.MODEL: export(PROGRAM)})
    with pytest.raises(ParityError, match=rf"(?s)the file is not the bundle's: layer '{PATH}'"):
        parity.gate(tmp_path / "b", IMAGES)


# -- green ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 2), (3, 6)])
def test_exported_networks_pass(bits: tuple[int, int], tmp_path: Path) -> None:
    program = residual_program(sum(bits), *bits)
    bundle.write(tmp_path / "b", program, {parity.MODEL: export(program)})
    report = parity.gate(tmp_path / "b", random_input(program, 32, 1))
    assert (report.differing, report.total, report.allowed) == (0, 320, 0)
    assert len(report.layers) == len(program.ops)
    assert sum(layer.differing for layer in report.layers) == 0
    assert report.findings == () and report.diagnosis == ""
    assert report.coverage.total["convolutions"] == report.coverage.integer["convolutions"] == 8
    assert report.coverage.total["sums"] == report.coverage.integer["sums"] == 3


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_pass(seed: int, tmp_path: Path) -> None:
    program = random_program(seed, len(KINDS))
    bundle.write(tmp_path / "b", program, {parity.MODEL: export(program)})
    report = parity.gate(tmp_path / "b", random_input(program, 16, seed))
    assert report.differing == 0
    assert all(layer.differing == 0 for layer in report.layers)


def test_the_report_is_plain_json_and_tells_the_figures(tmp_path: Path) -> None:
    labels = np.zeros(len(IMAGES), np.int64)
    report = parity.check(shipped(tmp_path / "b"), IMAGES, labels)
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["passed"] is True and plain["failures"] == []
    assert plain["coverage"]["integer"]["convolutions"] == 8
    assert plain["layers"][STEM]["path"] == PATH
    assert {"nasq", "onnxruntime", "numpy"} <= set(plain["versions"])
    got = OnnxRuntime((tmp_path / "b" / parity.MODEL).read_bytes()).logits(IMAGES)
    assert report.accuracy == (got.argmax(1) == labels).mean()
    for text in ("parity passed", "final integers: 0 of 240 differ", "8 of 8 convolutions", "accuracy of the file"):
        assert text in report.summary()


# -- promises, coverage, warnings -------------------------------------------------------------------------------------


class Wrong:
    """A runtime that is off by one in the first ``count`` integers."""

    name = "wrong 1.0"

    def __init__(self, data: bytes, count: int) -> None:
        self.real, self.count = OnnxRuntime(data), count

    def run(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        integers = self.real.run(x)
        integers.reshape(-1)[: self.count] ^= 1
        return integers

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        tensor = PROGRAM.output
        return (self.run(x).astype(np.float32) - tensor.zero_point) * np.float32(tensor.scale)


def test_a_runtime_of_your_own_is_counted_and_a_difference_without_a_layer_is_said(tmp_path: Path) -> None:
    report = parity.check(shipped(tmp_path / "b"), IMAGES, runtime=lambda data: Wrong(data, 13))
    assert (report.differing, report.images_differing, report.runtime) == (13, 2, "wrong 1.0")
    assert "13 of 240 final integers differ, on 2 of 24 images; allowed: 0" in report.summary()
    assert "only the whole file differs" in report.diagnosis


def test_with_average_pooling_one_in_so_many_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity.TOLERANCE == 100_000
    monkeypatch.setattr(parity, "TOLERANCE", 100)
    directory = shipped(tmp_path / "b")
    reports = [
        parity.check(directory, IMAGES, runtime=lambda data, n=n: Wrong(data, n), layer_images=2) for n in (2, 3)
    ]
    assert [(report.total, report.allowed, report.passed) for report in reports] == [(240, 2, True), (240, 2, False)]


def test_without_average_pooling_none_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "TOLERANCE", 100)
    made = Maker(np.random.default_rng(0))
    conv = made.conv(made.input((3, 8, 8)), 10, 8, bits=8, form="signed")
    made.reshape(conv, (10,))
    program = made.program()
    bundle.write(tmp_path / "b", program, {parity.MODEL: export(program)})
    report = parity.check(tmp_path / "b", random_input(program, 100, 0))
    assert (report.total, report.allowed, report.differing) == (1000, 0, 0)


def looked_at(model: onnx.ModelProto) -> None:
    """A further output, the sum before its quantization: the sum has to stay in float, and no number changes."""
    name = worker(model, first_sum().path).output[0]
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 8, 12, 12]))


def first_sum() -> Add:
    return next(op for op in PROGRAM.ops if isinstance(op, Add))


def test_a_sum_that_stays_in_float_is_named(tmp_path: Path) -> None:
    report = parity.check(shipped(tmp_path / "b", change=looked_at), IMAGES)
    assert report.differing == 0
    assert report.coverage.integer["sums"] == 2
    assert report.coverage.floats == (first_sum().path,)
    failures = "; ".join(report.failures())
    assert f"2 of 3 sums run as integer kernels; at least 95% must. In float: {first_sum().path}." in failures


def test_a_difference_that_no_layer_shows_alone_is_located_by_prefixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def equal(file: Any, program: Program, values: Any, x: Any, index: int) -> parity.LayerResult:
        return parity.LayerResult(program.ops[index].path, "Conv", 1, 0, 0)

    monkeypatch.setattr(parity, "_alone", equal)
    report = parity.check(shipped(tmp_path / "b", change=dropped_clip), IMAGES)
    assert f"every layer alone agrees, but the layers up to '{PATH}' together do not" in report.diagnosis


def test_a_located_difference_has_channel_and_values(tmp_path: Path) -> None:
    report = parity.check(shipped(tmp_path / "b", change=swapped_channel), IMAGES)
    layer = next(layer for layer in report.layers if layer.differing)
    assert layer.path == PATH and layer.largest_step >= 1
    file = onnx.load_model_from_string((tmp_path / "b" / parity.MODEL).read_bytes())
    assert worker(file).op_type == "Conv"
    values = dict(zip(("expected", "got"), map(int, layer.example.replace(",", "").split()[-3::2]), strict=True))
    assert values["expected"] != values["got"]
    assert "channel 0" in layer.example or "channel 1" in layer.example


def test_what_makes_a_match_meaningless_is_a_warning(tmp_path: Path) -> None:
    conv = stem()
    program = with_op(PROGRAM, STEM, bias=np.full_like(conv.bias, -(1 << 20)))  # its ReLU never opens
    report = parity.check(shipped(tmp_path / "b", program), IMAGES, np.full(len(IMAGES), 11))
    assert report.passed
    assert any(f"fewer than 3 levels: {conv.output.name}" in text for text in report.warnings)
    assert any("accuracy of 0.00% is not well above chance (10.00%)" in text for text in report.warnings)
    assert "warning: " in report.summary()


def test_labels_of_images_say_nothing_of_a_map(tmp_path: Path) -> None:
    program = replace(PROGRAM, ops=PROGRAM.ops[: STEM + 1])
    bundle.write(tmp_path / "b", program, {parity.MODEL: export(program)})
    report = parity.check(tmp_path / "b", IMAGES, np.zeros(len(IMAGES), np.int64))
    assert report.passed and report.accuracy is None
    assert any(text.startswith("the labels were not used: the output has a class at each") for text in report.warnings)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    directory = shipped(tmp_path / "b")
    with pytest.raises(InputError, match="at least one image"):
        parity.check(directory, IMAGES[:0])
    with pytest.raises(InputError, match="the images are float64; the network takes float32"):
        parity.check(directory, IMAGES.astype(np.float64))
    with pytest.raises(InputError, match="3 labels for 24 images"):
        parity.check(directory, IMAGES, np.zeros(3, np.int64))
    # Compared with [N] classes, [N, 1] labels would broadcast to an accuracy of every image on every label.
    with pytest.raises(InputError, match=r"labels are int64 of shape \(24, 1\).*integers of shape \(24,\)"):
        parity.check(directory, IMAGES, np.zeros((24, 1), np.int64))
    with pytest.raises(InputError, match="labels are float32"):
        parity.check(directory, IMAGES, np.zeros(24, np.float32))


@pytest.mark.parametrize("batch", [5, 12])  # smaller, and larger, than the images that each layer is run on
def test_a_file_of_a_fixed_batch_size_passes(batch: int, tmp_path: Path) -> None:
    bundle.write(tmp_path / "b", PROGRAM, {parity.MODEL: export(PROGRAM, batch=batch)})
    count = 2 * batch
    report = parity.check(tmp_path / "b", IMAGES[:count], layer_images=8)
    assert report.passed and report.total == 10 * count
    assert all(layer.total and not layer.differing for layer in report.layers)
    with pytest.raises(InputError, match=f"batches of {batch} images, and 11 is not a multiple"):
        parity.check(tmp_path / "b", IMAGES[:11])


def test_the_class_of_an_image_a_place_and_a_token() -> None:
    def differs(program: Program, shape: tuple[int, ...], at: tuple[int, ...]) -> float:
        first = np.zeros(shape, np.uint8)
        other = first.copy()
        other[at] = 1
        return 1 - parity.same_class(other, first, program)

    assert differs(PROGRAM, (8, 10), (3, 4)) == pytest.approx(1 / 8)
    assert differs(PROGRAM, (8, 10), (3, 0)) == 0  # a tie goes to the first class, which it was
    maps = replace(PROGRAM, ops=PROGRAM.ops[: STEM + 1])  # a convolution comes last: channels are classes
    assert differs(maps, (8, 10, 2, 3), (3, 4, 1, 1)) == pytest.approx(1 / 48)
    assert differs(maps, (8, 10, 2, 3), (3, 0, 1, 1)) == 0
    assert differs(PROGRAM, (8, 5, 10), (3, 0, 4)) == pytest.approx(1 / 40)  # tokens: the last dimension
    assert differs(PROGRAM, (8, 5, 10), (3, 2, 0)) == 0


def test_a_missing_or_changed_file_is_refused(tmp_path: Path) -> None:
    bundle.write(tmp_path / "a", PROGRAM)
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        parity.check(tmp_path / "a", IMAGES)
    file = shipped(tmp_path / "b") / parity.MODEL
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="checksum"):
        parity.check(tmp_path / "b", IMAGES)


def test_a_file_of_another_network_is_red_without_a_crash(tmp_path: Path) -> None:
    other = residual_program(5, 4, 4, channels=4)
    bundle.write(tmp_path / "b", PROGRAM, {parity.MODEL: export(other)})
    with pytest.raises(ParityError, match="the file is not the bundle's"):
        parity.gate(tmp_path / "b", IMAGES)
    shorter = replace(PROGRAM, ops=[op for op in PROGRAM.ops if not isinstance(op, Linear) or isinstance(op, Conv)])
    bundle.write(tmp_path / "c", PROGRAM, {parity.MODEL: export(shorter)})
    with pytest.raises(ArtifactError, match=r"integers of shape \(24, 16\), the bundle \(24, 10\)"):
        parity.gate(tmp_path / "c", IMAGES)
