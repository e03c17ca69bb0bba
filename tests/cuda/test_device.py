"""What of training depends on the kind of device, where it can be seen without one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nasq.quant.forms import ActivationForm
from nasq.training.state import TrainerState


def trainer(device: str = "cpu") -> Any:
    return SimpleNamespace(device=torch.device(device), config=SimpleNamespace(seed=3))


def test_a_training_begun_on_cuda_goes_on_on_the_cpu() -> None:
    state = TrainerState(trainer())
    with state.layer_stream():
        first = torch.rand(3)
    state.layers["cuda"] = torch.zeros(16, dtype=torch.uint8)  # as a checkpoint of a CUDA training holds it
    before = torch.get_rng_state()
    with state.layer_stream():
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(first, second)
    whole = TrainerState(trainer())
    with whole.layer_stream():
        assert torch.equal(torch.rand(6), torch.cat([first, second]))


def test_a_training_begun_on_the_cpu_seeds_the_stream_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(TrainerState, "_layer_state", lambda self: self.layers)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.inference_mode(False))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *rest: pytest.fail("there is no state to set"))
    state, before = TrainerState(trainer("cuda")), torch.get_rng_state()
    state.layers = {"cpu": before}
    with state.layer_stream():
        pass
    torch.set_rng_state(before)
    assert len(seeds) == 1


def test_step_sizes_are_the_exponential_rounded_once() -> None:
    form = ActivationForm(8, signed=False, symmetric=True)
    for value in torch.linspace(-12, 3, 301).tolist():
        with torch.no_grad():
            form.log_step.fill_(value)
        exact = math.exp(float(form.log_step.detach()))
        assert float(form.grid().step.detach()) == float(torch.tensor(exact, dtype=torch.float64).float())
