"""A private copy of a model to measure on, and the proof that the caller's own was left alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import skip_init

from nasq.errors import InputError

__all__ = ["private_copy", "quantized_weights", "seeded", "untouched"]


class _Attention(nn.Module):
    """``nn.MultiheadAttention`` written out, so that its projections are ordinary linear layers."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__()
        if original.bias_k is not None or original.add_zero_attn or original.in_proj_weight is None:
            raise InputError(
                "an nn.MultiheadAttention with bias_k, add_zero_attn or separate key and value sizes cannot be scored by "
                "its gradients. Write the attention with Linear layers."
            )
        self.heads, self.batch_first = original.num_heads, original.batch_first
        self.in_proj = skip_init(nn.Linear, 1, 1, bias=False)  # type: ignore[no-untyped-call]  # draws nothing
        self.in_proj.weight, self.in_bias = original.in_proj_weight, original.in_proj_bias
        self.out_proj = original.out_proj

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, None]:
        """``[N, T, E]`` (or ``[T, N, E]``); weights are never returned."""
        if key is not query or value is not query or any(options.get(name) is not None for name in _MASKS):
            raise InputError(
                "nn.MultiheadAttention can be scored as plain self-attention without masks. Write another with Linear layers."
            )
        x = query if self.batch_first else query.transpose(0, 1)
        packed = F.linear(x, self.in_proj.weight, self.in_bias)
        heads = packed.reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2]).transpose(1, 2).flatten(2)
        y = self.out_proj(mixed)
        return (y if self.batch_first else y.transpose(0, 1)), None


_MASKS = ("key_padding_mask", "attn_mask")


def _replace_attention(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.MultiheadAttention):
            setattr(module, name, _Attention(child))
        else:
            _replace_attention(child)


def private_copy(model: nn.Module, *, norms: bool = True) -> nn.Module:
    """A copy in which BatchNorm uses batch statistics and nothing else trains: no dropout, no auxiliary heads.

    No parameter requires a gradient; whoever needs some switches them on.

    Args:
        model: Any network; its own mode does not matter.
        norms: Whether BatchNorm is in training mode.
    """
    copied = copy.deepcopy(model).eval()
    for module in copied.modules():
        if isinstance(module, _BatchNorm):
            module.train(norms)
    _replace_attention(copied)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return copied


@torch.no_grad()
def quantized_weights(model: nn.Module) -> nn.Module:
    """Rounds the weights of a quantized network to their grids, in place, and returns it; another is left as it is.

    For measures that run in float but whose values should depend on weight bits.
    """
    from nasq.quant.layers import norm_sign
    from nasq.quant.producers import LayerProducer

    for module in model.modules():
        if isinstance(module, LayerProducer) and isinstance(module.layer, (nn.Conv2d, nn.Linear)):
            weight = module.layer.weight
            weight.copy_(module.weight_quantizer.form().fake(weight, norm_sign(module.norm)))
    return model


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Runs its block on global random streams seeded with ``seed``; afterwards they are where they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _hooks(module: nn.Module) -> list[list[int]]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [list(getattr(module, name)) for name in names]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Proves that its block leaves ``model`` alone: parameters, buffers, gradients, hooks, modes, global random streams.

    Raises:
        InputError: Something differs; names it. A proxy that does this is wrong and its score means nothing.
    """
    before = {name: (one, one.detach().clone(), one._version) for name, one in _tensors(model)}
    grads = {name: (one.grad, None if one.grad is None else one.grad.clone()) for name, one in model.named_parameters()}
    modules = {name: (module.training, _hooks(module)) for name, module in model.named_modules()}
    wanted = {name: one.requires_grad for name, one in model.named_parameters()}
    stream = torch.get_rng_state()
    yield
    changed = _changed(dict(_tensors(model)), before)
    for name, one in model.named_parameters():
        old, value = grads.get(name, (None, None))
        if one.grad is not old or (value is not None and not _equal(one.grad, value)):
            changed.append(f"the gradient of {name}")
        if wanted.get(name) != one.requires_grad:
            changed.append(f"requires_grad of {name}")
    now = {name: (module.training, _hooks(module)) for name, module in model.named_modules()}
    changed += [f"the mode or the hooks of {name or 'the model'}" for name in now if now[name] != modules.get(name)]
    if now.keys() != modules.keys():
        changed.append("its submodules")
    if not torch.equal(stream, torch.get_rng_state()):
        changed.append("the global random stream")
    if changed:
        raise InputError(
            f"scoring changed {', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''}. The proxy works on the "
            "caller's model: it has to measure on a copy and draw from its own generator."
        )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _equal(a: Tensor | None, b: Tensor) -> bool:
    """Bit for bit as far as values go; NaN equals NaN."""
    return a is not None and a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _changed(now: dict[str, Tensor], before: dict[str, tuple[Tensor, Tensor, int]]) -> list[str]:
    found = [name for name in before if name not in now] + [name for name in now if name not in before]
    for name, (same, value, version) in before.items():
        one = now.get(name)
        if one is not None and (one is not same or one._version != version or not _equal(one.detach(), value)):
            found.append(name)
    return found
