"""A chest whose parts are known: ellipses of air, fat, soft tissue, lung and bone above a table."""

from __future__ import annotations

import numpy as np

SHAPE = (20, 128, 160)  # (D, H, W)
HU = {"air": -1000.0, "fat": -60.0, "soft": 40.0, "lung": -850.0, "bone": 600.0, "table": 120.0}


def _ellipse(centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    h, w = np.ogrid[: SHAPE[1], : SHAPE[2]]
    return ((h - centre[0]) / radii[0]) ** 2 + ((w - centre[1]) / radii[1]) ** 2 <= 1


def parts() -> dict[str, np.ndarray]:
    """Where each part lies, (D, H, W) bool; `body` is everything inside the skin."""
    body, inner = _ellipse((58, 80), (48, 66)), _ellipse((58, 80), (36, 54))
    lung = _ellipse((54, 53), (24, 18)) | _ellipse((54, 107), (24, 18))
    bone = _ellipse((78, 80), (9, 9))
    table = np.zeros(SHAPE[1:], bool)
    table[114:118, 10:150] = True  # eight rows of air below the skin
    plane = {"body": body, "fat": body & ~inner, "lung": lung, "bone": bone, "table": table}
    plane["soft"] = inner & ~lung & ~bone
    return {name: np.broadcast_to(mask, SHAPE) for name, mask in plane.items()}


def thorax() -> np.ndarray:
    """The chest without noise, (D, H, W) float32, HU."""
    hu = np.full(SHAPE, HU["air"], np.float32)
    for name, mask in parts().items():
        if name != "body":
            hu[mask] = HU[name]
    return hu


def with_noise(hu: np.ndarray, *, sd: float, seed: int) -> np.ndarray:
    """White noise added, float32."""
    return (hu + np.random.default_rng(seed).normal(0, sd, hu.shape)).astype(np.float32)
