"""What a run's subnets are worth: integer accuracy with statistics of their own, and the time of their file."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nasq.data import Split
from nasq.deploy import onnx
from nasq.deploy.bench import bench
from nasq.deploy.engines import engine_of
from nasq.quant import freeze
from nasq.run.assemble import Workshop, recalibration_images
from nasq.space import Subnet
from nasq.supernet import BNState

__all__ = ["Evaluation"]


class Evaluation:
    """Integer accuracy of subnets with BatchNorm statistics of their own.

    What it returns is what the exported file reaches on the same images: both run the same integers.

    Args:
        workshop: With trained weights.
    """

    def __init__(self, workshop: Workshop) -> None:
        self.workshop = workshop
        settings = workshop.config.search
        data = workshop.data
        device = next(workshop.supernet.parameters()).device
        images = recalibration_images(workshop.config, data, settings.recalibration_images).to(device)
        self.batches = [data.normalise(part) for part in torch.split(images, settings.batch_size)]
        self._statistics: dict[tuple[str, int], BNState] = {}

    def statistics(self, subnet: Subnet) -> BNState:
        """The subnet's BatchNorm statistics; kept for the present weights."""
        key = (subnet.id, self.workshop.supernet.version)
        if key not in self._statistics:
            self._statistics[key] = self.workshop.supernet.recalibrate(subnet, self.batches)
        return self._statistics[key]

    def integers(self, subnet: Subnet, split: Split, statistics: BNState | None = None) -> Tensor:
        """The final container integers ``[N, classes]`` of every image of a split, uint8; by default with its statistics."""
        supernet, data = self.workshop.supernet, self.workshop.data
        device = self.batches[0].device
        supernet.eval()
        with supernet.activate(subnet, statistics or self.statistics(subnet)):
            parts = [
                self.workshop.network.integers(data.normalise(images.to(device)))
                for images, _ in split.batches(self.workshop.config.search.batch_size)
            ]
        return torch.cat(parts)

    def accuracy(self, subnet: Subnet, split: Split | None = None) -> float:
        """Share of images classified right, 0..1; on the validation split by default. Ties go to the lower class."""
        split = split or self.workshop.data.validation
        classes = np.argmax(self.integers(subnet, split).cpu().numpy(), axis=1)
        return float((classes == split.labels.cpu().numpy()).mean())

    def latency(self, subnet: Subnet) -> float:
        """Median milliseconds of the subnet's file in the runtime, for ``search.latency_batch`` images."""
        workshop = self.workshop
        supernet, data, config = workshop.supernet, workshop.data, workshop.config
        supernet.eval()
        with supernet.activate(subnet, self.statistics(subnet)):
            program = freeze(workshop.network)
        session, batch = workshop.network.target.session, config.search.latency_batch
        engine = engine_of(program)
        runtime = engine.open(engine.runs(program, onnx.export(program)), config.bench.threads, session, batch)
        images = data.normalise(data.validation.images[: config.search.latency_batch]).cpu().numpy()
        return bench({"file": runtime.run}, images, repeats=config.bench.repeats)["file"].median
