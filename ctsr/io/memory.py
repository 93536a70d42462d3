"""How much memory this process may still take: what the machine has free, or less where a cgroup says so."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes() -> int | None:
    """Bytes that can be taken without swapping or being killed; None where it is not known (not Linux)."""
    known = [b for b in (_machine(), _cgroup()) if b is not None]
    return min(known, default=None)


def _machine() -> int | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup() -> int | None:
    """Tightest limit of the cgroup (version 2) and its parents, less what is in use and can't be dropped."""
    group = next((line[3:] for line in _lines("/proc/self/cgroup") if line.startswith("0::")), None)
    if group is None:
        return None
    root = Path("/sys/fs/cgroup")
    here = root / group.lstrip("/")
    free = []
    for folder in (here, *here.parents):
        limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
        if limit and used and limit[0].isdigit():
            cache = next(
                (int(s.split()[1]) for s in _lines(folder / "memory.stat") if s.startswith("inactive_file ")),
                0,
            )
            free.append(max(0, int(limit[0]) - int(used[0]) + cache))
        if folder == root:
            break
    return min(free, default=None)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except (OSError, ValueError):
        return []
