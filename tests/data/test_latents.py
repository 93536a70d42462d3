"""Pairs of latents: what was written is read back, what does not fit is refused, whose they are is checked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctsr.data import latents
from ctsr.data.latents import LatentPair, PairRecord, Stamp, check_stamps, excerpt_box, write_pair
from ctsr.errors import InputError, WeightsError

STAMP = Stamp(vae_sha256="a" * 64, stage_one_sha256="b" * 64, recipe="r", is_out_of_fold=True)
RECORD = PairRecord(
    stamp=STAMP, content="c" * 64, factor=3, rho=1.25, n=4, spacing=1.0, pixel=0.8, flips=(True, False, True),
    strides=(2, 4, 4), corner=(0, 0, 0), dtype="fp32", seed=0, mean_square=(0.25,) * 8,
)  # fmt: skip


def parts(record: PairRecord = RECORD, *, seed: int = 0) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Latents and excerpt of a volume of (12, 20, 24) voxels."""
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(8, 6, 5, 6, generator=generator) for _ in range(2)]
    rng = np.random.default_rng(seed)
    corner, size = excerpt_box(record, np.ones((12, 20, 24), bool))
    assert corner == record.corner
    return pair, [*rng.integers(-1000, 1000, (2, *size), dtype=np.int16), rng.random(size) < 0.5]


def written(folder: Path, record: PairRecord = RECORD) -> Path:
    path = folder / "scan.nii.gz" / "x3-0.safetensors"
    write_pair(path, record, *parts(record), overwrite=True)
    return path


@pytest.mark.parametrize(("dtype", "bits"), [("fp32", 24), ("fp16", 11), ("bf16", 8)])
def test_a_pair_is_read_back_as_it_was_written(tmp_path, dtype, bits):
    record = replace(RECORD, dtype=dtype)
    path = written(tmp_path, record)
    (found,) = LatentPair.find(tmp_path, "scan.nii.gz")
    assert (found.path, found.name, found.record, found.shape) == (path, "scan.nii.gz", record, (8, 6, 5, 6))
    pair, excerpt = parts(record)
    for before, after in zip(pair, found.read((1, 0, 2), (3, 5, 4)), strict=True):
        assert after.dtype == torch.float32
        torch.testing.assert_close(after, before[:, 1:4, 0:5, 2:6], rtol=2.0**-bits, atol=1e-6)
    for a, b in zip(excerpt, found.excerpt(), strict=True):
        np.testing.assert_array_equal(a, b)
    before = path.read_bytes()
    assert written(tmp_path, record).read_bytes() == before
    assert LatentPair.find(tmp_path, "another.nii.gz") == []


@given(
    factor=st.integers(2, 8), n=st.integers(2, 40), height=st.integers(1, 300), width=st.integers(1, 300),
    strides=st.sampled_from([(2, 4, 4), (1, 4, 4), (4, 8, 8)]),
)  # fmt: skip
def test_an_excerpt_ends_where_thick_slices_and_latent_voxels_do(factor, n, height, width, strides):
    record = replace(RECORD, factor=factor, n=n, strides=strides)
    size = (record.grid.m, height, width)
    body = np.zeros(size, bool)
    body[:, height // 5, width // 7] = True
    corner, lengths = excerpt_box(record, body)
    start = [c * s for c, s in zip(corner, strides, strict=True)]
    assert all(k > 0 and a + k <= m for a, k, m in zip(start, lengths, size, strict=True))
    assert start[0] % factor == 0
    assert lengths[0] % factor == 0
    for k, m, s, most in zip(lengths, size, strides, latents.EXCERPT_SIZE, strict=True):
        assert k == m or k % s == 0
        assert k <= max(most, math.lcm(factor, s))
    assert body[*(slice(a, a + k) for a, k in zip(start, lengths, strict=True))].any()


def spoil_tensor(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, kept = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    kept |= {name: tensor} if tensor is not None else {}
    kept = kept if tensor is not None else {k: t for k, t in kept.items() if k != name}
    path.write_bytes(safetensors.torch.save(kept, metadata=metadata))


def spoil_record(path: Path, **changes: object) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        told, kept = json.loads(file.metadata()["ctsr.latents"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    path.write_bytes(safetensors.torch.save(kept, metadata={"ctsr.latents": json.dumps(told | changes)}))


SPOILT = {
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:-100]), "no pair of latents, or damaged"),
    "empty": (lambda p: p.write_bytes(b""), "no pair of latents, or damaged"),
    "a pickle": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)), "no pair of latents, or damaged"),
    "other tensors": (
        lambda p: p.write_bytes(safetensors.torch.save({"x": torch.ones(3)})),
        "no pair of latents",
    ),
    "another version": (lambda p: spoil_record(p, format=2), "another version of ctsr"),
    "an entry too many": (lambda p: spoil_record(p, extra=1), "no pair of latents"),
    "no factor": (lambda p: spoil_record(p, factor=None), "no pair of latents"),
    "more slices": (lambda p: spoil_record(p, n=7), "parts do not fit"),
    "a far excerpt": (lambda p: spoil_record(p, corner=[0, 4, 0]), "parts do not fit"),
    "a channel less": (lambda p: spoil_record(p, mean_square=[0.1] * 7), "parts do not fit"),
    "another y0": (lambda p: spoil_tensor(p, "y0", torch.ones(8, 6, 5, 5)), "parts do not fit"),
    "no truth": (lambda p: spoil_tensor(p, "truth", None), "no pair of latents"),
    "a flat latent": (lambda p: spoil_tensor(p, "r", torch.ones(8, 6)), "no pair of latents"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_is_no_pair_is_refused(tmp_path, how):
    spoil, words = SPOILT[how]
    path = written(tmp_path)
    spoil(path)
    with pytest.raises(InputError, match=words) as error:
        LatentPair.open(path)
    assert error.value.path == str(path)


def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path):
    pair, excerpt = parts()
    with pytest.raises(WeightsError, match="not finite as fp16") as error:
        write_pair(
            tmp_path / "x", replace(RECORD, dtype="fp16"), [pair[0] * 1e6, pair[1]], excerpt, overwrite=False
        )
    assert error.value.exit_code == 5
    path = written(tmp_path)
    spoil_tensor(path, "y0", torch.full((8, 6, 5, 6), math.nan))
    with pytest.raises(InputError, match="not finite"):
        LatentPair.open(path).read((0, 0, 0), (2, 2, 2))


def test_latents_belong_together_or_are_refused():
    here, there = Path("here"), Path("there")
    check_stamps([])
    check_stamps([(here, STAMP), (there, STAMP)])
    fold = replace(STAMP, stage_one_sha256="d" * 64)
    check_stamps([(here, STAMP), (there, fold)])
    for other in (
        replace(STAMP, vae_sha256="d" * 64),
        replace(fold, recipe="other"),
        replace(fold, is_out_of_fold=False),
    ):
        for pair in ([(here, STAMP), (there, other)], [(here, other), (there, STAMP)]):
            with pytest.raises(
                WeightsError, match=r"latents of the (VAE|stage one) [abd]{12}…, those of here"
            ) as error:
                check_stamps(pair)
            assert error.value.exit_code == 5


def test_what_was_made_otherwise_is_told():
    assert RECORD.difference(replace(RECORD, mean_square=())) == ""
    assert RECORD.difference(replace(RECORD, rho=2.0)) == "rho: 1.25, now 2.0"
