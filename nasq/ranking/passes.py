"""The forward and backward passes that proxies share: each is made once, for all who asked for it.

One pass over the whole batch makes all of :mod:`nasq.ranking.observations`. ``signs`` is the pass in which every image stands
alone: per weight, the sum over images of the signs of the gradient of each image's own loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from nasq.elastic.base import elastic_modules
from nasq.errors import InputError
from nasq.ranking.capture import Recorder, layers_of
from nasq.ranking.copies import private_copy, seeded
from nasq.ranking.observations import OBSERVATIONS, Observed, filled, observe
from nasq.ranking.per_sample import stream_gradients

__all__ = ["Batch", "Passes", "begin"]

Batch = tuple[Tensor, Tensor | None]
"""Normalised inputs ``[N, ...]`` and int64 labels ``[N]``; ``None`` where there are no labels."""

SAMPLES = {"cpu": 32}
"""Images of one piece where every image stands alone and nothing else is asked for; elsewhere 64.

Larger pieces allocate blocks that the C library returns to the system after every use."""

ROOM = {"cpu": 2_400_000}
"""Bytes of one layer's gradients of single images that are made at once; elsewhere as many as a piece has."""


class Passes:
    """The passes over one model and one batch, made when they are first asked for.

    Args:
        model: The network as its constructor initialised it. It is copied, never touched.
        batch: Inputs ``[N, ...]`` and labels.
        seed: Decides everything that is drawn.
        output: Which element to score where the network returns a tuple, list or dictionary.
        chunk: At most so many images at once; the result is the same. Refused where BatchNorm couples the images.
        wanted: What will be asked for, of :data:`OBSERVATIONS`, so that one pass can serve all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        seed: int = 0,
        output: int | str | None = None,
        chunk: int | None = None,
        wanted: Iterable[str] = (),
    ) -> None:
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk is {chunk}. Allowed: 1 or more images at once, or None for all.")
        self.original = model
        self.seed, self.output, self.chunk, self.wanted = seed, output, chunk, frozenset(wanted)
        device = next((one.device for one in model.parameters()), batch[0].device)
        dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), batch[0].dtype)
        self.device = device
        self.x = batch[0].to(device=device, dtype=dtype)
        self.given = batch[1]
        self.kept: dict[str, Any] = {}

    @property
    def y(self) -> Tensor:
        """The labels, int64 ``[N]``.

        Raises:
            InputError: There are none, or not one for every image.
        """
        if self.given is None:
            raise InputError(
                "this proxy needs labels and the batch has none. Give labels (a data set: --data), or take a proxy "
                "without ('nasq proxies' says what each needs)."
            )
        if tuple(self.given.shape) != (len(self.x),):
            raise InputError(f"the labels are {list(self.given.shape)} for {len(self.x)} images. Give one per image.")
        return self.given.to(self.device)

    def shared(self, key: str, make: Callable[[], Any]) -> Any:
        """The value under ``key``, made by the first who asks: for parts of a proxy that share work."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator of its own for ``purpose``, the same for the same seed whatever else was drawn."""
        return torch.Generator().manual_seed(self._seed(purpose))

    def _seed(self, purpose: str) -> int:
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def noise(self, shape: Iterable[int], purpose: str) -> Tensor:
        """Standard normal numbers in the input's type, on its device."""
        drawn = torch.randn(tuple(shape), generator=self.generator(purpose))
        return drawn.to(device=self.device, dtype=self.x.dtype)

    def copy(self, *, norms: bool = True) -> nn.Module:
        """A fresh private copy; see :func:`~nasq.ranking.copies.private_copy`."""
        return private_copy(self.original, norms=norms)

    def sample_gram(self, count: int) -> Tensor:
        """Inner products of the gradients of single samples' summed outputs: ``[count, count]``, float64.

        Over the weights of all layers, of the first ``count`` images, each normalised by its own statistics.
        """
        model = self.copy()
        layers = layers_of(model)
        for weight in layers.values():
            weight.requires_grad_(True)
        x = self.x[:count]
        total = torch.zeros(len(x), len(x), dtype=torch.float64, device=self.device)

        def take(path: str, gradients: Tensor, _: slice) -> None:
            rows = gradients.flatten(1).double()
            total.add_(rows @ rows.T)

        stream_gradients(lambda one: self.run(model, one), layers, x, lambda out, _: out.sum(), take, len(x))
        return total

    @cached_property
    def model(self) -> nn.Module:
        """The copy that shared passes run on, its layers' weights requiring gradients."""
        copied = self.copy()
        for weight in layers_of(copied).values():
            weight.requires_grad_(True)
        return copied

    @cached_property
    def layers(self) -> dict[str, nn.Parameter]:
        """The layers' weights of :attr:`model`, by path."""
        return layers_of(self.model)

    @cached_property
    def coupled(self) -> bool:
        """Whether BatchNorm couples the images of a batch."""
        return any(isinstance(module, _BatchNorm) for module in self.original.modules())

    def run(self, model: nn.Module, x: Tensor, mode: str = "fake") -> Tensor:
        """The network's output for ``x``: logits ``[n, classes]``; ``mode`` is the form of a quantized network."""
        with seeded(self._seed("forward"), self.device):
            made = model(x, mode=mode) if hasattr(model, "integers") else model(x)
        return self._chosen(made)

    def _chosen(self, made: Any) -> Tensor:
        if isinstance(made, Tensor):
            if self.output is not None:
                raise InputError(
                    f"the network returns one tensor {list(made.shape)}, and output={self.output!r} chooses among several. "
                    "Leave it out ('nasq score' without --output)."
                )
            return made
        elements: Mapping[Any, Any] = dict(made) if isinstance(made, Mapping) else dict(enumerate(made))
        if self.output in elements and isinstance(elements[self.output], Tensor):
            return elements[self.output]  # type: ignore[no-any-return]
        listed = ", ".join(f"{key}: {list(getattr(value, 'shape', []))}" for key, value in elements.items())
        raise InputError(
            f"the network returns a {type(made).__name__} of {len(elements)} ({listed}), and output={self.output!r} names "
            "no tensor in it. Say which one holds the logits: output=INDEX ('nasq score --output INDEX')."
        )

    def loss(self, logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy.

        Raises:
            InputError: The logits are no ``[n, classes]``, or a label has no output.
        """
        if logits.ndim != 2:
            raise InputError(
                f"the network's output is {list(logits.shape)}, and proxies with labels need logits [N, classes]. "
                "Score it with a proxy without labels."
            )
        if int(y.max()) >= logits.shape[1] or int(y.min()) < 0:
            raise InputError(
                f"the labels go from {int(y.min())} to {int(y.max())} and the network has {logits.shape[1]} outputs. "
                "Build it with as many classes as the data has."
            )
        return F.cross_entropy(logits, y, reduction=reduction)

    def pieces(self, what: str) -> list[slice]:
        """The parts of the batch that a pass over ``what`` takes one after another.

        Raises:
            InputError: It may not be split and was asked to be; says what memory the whole batch takes.
        """
        count = len(self.x)
        size = count if self.chunk is None else min(self.chunk, count)
        if size < count and self.coupled:
            raise InputError(
                f"{what} depends on the whole batch of {count} images, which BatchNorm couples, and cannot be made in parts "
                f"of {size}. It needs about {self.memory() / 2**20:.0f} MiB. Give fewer images, or no chunk."
            )
        return [slice(at, min(at + size, count)) for at in range(0, count, size)]

    def memory(self) -> int:
        """Bytes that a forward pass over the whole batch keeps for its backward pass, from a pass over two images."""
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = self.x[:2].detach().requires_grad_(True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            self.run(self.copy(), x)
        return sum(kept.values()) * len(self.x) // len(x)

    @cached_property
    def observed(self) -> Observed:
        """Everything in :attr:`wanted`, from one forward pass over the batch."""
        return observe(self, self.wanted & OBSERVATIONS)

    def see(self, what: str) -> Any:
        """One observation by name; whatever else is :attr:`wanted` comes with it."""
        if what not in self.wanted:
            self.wanted |= {what}
            self.__dict__.pop("observed", None)
        return getattr(self.observed, what)

    def gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Gradients of the mean loss over other images than the batch, by layer; unused layers have zeros."""
        with Recorder({}):
            logits = self.run(self.model, x)
        return filled(
            torch.autograd.grad(self.loss(logits, y), list(self.layers.values()), allow_unused=True), self.layers
        )

    @cached_property
    def signs(self) -> dict[str, Tensor]:
        """Per weight, ``sum over images of sign(gradient of the image's own loss)``, int32, by layer."""
        return self.count_signs(norms=True)

    def count_signs(self, norms: bool) -> dict[str, Tensor]:
        """:attr:`signs`, with BatchNorm per image (``norms``) or with its running statistics."""
        model = self.model if norms else self.copy(norms=False)
        layers = layers_of(model)
        for weight in layers.values():
            weight.requires_grad_(True)
        totals = {path: torch.zeros_like(weight, dtype=torch.int32) for path, weight in layers.items()}

        def take(path: str, gradients: Tensor, _: slice) -> None:
            signs = gradients.sign_().flatten(1).to(torch.promote_types(gradients.dtype, torch.float32))
            # A row of ones times signs: exact, since every sum is a small integer, and faster than a reduction.
            totals[path] += (signs.new_ones(1, len(signs)) @ signs).to(torch.int32).reshape(totals[path].shape)

        y = self.y
        signal = lambda logits, at: self.loss(logits, y[at], "sum")  # noqa: E731
        kind = self.device.type
        chunk = self.chunk or SAMPLES.get(kind, 64)
        stream_gradients(lambda x: self.run(model, x), layers, self.x, signal, take, chunk, ROOM.get(kind))
        return totals


def begin(
    model: nn.Module,
    batch: Batch,
    generator: torch.Generator | None,
    *,
    output: int | str | None = None,
    chunk: int | None = None,
    wanted: Iterable[str] = (),
) -> Passes:
    """The passes over a plain model, seeded by one draw from ``generator`` (``None``: one seeded with 0).

    Raises:
        InputError: The model still holds choices.
    """
    for path, _ in elastic_modules(model):
        raise InputError(
            f"the network still holds choices (at {path or 'its root'!r}), and a score is of one subnet. Extract it: "
            "supernet.extract(subnet)."
        )
    own = torch.Generator().manual_seed(0) if generator is None else generator
    seed = int(torch.randint(2**62, (1,), generator=own, device=own.device).item())
    return Passes(model, batch, seed=seed, output=output, chunk=chunk, wanted=wanted)
