"""`ctsr finetune-vae`: what it refuses, that it goes on, and that its files know how their latents are spread."""

from __future__ import annotations

import json
import re
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import typer

from ctsr.cli.main import app
from ctsr.data.volumes import load_volumes
from ctsr.errors import CtsrError
from ctsr.infer.vae_tiles import encode_tiled
from ctsr.models.vae import CtVae, VaeConfig
from ctsr.workflows import finetune_vae as workflow
from ctsr.workflows.requests import FinetuneVae
from ctsr.workflows.training import Result, load_vae
from tests.e2e.test_train_baseline import SMALL
from tests.train import tiny

TINY = ["--preset", "tiny"]


def finetune(project: Path, *options: str) -> None:
    """The command in this process."""
    app(["finetune-vae", "--project", str(project), *SMALL, *options], standalone_mode=False)


def latents_of(project: Path, vae: CtVae) -> np.ndarray:
    """(C, n) of all scans that are trained on."""
    scans = load_volumes(project / "data/train_files.txt", project / "data", z_truth_max=1.5)
    return np.concatenate([encode_tiled(vae, v.hu).flatten(1).numpy() for v in scans], axis=1)


def test_a_project_is_all_it_needs_and_its_latents_are_standardised(project, capsys):
    finetune(project, *TINY, "--max-steps", "2")
    folder = project / "checkpoints/vae"
    out, err = capsys.readouterr()
    assert re.match(r"round trip of the validation set\n +mae_hu +bias_hu\nbody +\d", out)
    assert out.splitlines()[-1].startswith(f"{folder}: 2 steps, best ")
    assert "note: train scan1.nii.gz: 16 slices of 1 mm, along z and in plane\n" in err
    assert re.search(
        r"note: step 2: \d+\.\d\d dB, [+-]\d\.\d\d dB over the linear transform of its size \(best\)\n", err
    )
    assert {p.name for p in folder.iterdir()} >= {"metrics.jsonl", "config.json"}
    for name in ("best", "last"):
        vae, file = load_vae(str(folder / f"{name}.safetensors"))
        assert vae.config == VaeConfig.preset("tiny")
        assert file.card["trained_on"] == ["scan1.nii.gz", "scan2.nii.gz"]
        assert file.card["latents"] == {"scans": 2}
        z = latents_of(project, vae)
        np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-4)
        np.testing.assert_allclose(z.std(axis=1), 1, atol=1e-4)
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    finetune(project, *TINY, "--max-steps", "2", "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["best"]["step"] == 2
    assert "this run is finished: 2 steps are done (--max-steps for more)" in err
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


def test_a_run_that_goes_on_measures_its_latents_anew(project):
    finetune(project, *TINY, "--max-steps", "1")
    finetune(project, *TINY, "--max-steps", "8", "--lr", "1e-2", "--warmup-steps", "300")
    vae, file = load_vae(str(project / "checkpoints/vae/last.safetensors"))
    assert file.card["training"]["step"] == 8
    np.testing.assert_allclose(latents_of(project, vae).mean(axis=1), 0, atol=1e-4)


def run(project: Path, folder: str, told: tiny.Told, *, max_steps: int = 2) -> Result:
    """The workflow, with a signal when `told` says so."""
    request = FinetuneVae(
        project=project, output_dir=project / folder, preset="tiny", max_steps=max_steps, batch_size=1,
        patch_size=(16, 16, 16), device="cpu",
    )  # fmt: skip
    told.begin = lambda max_steps: None
    return workflow.finetune_vae(request, report=told, stopping=lambda: nullcontext(told.stop))


class _StopsAtTheLatents(tiny.Told):
    def stop(self) -> int | None:
        return signal.SIGTERM if any("measuring the latents" in note for note in self.notes) else None


def test_a_signal_while_latents_are_measured_leaves_them_to_the_next_run(project):
    assert run(project, "a", _StopsAtTheLatents()).outcome.stopped_by == signal.SIGTERM
    assert "latents" not in load_vae(str(project / "a/best.safetensors"))[1].card
    for folder in ("a", "b"):
        assert run(project, folder, tiny.Told()).outcome.stopped_by is None
    for name in ("best.safetensors", "last.safetensors"):
        assert (project / "a" / name).read_bytes() == (project / "b" / name).read_bytes()


def test_a_run_that_is_cut_short_before_a_validation_ends_without_a_best(project):
    assert run(project, "a", tiny.Told(stop_at=1)).outcome.step == 1
    result = run(project, "a", tiny.Told(), max_steps=1)
    assert (result.outcome.was_finished, result.metrics) == (True, {})
    assert "latents" in load_vae(str(project / "a/last.safetensors"))[1].card


def test_it_starts_from_weights_of_its_own_with_their_plan(project):
    finetune(project, *TINY, "--max-steps", "1")
    first = project / "checkpoints/vae/best.safetensors"
    request = FinetuneVae(init=str(first))
    before, file = load_vae(str(first))
    model, made_from = workflow._starting_model(request, tiny.Told())
    assert (model.config, made_from) == (VaeConfig.preset("tiny"), (str(first), file.sha256))
    for (name, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        is_measured = name.startswith("latent_")  # when training is done
        assert torch.equal(a, b) != is_measured, name
    finetune(project, "--init", str(first), "--output-dir", str(project / "fine"), "--max-steps", "1")
    card = load_vae(str(project / "fine/best.safetensors"))[1].card
    assert card["init"] == {"name": "best.safetensors", "sha256": file.sha256}


def slices(path: Path) -> Path:
    """A small 2D autoencoder in the layout of diffusers."""
    config = VaeConfig.preset("mri", channels=(32, 32), z_strides=(1,), blocks=1)
    found = CtVae(config).state_dict()
    names = {n: re.sub(r"^(en|de)coder\.(quant|post_quant)_conv", r"\2_conv", n) for n in found}
    kept = {new: found[n] for n, new in names.items() if "along_z" not in n and not n.startswith("latent_")}
    safetensors.torch.save_file(kept, path)
    return path


def test_it_starts_from_2d_weights_and_says_what_fitted(project, capsys):
    start = slices(project / "start.safetensors")
    finetune(project, "--init", str(start), "--max-steps", "1")
    vae, file = load_vae(str(project / "checkpoints/vae/best.safetensors"))
    assert (vae.strides, vae.config.slice_groups) == ((1, 2, 2), 32)
    assert file.card["init"]["name"] == "start.safetensors"
    assert re.search(r"start.safetensors: \d+ tensors taken, 0 adapted, \d+ new\n", capsys.readouterr().err)


def _foreign(project: Path) -> list[str]:
    path = project / "maisi.safetensors"
    safetensors.torch.save_file({"quant_conv_mu.conv.weight": torch.zeros(4, 4, 1, 1, 1)}, path)
    return ["--init", str(path)]


REFUSED = [
    (lambda p: ["--init", "baseline", "--preset", "tiny"], 2, "--preset and --init exclude each other"),
    (lambda p: ["--preset", "huge"], 2, "is not one of .tiny., .compact., .full., .mri."),
    (lambda p: [*TINY, "--patch-size", "8", "16", "16"], 2, r"\(8, 16, 16\) needs 16 voxels a side"),
    (lambda p: [*TINY, "--patch-size", "16", "18", "16"], 2, r"\(16, 18, 16\) is no multiple of \(2, 4, 4\)"),
    (lambda p: ["--init", "baseline"], 5, "a model of kind baseline, expected vae"),
    (_foreign, 5, "looks like MAISI's"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "code", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_only_an_autoencoder_refuses_before_a_step(project, monkeypatch, spoil, code, words):
    monkeypatch.setattr(workflow, "train", lambda *a, **k: pytest.fail("a step was made"))
    with pytest.raises((CtsrError, typer.BadParameter), match=words) as told:
        finetune(project, *spoil(project))
    assert told.value.exit_code == code


def test_help_says_first_which_command_fine_tunes_the_default_model(capsys):
    app(["finetune-vae", "--help"], standalone_mode=False)
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    first = (
        "This leaves the default model as it is: `ctsr train-baseline --init baseline` fine-tunes that one."
    )
    assert words.partition(" finetune-vae [OPTIONS] ")[2].startswith(first)
