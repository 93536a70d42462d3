"""`encode-latents`: what a pair holds, what is skipped, replaced, refused, and who may share a folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from ctsr.core.zgrid import ZGrid
from ctsr.data.latents import LatentPair
from ctsr.data.volumes import load_volume
from ctsr.errors import UsageError, WeightsError
from ctsr.infer.vae_tiles import encode_tiled
from ctsr.models import zoo
from ctsr.physics.operator import apply_along_z, grid_operator
from ctsr.physics.profile import SliceProfile
from ctsr.weights.registry import load_model
from ctsr.workflows.folder import Report
from tests.io.make import affine_of, nifti, put
from tests.train import latents, tiny


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = latents.make_project(tmp_path_factory.mktemp("project"))
    latents.encode(folder, variants=2)
    return folder


def pairs_of(project: Path, name: str) -> list[LatentPair]:
    return LatentPair.find(project / "latents", name)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def stage_one_file(folder: Path, *, seed: int = 1, trained_on: tuple[str, ...] = (), lr: float = 1e-3) -> str:
    """A stage one of the user's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny.SimpleUNet3D(tiny.NETWORK)
    run = {"recipe": {"lr": lr, "train": str(seed), "val": "1"}, "network": {}}
    card = {"trained_on": list(trained_on), "run": run}
    path = folder / f"stage-one-{seed}.safetensors"
    path.write_bytes(zoo.pack("baseline", model.config.to_dict(), model.state_dict(), card=card))
    return str(path)


def test_a_pair_holds_the_truth_and_what_stage_one_restores(project):
    vae, file = load_model(project / "checkpoints/vae/best.safetensors", kind="vae")
    found = pairs_of(project, "scan1.nii.gz")
    assert [p.path.stem for p in found] == ["x2-0", "x2-1", "x3-0", "x3-1"]
    assert len({(p.record.rho, p.record.flips) for p in found}) == 4
    hu = load_volume(project / "data/scan1.nii.gz", z_truth_max=1.5, notes=[]).hu
    for pair in found:
        r = pair.record
        assert r.stamp.vae_sha256 == file.sha256
        assert r.stamp.stage_one_sha256 == load_model("baseline", kind="baseline")[1].sha256
        assert r.stamp.is_out_of_fold
        truth = np.flip(hu, [axis for axis in range(3) if r.flips[axis]])
        y0, residual = pair.read((0, 0, 0), pair.shape[1:])
        torch.testing.assert_close(y0 + residual, encode_tiled(vae, truth), atol=1e-5, rtol=0)
        assert r.mean_square == pytest.approx(residual.square().mean(dim=(1, 2, 3)).tolist(), rel=1e-5)
        excerpt, stage_one, body = pair.excerpt()
        np.testing.assert_array_equal(excerpt, truth[: len(excerpt)])
        assert 0.3 < body.mean() < 0.9
        A = grid_operator(ZGrid(r.n, r.factor), SliceProfile(), spacing=r.factor, thickness=r.rho * r.factor)
        if r.rho < 1.2:  # where the projection reproduces the measured slices; rounded to 1 HU
            np.testing.assert_allclose(apply_along_z(A, stage_one), apply_along_z(A, excerpt), atol=0.6)
        rms = np.sqrt(np.mean((stage_one[body].astype(float) - excerpt[body]) ** 2))
        assert 2 < rms < 150  # HU


def test_the_same_command_makes_the_same_bytes_and_shards_make_the_whole(project, tmp_path):
    whole = files(project / "latents")
    for shard in ("1/2", "2/2"):
        latents.encode(project, output_dir=tmp_path, variants=2, shard=shard)
    assert files(tmp_path) == whole


def test_pairs_that_are_there_are_skipped_replaced_or_in_the_way(project):
    before = files(project / "latents")
    with pytest.raises(UsageError, match="exists already"):
        latents.encode(project, variants=2)
    rows = latents.encode(project, variants=2, skip_existing=True)
    assert {(r["status"], r["pairs"], r["skipped"]) for r in rows} == {("skipped", 0, 4)}
    lost = project / "latents/scan2.nii.gz/x3-1.safetensors"
    lost.unlink()
    rows = latents.encode(project, variants=2, skip_existing=True)
    assert [(r["case"], r["status"], r["pairs"]) for r in rows if r["pairs"]] == [("scan2.nii.gz", "ok", 1)]
    assert files(project / "latents") == before
    with pytest.raises(UsageError, match=r"was made otherwise: rho: .*, now "):
        latents.encode(project, variants=2, skip_existing=True, seed=1)
    rows = latents.encode(project, variants=2, overwrite=True)
    assert [r["pairs"] for r in rows] == [4, 4, 4]
    assert files(project / "latents") == before


def test_latents_of_another_autoencoder_are_refused_before_any_work(project, tmp_path):
    other = latents.vae_file(tmp_path, seed=1)
    with pytest.raises(WeightsError, match=r"latents of the VAE .*…, those of .*scan1") as error:
        latents.encode(project, vae_checkpoint=str(other), skip_existing=True)
    assert error.value.exit_code == 5
    with pytest.raises(WeightsError, match=r"no autoencoder here .*ctsr finetune-vae"):
        latents.encode(project, vae_checkpoint=str(tmp_path / "none"))


def test_an_autoencoder_whose_latents_were_not_measured_is_refused(project, tmp_path):
    """A training that was stopped leaves such a file, with mean 0 and deviation 1."""
    path = latents.vae_file(tmp_path)
    file = zoo.unpack(path.read_bytes(), str(path))
    path.write_bytes(zoo.pack("vae", file.config, file.tensors, card={}))
    with pytest.raises(WeightsError, match=r"latents were not measured: .*\(ctsr finetune-vae") as error:
        latents.encode(project, output_dir=tmp_path, vae_checkpoint=str(path))
    assert error.value.exit_code == 5


def test_two_stage_ones_share_a_folder_where_neither_has_seen_its_scans(project, tmp_path):
    data = project / "data"
    one, two = (
        stage_one_file(tmp_path, seed=1, trained_on=("scan2.nii.gz",)),
        stage_one_file(tmp_path, seed=2, trained_on=("scan1.nii.gz",)),
    )
    out = tmp_path / "latents"

    def encode(scan: str, stage_one: str) -> None:
        listed = data / f"{scan}.txt"
        listed.write_text(f"{scan}.nii.gz\n")
        latents.encode(project, output_dir=out, file_list=listed, stage_one=stage_one, factors="2")

    encode("scan1", one)
    encode("scan2", two)
    with pytest.raises(WeightsError, match="of the stage one"):
        encode("scan3", stage_one_file(tmp_path, seed=3, trained_on=("scan3.nii.gz",)))
    with pytest.raises(WeightsError, match="of the stage one"):
        encode("scan3", stage_one_file(tmp_path, seed=4, lr=1e-4))
    found = [LatentPair.find(out, f"{name}.nii.gz")[0].record.stamp for name in ("scan1", "scan2")]
    assert all(stamp.is_out_of_fold for stamp in found)
    assert found[0].stage_one_sha256 != found[1].stage_one_sha256


def test_thick_scans_are_left_out_and_broken_ones_do_not_stop_the_rest(project, tmp_path):
    listed = project / "data/some.txt"
    listed.write_text("scan1.nii.gz\nbroken.nii.gz\n")
    (project / "data/broken.nii.gz").write_bytes(b"nothing")
    said: list[str] = []
    rows = latents.encode(
        project, Report(warn=said.append), output_dir=tmp_path, file_list=listed, factors="2,8", variants=1
    )
    assert [(r["case"], r["status"]) for r in rows] == [("scan1.nii.gz", "ok"), ("broken.nii.gz", "failed")]
    assert rows[1]["code"] == 3
    assert len(said) == 1
    assert rows[0]["pairs"] == 2  # 24 slices are three of factor 8
    rows = latents.encode(project, output_dir=tmp_path / "b", file_list=listed, z_truth_max=0.5)
    assert rows[0]["status"] == "left out"
    assert "1 mm apart" in str(rows[0]["reason"])


def test_a_scan_too_short_for_two_thick_slices_is_left_out(project, tmp_path):
    hu = np.asarray(nib.load(project / "data/scan1.nii.gz").dataobj)[:, :, :7]
    put(project / "data", nifti(hu, affine_of((0.8, 0.8, 1.0))), "short.nii.gz")
    listed = project / "data/short.txt"
    listed.write_text("short.nii.gz\n")
    (row,) = latents.encode(project, output_dir=tmp_path, file_list=listed, factors="4,8")
    assert (row["status"], row["pairs"]) == ("left out", 0)
    assert "7 slices make fewer than 2 thick ones" in str(row["reason"])


def test_what_is_asked_for_twice_is_made_once(project, tmp_path):
    rows = latents.encode(project, output_dir=tmp_path, factors="3,3")
    assert [row["pairs"] for row in rows] == [1, 1, 1]


def test_an_excerpt_holds_the_body_of_a_scan_that_has_none_in_its_middle(project, tmp_path):
    rng, hu = np.random.default_rng(0), np.full((240, 48, 24), -1000.0)
    hu[16:40, 12:36] = hu[200:225, 12:36] = 40
    hu += rng.normal(0, 10, hu.shape)
    put(project / "data", nifti(hu.astype(np.int16), affine_of((0.8, 0.8, 1.0))), "legs.nii.gz")
    listed = project / "data/legs.txt"
    listed.write_text("legs.nii.gz\n")
    latents.encode(project, output_dir=tmp_path, file_list=listed, factors="2", variants=4)
    found = LatentPair.find(tmp_path, "legs.nii.gz")
    assert len({pair.record.flips for pair in found}) > 1
    assert all(pair.excerpt()[2].any() for pair in found)


@pytest.mark.parametrize("factors", ["1,2", "9", "", "2.5", "2,x"])
def test_what_cannot_be_asked_for(project, factors):
    with pytest.raises(UsageError, match="no whole numbers in 2…8"):
        latents.encode(project, factors=factors)
    with pytest.raises(UsageError, match="exclude each other"):
        latents.encode(project, skip_existing=True, overwrite=True)


def test_a_record_names_no_folder(project):
    (pair, *_) = pairs_of(project, "scan3.nii.gz")
    assert str(project) not in json.dumps(asdict(pair.record))
