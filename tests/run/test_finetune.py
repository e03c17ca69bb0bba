"""Fine-tuning one subnet: what is frozen, what is resumed, and that the file computes what was trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from nasq.deploy import bundle
from nasq.elastic.norm import batch_norms
from nasq.errors import InputError
from nasq.run.config import load_config
from nasq.run.directory import RunDirectory
from nasq.run.export import exported, file_accuracy, images_of
from nasq.run.finetune import FrozenNorms, chosen, finetune, finetuned, settings_of, tune
from nasq.run.flow import STAGES, _done, _wanted, open_workshop, prepare
from nasq.run.search import Evaluation, search_results
from tests.run.tiny import Call, Run, refused

SMALL = {"epochs": 2, "warmup_epochs": 0, "bf16": False, "channels_last": False, "threads": 1}


def test_a_subnet_is_tuned_and_shipped(copied: Path, call: Call) -> None:
    weights = (copied / "supernet" / "weights.safetensors").read_bytes()
    before = exported(RunDirectory.open(copied))
    other = before["subnets"][-1]["id"]
    with RunDirectory.open(copied) as run:
        workshop = open_workshop(run)
        row = finetune(run, workshop, name=other[:8], changes=SMALL)
        images, labels = images_of(workshop, workshop.data.validation)
    made = copied / row["bundle"]
    assert row["id"] == other and row["differing"] == 0
    assert row["validation_before"] == before["subnets"][-1]["validation_accuracy"]
    assert row["validation_after"] == file_accuracy(made, images, labels)
    assert finetuned(run) == {other: row}
    meta = bundle.read(made).meta
    assert (
        meta["finetune"] == {"epochs": 2, "lr": 0.005, "distill": 0.5}
        and "fine-tuned alone" in (made / "README.md").read_text()
    )
    assert (made / "model.safetensors").read_bytes() != (copied / "exports" / other / "model.safetensors").read_bytes()
    assert (copied / "supernet" / "weights.safetensors").read_bytes() == weights
    index = exported(run)
    if row["best"]:
        assert index["best"] == other and index["test_accuracy"] == row["test_accuracy"]
        assert (copied / "best" / "model.onnx").read_bytes() == (made / "model.onnx").read_bytes()
    else:
        assert index == before
    assert call("verify", made, "--images", 16).code == 0


class _Stopped(Exception):
    pass


def _stop_in(epoch: int) -> Callable[[str, int, int], None]:
    """Breaks a training off in an epoch, counted from 1."""
    begun: list[int] = []

    def on_step(phase: str, done: int, total: int) -> None:
        assert phase == "finetune"
        begun.extend([1] if done == 1 else [])
        if len(begun) == epoch and done == 2:
            raise _Stopped

    return on_step


def test_a_training_that_was_broken_off_goes_on_to_the_same_weights(copied: Path, tmp_path: Path) -> None:
    found = []
    with RunDirectory.open(copied) as run:
        workshop = open_workshop(run)
        evaluation, subnet, settings = Evaluation(workshop), chosen(run, None), settings_of(workshop, SMALL)
        with pytest.raises(_Stopped):
            tune(run, workshop, evaluation, subnet, tmp_path / "broken", settings, _stop_in(2))
        for place in ("broken", "whole"):
            network = tune(run, workshop, evaluation, subnet, tmp_path / place, settings)
            found.append({name: value.clone() for name, value in network.state_dict().items()})
    begun = [event["epoch"] for event in run.events() if event["event"] == "train.start"]
    assert begun[-3:] == [0, 1, 0]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_statistics_stay_and_everything_else_is_trained(finished: Run) -> None:
    run = RunDirectory.open(finished.directory)
    workshop = open_workshop(run)
    subnet = chosen(run, None)
    network = workshop.supernet.extract(subnet, Evaluation(workshop).statistics(subnet))
    student = FrozenNorms(network)
    student.train()
    assert student.training and all(not norm.training for _, norm in batch_norms(student))
    held = {name: value.clone() for name, value in student.named_buffers()}
    images = workshop.data.normalise(workshop.data.train.images[:16])
    student(images).square().sum().backward()
    assert all(torch.equal(value, held[name]) for name, value in student.named_buffers())
    assert {name for name, value in student.named_parameters() if value.grad is None} == set()


def test_names_of_subnets(finished: Run) -> None:
    run = RunDirectory.open(finished.directory)
    best = exported(run)["best"]
    assert chosen(run, None).id == chosen(run, best).id == chosen(run, best[:10]).id == best
    with pytest.raises(InputError, match=r"unknown subnet 'nothing'.*'nasq show .*' lists the best ones"):
        chosen(run, "nothing")


def test_the_beginning_of_several_ids(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    goals, (record, *_) = search_results(RunDirectory.open(finished.directory))
    shared = (goals, [replace(record, subnet=_Named(name)) for name in ("abc1", "abc2")])  # type: ignore[arg-type]
    monkeypatch.setattr("nasq.run.finetune.search_results", lambda run: shared)
    with pytest.raises(InputError, match="2 evaluated subnets have an id that begins with 'abc'; give more of it"):
        chosen(RunDirectory.open(finished.directory), "abc")


class _Named(NamedTuple):
    id: str


def test_settings(finished: Run, call: Call, copied: Path) -> None:
    workshop = prepare(RunDirectory.open(finished.directory).config())
    assert (settings_of(workshop).epochs, settings_of(workshop).lr) == (3, 0.005)
    asked = replace(workshop, config=load_config(finished.config, None, ["finetune={epochs: 1, warmup_epochs: 0}"]))
    assert (settings_of(asked).epochs, settings_of(asked).distill) == (1, 0.5)
    run = RunDirectory.open(finished.directory)
    assert STAGES.index("export") + 1 == STAGES.index("finetune") == STAGES.index("bench") - 1
    assert _wanted(run, asked, "finetune") and not _wanted(run, workshop, "finetune") and not _done(run, "finetune")
    refused(call("finetune", copied, "--subnet", "nothing"), "unknown subnet 'nothing'")
    refused(call("finetune", copied, "--lr", "-1"), "training lr is -1.0")
    shutil.rmtree(copied / "supernet")
    refused(call("finetune", copied), "holds no trained supernet", "nasq train")
    refused(call("run", finished.config, "--set", "finetune.epoch=2"), "in the config key 'finetune'", "epochs")
