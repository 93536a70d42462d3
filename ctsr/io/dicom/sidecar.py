"""What a volume's sidecar may tell of its scan: a whitelist of technical attributes, none of the patient.

Everything that is not listed stays behind: names, IDs, UIDs, dates, free text, private groups. What is listed is
taken only if it is a number or short plain text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr.io.dicom.elements import items, numbers, short, texts
from ctsr.io.dicom.records import Slice

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["KEYWORDS", "attributes"]

_WHITELIST = """
    AcquisitionType BitsAllocated BitsStored BodyPartExamined BurnedInAnnotation CTDIvol ContrastBolusAgent
    ConvolutionKernelGroup DataCollectionCenterPatient DataCollectionDiameter DistanceSourceToDetector
    DistanceSourceToPatient EstimatedDoseSaving Exposure ExposureModulationType ExposureTime FilterType FocalSpots
    GantryDetectorTilt HighBit KVP LossyImageCompression LossyImageCompressionMethod LossyImageCompressionRatio
    Manufacturer ManufacturerModelName Modality MultienergyCTAcquisition PatientIdentityRemoved PatientPosition
    PixelRepresentation PositionReferenceIndicator RecognizableVisualFeatures ReconstructionAlgorithm
    ReconstructionAngle ReconstructionDiameter ReconstructionTargetCenterPatient RevolutionTime ScanOptions
    SingleCollimationWidth SpacingBetweenSlices SpiralPitchFactor TableFeedPerRotation TableHeight TableSpeed
    TotalCollimationWidth WaterEquivalentDiameter XRayTubeCurrent
"""
_OF_SLICES = (  # a multi-frame object keeps these in places of its own: they come from `Slice`
    "ConvolutionKernel", "ImageOrientationPatient", "ImageType", "PixelSpacing", "RescaleIntercept", "RescaleSlope",
    "RescaleType", "SliceThickness", "TransferSyntaxUID",
)  # fmt: skip
KEYWORDS = (*_WHITELIST, *_OF_SLICES)  # all that `attributes` can tell
_TEXT = re.compile(r"[A-Za-z0-9 ._+/-]{1,64}")
_VENDORS = (
    "GE",
    "SIEMENS",
    "PHILIPS",
    "TOSHIBA",
    "CANON",
    "HITACHI",
    "NEUSOFT",
    "UNITED IMAGING",
    "SHIMADZU",
)
_BODY_PARTS = (  # DICOM PS3.16 Annex L, the parts that CT is made of; elsewhere people write sentences
    "ABDOMEN ABDOMENPELVIS ANKLE AORTA ARM BRAIN CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE EAR ELBOW EXTREMITY EYE "
    "FACE FEMUR FINGER FOOT FOREARM HAND HEAD HEADNECK HEART HIP JAW KIDNEY KNEE LEG LIVER LSPINE LUNG MANDIBLE "
    "MAXILLA NECK NECKCHEST NOSE ORBIT PANCREAS PELVIS SHOULDER SINUS SKULL SPINE SSPINE TSPINE WHOLEBODY WRIST"
)
_SHARED, _PER_FRAME = 0x52009229, 0x52009230
_FRAMES_LOOKED_AT = 16  # of a multi-frame object: each has tens of nested items
_LISTED = 8  # distinct values that are listed; of more numbers, only how far they reach


def attributes(slices: Sequence[Slice]) -> dict[str, Any]:
    """Keyword → value, for JSON: the slices' common value; where it varies, [value, count] pairs.

    More than eight distinct numbers (a tube current that follows the patient) become least and greatest value.
    """
    from pydicom.datadict import dictionary_VR, tag_for_keyword

    found: dict[str, Counter[Any]] = {}
    tags = {int(tag_for_keyword(keyword) or 0): keyword for keyword in _WHITELIST.split()}
    few = slices if slices[0].frame is None else slices[:: -(-len(slices) // _FRAMES_LOOKED_AT)]
    for s in few:
        seen: set[int] = set()
        for dataset in _places(s):
            for tag in (tags.keys() & dataset.keys()) - seen:  # the outermost place wins
                seen.add(tag)
                value = _value(dataset, tag, dictionary_VR(tag), tags[tag])
                if value not in (None, ()):
                    found.setdefault(tags[tag], Counter())[value] += 1
    for s in slices:  # these a multi-frame object keeps in places of its own
        own = {
            "ConvolutionKernel": _single(_plain_texts(s.kernel.split("\\"))),
            "ImageOrientationPatient": (*s.row.tolist(), *s.column.tolist()),
            "ImageType": _plain_texts(s.image_type[:4]),
            "PixelSpacing": s.pixel_spacing,
            "RescaleIntercept": s.intercept,
            "RescaleSlope": s.slope,
            "RescaleType": s.rescale_type if _TEXT.fullmatch(s.rescale_type) else None,
            "SliceThickness": s.thickness,
            "TransferSyntaxUID": s.transfer_syntax,
        }
        for keyword, value in own.items():
            if value not in (None, ()):
                found.setdefault(keyword, Counter())[value] += 1
    return {keyword: _summary(found[keyword]) for keyword in sorted(found)}


def _places(s: Slice) -> Iterator[Dataset]:
    """The data sets in which an attribute of this slice may stand."""
    yield s.header
    if s.frame is None:
        return
    groups = items(s.header, _SHARED)[:1] + items(s.header, _PER_FRAME)[s.frame : s.frame + 1]
    for group in groups:
        for tag in group.keys():  # noqa: SIM118  # iterating a Dataset converts its elements
            yield from items(group, tag)[:1]


def _value(dataset: Dataset, tag: int, vr: str, keyword: str) -> Any:
    """A number, a text or a tuple of them; None or () where it is neither or says who was scanned."""
    if vr in ("US", "SS"):
        return short(dataset, tag)
    if vr in ("DS", "IS"):
        return _single(numbers(dataset, tag))
    if vr in ("FD", "FL"):
        return _single(_binary(dataset, tag, 8 if vr == "FD" else 4))
    value = texts(dataset, tag)
    if keyword == "ContrastBolusAgent":
        return bool(value)
    if keyword == "Manufacturer":
        upper = " ".join(value).upper()
        return next((v for v in _VENDORS if re.search(rf"\b{v}\b", upper)), "OTHER")
    if keyword == "BodyPartExamined":
        return value[0] if value and value[0] in _BODY_PARTS.split() else None
    return _single(_plain_texts(value))


def _binary(dataset: Dataset, tag: int, n_bytes: int) -> tuple[float, ...]:
    element: Any = dataset.get_item(tag)
    value: Any = element.value if element is not None else None
    if not isinstance(value, bytes):  # converted before
        values = np.array([v for v in np.ravel(value) if isinstance(v, float)])
    elif len(value) % n_bytes:
        return ()
    else:
        values = np.frombuffer(value, dtype=f"{'<' if element.is_little_endian else '>'}f{n_bytes}")
    return tuple(values.tolist()) if np.isfinite(values).all() else ()


def _plain_texts(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(values) if all(_TEXT.fullmatch(v) for v in values) else ()


def _single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _summary(counts: Counter[Any]) -> Any:
    if len(counts) == 1:
        return _listed(next(iter(counts)))
    if len(counts) > _LISTED and all(isinstance(v, int | float) for v in counts):
        return {"min": min(counts), "max": max(counts)}
    return [[_listed(value), n] for value, n in counts.most_common(_LISTED)]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
