"""Starting weights: a 2D autoencoder in the diffusers layout (AutoencoderKL) → CtVae, told what fitted and what didn't.

Nothing in the file is guessed at: its plan is read off the shapes in its header, every tensor has a place or the file
is refused, and what the file lacks starts as nothing (zero, or the identity), so that each slice of a volume comes out
as the 2D model gives it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctsr.errors import WeightsError
from ctsr.models.vae import PRESETS, CtVae, VaeConfig
from ctsr.models.zoo import CHANNELS_LIMIT, LEVELS_LIMIT, read_header, read_tensors

__all__ = ["Start", "load_kl"]

Shapes = Mapping[str, tuple[int, ...]]
GROUPS = 32  # of every AutoencoderKL of diffusers that was not told otherwise; no shape shows it
_RENAMED = [  # to the names of CtVae, the older ones of diffusers among them
    (r"^quant_conv\.", "encoder.quant_conv."),
    (r"^post_quant_conv\.", "decoder.post_quant_conv."),
    (r"(attentions\.0\.)query\.", r"\1to_q."),
    (r"(attentions\.0\.)key\.", r"\1to_k."),
    (r"(attentions\.0\.)value\.", r"\1to_v."),
    (r"(attentions\.0\.)proj_attn\.", r"\1to_out.0."),
]
_OPTIONAL = re.compile(r"along_z|latent_(mean|std)|quant_conv|mid_block\.attentions")
_FOREIGN = [  # the first that has a key like this
    (r"^quant_conv_mu\.|^encoder\.blocks\.\d+\.conv\.conv\.", "MAISI's (MONAI, AutoencoderKlMaisi)"),
    (r"^(channel_ds|channel_proj)\.", "MedVAE's"),
    (r"lora_(up|down)", "one with LoRA branches"),
    (r"^quantize\.", "a VQ autoencoder's"),
    (r"^(first_stage_model\.)?(encoder\.down|decoder\.up)\.\d+\.", "latent-diffusion's (CompVis)"),
    (r"^(down_blocks|time_embedding)\.", "a denoising U-Net's"),
]


@dataclass(frozen=True, slots=True)
class Start:
    """A model with the weights of a file in it. Names are those of the model.

    matched: taken as they are. adapted: changed to one image channel, and how. missing: not in the file, and nothing
    at the start.
    """

    model: CtVae
    matched: tuple[str, ...]
    adapted: Mapping[str, str]
    missing: tuple[str, ...]

    def describe(self) -> str:
        """For the log."""
        changed = "".join(f", {name} ({how})" for name, how in self.adapted.items())
        return f"{len(self.matched)} tensors taken, {len(self.adapted)} adapted{changed}, {len(self.missing)} new"


def load_kl(data: bytes, path: str, *, groups: int = GROUPS) -> Start:
    """The bytes of a `.safetensors` file in the diffusers layout → a slice-wise CtVae, in `eval` mode.

    groups: of its group norms, `norm_num_groups` of its config.json. Raises WeightsError naming what does not fit.
    """
    tensors = read_tensors(data, read_header(data, path), path, dtypes=("F32", "F16", "BF16"))
    _refuse_foreign(tensors, path)
    found = {_renamed(name): t.float() for name, t in tensors.items()}
    if len(found) != len(tensors):
        raise WeightsError("holds the same tensor by an old and a new name", path=path)
    try:
        config = _plan({name: tuple(t.shape) for name, t in found.items()}, path, groups)
        with torch.device("meta"):  # shapes alone: nothing is allocated before they fit the file
            expected = {n: tuple(t.shape) for n, t in CtVae(config).state_dict().items()}
    except ValueError as exc:
        raise WeightsError(f"makes no network: {exc}", path=path) from exc
    fitted = {n: _to_one_channel(n, t) for n, t in found.items()}
    missing, wrong = tuple(sorted(expected.keys() - found.keys())), []
    for name, (t, _) in sorted(fitted.items()):
        if (shape := expected.get(name, "none")) != tuple(t.shape):
            wrong.append(f"{name}: {tuple(found[name].shape)}, expected {shape}")
    for name in missing:
        module = re.match(r".*(quant_conv|attentions)\.", name)
        if not _OPTIONAL.search(name):
            wrong.append(f"{name}: missing, expected {expected[name]}")
        elif module is not None and any(other.startswith(module[0]) for other in found):
            wrong.append(f"{name}: missing, others of its module are there")  # which nobody trained
    if wrong:
        raise WeightsError(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:3])}", path=path)
    model = CtVae(config)
    model.load_state_dict({n: t for n, (t, _) in fitted.items()}, strict=False)
    adapted = {n: how for n, (_, how) in sorted(fitted.items()) if how}
    return Start(model.eval(), tuple(sorted(found.keys() - adapted.keys())), adapted, missing)


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _refuse_foreign(names: Iterable[str], path: str) -> None:
    for pattern, whose in _FOREIGN:
        if key := next((name for name in names if re.search(pattern, name)), None):
            raise WeightsError(
                f"weights in another layout: {key} looks like {whose}",
                path=path,
                hint="expected a diffusers AutoencoderKL: encoder.down_blocks.0.resnets.0.conv1.weight …",
            )


def _plan(shapes: Shapes, path: str, groups: int) -> VaeConfig:
    """Levels, blocks and channels from the encoder's convolutions."""

    def count(pattern: str) -> int:
        return len({m[1] for name in shapes if (m := re.match(pattern, name))})

    def outputs(name: str) -> int:
        shape = shapes.get(name, ())
        if len(shape) != 4 or not 0 < shape[0] <= CHANNELS_LIMIT:
            raise WeightsError(
                f"no diffusers AutoencoderKL: {name} is {shape or 'missing'}, expected 4 sizes", path=path
            )
        return shape[0]

    levels = count(r"encoder\.down_blocks\.(\d+)\.")
    if not 2 <= levels <= LEVELS_LIMIT:
        raise WeightsError(
            f"no diffusers AutoencoderKL: {levels} levels (encoder.down_blocks.N), expected 2 to {LEVELS_LIMIT}",
            path=path,
        )
    widths = tuple(outputs(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(levels))
    blocks = count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")
    latents = outputs("encoder.conv_out.weight") // 2
    return replace(
        PRESETS["mri"],
        channels=widths,
        z_strides=(1,) * (levels - 1),
        blocks=blocks,
        latent_channels=latents,
        slice_groups=groups,
    )


def _to_one_channel(name: str, t: Tensor) -> tuple[Tensor, str]:
    """A tensor at the image end for one channel, and how it was made; any other as it is, and "".

    Two channels, real and imaginary: the image is the real part. Three: grey goes in thrice, the mean comes out.
    """
    axis = {"encoder.conv_in.weight": 1, "decoder.conv_out.weight": 0, "decoder.conv_out.bias": 0}.get(name)
    channels = 1 if axis is None or t.ndim <= axis else t.shape[axis]
    if axis is None or channels not in (2, 3):
        return t, ""
    if channels == 2:
        return t.narrow(axis, 0, 1), "the first of 2 image channels"
    return t.sum(1, keepdim=True) if axis else t.mean(0, keepdim=True), "3 colours as one"
