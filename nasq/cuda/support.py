"""Whether nasq's CUDA kernels can run, and the reason where they cannot."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["SWITCH", "interpreting", "switched_on", "usable", "why_not"]

SWITCH = "NASQ_CUDA_KERNELS"
"""Environment variable: ``1`` lets training and evaluation use the kernels."""
_OLDEST = (8, 0)  # the first capability whose tensor cores multiply int8 in tiles that Triton uses


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (``TRITON_INTERPRET=1``, set before anything imports it)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed (pip install triton)"
    return ""


@functools.cache
def _too_old(index: int) -> str:
    found = torch.cuda.get_device_capability(index)
    if found < _OLDEST:
        name = torch.cuda.get_device_name(index)
        return f"{name} has compute capability {found[0]}.{found[1]}; the kernels need {_OLDEST[0]}.{_OLDEST[1]}"
    return ""


def why_not(device: torch.device) -> str:
    """Why the kernels cannot run on ``device``, as a clause without a full stop; empty where they can."""
    if _missing():
        return _missing()
    if interpreting():
        return ""
    if device.type != "cuda":
        return f"the device is {device.type!r}, not 'cuda'"
    if torch.version.hip is not None:
        return "torch was built for ROCm, where the kernels are untested"
    return _too_old(device.index if device.index is not None else torch.cuda.current_device())


def switched_on() -> bool:
    """Whether training and evaluation may use the kernels; a runtime that is asked for by name needs no switch.

    They are off by default until ``bench_gpu.sh`` has passed on a device: so far they ran in Triton's interpreter alone.
    """
    return interpreting() or os.environ.get(SWITCH) == "1"


def usable(device: torch.device) -> bool:
    """Whether training and evaluation use the kernels on ``device``: they can, and :func:`switched_on`."""
    return switched_on() and not why_not(device)
