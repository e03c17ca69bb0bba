"""SumNAS: every path of a step goes its own way for some steps, and the supernet moves to the mean of where they arrive.

Source: SumNAS (Ha et al., AAAI 2022): the meta-learning rule of Reptile (Nichol et al., 2018) over the paths of a step, which
keeps a path from undoing what another has learnt. Numbers as the released baseline of PA&DA has them; its paths, which are
drawn once per epoch there, are drawn afresh in every step here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nasq.errors import InputError
from nasq.training.loop import Trainer
from nasq.training.paths import Path
from nasq.training.totals import Totals

__all__ = ["MetaTrainer"]


class MetaTrainer(Trainer):
    """Trains as SumNAS does: inner steps for each path from the same weights, then one outer step.

    From the weights ``w``, each path takes ``inner_steps`` steps of SGD with a momentum of its own, at the scheduled
    learning rate, on the step's batch; it arrives at ``w_i``. Then ``w`` moves by ``outer_lr`` times the mean of
    ``w_i - w`` over the paths that use the parameter: an operator that one path of five has moves by the whole way of that
    path. The paper and the released code say nothing of that mean. With one inner step without momentum and ``outer_lr`` 1 a
    step of one path is plain SGD.

    Every inner step sees the same batch, so a step makes ``paths * inner_steps`` image passes: train so many times fewer
    epochs where ways are compared at equal passes. BatchNorm statistics are those of the last path.

    Args:
        inner_steps: For each path, 1 or more; SumNAS: 2.
        outer_lr: Of the outer step, above 0; SumNAS: 1.
        others: Of :class:`nasq.training.Trainer`; the config needs ``optimizer: sgd``, whose momentum and weight decay are
            those of the inner steps, and usually has ``sampler: fair``.

    Raises:
        InputError: A number is out of range, or the config asks for what inner steps do not do.
    """

    def __init__(self, *arguments: Any, inner_steps: int = 2, outer_lr: float = 1.0, **others: Any) -> None:
        super().__init__(*arguments, **others)
        if inner_steps < 1:
            raise InputError(f"inner_steps is {inner_steps}; allowed: 1 or more")
        if not outer_lr > 0:
            raise InputError(f"outer_lr is {outer_lr}; allowed: a number above 0")
        for name, found, allowed in (
            ("optimizer", self.config.optimizer, "sgd"),
            ("the number of processes", self.world.size, 1),
            ("a penalty", self.penalty, None),
            ("a teacher", self.teacher, None),
        ):
            if found != allowed:
                raise InputError(f"{name} is {found!r}, and a MetaTrainer has {allowed!r}: its inner steps are its own")
        self.inner_steps, self.outer_lr = inner_steps, outer_lr

    def _step(self, indices: Tensor, step: int, totals: Totals) -> None:
        images, labels, weights = self._batch(indices)
        paths = self.path_sampler.step()
        if not paths:
            raise InputError("the path sampler gave no subnet for a step; it has to give at least one")
        parameters: list[Tensor] = [*self._parameters]
        start = [parameter.detach().clone() for parameter in parameters]
        moves = [torch.zeros_like(value) for value in start]
        counts = [0] * len(start)
        losses: list[Tensor] = []
        for path in paths:
            first, used = self._along(path, images, labels, weights, indices, totals)
            losses.append(first)
            with torch.no_grad():
                for index in used:
                    moves[index] += self._parameters[index] - start[index]
                    counts[index] += 1
                torch._foreach_copy_(parameters, start)
        self._arrive(paths, losses, moves, counts, step, totals)

    def _along(
        self, path: Path, images: Tensor, labels: Tensor, weights: Tensor | None, indices: Tensor, totals: Totals
    ) -> tuple[Tensor, list[int]]:
        """The loss before the first inner step of a path, and which parameters it moves."""
        self.optimizer.state.clear()
        first: Tensor | None = None
        used: list[int] = []
        for _ in range(self.inner_steps):
            self.optimizer.zero_grad(set_to_none=True)
            with self.supernet.activate(path.subnet):
                logits = self._forward(images)
                loss = self.loss(logits, labels, None, weights)
                (loss * path.weight).backward()  # type: ignore[no-untyped-call]
            if first is None:
                first = loss.detach()
                totals.add(path.role, first, logits.detach(), labels)
                self.path_sampler.observe(path, first, self.supernet)
                self._observe(indices, logits.detach(), labels)
                used = [index for index, one in enumerate(self._parameters) if one.grad is not None]
            if self.config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_([self._parameters[index] for index in used], self.config.clip_norm)
            self.optimizer.step()
        assert first is not None
        return first, used

    @torch.no_grad()
    def _arrive(
        self, paths: list[Path], losses: list[Tensor], moves: list[Tensor], counts: list[int], step: int, totals: Totals
    ) -> None:
        """The outer step, unless a loss or a way is not finite."""
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        ways = [move / count for move, count in zip(moves, counts, strict=True) if count]
        norm = torch.nn.utils.get_total_norm(ways)
        values = torch.stack([*losses, norm.to(losses[0])]).tolist()
        self.check_step(paths, values, step)
        moved: list[Tensor] = [parameter for parameter, count in zip(self._parameters, counts, strict=True) if count]
        torch._foreach_add_(moved, ways, alpha=self.outer_lr)
        totals.norm += values[-1]
        totals.lr = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
