"""The kinds of operations on tokens ``[N, T, E]``: what transformers are made of beside linear layers."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nasq.elastic.attention import HeadScale, RelativePosition, SplitHeads
from nasq.elastic.graph import Kind
from nasq.elastic.layer_norm import LayerNorm
from nasq.elastic.parameter import Parameter, PlainParameter

__all__ = ["Batch", "token_call", "token_module"]

Found = tuple[Kind, dict[str, Any]]


class Batch(int):
    """The batch dimension of a shape."""


def token_module(module: nn.Module) -> Found | None:
    """The kind of a layer; ``None`` where it is none of these."""
    if isinstance(module, LayerNorm):
        return "layer_norm", {}
    if isinstance(module, nn.LayerNorm):
        return ("layer_norm", {}) if len(module.normalized_shape) == 1 else ("other", {})
    if isinstance(module, Parameter):
        return ("parameter", {}) if module.sizes[0] == 1 and len(module.sizes) > 1 else ("other", {})
    if isinstance(module, PlainParameter):
        return ("parameter", {}) if module.weight.shape[0] == 1 and module.weight.ndim > 1 else ("other", {})
    if isinstance(module, SplitHeads):
        return "split_heads", {}
    if isinstance(module, HeadScale):
        return "scale", {}
    if isinstance(module, RelativePosition):
        return "relative_position", {}
    return None


def token_call(node: fx.Node, sources: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> Found | None:
    """The kind of a function or method call; ``None`` where it is none of these."""
    rule = _CALLS.get(node.target)
    before = values[sources[0]] if sources else None
    if rule is None or not isinstance(before, Tensor) or not isinstance(values[node], Tensor):
        return None
    found: Found | None = rule(_Call(node, sources, [values[source] for source in sources], values[node]))
    return found


class _Call:
    """One call with the values of its tensors in the example."""

    def __init__(self, node: fx.Node, sources: Sequence[fx.Node], tensors: list[Any], after: Tensor) -> None:
        self.node, self.sources, self.tensors, self.after = node, sources, tensors, after
        self.before: Tensor = tensors[0]
        assert isinstance(self.before, Tensor)

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    def numbers(self) -> list[Any]:
        """What follows the tensor, be it given as one tuple or one by one."""
        rest = self.node.args[1:]
        first = rest[0] if rest else None
        return list(first) if len(rest) == 1 and isinstance(first, (tuple, list)) else list(rest)


def _softmax(call: _Call) -> Found | None:
    dim = call.argument(1, "dim")
    if not isinstance(dim, int) or dim % call.before.ndim == 0:
        return None
    return "softmax", {"dim": dim % call.before.ndim}


def _matmul(call: _Call) -> Found | None:
    two = [tensor for tensor in call.tensors if isinstance(tensor, Tensor)]
    if len(two) != 2 or len({tensor.ndim for tensor in two}) != 1 or two[0].ndim < 3:
        return None
    return "matmul", {}


def _permute(call: _Call) -> Found | None:
    dims = call.numbers()
    dims = [dim % call.before.ndim for dim in dims if isinstance(dim, int)]
    return ("permute", {"dims": tuple(dims)}) if dims and dims[0] == 0 else None


def _transpose(call: _Call) -> Found | None:
    swapped = [dim % call.before.ndim for dim in call.numbers() if isinstance(dim, int)]
    if len(swapped) != 2 or 0 in swapped:
        return None
    dims = list(range(call.before.ndim))
    dims[swapped[0]], dims[swapped[1]] = swapped[1], swapped[0]
    return "permute", {"dims": tuple(dims)}


def _view(call: _Call) -> Found | None:
    """Sizes behind the batch, as ONNX's Reshape takes them: -1 is what is left, 0 the input's own size at that place."""
    sizes = call.numbers()
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    keeps = isinstance(sizes[0], Batch) or (sizes[0] == -1 and call.before.shape[0] == call.after.shape[0])
    if not keeps or len(sizes) < 2:
        return None
    return "view", {"sizes": _free(list(map(int, sizes[1:])), call.before.shape[1:])}


def _free(sizes: list[int], own: Sequence[int]) -> tuple[int, ...]:
    """Sizes that do not fix what may be a choice: ``view(b, c, 1, 1)`` of ``[b, c]`` keeps its channels, how many it has.

    The first sizes that are the input's own become 0. Of the others, if they have one number that is neither 1 nor among
    the input's last sizes, it is what is left.
    """
    kept = 0
    while kept < min(len(sizes), len(own)) and sizes[kept] in (0, own[kept]):
        kept += 1
    rest, last = sizes[kept:], list(own)
    while rest and last and rest[-1] == last[-1]:
        rest.pop()
        last.pop()
    changed = [place for place, size in enumerate(rest, kept) if size != 1]
    sizes[:kept] = [0] * kept
    if len(changed) == 1 and -1 not in sizes:
        sizes[changed[0]] = -1
    return tuple(sizes)


def _flatten(call: _Call) -> Found | None:
    ndim = call.before.ndim
    first, last = call.argument(1, "start_dim", 0) % ndim, call.argument(2, "end_dim", -1) % ndim
    if first == 0:
        return None
    behind = tuple(call.before.shape[last + 1 :])
    return "view", {"sizes": (*[0] * (first - 1), -1, *behind)}


def _unflatten(call: _Call) -> Found | None:
    dim = call.argument(1, "dim") % call.before.ndim
    sizes = tuple(call.argument(2, "sizes"))
    return ("view", {"sizes": (*[0] * (dim - 1), *sizes)}) if dim == call.before.ndim - 1 and dim else None


def _reshaped(call: _Call) -> Found | None:
    """Dimensions of size 1 that come or go: a view, whose other sizes stay free as far as one number can say it."""
    before, after = call.before.shape, call.after.shape
    if len(after) < 2 or len(before) < 2 or after[0] != before[0]:
        return None
    shared = min(len(before), len(after))
    place = next((i for i in range(shared) if before[i] != after[i]), shared)
    rest = list(after[place:])
    changed = next((i for i, size in enumerate(rest) if size != 1), None)
    if changed is not None:
        rest[changed] = -1
    return "view", {"sizes": (*[0] * (place - 1), *rest)}


def _squeeze(call: _Call) -> Found | None:
    dims = call.argument(1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    # Without dimensions it takes that of a batch of one as well.
    named = isinstance(dims, (tuple, list)) and all(isinstance(dim, int) for dim in dims)
    return _reshaped(call) if named and not any(dim % call.before.ndim == 0 for dim in dims) else None


def _unsqueeze(call: _Call) -> Found | None:
    dim = call.argument(1, "dim")
    return _reshaped(call) if isinstance(dim, int) and dim % (call.before.ndim + 1) else None


def _scale(call: _Call) -> Found | None:
    numbers = [number for number in call.node.args if isinstance(number, (int, float)) and not isinstance(number, bool)]
    if len(call.sources) != 1 or len(numbers) != 1:
        return None
    if call.node.target in _DIVISIONS:
        # Only a tensor divided by a number is a multiple of the tensor.
        return ("scale", {"factor": 1 / numbers[0]}) if call.node.args[0] is call.sources[0] and numbers[0] else None
    return "scale", {"factor": float(numbers[0])}


def _expand(call: _Call) -> Found | None:
    sizes = call.numbers()
    if not sizes or call.before.ndim != len(sizes) or call.before.shape[0] != 1:
        return None
    rest = zip(sizes[1:], call.before.shape[1:], strict=True)
    return ("expand", {}) if all(size in (-1, have) for size, have in rest) else None


def _select(call: _Call) -> Found | None:
    index = call.node.args[1]
    parts = index if isinstance(index, tuple) else (index,)
    if parts[0] is not None and all(part is None or part is Ellipsis or part == slice(None) for part in parts):
        return _reshaped(call)
    chosen = [(dim, part) for dim, part in enumerate(parts) if part != slice(None)]
    if len(chosen) != 1 or type(chosen[0][1]) is not int or chosen[0][0] == 0:
        return None
    return "select", {"dim": chosen[0][0], "index": chosen[0][1]}


def _mean(call: _Call) -> Found | None:
    dims = call.argument(1, "dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(dims, (tuple, list)) or "dtype" in call.node.kwargs:
        return None
    plain = tuple(sorted(int(dim) % call.before.ndim for dim in dims if isinstance(dim, int)))
    keep = bool(call.argument(2, "keepdim", False))
    return ("mean", {"dims": plain, "keepdim": keep}) if plain and 0 not in plain else None


def _mask(call: _Call) -> Found | None:
    """Only the causal mask: each row keeps the columns up to its own."""
    value = call.argument(2, "value")
    mask = next((x for x, s in zip(call.tensors, call.sources, strict=True) if s is call.argument(1, "mask")), None)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or value != float("-inf"):
        return None
    causal = torch.ones_like(mask).triu(1)
    return ("mask", {"causal": True}) if bool((mask == causal).all()) else None


_DIVISIONS = {operator.truediv, torch.div, "div"}
_CALLS: dict[Any, Any] = {
    F.softmax: _softmax, torch.softmax: _softmax, "softmax": _softmax,
    operator.matmul: _matmul, torch.matmul: _matmul, torch.bmm: _matmul, "matmul": _matmul, "bmm": _matmul,
    torch.permute: _permute, "permute": _permute,
    torch.transpose: _transpose, "transpose": _transpose, "swapaxes": _transpose,
    "view": _view, "reshape": _view, torch.reshape: _view,
    torch.flatten: _flatten, "flatten": _flatten, "unflatten": _unflatten,
    operator.mul: _scale, torch.mul: _scale, "mul": _scale,
    operator.truediv: _scale, torch.div: _scale, "div": _scale,
    torch.squeeze: _squeeze, "squeeze": _squeeze, torch.unsqueeze: _unsqueeze, "unsqueeze": _unsqueeze,
    "expand": _expand, operator.getitem: _select, torch.mean: _mean, "mean": _mean,
    "masked_fill": _mask, torch.masked_fill: _mask,
}  # fmt: skip
