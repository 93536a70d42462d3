"""Which of the series that were found are converted: `--series`, `--where`, `--min-slices`, `--one-per-study`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ctsr.errors import UsageError
from ctsr.io.dicom.records import Stack
from ctsr.io.dicom.sidecar import KEYWORDS, attributes

__all__ = ["Condition", "Selection", "parse_condition", "spacing"]

_COMPUTED = ("spacing", "slices")
_ORDER: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|[<>](?!=)|=|~)\s*(.*\S)\s*")
_ROUNDING = 1e-6  # mm, mAs …: what a decimal string and a binary number may differ by


@dataclass(frozen=True, slots=True)
class Condition:
    """KEYWORD OP VALUE of a `--where`. text: as the user wrote it."""

    text: str
    keyword: str
    sign: str
    value: str

    def holds(self, known: Mapping[str, object]) -> bool:
        """Whether every value meets it that the slices have; not where the keyword is absent. known: `_known`."""
        value = known.get(self.keyword)
        if isinstance(value, dict):  # many distinct numbers: the least and the greatest
            values = list(value.values())
        elif isinstance(value, list) and all(
            isinstance(pair, list) for pair in value
        ):  # [value, count] pairs
            values = [each for each, _ in value]
        else:
            values = [] if value is None else [value]
        return bool(values) and all(map(self._meets, values))

    def _meets(self, value: object) -> bool:
        parts = value if isinstance(value, list | tuple) else [value]
        if self.sign in _ORDER:
            wanted = float(self.value)
            numbers = [x for x in map(_number, parts) if x is not None]
            slack = _ROUNDING if "=" in self.sign else -_ROUNDING
            wanted += slack if "<" in self.sign else -slack
            return len(numbers) == len(parts) and all(_ORDER[self.sign](x, wanted) for x in numbers)
        text = "\\".join(map(str, parts))
        if self.sign == "~":
            return re.search(self.value, text, re.IGNORECASE) is not None
        x, wanted_x = _number(text), _number(self.value)
        if x is not None and wanted_x is not None:
            is_equal = abs(x - wanted_x) <= _ROUNDING
        else:
            is_equal = text.casefold() == self.value.casefold()
        return is_equal == (self.sign == "=")


def parse_condition(text: str) -> Condition:
    """`SliceThickness<=1.5`, `ConvolutionKernel~B30f|STANDARD`, `slices>=50`; UsageError names the nearest keyword."""
    found = _CONDITION.fullmatch(text)
    if not found:
        raise UsageError(
            f"--where: {text} is not KEYWORD OP VALUE", hint="OP is one of <= >= < > = != ~, as in KVP>=120"
        )
    keyword, sign, value = found.groups()
    known = {name.casefold(): name for name in (*KEYWORDS, *_COMPUTED)}
    if keyword.casefold() not in known:
        near = get_close_matches(keyword.casefold(), known, 1)
        hint = f"did you mean {known[near[0]]}?" if near else f"known: {', '.join(sorted(known.values()))}"
        raise UsageError(f"--where: {keyword} is no technical keyword", hint=hint)
    if sign in _ORDER and _number(value) is None:
        raise UsageError(f"--where: {value} in {text} is not a number", hint="= != and ~ compare text")
    if sign == "~":
        try:
            re.compile(value)
        except re.error as exc:
            raise UsageError(f"--where: {value} is no regular expression: {exc}") from exc
    return Condition(text, known[keyword.casefold()], sign, value)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is wanted of all that was found.

    series: UIDs, all where empty. where: all must hold. one_per_study: "thinnest", "thickest" or None.
    """

    series: tuple[str, ...] = ()
    where: tuple[Condition, ...] = ()
    min_slices: int = 0
    one_per_study: str | None = None

    def __post_init__(self) -> None:
        if self.one_per_study not in (None, "thinnest", "thickest"):
            raise UsageError(f"--one-per-study: {self.one_per_study} is not thinnest or thickest")

    def __call__(self, stacks: Iterable[Stack]) -> tuple[list[Stack], list[tuple[Stack, str]]]:
        """(kept, left out with the rule that did it), both in the order given."""
        kept: list[Stack] = []
        left_out: list[tuple[Stack, str]] = []
        for stack in stacks:
            if rule := self._rule_against(stack):
                left_out.append((stack, rule))
            else:
                kept.append(stack)
        if self.one_per_study is not None:
            best = self._best_of_study(kept)
            rule = f"--one-per-study {self.one_per_study}"
            left_out += [(s, rule) for s in kept if best[_study(s)] is not s]
            kept = [s for s in kept if best[_study(s)] is s]
        return kept, left_out

    def _rule_against(self, stack: Stack) -> str:
        if self.series and stack.series_uid not in self.series:
            return "--series"
        if len(stack.slices) < self.min_slices:
            return f"--min-slices {self.min_slices}"
        known = _known(stack) if self.where else {}
        return next((f"--where {c.text}" for c in self.where if not c.holds(known)), "")

    def _best_of_study(self, stacks: Sequence[Stack]) -> dict[str, Stack]:
        """By slice thickness (spacing where absent), then by spacing; of equals the one with more slices."""
        sign = 1 if self.one_per_study == "thinnest" else -1

        def rank(stack: Stack) -> tuple[float, float, int]:
            apart = spacing(stack)
            return sign * (stack.slices[0].thickness or apart), sign * apart, -len(stack.slices)

        best: dict[str, Stack] = {}
        for stack in stacks:
            study = _study(stack)
            if study not in best or rank(stack) < rank(best[study]):
                best[study] = stack
        return best


def _study(stack: Stack) -> str:
    return stack.study_uid or stack.name


def spacing(stack: Stack) -> float:
    """Mean distance of neighbouring slices along the normal, mm, to 1 µm."""
    first, last = stack.slices[0], stack.slices[-1]
    return round(float((last.position - first.position) @ first.normal) / max(1, len(stack.slices) - 1), 3)


def _known(stack: Stack) -> dict[str, object]:
    """All that a condition may ask for."""
    return {**attributes(stack.slices), "spacing": spacing(stack), "slices": len(stack.slices)}


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
