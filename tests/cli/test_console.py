"""What is said: one line each, nothing that steers a terminal, JSON that is strict."""

from __future__ import annotations

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctsr.cli import console as module
from ctsr.cli.console import Console, printable
from ctsr.errors import InputError


@given(st.text())
def test_a_line_is_one_line_of_characters_that_show(text):
    shown = printable(text)
    assert shown.isprintable()
    assert printable(shown) == shown


def test_what_shows_is_kept():
    assert printable("a [x] é 日本 ≥") == "a [x] é 日本 ≥"
    assert printable("a\nb\x1b[31m\udcff") == "a\\nb\\x1b[31m\\udcff"


def test_an_error_is_said_on_stderr_even_where_stdout_is_full(capsys, monkeypatch):
    def full(text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "to_stdout", full)
    with pytest.raises(OSError, match="No space"):
        Console(as_json=True).error(InputError("is damaged", path="x.nii", hint="copy it again"))
    assert capsys.readouterr().err == "error: x.nii: is damaged (copy it again)\n"


def test_a_document_is_strict_json(capsys):
    Console(as_json=True).document({"a": math.inf, "b": [math.nan, 1.5], "c": {"d": -math.inf}})
    assert json.loads(capsys.readouterr().out) == {"ok": True, "a": None, "b": [None, 1.5], "c": {"d": None}}
    Console().document({"a": 1})
    assert capsys.readouterr().out == ""


def test_under_json_nothing_else_is_on_stdout(capsys):
    console = Console(as_json=True)
    console.result("x")
    console.table([{"a": 1}])
    assert capsys.readouterr().out == ""


def test_quiet_silences_all_but_results_and_the_error(capsys):
    console = Console(quiet=True, verbose=True)
    for say in (console.note, console.warn, console.detail):
        say("x")
    assert capsys.readouterr().err == ""
    console.error(InputError("x"))
    console.result("y")
    assert capsys.readouterr() == ("y\n", "error: x\n")


def test_a_table_is_aligned(capsys):
    Console().table([{"a": "x", "b": 1.23456}, {"a": None, "b": "long\n"}], title="t")
    assert capsys.readouterr().out == "t\na  b\nx  1.235\n–  long\\n\n"


def test_off_a_terminal_progress_is_a_plain_line_a_minute(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 61.0, 61.0, 62.0, 130.0, 130.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with Console().progress("in [x].nii") as ticker:
        ticker(0.1, "a")
        ticker(0.5, "b")
        ticker(0.6, "c")
        ticker(0.9, "d")
    assert capsys.readouterr().err == "in [x].nii: 50% b\nin [x].nii: 90% d\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_error(monkeypatch, stream):
    monkeypatch.setattr(sys, stream, None)
    console = Console()
    console.note("x")
    console.result("x")
    console.error(InputError("x"))
    with console.progress("x") as ticker:
        ticker(0.5)
