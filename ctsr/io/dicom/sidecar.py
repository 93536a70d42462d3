"""What a volume's sidecar may tell of its scan: a whitelist of technical attributes, none of the patient.

Everything that is not listed stays behind: names, IDs, UIDs, dates, free text, private groups. What is listed is
taken only if it is a number or short plain text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr.io.dicom.elements import numbers, texts
from ctsr.io.dicom.records import Slice

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["KEYWORDS", "UNPAIRED", "attributes"]

_WHITELIST = """
    AcquisitionType BitsAllocated BitsStored BodyPartExamined BurnedInAnnotation CTDIvol ContrastBolusAgent
    ConvolutionKernel ConvolutionKernelGroup DataCollectionCenterPatient DataCollectionDiameter
    DistanceSourceToDetector DistanceSourceToPatient EstimatedDoseSaving Exposure ExposureModulationType
    ExposureTime FilterType FocalSpots GantryDetectorTilt HighBit ImageOrientationPatient KVP
    LossyImageCompression LossyImageCompressionMethod LossyImageCompressionRatio Manufacturer
    ManufacturerModelName Modality MultienergyCTAcquisition PatientIdentityRemoved PatientPosition
    PixelRepresentation PixelSpacing PositionReferenceIndicator RecognizableVisualFeatures ReconstructionAlgorithm
    ReconstructionAngle ReconstructionDiameter ReconstructionTargetCenterPatient RescaleIntercept RescaleSlope
    RescaleType RevolutionTime ScanOptions SingleCollimationWidth SpacingBetweenSlices SpiralPitchFactor
    TableFeedPerRotation TableHeight TableSpeed TotalCollimationWidth WaterEquivalentDiameter XRayTubeCurrent
"""
KEYWORDS = (*_WHITELIST.split(), "ImageType", "SliceThickness", "TransferSyntaxUID")  # all that can be told
_TEXT = re.compile(r"[A-Za-z0-9 ._+/-]{1,64}")
_VENDOR = re.compile(r"\b(GE|SIEMENS|PHILIPS|TOSHIBA|CANON|HITACHI|NEUSOFT|UNITED IMAGING|SHIMADZU)\b")
UNPAIRED = """
    ABDOMEN ABDOMENPELVIS AORTA BACK BLADDER BRAIN CEREBELLUM CERVIX CHEST CHESTABDOMEN CHESTABDPELVIS
    CIRCLEOFWILLIS COCCYX COLON CORONARYARTERY CSPINE CTSPINE DUODENUM ESOPHAGUS FACE GALLBLADDER HEAD HEADNECK HEART
    ILEUM ILIUM JAW JEJUNUM LARYNX LIVER LSPINE LSSPINE MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN
    NECKCHESTABDPELV NOSE PANCREAS PELVIS PENIS PHARYNX PROSTATE RECTUM SCALP SKULL SPINE SPLEEN SSPINE STERNUM
    STOMACH THYMUS THYROID TLSPINE TONGUE TRACHEA TSPINE URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY
"""  # body parts of PS3.16 annex L that have no side; elsewhere people write sentences
_PAIRED = """
    ANKLE ARM EAR ELBOW EXTREMITY EYE FEMUR FINGER FOOT FOREARM HAND HIP KIDNEY KNEE LEG LUNG MANDIBLE ORBIT SHOULDER
    SINUS WRIST
"""
_BINARY = {"US": "u2", "SS": "i2", "FD": "f8", "FL": "f4"}  # VR → NumPy's type
_LISTED = 8  # distinct values that are listed; of more numbers, only how far they reach


def attributes(slices: Sequence[Slice]) -> dict[str, Any]:
    """Keyword → value, for JSON: the slices' common value, several as a tuple; where it varies, [value, count] pairs.

    More than eight distinct numbers (a tube current that follows the patient) become least and greatest value.
    """
    from pydicom.datadict import tag_for_keyword

    tags = {int(tag_for_keyword(keyword) or 0): keyword for keyword in _WHITELIST.split()}
    # by the value as stored: few are distinct, only those are converted
    counts: Counter[tuple[int, Any]] = Counter()
    example: dict[tuple[int, Any], Dataset] = {}
    for s in slices:
        for tag in tags.keys() & s.header.keys():
            value: Any = getattr(s.header.get_item(tag), "value", None)
            key = tag, value if isinstance(value, bytes) else str(value)
            counts[key] += 1
            example.setdefault(key, s.header)
    found: dict[str, Counter[Any]] = {
        "ImageType": Counter(_plain_texts(s.image_type) for s in slices),
        "SliceThickness": Counter(s.thickness for s in slices),
        "TransferSyntaxUID": Counter(s.transfer_syntax for s in slices),
    }
    for (tag, value), n in counts.items():
        found.setdefault(tags[tag], Counter())[_value(example[tag, value], tag, tags[tag])] += n
    summaries = {keyword: _summary(values) for keyword, values in sorted(found.items())}
    return {keyword: value for keyword, value in summaries.items() if value is not None}


def _value(dataset: Dataset, tag: int, keyword: str) -> Any:
    """A number, a text or a tuple of them; None or () where it is neither or says who was scanned."""
    from pydicom.datadict import dictionary_VR

    vr = dictionary_VR(tag)
    if vr in _BINARY:
        return _single(_binary(dataset.get_item(tag), _BINARY[vr]))
    if vr in ("DS", "IS"):
        return _single(numbers(dataset, tag))
    value = texts(dataset, tag)
    if keyword == "ContrastBolusAgent":
        return bool(value)
    if keyword == "Manufacturer":
        vendor = _VENDOR.search(" ".join(value).upper())
        return vendor[1] if vendor else "OTHER"
    if keyword == "BodyPartExamined":
        return value[0] if value and value[0] in f"{UNPAIRED} {_PAIRED}".split() else None
    return _single(_plain_texts(value))


def _binary(element: Any, kind: str) -> tuple[float, ...]:
    value = element.value
    if isinstance(value, bytes):
        stored = np.dtype(("<" if element.is_little_endian else ">") + kind)
        value = np.frombuffer(value, stored) if len(value) % stored.itemsize == 0 else ()
    values = np.ravel(value).tolist()
    return tuple(values) if all(isinstance(v, int | float) and math.isfinite(v) for v in values) else ()


def _plain_texts(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(values) if all(_TEXT.fullmatch(v) for v in values) else ()


def _single(values: tuple[Any, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _summary(counts: Counter[Any]) -> Any:
    kept = Counter({value: n for value, n in counts.items() if value not in (None, (), "")})
    if len(kept) <= 1:
        return next(iter(kept), None)
    if len(kept) > _LISTED and all(isinstance(v, int | float) for v in kept):
        return {"min": min(kept), "max": max(kept)}
    return [[value, n] for value, n in kept.most_common(_LISTED)]
