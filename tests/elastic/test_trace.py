from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, elastic
from nasq.elastic.graph import Graph, Node
from nasq.elastic.trace import trace
from nasq.errors import InputError

Forward = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """A convolution ``c`` and a second one ``d``, both ``[N, 3, 8, 8]`` to ``[N, 4, 8, 8]``, and a forward of one's own."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("mean", torch.ones(3, 1, 1))
        self.written = [forward]

    def forward(self, x: Tensor) -> Any:
        return self.written[0](self, x)


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph.nodes]


def unpacked(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = net.c(x).shape
    return net.c(x).reshape(n, c * h * w)


def test_kinds_and_paths_of_the_tiny_net() -> None:
    graph = trace(tiny(), images(1))
    found = Counter(node.kind for node in graph.walk())
    assert found["conv"] == 13 and found["norm"] == 10 and found["linear"] == 1 and found["container"] == 2
    assert found["add"] == found["concat"] == found["avg_pool"] == found["relu6"] == 1 and found["max_pool"] == 2
    assert "other" not in found
    paths = [node.path for node in graph.walk()]
    assert {"stem", "inverted.depthwise", "rest.blocks.2.conv", "mix.branches.conv.0", "head"} <= set(paths)
    assert paths.count("twice") == 2
    assert graph.output.path == "head" and graph.output.shape == (5,)


def test_the_order_is_an_execution_order_and_users_read() -> None:
    graph = trace(tiny(), images(1))
    seen: set[Node] = set()
    for node in graph.nodes:
        assert set(node.inputs) <= seen
        assert all(node in user.inputs for user in graph.users(node))
        seen.add(node)


@pytest.mark.parametrize(
    ("forward", "wanted"),
    [
        (lambda net, x: net.c(x).view(x.size(0), -1), "reshape"),
        (lambda net, x: net.c(x).view(x.size(dim=0), -1), "reshape"),
        (lambda net, x: net.c(x).reshape(x.shape[0], 256), "reshape"),
        (lambda net, x: net.c(x).view(-1, 256), "reshape"),
        (unpacked, "reshape"),
        (lambda net, x: torch.flatten(net.c(x), 1), "reshape"),
        (lambda net, x: net.c(x).flatten(start_dim=1), "reshape"),
        (lambda net, x: net.c(x).mean((2, 3)), "avg_pool"),
        (lambda net, x: net.c(x).mean([-1, -2], keepdim=True), "avg_pool"),
        (lambda net, x: torch.mean(net.c(x), dim=(2, 3)), "avg_pool"),
        (lambda net, x: F.adaptive_avg_pool2d(net.c(x), (1, 1)), "avg_pool"),
        (lambda net, x: F.avg_pool2d(net.c(x), x.shape[2] // 2), "avg_pool"),
        (lambda net, x: F.avg_pool2d(net.c(x), 2, padding=1), "avg_pool"),
        (lambda net, x: F.avg_pool2d(net.c(x), 2, divisor_override=1), "other"),
        (lambda net, x: F.max_pool2d(net.c(x), 3, stride=1, padding=1), "max_pool"),
        (lambda net, x: F.max_pool2d(net.c(x), 2, dilation=2), "other"),
        (lambda net, x: net.c(x) if x.ndim == 4 and len(x.shape) == 4 else None, "conv"),
        (lambda net, x: net.c(x) + net.d(x), "add"),
        (lambda net, x: torch.add(net.c(x), net.d(x)), "add"),
        (lambda net, x: torch.add(net.c(x), net.d(x), alpha=2), "other"),
        (lambda net, x: net.c(x) + net.d(x).mean((2, 3), keepdim=True), "add"),
        (lambda net, x: torch.cat([net.c(x), net.d(x)], dim=1), "concat"),
        (lambda net, x: torch.cat([net.c(x), net.d(x)], dim=2), "concat"),
        (lambda net, x: net.c(x).relu_(), "relu"),
        (lambda net, x: F.relu6(net.c(x)), "relu6"),
        (lambda net, x: net.c(x).sigmoid(), "unary"),
        (lambda net, x: net.c(x) * 2, "scale"),
        (lambda net, x: F.dropout(net.c(x), 0.5, net.training), "identity"),
        (lambda net, x: F.dropout(net.c(x)), "other"),
        (lambda net, x: torch.concat([net.c(x), net.d(x)], dim=-3), "concat"),
        (lambda net, x: net.c(x).view(1, -1), "other"),
        (lambda net, x: net.c(x).transpose(1, 2), "permute"),
    ],
)
def test_the_last_operation_is_known_by_kind(forward: Forward, wanted: str) -> None:
    graph = trace(Net(forward), images(1))
    assert graph.output.kind == wanted
    assert next(node.kind for node in graph.nodes if node.kind != "input") == "conv"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_stays_free_whatever_the_example(batch: int) -> None:
    graph = trace(Net(lambda net, x: net.c(x).view(x.shape[0], -1)), images(batch))
    assert kinds(graph) == ["input", "conv", "reshape"] and graph.output.shape == (256,)


def test_unreachable_code_is_dropped() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.d(x).sigmoid()
        return net.c(x)

    assert kinds(trace(Net(forward), images(1))) == ["input", "conv"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.c(x) * net.scale,
        lambda net, x: net.c(x - net.mean),
        lambda net, x: net.c(x) + torch.ones(1),
        lambda net, x: net.c(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1),
    ],
)
def test_own_tensors_are_operations_without_a_name_of_ours(forward: Forward) -> None:
    """A parameter, buffer or constant used directly is traced, and refused later by those who have no rule for it."""
    graph = trace(Net(forward), images(1))
    assert {"other", "parameter"} & set(kinds(graph)) and "conv" in kinds(graph)


def test_a_tensor_read_twice_by_one_operation_is_two_inputs() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.c(x)
        return torch.cat([y, y], 1)

    graph = trace(Net(forward), images(1))
    assert graph.output.shape == (8, 8, 8) and len(graph.output.inputs) == 2


def test_containers_hold_the_graphs_of_their_parts() -> None:
    graph = trace(tiny(), images(1))
    (repeat, one) = [node for node in graph.nodes if node.kind == "container"]
    assert [kinds(part) for part in repeat.parts] == [["input", "conv", "norm", "relu"]] * 3
    assert [kinds(part)[1:] for part in one.parts] == [["conv", "norm", "relu"], ["max_pool"], ["identity"]]
    assert repeat.parts[1].nodes[1].path == "rest.blocks.1.conv"


def test_a_layer_alone_and_a_container_alone_are_graphs() -> None:
    assert kinds(trace(nn.Conv2d(3, 4, 1), images(1))) == ["input", "conv"]
    one = elastic.OneOf(Choice("mix", ("a", "b")), a=nn.ReLU(), b=nn.Conv2d(3, 3, 1))
    graph = trace(one, images(1), path="somewhere")
    assert graph.output.path == "somewhere" and [part.output.kind for part in graph.output.parts] == ["relu", "conv"]


def test_tracing_leaves_the_module_as_it_was() -> None:
    net = tiny().train()
    net.mix.eval()
    modes = [module.training for module in net.modules()]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    names = {name: set(vars(module)) for name, module in net.named_modules()}
    trace(net, images(2))
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert {name: set(vars(module)) for name, module in net.named_modules()} == names
    assert all(parameter.grad is None for parameter in net.parameters())


def test_constants_leave_no_trace_in_the_module() -> None:
    net = Net(lambda net, x: net.c(x) + torch.ones(1))
    before = set(vars(net)), set(net.state_dict())
    try:
        trace(net, images(1))
    finally:
        assert (set(vars(net)), set(net.state_dict())) == before


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.c(x) if x.sum() > 0 else net.d(x),
        lambda net, x: net.c(x) * float(x.mean()),
        lambda net, x: net.c(x[:, :, : int(x.max())]),
        lambda net, x: net.c(x) * sum(x.flatten().tolist()),
        lambda net, x: net.c(x).view(x.shape[0], 7),
    ],
)
def test_what_cannot_be_traced_names_the_module(forward: Forward) -> None:
    """Whatever a user's forward raises while it is traced comes out as one clear line."""
    with pytest.raises(InputError, match=r"'Net' cannot be traced"):
        trace(Net(forward), images(1))


def test_a_layer_that_cannot_take_its_input_is_named_with_who_made_it() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.d(torch.relu(net.c(x)))

    with pytest.raises(InputError, match=r"sizes disagree: 'd'.*'c'"):
        trace(Net(forward), images(1))


def test_the_part_that_cannot_be_traced_is_named_by_its_path() -> None:
    repeat = elastic.Repeat([Net(lambda net, x: x if x.sum() > 0 else -x)])
    with pytest.raises(InputError, match=r"part 'body\.blocks\.0' cannot be traced"):
        trace(nn.ModuleDict({"body": repeat})["body"], images(1), path="body")


@pytest.mark.parametrize(
    "forward", [lambda net, x: (net.c(x), x), lambda net, x: {"out": net.c(x)}, lambda net, x: None]
)
def test_a_network_returns_one_tensor(forward: Forward) -> None:
    with pytest.raises(InputError, match=r"'Net' returns .*, not one tensor\. Wrap the network"):
        trace(Net(forward), images(1))


def test_an_optional_argument_may_stay_away() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.c(x) if mask is None else self.c(x * mask)

    assert kinds(trace(Masked(), images(1))) == ["input", "conv"]


def test_an_input_without_an_example_is_named() -> None:
    with pytest.raises(InputError, match=r"no example was given for its input 'input2'"):
        trace(Pair(), images(1))


class Pair(nn.Module):
    def forward(self, x: Tensor, input2: Tensor) -> Tensor:
        return x + input2


def test_what_a_forward_leaves_on_the_module_is_taken_back() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        net.last = net.c(x)
        return torch.relu(net.last)

    net = Net(forward)
    assert kinds(trace(net, images(1))) == ["input", "conv", "relu"] and not hasattr(net, "last")


def test_a_container_that_does_not_fit_names_the_layer_inside() -> None:
    branches = {"a": nn.Sequential(elastic.Conv2d(4, 4, 1)), "b": nn.Identity()}
    net = nn.Sequential(elastic.Conv2d(3, 8, 1), elastic.OneOf(Choice("mix", ("a", "b")), branches))
    with pytest.raises(InputError, match=r"'1\.branches\.a\.0' takes 4 input channels, and '0' gives it 8"):
        trace(net, images(1))


def test_a_copied_graph_is_one_of_its_own() -> None:
    graph = trace(tiny(), images(1))
    copied = copy.deepcopy(graph)
    assert [repr(node) for node in copied.walk()] == [repr(node) for node in graph.walk()]
    assert copied.output in copied.nodes and not set(copied.walk()) & set(graph.walk())
    twice = [node.module for node in copied.walk() if node.path == "twice"]
    assert twice[0] is twice[1] and isinstance(twice[0], elastic.Conv2d)


def test_two_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y + x

    graph = trace(Sum(), images(1), images(1, 1))
    assert kinds(graph) == ["input", "input", "add"]
    assert graph.output.inputs == (graph.inputs[1], graph.inputs[0])
