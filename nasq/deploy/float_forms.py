"""The same subnet in fp32, bf16 and fp16: the baselines that an int8 file is compared with.

A runtime has the forms for which it has kernels. onnxruntime's CPU provider has none for bf16 convolutions, and runs an
fp16 file through casts to fp32, so only the file is smaller; OpenVINO takes the fp32 file and is told the precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.deploy.onnx import export_float
from nasq.errors import InputError, choose_from, require

if TYPE_CHECKING:
    import torch

__all__ = [
    "CLOSE", "FORMS", "RuntimeForm", "check", "compiled_form", "export_form", "runtime_forms", "torch_form",
]  # fmt: skip

FORMS = ("fp32", "bf16", "fp16")
CLOSE: Mapping[str, float] = {"fp32": 1e-3, "bf16": 0.1, "fp16": 1e-2}
"""How far a form may be from the fp32 network, relative to its largest output."""


@dataclass(frozen=True)
class RuntimeForm:
    """A form on a runtime: its name, what the file stores, and the session options that choose it."""

    name: str
    stored: str
    session: Mapping[str, object] = field(default_factory=dict)


_RUNTIME_FORMS: Mapping[str, tuple[RuntimeForm, ...]] = {
    "onnxruntime": (RuntimeForm("fp32", "fp32"), RuntimeForm("fp16", "fp16")),
    "openvino": (
        RuntimeForm("fp32", "fp32", {"INFERENCE_PRECISION_HINT": "f32"}),
        RuntimeForm("bf16", "fp32", {"INFERENCE_PRECISION_HINT": "bf16"}),
    ),
    "inductor": (),  # runs no files: see compiled_form
}


def check(forms: Iterable[str]) -> None:
    """Raises where a form is unknown.

    Raises:
        InputError: Names it and those there are.
    """
    for form in forms:
        if form not in FORMS:
            raise choose_from("float format", form, FORMS)


def runtime_forms(runtime: str, forms: Sequence[str]) -> list[RuntimeForm]:
    """Those of ``forms`` that a runtime has kernels for."""
    return [form for form in _RUNTIME_FORMS[runtime] if form.name in forms]


def torch_form(model: torch.nn.Module, form: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The network in eager torch in a float format, as a function of fp32 images ``[N, ...]``.

    Args:
        model: On the CPU and in eval mode; not changed (fp16 and bf16 are copies).
        form: One of :data:`FORMS`.
    """
    torch, kinds = require("torch"), {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    kind = getattr(torch, kinds[form])
    made = model if form == "fp32" else copy.deepcopy(model).to(kind)

    def call(x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(made(torch.from_numpy(x).to(kind)).float().numpy(), np.float32)

    return call


def compiled_form(model: torch.nn.Module) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The network in fp32 compiled by Inductor, its weights frozen, as a function of fp32 images ``[N, ...]``.

    Args:
        model: On the CPU and in eval mode; not changed.
    """
    torch = require("torch")
    made = torch.compile(copy.deepcopy(model), options={"freezing": True})

    def call(x: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(made(torch.from_numpy(x)).numpy(), np.float32)

    return call


def export_form(model: torch.nn.Module, example: torch.Tensor, form: str) -> bytes:
    """Serializes a plain fp32 network as ONNX, its weights stored in fp32 or fp16; inputs and outputs stay fp32.

    Args:
        model: Any module; left as it is.
        example: An input ``[batch, ...]``.
        form: ``"fp32"`` or ``"fp16"``.

    Raises:
        InputError: Another form; onnxruntime's CPU provider has no bf16 convolutions.
    """
    if form == "fp32":
        return export_float(model, example)
    if form != "fp16":
        raise InputError(f"an ONNX file in {form!r} cannot be run on a CPU by onnxruntime. Allowed: fp32, fp16.")
    onnx = require("onnx")
    convert = require("onnxruntime.transformers.float16").convert_float_to_float16
    proto = onnx.load_model_from_string(export_float(model, example))
    data: bytes = convert(proto, keep_io_types=True).SerializeToString()
    return data
