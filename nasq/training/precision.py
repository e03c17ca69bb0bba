"""What the machine computes fast: bf16 and channels_last, decided once per training."""

from __future__ import annotations

import platform

import torch

__all__ = ["cpu_flags", "fast_bf16", "fast_channels_last"]

BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})


def cpu_flags() -> frozenset[str]:
    """Which of ``amx_bf16`` and ``avx512_bf16`` this CPU has; empty where torch does not tell."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is None:
        return frozenset()
    return frozenset(name for name, value in tell().items() if value is True and name in BF16_FLAGS)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is expected to be faster than fp32.

    CPU: it has AMX or AVX-512 instructions for bf16, and oneDNN uses them. CUDA: compute capability 8.0 and up,
    which multiply in bf16 natively; older devices only emulate it. Any other device: no.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and _has_onednn() and bool(cpu_flags())


def fast_channels_last(device: torch.device) -> bool:
    """Whether convolutions are expected to be faster in channels_last order: oneDNN on x86, CUDA with fast bf16."""
    if device.type == "cuda":
        return fast_bf16(device)
    x86 = platform.machine().lower() in {"x86_64", "amd64"}
    return device.type == "cpu" and x86 and _has_onednn()


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
