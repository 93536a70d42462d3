"""`ctsr download-weights`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ctsr.cli.console import Console
from ctsr.errors import UsageError
from ctsr.workflows import options as o

NAMES = "A name of --list, or hf://org/repo@revision/file.safetensors."
SHOWN = ("name", "kind", "source", "revision", "file", "size", "sha256", "licence", "here")


def download_weights(
    console: Console,
    names: list[str] | None = typer.Argument(None, metavar="NAME…", help=NAMES),
    show: bool = o.option("Show all names, and what is here; asks no network.", False, "--list"),
    everything: bool = o.option("All names of --list.", False, "--all"),
    to: Path | None = o.option("Where they go; default: the cache (CTSR_CACHE).", metavar="DIR"),
    source: Path | None = o.option(
        "Take them from a folder that --to made: no network.", None, "--from", metavar="DIR"
    ),
    verify: bool = o.option("Only hash what is here, and compare.", False),
    revision: str | None = o.option("A branch, tag or commit, instead of the listed one."),
    overwrite: bool = o.option("Fetch again what is here: a branch may have moved.", False),
    timeout: float = o.option(
        "Seconds without progress to give up after.", 60.0, advanced=True, min=1, max=3600
    ),
) -> None:
    """Fetch weights to begin a training from, or that somebody published; the default model needs none.

    The sha256 of every file is checked. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are respected.
    """
    if not (names or show or everything or verify):
        raise UsageError("no weights named", hint="ctsr download-weights --list shows them")
    if (show or verify) and (source is not None or revision is not None or overwrite or (show and verify)):
        raise UsageError("--list and --verify stand without each other, --from, --revision and --overwrite")
    from ctsr.weights.hub import cache_folder
    from ctsr.weights.registry import PUBLISHED, SHIPPED
    from ctsr.workflows.download_weights import download_weights as run
    from ctsr.workflows.download_weights import list_weights, verify_weights

    root = to or cache_folder()
    if show or verify:
        rows = list_weights(root) if show else verify_weights(names or [], root)
        console.table([row | {"here": row.get("state", row["path"])} for row in rows], *SHOWN)
    else:
        noted: list[str] = []
        with console.progress("download") as ticker:

            def progress(record: dict[str, Any], done: int) -> None:
                of = f"{record['bytes'] / 1e6:.1f} MB"
                if record["reference"] not in noted:
                    noted.append(record["reference"])
                    pin = "pinned" if record["is_pinned"] else "not pinned: what the hub names"
                    told = "{reference}: commit {commit}, {of}, sha256 {sha256} ({pin}), licence {licence}"
                    console.note(told.format(of=of, pin=pin, **record))
                ticker(done / record["bytes"], f"{done / 1e6:.1f} of {of}")

            rows = run(
                [*SHIPPED, *PUBLISHED] if everything else names or [], root, source=source, revision=revision,
                overwrite=overwrite, timeout=timeout, progress=progress,
            )  # fmt: skip
        for row in rows:
            console.result(row["path"])
    console.document({"weights": rows})
