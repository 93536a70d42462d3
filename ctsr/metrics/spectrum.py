"""Sharpness along z: power by frequency, and the width of edges.

Arrays are (D, H, W) in HU, the slice axis first. Frequencies are in cycles per thin slice, 0.5 the highest.
"""

from __future__ import annotations

import numpy as np

__all__ = ["edge_width", "power_above_half", "power_ratio"]

_MIN_SLICES = 12  # a Hann window spreads a line over ±2 bins: with fewer the slowest waves leak above half
_HALF = 0.25  # cycles per slice, half of the highest frequency

_EDGE_CONTRAST = 400.0  # HU; soft tissue to lung is 800–900, the noise of a sharp kernel 80
_EDGE_STEEPNESS = 0.25  # of the contrast in the steepest step: an edge of σ > 1.6 slices lies aslant in z
_EDGE_REACH = 12  # slices to each side in which an edge begins and ends


def power_ratio(
    pred: np.ndarray, ref: np.ndarray, body: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Frequencies > 0 (F,), and the power of `pred` over that of `ref` at each; NaN where `ref` has none.

    Columns wholly inside the mask, mean removed, Hann window, powers summed over columns before the ratio.
    The window matters: without it the ends leak, and interpolation seems to keep 40 % of the power above
    half. None with fewer than 12 slices, or where no column lies inside.
    """
    powers = _powers(pred, ref, body)
    if powers is None:
        return None
    frequency, power, power_ref = powers
    return frequency, np.divide(power, power_ref, out=np.full_like(power, np.nan), where=power_ref > 0)


def power_above_half(pred: np.ndarray, ref: np.ndarray, body: np.ndarray | None = None) -> float | None:
    """Ratio of the powers summed over columns and frequencies > 0.25 cycles per slice; None as above."""
    powers = _powers(pred, ref, body)
    if powers is None:
        return None
    frequency, power, power_ref = powers
    above, above_ref = power[frequency > _HALF].sum(), power_ref[frequency > _HALF].sum()
    return float(above / above_ref) if above_ref > 0 else None


def _powers(
    pred: np.ndarray, ref: np.ndarray, body: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Frequencies without 0, and the summed powers of both; works on one row of the image at a time."""
    depth = len(ref)
    inside = np.ones(ref.shape[1:], bool) if body is None else np.asarray(body.all(axis=0))
    if depth < _MIN_SLICES or not inside.any():
        return None
    window = np.sin(np.pi * (np.arange(depth) + 0.5) / depth) ** 2  # Hann, symmetric, not zero at the ends
    sums = np.zeros((2, depth // 2 + 1))
    for h in range(ref.shape[1]):
        chosen = np.flatnonzero(inside[h])
        for volume, total in zip((pred, ref), sums, strict=True):
            columns = volume[:, h, chosen].T.astype(np.float64)
            columns = (columns - columns.mean(axis=1, keepdims=True)) * window
            total += (np.abs(np.fft.rfft(columns)) ** 2).sum(axis=0)
    return np.fft.rfftfreq(depth)[1:], sums[0, 1:], sums[1, 1:]


def edge_width(
    pred: np.ndarray, ref: np.ndarray, *, spacing: float, body: np.ndarray | None = None
) -> tuple[float | None, float | None]:
    """10–90 % width along z of the same edges in both volumes, median, mm: (of `pred`, of `ref`).

    Edges are found in the reference: a column that rises or falls by 400 HU or more without turning, a
    quarter of it in one step. In each volume the edge runs from one turning point to the next about that
    step, and its two ends are its 0 and 100 %. None where the reference has no edge, or `pred` none at half.
    spacing: of the slices, mm.
    """
    rows = [h for h in range(ref.shape[1]) if body is None or body[:, h].any()]
    found = [_row_widths(pred[:, h], ref[:, h], None if body is None else body[:, h]) for h in rows]
    widths = np.concatenate([np.empty((2, 0)), *found], axis=1)
    if widths.shape[1] == 0:
        return None, None
    of_pred, of_ref = (float(np.median(each)) * spacing for each in widths)
    return of_pred if np.isfinite(of_pred) else None, of_ref


def _row_widths(pred: np.ndarray, ref: np.ndarray, body: np.ndarray | None) -> np.ndarray:
    """(2, n) widths, in slices, of the n edges in one image row, (D, W); infinite where `pred` has none."""
    pred, ref = pred.astype(np.float64), ref.astype(np.float64)
    step = np.diff(ref, axis=0)
    size = np.pad(np.abs(step), ((1, 1), (0, 0)))
    here = size[1:-1]
    strong = (here >= _EDGE_STEEPNESS * _EDGE_CONTRAST) & (here >= size[:-2]) & (here > size[2:])
    if body is not None:
        strong &= body[:-1] & body[1:]
    k, w = np.nonzero(strong)  # the steepest step of an edge is the one from slice k to k + 1
    sign = np.sign(step[k, w])
    low, high = _run(ref, k, w, sign)
    contrast = np.abs(ref[high, w] - ref[low, w])
    edge = (contrast >= _EDGE_CONTRAST) & (np.abs(step[k, w]) >= _EDGE_STEEPNESS * contrast)
    k, w, sign = k[edge], w[edge], sign[edge]
    return np.stack([_widths(volume, k, w, sign) for volume in (pred, ref)])


def _run(values: np.ndarray, k: np.ndarray, w: np.ndarray, sign: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last slice of the monotone runs about the steps k → k + 1 of columns w."""
    low, high = k, k + 1
    for _ in range(_EDGE_REACH):
        before, after = np.maximum(low - 1, 0), np.minimum(high + 1, len(values) - 1)
        low = np.where(sign * (values[low, w] - values[before, w]) >= 0, before, low)
        high = np.where(sign * (values[after, w] - values[high, w]) >= 0, after, high)
    return low, high


def _widths(values: np.ndarray, k: np.ndarray, w: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """10–90 % widths in slices of those runs; infinite for one that is flat or goes the other way."""
    low, high = _run(values, k, w, sign)
    contrast = sign * (values[high, w] - values[low, w])
    index = np.minimum(low + np.arange(2 * _EDGE_REACH + 2)[:, None], high)
    profile = sign * (values[index, w] - values[low, w]) / np.where(contrast > 0, contrast, np.inf)

    def crossing(level: float) -> np.ndarray:
        below = np.maximum((profile < level).sum(axis=0) - 1, 0)
        around = np.clip(below + np.arange(-1, 3)[:, None], 0, len(profile) - 1)
        p0, p1, p2, p3 = profile[around, np.arange(w.size)]
        # A cubic through the four samples about the crossing: a straight line makes a Gaussian edge of σ = 1
        # slice 8 % too wide.
        left, right = np.zeros(w.size), np.ones(w.size)
        for _ in range(12):
            t = (left + right) / 2
            bend = 2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)
            cubic = p1 + t / 2 * (p2 - p0 + t * bend)
            left, right = np.where(cubic < level, t, left), np.where(cubic < level, right, t)
        return np.asarray(below + right)

    return np.where(contrast > 0, crossing(0.9) - crossing(0.1), np.inf)
