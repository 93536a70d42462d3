"""One DICOM object → the image planes of a CT that it holds, or why it holds none.

What an object is called decides little: secondary captures carry Modality CT, a scout lies in the series of its
scan, a perfusion map is an Enhanced CT Image. The tests stand in the order in which they name the reason.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from ctsr.io.atomic import input_error
from ctsr.io.dicom.elements import integer, items, number, numbers, short, text, texts
from ctsr.io.dicom.header import BIG_ENDIAN, CT_CLASSES, DEFLATED, DIRECTORY, EXPLICIT, IMPLICIT, Header
from ctsr.io.dicom.records import DicomFile, Slice
from ctsr.io.dicom.source import read_bytes

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["Image", "NoSlice", "PartOfSeries", "fingerprint", "images_of", "series_of"]

_NATIVE = {IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED}
_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"  # 8 bits, with a slope that makes HU of them
_SMALLEST = 16  # rows and columns; less is an icon
_LARGEST = 1 << 31  # bytes of an object's pixels

_SCOUT = {"LOCALIZER", "SCOUT", "SURVIEW", "REF_SURVIEW", "TOPOGRAM"}
_PROJECTION = {"MIP", "MINIP", "VRT", "CPR", "PROJECTION IMAGE"}
_PROJECTION |= {"MAX_IP", "MIN_IP", "VOLUME_RENDER", "SURFACE_RENDER", "CURVED_MPR"}  # of an Enhanced CT
_PROJECTION_WORD = re.compile(r"(.*[ _])?(MIP|MIN ?IP|MAX ?IP|VRT|CPR)([ _].*)?")  # CSA MIP, MIP THIN, MIN IP
_REFORMATTED = re.compile("(MPR|REFORMATTED|CSA).*")
_COLOURS = re.compile("(MONOCHROME[12]|RGB|PALETTE COLOR|YBR)[A-Z_0-9]*")
_NOT_HU = {
    "MAT_SPECIFIC",
    "MAT_REMOVED",
    "MAT_FRACTIONAL",
    "MAT_VALUE_BASED",
    "EFF_ATOMIC_NUM",
    "ELECTRON_DENSITY",
}
_NOT_HU |= {"RCBF", "RCBV", "MTT", "TTP", "TMAX"}

_IMAGE_TYPE, _FRAME_TYPE, _TECHNIQUE = 0x00080008, 0x00089007, 0x00089207
_FRAME_TYPE_GROUP, _CONTENT, _MEASURES = 0x00189329, 0x00209111, 0x00289110
_PLACE, _ORIENTATION, _RESCALE = 0x00209113, 0x00209116, 0x00289145
_RECONSTRUCTION, _X_RAY = 0x00189314, 0x00189325
_CONVERTED = {"shared": 0x00209170, "frame": 0x00209171}  # what a legacy converted object found no group for


class NoSlice(Exception):
    """The object is no slice; the text says why. is_part: it would be one, were its header whole."""

    def __init__(self, reason: str, *, is_part: bool = False) -> None:
        super().__init__(reason)
        self.is_part = is_part


class PartOfSeries(Exception):
    """The object is part of a volume but can't be read rightly; the text says why its series is refused."""


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A slice, and what tells it from others.

    sop_uid: "" where absent. traits: name → value; the slices of one stack agree in all of them.
    notes: warnings for the stack. start: of the object's pixel data in `read_bytes(slice.file)`. size: of the
    plane's uncompressed pixels, bytes.
    """

    slice: Slice
    sop_uid: str
    traits: dict[str, str]
    notes: tuple[str, ...]
    start: int
    size: int


def series_of(header: Header) -> tuple[str, str]:
    """Study and series of an object; a series without UID is known by its folder."""
    uid = text(header.dataset, 0x0020000E)
    return text(header.dataset, 0x0020000D), uid or f"{PurePosixPath(header.file.name).parent}/"


def images_of(header: Header, *, originals_only: bool = False) -> list[Image]:
    """The image planes of an object, one or one a frame. Raises NoSlice or PartOfSeries."""
    dataset = header.dataset
    sop_class = header.sop_class
    if sop_class not in CT_CLASSES:
        raise NoSlice(_class_name(sop_class))
    frames = _frames(dataset) if CT_CLASSES[sop_class] else [_Frame(dataset)]
    kinds = [_kind(frame, originals_only=originals_only) for frame in frames] or [()]
    bits, colours = short(dataset, 0x00280100), text(dataset, 0x00280004)
    is_16_bit = bits == 16 or (bits == 8 and header.transfer_syntax == _JPEG_BASELINE)
    if not is_16_bit or short(dataset, 0x00280002) != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        named = colours if _COLOURS.fullmatch(colours) else "unknown colours"
        raise NoSlice(f"not a grey CT image ({named}, {'?' if bits is None else bits} bit)")
    if header.pixels is None:
        raise NoSlice("no PixelData", is_part=True)
    rows, columns = short(dataset, 0x00280010), short(dataset, 0x00280011)
    if rows is None or columns is None:
        raise NoSlice(f"no {'Rows' if rows is None else 'Columns'}", is_part=True)
    places = [_geometry(frame) for frame in frames]
    if min(rows, columns) < _SMALLEST:
        raise NoSlice(f"an image of {columns} × {rows} pixels")
    n_frames = integer(dataset, 0x00280008) or 1
    if n_frames != len(frames):
        what = "describes" if CT_CLASSES[sop_class] else "is a classic CT image, which has"
        raise PartOfSeries(f"{header.file.name} holds {n_frames} frames and {what} {len(frames)}")
    size = rows * columns * 2
    notes = [*kinds[0], *_check_pixels(header, size * n_frames)]
    if not header.has_meta:
        notes.append("no file meta information")
    if not text(dataset, 0x0020000E):
        notes.append("no SeriesInstanceUID")
    is_plain = (
        header.file.member is None and header.pixels[1] is not None and header.transfer_syntax != DEFLATED
    )
    of_object = {
        "matrix size": f"{columns} × {rows}",
        "SOP class": sop_class,
        "frame of reference": text(dataset, 0x00200052),
        "patient": text(dataset, 0x00100020),  # two may share UIDs after a careless anonymisation
    }
    images = []
    for k, (frame, (position, orientation, pixel_spacing)) in enumerate(zip(frames, places, strict=True)):
        thickness = number(frame.at(_MEASURES, 0x00180050), 0x00180050)
        rescale = frame.at(_RESCALE, 0x00281053)
        plane = Slice(
            file=header.file,
            header=dataset,
            frame=k if CT_CLASSES[sop_class] else None,
            position=np.array(position),
            row=np.array(orientation[:3]),
            column=np.array(orientation[3:]),
            pixel_spacing=pixel_spacing,
            shape=(rows, columns),
            slope=number(rescale, 0x00281053),
            intercept=number(rescale, 0x00281052),
            rescale_type=text(rescale, 0x00281054),
            thickness=thickness if thickness and thickness > 0 else None,
            kernel=text(frame.at(_RECONSTRUCTION, 0x00181210), 0x00181210),
            image_type=frame.image_type[:4],
            transfer_syntax=header.transfer_syntax,
            pixel_offset=header.pixels[0] + k * size if is_plain else None,
        )
        traits = {**of_object, **_traits(frame), "kernel": _word(plane.kernel)}
        images.append(Image(plane, text(dataset, 0x00080018), traits, tuple(notes), header.pixels[0], size))
    return images


def fingerprint(image: Image) -> tuple[object, ...]:
    """Equal for two planes that hold the same bytes as HU of the same scale. InputError."""
    plane = image.slice
    coded = (short(plane.header, tag) for tag in (0x00280101, 0x00280103))  # BitsStored, PixelRepresentation
    scale = (plane.slope, plane.intercept, plane.transfer_syntax, *coded)
    if plane.pixel_offset is None:
        return (*scale, plane.frame, _digest(plane.file, image.start))
    try:
        with plane.file.path.open("rb") as opened:
            opened.seek(plane.pixel_offset)
            return (*scale, hashlib.sha256(opened.read(image.size)).digest())
    except OSError as exc:
        raise input_error(exc, plane.file.name) from exc


@lru_cache(maxsize=1024)
def _digest(file: DicomFile, start: int) -> bytes:
    return hashlib.sha256(memoryview(read_bytes(file))[start:]).digest()


@dataclass(frozen=True, slots=True, eq=False)
class _Frame:
    """Where the attributes of one plane stand: the data set itself, or functional groups, the frame's own first."""

    dataset: Dataset
    own: Dataset | None = None
    shared: Dataset | None = None

    def at(self, group: int, tag: int) -> Dataset:
        """What holds attribute `tag`, which belongs to the functional group `group`."""
        if self.own is None:
            return self.dataset
        converted = (
            ()
            if group == _RESCALE
            else ((self.own, _CONVERTED["frame"]), (self.shared, _CONVERTED["shared"]))
        )
        for level, sequence in ((self.own, group), (self.shared, group), *converted):
            for found in items(level, sequence)[:1] if level is not None else ():
                if tag in found:
                    return found
        return type(self.dataset)()

    @property
    def image_type(self) -> tuple[str, ...]:
        found = texts(self.at(_FRAME_TYPE_GROUP, _FRAME_TYPE), _FRAME_TYPE)
        return tuple(value.upper() for value in found or texts(self.dataset, _IMAGE_TYPE))


def _frames(dataset: Dataset) -> list[_Frame]:
    shared = items(dataset, 0x52009229)
    return [_Frame(dataset, own, shared[0] if shared else None) for own in items(dataset, 0x52009230)]


def _class_name(uid: str) -> str:
    from pydicom.uid import UID

    if uid == DIRECTORY:
        return "DICOMDIR"
    name = str(UID(uid).name) if uid else "no SOP class"
    return name.removesuffix(" Storage") if name != uid else "unknown SOP class"


def _kind(frame: _Frame, *, originals_only: bool) -> tuple[str, ...]:
    """Notes on the kind of image. Raises NoSlice where its values are no HU of slices."""
    values = (*frame.image_type, "", "", "", "")
    several, third, third_and_fourth = set(values), values[2], set(values[2:4])
    technique = texts(frame.at(_FRAME_TYPE_GROUP, _TECHNIQUE), _TECHNIQUE)
    if third_and_fourth & _SCOUT:
        raise NoSlice("localizer")
    if (several | set(technique)) & _PROJECTION or any(map(_PROJECTION_WORD.fullmatch, several)):
        raise NoSlice("a projection, not slices")
    if found := third_and_fourth & _NOT_HU:
        raise NoSlice(f"not HU ({found.pop()})")
    if _is_derived(values):
        if originals_only:
            raise NoSlice("a derived image (--originals-only)")
        kind = _REFORMATTED.fullmatch(third)
        return (f"derived images ({kind[1]})" if kind else "derived images",)
    return ()


def _is_derived(values: tuple[str, ...]) -> bool:
    return values[:2] == ("DERIVED", "SECONDARY") or any(map(_REFORMATTED.fullmatch, values[2:3]))


def _geometry(frame: _Frame) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, float]]:
    """Position (3), directions (6), pixel spacing (2). Raises NoSlice where one is absent or no number."""
    found = []
    for group, tag, name, n in (
        (_PLACE, 0x00200032, "ImagePositionPatient", 3),
        (_ORIENTATION, 0x00200037, "ImageOrientationPatient", 6),
        (_MEASURES, 0x00280030, "PixelSpacing", 2),
    ):
        values = numbers(frame.at(group, tag), tag)
        if len(values) != n or max(map(abs, values)) > 1e6:
            raise NoSlice(f"no {name}", is_part=True)
        found.append(values)
    position, orientation, spacing = found
    if min(spacing) <= 0:
        raise NoSlice(f"PixelSpacing is {spacing[0]:g} × {spacing[1]:g} mm")
    return position, orientation, (spacing[0], spacing[1])


def _check_pixels(header: Header, expected: int) -> tuple[str, ...]:
    """Notes on the length of the pixel data. Raises PartOfSeries where some are not there."""
    assert header.pixels is not None
    name, (start, length) = header.file.name, header.pixels
    if expected > _LARGEST:
        raise PartOfSeries(f"{name} holds {expected / 2**30:.1f} GiB of pixels, at most 2 are read")
    if (length is not None) != (header.transfer_syntax in _NATIVE):
        raise PartOfSeries(f"pixel data of {name} are not stored as its transfer syntax says")
    if length is None:
        return ()
    there = min(length, header.size - start)
    if there < expected:
        raise PartOfSeries(f"pixel data of {name} is cut short ({there} of {expected} bytes)")
    return ("pixel data are longer than the image",) if length > expected + 1 else ()


def _traits(frame: _Frame) -> dict[str, str]:
    def plain(group: int, tag: int) -> str:
        return text(frame.at(group, tag), tag)

    def rounded(group: int, tag: int) -> str:
        value = number(frame.at(group, tag), tag)
        return "" if value is None else f"{value:g}"

    image_type = frame.image_type
    traits = {
        "kV": rounded(_X_RAY, 0x00180060),
        "field of view": rounded(_RECONSTRUCTION, 0x00181100),
        # the fourth value is the vendor's; it changes within one scan (GE: ADD)
        "image type": "\\".join((*image_type[2:3], "derived" if _is_derived(image_type) else "original")),
    }
    if frame.own is not None:
        traits |= {"stack": plain(_CONTENT, 0x00209056), "time": plain(_CONTENT, 0x00209128)}
    return traits


def _word(value: str) -> str:
    """Free text, fit for a message: few signs, and not many of them."""
    return re.sub(r"[^A-Za-z0-9 ._+/\\-]", "?", value)[:32]
