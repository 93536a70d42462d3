"""The `ctsr` command: its subcommands, and the one place where an error becomes an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback

import typer

from ctsr import __version__
from ctsr.cli import signals
from ctsr.cli.command import command
from ctsr.cli.console import Console, to_stdout
from ctsr.cli.convert import convert
from ctsr.cli.download_weights import download_weights
from ctsr.cli.evaluate import evaluate
from ctsr.cli.simulate import simulate
from ctsr.cli.training import encode_latents, finetune_vae, train_baseline, train_diffusion
from ctsr.cli.upsample import upsample
from ctsr.errors import CtsrError, ResourceError, UsageError

__all__ = ["app", "main"]

NOTICE = "Research use only; not a medical device."
SHORT = "Train the autoencoder that diffusion works in."  # the help of finetune-vae begins otherwise
app = typer.Typer(
    name="ctsr",
    help="Thin-slice CT from thick-slice CT: better resolution along z, HU kept, measured slices kept.",
    epilog=NOTICE,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for work in (
    convert, upsample, evaluate, simulate, train_baseline, finetune_vae, encode_latents, train_diffusion,
    download_weights,
):  # fmt: skip
    app.command(epilog=NOTICE, short_help=SHORT if work is finetune_vae else None)(command(work))

_CLICK_ERROR = typer.BadParameter.__mro__[2]  # Typer's own copy of click: this is its ClickException


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and what this machine offers."),
    as_json: bool = typer.Option(False, "--json", help="With --version: as JSON."),
) -> None:
    if version:
        facts = _machine()
        to_stdout((json.dumps(facts) if as_json else "\n".join(f"{k} {v}" for k, v in facts.items())) + "\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        with contextlib.redirect_stdout(sys.stderr):
            context.get_help()  # Typer's prints it
        raise UsageError("no command given", hint="ctsr upsample SRC OUT is the main one")


def _machine() -> dict[str, object]:
    import platform

    import torch

    return {
        "ctsr": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def main() -> None:
    """Run the command line and end the process with the code that its outcome has."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signals.install()
    try:
        code = _run(Console(as_json="--json" in sys.argv, debug="--debug" in sys.argv))
        # torch leaves threads of the group that DDP has used: they may abort the interpreter's end after a good run
        if os.environ.get("WORLD_SIZE", "1") != "1":
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
        sys.exit(code)
    except signals.Interrupted as exc:
        signals.die_by(exc.signum)


def _run(console: Console) -> int:
    """The exit code of the command in `sys.argv`; what went wrong is said."""
    try:
        app(standalone_mode=False, obj=console)
        to_stdout("")
        return 0
    except signals.Interrupted as exc:
        console.error(CtsrError("interrupted"), code=128 + exc.signum)
        raise
    except (BrokenPipeError, SystemExit):  # the reader of a help text went away; Typer makes an exit of it
        code = 0
    except Exception as exc:
        if console.debug:
            traceback.print_exc()
        error = _as_ours(exc)
        code = error.exit_code
        with contextlib.suppress(OSError):  # stdout on a full disk: the line on stderr is what is left
            console.error(error)
    with contextlib.suppress(OSError):
        to_stdout("")
    return code


def _as_ours(exc: Exception) -> CtsrError:
    """The error of our family that an exception stands for; code 1 where no rule names it."""
    words = " ".join(str(exc).split())
    if isinstance(exc, CtsrError):
        return exc
    if isinstance(exc, _CLICK_ERROR):
        told = exc.format_message().replace("Value error, ", "")  # type: ignore[attr-defined]
        return UsageError(" ".join(told.split()).rstrip("."), hint="ctsr --help")
    is_full = isinstance(exc, RuntimeError) and ("can't allocate memory" in words or "out of memory" in words)
    if isinstance(exc, MemoryError) or is_full:  # torch says it in a plain RuntimeError on a CPU
        hint = "--max-memory bounds what is taken, --dry-run says what is needed"
        return ResourceError("out of memory", hint=hint)
    if isinstance(exc, OSError):
        reason = str(exc.strerror or exc)
        return ResourceError(reason[:1].lower() + reason[1:], path=exc.filename)
    return CtsrError(f"internal: {type(exc).__name__}: {words}", hint="please report; --debug shows where")
