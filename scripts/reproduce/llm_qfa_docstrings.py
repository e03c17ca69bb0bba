"""LLM-QFA on a small language model: separate low-bit weights with adapters, and the balanced scheduler against uniform.

A byte model is trained on the docstrings of Python's standard library and cut out; its blocks' linear layers get frozen
weights of 2, 3 and 4 bits (GPTQ) with adapters, which are trained

* ``own, balanced``: an adapter per bit-width, subnets of the triangular scheduler (LLM-QFA);
* ``own, uniform``: the same with every layer's bits drawn alone;
* ``shared, balanced`` and ``shared, uniform``: one adapter for all bit-widths of a layer (the paper's ablation);

for equally many steps. Test loss in bits per byte, of uniform bits and of mixed ones: random subnets around each budget of
average bits, and the best that a search on validation finds under it.

Usage: ``python -m scripts.reproduce.llm_qfa_docstrings --out docs/results/FILE.md --state DIR [--seeds 0 1] [--steps 1200
400]``. What is done is kept in ``DIR``: the same command goes on where it was killed.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nasq.search_spaces.causal_lm import CausalLM, causal_lm
from numpy.typing import NDArray
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Supernet
from nasq.data.text import Text, docstrings
from nasq.deploy.timing import environment
from nasq.files import read_json, write_bytes, write_json, write_text
from nasq.quant.adapters import adapter_parameters, bits_of, separate_bits
from nasq.search.shrinking import shrinking_search
from nasq.space import Subnet
from nasq.training import Balanced, PathSampler, Uniform, stream

BITS = (2, 3, 4)
BUDGETS = (2.5, 3.0, 3.5)
CONTEXT, BATCH = 64, 16
EVALUATED = 2  # batches of 64 pieces
RANDOM = 6  # subnets around a budget
ROWS = ("rounded to nearest", "GPTQ", "own, uniform", "own, balanced", "shared, uniform", "shared, balanced")
COLUMNS = (
    *(f"{bits} bits" for bits in BITS),
    *(f"random {budget}" for budget in BUDGETS),
    *(f"searched {budget}" for budget in BUDGETS),
)


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


def scored(supernet: Supernet, text: Text) -> Callable[[Subnet], float]:
    """Validation bits per byte, negative; each subnet is evaluated once."""
    known: dict[Subnet, float] = {}

    def score(subnet: Subnet) -> float:
        if subnet not in known:
            with supernet.activate(subnet):
                known[subnet] = -bits_per_byte(supernet.module, text, "validation")
        return known[subnet]

    return score


def searched(supernet: Supernet, text: Text, setting: Setting) -> Iterator[float]:
    """Of each budget: test bits per byte of the best subnet within it on validation."""
    score = scored(supernet, text)
    for budget in BUDGETS:

        def feasible(rows: NDArray[np.int16], most: float = budget) -> NDArray[np.bool_]:
            return bits_of(supernet.module, supernet.space, rows) <= most + 1e-9

        # One stream: the first stage is the same for every budget.
        found = shrinking_search(supernet.space, score, feasible, stream(setting.seed, "search"), first=24, second=12)
        with supernet.activate(found.subnet):
            yield bits_per_byte(supernet.module, text, "test")


def around(supernet: Supernet, text: Text, setting: Setting) -> Iterator[float]:
    """Of each budget: mean test bits per byte of random subnets around it."""
    rows = Balanced(supernet.space, stream(setting.seed, "random")).spread(4000)
    averages = bits_of(supernet.module, supernet.space, rows)
    for budget in BUDGETS:
        found = []
        for subnet in supernet.space.to_subnets(rows[np.abs(averages - budget) < 0.05][:RANDOM]):
            with supernet.activate(subnet):
                found.append(bits_per_byte(supernet.module, text, "test"))
        yield float(np.mean(found))


def row_of(supernet: Supernet, text: Text, setting: Setting) -> list[float]:
    """Test bits per byte, in the order of ``COLUMNS``."""
    found = []
    for bits in BITS:
        with supernet.activate(dict.fromkeys(supernet.space.names, bits)):
            found.append(bits_per_byte(supernet.module, text, "test"))
    return [*found, *around(supernet, text, setting), *searched(supernet, text, setting)]


class State:
    """What is done of a setting, in a directory.

    Args:
        directory: Of all settings.
        setting: Whose results these are.
    """

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.setting = setting
        name = f"seed{setting.seed}-{setting.pretraining}-{setting.adapting}"
        self.rows, self.weights = directory / f"{name}.json", directory / f"{name}.safetensors"
        directory.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, list[float]] = read_json(self.rows) if self.rows.exists() else {}

    def keep(self, row: str, values: Sequence[float]) -> None:
        """Adds a row."""
        self.done[row] = list(values)
        write_json(self.rows, self.done)

    def network(self, text: Text) -> CausalLM:
        """The trained network; trained here, if it was not yet."""
        if not self.weights.exists():
            network = pretrained(text, self.setting)
            write_bytes(self.weights, safetensors.save(network.state_dict()))
        supernet = Supernet(causal_lm(context=CONTEXT))
        found = supernet.extract(supernet.space.largest())
        assert isinstance(found, CausalLM)
        found.load_state_dict(safetensors.load(self.weights.read_bytes()))
        return found


def table(results: Mapping[int, Mapping[str, Sequence[float]]], text: Text, given: argparse.Namespace) -> str:
    """The results as a page."""
    known, seeds = environment(torch.get_num_threads()), sorted(results)
    steps = " ".join(map(str, given.steps))
    full = np.mean([results[seed]["fp32"][0] for seed in seeds])
    lines = [
        "# LLM-QFA on docstrings", "",
        f"`python -m scripts.reproduce.llm_qfa_docstrings --seeds {' '.join(map(str, seeds))} --steps {steps}`", "",
        f"{known['cpu']}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, "
        f"torch {torch.__version__}.",
        f"Text {text.fingerprint}: {len(text.train):,} bytes of training. Test loss in bits per byte on "
        f"{EVALUATED * 64 * CONTEXT:,} bytes, mean over seeds {seeds}; the trained network in fp32: {full:.3f}.", "",
        "| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|",
    ]  # fmt: skip
    spread = 0.0
    for row in ROWS:
        values = np.array([results[seed][row] for seed in seeds if row in results[seed]])
        if len(values):
            lines.append(f"| {row} | " + " | ".join(f"{value:.3f}" for value in values.mean(0)) + " |")
        if len(values) > 1:
            spread = max(spread, float(values.std(axis=0, ddof=1).max()))
    if spread:
        lines += ["", f"The largest standard deviation over seeds of any cell is {spread:.3f}."]
    return "\n".join([*lines, ""])


def main(arguments: Iterable[str] | None = None) -> None:
    """Runs all rows and writes the page after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="directory for what is done")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs=2, default=[1200, 400], metavar=("PRETRAINING", "ADAPTING"))
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(given.threads)
    text, results = docstrings(), {}
    for seed in given.seeds:
        state, start = State(given.state, Setting(*given.steps, seed)), time.perf_counter()
        network = state.network(text)
        if "fp32" not in state.done:
            state.keep("fp32", [bits_per_byte(network, text, "test")])
        for row in ROWS:
            if row not in state.done:
                state.keep(row, row_of(trained(network, text, state.setting, row), text, state.setting))
            found = " ".join(f"{value:.3f}" for value in state.done[row])
            sys.stderr.write(f"seed {seed}: {row}: {found} ({time.perf_counter() - start:.0f} s)\n")
            results[seed] = state.done
            write_text(given.out, table(results, text, given))


if __name__ == "__main__":
    main()
