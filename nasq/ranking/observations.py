"""One forward pass over a batch and what it shows of a network: gradients, curvature, channels, codes of ReLUs.

Shapes: ``N`` images of the batch.

==================  ===================================================================================================
observation         what it is
==================  ===================================================================================================
``gradients``       gradients of the mean loss with respect to every layer's weight; BatchNorm sees the whole batch
``curvature``       the Hessian times those gradients, for every layer
``fisher``          per layer and output channel, half the mean of (sum over positions of output x its gradient)^2
``input_gradients`` gradient of the sum of all outputs with respect to every input, ``[N, pixels]``
``codes``           how often two images agree on the state of a ReLU, ``[N, N]``, summed over all ReLUs
==================  ===================================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nasq.errors import InputError
from nasq.ranking.capture import Call, Recorder, Repeats

if TYPE_CHECKING:
    from nasq.ranking.passes import Passes

__all__ = ["OBSERVATIONS", "Observed", "filled", "observe"]

OBSERVATIONS = frozenset({"gradients", "curvature", "fisher", "input_gradients", "codes"})
"""What the shared pass over the whole batch can observe."""


class Observed:
    """What one pass over a batch saw; see the table above. An observation that was not asked for is empty."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.curvature: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        self.input_gradients: Tensor = torch.empty(0)
        self.codes: Tensor = torch.empty(0)
        self.units = self.outputs = 0


def filled(found: Iterable[Tensor | None], layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by layer, zeros where there is none."""
    return {
        path: torch.zeros_like(weight) if one is None else one
        for (path, weight), one in zip(layers.items(), found, strict=True)
    }


def _add(totals: dict[str, Tensor], parts: Mapping[str, Tensor], share: float) -> None:
    for path, part in parts.items():
        scaled = part.detach() * share
        totals[path] = totals[path] + scaled if path in totals else scaled


def observe(passes: Passes, wanted: frozenset[str]) -> Observed:
    """One pass over the batch, in parts where that is possible."""
    made, rows, states = Observed(), list[Tensor](), list[list[Tensor]]()
    for at in passes.pieces(" and ".join(sorted(wanted))):
        part = _Part(passes, wanted, at)
        share = (at.stop - at.start) / len(passes.x)
        _add(made.gradients, part.gradients, share)
        _add(made.curvature, part.curvature, share)
        _add(made.fisher, part.fisher, share)
        made.outputs = part.outputs
        rows.append(part.input_gradients)
        states.append(part.states)
    if "curvature" in wanted and len(states) > 1:
        # The Hessian of a mean is not the mean over parts of (Hessian x gradient): the gradient is that of the whole.
        raise InputError("curvature needs the gradient of the whole batch and cannot be made in parts. Give no chunk.")
    if "input_gradients" in wanted:
        made.input_gradients = torch.cat(rows)
    if "codes" in wanted:
        made.codes, made.units = _agreements(states)
    return made


def _agreements(states: list[list[Tensor]]) -> tuple[Tensor, int]:
    """``sum over ReLUs of X X^T + (1 - X)(1 - X)^T`` in float64 ``[N, N]``, and the number of units."""
    if not states[0]:
        raise InputError(
            "this proxy looks at ReLUs and the network ran none. Take a proxy that does not ('nasq proxies' lists them)."
        )
    total, units = None, 0
    # ReLUs of one input have one and the same tensor of states, whose agreements count as often.
    times = Counter(tuple(map(id, parts)) for parts in zip(*states, strict=True))
    for parts in {tuple(map(id, parts)): parts for parts in zip(*states, strict=True)}.values():
        x, often = torch.cat(parts).flatten(1).float(), times[tuple(map(id, parts))]
        both, on, width = x @ x.T, x.sum(1), x.shape[1]
        agree = (2 * both - on[:, None] - on[None, :] + width).double() * often
        total = agree if total is None else total + agree
        units += width * often
    assert total is not None
    return total, units


class _Part:
    """One part of the batch: a forward pass, and the backward passes that were asked for."""

    def __init__(self, passes: Passes, wanted: frozenset[str], at: slice) -> None:
        self.passes, self.wanted = passes, wanted
        self.gradients: dict[str, Tensor] = {}
        self.curvature: dict[str, Tensor] = {}
        self.fisher: dict[str, Tensor] = {}
        self.input_gradients = torch.empty(0)
        self.states, self.repeats = list[Tensor](), Repeats()
        self.calls: list[tuple[str, int, Tensor]] = []
        self.count = at.stop - at.start
        x = passes.x[at].detach().requires_grad_("input_gradients" in wanted)
        recorder = Recorder(
            passes.layers,
            on_call=self._call if "fisher" in wanted else None,
            on_relu=self._relu if "codes" in wanted else None,
        )
        backward = bool(wanted - {"codes"})
        with torch.set_grad_enabled(backward), recorder:
            logits = passes.run(passes.model, x)
        self.outputs = logits.shape[-1]
        if wanted & {"gradients", "curvature", "fisher"}:
            self._weights(logits, passes.y[at], keep="input_gradients" in wanted)
        if "input_gradients" in wanted:
            # A network may have cut its input off (a cell without a path): its outputs are constant.
            (found,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
            self.input_gradients = (torch.zeros_like(x) if found is None else found).flatten(1).detach()

    def _call(self, call: Call) -> Tensor:
        fan_in = call.weight[0].numel()
        self.calls.append((call.layer, fan_in, call.output))
        return call.output.clone()  # an operation in place behind it may overwrite this one, not what is kept

    def _relu(self, x: Tensor) -> None:
        self.states.append(self.repeats.made(x, lambda one: one.detach() > 0)[0])

    def _weights(self, logits: Tensor, y: Tensor, keep: bool) -> None:
        layers, second = self.passes.layers, "curvature" in self.wanted
        sources = [*layers.values(), *(output for _, _, output in self.calls)]
        loss = self.passes.loss(logits, y)
        found = torch.autograd.grad(loss, sources, create_graph=second, retain_graph=keep or second, allow_unused=True)
        gradients = found[: len(layers)]
        self.gradients = {path: one.detach() for path, one in filled(gradients, layers).items()}
        self._channels(found[len(layers) :])
        if second:
            used = [one for one in gradients if one is not None]
            inner = sum((one.detach() * one).sum() for one in used)
            assert isinstance(inner, Tensor)
            twice = torch.autograd.grad(inner, list(layers.values()), retain_graph=keep, allow_unused=True)
            self.curvature = filled(twice, layers)

    def _channels(self, gradients: Iterable[Tensor | None]) -> None:
        """Fisher's channel values, times the fan-in that its reference broadcasts them to."""
        part = self.count / len(self.passes.x)  # the gradient is of the part's mean, the definition has the batch's
        for (path, fan_in, output), gradient in zip(self.calls, gradients, strict=True):
            if gradient is None:
                continue
            product = output.detach() * gradient.detach() * part
            positions = [axis for axis in range(1, product.ndim) if axis != _channel_axis(product)]
            per_image = product.sum(positions) if positions else product
            value = 0.5 * per_image.square().mean(0) * fan_in
            self.fisher[path] = self.fisher[path] + value if path in self.fisher else value


def _channel_axis(output: Tensor) -> int:
    """Convolutions have channels behind the batch, linear layers at the end."""
    return 1 if output.ndim == 4 else output.ndim - 1
