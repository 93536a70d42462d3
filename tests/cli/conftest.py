"""The command line in this process: what a shell would see, without the seconds that a process costs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ctsr.cli.main import main
from tests.infer.tiny import checkpoint


@dataclass(frozen=True)
class Ran:
    """What a command left: its exit code, and what it said."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1] if self.err else ""


@pytest.fixture
def ctsr(capsys, monkeypatch) -> Callable[..., Ran]:
    """Runs `ctsr ARGUMENTS`; signal handlers, environment and threads are as before when the test ends."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    environ, threads = dict(os.environ), torch.get_num_threads()

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["ctsr", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ran(int(ended.value.code or 0), *capsys.readouterr())

    yield run
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A small random network as a model file."""
    return checkpoint(tmp_path_factory.mktemp("weights"))
