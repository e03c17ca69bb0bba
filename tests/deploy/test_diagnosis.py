"""A difference is kept as a model that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from safetensors import numpy as safetensors

from nasq.deploy import bundle, diagnosis, parity
from nasq.deploy.onnx import export
from nasq.deploy.runtimes import run_cut
from tests.deploy.programs import random_input, residual_program

PROGRAM = residual_program(3, 4, 4)
IMAGES = random_input(PROGRAM, 12, 0)


def shipped(directory: Path, data: bytes) -> Path:
    bundle.write(directory, PROGRAM, {parity.MODEL: data})
    return directory


def test_where_nothing_differs_nothing_is_kept(tmp_path: Path) -> None:
    assert diagnosis.keep(shipped(tmp_path / "b", export(PROGRAM)), IMAGES, tmp_path / "d") is None
    assert not (tmp_path / "d").exists()


def test_the_first_layer_that_differs_is_kept_with_its_tensors(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(export(PROGRAM))
    third = [node for node in model.graph.node if node.op_type == "Conv"][2]
    quantize = next(node for node in model.graph.node if node.input[0] == third.output[0])
    zero = onnx.numpy_helper.from_array(np.array(3, np.uint8), "odd")
    model.graph.initializer.append(zero)
    quantize.input[2] = "odd"
    kept = diagnosis.keep(shipped(tmp_path / "b", model.SerializeToString()), IMAGES, tmp_path / "d")
    assert kept == tmp_path / "d"
    note = json.loads((kept / diagnosis.NOTE).read_text())
    assert (note["layer"], note["operation"], note["alone"]) == (third.name, "conv", True)
    tensors = safetensors.load((kept / diagnosis.TENSORS).read_bytes())
    expected, got = tensors.pop("expected"), tensors.pop("got")
    assert int((expected != got).sum()) == note["differing"] > 0
    np.testing.assert_array_equal(run_cut((kept / diagnosis.LAYER).read_bytes(), tensors), got)


def test_a_layer_that_does_not_run_is_kept_too(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(export(PROGRAM))
    pool = next(node for node in model.graph.node if node.op_type == "Flatten")
    pool.op_type = "Squeeze"
    kept = diagnosis.keep(shipped(tmp_path / "b", model.SerializeToString()), IMAGES, tmp_path / "d", count=1)
    assert kept is not None
    assert json.loads((kept / diagnosis.NOTE).read_text())["operation"] == "reshape"
