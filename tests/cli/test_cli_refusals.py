"""Bad input: one clear message, exit code 2, and nothing on disk that was not there before."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nasq.deploy import bundle
from nasq.run.directory import RunDirectory
from tests.run.tiny import CONFIG, Call, Run, files, refused

SETTINGS = {
    "search.evalutions=3": ["unknown config key 'search.evalutions'", "Did you mean 'search.evaluations'?"],
    "serch.evaluations=3": ["unknown config key 'serch'", "Did you mean 'search'?"],
    "train.epcohs=3": ["config key 'train'", "unknown training setting 'epcohs'", "Did you mean 'epochs'?"],
    "warmup.lr=fast": ["config key 'warmup'", "lr is 'fast'", "a number above 0"],
    "train.lr=-1e-3": ["lr is -0.001"],
    "warmup=5": ["'warmup' is 5", "keys with values"],
    "search.evaluations=many": ["'search.evaluations' is 'many'", "valid integer"],
    "search.evaluations=0": ["'search.evaluations' is 0", "greater than or equal to 1"],
    "search.algorithm=nsga4": ["'search.algorithm' is 'nsga4'", "give one of", "nsga2, nsga3"],
    "search.constraints=bytes<=1k": ["'search.constraints' is 'bytes<=1k'", "give a list"],
    "search.objectives=[]": ["search.objectives is empty", "accuracy"],
    "search.objectives=[accurcy]": ["unknown objective 'accurcy'", "Did you mean 'accuracy'?", "latency"],
    "search.objectives=[-bytes]": [
        "unknown objective '-bytes'",
        "Did you mean 'bytes'?",
        "everything else is minimized",
    ],
    "search.objectives=[bytes,bytes]": ["holds 'bytes' twice"],
    "search.settings={keepfront: true}": ["do not suit 'nsga2'", "unknown setting 'keepfront'", "'keep_front'"],
    "search.constraints=[bytes<=-5]": ["'bytes <= -5 B' leaves nothing", "never negative"],
    "search.constraints=[byts<=1k]": ["unknown quantity 'byts'", "Did you mean 'bytes'?"],
    "search.constraints=[bytes<1k]": ["cannot read the bound 'bytes<1k'", "bytes<=20k"],
    "space=digits_mobil": ["unknown search space 'digits_mobil'", "Did you mean 'digits_mobile'", "nasq spaces"],
    "space_arguments={depth: 3}": ["refuses its arguments", "depth"],
    "space_arguments={num_classes: 3}": ["[1, 3]", "[1, 10] is needed"],
    "data.name=digit": [
        "unknown data set 'digit'",
        "cifar10, cifar100, digits, docstrings, fashion_mnist, image_folder",
    ],
    "data.validation=1.5": ["validation is 1.5", "a share between 0 and 1"],
    "data.validation=x": ["'data.validation' is 'x'", "integer", "number"],
    "target=onnxruntime-gpu": ["unknown target", "Did you mean 'onnxruntime-cpu'", "generic, "],
    "device=gpu7": ["device 'gpu7'", "cpu"],
    "quantization.weight_bits=[9]": ["weight_bits", "9-bit", "2, 3, 4, 5, 6, 7, 8"],
    "quantization.first_last_bits=77": ["'quantization.first_last_bits' is 77"],
    "bench.batch_sizes=[0]": ["'bench.batch_sizes.0' is 0"],
    "seed=-1": ["'seed' is -1"],
    "search.evaluations": ["not key=value", "--set search.evaluations=50"],
    "search=[": ["is not YAML in line 1"],
    "threads.all=1": ["'threads' holds a value"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_refused_before_anything_is_written(
    setting: str, finished: Run, tmp_path: Path, call: Call
) -> None:
    run = tmp_path / "run"
    refused(call("run", finished.config, "--out", run, "--quiet", "--set", setting), *SETTINGS[setting])
    assert not run.exists()


@pytest.mark.timeout(60)
def test_an_impossible_constraint_says_what_survives(finished: Run, tmp_path: Path, call: Call) -> None:
    done = call("run", finished.config, "--out", tmp_path / "run", "--set", "search.constraints=[bytes<=1k,macs<=1G]")
    refused(done, "no feasible subnet", "bytes <= 1 kB: 0 % survive", "macs <= 1G: 100 % survive", "closest subnets")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["cannot be read", "No such file"]),
        ("a: [1\nb: 2\n", ["is not YAML in line 2"]),
        ("- a\n- b\n", ["not keys with values"]),
        ("", ["is empty"]),
        ("seed: 1\nsearch: {evaluations: 3}\nsearch: {population: 3}\n", ["line 3", "'search' is there twice"]),
        ("seed: !!python/object/apply:os.system [ls]\n", ["is not YAML"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
    ],
)
def test_a_config_file_that_is_none(text: str | bytes | None, words: list[str], tmp_path: Path, call: Call) -> None:
    config = tmp_path / "mine.yaml"
    if text is not None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(call("run", config, "--out", tmp_path / "run"), str(config), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--preset", "digit"], ["unknown preset 'digit'", "Did you mean 'digits'?"]),
        (["rn"], ["No such command 'rn'"]),
        (["run", "--evaluations", "3"], ["No such option", "--evaluations"]),
        (["spaces", "digits"], ["unknown search space 'digits'", "digits_mobile"]),
        (["targets", "check", "digits_mobile", "--target", "tpu"], ["unknown target 'tpu'"]),
        (["targets", "check", "digits_mobil"], ["unknown search space"]),
        (
            ["targets", "check", "digits_mobile", "--target", "tensorrt"],
            ["cannot be checked here", "no machine with TensorRT"],
        ),
        (["show", "nowhere"], ["there is no directory 'nowhere'"]),
        (["verify", "nowhere"], ["there is no directory 'nowhere'"]),
        (["train", "nowhere"], ["nowhere holds no run", "nasq run --out nowhere"]),
        (["report", "nowhere"], ["nowhere holds no run"]),
        (["pick", "nowhere"], ["nowhere holds no run"]),
    ],
)
def test_names_that_do_not_exist(arguments: list[str], words: list[str], call: Call) -> None:
    refused(call(*arguments), *words)


def test_data_that_is_not_there(finished: Run, tmp_path: Path, call: Call) -> None:
    common = ["run", finished.config, "--out", tmp_path / "run"]
    refused(call(*common, "--set", "data.name=cifar10"), "--data-root", "--download")
    root = tmp_path / "it's: a #place"
    words = ["not below", "cifar-10-batches-py is missing", str(root)]
    refused(call(*common, "--set", "data.name=cifar10", "--data-root", root), *words)
    refused(call(*common, "--set", "data.name=image_folder", "--data-root", tmp_path), "image_size is needed")
    done = call(*common, "--set", "data.name=image_folder", "--data-root", tmp_path, "--image-size", "8")
    refused(done, str(tmp_path))
    assert "image_size is needed" not in done.err and not (tmp_path / "run").exists()


def test_pick_within_limits_that_nothing_keeps(finished: Run, call: Call) -> None:
    refused(call("pick", finished.directory, "--max-bytes", "1k"), "none of the 8 evaluated subnets", "bytes <= 1k")
    refused(call("pick", finished.directory, "--max-bytes", "few"), "cannot read the number 'few'")
    refused(call("pick", finished.directory, "--limit", "latencies<=1"), "unknown quantity 'latencies'")


# -- directories ------------------------------------------------------------------------------------------------------


def test_asymmetric_weights_are_refused_before_training(finished: Run, tmp_path: Path, call: Call) -> None:
    arguments = ["--set", "target=generic", "--set", "quantization.weight_symmetry=[symmetric, asymmetric]"]
    done = call("run", finished.config, "--out", tmp_path / "run", *arguments)
    refused(done, "asymmetric weights", "ONNX", "quantization.weight_symmetry")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_needs_resume(finished: Run, call: Call) -> None:
    before = files(finished.directory)
    refused(call("run", finished.config, "--out", finished.directory), "already holds a run", "--resume", "--out")
    assert files(finished.directory) == before


def test_resume_with_another_configuration_names_the_difference(finished: Run, call: Call) -> None:
    before = files(finished.directory)
    common = ["run", finished.config, "--out", finished.directory, "--resume", "--set"]
    refused(call(*common, "search.evaluations=9"), "another configuration", "search.evaluations: 8 there, 9 here")
    refused(call(*common, "train.lr=0.5"), "train.lr: None there, 0.5 here")
    refused(call("run", "--preset", "digits", "--out", finished.directory, "--resume"), "another configuration")
    assert files(finished.directory) == before


def test_a_directory_of_somebody_else_is_left_alone(finished: Run, tmp_path: Path, call: Call) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    refused(call("run", finished.config, "--out", tmp_path), "not empty and holds no run")
    refused(call("run", finished.config, "--out", tmp_path / "letter.txt"), "is a file")
    assert files(tmp_path) == {"letter.txt": b"dear"}


def test_two_processes_in_one_run(finished: Run, copied: Path, call: Call) -> None:
    before = files(copied)
    with RunDirectory.open(copied):  # a lock of another open file, as of another process
        refused(call("train", copied, "--quiet"), "another process is working in")
        refused(call("run", finished.config, "--out", copied, "--resume", "--quiet"), "another process is working in")
    assert {name: content for name, content in files(copied).items() if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }
    assert call("train", copied, "--quiet").code == 0


def test_stages_say_which_stage_is_missing(finished: Run, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((finished.directory / "config.yaml").read_text())
    for stage in ("search", "export", "bench"):
        refused(call(stage, run, "--quiet"), "no trained supernet", f"nasq train {run}")
    refused(call("pick", run), "holds no search", f"nasq search {run}")
    assert call("report", run, "--quiet").code == 0 and (run / "report.html").exists()
    assert json.loads(call("show", run, "--json").out)["evaluated"] == 0


def test_stages_behind_the_search_say_so(copied: Path, call: Call) -> None:
    (copied / "exports" / "index.json").unlink()
    refused(call("bench", copied, "--quiet"), "no exported subnet", f"nasq export {copied}")
    (copied / "search" / "state.json").unlink()
    refused(call("export", copied, "--quiet"), "holds no search", f"nasq search {copied}")


# -- damaged files ----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("phase", ["warmup", "quantized"])
def test_a_damaged_checkpoint(
    damage: Callable[[Path], None], phase: str, finished: Run, copied: Path, call: Call
) -> None:
    (copied / "supernet" / "supernet.json").unlink()
    if phase == "warmup":
        (copied / "supernet" / "calibrated" / "supernet.json").unlink()
    pointer = json.loads((copied / "supernet" / phase / "checkpoint.json").read_text())
    damage(copied / "supernet" / phase / f"checkpoint.{pointer['slot']}.safetensors")
    before = files(copied / "supernet")
    refused(call("train", copied, "--quiet"), f"checkpoint.{pointer['slot']}.safetensors", "checkpoint")
    assert files(copied / "supernet") == before
    assert call("run", finished.config, "--out", copied, "--resume", "--quiet").code == 2


def test_going_back_to_the_former_checkpoint_as_the_message_says(copied: Path, finished: Run, call: Call) -> None:
    (copied / "supernet" / "supernet.json").unlink()
    checkpoints = copied / "supernet" / "quantized"
    slot = json.loads((checkpoints / "checkpoint.json").read_text())["slot"]
    former = checkpoints / f"checkpoint.{1 - slot}.json"
    cut(checkpoints / f"checkpoint.{slot}.safetensors")
    refused(call("train", copied, "--quiet"), f"cp {former} {checkpoints / 'checkpoint.json'}")
    (checkpoints / "checkpoint.json").write_bytes(former.read_bytes())
    assert call("train", copied, "--quiet").code == 0
    weights = "supernet/weights.safetensors"
    assert (copied / weights).read_bytes() == (finished.directory / weights).read_bytes()


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damaged_weights_of_the_supernet(damage: Callable[[Path], None], copied: Path, call: Call) -> None:
    damage(copied / "supernet" / "weights.safetensors")
    refused(call("search", copied, "--quiet"), "weights.safetensors cannot be read", "corrupt or truncated")


def test_damaged_search_files(copied: Path, call: Call) -> None:
    study = copied / "search" / "study.json"
    whole = study.read_bytes()
    study.write_text("{}\n")
    refused(call("search", copied, "--quiet"), "study.json is damaged: it holds no 'id'", "Move ", "begins anew")
    study.write_bytes(whole)
    cut(copied / "search" / "state.json")
    refused(call("pick", copied), "state.json cannot be read as JSON")
    refused(call("search", copied, "--quiet"), "state.json cannot be read as JSON")


@pytest.mark.parametrize("name", ["subnet.json", "model.safetensors", "model.onnx", "parity.json", "README.md"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_bundle(damage: Callable[[Path], None], name: str, copied: Path, call: Call) -> None:
    best = copied / "best"
    damage(best / name)
    before = files(best)
    for command in ("verify", "show"):
        refused(call(command, best), name)
    assert files(best) == before


def test_damaged_checksums(copied: Path, call: Call) -> None:
    cut(copied / "best" / "checksums.json")
    refused(call("verify", copied / "best"), "checksums.json cannot be read as JSON")


def reseal(best: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Changes ``subnet.json`` and lists its new checksum, as whoever wants to mislead would."""
    import hashlib

    document = json.loads((best / "subnet.json").read_text())
    change(document)
    (best / "subnet.json").write_text(json.dumps(document))
    checksums = json.loads((best / "checksums.json").read_text())
    checksums["files"]["subnet.json"] = hashlib.sha256((best / "subnet.json").read_bytes()).hexdigest()
    (best / "checksums.json").write_text(json.dumps(checksums))


def test_a_bundle_of_a_newer_schema(copied: Path, call: Call) -> None:
    reseal(copied / "best", lambda document: document.update(schema=bundle.SCHEMA + 1))
    for command in ("verify", "show"):
        refused(call(command, copied / "best"), f"schema {bundle.SCHEMA + 1}", f"reads up to {bundle.SCHEMA}")


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "C:\\secret", "sub/../../x"])
def test_a_path_that_leads_out_of_the_bundle(name: str, copied: Path, call: Call) -> None:
    reseal(copied / "best", lambda document: document["weights"].update(file=name))  # type: ignore[attr-defined]
    for command in ("verify", "show"):
        refused(call(command, copied / "best"), "file name", "refused")


def test_a_header_that_promises_more_than_there_is(copied: Path, call: Call) -> None:
    import hashlib

    best = copied / "best"
    path = best / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    checksums = json.loads((best / "checksums.json").read_text())
    checksums["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (best / "checksums.json").write_text(json.dumps(checksums))
    refused(call("verify", best), "header", "truncated or corrupt")


def test_the_configuration_is_as_it_was_given(finished: Run) -> None:
    import yaml

    given, kept = yaml.safe_load(CONFIG), yaml.safe_load((finished.directory / "config.yaml").read_text())
    assert kept["search"].items() >= given["search"].items() and kept["train"] == given["train"]
