from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctsr.diffusion.schedule import Flow, Schedule, diffuse, kappa_for, noise_level

R15 = """0.0200000000 0.1171650823 0.1763045553 0.2336289165 0.2915741278 0.3510092843 0.4123561443 0.4758577309
0.5416716776 0.6099099334 0.6806580171 0.7539852625 0.8299506624 0.9086063878 0.9900000000"""
P15 = """0.0200000000 0.1176731329 0.1772462251 0.2350386559 0.2934926230 0.3534793133 0.4154216068 0.4795633512
0.5460629102 0.6150329401 0.6865596724 0.7607131696 0.8375531736 0.9171326249 0.9994998749"""

schedules = st.builds(
    Schedule,
    sqrt_eta_1=st.floats(0.003, 0.3),
    sqrt_eta_T=st.floats(0.9, 0.9999),
    power=st.floats(0.2, 2),
    kappa=st.floats(0.1, 5),
)


def golden(text: str) -> np.ndarray:
    return np.array(text.split(), float)


def test_the_published_15_steps():
    np.testing.assert_allclose(Schedule.published().levels(15), golden(R15), atol=1e-10)
    assert Schedule.published().kappa == 2


def test_the_paper_s_end_points():
    schedule = Schedule(0.02, math.sqrt(0.999), 0.3, 2.0)
    np.testing.assert_allclose(schedule.levels(15), golden(P15), atol=1e-10)


def test_the_published_4_steps():
    np.testing.assert_allclose(
        Schedule.published(4).levels(4), [0.1, 0.5200963722, 0.7613819906, 0.99], atol=1e-10
    )


def test_25_steps_lie_on_the_curve_of_15():
    found = Schedule.published().levels(25)
    np.testing.assert_allclose(found[[1, 12, 23]], [0.0899846250, 0.4758577309, 0.9421850563], atol=1e-10)


@given(schedule=schedules, n=st.integers(2, 1000))
def test_levels_rise_between_both_ends_and_their_steps_add_up(schedule, n):
    levels = schedule.levels(n)
    assert levels.dtype == np.float64
    assert levels[0] == pytest.approx(schedule.sqrt_eta_1, abs=1e-12)
    assert levels[-1] == pytest.approx(schedule.sqrt_eta_T, abs=1e-12)
    assert (np.diff(levels) > 0).all()
    assert np.diff(levels**2, prepend=0.0).sum() == pytest.approx(schedule.sqrt_eta_T**2, abs=1e-14)


@pytest.mark.parametrize("path", [Schedule.published(), Schedule.ctsr(0.5), Flow(0.3)])
def test_one_step_is_the_noisiest_and_none_is_refused(path):
    assert path.levels(1)[0] == path.levels(15)[-1]
    with pytest.raises(ValueError, match="0 diffusion steps"):
        path.levels(0)


def test_the_curve_is_the_paper_s_form():
    schedule, T = Schedule.published(), 15
    b0 = math.exp(math.log(0.99 / 0.02) / (T - 1))
    beta = (np.arange(T) / (T - 1)) ** 0.3 * (T - 1)
    np.testing.assert_allclose(schedule.levels(T), 0.02 * b0**beta, atol=1e-14)


@given(variance=st.floats(1e-3, 0.1), rms=st.floats(0.05, 1))
def test_the_preset_hides_the_residual_and_ends_at_a_tenth_of_the_spread(variance, rms):
    kappa = kappa_for(rms, variance)
    schedule = Schedule.ctsr(kappa, variance)
    assert kappa >= rms
    assert kappa >= 3 * math.sqrt(variance) - 1e-12
    assert schedule.sqrt_eta_1 == pytest.approx(max(0.1 * math.sqrt(variance) / kappa, 0.003))
    assert (schedule.power, schedule.sqrt_eta_T) == (0.5, 0.99)


def test_the_preset_takes_the_variance_from_kappa_where_it_is_not_given():
    assert Schedule.ctsr(0.75) == Schedule.ctsr(0.75, 0.25**2)
    assert Schedule.ctsr(0.75).sqrt_eta_1 == pytest.approx(1 / 30)


@pytest.mark.parametrize(
    "values", [(0, 0.99, 0.3, 2), (0.5, 0.4, 0.3, 2), (0.02, 1.0, 0.3, 2), (0.02, 0.99, 0, 2), (0.02, 0.99, 0.3, 0),
               (math.nan, 0.99, 0.3, 2), (0.02, 0.99, 0.3, math.nan)]
)  # fmt: skip
def test_what_is_no_schedule_is_refused(values):
    with pytest.raises(ValueError, match="do not hold"):
        Schedule(*values)


def test_the_embedded_level_is_a_logarithm_between_fixed_bounds():
    assert noise_level(0.003) == 0
    assert noise_level(1.0) == 1
    assert noise_level(1e-9) == 0
    assert noise_level(math.sqrt(0.003)) == pytest.approx(0.5)
    np.testing.assert_allclose(noise_level(np.array([0.02, 0.99])), [0.326575, 0.998270], atol=1e-6)


@given(schedule=schedules, n=st.integers(1, 64), seed=st.integers(0, 2**32))
def test_levels_to_train_on_lie_on_the_path(schedule, n, seed):
    for path, lowest in ((schedule, schedule.sqrt_eta_1), (Flow(0.3), 0.0)):
        levels = path.draw(np.random.default_rng(seed), n)
        assert levels.shape == (n,)
        assert levels.min() >= lowest * (1 - 1e-12)
        assert levels.max() <= path.levels(1)[0] * (1 + 1e-12)


def test_training_is_stratified_and_visits_the_least_noise():
    schedule, generator = Schedule.published(), np.random.default_rng(0)
    drawn = np.stack([schedule.draw(generator, 30) for _ in range(2000)])
    least = drawn == schedule.sqrt_eta_1
    assert least.mean() == pytest.approx(1 / 15, abs=5 * math.sqrt(1 / 15 / drawn.size))
    middle = (drawn > schedule.curve(0.5)).sum(axis=1)  # 15 of 30 lie above, less those set to the least
    assert middle.max() == 15
    levels = Flow(1.0).draw(generator, 30)
    np.testing.assert_array_equal(np.sort(np.floor(30 * (1 - levels))), np.arange(30))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_flow_without_a_size_is_refused(scale):
    with pytest.raises(ValueError, match="size"):
        Flow(scale)


def test_the_noisiest_level_of_a_flow_is_noise_alone():
    r, eps = torch.ones(1, 4), torch.arange(4.0)[None]
    assert torch.equal(diffuse(Flow(0.5), r, eps, np.array([1.0])), 0.5 * eps)


def test_no_level_to_train_on_is_without_noise():
    class Lowest:
        """A generator at the lower end of what it may draw."""

        def permutation(self, n):
            return np.arange(n)

        def random(self, n):
            return np.zeros(n)

    np.testing.assert_allclose(Flow(1.0).draw(Lowest(), 4), [1, 0.75, 0.5, 0.25])
