"""Threads, sizes, and help texts that say what they mean."""

from __future__ import annotations

import os

import pytest
import typer.main
from rich.text import Text

from ctsr.cli import machine as options
from ctsr.cli.main import app
from ctsr.cli.upsample import _bytes
from ctsr.errors import UsageError

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (None, None),
        ("2G", 2 * 2**30),
        ("1.5 GiB", 1.5 * 2**30),
        ("800m", 800 * 2**20),
        ("1T", 2**40),
        ("7", 7),
    ],
)
def test_a_size_is_read(text, size):
    assert _bytes(text) == size


@pytest.mark.parametrize("text", ["", "abc", "-1G", "0", "0G", "1X", "G", "1e9", "inf", "1 2", "²G"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="not a size"):
        _bytes(text)


@pytest.mark.parametrize("name", ["SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"])
def test_the_smallest_grant_of_cpus_wins(monkeypatch, name):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(192)), raising=False)
    monkeypatch.setattr(options.Path, "read_text", lambda self: "max 100000")
    assert options.n_cpus() == 192
    monkeypatch.setenv(name, "4")
    assert options.n_cpus() == 4
    monkeypatch.setattr(options.Path, "read_text", lambda self: "250000 100000")
    assert options.n_cpus() == 3
    monkeypatch.setenv(name, "many")
    assert options.n_cpus() == 3


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_no_help_text_loses_words_to_markup(command):
    """Rich takes [x] for markup."""
    texts = [COMMANDS[command].help or "", *(p.help or "" for p in COMMANDS[command].params)]
    for text in texts:
        assert text
        assert Text.from_markup(text).plain == text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_all_commands_share_is_the_same(command):
    names = {option for p in COMMANDS[command].params for option in p.opts}
    assert {"-q", "--quiet", "-v", "--verbose", "--debug", "--json", "--config"} <= names
