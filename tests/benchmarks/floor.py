"""Where the seconds of a doubling go, and how few this machine could do with.

    python tests/benchmarks/floor.py [--write]

Needs nothing but ctsr: 512 × 512 × 133 slices of a synthetic thorax, in the number format that `upsample` takes by
itself. The floor is the larger of two: the floating point operations of the convolutions over what a matrix product
reaches here, and the bytes of their inputs and outputs, each once, over what a copy reaches. With --write the section
`floor` of docs/benchmarks.md is replaced.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import ROOT, markdown, options, provenance, section
from speed import thick_input, timed
from torch import nn
from torch.profiler import ProfilerActivity, profile
from variants import flop, seconds

from ctsr.infer.device import choose_dtype
from ctsr.infer.windows import occupied_box
from ctsr.models.simple_unet3d import SimpleUNet3D
from ctsr.weights.registry import load_model

KINDS = {  # by a word in the operation's name
    "convolutions": ("convolution", "conv3d", "mkldnn"),
    "bilinear steps": ("upsample",),
    "activations and sums": ("leaky_relu", "add"),
    "joining and copying slices": ("cat", "copy", "clone", "contiguous", "zero_", "fill_"),
}


def main() -> None:
    asked = options(__doc__).parse_args()
    network, _ = load_model("baseline", kind="baseline")
    assert isinstance(network, SimpleUNet3D)
    with tempfile.TemporaryDirectory() as folder:
        y = np.ascontiguousarray(thick_input(Path(folder) / "thick.nii").transpose(2, 1, 0))
    dtype, _ = choose_dtype("auto", torch.device("cpu"))
    box = occupied_box(y, network.stride)
    voxels = len(y) * np.prod([s.stop - s.start for s in box])
    operations, moved = flop(network) * voxels, bytes_a_voxel(network, dtype) * voxels
    rate, bandwidth = multiply_rate(dtype), copy_rate()
    taken = statistics.median(seconds(network, dtype, y) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        seconds(network, dtype, y)
    spent = dict.fromkeys([*KINDS, "other work of the network"], 0.0)
    for event in trace.key_averages():
        kind = next((k for k, words in KINDS.items() if any(w in event.key for w in words)), list(spent)[-1])
        spent[kind] += event.self_cpu_time_total / 1e6
    floor = max(operations / rate, moved / bandwidth)
    rows = [
        {
            "what": f"{operations / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s, a matrix product's",
            "s": operations / rate,
        },
        {"what": f"{moved / 1e9:.0f} GB at {bandwidth / 1e9:.0f} GB/s, a copy's", "s": moved / bandwidth},
        {"what": "a doubling", "s": taken},
        *({"what": f"… {kind}", "s": share} for kind, share in spent.items()),
        {"what": "… matrices along z, and all else", "s": max(0.0, taken - sum(spent.values()))},
    ]
    words = (
        f"{str(dtype).split('.')[-1]}, {voxels / y.size:.0%} of the voxels lie in the box around the patient"
    )
    share = f"The floor is {floor / taken:.0%} of the doubling."
    text = f"{words}. {share} {provenance('python tests/benchmarks/floor.py --write')}\n\n{markdown(rows)}"
    print(text)
    if asked.write:
        section(ROOT / "docs" / "benchmarks.md", "floor", text)


def multiply_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two matrices of 3072 × 3072."""
    a = torch.randn(3072, 3072).to(dtype)
    return 2 * 3072**3 / timed(lambda: a @ a, 6)


def copy_rate() -> float:
    """Bytes/s, those read and those written."""
    a = torch.zeros(1 << 28, dtype=torch.uint8)
    b = torch.ones_like(a)
    return 2 * a.numel() / timed(lambda: b.copy_(a), 6)


def bytes_a_voxel(network: SimpleUNet3D, dtype: torch.dtype) -> float:
    """Of the inputs and outputs of all convolutions, a thick voxel."""
    counted = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        counted += inputs[0].numel() + output.numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv3d)]
    y = torch.zeros(1, 1, 12, 64, 64)
    network(y, y.repeat_interleave(2, dim=2), torch.ones(1))
    for hook in hooks:
        hook.remove()
    return counted * dtype.itemsize / y.numel()


if __name__ == "__main__":
    main()
