"""From a network to its quantized form: where quantizers stand, what is pinned, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import generator, images, quantized, randomise, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Supernet, elastic
from nasq.errors import InputError, TargetError
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.quant.combining import AddProducer, AvgPoolProducer, ConcatProducer
from nasq.quant.passing import Clip
from nasq.quant.producers import LayerProducer, Producer
from nasq.quant.program import Conv
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from nasq.targets import load


class Net(nn.Module):
    """Modules by name and a forward of one's own."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.written = [forward]

    def forward(self, x: Tensor) -> Tensor:
        return self.written[0](self, x)


def conv(inputs: int = 3, outputs: int = 4, kernel: int = 1) -> nn.Conv2d:
    with torch.random.fork_rng():
        torch.manual_seed(inputs + 10 * outputs + kernel)
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def names_of(network: QuantizedNetwork) -> set[str]:
    return set(Supernet(network).space.names)


def made(network: QuantizedNetwork, x: Tensor | None = None) -> QuantizedNetwork:
    calibrate(network, images(16) if x is None else x)
    return network.eval()


EIGHT: dict[str, Any] = {"weight_bits": (8,), "activation_bits": (8,)}


def error_at_eight_bits(network: nn.Module, x: Tensor) -> float:
    """Relative error of the integers of an 8-bit network against its own float form."""
    with torch.no_grad():
        real, found = network(x, mode="float"), network(x, mode="integer")
    return float((real - found).norm() / real.norm())


# What it is made of


def test_every_mode_and_the_original() -> None:
    net = tiny()
    network = quantize(net, images(1))
    calibrate(network, images(16))
    assert isinstance(network, QuantizedNetwork) and network.example_shape == (3, 8, 8)
    x = images(4, 3)
    with torch.no_grad():
        network.eval()
        torch.testing.assert_close(network(x, mode="float"), net(x))
        assert torch.equal(network(x), network(x, mode="integer"))
        value = network.run(x)
        assert torch.equal(value.real(), network(x)) and torch.equal(network.integers(x).float(), value.data)
        assert network.integers(x).dtype == torch.uint8
        largest = error_at_eight_bits(network, x)
        assert largest < 0.15
    network.train()
    assert network(x).requires_grad and not network.run(x, "integer").data.requires_grad


def test_the_network_given_is_left_as_it_is() -> None:
    net = tiny().train()
    net.mix.eval()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    example = images(1)
    before = example.clone()
    network = quantize(net, example)
    made(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes and torch.equal(example, before)


def test_names_of_weights_survive() -> None:
    net = tiny()
    network = quantize(net, images(1))
    ours, theirs = network.state_dict(), net.state_dict()
    direct = {name for name in theirs if not name.startswith(("rest.", "mix."))}
    assert direct <= set(ours) and all(torch.equal(ours[name], theirs[name]) for name in direct)
    # Inside containers as well: branch and block keep their own names.
    assert {name for name in theirs if name.startswith("rest.")} <= set(ours)
    assert {"mix.branches.conv.0.weight", "mix.branches.conv.1.running_mean"} <= set(ours)


def test_names_of_single_layers_in_containers_survive_too() -> None:
    mix = elastic.OneOf(Choice("mix", ("a", "b", "c")), a=conv(4), b=nn.Sequential(conv(4)), c=nn.Identity())
    net = nn.Sequential(conv(), elastic.Repeat([conv(4), mix], Choice("depth", (1, 2))), conv(4))
    for module in (net, net[1], net[0]):
        network = quantize(module, images(1, shape=(3 if module is not net[1] else 4, 8, 8)))
        ours, theirs = network.state_dict(), module.state_dict()
        assert {name for name in ours if "quantization." not in name} == set(theirs)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        changed = {name: tensor + 1 for name, tensor in ours.items()}
        network.load_state_dict(changed)
        copied = copy.deepcopy(network)
        assert all(torch.equal(tensor, changed[name]) for name, tensor in copied.state_dict().items())
        with pytest.raises(RuntimeError, match=r"Unexpected key.*odd"):
            network.load_state_dict({**changed, "odd.weight": torch.zeros(1)})
    calibrate(network, images(4))
    plain = Supernet(network).extract(Supernet(network).space.largest())
    assert {"weight", "bias"} <= set(plain.state_dict())


def test_where_quantizers_stand() -> None:
    """One per produced tensor, none inside conv -> BatchNorm -> activation; one weight quantizer per layer."""
    network = quantize(tiny(), images(1))
    producers = [module for module in network.modules() if isinstance(module, Producer)]
    kinds = {kind: sum(type(p) is kind for p in producers) for kind in (LayerProducer, AddProducer, ConcatProducer)}
    # 12 convolutions, of which one is called twice, a linear layer, and a BatchNorm alone
    assert kinds == {LayerProducer: 12 + 1 + 1 + 1, AddProducer: 1, ConcatProducer: 1}
    assert sum(type(p) is AvgPoolProducer for p in producers) == 1
    weights = {id(p.weight_quantizer) for p in producers if isinstance(p, LayerProducer)}
    assert len(weights) == 12 + 1 + 1
    assert len({id(p.quantizer) for p in producers}) == len(producers)
    assert sum(isinstance(m, ActivationQuantizer) for m in network.modules()) == len(producers)


def test_a_layer_called_twice_has_one_weight_quantizer_and_two_for_its_outputs() -> None:
    network = quantize(tiny(), images(1))
    (one, two) = [p for p in network.modules() if isinstance(p, LayerProducer) and p.path == "twice"]
    assert one.layer is two.layer is network.twice and one.weight_quantizer is two.weight_quantizer
    assert one.quantizer is not two.quantizer and (one.activation, two.activation) == ("relu", "none")


def test_signs_follow_the_operation() -> None:
    network = quantize(tiny(), images(1))
    signed = {p.path + (" relu" if p.activation != "none" else ""): p.quantizer.signed
              for p in network.modules() if isinstance(p, Producer)}  # fmt: skip
    assert signed["input"] and signed["add"] and signed["cat"] and signed["head"] and signed["plain"]
    assert not signed["stem relu"] and not signed["inverted.expand relu"] and not signed["twice relu"]


def test_an_identity_does_not_split_a_fused_layer() -> None:
    """timm's networks hold Identity (drop path, drop block) between BatchNorm and activation."""
    network = quantize(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(), conv(4)), images(1))
    (first, _) = [p for p in network.modules() if isinstance(p, LayerProducer)]
    assert first.activation == "relu" and not first.quantizer.signed
    assert not any(isinstance(module, Clip) for module in network.modules())


def test_no_choices_of_its_own_gives_the_bits_alone() -> None:
    network = quantize(nn.Sequential(conv(), nn.ReLU(), conv(4), nn.ReLU(), conv(4)), images(1))
    assert names_of(network) == {"0.activation_bits", "2.weight_bits"}
    none = quantize(nn.Sequential(conv()), images(1), **EIGHT)
    assert Supernet(none).space.size == 1


def test_granularity_and_symmetry_are_choices_where_there_is_one_to_make() -> None:
    net = nn.Sequential(conv(), conv(4), nn.ReLU(), conv(4))
    network = quantize(
        net, images(1), "generic", weight_bits=(4,), activation_bits=(4,), weight_granularity=("tensor", "channel"),
        activation_symmetry=("symmetric", "asymmetric"),
    )  # fmt: skip
    assert names_of(network) == {
        "0.weight_granularity", "1.weight_granularity", "3.weight_granularity", "0.activation_symmetry",
        "3.activation_symmetry",
    }  # fmt: skip


def test_one_choice_ties_all_layers() -> None:
    bits = Choice("bits", (2, 4, 8))
    network = quantize(tiny(), images(1), weight_bits=bits, activation_bits=bits)
    assert {name for name in names_of(network) if "bits" in name} == {"bits"}


# First and last


@pytest.mark.parametrize("pinned", [8, 6])
def test_first_and_last_layer_are_pinned(pinned: int) -> None:
    net = nn.Sequential(conv(), nn.ReLU(), conv(4), nn.ReLU(), conv(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 3))  # fmt: skip
    network = quantize(net, images(1), first_last_bits=pinned)
    assert names_of(network) == {"0.activation_bits", "2.weight_bits", "2.activation_bits", "4.weight_bits",
                                 "4.activation_bits"}  # fmt: skip
    bits = {p.path: (p.weight_quantizer.form().bits, p.quantizer.form().bits) for p in network.modules()
            if isinstance(p, LayerProducer)}  # fmt: skip
    assert bits["0"][0] == bits["8"][0] == bits["8"][1] == pinned


def test_unpinned_all_layers_are_choices() -> None:
    network = quantize(nn.Sequential(conv(), nn.ReLU(), conv(4)), images(1), first_last_bits=None)
    assert names_of(network) == {"0.weight_bits", "0.activation_bits", "2.weight_bits", "2.activation_bits"}


def test_only_the_first_block_of_a_repeat_holds_the_first_layer() -> None:
    repeat = elastic.Repeat([conv(3, 3) for _ in range(3)], Choice("depth", (1, 2, 3)))
    network = quantize(nn.Sequential(repeat, conv(3), conv(4)), images(1))
    assert {"0.blocks.1.weight_bits", "0.blocks.2.weight_bits", "1.weight_bits"} <= names_of(network)
    assert "0.blocks.0.weight_bits" not in names_of(network)


def test_the_layer_behind_a_branch_that_may_be_skipped_is_first_too() -> None:
    skip = elastic.OneOf(Choice("mix", ("skip", "conv")), skip=nn.Identity(), conv=conv(3, 3))
    assert "1.weight_bits" not in names_of(quantize(nn.Sequential(skip, conv(3), conv(4), conv(4)), images(1)))


def test_the_last_layer_is_found_through_a_pool() -> None:
    """As in SqueezeNet: the last convolution's map is averaged to logits."""
    net = nn.Sequential(conv(), nn.ReLU(), conv(4), nn.ReLU(), conv(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    names = names_of(quantize(net, images(1)))
    assert "4.weight_bits" not in names and "2.weight_bits" in names


def test_the_last_layer_of_each_branch_is_pinned() -> None:
    head = elastic.OneOf(Choice("head", ("one", "two")), one=conv(4), two=nn.Sequential(conv(4), nn.ReLU(), conv(4)))
    names = names_of(quantize(nn.Sequential(conv(), nn.ReLU(), head), images(1)))
    assert "2.branches.one.weight_bits" not in names and "2.branches.two.2.weight_bits" not in names
    assert "2.branches.two.0.weight_bits" in names


def test_a_tensor_that_never_reaches_the_last_layer_is_not_pinned() -> None:
    """At least one block runs, so what stands before the blocks is nobody's output."""
    repeat = elastic.Repeat([conv(4), conv(4)], Choice("depth", (1, 2)))
    names = names_of(quantize(nn.Sequential(conv(), nn.ReLU(), repeat, nn.Flatten(), nn.Linear(256, 3)), images(1)))
    assert "0.activation_bits" in names and "2.blocks.0.activation_bits" not in names


# Signs and containers: an unsigned tensor must never lose negative values


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_depth_of_zero_lets_negative_values_through() -> None:
    repeat = elastic.Repeat([nn.Sequential(conv(4), nn.ReLU())], Choice("depth", (0, 1)))
    network = made(quantize(nn.Sequential(conv(), repeat, nn.AvgPool2d(2)), images(1), **EIGHT))
    supernet = Supernet(network)
    for depth in (0, 1):
        with supernet.activate({"depth": depth}):
            assert error_at_eight_bits(network, images(4, 5)) < 0.05, depth


def test_every_input_of_a_container_has_its_own_sign() -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y

    mix = elastic.OneOf(Choice("mix", ("sum", "second")), sum=Sum(), second=Second())
    net = Net(lambda net, x: net.mix(torch.relu(net.a(x)), net.b(x)), a=conv(), b=conv(3, 4, 3), mix=mix)
    network = made(quantize(net, images(1), **EIGHT))
    supernet = Supernet(network)
    for option in ("sum", "second"):
        with supernet.activate({"mix": option}):
            assert error_at_eight_bits(network, images(4, 5)) < 0.05, option


def test_a_container_called_twice_has_quantizers_for_each_call() -> None:
    """Quantizers of tensors belong to call sites: the first call's tensor is signed, the second one's is not."""
    pool = elastic.Repeat([nn.AvgPool2d(3, 1)], 1)
    net = Net(lambda net, x: net.pool(torch.relu(net.b(net.pool(net.a(x))))), a=conv(), b=conv(4), pool=pool)
    network = made(quantize(net, images(1), **EIGHT))
    assert error_at_eight_bits(network, images(4, 5)) < 0.05
    pools = [module for module in network.modules() if isinstance(module, AvgPoolProducer)]
    assert len(pools) == 2 and {p.quantizer.signed for p in pools} == {True, False}


def test_a_block_shared_by_two_places_computes_at_both() -> None:
    block = nn.Sequential(conv(4), nn.BatchNorm2d(4), nn.ReLU())
    net = randomise(nn.Sequential(conv(), elastic.Repeat([block, block], Choice("depth", (1, 2))), block, conv(4)))
    network = made(quantize(net.eval(), images(1), **EIGHT))
    supernet = Supernet(network)
    for depth in (1, 2):
        with supernet.activate({"depth": depth}):
            assert error_at_eight_bits(network, images(4, 5)) < 0.1


def test_a_container_may_be_the_whole_network_or_a_whole_part() -> None:
    inner = elastic.OneOf(Choice("mix", ("a", "b")), a=conv(3, 3), b=nn.Identity())
    for net in (elastic.Repeat([inner, conv(3, 3)], Choice("depth", (1, 2))), inner, conv(3, 3)):
        network = made(quantize(net, images(1), **EIGHT))
        supernet = Supernet(network)
        for seed in range(4):
            with supernet.activate(supernet.space.sample(generator(seed))):
                assert error_at_eight_bits(network, images(4, 5)) < 0.05


def test_copies_of_a_quantized_network_are_whole() -> None:
    """A teacher, an average of weights, a leaf of a split: all of them are deep copies."""
    network = quantized()
    copied = copy.deepcopy(network)
    assert torch.equal(copied.integers(images(2)), network.integers(images(2)))
    assert len(copied.graph.nodes) == len(network.graph.nodes)
    mine = {id(module) for module in copied.modules()}
    nodes = [
        node for node in copied.graph.walk() if node.module is not None and node.kind in {"conv", "norm", "linear"}
    ]
    assert nodes and all(id(node.module) in mine for node in nodes)


# Refusals


@pytest.mark.parametrize(
    "name",
    ["output", "steps", "graph", "run", "integers", "target", "removed", "example_shape", "keys", "values", "update"],
)
def test_a_layer_may_have_any_name_or_is_refused_clearly(name: str) -> None:
    net = Net(lambda net, x: getattr(net, name)(x), **{name: conv()})
    try:
        network = made(quantize(net, images(1), **EIGHT))
    except InputError as error:
        assert repr(name) in str(error) and "Rename" in str(error)
    else:
        assert torch.equal(network.state_dict()[f"{name}.weight"], getattr(net, name).weight)
        assert error_at_eight_bits(network, images(4)) < 0.05


def test_an_attribute_called_quantization_is_refused() -> None:
    net = Net(lambda net, x: net.quantization(x), quantization=conv())
    with pytest.raises(InputError, match=r"Net has an attribute 'quantization'.*Rename it"):
        quantize(net, images(1))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda net, x: net.act(net.c(x)), r"Hardshrink at 'act' has no integer form yet\. Supported: Conv2d"),
        (lambda net, x: net.c(x).sin(), r"sin at 'sin' has no integer form"),
        (lambda net, x: net.reflect(x), r"Conv2d at 'reflect' has no integer form"),
        (lambda net, x: net.block(net.c(x)), r"Hardshrink at 'block\.blocks\.0\.1' has no integer form"),
        (lambda net, x: net.c(x % torch.ones(3, 1, 1)), r"has no integer form"),
    ],
)
def test_what_has_no_integer_form_is_named_with_its_path(forward: Any, message: str) -> None:
    net = Net(
        forward, c=conv(), act=nn.Hardshrink(), reflect=nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        block=elastic.Repeat([nn.Sequential(conv(4), nn.Hardshrink())]),
    )  # fmt: skip
    with pytest.raises(InputError, match=message):
        quantize(net, images(1))


@pytest.mark.parametrize("unfold", [False, True])
def test_an_lstm_behind_a_reshape_is_named_and_so_is_what_else_has_no_integer_form(unfold: bool) -> None:
    """The reshape has one, wherever the dimensions lie that it joins or takes apart."""
    shape = [nn.Flatten(), nn.Unflatten(1, (4, -1))] if unfold else [nn.Flatten(2)]
    net = Net(
        lambda net, x: net.gate(net.rnn(net.body(x))[0][:, -1]),
        body=nn.Sequential(conv(), *shape), rnn=nn.LSTM(64, 6, batch_first=True), gate=nn.Sequential(*[nn.Hardshrink()]),
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"^LSTM at 'rnn' has no integer form yet, nor has Hardshrink at 'gate\.0'\. Supported"
    ):
        quantize(net, images(1))


@pytest.mark.parametrize("option", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("bits", [(), (0, 2), (17,), (2.5,), (True,), ("4",), 4])
def test_bits_outside_one_to_sixteen_are_refused(option: str, bits: Any) -> None:
    with pytest.raises(InputError, match=rf"{option}.*(whole numbers from 1 to 16|Give several in a tuple)"):
        quantize(nn.Sequential(conv()), images(1), **{option: bits})


@pytest.mark.parametrize("option", ["weight_bits", "activation_bits"])
def test_bits_that_the_target_does_not_run_are_removed_with_its_reason(option: str) -> None:
    network = quantize(nn.Sequential(conv(), conv(4)), images(1), **{option: (1, 2, 9)})
    assert [(removal.feature, removal.option) for removal in network.removed] == [(option, 1), (option, 9)]
    with pytest.raises(TargetError, match=r"cannot run 16-bit .*: the runtime's integer kernels take"):
        quantize(nn.Sequential(conv()), images(1), **{option: (16,)})


def test_a_granularity_that_the_target_cannot_run_is_removed_with_its_reason() -> None:
    network = quantize(nn.Sequential(conv(), conv(4)), images(1), weight_granularity=("channel", "group16"))
    (removal,) = network.removed
    assert (removal.feature, removal.option) == ("weight_granularity", "group16")
    assert "scaled once per output channel" in removal.reason
    with pytest.raises(
        TargetError, match=r"scaled once per output channel.*Allowed weight_granularity: tensor, channel"
    ):
        quantize(nn.Sequential(conv()), images(1), weight_granularity=("group64",))
    with pytest.raises(InputError, match=r"unknown weight granularity 'group0'"):
        quantize(nn.Sequential(conv()), images(1), weight_granularity=("group0",))


def test_where_says_what_has_choices() -> None:
    net = nn.Sequential(conv(), nn.ReLU(), conv(4), nn.ReLU(), conv(4), nn.ReLU(), conv(4))
    every = {"weight_granularity": ("tensor", "channel")}
    assert names_of(quantize(net, images(1), where=("2",), **every)) == {
        "2.activation_bits", "2.weight_bits", "2.weight_granularity",
    }  # fmt: skip
    both = quantize(net, images(1), where=("[24]",), weight_bits=(2, 4), activation_bits=(2, 3))
    assert {name.split(".")[0] for name in names_of(both)} == {"2", "4"}
    one = quantize(net, images(1), where=("4",), weight_bits=(2, 4), activation_bits=(2, 3))
    quantizers = [module for module in one.modules() if isinstance(module, WeightQuantizer)]
    assert [quantizer.decided("bits") for quantizer in quantizers] == [8, 4, 4, 8]
    assert names_of(one) == {"4.weight_bits"}  # what the last layer reads is pinned
    with pytest.raises(
        InputError, match=r"the pattern 'layer9\.\*' of where fits no layer and no tensor\. Paths here: 0, "
    ):
        quantize(net, images(1), where=("2", "layer9.*"))
    with pytest.raises(InputError, match=r"where is '2'\. Give several patterns in a tuple: \('2',\)"):
        quantize(net, images(1), where="2")


@pytest.mark.parametrize("bits", [1, 0, 9, 16, True, 2.5, "8"])
def test_pinned_bits_are_checked_as_well(bits: Any) -> None:
    """Sixteen bits would run over in the uint8 containers without a word."""
    with pytest.raises(InputError, match=r"first_last_bits"):
        quantize(nn.Sequential(conv()), images(1), first_last_bits=bits)


def test_bits_in_any_order_mean_the_same() -> None:
    """`smallest` and `largest` of the space rely on ascending options."""
    net = nn.Sequential(conv(), nn.ReLU(), conv(4), nn.ReLU(), conv(4))
    spaces = [Supernet(quantize(net, images(1), weight_bits=bits)).space for bits in ((2, 4, 8), (8, 2, 4))]
    assert spaces[0].largest() == spaces[1].largest() and spaces[0].smallest() == spaces[1].smallest()
    assert spaces[0].largest()["2.weight_bits"] == 8


def test_what_a_target_does_not_run_is_removed_with_its_reason() -> None:
    network = quantize(nn.Sequential(conv(), conv(4)), images(1), weight_symmetry=("symmetric", "asymmetric"))
    assert not any("symmetry" in name for name in names_of(network))
    (removal,) = network.removed
    assert (removal.feature, removal.option) == ("weight_symmetry", "asymmetric") and "0.8x" in removal.reason
    with pytest.raises(InputError, match=r"onnxruntime-cpu.*asymmetric weights"):
        quantize(nn.Sequential(conv()), images(1), weight_symmetry=("asymmetric",))


def test_a_choice_with_an_option_that_the_target_refuses_is_an_error() -> None:
    target = replace(load("generic"), weight_bits=(4, 8))
    with pytest.raises(InputError, match=r"choice 'bits' has an option that target 'generic' refuses"):
        quantize(nn.Sequential(conv()), images(1), target, weight_bits=Choice("bits", (2, 4)))


def test_unknown_targets_are_listed() -> None:
    with pytest.raises(InputError, match=r"generic.*onnxruntime-cpu"):
        quantize(nn.Sequential(conv()), images(1), "tensorrt-9000")


def test_by_the_rule_one_a_convolution_and_the_sum_behind_it_are_one_operation() -> None:
    """The first convolution is added as it is; the second one, the shortcut, is quantized in front of the sum."""
    net = Net(
        lambda net, x: torch.relu(net.norm(net.a(x)) + net.b(x)), a=conv(), b=conv(3, 4, 3), norm=nn.BatchNorm2d(4)
    )
    made = quantize(net, images(4), replace(load("generic"), add="one"), weight_bits=(4,), activation_bits=(4,))
    calibrate(made, images(16))
    supernet = Supernet(made.eval())
    with supernet.activate(supernet.space.largest()), torch.no_grad():
        program, found, fake = freeze(made), made.integers(images(4)), made(images(4), mode="fake")
    assert [(op.kind, op.path, len(op.inputs)) for op in program.ops] == [
        ("input", "input", 0), ("conv", "b", 1), ("conv", "a", 2)
    ]  # fmt: skip
    assert program.add == "one" and program.output.low == program.output.zero_point
    x, shortcut, total = (op.output for op in program.ops)
    layer = program.ops[2]
    assert isinstance(layer, Conv)
    # By the book, in float64: nothing is rounded between the convolution and the sum.
    first = torch.round(images(4) / x.scale).add(x.zero_point).clamp(x.low, x.high).double() - x.zero_point
    beside = program.ops[1]
    assert isinstance(beside, Conv)
    q = _by_the_book(beside, first, x.scale, 0.0) - shortcut.zero_point
    wanted = _by_the_book(layer, first, x.scale, q * shortcut.scale)
    assert int((wanted != found).sum()) == 0
    assert (fake - (found.float() - total.zero_point) * total.scale).abs().max() <= 1.01 * total.scale


def _by_the_book(layer: Conv, x: torch.Tensor, step: float, shortcut: torch.Tensor | float) -> torch.Tensor:
    made, window = layer.output, (layer.stride, layer.padding, layer.dilation, layer.groups)
    sums = F.conv2d(x, torch.from_numpy(layer.used).double(), None, *window)
    scale, bias = (torch.tensor(a).double().reshape(-1, 1, 1) for a in (layer.weight_scale, layer.bias))
    real = (sums + bias) * scale * step + shortcut
    return torch.round(real / made.scale).add(made.zero_point).clamp(made.low, made.high)


def test_a_sum_of_other_tensors_is_the_same_in_both_rules() -> None:
    net = Net(lambda net, x: torch.relu(net.a(x)) + net.b(x), a=conv(), b=nn.MaxPool2d(1))
    net.b = nn.Sequential(conv(3, 4, 3), nn.ReLU())
    made = quantize(net, images(1), replace(load("generic"), add="one"))
    calibrate(made, images(4))
    with Supernet(made.eval()).activate(Supernet(made).space.largest()):
        kinds = [(op.kind, len(op.inputs)) for op in freeze(made).ops]
    assert kinds == [("input", 0), ("conv", 1), ("conv", 1), ("add", 2)]


def test_an_operation_that_the_target_does_not_have_is_refused() -> None:
    net = nn.Sequential(conv(), nn.MaxPool2d(2))
    with pytest.raises(InputError, match=r"max_pool|MaxPool2d"):
        quantize(net, images(1), replace(load("generic"), operators=("conv", "linear")))


def test_pinned_bits_follow_the_target() -> None:
    with pytest.raises(InputError, match=r"8"):
        quantize(nn.Sequential(conv()), images(1), replace(load("generic"), weight_bits=(2, 4)), weight_bits=(2, 4))


def test_a_forward_that_depends_on_the_subnet_is_found() -> None:
    """The trace holds the default subnet's sizes; another subnet shows it."""
    width = Choice("width", (2, 4))
    net = Net(lambda net, x: net.head(net.c(x).view(-1, 256)), c=elastic.Conv2d(3, width, 1), head=nn.Linear(256, 3))
    with pytest.raises(InputError, match=r"does not compute what the module computes|sizes disagree|cannot"):
        quantize(net, images(1))


def test_a_batch_size_in_the_code_is_found() -> None:
    net = Net(lambda net, x: net.c(x).view(2, -1), c=conv())
    with pytest.raises(InputError):
        quantize(net, images(2))


def test_a_network_that_was_never_calibrated_says_so() -> None:
    """Steps that no tensor has been seen with give numbers that look like a result."""
    network = quantize(tiny(), images(1)).eval()
    with pytest.raises(InputError, match=r"calibrate"):
        network(images(1))


def test_functional_and_module_forms_are_the_same_network() -> None:
    plain = nn.Sequential(conv(), nn.ReLU6(), nn.MaxPool2d(2), conv(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten())
    written = Net(
        lambda net, x: F.avg_pool2d(torch.relu(net.b(F.max_pool2d(F.relu6(net.a(x)), 2))), 2).flatten(1),
        a=plain[0], b=plain[3],
    )  # fmt: skip
    found = [made(quantize(net, images(1), **EIGHT)).integers(images(4)) for net in (plain, written)]
    assert torch.equal(*found)


def test_weights_of_every_form_start_from_a_guess() -> None:
    network = quantize(tiny(), images(1))
    for module in network.modules():
        if isinstance(module, WeightQuantizer):
            assert all(float(form.log_step.detach().min()) > -15 for form in module.forms.values())
