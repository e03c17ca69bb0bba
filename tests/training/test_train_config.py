from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest

from nasq.errors import InputError
from nasq.training import TrainConfig


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("epochs", 0, "an integer, 1 or more"),
        ("epochs", True, "an integer, 1 or more"),
        ("epochs", 2.0, "an integer, 1 or more"),
        ("batch_size", -1, "an integer, 1 or more"),
        ("optimizer", "lion", "'sgd', 'adam', 'adamw'"),
        ("lr", 0, "a number above 0"),
        ("lr", math.nan, "a number above 0"),
        ("lr", "0.1", "a number above 0"),
        ("momentum", 1.0, "from 0 to below 1"),
        ("weight_decay", -1e-4, "0 or more"),
        ("weight_decay", math.inf, "0 or more"),
        ("scheduler", "step", "'cosine', 'constant'"),
        ("warmup_epochs", -1, "0 or more"),
        ("warmup_epochs", 21, "0 to the number of epochs, 20"),
        ("clip_norm", 0, "a number above 0, or nothing"),
        ("label_smoothing", 1.0, "from 0 to below 1"),
        ("sampler", "faire", "'uniform', 'sandwich'"),
        ("paths", 0, "1 or more"),
        ("distill", 1.5, "from 0 to 1"),
        ("temperature", 0, "above 0"),
        ("bf16", "yes", "'auto', True, False"),
        ("bf16", 1, "'auto', True, False"),
        ("channels_last", None, "'auto', True, False"),
        ("seed", -1, "0 to 9223372036854775807"),
        ("threads", 0, "1 or more, or nothing"),
        ("checkpoint_every", 0, "1 or more"),
    ],
)
def test_a_bad_value_names_field_value_and_allowed(field: str, value: object, allowed: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig(**{field: value})
    text = str(caught.value)
    assert f"training {field} is {value!r}" in text
    assert allowed in text


def test_every_field_is_checked() -> None:
    for field in TrainConfig().to_dict():
        with pytest.raises(InputError, match=f"training {field} is"):
            TrainConfig(**{field: object()})


def test_uniform_has_no_teacher() -> None:
    with pytest.raises(InputError, match=r"distill is 0\.5; allowed: 0 with sampler 'uniform'"):
        TrainConfig(sampler="uniform")
    assert TrainConfig(sampler="uniform", distill=0.0).distill == 0


def test_round_trip_through_json() -> None:
    config = TrainConfig(epochs=3, lr=0.1 + 0.2, clip_norm=None, bf16=False, threads=2)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown training setting 'epoch'. Did you mean 'epochs'\?"):
        TrainConfig.from_dict({"epoch": 3})


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainConfig().epochs = 3  # type: ignore[misc]
