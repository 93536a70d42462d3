"""`ctsr encode-latents` and `ctsr train-diffusion`: a project is all they need; what they refuse; that they go on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from ctsr.cli.main import app
from ctsr.data.latents import LatentPair
from ctsr.errors import CtsrError, TrainingDiverged, UsageError
from ctsr.infer.sampling import Sampling
from ctsr.infer.vae_tiles import decode_tiled
from ctsr.models.latent_unet import LatentUNetConfig
from ctsr.train import checkpoint
from ctsr.weights.registry import load_model
from ctsr.workflows.requests import TrainDiffusion
from ctsr.workflows.train_diffusion import train_diffusion
from ctsr.workflows.training import Result
from tests.train import latents, tiny

SMALL = [
    "--preset", "tiny", "--patch-size", "4", "8", "8", "--batch-size", "2", "--warmup-steps", "2", "--num-steps", "2",
    "--samples", "2", "--device", "cpu", "--threads", "1",
]  # fmt: skip
REQUEST = TrainDiffusion(
    preset="tiny", patch_size=(4, 8, 8), num_steps=2, samples=2, max_steps=40, batch_size=2, lr=1e-3, warmup_steps=2,
    validate_every=20, save_every=7, device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project with latents; not to be written to."""
    folder = latents.make_project(tmp_path_factory.mktemp("made") / "p")
    latents.encode(folder)
    return folder


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of it, and the state of the process kept from what a command sets."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("RANK", raising=False)
    yield Path(shutil.copytree(made, tmp_path / "p"))
    torch.set_num_threads(threads)


class Told(tiny.Told):
    """Counts the steps of the regression and of the diffusion as one row."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(stop_at)
        self.lengths: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def begin(self, max_steps: int) -> None:
        self.lengths.append(max_steps)

    def step(self, step: int, loss: float, rate: float) -> None:
        super().step(step + sum(self.lengths[:-1]), loss, rate)

    def validation(self, step, metrics, is_best) -> None:
        super().validation(step, metrics, is_best)
        self.metrics.append(dict(metrics))


def run(project: Path, *, stop_at: int | None = None, **changes) -> tuple[Result, Told]:
    """The workflow in a project folder."""
    told = Told(stop_at)
    request = replace(REQUEST, project=project, **changes)
    return train_diffusion(request, report=told, stopping=lambda: nullcontext(told.stop)), told


def train(project: Path, *options: str) -> None:
    """The command in this process."""
    app(["train-diffusion", "--project", str(project), *SMALL, *options], standalone_mode=False)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of everything that a run leaves, but the locks."""
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def test_both_commands_need_a_project_alone(project, capsys):
    shutil.rmtree(project / "latents")
    command = f"encode-latents --project {project} --device cpu --factors 2,3 --threads 1"
    app(command.split(), standalone_mode=False)
    assert f"{project / 'latents'}: 12 pairs of 3 scans encoded\n" in capsys.readouterr().out
    train(project, "--max-steps", "2")
    folder = project / "checkpoints/diffusion"
    left = {p.name for p in folder.iterdir()}
    assert left >= {"best.safetensors", "last.safetensors", "metrics.jsonl", "regression"}
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith(f"{folder}: 2 steps, best ")
    assert [line.split()[0] for line in out.splitlines()[2:6]] == ["cubic", "stage", "diffusion", "one"]
    assert "note: stage one out of fold; its latents lack " in err
    assert "dB over stage one, detail gain " in err
    model, file = load_model(folder / "best.safetensors", kind="diffusion")
    card = file.card
    assert (
        card["vae_sha256"] == load_model(project / "checkpoints/vae/best.safetensors", kind="vae")[1].sha256
    )
    assert card["stage_one_sha256"] == load_model("baseline", kind="baseline")[1].sha256
    assert card["stage_one_out_of_fold"] is True
    assert card["trained_on"] == ["scan1.nii.gz", "scan2.nii.gz"]
    assert card["sampling"] == {"sampler": "multistep", "num_steps": 2, "samples": 2}
    assert Sampling(num_steps=2, samples=2).calibration(card) is not None
    assert Sampling(num_steps=3, samples=2).calibration(card) is None
    assert card["ranges"]["input_spacing_mm"] == [2.0, 3.0]
    assert model.config.kappa == card["schedule"]["kappa"]
    assert list(model.config.residual_std) == card["residual_rms"]["train"]
    assert str(project) not in json.dumps(card["trained_on"])
    train(project, "--max-steps", "2", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["step"] == 2
    assert "this run is finished: 2 steps are done (--max-steps for more)" in err


@pytest.fixture(scope="module")
def unbroken(made, tmp_path_factory) -> tuple[dict[str, str], Told]:
    """What 40 steps without a stop leave, after 2 of the regression."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("unbroken") / "p"))
    result, told = run(folder)
    assert (result.outcome.step, told.lengths) == (40, [2, 40])
    return digests(folder / "checkpoints/diffusion"), told


@pytest.mark.parametrize("stops", [[1], [2], [3], [9], [22], [5, 30]], ids=str)
def test_a_resumed_run_is_the_unbroken_one_to_the_byte(project, unbroken, stops):
    for stop in stops:
        result, _ = run(project, stop_at=stop)
        assert result.outcome.stopped_by == 15
    result, _ = run(project)
    assert result.outcome.step == 40
    assert digests(project / "checkpoints/diffusion") == unbroken[0]


def test_a_loss_is_in_hu_and_begins_at_one(made, unbroken):
    _, told = unbroken
    assert 0.4 < told.losses[0] < 2.5  # two patches know the mean no better
    (said,) = re.findall(r"its latents lack (\S+) HU, (\S+) HU on", " ".join(told.notes))
    vae, _ = load_model(made / "checkpoints/vae/best.safetensors", kind="vae")
    for names, hu in zip((("scan1", "scan2"), ("scan3",)), map(float, said), strict=True):
        errors = []
        for pair in (p for name in names for p in LatentPair.find(made / "latents", f"{name}.nii.gz")):
            y0, r = pair.read((0, 0, 0), pair.shape[1:])
            size = tuple(n * s for n, s in zip(pair.shape[1:], vae.strides, strict=True))
            errors.append(np.square(decode_tiled(vae, y0 + r, size) - decode_tiled(vae, y0, size)).mean())
        assert hu == pytest.approx(np.sqrt(np.mean(errors)), rel=0.1)


def test_it_learns_to_denoise(project):
    _, told = run(project, max_steps=150, validate_every=150, warmup_steps=10, patch_size=(8, 8, 8))
    regression, last = told.metrics
    assert regression["denoising_error"] == pytest.approx(1, abs=0.05)  # after 7 steps
    assert last["denoising_error"] < 0.85
    assert abs(last["mean_psnr_4095_db"] - last["stage_one_psnr_4095_db"]) < 1
    assert last["psnr_4095_db"] >= last["stage_one_psnr_4095_db"] - 1e-6
    assert last["added_db"] == pytest.approx(last["psnr_4095_db"] - last["stage_one_psnr_4095_db"])


@pytest.mark.parametrize(
    ("changes", "kappa", "width"),
    [({"schedule": "published"}, 2.0, 12), ({"kappa": 0.75, "model_channels": 8}, 0.75, 8)],
    ids=["published", "given"],
)
def test_a_schedule_that_is_known_needs_no_regression(project, changes, kappa, width):
    _, told = run(project, max_steps=1, validate_every=1, **changes, gradient_checkpointing=True)
    assert told.lengths == [1]
    folder = project / "checkpoints/diffusion"
    file = checkpoint.read(folder)
    assert file.card["schedule"]["kappa"] == file.config["kappa"] == kappa
    assert file.config["model_channels"] == width
    assert not (folder / "regression").exists()


@pytest.mark.parametrize("schedule", ["ctsr", "published"])
def test_a_longer_run_keeps_its_schedule(project, schedule):
    """Of 40 steps 2 are taken for the regression, of 60 it would be 3."""
    run(project, schedule=schedule)
    before = checkpoint.read(project / "checkpoints/diffusion").card["schedule"]
    result, told = run(project, max_steps=60)
    assert (result.outcome.step, told.lengths) == (60, [60])
    assert checkpoint.read(project / "checkpoints/diffusion").card["schedule"] == before


def test_epochs_count_samples_of_scans(project):
    _, told = run(project, batch_size=64, validate_every=100, kappa=1.0, max_steps=None, epochs=1)
    assert told.lengths == [8]  # 256 from each of two


def another_vae(project: Path) -> None:
    latents.vae_file(project, seed=1)


def no_vae(project: Path) -> None:
    shutil.rmtree(project / "checkpoints")


def no_latents(project: Path) -> None:
    shutil.rmtree(project / "latents")


def no_latents_of_val(project: Path) -> None:
    shutil.rmtree(project / "latents/scan3.nii.gz")


def leak(project: Path) -> None:
    shutil.copytree(project / "latents/scan3.nii.gz", project / "latents/scan2.nii.gz", dirs_exist_ok=True)


def damaged(project: Path) -> None:
    (project / "latents/scan1.nii.gz/x2-0.safetensors").write_bytes(b"nothing")


REFUSED = {
    "no latents": (no_latents, 2, "ctsr encode-latents makes them"),
    "none to validate on": (no_latents_of_val, 2, "ctsr encode-latents makes them"),
    "no autoencoder": (no_vae, 5, "ctsr finetune-vae trains one"),
    "another autoencoder": (another_vae, 5, "latents of the VAE"),
    "a scan in both sets": (leak, 3, "holds the same voxels as"),
    "a damaged pair": (damaged, 3, "no pair of latents, or damaged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_any_step(project, case):
    spoil, code, words = REFUSED[case]
    spoil(project)
    with pytest.raises(CtsrError, match=words) as error:
        train(project)
    assert error.value.exit_code == code
    assert not (project / "checkpoints/diffusion").exists()


def test_the_folder_of_another_training_is_refused_by_its_kind(project):
    folder = project / "checkpoints/vae"
    shutil.copy(folder / "best.safetensors", folder / "last.safetensors")
    with pytest.raises(UsageError, match="holds a training of vae, not of diffusion"):
        train(project, "--output-dir", str(folder))


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "huge"), ("--schedule", "other"), ("--sampler", "euler"), ("--patch-size", "0", "8", "8"),
        ("--schedule", "published", "--kappa", "1"), ("--max-steps", "1", "--epochs", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(made, options):
    with pytest.raises((CtsrError, typer.BadParameter)) as error:
        train(made, *options)
    assert error.value.exit_code == 2


def test_scans_without_latents_are_told_and_passed_by(project):
    shutil.rmtree(project / "latents/scan2.nii.gz")
    _, told = run(project, max_steps=1, validate_every=1, kappa=1.0)
    assert any("1 of 2 scans in" in note and "scan2.nii.gz" in note for note in told.notes)


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(project):
    with pytest.raises(TrainingDiverged) as error:
        run(project, kappa=1.0, lr=1e30, warmup_steps=0)
    assert error.value.exit_code == 8
    assert checkpoint.read(project / "checkpoints/diffusion").card["training"]["step"] < 40


def test_other_settings_are_another_run(project):
    run(project, max_steps=1, validate_every=1, kappa=1.0)
    for changes in (
        {"kappa": 1.5}, {"patch_size": (2, 8, 8)}, {"guidance_dropout": 0.2}, {"model_channels": 8}
    ):  # fmt: skip
        with pytest.raises(CtsrError, match="was trained with other settings") as error:
            run(project, max_steps=2, validate_every=1, **({"kappa": 1.0} | changes))
        assert error.value.exit_code == 2
    assert LatentUNetConfig.preset("tiny").model_channels == 12


def test_two_processes_agree_on_the_schedule(project):
    """Under torchrun, the regression included: each trains with what the first one measured."""
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m ctsr train-diffusion --max-steps 20"
    command = [*launch.split(), "--project", str(project), *SMALL]
    ran = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    folder = project / "checkpoints/diffusion"
    assert checkpoint.read(folder).card["run"]["processes"] == 2
    assert checkpoint.read(folder / "regression").card["training"]["step"] == 1
    assert ran.stderr.count("κ = ") == 1
