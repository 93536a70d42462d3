from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctsr.diffusion.flow import Flow, heun
from ctsr.diffusion.process import diffuse, noise_source
from ctsr.diffusion.sampler import sample
from tests.diffusion.gaussian import response


@pytest.mark.parametrize(
    ("n", "euler", "golden"),
    [(4, 0.5184, 0.90326016), (8, 0.7239, 0.97983864), (15, 0.84227, 0.99486136), (25, 0.90223, None)],
)
def test_rectified_flow_on_a_unit_gaussian(n, euler, golden):
    """Euler is `ddim` on the flow's path; Heun as an independent recursion has it, its last step an Euler step."""
    unit = {"mean": 0.0, "variance": 1.0, "y": 0.0}
    assert response(sample, Flow(1.0), n_steps=n, kind="ddim", **unit)[1] == pytest.approx(euler, abs=5e-5)
    if golden is not None:
        assert response(heun, Flow(1.0), n_steps=n, **unit)[1] == pytest.approx(golden, abs=1e-7)


@given(scale=st.floats(0.1, 3), mean=st.floats(-1, 1))
def test_a_flow_scales_with_its_residual(scale, mean):
    made, spread = response(heun, Flow(scale), n_steps=8, mean=scale * mean, variance=scale**2, y=0.0)
    assert made == pytest.approx(scale * mean, abs=1e-12)
    assert spread == pytest.approx(0.97983864 * scale**2, rel=1e-8)


def test_heun_keeps_the_answer_and_stage_one_bit_for_bit_in_15_calls():
    r, y0 = torch.randn(2, 1, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    noise = noise_source((3, 4, 5), seed=0, samples=[0])
    calls, steps = [], []

    def denoise(u, tau, level):
        calls.append(level)
        return r

    made = heun(denoise, y0, Flow(0.3), n_steps=8, noise=noise, progress=steps.append)
    assert torch.equal(made, y0 + r)
    assert len(calls) == 15
    assert steps == list(range(1, 9))
    assert torch.equal(heun(lambda u, *_: 0 * u, y0, Flow(0.3), noise=noise), y0)


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
