"""One row of numbers for one case, the conditions on it, and the summary over cases."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

import numpy as np

from ctsr.errors import InputError, UsageError
from ctsr.metrics.fidelity import PEAK, PEAK_PUBLISHED, difference, ssim
from ctsr.metrics.lung import densitometry
from ctsr.metrics.masks import BANDS, Regions
from ctsr.metrics.spectrum import edge_width, power_above_half

__all__ = ["METRICS", "Requirement", "Row", "check_requirements", "parse_requirement", "score", "summary"]

Row = Mapping[str, float | bool | None]

MIN_CASES = 8  # a percentile interval over 2 to 5 cases covers 50–80 % instead of 95
RESAMPLES = 2000

_LUNG = {"lung_below_950": "below_950", "lung_below_910": "below_910", "lung_p15_hu": "p15"}

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
    pred: np.ndarray,
    ref: np.ndarray,
    *,
    spacing_z_mm: float,
    mask: Literal["body", "lung", "none"] | np.ndarray = "body",
    regions: Regions | None = None,
) -> dict[str, float | bool | None]:
    """Every metric of a result against its reference, (D, H, W) HU each, as one flat row.

    mask: the voxels of PSNR, SSIM, MAE, bias and RMSE; "none" takes all of them, an array its own (bool).
    regions: masks made once by Regions.of(ref), so that several methods are scored on the same voxels.
        Without them they are made here, inside the body, or inside `mask` where that is an array or "none".
    None stands where there is nothing to measure: a band without voxels, a plane too small for SSIM, the PSNR
    of what is identical on these voxels (then `identical` is True). Lung shares and their errors: percent.
    """
    if regions is None:
        own = np.ones(ref.shape, bool) if isinstance(mask, str) and mask == "none" else mask
        regions = Regions.of(ref, body=None if isinstance(own, str) else own)
    voxels = _voxels(mask, regions)
    d = difference(pred, ref, voxels)
    identical = d.mean_square == 0
    row: dict[str, float | bool | None] = {
        "psnr_4095_db": None if identical else d.psnr(PEAK),
        "psnr_2000_db": None if identical else d.psnr(PEAK_PUBLISHED),
        "ssim_axial": ssim(pred, ref, plane="axial", mask=voxels),
        "ssim_coronal": ssim(pred, ref, plane="coronal", mask=voxels),
        "ssim_sagittal": ssim(pred, ref, plane="sagittal", mask=voxels),
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
    lungs = densitometry(pred, regions.lung), densitometry(ref, regions.lung)
    for metric, field in _LUNG.items():
        of_pred, of_ref = (None if lung is None else float(getattr(lung, field)) for lung in lungs)
        row[f"{metric}_pred"], row[f"{metric}_ref"] = of_pred, of_ref
        row[f"{metric}_error"] = None if of_pred is None or of_ref is None else of_pred - of_ref
    row["power_above_half"] = power_above_half(pred, ref, regions.body)
    widths = edge_width(pred, ref, spacing=spacing_z_mm, body=regions.body)
    row["edge_width_mm_pred"], row["edge_width_mm_ref"] = widths
    row["identical"] = identical
    return row


def _voxels(mask: str | np.ndarray, regions: Regions) -> np.ndarray | None:
    if not isinstance(mask, str):
        return mask
    if mask == "none":
        return None
    if mask not in ("body", "lung"):
        raise UsageError(f"mask: {mask!r} is not body, lung or none")
    chosen = regions.body if mask == "body" else regions.lung
    if not chosen.any():
        raise InputError(f"{mask} mask is empty")
    return chosen


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
        if self.metric.startswith("bias") or self.metric.endswith("_error"):
            value = abs(value)
        return bool(_SIGNS[self.sign](value, self.limit))


_SIGNS: dict[str, Callable[[float, float], bool]]
_SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(
    r"\s*([a-z]\w*)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*", re.A | re.I
)
_SHORT = {"psnr": "psnr_4095_db", "ssim": "ssim_coronal"}  # elsewhere the name without its unit


def parse_requirement(text: str, *, known: Sequence[str] = METRICS) -> Requirement:
    """The condition that a text like "psnr>=35" states; a metric may be shortened as long as only one fits.

    Raises UsageError, which names the nearest metrics where this one is unknown.
    """
    match = _CONDITION.fullmatch(text)
    if match is None or not math.isfinite(float(match[3])):
        raise UsageError(f"requirement {text!r} is not METRIC>=NUMBER", hint="the signs are >= <= > <")
    return Requirement(_full_name(match[1].lower(), known), match[2], float(match[3]))


def _full_name(name: str, known: Sequence[str]) -> str:
    for candidate in (name, _SHORT.get(name, ""), f"{name}_hu", f"{name}_db", f"{name}_mm"):
        if candidate in known:
            return candidate
    longer = [each for each in known if each.startswith(name)]
    if len(longer) == 1:
        return longer[0]
    if longer:
        raise UsageError(f"metric {name!r} is one of {len(longer)}", hint=f"say which: {', '.join(longer)}")
    nearest = get_close_matches(name, [*known, *_SHORT], n=3, cutoff=0.0)
    raise UsageError(f"unknown metric {name!r}", hint=f"nearest: {', '.join(nearest)}")


def check_requirements(row: Row, requirements: Iterable[Requirement]) -> list[str]:
    """What the row fails, one line each: "psnr_4095_db is 33.1, required >= 35". Empty: all hold."""
    failed = []
    for each in requirements:
        if not each.holds(row):
            value = row.get(each.metric)
            found = "not measured" if value is None else f"{value:.6g}"
            failed.append(f"{each.metric} is {found}, required {each.sign} {each.limit:g}")
    return failed


def summary(rows: Sequence[Row], *, seed: int = 0) -> dict[str, dict[str, float | int | list[float] | None]]:
    """For each metric over the cases that have it: n, mean, min, max, and `interval_95`.

    The interval of the mean is a bootstrap over cases (percentiles of 2000 resamples), from 8 cases on; None
    below: it would promise 95 % and cover far less. Text and booleans in the rows are passed over.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    table: dict[str, dict[str, float | int | list[float] | None]] = {}
    for name in names:
        cells = [row.get(name) for row in rows]
        if any(isinstance(cell, (str, bool, np.bool_)) for cell in cells):
            continue
        values = np.array([cell for cell in cells if cell is not None], dtype=np.float64)
        n, interval = values.size, None
        if n >= MIN_CASES:  # each metric from the same seed: the same cases are drawn for all of them
            drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
            interval = [float(q) for q in np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])]
        range_ = (float(values.mean()), float(values.min()), float(values.max())) if n else (None,) * 3
        table[name] = {
            "n": n,
            **dict(zip(("mean", "min", "max"), range_, strict=True)),
            "interval_95": interval,
        }
    return table
