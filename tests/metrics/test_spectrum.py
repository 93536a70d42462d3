from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.special import erf, ndtri

from ctsr.metrics.masks import body_mask
from ctsr.metrics.spectrum import edge_width, power_above_half, power_ratio

WIDTH_PER_SIGMA = 2 * ndtri(0.9)  # 10–90 % width of a Gaussian edge


def noise(seed: int, *, depth: int = 40, sd: float = 30) -> np.ndarray:
    return np.random.default_rng(seed).normal(40, sd, (depth, 12, 14))


@given(depth=st.integers(12, 60), seed=st.integers(0, 99), dtype=st.sampled_from(["int16", "float32"]))
def test_identity_keeps_all_power(depth, seed, dtype):
    ref = noise(seed, depth=depth).astype(dtype)
    frequency, ratio = power_ratio(ref, ref)
    np.testing.assert_allclose(frequency, np.arange(1, depth // 2 + 1) / depth)
    np.testing.assert_allclose(ratio, 1, rtol=1e-12)
    assert power_above_half(ref, ref) == pytest.approx(1, rel=1e-12)


@given(gain=st.floats(0.1, 5), offset=st.floats(-1000, 1000), seed=st.integers(0, 99))
def test_contrast_counts_squared_and_an_offset_not_at_all(gain, offset, seed):
    ref = noise(seed)
    assert power_above_half(gain * ref + offset, ref) == pytest.approx(gain**2, rel=1e-9)
    np.testing.assert_allclose(power_ratio(gain * ref + offset, ref)[1], gain**2, rtol=1e-6)


def test_white_noise_of_twice_the_sd_has_four_times_the_power():
    ref, pred = np.tile(noise(0), (1, 8, 8)), np.tile(noise(1, sd=60), (1, 8, 8))
    assert power_above_half(pred, ref) == pytest.approx(4, rel=0.1)  # 168 columns of 20 frequencies


def test_a_wave_has_its_power_at_its_own_frequency():
    z = np.arange(40)[:, None, None]
    ref = noise(0, sd=1)
    frequency, ratio = power_ratio(ref + 100 * np.sin(2 * np.pi * 0.3 * z), ref)
    assert frequency[np.argmax(ratio)] == pytest.approx(0.3)
    assert (ratio[np.abs(frequency - 0.3) > 0.051] < 1.1).all()  # Hann: two bins to each side


def test_cubic_interpolation_of_every_other_slice_has_almost_no_power_above_half():
    # A column starts and ends at different HU: without a window that jump leaks into every frequency.
    z = np.linspace(-1, 1, 80)[:, None, None]
    ref = 300 * z + noise(0, depth=80, sd=20)
    thick = (ref[0::2] + ref[1::2]) / 2
    at = (np.arange(80) - 0.5) / 2
    weights = np.stack(
        [ndimage.map_coordinates(row, [at], order=3, mode="nearest") for row in np.eye(40)], axis=1
    )
    cubic = np.tensordot(weights, thick, axes=1)
    assert power_above_half(cubic, ref) < 0.05
    assert power_ratio(cubic, ref)[1][0] > 0.9  # the slowest wave is still there


def test_columns_that_leave_the_body_do_not_count():
    ref, pred = noise(0), noise(1)
    body = np.zeros(ref.shape, bool)
    body[:, 3:7, 2:9] = True
    body[5, 4, 4] = False  # one slice outside is enough
    kept = body.all(axis=0)
    alone = power_above_half(pred[:, kept][:, None], ref[:, kept][:, None])
    assert power_above_half(pred, ref, body) == pytest.approx(alone, rel=1e-12)


def test_where_nothing_can_be_measured_there_is_no_number():
    ref = noise(0)
    assert power_above_half(ref[:11], ref[:11]) is None
    assert power_ratio(ref[:11], ref[:11]) is None
    assert power_above_half(ref, ref, np.zeros(ref.shape, bool)) is None
    flat = np.zeros(ref.shape)
    assert power_above_half(ref, flat) is None
    assert np.isnan(power_ratio(ref, flat)[1]).all()
    assert edge_width(flat, flat, spacing=1) == (None, None)
    assert edge_width(flat[:1], flat[:1], spacing=1) == (None, None)


def edges(sigma: float, *, seed: int = 0, low: float = -850, high: float = 50) -> np.ndarray:
    """Columns with one Gaussian edge each, at a place of its own; sigma in slices. (D, H, W) HU."""
    place = 20 + np.random.default_rng(seed).uniform(-1, 1, (1, 8, 30))
    z = np.arange(40)[:, None, None]
    return low + (high - low) * (1 + erf((z - place) / (sigma * np.sqrt(2)))) / 2


@given(
    sigma=st.floats(0.8, 1.5),
    blur=st.floats(1, 2.5),
    spacing=st.floats(0.5, 3),
    seed=st.integers(0, 99),
    turned=st.booleans(),
)
@settings(max_examples=30)
def test_the_width_of_a_gaussian_edge_is_that_of_its_formula(sigma, blur, spacing, seed, turned):
    step = -1 if turned else 1
    pred, ref = edges(blur * sigma, seed=seed)[::step], edges(sigma, seed=seed)[::step]
    of_pred, of_ref = edge_width(pred, ref, spacing=spacing)
    assert of_pred == pytest.approx(WIDTH_PER_SIGMA * blur * sigma * spacing, rel=0.05)
    assert of_ref == pytest.approx(WIDTH_PER_SIGMA * sigma * spacing, rel=0.05)


def test_an_edge_aside_keeps_its_width():
    ref = edges(1)
    for shift in (-2, 1, 2):
        of_pred, of_ref = edge_width(np.roll(ref, shift, axis=0), ref, spacing=1)
        assert of_pred == pytest.approx(of_ref, rel=0.01)


def test_weak_and_slanting_edges_are_not_measured():
    weak, slanting = edges(1, low=-300, high=50), edges(3)
    assert edge_width(weak, weak, spacing=1) == (None, None)
    assert edge_width(slanting, slanting, spacing=1) == (None, None)


def test_edges_outside_the_body_are_not_measured():
    ref = edges(1)
    body = np.zeros(ref.shape, bool)
    assert edge_width(ref, ref, spacing=1, body=body) == (None, None)
    ref[:, :, :20] = edges(1.5)[:, :, :20]
    body[:, :, 20:] = True
    assert edge_width(ref, ref, spacing=1, body=body)[1] == pytest.approx(WIDTH_PER_SIGMA, rel=0.05)


def test_a_result_without_the_edge_has_no_width_and_the_reference_has():
    ref = edges(1)
    for pred in (np.zeros_like(ref), -ref):
        of_pred, of_ref = edge_width(pred, ref, spacing=1)
        assert of_pred is None
        assert of_ref == pytest.approx(WIDTH_PER_SIGMA, rel=0.05)


def test_int16_edges_do_not_wrap():
    ref = edges(1, low=-30000, high=30000)
    of_pred, of_ref = edge_width(ref.astype(np.int16), ref, spacing=1)
    assert of_pred == pytest.approx(of_ref, rel=0.01)


@pytest.mark.ci
def test_on_a_real_chest_every_interpolation_is_blunter_than_the_truth(reference_data):
    nibabel = pytest.importorskip("nibabel")
    image = nibabel.load(reference_data / "test" / "LIDC-IDRI-0001_2.5mm.nii.gz")
    ref = np.asarray(image.dataobj).transpose(2, 1, 0)[:, 100:200].astype(np.float32)
    body = body_mask(ref)
    thick = (ref[0::2] + ref[1::2]) / 2
    linear = ndimage.zoom(thick, (2, 1, 1), order=1, mode="nearest", grid_mode=True)
    of_linear, of_ref = edge_width(linear, ref, spacing=2.5, body=body)
    of_nearest, _ = edge_width(np.repeat(thick, 2, axis=0), ref, spacing=2.5, body=body)
    assert of_ref < of_nearest < of_linear
    assert power_above_half(linear, ref, body) < 0.1
