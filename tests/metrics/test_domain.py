from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.metrics.domain import measured, noise_level, outside_domain
from tests.metrics.thorax import parts, thorax, with_noise


def soft(sd: float, shape: tuple[int, int, int] = (4, 48, 48), seed: int = 0) -> np.ndarray:
    return with_noise(np.full(shape, 40.0, np.float32), sd=sd, seed=seed)


@given(sd=st.floats(2, 60), seed=st.integers(0, 2**31))
def test_the_noise_level_is_that_of_white_noise(sd, seed):
    assert noise_level(soft(sd, seed=seed)) == pytest.approx(sd, rel=0.1)


def test_whole_numbers_read_the_same():
    y = soft(12.0)
    assert noise_level(np.rint(y).astype(np.int16)) == pytest.approx(noise_level(y), rel=0.05)


def test_edges_do_not_move_it():
    """Skin, lungs and bone: one step in 12 pixels, of up to 890 HU, where the noise is 15 HU."""
    chest = with_noise(thorax(), sd=15, seed=1)
    assert noise_level(chest) == pytest.approx(15, rel=0.1)


def test_noise_outside_soft_tissue_does_not_count():
    chest, lung = with_noise(thorax(), sd=10, seed=2), parts()["lung"]
    louder = chest.copy()
    louder[lung] += np.random.default_rng(3).normal(0, 100, int(lung.sum())).astype(np.float32)
    assert noise_level(louder) == pytest.approx(noise_level(chest), rel=0.05)


def test_too_little_soft_tissue_is_no_number():
    air = np.full((4, 48, 48), -1000, np.int16)
    assert noise_level(air) is None
    air[0, 8:28, 8:28] = 40  # 400 pixels
    assert noise_level(air) is None


def test_what_is_measured_of_a_volume():
    y = np.rint(soft(10)).astype(np.int16)
    y[1, 2, 3] = 2900
    found = measured(y, factor=2.0, spacing=5.0, in_plane=0.7, rho=1.2)
    assert found["noise_hu"] == pytest.approx(10, rel=0.1)
    given = {"factor": 2.0, "input_spacing_mm": 5.0, "in_plane_spacing_mm": 0.7, "relative_width": 1.2}
    assert found == given | {"noise_hu": found["noise_hu"], "highest_hu": 2900.0}


MEASURED: dict[str, float | None] = {
    "factor": 2.0, "input_spacing_mm": 5.0, "in_plane_spacing_mm": 0.7, "relative_width": 1.0, "noise_hu": 20.0,
    "highest_hu": 1500.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("ranges", "found"),
    [
        ({}, []),
        ({"input_spacing_mm": (1, 6.5), "relative_width": (0.8, 2)}, []),
        ({"input_spacing_mm": (1, 4.95)}, []),  # 5 mm is within 2 % of its end
        ({"input_spacing_mm": (1, 4.85)}, ["slice spacing 5 mm, trained for 1…4.85"]),
        ({"input_spacing_mm": (5.05, 8)}, []),
        ({"input_spacing_mm": (5.2, 8)}, ["slice spacing 5 mm, trained for 5.2…8"]),
        ({"factor": (3, 5)}, ["factor 2, trained for 3…5"]),
        ({"relative_width": (1.2, 2)}, ["slice thickness / spacing 1, trained for 1.2…2"]),
        (
            {"noise_hu": (0, 10), "highest_hu": (-1024, 1000)},
            ["noise in soft tissue 20 HU, trained for 0…10", "highest value 1500 HU, trained for -1024…1000"],
        ),
        ({"shoe_size": (38, 44)}, []),
    ],
)  # fmt: skip
def test_a_line_for_each_quantity_outside_its_range(ranges, found):
    assert outside_domain(MEASURED, ranges) == found


def test_the_margin_widens_a_range_at_a_negative_end_too():
    at_the_end = MEASURED | {"highest_hu": -1010.0}
    assert outside_domain(at_the_end, {"highest_hu": (-1000.0, 0.0)}) == []
    assert outside_domain(at_the_end, {"highest_hu": (-980.0, 0.0)}) != []


def test_what_could_not_be_measured_is_not_judged():
    assert outside_domain(MEASURED | {"noise_hu": None}, {"noise_hu": (0, 10)}) == []
