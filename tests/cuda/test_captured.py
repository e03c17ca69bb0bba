"""What a CUDA graph holds must neither wait for the device nor copy from the host; shown without a device.

Fake tensors know shapes, types and devices, and every operator that is called on them is seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nasq.cuda import support
from nasq.deploy.cuda_network import CudaNetwork
from nasq.deploy.integer_network import IntegerNetwork
from nasq.quant.program import Program
from tests.deploy.programs import fused_program, random_program, residual_program
from tests.deploy.token_programs import cnn_program, vit_program

PROGRAMS = {
    "random": random_program(0, size=14), "again": random_program(1, size=14),
    "fused": fused_program(residual_program(0, 4, 4)), "squeezed": cnn_program(0), "tokens": vit_program(1, causal=True),
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Collects what a capture refuses: numbers made on the host, numbers read on it, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        devices = {part.device.type for part in (*args, made) if isinstance(part, torch.Tensor) and part.ndim}
        if len(devices) > 1 or any(name in str(func) for name in ("lift_fresh", "_local_scalar_dense", "nonzero")):
            self.found.add(str(func))
        return made


def refused(make: Callable[[], IntegerNetwork], program: Program) -> set[str]:
    watch = Watch()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # there is no device
        network, x = make().to("cuda"), torch.empty(3, *program.ops[0].output.shape, device="cuda")
        with watch:
            made = network.containers(x)
    assert made.device.type == "cuda" and made.shape == (3, *program.output.shape)
    return watch.found


@pytest.fixture(params=["kernels", "none"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param == "kernels":
        pytest.importorskip("triton")
    monkeypatch.setattr(support, "why_not", lambda device: "" if request.param == "kernels" else "there is no triton")
    yield request.param == "kernels"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_can_be_captured(name: str, kernels: bool) -> None:
    program = PROGRAMS[name]
    network = CudaNetwork(program, "cpu")
    assert kernels == any(plan.kernel in ("conv", "linear", "add") for plan in network.plans)
    assert refused(lambda: CudaNetwork(program, "cpu"), program) == set()


def test_the_integer_network_can_be_captured() -> None:
    for program in PROGRAMS.values():
        assert refused(lambda program=program: IntegerNetwork(program), program) == set()


def test_what_no_capture_holds_is_seen() -> None:
    class Reads(IntegerNetwork):
        def finish(self, last: torch.Tensor) -> torch.Tensor:
            return last + torch.tensor(1.0, device=last.device)

    assert refused(lambda: Reads(PROGRAMS["fused"]), PROGRAMS["fused"]) >= {"aten.lift_fresh.default"}
