from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.run.config import RunConfig, load_config, presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_goes_through_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(preset=name)
    (tmp_path / "copy.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "copy.yaml") == config


def test_the_demo_preset_is_there_and_constrained() -> None:
    assert "digits" in presets()
    config = load_config(preset="digits")
    assert config.space == "digits_mobile" and config.search.constraints and config.warmup is not None


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "space": st.sampled_from(["digits_mobile", "mine"]),
        "space_arguments": st.dictionaries(st.sampled_from(["depth", "width"]), st.integers(0, 9)),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "validation": st.one_of(st.none(), st.integers(1, 1000), st.floats(0.01, 0.99)),
                "image_size": st.one_of(st.none(), st.integers(1, 64), st.just([8, 16])),
                "root": st.sampled_from(["data", "/data", "it's: a #place"]),
            },
        ),
        "warmup": st.one_of(
            st.none(), st.fixed_dictionaries({}, optional={"lr": st.floats(1e-9, 1), "epochs": st.integers(1, 9)})
        ),
        "search": st.fixed_dictionaries(
            {}, optional={"constraints": st.just(["bytes<=1e3", "macs>=5k"]), "evaluations": st.integers(1, 99)}
        ),
        "seed": st.integers(0, 2**63 - 1),
        "threads": st.one_of(st.none(), st.integers(1, 8)),
    },
)


@given(CONFIGS)
def test_yaml_gives_back_the_same_configuration(values: dict[str, Any]) -> None:
    if (values.get("warmup") or {}).get("lr") and "epochs" not in (values["warmup"] or {}):
        values["warmup"] = {**values["warmup"], "epochs": 2}
    config = RunConfig.model_validate(values)
    assert RunConfig.model_validate(yaml.safe_load(config.to_yaml())) == config


def test_a_file_goes_on_top_of_a_preset_and_set_on_top_of_both(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("search: {evaluations: 7}\nseed: 3\n")
    config = load_config(tmp_path / "mine.yaml", "digits", ["seed=4", "train.lr=1e-3", "search.objectives=[bytes]"])
    assert (
        config.search.evaluations == 7 and config.search.constraints == load_config(preset="digits").search.constraints
    )
    assert (config.seed, config.train["lr"], config.search.objectives) == (4, 0.001, ("bytes",))
    assert config.train["epochs"] == load_config(preset="digits").train["epochs"]


def test_numbers_are_those_of_yaml_1_2() -> None:
    values = {"train.lr": "1e-3", "warmup.lr": "2.5E-1", "warmup.weight_decay": "5e-4"}
    config = load_config(changes=[f"{key}={text}" for key, text in values.items()])
    assert config.train == {"lr": 0.001} and config.warmup == {"lr": 0.25, "weight_decay": 0.0005}
    assert load_config(changes=["space='1e5'"]).space == "1e5"


def test_whole_numbers_and_shares_of_validation_images_are_told_apart() -> None:
    assert load_config(changes=["data.validation=100"]).data.validation == 100
    assert isinstance(load_config(changes=["data.validation=100"]).data.validation, int)
    assert load_config(changes=["data.validation=0.1"]).data.validation == 0.1


def test_switching_the_warm_up_off() -> None:
    assert load_config(changes=["warmup=null"]).warmup is None
    with pytest.raises(InputError, match="'warmup' holds a value"):
        load_config(changes=["warmup=null", "warmup.epochs=3"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("train.epochs=0", "config key 'train': training epochs is 0; allowed: an integer, 1 or more"),
        ("warmup.warmup_epochs=99", "config key 'warmup': training warmup_epochs is 99"),
        ("train.sampler=uniform", "distill is 0.5; allowed: 0 with sampler 'uniform'"),
        ("train={1: 2}", "the config key 'train.1' is 2"),
        ("data.image_size=[1, 2, 3]", "'data.image_size' is .*image_size|'data.image_size' is"),
        ("quantization.weight_granularity=[row]", "'quantization.weight_granularity.0' is 'row'"),
        ("seed=9223372036854775808", "less than 9223372036854775808"),
        ("data=[1]", "'data' is .* give keys with values"),
    ],
)
def test_refusals(change: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_config(changes=[change])
