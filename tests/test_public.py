"""What is public is exactly what `__all__` names."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import ctsr
from ctsr.errors import InputError
from tests.io.make import affine_of, ct

PUBLIC = {
    "CtsrError", "Sampling", "Upsampler", "Volume", "__version__", "body_mask", "evaluate", "from_nibabel", "from_sitk",
    "read", "simulate", "to_nibabel", "to_sitk", "upsample", "write",
}  # fmt: skip


def test_what_is_public_is_known():
    """A name more is a promise more; a name less breaks somebody's script."""
    assert set(ctsr.__all__) == PUBLIC
    assert len(ctsr.__all__) == len(PUBLIC)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_public_name_resolves_and_explains_itself(name):
    found = getattr(ctsr, name)
    assert callable(found)
    assert inspect.getdoc(found)
    assert found is getattr(ctsr, name)


def test_nothing_else_is_found():
    with pytest.raises(AttributeError, match="no attribute 'downsample'"):
        _ = ctsr.downsample
    names: dict[str, object] = {}
    exec("from ctsr import *", names)
    assert set(names) - {"__builtins__"} == PUBLIC


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_array_that_is_not_finite_is_refused(value):
    """A file's voxels are looked at when it is read, a caller's nowhere else."""
    hu = ct().astype(np.float32)
    hu[3, 4, 2] = value
    volume = ctsr.Volume(hu, affine_of())
    for work in (
        lambda: ctsr.upsample(volume, model="cubic"),
        lambda: ctsr.simulate(volume, factor=2),
        lambda: ctsr.evaluate(ctsr.Volume(ct(), affine_of()), volume),
    ):
        with pytest.raises(InputError, match="not finite"):
            work()
