"""What a run's numbers say of its benchmark, whatever runtime its target has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nasq.deploy.engines import ENGINES
from nasq.files import write_json
from nasq.run.card import with_latency
from nasq.run.directory import RunDirectory
from nasq.run.summary import _bench, facts


def benchmark(runtime: str) -> dict[str, Any]:
    row = {"p95": 2.0, "spread": 0.1, "throughput": 9.0, "peak_mib": None, "low": 0.5, "high": 3.0}
    rows = [
        {"candidate": candidate, "batch": batch, "median": median, **row}
        for candidate, batch, median in (
            (f"{runtime} int8", 8, 4.0),
            (f"{runtime} int8", 1, 1.5),
            (f"{runtime} fp32", 1, 3.5),
            ("torch fp32", 1, 2.5),
        )
    ]
    where = {
        "threads": 1,
        "cpu": "x",
        "cores": 2,
        "system": "s",
        "versions": {runtime: "9.9"},
        "energy": "not readable: x",
    }
    return {"rows": rows, "sizes": {"model.onnx": 100, "fp32 model.onnx": 800}, "environment": where}


@pytest.mark.parametrize("runtime", ENGINES)
def test_the_latency_is_that_of_the_file_on_its_runtime(runtime: str, tmp_path: Path) -> None:
    write_json(tmp_path / "bench.json", benchmark(runtime))
    found = facts(RunDirectory(tmp_path))
    assert (found["latency_ms"], found["latency_batch"], found["latency_runtime"]) == (1.5, 1, runtime)
    rows = _bench(benchmark(runtime))
    assert rows is not None
    table = [(row.model, row.runtime, row.file_bytes) for row in rows]
    assert table[1:] == [
        ("best subnet", f"{runtime} int8", 100),
        ("same in fp32", f"{runtime} fp32", 800),
        ("same in fp32", "torch fp32", None),
    ]
    assert f"{runtime} 9.9; energy not readable: x:" in with_latency("# card", benchmark(runtime))
