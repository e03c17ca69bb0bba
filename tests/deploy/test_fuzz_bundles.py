"""Mutated bundles: refused in one line or harmless, never a crash, a hang, an access outside or a silent acceptance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nasq.deploy import bundle, onnx, parity
from nasq.deploy.reference import Reference
from scripts.benchmarks.fuzz_bundles import BAD, fuzz, judge, same_arithmetic, summary
from scripts.benchmarks.fuzz_mutations import images, mutate, original


def test_a_hundred_resealed_mutations() -> None:
    rows = fuzz(100, resealed=True, seed=7)
    assert [row for row in rows if row["outcome"] in BAD] == []
    found = summary(rows)
    assert found["past the outer layer"] >= 0.5 and found["inner"] >= 40
    assert len({row["changed"] for row in rows}) >= 8


def test_without_new_checksums_hardly_anything_gets_past_them(tmp_path: Path) -> None:
    program = original(0)
    bundle.write(tmp_path / "s", program, {parity.MODEL: onnx.export(program)})
    assert judge(tmp_path / "s", program) == ("harmless", "")
    for seed in range(12):
        mutate(tmp_path / "s", tmp_path / f"c{seed}", seed, resealed=False)
        changed = any(
            not (tmp_path / f"c{seed}" / path.name).is_file()
            or (tmp_path / f"c{seed}" / path.name).read_bytes() != path.read_bytes()
            for path in (tmp_path / "s").iterdir()
        )
        assert judge(tmp_path / f"c{seed}", program)[0] == ("outer" if changed else "harmless")


def test_the_judge_knows_another_program(tmp_path: Path) -> None:
    program, other = original(0), original(1)
    bundle.write(tmp_path / "b", other, {parity.MODEL: onnx.export(other)})
    assert not same_arithmetic(program, other) and same_arithmetic(program, original(0))
    assert judge(tmp_path / "b", program)[0] == "SILENT"
    assert len(np.unique(Reference(tmp_path / "b").run(images(8)))) > 8


@pytest.mark.parametrize("source", range(3))
def test_the_originals_have_their_bits(source: int) -> None:
    bits = {op.weight_bits for op in original(source).ops if hasattr(op, "weight_bits")}
    assert bits == {8, (2, 3, 5)[source]}
