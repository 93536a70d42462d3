"""What an evaluation says: rows, their summary, the conditions on them, and the file they are written to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctsr.errors import RequirementNotMet, UsageError
from ctsr.io.atomic import check_output, write_text
from ctsr.io.lists import write_table
from ctsr.metrics.masks import BANDS
from ctsr.metrics.report import METRICS, Requirement, check_requirements, parse_requirement, summary
from ctsr.workflows.folder import raise_for_failures
from ctsr.workflows.requests import Wanted

__all__ = ["GAIN", "RESULT", "Evaluation", "checked"]

RESULT = "result"  # the method's name of what was handed in
GAIN = "gain_db"  # PSNR above that of cubic on the same voxels
KNOWN = (*METRICS, GAIN)
FIRST = ["case", "factor", "method", "statistic", "status", "reason", "mask"]
_LUNG_ERRORS = ("lung_below_950_error", "lung_below_910_error", "lung_p15_hu_error")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Rows of all cases and methods.

    judged: the method that the requirements are about. notes: what should be known.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    judged: str = RESULT
    requirements: Sequence[Requirement] = ()
    notes: list[str] = field(default_factory=list)

    def summary(self) -> list[dict[str, Any]]:
        """n, mean, min, max and (from 8 cases on) interval_95 of every metric, for each factor and method."""
        groups: dict[tuple[Any, str], list[dict[str, Any]]] = {}
        for row in self._measured():
            numbers = {name: row[name] for name in KNOWN if name in row}
            groups.setdefault((row.get("factor"), row["method"]), []).append(numbers)
        return [
            {"factor": factor, "method": method, "metrics": summary(rows)}
            for (factor, method), rows in groups.items()
        ]

    def unmet(self) -> list[str]:
        """What the judged method's rows fail, one line each."""
        lines = []
        for row in self._measured():
            if row["method"] == self.judged:
                where = row["case"] + (f", factor {row['factor']:g}" if "factor" in row else "")
                lines += [f"{where}: {line}" for line in check_requirements(row, self.requirements)]
        return lines

    def document(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"rows": self.rows, "summary": self.summary(), "not_met": self.unmet(), "notes": self.notes}

    def write(self, path: Path, *, overwrite: bool) -> None:
        """As .json, or as .csv: summary rows are those whose column `statistic` is not empty."""
        if path.suffix.lower() == ".json":
            text = json.dumps(self.document(), indent=2, allow_nan=False) + "\n"
            write_text(path, text, overwrite=overwrite)
            return
        rows = [*self.rows, *self._summary_rows()]
        columns = FIRST + [n for n in dict.fromkeys(n for row in rows for n in row) if n not in FIRST]
        write_table(path, columns, rows, overwrite=overwrite)

    def tables(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """(title, rows) for people: the columns that are read first."""
        shown = [_short(row) for row in self.rows]
        names = list(dict.fromkeys(n for row in shown for n in row))
        first = [{name: row.get(name, "") for name in names} for row in shown]
        title = ", ".join(f"mask: {mask}" for mask in dict.fromkeys(row["mask"] for row in self._measured()))
        if not self._has_several():
            return [(title, first)]
        second = []
        for group in self.summary():
            row = {k: group[k] for k in ("factor", "method") if group[k] is not None}
            for name in ("psnr_4095_db", GAIN, "ssim_coronal", "mae_hu", "residual_mean_hu"):
                if (found := group["metrics"].get(name)) and found["n"]:
                    row["n"] = found["n"]
                    row[f"{name}, mean (min…max)"] = "{mean:.4g} ({min:.4g}…{max:.4g})".format(**found)
            second.append(row)
        return [(title, first), ("summary", second)]

    def raise_for_outcome(self, path: Path | None) -> None:
        """SomeCasesFailed or RequirementNotMet, which carry the whole document, where one applies."""
        raise_for_failures(self.rows, path=path, report=self.document())
        if unmet := self.unmet():
            more = f" (and {len(unmet) - 1} more)" if len(unmet) > 1 else ""
            raise RequirementNotMet(f"{unmet[0]}{more}", report=self.document())

    def _measured(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["status"] == "ok"]

    def _has_several(self) -> bool:
        return len({row["case"] for row in self._measured()}) > 1

    def _summary_rows(self) -> Iterator[dict[str, Any]]:
        for group in self.summary() if self._has_several() else []:
            head = {"case": "", "factor": group["factor"], "method": group["method"], "status": "ok"}
            metrics = group["metrics"]
            for statistic in ("n", "mean", "min", "max"):
                yield head | {"statistic": statistic} | {k: v[statistic] for k, v in metrics.items()}
            for end, statistic in enumerate(("interval_95_low", "interval_95_high")):
                interval = {k: v["interval_95"][end] for k, v in metrics.items() if v["interval_95"]}
                if interval:
                    yield head | {"statistic": statistic} | interval


def checked(
    wanted: Wanted, inputs: Sequence[Path], *, is_one: bool, has_ref: bool = True, has_thick: bool = True
) -> list[Requirement]:
    """The conditions, parsed; UsageError, before any work, for what can't be measured or written."""
    if wanted.out is not None and wanted.out.suffix.lower() not in (".csv", ".json"):
        raise UsageError("ends in neither .csv nor .json", path=wanted.out)
    if wanted.figure is not None and wanted.figure.suffix.lower() != ".png":
        raise UsageError("does not end in .png", path=wanted.figure)
    if wanted.figure is not None and not is_one:
        raise UsageError("--figure shows one case, and one factor")
    for path in filter(None, (wanted.out, wanted.figure)):
        check_output(path, overwrite=wanted.overwrite, inputs=inputs)
    found = [parse_requirement(text, known=KNOWN) for text in wanted.require or ()]
    for each in found:
        is_residual = each.metric.startswith("residual")
        if (is_residual or each.metric == GAIN) and not has_thick:
            raise UsageError(f"--require: {each.metric} needs --thick")
        if not is_residual and not has_ref:
            raise UsageError(f"--require: {each.metric} needs REF")
    return found


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns for people; bands and lung errors share one each."""
    short = {n: row[n] for n in ("case", "factor", "method") if n in row}
    if row["status"] != "ok":
        return short | {"status": f"failed: {row['reason']}"}
    short |= {n: row[n] for n in ("psnr_4095_db", GAIN, "ssim_coronal", "mae_hu") if n in row}
    short |= _joined("bias_hu " + "/".join(BANDS), [row.get(f"bias_hu_{band}") for band in BANDS])
    short |= _joined("lung error <−950 %/<−910 %/p15 HU", [row.get(name) for name in _LUNG_ERRORS])
    short |= _joined("residual_hu mean/max", [row.get(f"residual_{end}_hu") for end in ("mean", "max")])
    if GAIN not in row and "psnr_4095_db" not in row:
        residuals = [row.get(f"residual_mean_hu_{band}") for band in BANDS]
        short |= _joined("residual_mean_hu " + "/".join(BANDS), residuals)
    return short


def _joined(name: str, values: Sequence[float | None]) -> dict[str, str]:
    if all(value is None for value in values):
        return {}
    return {name: "/".join("–" if value is None else f"{value:.2f}" for value in values)}
