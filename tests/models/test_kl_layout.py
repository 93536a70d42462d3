"""A 2D autoencoder's file starts a model that gives each slice what the 2D model gives, or is refused."""

from __future__ import annotations

import io
import math
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctsr.errors import WeightsError
from ctsr.models.kl_layout import load_kl
from ctsr.models.vae import CtVae, VaeConfig

GROUPS, WIDTHS, BLOCKS, LATENTS = 4, (8, 12, 16), 2, 4
CONFIG = VaeConfig(WIDTHS, (1, 1), blocks=BLOCKS, latent_channels=LATENTS, unshuffle=1, slice_groups=GROUPS)
TOLERANCE = 1e-5  # of the largest value: float32 through some thirty convolutions
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def weights(image_channels: int = 1, attention: bool = True, quant: bool = True) -> dict[str, Tensor]:
    """Random weights in the layout, written down from its description."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        made[name + ".weight"] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        made[name + ".bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def conv(name: str, outputs: int, inputs: int, size: int = 3) -> None:
        put(name, outputs, inputs, size, size)

    def norm(name: str, channels: int) -> None:
        put(name, channels)
        made[name + ".weight"] = 1 + 0.3 * torch.randn(channels, generator=generator)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", outputs, inputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.conv_shortcut", outputs, inputs, 1)

    def middle(name: str, channels: int) -> None:
        block(f"{name}.resnets.0", channels, channels)
        block(f"{name}.resnets.1", channels, channels)
        if attention:
            norm(f"{name}.attentions.0.group_norm", channels)
            for part in OLD_NAMES:
                put(f"{name}.attentions.0.{part}", channels, channels)

    for side, widths, blocks, ends in (
        ("encoder", WIDTHS, BLOCKS, (image_channels, 2 * LATENTS)),
        ("decoder", WIDTHS[::-1], BLOCKS + 1, (LATENTS, image_channels)),
    ):
        down = "down" if side == "encoder" else "up"
        conv(f"{side}.conv_in", widths[0], ends[0])
        before = widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                block(f"{side}.{down}_blocks.{i}.resnets.{j}", before if j == 0 else width, width)
            if i < len(widths) - 1:
                conv(f"{side}.{down}_blocks.{i}.{down}samplers.0.conv", width, width)
            before = width
        middle(f"{side}.mid_block", WIDTHS[-1])
        norm(f"{side}.conv_norm_out", widths[-1])
        conv(f"{side}.conv_out", ends[1], widths[-1])
    if quant:
        conv("quant_conv", 2 * LATENTS, 2 * LATENTS, 1)
        conv("post_quant_conv", LATENTS, LATENTS, 1)
    return made


class TwoD:
    """The slow obvious one: one slice (1, C, H, W) through a table of weights."""

    def __init__(self, w: dict[str, Tensor]) -> None:
        self.w = w

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        weight = self.w[name + ".weight"]
        return F.conv2d(x, weight, self.w[name + ".bias"], **({"padding": weight.shape[-1] // 2} | how))

    def norm(self, name: str, x: Tensor) -> Tensor:
        grouped = x.view(GROUPS, -1)
        grouped = (grouped - grouped.mean(1, keepdim=True)) / (
            grouped.var(1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        scale, shift = (self.w[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
        return grouped.view(x.shape) * scale + shift

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        has_shortcut = f"{name}.conv_shortcut.weight" in self.w
        return h + (self.conv(f"{name}.conv_shortcut", x) if has_shortcut else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.to_q.weight" not in self.w:
            return x
        pixels = self.norm(f"{name}.group_norm", x).flatten(2)[0].T

        def linear(part: str, rows: Tensor) -> Tensor:
            return rows @ self.w[f"{name}.{part}.weight"].T + self.w[f"{name}.{part}.bias"]

        q, k, v = (linear(part, pixels) for part in ("to_q", "to_k", "to_v"))
        seen = torch.softmax(q @ k.T / x.shape[1] ** 0.5, dim=1) @ v
        return x + linear("to_out.0", seen).T.reshape(x.shape)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.attention(f"{name}.attentions.0", self.block(f"{name}.resnets.0", x))
        return self.block(f"{name}.resnets.1", x)

    def level(self, name: str, blocks: int, x: Tensor) -> Tensor:
        for j in range(blocks):
            x = self.block(f"{name}.resnets.{j}", x)
        if f"{name}.downsamplers.0.conv.weight" in self.w:
            x = self.conv(f"{name}.downsamplers.0.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        if f"{name}.upsamplers.0.conv.weight" in self.w:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = self.conv(f"{name}.upsamplers.0.conv", x)
        return x

    def quantised(self, name: str, x: Tensor) -> Tensor:
        return self.conv(name, x) if f"{name}.weight" in self.w else x

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for i in range(len(WIDTHS)):
            x = self.level(f"encoder.down_blocks.{i}", BLOCKS, x)
        x = self.norm("encoder.conv_norm_out", self.middle("encoder.mid_block", x))
        return self.quantised("quant_conv", self.conv("encoder.conv_out", F.silu(x)))

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv("decoder.conv_in", self.quantised("post_quant_conv", z))
        x = self.middle("decoder.mid_block", x)
        for i in range(len(WIDTHS)):
            x = self.level(f"decoder.up_blocks.{i}", BLOCKS + 1, x)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.conv_norm_out", x)))


def packed(w: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({n: t.contiguous() for n, t in w.items()})


def loaded(w: dict[str, Tensor]):
    return load_kl(packed(w), "start.safetensors", groups=GROUPS)


def volume() -> Tensor:
    return torch.randn(1, 1, 5, 32, 24, generator=torch.Generator().manual_seed(1))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def errors(model: CtVae, encode, decode, image_channels: int = 1) -> tuple[float, float]:
    """Of moments and image, beside a 2D model that is given (1, channels, H, W) slice after slice."""
    x = volume()
    mean, logvar = model.encode(x)
    z = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))

    def inputs(k: int) -> Tensor:  # a complex image without imaginary part; a grey one in three colours
        image = x[:, :, k]
        return (
            torch.cat([image, 0 * image], 1)
            if image_channels == 2
            else image.expand(-1, image_channels, -1, -1)
        )

    moments = torch.stack([encode(inputs(k)) for k in range(5)], dim=2)
    images = [decode(z[:, :, k]) for k in range(5)]
    grey = [i.mean(1, keepdim=True) if image_channels == 3 else i[:, :1] for i in images]
    there = relative_error(torch.cat([mean, logvar], 1), moments)
    return there, relative_error(model.decode(z), torch.stack(grey, dim=2))


@pytest.mark.parametrize(
    "how", [{}, {"image_channels": 2}, {"image_channels": 3}, {"attention": False}, {"quant": False}], ids=str
)
@torch.inference_mode()
def test_every_slice_comes_out_as_the_2d_model_gives_it(how):
    w = weights(**how)
    start = loaded(w)
    assert start.model.config == CONFIG
    flat = TwoD(w)
    assert max(errors(start.model, flat.encode, flat.decode, how.get("image_channels", 1))) < TOLERANCE


@torch.inference_mode()
def test_that_comparison_sees_a_norm_over_the_whole_volume(monkeypatch):
    def over_all(self: nn.GroupNorm, x: Tensor) -> Tensor:
        moved = x.transpose(0, 1)[None]
        return F.group_norm(moved, GROUPS, self.weight, self.bias, self.eps)[0].transpose(0, 1)

    monkeypatch.setattr(nn.GroupNorm, "forward", over_all)
    w = weights()
    flat = TwoD(w)
    assert min(errors(loaded(w).model, flat.encode, flat.decode)) > 1e-2


@pytest.mark.ci
@torch.inference_mode()
def test_every_slice_comes_out_as_diffusers_gives_it():
    diffusers = pytest.importorskip("diffusers")
    w = weights(image_channels=2)
    judge = diffusers.AutoencoderKL(
        in_channels=2,
        out_channels=2,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=WIDTHS,
        layers_per_block=BLOCKS,
        latent_channels=LATENTS,
        norm_num_groups=GROUPS,
    ).eval()
    judge.load_state_dict(w, strict=True)
    found = errors(
        loaded(w).model, lambda x: judge.quant_conv(judge.encoder(x)), lambda z: judge.decode(z).sample, 2
    )
    assert max(found) < TOLERANCE


@torch.inference_mode()
def test_slices_hear_of_each_other_once_that_is_learnt():
    model = loaded(weights()).model
    x = volume()
    before = model.encode(x)[0]
    x[:, :, 2] += 1
    assert relative_error(model.encode(x)[0][:, :, [0, 1, 3, 4]], before[:, :, [0, 1, 3, 4]]) < 1e-6
    for name, p in model.named_parameters():
        if "along_z" in name:
            p.fill_(0.01)
    learnt = model.encode(x)[0]
    x[:, :, 2] -= 1
    assert relative_error(model.encode(x)[0][:, :, [1, 3]], learnt[:, :, [1, 3]]) > 1e-3


def test_a_report_says_what_fitted_what_was_changed_and_what_is_new():
    w = weights(image_channels=2, attention=False)
    start = loaded(w)
    assert set(start.adapted) == {
        "encoder.conv_in.weight",
        "decoder.conv_out.weight",
        "decoder.conv_out.bias",
    }
    assert set(start.adapted.values()) == {"the first of 2 image channels"}
    assert len(start.matched) + len(start.adapted) == len(w)
    names = set(start.model.state_dict())
    assert {*start.matched, *start.adapted, *start.missing} == names
    assert len(start.matched) + len(start.adapted) + len(start.missing) == len(names)
    assert all(re.search(r"along_z|attentions|latent_", n) for n in start.missing)
    said = start.describe()
    assert f"{len(start.matched)} tensors taken, 3 adapted" in said
    assert f"{len(start.missing)} new" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.inference_mode()
def test_weights_of_half_precision_are_taken_and_kept_as_float32(dtype):
    w = {n: t.to(dtype) for n, t in weights().items()}
    model = loaded(w).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    flat = TwoD({n: t.float() for n, t in w.items()})
    assert max(errors(model, flat.encode, flat.decode)) < TOLERANCE


@torch.inference_mode()
def test_the_older_names_of_the_layout_mean_the_same():
    w = weights()
    old = {}
    for name, t in w.items():
        for new, former in OLD_NAMES.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        old[name] = t
    assert set(old) != set(w)
    a, b = loaded(w).model, loaded(old).model
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())


def without(pattern: str, w: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {n: t for n, t in (w or weights()).items() if not re.search(pattern, n)}


def five_d(*names: str) -> dict[str, Tensor]:
    return {n: torch.zeros(2, 2, 1, 1, 1) for n in names}


BAD = {
    "MAISI": (five_d("encoder.blocks.0.conv.conv.conv.weight", "quant_conv_mu.conv.weight"), "MAISI"),
    "MedVAE": (five_d("encoder.conv_in.weight", "channel_ds.0.weight"), "MedVAE"),
    "latent diffusion": (five_d("encoder.down.0.block.0.conv1.weight"), "CompVis"),
    "in a whole checkpoint": (five_d("first_stage_model.decoder.up.0.block.0.conv1.weight"), "CompVis"),
    "VQ": (five_d("quantize.embedding.weight"), "VQ"),
    "LoRA": (five_d("encoder.mid.lora_up.weight"), "LoRA"),
    "U-Net": (five_d("down_blocks.0.resnets.0.conv1.weight"), "U-Net"),
    "something": ({"fc.weight": torch.zeros(3, 3)}, "0 levels"),
    "nothing": ({}, "0 levels"),
    "one too many": (weights() | {"encoder.extra.weight": torch.zeros(3)}, "encoder.extra.weight.*expected none"),
    "one too few": (without(r"^encoder\.conv_norm_out\.bias"), r"encoder\.conv_norm_out\.bias: missing"),
    "no middle": (without(r"mid_block"), "mid_block.*missing"),
    "a level less": (without(r"decoder\.up_blocks\.2"), r"up_blocks\.2.*missing"),
    "half an attention": (without(r"to_q"), r"to_q.*others of its module"),
    "half a quantiser": (without(r"^quant_conv\.bias"), "others of its module"),
    "another shape": (weights() | {"encoder.conv_norm_out.bias": torch.zeros(5)}, r"\(5,\), expected \(16,\)"),
    "four colours": (weights(image_channels=4), r"conv_in\.weight: \(8, 4, 3, 3\), expected \(8, 1, 3, 3\)"),
    "no numbers": (weights() | {"encoder.conv_in.bias": torch.full((8,), torch.nan)}, "not finite"),
    "float64": (weights() | {"encoder.conv_in.bias": torch.zeros(8, dtype=torch.float64)}, "F64"),
    "one latent moment": (
        weights() | {"encoder.conv_out.weight": torch.zeros(1, 16, 3, 3)}, "0 latent channels"
    ),
    "too wide": (
        weights() | {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(5000, 1, 1, 1)}, "5000"
    ),
    "old and new": (
        weights() | {"encoder.mid_block.attentions.0.query.bias": torch.zeros(16)}, "an old and a new name"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_another_layout_or_another_plan_is_refused_by_name(case):
    tensors, said = BAD[case]
    with pytest.raises(WeightsError, match=said) as caught:
        loaded(tensors)
    assert caught.value.path == "start.safetensors"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\x80\x04pickle", "pickle"),
        (packed(weights())[:-7], "truncated"),
        (packed(weights())[:100], "truncated"),
        (b"", "truncated"),
    ],
)
def test_bytes_that_are_no_weights_are_refused(data, said):
    with pytest.raises(WeightsError, match=said):
        load_kl(data, "start.safetensors", groups=GROUPS)


def test_a_pickle_is_not_opened():
    file = io.BytesIO()
    torch.save(weights(), file)
    with pytest.raises(WeightsError, match="pickle"):
        load_kl(file.getvalue(), "start.ckpt")


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(WeightsError, match="makes no network"):
        load_kl(packed(weights()), "start.safetensors")  # 32, of 8 channels
