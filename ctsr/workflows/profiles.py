"""Slice profiles as users name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ctsr.errors import UsageError
from ctsr.physics.profile import ProfileKind, SliceProfile

__all__ = ["read_profile"]

AREA_TOLERANCE = 0.01  # relative; a table's area is only known so well


def read_profile(name: str, *, notes: list[str] | None = None) -> SliceProfile:
    """gaussian, box, triangle, or a text file with two columns: mm from the slice's centre, weight (thin to thick).

    notes: gets a line where the file's weights are not of unit area and were scaled to it.
    """
    if name in (ProfileKind.GAUSSIAN, ProfileKind.BOX, ProfileKind.TRIANGLE):
        return SliceProfile(ProfileKind(name))
    if not Path(name).is_file():
        raise UsageError(f"--profile: {name} is not gaussian, box, triangle or a file")
    try:
        lines = Path(name).read_text("utf-8-sig").splitlines()
        rows = [line.replace(",", " ").split() for line in lines if line.strip() and not line.startswith("#")]
        profile = SliceProfile(ProfileKind.FILE, np.array([[float(cell) for cell in row] for row in rows]))
    except (ValueError, OSError) as exc:
        raise UsageError(
            f"can't be read as a profile: {exc}", path=name, hint="two columns: mm, weight"
        ) from exc
    except UsageError as exc:
        raise UsageError(exc.reason, path=name) from exc
    if notes is not None and profile.table is not None:
        heaviest = int(np.argmax(profile.table[:, 1]))
        given, scaled = float(rows[heaviest][1]), float(profile.table[heaviest, 1])
        if abs(given / scaled - 1) > AREA_TOLERANCE:
            notes.append(f"{name}: the weights have an area of {given / scaled:.4g}, scaled to 1")
    return profile
