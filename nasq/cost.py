"""What a subnet costs: parameters, multiply-adds, bit operations, bytes. Exact, and for many subnets at once.

Costs are counted on the traced graph with arrays of sizes, so that a search can look at tens of thousands of subnets per
second. They equal what ``torch.utils.flop_counter`` and ``sum(p.numel())`` find on the extracted model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq.elastic.base import ElasticModule, evaluating
from nasq.elastic.flow import Flow, example_inputs
from nasq.elastic.graph import Graph, Node
from nasq.elastic.linear import Linear
from nasq.elastic.rules import Bools, Ints, Sized, Work, work_rule
from nasq.elastic.trace import trace
from nasq.errors import InputError
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.input_groups import count_groups, group_size
from nasq.quant.network import QuantizedNetwork
from nasq.quant.producers import LayerProducer, Producer
from nasq.quant.quantizers import ActivationQuantizer, WeightQuantizer
from nasq.space import Choice, Option, Subnet
from nasq.supernet import Supernet

__all__ = ["COSTS", "CostModel"]

COSTS = {
    "params": "parameters",
    "macs": "multiply-adds per input",
    "bitops": "multiply-adds x weight bits x input bits",
    "bytes": "bytes of packed weights, scales and biases",
    "compression": "bytes of the fp32 parameters / bytes",
    "average_weight_bits": "bits",
    "average_activation_bits": "bits",
}
"""Every cost by name, with its unit."""

_PER_CHANNEL = 8
"""Bytes of one output channel beside its weights: an fp32 scale and an int32 bias."""
_PER_GROUP = 4
"""Bytes of a group of inputs in one output channel: an int32 multiplier."""


def _count(owner: nn.Module | nn.Parameter, flow: Flow) -> Any:
    if isinstance(owner, nn.Parameter):
        return owner.numel()
    if isinstance(owner, ElasticModule):
        return owner.cost_parameters(flow.lookup)
    return sum(parameter.numel() for parameter in owner.parameters())


class _Costs(Flow):
    """Counts while it walks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.totals: dict[str, Ints] = {
            name: np.zeros(self.count, dtype=np.int64) for name in ("params", "macs", "bitops", "bytes")
        }
        self.weighted = {name: np.zeros(self.count, dtype=np.int64) for name in ("w", "w_bits", "a", "a_bits")}
        self.counted: dict[int, Bools] = {}

    def option(self, quantizer: nn.Module, form: int) -> Ints:
        """The bits a quantizer uses in every subnet."""
        if not isinstance(quantizer, (WeightQuantizer, ActivationQuantizer)):
            return self.lookup(form)
        decision = quantizer.decisions["bits"]
        if not isinstance(decision, Choice):
            assert isinstance(decision, int)
            return self.lookup(decision)
        return self.lookup(decision)

    def groups(self, producer: LayerProducer) -> Ints:
        """How many groups of inputs a layer has in every subnet; 0 where they have no scales of their own."""
        found: Ints = np.zeros(self.count, dtype=np.int64)
        quantizer = producer.weight_quantizer
        if not isinstance(quantizer, WeightQuantizer):
            return found
        decision = quantizer.decisions["granularity"]
        for option in decision.options if isinstance(decision, Choice) else (decision,):
            size = group_size(option)
            if size is not None:
                taken = self.holds(((decision.name, frozenset({option})),) if isinstance(decision, Choice) else ())
                assert isinstance(producer.layer, Linear | nn.Linear)
                found = np.where(taken, count_groups(producer.layer.in_features, size, self.lookup), found)
        return found

    def bits(self, node: Node, inputs: list[Sized]) -> Ints:
        """The producer's quantizer; the input's bits where nothing is quantized."""
        producer = node.attributes.get("producer")
        if not isinstance(producer, Producer):
            return inputs[0].bits
        form = producer.quantizer
        return self.option(form, form.bits if isinstance(form, ActivationForm) else 8)

    def visit(self, node: Node, inputs: list[Sized], output: Sized, running: Bools) -> None:
        """Adds the node's costs in the subnets in which it runs."""
        owner = node.module if node.module is not None else node.attributes.get("parameter")
        if node.kind == "container":
            return
        fresh = running
        if owner is not None:
            fresh = self._fresh(owner, running)
            params = np.broadcast_to(_count(owner, self), fresh.shape)
            self.totals["params"] += np.where(fresh, params, 0)
        rule = work_rule(node.kind)
        found = rule(self, node, inputs, output) if rule is not None else None
        if found is not None:
            self._add(found, node, inputs, fresh, running)

    def _add(self, work: Work, node: Node, inputs: list[Sized], fresh: Bools, running: Bools) -> None:
        """Adds what an operation computes and stores."""
        self.totals["macs"] += np.where(running, work.macs, 0)
        producer = node.attributes.get("producer")
        width: Ints = self.lookup(32) if len(inputs) == 1 else inputs[1].bits
        if isinstance(producer, LayerProducer):
            form = producer.weight_quantizer
            width = self.option(form, form.bits if isinstance(form, WeightForm) else 8)
        self.totals["bitops"] += np.where(running, work.macs * width * inputs[0].bits, 0)
        if work.rows is None or work.row is None or not isinstance(producer, LayerProducer):
            return
        stored = work.rows * ((width * work.row + 7) // 8 + _PER_CHANNEL + _PER_GROUP * self.groups(producer))
        # A layer that is called twice is in the file twice: its calls have other scales and biases.
        self.totals["bytes"] += np.where(running, stored, 0)
        if work.averaged and not node.attributes.get("pinned"):
            self._average(work.rows * work.row, width, inputs[0], fresh, running)

    def _average(self, weights: Ints, width: Ints, x: Sized, fresh: Bools, running: Bools) -> None:
        for name, amount, where in (
            ("w", weights, fresh), ("w_bits", weights * width, fresh), ("a", x.numel, running),
            ("a_bits", x.numel * x.bits, running),
        ):  # fmt: skip
            self.weighted[name] += np.where(where, amount, 0)

    def _fresh(self, owner: nn.Module | nn.Parameter, running: Bools) -> Bools:
        """Where weights are counted for the first time: a layer called twice has one set of weights."""
        key = id(owner)
        before = self.counted.get(key)
        self.counted[key] = running if before is None else before | running
        return running if before is None else running & ~before


class CostModel:
    """The costs of a supernet's subnets.

    Args:
        supernet: Of any network; a quantized one also has bits.
        example: An input ``[N, ...]``; not needed for a quantized network, which knows its own.

    Raises:
        InputError: The network is not quantized and no example was given, it cannot be traced, or some of its
            multiply-adds cannot be counted.
    """

    def __init__(self, supernet: Supernet, example: Tensor | None = None) -> None:
        self.space = supernet.space
        self.quantized = isinstance(supernet.module, QuantizedNetwork)
        if isinstance(supernet.module, QuantizedNetwork):
            self.graph: Graph = supernet.module.graph
        elif example is None:
            raise InputError(
                "the network is not quantized: give CostModel an example input, whose size the costs depend on."
            )
        else:
            with supernet.activate(self.space.default()):
                self.graph = trace(supernet.module, example)
                # Extracted: what an elastic layer does to its weights is no cost of the subnet.
                self._check_complete(supernet.extract(self.space.default()), example)

    def _check_complete(self, module: nn.Module, example: Tensor) -> None:
        """Refuses a network with multiply-adds that the trace does not show, such as a matrix product of its own."""
        with evaluating(module):
            wanted = counted_macs(module, example) // len(example)
        found = self.of(self.space.default())["macs"]
        if found != wanted:
            others = sorted({node.path for node in self.graph.walk() if node.kind == "other"})
            raise InputError(
                f"the network's multiply-adds cannot be counted: its default subnet has {wanted}, its layers have {found}. "
                f"Operations whose costs are not known: {', '.join(others)[:300] or 'none'}. Make them of elastic or "
                "torch's Conv2d and Linear."
            )

    def evaluate(self, rows: NDArray[np.int16]) -> dict[str, NDArray[Any]]:
        """Costs of the subnets ``rows`` ``[n, choices]``: int64 ``[n]`` arrays, float64 for the averages."""
        flow = _Costs(self.space, rows)
        bits = flow.lookup(8 if self.quantized else 32)
        inputs = [Sized(x.dims, bits, x.source) for x in example_inputs(flow, self.graph)]
        flow.run(self.graph, inputs, np.ones(len(rows), dtype=bool))
        result: dict[str, NDArray[Any]] = dict(flow.totals)
        plain = 4 * flow.totals["params"]
        if not self.quantized:
            return {**result, "bytes": plain, "compression": np.ones(len(rows))}
        result["compression"] = plain / np.maximum(flow.totals["bytes"], 1)
        for name, key in (("average_weight_bits", "w"), ("average_activation_bits", "a")):
            result[name] = flow.weighted[f"{key}_bits"] / np.maximum(flow.weighted[key], 1)
        return result

    def of(self, subnet: Mapping[str, Option]) -> dict[str, float]:
        """Costs of one subnet."""
        member = subnet if isinstance(subnet, Subnet) else Subnet(subnet)
        self.space.validate(member)
        return {name: values[0].item() for name, values in self.evaluate(self.space.to_rows([member])).items()}


def counted_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds of a plain model by torch's own counter (which counts two operations each)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return int(counter.get_total_flops()) // 2
