from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctsr.diffusion import process
from ctsr.diffusion.flow import Flow
from ctsr.diffusion.schedule import Schedule
from tests.diffusion.test_schedule import schedules

R15 = Schedule.published()
levels = st.tuples(st.floats(0.01, 0.99), st.floats(0.01, 0.99)).filter(lambda two: two[0] < two[1])
paths = st.one_of(schedules, st.builds(Flow, st.floats(0.1, 2)))


def test_steps_composed_are_the_marginal():
    """x_t = x_q + (η_t − η_q)(y₀ − x₀) + κ √(η_t − η_q) ε, t times, for mean and variance."""
    x0, y0, kappa = 0.7, -0.4, R15.kappa
    mean, variance, before = x0, 0.0, 0.0
    for level in R15.levels(15):
        mean += (level**2 - before) * (y0 - x0)
        variance += kappa**2 * (level**2 - before)
        before = level**2
        a, s = R15.coefficients(float(level))
        assert y0 + a * (x0 - y0) == pytest.approx(mean, abs=1e-12)
        assert s**2 == pytest.approx(variance, abs=1e-12)


def test_diffused_latents_have_the_marginal_s_mean_and_variance():
    torch.manual_seed(0)
    n = 100_000
    r = torch.full((3, n), 0.3, dtype=torch.float64)
    level = np.array([0.02, 0.5, 0.99])
    u = process.diffuse(R15, r, torch.randn_like(r), level)
    for row, value in zip(u, level, strict=True):
        s = 2 * value
        assert float(row.mean()) == pytest.approx((1 - value**2) * 0.3, abs=4 * s / n**0.5)
        assert float(row.var()) == pytest.approx(s**2, rel=0.02)


def test_each_sample_of_a_batch_has_its_own_level():
    r, eps = torch.ones(2, 1, 2, 3, 4), torch.full((2, 1, 2, 3, 4), 10.0)
    u = process.diffuse(Flow(0.5), r, eps, np.array([0.2, 1.0]))
    torch.testing.assert_close(u[0], torch.full((1, 2, 3, 4), 0.8 + 0.5 * 0.2 * 10))
    torch.testing.assert_close(u[1], torch.full((1, 2, 3, 4), 5.0))
    assert u.dtype == torch.float32


@given(schedule=schedules, two=levels)
def test_the_posterior_is_the_product_of_two_gaussians(schedule, two):
    """q(x_q | x_t, x₀) ∝ q(x_t | x_q, x₀) q(x_q | x₀), for adjacent and for skipped levels."""
    q, t = two
    eta_q, eta_t, k2 = q * q, t * t, schedule.kappa**2
    x0, y0, x_t = 0.7, -0.4, 1.3
    precision = 1 / (k2 * (eta_t - eta_q)) + 1 / (k2 * eta_q)
    mean = (
        (x_t - (eta_t - eta_q) * (y0 - x0)) / (k2 * (eta_t - eta_q)) + (x0 + eta_q * (y0 - x0)) / (k2 * eta_q)
    ) / precision
    m, k, sigma = process.posterior(schedule, t, q)
    assert y0 + m * (x_t - y0) + k * (x0 - y0) == pytest.approx(mean, abs=1e-11)
    assert sigma**2 * precision == pytest.approx(1, abs=1e-11)
    assert (m, k) == pytest.approx((eta_q / eta_t, (eta_t - eta_q) / eta_t), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "golden"),
    [
        (4, [0, 0.038521258224, 0.577118711042, 0.947296909921]),
        (15, [0, 0.001553378787, 0.030659844915, 0.053528672563, 0.078155581016, 0.105412879083, 0.135730386218,
              0.169415367639, 0.206731615688, 0.247926799116, 0.293243931161, 0.342926860966, 0.397223186933,
              0.456385942297, 0.520674650260]),
    ],
)  # fmt: skip
def test_the_published_posterior_variances(n, golden):
    schedule = Schedule.published(n)
    steps = [0.0, *schedule.levels(n)]
    found = [process.posterior(schedule, t, q)[2] ** 2 for q, t in pairwise(steps)]
    np.testing.assert_allclose(found, golden, atol=1e-11)


@given(schedule=schedules, two=levels)
def test_the_deterministic_step_has_the_coefficients_of_the_map_on_x(schedule, two):
    q, t = two
    m, k, sigma = process.posterior(schedule, t, q, 0.0)
    of_y0 = q * q - q * t
    assert sigma == 0
    assert m == pytest.approx(q / t, abs=1e-12)
    assert k == pytest.approx(1 - q * q + q * t - m, abs=1e-12)
    assert m + k + of_y0 == pytest.approx(1, abs=1e-12)


@given(path=paths, two=levels, s=st.floats(0, 1))
def test_every_step_keeps_the_marginal(path, two, s):
    q, t = two
    (a_t, s_t), (a_q, s_q) = path.coefficients(t), path.coefficients(q)
    m, k, sigma = process.posterior(path, t, q, s)
    assert m * a_t + k == pytest.approx(a_q, abs=1e-12)
    assert (m * s_t) ** 2 + sigma**2 == pytest.approx(s_q**2, abs=1e-12)


@given(path=paths, t=st.floats(0.01, 1), s=st.floats(0, 1))
def test_the_last_step_is_the_prediction_without_noise(path, t, s):
    assert process.posterior(path, t, 0.0, s) == (0, 1, 0)


@given(path=paths, level=st.floats(0.02, 0.99), seed=st.integers(0, 2**32))
def test_noise_and_residual_determine_each_other(path, level, seed):
    generator = torch.Generator().manual_seed(seed)
    r, eps = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    u = process.diffuse(path, r[None], eps[None], np.array([level]))[0]
    torch.testing.assert_close(process.eps_of(u, r, path, level), eps, atol=1e-10, rtol=0)
    torch.testing.assert_close(process.residual_of(u, eps, path, level), r, atol=1e-10, rtol=0)


def test_noise_is_a_function_of_seed_sample_and_step_alone():
    shape = (2, 3, 4, 5)
    noise = process.noise_source(shape, seed=7, samples=[0, 1, 2])
    first, again = noise(3), noise(3)
    noise(9)
    assert first.shape == (3, *shape)
    assert first.dtype == torch.float32
    assert torch.equal(first, again)
    alone = [process.noise_source(shape, seed=7, samples=[sample])(3)[0] for sample in (2, 0, 1)]
    assert torch.equal(first, torch.stack([alone[1], alone[2], alone[0]]))


def test_noise_is_standard_normal_and_differs_by_each_key():
    shape = (100, 100)
    fields = torch.stack(
        [
            process.noise_source(shape, seed=s, samples=[k])(t)[0]
            for s in (0, 1)
            for k in (0, 1)
            for t in (0, 1)
        ]
    ).reshape(8, -1)
    assert fields.mean(dim=1).abs().max() < 4 / 100
    torch.testing.assert_close(torch.corrcoef(fields), torch.eye(8), atol=0.05, rtol=0)
    torch.testing.assert_close(fields.var(dim=1), torch.ones(8), atol=0.06, rtol=0)


def test_noise_stays_what_it_was():
    """A sample is made again from its seed: this number may change only with a note in the changelog."""
    found = process.noise_source((2, 2), seed=1, samples=[2])(3)
    torch.testing.assert_close(
        found.flatten(), torch.tensor([-1.79393, -0.147456, 2.251195, 0.513257]), atol=1e-6, rtol=0
    )
