"""What a figure must say of where it came from."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def provenance(command: str) -> str:
    """One line: command, processor, cores, versions, date, commit."""
    import numpy
    import scipy
    import torch

    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (torch, numpy, scipy))
    abilities = torch.backends.cpu.get_cpu_capability()
    machine = f"{model} ({abilities}), {cores} cores; Python {platform.python_version()}, {versions}"
    return f"`{command}`; {machine}; {datetime.date.today()}; commit {commit}"


def options(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark: its docstring is the help, and --write puts the result into the docs."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    return parser


def peak() -> int:
    """Bytes that this process held at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * int(line.split()[1])  # not ru_maxrss, which a process inherits


def reference_data() -> Path:
    """The folder of reference volumes (CTSR_REFERENCE_DATA, else beside the checkout)."""
    return Path(os.environ.get("CTSR_REFERENCE_DATA", ROOT.parent / "shared" / "data"))


def markdown(rows: list[dict], columns: list[str] | None = None) -> str:
    """A table; floats to the digits they deserve."""
    columns = columns or list(rows[0])

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
        return "–" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows])


def section(path: Path, name: str, text: str) -> None:
    """Put `text` between the marks `<!-- NAME -->` and `<!-- /NAME -->` of a page."""
    page = path.read_text("utf-8")
    start, stop = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = f"{start}\n{text}\n{stop}"
    before, rest = page.split(start, 1)
    path.write_text(before + block + rest.split(stop, 1)[1], "utf-8")
