"""Numbers for people, as the report's template uses them."""

from __future__ import annotations

__all__ = ["duration", "quantity", "share"]

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_UNSCALED = {"%", "bit", "bits", "ms", "s", "images"}
_NARROW_SPACE = "\u202f"
_DASH = "\u2013"


def _digits(value: float) -> str:
    """About four significant digits without an exponent for everyday numbers."""
    if value == int(value) and abs(value) < 1e4:
        return str(int(value))
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def quantity(value: float | int | None, unit: str = "") -> str:
    """A value with its unit, scaled by a decimal prefix: ``11245, "B"`` is ``"11.25 kB"``; ``None`` is a dash."""
    if value is None:
        return _DASH
    prefix = ""
    if unit not in _UNSCALED:
        for factor, letter in _PREFIXES:
            # 999,999 would be written 1000k: the next prefix starts where four digits round up to it.
            if abs(value) >= factor * 0.99995:
                value, prefix = value / factor, letter
                break
    suffix = prefix + unit
    return _digits(value) + (_NARROW_SPACE + suffix if suffix else "")


def share(value: float) -> str:
    """A share 0..1 in per cent, small ones with enough digits not to read as none."""
    percent = 100.0 * value
    text = f"{percent:.2g}" if 0 < percent < 1 else f"{percent:.1f}"
    return f"{text}{_NARROW_SPACE}%"


def duration(seconds: float) -> str:
    """Seconds as ``"0.42 s"``, ``"12.3 s"``, ``"3 min 05 s"`` or ``"2 h 07 min"``."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
