"""What the network does where its input is not the ordinary chest: one table.

    python tests/benchmarks/robustness.py [--checkpoint FILE] [--write]

Needs the reference volumes. Gains are over cubic on the same voxels, PSNR with peak 4095 HU over the body mask; thick
slices are simulated at 2× unless a row says otherwise. With --write the section `robustness` of docs/benchmarks.md is
replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from machine import ROOT, markdown, options, provenance, reference_data, section
from scipy.ndimage import gaussian_filter

import ctsr
from ctsr.core.volume import Volume
from ctsr.metrics.fidelity import PEAK, psnr
from ctsr.metrics.masks import body_mask
from ctsr.physics.profile import ProfileKind, SliceProfile

ADDED = 1.0  # HU: added structure in a uniform phantom
LOSS = 0.8  # dB: of the gain, where the width is told 15 % wrong
METAL = 8000.0  # HU, two rods along a slice direction
LOW_DOSE = 60.0  # HU, noise added to the truth before it is thickened
NODULE = (4.0, 100.0)  # mm, HU above its surroundings


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--checkpoint")
    asked = parser.parse_args()
    thin = partial(ctsr.upsample, checkpoint=asked.checkpoint)
    rows = [*scans(thin), *phantoms(thin), *formats(thin)]
    text = f"{provenance('python tests/benchmarks/robustness.py --write')}\n\n{markdown(rows)}"
    print(text)
    if asked.write:
        section(ROOT / "docs" / "benchmarks.md", "robustness", text)


def scans(thin: Any) -> list[dict]:
    """Gains over cubic on scans that neither trained nor chose anything."""
    rows = []
    test = reference_data() / "test"
    for name in ("LIDC-IDRI-0001_2.5mm", "RICORD-001012_1.25mm"):
        truth = ctsr.read(test / f"{name}.nii.gz")
        right = gain(thin, truth)
        rows.append(row(f"{name}, as trained for", right))
        for share in (0.85, 1.15):
            found = gain(thin, truth, width=share)
            rows.append(
                row(
                    f"true width {share:g} of what is told",
                    found,
                    f"≥ {right - LOSS:.2f}",
                    found >= right - LOSS,
                )
            )
        for kind in (ProfileKind.BOX, ProfileKind.TRIANGLE):
            rows.append(
                row(
                    f"{kind} profile, told",
                    gain(thin, truth, profile=SliceProfile(kind), told=SliceProfile(kind)),
                )
            )
            rows.append(row(f"{kind} profile, told Gaussian", gain(thin, truth, profile=SliceProfile(kind))))
        for ratio in (0.8, 1.5, 2.0):
            rows.append(row(f"thickness {ratio:g} × spacing", gain(thin, truth, ratio=ratio)))
        rows.append(
            row(
                f"low dose: {LOW_DOSE:g} HU of noise, against the clean truth",
                gain(thin, truth, noise_sd=LOW_DOSE),
            )
        )
        rows.append(row(f"two rods of {METAL:g} HU", gain(thin, with_metal(truth))))
    noisy = ctsr.read(test / "chest_3mm_B70f_noisy.nii.gz")
    found = gain(thin, noisy)
    rows.append(row("sharp kernel, 80 HU of noise", found, "≥ 2.2", found >= 2.2))
    head = ctsr.read(reference_data() / "test-pair" / "phantom-head_1mm.nii.gz")
    rows.append(row("head phantom, 0.45 mm in plane, 1 mm", gain(thin, head)))
    return rows


def gain(
    thin: Any,
    truth: Volume,
    *,
    ratio: float = 1.0,
    width: float = 1.0,
    profile: SliceProfile | None = None,
    told: SliceProfile | None = None,
    noise_sd: float = 0.0,
) -> float:
    """dB over cubic at 2×. ratio: thickness / spacing that is told; width: true one / told one."""
    spacing = 2 * float(truth.spacing[2])
    thick, _ = ctsr.simulate(
        truth,
        factor=2,
        thickness=ratio * width * spacing,
        profile=profile or SliceProfile(),
        noise_sd=noise_sd,
        axis=2,
    )
    options = {"thickness": ratio * spacing, "profile": told or SliceProfile(), "axis": 2}
    made, cubic = (thin(thick, factor=2, **options), ctsr.upsample(thick, factor=2, model="cubic", **options))
    reference = depth_first(truth)[: made.data.shape[2]]
    body = body_mask(reference)
    ours, theirs = (psnr(depth_first(v), reference, body, peak=PEAK) for v in (made, cubic))
    return ours - theirs


def depth_first(volume: Volume) -> np.ndarray:
    """(D, H, W) float32 of a scan whose slices lie along its last axis."""
    return np.ascontiguousarray(volume.data.transpose(2, 1, 0), np.float32)


def with_metal(truth: Volume) -> Volume:
    """Two rods of 6 mm through the body, one along z and one along x."""
    data = np.array(truth.data, np.float32)
    i, j, k = np.ogrid[tuple(slice(n) for n in data.shape)]
    x, y, z = (np.array(data.shape) * (0.5, 0.6, 0.5)).astype(int)
    dx, dy, dz = truth.spacing
    data[((i - x) * dx) ** 2 + ((j - y) * dy) ** 2 + 0 * k <= 9] = METAL
    data[((j - y // 2) * dy) ** 2 + ((k - z) * dz) ** 2 + 0 * i <= 9] = METAL
    return Volume(data, truth.affine)


def phantoms(thin: Any) -> list[dict]:
    """Structure where there is none, noise above what came in, and a nodule that no slice is centred on."""
    rows = []
    for hu in (-1000.0, -850.0, 0.0, 60.0, 1000.0):
        made = thin(made_of(np.full((24, 96, 96), hu, np.float32)), factor=2).data
        added = float(np.std(made, dtype=np.float64))
        rows.append(
            row(f"uniform, {hu:g} HU: SD of what is added, HU", added, f"≤ {ADDED:g}", added <= ADDED)
        )
    noise = np.random.default_rng(0).normal(0, 30, (96, 128, 128)).astype(np.float32)
    thick, _ = ctsr.simulate(made_of(noise, 1.25), factor=2, axis=2)
    for model in ("baseline", "inverse"):
        share = (spectrum(depth_first(by(thin, model, thick))) / spectrum(noise)).max()
        words = f"noise alone: largest power along z ÷ the thin noise's, {model}"
        rows.append(row(words, f"{share:.2f}", "≤ 1", share <= 1))
    for model in ("truth", "baseline", "inverse", "cubic"):
        peaks = [nodule(thin, model, phase) for phase in np.arange(0, 1, 0.125)]
        words = f"nodule of {NODULE[0]:g} mm, {NODULE[1]:g} HU, 2.5 mm slices: peak over z-phase, HU, {model}"
        rows.append(row(words, f"{min(peaks):.0f}…{max(peaks):.0f}"))
    return rows


def by(thin: Any, model: str, thick: Volume) -> Volume:
    """Doubled by the network in question, or by a linear method."""
    made: Volume = (
        thin(thick, factor=2, axis=2) if model == "baseline" else ctsr.upsample(thick, model=model, axis=2)
    )
    return made


def formats(thin: Any) -> list[dict]:
    """What bf16 changes of fp32, on the voxels of a scan."""
    scan = ctsr.read(reference_data() / "test" / "LIDC-IDRI-0001_2.5mm.nii.gz")
    one, other = (thin(scan, factor=2, dtype=dtype).data for dtype in ("bf16", "fp32"))
    apart = one.astype(np.float64) - other
    words = (
        f"mean {apart.mean():.4f}, RMS {np.sqrt((apart**2).mean()):.2f}, largest {np.abs(apart).max():.0f}"
    )
    share = f"{(np.abs(apart) > 1).mean():.2%} above 1"
    return [row("bf16 − fp32, LIDC-IDRI-0001_2.5mm, HU", f"{words}; {share}")]


def made_of(hu: np.ndarray, spacing: float = 2.5) -> Volume:
    """A volume of (D, H, W)."""
    return Volume(hu.transpose(2, 1, 0), np.diag([0.7, 0.7, spacing, 1.0]))


def spectrum(hu: np.ndarray) -> np.ndarray:
    """Power by frequency along z, of all columns, without the mean; Hann window."""
    window = np.hanning(len(hu))[:, None, None]
    power = np.abs(np.fft.rfft((hu - hu.mean(axis=0)) * window, axis=0)) ** 2
    mean: np.ndarray = power.mean(axis=(1, 2))[2:]  # without what the window leaks from the mean
    return mean


def nodule(thin: Any, model: str, phase: float) -> float:
    """The highest value of a sphere in lung, above its surroundings.

    It lies `phase` of a thick slice off that slice's centre, and is blurred in plane as a scanner does.
    """
    diameter, contrast = NODULE
    fine, spacing = 8, 1.25
    z = ((np.arange(24 * fine) + 0.5) / fine - 12 + 1 - 2 * phase) * spacing  # from the sphere's centre, mm
    x = (np.arange(64) - 31.5) * 0.7
    inside = z[:, None, None] ** 2 + x[:, None] ** 2 + x**2 <= (diameter / 2) ** 2
    hu = -850 + contrast * gaussian_filter(inside.reshape(24, fine, 64, 64).mean(axis=1), (0, 0.8, 0.8))
    if model == "truth":
        return float(hu.max() + 850)
    thick, _ = ctsr.simulate(made_of(hu.astype(np.float32), spacing), factor=2, axis=2)
    return float(by(thin, model, thick).data.max() + 850)


def row(case: str, found: float | str, asked: str | None = None, is_met: bool = False) -> dict:
    return {
        "case": case,
        "gain over cubic, dB, or as named": f"{found:+.2f}" if isinstance(found, float) else found,
        "asked": asked,
        "met": None if asked is None else "yes" if is_met else "**missed**",
    }


if __name__ == "__main__":
    main()
