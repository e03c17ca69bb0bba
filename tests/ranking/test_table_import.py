from __future__ import annotations

import base64
import gzip
import json
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from nasq.errors import ArtifactError, InputError
from nasq.ranking.table import Table
from nasq.ranking.table_import import KINDS, import_table

CELLS = ["|none~0|+|none~0|none~1|+|none~0|none~1|none~2|", "|avg_pool_3x3~0|+|none~0|none~1|+|none~0|none~1|none~2|"]


# NAS-Bench-201


def result(data: str, epochs: int, splits: dict[str, float]) -> dict[str, object]:
    accuracies = {f"{split}@{epochs - 1}": value for split, value in splits.items()}
    early = {f"{split}@0": 10.0 for split in splits}
    return {"name": data, "eval_acc1es": {**early, **accuracies}, "epochs": epochs, "params": 0.073306, "flop": 7.78}


def official_201(path: Path) -> None:
    """A file with the layout of NAS-Bench-201-v1_1-096897.pth, as its own reader documents it."""
    infos = {}
    for index, name in enumerate(CELLS):
        full = OrderedDict()
        for seed in (777, 888)[: index + 1]:
            full["cifar10-valid", seed] = result("cifar10-valid", 200, {"x-valid": 80 + seed / 1000, "ori-test": 1.0})
            full["cifar10", seed] = result("cifar10", 200, {"ori-test": 90.0 + index})
        full["cifar100", 777] = result("cifar100", 200, {"x-valid": 50.0, "x-test": 51.0, "ori-test": 52.0})
        less = OrderedDict({("cifar10-valid", 777): result("cifar10-valid", 12, {"x-valid": 60.0 + index})})
        infos[index] = {
            key: {"arch_index": index, "arch_str": name, "all_results": results, "dataset_seed": {}}
            for key, results in (("full", full), ("less", less))
        }
    torch.save({"meta_archs": CELLS, "arch2infos": infos, "evaluated_indexes": {0, 1}}, path)


def test_the_official_nas_bench_201_file(tmp_path: Path) -> None:
    official_201(tmp_path / "nb.pth")
    table = import_table("nas-bench-201", tmp_path / "nb.pth")
    assert table.names == CELLS
    wanted = {
        "cifar10_valid_200": [80.777, 80 + (777 + 888) / 2000], "cifar10_test_200": [90, 91],
        "cifar100_valid_200": [50, 50], "cifar100_test_200": [51, 51], "cifar10_valid_12": [60, 61],
        "params": [73306, 73306], "flops": [7_780_000, 7_780_000],
    }  # fmt: skip
    assert list(table.metrics) == list(wanted)
    for name, values in wanted.items():
        assert table.metrics[name] == pytest.approx(np.array(values))


class Evil:
    """Unpickled without care, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_file_runs_nothing(tmp_path: Path) -> None:
    torch.save({"meta_archs": Evil(tmp_path / "made")}, tmp_path / "evil.pth")
    with pytest.raises(ArtifactError, match=r"evil\.pth cannot be read"):
        import_table("nas-bench-201", tmp_path / "evil.pth")
    (tmp_path / "evil.pickle.pbz2").write_bytes(pickle.dumps(Evil(tmp_path / "made")))
    with pytest.raises(InputError, match=r"is a pickle, which could run any code while it is read\. Write a CSV"):
        import_table("nas-bench-201", tmp_path / "evil.pickle.pbz2")
    assert not (tmp_path / "made").exists()


def test_what_is_no_nas_bench_201_file(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match=r"is no NAS-Bench-201 file: KeyError\('meta_archs'\)"):
        import_table("nas-bench-201", tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"PK")
    with pytest.raises(ArtifactError, match="corrupt, or another kind of file"):
        import_table("nas-bench-201", tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"x\.pth is missing"):
        import_table("nas-bench-201", tmp_path / "x.pth")


def test_nas_bench_201_as_csv(tmp_path: Path) -> None:
    text = f"arch_index,arch_str,valid,params_m\n0,{CELLS[0]},81.5,0.073306\n1,{CELLS[1]},82,0.129306\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    table = import_table("nas-bench-201", tmp_path / "t.csv.gz")
    assert table.names == CELLS and list(table.metrics) == ["valid", "params"]
    assert table.metrics["params"].tolist() == [73306, 129306]


# NAS-Bench-Macro


def test_nas_bench_macro_as_json_and_csv(tmp_path: Path) -> None:
    rows = {
        "00000000": {"test_acc": [78.1, 78.2, 78.3], "mean_acc": 78.2, "std": 0.1, "params": 500, "flops": 1000},
        "22212220": {"test_acc": [93.1, 93.2, 93.0], "mean_acc": 93.1, "std": 0.1, "params": 700, "flops": 2000},
    }
    (tmp_path / "m.json").write_text(json.dumps(rows))
    (tmp_path / "m.csv").write_text("arch,mean_acc,params\n00000000,78.2,500\n22212220,93.1,700\n")
    first, second = (import_table("nas-bench-macro", tmp_path / f"m.{end}") for end in ("json", "csv"))
    assert first.names == second.names == ["00000000", "22212220"] and first.column()[0] == "mean_acc"
    assert first.metrics["test_acc_2"].tolist() == [78.3, 93.0] and first.metrics["flops"].tolist() == [1000, 2000]
    for name, values in second.metrics.items():
        assert np.array_equal(first.metrics[name], values)
    for text in ('{"a": {"mean_acc": 1}}', '{"a": 3}', "{"):
        (tmp_path / "m.json").write_text(text)
        with pytest.raises(ArtifactError, match="is no NAS-Bench-Macro file"):
            import_table("nas-bench-macro", tmp_path / "m.json")


# NAS-Bench-101


def varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def evaluation(epoch: float, train: float, valid: float, test: float) -> bytes:
    values = (epoch, 60 * epoch, train, valid, test)
    body = b"".join(bytes([number << 3 | 1]) + struct.pack("<d", value) for number, value in enumerate(values, 1))
    return body + bytes([6 << 3 | 2]) + varint(4) + b"ckpt"


def metrics(params: int, *evaluations: bytes) -> str:
    body = b"".join(b"\x0a" + varint(len(one)) + one for one in evaluations)
    return base64.b64encode(body + b"\x10" + varint(params) + b"\x19" + struct.pack("<d", 12.5)).decode()


def framed(*records: object) -> bytes:
    found = b""
    for record in records:
        data = json.dumps(record).encode()
        found += struct.pack("<Q", len(data)) + b"crc_" + data + b"crc_"
    return found


def trained(cell: str, epochs: int, valid: float, test: float, params: int = 3_989_898) -> list[object]:
    adjacency, operators = cell.split(":")
    stages = [evaluation(0, 0.1, 0.1, 0.1), evaluation(epochs / 2, 0.5, 0.5, 0.5), evaluation(epochs, 1, valid, test)]
    return ["hash", epochs, adjacency, operators, metrics(params, *stages)]


def test_the_official_nas_bench_101_file(tmp_path: Path) -> None:
    cells = ["0100100010000000:input,conv3x3-bn-relu,maxpool3x3,output", "0100:input,output"]
    records = [
        trained(cells[0], 108, 0.5, 0.25), trained(cells[0], 108, 0.75, 0.75),
        trained(cells[1], 108, 0.9, 0.91, params=200), trained(cells[0], 36, 0.3, 0.2),
    ]  # fmt: skip
    # Longer than one block of the reader.
    many = [trained(f"{'0' * 1000}{number}:x", 108, 0.5, 0.5) for number in range(900)]
    (tmp_path / "nb.tfrecord").write_bytes(framed(*records, *many))
    table = import_table("nas-bench-101", tmp_path / "nb.tfrecord")
    assert len(table) == 902 and table.names[:2] == cells and table.column()[0] == "validation_accuracy_108"
    assert table.metrics["validation_accuracy_108"][:2] == pytest.approx([62.5, 90])
    assert table.metrics["test_accuracy_108"][:2] == pytest.approx([50, 91])
    assert table.metrics["params"][:2].tolist() == [3_989_898, 200]
    assert table.metrics["validation_accuracy_36"][:2] == pytest.approx([30, np.nan], nan_ok=True)
    assert table.metrics["training_time_108"][0] == pytest.approx(60 * 108)


def test_damaged_nas_bench_101_files(tmp_path: Path) -> None:
    path, whole = tmp_path / "nb.tfrecord", framed(trained("0100:input,output", 108, 0.5, 0.5))
    for data, message in (
        (whole[:-9], "ends in the middle of a record"),
        (whole + b"123", "is no TFRecord file, or it is truncated"),
        (b"name,acc\na,1\nb,2\n", "is no TFRecord file"),
        (whole + framed(["a", 108]), "record 2, is none of NAS-Bench-101"),
        (framed(["a", 108, "0", "x", "%%"]), "record 1, is none of NAS-Bench-101"),
        (framed(["a", 108, "0", "x", metrics(1, evaluation(0, 1, 1, 1))]), "it has 1 evaluations instead of 3"),
        (b"", "holds no records"),
    ):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=message):
            import_table("nas-bench-101", path)
    with pytest.raises(InputError, match="is missing"):
        import_table("nas-bench-101", tmp_path / "none")


def test_plain_csv_and_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,acc\na,1\n")
    assert import_table("csv", tmp_path / "t.csv").names == ["a"]
    with pytest.raises(InputError, match=r"unknown kind of table 'nasbench201'\. Did you mean 'nas-bench-201'\?"):
        import_table("nasbench201", tmp_path / "t.csv")
    assert set(KINDS) == {"nas-bench-101", "nas-bench-201", "nas-bench-macro", "csv"}


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("NASQ_DATA"), reason="set NASQ_DATA to the directory of the public data sets")
def test_the_published_tables(tmp_path: Path) -> None:
    folder = Path(os.environ["NASQ_DATA"]) / "tables"
    cells = import_table("nas-bench-201", folder / "nas_bench_201_cifar10.csv.gz")
    assert len(cells) == 15_625 and cells.column()[0] == "cifar10_valid_200"
    best = int(cells.metrics["cifar10_test_200"].argmax())
    assert best == 6111 and cells.metrics["cifar10_test_200"][best] == 94.3733
    assert cells.metrics["params"][best] == 1_073_466
    cells.write(tmp_path / "t.csv.gz")
    again = Table.read(tmp_path / "t.csv.gz")
    assert all(np.array_equal(again.metrics[name], values, equal_nan=True) for name, values in cells.metrics.items())
    macro = import_table("nas-bench-macro", folder / "nas_bench_macro_cifar10.csv.gz")
    assert len(macro) == 6561 and macro.names[int(macro.metrics["mean_acc"].argmax())] == "22212220"
