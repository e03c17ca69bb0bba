from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nasq import Choice, Supernet, elastic
from nasq.deploy import onnx, parity
from nasq.errors import TargetError
from nasq.quant import quantize
from nasq.quant.program import Conv, Program
from nasq.run.check import LayerForm, TargetCheck, check_target, noise, require_passed


def supernet(target: str = "onnxruntime-cpu") -> Supernet:
    width = Choice("width", (4, 8))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            elastic.Conv2d(3, width, 3, bias=False), elastic.BatchNorm2d(width), nn.ReLU(),
            elastic.Conv2d(width, width, Choice("kernel", (1, 3)), bias=False), elastic.BatchNorm2d(width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), elastic.Linear(width, 5),
        )  # fmt: skip
    every = ("symmetric", "asymmetric")
    return Supernet(quantize(net, torch.zeros(1, 3, 8, 8), target, weight_symmetry=every), "tiny")


@pytest.fixture
def images() -> Iterator[torch.Tensor]:
    yield noise((3, 8, 8), 32)


def test_a_space_that_can_be_shipped(images: torch.Tensor) -> None:
    found = check_target(supernet(), images, subnets=3)
    assert found.passed and found.failures == () and (found.subnets, found.space) == (3, "tiny")
    assert {layer.path: (layer.kind, layer.integer, layer.exact) for layer in found.layers} == {
        "0": ("Conv", True, True), "3": ("Conv", True, True), "8": ("Linear", True, True)
    }  # fmt: skip
    assert found.total == 3 * 32 * 5 and found.differing <= 1
    assert any("asymmetric weights" in text for text in found.removed) and found.slow
    require_passed(found)


def test_the_reference_target_runs_nothing(images: torch.Tensor) -> None:
    found = check_target(supernet("generic"), images, subnets=2)
    assert found.passed and found.total == 0 and len(found.layers) == 3 and found.removed == ()
    require_passed(found)


def test_a_refused_space_names_the_layer(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that computes something else, simulated: the file of one layer has other biases than the bundle."""
    real = onnx.export

    def wrong(program: Program) -> bytes:
        ops = [
            dataclasses.replace(op, bias=op.bias + np.int32(5000)) if isinstance(op, Conv) and op.path == "3" else op
            for op in program.ops
        ]
        return real(dataclasses.replace(program, ops=ops))

    monkeypatch.setattr(onnx, "export", wrong)
    found = check_target(supernet(), images, subnets=2)
    assert not found.passed and found.differing > 0
    assert [layer.path for layer in found.layers if not layer.exact] == ["3"]
    with pytest.raises(
        TargetError, match=r"the space 'tiny' cannot be shipped to .* the Conv '3' computes other integers"
    ):
        require_passed(found)


def test_a_layer_in_float_is_refused(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    real = parity.check

    def in_float(*arguments: object, **options: object) -> parity.ParityReport:
        report = real(*arguments, **options)  # type: ignore[arg-type]
        integer = {**report.coverage.integer, "convolutions": 1}
        return dataclasses.replace(
            report, coverage=dataclasses.replace(report.coverage, integer=integer, floats=("3",))
        )

    monkeypatch.setattr(parity, "check", in_float)
    found = check_target(supernet(), images, subnets=2)
    with pytest.raises(TargetError, match=r"the Conv '3' does not run as an integer kernel\. 1 of 2 convolutions run"):
        require_passed(found)


def test_exact_layers_that_are_wired_wrongly_are_refused() -> None:
    layers = (LayerForm("a", "Conv", True, True),)
    found = TargetCheck("t", "s", 1, 7, 10, layers, (), (), None, ("7 of 10 final integers differ.",))
    with pytest.raises(TargetError, match=r"target 't': 7 of 10 final integers differ\. Replace"):
        require_passed(found)


def test_every_branch_and_every_form_of_a_layer_is_tried() -> None:
    """Two random subnets would miss most of five branches; bits need no subnet of their own."""
    names = ("a", "b", "c", "d", "e")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        branches = {name: nn.Conv2d(3, 4, 1 + 2 * (i % 2), padding=i % 2) for i, name in enumerate(names)}
        net = nn.Sequential(
            elastic.OneOf(Choice("operator", names), **branches), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 5),
        )  # fmt: skip
        tested = Supernet(quantize(net, torch.zeros(1, 3, 8, 8), first_last_bits=None), "branches")
    found = check_target(tested, noise((3, 8, 8), 8), subnets=2)
    assert found.missed == () and found.subnets in (5, 6)  # the largest may be the smallest
    assert {layer.path for layer in found.layers} == {*(f"0.branches.{name}" for name in names), "4"}


def test_classes_of_untrained_networks_are_not_judged(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training, outputs are nearly equal and one step decides: a space is not refused for that."""
    pytest.importorskip("openvino")
    honest, seen = parity.check, list[parity.ParityReport]()

    def other_classes(*given: Any) -> parity.ParityReport:
        seen.append(dataclasses.replace(honest(*given), same_class=0.5))
        return seen[-1]

    monkeypatch.setattr(parity, "check", other_classes)
    assert check_target(supernet("openvino-cpu"), images, subnets=2).passed and len(seen) >= 2
    assert all("50.00% of the images" in report.failures()[0] and not report.failures(trained=False) for report in seen)
