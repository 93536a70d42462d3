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
KEYWORDS = (*_WHITELIST.split(), *_OF_SLICES)  # all that `attributes` can tell
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
    from pydicom.datadict import tag_for_keyword

    tags = {int(tag_for_keyword(keyword) or 0): keyword for keyword in _WHITELIST.split()}
    raw: dict[str, dict[Any, Any]] = {}  # keyword → value as stored → a data set that has it
    counts: Counter[tuple[str, Any]] = Counter()  # few values are distinct: only those are converted
    few = slices if slices[0].frame is None else slices[:: -(-len(slices) // _FRAMES_LOOKED_AT)]
    for s in few:
        seen: set[str] = set()
        for dataset in _places(s):
            for tag in tags.keys() & dataset.keys():
                element: Any = dataset.get_item(tag)
                value = element.value if isinstance(element.value, bytes) else str(element.value)
                if tags[tag] not in seen:  # the outermost place wins
                    seen.add(tags[tag])
                    counts[tags[tag], value] += 1
                    raw.setdefault(tags[tag], {}).setdefault(value, (dataset, tag))
    found: dict[str, Counter[Any]] = {}
    for (keyword, value), n in counts.items():
        dataset, tag = raw[keyword][value]
        found.setdefault(keyword, Counter())[_value(dataset, tag, keyword)] += n
    kernels, types = Counter(s.kernel for s in slices), Counter(s.image_type for s in slices)
    own = {  # these a multi-frame object keeps in places of its own
        "ConvolutionKernel": {_single(_plain_texts(v.split("\\"))): n for v, n in kernels.items()},
        "ImageOrientationPatient": Counter((*s.row.tolist(), *s.column.tolist()) for s in slices),
        "ImageType": {_plain_texts(v[:4]): n for v, n in types.items()},
        "PixelSpacing": Counter(s.pixel_spacing for s in slices),
        "RescaleIntercept": Counter(s.intercept for s in slices),
        "RescaleSlope": Counter(s.slope for s in slices),
        "RescaleType": Counter(_single(_plain_texts([s.rescale_type])) for s in slices),
        "SliceThickness": Counter(s.thickness for s in slices),
        "TransferSyntaxUID": Counter(s.transfer_syntax for s in slices),
    }
    summaries = {keyword: _summary(found[keyword]) for keyword in found}
    summaries |= {keyword: _summary(Counter(values)) for keyword, values in own.items()}
    return {keyword: value for keyword, value in sorted(summaries.items()) if value is not None}


def _places(s: Slice) -> Iterator[Dataset]:
    """The data sets in which an attribute of this slice may stand."""
    yield s.header
    if s.frame is None:
        return
    groups = items(s.header, _SHARED)[:1] + items(s.header, _PER_FRAME)[s.frame : s.frame + 1]
    for group in groups:
        for tag in group.keys():  # noqa: SIM118  # iterating a Dataset converts its elements
            yield from items(group, tag)[:1]


def _value(dataset: Dataset, tag: int, keyword: str) -> Any:
    """A number, a text or a tuple of them; None or () where it is neither or says who was scanned."""
    from pydicom.datadict import dictionary_VR

    vr = dictionary_VR(tag)
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
    kept = Counter({value: n for value, n in counts.items() if value not in (None, (), "")})
    if len(kept) <= 1:
        return _listed(next(iter(kept), None))
    if len(kept) > _LISTED and all(isinstance(v, int | float) for v in kept):
        return {"min": min(kept), "max": max(kept)}
    return [[_listed(value), n] for value, n in kept.most_common(_LISTED)]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
