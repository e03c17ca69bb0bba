"""A run whose supernet is a balanced mixture, and settings that do not go together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nasq.data import DataSet, Split
from nasq.errors import InputError
from nasq.run.assemble import Workshop
from nasq.run.config import load_config
from nasq.run.directory import RunDirectory
from nasq.run.flow import open_workshop, prepare, stage
from nasq.run.search import Evaluation
from nasq.run.train import require_plan
from nasq.training.splitting import Mixture

SETTINGS = [
    "data.validation=1200", "check_target=false", "threads=1", "warmup=null", "train.epochs=1", "train.warmup_epochs=0",
    "train.sampler=uniform", "train.distill=0", "train.from_scratch=true", "train.bf16=false", "train.channels_last=false",
    "quantization.calibration_images=32", "quantization.weight_bits=[8]", "quantization.activation_bits=[8]",
    "search.recalibration_images=32", "mixture.sets=2",
    "mixture.choices=[stem.width]", "mixture.temperature=50", "mixture.decay=0.5",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Workshop]:
    """A run whose mixture is trained, and its objects before that."""
    path = tmp_path_factory.mktemp("mixture") / "run"
    config = load_config(None, None, SETTINGS)
    workshop = prepare(config)
    with RunDirectory.create(path, config, resume=False) as run:
        stage(run, workshop, "train")
    return path, workshop


def test_a_mixture_is_trained_from_the_configuration_and_loaded_again(made: tuple[Path, Workshop]) -> None:
    run = RunDirectory.open(made[0])
    workshop = open_workshop(run)
    mixture = workshop.supernet
    assert isinstance(mixture, Mixture) and mixture.configurations.choices == ("stem.width",)
    first, second = (mixture.supernet(index).state_dict() for index in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    done = [event for event in run.events() if event["event"] == "train.epoch"]
    assert [event["epoch"] for event in done] == [1]
    assert set(done[0]["losses"]) <= {"set0", "set1"}
    # Every subnet is evaluated with the weights of its set.
    evaluation, few = Evaluation(workshop), Split(workshop.data.test.images[:32], workshop.data.test.labels[:32])
    for subnet in mixture.space.to_subnets(mixture.space.sample_batch(1, torch.Generator().manual_seed(0))):
        alone = replace(workshop, supernet=mixture.supernet(mixture.index(subnet)))
        assert torch.equal(evaluation.integers(subnet, few), Evaluation(alone).integers(subnet, few))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (["split.epochs=[1]"], r"split\.epochs makes a forest, and mixture\.sets a mixture. Leave one of them out"),
        (["train_inside_constraints=true"], r"train_inside_constraints trains pools .* mixture\.sets trains parts"),
        (["mixture.choices=null"], "a mixture keeps an accuracy of every configuration.*Name fewer choices"),
        (["mixture.choices=[stem.wide]"], "unknown choice of a mixture 'stem.wide'. Did you mean 'stem.width'"),
        (["mixture.sets=99"], r"mixture\.sets is 99, and stem.width have \d configurations"),
        (
            ["train.sampler=fair"],
            r"unknown train.sampler 'fair'.*Allowed: uniform. Only these go together with mixture",
        ),
        (
            ["train.variance_every=1"],
            r"variance_every measures draws of single subnets.*mixture\.sets draws them in another",
        ),
        (["train.paths=2"], r"train\.paths is 2; a mixture trains one subnet per step"),
        (["processes=3"], r"'train'.* 64 images cannot be shared equally by 3 processes. Set batch_size to a multiple"),
    ],
)
def test_settings_that_do_not_go_together(made: tuple[Path, Workshop], changes: list[str], match: str) -> None:
    config = load_config(None, None, [*SETTINGS, *changes])
    with pytest.raises(InputError, match=match):
        require_plan(replace(made[1], config=config))


def test_torchrun_is_told_how_a_run_starts_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"torchrun started this command 2 times.*--set processes=2"):
        prepare(load_config(None, None, SETTINGS))


def test_images_that_changed_under_a_run_are_refused_at_every_stage(made: tuple[Path, Workshop]) -> None:
    run, workshop = RunDirectory.open(made[0]), made[1]
    open_workshop(run)
    data = workshop.data
    other = DataSet.from_splits(data.name, data.classes, data.train, data.test, data.validation)
    with pytest.raises(InputError, match=rf"data set changed: .*{data.fingerprint}.*{other.fingerprint}.*Restore"):
        open_workshop(run, replace(workshop, data=other))


def test_the_number_of_processes_may_change_when_a_run_goes_on(made: tuple[Path, Workshop]) -> None:
    config = load_config(None, None, [*SETTINGS, "processes=2"])
    with RunDirectory.create(made[0], config, resume=True) as run:
        assert run.config().processes == 2
    with pytest.raises(InputError, match=r"another configuration \(seed: 0 there, 1 here\)"):
        RunDirectory.create(made[0], load_config(None, None, [*SETTINGS, "seed=1"]), resume=True)
