"""``causal_lm``: a small language model on bytes, for searching the bits of its linear layers.

Source: the network is a transformer as GPT-2 (Radford et al. 2019: layer norm first, GELU, learned positions); what it is
for is LLM-QFA (One QuantLLM for ALL, ACL 2025): train it, extract a subnet, give its linear layers separate weights of 2,
3 and 4 bits (:func:`nasq.quant.adapters.separate_bits`), train their adapters with subnets of
:class:`nasq.training.Balanced`, search. Size: 1,548 architectures; the linear layers of the deepest one's blocks have
3^24 = 2.82e11 settings of 2, 3 and 4 bits. Published for LLaMA2-7B (mean MMLU of 4, 3 and 2 bits): GPTQ 33.3, QA-LoRA
37.6, LLM-QFA 37.9. Default data: ``docstrings``, those of Python's standard library, one byte a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, elastic
from nasq.data.text import VOCABULARY
from nasq.errors import InputError
from nasq.plugins import search_space

from .autoformer import Block, Mlp, initialise

__all__ = ["CausalLM", "causal_lm"]


class CausalLM(nn.Module):
    """Embedding, positions, causal blocks, layer norm, head.

    The embedding is a linear layer on one-hot vectors, so that it is counted, quantized and exported as any other.

    Args:
        context: Tokens it sees at most, ``T``.
        embed: Features of a token, ``E``.
        depth, heads, mlp_ratio: Options: number of blocks; heads and hidden features (as a multiple of ``embed``) of each
            block.
        head_dim: Features per head.
        vocabulary: Number of different tokens, ``V``.
    """

    def __init__(
        self,
        context: int,
        embed: int,
        depth: Sequence[int],
        heads: Sequence[int],
        mlp_ratio: Sequence[int],
        head_dim: int,
        vocabulary: int,
    ) -> None:
        super().__init__()
        self.context, self.vocabulary = context, vocabulary
        self.embed = elastic.Linear(vocabulary, embed, bias=False)
        self.position = elastic.Parameter(1, context, embed)
        blocks = [_block(index, embed, heads, mlp_ratio, head_dim) for index in range(max(depth))]
        self.blocks = elastic.Repeat(blocks, Choice("depth", tuple(depth)))
        self.norm = elastic.LayerNorm(embed)
        self.head = elastic.Linear(embed, vocabulary)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """The logits ``[N, V]`` of the token behind the last one; the input is that of :meth:`logits`."""
        return self.head(self._features(x)[:, -1])  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        """The logits ``[N, T, V]`` of the token behind each one.

        Args:
            x: Tokens, integers ``[N, T]``, or one-hot vectors as images of one channel, floats ``[N, 1, T, V]``.

        Raises:
            InputError: There are more tokens than the context holds, or it is no text.
        """
        return self.head(self._features(x))  # type: ignore[no-any-return]

    def _features(self, x: Tensor) -> Tensor:
        if x.dtype.is_floating_point:
            if x.ndim != 4 or x.shape[1] != 1:
                raise InputError(
                    f"a text was given as {list(x.shape)}; allowed: floats [N, 1, T, V], or integers [N, T]."
                )
            x_NTV = x[:, 0]
        else:
            x_NTV = F.one_hot(x.long(), self.vocabulary).to(_dtype(self))
        tokens = x_NTV.shape[1]
        if tokens > self.context:
            raise InputError(
                f"{tokens} tokens were given to a network whose context is {self.context}. Give the last ones."
            )
        position = self.position() if tokens == self.context else self.position()[:, :tokens]
        return self.norm(self.blocks(self.embed(x_NTV) + position))  # type: ignore[no-any-return]


def _dtype(network: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in network.parameters())


def _block(index: int, embed: int, heads: Sequence[int], mlp_ratio: Sequence[int], head_dim: int) -> Block:
    attention = elastic.MultiheadAttention(embed, Choice(f"block{index}.heads", tuple(heads)), head_dim, causal=True)
    hidden = Choice(f"block{index}.mlp_ratio", tuple(mlp_ratio)) * embed
    return Block(attention, Mlp(elastic.Linear(embed, hidden), elastic.Linear(hidden, embed)), embed)


@search_space(
    source="LLM-QFA (One QuantLLM for ALL, ACL 2025) on a small GPT",
    data="docstrings",
    input_shape=(1, 64, VOCABULARY),
    tiny={
        "context": 6,
        "embed": 16,
        "depth": (1, 2),
        "heads": (1, 2),
        "mlp_ratio": (1, 2),
        "head_dim": 8,
        "num_classes": 12,
    },
    tiny_input_shape=(1, 6, 12),
    published="mean MMLU of LLaMA2-7B at 4, 3 and 2 bits 37.9 (QA-LoRA 37.6, GPTQ 33.3)",
)
def causal_lm(
    num_classes: int = VOCABULARY,
    in_channels: int = 1,
    *,
    context: int = 64,
    embed: int = 64,
    depth: Sequence[int] = (2, 3, 4),
    heads: Sequence[int] = (2, 4),
    mlp_ratio: Sequence[int] = (2, 3, 4),
    head_dim: int = 16,
) -> CausalLM:
    """The space's network; see :class:`CausalLM`. ``num_classes`` is the vocabulary.

    Raises:
        InputError: ``in_channels`` is not 1.
    """
    if in_channels != 1:
        raise InputError(f"causal_lm was asked for {in_channels} channels; a text has 1.")
    return CausalLM(context, embed, depth, heads, mlp_ratio, head_dim, num_classes)
