"""Compiles every CUDA kernel of nasq for a device that need not be there, and shows what the compilers made of it.

    python -m scripts.benchmarks.gpu_compile [--capability 90] [--all]

For every kernel and tile: the matrix instructions in its PTX, how the operands are loaded, shared memory, and registers
and spills of the machine code. It proves that the kernels compile, that products run on int8 tensor cores, and that no
product was joined with a sum to a fused multiply-add where integers are made. It says nothing about speed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nasq.cuda import kernels, pointwise, rounding, thin, tokens

INT8 = "*i8"
ACC = "*i32"
REAL = "*fp32"
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel with one tile."""

    name: str
    tile: str
    products: tuple[str, ...]
    loads: tuple[str, ...]
    fused: int
    shared: int
    registers: int
    spills: int

    def line(self) -> str:
        """A row of the table."""
        made = ", ".join(self.products) or "-"
        return (
            f"{self.name:24} {self.tile:34} {made:52} {', '.join(self.loads) or '-':20} fma {self.fused:<3} "
            f"shared {self.shared:<7} registers {self.registers:<4} spills {self.spills}"
        )


def _gemm(**constants: Any) -> tuple[dict[str, str], dict[str, Any]]:
    types = {"a": INT8, "b": INT8, "bias": ACC, "scale": REAL, "y": INT8}
    types |= dict.fromkeys(("M", "N", "K", "BUCKET", "a_batch", "b_batch"), "i32")
    types |= {"low": "fp32", "high": "fp32", "zero": "fp32"}
    return types, {"EXTRA_A": 0, "EXTRA_B": 0, "FUSED": True, "HAS_BIAS": True, "EVEN": True, **constants}


def _image(**constants: Any) -> tuple[dict[str, str], dict[str, Any]]:
    types = {"x": INT8, "w": INT8, "bias": ACC, "scale": REAL, "y": INT8}
    types |= {name: "i32" for name in ("M", "H", "W", "OH", "OW", "BUCKET")}
    types |= {"low": "fp32", "high": "fp32", "zero": "fp32"}
    sizes = {"KH": 3, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1, "PAD": 0, "FUSED": True}
    return types, {**sizes, **constants}


def _thin(packed: bool) -> tuple[dict[str, str], dict[str, Any]]:
    types = {"x": INT8, "w": INT8, "parts": ACC, "M": "i32", "N": "i32", "K": "i32", "HALF": "i32"}
    return types, {"SPLIT": 4, "PACKED": packed, "BM": 16}


_ADD = {"a": INT8, "b": INT8, "y": INT8, "factors": REAL, "count": "i32"}
_ADD |= {name: "fp32" for name in ("offset_a", "offset_b", "offset_y", "low", "high")}
_REDUCE = {"parts": ACC, "shift": ACC, "bias": ACC, "scale": REAL, "y": INT8, "count": "i32", "N": "i32"}
_REDUCE |= {name: "fp32" for name in ("low", "high", "zero")}

_ROW = {"step": "fp32", "low": "fp32", "high": "fp32", "zero": "fp32"}
_SOFTMAX = {"x": INT8, "table": ACC, "y": INT8, "columns": "i32", "rows": "i32", **_ROW}
_NORM = {"x": INT8, "gain": REAL, "shift": REAL, "y": INT8, "width": "i32", "offset": "i32", "epsilon": "*fp64", **_ROW}
_QUANTIZE = {"x": REAL, "step": REAL, "low": "fp32", "high": "fp32", "y": REAL, "width": "i32"}
_BACKWARD = {key: kind for key, kind in _QUANTIZE.items() if key != "y"} | dict.fromkeys(("g", "inside", "sums"), REAL)
_ROUND = {"STEPS": 0, "NAN": tl.PropagateNan.ALL, "BLOCK": 2048}
_LEARNED = {"low": REAL, "high": REAL}  # bounds that are tensors, one for each row

CASES: Mapping[str, tuple[Any, tuple[dict[str, str], dict[str, Any]], Sequence[Any] | None]] = {
    "gemm": (kernels.gemm_kernel, _gemm(), kernels.gemm_configs()),
    "gemm, ragged K": (kernels.gemm_kernel, _gemm(EVEN=False), kernels.gemm_configs()[-2:]),
    "gemm, both shifted": (kernels.gemm_kernel, _gemm(EXTRA_A=128, EXTRA_B=128), kernels.gemm_configs()[-2:]),
    "conv 3x3": (kernels.conv_kernel, _image(OUT=256, C=256, GROUPS=1, EVEN=True, FLAT=False), kernels.conv_configs()),
    "conv 3x3, padded -128": (
        kernels.conv_kernel, _image(OUT=256, C=256, GROUPS=1, EVEN=True, FLAT=False, PAD=-128), kernels.conv_configs()[:5]
    ),
    "conv 7x7, 3 channels": (
        kernels.conv_kernel,
        _image(OUT=64, C=3, GROUPS=1, EVEN=False, FLAT=True, KH=7, KW=7, SH=2, SW=2, PAD=-128),
        kernels.conv_configs()[-1:],
    ),
    "depthwise 3x3": (kernels.depthwise_kernel, _image(C=128, MULTIPLE=1), kernels.depthwise_configs()),
    "thin, 8 bits": (thin.thin_kernel, _thin(False), thin.thin_configs()),
    "thin, 4 bits packed": (thin.thin_kernel, _thin(True), thin.thin_configs()),
    "reduce": (thin.reduce_kernel, (_REDUCE, {"SPLIT": 4, "FUSED": True, "BLOCK": 1024}), None),
    "table": (tokens.table_kernel, ({"x": INT8, "values": INT8, "y": INT8, "count": "i32"}, {"BLOCK": 1024}), None),
    "quantize": (rounding.forward_kernel, (_QUANTIZE, {**_ROUND, "BOUNDS": -1}), None),
    "quantize, bounds": (rounding.forward_kernel, ({**_QUANTIZE, **_LEARNED}, {**_ROUND, "STEPS": 1, "BOUNDS": 1}), None),
    "quantize back": (rounding.backward_kernel, (_BACKWARD, {**_ROUND, "BOUNDS": -1}), None),
    "softmax": (tokens.softmax_kernel, (_SOFTMAX, {"CAUSAL": True, "BLOCK": 256}), None),
    "layer norm": (tokens.layer_norm_kernel, (_NORM, {"BLOCK": 512}), None),
    "add": (pointwise.add_kernel, (_ADD, {"BLOCK": 1024}), None),
}  # fmt: skip
FIRST_ONLY = {"gemm, ragged K", "gemm, both shifted", "conv 7x7, 3 channels"}


def compile_case(name: str, capability: int, every: bool) -> Iterator[Compiled]:
    """One case with its first tile, or with every tile."""
    kernel, (types, constants), configs = CASES[name]
    while not isinstance(kernel, triton.runtime.JITFunction):
        kernel = kernel.fn
    for config in (configs or [None])[: None if every else 1]:
        chosen = {**constants, **(config.kwargs if config else {})}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {}
        yield _compile(name, kernel, types, chosen, options | {"enable_fp_fusion": False}, capability)


def _compile(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any], capability: int
) -> Compiled:
    aligned = {(kernel.arg_names.index(key),): ALIGNED for key, kind in types.items() if kind[0] in "*i"}
    signature = {key: types.get(key, "constexpr") for key in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = made.asm["ptx"]
    shape = " ".join(f"{key}={constants[key]}" for key in ("BM", "BN", "BK") if key in constants)
    tile = f"{shape} warps={options.get('num_warps', 4)} stages={options.get('num_stages', 3)}"
    products = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma)\.sync[\w.]*", ptx)))
    loads = sorted(set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x[0-9a-f]+", ptx)))
    sizes = sorted({f"cp.async {int(load.rsplit(' ', 1)[1], 16)}" for load in loads})
    registers, spills = _resources(made.asm["cubin"])
    fused = len(re.findall(r"\bfma\.rn\.f32", ptx))
    return Compiled(name, tile, tuple(products), tuple(sizes), fused, made.metadata.shared, registers, spills)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (spills) per thread."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(pattern, text) for pattern in (r"REG:(\d+)", r"STACK:(\d+)"))
    assert registers and stack, text
    return int(registers[1]), int(stack[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capability", type=int, default=90, help="80, 86, 89, 90, ... (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every tile, not only the first of each kernel")
    arguments = parser.parse_args()
    for name in CASES:
        for made in compile_case(name, arguments.capability, arguments.all):
            print(made.line(), flush=True)


if __name__ == "__main__":
    sys.exit(main())
