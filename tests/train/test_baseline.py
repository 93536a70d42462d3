"""What a step and a validation of the slice-doubling network are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.utils.data import default_collate

from ctsr.errors import InputError
from ctsr.metrics.fidelity import psnr, ssim
from ctsr.metrics.masks import body_mask
from ctsr.physics.operator import apply_along_z, grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.train import baseline
from ctsr.train.loop import Stopped, heeding
from tests.train import tiny


class _Adds(torch.nn.Module):
    """A "network" that adds so many HU everywhere, or what it is given."""

    def __init__(self, change: float | torch.Tensor) -> None:
        super().__init__()
        self.change = torch.nn.Parameter(torch.as_tensor(change), requires_grad=False)

    def forward(self, y, inverse, rho):
        return self.change.expand_as(inverse)

    def stream(self, y, inverse, rho, *, chunk):
        made = self.change.expand(1, 1, *inverse.shape)[0, 0].numpy()
        yield from (made[2 * start : 2 * (start + chunk)] for start in range(0, len(y), chunk))


@pytest.fixture(scope="module")
def task():
    return tiny.task()


def batch_of(task, *indices: int) -> dict[str, torch.Tensor]:
    return default_collate([task.dataset[i] for i in indices])


def narrow(task) -> dict[str, torch.Tensor]:
    """A pair whose projection is exact: t/s below 1.4."""
    return next(b for b in (batch_of(task, i) for i in range(20)) if float(b["rho"]) < 1.4)


def test_the_truth_itself_costs_nothing(task):
    batch = narrow(task)
    loss, usual = (task.loss(_Adds(x), batch) for x in (batch["truth"] - batch["inverse"], 0.0))
    assert 0 <= float(loss) < 1e-4
    assert float(usual) > 100 * float(loss)


def test_what_the_measurement_determines_costs_nothing(task):
    """What the projection would take away again, the loss does not see."""
    batch = narrow(task)
    change = 50 * torch.randn(batch["truth"].shape, generator=torch.Generator().manual_seed(0))
    free = baseline._along_z(batch["null"], change)
    usual, measured, invented = (float(task.loss(_Adds(x), batch)) for x in (0.0, change - free, free))
    assert measured == pytest.approx(usual, abs=1e-5)
    assert invented > 2 * usual


def test_validation_scores_beside_cubic_and_inverse_on_the_same_voxels(task):
    """Against a plain computation: SciPy's spline for cubic, the mask of the truth for all."""
    truth = tiny.body(3).astype(np.float32)
    found = task.validate(_Adds(0.0), lambda *done: None)
    A = grid_operator(baseline.ZGrid(8, 2.0), SliceProfile(), spacing=2.0, thickness=2.0)
    thick = apply_along_z(A, truth)
    at = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7)
    grid = np.meshgrid(at, np.arange(24), np.arange(24), indexing="ij")
    cubic = map_coordinates(thick.astype(np.float64), grid, order=3, mode="mirror")
    body = body_mask(truth)
    assert found["cubic_psnr_4095_db"] == pytest.approx(psnr(cubic, truth, body, peak=4095), abs=1e-3)
    assert found["added_db"] == 0
    assert found["residual_rms_hu"] == 0
    assert found["gain_db"] == pytest.approx(found["psnr_4095_db"] - found["cubic_psnr_4095_db"])
    assert found["gain_db"] > 0.5  # `inverse` is better than cubic: only added_db tells a dead network


def test_a_better_network_scores_better(task):
    truth = torch.from_numpy(tiny.body(3).astype(np.float32))[None, None]
    found = task.validate(_Adds(truth / 10), lambda *done: None)
    assert found["residual_rms_hu"] > 0.1
    assert found["added_db"] > 0.1


def test_an_odd_number_of_slices_is_validated_without_the_last(task):
    odd = replace(tiny.volume(3), hu=np.concatenate([tiny.body(3), tiny.body(3)[:1]]))
    other = baseline.BaselineTask(task.model, [tiny.volume(1)], [odd], recipe=tiny.RECIPE, seed=0, card={})
    assert other.validate(_Adds(0.0), lambda *done: None) == task.validate(_Adds(0.0), lambda *done: None)


def test_a_long_scan_is_validated_in_chunks(task):
    long = replace(tiny.volume(3), hu=np.concatenate([tiny.body(i) for i in range(5)]))
    other = baseline.BaselineTask(task.model, [tiny.volume(1)], [long], recipe=tiny.RECIPE, seed=0, card={})
    asked = []
    other.validate(_Adds(0.0), lambda: asked.append(1))
    assert len(asked) == 3  # 40 thick slices: 16, 16 and 8
    with pytest.raises(Stopped):
        other.validate(_Adds(0.0), heeding(lambda: 15))


@pytest.mark.parametrize(("hu", "words"), [(-1000, "nothing to validate on"), (40, "cubic rebuilds it")])
def test_a_scan_that_cannot_judge_is_refused_at_the_start(task, hu, words):
    scan = replace(tiny.volume(3, name="flat.nii"), hu=np.full((8, 24, 24), hu, np.int16))
    with pytest.raises(InputError, match=words) as told:
        baseline.BaselineTask(task.model, [tiny.volume(1)], [scan], recipe=tiny.RECIPE, seed=0, card={})
    assert told.value.path == "flat.nii"


def test_the_loss_has_the_ssim_that_is_reported():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 300, (2, 1, 24, 30))
    ours = baseline._ssim(*(torch.from_numpy(x)[None] for x in (a, b)), data_range=4095.0)
    assert float(ours) == pytest.approx(float(ssim(a, b, plane="axial")), abs=1e-6)  # its taps are float32
