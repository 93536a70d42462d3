"""Which volumes a source holds, which files are no part of one, which series form none: from headers alone."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from ctsr.errors import GeometryError, InputError
from ctsr.io.dicom.elements import quiet, text
from ctsr.io.dicom.frames import NoSlice, slices_of
from ctsr.io.dicom.grid import SAME_POSITION, change_of_spacing, fit_grid
from ctsr.io.dicom.pixels import check_stored, fingerprint
from ctsr.io.dicom.records import DicomFile, Refused, Scan, Skipped, Slice, Stack
from ctsr.io.dicom.source import damage, find

__all__ = ["DUPLICATE", "scan"]

DUPLICATE = "duplicate of"  # begins the reason of a file that is another one again, UIDs and all

_SAME_SPACING, _SAME_DIRECTION = 1e-4, 1e-4  # mm, cosine; more is another stack
_SCOUT_COSINE = 0.7071  # 45° off what most of its series shows
_FEWEST = 3  # slices: two have one distance, and nothing to check it against

# What tells phases apart, the most trusted first. Each changes within some plain scan (AcquisitionNumber counts
# rotations, ImageType's fourth value is the vendor's), so none splits a stack whose positions are all different.
_PHASES = {
    "ImageType": 0x00080008,
    "AcquisitionNumber": 0x00200012,
    "TemporalPositionIdentifier": 0x00200100,
    "TriggerTime": 0x00181060,
    "NominalPercentageOfCardiacPhase": 0x00209241,
    "AcquisitionTime": 0x00080032,
    "ContentTime": 0x00080033,
    "SeriesTime": 0x00080031,
}
_SHOWN = {"matrix size", "pixel spacing", "kernel", "kV", "field of view"}  # traits told with their values

_Volume = tuple[list[Slice], tuple[str, ...]]  # in rising order, and notes
_LeftOut = list[tuple[Slice, str]]  # with the reason


def scan(
    source: Path,
    *,
    originals_only: bool = False,
    split: bool = False,
    progress: Callable[[int], None] = lambda n_files: None,
) -> Scan:
    """Everything that a folder, an archive or a file holds, no pixel decoded.

    originals_only: leave out what was computed from other images. split: two stacks where the spacing changes
    once. progress: called with the number of files seen. Pixel bytes are read only where two images share an
    identifier or a position. InputError: the source is absent, damaged, or over the limits.
    """
    every: dict[tuple[str, ...], _Series] = {}
    skipped: list[Skipped] = []
    with quiet():
        for n_files, found in enumerate(find(source), start=1):
            progress(n_files)
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            name, uid, study = (
                found.file.name,
                text(found.dataset, 0x0020000E),
                text(found.dataset, 0x0020000D),
            )
            folder = "" if uid else str(PurePosixPath(name).parent)  # what tells series without a UID apart
            series = every.setdefault((study, uid, folder), _Series(uid))
            fates = {"skipped": skipped, "incomplete": series.incomplete, "fault": series.faults}
            try:
                series.slices += slices_of(found, originals_only=originals_only)
            except NoSlice as exc:
                fates[exc.fate].append(Skipped(name, str(exc), uid))
            except Exception as exc:  # a sequence that pydicom parses only now
                skipped.append(Skipped(name, damage(exc), uid))
        outcomes = [outcome for series in every.values() for outcome in series.outcomes(split=split)]
    return Scan(
        stacks=tuple(o for o in outcomes if isinstance(o, Stack)),
        skipped=(*skipped, *(o for o in outcomes if isinstance(o, Skipped))),
        refused=tuple(o for o in outcomes if isinstance(o, Refused)),
    )


@dataclass(slots=True)
class _Series:
    """What was found of one series. incomplete: files whose header lacks a part. faults: files that can't be read."""

    uid: str
    slices: list[Slice] = field(default_factory=list)
    incomplete: list[Skipped] = field(default_factory=list)
    faults: list[Skipped] = field(default_factory=list)

    def outcomes(self, *, split: bool) -> Iterator[Stack | Skipped | Refused]:
        """Each slice of the series in a stack, skipped or refused."""
        if why := self.faults or ([] if self.slices else self.incomplete):
            yield from self.incomplete if self.faults else ()
            more = f", and {len(why) - 1} more files" if why[1:] else ""
            n_files = len(why) + len({s.file for s in self.slices})
            yield Refused(why[0].name, n_files, why[0].reason + more, series_uid=self.uid)
            return
        yield from self.incomplete
        try:
            left_out = _copies_by_identifier(self.slices)
        except InputError as exc:
            yield self._refused(self.slices, exc, ())
            return
        groups, others = _groups(_without(self.slices, left_out))
        left_out += others
        found: list[_Volume] = []
        faulty: list[tuple[list[Slice], InputError]] = []
        for group in groups:
            try:
                volumes, copies = _volumes(group, split=split)
            except InputError as exc:
                faulty.append((group, exc))
            else:
                found += volumes
                left_out += copies
        counted = {s.file for slices, _ in found for s in slices}  # frames of one file may part
        for group, error in faulty:
            yield self._refused(group, error, counted)
            counted |= {s.file for s in group}
        yield from self._skips(left_out)
        told = _told(groups)
        for k, (slices, notes) in enumerate(found):
            label, header = _label(k) if found[1:] else "", slices[0].header
            study, patient = text(header, 0x0020000D), text(header, 0x00100020)
            warnings = dict.fromkeys((*told, *notes, *(note for s in slices for note in s.notes)))
            yield Stack(tuple(slices), self.uid, study, patient, label, tuple(warnings))

    def _refused(self, slices: Sequence[Slice], why: InputError, counted: Collection[DicomFile]) -> Refused:
        reason = why.reason if why.path is None else f"{why.path}: {why.reason}"
        n_files = len({s.file for s in slices}.difference(counted))
        return Refused(slices[0].file.name, n_files, reason, why.hint, self.uid)

    def _skips(self, left_out: _LeftOut) -> Iterator[Skipped]:
        """One line a file; one a frame where other frames of the file are kept."""
        frames = Counter(s.file for s in self.slices)
        dropped = Counter(s.file for s, _ in left_out)
        reasons: dict[tuple[DicomFile, str], str] = {}
        for s, reason in left_out:
            frame = f" frame {(s.frame or 0) + 1}" if dropped[s.file] < frames[s.file] else ""
            reasons.setdefault((s.file, frame), reason)
        for (file, frame), reason in reasons.items():
            yield Skipped(file.name + frame, reason, self.uid)


def _label(k: int) -> str:
    """a … z, aa …."""
    return (_label(k // 26 - 1) if k >= 26 else "") + string.ascii_lowercase[k % 26]


def _without(slices: Sequence[Slice], left_out: _LeftOut) -> list[Slice]:
    gone = {s for s, _ in left_out}
    return [s for s in slices if s not in gone]


def _repeats(slices: Sequence[Slice], key: Callable[[Slice], Hashable]) -> Iterator[tuple[Slice, Slice]]:
    """Each slice that has the key of an earlier one, with that one."""
    first: dict[Hashable, Slice] = {}
    pairs = ((s, first.setdefault(key(s), s)) for s in slices)
    return ((s, original) for s, original in pairs if original is not s)


def _copies_by_identifier(slices: Sequence[Slice]) -> _LeftOut:
    """Slices that are another one again. InputError: one identifier, two images."""

    def content(s: Slice) -> tuple[object, ...]:
        return (*s.position, *s.row, *s.column, *s.pixel_spacing, *fingerprint(s))

    named = [s for s in slices if text(s.header, 0x00080018)]
    copies = []
    for s, original in _repeats(named, lambda s: (text(s.header, 0x00080018), s.frame)):
        if content(original) != content(s):
            names = f"{original.file.name} and {s.file.name}"
            raise InputError(f"two different images share SOPInstanceUID: {names}")
        copies.append((s, f"{DUPLICATE} {original.file.name}"))
    return copies


def _groups(slices: Sequence[Slice]) -> tuple[list[list[Slice]], _LeftOut]:
    """The stacks of a series by what their images have in common; and what is no part of one, with its reason."""
    directions: list[tuple[float, ...]] = []
    spacings: list[tuple[float, ...]] = []
    by_traits: dict[tuple[str, ...], list[Slice]] = {}
    for s in slices:
        s.traits["orientation"] = str(_first_alike(directions, (*s.row, *s.column), _SAME_DIRECTION))
        spacing = spacings[_first_alike(spacings, s.pixel_spacing, _SAME_SPACING)]
        s.traits["pixel spacing"] = "{:.6g} × {:.6g}".format(*spacing)
        by_traits.setdefault(tuple(s.traits.values()), []).append(s)
    groups = list(by_traits.values())
    main = max(groups, key=len, default=[])
    kept, others = [], []
    for group in groups:
        is_across = abs(_unit_normal(group[0]) @ _unit_normal(main[0])) < _SCOUT_COSINE
        if is_across and group is not main and 2 * len(main) > len(slices):
            others += [(s, "localizer") for s in group]
        elif len(group) < _FEWEST <= len(main):
            count = f"{len(group)} image{'s' * (len(group) > 1)}"
            others += [(s, f"{count} with another {_difference([main, group])}") for s in group]
        else:
            kept.append(group)
    return kept, others


def _first_alike(known: list[tuple[float, ...]], values: tuple[float, ...], tolerance: float) -> int:
    """Index of the known values that these equal; they become known where none do."""
    for k, other in enumerate(known):
        if all(abs(a - b) <= tolerance for a, b in zip(values, other, strict=True)):
            return k
    known.append(values)
    return len(known) - 1


def _unit_normal(s: Slice) -> np.ndarray:
    return s.normal / max(float(np.linalg.norm(s.normal)), 1e-9)


def _difference(groups: Sequence[Sequence[Slice]]) -> str:
    """The trait, of those that differ between groups, that tells most."""
    traits = [group[0].traits for group in groups]
    return next(name for name in traits[0] if len({t[name] for t in traits}) > 1)


def _told(groups: Sequence[Sequence[Slice]]) -> tuple[str, ...]:
    """A warning where a series holds several stacks."""
    if len(groups) < 2:
        return ()
    name = _difference(groups)
    values = dict.fromkeys(group[0].traits[name] or "not given" for group in groups)
    shown = f"{name} {', '.join(itertools.islice(values, 5))}" if name in _SHOWN else f"they differ in {name}"
    return (f"series holds {len(groups)} stacks ({shown})",)


def _volumes(group: Sequence[Slice], *, split: bool) -> tuple[list[_Volume], _LeftOut]:
    """The volumes of one stack, each with its notes, in rising order; and copies, with their reason.

    Raises InputError (mostly GeometryError) where the images form none.
    """
    normal = _unit_normal(group[0])
    slices = sorted(group, key=lambda s: float(s.position @ normal))
    places = _places(slices, normal)
    crowded = [place for place in places if len(place) > 1]
    repeats = (pair for place in crowded for pair in _repeats(place, fingerprint))
    copies = [(s, f"the same pixels as {original.file.name}") for s, original in repeats]
    distinct = _without(slices, copies)
    if len(distinct) == len(places):
        volumes = _regular(distinct, split=split)
        name, n_phases = _phases_between(distinct)
        note = f"slices of {n_phases} phases lie between each other (by {name}): read as one volume"
        return [(volume, (*notes, note) if name else notes) for volume, notes in volumes], copies
    for candidates, left_out in ((distinct, copies), (slices, [])):  # two phases may agree in some images
        for name, tag in _PHASES.items():
            if phases := _phases(candidates, tag):
                note = f"{len(phases)} phases in one series, split by {name}"
                return [(phase, (note,)) for phase in phases], left_out
    n_crowded = sum(len(_without(place, copies)) > 1 for place in crowded)
    raise GeometryError(f"{n_crowded} of {len(places)} positions hold more than one image")


def _places(slices: Sequence[Slice], normal: np.ndarray) -> list[list[Slice]]:
    """Slices, which rise along the normal, by their position."""
    places: list[list[Slice]] = []
    for s in slices:
        for place in reversed(places):
            off = s.position - place[0].position
            if off @ off < SAME_POSITION**2:
                place.append(s)
                break
            if off @ normal >= SAME_POSITION:
                places.append([s])
                break
        else:
            places.append([s])
    return places


def _phases(slices: Sequence[Slice], tag: int) -> list[list[Slice]]:
    """The slices by the value of an element, where each value's slices form a volume; else []."""
    phases: dict[str, list[Slice]] = {}
    for s in slices:
        phases.setdefault(text(s.header, tag), []).append(s)
    if len(phases) < 2 or min(map(len, phases.values())) < _FEWEST:
        return []
    try:
        for phase in phases.values():
            _regular(phase, split=False)
    except InputError:
        return []
    return list(phases.values())


def _phases_between(slices: Sequence[Slice]) -> tuple[str, int]:
    """The name of what tells phases apart whose slices, each a volume, lie between each other, and their number."""
    for name, tag in _PHASES.items():
        values = [text(s.header, tag) for s in slices]
        n_runs = 1 + sum(a != b for a, b in itertools.pairwise(values))
        if n_runs > len(set(values)) and _phases(slices, tag):
            return name, len(set(values))
    return "", 0


def _regular(slices: list[Slice], *, split: bool) -> list[_Volume]:
    """One volume, or two with `split` where the spacing changes once. InputError: none that can be read rightly."""
    check_stored(slices)
    try:
        fit_grid(slices)
    except GeometryError:
        at = change_of_spacing(slices) if split else None
        if at is None:
            raise
        note = "split where the slice spacing changes"
        return [(slices[:at], (note,)), (slices[at:], (note,))]
    return [(slices, ())]
