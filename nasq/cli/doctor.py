"""What ``nasq doctor`` looks at."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["findings"]

_NEEDED = (
    "torch", "torchvision", "timm", "optuna", "deap", "scipy", "numpy", "scikit-learn", "typer", "rich", "pydantic",
    "PyYAML", "safetensors", "onnx", "onnxruntime", "matplotlib", "plotly", "jinja2",
)  # fmt: skip
_OPTIONAL = {"openvino": "pip install openvino", "tensorrt": "pip install tensorrt", "torchao": "pip install torchao"}
_MODULES = {"scikit-learn": "sklearn", "PyYAML": "yaml"}


def _package(name: str, needed: bool) -> dict[str, str]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        advice = f"pip install {name}" if needed else _OPTIONAL[name]
        return {"what": name, "state": "missing" if needed else "not installed", "detail": advice}
    try:
        importlib.import_module(_MODULES.get(name, name))
    except Exception as error:  # a broken package may raise anything at import; that is the finding
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"what": name, "state": "missing", "detail": f"{version} is installed but does not import: {first}"}
    return {"what": name, "state": "ok", "detail": version}


def _flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown"
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    words = set(line.split())
    wanted = ("avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    found = [word for word in wanted if word in words]
    if not {"avx512_vnni", "avx_vnni"} & words:
        found.append("no VNNI: keep weights at 7 bits or fewer, 8-bit products saturate")
    return ", ".join(found)


def findings() -> list[dict[str, str]]:
    """Rows ``what, state, detail``: Python, packages, processor, CUDA."""
    rows = [{"what": "python", "state": "ok", "detail": sys.version.split()[0]}]
    rows += [_package(name, True) for name in _NEEDED]
    rows += [_package(name, False) for name in _OPTIONAL]
    rows.append({"what": "processor", "state": "ok", "detail": f"{os.cpu_count()} cores; {_flags()}"})
    if importlib.util.find_spec("torch") is not None:
        import torch

        cuda = torch.cuda.is_available()
        detail = torch.cuda.get_device_name(0) if cuda else "no CUDA device; everything works on the CPU"
        rows.append({"what": "cuda", "state": "ok" if cuda else "absent", "detail": detail})
    return rows
