"""The child process: same results as here, and an end to memory, processor time and time."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest

from nasq.deploy import bundle, parity, readback, sandbox
from nasq.deploy.onnx import export
from nasq.deploy.sandbox import Limits
from nasq.errors import ArtifactError, InputError
from tests.deploy.programs import random_input, residual_program

PROGRAM = residual_program(0, 3, 5, channels=4, image=(6, 6))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shipped") / "bundle"
    bundle.write(directory, PROGRAM, {parity.MODEL: export(PROGRAM)})
    return directory


def test_the_report_of_the_child_is_the_report(shipped: Path) -> None:
    x = random_input(PROGRAM, 8, 0)
    labels = np.arange(8) % 10
    assert sandbox.check(shipped, x, labels, layer_images=4) == parity.check(shipped, x, labels, layer_images=4)


def test_reports_survive_json() -> None:
    with pytest.raises(ArtifactError, match=r"this is not a parity report: KeyError\('target'\)"):
        parity.ParityReport.from_json({})


def test_a_child_refuses_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"checksums\.json is missing"):
        sandbox.inspect(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            Limits(memory=100 << 20),
            r"is refused: (reading it takes more than 100 MiB|the child .*memory is limited to 100 MiB)",
        ),
        (Limits(seconds=0.01), r"is refused: the child process that looked at it took more than 0\.01 seconds"),
    ],
)
def test_limits_end_the_child(limits: Limits, message: str, shipped: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        sandbox.inspect(shipped, limits)


@pytest.mark.parametrize("code", [-signal.SIGXCPU, -signal.SIGSEGV, 3])
def test_how_a_child_ended_is_told(code: int, tmp_path: Path) -> None:
    said = tmp_path / "stderr"
    said.write_text("Traceback\nValueError: odd\n")
    words = {-signal.SIGXCPU: "7 seconds of processor time", -signal.SIGSEGV: "ended by SIGSEGV", 3: "ValueError: odd"}
    assert words[code] in sandbox._end(code, said, Limits(cpu_seconds=7))


@pytest.mark.parametrize("name", ["memory", "cpu_seconds", "seconds", "file"])
def test_limits_above_nothing(name: str) -> None:
    with pytest.raises(InputError, match="each has to be above 0"):
        Limits(**{name: 0})


# ------------------------------------------------------------------------------------------- what no file may hold


def model_of() -> onnx.ModelProto:
    return onnx.load_model_from_string(export(PROGRAM))


def refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        readback.read(model.SerializeToString())


def test_functions_sparse_tensors_and_training() -> None:
    model = model_of()
    model.functions.append(onnx.helper.make_function("odd", "f", [], [], [], []))
    refused(model, "it holds 1 functions")
    model = model_of()
    model.graph.sparse_initializer.add()
    refused(model, "it holds 1 sparse initialisers")
    model = model_of()
    model.training_info.add()
    refused(model, "it holds 1 training information")


def test_tensors_in_attributes_and_references() -> None:
    model = model_of()
    value = onnx.numpy_helper.from_array(np.zeros(2, np.float32))
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["odd"], value=value))
    refused(model, r"an attribute 'value' of type TENSOR at the Constant node \['odd'\]")


def test_names_twice_and_inputs() -> None:
    model = model_of()
    model.graph.initializer.append(model.graph.initializer[0])
    refused(model, f"two tensors called {model.graph.initializer[0].name!r}")
    model = model_of()
    model.graph.input.append(onnx.helper.make_tensor_value_info("second", 1, [1]))
    refused(model, "2 inputs instead of one")


def test_data_outside_the_file_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # whoever opened it would wait for ever
    model = model_of()
    value = model.graph.initializer[0]
    value.data_location = onnx.TensorProto.EXTERNAL
    entry = value.external_data.add()
    entry.key, entry.value = "location", "pipe"
    refused(model, "lies outside the file, which must hold all its data")


def test_small_files_that_broadcast_to_something_huge_are_not_folded() -> None:
    """Two initialisers of 64 kB whose product has 2^32 elements."""
    model = model_of()
    for name, shape in (("tall", (1 << 16, 1)), ("wide", (1, 1 << 16))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    model.graph.node.append(onnx.helper.make_node("Mul", ["tall", "wide"], ["bomb"]))
    file = readback.read(model.SerializeToString())
    assert "bomb" not in file.constants
    assert any("bomb" in str(finding) for finding in readback.compare(file, PROGRAM))
