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
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nasq.deploy.runtimes import versions
from nasq.errors import InputError, ParityError

__all__ = ["Candidate", "Images", "Timing", "Verifier", "bench", "environment", "median_interval"]

Images = NDArray[np.float32]
Candidate = Callable[[Images], object]
Verifier = Callable[[object], str]

FEWEST_REPEATS = 6  # below that no interval of order statistics reaches 95 %


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
