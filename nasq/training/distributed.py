"""Training with several processes that share the work of a batch (data parallel), started by ``torchrun``.

Every rank draws the same paths and the same global batches from the same streams and takes its own part of each batch, so the
streams do not depend on the number of ranks: a training that is resumed with another number goes on with the same samples
and the same subnets. Gradients are summed once per step, after the last of its subnets (what ``no_sync`` does for
``DistributedDataParallel``), in one buffer.

BatchNorm normalises by the rank's own part of the batch, as usual in data-parallel training: with it, gradients differ from
those of one process, without it they are the same up to rounding.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist

from nasq.errors import InputError

__all__ = ["World", "process_group"]


@contextlib.contextmanager
def process_group() -> Iterator[World]:
    """Joins the processes that ``torchrun`` started, and leaves them at the end; alone where it did not start this one.

    CUDA tensors travel by NCCL, those of a CPU by gloo. Give the trainer ``device=world.device``.

    Yields:
        This process's place.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield World.current()
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield World.current()
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class World:
    """The processes of a training and this one's place; with one process every method does nothing.

    Attributes:
        rank: Of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The initialised process group, or one process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this process writes files and tells events."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The CUDA device of this rank, or the CPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))
        return torch.device("cpu")

    def check_batch(self, batch_size: int) -> None:
        """Refuses a batch that the ranks cannot share equally: the mean over ranks would not be that over images.

        Raises:
            InputError: Says which sizes would do.
        """
        if batch_size % self.size:
            raise InputError(
                f"a batch of {batch_size} images cannot be shared equally by {self.size} processes. Set batch_size to a "
                f"multiple of {self.size}, such as {max(batch_size // self.size, 1) * self.size}."
            )

    def own(self, count: int) -> slice:
        """This rank's part of ``count`` images."""
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def start_equal(self, module: nn.Module) -> None:
        """Gives every rank the parameters and buffers of rank 0."""
        if self.size > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their mean over the ranks, in one message per type.

        All ranks have the same gradients missing, since they train the same subnets.
        """
        if self.size == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                groups.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in groups.values():
            buffer = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(buffer)
            buffer /= self.size
            parts = torch.split(buffer, [gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the ranks."""
        if self.size == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values / self.size

    def gather(self, values: Tensor) -> Tensor:
        """The parts ``[n, ...]`` of all ranks in order, ``[size * n, ...]``."""
        if self.size == 1:
            return values
        whole = values.new_empty(self.size * len(values), *values.shape[1:])
        dist.all_gather(list(whole.chunk(self.size)), values.contiguous())
        return whole

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()
