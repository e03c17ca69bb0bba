"""Learned relative positions on a grid of patches, for attention (AutoFormer, Chen et al. 2021, section 3.3).

Shapes: ``N`` images, ``T`` tokens, ``H`` heads, ``D`` features per head.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nasq.elastic.base import ElasticModule, Size
from nasq.errors import InputError
from nasq.space import maximum_of_size

__all__ = ["PlainRelativePosition", "RelativePosition"]

Role = Literal["key", "value"]


def _offsets(tokens: int, length: int) -> tuple[Tensor, Tensor]:
    """Which vector, ``[T, T]``, stands for the vertical and the horizontal distance from token to token.

    Row 0 of a table belongs to pairs with the class token; distance ``d`` to row ``clip(d, -length, length) + length + 1``.
    """
    side = isqrt(tokens - 1)
    place = torch.arange(tokens - 1)
    found = []
    for where in (place // side, place % side):
        distance = (where[None, :] - where[:, None]).clamp(-length, length) + length + 1
        found.append(nn.functional.pad(distance, (1, 0, 1, 0)))
    return found[0], found[1]


def _relate(role: Role, x: Tensor, relative_TTD: Tensor) -> Tensor:
    """Multiplies the row of each token by that token's own matrix."""
    images, heads, tokens, _ = x.shape
    matrix = relative_TTD.transpose(1, 2) if role == "key" else relative_TTD
    y = x.permute(2, 0, 1, 3).reshape(tokens, images * heads, -1) @ matrix
    return y.reshape(tokens, images, heads, -1).permute(1, 2, 0, 3)


class PlainRelativePosition(nn.Module):
    """A :class:`RelativePosition` of fixed size: what it becomes on extraction.

    Args:
        role: See :class:`RelativePosition`.
        tables: Vertical and horizontal vectors, ``[2 length + 2, D]`` each; copied.
        offsets: Row of each table, ``[T, T]`` each.
    """

    def __init__(self, role: Role, tables: tuple[Tensor, Tensor], offsets: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.role: Role = role
        self.vertical, self.horizontal = (nn.Parameter(table.detach().clone()) for table in tables)
        self.register_buffer("rows", offsets[0].clone(), persistent=False)
        self.register_buffer("columns", offsets[1].clone(), persistent=False)

    rows: Tensor
    columns: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`RelativePosition`."""
        return _relate(self.role, x, self.vertical[self.rows] + self.horizontal[self.columns])


class RelativePosition(ElasticModule):
    """Relative positions on a square grid of patches behind one class token (AutoFormer's, see the attention).

    The vector of a pair of tokens is the sum of one for their vertical and one for their horizontal distance.

    Args:
        head_dim: Size ``D`` of a vector.
        tokens: ``T = 1 + side^2``.
        length: Largest distance with a vector of its own, in patches.
        role: ``"key"``: queries ``[N, H, T, D]`` to scores ``[N, H, T, T]``; ``"value"``: attention weights
            ``[N, H, T, T]`` to ``[N, H, T, D]``.

    Raises:
        InputError: ``tokens`` is not one more than a square.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, head_dim: Size, tokens: int, length: int, role: Role) -> None:
        super().__init__()
        if tokens < 2 or isqrt(tokens - 1) ** 2 != tokens - 1:
            raise InputError(
                f"relative positions were asked for {tokens} tokens. They need a class token and a square of patches: "
                "1 + side * side tokens."
            )
        self.head_dim, self.tokens, self.length = head_dim, tokens, length
        self.role: Role = role
        self.holds(head_dim)
        shape = (2 * length + 2, maximum_of_size(head_dim))
        self.vertical, self.horizontal = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        rows, columns = _offsets(tokens, length)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the vectors as AutoFormer does (normal with deviation 0.02, cut off at two of them)."""
        for table in (self.vertical, self.horizontal):
            nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)

    def active_tables(self) -> tuple[Tensor, Tensor]:
        """The active slices ``[2 length + 2, D]``, contiguous."""
        count = self.value(self.head_dim)
        return self.vertical[:, :count].contiguous(), self.horizontal[:, :count].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Scores, or values, of the relative positions alone."""
        if x.shape[-2] != self.tokens:
            raise InputError(
                f"relative positions for {self.tokens} tokens were given {x.shape[-2]}. Build the network for the size "
                "of your images."
            )
        vertical, horizontal = self.active_tables()
        return _relate(self.role, x, vertical[self.rows] + horizontal[self.columns])

    def extract(self, recurse: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The active vectors as a :class:`PlainRelativePosition`."""
        plain = PlainRelativePosition(self.role, self.active_tables(), (self.rows, self.columns))
        return plain.train(self.training)

    def cost_parameters(self, lookup: Callable[[Size], Any]) -> Any:
        """Both tables."""
        return 2 * (2 * self.length + 2) * lookup(self.head_dim)

    def extra_repr(self) -> str:
        """Sizes as given."""
        return f"{self.head_dim}, tokens={self.tokens}, length={self.length}, role={self.role!r}"
