"""Elastic quantizers: all forms of one weight or one activation tensor, of which choices pick one.

Only step sizes and zero-points are stored per form (EQ-Net, section 3.1); the weights are shared by all of them. A
decision with a single option is no choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn

from nasq.elastic.base import ElasticModule
from nasq.quant.forms import ActivationForm, WeightForm
from nasq.quant.input_groups import InputGroups, Slices, group_size
from nasq.quant.layers import AnyLayer, slices_of
from nasq.space import Choice, Option

__all__ = ["ActivationQuantizer", "WeightQuantizer"]


class _Quantizer(ElasticModule):
    """Shared bookkeeping: named decisions, of which some are choices."""

    def __init__(self) -> None:
        super().__init__()
        self.decisions: dict[str, Choice | Option] = {}
        self.forms = nn.ModuleDict()
        self.calibrated = False

    def decide(self, key: str, name: str, options: Sequence[Option] | Choice, ordered: bool) -> tuple[Option, ...]:
        """Adds a decision; returns its options. A :class:`Choice` of the caller's own ties it to others."""
        if isinstance(options, Choice):
            choice: Choice | Option = options
        elif len(options) == 1:
            choice = options[0]
        else:
            choice = Choice(name, tuple(options), ordered=ordered)
        self.decisions[key] = choice
        if not isinstance(choice, Choice):
            return (choice,)
        self.holds(choice)
        return choice.options

    def decided(self, key: str) -> Option:
        """The active option of a decision."""
        decision = self.decisions[key]
        return self.option(decision) if isinstance(decision, Choice) else decision


class WeightQuantizer(_Quantizer):
    """All weight quantizers of one layer.

    Args:
        path: Path of the layer; names the choices ``<path>.weight_bits``, ``.weight_granularity``, ``.weight_symmetry``.
        channels: Output channels of the layer's largest form.
        bits: Options in 2..8, ascending, or a choice of yours.
        granularity: Options among ``"tensor"``, ``"channel"`` and, for linear layers, ``"group<g>"``: a step for each ``g``
            neighbouring inputs of an output, as ``"group32"``.
        symmetry: Options among ``"symmetric"`` and ``"asymmetric"``, or a choice of yours; so may granularity.
        released: How gradients of per-channel steps are scaled, see :class:`~nasq.quant.forms.WeightForm`.
        inputs: Input features of the largest form; only groups need them.

    Attributes:
        layer: The layer whose weight it is, if it may use other channels than the first ones.
    """

    def __init__(
        self,
        path: str,
        channels: int,
        bits: Sequence[int] | Choice,
        granularity: Sequence[str] | Choice,
        symmetry: Sequence[str] | Choice,
        released: bool = False,
        inputs: int | None = None,
    ) -> None:
        super().__init__()
        self.layer: Any = None
        all_bits = self.decide("bits", f"{path}.weight_bits", bits, ordered=True)
        grains = self.decide("granularity", f"{path}.weight_granularity", granularity, ordered=False)
        symmetries = self.decide("symmetry", f"{path}.weight_symmetry", symmetry, ordered=False)
        for grain in grains:
            for kind in symmetries:
                for width in all_bits:
                    steps = None if grain == "tensor" else channels
                    form = WeightForm(steps, cast(int, width), kind == "symmetric", released, _groups(grain, inputs))
                    self.forms[f"{grain}_{kind}_{width}"] = form

    def form(self) -> WeightForm:
        """The active form."""
        key = f"{self.decided('granularity')}_{self.decided('symmetry')}_{self.decided('bits')}"
        return cast(WeightForm, self.forms[key])

    def belongs_to(self, layer: AnyLayer) -> None:
        """Remembers the layer, by reference only: it lives where the network put it."""
        object.__setattr__(self, "layer", layer)

    def part(self) -> Slices | None:
        """Which channels of the whole weight are active, where they are not the first ones."""
        return None if self.layer is None else slices_of(self.layer)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """A copy of the active form; the extracted layer slices it to its own channels."""
        form = self.form()
        return form.sliced(form.log_step.shape[0] if form.log_step.ndim else 0, self.part())


def _groups(granularity: Option, inputs: int | None) -> InputGroups | None:
    size = group_size(granularity)
    if size is None:
        return None
    assert inputs is not None, "groups of inputs are for linear layers"
    return InputGroups.of(size, inputs)


class ActivationQuantizer(_Quantizer):
    """All activation quantizers of one tensor.

    Args:
        path: Path of the tensor's producer; names the choices ``<path>.activation_bits`` and ``.activation_symmetry``.
        signed: Whether the tensor holds negative values, decided from the operation that makes it.
        bits: Options in 2..8, ascending, or a choice of yours.
        symmetry: Options among ``"symmetric"`` and ``"asymmetric"``, or a choice of yours; without negative values there
            is only one form, and no choice.
    """

    def __init__(self, path: str, signed: bool, bits: Sequence[int] | Choice, symmetry: Sequence[str] | Choice) -> None:
        super().__init__()
        self.signed = signed
        kinds: Sequence[str] | Choice = symmetry if signed else ("symmetric",)
        all_bits = self.decide("bits", f"{path}.activation_bits", bits, ordered=True)
        symmetries = self.decide("symmetry", f"{path}.activation_symmetry", kinds, ordered=False)
        for kind in symmetries:
            for width in all_bits:
                self.forms[f"{kind}_{width}"] = ActivationForm(cast(int, width), signed, kind == "symmetric")

    def form(self) -> ActivationForm:
        """The active form."""
        return cast(ActivationForm, self.forms[f"{self.decided('symmetry')}_{self.decided('bits')}"])

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """A copy of the active form."""
        return self.form().copied()
