"""Per-sample gradients as a stream: every layer's, for a few samples at a time, from batched passes.

The published way is a loop: one forward and backward pass per sample. Here a whole piece of samples goes through at once.
BatchNorm normalises each sample by its own statistics, as it does when samples come one at a time; so samples never meet,
and the backward pass of the summed losses carries every sample's own gradient to every layer's output. There it is combined
with the layer's input, handed over, and forgotten: memory is that of one piece's activations.

Shapes: ``N`` samples of a piece.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nasq.ranking.batched import sample_gradients
from nasq.ranking.capture import Call, Recorder

__all__ = ["stream_gradients"]

Take = Callable[[str, Tensor, slice], None]


def stream_gradients(
    run: Callable[[Tensor], Tensor],
    layers: Mapping[str, nn.Parameter],
    x: Tensor,
    signal: Callable[[Tensor, slice], Tensor],
    take: Take,
    chunk: int,
    room: int | None = None,
) -> None:
    """Calls ``take(path, gradients [n, *weight shape], samples)`` for every layer and piece of samples.

    A layer whose weight no sample's signal depends on is never handed over; its gradient is zero.

    Args:
        run: The network, inputs to outputs.
        layers: Its layers' weights, requiring gradients; see :func:`~nasq.ranking.capture.layers_of`.
        x: Inputs ``[samples, ...]``.
        signal: Of a piece's outputs and its place in ``x``, the sum over its samples of what is differentiated.
        take: The receiver.
        chunk: Samples of a piece. The gradients do not depend on it.
        room: Bytes; a layer whose gradients of a piece take more hands them over in several parts where it can, so that
            they stay in a processor's cache. ``None``: a piece's at once.
    """
    for at in range(0, len(x), chunk):
        place = slice(at, min(at + chunk, len(x)))
        _Piece(layers, take, place, room).pass_through(run, x[place], signal)


class _Piece:
    """One piece of samples on its way through the network and back."""

    def __init__(self, layers: Mapping[str, nn.Parameter], take: Take, place: slice, room: int | None) -> None:
        self.layers, self.take, self.place, self.room = layers, take, place, room
        self.uses: dict[str, int] = {}
        self.sums: dict[str, Tensor] = {}

    def pass_through(
        self, run: Callable[[Tensor], Tensor], x: Tensor, signal: Callable[[Tensor, slice], Tensor]
    ) -> None:
        with torch.enable_grad(), Recorder(self.layers, on_call=self._watch, per_sample=True):
            total = signal(run(x), self.place)
        if total.requires_grad:  # a network whose output depends on no layer has no gradients to stream
            total.backward()  # type: ignore[no-untyped-call]
        for path, gradients in self.sums.items():  # a layer that some of its uses did not reach
            self.take(path, gradients, self.place)

    def _watch(self, call: Call) -> Tensor | None:
        self.uses[call.layer] = self.uses.get(call.layer, 0) + 1
        made = call.output
        replaced = None
        if not made.requires_grad:
            # The weight came detached: where the input needs no gradient either, the graph begins here. The clone is
            # what the network goes on with, since a leaf may not be changed in place.
            made = made.detach().requires_grad_(True)
            replaced = made.clone()
        inputs = call.input.detach()
        arrived = functools.partial(self._arrived, call.layer, call.weight, inputs, call.geometry)
        made.register_hook(arrived)  # type: ignore[no-untyped-call]
        return replaced

    def _arrived(self, layer: str, weight: Tensor, inputs: Tensor, geometry: Any, gradient: Tensor) -> None:
        only = self.uses[layer] == 1 and layer not in self.sums and weight is self.layers[layer]
        step = self._step(weight)
        if only and step < len(inputs):
            self.uses[layer] = 0
            for at in range(0, len(inputs), step):
                with torch.no_grad():
                    part = sample_gradients(inputs[at : at + step], gradient[at : at + step], weight, geometry)
                self.take(layer, part, slice(self.place.start + at, self.place.start + at + len(part)))
            return
        with torch.no_grad():
            found = sample_gradients(inputs, gradient, weight, geometry)
        if weight is not self.layers[layer]:
            found = _through(weight, self.layers[layer], found)
        self.uses[layer] -= 1
        if layer in self.sums:
            found = found + self.sums.pop(layer)
        if self.uses[layer]:
            self.sums[layer] = found
        else:
            self.take(layer, found, self.place)

    def _step(self, weight: Tensor) -> int:
        """Samples whose gradients have room at once."""
        whole = self.place.stop - self.place.start
        return whole if self.room is None else max(1, self.room // (weight.numel() * weight.element_size()))


def _through(used: Tensor, leaf: Tensor, gradients: Tensor) -> Tensor:
    """From the weight as used (a quantized form) to the parameter, sample by sample: exact for whatever was made of it."""
    rows = [torch.autograd.grad(used, leaf, one.reshape(used.shape), retain_graph=True)[0] for one in gradients]
    return torch.stack(rows)
