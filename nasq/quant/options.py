"""What a call of ``quantize`` asks for, checked against what quantizers and the target can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from nasq.elastic.graph import Graph, Node
from nasq.errors import InputError, TargetError
from nasq.quant.pinning import Pinned
from nasq.quant.quantizers import WeightQuantizer
from nasq.space import Choice
from nasq.targets import Removal, Target

__all__ = ["Bits", "Plan", "check_supported"]

Bits = Sequence[int] | Choice

_OPERATORS = {
    "conv": "conv", "norm": "conv", "linear": "linear", "add": "add", "avg_pool": "avg_pool", "concat": "concat",
    "max_pool": "max_pool", "reshape": "reshape", "relu": "clip", "relu6": "clip",
}  # fmt: skip


def _is_width(bits: object) -> bool:
    return isinstance(bits, int) and not isinstance(bits, bool) and 2 <= bits <= 8


def _check_bits(name: str, bits: object) -> None:
    if isinstance(bits, str) or not isinstance(bits, Choice | Iterable):
        raise InputError(f"{name} is {bits!r}. Give several in a tuple: ({bits!r},).")
    options = list(bits.options if isinstance(bits, Choice) else bits)
    if not options or not all(map(_is_width, options)):
        raise InputError(f"{name} are {options}; allowed are whole numbers from 2 to 8.")


def _check_pinned(bits: object, target: Target) -> None:
    if bits is None:
        return
    if not _is_width(bits):
        raise InputError(f"first_last_bits is {bits!r}; allowed are whole numbers from 2 to 8, or None.")
    for feature in ("weight_bits", "activation_bits"):
        allowed = getattr(target, feature)
        if bits not in allowed:
            raise TargetError(
                f"first_last_bits is {bits}, and the target {target.name!r} takes only {', '.join(map(str, allowed))} "
                f"as {feature}. Choose one of these, or None to make them choices as well."
            )


def check_supported(graph: Graph) -> None:
    """Raises where an operation has no integer form.

    Raises:
        InputError: Names it with its path.
    """
    for node in graph.walk():
        if node.kind == "other":
            raise _unsupported(node)


def _unsupported(node: Node) -> InputError:
    what = type(node.module).__name__ if node.module is not None else node.attributes["call"]
    return InputError(
        f"{what} at {node.path!r} has no integer form yet. Supported: Conv2d, Linear, BatchNorm2d, ReLU, ReLU6, sums and "
        "concatenations (dim 1) of two tensors, MaxPool2d, AvgPool2d and global average pooling without padding, "
        "flatten, Dropout, OneOf, Repeat. Replace it, or leave the part out of quantization."
    )


@dataclass
class Plan:
    """The decisions of one call, shared by all parts of the network.

    Attributes:
        target: What is to run the network.
        weight_bits, activation_bits, granularity, weight_symmetry, activation_symmetry: What quantizers may choose from.
        first_last_bits: Bits of what is pinned; ``None``: nothing is.
        pinned: What keeps its bits.
        weights: The quantizers made so far, by their layer.
        removed: The options the target does not allow, with the reasons.
    """

    target: Target
    weight_bits: Bits
    activation_bits: Bits
    granularity: Sequence[str]
    weight_symmetry: Sequence[str]
    activation_symmetry: Sequence[str]
    first_last_bits: int | None
    pinned: Pinned = field(default_factory=Pinned)
    weights: dict[nn.Module, WeightQuantizer] = field(default_factory=dict)
    removed: list[Removal] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            _check_bits(name, getattr(self, name))
        _check_pinned(self.first_last_bits, self.target)
        self.weight_bits = self._allowed_bits("weight_bits", self.weight_bits)
        self.activation_bits = self._allowed_bits("activation_bits", self.activation_bits)
        self.granularity = self._allowed("weight_granularity", self.granularity)
        self.weight_symmetry = self._allowed("weight_symmetry", self.weight_symmetry)
        self.activation_symmetry = self._allowed("activation_symmetry", self.activation_symmetry)

    def bits(self, wanted: Bits, pinned: bool) -> Bits:
        """``wanted``, or the only option of what is pinned."""
        return (self.first_last_bits,) if pinned and self.first_last_bits is not None else wanted

    def check_operator(self, node: Node) -> None:
        """Raises where the target cannot run a traced operation.

        Raises:
            TargetError: It lacks the operator, or follows a rule for sums that nasq does not compute; names the path.
        """
        operator, target = _OPERATORS.get(node.kind), self.target
        if operator is not None and operator not in target.operators:
            raise TargetError(
                f"{node.path!r} needs the operator {operator!r}, which the target {target.name!r} does not have. It has: "
                f"{', '.join(target.operators)}. Replace the operation, or choose another target."
            )
        if operator == "add" and target.add != "both":
            raise TargetError(
                f"{node.path!r} is a sum, and the target {target.name!r} rounds sums by the rule add={target.add!r}, which "
                "nasq does not compute yet. Choose a target whose rule is 'both', such as 'onnxruntime-cpu'."
            )

    def _allowed(self, feature: str, options: Sequence[str]) -> Sequence[str]:
        kept, gone = self.target.allow(feature, options)
        self.removed.extend(gone)
        return cast("Sequence[str]", kept)

    def _allowed_bits(self, feature: str, bits: Bits) -> Bits:
        kept, gone = self.target.allow(feature, bits.options if isinstance(bits, Choice) else bits)
        if isinstance(bits, Choice):
            if gone:
                raise InputError(
                    f"the choice {bits.name!r} has an option that target {self.target.name!r} refuses: {gone[0]}"
                )
            return bits
        self.removed.extend(gone)
        # Ascending, whatever the order given: the largest subnet takes the last option.
        return tuple(sorted(cast("Sequence[int]", kept)))
