"""How numbers are written for people: one rounding for each kind, everywhere on the page, the card and the pictures."""

from __future__ import annotations

import math
import re

DASH = "–"
NAMES = {  # of the methods; files for programs have the keys
    "cnn": "CNN",
    "map": "MAP",
    "map_temperature": "MAP, temperature",
    "laplace_diag": "Laplace, diagonal",
    "laplace_kron": "Laplace, Kronecker",
    "laplace_full": "Laplace, full",
    "laplace_refined": "refined",
    "nuts": "NUTS",
}
_DIGITS = {"accuracy": 3, "accuracy_macro": 3, "error_surest_80": 3, "agreement": 3}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits after the point, and no negative zero; a dash where there is none."""
    return DASH if value is None or math.isnan(value) else f"{value:z.{digits}f}"


def digits_of(metric: str) -> int:
    """Digits after the point: 3 of shares of images, 4 of everything else."""
    return _DIGITS.get(metric, 4)


def percent(share: float) -> str:
    """A share in whole percent; what is neither none nor all does not round to it."""
    if 0 < share < 0.005:
        return "< 1 %"
    if 0.995 <= share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def chance(probability: float) -> str:
    """A probability with two digits; none that is not 1 or 0 exactly is called so."""
    if probability < 0.005:
        return "< 0.01"
    return "> 0.99" if probability >= 0.995 else f"{probability:.2f}"


def two_digits(value: float | None) -> str:
    """A number to two significant digits: 0.18, 2.6, 15, 1 300."""
    if value is None or math.isnan(value):
        return DASH
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 1 - math.floor(math.log10(abs(float(f"{value:.1e}"))))
    return f"{round(value, digits):z.{max(digits, 0)}f}"


def compact(value: float) -> str:
    """Any number in a few characters: 1.012, 2,463, 82,590, 3.1 × 10⁻⁷; infinity is said."""
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if math.isnan(value):
        return DASH
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 1e9 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def short(text: str, most: int) -> str:
    """The text, or its beginning and an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def tight(text: str) -> str:
    """The text with its numbers, signs and units held together at the end of a line."""
    return re.sub(r" (?=%)|(?<=[<>≤≥±]) | (?=±)", "\u00a0", text)


def listed(parts: list[str]) -> str:
    """a; a and b; a, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + (" and " if parts else "") + "".join(parts[-1:])
