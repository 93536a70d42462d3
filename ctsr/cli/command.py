"""How a function becomes a command: its options, those that all commands have, and what a file of options says."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Any, get_type_hints

import typer

from ctsr.cli.console import Console
from ctsr.cli.machine import use_threads
from ctsr.errors import UsageError
from ctsr.workflows.options import option

__all__ = ["command"]


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Put a TOML file's entries where the parser looks for defaults: the command line wins."""
    if path is None:
        return None
    if not path.is_file():
        raise UsageError("is not a file" if path.exists() else "does not exist", path=path)
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise UsageError(f"can't be read as TOML: {exc}", path=path) from exc
    params = {opt.lstrip("-").replace("-", "_"): p for p in context.command.params for opt in p.opts}
    told = {}
    for key, value in table.items():
        if (param := params.get(key.replace("-", "_"))) is None:
            near = [name.replace("_", "-") for name in get_close_matches(key, params, 1)]
            hint = f"did you mean {near[0]}?" if near else f"options: {', '.join(sorted(params))}"
            raise UsageError(f"{key} is no option of {context.info_name}", path=path, hint=hint)
        if isinstance(value, bool) and not getattr(param, "is_flag", False):  # the parser would read 1 or 0
            raise UsageError(f"{key} takes a value, not {str(value).lower()}", path=path)
        told[param.name] = value
    context.default_map = {**(context.default_map or {}), **told}
    for name in ("as_json", "debug"):  # for an error, too, which is told elsewhere
        if told.get(name) is True:
            setattr(context.obj, name, True)
    return path


CONFIG = "A TOML file with options; the command line wins."


@dataclass(frozen=True)
class Common:
    """The options of all commands."""

    config: Path | None = option(CONFIG, advanced=True, callback=_read_config, is_eager=True)
    quiet: bool = option("Say nothing but results and errors.", False, "-q", "--quiet")
    verbose: bool = option("Say what was chosen and why.", False, "-v", "--verbose")
    debug: bool = option("Show a traceback with an error.", False, advanced=True)
    as_json: bool = option("One JSON document on stdout.", False, "--json", advanced=True)


def command(work: Callable[..., None]) -> Callable[..., None]:
    """`work(console, …)` as Typer reads it: a parameter that is a record stands for all of its options."""
    records = {name: hint for name, hint in get_type_hints(work).items() if is_dataclass(hint)}

    @wraps(work)
    def run(**given: Any) -> None:
        for name, value in given.items():
            # `inf` and `1e400` pass a parser's bounds
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')}: {value} is not a finite number")
            if value == Path("-"):
                reason = "reading from standard input or writing to standard output is not supported"
                raise UsageError(reason, path="-", hint="give a file")
        if "threads" in given:
            given["threads"] = use_threads(given["threads"])
        common = _record(Common, given)
        for name, record in records.items():
            given[name] = _record(record, given)
        work(Console(quiet=common.quiet, verbose=common.verbose, as_json=common.as_json), **given)

    parameters = [*_parameters(work), *_parameters(Common)]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _record(kind: Any, given: dict[str, Any]) -> Any:
    """A record of those options that are its fields, which are taken out."""
    return kind(**{f.name: given.pop(f.name) for f in fields(kind) if f.metadata})


def _parameters(of: Any) -> Iterator[Parameter]:
    """The parameters of a function, or the fields of a record, as Typer reads them."""
    hints = get_type_hints(of)
    if is_dataclass(of):
        told: dict[str, Any] = {f.name: f for f in fields(of) if f.metadata}
    else:
        told = {p.name: p.default for p in signature(of).parameters.values() if hints[p.name] is not Console}
    for name, default in told.items():
        if is_dataclass(hints[name]):
            yield from _parameters(hints[name])
            continue
        if isinstance(default, Field):
            how = dict(default.metadata)
            names = how.pop("names") or (f"--{name.replace('_', '-')}",)  # named, or a flag has a --no-… too
            default = typer.Option(default.default, *names, **how)
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
