"""Options that all commands share, so that each is spelt, bounded and explained once."""

from __future__ import annotations

import math
import os
import sys
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from ctsr.cli.console import Console
from ctsr.errors import UsageError

__all__ = [
    "Axis", "Config", "Debug", "Device", "DryRun", "Form", "HuOffset", "Json", "Overwrite", "Project", "Quiet", "Seed",
    "Shard", "SkipExisting", "Threads", "Verbose", "Workers", "console_of", "finite", "length", "n_cpus", "number",
    "option", "use_threads",
]  # fmt: skip

ADVANCED = "Advanced"


def finite(value: float | None) -> float | None:
    """A callback for lengths and factors: `inf` and `1e400` pass a parser's bounds."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Put a TOML file's entries where the parser looks for defaults: the command line wins."""
    if path is None:
        return None
    if not path.is_file():
        raise UsageError("is not a file" if path.exists() else "does not exist", path=path)
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(f"can't be read as TOML: {exc}", path=path) from exc
    known = {p.name: p for p in context.command.params if p.name}
    by_option = {opt.lstrip("-").replace("-", "_"): name for name, p in known.items() for opt in p.opts}
    defaults: dict[str, Any] = {}
    for key, value in table.items():
        name = by_option.get(key.replace("-", "_"))
        if name is None:
            near = get_close_matches(key, by_option, 1)
            hint = (
                f"did you mean {near[0].replace('_', '-')}?"
                if near
                else f"options: {', '.join(sorted(by_option))}"
            )
            raise UsageError(f"{key} is no option of {context.info_name}", path=path, hint=hint)
        defaults[name] = value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def option(*names: str, advanced: bool = False, panel: str | None = None, **how: Any) -> Any:
    """A Typer option; advanced ones stand under a heading of their own in --help."""
    return typer.Option(*names, rich_help_panel=ADVANCED if advanced else panel, **how)


def number(*names: str, **how: Any) -> Any:
    """An option for a finite number."""
    return option(*names, callback=finite, **how)


def length(*names: str, **how: Any) -> Any:
    """An option for a length in mm."""
    return number(*names, metavar="MM", **how)


Quiet = Annotated[bool, option("-q", "--quiet", help="Say nothing but results and errors.")]
Verbose = Annotated[bool, option("-v", "--verbose", help="Say what was chosen and why.")]
Debug = Annotated[bool, option("--debug", advanced=True, help="Show a traceback with an error.")]
Json = Annotated[bool, option("--json", advanced=True, help="One JSON document on stdout.")]
Overwrite = Annotated[bool, option("--overwrite", help="Replace outputs that exist.")]
Device = Annotated[str, option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int, option("--seed", advanced=True, min=0, max=2**63 - 1, help="Same seed, same result.")]
Threads = Annotated[
    int | None,
    option("--threads", advanced=True, min=1, help="CPU threads; default: what this process may use."),
]
Workers = Annotated[int, option("--workers", advanced=True, min=0, help="Processes that prepare data.")]
Project = Annotated[Path | None, option("--project", help="Folder with data/ and checkpoints/.")]
SkipExisting = Annotated[
    bool, option("--skip-existing", help="Leave outputs alone that are there and agree.")
]
SHARD = "Do every N-th case: 1/4 … 4/4, or env for what Slurm, Kubernetes or torchrun sets."
Shard = Annotated[str | None, option("--shard", metavar="I/N", help=SHARD)]
Config = Annotated[
    Path | None,
    option(
        "--config", advanced=True, callback=_read_config, is_eager=True,
        help="A TOML file with options; the command line wins.",
    ),
]  # fmt: skip
Axis = Annotated[
    int | None, option("--axis", advanced=True, min=0, max=2, help="Array axis that the slices lie along.")
]
Form = Annotated[str | None, option("--form", advanced=True, help="sform or qform, where they disagree.")]
HuOffset = Annotated[
    float, number("--hu-offset", advanced=True, metavar="HU", help="Added to every voxel that is read.")
]
PROFILE = "Slice profile: gaussian, box, triangle, or a file of (mm, weight)."
DryRun = Annotated[bool, option("--dry-run", help="Say what would be done, and with how much memory.")]


def console_of(quiet: bool, verbose: bool, as_json: bool) -> Console:
    """The console for these flags."""
    return Console(quiet=quiet, verbose=verbose, as_json=as_json)


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
