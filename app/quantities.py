"""Kubernetes quantities and version numbers: text → numbers. Nothing here knows what they are for.

(https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/)
"""

import re
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache

from solver.geometry import Version

MIB = 2**20
LARGEST = 2**63  # Kubernetes' own limit

_SUFFIXES = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"),
    "": Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12),
    "P": Decimal(10**15), "E": Decimal(10**18),
    "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_VERSION = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}")
SHOWN = 60  # characters of a text that cannot be read: it is said for every node


def quantity(value: object) -> Decimal:
    """Read a quantity. Raises ValueError with what was found."""
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is not a quantity")
    return _parsed(value)


def short(value: object) -> str:
    """What was found, for words that are shown."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Decimal:
    digits = text.rstrip("numkKMGTPEi")
    suffix = _SUFFIXES.get(text[len(digits) :])
    # Decimal would also take the digits of other scripts, underscores and NaN
    if suffix is None or not _NUMBER.fullmatch(digits):
        raise ValueError(f"{short(text)} is not a quantity")
    value = Decimal(digits) * suffix
    if not -LARGEST < value < LARGEST:
        raise ValueError(f"{short(text)} is not a quantity")
    return value


def milli(value: object) -> int:
    """Thousandths, rounded up as Kubernetes does. Raises ValueError."""
    return _up(1000 * _not_negative(value))


def mib(value: object) -> int:
    """MiB of a quantity in bytes, rounded up. Raises ValueError."""
    return _up(_not_negative(value) / MIB)


def _not_negative(value: object) -> Decimal:
    amount = quantity(value)
    if amount < 0:
        raise ValueError(f"{short(value)} is negative")
    return amount


def _up(amount: Decimal) -> int:
    return int(amount.to_integral_value(rounding=ROUND_CEILING))


def version(text: str) -> Version:
    """Read "580.95.05" as (580, 95, 5). Raises ValueError for anything but numbers between dots."""
    if not text.isascii() or not _VERSION.fullmatch(text):
        raise ValueError(f"{short(text)} is not a version number")
    return tuple(int(part) for part in text.split("."))


@lru_cache(maxsize=4096)
def version_in(text: str) -> Version:
    """The version number at the beginning of what a driver says of itself; empty where there is none."""
    found = _VERSION.match(text.strip())
    return version(found.group()) if found else ()
