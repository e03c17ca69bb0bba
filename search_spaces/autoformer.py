"""``autoformer``: vision transformers with elastic depth, embedding, heads and MLP ratio.

Source: AutoFormer (Chen et al., ICCV 2021). Three supernets, ``tiny``, ``small`` and ``base``; ``autoformer:small`` names
one. Depth and embedding are choices of the whole network, heads and MLP ratio of each block; queries, keys and values
have 64 features per head whatever the embedding is. Size: 2.81e11 (tiny), 7.71e13 (small) and 1.01e13 (base) subnets.
Published subnets (:data:`RELEASED`), as the official repository lists them: AutoFormer-T with 5.8 M parameters and 75.3 %
top-1 on ImageNet, -S with 22.9 M and 81.7 %, -B with 53.7 M and 82.4 %. Default data: ``image_folder`` (ImageNet, 224 x 224).

Counted exactly, their published options give 5.868, 22.891 and 53.692 M parameters; -S and -B agree with what is published
to 0.05 %. For -T the repository's own counting (``get_sampled_params_numel``: patches, positions, class token, every bias
and norm, each layer's own relative position tables) is the same sum over the options in its file, 1.2 % above the 5.8 M that
it states. The paper's figures for -T, 5.7 M and 74.7 %, are not those of these options: the repository first gave 5.7 M and
74.9 %, then 5.8 M and 75.3 %, and the options in its file include the MLP ratio 3, which its tiny supernet does not have.

Where we differ: the shared weights are as large as the largest option (the released supernets have 640 features where the
largest option is 624), and there is no stochastic depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nasq import Choice, Subnet, elastic
from nasq.errors import InputError, choose_from
from nasq.plugins import search_space
from nasq.space import Expression

__all__ = ["RELEASED", "VARIANTS", "AutoFormer", "Release", "Variant", "autoformer"]

HEAD_DIM = 64
Size = int | Expression


@dataclass(frozen=True)
class Variant:
    """The options of a supernet.

    Attributes:
        embed: Features of a token.
        heads: Heads of each block.
        mlp_ratio: Hidden features of each block's MLP, as a multiple of the embedding.
        depth: Number of blocks.
    """

    embed: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]
    depth: tuple[int, ...]


VARIANTS = {
    # The paper's tiny supernet has the ratios 3.5 and 4; its released subnet uses 3 as well.
    "tiny": Variant((192, 216, 240), (3, 4), (3.0, 3.5, 4.0), (12, 13, 14)),
    "small": Variant((320, 384, 448), (5, 6, 7), (3.0, 3.5, 4.0), (12, 13, 14)),
    "base": Variant((528, 576, 624), (9, 10), (3.0, 3.5, 4.0), (14, 15, 16)),
}
"""The published supernets by name."""


@dataclass(frozen=True)
class Release:
    """A published subnet.

    Attributes:
        embed, heads, mlp_ratio: Its options; one of each per block, and the depth is their number.
        params: Parameters in millions that the official repository publishes.
        top1: Accuracy on ImageNet that it publishes, in percent.
    """

    embed: int
    heads: tuple[int, ...]
    mlp_ratio: tuple[float, ...]
    params: float
    top1: float

    def subnet(self) -> Subnet:
        """It as a member of its supernet's space."""
        options: dict[str, str | int | float | bool] = {"embed": self.embed, "depth": len(self.heads)}
        for index, (heads, ratio) in enumerate(zip(self.heads, self.mlp_ratio, strict=True)):
            options |= {f"block{index}.heads": heads, f"block{index}.mlp_ratio": ratio}
        return Subnet(options)


RELEASED: Mapping[str, Release] = {
    "tiny": Release(
        192, (3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3),
        (3.5, 3.5, 3.0, 3.5, 3.0, 3.0, 4.0, 4.0, 3.5, 4.0, 3.5, 4.0, 3.5), 5.8, 75.3,
    ),
    "small": Release(
        384, (6, 6, 5, 7, 5, 5, 5, 6, 6, 7, 7, 6, 7),
        (3.0, 3.5, 3.0, 3.5, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 3.5, 4.0), 22.9, 81.7,
    ),
    "base": Release(
        576, (9, 9, 9, 9, 9, 10, 9, 9, 10, 9, 10, 9, 9, 10),
        (3.5, 3.5, 4.0, 3.5, 4.0, 3.5, 3.5, 3.0, 4.0, 4.0, 3.0, 4.0, 3.0, 3.5), 53.7, 82.4,
    ),
}  # fmt: skip
"""The published subnets by the name of their supernet."""


class Mlp(nn.Module):
    """Two linear layers with a GELU between them.

    Args:
        fc1, fc2: From the embedding to hidden features, and back.
    """

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1 = fc1
        self.act = nn.GELU()
        self.fc2 = fc2

    def forward(self, x_NTE: Tensor) -> Tensor:
        """``[N, T, E]``, unchanged."""
        return self.fc2(self.act(self.fc1(x_NTE)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm and added to its input.

    Args:
        attention: Maps ``[N, T, E]`` to itself.
        mlp: The same.
        embed: Size ``E``.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module, embed: Size) -> None:
        super().__init__()
        self.norm1 = elastic.LayerNorm(embed)
        self.attention = attention
        self.norm2 = elastic.LayerNorm(embed)
        self.mlp = mlp

    def forward(self, x_NTE: Tensor) -> Tensor:
        """``[N, T, E]``, unchanged."""
        x_NTE = x_NTE + self.attention(self.norm1(x_NTE))
        return x_NTE + self.mlp(self.norm2(x_NTE))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """Images to tokens: one per patch, a class token before them, a learned position added to each.

    Args:
        in_channels: Channels of the images.
        embed: Size ``E`` of a token.
        image_size, patch_size: Sides in pixels.

    Attributes:
        tokens: ``T``, class token included.

    Raises:
        InputError: Patches do not fill the image.
    """

    def __init__(self, in_channels: int, embed: Size, image_size: int, patch_size: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise InputError(
                f"images of {image_size} pixels cannot be cut into patches of {patch_size}. Give a patch_size that "
                "divides the image_size."
            )
        self.tokens = 1 + (image_size // patch_size) ** 2
        self.project = elastic.Conv2d(in_channels, embed, patch_size, patch_size, padding=0)
        self.token = elastic.Parameter(1, 1, embed)
        self.position = elastic.Parameter(1, self.tokens, embed)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, T, E]``."""
        x_NTE = self.project(x_NCHW).flatten(2).transpose(1, 2)
        token = self.token().expand(x_NTE.shape[0], -1, -1)
        return torch.cat([token, x_NTE], dim=1) + self.position()  # type: ignore[no-any-return]


class AutoFormer(nn.Module):
    """Patches, blocks, layer norm, head.

    Args:
        options: Of the choices.
        num_classes: Number of outputs.
        in_channels: Channels of the images.
        image_size, patch_size: Sides in pixels.
        head_dim: Features per head.
        relative_position: Whether keys and values have learned relative positions (see
            :class:`nasq.elastic.MultiheadAttention`).
        pool: What the head sees: the ``"mean"`` of the patches' tokens (as released) or the class ``"token"``.

    Raises:
        InputError: Patches do not fill the image, or ``pool`` is neither.
    """

    def __init__(
        self,
        options: Variant,
        num_classes: int,
        in_channels: int,
        image_size: int,
        patch_size: int,
        head_dim: int = HEAD_DIM,
        relative_position: bool = True,
        pool: Literal["mean", "token"] = "mean",
    ) -> None:
        super().__init__()
        if pool not in ("mean", "token"):
            raise choose_from("pool", str(pool), ("mean", "token"))
        embed = Choice("embed", options.embed)
        self.pool = pool
        self.patches = Patches(in_channels, embed, image_size, patch_size)
        tokens = self.patches.tokens if relative_position else None
        blocks = [_block(index, options, embed, head_dim, tokens) for index in range(max(options.depth))]
        self.blocks = elastic.Repeat(blocks, Choice("depth", options.depth))
        self.norm = elastic.LayerNorm(embed)
        self.head = elastic.Linear(embed, num_classes)
        initialise(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """``[N, in_channels, image_size, image_size]`` to logits ``[N, num_classes]``."""
        x_NTE = self.norm(self.blocks(self.patches(x_NCHW)))
        return self.head(x_NTE[:, 1:].mean(1) if self.pool == "mean" else x_NTE[:, 0])  # type: ignore[no-any-return]


def _block(index: int, options: Variant, embed: Choice, head_dim: int, tokens: int | None) -> Block:
    heads = Choice(f"block{index}.heads", options.heads)
    attention = elastic.MultiheadAttention(embed, heads, head_dim, relative_tokens=tokens)
    hidden = Choice(f"block{index}.mlp_ratio", options.mlp_ratio) * embed
    return Block(attention, Mlp(elastic.Linear(embed, hidden), elastic.Linear(hidden, embed)), embed)


def initialise(network: nn.Module) -> None:
    """Draws linear weights as ViT does: normal with deviation 0.02, cut off at two of them; biases 0."""
    for module in network.modules():
        if isinstance(module, elastic.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


@search_space(
    source="AutoFormer (Chen et al., ICCV 2021)",
    data="image_folder",
    input_shape=(3, 224, 224),
    argument="tiny, small or base",
    tiny={
        "image_size": 16, "patch_size": 8, "embed": (16, 24, 32), "heads": (1, 2, 3), "mlp_ratio": (1.0, 1.5, 2.0),
        "depth": (1, 2), "head_dim": 8, "num_classes": 10,
    },
    tiny_input_shape=(3, 16, 16),
    published="ImageNet top-1 75.3 % (5.8 M parameters), 81.7 % (22.9 M), 82.4 % (53.7 M)",
)  # fmt: skip
def autoformer(
    variant: str = "tiny",
    num_classes: int = 1000,
    in_channels: int = 3,
    *,
    image_size: int = 224,
    patch_size: int = 16,
    embed: Sequence[int] = (),
    heads: Sequence[int] = (),
    mlp_ratio: Sequence[float] = (),
    depth: Sequence[int] = (),
    head_dim: int = HEAD_DIM,
    relative_position: bool = True,
    pool: Literal["mean", "token"] = "mean",
) -> AutoFormer:
    """The space's network; ``embed``, ``heads``, ``mlp_ratio`` and ``depth`` replace the variant's options.

    Raises:
        InputError: The variant is unknown; and see :class:`AutoFormer`.
    """
    if variant not in VARIANTS:
        raise choose_from("variant of autoformer", variant, VARIANTS)
    base = VARIANTS[variant]
    options = Variant(
        tuple(embed) or base.embed, tuple(heads) or base.heads, tuple(map(float, mlp_ratio)) or base.mlp_ratio,
        tuple(depth) or base.depth,
    )  # fmt: skip
    return AutoFormer(options, num_classes, in_channels, image_size, patch_size, head_dim, relative_position, pool)
