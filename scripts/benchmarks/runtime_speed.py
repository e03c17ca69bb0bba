"""Int8 files of whole networks against fp32 and against the runtimes' own quantizers, in one interleaved run.

Run from the repository's root: ``python -m scripts.benchmarks.runtime_speed [--networks resnet18] [--batches 1 8]
[--threads 2] [--files DIR] [--out FILE.json]``; files that are in DIR already are timed and not made again. Needs the extra
``openvino`` for its rows, and ``nncf`` for that quantizer's; what is not installed is left out and named. Weights are random
(times do not depend on them), BatchNorm has seen one batch of noise.

Every candidate is called once per round, in rotating order. Two clocks run: wall time, and the processor time of the whole
process, which other programs on the machine do not lengthen. No runtime spins while it waits, so that processor time is
work. bf16 rows are there only where the processor has the instructions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray

from nasq import Supernet
from nasq.deploy import engines
from nasq.deploy.bench import environment, median_interval
from nasq.deploy.onnx import export, export_float
from nasq.files import write_json
from nasq.quant import calibrate, freeze, quantize

Images = NDArray[np.float32]
Call = Callable[[Images], object]
NETWORKS = {"resnet18": torchvision.models.resnet18, "mobilenet_v2": torchvision.models.mobilenet_v2}
TARGETS = {"onnxruntime": "onnxruntime-cpu", "openvino": "openvino-cpu"}
QUANTIZERS = {
    "onnxruntime nasq int8": "onnxruntime its own static quantizer", "openvino nasq int8": "openvino NNCF int8",
    "openvino nasq int8, no snippets": "openvino NNCF int8",
}  # fmt: skip
NO_SNIPPETS = {"SNIPPETS_MODE": "DISABLE"}
"""Compiled for one batch size, OpenVINO joins the sum of an identity shortcut and its requantization into a float loop of
its own (a snippet), behind a convolution that writes floats. For any batch size, or with this, all of it is the convolution.
"""
SESSION = {"session.intra_op.allow_spinning": "0"}


def network(name: str, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network with plausible statistics, and images."""
    torch.manual_seed(0)
    model, images = NETWORKS[name](), torch.randn(4, 3, size, size)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    return model.eval(), images


def nasq_file(model: torch.nn.Module, images: torch.Tensor, target: str, path: Path) -> str:
    """Exports the 8-bit form; says how its integers compare with the evaluation's on the runtime."""
    made = quantize(model, images[:1], target, weight_bits=(8,), activation_bits=(8,))
    calibrate(made, images[:2])
    supernet = Supernet(made.eval())
    with supernet.activate(supernet.space.largest()), torch.no_grad():
        program, wanted = freeze(made), made.integers(images[:2]).numpy()
    path.write_bytes(export(program))
    engine = engines.engine_of(program)
    found = engine.open(path, 1, {}, 8).run(images[:2].numpy())
    coverage = engine.coverage(path, program, None)
    layers = ", ".join(f"{coverage.integer[k]}/{coverage.total[k]} {k}" for k in ("convolutions", "sums", "linears"))
    same = float((found.argmax(1) == wanted.argmax(1)).mean())
    wrong = int((found != wanted).sum())
    return f"{wrong} of {found.size} final integers differ, same class {same:.0%}; integer kernels: {layers}"


def own_quantizer(source: Path, images: Images, path: Path) -> None:
    """onnxruntime's static quantizer: QDQ, per channel, uint8 activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter([{"input": images[i : i + 1]} for i in range(4)])

        def get_next(self) -> Any:
            return next(self.left, None)

    quant_pre_process(str(source), str(path.with_suffix(".pre")))
    quantize_static(
        str(path.with_suffix(".pre")), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def nncf_model(source: Path, images: Images) -> Any:
    """NNCF's post-training quantization of the fp32 file, as an OpenVINO model."""
    import nncf
    import openvino as ov

    data = nncf.Dataset([images[i : i + 1] for i in range(4)])
    return nncf.quantize(ov.Core().read_model(str(source)), data, subset_size=4)


def openvino_call(model: Any, threads: int, precision: str, batch: int, more: Mapping[str, str] | None = None) -> Call:
    import openvino as ov

    core = ov.Core()
    read = core.read_model(str(model)) if isinstance(model, Path) else model.clone()
    read.reshape([batch, *list(read.input(0).partial_shape)[1:]])
    settings = {
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        **(more or {}),
    }
    compiled = core.compile_model(read, "CPU", settings)
    return lambda x: compiled([x])


def candidates(files: Mapping[str, Any], threads: int, batch: int) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for name, label in (("fp32", "fp32"), ("onnxruntime", "nasq int8"), ("static", "its own static quantizer")):
        runtime = engines.ENGINES["onnxruntime"].open(files[name], threads, SESSION, 1 << 30)
        found[f"onnxruntime {label}"] = runtime.logits if name == "onnxruntime" else _first(runtime)
    if "openvino" in files:
        found["openvino fp32"] = openvino_call(files["fp32"], threads, "f32", batch)
        if "avx512_bf16" in Path("/proc/cpuinfo").read_text():
            found["openvino bf16"] = openvino_call(files["fp32"], threads, "bf16", batch)
        found["openvino nasq int8"] = openvino_call(files["openvino"], threads, "f32", batch)
        found["openvino nasq int8, no snippets"] = openvino_call(files["openvino"], threads, "f32", batch, NO_SNIPPETS)
        if "nncf" in files:
            found["openvino NNCF int8"] = openvino_call(files["nncf"], threads, "f32", batch)
    return found


def _first(runtime: Any) -> Call:
    session = runtime.session
    return lambda x: session.run([session.get_outputs()[0].name], {session.get_inputs()[0].name: x})


def timed(calls: Mapping[str, Call], x: Images, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds on both clocks, every call in turn; two rounds are not counted."""
    names = list(calls)
    found = {name: {"wall": list[float](), "cpu": list[float]()} for name in names}
    for turn in range(rounds + 2):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            calls[name](x)
            spent = {"wall": time.perf_counter_ns() - wall, "cpu": time.process_time_ns() - cpu}
            if turn >= 2:
                for clock, value in spent.items():
                    found[name][clock].append(value / 1e6)
    return found


def rows(title: str, batch: int, found: Mapping[str, Mapping[str, list[float]]]) -> Iterator[dict[str, Any]]:
    for name, clocks in found.items():
        base = found[f"{name.split()[0]} fp32"]
        row: dict[str, Any] = {"network": title, "batch": batch, "candidate": name}
        for clock, samples in clocks.items():
            # Of the ratio within each round: what slows the machine slows both sides of it.
            ratios = [a / b for a, b in zip(base[clock], samples, strict=True)]
            row |= {f"{clock} ms": median(samples), f"{clock} vs fp32": median(ratios)}
            row[f"{clock} vs fp32 95 %"] = list(median_interval(ratios))
            own = found.get(QUANTIZERS.get(name, ""))
            if own is not None:
                ratios = [a / b for a, b in zip(own[clock], samples, strict=True)]
                row |= {f"{clock} vs the other quantizer": median(ratios)}
                row[f"{clock} vs the other quantizer 95 %"] = list(median_interval(ratios))
        yield row


def build(title: str, size: int, directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Every file of a network, and how nasq's own compare with its evaluation."""
    model, images = network(title, size)
    files: dict[str, Any] = {name: directory / f"{title}-{size}-{name}.onnx" for name in ("fp32", "static", *TARGETS)}
    note = directory / f"{title}-{size}.json"
    checked: dict[str, str] = json.loads(note.read_text()) if note.exists() else {}
    if not files["fp32"].exists():
        files["fp32"].write_bytes(export_float(model, images[:1]))
    if not files["static"].exists():
        own_quantizer(files["fp32"], images.numpy(), files["static"])
    for name, target in TARGETS.items():
        if find_spec(name) is None:
            checked[name] = f"not installed: pip install 'nasq[{name}]'"
            del files[name]
        elif not files[name].exists():
            checked[name] = nasq_file(model, images, target, files[name])
            note.write_text(json.dumps(checked, indent=1))
    if find_spec("nncf") is None:
        checked["nncf"] = "not installed: pip install nncf"
    elif "openvino" in files:
        files["nncf"] = nncf_model(files["fp32"], images.numpy())
    return files, checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS, reverse=True))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"environment": environment(options.threads), "checked": {}, "rows": []}
    for title in options.networks:
        with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
            directory = options.files or Path(scratch)
            directory.mkdir(parents=True, exist_ok=True)
            files, result["checked"][title] = build(title, options.size, directory)
            for batch in options.batches:
                x = np.random.default_rng(0).standard_normal((batch, 3, options.size, options.size), np.float32)
                found = timed(candidates(files, options.threads, batch), x, options.rounds)
                result["rows"] += rows(title, batch, found)
                if options.out:
                    write_json(options.out, result)
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
