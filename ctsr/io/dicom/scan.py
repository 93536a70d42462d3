"""Which volumes a source holds, which files are no part of one, which series form none: from headers alone."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ctsr.errors import GeometryError, InputError
from ctsr.io.dicom.elements import quiet, text
from ctsr.io.dicom.frames import Image, NoSlice, PartOfSeries, fingerprint, images_of, series_of
from ctsr.io.dicom.grid import change_of_spacing, fit_grid
from ctsr.io.dicom.pixels import check_pixels
from ctsr.io.dicom.read import check_rescale
from ctsr.io.dicom.records import DicomFile, Refused, Scan, Skipped, Stack
from ctsr.io.dicom.source import damage, find

__all__ = ["scan"]

_SAME_SPACING, _SAME_DIRECTION = 1e-4, 1e-4  # mm, cosine; more is another stack
_SAME_PLACE = 0.01  # mm
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
_TOLD = (
    "orientation",
    "matrix size",
    "pixel spacing",
    "kernel",
    "kV",
    "field of view",
    "image type",
    "stack",
    "time",
    "patient",
)
_SHOWN = {"matrix size", "pixel spacing", "kernel", "kV", "field of view"}  # with their values


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
    every: dict[tuple[str, str], _Series] = {}
    skipped: list[Skipped] = []
    with quiet():
        for n_files, found in enumerate(find(source), start=1):
            progress(n_files)
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            name, uid = found.file.name, text(found.dataset, 0x0020000E)
            series = every.setdefault(series_of(found), _Series(uid))
            try:
                series.images += images_of(found, originals_only=originals_only)
            except PartOfSeries as exc:
                series.faults.append((name, str(exc)))
            except NoSlice as exc:
                (series.incomplete if exc.is_part else skipped).append(Skipped(name, str(exc), uid))
            except Exception as exc:  # a sequence that pydicom parses only now
                skipped.append(Skipped(name, damage(exc), uid))
        outcomes = [outcome for series in every.values() for outcome in series.outcomes(split=split)]
    return Scan(
        stacks=tuple(o for o in outcomes if isinstance(o, Stack)),
        skipped=(*skipped, *(o for o in outcomes if isinstance(o, Skipped))),
        refused=tuple(o for o in outcomes if isinstance(o, Refused)),
    )


_Volume = tuple[list[Image], tuple[str, ...]]  # in rising order, and notes


@dataclass(slots=True)
class _Series:
    """What was found of one series.

    incomplete: images whose header lacks a part. faults: names of files, and why each makes the series unreadable.
    """

    uid: str
    images: list[Image] = field(default_factory=list)
    incomplete: list[Skipped] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)

    def outcomes(self, *, split: bool) -> Iterator[Stack | Skipped | Refused]:
        """Each image of the series in a stack, skipped or refused."""
        if self.faults:
            yield from self.incomplete
            more = f", and {len(self.faults) - 1} more files" if self.faults[1:] else ""
            n_files = len(self.faults) + _n_files(self.images)
            yield Refused(self.faults[0][0], n_files, self.faults[0][1] + more, series_uid=self.uid)
            return
        if self.incomplete and not self.images:
            first = self.incomplete[0]
            yield Refused(first.name, len(self.incomplete), first.reason, series_uid=self.uid)
            return
        yield from self.incomplete
        try:
            copies = _copies_by_identifier(self.images)
        except InputError as exc:
            yield self._refused(self.images, exc)
            return
        groups, others = _groups(_without(self.images, copies))
        left_out = [*copies, *others]
        found: list[_Volume] = []
        faulty: list[tuple[list[Image], InputError]] = []
        for group in groups:
            try:
                volumes, copies = _volumes(group, split=split)
            except InputError as exc:
                faulty.append((group, exc))
                continue
            found += volumes
            left_out += copies
        counted = {image.slice.file for images, _ in found for image in images}  # frames of one file may part
        for group, why in faulty:
            rest = [image for image in group if image.slice.file not in counted]
            yield replace(self._refused(group, why), n_files=_n_files(rest))
            counted |= {image.slice.file for image in rest}
        yield from self._skips(left_out)
        told = _told(groups)
        for label, (images, notes) in zip(_labels(len(found)), found, strict=False):
            yield self._stack(images, label, (*told, *notes))

    def _stack(self, images: Sequence[Image], label: str, notes: Sequence[str]) -> Stack:
        header = images[0].slice.header
        every = dict.fromkeys((*notes, *(note for image in images for note in image.notes)))
        return Stack(
            slices=tuple(image.slice for image in images),
            series_uid=self.uid,
            study_uid=text(header, 0x0020000D),
            patient_id=text(header, 0x00100020),
            label=label,
            warnings=tuple(every),
        )

    def _refused(self, images: Sequence[Image], why: InputError) -> Refused:
        reason = why.reason if why.path is None else f"{why.path}: {why.reason}"
        return Refused(images[0].slice.file.name, _n_files(images), reason, why.hint, self.uid)

    def _skips(self, left_out: Sequence[tuple[Image, str]]) -> Iterator[Skipped]:
        """One line a file; one a frame where other frames of the file are kept."""
        frames = Counter(image.slice.file for image in self.images)
        dropped = Counter(image.slice.file for image, _ in left_out)
        seen: set[DicomFile] = set()
        for image, reason in left_out:
            file, frame = image.slice.file, image.slice.frame
            if dropped[file] < frames[file]:
                yield Skipped(f"{file.name} frame {(frame or 0) + 1}", reason, self.uid)
            elif file not in seen:
                yield Skipped(file.name, reason, self.uid)
            seen.add(file)


def _n_files(images: Sequence[Image]) -> int:
    return len({image.slice.file for image in images})


def _labels(n: int) -> Iterator[str]:
    """Of n stacks of a series: "" for the only one, else a … z, aa …."""
    if n == 1:
        yield ""
    for length in itertools.count(1):
        yield from map("".join, itertools.product(string.ascii_lowercase, repeat=length))


def _without(images: Sequence[Image], left_out: Sequence[tuple[Image, str]]) -> list[Image]:
    gone = {id(image) for image, _ in left_out}
    return [image for image in images if id(image) not in gone]


def _copies_by_identifier(images: Sequence[Image]) -> list[tuple[Image, str]]:
    """Images that are another one again, with their reason. InputError: one identifier, two images."""
    copies = []
    first: dict[tuple[str, int | None], Image] = {}
    for image in images:
        original = first.setdefault((image.sop_uid, image.slice.frame), image) if image.sop_uid else image
        if original is image:
            continue
        if _plane(original) != _plane(image) or fingerprint(original) != fingerprint(image):
            names = f"{original.slice.file.name} and {image.slice.file.name}"
            raise InputError(f"two different images share SOPInstanceUID: {names}")
        copies.append((image, f"duplicate of {original.slice.file.name}"))
    return copies


def _plane(image: Image) -> tuple[float, ...]:
    plane = image.slice
    return (*plane.position, *plane.row, *plane.column, *plane.pixel_spacing)


def _groups(images: Sequence[Image]) -> tuple[list[list[Image]], list[tuple[Image, str]]]:
    """The stacks of a series by what their images have in common; and what is no part of one, with its reason."""
    directions: list[tuple[float, ...]] = []
    spacings: list[tuple[float, ...]] = []
    by_traits: dict[tuple[str, ...], list[Image]] = {}
    for image in images:
        plane = image.slice
        rows, columns = plane.pixel_spacing
        direction = _first_alike(directions, (*plane.row, *plane.column), _SAME_DIRECTION)
        spacing = _first_alike(spacings, (rows, columns), _SAME_SPACING)
        image.traits["orientation"] = str(direction)
        image.traits["pixel spacing"] = "{:.6g} × {:.6g}".format(*spacings[spacing])
        by_traits.setdefault(tuple(image.traits[name] for name in sorted(image.traits)), []).append(image)
    groups = sorted(by_traits.values(), key=len, reverse=True)
    if len(groups) < 2:
        return groups, []
    main = groups[0]
    normal = _unit_normal(main[0])
    kept, others = [main], []
    for group in groups[1:]:
        is_across = abs(_unit_normal(group[0]) @ normal) < _SCOUT_COSINE
        if is_across and 2 * len(main) > len(images):
            others += [(image, "localizer") for image in group]
        elif len(group) < _FEWEST <= len(main):
            difference = _difference([main, group])
            count = f"{len(group)} image{'s' * (len(group) > 1)}"
            others += [(image, f"{count} with another {difference}") for image in group]
        else:
            kept.append(group)
    order = {id(image): k for k, image in enumerate(images)}
    return sorted(kept, key=lambda group: order[id(group[0])]), others


def _first_alike(known: list[tuple[float, ...]], values: tuple[float, ...], tolerance: float) -> int:
    """Index of the known values that these equal; they become known where none do."""
    for k, other in enumerate(known):
        if all(abs(a - b) <= tolerance for a, b in zip(values, other, strict=True)):
            return k
    known.append(values)
    return len(known) - 1


def _unit_normal(image: Image) -> np.ndarray:
    normal = image.slice.normal
    return normal / max(float(np.linalg.norm(normal)), 1e-9)


def _difference(groups: Sequence[Sequence[Image]]) -> str:
    """The trait, of those that differ between groups, that tells most."""
    for name in _TOLD:
        if len({group[0].traits.get(name, "") for group in groups}) > 1:
            return name
    return "frame of reference"


def _told(groups: Sequence[Sequence[Image]]) -> tuple[str, ...]:
    """A warning where a series holds several stacks."""
    if len(groups) < 2:
        return ()
    name = _difference(groups)
    values = dict.fromkeys(group[0].traits.get(name, "") or "not given" for group in groups)
    shown = f"{name} {', '.join(itertools.islice(values, 5))}" if name in _SHOWN else f"they differ in {name}"
    return (f"series holds {len(groups)} stacks ({shown})",)


def _volumes(group: Sequence[Image], *, split: bool) -> tuple[list[_Volume], list[tuple[Image, str]]]:
    """The volumes of one stack, each with its notes, in rising order; and copies, with their reason.

    Raises InputError (mostly GeometryError) where the images form none.
    """
    normal = _unit_normal(group[0])
    images = sorted(group, key=lambda image: float(image.slice.position @ normal))
    places = _places(images, normal)
    copies = []
    for place in places:
        first: dict[tuple[object, ...], Image] = {}
        for image in place if len(place) > 1 else ():
            original = first.setdefault(fingerprint(image), image)
            if original is not image:
                copies.append((image, f"duplicate of {original.slice.file.name}"))
    distinct = _without(images, copies)
    if len(distinct) == len(places):
        return _regular(distinct, split=split), copies
    attempts = [(distinct, copies), (images, [])]  # the second: two phases may agree in some of their images
    for candidates, left_out in attempts:
        for name, tag in _PHASES.items():
            if phases := _phases(candidates, tag):
                note = f"{len(phases)} phases in one series, split by {name}"
                return [(phase, (note,)) for phase in phases], left_out
    n_crowded = sum(len(place) > 1 for place in _places(distinct, normal))
    raise GeometryError(f"{n_crowded} of {len(places)} positions hold more than one image")


def _places(images: Sequence[Image], normal: np.ndarray) -> list[list[Image]]:
    """Images, which rise along the normal, by their position."""
    places: list[list[Image]] = []
    for image in images:
        position = image.slice.position
        for place in reversed(places):
            off = position - place[0].slice.position
            if off @ normal >= _SAME_PLACE:
                places.append([image])
                break
            if off @ off < _SAME_PLACE**2:
                place.append(image)
                break
        else:
            places.append([image])
    return places


def _phases(images: Sequence[Image], tag: int) -> list[list[Image]]:
    """The images by the value of an element, where each value's images form a volume; else []."""
    phases: dict[str, list[Image]] = {}
    for image in images:
        phases.setdefault(text(image.slice.header, tag), []).append(image)
    if len(phases) < 2 or min(map(len, phases.values())) < _FEWEST:
        return []
    try:
        for phase in phases.values():
            _regular(phase, split=False)
    except InputError:
        return []
    return list(phases.values())


def _regular(images: list[Image], *, split: bool) -> list[_Volume]:
    """One volume, or two with `split` where the spacing changes once. InputError: none that can be read rightly."""
    slices = [image.slice for image in images]
    check_pixels(slices)
    check_rescale(slices)
    try:
        fit_grid(slices)
    except GeometryError:
        at = change_of_spacing(slices) if split else None
        if at is None:
            raise
        fit_grid(slices[:at])
        fit_grid(slices[at:])
        note = "split where the slice spacing changes"
        return [(images[:at], (note,)), (images[at:], (note,))]
    return [(images, ())]
