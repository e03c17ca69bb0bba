"""Checks of the CUDA kernels that run in a process of its own, where Triton interprets them on the CPU.

``python -m tests.cuda.interpreted [NAME ...]`` prints a JSON object: each check's name with ``""`` or what went wrong.
Everything is compared with int64 NumPy or with :class:`nasq.deploy.reference.Reference`, which share no code with it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def integers(rng: np.random.Generator, low: int, high: int, *shape: int) -> Any:
    return rng.integers(low, high + 1, shape)


def int8(values: Any) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int8))


def equal(found: torch.Tensor, wanted: Any) -> None:
    assert tuple(found.shape) == wanted.shape, (tuple(found.shape), wanted.shape)
    differ = int((found.numpy().astype(np.int64) != wanted).sum())
    assert differ == 0, f"{differ} of {wanted.size} integers differ"


def placed(acc: Any, scale: Any, low: int, high: int, zero: int) -> Any:
    """``clip(rne(fp32(acc) * scale), low, high) + zero``: rounded first, clipped then."""
    steps = np.rint(acc.astype(np.float32) * scale)
    return np.clip(steps, low, high).astype(np.int64) + zero


def convolved(x: Any, w: Any, s: tuple[int, int], p: tuple[int, int], d: tuple[int, int], groups: int, pad: int) -> Any:
    """Tap by tap, in int64: ``x [N, C, H, W]``, ``w [O, C / groups, kh, kw]``."""
    x = np.pad(x, ((0, 0), (0, 0), (p[0],) * 2, (p[1],) * 2), constant_values=pad)
    size = [(x.shape[i + 2] - d[i] * (w.shape[i + 2] - 1) - 1) // s[i] + 1 for i in (0, 1)]
    out, narrow = len(w) // groups, w.shape[1]
    y = np.zeros((len(x), len(w), *size), np.int64)
    for o in range(len(w)):
        first = o // out * narrow
        for c in range(narrow):
            for i in range(w.shape[2]):
                for j in range(w.shape[3]):
                    rows = slice(i * d[0], i * d[0] + (size[0] - 1) * s[0] + 1, s[0])
                    columns = slice(j * d[1], j * d[1] + (size[1] - 1) * s[1] + 1, s[1])
                    y[:, o] += x[:, first + c, rows, columns] * w[o, c, i, j]
    return y


@check
def a_matrix_product_equals_int64() -> None:
    from nasq.cuda import ops

    rng = np.random.default_rng(0)
    a, b = integers(rng, -128, 127, 2, 19, 50), integers(rng, -128, 127, 2, 21, 50)
    bias = integers(rng, -(10**5), 10**5, 21)
    found = ops.gemm(int8(a), int8(b), torch.from_numpy(bias.astype(np.int32)))
    equal(found, a @ b.transpose(0, 2, 1) + bias)
    scale = rng.uniform(5e-4, 2e-3, 21).astype(np.float32)
    epilogue = ops.Epilogue(torch.from_numpy(scale), -100, 97, -20)
    found = ops.gemm(int8(a), int8(b[:1]), torch.from_numpy(bias.astype(np.int32)), epilogue)
    wanted = placed(a @ b[0].T + bias, scale, -100, 97, -20)
    equal(found, wanted)
    assert len(np.unique(wanted)) > 50


@check
def a_product_of_two_offset_tensors_equals_int64() -> None:
    from nasq.cuda import ops

    rng = np.random.default_rng(1)
    a, b = integers(rng, -128, 127, 3, 5, 33), integers(rng, -128, 127, 3, 7, 33)
    for extra in ((128, 0), (0, 77), (128, 128)):
        equal(ops.gemm(int8(a), int8(b), extra=extra), (a + extra[0]) @ (b + extra[1]).transpose(0, 2, 1))


@check
def ties_are_rounded_to_even_and_bounds_hold() -> None:
    from nasq.cuda import ops

    acc = np.arange(-40, 41)
    a, b = int8(acc[None, :, None]), torch.ones(1, 1, 1, dtype=torch.int8)
    epilogue = ops.Epilogue(torch.tensor([0.5]), -15, 18, 3)
    wanted = np.array([min(max(round(value / 2), -15), 18) + 3 for value in acc.tolist()])  # Python rounds half to even
    equal(ops.gemm(a, b, torch.zeros(1, dtype=torch.int32), epilogue), wanted.reshape(1, -1, 1))


@check
def accumulators_above_fp32_are_rounded_once() -> None:
    from nasq.cuda import ops

    bias = np.array([2**24 + 1, 2**24 + 3, 2**30 + 64, 2**30 + 65, -(2**24) - 1], np.int32)
    scale = np.full(5, 2.0**-23, np.float32)
    zeros = torch.zeros(1, 5, 16, dtype=torch.int8)
    epilogue = ops.Epilogue(torch.from_numpy(scale), -128, 127, 0)
    found = ops.gemm(zeros[:, :1], zeros, torch.from_numpy(bias), epilogue)
    equal(found, placed(bias.astype(np.int64)[None, None], scale, -128, 127, 0))


@check
def convolutions_equal_int64() -> None:
    from nasq.cuda import ops

    rng = np.random.default_rng(2)
    cases = [  # images, channels, height, width, outputs, kernel, stride, padding, dilation, groups, what pads
        (2, 5, 7, 6, 7, (3, 2), (1, 2), (1, 0), (1, 2), 1, -7),  # fewer channels than a block: all taps in one row
        (1, 40, 3, 4, 18, (3, 3), (1, 1), (1, 1), (1, 1), 1, -128),  # more than one block, the last not full
        (1, 64, 4, 5, 6, (1, 1), (2, 2), (0, 0), (1, 1), 1, 0),  # whole blocks
        (2, 8, 6, 6, 12, (3, 3), (2, 1), (2, 1), (1, 1), 4, 5),
    ]
    for n, c, h, w, o, kernel, s, p, d, groups, pad in cases:
        x, weight = integers(rng, -128, 127, n, c, h, w), integers(rng, -128, 127, o, c // groups, *kernel)
        bias = integers(rng, -5000, 5000, o)
        wanted = convolved(x, weight, s, p, d, groups, pad) + bias[:, None, None]
        arguments = (int8(x), int8(weight).permute(0, 2, 3, 1), torch.from_numpy(bias.astype(np.int32)))
        geometry: dict[str, Any] = {"stride": s, "padding": p, "dilation": d, "groups": groups, "pad": pad}
        found = ops.conv2d(*arguments, **geometry)
        equal(found, wanted)
        assert found.is_contiguous(memory_format=torch.channels_last)
        scale = rng.uniform(0.5, 2, o).astype(np.float32) * np.float32(80 / wanted.std())
        made = ops.conv2d(*arguments, ops.Epilogue(torch.from_numpy(scale), 0, 127, -30), **geometry)
        equal(made, placed(wanted, scale[:, None, None], 0, 127, -30))


@check
def depthwise_convolutions_equal_int64() -> None:
    from nasq.cuda import ops

    rng = np.random.default_rng(3)
    x, weight, bias = (
        integers(rng, -128, 127, 2, 5, 7, 6),
        integers(rng, -128, 127, 10, 1, 3, 2),
        integers(rng, -99, 99, 10),
    )
    wanted = convolved(x, weight, (2, 1), (1, 1), (1, 2), 5, -128) + bias[:, None, None]
    arguments = (int8(x), int8(weight[:, 0]).permute(1, 2, 0), torch.from_numpy(bias.astype(np.int32)))
    geometry: dict[str, Any] = {"stride": (2, 1), "padding": (1, 1), "dilation": (1, 2), "pad": -128}
    equal(ops.depthwise(*arguments, **geometry), wanted)
    scale = np.full(10, 80 / wanted.std(), np.float32)
    made = ops.depthwise(*arguments, ops.Epilogue(torch.from_numpy(scale), -128, 100, 0), **geometry)
    equal(made, placed(wanted, scale[:, None, None], -128, 100, 0))


@check
def thin_products_of_packed_weights_equal_int64() -> None:
    from nasq.cuda import nibbles, ops

    rng = np.random.default_rng(4)
    for depth in (7, 50, 96):
        x, w = integers(rng, -128, 127, 5, depth), integers(rng, -8, 7, 21, depth)
        bias, shift = integers(rng, -999, 999, 21), integers(rng, 0, 4, 21)
        wanted = ((x @ w.T) << shift) + bias
        rest = (torch.from_numpy(shift.astype(np.int32)), torch.from_numpy(bias.astype(np.int32)))
        for split in (1, 4):
            equal(ops.thin_gemm(int8(x), nibbles.pack_w4(int8(w)), *rest, packed=True, split=split), wanted)
            equal(ops.thin_gemm(int8(x), int8(w), *rest, packed=False, split=split), wanted)
        scale = np.full(21, 80 / wanted.std(), np.float32)
        epilogue = ops.Epilogue(torch.from_numpy(scale), -128, 100, 0)
        found = ops.thin_gemm(int8(x), nibbles.pack_w4(int8(w)), *rest, epilogue, packed=True)
        equal(found, placed(wanted, scale, -128, 100, 0))


@check
def the_operators_know_their_shapes() -> None:
    from torch._subclasses import FakeTensorMode

    from nasq.cuda import ops, token_ops

    with FakeTensorMode():
        x, bias = torch.empty(2, 8, 9, 9, dtype=torch.int8), torch.empty(6, dtype=torch.int32)
        made = ops.conv2d(x, torch.empty(6, 3, 3, 8, dtype=torch.int8), bias, stride=(2, 2), padding=(1, 1))
        assert made.shape == (2, 6, 5, 5) and made.dtype == torch.int32
        assert made.is_contiguous(memory_format=torch.channels_last)
        epilogue = ops.Epilogue(torch.empty(6), 0, 1, 0)
        rows = torch.empty(4, 8, dtype=torch.int8)
        assert ops.gemm(rows[None], rows[None, :3], None).shape == (1, 4, 3)
        thin = ops.thin_gemm(rows, torch.empty(6, 8, dtype=torch.int8), bias, bias, epilogue, packed=False)
        assert thin.shape == (4, 6) and thin.dtype == torch.int8
        assert token_ops.softmax(rows, torch.empty(256, dtype=torch.int32), 0.1, (0, 1, 0)).shape == rows.shape


def _reference_tensors(program: Any, count: int) -> tuple[Any, dict[str, Any]]:
    from nasq.deploy import bundle
    from nasq.deploy.reference import Reference
    from tests.deploy.programs import random_input

    x = random_input(program, count, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        bundle.write(Path(folder) / "bundle", program)
        return x, Reference(Path(folder) / "bundle").run(x, every=True)


def _every_tensor_equals_the_reference(program: Any, count: int = 2) -> dict[str, int]:
    from nasq.deploy.cuda_network import CudaNetwork

    x, wanted = _reference_tensors(program, count)
    network = CudaNetwork(program, "cpu")
    execute, found = network.execute, {}

    def keep(index: int, op: Any, given: Any, n: int) -> torch.Tensor:
        made = execute(index, op, given, n)
        assert made.dtype == torch.int8
        found[op.output.name] = made.short() + network.offsets[op.output.name]
        return made

    network.execute = keep  # type: ignore[method-assign]
    result = network.integers(torch.from_numpy(x))
    assert np.array_equal(result.numpy(), wanted[program.output.name])
    for name, value in found.items():
        assert np.array_equal(value.numpy(), wanted[name]), (name, program.ops[network.places[name]].kind)
    assert len(found) == len(program.ops) - 1
    return network.counts()


@check
def a_random_network_equals_the_reference_in_every_tensor() -> None:
    from tests.deploy.programs import random_program

    counts = _every_tensor_equals_the_reference(random_program(0, size=13, channels=6, image=(6, 6)))
    assert counts["conv"] > 5 and counts["depthwise"] and counts["add"], counts


@check
def a_squeeze_excitation_network_equals_the_reference_in_every_tensor() -> None:
    from tests.deploy.token_programs import cnn_program

    assert _every_tensor_equals_the_reference(cnn_program(0), 1)["table"] >= 3


@check
def a_transformer_equals_the_reference_in_every_tensor() -> None:
    from tests.deploy.token_programs import vit_program

    for causal in (False, True):
        counts = _every_tensor_equals_the_reference(vit_program(1 + causal, causal=causal), 1)
        assert counts["matmul"] == 2 and counts["softmax"] == 1 and counts["layer_norm"] == 2, counts


@check
def a_program_of_four_bits_takes_the_packed_kernel_and_asymmetric_weights_run_in_float() -> None:
    from nasq.deploy.cuda_network import CudaNetwork
    from tests.deploy.programs import Maker

    maker = Maker(np.random.default_rng(5), (4,))
    pooled = maker.avg_pool(maker.conv(maker.input((3, 6, 6)), 8, 3), (4, 4), (1, 1))
    maker.linear(maker.reshape(pooled, (8,)), 10, weight_bits=4)
    program = maker.program()
    assert _every_tensor_equals_the_reference(program)["linear w4"] == 1
    layer = program.ops[-1]
    zeros = np.full(10, -7, np.int8)
    changed = replace(layer, weight_zero=zeros, weight_bits=8, weight=np.full_like(layer.weight, 127))
    (plan,) = [plan for plan in CudaNetwork(replace(program, ops=(*program.ops[:-1], changed)), "cpu").plans[-1:]]
    assert plan.kernel == "float" and "leave int8" in plan.reason, plan


@check
def a_quantized_networks_evaluation_is_the_same_with_the_kernels() -> None:
    from nasq.cuda import products
    from tests.cuda.nets import small_network

    network, x = small_network()
    usable, asked = products.usable, []
    results = []
    try:
        for answer in (True, False):
            products.usable = lambda device, answer=answer: asked.append(answer) or answer  # type: ignore[func-returns-value]
            results.append(network.integers(x))
    finally:
        products.usable = usable
    assert asked.count(True) == asked.count(False) == 5, asked  # one per layer
    assert torch.equal(results[0], results[1]) and len(results[0].unique()) > 5


def _fake(x: torch.Tensor, step: torch.Tensor, low: Any, high: Any, kernels: bool, g: torch.Tensor) -> SimpleNamespace:
    from nasq.quant import fake

    served = fake._served
    fake._served = served if kernels else lambda *rest: False  # type: ignore[assignment]
    try:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, step)]
        bound = low.clone().requires_grad_() if isinstance(low, torch.Tensor) else low
        y = fake.fake_quantize(leaves[0], leaves[1], bound, high, 0.5)
        y.backward(g)
    finally:
        fake._served = served
    assert not kernels or served(x, step, low, high)
    return SimpleNamespace(y=y, x=leaves[0].grad, step=leaves[1].grad, low=bound.grad if bound is not low else None)


@check
def fake_quantization_equals_the_plain_form() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 5, 21, 33).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 3, 3, 3)
    steps, zeros = torch.rand(6, 1, 1, 1) * 0.2 + 0.05, torch.arange(6.0).reshape(-1, 1, 1, 1)
    cases = [
        (image, torch.tensor(0.1), -8.0, 7.0),
        (image, torch.tensor(0.1), torch.tensor(-3.0), torch.tensor(12.0)),
        (weight, steps, -2.0, 1.0),
        (weight, steps, zeros - 8, zeros + 7),
        (weight.contiguous(memory_format=torch.channels_last), steps, -2.0, 1.0),
        (torch.randn(7), torch.tensor(0.3), -128.0, 127.0),
    ]
    for x, step, low, high in cases:
        g = torch.randn_like(x)
        plain, made = (_fake(x, step, low, high, kernels, g) for kernels in (False, True))
        assert torch.equal(plain.y, made.y) and torch.equal(plain.x, made.x)
        torch.testing.assert_close(made.step, plain.step, rtol=2e-5, atol=2e-4)
        if plain.low is not None:
            torch.testing.assert_close(made.low, plain.low, rtol=2e-5, atol=2e-4)


@check
def fake_quantization_of_narrow_types_is_rounded_once_and_keeps_nan() -> None:
    from nasq.cuda import rounding

    torch.manual_seed(1)
    for kind in (torch.bfloat16, torch.float16):
        x, step = torch.randn(300).to(kind), torch.tensor([0.1])
        wanted = (torch.clamp(x.float() / step, -8, 7).round() * step).to(kind)
        found = rounding.forward(x, step, -8.0, 7.0)
        assert found.dtype == kind
        # Interpreted, bf16 is cut off where a device rounds: one unit of its last place.
        torch.testing.assert_close(found, wanted, rtol=2**-7 if kind == torch.bfloat16 else 0.0, atol=0.0)
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
    y = rounding.forward(x, torch.tensor([0.5]), -2.0, 3.0)
    assert bool(y[0].isnan()) and y[1:].tolist() == [1.5, -1.0, 0.0]


@check
def second_derivatives_of_fake_quantization_take_the_plain_form() -> None:
    from nasq.quant.fake import fake_quantize

    x = torch.tensor([0.3, 5.0, -1.2], requires_grad=True)
    step = torch.tensor(0.25, requires_grad=True)
    y = fake_quantize(x, step, -4.0, 3.0)
    (first,) = torch.autograd.grad((y * y).sum(), step, create_graph=True)
    (second,) = torch.autograd.grad(first, step)
    # y = step * (1, 3, -4): the first lies inside (derivative (rne(v) - v)), the others at the bounds.
    assert torch.isfinite(second) and abs(first.item() - 2 * (0.25 * -0.2 + 0.75 * 3 + 1.0 * 4)) < 1e-5


def main(names: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    results = {}
    for name in names or list(CHECKS):
        try:
            CHECKS[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
