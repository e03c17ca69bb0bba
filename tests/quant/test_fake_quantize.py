from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import generator
from torch import Tensor

from nasq.quant.arithmetic import round_ste, to_integers
from nasq.quant.fake import fake_quantize, gradient_scale

BITS = [2, 3, 4, 8]


def closed_form(
    x: np.ndarray, step: np.ndarray, low: np.ndarray, high: np.ndarray, g: np.ndarray
) -> dict[str, np.ndarray]:
    """LSQ's forward and gradients, element by element in float64 (EQ-Net digest 2.2 and property 5)."""
    v = x / step
    inside = (v > low) & (v < high)
    q = np.rint(np.clip(v, low, high))
    per_element = np.where(inside, q - v, np.where(v <= low, low, high))
    return {
        "y": q * step,
        "x": np.where(inside, g, 0.0),
        "step": g * per_element,
        "zero": np.where(inside, 0.0, -g * step),  # low and high both fall by one where the zero-point rises by one
    }


def sums(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    axes = tuple(i for i in range(value.ndim) if i >= len(shape) or shape[i] == 1) if shape else None
    return value.sum(axis=axes, keepdims=bool(shape)).reshape(shape)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(), (6, 1, 1)], ids=["tensor", "channel"])
def test_values_and_gradients_equal_the_closed_form(bits: int, signed: bool, shape: tuple[int, ...]) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    rng = generator(bits)
    x = torch.randn(6, 4, 5, generator=rng, dtype=torch.float64).requires_grad_()
    step = (torch.rand(shape, generator=rng, dtype=torch.float64) + 0.5) / 2**bits
    step.requires_grad_()
    g = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    y = fake_quantize(x, step, float(low), float(high), scale=0.25)
    y.backward(g)
    a, s = x.detach().numpy(), step.detach().numpy()
    wanted = closed_form(a, s, np.float64(low), np.float64(high), g.numpy())
    np.testing.assert_allclose(y.detach().numpy(), wanted["y"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(x.grad.numpy(), wanted["x"], rtol=1e-12)
    np.testing.assert_allclose(step.grad.numpy(), 0.25 * sums(wanted["step"], shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (6, 1, 1)], ids=["tensor", "channel"])
def test_the_zero_points_gradient_is_one_step_outside_and_nothing_inside(shape: tuple[int, ...]) -> None:
    rng = generator(7)
    x = torch.randn(6, 4, 5, generator=rng, dtype=torch.float64) + 0.3
    step = torch.full(shape, 0.2, dtype=torch.float64)
    zeta = (torch.randint(2, 6, shape, generator=rng).double() + 0.3).requires_grad_()
    low = 0 - round_ste(zeta)
    y = fake_quantize(x, step, low, (low + 7).detach(), scale=0.5)
    g = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    y.backward(g)
    z = np.rint(zeta.detach().numpy())
    wanted = closed_form(x.numpy(), step.numpy(), 0 - z, 7 - z, g.numpy())
    np.testing.assert_allclose(y.detach().numpy(), wanted["y"], atol=1e-12)
    np.testing.assert_allclose(zeta.grad.numpy(), 0.5 * sums(wanted["zero"], shape), rtol=1e-10)
    # The offset of the digest is beta = -step * zero_point: its gradient is 1 outside and 0 inside.
    beta = zeta.grad / -step / 0.5
    outside = np.where(wanted["x"] == 0, g.numpy(), 0)
    np.testing.assert_allclose(beta.numpy(), sums(outside, shape), rtol=1e-10)


@pytest.mark.parametrize("layout", ["sliced", "transposed", "channels_last"])
def test_the_memory_layout_changes_no_gradient(layout: str) -> None:
    x = torch.randn(4, 8, 6, 6, generator=generator(1))
    if layout == "sliced":
        x = x[:, 1:7:2]
    elif layout == "transposed":
        x = x.transpose(1, 3)
    else:
        x = x.to(memory_format=torch.channels_last)
    g = torch.randn(x.shape, generator=generator(2))
    results = []
    for value in (x, x.contiguous()):
        leaf, step = value.detach().requires_grad_(), torch.tensor(0.1, requires_grad=True)
        fake_quantize(leaf, step, -8.0, 7.0).backward(g)
        results.append((leaf.grad, step.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "one row"])
@pytest.mark.parametrize("learned", [False, True])
def test_large_tensors_in_any_layout_equal_the_closed_form(layout: str, learned: bool) -> None:
    """Large tensors are worked on in pieces: every element has to be seen, once, with its own gradient."""
    x = torch.randn(5, 33, 40, 41, generator=generator(1), dtype=torch.float64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x[:, ::2]
    elif layout == "one row":
        x = x.flatten()
    g = torch.randn(x.shape, generator=generator(2), dtype=torch.float64)
    leaf, step = x.detach().requires_grad_(), torch.tensor(0.11, dtype=torch.float64, requires_grad=True)
    zeta = torch.tensor(5.2, dtype=torch.float64, requires_grad=True)
    low: Any = 0 - round_ste(zeta) if learned else -5.0
    y = fake_quantize(leaf, step, low, (low + 15).detach() if learned else 10.0, scale=0.5)
    y.backward(g)
    wanted = closed_form(x.numpy(), np.float64(0.11), np.float64(-5), np.float64(10), g.numpy())
    assert leaf.grad is not None and step.grad is not None
    np.testing.assert_allclose(y.detach().numpy(), wanted["y"], atol=1e-12)
    np.testing.assert_array_equal(leaf.grad.numpy(), wanted["x"])
    assert step.grad.item() == pytest.approx(0.5 * wanted["step"].sum(), rel=1e-9)
    if learned:
        assert zeta.grad is not None and zeta.grad.item() == pytest.approx(0.5 * wanted["zero"].sum(), rel=1e-9)


def test_an_expanded_gradient() -> None:
    """As a sum's backward gives it: one number, expanded."""
    x = torch.randn(3, 7, generator=generator(0), requires_grad=True)
    step = torch.tensor(0.1, requires_grad=True)
    fake_quantize(x, step, -8.0, 7.0).sum().backward()
    a, s = x.detach().double().numpy(), np.float64(np.float32(0.1))
    wanted = closed_form(a, s, np.float64(-8), np.float64(7), np.ones((3, 7)))
    assert x.grad is not None and np.array_equal(x.grad.numpy(), wanted["x"])
    assert step.grad is not None and step.grad.item() == pytest.approx(wanted["step"].sum(), rel=1e-4)


def test_numerical_gradient_of_the_step_where_rounding_does_not_flip() -> None:
    """Outside the range the function is linear in the step: there the gradient is the numerical one."""
    x = torch.tensor([5.0, -7.0, 9.0], dtype=torch.float64)
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: fake_quantize(x, s, -4.0, 3.0), (step,))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 8),
    st.booleans(),
    st.floats(1e-4, 10),
    st.integers(0, 10_000),
    st.sampled_from(["float32", "float64"]),
)
def test_grid_membership_idempotence_and_range(bits: int, signed: bool, size: float, seed: int, kind: str) -> None:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    dtype = getattr(torch, kind)
    step = torch.tensor(size, dtype=dtype)
    x = torch.randn(200, generator=generator(seed), dtype=dtype) * step * 2**bits
    y = fake_quantize(x, step, float(low), float(high))
    assert len(y.unique()) <= high - low + 1
    integers = torch.round(y / step)
    assert torch.equal(integers * step, y) and low <= integers.min() and integers.max() <= high
    assert torch.equal(fake_quantize(y, step, float(low), float(high)), y)
    assert fake_quantize(torch.zeros(1, dtype=dtype), step, float(low), float(high)).item() == 0
    if signed:
        kept = (integers != low) & (torch.round(fake_quantize(-x, step, float(low), float(high)) / step) != low)
        assert torch.equal(fake_quantize(-x, step, float(low), float(high))[kept], -y[kept])


@pytest.mark.parametrize(
    "make", [lambda: torch.tensor(0.05), lambda: torch.full((4, 1, 1), 0.05)], ids=["tensor", "channel"]
)
@pytest.mark.parametrize("learned", [False, True])
def test_bf16(make: Callable[[], Tensor], learned: bool) -> None:
    """Works in bf16 with fp32 steps: output in bf16, gradients close to those of fp32."""
    g = torch.randn(4, 32, 32, generator=generator(1))
    values, found = torch.randn(4, 32, 32, generator=generator(0)).bfloat16(), []
    for dtype in (torch.float32, torch.bfloat16):
        x, step = values.to(dtype).requires_grad_(), make().requires_grad_()
        zeta = torch.zeros_like(make()).add_(3.0).requires_grad_()
        low: Any = -8 - round_ste(zeta) if learned else -8.0
        y = fake_quantize(x, step, low, (low + 15).detach() if learned else 7.0, scale=1e-2)
        assert y.dtype == dtype
        y.backward(g.to(dtype))
        assert (
            x.grad is not None and x.grad.dtype == dtype and step.grad is not None and step.grad.dtype == torch.float32
        )
        found.append((y.float(), step.grad, zeta.grad if learned else torch.zeros(1)))
    (y32, s32, z32), (y16, s16, z16) = found
    difference = (y32 - y16).detach().abs()
    assert float(difference.max()) <= 0.051 and float(difference.mean()) < 0.003
    torch.testing.assert_close(s16, s32, rtol=0.05, atol=0.05)
    torch.testing.assert_close(z16, z32, rtol=0.05, atol=0.05)


def test_saved_tensors_are_not_changed_in_place() -> None:
    x = torch.randn(10, generator=generator(0), requires_grad=True)
    before = x.detach().clone()
    y = fake_quantize(x, torch.tensor(0.1), -8.0, 7.0)
    copied = y.detach().clone()
    y.sum().backward()
    assert torch.equal(x.detach(), before) and torch.equal(y.detach(), copied)


def test_fake_and_integer_form_agree_on_every_value_ties_included() -> None:
    """One function, two forms: real values rounded to the grid are the integers times the step, bit for bit."""
    for seed in range(40):
        rng = generator(seed)
        step = torch.rand((), generator=rng) * 0.1 + 1e-3
        grid = torch.arange(-140, 140).float()
        x = torch.cat(
            [torch.randn(4000, generator=rng), grid * step, (grid + 0.5) * step, step * 127.5 * torch.ones(1)]
        )
        fake = fake_quantize(x, step, -128.0, 127.0)
        integers = to_integers(x, step, 128.0, 0, 255)
        assert torch.equal(fake, (integers - 128) * step), seed


def test_to_integers_rounds_half_to_even_and_clips() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 100.0, -100.0])
    assert to_integers(x, torch.tensor(1.0), 10.0, 0, 15).tolist() == [10, 12, 12, 10, 8, 15, 0]


def test_round_ste() -> None:
    x = torch.tensor([0.4, 0.5, 1.5, -2.6], requires_grad=True)
    round_ste(x).sum().backward()
    assert round_ste(x).tolist() == [0, 0, 2, -3] and x.grad is not None and x.grad.tolist() == [1] * 4


@pytest.mark.parametrize(("numel", "high", "wanted"), [(100, 4, 0.05), (1, 1, 1.0), (4, 0, 0.5)])
def test_gradient_scale(numel: int, high: int, wanted: float) -> None:
    assert gradient_scale(numel, high) == pytest.approx(wanted)
