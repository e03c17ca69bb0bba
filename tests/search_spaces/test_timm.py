from __future__ import annotations

from pathlib import Path

import pytest
import timm as library
import torch
from safetensors.torch import save_file
from torch import nn

from nasq import Supernet, plugins
from nasq.errors import ArtifactError, InputError
from nasq.quant import quantize
from nasq.testing import check_space

SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3}


def built(name: str, **arguments: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = plugins.load("search_spaces", name)(**arguments)
    assert isinstance(found, nn.Module)
    return found


def test_the_model_stands_behind_the_colon() -> None:
    network = built("timm:resnet10t", num_classes=7, in_channels=1).eval()
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    info = plugins.space_info(plugins.load("search_spaces", "timm:resnet10t"))
    assert info.data == "cifar10" and info.argument == "MODEL"


def test_every_conv_and_linear_layer_has_bits() -> None:
    network = built("timm:mobilenetv2_035")
    found = quantize(network, torch.zeros(1, 3, 32, 32), weight_bits=(4, 8), first_last_bits=None)
    layers = {path for path, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    names = {choice.name for choice in Supernet(found).space.choices}
    assert len(layers) == 53 and {f"{path}.weight_bits" for path in layers} <= names


def test_the_image_size_reaches_models_that_have_one() -> None:
    network = built("timm:vit_tiny_patch16_224", image_size=32, **SMALL).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    built("timm:resnet10t", image_size=32)


def test_converted_as_well() -> None:
    network = built("timm:resnet10t", image_size=32, width=(0.5,), kernel=True)
    names = {choice.name for choice in Supernet(network).space.choices}
    assert {"layer1.0.conv1.width", "layer1.0.conv1.kernel"} <= names


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_checkpoint(suffix: str, tmp_path: Path) -> None:
    model = library.create_model("resnet10t", num_classes=3)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": model.state_dict()}, path)
    else:
        save_file(model.state_dict(), path)
    network = built("timm:resnet10t", num_classes=3, checkpoint=str(path))
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())
    other = built("timm:resnet10t", num_classes=5, checkpoint=str(path), checkpoint_classes=3)
    assert torch.equal(other.state_dict()["layer1.0.conv1.weight"], wanted["layer1.0.conv1.weight"])
    assert other.state_dict()["fc.weight"].shape[0] == 5
    with pytest.raises(ArtifactError, match=r"'fc.bias' has the shape \(3,\) .* \(5,\) .* checkpoint_classes"):
        built("timm:resnet10t", num_classes=5, checkpoint=str(path))


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ArtifactError, match=r"broken\.pth cannot be read"):
        built("timm:resnet10t", checkpoint=str(tmp_path / "broken.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ArtifactError, match="holds no tensors by name"):
        built("timm:resnet10t", checkpoint=str(tmp_path / "list.pth"))


def test_errors() -> None:
    with pytest.raises(InputError, match=r"timm has no model 'resnt18'\. Did you mean 'resnet18'"):
        built("timm:resnt18")
    with pytest.raises(InputError, match=r"timm cannot build 'resnet10t' with .*'colour': 'red'"):
        built("timm:resnet10t", colour="red")
    with pytest.raises(InputError, match=r"'timm:' lacks .* Write timm:MODEL"):
        plugins.load("search_spaces", "timm:")
    with pytest.raises(InputError, match=r"'digits_mobile' takes nothing behind a colon"):
        plugins.load("search_spaces", "digits_mobile:x")


def test_pretrained_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, pretrained: bool, **__: object) -> None:
        assert pretrained
        raise OSError("no network here")

    monkeypatch.setattr(library, "create_model", refuse)
    with pytest.raises(InputError, match=r"'resnet10t' cannot be had: no network here\..*checkpoint=PATH"):
        built("timm:resnet10t", pretrained=True)


@pytest.mark.slow
def test_a_transformer_of_timms_conforms() -> None:
    report = check_space(
        plugins.load("search_spaces", "timm:vit_tiny_patch16_224"),
        arguments={"image_size": 32, **SMALL},
        input_shape=(3, 32, 32),
        subnets=3,
        exported=1,
    )
    assert len(report.checks) == 14 and not report.left_out
