"""What a runtime executes, as data: bits, symmetry, granularity, the rule for sums, and the reasons."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

from nasq.errors import InputError, TargetError, choose_from
from nasq.space import Choice, SearchSpace

__all__ = ["FEATURES", "OPERATORS", "RUNTIMES", "Removal", "Target"]

RUNTIMES = ("onnxruntime", "openvino", "inductor", "torch", "tensorrt", "reference")

OPERATORS = (
    "conv", "linear", "add", "avg_pool", "max_pool", "reshape", "clip", "concat", "slice", "pad", "transpose", "upsample",
    "scale", "table", "constant", "mul", "sub", "matmul", "softmax", "layer_norm",
)  # fmt: skip
_GROUP = re.compile("group[1-9][0-9]*")  # a scale for so many neighbouring inputs of an output
MOST_BITS = 16  # what may be asked for
CONTAINER_BITS = 8  # what the containers of any target hold

# What each feature's options are called; None stands for a number of bits.
FEATURES: Mapping[str, tuple[str, ...] | None] = {
    "weight_bits": None,
    "activation_bits": None,
    "weight_granularity": ("tensor", "channel"),
    "weight_symmetry": ("symmetric", "asymmetric"),
    "activation_symmetry": ("symmetric", "asymmetric"),
}

_PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "'nasq[openvino]'"}  # import name: what to install

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Removal:
    """One option that a target does not allow; its text is a sentence for the user.

    Attributes:
        feature: Such as ``"weight_symmetry"``.
        option: Such as ``"asymmetric"`` or a number of bits.
        target: Name of the target that does not allow it.
        reason: Why, without a full stop.
        choice: Name of the choice that lost the option; empty where it is that of every layer.
    """

    feature: str
    option: int | str
    reason: str
    target: str = ""
    choice: str = ""

    def __str__(self) -> str:
        where = f"{self.choice}: " if self.choice else ""
        target = self.target or "the target"
        return f"{where}{target} does not take {_spoken(self.feature, [self.option])}: {self.reason}."


@dataclass(frozen=True)
class Target:
    """A runtime that executes quantized subnets, read from a data file.

    Attributes:
        name: Unique; the data file is called ``<name>.toml``.
        description: One sentence.
        runtime: What runs the exported file: one of :data:`RUNTIMES`; ``"reference"`` is nasq's own integers.
        weight_bits, activation_bits: Allowed bit-widths, ascending.
        weight_granularity: What may share one weight scale: ``"tensor"``, ``"channel"``, ``"group"`` (of inputs of an output
            of a linear layer, of any size: options are called ``"group32"``).
        weight_symmetry, activation_symmetry: ``"symmetric"``, ``"asymmetric"`` (a zero-point other than the middle).
        add: Where a sum is rounded: ``"both"`` inputs are quantized, or ``"one"`` (the shortcut alone).
        container: Type that holds activations in the file: ``"uint8"``.
        operators: Operations of :mod:`nasq.quant.program` it executes.
        exact: Whether the runtime's integers equal the reference's. Without, a layer may differ in 1 of 1,000 integers, by
            one step, where the exact value lies at a rounding tie, and final integers are compared by the class they name.
        packed: Whether the runtime folds away the nodes that unpack weights of fewer than 8 bits.
        executes: Whether nasq can write, run and check files for it; the reason why not is ``refused["execution"]``.
        session: Options its sessions are opened with.
        slow: What runs slower than fp32, with the measured figure, by ``feature:option``.
        refused: Why something is not allowed, by ``feature:option``, or by ``feature`` for all its other options.
        evidence: How these facts were measured.
    """

    name: str
    description: str
    runtime: str
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    weight_granularity: tuple[str, ...]
    weight_symmetry: tuple[str, ...]
    activation_symmetry: tuple[str, ...]
    add: str
    container: str
    operators: tuple[str, ...]
    exact: bool = True
    packed: bool = True
    executes: bool = True
    session: Mapping[str, Scalar | tuple[str, ...]] = field(default_factory=dict, hash=False)
    slow: Mapping[str, str] = field(default_factory=dict, hash=False)
    refused: Mapping[str, str] = field(default_factory=dict, hash=False)
    evidence: str = ""

    def allow(self, feature: str, options: Iterable[Scalar]) -> tuple[tuple[int | str, ...], list[Removal]]:
        """Splits ``options`` of a feature into those the target executes and those it does not, with reasons.

        Args:
            feature: ``weight_bits``, ``activation_bits``, ``weight_granularity``, ``weight_symmetry`` or
                ``activation_symmetry``.
            options: Bit-widths or names; repeated ones count once.

        Returns:
            The kept options in the given order, and one :class:`Removal` for each of the others.

        Raises:
            InputError: An unknown feature or option, a bit-width outside 1..16, or no option at all.
            TargetError: Nothing is kept; says what the target allows.
        """
        if feature not in FEATURES:
            raise choose_from("feature of a target", feature, FEATURES)
        wanted = _wanted(feature, options)
        allowed: tuple[int | str, ...] = getattr(self, feature)
        kept = tuple(option for option in wanted if _listed(option) in allowed)
        removed = [
            Removal(feature, option, self._reason(feature, option), self.name)
            for option in wanted
            if _listed(option) not in allowed
        ]
        if not kept:
            reasons = "; ".join(dict.fromkeys(removal.reason for removal in removed))
            raise TargetError(
                f"the target {self.name!r} cannot run {_spoken(feature, wanted)}: {reasons}. "
                f"Allowed {feature}: {', '.join(map(str, allowed))}."
            )
        return kept, removed

    def restrict(
        self, space: SearchSpace, features: Mapping[str, str] | None = None
    ) -> tuple[SearchSpace, tuple[Removal, ...]]:
        """The part of a space that the target executes, and what was taken away.

        Args:
            space: Choices of bits, granularity and symmetry are known by the end of their names, such as
                ``layer1.conv.weight_bits``; all others stay as they are.
            features: The feature of choices with names of their own, such as ``{"bits": "weight_bits"}``.

        Returns:
            The sub-space, and one :class:`Removal` per choice and option that is gone.

        Raises:
            InputError: ``features`` names a choice that the space does not have, or an unknown feature.
            TargetError: A choice keeps no option; names the choice and says what the target allows.
        """
        known = {choice.name: choice.name.rpartition(".")[2] for choice in space.choices}
        for name in features or {}:
            if name not in known:
                raise choose_from("choice", name, known)
        known |= features or {}
        kept: dict[str, tuple[int | str, ...]] = {}
        gone: list[Removal] = []
        for choice in space.choices:
            feature = known[choice.name]
            if feature in FEATURES or choice.name in (features or {}):
                kept[choice.name], lost = self._allow_at(choice, feature)
                gone += [replace(removal, choice=choice.name) for removal in lost]
        return (space.restrict(kept) if gone else space), tuple(gone)

    def _allow_at(self, choice: Choice, feature: str) -> tuple[tuple[int | str, ...], list[Removal]]:
        try:
            return self.allow(feature, choice.options)
        except TargetError as error:
            raise TargetError(f"the choice {choice.name!r} keeps no option: {error}") from error

    def unusable(self) -> str:
        """Why nasq cannot run this target's files on this machine, with what to do; empty where it can."""
        if not self.executes:
            return self.refused["execution"]
        if self.runtime in _PACKAGES and find_spec(self.runtime) is None:
            return f"not installed: pip install {_PACKAGES[self.runtime]}"
        if self.runtime == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
            return "no C++ compiler: apt-get install g++, or name one in the environment variable CXX"
        return ""

    def _reason(self, feature: str, option: int | str) -> str:
        option = _listed(option)
        fallback = f"the target lists only {', '.join(map(str, getattr(self, feature)))}"
        return self.refused.get(f"{feature}:{option}") or self.refused.get(feature) or fallback


def _wanted(feature: str, options: Iterable[Scalar]) -> list[int | str]:
    known = FEATURES[feature]
    if isinstance(options, str) or not isinstance(options, Iterable):
        raise InputError(f"the options of {feature} are {options!r}. Give several in a tuple: ({options!r},).")
    wanted = list(dict.fromkeys(_bits(feature, o) if known is None else _named(feature, o, known) for o in options))
    if not wanted:
        raise InputError(f"{feature} was given no options. Give at least one.")
    return wanted


def _bits(feature: str, option: object) -> int:
    if isinstance(option, bool) or not hasattr(option, "__index__") or not 1 <= option.__index__() <= MOST_BITS:
        raise InputError(f"{feature} is {option!r}. Allowed: whole numbers from 1 to {MOST_BITS}.")
    return int(option.__index__())


def _named(feature: str, option: object, known: tuple[str, ...]) -> str:
    if feature == "weight_granularity" and isinstance(option, str) and _GROUP.fullmatch(option):
        return option
    if not isinstance(option, str) or option not in known:
        hint = "Groups of inputs are called by their size: 'group32'." if feature == "weight_granularity" else ""
        raise choose_from(feature.replace("_", " "), str(option), known, hint)
    return option


def _listed(option: int | str) -> int | str:
    """What a target's lists call an option: groups of inputs of any size are one entry."""
    return "group" if _GROUP.fullmatch(str(option)) else option


def _spoken(feature: str, options: list[int | str]) -> str:
    """A feature's options as words: ``asymmetric weights``, ``1-bit and 9-bit activations``."""
    subject, _, aspect = feature.partition("_")
    if aspect == "bits":
        return f"{' and '.join(f'{option}-bit' for option in options)} {subject}s"
    if aspect == "granularity":
        names = (re.sub(r"^group(\d+)$", r"group of \1 inputs", str(option)) for option in options)
        return f"{subject} scales per {' and per '.join(names)}"
    return f"{' and '.join(map(str, options))} {subject}s"
