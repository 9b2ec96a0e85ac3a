"""Checks of what a configuration holds: each refuses with the place, the value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

MOST = 2**40  # of every count and seed: what a computation with them can hold


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return (is_int(value) and abs(value) <= MOST) or (isinstance(value, float) and math.isfinite(value))


def refuse(where: str, value: object, expected: str) -> NoReturn:
    raise ValueError(f"{where} is {value!r}; expected {expected}")


def need_int(where: str, value: Any, least: int) -> None:
    if not is_int(value) or value < least:
        refuse(where, value, f"an integer of at least {least}")
    if value > MOST:
        refuse(where, value, f"an integer of at most {MOST:,}")


def need_fraction(where: str, value: Any, top: float = 1.0) -> None:
    if not is_number(value) or not 0.0 < value <= top:
        refuse(where, value, f"a number above 0 and at most {top:g}")


def known_keys(where: str, data: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    unknown = sorted(set(data) - set(allowed))
    if unknown:
        refuse(where, unknown[0], f"one of the keys {', '.join(allowed)}")
