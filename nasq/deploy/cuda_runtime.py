"""Programs on a CUDA device behind the interface of a runtime, replayed as CUDA graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nasq.deploy.cuda_network import CudaNetwork
from nasq.quant.program import Program

__all__ = ["CudaRuntime", "Replay"]


_GRAPHS = 8  # batch sizes that are captured; each holds memory of its own


class CudaRuntime:
    """A program on a CUDA device as a :class:`nasq.deploy.runtimes.Runtime`; batches of equal size are replayed as graphs.

    Args:
        program: A valid program.
        device: Where it runs.
        graphs: Whether a batch size that is seen twice is captured as a CUDA graph, which spares launching the kernels
            one by one; the first 8 such sizes are.
        chunk: Most images in one call.
    """

    def __init__(
        self, program: Program, device: torch.device | str = "cuda", graphs: bool = True, chunk: int = 256
    ) -> None:
        self.network = CudaNetwork(program, device).eval()
        self.device = torch.device(device)
        self.name = f"nasq-cuda ({torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else 'cpu'})"
        self.chunk = chunk
        self._graphs: dict[tuple[int, ...], Any] | None = {} if graphs and self.device.type == "cuda" else None

    def run(self, x: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The final integers, uint8 ``[N, ...]``."""
        parts = [x[start : start + self.chunk] for start in range(0, len(x), self.chunk)]
        # Each part leaves the device before the next is run: a graph that is replayed overwrites its result.
        return np.concatenate([self._integers(part).to(torch.uint8).cpu().numpy() for part in parts])

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The dequantized output, fp32 ``[N, ...]``."""
        output = self.network.program.output
        return (self.run(x).astype(np.float32) - np.float32(output.zero_point)) * np.float32(output.scale)

    def _integers(self, x: NDArray[np.float32]) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(x)).to(self.device)
        if self._graphs is None:
            return self.network.containers(images)
        shape = tuple(images.shape)
        if shape not in self._graphs:
            # The first call of a shape chooses tiles, which no capture may hold; the second is captured.
            if len(self._graphs) < _GRAPHS:
                self._graphs[shape] = None
            return self.network.containers(images)
        if self._graphs[shape] is None:
            self._graphs[shape] = Replay(self.network.containers, images)
        found: Tensor = self._graphs[shape](images)
        return found


class Replay:
    """A function of one CUDA tensor, captured as a CUDA graph.

    Args:
        function: Free of synchronisation; run once on ``example`` before.
        example: Of the shape that is replayed.
    """

    def __init__(self, function: Any, example: Tensor) -> None:
        self.input = example.clone()
        stream = torch.cuda.Stream(example.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            function(self.input)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Another thread of the program, such as one that loads data, may talk to the device meanwhile.
        with torch.cuda.device(example.device), torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = function(self.input)

    def __call__(self, x: Tensor) -> Tensor:
        """The result for ``x``: a tensor that the next call overwrites."""
        self.input.copy_(x)
        self.graph.replay()
        found: Tensor = self.output
        return found
