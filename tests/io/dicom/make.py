"""CT series whose every voxel has a known answer, sound or with one defect, and the judge of what was read.

HU is a linear function of the position in the patient (`hu_at`): whatever grid a reader makes of the files,
each of its voxels can be held against that function at the voxel's own position. A linear function survives
linear interpolation, so a tool that resamples is judged by the same rule as one that does not.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydicom import dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
    generate_uid,
)
from pydicom.valuerep import DS

__all__ = [
    "Case",
    "Plane",
    "block",
    "hu_at",
    "judge",
    "only",
    "planes",
    "put",
    "series",
    "without",
    "write_case",
]

GRADIENT = np.array([4.0, -3.0, 8.0])  # HU per mm along x, y, z of the patient: a pixel is > 2 HU in each
CENTRE = np.array([12.0, -31.0, 104.0])  # mm, where HU is 40; off the origin, so that a lost sign shows
RADIUS = 20.77  # mm; outside it a padded image holds padding. No pixel centre lies on it
NEVER = -900  # HU; lower than this, a value says that the scanner saw nothing
ROUNDING = 0.51  # HU: stored values are integers
RESAMPLED = 1.02  # HU: integers in, integers out
TAG_OF_SIGNED_OR_UNSIGNED = {"PixelPaddingValue": 0x00280120, "PixelPaddingRangeLimit": 0x00280121}


def hu_at(positions: np.ndarray) -> np.ndarray:
    """HU at (..., 3) LPS positions, mm."""
    value: np.ndarray = 40 + (positions - CENTRE) @ GRADIENT
    return value


@dataclass(frozen=True, eq=False)
class Plane:
    """Where one image lies (LPS, mm) and how far its HU are above `hu_at`.

    spacing: between rows, between columns, mm. shape: rows, columns. padded: nothing is seen outside RADIUS.
    """

    position: np.ndarray
    row: np.ndarray
    column: np.ndarray
    spacing: tuple[float, float] = (0.9, 0.75)
    shape: tuple[int, int] = (48, 64)
    offset: float = 0.0
    padded: bool = False

    @property
    def normal(self) -> np.ndarray:
        return np.cross(self.row, self.column)

    def positions(self) -> np.ndarray:
        """(rows, columns, 3) centres of the pixels."""
        j, i = np.indices(self.shape)
        return (
            self.position
            + i[..., None] * self.spacing[1] * self.row
            + j[..., None] * self.spacing[0] * self.column
        )

    def off_axis(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Distance of column i, row j from the middle of the image, mm."""
        rows, columns = self.shape
        return np.hypot((i - (columns - 1) / 2) * self.spacing[1], (j - (rows - 1) / 2) * self.spacing[0])


def planes(
    n: int = 12,
    step: float = 2.5,
    *,
    row: Sequence[float] = (1, 0, 0),
    column: Sequence[float] = (0, 1, 0),
    tilt: float = 0.0,
    sideways: float = 0.0,
    at: Sequence[float] | None = None,
    jump: Callable[[int], Sequence[float]] = lambda k: (0.0, 0.0, 0.0),
    **of_each: object,
) -> list[Plane]:
    """n planes `step` mm apart along row × column, rising.

    tilt, sideways: degrees by which the stack leans along the columns and along the rows.
    at: positions along the normal, mm, in place of n and step. jump: plane → its shift, mm.
    """
    r, c = np.asarray(row, float), np.asarray(column, float)
    lean = np.cross(r, c) + math.tan(math.radians(tilt)) * c + math.tan(math.radians(sideways)) * r
    at = [step * k for k in range(n)] if at is None else at
    first = Plane(np.zeros(3), r, c, **of_each)  # type: ignore[arg-type]
    corner = CENTRE - first.positions()[-1, -1] / 2 - lean * (at[0] + at[-1]) / 2
    return [replace(first, position=corner + lean * t + np.asarray(jump(k))) for k, t in enumerate(at)]


Edit = Callable[[Dataset, int], None]


def put(**tags: object) -> Edit:
    """Set tags; a function gives the value of image k. (VR, value) for the padding tags, whose VR is open."""

    def edit(data: Dataset, k: int) -> None:
        for name, value in tags.items():
            value = value(k) if callable(value) else value
            if name in TAG_OF_SIGNED_OR_UNSIGNED:
                data.add_new(TAG_OF_SIGNED_OR_UNSIGNED[name], *value)  # type: ignore[misc]
            else:
                setattr(data, name, value)

    return edit


def without(*tags: str) -> Edit:
    """Remove tags."""

    def edit(data: Dataset, k: int) -> None:
        for name in tags:
            if name in data:
                delattr(data, name)

    return edit


def only(which: int, edit: Edit) -> Edit:
    """Apply an edit to one image."""
    return lambda data, k: edit(data, k) if k == which else None


def short(numbers: np.ndarray | Sequence[float]) -> list[DS]:
    return [DS(float(x), auto_format=True) for x in numbers]


def stored(
    plane: Plane,
    *,
    slope: float = 1.0,
    intercept: float = -1024.0,
    signed: bool = True,
    bits: int = 16,
    above: int = 0,
    padding: int | None = None,
    table: bool = False,
) -> np.ndarray:
    """Stored values, uint16 or int16, (rows, columns).

    bits: BitsStored; the bits above hold `above`. padding: stored value where nothing is seen.
    """
    values = np.rint((hu_at(plane.positions()) + plane.offset - intercept) / slope).astype(np.int64)
    if padding is not None:
        j, i = np.indices(plane.shape)
        values[plane.off_axis(i, j) > RADIUS] = padding
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    assert ((low <= values) & (values < high)).all(), "the function left the range of the stored values"
    if bits < 16:
        values = (values & (2**bits - 1)) | (above << bits)
    return (values & 0xFFFF).astype(np.uint16).view(np.int16 if signed else np.uint16)


def common(series: str, k: int, sop_class: str) -> Dataset:
    """What every object of the series holds, whatever it shows."""
    data = Dataset()
    data.SpecificCharacterSet = "ISO_IR 100"
    data.SOPClassUID = sop_class
    data.SOPInstanceUID = generate_uid(entropy_srcs=["ctsr", series, str(k)])
    data.StudyInstanceUID = generate_uid(entropy_srcs=["ctsr", "study"])
    data.SeriesInstanceUID = generate_uid(entropy_srcs=["ctsr", "series", series])
    data.FrameOfReferenceUID = generate_uid(entropy_srcs=["ctsr", "frame"])
    data.Modality, data.Manufacturer, data.ManufacturerModelName = "CT", "GE MEDICAL SYSTEMS", "Synthetic"
    data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "Nobody^Made", "made", "", "O"
    data.StudyDate = data.SeriesDate = data.AcquisitionDate = data.ContentDate = "20200102"
    data.StudyTime = data.SeriesTime = data.AcquisitionTime = data.ContentTime = "101500"
    data.StudyID, data.AccessionNumber, data.ReferringPhysicianName = "1", "", ""
    data.SeriesNumber, data.AcquisitionNumber, data.InstanceNumber = 1 + len(series), 1, k + 1
    data.SeriesDescription, data.PatientPosition, data.BodyPartExamined = "made", "HFS", "CHEST"
    data.PositionReferenceIndicator = ""
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = 16
    return data


def classic(plane: Plane, k: int, series: str, **storage: object) -> Dataset:
    """One CT Image with its pixels, uncompressed, little endian."""
    storage = {
        name: value[k % len(value)] if isinstance(value, tuple) else value for name, value in storage.items()
    }
    table = storage.pop("table", False)
    pixels = stored(plane, **storage)  # type: ignore[arg-type]
    bits = int(storage.get("bits", 16))  # type: ignore[call-overload]
    data = common(series, k, CTImageStorage)
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.KVP, data.ConvolutionKernel, data.SliceThickness, data.GantryDetectorTilt = (
        "120",
        "STANDARD",
        "2.5",
        "0",
    )
    data.ImagePositionPatient = short(plane.position)
    data.ImageOrientationPatient = short([*plane.row, *plane.column])
    data.SliceLocation = short([plane.position @ plane.normal])[0]
    data.PixelSpacing = short(plane.spacing)
    data.Rows, data.Columns = plane.shape
    data.BitsStored, data.HighBit, data.PixelRepresentation = bits, bits - 1, int(pixels.dtype == np.int16)
    if table:  # stored + 10 → HU by a look-up table
        data.ModalityLUTSequence = Items([lookup(pixels)])
    else:
        data.RescaleSlope, data.RescaleIntercept = short(
            [storage.get("slope", 1.0), storage.get("intercept", -1024.0)]  # type: ignore[list-item]
        )
        data.RescaleType = "HU"
    data.add_new(0x7FE00010, "OW", pixels.tobytes())
    return data


def lookup(pixels: np.ndarray) -> Dataset:
    """A Modality LUT from stored values to HU, for images stored with intercept −1024."""
    item = Dataset()
    low, count = int(pixels.min()), int(np.ptp(pixels)) + 1
    item.add_new(0x00283002, "SS", [count, low, 16])
    item.ModalityLUTType = "HU"
    item.add_new(0x00283006, "OW", (np.arange(low, low + count) - 1024).astype(np.int16).tobytes())
    return item


def item(**tags: object) -> Items:
    """A sequence of one item."""
    data = Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
    return Items([data])


def multiframe(
    stack: Sequence[Plane],
    k: int,
    series: str,
    *,
    legacy: bool = False,
    shared: Sequence[str] = ("PixelMeasuresSequence", "PlaneOrientationSequence"),
    kind: Sequence[str] = ("ORIGINAL", "PRIMARY", "VOLUME", "NONE"),
    rescale_type: str = "HU",
    phases: int = 1,
    **storage: object,
) -> Dataset:
    """The planes as the frames of one Enhanced CT, in the order given; shared: groups that are said once.

    How the scanner took them (exposure, table, tube) is left out: no reader of volumes asks for it.
    """
    data = common(series, k, LegacyConvertedEnhancedCTImageStorage if legacy else EnhancedCTImageStorage)
    described = ("MONOCHROME", "VOLUME", "NONE")
    data.ImageType = list(kind)
    data.NumberOfFrames = len(stack)
    data.Rows, data.Columns = stack[0].shape
    data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 15, 1
    data.PixelPresentation, data.VolumetricProperties, data.VolumeBasedCalculationTechnique = described
    data.AcquisitionContextSequence, data.PresentationLUTShape = Items(), "IDENTITY"
    data.AcquisitionDateTime, data.AcquisitionDuration = "20200102101500", 1.0
    data.DeviceSerialNumber, data.SoftwareVersions, data.ContentQualification = "1", "1", "RESEARCH"
    data.LossyImageCompression, data.BurnedInAnnotation = "00", "NO"
    organization = generate_uid(entropy_srcs=["ctsr", "dimension"])
    data.DimensionOrganizationSequence = item(DimensionOrganizationUID=organization)
    data.DimensionIndexSequence = Items(
        [
            item(
                DimensionIndexPointer=pointer,
                FunctionalGroupPointer=0x00209111,  # FrameContentSequence
                DimensionOrganizationUID=organization,
            )[0]
            for pointer in (
                0x00209056,
                0x00209057,
                0x00209128,
            )  # StackID, InStackPositionNumber, temporal index
        ]
    )
    order = sorted(range(len(stack)), key=lambda f: (stack[f].position @ stack[f].normal, f))
    frames, pixels = [], []
    for f, plane in enumerate(stack):
        options = {
            key: value[f % len(value)] if isinstance(value, tuple) else value
            for key, value in storage.items()
        }
        pixels.append(stored(plane, **options))  # type: ignore[arg-type]
        slope, intercept = short([options.get("slope", 1.0), options.get("intercept", -1024.0)])  # type: ignore[list-item]
        place, phase = order.index(f) // phases + 1, 1 + int(plane.offset > 0)
        frame = Dataset()
        frame.FrameContentSequence = item(
            StackID="1",
            InStackPositionNumber=place,
            TemporalPositionIndex=phase,
            DimensionIndexValues=[1, place, phase],
            FrameAcquisitionNumber=1,
            FrameAcquisitionDateTime="20200102101500",
            FrameReferenceDateTime="20200102101500",
            FrameAcquisitionDuration=1.0,
        )
        frame.PlanePositionSequence = item(ImagePositionPatient=short(plane.position))
        frame.PlaneOrientationSequence = item(ImageOrientationPatient=short([*plane.row, *plane.column]))
        frame.PixelMeasuresSequence = item(PixelSpacing=short(plane.spacing), SliceThickness="2.5")
        frame.PixelValueTransformationSequence = item(
            RescaleIntercept=intercept, RescaleSlope=slope, RescaleType=rescale_type
        )
        frame.CTImageFrameTypeSequence = item(
            FrameType=list(kind),
            PixelPresentation=described[0],
            VolumetricProperties=described[1],
            VolumeBasedCalculationTechnique=described[2],
        )
        if not legacy:
            frame.CTReconstructionSequence = item(
                ConvolutionKernel="STANDARD",
                ConvolutionKernelGroup="SOFT_TISSUE",
                ReconstructionAlgorithm="FILTER_BACK_PROJ",
            )
        frames.append(frame)
    data.SharedFunctionalGroupsSequence = Items([Dataset()])
    for name in shared:
        setattr(data.SharedFunctionalGroupsSequence[0], name, frames[0][name].value)
        for frame in frames:
            delattr(frame, name)
    data.PerFrameFunctionalGroupsSequence = Items(frames)
    data.add_new(0x7FE00010, "OW", np.stack(pixels).tobytes())
    return data


def save(data: Dataset, path: Path, syntax: str | None) -> None:
    """Write one object; syntax None: the data set alone, without preamble and file meta information."""
    if syntax is None:
        dcmwrite(path, data, implicit_vr=False, little_endian=True, enforce_file_format=False)
        return
    if syntax == ExplicitVRBigEndian:
        data.PixelData = np.frombuffer(data.PixelData, np.uint16).byteswap().tobytes()
    elif syntax == RLELossless:
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.compress(RLELossless, encoding_plugin="pydicom")
    elif syntax in (JPEG2000Lossless, JPEGLosslessSV1):
        data.PixelData = encapsulate(compressed(data, "JPEG" if syntax == JPEGLosslessSV1 else "JPEG2000"))
        data["PixelData"].VR = "OB"
        data["PixelData"].is_undefined_length = True
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    dcmwrite(path, data, enforce_file_format=True)


def compressed(data: Dataset, compressor: str) -> list[bytes]:
    """The codestream of each frame, made by SimpleITK (GDCM)."""
    import SimpleITK as sitk
    from pydicom import dcmread

    pixels = np.frombuffer(data.PixelData, np.int16 if data.PixelRepresentation else np.uint16)
    streams = []
    with tempfile.TemporaryDirectory() as folder:
        writer = sitk.ImageFileWriter()
        writer.SetImageIO("GDCMImageIO")
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.SetFileName(f"{folder}/image.dcm")
        for frame in pixels.reshape(-1, 1, data.Rows, data.Columns):
            writer.Execute(sitk.GetImageFromArray(frame))
            streams += generate_frames(dcmread(f"{folder}/image.dcm").PixelData, number_of_frames=1)
    return streams


@dataclass(frozen=True)
class Block:
    """Images that belong together. counts: they form one of the volumes that the source holds."""

    stack: list[Plane]
    edits: tuple[Edit, ...]
    counts: bool
    series: str
    syntax: str | None
    frames: bool
    storage: dict[str, object] = field(default_factory=dict)


def block(
    stack: list[Plane] | None = None,
    *edits: Edit,
    counts: bool = True,
    series: str = "1",
    syntax: str | None = ExplicitVRLittleEndian,
    frames: bool = False,
    **storage: object,
) -> Block:
    """Images for `write_case`; `storage` goes to `stored`, and to `multiframe` where frames is true."""
    stack = planes() if stack is None else stack
    if storage.get("padding") is not None:
        stack = [replace(plane, padded=True) for plane in stack]
    return Block(stack, edits, counts, series, syntax, frames, storage)


@dataclass(frozen=True)
class Case:
    """One source and what a reader must make of it.

    expect: `right` (one volume for each block that counts), or `refused` or `skipped`, with words that the
        reason must hold. tolerance: HU. spoil: what happens to the folder after it was written.
    """

    expect: str
    words: str
    blocks: tuple[Block, ...]
    tolerance: float = ROUNDING
    spoil: Callable[[Path], None] = lambda folder: None

    @property
    def parts(self) -> list[list[Plane]]:
        """The volumes that the source truly holds, whether or not they can be had."""
        return [
            [plane for plane in b.stack if plane.offset == offset]
            for b in self.blocks
            if b.counts
            for offset in dict.fromkeys(plane.offset for plane in b.stack)
        ]


def series(folder: Path, *blocks: Block, name: Callable[[int], str] = "{:03d}.dcm".format) -> None:
    """Write the images of all blocks, numbered through."""
    folder.mkdir(parents=True, exist_ok=True)
    k = 0
    for b in blocks:
        if b.frames:
            objects = [multiframe(b.stack, k, b.series, **b.storage)]  # type: ignore[arg-type]
        else:
            objects = [classic(plane, k + n, b.series, **b.storage) for n, plane in enumerate(b.stack)]
        for n, data in enumerate(objects):
            for edit in b.edits:
                edit(data, n)
            save(data, folder / name(k + n), b.syntax)
        k += len(objects)


def write_case(case: Case, folder: Path) -> Path:
    """Write the case's files into `folder`; returns it."""
    series(folder, *case.blocks)
    case.spoil(folder)
    return folder


def judge(
    volumes: Sequence[tuple[np.ndarray, np.ndarray]],
    parts: Sequence[list[Plane]],
    tolerance: float = ROUNDING,
    nothing: float | None = None,
) -> str:
    """ "" where the volumes are the parts, each once; else what is wrong.

    volumes: (data (I, J, K) HU, RAS affine). nothing: HU that must stand where the scanner saw nothing;
    None: any value below NEVER, or the lowest of the volume, which is what dcm2niix takes.
    """
    left = list(parts)
    for data, affine in volumes:
        faults = [fault(data, affine, part, tolerance, nothing) for part in left] or [
            (1.0, "one volume too many")
        ]
        share, text = min(faults)
        if text:
            return text
        left.pop(faults.index((share, text)))
    return f"{len(left)} of {len(parts)} volumes are absent" if left else ""


def fault(
    data: np.ndarray, affine: np.ndarray, part: list[Plane], tolerance: float, nothing: float | None
) -> tuple[float, str]:
    """Share of voxels that differ from the part at their own position, and the complaint ("" for none)."""
    if data.ndim != 3 or abs(np.linalg.det(affine)) < 1e-6:
        return 1.0, f"{data.ndim} axes, voxels of {abs(np.linalg.det(affine)):g} mm³"
    part = sorted(part, key=lambda plane: plane.position @ plane.normal)
    first = part[0]
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    corners = np.concatenate(
        [plane.positions()[:: plane.shape[0] - 1, :: plane.shape[1] - 1].reshape(-1, 3) for plane in part]
    )
    index = (np.c_[corners, np.ones(len(corners))] @ np.linalg.inv(lps).T)[:, :3]
    if (index < -0.51).any() or (index > np.array(data.shape) - 0.49).any():
        return 1.0, f"the volume of {data.shape} voxels does not reach over the images"
    ijk = np.indices(data.shape).reshape(3, -1)
    world = (lps[:3, :3] @ ijk + lps[:3, 3:]).T
    t = np.array([plane.position @ first.normal for plane in part])
    where = world @ first.normal
    origin = np.stack([np.interp(where, t, [plane.position[a] for plane in part]) for a in range(3)], axis=1)
    i = (world - origin) @ first.row / first.spacing[1]
    j = (world - origin) @ first.column / first.spacing[0]
    rows, columns = first.shape
    drift = np.linalg.norm((part[-1].position - first.position) - (t[-1] - t[0]) * first.normal)
    margin = np.minimum.reduce([i, columns - 1 - i, j, rows - 1 - j, where - t[0] + 0.1, t[-1] - where + 0.1])
    if drift <= 0.05:
        seen, unseen = margin >= -0.2, margin < -0.2  # pixels; rounded positions move the frame as a whole
    else:  # resampled: rounding decides whether a sample at the edge lies in its frame
        edge = 0.15 if tolerance > RESAMPLED else 0.0
        seen, unseen = margin >= edge - 0.001, margin < -edge - 0.02
    if first.padded:
        beyond = first.off_axis(i, j) - RADIUS
        band = 1.5 * max(first.spacing) if drift > 0.05 else 0.0  # resampled: which neighbours count is open
        seen, unseen = seen & (beyond <= -band), unseen | (beyond > band)
    found = np.asarray(data, float).reshape(-1)
    wrong = seen & ~(np.abs(found - hu_at(world) - first.offset) <= tolerance)
    if nothing is None:  # and within a pixel of the frame a tool may go on with the outermost value
        wrong |= unseen & ~((drift > 0.05) & (margin > -1)) & (found > max(NEVER, found.min()))
    else:
        wrong |= unseen & (found != nothing)
    share = float(wrong.mean())
    if not share:
        return 0.0, ""
    worst = np.nanmax(np.abs(found - hu_at(world) - first.offset)[seen], initial=0)
    return share, f"wrong {100 * share:.0f} % of {data.shape}, up to {worst:.1f} HU"
