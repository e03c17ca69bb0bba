"""The supernet: one network that contains every subnet of its search space."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from nasq.elastic.base import (
    Container,
    elastic_modules,
    extract,
    no_choice_left,
    refused_shape,
    share_active,
    share_mixture,
)
from nasq.elastic.norm import AnyBatchNorm, BatchNorm2d, batch_norms
from nasq.elastic.read import read_space
from nasq.errors import ArtifactError, InputError
from nasq.files import read_json, write_bytes, write_json
from nasq.space import Option, Subnet

__all__ = ["BNState", "Supernet"]

_SCHEMA = 1


@dataclass(frozen=True)
class BNState:
    """BatchNorm statistics of one subnet: ``(mean, var)`` of the active channels, by the layer's path."""

    statistics: Mapping[str, tuple[Tensor, Tensor]]


class _Activation:
    """What :meth:`Supernet.activate` returns; as a context manager it restores what was active before."""

    def __init__(self, supernet: Supernet, subnet: Mapping[str, Option], bn: BNState | None) -> None:
        self.supernet, self.before = supernet, dict(supernet.active)
        self.saved: list[tuple[Tensor, Tensor]] = []
        _switch(supernet, subnet)
        if bn is None:
            return
        try:
            norms = dict(batch_norms(supernet.module))
            found = [(_fitting(norms, path, pair), pair) for path, pair in bn.statistics.items()]
        except InputError:
            _switch(supernet, self.before)
            raise
        for norm, pair in found:
            for buffer, value in zip(_buffers(norm), pair, strict=True):
                self.saved.append((buffer, buffer.clone()))
                _write(norm, buffer, value)

    def __enter__(self) -> Supernet:
        return self.supernet

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _switch(self.supernet, self.before)
        for buffer, value in reversed(self.saved):
            buffer.copy_(value)


def _fitting(norms: Mapping[str, AnyBatchNorm], path: str, statistics: tuple[Tensor, Tensor]) -> AnyBatchNorm:
    """The layer at ``path``, which the statistics have to fit."""
    norm = norms.get(path)
    if norm is None:
        raise InputError(f"the BatchNorm statistics name {path!r}, which this supernet does not have.")
    shapes, channels = [tuple(value.shape) for value in statistics], _channels(norm)
    if shapes != [(channels,)] * 2:
        raise InputError(
            f"the BatchNorm statistics of {path!r} have the shapes {shapes}, and the layer has {channels} active "
            "channels: they are those of another subnet. Recalibrate this one."
        )
    return norm


def _write(norm: AnyBatchNorm, buffer: Tensor, value: Tensor) -> None:
    if isinstance(norm, BatchNorm2d):
        norm.write_active(buffer, value)
    else:
        buffer.copy_(value)


def _switch(supernet: Supernet, options: Mapping[str, Option]) -> None:
    supernet.active.clear()
    supernet.active.update(options)


def _channels(norm: AnyBatchNorm) -> int:
    return norm.active_channels() if isinstance(norm, BatchNorm2d) else norm.num_features


def _buffers(norm: AnyBatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


class Supernet(nn.Module):
    """Wraps any module that holds choices.

    Args:
        module: The network. Its elastic layers share one set of active options from here on.
        name: A name for the space, for reports.

    Attributes:
        space: The search space, read off the module.
        active: The active options by choice name; an absent choice has its default. Change it with :meth:`activate`.
    """

    def __init__(self, module: nn.Module, name: str = "") -> None:
        super().__init__()
        self.module = module
        self.space = read_space(module, name)
        self.active = share_active(module)
        self.mixture = share_mixture(module)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The active subnet's output; ``options`` go to the module (``mode=`` of a quantized network).

        Raises:
            InputError: An input has a shape that the network does not take.
        """
        try:
            return self.module(*inputs, **options)
        except (RuntimeError, ValueError) as error:
            refused = refused_shape(self.space.name or type(self.module).__name__, inputs, error)
            if refused is None:
                raise
            raise refused from error

    def activate(self, subnet: Mapping[str, Option], bn: BNState | None = None) -> _Activation:
        """Makes ``subnet`` the active one; in a ``with`` statement, until its end.

        Args:
            subnet: A member of the space.
            bn: Its BatchNorm statistics, from :meth:`recalibrate`.

        Raises:
            InputError: It is not a member (names the choice), or the statistics are not its own.
        """
        member = subnet if isinstance(subnet, Subnet) else Subnet(subnet)
        self.space.validate(member)
        return _Activation(self, member, bn)

    @contextlib.contextmanager
    def mix(self, weights: Mapping[str, Tensor]) -> Iterator[Supernet]:
        """Within a ``with`` statement, containers compute the weighted sum of all their parts.

        This is the continuous relaxation of differentiable search: with weights ``softmax(alpha)`` that of DARTS
        (Liu et al. 2019, eq. 2), with Gumbel-softmax samples that of SNAS. Gradients reach the weights. An
        :class:`~nasq.elastic.InputChoice` weighs an edge by the sum of the weights of the options that use it.

        Args:
            weights: One tensor ``[options]`` per mixed choice, in the order of its options; they need not sum to 1. The
                other choices are as activated.

        Raises:
            InputError: A choice is unknown, belongs to a layer's size instead of a container of alternatives, its weights
                have another shape, or the network is quantized.
        """
        if _quantized(self.module):
            raise InputError(
                "a quantized network cannot be mixed: its integers have no weighted sum. Mix the float one."
            )
        for name, given in weights.items():
            self._check_mixture(name, given)
        before = dict(self.mixture)
        self.mixture.update(weights)
        try:
            yield self
        finally:
            self.mixture.clear()
            self.mixture.update(before)

    def _check_mixture(self, name: str, weights: Tensor) -> None:
        choice = self.space[name]
        if not isinstance(weights, Tensor) or weights.shape != (len(choice.options),):
            shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise InputError(
                f"the mixture of {name!r} is {shape}. Give a tensor [{len(choice.options)}]: one per option."
            )
        for path, module in elastic_modules(self.module):
            if choice in module.own_choices and (not isinstance(module, Container) or module.layout != "parallel"):
                raise InputError(
                    f"the choice {name!r} cannot be mixed: {path!r} takes it as a size or depth. Mix choices of OneOf and "
                    "InputChoice."
                )

    def extract(self, subnet: Mapping[str, Option], bn: BNState | None = None) -> nn.Module:
        """The subnet as a plain module with its own weights.

        In evaluation mode on a CPU its outputs equal the activated supernet's bit for bit; on CUDA they do with
        deterministic algorithms and TF32 off.
        """
        with self.activate(subnet, bn), torch.no_grad():
            plain = extract(self.module)
        no_choice_left(plain)
        return plain

    @property
    def version(self) -> int:
        """Changes whenever a weight changes in place; with a subnet it is the key for cached statistics."""
        return sum(parameter._version for parameter in self.module.parameters())

    @torch.no_grad()
    def recalibrate(self, subnet: Mapping[str, Option], batches: Iterable[Tensor], **options: Any) -> BNState:
        """BatchNorm statistics of ``subnet``: from reset, the average over ``batches``; the supernet is left as it was.

        Args:
            subnet: A member of the space.
            batches: Inputs ``[N, ...]``; the more images in all, the less noise in the statistics.
            options: For the module's forward.

        Raises:
            InputError: It is not a member, or there is no batch.
        """
        norms = dict(batch_norms(self.module))
        before = {path: (norm.training, norm.momentum, norm.num_batches_tracked) for path, norm in norms.items()}
        saved = {path: tuple(buffer.clone() for buffer in _buffers(norm)) for path, norm in norms.items()}
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            for norm in norms.values():
                norm.train()
                norm.momentum = None
                norm.num_batches_tracked = torch.zeros_like(_tracked(norm))
            with self.activate(subnet):
                options = {"mode": "fake", **options} if _quantized(self.module) else options
                count = 0
                for count, batch in enumerate(batches, 1):  # noqa: B007
                    self.module(batch, **options)
                if not count:
                    raise InputError("recalibration got no batch of inputs. Give at least one; iterators are used up.")
                return BNState({path: _taken(norm) for path, norm in norms.items() if int(_tracked(norm)) > 0})
        finally:
            for path, norm in norms.items():
                mode, norm.momentum, norm.num_batches_tracked = before[path]
                norm.train(mode)
                for buffer, value in zip(_buffers(norm), saved[path], strict=True):
                    buffer.copy_(value)
            for module in training:
                module.training = True

    def save(self, directory: Path) -> None:
        """Writes weights (``weights.safetensors``) and the space (``supernet.json``) into ``directory``, atomically each."""
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.module.state_dict().items()}
        unique = {name: tensor.clone() for name, tensor in tensors.items()}
        write_bytes(directory / "weights.safetensors", save_tensors(unique))
        description = {"schema": _SCHEMA, "space": self.space.name, "fingerprint": self.space.fingerprint}
        write_json(directory / "supernet.json", description)

    def load(self, directory: Path) -> None:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: A file is missing, corrupt, or of another space (both fingerprints are named).
        """
        found = read_json(directory / "supernet.json")
        schema, fingerprint = (found.get(key) if isinstance(found, dict) else None for key in ("schema", "fingerprint"))
        if isinstance(schema, int) and schema > _SCHEMA:
            raise ArtifactError(f"{directory} has schema {schema}; this version of nasq reads {_SCHEMA}. Update nasq.")
        if schema != _SCHEMA or not isinstance(fingerprint, str):
            raise ArtifactError(f"{directory / 'supernet.json'} does not describe a supernet. It is corrupt.")
        if fingerprint != self.space.fingerprint:
            raise ArtifactError(
                f"the weights in {directory} belong to a space with fingerprint {fingerprint}, this supernet's "
                f"is {self.space.fingerprint}. Build the supernet with the same space and bits."
            )
        self.module.load_state_dict(self._read_weights(directory / "weights.safetensors"))

    def _read_weights(self, path: Path) -> dict[str, Tensor]:
        """Weights that fit this supernet, all of them: a load that fails half-way would leave a mixture."""
        try:
            tensors: dict[str, Tensor] = load_tensors(path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path} cannot be read: {str(error).splitlines()[0]}. It is corrupt or truncated."
            ) from error
        own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.module.state_dict().items()}
        given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        wrong = sorted(name for name in own | given if own.get(name) != given.get(name))
        if wrong:
            name = wrong[0]
            raise ArtifactError(
                f"{path} does not fit this supernet: {name!r} is {_described(given.get(name))} in the file and "
                f"{_described(own.get(name))} here ({len(wrong)} differ). It is corrupt, or the network's code has changed."
            )
        return tensors


def _described(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "absent" if tensor is None else f"{list(tensor[0])} of {str(tensor[1]).removeprefix('torch.')}"


def _quantized(module: nn.Module) -> bool:
    """Whether the module takes a mode: statistics belong to the form that training uses."""
    return hasattr(module, "integers")


def _tracked(norm: AnyBatchNorm) -> Tensor:
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked


def _taken(norm: AnyBatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = norm.active_tensors()[:2] if isinstance(norm, BatchNorm2d) else _buffers(norm)
    return mean.clone(), var.clone()
