from __future__ import annotations

import numpy as np
import pytest

from ctsr.metrics.lung import densitometry


def test_a_lung_of_known_parts():
    # 100 voxels: 10 at −980, 20 at −930, 70 at −850; the rest of the volume is bone and does not count.
    hu = np.full((5, 6, 7), 500, np.int16)
    lung = np.zeros(hu.shape, bool)
    lung.ravel()[np.random.default_rng(0).permutation(hu.size)[:100]] = True
    hu[lung] = np.repeat([-980, -930, -850], [10, 20, 70])
    found = densitometry(hu, lung)
    assert (found.below_950, found.below_910) == (10, 30)
    assert found.p15 == -930


def test_a_limit_itself_is_not_below_it():
    found = densitometry(np.array([[[-950, -910, -951, -911]]]), np.ones((1, 1, 4), bool))
    assert (found.below_950, found.below_910) == (25, 75)


def test_the_percentile_of_a_normal_lung():
    hu = np.random.default_rng(0).normal(-850, 40, (10, 50, 50)).astype(np.float32)
    found = densitometry(hu, np.ones(hu.shape, bool))
    assert found.p15 == pytest.approx(-850 - 1.0364 * 40, abs=1.5)  # HU; its SD over draws is 0.4
    assert found.below_950 == pytest.approx(0.62, abs=0.2)  # Φ(−2.5), percent


def test_no_lung_has_no_densitometry():
    assert densitometry(np.zeros((2, 2, 2)), np.zeros((2, 2, 2), bool)) is None


def test_float32_and_float64_have_the_same_percentile():
    hu = np.random.default_rng(0).normal(-850, 40, (3, 7, 9)).astype(np.float32)
    lung = np.ones(hu.shape, bool)
    assert densitometry(hu, lung) == densitometry(hu.astype(np.float64), lung)
