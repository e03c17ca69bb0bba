from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import TinyNet, images, quantized, quantized_supernet, tiny_images
from torch import nn

from nasq import Supernet
from nasq.data import AugmentPolicy
from nasq.errors import TrainingError
from nasq.quant import calibrate, quantize
from nasq.training import TrainConfig, Trainer, checkpoint
from nasq.training.health import first_not_finite, warn_of_random_weights

CONFIG = TrainConfig(epochs=2, batch_size=16, lr=0.01, sampler="guided", warmup_epochs=0, bf16=False)


def random_network(bits: tuple[int, ...]) -> nn.Module:
    network = quantize(TinyNet(), images(1), weight_bits=bits, activation_bits=bits)
    calibrate(network, images(8))
    return network


def test_random_weights_and_few_bits_warn_once_and_name_the_flag() -> None:
    data, supernet = tiny_images(16), Supernet(random_network((2, 8)))
    with pytest.warns(UserWarning, match=r"random weights.*options of 2 bits.*mode='float'.*from_scratch=True") as seen:
        Trainer(supernet, data, CONFIG, augment=AugmentPolicy()).run()
    assert len([warning for warning in seen if "from_scratch" in str(warning.message)]) == 1


@pytest.mark.parametrize("case", ["trained", "many bits", "meant", "float"])
def test_no_warning_where_there_is_no_reason(case: str) -> None:
    network = quantized() if case == "trained" else random_network((4, 8) if case == "many bits" else (2, 8))
    config = replace(CONFIG, from_scratch=case == "meant", epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mode = "float" if case == "float" else None
        Trainer(Supernet(network), tiny_images(16), config, mode=mode, augment=AugmentPolicy()).run()
        warn_of_random_weights(nn.Sequential(nn.Linear(2, 2)))


def test_a_nan_step_size_stops_names_the_layer_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    supernet = quantized_supernet()
    trainer = Trainer(supernet, tiny_images(16), CONFIG, tmp_path, augment=AugmentPolicy())
    trainer.run(until=1)
    good = {name: value.clone() for name, value in supernet.state_dict().items()}
    name = next(
        name for name, _ in supernet.named_parameters() if "inverted" in name and name.endswith("symmetric_8.log_step")
    )
    with torch.no_grad():
        supernet.get_parameter(name).fill_(float("nan"))
    with pytest.raises(
        TrainingError, match=rf"the step size '{name}' is not finite.*checkpoint of the last epoch .* is kept"
    ):
        trainer.run()
    tensors, meta = checkpoint.load(tmp_path / "checkpoint")
    kept = checkpoint.unpack(tensors, meta["state"])["model"]
    assert meta["epoch"] == 1 and all(torch.equal(value, good[key]) for key, value in kept.items())


def test_what_is_not_finite_is_named_step_sizes_first() -> None:
    net = nn.ModuleDict({"conv": nn.Linear(2, 2), "form": nn.Module()})
    net["form"].register_parameter("log_step", nn.Parameter(torch.zeros(2)))
    assert first_not_finite(net) == ""
    net["conv"].weight.grad = torch.full((2, 2), float("inf"))
    assert first_not_finite(net) == " (the gradient of the parameter 'conv.weight' is not finite)"
    with torch.no_grad():
        net["conv"].bias.fill_(float("nan"))
    assert first_not_finite(net) == " (the parameter 'conv.bias' is not finite)"
    with torch.no_grad():
        net["form"].log_step[1] = float("-inf")
    assert first_not_finite(net) == " (the step size 'form.log_step' is not finite)"
