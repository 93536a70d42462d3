"""Volumes from and to the image objects of nibabel and SimpleITK, which are imported only when asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from ctsr.core.volume import Volume
from ctsr.errors import GeometryError, InputError
from ctsr.io.hu import volume_of
from ctsr.io.nifti_header import Header, checked_affine, mm_per_unit

__all__ = ["from_nibabel", "from_sitk", "to_nibabel", "to_sitk"]

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # SimpleITK's world to ours, and back


def from_nibabel(image: Any, *, notes: list[str] | None = None) -> Volume:
    """The volume of a nibabel NIfTI image, its data copied; refused where a file like it would be.

    Raises GeometryError where it has no orientation (both form codes 0).
    """
    notes = [] if notes is None else notes
    header = image.header
    if not hasattr(header, "get_dim_info"):
        raise InputError(f"a {type(image).__name__}, a NIfTI image expected")
    form_code = int(header["sform_code"]) or int(header["qform_code"])
    if not form_code:
        raise GeometryError("no orientation: sform and qform codes are 0")
    scale = mm_per_unit(int(header["xyzt_units"]), notes=notes)
    proxy = (
        image.dataobj
    )  # an array, or a file with slope and inter, which np.asarray would turn into float64
    return _volume(
        np.asarray(proxy.get_unscaled() if hasattr(proxy, "get_unscaled") else proxy),
        np.asarray(image.affine, np.float64) * [[scale], [scale], [scale], [1.0]],
        notes,
        slope=float(getattr(proxy, "slope", 1.0)),
        inter=float(getattr(proxy, "inter", 0.0)),
        slice_axis=header.get_dim_info()[2],
        form_code=form_code,
    )


def to_nibabel(volume: Volume) -> Any:
    """A nibabel NIfTI-1 image that shares the volume's array: sform = qform, mm, not scaled."""
    import nibabel

    image: Any = nibabel.Nifti1Image(  # type: ignore[no-untyped-call]
        volume.data, volume.affine, dtype=volume.data.dtype
    )
    image.set_sform(volume.affine, code=volume.form_code)
    image.set_qform(volume.affine, code=volume.form_code)
    image.header.set_xyzt_units("mm")
    image.header.set_dim_info(slice=volume.slice_axis)
    return image


def from_sitk(image: Any, *, notes: list[str] | None = None) -> Volume:
    """The volume of a SimpleITK image, its data copied; refused where a file like it would be."""
    import SimpleITK

    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        kind = f"{image.GetDimension()}D image of {image.GetNumberOfComponentsPerPixel()} components"
        raise InputError(f"{kind}, a 3D one of 1 expected")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    stored = SimpleITK.GetArrayViewFromImage(image).transpose(2, 1, 0)
    return _volume(stored, _LPS @ affine, [] if notes is None else notes)


def to_sitk(volume: Volume) -> Any:
    """A SimpleITK image of the volume, its data copied. ITK raises where axes are sheared beyond 10⁻⁴."""
    import SimpleITK

    affine = _LPS @ volume.affine
    image: Any = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.data.transpose(2, 1, 0)))
    image.SetSpacing(volume.spacing.tolist())
    image.SetDirection((affine[:3, :3] / volume.spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def _volume(stored: np.ndarray, affine: np.ndarray, notes: list[str], **fields: Any) -> Volume:
    """fields: of Header."""
    stored = stored.reshape(stored.shape[:3]) if stored.ndim > 3 and set(stored.shape[3:]) == {1} else stored
    if stored.ndim != 3 or stored.dtype.kind not in "iuf" or 0 in stored.shape:
        found = f"{stored.ndim}D array of {stored.dtype}, {stored.shape}"
        raise InputError(f"{found}; a 3D one of numbers expected")
    i, j, k = stored.shape
    header = Header((i, j, k), checked_affine(affine, notes=notes), stored.dtype, **fields)
    flat = np.array(stored, order="F", copy=True).reshape(-1, order="F")
    return volume_of(flat, header, notes=notes)
