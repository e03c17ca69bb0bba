"""The commands that show and list: at 80 columns, and as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nasq.cli import doctor
from nasq.cli.output import Output
from tests.run.tiny import Call, Done, Run, subnets


def narrow(done: Done) -> str:
    """What was printed; every line fits a terminal of 80 columns."""
    assert done.code == 0, done.err
    assert [line for line in done.out.splitlines() if len(line.rstrip()) > 80] == []
    return done.out


def test_show_run(finished: Run, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.directory.parent)
    out = narrow(call("show", "run"))
    assert out.startswith("run: 8 subnets evaluated; ") and "are the front\n" in out and "accuracy" in out
    facts = json.loads(call("show", "run", "--json").out)
    assert facts["evaluated"] == 8 and facts["subnet"] in {row["subnet"] for row in facts["front"]}
    assert all(row["subnet"] in out for row in facts["front"])


def test_show_bundle(finished: Run, call: Call) -> None:
    out = narrow(call("show", finished.directory / "best"))
    assert "digits_mobile for onnxruntime-cpu" in out and "stage1.first.depthwise.0" in out
    facts = json.loads(call("show", finished.directory / "best", "--json").out)
    assert facts["layers"][0]["kind"] == "Input" and facts["files"]["model.onnx"] > 0
    assert facts["meta"]["data"]["name"] == "digits"


def test_pick_gives_the_best_within_limits(finished: Run, call: Call) -> None:
    rows = subnets(finished.directory)
    limit = sorted(float(row["bytes"]) for row in rows)[3]
    best = max(float(row["accuracy"]) for row in rows if float(row["bytes"]) <= limit)
    picked = json.loads(call("pick", finished.directory, "--max-bytes", int(limit), "--json").out)
    assert picked["values"]["accuracy"] == best and picked["values"]["bytes"] <= limit
    wide = json.loads(call("pick", finished.directory, "--limit", "accuracy>=0", "--max-bitops", "1G", "--json").out)
    assert wide["values"]["accuracy"] == max(float(row["accuracy"]) for row in rows)
    shown = narrow(call("pick", finished.directory, "--max-bytes", int(limit)))
    assert picked["id"] in shown
    assert ["bytes", f"{round(picked['values']['bytes']):,}", "B"] in [line.split() for line in shown.splitlines()]


def test_verify(finished: Run, call: Call) -> None:
    best = finished.directory / "best"
    assert "parity passed" in narrow(call("verify", best, "--images", 32))
    assert call("verify", best, "--images", 32, "--quiet") == (0, "", "")
    assert json.loads(call("verify", best, "--images", 32, "--seed", 1, "--json").out)["images"] == 32


def test_verify_fails_where_the_file_computes_something_else(copied: Path, call: Call) -> None:
    import onnx

    from nasq.deploy import bundle

    model = onnx.load(copied / "best" / "model.onnx")
    bias = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT32)
    values = onnx.numpy_helper.to_array(bias) + 1000
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    bundle.add_file(copied / "best", "model.onnx", model.SerializeToString())
    done = call("verify", copied / "best", "--images", 32)
    assert done.code == 1 and "parity passed" not in done.out and "differ" in done.out


def test_search_explain(finished: Run, call: Call) -> None:
    out = call("search", finished.directory, "--explain").out
    assert "bytes <= 60 kB" in out and "all together" in out
    explained = json.loads(call("search", finished.directory, "--explain", "--json").out)
    assert [one["constraint"] for one in explained["constraints"]] == ["bytes <= 60 kB", "bytes >= 12 kB"]


def test_spaces(call: Call) -> None:
    assert "digits_mobile" in narrow(call("spaces"))
    row = next(row for row in json.loads(call("spaces", "--json").out) if row["name"] == "digits_mobile")
    assert row["data"] == "digits" and isinstance(row["size"], int)
    assert "stage1.depth" in narrow(call("spaces", "digits_mobile"))
    choices = json.loads(call("spaces", "digits_mobile", "--json").out)
    depth = {"choice": "stage1.depth", "count": 2, "options": "1 2", "default": "2", "only if": ""}
    assert depth in choices
    assert next(row for row in choices if row["choice"] == "stage1.1.expand")["only if"] == "'stage1.depth' is 2"


def test_spaces_says_where_a_space_is_from(call: Call) -> None:
    assert "source: blocks of MobileNetV2" in call("spaces", "digits_mobile").err


def test_proxies(call: Call) -> None:
    assert "flop_counter" in narrow(call("proxies"))
    assert {row["name"] for row in json.loads(call("proxies", "--json").out)} >= {"params", "flops"}


def test_targets(call: Call) -> None:
    assert "onnxruntime-cpu" in narrow(call("targets"))
    rows = {row["name"]: row for row in json.loads(call("targets", "--json").out)}
    assert {"generic", "onnxruntime-cpu", "openvino-cpu", "tensorrt"} <= set(rows)
    assert rows["generic"]["here"] == "yes" and rows["tensorrt"]["here"].startswith("no machine with TensorRT")


def test_targets_check(call: Call) -> None:
    done = call("targets", "check", "digits_mobile", "--subnets", "2")
    out = narrow(done)
    assert "stem.0" in out and "integer" in out and "DIFFER" not in out
    assert max(len(line) for line in done.err.splitlines()) <= 80
    assert "removed: " in done.err and "add:one:" in done.err.replace("\n", " ")


def test_doctor(call: Call) -> None:
    done = call("doctor", "--json")
    rows = {row["what"]: row for row in json.loads(done.out)}
    assert rows["torch"]["state"] == "ok" and rows["processor"]["detail"] and rows["cuda"]["state"] in {"ok", "absent"}
    assert done.code == (1 if any(row["state"] == "missing" for row in rows.values()) else 0)
    narrow(Done(0, call("doctor").out, ""))


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    real = doctor.importlib.metadata.version

    def version(name: str) -> str:
        if name in {"rich", "openvino"}:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_NEEDED", ("rich", "deap", "PyYAML"))
    monkeypatch.setitem(sys.modules, "deap", None)
    rows = {row["what"]: row for row in doctor.findings()}
    assert rows["rich"] == {"what": "rich", "state": "missing", "detail": "pip install rich"}
    assert rows["deap"]["state"] == "missing" and "does not import" in rows["deap"]["detail"]
    assert rows["openvino"] == {"what": "openvino", "state": "not installed", "detail": "pip install openvino"}
    assert rows["PyYAML"]["state"] == "ok"
    assert call("doctor", "--quiet") == (1, "", "")


def test_doctor_warns_of_processors_that_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.Path, "read_text", lambda self: "flags : sse avx2\n")
    assert "avx2" in doctor._flags() and "7 bits or fewer" in doctor._flags()
    monkeypatch.setattr(doctor.Path, "read_text", lambda self: "flags : avx2 avx512_vnni\n")
    assert doctor._flags() == "avx2, avx512_vnni"


def test_tables_keep_colons_and_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(False, False)
    output.table([{"name": "add:one: [bold]x[/bold]", "n": 12345, "share": 0.123456}], title="a [title]:one:")
    output.log("slow: add:one: [b]")
    out, err = capsys.readouterr()
    assert "a [title]:one:" in out and "add:one: [bold]x[/bold]" in out and "12,345" in out and "0.1235" in out
    assert err == "slow: add:one: [b]\n"


def test_an_empty_table_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    Output(False, True).table([{"a": 1}], title="t")
    Output(True, True).table([], value={"rows": 0})
    assert capsys.readouterr().out == '{\n "rows": 0\n}\n'
