"""What a volume keeps on its way to a file and back, with nibabel and SimpleITK as judges."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from ctsr.core.volume import Volume
from ctsr.errors import InputError, UsageError
from ctsr.io import nifti as module
from ctsr.io.nifti import read_volume, write_slabs, write_volume
from tests.io.make import FIELDS, SHAPE, SPACING, affine_of, change, ct, nifti, put
from tests.strategies import volumes

DTYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "float32")


def _mirrored(volume: Volume, is_mirrored: bool) -> Volume:
    return Volume(volume.data, volume.affine @ np.diag([-1.0, 1, 1, 1])) if is_mirrored else volume


either_hand = st.builds(_mirrored, volumes(), st.booleans())  # a mirrored one needs qfac = −1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nifti")


def lenient(path: Path) -> Volume:
    return read_volume(path, allow_labels=True, allow_not_hu=True)


@given(
    volume=either_hand, dtype=st.sampled_from(DTYPES), suffix=st.sampled_from([".nii", ".nii.gz", ".NII.GZ"])
)
def test_reading_what_was_written_gives_it_back(folder, volume, dtype, suffix):
    data = (volume.data + 1024 * dtype.startswith("u")).astype(dtype)
    written = Volume(data, volume.affine, slice_axis=int(np.argmax(volume.spacing)), form_code=2)
    path = folder / f"x{suffix}"
    write_volume(written, path, overwrite=True)
    read = lenient(path)
    assert read.data.dtype == read.stored_dtype == data.dtype
    np.testing.assert_array_equal(read.data, data)
    np.testing.assert_allclose(
        read.affine, volume.affine, rtol=3e-7, atol=1e-12
    )  # the sform is float32: 2 ulp
    assert (read.slice_axis, read.form_code) == (written.slice_axis, 2)


@given(volume=either_hand, dtype=st.sampled_from(DTYPES))
def test_nibabel_and_simpleitk_read_what_was_written(folder, volume, dtype):
    path = folder / "judged.nii.gz"
    data = volume.data.astype(dtype)
    write_volume(Volume(data, volume.affine), path, overwrite=True)
    image = nib.load(path)
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), data)
    assert image.get_data_dtype() == data.dtype
    assert image.header.get_xyzt_units()[0] == "mm"
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    np.testing.assert_allclose(image.affine, volume.affine, rtol=3e-7, atol=1e-12)
    # float32 leaves the rotation of a quaternion uncertain by up to 2·√(2·10⁻⁷) near a half turn
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3 * volume.spacing.max())
    theirs = sitk.ReadImage(str(path))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0), data)
    last = np.array(data.shape) - 1
    for index in ([0, 0, 0], last.tolist()):
        ours = (volume.affine @ [*index, 1])[:3] * [-1, -1, 1]
        np.testing.assert_allclose(
            theirs.TransformIndexToPhysicalPoint(index), ours, atol=2e-2
        )  # mm; ITK's float32


def test_a_plain_axial_volume_has_the_same_qform_to_a_micron(folder):
    path = folder / "axial.nii"
    write_volume(Volume(ct(), affine_of()), path, overwrite=True)
    image = nib.load(path)
    np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)


def test_a_tilted_volume_has_no_qform(folder):
    affine = affine_of()
    affine[1, 2] = 0.27 * affine[2, 2]  # 15° of gantry tilt
    write_volume(Volume(ct(), affine), folder / "tilted.nii", overwrite=True)
    image = nib.load(folder / "tilted.nii")
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 0)
    np.testing.assert_allclose(image.affine, affine, rtol=1e-6)


def test_a_slightly_sheared_volume_keeps_its_sform_and_opens_in_simpleitk(folder):
    affine = affine_of()
    affine[1, 2] = 0.005 * SPACING[2]  # 0.3 degrees
    path = folder / "sheared.nii"
    write_volume(Volume(ct(), affine), path, overwrite=True)
    notes: list[str] = []
    np.testing.assert_allclose(read_volume(path, notes=notes).affine, affine, rtol=3e-7)
    assert any("sheared by 0.286°" in n for n in notes)
    sitk.ReadImage(str(path))


def test_pieces_of_any_size_give_the_same_bytes(folder):
    rng = np.random.default_rng(0)
    data = rng.integers(-1024, 3071, (300, 200, 33)).astype(np.int16)  # 4 MB: more than one compressed block
    volume = Volume(data, affine_of())
    for suffix in (".nii", ".nii.gz"):
        whole = write_volume(volume, folder / f"whole{suffix}", overwrite=True)
        for step in (1, 5, 33):
            with write_slabs(
                folder / f"p{suffix}", data.shape, data.dtype, volume.affine, overwrite=True
            ) as writer:
                for k in range(0, 33, step):
                    writer.write(data[:, :, k : k + step])
            assert writer.sha256 == whole
            assert writer.size == (folder / f"p{suffix}").stat().st_size


def test_the_gzip_header_holds_no_time_and_no_name(folder):
    path = folder / "anonymous.nii.gz"
    write_volume(Volume(ct(), affine_of()), path, overwrite=True)
    head = path.read_bytes()[:10]
    assert head[:4] == b"\x1f\x8b\x08\x00"
    assert head[4:8] == bytes(4)


def test_zlib_writes_and_reads_where_isal_is_missing(folder, monkeypatch):
    monkeypatch.setattr(module, "igzip_threaded", None)
    monkeypatch.setattr(module, "_GzipReader", gzip.GzipFile)
    path = folder / "zlib.nii.gz"
    volume = Volume(ct((40, 30, 20)), affine_of())
    assert write_volume(volume, path, overwrite=True) == write_volume(
        volume, folder / "zlib2.nii.gz", overwrite=True
    )
    np.testing.assert_array_equal(read_volume(path).data, volume.data)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="gzip stream"):
        read_volume(path)


@pytest.mark.parametrize("wrong", ["short", "long", "dtype", "nan"])
def test_a_piece_that_does_not_fit_leaves_no_file(tmp_path, wrong):
    data = ct().astype(np.float32)
    piece = {"short": data[..., :3], "long": np.tile(data, 2), "dtype": ct(), "nan": data * np.nan}[wrong]
    with (
        pytest.raises(ValueError, match=r"left|never written|int16|finite"),
        write_slabs(tmp_path / "x.nii.gz", data.shape, data.dtype, affine_of()) as writer,
    ):
        writer.write(piece)
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_the_inputs_header_reaches_the_output(tmp_path):
    image = nib.Nifti1Image(ct(), affine_of())
    image.header["descrip"] = b"DOE^JOHN"
    image.header["aux_file"] = b"DOE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JOHN born 1970"))
    image.header.set_xyzt_units("mm")
    image.set_qform(affine_of(), 1)
    image.set_sform(affine_of(), 1)
    nib.save(image, tmp_path / "in.nii")
    notes: list[str] = []
    volume = read_volume(tmp_path / "in.nii", notes=notes)
    np.testing.assert_array_equal(volume.data, ct())
    assert any("extension" in n for n in notes)
    assert "DOE" not in " ".join(notes)
    write_volume(volume, tmp_path / "out.nii")
    assert b"DOE" not in (tmp_path / "out.nii").read_bytes()


# Types and scaling


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["i2", "u2", "u1", "i4", "f4", "f8", "i8"])
@pytest.mark.parametrize("scaling", [(1, 0), (0, 0), (1, -1024), (0.5, 0), (-1, 0), (2, -1000)])
def test_every_stored_type_gives_the_hu_that_float64_gives(tmp_path, order, kind, scaling):
    slope, inter = scaling
    stored = ct().astype(np.int32) + 1100
    stored = (stored // 10 if kind == "u1" else stored).astype(kind)
    raw = nifti(stored, slope=slope, inter=inter)
    if order == ">":
        header = np.frombuffer(raw[:348], FIELDS).astype(FIELDS.newbyteorder(">"))
        raw = header.tobytes() + bytes(4) + stored.astype(f">{kind}").tobytes(order="F")
    path = put(tmp_path, raw)
    truth = stored.astype(np.float64) * (slope or 1) + inter
    volume = lenient(path)
    assert volume.data.dtype.isnative
    assert volume.stored_dtype.isnative
    np.testing.assert_allclose(volume.data, truth, rtol=0, atol=0 if kind[0] in "iu" else 0.01)
    whole = kind[0] in "iu" and float(slope).is_integer()
    if (slope or 1, inter) != (1, 0):
        assert volume.data.dtype == (np.int16 if whole else np.float32)
    elif kind not in ("f8", "i8"):
        assert volume.data.dtype == stored.dtype
    np.testing.assert_array_equal(
        np.asanyarray(nib.load(path).dataobj), truth
    )  # the judge agrees on the truth


def test_scaled_values_that_int16_does_not_hold_become_float32(tmp_path):
    stored = ct().astype(np.int32) * 10
    stored[0, 0, 0] = 30000
    volume = lenient(put(tmp_path, nifti(stored, slope=2, inter=-1000)))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, stored * 2.0 - 1000)


def test_an_int16_file_is_viewed_and_not_mapped(tmp_path):
    path = put(tmp_path, nifti())
    volume = read_volume(path)
    base = volume.data
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert base.dtype == np.uint8  # the bytes as they were read
    assert not isinstance(base, np.memmap)
    assert volume.data.flags.f_contiguous
    assert volume.data.flags.writeable
    path.write_bytes(b"")
    np.testing.assert_array_equal(volume.data, ct())


def test_padding_stays_as_it_is_stored(tmp_path):
    data = ct()
    data[0] = -3024
    np.testing.assert_array_equal(read_volume(put(tmp_path, nifti(data))).data, data)


def test_hu_offset_is_added_to_every_voxel(tmp_path):
    path = put(tmp_path, nifti((ct() + 1024).astype(np.uint16)))
    volume = read_volume(path, hu_offset=-1024)
    assert volume.data.dtype == np.int16
    np.testing.assert_array_equal(volume.data, ct())
    assert volume.stored_dtype == np.uint16
    with pytest.raises(UsageError, match="--hu-offset: nan"):
        read_volume(path, hu_offset=float("nan"))


# Units, dimensions, forms, names


@pytest.mark.parametrize(
    ("code", "scale", "word"), [(0, 1, "unknown"), (1, 1e-3, "metres"), (3, 1e3, "microns"), (10, 1, "")]
)
def test_lengths_come_out_in_mm(tmp_path, code, scale, word):
    affine = affine_of()
    affine[:3] *= scale
    notes: list[str] = []
    volume = read_volume(put(tmp_path, nifti(affine=affine, xyzt_units=code)), notes=notes)
    np.testing.assert_allclose(volume.affine, affine_of(), rtol=1e-6)
    assert ("unit of length" in " ".join(notes)) == bool(word)
    assert word in " ".join(notes)


@pytest.mark.parametrize(
    "dim",
    [(3, *SHAPE, 1, 1, 1, 1), (4, *SHAPE, 1, 1, 1, 1), (5, *SHAPE, 1, 1, 1, 1), (3, *SHAPE, 0, 0, 0, 0)],
)
def test_trailing_axes_of_one_are_dropped(tmp_path, dim):
    assert read_volume(put(tmp_path, nifti(dim=dim))).shape == SHAPE


@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 8, 9), (9, 8, 1), (9, 8, 2), (1, 1, 1), (9, 1, 1)])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_thin_shapes_are_read_and_written(tmp_path, shape, suffix):
    data = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) * 37 - 1000
    path = tmp_path / f"x{suffix}"
    write_volume(Volume(data, affine_of()), path)
    np.testing.assert_array_equal(read_volume(path).data, data)
    assert nib.load(path).shape == shape


def test_more_than_32767_slices_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="32768 voxels along an axis, NIfTI-1 holds 32767"):
        write_volume(Volume(np.zeros((1, 1, 32768), np.int16), affine_of()), tmp_path / "x.nii")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.uint64])
def test_types_that_others_do_not_read_are_not_written(tmp_path, dtype):
    with pytest.raises(UsageError, match="can't be stored"):
        write_volume(Volume(np.zeros(SHAPE, dtype), affine_of()), tmp_path / "x.nii")
    assert list(tmp_path.iterdir()) == []


def test_nifti_2_is_read(tmp_path):
    image = nib.Nifti2Image(ct(), affine_of())
    image.header.set_xyzt_units("mm")
    for name in ("x.nii", "x.nii.gz"):
        nib.save(image, tmp_path / name)
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.data, ct())
        np.testing.assert_allclose(volume.affine, affine_of(), rtol=1e-12)


def test_the_slice_axis_comes_from_dim_info(tmp_path):
    assert read_volume(put(tmp_path, nifti(dim_info=2 << 4))).slice_axis == 1
    assert read_volume(put(tmp_path, nifti(dim_info=0))).slice_axis is None


def test_the_user_decides_between_two_forms(tmp_path):
    moved = affine_of()
    moved[2, 3] += 50
    path = put(tmp_path, nifti(sform_code=2, **{f"srow_{a}": moved[i] for i, a in enumerate("xyz")}))
    with pytest.raises(InputError, match=r"sform and qform lie 50 mm apart.*--form"):
        read_volume(path)
    np.testing.assert_allclose(read_volume(path, form="sform").affine, moved, rtol=1e-6)
    assert read_volume(path, form="sform").form_code == 2
    np.testing.assert_allclose(read_volume(path, form="qform").affine, affine_of(), rtol=1e-6, atol=1e-6)
    assert read_volume(path, form="qform").form_code == 1
    with pytest.raises(UsageError, match="--form"):
        read_volume(path, form="nearest")


@given(volume=either_hand)
def test_a_qform_alone_gives_the_affine_that_nibabel_gives(folder, volume):
    image = nib.Nifti1Image(volume.data, None)
    image.set_qform(volume.affine, 1)
    image.set_sform(None, 0)
    nib.save(image, folder / "q.nii")
    # nibabel takes a for 0 below 3 ulp of float32, where the sum's rounding alone allows up to 6·10⁻⁴ radians
    np.testing.assert_allclose(
        lenient(folder / "q.nii").affine,
        nib.load(folder / "q.nii").affine,
        rtol=1e-5,
        atol=2e-3 * volume.spacing.max(),
    )


@pytest.mark.parametrize("angle", [0.0, 1e-4, 1e-3, 0.0275, -0.0275, 0.1, 1.0, 45.0])
def test_a_head_turned_a_little_from_the_usual_order_is_no_contradiction(tmp_path, angle):
    """Near a half turn the quaternion in float32 is off by up to a thousandth of a radian."""
    t = np.radians(angle)
    affine = np.array([[np.cos(t), -np.sin(t), 0], [np.sin(t), np.cos(t), 0], [0, 0, 1]]) @ np.diag(
        [-0.7, -0.7, 1.25]
    )
    affine = np.vstack([np.column_stack([affine, [180, 200, -500]]), [0, 0, 0, 1]])
    data = ct((512, 400, 3))
    read_volume(put(tmp_path, nifti(data, affine)))
    write_volume(Volume(data, affine), tmp_path / "own.nii")
    read_volume(tmp_path / "own.nii")


@pytest.mark.parametrize(
    ("name", "compress", "word"),
    [
        ("x.nii", True, "is compressed"),
        ("x.nii.gz", False, "is not compressed"),
        ("x", True, "is compressed"),
        ("x", False, ""),
    ],
)
def test_magic_bytes_decide_and_the_name_gets_a_note(tmp_path, name, compress, word):
    path = tmp_path / name
    path.write_bytes(gzip.compress(nifti()) if compress else nifti())
    notes: list[str] = []
    np.testing.assert_array_equal(read_volume(path, notes=notes).data, ct())
    assert word in " ".join(notes)
    assert bool(word) == bool(notes)


def test_several_gzip_members_and_zeros_after_them_are_one_stream(tmp_path):
    raw = nifti()
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(raw[:500]) + gzip.compress(raw[500:]) + bytes(512))
    np.testing.assert_array_equal(read_volume(path).data, ct())
    put(tmp_path, raw + bytes(1024))
    np.testing.assert_array_equal(read_volume(tmp_path / "x.nii").data, ct())


@pytest.mark.parametrize(
    "name", ["a b", "é日本", "[x]", "new\nline", "-o", "a" * 247, "a" * 242, os.fsdecode(b"a\xff\xfeb")]
)
def test_any_file_name_works(tmp_path, name):
    path = tmp_path / f"{name}.nii.gz"
    write_volume(Volume(ct(), affine_of()), path, record={"factor": 2})
    np.testing.assert_array_equal(read_volume(path).data, ct())
    assert os.fsencode(path.name) in os.listdir(os.fsencode(tmp_path))


@pytest.mark.parametrize(
    ("sidecar", "thickness", "note"),
    [
        ({"SliceThickness": 5, "SpacingBetweenSlices": 2.5}, 5.0, ""),
        ({"SliceThickness": 5}, 5.0, ""),
        ({"SliceThickness": 0}, None, "not a length"),
        ({"SliceThickness": "5"}, None, "not a length"),
        ({"SliceThickness": True}, None, "not a length"),
        ({"SliceThickness": 5, "SpacingBetweenSlices": 5}, None, "slices 5 mm apart"),
        ({}, None, ""),
        (None, None, ""),
    ],
)
def test_the_slice_thickness_comes_from_the_sidecar(tmp_path, sidecar, thickness, note):
    path = put(tmp_path, nifti(), "x.nii.gz")
    if sidecar is not None:
        (tmp_path / "x.json").write_text(json.dumps(sidecar))
    notes: list[str] = []
    assert read_volume(path, notes=notes).slice_thickness == thickness
    assert note in " ".join(notes)
    assert bool(note) == bool(notes)


def test_the_developers_volumes_survive_a_round_trip(reference_data, tmp_path):
    for path in sorted(reference_data.rglob("*mm_B.nii.gz")):
        volume = read_volume(path)
        write_volume(volume, tmp_path / "x.nii.gz", overwrite=True)
        again = read_volume(tmp_path / "x.nii.gz")
        np.testing.assert_array_equal(again.data, volume.data)
        np.testing.assert_array_equal(again.affine, volume.affine)


def test_a_negative_slope_and_a_foreign_intent_get_a_note(tmp_path):
    notes: list[str] = []
    read_volume(put(tmp_path, change(nifti(-ct(), slope=-1), intent_code=31234 % 2000)), notes=notes)
    assert len(notes) == 2
    assert "negative" in notes[0]
