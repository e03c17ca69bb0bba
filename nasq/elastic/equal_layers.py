"""What takes the place of layers of torch's in :func:`nasq.elastic.simplify`: equal ones that have integer forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nasq.errors import InputError

__all__ = ["BatchNorm", "Encoder", "EncoderLayer", "MultiheadAttention", "OneDimensional", "equal_layer"]


class OneDimensional(nn.Module):
    """A two-dimensional layer on ``[N, C, L]``, which it sees as a map of one row.

    Args:
        layer: Takes ``[N, C, 1, L]``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_NCL: Tensor) -> Tensor:
        """``[N, C, L]`` to ``[N, channels, length]``."""
        made: Tensor = self.layer(x_NCL.unsqueeze(2)).squeeze(2)
        return made


class BatchNorm(nn.BatchNorm2d):
    """A BatchNorm over ``[N, C]`` and ``[N, C, ...]``."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"a BatchNorm takes [N, C, ...], and its input has the shape {list(input.shape)}")


def _copied(kind: type[nn.Linear], weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


class MultiheadAttention(nn.Module):
    """:class:`torch.nn.MultiheadAttention` of linear layers and matrix products; batch first, without masks.

    Args:
        source: Whose weights it copies.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.head_dim = source.num_heads, source.head_dim
        weights: tuple[Tensor, ...] = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)
        if source.in_proj_weight is not None:
            weights = source.in_proj_weight.chunk(3)
        biases = (None,) * 3 if source.in_proj_bias is None else source.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (_copied(nn.Linear, w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _copied(nn.Linear, source.out_proj.weight, source.out_proj.bias)
        self.dropout = nn.Dropout(source.dropout)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Any = None, need_weights: bool = True,
        attn_mask: Any = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """``[N, T, E]`` each to ``([N, T, E], None)``: it does not give the weights of the attention.

        Raises:
            InputError: There is a mask.
        """
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            raise InputError("attention with masks has no integer form here. Leave the masks out.")
        q, k, v = (
            layer(x).reshape(x.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        shares = ((q * self.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        made = (self.dropout(shares) @ v).transpose(1, 2)
        return self.out_proj(made.reshape(query.shape[0], -1, self.heads * self.head_dim)), None


class EncoderLayer(nn.Module):
    """:class:`torch.nn.TransformerEncoderLayer` without masks.

    Args:
        source: Whose layers it takes over.
        attention: Takes the place of its attention.
    """

    linear1: nn.Module
    linear2: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module

    def __init__(self, source: nn.TransformerEncoderLayer, attention: MultiheadAttention) -> None:
        super().__init__()
        self.self_attn, self.norm_first, self.activation = attention, source.norm_first, source.activation
        for name in ("linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"):
            self.add_module(name, getattr(source, name))

    def forward(
        self, src: Tensor, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None
    ) -> Tensor:
        """``[N, T, E]``, unchanged in shape.

        Raises:
            InputError: There is a mask.
        """
        if self.norm_first:
            src = src + self._attend(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            return src + self._feed(self.norm2(src))
        src = self.norm1(src + self._attend(src, src_mask, src_key_padding_mask, is_causal))
        made: Tensor = self.norm2(src + self._feed(src))
        return made

    def _attend(self, x: Tensor, mask: Any, padding: Any, causal: Any) -> Tensor:
        made: Tensor = self.dropout1(self.self_attn(x, x, x, padding, False, mask, is_causal=bool(causal))[0])
        return made

    def _feed(self, x: Tensor) -> Tensor:
        made: Tensor = self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return made


class Encoder(nn.Module):
    """:class:`torch.nn.TransformerEncoder` without masks.

    Args:
        layers: Run one after the other.
        norm: Behind them, or ``None``.
    """

    def __init__(self, layers: list[nn.Module], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, src: Tensor, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> Tensor:
        """``[N, T, E]``, unchanged in shape.

        Raises:
            InputError: There is a mask.
        """
        for layer in self.layers:
            src = layer(src, mask, src_key_padding_mask, is_causal)
        return src if self.norm is None else self.norm(src)


def _convolution(source: nn.Conv1d) -> nn.Module | None:
    if source.padding_mode != "zeros":
        return None
    kernel, stride, dilation = ((1, int(value[0])) for value in (source.kernel_size, source.stride, source.dilation))
    padding = source.padding if isinstance(source.padding, str) else (0, int(source.padding[0]))
    made = nn.Conv2d(
        source.in_channels, source.out_channels, kernel, stride, padding, dilation, source.groups,
        source.bias is not None, device="meta",
    )  # fmt: skip
    made.weight = nn.Parameter(source.weight.detach().unsqueeze(2).clone())
    made.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone())
    return OneDimensional(made)


def _norm(source: nn.BatchNorm1d | nn.SyncBatchNorm) -> nn.Module | None:
    if source.running_mean is None:
        return None
    made = BatchNorm(source.num_features, source.eps, source.momentum, source.affine)
    made.load_state_dict(source.state_dict())
    return made


def _transposed(source: nn.ConvTranspose2d) -> nn.Module | None:
    """Where no two pixels of the output come from different pixels, it is a 1 x 1 convolution and a pixel shuffle."""
    (r, other), plain = source.kernel_size, (source.groups, *source.dilation) == (1, 1, 1)
    whole = tuple(source.stride) == (r, r) and other == r and not any((*source.padding, *source.output_padding))
    if not whole or not plain:
        return None
    made = nn.Conv2d(source.in_channels, source.out_channels * r * r, 1, bias=source.bias is not None, device="meta")
    weight = source.weight.detach().permute(1, 2, 3, 0).reshape(-1, source.in_channels, 1, 1)
    made.weight = nn.Parameter(weight.clone())
    made.bias = None if source.bias is None else nn.Parameter(source.bias.detach().repeat_interleave(r * r))
    return nn.Sequential(made, nn.PixelShuffle(r))


def _attention(source: nn.MultiheadAttention) -> MultiheadAttention | None:
    plain = source.batch_first and source.bias_k is None and not source.add_zero_attn
    return MultiheadAttention(source) if plain else None


def _encoder_layer(source: nn.TransformerEncoderLayer) -> EncoderLayer | None:
    attention = _attention(source.self_attn)
    return None if attention is None else EncoderLayer(source, attention)


def _encoder(source: nn.TransformerEncoder) -> Encoder | None:
    layers = [_encoder_layer(one) for one in source.layers if type(one) is nn.TransformerEncoderLayer]
    found = [layer for layer in layers if layer is not None]
    return Encoder(list(found), source.norm) if len(found) == len(source.layers) else None


_EQUAL: dict[type[nn.Module], Callable[[Any], nn.Module | None]] = {
    nn.Conv1d: _convolution,
    nn.BatchNorm1d: _norm,
    nn.SyncBatchNorm: _norm,
    nn.ConvTranspose2d: _transposed,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerEncoder: _encoder,
}


def equal_layer(module: nn.Module) -> nn.Module | None:
    """The layer that takes the place of ``module``, in its mode; ``None`` where it stays."""
    make = _EQUAL.get(type(module))
    made = make(module) if make is not None else None
    return None if made is None else made.train(module.training)
