"""One row of numbers for one case, the conditions on it, and the summary over cases."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from ctsr.errors import InputError, UsageError
from ctsr.metrics.fidelity import PEAK, PEAK_PUBLISHED, PLANE_AXIS, difference, ssim
from ctsr.metrics.masks import BANDS, Regions
from ctsr.metrics.spectrum import edge_width, power_above_half

__all__ = [
    "METRICS", "Requirement", "Row", "check_requirements", "densitometry", "parse_requirement", "residual_summary",
    "score", "summary",
]  # fmt: skip

Row = Mapping[str, float | bool | None]

_MIN_CASES = 8  # a percentile interval over 2 to 5 cases covers 50–80 % instead of 95
_RESAMPLES = 2000
_LUNG = ("lung_below_950", "lung_below_910", "lung_p15_hu")

METRICS: tuple[str, ...] = (  # what a row may hold and a requirement may name
    *("psnr_4095_db", "psnr_2000_db", "ssim_axial", "ssim_coronal", "ssim_sagittal"),
    *("mae_hu", "bias_hu", "rmse_hu"),
    *(f"{metric}_hu_{band}" for band in BANDS for metric in ("bias", "mae")),
    *(f"mean_hu_{band}_{side}" for band in BANDS for side in ("pred", "ref")),
    *(f"{metric}_{side}" for metric in _LUNG for side in ("pred", "ref", "error")),
    *("power_above_half", "edge_width_mm_pred", "edge_width_mm_ref"),
    *("residual_mean_hu", "residual_max_hu", "residual_counted_percent"),
    *(f"residual_mean_hu_{band}" for band in BANDS),
)


def score(
    pred: np.ndarray, ref: np.ndarray, regions: Regions, *, spacing_z_mm: float
) -> dict[str, float | bool | None]:
    """Every metric of a result against its reference, (D, H, W) HU each, as one flat row.

    regions: masks of the reference, made once, so that several methods are scored on the same voxels.
    None stands where there is nothing to measure: a band without voxels, a plane too small for SSIM, the PSNR
    of what is identical on these voxels (then `identical` is True). Lung shares and their errors: percent.
    """
    d = difference(pred, ref, regions.scored)
    identical = d.mean_square == 0
    row: dict[str, float | bool | None] = {
        "psnr_4095_db": None if identical else d.psnr(PEAK),
        "psnr_2000_db": None if identical else d.psnr(PEAK_PUBLISHED),
        **{f"ssim_{plane}": ssim(pred, ref, plane=plane, mask=regions.scored) for plane in PLANE_AXIS},
        "mae_hu": d.mean_abs,
        "bias_hu": d.mean,
        "rmse_hu": d.rmse,
    }
    for name, band in regions.bands.items():
        in_band = difference(pred, ref, band) if band.any() else None
        row[f"bias_hu_{name}"] = in_band.mean if in_band else None
        row[f"mae_hu_{name}"] = in_band.mean_abs if in_band else None
        for side, volume in (("pred", pred), ("ref", ref)):
            row[f"mean_hu_{name}_{side}"] = float(volume[band].mean(dtype=np.float64)) if in_band else None
    lungs = zip(_LUNG, densitometry(pred, regions.lung), densitometry(ref, regions.lung), strict=True)
    for metric, of_pred, of_ref in lungs:
        row[f"{metric}_pred"], row[f"{metric}_ref"] = of_pred, of_ref
        row[f"{metric}_error"] = None if of_pred is None or of_ref is None else of_pred - of_ref
    row["power_above_half"] = power_above_half(pred, ref, regions.body)
    widths = edge_width(pred, ref, spacing=spacing_z_mm, body=regions.body)
    row["edge_width_mm_pred"], row["edge_width_mm_ref"] = widths
    row["identical"] = identical
    return row


def densitometry(hu: np.ndarray, lung: np.ndarray) -> tuple[float | None, ...]:
    """How much of a lung is nearly air (emphysema): percent below −950 and −910 HU; and its 15th percentile, HU.

    lung: the reference's mask; None three times where it is empty.
    """
    values = hu[lung].astype(np.float64)
    if values.size == 0:
        return None, None, None
    below = (float(100 * np.count_nonzero(values < limit) / values.size) for limit in (-950, -910))
    return (*below, float(np.percentile(values, 15)))


def residual_summary(
    residual: np.ndarray, bands: Mapping[str, np.ndarray], counts: np.ndarray | None = None
) -> dict[str, float | None]:
    """Mean and greatest |A x − y| in HU, the mean in each band, and the share of thick voxels that counted.

    residual: A x − y on the thick grid, (n, H, W), of either sign. bands: masks there.
    counts: (n, H, W) bool, the voxels that count: those that padding or a dtype's limit reached do not. None: all.
    A figure is None where no voxel counts.
    """
    if not np.isfinite(residual).all():
        raise InputError("the residual is not finite")
    size = np.abs(residual, dtype=np.float64)
    counts = np.ones(size.shape, bool) if counts is None else counts

    def mean(inside: np.ndarray) -> float | None:
        return float(size[inside].mean()) if inside.any() else None

    return {
        "residual_mean_hu": mean(counts),
        "residual_max_hu": float(size[counts].max()) if counts.any() else None,
        "residual_counted_percent": 100 * float(counts.mean()),
        **{f"residual_mean_hu_{name}": mean(band & counts) for name, band in bands.items()},
    }


_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
_CONDITION = re.compile(rf"\s*([a-z]\w*)\s*(>=|<=|>|<)\s*({_NUMBER})\s*", re.A | re.I)
_SHORT = {"psnr": "psnr_4095_db", "ssim": "ssim_coronal"}  # elsewhere the name without its unit


@dataclass(frozen=True, slots=True)
class Requirement:
    """A condition on one metric."""

    metric: str
    sign: str
    limit: float

    def holds(self, row: Row) -> bool:
        """Whether the row meets it. Of a bias or an error the size counts: −100 HU is not "below 1".

        What was not measured does not hold, but for the PSNR of identical volumes, which is infinite.
        """
        value = row.get(self.metric)
        if value is None and self.metric.startswith("psnr") and row.get("identical"):
            value = math.inf
        if value is None:
            return False
        is_signed = self.metric.startswith("bias") or self.metric.endswith("_error")
        return bool(_SIGNS[self.sign](abs(value) if is_signed else value, self.limit))


def parse_requirement(text: str, *, known: Sequence[str] = METRICS) -> Requirement:
    """The condition that a text like "psnr>=35" states; a metric may be shortened as long as only one fits.

    Raises UsageError, which names the nearest metrics where this one is unknown.
    """
    match = _CONDITION.fullmatch(text)
    if match is None or not math.isfinite(float(match[3])):
        raise UsageError(f"requirement {text!r} is not METRIC>=NUMBER", hint="the signs are >= <= > <")
    name = match[1].lower()
    for candidate in (name, _SHORT.get(name, ""), f"{name}_hu", f"{name}_db"):
        if candidate in known:
            return Requirement(candidate, match[2], float(match[3]))
    near = [each for each in known if each.startswith(name)]
    if len(near) != 1:
        near = near or get_close_matches(name, [*known, *_SHORT], n=3, cutoff=0.0)
        raise UsageError(f"unknown metric {name!r}", hint=f"nearest: {', '.join(near)}")
    return Requirement(near[0], match[2], float(match[3]))


def check_requirements(row: Row, requirements: Iterable[Requirement]) -> list[str]:
    """What the row fails, one line each: "psnr_4095_db is 33.1, required >= 35". Empty: all hold."""
    failed = []
    for each in requirements:
        if not each.holds(row):
            value = row.get(each.metric)
            found = "not measured" if value is None else f"{value:.6g}"
            failed.append(f"{each.metric} is {found}, required {each.sign} {each.limit:g}")
    return failed


def summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float | list[float] | None]]:
    """For each metric over the cases that have it: n, mean, min, max, and `interval_95`.

    The interval of the mean is a bootstrap over cases (percentiles of 2000 resamples), from 8 cases on; None
    below: it would promise 95 % and cover far less.
    """
    table: dict[str, dict[str, float | list[float] | None]] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = np.array([row[name] for row in rows if row.get(name) is not None], dtype=np.float64)
        n, interval = values.size, None
        if n >= _MIN_CASES:  # each metric from the same seed: the same cases are drawn for all of them
            drawn = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
            interval = [float(q) for q in np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])]
        table[name] = {
            "n": n,
            "mean": float(values.mean()) if n else None,
            "min": float(values.min()) if n else None,
            "max": float(values.max()) if n else None,
            "interval_95": interval,
        }
    return table
