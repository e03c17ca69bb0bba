"""Sessions, operator counts and coverage of the graph that the runtime executes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from nasq.deploy.onnx import export
from nasq.deploy.runtimes import OnnxRuntime, integer_coverage, kernel_counts, run_cut, versions
from nasq.errors import ArtifactError, InputError
from tests.deploy.programs import KINDS, random_input, random_program, residual_program

PROGRAM = residual_program(0, 4, 4)
DATA = export(PROGRAM)


def test_a_file_and_its_bytes_run_the_same_in_any_chunks(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(DATA)
    x = random_input(PROGRAM, 11, 0)
    whole = OnnxRuntime(DATA).run(x)
    np.testing.assert_array_equal(OnnxRuntime(tmp_path / "model.onnx", threads=2, chunk=3).run(x), whole)
    assert OnnxRuntime(DATA).name.startswith("onnxruntime 1.")


def test_with_optimizations_off_nothing_is_fused_and_the_coverage_says_so() -> None:
    off = {"graph_optimization_level": "ORT_DISABLE_ALL"}
    coverage = integer_coverage(DATA, PROGRAM, off)
    assert coverage.kernels["Conv"] == 8 and "QLinearConv" not in coverage.kernels
    assert set(coverage.integer.values()) == {0} and {"convolutions", "sums", "products"} <= set(coverage.integer)
    assert coverage.share("sums") == 0.0 and coverage.share("concats") == 1.0
    assert set(coverage.floats) == {
        op.path for op in PROGRAM.ops if op.path.startswith(("conv", "add", "avg", "linear"))
    }


@pytest.mark.parametrize("seed", range(3))
def test_every_layer_of_an_exported_network_is_covered(seed: int) -> None:
    program = random_program(seed, len(KINDS))
    coverage = integer_coverage(export(program), program)
    assert coverage.integer == coverage.total
    assert coverage.floats == ()
    assert coverage.total["convolutions"] >= 8 and coverage.total["concats"] >= 1
    assert coverage.to_json()["kernels"] == kernel_counts(export(program))


def test_a_layer_that_lost_its_fusion_is_named() -> None:
    model = onnx.load_model_from_string(DATA)
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    model.graph.output.append(onnx.helper.make_tensor_value_info(gemm.output[0], onnx.TensorProto.FLOAT, ["batch", 10]))
    coverage = integer_coverage(model.SerializeToString(), PROGRAM)
    assert (coverage.integer["linears"], coverage.total["linears"]) == (0, 1)
    assert coverage.floats == (gemm.name,)


def test_session_options_are_checked() -> None:
    with pytest.raises(InputError, match=r"unknown session option 'provider'\. Did you mean 'providers'"):
        OnnxRuntime(DATA, session={"provider": "CPUExecutionProvider"})
    with pytest.raises(InputError, match=r"unknown GraphOptimizationLevel 'ALL'.*ORT_ENABLE_ALL"):
        OnnxRuntime(DATA, session={"graph_optimization_level": "ALL"})
    with pytest.raises(InputError, match="threads is 0; it must be at least 1"):
        OnnxRuntime(DATA, threads=0)
    entry = OnnxRuntime(DATA, session={"session.force_spinning_stop": "1", "execution_mode": "ORT_SEQUENTIAL"})
    assert entry.run(random_input(PROGRAM, 1, 0)).shape == (1, 10)


def test_what_the_runtime_refuses_is_an_artifact_error(tmp_path: Path) -> None:
    (tmp_path / "torn.onnx").write_bytes(DATA[:100])
    with pytest.raises(ArtifactError, match=r"refuses .*torn\.onnx"):
        OnnxRuntime(tmp_path / "torn.onnx")
    with pytest.raises(ArtifactError, match=r"cannot run the file on input float32 \(2, 5, 12, 12\)"):
        OnnxRuntime(DATA).run(np.zeros((2, 5, 12, 12), np.float32))
    with pytest.raises(ArtifactError, match="refuses the ONNX file"):
        run_cut(b"", {})


def test_versions_name_the_packages_without_importing_them() -> None:
    code = (
        "import sys; from nasq.deploy.runtimes import versions; found = versions(); "
        "assert {'nasq', 'python', 'numpy', 'onnx', 'onnxruntime', 'torch'} <= set(found), found; "
        "assert not {'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert versions()["numpy"] == np.__version__
