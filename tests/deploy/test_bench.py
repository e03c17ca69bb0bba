"""The bench: order, statistics, correctness before timing. No test looks at how long anything took."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from scipy.stats import binom
from torch import nn

from nasq.deploy import bundle, energy, parity
from nasq.deploy.bench import Timing, bench, bench_bundle, environment, median_interval
from nasq.deploy.float_forms import CLOSE, export_form, torch_form
from nasq.deploy.memory import growth_of_call, peak_of_file
from nasq.deploy.onnx import export
from nasq.deploy.reference import Reference
from nasq.deploy.runtimes import OnnxRuntime
from nasq.errors import InputError, NasqError, ParityError
from tests.deploy.programs import random_input, residual_program

PROGRAM = residual_program(0, 4, 4)
X = np.zeros((3, 1), np.float32)


# -- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 7, 10, 25, 30, 101])
def test_the_interval_of_a_median_covers_it_with_95_percent(count: int) -> None:
    low, high = median_interval([float(i) for i in range(1, count + 1)])
    k = int(low)
    assert high == count + 1 - k
    # P(x_(k) <= median <= x_(n+1-k)) for a continuous distribution, and that k + 1 would not do.
    assert 1 - 2 * binom.cdf(k - 1, count, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(k, count, 0.5) < 0.95


def test_known_intervals() -> None:
    samples = list(np.random.default_rng(0).permutation(30) + 1.0)
    assert median_interval(samples) == (10.0, 21.0)  # the textbook's ranks for n = 30
    with pytest.raises(InputError, match="5 samples are too few for a 95% interval"):
        median_interval([1.0] * 5)


def test_a_timing_keeps_outliers_and_gives_robust_figures() -> None:
    timing = Timing((2.0, 1.0, 3.0, 2.0, 2.0, 100.0, 2.0, 1.0, 3.0), 8)
    assert timing.median == 2.0
    assert timing.throughput == 8 / 2e-3
    assert timing.spread == 1.0
    assert timing.p95 == pytest.approx(np.percentile(timing.samples, 95))
    assert max(timing.samples) == 100.0
    assert timing.interval == (1.0, 3.0)


# -- order and correctness --------------------------------------------------------------------------------------------


def test_candidates_run_in_turn_and_every_call_is_counted() -> None:
    calls: list[str] = []
    names = ("a", "b", "c")
    timings = bench({name: lambda x, name=name: calls.append(name) for name in names}, X, warmup=2, repeats=6)
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [calls[6 + 3 * i : 9 + 3 * i] for i in range(6)]
    assert rounds[:4] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert [len(timings[name].samples) for name in names] == [6, 6, 6]
    assert timings["a"].batch == 3


def test_a_wrong_candidate_is_named_and_nothing_is_timed() -> None:
    calls: list[str] = []
    candidates = {"good": lambda x: calls.append("good"), "bad": lambda x: calls.append("bad")}
    with pytest.raises(ParityError, match="bad is wrong and was not timed: 3 of 5 differ"):
        bench(candidates, X, verify={"good": lambda result: "", "bad": lambda result: "3 of 5 differ"})
    assert calls == ["good", "bad"]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="nothing to time"):
        bench({}, X)
    with pytest.raises(InputError, match="repeats is 5, warmup 5; allowed: repeats >= 6"):
        bench({"a": lambda x: x}, X, repeats=5)
    with pytest.raises(InputError, match="a check for 'b', which is no candidate"):
        bench({"a": lambda x: x}, X, verify={"b": lambda result: ""})


def test_the_environment_names_what_times_depend_on() -> None:
    found = environment(2, {"providers": ("CPUExecutionProvider",)})
    assert found["cpu"] and found["threads"] == 2 and int(str(found["cores"])) >= 1
    assert "onnxruntime" in json.dumps(found["versions"])
    assert found["session"] == {"providers": ["CPUExecutionProvider"]}


# -- a bundle ---------------------------------------------------------------------------------------------------------


def float_net() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


class Integers(nn.Module):
    """Stands for nasq's own integer network: the reference, dequantized, and perhaps off by one step."""

    def __init__(self, directory: Path, off: int = 0) -> None:
        super().__init__()
        self.reference, self.off = Reference(directory), off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = self.reference.run(x.numpy()).astype(np.float32) - PROGRAM.output.zero_point + self.off
        return torch.from_numpy(steps * np.float32(PROGRAM.output.scale))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "b", PROGRAM, {parity.MODEL: export(PROGRAM)})
    return tmp_path / "b"


def test_a_bundle_is_timed_beside_its_fp32_self(directory: Path) -> None:
    model, threads = float_net(), torch.get_num_threads()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = bench_bundle(directory, model, (1, 3), integer_model=Integers(directory), warmup=1, repeats=6)
    assert [(row.candidate, row.batch) for row in report.rows] == [
        (name, batch)
        for batch in (1, 3)
        for name in ("torch fp32", "torch integers", "onnxruntime int8", "onnxruntime fp32")
    ]
    checked = {row.candidate: row.checked for row in report.rows}
    assert checked["onnxruntime int8"] == checked["torch integers"] == "reference"
    assert checked["onnxruntime fp32"] == "torch fp32"
    for row in report.rows:
        assert 0 < row.low <= row.median <= row.high
        assert row.throughput == pytest.approx(row.batch / row.median * 1e3)
        assert len(row.samples) == 6
    assert torch.get_num_threads() == threads and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_sizes_are_those_of_the_files(directory: Path) -> None:
    model = float_net()
    report = bench_bundle(directory, model, (1,), warmup=0, repeats=6)
    sizes = report.sizes
    assert sizes["model.onnx"] == len((directory / "model.onnx").read_bytes())
    assert sizes["bundle"] == sum(path.stat().st_size for path in directory.iterdir())
    numbers = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert numbers < sizes["fp32 model.safetensors"] < numbers + 2000
    ratio = sizes["model.safetensors"] / sizes["fp32 model.safetensors"]
    assert sizes["ratio model.safetensors"] == pytest.approx(ratio)
    assert {"ratio model.onnx", "fp32 model.onnx", "subnet.json"} <= set(sizes)


def test_memory_says_how_it_was_measured(directory: Path) -> None:
    report = bench_bundle(directory, float_net(), (2,), warmup=0, repeats=6)
    methods = {row.candidate: row.memory for row in report.rows}
    assert methods["onnxruntime int8"] == methods["onnxruntime fp32"]
    assert methods["onnxruntime int8"].startswith("child process")
    assert methods["torch fp32"].startswith("this process")
    if Path("/proc/self/clear_refs").exists():
        assert all(row.peak_mib is not None and row.peak_mib >= 0 for row in report.rows)


def test_the_growth_of_a_call_is_what_it_holds() -> None:
    grown = growth_of_call(lambda: np.ones(50 << 17))  # 50 MiB
    if Path("/proc/self/clear_refs").exists():
        assert grown is not None and 45 < grown < 60


def test_a_file_that_does_not_run_tells_why_its_memory_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "torn.onnx").write_bytes(b"torn")
    with pytest.raises(
        NasqError, match=r"(?s)memory of .*torn\.onnx could not be measured in a child process: .*Protobuf"
    ):
        peak_of_file(tmp_path / "torn.onnx", (1, 3), 1)


def test_a_bundle_alone_is_timed_without_torch_models(directory: Path) -> None:
    report = bench_bundle(directory, images=random_input(PROGRAM, 2, 0), batch_sizes=(5,), warmup=0, repeats=6)
    assert [(row.candidate, row.batch) for row in report.rows] == [("onnxruntime int8", 5)]
    assert not any(name.startswith(("fp32", "ratio")) for name in report.sizes)
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["environment"]["session"]["session.force_spinning_stop"] == "1"
    assert len(plain["rows"][0]["samples"]) == 6
    assert list(report.table()[0]) == [key for key in plain["rows"][0] if key != "samples"]
    read = report.environment["energy"]
    assert (report.rows[0].energy_mj is None) == str(read).startswith("not readable: ")


def test_energy_where_it_is_readable(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        name, ranges, used = "a meter", (None,), 0

        def microjoules(self) -> list[int]:
            self.used += 3_000_000
            return [self.used]

    monkeypatch.setattr(energy, "rapl", lambda: (Meter(), ""))
    monkeypatch.setattr(energy, "SHORTEST", 1e-3)
    report = bench_bundle(directory, images=random_input(PROGRAM, 2, 0), batch_sizes=(2,), warmup=0, repeats=6)
    used = report.rows[0].energy_mj
    assert report.environment["energy"] == "a meter" and used is not None
    calls = 3000 / used  # millijoules of the block by those of a call
    assert calls >= 1 and abs(calls - round(calls)) < 1e-6


def test_candidates_that_compute_something_else_are_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="torch integers is wrong and was not timed: 10 of 10 integers differ"):
        bench_bundle(directory, None, (1,), integer_model=Integers(directory, off=1), warmup=0, repeats=6)
    bundle.write(tmp_path / "other", PROGRAM, {parity.MODEL: export(residual_program(1, 4, 4))})
    with pytest.raises(ParityError, match="onnxruntime int8 is wrong"):
        bench_bundle(tmp_path / "other", None, (1,), warmup=0, repeats=6)


def test_bad_batches_and_images_are_refused(directory: Path) -> None:
    with pytest.raises(InputError, match=r"batch sizes are \[0, 8\]; each must be at least 1"):
        bench_bundle(directory, batch_sizes=(0, 8))
    with pytest.raises(InputError, match="must be float32, and at least one"):
        bench_bundle(directory, images=np.zeros((0, 3, 12, 12), np.float32))


# -- float formats ----------------------------------------------------------------------------------------------------


def test_float_forms_of_the_same_network_are_timed_beside_it(directory: Path) -> None:
    report = bench_bundle(directory, float_net(), (2,), forms=("fp32", "bf16", "fp16"), warmup=0, repeats=6)
    names = ["torch fp32", "torch bf16", "torch fp16", "onnxruntime int8", "onnxruntime fp32", "onnxruntime fp16"]
    assert [row.candidate for row in report.rows] == names
    assert {row.checked for row in report.rows if row.candidate[-2:] == "16"} == {"torch fp32"}


def test_a_half_precision_file_stores_half_the_bytes_and_computes_nearly_the_same() -> None:
    model, x = float_net().eval(), torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    whole, half = (export_form(model, x[:1], form) for form in ("fp32", "fp16"))
    stored = {form: _stored(data) for form, data in (("fp32", whole), ("fp16", half))}
    assert stored["fp16"] == {10} and stored["fp32"] == {1}  # onnx.TensorProto.FLOAT16, FLOAT
    with torch.no_grad():
        real = model(x).numpy()
    near = CLOSE["fp16"] * np.abs(real).max()
    assert 0 < np.abs(OnnxRuntime(half).logits(x.numpy()) - real).max() < near
    assert 0 < np.abs(torch_form(model, "bf16")(x.numpy()) - real).max() < CLOSE["bf16"] * np.abs(real).max()
    np.testing.assert_array_equal(torch_form(model, "fp32")(x.numpy()), real)
    assert next(model.parameters()).dtype == torch.float32


def _stored(data: bytes) -> set[int]:
    return {value.data_type for value in onnx.load_model_from_string(data).graph.initializer if len(value.dims) > 1}


def test_unknown_forms_are_refused(directory: Path) -> None:
    with pytest.raises(InputError, match=r"unknown float format 'fp8'. Did you mean .* Allowed: bf16, fp16, fp32"):
        bench_bundle(directory, forms=("fp8",))
    with pytest.raises(InputError, match="in 'bf16' cannot be run on a CPU by onnxruntime"):
        export_form(float_net(), torch.zeros(1, 3, 12, 12), "bf16")
