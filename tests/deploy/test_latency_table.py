"""Latency tables, baselines, end-to-end times, and predictions for other devices; no test asserts a time."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nasq.deploy import bundle, end_to_end, latency_table, onnx, openvino, parity, readback, runtimes
from nasq.deploy.baseline import changes
from nasq.deploy.engines import ENGINES
from nasq.deploy.latency_table import LatencyTable, LayerRow, layer_key
from nasq.deploy.latency_transfer import TransferPredictor, ridge
from nasq.deploy.reference import Reference
from nasq.deploy.timing import Timing, environment
from nasq.errors import ArtifactError, InputError
from nasq.quant.program import Conv, Program
from tests.deploy.programs import fused_program, residual_program


def small(seed: int, bits: int = 4, channels: int = 4) -> Program:
    return residual_program(seed, bits, 4, channels=channels, image=(6, 6))


def table_of(programs: list[Program]) -> LatencyTable:
    """Made-up times: one ms per kind of layer, in order."""
    keys = sorted({layer_key(op, program) for program in programs for op in program.ops})
    rows = {key: LayerRow(float(i + 1), 0.5, 2.0, 20) for i, key in enumerate(keys)}
    return LatencyTable(1, 1, "onnxruntime-cpu", {"cpu": "made up"}, rows)


def test_layers_of_one_geometry_share_a_row() -> None:
    program = small(0)
    convs = [op for op in program.ops if isinstance(op, Conv)]
    assert {layer_key(op, program) for op in program.ops} == {layer_key(op, small(1, 2)) for op in small(1, 2).ops}
    assert len({layer_key(op, program) for op in convs}) < len(convs)
    key = layer_key(convs[1], program)
    assert key == "conv, 4x6x6, to 4x6x6, stride 1x1, padding 1x1, dilation 1x1, weight 4x4x3x3, groups 1, clipped"
    for change in ({"stride": (2, 2)}, {"groups": 2}, {"output": replace(convs[1].output, low=0, high=255)}):
        assert layer_key(replace(convs[1], **change), program) != key


def test_a_prediction_is_a_line_of_the_sum_of_rows(tmp_path: Path) -> None:
    program = small(0)
    table = table_of([program])
    total = sum(table.rows[layer_key(op, program)].median for op in program.ops)
    assert table.layers_ms(program) == total
    with pytest.raises(InputError, match="was not fitted to whole networks"):
        table.predict(program)
    table.fit = latency_table.fit(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), np.array([5.0, 7.0, 9.0, 11.0, 13.0, 15.0]))
    assert (table.fit.intercept, table.fit.slope) == pytest.approx((3.0, 2.0))
    assert table.fit.largest_error < 1e-9 and table.fit.rank == 1.0 and (table.fit.fitted, table.fit.held_out) == (3, 3)
    assert table.predict(program) == pytest.approx(3 + 2 * total)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table
    with pytest.raises(InputError, match=r"has no row for 'conv, 3x6x6, to 6x6x6.*nasq bench --table"):
        table.predict(small(0, channels=6))


def test_errors_are_those_of_networks_that_were_not_fitted() -> None:
    found = latency_table.fit(np.array([1.0, 1.0, 2.0, 2.0]), np.array([1.0, 2.0, 2.0, 4.0]))
    assert (found.intercept, found.slope) == pytest.approx((0.0, 1.0))
    assert (found.median_error, found.largest_error) == pytest.approx((0.5, 0.5)) and found.rank is None


def test_a_table_is_measured_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_table, "MOST", 20)
    programs = [small(seed, channels=2 + 2 * (seed % 2)) for seed in range(4)]
    table = latency_table.build(programs, repeats=6)
    assert not any(table.missing(program) for program in programs)
    assert table.fit is not None and (table.fit.fitted, table.fit.held_out) == (2, 2)
    assert all(0 < row.low <= row.median <= row.high and row.calls == 20 for row in table.rows.values())
    before, other = dict(table.rows), small(0, channels=6)
    assert table.measure(other) == len(table.rows) - len(before) > 0 and table.measure(other) == 0
    assert {key: table.rows[key] for key in before} == before and np.isfinite(table.predict(other))


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
def test_layers_are_timed_on_their_runtime_with_the_threads_of_the_table(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, asked = small(0), list[tuple[str, int, int]]()
    if target == "openvino-cpu":
        pytest.importorskip("openvino")
        program = fused_program(program)
    prepare = {"onnxruntime": runtimes.prepare_cut, "openvino": openvino.prepare_cut}

    def counted(name: str) -> Any:
        def call(model: bytes, feeds: Any, threads: int) -> Any:
            asked.append((name, threads, len(next(iter(feeds.values())))))
            return prepare[name](model, feeds, threads)

        return call

    engines = {name: replace(engine, prepare=counted(name)) for name, engine in ENGINES.items() if name in prepare}
    monkeypatch.setattr("nasq.deploy.engines.ENGINES", engines)
    monkeypatch.setattr(latency_table, "MOST", 20)
    table = LatencyTable(3, 2, target, environment(2))
    assert table.measure(program) == len(asked) == len(table.rows) > 5
    assert set(asked) == {(target.removesuffix("-cpu"), 2, 3)}


def test_a_session_of_a_layer_has_the_threads_that_were_asked_for() -> None:
    program = small(0)
    cut = readback.read(onnx.export(program)).cut(1)
    for threads in (1, 2):
        assert runtimes.open_session(cut, threads).get_session_options().intra_op_num_threads == threads


def test_networks_are_timed_in_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def timed(calls: Any, x: Any, repeats: int) -> Any:
        seen.append(x)
        return {name: Timing((float(index + 1),) * 6, len(x)) for index, name in enumerate(calls)}

    monkeypatch.setattr(latency_table, "bench", timed)
    monkeypatch.setattr(latency_table, "_timed", lambda call: LayerRow(1.0, 1.0, 1.0, 20))
    few = np.random.default_rng(0).random((3, 3, 6, 6), np.float32)
    latency_table.build([small(seed) for seed in range(4)], batch=8, images=few)
    assert seen[0].shape == (8, 3, 6, 6) and np.array_equal(seen[0][3:6], few) and np.array_equal(seen[0][6:], few[:2])


def test_rows_of_two_machines_are_not_mixed() -> None:
    table = table_of([small(0)])
    assert table.measure(small(0)) == 0  # nothing is missing: a table of another machine predicts for that one
    with pytest.raises(InputError, match=r"is of 'made up' and lacks \d+ layers.*Complete it there: nasq bench RUN"):
        table.measure(small(0, channels=6))


def test_layers_of_a_compiled_network_have_no_times() -> None:
    program = replace(small(0), target="inductor-x86")
    with pytest.raises(InputError, match="'inductor' of the target 'inductor-x86' compiles whole networks"):
        latency_table.build([program] * 4)


def test_what_a_table_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 networks are too few to fit"):
        table_of([small(0)]).calibrate([small(0)] * 3)
    with pytest.raises(InputError, match="for one target and one input shape"):
        latency_table.build([small(0), residual_program(0, 4, 4)])
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"odd\.json is not a latency table of schema 1.*nasq bench RUN --table"):
        LatencyTable.load(tmp_path / "odd.json")
    (tmp_path / "odd.json").write_text('{"format": "nasq-latency-table", "schema": 1, "rows": {}}')
    with pytest.raises(ArtifactError, match=r"is not a whole latency table: KeyError\('fit'\)"):
        LatencyTable.load(tmp_path / "odd.json")


# ----------------------------------------------------------------------------------------------------------- baselines


def report(*rows: tuple[str, int, float], cpu: str = "a", threads: int = 1) -> dict[str, Any]:
    return {
        "environment": {"cpu": cpu, "threads": threads},
        "rows": [
            {"candidate": name, "batch": batch, "median": ms, "low": 0.95 * ms, "high": 1.05 * ms}
            for name, batch, ms in rows
        ],
    }


def test_slower_is_what_the_intervals_cannot_explain() -> None:
    before = report(("file", 1, 1.0), ("file", 8, 4.0), ("gone", 1, 1.0))
    found = changes(before, report(("file", 1, 1.2), ("file", 8, 5.0), ("new", 1, 9.0)))
    assert [(one.candidate, one.batch, one.slower) for one in found] == [("file", 1, False), ("file", 8, True)]
    assert found[1].ratio == 1.25
    assert [one.slower for one in changes(before, report(("file", 8, 5.0)), 0.2)] == [False]


@pytest.mark.parametrize(
    ("before", "now", "tolerance", "message"),
    [
        (report(("a", 1, 1.0), cpu="b"), report(("a", 1, 1.0)), 0.1, "taken with cpu 'b', this benchmark with 'a'"),
        (report(("a", 1, 1.0), threads=2), report(("a", 1, 1.0)), 0.1, "taken with threads 2"),
        (report(("a", 1, 1.0)), report(("a", 2, 1.0)), 0.1, "share no candidate at the same batch size"),
        (report(("a", 1, 1.0)), report(("a", 1, 1.0)), -0.1, r"the tolerance is -0\.1; allowed: 0 or more"),
        ({"rows": 3}, report(("a", 1, 1.0)), 0.1, "the baseline is not a benchmark"),
    ],
)
def test_baselines_that_do_not_compare(before: Any, now: Any, tolerance: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        changes(before, now, tolerance)


# ---------------------------------------------------------------------------------------------------------- end to end


def test_the_stages_feed_the_network_what_it_was_trained_on(tmp_path: Path) -> None:
    program = small(0)
    data = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    bundle.write(tmp_path / "b", replace(program, meta={"data": data}), {parity.MODEL: onnx.export(program)})
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3), np.uint8)
    files = []
    for one in pixels:
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "PNG")
        files.append(buffer.getvalue())
    found = end_to_end.end_to_end(tmp_path / "b", files, repeats=6)
    assert set(found) == {*end_to_end.STAGES, "total"} and all(len(one.samples) == 6 for one in found.values())
    assert all(
        sum(found[name].samples[i] for name in end_to_end.STAGES) == pytest.approx(found["total"].samples[i])
        for i in range(6)
    )
    got: list[Any] = []
    steps = end_to_end._steps(end_to_end.normaliser(bundle.read(tmp_path / "b")), lambda x: got.append(x) or x)
    value: Any = files[1]
    for step in steps:
        value = step(value)
    wanted = (
        (pixels[1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)).T - np.float32(data["mean"])
    ) / np.float32(data["std"])
    assert np.array_equal(got[0][0], wanted.T) and got[0].dtype == np.float32
    assert Reference(tmp_path / "b").run(got[0]).shape == (1, 10)


def test_end_to_end_needs_images_and_their_normalisation(tmp_path: Path) -> None:
    program = small(0)
    bundle.write(tmp_path / "b", program, {parity.MODEL: onnx.export(program)})
    with pytest.raises(InputError, match="at least one image and 6 repeats; given: 0 and 30"):
        end_to_end.end_to_end(tmp_path / "b", [])
    with pytest.raises(InputError, match="does not say how images become inputs"):
        end_to_end.end_to_end(tmp_path / "b", [b"x"])


# -------------------------------------------------------------------------------------------------------- new devices


def test_ridge_is_the_closed_form_and_its_choice_that_of_leaving_one_out() -> None:
    rng = np.random.default_rng(0)
    x, y, prior = rng.normal(size=(12, 4)), rng.normal(size=12), rng.normal(size=4)
    strengths = (0.1, 1.0, 10.0)

    def solved(x: Any, y: Any, strength: float) -> Any:
        stacked = np.concatenate([x, strength**0.5 * np.eye(4)])
        return np.linalg.lstsq(stacked, np.concatenate([y, strength**0.5 * prior]), rcond=None)[0]

    def left_out(strength: float) -> float:
        keep = [np.arange(12) != i for i in range(12)]
        return sum(float((y[~k] - x[~k] @ solved(x[k], y[k], strength))[0] ** 2) for k in keep)

    best = min(strengths, key=left_out)
    assert np.allclose(ridge(x, y, prior, strengths), solved(x, y, best))


def test_a_device_that_is_a_mean_of_others_is_found_from_few_samples() -> None:
    rng = np.random.default_rng(0)
    known = np.exp(rng.normal(size=(3, 400)))
    new = 7 * known[0] ** 0.8 * known[2] ** 0.2
    found = TransferPredictor(known).fit(np.arange(12), new[:12]).predict()
    assert np.median(np.abs(found / new - 1)) < 0.01
    one = TransferPredictor(known).fit(np.array([5]), 2 * np.exp(np.log(known).mean(0))[5:6]).predict()
    assert one[5] == pytest.approx(2 * np.exp(np.log(known).mean(0))[5], rel=1e-3)
    with_features = TransferPredictor(known, rng.normal(size=(400, 2))).fit(np.arange(12), new[:12]).predict()
    assert np.median(np.abs(with_features / new - 1)) < 0.2


def test_what_the_predictor_refuses() -> None:
    known = np.ones((2, 5))
    with pytest.raises(InputError, match="must be finite milliseconds above 0"):
        TransferPredictor(np.zeros((2, 5)))
    with pytest.raises(InputError, match="features of 4 networks and latencies of 5"):
        TransferPredictor(known, np.ones((4, 1)))
    with pytest.raises(InputError, match="has seen no measurement"):
        TransferPredictor(known).predict()
    for some, ms in (([], []), ([1], [1.0, 2.0]), ([1], [0.0])):
        with pytest.raises(InputError, match="cannot be learned from; give one above 0 for each"):
            TransferPredictor(known).fit(np.array(some, int), np.array(ms))
    assert json.dumps(TransferPredictor(known).fit(np.array([0]), np.array([3.0])).predict().tolist())
