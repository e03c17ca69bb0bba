"""Which weights speak for which option of a choice.

An option owns what reads it: a branch of :class:`nasq.elastic.OneOf` owns its operator's weights; a depth owns the blocks
that it switches on; a width or kernel owns the active slice of the weights it sizes; a bit-width owns the weights of the
layer whose numbers it rounds. An option that owns no weights (a pooling, an identity) has no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from nasq.elastic.base import Container, ElasticModule, Size
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.producers import LayerProducer, Producer
from nasq.space import Choice, Option, value_of

__all__ = ["Owned", "owned_weights"]


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
