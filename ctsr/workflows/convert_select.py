"""Which of the series that were found are converted: `--series`, `--where`, `--min-slices`, `--one-per-study`.

And which are incomplete. `metadata.csv` lies beside the images of a download from the NBIA archive, one row a series;
`*.tcia` is the list that it was made from. Both hold UIDs and patients' names, so nothing of them is ever shown.
"""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ctsr.errors import InputError, UsageError
from ctsr.io.dicom.records import Refused, Scan, Stack
from ctsr.io.dicom.scan import DUPLICATE
from ctsr.io.dicom.sidecar import KEYWORDS, attributes
from ctsr.io.lists import read_table
from ctsr.workflows.requests import Conversion

__all__ = ["Condition", "parse_condition", "refuse_incomplete", "select", "spacing"]

_COMPUTED = ("spacing", "slices")
_ORDER: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|[<>](?!=)|=|~)\s*(.*\S)\s*")
_SERIES, _IMAGES, _MODALITY = "Series UID", "Number of Images", "Modality"  # columns of metadata.csv
_LIST_BEGINS = "ListOfSeriesToDownload="  # in a .tcia file
_FETCH_AGAIN = "an incomplete download: fetch it again"
_ROUNDING = 1e-6  # mm, mAs …: what a decimal string and a binary number may differ by


@dataclass(frozen=True, slots=True)
class Condition:
    """KEYWORD OP VALUE of a `--where`. text: as the user wrote it."""

    text: str
    keyword: str
    sign: str
    value: str

    def holds(self, known: Mapping[str, object]) -> bool:
        """Whether every value meets it that the slices have; not where the keyword is absent.

        known: by keyword, one value, [value, count] pairs, or the least and the greatest of many.
        """
        value = known.get(self.keyword)
        values = [] if value is None else [value]
        if isinstance(value, dict):
            values = list(value.values())
        elif isinstance(value, list) and all(isinstance(pair, list) for pair in value):
            values = [each for each, _ in value]
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


def select(stacks: Iterable[Stack], asked: Conversion) -> tuple[list[Stack], list[tuple[Stack, str]]]:
    """(kept, left out with the rule that did it), both in the order given."""
    conditions = [parse_condition(words) for words in asked.where or ()]

    def rule_against(stack: Stack) -> str:
        if asked.series and stack.series_uid not in asked.series:
            return "--series"
        if len(stack.slices) < asked.min_slices:
            return f"--min-slices {asked.min_slices}"
        if not conditions:
            return ""
        known = {**attributes(stack.slices), "spacing": spacing(stack), "slices": len(stack.slices)}
        return next((f"--where {c.text}" for c in conditions if not c.holds(known)), "")

    def rank(stack: Stack) -> tuple[float, float, int]:
        """By slice thickness (spacing where absent), then by spacing; of equals the one with more slices."""
        sign, apart = 1 if asked.one_per_study == "thinnest" else -1, spacing(stack)
        return sign * (stack.slices[0].thickness or apart), sign * apart, -len(stack.slices)

    ruled = [(stack, rule_against(stack)) for stack in stacks]
    kept = [stack for stack, rule in ruled if not rule]
    left_out = [(stack, rule) for stack, rule in ruled if rule]
    if asked.one_per_study is not None:
        best: dict[str, Stack] = {}
        for stack in sorted(kept, key=rank):
            best.setdefault(stack.study_uid or stack.name, stack)
        rule = f"--one-per-study {asked.one_per_study}"
        left_out += [(stack, rule) for stack in kept if stack not in best.values()]
        kept = [stack for stack in kept if stack in best.values()]
    return kept, left_out


def spacing(stack: Stack) -> float:
    """Mean distance of neighbouring slices along the normal, mm, to 1 µm."""
    first, last = stack.slices[0], stack.slices[-1]
    return round(float((last.position - first.position) @ first.normal) / max(1, len(stack.slices) - 1), 3)


def _number(value: object) -> float | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def refuse_incomplete(scan: Scan, source: Path, warn: Callable[[str], None]) -> Scan:
    """The scan with every CT series refused of which `metadata.csv` says that images are missing.

    warn: is told where the files can't be read, or where series were never downloaded.
    """
    rows: dict[str, dict[str, str]] = {}
    for path in _near(source, "metadata.csv"):
        try:
            rows |= {row[_SERIES]: row for row in read_table(path, columns=[_SERIES, _IMAGES, _MODALITY])}
        except InputError as exc:
            warn(f"{exc}: incomplete downloads are not noticed")
    for path in _near(source, "*.tcia") if rows else []:
        listed = set(path.read_text("utf-8", errors="replace").partition(_LIST_BEGINS)[2].split())
        if missing := listed - rows.keys():
            warn(f"{path}: {len(missing)} of {len(listed)} series were not downloaded")
    numbers = {uid: row[_IMAGES].strip() for uid, row in rows.items() if row[_MODALITY].strip() == "CT"}
    expected = {uid: int(n) for uid, n in numbers.items() if n.isdecimal()}
    found: list[Stack | Refused] = [*scan.stacks, *scan.refused]
    present = Counter(s.series_uid for s in scan.skipped if not s.reason.startswith(DUPLICATE))
    for each in found:
        present[each.series_uid] += each.n_files
    if absent := sum(not present[uid] for uid in expected):
        warn(f"metadata.csv: {absent} of {len(expected)} CT series have no image here")
    names = {each.series_uid: each.name for each in found}
    incomplete = {
        uid: Refused(names[uid], present[uid], f"{present[uid]} of {n} images present", _FETCH_AGAIN, uid)
        for uid, n in expected.items()
        if uid in names and present[uid] < n
    }
    return Scan(
        tuple(s for s in scan.stacks if s.series_uid not in incomplete),
        scan.skipped,
        (*(r for r in scan.refused if r.series_uid not in incomplete), *incomplete.values()),
    )


def _near(source: Path, pattern: str) -> list[Path]:
    """Files of that name in the folder given and in those just below it."""
    return sorted(path for path in {*source.glob(pattern), *source.glob(f"*/{pattern}")} if path.is_file())
