"""``vit_primitives``: a vision transformer whose linear layers multiply, shift or add.

Source: ShiftAddViT (You et al., NeurIPS 2023), which replaces the multiplications of trained vision transformers by
shifts and additions; here each linear layer of each block chooses. The sizes are DeiT-Ti's (Touvron et al. 2021): 12
blocks, 192 features, 3 heads. Size: 3^72 = 2.25e34 subnets. Published: up to 5.18 times lower latency on GPUs and 42.9 %
less energy than the transformers they start from. Default data: ``image_folder`` (ImageNet, 224 x 224).

The primitives compute ``y = x V^T + b`` with a ``V`` made of the layer's weight ``W`` (``[out, in]``), which all of them
share, as they do where a trained network is rewritten:

========= ============================================================ =====================================
primitive ``V``                                                        what the hardware does per weight
========= ============================================================ =====================================
``mult``  ``W``                                                        multiply, add
``shift`` ``sign(W) 2^P``, ``P = clip(rne(log2 |W|), -15, 0)``          shift, add (DeepShift-Q, Elhoushi et al. 2021)
``add``   ``mean_in |W| sign(W)``: one factor per output                add or subtract (binary weights,
                                                                        Rastegari et al. 2016, eq. 6)
========= ============================================================ =====================================

``sign(0)`` is 1. Gradients pass to ``W`` unchanged (straight-through).

Where we differ: ShiftAddViT lets every token choose an expert (multiplication or shift) for its MLP, and adds where
queries meet keys, whose signs it takes; here the layer chooses, and the products of attention stay multiplications.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq import Choice, Supernet, elastic
from nasq.cost import CostModel
from nasq.elastic.base import Size
from nasq.elastic.flow import Flow, example_inputs
from nasq.elastic.graph import Node
from nasq.elastic.rules import Bools, Sized, work_rule
from nasq.errors import InputError, choose_from
from nasq.plugins import search_space
from nasq.space import Lookup

from .autoformer import Block, Mlp, Patches, initialise

__all__ = ["COSTS", "PRIMITIVES", "PrimitiveCost", "PrimitiveLinear", "UnitCost", "VitPrimitives", "vit_primitives"]

PRIMITIVES = ("mult", "shift", "add")
"""The primitives, in the order of the choices' options."""
LOWEST = -15
"""Smallest exponent of a shift: a sign and 16 exponents are five bits."""


class _StraightThrough(torch.autograd.Function):
    """The second tensor, with the gradients of the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _signs(weight: Tensor) -> Tensor:
    return torch.where(weight < 0, -1.0, 1.0).to(weight.dtype)


def shifts(weight: Tensor) -> Tensor:
    """The weight rounded to powers of two: ``sign(W) 2^clip(rne(log2 |W|), -15, 0)``."""
    exponents = weight.abs().log2().round().clamp(LOWEST, 0)
    return _signs(weight) * torch.exp2(exponents)


def signs(weight: Tensor) -> Tensor:
    """The weight rounded to one size per output: ``mean_in |W| sign(W)``."""
    return weight.abs().mean(1, keepdim=True) * _signs(weight)


_FORMS: Mapping[str, Callable[[Tensor], Tensor]] = {"shift": shifts, "add": signs}


class PrimitiveLinear(elastic.Linear):
    """A linear layer that chooses its primitive; see the module's docstring.

    Extraction gives a :class:`torch.nn.Linear` with the weights ``V``: train before it.

    Args:
        in_features, out_features: Sizes.
        primitive: The decision, with options among :data:`PRIMITIVES`.
        bias: Whether a bias is added.

    Raises:
        InputError: An option is no primitive.
    """

    def __init__(self, in_features: Size, out_features: Size, primitive: Choice, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        for option in primitive.options:
            if option not in PRIMITIVES:
                raise choose_from(f"primitive in {primitive.name!r}", str(option), PRIMITIVES)
        self.primitive = primitive
        self.holds(primitive)

    def active_weight(self) -> Tensor:
        """The active slice ``[out, in]`` of ``V``."""
        weight, form = super().active_weight(), _FORMS.get(str(self.option(self.primitive)))
        if form is None:
            return weight
        with torch.no_grad():
            value = form(weight)
        through: Tensor = _StraightThrough.apply(weight, value)
        return through


@dataclass(frozen=True)
class UnitCost:
    """What one multiply-add costs as each primitive, in a 45 nm process.

    Attributes:
        energy: Femtojoules by primitive.
        area: Square micrometres of the circuit by primitive.
    """

    energy: Mapping[str, int]
    area: Mapping[str, int]


def _unit(multiply: tuple[int, int], shift: tuple[int, int], add: tuple[int, int]) -> UnitCost:
    """Costs as (energy, area): a multiplication or a shift is followed by an addition, an addition stands alone."""
    pairs = {"mult": multiply, "shift": shift, "add": (0, 0)}
    return UnitCost(*({name: pair[i] + add[i] for name, pair in pairs.items()} for i in (0, 1)))


COSTS: Mapping[str, UnitCost] = {
    "int8": _unit(multiply=(200, 282), shift=(24, 34), add=(100, 137)),
    "int32": _unit(multiply=(3100, 3495), shift=(130, 157), add=(100, 137)),
}
"""Unit costs by the width of the operands; sums are 32 bit wide in both.

Energies of multiplications and additions: Horowitz (ISSCC 2014), integers in 45 nm at 0.9 V: 0.2 and 3.1 pJ, 0.1 pJ. Of
shifts: 0.024 and 0.13 pJ, as in ShiftAddViT's released energy model (``get_unit_energy``; that one takes
fp32 for its 32 bits, 3.7 and 0.9 pJ, no addition behind a multiplication or a shift, and 8-bit additions of 0.03 pJ; sums of
8-bit products need 32 bits). Areas: ShiftAddViT, table 1, from memory: only the energies were compared with a source. The
factor per output of ``add`` is part of rescaling the output, as every layer does.
"""


class _Weighted(Flow):
    """Adds up multiply-adds, each times the unit cost of its layer's primitive."""

    def __init__(self, *args: Any, units: Mapping[str, int]) -> None:
        super().__init__(*args)
        self.units = units
        self.total = np.zeros(self.count, dtype=np.int64)

    def visit(self, node: Node, inputs: list[Sized], output: Sized, running: Bools) -> None:
        rule = work_rule(node.kind)
        work = rule(self, node, inputs, output) if rule is not None else None
        if work is None:
            return
        unit: Size = self.units["mult"]
        if isinstance(node.module, PrimitiveLinear):
            primitive = node.module.primitive
            unit = Lookup(primitive, {option: self.units[str(option)] for option in primitive.options})
        self.total += np.where(running, work.macs * self.lookup(unit), 0)


class PrimitiveCost:
    """Energy and latency of subnets by what their primitives cost in silicon: a model, not a measurement.

    Energy is that of the arithmetic alone: multiply-adds times :class:`UnitCost`; memory, softmax, normalisation and
    activation functions are left out. Latency is what a chip would take that fills a fixed area with the circuits a
    subnet needs, all of them always at work: ``sum(multiply-adds * area of one) / (area of the chip * clock)``.

    Args:
        supernet: Of a network with :class:`PrimitiveLinear` layers; other layers multiply.
        example: An input ``[N, ...]``; not needed for a quantized network.
        operands: ``"int8"`` or ``"int32"``.
        chip: Area for arithmetic, in square millimetres.
        clock: In megahertz; one multiply-add per circuit and cycle.

    Raises:
        InputError: The operands are unknown, or the chip or the clock is not positive.
    """

    def __init__(
        self,
        supernet: Supernet,
        example: Tensor | None = None,
        operands: Literal["int8", "int32"] = "int8",
        chip: float = 1.0,
        clock: float = 500.0,
    ) -> None:
        if operands not in COSTS:
            raise choose_from("width of the operands", str(operands), COSTS)
        if not (chip > 0 and clock > 0):
            raise InputError(f"the chip has {chip} mm^2 and a clock of {clock} MHz. Give positive numbers.")
        self.space, self.graph = supernet.space, CostModel(supernet, example).graph
        self.unit, self.chip, self.clock = COSTS[operands], chip, clock

    def _sum(self, rows: NDArray[np.int16], units: Mapping[str, int]) -> NDArray[np.float64]:
        flow = _Weighted(self.space, rows, units=units)
        flow.run(self.graph, example_inputs(flow, self.graph), np.ones(len(rows), dtype=bool))
        return flow.total.astype(np.float64)

    def energy(self, rows: NDArray[np.int16]) -> NDArray[np.float64]:
        """Microjoules per image of the subnets ``rows`` ``[n, choices]``; the function of an objective on rows."""
        return self._sum(rows, self.unit.energy) * 1e-9

    def latency(self, rows: NDArray[np.int16]) -> NDArray[np.float64]:
        """Microseconds per image of the subnets ``rows`` ``[n, choices]``; the function of an objective on rows."""
        # 1 mm^2 is 1e6 um^2, and 1 MHz is one cycle per microsecond.
        return self._sum(rows, self.unit.area) / (self.chip * 1e6 * self.clock)


class VitPrimitives(nn.Module):
    """Patches, blocks of primitives, layer norm, head; patches and head multiply.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        image_size, patch_size: Sides in pixels.
        embed, heads, depth: Features of a token, heads of each block (which they divide), number of blocks.
        mlp_ratio: Hidden features of the MLPs, as a multiple of ``embed``.

    Raises:
        InputError: Heads do not divide the features, or patches do not fill the image.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        image_size: int,
        patch_size: int,
        embed: int,
        heads: int,
        depth: int,
        mlp_ratio: int,
    ) -> None:
        super().__init__()
        if embed % heads:
            raise InputError(f"{embed} features cannot be shared among {heads} heads. Give heads that divide embed.")
        self.patches = Patches(in_channels, embed, image_size, patch_size)
        self.blocks = nn.Sequential(*(_block(index, embed, heads, mlp_ratio) for index in range(depth)))
        self.norm = elastic.LayerNorm(embed)
        self.head = elastic.Linear(embed, num_classes)
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, image_size, image_size]`` to logits ``[N, num_classes]``."""
        return self.head(self.norm(self.blocks(self.patches(x_NCHW)))[:, 0])  # type: ignore[no-any-return]


def _block(index: int, embed: int, heads: int, mlp_ratio: int) -> Block:
    def linear(name: str, in_features: Size, out_features: Size, bias: bool = True) -> elastic.Linear:
        choice = Choice(f"block{index}.{name}.primitive", PRIMITIVES, ordered=False)
        return PrimitiveLinear(in_features, out_features, choice, bias)

    attention = elastic.MultiheadAttention(embed, heads, embed // heads, linear=linear)
    return Block(
        attention, Mlp(linear("fc1", embed, mlp_ratio * embed), linear("fc2", mlp_ratio * embed, embed)), embed
    )


@search_space(
    source="ShiftAddViT (You et al., NeurIPS 2023) on DeiT-Ti",
    data="image_folder",
    input_shape=(3, 224, 224),
    tiny={"image_size": 16, "patch_size": 8, "embed": 16, "heads": 2, "depth": 2, "mlp_ratio": 2, "num_classes": 10},
    tiny_input_shape=(3, 16, 16),
    published="up to 5.18x lower latency on GPUs, 42.9 % less energy",
)
def vit_primitives(
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    embed: int = 192,
    heads: int = 3,
    depth: int = 12,
    mlp_ratio: int = 4,
) -> VitPrimitives:
    """The space's network; see the module's docstring and :class:`VitPrimitives`."""
    return VitPrimitives(num_classes, in_channels, image_size, patch_size, embed, heads, depth, mlp_ratio)
