"""Numbers and names as a reader sees them: every quantity prints in one way."""

from libs.report.statistics import Estimate

FAMILY_NAMES = {
    "full": "full depth",
    "fixed": "fixed layer",
    "steps": "full depth, fewer calls",
    "plain": "full depth, calls placed better",
    "sampler": "full depth, another sampler",
    "residual": "residual correction",
    "refresh": "refresh without correction",
    "reuse": "output reuse",
    "cache": "deep-feature cache",
    "forecast": "outputs forecast",
    "first_block": "first-block cache",
    "teacache": "TeaCache",
    "duo": "two networks",
    "learned_cache": "Learning-to-Cache",
    "lazy_gate": "LazyDiT gate",
    "matched_random": "matched random depths",
    "matched_static": "matched static schedule",
}
MACS = (
    "GMACs are 10⁹ multiply-accumulates (one multiplication with its addition counts once) over the whole sampling of "
    "one image, with attention products, output heads and the estimators that ran."
)
NBSP = "\u00a0"
MINUS = "−"


def sig(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without exponents between 1e-4 and 1e6; a dash for what was not measured."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", MINUS)
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole >= digits:
        return f"{value:,.0f}".replace(",", "\u202f").replace("-", MINUS)
    text = f"{value:#.{digits}g}"
    if "e" in text:  # Python switches to exponents at 1e-5 only after rounding
        text = f"{value:.{digits + 3}f}"
    return text.rstrip(".").replace("-", MINUS)


def time_unit(seconds: float) -> tuple[float, str]:
    """(factor, unit) that makes this many seconds readable."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 0.1:
            return factor, unit
    return 1e6, "µs"


def percent(share: float) -> str:
    return f"{100 * share:.0f}{NBSP}%".replace("-", MINUS)


def speedup_text(found: Estimate | None) -> str:
    """A speed-up: `2.50× [2.31, 2.70]`."""
    if found is None:
        return "–"
    return f"{sig(found.mean)}×" + ("" if found.low is None else f" [{sig(found.low)}, {sig(found.high)}]")


def signed(found: Estimate | None) -> str:
    """A relative change: `+4.1 % [−2.0, +10]`."""
    if found is None:
        return "–"
    return f"{percents(found.mean)}{NBSP}%" + (
        "" if found.low is None else f" [{percents(found.low)}, {percents(found.high)}]"
    )


def percents(share: float) -> str:
    """A share in signed percents: a decimal below ten, none above, where nobody reads it."""
    value = 100 * share
    return f"{value:+,.{0 if abs(value) >= 9.95 else 1}f}".replace(",", "\u202f").replace("-", MINUS)


def decibels(psnr: float | None, ssim: float | None = None) -> str:
    """PSNR; identical images have no finite one, which files store as 100 or not at all."""
    if (psnr or 0) >= 99.95 or (psnr is None and ssim == 1):
        return "identical"
    return "–" if psnr is None else f"{psnr:.1f}{NBSP}dB"


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
