from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nasq.training import precision

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="no /proc/cpuinfo to compare with")
def test_cpu_flags_are_those_of_the_kernel() -> None:
    listed = set(CPUINFO.read_text().split())
    assert precision.cpu_flags() == {"amx_bf16", "avx512_bf16"} & listed


@pytest.mark.parametrize(("flags", "fast"), [({"amx_bf16"}, True), ({"avx512_bf16"}, True), (set(), False)])
def test_bf16_follows_the_flags(monkeypatch: pytest.MonkeyPatch, flags: set[str], fast: bool) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    assert precision.fast_bf16(torch.device("cpu")) is fast
    assert precision.fast_bf16(torch.device("meta")) is False


@pytest.mark.parametrize(("machine", "fast"), [("x86_64", True), ("AMD64", True), ("aarch64", False)])
def test_channels_last_follows_the_processor(monkeypatch: pytest.MonkeyPatch, machine: str, fast: bool) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    assert precision.fast_channels_last(torch.device("cpu")) is fast
    assert precision.fast_channels_last(torch.device("meta")) is False


def test_a_torch_that_does_not_tell_means_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert precision.cpu_flags() == frozenset()
