"""What can be asked for: defaults, bounds and words of options, for functions and records alike. Knows no parser."""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import Any

__all__ = [
    "PROFILE", "axis", "device", "form", "hu_offset", "length", "option", "overwrite", "project", "seed", "shard",
    "skip_existing", "threads", "workers",
]  # fmt: skip


def option(default: Any, help: str, *names: str, advanced: bool = False, panel: str = "", **how: Any) -> Any:
    """An option that is called as its parameter or field is, unless `names` are given.

    panel: its heading in --help; advanced ones have one of their own. how: min, max, metavar and the like.
    """
    told = {"help": help, "names": names, "rich_help_panel": "Advanced" if advanced else panel or None}
    return field(default=default, metadata=told | how)


length = partial(option, metavar="MM")
PROFILE = "Slice profile: gaussian, box, triangle, or a file of (mm, weight)."
project = partial(option, None, "Folder with data/ and checkpoints/.")
device = partial(option, "auto", "auto, cpu, cuda, cuda:N or mps.")
threads = partial(option, None, "CPU threads; default: what this process may use.", advanced=True, min=1)
workers = partial(option, 0, "Processes that prepare data.", advanced=True, min=0)
seed = partial(option, 0, "Same seed, same result.", advanced=True, min=0, max=2**63 - 1)
overwrite = partial(option, False, "Replace outputs that exist.")
skip_existing = partial(option, False, "Leave outputs alone that are there and agree.")
SHARD = "Do every N-th case: 1/4 … 4/4, or env for what Slurm, Kubernetes or torchrun sets."
shard = partial(option, None, SHARD, metavar="I/N")
axis = partial(option, None, "Array axis that the slices lie along.", advanced=True, min=0, max=2)
form = partial(option, None, "sform or qform, where they disagree.", advanced=True)
hu_offset = partial(option, 0.0, "Added to every voxel that is read.", advanced=True, metavar="HU")
