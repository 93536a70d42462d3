"""What a command says: results on stdout, everything else on stderr, one line an error.

Text that came from outside (paths, header fields) is never markup and never steers a terminal.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from ctsr.errors import CtsrError

__all__ = ["Console", "Ticker", "printable", "to_stdout"]

Ticker = Callable[..., None]
PLAIN_LINE_SECONDS = 60.0  # off a terminal, long work says a line this often


def printable(text: object) -> str:
    """One line without control characters: what a terminal would obey becomes `\\x1b`, `\\n` …"""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class Console:
    """stdout and stderr of one run. `quiet` silences all but results and the error."""

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False, debug: bool = False
    ) -> None:
        self.quiet, self.verbose, self.as_json, self.debug = quiet, verbose, as_json, debug

    def note(self, text: object) -> None:
        """Something the user may want to know."""
        if not self.quiet:
            self._say(f"note: {printable(text)}")

    def warn(self, text: object) -> None:
        """Something the user should look at."""
        if not self.quiet:
            self._say(f"warning: {printable(text)}")

    def detail(self, text: object) -> None:
        """For `--verbose`."""
        if self.verbose and not self.quiet:
            self._say(printable(text))

    def error(self, error: CtsrError, *, code: int | None = None) -> None:
        """The line that says why the run ended; under `--json` a document on stdout as well. code: None for its own."""
        self._say(f"error: {printable(error)}")
        if self.as_json:
            told = {
                "code": code or error.exit_code,
                "path": error.path,
                "reason": error.reason,
                "hint": error.hint,
            }
            document = {"ok": False, "error": told} | _finite(error.report)
            to_stdout(json.dumps(document, indent=2, allow_nan=False) + "\n")

    def result(self, text: str) -> None:
        """A result for people; silent under `--json`."""
        if not self.as_json:
            to_stdout(printable(text) + "\n")

    def document(self, content: Mapping[str, Any]) -> None:
        """The one JSON document of a successful run, under `--json`; what is not finite is null."""
        if self.as_json:
            to_stdout(json.dumps({"ok": True} | _finite(dict(content)), indent=2, allow_nan=False) + "\n")

    def table(self, rows: Sequence[Mapping[str, Any]], *names: str, title: str = "") -> None:
        """What rows have under these names, or under those of the first, as aligned columns."""
        if self.as_json or not rows:
            return
        names = names or tuple(rows[0])
        cells = [list(names)] + [[_cell(row.get(name, "")) for name in names] for row in rows]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        to_stdout("\n".join(([title] if title else []) + lines) + "\n")

    @contextmanager
    def progress(self, what: str) -> Iterator[Ticker]:
        """Yields what is told a share in 0…1 and some words: for a bar on a terminal, else for a line a minute."""
        if (
            not self.quiet
            and sys.stderr is not None
            and sys.stderr.isatty()
            and os.environ.get("TERM") != "dumb"
        ):
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            texts = [
                TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[words]")
            ]
            share = TextColumn("{task.percentage:>3.0f} %")
            columns = (texts[0], BarColumn(), share, TimeRemainingColumn(), texts[1])
            with Progress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
                task = bar.add_task(printable(what), total=1.0, words="")
                yield lambda share, words="": bar.update(task, completed=share, words=words)
            return
        last = time.monotonic()

        def tick(share: float, words: str = "") -> None:
            nonlocal last
            if not self.quiet and time.monotonic() - last >= PLAIN_LINE_SECONDS:
                last = time.monotonic()
                self._say(f"{printable(what)}: {share:.0%} {words}".rstrip())

        yield tick

    def _say(self, line: str) -> None:
        try:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # stderr is closed: there is nobody to tell
            pass


def to_stdout(text: str) -> None:
    """Write and flush. A reader that went away (`| head`) is no error of ours; a full disk is: OSError."""
    if sys.stdout is None or sys.stdout.closed:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as exc:
        # what it still holds goes nowhere, so that the interpreter does not fail on it at its end
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(exc, BrokenPipeError):
            raise


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else printable(value)


def _finite(value: Any) -> Any:
    """JSON has no infinity: it becomes null."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
