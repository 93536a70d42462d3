"""What a step and a validation of the diffusion are."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ctsr.data.latents import LatentPair
from ctsr.diffusion.schedule import Schedule
from ctsr.metrics.fidelity import PEAK, psnr
from ctsr.models.control import ControlledUNet
from ctsr.models.latent_unet import LatentUNetConfig
from ctsr.physics.operator import apply_along_z
from ctsr.train.diffusion import DiffusionTask, Regression, residual_rms, validated_pairs
from ctsr.train.loop import Stopped, heeding
from tests.train import latents

SAMPLING = {"sampler": "multistep", "num_steps": 3, "samples": 4}
WORTH = np.arange(1.0, 9.0)  # of the channels
PATH = Schedule.ctsr(3.0, 0.8)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[list[LatentPair], list[LatentPair]]:
    project: Path = latents.make_project(tmp_path_factory.mktemp("project"))
    latents.encode(project)
    train, val = ("scan1.nii.gz", "scan2.nii.gz"), ("scan3.nii.gz",)
    return tuple(
        [p for n in names for p in LatentPair.find(project / "latents", n)] for names in (train, val)
    )  # type: ignore[return-value]


def task(
    pairs, change=lambda x, network, **_: np.zeros((4, *x.shape), np.float32), **changes
) -> DiffusionTask:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LatentUNetConfig.preset("tiny", kappa=PATH.kappa, residual_std=tuple(residual_rms(pairs[0])))
        model = ControlledUNet(config)
    how = {
        "path": PATH,
        "sampling": SAMPLING,
        "patch": (6, 6, 6),
        "dropout": 0.1,
        "seed": 0,
        "card": {},
        "weights": WORTH,
    } | changes
    return DiffusionTask(model, *pairs, change=change, **how)


def validated(t: DiffusionTask) -> dict[str, float]:
    with torch.inference_mode():
        return t.validate(t.model, lambda *done: None)


def test_a_sample_is_a_function_of_seed_and_index(pairs):
    one, again, other = task(pairs), task(pairs), task(pairs, seed=1)
    for index in (0, 5, 1000):
        a, b, c = (t.dataset[index] for t in (one, again, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert not torch.equal(a["x_t"], c["x_t"])
    assert not torch.equal(one.dataset[0]["x_t"], one.dataset[1]["x_t"])


def test_a_patch_is_cut_from_both_latents_and_from_the_maps_of_its_place(pairs):
    for index in range(12):
        found = task(pairs, patch=(3, 2, 4)).dataset[index]
        assert found["y0"].shape == (8, 3, 2, 4)
        places = []
        for pair in pairs[0]:
            y0, r = pair.read((0, 0, 0), pair.shape[1:])
            windows = y0.unfold(1, 3, 1).unfold(2, 2, 1).unfold(3, 4, 1).permute(1, 2, 3, 0, 4, 5, 6)
            places += [
                (pair, r, tuple(at)) for at in (windows == found["y0"]).flatten(3).all(3).nonzero().tolist()
            ]
        ((pair, r, (z, y, x)),) = places
        assert torch.equal(found["r"], r[:, z : z + 3, y : y + 2, x : x + 4])
        assert float(found["factor"]) == pair.record.factor
        centres = pair.record.grid.first + (np.arange(z, z + 3) * 2 + 0.5) / pair.record.factor
        np.testing.assert_allclose(found["maps"][0], np.cos(2 * np.pi * centres), atol=1e-5)


def test_levels_are_spread_evenly_and_one_in_fifteen_is_the_lowest(pairs):
    t = task(pairs, dropout=0.3)
    found = [t.dataset[i] for i in range(640)]
    u = torch.stack([f["x_t"] - f["y0"] for f in found])
    taus = np.array([float(f["tau"]) for f in found])
    lowest = float(taus.min())
    assert 0.03 < (taus == lowest).mean() < 0.11  # 1/15; 640 draws know it to 0.01
    levels = 0.003 ** (1 - taus)
    np.testing.assert_allclose(levels.min(), PATH.sqrt_eta_1, rtol=1e-3)
    rest = np.sort(((np.log(levels) - np.log(PATH.sqrt_eta_1)) / np.log(0.99 / PATH.sqrt_eta_1)) ** 2)
    rest = rest[rest > 1e-9]
    assert np.abs(rest - np.linspace(0, 1, len(rest))).max() < 0.04
    loudest = taus > 0.98
    spread = u[loudest].std(dim=(0, 2, 3, 4)).numpy()  # in each channel as its residual has it
    np.testing.assert_allclose(
        spread, PATH.kappa * levels[loudest].mean() * residual_rms(pairs[0]), rtol=0.06
    )
    assert 0.22 < np.mean([bool(f["null"]) for f in found]) < 0.38


def test_an_untrained_network_has_the_loss_of_predicting_nothing(pairs):
    t = task(pairs, patch=(99, 99, 99))  # the smallest pair, whole
    assert t.recipe["patch"] == list(min(p.shape for p in pairs[0])[1:])
    batch = default_collate([t.dataset[i] for i in range(8)])
    loss = t.loss(t.model, batch).detach()
    by_channel = batch["r"].square().mean(dim=(0, 2, 3, 4)).numpy()
    assert float(loss) == pytest.approx((by_channel * WORTH).mean(), rel=1e-5)
    np.testing.assert_allclose(by_channel, residual_rms(pairs[0]) ** 2, rtol=0.5)


def test_the_regression_sees_noise_alone(pairs):
    path = Regression(0.5, 0.99, 1.0, 1.0)
    taus = [float(task(pairs, path=path).dataset[i]["tau"]) for i in range(5)]
    assert taus == pytest.approx([1 + np.log(0.99) / np.log(1 / 0.003)] * 5)
    assert path.levels(15).tolist() == [0.99]


def test_gradient_checkpointing_changes_no_gradient(pairs):
    found = []
    for is_thrifty in (False, True):
        t = task(pairs)
        t.model.base.gradient_checkpointing = is_thrifty
        batch = default_collate([t.dataset[i] for i in range(2)])
        for parameter in t.model.parameters():  # away from the zeros that hide the inside
            parameter.data += 0.01
        t.loss(t.model, batch).backward()
        found.append(torch.cat([p.grad.flatten() for p in t.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert float(found[0].abs().sum()) > 0


def test_what_changes_nothing_scores_as_stage_one(pairs):
    t = task(pairs)
    found = validated(t)
    assert (
        found["psnr_4095_db"]
        == found["sample_psnr_4095_db"]
        == pytest.approx(found["stage_one_psnr_4095_db"])
    )
    assert found["added_db"] == pytest.approx(0, abs=1e-6)
    assert (found["detail_gain"], found["residual_rms_hu"], found["spread_factor_4"]) == (0, 0, 1)
    assert found["denoising_error"] == 1
    assert found["gain_db"] == pytest.approx(found["stage_one_psnr_4095_db"] - found["cubic_psnr_4095_db"])
    assert found["gain_db"] > 0.3


def test_gain_spread_and_scores_are_those_of_the_plain_way(pairs):
    """Samples that hold half of what is missing, and noise."""
    rng = np.random.default_rng(0)
    made: list[np.ndarray] = []

    def change(x, network, **_):
        truth = cases[len(made)].truth
        made.append((0.5 * (truth - x) + rng.normal(0, 10, (4, *x.shape))).astype(np.float32))
        return made[-1]

    t = task(pairs, change)
    cases = []
    for case, pair in zip(t.cases, validated_pairs(pairs[1]), strict=True):
        truth, stage_one, body = pair.excerpt()
        cases.append(case)
        case.truth = truth.astype(np.float32)
        assert np.array_equal(stage_one, case.stage_one)
        assert np.array_equal(body, case.body)
    found = validated(t)
    for k in (1, 2, 4):
        e_m = m_m = error = spread = 0.0
        for case, c in zip(t.cases, made, strict=True):
            start = case.truth.astype(np.float64).copy()
            start[case.body] -= case.missing
            details = np.stack([apply_along_z(case.null, x) for x in c])[:, case.body].astype(np.float64)
            for group in [details[:k]] if k > 1 else [d[None] for d in details]:
                m = group.mean(axis=0)
                n = case.body.sum() * (4 if k == 1 else 1)
                e_m += (case.missing * m).sum() / n
                m_m += (m * m).sum() / n
                error += ((case.missing - m) ** 2).sum() / n
                spread += group.var(axis=0, ddof=1).sum() / n if k > 1 else 0
        assert found[f"detail_gain_{k}"] == pytest.approx(min(1, e_m / m_m), rel=1e-6)
        if k > 1:
            assert found[f"spread_factor_{k}"] == pytest.approx((error / spread) ** 0.5, rel=1e-6)
    gain = found["detail_gain"]
    assert gain == found["detail_gain_4"]
    scores = []
    for case, c in zip(t.cases, made, strict=True):
        start = case.truth.astype(np.float64).copy()
        start[case.body] -= case.missing
        result = start + gain * apply_along_z(case.null, c.mean(axis=0))
        scores.append(psnr(result, case.truth, case.body, peak=PEAK))
    assert found["psnr_4095_db"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert found["psnr_4095_db"] >= max(found["mean_psnr_4095_db"], found["stage_one_psnr_4095_db"])
    assert found["mean_psnr_4095_db"] > found["sample_psnr_4095_db"]


def test_the_truth_itself_is_a_perfect_score(pairs):
    t = task(pairs, lambda x, network, **_: np.stack([truths[x.shape[0], float(x.sum())] - x] * 4))
    truths = {}
    for pair in validated_pairs(pairs[1]):
        truth, stage_one, _ = pair.excerpt()
        truths[len(truth), float(stage_one.sum())] = truth.astype(np.float32)
    found = validated(t)
    assert found["detail_gain"] == pytest.approx(1, abs=1e-5)
    assert 100 < found["psnr_4095_db"] < 250


def test_a_signal_ends_a_validation(pairs):
    t = task(pairs, lambda x, network, progress, **_: progress(0.1))
    with pytest.raises(Stopped):
        t.validate(t.model, heeding(lambda: 15))


def test_eight_pairs_at_most_are_validated_scans_first_then_factors(pairs):
    (one, two) = pairs[1]
    several = [replace(p, name=f"scan{i}") for i in range(3) for p in (one, two)]
    found = [(p.name, p.record.factor) for p in validated_pairs(several)]
    assert found == [("scan0", 2), ("scan1", 3), ("scan2", 2), ("scan0", 3), ("scan1", 2), ("scan2", 3)]
    assert len(validated_pairs([replace(one, name=str(i)) for i in range(20)])) == 8


def test_another_set_of_pairs_is_another_recipe(pairs):
    one = task(pairs).recipe
    assert one == task(pairs).recipe
    other = replace(pairs[0][0], record=replace(pairs[0][0].record, rho=9.0))
    assert task(([other, *pairs[0][1:]], pairs[1])).recipe["train"] != one["train"]
    assert one["schedule"] == asdict(PATH)
