from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from ctsr.errors import InputError
from ctsr.metrics.fidelity import PEAK, PEAK_PUBLISHED, PLANE_AXIS, difference, psnr, ssim

PLANES = list(PLANE_AXIS)


def pair(
    seed: int, shape: tuple[int, int, int], dtype: str = "float64"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A structured reference, a noisy result, and a mask of half of the voxels."""
    rng = np.random.default_rng(seed)
    ref = rng.normal(0, 300, shape) + 500 * np.sin(np.arange(shape[2]) / 3)
    pred = ref + rng.normal(5, 40, shape)
    return np.rint(pred).astype(dtype), np.rint(ref).astype(dtype), rng.random(shape) < 0.5


def test_the_psnr_of_ten_hu():
    ref = np.zeros((3, 4, 5), np.int16)
    assert psnr(ref + 10, ref, peak=PEAK) == pytest.approx(52.24508, abs=5e-6)
    assert psnr(ref + 10, ref, peak=PEAK_PUBLISHED) - psnr(ref + 10, ref, peak=PEAK) == pytest.approx(
        -6.22448, abs=5e-6
    )


@given(
    d=st.integers(-4000, 4000).filter(bool), level=st.integers(-1024, 3071), dtype=st.sampled_from("hfdil")
)
def test_a_constant_error_has_the_psnr_of_its_size(d, level, dtype):
    ref = np.full((2, 3, 4), level, np.int32)
    if dtype == "h" and not -32768 <= level + d < 32768:
        return
    pred = (ref + d).astype(dtype)
    assert psnr(pred, ref.astype(dtype), peak=PEAK) == pytest.approx(20 * math.log10(PEAK / abs(d)), abs=1e-9)
    found = difference(pred, ref)
    assert found.mean == d
    assert found.mean_abs == found.rmse == abs(d)


@given(seed=st.integers(0, 999), dtype=st.sampled_from(["int16", "float32", "float64"]), masked=st.booleans())
def test_a_masked_metric_is_the_metric_of_the_masked_voxels(seed, dtype, masked):
    pred, ref, mask = pair(seed, (4, 6, 5), dtype)
    mask[0] = False  # a slice without any
    chosen = mask if masked else np.ones_like(mask)
    d = [float(p) - float(r) for p, r in zip(pred[chosen].tolist(), ref[chosen].tolist(), strict=True)]
    n, square = len(d), math.fsum(x * x for x in d) / len(d)
    argument = mask if masked else None
    found = difference(pred, ref, argument)
    assert found.n == n
    assert found.mean == pytest.approx(math.fsum(d) / n, abs=1e-9)
    assert found.mean_abs == pytest.approx(math.fsum(map(abs, d)) / n, abs=1e-9)
    assert found.rmse == pytest.approx(math.sqrt(square), abs=1e-9)
    assert psnr(pred, ref, argument, peak=PEAK) == pytest.approx(10 * math.log10(PEAK**2 / square), abs=1e-9)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_integers_do_not_wrap(dtype):
    span = np.iinfo(dtype)
    pred, ref = np.full((12, 12, 12), span.max, dtype), np.full((12, 12, 12), span.min, dtype)
    assert difference(pred, ref).mean == difference(pred, ref).rmse == 65535
    assert difference(ref, pred).mean == -65535
    for plane in PLANES:
        exact = ssim(pred.astype(float), ref.astype(float), plane=plane)
        assert ssim(pred, ref, plane=plane) == exact


@pytest.mark.parametrize("plane", PLANES)
def test_identity_is_infinite_decibels_and_a_similarity_of_one(plane):
    _, ref, mask = pair(0, (13, 14, 15), "float32")
    assert psnr(ref, ref, peak=PEAK) == math.inf
    assert psnr(ref, ref, mask, peak=PEAK) == math.inf
    assert ssim(ref, ref, plane=plane) == 1
    assert ssim(ref, ref, plane=plane, mask=mask) == 1


@given(
    seed=st.integers(0, 999),
    shape=st.tuples(*[st.integers(11, 19)] * 3),
    plane=st.sampled_from(PLANES),
    share=st.sampled_from([None, 0.001, 0.02, 0.5]),
)
@settings(max_examples=30)
def test_ssim_is_that_of_scikit_image_over_the_mask(seed, shape, plane, share):
    pred, ref, _ = pair(seed, shape)
    mask = None if share is None else np.random.default_rng(seed).random(shape) < share
    if mask is not None:
        mask[tuple(n // 2 for n in shape)] = True
    counted = []
    for k in range(shape[PLANE_AXIS[plane]]):
        each = (slice(None),) * PLANE_AXIS[plane] + (k,)
        _, similarity = structural_similarity(
            pred[each],
            ref[each],
            data_range=4095,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        inner = similarity[5:-5, 5:-5]
        counted.append(inner.ravel() if mask is None else inner[mask[each][5:-5, 5:-5]])
    assert ssim(pred, ref, plane=plane, mask=mask) == pytest.approx(np.concatenate(counted).mean(), abs=1e-9)


def test_whole_slices_have_the_mean_that_scikit_image_returns():
    pred, ref, _ = pair(3, (6, 30, 25))
    options = {"data_range": 4095, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    judge = np.mean([structural_similarity(p, r, **options) for p, r in zip(pred, ref, strict=True)])
    assert ssim(pred, ref, plane="axial") == pytest.approx(judge, abs=1e-9)


def test_float32_is_computed_in_float64():
    # float32 sums miss 1e-6 on flat tissue near 3000 HU.
    rng = np.random.default_rng(0)
    ref = (3000 + rng.normal(0, 1, (11, 20, 20))).astype(np.float32)
    pred = ref + rng.normal(0, 1, ref.shape).astype(np.float32)
    judge = ssim(pred.astype(np.float64), ref.astype(np.float64), plane="axial")
    assert ssim(pred, ref, plane="axial") == pytest.approx(judge, abs=1e-12)


def test_a_plane_of_few_slices_has_no_ssim_and_the_others_have():
    pred, ref, mask = pair(1, (5, 30, 30))
    assert ssim(pred, ref, plane="axial") is not None
    assert ssim(pred, ref, plane="coronal") is None
    assert ssim(pred, ref, plane="sagittal", mask=mask) is None
    pred, ref, _ = pair(1, (11, 10, 30))  # 11 is the least
    assert [ssim(pred, ref, plane=plane) is not None for plane in PLANES] == [False, True, False]


def test_a_mask_in_the_border_has_no_ssim():
    pred, ref, mask = pair(1, (12, 30, 30))
    mask[:, 5:-5, 5:-5] = False
    assert ssim(pred, ref, plane="axial", mask=mask) is None


@pytest.mark.parametrize("metric", [difference, lambda p, r, m=None: ssim(p, r, plane="axial", mask=m)])
def test_what_can_not_be_measured_is_refused(metric):
    good = np.zeros((12, 12, 12), np.float32)
    for bad_value in (np.nan, np.inf):
        bad = good.copy()
        bad[3, 4, 5] = bad_value
        with pytest.raises(InputError, match="1 voxels of the result are not finite"):
            metric(bad, good)
        with pytest.raises(InputError, match="1 voxels of the reference are not finite"):
            metric(good, bad)
        outside = np.ones(good.shape, bool)
        outside[3, 4, 5] = False
        with pytest.raises(InputError, match="not finite"):  # beyond the mask too
            metric(bad, good, outside)
    with pytest.raises(InputError, match=r"\(12, 12, 11\), reference \(12, 12, 12\)"):
        metric(good[:, :, 1:], good)
    with pytest.raises(InputError, match="mask is empty"):
        metric(good, good, good > 0)
    with pytest.raises(ValueError, match="mask is bool"):
        metric(good, good, good)
    with pytest.raises(ValueError, match="mask is bool"):
        metric(good, good, good[1:] == 0)
