"""One DICOM object → the slices of a CT that it holds, or why it holds none.

What an object is called decides little: secondary captures carry Modality CT, a scout lies in the series of its
scan, a perfusion map is an Enhanced CT Image. The tests stand in the order in which they name the reason.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr.io.dicom.elements import items, number, numbers, short, text, texts
from ctsr.io.dicom.header import BIG_ENDIAN, CT_CLASSES, DEFLATED, DIRECTORY, EXPLICIT, IMPLICIT, Header
from ctsr.io.dicom.records import Slice

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["NATIVE", "NoSlice", "frames_of", "slices_of"]

NATIVE = frozenset({IMPLICIT, EXPLICIT, BIG_ENDIAN, DEFLATED})  # transfer syntaxes without compressed pixels
_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"  # 8 bits, with a slope that makes HU of them
_SMALLEST = 16  # rows and columns; less is an icon
_LARGEST = 1 << 31  # bytes of an object's pixels

_SCOUT = {"LOCALIZER", "SCOUT", "SURVIEW", "REF_SURVIEW", "TOPOGRAM"}
_PROJECTION = {"MIP", "MINIP", "VRT", "CPR", "PROJECTION IMAGE"}
_PROJECTION |= {"MAX_IP", "MIN_IP", "VOLUME_RENDER", "SURFACE_RENDER", "CURVED_MPR"}  # of an Enhanced CT
_PROJECTION_WORD = re.compile(r"(.*[ _])?(MIP|MIN ?IP|MAX ?IP|VRT|CPR)([ _].*)?")  # CSA MIP, MIP THIN, MIN IP
_REFORMATTED = re.compile("(MPR|REFORMATTED|CSA).*")
_COLOURS = re.compile("(MONOCHROME[12]|RGB|PALETTE COLOR|YBR)[A-Z_0-9]*")
_NOT_HU = {"EFF_ATOMIC_NUM", "ELECTRON_DENSITY", "RCBF", "RCBV", "MTT", "TTP", "TMAX"}
_NOT_HU |= {"MAT_SPECIFIC", "MAT_REMOVED", "MAT_FRACTIONAL", "MAT_VALUE_BASED"}

_SHARED, _PER_FRAME = 0x52009229, 0x52009230
_CONVERTED = {0x00209170, 0x00209171}  # what a legacy converted object found no functional group for
_RESCALE = (0x00281052, 0x00281053, 0x00281054)
_IN_GROUPS = {_SHARED, _PER_FRAME, *_RESCALE, 0x00180050, 0x00200032, 0x00200037, 0x00280030}


class NoSlice(Exception):
    """The object is no slice; the text says why.

    fate: "skipped"; "incomplete", where it would be one, were its header whole; "fault", where it is part of a volume
    but can't be read rightly, so that its series is refused.
    """

    def __init__(self, reason: str, fate: str = "skipped") -> None:
        super().__init__(reason)
        self.fate = fate


def slices_of(header: Header, *, originals_only: bool = False) -> list[Slice]:
    """The image planes of an object, one or one a frame. Raises NoSlice."""
    dataset, sop_class = header.dataset, header.sop_class
    if sop_class not in CT_CLASSES:
        raise NoSlice(_class_name(sop_class))
    is_multiframe = CT_CLASSES[sop_class]
    frames = frames_of(dataset) if is_multiframe else [dataset]
    types = [_image_type(frame) for frame in frames]
    notes = {note for t, frame in zip(types, frames, strict=True) if (note := _kind(t, frame))}
    if notes and originals_only:
        raise NoSlice("a derived image (--originals-only)")
    bits, colours = short(dataset, 0x00280100), text(dataset, 0x00280004)
    is_16_bit = bits == 16 or (bits == 8 and header.transfer_syntax == _JPEG_BASELINE)
    if not is_16_bit or short(dataset, 0x00280002) != 1 or colours not in ("MONOCHROME1", "MONOCHROME2"):
        named = colours if _COLOURS.fullmatch(colours) else "unknown colours"
        raise NoSlice(f"not a grey CT image ({named}, {'?' if bits is None else bits} bit)")
    if header.pixels is None:
        raise NoSlice("no PixelData", "incomplete")
    rows, columns = short(dataset, 0x00280010), short(dataset, 0x00280011)
    if rows is None or columns is None:
        raise NoSlice(f"no {'Rows' if rows is None else 'Columns'}", "incomplete")
    places = [_geometry(frame) for frame in frames]
    if min(rows, columns) < _SMALLEST:
        raise NoSlice(f"an image of {columns} × {rows} pixels")
    n_frames = number(dataset, 0x00280008) or 1
    if n_frames != len(frames):
        what = "describes" if is_multiframe else "is a classic CT image, which has"
        raise NoSlice(f"{header.file.name} holds {n_frames:g} frames and {what} {len(frames)}", "fault")
    notes |= _check_length(header, 2 * rows * columns * len(frames))
    if not header.has_meta:
        notes.add("no file meta information")
    if not text(dataset, 0x0020000E):
        notes.add("no SeriesInstanceUID")
    slices = []
    for k, (frame, kind, place) in enumerate(zip(frames, types, places, strict=True)):
        position, orientation, pixel_spacing = place
        thickness = number(frame, 0x00180050)
        of_object = {"matrix size": f"{columns} × {rows}", "SOP class": sop_class}
        made = Slice(
            file=header.file,
            header=frame,
            frame=k if is_multiframe else None,
            position=np.array(position),
            row=np.array(orientation[:3]),
            column=np.array(orientation[3:]),
            pixel_spacing=pixel_spacing,
            shape=(rows, columns),
            slope=number(frame, 0x00281053),
            intercept=number(frame, 0x00281052),
            rescale_type=text(frame, 0x00281054),
            thickness=thickness if thickness and thickness > 0 else None,
            kernel=text(frame, 0x00181210),
            image_type=kind[:4],
            transfer_syntax=header.transfer_syntax,
            pixel_offset=header.pixels[0],
            traits=_traits(frame, kind, is_multiframe=is_multiframe) | of_object,
            notes=tuple(sorted(notes)),
        )
        slices.append(made)
    return slices


def _traits(frame: Dataset, image_type: tuple[str, ...], *, is_multiframe: bool) -> dict[str, str]:
    """What the slices of one stack have in common; those that tell most come first."""

    def rounded(tag: int) -> str:
        value = number(frame, tag)
        return "" if value is None else f"{value:g}"

    return {
        "orientation": "",  # this one and the pixel spacing are compared, with a tolerance, by the scan
        "matrix size": "",
        "pixel spacing": "",
        "kernel": re.sub(r"[^A-Za-z0-9 ._+/\\-]", "?", text(frame, 0x00181210))[
            :32
        ],  # free text, fit for a message
        "kV": rounded(0x00180060),
        "field of view": rounded(0x00181100),
        # the fourth value is the vendor's; it changes within one scan (GE: ADD)
        "image type": "\\".join((*image_type[2:3], "derived" if _is_derived(image_type) else "original")),
        "stack": text(frame, 0x00209056) if is_multiframe else "",
        "time": text(frame, 0x00209128) if is_multiframe else "",
        "patient": text(frame, 0x00100020),  # two may share UIDs after a careless anonymisation
        "frame of reference": text(frame, 0x00200052),
    }


def frames_of(dataset: Dataset) -> list[Dataset]:
    """The attributes of each frame of a multi-frame object, as a classic file of its own would have them.

    What stands in a functional group goes before the rest, in the frame's own group before the shared one. Rescale
    and geometry are taken from groups alone: at the top level they are leftovers.
    """
    from pydicom.dataset import Dataset

    shared = (items(dataset, _SHARED) or [Dataset()])[0]
    top = {tag: element for tag, element in dataset.items() if tag not in _IN_GROUPS}
    frames = []
    for own in items(dataset, _PER_FRAME):
        held = top | _opened(shared, _CONVERTED) | _opened(own, _CONVERTED)
        for tag in _RESCALE:
            held.pop(tag, None)
        groups = (_opened(level, level.keys() - _CONVERTED) for level in (shared, own))
        frames.append(Dataset(held | next(groups) | next(groups)))
    return frames


def _opened(level: Dataset, groups: Collection[int]) -> dict[Any, Any]:
    """The elements, by tag, that stand in functional groups."""
    opened = (item for group in groups for item in items(level, group)[:1])
    return {tag: element for item in opened for tag, element in item.items()}


def _class_name(uid: str) -> str:
    from pydicom.uid import UID

    if uid == DIRECTORY:
        return "DICOMDIR"
    name = str(UID(uid).name) if uid else "no SOP class"
    return name.removesuffix(" Storage") if name != uid else "unknown SOP class"


def _image_type(frame: Dataset) -> tuple[str, ...]:
    found = texts(frame, 0x00089007) or texts(frame, 0x00080008)  # FrameType, ImageType
    return tuple(value.upper() for value in found)


def _kind(image_type: tuple[str, ...], frame: Dataset) -> str:
    """A note on derived images, else "". Raises NoSlice where its values are no HU of slices."""
    third_and_fourth = set(image_type[2:4])
    every = {*image_type, *texts(frame, 0x00089207)}  # VolumeBasedCalculationTechnique
    if third_and_fourth & _SCOUT:
        raise NoSlice("localizer")
    if every & _PROJECTION or any(map(_PROJECTION_WORD.fullmatch, image_type)):
        raise NoSlice("a projection, not slices")
    if found := third_and_fourth & _NOT_HU:
        raise NoSlice(f"not HU ({found.pop()})")
    kind = next(filter(None, map(_REFORMATTED.fullmatch, image_type[2:3])), None)
    if kind:
        return f"derived images ({kind[1]})"
    return "derived images" if _is_derived(image_type) else ""


def _is_derived(image_type: tuple[str, ...]) -> bool:
    return image_type[:2] == ("DERIVED", "SECONDARY") or any(map(_REFORMATTED.fullmatch, image_type[2:3]))


def _geometry(frame: Dataset) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, float]]:
    """Position (3), directions (6), pixel spacing (2). Raises NoSlice where one is absent or no number."""
    position, orientation, spacing = (numbers(frame, tag) for tag in (0x00200032, 0x00200037, 0x00280030))
    for values, name, n in (
        (position, "ImagePositionPatient", 3), (orientation, "ImageOrientationPatient", 6), (spacing, "PixelSpacing", 2)
    ):  # fmt: skip
        if len(values) != n or max(map(abs, values)) > 1e6:
            raise NoSlice(f"no {name}", "incomplete")
    if min(spacing) <= 0:
        raise NoSlice(f"PixelSpacing is {spacing[0]:g} × {spacing[1]:g} mm")
    return position, orientation, (spacing[0], spacing[1])


def _check_length(header: Header, expected: int) -> set[str]:
    """Notes on the length of the pixel data. Raises NoSlice where some are not there."""
    assert header.pixels is not None
    name, (start, length) = header.file.name, header.pixels
    if expected > _LARGEST:
        raise NoSlice(f"{name} holds {expected / 2**30:.1f} GiB of pixels, at most 2 are read", "fault")
    if (length is not None) != (header.transfer_syntax in NATIVE):
        raise NoSlice(f"pixel data of {name} are not stored as its transfer syntax says", "fault")
    if length is None:
        return set()
    there = min(length, header.size - start)
    if there < expected:
        raise NoSlice(f"pixel data of {name} is cut short ({there} of {expected} bytes)", "fault")
    return {"pixel data are longer than the image"} if length > expected + 1 else set()
