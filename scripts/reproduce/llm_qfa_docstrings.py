"""LLM-QFA on a small language model: separate low-bit weights with adapters, and the balanced scheduler against uniform.

A byte model is trained on the docstrings of Python's standard library and cut out; its blocks' linear layers get frozen
weights of 2, 3 and 4 bits (GPTQ) with adapters, which are trained

* ``own, balanced``: an adapter per bit-width, subnets of the triangular scheduler (LLM-QFA);
* ``own, uniform``: the same with every layer's bits drawn alone;
* ``shared, balanced``: one adapter for all bit-widths of a layer (the paper's ablation);

for equally many steps. Test loss in bits per byte; the search is on validation, under an average of 2.5 bits.

Usage: ``python -m scripts.reproduce.llm_qfa_docstrings --out docs/results/FILE.md [--seeds 0 1] [--steps 1200 400]``.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nasq.search_spaces.causal_lm import CausalLM, causal_lm
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Supernet
from nasq.data.text import Text, docstrings
from nasq.deploy.bench import environment
from nasq.files import write_text
from nasq.quant.adapters import adapter_parameters, bits_of, separate_bits
from nasq.search.shrinking import shrinking_search
from nasq.space import Subnet
from nasq.training import Balanced, PathSampler, Uniform, stream

BITS = (2, 3, 4)
BUDGET = 2.5
CONTEXT, BATCH = 64, 16
EVALUATED = 2  # batches of 64 pieces
ROWS = ("rounded to nearest", "GPTQ", "own, uniform", "own, balanced", "shared, balanced")


@dataclass(frozen=True)
class Setting:
    """How long each stage trains."""

    pretraining: int
    adapting: int
    seed: int


def loss(network: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy in nats of every next byte of ``[N, T + 1]``."""
    logits = network.logits(batch[:, :-1])  # type: ignore[operator]
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(network: nn.Module, text: Text, part: str) -> float:
    """On the first pieces of a part."""
    network.eval()
    batches = [batch for batch, _ in zip(text.pieces(part, CONTEXT, 64), range(EVALUATED), strict=False)]
    return sum(loss(network, batch).item() for batch in batches) / len(batches) / math.log(2)


def decay(step: int, steps: int) -> float:
    """A cosine behind a short rise."""
    rise = min(1.0, (step + 1) / 50)
    return rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def pretrained(text: Text, setting: Setting) -> CausalLM:
    """The largest architecture, trained in fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        supernet = Supernet(causal_lm(context=CONTEXT))
    network = supernet.extract(supernet.space.largest()).train()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.01)
    rng = stream(setting.seed, "data")
    for step in range(setting.pretraining):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * decay(step, setting.pretraining)
        optimizer.zero_grad()
        loss(network, text.batch("train", BATCH, CONTEXT, rng)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    assert isinstance(network, CausalLM)
    return network


def low_bit(network: CausalLM, text: Text, setting: Setting, rounding: str, shared: bool) -> Supernet:
    """The network with separate weights in its blocks."""
    rng = stream(setting.seed, "calibration")
    batches = [text.batch("train", 64, CONTEXT, rng)[:, :-1] for _ in range(4)] if rounding == "GPTQ" else []
    made = separate_bits(
        network, BITS, group=16, rank=8, where=("blocks.*",), batches=batches, shared=shared,
        generator=stream(setting.seed, "adapters"),
    )  # fmt: skip
    return Supernet(made, "causal_lm")


def adapt(supernet: Supernet, sampler: PathSampler, text: Text, setting: Setting) -> None:
    """Trains the adapters."""
    parameters = adapter_parameters(supernet)
    optimizer = torch.optim.AdamW(parameters, 3e-3, weight_decay=0.0)
    rng = stream(setting.seed, "adapter data")
    for step in range(setting.adapting):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * decay(step, setting.adapting)
        batch = text.batch("train", BATCH, CONTEXT, rng)
        optimizer.zero_grad()
        for path in sampler.step():
            with supernet.activate(path.subnet):
                loss(supernet.module, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def trained(network: CausalLM, text: Text, setting: Setting, row: str) -> Supernet:
    """One row of the table."""
    if row == "rounded to nearest":
        return low_bit(network, text, setting, "nearest", False)
    supernet = low_bit(network, text, setting, "GPTQ", row.startswith("shared"))
    if row != "GPTQ":
        rng = stream(setting.seed, "paths")
        # Eight waves, so that no budget's last visit is long ago; the paper runs little more than one of 8,000 steps.
        balanced = Balanced(supernet.space, rng, period=max(2, setting.adapting // 8))
        adapt(supernet, balanced if row.endswith("balanced") else Uniform(supernet.space, rng), text, setting)
    return supernet


def searched(supernet: Supernet, text: Text, setting: Setting) -> tuple[Subnet, float]:
    """The best subnet of at most ``BUDGET`` average bits on validation, and its bits per byte on test."""

    def score(subnet: Subnet) -> float:
        with supernet.activate(subnet):
            return -bits_per_byte(supernet.module, text, "validation")

    def feasible(rows: np.ndarray) -> np.ndarray:
        return bits_of(supernet.module, supernet.space, rows) <= BUDGET + 1e-9

    found = shrinking_search(supernet.space, score, feasible, stream(setting.seed, "search"), first=24, second=12)
    with supernet.activate(found.subnet):
        return found.subnet, bits_per_byte(supernet.module, text, "test")


def row_of(supernet: Supernet, text: Text, setting: Setting) -> list[float]:
    """Test bits per byte at 2, 3 and 4 bits, of six random subnets around the budget (mean), and of the search's."""
    found = []
    for bits in BITS:
        with supernet.activate(dict.fromkeys(supernet.space.names, bits)):
            found.append(bits_per_byte(supernet.module, text, "test"))
    sampler = Balanced(supernet.space, stream(setting.seed, "random"))
    rows = sampler.spread(2000)
    near = rows[np.abs(bits_of(supernet.module, supernet.space, rows) - BUDGET) < 0.05][:6]
    random = []
    for subnet in supernet.space.to_subnets(near):
        with supernet.activate(subnet):
            random.append(bits_per_byte(supernet.module, text, "test"))
    return [*found, float(np.mean(random)), searched(supernet, text, setting)[1]]


def table(
    results: dict[str, list[list[float]]], full: list[float], text: Text, setting: Setting, seeds: list[int]
) -> str:
    """The results as a page."""
    known = environment(torch.get_num_threads())
    lines = [
        "# LLM-QFA on docstrings", "",
        f"`python -m scripts.reproduce.llm_qfa_docstrings --seeds {' '.join(map(str, seeds))} --steps {setting.pretraining} "
        f"{setting.adapting}`", "",
        f"{known['cpu']}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, ",
        f"torch {torch.__version__}.",
        f"Text {text.fingerprint}: {len(text.train):,} bytes of training. Test loss in bits per byte on ",
        f"{EVALUATED * 64 * CONTEXT:,} bytes, mean over seeds {seeds}; the trained network in fp32: {np.mean(full):.3f}.", "",
        "| | 2 bits | 3 bits | 4 bits | random at 2.5 | searched at 2.5 |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row, values in results.items():
        lines.append(f"| {row} | " + " | ".join(f"{value:.3f}" for value in np.mean(values, axis=0)) + " |")
    if len(seeds) > 1:
        spread = max(float(np.std(values, axis=0, ddof=1).max()) for values in results.values())
        lines += ["", f"The largest standard deviation over seeds of any cell is {spread:.3f}."]
    return "\n".join([*lines, ""])


def main(arguments: Iterable[str] | None = None) -> None:
    """Runs all rows and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs=2, default=[1200, 400], metavar=("PRETRAINING", "ADAPTING"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(given.threads)
    text = docstrings()
    results: dict[str, list[list[float]]] = {row: [] for row in ROWS}
    full = []
    for seed in given.seeds:
        setting, start = Setting(*given.steps, seed), time.perf_counter()
        network = pretrained(text, setting)
        full.append(bits_per_byte(network, text, "test"))
        sys.stderr.write(f"seed {seed}: fp32 {full[-1]:.3f} bits per byte ({time.perf_counter() - start:.0f} s)\n")
        for row in ROWS:
            results[row].append(row_of(trained(network, text, setting, row), text, setting))
            found = " ".join(f"{value:.3f}" for value in results[row][-1])
            sys.stderr.write(f"seed {seed}: {row}: {found} ({time.perf_counter() - start:.0f} s)\n")
        done = {row: values for row, values in results.items() if values}
        write_text(given.out, table(done, full, text, setting, given.seeds[: len(full)]))


if __name__ == "__main__":
    main()
