"""What the command takes of the machine. For the command alone: a library changes no global state."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

from ctsr.errors import UsageError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
KEPT_BYTES = 1 << 25  # an activation has up to 27 MB; a volume has more and goes back when it is freed


def n_cpus() -> int:
    """CPUs that this process may use: affinity, Slurm's grant, OMP_NUM_THREADS, the cgroup; the smallest wins."""
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        if (granted := os.environ.get(name, "")).isdigit():
            found.append(int(granted))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            found.append(math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass
    return max(1, min(found))


def use_threads(threads: int | None) -> int:
    """Bound the threads of this process, NumPy's and torch's, and return their number.

    Both read the environment when they are loaded, so a command calls this before it imports either.
    """
    most = 4 * (os.cpu_count() or 1)
    if threads is not None and threads > most:
        raise UsageError(f"--threads: {threads} is not in 1…{most}")
    n = threads or n_cpus()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[name] = str(n)
    # a thread that waits by spinning takes the core of one that has work, where cores are shared: 4 to 10 × the time
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)
    return n


def keep_freed_memory() -> None:
    """Let glibc hand a freed block out again instead of returning it to the kernel. No effect elsewhere.

    A network's activations are tens of megabytes each and live for milliseconds; by default every one is mapped and
    zeroed anew, which took as long as the convolutions (41 s of a run against 24 s, two cores).
    """
    if sys.platform.startswith("linux") and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
