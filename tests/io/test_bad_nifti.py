"""Files that can't be trusted are refused, each with its reason; no damage passes for a volume."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib

import nibabel as nib
import numpy as np
import pytest

from ctsr.core.volume import Volume
from ctsr.errors import CtsrError, InputError, ResourceError
from ctsr.io import nifti as module
from ctsr.io.nifti import read_volume, write_volume
from tests.io.make import SHAPE, affine_of, change, ct, form, nifti, put

RAW = nifti()
GZ = gzip.compress(RAW, 1, mtime=0)


def turned(degrees: float) -> np.ndarray:
    t = math.radians(degrees)
    turn = np.array(
        [[math.cos(t), -math.sin(t), 0, 0], [math.sin(t), math.cos(t), 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    return turn @ affine_of()


def moved(i: int, j: int, value: float) -> np.ndarray:
    affine = affine_of()
    affine[i, j] = value
    return affine


def with_extension(size: int, length: int = 32, *, flag: int = 1) -> bytes:
    body = struct.pack("<ii", size, 6) + bytes(length - 8)
    return change(RAW, vox_offset=352 + length)[:348] + bytes([flag, 0, 0, 0]) + body + RAW[352:]


def damaged_gz(where: int, value: int) -> bytes:
    spoilt = bytearray(GZ)
    spoilt[where] ^= value
    return bytes(spoilt)


def floats(*values: float) -> bytes:
    data = ct().astype(np.float32)
    data[3, 4, 5] = values[0]
    data[4, 4, 5 : 5 + len(values) - 1] = values[1:]
    return nifti(data)


NAN, INF = math.nan, math.inf
ZERO_COLUMN = affine_of() * [1, 0, 1, 1]
SINGULAR = affine_of()
SINGULAR[:3, 1] = 0.8, 0, 0  # two axes run left to right
NOT_CT = {128: "RGB, ", 32: "complex, ", 2304: "RGBA, ", 1: "1, ", 1536: "1536, ", 0: "0, ", 9999: "9999, "}

# name of the file, its bytes, words that the message must hold
BAD: list[tuple[str, bytes, str]] = [
    # not NIfTI
    ("x.nii", b"", "is empty"),
    ("x.nii.gz", b"", "is empty"),
    ("x.nii", b"<html><body>Not found", 'not a NIfTI file (starts with "<html><b'),
    ("x.nii.gz", b'{"error": 404}', r"not a NIfTI file (starts with \"{\x22error"),
    ("x.nii", b"\x1b[31m" * 90, r"starts with \"\x1b[31m"),
    ("x.nii", bytes(128) + b"DICM" + bytes(900), "DICOM file, not NIfTI"),
    ("x.nii", b"NRRD0004\n" * 60, "an NRRD file"),
    ("x.nii", b"ObjectType = Image\n" * 30, "a MetaImage"),
    ("x.nii.gz", b"BZh91AY" * 90, "bzip2"),
    ("x.nii.gz", b"PK\x03\x04" * 90, "zip archive"),
    ("x.nii.gz", b"version https://git-lfs.github.com/spec/v1\n" * 9, "Git LFS pointer"),
    ("x.nii.gz", gzip.compress(gzip.compress(RAW)), "gzip inside gzip"),
    ("x.nrrd", b"NRRD0004", "an NRRD file"),
    ("x.mha", b"ObjectType", "a MetaImage"),
    ("x.img.gz", bytes(400), "not a NIfTI file"),
    # cut or damaged
    ("x.nii", RAW[:200], "truncated: 200 of 352 header bytes"),
    ("x.nii", RAW[:348], "truncated: 348 of 352 header bytes"),
    ("x.nii.gz", gzip.compress(RAW[:348]), "truncated: 348 of 352 header bytes"),
    ("x.nii", RAW[:-1], "truncated: 1,008 bytes of voxels expected, room for 1,007"),
    ("x.nii", RAW[: len(RAW) // 2], "truncated: 1,008 bytes of voxels expected"),
    ("x.nii", RAW[:352], "1,008 bytes of voxels expected, room for 0"),
    ("x.nii.gz", gzip.compress(RAW[:-1]), "truncated: 1,008 bytes of voxels expected, 1,007 found"),
    ("x.nii.gz", GZ[: len(GZ) // 2], "truncated gzip stream"),
    ("x.nii.gz", GZ[: len(GZ) * 9 // 10], "truncated gzip stream"),
    ("x.nii.gz", GZ[:5], "truncated gzip stream"),
    ("x.nii.gz", GZ[:-4], "gzip stream"),
    ("x.nii.gz", GZ[:-8], "gzip stream"),
    ("x.nii.gz", damaged_gz(-8, 1), "damaged gzip stream: "),
    ("x.nii.gz", damaged_gz(-4, 1), "damaged gzip stream: "),
    ("x.nii.gz", damaged_gz(2, 1), "gzip"),
    ("x.nii.gz", GZ + b"garbage after the end", "gzip stream"),
    ("x.nii.gz", GZ + b"gar", "gzip stream"),
    ("x.nii.gz", GZ + bytes(9) + b"garbage after zeros", "gzip stream"),
    # sizes
    ("x.nii", change(RAW, dim_3=8), "truncated: 1,152 bytes of voxels expected, room for 1,008"),
    ("x.nii.gz", gzip.compress(change(RAW, dim_3=8)), "truncated: 1,152 bytes of voxels expected"),
    ("x.nii", change(RAW, dim_3=6), "144 bytes after the voxels (dim wrong?)"),
    ("x.nii.gz", gzip.compress(change(RAW, dim_3=6)), "144 bytes after the voxels (dim wrong?)"),
    ("x.nii", RAW + bytes(1025), "1,025 bytes after the voxels"),
    ("x.nii", change(RAW, dim=(3, 32767, 32767, 32767, 1, 1, 1, 1)), "truncated: 70,362,301,923,326 bytes"),
    ("x.nii.gz", gzip.compress(change(RAW, dim_1=32767, dim_2=32767)), "bytes of voxels expected, room for"),
    ("x.nii", change(RAW, dim_3=0), "dim[3] = 0"),
    ("x.nii", change(RAW, dim_3=-10), "dim[3] = -10"),
    *(("x.nii", change(RAW, dim_0=n), f"dim[0] = {n}") for n in (0, 8, -3, 100)),
    *(("x.nii", change(RAW, dim_0=n), f"{n}D image") for n in (1, 2)),
    ("x.nii", change(RAW, dim=(4, 9, 8, 1, 7, 1, 1, 1)), "4D series of 7 volumes, one expected"),
    ("x.nii", change(RAW, dim=(4, 9, 8, 7, 0, 1, 1, 1)), "dim[4] = 0"),
    ("x.nii", change(RAW, dim=(5, 9, 8, 1, 1, 7, 1, 1)), "5D image"),
    # types and scaling
    *(("x.nii", change(RAW, datatype=code), words) for code, words in NOT_CT.items()),
    ("x.nii", change(RAW, bitpix=8), "bitpix = 8 does not fit datatype = 4"),
    ("x.nii", change(RAW, scl_slope=0, scl_inter=-1024), "scl_slope = 0 with scl_inter = -1024"),
    *(("x.nii", change(RAW, scl_slope=s), "scl_slope = ") for s in (NAN, INF, 1e-30, 1e4, -1e4)),
    *(("x.nii", change(RAW, scl_inter=i), "scl_inter = ") for i in (NAN, INF)),
    # offsets and extensions
    *(("x.nii", change(RAW, vox_offset=v), "vox_offset") for v in (0, 348, -352, 352.5, 353, 400)),
    *(("x.nii", change(RAW, vox_offset=v), "vox_offset") for v in (1e9, NAN, INF)),
    *(("x.nii", with_extension(size), f"extension of {size} bytes") for size in (0, -16, 17, 8, 48, 1 << 30)),
    ("x.nii", with_extension(16), "extension of 0 bytes"),
    ("x.nii", with_extension(32, flag=0), "the header says no extensions"),
    ("x.nii", RAW[:348] + b"\1\0\0\0" + RAW[352:], "vox_offset leaves 0 bytes"),
    # kind of header
    ("x.nii", change(RAW, magic=b"ni1"), "one half of a .hdr/.img pair"),
    ("x.nii", change(RAW, magic=b"xyz"), "magic is 'xyz'"),
    ("x.nii", change(RAW, magic=b""), "Analyze 7.5"),
    *(("x.nii", change(RAW, sizeof_hdr=n), "sizeof_hdr is neither") for n in (347, 0)),
    # geometry
    *(("x.nii", change(RAW, pixdim_3=v), f"pixdim[3] = {v:g}") for v in (0, -2.5, NAN, INF)),
    ("x.nii", nifti(affine=affine_of((1e-6, 1e-6, 1e-6))), "voxels of 1e-06 × 1e-06 × 1e-06 mm"),
    ("x.nii", nifti(affine=affine_of((0.7, 0.7, 1e9))), "is the unit right?"),
    ("x.nii", nifti(affine=affine_of((11, 0.7, 11))), "voxels of 11 × 0.7 × 11 mm"),
    ("x.nii", nifti(xyzt_units=1), "voxels of 700 × 800 × 2500 mm"),
    ("x.nii", nifti(xyzt_units=7), "xyzt_units = 7"),
    ("x.nii", change(RAW, **form(affine_of((0.7, 0.8, 5.0)))), "axis 2: pixdim says 2.5 mm, sform 5 mm"),
    ("x.nii", change(RAW, **form(affine_of((0.7, 0.8, 2.505)))), "pixdim says 2.5 mm, sform 2.505 mm"),
    ("x.nii", change(RAW, **form(turned(30))), "sform and qform lie"),
    ("x.nii", change(RAW, **form(affine_of() * [-1, 1, 1, 1])), "sform and qform lie"),
    ("x.nii", change(RAW, **form(moved(2, 3, -250))), "lie 50 mm apart, 0.1 mm allowed: sform [-0.7 0 0 "),
    ("x.nii", change(RAW, **form(moved(2, 3, -299.8))), "sform and qform lie 0.2 mm apart"),
    ("x.nii", change(RAW, sform_code=4, **form(moved(2, 3, -250))), "--form sform or --form qform"),
    ("x.nii", nifti(affine=moved(1, 2, math.sin(math.radians(10)) * 2.5)), "sheared by 9.9° (gantry tilt)"),
    ("x.nii", change(RAW, qform_code=0, **form(moved(1, 2, 0.05))), "sheared by 1.1°"),
    ("x.nii", change(RAW, **form(ZERO_COLUMN)), "zero column (axis 1)"),
    ("x.nii", change(RAW, **form(np.zeros((4, 4)))), "zero column"),
    ("x.nii", change(RAW, **form(SINGULAR)), "singular"),
    ("x.nii", change(RAW, **form(moved(0, 3, NAN))), "the affine is not finite"),
    ("x.nii", change(RAW, **form(moved(0, 3, INF))), "the affine is not finite"),
    ("x.nii", nifti(affine=moved(0, 3, 1e30)), "the origin lies 1e+30 mm away"),
    ("x.nii", change(RAW, sform_code=0, qform_code=0), "no orientation: sform and qform codes are 0 (c"),
    *(("x.nii", change(RAW, sform_code=c), f"sform_code = {c}") for c in (9, -1)),
    ("x.nii", change(RAW, qform_code=9), "qform_code = 9"),
    *(("x.nii", change(RAW, sform_code=s, quatern_b=1.1, quatern_c=1.1), "b² + c² + d² = ") for s in (0, 1)),
    ("x.nii", change(RAW, sform_code=0, quatern_b=NAN), "quaternion is [nan"),
    ("x.nii", change(RAW, sform_code=0, pixdim_0=7), "qfac) = 7"),
    ("x.nii", change(RAW, sform_code=0, qoffset_x=NAN), "qoffset"),
    # values
    ("x.nii", floats(NAN), "1 voxel is not finite (first at 3,4,5)"),
    ("x.nii", floats(INF, -INF, NAN), "3 voxels are not finite (first at 3,4,5)"),
    ("x.nii", nifti(np.full(SHAPE, NAN, np.float32)), "504 voxels are not finite (first at 0,0,0)"),
    ("x.nii", floats(3e38), "HU lie within ±100000"),
    ("x.nii", floats(-1.1e5), "HU lie within ±100000"),
    ("x.nii", change(RAW, scl_slope=900), "HU lie within ±100000"),
    ("x.nii", change(RAW, intent_code=1002), "label map"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "raw", "words"), BAD, ids=[f"{i}-{words[:30]}" for i, (_, _, words) in enumerate(BAD)]
)
def test_a_file_that_can_not_be_trusted_is_refused_with_its_reason(tmp_path, name, raw, words):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(InputError) as refused:
        read_volume(path)
    assert words.replace('\\"', '"') in str(refused.value)
    assert refused.value.exit_code == 3
    assert refused.value.path == str(path)
    assert refused.value.reason[:1] == refused.value.reason[:1].lower() or refused.value.reason.startswith(
        ("HU", "4D", "5D")
    )
    assert str(refused.value).isprintable()
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("excess", [4.8e-7, 9e-6])
def test_a_quaternion_that_is_off_by_rounding_is_normalised(tmp_path, excess):
    raw = change(RAW, sform_code=0, quatern_b=0, quatern_c=0, quatern_d=math.sqrt(1 + excess))
    np.testing.assert_allclose(read_volume(put(tmp_path, raw)).affine, affine_of(), rtol=1e-6, atol=1e-6)


def test_qfac_0_means_1(tmp_path):
    affine = affine_of((0.7, 0.7, 2.5))
    raw = change(nifti(affine=affine), sform_code=0, pixdim_0=0)
    np.testing.assert_allclose(read_volume(put(tmp_path, raw)).affine, affine, rtol=1e-6, atol=1e-6)


def test_forms_that_agree_but_for_a_little_shear_are_read(tmp_path):
    """A qform holds no shear: the two are compared without it."""
    sheared = moved(1, 2, 0.0099 * 2.5)
    raw = nifti(ct((9, 8, 300)), sheared)  # at the far end 3.7 mm of shear each way
    np.testing.assert_allclose(read_volume(put(tmp_path, raw)).affine, sheared, rtol=1e-6)


def test_a_small_file_that_unpacks_to_gigabytes_is_dropped_after_a_megabyte(tmp_path, monkeypatch):
    packer = zlib.compressobj(9, wbits=31)
    packed = (
        packer.compress(RAW) + b"".join(packer.compress(bytes(1 << 24)) for _ in range(4)) + packer.flush()
    )
    (tmp_path / "bomb.nii.gz").write_bytes(packed)
    assert len(packed) < 1 << 20
    seen: list[int] = []

    class Counting(gzip.GzipFile):
        def read(self, size: int = -1) -> bytes:
            seen.append(len(got := super().read(size)))
            return got

    monkeypatch.setattr(module, "_GzipReader", Counting)
    with pytest.raises(InputError, match="more than 1,048,576 bytes after the voxels"):
        read_volume(tmp_path / "bomb.nii.gz")
    assert sum(seen) <= len(RAW) + (1 << 20) + 1


def test_a_claim_beyond_deflate_is_refused_before_memory_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module.np, "empty", lambda *_: pytest.fail("allocated"))
    raw = change(RAW, dim=(3, 2000, 2000, 2000, 1, 1, 1, 1))
    with pytest.raises(InputError, match=r"truncated: 16,000,000,000 bytes of voxels expected, room for"):
        read_volume(put(tmp_path, raw, "x.nii.gz"))


def test_a_volume_larger_than_the_memory_is_a_matter_of_resources(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 1000)
    with pytest.raises(ResourceError, match=r"the voxels need 0.00 GB of memory") as refused:
        read_volume(put(tmp_path, RAW))
    assert refused.value.exit_code == 4


# Values that are not HU


def body_with_offset(offset: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (
        (ct((60, 50, 12), seed) + rng.integers(-3, 3, (60, 50, 12)) + offset).clip(0, 4095).astype(np.int16)
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (body_with_offset(1024), "HU with 1024 added (likely --hu-offset -1024: air"),
        (body_with_offset(1000), "HU with 1000 added (likely --hu-offset -1000: air"),
        (body_with_offset(1024)[20:40, 20:30], "HU with 1024 added"),  # tissue alone
        ((ct() + 1024).clip(0, 1).astype(np.float32) * 0.5 + ct() / 1e4, "scaled to 1"),
        (np.random.default_rng(0).random((20, 20, 20), np.float32), "scaled to 1"),
        (np.random.default_rng(0).random((20, 20, 20), np.float32) * 2 - 1, "scaled to 1"),
        (((ct((30, 30, 30)) + 1024) / 1200 * 255).astype(np.uint8), "picture of 8 bits"),
        (np.clip((ct((30, 30, 30)) + 160.0) / 400 * 255, 0, 255).astype(np.float32), "picture of 8 bits"),
        ((ct((40, 40, 9)) > -500).astype(np.uint8), "label map (2 whole numbers from 0 to 1)"),
        ((ct((40, 40, 9)) > -500).astype(np.float32) * 7, "label map"),
        ((ct((40, 40, 9)) > -500).astype(np.int16) * 117, "label map"),
    ],
)
def test_values_that_can_not_be_hu_are_refused_with_what_mends_them(tmp_path, data, words):
    path = put(tmp_path, nifti(data))
    with pytest.raises(InputError) as refused:
        read_volume(path)
    assert words in str(refused.value)
    read_volume(path, allow_not_hu=True, allow_labels=True)


def test_a_volume_with_an_offset_is_read_once_the_offset_is_named(tmp_path):
    for offset in (1000, 1024):
        read_volume(put(tmp_path, nifti(body_with_offset(offset))), hu_offset=-offset)


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (np.full(SHAPE, 0, np.int16), "all voxels are 0 HU"),
        (np.full(SHAPE, 1000, np.int16), "all voxels are 1000 HU"),
        (np.full(SHAPE, -3024, np.int16), "padding"),
        (np.random.default_rng(0).normal(45, 12, (20, 20, 9)).clip(0).astype(np.int16), "no air"),
        (
            np.random.default_rng(0).gamma(1.5, 300, (20, 20, 9)).clip(0, 3000).astype(np.int16),
            "no air",
        ),  # bone
        (np.random.default_rng(0).normal(45, 12, (20, 20, 9)).astype(np.int16), "no air"),
        (np.where(ct((40, 40, 9)) > -500, 40, -1000).astype(np.int16), ""),  # a phantom without noise
        (ct(), ""),
    ],
)
def test_what_may_be_hu_is_read_with_at_most_a_note(tmp_path, data, note):
    notes: list[str] = []
    np.testing.assert_array_equal(read_volume(put(tmp_path, nifti(data)), notes=notes).data, data)
    assert note in " ".join(notes)
    assert bool(note) == bool(notes)


def test_label_maps_are_read_where_they_are_asked_for(tmp_path):
    labels = (ct((40, 40, 9)) > -500).astype(np.uint8)
    np.testing.assert_array_equal(read_volume(put(tmp_path, nifti(labels)), allow_labels=True).data, labels)


# What is no file


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path):
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "fifo.nii")
    (tmp_path / "dangling.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    for name, words in {
        "folder.nii": "is a folder (name a file",
        "fifo.nii": "is a FIFO",
        "dangling.nii": "does not exist",
        "loop.nii": "loop of links",
        "missing.nii": "does not exist",
        "y" * 300: "cannot be read: file name too long",
    }.items():
        with pytest.raises(InputError) as refused:
            read_volume(tmp_path / name)
        assert words in str(refused.value), name
    with pytest.raises(InputError, match="is a FIFO, a socket or a device"):
        read_volume("/dev/zero")


def test_a_disk_error_while_reading_is_an_input_error(tmp_path, monkeypatch):
    def broken(*_: object, **__: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "read_header", broken)
    with pytest.raises(InputError, match="cannot be read: input/output error"):
        read_volume(put(tmp_path, RAW))


# Damage at random


@pytest.mark.parametrize("count", [600, pytest.param(10_000, marks=pytest.mark.ci)])
def test_no_flipped_bit_passes(tmp_path, count):
    path = tmp_path / "flipped.nii.gz"
    data = ct((16, 16, 8))
    write_volume(Volume(data, affine_of()), path)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    # some bits mean nothing: the text flag, time and system of RFC 1952, code lengths that no symbol uses
    accepted = 0
    for bit in rng.choice(len(whole) * 8, min(count, len(whole) * 8), replace=False).tolist():
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(spoilt)
        try:
            volume = read_volume(path)
        except InputError:
            continue
        accepted += 1
        np.testing.assert_array_equal(volume.data, data)
    assert accepted < 60


@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.ci)])
def test_a_mutated_header_gives_a_sound_volume_or_one_of_our_errors(tmp_path, count):
    """Either our family of errors, or a volume whose invariants hold, all bytes accounted for."""
    rng = np.random.default_rng(2)
    image = nib.Nifti2Image(ct(), affine_of())
    image.header.set_xyzt_units("mm")
    version_2 = image.to_bytes()
    path = tmp_path / "mutant.nii"
    accepted = 0
    refusals: list[CtsrError] = []
    for i in range(count):
        base = version_2 if i % 4 == 0 else RAW
        raw = bytearray(base)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, 560 if base is version_2 else 360))
            kind = rng.integers(3)
            if kind == 0:
                raw[at] ^= 1 << int(rng.integers(8))
            elif kind == 1:
                raw[at : at + 4] = struct.pack("<f", rng.choice([NAN, INF, -1, 0, 1e-40, 3e38, 1e9, 0.5]))
            else:
                raw[at : at + 2] = struct.pack("<h", int(rng.choice([0, -1, 1, 32767, -32768, 255, 16])))
        path.write_bytes(raw)
        try:
            volume = read_volume(path, allow_labels=True, allow_not_hu=True)
        except CtsrError as exc:
            refusals.append(exc)
            continue
        accepted += 1
        assert volume.data.size == math.prod(SHAPE)
        assert np.isfinite(volume.data).all()
        assert np.abs(volume.data.astype(np.float64)).max() <= 1e5
        assert ((volume.spacing > 0.0099) & (volume.spacing < 50.1)).all()
        assert np.isfinite(np.linalg.inv(volume.affine)).all()
        assert volume.form_code in range(1, 6)
    assert all(e.exit_code in (3, 4) and str(e).isprintable() for e in refusals)
    assert 0 < accepted < 0.75 * count  # bytes that hold text or are unused may change freely
