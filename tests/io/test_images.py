"""Volumes go to nibabel and SimpleITK and come back the same, in the same place."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from ctsr.core.volume import Volume
from ctsr.errors import CtsrError
from ctsr.io.images import from_nibabel, from_sitk, to_nibabel, to_sitk
from ctsr.io.memory import available_bytes
from ctsr.io.nifti import read_volume, write_volume
from tests.io.make import affine_of, ct, nifti, put
from tests.strategies import volumes


@given(volume=volumes(min_slices=2), dtype=st.sampled_from(["int16", "int32", "float32"]))
def test_a_volume_comes_back_the_same(volume, dtype):
    volume = Volume(volume.data.astype(dtype), volume.affine)
    for there, back in ((to_nibabel, from_nibabel), (to_sitk, from_sitk)):
        again = back(there(volume))
        np.testing.assert_array_equal(again.data, volume.data)
        assert again.data.dtype == volume.data.dtype
        np.testing.assert_allclose(again.affine, volume.affine, rtol=1e-6, atol=1e-9)
        assert not np.shares_memory(again.data, volume.data)


def test_file_nibabel_and_simpleitk_agree(tmp_path):
    path = tmp_path / "x.nii.gz"
    write_volume(Volume(ct(), affine_of(), slice_axis=2, form_code=2), path)
    ours = read_volume(path)
    for other in (from_nibabel(nib.load(path)), from_sitk(sitk.ReadImage(str(path)))):
        np.testing.assert_array_equal(other.data, ours.data)
        np.testing.assert_allclose(other.affine, ours.affine, atol=1e-5)
    assert from_nibabel(nib.load(path)).slice_axis == 2
    assert from_nibabel(nib.load(path)).form_code == 2
    assert from_nibabel(to_nibabel(ours)).form_code == 2


def test_a_scaled_image_is_taken_in_hu(tmp_path):
    path = put(tmp_path, nifti((ct() + 1024).astype(np.uint16), inter=-1024))
    volume = from_nibabel(nib.load(path))
    assert volume.data.dtype == np.int16
    np.testing.assert_array_equal(volume.data, ct())


@pytest.mark.parametrize(("stored", "kept"), [("int64", "int16"), ("float16", "float32"), (">i2", "int16")])
def test_a_type_that_no_file_should_have_is_not_kept_for_the_result(stored, kept):
    data = ct()[:, :, :3].astype(stored)
    volume = from_nibabel(nib.Nifti1Image(data.astype(np.int16), affine_of()))
    again = _from_array(data)
    assert again.result_dtype == again.data.dtype == kept
    np.testing.assert_allclose(again.data, volume.data, atol=0.5)  # float16 above 1024


def _from_array(data: np.ndarray) -> Volume:
    image = nib.Nifti1Image(data.astype(np.int16), affine_of())
    image._dataobj = data  # nibabel refuses to build some of these, a user's array may be one all the same
    return from_nibabel(image)


def test_metres_become_mm(tmp_path):
    image = nib.load(put(tmp_path, nifti(affine=np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine_of(), xyzt_units=1)))
    np.testing.assert_allclose(from_nibabel(image).affine, affine_of(), rtol=1e-6)


def test_images_that_a_file_would_not_pass_are_refused():
    with_nan = ct().astype(np.float32)
    with_nan[0, 0, 0] = np.nan
    bad = [
        nib.Nifti1Image(with_nan, affine_of()),
        nib.Nifti1Image(ct(), None),
        nib.MGHImage(ct().astype(np.int32), affine_of()),
        nib.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), affine_of()),
        nib.Nifti1Image(np.zeros((4, 4, 4), np.complex64), affine_of()),
        nib.Nifti1Image(ct(), affine_of() * [1, 1, 1000, 1]),
        nib.Nifti1Image((ct() + 1024).clip(0), affine_of()),
    ]
    for image in bad:
        with pytest.raises(CtsrError) as refused:
            from_nibabel(image)
        assert refused.value.exit_code == 3
    for pixels in (np.zeros((4, 4), np.int16), np.zeros((4, 4, 4, 4), np.int16)):
        with pytest.raises(CtsrError):
            from_sitk(sitk.GetImageFromArray(pixels, isVector=False))
    with pytest.raises(CtsrError):
        from_sitk(sitk.GetImageFromArray(np.zeros((4, 4, 4, 3), np.int16), isVector=True))


def test_free_memory_is_between_nothing_and_a_petabyte():
    free = available_bytes()
    assert free is None or 0 < free < 1 << 50
