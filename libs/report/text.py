"""Numbers and names as a reader sees them."""

from __future__ import annotations

from libs.report.read import Point

FAMILY_NAMES = {
    "full": "full depth",
    "fixed": "fixed layer",
    "steps": "fewer steps, full depth",
    "sampler": "another sampler, full depth",
    "residual": "residual correction",
    "refresh": "refresh without correction",
    "reuse": "output reuse",
    "cache": "deep-feature cache",
    "matched_random": "matched random depths",
    "matched_static": "matched static schedule",
}
MACS = (
    "GMACs are 10⁹ multiply-accumulates (one multiplication with its addition counts once, not twice) over the whole "
    "sampling of one image; attention products, output heads and the uncertainty estimators that ran are counted."
)
NBSP = "\u00a0"


def sig(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without exponents between 1e-4 and 1e6; a dash for what was not measured."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole >= digits:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", "−")
    text = f"{value:#.{digits}g}"
    if "e" in text:  # Python switches to exponents at 1e-5 only after rounding
        text = f"{value:.{digits + 3}f}"
    return text.rstrip(".").replace("-", "−")


def time_unit(seconds: float) -> tuple[float, str]:
    """(factor, unit) that makes this many seconds readable."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 0.1:
            return factor, unit
    return 1e6, "µs"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    factor, unit = time_unit(seconds)
    return f"{sig(seconds * factor)}{NBSP}{unit}"


def percent(share: float, signed: bool = False) -> str:
    """Whole percents, with a decimal where a signed change is smaller than one."""
    digits = 1 if signed and 0 < abs(share) < 0.0095 else 0
    text = f"{100 * share:+.{digits}f}" if signed else f"{100 * share:.{digits}f}"
    return f"{text.replace('-', '−')}{NBSP}%"


def plus_minus(value: float, spread: float | None) -> str:
    """A value with as many decimals as its spread supports."""
    if not spread:
        return sig(value)
    places = max(0, min(4, 1 - int(f"{spread:e}".split("e")[1])))
    places = min(places, max(0, 3 - len(str(int(abs(value))))) + 1)
    return f"{value:,.{places}f}{NBSP}±{NBSP}{spread:.{places}f}".replace(",", "\u202f").replace("-", "−")


def quality_name(key: str) -> str:
    """`fd_digits_cnn` -> `Fréchet distance (digits_cnn)`; keys carry the extractor's exact name."""
    head, _, extractor = key.partition("_")
    name = {"fd": "Fréchet distance", "fid": "FID", "cmmd": "CMMD", "kid": "KID"}.get(head)
    if name is None:
        return key
    return f"{name} ({extractor})" if extractor else name


def quality_word(key: str) -> str:
    return quality_name(key).split(" (")[0]


def family_name(family: str) -> str:
    return FAMILY_NAMES.get(family, family.replace("_", " "))


def series_name(point: Point, several_runs: bool) -> str:
    return f"{family_name(point.family)} · {point.run}" if several_runs else family_name(point.family)


def point_name(point: Point, several_runs: bool = False) -> str:
    return f"{point.label} · {point.run}" if several_runs else point.label
