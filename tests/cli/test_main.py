"""From an outcome to an exit code and a line."""

from __future__ import annotations

import json

import pytest
import typer

from ctsr.cli import main as module
from ctsr.cli.main import _as_ours
from ctsr.errors import (
    CtsrError,
    GeometryError,
    InputError,
    NetworkError,
    RequirementNotMet,
    ResourceError,
    SomeCasesFailed,
    TrainingDiverged,
    UsageError,
    WeightsError,
)


def test_without_a_command_the_help_is_shown(ctsr):
    ran = ctsr()
    assert (ran.code, ran.out) == (2, "")
    assert "upsample" in ran.err
    assert ran.line == "error: no command given (ctsr upsample SRC OUT is the main one)"


def test_an_unknown_command_is_a_usage_error(ctsr):
    ran = ctsr("upsampel", "a", "b")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines() == [ran.line]
    assert "upsampel" in ran.line


def test_the_version_says_what_the_machine_offers(ctsr):
    told = json.loads(ctsr("--version", "--json").out)
    assert {"ctsr", "torch", "cuda", "cpu", "cpus"} <= set(told)
    ran = ctsr("--version")
    assert (ran.code, ran.out.splitlines()[0]) == (0, f"ctsr {told['ctsr']}")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["upsample", "--help"]])
def test_help_is_on_stdout(ctsr, arguments):
    ran = ctsr(*arguments)
    assert (ran.code, ran.err) == (0, "")
    assert "Research use only" in ran.out


@pytest.mark.parametrize(
    ("exc", "code", "words"),
    [
        (UsageError("x"), 2, "x"),
        (typer.BadParameter("x"), 2, "x"),
        (InputError("x"), 3, "x"),
        (GeometryError("x"), 3, "x"),
        (ResourceError("x"), 4, "x"),
        (MemoryError(), 4, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 4, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 4, "out of memory"),
        (OSError(28, "No space left on device"), 4, "no space left on device"),
        (WeightsError("x"), 5, "x"),
        (NetworkError("x"), 6, "x"),
        (SomeCasesFailed("x"), 7, "x"),
        (TrainingDiverged("x"), 8, "x"),
        (RequirementNotMet("x"), 9, "x"),
        (KeyError("w"), 1, "internal: KeyError: 'w'"),
        (RuntimeError("two\nlines"), 1, "internal: RuntimeError: two lines"),
    ],
)
def test_every_outcome_has_its_code(exc, code, words):
    error = _as_ours(exc)
    assert isinstance(error, CtsrError)
    assert (error.exit_code, words in str(error)) == (code, True)


def test_a_traceback_is_shown_only_when_asked(ctsr, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyError("w")

    monkeypatch.setattr(module, "app", broken)
    assert "Traceback" not in ctsr("upsample").err
    ran = ctsr("upsample", "--debug")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert ran.line.startswith("error: internal: KeyError")
