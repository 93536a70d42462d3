from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctsr.diffusion.flow import Flow
from ctsr.diffusion.process import eps_of, noise_source, posterior, residual_of
from ctsr.diffusion.sampler import guided, log_snr, sample
from ctsr.diffusion.schedule import Schedule, noise_level
from tests.diffusion.gaussian import MU, TAU2, M, S, V, Y, oracle, posterior_mean, remaining, response

R15 = Schedule.published()
KINDS = [
    {"kind": "multistep"},
    {"kind": "ddim"},
    {"kind": "ancestral"},
    {"kind": "ancestral", "s": 0.5},
    {"kind": "ancestral", "error": lambda level: 0.01},
]
PATHS = [R15, Schedule.ctsr(0.6), Flow(0.3)]
SHAPE = (2, 4, 3, 3)  # C, D, H, W

# steps, (M, P) at s = 0, P/V at s = 0.5, (M, P) at s = 1: an exact linear recursion, confirmed by Monte Carlo
GOLDEN = [
    (1, (0.90344861, 0.00000012), 0.00000, (0.90344861, 0.00000012)),
    (2, (0.90348571, 0.00148774), 0.04305, (0.90344935, 0.00146294)),
    (4, (0.90352477, 0.00621337), 0.16894, (0.90346301, 0.00342032)),
    (15, (0.90357924, 0.01821469), 0.50289, (0.90346444, 0.01286840)),
    (25, (0.90359275, 0.02216440), 0.61566, (0.90346452, 0.01673950)),
    (100, (0.90361293, 0.02878898), 0.81375, (0.90346460, 0.02484788)),
    (1000, (0.90362233, 0.03217218), 0.92597, (0.90346462, 0.03088054)),
]


def latents(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x0, y0 = torch.randn(2, 2, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    return x0, y0


@pytest.mark.parametrize(("n", "ddim", "half", "ancestral"), GOLDEN)
def test_mean_and_variance_on_the_gaussian_problem(n, ddim, half, ancestral):
    assert response(sample, R15, n_steps=n, kind="ddim") == pytest.approx(ddim, abs=1e-8)
    assert response(sample, R15, n_steps=n, kind="ancestral") == pytest.approx(ancestral, abs=1e-8)
    assert response(sample, R15, n_steps=n, kind="ancestral", s=0.5)[1] / V == pytest.approx(half, abs=1e-5)


@pytest.mark.parametrize(
    ("kappa", "ddim", "ancestral"), [(1, 0.64664, 0.49554), (0.5, 0.79029, 0.68609), (0.2, 0.84142, 0.79965)]
)
def test_less_noise_keeps_more_of_the_spread(kappa, ddim, ancestral):
    schedule = Schedule(min(0.04 / kappa, 0.04), 0.99, 0.3, kappa)
    assert response(sample, schedule, n_steps=15, kind="ddim")[1] / V == pytest.approx(ddim, abs=1e-5)
    assert response(sample, schedule, n_steps=15, kind="ancestral")[1] / V == pytest.approx(
        ancestral, abs=1e-5
    )


@pytest.mark.parametrize(
    ("power", "steps"),
    [
        (0.3, {8: 0.80797, 15: 1.02059, 25: 1.06868}),
        (0.5, {8: 1.02612, 15: 1.03066, 25: 0.99595}),
        (0.8, {8: 0.97224, 15: 0.96547, 25: 0.95917}),
    ],
)
def test_the_multistep_solver_on_the_gaussian_problem(power, steps):
    schedule = Schedule(0.02, 0.99, power, 2.0)
    found = {n: response(sample, schedule, n_steps=n)[1] / V for n in steps}
    assert found == pytest.approx(steps, abs=1e-5)


@pytest.mark.parametrize(
    ("k", "ddim", "ancestral", "multistep"),
    [(2, 0.848, 0.786, 0.987), (3, 0.847, 0.762, 1.010), (5, 0.834, 0.723, 1.042), (10, 0.800, 0.662, 1.094)],
)
def test_the_preset_of_ctsr_keeps_the_spread(k, ddim, ancestral, multistep):
    schedule = Schedule.ctsr(k * math.sqrt(V), V)
    found = [
        response(sample, schedule, n_steps=15, kind=kind)[1] / V
        for kind in ("ddim", "ancestral", "multistep")
    ]
    assert found == pytest.approx([ddim, ancestral, multistep], abs=6e-4)


def test_a_sample_of_many_voxels_has_that_mean_and_variance():
    n = 200_000
    y0 = torch.full((1, n), Y)
    noise = noise_source((n,), seed=5, samples=[0])
    for kind in ("ancestral", "multistep"):
        mean, variance = response(sample, R15, n_steps=15, kind=kind)
        made = sample(oracle(R15, M - Y, V), y0, R15, n_steps=15, kind=kind, noise=noise)
        assert float(made.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
        assert float(made.var()) == pytest.approx(variance, rel=0.03)


def test_what_remains_unknown_at_each_level():
    golden = [0.044376, 0.620788, 0.793419, 0.876295, 0.921750, 0.948956, 0.966255, 0.977726, 0.985543, 0.990943,
              0.994669, 0.997184, 0.998790, 0.999682, 0.999997]  # fmt: skip
    found = [remaining(R15, float(level), V) / V for level in R15.levels(15)]
    np.testing.assert_allclose(found, golden, atol=1e-6)


@pytest.mark.parametrize("n", [2, 4, 15])
@pytest.mark.parametrize("s", [0.0, 0.5, 1.0])
def test_with_the_denoiser_s_error_added_any_number_of_steps_has_the_right_spread(n, s):
    options = {"n_steps": n, "kind": "ancestral", "s": s, "is_exact": True}
    _, variance = response(sample, R15, error=lambda level: remaining(R15, level, V), **options)
    assert variance / V == pytest.approx(0.955624, abs=1e-6)  # the last step adds none …
    last = remaining(R15, float(R15.levels(n)[0]), V)
    assert variance + last == pytest.approx(V, abs=1e-9)  # … and that is all that is missing


@pytest.mark.parametrize(
    ("k", "db"), [(1, 3.0103), (2, 1.7609), (4, 0.9691), (8, 0.5115), (16, 0.2633), (32, 0.1336)]
)
def test_the_mean_of_k_samples_costs_what_theory_says(k, db):
    """Exact posterior samples, by the corrected sampler, on the whole problem: x₀ and y drawn too."""
    n = 20_000
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, n, generator=generator)
    x0 = MU + math.sqrt(S) * x0
    y = x0 + math.sqrt(TAU2) * noise
    best = posterior_mean(y)
    schedule = Schedule(0.002, 0.99, 0.5, 0.6)
    made = sample(
        oracle(schedule, best - y, V), y.expand(k, n), schedule, n_steps=4, kind="ancestral",
        error=lambda level: remaining(schedule, level, V), noise=noise_source((n,), seed=1, samples=range(k)),
    )  # fmt: skip
    loss = 10 * math.log10(((made.mean(dim=0) - x0) ** 2).mean() / ((best - x0) ** 2).mean())
    assert loss == pytest.approx(db, abs=0.06)  # 4 standard errors at 20 000 voxels
    assert 10 * math.log10(1 + 1 / k) == pytest.approx(db, abs=1e-4)


@pytest.mark.parametrize(("n", "ancestral", "ddim"), [(15, 1.4454, 1.8960), (4, 0.421, 0.729), (1, 0.0, 0.0)])
def test_a_narrow_sampler_costs_less(n, ancestral, ddim):
    found = [
        10 * math.log10(1 + response(sample, R15, n_steps=n, variance=0.04, kind=kind)[1] / 0.04)
        for kind in ("ancestral", "ddim")
    ]
    assert found == pytest.approx([ancestral, ddim], abs=6e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("n", [1, 2, 15])
def test_who_knows_the_answer_returns_it_bit_for_bit(path, options, n):
    x0, y0 = latents()
    r = x0 - y0
    noise = noise_source(SHAPE, seed=0, samples=[0, 1])
    made = sample(lambda u, tau, level: r, y0, path, n_steps=n, noise=noise, **options)
    assert torch.equal(made, y0 + r)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("options", KINDS)
def test_a_network_that_says_nothing_leaves_stage_one_bit_for_bit(path, options):
    _, y0 = latents()
    noise = noise_source(SHAPE, seed=0, samples=[0, 1])
    made = sample(lambda u, tau, level: torch.zeros_like(u), y0, path, noise=noise, **options)
    assert torch.equal(made, y0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["ddim", "multistep"])
def test_the_deterministic_path_keeps_its_noise(path, kind):
    """u = a r + s ε with the ε of the start, for a denoiser that knows r: `multistep` is then `ddim`."""
    _, y0 = latents(torch.float64)
    r = torch.linspace(-1, 1, y0.numel(), dtype=torch.float64).view_as(y0)
    eps = noise_source(SHAPE, seed=0, samples=[0, 1])(0).double()
    a_T, s_T = path.coefficients(float(path.levels(1)[0]))
    seen = []

    def denoise(u, tau, level):
        a, s = path.coefficients(level)
        torch.testing.assert_close(u, a * r + s * eps, atol=1e-12, rtol=0)
        seen.append(tau == float(noise_level(level)))
        return r

    sample(
        denoise, y0, path, kind=kind, noise=lambda step: eps + a_T / s_T * r
    )  # as the true marginal starts
    assert seen == [True] * 15


@given(q=st.floats(0.01, 0.98), step=st.floats(1e-3, 0.5), kappa=st.floats(0.1, 5))
def test_the_deterministic_step_is_the_exponential_integrator(q, step, kappa):
    """u_q = (s_q/s_t) u_t − a_q (e^(−h) − 1) r̂, with h the step of log-SNR (Lu et al. 2022)."""
    t, path = min(q + step, 0.99), Schedule(0.005, 0.99, 0.5, kappa)
    h = log_snr(path, q) - log_snr(path, t)
    m, k, _ = posterior(path, t, q, 0.0)
    assert k == pytest.approx(-path.coefficients(q)[0] * math.expm1(-h), abs=1e-12)
    assert m == pytest.approx(q / t)


def test_the_multistep_solver_extrapolates_by_half_of_its_last_step():
    """Two steps by hand."""
    path, levels = R15, R15.levels(3)[::-1].tolist()
    answers = iter([0.5, 0.8, 0.9])
    states = []

    def denoise(u, tau, level):
        states.append(float(u))
        return torch.full_like(u, next(answers))

    y0 = torch.zeros(1, dtype=torch.float64)
    made = sample(denoise, y0, path, n_steps=3, noise=lambda step: torch.ones(1, dtype=torch.float64))
    lam = [math.log((1 - e * e) / (2 * e)) for e in levels]
    u1 = levels[1] / levels[0] * 1.98 - (1 - levels[1] ** 2) * math.expm1(lam[0] - lam[1]) * 0.5
    D = 0.8 + 0.3 * (lam[2] - lam[1]) / (2 * (lam[1] - lam[0]))
    u2 = levels[2] / levels[1] * u1 - (1 - levels[2] ** 2) * math.expm1(lam[1] - lam[2]) * D
    assert states == pytest.approx([1.98, u1, u2], abs=1e-12)
    assert float(made) == 0.9


def test_the_start_is_the_same_for_every_number_of_steps():
    _, y0 = latents()
    first = []
    for n in (1, 4, 15):
        seen = []
        noise = noise_source(SHAPE, seed=0, samples=[0, 1])
        sample(lambda u, tau, level, to=seen: to.append(u) or u, y0, R15, n_steps=n, noise=noise)
        first.append(seen[0])
    assert all(torch.equal(first[0], other) for other in first)


def test_a_batch_and_its_parts_give_the_same_samples():
    _, y0 = latents()
    denoise = oracle(R15, 0.1, V)

    def made(samples):
        noise = noise_source(SHAPE, seed=9, samples=samples)
        return sample(denoise, y0[samples], R15, kind="ancestral", noise=noise)

    whole = made([0, 1])
    assert torch.equal(whole, made([0, 1]))
    assert torch.equal(whole, torch.cat([made([0]), made([1])]))


def test_the_state_is_float32_where_latents_are_half():
    _, y0 = latents(torch.bfloat16)
    noise = noise_source(SHAPE, seed=0, samples=[0, 1])
    seen = set()
    made = sample(lambda u, tau, level: seen.add(u.dtype) or (0 * u).bfloat16(), y0, R15, noise=noise)
    assert seen == {torch.float32}
    assert made.dtype == torch.float32


def test_progress_counts_the_steps():
    _, y0 = latents()
    steps = []
    noise = noise_source(SHAPE, seed=0, samples=[0, 1])
    sample(lambda u, tau, level: u, y0, R15, n_steps=5, noise=noise, progress=steps.append)
    assert steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "options", [{"kind": "ddim", "s": 1.5}, {"s": 0.5}, {"kind": "ancestral", "s": math.nan}]
)
def test_a_share_of_noise_that_has_no_meaning_is_refused(options):
    _, y0 = latents()
    with pytest.raises(ValueError, match="share of fresh noise"):
        sample(lambda u, tau, level: u, y0, R15, noise=noise_source(SHAPE, seed=0, samples=[0, 1]), **options)


def test_noise_of_another_shape_is_refused():
    _, y0 = latents()
    with pytest.raises(ValueError, match="noise"):
        sample(lambda u, tau, level: u, y0, R15, noise=noise_source(SHAPE, seed=0, samples=[0]))


def test_guidance_of_one_is_the_condition_alone():
    def null(u, tau, level):
        raise AssertionError("called")

    def cond(u, tau, level):
        return u

    assert guided(null, cond, 1.0) is cond


@given(w=st.floats(-1, 8), seed=st.integers(0, 2**32))
def test_guidance_is_affine_and_the_same_on_noise_and_on_the_residual(w, seed):
    generator = torch.Generator().manual_seed(seed)
    u, null, cond = torch.randn(3, 20, dtype=torch.float64, generator=generator)
    made = guided(lambda *_: null, lambda *_: cond, w)(u, 0.5, 0.6)
    torch.testing.assert_close(made, (1 - w) * null + w * cond, atol=1e-12, rtol=1e-12)
    eps_null, eps_cond = (eps_of(u, r, R15, 0.6) for r in (null, cond))
    by_noise = residual_of(u, eps_null + w * (eps_cond - eps_null), R15, 0.6)
    torch.testing.assert_close(made, by_noise, atol=1e-11, rtol=1e-11)
