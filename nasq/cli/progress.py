"""Progress of a run on a terminal: a bar with rate and time left, or a line per event where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from nasq.cli.output import Output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["RunProgress", "TerminalBar"]


class TerminalBar:
    """A bar with rate and time left, while a ``with`` statement lasts; none where there is no terminal, or it is quiet.

    Args:
        output: Where to write.

    Attributes:
        bar: Of rich; ``None`` where there is none. Its tasks have a field ``rate``.
        description: In front of the bar, as rich formats it.
        counted: Whether "done/total" stands behind the bar.
    """

    description = "{task.description}"
    counted = False

    def __init__(self, output: Output) -> None:
        self.output = output
        self.bar: Progress | None = None

    def __enter__(self) -> Self:
        console = self.output.console(stderr=True)
        if not self.output.quiet and console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn(self.description), BarColumn(24), *[MofNCompleteColumn()] * self.counted,
                TextColumn("{task.fields[rate]:>14}"), TimeRemainingColumn(), console=console, transient=True,
            )  # fmt: skip
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


class RunProgress(TerminalBar):
    """Follows the events of a run."""

    description = "{task.description:<22}"

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self.task: TaskID | None = None
        self.began = time.perf_counter()
        self.epochs = (0, 1)

    def _show(self, description: str, done: float, total: float, rate: str) -> None:
        if self.bar is None:
            return
        if self.task is None:
            self.task = self.bar.add_task(description, total=total, rate=rate)
        self.bar.update(self.task, description=description, completed=done, total=total, rate=rate)

    def _new_bar(self) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.remove_task(self.task)
        self.task = None

    def _say(self, text: str) -> None:
        elapsed = time.perf_counter() - self.began
        self.output.log(f"{elapsed:6.0f} s  {text}")

    def step(self, phase: str, done: int, total: int) -> None:
        """A training step."""
        epoch, epochs = self.epochs
        self._show(f"train ({phase})", epoch * total + done, epochs * total, f"epoch {epoch + 1}/{epochs}")

    def event(self, event: Mapping[str, Any]) -> None:
        """An event of the run."""
        handler = getattr(self, "_on_" + str(event["event"]).replace(".", "_"), None)
        if handler is not None:
            handler(event)

    def _on_stage_started(self, event: Mapping[str, Any]) -> None:
        self._new_bar()
        self._say(f"{event['stage']} ...")

    def _on_stage_done(self, event: Mapping[str, Any]) -> None:
        self._say(f"{event['stage']} done in {event['seconds']:.1f} s")

    def _on_check_done(self, event: Mapping[str, Any]) -> None:
        speed = "" if event["speedup"] is None else f"; largest: {event['speedup']:.2f}x fp32's speed"
        self._say(f"  {event['differing']} of {event['total']:,} integers differ in {event['layers']} layers{speed}")

    def _on_train_start(self, event: Mapping[str, Any]) -> None:
        self.epochs = (event["epoch"], event["epochs"])

    def _on_train_epoch(self, event: Mapping[str, Any]) -> None:
        self.epochs = (event["epoch"], event["epochs"])
        left = (event["epochs"] - event["epoch"]) * event["seconds"]
        right = "/".join(f"{100 * value:.1f}" for value in event["accuracy"].values())
        leaf = f" leaf {event['leaf']}" if event.get("leaf") else ""
        self._say(
            f"  {event['phase']}{leaf} {event['epoch']}/{event['epochs']}: loss {event['loss']:.3f}, {right} % right, "
            f"{event['images_per_second']:.0f}/s, {left:.0f} s left"
        )

    def _on_train_split(self, event: Mapping[str, Any]) -> None:
        groups = " | ".join(" ".join(map(str, group)) for group in event["groups"])
        self._say(f"  split at {event['choice']}: {groups}")

    def _on_search_started(self, event: Mapping[str, Any]) -> None:
        self._new_bar()
        self.search_began = time.perf_counter()
        self.known = event["known"]

    def _on_search_warm_start(self, event: Mapping[str, Any]) -> None:
        self._say(f"  beginning with {event['subnets']} subnets of the front of {event['run']}")

    def _on_search_lost(self, event: Mapping[str, Any]) -> None:
        self._say(f"  the worker of {event['subnet']} is lost; the subnet is given to another")

    def _on_search_worker(self, event: Mapping[str, Any]) -> None:
        again = "; it is started again" if event.get("again") else ""
        self._say(f"  worker {event['pid']} ended with code {event['code']}{again}")

    def _on_search_partial(self, event: Mapping[str, Any]) -> None:
        self._say(f"  {event['subnet']} on {event['fidelity']:.0%} of the validation images")

    def _on_search_waiting(self, event: Mapping[str, Any]) -> None:
        self._say(f"  waiting for the storage: {event['reason']}")

    def _on_search_evaluated(self, event: Mapping[str, Any]) -> None:
        seconds = max(time.perf_counter() - self.search_began, 1e-9)
        rate = (event["done"] - self.known) / seconds
        self._show("search", event["done"], event["budget"], f"{rate:.1f} subnets/s")
        if self.bar is None and (event["done"] % 40 == 0 or event["done"] == event["budget"]):
            left = (event["budget"] - event["done"]) / rate
            self._say(f"  {event['done']}/{event['budget']} subnets, {rate:.1f}/s, {left:.0f} s left")

    def _on_export_subnet(self, event: Mapping[str, Any]) -> None:
        self._say(
            f"  {event['subnet']}: validation {100 * event['validation']:.2f} %, "
            f"{event['differing']} of {event['total']} integers differ"
        )
