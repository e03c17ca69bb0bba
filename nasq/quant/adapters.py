"""Frozen weights per bit-width with low-rank adapters of their own (LLM-QFA), for linear layers.

EQ-Net shares one weight among all bit-widths and trains it; here every bit-width of a layer has a frozen weight of its
own and a small trained correction, so that bit-widths do not disturb each other (One QuantLLM for ALL, ACL 2025). With
group size ``g``, a layer of ``b`` bits computes

    y = (alpha q + beta) x + s B A pool(x) + bias,        q in 0..2^b - 1,

``alpha`` and ``beta`` per output and group of ``g`` inputs, ``pool`` the sum over each group (QA-LoRA, Xu et al. 2024).
The adapter is constant inside a group, so it merges into ``beta`` exactly: ``beta + s B A``. We merge in every forward
pass, which gives the same number, keeps one product per layer, and makes an extracted layer equal bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nasq.elastic.base import evaluating
from nasq.elastic.containers import OneOf
from nasq.elastic.linear import Linear
from nasq.errors import InputError
from nasq.quant.groups import Grouped, gptq, round_to_nearest
from nasq.space import Choice, SearchSpace

__all__ = ["Adapter", "LowBitLinear", "adapter_parameters", "bits_of", "separate_bits", "stored_bytes"]

BITS = range(1, 9)


class Adapter(nn.Module):
    """A low-rank matrix ``B A`` of one number per output and group; zero at first, so that training starts at the weight.

    Args:
        outputs, groups: Rows and columns of the product.
        rank: Its rank.
        scale: ``s``, the factor on the product.
        generator: Draws ``A`` (uniform, as torch's linear layers do); ``B`` is 0.
    """

    def __init__(self, outputs: int, groups: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        bound = 1 / math.sqrt(groups)
        drawn = torch.rand(rank, groups, generator=generator, device=generator.device)
        self.a = nn.Parameter((2 * drawn - 1) * bound)
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=generator.device))

    def forward(self) -> Tensor:
        """``s B A``, ``[outputs, groups]``."""
        product: Tensor = self.scale * (self.b @ self.a)
        return product


class LowBitLinear(Linear):
    """A frozen linear layer of one bit-width with its adapter.

    Args:
        weight: The frozen weight.
        bias: ``[out]``, frozen as well, or ``None``.
        adapter: Trained; ``None``: none is left, or none was wanted.

    Attributes:
        codes: uint8 ``[out, in]``: ``q``.
        scale, offset: ``[out, groups]``: ``alpha`` and ``beta``.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    fixed_bias: Tensor | None

    def __init__(self, weight: Grouped, bias: Tensor | None, adapter: Adapter | None) -> None:
        super().__init__(weight.codes.shape[1], weight.codes.shape[0], bias=False)
        del self.weight  # there is none to train
        self.bits, self.group = weight.bits, weight.group
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("offset", weight.offset)
        self.register_buffer("fixed_bias", None if bias is None else bias.detach().clone())
        self.adapter = adapter

    def grouped(self) -> Grouped:
        """The weight in its low-bit form, with the adapter merged into the offsets."""
        offset = self.offset if self.adapter is None else self.offset + self.adapter()
        return Grouped(self.codes, self.scale, offset, self.bits, self.group)

    def active_weight(self) -> Tensor:
        """The real weight ``[out, in]``, adapter included."""
        return self.grouped().real()

    def active_bias(self) -> Tensor | None:
        """``[out]``."""
        return self.fixed_bias

    @torch.no_grad()
    def merged(self) -> LowBitLinear:
        """The same layer without an adapter: other offsets, the same codes."""
        found = self.grouped()
        parts = (found.codes.clone(), found.scale.clone(), found.offset.clone())
        return LowBitLinear(Grouped(*parts, self.bits, self.group), self.fixed_bias, None)

    def cost_parameters(self, lookup: Callable[..., NDArray[np.int64]]) -> NDArray[np.int64] | int:
        """Of the plain layer that it becomes: weights and biases."""
        return self.codes.numel() + (0 if self.fixed_bias is None else self.fixed_bias.numel())

    def stored_bytes(self) -> int:
        """Packed codes, an fp16 scale and offset per group, an fp32 bias per output."""
        rows, columns = self.codes.shape
        bias = 0 if self.fixed_bias is None else 4 * rows
        return rows * ((columns * self.bits + 7) // 8) + 4 * self.scale.numel() + bias

    def extra_repr(self) -> str:
        """Sizes, bits and group."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group}"


def _matches(path: str, where: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in where)


def _plain(path: str, layer: Linear | nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer whose sizes are fixed."""
    if isinstance(layer, Linear) and layer.own_choices:
        names = ", ".join(choice.name for choice in layer.own_choices)
        raise InputError(
            f"the layer {path!r} has sizes that are choices ({names}), and a frozen weight has one size. Extract a subnet "
            "first: supernet.extract(subnet)."
        )
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _moments(network: nn.Module, layers: Iterable[nn.Module], batches: Sequence[Tensor]) -> dict[nn.Module, Tensor]:
    """``X^T X / n`` of every layer's inputs, float64 ``[in, in]``."""
    sums: dict[nn.Module, Tensor] = {}
    counts: dict[nn.Module, int] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        sums[module] = sums.get(module, torch.zeros((), device=x.device)) + x.T @ x
        counts[module] = counts.get(module, 0) + len(x)

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        with torch.no_grad(), evaluating(network):
            for batch in batches:
                network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: total / counts[layer] for layer, total in sums.items()}


def separate_bits(
    network: nn.Module,
    bits: Sequence[int] = (2, 3, 4),
    *,
    group: int = 32,
    rank: int = 8,
    scale: float = 2.0,
    where: Sequence[str] = ("*",),
    batches: Sequence[Tensor] = (),
    shared: bool = False,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """A copy of a trained network in which linear layers choose among frozen weights of several bit-widths.

    Each layer becomes a :class:`~nasq.elastic.OneOf` of :class:`LowBitLinear` with the choice ``<path>.weight_bits``.
    Everything but the adapters is frozen. Train them with subnets of :class:`nasq.training.Balanced`. An extracted subnet
    has plain linear layers with the merged weights, which :func:`nasq.quant.quantize` takes like any others.

    Args:
        network: With weights worth keeping; its linear layers have fixed sizes.
        bits: Options, ascending, in 1..8. The paper's are 2, 3 and 4.
        group: Inputs that share a scale and an offset; a layer with fewer inputs has one group, others are divided by it.
        rank: Of the adapters. QA-LoRA's code uses 64 for language models.
        scale: ``s``, the factor on the adapters (QA-LoRA's ``alpha / rank``).
        where: Patterns of paths; layers that match one are replaced.
        batches: Inputs of the network for GPTQ, which rounds so that the outputs on them change least; without any,
            weights are rounded to the nearest.
        shared: One adapter for all bit-widths of a layer instead of one each (the paper's ablation).
        generator: Draws the adapters; by default one seeded with 0.

    Raises:
        InputError: No layer matches, the bits are no ascending numbers in 1..8, the group does not divide a layer's
            inputs, or a layer's sizes are choices; names the layer.
    """
    options = _checked(bits)
    copied = copy.deepcopy(network)
    # A layer that is used at several places stays one layer.
    places = [
        (path, module)
        for path, module in copied.named_modules(remove_duplicate=False)
        if isinstance(module, (Linear, nn.Linear)) and path and _matches(path, where)
    ]
    if not places:
        raise InputError(
            f"no linear layer of the network matches {list(where)}. Give patterns of their paths, as '*.fc1'."
        )
    moments = _moments(copied, dict.fromkeys(module for _, module in places), batches) if batches else {}
    rng = generator or torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    made: dict[nn.Module, OneOf] = {}
    for path, layer in places:
        if layer not in made:
            weight, bias = _plain(path, layer)
            size = _group(path, weight.shape[1], group)
            codes = {width: _rounded(weight, size, width, moments.get(layer)) for width in options}
            adapters = _adapters(next(iter(codes.values())), options, rank, scale, shared, rng)
            branches = {
                width: LowBitLinear(codes[width], bias, adapters[width]).train(layer.training) for width in options
            }
            made[layer] = OneOf(Choice(f"{path}.weight_bits", options), branches)
        copied.set_submodule(path, made[layer])
    return copied


def _adapters(
    like: Grouped, options: Sequence[int], rank: int, scale: float, shared: bool, generator: torch.Generator
) -> dict[int, Adapter]:
    """The adapter of each bit-width."""
    outputs, groups = like.scale.shape
    found = [
        Adapter(outputs, groups, rank, scale, generator).to(like.scale) for _ in (options[:1] if shared else options)
    ]
    return dict(zip(options, found * len(options), strict=False))


def _rounded(weight: Tensor, group: int, bits: int, moment: Tensor | None) -> Grouped:
    return round_to_nearest(weight, bits, group) if moment is None else gptq(weight, moment, bits, group)


def _checked(bits: Sequence[int]) -> tuple[int, ...]:
    options = tuple(bits)
    if not options or any(one not in BITS for one in options) or list(options) != sorted(set(options)):
        raise InputError(f"the bits of separate weights are {list(bits)}; allowed: ascending whole numbers from 1 to 8")
    return options


def _group(path: str, inputs: int, group: int) -> int:
    size = min(group, inputs)
    if size < 1 or inputs % size:
        raise InputError(
            f"the layer {path!r} has {inputs} inputs, which groups of {group} do not divide. Give a group that divides the "
            "inputs of every layer, or leave the layer out (where=...)."
        )
    return size


def adapter_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What there is to train: the adapters' matrices, each once."""
    adapters = [module for module in network.modules() if isinstance(module, Adapter)]
    return [parameter for adapter in adapters for parameter in adapter.parameters()]


def _layers(network: nn.Module) -> dict[str, dict[int, LowBitLinear]]:
    """Every replaced layer's forms by the name of its choice."""
    found: dict[str, dict[int, LowBitLinear]] = {}
    for module in network.modules():
        if isinstance(module, OneOf):
            forms = [part for _, part in module.parts() if isinstance(part, LowBitLinear)]
            if len(forms) == len(module.choice.options):
                found[module.choice.name] = {form.bits: form for form in forms}
    if not found:
        raise InputError(
            "the network has no layers with separate bits. Make them with nasq.quant.adapters.separate_bits."
        )
    return found


def bits_of(network: nn.Module, space: SearchSpace, rows: NDArray[np.int16]) -> NDArray[np.float64]:
    """The plain average of the replaced layers' bits in the subnets ``rows`` ``[n, choices]`` (the paper's Bit)."""
    columns = [_column(space, name, rows) for name in _layers(network)]
    return np.asarray(np.mean(np.stack(columns), axis=0), dtype=np.float64)


def stored_bytes(network: nn.Module, space: SearchSpace, rows: NDArray[np.int16]) -> NDArray[np.float64]:
    """Bytes of the replaced layers in the subnets ``rows`` ``[n, choices]``, adapters merged; of the others, none."""
    total = np.zeros(len(rows))
    for name, forms in _layers(network).items():
        table = {bits: form.stored_bytes() for bits, form in forms.items()}
        total += np.array([table[int(bits)] for bits in _column(space, name, rows)])
    return total


def _column(space: SearchSpace, name: str, rows: NDArray[np.int16]) -> NDArray[np.int64]:
    column: NDArray[np.int64] = space[name].array[rows[:, space.positions[name]]]
    return column
