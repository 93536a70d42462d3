from __future__ import annotations

import numpy as np
import pytest

from ctsr.errors import InputError
from ctsr.metrics.consistency import residual_summary

RESIDUAL = np.array([[[1.0, -3.0]], [[0.0, 8.0]]])  # (n, H, W)


def test_mean_and_maximum_are_of_the_size():
    assert residual_summary(RESIDUAL) == {
        "residual_mean_hu": 3.0,
        "residual_max_hu": 8.0,
        "residual_counted_percent": 100.0,
    }
    assert residual_summary(-RESIDUAL) == residual_summary(RESIDUAL)


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
    found = residual_summary(RESIDUAL, valid=np.zeros(RESIDUAL.shape, bool))
    assert found == {"residual_mean_hu": None, "residual_max_hu": None, "residual_counted_percent": 0.0}


def test_small_float32_residuals_sum_in_float64():
    residual = np.full((4, 512, 512), 0.1, np.float32)
    assert residual_summary(residual)["residual_mean_hu"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_int16_does_not_wrap():
    lowest = np.full((1, 2, 2), -32768, np.int16)
    assert residual_summary(lowest)["residual_max_hu"] == 32768


def test_nan_is_refused():
    with pytest.raises(InputError, match="not finite"):
        residual_summary(np.array([[[np.nan]]]))
