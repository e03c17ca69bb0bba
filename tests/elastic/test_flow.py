from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import generator, images, tiny_supernet
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.elastic.flow import Flow, check_sizes, example_inputs
from nasq.elastic.read import read_space
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.quant import quantize
from nasq.space import Function


class Recording(Flow):
    """Remembers the sizes of every layer's output, and where it runs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[tuple[Any, Any, Any]] = []

    def visit(self, node: Any, inputs: Any, output: Any, running: Any) -> None:
        if node.module is not None and node.kind in {"conv", "linear", "norm", "max_pool"}:
            self.seen.append((node.module, output, running))


def test_sizes_are_those_that_hooks_see_in_random_subnets() -> None:
    supernet = tiny_supernet()
    space = supernet.space
    rows = space.sample_batch(60, generator(5))
    graph = trace(supernet.module, images(1))
    flow = Recording(space, rows)
    flow.run(graph, example_inputs(flow, graph), np.ones(len(rows), dtype=bool))
    shapes: list[tuple[nn.Module, tuple[int, ...]]] = []
    for module in {module for module, _, _ in flow.seen}:
        module.register_forward_hook(lambda module, _, y: shapes.append((module, tuple(y.shape[1:]))))
    for index, subnet in enumerate(space.to_subnets(rows)):
        shapes.clear()
        with supernet.activate(subnet), torch.no_grad():
            supernet(images(1))
        ours = [(m, tuple(int(d[index]) for d in out.dims)) for m, out, running in flow.seen if running[index]]
        assert ours == shapes, subnet


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("first", "second"),
    [((4, 8), (4, 6)), ((4, 8), (2, 8)), ((4,), (8,)), ((8, 4), (4, 8))],
    ids=["differ at the default", "differ elsewhere", "ints", "differ in order"],
)
def test_sizes_that_disagree_name_both_layers(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    net = sequential(
        elastic.Conv2d(3, Choice("a", first), 3), nn.ReLU(), elastic.Conv2d(Choice("b", second), 4, 3), nn.ReLU()
    )
    with pytest.raises(InputError, match=r"sizes disagree: '2'.*'0'"):
        quantize(net, images(1))


def test_sizes_of_norms_and_linears_are_checked() -> None:
    width = Choice("w", (4, 8))
    with pytest.raises(InputError, match=r"'1' takes 8 channels, and '0' gives it 4"):
        check(sequential(elastic.Conv2d(3, width, 1), elastic.BatchNorm2d(8)))
    with pytest.raises(InputError, match=r"'2' takes 8 input features, and '0' gives it 4"):
        check(sequential(elastic.Conv2d(3, width, 8, padding=0), nn.Flatten(), elastic.Linear(8, 3)))


def check(net: nn.Module) -> None:
    check_sizes(trace(net, images(1)), read_space(net))


def test_a_sum_names_both_sides() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = elastic.Conv2d(3, Choice("a", (2, 4)), 1), elastic.Conv2d(3, Choice("b", (2, 4)), 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x)

    with pytest.raises(
        InputError, match=r"'add' takes . channels, and 'two' \(added to 'one'\) gives it ., for example"
    ):
        check(Net())


def test_maps_of_a_concatenation_have_to_be_equally_large() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = elastic.Conv2d(3, 4, 3, Choice("stride", (2, 1)))
            self.two = elastic.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x), self.two(x)], 1)

    with pytest.raises(InputError, match=r"sizes disagree: 'cat'.*one"):
        check(Net())


def test_groups_that_do_not_divide_are_found_when_the_space_is_built() -> None:
    net = sequential(elastic.Conv2d(3, 8, 1), elastic.Conv2d(8, Choice("out", (6, 8)), 3, groups=Choice("g", (2, 4))))
    with pytest.raises(InputError, match=r"'1'.*groups"):
        check(net)


def test_disagreement_where_a_part_does_not_run_is_none() -> None:
    width = Choice("w", (4, 8))
    only_eight = elastic.Conv2d(8, 8, 1)
    net = sequential(elastic.Conv2d(3, 8, 1), elastic.OneOf(Choice("m", ("a", "b")), a=only_eight, b=nn.Identity()))
    check(net)
    net = sequential(elastic.Conv2d(3, width, 1), elastic.OneOf(Choice("m", ("a", "b")), a=only_eight, b=nn.Identity()))
    with pytest.raises(InputError, match=r"'1\.branches\.a' takes 8 input channels, and '0' gives it 4"):
        check(net)


def test_lookup_equals_values_of_single_subnets() -> None:
    space = tiny_supernet().space
    rows = space.sample_batch(40, generator(0))
    flow = Flow(space, rows)
    width, expand = space["width"], space["expand"]
    size = Function(max, expand * width, 7, maximum=16)
    wanted = [max(int(s["width"]) * int(s["expand"]), 7) for s in space.to_subnets(rows)]
    assert flow.lookup(size).tolist() == wanted == flow.lookup(size).tolist()
    assert flow.lookup(5).tolist() == [5] * 40


def test_stride_shrinks_the_map_in_some_subnets_only() -> None:
    net = sequential(elastic.Conv2d(3, 4, 3, Choice("s", (2, 1))), elastic.Conv2d(4, 2, 4, padding=0))
    supernet = Supernet(net)
    graph = trace(net, images(1))
    flow = Flow(supernet.space, supernet.space.to_rows([{"s": 2}, {"s": 1}]))
    out = flow.run(graph, example_inputs(flow, graph), np.ones(2, dtype=bool))
    assert [d.tolist() for d in out.dims] == [[2, 2], [1, 5], [1, 5]] and out.numel.tolist() == [2, 50]
