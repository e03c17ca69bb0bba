"""timm's families through quantize, extract and export: three random subnets each, the file run by onnxruntime.

Every family is a small member or a small input, with random weights; BatchNorm statistics, scales and layer scales are
drawn as well, so that every branch counts. A family passes if for each of its subnets the extracted model's integers equal
the activated supernet's, and the exported file passes the parity gate (docs/integer_arithmetic.md) with the runtime's
optimizations on.

Usage: ``python -m scripts.benchmarks.timm_sweep [--families ResNet ViT ...] [--subnets 3] [--images 8] [--out FILE.json]
[--markdown FILE.md]``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from nasq import elastic
from nasq.deploy import bundle, onnx, parity
from nasq.deploy.bench import environment
from nasq.errors import NasqError
from nasq.files import write_json, write_text
from nasq.quant import QuantizedNetwork, calibrate, freeze, quantize
from nasq.supernet import Supernet

IMAGES = 8
SUBNETS = 3


@dataclass(frozen=True)
class Family:
    """A member of a family of timm's, small enough to be run in seconds.

    Attributes:
        model: Its name.
        size: Rows and columns of the input.
        arguments: That make it smaller, or give it the input's size.
        make: Builds it from timm's own class where no name is small enough.
    """

    model: str
    size: int = 64
    arguments: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[], nn.Module] | None = None

    def build(self) -> nn.Module:
        """The model with weights drawn from torch's generator."""
        if self.make is not None:
            return self.make()
        return timm.create_model(self.model, num_classes=10, **self.arguments)  # type: ignore[no-any-return]


def _vgg() -> nn.Module:
    """VGG's own class with few channels: its head wants a map of 7x7, so its input is of full size."""
    from timm.models.vgg import VGG

    return VGG([8, "M", 16, "M", 32, "M", 32, "M", 32, "M"], num_classes=10, mlp_ratio=0.02, norm_layer=nn.BatchNorm2d)


def _efficientformer() -> nn.Module:
    """Its attention is made for a map of 7x7, so its input is of full size."""
    from timm.models.efficientformer import EfficientFormer

    return EfficientFormer(depths=(1, 1, 1, 2), embed_dims=(16, 32, 48, 64), num_vit=1, num_classes=10)


def _mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=10, img_size=64, patch_size=16, num_blocks=2, embed_dim=128)


def _resmlp() -> nn.Module:
    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    options = {"mlp_ratio": 4, "block_layer": ResBlock, "norm_layer": Affine}
    return MlpMixer(num_classes=10, img_size=64, patch_size=16, num_blocks=2, embed_dim=128, **options)


FAMILIES: dict[str, Family] = {
    "ResNet": Family("resnet18"),
    "RegNet": Family("regnetx_002"),
    "RegNet (squeeze-excite)": Family("regnety_002"),
    "MobileNetV2": Family("mobilenetv2_050"),
    "MobileNetV3": Family("mobilenetv3_small_050"),
    "EfficientNet": Family("efficientnet_b0"),
    "EfficientNet-Lite": Family("efficientnet_lite0"),
    "ConvNeXt": Family("convnext_atto", arguments={"depths": (1, 1, 2, 1)}),
    "ViT": Family("vit_tiny_patch16_224", arguments={"img_size": 64, "depth": 3}),
    "DeiT": Family("deit_tiny_patch16_224", arguments={"img_size": 64, "depth": 3}),
    "Swin": Family(
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 48, "depths": (1, 1, 1, 1), "num_heads": (2, 2, 4, 4)},
    ),
    "MLP-Mixer": Family("MlpMixer (2 blocks)", make=_mixer),
    "ResMLP": Family("MlpMixer (2 ResBlocks)", make=_resmlp),
    "DenseNet": Family("densenet121", arguments={"block_config": (2, 2, 2, 2)}),
    "VGG": Family("VGG (narrow)", 224, make=_vgg),
    "GhostNet": Family("ghostnet_050"),
    "RepVGG": Family("repvgg_a0"),
    "MobileOne": Family("mobileone_s0"),
    "FastViT": Family("fastvit_t8"),
    "EfficientFormer": Family("EfficientFormer (narrow)", 224, make=_efficientformer),
    "MaxViT": Family("maxvit_nano_rw_256", 64, {"img_size": 64}),
    "PoolFormer": Family("poolformer_s12"),
    "LeViT": Family("levit_128s", 64, {"img_size": 64}),
    "EdgeNeXt": Family("edgenext_xx_small"),
    "NFNet": Family("test_nfnet"),
    "HRNet": Family("hrnet_w18_small"),
    "DLA": Family("dla46_c"),
    "Xception": Family("xception41"),
    "Inception": Family("inception_v3", 96),
}


@dataclass
class Row:
    """What was found for one family."""

    family: str
    model: str
    size: int
    passed: bool = False
    reason: str = ""
    parameters: int = 0
    choices: int = 0
    operations: int = 0
    integer: str = ""
    differing: int = 0
    total: int = 0
    warnings: int = 0
    seconds: float = 0.0


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws what is 0, 1 or tiny in a fresh network: BatchNorm's statistics, scales and shifts, layer scales."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.2, generator=rng)
                module.running_var.uniform_(0.5, 1.5, generator=rng)
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if parameter.ndim <= 1 and last in {"weight", "gain", "skipinit_gain"}:
                parameter.uniform_(0.5, 1.5, generator=rng)
            elif last in {"gamma", "gamma_xca", "ls1", "ls2", "scale"} or last.startswith("layer_scale"):
                parameter.uniform_(0.2, 0.8, generator=rng)
            elif last == "bias":
                parameter.normal_(0, 0.1, generator=rng)
    return model


def _supernet(model: nn.Module, images: Tensor) -> Supernet:
    network = quantize(elastic.simplify(model), images[:1], "onnxruntime-cpu")
    calibrate(network, images)
    return Supernet(network).eval()


def _one_subnet(supernet: Supernet, images: Tensor, rng: torch.Generator, directory: Path, row: Row) -> str:
    """Extracts, exports and compares one random subnet; why it fails, or an empty text."""
    subnet = supernet.space.sample(rng)
    plain = supernet.extract(subnet).eval()
    assert isinstance(plain, QuantizedNetwork) and isinstance(supernet.module, QuantizedNetwork)
    with supernet.activate(subnet):
        same = torch.equal(supernet.module.integers(images), plain.integers(images))
    if not same:
        return "the extracted model's integers are not the supernet's"
    program = freeze(plain)
    bundle.write(directory, program, {parity.MODEL: onnx.export(program)})
    report = parity.check(directory, images.numpy(), layer_images=2)
    cover = report.coverage
    row.operations = len(program.ops)
    row.integer = ", ".join(f"{cover.integer[kind]}/{cover.total[kind]} {kind}" for kind in ("convolutions", "sums"))
    row.differing, row.total = row.differing + report.differing, row.total + report.total
    row.warnings += len(report.warnings)
    return "" if report.passed else report.failures()[0]


def sweep_one(name: str, family: Family, subnets: int = SUBNETS, count: int = IMAGES) -> Row:
    """One family; what goes wrong on purpose (a refusal, a difference) becomes the row's reason."""
    row = Row(name, family.model, family.size)
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(family.build()).eval()
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, family.size, family.size, generator=rng)
    try:
        supernet = _supernet(model, images)
        row.choices = len(supernet.space.choices)
        with tempfile.TemporaryDirectory(prefix="nasq-") as scratch:
            for index in range(subnets):
                row.reason = row.reason or _one_subnet(supernet, images, rng, Path(scratch) / str(index), row)
        row.passed = not row.reason
    except NasqError as error:
        row.reason = str(error)
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def markdown(rows: list[Row], machine: Mapping[str, Any], subnets: int = SUBNETS, count: int = IMAGES) -> str:
    """The table, with what it was measured on."""
    passed = sum(row.passed for row in rows)
    lines = [
        "# timm's families: quantize, extract, export",
        "",
        f"{passed} of {len(rows)} pass. Each: {subnets} random subnets with 2 to 8 bits per weight and tensor, random",
        f"weights, {count} images of noise; the extracted model equals the activated supernet, and onnxruntime with its",
        "optimizations on equals the integer reference (`python -m scripts.benchmarks.timm_sweep`, seed 0).",
        "",
        "| family | model | input | parameters | choices | operations | integer kernels | final integers differ | result |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        result = "pass" if row.passed else row.reason.replace("|", "/").replace("\n", " ")[:200]
        lines.append(
            f"| {row.family} | `{row.model}` | {row.size} | {row.parameters / 1e6:.1f} M | {row.choices} | {row.operations} "
            f"| {row.integer} | {row.differing} of {row.total} | {result} |"
        )
    facts = "; ".join(f"{key}: {value}" for key, value in machine.items())
    return "\n".join([*lines, "", f"Measured on: {facts}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    parser.add_argument("--subnets", type=int, default=SUBNETS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.families:
        family = FAMILIES[name]
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            row = sweep_one(name, family, options.subnets, options.images)
        rows.append(row)
        print(
            f"{row.family:24} {'pass' if row.passed else 'FAIL':4} {row.seconds:6.1f} s  {row.integer}  {row.reason}",
            flush=True,
        )
    machine = environment(1)
    print(f"{sum(row.passed for row in rows)} of {len(rows)} pass")
    if options.out:
        write_json(options.out, {"rows": [asdict(row) for row in rows], "environment": machine})
    if options.markdown:
        write_text(options.markdown, markdown(rows, machine, options.subnets, options.images))


if __name__ == "__main__":
    main()
