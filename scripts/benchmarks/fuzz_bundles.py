"""Mutates bundles and looks at what becomes of them: refused, harmless, or accepted although they compute something else.

Usage: ``python -m scripts.benchmarks.fuzz_bundles [--resealed 2000] [--plain 200] [--seed 0] [--out FILE.json]``

Each case changes one or two places of a valid bundle (bytes, JSON values, arrays, tensors and nodes of the ONNX file,
names, links, pipes). A *resealed* case gets checksums that fit, so that it passes the outermost check; a *plain* one
keeps the old ones. The bundle is then read, its file compared with it, and, where nothing was found, run beside the
reference. Cases run in a worker process: one that dies or takes too long is counted and replaced. What may come out:

============  =======================================================================================================
``outer``     refused by the checksums, as not being JSON or safetensors, or for a file's name or kind
``inner``     refused by a deeper check, in one line
``harmless``  accepted; every number that is computed with is that of the original, and so are the final integers
``SILENT``    accepted, and it computes something else
``CRASH``     an exception that is not nasq's own, or the worker died
``HANG``      the worker took more than its time
``ACCESS``    a file outside the bundle was read
============  =======================================================================================================
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from nasq.deploy import bundle, onnx, parity, sandbox, storage
from nasq.deploy.bench import environment
from nasq.deploy.reference import Reference
from nasq.deploy.runtimes import OnnxRuntime
from nasq.errors import NasqError
from nasq.files import write_json
from nasq.quant.program import AvgPool, Op, Program
from scripts.benchmarks.fuzz_mutations import Document, images, mutate, original

SECONDS = 60
BAD = ("SILENT", "CRASH", "HANG", "ACCESS")
# -- what becomes of a case -------------------------------------------------------------------------------------------


def same_arithmetic(first: Program, second: Program) -> bool:
    """Whether two programs hold the same numbers; free text, facts and nominal bits may differ."""
    free = {"path", "wide", "weight_bits"}

    def plain(op: Op) -> list[Any]:
        values = {field.name: getattr(op, field.name) for field in fields(op) if field.name not in free}
        values["output"] = replace(op.output, bits=8)
        if isinstance(op, AvgPool) and op.output.shape[1:] == (1, 1):
            del values["stride"]  # of a single window
        return [v.tobytes() if isinstance(v, np.ndarray) else v for v in values.values()]

    return first.add == second.add and [(op.kind, plain(op)) for op in first.ops] == [
        (op.kind, plain(op)) for op in second.ops
    ]


OUTER = ("checksum", "is not a valid safetensors", "cannot be read as JSON", "is not JSON", "says that its header has",
         "symbolic link", "not a regular file", "is missing in", "it is refused", "is not a list of checksums",
         "holds no SHA-256", "does not list")  # fmt: skip


def judge(directory: Path, source: Program) -> tuple[str, str]:
    """What becomes of a bundle, with the reason where it is refused."""
    try:
        program = bundle.read(directory)
        data = storage.path_of(directory, parity.MODEL).read_bytes()
        if found := sandbox.differences(program, data):
            return "inner", found[0]
        x = images()
        integers, wanted = OnnxRuntime(data).run(x), Reference(directory).run(x)
        if not np.array_equal(integers, wanted):
            return "inner", "the runtime's integers are not the reference's"
    except NasqError as error:
        text = str(error)
        return ("outer" if any(sign in text for sign in OUTER) else "inner"), text
    except MemoryError:
        return "CRASH", "MemoryError"
    except Exception as error:  # what this script is for
        return "CRASH", f"{type(error).__name__}: {error}"
    return ("harmless", "") if same_arithmetic(program, source) else ("SILENT", "accepted")


def _touched(canary: Path) -> bool:
    return canary.stat().st_atime > canary.stat().st_mtime - 500


def _arm(canary: Path) -> None:
    """An access time long before the modification: whoever reads it moves it, on file systems that keep such times."""
    now = canary.stat().st_mtime
    os.utime(canary, (now - 1000, now))


def access_is_seen(directory: Path) -> bool:
    """Whether the file system keeps the times of reading, so that ``ACCESS`` means something."""
    probe = directory / "probe"
    probe.write_text("read me")
    _arm(probe)
    before = _touched(probe)
    probe.read_text()
    return not before and _touched(probe)


def work(stream: IO[str], answers: IO[str]) -> None:
    """In a worker: judges the cases it is told, one JSON line each."""
    sources = {seed: original(seed) for seed in range(3)}
    for line in stream:
        case = json.loads(line)
        directory = Path(case["directory"])
        canary = directory.parent / "canary"
        _arm(canary)
        outcome, reason = judge(directory, sources[case["source"]])
        if _touched(canary):
            outcome, reason = "ACCESS", "the file beside the bundle was read"
        answers.write(json.dumps([outcome, reason[:300]]) + "\n")
        answers.flush()


class Worker:
    """A process that judges cases; replaced where it dies or takes too long."""

    def __init__(self) -> None:
        limits = sandbox.Limits()
        code = (
            "import sys; from nasq.deploy import sandbox; from scripts.benchmarks import fuzz_bundles as fuzz; "
            f"sandbox._limit({{'memory': {limits.memory}, 'cpu_seconds': 100_000, 'file': {limits.file}}}); "
            "out = sys.stdout; sys.stdout = sys.stderr; fuzz.work(sys.stdin, out)"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, case: Document) -> tuple[str, str] | None:
        """The outcome; ``None`` where the worker died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(case) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
            if not ready:
                return "HANG", f"more than {SECONDS} s"
            line = self.process.stdout.readline()
        except OSError:
            return None
        return tuple(json.loads(line)) if line else None

    def end(self) -> None:
        """Nothing of it is left."""
        self.process.kill()
        self.process.wait()


def fuzz(count: int, resealed: bool, seed: int, tell: Callable[[int, Document], None] | None = None) -> list[Document]:
    """Judges ``count`` mutated bundles; one row each: seed, what was changed, outcome, reason."""
    rows: list[Document] = []
    with tempfile.TemporaryDirectory(prefix="nasq-fuzz-") as scratch:
        base = Path(scratch)
        (base / "cases").mkdir()
        canary = base / "cases" / "canary"
        canary.write_text("not yours\n" * 20)
        for kind in range(3):
            program = original(kind)
            bundle.write(
                base / f"source{kind}", program, {parity.MODEL: onnx.export(program), "README.md": b"# card\n"}
            )
        worker = Worker()
        try:
            for index in range(count):
                case = seed * 1_000_000 + index
                directory = base / "cases" / f"case{index}"
                what = mutate(base / f"source{case % 3}", directory, case, resealed)
                found = worker.ask({"directory": str(directory), "source": case % 3})
                if found is None or found[0] == "HANG":
                    worker.end()
                    found = found or ("CRASH", f"the worker died with {worker.process.returncode}")
                    worker = Worker()
                rows.append({"case": case, "changed": what, "outcome": found[0], "reason": found[1]})
                if tell is not None:
                    tell(index, rows[-1])
                shutil.rmtree(directory)
        finally:
            worker.end()
    return rows


def summary(rows: list[Document]) -> Document:
    """How many cases ended how, and the share that got past the outermost layer."""
    counts = collections.Counter(row["outcome"] for row in rows)
    past = len(rows) - counts["outer"]
    return {"cases": len(rows), **dict(sorted(counts.items())), "past the outer layer": past / max(1, len(rows))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resealed", type=int, default=2000)
    parser.add_argument("--plain", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    def tell(index: int, row: Document) -> None:
        if row["outcome"] in BAD or index % 200 == 0:
            sys.stderr.write(f"{index}: {row}\n")

    with tempfile.TemporaryDirectory(prefix="nasq-fuzz-") as scratch:
        seen = access_is_seen(Path(scratch))
    result: Document = {"environment": environment(1), "seed": options.seed, "access is seen": seen}
    for name, count in (("resealed", options.resealed), ("plain", options.plain)):
        rows = fuzz(count, name == "resealed", options.seed, tell)
        result[name] = summary(rows)
        result[f"{name}, bad"] = [row for row in rows if row["outcome"] in BAD]
    if options.out:
        write_json(options.out, result)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    raise SystemExit(any(result[f"{name}, bad"] for name in ("resealed", "plain")))


if __name__ == "__main__":
    main()
