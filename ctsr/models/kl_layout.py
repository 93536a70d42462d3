"""Starting weights: a 2D autoencoder in the diffusers layout (AutoencoderKL) → CtVae, told what fitted and what didn't.

Nothing in the file is guessed at: its plan is read off the shapes in its header, every tensor has a place or the file
is refused, and what the file lacks starts as nothing (zero, or the identity), so that each slice of a volume comes out
as the 2D model gives it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor

from ctsr.errors import WeightsError
from ctsr.models.vae import CtVae, VaeConfig
from ctsr.models.zoo import CHANNELS_LIMIT, LEVELS_LIMIT, read_header

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
    header = read_header(data, path)
    header.pop("__metadata__", None)
    sides = {name: entry.get("shape") for name, entry in header.items()}
    shapes = {name: tuple(s) if isinstance(s, list) else () for name, s in sides.items()}
    _refuse_foreign(shapes, path)
    if odd := sorted({str(e.get("dtype")) for e in header.values()} - {"F32", "F16", "BF16"}):
        raise WeightsError(f"tensors of type {odd[0]}, expected F32, F16 or BF16", path=path)
    names = {name: _renamed(name) for name in shapes}
    if len(set(names.values())) != len(names):
        raise WeightsError("holds the same tensor by an old and a new name", path=path)
    config = _plan({names[n]: s for n, s in shapes.items()}, path, groups)
    try:
        with torch.device("meta"):  # shapes alone: nothing is allocated before they fit the file
            expected = {n: tuple(t.shape) for n, t in CtVae(config).state_dict().items()}
    except ValueError as exc:
        raise WeightsError(f"makes no network: {exc}", path=path) from exc
    found = {names[n]: s for n, s in shapes.items()}
    how = {n: _adaptation(n, found[n], expected[n]) for n in found.keys() & expected.keys()}
    missing = tuple(sorted(expected.keys() - found.keys()))
    wrong = [f"{n}: {found[n]}, expected {expected[n]}" for n, text in sorted(how.items()) if text is None]
    wrong += [f"{n}: {found[n]}, expected none" for n in sorted(found.keys() - expected.keys())]
    wrong += [f"{n}: missing, expected {expected[n]}" for n in missing if not _OPTIONAL.search(n)]
    wrong += [f"{n}: missing, others of its module are there" for n in missing if _is_torn(n, found)]
    if wrong:
        raise WeightsError(f"{len(wrong)} tensors do not fit: {'; '.join(wrong[:3])}", path=path)
    try:
        tensors = {names[n]: t.float() for n, t in safetensors.torch.load(data).items()}
    except (safetensors.SafetensorError, ValueError, KeyError) as exc:
        raise WeightsError(f"damaged or truncated weights: {exc}", path=path) from exc
    if broken := [n for n, t in tensors.items() if not torch.isfinite(t).all()]:
        raise WeightsError(f"{len(broken)} tensors are not finite, the first is {broken[0]}", path=path)
    model = CtVae(config)
    model.load_state_dict({n: _adapted(n, t) if how[n] else t for n, t in tensors.items()}, strict=False)
    adapted = {n: text for n, text in sorted(how.items()) if text}
    return Start(model.eval(), tuple(sorted(how.keys() - adapted.keys())), adapted, missing)


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _refuse_foreign(shapes: Shapes, path: str) -> None:
    for pattern, whose in _FOREIGN:
        if key := next((name for name in shapes if re.search(pattern, name)), None):
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
    try:
        return VaeConfig.preset(
            "mri",
            channels=widths,
            z_strides=(1,) * (levels - 1),
            blocks=blocks,
            latent_channels=latents,
            slice_groups=groups,
        )
    except ValueError as exc:
        raise WeightsError(f"makes no network: {exc}", path=path) from exc


def _adaptation(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str | None:
    """How a tensor is brought to one image channel: "" where it need not be, None where it cannot."""
    if found == expected:
        return ""
    axis = {"encoder.conv_in.weight": 1, "decoder.conv_out.weight": 0, "decoder.conv_out.bias": 0}.get(name)
    if axis is None or len(found) != len(expected) or found[axis] not in (2, 3):
        return None
    if (*found[:axis], 1, *found[axis + 1 :]) != expected:
        return None
    return "the first of 2 image channels" if found[axis] == 2 else "3 colours as one"


def _adapted(name: str, t: Tensor) -> Tensor:
    """Two channels, real and imaginary: the image is the real part. Three: grey goes in thrice, the mean comes out."""
    if name == "encoder.conv_in.weight":
        return t[:, :1] if t.shape[1] == 2 else t.sum(dim=1, keepdim=True)
    return t[:1] if t.shape[0] == 2 else t.mean(dim=0, keepdim=True)


def _is_torn(name: str, found: Shapes) -> bool:
    """Whether an optional module is there in part, which is nothing that anybody trained."""
    module = re.match(r".*(quant_conv|attentions)\.", name)
    return module is not None and any(other.startswith(module[0]) for other in found)
