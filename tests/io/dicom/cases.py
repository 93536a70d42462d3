"""Named CT series, sound and with one defect each, and what a reader must make of every one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from tests.io.dicom.make import (
    RESAMPLED,
    ROUNDING,
    Block,
    Case,
    Edit,
    Plane,
    block,
    only,
    planes,
    put,
    short,
    without,
)

__all__ = ["CASES"]


def right(*blocks: Block, **options: object) -> Case:
    """Every block that counts becomes a volume, exact to `tolerance` HU."""
    return Case("right", "", blocks or (block(),), **options)  # type: ignore[arg-type]


def tilted(*blocks: Block, extra: float = 0.0, **options: object) -> Case:
    """As `right`, with one resampling in the plane."""
    return right(*blocks, tolerance=RESAMPLED + extra, **options)


def refused(words: str, *blocks: Block, **options: object) -> Case:
    """No volume; the reason holds the words."""
    return Case("refused", words, blocks or (block(),), **options)  # type: ignore[arg-type]


def skipped(words: str, *blocks: Block, **options: object) -> Case:
    """No volume, and no fault: every file is something else than a CT slice."""
    return Case("skipped", words, blocks, **options)  # type: ignore[arg-type]


def turned(*degrees: float) -> dict[str, np.ndarray]:
    """Row and column of an axial image after turns about x, y and z."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        step = np.eye(3)
        step[[a, a, b, b], [a, b, a, b]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        turn = step @ turn
    return {"row": turn[:, 0], "column": turn[:, 1]}


def less(*gone: int, **of: object) -> list[Plane]:
    """Planes with some of them taken out."""
    return [plane for k, plane in enumerate(planes(**of)) if k not in gone]  # type: ignore[arg-type]


def again(which: int, to: str) -> Callable[[Path], None]:
    """Copy a file within its folder."""
    return lambda folder: shutil.copy(folder / f"{which:03d}.dcm", folder / to) and None


def renamed(folder: Path) -> None:
    """Names that sort against the order of the slices, without extension, in two folders."""
    for k, path in enumerate(sorted(folder.iterdir())):
        target = folder / ("b", "a")[k % 2] / f"I{(k * 7 + 3) % 12}0"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


def cut(folder: Path) -> None:
    """The last file ends in the middle of its pixels."""
    path = max(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-3000])


def shorter(data: Dataset, k: int) -> None:
    data.PixelData = data.PixelData[: len(data.PixelData) // 2]


def longer(data: Dataset, k: int) -> None:
    data.PixelData = data.PixelData + bytes(64)


def unsigned(data: Dataset, k: int) -> None:
    """Every second slice is stored without a sign, 4000 higher."""
    if k % 2:
        values = np.frombuffer(data.PixelData, np.int16).astype(int) + 4000
        data.PixelData, data.PixelRepresentation = values.astype(np.uint16).tobytes(), 0
        data.RescaleIntercept = float(data.RescaleIntercept) - 4000 * float(data.RescaleSlope)


def rounded(digits: int) -> Edit:
    return lambda data, k: setattr(
        data, "ImagePositionPatient", [f"{float(x):.{digits}f}" for x in data.ImagePositionPatient]
    )


def with_nul(folder: Path) -> None:
    """Decimal strings filled up with NUL instead of a blank."""

    def fill(found: re.Match[bytes]) -> bytes:
        end = found.end() + found[1][0]
        if raw[end - 1 : end] == b" ":
            raw[end - 1 : end] = b"\0"
        return b""

    for path in folder.iterdir():
        raw = bytearray(path.read_bytes())
        re.sub(rb"DS(.)\x00(?=[-+.0-9])", fill, bytes(raw))
        path.write_bytes(raw)


def with_commas(folder: Path) -> None:
    """Positions as a German program would write them."""
    for path in folder.iterdir():
        raw = path.read_bytes()
        tag = raw.index(b"\x20\x00\x32\x00DS")
        stop = tag + 8 + raw[tag + 6]
        path.write_bytes(raw[:tag] + raw[tag:stop].replace(b".", b",") + raw[stop:])


HFS = planes()
LONG = planes(20)
FEET = {"row": (-1, 0, 0), "column": (0, 1, 0)}
CORONAL = {"row": (1, 0, 0), "column": (0, 0, -1)}
SAGITTAL = {"row": (0, 1, 0), "column": (0, 0, -1)}
SHUFFLED = [HFS[k] for k in (7, 2, 9, 0, 11, 4, 1, 10, 3, 8, 5, 6)]
LOCALIZER = planes(1, row=(1, 0, 0), column=(0, 0, -1), spacing=(1.0, 1.0))
THIN = planes(200, 0.625, shape=(16, 20))
DERIVED = put(ImageType=["DERIVED", "SECONDARY", "AXIAL"])


def phase(number: int) -> Edit:
    return put(AcquisitionNumber=number)


def later(offset: float = 100.0) -> list:
    return planes(offset=offset)


def also(*blocks: Block) -> tuple[Block, ...]:
    return (block(), *blocks)


CASES: dict[str, Case] = {
    # orientation: PatientPosition and the directions that go with it
    "axial, head first supine": right(),
    "axial, head first prone": right(
        block(planes(row=(-1, 0, 0), column=(0, -1, 0)), put(PatientPosition="HFP"))
    ),
    "axial, feet first supine": right(block(planes(**FEET), put(PatientPosition="FFS"))),
    "axial, feet first prone": right(
        block(planes(row=(1, 0, 0), column=(0, -1, 0)), put(PatientPosition="FFP"))
    ),
    "axial, head first, lying on the right": right(
        block(planes(row=(0, 1, 0), column=(-1, 0, 0)), put(PatientPosition="HFDR"))
    ),
    "axial, head first, lying on the left": right(
        block(planes(row=(0, -1, 0), column=(1, 0, 0)), put(PatientPosition="HFDL"))
    ),
    "axial, feet first, lying on the left": right(
        block(planes(row=(0, 1, 0), column=(1, 0, 0)), put(PatientPosition="FFDL"))
    ),
    "coronal": right(block(planes(**CORONAL))),
    "sagittal": right(block(planes(**SAGITTAL))),
    "oblique by 20 degrees": right(block(planes(**turned(20, 0, 0)))),
    "oblique by 44 degrees": right(block(planes(**turned(0, 44, 0)))),
    "oblique about all axes": right(block(planes(**turned(-25, 13, 71)))),
    "cosines of six digits": right(
        block(
            planes(**turned(17, -9, 31)),
            put(ImageOrientationPatient=short(np.round([*turned(17, -9, 31).values()], 6).ravel())),
        )
    ),
    "files in falling order": right(block(planes()[::-1])),
    "file names that sort wrongly, in two folders": right(spoil=renamed),
    "square pixels": right(block(planes(spacing=(0.7, 0.7)))),
    "pixels twice as high as wide": right(block(planes(spacing=(1.4, 0.7)))),
    "slices thinner than the pixels": right(block(planes(30, 0.3))),
    "overlapping slices": right(block(planes(step=1.25))),
    "slices with gaps between them": right(block(planes(step=8.0), put(SliceThickness="2.5"))),
    "spacing of 2.3333 mm": right(block(planes(step=7 / 3))),
    # gantry tilt: read from positions, never from the tag
    **{
        f"gantry tilt {angle:+g}": tilted(block(planes(tilt=angle), put(GantryDetectorTilt=str(angle))))
        for angle in (15, -15, 5.5, -22.5, 30, 1)
    },
    "gantry tilt without the tag": tilted(block(planes(tilt=14), without("GantryDetectorTilt"))),
    "gantry tilt, tag of the other sign": tilted(block(planes(tilt=-18.5), put(GantryDetectorTilt="18.5"))),
    "gantry tilt, feet first": tilted(block(planes(tilt=12, **FEET), put(PatientPosition="FFS"))),
    "gantry tilt and padding": tilted(
        block(planes(tilt=16), put(PixelPaddingValue=("SS", -2000)), padding=-2000)
    ),
    "gantry tilt sideways": tilted(block(planes(sideways=10))),
    "gantry tilt, oblique": tilted(block(planes(tilt=-8, **turned(5, -12, 3)))),
    "the tag says tilt, the positions do not": right(block(None, put(GantryDetectorTilt="15"))),
    "gantry tilt, positions rounded to 0.1 mm": tilted(
        block(planes(40, 1.25, tilt=10, shape=(24, 20)), rounded(1)), extra=1.2
    ),
    "gantry tilt with a missing slice": refused("missing", block(less(5, tilt=15))),
    "lean of 50 degrees": refused("tilt", block(planes(tilt=50))),
    # stored values
    "unsigned, intercept -1024": right(block(signed=False)),
    "signed, intercept 0": right(block(intercept=0)),
    "intercept -1000": right(block(intercept=-1000, signed=False)),
    "slope 0.5": right(block(slope=0.5)),
    "slope of 0.31": right(block(slope=0.31, intercept=-1000.5)),
    "intercept differs from slice to slice": right(block(intercept=(-1024.0, -1000.0, 0.0))),
    "slope differs from slice to slice": right(block(slope=(1.0, 0.5, 0.25))),
    "12 bits, unsigned": right(block(bits=12, signed=False)),
    "12 bits, signed, no sign extension": right(block(bits=12, intercept=0)),
    "an overlay in the bits above 12, unsigned": right(block(bits=12, signed=False, above=0b0101)),
    "an overlay in the bits above 12, signed": right(block(bits=12, intercept=0, above=0b1010)),
    "signed and unsigned slices": right(block(None, unsigned)),
    "signed and unsigned slices, slope 0.5": right(block(None, unsigned, slope=0.5)),
    "slope differs from slice to slice, with padding": right(
        block(None, put(PixelPaddingValue=("SS", -4000)), slope=(1.0, 0.5, 0.25), padding=-4000)
    ),
    "unsigned, intercept -32768, with padding": right(
        block(None, put(PixelPaddingValue=("US", 0)), signed=False, intercept=-32768, padding=0)
    ),
    "intercept -8192, unsigned": right(block(intercept=-8192, signed=False)),
    "metal of 20000 HU": right(block(planes(offset=20000))),
    "HighBit of 14 with 16 bits stored": refused("HighBit", block(None, put(HighBit=14))),
    "MONOCHROME1": right(block(None, put(PhotometricInterpretation="MONOCHROME1"))),
    "padding of -2000, declared signed": right(
        block(None, put(PixelPaddingValue=("SS", -2000)), padding=-2000)
    ),
    "padding of -2000, declared as unsigned 63536": right(
        block(None, put(PixelPaddingValue=("US", 63536)), padding=-2000)
    ),
    "padding of -2000, not declared": right(block(padding=-2000)),
    "padding of -2000, declared as -32768": right(
        block(None, put(PixelPaddingValue=("SS", -32768)), padding=-2000)
    ),
    "padding within a declared range": right(
        block(None, put(PixelPaddingValue=("SS", -2010), PixelPaddingRangeLimit=("SS", -1990)), padding=-1995)
    ),
    "padding of -8192 HU, not declared": right(block(intercept=-8192, signed=False, padding=0)),
    "padding stored as 0, unsigned": right(block(signed=False, padding=0)),
    "padding, intercept differs from slice to slice": right(
        block(None, put(PixelPaddingValue=("SS", -2000)), padding=-2000, intercept=(-1024.0, -1000.0))
    ),
    "no RescaleType": right(block(None, without("RescaleType"))),
    "RescaleType US of original images": right(block(None, put(RescaleType="US"))),
    "RescaleType US of derived images": refused("US", block(None, DERIVED, put(RescaleType="US"))),
    "no RescaleSlope and RescaleIntercept": refused(
        "RescaleIntercept", block(None, without("RescaleSlope", "RescaleIntercept", "RescaleType"))
    ),
    "no RescaleIntercept": refused("RescaleIntercept", block(None, without("RescaleIntercept"))),
    "no RescaleSlope in one slice": refused("RescaleSlope", block(None, only(4, without("RescaleSlope")))),
    "slope of zero": refused("RescaleSlope is 0", block(None, put(RescaleSlope="0"))),
    "negative slope": refused("RescaleSlope is -1", block(slope=-1.0, intercept=1000)),
    "a Modality LUT instead of rescale": refused("Modality LUT", block(table=True)),
    "effective atomic number": refused("Z_EFF", block(planes(offset=900), put(RescaleType="Z_EFF"))),
    "electron density": skipped(
        "not HU",
        block(
            planes(offset=1000),
            put(ImageType=["DERIVED", "PRIMARY", "AXIAL", "ELECTRON_DENSITY"]),
            counts=False,
        ),
    ),
    # transfer syntaxes
    "implicit VR": right(block(syntax=ImplicitVRLittleEndian)),
    "big endian": right(block(syntax=ExplicitVRBigEndian)),
    "big endian, 12 bits signed": right(block(syntax=ExplicitVRBigEndian, bits=12, intercept=0)),
    "deflated": right(block(syntax=DeflatedExplicitVRLittleEndian)),
    "RLE": right(block(syntax=RLELossless)),
    "RLE, unsigned": right(block(syntax=RLELossless, signed=False)),
    "JPEG 2000 lossless, signed": right(block(syntax=JPEG2000Lossless)),
    "JPEG 2000 lossless, unsigned, per-slice intercept": right(
        block(syntax=JPEG2000Lossless, signed=False, intercept=(-1024.0, -1000.0))
    ),
    "JPEG 2000 lossless, MONOCHROME1": right(
        block(None, put(PhotometricInterpretation="MONOCHROME1"), syntax=JPEG2000Lossless)
    ),
    "JPEG lossless, signed": right(block(syntax=JPEGLosslessSV1)),
    "JPEG lossless, unsigned": right(block(syntax=JPEGLosslessSV1, signed=False)),
    "JPEG lossless, slope 0.5": right(block(syntax=JPEGLosslessSV1, slope=0.5)),
    "no preamble and no file meta information": right(block(syntax=None)),
    # positions
    "the same file twice": right(spoil=again(5, "copy.dcm")),
    "the same image under another name": right(*also(block(HFS[4:5], counts=False))),
    "two different images at one position": refused("position", *also(block(later(30)[4:5], counts=False))),
    "two images with one SOPInstanceUID": refused(
        "SOPInstanceUID",
        block(None, only(3, put(SOPInstanceUID="1.2.3.4")), only(4, put(SOPInstanceUID="1.2.3.4"))),
    ),
    "one inner slice missing": refused("1 slice missing", block(less(6))),
    "two inner slices missing": refused("missing", block(less(6, 7))),
    "slices missing in two places": refused("missing", block(less(3, 8))),
    "second slice missing": refused("missing", block(less(1))),
    "first slice missing": right(block(HFS[1:])),
    "every second slice missing": right(block(HFS[::2])),
    "spacing 2.5 mm, then 5 mm": refused(
        "spacing changes", block(planes(at=[*np.arange(0, 15, 2.5), *np.arange(15, 41, 5)]))
    ),
    "uneven spacing": refused("uneven", block(planes(at=[0, 2.5, 5.3, 7.4, 10, 12.9, 15, 17.2, 20, 22.5]))),
    "positions rounded to 0.1 mm": right(block(THIN, rounded(1)), tolerance=ROUNDING + 1.2),
    "positions rounded to 0.01 mm": right(
        block(planes(step=0.6250, n=40), rounded(2)), tolerance=ROUNDING + 0.05
    ),
    "oblique, positions rounded to 0.1 mm": right(
        block(planes(40, 1.25, shape=(24, 20), **turned(0, 20, 0)), rounded(1)), tolerance=ROUNDING + 1.2
    ),
    "the table moved by 6 mm in the plane": refused(
        "in-plane", block(planes(jump=lambda k: (0, 6 * (k > 5), 0)))
    ),
    "one slice 3 mm aside": refused("in-plane", block(planes(jump=lambda k: (3 * (k == 5), 0, 0)))),
    "second half rotated by 180 degrees": right(
        block(HFS[:6]), block(planes(row=(-1, 0, 0), column=(0, -1, 0))[6:])
    ),
    "two PixelSpacing values": right(block(HFS[:6]), block(planes(spacing=(0.8, 0.65))[6:])),
    "two kernels": right(*also(block(later(25), put(ConvolutionKernel="BONE")))),
    "two phases by AcquisitionNumber": right(block(None, phase(1)), block(later(), phase(2))),
    "two phases by AcquisitionTime": right(*also(block(later(), put(AcquisitionTime="101530")))),
    "two phases by TemporalPositionIdentifier": right(
        block(None, put(TemporalPositionIdentifier=1)), block(later(), put(TemporalPositionIdentifier=2))
    ),
    "two phases, one without an inner slice": refused(
        "position", block(None, phase(1)), block(less(5, offset=100), phase(2))
    ),
    "two acquisitions that overlap": right(
        block(LONG[:12], phase(1)), block([replace(p, offset=50) for p in LONG[9:]], phase(2))
    ),
    "two frames of reference": right(block(HFS[:6]), block(later()[6:], put(FrameOfReferenceUID="1.2.3"))),
    "four images at one position": refused(
        "position", *(block(later(20 * k)[:1], phase(k)) for k in (1, 2, 3, 4))
    ),
    "AcquisitionNumber differs from slice to slice": right(
        block(None, put(AcquisitionNumber=lambda k: k // 3))
    ),
    "two patients under one SeriesInstanceUID, one above the other": right(
        block(HFS[:6], put(PatientID="A")), block(later()[6:], put(PatientID="B"))
    ),
    "two patients under one SeriesInstanceUID, their slices between each other": right(
        block(HFS[::2], put(PatientID="A")), block(later()[1::2], put(PatientID="B"))
    ),
    "two tube voltages": right(*also(block(later(40), put(KVP="80")))),
    "two slices": refused("2 slices", block(HFS[:2])),
    "one slice": refused("1 slice", block(HFS[:1])),
    "one slice of another size": refused(
        "missing", block(less(5)), block(planes(shape=(32, 64))[5:6], counts=False)
    ),
    # order and tags that a reader must not trust
    "InstanceNumber reversed": right(block(None, put(InstanceNumber=lambda k: 12 - k))),
    "no InstanceNumber": right(block(None, without("InstanceNumber"))),
    "wrong SliceLocation": right(block(None, put(SliceLocation=lambda k: str(-3 * k)))),
    "wrong SpacingBetweenSlices": right(block(None, put(SpacingBetweenSlices="-5"))),
    "SliceThickness of 0": right(block(None, put(SliceThickness="0"))),
    "no SliceThickness": right(block(None, without("SliceThickness"))),
    "empty patient fields": right(
        block(None, put(PatientName="", PatientID="", PatientSex="", StudyDate=""))
    ),
    "no SeriesInstanceUID": right(block(None, without("SeriesInstanceUID"))),
    "no FrameOfReferenceUID": right(block(None, without("FrameOfReferenceUID"))),
    "no ConvolutionKernel and KVP": right(block(None, without("ConvolutionKernel", "KVP"))),
    "values filled up with NUL": right(spoil=with_nul),
    "no ImagePositionPatient": refused("ImagePositionPatient", block(None, without("ImagePositionPatient"))),
    "no ImagePositionPatient in the last slice": right(
        block(HFS[:10]), block(HFS[11:], without("ImagePositionPatient"), counts=False)
    ),
    "no ImagePositionPatient in an inner slice": refused(
        "missing", block(None, only(5, without("ImagePositionPatient")))
    ),
    "positions with a decimal comma": refused("ImagePositionPatient", spoil=with_commas),
    "directions that differ in the sixth digit": right(
        block(None, put(ImageOrientationPatient=lambda k: short([1, 2e-6 * k, 0, 0, 1, 0])))
    ),
    "directions of zeros": refused("", block(None, put(ImageOrientationPatient=[0, 0, 0, 0, 0, 0]))),
    "PixelSpacing of zero": refused("PixelSpacing", block(None, put(PixelSpacing=[0, 0.75]))),
    "no ImageType": right(block(None, without("ImageType"))),
    "no PixelSpacing": refused("PixelSpacing", block(None, without("PixelSpacing"))),
    "directions that are not square": refused(
        "", block(None, put(ImageOrientationPatient=[1, 0, 0, 0.1, 0.995, 0]))
    ),
    # pixels that are not all there
    "pixel data of one slice cut short": refused("cut short", block(None, only(6, shorter))),
    "the last file cut short": refused("cut short", spoil=cut),
    "pixel data longer than the image": right(block(None, longer)),
    "no PixelData": refused("PixelData", block(None, without("PixelData"))),
    # things beside the volume
    "a localizer in the series": right(
        *also(block(LOCALIZER, put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), counts=False))
    ),
    "a localizer that does not say so": right(*also(block(LOCALIZER, counts=False))),
    "a colour dose screen beside the volume": right(
        *also(
            block(
                HFS[:1],
                put(
                    SOPClassUID=SecondaryCaptureImageStorage,
                    SamplesPerPixel=3,
                    PhotometricInterpretation="RGB",
                    PlanarConfiguration=0,
                    BitsAllocated=8,
                    BitsStored=8,
                    HighBit=7,
                    PixelRepresentation=0,
                    PixelData=bytes(48 * 64 * 3),
                ),
                series="22",
                counts=False,
            )
        )
    ),
    "two series in one folder": right(*also(block(planes(step=1.25, offset=15), series="22"))),
    "maximum intensity projection": skipped(
        "projection",
        block(planes(offset=20), put(ImageType=["DERIVED", "SECONDARY", "AXIAL", "MIP"]), counts=False),
    ),
    **{
        f"a projection by another name, {kind}": skipped(
            "projection",
            block(
                planes(offset=20), put(ImageType=["DERIVED", "SECONDARY", *kind.split(", ")]), counts=False
            ),
        )
        for kind in ("OTHER, CSA MIP", "MIP THIN", "REFORMATTED, MIN IP")
    },
    "derived reformat": right(
        block(planes(**CORONAL), put(ImageType=["DERIVED", "SECONDARY", "REFORMATTED"]))
    ),
    "secondary capture with CT tags": skipped("", block(None, put(SOPClassUID=SecondaryCaptureImageStorage))),
    "colour images": skipped(
        "RGB",
        block(
            None,
            put(
                SamplesPerPixel=3,
                PhotometricInterpretation="RGB",
                PlanarConfiguration=0,
                BitsAllocated=8,
                BitsStored=8,
                HighBit=7,
                PixelRepresentation=0,
                PixelData=bytes(48 * 64 * 3),
            ),
            counts=False,
        ),
    ),
    # multi-frame
    "enhanced": right(block(frames=True)),
    "enhanced, frames shuffled": right(block(SHUFFLED, frames=True)),
    "enhanced, feet first": right(block(planes(**FEET), frames=True)),
    "enhanced, coronal": right(block(planes(**CORONAL), frames=True)),
    "enhanced, nothing shared": right(block(SHUFFLED, frames=True, shared=())),
    "enhanced, rescale differs from frame to frame": right(
        block(frames=True, intercept=(-1024.0, -1000.0), slope=(1.0, 0.5))
    ),
    "enhanced, a wrong RescaleIntercept at the top": right(
        block(None, put(RescaleIntercept="500", RescaleSlope="2"), frames=True)
    ),
    "enhanced, gantry tilt": tilted(block(planes(tilt=11), frames=True)),
    "enhanced, a frame missing": refused("missing", block(less(4), frames=True)),
    "enhanced, two phases": right(
        block([*HFS, *later()], frames=True, phases=2),
    ),
    "enhanced, two directions": right(
        block([*HFS, *planes(offset=10, **CORONAL)], frames=True, shared=("PixelMeasuresSequence",))
    ),
    "enhanced, RLE": right(block(frames=True, syntax=RLELossless)),
    "enhanced, JPEG lossless": right(block(frames=True, syntax=JPEGLosslessSV1)),
    "enhanced, JPEG 2000 lossless": right(block(frames=True, syntax=JPEG2000Lossless)),
    "enhanced, big endian": right(block(frames=True, syntax=ExplicitVRBigEndian)),
    "enhanced, deflated": right(block(frames=True, syntax=DeflatedExplicitVRLittleEndian)),
    "enhanced, cut short": refused("cut short", block(None, shorter, frames=True)),
    "enhanced, perfusion map": skipped(
        "not HU",
        block(
            planes(offset=60),
            frames=True,
            kind=("DERIVED", "PRIMARY", "PERFUSION", "RCBF"),
            rescale_type="US",
            counts=False,
        ),
    ),
    "enhanced, fewer items than frames": refused("frames", block(None, put(NumberOfFrames=13), frames=True)),
    "legacy converted enhanced": right(block(SHUFFLED, frames=True, legacy=True)),
    "legacy converted enhanced, RescaleType US": right(block(frames=True, legacy=True, rescale_type="US")),
    "classic CT with several frames": refused("frames", block(None, put(NumberOfFrames=2))),
}
