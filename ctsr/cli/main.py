"""The `ctsr` command: its subcommands, and the one place where an error becomes an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import Annotated

import typer

from ctsr import __version__
from ctsr.cli import evaluate, signals, simulate, train_baseline, upsample
from ctsr.cli.console import Console
from ctsr.errors import CtsrError, ResourceError, UsageError

__all__ = ["app", "main"]

app = typer.Typer(
    name="ctsr",
    help="Thin-slice CT from thick-slice CT: better resolution along z, HU kept, measured slices kept.",
    epilog="Research use only; not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (upsample, evaluate, simulate, train_baseline):
    command.register(app)

_CLICK_ERROR = typer.BadParameter.__mro__[
    2
]  # Typer carries its own copy of click: this is its ClickException


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and what this machine offers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --version: as JSON.")] = False,
) -> None:
    if version:
        _show_version(as_json)
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.BadParameter("no command given")


def main() -> None:
    """Run the command line and end the process with the code that its outcome has."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signals.install()
    console = Console(as_json="--json" in sys.argv)
    code = 0
    try:
        outcome = app(standalone_mode=False)
        code = outcome if isinstance(outcome, int) else 0
    except signals.Interrupted as exc:
        console.error(CtsrError("interrupted"))
        signals.die_by(exc.signum)
    except typer.Exit as exc:
        code = exc.exit_code
    except Exception as exc:
        if "--debug" in sys.argv:
            traceback.print_exc()
        error = _as_ours(exc)
        with contextlib.suppress(OSError):  # stdout on a full disk: the line on stderr is what is left
            console.error(error)
        code = error.exit_code
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    sys.exit(code)


def _as_ours(exc: Exception) -> CtsrError:
    """The error of our family that an exception stands for; code 1 where no rule names it."""
    if isinstance(exc, CtsrError):
        return exc
    if isinstance(exc, _CLICK_ERROR):
        return UsageError(_usage_reason(exc), hint="ctsr --help")
    if isinstance(exc, MemoryError) or _is_out_of_memory(exc):
        return ResourceError(
            "out of memory", hint="--max-memory bounds what is taken, --dry-run says what is needed"
        )
    if isinstance(exc, OSError):
        return ResourceError(f"{exc.strerror or exc}", path=exc.filename)
    words = " ".join(str(exc).split())
    return CtsrError(f"internal: {type(exc).__name__}: {words}", hint="please report; --debug shows where")


def _usage_reason(exc: Exception) -> str:
    text = exc.format_message() if hasattr(exc, "format_message") else str(exc)
    return " ".join(text.split()).rstrip(".")


def _is_out_of_memory(exc: Exception) -> bool:
    """torch says it in a plain RuntimeError on a CPU."""
    return isinstance(exc, RuntimeError) and (
        "can't allocate memory" in str(exc) or "out of memory" in str(exc)
    )


def _show_version(as_json: bool) -> None:
    import platform

    import torch

    facts = {
        "ctsr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    print(json.dumps(facts) if as_json else "\n".join(f"{name} {value}" for name, value in facts.items()))
