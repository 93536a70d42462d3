"""Random networks that cost milliseconds, and pipelines around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ctsr.diffusion.schedule import Schedule
from ctsr.infer.diffusion import Diffuser
from ctsr.infer.pipeline import CLASSICAL, Pipeline, Recipe
from ctsr.infer.sampling import Sampling
from ctsr.infer.stage_one import Engine
from ctsr.infer.windows import Tiling
from ctsr.models.control import ControlledUNet
from ctsr.models.latent_unet import LatentUNetConfig
from ctsr.models.simple_unet3d import SimpleUNet3D, SimpleUNet3DConfig
from ctsr.models.vae import CtVae, VaeConfig
from ctsr.models.zoo import pack
from ctsr.physics.profile import SliceProfile

CONFIG = SimpleUNet3DConfig(channels=(8, 8))


def network(seed: int = 0, config: SimpleUNet3DConfig = CONFIG) -> SimpleUNet3D:
    """Untrained, with a head loud enough that a mistake shows: residuals of tens of HU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SimpleUNet3D(config)
        torch.nn.init.normal_(made.head.weight, std=0.02)
    return made


def checkpoint(folder: Path, card: dict | None = None) -> Path:
    """The network as a model file."""
    path = folder / "tiny.safetensors"
    path.write_bytes(pack("baseline", CONFIG.to_dict(), network().state_dict(), card=card or {}))
    return path


def engine(chunk: int | None = 8, config: SimpleUNet3DConfig = CONFIG) -> Engine:
    """The network on the CPU."""
    return Engine(network(config=config), torch.device("cpu"), torch.float32, chunk)


def pipeline(
    method: str,
    plane: tuple[int, int],
    *,
    chunk: int = 8,
    patch: tuple[int, int] | None = None,
    overlap: int | None = None,
    config: SimpleUNet3DConfig = CONFIG,
    diffuser: Diffuser | None = None,
    **recipe: object,
) -> Pipeline:
    """A pipeline of `n` slices, 2.5 mm thick and apart unless told otherwise."""
    told = {"factor": 2.0, "spacing": 2.5, "thickness": 2.5, "profile": SliceProfile(), "method": method}
    made = None if method in CLASSICAL else engine(chunk, config)
    tiling = Tiling(*plane, None, 0, 0, 1)
    if made is not None:
        reach = made.network.plane_reach
        wide = reach if overlap is None else overlap
        tiling = Tiling(*plane, patch, wide, reach, made.network.stride)
    return Pipeline(Recipe(**(told | recipe)), tiling=tiling, engine=made, diffuser=diffuser)  # type: ignore[arg-type]


def thick(n: int, plane: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(n, H, W) int16: noise over the whole range of HU, the hardest input there is."""
    return np.random.default_rng(seed).integers(-1024, 3072, (n, *plane)).astype(np.int16)


def diffuser(*, is_trained: bool = True, dtype: torch.dtype = torch.float32, **sampling: object) -> Diffuser:
    """Random networks of a diffusion: 3 steps, 2 samples unless told otherwise; trained, they change tens of HU."""
    told = Sampling(**({"num_steps": 3, "samples": 2} | sampling))  # type: ignore[arg-type]
    unet, vae = diffusion_networks(is_trained)
    return Diffuser(unet, vae, Schedule.ctsr(unet.config.kappa), told, torch.device("cpu"), dtype)


def diffusion_networks(is_trained: bool = True) -> tuple[ControlledUNet, CtVae]:
    """A U-Net that reaches 6 latent voxels, and an autoencoder that is more than its block transform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = ControlledUNet(LatentUNetConfig(latent_channels=8, model_channels=4, multipliers=(1,)))
        vae = CtVae(VaeConfig(channels=(4, 4)))
        for network in (unet, vae) if is_trained else ():
            for p in network.parameters():
                p.data += torch.randn_like(p) * (0.3 / p[0].numel() ** 0.5)
    return unet, vae
