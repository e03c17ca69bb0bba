"""A bundle's file beside the same subnet in float formats: times, memory and sizes on this machine.

:mod:`nasq.deploy.timing` says how times are taken.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq.deploy import bundle, energy, float_forms, memory, storage
from nasq.deploy.engines import Engine, engine_of, timed_session
from nasq.deploy.parity import MODEL, promises_equal, same_class
from nasq.deploy.parity_report import TOLERANCE, may_change_class
from nasq.deploy.reference import Reference
from nasq.deploy.timing import Candidate, Images, Timing, Verifier, bench, environment, median_interval
from nasq.errors import InputError, require
from nasq.quant.program import AvgPool, Program

if TYPE_CHECKING:
    import torch

__all__ = ["BenchReport", "Row", "Timing", "bench", "bench_bundle", "environment", "median_interval"]


@dataclass(frozen=True)
class Row:
    """One line of the table: a candidate at a batch size. Times in ms per call.

    Attributes:
        candidate: Such as ``"onnxruntime int8"``.
        batch: Images per call.
        median, low, high: Median and its 95 % interval.
        p95: 95th percentile.
        spread: Interquartile range.
        throughput: Images per second at the median.
        checked: What the result was compared with before timing.
        peak_mib: Peak memory, or ``None`` where it could not be measured.
        memory: How the memory was measured; figures of different methods do not compare.
        samples: Every measured call.
        energy_mj: Millijoules per call of the processor packages, or ``None`` where they cannot be read; the environment
            says how, or why not.
    """

    candidate: str
    batch: int
    median: float
    low: float
    high: float
    p95: float
    spread: float
    throughput: float
    checked: str
    peak_mib: float | None
    memory: str
    samples: tuple[float, ...]
    energy_mj: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """What :func:`bench_bundle` measured.

    Attributes:
        environment: Machine, threads, versions; see :func:`environment`.
        sizes: Bytes by file, and ``ratio ...`` of a file by its fp32 counterpart.
        rows: One per candidate and batch size.
    """

    environment: Mapping[str, object]
    sizes: Mapping[str, float]
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for ``bench.json``."""
        rows = [{**asdict(row), "samples": list(row.samples)} for row in self.rows]
        return {"environment": dict(self.environment), "sizes": dict(self.sizes), "rows": rows}

    def table(self) -> list[dict[str, object]]:
        """The rows without their samples, as plain dictionaries, in one order of columns."""
        return [{key: value for key, value in asdict(row).items() if key != "samples"} for row in self.rows]


def bench_bundle(
    directory: Path,
    float_model: torch.nn.Module | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int = 1,
    *,
    integer_model: torch.nn.Module | None = None,
    forms: Sequence[str] = ("fp32",),
    images: Images | None = None,
    seed: int = 0,
    warmup: int = 5,
    repeats: int = 30,
) -> BenchReport:
    """Times a bundle's file beside the same subnet in float formats, and compares their sizes.

    Candidates: ``onnxruntime int8`` (the shipped file, on the runtime of its target; ``inductor int8`` is its program,
    compiled), and with a ``float_model`` ``torch fp32`` and ``onnxruntime fp32`` (``inductor fp32``), or other ``forms``;
    with an ``integer_model`` ``torch integers``. Quantized candidates must equal the reference on the very batch they are
    timed on; where the target does not promise that, they must give the reference's classes.

    Args:
        directory: The bundle.
        float_model: The same subnet in fp32, on the CPU; its training mode and parameters are left as they are.
        batch_sizes: Images per call.
        threads: For every candidate; torch's own setting is restored.
        forms: Of the ``float_model``: ``"fp32"``, ``"bf16"``, ``"fp16"``. What the runtime has no kernels for is left to
            torch (:func:`nasq.deploy.float_forms.runtime_forms`).
        integer_model: A torch network that takes fp32 images and returns the dequantized fp32 outputs.
        images: fp32 ``[N, ...]`` to take batches of; without it, noise over the input's range.
        seed: Of that noise.
        warmup, repeats: Per candidate, see :func:`bench`.

    Raises:
        ParityError: A candidate computes something else; nothing is timed then.
        ArtifactError: The bundle is damaged.
        InputError: A batch size below 1, or an unknown form.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"the batch sizes are {list(batch_sizes)}; each must be at least 1.")
    float_forms.check(forms)
    program = bundle.read(directory)
    engine, session = engine_of(program), timed_session(program)
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch, _torch_state(threads, float_model, integer_model):
        pool = _pool(program, images, max(batch_sizes), seed)
        files = _files(directory, engine, float_model, forms, pool, Path(scratch))
        rows: list[Row] = []
        meter, why = energy.rapl()
        for batch in batch_sizes:
            x = pool[:batch]
            candidates = _candidates(program, files, engine, float_model, integer_model, forms, threads, session, batch)
            verify = _verifiers(Reference(directory).run(x), program, candidates, x)
            peaks = {name: _memory(name, files, candidates[name], x, threads) for name in candidates}
            timings = bench(candidates, x, warmup=warmup, repeats=repeats, verify=verify)
            used = {name: _energy(candidate, x, meter) for name, candidate in candidates.items()}
            rows += [_row(name, timing, peaks[name], verify[name], used[name]) for name, timing in timings.items()]
        sizes = _sizes(directory, files, engine, float_model)
    where = environment(threads, session) | {"energy": f"not readable: {why}" if meter is None else meter.name}
    return BenchReport(where, sizes, tuple(rows))


@contextlib.contextmanager
def _torch_state(threads: int, *models: torch.nn.Module | None) -> Iterator[None]:
    """Sets torch's threads and eval mode, and puts both back; without a torch model, torch is not even loaded."""
    present = [model for model in models if model is not None]
    if not present:
        yield
        return
    torch = require("torch")
    before, modes = torch.get_num_threads(), [model.training for model in present]
    torch.set_num_threads(threads)
    try:
        for model in present:
            model.eval()
        yield
    finally:
        torch.set_num_threads(before)
        for model, mode in zip(present, modes, strict=True):
            model.train(mode)


def _pool(program: Program, images: Images | None, count: int, seed: int) -> Images:
    """At least ``count`` images: those given, repeated if there are too few, or noise over the input's range."""
    if images is not None:
        if len(images) == 0 or images.dtype != np.float32:
            raise InputError("the images to time on must be float32, and at least one.")
        return np.concatenate([images] * -(-count // len(images)))[:count]
    tensor = program.ops[0].output
    steps = np.random.default_rng(seed).uniform(tensor.low, tensor.high, (count, *tensor.shape)) - tensor.zero_point
    return (steps * tensor.scale).astype(np.float32)


def _files(
    directory: Path,
    engine: Engine,
    float_model: torch.nn.Module | None,
    forms: Sequence[str],
    pool: Images,
    scratch: Path,
) -> dict[str, Path]:
    """The ONNX files by candidate; those of the float forms are written to a scratch directory."""
    files = {f"{engine.name} int8": storage.path_of(directory, MODEL)}
    if float_model is not None:
        example = require("torch").from_numpy(pool[:1])
        for form in float_forms.runtime_forms(engine.name, ("fp32", *forms)):
            path = scratch / f"{form.name}.onnx"
            path.write_bytes(float_forms.export_form(float_model, example, form.stored))
            files[f"{engine.name} {form.name}"] = path
    return files


def _candidates(
    program: Program,
    files: Mapping[str, Path],
    engine: Engine,
    float_model: torch.nn.Module | None,
    integer_model: torch.nn.Module | None,
    forms: Sequence[str],
    threads: int,
    session: Mapping[str, object],
    batch: int,
) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {}
    if float_model is not None:
        found |= {
            f"torch {form}": float_forms.torch_form(float_model, form) for form in dict.fromkeys(("fp32", *forms))
        }
    if integer_model is not None:
        found["torch integers"] = float_forms.torch_form(integer_model, "fp32")
    options = {form.name: form.session for form in float_forms.runtime_forms(engine.name, ("fp32", *forms))}
    for name, path in files.items():
        form = name.removeprefix(f"{engine.name} ")
        runs = engine.runs(program, path)
        runtime = engine.open_fixed(runs, threads, {**session, **options.get(form, {})}, batch)
        found[name] = runtime.run if form == "int8" else runtime.logits
    if engine.rebuilds and float_model is not None:
        found[f"{engine.name} fp32"] = float_forms.compiled_form(float_model)
    return found


class _Equals:
    """A verifier; ``what`` says what the result is compared with."""

    def __init__(self, what: str, problem: Verifier) -> None:
        self.what, self.problem = what, problem

    def __call__(self, result: object) -> str:
        return self.problem(result)


def _verifiers(
    expected: NDArray[np.uint8], program: Program, candidates: Mapping[str, Candidate], x: Images
) -> dict[str, _Equals]:
    tensor = program.output
    averaged = any(isinstance(op, AvgPool) for op in program.ops)
    allowed = expected.size // TOLERANCE if averaged else 0

    def integers(result: object) -> str:
        got = np.asarray(result)
        wrong = int((got != expected).sum()) if got.shape == expected.shape else expected.size
        return f"{wrong} of {expected.size} integers differ from the reference." if wrong > allowed else ""

    def classes(result: object) -> str:
        got = np.asarray(result)
        if got.shape != expected.shape:
            return f"its integers have the shape {got.shape}, the reference's {expected.shape}."
        changed = round((1 - same_class(got, expected, program)) * len(expected))
        few = changed <= may_change_class(len(expected))
        return "" if few else f"{changed} of {len(expected)} images get another class than the reference's."

    def dequantized(result: object) -> str:
        steps = np.rint(np.asarray(result, np.float64) / tensor.scale) + tensor.zero_point
        return integers(steps)

    real = np.asarray(candidates["torch fp32"](x)) if "torch fp32" in candidates else None
    found: dict[str, _Equals] = {}
    for name in candidates:
        form = name.rpartition(" ")[2]
        if form == "int8":
            found[name] = _Equals("reference", integers if promises_equal(program) else classes)
        elif form == "integers":
            found[name] = _Equals("reference", dequantized)
        elif name == "torch fp32":
            found[name] = _Equals("itself", lambda result: "")
        elif real is not None:
            found[name] = _Equals("torch fp32", _near(real, float_forms.CLOSE[form]))
    return found


def _near(real: NDArray[Any], close: float) -> Verifier:
    return lambda result: _far(np.asarray(result), real, close)


def _far(got: NDArray[Any], real: NDArray[Any], close: float) -> str:
    if got.shape != real.shape:
        return f"its outputs have the shape {got.shape}, the network's {real.shape}."
    furthest = float(np.abs(got - real).max())
    return "" if furthest <= close * np.abs(real).max() else f"its outputs are up to {furthest:.3g} off the network's."


def _row(name: str, timing: Timing, peak: tuple[float | None, str], verifier: _Equals, energy_mj: float | None) -> Row:
    low, high = timing.interval
    return Row(
        candidate=name,
        batch=timing.batch,
        median=timing.median,
        low=low,
        high=high,
        p95=timing.p95,
        spread=timing.spread,
        throughput=timing.throughput,
        checked=verifier.what,
        peak_mib=peak[0],
        memory=peak[1],
        samples=timing.samples,
        energy_mj=energy_mj,
    )


def _energy(candidate: Candidate, x: Images, meter: energy.Meter | None) -> float | None:
    return None if meter is None else energy.millijoules(lambda: candidate(x), meter)


def _sizes(
    directory: Path, files: Mapping[str, Path], engine: Engine, float_model: torch.nn.Module | None
) -> dict[str, float]:
    """Bytes of the bundle's files and of their fp32 counterparts, and the ratios between them."""
    sizes: dict[str, float] = {name: (directory / name).stat().st_size for name in storage.verify(directory)}
    sizes["bundle"] = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    if float_model is not None:
        from safetensors.torch import save

        state = {name: value.detach().clone().contiguous() for name, value in float_model.state_dict().items()}
        sizes["fp32 model.safetensors"] = len(save(state))
        if f"{engine.name} fp32" in files:
            sizes["fp32 model.onnx"] = files[f"{engine.name} fp32"].stat().st_size
        for name in (bundle.WEIGHTS, MODEL):
            if f"fp32 {name}" in sizes:
                sizes[f"ratio {name}"] = sizes[name] / sizes[f"fp32 {name}"]
    return sizes


def _memory(
    name: str, files: Mapping[str, Path], candidate: Candidate, x: Images, threads: int
) -> tuple[float | None, str]:
    """Peak memory in MiB and how it was measured."""
    if name in files and name.startswith("onnxruntime"):
        return memory.peak_of_file(files[name], x.shape, threads), memory.CHILD
    return memory.growth_of_call(lambda: candidate(x)), memory.GROWTH
