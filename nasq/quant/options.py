"""What a call of ``quantize`` asks for, checked against what quantizers and the target can do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

from torch import nn

from nasq.elastic.graph import Node
from nasq.errors import InputError, TargetError
from nasq.quant.input_groups import group_size
from nasq.quant.pinning import Nodes, Pinned
from nasq.quant.quantizers import WeightQuantizer
from nasq.space import Choice
from nasq.targets import Removal, Target

__all__ = ["Bits", "Kinds", "Plan"]

Bits = Sequence[int] | Choice
Kinds = Sequence[str] | Choice

_OPERATORS = {
    "conv": "conv", "norm": "conv", "linear": "linear", "add": "add", "avg_pool": "avg_pool", "concat": "concat",
    "max_pool": "max_pool", "reshape": "reshape", "relu": "clip", "relu6": "clip", "slice": "slice", "pad": "pad",
    "unary": "table", "mul": "mul", "sub": "sub", "matmul": "matmul", "relative_position": "matmul", "softmax": "softmax",
    "layer_norm": "layer_norm", "group_norm": "layer_norm", "permute": "transpose", "view": "reshape", "mean": "avg_pool",
    "split_heads": "reshape", "parameter": "constant", "select": "slice", "scale": "scale", "upsample": "upsample",
    "resize": "matmul",
}  # fmt: skip


def _is_width(bits: object) -> bool:
    # What of these a target runs, and why not the others, is for the target to say.
    return isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 16


def _check_bits(name: str, bits: object) -> None:
    if isinstance(bits, str) or not isinstance(bits, Choice | Iterable):
        raise InputError(f"{name} is {bits!r}. Give several in a tuple: ({bits!r},).")
    options = list(bits.options if isinstance(bits, Choice) else bits)
    if not options or not all(map(_is_width, options)):
        raise InputError(f"{name} are {options}; allowed are whole numbers from 1 to 16.")


def _check_pinned(name: str, bits: object, target: Target, features: Sequence[str]) -> None:
    if bits is None:
        return
    if not _is_width(bits):
        raise InputError(f"{name} is {bits!r}; allowed are whole numbers from 1 to 16, or None.")
    for feature in features:
        allowed = getattr(target, feature)
        if bits not in allowed:
            raise TargetError(
                f"{name} is {bits}, and the target {target.name!r} takes only {', '.join(map(str, allowed))} "
                f"as {feature}. Choose one of these, or None to make them choices as well."
            )


@dataclass
class Plan:
    """The decisions of one call, shared by all parts of the network.

    Attributes:
        target: What is to run the network.
        weight_bits, activation_bits, granularity, weight_symmetry, activation_symmetry: What quantizers may choose from.
        first_last_bits: Bits of what is pinned; ``None``: nothing is.
        sum_bits: Bits of the tensors that sums read and make; ``None``: those of all others.
        where: Patterns of the paths that have choices; ``None``: all do.
        released_gradient: Whether per-channel steps have the gradient scale of EQ-Net's released code.
        pinned: What keeps its bits.
        stream: The tensors that sums read and make, where they have bits of their own.
        weights: The quantizers made so far, by their layer.
        removed: The options the target does not allow, with the reasons.
    """

    target: Target
    weight_bits: Bits
    activation_bits: Bits
    granularity: Kinds
    weight_symmetry: Kinds
    activation_symmetry: Kinds
    first_last_bits: int | None
    sum_bits: int | None = None
    where: Sequence[str] | None = None
    released_gradient: bool = False
    pinned: Pinned = field(default_factory=Pinned)
    stream: Nodes = frozenset()
    weights: dict[nn.Module, WeightQuantizer] = field(default_factory=dict)
    removed: list[Removal] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if isinstance(self.where, str):
            raise InputError(f"where is {self.where!r}. Give several patterns in a tuple: ({self.where!r},).")
        for name in ("weight_bits", "activation_bits"):
            _check_bits(name, getattr(self, name))
        _check_pinned("first_last_bits", self.first_last_bits, self.target, ("weight_bits", "activation_bits"))
        _check_pinned("sum_bits", self.sum_bits, self.target, ("activation_bits",))
        self.weight_bits = self._allowed_bits("weight_bits", self.weight_bits)
        self.activation_bits = self._allowed_bits("activation_bits", self.activation_bits)
        self.granularity = self._allowed("weight_granularity", self.granularity)
        self.weight_symmetry = self._allowed("weight_symmetry", self.weight_symmetry)
        self.activation_symmetry = self._allowed("activation_symmetry", self.activation_symmetry)

    def bits(self, wanted: Bits, pinned: bool, path: str) -> Bits:
        """``wanted``; or the only option of what is pinned, and the largest of what ``where`` leaves out."""
        if pinned and self.first_last_bits is not None:
            return (self.first_last_bits,)
        if self.chosen(path):
            return wanted
        return (max(cast("Sequence[int]", wanted.options if isinstance(wanted, Choice) else wanted)),)

    def kinds(self, wanted: Kinds, path: str) -> Kinds:
        """``wanted``, or the first option of what ``where`` leaves out."""
        if self.chosen(path):
            return wanted
        return cast("Sequence[str]", wanted.options if isinstance(wanted, Choice) else wanted)[:1]

    def grains(self, path: str, linear: bool) -> Kinds:
        """The granularities of a layer's weight: groups of inputs are for linear layers alone.

        Raises:
            InputError: No other granularity is left for a convolution; names it.
        """
        if linear:
            return self.kinds(self.granularity, path)
        every = self.granularity.options if isinstance(self.granularity, Choice) else self.granularity
        groups = [str(option) for option in every if group_size(option) is not None]
        left = tuple(str(option) for option in every if group_size(option) is None)
        if not groups:
            return self.kinds(self.granularity, path)
        if isinstance(self.granularity, Choice):
            raise InputError(
                f"the choice {self.granularity.name!r} ties the granularity of all layers and has the option {groups[0]!r}, "
                f"which the convolution {path!r} cannot take: groups of inputs are for linear layers. Give options instead "
                f"of a choice, and 'channel' or 'tensor' among them."
            )
        if not left:
            raise InputError(
                f"weight_granularity is {groups}, and the layer {path!r} is a convolution: groups of inputs are for linear "
                f"layers. Give 'channel' or 'tensor' as well; convolutions then take these alone."
            )
        self._told(groups)
        return left if self.chosen(path) else left[:1]

    def _told(self, groups: Sequence[str]) -> None:
        """Lists the groups among what was removed, once."""
        reason = "groups of inputs are for linear layers, and convolutions keep the other options"
        gone = [Removal("weight_granularity", group, reason, "a convolution") for group in groups]
        self.removed.extend(removal for removal in gone if removal not in self.removed)

    def chosen(self, path: str) -> bool:
        """Whether what is at ``path`` has choices."""
        self.paths.add(path)
        return self.where is None or any(fnmatchcase(path, pattern) for pattern in self.where)

    def check_patterns(self) -> None:
        """Raises where a pattern of ``where`` fits nothing.

        Raises:
            InputError: Names the pattern and some paths.
        """
        for pattern in self.where or ():
            if not any(fnmatchcase(path, pattern) for path in self.paths):
                raise InputError(
                    f"the pattern {pattern!r} of where fits no layer and no tensor. Paths here: "
                    f"{', '.join(sorted(self.paths)[:8])}, ... Patterns are those of file names: 'layer3.*'."
                )

    def check_operator(self, node: Node) -> None:
        """Raises where the target cannot run a traced operation.

        Raises:
            TargetError: It lacks the operator; names the path.
        """
        operator, target = _OPERATORS.get(node.kind), self.target
        if operator is not None and operator not in target.operators:
            raise TargetError(
                f"{node.path!r} needs the operator {operator!r}, which the target {target.name!r} does not have. It has: "
                f"{', '.join(target.operators)}. Replace the operation, or choose another target."
            )

    def _allowed(self, feature: str, options: Kinds) -> Kinds:
        if isinstance(options, Choice):
            self._check_choice(feature, options)
            return options
        kept, gone = self.target.allow(feature, options)
        self.removed.extend(gone)
        return cast("Sequence[str]", kept)

    def _check_choice(self, feature: str, choice: Choice) -> None:
        """A choice of the caller's own stays as it is, so every option of it must run."""
        gone = self.target.allow(feature, choice.options)[1]
        if gone:
            raise InputError(
                f"the choice {choice.name!r} has an option that target {self.target.name!r} refuses: {gone[0]} "
                "Take it out of the choice, or choose another target."
            )

    def _allowed_bits(self, feature: str, bits: Bits) -> Bits:
        if isinstance(bits, Choice):
            self._check_choice(feature, bits)
            return bits
        kept, gone = self.target.allow(feature, bits)
        self.removed.extend(gone)
        # Ascending, whatever the order given: the largest subnet takes the last option.
        return tuple(sorted(cast("Sequence[int]", kept)))
