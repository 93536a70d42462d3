"""What a sample, a step and a validation of the autoencoder are, and that its training goes on as if never stopped."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from ctsr.data.pairs import PairSource, TrainVolume
from ctsr.errors import InputError
from ctsr.metrics.fidelity import difference, psnr
from ctsr.metrics.masks import Regions
from ctsr.models.vae import CtVae, VaeConfig
from ctsr.train.loop import Heed, Stopped, heeding, is_idle
from ctsr.train.vae import BlockTransform, VaeLoss, VaeTask, usual_kl_weight
from tests.train import tiny

RECIPE = replace(tiny.RECIPE, patch=(16, 16, 16))
BLOCK, KEEP = (2, 4, 4), 8


def scan(seed: int) -> TrainVolume:
    """A body without the jump of one voxel at its skin, which no latent of this size holds."""
    hu = ndimage.gaussian_filter(tiny.body(seed, (24, 40, 40)).astype(np.float32), 0.7)
    return TrainVolume(f"scan{seed}", hu.astype(np.int16), (1.0, 0.8, 0.8), 1.0, True, content=str(seed))


def network(seed: int = 0) -> CtVae:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CtVae(VaeConfig.preset("tiny"))


def whole(model: CtVae, hu: np.ndarray, heed: Heed) -> np.ndarray:
    """A round trip without tiles."""
    heed()
    x = torch.from_numpy(hu)[None, None] / model.config.hu_scale
    return model(x)[0][0, 0].detach().numpy() * model.config.hu_scale


def make(*, seed: int = 0, round_trip=whole, val: TrainVolume | None = None, **changes) -> VaeTask:
    model = network(seed)
    loss = changes.pop("loss", None) or VaeLoss(kl=usual_kl_weight(model))
    return VaeTask(
        model, [scan(1), scan(2)], [val or scan(3)], recipe=RECIPE, seed=seed, card={}, loss=loss,
        round_trip=round_trip, **changes,
    )  # fmt: skip


class _Gives(torch.nn.Module):
    """A "network" whose round trip is off by `error`, in HU, with a posterior as given."""

    def __init__(self, error, mean=0.0, logvar=0.0) -> None:
        super().__init__()
        self.error, self.mean, self.logvar = (torch.as_tensor(v) for v in (error, mean, logvar))

    def forward(self, x, noise):
        return x + self.error / 1000, self.mean.expand_as(noise), self.logvar.expand_as(noise)


def loss_of(task: VaeTask, model: torch.nn.Module) -> float:
    hu = torch.zeros(1, 1, 16, 32, 32)
    return float(task.loss(model, {"hu": hu, "noise": torch.zeros(1, 8, 8, 8, 8)}))


def test_a_sample_depends_on_seed_and_index_alone():
    a, b, other = make().dataset, make().dataset, make(seed=1).dataset
    b[5]
    for name in ("hu", "noise"):
        assert np.array_equal(a[3][name], b[3][name])
        assert not np.array_equal(a[3][name], other[3][name])
    assert a[3]["hu"].shape == (1, 16, 16, 16)
    assert a[3]["noise"].shape == (8, 8, 4, 4)


def test_some_patches_are_truths_of_pairs_and_the_others_restored_from_thick_slices():
    source = PairSource([scan(1)], RECIPE, seed=0)
    truths, restored, mixed = (
        [source.patch(i, restored_share=s) for i in range(40)] for s in (0.0, 1.0, 0.3)
    )
    assert all(np.array_equal(t, source.pair(i).truth) for i, t in enumerate(truths))
    rough = [float(np.abs(np.diff(np.stack(each), axis=1)).mean()) for each in (truths, restored)]
    assert 0 < rough[1] < 0.97 * rough[0]  # what two slices differ by is partly gone …
    assert np.mean(restored) == pytest.approx(np.mean(truths), abs=2)  # … and nothing else
    found = [any(np.array_equal(m, kind[i]) for kind in (truths, restored)) for i, m in enumerate(mixed)]
    assert all(found)
    assert 0.5 < np.mean([np.array_equal(m, t) for m, t in zip(mixed, truths, strict=True)]) < 0.9


def test_a_perfect_round_trip_costs_only_the_divergence_of_its_posterior():
    """The golden mean of two elements; of a mean, so that no size changes it."""
    task = make(loss=VaeLoss(kl=0.01))
    assert loss_of(task, _Gives(0.0)) == 0
    mean, logvar = (torch.tensor(v).repeat(4) for v in ([0.5, -1.0], [0.2, -0.5]))
    assert loss_of(task, _Gives(0.0, mean, logvar)) == pytest.approx(0.01 * 0.34448335, rel=1e-5)


def test_the_usual_weight_is_that_of_sums():
    """1e-6 × sum over latents beside a sum over voxels, each divided by the number of voxels."""
    assert usual_kl_weight(network()) == pytest.approx(2.5e-7)
    assert usual_kl_weight(CtVae(VaeConfig(z_strides=(1,), latent_channels=4))) == pytest.approx(2.5e-7)


def test_a_shift_of_all_costs_more_than_noise_and_jumps_along_z_more_than_both():
    task = make(loss=VaeLoss(kl=0.0, gradient=0.5, bias=1.0))
    z, y = torch.arange(16).view(-1, 1, 1), torch.arange(32).view(1, -1, 1)
    in_plane, along_z = (20.0 * (1 - 2 * (at % 2)) * torch.ones(16, 32, 32) for at in (y, z))
    assert loss_of(task, _Gives(20.0)) == pytest.approx(
        0.02 + 0.02, rel=1e-4
    )  # its size, and the mean of each block
    assert loss_of(task, _Gives(in_plane)) == pytest.approx(0.02, rel=1e-4)
    assert loss_of(task, _Gives(along_z)) == pytest.approx(0.02 + 0.5 * 0.04, rel=1e-4)


@given(size=st.tuples(*[st.integers(1, 11)] * 3), seed=st.integers(0, 99))
def test_a_block_transform_that_keeps_all_changes_nothing(size, seed):
    hu = np.random.default_rng(seed).normal(0, 300, size)
    back = BlockTransform([hu], BLOCK, 32).round_trip(hu)
    assert back.shape == size
    np.testing.assert_allclose(back, hu, atol=1e-3)  # HU; float32


def test_no_linear_transform_of_blocks_beats_the_one_learnt_from_them():
    """Cosines, with which the network starts, do as well as they can and less well; so does another's transform."""
    hu = scan(1).hu.astype(np.float32)
    own, other = (BlockTransform([scan(seed).hu], BLOCK, KEEP).round_trip(hu) for seed in (1, 2))
    cosines = whole(network(), hu, lambda: None)
    errors = [float(np.square(x - hu).mean()) for x in (own, other, cosines)]
    assert errors[0] < min(errors[1:])
    rows = hu.reshape(12, 2, 10, 4, 10, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 32).astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    assert errors[0] == pytest.approx(values[:-KEEP].sum() / 32, rel=1e-4)  # Eckart and Young 1936


def test_validation_is_the_round_trip_of_whole_scans_in_the_body_and_by_tissue():
    task = make(round_trip=lambda model, hu, heed: hu + 3 - 2 * (hu > 0))
    found = task.validate(task.model, lambda *done: None)
    hu = scan(3).hu.astype(np.float32)
    back, regions = hu + 3 - 2 * (hu > 0), Regions.of(hu)
    assert found["psnr_4095_db"] == pytest.approx(psnr(back, hu, regions.body, peak=4095))
    assert found["body_mae_hu"] == pytest.approx(difference(back, hu, regions.body).mean_abs)
    assert found["soft_bias_hu"] == pytest.approx(difference(back, hu, regions.bands["soft"]).mean)
    assert 1 < found["soft_bias_hu"] < 3
    linear = BlockTransform([scan(1).hu, scan(2).hu], BLOCK, KEEP).round_trip(hu)
    assert found["linear_psnr_4095_db"] == pytest.approx(psnr(linear, hu, regions.body, peak=4095))
    assert found["gain_db"] == pytest.approx(found["psnr_4095_db"] - found["linear_psnr_4095_db"])
    assert not regions.bands["bone"].any()
    assert "bone_mae_hu" not in found  # a band that no scan has
    assert all(map(math.isfinite, found.values()))


def test_a_signal_ends_a_validation():
    with pytest.raises(Stopped):
        make().validate(network(), heeding(lambda: 15))


def test_a_scan_of_air_is_refused_at_the_start():
    with pytest.raises(InputError, match="nothing to validate on") as told:
        make(val=replace(scan(3), name="air.nii", hu=np.full((8, 24, 24), -1000, np.int16)))
    assert told.value.path == "air.nii"


def test_a_few_dozen_steps_make_the_round_trip_better(tmp_path):
    task = make()
    before = task.validate(task.model, lambda *done: None)["psnr_4095_db"]
    outcome, _ = tiny.run(
        tmp_path,
        make=make,
        max_steps=40,
        validate_every=40,
        save_every=100,
        warmup_steps=20,
        learning_rate=2e-4,
    )
    assert outcome.best_db > before + 0.1


def test_a_resumed_run_is_the_unbroken_one_to_the_byte(tmp_path):
    digests = []
    for stops in ([], [1, 5]):
        folder = tmp_path / str(len(stops))
        for step in [*stops, None]:
            outcome, _ = tiny.run(folder, make=make, stop_at=step, max_steps=6)
        assert outcome.step == 6
        names = ("best.safetensors", "last.safetensors", "metrics.jsonl")
        digests.append([hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names])
    assert digests[0] == digests[1]


def test_another_recipe_is_another_run(tmp_path):
    tiny.run(tmp_path, make=make, max_steps=2)
    for change in ({"loss": VaeLoss(kl=1e-3)}, {"restored_share": 0.0}):
        with pytest.raises(Exception, match=r"was trained with other settings: recipe\.(loss|patches)"):
            tiny.run(tmp_path, make=lambda change=change: make(**change), max_steps=2)


def test_an_autoencoder_is_never_idle():
    """It adds to nothing that a gain could be over."""
    assert not is_idle(make().validate(network(), lambda *done: None))
    assert is_idle({"residual_rms_hu": 0.0, "added_db": 0.0})
