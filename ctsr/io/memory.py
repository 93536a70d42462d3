"""How much memory this process may still take: what the machine has free, or less where a cgroup says so."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes() -> int | None:
    """Bytes that can be taken without swapping or being killed; None where it is not known (not Linux)."""
    known = []
    if machine := _told("/proc/meminfo", "MemAvailable:"):
        known.append(int(machine.split()[0]) * 1024)
    if group := _told("/proc/self/cgroup", "0::"):
        here = Path("/sys/fs/cgroup") / group.lstrip("/")
        for folder in (here, *here.parents):  # the tightest limit, less what is in use and can't be dropped
            limit, used = _told(folder / "memory.max"), _told(folder / "memory.current")
            if limit.isdigit() and used:
                cache = int(_told(folder / "memory.stat", "inactive_file ") or 0)
                known.append(max(0, int(limit) - int(used) + cache))
    return min(known, default=None)


def _told(path: str | Path, name: str = "") -> str:
    """What follows `name` in the first line that begins with it; empty where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, ValueError):
        return ""
    return next((line.removeprefix(name).strip() for line in lines if line.startswith(name)), "")
