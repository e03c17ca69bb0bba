"""One of several processes that train a run together, started by :mod:`nasq.run.ranks`.

Usage: ``python -m nasq.run.rank DIR STAGE``. Standard output carries JSON lines to the process that started this one:
events and steps of the first rank, and the error of any. Standard input carries nothing; its end says that the other
process has ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from nasq.errors import NasqError
from nasq.run.directory import RunDirectory
from nasq.run.flow import prepare
from nasq.run.train import split, train
from nasq.training.distributed import process_group

__all__ = ["main"]


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message, default=str) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock the end of this process would wait for
    os._exit(1)  # at once, whatever the other threads do: nobody waits for this process any more


def main(path: Path, name: str) -> None:
    """Trains as one of the processes that the environment tells of.

    Args:
        path: Of the run.
        name: ``train`` or ``split``.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with process_group() as world:
        run = RunDirectory.open(path, lambda event: _say({"event": event}))
        workshop = prepare(run.config())
        stage = {"train": train, "split": split}[name]
        stage(run, workshop, (lambda *step: _say({"step": step})) if world.first else None)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except NasqError as error:
        _say({"error": {"kind": type(error).__name__, "message": str(error)}})
        sys.exit(error.exit_code)
