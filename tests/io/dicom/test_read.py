"""Laws of a volume read from slices: HU, padding, tilt and what its sidecar tells."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ctsr.errors import GeometryError, InputError
from ctsr.io.dicom.read import DicomVolume, read_stack
from ctsr.io.dicom.records import Stack
from ctsr.io.dicom.scan import scan
from tests.io.dicom.slices import a_stack

RNG = np.random.default_rng(5)
BODY = RNG.integers(-1000, 1500, (5, 48, 64)).astype(np.int16)
GE_PADDING = -2000  # stored; intercept −1024 makes it −3024 HU
TILT = (0.0, 2.5 * math.tan(math.radians(12)), 2.5)


def hu_of(stack: Stack, **options: object) -> np.ndarray:
    """(K, rows, columns)."""
    return read_stack(stack, **options).volume.data.transpose(2, 1, 0)  # type: ignore[arg-type]


def outside_circle() -> np.ndarray:
    y, x = np.mgrid[:48, :64]
    return np.hypot(x - 31.5, y - 23.5) > 24


def test_a_voxel_is_where_and_what_its_slice_says(tmp_path) -> None:
    v = read_stack(a_stack(tmp_path, BODY)).volume
    assert v.data.dtype == np.int16
    assert v.data.flags.f_contiguous
    assert v.slice_axis == 2
    assert v.data[7, 11, 3] == BODY[3, 11, 7]
    np.testing.assert_allclose(v.affine @ (7, 11, 3, 1), (-7 * 0.75, -11 * 0.75, 7.5, 1))


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1.0, -1024.0, np.int16), (2.0, 3.0, np.int16), (1.5, -1024.0, np.float32)],
)
def test_every_slice_is_rescaled_by_its_own_numbers(tmp_path, slope, intercept, dtype) -> None:
    slopes, intercepts = [slope] * 5, [intercept + 10 * k for k in range(5)]
    stored = (BODY // 8).astype(np.int16)
    hu = hu_of(a_stack(tmp_path, stored, slope=slopes, intercept=intercepts))
    assert hu.dtype == dtype
    np.testing.assert_array_equal(hu, stored * slope + np.array(intercepts)[:, None, None])


def test_unsigned_values_above_32767_are_no_negative_ones(tmp_path) -> None:
    stored = (BODY.astype(int) + 40000).astype(np.uint16)
    stack = a_stack(tmp_path, stored, intercept=-40000.0, tags={"PixelRepresentation": 0})
    np.testing.assert_array_equal(hu_of(stack), BODY)


def test_metal_above_16_bit_is_kept(tmp_path) -> None:
    stored = (BODY.astype(int) + 1024).astype(np.uint16)
    stored[2, 10, 10] = 60000
    stack = a_stack(tmp_path, stored, intercept=-1024.0, tags={"PixelRepresentation": 0})
    hu = hu_of(stack)
    assert hu.dtype == np.int32
    assert hu[2, 10, 10] == 58976
    assert any("has their sign wrong" in w for w in read_stack(stack).warnings)


class TestScale:
    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({"slope": None}, "has no RescaleSlope"),
            ({"intercept": None}, "has no RescaleIntercept"),
            ({"slope": 0.0}, "RescaleSlope is 0"),
            ({"slope": -1.0}, "RescaleSlope is -1"),
            ({"rescale_type": "ED"}, "values are ED by RescaleType"),
            ({"rescale_type": "Jane Doe"}, "values are something else by RescaleType"),
            ({"rescale_type": "US", "image_type": ("DERIVED", "PRIMARY")}, "values are US by RescaleType"),
            ({"tags": {"ModalityLUTSequence": []}}, "Modality LUT instead of a rescale"),
            (
                {"slope": None, "intercept": None, "rescale_type": "", "tags": {"PixelRepresentation": 0}},
                "not HU",
            ),
            ({"slope": [1.0] * 4 + [None], "intercept": [0.0] * 4 + [None]}, "1 of 5 slices have no"),
        ],
    )
    def test_without_one_is_refused(self, tmp_path, changed, text) -> None:
        stored = (BODY.astype(int) + 1024).astype(np.int16)
        with pytest.raises(InputError, match=text):
            read_stack(a_stack(tmp_path, stored, **changed))

    def test_absent_from_values_that_are_hu_is_told(self, tmp_path) -> None:
        v = read_stack(a_stack(tmp_path, BODY, slope=None, intercept=None, rescale_type=""))
        np.testing.assert_array_equal(v.volume.data.transpose(2, 1, 0), BODY)
        assert "no RescaleSlope and RescaleIntercept: stored values taken as HU" in v.warnings

    def test_of_no_kind_named_is_told(self, tmp_path) -> None:
        assert any(
            "RescaleType is US" in w for w in read_stack(a_stack(tmp_path, BODY, rescale_type="US")).warnings
        )

    def test_that_no_ct_has_is_refused(self, tmp_path) -> None:
        stored = np.random.default_rng(0).integers(-32768, 32768, BODY.shape).astype(np.int16)
        with pytest.raises(InputError, match=r"HU range -33\d+\.\.31\d+ is not CT \(broken compression\?\)"):
            read_stack(a_stack(tmp_path, stored, intercept=-1024.0))

    def test_without_air_is_told(self, tmp_path) -> None:
        stack = a_stack(tmp_path, (BODY // 10 + 1024).astype(np.int16))
        assert any(w.startswith("no air in the image") for w in read_stack(stack).warnings)


class TestPadding:
    def padded(
        self, folder: Path, value: object = 63536, *, stored: int = GE_PADDING, **other: object
    ) -> Stack:
        """GE's: signed, intercept −1024, the corners hold `stored`; `value` stands in PixelPaddingValue."""
        image = np.where(outside_circle(), stored, BODY + 1024).astype(np.int16)
        tags = {} if value is None else {"PixelPaddingValue": value}
        return a_stack(folder, image, intercept=-1024.0, **{"tags": tags, **other})

    @pytest.mark.parametrize(
        ("value", "source"),
        [
            (63536, "declared"),
            (-2000, "declared"),
            (None, "detected"),
            (32768, "detected"),
            ([1, 2], "detected"),
        ],
    )
    def test_is_found_whatever_is_declared(self, tmp_path, value, source) -> None:
        v = read_stack(self.padded(tmp_path, value))
        hu, outside = v.volume.data.transpose(2, 1, 0), outside_circle()
        assert hu.dtype == np.int16
        assert (hu[:, outside] == -1024).all()
        np.testing.assert_array_equal(hu[:, ~outside], BODY[:, ~outside])
        assert v.technical["padding"] == {
            "source": source,
            "value_stored": GE_PADDING,
            "voxels": 5 * outside.sum(),
            "hu": -1024,
        }
        assert v.padding_value is None

    def test_gets_the_value_asked_for(self, tmp_path) -> None:
        assert (hu_of(self.padded(tmp_path), pad_hu=-1000)[:, outside_circle()] == -1000).all()

    @pytest.mark.parametrize(("stored", "kept"), [(GE_PADDING, -3024), (-100, -1500)])
    def test_stays_padding_where_asked_for(self, tmp_path, stored, kept) -> None:
        v = read_stack(self.padded(tmp_path, stored, stored=stored), pad_hu=None)
        assert v.padding_value == kept
        assert (v.volume.data.transpose(2, 1, 0)[:, outside_circle()] == kept).all()

    def test_that_does_not_fit_16_bit_costs_no_wider_volume(self, tmp_path) -> None:
        v = read_stack(self.padded(tmp_path, 32768, stored=-32768))  # −33792 HU
        assert v.volume.data.dtype == np.int16
        assert v.technical["padding"]["source"] == "declared"

    def test_range_reaches_from_the_value_to_the_limit(self, tmp_path) -> None:
        stack = self.padded(
            tmp_path, 63536, tags={"PixelPaddingValue": 63536, "PixelPaddingRangeLimit": 63736}
        )
        image = np.where(outside_circle(), RNG.integers(-2000, -1799, BODY.shape), BODY + 1024).astype(
            np.int16
        )
        for s, pixels in zip(stack.slices, image, strict=True):
            s.file.path.write_bytes(pixels.tobytes())
        v = read_stack(stack)
        assert v.technical["padding"]["voxels"] == 5 * outside_circle().sum()

    def test_smeared_by_lossy_compression_is_found_whole(self, tmp_path) -> None:
        stack = self.padded(tmp_path)
        for s in stack.slices:
            smear = np.frombuffer(s.file.path.read_bytes(), np.int16).reshape(48, 64) + RNG.integers(
                -90, 90, (48, 64)
            )
            s.file.path.write_bytes(smear.astype(np.int16).tobytes())
        hu = hu_of(stack)
        assert (hu[:, outside_circle()] == -1024).all()

    def test_declared_as_tissue_is_not_believed(self, tmp_path) -> None:
        v = read_stack(a_stack(tmp_path, BODY, tags={"PixelPaddingValue": 40}))
        np.testing.assert_array_equal(v.volume.data.transpose(2, 1, 0), BODY)
        assert any("40 HU, which is tissue" in w for w in v.warnings)

    def test_is_not_seen_in_low_voxels_within_the_circle_or_in_noise_below_air(self, tmp_path) -> None:
        image = BODY.copy()
        image[:, 20:30, 20:30] = -2500  # a streak beside metal
        image[BODY < -950] -= 400  # Toshiba's noise
        v = read_stack(a_stack(tmp_path, image))
        np.testing.assert_array_equal(v.volume.data.transpose(2, 1, 0), image)
        assert v.technical["padding"]["source"] == "none"

    def test_one_voxel_in_a_gap_that_a_quarter_of_the_rows_shows_narrows_it(self, tmp_path) -> None:
        stack = self.padded(tmp_path, None)  # HU −3024, then ≥ −1000
        pixels = np.frombuffer(stack.slices[0].file.path.read_bytes(), np.int16).reshape(48, 64).copy()
        pixels[21, 30] = -1476  # −2500 HU, in the lower half of the gap and in a row that is left out
        stack.slices[0].file.path.write_bytes(pixels.tobytes())
        hu = hu_of(stack)
        assert hu[0, 21, 30] == -2500
        assert (hu[:, outside_circle()] == -1024).all()


class TestTilt:
    def test_removed_keeps_a_linear_image_where_it_is(self, tmp_path) -> None:
        """HU linear in the position: linear interpolation gives it back at every voxel's own position."""
        k, j, i = np.mgrid[:5, :48, :64]
        x, y, z = i * 0.75, j * 0.75 + k * TILT[1], k * 2.5
        image = np.rint(4 * x - 3 * y + 8 * z - 600).astype(np.int16)
        v = read_stack(a_stack(tmp_path, image, step=TILT))
        data = v.volume.data
        index = np.indices(data.shape).reshape(3, -1)
        ras = v.volume.affine[:3, :3] @ index + v.volume.affine[:3, 3:]
        expected = (4 * -ras[0] - 3 * -ras[1] + 8 * ras[2] - 600).reshape(data.shape)
        inside = data != -1024
        assert inside.sum() >= 64 * 47 * 5  # a row a slice has only one neighbour
        assert np.abs(data - expected)[inside].max() <= 1.01  # HU: integers in, integers out
        assert v.technical["tilt_removed_deg"] == v.technical["tilt_deg"] == pytest.approx(12, abs=1e-3)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_removed_leaves_the_first_slice_untouched(self, tmp_path, sign) -> None:
        v = read_stack(a_stack(tmp_path, BODY, step=(0, sign * TILT[1], 2.5)))
        first = 0 if sign > 0 else v.volume.shape[1] - 48
        np.testing.assert_array_equal(v.volume.data[:, first : first + 48, 0].T, BODY[0])

    def test_kept_leaves_every_value_and_shears_the_affine(self, tmp_path) -> None:
        v = read_stack(a_stack(tmp_path, BODY, step=TILT), keep_tilt=True)
        np.testing.assert_array_equal(v.volume.data.transpose(2, 1, 0), BODY)
        np.testing.assert_allclose(v.volume.affine[:3, 2], (0, -TILT[1], 2.5), atol=1e-9)
        assert v.technical["sheared"]

    def test_removed_never_mixes_padding_into_tissue(self, tmp_path) -> None:
        image = np.where(outside_circle(), GE_PADDING, 1064).astype(np.int16)
        tags = {"PixelPaddingValue": 63536}
        stack = a_stack(tmp_path, np.stack([image] * 5), step=TILT, intercept=-1024.0, tags=tags)
        v = read_stack(stack)
        assert set(np.unique(v.volume.data)) == {-1024, 40}
        kept = read_stack(stack, pad_hu=None)
        assert set(np.unique(kept.volume.data)) == {-3024, 40}
        assert kept.padding_value == -3024

    def test_removed_marks_what_no_slice_covers(self, tmp_path) -> None:
        v = read_stack(a_stack(tmp_path, BODY, step=TILT), pad_hu=None)
        assert v.padding_value == -2000
        assert (v.volume.data[:, -1, 0] == -2000).all()

    def test_of_a_tag_that_the_positions_contradict_is_told(self, tmp_path) -> None:
        v = read_stack(a_stack(tmp_path, BODY, tags={"GantryDetectorTilt": "5.5"}))
        assert any("0.0° by the positions, 5.5° by GantryDetectorTilt" in w for w in v.warnings)


class TestSidecar:
    def test_tells_of_the_scan_and_not_of_the_patient(self, tmp_path) -> None:
        tags = {
            "PatientName": "Doe^Jane",
            "PatientID": "4711",
            "StudyDescription": "Jane's chest",
            "AcquisitionDate": "20200101",
            "Manufacturer": "GE MEDICAL SYSTEMS",
            "ManufacturerModelName": "Jane's scanner!",  # no plain text
            "BodyPartExamined": "JANE",
            "ContrastBolusAgent": "for Jane",
            "KVP": "120",
            "SpiralPitchFactor": 0.9,
        }
        stack = a_stack(tmp_path, BODY, tags=tags, thickness=3.0)
        v = read_stack(stack)
        told = json.dumps(v.technical)
        assert not re.search("Jane|Doe|4711|20200101", told, re.IGNORECASE)
        assert v.technical["Manufacturer"] == "GE"
        assert v.technical["ContrastBolusAgent"] is True
        assert (v.technical["KVP"], v.technical["SpiralPitchFactor"]) == (120, 0.9)
        assert (v.technical["spacing_mm"], v.technical["thickness_over_spacing"]) == ([0.75, 0.75, 2.5], 1.2)
        assert v.volume.slice_thickness == 3

    def test_lists_what_varies_with_its_counts(self, tmp_path) -> None:
        stack = a_stack(tmp_path, BODY, tags=[{"Exposure": "9"}] * 3 + [{"Exposure": "10"}] * 2)
        assert read_stack(stack).technical["Exposure"] == [[9, 3], [10, 2]]


def test_a_stack_that_is_no_grid_is_refused_before_its_pixels_are_read(tmp_path) -> None:
    stack = a_stack(tmp_path, BODY)
    with pytest.raises(GeometryError, match="1 slice missing"):
        read_stack(replace(stack, slices=(*stack.slices[:2], *stack.slices[3:])))


@pytest.mark.ci
class TestRealSets:
    @pytest.fixture
    def one(self, reference_data):
        def read(name: str, **options: object) -> DicomVolume:
            (stack,) = scan(reference_data.parent / "dicom" / name).stacks
            return read_stack(stack, **options)  # type: ignore[arg-type]

        return read

    def test_siemens_tilt(self, one) -> None:
        v = one("siemens-tilt")
        expected = [
            [-0.41797, 0, 0, 106.79102],
            [0, -0.40555, -1.17368, 260.2688],
            [0, -0.10112, 4.70737, -61.0419],
        ]
        assert v.volume.shape == (128, 137, 4)
        np.testing.assert_allclose(v.volume.affine[:3], expected, atol=1e-4)
        assert v.volume.data[[20, 64, 90], [19, 73, 109], 0].tolist() == [-827, -1021, -1013]  # from row 9 on
        kept = one("siemens-tilt", keep_tilt=True)
        np.testing.assert_allclose(kept.volume.affine[:3, 2], (0, 0, 5), atol=1e-4)
        assert kept.volume.data[64, 64, 3] == -928

    def test_ge_padding(self, one) -> None:
        v = one("ge-pad-minus2000", pad_hu=None)
        expected = [[-0.810547, 0, 0, 235.199997], [0, -0.810547, 0, 226.800003], [0, 0, 1, -128.690002]]
        np.testing.assert_allclose(v.volume.affine[:3], expected, atol=1e-6)
        assert (v.volume.data[20, 10] == -3024).all()
        assert v.padding_value == -3024
        assert v.technical["padding"]["voxels"] / v.volume.data.size == pytest.approx(0.213, abs=5e-4)
        assert v.volume.data.max() == 1381

    def test_philips(self, one) -> None:
        v = one("philips-study")
        expected = [[-0.451172, 0, 0, 28.875], [0, -0.451172, 0, -84.775], [0, 0, 5, 696.21]]
        np.testing.assert_allclose(v.volume.affine[:3], expected, atol=1e-6)
        x = v.volume.data
        assert (x.min(), x.max()) == (-1024, 761)
        assert x.mean() == pytest.approx(-596.5563, abs=1e-4)
        assert [x[20, 10, 0], x[64, 64, 0], x[64, 64, 14], x[64, 64, 27]] == [-989, 94, 93, -952]

    def test_one_object_a_slice_and_one_for_all_are_the_same_volume(self, one) -> None:
        a, b = one("legacy-enhanced-ct/classic"), one("legacy-enhanced-ct/multiframe")
        np.testing.assert_array_equal(a.volume.data, b.volume.data)
        np.testing.assert_allclose(a.volume.affine, b.volume.affine, atol=1e-9)
        assert a.volume.data[11, 19].tolist() == [0, 1, 0]
        assert any("RescaleType is US" in w for w in b.warnings)

    def test_ge_variable_spacing_split(self, reference_data) -> None:
        stacks = scan(reference_data.parent / "dicom" / "ge-tilt-variable-spacing", split=True).stacks
        thin, thick = (read_stack(stack, pad_hu=None) for stack in stacks)
        assert thin.technical["spacing_mm"][2] == pytest.approx(4.0019, abs=1e-4)
        assert thick.technical["spacing_mm"][2] == pytest.approx(6.9986, abs=1e-4)
        for v, middle in ((thin, -88), (thick, 26)):
            first = v.volume.shape[1] - 128
            assert v.volume.data[64, first + 64, 0] == middle
            assert v.volume.data[20, first + 10, 0] == -1500
