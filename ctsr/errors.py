"""The errors that a user can act on. Each class knows its exit code.

CtsrError                1  (never raised itself: code 1 is an internal error)
├── UsageError           2  option, value, combination, output in the way
├── InputError           3  input missing, damaged, of the wrong kind, unsafe geometry
│   └── GeometryError    3  the slices do not form one regular grid
├── ResourceError        4  memory, disk, output place, device
├── WeightsError         5  weights refused or not matching
├── NetworkError         6  network or hub
├── SomeCasesFailed      7  a folder run ended, some cases failed
├── TrainingDiverged     8  training diverged, or adds nothing
└── RequirementNotMet    9  `--require` not met; the report is written all the same
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar

__all__ = [
    "CtsrError",
    "GeometryError",
    "InputError",
    "NetworkError",
    "RequirementNotMet",
    "ResourceError",
    "SomeCasesFailed",
    "TrainingDiverged",
    "UsageError",
    "WeightsError",
]


class CtsrError(Exception):
    """Say what is wrong, with its numbers; `hint` says what to do about it.

    reason: lower case, with what was found and what was expected.
    path: the file concerned, as the user typed it.
    report: what was found all the same, for JSON.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        reason: str,
        *,
        path: str | os.PathLike[str] | None = None,
        hint: str = "",
        report: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = None if path is None else os.fspath(path)
        self.hint = hint
        self.report = dict(report or {})

    def __str__(self) -> str:
        """`PATH: reason (hint)`, on one line."""
        where = f"{self.path}: " if self.path is not None else ""
        return f"{where}{self.reason}" + (f" ({self.hint})" if self.hint else "")


class UsageError(CtsrError):
    """An option, a value, a combination, or an output that is in the way."""

    exit_code = 2


class InputError(CtsrError):
    """An input that is missing, damaged, or not what the command reads."""

    exit_code = 3


class GeometryError(InputError):
    """The slices do not form one regular grid, or the header contradicts itself."""


class ResourceError(CtsrError):
    """Too little memory or disk, an output place that can't be written, an absent device."""

    exit_code = 4


class WeightsError(CtsrError):
    """Weights that are damaged, foreign, or not made for this model."""

    exit_code = 5


class NetworkError(CtsrError):
    """The network or the hub did not deliver."""

    exit_code = 6


class SomeCasesFailed(CtsrError):
    """A folder run came to its end, and some cases failed."""

    exit_code = 7


class TrainingDiverged(CtsrError):
    """The loss is not finite, jumped for good, or the network adds nothing."""

    exit_code = 8


class RequirementNotMet(CtsrError):
    """A `--require` condition does not hold; the report was written."""

    exit_code = 9
