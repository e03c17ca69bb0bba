"""Elastic multi-head self-attention, and the parts it is made of.

Shapes: ``N`` images, ``T`` tokens, ``E`` embedding, ``H`` heads, ``D`` features per head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nasq.elastic.base import ElasticModule, Size
from nasq.elastic.linear import Linear
from nasq.elastic.relative_position import PlainRelativePosition, RelativePosition
from nasq.errors import InputError
from nasq.space import Expression

__all__ = [
    "CausalMask",
    "HeadScale",
    "LinearFactory",
    "MultiheadAttention",
    "PlainRelativePosition",
    "RelativePosition",
    "SplitHeads",
]

LinearFactory = Callable[[str, Size, Size, bool], Linear]
"""Makes the linear layer of a name (``"q"``, ``"k"``, ``"v"``, ``"proj"``): in and out features, whether it has a bias."""


def _linear(name: str, in_features: Size, out_features: Size, bias: bool) -> Linear:
    return Linear(in_features, out_features, bias)


class MultiheadAttention(nn.Module):
    """Self-attention whose embedding, heads and features per head may be choices (Vaswani et al. 2017, section 3.2.2).

    Queries, keys and values are three layers: each is sliced by itself (the first heads of each), never across their
    borders, and each makes a tensor of its own that can be quantized. Written as plain operations on elastic parts, it
    is traced, counted and quantized like any network; the extracted module has the same forward on plain layers.

    With ``relative_tokens``, keys and values have learned relative positions on the grid of patches, as in AutoFormer
    (Chen et al. 2021, section 3.3; the 2-d form of Shaw et al. 2018): ``softmax(q (k + r_k)^T / sqrt(D)) (v + r_v)``.

    Args:
        embed_dim: Size ``E`` of a token, in and out.
        heads: Size ``H``.
        head_dim: Size ``D``. Queries are scaled by ``1 / sqrt(D)`` of the active ``D``.
        qkv_bias: Whether queries, keys and values have a bias.
        causal: Whether a token sees only itself and earlier ones.
        relative_tokens: Number of tokens ``T = 1 + side^2``, the first being the class token; ``None``: no relative
            positions.
        relative_length: Largest distance, in patches, that has a vector of its own; longer ones share the last.
        linear: Makes the four linear layers, for layers with choices of their own.

    Shape:
        ``[N, T, E]``, unchanged.

    Raises:
        InputError: ``relative_tokens`` is not one more than a square.
    """

    def __init__(
        self,
        embed_dim: Size,
        heads: Size,
        head_dim: Size,
        *,
        qkv_bias: bool = True,
        causal: bool = False,
        relative_tokens: int | None = None,
        relative_length: int = 14,
        linear: LinearFactory = _linear,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.q, self.k, self.v = (linear(name, embed_dim, inner, qkv_bias) for name in ("q", "k", "v"))
        self.proj = linear("proj", inner, embed_dim, True)
        # With one fixed size, the other follows from the active features: no part has to know it.
        self.shape = (-1, head_dim) if isinstance(head_dim, int) else (heads, -1)
        self.split = None if isinstance(heads, int) or isinstance(head_dim, int) else SplitHeads(heads)
        self.factor = head_dim**-0.5 if isinstance(head_dim, int) else 1.0
        self.scale = HeadScale(head_dim) if isinstance(head_dim, Expression) else None
        self.mask = CausalMask() if causal else None
        self.relative_key: RelativePosition | None = None
        self.relative_value: RelativePosition | None = None
        if relative_tokens is not None:
            self.relative_key = RelativePosition(head_dim, relative_tokens, relative_length, "key")
            self.relative_value = RelativePosition(head_dim, relative_tokens, relative_length, "value")

    def forward(self, x_NTE: Tensor) -> Tensor:
        """Attends."""
        q, k, v = self.heads(self.q(x_NTE)), self.heads(self.k(x_NTE)), self.heads(self.v(x_NTE))
        q = q * self.factor if self.scale is None else self.scale(q)
        scores_NHTT = q @ k.transpose(-2, -1)
        if self.relative_key is not None:
            scores_NHTT = scores_NHTT + self.relative_key(q)
        if self.mask is not None:
            scores_NHTT = self.mask(scores_NHTT)
        weights_NHTT = scores_NHTT.softmax(dim=-1)
        y_NHTD = weights_NHTT @ v
        if self.relative_value is not None:
            y_NHTD = y_NHTD + self.relative_value(weights_NHTT)
        return self.proj(y_NHTD.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def heads(self, x: Tensor) -> Tensor:
        """``[N, T, H D]`` to ``[N, H, T, D]``."""
        split: Tensor = x.unflatten(-1, self.shape) if self.split is None else self.split(x)  # type: ignore[no-untyped-call]
        return split.transpose(1, 2)

    @torch.no_grad()
    def load_fused(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Takes the queries, keys and values of a layer that holds them in one matrix, as torch's and timm's do.

        Args:
            weight: ``[3 H D, E]`` of the largest form, queries first, then keys, then values.
            bias: ``[3 H D]``.

        Raises:
            InputError: The sizes are not this layer's.
        """
        layers = (self.q, self.k, self.v)
        rows, columns = self.q.weight.shape
        if tuple(weight.shape) != (3 * rows, columns) or (bias is None) != (self.q.bias is None):
            given = "no bias" if bias is None else "a bias"
            raise InputError(
                f"the joined queries, keys and values have the shape {list(weight.shape)} and {given}; this attention "
                f"takes {[3 * rows, columns]} and {'no bias' if self.q.bias is None else 'a bias'}."
            )
        for index, layer in enumerate(layers):
            layer.weight.copy_(weight[index * rows : (index + 1) * rows])
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(bias[index * rows : (index + 1) * rows])


class SplitHeads(ElasticModule):
    """Cuts the last dimension into heads: ``[N, T, H D]`` to ``[N, T, H, D]``; for ``H`` and ``D`` that are both choices.

    Args:
        heads: Size ``H``.
    """

    def __init__(self, heads: Size) -> None:
        super().__init__()
        self.heads = heads
        self.holds(heads)

    def forward(self, x: Tensor) -> Tensor:
        """A view."""
        return x.reshape(*x.shape[:-1], self.value(self.heads), -1)

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """:class:`torch.nn.Unflatten` of the active heads."""
        return nn.Unflatten(-1, (self.value(self.heads), -1)).train(self.training)


class _Times(nn.Module):
    """Multiplies by a fixed number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class HeadScale(ElasticModule):
    """Multiplies by ``1 / sqrt(D)``, for a number ``D`` of features per head that is a choice.

    Args:
        head_dim: Size ``D``.
    """

    def __init__(self, head_dim: Size) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.holds(head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Scales."""
        factor: float = self.value(self.head_dim) ** -0.5
        return x * factor

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The same product with the active number."""
        return _Times(self.value(self.head_dim) ** -0.5).train(self.training)


class CausalMask(nn.Module):
    """Sets the scores ``[N, H, T, T]`` of later tokens to minus infinity, so that softmax gives them no weight."""

    def forward(self, scores_NHTT: Tensor) -> Tensor:
        """Masks."""
        tokens = scores_NHTT.shape[-1]
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=scores_NHTT.device).triu(1)
        return scores_NHTT.masked_fill(later, float("-inf"))
