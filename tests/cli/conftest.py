from __future__ import annotations

from tests.run.tiny import call, copied, finished

__all__ = ["call", "copied", "finished"]
