"""Turn a training's best checkpoint into the weights that ship, with their card.

    python tests/benchmarks/ship_weights.py RUN/best.safetensors --data-dir DATA --train-split train_files.txt

Drops the training's own state, adds what the weights were made from and the ranges of what they have seen,
and writes ctsr/weights/baseline.safetensors and the facts in its card, ctsr/weights/baseline.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from machine import ROOT, section

from ctsr.data.volumes import load_volumes
from ctsr.io.atomic import write_bytes
from ctsr.metrics.domain import noise_level
from ctsr.models import zoo

WEIGHTS = ROOT / "ctsr" / "weights" / "baseline.safetensors"
DATA = {  # collection → licence, of the scans that may train weights for any use
    "LIDC-IDRI (The Cancer Imaging Archive)": "CC BY 3.0",
    "RIDER Pilot (The Cancer Imaging Archive)": "CC BY",
    "Lung-PET-CT-Dx (The Cancer Imaging Archive)": "CC BY 4.0",
    "CMB-CRC (The Cancer Imaging Archive)": "CC BY 4.0",
    "CPTAC-LSCC (The Cancer Imaging Archive)": "CC BY 3.0",
    "TCGA-THCA (The Cancer Imaging Archive)": "CC BY 3.0",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--train-split", type=Path, required=True)
    asked = parser.parse_args()
    file = zoo.unpack(asked.checkpoint.read_bytes(), str(asked.checkpoint))
    volumes = load_volumes(asked.train_split, asked.data_dir, z_truth_max=1.5)
    planes = [v.spacing[i] for v in volumes for i in (1, 2)]
    noise = [n for v in volumes if (n := noise_level(v.hu)) is not None]
    progress = file.card["training"]
    card = {
        "trained_on": sorted(Path(v.name).name for v in volumes),
        "data": DATA,
        "licence": "Apache-2.0",
        "recipe": file.card["run"],
        "seed": file.card["seed"],
        "steps": progress["best_step"],
        "version": file.card["version"],
        "metrics": {"validation_psnr_4095_db": progress["best_db"]},
        "ranges": {
            "input_spacing_mm": [1.0, 6.5],
            "in_plane_spacing_mm": [min(planes), max(planes)],
            "relative_width": [0.8, 2.0],
            "noise_hu": [0.0, max(noise)],
            "highest_hu": [-1024.0, float(max(v.hu.max() for v in volumes))],
        },
    }
    data = zoo.pack(file.kind, file.config, file.tensors, card=card)
    write_bytes(WEIGHTS, data, overwrite=True)
    n = sum(int(np.prod(t.shape)) for t in file.tensors.values())
    digest = hashlib.sha256(data).hexdigest()
    facts = f"{n:,} parameters, {len(data):,} bytes, sha256 `{digest}`; step {card['steps']}, "
    facts += f"seed {card['seed']}.\n\n"
    ranges = json.dumps(card["ranges"], indent=2)
    section(WEIGHTS.with_suffix(".md"), "facts", facts + f"Trained for:\n\n```json\n{ranges}\n```")
    print(facts + ranges)


if __name__ == "__main__":
    main()
