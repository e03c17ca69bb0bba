"""The CUDA form of a program where there is no device and no kernel: the fallbacks, the plans, the refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nasq
from nasq.cuda import nibbles, products, support
from nasq.deploy import bundle
from nasq.deploy.cuda_network import CudaNetwork
from nasq.deploy.cuda_runtime import CudaRuntime
from nasq.deploy.reference import Reference
from nasq.errors import TargetError
from nasq.quant.program import Clip, Input, Program, Tensor
from tests.cuda.nets import small_network
from tests.deploy.programs import Maker, random_input, random_program
from tests.deploy.token_programs import vit_program


def linear_program(weight_bits: int = 8) -> Program:
    """Sizes that ``torch._int_mm`` takes."""
    maker = Maker(np.random.default_rng(7), (8,))
    last = maker.reshape(maker.conv(maker.input((3, 6, 6)), 8, 3, bits=8, form="unsigned"), (128,))
    last = maker.linear(last, 24, weight_bits=weight_bits, bits=8, form="signed_relu")
    maker.linear(last, 16, weight_bits=weight_bits, bits=8, form="signed")
    return maker.program()


PROGRAMS = {"cnn": random_program(4, size=13), "vit": vit_program(5), "linear": linear_program()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_kernels_the_integers_are_those_of_the_reference(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]
    bundle.write(tmp_path / "bundle", program)
    x = random_input(program, 5, seed=2)
    runtime, wanted = CudaRuntime(program, "cpu"), Reference(tmp_path / "bundle").run(x)
    assert np.array_equal(runtime.run(x), wanted) and len(np.unique(wanted)) > 5
    made = program.output
    real = (wanted.astype(np.float32) - made.zero_point) * np.float32(made.scale)
    assert np.array_equal(runtime.logits(x), real)


def test_plans_name_what_runs_in_float_and_why() -> None:
    network = CudaNetwork(PROGRAMS["cnn"], "cpu")
    assert len(network.plans) == len(PROGRAMS["cnn"].ops)
    for plan in network.plans:
        assert (plan.kernel == "float") == bool(plan.reason)
    (conv, *_) = [plan for plan in network.plans if plan.kind == "conv"]
    assert conv.reason == "the device is 'cpu', not 'cuda'" and sum(network.counts().values()) == len(network.plans)


def test_linear_layers_fall_back_to_the_int8_product_of_torch() -> None:
    network = CudaNetwork(linear_program(), "cpu")
    assert [plan.kernel for plan in network.plans if plan.kind == "linear"] == ["_int_mm", "_int_mm"]
    narrow = replace(linear_program(), ops=PROGRAMS["cnn"].ops)  # its classifier has 10 classes
    assert "_int_mm" not in CudaNetwork(narrow, "cpu").counts()


def test_a_bundle_on_cuda_without_a_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bundle.write(tmp_path / "bundle", PROGRAMS["linear"])
    with pytest.raises(TargetError, match=r"'nasq-cuda' needs a CUDA device, and torch sees none.*nvidia-smi"):
        nasq.load(tmp_path / "bundle", runtime="nasq-cuda")


def test_reasons_against_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(support.SWITCH, "1")
    assert support.why_not(torch.device("cpu")) == "the device is 'cpu', not 'cuda'" and not support.interpreting()
    for capability, reason in (((7, 5), "V100 has compute capability 7.5; the kernels need 8.0"), ((9, 0), "")):
        support._too_old.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, found=capability: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "V100")
        assert support.why_not(cuda) == reason and support.usable(cuda) == (not reason)
    for value in ("0", ""):  # they can run, and training and evaluation do not use them unless they are switched on
        monkeypatch.setenv(support.SWITCH, value)
        assert support.why_not(cuda) == "" and not support.usable(cuda)
    monkeypatch.delenv(support.SWITCH)
    assert not support.usable(cuda)
    support._too_old.cache_clear()
    monkeypatch.setattr(support, "_missing", lambda: "the package 'triton' is not installed (pip install triton)")
    assert "pip install triton" in support.why_not(cuda)


class Elsewhere:
    """What :mod:`nasq.cuda.products` asks of a tensor, on a device that is not here."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.device = data, torch.device("cuda", 0)

    def double(self) -> torch.Tensor:
        return self.data.double()

    def __matmul__(self, other: Any) -> Any:
        return "fp32"


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_on_cuda_are_float64_where_fp32_may_not_be_exact(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-128, 128, (4, 6, 5, 5), generator=generator).float() for _ in range(2))
    made = products.conv2d(Elsewhere(x), Elsewhere(w), stride=1, padding=2, dilation=1, groups=1)  # type: ignore[arg-type]
    assert made.dtype == torch.float64 and torch.equal(made.float(), torch.conv2d(x, w, padding=2))
    a = products.matmul(Elsewhere(x), Elsewhere(w))  # type: ignore[arg-type]
    assert a == "fp32" if precision == "highest" else a.dtype == torch.float64


def test_where_int32_is_too_narrow_the_kernels_are_not_asked() -> None:
    assert products.fits(65_535, 128) and not products.fits(65_536, 128)
    assert 2 * 65_535 * 128 * 128 < 2**31


@given(st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packing_nibbles_is_undone(depth: int, seed: int) -> None:
    weight = torch.randint(-8, 8, (3, depth), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = nibbles.pack_w4(weight)
    assert packed.shape == (3, nibbles.halves(depth)) and nibbles.halves(depth) % 16 == 0
    assert torch.equal(nibbles.unpack_w4(packed, depth), weight)
    half = nibbles.halves(depth)
    low, high = (packed.int() & 15), (packed.int() >> 4) & 15
    for j in range(min(depth, half)):  # the format, nibble by nibble
        assert torch.equal(low[:, j], weight[:, j].int() % 16)
        if half + j < depth:
            assert torch.equal(high[:, j], weight[:, half + j].int() % 16)


def test_sums_are_split_until_the_device_is_full() -> None:
    assert nibbles.split_of(16, 4096, 2048, 132) == 4  # 64 tiles; parts of 512 bytes
    assert nibbles.split_of(16, 4096, 65_536, 132) == 8  # 512 programs for 132 multiprocessors
    assert nibbles.split_of(16, 65_536, 65_536, 132) == 1 and nibbles.split_of(1, 64, 1 << 20, 132) == 16


@pytest.mark.gpu
def test_the_evaluation_on_a_device_equals_that_on_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    for bits in (2, 4, 8):
        network, x = small_network(weight_bits=bits)
        wanted = network.integers(x)
        assert torch.equal(network.cuda().integers(x.cuda()).cpu(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_on_a_device_equals_the_reference(name: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    program = PROGRAMS[name]
    bundle.write(tmp_path / "bundle", program)
    runtime, reference = CudaRuntime(program), Reference(tmp_path / "bundle")
    for seed in range(3):  # eager, captured, replayed
        x = random_input(program, 5, seed)
        assert np.array_equal(runtime.run(x), reference.run(x))
    assert "float" not in {plan.kernel for plan in runtime.network.plans if plan.kind in ("conv", "linear", "matmul")}


def test_large_inputs_are_run_in_parts(tmp_path: Path) -> None:
    program = PROGRAMS["linear"]
    bundle.write(tmp_path / "bundle", program)
    x = random_input(program, 7, seed=3)
    runtime = CudaRuntime(program, "cpu", chunk=3)
    seen = []
    run = runtime.network.containers
    runtime.network.containers = lambda x: seen.append(len(x)) or run(x)  # type: ignore[assignment, func-returns-value]
    assert np.array_equal(runtime.run(x), Reference(tmp_path / "bundle").run(x)) and seen == [3, 3, 1]


def test_a_clip_to_a_range_beyond_int8_clips_nothing(tmp_path: Path) -> None:
    """The integers 100 to 255 are held as -100 to 55; 0 would be -200."""
    pixels = Tensor("pixels", (2, 3), 0.125, 200, 100, 255, 8)
    wide = replace(pixels, name="wide", low=0)
    program = Program((Input((), pixels, "pixels"), Clip(("pixels",), wide, "clip")), "generic", "both", {})
    bundle.write(tmp_path / "bundle", program)
    x = np.linspace(-20, 20, 30, dtype=np.float32).reshape(5, 2, 3)
    wanted = Reference(tmp_path / "bundle").run(x)
    assert np.array_equal(CudaRuntime(program, "cpu").run(x), wanted) and wanted.min() == 100 and wanted.max() == 255
