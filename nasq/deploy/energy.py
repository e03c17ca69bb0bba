"""Energy of calls, where the machine lets it be read: RAPL for a processor package, NVML for a CUDA device.

Both are counters of the whole package or device: whatever else runs on the machine is in them, idling included. So they
are read around a block of calls, on a quiet machine, or not at all. Sources: Linux' power capping framework
(``/sys/class/powercap``; since 5.10 only root may read it unless told otherwise), NVML's
``nvmlDeviceGetTotalEnergyConsumption`` (Volta and newer).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nasq.errors import InputError, MissingPackageError, NasqError, require

__all__ = ["Meter", "Nvml", "Rapl", "millijoules", "nvml", "rapl"]

POWERCAP = Path("/sys/class/powercap")
SHORTEST = 0.5  # seconds of calls; RAPL's counter moves about once per millisecond


class Meter(Protocol):
    """A counter of energy."""

    @property
    def name(self) -> str:
        """What it counts, in words."""

    def microjoules(self) -> Sequence[int]:
        """What each of its parts has used since some moment, in microjoules; see :attr:`ranges`."""

    @property
    def ranges(self) -> Sequence[int | None]:
        """Where each part begins again at 0; ``None``: it does not."""


@dataclass(frozen=True)
class Rapl:
    """All processor packages of a machine.

    Attributes:
        zones: Their directories, such as ``intel-rapl:0`` (AMD's are called so as well).
        ranges: The largest value of each counter, behind which it begins again.
    """

    zones: tuple[Path, ...]
    ranges: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """In words."""
        return f"RAPL, {len(self.zones)} processor package(s), all that runs on them"

    def microjoules(self) -> list[int]:
        """The counters; raises ``OSError`` where they cannot be read."""
        return [int((zone / "energy_uj").read_text()) for zone in self.zones]


@dataclass(frozen=True)
class Nvml:
    """One CUDA device.

    Attributes:
        library: The package ``pynvml``, initialised.
        handle: Of the device.
    """

    library: Any
    handle: Any

    @property
    def name(self) -> str:
        """In words."""
        return "NVML, the whole device"

    @property
    def ranges(self) -> tuple[int | None, ...]:
        """It counts from the driver's start on."""
        return (None,)

    def microjoules(self) -> list[int]:
        """The counter; NVML has millijoules."""
        return [1000 * int(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle))]


def rapl(root: Path = POWERCAP) -> tuple[Rapl | None, str]:
    """The machine's processor packages, or ``None`` and why their energy is not readable, as a clause."""
    zones = tuple(sorted(zone for zone in root.glob("*-rapl:*") if zone.name.count(":") == 1 and _package(zone)))
    if not zones:
        return None, f"there is no RAPL package in {root}: not Linux, a virtual machine, or no driver"
    try:
        meter = Rapl(zones, tuple(int((zone / "max_energy_range_uj").read_text()) for zone in zones))
        meter.microjoules()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return None, f"{zones[0] / 'energy_uj'} cannot be read ({reason}); only root may by default"
    return meter, ""


def _package(zone: Path) -> bool:
    """Whether a zone is a whole package: others (``psys``, ``dram``) count something else, or the same again."""
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def nvml(index: int = 0) -> tuple[Nvml | None, str]:
    """A CUDA device, or ``None`` and why its energy is not readable, as a clause."""
    try:
        pynvml = require("pynvml")
    except MissingPackageError:
        return None, "the package 'nvidia-ml-py' is not installed"
    try:
        pynvml.nvmlInit()
        meter = Nvml(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
        meter.microjoules()
    except pynvml.NVMLError as error:
        return None, f"NVML says: {error}"
    return meter, ""


def millijoules(call: Callable[[], object], meter: Meter, shortest: float | None = None) -> float:
    """Energy per call, in millijoules, over a block of calls.

    Args:
        call: What to run; has been run before.
        meter: Of what it runs on.
        shortest: Seconds that the block takes at least; ``None``: :data:`SHORTEST`.

    Raises:
        InputError: ``shortest`` is not above 0.
        NasqError: A counter moved backwards further than its range explains.
    """
    shortest = SHORTEST if shortest is None else shortest
    if not shortest > 0:
        raise InputError(f"shortest is {shortest}; a block of calls takes some time, so give seconds above 0.")
    before, began, calls = meter.microjoules(), time.perf_counter(), 0
    while time.perf_counter() - began < shortest:
        call()
        calls += 1
    spent = sum(map(_moved, before, meter.microjoules(), meter.ranges))
    return spent / calls / 1000


def _moved(before: int, after: int, most: int | None) -> int:
    moved = after - before
    if moved < 0 and most is not None:
        moved += most + 1
    if moved < 0:
        raise NasqError(f"an energy counter went from {before} to {after} microjoules. Measure again.")
    return moved
