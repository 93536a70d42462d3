"""What a slice of a derived series says: the modules of a CT image, copied by name from the source or made new.

Only what is listed here passes: no private group, no overlay, no dose counter that would count twice.
"""

from __future__ import annotations

import datetime
import io
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ctsr.errors import InputError
from ctsr.io.dicom.attributes import Attributes, public_copy
from ctsr.io.dicom.records import Stack

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

__all__ = ["CT_IMAGE", "IMPLEMENTATION", "Derivation", "Headers"]

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
IMPLEMENTATION = "2.25.203410337812284907162953281640733259077"  # ctsr's own, the same for ever
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 53, 55, 81)}
_PERHAPS_LOSSY = {f"1.2.840.10008.1.2.4.{n}" for n in (91, 203)}  # JPEG 2000 and HTJ2K: the tag alone tells

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
# PS3.16 annex L, as dciodvfy has it: Laterality must not be there; for any other it must, if only empty
_UNPAIRED = """
    ABDOMEN ABDOMENPELVIS AORTA BACK BLADDER BRAIN CEREBELLUM CERVIX CHEST CHESTABDOMEN CHESTABDPELVIS
    CIRCLEOFWILLIS COCCYX COLON CORONARYARTERY CSPINE CTSPINE DUODENUM ESOPHAGUS FACE GALLBLADDER HEAD HEADNECK HEART
    ILEUM ILIUM JAW JEJUNUM LARYNX LIVER LSPINE LSSPINE MAXILLA MEDIASTINUM MOUTH NECK NECKCHEST NECKCHESTABDOMEN
    NECKCHESTABDPELV NOSE PANCREAS PELVIS PENIS PHARYNX PROSTATE RECTUM SCALP SKULL SPINE SPLEEN SSPINE STERNUM
    STOMACH THYMUS THYROID TLSPINE TONGUE TRACHEA TSPINE URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY
"""


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
            residual = (
                f" Thickened again they differ from the source by {self.residual_mean_hu:.3g} HU in the mean and "
                f"{self.residual_max_hu:.3g} HU at most."
            )
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
        self._sources = [Attributes(s) for s in like.slices]
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
        self._copy(out, _NEAREST, self._sources[near[0]])
        self._window(out, self._sources[near[0]])
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
        out.file_meta.TransferSyntaxUID = UID(_EXPLICIT_LITTLE)
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

        told, first, grid = self._told, self._sources[0], self._grid
        spacing = np.linalg.norm(grid[:3, :3], axis=0)
        out = Dataset()
        self._copy(out, _SERIES, first)
        self._copy(out, " ".join(filter(self._is_common, _COMMON.split())), first)
        if first.value("PatientIdentityRemoved") and any(map(first.value, _DEIDENTIFIED.split())):
            self._copy(out, f"PatientIdentityRemoved {_DEIDENTIFIED}", first)
        if any(s.value("BurnedInAnnotation") == "YES" for s in self._sources):
            out.BurnedInAnnotation = "YES"
        for keyword, what in (("StudyInstanceUID", "study"), ("FrameOfReferenceUID", "frame of reference")):
            if keyword not in out:
                setattr(out, keyword, new_uid(what))
                self.warnings.append(f"the source names no {what}: a new one is written")
        if out.get("BodyPartExamined") in _UNPAIRED.split():
            out.pop("Laterality", None)
        elif "Laterality" not in out:
            out.Laterality = None
        if "ClinicalTrialSponsorName" in out:
            _fill(out, _TRIAL_AT_LEAST_EMPTY)
        self._compression(out)

        out.SOPClassUID, out.Modality, out.ContentQualification = CT_IMAGE, "CT", "RESEARCH"
        out.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
        number = min(int(first.value("SeriesNumber") or 0) + 1000, (1 << 31) - 1)
        out.SeriesNumber = number if series_number is None else series_number
        name = f"{str(first.value('SeriesDescription') or '')[:48]} SR {float(round(spacing[2], 3))}mm"
        out.SeriesDescription = name.strip()
        out.Manufacturer, out.ManufacturerModelName = "ctsr", _ascii(told.model, 64)
        out.SoftwareVersions = told.version
        if told.weights_sha256:
            out.DeviceSerialNumber = told.weights_sha256  # 64 characters, as many as fit
        out.DerivationDescription = told.describe()
        out.DerivationCodeSequence = [_code("113085", "Spatial resampling")]
        if told.is_tilt_removed:
            out.DerivationCodeSequence.append(_code("113072", "Multiplanar reformatting"))
            out.GantryDetectorTilt = 0
        out.ContributingEquipmentSequence = self._equipment(first)

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

    def _copy(self, out: Dataset, keywords: str, source: Attributes) -> None:
        """Copy what the source has, in an element of its own; numbers in their shortest form."""
        for keyword in keywords.split():
            if (element := source.find(keyword)) is not None:
                value, kind = element.value, element.VR
                if element.keyword != keyword:
                    value, kind = round(value), "IS"
                elif kind == "SQ":
                    value = [public_copy(item) for item in value]
                elif kind == "DS":  # longer than 16 characters in files of more than one writer
                    value = _decimals(np.atleast_1d(value))
                out.add_new(keyword, kind, value)

    def _is_common(self, keyword: str) -> bool:
        values = [s.value(keyword) for s in self._sources]
        return all(v == values[0] for v in values)

    def _window(self, out: Dataset, source: Attributes) -> None:
        """The source's window, if it is one: a width below 1 is none."""
        centres, widths = (np.atleast_1d(source.value(k)) for k in ("WindowCenter", "WindowWidth"))
        if len(centres) == len(widths) and all(w is not None and w >= 1 for w in widths):
            self._copy(out, _WINDOW, source)

    def _compression(self, out: Dataset) -> None:
        """01 once any source was compressed with loss, 00 only where every one says that it was not."""
        tags = [s.value("LossyImageCompression") for s in self._sources]
        syntaxes = [s.transfer_syntax for s in self._like.slices]
        is_lossy = [
            tag == "01" or syntax in _LOSSY or (syntax in _PERHAPS_LOSSY and tag != "00")
            for tag, syntax in zip(tags, syntaxes, strict=True)
        ]
        if any(is_lossy):
            out.LossyImageCompression = "01"
            source = self._sources[is_lossy.index(True)]
            self._copy(out, "LossyImageCompressionRatio LossyImageCompressionMethod", source)
        elif set(tags) == {"00"}:
            out.LossyImageCompression = "00"

    def _references(self, out: Dataset, near: Sequence[int]) -> None:
        """The source images of a slice, if they have UIDs: an object once, with its frames."""
        from pydicom.dataset import Dataset

        frames: dict[tuple[str, str], list[int]] = {}
        for i in near:
            kind, uid = (str(self._sources[i].value(k) or "") for k in ("SOPClassUID", "SOPInstanceUID"))
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

    def _equipment(self, first: Attributes) -> list[Dataset]:
        """The source's own list, its scanner if that is not in it, and ctsr."""
        from pydicom.dataset import Dataset

        held = Dataset()
        self._copy(held, "ContributingEquipmentSequence", first)
        found = list(held.get("ContributingEquipmentSequence", []))
        purposes = [c.get("CodeValue") for e in found for c in e.get("PurposeOfReferenceCodeSequence", [])]
        if "109101" not in purposes and first.value("Manufacturer"):
            scanner = Dataset()
            self._copy(scanner, "Manufacturer ManufacturerModelName SoftwareVersions", first)
            scanner.PurposeOfReferenceCodeSequence = [_code("109101", "Acquisition Equipment")]
            found.append(scanner)
        ours = Dataset()
        ours.Manufacturer, ours.ManufacturerModelName = "ctsr", _ascii(self._told.model, 64)
        ours.SoftwareVersions = self._told.version
        ours.ContributionDescription = "Thin slices computed from thick ones; research use only"
        ours.PurposeOfReferenceCodeSequence = [_code("109102", "Processing Equipment")]
        return [*found, ours]


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
