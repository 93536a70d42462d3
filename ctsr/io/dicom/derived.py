"""What a slice of a derived series says: the modules of a CT image, copied by name from the source or made new.

Only what is listed here passes: no private group, no overlay, no dose counter that would count twice.
"""

from __future__ import annotations

import datetime
import io
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["CT_IMAGE", "IMPLEMENTATION", "Derivation", "Headers"]

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
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
_TEXTS = {
    "PN",
    "LO",
    "SH",
    "ST",
    "LT",
    "UC",
    "UT",
    None,
}  # in a character set; None: of implicit VR, or unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """How the pixels came about, as the series says it.

    version: of ctsr. model: its name. weights_sha256: None where no network took part.
    slice_thickness: the one claimed for the result, mm. source_thickness, source_spacing: mm.
    residual_mean_hu, residual_max_hu: |A x − y|, where it was measured.
    parameters: all else that changes pixels, JSON-able; enters the UIDs, is not written.
    support: source slices on either side of a derived one that count as its sources.
    is_tilt_removed: the source was sheared into this grid.
    """

    version: str
    model: str
    weights_sha256: str | None
    factor: float
    slice_thickness: float
    source_thickness: float
    source_spacing: float
    residual_mean_hu: float | None = None
    residual_max_hu: float | None = None
    parameters: Mapping[str, Any]
    support: int = 2
    is_tilt_removed: bool = False

    def describe(self) -> str:
        """One paragraph for DerivationDescription, at most 1024 ASCII characters."""
        weights = f"weights sha256 {self.weights_sha256}" if self.weights_sha256 else "no weights"
        residual = ""
        if self.residual_mean_hu is not None and self.residual_max_hu is not None:
            figures = f"{self.residual_mean_hu:.3g} HU in the mean and {self.residual_max_hu:.3g} HU at most"
            residual = f" Thickened again they differ from the source by {figures}."
        text = (
            f"Thin slices computed from thick ones by ctsr {self.version}, model {self.model}, {weights}, factor "
            f"{self.factor:g}; source slices {self.source_thickness:g} mm thick, {self.source_spacing:g} mm apart."
            f"{residual} Research use only, not for primary diagnosis."
        )
        return _ascii(text, 1024)


class Headers:
    """Makes the header of each slice of one derived series, and gathers what a user should know of it.

    grid: (4, 4) index (column, row, slice) → LPS mm, orthogonal. shape: columns, rows, slices.
    uids: of the series and of the slice, as every header has them until the true ones are known.
    """

    def __init__(
        self,
        like: Stack,
        grid: np.ndarray,
        shape: tuple[int, int, int],
        derivation: Derivation,
        *,
        padding_value: int | None,
        series_number: int | None,
        uids: tuple[str, str],
        new_uid: Callable[[str], str],
        content_time: datetime.datetime | None,
    ) -> None:
        self.warnings: list[str] = []
        self._like, self._grid, self._shape, self._told, self._uids = like, grid, shape, derivation, uids
        self._time = content_time
        self._sources = [_in_a_character_set(s.header) for s in like.slices]
        self._at = np.array([s.position @ grid[:3, 2] for s in like.slices]) / np.linalg.norm(grid[:3, 2])
        self._series = self._series_part(padding_value, series_number, new_uid)

    def header(self, k: int) -> bytes:
        """The file of slice k up to its pixels. InputError where the source has what can't be written."""
        import pydicom
        from pydicom.dataset import Dataset, FileMetaDataset
        from pydicom.uid import UID

        out = Dataset()
        out.update(self._series)
        series_uid, image_uid = self._uids
        position = self._grid[:3, 3] + k * self._grid[:3, 2]
        along = float(position @ self._grid[:3, 2] / np.linalg.norm(self._grid[:3, 2]))
        near = np.argsort(np.abs(self._at - along), kind="stable")
        nearest = self._sources[near[0]]
        _copy(out, _NEAREST, nearest)
        centres, widths = (np.atleast_1d(_value(nearest, name)) for name in ("WindowCenter", "WindowWidth"))
        if len(centres) == len(widths) and all(w is not None and w >= 1 for w in widths):
            _copy(out, _WINDOW, nearest)
        self._references(out, sorted(near[: 2 * self._told.support].tolist()))
        if self._time is not None:
            out.ContentDate, out.ContentTime = self._time.strftime("%Y%m%d"), self._time.strftime("%H%M%S")
        out.SeriesInstanceUID, out.SOPInstanceUID = series_uid, image_uid
        out.InstanceNumber = k + 1
        out.ImagePositionPatient, out.SliceLocation = _decimals(position), _decimals([along])[0]
        _fill(out, _AT_LEAST_EMPTY)
        out.file_meta = FileMetaDataset()
        out.file_meta.MediaStorageSOPClassUID = UID(CT_IMAGE)
        out.file_meta.MediaStorageSOPInstanceUID = UID(image_uid)
        out.file_meta.TransferSyntaxUID = UID(EXPLICIT)
        out.file_meta.ImplementationClassUID = UID(IMPLEMENTATION)
        out.file_meta.ImplementationVersionName = f"CTSR_{self._told.version.replace('.', '_')}"[:16]
        buffer = io.BytesIO()
        try:
            pydicom.dcmwrite(buffer, out, enforce_file_format=True)
        except (ValueError, TypeError, AttributeError, OverflowError, struct.error) as exc:
            reason = f"an attribute of its header can't be written again ({type(exc).__name__})"
            raise InputError(reason, path=self._like.name) from None  # the cause would quote the patient
        n_bytes = 2 * self._shape[0] * self._shape[1]
        return buffer.getvalue() + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, n_bytes)

    def _series_part(
        self, padding_value: int | None, series_number: int | None, new_uid: Callable[[str], str]
    ) -> Dataset:
        """What is the same in every slice."""
        from pydicom.dataset import Dataset

        told, sources, grid = self._told, self._sources, self._grid
        first, spacing = sources[0], np.linalg.norm(grid[:3, :3], axis=0)
        out = Dataset()
        _copy(out, _SERIES, first)
        for keyword in _COMMON.split():
            value = _value(first, keyword)
            if all(_value(s, keyword) == value for s in sources):
                _copy(out, keyword, first)
        if _find(first, "PatientIdentityRemoved") and any(_find(first, k) for k in _DEIDENTIFIED.split()):
            _copy(out, f"PatientIdentityRemoved {_DEIDENTIFIED}", first)
        if any(_value(s, "BurnedInAnnotation") == "YES" for s in sources):
            out.BurnedInAnnotation = "YES"
        for keyword, what in (("StudyInstanceUID", "study"), ("FrameOfReferenceUID", "frame of reference")):
            if keyword not in out:
                setattr(out, keyword, new_uid(what))
                self.warnings.append(f"the source names no {what}: a new one is written")
        if out.get("BodyPartExamined") in UNPAIRED.split():
            out.pop("Laterality", None)
        else:
            _fill(out, "Laterality")
        if "ClinicalTrialSponsorName" in out:
            _fill(out, _TRIAL_AT_LEAST_EMPTY)
        # 01 once any source was compressed with loss, 00 only where every one says that it was not
        lossy = [source for s, source in zip(self._like.slices, sources, strict=True) if is_lossy(s)]
        if lossy:
            out.LossyImageCompression = "01"
            _copy(out, "LossyImageCompressionRatio LossyImageCompressionMethod", lossy[0])
        elif all(_value(s, "LossyImageCompression") == "00" for s in sources):
            out.LossyImageCompression = "00"

        out.SOPClassUID, out.Modality, out.ContentQualification = CT_IMAGE, "CT", "RESEARCH"
        out.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
        number = min(int(_value(first, "SeriesNumber") or 0) + 1000, (1 << 31) - 1)
        out.SeriesNumber = number if series_number is None else series_number
        name = f"{str(_value(first, 'SeriesDescription') or '')[:48]} SR {float(round(spacing[2], 3))}mm"
        out.SeriesDescription = name.strip()
        _name_ctsr(out, told)
        if told.weights_sha256:
            out.DeviceSerialNumber = told.weights_sha256  # 64 characters, as many as fit
        out.DerivationDescription = told.describe()
        out.DerivationCodeSequence = [_code("113085", "Spatial resampling")]
        if told.is_tilt_removed:
            out.DerivationCodeSequence.append(_code("113072", "Multiplanar reformatting"))
            out.GantryDetectorTilt = 0
        out.ContributingEquipmentSequence = _equipment(first, told)

        out.SliceThickness = _decimals([told.slice_thickness])[0]
        out.SpacingBetweenSlices = _decimals([spacing[2]])[0]
        out.PixelSpacing = _decimals([spacing[1], spacing[0]])
        out.ImageOrientationPatient = _decimals((grid[:3, :2] / spacing[:2]).T.ravel())
        out.Columns, out.Rows, _ = self._shape
        out.SamplesPerPixel, out.PhotometricInterpretation, out.PixelRepresentation = 1, "MONOCHROME2", 1
        out.BitsAllocated, out.BitsStored, out.HighBit = 16, 16, 15
        out.RescaleIntercept, out.RescaleSlope, out.RescaleType = 0, 1, "HU"
        if padding_value is not None:
            out.add_new("PixelPaddingValue", "SS", padding_value)  # by name pydicom could not tell US from SS
        return out

    def _references(self, out: Dataset, near: Sequence[int]) -> None:
        """The source images of a slice, if they have UIDs: an object once, with its frames."""
        from pydicom.dataset import Dataset

        frames: dict[tuple[str, str], list[int]] = {}
        for i in near:
            kind, uid = (str(_value(self._sources[i], k) or "") for k in ("SOPClassUID", "SOPInstanceUID"))
            frame = self._like.slices[i].frame
            frames.setdefault((kind, uid), []).extend([] if frame is None else [frame + 1])
        if not self._like.series_uid or any(not uid for _, uid in frames):
            return
        images, instances = [Dataset() for _ in frames], [Dataset() for _ in frames]
        for ((kind, uid), numbers), image, instance in zip(frames.items(), images, instances, strict=True):
            for each in (image, instance):
                each.ReferencedSOPClassUID, each.ReferencedSOPInstanceUID = kind, uid
            if numbers:
                image.ReferencedFrameNumber = sorted(numbers)
            purpose = _code("121322", "Source image for image processing operation")
            image.PurposeOfReferenceCodeSequence = [purpose]
        series = Dataset()
        series.SeriesInstanceUID, series.ReferencedInstanceSequence = self._like.series_uid, instances
        out.SourceImageSequence, out.ReferencedSeriesSequence = images, [series]


def _equipment(first: Dataset, told: Derivation) -> list[Dataset]:
    """The source's own list, its scanner if that is not in it, and ctsr."""
    from pydicom.dataset import Dataset

    held, scanner, ours = Dataset(), Dataset(), Dataset()
    _copy(held, "ContributingEquipmentSequence", first)
    found = list(held.get("ContributingEquipmentSequence", []))
    purposes = [c.get("CodeValue") for e in found for c in e.get("PurposeOfReferenceCodeSequence", [])]
    if "109101" not in purposes and _find(first, "Manufacturer"):
        _copy(scanner, "Manufacturer ManufacturerModelName SoftwareVersions", first)
        scanner.PurposeOfReferenceCodeSequence = [_code("109101", "Acquisition Equipment")]
        found.append(scanner)
    _name_ctsr(ours, told)
    ours.ContributionDescription = "Thin slices computed from thick ones; research use only"
    ours.PurposeOfReferenceCodeSequence = [_code("109102", "Processing Equipment")]
    return [*found, ours]


def _name_ctsr(out: Dataset, told: Derivation) -> None:
    out.Manufacturer, out.ManufacturerModelName = "ctsr", _ascii(told.model, 64)
    out.SoftwareVersions = told.version


def _in_a_character_set(header: Dataset) -> Dataset:
    """The header; where it names no character set and uses one, with the one that its bytes are in."""
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset

    copied = f"{_SERIES} {_NEAREST} SeriesDescription Manufacturer ManufacturerModelName".split()
    held = (header.get_item(k) for k in copied if k in header and not k.endswith("Sequence"))
    text = b"".join(e.value for e in held if e is not None and isinstance(e.value, bytes))
    if "SpecificCharacterSet" in header or text.isascii():
        return header
    try:
        text.decode()
        name = "ISO_IR 192"
    except UnicodeDecodeError:
        name = "ISO_IR 100"
    named = DataElement("SpecificCharacterSet", "CS", name)
    return Dataset({**dict(header.items()), named.tag: named})


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


def _code(value: str, meaning: str) -> Dataset:
    """A code of DICOM's own terminology, PS3.16."""
    from pydicom.dataset import Dataset

    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


def _decimals(values: Any) -> list[Any]:
    """Decimal strings of at most 16 characters; 1e-9 mm is below anything that matters, above float noise."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(round(float(v), 9) + 0.0, auto_format=True) for v in values]  # + 0.0: no "-0.0"


def _ascii(text: str, n: int) -> str:
    """At most n characters that every character set has; a backslash would part two values."""
    return text.encode("ascii", "replace").decode().replace("\\", "/")[:n]
