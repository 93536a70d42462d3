"""`encode-latents`: thin scans in; out pairs of latents, of each and of what stage one restores of its thick slices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctsr.core.zgrid import thick_count
from ctsr.data.latents import LatentPair, PairRecord, Stamp, check_stamps, excerpt_box, write_pair
from ctsr.data.pairs import PairRecipe, TrainVolume
from ctsr.data.splits import list_path
from ctsr.data.volumes import load_volume
from ctsr.errors import UsageError, WeightsError
from ctsr.infer.device import choose_device
from ctsr.infer.pipeline import Pipeline, Recipe
from ctsr.infer.stage_one import Engine
from ctsr.infer.vae_tiles import encode_tiled
from ctsr.infer.windows import Tiling, occupied_box
from ctsr.io.lists import read_file_list
from ctsr.metrics.masks import body_mask
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.physics.profile import SliceProfile
from ctsr.physics.simulation import thicken
from ctsr.weights.registry import load_model
from ctsr.workflows.folder import Case, Report, run_cases, take_shard
from ctsr.workflows.requests import EncodeLatents
from ctsr.workflows.training import load_vae

__all__ = ["encode_latents"]

SMALLEST_STACK = 2  # thick slices
RECIPE = PairRecipe()  # thicknesses are drawn as for stage one


def encode_latents(request: EncodeLatents, *, report: Report) -> list[dict[str, Any]]:
    """Encode the scans of a list, or a share of them; a row a scan, `left out` where its slices are too thick.

    Raises WeightsError, before any work, where the autoencoder does not know how its latents are spread, or where the
    folder holds latents of another one or of another stage one; UsageError where a pair is there already and may
    neither be skipped nor replaced, or was made otherwise.
    """
    data, target, notes = request.data, request.latents, list[str]()
    lists = [request.file_list] if request.file_list else [list_path(data, name) for name in ("train", "val")]
    files = dict.fromkeys(path for listed in lists for path in read_file_list(listed, data, notes=notes))
    names = {path.relative_to(data).as_posix(): path for path in files}
    cases = take_shard([Case(name, path, target / name) for name, path in names.items()], request.shard)
    encoder = _Encoder(request)
    theirs = sorted(target.rglob("x*.safetensors"))
    if request.overwrite:
        theirs = [path for path in theirs if path.parent not in {case.target for case in cases}]
    stamps = [(path, LatentPair.open(path).record.stamp) for path in theirs]
    check_stamps([*stamps, *((case.target, encoder.stamp(case.name)) for case in cases)])

    def work(case: Case) -> Mapping[str, Any]:
        volume = load_volume(case.source, z_truth_max=request.z_truth_max, notes=notes)
        while notes:
            report.note(notes.pop(0))
        if volume.trains_along_z:
            return encoder.encode(volume, case)
        words = f"slices {volume.spacing[0]:.3g} mm apart are no thin truth (--z-truth-max)"
        return {"status": "left out", "reason": words, "pairs": 0}

    return run_cases(cases, work, report, things="scans")


class _Encoder:
    """Both networks where they run, and what they make of a scan."""

    def __init__(self, request: EncodeLatents) -> None:
        self.request = request
        device = choose_device(request.device)
        name = request.vae(request.vae_checkpoint)
        vae, self.vae_file = load_vae(name)
        if "latents" not in self.vae_file.card:
            reason = "its latents were not measured: no mean and deviation to standardise them with"
            raise WeightsError(reason, path=name, hint="ctsr finetune-vae does that at its end")
        self.vae = vae.to(device)
        stage_one, self.stage_one_file = load_model(request.stage_one, kind="baseline")
        assert isinstance(stage_one, SimpleUNet3D)
        self.engine = Engine(stage_one, device, torch.float32)

    def stamp(self, name: str) -> Stamp:
        """Of the latents of this scan."""
        file = self.stage_one_file
        run = file.card.get("run") or file.card.get("recipe") or {}
        how = {k: v for k, v in run.get("recipe", {}).items() if k not in ("train", "val")}
        return Stamp(
            vae_sha256=self.vae_file.sha256,
            stage_one_sha256=file.sha256,
            recipe=hashlib.sha256(json.dumps([file.config, how], sort_keys=True).encode()).hexdigest()[:16],
            is_out_of_fold=Path(name).name not in {Path(n).name for n in file.card.get("trained_on", [])},
        )

    def encode(self, volume: TrainVolume, case: Case) -> Mapping[str, Any]:
        """Write the pairs of a scan; how many, and how many were there."""
        r = self.request
        box = (slice(None), *occupied_box(volume.hu, self.engine.network.stride))
        hu, body = volume.hu[box], body_mask(volume.hu)[box]
        stamp = self.stamp(case.name)
        made = skipped = 0
        for factor in dict.fromkeys(map(int, r.factors.split(","))):
            enough = thick_count(len(hu), factor) >= SMALLEST_STACK
            for variant in range(r.variants if enough else 0):
                record = self._record(volume, stamp, factor, variant, body)
                path = case.target / f"x{factor}-{variant}.safetensors"
                if path.exists() and not r.overwrite:
                    if not r.skip_existing:
                        hint = "--skip-existing leaves it, --overwrite replaces it"
                        raise UsageError("exists already", path=path, hint=hint)
                    if found := LatentPair.open(path).record.difference(record):
                        raise UsageError(
                            f"was made otherwise: {found}", path=path, hint="--overwrite replaces it"
                        )
                    skipped += 1
                else:
                    self._pair(path, record, hu, body)
                    made += 1
        if not made + skipped:
            words = f"{len(hu)} slices make fewer than {SMALLEST_STACK} thick ones (--factors)"
            return {"status": "left out", "reason": words, "pairs": 0}
        return {"status": "ok" if made else "skipped", "pairs": made, "skipped": skipped}

    def _record(
        self, volume: TrainVolume, stamp: Stamp, factor: int, variant: int, body: np.ndarray
    ) -> PairRecord:
        rng = np.random.default_rng([self.request.seed, int(volume.content[:16], 16), factor, variant])
        z, y, x = (bool(flip) for flip in rng.integers(0, 2, 3))
        rho = round(float(rng.uniform(*(RECIPE.usual_widths if rng.random() < 0.5 else RECIPE.widths))), 4)
        record = PairRecord(
            stamp=stamp, content=volume.content, factor=factor, rho=rho, n=thick_count(len(body), factor),
            spacing=volume.spacing[0], pixel=max(volume.spacing[1:]), flips=(z, y, x), strides=self.vae.strides,
            corner=(0, 0, 0), dtype=self.request.dtype, seed=self.request.seed,
        )  # fmt: skip
        return replace(record, corner=excerpt_box(record, _flipped(record, body))[0])

    def _pair(self, path: Path, record: PairRecord, hu: np.ndarray, body: np.ndarray) -> None:
        """hu, body: (D, H, W), the box around the patient."""
        m, spacing = record.grid.m, record.factor * record.spacing
        truth, body = _flipped(record, hu), _flipped(record, body)
        how: dict[str, Any] = {
            "factor": float(record.factor), "spacing": spacing, "thickness": record.rho * spacing,
            "profile": SliceProfile(),
        }  # fmt: skip
        thick, _ = thicken(truth, **how)
        tiling = Tiling(truth.shape[1], truth.shape[2], None, 0, 0, self.engine.network.stride)
        recipe = Recipe(n=record.n, **how)
        restored = Pipeline(recipe, tiling=tiling, engine=self.engine).rows(thick, 0, m)
        x0, y0 = (encode_tiled(self.vae, part).cpu() for part in (truth, restored))
        corner, size = excerpt_box(record, body)
        cut = tuple(slice(c * s, c * s + n) for c, s, n in zip(corner, record.strides, size, strict=True))
        r = x0 - y0
        record = replace(record, mean_square=tuple(r.double().square().mean(dim=(1, 2, 3)).tolist()))
        excerpt = [part[cut] for part in (truth, restored, body)]
        write_pair(path, record, (y0, r), excerpt, overwrite=self.request.overwrite)


def _flipped(record: PairRecord, part: np.ndarray) -> np.ndarray:
    """(D, H, W) → (m, H, W), a view: turned about, and without the slices that make no thick one."""
    return np.flip(part, tuple(axis for axis in range(3) if record.flips[axis]))[: record.grid.m]
