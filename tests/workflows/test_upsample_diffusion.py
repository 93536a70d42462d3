"""`upsample` with a diffusion: what an untrained one gives, what files and records come out, which weights it takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from pydicom import dcmread

from ctsr.core.volume import Volume
from ctsr.diffusion.schedule import Schedule
from ctsr.errors import InputError, ResourceError, UsageError, WeightsError
from ctsr.infer.sampling import Sampling
from ctsr.models.zoo import pack
from ctsr.workflows import networks
from ctsr.workflows.folder import Report
from ctsr.workflows.requests import FileOptions
from ctsr.workflows.thinner import Thinner
from ctsr.workflows.upsample import upsample_files
from tests.infer import tiny
from tests.io.dicom.make import block, planes, series
from tests.io.make import affine_of, ct

FAST = Sampling(num_steps=2, samples=2)
METRICS = {"detail_gain_2": 0.5, "spread_factor_2": 1.25}
VALIDATED = {"sampler": "multistep", "num_steps": 2, "samples": 2}


def write(path: Path, kind: str, network, **card) -> str:
    """A model file; its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pack(kind, network.config.to_dict(), network.state_dict(), card=card)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def make_project(folder: Path, *, is_trained: bool = True, **card) -> Path:
    """A project with three tiny networks; the diffusion's file."""
    of = folder / "checkpoints"
    unet, vae = tiny.diffusion_networks(is_trained)
    hashes = {
        "vae_sha256": write(of / "vae" / "best.safetensors", "vae", vae),
        "stage_one_sha256": write(of / "baseline" / "best.safetensors", "baseline", tiny.network()),
    }
    told = hashes | {"schedule": asdict(Schedule.ctsr(unet.config.kappa))} | card
    write(of / "diffusion" / "best.safetensors", "diffusion", unet, **told)
    return of / "diffusion" / "best.safetensors"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("untrained"), is_trained=False)


def volume() -> Volume:
    return Volume(ct((22, 18, 7)), affine_of())


def thinner(checkpoint: Path, **options) -> Thinner:
    return Thinner(**({"model": "diffusion", "checkpoint": str(checkpoint), "sampling": FAST} | options))


@pytest.mark.parametrize(
    "options", [{}, {"factor": 3.0}, {"factor": 2.4, "is_consistent": False}, {"thickness": 5.0}]
)
def test_an_untrained_diffusion_is_its_stage_one(untrained, options):
    stage_one = Thinner(checkpoint=str(untrained.parents[1] / "baseline" / "best.safetensors"), **options)
    data = Volume(volume().data.astype(np.float32), affine_of())
    made, expected = thinner(untrained, **options)(data), stage_one(data)
    np.testing.assert_allclose(made.volume.data, expected.volume.data, atol=1e-3)
    np.testing.assert_array_equal(made.volume.affine, expected.volume.affine)


def test_the_same_seed_twice_is_identical_and_another_differs(project):
    one, two, other = (
        thinner(project, sampling=Sampling(num_steps=2, samples=2, seed=seed))(volume()).volume.data
        for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(one, two)
    assert (one != other).any()


def test_the_storage_order_changes_nothing(project):
    v = volume()
    affine = v.affine[:, [2, 0, 1, 3]] * [-1, 1, 1, 1]
    affine[:3, 3] += 6 * v.affine[:3, 2]
    turned = Volume(v.data.transpose(2, 0, 1)[::-1], affine)
    made, of_turned = thinner(project)(v).volume, thinner(project)(turned).volume
    np.testing.assert_array_equal(of_turned.data, made.data.transpose(2, 0, 1)[::-1])


def test_memory_changes_nothing_but_the_cuts(project):
    v = Volume(ct((96, 80, 40)), affine_of())
    whole = thinner(project, dtype="fp32")
    expected = whole(v).volume.data.astype(int)
    most = whole.job(v).plan.peak_bytes
    less = thinner(project, dtype="fp32", max_memory=most - 12e6)
    plan = less.job(v).plan
    assert plan.peak_bytes <= most - 12e6
    assert len(plan.slabs) > 1
    assert np.abs(less(v).volume.data - expected).max() <= 1  # one HU where a half was rounded the other way
    with pytest.raises(ResourceError, match="needs"):
        thinner(project, dtype="fp32", max_memory=1e8).job(v)


def test_the_measured_slices_stay_and_uncertainty_comes_with_the_result(project):
    made = thinner(project)(volume(), keeps_spread=True)
    assert made.record["consistency_residual_max_hu"] < 1.01  # rounded to whole HU
    assert made.uncertainty.shape == made.volume.shape
    assert made.uncertainty.min() >= 0
    assert made.uncertainty.mean() > 1
    assert thinner(project)(volume()).uncertainty is None


def test_files_come_out_with_a_record_of_all_three_networks(tmp_path, project):
    source, target, spread = (tmp_path / name for name in ("in.nii.gz", "out.nii.gz", "spread.nii"))
    nib.Nifti1Image(volume().data, affine_of()).to_filename(source)
    files, told = FileOptions(save_uncertainty=spread), []
    report = Report(progress=lambda share, words: told.append(share))
    (row,) = upsample_files(source, target, thinner(project), files, report)
    assert row["status"] == "ok"
    assert told == sorted(told)
    assert told[-1] == 1
    record = json.loads((tmp_path / "out.json").read_text())
    used = record["diffusion"]
    assert (used["num_steps"], used["sampler"], used["samples"], used["seed"]) == (2, "multistep", 2, 0)
    assert (used["guidance_scale"], used["estimate"], used["detail_gain"]) == (1, "mean", 1)
    for name, folder in (("vae_sha256", "vae"), ("stage_one_sha256", "baseline")):
        file = project.parents[1] / folder / "best.safetensors"
        assert used[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["weights_sha256"] == hashlib.sha256(project.read_bytes()).hexdigest()
    assert record["model"] == "diffusion"
    assert nib.load(spread).shape == nib.load(target).shape
    again = FileOptions(skip_existing=True)
    assert upsample_files(source, target, thinner(project), again)[0]["status"] == "skipped"
    other = thinner(project, sampling=Sampling(num_steps=3, samples=2))
    with pytest.raises(UsageError, match="was made with num_steps 2, asked for is 3"):
        upsample_files(source, target, other, again)


def test_a_series_goes_through_and_its_seed_is_in_its_uids(tmp_path, project):
    series(tmp_path / "thick", block(planes(n=8, step=3.0)))
    uids = set()
    for seed in (0, 1):
        told = thinner(project, sampling=Sampling(num_steps=2, samples=2, seed=seed))
        (row,) = upsample_files(tmp_path / "thick", tmp_path / str(seed), told, FileOptions())
        assert (row["slices_in"], row["slices_out"]) == (8, 16)
        uids |= {dcmread(path).SOPInstanceUID for path in (tmp_path / str(seed)).glob("*.dcm")}
    assert len(uids) == 32


def test_gain_and_spread_are_taken_from_the_validation(tmp_path, project):
    fitted = make_project(tmp_path, sampling=VALIDATED, metrics=METRICS)
    ours, plain = (thinner(p)(volume(), keeps_spread=True) for p in (fitted, project))
    assert ours.record["diffusion"]["detail_gain"] == 0.5
    assert not ours.notes[0].startswith("these settings")
    assert plain.notes[0].startswith("these settings were not validated")
    np.testing.assert_allclose(ours.uncertainty, 1.25 * plain.uncertainty, rtol=1e-4, atol=1e-3)
    assert (
        "adds nothing"
        in thinner(make_project(tmp_path / "b", sampling=VALIDATED, metrics={"detail_gain_2": 0.05}))(
            volume()
        ).notes[0]
    )


def test_without_weights_it_says_how_to_come_by_them():
    with pytest.raises(WeightsError, match="train-diffusion") as caught:
        Thinner(model="diffusion")(volume())
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(("folder", "option"), [("vae", "--vae-checkpoint"), ("baseline", "--stage-one")])
def test_another_network_than_it_was_trained_with_is_refused_by_both_hashes(tmp_path, folder, option):
    checkpoint = make_project(tmp_path)
    there = tmp_path / "checkpoints" / folder / "best.safetensors"
    kept = there.rename(tmp_path / "elsewhere.safetensors")
    wanted = hashlib.sha256(kept.read_bytes()).hexdigest()[:12]
    with pytest.raises(WeightsError, match=wanted) as caught:
        thinner(checkpoint)(volume())
    assert option in caught.value.hint
    network = tiny.network(seed=1) if folder == "baseline" else tiny.diffusion_networks(False)[1]
    other = write(there, folder, network)[:12]
    with pytest.raises(WeightsError, match=f"{wanted}.*{other}"):
        thinner(checkpoint)(volume())
    named = {"vae_checkpoint" if folder == "vae" else "stage_one": str(kept)}
    assert thinner(checkpoint, **named)(volume()).volume.shape == (22, 18, 14)
    named = dict.fromkeys(named, str(there))
    with pytest.raises(WeightsError, match=f"{wanted}.*{other}"):
        thinner(checkpoint, **named)(volume())


def test_a_factor_that_was_not_trained_is_told_or_refused(tmp_path):
    checkpoint = make_project(tmp_path, ranges={"factor": [2.0, 3.0]})
    words = "factor 8, trained for 2…3"
    assert any(words in note for note in thinner(checkpoint, factor=8.0)(volume()).notes)
    with pytest.raises(InputError, match=words):
        thinner(checkpoint, factor=8.0, is_strict=True)(volume())
    thinner(checkpoint, factor=2.5, is_strict=True).job(volume())


@pytest.mark.parametrize(
    "card", [{"sampling": ["multistep"]}, {"metrics": "none"}, {"metrics": {"detail_gain_2": 50}}]
)
def test_a_card_that_makes_no_sense_is_refused(tmp_path, card):
    checkpoint = make_project(tmp_path, **({"sampling": VALIDATED, "metrics": METRICS} | card))
    with pytest.raises(WeightsError, match="best"):
        thinner(checkpoint)(volume())


def test_weights_at_the_top_of_a_disk_are_found_to_be_alone():
    """A container may hold them there: no folder lies above."""
    with pytest.raises(WeightsError, match="none is beside it"):
        networks._match(None, "vae", "0" * 64, "/best.safetensors", "--vae-checkpoint")


def test_options_of_a_diffusion_are_refused_elsewhere(project):
    for options in ({"model": "baseline", "stage_one": "x"}, {"model": "cubic", "vae_checkpoint": "x"}):
        with pytest.raises(UsageError, match="no meaning"):
            Thinner(**options)
    with pytest.raises(UsageError, match="--save-uncertainty"):
        thinner(project, sampling=Sampling(samples=1)).job(volume(), keeps_spread=True)
    with pytest.raises(UsageError, match="--save-uncertainty"):
        Thinner(model="cubic").job(volume(), keeps_spread=True)
