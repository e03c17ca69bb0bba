"""Which weights speak for which option of a choice.

An option owns what reads it: a branch of :class:`nasq.elastic.OneOf` owns its operator's weights; a depth owns the blocks
that it switches on; a width or kernel owns the active slice of the weights it sizes; a bit-width owns the weights of the
layer whose numbers it rounds. An option that owns no weights (a pooling, an identity) has no gradient of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nasq.elastic.base import Container, ElasticModule, Size
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.producers import LayerProducer, Producer
from nasq.space import Choice, Option, value_of

__all__ = ["Owned", "OwnedNorms", "owned_weights", "sent"]


@dataclass(frozen=True)
class Owned:
    """Weights that speak for an option of a choice.

    Attributes:
        choice: Its name.
        option: The option they belong to; ``None``: whichever is active.
        parameters: The weights, in the order of the module.
        sized: The elastic module whose active slice counts: its gradient norm is divided by the root of the number of
            active elements, since otherwise the largest option always had the largest norm. ``None``: the plain norm.
        per_element: Whether the norm is divided by the root of the number of elements (blocks behind a depth).
    """

    choice: str
    option: Option | None
    parameters: tuple[nn.Parameter, ...]
    sized: ElasticModule | None = None
    per_element: bool = field(default=False)

    def elements(self, subnet: Mapping[str, Option]) -> int:
        """What the squared norm is divided by in ``subnet``."""
        if self.sized is not None:

            def lookup(size: Size) -> int:
                return size if isinstance(size, int) else value_of(size, subnet)

            return max(1, int(self.sized.cost_parameters(lookup)))
        return sum(parameter.numel() for parameter in self.parameters) if self.per_element else 1


def _weights(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """The weights below ``module``; step sizes are not weights."""
    steps = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, (WeightForm, ActivationForm))
        for parameter in part.parameters()
    }
    return tuple(
        parameter for parameter in module.parameters() if parameter.requires_grad and id(parameter) not in steps
    )


def _branches(container: Container) -> Iterator[Owned]:
    """The parts of a container belong to the option that switches them on."""
    own = {choice.name: choice for choice in container.own_choices}
    exclusive = container.layout == "parallel"
    for index, (_, part) in enumerate(container.parts()):
        parameters = _weights(part)
        condition = dict(container.condition(index))
        for name, choice in own.items():
            allowed = condition.get(name, frozenset(choice.options))
            first = next((option for option in choice.options if option in allowed), None)
            if not parameters or first is None:
                continue
            if exclusive:
                yield from (Owned(name, first, (parameter,)) for parameter in parameters)
            else:
                yield Owned(name, first, parameters, per_element=True)


def _slices(module: ElasticModule) -> Iterator[Owned]:
    parameters = tuple(parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad)
    if parameters:
        yield from (Owned(choice.name, None, parameters, sized=module) for choice in module.own_choices)


def _rounded(producer: Producer) -> Iterator[Owned]:
    """Bit-widths, granularities and symmetries of a layer's weights and of the tensor it makes."""
    if not isinstance(producer, LayerProducer):
        return
    parameters = tuple(parameter for parameter in producer.layer.parameters() if parameter.requires_grad)
    for quantizer in (producer.weight_quantizer, producer.quantizer):
        decisions = getattr(quantizer, "decisions", {})
        for choice in decisions.values():
            if isinstance(choice, Choice) and parameters:
                yield from (Owned(choice.name, None, (parameter,)) for parameter in parameters)


def owned_weights(root: nn.Module) -> list[Owned]:
    """What every option of every choice below ``root`` owns; options that own nothing are absent."""
    found: list[Owned] = []
    for module in root.modules():
        if isinstance(module, Container):
            found.extend(_branches(module))
        elif isinstance(module, Producer):
            found.extend(_rounded(module))
        elif isinstance(module, ElasticModule):
            found.extend(_slices(module))
    return found


class OwnedNorms:
    """Reads the gradient norms of a path's options with a handful of operations on the device.

    Args:
        owned: What options own.
        places: Where the statistic of (choice, option) is kept.
    """

    def __init__(self, owned: Sequence[Owned], places: Mapping[tuple[str, Option], int]) -> None:
        self.places = places
        self.by_item: dict[tuple[str, Option | None], list[Owned]] = {}
        for one in owned:
            self.by_item.setdefault((one.choice, one.option), []).append(one)

    def norms(self, subnet: Mapping[str, Option]) -> tuple[Tensor, Tensor] | None:
        """Entries (int64 ``[m]``, distinct) and their norms ``[m]``; ``None`` where no option has a gradient."""
        gradients: list[Tensor] = []
        parts: list[int] = []  # of each gradient: the part it belongs to
        entries: list[int] = []  # of each part: its entry
        scales: list[float] = []
        used: dict[int, int] = {}
        for item in subnet.items():
            entry = self.places[item]
            used[entry] = used.get(entry, 0) + 1
            for one in (*self.by_item.get(item, ()), *self.by_item.get((item[0], None), ())):
                found = [p.grad for p in one.parameters if p.grad is not None]
                if found:
                    parts.extend([len(entries)] * len(found))
                    gradients.extend(found)
                    entries.append(entry)
                    scales.append(1 / math.sqrt(one.elements(subnet)))
        if not gradients:
            return None
        device = gradients[0].device
        # CUDA adds in any order: in float64 that leaves no trace in the fp32 result.
        kind = torch.float64 if device.type == "cuda" else torch.float32
        squares = torch.stack(torch._foreach_norm(gradients)).to(kind).square()
        norms = torch.zeros(len(entries), dtype=kind, device=device).index_add_(0, sent(parts, device), squares).sqrt()
        distinct = sorted(set(entries))
        order = {entry: index for index, entry in enumerate(distinct)}
        at = sent([order[entry] for entry in entries], device)
        shares = norms * sent(scales, device)
        sums = torch.zeros(len(distinct), dtype=kind, device=device).index_add_(0, at, shares.to(kind))
        # An option that several tied choices have in one path is averaged over them, as published.
        counts = sent([used[entry] for entry in distinct], device)
        return sent(distinct, device), (sums / counts).float()


def sent(values: Sequence[float], device: torch.device) -> Tensor:
    """Numbers on the device, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)
