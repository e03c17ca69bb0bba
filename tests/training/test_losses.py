from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fake_supernet import FakeSubnet
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.training import Path, PathLoss, cross_entropy, distillation
from nasq.training.losses import teachers


def _logits(seed: int, n: int = 6, classes: int = 5) -> torch.Tensor:
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)) * 3


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_distillation_is_the_closed_form_in_float64(temperature: float) -> None:
    student, teacher = _logits(0), _logits(1)
    p = _softmax(teacher.double().numpy() / temperature)
    q = _softmax(student.double().numpy() / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum() / len(p)
    assert distillation(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    exact = distillation(student.double(), teacher.double(), temperature).item()
    assert exact == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(-50, 50))
def test_kl_is_zero_for_equal_logits_up_to_a_constant_and_never_negative(seed: int, constant: float) -> None:
    a, b = _logits(seed).double(), _logits(seed + 1).double()
    assert distillation(a, a).item() == 0
    assert abs(distillation(a, a + constant).item()) < 1e-9
    assert distillation(a, b).item() >= 0


def test_the_teacher_gets_no_gradient_and_the_students_is_softmax_difference() -> None:
    student, teacher = _logits(0).double().requires_grad_(), _logits(1).double().requires_grad_()
    distillation(student, teacher).backward()
    assert teacher.grad is None
    expected = (student.softmax(1) - teacher.softmax(1)).detach() / len(student)
    torch.testing.assert_close(student.grad, expected)


def test_extreme_logits_stay_finite() -> None:
    student, teacher = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert distillation(student, teacher).item() == pytest.approx(2e4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_slow_loop(smoothing: float) -> None:
    logits, labels = _logits(2), torch.tensor([0, 1, 2, 3, 4, 0])
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 3.0])
    losses = []
    for z, y in zip(logits.double().tolist(), labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(v) for v in z))
        target = [smoothing / 5 + (1 - smoothing) * (c == y) for c in range(5)]
        losses.append(-sum(t * (v - log_sum) for t, v in zip(target, z, strict=True)))
    assert cross_entropy(logits, labels, smoothing).item() == pytest.approx(sum(losses) / 6, rel=1e-5)
    weighted = sum(w * loss for w, loss in zip(weights.tolist(), losses, strict=True)) / 6
    assert cross_entropy(logits, labels, smoothing, weights).item() == pytest.approx(weighted, rel=1e-5)


def test_weights_of_one_change_nothing() -> None:
    student, teacher, labels = _logits(0), _logits(1), torch.arange(6) % 5
    ones = torch.ones(6)
    assert distillation(student, teacher, weights=ones).item() == distillation(student, teacher).item()
    torch.testing.assert_close(cross_entropy(student, labels, 0.1, ones), cross_entropy(student, labels, 0.1))


def test_path_loss_mixes_and_falls_back_to_cross_entropy() -> None:
    student, teacher, labels = _logits(0), _logits(1), torch.arange(6) % 5
    ce, kd = cross_entropy(student, labels, 0.1), distillation(student, teacher, 2.0)
    mixed = PathLoss(distill=0.25, temperature=2.0, label_smoothing=0.1)
    torch.testing.assert_close(mixed(student, labels, teacher), 0.25 * kd + 0.75 * ce)
    assert mixed(student, labels).item() == ce.item()
    assert PathLoss(distill=0.0)(student, labels, teacher).item() == cross_entropy(student, labels).item()
    assert PathLoss(distill=1.0)(student, labels, teacher).item() == distillation(student, teacher).item()


def test_the_largest_teaches_those_after_it() -> None:
    subnet = FakeSubnet(8, "conv")
    roles = lambda *names: [Path(subnet, name) for name in names]  # noqa: E731
    assert teachers(roles("largest", "random", "random", "smallest")) == [None, 0, 0, 0]
    assert teachers(roles("random", "largest", "smallest")) == [None, None, 1]
    assert teachers(roles("random", "random")) == [None, None]


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match=r"temperature is 0; allowed: a number above 0"):
        distillation(_logits(0), _logits(1), 0)
    with pytest.raises(InputError, match=r"shapes \[6, 5\] and \[6, 4\]"):
        distillation(_logits(0), _logits(1, classes=4))
