"""Values of data elements from the bytes as they were stored: right or absent, never an exception.

pydicom converts on access, with warnings and errors that quote what stands in the header.
Blanks and NULs that pad a value are taken off.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["items", "number", "numbers", "quiet", "short", "text", "texts"]

_ITEM = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # its tag, in either order of bytes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences pydicom in this block: its warnings and log lines quote values of the header."""
    from pydicom import config

    logger = logging.getLogger("pydicom")
    level = logger.level
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def texts(dataset: Dataset, tag: int) -> tuple[str, ...]:
    """The values of a text element, as UTF-8, or as Latin-1 where they are none; () where absent or empty."""
    value: Any = getattr(_element(dataset, tag), "value", None)
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    several = (
        value if isinstance(value, list | tuple) or hasattr(value, "append") else [value]
    )  # converted before
    joined = "" if value is None else "\\".join(map(str, several))
    parts = tuple(part.strip(" \0\t\r\n") for part in joined.split("\\"))
    return parts if any(parts) else ()


def text(dataset: Dataset, tag: int) -> str:
    """All values of a text element, joined by a backslash; "" where absent."""
    return "\\".join(texts(dataset, tag))


def numbers(dataset: Dataset, tag: int) -> tuple[float, ...]:
    """The values of a decimal or integer string; () where absent or where one is no finite number."""
    parts = texts(dataset, tag)
    try:
        found = tuple(map(float, parts))
    except ValueError:
        return ()
    is_plain = all(part.isascii() and "_" not in part for part in parts)  # Python's own: float("1_0") is 10
    return found if is_plain and all(map(math.isfinite, found)) else ()


def number(dataset: Dataset, tag: int) -> float | None:
    """The one value of a decimal string; None where absent, not finite, or one of several."""
    found = numbers(dataset, tag)
    return found[0] if len(found) == 1 else None


def short(dataset: Dataset, tag: int) -> int | None:
    """The one value of an unsigned short; None where absent or of another size."""
    element = _element(dataset, tag)
    value = getattr(element, "value", None)
    if isinstance(value, bytes) and len(value) == 2:
        return int.from_bytes(value, "little" if element.is_little_endian else "big")
    return value if isinstance(value, int) else None


def items(dataset: Dataset, tag: int) -> list[Dataset]:
    """The items of a sequence; [] where absent or no sequence. Nested too deep: RecursionError."""
    raw = getattr(_element(dataset, tag), "value", None)
    # 10 µs an element that pydicom converts, and a header may hold 450,000
    if raw is None or (isinstance(raw, bytes) and raw[:4] not in _ITEM):
        return []
    return list(dataset[tag].value or ()) if dataset[tag].VR == "SQ" else []


def _element(dataset: Dataset, tag: int) -> Any:
    """The element as it was read, unconverted where pydicom has not been asked for it before."""
    return dataset.get_item(tag, keep_deferred=True)
