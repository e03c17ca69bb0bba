"""Watching a network compute: which weights are used on which inputs, and what its ReLUs see.

Calls of ``conv2d`` and ``linear`` are observed where they happen, so that plain layers, the producers of a quantized
network and functional code are all seen, and nothing of the model is patched. Shapes: ``N`` images, ``C`` channels, ``S``
spatial dimensions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from nasq.errors import InputError
from nasq.ranking import batched

__all__ = ["Call", "Recorder", "Repeats", "layers_of"]

Pair = tuple[int, int]


@dataclass
class Call:
    """One use of a layer's weight.

    Attributes:
        layer: Path of the module that owns the weight.
        weight: As used: the parameter, or what was made of it (a quantized form).
        input: ``[N, C, *S]`` of a convolution, ``[N, ..., C]`` of a linear layer.
        output: What came out.
        geometry: Stride, padding, dilation, groups; ``None`` for a linear layer.
    """

    layer: str
    weight: Tensor
    input: Tensor
    output: Tensor
    geometry: batched.Geometry | None


def layers_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all convolutions, linear layers and attention projections, by the path of their module."""
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        weight: Any = None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module._parameters.get("weight")
            if weight is None and hasattr(module, "parametrizations"):
                weight = dict(module.named_parameters()).get("parametrizations.weight.original")
        if isinstance(weight, nn.Parameter):
            found[path] = weight
    return found


def _geometry(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> batched.Geometry:
    pair: Callable[[Any], Pair] = lambda value: (value, value) if isinstance(value, int) else (value[0], value[-1])  # noqa: E731
    dilations = pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        reach = [step * (size - 1) for step, size in zip(dilations, weight.shape[2:], strict=True)]
        if any(one % 2 for one in reach):
            raise InputError(
                f"a convolution of kernel {list(weight.shape[2:])} pads 'same' with more on one side than on the other, "
                "which per-sample gradients do not support. Use an odd kernel, or pad before the convolution."
            )
        padding = (reach[0] // 2, reach[1] // 2)
    return batched.Geometry(pair(stride), pair(padding), dilations, int(groups))


def _conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Any, tuple[Any, ...]]:
    return input, weight, bias, (stride, padding, dilation, groups)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Any = None) -> tuple[Tensor, Tensor, Any, tuple[Any, ...]]:
    return input, weight, bias, ()


def _norm_arguments(
    input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
    momentum: float = 0.1, eps: float = 1e-5,
) -> tuple[Tensor, Any, Any, bool, float]:  # fmt: skip
    return input, weight, bias, training, eps


_RELUS = {
    F.relu,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    F.relu6,
    F.hardtanh,
    torch.clamp_min,
    F.leaky_relu,
}


class Repeats:
    """What was made of a tensor when it came before, unchanged: in a cell several branches apply ReLU to one input."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}

    def made(self, x: Tensor, make: Callable[[Tensor], Any]) -> tuple[Any, bool]:
        """``make(x)`` and whether it is new: of the same values it is made once."""
        if x.is_inference():  # such a tensor does not say whether it was changed
            return make(x), True
        source, version, value = self.known.get(id(x), (None, 0, None))
        if source is not None and source() is x and version == x._version:
            return value, False
        value = make(x)
        self.known[id(x)] = (weakref.ref(x), x._version, value)
        return value, True


class Recorder(TorchFunctionMode):
    """Observes what runs inside its ``with`` statement, and runs some of it in a faster form.

    Args:
        layers: From :func:`layers_of`, of the network that runs.
        on_call: Told every use of a layer's weight; may return another output in its place (a clone, say).
        on_relu: Told the input and the output of every ReLU, before an in-place one overwrites it.
        on_output: Told every tensor that any operation made.
        per_sample: Makes BatchNorm in training mode normalise each sample by its own spatial statistics, which is what
            it does when samples come one at a time; weights then enter detached, and calls record the originals.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Parameter],
        *,
        on_call: Callable[[Call], Tensor | None] | None = None,
        on_relu: Callable[[Tensor], None] | None = None,
        on_output: Callable[[Tensor], None] | None = None,
        per_sample: bool = False,
    ) -> None:
        super().__init__()
        self.paths = {id(weight): path for path, weight in layers.items()}
        self.on_call, self.on_relu, self.on_output, self.per_sample = on_call, on_relu, on_output, per_sample

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d:
            made = self._layer(func, *_conv_arguments(*args, **kwargs))
        elif func is F.linear:
            made = self._layer(func, *_linear_arguments(*args, **kwargs))
        elif func is F.batch_norm:
            made = self._norm(args, kwargs)
        else:
            if self.on_relu is not None and func in _RELUS:
                self.on_relu(args[0] if args else kwargs["input"])
            fast = batched.FASTER.get(func)
            made = func(*args, **kwargs) if fast is None else fast(*args, **kwargs)
        if self.on_output is not None and isinstance(made, Tensor):
            self.on_output(made)
        return made

    def _layer(self, func: Any, x: Tensor, weight: Tensor, bias: Any, geometry: tuple[Any, ...]) -> Tensor:
        path = self._path(weight)
        if path is None or self.on_call is None:
            return func(x, weight, bias, *geometry)  # type: ignore[no-any-return]
        if self.per_sample and x.device.type == "cpu" and not x.requires_grad and len(x) and not bool(x.any()):
            # A branch that nothing reaches: every image has the same output, and no gradient with respect to the weight.
            return func(x[:1], weight.detach(), bias, *geometry).expand(len(x), *[-1] * (x.ndim - 1)).clone()  # type: ignore[no-any-return]
        if self.per_sample:
            made = batched.convolve(func, x, weight.detach(), None if bias is None else bias.detach(), geometry)
        else:
            made = func(x, weight, bias, *geometry)
        call = Call(path, weight, x, made, _geometry(x, weight, *geometry) if geometry else None)
        replaced = self.on_call(call)
        return made if replaced is None else replaced

    def _path(self, weight: Tensor) -> str | None:
        """The layer a weight belongs to, found through whatever was made of the parameter."""
        if id(weight) in self.paths or weight.grad_fn is None:
            return self.paths.get(id(weight))
        found = {self.paths[id(leaf)] for leaf in _leaves(weight.grad_fn) if id(leaf) in self.paths}
        if len(found) > 1:
            raise InputError(
                f"one weight is made of the weights of several layers ({', '.join(sorted(found)[:3])}), so its gradient "
                "belongs to none of them. Score the extracted subnet."
            )
        return found.pop() if found else None

    def _norm(self, args: Any, kwargs: Any) -> Tensor:
        x, weight, bias, training, eps = _norm_arguments(*args, **kwargs)
        sites = x[:1, :1].numel() if self.per_sample else x[:, :1].numel()
        if training and sites == 1:
            raise InputError(
                f"a BatchNorm of {x.shape[1]} channels sees a single value per channel (input {list(x.shape)}), whose "
                "variance is 0: in training mode it is undefined for "
                + (
                    "one sample at a time. Use larger images, so that its map is larger than 1x1, or "
                    "GradSign(norm='running')."
                    if self.per_sample
                    else "a batch of one. Give more images, or larger ones, so that its map is larger than 1x1."
                )
            )
        if training and self.per_sample:
            # A group of one channel: the mean and variance of each sample's own map.
            return F.group_norm(x, x.shape[1], weight, bias, eps)
        return F.batch_norm(*args, **kwargs)


def _leaves(node: Any) -> list[Tensor]:
    """The leaf tensors that a graph starts from."""
    found, seen, todo = [], set(), [node]
    while todo:
        one = todo.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        variable = getattr(one, "variable", None)
        if variable is not None:
            found.append(variable)
        todo += [following for following, _ in one.next_functions]
    return found
