"""Numbers as people read them; the same words in the terminal, the plots and the page."""

import math

ABSENT = "-"


def number(value: float) -> str:
    """Three significant digits; whole numbers whole; exponents for extreme values only."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if value == round(value) and size < 1e6:
        return f"{value:,.0f}"
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A duration in its two largest units."""
    if value < 60:
        return f"{value:.1f} s" if value < 20 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: float) -> str:
    """A share between 0 and 1."""
    return f"{100 * share:.1f} %"


def count(value: int) -> str:
    """A large count in millions or billions."""
    for size, name in ((1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.2f} {name}"
    return f"{value:,}"


def perplexity(value: float) -> str:
    """Perplexity with two decimals while they mean something."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"


def times(value: float, base: float | None) -> str:
    """``value`` as a multiple of ``base``."""
    if base is None or not base or not math.isfinite(value / base):
        return ABSENT
    ratio = value / base
    return (
        f"{ratio:.2f}x"
        if ratio < 10
        else f"{ratio:,.1f}x"
        if ratio < 1000
        else f"{ratio:,.0f}x"
        if ratio < 1e6
        else f"{ratio:.1e}x"
    )


def points(value: float, base: float | None) -> str:
    """A share as percentage points above or below ``base``."""
    if base is None or not math.isfinite(value - base):
        return ABSENT
    return f"{100 * (value - base):+.1f}"


def milliseconds(value: float | None) -> str:
    """A latency, absent when it was not timed."""
    if value is None:
        return ABSENT
    return f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def megabytes(size: int) -> str:
    """Bytes in units of a million."""
    return f"{size / 1e6:,.1f}"


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey; line ends stay and tabs become spaces."""
    return "".join(
        c if c == "\n" or c.isprintable() else " " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
