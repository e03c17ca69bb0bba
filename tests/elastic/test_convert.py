from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel, counted_macs
from nasq.errors import InputError
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize

Build = Callable[[], nn.Module]


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def drawn(build: Build) -> nn.Module:
    """A network whose BatchNorms all have statistics and scales of their own, so that a wrong channel shows."""
    rng = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build().eval()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(0, 0.1, generator=rng)
            norm.running_var.uniform_(0.5, 1.5, generator=rng)
            norm.weight.uniform_(0.5, 1.5, generator=rng)
    return model


def of_timm(name: str, **arguments: object) -> Build:
    return lambda: timm.create_model(name, num_classes=4, **arguments)  # type: ignore[no-any-return]


CNNS: dict[str, Build] = {
    "resnet": of_timm("resnet10t"),
    "regnet": of_timm("regnetx_002"),
    "regnet with squeeze-excite": of_timm("regnety_002"),
    "mobilenet_v2": of_timm("mobilenetv2_035"),
    "mobilenet_v3": of_timm("mobilenetv3_small_050"),
    "efficientnet": of_timm("efficientnet_lite0"),
    "densenet": of_timm("densenet121", block_config=(2, 2)),
    "repvgg": of_timm("repvgg_a0"),
    "dla": of_timm("dla46_c"),
    "ghostnet": of_timm("ghostnet_050"),
    "mnasnet": lambda: torchvision.models.mnasnet0_5(num_classes=4),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4),
}


SLOW = {"repvgg", "ghostnet", "regnet with squeeze-excite", "efficientnet", "mnasnet", "mobilenet_v3"}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CNNS]
)
def test_families(family: str) -> None:
    model, x = drawn(CNNS[family]), images(32)
    made = elastic.convert(model, x[:1], width=(0.5, 0.75), kernel=True, depth=True)
    supernet = Supernet(made).eval()
    costs = CostModel(supernet, x[:1])
    assert made.report.widths and made.report.kernels
    with torch.no_grad():
        assert torch.equal(supernet(x), model(x))
        for subnet in (supernet.space.smallest(), supernet.space.sample(torch.Generator().manual_seed(0))):
            plain = supernet.extract(subnet).eval()
            with supernet.activate(subnet):
                assert torch.equal(supernet(x), plain(x))
            found = costs.of(subnet)
            assert found["params"] == sum(parameter.numel() for parameter in plain.parameters())
            assert found["macs"] == counted_macs(plain, x[:1])


class Chain(nn.Module):
    """Two convolutions, one behind the other, and a head."""

    def __init__(self, **second: object) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 32, **{"kernel_size": 5, "padding": 2, **second})  # type: ignore[arg-type]
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_smaller_subnet_is_the_slice_of_the_weights() -> None:
    model, x = drawn(Chain), images(8)
    supernet = Supernet(elastic.convert(model, x[:1], width=(0.5,), kernel=(3,))).eval()
    assert supernet.space.names == ["first.width", "second.kernel", "second.width"] or set(supernet.space.names) == {
        "first.width", "second.kernel", "second.width",
    }  # fmt: skip
    with torch.no_grad(), supernet.activate({"first.width": 8, "second.width": 16, "second.kernel": 3}):
        found = supernet(x)
        weight, norm = model.second.weight[:16, :8, 1:4, 1:4], model.norm
        y = nn.functional.conv2d(x, model.first.weight[:8], model.first.bias[:8], padding=1)
        y = nn.functional.batch_norm(y, norm.running_mean[:8], norm.running_var[:8], norm.weight[:8], norm.bias[:8])
        y = nn.functional.conv2d(torch.relu(y), weight.contiguous(), model.second.bias[:16], padding=1)
        wanted = nn.functional.linear(torch.relu(y).mean((2, 3)), model.head.weight[:, :16], model.head.bias)
    assert torch.allclose(found, wanted, atol=1e-6)


class Joined(nn.Module):
    """Branches that are concatenated; the last layer has to take the channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], 1))  # type: ignore[no-any-return]


def test_concatenated_channels_keep_their_weights() -> None:
    model, x = drawn(Joined), images(4)
    supernet = Supernet(elastic.convert(model, x[:1], width=(0.5,), round_to=4)).eval()
    assert set(supernet.space.names) == {"a.width", "b.width"}
    with torch.no_grad(), supernet.activate({"a.width": 8, "b.width": 4}):
        weight = torch.cat([model.head.weight[:, :8], model.head.weight[:, 16:20]], 1)
        y = torch.cat([model.a(x)[:, :8], model.b(x)[:, :4]], 1)
        wanted = nn.functional.conv2d(y, weight, model.head.bias)
        assert torch.allclose(supernet(x), wanted, atol=1e-6)


def test_depth_leaves_out_the_last_blocks_first() -> None:
    model, x = drawn(of_timm("resnet18")), images(32)
    made = elastic.convert(model, x[:1], depth=True)
    supernet = Supernet(made).eval()
    assert {choice.name: choice.options for choice in supernet.space.choices} == {
        f"layer{stage}.depth": (1, 2) for stage in (1, 2, 3, 4)
    }
    with torch.no_grad():
        plain = supernet.extract(supernet.space.smallest()).eval()
        for stage in (1, 2, 3, 4):
            del getattr(model, f"layer{stage}")[1]
        assert torch.equal(plain(x), model(x))
    stays = {one.path: one.reason for one in made.report.skipped}
    assert stays["layer2.0"] == "it makes [128, 4, 4] from [64, 8, 8]" and "layer1.0" not in stays


def test_the_caller_keeps_its_network_and_its_random_numbers() -> None:
    model, x = drawn(Chain), images(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    made = elastic.convert(model.train(), x[:1], width=(0.5,))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert made.training and made.get_submodule("first").weight.data_ptr() != model.first.weight.data_ptr()


@pytest.mark.parametrize(
    ("second", "what", "reason"),
    [
        (
            {"kernel_size": (1, 5), "padding": (0, 2)},
            "width",
            r"'second' has no elastic form: its kernel_size \(1, 5\)",
        ),
        ({"kernel_size": (1, 5), "padding": (0, 2)}, "kernel", r"its kernel \(1, 5\) is not square"),
        ({"kernel_size": 5, "padding": 0}, "kernel", r"its padding \(0, 0\) is not half the kernel, \(2, 2\)"),
        ({"kernel_size": 2, "padding": 0}, "kernel", "its kernel 2 is even, so it has no centre"),
        ({"padding_mode": "circular"}, "width", "'circular', not 'zeros'"),
    ],
)
def test_what_cannot_be_elastic_is_named_with_the_reason(second: dict[str, object], what: str, reason: str) -> None:
    made = elastic.convert(drawn(lambda: Chain(**second)), images(8, 1), width=(0.5,), kernel=True)
    found = [str(one) for one in made.report.skipped if one.path == "second" and one.what == what]
    assert len(found) == 1
    with pytest.raises(InputError, match=reason):
        raise InputError(found[0])
    ends = [one.reason for one in made.report.skipped if one.path == "head"]
    assert ends == ["it is the network's output"]


def test_groups_stay_whole_and_widths_are_multiples() -> None:
    made = elastic.convert(drawn(of_timm("regnetx_002")), images(32, 1), width=(0.5, 0.75), round_to=1)
    grouped = [
        module
        for _, module in elastic.elastic_modules(made)
        if isinstance(module, elastic.Conv2d) and module.groups != 1
    ]
    assert len(grouped) > 5
    for module in grouped:
        assert isinstance(module.in_channels, Choice) and len(module.in_channels.options) > 1
        assert all(size % module.weight.shape[1] == 0 for size in module.in_channels.options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"width": (0.5, 1.5)}, r"the width 1\.5 is no fraction .* more than 0 up to 1"),
        ({"kernel": (3, 4)}, r"the kernel 4 is no odd whole number"),
        ({"width": (0.5,), "round_to": 0}, "round_to is 0"),
    ],
)
def test_arguments_outside_their_range(arguments: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match):
        elastic.convert(Chain(), images(8, 1), **arguments)  # type: ignore[arg-type]


def test_an_elastic_network_is_refused() -> None:
    made = elastic.convert(Chain(), images(8, 1), width=(0.5,))
    with pytest.raises(InputError, match=r"elastic already, at 'first' \(Conv2d\)"):
        elastic.convert(made, images(8, 1), width=(0.5,))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


def test_a_converted_network_is_quantized() -> None:
    x = images(8, 4)
    made = elastic.convert(drawn(Residual), x[:1], width=(0.5,), kernel=True, depth=True)
    assert made.report.depths == {"blocks.depth": ("blocks.0", "blocks.1", "blocks.2")}
    # All that the residual sums join is one width.
    assert made.report.widths["stem.width"] == ("stem", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2")
    network = quantize(made, x[:1], weight_bits=(4, 8), activation_bits=(4, 8))
    calibrate(network, x)
    supernet = Supernet(network).eval()
    subnet = supernet.space.sample(torch.Generator().manual_seed(3))
    plain = supernet.extract(subnet).eval()
    assert isinstance(plain, QuantizedNetwork)
    with supernet.activate(subnet):
        assert torch.equal(network.integers(x), plain.integers(x))
    assert freeze(plain).ops


TOKENS: dict[str, Build] = {
    "vit": of_timm("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=48, num_heads=3),
    "convnext": of_timm("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
}


@pytest.mark.parametrize("family", TOKENS)
def test_every_layer_of_a_network_of_tokens_has_a_width_or_a_reason(family: str) -> None:
    """Widths are not followed through attention and permutations: what they would touch is named."""
    model = drawn(TOKENS[family])
    made = elastic.convert(model, images(32), width=(0.5,), kernel=True)
    layers = {path for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    followed = {path for paths in made.report.widths.values() for path in paths}
    reasons = {one.path: one.reason for one in made.report.skipped if one.what == "width"}
    depthwise = {
        path for path, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1
    }
    assert layers - depthwise <= followed | set(reasons)
    inner = "blocks.0.attn.qkv" if family == "vit" else "stages.0.blocks.0.mlp.fc1"
    stem = "patch_embed.proj" if family == "vit" else "stem.0"
    assert reasons[inner] == "its features are those of tokens, not channels"
    assert "through which widths are not followed" in reasons[stem]
