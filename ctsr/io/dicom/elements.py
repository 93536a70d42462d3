"""Values of data elements from the bytes as they were stored: right or absent, never an exception.

pydicom converts on access, with warnings and errors that quote what stands in the header.
Blanks and NULs that pad a value are taken off.
"""

from __future__ import annotations

import contextlib
import logging
import math
import struct
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["integer", "items", "number", "numbers", "quiet", "short", "text", "texts"]

_PADDING = b" \0\t\r\n"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences pydicom in this block: its warnings and log lines quote values of the header."""
    from pydicom import config

    logger = logging.getLogger("pydicom")
    level, mode = logger.level, config.settings.reading_validation_mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        config.settings.reading_validation_mode = config.IGNORE
        try:
            yield
        finally:
            logger.setLevel(level)
            config.settings.reading_validation_mode = mode


def texts(dataset: Dataset, tag: int) -> tuple[str, ...]:
    """The values of a text element, as UTF-8, or as Latin-1 where they are none; () where absent or empty."""
    return tuple(map(_decoded, _parts(dataset, tag)))


def text(dataset: Dataset, tag: int) -> str:
    """All values of a text element, joined by a backslash; "" where absent."""
    return "\\".join(texts(dataset, tag))


def numbers(dataset: Dataset, tag: int) -> tuple[float, ...]:
    """The values of a decimal or integer string; () where absent or where one is no finite number."""
    parts = _parts(dataset, tag)
    try:
        found = tuple(map(float, parts))
    except ValueError:
        return ()
    if any(b"_" in part for part in parts):  # Python's own: float("1_0") is 10
        return ()
    return found if all(map(math.isfinite, found)) else ()


def number(dataset: Dataset, tag: int) -> float | None:
    """The one value of a decimal string; None where absent, not finite, or one of several."""
    found = numbers(dataset, tag)
    return found[0] if len(found) == 1 else None


def integer(dataset: Dataset, tag: int) -> int | None:
    """The one value of an integer string; None where absent or no whole number."""
    found = number(dataset, tag)
    return int(found) if found is not None and found.is_integer() else None


def short(dataset: Dataset, tag: int) -> int | None:
    """The one value of an unsigned short; None where absent or of another size."""
    element = _element(dataset, tag)
    if element is None or not isinstance(element.value, bytes):
        return element.value if element is not None and isinstance(element.value, int) else None
    if len(element.value) != 2:
        return None
    value: int = struct.unpack("<H" if element.is_little_endian else ">H", element.value)[0]
    return value


def items(dataset: Dataset, tag: int) -> list[Dataset]:
    """The items of a sequence; [] where absent or no sequence. Nested too deep: RecursionError."""
    if _element(dataset, tag) is None or dataset[tag].VR != "SQ":
        return []
    return list(dataset[tag].value or ())


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _element(dataset: Dataset, tag: int) -> Any:
    """The element as it was read, unconverted where pydicom has not been asked for it before."""
    return dataset.get_item(tag, keep_deferred=True)


def _parts(dataset: Dataset, tag: int) -> list[bytes]:
    element = _element(dataset, tag)
    value = None if element is None else element.value
    if value is None or value == b"":
        return []
    if not isinstance(value, bytes):  # converted before
        several = value if isinstance(value, list | tuple) or hasattr(value, "append") else [value]
        value = b"\\".join(str(part).encode(errors="replace") for part in several)
    parts = [part.strip(_PADDING) for part in value.split(b"\\")]
    return parts if any(parts) else []
