"""Slice profiles as users name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ctsr.errors import UsageError
from ctsr.physics.profile import ProfileKind, SliceProfile

__all__ = ["read_profile"]


def read_profile(name: str) -> SliceProfile:
    """gaussian, box, triangle, or a text file with two columns: mm from the slice's centre, weight (thin to thick)."""
    if name in (ProfileKind.GAUSSIAN, ProfileKind.BOX, ProfileKind.TRIANGLE):
        return SliceProfile(ProfileKind(name))
    if not Path(name).is_file():
        raise UsageError(f"--profile: {name} is not gaussian, box, triangle or a file")
    try:
        table = np.loadtxt(
            name,
            delimiter="," if "," in Path(name).read_text("utf-8-sig") else None,
            encoding="utf-8-sig",
            ndmin=2,
        )
        return SliceProfile(ProfileKind.FILE, table)
    except (ValueError, OSError) as exc:
        raise UsageError(
            f"can't be read as a profile: {exc}", path=name, hint="two columns: mm, weight"
        ) from exc
    except UsageError as exc:
        raise UsageError(exc.reason, path=name) from exc
