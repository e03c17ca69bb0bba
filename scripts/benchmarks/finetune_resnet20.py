"""Fine-tunes a 4-bit ResNet-20 on CIFAR-10 and compares the exported file with nasq's own integers, image by image.

Usage: ``python -m scripts.benchmarks.finetune_resnet20 --data DIR --weights resnet20.npz [--steps 400] [--images 10000]``

The float network's weights are inherited by a space of bits (4, 6 and 8 for every layer and tensor, 8 for the first and
last layer); the 4-bit subnet is extracted with BatchNorm statistics of its own, which stay frozen, and trained on alone,
taught by the largest subnet, as ``nasq finetune`` does for a run. The file runs on onnxruntime, unmodified.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from nasq.search_spaces._resnet_weights import load_weights

import nasq
from nasq import Supernet, plugins
from nasq.data import Split
from nasq.data import load as load_data
from nasq.deploy import bundle, onnx, parity
from nasq.deploy.bench import environment
from nasq.deploy.runtimes import OnnxRuntime
from nasq.files import write_json
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.run.card import accuracy_interval
from nasq.run.finetune import DEFAULTS, FrozenNorms
from nasq.space import Subnet
from nasq.training import TrainConfig, Trainer, Uniform, stream

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the float weights were trained with


def integers(network: QuantizedNetwork, images: torch.Tensor) -> np.ndarray:  # type: ignore[type-arg]
    """The final integers of normalised images."""
    with torch.no_grad():
        return torch.cat([network.integers(part) for part in torch.split(images, 250)]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of 64 images each, in two epochs")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_data("cifar10", options.data)
    some = Split(data.train.images[: 32 * options.steps], data.train.labels[: 32 * options.steps])
    data = dataclasses.replace(data, train=some, mean=MEAN, std=STD)
    network = plugins.load("search_spaces", "resnet20")(elastic=False)
    load_weights(network, options.weights)
    example = torch.zeros(1, 3, 32, 32)
    supernet = Supernet(quantize(network, example, weight_bits=(4, 6, 8), activation_bits=(4, 6, 8)))
    calibrate(supernet.module, data.normalise(data.train.images[:512]))  # type: ignore[arg-type]
    space = supernet.space
    subnet = Subnet({choice.name: options.bits for choice in space.choices})
    batches = [data.normalise(part) for part in torch.split(data.train.images[:1024], 256)]
    student = supernet.extract(subnet, supernet.recalibrate(subnet, batches))
    teacher = supernet.extract(space.largest(), supernet.recalibrate(space.largest(), batches))
    assert isinstance(student, QuantizedNetwork)
    test = Split(data.test.images[: options.images], data.test.labels[: options.images])
    images, labels = data.normalise(test.images), test.labels.numpy()

    def accuracy(found: np.ndarray) -> float:  # type: ignore[type-arg]
        return float((found.argmax(1) == labels).mean())

    before = accuracy(integers(student.eval(), images))
    settings = TrainConfig.from_dict({**DEFAULTS, "epochs": 2, "threads": options.threads})
    wrapped, began = FrozenNorms(student), time.process_time()
    Trainer(wrapped, data, settings, path_sampler=Uniform(wrapped.space, stream(0, "paths")), teacher=teacher).run()
    seconds = time.process_time() - began
    own = integers(student.eval(), images)
    with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
        directory = Path(scratch) / "bundle"
        program = freeze(student)
        bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
        file = OnnxRuntime(directory / parity.MODEL).run(images.numpy())
        report = parity.check(directory, images[:64].numpy(), labels[:64], layer_images=16)
        loaded = nasq.load(directory).integers(images[:1000]).numpy()
    right = accuracy(file)
    result = {
        "subnet": f"{options.bits}-bit weights and activations, first and last layer 8", "test images": len(labels),
        "steps": 2 * (len(data.train) // 64), "accuracy before": before, "accuracy of nasq's integers": accuracy(own),
        "accuracy of the file": right, "95 % interval": accuracy_interval(right, len(labels)),
        "final integers": int(own.size), "that differ": int((own != file).sum()),
        "that nasq.load makes differ, of the first 1,000 images": int((loaded != file[:1000]).sum()),
        "gate": report.passed, "layers alone that differ": sum(layer.differing > 0 for layer in report.layers),
        "training, processor seconds": round(seconds, 1), "environment": environment(options.threads),
    }  # fmt: skip
    if options.out:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
