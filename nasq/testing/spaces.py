"""The conformance kit for search spaces: what every space does, nasq's own and anybody else's.

``check_space(factory)`` in a test of your own package proves that your space samples, mutates, encodes, extracts, costs,
saves, quantizes and exports as nasq's own do. See `docs/new_space.md`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nasq.errors import NasqError
from nasq.testing import deployed, network, structure
from nasq.testing.subject import ConformanceError, Subject

__all__ = ["ConformanceError", "SpaceCheck", "SpaceReport", "check_space"]

Check = Callable[[Subject], str]

CHECKS: dict[str, Check] = {
    "choices": structure.choices,
    "JSON round trip": structure.json_round_trip,
    "sampling": structure.sampling,
    "canonical form": structure.canonical_form,
    "encoding": structure.encoding,
    "arrays and subnets": structure.arrays_and_subnets,
    "forward and gradients": network.gradients,
    "extract equals activate": network.extraction,
    "recalibration": network.recalibration,
    "costs equal counters": network.costs,
    "save and load": network.save_and_load,
    "wrong inputs": network.wrong_inputs,
    "quantize": deployed.quantized,
    "exported parity": deployed.exported,
}
"""Every check by name, in the order in which they run."""


@dataclass(frozen=True)
class SpaceCheck:
    """One check that passed, or was left out for a reason.

    Attributes:
        name: What was checked.
        detail: What was looked at, in a few words; the reason where it was left out.
        seconds: How long it took.
    """

    name: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class SpaceReport:
    """What :func:`check_space` found.

    Attributes:
        space: The space's name.
        size: Number of canonical subnets before bits, or ``None`` where the rules cannot say.
        checks: Those that passed.
        left_out: Those that were not made, with the reason that the space declares.
    """

    space: str
    size: int | None
    checks: tuple[SpaceCheck, ...] = field(default=())
    left_out: tuple[SpaceCheck, ...] = field(default=())

    def summary(self) -> str:
        """One line per check."""
        size = "unknown" if self.size is None else f"{self.size:,}" if self.size < 10**9 else f"{float(self.size):.3g}"
        lines = [f"{self.space}: {size} subnets"]
        lines += [f"  passed   {check.name}: {check.detail} ({check.seconds:.2f} s)" for check in self.checks]
        lines += [f"  LEFT OUT {check.name}: {check.detail}" for check in self.left_out]
        return "\n".join(lines)


def check_space(
    factory: Callable[..., nn.Module],
    *,
    name: str = "",
    arguments: Mapping[str, Any] | None = None,
    input_shape: tuple[int, ...] | None = None,
    tiny: bool = True,
    subnets: int = 20,
    exported: int = 3,
    target: str = "onnxruntime-cpu",
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> SpaceReport:
    """Checks that a search space does what every search space has to do.

    Args:
        factory: Builds the network; equal calls build equal spaces. Decorated with
            :func:`nasq.plugins.search_space`, or ``input_shape`` is given.
        name: For messages; without it, the factory's name.
        arguments: For the factory; without them, those of its test-size member.
        input_shape: ``(C, H, W)`` of one input; without it, that of the member.
        tiny: Whether the test-size member is checked (the full one takes minutes).
        subnets: How many random subnets are looked at.
        exported: How many of them are exported and run.
        target: Where exported files run.
        seed: Of weights, subnets and inputs.
        say: Gets one line per check as it passes, such as ``print``.

    Returns:
        What was checked, and what was left out because the space declares a reason (``float_only``).

    Raises:
        ConformanceError: A check failed; names the check, the subnet and the difference. An ``AssertionError`` as well.
        InputError: Neither the factory nor the call says the shape of an input.
    """
    subject = Subject.of(factory, name, arguments, input_shape, tiny, subnets, exported, target, seed)
    passed: list[SpaceCheck] = []
    left_out: list[SpaceCheck] = []
    for check, run in CHECKS.items():
        began = time.perf_counter()
        reason = subject.float_only if run in (deployed.quantized, deployed.exported) else ""
        detail = reason or _run(check, run, subject)
        done = SpaceCheck(check, detail, time.perf_counter() - began)
        (left_out if reason else passed).append(done)
        if say is not None:
            say(f"{subject.name}: {'LEFT OUT ' if reason else ''}{check}: {detail}")
    return SpaceReport(subject.name, structure.size_of(subject.space), tuple(passed), tuple(left_out))


def _run(name: str, check: Check, subject: Subject) -> str:
    try:
        return check(subject)
    except ConformanceError as error:
        raise ConformanceError(f"the search space {subject.name!r} fails the check {name!r}: {error}") from error
    except NasqError as error:
        raise ConformanceError(
            f"the search space {subject.name!r} fails the check {name!r}: {type(error).__name__}: {error}"
        ) from error
