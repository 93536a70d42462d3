"""Importing is light and changes nothing outside the package."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import ctsr

HEAVY = {
    "torch",
    "nibabel",
    "pydicom",
    "SimpleITK",
    "matplotlib",
    "scipy",
    "numpy",
    "rich",
    "typer",
    "huggingface_hub",
}
LIGHT = {
    "ctsr": set(),
    "ctsr.errors": set(),
    "ctsr.core.volume": {"numpy"},
    "ctsr.io.nifti": {"numpy"},
    "ctsr.physics.simulation": {"numpy", "scipy"},
    "ctsr.metrics.masks": {"numpy", "scipy"},
    "ctsr.infer.pipeline": {"numpy", "scipy"},
    "ctsr.workflows.thinner": {"numpy", "scipy"},
    "ctsr.workflows.upsample": {"numpy", "scipy"},
    "ctsr.workflows.convert": {"numpy"},
}  # a matrix along z needs no torch: `--model cubic` starts in half a second

WATCH = """
import json, os, random, signal, sys, warnings, locale
def state():
    signals = [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)]
    return [signals, list(map(str, warnings.filters)), dict(os.environ), str(random.getstate()), locale.setlocale(0)]
first = sys.argv.index("then")
for name in sys.argv[1:first]:
    __import__(name)
before = state()
for name in sys.argv[first + 1 :]:
    __import__(name)
after = state()
print(json.dumps([sorted({m.split(".")[0] for m in sys.modules}), before == after]))
"""


def imported(*names: str, first: tuple[str, ...] = ()) -> tuple[set[str], bool]:
    """The top-level modules that these names bring in, and whether the process is otherwise as it was after `first`."""
    env = os.environ | {"PYTHONPATH": str(Path(ctsr.__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WATCH, *first, "then", *names],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    modules, is_unchanged = json.loads(ran.stdout)
    return set(modules), is_unchanged


@pytest.mark.parametrize("name", LIGHT)
def test_a_module_brings_in_no_more_than_it_needs(name):
    modules, _ = imported(name)
    assert modules & HEAVY == LIGHT[name]


def test_importing_changes_no_global_state():
    ours = ("ctsr", "ctsr.io.nifti", "ctsr.workflows.upsample", "ctsr.metrics.masks", "ctsr.cli.main")
    others = (
        "numpy",
        "scipy.special",
        "scipy.ndimage",
        "typer.main",
        "isal.igzip_threaded",
    )  # these have filters
    _, is_unchanged = imported(*ours, first=others)
    assert is_unchanged


def test_every_module_can_be_imported():
    names = [m.name for m in pkgutil.walk_packages(ctsr.__path__, "ctsr.") if m.name != "ctsr.__main__"]
    assert len(names) > 40
    imported(*names)
