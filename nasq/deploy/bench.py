"""Times candidates against each other on this machine, checks them first, and records what the figures depend on.

Candidates run in turn, one call each per round, so that a machine that slows down slows all of them; the order rotates
from round to round. All samples are kept. The interval of a median is the one of order statistics: it needs no
assumption on the distribution (David & Nagaraja, Order Statistics, 2003, section 7.1).
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq import targets
from nasq.deploy import bundle, memory, storage
from nasq.deploy.onnx import export_float
from nasq.deploy.parity import MODEL, TOLERANCE
from nasq.deploy.reference import Reference
from nasq.deploy.runtimes import OnnxRuntime, versions
from nasq.errors import InputError, ParityError, require
from nasq.quant.program import AvgPool, Program

if TYPE_CHECKING:
    import torch

__all__ = ["BenchReport", "Row", "Timing", "bench", "bench_bundle", "environment", "median_interval"]

Images = NDArray[np.float32]
Candidate = Callable[[Images], object]
Verifier = Callable[[object], str]

FEWEST_REPEATS = 6  # below that no interval of order statistics reaches 95 %
CLOSE = 1e-3  # how far an fp32 file may be from the fp32 network, relative to the largest output


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in milliseconds per call.

    Attributes:
        samples: Every measured call, in order; outliers are kept.
        batch: Images per call.
    """

    samples: tuple[float, ...]
    batch: int

    @property
    def median(self) -> float:
        """Median, ms."""
        return float(np.median(self.samples))

    @property
    def p95(self) -> float:
        """95th percentile, ms."""
        return float(np.percentile(self.samples, 95))

    @property
    def spread(self) -> float:
        """Interquartile range, ms."""
        low, high = np.percentile(self.samples, (25, 75))
        return float(high - low)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the median, ms."""
        return median_interval(self.samples)

    @property
    def throughput(self) -> float:
        """Images per second at the median."""
        return self.batch / self.median * 1e3


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median: the order statistics ``k`` and ``n + 1 - k``.

    ``k`` is the largest for which ``2 P(Binomial(n, 1/2) < k) <= 1 - confidence``.

    Args:
        samples: Independent measurements.
        confidence: Least probability that the interval covers the median.

    Raises:
        InputError: Too few samples for that confidence.
    """
    count, tail, k = len(samples), 0.0, 0
    while k < count // 2 and 2 * (tail + math.comb(count, k) / 2**count) <= 1 - confidence:
        tail += math.comb(count, k) / 2**count
        k += 1
    if k == 0:
        raise InputError(
            f"{count} samples are too few for a {confidence:.0%} interval of the median; measure at least "
            f"{FEWEST_REPEATS} times."
        )
    ordered = sorted(samples)
    return ordered[k - 1], ordered[count - k]


def bench(
    candidates: Mapping[str, Candidate],
    inputs: Images,
    *,
    warmup: int = 5,
    repeats: int = 30,
    verify: Mapping[str, Verifier] | None = None,
) -> dict[str, Timing]:
    """Times candidates in turn on the same inputs.

    Args:
        candidates: Functions of a batch, by name.
        inputs: One batch, fp32 ``[B, ...]``.
        warmup: Calls of each candidate before anything is measured.
        repeats: Measured calls of each candidate, at least 6.
        verify: By candidate name: takes its result and says in a sentence what is wrong with it (or nothing: ``""``).

    Raises:
        ParityError: A candidate's result is wrong; nothing is timed then.
        InputError: No candidates, too few repeats, or a verifier for a name that is no candidate.
    """
    if not candidates:
        raise InputError("there is nothing to time; give at least one candidate.")
    if repeats < FEWEST_REPEATS or warmup < 0:
        raise InputError(f"repeats is {repeats}, warmup {warmup}; allowed: repeats >= {FEWEST_REPEATS}, warmup >= 0.")
    for name, verifier in (verify or {}).items():
        if name not in candidates:
            raise InputError(f"there is a check for {name!r}, which is no candidate ({', '.join(candidates)}).")
        if problem := verifier(candidates[name](inputs)):
            raise ParityError(f"{name} is wrong and was not timed: {problem}")
    for candidate in candidates.values():
        for _ in range(warmup):
            candidate(inputs)
    names, samples = list(candidates), {name: list[float]() for name in candidates}
    for turn in range(repeats):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            start = time.perf_counter_ns()
            candidates[name](inputs)
            samples[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: Timing(tuple(values), len(inputs)) for name, values in samples.items()}


# -- a whole bundle ---------------------------------------------------------------------------------------------------


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
    images: Images | None = None,
    seed: int = 0,
    warmup: int = 5,
    repeats: int = 30,
) -> BenchReport:
    """Times a bundle's file beside the same subnet in fp32, and compares their sizes.

    Candidates: ``onnxruntime int8`` (the shipped file), and with a ``float_model`` ``torch fp32`` and
    ``onnxruntime fp32``; with an ``integer_model`` ``torch integers``. Quantized candidates must equal the reference on
    the very batch they are timed on.

    Args:
        directory: The bundle.
        float_model: The same subnet in fp32, on the CPU; its training mode and parameters are left as they are.
        batch_sizes: Images per call.
        threads: For every candidate; torch's own setting is restored.
        integer_model: A torch network that takes fp32 images and returns the dequantized fp32 outputs.
        images: fp32 ``[N, ...]`` to take batches of; without it, noise over the input's range.
        seed: Of that noise.
        warmup, repeats: Per candidate, see :func:`bench`.

    Raises:
        ParityError: A candidate computes something else; nothing is timed then.
        ArtifactError: The bundle is damaged.
        InputError: A batch size below 1.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise InputError(f"the batch sizes are {list(batch_sizes)}; each must be at least 1.")
    program = bundle.read(directory)
    session = _session(program)
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch, _torch_state(threads, float_model, integer_model):
        pool = _pool(program, images, max(batch_sizes), seed)
        files = _files(directory, float_model, pool, Path(scratch))
        candidates = _candidates(files, float_model, integer_model, threads, session)
        rows: list[Row] = []
        for batch in batch_sizes:
            x = pool[:batch]
            verify = _verifiers(Reference(directory).run(x), program, float_model, candidates, x)
            peaks = {name: _memory(name, files, candidates[name], x, threads) for name in candidates}
            timings = bench(candidates, x, warmup=warmup, repeats=repeats, verify=verify)
            rows += [_row(name, timing, peaks[name], verify[name]) for name, timing in timings.items()]
        sizes = _sizes(directory, files, float_model)
    return BenchReport(environment(threads, session), sizes, tuple(rows))


def environment(threads: int, session: Mapping[str, object] | None = None) -> dict[str, object]:
    """What times depend on: processor, cores, threads, system, versions, session options."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "system": platform.platform(),
        "versions": versions(),
        "session": {key: list(value) if isinstance(value, tuple) else value for key, value in (session or {}).items()},
    }


def _cpu() -> str:
    """The processor's name; Linux tells it in /proc, the others through :mod:`platform`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _session(program: Program) -> dict[str, object]:
    """The target's session options; threads stop spinning behind each run, lest they slow the next candidate."""
    known = targets.load(program.target).session if program.target in targets.names() else {}
    return {**known, "session.force_spinning_stop": "1"}


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


def _files(directory: Path, float_model: torch.nn.Module | None, pool: Images, scratch: Path) -> dict[str, Path]:
    """The ONNX files by candidate; the fp32 one is written to a scratch directory."""
    files = {"onnxruntime int8": storage.path_of(directory, MODEL)}
    if float_model is not None:
        torch = require("torch")
        path = scratch / "float.onnx"
        path.write_bytes(export_float(float_model, torch.from_numpy(pool[:1])))
        files["onnxruntime fp32"] = path
    return files


def _candidates(
    files: Mapping[str, Path],
    float_model: torch.nn.Module | None,
    integer_model: torch.nn.Module | None,
    threads: int,
    session: Mapping[str, object],
) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {}
    if float_model is not None:
        found["torch fp32"] = _torch_candidate(float_model)
    if integer_model is not None:
        found["torch integers"] = _torch_candidate(integer_model)
    for name, path in files.items():
        runtime = OnnxRuntime(path, threads, session, chunk=1 << 30)
        found[name] = runtime.run if name.endswith("int8") else runtime.logits
    return found


def _torch_candidate(model: torch.nn.Module) -> Candidate:
    torch = require("torch")

    def call(x: Images) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(x)).numpy()

    return call


class _Equals:
    """A verifier; ``what`` says what the result is compared with."""

    def __init__(self, what: str, problem: Verifier) -> None:
        self.what, self.problem = what, problem

    def __call__(self, result: object) -> str:
        return self.problem(result)


def _verifiers(
    expected: NDArray[np.uint8],
    program: Program,
    float_model: torch.nn.Module | None,
    candidates: Mapping[str, Candidate],
    x: Images,
) -> dict[str, _Equals]:
    tensor = program.output
    averaged = any(isinstance(op, AvgPool) for op in program.ops)
    allowed = expected.size // TOLERANCE if averaged else 0

    def integers(result: object) -> str:
        got = np.asarray(result)
        wrong = int((got != expected).sum()) if got.shape == expected.shape else expected.size
        return f"{wrong} of {expected.size} integers differ from the reference." if wrong > allowed else ""

    def dequantized(result: object) -> str:
        steps = np.rint(np.asarray(result, np.float64) / tensor.scale) + tensor.zero_point
        return integers(steps)

    found = {"onnxruntime int8": _Equals("reference", integers)}
    if "torch integers" in candidates:
        found["torch integers"] = _Equals("reference", dequantized)
    if float_model is not None:
        real = np.asarray(candidates["torch fp32"](x))
        found["torch fp32"] = _Equals("itself", lambda result: "")
        found["onnxruntime fp32"] = _Equals("torch fp32", lambda result: _far(np.asarray(result), real))
    return found


def _far(got: NDArray[Any], real: NDArray[Any]) -> str:
    if got.shape != real.shape:
        return f"its outputs have the shape {got.shape}, the network's {real.shape}."
    furthest = float(np.abs(got - real).max())
    return f"its outputs are up to {furthest:.3g} off the network's." if furthest > CLOSE * np.abs(real).max() else ""


def _row(name: str, timing: Timing, peak: tuple[float | None, str], verifier: _Equals) -> Row:
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
    )


def _sizes(directory: Path, files: Mapping[str, Path], float_model: torch.nn.Module | None) -> dict[str, float]:
    """Bytes of the bundle's files and of their fp32 counterparts, and the ratios between them."""
    sizes: dict[str, float] = {name: (directory / name).stat().st_size for name in storage.verify(directory)}
    sizes["bundle"] = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    if float_model is not None:
        from safetensors.torch import save

        state = {name: value.detach().clone().contiguous() for name, value in float_model.state_dict().items()}
        sizes["fp32 model.safetensors"] = len(save(state))
        sizes["fp32 model.onnx"] = files["onnxruntime fp32"].stat().st_size
        for name in (bundle.WEIGHTS, MODEL):
            sizes[f"ratio {name}"] = sizes[name] / sizes[f"fp32 {name}"]
    return sizes


def _memory(
    name: str, files: Mapping[str, Path], candidate: Candidate, x: Images, threads: int
) -> tuple[float | None, str]:
    """Peak memory in MiB and how it was measured."""
    if name in files:
        return memory.peak_of_file(files[name], x.shape, threads), memory.CHILD
    return memory.growth_of_call(lambda: candidate(x)), memory.GROWTH
