from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import generator, images, quantized_supernet, tiny, tiny_supernet
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.elastic import ElasticModule, extract
from nasq.elastic.base import elastic_modules, evaluating
from nasq.errors import InputError


def storages(module: nn.Module) -> set[int]:
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def test_extracted_equals_activated_bit_for_bit() -> None:
    supernet, x = tiny_supernet(), images(3)
    subnets = {supernet.space.sample(generator(seed)) for seed in range(150)}
    assert len(subnets) > 100
    for subnet in subnets:
        plain = supernet.extract(subnet)
        with supernet.activate(subnet), torch.no_grad():
            assert torch.equal(plain(x), supernet(x)), subnet
        assert not list(elastic_modules(plain))


def test_extracted_quantized_equals_activated_in_every_mode() -> None:
    supernet, x = quantized_supernet(weight_granularity=("tensor", "channel")), images(3)
    for seed in range(25):
        subnet = supernet.space.sample(generator(seed))
        plain = supernet.extract(subnet)
        with supernet.activate(subnet), torch.no_grad():
            for mode in ("integer", "float", "fake"):
                assert torch.equal(plain(x, mode=mode), supernet(x, mode=mode)), (mode, subnet)


@pytest.mark.parametrize("build", [tiny_supernet, quantized_supernet])
def test_extraction_owns_its_weights(build: Callable[[], Supernet]) -> None:
    supernet = build()
    subnet, x = supernet.space.sample(generator(3)), images(2)
    plain = supernet.extract(subnet)
    assert not storages(plain) & storages(supernet)
    with torch.no_grad():
        before = plain(x)
        for tensor in [*supernet.parameters(), *supernet.buffers()]:
            tensor.zero_()
        assert torch.equal(plain(x), before)


@pytest.mark.parametrize("build", [tiny_supernet, quantized_supernet])
def test_an_extracted_network_does_not_keep_the_supernet_alive(build: Callable[[], Supernet]) -> None:
    """What is cut out is small: nothing in it refers to the shared weights."""
    supernet = build()
    plain = supernet.extract(supernet.space.smallest())
    shared = [weakref.ref(parameter) for parameter in supernet.parameters()]
    del supernet
    gc.collect()
    assert [ref for ref in shared if ref() is not None] == [] and any(True for _ in plain.parameters())


def test_a_module_at_two_places_stays_one_module() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = elastic.Conv2d(3, Choice("width", (3,)), Choice("kernel", (1, 3)))
            self.first, self.second = conv, nn.Sequential(conv)
            self.table = [conv]

        def forward(self, x: Tensor) -> Tensor:
            return self.table[0](self.second(self.first(x)))

    supernet = Supernet(Shared().eval())
    plain: Any = supernet.extract({"kernel": 1, "width": 3})
    assert plain.first is plain.second[0] is plain.table[0] and isinstance(plain.first, nn.Conv2d)
    with supernet.activate({"kernel": 1, "width": 3}), torch.no_grad():
        assert torch.equal(plain(images(1)), supernet(images(1)))


def test_extraction_leaves_the_supernet_and_keeps_modes() -> None:
    net = tiny()
    net.mix.train()
    before = {name: (module, module.training) for name, module in net.named_modules()}
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    plain = extract(net)
    assert {name: (module, module.training) for name, module in net.named_modules()} == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert plain.stem.training is False and plain.mix.training is True


def test_plain_layers_keep_their_kind_and_numbers() -> None:
    net = tiny()
    plain = extract(net)
    assert type(plain) is type(net) and type(plain.wide_bn) is nn.BatchNorm2d
    assert torch.equal(plain.wide_bn.weight, net.wide_bn.weight) and plain.wide_bn is not net.wide_bn


def test_a_custom_module_that_forgets_a_part_is_told_so() -> None:
    class Forgetful(ElasticModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = elastic.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

        def extract(self, recurse: Any) -> nn.Module:
            return nn.Sequential(self.inner)

    with pytest.raises(InputError, match=r"still holds an elastic module at '0\.0'.*recurse"):
        Supernet(nn.Sequential(Forgetful())).extract({})


def test_a_module_without_extract_says_so() -> None:
    class Plain(ElasticModule):
        pass

    with pytest.raises(NotImplementedError, match=r"Plain has to implement extract"):
        extract(Plain())


def test_evaluating_restores_every_mode_also_after_an_error() -> None:
    net = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))
    net[1].eval()
    net[1][1].train()
    before = [module.training for module in net.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(net):
        assert not any(module.training for module in net.modules())
        raise ZeroDivisionError
    assert [module.training for module in net.modules()] == before


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (
            elastic.Conv2d(3, 4, 3),
            torch.zeros(2, 1, 8, 8),
            r"Conv2d takes 3 input channels, .*\[2, 1, 8, 8\] has 1\. Give",
        ),
        (elastic.Conv2d(3, 4, 3), torch.zeros(2), r"Conv2d takes 3 input channels, .*\[2\] has 0"),
        (elastic.Linear(Choice("w", (4, 6)), 2), torch.zeros(5, 4), r"Linear takes 6 input features, .*\[5, 4\] has 4"),
    ],
)
def test_an_input_of_another_size_is_refused_with_both_sizes(layer: nn.Module, x: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        layer(x)


def test_other_failures_of_torch_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="type"):
        elastic.Linear(4, 2)(torch.zeros(5, 4, dtype=torch.float64))
