"""What a sample costs beside the posterior mean, on a problem whose answer is known.

    python tests/benchmarks/theory.py [--write]

x₀ ~ N(0.3, 0.25), y = x₀ + N(0, 0.04), y₀ = y, the denoiser exact; V = 0.0345 is the posterior's variance. With samples
of variance P, the mean of K of them loses 10·log₁₀(1 + P/(K·V)) dB to the posterior mean. With --write the section
`theory` of docs/benchmarks.md and docs/theory.png are replaced.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import ROOT, markdown, provenance, section
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT))
from ctsr.diffusion.sampler import heun, noise_source, sample
from ctsr.diffusion.schedule import Flow, Path, Schedule, kappa_for
from ctsr.workflows.figures import png
from tests.diffusion.gaussian import MU, TAU2, S, V, oracle, posterior_mean, remaining, response

N = 500_000  # voxels: a standard error of 0.01 dB
COUNTS = (1, 2, 4, 8)
TOLERANCE = 0.03  # dB between measurement and theory: three standard errors
PUBLISHED = Schedule.published()
CTSR = Schedule.ctsr(kappa_for(math.sqrt(TAU2), V), V)
FLOW = Flow(math.sqrt(TAU2))
NAMES = {PUBLISHED: "published", CTSR: "ctsr", FLOW: "flow"}


@dataclass(frozen=True)
class Way:
    path: Path
    name: str
    steps: int = 15
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sampler(self) -> Any:
        return heun if self.name == "heun" else sample

    @property
    def arguments(self) -> dict[str, Any]:
        kind = {} if self.name == "heun" else {"kind": self.name.split()[0]}
        return {"n_steps": self.steps} | kind | self.options

    @property
    def calls(self) -> int:
        return 2 * self.steps - 1 if self.name == "heun" else self.steps


WAYS = [
    Way(CTSR, "multistep", 1),
    *(
        Way(path, name, options=options)
        for path in (PUBLISHED, CTSR)
        for name, options in (
            ("ancestral", {}),
            ("ddim", {}),
            ("multistep", {}),
            ("ancestral + error", {"error": lambda level, path=path: remaining(path, level, V)}),
        )
    ),
    Way(CTSR, "multistep", 4),
    Way(CTSR, "multistep", 25),
    Way(FLOW, "ddim"),
    Way(FLOW, "multistep"),
    Way(FLOW, "heun", 8),
]
SHOWN = [("published", "ancestral"), ("published", "multistep"), ("ctsr", "ancestral"), ("ctsr", "multistep")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    rows = [measured(way) for way in WAYS]
    table = markdown([shown(row) for row in rows])
    print(table)
    if asked.write:
        said = provenance("python tests/benchmarks/theory.py --write")
        section(ROOT / "docs" / "benchmarks.md", "theory", f"{said}\n\n{table}")
        (ROOT / "docs" / "theory.png").write_bytes(picture(rows))


def measured(way: Way) -> dict[str, Any]:
    """Spread and losses of one sampler, by its linear response and by drawing."""
    generator = torch.Generator().manual_seed(0)
    truth, error = torch.randn(2, N, generator=generator, dtype=torch.float64)
    truth = MU + math.sqrt(S) * truth
    y = truth + math.sqrt(TAU2) * error
    best = posterior_mean(y)
    k = max(COUNTS)
    samples = way.sampler(
        oracle(way.path, (best - y).float(), V),
        y.float().expand(k, N),
        way.path,
        noise=noise_source((N,), seed=1, samples=range(k)),
        **way.arguments,
    ).double()
    floor = ((best - truth) ** 2).mean()
    means = [samples[:count].mean(dim=0) for count in COUNTS]
    _, exact = response(way.sampler, way.path, **way.arguments)
    return {
        "way": way,
        "exact": exact / V,
        "measured": float((samples - best).var()) / V,
        "theory_db": [10 * math.log10(1 + exact / V / count) for count in COUNTS],
        "loss_db": [10 * math.log10(((mean - truth) ** 2).mean() / floor) for mean in means],
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    way, pairs = row["way"], list(zip(row["loss_db"], row["theory_db"], strict=True))
    return {
        "schedule": NAMES[way.path], "sampler": way.name, "steps": way.steps, "calls": way.calls,
        "P/V (theory)": f"{row['measured']:.3f} ({row['exact']:.3f})",
        **{f"K = {k}: dB (theory)": f"{a:.2f} ({b:.2f})" for k, (a, b) in zip(COUNTS, pairs, strict=True)},
        f"within {TOLERANCE} dB": "yes" if all(abs(a - b) < TOLERANCE for a, b in pairs) else "**missed**",
    }  # fmt: skip


def picture(rows: list[dict[str, Any]]) -> bytes:
    """Left: the loss of the mean of K, lines theory, dots measured. Right: the spread by the number of steps."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    fine = [1 + 7 * i / 70 for i in range(71)]
    left.plot(fine, [10 * math.log10(1 + 1 / k) for k in fine], "k--", label="exact posterior samples")
    right.axhline(1, color="k", linestyle="--")
    by_name = {(NAMES[r["way"].path], r["way"].name): r for r in rows if r["way"].steps in (8, 15)}
    counts = [1, 2, 4, 6, 8, 10, 15, 20, 25, 35, 50, 100]
    for schedule, sampler in [*SHOWN, ("flow", "heun")]:
        row, label = by_name[schedule, sampler], f"{schedule}, {sampler}"
        way = row["way"]
        curve = [10 * math.log10(1 + row["exact"] / k) for k in fine]
        (line,) = left.plot(fine, curve, label=f"{label}, {way.calls} calls")
        left.plot(COUNTS, row["loss_db"], "o", color=line.get_color())
        spread = [response(way.sampler, way.path, **way.arguments | {"n_steps": n})[1] / V for n in counts]
        calls = [2 * n - 1 for n in counts] if sampler == "heun" else counts
        right.semilogx(calls, spread, ".-", color=line.get_color())
    left.set(xlabel="samples averaged, K", ylabel="loss to the posterior mean, dB", ylim=(0, None))
    left.set_title("lines: 10·log₁₀(1 + P/(K·V)); dots: measured", fontsize=9)
    right.set(xlabel="calls of the network", ylabel="variance of a sample / posterior's, P/V", ylim=(0, 1.4))
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return png(figure)


if __name__ == "__main__":
    main()
