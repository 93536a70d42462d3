"""What can be asked for: defaults, bounds and words of options, for functions and records alike. Knows no parser."""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import Any

__all__ = [
    "PROFILE", "axis", "device", "form", "hu_offset", "length", "option", "overwrite", "project", "seed", "shard",
    "skip_existing", "threads", "workers",
]  # fmt: skip


def option(
    help: str, default: Any = None, *names: str, advanced: bool = False, panel: str = "", **how: Any
) -> Any:
    """An option that is called as its parameter or field is, unless `names` are given.

    panel: its heading in --help; advanced ones have one of their own. how: min, max, metavar and the like.
    """
    told = {"help": help, "names": names, "rich_help_panel": "Advanced" if advanced else panel or None}
    return field(default=default, metadata=told | how)


length = partial(option, metavar="MM")
PROFILE = "Slice profile: gaussian, box, triangle, or a file of (mm, weight)."
project = partial(option, "Folder with data/ and checkpoints/.")
device = partial(option, "auto, cpu, cuda, cuda:N or mps.", "auto")
threads = partial(option, "CPU threads; default: what this process may use.", advanced=True, min=1)
workers = partial(option, "Processes that prepare data.", 0, advanced=True, min=0)
seed = partial(option, "Same seed, same result.", 0, advanced=True, min=0, max=2**63 - 1)
overwrite = partial(option, "Replace outputs that exist.", False)
skip_existing = partial(option, "Leave outputs alone that are there and agree.", False)
SHARD = "Do every N-th case: 1/4 … 4/4, or env for what Slurm, Kubernetes or torchrun sets."
shard = partial(option, SHARD, metavar="I/N")
axis = partial(option, "Array axis that the slices lie along.", advanced=True, min=0, max=2)
form = partial(option, "sform or qform, where they disagree.", advanced=True)
hu_offset = partial(option, "Added to every voxel that is read.", 0.0, advanced=True, metavar="HU")
