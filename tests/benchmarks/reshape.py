"""Trained weights as the start of a SimpleUNet3D of another shape, or an untrained network of that shape.

    python tests/benchmarks/reshape.py WEIGHTS|none OUT.safetensors --channels 32 48 48 [--unshuffle 2]

For `ctsr train-baseline --init OUT.safetensors`. New channels begin with random weights towards them and zeros away
from them, so that a network that is only wider computes what the old one did; a coarsest level that is not wanted is
left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ctsr.models.simple_unet3d import SimpleUNet3D, SimpleUNet3DConfig
from ctsr.models.zoo import pack
from ctsr.weights.registry import load_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights")
    parser.add_argument("target", type=Path)
    parser.add_argument("--channels", type=int, nargs="+", required=True)
    parser.add_argument("--unshuffle", type=int, default=2)
    asked = parser.parse_args()
    torch.manual_seed(0)
    network = SimpleUNet3D(SimpleUNet3DConfig(tuple(asked.channels), asked.unshuffle))
    card = {"trained_on": []}
    if asked.weights != "none":
        trained, file = load_model(asked.weights, kind="baseline")
        card = {key: file.card[key] for key in ("trained_on", "licence") if key in file.card}
        widen(network, trained)
    asked.target.write_bytes(pack("baseline", network.config.to_dict(), network.state_dict(), card=card))
    print(f"{asked.target}: {sum(p.numel() for p in network.parameters()):,} parameters")


@torch.no_grad()
def widen(network: torch.nn.Module, trained: torch.nn.Module) -> None:
    """Put the weights of `trained` in the first channels of `network`; what would add to them from others is zero."""
    old = trained.state_dict()
    for name, new in network.state_dict().items():
        rows = len(old[name])
        if new.dim() == 1:
            new[:rows] = old[name]
        else:
            columns = old[name].shape[1]
            new[:rows, columns:] = 0
            new[:rows, :columns] = old[name]


if __name__ == "__main__":
    main()
