"""The kernels compiled for devices that need not be here: they compile, multiply in int8, and fuse nothing they must not."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from scripts.benchmarks.gpu_compile import CASES, FIRST_ONLY, Compiled, compile_case


def check(name: str, made: Compiled) -> None:
    products = name.split(" ")[0].split(",")[0] in ("gemm", "conv", "thin")
    assert (".s32.s8.s8" in "".join(made.products)) == products, made
    # fma.rn.f32 stands only where the sum's rule asks for it.
    assert (made.fused > 0) == (name == "add"), made


@pytest.mark.parametrize("name", ["gemm, ragged K", "conv 3x3"])
def test_products_run_on_the_tensor_cores_of_hopper(name: str) -> None:
    (made,) = compile_case(name, 90, every=False)
    check(name, made)
    assert made.products[0].startswith("wgmma") and made.spills == 0


@pytest.mark.parametrize("name", ["quantize", "quantize, bounds", "quantize back"])
def test_fake_quantization_compiles_for_numbers_and_for_tensors_as_bounds(name: str) -> None:
    """An interpreter runs the branch that is taken; a compiler reads what stands behind its return as well."""
    (made,) = compile_case(name, 90, every=False)
    check(name, made)
    assert made.spills == 0


@pytest.mark.long
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles(name: str, capability: int) -> None:
    for made in compile_case(name, capability, every=capability == 90 and name not in FIRST_ONLY):
        check(name, made)
