"""Loading a bundle: the torch module and the runtime compute the reference's integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import nasq
from nasq.deploy import bundle, parity, sandbox, storage
from nasq.deploy.integer_network import IntegerNetwork
from nasq.deploy.load import RuntimeNetwork, load
from nasq.deploy.onnx import export
from nasq.deploy.reference import Reference
from nasq.errors import ArtifactError, InputError, TargetError
from nasq.quant.operations import KINDS
from nasq.quant.program import Linear, Program
from tests.deploy.programs import random_input, random_program, residual_program
from tests.deploy.token_programs import cnn_program, vit_program


def written(directory: Path, program: Program) -> Path:
    bundle.write(directory, program)
    return directory


def expect_equal(program: Program, directory: Path, seed: int, images: int = 5) -> None:
    x = random_input(program, images, seed)
    model = load(written(directory, program))
    wanted = Reference(directory).run(x)
    assert isinstance(model, IntegerNetwork)
    got = model.integers(torch.from_numpy(x))
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), wanted)
    tensor = program.output
    real = (wanted.astype(np.float32) - np.float32(tensor.zero_point)) * np.float32(tensor.scale)
    assert np.array_equal(model(torch.from_numpy(x)).numpy(), real)


@pytest.mark.parametrize("seed", range(8))
def test_the_module_computes_the_reference(seed: int, tmp_path: Path) -> None:
    expect_equal(random_program(seed, size=14), tmp_path / "b", seed)


@pytest.mark.parametrize("program", [cnn_program(0), cnn_program(1), vit_program(0), vit_program(1, causal=True)])
def test_the_module_computes_the_reference_with_token_operations(program: Program, tmp_path: Path) -> None:
    expect_equal(program, tmp_path / "b", 0, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_has_no_class(bad: float, tmp_path: Path) -> None:
    program = residual_program(5, 4, 4)
    bundle.write(tmp_path / "b", program, {parity.MODEL: export(program)})
    x = random_input(program, 3, 0)
    runtime = load(tmp_path / "b", "onnxruntime", trusted=True)
    assert runtime.integers(x).shape == (3, 10)
    x[1, 2, 3, 4] = bad
    for call in (runtime, runtime.integers):
        with pytest.raises(InputError, match=r"NaN or infinities; they have no integer\. Look at what normalises"):
            call(x)
    module = load(tmp_path / "b")
    for made in (module, module.integers):
        with pytest.raises(InputError, match="NaN or infinities"):
            made(torch.from_numpy(x))


def test_every_operation_is_loaded(tmp_path: Path) -> None:
    from nasq.deploy.integer_network import _EXECUTE

    assert set(_EXECUTE) == set(KINDS) - {"input"}


def test_wide_layers_are_summed_in_parts(tmp_path: Path) -> None:
    program = residual_program(0, 8, 8, channels=72, image=(4, 4))
    expect_equal(program, tmp_path / "b", 0, 2)
    wide = {index for index, op in enumerate(program.ops) if isinstance(op, Linear) and op.wide}
    model = load(tmp_path / "b")
    assert {index for index, parts in model.parts.items() if parts != 1} == wide and wide
    assert all(parts == 2 for index, parts in model.parts.items() if index in wide)
    assert all(value.dtype != torch.float64 for value in model.buffers())


def test_a_wide_layer_that_parts_do_not_serve_is_held_in_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nasq.quant.wide.MOST", 1)
    program = residual_program(0, 8, 8, channels=72, image=(4, 4))
    expect_equal(program, tmp_path / "b", 0, 2)
    assert torch.float64 in {value.dtype for value in load(tmp_path / "b").buffers()}


def test_the_module_moves_keeps_its_state_and_takes_no_gradient(tmp_path: Path) -> None:
    program = residual_program(1, 4, 4)
    model = load(written(tmp_path / "b", program))
    x = torch.from_numpy(random_input(program, 3, 0)).requires_grad_()
    assert not model(x).requires_grad and not list(model.parameters())
    other = IntegerNetwork(residual_program(2, 4, 4))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.state_dict()["op1_weight"], model.state_dict()["op1_weight"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.integers(x.detach())
    assert torch.equal(inside, model.integers(x.detach()))
    assert torch.equal(model.integers(x.detach().to(memory_format=torch.channels_last)), inside)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 9, 12), torch.zeros(2, 3, 12, 12, dtype=torch.int32), torch.zeros(())])
def test_images_that_do_not_fit(x: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"the network takes fp32 images \[N, 3, 12, 12\], given"):
        IntegerNetwork(residual_program(0, 4, 4)).integers(x)


# ---------------------------------------------------------------------------------------------------------- runtimes


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = residual_program(0, 3, 5)
    directory = tmp_path_factory.mktemp("shipped") / "bundle"
    bundle.write(directory, program, {parity.MODEL: export(program)})
    return directory


def test_the_runtime_computes_the_same(shipped: Path) -> None:
    x = random_input(residual_program(0, 3, 5), 6, 0)
    loaded = nasq.load(shipped, runtime="onnxruntime")
    model = nasq.load(str(shipped))
    assert isinstance(loaded, RuntimeNetwork) and "3x12x12" in repr(loaded)
    assert np.array_equal(loaded.integers(x), model.integers(torch.from_numpy(x)).numpy())
    assert np.array_equal(loaded(x), model(torch.from_numpy(x)).numpy())


def test_an_unknown_runtime(shipped: Path) -> None:
    with pytest.raises(InputError, match=r"unknown runtime 'onnxruntim'. Did you mean 'onnxruntime'\?"):
        load(shipped, runtime="onnxruntim")


def test_a_runtime_that_the_file_is_not_for(shipped: Path) -> None:
    with pytest.raises(
        TargetError, match=r"made for the target 'onnxruntime-cpu', whose file runs on 'onnxruntime', not on"
    ):
        load(shipped, runtime="openvino")


def test_a_file_of_another_network_is_not_given_to_the_runtime(tmp_path: Path, shipped: Path) -> None:
    other = export(residual_program(9, 3, 5))
    bundle.write(tmp_path / "b", bundle.read(shipped), {parity.MODEL: other})
    with pytest.raises(ArtifactError, match=r"model\.onnx is not the bundle's: layer 'conv_1'.* \(and \d+ more\)"):
        load(tmp_path / "b", runtime="onnxruntime")
    assert load(tmp_path / "b", runtime="onnxruntime", trusted=True).program.target == "onnxruntime-cpu"


def test_a_file_that_changes_while_it_is_checked(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "inspect", lambda directory: sandbox.Inspection(storage.digest(b"before"), ()))
    with pytest.raises(ArtifactError, match=r"model\.onnx changed while it was being checked"):
        load(shipped, runtime="onnxruntime")


def test_a_bundle_without_a_file(tmp_path: Path) -> None:
    written(tmp_path / "b", residual_program(0, 3, 5))
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        load(tmp_path / "b", runtime="onnxruntime")


def test_a_control_flow_file_is_refused_before_any_runtime(tmp_path: Path, shipped: Path) -> None:
    model = onnx.load_model_from_string((shipped / parity.MODEL).read_bytes())
    body = onnx.helper.make_graph([], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["input"], ["odd"], then_branch=body, else_branch=body))
    bundle.write(tmp_path / "b", bundle.read(shipped), {parity.MODEL: model.SerializeToString()})
    with pytest.raises(ArtifactError, match=r"control flow: the If node \['odd'\] has a graph of its own"):
        load(tmp_path / "b", runtime="onnxruntime")
