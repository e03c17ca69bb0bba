from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from nasq.deploy import bundle, layer_times
from nasq.deploy.onnx import export
from nasq.deploy.parity import MODEL
from nasq.deploy.runtimes import open_session
from nasq.quant.program import Add, Conv, Linear
from tests.deploy.programs import residual_program


def test_every_layer_is_timed_once_in_both_forms(tmp_path: Path) -> None:
    program = residual_program(0, 4, 4)
    bundle.write(tmp_path / "bundle", program, {MODEL: export(program)})
    found = layer_times.layer_times(tmp_path / "bundle", repeats=2)
    wanted = [(op.path, type(op).__name__) for op in program.ops if isinstance(op, (Conv, Linear, Add))]
    assert [(one.path, one.kind) for one in found] == wanted
    assert all(one.integer_ms > 0 and one.float_ms > 0 for one in found)
    assert found[0].speedup == found[0].float_ms / found[0].integer_ms


def test_the_float_form_is_the_same_operation() -> None:
    """Shapes and the result against a slow sum of products."""
    program = residual_program(1, 4, 4)
    op = next(op for op in program.ops if isinstance(op, Conv) and op.stride == (2, 2))
    model = layer_times._float_model(op, program, np.random.default_rng(0))
    constants = {
        value.name: onnx.numpy_helper.to_array(value) for value in onnx.load_from_string(model).graph.initializer
    }
    x = np.random.default_rng(1).standard_normal((2, *program.tensor(op.inputs[0]).shape)).astype(np.float32)
    (y,) = open_session(model).run(None, {"x0": x})
    assert y.shape == (2, *op.output.shape)
    padded = np.pad(x, [(0, 0), (0, 0), (op.padding[0],) * 2, (op.padding[1],) * 2])
    window = padded[1, :, 2 : 2 + op.weight.shape[2], 4 : 4 + op.weight.shape[3]]
    by_hand = float((window.astype(np.float64) * constants["w"][3]).sum() + constants["b"][3])
    np.testing.assert_allclose(y[1, 3, 1, 2], by_hand, rtol=1e-4, atol=1e-4)
