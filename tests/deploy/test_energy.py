"""Counters of energy: found, refused with a reason, wrapped around."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nasq.deploy import energy
from nasq.errors import InputError, NasqError


def zone(root: Path, name: str, what: str, value: int, most: int = 10_000_000) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "name").write_text(f"{what}\n")
    (root / name / "energy_uj").write_text(f"{value}\n")
    (root / name / "max_energy_range_uj").write_text(f"{most}\n")


def test_the_packages_are_found_and_nothing_else(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 7)
    zone(tmp_path, "intel-rapl:1", "package-1", 11, 99)
    zone(tmp_path, "intel-rapl:2", "psys", 1000)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    meter, why = energy.rapl(tmp_path)
    assert meter is not None and why == ""
    assert meter.microjoules() == [7, 11] and meter.ranges == (10_000_000, 99)
    assert "2 processor package(s)" in meter.name


def test_a_machine_without_counters(tmp_path: Path) -> None:
    meter, why = energy.rapl(tmp_path / "nothing")
    assert meter is None and "no RAPL package" in why and "virtual machine" in why


def test_counters_that_may_not_be_read(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 7)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    meter, why = energy.rapl(tmp_path)
    assert meter is None and "energy_uj cannot be read (No such file" in why and "only root" in why


@dataclass
class Fake:
    readings: list[list[int]]
    ranges: Sequence[int | None]
    name: str = "fake"
    calls: int = field(default=0)

    def microjoules(self) -> list[int]:
        return self.readings.pop(0)


def test_energy_per_call_over_a_counter_that_begins_again() -> None:
    meter = Fake([[900, 50], [100, 4050]], (999, None))
    calls: list[int] = []
    found = energy.millijoules(lambda: calls.append(1), meter, shortest=1e-4)
    assert found == pytest.approx((200 + 4000) / len(calls) / 1000)


def test_a_counter_that_goes_backwards() -> None:
    with pytest.raises(NasqError, match="went from 900 to 100 microjoules"):
        energy.millijoules(lambda: None, Fake([[900], [100]], (None,)), shortest=1e-5)
    with pytest.raises(InputError, match="shortest is 0"):
        energy.millijoules(lambda: None, Fake([], ()), shortest=0)


def test_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def refuse(index: int) -> Any:
        raise NVMLError("Not Supported")

    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index + 40,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: handle,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    meter, why = energy.nvml(2)
    assert meter is not None and why == "" and meter.microjoules() == [42_000] and meter.ranges == (None,)
    library.nvmlDeviceGetHandleByIndex = refuse
    assert energy.nvml() == (None, "NVML says: Not Supported")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.nvml() == (None, "the package 'nvidia-ml-py' is not installed")
