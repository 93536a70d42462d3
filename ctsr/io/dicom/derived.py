"""What a slice of a derived series says: the modules of a CT image, copied by name from the source or made new.

Only what is listed here passes: no private group, no overlay, no dose counter that would count twice.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr.errors import InputError
from ctsr.io.dicom.header import EXPLICIT
from ctsr.io.dicom.pixels import is_lossy
from ctsr.io.dicom.records import Stack
from ctsr.io.dicom.sidecar import UNPAIRED

if TYPE_CHECKING:
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

__all__ = ["ANY_IMAGE", "ANY_SERIES", "IMPLEMENTATION", "headers", "uid"]

_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
IMPLEMENTATION = "2.25.203410337812284907162953281640733259077"  # ctsr's own, the same for ever
# what every slice of the series takes from the first slice of the source
_SERIES = """
    SpecificCharacterSet TimezoneOffsetFromUTC LongitudinalTemporalInformationModified
    PatientName PatientID IssuerOfPatientID PatientBirthDate PatientBirthTime PatientSex
    OtherPatientIDsSequence OtherPatientNames EthnicGroup PatientComments
    PatientAge PatientSize PatientWeight Occupation AdditionalPatientHistory AdmittingDiagnosesDescription
    StudyInstanceUID StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName StudyDescription
    PhysiciansOfRecord NameOfPhysiciansReadingStudy
    SeriesDate SeriesTime BodyPartExamined PatientPosition ProtocolName Laterality
    FrameOfReferenceUID PositionReferenceIndicator
    ClinicalTrialSponsorName ClinicalTrialProtocolID ClinicalTrialProtocolName ClinicalTrialSiteID
    ClinicalTrialSiteName ClinicalTrialSubjectID ClinicalTrialSubjectReadingID ClinicalTrialTimePointID
    ClinicalTrialTimePointDescription ClinicalTrialCoordinatingCenterName ClinicalTrialSeriesID
    ClinicalTrialSeriesDescription ClinicalTrialProtocolEthicsCommitteeName
    ClinicalTrialProtocolEthicsCommitteeApprovalNumber
"""
_DEIDENTIFIED = "DeidentificationMethod DeidentificationMethodCodeSequence"
# what holds for the derived slice where all source slices agree
_COMMON = """
    KVP ScanOptions DataCollectionDiameter ReconstructionDiameter DistanceSourceToDetector DistanceSourceToPatient
    GantryDetectorTilt TableHeight RotationDirection FilterType GeneratorPower FocalSpots ConvolutionKernel
    RevolutionTime SingleCollimationWidth TotalCollimationWidth TableSpeed TableFeedPerRotation SpiralPitchFactor
    ExposureModulationType BurnedInAnnotation RecognizableVisualFeatures
"""
# what a derived slice takes from the source slice that is nearest
_NEAREST = """
    AcquisitionNumber AcquisitionDate AcquisitionTime AcquisitionDateTime AcquisitionUID IrradiationEventUID
    ContentDate ContentTime ExposureTime XRayTubeCurrent Exposure ContrastBolusAgent ContrastBolusAgentSequence
    ContrastBolusRoute ContrastBolusAdministrationRouteSequence ContrastBolusVolume ContrastBolusStartTime
    ContrastBolusStopTime ContrastBolusTotalDose ContrastFlowRate ContrastFlowDuration ContrastBolusIngredient
    ContrastBolusIngredientConcentration
"""
_WINDOW = "WindowCenter WindowWidth WindowCenterWidthExplanation"
_SUPPORT = 2  # source slices on either side of a derived one that count as its sources
# present even if nothing is known: type 2 of the CT image, and conditions that nobody can decide
_AT_LEAST_EMPTY = """
    PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber
    ReferringPhysicianName PositionReferenceIndicator AcquisitionNumber KVP PatientPosition
"""
_TRIAL_AT_LEAST_EMPTY = "ClinicalTrialProtocolName ClinicalTrialSiteID ClinicalTrialSiteName"  # in a trial
_IN_ENHANCED = {  # classic integer strings that multi-frame objects hold as binary numbers
    "ExposureTime": "ExposureTimeInms",
    "XRayTubeCurrent": "XRayTubeCurrentInmA",
    "Exposure": "ExposureInmAs",
    "AcquisitionNumber": "FrameAcquisitionNumber",
}
# what pydicom raises on bytes that are no such value, on sequences that end too early, and on private tags
_UNREADABLE = (ValueError, TypeError, KeyError, OverflowError, NotImplementedError, EOFError, OSError)
_AGE = re.compile(r"\d{3}[DWMY]")


def uid(seed: bytes, part: str) -> str:
    """A UID below 2.25 from a digest, always of 44 characters, so that any takes the place of another.

    A UUID of version 8 (RFC 9562: of the maker's own rule) whose highest bit is set: 39 decimal digits.
    """
    number = int.from_bytes(hashlib.sha256(seed + part.encode()).digest()[:16])
    number = number & ~(0xF << 76) | 0x8 << 76
    number = number & ~(0x3 << 62) | 0x2 << 62
    return f"2.25.{number | 1 << 127}"


ANY_SERIES, ANY_IMAGE = uid(b"placeholder", "series"), uid(b"placeholder", "image")


def headers(
    like: Stack,
    grid: np.ndarray,
    shape: tuple[int, int, int],
    record: Mapping[str, Any],
    *,
    padding_value: int | None,
    seed: bytes,
    now: datetime.datetime | None,
) -> tuple[list[bytes], list[str]]:
    """The file of each slice of one derived series up to its pixels, and what a user should know of it.

    grid: (4, 4) index (column, row, slice) → LPS mm, orthogonal. shape: columns, rows, slices. record: how the pixels
    came about. seed: of UIDs that the source lacks; for those of series and image `ANY_…` stand. now: ContentDate.
    InputError where the source has what can't be written.
    """
    from pydicom.dataset import Dataset, FileMetaDataset

    sources = [_in_a_character_set(s.header) for s in like.slices]
    series, warnings = _series(like, sources, grid, record, seed)
    if padding_value is not None:
        series.add_new("PixelPaddingValue", "SS", padding_value)  # by name pydicom could not tell US from SS
    columns, rows, n = shape
    series.Columns, series.Rows = columns, rows
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, 2 * columns * rows)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = _CT_IMAGE, ANY_IMAGE  # type: ignore[assignment]
    meta.TransferSyntaxUID, meta.ImplementationClassUID = EXPLICIT, IMPLEMENTATION  # type: ignore[assignment]
    meta.ImplementationVersionName = f"CTSR_{record['ctsr_version'].replace('.', '_')}"[:16]

    step = np.linalg.norm(grid[:3, 2])
    at = np.array([s.position @ grid[:3, 2] for s in like.slices]) / step
    made = []
    for k in range(n):
        out = Dataset()
        out.update(series)
        out.file_meta = meta
        position = grid[:3, 3] + k * grid[:3, 2]
        along = float(position @ grid[:3, 2] / step)
        near = np.argsort(np.abs(at - along), kind="stable")
        nearest = sources[near[0]]
        _copy(out, _NEAREST, nearest)
        centres, widths = (np.atleast_1d(_value(nearest, name)) for name in ("WindowCenter", "WindowWidth"))
        if len(centres) == len(widths) and all(w is not None and w >= 1 for w in widths):
            _copy(out, _WINDOW, nearest)
        _refer(out, like, sources, sorted(near[: 2 * _SUPPORT].tolist()))
        if now is not None:
            out.ContentDate, out.ContentTime = now.strftime("%Y%m%d %H%M%S").split()
        out.InstanceNumber = k + 1
        out.ImagePositionPatient, out.SliceLocation = _decimals(position), _decimals([along])[0]
        _fill(out, _AT_LEAST_EMPTY)
        made.append(_encoded(out, like.name) + pixels)
    return made, warnings


def _encoded(out: Dataset, name: str) -> bytes:
    import pydicom

    buffer = io.BytesIO()
    try:
        pydicom.dcmwrite(buffer, out, enforce_file_format=True)
    except (ValueError, TypeError, AttributeError, OverflowError, struct.error) as exc:
        reason = f"an attribute of its header can't be written again ({type(exc).__name__})"
        raise InputError(reason, path=name) from None  # the cause would quote the patient
    return buffer.getvalue()


def _series(
    like: Stack, sources: Sequence[Dataset], grid: np.ndarray, record: Mapping[str, Any], seed: bytes
) -> tuple[Dataset, list[str]]:
    """What is the same in every slice, and warnings."""
    first, spacing = sources[0], np.linalg.norm(grid[:3, :3], axis=0)
    warnings = []
    out = _dataset(SOPClassUID=_CT_IMAGE, SeriesInstanceUID=ANY_SERIES, SOPInstanceUID=ANY_IMAGE)
    _copy(out, _SERIES, first)
    for keyword in _COMMON.split():
        if all(_value(s, keyword) == _value(first, keyword) for s in sources):
            _copy(out, keyword, first)
    if _find(first, "PatientIdentityRemoved") and any(_find(first, k) for k in _DEIDENTIFIED.split()):
        _copy(out, f"PatientIdentityRemoved {_DEIDENTIFIED}", first)
    if any(_value(s, "BurnedInAnnotation") == "YES" for s in sources):
        out.BurnedInAnnotation = "YES"
    for keyword, what in (("StudyInstanceUID", "study"), ("FrameOfReferenceUID", "frame of reference")):
        if keyword not in out:
            setattr(out, keyword, uid(seed, what))
            warnings.append(f"the source names no {what}: a new one is written")
    if out.get("BodyPartExamined") in UNPAIRED.split():
        out.pop("Laterality", None)
    else:
        _fill(out, "Laterality")
    if "ClinicalTrialSponsorName" in out:
        _fill(out, _TRIAL_AT_LEAST_EMPTY)
    # 01 once any source was compressed with loss, 00 only where every one says that it was not
    lossy = [source for s, source in zip(like.slices, sources, strict=True) if is_lossy(s)]
    if lossy:
        out.LossyImageCompression = "01"
        _copy(out, "LossyImageCompressionRatio LossyImageCompressionMethod", lossy[0])
    elif all(_value(s, "LossyImageCompression") == "00" for s in sources):
        out.LossyImageCompression = "00"

    out.Modality, out.ContentQualification = "CT", "RESEARCH"
    out.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    out.SeriesNumber = min(int(_value(first, "SeriesNumber") or 0) + 1000, (1 << 31) - 1)
    name = f"{str(_value(first, 'SeriesDescription') or '')[:48]} SR {float(round(spacing[2], 3))}mm"
    out.SeriesDescription = name.strip()
    model, version = _ascii(record["model"], 64), record["ctsr_version"]
    ours = _dataset(Manufacturer="ctsr", ManufacturerModelName=model, SoftwareVersions=version)
    out.update(ours)
    if record.get("weights_sha256"):
        out.DeviceSerialNumber = record["weights_sha256"]  # 64 characters, as many as fit
    out.DerivationDescription = _description(record)
    out.DerivationCodeSequence = [_code("113085", "Spatial resampling")]
    if record.get("tilt_removed_deg"):
        out.DerivationCodeSequence.append(_code("113072", "Multiplanar reformatting"))
        out.GantryDetectorTilt = 0
    out.ContributingEquipmentSequence = _equipment(first, ours)

    out.SliceThickness, out.SpacingBetweenSlices = _decimals([record["SliceThickness"], spacing[2]])
    out.PixelSpacing = _decimals([spacing[1], spacing[0]])
    out.ImageOrientationPatient = _decimals((grid[:3, :2] / spacing[:2]).T.ravel())
    out.SamplesPerPixel, out.PhotometricInterpretation, out.PixelRepresentation = 1, "MONOCHROME2", 1
    out.BitsAllocated, out.BitsStored, out.HighBit = 16, 16, 15
    out.RescaleIntercept, out.RescaleSlope, out.RescaleType = 0, 1, "HU"
    return out, warnings


def _description(record: Mapping[str, Any]) -> str:
    """One paragraph on how the pixels came about, at most 1024 ASCII characters."""
    weights = f"weights sha256 {record['weights_sha256']}" if record.get("weights_sha256") else "no weights"
    mean, most = record["consistency_residual_mean_hu"], record["consistency_residual_max_hu"]
    residual = ""
    if mean is not None:
        figures = f"{mean:.3g} HU in the mean and {most:.3g} HU at most"
        residual = f" Thickened again they differ from the source by {figures}."
    text = (
        f"Thin slices computed from thick ones by ctsr {record['ctsr_version']}, model {record['model']}, {weights}, "
        f"factor {record['factor']:g}; source slices {record['input_slice_thickness_mm']:g} mm thick, "
        f"{record['input_spacing_mm']:g} mm apart.{residual} "
        "Research use only, not for primary diagnosis."
    )
    return _ascii(text, 1024)


def _refer(out: Dataset, like: Stack, sources: Sequence[Dataset], near: Iterable[int]) -> None:
    """Name the source images of a slice, if they have UIDs: an object once, with its frames."""
    frames: dict[tuple[str, str], list[int]] = {}
    for i in near:
        kind, uid = (str(_value(sources[i], k) or "") for k in ("SOPClassUID", "SOPInstanceUID"))
        frame = like.slices[i].frame
        frames.setdefault((kind, uid), []).extend([] if frame is None else [frame + 1])
    if not like.series_uid or any(not uid for _, uid in frames):
        return
    purpose = _code("121322", "Source image for image processing operation")
    images, instances = [], []
    for (kind, uid), numbers in frames.items():
        reference = {"ReferencedSOPClassUID": kind, "ReferencedSOPInstanceUID": uid}
        instances.append(_dataset(**reference))
        images.append(_dataset(**reference, PurposeOfReferenceCodeSequence=[purpose]))
        if numbers:
            images[-1].ReferencedFrameNumber = sorted(numbers)
    series = _dataset(SeriesInstanceUID=like.series_uid, ReferencedInstanceSequence=instances)
    out.SourceImageSequence, out.ReferencedSeriesSequence = images, [series]


def _equipment(first: Dataset, ours: Dataset) -> list[Dataset]:
    """The source's own list, its scanner if that is not in it, and ctsr."""
    held = _dataset()
    _copy(held, "ContributingEquipmentSequence", first)
    found = list(held.get("ContributingEquipmentSequence", []))
    purposes = [c.get("CodeValue") for e in found for c in e.get("PurposeOfReferenceCodeSequence", [])]
    if "109101" not in purposes and _find(first, "Manufacturer"):
        found.append(_dataset(PurposeOfReferenceCodeSequence=[_code("109101", "Acquisition Equipment")]))
        _copy(found[-1], "Manufacturer ManufacturerModelName SoftwareVersions", first)
    purpose = [_code("109102", "Processing Equipment")]
    told = "Thin slices computed from thick ones; research use only"
    found.append(_dataset(ContributionDescription=told, PurposeOfReferenceCodeSequence=purpose))
    found[-1].update(ours)
    return found


def _in_a_character_set(header: Dataset) -> Dataset:
    """The header; where it names no character set and uses one, with the one that its bytes are in."""
    from pydicom.dataset import Dataset

    copied = f"{_SERIES} {_NEAREST} SeriesDescription Manufacturer ManufacturerModelName".split()
    held = (header.get_item(k) for k in copied if k in header and not k.endswith("Sequence"))
    text = b"".join(e.value for e in held if e is not None and isinstance(e.value, bytes))
    if "SpecificCharacterSet" in header or text.isascii():
        return header
    named = Dataset(dict(header.items()))
    try:
        text.decode()
        named.SpecificCharacterSet = "ISO_IR 192"
    except UnicodeDecodeError:
        named.SpecificCharacterSet = "ISO_IR 100"
    return named


def _copy(out: Dataset, keywords: str, source: Dataset) -> None:
    """Copy what the source has, in an element of its own; numbers in their shortest form."""
    for keyword in keywords.split():
        if (element := _find(source, keyword)) is not None:
            value, kind = element.value, element.VR
            if element.keyword != keyword:
                value, kind = round(value), "IS"
            elif kind == "SQ":
                value = [_public(item) for item in value]
            elif kind == "DS":  # longer than 16 characters in files of more than one writer
                value = _decimals(np.atleast_1d(value))
            out.add_new(keyword, kind, value)


def _public(item: Dataset) -> Dataset:
    """A copy of a sequence's item without what is private or can't be read, at any depth."""
    from pydicom.dataset import Dataset

    out = Dataset()
    for tag in item.keys():  # noqa: SIM118  # a data set itself yields its elements, decoded
        if (element := _element(item, tag)) is not None:
            value = [_public(i) for i in element.value] if element.VR == "SQ" else element.value
            out.add_new(tag, element.VR, value)
    return out


def _find(header: Dataset, keyword: str) -> DataElement | None:
    """The element, under its own name or a multi-frame object's, if it has values that can be read."""
    found = _element(header, keyword)
    return found if found or keyword not in _IN_ENHANCED else _element(header, _IN_ENHANCED[keyword])


def _value(header: Dataset, keyword: str) -> Any:
    element = _find(header, keyword)
    return None if element is None else element.value


def _element(place: Dataset, name: Any) -> DataElement | None:
    """An element that has values, of the kind that the dictionary asks for: KVP "120 kV" is as good as absent."""
    from pydicom.datadict import dictionary_VM, dictionary_VR
    from pydicom.errors import BytesLengthException

    if name not in place:
        return None
    try:
        element: DataElement = place[name]
        if dictionary_VR(element.tag) != element.VR or element.is_empty:
            return None
        values = list(element.value) if element.VM > 1 or element.VR == "SQ" else [element.value]
        is_one = len(values) == 1 or dictionary_VM(element.tag) != "1"
        if element.VR in ("DS", "IS", "FD", "US") and not (is_one and all(map(math.isfinite, values))):
            return None
        if element.VR == "AS" and not all(map(_AGE.fullmatch, values)):
            return None
    except (*_UNREADABLE, BytesLengthException):
        return None
    return element


def _fill(out: Dataset, keywords: str) -> None:
    for keyword in keywords.split():
        if keyword not in out:
            setattr(out, keyword, None)


def _dataset(**values: Any) -> Dataset:
    from pydicom.dataset import Dataset

    out = Dataset()
    for keyword, value in values.items():
        setattr(out, keyword, value)
    return out


def _code(value: str, meaning: str) -> Dataset:
    """A code of DICOM's own terminology, PS3.16."""
    return _dataset(CodeValue=value, CodingSchemeDesignator="DCM", CodeMeaning=meaning)


def _decimals(values: Any) -> list[Any]:
    """Decimal strings of at most 16 characters; 1e-9 mm is below anything that matters, above float noise."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(round(float(v), 9) + 0.0, auto_format=True) for v in values]  # + 0.0: no "-0.0"


def _ascii(text: str, n: int) -> str:
    """At most n characters that every character set has; a backslash would part two values."""
    return text.encode("ascii", "replace").decode().replace("\\", "/")[:n]
