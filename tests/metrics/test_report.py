from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.errors import InputError, UsageError
from ctsr.metrics.fidelity import PEAK, PEAK_PUBLISHED, difference, ssim
from ctsr.metrics.masks import BANDS, Regions
from ctsr.metrics.report import (
    METRICS,
    check_requirements,
    densitometry,
    parse_requirement,
    residual_summary,
    score,
    summary,
)
from tests.metrics import thorax as chest
from tests.metrics.thorax import with_noise

SLICES = 12  # as few as have every metric
SHAPE = (SLICES, *chest.SHAPE[1:])


def thorax() -> np.ndarray:
    return chest.thorax()[:SLICES]


REF = with_noise(thorax(), sd=20, seed=1)
PRED = with_noise(REF, sd=30, seed=2) + np.float32(2)
REGIONS = Regions.of(REF)


def scored(
    pred: np.ndarray, ref: np.ndarray, mask: str | np.ndarray = "body", mm: float = 1
) -> dict[str, float | bool | None]:
    return score(pred, ref, Regions.of(ref, mask), spacing_z_mm=mm)


def test_a_row_holds_what_each_metric_gives_alone():
    row = score(PRED, REF, REGIONS, spacing_z_mm=1.5)
    whole = difference(PRED, REF, REGIONS.body)
    assert row["psnr_4095_db"] == whole.psnr(PEAK)
    assert row["psnr_2000_db"] == whole.psnr(PEAK_PUBLISHED)
    for plane in ("axial", "coronal", "sagittal"):
        assert row[f"ssim_{plane}"] == ssim(PRED, REF, plane=plane, mask=REGIONS.body)
    assert [row[f"{each}_hu"] for each in ("mae", "bias", "rmse")] == [whole.mean_abs, whole.mean, whole.rmse]
    for name, mask in REGIONS.bands.items():
        band = difference(PRED, REF, mask)
        assert (row[f"bias_hu_{name}"], row[f"mae_hu_{name}"]) == (band.mean, band.mean_abs)
        assert row[f"mean_hu_{name}_pred"] - row[f"mean_hu_{name}_ref"] == pytest.approx(band.mean)
    assert row["lung_below_910_pred"] == pytest.approx(100 * (PRED[REGIONS.lung] < -910).mean())
    assert row["lung_below_950_error"] == row["lung_below_950_pred"] - row["lung_below_950_ref"] > 0
    assert row["lung_p15_hu_error"] == pytest.approx(2 - 1.0364 * (math.hypot(20, 30) - 20), abs=1)
    assert row["power_above_half"] == pytest.approx(1 + (30 / 20) ** 2, rel=0.05)
    assert row["identical"] is False


def test_a_row_is_flat_and_holds_exactly_the_known_names():
    row = score(PRED, REF, REGIONS, spacing_z_mm=1.5)
    assert {*row} - {"identical"} == {name for name in METRICS if not name.startswith("residual")}
    assert list(row)[:8] == list(METRICS[:8])
    assert all(type(value) in (float, bool, type(None)) for value in row.values())
    json.dumps(row, allow_nan=False)


def test_edges_are_in_millimetres():
    ref = REF[:, 40:60].copy()
    ref[: SLICES // 2] = -1000  # half of the stack is air: a sharp edge in every column
    body = np.ones(ref.shape, bool)
    near, far = (scored(ref, ref, body, mm)["edge_width_mm_ref"] for mm in (1, 2.5))
    assert far == pytest.approx(2.5 * near)


def test_an_identical_result_has_no_psnr_and_says_so():
    row = score(REF, REF.astype(np.float64), REGIONS, spacing_z_mm=1.5)
    assert row["identical"] is True
    assert row["psnr_4095_db"] is row["psnr_2000_db"] is None
    assert row["ssim_coronal"] == row["power_above_half"] == 1
    assert row["mae_hu"] == row["bias_hu_bone"] == row["lung_p15_hu_error"] == 0
    assert row["edge_width_mm_pred"] == row["edge_width_mm_ref"]


def test_a_band_without_voxels_has_no_number():
    soft = np.where(thorax() > 300, np.float32(40), thorax())
    row = scored(soft + 1, soft)
    assert [row[f"{metric}_bone{side}"] for metric, side in METRIC_SIDES] == [None] * 4
    assert row["bias_hu_fat"] == 1


METRIC_SIDES = [("bias_hu", ""), ("mae_hu", ""), ("mean_hu", "_pred"), ("mean_hu", "_ref")]


def test_the_mask_decides_which_voxels_count():
    own = np.zeros(SHAPE, bool)
    own[4:, 20:90, 30:120] = True
    everything = np.ones(SHAPE, bool)
    for mask, voxels, area in [
        ("lung", REGIONS.lung, REGIONS.body), ("none", None, everything), (own, own, own),
    ]:  # fmt: skip
        row = scored(PRED, REF, mask)
        assert row["rmse_hu"] == difference(PRED, REF, voxels).rmse
        assert row["ssim_sagittal"] == ssim(PRED, REF, plane="sagittal", mask=voxels)
        assert row["bias_hu_fat"] == difference(PRED, REF, Regions.of(REF, area).bands["fat"]).mean


def test_without_a_mask_a_volume_without_a_body_is_scored():
    air = with_noise(np.full((12, 20, 20), -1000.0), sd=10, seed=0)
    assert scored(air + 1, air, "none")["bias_hu"] == pytest.approx(1)
    with pytest.raises(InputError, match="body mask is empty"):
        scored(air + 1, air)


def test_two_slices_are_scored():
    row = scored(PRED[:2], REF[:2])
    assert row["ssim_axial"] is not None
    assert row["ssim_coronal"] is row["ssim_sagittal"] is row["power_above_half"] is None


def test_a_mask_that_is_empty_or_unknown_is_refused():
    airless = np.where(thorax() == -850, np.float32(40), thorax())
    with pytest.raises(InputError, match="lung mask is empty"):
        scored(airless, airless, "lung")
    with pytest.raises(InputError, match="mask is empty"):
        scored(PRED, REF, np.zeros(SHAPE, bool))
    with pytest.raises(UsageError, match="liver"):
        scored(PRED, REF, "liver")


@pytest.mark.parametrize(
    ("short", "metric"),
    [
        ("psnr", "psnr_4095_db"), ("PSNR", "psnr_4095_db"), ("psnr_2000", "psnr_2000_db"),
        ("ssim", "ssim_coronal"), ("ssim_ax", "ssim_axial"), ("mae", "mae_hu"), ("bias", "bias_hu"),
        ("rmse", "rmse_hu"), ("residual_max", "residual_max_hu"), ("residual_mean", "residual_mean_hu"),
        ("power", "power_above_half"), *((name, name) for name in METRICS),
    ],
)  # fmt: skip
def test_a_short_name_means_one_metric(short, metric):
    assert parse_requirement(f"{short}>=1").metric == metric


@given(
    sign=st.sampled_from([">=", "<=", ">", "<"]),
    limit=st.floats(-1e5, 1e5),
    value=st.floats(-1e5, 1e5),
    space=st.sampled_from(["", " "]),
)
def test_a_requirement_holds_as_python_compares(sign, limit, value, space):
    requirement = parse_requirement(f"{space}psnr{space}{sign}{space}{limit!r}{space}")
    assert requirement.holds({"psnr_4095_db": value}) == eval(f"{value!r} {sign} {limit!r}")
    failed = check_requirements({"psnr_4095_db": value}, [requirement])
    assert len(failed) == (not requirement.holds({"psnr_4095_db": value}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("psnr", "METRIC>=NUMBER"),
        ("psnr=35", "METRIC>=NUMBER"),
        ("psnr==35", "METRIC>=NUMBER"),
        (">=35", "METRIC>=NUMBER"),
        ("", "METRIC>=NUMBER"),
        ("psnr>=35 dB", "METRIC>=NUMBER"),
        *(
            (f"psnr>={number}", "METRIC>=NUMBER")
            for number in ("abc", "nan", "inf", "1e999", "1_0", "３", "0x2")
        ),
        ("psrn>=35", "unknown metric 'psrn'.*psnr"),
        ("edge_width<2", "edge_width_mm_pred, edge_width_mm_ref"),
        ("lung<2", "unknown metric 'lung'.*lung_below_950_pred, "),
        ("zzz<2", "unknown metric 'zzz'.*nearest: "),
    ],
)
def test_a_requirement_that_can_not_be_read_is_refused(text, words):
    with pytest.raises(UsageError) as caught:
        parse_requirement(text)
    assert re.search(words, str(caught.value)), str(caught.value)


def test_a_failed_requirement_is_told_with_both_numbers():
    row = {"psnr_4095_db": 33.125, "bias_hu": -100.0, "ssim_coronal": None, "identical": False}
    requirements = [
        parse_requirement(text) for text in ("psnr>=35", "psnr<40", "bias<1", "ssim>0.9", "mae<5")
    ]
    assert check_requirements(row, requirements) == [
        "psnr_4095_db is 33.125, required >= 35",
        "bias_hu is -100, required < 1",
        "ssim_coronal is not measured, required > 0.9",
        "mae_hu is not measured, required < 5",
    ]


def test_of_a_bias_or_an_error_the_size_counts():
    row = {"bias_hu_fat": -3.0, "lung_p15_hu_error": -3.0, "mean_hu_fat_ref": -90.0}
    for text, holds in [("bias_hu_fat<=3", True), ("bias_hu_fat<=2.9", False), ("mean_hu_fat_ref<0", True)]:
        assert parse_requirement(text).holds(row) is holds
    assert not parse_requirement("lung_p15_hu_error<2").holds(row)


def test_the_psnr_of_identical_volumes_is_high_enough_for_any_limit():
    row = {"psnr_4095_db": None, "identical": True}
    assert check_requirements(row, [parse_requirement("psnr>=1e6")]) == []
    assert check_requirements(row, [parse_requirement("psnr<50")]) != []


def rows(n: int) -> list[dict[str, float | bool | None]]:
    values = np.random.default_rng(0).normal(40, 2, n)
    return [{"psnr_4095_db": float(v), "mae_hu": 3.0, "power_above_half": None} for v in values]


def test_a_summary_has_n_mean_and_range_of_what_was_measured():
    cases = [*rows(3), {"psnr_4095_db": None, "mae_hu": 9.0, "power_above_half": None}]
    table = summary(cases)
    psnrs = [row["psnr_4095_db"] for row in cases[:3]]
    assert list(table) == ["psnr_4095_db", "mae_hu", "power_above_half"]
    assert table["psnr_4095_db"] == {
        "n": 3,
        "mean": pytest.approx(np.mean(psnrs)),
        "min": min(psnrs),
        "max": max(psnrs),
        "interval_95": None,
    }
    assert table["mae_hu"] == {"n": 4, "mean": 4.5, "min": 3, "max": 9, "interval_95": None}
    assert table["power_above_half"] == {"n": 0, "mean": None, "min": None, "max": None, "interval_95": None}


def test_an_interval_stands_from_eight_cases_on():
    assert summary(rows(7))["psnr_4095_db"]["interval_95"] is None
    low, high = summary(rows(8))["psnr_4095_db"]["interval_95"]
    assert low < summary(rows(8))["psnr_4095_db"]["mean"] < high
    assert summary(rows(8))["mae_hu"]["interval_95"] == [3, 3]


def test_the_interval_of_many_cases_is_that_of_the_normal_mean():
    low, high = summary(rows(400))["psnr_4095_db"]["interval_95"]
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.1)  # SD 2, √400


def test_no_cases_give_an_empty_summary():
    assert summary([]) == {}


@pytest.mark.parametrize("name", BANDS)
def test_a_shift_of_one_band_is_the_bias_of_that_band_alone(name):
    pred = REF + np.where(REGIONS.bands[name], np.float32(7), np.float32(0))
    row = score(pred, REF, REGIONS, spacing_z_mm=1)
    for other in BANDS:
        assert row[f"bias_hu_{other}"] == pytest.approx(7 if other == name else 0, abs=1e-4)  # HU; float32


# Lungs


def test_a_lung_of_known_parts():
    # 100 voxels: 10 at −980, 20 at −930, 70 at −850; the rest of the volume is bone and does not count.
    hu = np.full((5, 6, 7), 500, np.int16)
    lung = np.zeros(hu.shape, bool)
    lung.ravel()[np.random.default_rng(0).permutation(hu.size)[:100]] = True
    hu[lung] = np.repeat([-980, -930, -850], [10, 20, 70])
    assert densitometry(hu, lung) == (10, 30, -930)


def test_a_limit_itself_is_not_below_it():
    assert densitometry(np.array([[[-950, -910, -951, -911]]]), np.ones((1, 1, 4), bool))[:2] == (25, 75)


def test_the_percentile_of_a_normal_lung():
    hu = np.random.default_rng(0).normal(-850, 40, (10, 50, 50)).astype(np.float32)
    below_950, _, p15 = densitometry(hu, np.ones(hu.shape, bool))
    assert p15 == pytest.approx(-850 - 1.0364 * 40, abs=1.5)  # HU; its SD over draws is 0.4
    assert below_950 == pytest.approx(0.62, abs=0.2)  # Φ(−2.5), percent


def test_no_lung_has_no_densitometry():
    assert densitometry(np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool)) == (None, None, None)


def test_float32_and_float64_have_the_same_percentile():
    hu = np.random.default_rng(0).normal(-850, 40, (3, 7, 9)).astype(np.float32)
    lung = np.ones(hu.shape, bool)
    assert densitometry(hu, lung) == densitometry(hu.astype(np.float64), lung)


# Agreement with the measurement

RESIDUAL = np.array([[[1.0, -3.0]], [[0.0, 8.0]]])  # (n, H, W)


def test_mean_and_maximum_are_of_the_size():
    assert residual_summary(RESIDUAL, {}) == {
        "residual_mean_hu": 3.0,
        "residual_max_hu": 8.0,
        "residual_counted_percent": 100.0,
    }
    assert residual_summary(-RESIDUAL, {}) == residual_summary(RESIDUAL, {})


def test_what_is_not_valid_counts_nowhere():
    valid = np.array([[[True, True]], [[True, False]]])
    bands = {
        "lung": np.array([[[False, True]], [[True, True]]]),
        "bone": np.array([[[False] * 2], [[False, True]]]),
    }
    assert residual_summary(RESIDUAL, bands, valid) == {
        "residual_mean_hu": pytest.approx(4 / 3),
        "residual_max_hu": 3.0,
        "residual_counted_percent": 75.0,
        "residual_mean_hu_lung": 1.5,
        "residual_mean_hu_bone": None,
    }


def test_nothing_valid_is_no_number():
    found = residual_summary(RESIDUAL, {}, np.zeros(RESIDUAL.shape, bool))
    assert found == {"residual_mean_hu": None, "residual_max_hu": None, "residual_counted_percent": 0.0}


def test_small_float32_residuals_sum_in_float64():
    residual = np.full((4, 512, 512), 0.1, np.float32)
    assert residual_summary(residual, {})["residual_mean_hu"] == pytest.approx(
        float(np.float32(0.1)), rel=1e-12
    )


def test_int16_does_not_wrap():
    lowest = np.full((1, 2, 2), -32768, np.int16)
    assert residual_summary(lowest, {})["residual_max_hu"] == 32768


def test_nan_is_refused():
    with pytest.raises(InputError, match="not finite"):
        residual_summary(np.array([[[np.nan]]]), {})
