"""Thin-slice CT from thick-slice CT.

    import ctsr

    thick = ctsr.read("in.nii.gz")
    thin = ctsr.upsample(thick, factor=2)
    ctsr.write(thin, "out.nii.gz")

Importing ctsr loads neither torch nor nibabel: each name brings what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctsr.core.volume import Volume
    from ctsr.errors import CtsrError
    from ctsr.infer.sampling import Sampling
    from ctsr.io.images import from_nibabel, from_sitk, to_nibabel, to_sitk
    from ctsr.io.nifti import write_volume as write
    from ctsr.io.scans import read_scan as read
    from ctsr.metrics.masks import body_mask
    from ctsr.physics.simulation import simulate_volume as simulate
    from ctsr.workflows.evaluate import evaluate_volumes as evaluate
    from ctsr.workflows.thinner import Thinner as Upsampler
    from ctsr.workflows.thinner import upsample

__version__ = "0.1.0"

__all__ = [
    "CtsrError", "Sampling", "Upsampler", "Volume", "__version__", "body_mask", "evaluate", "from_nibabel",
    "from_sitk", "read", "simulate", "to_nibabel", "to_sitk", "upsample", "write",
]  # fmt: skip

_HOMES = {
    "CtsrError": ("ctsr.errors", "CtsrError"),
    "Sampling": ("ctsr.infer.sampling", "Sampling"),
    "Upsampler": ("ctsr.workflows.thinner", "Thinner"),
    "Volume": ("ctsr.core.volume", "Volume"),
    "body_mask": ("ctsr.metrics.masks", "body_mask"),
    "evaluate": ("ctsr.workflows.evaluate", "evaluate_volumes"),
    "from_nibabel": ("ctsr.io.images", "from_nibabel"),
    "from_sitk": ("ctsr.io.images", "from_sitk"),
    "read": ("ctsr.io.scans", "read_scan"),
    "simulate": ("ctsr.physics.simulation", "simulate_volume"),
    "to_nibabel": ("ctsr.io.images", "to_nibabel"),
    "to_sitk": ("ctsr.io.images", "to_sitk"),
    "upsample": ("ctsr.workflows.thinner", "upsample"),
    "write": ("ctsr.io.nifti", "write_volume"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ctsr' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = getattr(import_module(module), attribute)
    globals()[name] = found
    return found
